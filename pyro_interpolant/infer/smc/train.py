r"""A flow and particles of an unnormalised density p train each other, round by round.

A round regresses the flow q on the particles, proposes to the particles by the flow, with
acceptance by w = p / q, and moves them by Hamiltonian Monte Carlo. Weights w of fresh draws judge
the flow.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..._package import check_ranges, whole
from ..._torch import seeded, warn_user
from ...diagnostics.calibration import calibrated
from ...diagnostics.psis import (
    K_HAT_LIMIT,
    WeightedDraws,
    effective_sample_size,
    finite_or_minus_inf,
    pareto_smooth,
    summarise_weights,
    weighted_draws,
)
from ...distributions.interpolant import InterpolantDistribution
from ...distributions.report import duration, with_error
from ...nn.modes import evaluated, trainable
from ...solvers.ode import FixedGrid, Solver
from ...solvers.parallel import one_thread_each
from ...training.clock import Clock
from ...training.fitting import trainable_flow
from ...training.reporting import Show, percent_bar
from ...training.rows import Rows
from ...training.whitening import set_whitening
from ...transforms.flow import Flow
from ..regression import FlowRegression, RateSchedule
from .pathfinder import StudentTMixture, initial_mixture, pathfinder
from .tempering import HMCKernel, LogDensity, Particles, tempered_smc

_FLAT = 2e-3  # nats, the improvement over a window of rounds below which a run is flat
_FLAT_WINDOW = 5  # rounds
_ROUNDS = 20  # the most, by default
# The most times that a round's regression goes through its rows, which it would learn by heart:
# of the few particles of a slow density 170 to 340 times gave a nat more on them than on fresh
# draws.
_PASSES = 20
# For each dimension at least. Of 100 in 60 dimensions, of which half are effective, none left the
# few directions that they were drawn to: their variance was half of the target's, and the
# log-evidence off by 200 nats.
_PARTICLES_PER_DIM = 3
# By the gradient in a round: so many over the acceptance of the flow's independent draws, at most.
_ROUND_MOVES, _MOST_ROUND_MOVES = 6, 64
_MIXING_MOVES = 64  # before the first round: narrow places fill slowly
_POOLS_OF_MIXING = 8  # how often the rows are kept meanwhile
_CALIBRATION_ROWS = 128  # particles on which the solver is calibrated
_TOLERANCE = 1e-2  # nats, of the calibration
_VERDICT_DRAWS = 10_000  # fresh draws that judge the flow
_BETTER = 1.2  # times as many effective draws: by less, the last flow is kept, not the best
_GRID_STEPS = (6, 8, 12, 16, 24, 32, 48)  # of the solver in a round, that are tried
_MAX_SOLVER_ERROR = 0.03  # nats, mean, of a solver within a round
_ERROR_ROWS = 64  # on which it is measured
_INDEPENDENT_SHARE = 0.6  # of the particles, which jump to independent draws
_JUMP_DECADES = 1.3  # how far below 1 the size s of the other jumps goes


class Round(NamedTuple):
    r"""How good the flow was in one round, and how the particles moved.

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

    def text(self) -> str:
        """Return it in a few words."""
        return f"k-hat={self.k_hat:.2f} ess={self.ess:.0%}"


class RoundsResult(NamedTuple):
    r"""The importance weights of fresh draws of a trained flow, its particles, and the rounds.

    Attributes:
        k_hat: Pareto's k-hat of the weights p / q: below 0.5 all is well, above 0.7 the flow
            misses part of a tail.
        ess: The effective sample size of ``draws`` fresh draws.
        log_evidence: :math:`\log \int p`, an estimate.
        log_evidence_stderr: Its standard error, of chance, of the rounding of densities and of
            the flow's solver, whose part is what doubling its steps changes; too small where k-hat
            is large.
        draws: The number of fresh draws these come from.
        particles: The particles at the end, draws of the target, shape ``(N, D)``.
        rounds: The history.
        best_round: The index of the round whose flow was kept.
        seconds: The duration.
        solver: The calibrated solver that was set.
        stopped_by: What ended it: ``"rounds"``, ``"time"`` or ``"interrupt"``.
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
    stopped_by: str

    def __repr__(self) -> str:
        """Say how good the flow is, and what it took."""
        evidence = with_error(self.log_evidence, self.log_evidence_stderr)
        return (
            f"k-hat {self.k_hat:.2f}, {self.ess:,.0f} effective draws of {self.draws:,}; "
            f"log-evidence {evidence} nats; best of "
            f"{len(self.rounds)} rounds: {self.best_round + 1}, ended by {self.stopped_by} in "
            f"{duration(self.seconds)}; "
            f"{len(self.particles):,} particles; {self.solver}"
        )


def _find_particles(
    density: LogDensity, wide: StudentTMixture, draws: int, clock: Clock, show: Show
) -> tuple[Particles, HMCKernel, list[Tensor]]:
    """Carry particles from a wide start to the target, about ``draws``, and let them mix.

    Returns:
        N particles; the moves, their step adapted; and the particles as they were from time to
        time, each of shape ``(N, D)``.
    """
    mixture, kernel = pathfinder(density, wide, clock), HMCKernel()
    x = mixture.sample(max(draws, _PARTICLES_PER_DIM * wide.loc.shape[1]))
    for level in tempered_smc(x, LogDensity(mixture.log_prob), density, kernel):
        show(0.0, f"tempering: {level.exponent:.3g}")
        if level.exponent < 1 and clock.is_over():
            warn_user(
                f"max_seconds, {duration(clock.limit)}, was too short for particles to reach the "
                f"target: they are {level.exponent:.2g} of the way, and wider than it is. Give "
                "some times as much, fewer draws, or a start nearer to it"
            )
            break
    particles = level.particles
    kernel.adapt_metric(particles.x)
    pools = [particles.x]
    every = _MIXING_MOVES // _POOLS_OF_MIXING
    for i in range(_MIXING_MOVES):
        if clock.is_over():
            break
        particles, _ = kernel(particles, density.particles)
        if i % every == every - 1:
            pools.append(particles.x)
    return particles, kernel, pools


class Jump(NamedTuple):
    r"""The result of one proposal of the flow to each particle.

    Attributes:
        particles: Where the particles are now.
        log_weights: Of the independent draws, :math:`\log p - \log q`, shape ``(M,)``.
        gap: The mean of :math:`\log p - \log q` over the particles before they jumped: the
            divergence :math:`KL(p \| q)` plus the log-evidence.
        acceptance: The mean acceptance of the independent draws.
    """

    particles: Particles
    log_weights: Tensor
    gap: float
    acceptance: float


def flow_proposal_step(
    distribution: InterpolantDistribution, particles: Particles, density: LogDensity
) -> Jump:
    r"""Propose a new place to each particle by the flow; accept by Metropolis-Hastings.

    With z the base point of x, :math:`z' = \sqrt{1 - s^2} z + s \xi`, :math:`\xi \sim N(0, I)`
    leaves the base, and so x' = f(z') the flow, as it is: for every s the jump is accepted with
    probability :math:`\min(1, w(x') / w(x))`, w = p / q. At s = 1, for most particles, x' is an
    independent draw; the others keep part of the geometry that the flow has learned.

    Args:
        distribution: The flow, from its default base.
        particles: Particles of the target, N of them.
        density: The target.

    References:
        Cotter, Roberts, Stuart & White, *MCMC methods for functions*, Statistical Science 28,
        2013, eq. 4.7; Gabrie, Rotskoff & Vanden-Eijnden, *Adaptive Monte Carlo augmented with
        normalizing flows*, PNAS 119, 2022, arXiv 2105.12603.
    """
    transform, x = distribution.transform, particles.x
    log_q, z = distribution.log_prob(x), transform.inv(x)
    whole = torch.rand(len(x), 1).to(x) < _INDEPENDENT_SHARE
    whole[0] = True
    size = torch.where(whole, 1.0, 10.0 ** (-_JUMP_DECADES * torch.rand(len(x), 1).to(x)))
    new_x = transform((1 - size**2).sqrt() * z + size * torch.randn_like(z))
    new = density.particles(new_x)
    log_weights = finite_or_minus_inf(new.log_p - distribution.log_prob(new_x))
    ratio = log_weights - (particles.log_p - log_q)
    accepted = torch.rand(len(x)).to(ratio).log() < ratio
    gap = float((particles.log_p - log_q).double().mean())
    chosen = whole[:, 0]
    rate = float(accepted[chosen].double().mean())
    return Jump(new.where(accepted, particles), log_weights[chosen], gap, rate)


def coarse_solver(distribution: InterpolantDistribution, x: Tensor) -> None:
    """Set the coarsest grid on which densities hardly change at the next finer one.

    A solver that is no fixed grid is left alone.

    Args:
        distribution: The flow.
        x: Rows, shape ``(N, D)``, on some of which densities are compared.
    """
    present = distribution.transform.solver
    if not isinstance(present, FixedGrid):
        return
    x = x[torch.randperm(len(x))[:_ERROR_ROWS].to(x.device)]
    last, chosen = None, _GRID_STEPS[0]
    for steps in _GRID_STEPS:
        distribution.transform.solver = replace(present, steps=steps)
        value = distribution.log_prob(x)
        if last is not None and float((value - last).abs().mean()) < _MAX_SOLVER_ERROR:
            break
        last, chosen = value, steps
    distribution.transform.solver = replace(present, steps=chosen)


class Rounds:
    """Rounds of regression on the particles, of proposals by the flow, and of Hamiltonian moves.

    Args:
        distribution: The flow, which is trained in place; its whitening map is set here.
        density: The target.
        particles: Particles of the target.
        kernel: What moves them.
        pools: Rows to begin with, each of shape ``(N, D)``.
        rounds: The most rounds.
        clock: The time, whose limit ends them.
    """

    def __init__(
        self,
        distribution: InterpolantDistribution,
        density: LogDensity,
        particles: Particles,
        kernel: HMCKernel,
        pools: list[Tensor],
        rounds: int,
        clock: Clock,
    ) -> None:
        self.distribution, self.density, self.clock = distribution, density, clock
        self.particles, self.kernel = particles, kernel
        set_whitening(self.distribution, Rows(self.particles.x, None))
        # What was learned or measured of other rows does not hold for these.
        distribution.transform.flow.noise = distribution.report = None
        self.regression = FlowRegression(distribution, [Rows(pool, None) for pool in pools])
        self.history = list[Round]()
        self.best_gap, self.best_round = math.inf, 0
        self.best_weights = self.regression.values()
        self.schedule = RateSchedule(rounds)

    def done(self) -> float:
        """Return which share of the run is done."""
        return len(self.history) / self.schedule.end

    def round(self, steps: int) -> bool:
        """Regress the flow, propose by it, move by the gradient; return whether to go on.

        Args:
            steps: The most steps of the regression.
        """
        steps = max(1, min(steps, self.regression.steps_of(_PASSES)))
        before = len(self.history)
        self.regression(steps, lambda step: self.schedule.rate(before + step / steps))
        with self.regression.descent.averaged(), evaluated(self.distribution.transform.flow):
            self.distribution.clear_cache()
            coarse_solver(self.distribution, self.particles.x)
            jump = flow_proposal_step(self.distribution, self.particles, self.density)
        self.particles, acceptance = self._moved(jump)
        self.regression.add(Rows(self.particles.x, None))
        self.history.append(self._diagnosed(jump, acceptance))
        if jump.gap < self.best_gap:
            self.best_gap, self.best_round = jump.gap, len(self.history) - 1
            self.best_weights = self.regression.values()
        if self._is_flat():
            self.schedule = self.schedule.landed(len(self.history))
        return self.done() < 1 and not self.clock.is_over()

    def _moved(self, jump: Jump) -> tuple[Particles, float]:
        """Move by the gradient of the target, more often where few proposals are accepted."""
        particles, rates = jump.particles, list[float]()
        self.kernel.adapt_metric(particles.x)
        wanted = math.ceil(_ROUND_MOVES / max(jump.acceptance, 1e-9))
        for _ in range(min(wanted, _MOST_ROUND_MOVES)):
            particles, rate = self.kernel(particles, self.density.particles)
            rates.append(rate)
        return particles, sum(rates) / len(rates)

    def _diagnosed(self, jump: Jump, acceptance: float) -> Round:
        """Return the diagnostics of a round, by the weights of independent draws."""
        k_hat, ess, log_evidence, _ = summarise_weights(jump.log_weights)
        share, spent = ess / len(jump.log_weights), self.clock.spent()
        return Round(k_hat, share, log_evidence, jump.gap, jump.acceptance, acceptance, spent)

    def _is_flat(self) -> bool:
        """Return whether the gap stayed for some rounds, while the rate does not fall yet."""
        gaps, window = [r.gap for r in self.history], _FLAT_WINDOW
        if self.schedule.landing or len(gaps) < 2 * window:
            return False
        late, early = gaps[-window:], gaps[-2 * window : -window]
        improvement = sum(early) / window - sum(late) / window
        return improvement < _FLAT and self.history[-1].k_hat < K_HAT_LIMIT

    def verdict(self, *, interrupted: bool) -> RoundsResult:
        """Keep the last flow or the best, whichever is better on fresh draws, and judge it."""
        last, few = self.regression.values(), self.particles.x[: _CALIBRATION_ROWS * 8]
        self.regression.use(last)
        few = few[torch.randperm(len(few))[:_CALIBRATION_ROWS].to(few.device)]
        solver = calibrated(self.distribution, few, tolerance=_TOLERANCE).solver
        drawn, chosen = self._weighed(), len(self.history) - 1
        if self.best_round != chosen:
            self.regression.use(self.best_weights)
            of_best = self._weighed()
            if _effective_share(of_best) > _BETTER * _effective_share(drawn):
                drawn, chosen = of_best, self.best_round
            else:
                self.regression.use(last)
        summary, count, spent = drawn.summary(), len(drawn.x), self.clock.spent()
        ended = "interrupt" if interrupted else "time" if self.done() < 1 else "rounds"
        return RoundsResult(
            *summary, count, self.particles.x, self.history, chosen, spent, solver, ended
        )

    def _weighed(self) -> WeightedDraws:
        """Return fresh draws with their weights."""
        return weighted_draws(self.distribution, self.density, _VERDICT_DRAWS)


def _effective_share(drawn: WeightedDraws) -> float:
    """Return which share of draws is effective, by their Pareto-smoothed weights."""
    log_weights = drawn.log_weights
    if not bool(torch.isfinite(log_weights).any()):
        return 0.0
    return effective_sample_size(pareto_smooth(log_weights).log_weights) / len(log_weights)


@one_thread_each()
def train_from_density(
    distribution: InterpolantDistribution,
    log_density: Callable[[Tensor], Tensor],
    *,
    start: Tensor | Distribution | None = None,
    max_seconds: float | None = None,
    draws: int = 4000,
    steps: int = 800,
    rounds: int | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> RoundsResult:
    r"""Train a flow on an unnormalised log-density, in place, and freeze its weights.

    No diagnostic sees a mode or a neck that neither the start nor the moves reached: a start wider
    than the target helps, or writing the model without the neck. An interrupt ends the rounds, and
    what they gave is kept and judged, from the first round on.

    Args:
        distribution: The flow: on real vectors, from its default base.
        log_density: From rows, shape ``(N, D)`` in the flow's type, to :math:`\log p` up to a
            constant, shape ``(N,)``; differentiable. It is asked far away too: what is not
            finite there counts as no density, and it must not raise.
        start: Where the search starts: rows, shape ``(M, D)``, such as draws of the prior; a
            centre, shape ``(D,)``; or a distribution of event shape ``(D,)``. It should be wider
            than the target. By default a Student-t of scale 4 around 0.
        max_seconds: A limit of the time until the verdict, by default none; a run that it cut has
            ``stopped_by="time"``. Where particles have not come to the target by then, a warning
            says so, and the flow is of where they are.
        draws: The number of particles, at least 3 for each dimension. Each takes some 1,000
            gradients of the density: give fewer where it is slow.
        steps: The most regression steps in a round, which goes through its rows 20 times at most.
        rounds: The most rounds, by default 20; fewer where nothing improves any more.
        seed: Makes the run reproducible.
        progress: Whether to show a bar.

    Returns:
        The verdict on fresh draws, and the history.

    Raises:
        TypeError: If the distribution or the start is of the wrong kind.
        ValueError: If the flow has a support, a base or a batch, or starts from data, a setting is
            out of range, the start does not fit, or the density is of the wrong shape or finite
            nowhere near the start.
        RuntimeError: If gradients of the regression stay non-finite.

    References:
        arXiv 2209.15571, eq. 10 (the regression); Gabrie, Rotskoff & Vanden-Eijnden, PNAS 119,
        2022, arXiv 2105.12603 (the rounds); Del Moral, Doucet & Jasra, JRSS B 68, 2006
        (tempering); Vehtari et al., arXiv 1507.02646 (k-hat).
    """
    clock, flow = Clock(max_seconds), _checked_flow(distribution)
    of_rounds = whole("rounds", rounds, 1, or_none=True)
    check_ranges(whole("draws", draws, 100), whole("steps", steps, 1), of_rounds)
    with torch.inference_mode(mode=False), torch.no_grad(), seeded(seed):
        wide = initial_mixture(start, flow.loc)
        density = LogDensity(log_density)
        density.check(wide.sample(256))
        with percent_bar("rounds", progress=progress) as show:
            found = _find_particles(density, wide, int(draws), clock, show)
            with trainable(flow.velocity):
                run = Rounds(distribution, density, *found, int(rounds or _ROUNDS), clock)
                going, interrupted = True, False
                try:
                    while going:
                        going = run.round(int(steps))
                        show(run.done(), run.history[-1].text())
                except KeyboardInterrupt:
                    if not run.history:
                        raise
                    warn_user("the run was interrupted: the best weights so far are kept")
                    interrupted = True
            distribution.freeze()
            return run.verdict(interrupted=interrupted)


def _checked_flow(distribution: InterpolantDistribution) -> Flow:
    """Return the flow of a distribution on real vectors from its default base."""
    if not isinstance(distribution, InterpolantDistribution):
        raise TypeError(f"expected an InterpolantDistribution, got {type(distribution).__name__}")
    flow = trainable_flow(distribution)
    is_from_noise = distribution.base is None and not flow.interpolant.starts_from_data()
    if not (is_from_noise and distribution.space.is_real()) or distribution.batch_shape:
        raise ValueError(
            "expected one flow on real vectors from its default base, which is noise, got "
            f"{distribution} from base={distribution.base} along {type(flow.interpolant).__name__}"
            ": write the density in unconstrained coordinates, with the Jacobian"
        )
    return flow
