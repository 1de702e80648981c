r"""Tables: rows in memory, checked with clear errors, held out and given out in batches."""

import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .._files import checksum
from .._package import check_ranges
from .._torch import rng_state, set_rng_state
from ..distributions.interpolant import AnyDistribution, ConditionalInterpolantDistribution
from ..distributions.joint import pack
from ..distributions.rounding import warn_if_rounded
from ..distributions.rows import (
    RowsLike,
    as_tensor,
    check_same_order,
    checked_rows,
    contexts_of_rows,
    rows_held,
    search_weights,
)
from .checkpoint import Checkpoint
from .distributed import Process
from .image_rows import (
    BATCH_IMAGES,
    are_levels,
    checked_levels,
    flips,
    is_image,
    most_held,
)
from .names import Names
from .objective import Objective
from .paths import Points
from .repeats import random_order
from .rows import Rows, drop_zero_weights
from .whitening import warn_if_coarse

DataLike = RowsLike | Iterable[Any]  # or batches: of rows, of (rows, contexts), with weights
# A share, a mask of the rows, rows of one's own, or these and contexts.
HeldOut = RowsLike | tuple[RowsLike, ArrayLike] | None

DEFAULT_SHARE = 0.1  # of rows, held out
_DEFAULT_BATCH_ROWS = 1024
_MOST_BATCHES = 8  # whose points are evaluated at once
_VALUES_AT_ONCE = 2**20  # of the rows and contexts of these


class Split(NamedTuple):
    """Rows to train on and rows held out, in the flow's coordinates.

    Attributes:
        held: The rows held out.
        kept: The others, or, of a stream, a sample of them.
        total: The number of the others, of rows that weigh as much; infinite where nobody counted
            a stream.
        size: Rows per batch and coupling.
        rows: The number of all, those held out included, of rows that weigh as much.
    """

    held: Rows
    kept: Rows
    total: float
    size: int
    rows: float

    def everything(self) -> Rows:
        """Return as many rows as are kept and held out: all of them, or drawn by weight."""
        rows = self.kept.and_given(self.held)
        return rows if rows.weight is None else rows.repeated(len(rows.w))


class Table:
    """A table of rows with what belongs to each, in the flow's coordinates.

    Args:
        distribution: What is trained.
        data: Rows, shape ``(N, *event_shape)``, or named draws.
        validation: The share held out, or which rows are, a mask of shape ``(N,)``, or rows of the
            user's own, with contexts or without; None to hold out nothing.
        context: Contexts, shape ``(N, C)``, for a conditional flow.
        pairs: The partner of each row at the base, shape ``(N, D)``.
        weights: Non-negative weights, shape ``(N,)``.
        flip: Whether images of a batch are mirrored by chance.
        anew: Whether a new map is set from the data, which may then have columns of other names.

    Attributes:
        names: The names of the columns, in the order that rows and contexts have.
        given_names: The same in the order in which data and contexts were given; none where they
            have none.
        rows: All rows; those held out come last where the user gave them.
        like: A tensor of the type of the flow, on its device, shape ``(D,)``.
        checksum: What tells this table from another.
        exact: Whether a resumed run goes on from the very row.

    Raises:
        TypeError: If something is of a wrong type.
        ValueError: If something cannot work.
    """

    exact = True

    def __init__(
        self,
        distribution: AnyDistribution,
        data: Any,
        validation: HeldOut,
        *,
        context: ArrayLike | None = None,
        pairs: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        flip: bool = False,
        anew: bool = True,
    ) -> None:
        shape, self.like = distribution.row_shape, distribution.transform.flow.loc
        self.flipped = flips(shape, len(self.like), flip=flip)
        if flip and pairs is not None:
            raise ValueError(
                "expected flip=False beside pairs, whose partners belong to images as they are"
            )
        mask = mask_of(validation)
        held = None if mask is None else validation
        check_same_order(data=data, context=context, pairs=pairs, weights=weights, validation=held)
        self.given_names = Names().filled(data, context)
        self.names = Names.for_training(distribution, data, context, anew=anew)
        found = drop_zero_weights(weights, data, context, pairs, mask)
        data, context, pairs, mask, weight = found
        data, context = self.names.ordered(data, context)
        pairs = self.names.at_base(pairs, "pairs", self.given_names.rows)
        found = rows_of(distribution, data, context)
        if found.context is not None and not distribution.transform.flow.classes:
            warn_if_coarse(as_tensor(context, "context"), found.context.dtype, "context")
        warn_if_rounded(found.w)
        self.has_images = is_image(shape)
        count, size = found.w.shape
        if pairs is not None:
            pairs = checked_rows(pairs, "pairs", (size,))
            if len(pairs) != count:
                raise ValueError(
                    f"expected one partner per row of data, {count}, got {len(pairs)}"
                )
        found = found._replace(partner=pairs, weight=weight)
        self.share = validation if isinstance(validation, float) else None
        self.held = 0  # how many, where no mask says which
        self.mask: Tensor | None = None
        if self.share is not None:
            most = most_held(size) if self.has_images else count
            self.held = _held_of_share(self.share, count, most)
        elif mask is not None:
            self.mask = checked_mask(mask, count)
        else:
            if validation is not None:
                own = held_out_rows(distribution, validation, self.names, self.given_names)
                found = _with_given(found, own)
            self.mask = torch.arange(len(found.w)) >= count
        self.rows = found.to(self.like.device)
        self.checksum = checksum(self.rows)

    def split(
        self,
        process: Process,
        batch_size: int | None,
        *,
        state: Checkpoint | None = None,
        progress: bool = False,
    ) -> Split:
        """Split off the rows held out, those of the mask, or at random, each with its copies.

        Args:
            process: This process, or one of several that share each batch.
            batch_size: Rows per step and process, or None for the default.
            state: For streams alone, as what follows: what the run goes on from.
            progress: Whether to show a bar.

        Raises:
            ValueError: If the batch size is below 1 or above the number of training rows.
        """
        if self.mask is None:
            order, count = random_order(self.rows, self.held)
        else:
            order = torch.cat((self.mask.nonzero(), (~self.mask).nonzero())).flatten()
            count = int(self.mask.sum())
        order = order.to(self.rows.w.device)
        held, kept = self.rows.take(order[:count]), self.rows.take(order[count:])
        available = len(kept.w) // process.world
        if batch_size is not None and batch_size not in range(1, available + 1):
            raise ValueError(
                f"expected batch_size between 1 and the {available} training rows, got "
                f"{batch_size}"
            )
        usual = BATCH_IMAGES if self.has_images else _DEFAULT_BATCH_ROWS
        size = max(1, min(usual, available)) if batch_size is None else int(batch_size)
        size = process.world * size
        return Split(held, kept, kept.effective(), size, self.rows.effective())

    def batches(self, split: Split, objective: Objective) -> "TableBatches":
        """Return the points of batches of the training rows, without end."""
        if not self.has_images:
            return TableBatches(objective.whitened(split.kept), split.size, objective)
        return TableBatches(
            split.kept, split.size, objective, lambda rows: objective.whitened(self.flipped(rows))
        )


class TableBatches:
    """Batches of a table's rows without end, as the points at which a step evaluates its loss.

    Each row comes once before any comes again; with weights, rows are drawn in their proportion.
    The paths of several steps are evaluated at once where nothing that a step changes bears on
    them: one batch of few dimensions takes as long as eight.

    Args:
        rows: All training rows, whitened or not.
        size: Rows per batch, at most their number.
        objective: What draws times, base draws and noise, and evaluates paths.
        prepare: From the rows of a batch to what is trained on, or None for the rows: images of
            whole levels take little memory, and are mirrored, spread over their cells and whitened
            each time anew.

    Attributes:
        total: The number of rows that weigh as much.
        order: The present order of the rows, shape ``(N,)``.
        position: Where in it the next batch starts.
    """

    def __init__(
        self,
        rows: Rows,
        size: int,
        objective: Objective,
        prepare: Callable[[Rows], Rows] | None = None,
    ) -> None:
        self.rows, self.size, self.objective, self.prepare = rows, size, objective, prepare
        self.total = rows.effective()
        values = size * sum(part.shape[-1] for part in rows[:2] if part is not None)
        most = max(1, min(_MOST_BATCHES, _VALUES_AT_ONCE // values))
        self.at_once = most if objective.can_draw_ahead() else 1
        self.ends = None if rows.weight is None else rows.weight.double().cumsum(0)
        self.order = torch.zeros(0, dtype=torch.long, device=rows.w.device)
        self.position = 0
        self.points: list[tuple[Points, ...]] = []  # of the coming steps
        self.before = self._place()  # where those were drawn from

    def next(self) -> tuple[Points, ...]:
        """Return the points of the next step."""
        if not self.points:
            self._evaluate()
        return self.points.pop(0)

    def next_rows(self) -> Rows:
        """Return the rows of the next batch, whitened."""
        rows = self.rows.take(self._next_places())
        return rows if self.prepare is None else self.prepare(rows)

    def _next_places(self) -> Tensor:
        if self.ends is not None:
            return search_weights(self.ends, self.size)
        if self.position + self.size > len(self.order):
            count = len(self.rows.w)
            self.order, self.position = torch.randperm(count, device=self.order.device), 0
        self.position += self.size
        return self.order[self.position - self.size : self.position]

    def _evaluate(self) -> None:
        self.before = self._place()
        with torch.no_grad():  # steps must not share a graph
            self.points = self.objective.points([self.next_rows] * self.at_once)

    def _place(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {"order": self.order, "before": rng_state(self.order.device)}
        return tensors, {"position": self.position}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state before what is still to come was drawn, and how much that is."""
        tensors, numbers = self.before if self.points else self._place()
        return tensors, {**numbers, "left": len(self.points)}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take a state back."""
        self.order = tensors["order"].to(self.order)
        self.position = numbers["position"]
        if numbers["left"]:
            set_rng_state(tensors["before"], self.order.device)
            self._evaluate()
            self.points = self.points[-numbers["left"] :]


def rows_of(
    distribution: AnyDistribution,
    data: RowsLike,
    context: ArrayLike | None = None,
    name: str = "data",
) -> Rows:
    """Return checked data in the flow's coordinates, shape ``(N, D)``, and their contexts.

    Columns are taken as they are: those of a data frame are put in order before.

    Args:
        distribution: What is trained.
        data: Rows, shape ``(N, *event_shape)``, or named draws. Images of whole levels, ``uint8``,
            are returned as such.
        context: Contexts, shape ``(N, C)``, for a conditional flow.
        name: What to call the data in messages.

    Raises:
        TypeError: If something is of a wrong type.
        ValueError: If something is of a wrong shape, not finite or outside the support.
    """
    flow = distribution.transform.flow
    shape = distribution.row_shape
    if isinstance(data, Mapping):
        sites = distribution.sites
        if sites is None:
            raise TypeError(
                "expected a tensor of rows: only a JointInterpolantDistribution takes named draws"
            )
        unknown = sorted(set(data) - set(sites))
        if unknown:
            raise ValueError(
                f"expected draws of the sites {sorted(sites)}, got {unknown} "
                "besides: leave them out, or learn all of them anew by from_samples(draws)"
            )
        given: ArrayLike = pack(sites, data)
        shape = torch.Size((flow.event_dim,))
    else:
        given = data
    if are_levels(given, shape):
        rows = checked_levels(given, shape, distribution.constraint)
    else:
        rows = distribution.to_flow(checked_rows(given, name, shape))
    count = len(rows)
    if not isinstance(distribution, ConditionalInterpolantDistribution):
        if context is not None:
            raise ValueError(
                "expected no context for this flow: use a ConditionalInterpolantDistribution"
            )
        return Rows(rows, None)
    if context is None:
        raise ValueError(
            f"expected a context of shape ({count}, C) for a conditional flow, got none"
        )
    return Rows(rows, contexts_of_rows(context, flow, (), count, f"rows of {name}"))


def _held_of_share(share: float, count: int, most: int) -> int:
    """Return how many of N rows a share to hold out are, at most so many.

    Raises:
        ValueError: If none is left to train on.
    """
    held = min(rows_held(share, count), most)
    if held >= count:
        raise ValueError(
            f"expected rows to train on besides {held} held out, got {count} in all, of positive "
            "weight: get more data"
        )
    return held


def as_held_out(validation: Any) -> HeldOut:
    """Return a share of any real type as a float, and a list of rows and contexts as a tuple.

    Raises:
        ValueError: If nothing is held out, a share is not between 0 and 1, or a tuple is none of
            rows and contexts.
    """
    if getattr(validation, "ndim", None) == 0:  # of torch or numpy
        validation = validation.item()
    is_share = isinstance(validation, numbers.Real)
    good = validation is not None and (not is_share or 0 < validation < 1)
    check_ranges(("validation between 0 and 1, or rows", good, validation))
    if is_share:
        return float(validation)
    if isinstance(validation, tuple) and len(validation) not in (1, 2):
        raise ValueError(
            "expected validation as a share, a mask, rows or (rows, contexts), got "
            f"{len(validation)} parts: rows held out have neither weights nor partners of theirs"
        )
    is_pair = isinstance(validation, list) and len(validation) == 2
    is_pair = is_pair and all(getattr(part, "ndim", 0) > 0 for part in validation)
    return tuple(validation) if is_pair else validation


def mask_of(validation: HeldOut) -> Tensor | None:
    """Return which rows are held out, shape ``(N,)``, where it is this that a user says.

    Raises:
        TypeError: If it is a mask of whole numbers, or one with missing entries.
    """
    if validation is None or isinstance(validation, int | float | tuple | Mapping):
        return None
    kind = str(getattr(validation, "dtype", None)).lower().removeprefix("torch.")
    if kind in ("bool", "boolean"):
        found = as_tensor(validation, "validation")
        if found.is_floating_point():
            raise TypeError(
                "expected a mask of the rows held out without missing entries, got "
                f"{int(found.isnan().sum())}: write True or False for them, as mask.filled(False) "
                "of numpy or mask.fillna(False) of pandas does"
            )
    elif isinstance(validation, Tensor):
        found = validation
    else:
        try:
            values = np.asarray(validation)  # of a list, or a column of a frame, too
        except ValueError:  # of parts of several sizes: what they are is said later
            return None
        if values.dtype.kind not in "biu":
            return None
        found = as_tensor(values)
    if found.dim() == 1 and not (found.is_floating_point() or found.dtype == torch.bool):
        raise TypeError(
            "expected validation as a share, rows of a floating type or a mask of booleans, got "
            f"{found.dtype} of shape {tuple(found.shape)}: a mask of 0 and 1 is mask == 1"
        )
    return found if found.dtype == torch.bool else None


def checked_mask(mask: Tensor, count: int) -> Tensor:
    """Return a mask of the rows held out, if it is one.

    Args:
        mask: Which rows, shape ``(N,)``.
        count: N.

    Raises:
        ValueError: If its shape is another, or all or none of the rows are held out.
    """
    if mask.shape != (count,):
        raise ValueError(
            f"expected a mask of the rows held out, shape ({count},), got shape "
            f"{tuple(mask.shape)}"
        )
    held = int(mask.sum())
    if held in (0, count):
        raise ValueError(
            f"expected a mask of some of the rows to hold out, got {held} of {count} rows: those "
            "of weight 0 count as absent"
        )
    return mask


def held_out_rows(
    distribution: AnyDistribution, validation: HeldOut, names: Names, beside: Names
) -> Rows:
    """Return the validation rows a user gave: rows, or rows and contexts.

    Args:
        distribution: What is trained.
        validation: What was given.
        names: Those of the columns of the data beside it, by which data frames' are taken.
        beside: The same in the order in which the data are given, which those without have.
    """
    given: Any = validation if isinstance(validation, tuple) else (validation,)
    name = "validation"
    rows, context = names.ordered(*given, name=name, beside=beside)
    return rows_of(distribution, rows, context, name)


def _with_given(rows: Rows, held: Rows) -> Rows:
    """Return rows with those held out behind them, each of the mean weight."""
    if rows.partner is not None:
        raise ValueError("expected a share for validation beside pairs, got rows")
    check_same_scale(held, rows)
    return rows.and_given(held._replace(w=held.w.to(rows.w)))


def check_same_scale(held: Rows, rows: Rows) -> None:
    """Raise a ValueError where only one of rows held out and rows to train on is whole levels."""
    if held.w.is_floating_point() != rows.w.is_floating_point():
        raise ValueError(
            "expected validation of the type of the data, got "
            f"{held.w.dtype} beside {rows.w.dtype}: spread both over their levels, or neither"
        )
