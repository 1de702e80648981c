"""Which sites of a NumPyro model are given their values from outside, by handlers around it."""

import functools
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from numpyro import handlers
from numpyro.infer import Predictive, init_to_value
from numpyro.primitives import _PYRO_STACK, Messenger


def is_given(
    site: Mapping[str, Any], base: Mapping[str, Any], stack: Iterable[Messenger]
) -> tuple[bool, Any]:
    """Return whether a site is given its value, and the base none, and where to start from.

    Args:
        site: The site.
        base: The site that is sampled in its place.
        stack: The handlers, from the inside.
    """
    start, name, other = None, site["name"], base["name"]
    for handler in stack:
        if isinstance(handler, handlers.scope) and "sample" not in handler.hide_types:
            name, other = (f"{handler.prefix}{handler.divider}{n}" for n in (name, other))
        function = getattr(handler, "substitute_fn", None)
        if getattr(function, "func", function) is init_to_value:
            start = next(_values_of(function), {}).get(name, start)
            continue
        for values in (*_data_of(handler), *_values_of(function)):
            if name in values and other not in values:
                return True, None
        condition = getattr(handler, "condition_fn", None)
        if (
            condition is not None
            and condition({**site, "name": name}) is not None
            and condition({**base, "name": other}) is None
        ):
            return True, None
    return False, start


def given_value(name: str, packed: str) -> Any:
    """Return the value that a handler gives to a deterministic site by name, or None.

    NumPyro's own pass such sites by, but for ``substitute``. None outside of a block is seen.

    Args:
        name: The site.
        packed: The site that it is a function of. Draws in ``Predictive`` that have this too, as
            those of MCMC have, are left to it.
    """
    found = None
    for handler in reversed(_PYRO_STACK):  # from the inside: the last that gives a value is obeyed
        if isinstance(handler, handlers.scope):
            before, hidden = f"{handler.prefix}{handler.divider}", handler.hide_types
            name = name if "deterministic" in hidden else before + name
            packed = packed if "sample" in hidden else before + packed
        site = {"type": "deterministic", "name": name}
        if isinstance(handler, handlers.block) and handler.hide_fn(site):
            break  # as around each step of scan, which has a part of what is given
        function, value = getattr(handler, "substitute_fn", None), None
        if isinstance(handler, (handlers.condition, handlers.do)):
            data, function = handler.data or {}, getattr(handler, "condition_fn", None)
            value = data.get(name) if function is None else function(site)
        elif getattr(function, "__module__", "") == Predictive.__module__:
            draws = next((v for v in _values_of(function) if packed not in v), {})
            value = draws.get(name)
        found = found if value is None else value
    return found


def _data_of(handler: Messenger) -> Iterator[Mapping[str, Any]]:
    """Return the values by name that a handler gives to sites."""
    data = (
        handler.trace if isinstance(handler, handlers.replay) else getattr(handler, "data", None)
    )
    if isinstance(data, Mapping):
        yield data


def _values_of(function: object) -> Iterator[Mapping[str, Any]]:
    """Return the values by name that a function which gives them to sites was made of.

    It is not called: those of a sampler count the volume of what they give.
    """
    parts: list[Any] = []
    if isinstance(function, functools.partial):
        parts = [*function.args, *function.keywords.values()]
    elif inspect.isfunction(function):
        used = inspect.getclosurevars(function)
        parts = [*used.nonlocals.values(), *used.globals.values()]
    for part in parts:
        if isinstance(part, Mapping):
            yield part
        elif isinstance(part, functools.partial):
            yield from _values_of(part)
