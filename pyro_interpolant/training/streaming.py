r"""Streams: iterables of batches, which may be larger than memory, checked as they come."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm

from .._files import checksum
from .._package import check_ranges, whole
from .._torch import rng_state, set_rng_state
from ..distributions.interpolant import AnyDistribution, ConditionalInterpolantDistribution
from ..distributions.rounding import warn_if_rounded
from ..distributions.rows import as_tensor, check_same_order, names_of
from ..transforms.whitening import DenseWhitening
from .checkpoint import Checkpoint, from_json, to_json
from .data import HeldOut, Split, check_same_scale, held_out_rows, mask_of, rows_of
from .distributed import Process
from .image_rows import are_levels, flips, is_image, most_held
from .names import Names
from .objective import Objective
from .paths import Points
from .rows import Rows, drop_zero_weights, keys_of
from .shards import put_together
from .survey import MOST_HELD, HeldOutKeys, Survey, Surveyed, check_rows_came_again, surveyed

_MOST_EMPTY_BATCHES = 2**17  # batches in a row without rows to train on
_LEAST_ROWS = 64  # per step, of loaders that give fewer at once
_PLACES = 2**20  # of rows in a batch
_ROW_MULTIPLE = 64  # batches are cut to whole multiples of so many rows


def is_stream(data: object) -> bool:
    """Tell an iterable of batches from a table: a tensor, an array, nested lists, named draws."""
    if isinstance(data, (Tensor, Mapping, str)) or hasattr(data, "__array__"):
        return False
    if isinstance(data, (list, tuple)):
        inner = next(iter(data), None)
        parts = inner if isinstance(inner, (list, tuple)) else [inner]
        return any(isinstance(p, Mapping) or len(getattr(p, "shape", ())) > 0 for p in parts)
    return hasattr(data, "__iter__") or hasattr(data, "__getitem__")


@contextlib.contextmanager
def naming_batch(number: int) -> Iterator[None]:
    """Say in an error which batch, counted from 0, it is of."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"in batch {number}, counted from 0: {error}") from error


class Stream:
    """Batches of an iterable, checked, in the flow's coordinates.

    Args:
        distribution: What is trained.
        data: What gives the batches, again each time it is gone through: rows, shape
            ``(B, *event_shape)``; for a conditional flow ``(rows, contexts)``; with a last part of
            shape ``(B,)`` as weights.
        validation: The share held out, or rows of the user's own, with contexts or without.
        flip: Whether images of a batch are mirrored by chance.
        anew: As of a table; a first pass then goes through all, as far as there is an end.
        **given: What goes with a table alone; None here.

    Attributes:
        names: As of a table.
        given_names: None of any, for each batch may have its columns in another order.
        checksum: That of rows held out that a user gave, else None: what a stream gives is not
            known before.
        surveyed: What a first pass went through, known once the rows are split, as what follows.
        mean_weight: The mean weight of a row.
        held_keys: Which rows are held out; None where the user gave those.

    Raises:
        ValueError: If it can be gone through only once, or something is given that goes with a
            table alone.
    """

    def __init__(
        self,
        distribution: AnyDistribution,
        data: Any,
        validation: HeldOut,
        *,
        flip: bool = False,
        anew: bool = True,
        **given: ArrayLike | None,
    ) -> None:
        shape, self.like = distribution.row_shape, distribution.transform.flow.loc
        self.flipped = flips(shape, len(self.like), flip=flip)
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"expected {name} for a table of rows, got {name} beside an iterable: let it "
                    "give batches (rows, contexts) for a conditional flow, and weights as their "
                    "last part"
                )
        check_again(data)
        if mask_of(validation) is not None:
            raise ValueError(
                "expected a share for validation, or rows, beside an iterable, whose rows are not "
                "counted, got a mask"
            )
        self.distribution, self.iterable, self.anew = distribution, data, anew
        self.parts = 1 + isinstance(distribution, ConditionalInterpolantDistribution)
        self.share = validation if isinstance(validation, float) else None
        self.names, self.given_names = Names.of(distribution), Names()
        self.is_named = False  # by the first rows that came
        self.weighted: bool | None = None  # whether batches have weights; not known before one
        self.surveyed: Surveyed | None = None
        self.mean_weight = 1.0
        self.held_keys: HeldOutKeys | None = None
        self.given = None
        if not self.share:
            frames: tuple[object, ...] = (
                validation if isinstance(validation, tuple) else (validation,)
            )
            if any(map(names_of, frames)):  # rows held out have the names of the data
                self._name(*frames)
            self.given = held_out_rows(distribution, validation, self.names, self.given_names)
        self.checksum = None if self.given is None else checksum(self.given)
        self.most_held = MOST_HELD
        if is_image(shape):
            self.most_held = min(MOST_HELD, most_held(len(self.like)))

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
        with naming_batch(number):
            return self._rows(batch)

    def _rows(self, batch: object) -> Rows:
        parts = tuple(batch) if isinstance(batch, (list, tuple)) else (batch,)
        if len(parts) not in (self.parts, self.parts + 1):
            wanted = "(rows, contexts)" if self.parts == 2 else "rows"
            raise ValueError(
                f"expected {wanted}, and weights or not, got {len(parts)} parts of types "
                f"{', '.join(type(p).__name__ for p in parts)}"
            )
        is_weighted = len(parts) > self.parts
        if self.weighted not in (None, is_weighted):
            got = "some after others without" if is_weighted else "none after others with them"
            raise ValueError(f"expected weights in all batches or in none, got {got}: pass ones")
        self.weighted = is_weighted
        weights = None
        if is_weighted:
            check_same_order(data=parts[0], weights=parts[self.parts])
            weights = _part_of_weights(parts[self.parts])
        if all(map(_is_empty, parts)):
            return self._no_rows(parts[0])
        self._name(*parts[: self.parts])
        given = parts[0], parts[1] if self.parts == 2 else None
        data, context, weights = drop_zero_weights(weights, *given, part=True)
        if weights is not None and len(weights) == 0:
            return self._no_rows(data)
        data, context = self.names.ordered(data, context)
        rows = rows_of(self.distribution, data, context)
        # Copied, for an iterable may fill the same tensor anew with each batch.
        return rows._replace(weight=weights).to(self.like.device).each(torch.clone)

    def _no_rows(self, data: object) -> Rows:
        """Return what an empty batch holds, or one without weight, of the type of its data."""
        none = self.like.new_zeros(0, len(self.like))
        size = self.distribution.transform.flow.context_dim or 0
        context = none.new_zeros(0, size) if self.parts == 2 else None
        # Joined with others, rows of another type would turn levels into plain numbers.
        levels = are_levels(data, self.distribution.row_shape)
        weight = none[:, 0] if self.weighted else None
        return Rows(none.to(torch.uint8) if levels else none, context, None, weight)

    def _name(self, rows: object, context: object = None) -> None:
        """Take the names of the first rows and contexts, and of others where there are none."""
        if self.is_named:
            self.names = self.names.filled(rows, context)
        else:
            self.names = Names.for_training(self.distribution, rows, context, anew=self.anew)
        self.is_named = True

    def split(
        self,
        process: Process,
        batch_size: int | None,
        *,
        state: Checkpoint | None = None,
        progress: bool = False,
    ) -> Split:
        """Go through the stream once, or as far as needed, and hold out a share of its rows.

        Which rows is a function of the rows: those of the lowest keys, with all copies of each.

        Args:
            process: This process, or one of several with batches of their own.
            batch_size: Rows per step and process, or None for those of the first batch.
            state: What the run goes on from: as many batches are looked at as then.
            progress: Whether to show a bar.

        Raises:
            ValueError: If it has no batches, or too few rows, or the batch size is below 1; or if
                the state is of a run on other rows.

        Warns:
            UserWarning: If the state may be of a run on other rows.
        """
        check_ranges(whole("batch_size", batch_size, 1, or_none=True))
        before = surveyed(state, process.rank)
        own = self._survey(before, progress=progress)
        survey, rows = put_together(own, process)
        self.surveyed, self.mean_weight = survey.outcome(), own.weight / own.total
        if before is not None and state is not None:
            check_rows_came_again(self.surveyed, before, state)
        sample, keys = survey.sample()
        warn_if_rounded(sample.w)
        if self.given is None:
            held, self.held_keys = survey.held_out(self.share or 0.0)
            effective = rows * (1 - len(held.w) / survey.total)
            sample = sample.take((~self.held_keys.mark(keys)).nonzero().flatten())
            if not len(sample.w):
                raise ValueError(f"expected rows that differ, got {survey.total} that are equal")
        else:
            held = self.given
            check_same_scale(held, sample)
            effective, rows = rows, rows + held.effective()
        usual = max(_LEAST_ROWS, survey.size)
        return Split(
            held.to(self.like.device),
            sample,
            effective if self.anew else math.inf,
            usual if batch_size is None else int(batch_size),
            rows if self.anew else math.inf,
        )

    def _survey(self, before: Surveyed | None, *, progress: bool) -> Survey:
        """Go through the stream as far as wanted."""
        by_matrix = isinstance(self.distribution.transform.flow.whitening, DenseWhitening)
        known, survey = _length(self.iterable), Survey(self.most_held, by_matrix=by_matrix)
        # Without a total it asks for the length itself, in fewer ways.
        total = math.inf if known is None else known
        bar = tqdm(self.iterable, "first pass", total, leave=False, disable=not progress)
        with contextlib.closing(bar):
            for batch in bar:
                survey.add(self.rows(batch, survey.batches))
                held = math.inf if self.share is None else self.share * survey.total
                if before is None:
                    enough = held >= self.most_held and not self.anew or survey.is_enough(known)
                    enough = enough and survey.total >= 2  # the fewest that a run begins with
                else:
                    enough = survey.batches == before.batches
                if enough:
                    survey.end_early(known)
                    break
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


def _is_empty(part: object) -> bool:
    """Return whether a part of a batch has no rows."""
    if isinstance(part, Mapping):
        return bool(part) and all(map(_is_empty, part.values()))
    return tuple(getattr(part, "shape", (1,)))[:1] == (0,)


def _part_of_weights(weights: ArrayLike) -> Tensor:
    """Return the last part of a batch, shape ``(B,)``, if it can be weights.

    Raises:
        TypeError: If it is of whole numbers, as labels are.
    """
    found = as_tensor(weights, "weights")
    if not found.is_floating_point() and found.dtype != torch.bool:
        raise TypeError(
            "expected weights as the last part of a batch, of a floating type or a mask of "
            f"booleans, got {found.dtype}: counts are converted with .float(); for labels of "
            "classes take a conditional flow whose network has them, VelocityMLP(D, classes=K), "
            "and for from_samples network=VelocityMLP(D, classes=K)"
        )
    return found


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


def first_rows(
    iterable: Any, *, conditional: bool = False, scalars: bool = False
) -> tuple[Any, Any]:
    """Return all rows of the first batch that has weight, and those of them that have weight.

    Both have shape ``(B, *event_shape)``.

    Args:
        iterable: What gives the batches.
        conditional: Whether a batch has contexts, too.
        scalars: Whether it is known that rows are scalars.

    Raises:
        ValueError: If there is none, or the iterable can be gone through only once, or gives
            single rows.
    """
    check_again(iterable)
    kind = type(iterable).__name__
    if isinstance(iterable, Dataset) and not isinstance(iterable, IterableDataset):
        raise ValueError(
            f"expected batches of rows, got a {kind}, which gives single rows: wrap it, "
            "DataLoader(dataset, batch_size=256, shuffle=True); or, where its items are batches, "
            "DataLoader(dataset, batch_size=None)"
        )
    for number, batch in enumerate(iterable):
        parts = batch if isinstance(batch, (list, tuple)) else (batch,)
        last = parts[1 + conditional :]
        with naming_batch(number):
            weights = _part_of_weights(last[0]) if last else None
        if not _is_empty(parts[0]) and (weights is None or bool((weights != 0).any())):
            break
    else:
        raise ValueError("expected batches of rows, got an iterable without any")
    rows = parts[0]
    is_row = isinstance(iterable, (list, tuple, Dataset)) and len(getattr(rows, "shape", ())) == 1
    if is_row and not scalars:
        raise ValueError(
            f"expected batches of rows, shape (B, D), got a {kind} of items of shape "
            f"{tuple(rows.shape)}: stack rows into a table, torch.stack(rows), or columns, "
            "torch.stack(columns, -1); for batches of scalars say event_shape=()"
        )
    with naming_batch(number):
        return rows, drop_zero_weights(weights, rows, part=True)[0]


class StreamBatches:
    """Batches of a stream's rows without end, as the points at which a step evaluates its loss.

    Rows that are held out are left out. With weights, a row comes as often as its weight, against
    the mean one, says: whole copies, and one more by chance.

    Args:
        stream: The stream.
        split: The number of rows to train on, and rows per batch.
        objective: What whitens rows, draws times, base draws and noise, and evaluates paths.

    Attributes:
        total: The number of rows that weigh as much; infinite where nobody counted.
    """

    def __init__(self, stream: Stream, split: Split, objective: Objective) -> None:
        self.stream, self.objective = stream, objective
        size, self.total = split.size, split.total
        self.size = size - size % _ROW_MULTIPLE if size > _ROW_MULTIPLE else size
        self.pool: Rows | None = None  # the rows that have come and are still to be used
        self.present: Iterator[Any] | None = None
        self.device = stream.like.device
        self.position, self.found, self.generator = 0, 0, rng_state(self.device)

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
        while pool is None or len(pool.w) < self.size:
            rows = self._from_stream()
            pool = rows if pool is None else Rows.joined([pool, rows])
        self.pool = pool.rest(self.size)
        # Shuffled, because consecutive rows share a time and the stream may be sorted.
        return pool.take(torch.randperm(self.size).to(pool.w.device))

    def _from_stream(self) -> Rows:
        for _ in range(_MOST_EMPTY_BATCHES):
            if self.present is None:
                self.position, self.found, self.generator = 0, 0, rng_state(self.device)
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
            rows = self._chosen(self.stream.rows(batch, self.position))
            self.position += 1
            if len(rows.w):
                self.found += len(rows.w)
                rows = self.stream.flipped(rows._replace(weight=None))
                return self.objective.whitened(rows)
        raise ValueError(
            f"expected batches with rows to train on, got {_MOST_EMPTY_BATCHES} in a row without: "
            "all of weight 0, or among those held out"
        )

    def _chosen(self, rows: Rows) -> Rows:
        """Return the rows that are not held out, as often as their weights say."""
        if self.stream.held_keys is not None:
            held = self.stream.held_keys.mark(keys_of(rows), self.position * _PLACES)
            rows = rows.take((~held).nonzero().flatten())
        if rows.weight is None:
            return rows
        weight = rows.weight / self.stream.mean_weight
        copies = (weight + torch.rand(len(rows.w)).to(weight)).floor()
        index = torch.arange(len(rows.w), device=rows.w.device)
        return rows.take(index.repeat_interleave(copies.long()))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors and numbers."""
        tensors = {"pass": self.generator}
        if self.pool is not None:
            tensors["pool.w"] = self.pool.w
            if self.pool.context is not None:
                tensors["pool.c"] = self.pool.context
        owner = self.stream.state_owner()
        own = None if owner is None else to_json(owner.state_dict(), tensors, "stream")
        began = self.present is not None
        return tensors, {
            "position": self.position,
            "found": self.found,
            "own": own,
            "began": began,
            "surveyed": self.stream.surveyed,
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
        set_rng_state(self.generator, self.device)
        self.present = iter(self.stream.iterable)
        if owner is None:
            for _ in range(self.position):
                next(self.present, None)
