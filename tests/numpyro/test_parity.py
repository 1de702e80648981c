"""The same numbers as torch, from the same file."""

import jax
import jax.numpy as jnp
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import BASES, DIVERGENCES, LATENT, SOLVERS, SUPPORTS, random_flow, slow_but
from kinds import (
    angles,
    angular_flow,
    family,
    flow_of,
    gaussianized_joint,
    joint,
    plain,
    supported,
    whitened,
)
from pyro.distributions import constraints
from pyro.distributions import transforms as maps

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    FixedGrid,
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


def assert_equal(found, expected, tolerance=1e-10, name=""):
    found, expected = np.asarray(found), expected.detach().numpy()
    assert found.shape == expected.shape, name
    error = np.abs(found - expected) / (1 + np.abs(expected))
    assert error.max() <= tolerance, (name, error.max())


def assert_same_densities(flow, other, x, name=""):
    """Densities, of which some may be minus infinity."""
    expected = flow.log_prob(x).detach().numpy()
    found = other.log_prob(jnp.asarray(x.numpy()))
    np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=name)
    return expected


def values_of(transforms, x):
    for transform in transforms:
        x = transform(x)
    return x


@jax.jit
def numbers_of(distribution, w, value):
    """Where draws of the base go, the log-densities of values, and their gradients."""
    log_prob, gradients = jax.vjp(distribution.log_prob, value)
    z = values_of(distribution.transforms, w)
    return z, log_prob, gradients(jnp.ones_like(log_prob))[0]


def assert_twins(flow, other, name="", numbers_of=numbers_of):
    """The same draws of the base give the same values, and these the same densities and slopes."""
    w = flow.base_dist.sample((ROWS,))
    y = values_of(flow.transforms, w)
    x = y.detach().clone().requires_grad_()
    log_prob = flow.log_prob(x)
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    found = numbers_of(other, jnp.asarray(w.numpy()), jnp.asarray(x.detach().numpy()))
    for ours, theirs in zip(found, (y, log_prob, gradient), strict=True):
        assert_equal(ours, theirs, name=name)
    assert other.batch_shape == tuple(flow.batch_shape)
    assert other.event_shape == tuple(flow.event_shape)
    return x.detach()


def network(dim, hidden_dims, whitening=None, **choices):
    flow = InterpolantDistribution(random_flow(dim, hidden_dims, **choices))
    flow.transform.flow.velocity.set_scales(0.4 * torch.randn(20, dim))  # the gate is felt
    if whitening is not None:
        flow.transform.flow.whitening = whitened(whitening).transform.flow.whitening
    return flow


# Every kind of network, solver, divergence and whitening once. From nine dimensions on, the
# embedding of time has fewer frequencies.
FLOWS = {
    "one layer": lambda: network(2, (8,), "diagonal", solver=SOLVERS["midpoint"]),
    "two layers": lambda: network(2, (8, 6), solver=SOLVERS["random"]),
    "residual": lambda: network(2, (8, 8, 8), "scalar", solver=SOLVERS["heun"]),
    "deep": lambda: network(1, (5, 5, 7, 7), solver=SOLVERS["warped"]),
    "nine dimensions": lambda: network(9, (8, 8), solver=SOLVERS["euler"]),
    "hutchinson": lambda: network(2, (8, 8), divergence=DIVERGENCES["hutchinson"]),
    "one angle": lambda: angles(1),
    "rows of a simplex": lambda: supported("simplex").expand((2, 3)),
    "matrices": lambda: plain(4, event_shape=(2, 2), support=constraints.positive),
    "tempered": lambda: supported("tempered"),
}


@pytest.mark.parametrize("name", slow_but(FLOWS, "hutchinson"))
def test_flows(name, twin):
    flow = FLOWS[name]().freeze()
    assert_twins(flow, twin(flow))


def test_the_density_at_a_time(twin):
    flow, x = plain().freeze(), torch.rand(ROWS, 2)
    for t in (0.0, 0.4):
        assert_same_densities(flow.at(t), twin(flow).at(t), x)


@pytest.mark.slow
def test_a_base_that_is_a_flow(twin):
    base = plain(base=BASES["laplace"](2))
    flow, x = plain(base=base, support=constraints.positive).freeze(), torch.rand(ROWS, 2)
    assert_same_densities(flow, twin(flow), x)
    assert_same_densities(flow.at(0.5), twin(flow).at(0.5), x)


def test_what_matters_for_training_alone_is_left_alone():
    """Paths, also those that are learned, and the network of the noise."""
    learned = LearnedInterpolant(3, event_dim=2)
    weights = []
    for path in (*LATENT.values(), learned):
        torch.manual_seed(0)
        flow = InterpolantDistribution(random_flow(2, interpolant=path))
        flow.transform.flow.noise = VelocityMLP(2, (4,))
        weights.append(from_torch(flow).transform.weights)
    torch.manual_seed(0)
    expected = from_torch(InterpolantDistribution(random_flow(2))).transform.weights
    assert [found == expected for found in weights] == [True] * len(weights)


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


def test_no_product_is_shortened_by_an_accelerator():
    """By default they would compute float32 in a shorter type."""
    flow = from_torch(family())

    def both(key, context, x):
        given = flow.condition(context)
        return given.sample(key), given.log_prob(x)

    for batch in ((), (ROWS,)):
        context, x = jnp.zeros((*batch, 3)), jnp.zeros((ROWS, 2))
        program = jax.make_jaxpr(both)(jax.random.key(0), context, x)
        found = [product.params["precision"] for product in products(program.jaxpr)]
        assert set(found) == {(jax.lax.Precision.HIGHEST,) * 2}


def test_far_rows(twin):
    flow = plain().freeze()
    flow.transform.flow.velocity.reach.fill_(7.0)
    y = torch.cat([scale * torch.randn(20, 2) for scale in (1.0, 10.0, 100.0)])
    assert_same_densities(flow, twin(flow), y)


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


def test_of_a_path_without_its_density_the_end_alone_is_held(twin):
    """Its 16 stages side by side would be as many times the draws."""
    transform, w = twin(plain(32).freeze()).transform, jnp.zeros((1000, 32))
    for way in (lambda w: transform(w), lambda w: transform._inverse(w)):
        compiled = jax.jit(way).lower(w).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 8 * w.nbytes


# ---- supports -----------------------------------------------------------------------------------

FURTHER = {
    "half_open_interval": constraints.half_open_interval(-1.0, 2.0),
    "greater_than_eq": constraints.greater_than_eq(-0.5),
    "bounds by column": constraints.interval(
        torch.tensor([0.1, -1.0]).double(), torch.tensor([1.0, 5.7]).double()
    ),
    "nested stack": constraints.stack(
        [constraints.greater_than(2.0), constraints.independent(constraints.real, 0)], dim=-1
    ),
    "cat": constraints.cat([constraints.positive, constraints.unit_interval], dim=-1),
    "cat of a vector": constraints.cat(
        [constraints.ordered_vector, constraints.positive], dim=-1, lengths=[2, 1]
    ),
    "cat of a stack": constraints.cat(
        [SUPPORTS["stack"].support, constraints.positive], dim=-1, lengths=[2, 1]
    ),
}
# NumPyro makes matrices of the default type, whatever their numbers are.
ALSO_IN_FLOAT32 = ("simplex", "corr_cholesky", "corr_matrix", "ordered_vector", "cat of a vector")


@pytest.mark.parametrize("dim", slow_but([1, 2, 3], 1))
def test_supports(dim):
    transform = random_flow(dim, (4,), solver=FixedGrid(1))
    supports = {name: case.support for name, case in SUPPORTS.items() if case.dim == dim}
    more = {name: c for name, c in FURTHER.items() if dim == (3 if "cat of" in name else 2)}
    for name, support in {**supports, **more}.items():
        flow = InterpolantDistribution(transform, support=support).freeze()
        other = from_torch(flow)
        x = assert_twins(flow, other, name, numbers_of.__wrapped__)
        value = jnp.asarray(x.numpy())
        assert other.support(value).tolist() == [True] * ROWS, name
        if name not in ALSO_IN_FLOAT32:
            continue
        # A matrix rounded to float32 is none of float64, and its density another by as much.
        y = values_of(flow.transforms[1:], 0.3 * flow.base_dist.sample((3,)))
        found = other.log_prob(jnp.asarray(y.float().numpy()))
        np.testing.assert_allclose(found, flow.log_prob(y), rtol=2e-3, atol=2e-3, err_msg=name)


@pytest.mark.usefixtures("float32")
@pytest.mark.slow
def test_the_edges_of_an_interval():
    """There, and where float32 cannot tell, torch clamps; beyond them is no density."""
    stack = constraints.stack([constraints.unit_interval], dim=-1)
    wide = constraints.independent(constraints.half_open_interval(0.1, 0.7), 1)
    for support, low, high in ((constraints.unit_interval, 0, 1), (wide, 0.1, 0.7), (stack, 0, 1)):
        flow = plain(1, support=support, validate_args=False).freeze()
        y = torch.tensor([low, high, high - 6e-8, low + 1e-30, 0.5, high + 1e-6, low - 1e-6])
        found = from_torch(flow).log_prob(jnp.asarray(y[:, None].numpy()))
        assert_equal(found[:5], flow.log_prob(y[:, None])[:5], 3e-5, support)
        assert (found[5:] == -jnp.inf).all(), support


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
def test_beyond_the_knots_at_the_centre_and_at_knots():
    for name in ("gaussianized", "tempered"):
        flow = supported(name).freeze()
        y = torch.tensor([[0.0, 0.0], [300.0, -2.0], [-0.01, 90.0]])
        assert_same_densities(flow, from_torch(flow), y, name)
    flow = supported("gaussianized").freeze()
    rows = flow.constraint.gaussianizer.knots[0].mT[[0, 3, -1]]
    y = rows.clone().requires_grad_()
    (expected,) = torch.autograd.grad(flow.log_prob(y).sum(), y)
    other = from_torch(flow)
    found = jax.grad(lambda y: other.log_prob(y).sum())(jnp.asarray(rows.numpy()))
    assert_equal(found, expected)


# ---- bases --------------------------------------------------------------------------------------


def bases():
    zero, one = torch.zeros(2), torch.ones(2)
    low, log_normals = torch.tensor([[0.0], [2.0]]), dist.LogNormal(torch.eye(2), 1.0).to_event(1)
    affine = maps.AffineTransform(0.5, one, event_dim=1)
    return {
        "low rank": dist.LowRankMultivariateNormal(one, torch.ones(2, 1), one),
        "pareto": dist.Pareto(one, 2 * one).to_event(1),
        "stretched": dist.TransformedDistribution(dist.Normal(zero, 1.0).to_event(1), [affine]),
        "uniform": dist.Uniform(zero, 1.0).to_event(1),
        "uniform by rows": dist.Uniform(low, low + one).to_event(1),
        "correlated log-normal": dist.TransformedDistribution(
            dist.MultivariateNormal(zero, torch.eye(2) + 0.5), [maps.ExpTransform()]
        ),
        "between": dist.TransformedDistribution(
            dist.Normal(zero, 1.0).to_event(1),
            [maps.SigmoidTransform(), maps.AffineTransform(-1.0, 2.0)],
        ),
        "mixture": dist.MixtureSameFamily(dist.Categorical(one * 0.3), log_normals),
    }


@pytest.mark.slow
def test_bases():
    """Beyond a bounded one there is no density."""
    transform = random_flow(2, (4,), solver=FixedGrid(1))
    for name, base in bases().items():
        flow = InterpolantDistribution(transform, base, validate_args=False).freeze()
        other = from_torch(flow)
        draws = values_of(flow.transforms, base.sample((4,)))
        x = torch.cat((draws.reshape(-1, 2), torch.tensor([[30.0, 30.0], [-30.0, -30.0]])))
        expected = assert_same_densities(flow, other, x[:, None] if base.batch_shape else x, name)
        assert np.isfinite(expected).any(), name
        assert flow.log_prob(draws).isfinite().all(), name
        if name == "uniform":
            slope = jax.grad(lambda v, other=other: other.log_prob(v).sum())(jnp.asarray(draws))
            assert bool(jnp.isfinite(slope).all()), name


# ---- families, named sites, labels of classes ---------------------------------------------------


@pytest.mark.slow
def test_families(twin):
    flow = family(support=constraints.positive).freeze()
    flow.transform.flow.velocity.set_scales(torch.randn(9, 2), 3 * torch.randn(9, 3) + 1)
    other = twin(flow)
    for batch in ((), (3, 1)):
        context = torch.randn(*batch, 3)
        given = other.condition(jnp.asarray(context.numpy()))
        assert given.batch_shape == batch
        assert_twins(flow.condition(context), given)
    context, x = torch.randn(ROWS, 3).requires_grad_(), torch.rand(ROWS, 2)
    (expected,) = torch.autograd.grad(flow.condition(context).log_prob(x).sum(), context)
    known, value = jnp.asarray(context.detach().numpy()), jnp.asarray(x.numpy())
    found = jax.jit(jax.grad(lambda c: other.condition(c).log_prob(value).sum()))(known)
    assert_equal(found, expected)


@pytest.mark.slow
def test_a_family_on_the_torus(twin):
    flow = ConditionalInterpolantDistribution(angular_flow(context_dim=3), support=circular)
    flow.transform.divergence = DIVERGENCES["hutchinson"]
    context = torch.randn(ROWS, 3)
    other = twin(flow.freeze()).condition(jnp.asarray(context.numpy()))
    assert_twins(flow.condition(context), other)


@pytest.mark.slow
@pytest.mark.parametrize("make", [joint, gaussianized_joint])
def test_named_sites(make, twin):
    flow = make().freeze()
    other = twin(flow)
    x = assert_twins(flow, other)
    sites, expected = other.unpack(jnp.asarray(x.numpy())), flow.unpack(x)
    assert list(sites) == list(expected) == list(other.sites)
    for name, value in expected.items():
        assert_equal(sites[name], value)
    assert_equal(other.pack(sites), x)


def test_named_sites_given_a_context(twin):
    sites = {"loc": ((), constraints.real), "scale": ((), constraints.positive)}
    transform = flow_of(context_dim=3)
    flow = ConditionalJointInterpolantDistribution(transform, sites=sites).freeze()
    other, context = twin(flow), torch.randn(4, 3)
    draws = flow.condition(context).sample_dict((5,))
    given = other.condition(context.numpy())
    packed = given.pack({name: value.numpy() for name, value in draws.items()})
    assert_equal(packed, flow.pack(draws))
    assert_equal(given.log_prob(packed), flow.condition(context).log_prob(flow.pack(draws)))
    again = jax.tree.unflatten(*jax.tree.flatten(other)[::-1])
    assert again.condition(context.numpy()).sites == {"loc": (), "scale": ()}


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
    unknown = jax.jit(lambda label: other.condition(label).log_prob(x[0, 0].numpy()))
    assert np.isnan(unknown(3))
    assert np.isfinite(unknown(2))
    for known in (np.array([3]), jnp.array([3.0])[:, None], [3]):
        with pytest.raises(ValueError, match="labels from 0 to 2"):
            jax.jit(lambda x, c=known: x + other.condition(c).transform.context)(0.0)


# ---- float32, and draws of jax ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("name", ["gaussianized", "residual"])
def test_float32(name, twin):
    """Log-densities within 1e-5, values as near to torch's float64 as torch's float32 is."""
    flow = InterpolantDistribution(random_flow(2, (16, 16, 16)))
    flow = (flow if name == "residual" else supported(name)).freeze()
    other = twin(flow)
    w = torch.randn(1000, 2)
    y = values_of(flow.transforms, w)
    z = values_of(other.transforms, jnp.asarray(w.numpy()))
    assert z.dtype == jnp.float32
    error = np.abs(np.asarray(z) - y.numpy()) / (1 + np.abs(y.numpy()))
    assert np.quantile(error, 0.999) <= 1e-5
    # A copy: what was just drawn would be scored along its own path, forward.
    assert_equal(other.log_prob(jnp.asarray(y.numpy())), flow.log_prob(y.clone()), 1e-5)


def test_draws_of_jax_have_the_moments_of_torchs(twin):
    flow = plain().freeze()
    draws = torch.tensor(np.asarray(twin(flow).sample(jax.random.key(0), (4000,))))
    expected = flow.sample((4000,))
    error = 5 * expected.std(0) * (2 / 4000) ** 0.5
    assert (draws.mean(0) - expected.mean(0)).abs().lt(error).all()
    # The standard error of a standard deviation, of draws that are nearly normal.
    error = 5 * expected.std(0) * (1 / 4000) ** 0.5
    assert (draws.std(0) - expected.std(0)).abs().lt(error).all()
