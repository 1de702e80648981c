"""Learn a spiral, take its score from the velocity, and follow it along ODE and SDE paths.

One trained flow gives a family of processes, dX = (v + e S) dt + sqrt(2 e) dW, that share the
density of every time: e = 0 is the flow, and the more there is of e the rougher the paths.

python examples/score_sde.py            # a minute on 2 cores
python examples/score_sde.py --smoke    # seconds, to see that it runs
"""

import argparse
import math

import matplotlib.pyplot as plt
import torch
from matplotlib.collections import LineCollection
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import pyro_interpolant as pi

SHOWN, CHECKED = (0.5, 0.75, 0.9), (0.2, 0.5, 0.8)
DIFFUSIONS = {
    "ODE: ε = 0": lambda t: 0.0,
    "SDE: ε = (1 - t) / 4": lambda t: (1 - t) / 4,
    "SDE: ε = π/2 cos(πt/2), the default": None,
}
INK, PALE = "#1b1b3a", "#ffffff"
MARKS = {
    "start": {"marker": "o", "mfc": PALE, "mec": INK, "ls": ""},
    "end": {"marker": "o", "color": INK, "ls": ""},
    "draws": {"marker": ".", "color": "#8d8da6", "ls": ""},
    "target": {"color": INK, "lw": 0.6},
}
COLOURS = ["#d1495b", "#e09f1f", "#2a9d8f", "#3066be", "#7b4fa3"]


def spiral(arms=2, knots=12):
    """Return a mixture of Gaussians along the arms of a spiral."""
    s = torch.linspace(0.25, 1.0, knots)
    angle = 1.35 * math.pi * s + 2 * math.pi * torch.arange(arms)[:, None] / arms
    means = 4 * s[:, None] * torch.stack((angle.cos(), angle.sin()), -1)
    along = torch.stack((-angle.sin(), angle.cos()), -1)
    outer = along[..., :, None] * along[..., None, :]
    covs = 0.02 * torch.eye(2) + 0.12 * (s**2)[:, None, None] * outer
    parts = MultivariateNormal(means.reshape(-1, 2), covs.reshape(-1, 2, 2))
    return MixtureSameFamily(Categorical(s.repeat(arms)), parts)


def at_time(mixture, flow, t):
    """Return the mixture that the interpolant makes of another by time t, in data coordinates."""
    a, b, g = flow.interpolant.coefficients(torch.tensor(t))
    parts, loc, linear = mixture.component_distribution, flow.loc, flow.whitening.matrix()
    covs = b**2 * parts.covariance_matrix + (a**2 + g**2) * linear @ linear.T
    moved = MultivariateNormal(loc + b * (parts.loc - loc), covs)
    return MixtureSameFamily(mixture.mixture_distribution, moved)


def true_score(mixture, x):
    """Return the gradient of the log-density of a mixture at x, shape (*, 2)."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(mixture.log_prob(x).sum(), x)[0]


def paths(prior, diffusion, start, steps=400):
    """Return Euler-Maruyama paths from given starts, shape (steps + 1, N, 2)."""
    sde = pi.InterpolantSDE(prior, diffusion)
    states = [start]
    with torch.no_grad():
        for t in torch.arange(steps) / steps:
            y = states[-1]
            kick = (sde.g(t, y) @ torch.randn(len(y), 2, 1))[..., 0]
            states.append(y + sde.f(t, y) / steps + kick / math.sqrt(steps))
    return torch.stack(states)


def show_path(ax, path, colour):
    """Draw a path that grows stronger with time, from an open to a full circle."""
    pieces = torch.stack((path[:-1], path[1:]), 1)
    shade = torch.linspace(0.15, 0.95, len(pieces)).tolist()
    ax.add_collection(LineCollection(pieces, colors=colour, alpha=shade, lw=0.9))
    ax.plot(*path[0], "o", mfc=PALE, mec=colour, ms=6, mew=1.4)
    ax.plot(*path[-1], "o", color=colour, ms=7, mec=INK, mew=0.7)


def show_score(ax, prior, now, grid, t):
    """Draw the density of a time and arrows along its learned score, the long ones shortened."""
    density, coarse = now.log_prob(grid).exp(), grid[4::8, 4::8]
    ax.contourf(grid[..., 0], grid[..., 1], density.sqrt(), levels=12, cmap="Greys", alpha=0.7)
    arrows = pi.score(prior, t, coarse)
    length = arrows.norm(dim=-1, keepdim=True)
    arrows = arrows / length * length.clamp(max=8).sqrt()
    seen = now.log_prob(coarse).exp() > 0.02 * density.max()
    ax.quiver(*coarse[seen].T, *arrows[seen].T, length[seen][:, 0], cmap="plasma", scale=45)
    ax.set_title(rf"score $\nabla\log\rho_t$ at $t = {t:g}$", color=INK)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--picture", default="score_sde.png", help="the file to write")
    args = parser.parse_args()
    torch.manual_seed(3)

    mixture = spiral()
    steps = 20 if args.smoke else 4_000
    # An SDE runs in the flow's own coordinates: here they must be the data's.
    prior = pi.from_samples(mixture.sample((40_000,)), marginals=False, seed=0, steps=steps)
    for t in CHECKED:
        now = at_time(mixture, prior.transform.flow, t)
        x = now.sample((5_000,))
        truth, found = true_score(now, x), pi.score(prior, t, x)
        error = float(((found - truth).square().sum() / truth.square().sum()).sqrt())
        print(f"score at t = {t}: relative error {100 * error:.1f}%")

    figure, axes = plt.subplots(2, 3, figsize=(11, 7.8), sharex=True, sharey=True)
    torch.manual_seed(8)  # starts that lie apart, for the picture
    start = prior.at(0.0).sample((len(COLOURS),))
    line = torch.linspace(-5.4, 5.4, 160)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    target = mixture.log_prob(grid).exp()
    best = float(mixture.log_prob(mixture.sample((20_000,))).mean())
    for ax, (name, diffusion) in zip(axes[0], DIFFUSIONS.items(), strict=True):
        for path, colour in zip(paths(prior, diffusion, start).unbind(1), COLOURS, strict=True):
            show_path(ax, path, colour)
        samples = pi.sample_sde(prior, (500 if args.smoke else 6_000,), diffusion=diffusion)
        ax.contour(line, line, target / target.max(), [0.1], colors=INK, linewidths=0.6)
        ax.plot(*samples.T, ".", color="#8d8da6", ms=1.4, alpha=0.5, zorder=0)
        ax.set_title(name, color=INK)
        print(f"{name}: {best - mixture.log_prob(samples).mean():.3f} nats below exact samples")
    for name, style in MARKS.items():
        axes[0, 0].plot([], [], label=name, **style)
    axes[0, 0].legend(loc="lower right", fontsize="small")
    for ax, t in zip(axes[1], SHOWN, strict=True):
        show_score(ax, prior, at_time(mixture, prior.transform.flow, t), grid, t)
    plt.setp(axes, xlim=(-5.4, 5.4), ylim=(-5.4, 5.4), xticks=(), yticks=(), aspect="equal")
    figure.tight_layout()
    figure.savefig(args.picture, dpi=150)
    print(f"{args.picture} written")


if __name__ == "__main__":
    main()
