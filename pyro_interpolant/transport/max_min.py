r"""Shorter paths: the max-min problem over the interpolant."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from tqdm.auto import tqdm

from .._package import check_ranges, keep_whole, number
from .._torch import seeded, with_gradients
from ..distributions.interpolant import AnyDistribution
from ..distributions.rows import RowsLike, subsample
from ..interpolants.couplings import independent
from ..interpolants.learned import LearnedInterpolant
from ..nn.modes import trainable
from ..training.data import DEFAULT_SHARE, Table, TableBatches, as_held_out
from ..training.distributed import Process
from ..training.fitting import FitResult, check_options, fit, trainable_flow
from ..training.objective import Coupling, Objective
from ..training.optimization import Descent
from ..training.options import check_repeatable
from ..training.preparation import start_from
from ..training.rows import Rows
from ..training.whitening import set_whitening
from ..transforms.whitening import Whitening

_HEAD_START = 0.2  # the share of all descents that come before the first ascent
_REST_SHARE = 0.15  # the share of the steps, at the end, in which the interpolant rests
_MOMENT_ROWS = 20_000
_OF_ROWS = ("validation", "pairs", "weights", "flip")  # options of fit that the alternation obeys


class TransportResult(NamedTuple):
    r"""What learning an interpolant did.

    Attributes:
        energies: The estimate :math:`-G` of the path's kinetic energy, in the data metric, after
            each hundredth of the steps. It lags while the velocity does.
        fit: The final training of the velocity with the interpolant at rest.
    """

    energies: list[float]
    fit: FitResult

    def __repr__(self) -> str:
        """Say where the energy began and ended, and what the final training did."""
        if not self.energies:
            return repr(self.fit)
        return (
            f"energy {self.energies[0]:.4g} at first, {self.energies[-1]:.4g} at last\n{self.fit}"
        )


@with_gradients()
def learn_interpolant(
    distribution: AnyDistribution,
    data: RowsLike,
    *,
    context: ArrayLike | None = None,
    base_samples: ArrayLike | None = None,
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
        coupling: Which draws of the base are paired with which rows.
        alternations: The number of ascents.
        velocity_steps: The number of descents between two ascents.
        batch_size: Rows per step; by default 1,024, or all if fewer.
        learning_rate: Of the velocity, Adam's.
        interpolant_rate: Of the interpolant, Adam's, at first; a cosine takes it to zero. Low, for
            the velocity must follow.
        seed: As in :func:`~pyro_interpolant.fit`.
        progress: Whether to show bars.
        **fit_options: For the final :func:`~pyro_interpolant.fit`. Rows that it holds out are held
            out of the alternation, too, which takes pairs, weights and flips alike. A
            ``checkpoint`` is of that fit alone, and of the interpolant that it has then: a run
            goes on from a flow as it was before, not from the one that was trained.

    Returns:
        The course of the energy, and the final fit.

    Raises:
        TypeError: If the interpolant is not a :class:`LearnedInterpolant`, or options are none of
            ``fit``.
        ValueError: If the data or a setting cannot work, there is a checkpoint without a seed, or
            options of ``fit`` are those that are set here, ``whiten`` and ``learn``.

    References:
        arXiv 2209.15571, eq. 14 and Proposition 4.
    """
    pace = _Pace(alternations, velocity_steps, learning_rate, interpolant_rate)
    check_options(
        {**fit_options, "coupling": coupling, "learning_rate": learning_rate},
        {"whiten", "learn"},
        "the velocity is trained in the whitened coordinates of the interpolant",
    )
    check_repeatable(seed, fit_options.get("checkpoint"))
    flow = trainable_flow(distribution)
    interpolant = flow.interpolant
    if not isinstance(interpolant, LearnedInterpolant):
        raise TypeError(
            f"expected a flow with a LearnedInterpolant, got {type(interpolant).__name__}: "
            "InterpolantTransform(velocity, interpolant=LearnedInterpolant(...))"
        )
    given = {k: fit_options[k] for k in _OF_ROWS if k in fit_options}
    given["validation"] = as_held_out(given.get("validation", DEFAULT_SHARE))
    source = Table(distribution, data, context=context, **given)
    source.names.give_to(distribution)
    if seed is None:
        seed = Process(fit_options.get("fabric")).agreed(int(torch.randint(2**62, ())))
    with seeded(seed):
        split = source.split(Process(), batch_size)  # at first, as in fit: the same rows
        start_from(distribution, base_samples, split, source, Process())
        set_whitening(distribution, split.kept)
        seen, _ = distribution.white_base().split(source.share or DEFAULT_SHARE)
        unit = _unit(flow.whitening)
        objective = Objective(flow, seen, coupling, metric=lambda u: flow.whitening.push(u) / unit)
        batches = source.batches(split, objective)
        if interpolant.modes:
            _start(interpolant, objective, split.kept, unit)
        with trainable(flow.velocity):
            energies = pace.alternate(objective, interpolant, batches, progress=progress)
        energies = [energy * unit**2 for energy in energies]
    outcome = fit(
        distribution, data, context=context, coupling=coupling, batch_size=batch_size, seed=seed,
        learning_rate=learning_rate, progress=progress, whiten=False, **{**given, **fit_options},
    )  # fmt: skip
    return TransportResult(energies, outcome)


def _unit(whitening: Whitening) -> float:
    """Return the root of the mean square of the lengths that L gives vectors of length 1.

    Losses are in it: to Adam, and to the search for the waves to start from, a small gradient is
    none. Data with a deviation of 1e-4 left the interpolant where it was.
    """
    linear = whitening.linear.double()
    return float((linear.square().sum() / max(linear.shape, default=1)).sqrt())


def _start(interpolant: LearnedInterpolant, objective: Objective, rows: Rows, unit: float) -> None:
    """Start the waves from the moments of base and data, in a unit of length."""
    base = objective.base.sample((_MOMENT_ROWS,)).double()
    few = subsample(len(rows.w), _MOMENT_ROWS, rows.weight).to(rows.w.device)
    w = objective.whitened(rows.take(few)).w.double()
    means = base.mean(0), w.mean(0)
    if objective.base.base is None:  # both are zero, but for the draws
        means = torch.zeros_like(means[0]), torch.zeros_like(means[1])
    cov0, cov1 = (torch.atleast_2d(rows.T.cov()) for rows in (base, w))  # of one column a number
    metric = objective.flow.whitening.matrix().double() / unit
    interpolant.start_from_moments(means[0], cov0, means[1], cov1, metric=metric)


@dataclass(frozen=True)
class _Pace:
    """How many steps velocity and interpolant take in turn, and how long they are.

    Args:
        alternations: The number of ascents.
        velocity_steps: The number of descents between two of them.
        learning_rate: Of the descents.
        interpolant_rate: Of the ascents, at first.

    Raises:
        ValueError: If one is not positive, or a number of steps is not whole.
    """

    alternations: int
    velocity_steps: int
    learning_rate: float
    interpolant_rate: float

    def __post_init__(self) -> None:
        """Check the numbers."""
        keep_whole(self, alternations=1, velocity_steps=1)
        check_ranges(
            number("learning_rate > 0", self.learning_rate, lambda n: n > 0),
            number("interpolant_rate > 0", self.interpolant_rate, lambda n: n > 0),
        )

    def alternate(
        self,
        objective: Objective,
        interpolant: LearnedInterpolant,
        batches: TableBatches,
        *,
        progress: bool,
    ) -> list[float]:
        """Run the alternation, and return the energy after each hundredth of it."""
        descent = Descent(objective)
        ascent = _Ascent(objective, interpolant.weights())
        recent: list[Tensor] = []
        energies: list[float] = []
        alternations, every = self.alternations, max(1, self.alternations // 100)
        for _ in range(int(_HEAD_START * alternations * self.velocity_steps)):
            descent(batches.next(), self.learning_rate)
        rests = (1 - _REST_SHARE) * alternations
        steps = tqdm(range(alternations), disable=not progress, desc="transport", leave=False)
        for step in steps:
            for _ in range(self.velocity_steps):
                loss = descent(batches.next(), self.learning_rate)
                recent += [] if loss is None else [-loss]
            if descent.is_stuck():
                descent.check()
            if step < rests:
                # To zero: steps of one size would wander about the optimum.
                falling = (1 + math.cos(math.pi * step / rests)) / 2
                ascent(batches.next_rows, self.interpolant_rate * falling)
            if (step + 1) % every == 0 and recent:
                energies.append(float(torch.stack(recent).mean()))
                recent.clear()
        return energies


class _Ascent:
    """Steps of Adam uphill on an objective, over the weights of its interpolant.

    Args:
        objective: What is maximised.
        weights: The interpolant's weights, of any shapes.
    """

    def __init__(self, objective: Objective, weights: list[Tensor]) -> None:
        self.objective, self.weights = objective, weights
        self.optimizer = torch.optim.Adam(self.weights, maximize=True)

    def __call__(self, rows: Callable[[], Rows], rate: float) -> None:
        """Take a step on the rows that a function returns."""
        self.optimizer.param_groups[0]["lr"] = rate
        for weight in self.weights:
            weight.requires_grad = True
        (points,) = self.objective.points([rows])
        gradients = torch.autograd.grad(self.objective.loss(points), self.weights)
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.requires_grad = False
            weight.grad = gradient
        self.optimizer.step()
        for weight in self.weights:
            weight.grad = None
