"""Where a density is that of nothing, and what masks leave out: as in the twin in torch.

NumPyro checks parameters only where ``validate_args`` is on and their values are known, which they
are not under ``jit``; formulas go on where a Poisson rate is negative, or a value is outside.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from .distributions import InterpolantDistribution

_WRAPPERS = (dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution)
_ALWAYS = (type(constraints.real), type(constraints.dependent))


def innermost(fn: Any) -> Any:
    """Return the distribution inside all that wrap or transform it."""
    while isinstance(fn, (*_WRAPPERS, dist.TransformedDistribution)):
        fn = fn.base_dist
    return fn


def without_masks(fn: dist.Distribution) -> dist.Distribution:
    """Return a distribution without the arrays inside it that mask some of its rows."""
    if not isinstance(fn, _WRAPPERS):
        return fn
    if isinstance(fn, dist.MaskedDistribution):
        return fn if isinstance(fn._mask, bool) else without_masks(fn.base_dist)
    base = without_masks(fn.base_dist)
    if base is fn.base_dist:
        return fn
    if isinstance(fn, dist.Independent):
        return base.to_event(fn.reinterpreted_batch_ndims)
    return base.expand(fn.batch_shape)


def log_prob_left_out(fn: dist.Distribution, value: Array) -> Array | None:
    """Return the log density of the rows of a latent site that arrays mask out, else zero.

    It is for those to count, unscaled, beside what the masks leave: such a row would else have no
    density of its own, and the whole no integral. Where a mask is ``False``, as beside a factor
    that takes the place of a density, that is meant.

    Args:
        fn: The distribution of the site, of batch shape ``(*)``, with the masks around it.
        value: Its value, shape ``(*, *event_shape)``.

    Returns:
        Shape ``(*)``, or None where no array masks anything.
    """
    whole = without_masks(fn)
    if whole is fn:
        return None
    own, counted = whole.log_prob(value), fn.log_prob(value)
    return jnp.where(own == counted, 0.0, own - counted)  # of two infinite ones, too


def is_valid(fn: dist.Distribution, value: Array | None) -> Array | None:
    """Return where parameters are in their range, and a value on a support that they move.

    Constraints on single numbers count, such as intervals, and parameters of single numbers. A
    fixed support does not.

    Args:
        fn: A distribution of batch shape ``(*)``.
        value: A value, broadcastable to ``(*, *event_shape)``, or None: parameters alone count.

    Returns:
        A mask that broadcasts to ``(*)``, or None where there is nothing to check.
    """
    return _is_valid(fn, value, moved=False)


def _is_valid(fn: Any, value: Any, *, moved: bool) -> Array | None:
    """Return the same, of a value that a transform may have moved off a fixed support."""
    if isinstance(fn, InterpolantDistribution):  # which knows its support
        return None
    if isinstance(fn, dist.TransformedDistribution):
        moved = value is not None and _support(innermost(fn)) is not None
        for transform in reversed(fn.transforms if moved else []):
            value = transform.inv(value)
    elif not isinstance(fn, _WRAPPERS):
        return _of_numbers(fn, value, moved=moved)
    found = _is_valid(fn.base_dist, value, moved=moved)
    if found is None:
        return None
    mask, events = getattr(fn, "_mask", None), getattr(fn, "reinterpreted_batch_ndims", 0)
    if mask is not None:
        found = found | ~jnp.asarray(mask)
    if not events:
        return found
    shape = jnp.broadcast_shapes(jnp.shape(found), fn.base_dist.batch_shape)
    return jnp.broadcast_to(found, shape).all(tuple(range(-events, 0)))


def _of_numbers(fn: Any, value: Any, *, moved: bool) -> Array | None:
    """Return the mask of a distribution that wraps no other."""
    found, support, events = None, _support(fn), len(fn.event_shape)
    if value is not None and support is not None:
        if moved or constraints.is_dependent(type(fn).support):
            found = support(value)
            found = found.all(tuple(range(-events, 0))) if events else found
    known = getattr(fn, "arg_constraints", {})  # those of other libraries have none
    for name, constraint in known.items() if not events else ():
        number = fn.__dict__.get(name)
        if number is None or isinstance(constraint, _ALWAYS) or constraint.event_dim:
            continue
        own = jnp.asarray(constraint(number))
        found = own if found is None else found & own
    return found


def _support(fn: Any) -> constraints.Constraint | None:
    """Return the support of a distribution, if it is one of single numbers."""
    try:
        support = fn.support
    except NotImplementedError:
        return None
    is_open = support is None or isinstance(support, _ALWAYS)
    return None if is_open or support.event_dim else support


def where_valid(fn: dist.Distribution, value: Array | None, log_prob: Array) -> Array:
    """Return a log density, shape ``(*)``, with ``-inf`` where it is that of nothing.

    Args:
        fn: As in :func:`is_valid`.
        value: As in :func:`is_valid`.
        log_prob: The log density.
    """
    valid = is_valid(fn, value)
    return log_prob if valid is None else jnp.where(valid, log_prob, -math.inf)
