r"""Maps that bring data nearer to normal, and supports whose bijection starts with one.

A map T takes rows that are nearer to normal to those of the data, :math:`x = T(u)`:

- :class:`MarginalTransform` takes each column by itself, :math:`u_i = s_i(x_i)`, to a normal one.
- :class:`RadialTransform` changes only the lengths of whitened rows :math:`w = A^{-1}(x - m)`,
  :math:`\log |u| = s(\log |w|)`, for tails as heavy in all directions.

Each s is a monotone rational-quadratic spline, linear beyond its knots. A flow on Gaussianized
rows is left with how columns depend on each other. It sees neither a thin slab of values nor a
long tail, which an affine map leaves to the last moments of its path. How knots are fitted to data
is a matter of training.

References:
    Chen & Gopinath, *Gaussianization*, NeurIPS 2000 (the marginal step); Lyu & Simoncelli, Neural
    Comput. 21 (2009) (radial Gaussianization); Gregory & Delbourgo, IMA J. Numer. Anal. 2 (1982)
    (the spline); Fritsch & Butland, SIAM J. Sci. Stat. Comput. 5 (1984) (its slopes).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.distributions import ComposeTransform, Transform, biject_to, constraints, transform_to
from torch.distributions.constraint_registry import ConstraintRegistry

from .._torch import is_tracing
from .bijections import PerEvent, biject
from .cache import RealVectorTransform

Constraint = constraints.Constraint
Knots = tuple[Tensor, Tensor, Tensor]
_VALUES_AT_ONCE = 2**22  # of rows


class Gaussianizer(RealVectorTransform):
    """A smooth map from rows nearer to normal to those of a support's unconstrained space.

    Attributes:
        effect: Its effect on the data, in words.
    """

    effect: str

    def arguments(self) -> tuple[Tensor, ...]:
        """Return the arguments of the constructor, tensors of any shapes."""
        raise NotImplementedError


class MarginalTransform(Gaussianizer):
    r"""From normal columns to the data's, shape ``(*, D)`` each, one by one.

    The inverse is a rational-quadratic spline between the knots and linear beyond, with one
    continuous derivative.

    Args:
        x: Knots of each column in the data, ascending, shape ``(D, K)``.
        y: Where the inverse takes them, ascending, shape ``(D, K)``.
        slopes: Its positive derivatives there, shape ``(D, K)``.
    """

    effect = "columns made normal"

    def __init__(self, x: Tensor, y: Tensor, slopes: Tensor) -> None:
        super().__init__()
        self.knots = (x, y, slopes)
        # Differences in the knots' own type: in a coarser type of values knots may coincide.
        width, height = x.diff(), y.diff()
        p0, p1 = slopes[:, :-1] * width / height, slopes[:, 1:] * width / height
        self._bins = (x[:, :-1], y[:, :-1], width, height, p0, p1)

    def arguments(self) -> tuple[Tensor, ...]:
        """Return the arguments of the constructor, shape ``(D, K)`` each."""
        return self.knots

    def log_slope(self, x: Tensor) -> Tensor:
        """Return the logarithm of the inverse's derivative in each column, shape ``(*, D)``."""
        return _in_parts(self._log_slope, x)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log |dy/dx|``, shape ``(*)``: here x is normal and y in the data."""
        return -self.log_slope(y).sum(-1)

    def _call(self, x: Tensor) -> Tensor:
        _check_columns(x, len(self.knots[0]))
        return _in_parts(self._to_data, x)

    def _inverse(self, y: Tensor) -> Tensor:
        _check_columns(y, len(self.knots[0]))
        return _in_parts(self._to_normal, y)

    # In each bin p are the slopes over that of the chord.

    def _log_slope(self, x: Tensor) -> Tensor:
        x0, _, width, height, p0, p1 = self._bins_of(x, self.knots[0])
        u = _within((x - x0) / width)
        v = u * (1 - u)
        top, bottom = p1 * u * u + 2 * v + p0 * (1 - u) ** 2, 1 + (p0 + p1 - 2) * v
        return (height / width).log() + top.log() - 2 * bottom.log()

    def _to_normal(self, x: Tensor) -> Tensor:
        x0, y0, width, height, p0, p1 = self._bins_of(x, self.knots[0])
        return y0 + height * spline((x - x0) / width, p0, p1)

    def _to_data(self, y: Tensor) -> Tensor:
        x0, y0, width, height, p0, p1 = self._bins_of(y, self.knots[1])
        return x0 + width * inverse_spline((y - y0) / height, p0, p1)

    def _bins_of(self, value: Tensor, edges: Tensor) -> list[Tensor]:
        """Return the start of each value's bin in x and y, its sides, and p at its ends.

        Six tensors of shape ``(*, D)``.
        """
        columns = value.detach().movedim(-1, 0)
        i = _last_below(edges.to(columns), columns.reshape(columns.shape[0], -1))
        found = (table.to(value).gather(1, i) for table in self._bins)
        return [table.reshape(columns.shape).movedim(0, -1) for table in found]


def spline(come: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    """Return how far y has come between two knots, as a share, where x has come so far.

    Args:
        come: Shares of the way in x, of any shape; below 0 and above 1 on the straight lines.
        p0: The slope at the first knot over that of the chord, of its shape.
        p1: That at the second knot.
    """
    u = _within(come)
    v = u * (1 - u)
    return (u * u + p0 * v) / (1 + (p0 + p1 - 2) * v) + _beyond(come, p0, p1)


def inverse_spline(come: Tensor, p0: Tensor, p1: Tensor) -> Tensor:
    """Return how far x has come where y has come so far: the inverse of :func:`spline`.

    Args:
        come: Shares of the way in y, of any shape; below 0 and above 1 on the straight lines.
        p0: The slope at the first knot over that of the chord, of its shape.
        p1: That at the second knot.
    """
    r = _within(come)
    # The root of the quadratic in x without a difference of numbers that are nearly equal.
    m, v = p0 * (1 - r) - p1 * r, r * (1 - r)
    larger = (m * m + 4 * v).sqrt() + m.abs()
    u = 2 * r / (2 * r + torch.where(m < 0, 4 * v / larger, larger))
    return u + _beyond(come, 1 / p0, 1 / p1)


def with_slopes(x: Tensor, y: Tensor) -> Knots:
    """Return knots with slopes of which the spline is monotone, each of shape ``(*, K)``.

    They are weighted harmonic means of those of the chords, the nearer weighing more.
    """
    w = x.diff()
    s = y.diff() / w
    before, after = w[..., :-1] + 2 * w[..., 1:], 2 * w[..., :-1] + w[..., 1:]
    inner = (before + after) / (before / s[..., :-1] + after / s[..., 1:])
    return x, y, torch.cat((s[..., :1], inner, s[..., -1:]), -1)


class RadialTransform(Gaussianizer):
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

    effect = "lengths made more normal"

    def __init__(self, loc: Tensor, linear: Tensor, x: Tensor, y: Tensor, slopes: Tensor) -> None:
        super().__init__()
        self.loc, self.linear, self.spline = loc, linear, MarginalTransform(x, y, slopes)
        self.whitening = torch.linalg.inv(linear)
        self.log_det = float(torch.linalg.slogdet(linear).logabsdet)

    def arguments(self) -> tuple[Tensor, ...]:
        """Return the arguments of the constructor, of the shapes above."""
        return self.loc, self.linear, *self.spline.knots

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log |dy/dx|``, shape ``(*)``: here x is tempered and y in the data."""
        length = log_length(self._white(y))
        stretch = self.spline.inv(length) - length
        log_det = y.shape[-1] * stretch + self.spline.log_slope(length)
        return self.log_det - log_det[..., 0]

    # In the parameters' own type: in a coarser one of values near rows far away may coincide.

    def _white(self, y: Tensor) -> Tensor:
        _check_columns(y, len(self.loc))
        loc, whitening = self.loc.to(y.device), self.whitening.to(y.device)
        return ((y.to(loc) - loc) @ whitening.T).to(y)

    def _call(self, x: Tensor) -> Tensor:
        _check_columns(x, len(self.loc))
        length = log_length(x)
        w = x * (self.spline(length) - length).exp()
        loc, linear = self.loc.to(x.device), self.linear.to(x.device)
        return (loc + w.to(loc) @ linear.T).to(x)

    def _inverse(self, y: Tensor) -> Tensor:
        w = self._white(y)
        length = log_length(w)
        return w * (self.spline.inv(length) - length).exp()


class Gaussianized(Constraint):
    """A support whose bijection starts from rows that are nearer to normal.

    Args:
        base_constraint: The support itself.
        gaussianizer: The map to its unconstrained rows: a :class:`MarginalTransform`, or a
            :class:`RadialTransform`.
    """

    def __init__(self, base_constraint: Constraint, gaussianizer: Gaussianizer) -> None:
        self.base_constraint, self.gaussianizer = base_constraint, gaussianizer
        self.event_dim = base_constraint.event_dim
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return which values are on the support."""
        return self.base_constraint.check(value)

    def __repr__(self) -> str:
        """Name the support."""
        return f"{self.base_constraint}, {self.gaussianizer.effect}"


def without_gaussianizer(support: Constraint) -> Constraint:
    """Return a support without its map."""
    return support.base_constraint if isinstance(support, Gaussianized) else support


def refuse_gaussianized(support: Constraint, what: str) -> None:
    """Raise a ValueError if paths do not run in the data's own columns."""
    if isinstance(support, Gaussianized):
        raise ValueError(
            f"expected a flow in the data's own coordinates, got {support.gaussianizer.effect}, "
            f"where {what} is another: train with from_samples(..., marginals=False)"
        )


def _composed(registry: ConstraintRegistry, constraint: Gaussianized) -> Transform:
    inner = PerEvent(registry(constraint.base_constraint))
    return ComposeTransform([constraint.gaussianizer, inner])


for _registry in (biject, biject_to, transform_to):
    _registry.register(Gaussianized, partial(_composed, _registry))


def _check_columns(x: Tensor, columns: int) -> None:
    """Raise a ValueError for rows, ``(*, D)``, of another size: a part of a row has no map."""
    if x.shape[-1] != columns:
        raise ValueError(
            f"expected rows of {columns} columns, as the map was fitted to, got {x.shape[-1]}: to "
            "split a site by SplitReparam, give its parts supports of their own by support_fn"
        )


def _in_parts(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return a function of rows, ``(*, D)``, that needs many times their memory, of all rows."""
    size = max(1, _VALUES_AT_ONCE // max(1, x.shape[-1]))
    if is_tracing() or x.dim() < 2 or x[..., 0].numel() <= size:
        return function(x)
    parts = x.reshape(-1, x.shape[-1]).split(size)
    return torch.cat([function(part) for part in parts]).reshape(x.shape)


def _last_below(edges: Tensor, values: Tensor) -> Tensor:
    """Return the last edge but one, shape ``(D, K)``, below each value, ``(D, N)``, or the first.

    By bisection, since torch has no batching rule for its own search.
    """
    last = int(edges.shape[1]) - 2  # a tensor where it is traced
    found = torch.zeros_like(values, dtype=torch.long)
    for power in range(last.bit_length() - 1, -1, -1):
        further = found + 2**power
        below = edges.gather(1, further.clamp(max=last)) < values
        found = torch.where((further <= last) & below, further, found)
    return found


def _within(come: Tensor) -> Tensor:
    """Return how far values have come within a bin, from 0 to 1, of their shape.

    At its ends the derivative is that inside: which one ``clamp`` has there depends on the version
    of torch.
    """
    return come.where(~((come < 0) | (come > 1)), (come > 1).to(come))  # NaN stays


def _beyond(come: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Return what the straight lines add before the start of a bin and past its end, ``(*, D)``.

    Not by clamping, whose derivatives at the knots themselves would count twice.
    """
    outside = torch.where(come < 0, come * before, (come - 1) * after)
    return torch.where((come < 0) | (come > 1), outside, 0.0)


def log_length(w: Tensor) -> Tensor:
    """Return the logarithms of lengths, shape ``(*, 1)``, finite and without slope at zero."""
    largest = w.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
    return largest.log() + 0.5 * (w / largest).square().sum(-1, keepdim=True).clamp(min=0.5).log()
