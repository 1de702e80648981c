r"""Training from an unnormalised log-density alone, with no gradient through an ODE.

First particles: from a wide start, and from what Newton's method finds, tempered to the target.
Then rounds: regress the flow on the particles; let each particle jump to where the flow sends it,
accepted by Metropolis's rule with p / q; move all by the gradient of the target. The jumps mix the
modes, the gradient reaches what the flow has not learned yet, and both leave the target as it is.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .distributions import InterpolantDistribution
from .flow import Flow
from .moves import Density
from .preparation import own_flow
from .refining import Refinement, Round, RoundsResult
from .scopes import seeded, trainable
from .search import wide_start
from .supports import is_trivial

__all__ = ["Round", "RoundsResult", "train_from_density"]


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

    No diagnostic sees a mode or a neck that neither the start nor the moves reached: a start wider
    than the target helps, or writing the model without the neck.

    Args:
        distribution: The flow: on real vectors, from its default base.
        log_density: From rows, shape ``(N, D)`` in the flow's type, to :math:`\log p` up to a
            constant, shape ``(N,)``; differentiable. It is asked far away too: what is not
            finite there counts as no density, and it must not raise.
        start: Where the search starts: rows, shape ``(M, D)``, such as draws of the prior; a
            centre, shape ``(D,)``; or a distribution of event shape ``(D,)``. It should be wider
            than the target. By default a Student-t of scale 4 around 0.
        max_seconds: The time to spend, unless nothing improves any more.
        draws: The number of particles; fewer where the density is slow.
        steps: The most regression steps in a round.
        rounds: The most rounds; by default as many as the time allows.
        seed: Makes the run reproducible, as far as the clock decides nothing.
        progress: Whether to show a bar.

    Returns:
        The verdict on fresh draws, and the history.

    Raises:
        TypeError: If the distribution or the start is of the wrong kind.
        ValueError: If the flow has a support or a base, a setting is out of range, the start does
            not fit, or the density is of the wrong shape or finite nowhere near the start.
        RuntimeError: If gradients of the regression stay non-finite.

    References:
        arXiv 2209.15571, eq. 10 (the regression); Gabrie, Rotskoff & Vanden-Eijnden, PNAS 119,
        2022, arXiv 2105.12603 (the rounds); Del Moral, Doucet & Jasra, JRSS B 68, 2006
        (tempering); Vehtari et al., arXiv 1507.02646 (k-hat).
    """
    began = time.monotonic()
    flow = _checked_flow(distribution)
    _check_settings(max_seconds, draws, steps, rounds)
    with seeded(seed, flow.loc.device), torch.no_grad():
        wide = wide_start(start, flow.loc)
        density = Density(log_density)
        density.check(wide.sample(256))
        with tqdm(total=100, disable=not progress, desc="rounds", unit="%", leave=False) as bar:
            run = Refinement(distribution, flow, density, began, max_seconds, rounds, bar)
            run.begin(wide, draws)
            with trainable(flow.velocity):
                while run.round(steps):
                    pass
            return run.verdict()


def _checked_flow(distribution: InterpolantDistribution) -> Flow:
    if not isinstance(distribution, InterpolantDistribution):
        raise TypeError(f"expected an InterpolantDistribution, got {type(distribution).__name__}")
    flow = own_flow(distribution)
    if not is_trivial(distribution.constraint) or distribution.base is not None:
        raise ValueError(
            "expected a flow on real vectors from its default base, got "
            f"support={distribution.constraint} and base={distribution.base}: write the density "
            "in unconstrained coordinates, with the Jacobian"
        )
    flow.interpolant.check_ends(flow.dim)
    return flow


def _check_settings(max_seconds: float, draws: int, steps: int, rounds: int | None) -> None:
    """Raise a ValueError that names the first setting out of range."""
    for name, good, value in (
        ("max_seconds > 0", max_seconds > 0, max_seconds),
        ("draws >= 100", draws >= 100, draws),
        ("steps >= 1", steps >= 1, steps),
        ("rounds >= 1", rounds is None or rounds >= 1, rounds),
    ):
        if not good:
            raise ValueError(f"expected {name}, got {value}")
