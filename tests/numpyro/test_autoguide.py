"""A guide of a NumPyro model: the density that torch trains on, and what comes back."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import torch
from cases import slow_but
from kinds import plain
from numpyro import handlers, infer
from numpyro.contrib.control_flow import cond, scan
from numpyro.distributions.transforms import SigmoidTransform
from numpyro.infer.reparam import CircularReparam, NeuTraReparam

from pyro_interpolant import AutoInterpolant as TorchGuide
from pyro_interpolant import FixedGrid, interpolant_transform
from pyro_interpolant import InterpolantDistribution as TorchDistribution
from pyro_interpolant.infer.importance_sampling import importance_verdict
from pyro_interpolant.numpyro import (
    AutoInterpolant,
    ImportanceResult,
    fit_guide,
    from_torch,
    importance,
    neutra,
)
from pyro_interpolant.numpyro import autoguide as module
from pyro_interpolant.numpyro.importance_sampling import _weighed
from pyro_interpolant.numpyro.log_density import check_random_numbers
from pyro_interpolant.training.clock import Clock

KEY = jax.random.key(0)
SEEDED = {"seed": 0, "progress": False}
SEEN = np.array([True, False])
LATENT = "auto_shared_latent"


def line(x, y=None):
    """Conjugate, but for the scale."""
    slope = numpyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.2))
    offsets = numpyro.sample("offsets", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(slope * x + offsets.sum(), scale), obs=y)


def conjugate(y):
    x = numpyro.sample("x", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)


def by_rows(y):
    with numpyro.plate("rows", len(y)):
        x = numpyro.sample("x", dist.Normal())
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def in_plate(y):
    with numpyro.plate("rows", 3):
        x = numpyro.sample("x", dist.Gamma(3.0, 1.0))
        numpyro.sample("y", dist.Normal(jnp.log(x), 0.5), obs=y)


def prepared(model, *args, **options):
    guide = AutoInterpolant(model, **options)
    with handlers.seed(rng_seed=KEY):
        guide._setup_prototype(*args)
    return guide


def known_guide(model, *args, scale=0.6, **options):
    """A guide that is a Gaussian of given moments, and these."""
    guide = prepared(model, *args, **options)
    transform = interpolant_transform(guide.latent_dim, (8, 8), solver=FixedGrid(steps=2))
    loc, linear = torch.linspace(0.5, 1.0, guide.latent_dim), scale * torch.eye(guide.latent_dim)
    transform.flow.whitening.set(loc, linear)
    guide.posterior = from_torch(TorchDistribution(transform).freeze())
    return guide, loc.numpy(), linear.numpy()


# ---- the density, draws of the prior ------------------------------------------------------------


@pytest.mark.slow
def test_the_density_that_torch_sees(monkeypatch):
    """Its slopes, and theirs; in blocks that are padded to the next size, or split."""
    monkeypatch.setattr(module, "_BLOCKS", (2, 4))
    at = jnp.linspace(-1, 1, 10)
    y = 0.7 * at + 0.3
    guide = prepared(line, at, y)
    density = module._for_torch(module.log_density(guide, (at, y), {}))
    z = torch.randn(5, 4, requires_grad=True)
    values = density(z)
    (slopes,) = torch.autograd.grad((values * torch.arange(5.0)).sum(), z)

    @jax.jit
    def expected(z):
        slope, log_scale, offsets = z[0], z[1], z[2:]
        prior = dist.Normal().log_prob(z[jnp.array([0, 2, 3])]).sum()
        prior += dist.Normal(0.0, 0.2).log_prob(log_scale)
        return (
            prior + dist.Normal(slope * at + offsets.sum(), jnp.exp(log_scale)).log_prob(y).sum()
        )

    assert list(guide._init_locs) == ["slope", "scale", "offsets"]
    rows = jnp.asarray(z.detach().numpy())
    np.testing.assert_allclose(values.detach(), jax.vmap(expected)(rows), rtol=1e-10)
    wanted = jnp.arange(5.0)[:, None] * jax.vmap(jax.grad(expected))(rows)
    np.testing.assert_allclose(slopes, wanted, rtol=1e-10, atol=1e-10)
    leaf = z.detach()[:2].requires_grad_()
    (slopes,) = torch.autograd.grad(density(leaf).sum(), leaf, create_graph=True)
    found = [torch.autograd.grad(part, leaf, retain_graph=True)[0] for part in slopes.sum(0)]
    wanted = jax.jit(jax.vmap(jax.hessian(expected)))(rows[:2])
    np.testing.assert_allclose(torch.stack(found, 1), wanted, rtol=1e-9, atol=1e-9)

    draws = infer.Predictive(line, num_samples=3)(KEY, at)
    parts = [draws["slope"][:, None], jnp.log(draws["scale"])[:, None], draws["offsets"]]
    packed = module._packed(guide, draws, (at, y), {})
    np.testing.assert_allclose(packed, jnp.concatenate(parts, -1), rtol=1e-10)
    by_chain = {name: draws[name][None].repeat(2, 0) for name in guide._init_locs}
    np.testing.assert_allclose(module._packed(guide, by_chain, (at, y), {})[3:], packed)


class Undrawable(dist.Normal):
    """A density that its author gave no draws."""

    def sample(self, key, sample_shape=()):
        raise NotImplementedError


def flat():
    numpyro.sample("x", dist.ImproperUniform(dist.constraints.positive, (), ()))
    numpyro.sample("z", dist.Normal(1000.0, 50.0))


def angle():
    with handlers.reparam(config={"x": CircularReparam()}):
        numpyro.sample("x", dist.VonMises(0.0, 1.0))
    numpyro.sample("z", dist.Normal(1000.0, 50.0))


def test_draws_of_the_prior():
    """Beside an improper prior the others are drawn; what is on an edge leaves the others."""
    for model in (flat, angle):
        z = module._prior_draws(prepared(model), KEY, (), {}, 1000)
        np.testing.assert_allclose(z.mean(0), [0.0, 1000.0], atol=5 * 50 / 1000**0.5)
        np.testing.assert_allclose(z.std(0), [2.0, 50.0], rtol=5 / 2000**0.5)
    undrawable = prepared(lambda: numpyro.sample("x", Undrawable()))
    assert module._prior_draws(undrawable, KEY, (), {}, 10) is None
    wide = prepared(lambda: numpyro.sample("x", dist.LogNormal(0.0, 400.0)))
    z = module._prior_draws(wide, KEY, (), {}, 256)
    assert 200 < len(z) < 256
    assert bool(z.isfinite().all())
    assert float(z.std()) > 200


def test_parameters_that_a_function_draws_are_those_of_the_first_run():
    def shifted():
        shift = numpyro.param("shift", lambda key: jax.random.normal(key))
        numpyro.sample("x", dist.LogNormal(shift, 1.0))

    guide = prepared(shifted)
    check_random_numbers(guide, (), {})
    packed = module._packed(guide, {"x": jnp.ones(3)}, (), {})
    np.testing.assert_allclose(packed, jnp.zeros((3, 1)), atol=1e-12)


def scoped():
    def scaled():
        with handlers.scale(scale=0.5):
            numpyro.sample("x", dist.HalfNormal(1.0))

    handlers.scope(scaled, prefix="s")()


def masked_and_scaled():
    with handlers.scale(scale=0.5):
        a = numpyro.sample("a", dist.HalfNormal(1.0))
        with numpyro.plate("rows", 2), handlers.mask(mask=SEEN):
            numpyro.sample("b", dist.LogNormal(a, 1.0))


def partly_observed():
    a = numpyro.sample("a", dist.HalfNormal(1.0))
    with numpyro.plate("rows", 2):
        numpyro.sample("y", dist.LogNormal(a, 1.0), obs=jnp.ones(2), obs_mask=SEEN)


def repeated():
    numpyro.sample("x", dist.HalfNormal(1.0), sample_shape=(2,))


MODELS = [scoped, masked_and_scaled, partly_observed, repeated]


@pytest.mark.parametrize("model", slow_but(MODELS, scoped))
def test_jacobians_and_rows_that_are_masked_out_count_once(model):
    """As in torch, whatever scale and mask a latent site has; in base space, too."""
    guide, loc, linear = known_guide(model)
    w = jnp.array([0.3, -1.0, 0.2])[: guide.latent_dim]
    z = jnp.asarray(loc + linear @ w)
    a, b = jnp.exp(z[0]), jnp.exp(z[1:])
    prior = dist.HalfNormal(1.0).log_prob(a)
    rows = dist.LogNormal(a, 1.0)
    own = {
        scoped: lambda: 0.5 * prior,
        repeated: lambda: dist.HalfNormal(1.0).log_prob(jnp.exp(z)).sum(),
        masked_and_scaled: lambda: 0.5 * (prior + rows.log_prob(b)[0]) + rows.log_prob(b)[1],
        partly_observed: lambda: prior + rows.log_prob(b).sum() + rows.log_prob(1.0),
    }
    expected = own[model]() + z.sum()
    np.testing.assert_allclose(module.log_density(guide, (), {})(z), expected, rtol=1e-10)
    found = infer.util.log_density(neutra(guide), (), {}, {LATENT: w})[0]
    expected = expected + np.linalg.slogdet(linear)[1]
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def shares(x):
    return jnp.stack((1 - x, x), -1)


def mixed(x):
    parts = [dist.Normal(x, 1.0), dist.StudentT(x + 1.0)]
    return dist.MixtureGeneral(dist.Categorical(shares(0.4 * x)), parts)


# What is seen twice of a site whose parameter is x, and at which x of -2, 0.2 and 2 it may be.
LIKELIHOODS = {
    "uniform": (lambda x: dist.Uniform(x, x + 1.0), 0.9, [False, True, False]),
    "proportion": (lambda x: dist.BetaProportion(x, 4.2), 0.02, [False, True, False]),
    "normal": (lambda x: dist.Normal(x, 1.0), 0.9, [True, True, True]),
    "dirichlet": (lambda x: dist.Dirichlet(5 * shares(x)), [0.2, 0.8], [False, True, False]),
    "mixture of two kinds": (mixed, 0.9, [False, True, True]),
    "inflated": (
        lambda x: dist.ZeroInflatedDistribution(dist.Poisson(x), gate=0.1),
        0,
        [False, True, True],
    ),
}


def densities(model, z):
    """Return log densities of unconstrained vectors, which they are in base space, too."""
    start = infer.init_to_value(values={"x": jnp.array(0.2)})
    guide, loc, linear = known_guide(model, init_loc_fn=start)
    base, given = neutra(guide), jnp.array(z)

    def of_base(w):
        return infer.util.log_density(base, (), {}, {LATENT: w})[0]

    found = jax.jit(jax.vmap(module.log_density(guide, (), {})))(given)
    moved = jax.jit(jax.vmap(of_base))((given - loc) / linear.diagonal())
    np.testing.assert_allclose(moved, found + np.linalg.slogdet(linear)[1], rtol=1e-8)
    return found


@pytest.mark.parametrize("name", slow_but(LIKELIHOODS, "uniform"))
def test_what_validation_refuses_has_no_density(name):
    fn, y, there = LIKELIHOODS[name]

    def model():
        x = numpyro.sample("x", dist.Normal())
        numpyro.sample("y", fn(jnp.stack((x, x))).to_event(1), obs=jnp.array([y, y]))

    with numpyro.validation_enabled(is_validate=False):
        found = densities(model, [[-2.0], [0.2], [2.0]])
    assert (found > -jnp.inf).tolist() == there


def a_row_masked_out():
    x = numpyro.sample("x", dist.Normal())
    with numpyro.plate("rows", 2), handlers.mask(mask=SEEN):
        numpyro.sample("y", dist.Poisson(jnp.stack((jnp.ones_like(x), x))), obs=jnp.zeros(2))


def a_latent():
    x = numpyro.sample("x", dist.Normal())
    with numpyro.plate("rows", 2), handlers.scale(scale=0.5):
        numpyro.sample("y", dist.Normal(0.0, x))


def in_steps():
    x = numpyro.sample("x", dist.Normal())
    scan(lambda c, y: (c, numpyro.sample("y", dist.Poisson(x), obs=y)), 0.0, jnp.zeros(2))


@pytest.mark.slow
@pytest.mark.parametrize("model", [a_row_masked_out, a_latent, in_steps])
def test_where_sites_have_a_density(model):
    """Rows that masks leave out need none."""
    z = [[x] + [0.3] * 2 * (model is a_latent) for x in (-2.0, 0.2, 2.0)]
    expected = [model is a_row_masked_out, True, True]
    assert (densities(model, z) > -jnp.inf).tolist() == expected


# ---- float32 ------------------------------------------------------------------------------------


def sure_of_one():
    numpyro.sample("x", dist.TransformedDistribution(dist.Normal(17.0, 1.0), SigmoidTransform()))


def far_apart():
    numpyro.sample("x", dist.HalfNormal(1.0))  # beyond the largest number nothing lies


@pytest.mark.slow
@pytest.mark.parametrize(("model", "loc"), [(sure_of_one, 17.0), (far_apart, 0.0)])
@pytest.mark.usefixtures("float32")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_draws_that_a_type_cannot_tell_from_an_edge_are_told_of(model, loc):
    """By importance, and by what ends the training."""
    guide = prepared(model)
    transform = interpolant_transform(1, (8, 8), solver=FixedGrid(steps=2))
    transform.flow.whitening.set(torch.full((1,), loc), torch.full((1, 1), 40.0))
    flow = TorchDistribution(transform).freeze()
    guide.posterior, density = from_torch(flow), module.TorchDensity(guide, (), {})
    for verdict in (
        importance(guide, KEY, count=2000).verdict,
        importance_verdict(flow, density, Clock(None), 0, None).verdict,
    ):
        assert ("cannot tell values of 'x' from an edge" in verdict) == (model is sure_of_one)


@pytest.mark.usefixtures("float32")
def test_numbers_that_move_there_and_back_and_densities_in_a_finer_type():
    def several():
        numpyro.sample("b", dist.Gamma(0.04, 1.0))
        numpyro.sample("a", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    density = module.TorchDensity(prepared(several), (), {})
    z = torch.tensor([[-80.0, 1.0, 2.0], [-120.0, 3.0, 4.0]])
    moved = density.displacements(z)
    assert moved["a"].tolist() == [[0.0, 0.0]] * 2
    assert moved["b"].tolist() == [[pytest.approx(0.0, abs=1e-4)], [torch.inf]]
    assert density(z)[1] == -torch.inf
    found = density(z.double())
    assert found.dtype == torch.float64
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 1:].double()).sum(-1)
    expected = 0.04 * z[:, 0].double() - math.lgamma(0.04) + normal
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


# ---- base space ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_model_in_the_base_space_of_a_guide():
    """The potential of NumPyro and the Jacobian, once, though the first site is in a plate."""
    y, mask = jnp.array([1.0, 0.5, 0.0]), jnp.arange(3) > 0
    guide, loc, linear = known_guide(in_plate, y)
    base, w = neutra(guide), jnp.array([0.3, -1.0, 0.2])
    density, trace = infer.util.log_density(base, (y,), {}, {LATENT: w})
    z = loc + linear @ w
    expected = -guide._potential_fn({"x": z}) + 3 * np.log(0.6)
    np.testing.assert_allclose(density, expected, rtol=1e-10)
    assert trace["x"]["type"] == "deterministic"
    np.testing.assert_allclose(trace["x"]["value"], jnp.exp(z), rtol=1e-10)
    np.testing.assert_allclose(guide.get_transform({})(w), z, rtol=1e-10)

    def weighed(target):
        return handlers.scale(handlers.mask(target, mask), 0.25)

    found = infer.util.log_density(weighed(base), (y,), {}, {LATENT: w})[0]
    guide.model = weighed(in_plate)
    expected = infer.util.log_density(neutra(guide), (y,), {}, {LATENT: w})[0]
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.slow
def test_the_base_space_of_a_guide_where_sites_are_given():
    """What is given from outside stays, in the model as it is; the base draw comes first."""
    y = jnp.array([1.0, 0.5, 0.0])
    guide, *_ = known_guide(in_plate, y, prefix="own")
    base, x, w = neutra(guide), jnp.array([0.5, 1.0, 2.0]), jnp.zeros(3)
    for wrapped, name in (
        (handlers.condition(base, {"x": x}), "x"),
        (handlers.substitute(base, {"x": x}), "x"),
        (handlers.condition(handlers.scope(base, prefix="s"), {"s/x": x}), "s/x"),
    ):
        trace = handlers.trace(handlers.seed(wrapped, KEY)).get_trace(y)
        np.testing.assert_allclose(trace[name]["value"], x)
        assert "own_shared_latent" not in str(list(trace))
    found = infer.log_likelihood(base, {"x": x[None]}, y)["y"]
    np.testing.assert_allclose(found[0], dist.Normal(jnp.log(x), 0.5).log_prob(y))
    both = infer.Predictive(base, {"x": x[None], "own_shared_latent": w[None]})(KEY, y)
    expected = jnp.exp(guide.get_transform({})(w))
    np.testing.assert_allclose(both["x"][0], expected, rtol=1e-10)


def in_cond(y):
    cond(True, *[lambda _: numpyro.sample("x", dist.Normal())] * 2, None)  # noqa: FBT003


@pytest.mark.parametrize(
    ("model", "rows", "message"),
    [
        (in_cond, 3, r"'x' has its value already, inside scan or cond .* NUTS\(model\)"),
        (handlers.condition(in_plate, {"x": np.ones(3)}), 3, "expected site 'x' to be latent"),
        (lambda y: None, 3, r"got a model without \['x'\]"),
        (by_rows, 1, r"expected site 'x' of shape .* train a new guide"),
        (by_rows, 3, r"expected site 'x' of shape .* train a new guide"),
    ],
)
def test_models_that_have_no_base_space_of_a_guide(model, rows, message):
    before = 1 if model is by_rows and rows == 3 else 3
    guide, *_ = known_guide(in_cond if model is in_cond else by_rows, jnp.ones(before))
    guide.model = model
    with pytest.raises(ValueError, match=message):
        handlers.seed(neutra(guide), KEY)(jnp.ones(rows))
    if model is by_rows:
        with pytest.raises(ValueError, match=message):
            module.log_density(guide, (jnp.ones(rows),), {})(jnp.zeros(before))


# ---- importance ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_importance_weights():
    """Of a Gaussian against a Gaussian posterior, in closed form."""
    y = jnp.array([1.0, 1.0])
    guide, loc, _ = known_guide(conjugate, y)
    result = importance(guide, KEY, y, count=4000)
    chance = np.sqrt((4000 / result.ess - 1) / 4000)
    assert chance < result.log_evidence_stderr < 1.3 * chance  # the solver's part is there
    evidence = float(dist.Normal(0.0, np.sqrt(1.25)).log_prob(y).sum())
    assert abs(result.log_evidence - evidence) < 5 * result.log_evidence_stderr
    drawn = result.draws["x"]
    np.testing.assert_allclose(drawn.mean(0), loc, atol=5 * 0.6 / 4000**0.5)
    posterior = dist.Normal(0.8 * y, np.sqrt(0.2)).to_event(1)
    expected = posterior.log_prob(drawn) - dist.Normal(loc, 0.6).to_event(1).log_prob(drawn)
    top = jnp.argsort(expected)[:-200]  # those that are not smoothed
    found = result.log_weights - result.log_weights[top[-1]]
    np.testing.assert_allclose(found[top], (expected - expected[top[-1]])[top], atol=1e-4)
    again = result.resampled(KEY, 3000)["x"]
    assert again.shape == (3000, 2)
    weighted = jnp.exp(result.log_weights) @ drawn
    np.testing.assert_allclose(again.mean(0), weighted, atol=0.02)


@pytest.mark.slow
def test_importance_on_a_support_that_the_data_set():
    """The draws, as their weights, are those of the arguments that are given."""

    def bounded(y):
        x = numpyro.sample("x", dist.Uniform(0.0, y.max()))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y[0])

    guide, *_ = known_guide(bounded, jnp.array([0.5, 1.0]), scale=3.0)
    result = importance(guide, KEY, jnp.array([0.5, 10.0]), count=20_000)
    x = jnp.linspace(0.0, 10.0, 10_001)
    posterior = jax.nn.softmax(dist.Normal(x, 1.0).log_prob(0.5))
    found = jnp.exp(result.log_weights) @ result.draws["x"]
    np.testing.assert_allclose(found, posterior @ x, atol=0.05)


@pytest.mark.slow
def test_the_largest_weights_are_those_of_doubled_steps():
    """Draws without a number are none of these."""
    flow = plain().freeze()
    flow.transform.solver = FixedGrid(2)
    coarse = from_torch(flow)
    flow.transform.solver = FixedGrid(4)
    fine = from_torch(flow)

    def density(z):
        return jnp.where(z[0] > coarse.transform.weights["loc"][0], jnp.nan, -0.1 * z @ z)

    z, log_p, log_q, change = _weighed(coarse, density, KEY, 40, 10)
    drawn, finer = coarse.rsample_and_log_prob(KEY, (40,))[1], fine.log_prob(z)
    assert float(jnp.abs(drawn - finer).max()) > 1e-6
    assert bool(jnp.isnan(log_p).any())
    ratio = jnp.where(jnp.isnan(log_p), -jnp.inf, log_p - drawn)
    rest, top = jnp.split(jnp.argsort(ratio), [30])
    np.testing.assert_allclose(log_q[top], finer[top], rtol=1e-10)
    np.testing.assert_allclose(log_q[rest], drawn[rest], rtol=1e-10)
    np.testing.assert_allclose(change, jnp.abs(drawn - finer)[top].mean(), rtol=1e-10)


def test_resampled_draws():
    """In random order and places; there are none without weight, without a key or by halves."""
    draws = {"x": jnp.arange(20)}
    result = ImportanceResult(0.1, 20.0, 0.0, 0.0, "", jnp.full(20, -np.log(20)), draws)
    found = np.asarray(result.resampled(KEY)["x"])
    assert sorted(found) == list(range(20))
    assert (found != np.arange(20)).any()
    ones = [int(result.resampled(key, 1)["x"][0]) for key in jax.random.split(KEY, 5)]
    assert len(set(ones)) > 1
    none = result._replace(ess=0.0, log_weights=jnp.full(20, -jnp.inf))
    for use, error, message in (
        (lambda: none.resampled(KEY), ValueError, "draws with positive weights, got none"),
        (lambda: result.resampled(100), TypeError, "a key of jax.random as the first argument"),
        (lambda: result.resampled(KEY, 5.5), ValueError, "count >= 1, a whole number, got 5.5"),
    ):
        with pytest.raises(error, match=message):
            use()


def one_of_several(x=None, y=None, *, subsample=None, shift=False):
    x = numpyro.sample("x", dist.Normal(), obs=x)
    if shift:
        x = x + jax.random.normal(numpyro.prng_key())
    with numpyro.plate("rows", 10, subsample_size=subsample) as rows:
        numpyro.sample("y", dist.Normal(x, 1.0), obs=None if y is None else y[rows])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 99}, "count >= 100"),
        ({"x": 0.5}, r"expected sites \['x'\] to be latent, as when"),
        ({"y": None}, r"got a model with \['y'\] besides and without \[\]"),
        ({"subsample": 2}, "that subsample"),
        ({"shift": True}, "draws random numbers beside its latent sites"),
    ],
)
def test_refusals_of_importance(options, message):
    y = jnp.zeros(10)
    guide, *_ = known_guide(one_of_several, None, y)
    with pytest.raises(ValueError, match=message):
        importance(guide, KEY, **{"y": y, "count": 100, **options})


# ---- training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained():
    guide = AutoInterpolant(conjugate, hidden_dims=(16, 16))
    options = {"rounds": 3, "steps": 100}
    return guide, fit_guide(guide, KEY, jnp.array([1.0, -2.0]), **SEEDED, options=options)


@pytest.mark.slow
def test_training_on_the_model_alone(trained):
    guide, result = trained
    evidence = dist.Normal(0.0, np.sqrt(1.25)).log_prob(jnp.array([1.0, -2.0])).sum()
    assert result.ess > 0.8 * result.draws
    assert abs(result.log_evidence - float(evidence)) < 0.02
    draws = guide.sample_posterior(KEY, {}, sample_shape=(4000,))["x"]
    np.testing.assert_allclose(draws.mean(0), [0.8, -1.6], atol=0.05)
    np.testing.assert_allclose(draws.std(0), np.sqrt(0.2), rtol=0.1)
    np.testing.assert_allclose(guide.median()["x"], [0.8, -1.6], atol=0.05)
    low, high = guide.quantiles({}, [0.1, 0.9])["x"]
    np.testing.assert_allclose(high - low, 2 * 1.2816 * np.sqrt(0.2), rtol=0.1)


@pytest.mark.slow
def test_where_numpyro_takes_a_guide(trained):
    guide, result = trained
    y, w = jnp.array([1.0, -2.0]), jnp.array([0.3, -1.0])
    svi = infer.SVI(conjugate, guide, numpyro.optim.Adam(0.01), infer.Trace_ELBO(100))
    loss = float(svi.evaluate(svi.init(KEY, y), y))
    assert abs(loss + result.log_evidence) < 0.1  # the bound is nearly the evidence
    base = NeuTraReparam(guide, {}).reparam(conjugate)
    found = infer.util.log_density(base, (y,), {}, {LATENT: w})[0]
    expected = infer.util.log_density(neutra(guide), (y,), {}, {LATENT: w})[0]
    np.testing.assert_allclose(found, expected, atol=1e-3)  # one of two solves, there and back


@pytest.mark.slow
def test_training_on_draws():
    """Also where gradients are off, in which mode a flow's weights cannot change."""
    y = jnp.array([1.0, -2.0])
    draws = jnp.array([0.8, -1.6]) + np.sqrt(0.2) * jax.random.normal(KEY, (3000, 2))
    guide = AutoInterpolant(conjugate, hidden_dims=(16, 16))
    samples = {"x": draws, "other": draws}
    with torch.inference_mode():
        result = fit_guide(guide, KEY, y, samples=samples, **SEEDED, options={"steps": 100})
    assert result.ess > 0.9 * result.draws


@pytest.mark.parametrize("samples", [None, {"x": np.zeros((9, 2))}], ids=["model", "samples"])
def test_settings_reach_the_training_and_the_seed_the_verdict(samples, monkeypatch):
    seen = []

    def trained(posterior, *args, **settings):
        seen.append((posterior.transform.flow.velocity.layers, settings))
        return "trained"

    def judged(posterior, density, clock, seed, training):
        assert (seed, training) == (3, "trained")

    monkeypatch.setattr("pyro_interpolant.infer.train_from_density", trained)
    monkeypatch.setattr("pyro_interpolant.training.fit", trained)
    monkeypatch.setattr("pyro_interpolant.infer.importance_sampling.importance_verdict", judged)
    monkeypatch.setattr(module, "_prior_draws", lambda *args: torch.zeros(5, 2))
    options = {"ema": 0.9} if samples else {"start": torch.ones(7, 2)}
    more = {"samples": samples, "options": options, "seed": 3, "progress": False}
    guide = AutoInterpolant(conjugate, hidden_dims=(5, 6))
    for seed in (1, 2):  # of torch, which is left alone
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        fit_guide(guide, KEY, jnp.ones(2), **more)
        assert torch.equal(torch.get_rng_state(), before)
    (layers, settings), (again, _) = seen
    assert [len(layer.weight) for layer in layers] == [5, 6]
    assert torch.equal(layers[0].weight, again[0].weight)
    expected = {**options, "seed": 3, "progress": False}
    assert all(settings[name] is value for name, value in expected.items())


def test_a_refused_training_leaves_a_guide_as_it_was():
    guide, *_ = known_guide(by_rows, jnp.ones(2))
    before = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(guide).items()}
    samples = {"x": jnp.ones((9, 3))}
    with pytest.raises(TypeError, match="nonsense"):
        fit_guide(guide, KEY, jnp.ones(3), samples=samples, options={"nonsense": 1})
    assert vars(guide) == before


def mixed_sites(kind):
    a = numpyro.sample("a", dist.Normal())
    if kind == "discrete":
        numpyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    if kind == "value":
        numpyro.sample("b", dist.Delta(0.5))
    if kind == "subsample":
        with numpyro.plate("rows", 10, subsample_size=2):
            numpyro.sample("y", dist.Normal(a, 1.0), obs=jnp.zeros(2))
    if kind == "hidden":
        with handlers.block():
            numpyro.sample("s", dist.HalfNormal(1.0))
    if kind == "support":
        numpyro.sample("s", dist.Dirichlet(jnp.ones(3)))


def one_beside():
    found = np.full((9, 3), 1 / 3)
    found[2] = 0.3
    return found


A = np.zeros(9)


@pytest.mark.parametrize(
    ("kind", "samples", "message"),
    [
        ("discrete", None, "continuous latent sites, got the discrete site 'k'"),
        ("value", None, r"'b' .*numpyro\.deterministic"),
        ("subsample", None, r"got plates \['rows'\] that subsample"),
        ("hidden", None, "draws random numbers beside its latent sites"),
        ("", {"a": A[:0]}, "draws of every site, got none"),
        ("support", {"a": A}, r"got none of \['s'\]"),
        ("support", {"a": A, "s": np.ones((9, 2))}, r"'s', of shape \(3,\)"),
        ("support", {"a": A[:5], "s": one_beside()}, "as many draws of every site"),
        (
            "support",
            {"a": A, "s": one_beside()},
            r"'s' strictly inside its support.*got 1 of 9 .*being draw 2",
        ),
    ],
)
def test_refusals_of_fit_guide(kind, samples, message):
    with pytest.raises(ValueError, match=message):
        fit_guide(AutoInterpolant(mixed_sites), KEY, kind, samples=samples, **SEEDED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seconds": -3.0}, r"expected max_seconds > 0, got -3\.0"),
        ({"rounds": 3}, "expected samples or rounds, got both"),
        ({"options": {"base_samples": torch.zeros(9, 1)}}, "a guide starts from N"),
        ({"options": {"context": torch.zeros(9, 1)}}, "other options of fit than context"),
    ],
)
def test_options_that_are_refused(options, message):
    """A guide on samples of a base was trained from these, and drew from N(0, I)."""
    with pytest.raises(ValueError, match=message):
        fit_guide(AutoInterpolant(mixed_sites), KEY, "", samples={"a": A}, **options)


def test_what_is_no_guide_of_this_room():
    for use in (lambda it: fit_guide(it, KEY), lambda it: importance(it, KEY), neutra):
        with pytest.raises(TypeError, match=r"an AutoInterpolant of pyro_interpolant\.numpyro"):
            use(TorchGuide(conjugate))
    new = AutoInterpolant(conjugate)
    for use in (lambda: importance(new, KEY, jnp.ones(2)), lambda: neutra(new), new.median):
        with pytest.raises(ValueError, match="expected a trained guide: call fit_guide"):
            use()
    for call in (fit_guide, importance):
        for key in (jnp.ones(2), 0, {"y": 1}, jax.random.split(KEY)):
            with pytest.raises(TypeError, match="a key of jax.random as the second argument"):
                call(new, key)
    module.check_key(jax.random.PRNGKey(0))  # the older kind


# ---- what a guide says --------------------------------------------------------------------------


@pytest.mark.slow
def test_quantiles_are_those_of_draws_on_the_supports():
    """In the order in which they are asked for."""

    def model():
        numpyro.sample("p", dist.Dirichlet(jnp.array([2.0, 3.0, 5.0])))

    guide, levels = prepared(model), np.array([0.95, 0.05, 0.5])
    flow = interpolant_transform(2, (8, 8), solver=FixedGrid(steps=1))
    guide.posterior = from_torch(TorchDistribution(flow))
    found, middle = jax.jit(lambda at: guide.quantiles({}, at))(levels), guide.median()
    normal = np.array([1.645, -1.645, 0.0])  # the flow is N(0, I)
    np.testing.assert_allclose(found["p"][:, 0], 1 / (1 + 2 * np.exp(-normal)), rtol=0.1)
    np.testing.assert_allclose(middle["p"][0], found["p"][2, 0], atol=0.01)
    np.testing.assert_allclose(middle["p"].sum(), 1)
    for wrong in ([0.05, 95], np.array([0.5, np.nan])):
        with pytest.raises(ValueError, match="expected quantiles between 0 and 1, got "):
            guide.quantiles({}, wrong)
