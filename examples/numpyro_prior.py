"""Measure the distances of 600 stars by NUTS in NumPyro, all in one jitted run.

The catalogue is that of stellar_distances.py, the prior that of its stars of precise parallaxes,
through the file stars.safetensors. Each star has a chain of its own: lax.map runs one compiled
sampler over all. Colours are measured well, so the chains run in data space: in base space
(--space base) the posterior is a thin bent ridge, where NUTS diverges. (Extra `numpyro`.)
"""

import argparse
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import pyro
import stellar_distances as stars
import torch
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS

import pyro_interpolant as pi

FILE = "stars.safetensors"


def precise():
    """Return magnitude, colour, its error and absolute magnitude of stars of good parallaxes."""
    (colour, parallax), (magnitude, error, uncertainty) = (part.T for part in stars.catalogue())
    good = (parallax > stars.GOOD * uncertainty) & (error < 10)
    colour = colour + 0.001 * (torch.rand(len(colour)) - 0.5)  # rounded ones have no density
    absolute = magnitude + 5 * parallax.clamp(min=1e-9).log10() - 10
    return magnitude[good], colour[good], error[good], absolute[good]


def observed(count, steps):
    """Learn the prior and save it; return noisy observations of stars that it has not seen."""
    magnitude, colour, colour_error, absolute = precise()
    known = torch.stack((colour, absolute), -1)
    test, train = torch.randperm(len(known)).split((count, len(known) - count))
    pi.save(pi.from_samples(known[train], steps=steps, seed=0), FILE)
    exact = stars.parallax_of(absolute[test], magnitude[test])
    error = exact.roll(1) / 2  # of another star: half of its own parallax would tell it
    noisy = exact + error * torch.randn(count)
    return magnitude[test], colour[test], colour_error[test], noisy, error


def model(prior, magnitude, colour, colour_error, parallax, parallax_error):
    """Draw a star's colour and absolute magnitude from the learned prior; observe it."""
    star = numpyro.sample("star", prior)
    numpyro.sample("colour", dist.Normal(star[0], colour_error), obs=colour)
    expected = stars.parallax_of(star[1], magnitude)
    numpyro.sample("parallax", dist.Normal(expected, parallax_error), obs=parallax)


def nuts(space, data, draws):
    """Return posterior draws of each star, (stars, draws, 2), and how many of its steps diverged.

    All stars in one program: what is compiled for one serves them all.
    """
    prior = pi.numpyro.load(FILE)
    kernel = NUTS(pi.numpyro.base_space(model) if space == "base" else model, dense_mass=True)

    def of_one(star):
        key, *data = star
        mcmc = MCMC(kernel, num_warmup=draws, num_samples=draws, progress_bar=False)
        mcmc.run(key, prior, *data, extra_fields=("diverging",))
        return mcmc.get_samples()["star"], mcmc.get_extra_fields()["diverging"].sum()

    columns = (jnp.asarray(column.numpy()) for column in data)
    arguments = (jax.random.split(jax.random.key(0), len(data[0])), *columns)
    start = time.monotonic()
    run = jax.jit(lambda stars: jax.lax.map(of_one, stars)).lower(arguments).compile()
    compiled = time.monotonic()
    draws, diverged = (np.asarray(part) for part in run(arguments))
    print(f"compiled in {compiled - start:.0f} s, run in {time.monotonic() - compiled:.0f} s")
    return draws, diverged


def has_two_modes(values, weights):
    """Return whether weighted magnitudes of one star lie in two heaps."""
    heights, _ = np.histogram(values, bins=np.linspace(-8, 16, 49), weights=weights)
    smooth = np.convolve(heights, (0.25, 0.5, 0.25), "same")
    before, after = (np.maximum.accumulate(h) for h in (smooth, smooth[::-1]))
    lower = np.minimum(before, after[::-1])  # of the heaps on either side of each bin
    return bool((smooth < 0.5 * lower)[lower > 0.1 * smooth.max()].any())


def table(draws, star, weights):
    """Print how far the means of NUTS are from those of importance sampling; return who has two.

    In standard deviations of the posterior, and in standard errors of the difference.
    """
    effective = np.array([effective_sample_size(d[None]) for d in draws])[:, 1]
    draws = draws[..., 1]
    magnitude, w = star[..., 1].numpy(), weights.numpy()
    mean, count = (w * magnitude).sum(0), 1 / (w**2).sum(0)
    sd = np.sqrt((w * (magnitude - mean) ** 2).sum(0))
    off = (draws.mean(1) - mean) / sd
    errors = off / np.sqrt(1 / effective + 1 / count)
    two = np.array([has_two_modes(m, p) for m, p in zip(magnitude.T, w.T, strict=True)])
    print("\n| stars | effective draws | off, median | worst [sd] | within 2 standard errors |")
    print("| --- | --- | --- | --- | --- |")
    for name, those in (("one mode", ~two), ("two modes", two)):
        if those.any():
            cells = (f"{np.median(effective[those]):.0f}", f"{np.median(abs(off[those])):.2f}")
            cells += (f"{abs(off[those]).max():.2f}", f"{(abs(errors[those]) < 2).mean():.0%}")
            print(f"| {those.sum()} of {name} | {' | '.join(cells)} |")
    return mean, sd, two


def picture(path, draws, mean, sd, two):
    """Draw means and standard deviations by both, of absolute magnitudes."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4.5), constrained_layout=True)
    found = (draws[..., 1].mean(1), draws[..., 1].std(1))
    for ax, ours, theirs, title in zip(axes, found, (mean, sd), ("mean", "sd"), strict=True):
        ax.axline((theirs.min(), theirs.min()), slope=1, color="0.7", lw=1)
        for those, color, label in ((~two, "k", "one mode"), (two, "r", "two modes")):
            ax.plot(theirs[those], ours[those], f"{color}.", ms=3, label=label)
        ax.set(title=f"posterior {title} of the absolute magnitude", ylabel="NUTS")
        ax.set(xlabel="importance sampling")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--space", choices=("data", "base"), default="data", help="of chains")
    parser.add_argument("--picture", default="numpyro_prior.png", help="the file to write")
    args = parser.parse_args()
    steps, count, draws = (20, 4, 20) if args.smoke else (5000, 600, 400)
    start = time.monotonic()
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    data = observed(count, steps)
    print(f"learned in {time.monotonic() - start:.0f} s")
    found, diverged = nuts(args.space, data, draws)
    print(f"{diverged.sum()} of {count * draws} draws diverged, of {(diverged > 0).sum()} stars")
    y, rows = torch.stack(data[1::2], -1), torch.stack(data[::2], -1)
    known = pi.infer.object_posteriors(pi.load(FILE), y, stars.noise, noise_data=rows, draws=4000)
    star, weights = known.draws.transpose(0, 1), known.log_weights.exp().T
    picture(args.picture, found, *table(found, star, weights))
    print(f"\n{args.picture} written")


if __name__ == "__main__":
    main()
