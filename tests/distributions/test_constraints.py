"""Supports other than real vectors: densities, the constraint itself, errors."""

import copy
import math
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import NO_SUPPORTS, SUPPORTS, random_flow
from pyro.distributions import constraints
from pyro.distributions.testing.gof import auto_goodness_of_fit
from pyro.infer.autoguide import AutoNormal
from pyro.ops.provenance import detach_provenance, track_provenance
from torch.distributions import biject_to

from pyro_interpolant import ConditionalInterpolantDistribution, InterpolantDistribution
from pyro_interpolant.distributions.constraints import shaped
from pyro_interpolant.transforms.bijections import biject

FAILURE_RATE = 1e-9

names = pytest.mark.parametrize("name", SUPPORTS)


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


@names
def test_samples_are_on_the_support(name):
    d, _ = make(name)
    for shape in ((), (50,), (5, 4)):
        x = d.sample(shape)
        assert x.shape == (*shape, *SUPPORTS[name].event_shape)
        assert SUPPORTS[name].support.check(x).all()
        assert d.log_prob(x).shape == shape


@names
def test_support_is_the_constraint(name):
    """What inference sees must be the support itself: guides and HMC map into it."""
    d, _ = make(name)
    case = SUPPORTS[name]
    x = d.sample((6,))
    assert d.event_shape == case.event_shape
    assert d.support.event_dim == d.event_dim == len(case.event_shape)
    assert d.support.check(x).shape == (6,)
    assert d.support.check(x).all()
    outside = -10.0 + 0.0 * x
    if name in ("less_than",):
        outside = -outside
    if name == "ordered_vector":
        outside = x.flip(-1)
    if name in ("gaussianized", "tempered"):  # all real vectors
        outside = math.nan * x
    assert not d.support.check(outside).any()
    u = torch.randn(6, case.dim)
    assert d.support.check(biject_to(d.support)(u)).all()
    assert biject_to(d.support).inv(x).shape == (6, case.dim)


@pytest.mark.parametrize("conditional", [False, True])
@names
def test_log_prob_is_that_of_the_flow_less_the_jacobian(name, conditional):
    d, real = make(name, conditional=conditional)
    u = real.sample((6,)).clone()
    y = biject_to(SUPPORTS[name].support)(u)
    expected = real.log_prob(u) - log_det(u, name)
    assert torch.allclose(d.log_prob(y), expected, atol=1e-6)


@names
def test_log_prob_of_own_samples(name):
    """The same through the cache, of the very tensor that was drawn."""
    d, real = make(name)
    x = d.rsample((6,))
    u = biject_to(SUPPORTS[name].support).inv(x).detach()
    expected = real.log_prob(u.clone()) - log_det(u, name)
    assert torch.allclose(d.log_prob(x), expected, atol=1e-3)  # along the path out, 8 steps


@pytest.mark.parametrize("name", [n for n in SUPPORTS if SUPPORTS[n].dim < 3])
def test_samples_follow_the_density(name):
    d, _ = make(name)
    with torch.no_grad():
        x = d.sample((3000,))
        probs = d.log_prob(x).exp()
    assert auto_goodness_of_fit(SUPPORTS[name].free(x), probs) > FAILURE_RATE


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
            real = bijection.inv(x)
            log_det = log_det_of(bijection, real, x)
            ratio = (normal.log_prob(real) - log_det - log_prob).exp()
            scores.append(float((ratio.mean() - 1) / (ratio.std() / len(x) ** 0.5)))
    return scores


def log_det_of(bijection, u, y):
    """Return the bijection's own log-determinant, shape ``(*)``, checked by autograd above."""
    found = bijection.log_abs_det_jacobian(u, y)
    return found.sum(-1) if found.dim() == u.dim() else found


@names
def test_reciprocal_importance(name):
    assert max(map(abs, reciprocal_importance(name))) < 4


@pytest.mark.parametrize("name", ["positive", "simplex"])
def test_reciprocal_importance_sees_a_wrong_density(name):
    assert max(map(abs, reciprocal_importance(name, 0.2))) > 4


@names
def test_rsample_and_log_prob_is_one_solve(name):
    d, _ = make(name)
    solves, integrate = [], d.transform.flow.integrate
    d.transform.flow.integrate = lambda *a, **k: solves.append(1) or integrate(*a, **k)
    x, log_prob = d.rsample_and_log_prob((6,))
    assert len(solves) == 1
    assert torch.allclose(log_prob, d.log_prob(x.detach().clone()), atol=1e-3)


@names
def test_gradients(name):
    d, _ = make(name)
    x, log_prob = d.rsample_and_log_prob((6,))
    (x.sum() + log_prob.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in d.transform.parameters())
    assert d.score(x).shape == x.shape


@names
def test_unconstrained_is_the_inverse(name):
    d, real = make(name)
    u = real.sample((6,)).clone()
    y = biject_to(SUPPORTS[name].support)(u)
    assert torch.allclose(d.to_flow(y), u, atol=1e-8)


@names
def test_expand_and_batches(name):
    d, _ = make(name)
    event = SUPPORTS[name].event_shape
    large = d.expand((3, 2))
    x = large.sample((4,))
    assert x.shape == (4, 3, 2, *event)
    assert large.log_prob(x).shape == (4, 3, 2)
    assert torch.allclose(large.log_prob(x), d.log_prob(x.clone()), atol=1e-3)
    assert large.to_event(1).log_prob(x).shape == (4, 3)


@names
def test_values_whose_origin_pyro_tracks(name):
    """As in ``render_model``; slices of their shape are plain tuples."""
    d, _ = make(name)
    x = d.sample((2,)).clone()
    tracked = track_provenance(x, frozenset({"a"}))
    assert torch.allclose(detach_provenance(d.log_prob(tracked)), d.log_prob(x))
    assert d.support.check(tracked).all()


@names
def test_halfway(name):
    d, real = make(name)
    half = d.at(0.5)
    u = torch.randn(4, SUPPORTS[name].dim)
    y = biject_to(SUPPORTS[name].support)(u)
    expected = real.at(0.5).log_prob(u) - log_det(u, name)
    assert torch.allclose(half.log_prob(y), expected, atol=1e-6)
    assert SUPPORTS[name].support.check(half.sample((5,))).all()


@names
def test_a_guide_stays_on_the_support(name):
    d, _ = make(name)
    d.freeze()
    guide = AutoNormal(lambda: pyro.sample("x", d), init_scale=1.0)
    for _ in range(3):
        x = guide()["x"]
        assert SUPPORTS[name].support.check(x).all()
        assert d.log_prob(x).isfinite()


@names
def test_float32(name):
    d, _ = make(name)
    d.to(torch.float32)
    x = d.sample((200,))
    assert x.dtype == torch.float32
    assert SUPPORTS[name].support.check(x).all()
    # In float32 neighbours of a positive_ordered_vector may not be told apart.
    assert d.log_prob(x.clone()).isfinite().double().mean() >= (
        0.97 if name == "positive_ordered_vector" else 1.0
    )


# ------------------------------------------------------------------------------------ trivial ones


@pytest.mark.parametrize(
    "support",
    [constraints.real, constraints.real_vector, constraints.independent(constraints.real, 1)],
    ids=["real", "real_vector", "independent"],
)
def test_real_supports_are_one_and_the_same(support):
    transform = random_flow(2)
    d = InterpolantDistribution(transform, support=support)
    assert d.transforms == [transform]
    x = torch.randn(3, 2)
    assert torch.equal(d.log_prob(x), InterpolantDistribution(transform).log_prob(x))
    assert d.unconstrained(x) is x
    assert d.support.event_dim == 1


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize(
    ("name", "support"),
    [
        *NO_SUPPORTS.items(),
        ("positive_definite", constraints.positive_definite),
        ("lower_cholesky", constraints.lower_cholesky),
    ],
)
def test_no_support(name, support, conditional):
    kind = ConditionalInterpolantDistribution if conditional else InterpolantDistribution
    transform = random_flow(2, context_dim=2 if conditional else 0)
    with pytest.raises(ValueError, match="expected a support .*got " + re.escape(str(support))):
        kind(transform, support=support)


def test_support_of_another_size_raises():
    three = constraints.stack(
        [constraints.positive, constraints.positive, constraints.interval(0.0, 1.0)], dim=-1
    )
    with pytest.raises(ValueError, match="dimension|size|shape"):
        InterpolantDistribution(random_flow(2), support=three)


OUTSIDE = {
    "positive": (lambda x: -x, "GreaterThan"),
    "unit_interval": (lambda x: x + 1.0, "Interval"),
    "interval": (lambda x: x - 6.0, "Interval"),
    "less_than": (lambda x: -x, "LessThan"),
    "simplex": (lambda x: x * 2.0, "Simplex"),
    "ordered_vector": (lambda x: x.flip(-1), "OrderedVector"),
    "corr_cholesky": (lambda x: x * 2.0, "CorrCholesky"),
    "stack": (lambda x: -x, "Stack"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_values_outside_are_counted(name):
    d, _ = make(name)
    spoil, constraint = OUTSIDE[name]
    x = d.sample((6,))
    x[[2, 5]] = spoil(x[[2, 5]])
    with pytest.raises(ValueError, match=f"{constraint}.*got 2 of 6 rows.*first being row 2"):
        d.unconstrained(x)


def test_a_row_is_outside_if_one_column_is():
    d, _ = make("positive")
    x = d.sample((6,))
    x[4, 1] = -1.0
    with pytest.raises(ValueError, match="got 1 of 6 rows.*first being row 4"):
        d.unconstrained(x)


def test_a_single_value_outside():
    d, _ = make("positive")
    with pytest.raises(ValueError, match="got 1 of 1 rows"):
        d.unconstrained(torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(
    ("name", "edge"), [("positive", 0.0), ("unit_interval", 0.0), ("unit_interval", 1.0)]
)
def test_values_on_the_edge_are_outside(name, edge):
    d, _ = make(name)
    x = d.sample((3,))
    x[1, 0] = edge
    with pytest.raises(ValueError, match="on its edge, the first being row 1"):
        d.unconstrained(x)


@pytest.mark.parametrize("name", OUTSIDE)
def test_log_prob_outside_raises(name):
    d, _ = make(name)
    x = OUTSIDE[name][0](d.sample((3,)))
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(x)


def test_simplex_against_a_closed_form():
    """A zero velocity makes the flow a logistic-normal, in stick-breaking coordinates."""
    loc, scale = torch.tensor([0.2, -0.3]), torch.tensor([0.7, 1.1])
    transform = random_flow(2)
    with torch.no_grad():
        transform.velocity.output.weight.zero_()
        transform.velocity.shifts.weight[-2:].zero_()
    transform.flow.whitening.set(loc, scale.diag())
    d = InterpolantDistribution(transform, support=constraints.simplex)
    oracle = dist.TransformedDistribution(
        dist.Normal(loc, scale).to_event(1), [biject_to(constraints.simplex)]
    )
    y = oracle.sample((5,))
    assert torch.allclose(d.log_prob(y), oracle.log_prob(y), atol=1e-10)


ON_SIMPLICES = {
    "itself": (constraints.simplex, (3,)),
    "shaped": (shaped(constraints.simplex, (1, 3)), (1, 3)),
    "joined": (constraints.cat([constraints.simplex] * 2, -1, [3, 3]), (6,)),
    "independent": (constraints.independent(constraints.simplex, 1), (1, 3)),
}


@pytest.mark.parametrize("name", ON_SIMPLICES)
def test_a_simplex_keeps_its_small_shares_in_float32(name):
    """The second coordinate is log(y_2 / y_3); by 1 - y_1 - y_2 it is 77."""
    support, shape = ON_SIMPLICES[name]
    share = torch.tensor([0.9999603, 3.9696493e-05, 1.9875301e-10], dtype=torch.float32)
    real = biject(support).inv(share.repeat(math.prod(shape) // 3).reshape(shape)).reshape(-1, 2)
    y = share.double()
    expected = torch.stack((y[0] / y[1:].sum() * 2, y[1] / y[2])).log()
    assert torch.allclose(real.double(), expected.expand(real.shape), rtol=1e-6)


@pytest.mark.slow
def test_densities_of_small_shares_in_float32():
    transform = random_flow(9)
    transform.flow.whitening.set(torch.zeros(9), 3 * torch.eye(9))
    exact, rounded = (
        InterpolantDistribution(copy.deepcopy(transform).to(dtype), support=constraints.simplex)
        for dtype in (torch.float64, torch.float32)
    )
    with torch.no_grad():
        y = rounded.sample((500,))
        expected = exact.log_prob(y.double() / y.sum(-1, keepdim=True).double())
        found = rounded.log_prob(y.clone())
    assert torch.allclose(found.double(), expected, atol=1e-2)


def test_a_stack_among_joined_parts_has_one_log_determinant_an_event():
    pair = constraints.stack([constraints.positive, constraints.real], dim=-1)
    ours = biject(constraints.cat([pair, constraints.less_than(1.0)], -1, [2, 1]))
    x = torch.randn(2, 3)
    expected = x[:, 0] + x[:, 2]  # of exponentials
    assert torch.allclose(ours.log_abs_det_jacobian(x, ours(x)), expected, rtol=1e-12)


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
