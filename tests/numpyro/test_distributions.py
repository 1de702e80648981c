"""What NumPyro asserts of its own distributions and transforms, of ours."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pandas
import pyro.distributions as dist
import pytest
import torch
from cases import BASES, random_flow, slow_but
from jax import lax
from kinds import angles, angular_flow, family, joint, plain, supported
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import Predictive, log_likelihood

import pyro_interpolant as pi
from pyro_interpolant import FixedGrid
from pyro_interpolant.numpyro import (
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
    InterpolantTransform,
    JointInterpolantDistribution,
    base_space,
    from_torch,
)
from pyro_interpolant.numpyro.bases import base_log_prob
from pyro_interpolant.numpyro.supports import Bijection, OnEvents, StickBreaking, bijection
from pyro_interpolant.numpyro.transforms import RadialTransform

KEY = jax.random.key(0)

# Flows of torch, and the context that makes a distribution of a family.
MAKERS = {
    "plain": (plain, None),
    "given": (family, (3,)),
    "given rows": (family, (4, 3)),
    "simplex": (lambda: supported("simplex"), None),
    "stack": (lambda: supported("stack"), None),
    "tempered": (lambda: supported("tempered"), None),
    "laplace": (lambda: plain(base=BASES["laplace"](2)), None),
    "joint": (joint, None),
    "angles": (angles, None),
}
QUICK = ("plain",)


@pytest.fixture(scope="module")
def known(twin):
    """One twin of each kind, made once."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            make, context = MAKERS[name]
            other = twin(make().freeze())
            made[name] = other if context is None else other.condition(jnp.ones(context) / 3)
        return made[name]

    return get


over_kinds = pytest.mark.parametrize("name", slow_but(MAKERS, *QUICK))


@jax.jit
def score(distribution, value):
    return distribution.log_prob(value)


def draws_and_support(d, shape):
    draws = d.sample(KEY, shape)
    return draws, d.support(draws)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_shapes(name, known):
    d = known(name)
    for shape in ((), (3, 1)):
        draws, inside = jax.jit(partial(draws_and_support, shape=shape))(d)
        assert draws.shape == shape + d.batch_shape + d.event_shape
        assert d.shape(shape) == draws.shape
        assert score(d, draws).shape == shape + d.batch_shape
        assert bool(inside.all())
    assert d.event_dim == len(d.event_shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_expanding(name, known):
    d = known(name)
    value = d.sample(KEY)
    expanded = d.expand_by((2,))
    assert expanded.batch_shape == (2, *d.batch_shape)
    assert expanded.sample(KEY, (3,)).shape == (3, 2, *d.batch_shape, *d.event_shape)
    np.testing.assert_allclose(
        score(expanded, value), jnp.broadcast_to(score(d, value), expanded.batch_shape)
    )
    assert expanded.expand((5, 2, *d.batch_shape)).batch_shape == (5, 2, *d.batch_shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_events_and_masks(name, known):
    d = known(name).expand((2, *known(name).batch_shape))
    value = d.sample(KEY)
    whole = d.to_event()
    assert whole.batch_shape == ()
    assert whole.event_shape == d.batch_shape + d.event_shape
    each = score(d, value)
    np.testing.assert_allclose(score(whole, value), each.sum())
    mask = jnp.arange(2).reshape(2, *[1] * len(known(name).batch_shape)) == 0
    np.testing.assert_allclose(score(d.mask(mask), value), jnp.where(mask, each, 0.0))


@over_kinds
def test_a_pytree(name, known):
    """Through jit, as argument and as result, and through flattening."""
    d = known(name)
    value = d.sample(KEY)
    again = jax.jit(lambda d: d)(d)
    assert type(again) is type(d)
    assert jax.tree.structure(again) == jax.tree.structure(d)
    assert again.batch_shape == d.batch_shape
    np.testing.assert_allclose(score(again, value), score(d, value))
    for one, other in zip(d.transforms, again.transforms, strict=True):
        assert bool(one.eq(other))
        assert one == other
    if not d.batch_shape:  # no weight is a leaf, nor a bound, nor a knot
        assert sum(np.size(leaf) for leaf in jax.tree.leaves(d)) <= 2 * d.transform.event_dim + 3


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_mapping(name, known):
    d = known(name)
    values = jax.jit(lambda: d.sample(KEY, (3,)))()
    mapped = jax.jit(jax.vmap(lambda x: d.log_prob(x)))(values)
    np.testing.assert_allclose(mapped, score(d, values), rtol=1e-10)
    looped = jax.jit(lambda v: lax.map(d.log_prob, v))(values)
    np.testing.assert_allclose(looped, mapped, rtol=1e-10)


@pytest.mark.slow
def test_mapping_over_contexts(twin):
    likelihood = twin(family().freeze())
    contexts, x = jax.random.normal(KEY, (4, 3)), jnp.ones(2)
    mapped = jax.jit(jax.vmap(lambda c: likelihood.condition(c).log_prob(x)))(contexts)
    together = jax.jit(lambda c: likelihood.condition(c).log_prob(x))(contexts)
    np.testing.assert_allclose(mapped, together, rtol=1e-10)


def scans(jaxpr):
    """The number of loops of a program, those of the programs that it calls included."""
    count = 0
    for equation in jaxpr.eqns:
        count += equation.primitive.name == "scan"
        for part in jax.tree.leaves(list(equation.params.values())):
            inner = getattr(part, "jaxpr", part)
            count += scans(inner) if hasattr(inner, "eqns") else 0
    return count


@over_kinds
def test_a_draw_and_its_density_are_one_solve(name, known):
    """Two at most, under a mask, which drops what was computed on the way."""
    d = known(name)

    def loops(draw):
        return scans(jax.make_jaxpr(draw)(KEY).jaxpr)

    def both(d):
        def draw(key):
            value, intermediates = d.sample_with_intermediates(key, (3,))
            return value, d.log_prob(value, intermediates) if intermediates else d.log_prob(value)

        return draw

    assert loops(both(d)) == loops(both(d.expand_by((2,)))) == 1
    assert loops(both(d.to_event(len(d.batch_shape)))) == 1
    assert loops(both(d.mask(jnp.ones((), bool)))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_the_density_of_a_draw(name, known):
    """From the way there, equal to that from the way back within the solver's error."""
    d = known(name)
    value, log_prob = jax.jit(lambda key: d.rsample_and_log_prob(key, (3,)))(KEY)
    np.testing.assert_allclose(log_prob, score(d, value), atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", MAKERS)
def test_gradients_by_differences(name, known):
    d = known(name)
    x = d.base_dist.sample(KEY)  # real vectors

    def log_prob(x):
        for transform in d.transforms:
            x = transform(x)
        return d.log_prob(x).sum()

    gradient, value_at = jax.jit(jax.grad(log_prob))(x), jax.jit(log_prob)
    x, step = np.asarray(x), 1e-6
    for i in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[i] = step
        slope = (value_at(x + moved) - value_at(x - moved)) / (2 * step)
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_second_derivatives(known):
    d, x = known("plain"), jnp.array([0.3, -0.2])
    hessian = jax.jit(jax.hessian(d.log_prob))(x)
    forward = jax.jit(jax.jacfwd(jax.jacfwd(d.log_prob)))(x)
    np.testing.assert_allclose(hessian, forward, atol=1e-8)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-8)


@pytest.fixture(scope="module")
def fine(twin):
    """A flow whose solver's error is small."""
    torch.manual_seed(0)
    flow = plain().freeze()
    flow.transform.solver = FixedGrid(64)
    return twin(flow).transform


@pytest.mark.slow
def test_the_transform_is_a_bijection(fine):
    """The inverse, and the log-determinant by the Jacobian."""
    x = jax.random.normal(KEY, (5, 2))
    y, log_det = fine.call_with_intermediates(x)
    again, back = fine.inverse_with_log_det(y)
    np.testing.assert_allclose(again, x, atol=1e-6)
    np.testing.assert_allclose(back, log_det, atol=1e-5)
    jacobian = jax.vmap(jax.jacfwd(fine))(x)
    np.testing.assert_allclose(jnp.linalg.slogdet(jacobian)[1], log_det, atol=1e-5)
    np.testing.assert_allclose(fine.inv.log_abs_det_jacobian(y, x), -log_det, atol=1e-5)
    assert fine.forward_shape((5, 2)) == fine.inverse_shape((5, 2)) == (5, 2)


@pytest.mark.slow
def test_weights_that_are_trained_are_leaves(known):
    d = known("plain")
    weights = {name: jnp.asarray(value) for name, value in d.transform.weights.items()}
    x = jnp.array([[0.3, -0.2]])

    traces = []

    def loss(weights):
        traces.append(weights)
        transform = InterpolantTransform(weights, d.transform.grid)
        return InterpolantDistribution(d.base_dist, [transform]).log_prob(x).sum()

    both = jax.jit(jax.value_and_grad(loss))
    value, slopes = both(weights)
    both({name: 1.1 * value for name, value in weights.items()})  # those of a second file
    assert len(traces) == 1
    np.testing.assert_allclose(value, score(d, x).sum(), rtol=1e-12)
    # As in torch: buffers stay, by which the whitening and its log-determinant are of one map.
    velocity = random_flow(2).flow.velocity
    trained = {f"velocity.{name}" for name, _ in velocity.named_parameters()}
    assert {name for name, slope in slopes.items() if slope.any()} == trained
    assert len(jax.tree.leaves(InterpolantTransform(weights, d.transform.grid))) == len(weights)


# ---- values that are none -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("validate", [True, False])
def test_values_outside(validate, known):
    d = known("stack")
    checked = InterpolantDistribution(d.base_dist, d.transforms, validate_args=validate)
    good = jnp.array([1.0, 0.5])
    values = jnp.stack((good, jnp.array([-1.0, 0.5]), jnp.array([1.0, 1.5]), good * jnp.inf))
    found = score(checked, values)  # jitted: no warning
    assert np.isfinite(found[0])
    assert (found[1:] == -jnp.inf).all()
    unknown = score(checked, good.at[0].set(jnp.nan))
    assert bool(unknown == -jnp.inf) if validate else bool(jnp.isnan(unknown))
    if validate:
        with pytest.warns(UserWarning, match="Out-of-support"):
            checked.log_prob(values)


@pytest.mark.slow
def test_whole_numbers_are_as_exact_as_others(twin):
    d = twin(supported("positive").freeze())
    whole = jnp.array([[1, 2], [3, 1]])
    np.testing.assert_array_equal(score(d, whole), score(d, whole.astype(float)))


@pytest.mark.slow
@pytest.mark.parametrize("far", [jnp.inf, 1e308])
def test_a_row_that_cannot_be_leaves_the_others(far):
    """Nor one that is infinite in the flow's coordinates alone."""
    flow = plain()
    flow.transform.flow.whitening.set(torch.zeros(2), 0.1 * torch.eye(2))
    d, good = from_torch(flow.freeze()), jnp.array([0.3, -0.2])
    rows = jnp.stack((good, good.at[0].set(far)))
    unchecked = InterpolantDistribution(d.base_dist, d.transforms, validate_args=False)
    gradient = jax.jit(jax.grad(lambda v: unchecked.log_prob(v)[0]))(rows)
    alone = jax.jit(jax.grad(unchecked.log_prob))(good)
    np.testing.assert_allclose(gradient[0], alone, rtol=1e-10)
    assert jnp.isfinite(gradient).all()
    assert unchecked.log_prob(rows)[1] == -jnp.inf


@pytest.mark.parametrize("shape", [(), (3,), (2, 1)])
def test_values_of_a_wrong_shape(shape, known):
    with pytest.raises(ValueError, match=r"expected a value of shape \(\*, 2\)"):
        known("plain").log_prob(jnp.zeros(shape))
    with pytest.raises(ValueError, match="expected a last dimension of size 2"):
        known("plain").transform(jnp.zeros(shape))


def test_flows_with_a_support_are_mixed():
    parts = from_torch(plain(support=dist.constraints.positive)).expand((3,))
    mixture = ndist.MixtureSameFamily(ndist.Categorical(logits=jnp.zeros(3)), parts)
    assert mixture.support == parts.support


def test_a_simplex_keeps_its_small_shares_in_float32(float32):
    """The second coordinate is log(y_2 / y_3); by 1 - y_1 - y_2 it is 77."""
    share = jnp.array([0.9999603, 3.9696493e-05, 1.9875301e-10])
    expected = np.log([share[0] / share[1:].sum() * 2, share[1] / share[2]])
    (real, log_det), pull = jax.vjp(Bijection('"simplex"').inverse_with_log_det, share)
    np.testing.assert_allclose(real, expected, rtol=1e-6)
    y = torch.tensor(np.asarray(share)).double()
    exact = torch.distributions.biject_to(dist.constraints.simplex)
    y = y / y.sum()
    np.testing.assert_allclose(log_det, exact.log_abs_det_jacobian(exact.inv(y), y), rtol=1e-6)
    assert np.isfinite(pull((jnp.ones(2), jnp.ones(())))[0]).all()
    site = bijection("simplex")
    np.testing.assert_allclose(site.inv(share), expected, rtol=1e-6)
    np.testing.assert_allclose(site(real), share, rtol=1e-5)


@pytest.mark.slow
def test_the_shares_of_a_simplex_add_up_and_none_is_lost(float32):
    """Of many, where rounding adds up; and of those that the type cannot tell from zero."""
    onto = StickBreaking()
    assert bool(ndist.constraints.simplex(onto(jnp.full(1000, -5.0))))
    assert bool((onto(jnp.array([-200.0, 0.0])) > 0).all())
    assert bool(jnp.isfinite(onto.inv(jnp.array([1.0, 0.0, 0.0]))[0]))


def test_supports_are_told_apart_and_have_values():
    one, other = OnEvents('"positive"'), OnEvents('"unit_interval"')
    assert one == OnEvents('"positive"')
    assert one != other
    for support in (one, other):
        value = support.feasible_like(jnp.zeros((3, 2), jnp.float32))
        assert value.shape == (3, 2)
        assert value.dtype == jnp.float32
        assert bool(support(value).all())


@pytest.mark.slow
def test_rows_of_float32_about_a_far_centre():
    """The centre is not rounded to the type of the rows, which would move it by 3."""
    knots = np.linspace(-2.0, 2.0, 5)[None]
    radial = RadialTransform(np.full(2, 1e8 + 3), 1e3 * np.eye(2), knots, knots, np.ones((1, 5)))
    y = np.array([1e8 + 1024, 1e8 - 512])
    found, log_det = radial.inverse_with_log_det(jnp.asarray(y, jnp.float32))
    assert found.dtype == log_det.dtype == jnp.float32
    np.testing.assert_allclose(found, (y - 1e8 - 3) / 1e3, rtol=1e-5)


def test_flows_are_as_they_were_after_a_time_or_a_context():
    flow, likelihood = from_torch(plain()), from_torch(family())
    assert flow.at(0.5).transform.grid.end == 0.5
    assert flow.transform.grid.end == 1.0
    assert likelihood.condition(jnp.ones(3)).batch_shape == ()
    assert likelihood.transforms[0].context is None


def test_flows_of_other_weights_are_others():
    one, other = from_torch(plain()).transform, from_torch(plain()).transform
    assert not one.eq(other, static=True)
    assert not one.eq(other)
    assert one.eq(InterpolantTransform(one.weights, one.grid), static=True)


@pytest.mark.slow
def test_a_row_that_the_last_of_two_flows_cannot_take_has_no_density():
    first, last = (random_flow(2, (4,), solver=FixedGrid(1)) for _ in range(2))
    base = pi.InterpolantDistribution(first)
    flow = from_torch(pi.InterpolantDistribution(last, base, validate_args=False))
    found = flow.log_prob(jnp.array([[0.3, -0.2], [jnp.inf, 0.0]]))
    assert (found > -jnp.inf).tolist() == [True, False]


@pytest.mark.slow
def test_contexts_are_taken_in_the_type_of_the_flow():
    flow = random_flow(2, (4,), context_dim=3, solver=FixedGrid(1)).to(torch.float32)
    given = from_torch(pi.ConditionalInterpolantDistribution(flow)).condition(np.ones((2, 3)))
    assert given.log_prob(jnp.zeros(2, jnp.float32)).dtype == jnp.float32


def test_contexts_in_frames_are_taken_by_name():
    flow = family()
    flow.context_columns = ("a", "b", "c")
    twin = from_torch(flow)
    frame = pandas.DataFrame({"a": [0.0, 1.0], "b": [2.0, 3.0], "c": [4.0, 5.0]})
    again = jax.tree.unflatten(*jax.tree.flatten(twin)[::-1])
    for other in (twin, again):
        for given in (frame, frame[["c", "a", "b"]]):
            context = other.condition(given).transform.context
            np.testing.assert_array_equal(context, frame.to_numpy())
            context = other.condition(given.iloc[1]).transform.context
            np.testing.assert_array_equal(context, frame.to_numpy()[1])
    with pytest.raises(ValueError, match=r"context with the columns \['a', 'b', 'c'\]"):
        twin.condition(frame.rename(columns={"a": "d"}))
    del twin.context_columns  # as of an older pickle
    jax.tree.leaves(twin)


def test_labels_in_frames_and_whole_numbers():
    network = pi.VelocityMLP(2, (8, 8), classes=3)
    labels = from_torch(
        pi.ConditionalInterpolantDistribution(pi.ConditionalInterpolantTransform(network))
    )
    frame = pandas.DataFrame({"kind": [0, 2]})
    assert labels.condition(frame).batch_shape == (2,)
    with pytest.raises(TypeError, match=r"floating type, got int64 of shape \(2, 1\): convert"):
        from_torch(family(1)).condition(frame)
    with pytest.raises(TypeError, match=r"floating type, got int64 of shape \(3,\): convert"):
        from_torch(family()).condition(jnp.array([1, 0, 2]))


def test_sites_of_known_values_are_packed_under_jit():
    sites = {"a": ((), dist.constraints.real), "b": ((1,), dist.constraints.real)}
    flow = pi.JointInterpolantDistribution(random_flow(2), sites=sites)
    draws = {"a": jnp.ones(3), "b": jnp.zeros((3, 1))}
    found = jax.jit(lambda x: x + from_torch(flow).pack(draws))(0.0)
    np.testing.assert_allclose(found, [[1.0, 0.0]] * 3)


def test_sites_have_the_floating_type_of_the_packed_vector():
    """Whatever type bounds are of, and NumPyro makes matrices in."""
    shares = dist.constraints.interval(torch.zeros(1), torch.ones(1))
    sites = {"share": ((1,), shares), "factor": ((2, 2), dist.constraints.corr_cholesky)}
    flow = from_torch(pi.JointInterpolantDistribution(random_flow(2), sites=sites))
    for dtype in (jnp.float32, jnp.float64):
        found = flow.unpack(jnp.zeros((5, 2), dtype))
        assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(sites, dtype)


def test_what_is_no_packing_of_sites_is_refused():
    sites = {"weights": ((3,), dist.constraints.simplex), "slope": ((), dist.constraints.real)}
    flow = from_torch(pi.JointInterpolantDistribution(random_flow(3), sites=sites))
    draws = {"weights": jnp.full((4, 3), 1 / 3), "slope": jnp.ones(4)}
    assert flow.pack(draws).shape == (4, 3)
    with pytest.raises(ValueError, match="'weights' strictly inside its support"):
        flow.pack({**draws, "weights": jnp.full((4, 3), 0.5)})
    with pytest.raises(ValueError, match=r"one batch shape, got {'weights': \(4,\), 'slope': \(2"):
        flow.pack({**draws, "slope": jnp.ones(2)})
    for size in (2, 4):
        with pytest.raises(ValueError, match=rf"shape \(\*, 3\), got \(5, {size}\)"):
            flow.unpack(jnp.zeros((5, size)))


def test_no_rows_have_no_densities(known):
    none_given = from_torch(family()).condition(jnp.zeros((0, 3)))
    for flow, shape in ((known("plain"), (4, 0)), (none_given, (0,)), (none_given, ())):
        expected = shape or (0,)
        assert flow.log_prob(jnp.zeros((*shape, 2))).shape == expected


def test_what_has_no_closed_form_says_so(known):
    d = known("plain")
    for wanted in (lambda: d.mean, lambda: d.variance, d.entropy):
        with pytest.raises(NotImplementedError):
            wanted()
    with pytest.raises(NotImplementedError, match="shapes from a flow"):
        InterpolantDistribution.infer_shapes()


@pytest.mark.slow
def test_angles_have_no_bijection(known):
    d = known("angles")
    with pytest.raises(NotImplementedError, match=r"numpyro\.base_space\(model\)"):
        ndist.biject_to(d.support)
    whole = 2 * np.pi * jnp.array([1.0, -2.0])
    unchecked = InterpolantDistribution(d.base_dist, d.transforms, validate_args=False)
    x = jnp.array([0.4, -1.0])
    np.testing.assert_allclose(unchecked.log_prob(x + whole), unchecked.log_prob(x), rtol=1e-10)


# ---- families and named sites -------------------------------------------------------------------


@pytest.mark.slow
def test_a_family_is_an_argument(twin):
    likelihood = twin(family().freeze())

    @jax.jit
    def given(likelihood, context, x):
        return likelihood.condition(context).log_prob(x)

    context, x = jnp.ones(3), jnp.ones(2)
    assert isinstance(likelihood, ConditionalInterpolantDistribution)
    np.testing.assert_allclose(
        given(likelihood, context, x), likelihood.condition(context).log_prob(x), rtol=1e-10
    )
    assert likelihood.condition(jnp.ones((1, 1, 3))).batch_shape == (1, 1)
    with pytest.raises(ValueError, match="expected a context: a conditional flow has"):
        likelihood.transforms[0](x)


@pytest.mark.slow
def test_named_sites(known):
    d = known("joint")
    assert isinstance(d, JointInterpolantDistribution)
    draws = d.sample_dict(KEY, (3,))
    assert {k: v.shape[1:] for k, v in draws.items()} == d.sites
    assert bool((draws["scales"] > 0).all())
    np.testing.assert_allclose(draws["weights"].sum(-1), 1.0)
    packed = d.pack(draws)
    np.testing.assert_allclose(packed, d.sample(KEY, (3,)), rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match=r"site 'slope' of shape \(\*, \), got none"):
        d.pack({})
    with pytest.raises(ValueError, match="site 'scales' of shape"):
        d.pack({**draws, "scales": jnp.ones(3)})
    with pytest.raises(ValueError, match="'scales' strictly inside its support"):
        d.pack({**draws, "scales": -draws["scales"]})
    jax.jit(d.pack)(draws)


@pytest.mark.slow
def test_values_by_name_replace_those_of_sites(known):
    """In all handlers, as in torch; draws of the packed vector come before those of its sites."""
    d = known("joint")
    packed = jax.random.normal(KEY, (3, *d.event_shape))
    draws, given = d.unpack(packed), {"slope": jnp.full(d.sites["slope"], 0.3)}

    def solved():
        return d.sample_sites("z")["slope"]

    model = handlers.substitute(solved, {"z": packed[0]})  # without a solve
    for wrapped in (
        handlers.condition(model, given),
        handlers.condition(model, condition_fn=lambda site: given.get(site["name"])),
        handlers.do(model, given),
        handlers.substitute(model, given),
        handlers.do(handlers.scope(model, prefix="s"), {"s/slope": given["slope"]}),
    ):
        trace = handlers.trace(wrapped).get_trace()
        found = trace["s/slope" if "s/slope" in trace else "slope"]["value"]
        np.testing.assert_array_equal(found, given["slope"])
        np.testing.assert_array_equal(wrapped(), given["slope"])
    for values, expected in ((draws, draws), ({"slope": 1 + draws["slope"], "z": packed}, draws)):
        found = Predictive(model, values)(KEY)
        np.testing.assert_allclose(found["slope"], expected["slope"], rtol=1e-12)


@pytest.mark.parametrize("hidden", [[], ["sample"], ["deterministic"]])
def test_values_by_name_in_a_scope_that_hides_types(hidden):
    d = from_torch(joint())
    packed = jnp.zeros((3, *d.event_shape))
    model = handlers.scope(lambda: d.sample_sites("z")["slope"], prefix="s", hide_types=hidden)
    name = "slope" if "deterministic" in hidden else "s/slope"
    other = "z" if "sample" in hidden else "s/z"
    given = jnp.full((3, *d.sites["slope"]), 0.3)
    fixed = handlers.do(handlers.substitute(model, {other: packed[0]}), {name: given[0]})
    np.testing.assert_array_equal(handlers.trace(fixed).get_trace()[name]["value"], given[0])
    # Draws of the packed vector come before those of its sites.
    found = Predictive(model, {other: packed, name: given})(KEY)[name]
    np.testing.assert_array_equal(found, d.unpack(packed)["slope"])


@pytest.mark.parametrize("around", [lambda model: model, base_space])
def test_without_a_key_the_packed_vector_has_to_be_given(around):
    d = from_torch(joint())
    packed = jnp.zeros((3, *d.event_shape))

    def model():
        slope = d.sample_sites("z")["slope"]
        numpyro.sample("y", ndist.Normal(slope.sum(), 1.0), obs=0.0)

    draws = d.unpack(packed)
    with pytest.raises(ValueError, match=r"values of 'z', the packed vector .* joint\.pack"):
        log_likelihood(around(model), draws)
    with pytest.raises(ValueError, match="packed vector"):
        handlers.trace(model).get_trace()


@pytest.mark.slow
def test_values_by_name_are_not_seen_inside_blocks(known):
    """As by NumPyro's own handlers; each step of a scan is inside one."""
    d, packed = known("joint"), jnp.zeros((3, 5))

    def model():
        return scan(lambda c, _: (c, d.sample_sites("z")["slope"]), 0.0, None, length=3)[1]

    expected, given = d.unpack(packed)["slope"], {"slope": jnp.arange(3.0), "z": packed}
    for handler in (handlers.condition, handlers.substitute):
        found = handlers.seed(handler(model, given), KEY)()
        np.testing.assert_array_equal(found, expected)
    hidden = handlers.block(lambda: d.sample_sites("z")["slope"], hide=["slope"])
    found = handlers.do(handlers.substitute(hidden, {"z": packed[0]}), {"slope": 3.0})()
    assert found == expected[0]


BOUNDED = {
    "uniform": lambda: dist.Uniform(torch.zeros(2), 1.0).to_event(1),
    "exponential": lambda: dist.Exponential(torch.ones(2)).to_event(1),
    "half-normal": lambda: dist.HalfNormal(torch.ones(2)).to_event(1),
    "log-normal": lambda: dist.LogNormal(torch.zeros(2), 1.0).to_event(1),
    "correlated log-normal": lambda: dist.TransformedDistribution(
        dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1.0, 0.5], [0.5, 1.0]])),
        [dist.transforms.ExpTransform()],
    ),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.LogNormal(torch.eye(2), 1.0).to_event(1)
    ),
}


def images():
    normal, affine = ndist.Normal(jnp.zeros(2), 1.0), ndist.transforms.AffineTransform
    exp, sigmoid = ndist.transforms.ExpTransform(), ndist.transforms.SigmoidTransform()
    between = [ndist.transforms.ComposeTransform([sigmoid, affine(-1.0, 2.0)])]
    exponential = ndist.TransformedDistribution(normal, [exp]).to_event(1)
    return {
        "below": ndist.TransformedDistribution(normal, [exp, affine(1.0, -2.0)]).to_event(1),
        "between": ndist.TransformedDistribution(normal, between).to_event(1).expand((3,)),
        "above": ndist.TransformedDistribution(exponential, [affine(1.0, 2.0)]),
    }


@pytest.mark.parametrize("name", slow_but(images(), "above"))
def test_behind_several_transforms_a_base_has_a_density_where_its_draws_are(name):
    base = images()[name]
    x = jnp.array([[-5.0, -0.5], [0.2, -0.5], [0.2, 2.0], [2.0, 3.0]])
    x = x[:, None] if base.batch_shape else x
    low, high = {"below": (-np.inf, 1), "between": (-1, 1), "above": (1, np.inf)}[name]
    within = jnp.broadcast_to(((x > low) & (x < high)).all(-1), (len(x), *base.batch_shape))
    found, pull = jax.vjp(lambda v: base_log_prob(base, v), x)
    np.testing.assert_array_equal(jnp.isfinite(found), within)
    np.testing.assert_array_equal(found == -np.inf, ~within)
    assert bool(jnp.isfinite(pull(within.astype(float))[0]).all())
    draws = base.sample(KEY, (5,))
    np.testing.assert_allclose(base_log_prob(base, draws), base.log_prob(draws), rtol=1e-12)


@pytest.mark.parametrize("name", slow_but(BOUNDED, "log-normal"))
def test_beyond_a_bounded_base_there_is_no_density(name):
    base = BOUNDED[name]()
    flow = pi.InterpolantDistribution(random_flow(2).to(torch.zeros(2)), base).freeze()
    twin = from_torch(flow)
    x = torch.tensor([[0.5, 0.3], [30.0, 30.0], [-30.0, -30.0]])
    expected = flow.log_prob(x)
    assert expected[-1] == -float("inf")
    np.testing.assert_allclose(twin.log_prob(jnp.asarray(x.numpy())), expected, rtol=1e-4)
    assert bool(jnp.isfinite(jax.grad(lambda v: twin.log_prob(v))(jnp.asarray([0.5, 0.3]))).all())


ANGLES = {
    "von Mises": lambda: dist.VonMises(torch.ones(1), 2.0, validate_args=False).to_event(1),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)),
        dist.VonMises(torch.tensor([[1.0], [-1.0]]), 2.0).to_event(1),
    ),
    "flow": lambda: angles(1).freeze(),
    "flows": lambda: angles(1).freeze().expand((3,)),
}


@pytest.mark.parametrize("name", slow_but(ANGLES, "flow", "flows"))
def test_angles_lead_back_by_any_number_of_turns(name):
    base = ANGLES[name]()
    flow = angular_flow(1)
    with torch.no_grad():
        flow.flow.velocity.shifts.bias[-1] = 3.0
    flow = pi.InterpolantDistribution(flow, base, support=pi.circular).freeze()
    x = torch.tensor([[-2.0], [0.5], [3.0]])
    expected = flow.log_prob(x)
    assert bool(expected.isfinite().all())
    np.testing.assert_allclose(from_torch(flow).log_prob(jnp.asarray(x.numpy())), expected, 1e-4)


@pytest.mark.slow
def test_a_base_with_a_batch_of_bounds():
    low = torch.arange(3.0)[:, None].expand(3, 2)
    base = dist.Uniform(low, low + 1).to_event(1)
    flow = pi.InterpolantDistribution(random_flow(2).to(low), base).freeze()
    x = torch.full((2,), 0.5)
    found = from_torch(flow).log_prob(jnp.asarray(x.numpy()))
    np.testing.assert_allclose(found, flow.log_prob(x), rtol=1e-4)
