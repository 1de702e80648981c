"""Pictures of a training run, and of checks of a trained density."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from .._package import check_ranges, whole
from ..diagnostics.predictive import REGIONS, CalibrationCheck, band_of
from ..distributions.rows import as_tensor
from ..training.fitting import FitResult
from .axes import DATA_COLOR, MODEL_COLOR, THIRD_COLOR, new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NORMAL_99 = 2.576  # standard deviations, of a bar
_BESIDE: dict[str, Any] = {
    "frameon": False,
    "fontsize": 8,
    "loc": "upper left",
    "bbox_to_anchor": (1, 1),
}


def training_curve(result: FitResult, *, ax: "Axes | None" = None) -> "Axes":
    """Draw the losses of a run against its steps, and the step of the kept weights.

    Args:
        result: A :class:`~pyro_interpolant.training.FitResult`.
        ax: Axes, or None for new ones.
    """
    ax = new_axes(ax)
    ax.plot(result.steps, result.losses, color=DATA_COLOR, linewidth=1, label="training")
    ax.plot(result.steps, result.validation_losses, color=MODEL_COLOR, label="held out")
    ax.axvline(result.best_step, color=THIRD_COLOR, linestyle=":", label="kept")
    ax.set(xlabel="step", ylabel="loss $G$")
    ax.legend(frameon=False)
    return ax


def ranks(check: CalibrationCheck, *, ax: "Axes | None" = None) -> "Axes":
    """Draw how far numbers that should be uniform are from it, with the 99% band.

    Args:
        check: A :class:`~pyro_interpolant.diagnostics.CalibrationCheck`.
        ax: Axes, or None for new ones.
    """
    ax = new_axes(ax)
    count = len(check.values)
    shares = np.repeat(np.arange(count + 1), 2)[1:-1] / count  # on both sides of each step
    for values, name in zip(check.values.T, check.names, strict=True):
        u = values.sort().values.repeat_interleave(2).cpu().numpy()
        ax.plot(u, shares - u, linewidth=1, label=name)
    ax.axhspan(-check.band, check.band, color=DATA_COLOR, alpha=0.15, linewidth=0, label="99%")
    ax.set(xlabel="$u$", ylabel="share below $u$, less $u$", xlim=(0, 1))
    ax.legend(**_BESIDE, ncols=1 + len(check.names) // 20)
    return ax


def rank_histogram(check: CalibrationCheck, *, bins: int = 20, ax: "Axes | None" = None) -> "Axes":
    """Draw the histogram of numbers that should be uniform, with the 99% band of a bar.

    Args:
        check: A :class:`~pyro_interpolant.diagnostics.CalibrationCheck`.
        bins: The number of bars.
        ax: Axes, or None for new ones.

    Raises:
        ValueError: If ``bins`` is below 1.
    """
    check_ranges(whole("bins", bins, 1))
    ax = new_axes(ax)
    count, quantities = check.values.shape
    for values, name in zip(check.values.T.cpu().numpy(), check.names, strict=True):
        heights, edges = np.histogram(values, int(bins), (0, 1), density=True)
        ax.stairs(heights, edges, baseline=0, label=name, fill=quantities == 1, alpha=0.7)
    wider = check.band / band_of(count, quantities)  # by draws that all rows share
    half = _NORMAL_99 * wider * np.sqrt((bins - 1) / count)
    ax.axhspan(1 - half, 1 + half, color=DATA_COLOR, alpha=0.15, linewidth=0, label="99%")
    ax.axhline(1, color=DATA_COLOR, linewidth=0.8)
    ax.set(xlabel="$u$", ylabel="density", xlim=(0, 1))
    ax.legend(frameon=False)
    return ax


def coverage_curve(check: CalibrationCheck, *, ax: "Axes | None" = None) -> "Axes":
    """Draw the share of rows within central regions against the probability of these.

    The curve of a calibrated density is the diagonal; with the 99% band that holds for all of it.

    Args:
        check: A :class:`~pyro_interpolant.diagnostics.CalibrationCheck`. Of
            :func:`~pyro_interpolant.diagnostics.coverage` and ``tarp`` regions are those of the
            check; of ``pit`` and ``sbc`` intervals in the middle of each quantity.
        ax: Axes, or None for new ones.
    """
    ax = new_axes(ax)
    count = len(check.values)
    levels = np.linspace(0, 1, 201)
    shares = np.append(np.arange(count + 1) / count, 1)
    ax.fill_between(
        levels, np.clip(levels - check.band, 0, 1), np.clip(levels + check.band, 0, 1),
        color=DATA_COLOR, alpha=0.15, linewidth=0, label="99%",
    )  # fmt: skip
    for values, name in zip(check.values.T, check.names, strict=True):
        inside = values if name in REGIONS else (2 * values - 1).abs()
        edges = np.concatenate(([0], inside.sort().values.cpu().numpy(), [1]))
        ax.step(edges, shares, where="post", linewidth=1, label=name)
    ax.plot((0, 1), (0, 1), color=DATA_COLOR, linewidth=0.8)
    ax.set(xlabel="probability of the region", ylabel="share of rows inside")
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.legend(**_BESIDE, ncols=1 + len(check.names) // 20)
    return ax


def predictive_check(y: ArrayLike, simulated: ArrayLike, *, ax: "Axes | None" = None) -> "Axes":
    """Draw the ordered values of data beside the middle 95% of those simulated from a posterior.

    Args:
        y: The data, shape ``(*)``, a tensor or an array of any library.
        simulated: Data of ``Predictive``, shape ``(S, *)``.
        ax: Axes, or None for new ones.

    Raises:
        TypeError: If either is neither a tensor nor an array.
        ValueError: If simulated data are of another shape, or there are none, or NaN or infinite
            numbers.
    """
    y, simulated = as_tensor(y), as_tensor(simulated, "simulated data")
    if simulated.shape[1:] != y.shape:
        want, got = tuple(y.shape), tuple(simulated.shape)
        raise ValueError(f"expected simulated data of shape (S, *{want}), got {got}")
    check_ranges(("numbers of data and simulations", simulated.numel() > 0, "none"))
    if not all(bool(part.isfinite().all()) for part in (y, simulated)):
        raise ValueError("expected finite data, got NaN or infinite numbers, which have no order")
    rows = simulated.detach().double().cpu().reshape(len(simulated), -1)
    ax, ordered = new_axes(ax), rows.sort(1).values
    low, high = ordered.quantile(ordered.new_tensor([0.025, 0.975]), dim=0).numpy()
    places, values = np.linspace(0, 1, len(low)), y.detach().cpu().flatten().sort().values
    ax.fill_between(places, low, high, color=MODEL_COLOR, alpha=0.25, label="simulated, 95%")
    ax.plot(places, values, ".", color=DATA_COLOR, markersize=4, label="data")
    ax.set(xlabel="share of the data below", ylabel="value")
    ax.legend(frameon=False)
    return ax
