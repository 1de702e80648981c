"""Four targets of ``posteriors.py``, and the one of its smoke run, as models of NumPyro."""

import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import torch
from _posteriors import FILES
from numpyro.infer import init_to_feasible

import pyro_interpolant as pi


def flat(size=None):
    """Return a flat prior, of a positive scalar or of a vector of a given size, to start from."""
    if size is None:
        return dist.LogNormal(0.0, 1.0).mask(mask=False)
    return dist.Normal(jnp.zeros(size), 1.0).to_event(1).mask(mask=False)


def smoke():
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    numpyro.sample("x", dist.Normal(jnp.log(scale), 1.0))


def eight_schools(y, sigma, **_):  # centred: a funnel
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("schools", 8):
        theta = numpyro.sample("theta", dist.Normal(mu, tau))
        numpyro.sample("y", dist.Normal(theta, sigma), obs=y)


def arma(y, **_):
    mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = numpyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = numpyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = numpyro.sample("sigma", dist.HalfCauchy(2.5))

    def error(before, pair):
        last, this = pair
        now = this - (mu + phi * last + theta * before)
        return now, now

    first = y[0] - (mu + phi * mu)
    _, errors = jax.lax.scan(error, first, (y[:-1], y[1:]))
    with numpyro.plate("times", len(y)):
        # The errors are independent, and their Jacobian is one.
        mean = y - jnp.concatenate((first[None], errors))
        numpyro.sample("y", dist.Normal(mean, sigma), obs=y)


def kilpisjarvi(x, y, pmualpha, psalpha, pmubeta, psbeta, **_):
    alpha = numpyro.sample("alpha", dist.Normal(pmualpha, psalpha))
    beta = numpyro.sample("beta", dist.Normal(pmubeta, psbeta))
    sigma = numpyro.sample("sigma", flat())
    with numpyro.plate("years", len(y)):
        numpyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)


def mesquite(weight, group, **sizes):
    names = ("diam1", "diam2", "canopy_height", "total_height", "density")
    logs = [jnp.log(sizes[name]) for name in names]
    x = jnp.stack((jnp.ones_like(logs[0]), *logs, group), 1)
    beta = numpyro.sample("beta", flat(7))
    sigma = numpyro.sample("sigma", flat())
    with numpyro.plate("rows", len(weight)):
        numpyro.sample("y", dist.Normal(x @ beta, sigma), obs=jnp.log(weight))


MODELS = {f.__name__: f for f in (smoke, eight_schools, arma, kilpisjarvi, mesquite)}


def fitted(name, folder, seconds, count):
    """Return draws of a guide by site, (count, *site_shape), log weights, and what is reported."""
    data = {}
    if name in FILES:
        with np.load(folder / f"{FILES[name]}.npz") as file:
            raw = json.loads(str(file["data"]))
        data = {k: jnp.array(v, float) if isinstance(v, list) else v for k, v in raw.items()}
    guide = pi.numpyro.AutoInterpolant(MODELS[name], init_loc_fn=init_to_feasible)
    key = jax.random.key(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a poor k-hat: it is in the table
        result = pi.numpyro.fit_guide(
            guide, key, max_seconds=seconds, seed=0, progress=False, **data
        )
        weighed = pi.numpyro.importance(guide, jax.random.key(1), count=count, **data)
    extra = {
        "log_evidence": result.log_evidence,
        "log_evidence_stderr": result.log_evidence_stderr,
    }
    extra |= {"rounds": len(result.training.rounds), "k_hat": result.k_hat}
    draws = {k: torch.tensor(np.asarray(v)) for k, v in weighed.draws.items()}
    raw = torch.tensor(np.asarray(weighed.log_weights)) + math.log(count) + weighed.log_evidence
    return draws, raw.double(), extra
