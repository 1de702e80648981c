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
    "dequantize",
    "moments",
    "usual",
    "warn_if_rounded",
]

_DEPENDENT = 1e-12  # a correlation eigenvalue below this means linearly dependent columns
_NARROW = 1e-3  # a standard deviation along an eigenvector, of scaled columns
_LOOKED_AT = 20_000  # rows, for repeated values
_REPEATED = 0.1  # the share of repeated values in a column from which a user is warned
_RARE = 0.005  # the share of values on either side that may be outliers
_RESOLVED = 0.1  # of the smallest spread, beyond which rounding is warned of
_CLIP = 20.0  # robust standard deviations beyond which a value does not stretch the whitening


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


def moments(x: Tensor, weights: Tensor | None = None) -> Moments:
    """Return the map that whitens the rows of x.

    Columns are centred and scaled first, so that their units do not matter, then multiplied by the
    symmetric inverse root of their correlation: each whitened column stays as near to its own as
    can be, and the map is unique; where columns nearly depend on each other, they are scaled along
    the eigenvectors. Values beyond 20
    robust standard deviations and among the 0.5% farthest on their side count as if they were
    there: a wild row does not set the scale of all others.

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
    levels = x.new_tensor([_RARE, 0.25, 0.5, 0.75, 1 - _RARE])
    low, first, median, third, high = torch.quantile(x[: 2**20 // dim], levels, dim=0)
    spread = _CLIP * (third - first) / 1.349
    spread = torch.where(spread > 0, spread, torch.inf)
    # What is far and rare is an outlier; what is far and not so rare is a mode.
    x = torch.maximum(x, torch.minimum(median - spread, low))
    x = torch.minimum(x, torch.maximum(median + spread, high))
    share = torch.full((count,), 1 / count, dtype=x.dtype, device=x.device)
    if weights is not None:
        share = weights.double() / weights.double().sum()
    loc = share @ x
    centred = x - loc
    scale = (share @ centred.square()).sqrt()
    z = centred / scale
    eigenvalues, vectors = torch.linalg.eigh((share[:, None] * z).T @ z)
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
    few = distance[: 2**20]
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
        self.count, self.size, self.device, self.weights = count, size, device, weights
        self.order = torch.zeros(0, dtype=torch.long, device=device)
        self.position = 0

    def next(self) -> Tensor:
        """Return the next batch, shape ``(size,)``."""
        if self.weights is not None:
            return torch.multinomial(self.weights, self.size, replacement=True)
        if self.position + self.size > len(self.order):
            self.order, self.position = torch.randperm(self.count, device=self.device), 0
        self.position += self.size
        return self.order[self.position - self.size : self.position]


def warn_if_rounded(x: Tensor) -> None:
    """Warn where columns repeat their values: rounded and discrete data have no density.

    Rows that repeat as a whole, as a Markov chain's do, count once.

    Args:
        x: Rows, shape ``(N, D)``.
    """
    few = torch.unique(x[:_LOOKED_AT], dim=0)
    if len(few) < 100:
        return
    counts = [len(torch.unique(column)) for column in few.T]
    shares = [1 - count / len(few) if count > 1 else 0.0 for count in counts]
    found = [i for i, share in enumerate(shares) if share > _REPEATED]
    if found:
        warnings.warn(
            f"columns {found} repeat up to {max(shares):.0%} of their values, as rounded or "
            "discrete data do, which have no density: a flow learns spikes. Spread them over "
            "their rounding step first, fit(distribution, dequantize(x))",
            stacklevel=4,
        )


def dequantize(x: Tensor, step: Tensor | float | None = None, *, seed: int = 0) -> Tensor:
    """Spread rounded or discrete values uniformly over their rounding step.

    Densities learned from the result are those of the values per step: the probability of a value
    is the mean density over its step times the step.

    Args:
        x: Rows of numbers of any type, shape ``(N, D)``.
        step: The rounding step, one or per column, shape ``(D,)``; 0 leaves a column alone. By
            default the smallest difference between values of the column, where it repeats any.
        seed: Of the noise.

    Returns:
        ``x + step * (u - 1/2)`` with u uniform on [0, 1), shape ``(N, D)``, floating.

    Raises:
        ValueError: If a step is negative, or x is not of shape ``(N, D)``.

    Example:
        >>> x = dequantize(torch.tensor([[1.0], [2.0], [2.0], [4.0]]))
        >>> bool(((x.round() - torch.tensor([[1.0], [2.0], [2.0], [4.0]])).abs() < 0.51).all())
        True
    """
    x = torch.as_tensor(x)
    x = x if x.is_floating_point() else x.to(torch.get_default_dtype())
    x = checked_rows(x, "x")
    if step is None:
        step = torch.stack([_rounding_step(column) for column in x.T])
    step = torch.as_tensor(step, dtype=x.dtype, device=x.device)
    if float(step.min()) < 0:
        raise ValueError(f"expected steps of at least 0, got {float(step.min()):.3g}")
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return x + step * (u - 0.5)


def _rounding_step(column: Tensor) -> Tensor:
    values = torch.unique(column)
    if len(values) < 2 or len(values) > (1 - _REPEATED) * len(column):
        return column.new_zeros(())
    gaps = values.diff()
    return gaps[gaps > 1e-6 * gaps.max()].min()
