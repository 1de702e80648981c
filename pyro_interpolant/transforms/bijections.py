r"""What a flow starts from: the standard normal, any distribution in data coordinates, or samples.

A base need not have a density: with samples alone a flow still transports and is sampled from.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributions import Transform, constraints

from .cache import Entry, IdentityCache
from .whitening import Whitening

__all__ = ["PerEvent", "Cached", "Whiten"]


class Whiten(Transform):
    """Map a base given in data coordinates to the whitened coordinates the velocity moves."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, whitening: Whitening) -> None:
        super().__init__()
        self.whitening = whitening

    def _call(self, x: Tensor) -> Tensor:
        return self.whitening.to_white(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.whitening.from_white(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``-log |det L|``, shape ``(*)``."""
        return (-self.whitening.log_det).expand(x.shape[:-1])

    def with_cache(self, cache_size: int = 1) -> "Whiten":
        """Return self: there is nothing to cache."""
        return self


class PerEvent(Transform):
    """A bijection from vectors, shape ``(*, D)``, whose log-determinant is an event's, ``(*)``.

    Element-wise ones give that of each element, and torch's ``StackTransform`` does so where its
    domain says otherwise, which breaks what it is composed with.

    Args:
        wrapped: What a registry gives for a support.
    """

    domain = constraints.real_vector

    def __init__(self, wrapped: Transform) -> None:
        super().__init__()
        self.wrapped, self.bijective = wrapped, wrapped.bijective
        end = wrapped.codomain
        self.codomain = end if end.event_dim > 0 else constraints.independent(end, 1)

    def with_cache(self, cache_size: int = 1) -> "PerEvent":
        """Return self: what wraps a support remembers its pairs."""
        return self

    def _call(self, x: Tensor) -> Tensor:
        return self.wrapped(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.wrapped.inv(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log |dy/dx|``, shape ``(*)``."""
        value = self.wrapped.log_abs_det_jacobian(x, y)
        return value.reshape(*x.shape[:-1], -1).sum(-1)

    def forward_shape(self, shape: Sequence[int]) -> Sequence[int]:
        """Return the shape on the support."""
        return self.wrapped.forward_shape(shape)

    def inverse_shape(self, shape: Sequence[int]) -> Sequence[int]:
        """Return the shape as real vectors."""
        return self.wrapped.inverse_shape(shape)


class Cached(Transform):
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

    def with_cache(self, cache_size: int = 1) -> "Cached":
        """Return self: the cache is always there and checks itself."""
        return self

    def clear_cache(self) -> None:
        """Forget all pairs."""
        self._cache.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles: without cached graphs or inverses."""
        return {**self.__dict__, "_cache": IdentityCache(), "_inv": None}
