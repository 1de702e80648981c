"""Inference with learned priors, likelihoods and guides, against importance sampling."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import torch
from cases import slow_but
from kinds import family, plain, supported
from numpyro import handlers, infer
from numpyro.infer import autoguide
from numpyro.infer.reparam import NeuTraReparam
from pyro.distributions import constraints

from pyro_interpolant import from_samples, save
from pyro_interpolant.numpyro import base_space

KEY = jax.random.key(0)
Y, SIGMA = 0.7, 0.5


@pytest.fixture(scope="module")
def prior(twin):
    torch.manual_seed(0)
    return twin(plain().freeze())


def model(prior):
    z = numpyro.sample("z", prior)
    numpyro.sample("y", dist.Normal(z.sum(-1), SIGMA), obs=Y)


@pytest.fixture(scope="module")
def expected(prior):
    """Mean and standard deviation under the posterior, by importance sampling."""
    z = prior.sample(KEY, (100_000,))
    weights = jax.nn.softmax(dist.Normal(z.sum(-1), SIGMA).log_prob(Y))
    mean = weights @ z
    return mean, jnp.sqrt(weights @ (z - mean) ** 2)


def assert_posterior(z, expected, error=0.15):
    mean, std = expected
    np.testing.assert_allclose((z.mean(0) - mean) / std, 0, atol=error)
    np.testing.assert_allclose(z.std(0) / std, 1, atol=2 * error)


def run(kernel, *args, warmup=300, samples=700, **options):
    options = {"num_warmup": warmup, "num_samples": samples, "progress_bar": False, **options}
    mcmc = infer.MCMC(kernel, **options)
    mcmc.run(KEY, *args)
    return mcmc


SPACES = {"data": lambda model: model, "base": base_space}


@pytest.mark.parametrize("space", slow_but(SPACES))
def test_nuts(space, prior, expected):
    """The prior is an argument of the model, and of the compiled run."""
    mcmc = run(infer.NUTS(SPACES[space](model)), prior)
    assert_posterior(mcmc.get_samples()["z"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sequential", "vectorized"])
def test_chains(method, prior, expected):
    mcmc = run(infer.NUTS(base_space(model)), prior, num_chains=2, chain_method=method)
    assert mcmc.get_samples(group_by_chain=True)["z"].shape == (2, 700, 2)
    assert_posterior(mcmc.get_samples()["z"], expected)


KERNELS = {
    "HMC": lambda m: infer.HMC(m, trajectory_length=2.0),
    "SA": infer.SA,
    "BarkerMH": infer.BarkerMH,
    "NUTS, forward mode": lambda m: infer.NUTS(m, forward_mode_differentiation=True),
    "NUTS, by value": lambda m: infer.NUTS(
        m, init_strategy=infer.init_to_value(values={"z": jnp.array([0.5, 0.1])})
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.filterwarnings("ignore:.*skipping initialization of site")
def test_kernels(name, prior, expected):
    bound = functools.partial(model, prior)
    count = 12_000 if name in ("SA", "BarkerMH") else 700
    mcmc = run(KERNELS[name](base_space(bound)), warmup=count // 2, samples=count)
    assert_posterior(mcmc.get_samples()["z"], expected, error=0.25)


@pytest.mark.slow
def test_subsamples_of_data(prior):
    """Hamiltonian Monte Carlo with energy conserving subsampling."""
    data = Y + SIGMA * jax.random.normal(KEY, (50,))

    def many(prior):
        z = numpyro.sample("z", prior)
        with numpyro.plate("n", 50, subsample_size=10):
            numpyro.sample("y", dist.Normal(z.sum(-1), 5.0), obs=numpyro.subsample(data, 0))

    inner = infer.NUTS(base_space(many))
    kernel = infer.HMCECS(inner, num_blocks=5)
    mcmc = run(kernel, prior, warmup=300, samples=1500)
    draws = mcmc.get_samples()["z"]
    z = prior.sample(KEY, (20_000,))
    log_prob = dist.Normal(z.sum(-1)[:, None], 5.0).log_prob(data).sum(-1)
    weights = jax.nn.softmax(log_prob)
    mean = weights @ z
    assert_posterior(draws, (mean, jnp.sqrt(weights @ (z - mean) ** 2)), error=0.35)


@pytest.mark.slow
def test_a_positive_prior(twin):
    prior = twin(supported("positive").freeze())
    z = prior.sample(KEY, (20_000,))
    weights = jax.nn.softmax(dist.Normal(z.sum(-1), 0.5).log_prob(2.0))
    mean = weights @ z

    def positive(prior):
        z = numpyro.sample("z", prior)
        numpyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=2.0)

    for space in SPACES.values():
        draws = run(infer.NUTS(space(positive)), prior).get_samples()["z"]
        assert bool((draws > 0).all())
        std = jnp.sqrt(weights @ (z - mean) ** 2)
        np.testing.assert_allclose((draws.mean(0) - mean) / std, 0, atol=0.2)


@pytest.mark.slow
def test_a_learned_likelihood(twin):
    """A conditional flow whose context is latent."""
    likelihood = twin(family().freeze())
    observed = jnp.array([[0.2, 0.1], [0.3, -0.4]])

    def inverse(likelihood):
        c = numpyro.sample("c", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        with numpyro.plate("n", 2):
            numpyro.sample("x", likelihood.condition(c), obs=observed)

    draws = run(infer.NUTS(inverse), likelihood).get_samples()["c"]
    c = jax.random.normal(KEY, (5000, 3))
    log_prob = likelihood.condition(c[:, None]).log_prob(observed).sum(-1)
    weights = jax.nn.softmax(log_prob)
    mean = weights @ c
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.2)
    samples = infer.log_likelihood(inverse, {"c": draws[:5]}, likelihood)["x"]
    assert samples.shape == (5, 2)


GUIDES = {
    name: getattr(autoguide, name)
    for name in (
        "AutoNormal",
        "AutoDiagonalNormal",
        "AutoMultivariateNormal",
        "AutoLowRankMultivariateNormal",
        "AutoLaplaceApproximation",
        "AutoIAFNormal",
        "AutoBNAFNormal",
        "AutoDelta",
        "AutoDAIS",
    )
}


# Nearly all of the time of a guide is compiling it: one layer of each, and few weights.
SMALL = {
    "AutoIAFNormal": {"num_flows": 1},
    "AutoBNAFNormal": {"num_flows": 1, "hidden_factors": [2]},
    "AutoDAIS": {"K": 2},
}


DATA_SPACE = ("AutoNormal", "AutoLaplaceApproximation", "AutoIAFNormal")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "space"),
    [*((name, "base") for name in GUIDES), *((name, "data") for name in DATA_SPACE)],
)
def test_autoguides(name, space, prior):
    """Each trains, and draws on the support."""
    bound = SPACES[space](functools.partial(model, prior))
    guide = GUIDES[name](bound, **SMALL.get(name, {}))
    svi = infer.SVI(bound, guide, numpyro.optim.Adam(0.02), infer.Trace_ELBO())
    result = svi.run(KEY, 200, progress_bar=False)
    assert np.isfinite(result.losses).all()
    assert result.losses[-20:].mean() < result.losses[:20].mean()
    draws = jax.jit(lambda p: guide.sample_posterior(KEY, p, sample_shape=(5,)))(result.params)
    draws = infer.Predictive(bound, draws, return_sites=["z"])(KEY)["z"]
    assert draws.shape == (5, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss", [infer.Trace_ELBO(), infer.TraceMeanField_ELBO(), infer.RenyiELBO(num_particles=2)]
)
def test_a_flow_as_its_own_guide(loss, prior):
    """The prior as guide of itself: the evidence lower bound is that of the likelihood alone."""

    def guide(prior):
        numpyro.sample("z", prior)

    svi = infer.SVI(model, guide, numpyro.optim.Adam(0.01), loss)
    state = svi.init(KEY, prior)
    value = svi.evaluate(state, prior)
    assert np.isfinite(value)


@pytest.mark.slow
def test_neutra(prior, expected):
    bound = base_space(functools.partial(model, prior))
    guide = autoguide.AutoIAFNormal(bound, num_flows=1)
    svi = infer.SVI(bound, guide, numpyro.optim.Adam(0.02), infer.Trace_ELBO())
    params = svi.run(KEY, 500, progress_bar=False).params
    neutra = NeuTraReparam(guide, params)
    mcmc = run(infer.NUTS(neutra.reparam(bound)))
    shared = mcmc.get_samples()["auto_shared_latent"]
    draws = {"z_base": neutra.transform_sample(shared)["z_base"]}
    z = infer.Predictive(bound, draws, return_sites=["z"])(KEY)["z"]
    assert_posterior(z, expected)


@pytest.mark.slow
def test_in_a_plate(prior, expected):
    """Each of many has the same posterior as one."""

    def many(prior):
        with numpyro.plate("n", 3):
            z = numpyro.sample("z", prior)
            numpyro.sample("y", dist.Normal(z.sum(-1), SIGMA), obs=jnp.full(3, Y))

    draws = run(infer.NUTS(base_space(many)), prior).get_samples()["z"]
    for i in range(3):
        assert_posterior(draws[:, i], expected)


@pytest.mark.slow
def test_predictive_in_parallel(prior):
    bound = functools.partial(model, prior)
    found = [
        infer.Predictive(bound, num_samples=4, parallel=parallel)(KEY)["z"]
        for parallel in (True, False)
    ]
    np.testing.assert_allclose(*found, rtol=1e-8)
    draws = infer.Predictive(bound, num_samples=6, batch_ndims=1)(KEY)["z"].reshape(2, 3, 2)
    log_prob = infer.Predictive(bound, {"z": draws}, batch_ndims=2)(KEY)["y"]
    assert log_prob.shape == (2, 3)


@pytest.mark.slow
def test_one_solve_of_a_bound(prior):
    """A trace of the guide hands its intermediates on: a flow as guide is solved once."""
    trace = handlers.trace(handlers.seed(model, KEY)).get_trace(prior)
    site = trace["z"]
    assert site["intermediates"]
    found = site["fn"].log_prob(site["value"], site["intermediates"])
    np.testing.assert_allclose(found, prior.log_prob(site["value"]), atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [jnp.asarray, np.asarray], ids=["jax", "numpy"])
def test_the_draws_of_numpyro_become_a_prior(kind, twin):
    """Yesterday's posterior, sampled by NumPyro, is learned and serves as a prior there."""

    def earlier():
        numpyro.sample("slope", dist.Normal(1.0, 0.5))
        numpyro.sample("scale", dist.LogNormal(jnp.zeros(2), 0.3).to_event(1))

    draws = infer.Predictive(earlier, num_samples=600)(KEY)
    draws = {name: kind(value) for name, value in draws.items()}
    flow = from_samples(
        draws, support={"scale": constraints.positive}, seed=0, steps=50, progress=False
    )
    again = twin(flow).sample_dict(KEY, (2000,))
    assert again["scale"].shape == (2000, 2)
    for name, value in draws.items():
        np.testing.assert_allclose(again[name].mean(0), value.mean(0), atol=0.15)


def test_draws_by_chain_have_to_be_joined():
    """Which dimensions are a site's own is not known: joined by the sampler they serve."""
    by_chain = {"z": np.zeros((2, 700, 2))}
    with pytest.raises(ValueError, match=r"get_samples\(group_by_chain=False\)"):
        from_samples(by_chain, seed=0, progress=False)


@pytest.mark.slow
def test_the_kernels_of_blackjax(prior, expected):
    """On the potential energy that NumPyro makes of a model."""
    blackjax = pytest.importorskip("blackjax")
    info = infer.util.initialize_model(KEY, base_space(model), model_args=(prior,))

    def log_density(z):
        return -info.potential_fn(z)

    warmup = blackjax.window_adaptation(blackjax.nuts, log_density)
    (state, parameters), _ = warmup.run(KEY, info.param_info.z, num_steps=300)
    kernel = blackjax.nuts(log_density, **parameters)

    def step(state, key):
        state, _ = kernel.step(key, state)
        return state, state.position

    _, positions = jax.lax.scan(step, state, jax.random.split(KEY, 700))
    draws = jax.vmap(info.postprocess_fn)(positions)
    assert_posterior(draws["z"], expected)


@pytest.mark.slow
def test_chains_in_parallel(tmp_path):
    save(plain().freeze(), tmp_path / "prior.safetensors")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("parallel_chains.py"), "prior.safetensors"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 50, 2)"
