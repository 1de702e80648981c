"""The flow as a distribution object: densities, scores, batches, types, refusals."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import BASES, CountingSolver, gaussian_prior, random_flow, random_prior, slow_but
from pyro.distributions import constraints
from pyro.distributions.testing.gof import auto_goodness_of_fit

import pyro_interpolant as pi
from pyro_interpolant.distributions.joint import ConditionalJointInterpolantDistribution

# The test's p-value is far from uniform in two dimensions and more: an exact Gaussian reaches
# 1e-6. Whether it still has power is tested too.
FAILURE_RATE = 1e-9
ATOL = 1e-4  # between a density along the path out and along the path back, at 8 steps


def plain(dim=2, base=None, **options):
    return pi.InterpolantDistribution(random_flow(dim), base, **options)


def conditional(dim=2, context_dim=3, **options):
    return pi.ConditionalInterpolantDistribution(
        random_flow(dim, context_dim=context_dim), **options
    )


# A batch of no dimensions.
SINGLE = {
    "one": lambda: plain(1),
    "multivariate": lambda: plain(base=BASES["multivariate"](2)),
    "flow base": lambda: plain(base=random_prior(2)),
    "halfway, laplace": lambda: plain(base=BASES["laplace"](2)).at(0.5),
    "start": lambda: plain().at(0.0),
    "conditioned": lambda: conditional().condition(torch.tensor([1.0, -2.0, 0.5])),
    "conditioned, laplace": lambda: conditional(base=BASES["laplace"](2)).condition(torch.ones(3)),
}

# A batch of shape (4,).


# --------------------------------------------------------------------- samples and densities agree


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_follow_the_density_and_a_wrong_density_is_seen(dtype):
    d = plain().to(dtype)
    with torch.no_grad():
        x = d.sample((4000,))
        log_prob = d.log_prob(x)
    assert auto_goodness_of_fit(x, log_prob.exp()) > FAILURE_RATE
    wrong = (log_prob + 1.0).exp()  # likelihoods inflated by one nat
    assert auto_goodness_of_fit(x, wrong) < FAILURE_RATE


@pytest.mark.parametrize("name", slow_but(SINGLE, "one"))
def test_the_density_integrates_to_one_and_to_the_moments_of_samples(name):
    d = SINGLE[name]()
    dim = d.event_shape[0]
    with torch.no_grad():
        x = d.sample((4000,))
        lower, upper = x.mean(0) - 9 * x.std(0), x.mean(0) + 9 * x.std(0)
        axes = [torch.linspace(*ends, 121) for ends in zip(lower, upper, strict=True)]
        grid = torch.cartesian_prod(*axes).reshape(-1, dim)
        mass = d.log_prob(grid).exp() * torch.stack([a[1] - a[0] for a in axes]).prod()
    assert abs(mass.sum() - 1) < 3e-3
    mean = mass @ grid
    spread = mass @ (grid - mean).square()
    standard_error = (spread / len(x)).sqrt()
    assert ((x.mean(0) - mean).abs() < 4.5 * standard_error).all()
    fourth = mass @ (grid - mean) ** 4
    standard_error = ((fourth - spread**2) / len(x)).sqrt()
    assert ((x.var(0) - spread).abs() < 4.5 * standard_error).all()


@pytest.mark.parametrize("name", ["one", "halfway, laplace", "conditioned"])
def test_the_density_of_draws_is_that_of_fresh_values(name):
    d = SINGLE[name]()
    pyro.set_rng_seed(1)
    x, log_prob = d.rsample_and_log_prob((20,))
    pyro.set_rng_seed(1)
    assert torch.equal(x, d.rsample((20,)))
    assert x.requires_grad
    assert torch.allclose(log_prob, d.log_prob(x.detach().clone()), atol=ATOL)
    assert torch.allclose(log_prob, d.log_prob(x), atol=ATOL)
    d.clear_cache()
    assert torch.allclose(log_prob, d.log_prob(x), atol=ATOL)


def test_a_draw_and_its_density_are_one_solve():
    d = pi.InterpolantDistribution(random_flow(2, solver=CountingSolver()))
    d.rsample_and_log_prob((6,))
    assert d.transform.solver.solves == 1
    x = d.expand((3,)).rsample()
    d.expand((3,)).log_prob(x)
    assert d.transform.solver.solves == 2


def test_rows_of_context_belong_to_rows_of_values():
    d = conditional()
    context, x = torch.randn(4, 3), torch.randn(4, 2)
    together = d.condition(context)
    members = [d.condition(c) for c in context]
    alone = torch.stack([m.log_prob(v) for m, v in zip(members, x, strict=True)])
    assert torch.allclose(together.log_prob(x), alone, atol=1e-10)
    scores = torch.stack([m.score(v) for m, v in zip(members, x, strict=True)])
    assert torch.allclose(together.score(x), scores, atol=1e-10)
    assert (together.log_prob(x[0]).diff().abs() > 1e-3).all()


def test_a_gaussian_has_its_density_score_and_start():
    loc, linear = torch.tensor([3.0, -1.0]), torch.tensor([[2.0, 0.0], [0.5, 1.0]])
    d = gaussian_prior(loc, linear)
    x = 3 * torch.randn(50, 2)
    expected = dist.MultivariateNormal(loc, scale_tril=linear).log_prob(x)
    assert torch.allclose(d.log_prob(x), expected, atol=1e-12)
    slope = -torch.linalg.solve(linear @ linear.T, (x - loc).T).T
    assert torch.allclose(d.score(x), slope, atol=1e-10)
    whitening = (d := plain()).transform.flow.whitening
    expected = dist.MultivariateNormal(whitening.loc, whitening.linear @ whitening.linear.T)
    assert torch.allclose(d.at(0).log_prob(x), expected.log_prob(x), atol=1e-10)
    assert torch.equal(d.at(1.0).log_prob(x), d.log_prob(x))


def test_values_that_are_infinite_once_whitened_have_no_density():
    """Whitened, this is infinity less infinity: it came out as NaN."""
    linear = 1e-12 * torch.tensor([[1.0, 0.0], [0.9, 1.0]])
    d = gaussian_prior(torch.zeros(2), linear).to(torch.float32)
    x = torch.tensor([[1e30, 1e30], [0.0, 0.0]], dtype=torch.float32)
    found = d.log_prob(x)
    assert found[0] == -math.inf
    assert found[1].isfinite()
    assert d.log_prob(x[:1]).item() == -math.inf


# ------------------------------------------------------------------------------------------ shapes


def test_the_batch_is_that_of_the_context():
    """Also where it has one row, which a loop over pieces of rows ends with."""
    family = conditional(support=constraints.positive)
    sites = {"mu": ((2,), constraints.real)}
    joint = ConditionalJointInterpolantDistribution(family.transform, sites=sites)
    classes = pi.ConditionalInterpolantTransform(pi.VelocityMLP(2, (4,), classes=3))
    labelled = pi.ConditionalInterpolantDistribution(classes)
    for shape in ((), (1,), (1, 4)):
        context, labels = torch.randn(*shape, 3), torch.ones(shape, dtype=torch.long)
        for member in (
            family.condition(context),
            joint.condition(context),
            labelled.condition(labels),
            labelled.condition(labels[..., None].double()),
        ):
            assert member.batch_shape == shape
            x = member.sample((5,))
            assert x.shape == (5, *shape, 2)
            assert member.log_prob(x).shape == (5, *shape)


@pytest.mark.parametrize("of", ["bounds", "base"])
def test_the_batch_given_a_context_is_that_of_bounds_and_base_too(of):
    bounds = constraints.interval(torch.zeros(4, 2), torch.ones(4, 2))
    options = {"support": constraints.independent(bounds, 1)}
    if of == "base":
        options = {"base": dist.Normal(torch.zeros(4, 2), 1.0).to_event(1)}
    family = conditional(**options)
    for context in ((3,), (1, 3), (5, 1, 3)):
        d = family.condition(torch.randn(context))
        assert d.batch_shape == torch.broadcast_shapes(context[:-1], (4,))
        assert d.log_prob(d.sample()).shape == d.batch_shape
    large = d.expand((2, *d.batch_shape))
    x = large.sample()
    assert torch.allclose(large.log_prob(x), d.log_prob(x.clone()), atol=ATOL)


def test_no_rows():
    flow, x = random_prior(2), torch.empty(0, 2)
    assert flow.transform.log_abs_det_jacobian(x, flow.transform(x)).shape == (0,)
    scalars = conditional(1, 2).freeze()
    assert scalars.condition(torch.empty(0, 2)).sample().shape == (0, 1)


# ----------------------------------------------------------------------------- score and transport


@pytest.mark.parametrize("name", slow_but(SINGLE, "start", "conditioned"))
def test_the_score_is_the_gradient(name):
    """With weights that are trained and frozen; its Jacobian is the Hessian."""
    d = SINGLE[name]()
    x = d.sample((5,)).clone()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(d.log_prob(leaf).sum(), leaf)
    for wanted in (x, leaf):
        score = d.score(wanted)
        trained = name != "start"  # where no weight matters
        assert score.requires_grad == (wanted.requires_grad or trained)
        assert torch.allclose(score, expected, atol=1e-10)
    d.freeze()
    assert not d.score(x).requires_grad
    (expected,) = torch.autograd.grad(d.log_prob(leaf).sum(), leaf)
    assert torch.allclose(d.score(x), expected, atol=1e-10)
    assert torch.allclose(torch.func.vmap(d.score)(x), expected, atol=1e-10)
    hessian = torch.autograd.functional.hessian(d.log_prob, x[0])
    assert hessian.abs().max() > 0.01
    assert torch.allclose(torch.func.jacrev(d.score)(x[0]), hessian, atol=1e-8)
    assert torch.allclose(torch.func.jacfwd(d.score)(x[0]), hessian, atol=1e-8)


@pytest.mark.parametrize("base", [None, random_prior], ids=["plain", "flow base"])
def test_the_score_without_gradients_is_that_of_frozen_weights(base):
    base = base and base(2, frozen=False)
    d = plain(base=base, validate_args=False)
    x = torch.randn(3, 2)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            found += d.score(x), torch.vmap(d.score)(x)
    expected = d.freeze().score(x)
    for score in found:
        torch.testing.assert_close(score, expected)


def test_the_score_is_the_finite_difference():
    d = plain()
    x, step = torch.randn(4, 2), 1e-5
    for i in range(2):
        e = step * torch.eye(2)[i]
        slope = (d.log_prob(x + e) - d.log_prob(x - e)) / (2 * step)
        assert torch.allclose(d.score(x)[:, i], slope, atol=1e-6)
    x = torch.tensor([1.0, -1.0])
    assert plain(support=constraints.positive, validate_args=False).score(x).eq(0).all()


def test_the_score_trains_weights_and_context_and_broadcasts():
    likelihood = conditional()
    context = torch.randn(4, 3, requires_grad=True)
    likelihood.condition(context).score(torch.randn(2)).square().sum().backward()
    assert context.grad.abs().min() > 0
    assert likelihood.transform.flow.velocity.output.weight.grad.abs().max() > 0
    prior = random_prior(2)
    x, many = torch.randn(2), torch.randn(5, 1, 2)
    assert torch.allclose(prior.expand((3,)).score(x), prior.score(x).expand(3, 2))
    assert torch.allclose(prior.expand((3,)).score(many), prior.score(many).expand(5, 3, 2))


@pytest.mark.parametrize("name", ["one", "flow base", "halfway, laplace", "conditioned"])
def test_transport_is_in_data_coordinates(name):
    d = SINGLE[name]().freeze()
    d.transform.solver = pi.FixedGrid(steps=32)
    x = d.at(0).sample((5,))
    y = d.transport(x)
    assert torch.allclose(d.transport(y, inverse=True), x, atol=1e-6)
    # d log-density along the path is the log-determinant of the whole chain
    jacobian = torch.func.vmap(torch.func.jacrev(d.transport))(x)
    change = d.at(0).log_prob(x) - torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(d.log_prob(y), change, atol=1e-5)
    d = plain(support=constraints.positive).freeze()
    x = torch.randn(5, 2)
    y = d.transport(x)
    assert bool((y > 0).all())
    assert torch.allclose(d.transport(y, inverse=True), x, atol=1e-4)
    with pytest.raises(ValueError, match="strictly inside the support"):
        d.transport(-y, inverse=True)


# ---------------------------------------------------------------------------- weights and freezing


def test_members_share_the_weights_of_their_family():
    d = conditional(base=BASES["laplace"](2))
    member = d.condition(torch.zeros(3))
    assert list(member.transform.parameters()) == []
    x = torch.randn(4, 2)
    before = member.log_prob(x)
    with torch.no_grad():
        d.transform.velocity.output.weight.mul_(2.0)
    assert ((member.log_prob(x) - before).abs() > 1e-6).all()
    half = member.at(0.5)
    assert half.freeze() is half
    assert not any(p.requires_grad for p in d.transform.parameters())


def test_freeze():
    base = plain()
    d = plain(base=base)
    assert d.freeze() is d
    assert not any(p.requires_grad for p in d.transform.parameters())
    assert not any(p.requires_grad for p in base.transform.parameters())
    assert not d.transform.training
    assert not d.rsample((3,)).requires_grad
    pyro.module("flow", d.transform)  # no warning about parameters that do not require gradients
    assert not dict(pyro.get_param_store())


# ------------------------------------------------------------------------------------------- types


def test_a_base_is_not_cut_off_from_its_parameters():
    mu = torch.zeros(2, requires_grad=True)
    d = plain(base=dist.Normal(mu, 1.0).to_event(1)).freeze()
    with pytest.raises(ValueError, match="tensor that requires a gradient, which a copy"):
        d.to(torch.float32)
    assert d.transform.flow.loc.dtype == torch.float64
    d.to(torch.float64)
    before = d.log_prob(torch.zeros(2))
    with torch.no_grad():
        mu.add_(1.0)
    assert (d.log_prob(torch.zeros(2)) - before).abs() > 1e-3


# ------------------------------------------------------------------------------------------ errors

REFUSED = {
    "another size": (lambda: plain().log_prob(torch.rand(4, 1)), r"value of shape \(\*, 2\)"),
    "scalars": (lambda: plain(1).log_prob(torch.ones(7)), r"\(N, 1\): x\[\.\.\., None\]"),
    "NaN": (lambda: plain().log_prob(torch.tensor([[0.0, math.nan]])), "within the support"),
    "type, unchecked": (
        lambda: pi.InterpolantDistribution(
            random_flow(2), support=constraints.interval(-2.0, 3.0), validate_args=False
        ).score(torch.ones(2, dtype=torch.int64)),
        "expected torch.float64, the type of the flow",
    ),
    "batch": (
        lambda: conditional().condition(torch.randn(3, 3)).log_prob(torch.randn(4, 2, 2)),
        r"broadcasts with \(3,\).*got \(4, 2,?\)",
    ),
    "a network": (
        lambda: pi.InterpolantDistribution(pi.VelocityMLP(2, (8,))),
        "class InterpolantTransform, got VelocityMLP",
    ),
    "a conditional flow": (
        lambda: pi.InterpolantDistribution(random_flow(2, context_dim=3)),
        "use ConditionalInterpolantDistribution",
    ),
    "no event as base": (
        lambda: conditional(base=dist.Normal(torch.zeros(2), torch.ones(2))),
        r"event shape \(2,\).*\.to_event\(1\)",
    ),
    "a base of another size": (
        lambda: conditional(base=dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1)),
        r"event shape \(2,\), got event shape \(3,\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_values_and_parts_that_are_refused(name):
    ask, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        ask()
