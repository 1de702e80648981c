"""Awkward data: outliers, heavy tails, far modes, units, columns that hardly differ."""

import io
import logging
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from narrow import brief_looks

from pyro_interpolant import (
    InterpolantDistribution,
    InterpolantTransform,
    fit,
    from_samples,
    interpolant_transform,
)

pytestmark = pytest.mark.usefixtures("_few_held_draws")

QUICK = {"progress": False, "seed": 0, "batch_size": 256, "learning_rate": 5e-3}


def made(dim=2, widths=(32, 32)):
    torch.manual_seed(7)
    return InterpolantDistribution(interpolant_transform(dim, widths))


def modes(count):
    """Two curved modes, far from one another."""
    x = torch.randn(count, 2)
    x = torch.stack((x[:, 0], x[:, 0] ** 2 + 0.5 * x[:, 1]), -1)
    return x + 12.0 * (torch.rand(count, 1) < 0.3)


@pytest.mark.slow
def test_heavy_tails_are_learned_where_the_data_are():
    truth = dist.StudentT(2.0, torch.zeros(1), torch.ones(1)).to_event(1)
    distribution = made(1)
    fit(distribution, truth.sample((20_000,)), steps=250, **QUICK)
    x = truth.sample((2000,))
    x = x[x.abs()[:, 0] < 15]
    with torch.no_grad():
        gap = truth.log_prob(x) - distribution.log_prob(x)
    assert float(gap.mean()) < 0.1


@pytest.mark.slow
def test_modes_far_apart_keep_their_shares():
    distribution = made()
    fit(distribution, modes(10_000), steps=250, **QUICK)
    share = float((distribution.sample((4000,))[:, 0] > 6).double().mean())
    assert share == pytest.approx(0.3, abs=0.04)


def log_prob_after(rows, test, seed=0):
    """Return the log-density of other rows after a fit to some."""
    distribution = made()
    fit(distribution, rows, steps=250, **{**QUICK, "seed": seed})
    with torch.no_grad():
        return distribution.log_prob(test)


@pytest.fixture(scope="module")
def plain(_clean_module):
    """Rows, other rows, and the log-density of these after fits to the former by two seeds."""
    torch.manual_seed(0)
    x, test = modes(20_000), modes(4000)
    with pytest.MonkeyPatch.context() as patch:
        brief_looks(patch.setattr)
        return x, test, log_prob_after(x, test), log_prob_after(x, test, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("far", [1e2, 1e6])
def test_a_wild_row_does_not_change_the_fit_of_the_rest(plain, far):
    """One row in 20,000; what differs without it is what another seed of the training changes."""
    x, test, first, second = plain
    wild = log_prob_after(torch.cat((x[:-1], torch.tensor([[far, -far]]))), test)
    of_seed, of_row = (float((first - other).abs().mean()) for other in (second, wild))
    assert of_row < 1.5 * of_seed
    assert abs(float((first - wild).mean())) < 0.08  # seeds differ by 0.05


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_do_not_matter(dtype):
    units = torch.tensor([1e-12, 1.0, 1e12], dtype=torch.float64)
    x = torch.randn(2000, 3, dtype=torch.float64)
    x[:, 2] += x[:, 0] ** 2
    plain, scaled = made(3, (16, 16)).to(dtype), made(3, (16, 16)).to(dtype)
    fit(plain, x.to(dtype), steps=30, **QUICK)
    fit(scaled, (x * units).to(dtype), steps=30, **QUICK)
    plain.freeze(), scaled.freeze()
    near = {"rtol": 0, "atol": 2e-2 if dtype == torch.float32 else 1e-6}
    torch.testing.assert_close(
        plain.log_prob(x[:50].to(dtype)) - units.log().sum().to(dtype),
        scaled.log_prob((x[:50] * units).to(dtype)),
        **near,
    )
    spread = scaled.sample((500,)).double().std(0) / units
    torch.testing.assert_close(spread, x.std(0), rtol=0.3, atol=0)


@pytest.mark.slow
def test_columns_that_hardly_differ_are_learned_or_told():
    x = torch.randn(3000, 2)
    x[:, 1] = x[:, 0] + 1e-5 * x[:, 1]
    learned = made(2, (16, 16))
    fit(learned, x, steps=20, **QUICK)
    difference = learned.sample((2000,)).diff(dim=-1)
    assert float(difference.std()) == pytest.approx(1e-5, rel=0.2)
    with pytest.warns(UserWarning, match="varies by .* in float64"):
        fit(made(2, (8,)).to(torch.float32), 5 + x.float(), steps=5, **QUICK)
    x[:, 1] = x[:, 0]
    with pytest.raises(ValueError, match="dependent ones.*drop one, or add noise"):
        from_samples(x, steps=5)


# ---- stopping, and saying so --------------------------------------------------------------------


@pytest.fixture
def said():
    """What the package logs: pytest's own capture of that is off, see pyproject.toml."""
    text, logger = io.StringIO(), logging.getLogger("pyro_interpolant")
    handler, level = logging.StreamHandler(text), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield text
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.mark.usefixtures("_small_runs")
def test_a_callback_stops_the_run_by_returning_true(said):
    distribution = made()
    result = fit(distribution, modes(500), steps=100, callback=lambda s: s.step >= 20, **QUICK)
    assert result.steps[-1] == 22  # the first look from there on
    assert result.stopped_early
    assert result.stopped_by == "callback"
    assert "fit stopped early at step 22, 22% of its schedule, by callback" in said.getvalue()
    assert f"step {result.best_step} were kept" in said.getvalue()


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_what_a_callback_returns_beside_true_does_not_stop_it(said):
    result = fit(made(), modes(500), steps=20, callback=lambda s: s.step, **QUICK)
    assert result.steps[-1] == 20
    assert result.stopped_by == "schedule"
    assert not result.stopped_early
    assert "stopped early" not in said.getvalue()


@pytest.mark.parametrize("true", [np.True_, torch.tensor(True)], ids=["numpy", "torch"])  # noqa: FBT003
@pytest.mark.usefixtures("_small_runs")
def test_true_of_any_kind_stops_it(true):
    result = fit(made(), modes(500), steps=100, callback=lambda s: true, **QUICK)
    assert result.stopped_by == "callback"


@pytest.mark.slow
def test_patience_and_interrupts_are_named(capsys):
    def interrupt(state):
        if state.step > 10:
            raise KeyboardInterrupt

    options = {**QUICK, "progress": True}
    with pytest.warns(UserWarning, match="run was interrupted"):
        result = fit(made(), modes(500), steps=100, callback=interrupt, **options)
    assert result.stopped_by == "interrupt"
    assert "by interrupt" in capsys.readouterr().err
    result = fit(
        made(), torch.randn(60, 2), steps=2000, patience=1, **{**options, "batch_size": 9}
    )
    assert result.stopped_by == "patience"
    assert "by patience" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_a_run_that_was_stopped_is_not_run_again(tmp_path):
    keep = {"checkpoint": tmp_path / "run", "steps": 100}
    told = []
    stopped, again, x = made(), made(), modes(500)
    fit(stopped, x, callback=lambda s: s.step >= 20, **keep, **QUICK)
    result = fit(again, x, callback=told.append, **keep, **QUICK)
    assert not told
    assert result.stopped_by == "callback"
    for a, b in zip(stopped.transform.parameters(), again.transform.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("_small_runs")
def test_a_loss_that_is_not_finite_is_skipped_and_counted():
    class Huge(torch.nn.Module):
        event_dim = 2

        def __init__(self):
            super().__init__()
            self.layer, self.calls = torch.nn.Linear(3, 2), 0

        def forward(self, t, x, context=None):
            v = self.layer(torch.cat((t[..., None].expand(*x.shape[:-1], 1), x), -1))
            if torch.is_grad_enabled():
                self.calls += 1
                if self.calls in (5, 9):
                    return v + (torch.full_like(v, math.inf) - v.detach())
            return v

    distribution = InterpolantDistribution(InterpolantTransform(Huge()))
    result = fit(distribution, modes(500), steps=20, **QUICK)
    assert result.skipped == 2
    assert all(torch.isfinite(p).all() for p in distribution.transform.parameters())


# ---- rows without a density ---------------------------------------------------------------------


def no_numbers(x):
    x[[3, 8], 1] = math.nan
    return x


def in_classes(x):
    x[:, 1] = torch.randint(0, 5, (len(x),)).to(x)
    return x


def half_zeros(x):
    x[::2, 1] = 0.0
    return x


@pytest.mark.parametrize("named", [False, True])
def test_rows_without_numbers_are_named_with_what_to_do(named):
    x = no_numbers(torch.randn(200, 2))
    draws = {"a": x[:, 0], "b": x[:, 1]} if named else x
    what = "site 'b'" if named else "x"
    found = f"finite {what}, got NaN .* in 2 of 200 rows, the first being row 3: remove or impute"
    with pytest.raises(ValueError, match=found):
        from_samples(draws, steps=5)


@pytest.mark.slow
def test_rows_without_numbers_may_have_no_weight():
    """They train nothing, and the others as without them."""
    x, weights = no_numbers(torch.randn(200, 2)), torch.ones(200)
    weights[[3, 8]] = 0
    d = from_samples(x, weights=weights, steps=5, **QUICK | {"batch_size": 32})
    assert torch.isfinite(d.log_prob(x[weights > 0])).all()
    torch.testing.assert_close(d.sample((4000,)).mean(0), x[weights > 0].mean(0), rtol=0, atol=0.2)


@pytest.mark.parametrize(
    ("make", "advice"),
    [
        (in_classes, "have no density.*dequantize"),
        pytest.param(half_zeros, "Learn the other rows alone", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("_small_runs")
def test_columns_without_a_density_are_named_with_what_to_do(make, advice):
    x = make(torch.randn(400, 2))
    with pytest.warns(UserWarning, match=rf"columns \[1\] repeat .*{advice}"):
        from_samples(x, steps=5, **QUICK | {"batch_size": 32})
