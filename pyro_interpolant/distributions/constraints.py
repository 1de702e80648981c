r"""Constraints: the set S that values live in, and its bijection :math:`b: R^D \to S`.

Beside Pyro's own: angles, which have none, and events of any shape. Rows of data are checked here
for finite numbers.

A constraint keeps the arguments of its constructor as attributes of the same names, as Pyro's do:
constraints, numbers, tensors, or lists of these. By that, files can hold it.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform, biject_to, transform_to
from torch.distributions.transforms import ComposeTransform, ReshapeTransform

from ..nn.velocity import checked_labels
from ..transforms.bijections import PerEvent
from ..transforms.flow import Flow
from ..transforms.interpolant import check_tensor

Constraint = constraints.Constraint
RowsLike = ArrayLike | Mapping[str, ArrayLike]  # rows, or named draws


class Circular(Constraint):
    """Vectors of angles in [-pi, pi], where -pi and pi are one point."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Return which vectors, ``(*)``, of values, ``(*, D)``, have all angles in range."""
        return ((value >= -math.pi) & (value <= math.pi)).all(-1)

    def __repr__(self) -> str:
        """Name the constraint."""
        return "circular"


circular = Circular()


def is_all_real(constraint: Constraint) -> bool:
    """Return whether all real numbers satisfy a constraint, on events of any dimension."""
    return isinstance(innermost_constraint(constraint), type(constraints.real))


def innermost_constraint(constraint: Constraint) -> Constraint:
    """Return the constraint on the smallest events, inside those declared independent."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


@biject_to.register(Circular)
@transform_to.register(Circular)
def _(constraint: Circular) -> Transform:
    raise NotImplementedError(
        "no smooth bijection maps real vectors to angles: for inference use base_space(model), "
        "which samples the flow's base instead"
    )


def bijection(support: Constraint) -> Transform:
    """Return the bijection from real vectors, shape ``(*, D)``, to a support.

    Args:
        support: Any Pyro constraint with a registered bijection from vectors or scalars.

    Raises:
        TypeError: If ``support`` is not a constraint.
        ValueError: If it has no such bijection, or joins others along another dimension than the
            last; the message names it.
    """
    if not isinstance(support, Constraint):
        kind = type(support)  # NumPyro's constraints have the names of torch's
        place = "" if kind.__module__ == "builtins" else f"{kind.__module__}."
        raise TypeError(
            "expected support to be a constraint such as torch.distributions.constraints.positive,"
            f" got {place}{kind.__name__}"
        )
    _check_dims(support)
    try:
        transform = biject_to(support)
        domain_dim, is_bijective = transform.domain.event_dim, transform.bijective
    except (NotImplementedError, AttributeError, TypeError, IndexError):
        domain_dim, is_bijective = 2, False
    if domain_dim > 1 or not is_bijective:
        raise ValueError(
            f"expected a support that is a bijective image of real vectors, got {support}: use "
            "real_vector, positive, interval, simplex, corr_cholesky, ordered_vector, "
            "independent(..., 1), stack or another constraint for which biject_to is bijective"
        )
    return transform


def real_shape(shape: Sequence[int], support: Constraint) -> torch.Size:
    """Return the shape of the real vectors, or scalars, behind events of a shape on a support.

    Raises:
        ValueError: If the support has no events of that shape, for one because its bounds are
            tensors of another.
    """
    transform = biject_to(support)
    try:
        real = torch.Size(transform.inverse_shape(torch.Size(shape)))
        found = torch.Size(transform.forward_shape(real))
    except RuntimeError:  # where bounds do not broadcast with it
        found = None
    if found != torch.Size(shape):
        raise ValueError(
            f"expected a support of events of shape {tuple(shape)}, got {support}: bounds that "
            "are tensors have the shape of one event; beside event_shape they are flat, (D,)"
        )
    return real


def _check_dims(support: Constraint) -> None:
    """Raise a ValueError where parts of a support are joined along a dimension not the last."""
    if isinstance(support, (constraints.stack, constraints.cat)) and support.dim != -1:
        name = type(support).__name__.strip("_").lower()
        raise ValueError(
            "expected parts of a support joined along the last dimension of an event, got "
            f"constraints.{name} with dim={support.dim}: pass dim=-1; torch's default, 0, is the "
            "dimension of rows"
        )
    inner = getattr(support, "base_constraint", None)
    for part in (*getattr(support, "cseq", ()), *([] if inner is None else [inner])):
        _check_dims(part)


def check_parts(support: Constraint, value: Tensor) -> Tensor:
    """Return which elements or events of values, ``(*, *event_shape)``, are on a support.

    Of a support of joined parts which elements; those of a part of vectors hold all or none.
    Torch joins what its parts say as it comes, which has no shape where some are of vectors.
    """
    if not isinstance(support, constraints.cat):
        return support.check(value)
    parts = zip(support.cseq, value.split(list(support.lengths), -1), strict=True)
    found = [(check_parts(c, v), v) for c, v in parts]
    return torch.cat(
        [
            (inside if inside.dim() == v.dim() else inside[..., None]).expand_as(v)
            for inside, v in found
        ],
        -1,
    )


class Shaped(Constraint):
    """A support of vectors, laid out in events of another shape.

    Args:
        base_constraint: The support of scalars or of vectors.
        shape: The shape of an event, ``()`` for scalars.
    """

    def __init__(self, base_constraint: Constraint, shape: Sequence[int]) -> None:
        self.base_constraint, self.shape = base_constraint, torch.Size(shape)
        self.event_dim = len(self.shape)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return which events, ``(*)``, of values, ``(*, *event_shape)``, are on the support."""
        batch = value.shape[: value.dim() - self.event_dim]
        inside = check_parts(self.base_constraint, value.reshape(*batch, -1))
        return inside.all(-1) if inside.dim() > len(batch) else inside

    def __repr__(self) -> str:
        """Name the support and the shape."""
        return f"{self.base_constraint} in events of shape {tuple(self.shape)}"


@biject_to.register(Shaped)
def _(constraint: Shaped) -> Transform:
    return _reshaping(biject_to(constraint.base_constraint), constraint)


@transform_to.register(Shaped)
def _(constraint: Shaped) -> Transform:
    return _reshaping(transform_to(constraint.base_constraint), constraint)


def _reshaping(inner: Transform, constraint: Shaped) -> Transform:
    reshape = ReshapeTransform(torch.Size([math.prod(constraint.shape)]), constraint.shape)
    return ComposeTransform([PerEvent(inner), reshape])


def shaped(support: Constraint, shape: Sequence[int] | None) -> Constraint:
    """Return a support in events of a shape, shape ``(*event_shape)``; itself if there is none.

    Raises:
        ValueError: If a size in the shape is not positive, or the support is already one of
            events of more than one dimension.
    """
    if shape is None:
        return support
    if any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(f"expected event_shape to be positive sizes, got {tuple(shape)}")
    if isinstance(support, constraints.independent) and isinstance(
        support.base_constraint, type(constraints.real)
    ):
        support = constraints.real_vector
    if len(shape) == 1:
        return support
    if getattr(support, "event_dim", 0) > 1:
        raise ValueError(
            f"expected a support of scalars or of vectors beside event_shape, got {support}, "
            "whose events have a shape of their own"
        )
    with contextlib.suppress(NotImplementedError):  # angles, or what a flow is refused for
        real_shape((math.prod(shape),), support)
    return Shaped(support, shape)


def as_tensor(x: ArrayLike, name: str = "data") -> Tensor:
    """Return a tensor of the values of x; of an array of any library, strides, order and flags.

    Args:
        x: A tensor, an array, a data frame or one of its columns, or nested lists of numbers.
            Masked numbers become NaN, as missing ones of a frame do.
        name: What to call it in messages.

    Raises:
        TypeError: If it is none of these, or a data frame with columns that are no numbers.
    """
    if hasattr(x, "to_numpy"):  # of pandas
        x = _from_frame(x, name)
    try:
        if isinstance(x, np.ma.MaskedArray):
            x = _unmasked(x)
        if not isinstance(x, (Tensor, np.ndarray)) and hasattr(x, "__array__"):
            x = np.asarray(x)  # of jax
        if isinstance(x, np.ndarray) and x.dtype.kind != "O":
            x = np.require(x, x.dtype.newbyteorder("="), ["C", "W"])
        return torch.as_tensor(x)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"expected {name} to be a tensor or an array, got {type(x).__name__}: {error}"
        ) from error


def names_of(x: object) -> tuple[str, ...]:
    """Return the names of the columns of a data frame; of anything else none."""
    return tuple(map(str, getattr(x, "columns", ())))


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
        rows: Rows, shape ``(N, D)``.
        names: The names of their columns.
        expected: The names in their order. Where either are none, rows are returned as they are.
        name: What to call the rows in messages.

    Raises:
        ValueError: If the names are others, or one of several in another order is there twice.
    """
    found, wanted = list(names), list(expected)
    if not found or not wanted or found == wanted:
        return rows
    if sorted(found) != sorted(wanted) or len(set(found)) < len(found):
        raise ValueError(
            f"expected {name} with the columns {wanted}, each once and in any order, got {found}: "
            "rename or select them"
        )
    return rows[:, [found.index(column) for column in wanted]]


def columns_in_order(x: ArrayLike, names: Sequence[str], name: str) -> Tensor:
    """Return x as a tensor, a data frame with its columns in an order of names.

    Args:
        x: A data frame of rows, shape ``(N, D)``; anything else, of any shape, stays in its order.
        names: The names of the columns in their order, or none.
        name: What to call it in messages.

    Raises:
        TypeError: As :func:`as_tensor`.
        ValueError: If the names of a data frame are others.
    """
    return in_order(as_tensor(x, name), names_of(x), names, name)


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
            f"expected {name} of a floating type, got {x.dtype}: convert it with .float(), or, if "
            "these are counts or rounded values, which have no density, by dequantize(...)"
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
            "them weight 0"
        )
    return x


def check_value(value: Any, event_shape: Sequence[int], dtype: torch.dtype) -> None:
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
    kinds = getattr(x, "dtypes", None)
    values = x.to_numpy()
    if values.dtype.kind == "O":  # types of pandas' own, which have a value for missing ones
        own = {getattr(kind, "kind", "O") for kind in getattr(kinds, "tolist", lambda: [kinds])()}
        if own <= set("biuf"):
            is_whole = "f" not in own and not x.isna().to_numpy().any()
            values = x.astype("int64" if is_whole else "float64").to_numpy()
    if values.dtype.kind not in "biuf":
        raise TypeError(
            f"expected {name} of columns of numbers, got types {kinds}: leave other columns out, "
            "or write categories as whole numbers, column.cat.codes"
        )
    return values


def _unmasked(x: np.ma.MaskedArray) -> np.ndarray:
    """Return the values of a masked array, those that are masked as NaN, of any shape."""
    if not np.ma.is_masked(x):
        return x.data
    return np.ma.filled(x if x.dtype.kind in "fc" else x.astype(np.float64), np.nan)


def checked_context(
    context: ArrayLike, size: int | None, classes: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return contexts as a tensor of finite numbers, shape ``(N, C)``.

    Args:
        context: A tensor or an array; of labels whole numbers, shape ``(N,)`` or ``(N, 1)``.
        size: The expected C, or None for any.
        classes: The number of classes, where contexts are labels; else 0.
        dtype: The type of the flow, in which labels are returned.

    Raises:
        TypeError: If they are neither of a floating type nor labels.
        ValueError: If they are of another shape, not finite, or labels of no class.
    """
    found = as_tensor(context, "context")
    if found.is_floating_point():
        found = checked_rows(found, "context", (size,))
        return checked_labels(found, classes, dtype) if classes else found
    if not classes:
        raise TypeError(
            f"expected context of a floating type, got {found.dtype}: convert numbers with "
            ".float(), and labels with torch.nn.functional.one_hot(labels, K).float(), for a flow "
            "of context_dim=K; or take a network with classes, VelocityMLP(D, classes=K)"
        )
    if found.dim() == 2 and found.shape[1] == 1:
        found = found[:, 0]
    if found.dim() != 1:
        raise ValueError(f"expected labels of shape (N,), got {tuple(found.shape)}")
    return checked_labels(found, classes, dtype)


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
