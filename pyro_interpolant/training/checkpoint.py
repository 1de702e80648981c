r"""Files a long run resumes from: tensors and numbers, complete or not there at all."""

import contextlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "Keeper",
    "Snapshot",
    "check_place",
    "checksum",
    "named",
    "opened",
    "pack",
    "read",
    "unpack",
    "warn_inexact",
    "write",
]


_KEY = "pyro_interpolant_snapshot"


class Snapshot(NamedTuple):
    """The state of a run.

    Attributes:
        tensors: By name, of any shapes.
        numbers: What JSON holds.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


def checksum(tensors: Iterable[Tensor | None], text: str = "") -> int:
    """Return a checksum of a text and the bytes of tensors of any shapes."""
    value = zlib.crc32(text.encode())
    for tensor in tensors:
        if tensor is not None:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            value = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), value)
    return value


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], numbers: dict[str, Any]
) -> None:
    """Write a snapshot; the one before it stays beside it, with ``.previous`` at its name.

    Raises:
        OSError: If the file cannot be written; what was there is then untouched.
    """
    path = Path(path)
    kept = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
    text = json.dumps({**numbers, "names": list(kept)}, default=_plain)
    text = json.dumps({"checksum": checksum(kept.values(), text), "numbers": text})
    scratch = path.with_name(f".{path.name}.partial")  # one name: killed runs leave no heap
    try:
        save_file(kept, scratch, metadata={_KEY: text})
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        if path.exists():
            os.replace(path, _previous(path))
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def read(path: str | os.PathLike[str]) -> Snapshot | None:
    """Return the last complete snapshot, or None where there is none.

    A damaged file is passed over with a warning, and the one before it is used; the former then
    goes by ``.damaged`` at its name, so that it never takes the place of the latter.

    Raises:
        ValueError: If files are there and all are damaged.
    """
    path, damage = Path(path), []
    for candidate in (path, _previous(path)):
        if candidate.exists():
            try:
                found = _read(candidate)
            except (SafetensorError, ValueError, KeyError, TypeError) as error:
                damage.append(f"{candidate} ({error})")
                warnings.warn(f"the snapshot {candidate} is damaged: passed over", stacklevel=3)
                continue
            if damage:
                with contextlib.suppress(FileNotFoundError):  # another process was first
                    os.replace(path, path.with_name(f"{path.name}.damaged"))
            return found
    if damage:
        raise ValueError(
            f"expected a snapshot to resume from, got damaged files: {'; '.join(damage)}. Delete "
            "them to start anew"
        )
    return None


def _read(path: Path) -> Snapshot:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[_KEY])
        numbers = json.loads(header["numbers"])
        # In the order of writing: the checksum runs over it.
        tensors = {name: file.get_tensor(name) for name in numbers["names"]}
    if checksum(tensors.values(), header["numbers"]) != header["checksum"]:
        raise ValueError("its checksum is wrong")
    return Snapshot(tensors, numbers)


def _plain(value: Any) -> Any:
    """Return a number of numpy's or torch's as one of Python's."""
    if getattr(value, "ndim", None) == 0:
        return value.item()
    raise TypeError(f"expected numbers and text, got a {type(value).__name__}")


def _previous(path: Path) -> Path:
    return path.with_name(f"{path.name}.previous")


def pack(value: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """Return nested data as JSON holds it, the tensors in it put under their place's name.

    Raises:
        TypeError: If there is anything but numbers, text, tensors, lists and dictionaries.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if getattr(value, "ndim", None) == 0:
        return _plain(value)
    if isinstance(value, Mapping):
        parts = [[k, pack(v, tensors, f"{name}.{i}")] for i, (k, v) in enumerate(value.items())]
        return {"dict": parts}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [pack(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"expected a state of numbers, text, tensors, lists and dictionaries, got a "
        f"{type(value).__name__} in it"
    )


def unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the nested data that :func:`pack` packed."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {k: unpack(v, tensors) for k, v in inner}
    parts = [unpack(v, tensors) for v in inner]
    return tuple(parts) if kind == "tuple" else parts


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
