"""Where a log density must be -inf though its formula gives a number, and what masks leave out.

Parameters may be out of range, and values off a support that moves. NumPyro checks parameters
only where ``validate_args`` is on and their values are known, which they are not under ``jit``;
formulas go on where a Poisson rate is negative, or a value is outside.
"""

import inspect
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro.distributions import constraints

from .bases import WRAPPERS, innermost_constraint
from .distributions import InterpolantDistribution

# Constraints of all numbers or angles, of which nothing is known, or that rounding breaks.
_ALWAYS = (
    type(constraints.real),
    type(constraints.dependent),
    type(constraints.circular),
    type(constraints.positive_definite_circulant_vector),
)


def innermost_distribution(fn: Any) -> Any:
    """Return the distribution inside all that wrap or transform it."""
    while isinstance(fn, (*WRAPPERS, dist.TransformedDistribution)):
        fn = fn.base_dist
    return fn


def without_masks(fn: dist.Distribution) -> dist.Distribution:
    """Return a distribution without the arrays inside it that mask some of its rows."""
    if not isinstance(fn, WRAPPERS):
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


def is_valid(fn: Any, value: Array | None, *, moved: bool = False) -> Array | bool:
    """Return where parameters are in their range, and a value on a support that they move.

    Constraints on single numbers count, such as intervals, and of parameters those on vectors,
    such as shares, too; not those on matrices. A fixed support does not.

    Args:
        fn: A distribution of batch shape ``(*)``.
        value: A value, broadcastable to ``(*, *event_shape)``, or None: parameters alone count.
        moved: Whether a transform may have moved it off a fixed support, which then counts.

    Returns:
        A mask that broadcasts to ``(*)``, or True where there is nothing to check.
    """
    if isinstance(fn, InterpolantDistribution):  # which knows its support
        return True
    own = _in_range(fn)
    if isinstance(fn, dist.TransformedDistribution):
        moved = value is not None and _support(innermost_distribution(fn)) is not None
        for transform in reversed(fn.transforms if moved else []):
            value = transform.inv(value)
    elif not isinstance(fn, WRAPPERS):
        inner = getattr(fn, "base_dist", None)  # of one that is censored, or inflated
        own = own & (inner is None or is_valid(inner, None))
        return own & _on_support(fn, value, moved=moved)
    found = is_valid(fn.base_dist, value, moved=moved)
    if isinstance(found, bool):
        return own
    mask, events = getattr(fn, "_mask", None), getattr(fn, "reinterpreted_batch_ndims", 0)
    if mask is not None:
        found = found | ~jnp.asarray(mask)
    return own & (_of_all(found, fn.base_dist, events) if events else found)


def _on_support(fn: Any, value: Any, *, moved: bool) -> Array | bool:
    """Return where a value is on the support of a distribution that wraps no other, if it moves.

    Whether it does, a transform around it may tell, too.
    """
    support, events = _support(fn), len(fn.event_shape)
    if value is None or support is None:
        return True
    if not moved and not constraints.is_dependent(type(fn).support):
        return True
    inside = jnp.asarray(support(value))
    return inside.all(tuple(range(-events, 0))) if events else inside


def _in_range(fn: Any) -> Array | bool:
    """Return where a distribution's own parameters are, and those of what a mixture mixes."""
    found: Array | bool = True
    if isinstance(fn, dist.MixtureSameFamily):
        found = is_valid(fn.mixing_distribution, None)
        of_each = is_valid(fn.component_distribution, None)
        if isinstance(of_each, bool):
            return found
        return found & _of_all(of_each, fn.component_distribution, 1)
    if isinstance(fn, dist.MixtureGeneral):
        for part in (fn.mixing_distribution, *fn.component_distributions):
            found = found & is_valid(part, None)
        return found
    known = getattr(fn, "arg_constraints", {})  # those of other libraries have none
    for name, constraint in known.items():
        if isinstance(innermost_constraint(constraint), _ALWAYS) or constraint.event_dim > 1:
            continue
        number = fn.__dict__.get(name)
        # Some keep them in a part; a lazy one is another parameter, which is there, in new words.
        if number is None and type(inspect.getattr_static(fn, name, None)) is property:
            number = getattr(fn, name)
        if number is not None:
            found = found & _of_batch(_checked(constraint, jnp.asarray(number)), fn)
    return found


def _checked(constraint: constraints.Constraint, number: Array) -> Array:
    """Return where a parameter is on its constraint, one boolean for each of its events."""
    if isinstance(constraint, type(constraints.simplex)):  # of shares, whose sum is rounded
        return (number >= 0).all(-1)
    return jnp.asarray(constraint(number))


def _of_batch(found: Array, fn: Any) -> Array:
    """Return where a mask of parameters holds for all numbers of an event."""
    extra = jnp.ndim(found) - len(fn.batch_shape)
    return found.all(tuple(range(-extra, 0))) if fn.event_shape and extra > 0 else found


def _of_all(found: Array, fn: Any, dims: int) -> Array:
    """Return where a mask holds for all of the last batch dimensions of a distribution."""
    shape = jnp.broadcast_shapes(jnp.shape(found), fn.batch_shape)
    return jnp.broadcast_to(found, shape).all(tuple(range(-dims, 0)))


def _support(fn: Any) -> constraints.Constraint | None:
    """Return the support of a distribution, if it is one of single numbers."""
    try:
        support = fn.support
    except NotImplementedError:
        return None
    is_open = support is None or isinstance(support, _ALWAYS)
    return None if is_open or support.event_dim else support
