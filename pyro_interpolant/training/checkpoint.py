r"""Checkpoints: the state of a run in a file, complete or not there at all, to resume from."""

import contextlib
import json
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._files import StrPath, checksum, contents_of, plain_number, refuse_no_place, write
from .._package import check_ranges, whole
from .._torch import rng_state, set_rng_state, warn_user
from ..distributions.part_description import Json
from ..transforms.flow import Flow

_KEY = "pyro_interpolant_snapshot"
# How the header of a state begins, spaces taken out.
_START = f'{{"__metadata__":{{"{_KEY}"'.encode()


class Checkpoint:
    """A file that holds the state of one run, and the state before it under ``.previous``.

    A damaged file is passed over with a warning, and the one before it is used; the former then
    goes by ``.damaged`` at its name, so that it never takes the place of the latter.

    Args:
        path: The file.
        every: After how many steps it is written, or None: with each look at the held-out loss.
        identity: What tells this run from another, as JSON holds it.
        device: On which the run draws beside the CPU.

    Attributes:
        initial: The state of the generators before anything was drawn, shape ``(S,)``.
        tensors: What was kept, to resume from, by name and of any shapes; none of a new run.
        numbers: The rest of it, what JSON holds.

    Raises:
        ValueError: If files are there and all are damaged, or one is no state of a run.
    """

    def __init__(
        self, path: StrPath, every: int | None, identity: list[Any], device: torch.device
    ) -> None:
        # Behind a link: the states before it are kept beside the file itself.
        self.path, self.every = Path(os.path.realpath(path)), every
        self.identity, self.initial = identity, rng_state(device)
        self.tensors: dict[str, Tensor] = {}
        self.numbers: dict[str, Any] = {}
        self._read()

    @property
    def previous(self) -> Path:
        """The file of the state before."""
        return self.path.with_name(f"{self.path.name}.previous")

    @property
    def step(self) -> int | None:
        """The step to go on from, or None of a new run."""
        return self.numbers["run"]["step"] if self.tensors else None

    def write(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Write a state; the one before it stays beside it.

        Args:
            tensors: Tensors by name, of any shapes.
            numbers: Numbers and text by name.

        Raises:
            OSError: If the file cannot be written; what was there is then untouched.
        """
        tensors = {**tensors, "initial": self.initial}
        kept = {k: v.detach().cpu().clone().contiguous() for k, v in tensors.items()}
        numbers = {**numbers, "identity": self.identity, "names": list(kept)}
        text = json.dumps(numbers, default=plain_number)
        text = json.dumps({"checksum": checksum(kept.values(), text), "numbers": text})
        write(self.path, kept, {_KEY: text}, previous=self.previous)

    def _read(self) -> None:
        damage = []
        for candidate in (self.path, self.previous):
            try:
                raw = candidate.read_bytes()
            except FileNotFoundError:
                continue
            try:
                self.tensors, self.numbers = _read_state(candidate, raw)
            except (ValueError, KeyError, TypeError) as error:
                if not _began_as_state(raw):  # nobody should delete it, nor is it renamed
                    raise ValueError(
                        f"expected a state of a run at {candidate}, got another file: pass "
                        "another path"
                    ) from error
                damage.append(f"{candidate} ({error})")
                warn_user(f"the snapshot {candidate} is damaged: passed over")
                continue
            if damage:
                with contextlib.suppress(FileNotFoundError):  # another process was first
                    os.replace(self.path, self.path.with_name(f"{self.path.name}.damaged"))
            return
        if damage:
            raise ValueError(
                f"expected a snapshot to resume from, got damaged files: {'; '.join(damage)}. "
                "Delete them to start anew"
            )


def open_checkpoint(
    path: StrPath | None,
    every: int | None,
    identity: list[Any],
    like: Tensor,
    *,
    exact: bool,
) -> Checkpoint | None:
    """Return the checkpoint of a run, generators being where the run began; None for no path.

    Args:
        path: The file.
        every: After how many steps it is written.
        identity: What tells this run from another, as JSON holds it.
        like: A tensor on the device, and in the type, of the flow; of any shape.
        exact: Whether the run can go on from the very row.

    Raises:
        ValueError: If the file is of another run or of another kind, or all files are damaged.

    Warns:
        UserWarning: If a stream's batches cannot be gone on with from the very place.
    """
    if path is None:
        return None
    checkpoint = Checkpoint(path, every, identity, like.device)
    if checkpoint.tensors:
        found = checkpoint.numbers["identity"]
        is_earlier = len(found) < len(identity)  # of a version without fingerprints
        by_name = is_earlier and _is_same_by_name(found, identity)
        if not by_name and found[:-1] != identity[:-1]:
            raise ValueError(
                f"expected {path} to be of this run, got the state of one with other data, "
                f"another network or other settings: delete it and {checkpoint.previous}, or "
                "pass another file"
            )
        if is_earlier:
            warn_user(
                f"{path} was written by an earlier version: numbers of a base, base samples and "
                "rows held out are not compared with those that it began with"
            )
        own = checkpoint.tensors.get("weight.0", like).dtype
        if own != like.dtype:
            raise ValueError(
                f"expected {path} to be of this run, in {like.dtype}, got the state of one in "
                f"{own}: call distribution.to({own}) first, or pass another file"
            )
        checkpoint.initial = checkpoint.tensors["initial"]
        set_rng_state(checkpoint.initial, like.device)
    if not exact:
        warn_user(
            "the iterable and its sampler have no state_dict and load_state_dict, or workers that "
            "read ahead of it, or are several processes' own: a resumed run reads forward to "
            "where it was, and ends in the same weights to the bit only if the batches come again "
            "in the same order"
        )
    return checkpoint


def buffers_of(flow: Flow) -> dict[str, Tensor]:
    """Return what a flow keeps beside its weights, of any shapes: the whitening above all."""
    return {f"buffer.{name}": value for name, value in flow.named_buffers()}


def restore_buffers(flow: Flow, state: Checkpoint | None) -> None:
    """Take back what a flow kept beside its weights, which belong to it, where a run goes on.

    Raises:
        ValueError: If that is of other shapes.
    """
    kept = {} if state is None else state.tensors
    for name, value in buffers_of(flow).items():
        if name not in kept:  # states of version 0.1.0 have none, and are those of tables
            continue
        if kept[name].shape != value.shape:
            raise ValueError(
                f"expected the state of a run of this flow, got one whose {name} has shape "
                f"{tuple(kept[name].shape)} in place of {tuple(value.shape)}, as of another "
                "whitening: pass another file"
            )
        value.copy_(kept[name])


def check_place(path: StrPath | None, every: int | None) -> None:
    """Raise a ValueError if no state can be kept there, or so often."""
    check_ranges(whole("checkpoint_every", every, 1, or_none=True))
    if path is not None:
        refuse_no_place(path)


def to_json(value: object, tensors: dict[str, Tensor], name: str) -> Json:
    """Return nested data as JSON holds it, the tensors in it put under their place's name.

    Raises:
        TypeError: If there is anything but numbers, text, tensors, lists and dictionaries.
    """
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if getattr(value, "ndim", None) == 0:
        return plain_number(value)
    if isinstance(value, Mapping):
        parts: list[Json] = [
            [to_json(k, tensors, f"{name}.{i}.key"), to_json(v, tensors, f"{name}.{i}")]
            for i, (k, v) in enumerate(value.items())
        ]
        return {"dict": parts}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [to_json(v, tensors, f"{name}.{i}") for i, v in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"expected a state of numbers, text, tensors, lists and dictionaries, got a "
        f"{type(value).__name__} in it"
    )


def from_json(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the nested data that :func:`to_json` wrote."""
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "dict":
        return {from_json(k, tensors): from_json(v, tensors) for k, v in inner}
    parts = [from_json(v, tensors) for v in inner]
    return tuple(parts) if kind == "tuple" else parts


def _read_state(path: Path, raw: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the numbers of a state, of a file's bytes.

    Raises:
        ValueError: If it is damaged, or of another kind; a KeyError or TypeError tells the same.
    """
    texts, found = contents_of(raw, path, framework="pt")
    header = json.loads(texts[_KEY])
    numbers = json.loads(header["numbers"])
    tensors = {name: found[name] for name in numbers["names"]}  # as the checksum runs over them
    if checksum(tensors.values(), header["numbers"]) != header["checksum"]:
        raise ValueError("its checksum is wrong")
    return tensors, numbers


def _began_as_state(raw: bytes) -> bool:
    """Return whether bytes that are no state may have been one.

    They begin as one does, but for a flipped bit or two, or end before it shows, or are blank.
    """
    start = raw[8:80].replace(b" ", b"")[: len(_START)]
    return not any(start) or sum(map(operator.ne, start, _START)) <= 2


def _is_same_by_name(found: list[Any], identity: list[Any]) -> bool:
    """Return whether a state of an earlier version is of a run, by data, settings and names."""
    *given, _, names_and_shapes = identity
    return [*found[:-1], found[-1][:2]] == [*given, names_and_shapes]
