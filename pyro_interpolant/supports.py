r"""Supports other than all real vectors, reached by Pyro's own bijections."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions  # noqa: F401  (registers Pyro's bijections)
import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints

from .caching import Entry, IdentityCache

__all__ = ["Constraint", "Remembered", "bijection", "is_trivial", "to_unconstrained"]

Constraint = constraints.Constraint


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
            "independent(..., 1), stack or another constraint for which torch.distributions.biject_to is bijective"
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
    inside = support.check(value)
    if bool(inside.all()):
        real = bijection(support).inv(value)
        if bool(torch.isfinite(real).all()):
            return real
        inside = torch.isfinite(real)
    inside = inside.reshape(len(value), -1).all(-1) if inside.dim() > 1 else inside
    count = int((~inside).sum())
    first = int((~inside).reshape(-1).nonzero()[0])
    raise ValueError(
        f"expected values strictly inside the support {support}, got {count} of {inside.numel()} "
        f"rows outside it or on its edge, the first being row {first}: remove them, or choose the "
        "support that the data have"
    )


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
