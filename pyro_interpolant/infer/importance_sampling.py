r"""How well a guide covers its posterior, told by the weights of its own draws."""

import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import torch
from pyro.infer.autoguide import AutoContinuous, AutoLaplaceApproximation
from torch import Tensor

from .._torch import seeded
from ..diagnostics.psis import effective_sample_size, log_mean_weight, pareto_smooth, systematic
from ..distributions.interpolant import InterpolantDistribution
from ..solvers.ode import FixedGrid
from .log_density import LogJoint, log_joint
from .sites import set_up

__all__ = ["ImportanceResult", "importance", "judged", "verdict_of", "warn_if_poor"]


_LIMIT = 0.7  # of k-hat, above which weighted averages are not reliable
_GOOD = 0.5  # the effective share of the draws from which they need no weights
_COARSE = 0.1  # nats, the mean change of the largest weights at doubled steps worth a warning
_LEAST = 100  # draws, to fit a tail to


class ImportanceResult(NamedTuple):
    r"""How well a guide covers its posterior, by weights ``w = p / q`` of its own draws.

    Attributes:
        k_hat: Pareto's k-hat of the weights: up to 0.5 good, above 0.7 not reliable.
        ess: The effective sample size :math:`(\sum w)^2 / \sum w^2` of the draws.
        log_evidence: :math:`\log \frac1N \sum w`, an estimate of the model's log-evidence, nats.
        log_evidence_stderr: Its standard error; too small where k-hat is large.
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

    def resampled(self, count: int | None = None, *, seed: int | None = None) -> dict[str, Tensor]:
        """Return draws resampled by their weights: posterior samples for ``Predictive``.

        Args:
            count: How many, M, by systematic resampling, in random order; by default as many as
                there are draws.
            seed: Makes them reproducible; the global generator is then left as it was.

        Returns:
            Sites by name, each ``(M, *site_shape)``.

        Raises:
            ValueError: If ``count`` is below 1, or no weight is positive.
        """
        count = len(self.log_weights) if count is None else count
        if count < 1:
            raise ValueError(f"expected count >= 1, got {count}")
        if not self.ess > 0:
            raise ValueError("expected draws with positive weights, got none")
        device = self.log_weights.device
        with seeded(seed, device):
            chosen = systematic(self.log_weights, count)[torch.randperm(count, device=device)]
        return {name: value[chosen] for name, value in self.draws.items()}


def importance(
    guide: AutoContinuous, *args: Any, count: int = 10_000, seed: int | None = None, **kwargs: Any
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
        The verdict, with a warning if k-hat is above 0.7; the weights; and draws that
        ``resampled`` turns into posterior samples for :class:`~pyro.infer.Predictive`.

    Raises:
        TypeError: If the guide is not over one unconstrained vector.
        ValueError: If ``count`` is below 100, the guide has no density, or the model's log joint
            density cannot be evaluated; see :func:`~pyro_interpolant.log_joint`.

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
    if count < _LEAST:
        raise ValueError(f"expected count >= {_LEAST}, got {count}")
    with seeded(seed):
        set_up(guide, *args, **kwargs)
    with seeded(seed, guide._init_loc().device):
        result = judged(guide, log_joint(guide, *args, **kwargs), count)
    warn_if_poor(result.k_hat, result.verdict)
    return result


@torch.no_grad()
def judged(guide: AutoContinuous, density: LogJoint, count: int) -> ImportanceResult:
    """Return the verdict on a guide, by ``count`` draws and the log joint density of its model."""
    posterior = guide.get_posterior(*density.args, **density.kwargs)
    z = posterior.rsample((count,))
    log_p, log_q = density(z), posterior.log_prob(z)
    if isinstance(posterior, InterpolantDistribution):
        log_q = _refined(posterior, z, log_p, log_q)
    raw = _ratio(log_p, log_q)
    draws = density.unpack(z)
    if not bool(torch.isfinite(raw).any()):
        text = verdict_of(math.inf, 0.0, count)
        return ImportanceResult(math.inf, 0.0, -math.inf, math.inf, text, raw, draws)
    log_weights, k_hat = pareto_smooth(raw)
    ess = effective_sample_size(raw)
    text = verdict_of(k_hat, ess, count)
    return ImportanceResult(k_hat, ess, *log_mean_weight(raw), text, log_weights, draws)


def verdict_of(k_hat: float, ess: float, count: int) -> str:
    """Return what follows from k-hat and the effective sample size of draws, in a sentence."""
    told = f"k-hat {k_hat:.2f}, {ess:,.0f} effective draws of {count:,}: "
    remedy = (
        "train it longer by fit_guide, start it wider, or straighten the model (LocScaleReparam "
        "on a funnel)"
    )
    if not k_hat <= _LIMIT and ess >= _GOOD * count:
        return (
            f"Poor in the tails, {told}rare draws outweigh all others, so neither the guide's "
            f"tails nor the error of the evidence are to be relied on; {remedy}."
        )
    if not k_hat <= _LIMIT:
        return (
            f"Poor, {told}the guide misses parts of the posterior that weights cannot restore, so "
            f"{remedy} before you trust its draws."
        )
    if ess < _GOOD * count:
        return f"Usable with weights, {told}use resampled() draws, not the guide's own."
    return f"Good, {told}the guide's own draws will do, and resampled() ones do better."


def warn_if_poor(k_hat: float, verdict: str) -> None:
    """Pass on the verdict as a warning where the guide cannot be relied on."""
    if not k_hat <= _LIMIT:
        warnings.warn(verdict, stacklevel=3)


def _ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return log weights, shape ``(N,)``; where there is no density, there is no weight."""
    raw = log_p - log_q
    raw = torch.where(torch.isnan(raw), -math.inf, raw)
    rounding = 100 * torch.finfo(raw.dtype).eps * float(log_q.abs().nan_to_num(0.0).max())
    if float(raw.max() - raw.min()) <= rounding:  # the tail of rounding errors means nothing
        return raw.mean().expand_as(raw)
    return raw


def _refined(
    posterior: InterpolantDistribution, z: Tensor, log_p: Tensor, log_q: Tensor
) -> Tensor:
    """Return log densities, shape ``(N,)``, those of the largest weights at doubled steps.

    A coarse solver errs most where densities are lowest and weights largest.
    """
    view = posterior.transform.at(1.0)
    if not isinstance(view.solver, FixedGrid):
        return log_q
    view.solver = dataclasses.replace(view.solver, steps=2 * view.solver.steps)
    top = _ratio(log_p, log_q).topk(math.ceil(min(len(z) / 5, 3 * math.sqrt(len(z))))).indices
    finer = InterpolantDistribution(view).log_prob(z[top])
    error = float((finer - log_q[top]).abs().nan_to_num(math.inf).mean())
    if error > _COARSE:
        warnings.warn(
            f"the guide's solver is too coarse: where weights are largest, log densities move by "
            f"{error:.2g} nats at doubled steps. Call calibrate(guide.get_posterior(), "
            "guide.get_posterior().sample((256,)))",
            stacklevel=5,  # past no_grad too
        )
    return log_q.index_copy(0, top, finer)
