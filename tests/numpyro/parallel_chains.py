"""Run by a test in a process of its own: chains on two devices of the host."""

import sys

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro.infer import MCMC, NUTS

from pyro_interpolant.numpyro import base_space, load

numpyro.set_host_device_count(2)
prior = load(sys.argv[1], dtype="float32")


def model(prior):
    z = numpyro.sample("z", prior)
    numpyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=jnp.array(0.7))


options = {"num_warmup": 5, "num_samples": 5, "num_chains": 2, "progress_bar": False}
mcmc = MCMC(NUTS(base_space(model)), chain_method="parallel", **options)
mcmc.run(jax.random.key(0), prior)
print(mcmc.get_samples(group_by_chain=True)["z"].shape)
