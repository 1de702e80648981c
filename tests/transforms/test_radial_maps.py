"""Radial maps: lengths, derivatives, far and near, and what they do where one scale is common."""

import math
import warnings

import pytest
import torch
from pyro.distributions import constraints

from pyro_interpolant import InterpolantDistribution, fit, interpolant_transform
from pyro_interpolant.training.preprocessing import radial_transform
from pyro_interpolant.training.whitening import whitening_map
from pyro_interpolant.transforms.gaussianize import Gaussianized

pytestmark = pytest.mark.usefixtures("_few_held_draws")


def contrast(count, dim=5, spread=1.0):
    """Rows of correlated columns with one scale in common."""
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(5))
    return 2 + torch.randn(count, dim) @ mix * (spread * torch.randn(count, 1)).exp()


def lengths(x, like):
    m = whitening_map(like)
    return ((x - m.loc) @ m.inverse.T).norm(dim=-1)


@pytest.mark.parametrize("dim", [2, 5])
def test_lengths_come_half_way_to_normal_ones(dim):
    x = contrast(10_000, dim)
    u = radial_transform(x).inv(x)
    levels = torch.tensor([0.01, 0.2, 0.5, 0.8, 0.99])
    normal = torch.randn(100_000, dim).norm(dim=-1).quantile(levels).log()
    before, after = lengths(x, x).quantile(levels).log(), u.norm(dim=-1).quantile(levels).log()
    assert torch.allclose(after, 0.5 * (before + normal), atol=0.03)
    white = (x - whitening_map(x).loc) @ whitening_map(x).inverse.T
    assert torch.allclose(torch.nn.functional.cosine_similarity(u, white), torch.ones(()))


@pytest.mark.slow
def test_it_is_a_smooth_bijection_with_the_determinant_of_autograd():
    x = contrast(5000)
    chart = radial_transform(x)
    some = torch.cat((x[:20], 50 * x[:5], chart.loc + 1e-6 * x[:5], chart.loc[None]))
    u = chart.inv(some)
    assert torch.allclose(chart(u), some, rtol=1e-9, atol=1e-12)
    log_det = chart.log_abs_det_jacobian(u, some)
    for i in range(len(some)):
        there = torch.autograd.functional.jacobian(chart.inv, some[i])
        back = torch.autograd.functional.jacobian(chart, u[i])
        assert float(torch.linalg.slogdet(there).logabsdet) == pytest.approx(-float(log_det[i]))
        assert torch.allclose(there @ back, torch.eye(5), atol=1e-7)
    few = x[:3].clone().requires_grad_()
    assert torch.autograd.gradcheck(chart.inv, few)
    assert torch.autograd.gradcheck(lambda y: chart.log_abs_det_jacobian(y, y), few)
    batched = torch.func.vmap(torch.func.jacrev(chart.inv))(x[:4])
    assert torch.allclose(
        torch.linalg.slogdet(batched).logabsdet, -chart.log_abs_det_jacobian(u[:4], x[:4])
    )


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_float32_in_any_unit_however_far(unit):
    x = contrast(5000)
    exact, scaled = radial_transform(x), radial_transform(unit * x)
    y = (unit * x).float()
    assert torch.allclose(scaled.inv(y).double(), exact.inv(x), rtol=1e-3, atol=1e-3)
    assert torch.allclose(scaled(scaled.inv(y)), y, rtol=1e-3, atol=1e-3 * unit)
    far = (unit * torch.cat((1e7 * x[:9], exact.loc[None]))).float().requires_grad_()
    u = scaled.inv(far)
    log_det = scaled.log_abs_det_jacobian(u, far)
    slopes = torch.autograd.grad((log_det / unit).sum() + (u / unit).sum(), far)[0]
    for part in (u, log_det, *([slopes] if unit == 1 else [])):  # else beyond float32 itself
        assert torch.isfinite(part).all()


def test_none_where_lengths_do_not_differ_or_are_too_few():
    corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    for x in (torch.randn(399, 3), torch.randn(5000, 1), corners.repeat(200, 1)):
        assert radial_transform(x) is None


def test_float32_far_from_the_origin():
    x = contrast(5000) + 1e5
    chart = radial_transform(x)
    assert torch.allclose(chart.inv(x.float()).double(), chart.inv(x.float().double()), atol=1e-5)


@pytest.mark.slow
def test_training_behind_it_learns_a_common_scale():
    x = contrast(3000, 8, 1.5)

    def held_out(support):
        torch.manual_seed(0)
        d = InterpolantDistribution(interpolant_transform(8, (32, 32)), support=support)
        fit(d, x[:2000], steps=150, learning_rate=5e-3, batch_size=128, seed=0, progress=False)
        with torch.no_grad():
            return float(d.log_prob(x[2000:]).mean())

    with warnings.catch_warnings():  # without the map it may, and behind it must not
        warnings.filterwarnings("ignore", "the fit came out wrong")
        without = held_out(constraints.real_vector)
    behind = held_out(Gaussianized(constraints.real_vector, radial_transform(x[:2000])))
    assert behind > without + 0.3
    assert math.isfinite(without)
