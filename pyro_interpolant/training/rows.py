r"""Rows of data in memory: what belongs to each, their weights, and samples of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from ..distributions.rows import (
    as_tensor,
    checked_rows,
    evenly_spaced,
    is_masked,
    names_of,
    weighted_indices,
)

LEVELS = 256  # of whole numbers in ``uint8``, as images have them
_VALUES_AT_ONCE = 2**22  # of rows, whose keys are taken


class Rows(NamedTuple):
    """Rows with what belongs to each, in the flow's coordinates or whitened.

    Attributes:
        w: The rows, shape ``(N, D)``.
        context: Their contexts, shape ``(N, C)``, or None.
        partner: Their partners at the base, whitened if rows are, shape ``(N, D)``, or None.
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
        """Return the rows behind the first ``used``."""
        return self.each(lambda part: part[used:])

    def to(self, device: torch.device) -> "Rows":
        """Return the rows on a device."""
        return self.each(lambda part: part.to(device))

    @classmethod
    def joined(cls, parts: Sequence["Rows"]) -> "Rows":
        """Return all rows of several batches.

        Raises:
            ValueError: If some alone are whole levels, which others would turn into plain numbers.
        """

        def joined(name: str) -> Tensor | None:
            found = [getattr(part, name) for part in parts]
            return None if found[0] is None else torch.cat(found)

        if len({part.w.is_floating_point() for part in parts}) > 1:
            raise ValueError(
                "expected images of whole levels, uint8, in all batches or in none, got some "
                "beside others: spread all over their levels, or none"
            )
        rows = torch.cat([part.w for part in parts])
        return cls(rows, joined("context"), joined("partner"), joined("weight"))

    def and_given(self, others: "Rows") -> "Rows":
        """Return these rows and others behind them, of their mean weight where they have none."""
        if self.weight is not None and others.weight is None:
            mean = self.weight.double().mean()  # their sum may have no number of their type
            others = others._replace(weight=mean.to(self.weight).expand(len(others.w)))
        return Rows.joined((self, others))

    def repeated(self, count: int) -> "Rows":
        """Return ``count`` rows or a little less: whole copies of all, or drawn by weight.

        Where there are more, they are evenly spaced: rows may come in an order.
        """
        total, device = len(self.w), self.w.device
        if self.weight is not None:
            return self.take(weighted_indices(self.weight, count))
        if total > count:
            return self.evenly(count)
        return self.take(torch.arange(total, device=device).repeat(count // total))

    def evenly(self, most: int) -> "Rows":
        """Return evenly spaced rows, at most so many: no generator is drawn from."""
        return self.take(evenly_spaced(len(self.w), most).to(self.w.device))

    def dequantized(self, like: Tensor | None = None) -> "Rows":
        """Return rows of whole levels spread over their cells; others as they are.

        Args:
            like: A tensor of the type and on the device that are wanted; by default, the rows
                stay where they are, in torch's default type.
        """
        if self.w.is_floating_point():
            return self
        w = self.w.to(torch.empty(0, device=self.w.device) if like is None else like)
        return self._replace(w=(w + torch.rand_like(w)) / LEVELS)

    def effective(self) -> float:
        """Return the number of rows that weigh as much."""
        if self.weight is None:
            return len(self.w)
        share = self.weight.double() / self.weight.max().double()
        return float(share.sum() ** 2 / share.square().sum())


def drop_zero_weights(weights: Any, *parts: Any, part: bool = False) -> tuple[Any, ...]:
    """Return parts, each of N rows or None, and weights, without the rows that have no weight.

    Such rows may hold anything: a mask's are never looked at.

    Args:
        weights: Weights, shape ``(N,)``, of any type, or None.
        *parts: Tensors, arrays or data frames of N rows, or dictionaries of them.
        part: Whether they are a part of all rows, which may have no weight at all.

    Raises:
        ValueError: If weights are of another number, negative, not finite or all zero, or have no
            finite sum.
    """
    if weights is None:
        return *parts, None
    weights = _checked_weights(weights, part=part)
    keep = weights > 0
    keeps_all = bool(keep.all())

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: kept(inner) for name, inner in value.items()}
        # Frames and masked arrays as they are: whole numbers with gaps are floats as a tensor.
        may_miss = hasattr(value, "iloc") or is_masked(value) or names_of(value)
        value = value if may_miss else as_tensor(value, "rows")
        if tuple(value.shape[:1]) != (len(keep),):
            raise ValueError(
                f"expected as many non-negative weights as rows, got {len(keep)} beside a tensor "
                f"of shape {tuple(value.shape)}"
            )
        if keeps_all:
            return value
        if may_miss:
            index = keep.nonzero().flatten().cpu().numpy()
            if hasattr(value, "column_names"):  # a table of pyarrow
                return value.take(index)
            return getattr(value, "iloc", value)[index]
        return value[keep.to(value.device)]

    return *(None if value is None else kept(value) for value in parts), weights[keep]


def _checked_weights(weights: ArrayLike, *, part: bool) -> Tensor:
    """Return weights of rows, shape ``(N,)``, of a floating type, if they are some."""
    weights = as_tensor(weights, "weights")
    weights = weights if weights.is_floating_point() else weights.double()  # counts, a mask
    weights = checked_rows(weights, "weights", ())
    if float(weights.min()) < 0 or not (part or float(weights.sum()) > 0):
        raise ValueError(
            f"expected non-negative weights, not all zero, got {len(weights)} with a minimum of "
            f"{float(weights.min()):.3g}"
        )
    if not bool(weights.double().sum().isfinite()):
        raise ValueError(
            f"expected weights with a finite sum, got some up to {float(weights.max()):.3g}: "
            "divide them by the largest, of logarithms (log_weights - log_weights.max()).exp()"
        )
    return weights


def keys_of(rows: Rows) -> Tensor:
    """Return one integer per row and context, shape ``(N,)``."""
    size = max(1, _VALUES_AT_ONCE // rows.w.shape[-1])  # images of whole levels are small
    parts = [part.split(size) for part in rows[:2] if part is not None]
    return torch.cat(
        [row_keys(torch.cat([s.double() for s in few], -1)) for few in zip(*parts, strict=True)]
    )


def row_keys(rows: Tensor) -> Tensor:
    """Return one integer per row, shape ``(N,)``, equal for equal rows, else as if at random."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(2**62, (rows.shape[-1] + 1,), generator=generator) * 2 + 1
    odd = odd.to(rows.device)
    keys = (_folded(rows.double().view(torch.int64)) * odd[1:]).sum(-1)
    return _folded(_folded(keys) * odd[0])


def _folded(bits: Tensor) -> Tensor:
    """Return integers whose lower halves depend on the upper, too: products carry upwards only."""
    return bits ^ ((bits >> 32) & 0xFFFFFFFF)
