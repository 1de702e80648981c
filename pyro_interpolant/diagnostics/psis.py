r"""Importance weights :math:`w = p / q`: Pareto smoothing, effective sample size, evidence.

How far a proposal q is from its target p shows in the tail of the weights: the shape of the
generalised Pareto distribution of the largest, k-hat, says which moments of w exist.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.ops.stats import fit_generalized_pareto
from torch import Tensor

from .._torch import seeded
from ..distributions.interpolant import InterpolantDistribution
from ..distributions.rows import as_tensor
from ..solvers.ode import FixedGrid

K_HAT_GOOD = 0.5  # up to it the weights have a variance, and averages the usual error
K_HAT_LIMIT = 0.7  # above it weighted averages are not reliable, of any number of draws
MIN_DRAWS = 100  # the fewest to whose weights a tail can be fitted
_COARSEST = 1.0  # nats, the rounding of the largest log weight, beyond which weights tell nothing
_NEARLY_EQUAL = 0.9  # share of the draws that is effective
_MIN_TAIL = 5  # the fewest largest weights to which a tail is fitted
# At most sqrt(M) times the Kolmogorov distance of M weights from the Pareto distribution fitted to
# them. Of 5,000 sets of weights with 16 known tails, N from 500 to 100,000, the largest had 1.35;
# tails that begin within the M largest have 3 to 6.
_MISFIT = 1.5


class Smoothed(NamedTuple):
    r"""Importance weights with a smoothed tail.

    Attributes:
        log_weights: Normalised, :math:`\sum_i w_i = 1`, in the order given, shape ``(N,)``.
        k_hat: The shape of the generalised Pareto distribution of the largest weights: below 0.5
            all is well, above 0.7 estimates are not reliable; infinite where the tail cannot be
            fitted, or weights are rounded by more than a nat.
    """

    log_weights: Tensor
    k_hat: float


class ImportanceSummary(NamedTuple):
    r"""What importance weights :math:`w = p / q` say of the proposal and of the evidence.

    Attributes:
        k_hat: Pareto's k-hat: below 0.5 all is well, above 0.7 averages over the weights are not
            reliable.
        ess: The effective sample size :math:`(\sum w)^2 / \sum w^2`.
        log_evidence: :math:`\log \frac1N \sum w`, an estimate of :math:`\log \int p`, nats.
        log_evidence_stderr: Its standard error, of chance, of the solver of q, and of the rounding
            of densities; too small where k-hat is large.
    """

    k_hat: float
    ess: float
    log_evidence: float
    log_evidence_stderr: float


def summarise_weights(log_weights: Tensor, solver_error: float = 0.0) -> ImportanceSummary:
    """Return k-hat, effective sample size and evidence; the worst there is if no weight is finite.

    Args:
        log_weights: Unnormalised log weights, ``-inf`` where there is none, shape ``(N,)``.
        solver_error: The error of their mean by the solver of the proposal, nats.
    """
    if not bool(torch.isfinite(log_weights).any()):
        return ImportanceSummary(math.inf, 0.0, -math.inf, math.inf)
    k_hat, ess = pareto_smooth(log_weights).k_hat, effective_sample_size(log_weights)
    total, chance = log_total(log_weights)
    value = float(total) - math.log(len(log_weights))
    # What all draws share, such as a constant of the model, is rounded alike: no mean removes it.
    rounding = torch.finfo(log_weights.dtype).eps * abs(value) / math.sqrt(12)
    return ImportanceSummary(k_hat, ess, value, math.hypot(float(chance), solver_error, rounding))


def finite_or_minus_inf(values: Tensor) -> Tensor:
    """Return log densities or weights, any shape, with ``-inf`` for NaN and ``+inf``: for none.

    A density is infinite at points alone, such as Gamma(0.02, 1) at 0, to which small numbers are
    rounded: draws on them would have all of the weight, and those beside them, which have the mass
    that was there, none.
    """
    return torch.where(torch.isfinite(values), values, -math.inf)


def log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    r"""Return log weights :math:`\log p - \log q`, each ``(N,)``; no density, no weight.

    Where they differ by rounding errors alone, whose tail means nothing, they are their mean.
    """
    raw = finite_or_minus_inf(log_p - log_q)
    rounding = 100 * torch.finfo(raw.dtype).eps * float(log_q.abs().nan_to_num(0.0).max())
    if float(raw.max() - raw.min()) <= rounding:
        return raw.mean().expand_as(raw)
    return raw


@torch.no_grad()
def recompute_largest(
    flow: InterpolantDistribution, x: Tensor, log_p: Tensor, log_q: Tensor, count: int
) -> tuple[Tensor, float]:
    """Compute log q again, at doubled solver steps, where the weights p / q are largest.

    A coarse solver errs most where densities are lowest and weights largest, and these weights
    decide the verdict. A solver that is no fixed grid is relied on.

    Args:
        flow: The proposal.
        x: Its draws, shape ``(N, *event_shape)``.
        log_p: Their target log densities, shape ``(N,)``.
        log_q: Their log densities under the flow, shape ``(N,)``.
        count: How many of the largest.

    Returns:
        The log densities under the flow, shape ``(N,)``, and the mean absolute change of those
        that were computed again, nats.
    """
    finer = _finer(flow)
    if finer is None:
        return log_q, 0.0
    ratio = log_p - log_q
    largest = torch.where(torch.isnan(ratio), -math.inf, ratio).topk(count).indices
    new = finer.log_prob(x[largest])
    change = (new - log_q[largest]).abs().nan_to_num(math.inf, math.inf)
    return log_q.index_copy(0, largest, new), float(change.mean())


def _finer(flow: InterpolantDistribution) -> InterpolantDistribution | None:
    """Return a flow of the same weights at doubled solver steps; None if its grid is not fixed."""
    finer = flow.at(flow.transform.end)  # which shares the weights, and has a solver of its own
    solver = finer.transform.solver
    if not isinstance(solver, FixedGrid):
        return None
    finer.transform.solver = dataclasses.replace(solver, steps=2 * solver.steps)
    return finer


@torch.no_grad()
def solver_error_of_mean(
    flow: InterpolantDistribution, density: Callable[[Tensor], Tensor], count: int
) -> float:
    r"""Return by how much the log of the mean weight p / q moves at doubled solver steps, nats.

    The same base draws go both ways, so that of chance little is left, which is counted in. A
    solver that is no fixed grid is relied on.

    Args:
        flow: The proposal q.
        density: The log density of the target p.
        count: The number of base draws.
    """
    finer, seed = _finer(flow), int(torch.randint(2**31, ()))
    if finer is None:
        return 0.0
    weights = []
    for q in (flow, finer):
        with seeded(seed):
            x, log_q = q.rsample_and_log_prob((count,))
        weights.append(log_ratio(density(x), log_q))
    return change_of_mean(*weights)


def change_of_mean(before: Tensor, after: Tensor) -> float:
    """Return by how much the log of a mean weight changes, and the error of that, as one number.

    Args:
        before: Log weights, shape ``(N,)``.
        after: Those of the same draws, otherwise computed; infinite where none is positive.
    """
    before, after = (finite_or_minus_inf(w) for w in (before, after))
    shift = torch.maximum(before.max(), after.max())
    old, new = ((w - shift).double().exp() for w in (before, after))
    ratio = new.mean() / old.mean()
    chance = (new - ratio * old).std() / (new.mean() * math.sqrt(len(new)))
    return float(torch.hypot(ratio.log(), chance).nan_to_num(math.inf, math.inf))


class WeightedDraws(NamedTuple):
    r"""Draws of a proposal q, and their weights :math:`w = p / q`.

    Attributes:
        x: Shape ``(N, *event_shape)``.
        log_weights: Unnormalised, shape ``(N,)``.
        change: By how much log q moves, in the mean of the largest weights, at doubled solver
            steps, nats; 0 for a proposal without a solver.
        solver_error: By how much the log of the mean weight does.
    """

    x: Tensor
    log_weights: Tensor
    change: float
    solver_error: float

    def summary(self) -> ImportanceSummary:
        """Return what the weights say of the proposal and of the evidence."""
        return summarise_weights(self.log_weights, self.solver_error)


@torch.no_grad()
def weighted_draws(
    proposal: TorchDistributionMixin,
    density: Callable[[Tensor], Tensor],
    count: int,
) -> WeightedDraws:
    """Return fresh draws of a proposal with their weights, the largest computed with care.

    Args:
        proposal: The proposal.
        density: The target, from draws to log densities.
        count: The number of draws.
    """
    x = proposal.rsample(torch.Size((count,)))
    log_p, log_q = density(x), proposal.log_prob(x)
    change = solver_error = 0.0
    if isinstance(proposal, InterpolantDistribution):
        few = tail_length(count)
        log_q, change = recompute_largest(proposal, x, log_p, log_q, few)
        solver_error = solver_error_of_mean(proposal, density, few)
    return WeightedDraws(x, log_ratio(log_p, log_q), change, solver_error)


def pareto_smooth(log_weights: ArrayLike) -> Smoothed:
    r"""Replace the largest importance weights by the quantiles of a Pareto tail fitted to them.

    The tail are the :math:`M = \lceil \min(N/5, 3\sqrt N) \rceil` largest; no weight grows beyond
    the largest raw one. Weights of zero, ``-inf``, stay zero.

    Most of the M largest of nearly equal weights are no tail, and a Pareto distribution fitted to
    them says nothing. So where 90% of the draws are effective, and yet :math:`\hat k > 1/2`, M is
    halved until the M largest follow the distribution fitted to them (a departure from the paper).

    Args:
        log_weights: Unnormalised log weights, shape ``(N,)``.

    Raises:
        ValueError: If they are not of shape ``(N,)``, or none is finite, or one is NaN or +inf.

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry, *Pareto Smoothed Importance Sampling*, JMLR 2024,
        arXiv 1507.02646.

    Example:
        >>> x = torch.randn(1000)
        >>> log_weights, k_hat = pareto_smooth(-0.1 * x)
        >>> bool(abs(log_weights.exp().sum() - 1) < 1e-5), k_hat < 0.5
        (True, True)
    """
    given = _checked(log_weights)
    raw = given.double() - given.double().max()
    values, order = torch.sort(raw)
    tail, excess, k_hat, scale = _tail_of(values)
    smoothed, length = raw.clone(), len(excess)
    if length >= _MIN_TAIL and math.isfinite(k_hat):
        p = (torch.arange(length, dtype=raw.dtype, device=raw.device) + 0.5) / length
        new = (values[-tail - 1].exp() + _quantile(p, k_hat, scale)).log()
        smoothed[order[-length:]] = new.clamp_max(0.0)
    elif length < _MIN_TAIL <= tail and -float(values[-tail - 1]) <= _resolution(given):
        k_hat = -math.inf  # equal weights have no tail
    if torch.finfo(given.dtype).eps * abs(float(given.max())) > _COARSEST:
        k_hat = math.inf  # the fit is to rounding errors
    return Smoothed((smoothed - smoothed.logsumexp(0)).to(given), k_hat)


def _tail_of(log_weights: Tensor) -> tuple[int, Tensor, float, float]:
    """Return how many of the largest weights are the tail, and the Pareto tail fitted to them.

    Args:
        log_weights: Ascending, shape ``(N,)``.

    Returns:
        M, the positive excesses over the largest weight that is not in the tail, shape ``(K,)``
        with K at most M, and shape and scale; infinity and NaN where no tail can be fitted.
    """
    weights, tail = log_weights.exp(), tail_length(len(log_weights))
    nearly_equal = effective_sample_size(log_weights) >= _NEARLY_EQUAL * len(weights)
    while True:
        excess = weights[-tail:] - weights[-tail - 1]
        # Ties with the cutoff have none: counted in, rounded weights had a k-hat of 300.
        excess = excess[excess > 0]
        shape, scale = _fit_tail(excess) if len(excess) >= _MIN_TAIL else (math.inf, math.nan)
        follows = shape <= K_HAT_GOOD or _misfit(excess, shape, scale) <= _MISFIT
        if follows or not nearly_equal or tail < 2 * _MIN_TAIL:
            return tail, excess, shape, scale
        tail //= 2


def _misfit(excesses: Tensor, k: float, scale: float) -> float:
    r"""Return :math:`\sqrt M` times the Kolmogorov distance of excesses from a Pareto tail.

    NaN where there is none.

    Args:
        excesses: Positive and ascending, shape ``(M,)``.
        k: The tail's shape, above 0.
        scale: Its scale.
    """
    count = len(excesses)
    p = -torch.expm1(-torch.log1p(k * excesses / scale) / k)
    steps = torch.arange(count + 1, dtype=p.dtype, device=p.device) / count
    distance = torch.maximum((steps[1:] - p).abs(), (p - steps[:-1]).abs())
    return float(distance.max()) * math.sqrt(count) if count else math.nan


def _resolution(log_weights: Tensor) -> float:
    """Return the largest difference between log weights, ``(N,)``, that rounding can make."""
    largest = log_weights[torch.isfinite(log_weights)].abs().max()
    return 4 * torch.finfo(log_weights.dtype).eps * float(largest)


def tail_length(count: int) -> int:
    """Return the number of the largest of ``count`` weights to which a Pareto tail is fitted."""
    return min(count - 1, math.ceil(min(count / 5, 3 * math.sqrt(count))))


def effective_sample_size(log_weights: ArrayLike) -> float:
    r"""Return :math:`(\sum_i w_i)^2 / \sum_i w_i^2`, between 1 and N.

    Args:
        log_weights: Log weights, normalised or not, shape ``(N,)``.

    Raises:
        ValueError: As in :func:`pareto_smooth`.
    """
    w = _checked(log_weights).double()
    return float((2 * w.logsumexp(0) - (2 * w).logsumexp(0)).exp())


def log_total(log_weights: Tensor, counts: Tensor | None = None) -> tuple[Tensor, Tensor]:
    r"""Return :math:`\log \sum w` and its standard error, shape ``(*)``, of ``(*, N)``.

    The error :math:`\sqrt{1 / \mathrm{ESS} - 1 / N}` of the delta method is too small where
    k-hat is large, and infinite where all weights of a set are zero.

    Args:
        log_weights: Unnormalised log weights, shape ``(*, N)``.
        counts: How many weights there are in each set, shape ``(*)``, the others being zero; or
            None for all.
    """
    share = log_weights.double().softmax(-1)
    number = share.shape[-1] if counts is None else counts
    error = (share.square().sum(-1) - 1 / number).clamp(min=0).sqrt()
    return log_weights.double().logsumexp(-1), error.nan_to_num(math.inf)


def _checked(log_weights: ArrayLike) -> Tensor:
    """Return log weights, floating, or raise a ValueError if they are none, shape ``(N,)``."""
    log_weights = as_tensor(log_weights, "log weights")
    if log_weights.dim() != 1 or len(log_weights) == 0:
        raise ValueError(
            f"expected log weights of shape (N,), N >= 1, got {tuple(log_weights.shape)}"
        )
    bad = torch.isnan(log_weights) | (log_weights == math.inf)
    if bool(bad.any()) or not bool(torch.isfinite(log_weights).any()):
        raise ValueError(
            "expected log weights below infinity, at least one of them finite, got "
            f"{int(bad.sum())} NaN or +inf and {int(torch.isfinite(log_weights).sum())} finite "
            f"ones of {len(log_weights)}"
        )
    return log_weights if log_weights.is_floating_point() else log_weights.double()


def _fit_tail(excesses: Tensor) -> tuple[float, float]:
    """Return shape k and scale of the generalised Pareto distribution of a tail.

    The posterior mean of Zhang & Stephens, *A new and efficient estimation method for the
    generalized Pareto distribution*, Technometrics 51, 2009, shrunk toward 1/2 as in arXiv
    1507.02646, Appendix G.

    Args:
        excesses: Positive and ascending, shape ``(M,)``.

    Returns:
        Infinity and NaN where the fit is not finite, or its scale not positive.
    """
    try:
        shape, scale = fit_generalized_pareto(excesses.cpu())
    except ZeroDivisionError:  # excesses of too many orders of magnitude
        return math.inf, math.nan
    return (shape, scale) if math.isfinite(shape) and scale > 0 else (math.inf, math.nan)


def _quantile(p: Tensor, k: float, scale: float) -> Tensor:
    """Return quantiles of the generalised Pareto distribution of shape k, shape ``(M,)``."""
    tail = -torch.log1p(-p)
    return scale * (tail if abs(k) < 1e-8 else torch.expm1(k * tail) / k)


def shuffled_resampling(log_weights: Tensor, count: int) -> Tensor:
    """Return indices as :func:`systematic_resampling` does, in random order, ``(count,)``."""
    order = torch.randperm(count, device=log_weights.device)
    return systematic_resampling(log_weights, count)[order]


def systematic_resampling(log_weights: Tensor, count: int) -> Tensor:
    """Return indices drawn by weight, shape ``(count,)``: even uniforms with one random offset.

    Args:
        log_weights: Log weights, shape ``(N,)``.
        count: How many.
    """
    total = log_weights.double().softmax(0).cumsum(0)
    u = (torch.arange(count, dtype=total.dtype) + torch.rand((), dtype=total.dtype)) / count
    index = torch.searchsorted(total / total[-1], u.to(total.device))
    return index.clamp_max(len(log_weights) - 1)
