r"""Paths from base to data: the points that they pass, and their rates there.

A path from N(0, I) passes a point :math:`x = \alpha x_0 + \beta x_1 + \gamma z` on its way to one
of n rows, and might as well be on the way to another. With the probabilities

.. math:: p_j \propto \exp\left(-\frac{|x - \beta y_j|^2}{2 \sigma^2}\right), \quad
          \sigma^2 = \alpha^2 + \gamma^2,

of its leading to the row :math:`y_j`, the rate there is
:math:`\dot\beta d + (\dot\sigma / \sigma)(x - \beta d)` in the mean, with
:math:`d = \sum_j p_j y_j`. As rows are exchangeable, it has the same mean given x as the rate of
the path itself, and less variance: the regression on it has the same minimiser, and less noisy
gradients. Of few columns many rows share a point until late, of many next to none.

References:
    Albergo & Vanden-Eijnden, ICLR 2023, arXiv 2209.15571, eq. 4; Blackwell, *Conditional
    expectation and unbiased sequential estimation*, Ann. Math. Stat. 18 (1947); Xu, Tong &
    Jaakkola, *Stable target field for reduced variance score estimation in diffusion models*,
    ICLR 2023.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .._torch import draws_nothing
from ..diffusion.conversions import noise_and_data
from ..interpolants.linear import Interpolant

Target = Literal["velocity", "noise"]

_MOST_TOGETHER = 512  # rows that share points: with 1,024 a minute has fewer steps, as good
_LOG_ERROR = 1e-2  # of log p_j, at most, where it is rounded


class Pairs(NamedTuple):
    """What paths are between, in groups of one time each.

    Attributes:
        t: Times, shape ``(*, T, 1)``.
        w0: Base draws, shape ``(*, T, N, D)``.
        w1: Rows, of the same shape.
        context: Their contexts, shape ``(*, T, N, C)``, or None.
        z: Noise, shape ``(*, T, N, D)``, or None.
        own: Those of the groups that are this process's.
        together: How many rows, one after the other, share points; 0 where none do.
    """

    t: Tensor
    w0: Tensor
    w1: Tensor
    context: Tensor | None
    z: Tensor | None
    own: slice
    together: int


class Points(NamedTuple):
    """Points of paths and what the network is to match there.

    Attributes:
        t: Times, broadcastable to ``(*)``.
        w: Points, shape ``(*, D)``.
        target: Rates of the paths, means of rates, or the noise, shape ``(*, D)``.
        context: Contexts, shape ``(*, C)``, or None.
    """

    t: Tensor
    w: Tensor
    target: Tensor
    context: Tensor | None = None

    def at(self, i: int | Tensor) -> "Points":
        """Return the points at one index, or several, shape ``(K,)``, of the first dimension."""
        context = None if self.context is None else self.context[i]
        return Points(self.t[i], self.w[i], self.target[i], context)

    def of_groups(self, some: slice) -> "Points":
        """Return the points of some of the groups of one time."""
        context = None if self.context is None else self.context[..., some, :, :]
        w, target = self.w[..., some, :, :], self.target[..., some, :, :]
        return Points(self.t[..., some, :], w, target, context)


def path_points(
    interpolant: Interpolant,
    t: Tensor,
    w0: Tensor,
    w1: Tensor,
    z: Tensor | None = None,
    *,
    target: Target = "velocity",
) -> tuple[Points, ...]:
    r"""Return points of the paths between pairs: one set, or one for z and one for -z.

    The mean over both varies little where the slope of :math:`\gamma` is large.

    Args:
        interpolant: The path between pairs.
        t: Times in [0, 1], broadcastable to ``(*)``.
        w0: Whitened base draws, shape ``(*, D)``.
        w1: Whitened data, shape ``(*, D)``.
        z: Latent draws, shape ``(*, D)``; drawn, where there is a latent term, if not given.
        target: What the network is to learn: the velocity, or the noise :math:`E[z \mid I_t]`.

    References:
        arXiv 2303.08797, Section 6.1 (antithetic draws).
    """
    if z is None and interpolant.has_latent():
        z = torch.randn_like(w0)
    if z is None:
        return (Points(t, *interpolant.sample(t, w0, w1)),)
    found = []
    for s in (z, -z):
        w_t, dw_t = interpolant.sample(t, w0, w1, s)
        found.append(Points(t, w_t, s if target == "noise" else dw_t))
    return tuple(found)


def rows_together(groups: int, count: int) -> int:
    """Return how many consecutive rows share points, which may lead to any of these rows.

    Of T groups of N rows: whole groups, as many as a divisor of T, or a divisor of N rows.
    """
    if count > _MOST_TOGETHER:
        return _divisor(count, _MOST_TOGETHER)
    return count * _divisor(groups, _MOST_TOGETHER // count)


def _divisor(number: int, most: int) -> int:
    return max(k for k in range(1, most + 1) if number % k == 0)


def mean_rates(
    interpolant: Interpolant,
    t: Tensor,
    w: Tensor,
    rates: Tensor,
    rows: Tensor,
    together: int,
    labels: Tensor | None = None,
) -> Tensor:
    r"""Return mean rates of paths from N(0, I) to rows that do not depend on the base draws.

    Where :math:`\sigma` is too small for the type to resolve the :math:`p_j`, the rate of the path
    itself is returned.

    Args:
        interpolant: The path between pairs, linear in its ends.
        t: Times of groups, shape ``(T, 1)`` or ``(K, T, 1)``.
        w: Points, shape ``(*, T, N, D)``.
        rates: The rates of their own paths, of the same shape.
        rows: The rows that these lead to, of the same shape.
        together: How many rows, one after the other, share points: see :func:`rows_together`.
        labels: Labels of the rows, shape ``(*, T, N, 1)``: paths lead to rows of their own label.

    Returns:
        Rates, of the shape of w.
    """
    # In float64 neither autocast nor a graphics card takes fewer digits than the type has.
    plain = w.is_cpu and not torch.is_autocast_enabled(w.device.type)
    dtype = w.dtype if plain else torch.float64

    def grouped(s: Tensor) -> Tensor:
        s = s.expand(*w.shape[:-1], s.shape[-1])
        return s.reshape(1, -1, together, s.shape[-1]).to(dtype)

    b, db, square, half = (grouped(s[..., None]) for s in noise_and_data(interpolant, t))
    x, y = grouped(w), grouped(rows)
    length = y.square().sum(-1, keepdim=True)
    scale = b / square
    # log p_j is one product, of (scale x, -scale b / 2) with (y_j, |y_j|^2).
    of_points, of_rows = torch.cat((scale * x, -0.5 * b * scale), -1), torch.cat((y, length), -1)
    mask = None
    if labels is not None:
        label = grouped(labels)
        mask = label == label.transpose(-1, -2)
    with draws_nothing():  # which attention could, by dropout
        mean = scaled_dot_product_attention(of_points, of_rows, pad(y, (0, 1)), mask, scale=1.0)
    mean = mean[..., :-1]
    found = db * mean + half / square * (x - b * mean)
    # Of log p_j of rows near x / beta; others are too far for theirs to matter.
    error = torch.finfo(dtype).eps * x.square().sum(-1, keepdim=True) / square
    return torch.where(error < _LOG_ERROR, found, grouped(rates)).reshape(w.shape).to(w)
