r"""The regression of a flow on rows that keep changing, its optimiser kept from round to round."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..._torch import seeded, trainable
from ...diagnostics.calibration import calibrate
from ...diagnostics.psis import effective_sample_size, judge, pareto_smooth
from ...distributions.constraints import is_trivial
from ...distributions.interpolant import InterpolantDistribution
from ...interpolants.couplings import independent
from ...solvers.ode import Solver
from ...training.batches import Rows
from ...training.data import own_flow
from ...training.distributed import Engine
from ...training.loop import Average, Clip
from ...training.objective import Objective
from ...training.whitening import precondition
from ...transforms.flow import Flow
from .flow_proposal import Jump, coarse_solver, fresh_weights, jumped
from .pathfinder import Mixture, search, wide_start
from .tempering import Density, Kernel, Particles, annealed

__all__ = ["Refinement", "Refit", "Round", "RoundsResult", "train_from_density"]


_BATCH = 512
_FIRST_RATE = 1e-3  # before the first is asked for
_EMA = 0.999
_WARM = 100  # steps in which the rate rises
_KEPT = 10  # the most rounds whose rows are kept; of fewer, the later half
_LEAST = 10  # steps whatever the clock says


class Refit:
    """Train a velocity on a pool of rows.

    Args:
        flow: The flow, its whitening map set.
        pools: Rows to begin with, each of shape ``(N, D)``.
    """

    def __init__(self, flow: Flow, pools: list[Tensor]) -> None:
        self.objective = Objective(flow, None, independent, _BATCH)
        self.parameters = list(flow.velocity.parameters())
        self.engine = Engine()
        self.engine.set_up(flow.velocity, self.objective.loss, self.parameters, _FIRST_RATE)
        self.average = Average(self.parameters, _EMA)
        self.clip = Clip(self.parameters, self.engine)
        self.pools = pools[-_KEPT:]
        self.step, self.added = 0, 0

    def add(self, rows: Tensor) -> None:
        """Add the rows of a round, shape ``(N, D)``, and drop the oldest."""
        self.added += 1
        keep = max(2, min(_KEPT, self.added // 2 + 1))
        self.pools = [*self.pools, rows][-keep:]

    def __call__(self, steps: int, rate: Callable[[], float], *, seconds: float) -> float:
        """Take steps, at most as many as the time allows; return the mean loss.

        Args:
            steps: The number of steps.
            rate: The present learning rate.
            seconds: The time to spend.

        Raises:
            RuntimeError: If gradients stay non-finite.
        """
        until, losses = time.monotonic() + seconds, []
        rows = self.objective.prepared(Rows(torch.cat(self.pools), None))
        count = len(rows.w)
        for i in range(steps):
            if i >= _LEAST and time.monotonic() > until:
                break
            self.step += 1
            self.engine.optimizer.param_groups[0]["lr"] = rate() * min(1.0, self.step / _WARM)
            batch = rows.take(torch.randint(count, (min(_BATCH, count),)).to(rows.w.device))
            with torch.enable_grad():
                loss = self.engine.backward(self.objective.draw(batch))
            if self.clip(loss):
                self.engine.step()
                self.average.update(self.step)
                losses.append(loss)
            elif self.clip.stuck():
                self.clip.check(self.step)
        return float(torch.stack(losses).mean()) if losses else math.nan

    def values(self) -> list[Tensor]:
        """Return copies of the averaged weights."""
        return [v.clone() for v in self.average.values]

    def assign(self, values: list[Tensor]) -> None:
        """Put weights into the network."""
        with torch.no_grad():
            for p, v in zip(self.parameters, values, strict=True):
                p.copy_(v)


_RATE = 2e-3
_SEARCH, _ANNEAL, _MIX, _CHECK = 0.07, 0.25, 0.08, 0.06  # shares of the time
_REFIT, _MOVE = 0.05, 0.35  # of the time, and of the rest of a round
_CONSTANT = 0.4  # of the training, before the rate falls
_GRADIENTS = 40  # of each particle, at the least, on the way from the start
_FEWEST, _MOVES = 3, (3, 200)
_MIXING = 240  # moves before the first round, at the most: narrow places fill slowly
_LEAPS = (8, 3)  # leapfrog steps where the density is quick, or slow
_FLAT, _WINDOW, _LANDING = 2e-3, 5, 0.5  # nats, rounds, and the share of the training time added
_ROWS, _CHECKED = 128, 10_000


class Round(NamedTuple):
    r"""What one round saw, before its flow was trained on.

    Attributes:
        k_hat: Pareto's k-hat of the weights p / q of independent draws.
        ess: Their effective share, between 0 and 1.
        log_evidence: The log of their mean.
        gap: The mean of :math:`\log p - \log q` over the particles: an estimate of
            :math:`KL(p \| q)` plus the log-evidence, lower is better.
        jumps: The acceptance of independent draws.
        moves: The acceptance of the gradient's moves.
        seconds: The time since the start.
    """

    k_hat: float
    ess: float
    log_evidence: float
    gap: float
    jumps: float
    moves: float
    seconds: float


class RoundsResult(NamedTuple):
    r"""What training from a density did, judged on fresh draws of the flow that was kept.

    Attributes:
        k_hat: Pareto's k-hat of the weights p / q: above 0.7 the flow misses part of a tail.
        ess: The effective sample size of ``draws`` fresh draws.
        log_evidence: :math:`\log \int p`, an estimate.
        log_evidence_stderr: Its standard error; too small where k-hat is large.
        draws: The number of fresh draws these come from.
        particles: The particles at the end, draws of the target, shape ``(N, D)``.
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
    particles: Tensor
    rounds: list[Round]
    best_round: int
    seconds: float
    solver: Solver


class Refinement:
    """A run: the flow, the particles, the clock."""

    def __init__(
        self,
        distribution: InterpolantDistribution,
        flow: Flow,
        density: Density,
        began: float,
        max_seconds: float,
        rounds: int | None,
        bar: Any,
    ) -> None:
        self.distribution, self.flow, self.density = distribution, flow, density
        self.began, self.budget, self.most, self.bar = began, max_seconds, rounds, bar
        self.history = list[Round]()
        self.end = (1 - _CHECK) * max_seconds
        self.best, self.best_round, self.landing = math.inf, 0, False

    def spent(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self.began

    def begin(self, wide: Mixture, draws: int) -> None:
        """Find particles of the target, and whiten the flow by them."""
        density, budget = self.density, self.budget
        mixture = search(density, wide, seconds=_SEARCH * budget)
        slow = density.seconds * draws * _GRADIENTS > 0.2 * budget
        self.kernel = Kernel(_LEAPS[slow])
        affordable = 0.2 * budget / (_GRADIENTS * max(density.seconds, 1e-9))
        count = int(max(min(500, draws), min(draws, affordable)))
        self.particles, evidence = annealed(
            mixture.sample(count), density, mixture.with_gradient, self.kernel,
            deadline=self.began + _ANNEAL * budget, look=self._show,
        )  # fmt: skip
        self.kernel.adapt_metric(self.particles.x)
        pools = [self.particles.x]
        until = time.monotonic() + _MIX * budget
        for i in range(_MIXING):
            if i >= _FEWEST and time.monotonic() > until:
                break
            self.particles, _ = self.kernel(self.particles, density.with_gradient)
            if i % (_MIXING // 8) == _MIXING // 8 - 1:
                pools.append(self.particles.x)
        precondition(self.flow, self.distribution, Rows(self.particles.x, None))
        self.refit = Refit(self.flow, pools)
        self.kept = self.refit.values()
        self.first = self.spent()

    def rate(self) -> float:
        """Return the learning rate: constant, then a cosine to zero."""
        done = (self.spent() - self.first) / max(self.end - self.first, 1e-9)
        if self.most is not None:
            done = max(done, len(self.history) / self.most)
        late = min(1.0, max(0.0, (done - self.constant()) / (1 - self.constant())))
        return _RATE * 0.5 * (1 + math.cos(math.pi * late))

    def constant(self) -> float:
        """Return the share of the training before the rate falls."""
        return self.level if self.landing else _CONSTANT

    def round(self, steps: int) -> bool:
        """Refit, jump, move; return whether to go on."""
        began = time.monotonic()
        self.refit(steps, self.rate, seconds=min(_REFIT * self.budget, self.end - self.spent()))
        with self.refit.average.applied():
            self.distribution.clear_cache()
            coarse_solver(self.distribution, self.particles.x)
            jump = jumped(self.distribution, self.particles, self.density)
        if jump.gap < self.best:
            self.best, self.best_round = jump.gap, len(self.history)
            self.kept = self.refit.values()
        self.particles, acceptance = self._moved(jump.particles, time.monotonic() - began)
        self.refit.add(self.particles.x)
        self.history.append(self._seen(jump, acceptance))
        self._show_round()
        self._land_if_flat()
        done = self.most is not None and len(self.history) >= self.most
        return self.spent() < self.end and not done

    def _moved(self, particles: Particles, seconds: float) -> tuple[Particles, float]:
        """Move by the gradient of the target, for a share of the time of the round so far."""
        self.kernel.adapt_metric(particles.x)
        until, rates = time.monotonic() + _MOVE * seconds, list[float]()
        least, most = _MOVES
        while len(rates) < least or (len(rates) < most and time.monotonic() < until):
            particles, rate = self.kernel(particles, self.density.with_gradient)
            rates.append(rate)
        return particles, sum(rates) / len(rates)

    def _seen(self, jump: Jump, acceptance: float) -> Round:
        summary, count = judge(jump.log_weights), len(jump.log_weights)
        return Round(
            summary.k_hat,
            summary.ess / count,
            summary.log_evidence,
            jump.gap,
            jump.acceptance,
            acceptance,
            self.spent(),
        )

    def _land_if_flat(self) -> None:
        """Let the rate fall from now on where nothing has improved for some rounds."""
        gaps = [r.gap for r in self.history]
        if self.landing or len(gaps) < 2 * _WINDOW:
            return
        late, early = gaps[-_WINDOW:], gaps[-2 * _WINDOW : -_WINDOW]
        if sum(early) / _WINDOW - sum(late) / _WINDOW < _FLAT and self.history[-1].k_hat < 0.7:
            now = self.spent()
            self.end = min(self.end, now + _LANDING * (now - self.first))
            self.landing = True
            self.level = (now - self.first) / (self.end - self.first)

    def verdict(self) -> RoundsResult:
        """Keep the last flow or the best, whichever is better on fresh draws, and judge it."""
        last, few = self.refit.values(), self.particles.x[: _ROWS * 8]
        self.refit.assign(last)
        self.distribution.clear_cache()
        few = few[torch.randperm(len(few))[:_ROWS].to(few.device)]
        solver = calibrate(self.distribution, few)
        chosen = len(self.history) - 1
        if self.best_round != chosen:
            scores = []
            for values in (self.kept, last):
                self.refit.assign(values)
                self.distribution.clear_cache()
                w = fresh_weights(self.distribution, self.density, _CHECKED // 4)
                scores.append(_smoothed_sample_size(w))
            if scores[0] > 1.2 * scores[1]:
                chosen = self.best_round
                self.refit.assign(self.kept)
        self.distribution.clear_cache()
        w = fresh_weights(self.distribution, self.density, _CHECKED)
        return RoundsResult(
            *judge(w), len(w), self.particles.x, self.history, chosen, self.spent(), solver
        )  # fmt: skip

    def _show(self, b: float, rate: float, evidence: float, x: Tensor) -> None:
        self.bar.set_postfix_str(f"tempering: {b:.3g}", refresh=False)
        self._advance()

    def _show_round(self) -> None:
        r = self.history[-1]
        self.bar.set_postfix_str(f"k-hat={r.k_hat:.2f} ess={r.ess:.0%}", refresh=False)
        self._advance()

    def _advance(self) -> None:
        done = self.spent() / self.budget
        if self.most is not None:
            done = max(done, len(self.history) / self.most)
        self.bar.update(max(0, min(100, int(100 * done)) - self.bar.n))


def _smoothed_sample_size(log_weights: Tensor) -> float:
    """Return the effective sample size of smoothed weights, zero where there are none."""
    if not bool(torch.isfinite(log_weights).any()):
        return 0.0
    return effective_sample_size(pareto_smooth(log_weights).log_weights)


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
