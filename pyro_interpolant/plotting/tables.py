"""Pictures of samples beside data, column by column."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from .._package import check_ranges, whole
from ..distributions.interpolant import ConditionalInterpolantDistribution
from ..distributions.joint import JointInterpolantDistribution
from ..distributions.rows import RowsLike, checked_rows, in_order, named_columns
from .axes import DATA_COLOR, MODEL_COLOR, as_points, axes_array, extent_of, shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CONTOUR_BINS = 60  # per axis


def corner(
    samples: RowsLike | Distribution,
    data: RowsLike,
    *,
    names: Sequence[str] | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    count: int = 4000,
    ax: np.ndarray | None = None,
) -> np.ndarray:
    """Compare samples with data: histograms on the diagonal, contours of pairs of columns below.

    Contours enclose shares of the rows. All axes of a column have the same limits, those of both
    sets but for the farthest 0.5% on each side.

    Args:
        samples: Samples, shape ``(M, D)``, a data frame or draws by name; or a distribution to
            draw ``count`` from.
        data: Rows, shape ``(N, D)``, a data frame or draws by name.
        names: One per column; by default those of the data.
        levels: The shares that contours enclose.
        count: The number of samples to draw.
        ax: An array of D x D axes, or None for new ones.

    Raises:
        ValueError: If samples and data have other columns, or numbers that are not finite, there
            are none of either, or a setting cannot work. Where both have names, as those of a
            distribution trained on a data frame, columns are compared by them.
    """
    check_ranges(shares(levels), whole("count", count, 1))
    rows, drawn, found = _beside(samples, data, int(count))
    pair = ((rows, DATA_COLOR, "data"), (drawn, MODEL_COLOR, "model"))
    dim = rows.shape[-1]
    names = (found or [f"$x_{{{i + 1}}}$" for i in range(dim)]) if names is None else names
    given = np.asarray(ax).shape
    fits = ax is None or given == (dim, dim)
    check_ranges(
        (f"{dim} names, one per column", len(names) == dim, names),
        (f"{dim} x {dim} axes in an array", fits, f"shape {given}"),
    )
    if ax is None:
        ax = axes_array(dim, dim, (1.6 * dim + 1, 1.6 * dim + 1))
    boxes = np.array([extent_of(part) for part, *_ in pair]).reshape(2, dim, 2)
    low, high = boxes[..., 0].min(0), boxes[..., 1].max(0)
    for i, j in np.ndindex(dim, dim):
        one = ax[i][j]
        if j > i:
            one.set_axis_off()
            continue
        for part, color, label in pair:
            if i == j:
                bins = np.linspace(low[i], high[i], 41)
                heights = np.histogram(part[:, i], bins, density=True)[0]
                one.stairs(heights, bins, color=color, label=label)
                continue
            _contours(one, part[:, [j, i]], (low[[j, i]], high[[j, i]]), levels, color)
            if label == "data":
                x, y = as_points(part[:, [j, i]]).T
                one.scatter(x, y, s=2, alpha=0.2, color=color, linewidths=0, zorder=0)
        one.set(xlabel=names[j] if i == dim - 1 else "", ylabel=names[i] if j == 0 < i else "")
        one.set_xlim(low[j], high[j])
        if i == j:
            one.set_yticks([])
        else:
            one.set_ylim(low[i], high[i])
    ax[0][0].legend(frameon=False, fontsize="small")
    return ax


def table(x: RowsLike, names: Sequence[str] = ()) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return rows, shape ``(N, D)``, of a tensor, a frame or draws by name, and names if any.

    Args:
        x: The rows, shape ``(N, *)``.
        names: Of the columns, in the order to return them in, where x has names, too.
    """
    found, own = _flat(x)
    return in_order(found, own, names).numpy(), own


def _flat(x: RowsLike) -> tuple[Tensor, tuple[str, ...]]:
    rows, names = named_columns(x)
    check_ranges(("rows to draw", rows.numel() > 0, f"none, shape {tuple(rows.shape)}"))
    rows = rows.detach().double().cpu()
    return checked_rows(rows.reshape(len(rows), -1), "what is drawn"), names


def _beside(
    samples: RowsLike | Distribution, data: RowsLike, count: int
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Return the data, samples with the same columns, and the names of the data's, if any.

    Args:
        samples: Samples, shape ``(M, D)`` or by name, or a distribution to draw them from.
        data: The data, shape ``(N, D)`` or by name.
        count: How many samples to draw.

    Raises:
        TypeError: If they are a distribution without its context.
        ValueError: If there are other columns, or no rows.
    """
    if isinstance(samples, ConditionalInterpolantDistribution):
        raise TypeError(
            f"expected samples or a distribution to draw them from, got {type(samples).__name__}: "
            "draw those of its condition(context)"
        )
    rows, names = table(data)
    own: tuple[str, ...] = ()
    if isinstance(samples, JointInterpolantDistribution) and names:
        samples = samples.sample_dict((count,))
    elif isinstance(samples, Distribution):
        own = getattr(samples, "columns", ())
        samples = samples.sample(torch.Size((count,)))
    drawn, found = _flat(samples)
    drawn = in_order(drawn, found or own, names, "samples")
    if drawn.shape[1] != rows.shape[1]:
        raise ValueError(
            f"expected samples with as many columns as the data, {rows.shape[1]}, got "
            f"{drawn.shape[1]}"
        )
    return rows, drawn.numpy(), names


def _contours(
    ax: "Axes",
    x: np.ndarray,
    box: tuple[np.ndarray, np.ndarray],
    levels: Sequence[float],
    color: str,
) -> None:
    """Draw contours that enclose shares of points, shape ``(N, 2)``, of a smoothed histogram."""
    from scipy.ndimage import gaussian_filter

    bins = [np.linspace(a, b, _CONTOUR_BINS + 1) for a, b in zip(*box, strict=True)]
    counts = gaussian_filter(np.histogram2d(x[:, 0], x[:, 1], bins)[0], _CONTOUR_BINS / 30)
    heights = np.sort(counts, axis=None)[::-1]
    inside = heights.cumsum() / heights.sum()
    at = np.unique([heights[np.searchsorted(inside, level)] for level in levels])
    middles = [0.5 * (edges[1:] + edges[:-1]) for edges in bins]
    ax.contour(*middles, counts.T, at, colors=color, linewidths=1)
