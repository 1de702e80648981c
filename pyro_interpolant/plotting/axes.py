"""What pictures share: axes, colours, plot limits, and the check that levels are in (0, 1)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .._package import needing
from ..distributions.rows import evenly_spaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DATA_COLOR, MODEL_COLOR, THIRD_COLOR = "#4c566a", "#d1495b", "#2a9d8f"
_POINTS = 4000  # shown of data, at most


def new_axes(ax: "Axes | None") -> "Axes":
    """Return the axes, or new ones."""
    return axes_array(1, 1)[0, 0] if ax is None else ax


def axes_array(rows: int, columns: int, size: tuple[float, float] | None = None) -> np.ndarray:
    """Return new axes, shape ``(rows, columns)``, in a figure of a size in inches."""
    with needing("pyro_interpolant.plotting", "matplotlib"):
        from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")[1]


def shares(levels: Sequence[float]) -> tuple[str, bool, object]:
    """Return the setting of ``check_ranges`` that levels are shares between 0 and 1."""
    return "levels, each in (0, 1)", all(0 < level < 1 for level in levels), levels


def extent_of(x: np.ndarray) -> tuple[float, ...]:
    """Return the bounds of samples, shape ``(N, D)``, but for the farthest 0.5 % on each side.

    Those of a constant column are apart, too.
    """
    bounds = np.quantile(x, (0.005, 0.995), axis=0)  # torch's takes 16 million rows at the most
    width = bounds[1] - bounds[0]
    margin = 0.15 * np.where(width > 0, width, np.abs(bounds[0]).clip(min=1.0))
    return tuple(np.stack((bounds[0] - margin, bounds[1] + margin), -1).ravel().tolist())


def as_points(x: np.ndarray) -> np.ndarray:
    """Return rows to show as points, shape ``(*, D)``, from all over.

    Args:
        x: The rows, shape ``(N, D)``.
    """
    return x[evenly_spaced(len(x), _POINTS).cpu().numpy()]
