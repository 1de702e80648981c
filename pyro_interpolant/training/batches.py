r"""What a training step minimises: the regression loss on draws of pairs, times and noise."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Batches", "Rows", "TableBatches", "drawn", "some"]


class Rows(NamedTuple):
    """Whitened rows, shape ``(N, D)``, with what belongs to each.

    Attributes:
        w: The rows.
        context: Their contexts, shape ``(N, C)``, or None.
        partner: Their partners at the base, whitened, shape ``(N, D)``, or None.
        weight: Their weights, shape ``(N,)``, or None.
    """

    w: Tensor
    context: Tensor | None
    partner: Tensor | None = None
    weight: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> "Rows":
        """Return the rows with a function applied to each part that is there."""
        return Rows(*(None if part is None else function(part) for part in self))  # type: ignore[arg-type]

    def take(self, index: Tensor) -> "Rows":
        """Return the rows of an index, shape ``(B,)``."""
        return self.each(lambda part: part.index_select(0, index))

    def rest(self, used: int) -> "Rows":
        """Return all rows but the first."""
        return self.each(lambda part: part[used:])

    def to(self, device: torch.device) -> "Rows":
        """Return the rows on a device."""
        return self.each(lambda part: part.to(device))

    def split(self, count: int, *, shuffle: bool) -> tuple["Rows", "Rows"]:
        """Return ``count`` rows, the last or any, and the others."""
        total = len(self.w)
        order = torch.randperm(total) if shuffle else torch.arange(total).roll(count)
        order = order.to(self.w.device)
        return self.take(order[:count]), self.take(order[count:])

    def repeated(self, count: int) -> "Rows":
        """Return ``count`` rows or a little less: whole copies of all, or drawn by weight.

        Where there are more, they are evenly spaced: rows may come in an order.
        """
        total, device = len(self.w), self.w.device
        if self.weight is not None:
            return self.take(drawn(self.weight, count))
        if total > count:
            return self.take(torch.arange(count, device=device) * total // count)
        return self.take(torch.arange(total, device=device).repeat(count // total))

    def effective(self) -> float:
        """Return the number of rows that weigh as much."""
        if self.weight is None:
            return len(self.w)
        share = self.weight.double() / self.weight.max().double()
        return float(share.sum() ** 2 / share.square().sum())


def some(count: int, most: int, weights: Tensor | None = None) -> Tensor:
    """Return which of so many rows to look at, the same at each call; all where they are few.

    Args:
        count: The number of rows.
        most: How many to look at.
        weights: Non-negative weights, shape ``(N,)``: rows are then drawn with replacement in
            their proportion.
    """
    generator = torch.Generator().manual_seed(0)
    if weights is not None:
        return drawn(weights.cpu(), min(most, 100 * count), generator)
    if count <= most:
        return torch.arange(count)
    return torch.randint(count, (most,), generator=generator)


def drawn(weights: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return rows drawn with replacement in proportion to their weights, shape ``(count,)``.

    Of any number of rows: :func:`torch.multinomial` ends at 16 million.
    """
    return _at(weights.double().cumsum(0), count, generator)


def _at(ends: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return the same, given the running sums of the weights, float64, shape ``(N,)``."""
    u = torch.rand(count, dtype=ends.dtype, device=ends.device, generator=generator)
    return torch.searchsorted(ends, u * ends[-1], right=True).clamp_(max=len(ends) - 1)


class Batches:
    """Index batches of equal size forever, in a new order each time all rows were seen.

    With weights, each batch is drawn with replacement in their proportion.

    Args:
        count: The number of rows.
        size: The number of rows per batch, at most ``count``.
        device: Where the indices live.
        weights: Non-negative weights, shape ``(count,)``, or None.

    Attributes:
        order: The present order of the rows, shape ``(count,)``.
        position: Where in it the next batch starts.
    """

    def __init__(
        self, count: int, size: int, device: torch.device, weights: Tensor | None = None
    ) -> None:
        self.count, self.size, self.device = count, size, device
        self.ends = None if weights is None else weights.double().cumsum(0)
        self.order = torch.zeros(0, dtype=torch.long, device=device)
        self.position = 0

    def next(self) -> Tensor:
        """Return the next batch, shape ``(size,)``."""
        if self.ends is not None:
            return _at(self.ends, self.size)
        if self.position + self.size > len(self.order):
            self.order, self.position = torch.randperm(self.count, device=self.device), 0
        self.position += self.size
        return self.order[self.position - self.size : self.position]


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
