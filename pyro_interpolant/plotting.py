r"""Plots of flows by matplotlib (extra ``[plot]``), which the first plot imports.

Every function draws on the axes it is given, or on new ones, and returns them.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution

from .distributions.interpolant import InterpolantDistribution
from .interpolants.linear import Interpolant
from .nn.velocity import evaluate
from .solvers.ode import FixedGrid
from .transforms.gaussianize import Gaussianized

if TYPE_CHECKING:
    from matplotlib.axes import Axes


__all__ = [
    "coefficients",
    "corner",
    "density",
    "evolution",
    "predictive_check",
    "ranks",
    "training_curve",
    "trajectories",
]

_DATA_COLOR, _MODEL_COLOR, _THIRD_COLOR = "#4c566a", "#d1495b", "#2a9d8f"
_EXTENT_SAMPLES = 2000
_SCATTER_POINTS = 4000
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
    ax.legend(frameon=False)
    return ax


def predictive_check(y: Tensor, simulated: Tensor, *, ax: "Axes | None" = None) -> "Axes":
    """Draw the ordered values of data beside those of data simulated from a posterior.

    The band holds, place by place, the middle 95% of the simulated ones: where the model is right,
    the data leave it rarely.

    Args:
        y: The data, shape ``(*)``.
        simulated: Data of ``Predictive``, shape ``(S, *)``.
        ax: Axes, or None for new ones.

    Raises:
        ValueError: If the simulated data are of another shape.
    """
    if simulated.shape[1:] != y.shape or not len(simulated):
        raise ValueError(
            f"expected simulated data of shape (S, {', '.join(map(str, y.shape))}), got "
            f"{tuple(simulated.shape)}"
        )
    ax = _axes(ax)
    ordered = simulated.detach().double().cpu().flatten(1).sort(1).values
    low, middle, high = ordered.quantile(ordered.new_tensor([0.025, 0.5, 0.975]), dim=0).numpy()
    places = (np.arange(len(middle)) + 0.5) / len(middle)
    ax.fill_between(places, low, high, color=_MODEL_COLOR, alpha=0.25, label="simulated, 95%")
    ax.plot(places, middle, color=_MODEL_COLOR, linewidth=1.0, label="simulated, median")
    values = y.detach().double().cpu().flatten().sort().values.numpy()
    ax.plot(places, values, ".", color=_DATA_COLOR, markersize=4, label="data")
    ax.set(xlabel="share of the data below", ylabel="value")
    ax.legend(frameon=False)
    return ax


def corner(
    samples: Tensor | Distribution,
    data: Tensor,
    *,
    names: Sequence[str] | None = None,
    count: int = 2000,
    ax: np.ndarray | None = None,
) -> np.ndarray:
    """Compare samples with data: histograms on the diagonal, pairs of columns below it.

    Args:
        samples: Samples, shape ``(M, D)``, or a distribution to draw ``count`` from.
        data: Rows, shape ``(N, D)``.
        names: One per column.
        count: The number of samples to draw.
        ax: An array of D x D axes, or None for new ones.
    """
    if not isinstance(samples, Tensor):
        samples = samples.sample(torch.Size((count,)))
    dim = data.shape[-1]
    if ax is None:
        ax = _axes_array(dim, dim, (1.6 * dim + 1, 1.6 * dim + 1))
    names = [f"$x_{{{i + 1}}}$" for i in range(dim)] if names is None else names
    pair = (
        (data.detach().cpu().numpy(), _DATA_COLOR, "data"),
        (samples.detach().cpu().numpy(), _MODEL_COLOR, "model"),
    )
    for i, j in np.ndindex(dim, dim):
        one = ax[i][j]
        if j > i:
            one.set_axis_off()
            continue
        for rows, color, label in pair:
            if i == j:
                one.hist(rows[:, i], 40, density=True, histtype="step", color=color, label=label)
            else:
                x, y = rows[:_SCATTER_POINTS, j], rows[:_SCATTER_POINTS, i]
                one.scatter(x, y, s=2, alpha=0.3, color=color, linewidths=0)
        one.set(xlabel=names[j] if i == dim - 1 else "", ylabel=names[i] if j == 0 < i else "")
        if i == j:
            one.set_yticks([])
    ax[0][0].legend(frameon=False, fontsize="small")
    return ax


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
