r"""Whitening from data: robust means and covariances, and the map :math:`y = m + L w` they set.

A network's scales are set with it, for they are those of whitened rows.

With means m, scales s and the correlation :math:`C = V \Lambda V^T` of columns, :math:`L = s V
\Lambda^{1/2} V^T`: whitened columns stay as near to the data's own as can be. Moments are those
of winsorized data, so that a wild row does not set the scale of all others.
"""

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from .._torch import warn_user
from ..distributions.interpolant import AnyDistribution
from ..distributions.rows import shares_of, subsample
from ..interpolants.nonlinear import Geodesic
from ..nn.velocity import explained, set_scales
from ..transforms.whitening import DenseWhitening, ScalarWhitening, Whitening
from .image_rows import IMAGE_DEVIATION, is_image
from .rows import Rows

_MIN_EIGENVALUE = 1e-12  # of a correlation, below which columns are linearly dependent
_MIN_DEVIATION = 1e-3  # a standard deviation along an eigenvector, of scaled columns
_TAIL_SHARE = 0.005  # of the values on either side, which may be outliers
_ROUNDING_SHARE = 0.1  # of the smallest deviation, beyond which rounding is warned of
_WILD_DEVIATIONS = 20.0  # robust standard deviations from the median, beyond which a value is cut
_QUARTILE_RANGE, _TAIL_RANGE = 1.349, 5.152  # in standard deviations of a normal
_QUANTILE_VALUES = 2**20  # from which quantiles are computed
_AXIS_ROWS_A_COLUMN = 4  # from which axes are: of fewer rows than columns, some have no width
_LEAST_PART = 1e-3  # of the largest weight: those of other columns are rounding or chance
_NAMED_ROWS, _NAMED_COLUMNS = 5, 20  # the most that an error names
_IMAGE_VALUES, _MIN_IMAGES = 2**22, 64  # that set the whitening of images
# That set a map by a matrix: scales to 0.2%. Of a million rows of 20 numbers, `from_samples` takes
# half the memory, five times the table's, that it takes where all of them do.
_MAP_ROWS, _MAP_ROWS_A_COLUMN = 2**18, 100
_AXIS_CUTS = 3  # the most rounds of winsorizing along the eigenvectors


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
        rows, deviation = _by_weight(rows, most).dequantized(), IMAGE_DEVIATION
    _check_range(rows.w, flow.loc.dtype)
    seen = rows if rows.weight is None else _by_weight(rows, len(rows.w))
    context = None if seen.context is None else _winsorize(seen.context.double())
    if not keep:
        distribution.space.check_rows(flow, rows.w, rows.context)
    if not keep and not isinstance(flow.interpolant, Geodesic):  # angles have a scale
        left = rows
        if context is not None:
            known = explained(flow.velocity, _winsorize(seen.w.double()), context)
            left = rows if known is None else seen._replace(w=seen.w - known.to(seen.w))
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
        start, spread = _column_moments(base.sample((len(rows.w),)))
        end, other = _column_moments(rows.w, rows.weight)
        scale = ((spread.mean() + other.mean()) / 2).sqrt()
        whitening.set_diagonal((start + end) / 2, scale.expand_as(end))
    elif isinstance(whitening, DenseWhitening):
        # Of rows with weights a few may weigh most.
        most = max(_MAP_ROWS, _MAP_ROWS_A_COLUMN * rows.w.shape[1])
        few = rows if rows.weight is not None else _by_weight(rows, most)
        found = whitening_map(few.w, few.weight, dtype=whitening.loc.dtype)
        if rows.partner is not None:
            _align(found, rows.w, rows.partner)
        whitening.set(found.loc, found.linear, found.inverse)
    else:
        if not isinstance(whitening, ScalarWhitening):  # of all columns together some may not vary
            _check_varying(rows.w)
        loc, variance = _column_moments(rows.w, rows.weight)
        whitening.set_diagonal(loc, variance.sqrt())
        whitening.set(whitening.loc, whitening.linear / deviation)  # of all columns together


def _align(whitening: DenseWhitening, rows: Tensor, partners: Tensor) -> None:
    """Turn a map so that rows lie nearest to their partners: paths must not cross."""
    w = whitening.to_white(rows)
    u, _, vh = torch.linalg.svd(w.T @ partners.double())
    turn = u @ vh
    whitening.set(whitening.loc, whitening.linear @ turn, turn.T @ whitening.inverse)


def _winsorize(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return rows with values cut at robust bounds, shape ``(N, D)``; x itself where none is cut.

    A value is cut if it is beyond 20 robust standard deviations of its column and among the 0.5%
    farthest on its side: what is far and not so rare is a mode.

    Args:
        x: Rows, shape ``(N, D)``.
        weights: Their weights, shape ``(N,)``, or None.
    """
    few = x[_quantile_rows(x, weights)]
    levels = x.new_tensor([_TAIL_SHARE, 0.25, 0.5, 0.75, 1 - _TAIL_SHARE])
    low, first, median, third, high = torch.quantile(few, levels, dim=0)
    # Where most values are one and the same, the few others tell the scale.
    deviation = torch.where(
        third > first, (third - first) / _QUARTILE_RANGE, (high - low) / _TAIL_RANGE
    )
    spread = torch.where(deviation > 0, _WILD_DEVIATIONS * deviation, torch.inf)
    low, high = torch.minimum(median - spread, low), torch.maximum(median + spread, high)
    if bool(((x >= low) & (x <= high)).all()):
        return x
    return torch.minimum(torch.maximum(x, low), high)


def _quantile_rows(x: Tensor, weights: Tensor | None, a_column: int = 0) -> Tensor:
    """Return the indices of the rows from which quantiles are computed.

    Args:
        x: Rows, shape ``(N, D)``.
        weights: Their weights, shape ``(N,)``, or None.
        a_column: How many there are at least for each column, where there are so many.
    """
    dim = x.shape[1]
    most = max(1, _QUANTILE_VALUES // dim, a_column * dim)
    return subsample(len(x), most, weights).to(x.device)


def _axes(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return centre and scale of columns, and eigenvalues and -vectors of their correlation."""
    share = shares_of(x, weights)
    loc = share @ x
    centred = x - loc
    scale = (share @ centred.square()).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)  # some of the rows may not vary
    z = centred / scale
    return loc, scale, *torch.linalg.eigh((share[:, None] * z).T @ z)


def _robust_axes(x: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the principal axes of rows, winsorized by column and then along the axes.

    Where columns nearly depend on each other, a row within bounds in each may be far out between
    them. It also turns the axes: once it is cut along them, they are better, and it is cut again.
    """
    x = _winsorize(x, weights)
    few = x[_quantile_rows(x, weights, _AXIS_ROWS_A_COLUMN)]  # by weight, where there are any
    for _ in range(_AXIS_CUTS):
        loc, scale, _, vectors = _axes(few)
        along = (few - loc) / scale @ vectors
        cut = _winsorize(along)
        if cut is along:
            break
        few = loc + scale * (cut @ vectors.T)
    along = (x - loc) / scale @ vectors
    cut = _winsorize(along, weights)
    return _axes(x if cut is along else loc + scale * (cut @ vectors.T), weights)


def whitening_map(
    x: Tensor,
    weights: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    warn: bool = True,
) -> DenseWhitening:
    """Return the affine map that whitens rows, in float64, from robust means and covariances.

    Columns are centred and scaled first, so that their units do not matter, then multiplied by the
    symmetric inverse root of their correlation: each whitened column stays as near to its own as
    can be, and the map is unique; where columns nearly depend on each other, they are scaled along
    the eigenvectors. Values beyond 20 robust standard deviations and among the 0.5% farthest on
    their side, in a column or along an eigenvector, count as if they were there: a wild row does
    not set the scale of all others.

    Args:
        x: Finite rows, shape ``(N, D)``.
        weights: Non-negative weights, shape ``(N,)``, or None.
        dtype: The type of the flow, where it is not that of the rows.
        warn: Whether to warn.

    Warns:
        UserWarning: If the columns are dependent but for little more than rounding.

    Raises:
        ValueError: If there are fewer rows than columns, a constant column, or linearly dependent
            columns.
    """
    count, dim = x.shape
    if count <= dim:
        raise ValueError(
            f"expected more rows than dimensions, got {count} rows of {dim}, not counting those "
            "held out: get more data, or drop columns; join chains first, as get_samples() does "
            "without group_by_chain"
        )
    eps, x = max(torch.finfo(kind).eps for kind in (x.dtype, dtype or x.dtype)), x.double()
    _check_varying(x)
    loc, scale, eigenvalues, vectors = _robust_axes(x, weights)
    if float(eigenvalues[0]) < _MIN_EIGENVALUE:
        shares = ", or, of shares of a whole, pass support=constraints.simplex (rows of sum 1)"
        raise ValueError(
            "expected linearly independent columns, got dependent ones (columns "
            f"{_columns_along(vectors[:, 0])} take part): drop one, or add noise of the size of "
            f"the measurement's error{shares if _are_shares(x) else ''}"
        )
    roots = eigenvalues.sqrt()
    rounding = eps * (loc.abs() + scale) / scale
    if warn:
        _warn_if_unresolved(vectors[:, 0], rounding, float(roots[0]))
    # Near dependence the eigenvectors keep the rounding of the narrow directions to themselves.
    turn = vectors if float(roots[0]) > _MIN_DEVIATION else torch.eye(dim).to(vectors)
    linear = scale[:, None] * ((vectors * roots) @ turn.T)
    found = DenseWhitening(dim).to(loc)
    found.set(loc, linear, (turn / roots) @ vectors.T / scale)
    return found


def _check_varying(x: Tensor) -> None:
    """Raise a ValueError where columns of rows, ``(N, D)``, are constant."""
    constant = (x == x[0]).all(dim=0)
    if bool(constant.any()):
        raise ValueError(
            f"expected columns that vary, got constant columns {_listed(constant)}: drop them, "
            "they have no density, or spread counts by dequantize(x)"
        )


def _columns_along(direction: Tensor) -> str:
    """Return the columns that take part in a direction, ``(D,)``, by more than chance."""
    weight = direction.abs()
    return _listed(weight > _LEAST_PART * weight.max())


def _listed(columns: Tensor) -> str:
    """Return which columns a mask, ``(D,)``, is of, the first of them where they are many."""
    found = columns.nonzero().flatten().tolist()
    more = f" and {len(found) - _NAMED_COLUMNS} more" if found[_NAMED_COLUMNS:] else ""
    return f"{found[:_NAMED_COLUMNS]}{more}"


def _are_shares(x: Tensor) -> bool:
    """Return whether rows, float64, ``(N, D)``, are nonnegative and have one and the same sum."""
    total = x.sum(1)
    return bool((x >= 0).all()) and bool((total - total[0]).abs().max() <= 1e-5 * total[0])


def _warn_if_unresolved(direction: Tensor, rounding: Tensor, spread: float) -> None:
    """Warn where data hardly vary by more than their rounding along a direction, ``(D,)``."""
    noise = float((direction * rounding).norm())
    if noise > _ROUNDING_SHARE * spread:
        columns = _columns_along(direction)
        warn_user(
            f"a combination of columns (columns {columns} take part) varies by {spread:.1e} of "
            f"their spread, and rounding is {noise:.1e}: a flow learns the rounding. Give rows "
            "and flow in float64, centre columns far from zero, drop one, or add noise of the "
            "size of the measurement's error"
        )


def _check_range(x: Tensor, dtype: torch.dtype) -> None:
    """Raise a ValueError where the type of the flow does not reach to columns, ``(N, D)``."""
    limits, (low, high) = torch.finfo(dtype), x.aminmax(dim=0)
    spread, size = high.double() - low.double(), torch.maximum(low.abs(), high.abs()).double()
    bad = ((spread < limits.tiny) & (spread > 0)) | (size > limits.max)
    if bool(bad.any()):
        raise ValueError(
            f"expected columns within the range of the flow's type {dtype}, up to "
            f"{limits.max:.1e}, and varying by {limits.tiny:.1e} at least, got columns "
            f"{_listed(bad)} outside it: choose other units, or give rows and "
            "flow in float64"
        )


def warn_if_coarse(x: Tensor, dtype: torch.dtype, name: str) -> None:
    """Warn where the flow's type is too coarse for columns that come in a finer one.

    Args:
        x: Rows, shape ``(N, D)``, as they were given.
        dtype: The type of the flow.
        name: What to call them.
    """
    eps = torch.finfo(dtype).eps
    if torch.finfo(x.dtype).eps >= eps:
        return
    loc, variance = _column_moments(x)
    spread = variance.sqrt()
    coarse = (eps * loc.abs() > _ROUNDING_SHARE * spread) & (spread > 0)
    if bool(coarse.any()):
        warn_user(
            f"columns {_listed(coarse)} of {name} lie so far from zero that "
            f"the flow's type, {dtype}, rounds away what they vary by: convert the flow first, "
            "distribution.to(torch.float64), or centre the columns"
        )


def inliers(w: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
    """Return the indices of whitened rows without outliers, shape ``(N,)``.

    Far is 20 times the median distance from the centre, rare the farthest 0.5% by weight. One such
    row would decide alone what the held-out loss is. Other rows come twice in their stead.

    Args:
        w: Whitened rows, shape ``(N, D)``.
        context: Their contexts, shape ``(N, C)``, scaled here, or None.
        weights: Their weights, shape ``(N,)``, or None.
    """
    distance = w.double().norm(dim=-1)
    if context is not None:
        loc, variance = _column_moments(context, weights)
        scaled = (context - loc) / torch.where(variance > 0, variance, 1.0).sqrt()
        distance = torch.hypot(distance, scaled.nan_to_num().norm(dim=-1))
    # The square of a placeholder such as 1e300 is infinite: a quantile beside it would be NaN.
    most = torch.finfo(distance.dtype).max
    distance = distance.nan_to_num(nan=most, posinf=most)
    few = distance[subsample(len(w), _QUANTILE_VALUES, weights).to(w.device)]
    good = distance <= torch.maximum(
        _WILD_DEVIATIONS * few.median(), few.quantile(1 - _TAIL_SHARE)
    )
    places = good.nonzero().flatten()
    return places[torch.arange(len(w), device=w.device) % len(places)]


def wild_rows(w: Tensor) -> str:
    """Return which rows lie far from all others, as a sentence; nothing where none does.

    Args:
        w: Whitened rows, shape ``(N, D)``.
    """
    distance = w.double().norm(dim=-1).nan_to_num(nan=math.inf)
    times = distance / distance.median()
    far = (times > _WILD_DEVIATIONS).nonzero().flatten()
    if len(far) == 0:
        return ""
    worst = far[times[far].argsort(descending=True)[:_NAMED_ROWS]]
    return (
        f" Far out are rows {worst.tolist()} of {len(w)}, counted from 0 among those of positive "
        f"weight: {float(times[worst[0]]):.1e} times as far from the centre as half of them. "
        "Remove them, or give them weight 0."
    )


def _column_moments(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean and variance of each column, winsorized, float64, shape ``(D,)`` each."""
    x = _winsorize(x.double(), weights)
    share = shares_of(x, weights)
    loc = share @ x
    return loc, share @ (x - loc).square()
