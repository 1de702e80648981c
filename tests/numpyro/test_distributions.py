"""What NumPyro asserts of its own distributions and transforms, of ours."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pandas
import pyro.distributions as dist
import pytest
import torch
from cases import random_flow, slow_but
from jax import lax
from kinds import angles, angular_flow, family, joint, plain, supported
from numpyro import handlers
from numpyro.infer import Predictive, log_likelihood

import pyro_interpolant as pi
from pyro_interpolant import FixedGrid
from pyro_interpolant.numpyro import (
    InterpolantDistribution,
    InterpolantTransform,
    base_space,
    from_torch,
)
from pyro_interpolant.numpyro.supports import Bijection, StickBreaking, bijection
from pyro_interpolant.numpyro.transforms import RadialTransform

KEY = jax.random.key(0)
C = dist.constraints

# Flows of torch, and the shape of the contexts of a family.
MAKERS = {
    "plain": (plain, None),
    "given rows": (family, (4, 3)),
    "stack": (lambda: supported("stack"), None),
    "tempered": (lambda: supported("tempered"), None),
    "joint": (joint, None),
    "angles": (angles, None),
}


@pytest.fixture(scope="module")
def known():
    """One twin of each kind, made once."""
    made = {}

    def get(name):
        if name not in made:
            torch.manual_seed(0)
            make, context = MAKERS[name]
            other = from_torch(make().freeze())
            made[name] = other if context is None else other.condition(jnp.ones(context) / 3)
        return made[name]

    return get


over_kinds = pytest.mark.parametrize("name", slow_but(MAKERS, "plain"))


@jax.jit
def score(distribution, value):
    return distribution.log_prob(value)


@over_kinds
def test_shapes_and_wrappers(name, known):
    d = known(name)
    batch, event = d.batch_shape, d.event_shape
    draws, inside = jax.jit(lambda d: (draws := d.sample(KEY, (2,)), d.support(draws)))(d)
    assert draws.shape == d.shape((2,)) == (2, *batch, *event)
    assert bool(inside.all())
    each = score(d, draws)
    assert each.shape == (2, *batch)
    expanded = d.expand_by((2,))
    assert expanded.sample(KEY, (3,)).shape == (3, 2, *batch, *event)
    np.testing.assert_allclose(score(expanded, draws), each)
    assert expanded.expand((5, 2, *batch)).batch_shape == (5, 2, *batch)
    whole = expanded.to_event()
    assert whole.event_shape == (2, *batch, *event)
    np.testing.assert_allclose(score(whole, draws), each.sum())
    mask = jnp.arange(2).reshape(2, *[1] * len(batch)) == 0
    np.testing.assert_allclose(score(expanded.mask(mask), draws), jnp.where(mask, each, 0.0))


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
def test_programs(name, known):
    """Through jit, vmap and map; a draw and its density are one solve."""
    d = known(name)
    again = jax.jit(lambda d: d)(d)
    assert type(again) is type(d)
    assert jax.tree.structure(again) == jax.tree.structure(d)
    assert again.transforms == d.transforms
    if not d.batch_shape:  # no weight is a leaf, nor a bound, nor a knot
        assert sum(np.size(leaf) for leaf in jax.tree.leaves(d)) <= 2 * d.transform.event_dim + 3
    values, log_prob = jax.jit(lambda key: d.rsample_and_log_prob(key, (3,)))(KEY)
    expected = score(again, values)
    # From the way there, equal to that from the way back within the solver's error.
    np.testing.assert_allclose(log_prob, expected, atol=2e-2)
    mapped = jax.jit(jax.vmap(lambda x: d.log_prob(x)))(values)
    np.testing.assert_allclose(mapped, expected, rtol=1e-10)
    looped = jax.jit(lambda v: lax.map(d.log_prob, v))(values)
    np.testing.assert_allclose(looped, expected, rtol=1e-10)

    def loops(d):
        def draw(key):
            value, intermediates = d.sample_with_intermediates(key, (3,))
            return value, d.log_prob(value, intermediates) if intermediates else d.log_prob(value)

        return scans(jax.make_jaxpr(draw)(KEY).jaxpr)

    assert loops(d) == loops(d.expand_by((2,))) == loops(d.to_event(len(d.batch_shape))) == 1
    assert loops(d.mask(jnp.ones((), bool))) == 2  # which drops what was computed on the way


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "given rows"])
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
    if name == "plain":
        hessian = jax.jit(jax.hessian(log_prob))(x)
        forward = jax.jit(jax.jacfwd(jax.jacfwd(log_prob)))(x)
        np.testing.assert_allclose(hessian, forward, atol=1e-8)
        np.testing.assert_allclose(hessian, hessian.T, atol=1e-8)


@pytest.mark.slow
def test_the_transform_is_a_bijection():
    """The inverse, and the log-determinant by the Jacobian, where the solver's error is small."""
    flow = plain().freeze()
    flow.transform.solver = FixedGrid(64)
    fine, x = from_torch(flow).transform, jax.random.normal(KEY, (5, 2))
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


# ---- values that are none -----------------------------------------------------------------------


@pytest.mark.slow
def test_values_outside(known):
    d, good = known("stack"), jnp.array([1.0, 0.5])
    values = jnp.stack((good, jnp.array([-1.0, 0.5]), jnp.array([1.0, 1.5]), good * jnp.inf))
    for validate in (True, False):
        checked = InterpolantDistribution(d.base_dist, d.transforms, validate_args=validate)
        found = score(checked, values)  # jitted: no warning
        assert (found > -jnp.inf).tolist() == [True, False, False, False]
        unknown = score(checked, good.at[0].set(jnp.nan))
        assert bool(unknown == -jnp.inf) if validate else bool(jnp.isnan(unknown))
    checked = InterpolantDistribution(d.base_dist, d.transforms, validate_args=True)
    with pytest.warns(UserWarning, match="Out-of-support"):
        checked.log_prob(values)


@pytest.mark.slow
def test_a_row_that_cannot_be_leaves_the_others():
    """Nor one that is infinite in the flow's coordinates alone, or in those of a second flow."""
    flow = plain()
    flow.transform.flow.whitening.set(torch.zeros(2), 0.1 * torch.eye(2))
    d, good = from_torch(flow.freeze()), jnp.array([0.3, -0.2])
    unchecked = InterpolantDistribution(d.base_dist, d.transforms, validate_args=False)
    alone = jax.grad(unchecked.log_prob)(good)
    of_first = jax.jit(jax.grad(lambda v: unchecked.log_prob(v)[0]))
    for far in (jnp.inf, 1e308):
        rows = jnp.stack((good, good.at[0].set(far)))
        np.testing.assert_allclose(of_first(rows)[0], alone, rtol=1e-10)
        assert jnp.isfinite(of_first(rows)).all()
        assert unchecked.log_prob(rows)[1] == -jnp.inf
    first, last = (random_flow(2, (4,), solver=FixedGrid(1)) for _ in range(2))
    base = pi.InterpolantDistribution(first)
    found = from_torch(pi.InterpolantDistribution(last, base, validate_args=False))
    found = found.log_prob(jnp.array([[0.3, -0.2], [jnp.inf, 0.0]]))
    assert (found > -jnp.inf).tolist() == [True, False]


@pytest.mark.slow
def test_whole_numbers_and_no_rows():
    d, whole = from_torch(supported("positive")), jnp.array([[1, 2], [3, 1]])
    np.testing.assert_array_equal(d.log_prob(whole), d.log_prob(whole.astype(float)))
    none_given = from_torch(family()).condition(jnp.zeros((0, 3)))
    for flow, shape in ((d, (4, 0)), (none_given, (0,)), (none_given, ())):
        assert flow.log_prob(jnp.zeros((*shape, 2))).shape == (shape or (0,))


@pytest.mark.usefixtures("float32")
def test_a_simplex_keeps_its_small_shares_in_float32():
    """The second coordinate is log(y_2 / y_3); by 1 - y_1 - y_2 it is 77."""
    share = jnp.array([0.9999603, 3.9696493e-05, 1.9875301e-10])
    expected = np.log([share[0] / share[1:].sum() * 2, share[1] / share[2]])
    (real, log_det), pull = jax.vjp(Bijection('"simplex"').inverse_with_log_det, share)
    np.testing.assert_allclose(real, expected, rtol=1e-6)
    y = torch.tensor(np.asarray(share)).double()
    exact = torch.distributions.biject_to(C.simplex)
    y = y / y.sum()
    np.testing.assert_allclose(log_det, exact.log_abs_det_jacobian(exact.inv(y), y), rtol=1e-6)
    assert np.isfinite(pull((jnp.ones(2), jnp.ones(())))[0]).all()
    site = bijection("simplex")
    np.testing.assert_allclose(site.inv(share), expected, rtol=1e-6)
    np.testing.assert_allclose(site(real), share, rtol=1e-5)
    # Of many shares rounding adds up, and none is lost that the type cannot tell from zero.
    onto = StickBreaking()
    assert bool(ndist.constraints.simplex(onto(jnp.full(1000, -5.0))))
    assert bool((onto(jnp.array([-200.0, 0.0])) > 0).all())
    assert bool(jnp.isfinite(onto.inv(jnp.array([1.0, 0.0, 0.0]))[0]))


def test_rows_of_float32_about_a_far_centre():
    """The centre is not rounded to the type of the rows, which would move it by 3."""
    knots = np.linspace(-2.0, 2.0, 5)[None]
    radial = RadialTransform(np.full(2, 1e8 + 3), 1e3 * np.eye(2), knots, knots, np.ones((1, 5)))
    y = np.array([1e8 + 1024, 1e8 - 512])
    found, log_det = radial.inverse_with_log_det(jnp.asarray(y, jnp.float32))
    assert found.dtype == log_det.dtype == jnp.float32
    np.testing.assert_allclose(found, (y - 1e8 - 3) / 1e3, rtol=1e-5)


def test_flows_are_as_they_were_and_those_of_other_weights_are_others():
    flow, likelihood = from_torch(plain()), from_torch(family())
    assert flow.at(0.5).transform.grid.end == 0.5
    assert flow.transform.grid.end == 1.0
    assert likelihood.condition(jnp.ones(3)).batch_shape == ()
    assert likelihood.transforms[0].context is None
    assert not flow.transform.eq(from_torch(plain()).transform)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda d: d.log_prob(jnp.zeros((2, 1))), r"expected a value of shape \(\*, 2\)"),
        (lambda d: d.transform(jnp.zeros(3)), "expected a last dimension of size 2"),
        (lambda d: d.at(float("nan")), "a time t in"),
    ],
)
def test_refusals(use, message, known):
    with pytest.raises(ValueError, match=message):
        use(known("plain"))


# ---- families -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_contexts_are_mapped_and_families_are_arguments():
    likelihood = from_torch(family().freeze())
    contexts, x = jax.random.normal(KEY, (4, 3)), jnp.ones(2)
    expected = likelihood.condition(contexts).log_prob(x)
    given = jax.jit(lambda flow, c: flow.condition(c).log_prob(x))
    np.testing.assert_allclose(given(likelihood, contexts), expected, rtol=1e-10)
    mapped = jax.jit(jax.vmap(lambda c: likelihood.condition(c).log_prob(x)))(contexts)
    np.testing.assert_allclose(mapped, expected, rtol=1e-10)


def of_labels():
    network = pi.VelocityMLP(2, (8, 8), classes=3)
    return pi.ConditionalInterpolantDistribution(pi.ConditionalInterpolantTransform(network))


def test_kinds_of_contexts():
    """Lists, also under jit, arrays in the type of the flow, and frames by name."""
    flow = family()
    flow.context_columns = ("a", "b", "c")
    twin, c = from_torch(flow), [[0.1, 0.2, 0.3], [1, 2, 3]]
    np.testing.assert_array_equal(twin.condition(c).transform.context, c)
    traced = jax.jit(lambda one: twin.condition([one, c[1]]).transform.context)
    np.testing.assert_array_equal(traced(jnp.array(c[0])), c)
    narrow = from_torch(family().to(torch.float32)).condition(np.ones((2, 3)))
    assert narrow.log_prob(jnp.zeros(2, jnp.float32)).dtype == jnp.float32
    frame = pandas.DataFrame({"a": [0.0, 1.0], "b": [2.0, 3.0], "c": [4.0, 5.0]})
    for other in (twin, jax.tree.unflatten(*jax.tree.flatten(twin)[::-1])):
        for given in (frame, frame[["c", "a", "b"]]):
            context = other.condition(given).transform.context
            np.testing.assert_array_equal(context, frame.to_numpy())
            context = other.condition(given.iloc[1]).transform.context
            np.testing.assert_array_equal(context, frame.to_numpy()[1])
    with pytest.raises(ValueError, match=r"context with the columns \['a', 'b', 'c'\]"):
        twin.condition(frame.rename(columns={"a": "d"}))
    assert from_torch(of_labels()).condition(frame[["a"]].astype(int) * 2).batch_shape == (2,)


@pytest.mark.parametrize(
    ("make", "context", "error", "message"),
    [
        (family, np.ones(2), ValueError, r"expected a context of shape \(\*, 3\)"),
        (family, np.ones(()), ValueError, r"expected a context of shape \(\*, 3\)"),
        (family, np.array([1, 0, 2]), TypeError, r"floating type, got int64 of shape \(3,\)"),
        (of_labels, np.array([3]), ValueError, "labels from 0 to 2"),
    ],
)
def test_contexts_that_are_refused(make, context, error, message):
    with pytest.raises(error, match=message):
        from_torch(make()).condition(context)


# ---- named sites --------------------------------------------------------------------------------


@pytest.mark.slow
def test_named_sites(known):
    d = known("joint")
    draws = d.sample_dict(KEY, (3,))
    assert {k: v.shape[1:] for k, v in draws.items()} == d.sites
    assert bool((draws["scales"] > 0).all())
    np.testing.assert_allclose(draws["weights"].sum(-1), 1.0)
    packed = jax.jit(d.pack)(draws)
    np.testing.assert_allclose(packed, d.sample(KEY, (3,)), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"slope": None}, r"site 'slope' of shape \(\*, \), got none"),
        ({"scales": jnp.ones(3)}, "site 'scales' of shape"),
        ({"scales": -jnp.ones((4, 2))}, "'scales' strictly inside its support"),
        ({"weights": jnp.full((4, 3), 0.5)}, "'weights' strictly inside its support"),
        ({"slope": jnp.ones(2)}, r"one batch shape, got {'slope': \(2,\), 'scales': \(4"),
    ],
)
def test_what_is_no_packing_of_sites(wrong, message):
    draws = {"slope": jnp.ones(4), "scales": jnp.ones((4, 2)), "weights": jnp.full((4, 3), 1 / 3)}
    draws = {name: value for name, value in {**draws, **wrong}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        from_torch(joint()).pack(draws)
    with pytest.raises(ValueError, match=r"shape \(\*, 5\), got \(5, 6\)"):
        from_torch(joint()).unpack(jnp.zeros((5, 6)))


def test_sites_have_the_floating_type_of_the_packed_vector():
    """Whatever type bounds are of, and NumPyro makes matrices in."""
    shares = C.interval(torch.zeros(1), torch.ones(1))
    sites = {"share": ((1,), shares), "factor": ((2, 2), C.corr_cholesky)}
    flow = from_torch(pi.JointInterpolantDistribution(random_flow(2), sites=sites))
    for dtype in (jnp.float32, jnp.float64):
        found = flow.unpack(jnp.zeros((5, 2), dtype))
        assert {name: value.dtype for name, value in found.items()} == dict.fromkeys(sites, dtype)
    draws = {"share": jnp.full((3, 1), 0.5), "factor": jnp.tile(jnp.eye(2), (3, 1, 1))}
    found = jax.jit(lambda x: x + flow.pack(draws))(0.0)  # of known values
    np.testing.assert_allclose(found, jnp.zeros((3, 2)), atol=1e-12)


def test_values_by_name_replace_those_of_sites():
    """In all handlers, as in torch; draws of the packed vector come before those of its sites."""
    d = from_torch(joint())
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
    ):
        trace = handlers.trace(wrapped).get_trace()
        np.testing.assert_array_equal(trace["slope"]["value"], given["slope"])
        np.testing.assert_array_equal(wrapped(), given["slope"])
    for values, expected in ((draws, draws), ({"slope": 1 + draws["slope"], "z": packed}, draws)):
        found = Predictive(model, values)(KEY)
        np.testing.assert_allclose(found["slope"], expected["slope"], rtol=1e-12)
    for hidden in ([], ["sample"], ["deterministic"]):
        model = handlers.scope(solved, prefix="s", hide_types=hidden)
        name = "slope" if "deterministic" in hidden else "s/slope"
        other = "z" if "sample" in hidden else "s/z"
        fixed = handlers.substitute(model, {other: packed[0]})
        fixed = handlers.trace(handlers.do(fixed, {name: given["slope"]})).get_trace()
        np.testing.assert_array_equal(fixed[name]["value"], given["slope"])
        found = Predictive(model, {other: packed, name: 1 + draws["slope"]})(KEY)[name]
        np.testing.assert_array_equal(found, draws["slope"])


def test_without_a_key_the_packed_vector_has_to_be_given():
    d = from_torch(joint())

    def model():
        slope = d.sample_sites("z")["slope"]
        numpyro.sample("y", ndist.Normal(slope.sum(), 1.0), obs=0.0)

    draws = d.unpack(jnp.zeros((3, *d.event_shape)))
    for wrapped in (model, base_space(model)):
        with pytest.raises(ValueError, match=r"values of 'z', the packed vector .* joint\.pack"):
            log_likelihood(wrapped, draws)


# ---- bases, and angles --------------------------------------------------------------------------


@pytest.mark.slow
def test_angles_lead_back_by_any_number_of_turns():
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)),
        dist.VonMises(torch.tensor([[1.0], [-1.0]]), 2.0).to_event(1),
    )
    for base in (mixture, angles(1).freeze().expand((3,))):
        flow = angular_flow(1)
        with torch.no_grad():
            flow.flow.velocity.shifts.bias[-1] = 3.0
        flow = pi.InterpolantDistribution(flow, base, support=pi.circular).freeze()
        x = torch.tensor([[-2.0], [0.5], [3.0]])
        expected = flow.log_prob(x)
        assert bool(expected.isfinite().all())
        found = from_torch(flow).log_prob(jnp.asarray(x.numpy()))
        np.testing.assert_allclose(found, expected, 1e-4)


def test_angles_have_no_bijection(known):
    with pytest.raises(NotImplementedError, match=r"numpyro\.base_space\(model\)"):
        ndist.biject_to(known("angles").support)
