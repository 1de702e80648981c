r"""Simulated expectation maximisation: latents drawn under a flow, a flow regressed on them."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._torch import seeded, warn_user
from ..diagnostics.calibration import calibrated
from ..diagnostics.psis import log_total
from ..distributions.interpolant import AnyDistribution
from ..distributions.report import Report
from ..nn.modes import evaluated, trainable
from ..solvers.ode import FixedGrid
from ..training.clock import Clock
from ..training.repeats import copy_keys, random_order, rows_to_tell
from ..training.reporting import Show, percent_bar, stage, tell
from ..training.rows import Rows
from ..training.selection import Scores, Selection
from .latents import by_sets, chunks, draw_latents, given
from .noise import Measurements
from .regression import FlowRegression, RateSchedule

_ROUND_STEPS = 50  # of the regression
_RATE = 1e-3  # of the regression, before it falls: at twice of it a good start got worse
_ROUND_ROWS = 2048  # whose latents are drawn anew
_PICKED = 4  # latents of each
_MOST_POOLS = 10  # rounds whose latents are kept, or as many as go once through all rows
# Of the average of the weights. At 1 only its bound at step n acts, (1 + n) / (10 + n), and the
# average is over about the last tenth of the steps. In two runs, at each of three looks, such
# averages were nearer to the truth than those of the last 200 steps, by an eighth in the energy
# distance.
_DECAY = 1.0
_LOOKS = 10  # at the log-evidence of rows held out
_LOOK_ROWS, _MOST_HELD = 1000, 2000  # in a look; in the report, and so held out
_START_MIXED = 0.01  # of the start, in the population that a look judges
_SOLVER = FixedGrid(steps=10)  # between the rounds; what it is off by, the flow would learn
# Of latents, see draw_latents. Two steps, and own draws for all rows, took 85% of the time.
_DRAWS: dict[str, Any] = {"shared": 1024, "own": 4, "steps": 1, "enough": 25}
_LOOK_DRAWS: dict[str, Any] = {"shared": 2048, "own": 16, "steps": 2, "enough": 100}
_REPORT_DRAWS: dict[str, Any] = {"shared": 2048, "own": 64, "steps": 4}
_CANDIDATES = 16  # of an object's posterior draws, in an E-step
# Candidates per object in a look, more than in an E-step: with 16, log-evidences in 2-d were a nat
# too low.
_LOOK_CANDIDATES = 256
_OBJECTS_AT_ONCE = 32  # whose draws are weighted together
_CALIBRATION_ROWS = 256
_TOLERANCE = 1e-2  # nats, of the calibration, and of log-evidences by given draws
_EVIDENCE = "held-out log p(y)"


class NoisyRows:
    """A catalogue of noisy measurements.

    In an E-step a row's latent competes by weight with fresh draws. By weights alone latents are
    too wide where few of the draws explain a row.

    Args:
        rows: The measurements, in the type of the population.
        like: A tensor of the flow's coordinates, shape ``(D,)``, in its type.
    """

    round_rows, look_rows = _ROUND_ROWS, _LOOK_ROWS

    def __init__(self, rows: Measurements, like: Tensor) -> None:
        self.rows, self.present = rows, like.new_full((len(rows), len(like)), math.nan)
        self.known = rows_to_tell(rows.y)

    def __len__(self) -> int:
        """Return their number."""
        return len(self.rows)

    def latents(self, distribution: AnyDistribution, index: Tensor) -> Rows:
        """Return latents of rows, drawn under a population, in the flow's coordinates."""
        parts = []
        for part in chunks(distribution, len(index), _DRAWS["shared"]):
            rows, present = self.rows.take(index[part]), self.present[index[part]]
            draws = draw_latents(distribution, rows, **_DRAWS, present=present)
            possible = draws.log_weights.isfinite().any(-1)
            context = None if rows.context is None else rows.context[possible]
            picked = draws.take(possible).pick(_PICKED)
            self.present[index[part][possible.to(index.device)]] = picked[:, 0]
            parts.append(_rows_of(picked, context))
        return Rows.joined(parts)

    def log_evidence(
        self, distribution: AnyDistribution, index: Tensor, *, finely: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the log-evidence of rows and its standard errors, shape ``(n,)`` each."""
        sizes = _REPORT_DRAWS if finely else _LOOK_DRAWS

        def evidence(few: Measurements) -> tuple[Tensor, Tensor]:
            return draw_latents(distribution, few, **sizes).log_evidence()

        found = by_sets(evidence, distribution, self.rows.take(index), sizes["shared"])
        totals, errors = zip(*found, strict=True)
        return _unbiased(torch.cat(totals), torch.cat(errors))


class PosteriorDraws:
    """A catalogue of posterior draws, made under another prior.

    In an E-step an object's latent competes by weight with some of its draws, fresh ones, and so
    moves by a Markov chain whose law is its posterior under the population, as in
    :func:`~pyro_interpolant.infer.latents.draw_latents`. By weights alone the few draws left
    second moments 2% to 65% too large, in one step.

    Args:
        u: The draws of all N objects, one object after another, in the flow's coordinates, shape
            ``(M, D)``.
        log_prior: The log-density of that prior in the same coordinates, shape ``(M,)``.
        counts: The number of draws of each object, shape ``(N,)``, with the sum M.
        context: What the population is given, shape ``(N, C)``, or None.
    """

    round_rows, look_rows = _ROUND_ROWS // 2, _LOOK_ROWS // 4

    def __init__(
        self, u: Tensor, log_prior: Tensor, counts: Tensor, context: Tensor | None
    ) -> None:
        self.u, self.log_prior, self.context = u, log_prior, context
        self.counts = counts.to(u.device)
        self.first = self.counts.cumsum(0) - self.counts
        self.known = rows_to_tell(u[self.first])
        self.present = self._some(torch.arange(len(counts)), 1)[:, 0]

    def __len__(self) -> int:
        """Return the number of objects."""
        return len(self.counts)

    def _some(self, index: Tensor, count: int) -> Tensor:
        """Return which draws of objects come by chance, shape ``(n, count)``."""
        counts = self.counts[index, None]
        chance = torch.rand(len(index), count, dtype=torch.float64).to(counts.device)
        return self.first[index, None] + (chance * counts).long()

    def _log_weights(
        self, distribution: AnyDistribution, index: Tensor, draws: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return draws of objects, shape ``(n, S)`` of indices, and the logs of their weights."""
        u = self.u[draws]
        context = None if self.context is None else self.context[index]
        flow = given(distribution.without_support(), context)
        return u, flow.log_prob(u) - self.log_prior[draws]

    def latents(self, distribution: AnyDistribution, index: Tensor) -> Rows:
        """Return draws of objects, chosen by weight under a population, and remember one."""
        some = torch.cat((self.present[index, None], self._some(index, _CANDIDATES - 1)), -1)
        u, log_weights = self._log_weights(distribution, index, some)
        share = log_weights.nan_to_num(nan=-1e30, neginf=-1e30).softmax(-1)  # none: any of them
        chosen = torch.multinomial(share, _PICKED, replacement=True)
        self.present[index] = some.gather(1, chosen)[:, 0]
        u = u.gather(1, chosen[..., None].expand(*chosen.shape, u.shape[-1]))
        return _rows_of(u, None if self.context is None else self.context[index])

    def log_evidence(
        self, distribution: AnyDistribution, index: Tensor, *, finely: bool
    ) -> tuple[Tensor, Tensor]:
        """Return log-evidences, up to those under the other prior, and their standard errors."""
        counts = self.counts[index]
        taken = counts if finely else counts.clamp(max=_LOOK_CANDIDATES)
        order = taken.argsort(stable=True)  # few of the numbers below are of no draw then
        found = [
            self._log_evidence(distribution, index.to(order)[few], taken[few])
            for few in order.split(_OBJECTS_AT_ONCE)
        ]
        totals, errors = (torch.cat(parts)[order.argsort()] for parts in zip(*found, strict=True))
        return _unbiased(totals, errors)

    def _log_evidence(
        self, distribution: AnyDistribution, index: Tensor, taken: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return log-evidences by so many draws of each object, and their standard errors."""
        counts = self.counts[index]  # of draws in an order, where they are those of a chain
        places = torch.arange(int(taken.max()), device=counts.device)
        some = torch.minimum(places * counts[:, None] // taken[:, None], counts[:, None] - 1)
        weights = self._log_weights(distribution, index, self.first[index, None] + some)[1]
        weights = torch.where(places < taken[:, None], weights, -math.inf)
        total, error = log_total(weights, taken)
        return total - taken.double().log(), error


def in_turn(objects: Tensor, kept: Tensor) -> Tensor:
    """Return the indices of draws in a random order, one of each object before the next of any.

    Objects of many draws are no more of a population than those of few.

    Args:
        objects: Of which object each draw is, ascending, shape ``(M,)``.
        kept: The indices of the objects that count.
    """
    order = torch.isin(objects, kept).nonzero()[:, 0]
    order = order[torch.randperm(len(order))]
    by_object = objects[order].argsort(stable=True)
    _, sizes = objects[order].unique(return_counts=True)
    turns = torch.empty_like(order)
    turns[by_object] = torch.cat([torch.arange(size) for size in sizes.tolist()])
    return order[turns.argsort(stable=True)]


def _unbiased(totals: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return logs of means of weights without their bias to second order, and their errors.

    They are too low by half of their variance, which is larger where a population is narrower:
    uncorrected, looks prefer wide ones, and those of the start.
    """
    bias = torch.where(errors.isfinite(), -0.5 * errors.square(), 0.0)
    return totals - bias, errors


def _rows_of(u: Tensor, context: Tensor | None) -> Rows:
    """Return latents of n objects, shape ``(n, S, D)``, as rows, each with its context."""
    each = None if context is None else context.repeat_interleave(u.shape[1], 0)
    return Rows(u.flatten(0, 1), each)


Catalogue = NoisyRows | PosteriorDraws


class ExpectationMaximization:
    """Rounds of latents drawn under the flow, and of the regression of the flow on them.

    Args:
        distribution: The flow, trained on the start, which is trained further in place.
        catalogue: The objects.
        held: The indices of those held out.
        steps: The number of steps of the regression.
        clock: The time, whose limit ends the rounds.

    Attributes:
        selection: Which weights are kept, by the log-evidence of rows held out, a hundredth of the
            start mixed in: one row whose evidence is missed must not choose the round.
        start_weights: The weights of the start.

    Raises:
        ValueError: If no row held out has a likelihood under the start.
    """

    def __init__(
        self,
        distribution: AnyDistribution,
        catalogue: Catalogue,
        held: Tensor,
        steps: int,
        clock: Clock,
    ) -> None:
        self.distribution, self.catalogue, self.held = distribution, catalogue, held
        self.steps, self.clock = steps, clock
        self.schedule = RateSchedule(max(1, steps), peak=_RATE)
        self.order = _passes(len(catalogue), held, catalogue.round_rows)
        distribution.transform.solver = _SOLVER
        passes = math.ceil(len(catalogue) / catalogue.round_rows)
        self.regression = FlowRegression(
            distribution, [], most=min(_MOST_POOLS, passes), ema=_DECAY
        )
        self.regression.pools.append(self._latents())
        self.first = self._held_out()
        self.looks, self.selection = 0, Selection()
        self.selection.judge(0, Scores.equal(-self.first))
        self.start_weights = self.kept_weights = self.regression.values()

    def done(self) -> float:
        """Return the share of the steps that is done."""
        return self.regression.descent.steps / self.steps if self.steps else 1.0

    def is_over(self) -> bool:
        """Return whether all steps are done, or the time for them is over."""
        return self.done() >= 1 or (self.clock.is_over() and self.regression.descent.steps > 0)

    def round(self) -> None:
        """Regress the flow on latents, and draw some anew."""
        done = self.regression.descent.steps
        steps = min(_ROUND_STEPS, self.steps - done)
        self.regression(steps, lambda step: self.schedule.rate(done + step))
        with self.regression.descent.averaged():
            self.distribution.clear_cache()
            latents = self._latents()
            looks = int(self.done() * _LOOKS)
            if self.looks < looks < _LOOKS:
                self.looks = looks
                self._look()
        self.regression.add(latents)

    def end(self) -> None:
        """Look at the weights of the last round."""
        if self.regression.descent.steps:
            with self.regression.descent.averaged():
                self.distribution.clear_cache()
                self._look()

    def _latents(self) -> Rows:
        """Return latents of the next objects, drawn by the network as it is used."""
        with evaluated(self.distribution.transform.flow):
            return self.catalogue.latents(self.distribution, next(self.order))

    def _look(self) -> None:
        mixed = torch.logaddexp(
            self._held_out() + math.log1p(-_START_MIXED), self.first + math.log(_START_MIXED)
        )
        if self.selection.judge(self.regression.descent.steps, Scores.equal(-mixed)):
            self.kept_weights = self.regression.values()

    def _held_out(self) -> Tensor:
        """Return log-evidences of some rows held out, by the same draws each time."""
        with seeded(0), evaluated(self.distribution.transform.flow):
            few = self.held[: self.catalogue.look_rows]
            found, _ = self.catalogue.log_evidence(self.distribution, few, finely=False)
            return unexplained_as_worst(found)


def unexplained_as_worst(values: Tensor) -> Tensor:
    """Return log-evidences, ``(n,)``; rows that no draw explains get the worst of the others.

    Raises:
        ValueError: If there is no other.
    """
    finite = values.isfinite()
    if not bool(finite.any()):
        raise ValueError(
            f"expected noise under which latents explain rows, got {len(values)} rows held out "
            "none of which has a finite log-likelihood under any latent drawn: check noise(x, "
            "row), the units of y, and that start is wide enough"
        )
    return torch.where(finite, values, values[finite].min())


def _passes(count: int, held: Tensor, size: int) -> Iterator[Tensor]:
    """Yield the indices of rows that are not held out, in passes of a random order, in parts."""
    kept = torch.ones(count, dtype=torch.bool)
    kept[held] = False
    index = kept.nonzero()[:, 0]
    while True:
        yield from index[torch.randperm(len(index))].split(size)


def held_out(known: Rows, validation: float, seed: int | None) -> tuple[Tensor, Tensor]:
    """Return the indices of the rows held out, and of those to learn from: copies stay together.

    Args:
        known: A row of each, by which copies are known.
        validation: The share to hold out.
        seed: Of the choice.

    Raises:
        ValueError: If there are not two rows of each kind: the error of a mean needs two.
    """
    count = len(known.w)
    held = max(2, min(_MOST_HELD, round(validation * count)))
    if count - held < 2:
        raise ValueError(
            f"expected at least two rows to learn from, beside {held} held out, got {count} in "
            "all: get more data, or lower validation"
        )
    with seeded(seed):
        order, held = random_order(known, held)
    return order[:held].cpu(), order[held:].cpu()


def learn(
    distribution: AnyDistribution,
    catalogue: Catalogue,
    held: Tensor,
    steps: int,
    clock: Clock,
    *,
    seed: int | None,
    progress: bool,
) -> None:
    """Train a flow on a catalogue by expectation maximisation, calibrate it and freeze it.

    Args:
        distribution: The flow, trained on the start.
        catalogue: The objects.
        held: The indices of those held out.
        steps: The number of regression steps.
        clock: The time, whose limit ends the rounds.
        seed: Makes the run reproducible.
        progress: Whether to show a bar, and the report.
    """
    with seeded(seed), torch.no_grad():
        with trainable(distribution.transform.flow.velocity):
            run = ExpectationMaximization(distribution, catalogue, held, steps, clock)
            with percent_bar("rounds", progress=progress) as show:
                try:
                    _go_through_rounds(run, show)
                    run.end()
                finally:
                    run.regression.use(run.kept_weights)
        spent = clock.spent()
        distribution.freeze()
        _finish(run, spent, progress=progress)


def _go_through_rounds(run: ExpectationMaximization, show: Show) -> None:
    """Go through all rounds of a run, or as many as there are before it is interrupted."""
    try:
        while not run.is_over():
            run.round()
            show(run.done(), f"{_EVIDENCE}={-run.selection.best:.4g}")
    except KeyboardInterrupt:
        warn_user("the run was interrupted: the best weights so far were kept")


def _evidence(run: ExpectationMaximization) -> tuple[Tensor, Tensor, float]:
    """Return log-evidences of rows held out and their errors, and the mean of the start's.

    All of the same rows by the same draws.
    """

    def evidence(index: Tensor) -> tuple[Tensor, Tensor]:
        with seeded(0):
            return run.catalogue.log_evidence(run.distribution, index, finely=True)

    values, errors = evidence(run.held)
    start = values
    if run.selection.kept_step:
        run.regression.use(run.start_weights)
        start, _ = evidence(run.held)
        run.regression.use(run.kept_weights)
    return values, errors, float(unexplained_as_worst(start).mean())


def _error_of_mean(keys: Tensor, values: Tensor, errors: Tensor) -> float:
    """Return the error of a mean log-evidence: of rows, whose copies share a key, and of draws."""
    groups = keys.unique(return_inverse=True)[1].to(values.device)
    of_rows = Scores.equal(values)._replace(groups=groups).error()
    return math.hypot(of_rows, float(errors.square().mean().div(len(values)).sqrt()))


def _warn(run: ExpectationMaximization, values: Tensor, errors: Tensor) -> None:
    """Warn of a run without a round, of rows held out that nothing explains, and of few draws."""
    if run.regression.descent.steps == 0:
        warn_user(
            "no steps were left for a round: what is returned is the start, from which no noise "
            "was taken off. Raise steps"
        )
    elif run.done() < 1:
        warn_user(
            f"max_seconds, {run.clock.limit:g}, ended the rounds at {run.done():.0%} of their "
            "steps: the best weights so far were kept. Give fewer steps, or more time"
        )
    none = int((~values.isfinite()).sum())
    if none:
        warn_user(
            f"{none} of {len(values)} rows held out have no likelihood under any latent drawn, "
            "and count as the worst of the others: check their noise and noise_data"
        )
    bias = 0.5 * float(errors[values.isfinite()].square().mean())
    if isinstance(run.catalogue, PosteriorDraws) and bias > _TOLERANCE:
        warn_user(
            f"the draws of each object are few: log-evidences by them are {bias:.2g} nats too low "
            "on average, and less so the wider a population is, which makes it too wide. Give "
            "more draws of each, or draws made under a prior nearer to the population"
        )


def _finish(run: ExpectationMaximization, seconds: float, *, progress: bool) -> None:
    """Calibrate the solver to latents, and evaluate rows held out."""
    few = Rows.joined(run.regression.pools).repeated(_CALIBRATION_ROWS)
    distribution = run.distribution
    with stage("calibrating the solver", progress=progress):
        _, error = calibrated(
            distribution.without_support(),
            few.w,
            context=few.context,
            tolerance=_TOLERANCE,
        )
    with stage("evaluating rows held out", progress=progress):
        values, errors, reference = _evidence(run)
    _warn(run, values, errors)
    keys = copy_keys(run.catalogue.known).cpu()[run.held[: len(values)]]
    errors, values = errors[values.isfinite()], unexplained_as_worst(values)
    distribution.report = Report(
        distribution.transform.flow.event_dim,
        len(run.catalogue),
        seconds,
        run.selection.kept_step,
        run.regression.descent.steps,
        log_prob_error=error,
        held_out=float(values.mean()),
        held_out_stderr=_error_of_mean(keys, values, errors),
        reference=reference,
        reference_name="the start",
        held_out_name=_EVIDENCE,
    )
    if progress:
        tell(repr(distribution.report))
