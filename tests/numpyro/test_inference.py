"""Inference with learned priors, against importance sampling."""

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
from kinds import plain, supported
from numpyro import handlers, infer
from numpyro.infer.autoguide import AutoMultivariateNormal
from pyro.distributions import constraints

from pyro_interpolant import from_samples, save
from pyro_interpolant.numpyro import base_space, from_torch

KEY = jax.random.key(0)
Y, SIGMA = 0.7, 0.5


def model(prior):
    z = numpyro.sample("z", prior)
    numpyro.sample("y", dist.Normal(z.sum(-1), SIGMA), obs=Y)


def known(make):
    """A prior; the evidence, and mean and standard deviation of the posterior, by its draws."""
    torch.manual_seed(0)
    prior = from_torch(make().freeze())
    z = prior.sample(KEY, (100_000,))
    likelihoods = dist.Normal(z.sum(-1), SIGMA).log_prob(Y)
    weights = jax.nn.softmax(likelihoods)
    mean = weights @ z
    std = jnp.sqrt(weights @ (z - mean) ** 2)
    evidence = jax.nn.logsumexp(likelihoods) - np.log(len(z))
    return prior, mean, std, evidence, likelihoods


@pytest.fixture(scope="module")
def real():
    return known(plain)


def assert_posterior(z, mean, std, error=0.15):
    np.testing.assert_allclose((z.mean(0) - mean) / std, 0, atol=error)
    np.testing.assert_allclose(z.std(0) / std, 1, atol=2 * error)


def run(kernel, prior, **options):
    mcmc = infer.MCMC(kernel, num_warmup=300, num_samples=700, progress_bar=False, **options)
    mcmc.run(KEY, prior)
    return mcmc


@pytest.mark.slow
def test_nuts_in_base_space_in_a_plate(real):
    """Two chains at once; each member of the plate has the posterior of one."""
    prior, mean, std, *_ = real

    def many(prior):
        with numpyro.plate("n", 2):
            model(prior)

    mcmc = run(infer.NUTS(base_space(many)), prior, num_chains=2, chain_method="vectorized")
    assert mcmc.get_samples(group_by_chain=True)["z"].shape == (2, 700, 2, 2)
    for i in range(2):
        assert_posterior(mcmc.get_samples()["z"][:, i], mean, std)


@pytest.mark.slow
def test_nuts_on_a_support():
    """The prior is an argument of the model, and of the compiled run."""
    prior, mean, std, *_ = known(lambda: supported("positive"))
    draws = run(infer.NUTS(model), prior).get_samples()["z"]
    assert bool((draws > 0).all())
    assert_posterior(draws, mean, std)


@pytest.mark.slow
def test_chains_in_parallel(tmp_path):
    """In a process of its own, which has two devices."""
    save(plain().freeze(), tmp_path / "prior.safetensors")
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("parallel_chains.py"), "prior.safetensors"],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 5, 2)"


@pytest.mark.slow
def test_a_guide_of_numpyro_learns_a_bound(real):
    prior, mean, std, evidence, _ = real
    bound = base_space(functools.partial(model, prior))
    guide = AutoMultivariateNormal(bound)
    svi = infer.SVI(bound, guide, numpyro.optim.Adam(0.05), infer.Trace_ELBO(4))
    result = svi.run(KEY, 150, progress_bar=False)
    last = -result.losses[-50:]
    error = 5 * last.std() / 50**0.5
    assert evidence - 0.3 < last.mean() < evidence + error
    draws = guide.sample_posterior(KEY, result.params, sample_shape=(2000,))
    z = infer.Predictive(bound, draws, return_sites=["z"])(KEY)["z"]
    assert_posterior(z, mean, std, error=0.25)


def test_a_flow_as_its_own_guide(real):
    """The bound is that of the likelihood alone, of draws that are solved once."""
    prior, *_, likelihoods = real

    def guide(prior):
        numpyro.sample("z", prior)

    error = 5 * likelihoods.std() / 1000**0.5
    for loss in (infer.Trace_ELBO(1000), infer.TraceMeanField_ELBO(1000)):
        svi = infer.SVI(model, guide, numpyro.optim.Adam(0.01), loss)
        value = svi.evaluate(svi.init(KEY, prior), prior)
        np.testing.assert_allclose(-value, likelihoods.mean(), atol=error)
    site = handlers.trace(handlers.seed(model, KEY)).get_trace(prior)["z"]
    found = site["fn"].log_prob(site["value"], site["intermediates"])
    np.testing.assert_allclose(found, prior.log_prob(site["value"]), atol=1e-2)


@pytest.mark.slow
def test_the_draws_of_numpyro_become_a_prior():
    """Yesterday's posterior, sampled by NumPyro, is learned and serves as a prior there."""

    def earlier():
        numpyro.sample("slope", dist.Normal(1.0, 0.5))
        numpyro.sample("scale", dist.LogNormal(jnp.zeros(2), 0.3).to_event(1))

    draws = infer.Predictive(earlier, num_samples=600)(KEY)
    options = {"seed": 0, "steps": 50, "progress": False}
    flow = from_samples(draws, support={"scale": constraints.positive}, **options)
    again = from_torch(flow).sample_dict(KEY, (2000,))
    assert again["scale"].shape == (2000, 2)
    for name, value in draws.items():
        np.testing.assert_allclose(again[name].mean(0), value.mean(0), atol=0.15)


def test_draws_by_chain_have_to_be_joined():
    """Which dimensions are a site's own is not known: joined by the sampler they serve."""
    by_chain = {"z": np.zeros((2, 700, 2))}
    with pytest.raises(ValueError, match=r"get_samples\(group_by_chain=False\)"):
        from_samples(by_chain, seed=0, progress=False)
