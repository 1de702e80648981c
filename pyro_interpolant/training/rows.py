r"""Rows of data in memory: what belongs to each, and samples of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
        others = (None if part is None else function(part) for part in self[1:])
        return Rows(function(self.w), *others)

    def take(self, index: Tensor) -> "Rows":
        """Return the rows of an index, shape ``(B,)``."""
        return self.each(lambda part: part.index_select(0, index))

    def rest(self, used: int) -> "Rows":
        """Return all rows but the first."""
        return self.each(lambda part: part[used:])

    def to(self, device: torch.device) -> "Rows":
        """Return the rows on a device."""
        return self.each(lambda part: part.to(device))

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """Return all rows of several batches."""

        def joined(name: str) -> Tensor | None:
            found = [getattr(part, name) for part in parts]
            return None if found[0] is None else torch.cat(found)

        rows = torch.cat([part.w for part in parts])
        return cls(rows, joined("context"), joined("partner"), joined("weight"))

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
            return self.take(weighted_indices(self.weight, count))
        if total > count:
            return self.take(torch.arange(count, device=device) * total // count)
        return self.take(torch.arange(total, device=device).repeat(count // total))

    def effective(self) -> float:
        """Return the number of rows that weigh as much."""
        if self.weight is None:
            return len(self.w)
        share = self.weight.double() / self.weight.max().double()
        return float(share.sum() ** 2 / share.square().sum())


def subsample(count: int, most: int, weights: Tensor | None = None) -> Tensor:
    """Return the indices of a subsample of rows, the same at each call; all where they are few.

    Args:
        count: The number of rows.
        most: The size of the subsample.
        weights: Non-negative weights, shape ``(N,)``: rows are then drawn with replacement in
            their proportion.
    """
    generator = torch.Generator().manual_seed(0)
    if weights is not None:
        return weighted_indices(weights.cpu(), min(most, 100 * count), generator)
    if count <= most:
        return torch.arange(count)
    return torch.randint(count, (most,), generator=generator)


def weighted_indices(
    weights: Tensor, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """Return indices drawn with replacement in proportion to weights, shape ``(count,)``.

    Of any number of rows: :func:`torch.multinomial` ends at 16 million.
    """
    return search_weights(weights.double().cumsum(0), count, generator)


def search_weights(ends: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
    """Return indices drawn by weight, given its running sums, float64, shape ``(N,)``."""
    u = torch.rand(count, dtype=ends.dtype, device=ends.device, generator=generator)
    return torch.searchsorted(ends, u * ends[-1], right=True).clamp_(max=len(ends) - 1)
