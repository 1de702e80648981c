r"""Weights that are part of a program instead of inputs to it.

NumPyro's ``scan``, ``jax.lax.map`` and ``jax.vmap`` stack or slice every array that they find in a
distribution: weights would be copied for each step. :class:`Frozen` weights are none of its
leaves; two with the same content are equal, so that what was compiled for one serves the other.
They are numpy's: arrays of jax that were made while something is traced could not be kept.
"""

import hashlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

__all__ = ["Frozen"]

Weights = Mapping[str, Any]  # by name: arrays of numpy or jax
_MAX_DERIVED = 16
_T = TypeVar("_T")


class Frozen(Mapping[str, NDArray[Any]]):
    """Arrays by name that do not change: hashed and compared by content, a pytree without leaves.

    Args:
        arrays: Arrays of any shapes by name; they are copied.

    Example:
        >>> one, other = Frozen({"a": np.zeros(2)}), Frozen({"a": np.zeros(2)})
        >>> one == other, jax.tree.leaves(one)
        (True, [])
    """

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        self._arrays = {name: np.array(arrays[name]) for name in sorted(arrays)}
        digest = hashlib.blake2b(digest_size=16)
        for name, array in self._arrays.items():
            array.flags.writeable = False
            digest.update(repr((name, array.shape, array.dtype.str)).encode())
            digest.update(array.tobytes())
        self._digest = digest.digest()
        self._derived: dict[Hashable, Any] = {}

    def derived(self, key: Hashable, make: Callable[[], _T]) -> _T:
        """Return what is computed from the arrays, of any shape, once for each key."""
        if key not in self._derived:
            if len(self._derived) >= _MAX_DERIVED:
                self._derived.pop(next(iter(self._derived)))
            self._derived[key] = make()
        return self._derived[key]

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return an array, of its shape, by name."""
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._arrays)

    def __len__(self) -> int:
        """Return the number of arrays."""
        return len(self._arrays)

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what copies and pickles are made of: the arrays, to be frozen again."""
        return Frozen, (self._arrays,)

    def __hash__(self) -> int:
        """Return a number by content."""
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        """Return whether another has the same content."""
        return isinstance(other, Frozen) and self._digest == other._digest

    def __repr__(self) -> str:
        """Name the arrays and their shapes."""
        return f"Frozen({ {name: array.shape for name, array in self.items()} })"


jax.tree_util.register_pytree_node(Frozen, lambda frozen: ((), frozen), lambda frozen, _: frozen)
