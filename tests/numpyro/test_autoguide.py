"""A guide of a NumPyro model: the density that torch trains on, and what comes back."""

import math
import warnings

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
from pyro_interpolant.infer import GuideResult
from pyro_interpolant.infer.importance_sampling import importance_verdict
from pyro_interpolant.numpyro import (
    AutoInterpolant,
    ImportanceResult,
    InterpolantDistribution,
    fit_guide,
    from_torch,
    importance,
    neutra,
)
from pyro_interpolant.numpyro import autoguide as module
from pyro_interpolant.numpyro import importance_sampling as sampling
from pyro_interpolant.numpyro.importance_sampling import _both_ways, _weighed
from pyro_interpolant.numpyro.log_density import check_random_numbers
from pyro_interpolant.numpyro.validity import is_valid, log_prob_left_out
from pyro_interpolant.training.clock import Clock

KEY = jax.random.key(0)
X = jnp.linspace(-1, 1, 10)
Y = 0.7 * X + 0.3
QUICK = {"max_seconds": 15.0, "seed": 0, "progress": False}


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


def prepared(guide, *args):
    with handlers.seed(rng_seed=KEY):
        guide._setup_prototype(*args)
    return guide


@pytest.mark.slow
def test_the_density_that_torch_sees():
    guide = prepared(AutoInterpolant(line), X, Y)
    density = module._for_torch(module.log_density(guide, (X, Y), {}))
    z = torch.randn(5, 4, requires_grad=True)
    values = density(z)
    (slopes,) = torch.autograd.grad((values * torch.arange(5.0)).sum(), z)

    @jax.jit
    def expected(z):
        slope, log_scale, offsets = z[0], z[1], z[2:]
        prior = dist.Normal().log_prob(z[jnp.array([0, 2, 3])]).sum()
        prior += dist.Normal(0.0, 0.2).log_prob(log_scale)
        y = dist.Normal(slope * X + offsets.sum(), jnp.exp(log_scale))
        return prior + y.log_prob(Y).sum()

    names = list(guide._init_locs)
    assert names == ["slope", "scale", "offsets"]
    rows = jnp.asarray(z.detach().numpy())
    np.testing.assert_allclose(values.detach(), jax.vmap(expected)(rows), rtol=1e-10)
    wanted = jnp.arange(5.0)[:, None] * jax.vmap(jax.grad(expected))(rows)
    np.testing.assert_allclose(slopes, wanted, rtol=1e-10, atol=1e-10)

    leaf = z.detach()[:2].requires_grad_()
    (slopes,) = torch.autograd.grad(density(leaf).sum(), leaf, create_graph=True)
    found = [torch.autograd.grad(part, leaf, retain_graph=True)[0] for part in slopes.sum(0)]
    wanted = jax.jit(jax.vmap(jax.hessian(expected)))(rows[:2])
    np.testing.assert_allclose(torch.stack(found, 1), wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_rows_in_blocks_of_few_sizes(monkeypatch):
    """Padded to the next size, and split at the last; what is padded is not seen."""
    monkeypatch.setattr(module, "_BLOCKS", (2, 4))
    sizes = []

    def density(z):
        return jnp.where(z[0] > 0, jnp.log(z[0]) * z[1], -jnp.inf)

    def square(z, v):
        sizes.append(z.shape)
        return (z**2, (z * v).sum(-1))

    blocks = module.in_blocks(square)
    for count in (1, 2, 3, 4, 5, 11):
        z, v = torch.rand(count, 2), torch.rand(count, 2)
        first, second = blocks(z, v)
        torch.testing.assert_close(first, z**2)
        torch.testing.assert_close(second, (z * v).sum(-1))
    assert sizes == [(2, 2), (4, 2)]
    z = torch.tensor([[2.0, 1.0], [-1.0, 1.0], [3.0, 2.0]], requires_grad=True)
    values = module._for_torch(density)(z)
    np.testing.assert_allclose(values.detach(), [np.log(2), -np.inf, 2 * np.log(3)])


@pytest.mark.slow
def test_draws_are_packed_as_the_density_wants_them():
    guide = prepared(AutoInterpolant(line), X, Y)
    draws = infer.Predictive(line, num_samples=3)(KEY, X)
    packed = module._packed(guide, draws, (X, Y), {})
    expected = [draws["slope"][:, None], jnp.log(draws["scale"])[:, None], draws["offsets"]]
    np.testing.assert_allclose(packed, jnp.concatenate(expected, -1), rtol=1e-10)
    by_chain = {name: draws[name][None].repeat(2, 0) for name in guide._init_locs}
    np.testing.assert_allclose(module._packed(guide, by_chain, (X, Y), {})[3:], packed)
    for wrong, message in (
        ({"scale": None}, r"got none of \['scale'\]"),
        ({"offsets": draws["offsets"][:, :1]}, r"site 'offsets', of shape \(2,\), .* \(3, 1\)"),
        ({"offsets": draws["offsets"][0]}, r"site 'offsets', of shape \(2,\), .* \(2,\)"),
        ({"slope": draws["slope"][:2]}, "as many draws of every site"),
    ):
        given = {k: v for k, v in {**draws, **wrong}.items() if v is not None}
        with pytest.raises(ValueError, match=message):
            module._packed(guide, given, (X, Y), {})


@pytest.mark.slow
def test_draws_of_the_prior():
    guide = prepared(AutoInterpolant(line), X, Y)
    z = module._prior_draws(guide, KEY, (X, Y), {}, 2000)
    assert z.dtype == torch.float64
    assert z.shape == (2000, 4)
    np.testing.assert_allclose(z.std(0), [1.0, 0.2, 1.0, 1.0], rtol=0.1)


class Undrawable(dist.Normal):
    """A density that its author gave no draws."""

    def sample(self, key, sample_shape=()):
        raise NotImplementedError


def test_a_prior_that_cannot_be_drawn_has_no_draws():
    guide = prepared(AutoInterpolant(lambda: numpyro.sample("x", Undrawable())))
    assert module._prior_draws(guide, KEY, (), {}, 10) is None


def flat():
    numpyro.sample("x", dist.ImproperUniform(dist.constraints.positive, (), ()))


def angle():
    with handlers.reparam(config={"x": CircularReparam()}):
        numpyro.sample("x", dist.VonMises(0.0, 1.0))


@pytest.mark.parametrize("model", [flat, angle])
def test_beside_an_improper_prior_the_others_are_drawn(model):
    def whole():
        model()
        numpyro.sample("z", dist.Normal(1000.0, 50.0))

    guide = prepared(AutoInterpolant(whole))
    z = module._prior_draws(guide, KEY, (), {}, 1000)
    np.testing.assert_allclose(z.mean(0), [0.0, 1000.0], atol=6)
    np.testing.assert_allclose(z.std(0), [2.0, 50.0], rtol=0.1)


def test_what_is_no_guide_of_this_room():
    for use in (lambda it: fit_guide(it, KEY), lambda it: importance(it, KEY), neutra):
        with pytest.raises(TypeError, match=r"an AutoInterpolant of pyro_interpolant\.numpyro"):
            use(TorchGuide(conjugate))
    with pytest.raises(TypeError, match="expected a model, a callable, got int"):
        AutoInterpolant(3)
    with pytest.raises(ValueError, match=r"expected max_seconds > 0, got -3\.0"):
        fit_guide(AutoInterpolant(conjugate), KEY, jnp.ones(2), max_seconds=-3.0)
    new, guide = AutoInterpolant(conjugate), prepared(AutoInterpolant(conjugate), jnp.ones(2))
    for use in (
        guide.get_posterior, guide.get_base_dist, guide.get_transform, guide.median,
        lambda: importance(new, KEY, jnp.ones(2)), lambda: neutra(guide),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="expected a trained guide: call fit_guide"):
            use()


@pytest.mark.slow
def test_quantiles_are_those_of_draws_on_the_supports():
    def model():
        numpyro.sample("p", dist.Dirichlet(jnp.array([2.0, 3.0, 5.0])))

    guide, levels = prepared(AutoInterpolant(model)), np.array([0.05, 0.5, 0.95])
    flow = interpolant_transform(2, (8, 8), solver=FixedGrid(steps=1))
    guide.posterior = from_torch(TorchDistribution(flow))
    found, middle = jax.jit(lambda at: guide.quantiles({}, at))(levels), guide.median()
    normal = np.array([-1.645, 0.0, 1.645])  # the flow is N(0, I)
    np.testing.assert_allclose(found["p"][:, 0], 1 / (1 + 2 * np.exp(-normal)), rtol=0.1)
    assert (np.diff(found["p"], axis=0) > 0).all()
    np.testing.assert_allclose(middle["p"][0], found["p"][1, 0], atol=0.01)
    np.testing.assert_allclose(middle["p"].sum(), 1)


@pytest.mark.parametrize("levels", [[0.05, 95], [-0.1], np.array([0.5, np.nan])])
def test_quantiles_are_between_0_and_1(levels):
    with pytest.raises(ValueError, match="expected quantiles between 0 and 1, got "):
        AutoInterpolant(conjugate).quantiles({}, levels)


def test_quantiles_come_in_the_order_in_which_they_are_asked_for():
    guide = prepared(AutoInterpolant(conjugate), jnp.ones(2))
    guide._spread = lambda: jnp.linspace(0.0, 1.0, 101)[:, None].repeat(2, 1)
    found = guide.quantiles({}, [0.9, 0.1, 0.5])["x"]
    np.testing.assert_allclose(found, np.repeat([[0.9], [0.1], [0.5]], 2, 1), rtol=1e-12)


def test_a_guide_starts_where_it_is_told_to():
    start = infer.init_to_value(values={"x": jnp.array([2.0, 3.0])})
    guide = prepared(AutoInterpolant(conjugate, init_loc_fn=start), jnp.ones(2))
    np.testing.assert_array_equal(guide._init_locs["x"], [2.0, 3.0])


def test_a_factor_that_is_named_as_a_jacobian_is_is_none():
    """Of a latent site of another name, behind a prefix that is no scope's: a scale weighs it."""

    def model():
        with handlers.scale(scale=0.5):
            numpyro.sample("x", dist.Normal())
            numpyro.factor("other_x_log_det", -3.0)

    density = module.log_density(prepared(AutoInterpolant(model)), (), {})
    expected = 0.5 * (dist.Normal().log_prob(0.3) - 3.0)
    np.testing.assert_allclose(density(jnp.array([0.3])), expected, rtol=1e-12)


@pytest.mark.slow
def test_the_largest_weights_are_those_of_doubled_steps():
    torch.manual_seed(0)
    flow = plain().freeze()
    flow.transform.solver = FixedGrid(2)
    coarse = from_torch(flow)
    flow.transform.solver = FixedGrid(4)
    fine = from_torch(flow)
    z, log_p, log_q, change = _weighed(coarse, lambda z: -0.1 * z @ z, KEY, 40, 10)
    (_, drawn), finer = coarse.rsample_and_log_prob(KEY, (40,)), fine.log_prob(z)
    assert float(jnp.abs(drawn - finer).max()) > 1e-6
    *rest, top = jnp.split(jnp.argsort(log_p - drawn), 4)
    np.testing.assert_allclose(log_q[top], finer[top], rtol=1e-10)
    np.testing.assert_allclose(change, jnp.abs(drawn - finer)[top].mean(), rtol=1e-10)
    rest = jnp.concatenate(rest)
    np.testing.assert_allclose(log_q[rest], drawn[rest], rtol=1e-10)
    for q, found in zip(
        (coarse, fine), _both_ways(coarse, lambda z: -0.1 * z @ z, KEY, 40), strict=True
    ):
        z, log_q = q.rsample_and_log_prob(KEY, (40,))
        np.testing.assert_allclose(found, -0.1 * (z**2).sum(-1) - log_q, rtol=1e-10)


def test_draws_of_the_prior_on_an_edge_leave_the_others():
    """Numbers that rounding has made zero or infinite, one in fifteen here."""

    def model():
        numpyro.sample("x", dist.LogNormal(0.0, 400.0))

    z = module._prior_draws(prepared(AutoInterpolant(model)), KEY, (), {}, 256)
    assert 200 < len(z) < 256
    assert bool(z.isfinite().all())
    assert float(z.std()) > 200


@pytest.mark.slow
def test_draws_without_a_number_are_not_those_of_the_largest_weights():
    def settled(steps):
        flow = plain().freeze()
        flow.transform.solver = FixedGrid(steps)
        return from_torch(flow)

    torch.manual_seed(0)
    coarse = settled(1)
    torch.manual_seed(0)
    fine = settled(2)
    z, log_p, log_q, _ = _weighed(
        coarse, lambda z: jnp.where(z[0] > 0, jnp.nan, -0.1 * z @ z), KEY, 20, 3
    )
    drawn = coarse.rsample_and_log_prob(KEY, (20,))[1]
    ratio = jnp.where(jnp.isnan(log_p), -jnp.inf, log_p - drawn)
    top = jnp.argsort(ratio)[-3:]
    assert bool(jnp.isnan(log_p).any())
    assert bool(jnp.isfinite(log_p[top]).all())
    np.testing.assert_allclose(log_q[top], fine.log_prob(z[top]), rtol=1e-10)


@pytest.mark.slow
def test_a_plate_that_subsamples_is_no_density():
    def model():
        x = numpyro.sample("x", dist.Normal())
        with numpyro.plate("rows", 10, subsample_size=2):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=jnp.zeros(2))

    with pytest.raises(ValueError, match=r"got plates \['rows'\] that subsample"):
        fit_guide(AutoInterpolant(model), KEY, **QUICK)


def test_weights_of_a_noisy_density_are_refused():
    """Where arguments make it so: the guide was set up with others."""

    def model(size=None, *, shift=False):
        x = numpyro.sample("x", dist.Normal())
        if shift:
            x = x + jax.random.normal(numpyro.prng_key())
        with numpyro.plate("rows", 10, subsample_size=size) as rows:
            numpyro.sample("y", dist.Normal(x, 1.0), obs=jnp.zeros(10)[rows])

    guide, *_ = known_guide(model)
    for wrong, why in (({"size": 2}, "that subsample"), ({"shift": True}, "draws random numbers")):
        with pytest.raises(ValueError, match=why):
            importance(guide, KEY, count=100, **wrong)


def some_latent():
    x = numpyro.sample("x", dist.Normal())
    numpyro.sample("y", dist.Normal(x, numpyro.sample("s", dist.HalfNormal(1.0))), obs=1.0)


def a_random_shift():
    x = numpyro.sample("x", dist.Normal())
    numpyro.sample("y", dist.Normal(x + jax.random.normal(numpyro.prng_key()), 1.0), obs=1.0)


@pytest.mark.parametrize("model", [handlers.block(some_latent, hide=["s"]), a_random_shift])
def test_random_numbers_of_no_latent_site_are_no_density(model):
    with pytest.raises(ValueError, match="draws random numbers beside its latent sites"):
        fit_guide(AutoInterpolant(model), KEY, **QUICK)


def test_what_is_hidden_but_draws_nothing_is_a_density():
    def model():
        numpyro.sample("x", dist.Normal())
        with handlers.block(), numpyro.plate("rows", 2):
            pass
        with handlers.block(), handlers.seed(rng_seed=0):
            return numpyro.sample("s", dist.Normal())

    check_random_numbers(prepared(AutoInterpolant(model)), (), {})


def test_parameters_that_a_function_draws_are_those_of_the_first_run():
    def model():
        shift = numpyro.param("shift", lambda key: jax.random.normal(key))
        numpyro.sample("x", dist.LogNormal(shift, 1.0))

    guide = prepared(AutoInterpolant(model))
    check_random_numbers(guide, (), {})
    packed = module._packed(guide, {"x": jnp.ones(3)}, (), {})
    np.testing.assert_allclose(packed, jnp.zeros((3, 1)), atol=1e-12)
    assert module._prior_draws(guide, KEY, (), {}, 100).shape == (100, 1)


def test_a_guide_is_trained_where_gradients_are_off():
    """A flow made in inference mode has weights that cannot change."""
    guide = AutoInterpolant(lambda: numpyro.sample("x", dist.Normal()), hidden_dims=(8,))
    draws = {"x": np.random.RandomState(0).randn(50)}
    with torch.inference_mode():
        result = fit_guide(guide, KEY, samples=draws, options={"steps": 5}, **QUICK)
    assert result.ess > 0


def test_a_refused_training_leaves_a_guide_as_it_was():
    def model(n):
        with numpyro.plate("rows", n):
            numpyro.sample("x", dist.Normal())

    guide, _, _ = known_guide(model, 2)
    before = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(guide).items()}
    with pytest.raises(TypeError, match="nonsense"):
        fit_guide(guide, KEY, 3, **QUICK, samples={"x": jnp.ones((9, 3))}, options={"nonsense": 1})
    assert vars(guide) == before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base_samples": 5 + torch.rand(500, 2)}, ValueError, "a guide starts from N"),
        ({"context": torch.zeros(500, 1)}, ValueError, "other options of fit than context"),
        ({"step": 5}, TypeError, "expected options of fit, got step"),
        ({"steps": -5}, ValueError, "steps >= 1"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_model_is_run(options, error, message):
    """A guide on samples of a base was trained from these, and drew from N(0, I)."""
    runs, samples = [], {"x": jnp.ones((9, 2))}
    with pytest.raises(error, match=message):
        fit_guide(AutoInterpolant(runs.append), KEY, 1, **QUICK, samples=samples, options=options)
    assert not runs


def in_plate(y):
    with numpyro.plate("rows", 3):
        x = numpyro.sample("x", dist.Gamma(3.0, 1.0))
        numpyro.sample("y", dist.Normal(jnp.log(x), 0.5), obs=y)


def scaled():
    with handlers.scale(scale=0.5):
        numpyro.sample("x", dist.HalfNormal(1.0))


def scoped():
    handlers.scope(scaled, prefix="s")()


def masked():
    a = numpyro.sample("a", dist.HalfNormal(1.0))
    with numpyro.plate("rows", 2), handlers.mask(mask=SEEN):
        numpyro.sample("b", dist.LogNormal(a, 1.0))


def partly_observed():
    a = numpyro.sample("a", dist.HalfNormal(1.0))
    with numpyro.plate("rows", 2):
        numpyro.sample("y", dist.LogNormal(a, 1.0), obs=jnp.ones(2), obs_mask=SEEN)


def masked_and_scaled():
    with handlers.scale(scale=0.5):
        masked()


def unscored():
    with handlers.mask(mask=False):
        numpyro.sample("x", dist.HalfNormal(1.0))


def repeated():
    numpyro.sample("x", dist.HalfNormal(1.0), sample_shape=(2,))


SEEN = jnp.array([True, False])
MODELS = [scaled, scoped, masked, masked_and_scaled, unscored, partly_observed, repeated]


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
        scaled: lambda: 0.5 * prior,
        scoped: lambda: 0.5 * prior,
        repeated: lambda: dist.HalfNormal(1.0).log_prob(jnp.exp(z)).sum(),
        masked: lambda: prior + rows.log_prob(b).sum(),
        masked_and_scaled: lambda: 0.5 * (prior + rows.log_prob(b)[0]) + rows.log_prob(b)[1],
        unscored: lambda: 0.0,
        partly_observed: lambda: prior + rows.log_prob(b).sum() + rows.log_prob(1.0),
    }
    expected = own[model]() + z.sum()
    np.testing.assert_allclose(module.log_density(guide, (), {})(z), expected, rtol=1e-10)
    found = infer.util.log_density(neutra(guide), (), {}, {"auto_shared_latent": w})[0]
    expected = expected + np.linalg.slogdet(linear)[1]
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_masked_rows_without_a_density_have_none_and_the_others_nothing_left_out():
    fn = dist.Normal(jnp.zeros(3), 1.0, validate_args=False).mask(jnp.array([True, False, True]))
    found = log_prob_left_out(fn, jnp.array([jnp.inf, jnp.inf, 0.5]))
    assert found.tolist() == [0.0, -jnp.inf, 0.0]


class Weibull(dist.TransformedDistribution):
    """As in torch: a power of exponential numbers."""

    arg_constraints = {"concentration": dist.constraints.positive}

    def __init__(self, concentration):
        self.concentration = concentration
        base = dist.Exponential(jnp.ones_like(concentration))
        super().__init__(base, dist.transforms.PowerTransform(1 / concentration))


def shares(x):
    return jnp.stack((1 - x, x), -1)


LIKELIHOODS = {
    "poisson": (dist.Poisson, 0, [False, True, True]),
    "uniform": (lambda x: dist.Uniform(x, x + 1.0), 0.9, [False, True, False]),
    "pareto": (lambda x: dist.Pareto(jnp.exp(x), 2.0), 1.5, [True, True, False]),
    "proportion": (lambda x: dist.BetaProportion(x, 4.2), 0.02, [False, True, False]),
    "weibull": (Weibull, 0.9, [False, True, True]),
    "mixture": (
        lambda x: dist.MixtureSameFamily(
            dist.Categorical(jnp.full(2, 0.5)),
            dist.Gamma(jnp.stack((x, jnp.ones_like(x)), -1), 1.0),
        ),
        0.9,
        [False, True, True],
    ),
    "normal": (lambda x: dist.Normal(x, 1.0), 0.9, [True, True, True]),
    "categorical": (lambda x: dist.Categorical(shares(x)), 0, [False, True, False]),
    "multinomial": (lambda x: dist.Multinomial(3, shares(x)), [2, 1], [False, True, False]),
    "dirichlet": (lambda x: dist.Dirichlet(5 * shares(x)), [0.2, 0.8], [False, True, False]),
    "shares of a mixture": (
        lambda x: dist.MixtureSameFamily(
            dist.Categorical(shares(x)), dist.Normal(jnp.stack((0 * x, 0 * x + 3), -1), 1.0)
        ),
        0.9,
        [False, True, False],
    ),
    "mixture of two kinds": (
        lambda x: dist.MixtureGeneral(
            dist.Categorical(shares(0.4 * x)), [dist.Normal(x, 1.0), dist.StudentT(x + 1.0)]
        ),
        0.9,
        [False, True, True],
    ),
    "inflated": (
        lambda x: dist.ZeroInflatedDistribution(dist.Poisson(x), gate=0.1),
        0,
        [False, True, True],
    ),
}


def densities(model, z, start=0.2):
    """Return log densities of unconstrained vectors, which they are in base space, too."""
    start = infer.init_to_value(values={"x": jnp.array(start)})
    guide, loc, linear = known_guide(model, init_loc_fn=start)
    base, given = neutra(guide), jnp.array(z)

    def of_base(w):
        return infer.util.log_density(base, (), {}, {"auto_shared_latent": w})[0]

    found = jax.jit(jax.vmap(module.log_density(guide, (), {})))(given)
    moved = jax.jit(jax.vmap(of_base))((given - loc) / linear.diagonal())
    np.testing.assert_allclose(moved, found + np.linalg.slogdet(linear)[1], rtol=1e-8)
    return found


@pytest.mark.parametrize("name", slow_but(LIKELIHOODS, "uniform", "categorical"))
def test_what_validation_refuses_has_no_density(name):
    fn, y, there = LIKELIHOODS[name]

    def model():
        x = numpyro.sample("x", dist.Normal())
        numpyro.sample("y", fn(jnp.stack((x, x))).to_event(1), obs=jnp.array([y, y]))

    with numpyro.validation_enabled(is_validate=False):
        found = densities(model, [[-2.0], [0.2], [2.0]])
    assert (found > -jnp.inf).tolist() == there


class Directions(dist.Distribution):
    """Angles of any number of turns, as a distribution of one's own may have for parameters."""

    arg_constraints = {"loc": dist.constraints.independent(dist.constraints.circular, 1)}
    support = dist.constraints.real_vector

    def __init__(self, loc):
        self.loc = loc
        super().__init__((), jnp.shape(loc), validate_args=False)


def test_of_angles_that_are_parameters_none_is_out_of_range():
    assert is_valid(Directions(jnp.array([4.0, 0.0])), None) is True


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


def one_row_alone():
    x = numpyro.sample("x", dist.Normal())
    with numpyro.plate("rows", 2):
        numpyro.sample("y", dist.Poisson(jnp.stack((jnp.ones_like(x), x))), obs=jnp.zeros(2))


def no_share():
    x = numpyro.sample("x", dist.Normal())
    numpyro.sample("y", dist.Categorical(shares(jnp.clip(x, 0.0, 1.0))), obs=0)


PARTS = {
    a_row_masked_out: [True, True, True],
    a_latent: [False, True, True],
    one_row_alone: [False, True, True],
    in_steps: [False, True, True],
    no_share: [True, True, False],
}


@pytest.mark.parametrize("model", slow_but(PARTS))
def test_where_sites_have_a_density(model):
    """Rows that masks leave out need none; a share may be zero, but not of what is seen."""
    z = [[x] + [0.3] * 2 * (model is a_latent) for x in (-2.0, 0.2, 2.0)]
    assert (densities(model, z) > -jnp.inf).tolist() == PARTS[model]


@pytest.mark.slow
@pytest.mark.parametrize(("before", "now"), [(1, 3), (3, 1)])
def test_a_plate_of_another_size_is_refused(before, now):
    def model(y):
        with numpyro.plate("rows", len(y)):
            x = numpyro.sample("x", dist.Normal())
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    guide, _, _ = known_guide(model, jnp.ones(before))
    for use in (
        lambda: module.log_density(guide, (jnp.ones(now),), {})(jnp.zeros(before)),
        lambda: handlers.seed(neutra(guide), KEY)(jnp.ones(now)),
    ):
        with pytest.raises(ValueError, match=r"expected site 'x' of shape .* train a new guide"):
            use()


def known_guide(model, *args, scale=0.6, **options):
    """A guide that is a Gaussian of given moments, and these."""
    guide = prepared(AutoInterpolant(model, **options), *args)
    transform = interpolant_transform(guide.latent_dim, (8, 8))
    loc, linear = torch.linspace(0.5, 1.0, guide.latent_dim), scale * torch.eye(guide.latent_dim)
    transform.flow.whitening.set(loc, linear)
    guide.posterior = from_torch(TorchDistribution(transform).freeze())
    return guide, loc.numpy(), linear.numpy()


@pytest.mark.slow
def test_the_model_in_the_base_space_of_a_guide():
    """The potential of NumPyro and the Jacobian, once, though the first site is in a plate."""
    y = jnp.array([1.0, 0.5, 0.0])
    guide, loc, linear = known_guide(in_plate, y)
    base, w = neutra(guide), jnp.array([0.3, -1.0, 0.2])
    density, trace = infer.util.log_density(base, (y,), {}, {"auto_shared_latent": w})
    z = loc + linear @ w
    expected = -guide._potential_fn({"x": z}) + 3 * np.log(0.6)
    np.testing.assert_allclose(density, expected, rtol=1e-10)
    assert trace["x"]["type"] == "deterministic"
    np.testing.assert_allclose(trace["x"]["value"], jnp.exp(z), rtol=1e-10)
    assert isinstance(guide.get_posterior({}), InterpolantDistribution)
    np.testing.assert_allclose(guide.get_transform({})(w), z, rtol=1e-10)
    observed = handlers.condition(in_plate, data={"x": jnp.ones(3)})
    guide.model = observed
    with pytest.raises(ValueError, match="expected site 'x' to be latent"):
        handlers.seed(neutra(guide), KEY)(y)
    guide.model = lambda y: None
    with pytest.raises(ValueError, match=r"got a model without \['x'\]"):
        handlers.seed(neutra(guide), KEY)(y)


def in_scan():
    scan(lambda x, _: (numpyro.sample("x", dist.Normal(x)), None), 0.0, None, length=2)


def in_cond():
    cond(True, *[lambda _: numpyro.sample("x", dist.Normal())] * 2, None)  # noqa: FBT003


@handlers.substitute(data={"x": jnp.zeros(())})
def in_substitute():
    numpyro.sample("x", dist.Normal())


@pytest.mark.filterwarnings("ignore:.*skipping initialization of site")
@pytest.mark.parametrize("model", slow_but([in_scan, in_cond, in_substitute], in_cond))
def test_sites_that_have_their_values_have_no_base_space_of_a_guide(model):
    guide, _, _ = known_guide(model)
    message = r"'x' has its value already, inside scan or cond or by substitute .* NUTS\(model\)"
    with pytest.raises(ValueError, match=message):
        handlers.seed(neutra(guide), KEY)()


@pytest.mark.slow
@pytest.mark.parametrize("mask", [None, jnp.arange(3) > 0])
def test_what_weighs_a_model_weighs_it_in_the_base_space_of_a_guide(mask):
    def weighed(target):
        target = target if mask is None else handlers.mask(target, mask)
        return handlers.scale(target, 0.25)

    y, w = jnp.array([1.0, 0.5, 0.0]), {"auto_shared_latent": jnp.array([0.3, -1.0, 0.2])}
    guide, _, _ = known_guide(in_plate, y)
    found, _ = infer.util.log_density(weighed(neutra(guide)), (y,), {}, w)
    guide.model = weighed(in_plate)
    expected, _ = infer.util.log_density(neutra(guide), (y,), {}, w)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


@pytest.mark.slow
def test_importance_weights():
    """Of a Gaussian against a Gaussian posterior, in closed form."""
    y = jnp.array([1.0, 1.0])
    guide, loc, _ = known_guide(conjugate, y)
    result = importance(guide, KEY, y, count=4000)
    chance = np.sqrt((4000 / result.ess - 1) / 4000)
    assert chance < result.log_evidence_stderr < 1.3 * chance  # the solver's part is there
    evidence = float(dist.Normal(0.0, np.sqrt(1.25)).log_prob(y).sum())
    assert abs(result.log_evidence - evidence) < 6 * result.log_evidence_stderr
    drawn = result.draws["x"]
    np.testing.assert_allclose(drawn.mean(0), loc, atol=0.05)
    posterior = dist.Normal(0.8 * y, np.sqrt(0.2)).to_event(1)
    expected = posterior.log_prob(drawn) - dist.Normal(loc, 0.6).to_event(1).log_prob(drawn)
    top = jnp.argsort(expected)[:-200]  # those that are not smoothed
    found = result.log_weights - result.log_weights[top[-1]]
    np.testing.assert_allclose(found[top], (expected - expected[top[-1]])[top], atol=1e-4)
    again = result.resampled(KEY, 3000)["x"]
    assert again.shape == (3000, 2)
    weighted = jnp.exp(result.log_weights) @ drawn
    np.testing.assert_allclose(again.mean(0), weighted, atol=0.02)
    for count in (0, 5.5):
        with pytest.raises(ValueError, match=f"count >= 1, a whole number, got {count}"):
            result.resampled(KEY, count)
    with pytest.raises(ValueError, match="count >= 100"):
        importance(guide, KEY, y, count=99)


def test_resampled_draws_are_in_random_order_and_places():
    draws = {"x": jnp.arange(20)}
    result = ImportanceResult(0.1, 20.0, 0.0, 0.0, "", jnp.full(20, -np.log(20)), draws)
    found = np.asarray(result.resampled(KEY)["x"])
    assert sorted(found) == list(range(20))
    assert (found != np.arange(20)).any()
    ones = [int(result.resampled(key, 1)["x"][0]) for key in jax.random.split(KEY, 5)]
    assert len(set(ones)) > 1


def test_draws_without_weight_are_not_resampled():
    none = ImportanceResult(
        np.inf, 0.0, -np.inf, 0.0, "", jnp.full(20, -jnp.inf), {"x": jnp.arange(20)}
    )
    with pytest.raises(ValueError, match="expected draws with positive weights, got none"):
        none.resampled(KEY)
    with pytest.raises(TypeError, match="a key of jax.random as the first argument, .* got int"):
        none.resampled(100)


@pytest.mark.slow
def test_weights_of_a_heavy_tail_and_of_a_coarse_solver_are_warned_of(monkeypatch):
    guide, _, _ = known_guide(conjugate, jnp.ones(2))
    z = jax.random.normal(KEY, (200, 2))
    found = z, jnp.abs(z[:, 0]) ** -2.0, jnp.zeros(200), 0.2
    monkeypatch.setattr(sampling, "_weighed", lambda *args: found)
    monkeypatch.setattr(sampling, "_constrained", lambda guide, z, *args: {"x": z})
    coarse = "too coarse: .* by 0.2 nats at doubled steps. Train it again by fit_guide"
    with pytest.warns(UserWarning, match="Poor"), pytest.warns(UserWarning, match=coarse):
        result = importance(guide, KEY, jnp.ones(2), count=200)
    assert result.k_hat > 0.7


def tiny_rates():
    numpyro.sample("x", dist.Gamma(0.04, 1.0))


def sure_of_one():
    numpyro.sample("x", dist.TransformedDistribution(dist.Normal(17.0, 1.0), SigmoidTransform()))


@pytest.mark.usefixtures("float32")
def test_a_density_that_is_not_finite_is_none():
    """As Pyro's side has it: numbers that are rounded to zero would be the largest weights."""

    def model():
        x = numpyro.sample("x", dist.HalfNormal(1.0))
        numpyro.factor("f", 1 / x)

    density = module.log_density(prepared(AutoInterpolant(model)), (), {})
    found = jax.vmap(density)(jnp.array([[-1.0], [-120.0], [jnp.nan]]))
    assert found[1:].tolist() == [-jnp.inf] * 2
    assert bool(jnp.isfinite(found[0]))


def far_apart():
    numpyro.sample("x", dist.HalfNormal(1.0))  # beyond the largest number nothing lies


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "loc", "is_told"),
    [(tiny_rates, -30.0, True), (sure_of_one, 17.0, True), (far_apart, 0.0, False)],
)
@pytest.mark.usefixtures("float32")
def test_draws_that_a_type_cannot_tell_from_an_edge_are_told_of(model, loc, is_told):
    """By importance, and by what ends the training."""
    guide = prepared(AutoInterpolant(model))
    transform = interpolant_transform(1, (8, 8))
    transform.flow.whitening.set(torch.full((1,), loc), torch.full((1, 1), 40.0))
    flow = TorchDistribution(transform).freeze()
    guide.posterior, density = from_torch(flow), module.TorchDensity(guide, (), {})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for verdict in (
            importance(guide, KEY, count=2000).verdict,
            importance_verdict(flow, density, Clock(None), 0, None).verdict,
        ):
            assert ("cannot tell values of 'x' from an edge" in verdict) == is_told


@pytest.mark.usefixtures("float32")
def test_numbers_that_move_there_and_back_and_densities_in_a_finer_type():
    def several():
        numpyro.sample("b", dist.Gamma(0.04, 1.0))
        numpyro.sample("a", dist.Normal(jnp.zeros(2), 1.0).to_event(1))

    density = module.TorchDensity(prepared(AutoInterpolant(several)), (), {})
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


@pytest.mark.slow
def test_importance_on_a_support_that_the_data_set():
    """The draws, as their weights, are those of the arguments that are given."""

    def bounded(y):
        x = numpyro.sample("x", dist.Uniform(0.0, y.max()))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y[0])

    guide, _, _ = known_guide(bounded, jnp.array([0.5, 1.0]), scale=3.0)
    result = importance(guide, KEY, jnp.array([0.5, 10.0]), count=20_000)
    x = jnp.linspace(0.0, 10.0, 10_001)
    posterior = jax.nn.softmax(dist.Normal(x, 1.0).log_prob(0.5))
    found = jnp.exp(result.log_weights) @ result.draws["x"]
    np.testing.assert_allclose(found, posterior @ x, atol=0.05)


@pytest.mark.slow
def test_the_base_space_of_a_guide_where_sites_are_given():
    """What is given from outside stays, in the model as it is; the base draw comes first."""
    y = jnp.array([1.0, 0.5, 0.0])
    guide, _, _ = known_guide(in_plate, y)
    base, x, w = neutra(guide), jnp.array([0.5, 1.0, 2.0]), jnp.zeros(3)
    for wrapped, name in (
        (handlers.condition(base, {"x": x}), "x"),
        (handlers.substitute(base, {"x": x}), "x"),
        (handlers.condition(handlers.scope(base, prefix="s"), {"s/x": x}), "s/x"),
    ):
        trace = handlers.trace(handlers.seed(wrapped, KEY)).get_trace(y)
        np.testing.assert_allclose(trace[name]["value"], x)
        assert "auto_shared_latent" not in str(list(trace))
    found = infer.log_likelihood(base, {"x": x[None]}, y)["y"]
    np.testing.assert_allclose(found[0], dist.Normal(jnp.log(x), 0.5).log_prob(y))
    both = infer.Predictive(base, {"x": x[None], "auto_shared_latent": w[None]})(KEY, y)
    expected = jnp.exp(guide.get_transform({})(w))
    np.testing.assert_allclose(both["x"][0], expected, rtol=1e-10)


@pytest.mark.slow
def test_the_base_draw_of_a_guide_has_the_prefix_of_the_guide():
    y = jnp.array([1.0, 0.5])
    guide, _, _ = known_guide(conjugate, y, prefix="own")
    base, w = neutra(guide), jnp.array([0.3, -1.0])
    trace = handlers.trace(handlers.substitute(base, {"own_shared_latent": w})).get_trace(y)
    assert list(trace) == ["own_shared_latent", "_x_log_prob", "x", "y", "own_log_jacobian"]
    both = {"own_shared_latent": w, "x": jnp.ones(2)}
    again = handlers.trace(handlers.condition(base, both)).get_trace(y)
    np.testing.assert_array_equal(again["x"]["value"], trace["x"]["value"])


@pytest.fixture(scope="module")
def trained():
    guide = AutoInterpolant(conjugate, hidden_dims=(16, 16))
    return guide, fit_guide(
        guide, KEY, jnp.array([1.0, -2.0]), **QUICK, options={"rounds": 3, "steps": 100}
    )


# How far a guide comes in the seconds it is given is the machine's business.
timed = pytest.mark.filterwarnings("ignore:Poor:UserWarning")


@pytest.mark.slow
@timed
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
@timed
def test_where_numpyro_takes_a_guide(trained):
    guide, result = trained
    y = jnp.array([1.0, -2.0])
    svi = infer.SVI(conjugate, guide, numpyro.optim.Adam(0.01), infer.Trace_ELBO(100))
    loss = float(svi.evaluate(svi.init(KEY, y), y))
    assert abs(loss + result.log_evidence) < 0.1  # the bound is nearly the evidence
    neutra = NeuTraReparam(guide, {})
    kernel = infer.NUTS(neutra.reparam(conjugate))
    mcmc = infer.MCMC(kernel, num_warmup=200, num_samples=500, progress_bar=False)
    mcmc.run(KEY, y)
    z = mcmc.get_samples()["auto_shared_latent"]
    np.testing.assert_allclose(z.std(0), 1.0, atol=0.2)  # the posterior is the base
    x = neutra.transform_sample(z)["x"]
    np.testing.assert_allclose(x.mean(0), [0.8, -1.6], atol=0.1)


@pytest.mark.slow
@timed
def test_training_on_draws():
    y = jnp.array([1.0, -2.0])
    draws = jnp.array([0.8, -1.6]) + np.sqrt(0.2) * jax.random.normal(KEY, (3000, 2))
    guide = AutoInterpolant(conjugate, hidden_dims=(16, 16))
    result = fit_guide(
        guide, KEY, y, samples={"x": draws, "other": draws}, **QUICK, options={"steps": 100}
    )
    assert result.ess > 0.9 * result.draws
    assert isinstance(result, GuideResult)


@pytest.mark.parametrize("samples", [None, {"x": jnp.zeros((9, 2))}], ids=["model", "samples"])
def test_settings_reach_the_training_and_the_seed_the_verdict(samples, monkeypatch):
    seen = {}

    def trained(posterior, *args, **settings):
        seen["dims"] = [len(layer.weight) for layer in posterior.transform.flow.velocity.layers]
        seen.update(settings)
        return "trained"

    def judged(posterior, density, clock, seed, training):
        seen["verdict"] = seed, training

    monkeypatch.setattr("pyro_interpolant.infer.train_from_density", trained)
    monkeypatch.setattr("pyro_interpolant.training.fit", trained)
    monkeypatch.setattr("pyro_interpolant.infer.importance_sampling.importance_verdict", judged)
    monkeypatch.setattr(module, "_prior_draws", lambda *args: torch.zeros(5, 2))
    own = torch.ones(7, 2)
    guide = AutoInterpolant(conjugate, hidden_dims=(5, 6))
    options = {"ema": 0.9} if samples else {"start": own}
    fit_guide(guide, KEY, jnp.ones(2), samples=samples, seed=3, progress=False, options=options)
    assert seen["dims"] == [5, 6]
    assert seen["seed"] == 3
    assert seen["verdict"] == (3, "trained")
    assert seen["progress"] is False
    assert all(seen[name] is value for name, value in options.items())


@pytest.mark.parametrize("call", [fit_guide, importance])
@pytest.mark.parametrize("key", [jnp.ones(2), torch.ones(2), 0, {"y": 1}, jax.random.split(KEY)])
def test_a_key_that_was_forgotten_is_asked_for(call, key):
    with pytest.raises(TypeError, match="expected a key of jax.random as the second argument"):
        call(AutoInterpolant(conjugate), key)


def test_both_kinds_of_key_are_taken():
    for key in (KEY, jax.random.PRNGKey(0), np.zeros(2, np.uint32)):
        module.check_key(key)
    jax.jit(module.check_key)(KEY)


@pytest.mark.parametrize("fn", [dist.Bernoulli(0.5), dist.Poisson(3.0)])
def test_a_discrete_site_is_named(fn):
    def model():
        k = numpyro.sample("k", fn, infer={"enumerate": "parallel"})
        numpyro.sample("x", dist.Normal(k, 1.0))

    with pytest.raises(ValueError, match="continuous latent sites, got the discrete site 'k'"):
        fit_guide(AutoInterpolant(model), KEY, **QUICK)


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_value_that_is_sampled_is_named(shape):
    def model():
        value = numpyro.sample("b", dist.Delta(0.5).expand(shape).to_event())
        numpyro.sample("x", dist.Normal(value, 1.0).to_event())

    with pytest.raises(ValueError, match=r"'b' .*numpyro\.deterministic"):
        fit_guide(AutoInterpolant(model), KEY, **QUICK)


def test_draws_off_a_support_are_refused_by_site():
    def model():
        numpyro.sample("a", dist.Normal())
        numpyro.sample("s", dist.HalfNormal(1.0))

    draws = {"a": jnp.zeros((2, 5)), "s": jnp.ones((2, 5)).at[0, 3].set(-1.0)}
    message = r"site 's' strictly inside its support Positive.*got 1 of 10 .*being draw 3"
    with pytest.raises(ValueError, match=message):
        fit_guide(AutoInterpolant(model), KEY, samples=draws, **QUICK)


def test_draws_beside_a_support_are_refused_though_their_inverse_is_finite():
    def model():
        numpyro.sample("shares", dist.Dirichlet(jnp.ones(3)))

    draws = jnp.full((7, 3), 1 / 3).at[2].set(0.3)
    message = r"site 'shares' strictly inside its support.*got 1 of 7 .*being draw 2"
    with pytest.raises(ValueError, match=message):
        fit_guide(AutoInterpolant(model), KEY, samples={"shares": draws}, **QUICK)


def test_draws_are_by_site_and_there_are_some():
    guide, y = AutoInterpolant(conjugate), jnp.ones(2)
    with pytest.raises(TypeError, match=r"each site \['x'\] by name, as .* gives them, got "):
        fit_guide(guide, KEY, y, samples=jnp.zeros((9, 2)), **QUICK)
    with pytest.raises(ValueError, match="expected draws of every site, got none"):
        fit_guide(guide, KEY, y, samples={"x": jnp.zeros((0, 2))}, **QUICK)


def test_the_seed_is_that_of_the_first_weights_too(monkeypatch):
    seen = []

    def trained(posterior, *args, **settings):
        seen.append(posterior.transform.velocity.layers[0].weight.detach().clone())
        raise ArithmeticError

    monkeypatch.setattr("pyro_interpolant.training.fit", trained)
    guide, samples = AutoInterpolant(conjugate), {"x": jnp.zeros((9, 2))}
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        with pytest.raises(ArithmeticError):
            fit_guide(guide, KEY, jnp.ones(2), samples=samples, **QUICK)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*seen)


def test_weights_are_of_a_model_with_the_latent_sites_of_the_guide():
    def model(x=None, y=None):
        x = numpyro.sample("x", dist.Normal(), obs=x)
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    guide, _, _ = known_guide(model, None, 1.0)
    with pytest.raises(ValueError, match=r"expected sites \['x'\] to be latent, as when"):
        importance(guide, KEY, 0.5, 1.0)
    with pytest.raises(ValueError, match=r"got a model with \['y'\] besides and without \[\]"):
        importance(guide, KEY)
    guide.model = lambda: numpyro.sample("z", dist.Normal())
    with pytest.raises(ValueError, match=r"with \['z'\] besides and without \['x'\]"):
        importance(guide, KEY)
