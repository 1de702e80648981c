r"""Where a run keeps its state, and whether what is there is of this run."""

import contextlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .snapshots import Snapshot, read

__all__ = ["Keeper", "check_place", "named", "opened", "warn_inexact"]


class Keeper(NamedTuple):
    """Where a run keeps its state.

    Attributes:
        path: The file.
        every: After how many steps, or None: at each look.
        identity: What tells this run from another.
        initial: The state of the generator before anything was drawn, shape ``(S,)``.
        snapshot: What to resume from, or None.
    """

    path: str | os.PathLike[str]
    every: int | None
    identity: list[Any]
    initial: Tensor
    snapshot: Snapshot | None


def check_place(path: str | os.PathLike[str] | None, every: int | None) -> None:
    """Raise a ValueError if no state can be kept there, or so often."""
    if every is not None and every < 1:
        raise ValueError(f"expected checkpoint_every >= 1, got {every}")
    if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
        raise ValueError(f"expected a checkpoint, a file in a folder that is there, got {path}")


def named(value: Any) -> str:
    """Return a text that tells a value from others, and is the same in another process."""
    with contextlib.suppress(NotImplementedError):  # distributions without named parameters
        text = repr(value)
        if " at 0x" not in text:
            return text
    return getattr(value, "__qualname__", type(value).__qualname__)


def opened(
    path: str | os.PathLike[str] | None, every: int | None, identity: Callable[[], list[Any]]
) -> Keeper | None:
    """Return where a run is kept, the generator being where the run began; None for nowhere.

    Raises:
        ValueError: If the file is of another run.
    """
    if path is None:
        return None
    initial, snapshot, own = torch.get_rng_state(), read(path), identity()
    if snapshot is not None:
        if snapshot.numbers["identity"] != own:
            raise ValueError(
                f"expected {path} to be of this run, got the state of one with other data, "
                "another network or other settings: delete it, or pass another file"
            )
        initial = snapshot.tensors["initial"]
        torch.set_rng_state(initial)
    return Keeper(path, every, own, initial, snapshot)


def warn_inexact() -> None:
    """Warn that batches of a stream cannot be gone on with from the very place."""
    warnings.warn(
        "the iterable and its sampler have no state_dict and load_state_dict, or workers that "
        "read ahead of it, or are several processes' own: a resumed run reads forward to where it "
        "was, and ends in the same weights to the bit only if the batches come again in the same "
        "order",
        stacklevel=3,
    )
