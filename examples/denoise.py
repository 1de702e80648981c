"""Take noise and blur off images, and fill in pixels, under a learned prior in a Pyro model.

python examples/denoise.py                   # patches of two photographs, ten minutes on 2 cores
python examples/denoise.py --smoke           # seconds, to see that it runs
python examples/denoise.py --data FILE.npz   # your own: uint8 arrays train, test, shape (N, 64)

A patch x is seen through a matrix A, y ~ N(A x, s^2): in noise, blurred, in half of its pixels.
Its posterior is had by one pass of the network (the mean, under white noise), by an approximate
sampler, and by NUTS; under a Gaussian and a mixture as priors, in closed form.
"""

import argparse

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from sklearn.datasets import load_sample_images
from sklearn.mixture import GaussianMixture
from torch.nn.functional import avg_pool2d

import pyro_interpolant as pi
from pyro_interpolant.diffusion import approximate_posterior

HELD = slice(136, 232), slice(240, 400)  # rows and columns of each photograph to test on


def patches_of(path):
    """Return grey levels of patches to train on, and of those to test on, shape (N, 64)."""
    if path:
        with np.load(path) as data:
            few = np.random.RandomState(0).permutation(len(data["test"]))[:500]
            return torch.tensor(data["train"]).float(), torch.tensor(data["test"][few]).float()
    train, test = [], []
    for photograph in load_sample_images().images:
        grey = torch.tensor(photograph).float().mean(-1).round()
        test.append(grey[HELD].unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 64))
        grey[HELD] = torch.nan
        patches = grey.unfold(0, 8, 1).unfold(1, 8, 1).reshape(-1, 64)
        patches = patches[patches.isfinite().all(-1)]
        train.append(patches[torch.randperm(len(patches))[:50_000]])
    return torch.cat(train), torch.cat(test)


def tasks():
    """Return the matrix A, shape (M, 64), and the noise s of each task."""
    eye = torch.eye(64)
    near = eye.reshape(64, 8, 8)  # averages of 3 x 3 pixels, fewer at the edge
    blur = avg_pool2d(near, 3, 1, 1, count_include_pad=False).reshape(64, 64).T
    seen = torch.randperm(64)[:32].sort().values
    return {"noise": (eye, 25 / 255), "blur": (blur, 5 / 255), "mask": (eye[seen], 5 / 255)}


def mixture_posterior(weights, means, covs, matrix, s, y):
    """Return mean and 90% intervals of pixels under a mixture of Gaussians, in closed form."""
    noisy = matrix @ covs @ matrix.T + s**2 * torch.eye(len(matrix))
    gain = torch.linalg.solve(noisy, matrix @ covs).mT
    each = means[:, None] + (y - means[:, None] @ matrix.T) @ gain.mT
    evidence = dist.MultivariateNormal(means @ matrix.T, noisy).log_prob(y[:, None])
    share = (weights.log() + evidence).softmax(-1).T[..., None]
    mean = (share * each).sum(0)
    left = (covs - gain @ matrix @ covs).diagonal(dim1=1, dim2=2)[:, None]
    half = 1.645 * (share * (left + (each - mean).square())).sum(0).sqrt()
    return mean, mean - half, mean + half


def denoised(prior, y, s):
    """Return the mean of x given y ~ N(x, s^2): at one time, noise and data are in this ratio."""
    flow = prior.transform.flow
    angle = torch.atan2(flow.whitening.linear, torch.tensor(s))
    return pi.denoiser(prior, 2 * angle / torch.pi, flow.loc + angle.sin() * (y - flow.loc))


def compare(prior, mixtures, x, task, matrix, s, draws):
    """Print how good each posterior is, and return pictures: of x, y and posterior means."""
    y = x @ matrix.T + s * torch.randn(len(x), len(matrix))

    def likelihood(x):
        return dist.Normal(x.flatten(-3) @ matrix.T, s).to_event(1)

    def model(y):
        with pyro.plate("patches", len(y)):
            pyro.sample("y", likelihood(pyro.sample("x", prior)), obs=y)

    found = {name: mixture_posterior(*parts, matrix, s, y) for name, parts in mixtures.items()}
    shape = draws, len(y)
    sampled = approximate_posterior(prior, lambda x: likelihood(x).log_prob(y), shape, steps=draws)
    sampled = sampled.flatten(-3)
    ends = torch.quantile(sampled, torch.tensor([0.05, 0.95]), 0)
    found["flow, approximate"] = sampled.mean(0), *ends
    if task == "noise":
        found |= {"flow, one pass": (denoised(prior, y, s),), "observed": (y,)}
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
    mcmc = MCMC(NUTS(base, max_tree_depth=5), 2 * draws, draws, disable_progbar=True)
    mcmc.run(y[some])
    exact = base.samples(mcmc.get_samples(), y[some])["x"].flatten(-3)
    off = ((sampled.mean(0)[some] - exact.mean(0)) / exact.std(0)).square().mean().sqrt()
    wide = (sampled.std(0)[some] / exact.std(0)).log().mean().exp()
    print(f"{task}, approximate to NUTS: {off:.2f} deviations off, {wide:.2f} times as wide")
    seen = y if len(matrix) == 64 else (y - 0.5) @ matrix + 0.5
    return {"pixels": x, "observed": seen} | {name: mean for name, (mean, *_) in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--data", help="a file of patches, in place of the photographs")
    parser.add_argument("--minutes", type=float, default=5.0, help="of training")
    parser.add_argument("--picture", default="denoise.png", help="the file to write")
    args = parser.parse_args()
    pyro.set_rng_seed(0)

    levels, test = patches_of(args.data)
    levels = levels[torch.randperm(len(levels))[: 3000 if args.smoke else None]]
    train, x = (levels + torch.rand_like(levels) - 0.5) / 255, test / 255
    length = {"steps": 30} if args.smoke else {"max_seconds": 60 * args.minutes}
    network = pi.VelocityMLP(64, (16, 16) if args.smoke else None)
    length |= {"batch_size": 256, "learning_rate": 0.005, "tolerance": 0.1, "seed": 0}
    # As images they have one scale, so that white noise is white to the flow.
    prior = pi.from_samples(train.reshape(-1, 1, 8, 8), network=network, **length)
    fitted = GaussianMixture(2 if args.smoke else 15, random_state=0).fit(train.numpy())
    parts = fitted.weights_, fitted.means_, fitted.covariances_
    mixtures = {"mixture": [torch.tensor(part).float() for part in parts]}
    mixtures["Gaussian"] = torch.ones(1), train.mean(0)[None], torch.cov(train.T)[None]
    figure, axes = plt.subplots(3, 5, figsize=(15, 5.8), layout="constrained")
    for row, (task, known) in zip(axes, tasks().items(), strict=True):
        shown = compare(prior, mixtures, x, task, *known, draws=5 if args.smoke else 50)
        for ax, (name, patches) in zip(row, shown.items(), strict=False):
            mosaic = patches[:240].reshape(12, 20, 8, 8).transpose(1, 2).reshape(96, 160)
            ax.imshow(mosaic, cmap="gray", vmin=0, vmax=1)
            ax.set(title=f"{task}: {name}", xticks=[], yticks=[])
    figure.savefig(args.picture, dpi=150)
    print(f"{args.picture} written")


if __name__ == "__main__":
    main()
