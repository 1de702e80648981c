"""Rates given the points of paths: means over the rows that these may lead to."""

from functools import partial

import pyro.distributions as dist
import pytest
import torch
from cases import INTERPOLANTS, LATENT

from pyro_interpolant import InterpolantTransform, Linear, Trigonometric, VelocityMLP
from pyro_interpolant.distributions.bases import WhitenedBase
from pyro_interpolant.interpolants.couplings import independent, optimal_transport
from pyro_interpolant.training.distributed import Process
from pyro_interpolant.training.objective import Objective
from pyro_interpolant.training.paths import mean_rates, path_points
from pyro_interpolant.training.rows import Rows

PATHS = {**INTERPOLANTS, **LATENT}


def of_all_rows(interpolant, t, x, rows):
    """The mean over rows, each path's noise a Gaussian given its end, from the definitions."""
    (a, b, g), (da, db, dg) = interpolant.coefficients(t), interpolant.derivatives(t)
    noise = dist.Normal(b * rows, (a**2 + g**2).sqrt()).to_event(1)
    x0, z = (c * (x - b * rows) / (a**2 + g**2) for c in (a, g))
    rates = da * x0 + db * rows + dg * z
    return noise.log_prob(x).softmax(0) @ rates


@pytest.mark.parametrize(("dim", "groups"), [(3, 1), (1, 7)])
@pytest.mark.parametrize("name", PATHS)
def test_mean_rates_are_their_definition(name, dim, groups):
    t = 0.02 + 0.96 * torch.rand(groups, 1)
    w0, rows = torch.randn(2, groups, 4, dim)
    for points in path_points(PATHS[name], t, w0, rows):
        found = mean_rates(PATHS[name], *points[:3], rows, 4 * groups)
        for i in range(groups):
            expected = of_all_rows(PATHS[name], t[i], points.w[i, 2], rows.flatten(0, 1))
            torch.testing.assert_close(found[i, 2], expected)


def test_groups_share_points_in_equal_pieces():
    t, (w0, rows) = torch.rand(6, 1), torch.randn(2, 6, 4, 2)
    (points,) = path_points(Trigonometric(), t, w0, rows)
    found = mean_rates(Trigonometric(), *points[:3], rows, 8)
    for i in range(6):
        few = rows[i - i % 2 : i - i % 2 + 2].flatten(0, 1)
        expected = of_all_rows(Trigonometric(), t[i], points.w[i, 1], few)
        torch.testing.assert_close(found[i, 1], expected)


@pytest.mark.parametrize("name", PATHS)
def test_mean_rates_are_rates_in_the_mean_and_vary_less(name):
    """Of any function of points, in 200,000 of them: the regression has the same minimiser."""
    t = torch.tensor([[0.2], [0.5], [0.8]]).expand(3, 1)
    rows = torch.randn(5000, 3, 16, 2) * torch.tensor([0.3, 1.0])
    (points, *_) = path_points(PATHS[name], t.expand(5000, 3, 1), torch.randn_like(rows), rows)
    # Sixteen rows of one time share points.
    means = mean_rates(PATHS[name], t.expand(5000, 3, 1), points.w, points.target, rows, 16)
    for f in (torch.ones_like(points.w), points.w, points.w.sin(), points.w.flip(-1) ** 2):
        difference = f * (means - points.target)
        error = difference.mean(2).std(0) / 5000**0.5
        assert bool((difference.mean((0, 2)).abs() < 4.5 * error).all())
    residual = (points.target - means).var((0, 2))
    assert bool((means.var((0, 2)) + residual < 1.05 * points.target.var((0, 2))).all())
    assert bool((residual > 0.05 * points.target.var((0, 2))).all())


def test_paths_lead_to_rows_of_their_own_label():
    t, (w0, rows), labels = torch.rand(8, 1), torch.randn(2, 8, 6, 2), torch.arange(6) % 2
    labels = labels[:, None].expand(8, 6, 1)
    rows = rows + 50.0 * labels
    (points,) = path_points(Trigonometric(), t, w0, rows)
    found = mean_rates(Trigonometric(), *points[:3], rows, 48, labels)
    for label in (0, 1):
        few = rows[labels[..., 0] == label]
        expected = of_all_rows(Trigonometric(), t[3], points.w[3, label], few)
        torch.testing.assert_close(found[3, label], expected)


@pytest.mark.parametrize(
    ("name", "scale"), [(name, (1.0, 100.0)[i % 2]) for i, name in enumerate(PATHS)]
)
def test_in_single_precision_rates_near_the_data_are_right(name, scale):
    """Where probabilities cannot be told it is the path's own rate."""
    t = 1 - 10 ** -torch.linspace(0.1, 6.9, 64)[:, None]
    w0, rows = torch.randn(2, 64, 8, 1)
    rows = scale * rows
    rows[0, 0] = rows[0, 1]  # copies may be taken for each other
    (points,) = path_points(PATHS[name], t, w0, rows)[:1]
    single = [s.float() for s in (t, *points[1:3], rows)]
    exact = mean_rates(PATHS[name], *(s.double() for s in single), 512)
    found = mean_rates(PATHS[name], *single, 512).double()
    is_own = found == single[2].double()
    assert bool(is_own[-1].any())
    assert bool(is_own[t[:, 0] < 0.5].double().mean() < 0.05)
    tolerance = 0.05 * (1 + exact.abs())
    assert bool(((found - exact).abs() < tolerance)[~is_own].all())


def objective(dim=2, base=None, coupling=independent, target="velocity", **choices):
    flow = InterpolantTransform(VelocityMLP(dim, (8,), **choices)).flow
    flow.noise = VelocityMLP(dim, (8,))
    if base is not None:
        base = dist.Normal(torch.zeros(dim), 1.0).to_event(1)
    return Objective(flow, WhitenedBase(base, flow.whitening), coupling, target=target)


OF_MANY_ROWS = {"N(0, I)": {}, "eight columns": {"dim": 8}, "classes": {"classes": 3}}
OF_ONE_ROW = {
    "nine columns": {"dim": 9},
    "another base": {"base": "normal"},
    "a coupling": {"coupling": optimal_transport},
    "the noise": {"target": "noise"},
    "contexts": {"context_dim": 2},
}


def test_who_learns_from_mean_rates():
    for name, options in {**OF_MANY_ROWS, **OF_ONE_ROW, "pairs": {}}.items():
        made = objective(**options)
        dim = made.flow.event_dim
        context = torch.randint(3, (256, 1)).double() if "classes" in options else None
        context = torch.randn(256, 2) if "context_dim" in options else context
        partner = torch.randn(256, dim) if name == "pairs" else None
        rows = Rows(torch.randn(256, dim), context, partner)
        torch.manual_seed(1)
        pairs = made._pairs(rows, made.base, made.process)
        torch.manual_seed(1)
        ((points,),) = made.points([partial(Rows, *rows)])
        (own,) = path_points(made.flow.interpolant, *pairs[:3], target=made.target)
        torch.testing.assert_close(points.w, own.w)
        is_mean = not bool(torch.isclose(points.target, own.target).all())
        assert is_mean == (name in OF_MANY_ROWS), name
        if "classes" in options:
            given = pairs.w1, 256, pairs.context
            expected = mean_rates(made.flow.interpolant, *own[:3], *given)
            torch.testing.assert_close(points.target, expected)


@pytest.mark.parametrize(("world", "size"), [(2, 256), (3, 2048), (8, 2**14)])
def test_processes_together_have_the_points_of_one(world, size):
    """Rows of others, too, may be what a point of a process leads to."""
    x = torch.randn(size - size % world, 2)

    def points(rank, world):
        flow = InterpolantTransform(VelocityMLP(2, (8,))).flow
        process = Process()
        process.rank, process.world = rank, world
        base = WhitenedBase(None, flow.whitening)
        made = Objective(flow, base, independent, process)
        torch.manual_seed(1)
        ((found,),) = made.points([lambda: Rows(x, None)])
        return found

    parts = [points(rank, world) for rank in range(world)]
    if world == 3:  # of one process there are 64 times
        assert len({part.w.shape for part in parts}) == 1
        return
    whole = points(0, 1)
    for name in ("t", "w", "target"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(joined, getattr(whole, name))


def test_autocast_does_not_round_them():
    t, (w0, rows) = torch.rand(8, 1), torch.randn(2, 8, 16, 2)
    points = path_points(Trigonometric(), t, w0, rows)[0]
    t, w, rates, rows = (s.float() for s in (t, *points[1:3], rows))
    expected = mean_rates(Trigonometric(), t, w, rates, rows, 128)
    with torch.autocast("cpu", torch.bfloat16):
        found = mean_rates(Trigonometric(), t, w, rates, rows, 128)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


class Bent(Linear):
    """A path of one's own, whose coefficients are not all of it."""

    def sample(self, t, x0, x1, z=None):
        x, rate = super().sample(t, x0, x1, z)
        bend = (x1 - x0).tanh()
        t = t[..., None]
        return x + t * (1 - t) * bend, rate + (1 - 2 * t) * bend


def test_a_path_with_a_sample_of_its_own_is_not_taken_for_linear():
    assert not Bent().is_linear()
    flow = InterpolantTransform(VelocityMLP(2, (8,)), interpolant=Bent()).flow
    made = Objective(flow, WhitenedBase(None, flow.whitening), independent)
    rows = Rows(torch.randn(256, 2), None)
    torch.manual_seed(1)
    pairs = made._pairs(rows, made.base, made.process)
    torch.manual_seed(1)
    ((points,),) = made.points([lambda: rows])
    torch.testing.assert_close(points.target, Bent().sample(*pairs[:3])[1])
