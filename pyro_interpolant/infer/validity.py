"""Where log densities are -inf: outside the support, or where parameters are out of range.

Validation raises an error for all of many draws at once, so it is off, and formulas go on outside
the support: an exponential density grows without bound below zero, a Poisson rate may be negative.
"""

import contextlib
import inspect
import math
import threading
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro.distributions import MaskedDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import (
    Distribution,
    Independent,
    MixtureSameFamily,
    TransformedDistribution,
    constraints,
)

from .._torch import broadcast_shapes
from ..distributions.constraints import innermost_constraint, of_events

# Constraints that all numbers satisfy, or that nothing is known of.
_ALWAYS = (type(constraints.real), type(constraints.dependent))


class _WithoutValidation:
    """A block without validation, which is one switch for all threads: the last out restores it.

    Threads that each turned it off and on again would leave it as another of them had found it.
    """

    def __init__(self) -> None:
        self.lock, self.inside, self.stack = threading.Lock(), 0, contextlib.ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.stack.enter_context(pyro.validation_enabled(is_validate=False))
            self.inside += 1

    def __exit__(self, *error: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.stack.close()


without_validation = _WithoutValidation()


def innermost_distribution(fn: Distribution) -> Distribution:
    """Return the distribution inside all that wrap it."""
    while (inner := getattr(fn, "base_dist", None)) is not None:
        fn = inner
    return fn


def without_masks(fn: TorchDistributionMixin) -> TorchDistributionMixin:
    """Return a distribution without the tensors inside it that mask some of its rows."""
    if isinstance(fn, MaskedDistribution) and isinstance(fn._mask, Tensor):
        return without_masks(fn.base_dist)
    if isinstance(fn, Independent):
        base = without_masks(fn.base_dist)
        return fn if base is fn.base_dist else base.to_event(fn.reinterpreted_batch_ndims)
    return fn


def log_prob_left_out(
    fn: TorchDistributionMixin, value: Tensor, *, mask: Tensor | bool | None
) -> Tensor | None:
    """Return the log density of the rows of a latent site that tensors mask out, else zero.

    It is for those to count, unscaled, beside what the masks leave: such a row would else have no
    density of its own, and the whole no integral. Where a mask is ``False``, as beside a factor
    that takes the place of a density, that is meant.

    Args:
        fn: The distribution of the site, of batch shape ``(*)``.
        value: Its value, shape ``(*, *event_shape)``.
        mask: That of the handlers around it.

    Returns:
        Shape ``(*)``, or None where no tensor masks anything.
    """
    whole = without_masks(fn)
    if mask is False or (whole is fn and not isinstance(mask, Tensor)):
        return None
    own, counted = whole.log_prob(value), fn.log_prob(value)
    if isinstance(mask, Tensor):
        counted = torch.where(mask, counted, 0.0)
    return torch.where(own == counted, 0.0, own - counted)  # of two infinite ones, too


def is_valid(fn: Distribution, value: Tensor | None, *, moved: bool = False) -> Tensor | bool:
    """Return where parameters are in their range, and a value on a support that they move.

    Constraints on single numbers count, such as intervals, and of parameters those on vectors,
    such as shares, too; not those on matrices. A fixed support does not: data are checked once.

    Args:
        fn: A distribution of batch shape ``(*)``.
        value: A value, broadcastable to ``(*, *event_shape)``, or None: parameters alone count.
        moved: Whether it may be off a fixed support, moved by a transform or never checked, which
            then counts.

    Returns:
        A mask that broadcasts to ``(*)``, or True where there is nothing to check.
    """
    own, inner = _in_range(fn), getattr(fn, "base_dist", None)
    if inner is None:
        return _where_all(own, _on_support(fn, value, moved=moved))
    mask, events = getattr(fn, "_mask", None), getattr(fn, "reinterpreted_batch_ndims", 0)
    if mask is False:
        return True
    if isinstance(fn, TransformedDistribution):
        within, value = _pulled_back(fn, value, moved=moved)
        own, moved = _where_all(own, within), value is not None
    found = is_valid(inner, value, moved=moved)
    if isinstance(found, bool):
        return own
    if isinstance(mask, Tensor):
        found = found | ~mask
    return _where_all(own, _of_all(found, inner, events) if events else found)


def _pulled_back(
    fn: TransformedDistribution, value: Tensor | None, *, moved: bool
) -> tuple[Tensor | bool, Tensor | None]:
    """Return where a value is in the image of each transform, and the base's value of it.

    The last image, a fixed support, counts if the value moves. Inverses go on beyond an image:
    that of a sigmoid is clamped, and a square is positive.

    Returns:
        A mask that broadcasts to the batch, or True, and the value, or None: none is to be looked
        at, for one where the formula is the distribution's own, and its base only draws.
    """
    has_own = type(fn).log_prob is not TransformedDistribution.log_prob
    ends = [fn.support] if has_own else [transform.codomain for transform in fn.transforms[::-1]]
    images = [_of_numbers(end) if i or moved else None for i, end in enumerate(ends)]
    is_open, events = has_own or _leaf_support(fn) is None, len(fn.event_shape)
    found: Tensor | bool = True
    for i, image in enumerate(images):
        if value is None or (is_open and not any(images[i:])):
            return found, None
        if image is not None:
            inside = torch.as_tensor(image.check(value), device=value.device)
            found = _where_all(found, of_events(inside, inside.dim() - events))
        if has_own:
            return found, None
        transform = fn.transforms[-1 - i]
        value = transform.inv(value)
        events += transform.domain.event_dim - transform.codomain.event_dim
    return found, None if is_open else value


def _where_all(*masks: Tensor | bool) -> Tensor | bool:
    """Return where all masks hold: True, of those that are not tensors, stays out of traces."""
    found: Tensor | bool = True
    for mask in masks:
        if mask is not True:
            found = mask if found is True else found & mask
    return found


def has_density(
    fn: Distribution, value: Tensor | None, *, mask: Tensor | bool | None, moved: bool = False
) -> Tensor | bool:
    """Return where a site has a density, as :func:`is_valid`, or a mask leaves its data out.

    Args:
        fn: The distribution of the site, of batch shape ``(*)``.
        value: Its data, or None of a latent one, whose parameters count in any row.
        mask: That of the handlers around it.
        moved: As in :func:`is_valid`.
    """
    valid = True if mask is False else is_valid(fn, value, moved=moved)
    if isinstance(valid, bool) or value is None or not isinstance(mask, Tensor):
        return valid
    return valid | ~mask


def is_on_support(site: Mapping[str, Any]) -> bool:
    """Return whether the value of a site of a trace is on its support, but for what is masked."""
    valid = has_density(site["fn"], site["value"], mask=site["mask"], moved=True)
    return bool(torch.as_tensor(valid).all())


def _on_support(fn: Distribution, value: Tensor | None, *, moved: bool) -> Tensor | bool:
    """Return where a value is on the support of a distribution that wraps no other, if it moves.

    Whether it does, a transform around it may tell, too.
    """
    support, events = _leaf_support(fn), len(fn.event_shape)
    if value is None or support is None:
        return True
    if isinstance(fn, MixtureSameFamily):
        return _in_a_component(fn, value, moved=moved)
    own = inspect.getattr_static(type(fn), "support", None)
    if not (moved or isinstance(own, property) or constraints.is_dependent(own)):
        return True
    inside = torch.as_tensor(support.check(value), device=value.device)  # a user's may be a bool
    return inside.flatten(-events).all(-1) if events else inside


def _in_a_component(fn: MixtureSameFamily, value: Tensor, *, moved: bool) -> Tensor | bool:
    """Return where a value is on the support of a component, and the others give it no density.

    The formulas of some go on outside their support: a mixture of such has a density only where
    the value is on the support of all.
    """
    each, component = value.unsqueeze(-1 - len(fn.event_shape)), fn.component_distribution
    inside = _leaf_support(component) is None or is_valid(component, each, moved=moved)
    if isinstance(inside, bool):
        return True
    inside, log_prob = torch.broadcast_tensors(inside, component.log_prob(each))
    return inside.any(-1) & (inside | (log_prob == -math.inf)).all(-1)


def _in_range(fn: Distribution) -> Tensor | bool:
    """Return where a distribution's own parameters are, and those of what a mixture mixes."""
    if isinstance(fn, MixtureSameFamily):
        shares = is_valid(fn.mixture_distribution, None)
        of_each = is_valid(fn.component_distribution, None)
        if isinstance(of_each, bool):
            return shares
        return _where_all(shares, _of_all(of_each, fn.component_distribution, 1))
    found: Tensor | bool = True
    for name, constraint in _parameters(fn).items():
        if isinstance(innermost_constraint(constraint), _ALWAYS) or constraint.event_dim > 1:
            continue
        number = fn.__dict__.get(name)
        # Some keep them in a part; a lazy one is another parameter, which is there, in new words.
        if number is None and type(inspect.getattr_static(fn, name, None)) is property:
            number = getattr(fn, name)
        if torch.is_tensor(number):
            found = _where_all(found, _of_batch(_checked(constraint, number), fn))
    return found


def _checked(constraint: constraints.Constraint, number: Tensor) -> Tensor:
    """Return where a parameter is on its constraint, one boolean for each of its events."""
    if isinstance(constraint, type(constraints.simplex)):  # of shares, which torch has normalised
        return (number >= 0).all(-1)
    return constraint.check(number)


def _of_batch(found: Tensor, fn: Distribution) -> Tensor:
    """Return where a mask of parameters holds for all numbers of an event."""
    extra = found.dim() - len(fn.batch_shape)
    return found.flatten(-extra).all(-1) if fn.event_shape and extra > 0 else found


def _of_all(found: Tensor, fn: Distribution, dims: int) -> Tensor:
    """Return where a mask holds for all of the last batch dimensions of a distribution."""
    shape = broadcast_shapes(found.shape, fn.batch_shape)
    return found.expand(shape).flatten(-dims).all(-1)


def _parameters(fn: Distribution) -> Mapping[str, constraints.Constraint]:
    """Return the constraints on a distribution's parameters, none where its author wrote none."""
    try:
        return fn.arg_constraints
    except (AttributeError, NotImplementedError):
        return {}


def _leaf_support(fn: Distribution) -> constraints.Constraint | None:
    """Return the support of the innermost distribution, if it is one of single numbers."""
    try:
        support = innermost_distribution(fn).support
    except NotImplementedError:
        return None
    return _of_numbers(support)


def _of_numbers(support: constraints.Constraint | None) -> constraints.Constraint | None:
    """Return a support, if it is known, and one of single numbers that not all of them are on."""
    if support is None or isinstance(support, _ALWAYS) or support.event_dim:
        return None
    return support
