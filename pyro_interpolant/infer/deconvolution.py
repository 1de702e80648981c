r"""The mixture of Gaussians behind noisy rows, which a population starts from.

Rows are :math:`y_i \sim N(x_i, P_i^{-1})`, where a precision is 0 of what is missing. Given a
component :math:`N(m, V)`, :math:`V = R R^T`, all that is needed of a row is in

.. math:: 1 + R^T P R = (W^T W)^{-1}, \quad s = W^T W R^T P (y - m), \quad x = m + R s:

its latent is :math:`N(x, R W^T W R^T)`, and its log-evidence, up to a constant of the row,
:math:`-\frac12 (y - x)^T P (y - x) - \frac12 |s|^2 + \log |W|`. From one component on,
each is split in two along its longest axis, and all are fitted by expectation maximisation in
closed form. Beside them one stays as wide as all rows are, for outliers: without it others become
spikes on some of those, and the rest have a likelihood of nothing. The evidence of rows held out
chooses how many there are, which are then fitted to these rows, too.

Where x lives in a part of the space, the mixture is cut off there. With the probability Z of that
part, N latents inside come with :math:`N (1 - Z) / Z` outside that nobody saw: both are drawn.

References:
    Dempster, Laird & Rubin, J. R. Stat. Soc. B 39 (1977), section 4.2 (truncated data); Bovy, Hogg
    & Roweis, *Extreme deconvolution*, Ann. Appl. Stat. 5 (2011), arXiv 0905.2979.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

_ITERATIONS = 50  # for each number of components
_MOST_ROWS = 10_000  # of a fit
_HELD_SHARE = 0.1  # of them, held out
_ROWS_PER_COLUMN = 10  # of each component and dimension, at least
_MOST_COMPONENTS = 32  # that are split, beside the wide one
_WIDE, _WIDE_SHARE = 2.0, 0.05  # of the wide one, to begin with: standard deviations, its share
_LAST_ITERATIONS = 25  # on all rows
_JITTER = 1e-9  # of standardised variances
_NARROW, _MOST_SCALES = 1e-4, 4  # standard deviations of latents, below which units are finer
_VALUES_AT_ONCE = 2**18  # of the matrices of a chunk of rows
_COLUMNS_APART = 16  # up to which products of matrices go column by column
# Of a mixture that is cut off at the edges of a support. After 0, 5, 20 and 60 of them, 0.0065,
# 0.0048, 0.0056 and 0.0073 nats were lost on three positive numbers, and on another catalogue of
# such 0.0088, 0.0070, 0.0078 and 0.0120.
_CUT_ITERATIONS = 5
_CUT_DRAWS, _CUT_SAMPLES = 8, 50_000  # in each, of a row and of the mixture


class _Mixture(NamedTuple):
    """A mixture of K Gaussians: log-shares ``(K,)``, means ``(K, D)``, covariances."""

    log_shares: Tensor
    means: Tensor
    covariances: Tensor  # (K, D, D)


def gaussian_latents(
    y: Tensor,
    precisions: Tensor,
    each: int = 1,
    inside: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Return latents of rows, shape ``(each, N, D)``, drawn under the mixture that explains them.

    Args:
        y: Rows, float64, shape ``(N, D)``; anything finite where missing. Each column is measured
            somewhere.
        precisions: Inverse covariances of their errors, shape ``(N, D, D)``.
        each: The number of latents of a row.
        inside: Whether x may be at points, shape ``(*, D)``; or None, where it may be anywhere.
    """
    known = precisions.diagonal(dim1=-2, dim2=-1) > 0
    mean = y.where(known, 0.0).sum(0) / known.sum(0)
    scale = ((y - mean).square().where(known, 0.0).sum(0) / known.sum(0)).sqrt()
    errors = precisions.diagonal(dim1=-2, dim2=-1).rsqrt().where(known, 0.0)
    scale = scale.where(scale > 0, errors.sum(0) / known.sum(0))  # of a single row, its error
    for _ in range(_MOST_SCALES):
        found = _standard_latents(
            (y - mean).where(known, 0.0) / scale,
            precisions * scale * scale[:, None],
            each,
            None if inside is None else partial(_is_inside, inside, mean, scale),
        )
        latents, spread = mean + scale * found, found.std((0, 1), correction=0)
        # Errors of some rows were so large that the spread is that of the variances' least.
        is_narrow = spread < _NARROW
        if not bool(is_narrow.any()):
            break
        mean = mean.where(~is_narrow, latents.mean((0, 1)))
        scale = scale.where(~is_narrow, scale * spread)
    return latents


def _is_inside(
    inside: Callable[[Tensor], Tensor], mean: Tensor, scale: Tensor, w: Tensor
) -> Tensor:
    return inside(mean + scale * w)


def _standard_latents(
    y: Tensor,
    precisions: Tensor,
    each: int,
    inside: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """Return latents of standardised rows, as :func:`gaussian_latents` does."""
    # No error is so small that rounding makes matrices singular: each has this variance beside.
    floored = torch.eye(y.shape[1]).to(precisions) + _JITTER * precisions
    precisions = torch.linalg.solve(floored, precisions)
    mixture = _best(y, precisions)
    if inside is not None:
        few = torch.randperm(len(y))[:_MOST_ROWS].to(y.device)
        for _ in range(_CUT_ITERATIONS):
            mixture = _cut_off(mixture, y[few], precisions[few], inside)
    parts = _chunks(y, precisions, len(mixture.means))
    return torch.cat([_drawn(mixture, *part, each) for part in parts], dim=1)


def _best(y: Tensor, precisions: Tensor) -> _Mixture:
    """Return the mixture that explains standardised rows, by the evidence of rows held out."""
    some = torch.randperm(len(y))[:_MOST_ROWS].to(y.device)
    held, kept = some.tensor_split([math.ceil(_HELD_SHARE * len(some))])
    learned, judged, both = ((y[index], precisions[index]) for index in (kept, held, some))
    dim, most = y.shape[1], len(kept) / (_ROWS_PER_COLUMN * y.shape[1])
    one = torch.eye(dim).to(y)
    shares = y.new_tensor([1 - _WIDE_SHARE, _WIDE_SHARE])
    mixture = _Mixture(shares.log(), y.new_zeros(2, dim), torch.stack((one, _WIDE**2 * one)))
    best, highest, split = mixture, y.new_full((len(held),), -math.inf), 1
    while True:
        mixture = _improved(mixture, *learned, _ITERATIONS)
        found = _log_evidence(mixture, *judged)
        gain = found - highest
        if gain.mean() > 0:
            best, highest = mixture, found
        elif gain.mean() < -gain.std() / math.sqrt(len(gain)):
            break
        split *= 2
        if split > min(most, _MOST_COMPONENTS):
            break
        mixture = _split(mixture)
    return _improved(best, *both, _LAST_ITERATIONS)


def _improved(mixture: _Mixture, y: Tensor, precisions: Tensor, steps: int) -> _Mixture:
    """Return the mixture after steps of expectation maximisation."""
    for _ in range(steps):
        mixture = _maximized(mixture, y, precisions)
    return mixture


def _split(mixture: _Mixture) -> _Mixture:
    """Return a mixture all of whose components but the last, the wide one, are split in two.

    Means and covariances of the two are together those of what they were.
    """
    log_shares, means, covariances = (value[:-1] for value in mixture)
    values, vectors = torch.linalg.eigh(covariances)
    step = 0.5 * values[:, -1:].sqrt() * vectors[..., -1]
    halves = (covariances - step[:, :, None] * step[:, None]).repeat(2, 1, 1)
    return _Mixture(
        torch.cat(((log_shares - math.log(2)).repeat(2), mixture.log_shares[-1:])),
        torch.cat((means + step, means - step, mixture.means[-1:])),
        torch.cat((halves, mixture.covariances[-1:])),
    )


def _chunks(y: Tensor, precisions: Tensor, components: int) -> list[tuple[Tensor, Tensor]]:
    """Return rows and precisions in parts whose matrices stay in the processor's cache."""
    size = max(1, _VALUES_AT_ONCE // (components * y.shape[1] ** 2))
    return list(zip(y.split(size), precisions.split(size), strict=True))


def _posteriors(mixture: _Mixture, y: Tensor, precisions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log-evidences of all components for n rows, and latents, by s and W as above.

    Returns:
        The log-evidences, up to a constant of the row, shape ``(n, K)``; s, shape
        ``(D, 1, n, K)``; and W, shape ``(D, D, n, K)``.
    """
    r, p = _roots(mixture), precisions.permute(1, 2, 0)[..., None]
    far = (y.T[..., None] - mixture.means.T[:, None])[:, None]
    inner = _product(r.transpose(0, 1), _product(p, r))
    inner.diagonal().add_(1)
    w, volume = _inverse_root(inner)
    u = _product(w, _product(r.transpose(0, 1), _product(p, far)))
    shifts = _product(w.transpose(0, 1), u)
    # Of the mode, off the row and off the component: |u|^2 - (y - m)^T P (y - m) would lose what
    # tells components apart where errors are small.
    rest = far - _product(r, shifts)
    squares = (_product(p, rest) * rest + shifts.square()).sum((0, 1))
    return mixture.log_shares - 0.5 * squares - volume, shifts, w


def _roots(mixture: _Mixture) -> Tensor:
    """Return R, whose R R^T are the covariances of components, shape ``(D, D, 1, K)``."""
    return torch.linalg.cholesky(mixture.covariances).permute(1, 2, 0)[:, :, None].contiguous()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Return the products of matrices, shapes ``(I, J, n, K)`` and ``(J, L, n, K)``.

    Row by row and column by column, each of all matrices at once: of so small ones a call for
    each, as of LAPACK, takes many times as long; of larger ones it takes a tenth.
    """
    if len(b) > _COLUMNS_APART:
        return _turned(_turned(a) @ _turned(b))
    total = a[:, :1] * b[0]
    for j in range(1, len(b)):
        total.addcmul_(a[:, j : j + 1], b[j])
    return total


def _turned(a: Tensor) -> Tensor:
    """Return matrices of shape ``(I, J, n, K)`` as ``(n, K, I, J)``, or back."""
    return a.permute(2, 3, 0, 1)


def _inverse_root(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return lower triangular matrices W with W^T W the inverses of others, and -log |W|.

    Args:
        a: Positive definite matrices, shape ``(D, D, n, K)``, in whose place their roots come.
    """
    if len(a) > _COLUMNS_APART:
        root = torch.linalg.cholesky(_turned(a))
        one = torch.eye(len(a)).to(root)
        inverse = torch.linalg.solve_triangular(root, one, upper=False)
        return _turned(inverse), root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    w = torch.zeros_like(a)
    for i in range(len(a)):
        a[i:, i] /= a[i, i].sqrt()
        below = a[i + 1 :, i]
        a[i + 1 :, i + 1 :] -= below[:, None] * below
        w[i, i] = 1
        if i:
            w[i, :i] -= _product(a[i : i + 1, :i], w[:i, :i])[0]
        w[i] /= a[i, i]
    return w, a.diagonal().log().sum(-1)


def _log_evidence(mixture: _Mixture, y: Tensor, precisions: Tensor) -> Tensor:
    """Return log-evidences of rows up to constants of theirs, shape ``(n,)``."""
    parts = _chunks(y, precisions, len(mixture.means))
    return torch.cat([_posteriors(mixture, *part)[0].logsumexp(-1) for part in parts])


def _maximized(mixture: _Mixture, y: Tensor, precisions: Tensor) -> _Mixture:
    """Return the mixture after one step of expectation maximisation."""
    count, dim = mixture.means.shape
    mass = torch.zeros_like(mixture.log_shares)
    first, second = mass.new_zeros(dim, 1, 1, count), mass.new_zeros(dim, dim, 1, count)
    for part in _chunks(y, precisions, len(mass)):
        log_joint, shifts, w = _posteriors(mixture, *part)
        share = log_joint.softmax(-1)
        mass += share.sum(0)
        first += (share * shifts).sum(2, keepdim=True)
        moments = _product(w.transpose(0, 1), w).addcmul_(shifts, shifts.transpose(0, 1))
        second += (share * moments).sum(2, keepdim=True)
    r = _roots(mixture)
    first, second = _product(r, first), _product(r, _product(second, r.transpose(0, 1)))
    return _of_moments(mixture, mass, first[:, 0, 0].T, second[:, :, 0].permute(2, 0, 1))


def _of_moments(mixture: _Mixture, mass: Tensor, first: Tensor, second: Tensor) -> _Mixture:
    """Return the mixture of sums of weights, and of moments about its old means, by component."""
    total = mass.sum()
    # A component that no row belongs to stays where it is.
    mass = mass.clamp(min=torch.finfo(mass.dtype).tiny)
    first, second = first / mass[:, None], second / mass[:, None, None]
    covariances = second - first[:, :, None] * first[:, None]
    covariances = 0.5 * (covariances + covariances.mT)
    covariances.diagonal(dim1=-2, dim2=-1).add_(_JITTER)
    return _Mixture((mass / total).log(), mixture.means + first, covariances)


def _cut_off(
    mixture: _Mixture,
    y: Tensor,
    precisions: Tensor,
    inside: Callable[[Tensor], Tensor],
) -> _Mixture:
    """Return the mixture after a step of expectation maximisation, its density cut off.

    Args:
        mixture: The mixture.
        y: Standardised rows, shape ``(N, D)``.
        precisions: Those of their errors, shape ``(N, D, D)``.
        inside: Whether x may be at points in the same units, shape ``(*, D)``.
    """
    parts = _chunks(y, precisions, len(mixture.means))
    latents = torch.cat([_drawn(mixture, *part, _CUT_DRAWS) for part in parts], dim=1)
    weights = inside(latents).to(y)
    weights = weights / weights.sum(0).clamp(min=1)
    which = torch.multinomial(mixture.log_shares.exp(), _CUT_SAMPLES, replacement=True)
    z = torch.randn(_CUT_SAMPLES, y.shape[1], 1).to(y)
    sampled = (
        mixture.means[which] + (torch.linalg.cholesky(mixture.covariances)[which] @ z)[..., 0]
    )
    outside = sampled[~inside(sampled)]
    unseen = len(outside) / _CUT_SAMPLES
    if unseen in (0, 1) or not bool(weights.any()):  # nothing is cut off, or all, or all rows are
        return mixture
    of_each = weights.sum() / (1 - unseen) / _CUT_SAMPLES
    points = torch.cat((latents.flatten(0, 1), outside))
    return _fitted(mixture, points, torch.cat((weights.flatten(), of_each.expand(len(outside)))))


def _fitted(mixture: _Mixture, x: Tensor, weights: Tensor) -> _Mixture:
    """Return the mixture after a step of expectation maximisation on points, shape ``(N, D)``."""
    mass = torch.zeros_like(mixture.log_shares)
    first, second = torch.zeros_like(mixture.means), torch.zeros_like(mixture.covariances)
    roots = torch.linalg.cholesky(mixture.covariances)
    volume = roots.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    size = max(1, _VALUES_AT_ONCE // (len(mass) * x.shape[1]))
    for points, weight in zip(x.split(size), weights.split(size), strict=True):
        far = points[:, None] - mixture.means  # (n, K, D)
        u = torch.linalg.solve_triangular(roots, far.permute(1, 2, 0), upper=False)  # (K, D, n)
        log_joint = mixture.log_shares - volume - 0.5 * u.square().sum(1).T
        share = log_joint.softmax(-1) * weight[:, None]
        mass += share.sum(0)
        first += torch.einsum("nk,nki->ki", share, far)
        second += torch.einsum("nk,nki,nkj->kij", share, far, far)
    return _of_moments(mixture, mass, first, second)


def _drawn(mixture: _Mixture, y: Tensor, precisions: Tensor, each: int) -> Tensor:
    """Return latents of rows, shape ``(each, n, D)``."""
    log_joint, shifts, w = _posteriors(mixture, y, precisions)
    which = torch.multinomial(log_joint.softmax(-1), each, replacement=True).T
    row, r = torch.arange(len(y), device=y.device), _roots(mixture)[:, :, 0]
    drawn = []
    for k in which:  # one of each row at a time: a matrix for every latent might not fit memory
        z = torch.randn_like(y).T
        near = shifts[:, 0, row, k] + (w[:, :, row, k] * z[:, None]).sum(0)
        drawn.append(mixture.means[k] + (r[:, :, k] * near).sum(1).T)
    return torch.stack(drawn)
