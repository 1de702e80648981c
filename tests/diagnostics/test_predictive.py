"""Checks of calibration on densities that are right by construction, and on wrong ones."""

import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import SUPPORTS, random_flow
from pyro.distributions import constraints
from scipy.stats import kstwo
from torch import nn

from pyro_interpolant import (
    AutoInterpolant,
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    FixedGrid,
    InterpolantDistribution,
    Samples,
    interpolant_transform,
)
from pyro_interpolant.diagnostics import coverage, pit, sbc, tarp
from pyro_interpolant.distributions import (
    ConditionalJointInterpolantDistribution,
    JointInterpolantDistribution,
)

CHECKS = {"pit": pit, "coverage": coverage, "sbc": sbc, "tarp": tarp}
COARSE = FixedGrid(steps=3)


def family(support=constraints.real_vector, dim=2):
    flow = random_flow(dim, (8, 8), context_dim=2, solver=COARSE)
    return ConditionalInterpolantDistribution(flow, support=support).freeze()


def idle_flow(dim):
    """A flow without velocity: N(0, I) whatever the context, of as many numbers."""
    flow = random_flow(dim, (4,), context_dim=dim, solver=FixedGrid(1))
    for p in flow.parameters():
        nn.init.zeros_(p)
    flow.flow.whitening.set(torch.zeros(dim), torch.eye(dim))
    return flow


def simulated(d, count=250):
    context = torch.randn(count, 2)
    return d.condition(context).sample(), context


@pytest.mark.parametrize(
    ("check", "support"),
    [(pit, "positive"), (coverage, "simplex"), (sbc, "corr_cholesky"), (tarp, "simplex")],
)
def test_draws_of_the_density_itself_are_calibrated(check, support):
    case = SUPPORTS[support]
    d = family(case.support, case.dim)
    x, context = simulated(d)
    found = check(d, x, context, draws=40)
    assert found.distances.max() < 1.3 * found.band  # exceeded once in some thousand checks
    if found.distances.max() < found.band:
        assert found.verdict.startswith("calibrated as far as 250 rows tell")
    assert found.values.shape == (250, len(found.names))
    assert ((found.values > 0) & (found.values < 1)).all()


@pytest.mark.parametrize(
    ("check", "change", "words"),
    [
        pytest.param(*case, marks=() if case[0] is tarp else pytest.mark.slow)
        for case in [
            (pit, lambda x, m: m + 2.5 * (x - m), "column 0 is predicted too narrow"),
            (pit, lambda x, m: m + 0.3 * (x - m), "column 1 is predicted too wide"),
            (pit, lambda x, m: x + torch.tensor([1.5, 0.0]), "column 0 is predicted too low"),
            (coverage, lambda x, m: m + 2.5 * (x - m), "highest-density regions are too small"),
            (coverage, lambda x, m: m + 0.3 * (x - m), "highest-density regions are too large"),
            (sbc, lambda x, m: m + 2.5 * (x - m), "the log-density is predicted too high"),
            (sbc, lambda x, m: x - torch.tensor([0.0, 1.5]), "column 1 is predicted too high"),
            (tarp, lambda x, m: m + 3 * (x - m), "regions around other rows are"),
        ]
    ],
)
def test_what_is_off_is_named(check, change, words):
    d = family()
    x, context = simulated(d)
    means = d.condition(context).sample((40,)).mean(0)
    found = check(d, change(x, means), context, draws=40)
    assert found.verdict.startswith("not calibrated: ")
    assert words in found.verdict
    assert repr(found) == found.verdict


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_right_density_fails_once_in_a_hundred_checks(check):
    """Of few rows and draws, where ranks are coarse: 50 checks of N(0, 1) itself."""
    d = ConditionalInterpolantDistribution(idle_flow(1)).freeze()
    failed = 0
    for seed in range(50):
        torch.manual_seed(seed)
        context = torch.randn(30, 1)
        x = d.condition(context).sample()
        failed += "not calibrated" in check(d, x, context, draws=9, seed=seed).verdict
    assert failed <= 2  # where one in a hundred is expected


def test_rows_may_come_in_order():
    d = InterpolantDistribution(interpolant_transform(2, (4,), solver=FixedGrid(1))).freeze()
    torch.manual_seed(1)
    x = torch.randn(600, 2)
    for check in (pit, coverage, tarp):
        found = check(d, x[x[:, 0].argsort()], draws=100)
        assert found.verdict.startswith("calibrated"), check


class Moved(nn.Module):
    """A velocity that is the context: rows are N(c, I)."""

    event_dim, context_dim = 2, 2

    def forward(self, t, x, context=None):
        return context.expand_as(x)


@pytest.mark.parametrize("check", [pit, tarp])
def test_rows_in_several_parts_have_draws_of_their_own(check, monkeypatch):
    monkeypatch.setattr("pyro_interpolant.diagnostics.predictive._VALUES_AT_ONCE", 800)
    transform = ConditionalInterpolantTransform(Moved(), solver=FixedGrid(1))
    d = ConditionalInterpolantDistribution(transform)
    context = 9 * torch.arange(50.0)[:, None].expand(-1, 2)
    x = d.condition(context).sample()
    assert check(d, x, context, draws=40).verdict.startswith("calibrated")


def test_the_band_is_of_all_quantities_and_of_rows_that_share_draws():
    """4,000 draws, compared with which 400 rows tell as much as 364 do."""
    d = InterpolantDistribution(interpolant_transform(2, (4,), solver=FixedGrid(1))).freeze()
    x = d.sample((400,))
    assert pit(d, x).band == pytest.approx(kstwo.isf(0.01 / 2, 364))
    alone = InterpolantDistribution(interpolant_transform(1, (4,), solver=FixedGrid(1))).freeze()
    assert pit(alone, x[:, :1]).band == pytest.approx(kstwo.isf(0.01, 400))  # by the cdf


def test_the_pit_of_scalars_is_their_cdf():
    transform = interpolant_transform(1, (8,))
    transform.flow.whitening.set(torch.tensor([1.0]), torch.tensor([[2.0]]))
    d = InterpolantDistribution(transform, event_shape=()).freeze()
    x = dist.Normal(1.0, 2.0).sample((50,))
    torch.testing.assert_close(pit(d, x).values[:, 0], dist.Normal(1.0, 2.0).cdf(x))


def test_named_parameters_are_named():
    flow = random_flow(2, (8, 8), context_dim=2, solver=COARSE)
    sites = {"loc": ((), constraints.real), "scale": ((), constraints.positive)}
    d = ConditionalJointInterpolantDistribution(flow, sites=sites).freeze()
    context = torch.randn(300, 2)
    draws = d.condition(context).sample_dict()
    found = sbc(d, draws, context, draws=50)
    assert found.names == ("site 'loc'", "site 'scale'", "the log-density")
    assert found.verdict.startswith("calibrated")
    wrong = {**draws, "scale": 5 * draws["scale"]}
    assert "site 'scale' is predicted too low" in sbc(d, wrong, context, draws=50).verdict


def test_a_check_is_the_same_at_each_call_and_leaves_the_generator_alone():
    d = family()
    x, context = simulated(d, 50)
    state = torch.get_rng_state()
    one, two = (coverage(d, x, context, draws=20) for _ in range(2))
    assert torch.equal(one.values, two.values)
    assert torch.equal(torch.get_rng_state(), state)


def test_refusals():
    d, x, context = family(), torch.randn(9, 2), torch.randn(9, 2)
    with pytest.raises(ValueError, match=r"x of shape \(N, 2\)"):
        coverage(d, x[:, :1], context)
    with pytest.raises(ValueError, match="as many contexts as rows, 9, got 8"):
        coverage(d, x, context[:8])
    with pytest.raises(ValueError, match="expected a context for a conditional flow, got none"):
        coverage(d, x, None)
    with pytest.raises(ValueError, match="finite context"):
        coverage(d, x, context / 0)
    with pytest.raises(ValueError, match="at least two rows to check with"):
        coverage(d, x[:1], context[:1])
    with pytest.raises(ValueError, match="draws >= 1, a whole"):
        coverage(d, x, context, draws=0)
    with pytest.raises(ValueError, match=r"got a batch of shape \(9,\): pass the cond"):
        pit(d.condition(context), x)
    base = dist.Normal(torch.zeros(9, 2), 1.0).to_event(1)
    with pytest.raises(ValueError, match=r"expected one base for all rows.* batch shape \(9,\)"):
        pit(ConditionalInterpolantDistribution(d.transform, base), x, context)
    with pytest.raises(TypeError, match="AutoInterpolant, got Independent"):
        pit(base, x)
    # A table of values on the supports would be taken for unconstrained numbers.
    sites = {"a": ((), constraints.real), "sd": ((), constraints.positive)}
    joint = JointInterpolantDistribution(random_flow(2, solver=COARSE), sites=sites).freeze()
    for check in (pit, coverage, tarp):
        with pytest.raises(TypeError, match=r"draws of the sites \['a', 'sd'\] by name"):
            check(joint, x)


@pytest.mark.parametrize(("check", "draws"), [(pit, 1), (tarp, 1), (tarp, 100)])
def test_rows_that_are_equal_to_draws_are_any_of_them(check, draws):
    """Of few draws, too: the middle of the ranks had too many rows, and references all of them."""
    transform = ConditionalInterpolantTransform(Moved(), solver=FixedGrid(1))
    d = ConditionalInterpolantDistribution(transform, base=Samples(torch.arange(4.0).view(2, 2)))
    context = torch.randint(0, 9, (2000, 2)).double()
    found = check(d, d.condition(context).sample(), context, draws=draws)
    assert found.distances.max() < 1.2 * found.band


def test_a_density_that_ignores_contexts_is_far_from_references():
    """Rows are N(c, I), c ~ N(0, I), and the density is N(0, 2I): all ranks are uniform."""
    flow = idle_flow(2)
    flow.flow.whitening.set(torch.zeros(2), 2**0.5 * torch.eye(2))
    d = ConditionalInterpolantDistribution(flow).freeze()
    context = torch.randn(300, 2)
    x = context + torch.randn(300, 2)
    assert sbc(d, x, context).verdict.startswith("calibrated")
    assert "regions around other rows are too large" in tarp(d, x, context).verdict


@pytest.mark.slow
def test_a_guide_is_compared_with_draws_of_another_sampler():
    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        return scale

    guide = AutoInterpolant(model, hidden_dims=(8,), solver=COARSE)
    draws = {"scale": torch.randn(300).exp(), "x": torch.randn(300, 2)}
    with pytest.raises(ValueError, match="knows the sites of its model"):
        pit(guide, draws)
    guide()  # N(median, I) in unconstrained coordinates: the posterior but for the init's noise
    guide.transform.flow.whitening.set(torch.zeros(3), torch.eye(3))
    for check in (pit, coverage, tarp):
        found = check(guide, draws)
        assert found.verdict.startswith("calibrated"), found
    assert pit(guide, draws).names[0] == "site 'scale'"
    wide = {**draws, "x": 3 * draws["x"]}
    assert "site 'x'[1] is predicted too narrow" in pit(guide, wide).verdict
    with pytest.raises(ValueError, match="expected no context"):
        sbc(guide, draws, torch.zeros(300, 1))


def test_columns_of_a_frame_are_those_of_training():
    transform = interpolant_transform(2, (8,), solver=COARSE)
    transform.flow.whitening.set(torch.tensor([0.0, 10.0]), torch.eye(2))
    d = InterpolantDistribution(transform).freeze()
    d.columns = ("mass", "radius")
    frame = pandas.DataFrame(d.sample((100,)).numpy(), columns=d.columns)
    for check in (pit, coverage, tarp):
        found = check(d, frame[["radius", "mass"]])
        assert torch.equal(found.values, check(d, frame).values), check
    assert found.verdict.startswith("calibrated")
    with pytest.raises(ValueError, match=r"x with the columns \['mass', 'radius'\].*got \['mass'"):
        pit(d, frame.rename(columns={"radius": "z"}))


def test_contexts_of_a_frame_are_taken_by_name():
    d = family()
    d.context_columns = ("age", "dose")
    x, context = simulated(d, 50)
    frame = pandas.DataFrame(context.numpy(), columns=d.context_columns)
    for check in CHECKS.values():
        expected = check(d, x, context, draws=5).values
        assert torch.equal(check(d, x, frame[["dose", "age"]], draws=5).values, expected), check
    with pytest.raises(ValueError, match=r"context with the columns \['age', 'dose'\].*'z'\]"):
        pit(d, x, frame.rename(columns={"dose": "z"}))


@pytest.mark.slow
def test_ranks_below_a_bound_agree_with_the_cdf():
    d = InterpolantDistribution(random_flow(1), support=constraints.less_than(0.0)).freeze()
    x = d.sample((100,))
    exact, ranks = pit(d, x).values[:, 0], sbc(d, x, None).values[:, 0]
    assert (exact - ranks).abs().max() < 0.05


def test_a_far_row_hides_nothing_of_its_column():
    d = InterpolantDistribution(random_flow(2, (8, 8), solver=COARSE)).freeze()
    with torch.no_grad():
        x = d.sample((400,))
        x[:, 0] = x[:, 0].mean() + 0.3 * (x[:, 0] - x[:, 0].mean())
        x[0, 0] = 1e5
    check = tarp(d, x)
    assert float(check.distances.max()) > 1.5 * check.band


def test_a_site_that_is_bounded_above_alone_is_judged_as_its_values_rise():
    transform = interpolant_transform(1, (8,))
    below = JointInterpolantDistribution(transform, sites={"a": ((), constraints.less_than(0.0))})
    torch.manual_seed(0)
    a = -torch.exp(torch.randn(200) + 1.0)  # lower than exp(N(0, 1)) below 0
    found = pit(below.freeze(), {"a": a})
    exact = torch.special.ndtr(-a.neg().log().double())
    torch.testing.assert_close(found.values[:, 0], exact)
    assert "predicted too high" in found.verdict
