r"""Events of more than one dimension: a reshape at the edge, inside all is ``(*, D)``."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to
from torch.distributions.transforms import ComposeTransform, ReshapeTransform

__all__ = ["PerEvent", "Shaped", "shaped"]

Constraint = constraints.Constraint


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


class Shaped(Constraint):
    """A support of vectors, laid out in events of another shape.

    Args:
        inner: The support of scalars or of vectors.
        shape: The shape of an event.
    """

    def __init__(self, inner: Constraint, shape: Sequence[int]) -> None:
        self.base_constraint, self.shape = inner, torch.Size(shape)
        self.event_dim = len(self.shape)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Tell which events, ``(*)``, of values, ``(*, *event_shape)``, are on the support."""
        inside = self.base_constraint.check(value.flatten(-self.event_dim))
        return inside if self.base_constraint.event_dim else inside.all(-1)

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
        ValueError: If the shape is not one of positive sizes, or the support is already one of
            events of more than one dimension.
    """
    if shape is None:
        return support
    if not shape or any(not isinstance(n, int) or n < 1 for n in shape):
        raise ValueError(
            f"expected event_shape to be one or more positive sizes, got {tuple(shape)}"
        )
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
    return Shaped(support, shape)
