"""Checks of settings of a run that no class of their own checks."""

from .._package import check_ranges, flag, number
from ..interpolants.couplings import independent


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
        coupling: Which draws of the base are paired with which rows.
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
