"""Supports other than real vectors: densities, draws, the constraint itself, refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import SUPPORTS, random_flow
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from pyro.ops.provenance import detach_provenance, track_provenance
from torch.distributions import biject_to

from pyro_interpolant import ConditionalInterpolantDistribution, InterpolantDistribution
from pyro_interpolant.distributions.constraints import Shaped, shaped
from pyro_interpolant.transforms.bijections import biject

# Which of the supports are given to a conditional flow: each once, half of them.
CONDITIONAL = list(SUPPORTS)[1::2]


def make(name, *, conditional=False):
    """Return a flow on a support and the same flow on real vectors."""
    case = SUPPORTS[name]
    if conditional:
        transform = random_flow(case.dim, context_dim=2)
        context = torch.tensor([0.3, -1.0])
        d = ConditionalInterpolantDistribution(transform, support=case.support).condition(context)
        return d, ConditionalInterpolantDistribution(transform).condition(context)
    transform = random_flow(case.dim)
    return (
        InterpolantDistribution(transform, support=case.support),
        InterpolantDistribution(transform),
    )


def log_det(u, name):
    """Return log |det dy/du| in the free coordinates of y, by autograd, of vectors u."""
    case = SUPPORTS[name]
    bijection = biject_to(case.support)
    jacobians = torch.stack(
        [torch.autograd.functional.jacobian(lambda v: case.free(bijection(v)), row) for row in u]
    )
    return torch.linalg.slogdet(jacobians).logabsdet


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_density_is_that_of_the_flow_less_the_jacobian(name):
    """Of given values, of the very tensors that were drawn, and halfway."""
    case = SUPPORTS[name]
    d, real = make(name, conditional=name in CONDITIONAL)
    u = real.sample((4,)).clone()
    y = biject_to(case.support)(u)
    volume = log_det(u, name)
    assert torch.allclose(d.log_prob(y), real.log_prob(u) - volume, atol=1e-6)
    half, real_half = d.at(0.5), real.at(0.5)
    assert torch.allclose(half.log_prob(y), real_half.log_prob(u) - volume, atol=1e-6)
    assert torch.allclose(d.to_flow(y), u, atol=1e-8)
    x, log_prob = d.rsample_and_log_prob((4,))
    assert torch.equal(log_prob, d.log_prob(x))
    u = biject_to(case.support).inv(x).detach()
    expected = real.log_prob(u.clone()) - log_det(u, name)
    assert torch.allclose(log_prob, expected, atol=1e-3)  # along the path out, 8 steps


@pytest.mark.parametrize("name", SUPPORTS)
def test_the_support_is_the_constraint(name):
    """What inference sees must be the support itself: guides and HMC map into it."""
    case = SUPPORTS[name]
    d, _ = make(name)
    for shape in ((), (5, 4)):
        x = d.sample(shape)
        assert x.shape == (*shape, *case.event_shape)
        assert d.log_prob(x).shape == shape
        assert case.support.check(x).all()
        assert d.support.check(x).shape == shape
        assert d.support.check(x).all()
    assert d.event_shape == case.event_shape
    assert d.support.event_dim == d.event_dim == len(case.event_shape)
    outside = -10.0 + 0.0 * x
    if name == "less_than":
        outside = -outside
    if name == "ordered_vector":
        outside = x.flip(-1)
    if name in ("gaussianized", "tempered"):  # all real vectors
        outside = math.nan * x
    assert not d.support.check(outside).any()
    u = torch.randn(6, case.dim)
    assert d.support.check(biject_to(d.support)(u)).all()
    y, volume = d.from_flow(torch.empty(0, 4, case.dim))
    assert y.shape == (0, 4, *case.event_shape)
    assert volume.shape == (0, 4)
    whitening = d.transform.flow.whitening
    whitening.set(whitening.loc, 0.3 * whitening.linear)  # neighbours must not round to one
    d.to(torch.float32)
    x = d.sample((50,))
    assert x.dtype == torch.float32
    assert case.support.check(x).all()
    assert d.log_prob(x.clone()).isfinite().all()


USED = ["interval", "simplex", "corr_cholesky", "stack in a shape", "scalar", "gaussianized"]


@pytest.mark.parametrize("name", USED)
def test_a_flow_on_a_support_in_guides_and_with_gradients(name):
    case = SUPPORTS[name]
    d, _ = make(name)
    x = d.sample((2,)).clone()
    tracked = track_provenance(x, frozenset({"a"}))  # as in render_model
    assert torch.allclose(detach_provenance(d.log_prob(tracked)), d.log_prob(x))
    assert d.support.check(tracked).all()
    x, log_prob = d.rsample_and_log_prob((6,))
    (x.sum() + log_prob.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in d.transform.parameters())
    d.freeze()
    x = AutoNormal(lambda: pyro.sample("x", d), init_scale=1.0)()["x"]
    assert case.support.check(x).all()
    assert d.log_prob(x).isfinite()


def reciprocal_importance(name, excess=0.0):
    """Return z-scores of E_p[r / p] = 1, for densities r on the support that p dominates.

    They are off if the density is not normalised, or not that of the samples.
    """
    d, _ = make(name)
    with torch.no_grad():
        x = d.sample((3000,))
        log_prob = d.log_prob(x) + excess
        bijection = biject_to(SUPPORTS[name].support)
        u = bijection.inv(x)
        scores = []
        for shift in (-0.5, 0.0, 0.5):
            normal = dist.Normal(u.mean(0) + shift * u.std(0), 0.6 * u.std(0)).to_event(1)
            volume = bijection.log_abs_det_jacobian(u, x)  # checked by autograd above
            volume = volume.sum(-1) if volume.dim() == u.dim() else volume
            ratio = (normal.log_prob(u) - volume - log_prob).exp()
            scores.append(float((ratio.mean() - 1) / (ratio.std() / len(x) ** 0.5)))
    return scores


@pytest.mark.parametrize("name", ["positive", "simplex", "corr_cholesky", "gaussianized stack"])
def test_samples_follow_the_density_and_a_wrong_density_is_seen(name):
    assert max(map(abs, reciprocal_importance(name))) < 4
    assert max(map(abs, reciprocal_importance(name, 0.2))) > 4


# ------------------------------------------------------------------------------------------ errors

PAIR = [constraints.positive, constraints.real]
BOUNDS = constraints.interval(torch.zeros(3), torch.ones(3))
REFUSED = {
    "sphere": (constraints.sphere, ValueError, "expected a support .*got Sphere"),
    "integers": (constraints.nonnegative_integer, ValueError, "expected a support .*got Integer"),
    "too many bounds": (BOUNDS, ValueError, "expected a support of "),
    "rows stacked": (constraints.stack(PAIR, 0), ValueError, "got constraints.stack with dim=0"),
    "rows joined": (
        Shaped(constraints.cat([constraints.cat(PAIR, 0)], -1, [2]), (1, 2)),
        ValueError,
        "got constraints.cat with dim=0: pass dim",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_supports_that_are_refused(name):
    support, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        InterpolantDistribution(random_flow(2), support=support)
    with pytest.raises(error, match=message):
        ConditionalInterpolantDistribution(random_flow(2, context_dim=2), support=support)


OUTSIDE = {
    "positive": (lambda x: -x, "GreaterThan"),
    "simplex": (lambda x: x * 2.0, "Simplex"),
    "ordered_vector": (lambda x: x.flip(-1), "OrderedVector"),
    "corr_cholesky": (lambda x: x * 2.0, "CorrCholesky"),
    "stack": (lambda x: torch.cat((x[..., :1], -x[..., 1:]), -1), "Stack"),  # one column of two
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_values_outside_are_refused_and_counted(name):
    d, _ = make(name)
    spoil, constraint = OUTSIDE[name]
    x = d.sample((6,))
    x[[2, 5]] = spoil(x[[2, 5]])
    with pytest.raises(ValueError, match=f"{constraint}.*got 2 of 6 rows.*first being row 2"):
        d.unconstrained(x)
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(x)


def test_values_on_the_edge_are_outside():
    for name, edge in (("positive", 0.0), ("unit_interval", 1.0)):
        d, _ = make(name)
        x = d.sample((3,))
        x[1, 0] = edge
        with pytest.raises(ValueError, match="on its edge, the first being row 1"):
            d.unconstrained(x)


# ------------------------------------------------------------------------------- maps to simplices


def test_a_simplex_keeps_its_small_shares_in_float32():
    """The second coordinate is log(y_2 / y_3); by 1 - y_1 - y_2 it is 77."""
    share = torch.tensor([0.9999603, 3.9696493e-05, 1.9875301e-10], dtype=torch.float32)
    y = share.double()
    expected = torch.stack((y[0] / y[1:].sum() * 2, y[1] / y[2])).log()
    for support, shape in (
        (constraints.simplex, (3,)),
        (shaped(constraints.simplex, (1, 3)), (1, 3)),
        (constraints.cat([constraints.simplex] * 2, -1, [3, 3]), (6,)),
        (constraints.independent(constraints.simplex, 1), (1, 3)),
    ):
        row = share.repeat(math.prod(shape) // 3).reshape(shape)
        real = biject(support).inv(row).reshape(-1, 2)
        assert torch.allclose(real.double(), expected.expand(real.shape), rtol=1e-6), support


def test_draws_of_many_shares_are_on_the_simplex_in_float32():
    y = biject(constraints.simplex)(torch.randn(50, 999, dtype=torch.float32))
    assert bool(constraints.simplex.check(y).all())


def test_the_map_to_a_simplex_is_that_of_torch():
    ours, torchs = biject(constraints.simplex), biject_to(constraints.simplex)
    x = torch.randn(50, 4)
    y = torchs(x)
    assert torch.allclose(ours(x), y, rtol=1e-12)
    assert torch.allclose(ours.inv(y), torchs.inv(y), rtol=1e-10)
    expected = torchs.log_abs_det_jacobian(x, y)
    assert torch.allclose(ours.log_abs_det_jacobian(x, y), expected, rtol=1e-12)
    far = torch.tensor([[1e3, -1e3], [-1e3, 1e3], [90.0, 90.0]], dtype=torch.float32)
    far.requires_grad_()
    y = ours(far)
    assert bool((y > 0).all() & constraints.simplex.check(y).all())
    total = ours.log_abs_det_jacobian(far, y).sum() + y.sum()
    assert bool(torch.autograd.grad(total, far)[0].isfinite().all())
