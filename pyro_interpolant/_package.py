r"""What every room shares, without torch: names imported when first used, settings refused.

Rooms name what is in their files, and import none of them until a name is used (PEP 562): so the
package costs little to import, and a file that needs numpy alone can be imported where there is no
torch. A setting out of its range is refused in one way, and columns of data frames are taken by
their names in one way.
"""

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from numbers import Real
from typing import Any


def now() -> float:
    """Return the time in seconds: the one place where the package reads the clock."""
    return time.monotonic()


def attach(
    package: str,
    homes: Mapping[str, Sequence[str]],
    *,
    rooms: Sequence[str] = (),
    moved: Mapping[str, str] | None = None,
    needs: str = "",
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` of a package whose names are lazy.

    Args:
        package: The package, ``__name__`` in its ``__init__``.
        homes: For each of its modules the public names it holds.
        rooms: Subpackages and modules that are attributes of the package themselves.
        moved: Hints for names that used to be here, shown after a colon.
        needs: What to install before any of its modules can be imported, if not installed anyway.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in home:
            with needing(f"{package}.{name}", needs) if needs else nullcontext():
                value = getattr(importlib.import_module(f"{package}.{home[name]}"), name)
            setattr(sys.modules[package], name, value)  # found without this function from now on
            return value
        if name in rooms:
            return importlib.import_module(f"{package}.{name}")
        hint = f": {moved[name]}" if moved and name in moved else ""
        raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")

    def names() -> list[str]:
        return sorted([*home, *rooms, "__all__", "__doc__", "__name__", "__path__", "__file__"])

    return sorted(home), get, names


@contextmanager
def needing(what: str, needs: str) -> Iterator[None]:
    """Say what to install where that which is imported inside is missing, or of another version.

    Args:
        what: What needs it, by its name.
        needs: What to install, as ``pip install`` takes it.

    Raises:
        ImportError: If it cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        text = f"{what} needs {needs}: pip install {needs!r} ({error})"
        raise ImportError(text, name=error.name, path=error.path) from error


def check_ranges(*settings: tuple[str, bool, object]) -> None:
    """Raise a ValueError that names the first setting out of range.

    Args:
        *settings: What is expected, whether it is so, and what was given.
    """
    for name, good, value in settings:
        if not good:
            raise ValueError(f"expected {name}, got {value}")


def whole(
    name: str, value: object, least: int | None, *, or_none: bool = False
) -> tuple[str, bool, object]:
    """Return the setting of :func:`check_ranges` that a number is whole.

    Args:
        name: The name of the number.
        value: What was given.
        least: The least that it may be, or None.
        or_none: Whether it may be None, too.
    """
    text = f"{name}, a whole number" if least is None else f"{name} >= {least}, a whole number"
    return number(
        text, value, lambda n: n % 1 == 0 and (least is None or n >= least), or_none=or_none
    )


def keep_whole(choice: object, **least: int | None) -> None:
    """Check that fields of a frozen dataclass are whole numbers, and make integers of them.

    Args:
        choice: The dataclass.
        **least: The least that each may be, or None.

    Raises:
        ValueError: If one is not.
    """
    check_ranges(*(whole(name, getattr(choice, name), n) for name, n in least.items()))
    for name in least:
        object.__setattr__(choice, name, int(getattr(choice, name)))


def number(
    text: str, value: Any, test: Callable[[Any], bool], *, or_none: bool = False
) -> tuple[str, bool, object]:
    """Return the setting that a test finds a number good, which nothing but a number can be.

    Args:
        text: What is expected.
        value: What was given.
        test: Whether a number is good.
        or_none: Whether it may be None, too.
    """
    own = value.item() if getattr(value, "ndim", None) == 0 else value  # in a tensor or an array
    if not isinstance(own, Real):
        return text, or_none and value is None, repr(value)
    return text, test(own), own


def check_sizes(name: str, value: object) -> None:
    """Raise a TypeError unless a value is a sequence of whole numbers, such as a shape.

    Args:
        name: The name of the sizes.
        value: What was given.
    """
    if not isinstance(value, Sequence) or not all(hasattr(n, "__index__") for n in value):
        hint = f": write ({value},)" if hasattr(value, "__index__") else ""
        raise TypeError(f"expected {name}, a tuple of whole numbers, got {value!r}{hint}")


def flag(name: str, value: object, *, or_none: bool = False) -> tuple[str, bool, object]:
    """Return the setting that a value is True or False: any word would count as True.

    Args:
        name: The name of the argument.
        value: What was given.
        or_none: Whether it may be None, too.
    """
    choices = "None, True or False" if or_none else "True or False"
    good = value is True or value is False or (or_none and value is None)
    return f"{name} to be {choices}", good, repr(value)


def names_of(x: object, expected: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the names of the columns of a data frame; of anything else none.

    A frame has types, too: an array of xarray has ``columns`` where a dimension is called so. What
    a table of pyarrow calls so are its values.

    Args:
        x: Anything.
        expected: Names, which the index of a row of a data frame of several columns may be, too.
    """
    own = getattr(x, "columns" if hasattr(x, "dtypes") else "column_names", ())
    is_frame = hasattr(x, "dtypes") or (isinstance(own, list) and hasattr(x, "take"))
    columns = tuple(map(str, own)) if is_frame else ()
    index = getattr(x, "index", None)  # of lists a method
    if columns or index is None or callable(index) or not 1 < len(index) == len(expected):
        return columns
    found = tuple(map(str, index))
    are_names = all(isinstance(i, str) for i in index) or sorted(found) == sorted(expected)
    return found if are_names and getattr(x, "ndim", None) == 1 else ()


def order_of(names: Sequence[str], expected: Sequence[str], name: str) -> list[int] | None:
    """Return the places of names in the order expected; None where they are in it, or are none.

    Args:
        names: The names of columns, or none.
        expected: The same in their order, or none.
        name: What to call what has the columns, in messages.

    Raises:
        ValueError: If the names are others, or one of several in another order is there twice.
    """
    found, wanted = list(names), list(expected)
    if not found or not wanted or found == wanted:
        return None
    if sorted(found) != sorted(wanted) or len(set(found)) < len(found):
        raise ValueError(
            f"expected {name} with the columns {wanted}, each once and in any order, got {found}: "
            "rename or select them"
        )
    return [found.index(column) for column in wanted]
