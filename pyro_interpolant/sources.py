r"""Rows to train on and rows to hold out, from a table or from a stream."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .batches import StreamBatches, TableBatches
from .engine import Engine
from .flow import Flow
from .objective import Rows
from .preparation import AnyDistribution, checked_batch, collected, given_rows
from .snapshots import checksum
from .streams import Stream, agreed_rows, is_stream, survey

__all__ = ["Source", "Split", "loaded"]

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
