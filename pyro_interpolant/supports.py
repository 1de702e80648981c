r"""Supports other than all real vectors, reached by Pyro's own bijections."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform, biject_to, transform_to

from .caching import Entry, IdentityCache
from .marginals import Gaussianized, without_chart
from .shapes import PerEvent, Shaped

__all__ = [
    "Constraint",
    "OnEvents",
    "Remembered",
    "Supported",
    "bijection",
    "circular",
    "is_circular",
    "is_trivial",
    "to_unconstrained",
]

Constraint = constraints.Constraint


class _Circular(Constraint):
    """Vectors of angles in [-pi, pi], where -pi and pi are one point."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Tell which vectors, ``(*)``, of values, ``(*, D)``, have all angles in range."""
        return ((value >= -math.pi) & (value <= math.pi)).all(-1)

    def __repr__(self) -> str:
        """Name the constraint."""
        return "circular"


circular = _Circular()


@biject_to.register(_Circular)
@transform_to.register(_Circular)
def _(constraint: _Circular) -> Transform:
    raise NotImplementedError(
        "no smooth bijection maps real vectors to angles: for inference use base_space(model), "
        "which samples the flow's base instead"
    )


def is_circular(support: Constraint) -> bool:
    """Tell whether a support is :data:`circular`, or a copy of it."""
    return isinstance(support, _Circular)


def bijection(support: Constraint) -> Transform:
    """Return the bijection from real vectors, shape ``(*, D)``, to a support.

    Args:
        support: Any Pyro constraint with a registered bijection from vectors or scalars.

    Raises:
        TypeError: If ``support`` is not a constraint.
        ValueError: If it has no such bijection; the message names it.
    """
    if not isinstance(support, Constraint):
        raise TypeError(
            "expected support to be a constraint such as constraints.positive, got "
            f"{type(support).__name__}"
        )
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


def is_trivial(support: Constraint) -> bool:
    """Tell whether a support is all real vectors, so that nothing has to be mapped."""
    if isinstance(support, constraints.independent) and support.reinterpreted_batch_ndims == 1:
        support = support.base_constraint
    return isinstance(support, type(constraints.real))


def to_unconstrained(value: Tensor, support: Constraint) -> Tensor:
    """Return values on a support, shape ``(*, *event_shape)``, as real vectors, shape ``(*, D)``.

    Raises:
        ValueError: If a value is outside the support, or on its edge, which maps to infinity.
    """
    if is_trivial(support):
        return value
    if is_circular(support):
        return _checked_angles(value)
    on_events = OnEvents(support)
    inside = on_events.check(value)
    if bool(inside.all()):
        inside = on_events.reduced(_off_the_edge(support, value), value)
    if bool(inside.all()):
        real = bijection(support).inv(value)
        inside = torch.isfinite(real).all(-1)
        if bool(inside.all()):
            return real
    raise ValueError(
        f"expected values strictly inside the support {support}, got {int((~inside).sum())} of "
        f"{inside.numel()} rows outside it or on its edge, the first being row "
        f"{int((~inside).reshape(-1).nonzero()[0])}: remove them, or choose the support that the "
        "data have"
    )


def _checked_angles(value: Tensor) -> Tensor:
    """Return angles, shape ``(*, D)``, if they are in range."""
    inside = circular.check(value)
    if bool(inside.all()):
        return value
    raise ValueError(
        f"expected angles in [-pi, pi], in radians, got {int((~inside).sum())} of "
        f"{inside.numel()} rows outside: take whole turns off, "
        "torch.remainder(x + torch.pi, 2 * torch.pi) - torch.pi"
    )


def _off_the_edge(support: Constraint, value: Tensor) -> Tensor:
    """Tell which elements are off the bounds, where bijections clamp instead of diverging."""
    if isinstance(support, (constraints.independent, Gaussianized, Shaped)):
        return _off_the_edge(support.base_constraint, value)
    if isinstance(support, constraints.stack):
        parts = zip(support.cseq, value.unbind(support.dim), strict=True)
        return torch.stack([_off_the_edge(c, v) for c, v in parts], support.dim)
    inside = torch.ones_like(value, dtype=torch.bool)
    lower, upper = (getattr(support, f"{side}_bound", None) for side in ("lower", "upper"))
    if isinstance(support, type(constraints.simplex)):
        lower = 0.0
    if lower is not None:
        inside = inside & (value > lower)
    return inside if upper is None else inside & (value < upper)


class OnEvents(Constraint):
    """A support as a constraint on whole events, whatever the support's own idea of them.

    Pyro's bijections end in element-wise maps, so the codomain of a composed one says nothing of
    the support, and some constraints check elements where they claim to check events.

    Args:
        support: The support.
    """

    def __init__(self, support: Constraint) -> None:
        self.inner = support
        self.event_dim = max(1, bijection(support).codomain.event_dim)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Tell which events, ``(*)``, of values, ``(*, *event_shape)``, are on the support."""
        return self.reduced(self.inner.check(value), value)

    def reduced(self, inside: Tensor, value: Tensor) -> Tensor:
        """Return what holds for all elements of an event, shape ``(*)``."""
        extra = inside.dim() - (value.dim() - self.event_dim)
        return inside.flatten(-extra).all(-1) if extra > 0 else inside

    def __repr__(self) -> str:
        """Name the support."""
        return repr(self.inner)


@biject_to.register(OnEvents)
def _(constraint: OnEvents) -> Transform:
    return Remembered(PerEvent(bijection(constraint.inner)))


@transform_to.register(OnEvents)
def _(constraint: OnEvents) -> Transform:
    return transform_to(constraint.inner)


class Remembered(Transform):
    """A bijection that gives back the very tensor it was called with, under the cache's guards."""

    bijective = True

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.wrapped = transform
        self.domain, self.codomain = transform.domain, transform.codomain
        self._cache = IdentityCache()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the value on the support, ``(*, *event_shape)``, of real vectors, ``(*, D)``."""
        entry = self._cache.find(x=x)
        if entry is None:
            entry = Entry(x, self.wrapped(x), forward=True)
            self._cache.store(entry)
        return entry.y

    def _inv_call(self, y: Tensor) -> Tensor:
        entry = self._cache.find(y=y)
        if entry is None:
            entry = Entry(self.wrapped.inv(y), y, forward=False)
            self._cache.store(entry)
        return entry.x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log |dy/dx|``, shape ``(*)``, as the wrapped bijection does."""
        return self.wrapped.log_abs_det_jacobian(x, y)

    def forward_shape(self, shape: Sequence[int]) -> Sequence[int]:
        """Return the shape on the support."""
        return self.wrapped.forward_shape(shape)

    def inverse_shape(self, shape: Sequence[int]) -> Sequence[int]:
        """Return the shape as real vectors."""
        return self.wrapped.inverse_shape(shape)

    def with_cache(self, cache_size: int = 1) -> "Remembered":
        """Return self: the cache is always there and checks itself."""
        return self

    def clear_cache(self) -> None:
        """Forget all pairs."""
        self._cache.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles: without cached graphs or inverses."""
        return {**self.__dict__, "_cache": IdentityCache(), "_inv": None}


class Supported:
    """What has a support, and real vectors for its values.

    Attributes:
        constraint: The support.
    """

    constraint: Constraint

    def unconstrained(self, value: Tensor) -> Tensor:
        """Return values, shape ``(*, *event_shape)``, as real vectors, shape ``(*, D)``.

        Raises:
            ValueError: If a value is outside the support.
        """
        return to_unconstrained(value, without_chart(self.constraint))

    def to_flow(self, value: Tensor) -> Tensor:
        """Return values in the flow's coordinates: real vectors, behind the map if there is one.

        Raises:
            ValueError: If a value is outside the support.
        """
        return to_unconstrained(value, self.constraint)
