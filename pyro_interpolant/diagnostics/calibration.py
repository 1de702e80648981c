r"""The numerical error of log_prob, and the fewest solver steps that keep it within a tolerance.

The log-density of a flow is :math:`\log\rho_0(x_0) - \int_0^1 \nabla\cdot v_t(x_t)\,dt`. A grid of
times makes an error of the path and of the integral, Hutchinson's probes one of the divergence.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .._package import check_ranges, number
from .._torch import seeded, warn_user
from ..distributions.interpolant import AnyDistribution, InterpolantDistribution, rows_given
from ..nn.modes import evaluated
from ..solvers.divergence import ExactDivergence, HutchinsonDivergence
from ..solvers.ode import Adaptive, FixedGrid, Solver

_REFERENCE = Adaptive(rtol=1e-8, atol=1e-8, nodes=96)
_FIRST_STEPS, _MAX_STEPS = 4, 256
_FIRST_SAMPLE_STEPS, _MAX_SAMPLE_STEPS, _SAMPLES = 2, 64, 8
_WORST_ROW_FACTOR = 5.0  # by which its error may exceed the tolerance of the mean


class SolverError(NamedTuple):
    """The error a solver makes on given rows, against a tight adaptive solve in float64.

    Attributes:
        density_mean: Mean absolute error of log_prob, nats.
        density_worst: Largest absolute error of log_prob, nats.
        density_bias: Mean error of log_prob, nats; positive where likelihoods are inflated.
        round_trip_mean: Mean distance between a row and its image after data -> base -> data, in
            whitened units.
        round_trip_worst: The largest such distance.
    """

    density_mean: float
    density_worst: float
    density_bias: float
    round_trip_mean: float
    round_trip_worst: float

    def __repr__(self) -> str:
        """Say it in a line."""
        return (
            f"log_prob within {self.density_mean:.1g} nats (worst {self.density_worst:.1g}, bias "
            f"{self.density_bias:+.1g}); round trip within {self.round_trip_mean:.1g} (worst "
            f"{self.round_trip_worst:.1g}) whitened units"
        )


class Calibrated(NamedTuple):
    """The solver that a calibration leaves.

    Attributes:
        solver: The grid that it has set.
        error: Its mean absolute error of log_prob, nats, or its error of samples, standard
            deviations.
    """

    solver: FixedGrid
    error: float


def solver_error(
    distribution: AnyDistribution, x: Tensor, *, context: Tensor | None = None
) -> SolverError:
    """Measure the error of log_prob and of the round trip at the present solver setting.

    Rows that one of the two solves alone leads beyond the bounds of a base have no error of
    log_prob, and are left out of it.
    A base that is a flow keeps its own solver, whose error is not counted: measure it by itself,
    on draws of ``distribution.base``.

    Args:
        distribution: A trained flow.
        x: Rows to measure on, shape ``(N, *event_shape)``; a few hundred held-out rows will do.
        context: Their contexts, shape ``(N, C)``, or one, for a conditional flow.

    Raises:
        TypeError: If rows are not of a floating type.
        ValueError: If rows are of another shape or type, not finite or outside the support, there
            are none, or others than their contexts, or the reference solve fails.
    """
    with torch.no_grad():
        flow, rows = _bare(rows_given(distribution, x, context))
        errors = _errors(flow.log_prob(rows), _reference(flow, rows))
        transform = flow.transform
        again = transform._call(transform._inverse(rows))
        trips = transform.flow.whitening.unpush(again - rows).norm(dim=-1)
    absolute = errors.abs()
    found = absolute.mean(), absolute.max(), errors.mean(), trips.mean(), trips.max()
    return SolverError(*map(float, found))


def log_prob_stderr(
    distribution: AnyDistribution, x: Tensor, *, context: Tensor | None = None
) -> Tensor:
    r"""Return the standard error of log_prob that Hutchinson's probes leave, shape ``(N,)``.

    With :math:`\ell_p` the log-density by probe p alone, it is the standard deviation of
    :math:`\ell_1, \dots, \ell_P` over :math:`\sqrt P`, at the present solver setting, and as
    rough as few numbers leave it: 2 of these errors cover 95% with many probes, some 88% with 4,
    and 71% with 2, or 50% where D is 2, too, and both may be alike. Rows share
    their probes: the error of a mean over rows does not fall with their number. What the
    solver's steps add is not in it: of images, whose solver is set by samples, it may be more.
    A base that is a flow has probes of its own, whose error is not counted: measure it by itself,
    on draws of ``distribution.base``.

    Args:
        distribution: A flow; zero where its divergence is exact.
        x: Rows, shape ``(N, *event_shape)``.
        context: Their contexts, shape ``(N, C)``, or one, for a conditional flow.

    Raises:
        ValueError: If there is one probe alone, a path from the data has none to start from, or
            rows cannot be those of a density, as in :func:`solver_error`.
        TypeError: If the divergence is neither exact nor Hutchinson's, or rows are not of a
            floating type.
    """
    divergence = distribution.transform.divergence
    if isinstance(divergence, HutchinsonDivergence) and divergence.probes < 2:
        raise ValueError("expected at least two probes, to estimate their spread, got probes=1")
    if not isinstance(divergence, ExactDivergence | HutchinsonDivergence):
        raise TypeError(
            "expected ExactDivergence or HutchinsonDivergence, got "
            f"{type(divergence).__name__}: its error is not known here"
        )
    with torch.no_grad():
        distribution.check_start()
        view, x = rows_given(distribution, x, context)
        rows, flow, path = view.to_flow(x), view.transform.flow, view.transform.path()
        if isinstance(divergence, ExactDivergence):
            return rows.new_zeros(rows.shape[:-1])
        times, weights = (s.to(rows) for s in path.times)
        states = flow.integrate(flow.whitening.to_white(rows), path, forward=False)
        rates = [
            divergence.samples(flow.velocity, t, s, path.context)
            for t, s in zip(times, states, strict=True)
        ]
        integrals = torch.tensordot(weights, torch.stack(rates), dims=1)
        return integrals.std(0) / math.sqrt(divergence.probes)


def calibrate(
    distribution: AnyDistribution,
    x: Tensor,
    *,
    tolerance: float = 1e-2,
    context: Tensor | None = None,
) -> FixedGrid:
    """Set the solver to the fewest steps at which log_prob is within a tolerance.

    A grid is good if the mean absolute error of log_prob on the rows is within ``tolerance`` and
    that of the worst row within 5 times as much, against a tight adaptive solve in float64. A grid
    that is too coarse does not only lose precision: it inflates likelihoods. Rows count as in
    :func:`solver_error`.

    Args:
        distribution: A trained flow; its ``transform.solver`` is set.
        x: Held-out rows, shape ``(N, *event_shape)``; a few hundred will do.
        tolerance: The mean absolute error allowed, nats.
        context: Their contexts, shape ``(N, C)``, or one, for a conditional flow.

    Returns:
        The grid that was set. Where none within 256 steps is good, the last one, with a warning
        that gives its error.

    Raises:
        TypeError: If rows are not of a floating type.
        ValueError: If the tolerance is not positive, or as :func:`solver_error`.
    """
    check_ranges(number("a positive tolerance in nats", tolerance, lambda n: n > 0))
    return calibrated(distribution, x, tolerance=tolerance, context=context).solver


def calibrated(
    distribution: AnyDistribution,
    x: Tensor,
    *,
    tolerance: float,
    context: Tensor | None = None,
) -> Calibrated:
    """Set the solver as :func:`calibrate`, and return its error, too.

    Args:
        distribution: As in :func:`calibrate`.
        x: As in :func:`calibrate`, shape ``(N, *event_shape)``.
        tolerance: As in :func:`calibrate`.
        context: As in :func:`calibrate`, shape ``(N, C)``.

    Returns:
        The grid that was set, and its error.
    """
    template = _template(distribution.transform.solver)
    with torch.no_grad(), evaluated(distribution.transform.flow):
        trials = _Trials(rows_given(distribution, x, context), template, tolerance)
        steps = trials.fewest()
    solver = dataclasses.replace(template, steps=steps)
    distribution.transform.solver = solver
    return Calibrated(solver, trials.errors[steps])


def _template(present: Solver) -> FixedGrid:
    """Return the grid whose steps are chosen: that of a solver, or, beside another, the default.

    Where gradients recompute evaluations to save memory, they go on to.
    """
    if isinstance(present, FixedGrid):
        return present
    return FixedGrid(checkpoint=getattr(present, "checkpoint", False))


def _fewest(
    error: Callable[[int], float], tolerance: float, steps: tuple[int, int, int]
) -> tuple[int, float]:
    """Return the fewest steps that are good, or the most tried, and their error.

    Args:
        error: The error at so many steps.
        tolerance: What it may be.
        steps: The fewest to try, those to begin with, which are doubled, and the most.
    """
    least, high, most = steps
    low, found = least - 1, error(high)
    while not found <= tolerance and high < most:
        low, high = high, 2 * high
        found = error(high)
    while found <= tolerance and high - low > 1:
        middle = (low + high) // 2
        at_middle = error(middle)
        if at_middle <= tolerance:
            high, found = middle, at_middle
        else:
            low = middle
    return high, found


class _Trials:
    """The errors of grids of more and more steps on given rows.

    Args:
        given: The flow, given its contexts, and rows, shape ``(N, *event_shape)``.
        template: The grid, but for its steps.
        tolerance: The mean absolute error allowed, nats.

    Attributes:
        errors: The mean absolute error of each number of steps that was tried, nats.
    """

    def __init__(
        self,
        given: tuple[InterpolantDistribution, Tensor],
        template: FixedGrid,
        tolerance: float,
    ) -> None:
        self.template, self.tolerance = template, tolerance
        self.flow, self.rows = _bare(given)
        self.errors: dict[int, float] = {}

    def fewest(self) -> int:
        """Return the fewest steps that are good, or the most tried, with a warning."""
        reference = _reference(self.flow, self.rows)

        def error(steps: int) -> float:
            each = _errors(self._log_prob(steps), reference).abs()
            self.errors[steps] = float(each.mean())
            worst = torch.maximum(each.mean(), each.max() / _WORST_ROW_FACTOR)
            return float(worst.nan_to_num(math.inf, math.inf))

        steps, found = _fewest(error, self.tolerance, (1, _FIRST_STEPS, _MAX_STEPS))
        if found > self.tolerance:
            self._warn(steps, found / self.tolerance)
        return steps

    def _log_prob(self, steps: int) -> Tensor:
        self.flow.transform.solver = dataclasses.replace(self.template, steps=steps)
        return self.flow.log_prob(self.rows)

    def _warn(self, steps: int, ratio: float) -> None:
        found = f"at {steps} it is {ratio:.3g} times the tolerance"
        warn_user(
            f"no grid up to {_MAX_STEPS} steps has log_prob within {self.tolerance} nats of the "
            f"reference: {found}. Set transform.solver = Adaptive(1e-8, 1e-8, nodes=256) for "
            "likelihoods, train longer, or use a smoother network."
        )


def calibrate_sampler(
    distribution: AnyDistribution, *, tolerance: float = 1e-2, context: Tensor | None = None
) -> FixedGrid:
    """Set the solver to the fewest steps at which samples are within a tolerance.

    The error compares 8 fixed samples with those of at least twice the steps: their root mean
    square difference, divided by the root mean square distance of the latter from the data's
    centre, in whitened coordinates. It is for images, where calibrating ``log_prob`` would take
    too long.

    Args:
        distribution: A trained flow; its ``transform.solver`` is set.
        tolerance: The error allowed: 0.01 is 1% of the standard deviation of data.
        context: Contexts to sample for, shape ``(N, C)``, or labels, for a conditional flow.

    Returns:
        The grid that was set. Where none within 64 steps is good, the last one, with a warning
        that gives its error.

    Raises:
        ValueError: If the tolerance is not positive.
    """
    good = number("a positive tolerance in standard deviations", tolerance, lambda n: n > 0)
    check_ranges(good)
    return sampler_calibrated(distribution, tolerance=tolerance, context=context).solver


def sampler_calibrated(
    distribution: AnyDistribution,
    *,
    tolerance: float,
    context: Tensor | None = None,
) -> Calibrated:
    """Set the solver as :func:`calibrate_sampler`, and return its error, too.

    Args:
        distribution: As in :func:`calibrate_sampler`.
        tolerance: As in :func:`calibrate_sampler`.
        context: As in :func:`calibrate_sampler`, shape ``(N, C)``.

    Returns:
        The grid that was set, and its error.
    """
    present = distribution.transform.solver
    template = _template(present)
    with torch.no_grad(), evaluated(distribution.transform.flow), seeded(0):
        samples = _Samples(distribution.given(context), template)
        steps, error = _fewest(
            samples.error,
            tolerance,
            (_FIRST_SAMPLE_STEPS, _FIRST_SAMPLE_STEPS, _MAX_SAMPLE_STEPS),
        )
    if not error <= tolerance:  # that of samples which are not finite is NaN
        warn_user(
            f"no grid has samples within {tolerance} standard deviations of a finer solve: at "
            f"{steps} steps they are within {error:.2g}. Set transform.solver = FixedGrid(...), "
            "or call diagnostics.calibrate_sampler(distribution)"
        )
    solver = dataclasses.replace(template, steps=steps)
    distribution.transform.solver = solver
    return Calibrated(solver, error)


class _Samples:
    """Samples of the same draws of the base by grids of more and more steps.

    Args:
        view: The flow, given its contexts, of one batch dimension at most.
        template: The grid, but for its steps.
    """

    def __init__(self, view: InterpolantDistribution, template: FixedGrid) -> None:
        self.view, self.template = view, template
        own = view.without_support()  # with the batch of contexts; of one of them there are draws
        self.w = own.white_draws(() if own.batch_shape else (_SAMPLES,))
        self.most, self.finest = _FIRST_SAMPLE_STEPS, self._ends(_FIRST_SAMPLE_STEPS)

    def error(self, steps: int) -> float:
        """Return the distance from the finest samples so far, of twice the steps at least."""
        found = self.finest if steps == self.most else self._ends(steps)
        if steps == self.most:
            self.most *= 2
            self.finest = self._ends(self.most)
        off, size = (x.double().square().mean().sqrt() for x in (found - self.finest, self.finest))
        return float(off / size)

    def _ends(self, steps: int) -> Tensor:
        """Return whitened samples, shape ``(B, D)``."""
        transform = self.view.transform
        solver = dataclasses.replace(self.template, steps=steps)
        path = dataclasses.replace(transform.path(), solver=solver)
        return transform.flow.integrate(self.w, path, forward=True)[-1]


def _bare(
    given: tuple[InterpolantDistribution, Tensor],
) -> tuple[InterpolantDistribution, Tensor]:
    """Return the flow on real vectors, with a solver of its own, and rows there, ``(N, D)``."""
    view, x = given
    bare = view.without_support().at(view.transform.end)
    context = bare.transform.raw_context
    # What has a graph cannot be copied.
    bare.transform.raw_context = None if context is None else context.detach()
    return bare, view.to_flow(x)


def _errors(found: Tensor, reference: Tensor) -> Tensor:
    """Return what log-densities are above a reference, shapes ``(N,)``, of rows that have both.

    Beyond the bounds of a base both are ``-inf``, and 0 apart. Near them one may be so alone.
    """
    error = torch.where(found == reference, 0.0, found.double() - reference)
    both = found.isneginf() == reference.isneginf()
    return error[both] if bool(both.any()) else error


def _reference(flow: InterpolantDistribution, rows: Tensor) -> Tensor:
    """Return log_prob, shape ``(N,)``, at rows, shape ``(N, D)``, by a tight solve in float64."""
    exact = copy.deepcopy(flow).to(torch.float64)
    exact.transform.flow.eval()  # an adaptive solve of a path with noise in it would not end
    exact.transform.solver = _REFERENCE
    return exact.log_prob(rows.double())
