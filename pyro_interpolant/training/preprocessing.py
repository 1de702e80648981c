r"""What may be done to data before training: dequantisation, and the choice of a map.

Rounded values have no density: they are noticed, and can be spread over their rounding step. A map
that makes data nearer to normal is chosen where it pays: eight Gaussians are fitted to the rows
behind it, and as many without it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .._files import checksum
from ..distributions.constraints import Constraint
from ..distributions.rounding import ATOMS, REPEATED_SHARE, atoms_in
from ..distributions.rows import (
    as_tensor,
    checked_rows,
    columns_in_order,
    names_of,
    weighted_indices,
)
from ..solvers.parallel import side_by_side, threads_at_once
from ..transforms.gaussianize import (
    Gaussianized,
    Gaussianizer,
    Knots,
    MarginalTransform,
    RadialTransform,
    log_length,
    with_slopes,
)
from .whitening import inliers, whitening_map

_ULPS_PER_STEP = 1000  # units in the last place, that a rounding step must have
_EQUAL_ULPS = 1.5  # units in the last place within which values are the same
_MIN_GAIN = 0.05  # nats per row; measured in benchmarks/RESULTS.md, maps of single columns
KNOT_ROWS = 50_000  # rows that set the knots
_COMPARED_ROWS = 4000  # of them, for the comparison, or
_COMPARED_PER_DIM = 100  # times the dimension
_MOST_DIMS = 64  # dimensions: beyond, the comparison would take too long
_SPLITS = 3
_TRIMMED_SHARE = 0.01  # of the differences, on either side
_COMPONENTS = 8
_ROWS_PER_COMPONENT = 10  # times the dimension, for a component
_ITERATIONS = 20
_VARIANCE_FLOOR = 1e-5  # added to the variances of whitened rows
_KNOTS = 128
_ROWS_PER_KNOT = 100  # for a knot, on average
MIN_ROWS = 4 * _ROWS_PER_KNOT  # rows that set a map
_ROWS_BEYOND = 20  # rows beyond the outermost knots, on either side
_KNOT_GAP = 1e-7  # of the range: knots nearer to each other are one
_LENGTH_SHARE = 0.5  # of the way to the lengths of normal rows
_MIN_LENGTH_SPREAD = 1e-3  # of the logarithms of lengths: else all rows lie on one ellipsoid


def dequantize(x: ArrayLike, step: ArrayLike | None = None, *, seed: int = 0) -> Any:
    """Spread rounded or discrete values uniformly over their rounding step.

    Densities learned from the result are those of the values per step: the probability of a value
    is the mean density over its step times the step.

    Args:
        x: Rows of numbers of any type, shape ``(N, *event_shape)``, or a data frame of them.
        step: The rounding step, one or per column, shape ``event_shape``; 0 leaves a column alone.
            A series beside a data frame is taken by the names of its columns. By default the
            smallest difference between values of the column, where a tenth repeat others, or of
            whole numbers any; of a constant column the smallest of these steps, or 1 where there
            are none.
        seed: Of the noise, which depends on x too.

    Returns:
        ``x + step * (u - 1/2)`` with u uniform on [0, 1), shape ``(N, *event_shape)``, floating:
        in float64 where a shorter type could not hold it. Of a frame of pandas, one.

    Raises:
        TypeError: If x or steps are no numbers.
        ValueError: If a step is negative, not finite or of another shape, x has no rows of
            values, or, without a step, a column repeats single values beside others that do not
            repeat, which is no rounding.

    Example:
        >>> x = dequantize(torch.tensor([[1.0], [2.0], [2.0], [4.0]]))
        >>> bool(((x.round() - torch.tensor([[1.0], [2.0], [2.0], [4.0]])).abs() < 0.51).all())
        True
    """
    frame: Any = x
    given = as_tensor(x, "x")
    x = given if given.is_floating_point() else given.double()
    x = checked_rows(x, "x", (None,) * max(0, x.dim() - 1)).double()
    if step is None:
        is_real = given.is_floating_point()
        eps, share = (torch.finfo(given.dtype).eps, REPEATED_SHARE) if is_real else (0.0, 0.0)
        columns = x.detach().reshape(len(x), -1).T
        atoms = [i for i, column in enumerate(columns) if atoms_in(column)]
        if atoms:
            raise ValueError(f"expected rounded values, got columns {atoms} that {ATOMS}")
        found = torch.stack(
            [_rounding_step(column, _EQUAL_ULPS * eps, share) for column in columns]
        )
        real, constant = found[found > 0], (columns == columns[:, :1]).all(1)
        least = real.min() if len(real) else found.new_ones(())
        step = torch.where(constant, least, found).reshape(x.shape[1:])
    step = columns_in_order(step, names_of(frame), "step").to(x)
    if not bool(((step >= 0) & step.isfinite()).all()):
        raise ValueError(f"expected finite steps of at least 0, got {step.tolist()}")
    sizes = zip(reversed(step.shape), reversed(x.shape[1:]), strict=False)
    if step.dim() >= x.dim() or any(own not in (1, size) for own, size in sizes):
        raise ValueError(
            f"expected a step, or one per column, shape {tuple(x.shape[1:])}, got shape "
            f"{tuple(step.shape)}"
        )
    # Of the values too: columns that are spread one at a time would share their noise.
    generator = torch.Generator().manual_seed(checksum([x], str(seed)))
    u = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    x = (x + step * (u - 0.5)).to(_type_for(x, step, given.dtype))
    is_frame = hasattr(frame, "iloc") and bool(names_of(frame))  # of pandas
    return type(frame)(x.numpy(), frame.index, frame.columns) if is_frame else x


def _type_for(x: Tensor, step: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return a type of at least 32 bits that parts values within a step of x, ``(N, *)``."""
    default = torch.get_default_dtype()
    dtype = torch.promote_types(dtype, torch.float32) if dtype.is_floating_point else default
    ulp = torch.finfo(dtype).eps * x.detach().abs().amax(0)
    return torch.float64 if bool(((step > 0) & (step < _ULPS_PER_STEP * ulp)).any()) else dtype


def _rounding_step(column: Tensor, precision: float, share: float) -> Tensor:
    """Return the smallest gap between values, shape ``()``, 0 where they hardly repeat.

    Args:
        column: The values, shape ``(N,)``.
        precision: Relative gaps that are rounding alone.
        share: Of the values, that has to repeat others, and one at least.
    """
    values = torch.unique(column)
    if len(values) < 2 or len(values) > min((1 - share) * len(column), len(column) - 1):
        return column.new_zeros(())
    gaps, size = values.diff(), values.abs()
    # Values that arithmetic has parted by its own rounding are one.
    size = torch.maximum(size[1:], size[:-1]).clamp(min=float(size.median()))
    real = gaps > precision * size
    return gaps[real].min() if bool(real.any()) else column.new_zeros(())


def preferred_support(
    rows: Tensor,
    support: Constraint,
    weights: Tensor | None = None,
    *,
    always: bool = False,
) -> Constraint:
    """Return a support behind the map that pays, set by rows, or itself where none does.

    One pays where a mixture of eight Gaussians, fitted to the rows behind the map, has 0.05 nats
    more on held-out rows, and more than chance, than one fitted to the rows themselves, in each
    of three splits; of two, the one with more in its worst split. A map of single columns does so
    for spikes, slabs and tails of single columns; one of lengths where one scale is common to all
    columns; none for separate modes, whose shapes they would bend. Where there are fewer than
    80 D rows to fit, or D > 64, the support is returned as it is. The answer depends on the rows
    alone, and on no generator's state.

    Args:
        rows: Unconstrained rows, shape ``(N, D)``.
        support: The support they come from.
        weights: Non-negative weights, shape ``(N,)``, or None.
        always: Whether to take a map of single columns without comparing.

    Raises:
        ValueError: If a map is to be taken always, and there are too few rows to set one.
    """
    if always and len(rows) < MIN_ROWS:
        raise ValueError(
            f"expected at least {MIN_ROWS} rows for marginals=True, besides those held out, got "
            f"{len(rows)}"
        )
    few = rows[_shuffled(len(rows), weights).to(rows.device)].cpu().double()  # where maps are kept
    make = (
        marginal_transform
        if always
        else _best(few[: max(_COMPARED_ROWS, _COMPARED_PER_DIM * rows.shape[1])])
    )
    gaussianizer = None if make is None else make(few)
    return support if gaussianizer is None else Gaussianized(support, gaussianizer)


def _shuffled(count: int, weights: Tensor | None) -> Tensor:
    """Return which rows to look at, in a random order, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    if weights is None:
        return torch.randperm(count, generator=generator)[:KNOT_ROWS]
    return weighted_indices(weights.cpu(), min(count, KNOT_ROWS), generator)


def _best(rows: Tensor) -> Callable[[Tensor], Gaussianizer | None] | None:
    """Return what makes the map that pays most, or None."""
    if rows.shape[1] > _MOST_DIMS:
        return None
    try:
        whitener = whitening_map(rows, warn=False)  # the fit does
        rows = rows[inliers(whitener.to_white(rows))]
        # Rows that repeat, as a Markov chain's or weighted ones do, are held out together.
        part = torch.unique(rows, dim=0, return_inverse=True)[1] % 10
        gains = dict.fromkeys((marginal_transform, radial_transform), math.inf)
        for i in range(_SPLITS):
            kept, held = rows[part != i], rows[part == i]
            if len(kept) < _COMPONENTS * _ROWS_PER_COMPONENT * rows.shape[1]:
                return None
            plain = _mixture(kept, held)
            for make, gain in list(gains.items()):
                gains[make] = min(gain, _gain(make, kept, held, plain))
            gains = {make: gain for make, gain in gains.items() if gain > 0}
            if not gains:
                break
    except (ValueError, torch.linalg.LinAlgError):  # columns that the fit refuses, and says why
        return None
    return max(gains, key=lambda make: gains[make], default=None)


def _gain(
    make: Callable[[Tensor], Gaussianizer | None], kept: Tensor, held: Tensor, plain: Tensor
) -> float:
    """Return the mean nats per held-out row gained behind a map, 0 if it might be chance.

    Args:
        make: From rows to a map.
        kept: Rows to set the map by and to fit eight Gaussians to, shape ``(N, D)``.
        held: Rows held out, shape ``(M, D)``.
        plain: Their log-densities without a map, shape ``(M,)``.
    """
    gaussianizer = make(kept)
    if gaussianizer is None:
        return 0.0
    u = gaussianizer.inv(held)
    try:
        behind = _mixture(gaussianizer.inv(kept), u) - gaussianizer.log_abs_det_jacobian(u, held)
    except (ValueError, torch.linalg.LinAlgError):  # columns that depend on each other there
        return 0.0
    gain = (behind - plain).sort().values
    gain = gain[int(_TRIMMED_SHARE * len(gain)) : math.ceil((1 - _TRIMMED_SHARE) * len(gain))]
    chance = 2 * float(gain.std()) / math.sqrt(len(gain))
    return float(gain.mean()) if float(gain.mean()) > max(_MIN_GAIN, chance) else 0.0


def _mixture(kept: Tensor, held: Tensor) -> Tensor:
    """Return held-out log-densities, shape ``(M,)``, of a Gaussian mixture fitted by EM."""
    whitener = whitening_map(kept, warn=False)
    x, dim = whitener.to_white(kept), kept.shape[1]
    nearest = torch.cdist(x, x[:_COMPONENTS]).argmin(1)
    shares = torch.nn.functional.one_hot(nearest, _COMPONENTS).T.to(x)
    # One component at a time on each core: all at once would leave the cache.
    of_each = partial(side_by_side, threads=threads_at_once() if x.is_cpu else 1)

    def covariance(loc: Tensor, share: Tensor) -> Tensor:
        centred = (x - loc) * share.sqrt()[:, None]
        return centred.T @ centred

    def joint(w: Tensor) -> Tensor:
        def square(loc: Tensor, inverse: Tensor) -> Tensor:
            return ((w - loc) @ inverse).square().sum(1)

        inverses = torch.linalg.inv(roots).mT
        squares = torch.stack(of_each(square, zip(locs, inverses, strict=True)))
        volume = roots.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * dim * math.log(2 * math.pi)
        return (logits - volume)[:, None] - 0.5 * squares

    for _ in range(_ITERATIONS):
        total = shares.sum(1, keepdim=True).clamp(min=1.0)
        logits, shares = (total / total.sum()).log()[:, 0], shares / total
        locs = shares @ x
        covs = torch.stack(of_each(covariance, zip(locs, shares, strict=True)))
        roots = torch.linalg.cholesky(covs + _VARIANCE_FLOOR * torch.eye(dim).to(x))
        shares = joint(x).softmax(0)
    log_density = joint(whitener.to_white(held)).logsumexp(0)
    return log_density - whitener.log_det


def marginal_transform(rows: Tensor) -> MarginalTransform | None:
    """Return the map of which each column is normal, or None of few rows or constant columns.

    Values that repeat count as spread over the way to their neighbours.

    Args:
        rows: Rows, shape ``(N, D)``, on the CPU.
    """
    if len(rows) < MIN_ROWS or bool((rows == rows[0]).all(0).any()):
        return None
    found = [quantile_knots(column) for column in rows.double().T]
    count = max(len(x) for x, _ in found)
    padded = [_padded(*with_slopes(x, y), count) for x, y in found]
    return MarginalTransform(*(torch.stack(part) for part in zip(*padded, strict=True)))


def quantile_knots(column: Tensor) -> tuple[Tensor, Tensor]:
    """Return knots in the data and among normal values, each of shape ``(K,)``, K >= 2."""
    total = len(column)
    values, repeats = torch.unique(column, return_counts=True)
    levels = (repeats.cumsum(0) - 0.5 * repeats.to(values)) / total
    count = min(_KNOTS, total // _ROWS_PER_KNOT)
    end = min(_ROWS_BEYOND, total // 20) / total
    # Denser toward the tails, as the arcsine is that makes all proportions equally uncertain.
    angle = math.asin(math.sqrt(end))
    turns = torch.linspace(angle, math.pi / 2 - angle, count, dtype=levels.dtype)
    wanted = turns.sin().square()
    places = torch.searchsorted(levels, wanted).clamp(max=len(values) - 1).unique()
    if len(places) < 2:
        places = torch.tensor([0, len(values) - 1])
    x, y = values[places], torch.special.ndtri(levels[places])
    far = torch.cat((x.new_ones(1, dtype=torch.bool), x.diff() > _KNOT_GAP * (x[-1] - x[0])))
    return x[far], y[far]


def _padded(x: Tensor, y: Tensor, slopes: Tensor, count: int) -> Knots:
    """Return as many knots as are wanted: more of them on the straight line beyond the last."""
    more = torch.arange(1, count - len(x) + 1, dtype=x.dtype) * (x[-1] - x[0])
    return (
        torch.cat((x, x[-1] + more)),
        torch.cat((y, y[-1] + slopes[-1] * more)),
        torch.cat((slopes, slopes[-1].expand(len(more)))),
    )


def radial_transform(rows: Tensor) -> RadialTransform | None:
    """Return the map that brings rows half-way to normal lengths.

    None where rows are few or have all the same length.

    Args:
        rows: Rows, shape ``(N, D)``, on the CPU.

    Raises:
        ValueError: If their moments are not those of a density.
    """
    dim = rows.shape[1]
    if len(rows) < MIN_ROWS or dim < 2:
        return None
    whitener = whitening_map(rows.double(), warn=False)  # who chooses the map does
    length = log_length(whitener.to_white(rows))[:, 0]
    if float(length.max() - length.min()) < _MIN_LENGTH_SPREAD:
        return None
    x, normal = quantile_knots(length)
    from scipy.special import gammaincinv  # slow to import

    squares = 2 * gammaincinv(0.5 * dim, torch.special.ndtr(normal).numpy())  # chi-squared
    full = 0.5 * torch.from_numpy(squares).log()
    x, y, slopes = with_slopes(x, torch.lerp(x, full, _LENGTH_SHARE))
    slopes[0] = 1.0
    # Where lengths end abruptly the last chord is steep, 20 for modes on a circle: lengths beyond
    # would be raised to that power, and densities be NaN a few deviations on. They grow in
    # proportion there, and tails are a Gaussian's.
    slopes[-1] = slopes[-1].clamp(max=1.0)
    return RadialTransform(whitener.loc, whitener.linear, x[None], y[None], slopes[None])
