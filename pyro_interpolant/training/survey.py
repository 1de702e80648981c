r"""The first pass over a stream: how many rows, which to hold out, a sample for the whitening.

Each row has a key, an integer that is as if drawn at random, and equal for equal rows. Rows of the
lowest keys are held out: with all their copies, in whatever order and however often they come.
Rows that are equal by chance, as the first ones show, are no copies: each has a key of its own.
"""

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .._torch import warn_user
from ..distributions.rows import rows_held
from .checkpoint import Checkpoint
from .repeats import distinguished, shared_keys
from .rows import Rows, keys_of, row_keys

SAMPLE_VALUES = 2**23  # kept of a stream for the whitening: 64 MiB in float64
MOST_HELD = 8192  # rows held out of a stream
_SAMPLE_ROWS_A_COLUMN = 10  # kept at least of a stream with many, where a matrix whitens them
_MOST_ROWS = 2**17  # of a stream of unknown length, in a first pass: a tenth of them is held out
_MOST_VALUES = 2**26  # the same in numbers, for rows of many columns


class HeldOutKeys(NamedTuple):
    """Which rows of a stream are held out.

    Attributes:
        below: Rows whose keys are below this one are held out.
        shared: Keys that rows share by chance, shape ``(K,)``: such rows get keys of their own.
    """

    below: int
    shared: Tensor

    @classmethod
    def lowest(cls, keys: Tensor, shared: Tensor, count: int) -> "HeldOutKeys":
        """Return what holds out the rows of lowest keys: copies stay together.

        Args:
            keys: The keys of rows, those shared by chance distinguished, shape ``(N,)``.
            shared: The keys shared by chance, shape ``(K,)``.
            count: How many rows to hold out at most, below N, but for one row with its copies.
        """
        few = keys.sort().values
        return cls(int(few[count]) if few[0] < few[count] else int(few[0]) + 1, shared)

    def mark(self, keys: Tensor, start: int = 0) -> Tensor:
        """Return whether rows are held out, booleans of shape ``(N,)``.

        Args:
            keys: Their keys, shape ``(N,)``.
            start: The place of the first row; no two rows of a stream have the same.
        """
        return distinguished(keys, self.shared, start) < self.below


class Surveyed(NamedTuple):
    """What a first pass over a stream went through.

    Attributes:
        batches: The number of batches, of several processes that of each, or None: all, to the
            end.
        rows: The number of rows.
        checksum: A number that tells these rows from others, in whatever order they come.
    """

    batches: int | list[int | None] | None
    rows: int
    checksum: int


class Survey:
    """What a first pass over batches learns.

    Args:
        most_held: The most rows that may be held out.
        by_matrix: Whether a matrix is to whiten rows, which is that of too few where there are
            hardly more than columns.

    Attributes:
        kept: Each batch, each second, each fourth, ..., with its keys: a sample of all rows.
        lowest: Candidates to hold out: the rows of lowest key, now and then trimmed to
            ``most_held + 1``.
        highest: The highest key among them once they were trimmed; rows above it cannot be held
            out.
        shared: Keys that rows share by chance, known once they were trimmed: see
            :func:`~.repeats.shared_keys`.
        checksum: The sum of all keys, weights included.
        batches: The number of batches.
        total: The number of rows.
        size: The number of rows in the first batch that has any.
        weight: The sum of the weights of rows.
        largest: The largest weight.
        squares: The sum of the squares of weights, in units of the largest: squares of tiny or
            huge weights have no float.
        stride: Which batches are in the sample: each first, second, fourth, ...
        reached: The batch after which the pass was ended, or None: at the end of all; of several
            processes together that of each.
        times: How many times as many rows there are in all; infinite where nobody knows.
    """

    def __init__(self, most_held: int = MOST_HELD, *, by_matrix: bool = False) -> None:
        self.most_held, self.by_matrix = most_held, by_matrix
        self.kept: list[tuple[Rows, Tensor]] = []
        self.lowest: list[tuple[Rows, Tensor]] = []
        self.highest, self.checksum = 2**63 - 1, 0
        self.shared: Tensor | None = None
        self.batches, self.total, self.size, self.stride = 0, 0, 0, 1
        self.values, self.weight, self.largest, self.squares = 0, 0.0, 0.0, 0.0
        self.reached: int | list[int | None] | None = None
        self.times = 1.0

    def end_early(self, known: int | None) -> None:
        """Take note that the pass is ended here, of so many batches in all, or None."""
        self.reached, self.times = self.batches, (known or math.inf) / self.batches

    def add(self, rows: Rows) -> None:
        """Take the next batch in."""
        self.size, keys = self.size or len(rows.w), keys_of(rows)
        self._add_lowest(rows, keys)
        weights = torch.ones(len(rows.w)) if rows.weight is None else rows.weight
        weighted = keys if rows.weight is None else keys ^ row_keys(rows.weight[:, None])
        self.checksum = (self.checksum + int(weighted.sum())) % 2**64
        self.total += len(rows.w)
        self.weight += float(weights.double().sum())
        self._add_squares(weights.double())
        if self.batches % self.stride == 0:
            self.kept.append((rows, keys))
            self.values += rows.w.numel()
        if self.values > self.most_values() and len(self.kept) > 1:  # every second is enough
            self.kept, self.stride = self.kept[::2], 2 * self.stride
            self.values = sum(part.w.numel() for part, _ in self.kept)
        self.batches += 1

    def _needed(self) -> int:
        """Return how many rows are kept at least, where there are so many."""
        return _SAMPLE_ROWS_A_COLUMN * self.kept[0][0].w.shape[-1] if self.by_matrix else 0

    def most_values(self) -> int:
        """Return how many numbers a sample may have."""
        return max(SAMPLE_VALUES, self._needed() * self.kept[0][0].w.shape[-1])

    def _add_squares(self, weights: Tensor) -> None:
        before = self.largest
        if len(weights):
            self.largest = max(before, float(weights.max()))
        if self.largest > 0:
            self.squares *= (before / self.largest) ** 2
            self.squares += float((weights / self.largest).square().sum())

    def _add_lowest(self, rows: Rows, keys: Tensor) -> None:
        if self.shared is not None:
            keys = distinguished(keys, self.shared, self.total)
        few = (keys <= self.highest).nonzero().flatten()
        if len(few):
            self.lowest.append((rows.take(few), keys[few]))
        if sum(len(part) for _, part in self.lowest) > 2 * self.most_held:
            rows, keys, _ = self.candidates()
            order = keys.argsort(stable=True)[: self.most_held + 1]
            self.lowest = [(rows.take(order), keys[order])]
            self.highest = int(keys[order[-1]])

    def candidates(self) -> tuple[Rows, Tensor, Tensor]:
        """Return the rows that may be held out, their keys, and those shared by chance."""
        rows, keys = _joined(self.lowest)
        if self.shared is None:  # at the first trim, or without one: these are all rows so far
            self.shared = shared_keys(rows, keys).cpu()  # which every process is sent
            keys = distinguished(keys, self.shared)
        return rows, keys, self.shared

    def held_out(self, share: float) -> tuple[Rows, HeldOutKeys]:
        """Return the rows to hold out, and their keys: copies stay together.

        Args:
            share: The most of all rows, but for one row, with its copies, at least.
        """
        count = min(rows_held(share, self.total), self.most_held, self.total - 1)
        rows, keys, shared = self.candidates()
        keys, order = keys.sort(stable=True)
        held_keys = HeldOutKeys.lowest(keys, shared, count)
        return rows.take(order[keys < held_keys.below]), held_keys

    def sample(self) -> tuple[Rows, Tensor]:
        """Return a sample of all rows, and their keys."""
        return _joined(self.kept)

    def outcome(self) -> Surveyed:
        """Return how far this pass went, and through which rows."""
        return Surveyed(self.reached, self.total, self.checksum)

    def without_rows(self) -> "Survey":
        """Return what is known of the number of rows and their weights alone."""
        few = copy.copy(self)
        few.kept, few.lowest = [], []
        return few

    def effective(self) -> float:
        """Return the number of the rows so far, of rows that weigh as much."""
        return (self.weight / self.largest) ** 2 / self.squares

    def is_enough(self, known: int | None) -> bool:
        """Return whether the rows so far are enough.

        Args:
            known: The number of all batches, or None.
        """
        dim = self.kept[0][0].w.shape[-1]
        rows = max(self.total, self.batches)  # batches may be empty
        most = max(min(_MOST_ROWS, _MOST_VALUES // dim), self._needed())
        return self.batches >= (known or 0) and rows >= most


def surveyed(state: Checkpoint | None, rank: int = 0) -> Surveyed | None:
    """Return what the first pass of a run that goes on went through; None of a new run.

    Args:
        state: Its state, or None.
        rank: The number of this process, whose batches are counted.

    Raises:
        ValueError: If the state does not tell.
    """
    if state is None:
        return None
    found = state.numbers["batches"].get("surveyed")
    if not isinstance(found, list):
        raise ValueError(
            f"expected {state.path} to tell which rows the iterable gave, got a state of an "
            f"earlier version: delete it and {state.previous}, or pass another file"
        )
    batches, *others = found
    if isinstance(batches, list):
        batches = batches[rank] if rank < len(batches) else None
    return Surveyed(batches, *others)


def check_rows_came_again(now: Surveyed, before: Surveyed, state: Checkpoint) -> None:
    """Raise a ValueError, or warn, where a run would go on with other rows than it began with.

    Args:
        now: What the first pass of this process went through.
        before: What that of the run did, when it began.
        state: What it would go on from.
    """
    if now.rows != before.rows:
        raise ValueError(
            f"expected the {before.rows} rows with which the run in {state.path} began, got "
            f"{now.rows}: pass the same data, from their beginning, or delete it and "
            f"{state.previous}"
        )
    if now.checksum != before.checksum:
        warn_user(
            f"the iterable gave other rows than when the run in {state.path} began, as many: good "
            "where rows are drawn or altered anew each time. If these are other data, delete it "
            f"and {state.previous}"
        )


def _joined(parts: list[tuple[Rows, Tensor]]) -> tuple[Rows, Tensor]:
    """Return all rows of several batches, and their keys."""
    return Rows.joined([rows for rows, _ in parts]), torch.cat([keys for _, keys in parts])
