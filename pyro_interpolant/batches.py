r"""Batches of whitened rows without end, from a table or from a stream, and where they are."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .data import Batches
from .objective import Rows
from .snapshots import pack, unpack
from .streams import Stream, joined

__all__ = ["StreamBatches", "TableBatches"]

_ROUND = 64  # batches of a stream are cut to whole multiples of this
_BATCHES = 8  # of a table, taken at once
_VALUES = 2**20  # of rows and contexts in them at most


class TableBatches:
    """Batches of whitened rows, each row once before any comes again; with weights, drawn by them.

    Args:
        rows: All training rows, whitened.
        size: Rows per batch.

    Attributes:
        at_once: How many batches are best taken at once.
    """

    def __init__(self, rows: Rows, size: int) -> None:
        self.rows = rows
        values = size * sum(part.shape[-1] for part in rows[:2] if part is not None)
        self.at_once = max(1, min(_BATCHES, _VALUES // values))
        self.indices = Batches(len(rows.w), size, rows.w.device, rows.weight)

    def next(self) -> Rows:
        """Return the next batch."""
        return self.rows.take(self.indices.next())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors and numbers."""
        return {"order": self.indices.order}, {"position": self.indices.position}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take a state back."""
        self.indices.order = tensors["order"].to(self.indices.order)
        self.indices.position = numbers["position"]


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
