"""Pictures of a flow: its paths, its densities, its velocity, its interpolant."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .._package import check_ranges, whole
from ..diffusion.sde import to_values
from ..distributions.constraints import shaped
from ..distributions.interpolant import (
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
    check_has_context,
)
from ..distributions.joint import ConditionalJointInterpolantDistribution
from ..distributions.rows import RowsLike, check_same_order, in_order
from ..distributions.supports import CircularSupport
from ..interpolants.linear import Interpolant
from ..nn.velocity import evaluate
from ..solvers.ode import FixedGrid
from ..transforms.gaussianize import Gaussianized
from .axes import (
    DATA_COLOR,
    MODEL_COLOR,
    THIRD_COLOR,
    as_points,
    axes_array,
    extent_of,
    new_axes,
    shares,
)
from .tables import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_EXTENT_SAMPLES = 2000
_ARROWS_PER_AXIS = 15


def trajectories(
    distribution: InterpolantDistribution,
    *,
    count: int = 100,
    steps: int = 64,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw paths from base to data: against time in one dimension, else in the first two.

    Args:
        distribution: A flow.
        count: The number of paths.
        steps: The number of times along each.
        ax: Axes, or None for new ones.

    Raises:
        ValueError: If it is a batch of flows, or ``count`` or ``steps`` is below 1.
    """
    check_ranges(whole("count", count, 1), whole("steps", steps, 1))
    _check_single(distribution)
    ax = new_axes(ax)
    times, paths = _paths(distribution, int(count), steps)
    if paths.shape[-1] == 1:
        ax.plot(times, paths[..., 0], color=MODEL_COLOR, alpha=0.35, linewidth=0.8)
        ax.set(xlabel="time", ylabel="$x$")
        return ax
    x, y = paths[..., 0], paths[..., 1]
    ax.plot(x, y, color=THIRD_COLOR, alpha=0.35, linewidth=0.8, zorder=1)
    ax.scatter(x[0], y[0], s=8, color=DATA_COLOR, label="base", zorder=2)
    ax.scatter(x[-1], y[-1], s=8, color=MODEL_COLOR, label="model", zorder=3)
    ax.set(xlabel="$x_1$", ylabel="$x_2$")
    ax.legend(frameon=False)
    return ax


def density(
    distribution: InterpolantDistribution,
    *,
    extent: Sequence[float] | None = None,
    points: int = 120,
    velocity: bool = False,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the density of a flow in one or two dimensions, at the time it stops at.

    Args:
        distribution: A flow, perhaps stopped by ``at(t)``.
        extent: ``(low, high)`` in one dimension, ``(left, right, bottom, top)`` in two; by
            default that of samples.
        points: Of the grid, per dimension.
        velocity: Whether to draw the velocity at that time too, in two dimensions.
        ax: Axes, or None for new ones.

    Raises:
        ValueError: If the flow has more than two dimensions, or fewer than its events, it is a
            batch of flows, or ``extent`` or ``points`` cannot be.
    """
    _check_single(distribution)
    dim = distribution.event_shape.numel()
    if dim > 2:
        raise ValueError(f"expected one or two dimensions, got {dim}: use corner")
    if dim > distribution.transform.flow.event_dim:
        raise ValueError(
            f"expected a density in the plane, got one on a line in it, {distribution.constraint}:"
            " use corner"
        )
    box = _extent(distribution) if extent is None else tuple(extent)
    is_box = len(box) == 2 * dim and all(a < b for a, b in zip(box[::2], box[1::2], strict=True))
    wanted = f"extent of {dim} ascending pairs of bounds, one per dimension"
    check_ranges((wanted, is_box, box), whole("points", points, 2))
    ax = new_axes(ax)
    lines = [_line(a, b, points) for a, b in zip(box[::2], box[1::2], strict=True)]
    grid = torch.stack(torch.meshgrid(*lines, indexing="xy"), dim=-1)
    value = _on_support(distribution, grid, lambda x: distribution.log_prob(x).exp()[..., None], 0)
    axes = [line.numpy() for line in lines]
    if dim == 1:
        ax.plot(axes[0], value[..., 0], color=MODEL_COLOR)
        ax.set(xlabel="$x$", ylabel="density")
        return ax
    ax.pcolormesh(*axes, value[..., 0], shading="gouraud", cmap="magma_r", rasterized=True)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", xlim=box[:2], ylim=box[2:])
    if velocity:
        every = slice(None, None, max(1, int(points) // _ARROWS_PER_AXIS))
        coarse = grid[every, every]
        v = _on_support(distribution, coarse, partial(_velocity, distribution), math.nan)
        ax.quiver(*coarse.permute(2, 0, 1), *v.transpose(2, 0, 1), color=THIRD_COLOR, width=4e-3)
    return ax


def evolution(
    distribution: InterpolantDistribution,
    times: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    velocity: bool = True,
    ax: "Sequence[Axes] | np.ndarray | None" = None,
) -> "Sequence[Axes] | np.ndarray":
    """Draw the density of a flow in one or two dimensions at several times, side by side.

    Args:
        distribution: A flow.
        times: Times in [0, 1].
        velocity: Whether to draw the velocity, in two dimensions.
        ax: One axes per time, or None for new ones.

    Raises:
        ValueError: As :func:`density`, or if there are no times, or not as many axes.
    """
    check_ranges(
        ("at least one time", len(times) > 0, times),
        ("as many axes as times", ax is None or np.asarray(ax).shape == (len(times),), ax),
    )
    _check_single(distribution)
    if ax is None:
        ax = axes_array(1, len(times), (2.6 * len(times), 2.8))[0]
    views = [distribution.at(t) for t in times]
    boxes = torch.tensor([_extent(view) for view in views], dtype=torch.float64)
    least, most = boxes[:, ::2].amin(0), boxes[:, 1::2].amax(0)
    extent = torch.stack((least, most), 1).flatten().tolist()
    for one, t, view in zip(ax, times, views, strict=True):
        density(view, extent=extent, velocity=velocity, ax=one)
        one.set(title=f"$t = {t:g}$", xlabel="", ylabel="")
        if len(extent) > 2:
            one.set(aspect="equal")
    return ax


def coefficients(interpolant: Interpolant, *, ax: "Axes | None" = None) -> "Axes":
    """Draw the coefficients of a linear interpolant against time.

    Args:
        interpolant: One with scalar coefficients.
        ax: Axes, or None for new ones.

    Raises:
        TypeError: If the interpolant has none.
    """
    t = torch.linspace(0.0, 1.0, 201)
    values = interpolant.coefficients(t)
    ax = new_axes(ax)
    names = (r"$\alpha$, base", r"$\beta$, data", r"$\gamma$, noise")
    for value, name, color in zip(
        values, names, (DATA_COLOR, MODEL_COLOR, THIRD_COLOR), strict=True
    ):
        if bool((value != 0).any()):
            ax.plot(t.numpy(), value.detach().numpy(), label=name, color=color)
    ax.set(xlabel="time", ylabel="coefficient")
    ax.legend(frameon=False)
    return ax


def conditional(
    distribution: ConditionalInterpolantDistribution,
    context: ArrayLike,
    *,
    column: int = 0,
    data: tuple[RowsLike, ArrayLike] | None = None,
    levels: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
    points: int = 120,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the density of a scalar, and its quantiles, along contexts of which one column varies.

    Args:
        distribution: A conditional flow in one dimension; of a named site its values are drawn.
        context: Contexts, shape ``(K, C)`` or ``(K,)`` where C = 1, in any order. Where the flow
            was trained on a data frame of contexts, the columns of another are taken by their
            names.
        column: Which one varies, as they are given.
        data: Outcomes, shape ``(N,)`` or ``(N, 1)``, or by name, and their contexts, to draw as
            points. Where both contexts have names, columns are taken by them.
        levels: Of the quantiles.
        points: Of the grid of outcomes.
        ax: Axes, or None for new ones.

    Raises:
        ValueError: If the flow has more than one dimension, contexts do not differ in the column,
            a data frame of them has other columns, or outcomes and contexts their rows in
            another order, or a setting cannot work.
    """
    check_ranges(shares(levels), whole("points", points, 2))
    if not isinstance(distribution, ConditionalInterpolantDistribution):
        raise TypeError(
            "expected a ConditionalInterpolantDistribution, whose contexts are given beside it, "
            f"got {type(distribution).__name__}"
        )
    flow = distribution.transform.flow
    if flow.event_dim > 1:
        raise ValueError(
            f"expected outcomes in one dimension, got {flow.event_dim}: use "
            "corner(distribution.condition(context), data)"
        )
    contexts, names = table(context)
    width = contexts.shape[1]
    check_ranges((f"column from 0 to {width - 1}", column in range(-width, width), column))
    contexts = contexts[contexts[:, column].argsort()]  # else lines would run to and fro
    along = contexts[:, column]
    varies = bool(along[0] < along[-1])
    check_ranges((f"contexts that differ in column {column}", varies, f"{along[0]:g} alone"))
    names = names or distribution.context_columns
    taken = in_order(torch.as_tensor(contexts), names, distribution.context_columns, "context")
    shown = None if data is None else _points(data, names, column, width)
    given = _of_values(distribution).condition(taken.to(flow.loc))
    ends = min((0.005, *levels)), max((0.995, *levels))
    q = torch.tensor([ends[0], *levels, ends[1]])[:, None].to(flow.loc)
    with torch.no_grad():
        lines = given.icdf(q.expand(-1, len(along))).reshape(len(q), -1)
        values = _line(float(lines[0].min()), float(lines[-1].max()), points).to(lines)
        grid = values[:, None].expand(-1, len(along))
        density = given.log_prob(grid.reshape(*grid.shape, *given.event_shape)).exp()
    heights, ax = density.cpu().numpy(), new_axes(ax)
    ax.pcolormesh(along, values.cpu().numpy(), heights, shading="gouraud", cmap="magma_r")
    if shown is not None:
        x, y = shown.T
        ax.scatter(x, y, s=3, color=DATA_COLOR, linewidths=0, label="data")
    for i, (level, line) in enumerate(zip(levels, lines[1:-1].cpu().numpy(), strict=True)):
        name = ", ".join(f"{100 * x:g}%" for x in levels) if i == 0 else None
        width = 1.6 if level == 0.5 else 0.8
        ax.plot(along, line, color=THIRD_COLOR, linewidth=width, label=name)
    ax.set(xlabel="context", ylabel="$x$", ylim=(float(values[0]), float(values[-1])))
    ax.set_xlim(along.min(), along.max())
    ax.legend(frameon=False)
    return ax


def _points(
    data: tuple[RowsLike, ArrayLike], names: Sequence[str], column: int, width: int
) -> np.ndarray:
    """Return a column of contexts and outcomes, to show as points, shape ``(*, 2)``.

    Args:
        data: Outcomes, shape ``(N, 1)``, and their contexts, shape ``(N, C)``.
        names: The names of the columns of contexts, or none.
        column: Which one.
        width: Their number C.
    """
    check_same_order(y=data[0], context=data[1])
    y, c = table(data[0])[0], table(data[1], names)[0]
    wanted = f"data of shapes (N, 1) and (N, {width}), outcomes and contexts"
    check_ranges((wanted, (*y.shape, *c.shape) == (len(c), 1, len(y), width), (y.shape, c.shape)))
    return as_points(np.stack((c[:, column], y[:, 0]), 1))


def _of_values(
    distribution: ConditionalInterpolantDistribution,
) -> ConditionalInterpolantDistribution:
    """Return the density of a named site's values, where it is one of packed vectors."""
    if not isinstance(distribution, ConditionalJointInterpolantDistribution):
        return distribution
    (site,) = distribution.sites.values()
    support = shaped(site[1], site[0])
    if isinstance(distribution.constraint, Gaussianized):
        support = Gaussianized(support, distribution.constraint.gaussianizer)
    base = distribution.base
    return ConditionalInterpolantDistribution(distribution.transform, base, support=support)


def _paths(
    distribution: InterpolantDistribution, count: int, steps: int
) -> tuple[np.ndarray, ...]:
    """Return times and points of paths, shape ``(S, count, D)``, in data coordinates.

    Of angles, NaN is between two points that are on two sides of the seam.
    """
    flow = distribution.transform.flow
    with torch.no_grad():
        path = replace(distribution.transform.path(), solver=FixedGrid(steps))
        w = distribution.white_draws((count,))
        x = to_values(distribution, flow.integrate(w, path, forward=True))
    x, times = x.reshape(*x.shape[:2], -1), path.times[0]
    if isinstance(distribution.space, CircularSupport):
        crosses = (x.diff(dim=0).abs() > math.pi).any(-1)
        times, x = (_with_middles(part) for part in (times, x))
        x[1::2][crosses] = math.nan
    return times.numpy(), x.cpu().numpy()


def _with_middles(x: Tensor) -> Tensor:
    """Return points, shape ``(S, *)``, and the middles between them, shape ``(2 S - 1, *)``."""
    found = x.repeat_interleave(2, dim=0)[:-1]
    found[1::2] = (x[1:] + x[:-1]) / 2
    return found


def _extent(distribution: InterpolantDistribution) -> tuple[float, ...]:
    """Return the bounds of samples, those of each dimension in turn."""
    x = distribution.sample((_EXTENT_SAMPLES,))
    return extent_of(x.reshape(len(x), -1).double().cpu().numpy())


def _line(low: float, high: float, points: int) -> Tensor:
    """Return evenly spaced values, shape ``(points,)``, which any type of a flow can be made of.

    Torch's default type may not part values that lie far from zero.
    """
    return torch.linspace(low, high, int(points), dtype=torch.float64)


def _on_support(
    distribution: InterpolantDistribution,
    grid: Tensor,
    function: Callable[[Tensor], Tensor],
    outside: float,
) -> np.ndarray:
    """Return a function at points of a grid, shape ``(*, K)``.

    Args:
        distribution: The flow, whose support it is.
        grid: Points, shape ``(*, D)``.
        function: A function from values, ``(N, *event_shape)``, to ``(N, K)``.
        outside: What to return beyond the support.
    """
    x = grid.to(distribution.transform.flow.loc).reshape(-1, *distribution.event_shape)
    inside = distribution.support.check(x)
    with torch.no_grad():
        found = function(x[inside])
    values = found.new_full((len(x), found.shape[-1]), outside)
    values[inside] = found
    return values.reshape(*grid.shape[:-1], -1).cpu().numpy()


def _check_single(distribution: InterpolantDistribution) -> None:
    """Raise a ValueError for a batch of flows, a TypeError for one without its context."""
    check_has_context(distribution)
    if distribution.batch_shape:
        raise ValueError(
            f"expected one flow, got a batch of shape {tuple(distribution.batch_shape)}: draw one "
            "of them, such as that given one context, of shape (C,)"
        )


def _velocity(distribution: InterpolantDistribution, x: Tensor) -> Tensor:
    """Return the velocity of values, shape ``(N, D)``, at the time the flow stops at.

    Args:
        distribution: The flow.
        x: Values, shape ``(N, *event_shape)``.
    """
    transform = distribution.transform
    flow = transform.flow
    t = torch.tensor(transform.end).to(x)
    # On the edge of a support, too, where values have no place that is finite, and do not move.
    real = x if distribution.space.is_real() else distribution.transforms[-1].inv(x).to(x)
    w = flow.whitening.to_white(real)
    v = evaluate(flow.velocity, t, w, transform.context)
    return torch.func.jvp(partial(to_values, distribution), (w,), (v,))[1].reshape(len(x), -1)
