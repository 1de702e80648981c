r"""Iterables of batches, which may be larger than memory: checks, and a first pass."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..transforms.flow import Flow
from .batches import Rows, TableBatches
from .checkpoint import checksum, pack, unpack
from .data import (
    AnyDistribution,
    checked_batch,
    checked_context,
    checked_data,
    checked_weights,
    collected,
    given_rows,
    present,
)
from .distributed import Engine
from .preprocessing import warn_if_rounded

__all__ = [
    "Source",
    "Split",
    "Stream",
    "StreamBatches",
    "Survey",
    "agreed_rows",
    "first_rows",
    "is_stream",
    "joined",
    "loaded",
    "survey",
]


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


_ROUND = 64  # batches of a stream are cut to whole multiples of this


class StreamBatches:
    """Batches of equal size from a stream, whitened; rows that are held out are left out.

    With weights, a row comes as often as its weight, against the mean one, says: whole copies, and
    one more by chance.

    Args:
        stream: The stream.
        prepare: What whitens its rows.
        size: Rows per batch.
        held: Rows to leave out, in the flow's coordinates, shape ``(H, D)``, or None.
        weight: The mean weight of a row.
        alone: Whether no other process has batches of its own, whose places nobody keeps.

    Attributes:
        at_once: How many batches are best taken at once.
    """

    at_once = 1

    def __init__(
        self,
        stream: Stream,
        prepare: Callable[[Rows], Rows],
        size: int,
        held: Tensor | None,
        weight: float,
        *,
        alone: bool = True,
    ) -> None:
        self.alone = alone
        self.stream, self.prepare, self.weight = stream, prepare, weight
        self.size = size - size % _ROUND if size > _ROUND else size
        self.held = None if held is None else _keys(held)
        self.pool: Rows | None = None
        self.used = 0  # of its rows
        self.present: Iterator[Any] | None = None
        self.position, self.found, self.generator = 0, 0, torch.get_rng_state()

    def next(self) -> Rows:
        """Return the next batch.

        Raises:
            ValueError: If a batch cannot work, or a pass gives no rows.
        """
        pool, self.pool = self.pool, None
        while pool is None or len(pool.w) - self.used < self.size:
            rows = self._from_stream()
            pool = rows if pool is None else joined([pool.rest(self.used), rows])
            self.used = 0
        # In another order: a batch is cut in groups of a time each, and rows may come in an order.
        places = self.used + torch.randperm(self.size).to(pool.w.device)
        self.pool, self.used = pool, self.used + self.size
        return pool.take(places)

    def _from_stream(self) -> Rows:
        while True:
            if self.present is None:
                self.generator, self.position, self.found = torch.get_rng_state(), 0, 0
                self.present = iter(self.stream.iterable)
            try:
                batch = next(self.present)
            except StopIteration:
                self.present = None
                if not self.found:
                    raise ValueError(
                        "expected batches each time the iterable is gone through, got a pass "
                        "without rows to train on: pass an object whose __iter__ starts anew"
                    ) from None
                continue
            rows = self.stream.rows(batch, self.position)
            self.position += 1
            rows = self._chosen(rows)
            if len(rows.w):
                self.found += len(rows.w)
                return self.prepare(rows._replace(weight=None))

    def _chosen(self, rows: Rows) -> Rows:
        """Return the rows that are not held out, as often as their weights say."""
        if self.held is not None:
            new = ~torch.isin(_keys(rows.w), self.held)
            if not bool(new.all()):
                rows = rows.take(new.nonzero().flatten())
        if rows.weight is None:
            return rows
        copies = (rows.weight / self.weight + torch.rand(len(rows.w)).to(rows.weight)).floor()
        index = torch.arange(len(rows.w), device=rows.w.device)
        return rows.take(index.repeat_interleave(copies.long()))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors and numbers."""
        tensors = {"pass": self.generator}
        if self.pool is not None:
            rest = self.pool.rest(self.used)
            tensors["pool.w"] = rest.w
            if rest.context is not None:
                tensors["pool.c"] = rest.context
        owner = self.stream.state_owner()
        own = None if owner is None else pack(owner.state_dict(), tensors, "stream")
        began = self.present is not None
        return tensors, {
            "position": self.position,
            "found": self.found,
            "own": own,
            "began": began,
        }

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take a state back; without the stream's own, read forward to where it was."""
        if not self.alone:
            return
        self.generator = tensors["pass"]
        self.position, self.found = numbers["position"], numbers["found"]
        if "pool.w" in tensors:
            like = self.stream.flow.loc
            context = tensors.get("pool.c")
            context = None if context is None else context.to(like)
            self.pool = Rows(tensors["pool.w"].to(like), context)
        owner = self.stream.state_owner()
        if owner is not None and numbers["own"] is not None:
            owner.load_state_dict(unpack(numbers["own"], tensors))
        if not numbers["began"]:
            return
        torch.set_rng_state(self.generator)
        self.present = iter(self.stream.iterable)
        if owner is None:
            for _ in range(self.position):
                next(self.present, None)


def _keys(rows: Tensor) -> Tensor:
    """Return one integer per row, shape ``(N,)``, equal for equal rows."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(2**62, (rows.shape[-1],), generator=generator) * 2 + 1
    return (rows.double().view(torch.int64) * odd.to(rows.device)).sum(-1)


Prepare = Callable[[Rows], Rows]

_LEAST = 64  # rows per step, of loaders that give fewer at once


class Split(NamedTuple):
    """What a run trains on, in the flow's coordinates.

    Attributes:
        held: The rows held out.
        kept: The others, or, of a stream, some of them.
        total: The number of the others; infinite where nobody counted a stream.
        size: Rows per batch and coupling.
        batches: What gives whitened batches, given what whitens.
    """

    held: Rows
    kept: Rows
    total: float
    size: int
    batches: Callable[[Prepare], Any]


class Source(NamedTuple):
    """Checked data.

    Attributes:
        checksum: Of a table; None of a stream.
        exact: Whether a resumed run can go on from the very row.
        split: Splits them, drawing from the generator; told whether the moments matter.
    """

    checksum: int | None
    exact: bool
    split: Callable[[bool], Split]


def loaded(
    distribution: AnyDistribution,
    flow: Flow,
    data: Any,
    given: Mapping[str, Any],
    validation: Any,
    batch_size: int | None,
    engine: Engine,
) -> Source:
    """Check data and what was given beside them; see :func:`~pyro_interpolant.fit`.

    Raises:
        TypeError: If something is of a wrong type.
        ValueError: If something cannot work.
    """
    load = _from_stream if is_stream(data) else _from_table
    return load(distribution, flow, data, given, validation, batch_size, engine)


def _from_table(
    distribution: AnyDistribution,
    flow: Flow,
    data: Any,
    given: Mapping[str, Any],
    validation: Any,
    batch_size: int | None,
    engine: Engine,
) -> Source:
    raw, count = collected(distribution, flow, data, validation=validation, **given)
    size = engine.world * checked_batch(batch_size, (len(raw.w) - count) // engine.world)

    def split(_: bool) -> Split:  # noqa: FBT001
        held, kept = raw.split(count, shuffle=isinstance(validation, float))
        return Split(
            held, kept, kept.effective(), size, lambda prepare: TableBatches(prepare(kept), size)
        )

    return Source(checksum(raw), True, split)  # noqa: FBT003


def _from_stream(
    distribution: AnyDistribution,
    flow: Flow,
    data: Any,
    given: Mapping[str, Any],
    validation: Any,
    batch_size: int | None,
    engine: Engine,
) -> Source:
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"expected {name} for a table of rows, got {name} beside an iterable: let it give "
                "batches (rows, contexts) for a conditional flow, and weights as their last part"
            )
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"expected batch_size >= 1, got {batch_size}")
    stream = Stream(distribution, flow, data)
    share = validation if isinstance(validation, float) else None
    own = None if share is not None else given_rows(distribution, flow, validation)

    def split(whole: bool) -> Split:  # noqa: FBT001
        found = survey(stream, share, whole=whole)
        held = agreed_rows(own if found.held is None else found.held, engine)  # type: ignore[arg-type]
        first = max(_LEAST, int(engine.agreed(found.size)))
        size = first if batch_size is None else batch_size
        out = None if share is None else held.w
        return Split(
            held.to(flow.loc.device), found.sample, found.total * engine.world, size,
            lambda prepare: StreamBatches(
                stream, prepare, size, out, found.weight, alone=engine.world == 1
            ),
        )  # fmt: skip

    return Source(None, stream.state_owner() is not None and engine.world == 1, split)
