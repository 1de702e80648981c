r"""Shorter and straighter paths: the max-min problem over the interpolant, and reflow."""

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .couplings import independent
from .data import Batches
from .diagnostics import calibrate
from .distributions import ConditionalInterpolantDistribution, InterpolantDistribution
from .interpolants import Interpolant, Linear
from .learned import LearnedInterpolant
from .objective import Coupling, Draw, Objective
from .preparation import checked_batch, collected, own_flow, precondition, set_base
from .scopes import seeded, trainable
from .solvers import FixedGrid
from .training import FitResult, fit

__all__ = ["PathReport", "ReflowResult", "TransportResult", "learn_interpolant", "reflow"]

AnyDistribution = InterpolantDistribution | ConditionalInterpolantDistribution

_AHEAD = 0.2  # the share of all descents that come before the first ascent
_FROZEN = 0.15  # the share of the steps, at the end, in which the interpolant rests
_MOMENT_ROWS = 20_000


class TransportResult(NamedTuple):
    r"""What learning an interpolant did.

    Attributes:
        energies: The estimate :math:`-G` of the path's kinetic energy, in the data metric, after
            each hundredth of the steps. It lags while the velocity does.
        fit: The final training of the velocity with the interpolant at rest.
    """

    energies: list[float]
    fit: FitResult


def learn_interpolant(
    distribution: AnyDistribution,
    data: Any,
    *,
    context: Any = None,
    base_samples: Any = None,
    coupling: Coupling = independent,
    alternations: int = 1000,
    velocity_steps: int = 2,
    batch_size: int | None = None,
    learning_rate: float = 2e-3,
    interpolant_rate: float = 3e-4,
    seed: int | None = None,
    progress: bool = True,
    **fit_options: Any,
) -> TransportResult:
    r"""Shorten a flow's paths: maximise over the interpolant, minimise over the velocity.

    .. math:: \max_{I} \min_{v} \int_0^1 E\bigl[|v_t(I_t)|^2 - 2\, \partial_t I_t \cdot
              v_t(I_t)\bigr] dt,

    whose value is minus the kinetic energy of the path; at its best that is the squared
    Wasserstein distance of base and data. Norms are those of data coordinates. Each alternation
    is ``velocity_steps`` descents in v and one ascent in I; the interpolant rests in the last 15%,
    then the velocity is trained as :func:`~pyro_interpolant.fit` does. The sine waves start from
    the moments of base and data, where they are the best between Gaussians.

    Args:
        distribution: A flow whose interpolant is a :class:`LearnedInterpolant`; both are trained,
            in place.
        data: As in :func:`~pyro_interpolant.fit`, rows of shape ``(N, *event_shape)``.
        context: Contexts, shape ``(N, C)``, for a conditional flow.
        base_samples: As in :func:`~pyro_interpolant.fit`, shape ``(M, D)``.
        coupling: Who is paired with whom.
        alternations: The number of ascents.
        velocity_steps: The number of descents between two ascents.
        batch_size: Rows per step; by default 1,024, or all if fewer.
        learning_rate: Of the velocity, Adam's.
        interpolant_rate: Of the interpolant, Adam's, at first; a cosine takes it to zero. Low, for
            the velocity must follow.
        seed: As in :func:`~pyro_interpolant.fit`.
        progress: Whether to show bars.
        **fit_options: For the final :func:`~pyro_interpolant.fit`.

    Returns:
        The course of the energy, and the final fit.

    Raises:
        TypeError: If the interpolant is not a :class:`LearnedInterpolant`.
        ValueError: If the data or a setting cannot work.

    References:
        arXiv 2209.15571, eq. 14 and Proposition 4.
    """
    flow = own_flow(distribution)
    interpolant: Any = flow.interpolant
    if not isinstance(interpolant, LearnedInterpolant):
        raise TypeError(
            f"expected a flow with a LearnedInterpolant, got {type(interpolant).__name__}: "
            "InterpolantTransform(velocity, interpolant=LearnedInterpolant(...))"
        )
    if min(alternations, velocity_steps) < 1 or min(learning_rate, interpolant_rate) <= 0:
        raise ValueError(
            "expected alternations, velocity_steps >= 1 and rates > 0, got "
            f"{alternations}, {velocity_steps}, {learning_rate} and {interpolant_rate}"
        )
    interpolant.check_ends(flow.dim)
    raw, _ = collected(
        distribution, flow, data, context=context, pairs=None, weights=None, validation=0.0
    )
    size = checked_batch(batch_size, len(raw.w))
    set_base(distribution, flow, base_samples, raw.w)
    with seeded(seed, flow.loc.device):
        precondition(flow, distribution, raw)
        objective = Objective(flow, distribution.base, coupling, size)
        rows = objective.prepared(raw)
        if interpolant.modes:
            _start(interpolant, objective, rows.w[:_MOMENT_ROWS])
        batches = Batches(len(rows.w), size, rows.w.device)
        with trainable(flow.velocity):
            energies = _alternate(
                objective, lambda: objective.draw(rows.take(batches.next())), alternations,
                velocity_steps, learning_rate, interpolant_rate, progress,
            )  # fmt: skip
    outcome = fit(
        distribution, data, context=context, coupling=coupling, batch_size=batch_size, seed=seed,
        learning_rate=learning_rate, progress=progress, whiten=False, **fit_options,
    )  # fmt: skip
    return TransportResult(energies, outcome)


def _start(interpolant: LearnedInterpolant, objective: Objective, w: Tensor) -> None:
    base = objective.base_draws(_MOMENT_ROWS).double()
    w = w.double()
    means = base.mean(0), w.mean(0)
    if objective.base is None:  # both are zero, but for the draws
        means = torch.zeros_like(means[0]), torch.zeros_like(means[1])
    interpolant.start_from_moments(
        means[0], base.T.cov(), means[1], w.T.cov(), metric=objective.flow.linear
    )


def _alternate(
    objective: Objective,
    draw: Callable[[], Draw],
    alternations: int,
    velocity_steps: int,
    learning_rate: float,
    interpolant_rate: float,
    progress: bool,  # noqa: FBT001
) -> list[float]:
    """Run the alternation, and return the energy after each hundredth of it."""
    interpolant: Any = objective.flow.interpolant
    weights = interpolant.weights()
    descent = torch.optim.Adam(list(objective.network.parameters()), lr=learning_rate)
    ascent = torch.optim.Adam(weights, lr=interpolant_rate, maximize=True)
    recent: list[Tensor] = []
    energies: list[float] = []
    every = max(1, alternations // 100)
    for _ in range(int(_AHEAD * alternations * velocity_steps)):
        _descend(objective, draw(), descent)
    rests = (1 - _FROZEN) * alternations
    for step in tqdm(range(alternations), disable=not progress, desc="transport", leave=False):
        for _ in range(velocity_steps):
            recent.append(-_descend(objective, draw(), descent))
        if step < rests:
            # To zero: steps of one size would wander about the optimum.
            ascent.param_groups[0]["lr"] = (
                interpolant_rate * (1 + math.cos(math.pi * step / rests)) / 2
            )
            for weight in weights:
                weight.requires_grad_(requires_grad=True)
            gradients = torch.autograd.grad(_metric_loss(objective, draw()), weights)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.requires_grad_(requires_grad=False)
                weight.grad = gradient
            ascent.step()
            for weight in weights:
                weight.grad = None
        if (step + 1) % every == 0:
            energies.append(float(torch.stack(recent).mean()))
            recent.clear()
    return energies


def _descend(objective: Objective, draw: Draw, descent: torch.optim.Optimizer) -> Tensor:
    """Take a step of the velocity, and return the loss before it."""
    loss = _metric_loss(objective, draw)
    descent.zero_grad()
    loss.backward()
    descent.step()
    return loss.detach()


def _metric_loss(objective: Objective, draw: Draw) -> Tensor:
    """Return the mean of ``|L v|^2 - 2 L dI . L v``."""
    return objective.loss(draw, metric=objective.flow.linear)


class PathReport(NamedTuple):
    """How straight a flow's paths are, to a solver.

    Attributes:
        sampling_errors: By number of steps, 1 and 2, the mean distance in whitened units between
            a sample and the converged one from the same base draw.
        density_steps: The fewest steps at which log_prob meets the tolerance.
    """

    sampling_errors: dict[int, float]
    density_steps: int


class ReflowResult(NamedTuple):
    """A flow with straighter paths, and what that gave.

    Attributes:
        distribution: The new flow; the old one is as it was.
        before: The paths of the old flow.
        after: The paths of the new one.
        fit: The training.
    """

    distribution: Any
    before: PathReport
    after: PathReport
    fit: FitResult


def reflow(
    distribution: AnyDistribution,
    *,
    count: int = 50_000,
    context: Tensor | None = None,
    interpolant: Interpolant | None = None,
    tolerance: float = 1e-2,
    seed: int | None = None,
    **fit_options: Any,
) -> ReflowResult:
    """Straighten a flow's paths: train a copy on the pairs that the flow itself makes.

    Pairs of a flow do not cross, so a straight interpolant between them keeps the marginals and
    bends less: one or two steps already sample well. The rate of the log-determinant along a
    straight path is not constant: densities gain less.

    Args:
        distribution: A trained flow.
        count: The number of pairs to draw.
        context: Contexts, shape ``(count, C)``, for a conditional flow.
        interpolant: The path between the pairs; by default straight.
        tolerance: Of the density, nats, for the report and the calibration.
        seed: As in :func:`~pyro_interpolant.fit`.
        **fit_options: For :func:`~pyro_interpolant.fit`.

    Returns:
        The new flow, and steps and errors before and after.

    Raises:
        ValueError: If the flow is conditional and no context is given.

    References:
        Liu, Gong & Liu, *Flow straight and fast*, ICLR 2023; arXiv 2209.15571, Section 2.3.
    """
    own_flow(distribution)
    if context is None and isinstance(distribution, ConditionalInterpolantDistribution):
        raise ValueError("expected contexts to draw pairs for, shape (count, C), got none")
    new = copy.deepcopy(distribution)
    flow = own_flow(new)
    flow.interpolant = Linear() if interpolant is None else interpolant
    flow.solver = FixedGrid()
    with seeded(seed, flow.loc.device), torch.no_grad():
        view = distribution if context is None else distribution.condition(context)
        shape = (count,) if context is None else ()
        base, data = _pairs(view, shape)
    outcome = fit(
        new, data, context=context, pairs=base, seed=seed, tolerance=tolerance, whiten=False,
        **fit_options,
    )  # fmt: skip
    few = slice(0, 256)
    rows = data[few], None if context is None else context[few]
    return ReflowResult(
        new,
        _report(distribution, base[few], *rows, tolerance),
        _report(new, base[few], *rows, tolerance),
        outcome,
    )


def _pairs(view: Any, shape: Any) -> tuple[Tensor, Tensor]:
    """Return base draws, in the coordinates that ``fit`` takes pairs in, and their images."""
    base = view.base_dist.sample(shape)
    x = base
    for part in view.transforms:
        x = part(x)
    return base, x


def _report(
    distribution: AnyDistribution,
    base: Tensor,
    data: Tensor,
    context: Tensor | None,
    tolerance: float,
) -> PathReport:
    copied = copy.deepcopy(distribution)
    steps = calibrate(copied, data, context=context, tolerance=tolerance).steps
    view: Any = copied if context is None else copied.condition(context)
    flow = view.transform.flow
    w0 = base if view.base is None else flow.to_white(base)
    ends = {}
    with torch.no_grad():
        for n in (1, 2, 128):
            flow.solver = FixedGrid(steps=n)
            path = view.transform._path()._replace(solver=flow.solver)
            ends[n] = flow.integrate(w0, path, forward=True)[-1]
    errors = {n: float((ends[n] - ends[128]).norm(dim=-1).mean()) for n in (1, 2)}
    return PathReport(errors, steps)
