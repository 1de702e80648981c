r"""What is set in a flow before the first step: its start, its whitening map, its scales."""

from numpy.typing import ArrayLike

from ..distributions.bases import Samples
from ..distributions.interpolant import AnyDistribution
from .checkpoint import Checkpoint, restore_buffers
from .data import Split, Table
from .distributed import Process
from .rows import LEVELS, Rows
from .streaming import Stream
from .whitening import set_whitening

_MIN_PARTNERS = 50  # whose moments tell whether they are draws of N(0, I)


def start_from(
    distribution: AnyDistribution,
    base_samples: ArrayLike | None,
    split: Split,
    source: Table | Stream,
    process: Process,
    *,
    anew: bool = False,
) -> None:
    """Let a flow start from samples, where they are given, or from the data of a mirror.

    Args:
        distribution: What is trained.
        base_samples: Samples of the base, shape ``(M, D)``, or None.
        split: The rows.
        source: Where they come from.
        process: This process, or one of several, which agree on what is drawn from the data.
        anew: Whether a mirror leaves the samples that it started from before.

    Raises:
        ValueError: If there are samples beside another base, or pairs that are no draws of it.
    """
    known, path = distribution.base, distribution.transform.interpolant
    is_own = split.kept.context is None and path.starts_from_data()
    samples = source.names.at_base(base_samples, "base_samples", source.given_names.rows)
    if samples is not None:
        distribution.set_base_samples(samples)
    elif is_own and (known is None or (anew and isinstance(known, Samples))):
        own = split.everything().dequantized(source.like).w
        distribution.set_base_samples(process.agreed(own))
    pairs = split.kept.partner
    if pairs is not None and distribution.base is None and len(pairs) >= _MIN_PARTNERS:
        off = pairs.mean(0).abs().max(), pairs.std(0).log().abs().max()
        if float(max(off)) > 1:
            raise ValueError(
                "expected pairs drawn from N(0, I), the base of this distribution, got rows with "
                "other moments: pass the base they come from, or base_samples=pairs as well"
            )


def prepare_flow(
    distribution: AnyDistribution,
    rows: Rows,
    state: Checkpoint | None,
    process: Process,
    *,
    keep: bool,
    at_random: bool,
) -> None:
    """Prepare a flow for the rows that it is trained on: its levels, whitening and scales.

    What an earlier run measured is dropped: it will not hold. So is the noise that it learned for
    another map, or of other pairs.

    Args:
        distribution: The distribution of the flow.
        rows: The rows, in the flow's coordinates.
        state: What the run goes on from, if anything: its weights know the map that they began
            with, which other rows, drawn anew, would set a little differently.
        process: This process, or one of several, which agree on the map.
        keep: Whether to keep the present map.
        at_random: Whether base and data are paired at random.
    """
    flow, distribution.report = distribution.transform.flow, None
    flow.levels = None if rows.w.is_floating_point() else LEVELS
    if not keep or flow.independent != at_random:
        flow.noise = None
    flow.independent, flow.reached = at_random, None
    set_whitening(distribution, rows, keep=keep)
    restore_buffers(flow, state)
    process.agree(flow.buffers())
