r"""Plots of flows by matplotlib (extra ``[plot]``), which the first plot imports.

Every function draws on the axes it is given, or on new ones, and returns them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from .distributions.constraints import as_tensor
from .distributions.interpolant import (
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
)
from .distributions.joint import JointInterpolantDistribution
from .interpolants.linear import Interpolant
from .nn.velocity import evaluate
from .solvers.ode import FixedGrid
from .transforms.gaussianize import Gaussianized

if TYPE_CHECKING:
    from matplotlib.axes import Axes


__all__ = [
    "coefficients",
    "conditional",
    "corner",
    "coverage_curve",
    "density",
    "evolution",
    "predictive_check",
    "rank_histogram",
    "ranks",
    "training_curve",
    "trajectories",
]

_DATA_COLOR, _MODEL_COLOR, _THIRD_COLOR = "#4c566a", "#d1495b", "#2a9d8f"
_EXTENT_SAMPLES = 2000
_SCATTER_POINTS = 4000
_ARROWS_PER_AXIS = 15
_CONTOUR_BINS = 60  # per axis
_NORMAL_99 = 2.576  # standard deviations, of a bar
_BESIDE: Any = {"frameon": False, "fontsize": 8, "loc": "upper left", "bbox_to_anchor": (1, 1)}


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
    """
    ax = _axes(ax)
    times, paths = _paths(distribution, count, steps)
    if paths.shape[-1] == 1:
        ax.plot(times, paths[..., 0], color=_MODEL_COLOR, alpha=0.35, linewidth=0.8)
        ax.set(xlabel="time", ylabel="$x$")
        return ax
    x, y = paths[..., 0], paths[..., 1]
    ax.plot(x, y, color=_THIRD_COLOR, alpha=0.35, linewidth=0.8, zorder=1)
    ax.scatter(x[0], y[0], s=8, color=_DATA_COLOR, label="base", zorder=2)
    ax.scatter(x[-1], y[-1], s=8, color=_MODEL_COLOR, label="model", zorder=3)
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
        ValueError: If the flow has more than two dimensions.
    """
    dim = distribution.event_shape[-1]
    if dim > 2:
        raise ValueError(f"expected one or two dimensions, got {dim}: use corner")
    ax = _axes(ax)
    box = _extent(distribution.sample((_EXTENT_SAMPLES,))) if extent is None else tuple(extent)
    lines = [torch.linspace(a, b, points) for a, b in zip(box[::2], box[1::2], strict=True)]
    grid = torch.stack(torch.meshgrid(*lines, indexing="xy"), dim=-1)
    grid = grid.to(distribution.transform.flow.loc)
    with torch.no_grad():
        value = distribution.log_prob(grid).exp().cpu().numpy()
    axes = [line.numpy() for line in lines]
    if dim == 1:
        ax.plot(axes[0], value, color=_MODEL_COLOR)
        ax.set(xlabel="$x$", ylabel="density")
        return ax
    ax.pcolormesh(*axes, value, shading="gouraud", cmap="magma_r", rasterized=True)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", xlim=box[:2], ylim=box[2:])
    if velocity:
        coarse = grid[:: points // _ARROWS_PER_AXIS, :: points // _ARROWS_PER_AXIS]
        v = _velocity(distribution, coarse).cpu()
        ax.quiver(
            *coarse.cpu().numpy().transpose(2, 0, 1),
            *v.numpy().transpose(2, 0, 1),
            color=_THIRD_COLOR,
            width=4e-3,
        )
    return ax


def evolution(
    distribution: InterpolantDistribution,
    times: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    velocity: bool = True,
    ax: "Sequence[Axes] | np.ndarray | None" = None,
) -> "Sequence[Axes] | np.ndarray":
    """Draw density and velocity of a two-dimensional flow at several times, side by side.

    Args:
        distribution: A flow.
        times: Times in [0, 1].
        velocity: Whether to draw the velocity.
        ax: One axes per time, or None for new ones.
    """
    if ax is None:
        ax = _axes_array(1, len(times), (2.6 * len(times), 2.8))[0]
    views = [distribution.at(t) for t in times]
    boxes = torch.tensor([_extent(view.sample((_EXTENT_SAMPLES,))) for view in views])
    extent = [
        float(f(column)) for f, column in zip((min, max, min, max), boxes.T.tolist(), strict=True)
    ]
    for one, t, view in zip(ax, times, views, strict=True):
        density(view, extent=extent, velocity=velocity, ax=one)
        one.set(title=f"$t = {t:g}$", xlabel="", ylabel="", aspect="equal")
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
    ax = _axes(ax)
    names = (r"$\alpha$, base", r"$\beta$, data", r"$\gamma$, noise")
    for value, name, color in zip(
        values, names, (_DATA_COLOR, _MODEL_COLOR, _THIRD_COLOR), strict=True
    ):
        if bool((value != 0).any()):
            ax.plot(t.numpy(), value.detach().numpy(), label=name, color=color)
    ax.set(xlabel="time", ylabel="coefficient")
    ax.legend(frameon=False)
    return ax


def training_curve(result: Any, *, ax: "Axes | None" = None) -> "Axes":
    """Draw the losses of a run against its steps, and the step of the kept weights.

    Args:
        result: A :class:`~pyro_interpolant.training.FitResult`.
        ax: Axes, or None for new ones.
    """
    ax = _axes(ax)
    ax.plot(result.steps, result.losses, color=_DATA_COLOR, linewidth=1, label="training")
    ax.plot(result.steps, result.validation_losses, color=_MODEL_COLOR, label="held out")
    ax.axvline(result.best_step, color=_THIRD_COLOR, linestyle=":", label="kept")
    ax.set(xlabel="step", ylabel="loss $G$")
    ax.legend(frameon=False)
    return ax


def ranks(check: Any, *, ax: "Axes | None" = None) -> "Axes":
    """Draw how far numbers that should be uniform are from it, with the 99% band.

    Args:
        check: A :class:`~pyro_interpolant.diagnostics.CalibrationCheck`.
        ax: Axes, or None for new ones.
    """
    ax = _axes(ax)
    count = len(check.values)
    shares = np.repeat(np.arange(count + 1), 2)[1:-1] / count  # on both sides of each step
    for values, name in zip(check.values.T, check.names, strict=True):
        u = values.sort().values.repeat_interleave(2).numpy()
        ax.plot(u, shares - u, linewidth=1, label=name)
    ax.axhspan(-check.band, check.band, color=_DATA_COLOR, alpha=0.15, linewidth=0, label="99%")
    ax.set(xlabel="$u$", ylabel="share below $u$, less $u$", xlim=(0, 1))
    ax.legend(**_BESIDE, ncols=1 + len(check.names) // 20)
    return ax


def rank_histogram(check: Any, *, bins: int = 20, ax: "Axes | None" = None) -> "Axes":
    """Draw the histogram of numbers that should be uniform, with the 99% band of a bar.

    Args:
        check: A :class:`~pyro_interpolant.diagnostics.CalibrationCheck`.
        bins: The number of bars.
        ax: Axes, or None for new ones.
    """
    ax = _axes(ax)
    count, quantities = check.values.shape
    for values, name in zip(check.values.T.cpu().numpy(), check.names, strict=True):
        heights, edges = np.histogram(values, bins, (0, 1), density=True)
        ax.stairs(heights, edges, baseline=0, label=name, fill=quantities == 1, alpha=0.7)
    half = _NORMAL_99 * _chance(check) * np.sqrt((bins - 1) / count)
    ax.axhspan(1 - half, 1 + half, color=_DATA_COLOR, alpha=0.15, linewidth=0, label="99%")
    ax.axhline(1, color=_DATA_COLOR, linewidth=0.8)
    ax.set(xlabel="$u$", ylabel="density", xlim=(0, 1))
    ax.legend(frameon=False)
    return ax


def coverage_curve(check: Any, *, ax: "Axes | None" = None) -> "Axes":
    """Draw the share of rows within central regions against the probability of these.

    The curve of a calibrated density is the diagonal; with the 99% band that holds for all of it.

    Args:
        check: A :class:`~pyro_interpolant.diagnostics.CalibrationCheck`. Of
            :func:`~pyro_interpolant.diagnostics.coverage` and ``tarp`` regions are those of the
            check; of ``pit`` and ``sbc`` intervals in the middle of each quantity.
        ax: Axes, or None for new ones.
    """
    ax = _axes(ax)
    count = len(check.values)
    levels = np.linspace(0, 1, 201)
    shares = np.append(np.arange(count + 1) / count, 1)
    ax.fill_between(
        levels, np.clip(levels - check.band, 0, 1), np.clip(levels + check.band, 0, 1),
        color=_DATA_COLOR, alpha=0.15, linewidth=0, label="99%",
    )  # fmt: skip
    for values, name in zip(check.values.T, check.names, strict=True):
        inside = values if "regions" in name else (2 * values - 1).abs()
        edges = np.concatenate(([0], inside.sort().values.cpu().numpy(), [1]))
        ax.step(edges, shares, where="post", linewidth=1, label=name)
    ax.plot((0, 1), (0, 1), color=_DATA_COLOR, linewidth=0.8)
    ax.set(xlabel="probability of the region", ylabel="share of rows inside")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.legend(**_BESIDE, ncols=1 + len(check.names) // 20)
    return ax


def conditional(
    distribution: ConditionalInterpolantDistribution,
    context: Any,
    *,
    column: int = 0,
    data: tuple[Any, Any] | None = None,
    levels: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
    points: int = 120,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw the density of a scalar, and its quantiles, along contexts of which one column varies.

    Args:
        distribution: A conditional flow in one dimension.
        context: Contexts, shape ``(K, C)`` or ``(K,)`` where C = 1, ascending in one column.
        column: Which one that is.
        data: Outcomes, shape ``(N,)`` or ``(N, 1)``, and their contexts, to draw as points.
        levels: Of the quantiles.
        points: Of the grid of outcomes.
        ax: Axes, or None for new ones.

    Raises:
        ValueError: If the flow has more than one dimension.
    """
    flow = distribution.transform.flow
    if flow.event_dim > 1:
        raise ValueError(
            f"expected outcomes in one dimension, got {flow.event_dim}: use "
            "corner(distribution.condition(context), data)"
        )
    ax = _axes(ax)
    contexts, _ = _table(context)
    given = distribution.condition(torch.as_tensor(contexts).to(flow.loc))
    along = contexts[:, column]
    q = torch.tensor([0.005, *levels, 0.995])[:, None].to(flow.loc)
    with torch.no_grad():
        lines = given.icdf(q.expand(-1, len(along))).reshape(len(q), -1)
        values = torch.linspace(float(lines[0].min()), float(lines[-1].max()), points).to(lines)
        grid = values[:, None].expand(-1, len(along))
        density = given.log_prob(grid.reshape(*grid.shape, *given.event_shape)).exp()
    heights = density.cpu().numpy()
    ax.pcolormesh(along, values.cpu().numpy(), heights, shading="gouraud", cmap="magma_r")
    if data is not None:
        y, c = (_table(part)[0][:_SCATTER_POINTS] for part in data)
        ax.scatter(c[:, column], y[:, 0], s=3, color=_DATA_COLOR, linewidths=0, label="data")
    for i, (level, line) in enumerate(zip(levels, lines[1:-1].cpu().numpy(), strict=True)):
        name = ", ".join(f"{100 * x:g}%" for x in levels) if i == 0 else None
        width = 1.6 if level == 0.5 else 0.8
        ax.plot(along, line, color=_THIRD_COLOR, linewidth=width, label=name)
    ax.set(xlabel="context", ylabel="$x$", ylim=(float(values[0]), float(values[-1])))
    ax.set_xlim(along.min(), along.max())
    ax.legend(frameon=False)
    return ax


def predictive_check(y: Tensor, simulated: Tensor, *, ax: "Axes | None" = None) -> "Axes":
    """Draw the ordered values of data beside the middle 95% of those simulated from a posterior.

    Args:
        y: The data, shape ``(*)``.
        simulated: Data of ``Predictive``, shape ``(S, *)``.
        ax: Axes, or None for new ones. Data of other shapes raise a ValueError.
    """
    if simulated.shape[1:] != y.shape:
        want, got = tuple(y.shape), tuple(simulated.shape)
        raise ValueError(f"expected simulated data of shape (S, *{want}), got {got}")
    ax, ordered = _axes(ax), simulated.detach().double().cpu().flatten(1).sort(1).values
    low, high = ordered.quantile(ordered.new_tensor([0.025, 0.975]), dim=0).numpy()
    places, values = np.linspace(0, 1, len(low)), y.detach().cpu().flatten().sort().values
    ax.fill_between(places, low, high, color=_MODEL_COLOR, alpha=0.25, label="simulated, 95%")
    ax.plot(places, values, ".", color=_DATA_COLOR, markersize=4, label="data")
    ax.set(xlabel="share of the data below", ylabel="value")
    ax.legend(frameon=False)
    return ax


def corner(
    samples: Any,
    data: Any,
    *,
    names: Sequence[str] | None = None,
    levels: Sequence[float] = (0.5, 0.9),
    count: int = 4000,
    ax: np.ndarray | None = None,
) -> np.ndarray:
    """Compare samples with data: histograms on the diagonal, contours of pairs of columns below.

    Contours enclose shares of the rows. All axes of a column have the same limits, those of both
    sets but for the farthest 0.5% on each side.

    Args:
        samples: Samples, shape ``(M, D)``, a data frame or draws by name; or a distribution to
            draw ``count`` from.
        data: Rows, shape ``(N, D)``, a data frame or draws by name.
        names: One per column; by default those of the data.
        levels: The shares that contours enclose.
        count: The number of samples to draw.
        ax: An array of D x D axes, or None for new ones.
    """
    if isinstance(samples, JointInterpolantDistribution) and isinstance(data, Mapping):
        samples = samples.sample_dict((count,))
    elif isinstance(samples, Distribution):
        samples = samples.sample(torch.Size((count,)))
    rows, found = _table(data)
    pair = ((rows, _DATA_COLOR, "data"), (_table(samples)[0], _MODEL_COLOR, "model"))
    dim = rows.shape[-1]
    if ax is None:
        ax = _axes_array(dim, dim, (1.6 * dim + 1, 1.6 * dim + 1))
    names = (found or [f"$x_{{{i + 1}}}$" for i in range(dim)]) if names is None else names
    boxes = np.stack([_extents(part) for part, *_ in pair])
    low, high = boxes[..., 0].min(0), boxes[..., 1].max(0)
    for i, j in np.ndindex(dim, dim):
        one = ax[i][j]
        if j > i:
            one.set_axis_off()
            continue
        for part, color, label in pair:
            if i == j:
                bins = np.linspace(low[i], high[i], 41)
                heights = np.histogram(part[:, i], bins, density=True)[0]
                one.stairs(heights, bins, color=color, label=label)
                continue
            _contours(one, part[:, [j, i]], (low[[j, i]], high[[j, i]]), levels, color)
            if label == "data":
                x, y = part[:_SCATTER_POINTS, j], part[:_SCATTER_POINTS, i]
                one.scatter(x, y, s=2, alpha=0.2, color=color, linewidths=0, zorder=0)
        one.set(xlabel=names[j] if i == dim - 1 else "", ylabel=names[i] if j == 0 < i else "")
        one.set_xlim(low[j], high[j])
        if i == j:
            one.set_yticks([])
        else:
            one.set_ylim(low[i], high[i])
    ax[0][0].legend(frameon=False, fontsize="small")
    return ax


def _table(x: Any) -> tuple[np.ndarray, list[str] | None]:
    """Return rows, shape ``(N, D)``, of a tensor, a frame or draws by name, and names if any."""
    if isinstance(x, Mapping) and not hasattr(x, "columns"):
        parts = {name: _table(value)[0] for name, value in x.items()}
        names = [
            name if part.shape[1] == 1 else f"{name}[{i}]"
            for name, part in parts.items()
            for i in range(part.shape[1])
        ]
        return np.concatenate(list(parts.values()), 1), names
    names = [str(column) for column in getattr(x, "columns", ())]
    rows = as_tensor(x).detach().double().cpu()
    return rows.reshape(len(rows), -1).numpy(), names or None


def _contours(
    ax: "Axes",
    x: np.ndarray,
    box: tuple[np.ndarray, np.ndarray],
    levels: Sequence[float],
    color: str,
) -> None:
    """Draw contours that enclose shares of points, shape ``(N, 2)``, of a smoothed histogram."""
    from scipy.ndimage import gaussian_filter

    bins = [np.linspace(a, b, _CONTOUR_BINS + 1) for a, b in zip(*box, strict=True)]
    counts = gaussian_filter(np.histogram2d(x[:, 0], x[:, 1], bins)[0], _CONTOUR_BINS / 30)
    heights = np.sort(counts, axis=None)[::-1]
    inside = heights.cumsum() / heights.sum()
    at = np.unique([heights[np.searchsorted(inside, level)] for level in levels])
    middles = [0.5 * (edges[1:] + edges[:-1]) for edges in bins]
    ax.contour(*middles, counts.T, at, colors=color, linewidths=1)


def _chance(check: Any) -> float:
    """Return by how much draws that all rows share widen the band of a check."""
    from scipy.stats import kstwo  # slow to import

    count, quantities = check.values.shape
    return check.band / float(kstwo.isf(0.01 / quantities, count))


def _axes(ax: "Axes | None") -> "Axes":
    """Return the axes, or new ones."""
    return _axes_array(1, 1)[0, 0] if ax is None else ax


def _axes_array(rows: int, columns: int, size: tuple[float, float] | None = None) -> np.ndarray:
    """Return new axes, shape ``(rows, columns)``, in a figure of a size in inches."""
    from matplotlib import pyplot as plt

    return plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")[1]


def _extent(x: Tensor) -> tuple[float, ...]:
    """Return the bounds of samples, shape ``(N, D)``, but for the farthest 0.5 % on each side."""
    bounds = torch.quantile(x.double().cpu(), torch.tensor([0.005, 0.995]).double(), dim=0)
    margin = 0.15 * (bounds[1] - bounds[0])
    return tuple(torch.stack((bounds[0] - margin, bounds[1] + margin), -1).flatten().tolist())


def _extents(x: np.ndarray) -> np.ndarray:
    """Return the bounds of each column of samples, as :func:`_extent`, shape ``(D, 2)``."""
    return np.reshape(_extent(torch.as_tensor(x)), (-1, 2))


def _paths(
    distribution: InterpolantDistribution, count: int, steps: int
) -> tuple[np.ndarray, ...]:
    """Return times and points of paths, shape ``(steps + 1, count, D)``, in data coordinates."""
    flow = distribution.transform.flow
    with torch.no_grad():
        path = replace(distribution.transform.path(), solver=FixedGrid(steps))
        w = distribution.white_base().sample((count, *distribution.batch_shape))
        x = flow.whitening.from_white(flow.integrate(w, path, forward=True))
        for part in distribution.space.transforms(flow):
            x = part(x)
    return path.times[0].numpy(), x.cpu().numpy()


def _velocity(distribution: InterpolantDistribution, x: Tensor) -> Tensor:
    """Return the velocity, in data coordinates, at the time the flow stops at."""
    transform = distribution.transform
    flow = transform.flow
    t = torch.tensor(transform.end).to(x)
    with torch.no_grad():
        u = distribution.to_flow(x)
        w = flow.whitening.to_white(u)
        v = flow.whitening.push(evaluate(flow.velocity, t, w, transform.context))
        support = distribution.constraint
        if isinstance(support, Gaussianized):
            return torch.func.jvp(support.gaussianizer._call, (u,), (v,))[1]
        return v
