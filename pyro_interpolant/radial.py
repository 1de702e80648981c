r"""Radial maps: lengths of whitened rows brought half-way to those of normal ones.

Where one scale is common to all columns, as contrast is to the pixels of a patch, rows lie at very
different lengths, and a flow sorts them out in the last moments of its path. Lengths brought all
the way would leave it directions alone, too faint to begin with.

References:
    Lyu & Simoncelli, *Nonlinear extraction of independent components of natural images using
    radial Gaussianization*, Neural Computation 21 (2009).
"""

import warnings

import torch
from scipy.special import gammaincinv
from torch import Tensor

from .data import moments
from .marginals import FEWEST, Chart, MarginalTransform, quantile_knots, with_slopes

__all__ = ["RadialTransform", "radial_transform"]

_SHARE = 0.5  # of the way to the lengths of normal rows
_LEAST_SPREAD = 1e-3  # of the logarithms of lengths: else all rows lie on one ellipsoid


class RadialTransform(Chart):
    r"""From rows of tempered lengths to the data's, shape ``(*, D)`` each.

    With :math:`w = A^{-1}(x - m)` white, the inverse is :math:`w\, e^{s(l) - l}`, where :math:`l =
    \log|w|` and s is a monotone rational-quadratic spline, linear beyond its knots.

    Args:
        loc: :math:`m`, shape ``(D,)``.
        linear: A, shape ``(D, D)``.
        x: Knots of s, ascending, shape ``(1, K)``.
        y: Its values there, ascending, shape ``(1, K)``.
        slopes: Its positive slopes there, shape ``(1, K)``; the first is 1, so that the map is
            smooth at the centre.
    """

    makes = "lengths made more normal"

    def __init__(self, loc: Tensor, linear: Tensor, x: Tensor, y: Tensor, slopes: Tensor) -> None:
        super().__init__()
        self.loc, self.linear, self.spline = loc, linear, MarginalTransform(x, y, slopes)
        self.whitening = torch.linalg.inv(linear)
        self.log_det = float(torch.linalg.slogdet(linear).logabsdet)

    def arguments(self) -> tuple[Tensor, ...]:
        """Return what the constructor was given."""
        return self.loc, self.linear, *self.spline.knots

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log |dy/dx|``, shape ``(*)``: here x is tempered and y in the data."""
        length = _log_length(self._white(y))
        stretch = self.spline.inv(length) - length
        log_det = y.shape[-1] * stretch + self.spline.log_slope(length)
        return self.log_det - log_det[..., 0]

    # In the parameters' own type: a coarser one of values may not tell near rows far away apart.

    def _white(self, y: Tensor) -> Tensor:
        loc, whitening = self.loc.to(y.device), self.whitening.to(y.device)
        return ((y.to(loc) - loc) @ whitening.T).to(y)

    def _call(self, x: Tensor) -> Tensor:
        length = _log_length(x)
        w = x * (self.spline(length) - length).exp()
        loc, linear = self.loc.to(x.device), self.linear.to(x.device)
        return (loc + w.to(loc) @ linear.T).to(x)

    def _inverse(self, y: Tensor) -> Tensor:
        w = self._white(y)
        length = _log_length(w)
        return w * (self.spline.inv(length) - length).exp()


def _log_length(w: Tensor) -> Tensor:
    """Return the logarithms of lengths, shape ``(*, 1)``, finite and without slope at zero."""
    largest = w.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    return largest.log() + 0.5 * (w / largest).square().sum(-1, keepdim=True).clamp(min=0.5).log()


def radial_transform(rows: Tensor) -> RadialTransform | None:
    """Return the map that brings rows half-way to normal lengths.

    None where rows are few or have all the same length.

    Args:
        rows: Rows, shape ``(N, D)``, on the CPU.

    Raises:
        ValueError: If their moments are not those of a density.
    """
    dim = rows.shape[1]
    if len(rows) < FEWEST or dim < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who chooses the map gives them
        m = moments(rows.double())
    length = _log_length(m.white(rows))[:, 0]
    if float(length.max() - length.min()) < _LEAST_SPREAD:
        return None
    x, normal = quantile_knots(length)
    squares = 2 * gammaincinv(0.5 * dim, torch.special.ndtr(normal).numpy())  # chi-squared
    full = 0.5 * torch.from_numpy(squares).log()
    x, y, slopes = with_slopes(x, torch.lerp(x, full, _SHARE))
    slopes[0] = 1.0
    return RadialTransform(m.loc, m.linear, x[None], y[None], slopes[None])
