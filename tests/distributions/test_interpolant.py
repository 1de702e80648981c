"""The flow as a distribution object: shapes, densities, expand, types, errors."""

import math
import pathlib
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import BASES, CountingSolver, gaussian_prior, random_flow, random_prior, slow_but
from pyro.distributions import constraints
from pyro.distributions.testing.gof import auto_goodness_of_fit
from torch.distributions import Independent

import pyro_interpolant
from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    FixedGrid,
    InterpolantDistribution,
    InterpolantTransform,
    VelocityMLP,
    interpolant_transform,
)
from pyro_interpolant.distributions.joint import ConditionalJointInterpolantDistribution

# The test's p-value is far from uniform in two dimensions and more: an exact Gaussian reaches
# 1e-6. Whether it still has power is tested too.
FAILURE_RATE = 1e-9
ATOL = 1e-4  # between a density along the path out and along the path back, at 8 steps


def conditional(dim=2, context_dim=3, **kwargs):
    return ConditionalInterpolantDistribution(random_flow(dim, context_dim=context_dim), **kwargs)


# A batch of no dimensions.
SINGLE = {
    "one": lambda: InterpolantDistribution(random_flow(1)),
    "two": lambda: InterpolantDistribution(random_flow(2)),
    "three": lambda: InterpolantDistribution(random_flow(3)),
    "laplace": lambda: InterpolantDistribution(random_flow(2), BASES["laplace"](2)),
    "multivariate": lambda: InterpolantDistribution(random_flow(2), BASES["multivariate"](2)),
    "flow_base": lambda: InterpolantDistribution(random_flow(2), random_prior(2)),
    "halfway": lambda: InterpolantDistribution(random_flow(2)).at(0.5),
    "halfway_laplace": lambda: InterpolantDistribution(random_flow(2), BASES["laplace"](2)).at(
        0.5
    ),
    "start": lambda: InterpolantDistribution(random_flow(2)).at(0.0),
    "start_laplace": lambda: InterpolantDistribution(random_flow(2), BASES["laplace"](2)).at(0.0),
    "conditioned": lambda: conditional().condition(torch.tensor([1.0, -2.0, 0.5])),
    "conditioned_base": lambda: conditional(base=BASES["laplace"](2)).condition(torch.ones(3)),
    "conditioned_halfway": lambda: conditional().condition(torch.ones(3)).at(0.5),
}

# A batch of shape (4,).
BATCHED = {
    "expanded": lambda: InterpolantDistribution(random_flow(2)).expand((4,)),
    "expanded_base": lambda: InterpolantDistribution(random_flow(2), BASES["laplace"](2)).expand(
        (4,)
    ),
    "batched_base": lambda: InterpolantDistribution(
        random_flow(2), dist.Normal(torch.randn(4, 2), 1.0).to_event(1)
    ),
    "conditioned": lambda: conditional().condition(torch.randn(4, 3)),
    "conditioned_support": lambda: conditional(support=constraints.positive).condition(
        torch.randn(4, 3)
    ),
    "halfway": lambda: InterpolantDistribution(random_flow(2)).expand((4,)).at(0.5),
}


def make(table, name):
    return table[name]()


# --------------------------------------------------------------------- samples and densities agree


@pytest.mark.parametrize("name", ["one", "two", "laplace"])
def test_goodness_of_fit_sees_a_wrong_density(name):
    d = make(SINGLE, name)
    with torch.no_grad():
        x = d.sample((4000,))
        wrong = (d.log_prob(x) + 1.0).exp()  # likelihoods inflated by one nat
    assert auto_goodness_of_fit(x, wrong) < FAILURE_RATE


@pytest.mark.parametrize("name", slow_but([n for n in SINGLE if n != "three"], "one"))
def test_density_integrates_to_one_and_to_the_moments_of_samples(name):
    d = make(SINGLE, name)
    dim = d.event_shape[0]
    with torch.no_grad():
        x = d.sample((4000,))
        lower, upper = x.mean(0) - 9 * x.std(0), x.mean(0) + 9 * x.std(0)
        axes = [torch.linspace(*ends, 181) for ends in zip(lower, upper, strict=True)]
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


@pytest.mark.parametrize("name", ["one", "laplace", "halfway", "conditioned"])
def test_density_of_fresh_values_is_that_of_the_cached_ones(name):
    d = make(SINGLE, name)
    x = d.sample((20,))
    cached = d.log_prob(x)
    assert torch.allclose(d.log_prob(x.clone()), cached, atol=ATOL)
    d.clear_cache()
    assert torch.allclose(d.log_prob(x), cached, atol=ATOL)


def test_context_matters():
    d = conditional()
    x = torch.randn(5, 2)
    a, b = (d.condition(c).log_prob(x) for c in (torch.zeros(3), torch.ones(3)))
    assert ((a - b).abs() > 1e-3).all()


def test_rows_of_context_belong_to_rows_of_values():
    d = conditional()
    context, x = torch.randn(4, 3), torch.randn(4, 2)
    together = d.condition(context).log_prob(x)
    alone = torch.stack([d.condition(c).log_prob(v) for c, v in zip(context, x, strict=True)])
    assert torch.allclose(together, alone, atol=1e-10)


def test_gaussian_closed_form():
    loc, linear = torch.tensor([3.0, -1.0]), torch.tensor([[2.0, 0.0], [0.5, 1.0]])
    d = gaussian_prior(loc, linear)
    x = 3 * torch.randn(50, 2)
    expected = dist.MultivariateNormal(loc, scale_tril=linear).log_prob(x)
    assert torch.allclose(d.log_prob(x), expected, atol=1e-12)


# ---------------------------------------------------------- shapes, of which more is in pyro_suite


@pytest.mark.parametrize(("table", "name"), [(SINGLE, "three"), (BATCHED, "expanded")])
@pytest.mark.parametrize("last", [1, 4])
def test_wrong_event_size_raises(table, name, last):
    d = make(table, name)
    want = d.event_shape[0]
    with pytest.raises(ValueError, match=rf"expected a value of shape \(\*, {want}\)"):
        d.log_prob(torch.rand(4, last))


def test_missing_event_dimension_raises():
    d = InterpolantDistribution(random_flow(2))
    with pytest.raises(ValueError, match=r"expected a value of shape \(\*, 2\), got \(\)"):
        d.log_prob(torch.tensor(1.0))


def test_scalars_raise_with_the_recipe():
    d = InterpolantDistribution(random_flow(1))
    x = d.sample((7,))[:, 0]
    with pytest.raises(ValueError, match=r"\(N, 1\): x\[\.\.\., None\]"):
        d.log_prob(x)
    assert d.log_prob(x[..., None]).shape == (7,)


def test_nan_raises():
    d = InterpolantDistribution(random_flow(2))
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(torch.tensor([[0.0, float("nan")]]))


# ------------------------------------------------------------------------------------------ expand


@pytest.mark.parametrize("name", BATCHED)
def test_expand_new_dim(name):
    d = make(BATCHED, name)
    large = d.expand((3, 4))
    x = large.sample()
    assert x.shape == (3, 4, 2)
    assert large.log_prob(x).shape == (3, 4)
    assert torch.allclose(large.log_prob(x), d.log_prob(x.clone()), atol=ATOL)


def test_expand_existing_dim_of_a_context():
    d = conditional().condition(torch.randn(4, 1, 3))
    assert d.batch_shape == (4, 1)
    large = d.expand((4, 3))
    x = large.sample()
    assert x.shape == (4, 3, 2)
    assert torch.allclose(large.log_prob(x), d.log_prob(x.clone()), atol=ATOL)


@pytest.mark.parametrize("shape", [3, None, "ab", (2.0,), ("a",), torch.ones(2), ((2,),)])
def test_what_is_no_batch_shape_is_told(shape):
    with pytest.raises(TypeError, match="expected a batch shape, a tuple of whole numbers, got"):
        random_prior(2).expand(shape)


@pytest.mark.parametrize("shape", [(-1,), (3, -2)])
def test_no_batch_shape_is_negative(shape):
    with pytest.raises(ValueError, match="expected a batch shape of sizes of at least 0, got"):
        random_prior(2).expand(shape)


@pytest.mark.parametrize("how", ["log_prob", "score", "transform"])
@pytest.mark.parametrize("batch", [(2,), (4, 2)])
def test_values_of_another_batch_are_told(how, batch):
    member = conditional().condition(torch.randn(3, 3))
    call = {"log_prob": member.log_prob, "score": member.score, "transform": member.transform}
    with pytest.raises(ValueError, match=r"broadcasts with \(3,\).*got \((4, )?2,?\)"):
        call[how](torch.randn(*batch, 2))


def test_expand_shares_the_solve():
    d = InterpolantDistribution(random_flow(2, solver=CountingSolver()))
    x = d.expand((3,)).rsample()
    d.expand((3,)).log_prob(x)
    assert d.transform.solver.solves == 1


def test_to_event():
    d = InterpolantDistribution(random_flow(2)).expand((3,)).to_event(1)
    assert d.event_shape == (3, 2)
    assert d.event_dim == 2
    x = d.sample((5,))
    assert x.shape == (5, 3, 2)
    assert d.log_prob(x).shape == (5,)
    assert torch.allclose(d.log_prob(x), d.base_dist.log_prob(x.clone()).sum(-1), atol=ATOL)
    assert torch.allclose(d.log_prob(x.clone()), d.log_prob(x), atol=ATOL)


def test_mask_of_the_distribution():
    keep = torch.tensor([True, False, True])
    d = InterpolantDistribution(random_flow(2)).expand((3,))
    x = d.sample()
    masked = d.mask(keep)
    assert torch.equal(masked.log_prob(x), torch.where(keep, d.log_prob(x), 0.0))
    assert masked.sample().shape == (3, 2)


# ------------------------------------------------------------------- what we add: at, score, pairs


@pytest.mark.parametrize("name", ["two", "laplace", "conditioned"])
def test_end_is_the_model(name):
    d = make(SINGLE, name)
    x = torch.randn(6, 2)
    assert torch.equal(d.at(1.0).log_prob(x), d.log_prob(x))


def test_start_is_the_affine_gaussian():
    d = InterpolantDistribution(random_flow(2))
    flow, x = d.transform, torch.randn(6, 2)
    expected = dist.MultivariateNormal(
        flow.flow.loc, flow.flow.whitening.linear @ flow.flow.whitening.linear.T
    ).log_prob(x)
    assert torch.allclose(d.at(0).log_prob(x), expected, atol=1e-10)


@pytest.mark.parametrize("base", ["laplace", "multivariate"])
def test_start_is_the_given_base(base):
    given = BASES[base](2)
    d = InterpolantDistribution(random_flow(2), given)
    x = torch.randn(6, 2)
    assert torch.allclose(d.at(0).log_prob(x), given.log_prob(x), atol=1e-10)
    pyro.set_rng_seed(3)
    a = d.at(0).sample((5,))
    pyro.set_rng_seed(3)
    assert torch.allclose(a, given.sample((5,)), atol=1e-10)


@pytest.mark.parametrize("t", [-0.1, 1.1, float("nan")])
def test_time_outside_raises(t):
    with pytest.raises(ValueError, match=r"time t in \[0, 1\]"):
        InterpolantDistribution(random_flow(2)).at(t)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", slow_but(SINGLE, "laplace", "start", "conditioned_halfway"))
def test_score_is_the_gradient(name, frozen):
    d = make(SINGLE, name)
    d = d.freeze() if frozen else d
    x = d.sample((5,)).clone()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(d.log_prob(leaf).sum(), leaf)
    for wanted in (x, leaf):
        score = d.score(wanted)
        assert score.shape == x.shape
        trained = not frozen and not name.startswith("start")  # where no weight matters
        assert score.requires_grad == (wanted.requires_grad or trained)
        assert torch.allclose(score, expected, atol=1e-10)
    assert torch.allclose(torch.func.vmap(d.score)(x), expected, atol=1e-10)
    d.freeze()
    (expected,) = torch.autograd.grad(d.log_prob(leaf).sum(), leaf)
    d.transform.flow.requires_grad_(not frozen)  # without gradients, a function all the same
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            score = d.score(x)
        assert not score.requires_grad
        assert torch.allclose(score, expected, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("name", SINGLE)
def test_the_jacobian_of_the_score_is_the_hessian(name):
    d = make(SINGLE, name).freeze()
    x = d.sample()
    expected = torch.autograd.functional.hessian(d.log_prob, x)
    assert (
        expected.abs().max() > 0.01 or name == "start_laplace"
    )  # whose logarithm is piecewise linear
    assert torch.allclose(torch.autograd.functional.jacobian(d.score, x), expected, atol=1e-8)
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        assert torch.allclose(jacobian(d.score)(x), expected, atol=1e-8)


@pytest.mark.parametrize("base", [None, random_prior], ids=["plain", "flow_base"])
def test_the_score_without_gradients_is_that_of_frozen_weights(base):
    base = base and base(2, frozen=False)
    d = InterpolantDistribution(random_flow(2), base, validate_args=False)
    x = torch.randn(3, 2)
    with torch.no_grad():
        found = d.score(x), torch.vmap(d.score)(x)
    expected = d.freeze().score(x)
    for score in found:
        torch.testing.assert_close(score, expected)


def test_the_score_outside_of_the_support_is_checked_only_where_the_density_is():
    d = InterpolantDistribution(random_flow(2), support=constraints.positive, validate_args=False)
    with torch.no_grad():
        assert d.score(torch.tensor([1.0, -1.0])).eq(0).all()


def test_the_score_trains_weights_and_context():
    likelihood = ConditionalInterpolantDistribution(random_flow(2, context_dim=3))
    context = torch.randn(4, 3, requires_grad=True)
    likelihood.condition(context).score(torch.randn(2)).square().sum().backward()
    assert context.grad.abs().min() > 0
    assert likelihood.transform.flow.velocity.output.weight.grad.abs().max() > 0


def test_each_member_of_a_batch_has_its_score():
    prior = random_prior(2)
    x, many = torch.randn(2), torch.randn(5, 1, 2)
    assert torch.allclose(prior.expand((3,)).score(x), prior.score(x).expand(3, 2))
    assert torch.allclose(prior.expand((3,)).score(many), prior.score(many).expand(5, 3, 2))
    likelihood = ConditionalInterpolantDistribution(random_flow(2, context_dim=3)).freeze()
    contexts = torch.randn(4, 3)
    expected = torch.stack([likelihood.condition(c).score(x) for c in contexts])
    assert torch.allclose(likelihood.condition(contexts).score(x), expected)


@pytest.mark.parametrize("name", [*SINGLE])
def test_transport_is_in_data_coordinates(name):
    d = make(SINGLE, name).freeze()
    d.transform.solver = FixedGrid(steps=32)
    x = d.at(0).sample((5,))
    y = d.transport(x)
    assert torch.allclose(d.transport(y, inverse=True), x, atol=1e-6)
    # d log-density along the path is the log-determinant of the whole chain
    jacobian = torch.func.vmap(torch.func.jacrev(d.transport))(x)
    change = d.at(0).log_prob(x) - torch.linalg.slogdet(jacobian).logabsdet
    assert torch.allclose(d.log_prob(y), change, atol=1e-5)


def test_transport_under_a_support():
    d = InterpolantDistribution(random_flow(2), support=constraints.positive).freeze()
    x = torch.randn(5, 2)
    y = d.transport(x)
    assert bool((y > 0).all())
    assert torch.allclose(d.transport(y, inverse=True), x, atol=1e-4)
    with pytest.raises(ValueError, match="strictly inside the support"):
        d.transport(-y, inverse=True)


@pytest.mark.parametrize("inverse", [False, True])
def test_transport_of_another_size_is_refused(inverse):
    with pytest.raises(ValueError, match=r"shape \(\*, 2\), got \(4, 1\)"):
        random_prior(2).transport(torch.ones(4, 1), inverse=inverse)


def test_score_is_the_finite_difference():
    d = InterpolantDistribution(random_flow(2))
    x, step = torch.randn(4, 2), 1e-5
    for i in range(2):
        e = step * torch.eye(2)[i]
        slope = (d.log_prob(x + e) - d.log_prob(x - e)) / (2 * step)
        assert torch.allclose(d.score(x)[:, i], slope, atol=1e-6)


def test_score_of_a_gaussian():
    loc, linear = torch.tensor([3.0, -1.0]), torch.tensor([[2.0, 0.0], [0.5, 1.0]])
    x = torch.randn(6, 2)
    expected = -torch.linalg.solve(linear @ linear.T, (x - loc).T).T
    assert torch.allclose(gaussian_prior(loc, linear).score(x), expected, atol=1e-10)


def test_score_with_a_batch():
    d = make(BATCHED, "conditioned")
    x = d.sample()
    assert d.score(x).shape == (4, 2)
    i = 2
    alone = d.score(x)[i]
    x[0] += 1.0
    assert torch.allclose(d.score(x)[i], alone, atol=1e-10)


@pytest.mark.parametrize("name", ["two", "laplace", "halfway", "conditioned"])
def test_rsample_and_log_prob(name):
    d = make(SINGLE, name)
    pyro.set_rng_seed(1)
    x, log_prob = d.rsample_and_log_prob((6,))
    pyro.set_rng_seed(1)
    assert torch.equal(x, d.rsample((6,)))
    assert x.requires_grad
    assert log_prob.shape == (6,)
    assert torch.allclose(log_prob, d.log_prob(x.detach().clone()), atol=ATOL)


def test_rsample_and_log_prob_is_one_solve():
    d = InterpolantDistribution(random_flow(2))
    solves, integrate = [], d.transform.flow.integrate
    d.transform.flow.integrate = lambda *a, **k: solves.append(1) or integrate(*a, **k)
    d.rsample_and_log_prob((6,))
    assert len(solves) == 1


def test_gradients_reach_the_weights_and_the_values():
    d = InterpolantDistribution(random_flow(2))
    x = d.sample((6,))
    d.log_prob(x)
    x.requires_grad_()
    d.log_prob(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in d.transform.parameters())


def test_what_a_network_lacks_is_not_said_of_the_base():
    class Unwritten(torch.nn.Module):
        event_dim = 2

    for base in (None, BASES["laplace"](2)):
        d = InterpolantDistribution(InterpolantTransform(Unwritten()), base)
        with pytest.raises(NotImplementedError, match='Unwritten.*the required "forward"'):
            d.rsample((3,))


def test_has_rsample_is_settable():
    d = InterpolantDistribution(random_flow(2))
    assert d.has_rsample
    d.has_rsample_(False)  # noqa: FBT003
    assert not d.has_rsample
    assert not d.expand((3,)).has_rsample
    d.has_rsample = True
    assert d.has_rsample
    assert InterpolantDistribution(random_flow(2)).has_rsample


def test_repr():
    d = InterpolantDistribution(random_flow(2)).expand((3,))
    assert repr(d).startswith("InterpolantDistribution(event_shape=(2,), batch_shape=(3,)")
    assert "support=IndependentConstraint(Real(), 1)" in repr(d)
    positive = InterpolantDistribution(random_flow(2), support=constraints.positive)
    assert "GreaterThan(lower_bound=0.0)" in repr(positive)


def test_doctest_shapes():
    prior = InterpolantDistribution(interpolant_transform(2, hidden_dims=(32, 32)))
    assert prior.log_prob(prior.sample((10,))).shape == (10,)


# ------------------------------------------------------------------------------------- conditional


def test_condition_checks_the_context():
    with pytest.raises(ValueError, match=r"context of shape \(\*, 3\), got \(5, 2\)"):
        conditional().condition(torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"context of shape \(\*, 3\), got \(\)"):
        conditional().condition(torch.tensor(1.0))


def test_conditional_of_the_pyro_kind():
    d = conditional(support=constraints.positive)
    assert isinstance(d, dist.ConditionalTransformedDistribution)
    assert isinstance(d.condition(torch.zeros(3)), dist.TransformedDistribution)
    values = torch.tensor([[1.0, 2.0]])
    assert torch.allclose(d.unconstrained(values), values.log())
    d.clear_cache()


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 4)])
def test_the_batch_is_that_of_the_context(shape):
    """Also where it has one row, which a loop over pieces of rows ends with."""
    joint = ConditionalJointInterpolantDistribution(
        conditional().transform, sites={"mu": ((2,), constraints.real)}
    )
    classes = ConditionalInterpolantTransform(VelocityMLP(2, (4,), classes=3))
    labels = torch.ones(shape, dtype=torch.long)
    for member in (
        conditional(support=constraints.positive).condition(torch.randn(*shape, 3)),
        joint.condition(torch.randn(*shape, 3)),
        ConditionalInterpolantDistribution(classes).condition(labels),
        ConditionalInterpolantDistribution(classes).condition(labels[..., None].double()),
    ):
        assert member.batch_shape == shape
        x = member.sample((5,))
        assert x.shape == (5, *shape, 2)
        assert member.log_prob(x).shape == (5, *shape)


def test_conditioned_shares_weights():
    d = conditional()
    member = d.condition(torch.zeros(3))
    assert list(member.transform.parameters()) == []
    x = torch.randn(4, 2)
    before = member.log_prob(x)
    with torch.no_grad():
        d.transform.velocity.output.weight.mul_(2.0)
    assert ((member.log_prob(x) - before).abs() > 1e-6).all()


@pytest.mark.parametrize("name", ["conditioned", "conditioned_base", "conditioned_halfway"])
def test_freeze_of_a_member_freezes_the_owner(name):
    member = make(SINGLE, name)
    assert member.freeze() is member
    assert not any(p.requires_grad for p in member.transform.flow.parameters())


# ---------------------------------------------------------------------------------------- freezing


def test_freeze():
    base = InterpolantDistribution(random_flow(2))
    d = InterpolantDistribution(random_flow(2), base)
    assert d.freeze() is d
    assert not any(p.requires_grad for p in d.transform.parameters())
    assert not any(p.requires_grad for p in base.transform.parameters())
    assert not d.transform.training
    assert not d.rsample((3,)).requires_grad
    pyro.module("flow", d.transform)  # no warning about parameters that do not require gradients
    assert not dict(pyro.get_param_store())


def test_freeze_of_the_conditional():
    d = conditional()
    assert d.freeze() is d
    assert not any(p.requires_grad for p in d.transform.parameters())
    assert not d.transform.training


# ------------------------------------------------------------------------------- types and devices


@pytest.mark.usefixtures("_nodes_stay")
@pytest.mark.parametrize("name", ["two", "laplace", "multivariate", "flow_base", "halfway"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_to_type(name, dtype):
    d = make(SINGLE, name)
    x = torch.randn(5, 2)
    expected = d.log_prob(x)
    d.sample((3,))
    assert d.to(dtype) is d
    assert all(s.dtype == dtype for s in d.transform.flow.state_dict().values())
    sample = d.sample((5,))
    assert sample.dtype == dtype
    assert d.log_prob(sample).dtype == dtype
    assert torch.allclose(d.log_prob(x.to(dtype)).double(), expected, atol=1e-3)
    expanded = d.expand((5,))
    assert expanded.sample().dtype == dtype
    back = d.to(torch.float64)
    assert torch.allclose(back.log_prob(x), expected, atol=1e-3)


@pytest.mark.parametrize("name", ["expanded", "expanded_base", "batched_base"])
def test_to_type_with_a_batch(name):
    d = make(BATCHED, name).to(torch.float32)
    assert d.batch_shape == (4,)
    assert d.sample().dtype == torch.float32
    assert d.sample().shape == (4, 2)


def test_a_base_is_not_cut_off_from_its_parameters():
    mu = torch.zeros(2, requires_grad=True)
    d = InterpolantDistribution(random_flow(2), dist.Normal(mu, 1.0).to_event(1)).freeze()
    with pytest.raises(ValueError, match="tensor that requires a gradient, which a copy"):
        d.to(torch.float32)
    assert d.transform.flow.loc.dtype == torch.float64
    d.to(torch.float64)
    before = d.log_prob(torch.zeros(2))
    with torch.no_grad():
        mu.add_(1.0)
    assert (d.log_prob(torch.zeros(2)) - before).abs() > 1e-3


def test_default_base_follows_the_transform():
    """Moving the transform, or a module that holds it, is enough."""
    d = InterpolantDistribution(random_flow(2)).expand((3,))
    torch.nn.ModuleList([d.transform]).float()
    x = d.rsample()
    assert x.dtype == torch.float32
    assert d.log_prob(x).dtype == torch.float32
    assert x.shape == (3, 2)


@pytest.mark.usefixtures("_nodes_stay")
@pytest.mark.parametrize("batch", [(), (4,)])
def test_to_type_of_the_conditional(batch):
    d = conditional(base=BASES["laplace"](2))
    context = torch.randn(*batch, 3)
    expected = d.condition(context).log_prob(torch.ones(2))
    assert d.to(torch.float32) is d
    member = d.condition(context.float())
    assert member.sample().dtype == torch.float32
    found = member.log_prob(torch.ones(2, dtype=torch.float32))
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-3)


@pytest.mark.parametrize("base", ["default", "laplace"])
def test_to_type_of_a_member_moves_its_context(base):
    d = conditional(base=BASES[base](2)).condition(torch.randn(4, 3))
    d.to(torch.float32)
    assert d.transform.context.dtype == torch.float32
    x = d.sample()
    assert x.dtype == torch.float32
    assert d.log_prob(x).shape == (4,)


def test_wrong_type_raises():
    d = InterpolantDistribution(random_flow(2))
    for function in (d.log_prob, d.score):
        for dtype in (torch.float32, torch.int64, torch.bool):
            with pytest.raises(ValueError, match=f"expected torch.float64, .* got {dtype}"):
                function(torch.zeros(3, 2, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float16])
@pytest.mark.parametrize("validated", [True, False])
def test_wrong_type_raises_on_a_support_whose_map_takes_it(dtype, validated):
    d = InterpolantDistribution(random_flow(2), support=constraints.interval(-2.0, 3.0))
    d._validate_args = validated
    for value in (torch.ones(2, dtype=dtype), torch.ones(0, 2, dtype=dtype)):
        with pytest.raises(ValueError, match="expected torch.float64, the type of the flow"):
            d.log_prob(value)


def test_values_that_are_infinite_once_whitened_have_no_density():
    """Whitened, this is infinity less infinity: it came out as NaN."""
    linear = 1e-12 * torch.tensor([[1.0, 0.0], [0.9, 1.0]])
    d = gaussian_prior(torch.zeros(2), linear).to(torch.float32)
    x = torch.tensor([[1e30, 1e30], [0.0, 0.0]], dtype=torch.float32)
    found = d.log_prob(x)
    assert found[0] == -math.inf
    assert found[1].isfinite()
    assert d.log_prob(x[:1]).item() == -math.inf


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace")
@pytest.mark.parametrize("support", [constraints.unit_interval, constraints.positive])
def test_traced_densities_end_where_the_support_does(support):
    d = InterpolantDistribution(random_flow(2), support=support, validate_args=False).freeze()
    traced = torch.jit.trace(lambda x: d.log_prob(x), torch.rand(3, 2), check_trace=False)
    x = torch.tensor([[0.5, 0.2], [0.5, -1.5], [0.5, math.inf], [math.nan, 0.5]])
    expected = d.log_prob(x)
    assert expected[1:3].tolist() == [-math.inf] * 2
    torch.testing.assert_close(traced(x), expected, equal_nan=True)


def test_float32_samples_follow_the_density():
    d = InterpolantDistribution(random_flow(2)).to(torch.float32)
    with torch.no_grad():
        x = d.sample((4000,))
        probs = d.log_prob(x).exp()
    assert auto_goodness_of_fit(x, probs) > FAILURE_RATE


def test_no_device_is_named():
    """Tensors are placed by the tensors they meet; only generators know of devices."""
    package = pathlib.Path(pyro_interpolant.__file__).parent
    named = re.compile(r"""["'](cuda|cpu|mps)\b|\.cuda\(""")
    found = [
        f"{path.name}: {line.strip()}"
        for path in sorted(package.rglob("*.py"))
        for line in path.read_text().splitlines()
        if named.search(line) and path.name != "_torch.py"
    ]
    assert not found
    assert named.search('torch.zeros(3, device="cuda:0")')


# ------------------------------------------------------------------------------------------ errors


def test_wrong_transform_raises():
    with pytest.raises(TypeError, match="class InterpolantTransform, got VelocityMLP"):
        InterpolantDistribution(VelocityMLP(2, (8,)))
    with pytest.raises(TypeError, match="use ConditionalInterpolantDistribution"):
        InterpolantDistribution(random_flow(2, context_dim=3))
    with pytest.raises(TypeError, match="class ConditionalInterpolantTransform, got Interp"):
        ConditionalInterpolantDistribution(random_flow(2))


KINDS = {
    "plain": lambda **kwargs: InterpolantDistribution(random_flow(2), **kwargs),
    "conditional": conditional,
}

BAD_BASES = {
    "no distribution": (lambda: torch.zeros(2), TypeError, "from pyro.distributions.* got Tensor"),
    "torch's own": (
        lambda: torch.distributions.Independent(
            torch.distributions.Normal(torch.zeros(2), torch.ones(2)), 1
        ),
        TypeError,
        "got Independent",
    ),
    "not an event": (
        lambda: dist.Normal(torch.zeros(2), torch.ones(2)),
        ValueError,
        r"event shape \(2,\).*\.to_event\(1\)",
    ),
    "other size": (
        lambda: dist.Normal(torch.zeros(3), torch.ones(3)).to_event(1),
        ValueError,
        r"event shape \(2,\), got event shape \(3,\)",
    ),
}


@pytest.mark.parametrize("name", BAD_BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_wrong_base_raises(name, kind):
    base, error, message = BAD_BASES[name]
    with pytest.raises(error, match=message):
        KINDS[kind](base=base())


@pytest.mark.parametrize("kind", KINDS)
def test_support_must_be_a_constraint(kind):
    with pytest.raises(TypeError, match="expected support to be a constraint.* got str"):
        KINDS[kind](support="positive")


def test_base_is_an_event_already():
    """The stock TransformReparam needs a base that torch did not wrap in its own Independent."""
    base = InterpolantDistribution(random_flow(2)).base_dist
    assert isinstance(base, Independent)
    assert base.event_dim == 1
    assert base.batch_shape == ()


def test_other_times_keep_validation_as_it_is():
    flow = InterpolantDistribution(
        random_flow(2), support=constraints.positive, validate_args=False
    ).freeze()
    x = torch.tensor([-1.0, 1.0])
    assert flow.log_prob(x) == flow.at(0.5).log_prob(x) == -math.inf


def test_no_rows():
    flow = random_prior(2).freeze()
    x = torch.empty(0, 2)
    assert flow.transform.log_abs_det_jacobian(x, flow.transform(x)).shape == (0,)
    scalars = ConditionalInterpolantDistribution(
        pyro_interpolant.conditional_interpolant_transform(1, 2)
    ).freeze()
    assert scalars.condition(torch.empty(0, 2)).sample().shape == (0, 1)


@pytest.mark.parametrize("context", [(3,), (1, 3), (5, 1, 3)], ids=str)
@pytest.mark.parametrize("of", ["bounds", "base"])
def test_the_batch_given_a_context_is_that_of_bounds_and_base_too(context, of):
    bounds = constraints.interval(torch.zeros(4, 2), torch.ones(4, 2))
    options = {"support": constraints.independent(bounds, 1)}
    if of == "base":
        options = {"base": dist.Normal(torch.zeros(4, 2), 1.0).to_event(1)}
    family = ConditionalInterpolantDistribution(random_flow(2, context_dim=3), **options)
    d = family.condition(torch.randn(context))
    assert d.batch_shape == torch.broadcast_shapes(context[:-1], (4,))
    assert d.log_prob(d.sample()).shape == d.batch_shape
