import matplotlib as mpl
import pyro.distributions as dist
import pytest
import torch
from cases import random_flow
from pyro.distributions import constraints

from pyro_interpolant import (
    InterpolantDistribution,
    Latent,
    LearnedInterpolant,
    Linear,
    fit,
    plotting,
)
from pyro_interpolant.diagnostics import CalibrationCheck

mpl.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def flow(dim, **kwargs):
    return InterpolantDistribution(random_flow(dim).requires_grad_(requires_grad=False), **kwargs)


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_trajectories_start_at_the_base_and_end_at_the_model(dim):
    base = dist.Normal(torch.full((dim,), 9.0), torch.full((dim,), 0.01)).to_event(1)
    ax = plotting.trajectories(flow(dim, base=base), count=7, steps=9)
    paths = [line.get_xydata() for line in ax.lines]
    assert len(paths) == 7
    assert all(len(path) == 10 for path in paths)
    start = paths[0][0]
    assert start[-1] == pytest.approx(9.0, abs=0.1)
    assert start[0] == pytest.approx(0.0 if dim == 1 else 9.0, abs=0.1)


def test_trajectories_live_on_the_support():
    ax = plotting.trajectories(flow(2, support=constraints.positive), count=5, steps=4)
    assert all((line.get_xydata() > 0).all() for line in ax.lines)


@pytest.mark.parametrize("dim", [1, 2])
def test_density_is_drawn_at_the_time_it_stops(dim):
    ax = plt.subplots()[1]
    assert plotting.density(flow(dim).at(0.5), points=20, velocity=dim == 2, ax=ax) is ax
    if dim == 1:
        x, y = torch.as_tensor(ax.lines[0].get_xydata()).T
        assert float(torch.trapezoid(y, x)) == pytest.approx(1.0, abs=0.05)
    else:
        assert len(ax.collections) == 2


def test_density_in_a_box_of_ones_own():
    ax = plotting.density(flow(2), extent=(-3, 3, -2, 5), points=16)
    assert ax.get_xlim() == (-3, 3)
    assert ax.get_ylim() == (-2, 5)


def test_evolution_shows_every_time():
    axes = plotting.evolution(flow(2), times=(0.0, 0.3, 1.0))
    assert [ax.get_title() for ax in axes] == ["$t = 0$", "$t = 0.3$", "$t = 1$"]
    assert len({ax.get_xlim() for ax in axes}) == 1
    given = plt.subplots(1, 2)[1]
    assert plotting.evolution(flow(2), times=(0.0, 1.0), velocity=False, ax=given) is given


@pytest.mark.parametrize(
    ("interpolant", "lines"), [(Linear(), 2), (Latent(), 3), (LearnedInterpolant(3), 2)]
)
def test_coefficients_that_are_there(interpolant, lines):
    ax = plotting.coefficients(interpolant)
    assert len(ax.lines) == lines
    assert ax.lines[0].get_ydata()[0] == pytest.approx(1.0)
    assert ax.lines[1].get_ydata()[-1] == pytest.approx(1.0)


def test_training_curve_shows_both_losses_and_what_was_kept():
    distribution = InterpolantDistribution(random_flow(2))
    result = fit(distribution, torch.randn(200, 2), steps=20, progress=False)
    ax = plotting.training_curve(result)
    assert list(ax.lines[0].get_xdata()) == result.steps
    assert list(ax.lines[1].get_ydata()) == result.validation_losses
    assert ax.lines[2].get_xdata()[0] == result.best_step


@pytest.mark.parametrize("drawn", [True, False])
def test_corner_compares_every_pair(drawn):
    data = torch.randn(300, 3)
    samples = torch.randn(100, 3) if drawn else flow(3)
    axes = plotting.corner(samples, data, names=["a", "b", "c"])
    assert axes.shape == (3, 3)
    assert not axes[0][2].axison
    assert len(axes[2][0].collections) == 2
    assert axes[2][1].get_xlabel() == "b"
    assert axes[2][0].get_ylabel() == "c"
    assert plotting.corner(samples, data, ax=axes) is axes


def test_new_axes_are_made_where_none_are_given():
    assert plotting.coefficients(Linear()).figure is not plotting.coefficients(Linear()).figure


def test_too_many_dimensions_and_no_coefficients():
    with pytest.raises(ValueError, match="expected one or two dimensions, got 3: use corner"):
        plotting.density(flow(3))
    with pytest.raises(TypeError, match="no scalar coefficients"):
        plotting.coefficients(LearnedInterpolant(event_dim=2, matrices=True))


def test_a_check_is_drawn_within_its_band():
    u = torch.rand(50, 2).sort(0).values
    check = CalibrationCheck(u, ("one", "two"), torch.zeros(2), 0.2, "")
    ax = plotting.ranks(check)
    x, y = ax.lines[0].get_xydata().T
    assert x.tolist() == u[:, 0].repeat_interleave(2).tolist()
    assert max(abs(y)) == pytest.approx(
        float((torch.arange(51) / 50 - torch.cat((u[:, 0], torch.ones(1)))).abs().max()), abs=0.021
    )
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["one", "two", "99%"]
