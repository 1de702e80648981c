r"""One way to refuse a setting, for all rooms: by its range or kind; torch is not needed."""

from typing import Any


def check_ranges(*settings: tuple[str, bool, Any]) -> None:
    """Raise a ValueError that names the first setting out of range.

    Args:
        *settings: What is expected, whether it is so, and what was given.
    """
    for name, good, value in settings:
        if not good:
            raise ValueError(f"expected {name}, got {value}")


def whole(name: str, value: Any, least: int, *, or_none: bool = False) -> tuple[str, bool, Any]:
    """Return the setting of :func:`check_ranges` that a number is whole.

    Args:
        name: The name of the number.
        value: What was given.
        least: The least that it may be.
        or_none: Whether it may be None, too.
    """
    good = or_none if value is None else value >= least and value % 1 == 0
    return f"{name} >= {least}, a whole number", good, value


def flag(name: str, value: Any, *, or_none: bool = False) -> tuple[str, bool, Any]:
    """Return the setting that a value is True or False: any word would count as True.

    Args:
        name: The name of the argument.
        value: What was given.
        or_none: Whether it may be None, too.
    """
    choices = "None, True or False" if or_none else "True or False"
    good = value is True or value is False or (or_none and value is None)
    return f"{name} to be {choices}", good, repr(value)
