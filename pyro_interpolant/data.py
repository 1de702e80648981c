r"""What is done to data before training: checks, moments, batches."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Batches",
    "Moments",
    "checked_rows",
    "drawn",
    "moments",
    "some",
    "tamed",
    "usual",
]

_DEPENDENT = 1e-12  # a correlation eigenvalue below this means linearly dependent columns
_NARROW = 1e-3  # a standard deviation along an eigenvector, of scaled columns
_RARE = 0.005  # the share of values on either side that may be outliers
_RESOLVED = 0.1  # of the smallest spread, beyond which rounding is warned of
_CLIP = 20.0  # robust standard deviations beyond which a value does not stretch the whitening
_IQR, _MOST = 1.349, 5.152  # standard deviations between the quartiles, and between rare values
_VALUES = 2**20  # looked at for quantiles
_CUTS = 3  # along the axes, at the most


class Moments(NamedTuple):
    """An affine map that whitens data: ``x = loc + linear @ w`` with ``w`` of unit covariance.

    Attributes:
        loc: The centre, float64, shape ``(D,)``.
        linear: The map L, float64, shape ``(D, D)``.
        whitening: Its inverse, float64, shape ``(D, D)``.
    """

    loc: Tensor
    linear: Tensor
    whitening: Tensor

    def white(self, x: Tensor) -> Tensor:
        """Return rows whitened, float64, shape ``(N, D)``."""
        return (x.to(self.loc) - self.loc) @ self.whitening.T


def checked_rows(x: Any, name: str, event_shape: Sequence[int | None] = (None,)) -> Tensor:
    """Return x as a finite floating tensor of rows, or say what is wrong with it.

    Args:
        x: A tensor or array, expected of shape ``(N, *event_shape)``.
        name: What to call it in messages.
        event_shape: The expected shape of a row; None stands for any size.

    Returns:
        The rows, detached, shape ``(N, *event_shape)``.

    Raises:
        TypeError: If it is not a tensor or an array, or not of a floating type.
        ValueError: If it has no rows, rows of another shape, or NaN or infinite rows.
    """
    try:
        x = torch.as_tensor(x).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"expected {name} to be a tensor or an array, got {type(x).__name__}"
        ) from error
    if not x.is_floating_point():
        raise TypeError(
            f"expected {name} of a floating type, got {x.dtype}: convert it with .float(), and "
            "add uniform noise of one step to counts and rounded values, which have no density"
        )
    expected = tuple(event_shape)
    if x.dim() != 1 + len(expected) or any(
        e not in (None, s) for e, s in zip(expected, x.shape[1:], strict=True)
    ):
        want = ", ".join("D" if e is None else str(e) for e in expected)
        hint = f": for N scalars pass shape (N, 1), {name}[:, None]" if x.dim() == 1 else ""
        raise ValueError(f"expected {name} of shape (N, {want}), got {tuple(x.shape)}{hint}")
    if len(x) == 0:
        raise ValueError(f"expected rows of {name}, got none")
    bad = (~torch.isfinite(x)).reshape(len(x), -1).any(dim=1)
    if bool(bad.any()):
        raise ValueError(
            f"expected finite {name}, got NaN or infinite values in {int(bad.sum())} of {len(x)} "
            f"rows, the first being row {int(bad.nonzero()[0])}: remove or impute them"
        )
    return x


def some(count: int, most: int, weights: Tensor | None = None) -> Tensor:
    """Return which of so many rows to look at, the same at each call; all where they are few.

    Args:
        count: The number of rows.
        most: How many to look at.
        weights: Non-negative weights, shape ``(N,)``: rows are then drawn with replacement in
            their proportion.
    """
    generator = torch.Generator().manual_seed(0)
    if weights is not None:
        return drawn(weights.cpu(), min(most, 100 * count), generator)
    if count <= most:
        return torch.arange(count)
    return torch.randint(count, (most,), generator=generator)


def drawn(weights: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return rows drawn with replacement in proportion to their weights, shape ``(count,)``.

    Of any number of rows: :func:`torch.multinomial` ends at 16 million.
    """
    return _at(weights.double().cumsum(0), count, generator)


def _at(ends: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return the same, given the running sums of the weights, float64, shape ``(N,)``."""
    u = torch.rand(count, dtype=ends.dtype, device=ends.device, generator=generator)
    return torch.searchsorted(ends, u * ends[-1], right=True).clamp_(max=len(ends) - 1)


def tamed(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return rows whose wild values are cut, ``(N, D)``; x itself where there are none.

    Wild is what is beyond 20 robust standard deviations and among the 0.5% farthest on its side:
    what is far and not so rare is a mode.

    Args:
        x: Rows, shape ``(N, D)``.
        weights: Their weights, shape ``(N,)``, or None.
    """
    few = x[_few(x, weights)]
    levels = x.new_tensor([_RARE, 0.25, 0.5, 0.75, 1 - _RARE])
    low, first, median, third, high = torch.quantile(few, levels, dim=0)
    # Where most values are one and the same, the few others tell the scale.
    deviation = torch.where(third > first, (third - first) / _IQR, (high - low) / _MOST)
    spread = torch.where(deviation > 0, _CLIP * deviation, torch.inf)
    low, high = torch.minimum(median - spread, low), torch.maximum(median + spread, high)
    if bool(((x >= low) & (x <= high)).all()):
        return x
    return torch.minimum(torch.maximum(x, low), high)


def _few(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return which rows tell the quantiles."""
    return some(len(x), max(1, _VALUES // x.shape[1]), weights).to(x.device)


class _Axes(NamedTuple):
    """Centre and scale of columns, ``(D,)``; the correlation's eigenvalues and eigenvectors."""

    loc: Tensor
    scale: Tensor
    eigenvalues: Tensor
    vectors: Tensor

    def along(self, x: Tensor) -> Tensor:
        """Return rows along the axes, shape ``(N, D)``."""
        return (x - self.loc) / self.scale @ self.vectors

    def across(self, z: Tensor) -> Tensor:
        """Return rows along the axes in columns again, shape ``(N, D)``."""
        return self.loc + self.scale * (z @ self.vectors.T)


def _axes(x: Tensor, share: Tensor) -> _Axes:
    share = share / share.sum()
    loc = share @ x
    centred = x - loc
    scale = (share @ centred.square()).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)  # some of the rows may not vary
    z = centred / scale
    return _Axes(loc, scale, *torch.linalg.eigh((share[:, None] * z).T @ z))


def _robust_axes(x: Tensor, weights: Tensor | None) -> _Axes:
    """Return the axes of rows whose wild values are cut, first by column, then along the axes.

    Where columns nearly depend on each other, a row that is tame in each may be wild between them.
    It also turns the axes: once it is cut along them, they are better, and it is cut again.
    """
    share = x.new_ones(len(x)) if weights is None else weights.double()
    x = tamed(x, weights)
    few = x[_few(x, weights)]  # by weight, where there are any
    for _ in range(_CUTS):
        axes = _axes(few, few.new_ones(len(few)))
        along = axes.along(few)
        cut = tamed(along)
        if cut is along:
            break
        few = axes.across(cut)
    along = axes.along(x)
    cut = tamed(along, weights)
    return _axes(x if cut is along else axes.across(cut), share)


def moments(x: Tensor, weights: Tensor | None = None) -> Moments:
    """Return the map that whitens the rows of x.

    Columns are centred and scaled first, so that their units do not matter, then multiplied by the
    symmetric inverse root of their correlation: each whitened column stays as near to its own as
    can be, and the map is unique; where columns nearly depend on each other, they are scaled along
    the eigenvectors. Values beyond 20 robust standard deviations and among the 0.5% farthest on
    their side, in a column or along an eigenvector, count as if they were there: a wild row does
    not set the scale of all others.

    Args:
        x: Finite rows, shape ``(N, D)``.
        weights: Non-negative weights, shape ``(N,)``, or None.

    Warns:
        UserWarning: If the columns are dependent but for little more than rounding.

    Raises:
        ValueError: If there are fewer rows than columns, a constant column, or linearly dependent
            columns.
    """
    count, dim = x.shape
    if count <= dim:
        raise ValueError(
            f"expected more rows than dimensions, got {count} rows of {dim}: get more data, or "
            "drop columns"
        )
    eps, x = torch.finfo(x.dtype).eps, x.double()
    constant = (x == x[0]).all(dim=0)
    if bool(constant.any()):
        columns = constant.nonzero().flatten().tolist()
        raise ValueError(
            f"expected columns that vary, got constant columns {columns}: drop them, they have no "
            "density"
        )
    loc, scale, eigenvalues, vectors = _robust_axes(x, weights)
    if float(eigenvalues[0]) < _DEPENDENT:
        worst = vectors[:, 0].abs().topk(min(2, dim)).indices.tolist()
        raise ValueError(
            f"expected linearly independent columns, got dependent ones (columns {sorted(worst)} "
            "take part): drop one, or add noise of the size of the measurement's error"
        )
    roots = eigenvalues.sqrt()
    rounding = eps * (loc.abs() + scale) / scale
    _warn_if_unresolved(vectors[:, 0], rounding, float(roots[0]))
    # Near dependence the eigenvectors keep the rounding of the narrow directions to themselves.
    turn = vectors if float(roots[0]) > _NARROW else torch.eye(dim).to(vectors)
    linear = scale[:, None] * ((vectors * roots) @ turn.T)
    return Moments(loc, linear, (turn / roots) @ vectors.T / scale)


def _warn_if_unresolved(direction: Tensor, rounding: Tensor, spread: float) -> None:
    """Warn where data hardly vary by more than their rounding along a direction, ``(D,)``."""
    noise = float((direction * rounding).norm())
    if noise > _RESOLVED * spread:
        worst = sorted(direction.abs().topk(min(2, len(direction))).indices.tolist())
        warnings.warn(
            f"a combination of columns (columns {worst} take part) varies by {spread:.1e} of "
            f"their spread, and rounding is {noise:.1e}: a flow learns the rounding. Give rows "
            "and flow in float64, centre columns far from zero, drop one, or add noise of the "
            "size of the measurement's error",
            stacklevel=4,
        )


def usual(w: Tensor) -> Tensor:
    """Return the places of whitened rows but for outliers, those both far and rare, ``(N,)``.

    Far is 20 times the median distance from the centre, rare the farthest 0.5%. One such row would
    decide alone which weights have the best held-out loss. Other rows come twice in their stead.

    Args:
        w: Whitened rows, shape ``(N, D)``.
    """
    distance = w.double().norm(dim=-1)
    few = distance[some(len(w), _VALUES).to(w.device)]
    good = distance <= torch.maximum(_CLIP * few.median(), few.quantile(1 - _RARE))
    places = good.nonzero().flatten()
    return places[torch.arange(len(w), device=w.device) % len(places)]


class Batches:
    """Index batches of equal size forever, in a new order each time all rows were seen.

    With weights, each batch is drawn with replacement in their proportion.

    Args:
        count: The number of rows.
        size: The number of rows per batch, at most ``count``.
        device: Where the indices live.
        weights: Non-negative weights, shape ``(count,)``, or None.

    Attributes:
        order: The present order of the rows, shape ``(count,)``.
        position: Where in it the next batch starts.
    """

    def __init__(
        self, count: int, size: int, device: torch.device, weights: Tensor | None = None
    ) -> None:
        self.count, self.size, self.device = count, size, device
        self.ends = None if weights is None else weights.double().cumsum(0)
        self.order = torch.zeros(0, dtype=torch.long, device=device)
        self.position = 0

    def next(self) -> Tensor:
        """Return the next batch, shape ``(size,)``."""
        if self.ends is not None:
            return _at(self.ends, self.size)
        if self.position + self.size > len(self.order):
            self.order, self.position = torch.randperm(self.count, device=self.device), 0
        self.position += self.size
        return self.order[self.position - self.size : self.position]
