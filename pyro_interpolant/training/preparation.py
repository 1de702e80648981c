r"""What is set in a flow before the first step: its start, its whitening map, its scales."""

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.distributions import Distribution

from ..distributions.bases import Samples
from ..distributions.interpolant import AnyDistribution
from ..distributions.rows import subsample
from ..interpolants.nonlinear import Geodesic
from ..nn.mlp import VelocityMLP
from ..nn.velocity import explained, set_scales, untrained_copy
from ..transforms.flow import Flow
from ..transforms.whitening import DenseWhitening, Whitening
from .checkpoint import Checkpoint, restore_buffers
from .data import Split, Table
from .distributed import Process
from .image_rows import IMAGE_DEVIATION, is_image
from .rows import LEVELS, Rows, dequantized
from .streaming import Stream
from .whitening import WhiteningMap, column_moments, warn_if_coarse, whitening_map, winsorize

_MIN_PARTNERS = 50  # whose moments tell whether they are draws of N(0, I)
_IMAGE_VALUES, _MIN_IMAGES = 2**22, 64  # that set the whitening of images
# That set a map by a matrix: scales to 0.2%. Of a million rows of 20 numbers, `from_samples` takes
# half the memory, five times the table's, that it takes where all of them do.
_MAP_ROWS, _MAP_ROWS_A_COLUMN = 2**18, 100


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
        own = dequantized(split.everything(), source.like).w
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
) -> None:
    """Prepare a flow for the rows that it is trained on: its levels, whitening and scales.

    What an earlier run measured is dropped: it will not hold.

    Args:
        distribution: The distribution of the flow.
        rows: The rows, in the flow's coordinates.
        state: What the run goes on from, if anything: its weights know the map that they began
            with, which other rows, drawn anew, would set a little differently.
        process: This process, or one of several, which agree on the map.
        keep: Whether to keep the present map, and the noise that was learned.
    """
    flow, distribution.report = distribution.transform.flow, None
    flow.levels = None if rows.w.is_floating_point() else LEVELS
    if not keep:
        flow.noise = None
    set_whitening(distribution, rows, keep=keep)
    restore_buffers(flow, state)
    process.agree(flow.buffers())


def set_whitening(distribution: AnyDistribution, rows: Rows, *, keep: bool = False) -> None:
    """Set a flow's whitening map, and the scales of its network, from training rows.

    Where rows have weights, scales are those of rows drawn by weight, as training draws them.

    Args:
        distribution: The distribution of the flow.
        rows: The rows, in the flow's coordinates.
        keep: Whether to keep the present map, and the scales of a network that is trained.
    """
    flow, deviation = distribution.transform.flow, 1.0
    if is_image(distribution.row_shape):
        most = max(_MIN_IMAGES, _IMAGE_VALUES // rows.w.shape[1])
        rows, deviation = dequantized(_by_weight(rows, most), flow.loc), IMAGE_DEVIATION
    _check_range(rows.w, flow.loc.dtype)
    seen = rows if rows.weight is None else _by_weight(rows, len(rows.w))
    context = None if seen.context is None else winsorize(seen.context.double())
    sets_map = not keep and not isinstance(flow.interpolant, Geodesic)  # angles have a scale
    left = rows
    if sets_map and context is not None:
        known = explained(flow.velocity, winsorize(seen.w.double()), context)
        left = rows if known is None else seen._replace(w=seen.w - known.to(seen.w))
    if not keep:
        distribution.space.check_rows(flow, rows.w, rows.context)
    if sets_map:
        _set_map(flow.whitening, distribution.base, left, deviation)
    w = flow.whitening.to_white(seen.w.to(flow.loc))
    set_scales(flow.velocity, w, context, if_trained=not keep)


def _by_weight(rows: Rows, most: int) -> Rows:
    """Return a subsample of rows, drawn by weight where they have weights, without those."""
    few = subsample(len(rows.w), most, rows.weight)
    return rows.take(few.to(rows.w.device))._replace(weight=None)


def _set_map(
    whitening: Whitening, base: Distribution | None, rows: Rows, deviation: float
) -> None:
    """Set a map from rows in data coordinates, and the base if it is not N(0, I).

    Args:
        whitening: The map.
        base: The base, or None.
        rows: The rows.
        deviation: The standard deviation of whitened rows, where whitening is not by a matrix.
    """
    if base is not None or not isinstance(whitening, DenseWhitening):
        warn_if_coarse(rows.w, whitening.loc.dtype, "data")
    if base is not None:  # one scale: a full whitening would change what the shortest path is
        start, spread = column_moments(base.sample((len(rows.w),)))
        end, other = column_moments(rows.w, rows.weight)
        scale = ((spread.mean() + other.mean()) / 2).sqrt()
        whitening.set_diagonal((start + end) / 2, scale.expand_as(end))
    elif isinstance(whitening, DenseWhitening):
        # Of rows with weights a few may weigh most.
        most = max(_MAP_ROWS, _MAP_ROWS_A_COLUMN * rows.w.shape[1])
        few = rows if rows.weight is not None else _by_weight(rows, most)
        found = whitening_map(few.w, few.weight, dtype=whitening.loc.dtype)
        whitening.set(*(found if rows.partner is None else _aligned(found, rows.w, rows.partner)))
    else:
        loc, variance = column_moments(rows.w, rows.weight)
        whitening.set_diagonal(loc, variance.sqrt())
        whitening.set(whitening.loc, whitening.linear / deviation)  # of all columns together


def _aligned(found: WhiteningMap, rows: Tensor, partners: Tensor) -> WhiteningMap:
    """Return the map turned so that rows lie nearest to their partners: paths must not cross."""
    w = found.white(rows)
    u, _, vh = torch.linalg.svd(w.T @ partners.double())
    turn = u @ vh
    return WhiteningMap(found.loc, found.linear @ turn, turn.T @ found.inverse)


def _check_range(x: Tensor, dtype: torch.dtype) -> None:
    """Raise a ValueError where the type of the flow does not reach to columns, ``(N, D)``."""
    limits, (low, high) = torch.finfo(dtype), x.aminmax(dim=0)
    spread, size = high.double() - low.double(), torch.maximum(low.abs(), high.abs()).double()
    bad = ((spread < limits.tiny) & (spread > 0)) | (size > limits.max)
    if bool(bad.any()):
        raise ValueError(
            f"expected columns within the range of the flow's type {dtype}, up to "
            f"{limits.max:.1e}, and varying by {limits.tiny:.1e} at least, got columns "
            f"{bad.nonzero().flatten().tolist()} outside it: choose other units, or give rows and "
            "flow in float64"
        )


def noise_network(flow: Flow) -> nn.Module:
    """Return the network for the latent noise: the present one, or one like the velocity.

    Raises:
        ValueError: If the path has no latent term.
    """
    if not flow.interpolant.has_latent():
        raise ValueError(
            f"expected an interpolant with a latent term to learn the noise, got "
            f"{type(flow.interpolant).__name__}: use Latent(...), or score(), which needs no "
            "network for a Gaussian base"
        )
    if flow.noise is not None:
        return flow.noise
    network = untrained_copy(flow.velocity)
    if network is None:
        contexts = (0, flow.classes) if flow.classes else (flow.context_dim or 0,)
        network = VelocityMLP(flow.event_dim, None, *contexts)
    return network.to(flow.loc)
