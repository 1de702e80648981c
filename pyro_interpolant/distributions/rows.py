"""Rows, values and contexts as they are given: tensors, arrays, data frames, named draws.

Tensors are made of them here, with the columns of data frames taken by name; types, shapes and
finite numbers are checked. What weights of rows mean is here, too: shares, and draws by them.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.masked import MaskedTensor

from .._package import names_of, order_of
from ..nn.velocity import checked_labels
from ..transforms.flow import Flow
from ..transforms.interpolant import check_tensor

FLOATED = '.float(), arrays and frames with .astype("float32")'  # what makes numbers floating

RowsLike = ArrayLike | Mapping[str, ArrayLike]  # rows, or named draws


def as_tensor(x: ArrayLike, name: str = "data") -> Tensor:
    """Return a tensor of the values of x; of an array of any library, strides, order and flags.

    Args:
        x: A tensor, an array, a data frame or one of its columns, a table of pyarrow, or nested
            lists of numbers. Masked numbers become NaN, as missing ones of a frame do.
        name: What to call it in messages.

    Raises:
        TypeError: If it is none of these, or a data frame with columns that are no numbers, or
            its numbers have a unit, or it is a sparse or nested tensor.
    """
    _check_plain(x, name)
    if hasattr(x, "to_numpy"):
        x = _from_frame(x, name)
    try:
        if torch.masked.is_masked_tensor(x):
            x = _unmasked_tensor(x)
        if is_masked(x):
            x = _unmasked(x)
        if not isinstance(x, (Tensor, np.ndarray)) and hasattr(x, "__array__"):
            x = np.asarray(x)  # of jax
        if isinstance(x, np.ndarray) and x.dtype.kind != "O":
            x = np.require(x, x.dtype.newbyteorder("="), ["C", "W"])
        # Under a default device torch would move what is a tensor already, away from its flow.
        return x if isinstance(x, Tensor) else torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(x, np.ndarray) and x.dtype.kind in "OSU":
            raise TypeError(
                f"expected {name} of numbers, got an array of {x.dtype}: write labels as whole "
                "numbers, numpy.unique(labels, return_inverse=True)[1]"
            ) from error
        if isinstance(x, np.ndarray) and isinstance(error, TypeError):
            fields = "numpy.lib.recfunctions.structured_to_unstructured(x)"
            raise TypeError(
                f"expected {name} of a type that torch has, got an array of {x.dtype}: pass "
                f"{fields if x.dtype.names else 'x.astype(float)'}"
            ) from error
        raise TypeError(
            f"expected {name} to be a tensor or an array, got {type(x).__name__}: {error}"
        ) from error


def is_frame(x: object) -> bool:
    """Return whether x is a data frame, one of its columns, or a table with names of columns."""
    return not isinstance(x, Tensor) and (hasattr(x, "to_numpy") or bool(names_of(x)))


def named_columns(x: RowsLike, name: str = "data") -> tuple[Tensor, tuple[str, ...]]:
    """Return the values of x, and the names of its columns, none where it has none.

    Args:
        x: As in :func:`as_tensor`; or draws by name, each of shape ``(N, *)``, which are joined as
            columns.
        name: What to call it in messages.

    Returns:
        The values, of draws by name of shape ``(N, D)``, and D names or none.

    Raises:
        TypeError: As :func:`as_tensor`.
        ValueError: If there are not as many draws of each name.
    """
    if not isinstance(x, Mapping):
        return as_tensor(x, name), names_of(x)
    parts = {str(k): torch.atleast_1d(as_tensor(v, f"{name} {k!r}")) for k, v in x.items()}
    lengths = {k: len(part) for k, part in parts.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(f"expected as many draws of every name in {name}, got {lengths}")
    flat = {k: part.reshape(len(part), -1) for k, part in parts.items()}
    names = flat_names({k: part.shape[1] for k, part in flat.items()})
    return torch.cat(list(flat.values()), 1), names


def check_same_order(**parts: object) -> None:
    """Raise a ValueError where data frames or series have the same labels in another order.

    Rows are taken by position. Indices of other labels tell nothing, nor do those that repeat.

    Args:
        **parts: What has N rows, by what to call it; of draws by name each entry counts.
    """
    flat = {
        name if key is None else f"{name}[{key!r}]": inner
        for name, part in parts.items()
        for key, inner in (part.items() if isinstance(part, Mapping) else [(None, part)])
    }
    # Of pandas; that of a list is a method.
    indices: dict[str, Any] = {name: getattr(part, "index", None) for name, part in flat.items()}
    known = [(name, index) for name, index in indices.items() if hasattr(index, "get_indexer")]
    for (one, labels), (other, others) in itertools.combinations(known, 2):
        if labels.equals(others) or len(labels) != len(others):
            continue
        both = labels.is_unique and others.is_unique
        if both and bool((labels.get_indexer(others) >= 0).all()):
            raise ValueError(
                f"expected {one} and {other} with their rows in the same order, got the same "
                f"labels in another: rows are taken by position, {other}.loc[{one}.index]"
            )


def flat_names(sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return what to call the numbers of draws by name: ``k``, or ``k[0]``, ``k[1]``, ... of many.

    Args:
        sizes: How many numbers there are of each name.
    """
    return tuple(k if size == 1 else f"{k}[{i}]" for k, size in sizes.items() for i in range(size))


def in_order(
    rows: Tensor, names: Sequence[str], expected: Sequence[str], name: str = "data"
) -> Tensor:
    """Return rows with their columns in an order of names: frames and dictionaries have any.

    Args:
        rows: Rows, shape ``(N, D)``, or one, ``(D,)``.
        names: The names of their columns.
        expected: The names in their order. Where either are none, rows are returned as they are.
        name: What to call the rows in messages.

    Raises:
        ValueError: If the names are others, or one of several in another order is there twice.
    """
    order = order_of(names, expected, name)
    return rows if order is None else rows[..., order]


def columns_in_order(x: ArrayLike, names: Sequence[str], name: str) -> Tensor:
    """Return x as a tensor, a data frame with its columns in an order of names.

    Args:
        x: A data frame of rows, shape ``(N, D)``, or a row of it, a series with the names for its
            index; anything else, of any shape, stays in its order.
        names: The names of the columns in their order, or none.
        name: What to call it in messages.

    Raises:
        TypeError: As :func:`as_tensor`.
        ValueError: If the names of a data frame are others.
    """
    return in_order(as_tensor(x, name), names_of(x, names), names, name)


def counted(bad: Tensor, rows: str = "rows") -> str:
    """Return in words how many rows a mask, shape ``(N,)``, is of, and which is the first."""
    return f"{int(bad.sum())} {rows}, the first being row {int(bad.nonzero()[0])}"


def checked_rows(x: ArrayLike, name: str, event_shape: Sequence[int | None] = (None,)) -> Tensor:
    """Return x as a tensor of rows of finite floating-point numbers.

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
    x = as_tensor(x, name).detach()
    if not x.is_floating_point():
        raise TypeError(
            f"expected {name} of a floating type, got {x.dtype}: convert tensors with {FLOATED}, "
            "or, if these are counts or rounded values, which have no density, by dequantize(...)"
        )
    expected = tuple(event_shape)
    if x.dim() != 1 + len(expected) or any(
        e not in (None, s) for e, s in zip(expected, x.shape[1:], strict=True)
    ):
        want = ", ".join("D" if e is None else str(e) for e in expected)
        hint = f": for N scalars pass shape (N, 1), {name}[:, None]" if x.dim() == 1 else ""
        raise ValueError(f"expected {name} of shape (N, {want}), got {tuple(x.shape)}{hint}")
    if x.numel() == 0:
        got = "none" if len(x) == 0 else f"{len(x)} without a number"
        raise ValueError(f"expected rows of {name}, got {got}: their shape is {tuple(x.shape)}")
    bad = (~torch.isfinite(x)).reshape(len(x), -1).any(dim=1)
    if bool(bad.any()):
        raise ValueError(
            f"expected finite {name}, got NaN or infinite values in "
            f"{counted(bad, f'of {len(x)} rows')}: remove or impute them, or give "
            "them weight 0 where there are weights"
        )
    return x


def check_value(value: Tensor, event_shape: Sequence[int], dtype: torch.dtype) -> None:
    """Raise an error unless a value is a tensor of shape ``(*, *event_shape)``.

    Args:
        value: What a density is asked for.
        event_shape: The shape of an event.
        dtype: The type of the flow, for the message.

    Raises:
        TypeError: If it is not a tensor.
        ValueError: If it is of another shape.
    """
    check_tensor(value, dtype)
    if tuple(value.shape[max(0, value.dim() - len(event_shape)) :]) != tuple(event_shape):
        scalars = tuple(event_shape) == (1,)
        hint = " For N scalars use shape (N, 1): x[..., None]." if scalars else ""
        raise ValueError(
            f"expected a value of shape (*, {', '.join(map(str, event_shape))}), got "
            f"{tuple(value.shape)}.{hint}"
        )


def images_of(x: ArrayLike, shape: Sequence[int]) -> Tensor:
    """Return x as a tensor of images that are events of a shape, ``(N, *shape)``.

    Raises:
        TypeError: If it is not a tensor or an array.
        ValueError: If images are of another shape, or not finite, or there are none.
    """
    found = as_tensor(x, "images")
    if found.shape[1:] != torch.Size(shape) or not len(found):
        want = ", ".join(map(str, shape))
        raise ValueError(f"expected images of shape (N, {want}), got {tuple(found.shape)}")
    return checked_rows(found, "images", shape) if found.is_floating_point() else found


def _from_frame(x: Any, name: str) -> np.ndarray:
    """Return the values of a data frame or one of its columns, missing ones as NaN.

    Raises:
        TypeError: If there are columns that are no numbers.
    """
    values = x.to_numpy()
    kinds = getattr(x, "dtypes", getattr(x, "dtype", values.dtype))
    each = list(kinds) if hasattr(kinds, "__iter__") else [kinds]
    if values.dtype.kind == "O":  # types of pandas' own, which have a value for missing ones
        own = {getattr(kind, "kind", "O") for kind in each}
        if own <= set("biuf"):
            is_whole = "f" not in own and not np.asarray(x.isna()).any()
            values = np.asarray(x.astype("int64" if is_whole else "float64"))
    # Beside numbers, polars gives dates and times as numbers, too.
    are_times = any(kind.is_temporal() for kind in each if hasattr(kind, "is_temporal"))
    if values.dtype.kind not in "biuf" or are_times:
        raise TypeError(
            f"expected {name} of columns of numbers, got types {kinds}: leave other columns out, "
            "or write numbers of type object as such, column.astype(float), categories as whole "
            "numbers, column.cat.codes, or, as contexts beside numbers, as columns of 0 and 1, "
            "pandas.get_dummies(frame, dtype=float)"
        )
    return values


def _check_plain(x: object, name: str) -> None:
    """Raise a TypeError for quantities, whose unit would be lost, and tensors that are not dense.

    A column of a table of astropy, whose unit is a note beside plain numbers, is taken.
    """
    unit = str(getattr(x, "unit", None) or "") if hasattr(x, "to_value") else ""
    if unit:
        raise TypeError(
            f"expected {name} as numbers without a unit, got a {type(x).__name__} in {unit}: pass "
            f"x.to_value({unit!r}), and later values in that unit, too"
        )
    if isinstance(x, Tensor) and (x.is_nested or x.layout != torch.strided):
        got = "a nested one" if x.is_nested else f"one of layout {x.layout}"
        hint = "rows of one size, stacked" if x.is_nested else "x.to_dense()"
        raise TypeError(f"expected {name} as a dense tensor, got {got}: pass {hint}")


def is_masked(x: object) -> bool:
    """Return whether an array has a mask of its own shape, as numpy's and astropy's have."""
    mask = getattr(x, "mask", None)  # of a frame a method
    if not isinstance(mask, np.ndarray) or mask.dtype.kind != "b":
        return False
    return mask.shape == getattr(x, "shape", None)


def _unmasked(x: Any) -> np.ndarray:
    """Return the values of a masked array, those that are masked as NaN, of any shape."""
    mask, values = np.asarray(x.mask), np.asarray(x)
    if not mask.any() or values.dtype.kind in "mM":  # dates, which are refused
        return values
    values = values.astype(values.dtype if values.dtype.kind in "fc" else np.float64)  # a copy
    values[mask] = np.nan
    return values


def _unmasked_tensor(x: MaskedTensor) -> Tensor:
    """Return the values of a ``MaskedTensor``, those that are masked as NaN, of any shape."""
    values, there = x.get_data(), x.get_mask()
    if bool(there.all()):
        return values
    return torch.where(there, values if values.is_floating_point() else values.double(), math.nan)


def checked_context(
    context: ArrayLike, size: int | None, classes: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return contexts as a tensor of finite numbers, shape ``(N, C)``.

    Args:
        context: A tensor or an array; of labels whole numbers, shape ``(N,)`` or ``(N, 1)``.
        size: The expected C, or None for any.
        classes: The number of classes, where contexts are labels; else 0.
        dtype: The type of the flow, in which labels are returned, and numbers must be finite.

    Raises:
        TypeError: If they are neither of a floating type nor labels.
        ValueError: If they are of another shape, not finite in that type, or labels of no class.
    """
    found = as_tensor(context, "context")
    if found.is_floating_point():
        if found.dim() == 1 and bool(found.isnan().any()):
            raise ValueError(
                "expected a label for each row, whole numbers of shape (N,), or numbers of shape "
                f"(N, C) as context, got none in {counted(found.isnan(), f'of {len(found)} rows')}"
                ": leave those rows out, or give them weight 0"
            )
        found = checked_rows(found, "context", (size,))
        _check_range(found, dtype)
        return checked_labels(found, classes, dtype) if classes else found
    if not classes:
        raise TypeError(
            f"expected context of a floating type, got {found.dtype}: convert numbers in "
            f"tensors with {FLOATED}, and labels with "
            "torch.nn.functional.one_hot(labels, K).float(), for a flow of context_dim=K, or, "
            "beside numbers, torch.cat((one_hot(labels, K).float(), numbers), -1); or take a "
            "network with classes, VelocityMLP(D, classes=K)"
        )
    if found.dim() == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.dim() != 1:
        raise ValueError(f"expected labels of shape (N,), got {tuple(found.shape)}")
    return checked_labels(found, classes, dtype)


def _check_range(context: Tensor, dtype: torch.dtype) -> None:
    """Raise a ValueError where contexts, shape ``(N, C)``, are beyond a type."""
    bad = ~context.to(dtype).isfinite().all(-1)
    if bool(bad.any()):
        raise ValueError(
            f"expected context within the range of the flow's type {dtype}, up to "
            f"{torch.finfo(dtype).max:.1e}, got values outside it in "
            f"{counted(bad, f'of {len(bad)} rows')}: choose other units, or give rows and flow in "
            "float64"
        )


def contexts_of_rows(
    context: ArrayLike, flow: Flow, names: Sequence[str], count: int, rows: str = "rows"
) -> Tensor:
    """Return the contexts of so many rows in the type of their flow, shape ``(count, C)``.

    Args:
        context: As in :func:`checked_context`; the columns of a data frame may have any order.
        flow: The flow that takes them.
        names: The names of their columns in the order that the flow takes them in, or none.
        count: The number of rows.
        rows: What to call them.

    Raises:
        TypeError: As :func:`checked_context`.
        ValueError: As :func:`checked_context`, or if there are more or fewer, or the columns of a
            data frame have other names.
    """
    context = columns_in_order(context, names, "context")
    found = checked_context(context, flow.context_dim, flow.classes, flow.loc.dtype)
    if len(found) != count:
        raise ValueError(f"expected as many contexts as {rows}, {count}, got {len(found)}")
    return found.to(flow.loc)


def shares_of(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return the share of each row of x, ``(N, D)``, in all weight, float64, shape ``(N,)``."""
    found = x.new_ones(len(x), dtype=torch.float64) if weights is None else weights.double()
    return found / found.sum()


def subsample(count: int, most: int, weights: Tensor | None = None) -> Tensor:
    """Return the indices of a subsample of rows, the same at each call; all where they are few.

    Args:
        count: The number of rows.
        most: The size of the subsample.
        weights: Non-negative weights, shape ``(N,)``: rows are then drawn with replacement in
            their proportion.
    """
    generator = torch.Generator().manual_seed(0)
    if weights is not None:
        return weighted_indices(weights.cpu(), min(most, 100 * count), generator)
    if count <= most:
        return torch.arange(count)
    return torch.randint(count, (most,), generator=generator)


def rows_held(share: float, count: int) -> int:
    """Return how many of N rows a share to hold out are, one at least."""
    return max(1, round(share * count))


def evenly_spaced(count: int, most: int) -> Tensor:
    """Return the indices of evenly spaced rows, at most so many: rows may come in an order."""
    few = min(count, most)
    return torch.arange(few) * count // few


def weighted_indices(
    weights: Tensor, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return indices drawn with replacement in proportion to weights, shape ``(count,)``.

    Of any number of rows: :func:`torch.multinomial` ends at 16 million.
    """
    return search_weights(weights.double().cumsum(0), count, generator)


def search_weights(ends: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return indices drawn by weight, given its running sums, float64, shape ``(N,)``."""
    u = torch.rand(count, dtype=ends.dtype, device=ends.device, generator=generator)
    return torch.searchsorted(ends, u * ends[-1], right=True).clamp_(max=len(ends) - 1)
