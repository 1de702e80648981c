r"""One way to refuse a number out of range, for all rooms; torch is not needed."""

from typing import Any


def check_ranges(*settings: tuple[str, bool, Any]) -> None:
    """Raise a ValueError that names the first setting out of range.

    Args:
        *settings: What is expected, whether it is so, and what was given.
    """
    for name, good, value in settings:
        if not good:
            raise ValueError(f"expected {name}, got {value}")


def whole(name: str, value: Any, least: int) -> tuple[str, bool, Any]:
    """Return the setting of :func:`check_ranges` that a number is whole, or None.

    Args:
        name: The name of the number.
        value: What was given.
        least: The least that it may be.
    """
    good = value is None or value >= least and value % 1 == 0
    return f"{name} >= {least}, a whole number", good, value
