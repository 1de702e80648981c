"""The same numbers as torch, from the same file: every member of every family."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as ndist
import pyro.distributions as dist
import pytest
import torch
from cases import (
    BASES,
    DIVERGENCES,
    HIDDEN_DIMS,
    INTERPOLANTS,
    LATENT,
    SOLVERS,
    SUPPORTS,
    WHITENINGS,
    random_flow,
    slow_but,
)
from kinds import (
    angles,
    angular_flow,
    family,
    gaussianized_joint,
    joint,
    plain,
    supported,
    whitened,
)
from pyro.distributions import constraints

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    Geodesic,
    InterpolantDistribution,
    LearnedInterpolant,
    TorusMLP,
    VelocityMLP,
    circular,
)
from pyro_interpolant.distributions import ConditionalJointInterpolantDistribution
from pyro_interpolant.numpyro import from_torch

ROWS = 6


def assert_equal(found, expected, tolerance=1e-10):
    found, expected = np.asarray(found), expected.detach().numpy()
    assert found.shape == expected.shape
    error = np.abs(found - expected) / (1 + np.abs(expected))
    assert error.max() <= tolerance, error.max()


@jax.jit
def numbers_of(distribution, w, value):
    """Where draws of the base go, the log-densities of values, and their gradients."""
    z = w
    for transform in distribution.transforms:
        z = transform(z)
    log_prob, gradients = jax.vjp(distribution.log_prob, value)
    return z, log_prob, gradients(jnp.ones_like(log_prob))[0]


def assert_twins(flow, other):
    """The same draws of the base give the same values, and these the same densities and slopes."""
    w = flow.base_dist.sample((ROWS,))
    y = w
    for transform in flow.transforms:
        y = transform(y)
    x = y.detach().clone().requires_grad_()
    log_prob = flow.log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    found = numbers_of(other, jnp.asarray(w.numpy()), jnp.asarray(x.detach().numpy()))
    for ours, theirs in zip(found, (y, log_prob, gradient), strict=True):
        assert_equal(ours, theirs)
    assert other.batch_shape == tuple(flow.batch_shape)
    assert other.event_shape == tuple(flow.event_shape)


# ---- the networks -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", HIDDEN_DIMS)
def test_networks(name, twin):
    flow = InterpolantDistribution(random_flow(2, HIDDEN_DIMS[name])).freeze()
    flow.transform.flow.velocity.set_scales(0.4 * torch.randn(20, 2))  # the gate is felt
    assert_twins(flow, twin(flow))


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(1, (5, 5, 7, 7)), (9, (8, 8)), (9, (4, 4, 4))], ids=str)
def test_networks_of_other_sizes(dims, twin):
    """From nine dimensions on, the embedding of time has fewer frequencies."""
    flow = InterpolantDistribution(random_flow(*dims)).freeze()
    assert_twins(flow, twin(flow))


def products(jaxpr):
    """All products of matrices in a program, those of its parts too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for part in jax.tree.leaves(tuple(equation.params.values()), is_leaf=_is_program):
            if _is_program(part):
                yield from products(getattr(part, "jaxpr", part))


def _is_program(part):
    return hasattr(part, "eqns") or hasattr(part, "jaxpr")


@pytest.mark.parametrize("batch", [(), (ROWS,)], ids=str)
def test_no_product_is_shortened_by_an_accelerator(batch):
    """By default they would compute float32 in a shorter type."""
    flow = from_torch(family())

    def both(key, context, x):
        given = flow.condition(context)
        return given.sample(key), given.log_prob(x)

    context, x = jnp.zeros((*batch, 3)), jnp.zeros((ROWS, 2))
    program = jax.make_jaxpr(both)(jax.random.key(0), context, x)
    found = [product.params["precision"] for product in products(program.jaxpr)]
    assert found
    assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


@pytest.mark.slow
@pytest.mark.parametrize("dim", [1, 2])
def test_the_torus(dim, twin):
    flow = angles(dim).freeze()
    assert_twins(flow, twin(flow))


# ---- solvers, divergences, whitening ------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(SOLVERS.keys() - {"adaptive"}))
def test_solvers(name, twin):
    flow = InterpolantDistribution(random_flow(2, solver=SOLVERS[name])).freeze()
    assert_twins(flow, twin(flow))


def test_hutchinsons_divergence(twin):
    flow = InterpolantDistribution(random_flow(2, divergence=DIVERGENCES["hutchinson"])).freeze()
    assert_twins(flow, twin(flow))


@pytest.mark.slow
def test_hutchinson_on_the_torus(twin):
    flow = angles().freeze()
    flow.transform.divergence = DIVERGENCES["hutchinson"]
    assert_twins(flow, twin(flow))


@pytest.mark.slow
@pytest.mark.parametrize("name", WHITENINGS)
def test_whitenings(name, twin):
    flow = whitened(name).freeze()
    assert_twins(flow, twin(flow))


@pytest.mark.parametrize("t", slow_but([0.0, 0.4], 0.0))
def test_the_density_at_a_time(t, twin):
    flow = plain().freeze()
    assert_twins(flow.at(t), twin(flow).at(t))
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="a time t in"):
            twin(flow).at(wrong)


@pytest.mark.parametrize("name", slow_but([*INTERPOLANTS, *LATENT, "learned"]))
def test_interpolants_matter_for_training_alone(name, twin):
    known = {**INTERPOLANTS, **LATENT}
    path = LearnedInterpolant(3, event_dim=2) if name == "learned" else known[name]
    flow = InterpolantDistribution(random_flow(2, interpolant=path)).freeze()
    assert_twins(flow, twin(flow))


def test_what_learned_the_noise_is_left_alone(twin):
    flow = plain().freeze()
    expected = twin(flow)
    flow.transform.flow.noise = random_flow(2).flow.velocity
    assert twin(flow).transform.weights == expected.transform.weights


# ---- supports -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(SUPPORTS, "stack"))
def test_supports(name, twin):
    flow = supported(name).freeze()
    other = twin(flow)
    assert_twins(flow, other)
    value = jnp.asarray(flow.sample((ROWS,)).numpy())
    assert other.support(value).shape == (ROWS,)
    assert bool(other.support(value).all())


MORE = {
    "real": constraints.real,
    "independent real": constraints.independent(constraints.real, 1),
    "nonnegative": constraints.nonnegative,
    "half_open_interval": constraints.half_open_interval(-1.0, 2.0),
    "greater_than_eq": constraints.greater_than_eq(-0.5),
    "independent interval": constraints.independent(constraints.interval(0.1, 0.7), 1),
    "bounds by column": constraints.interval(
        torch.tensor([0.1, -1.0], dtype=torch.float64),
        torch.tensor([1.0, 5.7], dtype=torch.float64),
    ),
    "nested stack": constraints.stack(
        [constraints.greater_than(2.0), constraints.independent(constraints.real, 0)], dim=-1
    ),
    "cat": constraints.cat([constraints.positive, constraints.unit_interval], dim=-1),
    "cat of a vector": constraints.cat(
        [constraints.ordered_vector, constraints.positive], dim=-1, lengths=[2, 1]
    ),
    "cat of a stack": constraints.cat(
        [
            constraints.stack([constraints.positive, constraints.unit_interval], dim=-1),
            constraints.positive,
        ],
        dim=-1,
        lengths=[2, 1],
    ),
    "corr_cholesky_constraint": constraints.corr_cholesky,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_more_supports(name, twin):
    size = 3 if any(part in name for part in ("corr", "vector", "cat of")) else 2
    flow = plain(size, support=MORE[name]).freeze()
    assert_twins(flow, twin(flow))


EDGES = {
    "unit": constraints.unit_interval,
    "half open": constraints.half_open_interval(0.0, 1.0),
    "wide": constraints.independent(constraints.interval(0.1, 0.7), 1),
    "stack": constraints.stack([constraints.unit_interval], dim=-1),
}


@pytest.mark.parametrize("name", slow_but(EDGES, "unit"))
def test_the_edges_of_an_interval(name, float32):
    """There, and where float32 cannot tell, torch clamps; beyond them is no density."""
    flow = plain(1, support=EDGES[name], validate_args=False).freeze()
    low, high = (0.1, 0.7) if name == "wide" else (0.0, 1.0)
    y = torch.tensor([low, high, high - 6e-8, low + 1e-30, 0.5, high + 1e-6, low - 1e-6])[:, None]
    other = from_torch(flow)
    found = other.log_prob(jnp.asarray(y.numpy()))
    assert_equal(found[:5], flow.log_prob(y)[:5], 3e-5)
    assert (found[5:] == -jnp.inf).all()


@pytest.mark.usefixtures("float32")
def test_bounds_follow_when_jax_begins_to_compute_in_float64():
    """As a file of float64 asks for where it is loaded in float32."""
    low = torch.tensor([0.3, -1.7], dtype=torch.float64)
    onto = from_torch(plain(support=constraints.greater_than(low))).transforms[-1]
    x = np.array([1.0, 2.0])
    before = onto(jnp.asarray(x))
    jax.config.update("jax_enable_x64", val=True)
    after = onto(jnp.asarray(x))
    assert after.dtype == np.float64
    np.testing.assert_allclose(before, after, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("support", [constraints.real_vector, constraints.positive], ids=str)
def test_event_shapes(support, twin):
    flow = plain(4, event_shape=(2, 2), support=support).freeze()
    other = twin(flow)
    assert_twins(flow, other)
    assert other.support.event_dim == 2


@pytest.mark.slow
def test_beyond_the_knots_and_at_the_centre(twin):
    for name in ("gaussianized", "tempered"):
        flow = supported(name).freeze()
        other = twin(flow)
        y = torch.tensor([[0.0, 0.0], [300.0, -2.0], [-0.01, 90.0]])
        assert_equal(other.log_prob(jnp.asarray(y.numpy())), flow.log_prob(y))


@pytest.mark.slow
def test_gradients_at_the_knots_which_are_rows(twin):
    flow = supported("gaussianized").freeze()
    other = twin(flow)
    for row in flow.constraint.gaussianizer.knots[0].mT[[0, 3, -1]]:
        y = row.clone().requires_grad_()
        (expected,) = torch.autograd.grad(flow.log_prob(y), y)
        assert_equal(jax.grad(other.log_prob)(jnp.asarray(row.numpy())), expected)


@pytest.mark.slow
def test_far_rows(twin):
    flow = plain().freeze()
    flow.transform.flow.velocity.reach.fill_(7.0)
    y = torch.cat([scale * torch.randn(20, 2) for scale in (1.0, 10.0, 100.0)])
    assert_equal(twin(flow).log_prob(jnp.asarray(y.numpy())), flow.log_prob(y))


# ---- bases, families, named sites ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", BASES)
def test_bases(name, twin):
    flow = plain(base=BASES[name](2)).freeze()
    assert_twins(flow, twin(flow))


MORE_BASES = {
    "low rank": lambda: dist.LowRankMultivariateNormal(
        torch.ones(2), torch.ones(2, 1), torch.ones(2)
    ),
    "kumaraswamy": lambda: dist.Kumaraswamy(torch.full((2,), 2.0), torch.ones(2)).to_event(1),
    "pareto": lambda: dist.Pareto(torch.ones(2), torch.full((2,), 2.0)).to_event(1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_BASES)
def test_more_bases(name, twin):
    flow = plain(base=MORE_BASES[name](), validate_args=False).freeze()
    assert_twins(flow, twin(flow))


@pytest.mark.slow
def test_a_base_that_is_a_flow(twin):
    inner = InterpolantDistribution(random_flow(2), BASES["laplace"](2))
    flow = plain(base=inner, support=constraints.positive).freeze()
    other = twin(flow)
    y = flow.sample((ROWS,)).clone()
    assert_equal(jax.jit(other.log_prob)(jnp.asarray(y.numpy())), flow.log_prob(y))
    assert other.event_shape == (2,)
    halfway = jax.jit(other.at(0.5).log_prob)(jnp.asarray(y.numpy()))
    assert_equal(halfway, flow.at(0.5).log_prob(y))


@pytest.mark.parametrize("batch", slow_but([(), (ROWS,), (3, 1)], (3, 1)), ids=str)
def test_families(batch, twin):
    flow = family(support=constraints.positive).freeze()
    flow.transform.flow.velocity.set_scales(torch.randn(9, 2), 3 * torch.randn(9, 3) + 1)
    context = torch.randn(*batch, 3)
    given, other = flow.condition(context), twin(flow).condition(jnp.asarray(context.numpy()))
    assert other.batch_shape == batch
    assert_twins(given, other)


@pytest.mark.slow
def test_gradients_in_the_context(twin):
    flow, context, x = family().freeze(), torch.randn(ROWS, 3), torch.randn(ROWS, 2)
    other = twin(flow)
    context.requires_grad_()
    (expected,) = torch.autograd.grad(flow.condition(context).log_prob(x).sum(), context)
    given, value = jnp.asarray(context.detach().numpy()), jnp.asarray(x.numpy())
    found = jax.jit(jax.grad(lambda c: other.condition(c).log_prob(value).sum()))(given)
    assert_equal(found, expected)


@pytest.mark.slow
def test_a_family_on_the_torus(twin):
    flow = ConditionalInterpolantDistribution(angular_flow(context_dim=3), support=circular)
    context = torch.randn(ROWS, 3)
    other = twin(flow.freeze()).condition(jnp.asarray(context.numpy()))
    assert_twins(flow.condition(context), other)


@pytest.mark.slow
@pytest.mark.parametrize("make", [joint, gaussianized_joint])
def test_named_sites(make, twin):
    flow = make().freeze()
    other = twin(flow)
    assert_twins(flow, other)
    x = flow.sample((3,))
    sites, expected = other.unpack(jnp.asarray(x.numpy())), flow.unpack(x)
    assert list(sites) == list(expected) == list(other.sites)
    for name, value in expected.items():
        assert_equal(sites[name], value)
    assert_equal(other.pack(sites), x)


@pytest.mark.slow
def test_batch_shapes_are_kept(twin):
    flow = plain().freeze().expand((2, 3))
    other = twin(flow)
    assert other.batch_shape == (2, 3)
    assert other.sample(jax.random.key(0), (4,)).shape == (4, 2, 3, 2)


@pytest.mark.slow
def test_many_rows_in_chunks(twin, monkeypatch):
    """Where a divergence at all nodes of all rows would not fit into memory."""
    from pyro_interpolant.numpyro.flow import _solve  # what has the size compiled in

    flow, context, x = family().freeze(), torch.randn(7, 1, 3), torch.randn(7, 3, 2)
    given, other = flow.condition(context), twin(flow).condition(jnp.asarray(context.numpy()))
    value = jnp.asarray(x.numpy())
    expected = jax.grad(lambda v: other.log_prob(v).sum())(value)
    monkeypatch.setattr("pyro_interpolant.numpyro.flow._VALUES_AT_ONCE", 4 * 16 * 9)
    _solve.clear_cache()
    assert_equal(other.log_prob(value), given.log_prob(x))
    found = jax.grad(lambda v: other.log_prob(v).sum())(value)
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    _solve.clear_cache()


@pytest.mark.parametrize("way", ["__call__", "_inverse"])
def test_of_a_path_without_its_density_the_end_alone_is_held(way, twin):
    """Its 16 stages side by side would be as many times the draws."""
    transform, w = twin(plain(32).freeze()).transform, jnp.zeros((1000, 32))
    compiled = jax.jit(lambda w: getattr(transform, way)(w)).lower(w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * w.nbytes


# ---- float32 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", slow_but(SUPPORTS, "corr_matrix"))
def test_values_of_float32_where_float64_is_the_default(name, twin):
    """NumPyro makes matrices of the default type, whatever their numbers are."""
    flow = supported(name).freeze()
    other = twin(flow)
    y = 0.3 * flow.base_dist.sample((3,))
    for transform in flow.transforms:
        y = transform(y)
    x = jnp.asarray(y.float().numpy())
    assert x.dtype == jnp.float32
    # A matrix rounded to float32 is none of float64, and its density another by as much.
    np.testing.assert_allclose(other.log_prob(x), flow.log_prob(y), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("name", ["plain", "gaussianized", "residual"])
def test_float32(name, twin):
    """Log-densities within 1e-5, values as near to torch's float64 as torch's float32 is."""
    if name == "residual":
        flow = InterpolantDistribution(random_flow(2, (16, 16, 16))).freeze()
    else:
        flow = (plain() if name == "plain" else supported(name)).freeze()
    other = twin(flow)
    w = torch.randn(1000, 2)
    y, z = w, jnp.asarray(w.numpy())
    for ours, theirs in zip(flow.transforms, other.transforms, strict=True):
        y, z = ours(y), theirs(z)
    assert z.dtype == jnp.float32
    error = np.abs(np.asarray(z) - y.numpy()) / (1 + np.abs(y.numpy()))
    assert np.quantile(error, 0.999) <= 1e-5
    # A copy: what was just drawn would be scored along its own path, forward.
    assert_equal(other.log_prob(jnp.asarray(y.numpy())), flow.log_prob(y.clone()), 1e-5)


@pytest.mark.slow
def test_its_own_draws_have_the_moments_of_torchs(twin):
    flow = plain().freeze()
    draws = twin(flow).sample(jax.random.key(0), (4000,))
    expected = flow.sample((4000,))
    error = 5 * expected.std(0) * (2 / 4000) ** 0.5
    assert (torch.tensor(np.asarray(draws)).mean(0) - expected.mean(0)).abs().lt(error).all()


# ---- labels of classes, and named sites given a context -----------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["real", "angles"])
def test_labels_of_classes(kind, twin):
    velocity = (TorusMLP if kind == "angles" else VelocityMLP)(2, (8, 8), classes=3)
    for p in velocity.parameters():
        torch.nn.init.normal_(p, std=0.3)
    options = {"interpolant": Geodesic()} if kind == "angles" else {}
    flow = ConditionalInterpolantDistribution(
        ConditionalInterpolantTransform(velocity, **options),
        support=circular if kind == "angles" else constraints.real_vector,
    ).freeze()
    other, labels = twin(flow), torch.tensor([0, 2, 1, 1])
    given = flow.condition(labels)
    x = given.sample((5,)).clone()  # which no solve is remembered of
    assert_equal(other.condition(labels.numpy()).log_prob(x.numpy()), given.log_prob(x))
    as_numbers = other.condition(labels.double()[:, None].numpy())
    assert_equal(as_numbers.log_prob(x.numpy()), given.log_prob(x))
    with pytest.raises(ValueError, match="labels from 0 to 2"):
        other.condition(np.array([3]))
    unknown = jax.jit(lambda label: other.condition(label).log_prob(x[0, 0].numpy()))
    assert np.isnan(unknown(3))
    assert np.isfinite(unknown(2))


KINDS_OF_LABELS = {"numpy": np.asarray, "jax": jnp.asarray, "list": lambda c: np.array(c).tolist()}


@pytest.mark.parametrize("kind", KINDS_OF_LABELS.values(), ids=KINDS_OF_LABELS)
def test_labels_that_are_known_are_checked_under_jit(kind):
    velocity = VelocityMLP(2, (4,), classes=3)
    flow = ConditionalInterpolantDistribution(ConditionalInterpolantTransform(velocity))
    other = from_torch(flow.freeze())
    for labels in ([[0.0], [2.0]], [0, 2]):
        known, wrong = kind(labels), kind(np.array(labels) + 1)
        found = jax.jit(lambda x, c=known: x + other.condition(c).transform.context)(0.0)
        assert found.ravel().tolist() == [0.0, 2.0]
        with pytest.raises(ValueError, match="labels from 0 to 2"):
            jax.jit(lambda x, c=wrong: x + other.condition(c).transform.context)(0.0)


@pytest.mark.slow
def test_a_mixture_of_flows_with_a_support(twin):
    flow = family(support=constraints.positive).freeze()
    contexts, probs, x = torch.randn(2, 3), torch.tensor([0.3, 0.7]), torch.rand(4, 2)
    expected = dist.MixtureSameFamily(dist.Categorical(probs), flow.condition(contexts))
    parts = twin(flow).condition(contexts.numpy())
    mixture = ndist.MixtureSameFamily(ndist.Categorical(probs.numpy()), parts)
    assert_equal(mixture.log_prob(x.numpy()), expected.log_prob(x))


@pytest.mark.slow
def test_named_sites_given_a_context(twin):
    sites = {"loc": ((), constraints.real), "scale": ((), constraints.positive)}
    transform = random_flow(2, (8, 8), context_dim=3)
    flow = ConditionalJointInterpolantDistribution(transform, sites=sites).freeze()
    other, context = twin(flow), torch.randn(4, 3)
    draws = flow.condition(context).sample_dict((5,))
    given = other.condition(context.numpy())
    packed = given.pack({name: value.numpy() for name, value in draws.items()})
    assert_equal(packed, flow.pack(draws))
    assert_equal(given.log_prob(packed), flow.condition(context).log_prob(flow.pack(draws)))
    again = jax.tree.unflatten(*jax.tree.flatten(other)[::-1])
    assert again.condition(context.numpy()).sites == {"loc": (), "scale": ()}
