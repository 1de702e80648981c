"""Options of ``fit``, refused before work: by itself, and by what calls it after other work."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from inspect import signature
from typing import Any

from .._package import check_ranges, flag, number
from ..interpolants.couplings import independent
from .checkpoint import check_place
from .clock import Clock
from .data import as_held_out
from .distributed import Process
from .loop import Schedule


def check_choices(
    learn: object,
    coupling: object,
    callback: object,
    tolerance: object,
    whiten: object,
    pairs: object,
) -> None:
    """Raise an error unless the settings of a run beside its schedule can work.

    Args:
        learn: What the network is to learn.
        coupling: Who is paired with whom.
        callback: What is called at each look, or None.
        tolerance: Of the calibration.
        whiten: Whether to set the whitening map.
        pairs: The partners of rows, or None.

    Raises:
        TypeError: If one that is to be called is not a function.
        ValueError: If it is not known what is to be learned, another is out of range, or there
            are both pairs and a coupling.
    """
    if learn not in ("velocity", "noise"):
        raise ValueError(f"expected learn='velocity' or learn='noise', got {learn!r}")
    for name, given in ("coupling", coupling), ("callback", callback):
        if not (callable(given) or (given is None and name == "callback")):
            raise TypeError(f"expected {name} to be a function, not its name, got {given!r}")
    if pairs is not None and coupling is not independent:
        raise ValueError(
            "expected pairs or a coupling, got both: a row that has a partner is coupled with it, "
            "and with no other draw"
        )
    check_ranges(number("tolerance > 0", tolerance, lambda n: n > 0), flag("whiten", whiten))


def check_options(
    fit: Callable[..., object],
    options: Mapping[str, Any],
    own: Collection[str] = (),
    why: str = "",
) -> None:
    """Raise an error unless options are some of :func:`fit`, and ones that can work.

    For what calls it after other work.

    Args:
        fit: The function.
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
    known = {n: p for n, p in signature(fit).parameters.items() if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise TypeError(f"expected options of fit, got {', '.join(unknown)}: see its arguments")
    given = {name: options.get(name, part.default) for name, part in known.items()}
    Clock(given["max_seconds"])
    Schedule(**{field.name: given[field.name] for field in dataclasses.fields(Schedule)})
    check_choices(*(given[name] for name in signature(check_choices).parameters))
    as_held_out(given["validation"])
    place = None if Process(given["fabric"]).rank else given["checkpoint"]
    check_place(place, given["checkpoint_every"])


def check_repeatable(seed: int | None, checkpoint: object) -> None:
    """Raise a ValueError where draws before a run would not come again when it is resumed.

    Args:
        seed: Of these draws and the run, or None.
        checkpoint: Where the state of the run is kept, or None.
    """
    if checkpoint is not None and seed is None:
        raise ValueError(
            "expected a seed beside a checkpoint: the run goes on only where what is drawn before "
            "it comes again. Got none: pass seed=0"
        )
