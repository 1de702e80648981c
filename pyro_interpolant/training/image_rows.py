r"""Images: events of three dimensions, ``(C, H, W)``, of any number of rows.

Images of whole levels v, 0 to 255 in ``uint8``, are kept as they are, and spread anew each time
they are used: :math:`x = (v + u) / 256` with u uniform on [0, 1), so that values lie in [0, 1) and
the probability of an image is the mean density over its cell times :math:`256^{-D}`.

References:
    Theis, van den Oord & Bethge, *A note on the evaluation of generative models*, ICLR 2016.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .._package import check_ranges, flag
from ..distributions.constraints import Constraint, Shaped
from ..distributions.rows import images_of
from ..distributions.supports import support_of
from .rows import Rows

BATCH_IMAGES = 64  # per step and process
# Held-out losses of 600 steps on 8 x 8 digits: -59.8 at 0.001, -65.6 at 0.003, -63.7 at 0.01.
IMAGE_OPTIONS: dict[str, Any] = {"learning_rate": 3e-3}
# The standard deviation of whitened images: more of the path is then in the noise in which an
# image as a whole is decided. MNIST, 3 minutes, seed 1: bits per dimension 2.65 at 1, 2.36 at 0.5
# and 2.33 at 0.33; FID 8.3, 7.4 and 7.9.
IMAGE_DEVIATION = 0.5
HELD_BATCHES = 2  # of images, at which the held-out loss is evaluated: it takes less than a step
_HELD_NUMBERS, _MIN_HELD = 2**22, 256  # in images held out of a table, and images at least


def is_image(shape: Sequence[int]) -> bool:
    """Return whether an event has three dimensions, which are those of an image."""
    return len(shape) == 3


def are_images(rows: object) -> bool:
    """Return whether rows have the shape of images, ``(N, C, H, W)``."""
    return getattr(rows, "ndim", None) == 4


def are_levels(x: object, shape: Sequence[int]) -> bool:
    """Return whether what a user gave as rows are images of whole levels, ``uint8``."""
    kind = getattr(x, "dtype", None)
    return is_image(shape) and str(kind).removeprefix("torch.") == "uint8"


def checked_levels(x: ArrayLike, shape: Sequence[int], constraint: Constraint) -> Tensor:
    """Return images of whole levels as rows, ``uint8``, shape ``(N, D)``.

    Args:
        x: Images, shape ``(N, C, H, W)``.
        shape: ``(C, H, W)``.
        constraint: The support of what is trained.

    Raises:
        ValueError: If they are of another shape, there are none, or the support is not that of
            real numbers, which levels at its edge would leave.
    """
    levels = images_of(x, shape)
    inner = constraint.base_constraint if isinstance(constraint, Shaped) else constraint
    if not support_of(inner).is_real():
        raise ValueError(
            f"expected images of whole levels, uint8, on support real_vector, got {constraint}: "
            "spread them yourself, (images + 0.05 + 0.9 * torch.rand(images.shape)) / 256"
        )
    return levels.reshape(len(levels), -1)


def flips(shape: Sequence[int], size: int, *, flip: bool) -> Callable[[Rows], Rows]:
    """Return what mirrors images of a batch by chance, or leaves all rows as they are.

    Args:
        shape: The shape of an event.
        size: D, that of rows in the flow's coordinates.
        flip: Whether to mirror images.

    Raises:
        ValueError: If ``flip`` is neither True nor False, or rows to mirror are no images.
    """
    check_ranges(flag("flip", flip))
    if not flip:
        return lambda rows: rows
    if not is_image(shape) or math.prod(shape) != size:
        raise ValueError(
            f"expected images to flip, events of shape (C, H, W), got events of {tuple(shape)}"
        )
    return partial(_flipped, shape)


def _flipped(shape: Sequence[int], rows: Rows) -> Rows:
    """Return images, shape ``(N, D)``, each mirrored left to right with a chance of one half."""
    images = rows.w.unflatten(-1, shape)
    chosen = (torch.rand(len(images), 1, 1, 1) < 0.5).to(images.device)
    return rows._replace(w=torch.where(chosen, images.flip(-1), images).flatten(1))


def most_held(event_dim: int) -> int:
    """Return the most images of D numbers to hold out of a table: few are enough."""
    return max(_MIN_HELD, _HELD_NUMBERS // event_dim)
