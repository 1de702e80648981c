r"""Solvers, paths and divergences as the name of a class and what its constructor takes."""

import contextlib
import json
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from .._files import MAX_COUNT, plain_number
from .._torch import warn_user
from .base_description import ERRORS, is_of, known
from .constraint_description import arguments_of


class PartError(ValueError):
    """A part that cannot be built from its description."""


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the part whose description cannot be built."""
    try:
        yield
    except PartError:
        raise
    except ERRORS as error:
        raise PartError(f"its {name} cannot be built: {error}") from error


def describe_choice(choice: object, room: ModuleType) -> list[Any]:
    """Return the class of a choice and its arguments, or None where that is the user's own."""
    name, fields = type(choice).__name__, {}
    if not is_of(choice, room):
        return [name, None]
    own = getattr(choice, "arguments", None)
    for key, value in (arguments_of(choice) if own is None else own()).items():
        if getattr(value, "ndim", None) == 0:
            value = plain_number(value)
        if not isinstance(value, (bool, int, float, str, tuple, type(None))):
            value = describe_choice(value, room)
            if value[1] is None:  # a function of the user's
                return [name, None]
        fields[key] = value
    return [name, fields]


def build_choice(description: list[Any], room: ModuleType, offers: str = "__eq__") -> Any:
    """Return a choice that offers a method, or None for the default where it was the user's."""
    name, fields = description
    if fields is None:  # in files that version 0.1.0 wrote
        warn_user(
            f"the flow was saved with a {name} of your own, which a file cannot hold: it has "
            "the default now, set transform.solver or transform.divergence"
        )
        return None
    with naming(name):
        if max(fields.get(count, 1) for count in ("steps", "nodes", "probes")) > MAX_COUNT:
            raise PartError(f"expected at most {MAX_COUNT} steps or probes in a {name}")
        parts = {
            key: build_choice(value, room) if _is_choice(value) else value
            for key, value in fields.items()
        }
        choice = known(name, room)(**parts)
        again = json.loads(json.dumps(describe_choice(choice, room)[1])) or {}
        if not hasattr(choice, offers) or any(
            again.get(k, choice) != v for k, v in fields.items()
        ):
            raise PartError(f"expected a {name} that {fields} describes, and of use here")
        return choice


def _is_choice(value: object) -> bool:
    """Return whether a value stands for a choice, and not for numbers."""
    return isinstance(value, list) and isinstance(value[0], str)
