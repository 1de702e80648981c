r"""Shorter paths: the max-min problem over the interpolant."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._torch import seeded, trainable
from ..distributions.interpolant import (
    AnyDistribution,
)
from ..interpolants.couplings import independent
from ..interpolants.learned import LearnedInterpolant
from ..training.batches import Batches, some
from ..training.data import checked_batch, collected, own_flow, set_base
from ..training.fitting import FitResult, fit
from ..training.objective import Coupling, Draw, Objective
from ..training.whitening import precondition

__all__ = ["TransportResult", "learn_interpolant"]

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
            _start(
                interpolant, objective, rows.w[some(len(rows.w), _MOMENT_ROWS).to(rows.w.device)]
            )
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
