"""Options of ``fit``, refused before work by what calls it after other work."""

import dataclasses
from collections.abc import Collection, Mapping
from inspect import signature
from typing import Any

from .checkpoint import check_place
from .data import as_held_out
from .distributed import Process
from .fitting import fit
from .loop import Schedule
from .objective import check_choices


def check_options(options: Mapping[str, Any], own: Collection[str], why: str) -> None:
    """Raise an error unless options are some of :func:`fit`, and ones that can work.

    Args:
        options: What was given, by name.
        own: The names of those that the caller sets itself.
        why: Why it does so, for the message.

    Raises:
        TypeError: If there is none of a name, or one that is to be called is not a function.
        ValueError: If the caller sets one itself, or a setting cannot work.
    """
    taken = sorted(options.keys() & own)
    if taken:
        raise ValueError(f"expected other options of fit than {', '.join(taken)}: {why}")
    known = signature(fit).parameters
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise TypeError(f"expected options of fit, got {', '.join(unknown)}: see its arguments")
    given = {name: options.get(name, part.default) for name, part in known.items()}
    Schedule(**{field.name: given[field.name] for field in dataclasses.fields(Schedule)})
    choices = (given[name] for name in ("learn", "coupling", "callback", "tolerance", "whiten"))
    check_choices(*choices)
    as_held_out(given["validation"])
    place = None if Process(given["fabric"]).rank else given["checkpoint"]
    check_place(place, given["checkpoint_every"])
