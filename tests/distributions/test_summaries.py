"""Moments, entropy and quantiles against closed forms, finite differences and the round trip."""

import math

import pyro.distributions as dist
import pytest
import torch
from cases import SUPPORTS, random_flow
from kinds import angular_flow
from pyro.distributions import constraints
from torch.distributions import ExpTransform, biject_to

import pyro_interpolant as pi
from pyro_interpolant.distributions import summaries

SCALES = torch.tensor([[2.0, 0.0], [1.0, 0.5]])


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-9, "atol": 1e-9, **tolerance})


def normal(dim=2, **options):
    """A flow that is untrained, and so N(loc, L L^T)."""
    transform = pi.interpolant_transform(dim, (8,))
    transform.flow.whitening.set(torch.arange(dim) + 1.0, SCALES[:dim, :dim])
    return pi.InterpolantDistribution(transform, **options).freeze()


def scalar(support=constraints.real, seed=0, **options):
    torch.manual_seed(seed)
    transform = random_flow(1, (16, 16), solver=pi.FixedGrid(60))  # densities within 1e-5
    return pi.InterpolantDistribution(
        transform, support=support, event_shape=(), **options
    ).freeze()


@pytest.mark.slow
def test_moments_of_a_normal_are_the_closed_form_within_their_errors():
    d = normal()
    found = d.moments()
    truth = torch.tensor([1.0, 2.0]), (SCALES @ SCALES.T).diag()
    entropy = dist.MultivariateNormal(truth[0], SCALES @ SCALES.T).entropy()
    for value, error, expected in zip(found[::2], found[1::2], (*truth, entropy), strict=True):
        assert ((value - expected).abs() < 6 * error + 1e-9).all()
        assert (error < 6e-3).all()  # random draws would leave 0.02 to 0.08
    close(d.mean, found.mean)
    close(d.variance, found.variance)
    close(d.entropy(), found.entropy)


def test_moments_are_the_same_at_each_call_and_draw_nothing(monkeypatch):
    monkeypatch.setattr(summaries, "_DRAWS", 16)
    for base in (dist.Laplace(torch.zeros(2), 1.0).to_event(1), pi.Samples(torch.randn(30, 2))):
        d, state = normal(base=base), torch.get_rng_state()
        first, second = d.moments(), d.moments()
        assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["interval", "simplex", "corr_cholesky", "ordered_vector", "scalar", "stack in a shape"],
)
def test_moments_agree_with_plain_draws_on_supports(name):
    case = SUPPORTS[name]
    d = pi.InterpolantDistribution(random_flow(case.dim, (8, 8)), support=case.support).freeze()
    x, found = d.sample((5000,)), d.moments()
    error = 5 * x.std(0) / math.sqrt(len(x)) + 5 * found.mean_stderr + 1e-9
    assert found.mean.shape == d.event_shape
    assert ((found.mean - x.mean(0)).abs() < error).all()
    log_prob = d.log_prob(x)
    error = 5 * log_prob.std() / math.sqrt(len(x)) + 5 * found.entropy_stderr
    assert (found.entropy + log_prob.mean()).abs() < error


@pytest.mark.slow
def test_moments_have_the_shape_of_batch_and_context(monkeypatch):
    monkeypatch.setattr(summaries, "_DRAWS", 64)
    d = normal().expand((3,))
    assert d.mean.shape == d.variance.shape == (3, 2)
    close(d.mean[0], d.mean[2])
    flow = random_flow(2, (8, 8), context_dim=3, solver=pi.FixedGrid(2))
    family, context = pi.ConditionalInterpolantDistribution(flow).freeze(), torch.randn(4, 3)
    found = family.condition(context).moments()
    assert found.mean.shape == (4, 2)
    assert found.entropy.shape == (4,)
    alone = torch.stack([family.condition(c).mean for c in context])
    assert torch.allclose(found.mean, alone)
    each = torch.func.vmap(lambda c: family.condition(c).mean)(context)
    assert torch.allclose(found.mean, each)


def test_moments_given_contexts_that_are_not_finite(monkeypatch):
    monkeypatch.setattr(summaries, "_DRAWS", 16)
    family, context = random_flow(2, (8,), context_dim=1), torch.tensor([[0.0], [math.nan]])
    given = pi.InterpolantDistribution(family.condition(context))
    with pytest.raises(ValueError, match="finite contexts.*1 rows, the first being row 1"):
        given.mean  # noqa: B018
    found = pi.InterpolantDistribution(family.condition(context), validate_args=False).moments()
    assert found.mean.isfinite().all(1).tolist() == [True, False]
    assert found.entropy.isfinite().tolist() == [True, False]


TAILS = {  # a base, and whether it has moments, also those of its exponential
    "normal": (lambda: dist.Normal(torch.zeros(1), 0.5).to_event(1), True, True),
    "student": (lambda: dist.StudentT(torch.full((1,), 5.0)).to_event(1), True, False),
    "laplace": (lambda: dist.Laplace(torch.zeros(1), 2.0).to_event(1), True, False),
    "Cauchy of torch": (
        lambda: pi.ExternalBase(
            torch.distributions.Independent(torch.distributions.Cauchy(torch.zeros(1), 1.0), 1)
        ),
        False,
        False,
    ),
    "exp of Cauchy": (
        lambda: dist.TransformedDistribution(
            dist.Cauchy(torch.zeros(1), 1.0), [ExpTransform()]
        ).to_event(1),
        False,
        False,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TAILS)
def test_moments_on_an_unbounded_support_need_light_tails(name, monkeypatch):
    """Also of a base that does not state its moments, but is made of others that do."""
    monkeypatch.setattr(summaries, "_DRAWS", 64)
    make, exist, light = TAILS[name]

    def flow(base, support=constraints.real):
        transform = pi.interpolant_transform(1, (8,), solver=pi.FixedGrid(1, "euler"))
        return pi.InterpolantDistribution(transform, base, support=support).freeze()

    base = make()
    for given in (base, flow(base)):
        found = flow(given).moments()
        assert bool(found.mean.isfinite().all()) == bool(found.variance.isfinite().all()) == exist
        found = flow(given, constraints.positive).moments()
        assert bool(torch.cat(found[:4]).isfinite().all()) == light
    assert flow(flow(base, constraints.unit_interval), constraints.positive).mean.isfinite()
    if exist:  # a softplus grows as x does
        assert flow(base, constraints.softplus_positive).variance.isfinite()


@pytest.mark.slow
def test_each_part_of_a_support_has_its_moments(monkeypatch):
    monkeypatch.setattr(summaries, "_DRAWS", 64)
    parts = [constraints.real, constraints.unit_interval, constraints.positive]
    heavy = dist.StudentT(torch.full((3,), 5.0)).to_event(1)
    transform = pi.interpolant_transform(3, (8,))
    d = pi.InterpolantDistribution(transform, heavy, support=constraints.stack(parts, dim=-1))
    assert d.freeze().mean.isfinite().tolist() == [True, True, False]


@pytest.mark.slow
def test_moments_have_gradients_in_the_parameters_of_a_base():
    loc, scale = torch.zeros(2, requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)
    transform = pi.interpolant_transform(2, (8,))  # untrained, so the base itself
    given = dist.Laplace(loc, scale).to_event(1)
    d = pi.InterpolantDistribution(transform, given).freeze()
    (slope,) = torch.autograd.grad(d.entropy(), scale)
    close(slope, 1 / scale)
    (slope,) = torch.autograd.grad(d.mean.sum(), loc)
    close(slope, torch.ones(2))
    (slope,) = torch.autograd.grad(d.variance.sum(), scale)
    close(slope, 4 * scale, rtol=0.1, atol=0)


def test_an_entropy_keeps_no_graph_of_all_its_draws(monkeypatch):
    monkeypatch.setattr(summaries, "_DRAWS", 16)
    torch.manual_seed(0)
    d = pi.InterpolantDistribution(random_flow(2, (8,), solver=pi.FixedGrid(2)))
    weights = list(d.transform.parameters())

    def entropy():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            value = d.entropy()
        slopes = torch.autograd.grad(value, weights, allow_unused=True)
        return value, [s for s in slopes if s is not None], sum(x.numel() for x in kept)

    found = entropy()
    monkeypatch.setattr(summaries, "recomputed", lambda function: function)
    plain = entropy()
    torch.testing.assert_close(found[:2], plain[:2], rtol=0, atol=0)
    assert found[1]
    assert 10 * found[2] < plain[2]


@pytest.mark.slow
def test_a_base_without_gradients_of_draws_gives_none_rather_than_a_part(monkeypatch):
    scale = torch.ones(2, 2, requires_grad=True)
    parts = dist.Normal(torch.zeros(2, 2), scale).to_event(1)
    monkeypatch.setattr(summaries, "_DRAWS", 64)
    d = normal(base=dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))
    assert not d.base.has_rsample
    assert not any(value.requires_grad for value in d.moments())
    d.transform.flow.requires_grad_(requires_grad=True)
    assert d.entropy().requires_grad
    assert torch.autograd.grad(d.entropy(), scale, allow_unused=True)[0] is None


def test_the_cdf_of_a_normal_is_the_closed_form():
    d = normal(1)
    x = torch.linspace(-20, 20, 41)[:, None]
    close(d.cdf(x), dist.Normal(1.0, 2.0).cdf(x[:, 0]), atol=1e-14)
    q = torch.tensor([1e-200, 1e-3, 0.5, 0.9])
    close(d.icdf(q), 1 + 2 * torch.special.ndtri(q)[:, None])


SCALARS = {
    "real": constraints.real,
    "positive": constraints.positive,
    "below 2": constraints.less_than(2.0),
    "interval": constraints.interval(-1.0, 3.0),
    "softplus": constraints.softplus_positive,
}


PAIRS = [  # of a support and a base
    pytest.param("real", "flow", marks=pytest.mark.slow),
    pytest.param("positive", "laplace", marks=pytest.mark.slow),
    ("below 2", "none"),
    pytest.param("below 2", "flow", marks=pytest.mark.slow),
    ("interval", "none"),
    ("softplus", "laplace"),
]


@pytest.mark.parametrize(("name", "base"), PAIRS)
def test_cdf_and_icdf_are_inverse_and_the_integral_of_the_density(name, base):
    support = SCALARS[name]
    given = {
        "none": None,
        "laplace": dist.Laplace(torch.zeros(1), torch.ones(1)).to_event(1),
        "flow": normal(1),
    }[base]
    d = scalar(support, base=given)
    q = torch.linspace(0.01, 0.99, 50)
    x = d.icdf(q)
    assert x.shape == (50,)
    assert (x.diff() > 0).all()
    close(d.cdf(x), q, rtol=0, atol=1e-6)
    real = biject_to(support)
    u = torch.linspace(float(real.inv(x[0])), float(real.inv(x[-1])), 4001)  # smooth there
    grid = real(u) if support is not constraints.real else u
    grid = grid.sort().values
    mass = torch.trapezoid(d.log_prob(grid).exp(), grid)
    close(mass, d.cdf(grid[-1]) - d.cdf(grid[0]), rtol=0, atol=2e-4)
    d.transform.solver = pi.FixedGrid(8)  # shares of draws do not need the nodes of integrals
    share = (d.sample((20_000,)) <= x[25]).double().mean()
    close(share, q[25], rtol=0, atol=0.018)  # five standard errors


def test_derivatives_of_quantiles_are_those_of_the_density():
    d = scalar()
    x = torch.tensor([-0.7, 0.2, 1.5], requires_grad=True)
    (slope,) = torch.autograd.grad(d.cdf(x).sum(), x)
    close(slope, d.log_prob(x).exp().detach(), rtol=1e-3, atol=0)  # of two discretisations
    q = torch.tensor([0.1, 0.6], requires_grad=True)
    value = d.icdf(q)
    (slope,) = torch.autograd.grad(value.sum(), q)
    close(
        slope * d.log_prob(value.detach()).exp(), torch.ones(2), rtol=1e-3, atol=0
    )  # of two discretisations
    close(torch.func.vmap(d.cdf)(x.detach()), d.cdf(x).detach())
    close(torch.func.vmap(torch.func.grad(d.icdf))(q.detach()), slope)


def test_the_ends_of_the_support():
    d = scalar(constraints.interval(-1.0, 3.0), validate_args=False)
    close(d.icdf(torch.tensor([0.0, 1.0])), torch.tensor([-1.0, 3.0]))
    close(d.cdf(torch.tensor([-2.0, -1.0, 3.0, 9.0])), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert d.cdf(torch.tensor(math.nan)).isnan()
    falling = scalar(constraints.less_than(2.0))
    close(falling.icdf(torch.tensor([0.0, 1.0])), torch.tensor([-math.inf, 2.0]))
    with pytest.raises(ValueError, match="between 0 and 1, got -0.1"):
        d.icdf(torch.tensor(-0.1))
    with pytest.raises(ValueError, match=r"broadcasts with \(2,\), .* got \(3,\)"):
        d.expand((2,)).icdf(torch.tensor([0.1, 0.5, 0.9]))
    with pytest.raises(ValueError, match="within the support"):
        scalar(constraints.positive).cdf(torch.tensor(-1.0))


BOUNDED = {  # a base, and the ends of its support
    "uniform": (lambda: dist.Uniform(torch.tensor([-1.0]), 1.0).to_event(1), (-1.0, 1.0)),
    "exponential": (lambda: dist.Exponential(torch.ones(1)).to_event(1), (0.0, math.inf)),
    "a flow": (
        lambda: pi.InterpolantDistribution(random_flow(1), support=constraints.less_than(2.0)),
        (-math.inf, 2.0),
    ),
}


@pytest.mark.parametrize(
    ("name", "turns"),
    [("uniform", True), ("exponential", False), ("a flow", False)],
)
def test_quantiles_of_a_bounded_base_end_at_the_images_of_its_ends(name, turns):
    base, ends = BOUNDED[name][0](), torch.tensor(BOUNDED[name][1])[:, None]
    support = constraints.less_than(2.0) if turns else constraints.real
    d = pi.InterpolantDistribution(random_flow(1), base, support=support, event_shape=()).freeze()
    images = d.transport(ends.nan_to_num(posinf=0.0, neginf=0.0))
    far = torch.tensor([2.0, -math.inf]) if turns else torch.tensor([-math.inf, math.inf])
    images = images.where(ends[:, 0].isfinite(), far)
    images = images.flip(0) if turns else images
    q = torch.tensor([0.0, 1.0])
    close(d.icdf(q), images)
    beyond = images + torch.tensor([-0.1, 0.1])
    known = beyond.isfinite() & (beyond < (2.0 if turns else math.inf))
    close(d.cdf(beyond[known]), q[known])
    close(d.cdf(d.icdf(torch.tensor([0.2, 0.7]))), torch.tensor([0.2, 0.7]), rtol=0, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "normal_base", "scale"), [("real", True, -2.0), ("below 2", False, -2.0)]
)
def test_quantiles_increase_whatever_turns(name, normal_base, scale):
    base = dist.Normal(torch.zeros(1), 1.0).to_event(1) if normal_base else None
    d = scalar(SCALARS[name], base=base)
    d.transform.flow.whitening.set(torch.ones(1), torch.tensor([[scale]]))
    x = d.icdf(torch.linspace(0, 1, 6))
    assert (x.diff() > 0).all()
    close(x[[0, -1]], torch.tensor([-math.inf, 2.0 if name == "below 2" else math.inf]))
    u = torch.linspace(-20.0, 40.0, 4001)
    grid = u if name == "real" else 2 - u.flip(0).exp()
    below = grid[grid <= x[2]]
    close(torch.trapezoid(d.log_prob(below).exp(), below), d.cdf(below[-1]), rtol=0, atol=2e-3)


def test_quantiles_between_bounds_of_each_context():
    family = random_flow(1, (16, 16), context_dim=2, solver=pi.FixedGrid(12))
    context, low = torch.randn(4, 2), torch.arange(4.0)[:, None]
    d = pi.InterpolantDistribution(
        family.condition(context), support=constraints.interval(low, low + 1)
    )
    q = torch.linspace(0.05, 0.95, 9)[:, None]
    x = d.icdf(q)
    assert x.shape == (9, 4, 1)
    assert (x.diff(dim=0) > 0).all()
    close(d.cdf(x), q.expand(9, 4), rtol=0, atol=1e-4)


def test_the_order_of_large_numbers_in_a_short_type_is_seen():
    torch.set_default_dtype(torch.float32)
    transform = pi.interpolant_transform(1, (8,))
    transform.flow.whitening.set(torch.tensor([9.0]), torch.eye(1))
    d = pi.InterpolantDistribution(
        transform, support=constraints.greater_than(1e8), event_shape=()
    )
    x = d.freeze().icdf(torch.tensor([0.1, 0.5, 0.9]))
    assert (x.diff() > 0).all()
    close(d.cdf(x), torch.tensor([0.1, 0.5, 0.9]), rtol=0, atol=1e-2)


def test_infinity_edges_and_batches_of_a_cdf():
    line = normal(1, validate_args=False)
    close(line.cdf(torch.tensor([[-math.inf], [math.inf]])), torch.tensor([0.0, 1.0]))
    close(scalar(constraints.nonnegative).cdf(torch.tensor(0.0)), torch.tensor(0.0))
    assert scalar().expand((4,)).cdf(torch.tensor(0.3)).shape == (4,)


@pytest.mark.slow
def test_samples_as_a_base_have_a_mean_and_no_entropy():
    d = pi.InterpolantDistribution(
        pi.interpolant_transform(2, (8,)), pi.Samples(torch.randn(500, 2) + 3)
    )
    close(d.freeze().mean, torch.full((2,), 3.0), rtol=0, atol=0.3)
    assert d.entropy().isnan()


@pytest.mark.parametrize("base", [dist.Gamma, dist.Beta])
def test_a_base_that_is_singular_at_an_edge_has_a_finite_entropy(base):
    half = torch.full((2,), 0.5, dtype=torch.float32)
    transform = pi.interpolant_transform(2, (8,)).float()
    transform.flow.whitening.set(half, 0.7 * torch.eye(2).float())
    d = pi.InterpolantDistribution(transform, base(half, half).to_event(1)).freeze()
    exact, found = base(half, half).entropy().sum(), d.moments()
    assert abs(float(found.entropy - exact)) < 5 * float(found.entropy_stderr)
    assert bool(d.log_prob(d.sample((20_000,))).isfinite().all())


def test_small_probabilities_are_kept_where_the_map_falls():
    """Also those of a finer type than the flow: the last is 1 in float32."""
    transform = pi.interpolant_transform(1, (8,)).to(torch.float32)
    transform.flow.whitening.set(torch.full((1,), 0.3), torch.full((1, 1), 1.5))
    below = constraints.less_than(2.0)
    d = pi.InterpolantDistribution(transform, support=below, event_shape=()).freeze()
    q = torch.tensor([1e-9, 1e-6, 0.3, 1 - 1e-9], dtype=torch.float64)
    exact = 2 - torch.exp(0.3 - 1.5 * torch.special.ndtri(q))
    close(d.icdf(q), exact.float(), rtol=2e-5)
    close(d.cdf(exact[:3].float()), q[:3].float(), rtol=2e-4)


def test_parts_of_a_mixture_have_bounds_of_their_own():
    parts = dist.Uniform(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 2.0]), validate_args=False)
    base = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts, validate_args=False)
    flow = pi.interpolant_transform(1, (8,))  # untrained
    d = pi.InterpolantDistribution(flow, base.expand((1,)).to_event(1)).freeze()
    x = torch.tensor([-2.0, -0.5, 0.5, 1.5, 3])[:, None]
    close(d.log_prob(x), torch.tensor([0.0, 0.25, 0.5, 0.25, 0]).log(), rtol=0, atol=1e-6)
    close(d.cdf(x), torch.tensor([0.0, 0.125, 0.5, 0.875, 1]), rtol=0, atol=1e-6)


def test_flows_without_quantiles_are_told():
    student = normal(1, base=dist.StudentT(3.0).expand((1,)).to_event(1))
    with pytest.raises(NotImplementedError, match="the base, StudentT, has no cdf in torch"):
        student.cdf(torch.zeros(1))
    angle = pi.InterpolantDistribution(angular_flow(1), support=pi.circular)
    with pytest.raises(NotImplementedError, match="cdf is that of one real number"):
        angle.cdf(torch.zeros(1))
