r"""Importance sampling with a guide: how well it covers its posterior, and draws by weight.

The weights :math:`w = p(x(z), y) |dx / dz| / q(z)` of draws of the guide q estimate the evidence,
correct the draws, and show by the tail of their distribution whether q can be relied on.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide import AutoContinuous, AutoLaplaceApproximation
from torch import Tensor

from .._package import check_ranges, whole
from .._torch import seeded, warn_user
from ..diagnostics.psis import (
    K_HAT_GOOD,
    K_HAT_LIMIT,
    MIN_DRAWS,
    ImportanceSummary,
    WeightedDraws,
    pareto_smooth,
    shuffled_resampling,
    weighted_draws,
)
from ..distributions.interpolant import InterpolantDistribution
from ..distributions.report import duration, with_error
from ..training.clock import Clock
from ..training.fitting import FitResult
from .data import is_hidden
from .log_density import LogJoint, evaluated_safely
from .simulation import Simulator
from .sites import SPREAD_DRAWS, LatentSites, one_posterior
from .smc.train import RoundsResult

_VERDICT_DRAWS = 10_000  # fresh draws that judge the guide
# Draws need no weights if this share of them is effective. It bounds the error of a mean, in
# standard deviations, by sqrt(1 / share - 1): 0.33 here, and 1 at a half.
GOOD_SHARE = 0.9
# From this share on they need none whatever k-hat, which has no scale: of 10,000 weights that are
# nearly 1 it is above 0.7 by chance in one set of ten. The largest of N such weights is at most
# sqrt(N) / 10 times their mean, and what a tail of index 0.9 holds beyond it at most 1 / sqrt(N).
_EVEN_SHARE = 0.99
_MOST = 0.5  # the effective share from which only the tails are called poor
# A number is lost if its value on the support maps back to one this far away; and the share of
# all weight by which lost draws may be off, as there may be more where no draw has been.
_LOST, _MOST_LOST = 0.5, 1e-3
_PULL, _PULLS = 0.9, 4  # towards the middle, of draws without a density
_COARSE = 0.1  # nats, the mean change of the largest weights at doubled steps worth a warning


class Density(Protocol):
    """A model's log joint density, such as :class:`~pyro_interpolant.infer.LogJoint`."""

    def __call__(self, z: Tensor, /) -> Tensor:
        """Return log densities, shape ``(N,)``, of unconstrained vectors, shape ``(N, D)``."""

    def displacements(self, z: Tensor, /) -> dict[str, Tensor]:
        """Return by site how far numbers of z move there and back, each ``(N, size)``."""


class ImportanceResult(NamedTuple):
    r"""How well a guide covers its posterior, by weights ``w = p / q`` of its own draws.

    Attributes:
        k_hat: Pareto's k-hat of the weights: below 0.5 all is well, above 0.7 none of this is
            reliable, unless 99% of the draws are effective: then it is of a tail too small to
            matter.
        ess: The effective sample size :math:`(\sum w)^2 / \sum w^2` of the draws.
        log_evidence: :math:`\log \frac1N \sum w`, an estimate of the model's log-evidence, nats.
        log_evidence_stderr: Its standard error, of chance, of the rounding of densities and of
            the flow's solver, whose part is what doubling its steps changes; too small where k-hat
            is large.
        verdict: What follows, in a sentence.
        log_weights: Pareto-smoothed, normalised, shape ``(N,)``.
        draws: The guide's draws by site, each ``(N, *site_shape)``.
    """

    k_hat: float
    ess: float
    log_evidence: float
    log_evidence_stderr: float
    verdict: str
    log_weights: Tensor
    draws: dict[str, Tensor]

    def __repr__(self) -> str:
        """Say the verdict, the evidence and the sites that there are draws of."""
        evidence = with_error(self.log_evidence, self.log_evidence_stderr)
        return f"{self.verdict}\nlog-evidence {evidence} nats; draws of {', '.join(self.draws)}"

    def resampled(self, count: int | None = None, *, seed: int | None = None) -> dict[str, Tensor]:
        """Return draws resampled by their weights: posterior samples for ``Predictive``.

        Args:
            count: How many, M, by systematic resampling, in random order; by default as many as
                there are draws.
            seed: Makes them reproducible; the global generator is then left as it was.

        Returns:
            Sites by name, each ``(M, *site_shape)``.

        Raises:
            ValueError: If ``count`` is below 1 or not whole, or no weight is positive.
        """
        check_ranges(whole("count", count, 1, or_none=True))
        count = len(self.log_weights) if count is None else int(count)
        if not self.ess > 0:
            raise ValueError("expected draws with positive weights, got none")
        with seeded(seed):
            chosen = shuffled_resampling(self.log_weights, count)
        return {name: value[chosen] for name, value in self.draws.items()}


class GuideResult(NamedTuple):
    r"""How good a guide has become, by importance weights of fresh draws.

    Attributes:
        k_hat: Pareto's k-hat, of the tail of the weights: below 0.5 all is well, above 0.7 none of
            this is reliable, unless 99% of the draws are effective: then it is of a tail too
            small to matter.
        ess: The effective sample size of ``draws`` draws.
        log_evidence: An estimate of the model's log-evidence, nats.
        log_evidence_stderr: Its standard error, of chance, of the rounding of densities and of
            the flow's solver, whose part is what doubling its steps changes; too small where k-hat
            is large.
        draws: The number of fresh draws these come from.
        verdict: What follows, in a sentence.
        seconds: The duration.
        training: What the training did.
    """

    k_hat: float
    ess: float
    log_evidence: float
    log_evidence_stderr: float
    draws: int
    verdict: str
    seconds: float
    training: FitResult | RoundsResult

    def __repr__(self) -> str:
        """Say the verdict, the evidence, the time it took, and what the training did."""
        evidence = with_error(self.log_evidence, self.log_evidence_stderr)
        return (
            f"{self.verdict}\nlog-evidence {evidence} nats, in {duration(self.seconds)}\n"
            f"training: {self.training}"
        )


def importance(
    guide: AutoContinuous,
    *args: object,
    count: int = 10_000,
    seed: int | None = None,
    **kwargs: object,
) -> ImportanceResult:
    r"""Judge a guide by Pareto-smoothed importance weights of its draws.

    A mode or a neck of the posterior that no draw visits stays invisible: k-hat is about where the
    guide has been. What helps is a wider start of its training, a larger ``count``, draws of
    another sampler to compare with, and, for funnels,
    :class:`~pyro.infer.reparam.LocScaleReparam` on the model, which removes the neck.

    Args:
        guide: An :class:`~pyro_interpolant.AutoInterpolant`, or another guide of Pyro over one
            unconstrained vector, such as ``AutoMultivariateNormal``.
        *args: The arguments of the model.
        count: The number of draws N.
        seed: Makes it reproducible; the global generator is then left as it was.
        **kwargs: The named arguments of the model.

    Returns:
        The verdict, with a warning if the draws cannot be relied on; the weights; and draws that
        ``resampled`` turns into posterior samples for :class:`~pyro.infer.Predictive`.

    Raises:
        TypeError: If the guide is not over one unconstrained vector.
        ValueError: If ``count`` is below 100 or not whole, the guide has no density, the arguments
            hold several data sets, or the model's log joint density cannot be evaluated; see
            :func:`~pyro_interpolant.log_joint`.

    Warns:
        UserWarning: If k-hat is above 0.7 and fewer than 99% of the draws are effective, or the
            model weighs data that are hidden from an
            :class:`~pyro_interpolant.AmortizedInterpolant`, such as missing ones.

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry, *Pareto Smoothed Importance Sampling*, JMLR 2024,
        arXiv 1507.02646; Yao, Vehtari, Simpson & Gelman, *Yes, but Did It Work?*, ICML 2018,
        arXiv 1802.02538.

    Example:
        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 1.0))
        >>> result = importance(AutoInterpolant(model, init_scale=1.0), count=1000, seed=0)
        >>> result.k_hat < 0.7, result.resampled(5)["x"].shape
        (True, torch.Size([5]))
    """
    check_is_density(guide)
    check_ranges(whole("count", count, MIN_DRAWS))
    count = int(count)
    with seeded(seed):
        sites = LatentSites(guide, *args, **kwargs)
        posterior = one_posterior(guide, *args, **kwargs)
        observed = getattr(guide, "observed", None)  # of an AmortizedInterpolant
        is_whole = observed is None or not is_hidden(Simulator(sites, observed))
    if not is_whole:
        warn_user(
            "the weights are for all data in the arguments, of which the guide is given "
            f"{observed} alone: its own draws are those given that, which guide.calibration() "
            "judges. Where data are missing, what is in their place is weighed as data"
        )
    with seeded(seed):
        density = LogJoint(sites)
        drawn = importance_of(posterior, density, count)
    summary, raw = drawn.summary(), drawn.log_weights
    verdict = judged(posterior.log_prob, density, drawn.x, summary, count)
    log_weights = pareto_smooth(raw).log_weights if summary.ess > 0 else raw
    return ImportanceResult(*summary, verdict, log_weights, sites.unpack(drawn.x))


def check_is_density(guide: object) -> None:
    """Raise an error unless a guide is a density of one unconstrained vector.

    Raises:
        TypeError: If it is not over one unconstrained vector.
        ValueError: If it has no density.
    """
    if not isinstance(guide, AutoContinuous):
        raise TypeError(
            "expected a guide over one unconstrained vector (AutoInterpolant, "
            f"AutoMultivariateNormal, AutoDiagonalNormal, ...), got {type(guide).__name__}"
        )
    if isinstance(guide, AutoLaplaceApproximation):
        raise ValueError(
            "expected a guide with a density, got the point AutoLaplaceApproximation trains: pass "
            "guide.laplace_approximation(*args)"
        )


@torch.no_grad()
def importance_of(
    posterior: TorchDistributionMixin,
    density: Callable[[Tensor], Tensor],
    count: int,
) -> WeightedDraws:
    """Draw from a guide and return the draws with their importance weights.

    Args:
        posterior: The guide's distribution of the unconstrained vector, of event shape ``(D,)``.
        density: The log joint density of the model.
        count: The number of draws N.

    Raises:
        ValueError: If the density of many of the draws is another than one at a time.
    """

    def checked(z: Tensor) -> Tensor:
        if isinstance(density, LogJoint):
            density.check(z)
        return density(z)

    drawn = weighted_draws(posterior, checked, count)
    if isinstance(posterior, InterpolantDistribution):
        rows = "guide.get_posterior(), guide.get_posterior().sample((256,))"
        if posterior.transform.raw_context is not None:
            rows = "guide.posterior, rows, context=data"
        warn_coarse_solver(drawn.change, f"Call calibrate({rows})")
    return drawn


def warn_coarse_solver(change: float, remedy: str) -> None:
    """Warn where the largest weights of a guide are those of its solver's error.

    Args:
        change: By how much their log densities move at doubled solver steps, nats.
        remedy: What to do, a sentence without its stop.
    """
    if change > _COARSE:
        warn_user(
            "the guide's solver is too coarse: where weights are largest, log densities move "
            f"by {change:.2g} nats at doubled steps. {remedy}"
        )


@torch.no_grad()
def at_edges(
    log_q: Callable[[Tensor], Tensor], density: Density, z: Tensor, log_evidence: float
) -> str:
    """Return what is said where evidence is wrong as a type cannot tell values from an edge.

    In float32 a probability of 1 - 1e-9 is 1, and has the density of another; and a number that
    underflows to an edge may have none. Draws of such values are evaluated in float64, too.

    Args:
        log_q: The guide's log density, from unconstrained vectors, ``(N, D)``, to ``(N,)``.
        density: The log joint density.
        z: Draws of the guide, shape ``(N, D)``.
        log_evidence: What their weights tell, nats.

    Returns:
        A part of a sentence, empty where the evidence is right.
    """
    if z.dtype == torch.double or not math.isfinite(log_evidence):
        return ""
    lost, names = torch.zeros_like(z[:, 0], dtype=torch.bool), []
    for name, moved in density.displacements(z).items():
        here = ~(moved < _LOST).all(1)
        names += [repr(name)] if bool(here.any()) else []
        lost |= here
    if not names:
        return ""
    found, exact = (part - log_evidence for part in _lost_weights(log_q, density, z, lost))
    share = float((exact.exp() - found.exp()).abs().sum()) / len(z)
    if not share > _MOST_LOST:
        return ""
    return (
        f"the evidence is off by a share of {share:.2g} or more, for {z.dtype} cannot tell values "
        f"of {' and '.join(names)} from an edge of their support, or from infinity: write the "
        "model in float64, or the site on the real line, as a probability's log-odds are"
    )


def _lost_weights(
    log_q: Callable[[Tensor], Tensor], density: Density, z: Tensor, lost: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the log weights of draws, as they are and as they should be, two of ``(L,)``.

    Some distributions round what they are given: without a density in float64, too, a draw has the
    weight of one nearer to the middle.

    Args:
        log_q: The guide's log density.
        density: The log joint density.
        z: Draws of the guide, shape ``(N, D)``.
        lost: Which of them, shape ``(N,)``.
    """
    few, middle = z[lost], z.mean(0)
    own = log_q(few)
    found = density(few) - own
    try:
        exact = evaluated_safely(density, few.double()) - own
    except Exception:  # whatever a model does with numbers of another type
        exact = torch.full_like(found, -math.inf)
    for _ in range(_PULLS):
        if bool(exact.isfinite().all()):
            break
        few = middle + _PULL * (few - middle)
        nearer = density(few) - log_q(few)
        exact = torch.where(exact == -math.inf, nearer, exact)
    return found, exact


def are_raw_draws_good(summary: ImportanceSummary | GuideResult, count: int) -> bool:
    """Return whether ``count`` draws will do without weights, as :func:`verdict_of` says."""
    if summary.ess >= _EVEN_SHARE * count:
        return True
    return summary.k_hat <= K_HAT_GOOD and summary.ess >= GOOD_SHARE * count


def warn_poor(guide: Any) -> None:
    """Warn, once, where a guide's own draws are known not to be those of the posterior."""
    poor = getattr(guide, "poor", None)  # guides of Pyro's have no verdict
    if poor is not None:
        warn_user(f"the guide's own draws are not those of the posterior: {poor}")
        guide.poor = None


def verdict_of(summary: ImportanceSummary, count: int, edges: str = "") -> str:
    """Return what follows from the weights of ``count`` draws, in a sentence.

    Args:
        summary: What the weights tell.
        count: The number of draws.
        edges: What they cannot tell, by :func:`at_edges`.
    """
    k_hat, ess = summary.k_hat, summary.ess
    numbers = f"k-hat {k_hat:.2f}, {ess:,.0f} effective draws of {count:,}: "
    remedy = (
        "train it longer by fit_guide, start it wider, or straighten the model (LocScaleReparam "
        "on a funnel)"
    )
    if edges:  # which may be why k-hat is large
        return f"Off at an edge, {numbers}{edges}."
    if are_raw_draws_good(summary, count):
        return f"Good, {numbers}the guide's own draws will do, and resampled() ones do better."
    if not k_hat <= K_HAT_LIMIT and ess >= _MOST * count:
        return (
            f"Poor in the tails, {numbers}weights grow at the rarest draws, so neither the "
            f"guide's tails nor the error of the evidence are to be relied on; {remedy}."
        )
    if not k_hat <= K_HAT_LIMIT:
        return (
            f"Poor, {numbers}the guide misses parts of the posterior that weights cannot "
            f"restore, so {remedy} before you trust its draws."
        )
    return f"Usable with weights, {numbers}use resampled() draws, not the guide's own."


def judged(
    log_q: Callable[[Tensor], Tensor],
    density: Density,
    z: Tensor,
    summary: ImportanceSummary,
    count: int,
) -> str:
    """Return the verdict on a guide, with a warning where it cannot be relied on.

    Args:
        log_q: The guide's log density, from unconstrained vectors, ``(N, D)``, to ``(N,)``.
        density: The log joint density.
        z: Draws of the guide, shape ``(N, D)``.
        summary: What the weights of such draws tell.
        count: Of how many.
    """
    edges = at_edges(log_q, density, z, summary.log_evidence)
    verdict = verdict_of(summary, count, edges)
    if edges or not (summary.k_hat <= K_HAT_LIMIT or are_raw_draws_good(summary, count)):
        warn_user(verdict)
    return verdict


def importance_verdict(
    posterior: InterpolantDistribution,
    density: Density,
    clock: Clock,
    seed: int | None,
    training: FitResult | RoundsResult,
) -> GuideResult:
    """Judge a trained guide by fresh draws, those of its training where it has some.

    Args:
        posterior: The guide's distribution of the unconstrained vector, shape ``(D,)``.
        density: The log joint density, from ``(N, D)`` to ``(N,)``.
        clock: The time spent.
        seed: The seed of the training.
        training: What the training did.
    """
    with seeded(None if seed is None else seed + 1), torch.no_grad():
        if isinstance(training, RoundsResult):
            # Weights of fresh draws are there, and particles, which have a density, off edges.
            summary, count = ImportanceSummary(*training[:4]), training.draws
            z = posterior.sample((SPREAD_DRAWS,))
        else:
            drawn = importance_of(posterior, density, _VERDICT_DRAWS)
            summary, count, z = drawn.summary(), len(drawn.x), drawn.x
    verdict = judged(posterior.log_prob, density, z, summary, count)
    return GuideResult(*summary, count, verdict, clock.spent(), training)
