"""Base space: the same joint density, and every handler obeyed inside and outside."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pyro
import pytest
import torch
from kinds import angles, angular_flow, family, joint, plain, supported
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, Predictive, Trace_ELBO, init_to_median, init_to_value
from numpyro.infer.reparam import TransformReparam
from numpyro.infer.util import initialize_model, log_density

import pyro_interpolant as pi
from pyro_interpolant.numpyro import base_space, from_torch
from pyro_interpolant.numpyro.bases import Planar, UniformTorus, directions

KEY = jax.random.key(0)
Z = jnp.array([0.3, -0.2])


@pytest.fixture(scope="module")
def prior(twin):
    torch.manual_seed(0)
    return twin(plain().freeze())


@pytest.fixture
def model(prior):
    def model():
        z = numpyro.sample("z", prior)
        numpyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=1.0)
        return z

    return model


def traced(model, *args):
    return handlers.trace(handlers.seed(model, KEY)).get_trace(*args)


def kinds_of(model, *args):
    return {name: site["type"] for name, site in traced(model, *args).items()}


def test_the_joint_density_is_the_same(prior, model):
    """Up to the volume of the map, which is none of the density in base space."""
    base = base_space(model)
    assert kinds_of(base) == {"z_base": "sample", "z": "deterministic", "y": "sample"}
    x = jnp.array([0.5, -1.0])
    found, trace = log_density(base, (), {}, {"z_base": x})
    z, log_det = prior.transform.call_with_intermediates(x)
    np.testing.assert_allclose(trace["z"]["value"], z, rtol=1e-12)
    likelihood = dist.Normal(z.sum(), 1.0).log_prob(1.0)
    np.testing.assert_allclose(found, prior.base_dist.log_prob(x) + likelihood, rtol=1e-12)
    own = handlers.reparam(model, config={"z": TransformReparam()})
    np.testing.assert_allclose(found, log_density(own, (), {}, {"z_base": x})[0], rtol=1e-12)
    observed = base_space(lambda: numpyro.sample("z", prior, obs=Z))
    assert kinds_of(observed) == {"z": "sample"}


def test_a_scale_inside_weighs_the_density_of_the_site(prior):
    """In plates, which count the Jacobian as they count a guide's site, and under masks."""

    def model(keep):
        with numpyro.plate("rows", 6, subsample_size=2), handlers.scale(scale=0.5):
            with handlers.scale(scale=0.6):
                numpyro.sample("z", prior.mask(keep))

    w = jnp.array([[0.5, -1.0], [0.3, 0.2]])
    _, log_det = prior.transform.call_with_intermediates(w)
    base = handlers.seed(base_space(model), KEY)
    keep = jnp.array([True, False])
    expected = 3 * (0.3 * prior.base_dist.log_prob(w) + 0.7 * log_det)[0]
    found = log_density(base, (keep,), {}, {"z_base": w})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    around = log_density(handlers.scale(base, scale=2.0), (keep,), {}, {"z_base": w})[0]
    np.testing.assert_allclose(around, 2 * expected, rtol=1e-12)


@pytest.mark.slow
def test_a_scale_inside_leaves_the_distances_of_angles_as_they_are():
    prior = pi.InterpolantDistribution(angular_flow(), support=pi.circular).freeze()
    found, w = [], torch.randn(4)
    for s in (1.0, 0.5):

        def model(s=s):
            with handlers.scale(scale=s):
                numpyro.sample("z", from_torch(prior))

        density, trace = log_density(base_space(model), (), {}, {"z_base": jnp.asarray(w.numpy())})
        log_q = prior.log_prob(torch.as_tensor(np.array(trace["z"]["value"])))
        found.append(float(density) - s * float(log_q))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-6)  # the volume, and the distances


@pytest.mark.slow
def test_each_row_of_a_scale_weighs_all_events_of_a_row(prior):
    """The factor is under the scale too, since enumeration takes sites of one scale alone."""
    scale, w = jnp.array([0.5, 1.0, 2.0]), jax.random.normal(KEY, (3, 3, 2))

    def model():
        with handlers.scale(scale=scale):
            numpyro.sample("z", prior.expand([3, 3]).to_event(1))

    _, log_det = prior.transform.call_with_intermediates(w)
    base = prior.base_dist.log_prob(w)
    expected = (scale * base.sum(-1) + (1 - scale) * log_det.sum(-1)).sum()
    density = jax.jit(lambda w: log_density(base_space(model), (), {}, {"z_base": w})[0])
    np.testing.assert_allclose(density(w), expected, rtol=1e-12)
    trace = traced(base_space(model))
    assert trace["z_log_jacobian"]["scale"] is trace["z_base"]["scale"]


@pytest.mark.slow
def test_a_scale_around_another_reparametrisation_is_inside_of_base_space(prior):
    def model():
        numpyro.sample("z", prior)

    w, own = jnp.array([0.5, -1.0]), handlers.reparam(model, config={})
    found, expected = (
        log_density(base_space(handlers.scale(m, 0.5)), (), {}, {"z_base": w})[0]
        for m in (own, model)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_value_that_is_given_stays(model):
    data = {"z": Z}
    for handler in (handlers.condition, handlers.do, handlers.substitute):
        for wrapped in (handler(base_space(model), data), base_space(handler(model, data))):
            trace = traced(wrapped)
            assert "z_base" not in trace
            np.testing.assert_allclose(handlers.seed(wrapped, KEY)(), Z)
            if handler is not handlers.do:
                np.testing.assert_allclose(trace["z"]["value"], Z)
                assert trace["z"]["is_observed"] == (handler is handlers.condition)


def test_a_value_that_is_given_in_other_ways_stays(model):
    """By functions and by traces, and by the name that an enclosing scope gives the site."""
    site = {"type": "sample", "value": Z, "is_observed": False, "infer": {}}

    def by_name(name):
        data = {name: Z}
        return lambda site: data.get(site["name"])

    ways = (
        lambda m, name: handlers.condition(m, {name: Z}),
        lambda m, name: handlers.condition(m, condition_fn=by_name(name)),
        lambda m, name: handlers.substitute(m, {name: Z}),
        lambda m, name: handlers.substitute(m, substitute_fn=by_name(name)),
        lambda m, name: handlers.replay(m, {name: site}),
    )
    base = base_space(model)
    scoped = handlers.scope(base, prefix="s")
    hidden = handlers.scope(base, prefix="s", hide_types=["sample"])
    for i, way in enumerate(ways):
        for wrapped, name in ((base, "z"), (scoped, "s/z"), (hidden, "z")):
            trace = traced(way(wrapped, name))
            assert [key for key in trace if key.endswith("z_base")] == [], i
            np.testing.assert_allclose(trace[name]["value"], Z)


def test_draws_of_the_base_come_before_those_of_the_site(prior, model):
    """In traces, and in functions that give both."""
    base, x = base_space(model), jnp.array([0.5, -1.0])
    trace = traced(handlers.substitute(base, {"z_base": x}))
    z = trace["z"]["value"]
    np.testing.assert_allclose(z, prior.transform(x), rtol=1e-10)
    again = handlers.trace(handlers.seed(handlers.replay(base, trace), jax.random.key(1)))
    np.testing.assert_allclose(again.get_trace()["z"]["value"], z)
    both = {"z": Z, "z_base": x}
    found = traced(handlers.condition(base, condition_fn=lambda site: both.get(site["name"])))
    np.testing.assert_allclose(found["z"]["value"], z)


def test_a_guide_in_data_space(prior, model):
    """Its draws reach the model in base space as they are: the bound is the same."""

    def guide():
        numpyro.sample("z", prior)

    bounds = []
    for inner in (model, base_space(model)):
        svi = SVI(inner, guide, numpyro.optim.Adam(0.1), Trace_ELBO())
        bounds.append(svi.evaluate(svi.init(KEY)))
    np.testing.assert_allclose(*bounds)


@pytest.mark.slow
def test_several_draws_in_one_site(prior):
    def model():
        numpyro.sample("z", prior, sample_shape=(3,))
        with numpyro.plate("n", 2):
            numpyro.sample("rows", prior, sample_shape=(3, 2))

    trace = traced(base_space(model))
    for name, shape in (("z", (3, 2)), ("rows", (3, 2, 2))):
        x, z = trace[f"{name}_base"]["value"], trace[name]["value"]
        assert x.shape == z.shape == shape
        np.testing.assert_allclose(z, prior.transform(x), rtol=1e-10)


def test_uniform_angles_come_from_all_of_the_circle_and_have_gradients_at_its_centre():
    x = UniformTorus(jnp.zeros(2)).sample(KEY, (1000,))
    assert -jnp.pi <= x.min() < -3
    assert 3 < x.max() < jnp.pi
    slopes = jax.grad(lambda w: directions(w).sum())(jnp.zeros(4))
    assert bool(jnp.isfinite(slopes).all())
    base = UniformTorus(jnp.zeros(2, jnp.float32))
    assert base.log_prob(jnp.zeros((3, 2), jnp.float32)).dtype == jnp.float32


@pytest.mark.slow
def test_draws_of_either_name(prior, model):
    """Without ``z_base``, the draws of z themselves are taken, not drawn anew."""
    base = base_space(model)
    x = jax.random.normal(KEY, (3, 2))
    z = prior.transform(x)
    for given in ({"z": z}, {"z_base": x}, {"z": z, "z_base": x}):
        found = Predictive(base, given, return_sites=["z"])(jax.random.key(1))["z"]
        np.testing.assert_allclose(found, z, rtol=1e-10)
    assert Predictive(base, num_samples=2)(KEY)["z"].shape == (2, 2)


@pytest.mark.slow
def test_an_initial_value_in_data_space(prior, model):
    """That of each member of a plate, and on a support."""
    positive = from_torch(supported("positive"))

    def in_plate():
        with numpyro.plate("n", 3):
            numpyro.sample("z", prior)

    def on_support():
        numpyro.sample("z", positive)

    def start(model, strategy=init_to_value, **values):
        strategy = strategy(values=values) if values else strategy
        info = initialize_model(KEY, base_space(model), init_strategy=strategy)
        return info.param_info.z["z_base"]

    np.testing.assert_allclose(prior.transform(start(model, z=Z)), Z, atol=1e-3)
    np.testing.assert_allclose(start(model, z_base=Z), Z)
    np.testing.assert_allclose(prior.transform(start(in_plate, z=Z)), [Z] * 3, atol=1e-3)
    x, z = start(on_support, z=jnp.array([0.5, 2.0])), [0.5, 2.0]
    np.testing.assert_allclose(positive.transforms[-1](positive.transform(x)), z, rtol=1e-3)
    assert float(jnp.abs(start(model, init_to_median)).max()) < 2
    with pytest.raises(ValueError, match=r"to its shape \(3, 2\), got shape \(2, 2\)"):
        start(in_plate, z=jnp.zeros((2, 2)))
    with pytest.raises(ValueError, match="value of site .z. strictly inside its support"):
        start(on_support, z=jnp.array([0.5, -2.0]))


@pytest.mark.slow
def test_plates_events_and_masks(prior):
    def model():
        with numpyro.plate("n", 4), handlers.mask(mask=jnp.arange(4) < 3):
            numpyro.sample("z", prior)
        with numpyro.plate("m", 4, subsample_size=2):
            numpyro.sample("s", prior.mask(jnp.array([True, False])))
        numpyro.sample("w", prior.expand((3,)).to_event(1))

    trace = traced(base_space(model))
    assert trace["z_base"]["value"].shape == trace["z"]["value"].shape == (4, 2)
    assert trace["s_base"]["value"].shape == (2, 2)
    assert trace["w_base"]["fn"].event_shape == (3, 2)
    assert trace["z_base"]["fn"].batch_shape == (4,)
    draws = {k: v["value"] for k, v in trace.items() if k.endswith("_base")}
    found = log_density(handlers.seed(base_space(model), KEY), (), {}, draws)[0]
    normal = {k: dist.Normal().log_prob(v).sum(-1) for k, v in draws.items()}
    expected = normal["z_base"][:3].sum() + 2 * normal["s_base"][0] + normal["w_base"].sum()
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.slow
def test_named_sites(twin):
    prior = twin(joint().freeze())

    def model():
        prior.sample_sites("z")

    trace = traced(base_space(model))
    assert trace["z_base"]["type"] == "sample"
    value = trace["z"]["value"]
    again = Predictive(model, {"z": value[None]})(KEY)
    for name, expected in prior.unpack(value).items():
        np.testing.assert_allclose(trace[name]["value"], expected, rtol=1e-10)
        np.testing.assert_allclose(again[name][0], expected, rtol=1e-10)


@pytest.mark.slow
def test_contexts_from_another_site(twin):
    likelihood = twin(family().freeze())

    def model():
        c = numpyro.sample("c", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        with numpyro.plate("n", 2):
            numpyro.sample("z", likelihood.condition(c))

    trace = traced(base_space(model))
    assert trace["z_base"]["value"].shape == (2, 2)
    expected = likelihood.condition(trace["c"]["value"]).transform(trace["z_base"]["value"])
    np.testing.assert_allclose(trace["z"]["value"], expected, rtol=1e-10)


@pytest.mark.slow
def test_angles_are_sampled_in_the_plane(twin):
    prior = twin(angles().freeze())

    def model():
        numpyro.sample("z", prior)

    trace = traced(base_space(model))
    w = trace["z_base"]["value"]
    assert w.shape == (4,)
    direction = jnp.arctan2(w[2:], w[:2])
    np.testing.assert_allclose(
        prior.transforms[-1](prior.transform(direction)), trace["z"]["value"], rtol=1e-10
    )
    # Normal where the base is uniform.
    found = log_density(base_space(model), (), {}, {"z_base": w})[0]
    np.testing.assert_allclose(found, dist.Normal().log_prob(w).sum(), rtol=1e-10)
    start = init_to_value(values={"z": jnp.array([3.0, -3.0])})
    info = initialize_model(KEY, base_space(model), init_strategy=start)
    x = info.param_info.z["z_base"]
    back = prior.transforms[-1](prior.transform(jnp.arctan2(x[2:], x[:2])))
    np.testing.assert_allclose(back, [3.0, -3.0], atol=1e-2)


@pytest.mark.slow
def test_inside_a_scan(prior):
    """As it is, and in base space around the steps, to which values come one by one."""

    def model(space):
        def step(carry, _):
            z = numpyro.sample("z", prior)
            return carry, z

        return scan(space(step), 0.0, None, length=3)[1]

    z = traced(model, lambda step: step)["z"]["value"]
    found = log_density(model, (lambda step: step,), {}, {"z": z})[0]
    np.testing.assert_allclose(found, prior.log_prob(z).sum(), rtol=1e-8)
    trace = traced(model, base_space)
    w = trace["z_base"]["value"]
    assert w.shape == (3, 2)
    np.testing.assert_allclose(trace["z"]["value"], prior.transform(w))
    found = log_density(model, (base_space,), {}, {"z_base": w})[0]
    np.testing.assert_allclose(found, prior.base_dist.log_prob(w).sum(), rtol=1e-8)
    for handler in (handlers.condition, handlers.substitute):
        given = handlers.seed(handler(model, data={"z": z}), KEY)(base_space)
        np.testing.assert_allclose(given, z)


@pytest.mark.slow
def test_angles_inside_a_scan():
    """In base space around the steps: points of planes, of a base that is not uniform."""
    base = pyro.distributions.VonMises(torch.tensor([0.3, 1.0]), torch.ones(2)).to_event(1)
    prior = from_torch(pi.InterpolantDistribution(angular_flow(), base, support=pi.circular))

    def model():
        def step(carry, _):
            with numpyro.plate("rows", 4):
                return carry, numpyro.sample("z", prior)

        return scan(base_space(step), 0.0, None, length=3)

    w = traced(model)["z_base"]["value"]
    assert w.shape == (3, 4, 4)
    found = log_density(model, (), {}, {"z_base": w})[0]
    np.testing.assert_allclose(found, Planar(prior.base_dist).log_prob(w).sum(), rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mixture", "rows of a base", "shared"])
def test_a_family_inside_a_scan(kind):
    """Contexts of one row, too, in plates of another number than there are steps."""
    shape, rows, base = (1,), 2, None
    if kind == "mixture":
        parts = pyro.distributions.Normal(torch.eye(2), 1.0).to_event(1)
        mixing = pyro.distributions.Categorical(torch.ones(2))
        base = pyro.distributions.MixtureSameFamily(mixing, parts)
    if kind == "rows of a base":
        shape, means = (), torch.arange(4.0).reshape(2, 2)
        base = pyro.distributions.Normal(means, 1.0).to_event(1)
    likelihood = from_torch(family(base=base).freeze())
    contexts = jax.random.normal(KEY, (3, *shape, 3))

    def model():
        def step(carry, context):
            with numpyro.plate("rows", rows):
                z = numpyro.sample("z", likelihood.condition(context))
            return carry, z

        return scan(step, 0.0, contexts)

    trace = traced(model)
    value = trace["z"]["value"]
    assert value.shape == (3, rows, 2)
    found = log_density(model, (), {}, {"z": value})[0]
    known = [
        likelihood.condition(c).log_prob(z).sum() for c, z in zip(contexts, value, strict=True)
    ]
    np.testing.assert_allclose(found, sum(known), rtol=1e-8)
