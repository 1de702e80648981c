r"""Training from an unnormalised log-density alone, with no gradient through an ODE."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .distributions import InterpolantDistribution
from .solvers import FixedGrid

__all__ = ["Round", "RoundsResult", "train_from_density"]


class Round(NamedTuple):
    r"""What one round saw.

    Attributes:
        temper: The exponent b of the path :math:`p^b q_0^{1-b}`; 1 for the target.
        acceptance: The mean acceptance of the Metropolis moves.
        ess: The effective share of the draws, between 0 and 1.
        k_hat: Pareto's k-hat of the weights of the draws.
        log_evidence: The log of the mean weight.
        seconds: The time since the start.
    """

    temper: float
    acceptance: float
    ess: float
    k_hat: float
    log_evidence: float
    seconds: float


class RoundsResult(NamedTuple):
    r"""What training from a density did, judged on fresh draws of the flow that was kept.

    Attributes:
        k_hat: Pareto's k-hat of the weights p / q: above 0.7 the flow misses part of the tail.
        ess: The effective sample size of ``draws`` fresh draws.
        log_evidence: :math:`\log \int p`, an estimate.
        log_evidence_stderr: Its standard error; too small where k-hat is large.
        draws: The number of fresh draws these come from.
        rounds: The history.
        best_round: The index of the round whose flow was kept.
        seconds: The duration.
        solver: The calibrated solver that was set.
    """

    k_hat: float
    ess: float
    log_evidence: float
    log_evidence_stderr: float
    draws: int
    rounds: list[Round]
    best_round: int
    seconds: float
    solver: FixedGrid


def train_from_density(
    distribution: InterpolantDistribution,
    log_density: Callable[[Tensor], Tensor],
    *,
    start: Any = None,
    max_seconds: float = 120.0,
    draws: int = 4000,
    steps: int = 800,
    rounds: int | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> RoundsResult:
    r"""Train a flow on an unnormalised log-density, in place.

    Args:
        distribution: The flow: on real vectors, from the default base.
        log_density: From rows, shape ``(N, D)``, to :math:`\log p` up to a constant, shape
            ``(N,)``; differentiable.
        start: Rows, shape ``(M, D)``, or a distribution over ``(D,)``, from which the search
            starts: it should be wider than the target. By default a wide Student-t.
        max_seconds: The time to spend.
        draws: Particles, and draws of the flow in a round.
        steps: Regression steps in a round.
        rounds: The largest number of rounds; by default as many as the time allows.
        seed: Makes the run reproducible as far as the clock allows.
        progress: Whether to show a bar.

    Returns:
        The verdict on fresh draws, and the history.
    """
    raise NotImplementedError
