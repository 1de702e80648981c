r"""Names that are imported when they are first used (PEP 562).

Rooms name what is in their files, and import none of them until a name is used: so the package
costs little to import, and a file that needs numpy alone can be imported where there is no torch.
"""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["attach"]


def attach(
    package: str,
    homes: Mapping[str, Sequence[str]],
    *,
    rooms: Sequence[str] = (),
    moved: Mapping[str, str] | None = None,
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__all__``, ``__getattr__`` and ``__dir__`` of a package whose names are lazy.

    Args:
        package: The package, ``__name__`` in its ``__init__``.
        homes: For each of its modules the public names it holds.
        rooms: Subpackages and modules that are attributes of the package themselves.
        moved: Hints for names that used to be here, shown after a colon.
    """
    home = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:
        if name in home:
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
