r"""Streams: iterables of batches, which may be larger than memory, checked as they come."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm.auto import tqdm

from .._torch import rng_state, set_rng_state
from ..distributions.interpolant import AnyDistribution, ConditionalInterpolantDistribution
from .checkpoint import Checkpoint, from_json, to_json
from .clock import Clock
from .data import HeldOut, Split, checked_weights, drop_zero_weights, held_out_rows, rows_of
from .distributed import Process
from .image_rows import flips
from .objective import Objective, Points
from .preprocessing import warn_if_rounded
from .rows import Rows

_SAMPLE_VALUES = 2**23  # kept of a stream for the whitening: 64 MiB in float64
_MOST_HELD = 8192  # rows held out of a stream
_MOST_ROWS = 2**17  # of a stream of unknown length, in a first pass: a tenth of them is held out
_MOST_VALUES = 2**26  # the same in numbers, for rows of many columns
_SURVEY_SHARE = 0.1  # of the time, for the first pass
_ROWS_PER_COLUMN = 20  # that a whitening needs, however short the time
_MOST_EMPTY = 2**17  # batches in a row without rows to train on
_LEAST_ROWS = 64  # per step, of loaders that give fewer at once
_ROW_MULTIPLE = 64  # batches are cut to whole multiples of so many rows


def is_stream(data: object) -> bool:
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
        distribution: What is trained.
        data: What gives the batches, again each time it is gone through: rows, shape
            ``(B, *event_shape)``; for a conditional flow ``(rows, contexts)``; with a last part of
            shape ``(B,)`` as weights.
        validation: The share held out, from the first batches, or rows of the user's own, with
            contexts or without.
        flip: Whether images of a batch are mirrored by chance.
        **given: What goes with a table alone; None here.

    Attributes:
        checksum: None: what a stream gives is not known before.

    Raises:
        ValueError: If it can be gone through only once, or something is given that goes with a
            table alone.
    """

    checksum = None

    def __init__(
        self,
        distribution: AnyDistribution,
        data: Any,
        validation: HeldOut,
        *,
        flip: bool = False,
        **given: ArrayLike | None,
    ) -> None:
        self.flipped = flips(distribution, flip=flip)
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"expected {name} for a table of rows, got {name} beside an iterable: let it "
                    "give batches (rows, contexts) for a conditional flow, and weights as their "
                    "last part"
                )
        check_again(data)
        self.distribution, self.iterable = distribution, data
        self.parts = 1 + isinstance(distribution, ConditionalInterpolantDistribution)
        self.share = validation if isinstance(validation, float) else None
        self.given = None if self.share else held_out_rows(distribution, validation)
        self.like = distribution.transform.flow.loc

    @property
    def exact(self) -> bool:
        """Whether a resumed run can go on from the very row, as the only process."""
        return self.state_owner() is not None

    def rows(self, batch: object, number: int) -> Rows:
        """Return a batch's rows.

        Raises:
            TypeError: If it is of a wrong type.
            ValueError: If it cannot work; the message names the batch.
        """
        try:
            return self._rows(batch)
        except (TypeError, ValueError) as error:
            raise type(error)(f"in batch {number}, counted from 0: {error}") from error

    def _rows(self, batch: object) -> Rows:
        parts = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
        if len(parts) not in (self.parts, self.parts + 1):
            wanted = "(rows, contexts)" if self.parts == 2 else "rows"
            raise ValueError(
                f"expected {wanted}, and weights or not, got {len(parts)} parts of types "
                f"{', '.join(type(p).__name__ for p in parts)}"
            )
        weights = parts[self.parts] if len(parts) > self.parts else None
        context = parts[1] if self.parts == 2 else None
        data, context, weights = drop_zero_weights(weights, parts[0], context, part=True)
        if weights is not None and len(weights) == 0:
            none = self.like.new_zeros(0, len(self.like))
            size = self.distribution.transform.flow.context_dim or 0
            return Rows(
                none, none.new_zeros(0, size) if self.parts == 2 else None, None, none[:, 0]
            )
        rows = rows_of(self.distribution, data, context)
        weights = checked_weights(weights, len(rows.w))
        return rows._replace(weight=weights).to(self.like.device)

    def split(
        self,
        process: Process,
        batch_size: int | None,
        *,
        whole: bool = True,
        clock: Clock | None = None,
        batches: float | None = None,
        progress: bool = False,
    ) -> Split:
        """Go through the stream once, or as far as needed, and hold out rows of its first batches.

        Args:
            process: This process, or one of several with batches of their own.
            batch_size: Rows per step and process, or None for those of the first batch.
            whole: Whether moments are wanted, and so all of it, as far as it has an end.
            clock: What tells how much time there is.
            batches: How many batches to look at, where an earlier process decided it.
            progress: Whether to show a bar.

        Raises:
            ValueError: If it has no batches, or too few rows, or the batch size is below 1.
        """
        if batch_size is not None and (batch_size < 1 or batch_size != int(batch_size)):
            raise ValueError(f"expected batch_size >= 1, a whole number, got {batch_size}")
        survey = self._survey(clock or Clock(None), batches, whole=whole, progress=progress)
        if survey.total < 2:
            raise ValueError(
                f"expected batches of rows, got an iterable with {survey.total} rows in all"
            )
        sample, held, effective = Rows.joined(survey.kept), self.given, survey.effective()
        warn_if_rounded(sample.w)
        if not survey.ended:
            known = _length(self.iterable)
            effective *= known / survey.batches if known else math.inf
        if held is None:
            share = self.share or 0.0
            count = min(_MOST_HELD, max(1, round(share * survey.total)))
            held = Rows.joined(survey.first).take(torch.arange(count, device=sample.w.device))
            effective *= 1 - count / survey.total
            if survey.stride == 1:
                sample = sample.rest(count)
        held = held.each(process.agreed).to(self.like.device)
        own = max(_LEAST_ROWS, int(process.agreed(survey.size)))
        return Split(
            held,
            sample,
            effective * process.world if whole else math.inf,
            own if batch_size is None else batch_size,
            survey.weight / survey.total,
            None if survey.ended else survey.batches,
        )

    def _survey(
        self, clock: Clock, batches: float | None, *, whole: bool, progress: bool
    ) -> "_Survey":
        """Go through the stream as far as wanted."""
        known, survey = _length(self.iterable), _Survey()
        bar = tqdm(self.iterable, "first pass", known, leave=False, disable=not progress)
        with contextlib.closing(bar):
            for batch in bar:
                survey.add(self.rows(batch, survey.batches))
                held = math.inf if self.share is None else self.share * survey.total
                if batches is None:
                    enough = held >= _MOST_HELD and not whole or survey.is_enough(known, clock)
                else:
                    enough = survey.batches == batches
                if enough:
                    return survey
        survey.ended = True
        return survey

    def batches(self, split: Split, objective: Objective) -> "StreamBatches":
        """Return the points of batches of the rows that are not held out, without end."""
        return StreamBatches(self, split, objective)

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


class _Survey:
    """What a first pass over batches learns.

    Attributes:
        kept: Each batch, each second, each fourth, ...: a sample of all rows.
        first: The first batches.
        batches: Their number.
        total: The number of rows.
        size: The number of rows in the first batch that has any.
        weight: The sum of their weights.
        stride: Which batches are in the sample: each first, second, fourth, ...
        ended: Whether the batches came to an end.
    """

    def __init__(self) -> None:
        self.kept: list[Rows] = []
        self.first: list[Rows] = []
        self.batches, self.total, self.size, self.stride = 0, 0, 0, 1
        self.values, self.weight, self.squares = 0, 0.0, 0.0
        self.ended = False

    def add(self, rows: Rows) -> None:
        """Take the next batch in."""
        self.size = self.size or len(rows.w)
        if self.total < _MOST_HELD:
            self.first.append(rows)
        self.total += len(rows.w)
        weights = torch.ones(len(rows.w)) if rows.weight is None else rows.weight
        self.weight += float(weights.double().sum())
        self.squares += float(weights.double().square().sum())
        if self.batches % self.stride == 0:
            self.kept.append(rows)
            self.values += rows.w.numel()
        if self.values > _SAMPLE_VALUES and len(self.kept) > 1:  # every second is enough
            self.kept, self.stride = self.kept[::2], 2 * self.stride
            self.values = sum(part.w.numel() for part in self.kept)
        self.batches += 1

    def effective(self) -> float:
        """Return the number of rows that weigh as much."""
        return self.weight**2 / self.squares

    def is_enough(self, known: int | None, clock: Clock) -> bool:
        """Return whether to stop here, at an end that nobody knows or for lack of time.

        Args:
            known: The number of all batches, or None.
            clock: What tells how much time there is.
        """
        dim = self.kept[0].w.shape[-1]
        if clock.is_beyond(_SURVEY_SHARE) and self.total >= _ROWS_PER_COLUMN * dim:
            return True
        rows = max(self.total, self.batches)  # batches may be empty
        return self.batches >= (known or 0) and rows >= min(_MOST_ROWS, _MOST_VALUES // dim)


def surveyed(checkpoint: Checkpoint | None) -> float | None:
    """Return how many batches the first pass of a run that goes on went through, all if infinite.

    None of a new run.
    """
    if checkpoint is None or checkpoint.tensors is None:
        return None
    found = checkpoint.numbers["batches"].get("surveyed")
    return math.inf if found is None else found


def _length(iterable: Any) -> int | None:
    """Return how many batches an iterable says it has, or None."""
    try:
        return len(iterable)
    except (TypeError, NotImplementedError):
        return None


def check_again(iterable: object) -> None:
    """Raise a ValueError where an iterable can be gone through only once."""
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
    check_again(iterable)
    batch = next(iter(iterable), None)
    if batch is None:
        raise ValueError("expected batches of rows, got an iterable without any")
    return batch[0] if isinstance(batch, (list, tuple)) else batch


class StreamBatches:
    """Batches of a stream's rows without end, as the points at which a step evaluates its loss.

    Rows that are held out are left out. With weights, a row comes as often as its weight, against
    the mean one, says: whole copies, and one more by chance.

    Args:
        stream: The stream.
        split: The rows held out, the mean weight, and rows per batch.
        objective: What whitens rows, draws times, base draws and noise, and evaluates paths.

    Attributes:
        total: The number of rows that weigh as much; infinite where nobody counted.
    """

    def __init__(self, stream: Stream, split: Split, objective: Objective) -> None:
        self.stream, self.objective, self.mean_weight = stream, objective, split.mean_weight
        self.surveyed = split.batches
        size, self.total = split.size, split.total
        self.size = size - size % _ROW_MULTIPLE if size > _ROW_MULTIPLE else size
        self.held = None if stream.share is None else row_keys(split.held.w)
        self.pool: Rows | None = None
        self.used = 0  # of its rows
        self.present: Iterator[Any] | None = None
        self.position, self.found, self.generator = 0, 0, rng_state()

    def next(self) -> tuple[Points, ...]:
        """Return the points of the next step."""
        with torch.no_grad():
            return self.objective.points([self.next_rows])[0]

    def next_rows(self) -> Rows:
        """Return the rows of the next batch, whitened.

        Raises:
            ValueError: If a batch cannot work, or a pass gives no rows.
        """
        pool, self.pool = self.pool, None
        while pool is None or len(pool.w) - self.used < self.size:
            rows = self._from_stream()
            pool = rows if pool is None else Rows.joined([pool.rest(self.used), rows])
            self.used = 0
        # In another order: a batch is cut in groups of a time each, and rows may come in an order.
        places = self.used + torch.randperm(self.size).to(pool.w.device)
        self.pool, self.used = pool, self.used + self.size
        return pool.take(places)

    def _from_stream(self) -> Rows:
        for _ in range(_MOST_EMPTY):
            if self.present is None:
                self.generator, self.position, self.found = rng_state(), 0, 0
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
                rows = self.stream.flipped(rows._replace(weight=None))
                return self.objective.whitened(rows)
        raise ValueError(
            f"expected batches with rows to train on, got {_MOST_EMPTY} in a row without: all of "
            "weight 0, or among those held out"
        )

    def _chosen(self, rows: Rows) -> Rows:
        """Return the rows that are not held out, as often as their weights say."""
        if self.held is not None:
            new = ~torch.isin(row_keys(rows.w), self.held)
            if not bool(new.all()):
                rows = rows.take(new.nonzero().flatten())
        if rows.weight is None:
            return rows
        copies = (rows.weight / self.mean_weight + torch.rand(len(rows.w)).to(rows.weight)).floor()
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
        own = None if owner is None else to_json(owner.state_dict(), tensors, "stream")
        began = self.present is not None
        return tensors, {
            "position": self.position,
            "found": self.found,
            "own": own,
            "began": began,
            "surveyed": self.surveyed,
        }

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take a state back; without the stream's own, read forward to where it was."""
        if self.objective.process.world > 1:
            return
        self.generator = tensors["pass"]
        self.position, self.found = numbers["position"], numbers["found"]
        if "pool.w" in tensors:
            like = self.stream.like
            context = tensors.get("pool.c")
            context = None if context is None else context.to(like)
            self.pool = Rows(tensors["pool.w"].to(like), context)
        owner = self.stream.state_owner()
        if owner is not None and numbers["own"] is not None:
            owner.load_state_dict(from_json(numbers["own"], tensors))
        if not numbers["began"]:
            return
        set_rng_state(self.generator)
        self.present = iter(self.stream.iterable)
        if owner is None:
            for _ in range(self.position):
                next(self.present, None)


def row_keys(rows: Tensor) -> Tensor:
    """Return one integer per row, shape ``(N,)``, equal for equal rows."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.randint(2**62, (rows.shape[-1],), generator=generator) * 2 + 1
    return (rows.double().view(torch.int64) * odd.to(rows.device)).sum(-1)
