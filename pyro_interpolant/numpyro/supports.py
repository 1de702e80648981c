r"""Supports that files describe, and the bijections to them from real vectors.

A support is known by its description in a file, as text: so it can be compared and hashed, and is
a pytree without leaves, which NumPyro's own constraints with bounds are not. The bijections are
NumPyro's, which are those of Pyro; splines, angles, shapes, the edges of intervals and the small
shares of a simplex are here.
"""

import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.constraints import Constraint
from numpyro.distributions.transforms import (
    CatTransform,
    ComposeTransform,
    IndependentTransform,
    ReshapeTransform,
    SigmoidTransform,
    StickBreakingTransform,
    Transform,
)

from .transforms import MarginalTransform, RadialTransform, RealVectorTransform, Wrap

Description = str | list[Any]  # of a support, in a file: a name, or a class and its arguments

# By their names in files; the first need no arguments.
_PLAIN = {
    "real": constraints.real,
    "real_vector": constraints.real_vector,
    "positive": constraints.positive,
    "nonnegative": constraints.nonnegative,
    "softplus_positive": constraints.softplus_positive,
    "unit_interval": constraints.unit_interval,
    "simplex": constraints.simplex,
    "ordered_vector": constraints.ordered_vector,
    "positive_ordered_vector": constraints.positive_ordered_vector,
    "corr_cholesky": constraints.corr_cholesky,
    "corr_cholesky_constraint": constraints.corr_cholesky,
    "corr_matrix": constraints.corr_matrix,
}
_BOUNDED: dict[str, Callable[..., Constraint]] = {
    "greater_than": lambda low, _: constraints.greater_than(low),
    "greater_than_eq": lambda low, _: constraints.greater_than_eq(low),
    "less_than": lambda _, high: constraints.less_than(high),
    "interval": constraints.interval,
    "half_open_interval": constraints.interval,
}
_REAL = ("real", "real_vector", ["independent", "real", 1])
CIRCULAR = json.dumps("circular")  # the text of the support of angles
_MAPS: dict[str, Callable[..., RealVectorTransform]] = {
    "gaussianized": MarginalTransform,
    "tempered": RadialTransform,
}


def is_real(description: Description) -> bool:
    """Return whether values on a described support are real vectors themselves."""
    return description in _REAL


class OnEvents(constraints.ParameterFreeConstraint):
    """A support as a constraint on whole events, known by its description.

    Args:
        text: The description, as JSON.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def tree_flatten(self) -> tuple[tuple[()], tuple[tuple[()], dict[str, str]]]:
        """Return no arrays, and the description."""
        return (), ((), {"text": self.text})

    @property
    def event_dim(self) -> int:
        """The number of dimensions of an event."""
        constraint = _parts(self.text)[1]
        return (
            constraint.event_dim
            if isinstance(constraint, _Shaped)
            else max(1, constraint.event_dim)
        )

    def __call__(self, value: Array) -> Array:
        """Return which events, ``(*)``, of values, ``(*, *event_shape)``, are on the support."""
        inside = check_parts(_parts(self.text)[1], value)
        batch = jnp.ndim(value) - self.event_dim
        return inside.all(tuple(range(batch, inside.ndim))) if inside.ndim > batch else inside

    def feasible_like(self, prototype: Array) -> Array:
        """Return a value on the support, of the prototype's shape ``(*, *event_shape)``."""
        transform = Bijection(self.text)
        real = jnp.zeros(transform.inverse_shape(jnp.shape(prototype)))
        return transform(real).astype(jnp.result_type(prototype))

    def eq(self, other: object, static: bool = False) -> bool:  # noqa: FBT001, FBT002, ARG002
        """Return whether another is the same support."""
        return isinstance(other, OnEvents) and self.text == other.text

    def __hash__(self) -> int:
        """Return a number by description."""
        return hash(self.text)

    def __repr__(self) -> str:
        """Show the description."""
        return f"on_events({self.text if len(self.text) < 80 else self.text[:76] + ' ...'})"


@biject_to.register(OnEvents)
def _(constraint: OnEvents) -> Transform:
    if constraint.text == CIRCULAR:
        raise NotImplementedError(
            "no smooth bijection maps real vectors to angles: for inference use "
            "pyro_interpolant.numpyro.base_space(model), which samples the flow's base instead"
        )
    return Bijection(constraint.text)


class Bijection(RealVectorTransform):
    """The bijection from real vectors to a support, with one log-determinant an event.

    Args:
        text: The description of the support, as JSON.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def tree_flatten(self) -> tuple[Any, ...]:
        """Return no arrays, and the description."""
        return (), ((), {"text": self.text})

    @property
    def codomain(self) -> Constraint:
        """The support."""
        return OnEvents(self.text)

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """Return values on the support and the log-determinant, shape ``(*)``."""
        return _onto(jnp.asarray(x), text=self.text)

    def inverse_with_log_det(self, y: Array) -> tuple[Array, Array]:
        """Return real vectors, shape ``(*, D)``, and ``log |dy/dx|``, shape ``(*)``."""
        y = jnp.asarray(y)
        least = jnp.float32 if jnp.issubdtype(y.dtype, jnp.floating) else float
        return _back(y.astype(jnp.result_type(y, least)), text=self.text)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape on the support."""
        for part in _parts(self.text)[0]:
            shape = part.forward_shape(shape)
        return shape

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape as real vectors."""
        for part in reversed(_parts(self.text)[0]):
            shape = part.inverse_shape(shape)
        return shape


class _Between(Transform):
    """The bijection from real numbers to an interval, whose inverse clamps as torch's does.

    NumPyro's takes the edges, and what the type cannot tell from them, to infinity. Beyond the
    edges the inverse is NaN.

    Args:
        constraint: The interval.
    """

    sign = 1

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint
        self.low, self.high = constraint.lower_bound, constraint.upper_bound
        self.width = self.high - self.low

    def tree_flatten(self) -> tuple[tuple[()], tuple[tuple[()], dict[str, Any]]]:
        """Return no arrays, and the interval with its edges."""
        return (), ((), dict(vars(self)))

    @property
    def codomain(self) -> Constraint:
        """The interval."""
        return self.constraint

    def __call__(self, x: Array) -> Array:
        """Return values in the interval, of any shape."""
        return self.low + self.width * SigmoidTransform()(x)

    def _inverse(self, y: Array) -> Array:
        low, high = (jnp.asarray(edge, y.dtype) for edge in (self.low, self.high))
        u = (y - self.low) / self.width
        limits = jnp.finfo(u.dtype)
        least, most = limits.tiny, 1.0 - limits.eps
        # Draws lie at these; their derivative is that inside, of which that of ``clip`` is half.
        u = jnp.where(u < least, least, jnp.where(u > most, most, u))
        return jnp.where((y < low) | (y > high), jnp.nan, jnp.log(u) - jnp.log1p(-u))

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: object = None) -> Array:
        """Return ``log |dy/dx|`` of each number.

        Args:
            x: Inputs.
            y: Their images.
            intermediates: Unused.
        """
        return SigmoidTransform().log_abs_det_jacobian(x, y) + jnp.log(jnp.abs(self.width))


class StickBreaking(StickBreakingTransform):
    r"""NumPyro's map from real vectors, shape ``(*, D)``, to a simplex, ``(*, D + 1)``.

    .. math:: x_k = \log y_k - \log \sum_{j > k} y_j + \log (D + 1 - k)

    NumPyro takes the later shares as one minus the earlier ones, which in float32 leaves nothing
    of the smallest. Here they are added up.
    """

    def __call__(self, x: Array) -> Array:
        """Return points of the simplex, shape ``(*, D + 1)``, of vectors, ``(*, D)``."""
        z = x - jnp.log(_left(x))
        rest = jnp.cumprod(jax.nn.sigmoid(-z), -1)
        one = jnp.ones_like(x[..., :1])
        first = jnp.concatenate((jax.nn.sigmoid(z), one), -1)
        y = first * jnp.concatenate((one, rest), -1)
        y = y / y.sum(-1, keepdims=True)  # of many shares rounding adds up
        least = jnp.finfo(y.dtype).tiny
        return jnp.where(y < least, least, y)

    def _inverse(self, y: Array) -> Array:
        rest = jnp.cumsum(y[..., ::-1], -1)[..., -2::-1]
        rest = jnp.maximum(rest, jnp.finfo(y.dtype).tiny)
        return jnp.log(y[..., :-1]) - jnp.log(rest) + jnp.log(_left(rest))

    def log_abs_det_jacobian(self, x: Array, y: Array, intermediates: object = None) -> Array:
        """Return ``log |dy/dx|``, shape ``(*)``, a function of x alone.

        Args:
            x: Inputs.
            y: Their images.
            intermediates: Unused.
        """
        left = _left(x)
        z = x - jnp.log(left)
        return (jax.nn.log_sigmoid(z) + left * jax.nn.log_sigmoid(-z)).sum(-1)


def _left(x: Array) -> Array:
    """Return how many shares come after each of those that vectors, ``(*, D)``, give: ``(D,)``."""
    return jnp.arange(x.shape[-1], 0, -1).astype(x.dtype)


def in_own_type(transform: Transform, x: Array) -> Array:
    """Return the image of x, of the floating type of x, whatever that of bounds is."""
    y = transform(_widened(x))
    return y.astype(x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else y


def _widened(x: Array) -> Array:
    """Return x in the default type where that is wider, in which NumPyro makes matrices."""
    return x.astype(jnp.promote_types(x.dtype, jnp.result_type(float)))


@partial(jax.jit, static_argnames="text")
def _onto(x: Array, *, text: str) -> tuple[Array, Array]:
    y = _widened(x)
    total = jnp.zeros(x.shape[:-1], y.dtype)
    for part in _parts(text)[0]:
        y, term = forward(part, y)
        total = total + per_event(term, x.shape[:-1])
    return y.astype(x.dtype), total.astype(x.dtype)


@partial(jax.jit, static_argnames="text")
def _back(y: Array, *, text: str) -> tuple[Array, Array]:
    batch = y.shape[: y.ndim - OnEvents(text).event_dim]
    x = _widened(y)
    total = jnp.zeros(batch, x.dtype)
    for part in reversed(_parts(text)[0]):
        x, term = backward(part, x)
        total = total + per_event(term, batch)
    return x.astype(y.dtype), total.astype(y.dtype)


def forward(part: Transform, x: Array) -> tuple[Array, Any]:
    """Return y and its log-determinant, summed over an event or not, of x of any shape."""
    if isinstance(part, RealVectorTransform):
        return part.call_with_intermediates(x)
    y = part(x)
    return y, part.log_abs_det_jacobian(x, y)


def backward(part: Transform, y: Array) -> tuple[Array, Any]:
    """Return x and the log-determinant of y, summed over an event or not, of any shape."""
    if isinstance(part, RealVectorTransform):
        return part.inverse_with_log_det(y)
    x = part.inv(y)
    return x, part.log_abs_det_jacobian(x, y)


def per_event(log_det: ArrayLike, batch: tuple[int, ...]) -> Array:
    """Return the sum over an event, shape ``(*)``."""
    log_det = jnp.asarray(log_det)
    if log_det.ndim <= len(batch):
        return jnp.broadcast_to(log_det, batch)
    return log_det.reshape(*batch, math.prod(log_det.shape[len(batch) :])).sum(-1)


def text_of(description: Description) -> str:
    """Return the text that a description is known by."""
    return json.dumps(description)


def check_size(description: Description, size: int) -> None:
    """Raise a ValueError unless NumPyro has a support, of ``size`` unconstrained coordinates."""
    if is_real(description):
        return
    transform = Bijection(text_of(description))
    shape = tuple(transform.forward_shape((size,)))
    if transform.inverse_shape(shape) != (size,):
        raise ValueError(f"expected a support of {size} unconstrained dimensions")
    y = transform(jnp.zeros(size))
    if y.shape != shape or transform.inverse_with_log_det(y)[1].shape != ():
        raise ValueError(f"expected a support of events of shape {shape}")


def bijection(description: Description) -> Transform:
    """Return the bijection to the support of a site of any shape, as its description has it.

    Its inverse takes edges to infinity: packed values are strictly inside.
    """
    return ComposeTransform(list(_parts(text_of(description), clamps=False)[0]))


def _parts(text: str, *, clamps: bool = True) -> tuple[Sequence[Transform], Constraint]:
    """Return the transforms from real vectors to a described support, and the constraint.

    Args:
        text: The description.
        clamps: Whether inverses clamp at the edges of intervals, as those of torch.
    """
    return _parts_in(jnp.result_type(float), text, clamps=clamps)


# For each type that jax computes in there are other arrays: one that was part of a program keeps
# the type that it had there.
@lru_cache(maxsize=256)
def _parts_in(
    _dtype: object, text: str, *, clamps: bool
) -> tuple[Sequence[Transform], Constraint]:
    return _built(json.loads(text), partial(_transform, clamps=clamps))


def _built(
    description: Description, make: Callable[[Constraint], Transform]
) -> tuple[Sequence[Transform], Constraint]:
    rest: list[Any]
    kind, *rest = [description] if isinstance(description, str) else description
    if kind in _MAPS:
        inner, parts = rest
        tables = [np.array(part, dtype=np.float64) for part in parts]
        transforms, constraint = _built(inner, make)
        return [_MAPS[kind](*tables), *transforms], constraint
    if kind == "circular":
        return [Wrap()], constraints.independent(constraints.circular, 1)
    if kind == "shaped":
        inner, shape = rest
        transforms, constraint = _built(inner, make)
        reshape = ReshapeTransform(tuple(shape), (math.prod(shape),))
        return [*transforms, reshape], _Shaped(constraint, tuple(shape))
    if is_real(description):
        return [], constraints.real_vector
    constraint = constraint_of(description)
    return [make(constraint)], constraint


def _transform(constraint: Constraint, *, clamps: bool) -> Transform:
    """Return the bijection to a constraint, by which a simplex keeps its small shares.

    Args:
        constraint: The constraint.
        clamps: Whether intervals are :class:`_Between`.
    """
    if isinstance(constraint, constraints.independent):
        inner = _transform(constraint.base_constraint, clamps=clamps)
        return IndependentTransform(inner, constraint.reinterpreted_batch_ndims)
    if isinstance(constraint, constraints.cat):
        parts = [_transform(part, clamps=clamps) for part in constraint.cseq]
        return CatTransform(parts, constraint.dim, constraint.lengths)
    if clamps and isinstance(constraint, (constraints.interval, type(constraints.unit_interval))):
        return _Between(constraint)
    return StickBreaking() if constraint is constraints.simplex else biject_to(constraint)


def constraint_of(description: Description) -> Constraint:
    """Return NumPyro's constraint of a description.

    Raises:
        ValueError: If NumPyro has none; the message names it.
    """
    kind, *rest = [description] if isinstance(description, str) else description
    if kind in _PLAIN and not rest:
        return _PLAIN[kind]
    if kind == "bounded" and rest[0] in _BOUNDED:
        return _BOUNDED[rest[0]](*map(_bound, rest[1]))
    if kind == "independent":
        inner = constraint_of(rest[0])
        return constraints.independent(inner, rest[1]) if rest[1] else inner
    if kind in ("stack", "cat"):
        parts = [constraint_of(part) for part in rest[0]]
        dim, *lengths = rest[1:]
        if dim == -1 and (kind == "cat" or not any(part.event_dim for part in parts)):
            return constraints.cat(parts, -1, *(tuple(n) for n in lengths if n))
    name = rest[0] if kind == "bounded" else kind
    raise ValueError(f"the support {name!r} of the file is none that NumPyro has")


def _bound(value: float | list[Any] | None) -> float | NDArray[Any] | None:
    """Return a bound: a number, or an array of any shape in the type of the file."""
    if isinstance(value, list):
        return np.array(value[1], dtype=np.dtype(value[0]))
    return value


def check_parts(constraint: Constraint, value: ArrayLike) -> Array:
    """Return which elements or events of values, ``(*, *event_shape)``, are on a constraint.

    For joined parts (``cat``) the mask is elementwise; all elements of a vector part share one
    answer.
    """
    value = jnp.asarray(value)
    if not isinstance(constraint, constraints.cat):
        return jnp.asarray(constraint(value))
    ends = np.cumsum(constraint.lengths)[:-1]
    parts = zip(constraint.cseq, jnp.split(value, ends, -1), strict=True)
    found = [(check_parts(part, v), v) for part, v in parts]
    return jnp.concatenate(
        [
            jnp.broadcast_to(inside if inside.ndim == v.ndim else inside[..., None], v.shape)
            for inside, v in found
        ],
        -1,
    )


class _Shaped(Constraint):
    """A constraint on vectors, for events of another shape."""

    def __init__(self, inner: Constraint, shape: tuple[int, ...]) -> None:
        self.inner, self.shape = inner, shape
        self.event_dim = len(shape)

    def __call__(self, value: Array) -> Array:
        """Return which elements or events of values, ``(*, *event_shape)``, are on it."""
        value = jnp.asarray(value)
        return check_parts(
            self.inner, value.reshape(*value.shape[: value.ndim - len(self.shape)], -1)
        )
