"""Train a guide from the model alone, and ask it how good it is.

Two posteriors that a Gaussian cannot match: a funnel, and one of two modes. Each is given to
Pyro's AutoMultivariateNormal, trained by SVI, and to AutoInterpolant, trained by fit_guide: rounds
of tempering, Metropolis moves and regression, without a gradient through an ODE. Pareto's k-hat of
the importance weights tells which draws can be trusted.

python examples/svi_guide.py            # two minutes on 2 cores
python examples/svi_guide.py --smoke    # seconds, to see that it runs
"""

import argparse
import warnings

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, init_to_feasible
from pyro.optim import ClippedAdam

import pyro_interpolant as pi

Y = torch.tensor([4.0, -1.0, 2.0, 0.5])


def funnel():
    """Four groups with few data: where their spread is small, so are their offsets."""
    spread = pyro.sample("spread", dist.LogNormal(0.0, 1.5))
    with pyro.plate("groups", len(Y)):
        offset = pyro.sample("offset", dist.Normal(0.0, spread))
        pyro.sample("y", dist.Normal(offset, 3.0), obs=Y)


def bimodal():
    """A parameter seen by its square alone, and one that depends on it."""
    a = pyro.sample("a", dist.Normal(0.3, 1.5))
    pyro.sample("b", dist.Normal(a, 0.5))
    pyro.sample("y", dist.Normal(a**2, 0.6), obs=torch.tensor(2.5))


def exact(model, x, y):
    """Return the log-density of (offset, log spread), or of (b, a), up to a constant."""
    if model is bimodal:
        parts = dist.Normal(0.3, 1.5).log_prob(y), dist.Normal(y, 0.5).log_prob(x)
        return sum(parts) + dist.Normal(y**2, 0.6).log_prob(torch.tensor(2.5))
    spread = y.exp()
    others = dist.Normal(0.0, (spread[..., None] ** 2 + 9).sqrt()).log_prob(Y[1:]).sum(-1)
    own = dist.Normal(0.0, spread).log_prob(x) + dist.Normal(x, 3.0).log_prob(Y[0])
    return others + own + dist.Normal(0.0, 1.5).log_prob(y)


def contours(ax, model):
    """Draw the regions of highest density that hold 50% and 95% of the exact posterior."""
    lines = [torch.linspace(*limits, 200) for limits in (ax.get_xlim(), ax.get_ylim())]
    density = exact(model, *torch.meshgrid(*lines, indexing="xy")).flatten().softmax(0)
    height = density.sort(descending=True).values
    levels = sorted(float(height[(height.cumsum(0) < p).sum()]) for p in (0.5, 0.95))
    ax.contour(*lines, density.reshape(200, 200), levels, colors="#1b1b3a", linewidths=0.9)
    ax.plot([], [], color="#1b1b3a", linewidth=0.9, label="exact, 50% and 95%")
    ax.legend(loc="upper left", frameon=False, markerscale=4)


def gaussian_guide(model, steps):
    """Return Pyro's multivariate normal guide, trained by SVI."""
    guide = AutoMultivariateNormal(model, init_loc_fn=init_to_feasible)
    optimizer = ClippedAdam({"lr": 0.02, "lrd": 0.1 ** (1 / steps)})
    svi = SVI(model, guide, optimizer, Trace_ELBO(num_particles=16, vectorize_particles=True))
    for _ in range(steps):
        svi.step()
    return guide


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--picture", default="svi_guide.png", help="the file to write")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*k-hat")  # it is printed below

    figure, axes = plt.subplots(2, 2, figsize=(9, 8), layout="constrained")
    cases = ((funnel, ("spread", "offset"), axes[0]), (bimodal, ("a", "b"), axes[1]))
    for model, names, row in cases:
        pyro.clear_param_store()
        gaussian = gaussian_guide(model, 20 if args.smoke else 3000)
        flow = pi.AutoInterpolant(model)
        options = {"rounds": 1, "steps": 30, "draws": 500} if args.smoke else {}
        pi.fit_guide(flow, seed=0, options=options)
        for ax, guide, label in zip(row, (gaussian, flow), ("Gaussian", "flow"), strict=True):
            result = pi.importance(guide, count=1000 if args.smoke else 10_000, seed=0)
            evidence = f"{result.log_evidence:.3f} +- {result.log_evidence_stderr:.3f}"
            print(
                f"{model.__name__}, {label}: k-hat {result.k_hat:.2f}, effective draws "
                f"{result.ess:.0f} of {len(result.log_weights)}, log-evidence {evidence}"
            )
            first, second = (result.draws[n].reshape(len(result.log_weights), -1) for n in names)
            first = first.log() if model is funnel else first
            style = {"ms": 2, "alpha": 0.4, "color": "#2a6f97", "label": "draws of the guide"}
            ax.plot(second[:2000, 0], first[:2000, 0], ".", **style)
            if model is bimodal:
                print(f"draws between the modes: {100 * (first.abs() < 0.9).float().mean():.1f}%")
            ax.set_title(f"{label}: k-hat {result.k_hat:.2f}")
        limits = [(ax.get_xlim(), ax.get_ylim()) for ax in row[1:]]
        for ax in row:
            ax.set(xlim=limits[0][0], ylim=limits[0][1], xlabel=names[1])
            ax.spines[["top", "right"]].set_visible(False)
            contours(ax, model)
        row[0].set_ylabel("log spread" if model is funnel else names[0])
    figure.savefig(args.picture, dpi=150)
    print(f"{args.picture} written")


if __name__ == "__main__":
    main()
