"""Learn two moons, look at them, and ask for densities: the quick start.

python examples/two_moons.py            # half a minute on 2 cores
python examples/two_moons.py --smoke    # seconds, to see that it runs
"""

import argparse

import matplotlib.pyplot as plt
import torch

import pyro_interpolant as pi


def two_moons(count):
    """Return rows of two interleaved half circles, shape (count, 2)."""
    angle, upper = torch.pi * torch.rand(count), torch.rand(count) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return torch.stack((x, y), -1) + 0.07 * torch.randn(count, 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--picture", default="two_moons.png", help="the file to write")
    args = parser.parse_args()
    torch.manual_seed(0)

    steps, rows, side = (20, 500, 30) if args.smoke else (3_000, 2_000, 150)
    train, test = two_moons(20_000), two_moons(rows)
    moons = pi.from_samples(train, seed=0, steps=steps)
    samples, log_prob = moons.rsample_and_log_prob((rows,))
    error = pi.solver_error(moons, test[:256]).density_mean
    print(
        f"held-out log-density: {moons.log_prob(test).mean():.3f} nats (solver error {error:.4f})"
    )
    print(f"entropy by its own samples: {-log_prob.mean():.3f} nats")

    line = torch.linspace(-1.6, 2.6, side)
    grid = torch.stack(torch.meshgrid(line, line - 0.25, indexing="xy"), -1)
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.6), sharex=True, sharey=True)
    for ax, t in zip(axes, (0.0, 0.5, 0.8, 1.0), strict=True):
        ax.pcolormesh(grid[..., 0], grid[..., 1], moons.at(t).log_prob(grid).exp(), cmap="magma")
        ax.set_title(f"density at t = {t:g}")
    axes[-1].plot(*test[:300].T, ".", color="#4cc9f0", ms=2, label="data, held out")
    axes[-1].plot(*samples[:300].T, ".", color="white", ms=2, label="draws of the flow")
    axes[-1].legend(loc="upper right", labelcolor="white", frameon=False, markerscale=4)
    figure.tight_layout()
    figure.savefig(args.picture, dpi=150)
    print(f"{args.picture} written")


if __name__ == "__main__":
    main()
