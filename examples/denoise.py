"""Take noise and blur off images, and fill in pixels, under a learned prior in a Pyro model.

python examples/denoise.py                   # patches of two photographs, ten minutes on 2 cores
python examples/denoise.py --smoke           # seconds, to see that it runs
python examples/denoise.py --data FILE.npz   # your own: uint8 arrays train, test, shape (N, 64)

A patch is its mean grey and its detail, x = m + B d, with B orthonormal: the mean, which tells
next to nothing of the detail and varies ten times as much, has a normal prior, and the detail a
flow. It is seen through a matrix A, y ~ N(A x, s^2): in noise, blurred, in half of its pixels. The
posterior is had by one pass of the network (the mean, under white noise), by an approximate
sampler, and by NUTS; under a Gaussian and a mixture as priors, in closed form.
"""

import argparse

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from _patches import BASIS, mean_given, mixture_posterior, patch, patches_of, tasks
from pyro.infer import MCMC, NUTS
from sklearn.mixture import GaussianMixture

import pyro_interpolant as pi
from pyro_interpolant.diffusion import approximate_posterior


def denoised(prior, grey, y, s):
    """Return the mean of x given y ~ N(x, s^2): at one time, noise and detail are in this ratio.

    White noise in y is white in the detail, and independent of that in the mean.
    """
    flow, detail = prior.transform.flow, y @ BASIS
    angle = torch.atan2(flow.whitening.linear, torch.tensor(s))
    state = flow.loc + angle.sin() * (detail - flow.loc)
    mean = mean_given(grey, torch.ones(64), y, s).mean
    return patch(mean, pi.denoiser(prior, 2 * angle / torch.pi, state))


def approximately(prior, grey, matrix, s, y, draws):
    """Return approximate posterior draws of x, shape ``(draws, N, 64)``.

    The detail has the likelihood in which the mean, normal as the noise is, is integrated out.
    """
    through, seen = matrix @ BASIS, matrix.sum(-1)
    cov = s**2 * torch.eye(len(matrix)) + grey.scale**2 * seen[:, None] * seen

    def log_likelihood(detail):
        return dist.MultivariateNormal(grey.loc * seen + detail @ through.T, cov).log_prob(y)

    detail = approximate_posterior(prior, log_likelihood, (draws, len(y)), steps=draws)
    return patch(mean_given(grey, seen, y - detail @ through.T, s).sample(), detail)


def compare(prior, grey, mixtures, x, task, matrix, s, draws, depth):
    """Print how good each posterior is, and return pictures: of x, y and posterior means."""
    y = x @ matrix.T + s * torch.randn(len(x), len(matrix))

    def model(y):
        with pyro.plate("patches", len(y)):
            x = patch(pyro.sample("mean", grey), pyro.sample("detail", prior))
            pyro.sample("y", dist.Normal(x @ matrix.T, s).to_event(1), obs=y)

    found = {name: mixture_posterior(*parts, matrix, s, y) for name, parts in mixtures.items()}
    sampled = approximately(prior, grey, matrix, s, y, draws)
    ends = torch.quantile(sampled, torch.tensor([0.05, 0.95]), 0)
    found["flow, approximate"] = sampled.mean(0), *ends
    if task == "noise":
        found |= {"flow, one pass": (denoised(prior, grey, y, s),), "observed": (y,)}
    worse = (found["mixture"][0] - x).square().mean(-1)
    for name, (mean, *ends) in found.items():
        error = (mean - x).square().mean(-1)
        gain = 10 * (worse.mean() / error.mean()).log10()
        stderr = 4.34 * (worse / worse.mean() - error / error.mean()).std() / len(x) ** 0.5
        hold = f", 90% hold {((x > ends[0]) & (x < ends[1])).float().mean():.1%}" if ends else ""
        value = f"{-10 * error.mean().log10():.2f} dB, {gain:+.2f} +- {stderr:.2f} to the mixture"
        print(f"{task}, {name}: {value}{hold}")
    some = torch.arange(0, len(x), len(x) // 4)[:4]
    base = pi.base_space(model)
    mcmc = MCMC(NUTS(base, max_tree_depth=depth), 2 * draws, draws, disable_progbar=True)
    mcmc.run(y[some])
    kept = base.samples(mcmc.get_samples(), y[some])
    exact = patch(kept["mean"], kept["detail"])
    off = ((sampled.mean(0)[some] - exact.mean(0)) / exact.std(0)).square().mean().sqrt()
    wide = (sampled.std(0)[some] / exact.std(0)).log().mean().exp()
    print(f"{task}, approximate to NUTS: {off:.2f} deviations off, {wide:.2f} times as wide")
    seen = y if len(matrix) == 64 else (y - 0.5) @ matrix + 0.5
    return {"pixels": x, "observed": seen} | {name: mean for name, (mean, *_) in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--data", help="a file of patches, in place of the photographs")
    parser.add_argument("--steps", type=int, default=20_000, help="of training")
    parser.add_argument("--picture", default="denoise.png", help="the file to write")
    args = parser.parse_args()
    pyro.set_rng_seed(0)

    levels, test = patches_of(args.data)
    levels = levels[torch.randperm(len(levels))[: 3000 if args.smoke else None]]
    train, x = (levels + torch.rand_like(levels) - 0.5) / 255, test / 255
    steps = 20 if args.smoke else args.steps
    # One scale for all of the detail, so that white noise is white to the flow.
    velocity = pi.VelocityMLP(63, (16, 16) if args.smoke else None)
    transform = pi.InterpolantTransform(velocity, whitening=pi.transforms.ScalarWhitening(63))
    prior = pi.InterpolantDistribution(transform)
    pi.fit(prior, train @ BASIS, batch_size=256, learning_rate=0.005, seed=0, steps=steps)
    grey = dist.Normal(train.mean(), train.mean(-1).std())
    fitted = GaussianMixture(2 if args.smoke else 15, random_state=0).fit(train.numpy())
    parts = fitted.weights_, fitted.means_, fitted.covariances_
    mixtures = {"mixture": [torch.tensor(part).float() for part in parts]}
    mixtures["Gaussian"] = torch.ones(1), train.mean(0)[None], torch.cov(train.T)[None]
    figure, axes = plt.subplots(3, 5, figsize=(15, 5.8), layout="constrained")
    for row, (task, known) in zip(axes, tasks().items(), strict=True):
        draws, depth = (2, 2) if args.smoke else (50, 5)
        shown = compare(prior, grey, mixtures, x, task, *known, draws, depth)
        for ax, (name, patches) in zip(row, shown.items(), strict=False):
            mosaic = patches[:240].reshape(12, 20, 8, 8).transpose(1, 2).reshape(96, 160)
            ax.imshow(mosaic, cmap="gray", vmin=0, vmax=1)
            ax.set(title=f"{task}: {name}", xticks=[], yticks=[])
    figure.savefig(args.picture, dpi=150)
    print(f"{args.picture} written")


if __name__ == "__main__":
    main()
