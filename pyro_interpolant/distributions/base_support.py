r"""The support of a base: the one it states, within the image of each of its transforms.

Of a distribution that is transformed by several, torch states the codomain of the last alone:
:math:`1 - 2 e^x` would be any real number.
"""

import contextlib
import functools
import math
import operator

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import (
    ComposeTransform,
    Distribution,
    Independent,
    IndependentTransform,
    Transform,
    TransformedDistribution,
    transform_to,
)

from .constraints import Constraint, innermost_constraint, is_all_real, of_events

_BOUNDED = (constraints.simplex, constraints.sphere, constraints.corr_cholesky)
_WRAPPERS = (Independent, dist.MaskedDistribution, dist.ExpandedDistribution)


def stated_support(base: Distribution) -> Constraint | None:
    """Return the support of a distribution, or None where it states none for all of its parts."""
    try:
        support = base.support
    except NotImplementedError:
        return None
    if support is None or not isinstance(base, dist.MixtureSameFamily):
        return support
    inner = innermost_constraint(support)
    return support if all(bound.numel() == 1 for bound in _bounds_of(inner)) else None


def is_bounded(support: Constraint | None) -> bool:
    """Return whether a support, if one is stated, has a finite size."""
    if support is None:
        return False
    support = innermost_constraint(support)
    return support in _BOUNDED or all(bool(b.isfinite().all()) for b in _bounds_of(support))


def scalars_of(base: Distribution) -> Distribution:
    """Return the distribution of scalars, of batch shape ``(1,)``, that a base is made of."""
    while isinstance(base, Independent):
        base = base.base_dist
    if base.event_shape:
        raise NotImplementedError(f"quantiles of a base {type(base).__name__} are not known")
    return base


def _bounds_of(support: Constraint | None) -> list[Tensor]:
    """Return the bounds of scalars, of any shape, infinite where a support states none."""
    known = ("lower_bound", -math.inf), ("upper_bound", math.inf)
    return [torch.as_tensor(getattr(support, *bound)) for bound in known]


def ends_of(base: Distribution | None) -> list[Tensor]:
    """Return the ends of the support of scalars, of any shape, infinite where there are none.

    Args:
        base: Their distribution, or None for N(0, 1).
    """
    if base is None:
        return _bounds_of(None)
    base = scalars_of(base)
    inner, transforms = _transformed(base)
    if inner is None:
        return _bounds_of(stated_support(base))
    ends = ends_of(inner)
    for transform in transforms:
        images = [transform(end) for end in ends]
        if bool((images[0] > images[1]).all()):
            ends, images = ends[::-1], images[::-1]
        # At infinity a map may stop a rounding short of the bound that it leads to.
        bounds = [b.to(x) for b, x in zip(_bounds_of(transform.codomain), images, strict=True)]
        parts = zip(ends, bounds, images, strict=True)
        ends = [b.where(end.isinf() & b.isfinite(), x) for end, b, x in parts]
    return ends


def has_bounds(base: Distribution) -> bool:
    """Return whether a distribution has no density beyond some bounds, as far as it says."""
    inner, transforms = _transformed(base)
    if inner is not None:
        bounded = any(not is_all_real(transform.codomain) for transform in transforms)
        return bounded or has_bounds(inner)
    support = stated_support(base)
    return not (support is None or is_all_real(support))


def inside_base(base: Distribution, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return where a distribution can have values, shape ``(*)``, and some where it can.

    Values are pulled back through its transforms, and must be in the codomain of each.

    Args:
        base: The distribution.
        x: Values, shape ``(*, *event_shape)``.

    Returns:
        Both, or None where all values may be.
    """
    inner, transforms = _transformed(base)
    if inner is None:
        return _inside_support(stated_support(base), x)
    y, event_dim, within = x, len(base.event_shape), list[Tensor]()
    for transform in reversed(transforms):
        end = transform.codomain
        found = _inside_support(end, y)
        if found is not None:
            y, inside = _kept(y, found, end.event_dim, event_dim)
            within.append(inside)
        y = transform.inv(y)
        event_dim += transform.domain.event_dim - end.event_dim
    found = inside_base(inner, y)
    if found is not None:
        y, inside = _kept(y, found, len(inner.event_shape), event_dim)
        within.append(inside)
    if not within:
        return None
    for transform in transforms:
        y = transform(y)
    return functools.reduce(operator.and_, within), y


def _kept(
    y: Tensor, found: tuple[Tensor, Tensor], checked_dim: int, event_dim: int
) -> tuple[Tensor, Tensor]:
    """Return values with known ones for those that cannot be, and which events can, ``(*)``.

    Args:
        y: The values, shape ``(*, *event_shape)``.
        found: Where they can be, and known ones.
        checked_dim: How many dimensions of y each boolean is for.
        event_dim: The number of dimensions of an event.
    """
    inside, known = found
    possible = of_events(inside, inside.dim() - (event_dim - checked_dim))
    return y.where(inside.reshape(inside.shape + (1,) * checked_dim), known), possible


def _transformed(base: Distribution) -> tuple[Distribution | None, list[Transform]]:
    """Return what a distribution transforms, and by what; None where its formula is its own."""
    while isinstance(base, _WRAPPERS):
        base = base.base_dist
    if not isinstance(base, TransformedDistribution):
        return None, []
    if type(base).log_prob is not TransformedDistribution.log_prob:
        return None, []
    left, transforms = list(base.transforms), list[Transform]()
    while left:
        transform = left.pop(0)
        inner = getattr(transform, "base_transform", None)
        if isinstance(transform, ComposeTransform):
            left = [*transform.parts, *left]
        elif isinstance(transform, IndependentTransform) and isinstance(inner, ComposeTransform):
            ndims = transform.reinterpreted_batch_ndims
            left = [*(IndependentTransform(part, ndims) for part in inner.parts), *left]
        else:
            transforms.append(transform)
    return base.base_dist, transforms


def _inside_support(support: Constraint | None, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return which values are in a support, and some that are, or None where all may be.

    Args:
        support: The support, or None for one that is not known.
        x: Values, of whatever shape it takes.
    """
    if support is None or is_all_real(support):
        return None
    with contextlib.suppress(NotImplementedError):  # one that nobody has a bijection of
        known = transform_to(support)(torch.zeros_like(x))
        inside = support.check(x)  # of a stack each element's; known ones have a batch of bounds
        return of_events(inside, known.dim() - support.event_dim), known
    return None
