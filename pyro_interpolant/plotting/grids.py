"""Pictures of images side by side."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .._package import check_ranges, whole
from ..distributions.rows import as_tensor
from ..training.rows import LEVELS
from .axes import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def images(x: ArrayLike, *, columns: int | None = None, ax: "Axes | None" = None) -> "Axes":
    """Draw images side by side, row by row, a pixel apart.

    Args:
        x: Images, shape ``(N, C, H, W)``, of one channel or three: whole levels, ``uint8``, or
            numbers in [0, 1], beyond which they are cut.
        columns: The number of images in a row; by default about as many as rows.
        ax: Axes, or None for new ones.

    Raises:
        ValueError: If images have another shape, or there are none, or no columns, or whole
            levels are of another type.
    """
    check_ranges(whole("columns", columns, 1, or_none=True))
    values = as_tensor(x, "images").detach().cpu()
    if values.dim() != 4 or values.shape[1] not in (1, 3) or not len(values):
        raise ValueError(
            f"expected images of shape (N, 1, H, W) or (N, 3, H, W), got {tuple(values.shape)}"
        )
    numbers = values.double()
    if values.dtype == torch.uint8:
        numbers = numbers / (LEVELS - 1)
    elif not values.is_floating_point() and bool((numbers > 1).any()):
        raise ValueError(
            f"expected whole levels as uint8, or numbers in [0, 1], got {values.dtype} up to "
            f"{numbers.max():g}: pass x.byte(), or x / highest level"
        )
    grid = _grid(numbers.clamp(0, 1), columns)
    ax = new_axes(ax)
    if grid.shape[-1] == 1:
        ax.imshow(grid[..., 0], cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    else:
        ax.imshow(grid, interpolation="nearest")
    ax.set_axis_off()
    return ax


def _grid(values: Tensor, columns: int | None) -> np.ndarray:
    """Return images, ``(N, C, H, W)``, on a white ground, shape ``(height, width, C)``."""
    count, channels, height, width = values.shape
    columns = min(count, int(columns or np.ceil(np.sqrt(count))))
    rows = -(-count // columns)
    grid = values.new_ones(channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for i, image in enumerate(values):
        top, left = i // columns * (height + 1), i % columns * (width + 1)
        grid[:, top : top + height, left : left + width] = image
    return grid.permute(1, 2, 0).numpy()
