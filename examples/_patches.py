"""The parts of ``denoise.py`` that are no flow: patches, what is seen of them, closed forms."""

import numpy as np
import pyro.distributions as dist
import torch
from sklearn.datasets import load_sample_images
from torch.nn.functional import avg_pool2d

HELD = slice(136, 232), slice(240, 400)  # rows and columns of each photograph to test on
# 63 patterns of length 1 without a mean, as columns, shape (64, 63).
BASIS = torch.linalg.svd(torch.ones(1, 64)).Vh[1:].T


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


def patch(mean, detail):
    """Return patches, shape ``(*, 64)``, of means, ``(*)``, and details, ``(*, 63)``."""
    return mean[..., None] + detail @ BASIS.T


def mean_given(grey, seen, rest, s):
    """Return the normal distribution of a mean m ~ grey, given rest ~ N(m seen, s^2)."""
    precision = grey.scale**-2 + seen @ seen / s**2
    loc = (grey.loc * grey.scale**-2 + rest @ seen / s**2) / precision
    return dist.Normal(loc, precision**-0.5)
