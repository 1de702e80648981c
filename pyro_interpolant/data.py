r"""What is done to data before training: checks, moments, batches."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "batches", "checked_rows", "moments"]

_DEPENDENT = 1e-12  # a correlation eigenvalue below this means linearly dependent columns
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


def moments(x: Tensor) -> Moments:
    """Return the map that whitens the rows of x.

    Columns are centred and scaled first, so that their units do not matter, then rotated and
    scaled along the eigenvectors of their correlation. Values beyond 20 robust standard deviations
    count as if they were there, so that a wild row does not set the scale of all others.

    Args:
        x: Finite rows, shape ``(N, D)``.

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
    x = x.double()
    constant = (x == x[0]).all(dim=0)
    if bool(constant.any()):
        columns = constant.nonzero().flatten().tolist()
        raise ValueError(
            f"expected columns that vary, got constant columns {columns}: drop them, they have no "
            "density"
        )
    quartiles = torch.quantile(x[: 2**20 // dim], x.new_tensor([0.25, 0.5, 0.75]), dim=0)
    spread = _CLIP * (quartiles[2] - quartiles[0]) / 1.349
    spread = torch.where(spread > 0, spread, torch.inf)
    x = torch.minimum(torch.maximum(x, quartiles[1] - spread), quartiles[1] + spread)
    loc = x.mean(0)
    centred = x - loc
    scale = centred.square().mean(0).sqrt()
    z = centred / scale
    eigenvalues, vectors = torch.linalg.eigh(z.T @ z / count)
    if float(eigenvalues[0]) < _DEPENDENT:
        worst = vectors[:, 0].abs().topk(min(2, dim)).indices.tolist()
        raise ValueError(
            f"expected linearly independent columns, got dependent ones (columns {sorted(worst)} "
            "take part): drop one, or add noise of the size of the measurement's error"
        )
    roots = eigenvalues.sqrt()
    linear = scale[:, None] * vectors * roots
    return Moments(loc, linear, (vectors / roots).T / scale)


def batches(count: int, size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield index batches of equal size forever, in a new order each time all rows were seen.

    Args:
        count: The number of rows.
        size: The number of rows per batch, at most ``count``.
        device: Where the indices live.
    """
    while True:
        order = torch.randperm(count, device=device)
        for i in range(0, count - size + 1, size):
            yield order[i : i + size]
