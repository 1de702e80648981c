"""Marginal maps: the spline, its knots, the support they make, and what a flow on it is."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import random_flow
from pyro.distributions import constraints
from scipy.interpolate import PchipInterpolator
from torch.distributions import biject_to, transform_to

from pyro_interpolant import (
    InterpolantDistribution,
    base_space,
    denoiser,
    fit,
    interpolant_transform,
    load,
    path_energy,
    sample_sde,
    save,
    score,
    w2_bound,
)
from pyro_interpolant.diffusion import sde_log_prob
from pyro_interpolant.training.preprocessing import marginal_transform, radial_transform
from pyro_interpolant.transforms import gaussianize
from pyro_interpolant.transforms.gaussianize import Gaussianized

pytestmark = pytest.mark.usefixtures("_few_held_draws")


def slab(count):
    """A third of the values in [0, 0.01), the others a hundred times as far."""
    return torch.where(torch.rand(count) < 1 / 3, 0.01 * torch.rand(count), torch.randn(count))


COLUMNS = {
    "normal": lambda n: 3 + 2 * torch.randn(n),
    "lognormal": lambda n: torch.randn(n).exp(),
    "cauchy": lambda n: dist.Cauchy(0.0, 1.0).sample((n,)),
    "slab": slab,
    "modes": lambda n: torch.where(torch.rand(n) < 0.4, 20.0, 0.0) + torch.randn(n),
    "uniform": lambda n: 1e12 * torch.rand(n),
    "rounded": lambda n: (3 * torch.randn(n)).round(),
    "binary": lambda n: (torch.rand(n) < 0.3).double(),
    "far away": lambda n: 1e9 + torch.randn(n),
}
columns = pytest.mark.parametrize("name", COLUMNS)


def test_slopes_at_uneven_knots():
    x = torch.rand(12).cumsum(0) ** 2
    y = torch.tanh(x / 4) + 0.1 * x
    expected = PchipInterpolator(x, y).derivative()(x)[1:-1]
    _, _, slopes = gaussianize.with_slopes(x[None], y[None])
    torch.testing.assert_close(slopes[0, 1:-1], torch.from_numpy(expected))


def made(name, count=5000):
    x = torch.stack((COLUMNS[name](count), torch.randn(count)), -1)
    return x, marginal_transform(x)


@columns
def test_columns_become_normal(name):
    x, transform = made(name)
    y = transform.inv(x)
    levels = torch.tensor([0.02, 0.2, 0.5, 0.8, 0.98])
    wanted = torch.special.ndtri(levels)
    if name not in ("rounded", "binary"):  # of which mid-ranks are all one can ask
        assert torch.allclose(y[:, 0].quantile(levels), wanted, atol=0.03)
    assert torch.allclose(y[:, 1].quantile(levels), wanted, atol=0.03)
    assert float(y[:, 0].mean().abs()) < 0.1
    assert float(y.abs().max()) < 8 if name != "cauchy" else True


@columns
def test_it_is_a_monotone_bijection_with_the_log_determinant_of_autograd(name):
    x, transform = made(name)
    low, high = x[:, 0].min(), x[:, 0].max()
    line = torch.linspace(-1, 2, 4001)[:, None] * (high - low) + low
    line = torch.cat((line, line), -1)
    y = transform.inv(line)
    assert (y.diff(dim=0) > 0).all()
    assert torch.allclose(transform(y), line, rtol=1e-9, atol=1e-9 * float(line.abs().max()))
    normal = torch.linspace(-30, 30, 4001)[:, None].expand(-1, 2).clone()
    assert (transform(normal).diff(dim=0) >= 0).all()
    x = torch.cat((x[:200], transform.knots[0].T, 3 * x[:20] - 1)).requires_grad_()
    y = transform.inv(x)
    slope = torch.autograd.grad(y.sum(), x)[0]
    assert torch.allclose(slope.log(), transform.log_slope(x), atol=1e-8)
    assert torch.allclose(transform.log_abs_det_jacobian(y, x), -slope.log().sum(-1), atol=1e-8)
    back = y.detach().requires_grad_()
    slope = torch.autograd.grad(transform(back).sum(), back)[0]
    assert torch.allclose(slope.log(), -transform.log_slope(x), atol=1e-4)


def test_second_derivatives_and_shapes():
    x, transform = made("lognormal")
    few = x[:5].clone().requires_grad_()
    assert torch.autograd.gradcheck(transform.log_slope, few)
    assert torch.autograd.gradgradcheck(transform, transform.inv(few).detach().requires_grad_())
    batched = torch.func.vmap(torch.func.jacrev(transform.inv))(x[:5])
    assert torch.allclose(batched.diagonal(dim1=1, dim2=2).log(), transform.log_slope(x[:5]))
    for shape in ((2,), (0, 2), (5, 1, 2)):
        y = torch.randn(shape)
        assert transform(y).shape == transform.inv(y).shape == shape
        assert transform.log_abs_det_jacobian(y, transform(y)).shape == shape[:-1]


@pytest.mark.parametrize("name", ["slab", "binary", "far away"])
def test_float32_may_not_tell_knots_apart(name):
    x, transform = made(name)
    y = transform.inv(x.float())
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()
    assert torch.isfinite(transform.log_slope(x.float())).all()
    assert torch.isfinite(transform(y)).all()
    assert torch.allclose(transform.inv(transform(y)), y, atol=0.3 if name == "far away" else 1e-2)


@pytest.mark.parametrize(
    ("name", "unit"), [("lognormal", 1e-30), ("modes", 1e30), ("slab", 1e30), ("uniform", 1e-30)]
)
def test_float32_in_any_unit(name, unit):
    x, _ = made(name)
    exact = marginal_transform(x)
    scaled = marginal_transform(unit * x)
    x = x[torch.rand(len(x)) < 0.2]
    y, z = exact.inv(x), scaled.inv((unit * x).float())
    assert torch.allclose(z.double(), y, atol=1e-3)
    leaf = z.clone().requires_grad_()
    back = scaled(leaf)
    assert torch.allclose(back.double() / unit, x, rtol=1e-3, atol=1e-4 * float(x.abs().median()))
    assert torch.isfinite(scaled.log_slope((unit * x).float())).all()
    slope = torch.autograd.grad((back / unit).sum(), leaf)[0]
    assert torch.isfinite(slope).all()
    assert (slope > 0).all()


def test_many_rows_are_mapped_in_parts(monkeypatch):
    x, transform = made("lognormal")
    whole = transform.inv(x), transform(x), transform.log_slope(x.reshape(50, 100, 2))
    monkeypatch.setattr(gaussianize, "_VALUES_AT_ONCE", 200)
    parts = transform.inv(x), transform(x), transform.log_slope(x.reshape(50, 100, 2))
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one, other)


def test_few_rows_have_no_knots():
    assert marginal_transform(torch.randn(399, 2)) is None


def test_the_support_is_the_one_it_stands_for():
    x = torch.randn(1000, 2)
    for support in (constraints.real_vector, constraints.positive):
        found = Gaussianized(support, marginal_transform(x))
        inside = biject_to(support)(x)
        assert torch.equal(found.check(inside), support.check(inside))
        assert torch.equal(found.check(x), support.check(x))
        for registry in (biject_to, transform_to):
            assert support.check(registry(found)(torch.randn(7, 2))).all()


charts = pytest.mark.parametrize("make", [marginal_transform, radial_transform])


def drawn(make, seed=3):
    torch.manual_seed(seed)
    x = torch.stack((torch.randn(2000).exp(), slab(2000)), -1)
    return InterpolantDistribution(
        random_flow(2), support=Gaussianized(constraints.real_vector, make(x))
    )


@charts
def test_a_part_of_a_row_has_no_map(make):
    chart = make(torch.randn(2000, 2) * torch.randn(2000, 1).exp())
    for direction in (chart, chart.inv):
        with pytest.raises(ValueError, match="rows of 2 columns, .* got 1: .* support_fn"):
            direction(torch.randn(5, 1))


@charts
def test_copies_and_files_keep_every_bit(make, tmp_path):
    d = drawn(make)
    x = d.sample((50,))
    expected = d.log_prob(x.clone())
    save(d, tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors")
    for twin in (again, copy.deepcopy(d), pickle.loads(pickle.dumps(d))):
        assert torch.equal(twin.log_prob(x), expected)
    for mine, other in zip(
        *(s.constraint.gaussianizer.arguments() for s in (d, again)), strict=True
    ):
        assert torch.equal(mine, other)


@pytest.mark.slow
@charts
def test_the_density_is_that_of_the_flow_through_the_map(make):
    """Over a grid it integrates to one, which a wrong Jacobian would not."""
    d = drawn(make)
    edges = [torch.cat((-torch.logspace(2, -5, 100), torch.logspace(-5, 2, 220)))] * 2
    centres = [(e[1:] + e[:-1]) / 2 for e in edges]
    grid = torch.cartesian_prod(*centres)
    area = torch.outer(edges[0].diff(), edges[1].diff()).flatten()
    with torch.no_grad():
        total = float((d.log_prob(grid).exp() * area).sum())
    assert total == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(("make", "t"), [(marginal_transform, 0.3), (radial_transform, 0.8)])
def test_scores_are_those_of_the_density_in_data_coordinates(make, t):
    """An untrained flow is N(0, I) before the map, at all times."""
    d = InterpolantDistribution(interpolant_transform(2), support=drawn(make).constraint)
    x = d.sample((20,)).requires_grad_()
    expected = torch.autograd.grad(d.at(t).log_prob(x).sum(), x)[0]
    assert torch.allclose(score(d, t, x.detach()), d.at(t).score(x.detach()), rtol=1e-5, atol=1e-6)
    assert torch.allclose(score(d, t, x), expected, rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(score(d, t, x).sum(), x)[0].abs().max() > 0
    with pytest.raises(ValueError, match="shape"):
        score(d, t, x[:, :1])


@charts
def test_points_and_scores_on_a_positive_support_are_those_of_logarithms(make):
    chart, flow = drawn(make).constraint.gaussianizer, interpolant_transform(2)
    d, positive = (
        InterpolantDistribution(flow, support=Gaussianized(support, chart))
        for support in (constraints.real_vector, constraints.positive)
    )
    x = d.sample((9,))
    assert torch.allclose(positive.unconstrained(x.exp()), x)
    assert torch.allclose(positive.to_flow(x.exp()), d.to_flow(x))
    assert torch.allclose(score(positive, 0.5, x), score(d, 0.5, x))
    y = positive.at(0).sample((9,))  # points in front of the map, where this flow leaves them
    x = positive.unconstrained(y)
    assert torch.allclose(positive.transport(x), y)
    assert torch.allclose(positive.transport(y, inverse=True), x)


@charts
def test_what_normal_columns_cannot_tell_is_refused(make):
    d = drawn(make)
    for ask in (
        lambda: denoiser(d, 0.5, torch.randn(3, 2)),
        lambda: path_energy(d),
        lambda: w2_bound(d, d.sample((9,))),
    ):
        with pytest.raises(ValueError, match="marginals=False"):
            ask()


@pytest.mark.slow
@charts
def test_sdes_end_where_the_data_are(make):
    d = InterpolantDistribution(interpolant_transform(2), support=drawn(make).constraint)
    torch.manual_seed(1)
    x = sample_sde(d, (4000,), steps=20)
    levels = torch.tensor([0.1, 0.5, 0.9])
    y = d.to_flow(x)
    assert torch.allclose(y.quantile(levels, 0), torch.special.ndtri(levels)[:, None], atol=0.1)
    with torch.no_grad():
        value, _ = sde_log_prob(d, x[:20], paths=4, steps=20)
        assert torch.allclose(value, d.log_prob(x[:20]), atol=0.1)  # of a few paths


@charts
def test_inside_a_model(make):
    """The base takes the place of the flow's own site; the sites beside it stay."""
    prior = drawn(make).freeze()

    def model(y):
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y)

    y = torch.tensor([1.0, 0.5])
    trace = pyro.poutine.trace(base_space(model)).get_trace(y)
    assert torch.isfinite(trace.log_prob_sum())
    z = trace.nodes["z"]["value"]
    base = trace.nodes["z_base"]
    jacobian = torch.autograd.functional.jacobian(
        lambda b: biject_to(prior.constraint)(prior.transform(b)), base["value"].detach()
    )
    expected = base["fn"].log_prob(base["value"]) - torch.linalg.slogdet(jacobian).logabsdet
    assert float(prior.log_prob(z)) == pytest.approx(float(expected), abs=0.01)
    guide = pyro.infer.autoguide.AutoNormal(model)
    guide(y)
    pyro.infer.Trace_ELBO(num_particles=20).differentiable_loss(model, guide, y).backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in guide.parameters())


@pytest.mark.slow
def test_training_behind_a_map_learns_a_slab():
    """What an affine map leaves to the last moments of the path, the map takes away."""
    x = torch.stack((slab(3000), torch.randn(3000)), -1)
    x[:, 1] += x[:, 0]
    gains = []
    for support in (
        constraints.real_vector,
        Gaussianized(constraints.real_vector, marginal_transform(x)),
    ):
        torch.manual_seed(0)
        d = InterpolantDistribution(random_flow(2, (16, 16)), support=support)
        fit(d, x[:2000], steps=200, learning_rate=5e-3, batch_size=256, seed=0, progress=False)
        with torch.no_grad():
            gains.append(float(d.log_prob(x[2000:]).mean()))
    truth = -math.log(3) / 3 - math.log(0.01) / 3  # of the slab's rows, for scale
    assert gains[1] > gains[0] + 0.3 * truth
