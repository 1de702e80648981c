r"""Iterables of batches, which may be larger than memory: checks, and a first pass."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .engine import Engine
from .flow import Flow
from .objective import Rows
from .preparation import (
    AnyDistribution,
    checked_context,
    checked_data,
    checked_weights,
    present,
)
from .rounding import warn_if_rounded

__all__ = ["Stream", "Survey", "agreed_rows", "first_rows", "is_stream", "joined", "survey"]

_SAMPLE = 2**23  # values kept of a stream for the whitening: 64 MiB in float64
_HELD = 8192  # rows held out of a stream at most


def is_stream(data: Any) -> bool:
    """Tell an iterable of batches from a table: a tensor, an array, nested lists, named draws."""
    if isinstance(data, (Tensor, Mapping, str)) or hasattr(data, "__array__"):
        return False
    if isinstance(data, (list, tuple)):
        inner = next(iter(data), None)
        parts = inner if isinstance(inner, (list, tuple)) else [inner]
        return any(getattr(part, "ndim", 0) > 0 for part in parts)
    return hasattr(data, "__iter__") or hasattr(data, "__getitem__")


class Stream:
    """Batches of an iterable, checked, in the flow's coordinates.

    Args:
        distribution: The flow's distribution.
        flow: The flow.
        iterable: What gives the batches, again each time it is gone through: rows, shape
            ``(B, *event_shape)``; for a conditional flow ``(rows, contexts)``; with a last part of
            shape ``(B,)`` as weights.

    Raises:
        ValueError: If it can be gone through only once.
    """

    def __init__(self, distribution: AnyDistribution, flow: Flow, iterable: Any) -> None:
        _check_again(iterable)
        self.distribution, self.flow, self.iterable = distribution, flow, iterable
        self.parts = 1 + hasattr(distribution, "condition")

    def rows(self, batch: Any, number: int) -> Rows:
        """Return a batch's rows.

        Raises:
            TypeError: If it is of a wrong type.
            ValueError: If it cannot work; the message names the batch.
        """
        try:
            return self._rows(batch)
        except (TypeError, ValueError) as error:
            raise type(error)(f"in batch {number}, counted from 0: {error}") from error

    def _rows(self, batch: Any) -> Rows:
        parts = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
        if len(parts) not in (self.parts, self.parts + 1):
            wanted = "(rows, contexts)" if self.parts == 2 else "rows"
            raise ValueError(
                f"expected {wanted}, and weights or not, got {len(parts)} parts of types "
                f"{', '.join(type(p).__name__ for p in parts)}"
            )
        weights = parts[self.parts] if len(parts) > self.parts else None
        contexts = parts[1] if self.parts == 2 else None
        data, contexts, weights = present(weights, parts[0], contexts, part=True)
        if weights is not None and len(weights) == 0:
            none = self.flow.loc.new_zeros(0, self.flow.dim)
            context = getattr(self.flow.velocity, "context_dim", 0) if self.parts == 2 else None
            return Rows(
                none, None if context is None else none.new_zeros(0, context), None, none[:, 0]
            )
        w = checked_data(self.distribution, self.flow, data)
        context = checked_context(self.distribution, self.flow, contexts, len(w))
        return Rows(w, context, None, checked_weights(weights, len(w))).to(self.flow.loc.device)

    def state_owner(self) -> Any:
        """Return the loader, or the sampler of it, that can tell and take its state, or None.

        A sampler whose loader has workers is ahead of the batches that have come.
        """
        names = () if getattr(self.iterable, "num_workers", 0) else ("sampler", "batch_sampler")
        samplers = (getattr(self.iterable, name, None) for name in names)
        for owner in (self.iterable, *samplers):
            if hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict"):
                return owner
        return None


def _check_again(iterable: Any) -> None:
    if hasattr(iterable, "__next__"):
        raise ValueError(
            "expected an iterable that gives its batches again each time it is gone through, "
            f"got a {type(iterable).__name__}, which is used up after once: pass a list, a "
            "DataLoader, or an object whose __iter__ starts anew"
        )


def first_rows(iterable: Any) -> Any:
    """Return the rows of the first batch, as they come, shape ``(B, *event_shape)``.

    Raises:
        ValueError: If there is none, or the iterable can be gone through only once.
    """
    _check_again(iterable)
    batch = next(iter(iterable), None)
    if batch is None:
        raise ValueError("expected batches of rows, got an iterable without any")
    return batch[0] if isinstance(batch, (list, tuple)) else batch


class Survey(NamedTuple):
    """What a first pass over a stream found.

    Attributes:
        sample: Rows from all over it, at most 8 million values.
        held: Rows to hold out, from its first batches; None where the user gave some.
        total: The number of rows that are not held out, of rows that weigh as much; infinite
            where the pass ended early.
        size: The number of rows of the first batch.
        weight: The mean weight of a row.
    """

    sample: Rows
    held: Rows | None
    total: float
    size: int
    weight: float


def survey(stream: Stream, share: float | None, *, whole: bool) -> Survey:
    """Go through a stream once, or as far as needed.

    Args:
        stream: The stream.
        share: The share of rows to hold out, or None.
        whole: Whether moments are wanted, and so all of it.

    Raises:
        ValueError: If it has no batches, or too few rows.
    """
    kept: list[Rows] = []
    first: list[Rows] = []
    total, values, weight, squares, stride, size = 0, 0, 0.0, 0.0, 1, 0
    for number, batch in enumerate(stream.iterable):
        rows = stream.rows(batch, number)
        size = size or len(rows.w)
        if share is not None and total < _HELD:
            first.append(rows)
        total += len(rows.w)
        weights = None if rows.weight is None else rows.weight.double()
        weight += len(rows.w) if weights is None else float(weights.sum())
        squares += len(rows.w) if weights is None else float(weights.square().sum())
        if number % stride == 0:
            kept.append(rows)
            values += rows.w.numel()
        if values > _SAMPLE and len(kept) > 1:  # every second of what was kept is enough
            kept, stride = kept[::2], 2 * stride
            values = sum(part.w.numel() for part in kept)
        if not whole and (share is None or total * share >= _HELD):
            break
    if total < 2:
        raise ValueError(f"expected batches of rows, got an iterable with {total} rows in all")
    sample = joined(kept)
    warn_if_rounded(sample.w)
    effective = weight**2 / squares if whole else math.inf
    if share is None:
        return Survey(sample, None, effective, size, weight / total)
    count = min(_HELD, max(1, round(share * total)))
    held = joined(first).take(torch.arange(count, device=sample.w.device))
    if stride == 1:
        sample = sample.take(torch.arange(count, len(sample.w), device=sample.w.device))
    return Survey(sample, held, effective * (1 - count / total), size, weight / total)


def joined(parts: list[Rows]) -> Rows:
    """Return all rows of several batches."""
    return Rows(*(None if s[0] is None else torch.cat(s) for s in zip(*parts, strict=True)))  # type: ignore[arg-type]


def agreed_rows(rows: Rows, engine: Engine) -> Rows:
    """Return the first process's rows, to every process."""
    return rows.each(engine.agreed)
