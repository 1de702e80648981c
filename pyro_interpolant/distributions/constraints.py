r"""Constraints: the set S that values live in, and its bijection :math:`b: R^D \to S`.

Beside Pyro's own: angles, which have none, and events of any shape.

A constraint keeps the arguments of its constructor as attributes of the same names, as Pyro's do:
constraints, numbers, tensors, or lists of these. By that, files can hold it.
"""

import contextlib
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import Transform, biject_to, transform_to
from torch.distributions.constraint_registry import ConstraintRegistry
from torch.distributions.transforms import ComposeTransform, ReshapeTransform

from .._package import check_sizes
from ..transforms.bijections import PerEvent, biject

Constraint = constraints.Constraint
Sites = Mapping[str, tuple[torch.Size, Constraint]]  # shape and support, in the order of packing


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


def is_discrete(support: Constraint | None) -> bool:
    """Return whether a support is of separate points, such as whole numbers, if that is known."""
    try:
        return bool(getattr(support, "is_discrete", False))
    except NotImplementedError:  # one that depends on parameters, and does not say how
        return False


def is_flat(support: Constraint | None, shape: Sequence[int]) -> bool:
    """Return whether a support has no volume among events of a shape: a simplex, or a sphere.

    Args:
        support: A support that is not discrete, or None for one that is not known.
        shape: The shape of an event.
    """
    if isinstance(support, type(constraints.sphere)):  # of which there is no bijection
        return True
    if support is None or is_all_real(support):
        return False
    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
        return math.prod(biject(support).inverse_shape(torch.Size(shape))) < math.prod(shape)
    return False


_MOST_NUMBERS = 2**16  # in an event of a mixture's components
# The constraint of mixtures in some versions of torch; in others they have their components'.
_OF_MIXTURES = getattr(constraints, "MixtureSameFamilyConstraint", ())


def innermost_constraint(constraint: Constraint) -> Constraint:
    """Return the constraint on the smallest events, of those independent or of a mixture."""
    while isinstance(constraint, (constraints.independent, _OF_MIXTURES)):
        constraint = constraint.base_constraint
    return constraint


def _of_components(registry: ConstraintRegistry, constraint: Any) -> Transform:
    """Return the bijection of a mixture's values, which is that of all of its components.

    Raises:
        NotImplementedError: If they have bounds of their own.
    """
    transform = registry(constraint.base_constraint)
    for size in range(1, _MOST_NUMBERS):  # a matrix or an event of a shape has not any
        with contextlib.suppress(RuntimeError, ValueError):
            shape = transform.forward_shape((size,) * transform.domain.event_dim)
            if len(shape) == transform.codomain.event_dim:
                return transform
            break
    raise NotImplementedError(f"no bijection to {constraint}: components have other bounds")


for _registry in (biject, biject_to, transform_to) if _OF_MIXTURES else ():
    _registry.register(_OF_MIXTURES, partial(_of_components, _registry))


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
    _check_nested(support)
    try:
        transform = biject(support)
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
    transform = biject(support)
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


def _check_nested(support: Constraint) -> None:
    """Raise a ValueError where parts are angles, or joined along a dimension not the last."""
    if isinstance(support, Circular):
        raise ValueError(
            "expected a support that is a bijective image of real vectors, got circular: angles "
            "are learned as rows of shape (N, D), x[:, None] of one angle each, and not as "
            "scalars, in other event shapes, or among named sites"
        )
    if isinstance(support, (constraints.stack, constraints.cat)) and support.dim != -1:
        name = type(support).__name__.strip("_").lower()
        raise ValueError(
            "expected parts of a support joined along the last dimension of an event, got "
            f"constraints.{name} with dim={support.dim}: pass dim=-1; torch's default, 0, is the "
            "dimension of rows"
        )
    inner = getattr(support, "base_constraint", None)
    for part in (*getattr(support, "cseq", ()), *([] if inner is None else [inner])):
        _check_nested(part)


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


def of_events(inside: Tensor, batch_dim: int) -> Tensor:
    """Return what holds for all elements of an event, shape ``(*)``.

    Args:
        inside: What holds for each event, or for each of its parts, shape ``(*, ...)``.
        batch_dim: The number of dimensions of the batch, ``(*)``.
    """
    return inside.flatten(batch_dim).all(-1) if inside.dim() > batch_dim else inside


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
        size = math.prod(value.shape[len(batch) :])  # not -1: also where batch has a 0
        inside = check_parts(self.base_constraint, value.reshape(*batch, size))
        return of_events(inside, len(batch))

    def __repr__(self) -> str:
        """Name the support and the shape."""
        return f"{self.base_constraint} in events of shape {tuple(self.shape)}"


def _reshaping(registry: ConstraintRegistry, constraint: Shaped) -> Transform:
    reshape = ReshapeTransform(torch.Size([math.prod(constraint.shape)]), constraint.shape)
    return ComposeTransform([PerEvent(registry(constraint.base_constraint)), reshape])


for _registry in (biject, biject_to, transform_to):
    _registry.register(Shaped, partial(_reshaping, _registry))


def shaped(support: Constraint, shape: Sequence[int] | None) -> Constraint:
    """Return a support in events of a shape, shape ``(*event_shape)``; itself if there is none.

    Raises:
        TypeError: If the shape is no sequence of whole numbers.
        ValueError: If a size in the shape is not positive, or the support is already one of
            events of more than one dimension.
    """
    if shape is None:
        return support
    check_sizes("event_shape", shape)
    if any(n < 1 for n in shape):
        raise ValueError(f"expected event_shape to be positive sizes, got {tuple(shape)}")
    if is_all_real(support) and support.event_dim:
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
