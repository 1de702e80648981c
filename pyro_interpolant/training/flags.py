"""Arguments that are True or False, where a word would silently count as True."""

from typing import Any


def flag(*, may_be_none: bool = False, **given: Any) -> Any:
    """Return an argument that is given by its name, if it is True or False.

    Args:
        may_be_none: Whether None is one of its values, too.
        **given: The argument.

    Raises:
        TypeError: If it is anything else.
    """
    ((name, value),) = given.items()
    if value is True or value is False or (may_be_none and value is None):
        return value
    choices = "None, True or False" if may_be_none else "True or False"
    raise TypeError(f"expected {name} to be {choices}, got {value!r}: pass one of these")
