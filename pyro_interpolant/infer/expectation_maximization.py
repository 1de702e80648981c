r"""Simulated expectation maximisation: latents drawn under a flow, a flow regressed on them."""

import math
import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._torch import seeded, trainable, warn_user
from ..diagnostics.calibration import calibrate_until
from ..distributions.interpolant import AnyDistribution
from ..distributions.report import Report
from ..solvers.ode import FixedGrid
from ..training.clock import Clock
from ..training.optimization import assign
from ..training.reporting import stage, tell
from ..training.rows import Rows
from .latents import chunks, draw_latents, given, log_total
from .noise import Measurements
from .regression import FlowRegression
from .schedule import RateSchedule

_END_SHARE = 0.9  # of the time; the rest: calibration, and the evidence of rows held out
_ROUND_STEPS = 50  # of the regression
_ROUND_ROWS = 2048  # whose latents are drawn anew
_PICKED = 4  # latents of each
_MOST_POOLS = 10  # rounds whose latents are kept, or as many as go once through all rows
_DECAY = 0.995  # of the average of the weights: the flow that latents are drawn under lags little
_LOOKS = 10  # at the log-evidence of rows held out
_LOOK_ROWS, _MOST_HELD = 500, 2000  # in a look; in the report, and so held out
_SOLVER = FixedGrid(steps=4)  # between the rounds: 0.005 off, in whitened units
_DRAWS = {"shared": 1024, "own": 4, "steps": 2}  # of latents, see draw_latents
_LOOK_DRAWS = {"shared": 2048, "own": 16, "steps": 2}
_REPORT_DRAWS = {"shared": 2048, "own": 64, "steps": 4}
_CANDIDATES = 16  # of an object's posterior draws, in an E-step
_CALIBRATION_ROWS = 256
_TOLERANCE = 1e-2  # nats, of the calibration
_EVIDENCE = "held-out log p(y)"


class Catalogue(Protocol):
    """N objects, of each of which something is known."""

    round_rows: int

    def __len__(self) -> int:
        """Return N."""

    def latents(self, distribution: AnyDistribution, index: Tensor) -> Rows:
        """Return latents of objects, drawn under a population, in the flow's coordinates."""

    def log_evidence(
        self, distribution: AnyDistribution, index: Tensor, *, finely: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the log-evidence of objects and its standard errors, shape ``(n,)`` each."""


class NoisyRows:
    """A catalogue of noisy measurements.

    Args:
        rows: The measurements, in the type of the population.
    """

    round_rows = _ROUND_ROWS

    def __init__(self, rows: Measurements) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Return their number."""
        return len(self.rows)

    def latents(self, distribution: AnyDistribution, index: Tensor) -> Rows:
        """Return latents of rows, drawn under a population, in the flow's coordinates."""
        parts = []
        for part in chunks(len(index), _DRAWS["shared"]):
            rows = self.rows.take(index[part])
            flow = given(distribution, rows.context)
            draws = draw_latents(flow, rows, **_DRAWS)
            possible = draws.log_weights.isfinite().any(-1)
            context = None if rows.context is None else rows.context[possible]
            parts.append(_rows_of(draws.take(possible).pick(_PICKED), context))
        return Rows.joined(parts)

    def log_evidence(
        self, distribution: AnyDistribution, index: Tensor, *, finely: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the log-evidence of rows and its standard errors, shape ``(n,)`` each."""
        found, sizes = [], _REPORT_DRAWS if finely else _LOOK_DRAWS
        for part in chunks(len(index), sizes["shared"]):
            rows = self.rows.take(index[part])
            flow = given(distribution, rows.context)
            found.append(draw_latents(flow, rows, **sizes).log_evidence())
        values, errors = zip(*found, strict=True)
        return torch.cat(values), torch.cat(errors)


class PosteriorDraws:
    """A catalogue of posterior draws, made under another prior.

    Args:
        u: In the flow's coordinates, shape ``(N, K, D)``.
        log_prior: The log-density of that prior in the same coordinates, shape ``(N, K)``.
        context: What the population is given, shape ``(N, C)``, or None.
    """

    round_rows = _ROUND_ROWS // 2

    def __init__(self, u: Tensor, log_prior: Tensor, context: Tensor | None) -> None:
        self.u, self.log_prior, self.context = u, log_prior, context

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.u)

    def _log_weights(
        self, distribution: AnyDistribution, index: Tensor, draws: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return draws of objects, shape ``(n, S)`` of indices, and the logs of their weights."""
        u = self.u[index[:, None], draws]
        context = None if self.context is None else self.context[index]
        flow = given(distribution.without_support(), context)
        return u, flow.log_prob(u) - self.log_prior[index[:, None], draws]

    def latents(self, distribution: AnyDistribution, index: Tensor) -> Rows:
        """Return draws of objects, chosen by weight under a population."""
        most = self.u.shape[1]
        some = torch.rand(len(index), most).argsort(-1)[:, :_CANDIDATES].to(index.device)
        u, log_weights = self._log_weights(distribution, index, some)
        share = log_weights.nan_to_num(nan=-1e30, neginf=-1e30).softmax(-1)  # none: any of them
        chosen = torch.multinomial(share, _PICKED, replacement=True)
        u = u.gather(1, chosen[..., None].expand(*chosen.shape, u.shape[-1]))
        return _rows_of(u, None if self.context is None else self.context[index])

    def log_evidence(
        self, distribution: AnyDistribution, index: Tensor, *, finely: bool
    ) -> tuple[Tensor, Tensor]:
        """Return log-evidences, up to those under the other prior, and their standard errors."""
        most = self.u.shape[1] if finely else min(self.u.shape[1], _CANDIDATES)
        every = torch.arange(most, device=index.device).expand(len(index), -1)
        total, error = log_total(self._log_weights(distribution, index, every)[1])
        return total - math.log(most), error


def _rows_of(u: Tensor, context: Tensor | None) -> Rows:
    """Return latents of n objects, shape ``(n, S, D)``, as rows, each with its context."""
    each = None if context is None else context.repeat_interleave(u.shape[1], 0)
    return Rows(u.flatten(0, 1), each)


class ExpectationMaximization:
    """Rounds of latents drawn under the flow, and of the regression of the flow on them.

    Args:
        distribution: The flow, trained on a wide start, which is trained further in place.
        catalogue: The objects.
        held: The indices of those held out.
        rounds: Their number, or infinity.
        clock: The time.

    Attributes:
        best: The mean log-evidence of rows held out, of the weights kept.
        first: The same of the start.
    """

    def __init__(
        self,
        distribution: AnyDistribution,
        catalogue: Catalogue,
        held: Tensor,
        rounds: float,
        clock: Clock,
    ) -> None:
        self.distribution, self.catalogue, self.held = distribution, catalogue, held
        self.rounds, self.clock = rounds, clock
        self.schedule = RateSchedule(clock.spent(), _END_SHARE * clock.limit)
        self.order = _passes(len(catalogue), held, catalogue.round_rows)
        distribution.transform.solver = _SOLVER
        self.last = catalogue.latents(distribution, next(self.order))
        passes = math.ceil(len(catalogue) / catalogue.round_rows)
        self.regression = FlowRegression(
            distribution.transform.flow, [self.last], most=min(_MOST_POOLS, passes), ema=_DECAY
        )
        self.count = self.looks = 0
        self.first = self.best = self._held_out()
        self.best_step, self.best_weights = 0, self.regression.values()

    def done(self) -> float:
        """Return the share of the rounds that is done."""
        spent = self.clock.spent() - self.schedule.first
        time_share = spent / max(self.schedule.end - self.schedule.first, 1e-9)
        return max(self.count / self.rounds, time_share)

    def round(self) -> None:
        """Regress the flow on latents, and draw some anew."""
        self.regression(_ROUND_STEPS, self._rate, seconds=math.inf)
        self.count += 1
        with self.regression.average.applied():
            self.distribution.clear_cache()
            self.last = self.catalogue.latents(self.distribution, next(self.order))
            if int(self.done() * _LOOKS) > self.looks:
                self.looks = int(self.done() * _LOOKS)
                self._look()
        self.regression.add(self.last)

    def keep_best(self) -> None:
        """Put the best weights into the network."""
        assign(self.regression.descent.parameters, self.best_weights)
        self.distribution.clear_cache()

    def _rate(self) -> float:
        return self.schedule.rate(self.clock.spent(), self.count / self.rounds)

    def _look(self) -> None:
        found = self._held_out()
        if found > self.best:
            self.best, self.best_step = found, self.regression.descent.steps
            self.best_weights = self.regression.values()

    def _held_out(self) -> float:
        """Return the mean log-evidence of some rows held out, by the same draws each time."""
        with seeded(0):
            few = self.held[:_LOOK_ROWS]
            found, _ = self.catalogue.log_evidence(self.distribution, few, finely=False)
            return float(found.mean())


def _passes(count: int, held: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the indices of rows that are not held out, in passes of a random order, in parts."""
    kept = torch.ones(count, dtype=torch.bool)
    kept[held] = False
    index = kept.nonzero()[:, 0]
    while True:
        yield from index[torch.randperm(len(index))].split(size)


def learn(
    distribution: AnyDistribution,
    catalogue: Catalogue,
    steps: float,
    clock: Clock,
    validation: float,
    *,
    seed: int | None,
    progress: bool,
) -> None:
    """Train a flow on a catalogue by expectation maximisation, calibrate it and freeze it.

    Args:
        distribution: The flow, trained on a wide start.
        catalogue: The objects.
        steps: The number of regression steps, or infinity.
        clock: The time.
        validation: The share of objects held out.
        seed: Makes the run reproducible.
        progress: Whether to show a bar, and the report.
    """
    rounds = steps if steps == math.inf else max(1, round(steps / _ROUND_STEPS))
    count = len(catalogue)
    with seeded(seed), torch.no_grad():
        held = torch.randperm(count)[: max(1, min(_MOST_HELD, round(validation * count)))]
        with trainable(distribution.transform.flow.velocity):
            run = ExpectationMaximization(distribution, catalogue, held, rounds, clock)
            with tqdm(
                total=100, disable=not progress, desc="rounds", unit="%", leave=False
            ) as bar:
                try:
                    while run.done() < 1:
                        run.round()
                        bar.set_postfix_str(f"{_EVIDENCE}={run.best:.4g}", refresh=False)
                        bar.update(min(100, int(100 * run.done())) - bar.n)
                except KeyboardInterrupt:
                    warn_user("the run was interrupted: the best weights so far were kept")
                finally:
                    run.keep_best()
        spent = clock.spent()
        distribution.freeze()
        _finish(run, spent, progress=progress)


def _evidence(run: ExpectationMaximization) -> tuple[Tensor, Tensor]:
    """Return the log-evidence of rows held out and its errors, of few where time is short."""
    began, held, few = time.monotonic(), run.held, run.held[:_LOOK_ROWS]
    found = run.catalogue.log_evidence(run.distribution, few, finely=True)
    pace = (time.monotonic() - began) / len(few)
    if len(few) < len(held) and time.monotonic() + pace * len(held) < run.clock.deadline():
        found = run.catalogue.log_evidence(run.distribution, held, finely=True)
    return found


def _finish(run: ExpectationMaximization, seconds: float, *, progress: bool) -> None:
    """Calibrate the solver to latents, and evaluate rows held out."""
    distribution, few = run.distribution, run.last.repeated(_CALIBRATION_ROWS)
    with stage("calibrating the solver", progress=progress):
        _, error = calibrate_until(
            run.clock.deadline(),
            distribution.without_support(),
            few.w,
            context=few.context,
            tolerance=_TOLERANCE,
        )
    with stage("evaluating rows held out", progress=progress):
        values, errors = _evidence(run)
    total = float((values.var() + errors.square().mean()).div(len(values)).sqrt())
    distribution.report = Report(
        distribution.transform.flow.event_dim,
        len(run.catalogue),
        seconds,
        run.best_step,
        run.regression.descent.steps,
        log_prob_error=error,
        held_out=float(values.mean()),
        held_out_stderr=total,
        reference=run.first,
        reference_name="the start",
        held_out_name=_EVIDENCE,
    )
    if progress:
        tell(repr(distribution.report))
