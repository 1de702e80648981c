"""Carry one cloud of points to another, then learn a shorter way.

Two data sets, neither with a known density. A flow with the paper's trigonometric interpolant goes
from one to the other; a learned interpolant shortens its paths. The kinetic energy of the paths is
compared with the squared Wasserstein distance of the clouds, by exact assignment.

python examples/transport.py            # two minutes on 2 cores
python examples/transport.py --smoke    # seconds, to see that it runs
"""

import argparse

import matplotlib.pyplot as plt
import torch
from scipy.optimize import linear_sum_assignment

import pyro_interpolant as pi
from pyro_interpolant import plotting


def moons(count):
    """Return rows of two interleaved half circles, shape (count, 2)."""
    angle, upper = torch.pi * torch.rand(count), torch.rand(count) < 0.5
    x = torch.where(upper, angle.cos(), 1 - angle.cos())
    y = torch.where(upper, angle.sin(), 0.5 - angle.sin())
    return 2 * torch.stack((x, y), -1) + 0.1 * torch.randn(count, 2) - torch.tensor([1.0, 4.0])


def ring(count):
    """Return rows of five clusters on a circle, shape (count, 2)."""
    angle = 2 * torch.pi * torch.randint(5, (count,)) / 5
    centre = 2.5 * torch.stack((angle.sin(), angle.cos()), -1)
    return centre + 0.25 * torch.randn(count, 2)


def squared_distance(x0, x1):
    """Return the squared Wasserstein distance of two samples of one size, by exact assignment."""
    cost = torch.cdist(x0, x1).square()
    return float(cost[linear_sum_assignment(cost)].mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--picture", default="transport.png", help="the file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # as fast as two for networks of this size, and undisturbed

    x0, x1 = moons(10_000), ring(10_000)
    steps, alternations, count = (20, 5, 300) if args.smoke else (2500, 1500, 2000)
    learned = pi.LearnedInterpolant(6, event_dim=2, matrices=True, network=(64, 64))
    flows = {}
    for name, interpolant in (("trigonometric", pi.Trigonometric()), ("learned", learned)):
        transform = pi.interpolant_transform(2, interpolant=interpolant)
        flow = flows[name] = pi.InterpolantDistribution(transform)
        if name == "trigonometric":
            result = pi.fit(flow, x1, base_samples=x0, steps=steps, seed=0)
        else:
            result = pi.learn_interpolant(
                flow, x1, base_samples=x0, alternations=alternations, steps=steps, seed=0
            ).fit
        print(f"{name}: {result.steps[-1]} steps, {result.seconds:.0f} s")

    fresh0, fresh1 = moons(count), ring(count)
    shortest = squared_distance(fresh0, fresh1)
    floor = squared_distance(ring(count), fresh1)
    print(f"squared distance of the clouds ({count:,} points each): {shortest:.2f}")
    energies = {}
    for name, flow in flows.items():
        energies[name] = pi.path_energy(flow)
        away = squared_distance(flow.sample((count,)), fresh1)
        value, stderr = energies[name]
        print(
            f"{name}: energy of the paths {value:.2f} +- {stderr:.2f}; squared distance of its "
            f"samples to the target {away:.3f} (two samples of the target: {floor:.3f})"
        )

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    for ax, (name, flow) in zip(axes, flows.items(), strict=False):
        plotting.trajectories(flow, count=250, ax=ax)
        ax.plot(*fresh1[:500].T, ".", ms=2, color="#2a2a2a", alpha=0.5, zorder=0, label="target")
        ax.legend(frameon=False, loc="upper left", fontsize="small")
        ax.set(title=f"{name} interpolant", aspect="equal")
    bars = axes[2].bar(
        [*energies, "shortest"],
        [*(e.value for e in energies.values()), shortest],
        color=["#4c566a", "#d1495b", "#2a9d8f"],
    )
    axes[2].bar_label(bars, fmt="%.2f")
    axes[2].set(title="kinetic energy of the paths, and $W_2^2$", ylabel="squared length")
    axes[2].spines[["top", "right"]].set_visible(False)
    figure.savefig(args.picture, dpi=150)
    print(f"{args.picture} written")


if __name__ == "__main__":
    main()
