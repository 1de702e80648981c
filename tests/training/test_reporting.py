"""The report of a run: its numbers against closed forms, its line, its way through files."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_interpolant import (
    Geodesic,
    InterpolantDistribution,
    InterpolantTransform,
    TorusMLP,
    VelocityMLP,
    circular,
    fit,
    from_samples,
    interpolant_transform,
    load,
    save,
)
from pyro_interpolant.distributions.report import Report
from pyro_interpolant.training.data import Split, Table
from pyro_interpolant.training.distributed import Process
from pyro_interpolant.training.reporting import HeldOutDensity, reference
from pyro_interpolant.training.rows import Rows
from pyro_interpolant.training.streaming import Stream

pytestmark = [
    pytest.mark.usefixtures("_few_held_draws"),
    pytest.mark.filterwarnings("ignore:the fit came out wrong"),
]
QUICK = {"steps": 3, "seed": 0, "progress": False}
PLAIN = {**QUICK, "marginals": False}


def measured(density, report=None):
    return density.measured(report or Report(1, 1, 1.0, 1, 1))


def small(dim, context_dim=0, classes=0):
    """Return a network that costs little to calibrate."""
    return VelocityMLP(dim, (8, 8), context_dim, classes)


@pytest.mark.parametrize("kind", ["positive", "spline", "radial", "joint"])
def test_held_out_nats_and_the_gaussian_are_those_of_the_distributions_own_values(kind):
    """Rows held out are given, so that both means can be computed from outside."""
    x, held = 1 + 0.5 * torch.randn(2000, 2), 1 + 0.5 * torch.randn(500, 2)
    options = {"marginals": False, "support": constraints.real_vector}
    jacobian = 0.0
    if kind == "positive":
        x, held, jacobian = x.exp(), held.exp(), held.sum(-1)
        options["support"] = constraints.positive
    elif kind == "spline":
        options["marginals"] = True
    elif kind == "radial":
        scale = torch.randn(2500, 1).exp()
        x, held = x * scale[:2000], held * scale[2000:]
        options["marginals"] = None
    if kind == "joint":
        d = from_samples(
            {"a": x[:, 0], "b": x[:, 1]},
            **QUICK,
            network=small(2),
            validation={"a": held[:, 0], "b": held[:, 1]},
        )
    else:
        d = from_samples(x, **QUICK, **options, network=small(x[0].numel()), validation=held)
    report = d.report
    values = d.log_prob(held)
    assert report.held_out == pytest.approx(float(values.mean()), abs=1e-9)
    assert report.held_out_stderr == pytest.approx(float(values.std()) / math.sqrt(500), abs=1e-9)
    real = x.log() if kind == "positive" else x
    rows = (held.log() if kind == "positive" else held).reshape(500, -1)
    real = real.reshape(len(real), -1)
    normal = dist.MultivariateNormal(real.mean(0), torch.atleast_2d(real.T.cov()))
    expected = float((normal.log_prob(rows) - jacobian).mean())
    assert report.reference == pytest.approx(expected, abs=1e-3)  # of N or N - 1 rows


@pytest.mark.slow
def test_the_gaussian_given_a_context_is_a_linear_regression():
    c = torch.randn(4000, 2)
    y = c @ torch.tensor([[1.0, 0.0], [2.0, -1.0]]) + torch.randn(4000, 2) @ torch.diag(
        torch.tensor([0.1, 3.0])
    )
    report = from_samples(y, context=c, network=small(2, 2), **PLAIN).report
    truth = -dist.Normal(0.0, torch.tensor([0.1, 3.0])).entropy().sum()
    assert report.reference == pytest.approx(float(truth), abs=0.15)
    labels = torch.arange(4000) % 3
    report = from_samples(
        labels[:, None] + torch.randn(4000, 2),
        context=labels,
        network=small(2, classes=3),
        **PLAIN,
    ).report
    assert report.reference == pytest.approx(-math.log(2 * math.pi * math.e), abs=0.15)


def test_the_gaussian_of_many_columns_is_that_of_many_rows():
    x, flow = torch.randn(30_000, 20), InterpolantDistribution(interpolant_transform(20, (8,)))
    log_prob = reference(flow, Rows(x, None))
    normal = dist.MultivariateNormal(x.mean(0), x.T.cov(correction=0))
    torch.testing.assert_close(log_prob(Rows(x[:5], None)), normal.log_prob(x[:5]))


@pytest.mark.slow
def test_angles_are_compared_with_the_uniform_density():
    report = from_samples(torch.rand(500, 2), support=circular, **QUICK).report
    assert report.reference == pytest.approx(-2 * math.log(2 * math.pi))
    assert "(uniform -3.67" in repr(report)


def test_a_distribution_has_a_report_once_it_is_trained(tmp_path):
    d = InterpolantDistribution(interpolant_transform(2, (16, 16)))
    assert d.report is None
    save(d, tmp_path / "new.safetensors")
    assert load(tmp_path / "new.safetensors").report is None
    result = fit(d, torch.randn(300, 2), **QUICK)
    assert result.report is d.report
    assert d.expand((3,)).report is d.report
    assert (d.report.rows, d.report.steps, d.report.dim) == (300, 3, 2)
    assert d.report.log_prob_error < 1e-2
    assert repr(result).startswith(f"{d.report!r}\nended by schedule; FixedGrid(")
    save(d, tmp_path / "fitted.safetensors")
    assert load(tmp_path / "fitted.safetensors").report == d.report


@pytest.mark.slow
def test_without_a_density_there_are_no_nats():
    d = InterpolantDistribution(interpolant_transform(2, (16, 16)))
    given = {"base_samples": torch.randn(200, 2), "seed": 0}
    fit(d, torch.randn(300, 2), steps=30, progress=True, **given)  # with a bar that looks
    report = fit(d, torch.randn(300, 2), **{**QUICK, **given}).report
    assert report.held_out is None
    assert report.log_prob_error is None
    assert " s: weights of step " in repr(report)


def test_a_report_is_one_line():
    report = Report(5, 3000, 41.4, 1080, 6000, 0.0041, -6.1234, 0.031, -6.8)
    assert (
        repr(report)
        == str(report)
        == (
            "5-d density from 3,000 rows in 41.4 s: held-out -6.123 ± 0.031 nats (one Gaussian "
            "-6.800); log_prob within 0.004 nats; weights of step 1,080 of 6,000"
        )
    )


@pytest.mark.slow
def test_what_is_shown_ends_in_the_report_and_changes_nothing(capsys):
    x, weights = torch.randn(300, 2), torch.rand(300)
    options = {"weights": weights, "marginals": False, "steps": 40, "seed": 0}
    shown, hidden = (
        from_samples(x, progress=progress, batch_size=64, **options) for progress in (True, False)
    )
    assert torch.equal(
        shown.transform.velocity.output.weight, hidden.transform.velocity.output.weight
    )
    assert shown.report.held_out == hidden.report.held_out
    told = capsys.readouterr()
    assert told.out == ""
    assert "calibrating the solver" in told.err
    assert told.err.rstrip().splitlines()[-1].startswith("2-d density from ")


@pytest.mark.slow
def test_the_error_of_weighted_rows_is_that_of_their_mean():
    """Of 25 sets of 200 rows with weights of a long tail: the spread is what the error says."""
    d = InterpolantDistribution(interpolant_transform(1, (8,))).freeze()
    found = []
    for seed in range(25):
        torch.manual_seed(seed)
        rows = Rows(torch.randn(200, 1), None, None, (2 * torch.randn(200)).exp())
        split = Split(rows, rows, 200.0, 10, 200.0)
        report = measured(HeldOutDensity(d, split))
        found.append(
            (report.held_out + 0.5 * math.log(2 * math.pi * math.e), report.held_out_stderr)
        )
    error, stated = torch.tensor(found).T
    assert 0.5 < float(error.square().mean().sqrt() / stated.square().mean().sqrt()) < 2


def test_copies_of_a_row_make_its_mean_no_surer():
    d = InterpolantDistribution(interpolant_transform(1, (8,))).freeze()
    x = torch.randn(50, 1)
    found = [
        measured(HeldOutDensity(d, Split(rows, rows, 50.0, 10, 50.0)))
        for rows in (Rows(x, None), Rows(x.repeat_interleave(4, 0), None))
    ]
    for name in ("held_out", "held_out_stderr"):
        assert getattr(found[0], name) == pytest.approx(getattr(found[1], name))


def test_the_gaussian_and_its_mean_are_by_weight():
    """Of as many rows far off next to nothing is seen."""
    d = InterpolantDistribution(interpolant_transform(1, (8,))).freeze()
    x = torch.randn(400, 1)
    weight = torch.tensor([1.0, 1e-12]).repeat_interleave(400)
    rows = Rows(torch.cat((x, x + 50)), None, None, weight)
    split = Split(rows, rows, 400.0, 10, 400.0)
    report = measured(HeldOutDensity(d, split))
    normal = dist.Normal(x.mean(), x.std(correction=0))
    assert report.reference == pytest.approx(float(normal.log_prob(x).mean()))
    assert report.held_out == pytest.approx(float(d.log_prob(x).mean()))


@pytest.mark.parametrize("streamed", [False, True])
def test_a_report_counts_rows_by_the_weights_of_all(streamed):
    """Those of the rows held out, counted by themselves, were added to the others'."""
    x, weights = torch.randn(400, 1), torch.ones(400)
    weights[0] = 1e4
    d = InterpolantDistribution(interpolant_transform(1, (8,)))
    split = Stream(d, [(x, weights)], 0.1) if streamed else Table(d, x, 0.1, weights=weights)
    assert split.split(Process(None), None).rows == pytest.approx(10399**2 / (1e8 + 399))


def uniform():
    return dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1)


def bounded():
    support = constraints.positive
    return InterpolantDistribution(interpolant_transform(2, (8,)), support=support)


BASES = {  # and whether it has a density at all real vectors
    "default": (lambda: None, True),
    "uniform": (uniform, False),
    "flow": (lambda: InterpolantDistribution(interpolant_transform(2, (8,))), True),
    "flow with bounds": (bounded, False),
    "flow from bounds": (
        lambda: InterpolantDistribution(interpolant_transform(2, (8,)), uniform()),
        False,
    ),
}


def test_the_density_judges_where_the_base_has_one_everywhere_and_rows_have_no_pairs():
    rows = Rows(torch.rand(20, 2), None)
    split = Split(rows, rows, 20.0, 10, 20.0)
    for name, (base, everywhere) in BASES.items():
        d = InterpolantDistribution(interpolant_transform(2, (8,)), base())
        assert (HeldOutDensity(d, split).scores() is not None) is everywhere, name
        d.transform.flow.independent = False
        assert HeldOutDensity(d, split).scores() is None, name
    flow = InterpolantTransform(TorusMLP(2, (8,)), interpolant=Geodesic())
    vonmises = dist.VonMises(torch.zeros(2), torch.ones(2)).to_event(1)
    for base in (None, vonmises):
        d = InterpolantDistribution(flow, base, support=circular)
        assert HeldOutDensity(d, split).scores() is not None


def test_rows_without_a_density_are_told_of():
    d = InterpolantDistribution(interpolant_transform(2, (8,)), uniform()).freeze()
    rows = Rows(torch.tensor([[0.5, 0.5], [0.5, 2.0], [-3.0, 0.0], [4.0, 4.0]]), None)
    density = HeldOutDensity(d, Split(rows, rows, 4.0, 10, 4.0))
    with pytest.warns(UserWarning, match=r"a share of 0.75 of the rows .*zero: .*beyond the b"):
        report = measured(density)
    assert report.held_out is None
    rows = Rows(rows.w[:1].expand(4, 2), None)
    report = measured(HeldOutDensity(d, Split(rows, rows, 4.0, 10, 4.0)), report)
    assert report.held_out == pytest.approx(-math.log(4.0))


def test_the_loss_judges_where_no_row_has_a_density(monkeypatch):
    monkeypatch.setattr(
        "pyro_interpolant.training.reporting.log_density",
        lambda distribution, rows: torch.full((len(rows.w),), -math.inf),
    )
    far = dist.Normal(3 * torch.ones(2), torch.ones(2)).to_event(1)
    d = InterpolantDistribution(interpolant_transform(2, (8,)), far)
    result = fit(d, torch.randn(500, 2), **{**QUICK, "steps": 20})
    assert result.best_step == 20
    assert result.validation_losses[-1] < result.validation_losses[0]
