r"""Training a guide with no gradient through an ODE: on draws, or on the model alone."""

import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to

from .distributions import InterpolantDistribution
from .guides import AutoInterpolant
from .importance import judged, warn_if_poor
from .models import LogJoint, log_joint
from .rounds import RoundsResult, train_from_density
from .scopes import seeded
from .sites import pack_sites, set_up
from .training import FitResult, fit

__all__ = ["GuideResult", "fit_guide"]

_JUDGED = 10_000  # fresh draws
_ON_SAMPLES = 0.9  # of the time; the rest is for the calibration and the judgement
_ON_THE_MODEL = 0.97  # of the time; the rest is for the judgement
_LEAST = 0.1  # of the time, for training, however long the set-up took
_PRIOR = 4096  # draws the search starts from
_RARE = 0.005  # the share of prior draws on either side that counts as less far
_WIDE = 2.0  # the scale of unconstrained sites with an improper prior


class GuideResult(NamedTuple):
    r"""How good a guide has become, by importance weights of fresh draws.

    Attributes:
        k_hat: Pareto's k-hat: up to 0.5 good, above 0.7 not reliable.
        ess: The effective sample size of ``draws`` draws.
        log_evidence: An estimate of the model's log-evidence, nats.
        log_evidence_stderr: Its standard error; too small where k-hat is large.
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


def fit_guide(
    guide: AutoInterpolant,
    *args: Any,
    samples: Mapping[str, Any] | None = None,
    max_seconds: float = 120.0,
    seed: int | None = None,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> GuideResult:
    r"""Train a guide, in place, with no gradient through an ODE.

    With ``samples``: regression on posterior draws of another sampler, as
    :func:`~pyro_interpolant.fit`. Without: from the model alone, by rounds of drawing, weighing
    and regression from a wide start, see :func:`~pyro_interpolant.train_from_density`. ``SVI`` can
    train the guide on afterwards.

    A mode or a neck that no draw visits stays invisible to k-hat; see
    :func:`~pyro_interpolant.importance` for what helps.

    Args:
        guide: The guide.
        *args: The arguments of the model.
        samples: Posterior draws of every latent site on its own support, each
            ``(N, *site_shape)`` or by chain ``(C, N, *site_shape)``, such as
            ``mcmc.get_samples()``.
        max_seconds: The time to spend in all.
        seed: Makes the run reproducible as far as the clock allows; the global generator is left
            as it was.
        progress: Whether to show a bar.
        options: Further options of :func:`~pyro_interpolant.fit`, or, without samples, of
            :func:`~pyro_interpolant.train_from_density`.
        **kwargs: The named arguments of the model.

    Returns:
        The verdict on fresh draws, with a warning if k-hat is above 0.7 or, for a model whose
        log joint density cannot be evaluated, not known.

    Raises:
        TypeError: If the guide is not an :class:`~pyro_interpolant.AutoInterpolant`.
        ValueError: If the samples miss a site or have another shape, a setting cannot work, or
            there are no samples and the log joint density cannot be evaluated.

    Example:
        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 1.0))
        >>> guide = AutoInterpolant(model)
        >>> draws = {"x": 3 + torch.randn(2000)}
        >>> result = fit_guide(
        ...     guide, samples=draws, seed=0, progress=False, options={"steps": 50}
        ... )
        >>> result.k_hat < 0.7, abs(result.log_evidence) < 0.1
        (True, True)
    """
    start = time.monotonic()
    if not isinstance(guide, AutoInterpolant):
        raise TypeError(f"expected an AutoInterpolant, got {type(guide).__name__}")
    if not max_seconds > 0:
        raise ValueError(f"expected max_seconds > 0, got {max_seconds}")
    with seeded(seed):
        set_up(guide, *args, **kwargs)
    settings = {"seed": seed, "progress": progress, **(options or {})}

    def left(share: float) -> dict[str, Any]:
        seconds = share * max_seconds - (time.monotonic() - start)
        return {"max_seconds": max(seconds, _LEAST * max_seconds), **settings}

    known: LogJoint | None
    if samples is None:
        known = density = log_joint(guide, *args, **kwargs)
        training = _on_the_model(guide, density, left, seed)
    else:
        rows = pack_sites(guide, samples).to(guide.transform.loc)
        known = _density(guide, args, kwargs)
        training = fit(InterpolantDistribution(guide.transform), rows, **left(_ON_SAMPLES))
    with seeded(None if seed is None else seed + 1, guide.transform.loc.device):
        numbers = _judged(guide, known)
    if not math.isnan(numbers[1]):
        warn_if_poor(numbers[0], numbers[5])
    return GuideResult._make((*numbers, time.monotonic() - start, training))


def _on_the_model(
    guide: AutoInterpolant,
    density: LogJoint,
    left: Callable[[float], dict[str, Any]],
    seed: int | None,
) -> Any:
    """Train from the model alone, and return what that did."""
    with seeded(seed, guide.transform.loc.device):
        prior = prior_draws(density, _PRIOR)
    settings = {"start": prior, **left(_ON_THE_MODEL)}
    return train_from_density(InterpolantDistribution(guide.transform), density, **settings)


def prior_draws(density: LogJoint, count: int) -> Tensor | None:
    """Return unconstrained draws of the prior, ``(<= count, D)``, or None where there are none.

    Sites with an improper prior are drawn widely; the rarest 1% is drawn in, for priors without
    moments.
    """

    def run() -> None:
        with pyro.plate("_draws", count, dim=-1 - density.nesting):
            density.model(*density.args, **density.kwargs)

    def packed(model: Any, lead: tuple[int, ...]) -> Tensor:
        with poutine.block(), _FromPrior():
            trace = poutine.trace(model).get_trace()
        parts = [
            biject_to(site["fn"].support).inv(trace.nodes[name]["value"]).reshape(*lead, -1)
            for name, site in density.guide.prototype_trace.iter_stochastic_nodes()
        ]
        return torch.cat(parts, dim=-1)

    def single(_: Tensor) -> Tensor:
        return packed(lambda: density.model(*density.args, **density.kwargs), ())

    try:
        with torch.no_grad(), pyro.validation_enabled(False), warnings.catch_warnings():  # noqa: FBT003
            warnings.simplefilter("ignore")  # some samplers loop under vmap, once
            if density.way == "plate":
                z = packed(run, (count,))
            else:
                z = torch.func.vmap(single, randomness="different")(torch.zeros(count))
    except (RuntimeError, ValueError, NotImplementedError):  # a prior that cannot be sampled
        return None
    z = z[torch.isfinite(z).all(-1)]
    if len(z) <= count // 2:
        return None
    low, high = torch.quantile(z, z.new_tensor([_RARE, 1 - _RARE]), dim=0)
    return torch.maximum(low, torch.minimum(z, high))


class _FromPrior(Messenger):
    """Draw latent sites from their priors; those that cannot be sampled, widely."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is not None or site_is_subsample(msg):
            return
        fn = msg["fn"]
        try:
            msg["value"] = fn.sample()
        except NotImplementedError:
            transform = biject_to(fn.support)
            shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
            msg["value"] = transform(_WIDE * torch.randn(shape))


def _density(
    guide: AutoInterpolant, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> LogJoint | None:
    """Return the log joint density, or None, with a warning, where there is none."""
    try:
        return log_joint(guide, *args, **kwargs)
    except ValueError as error:
        warnings.warn(f"the guide will not be judged by importance weights: {error}", stacklevel=3)
        return None


def _judged(guide: AutoInterpolant, density: LogJoint | None) -> tuple[Any, ...]:
    """Return the first fields of the result."""
    if density is None:
        nan = float("nan")
        return nan, nan, nan, nan, 0, "Unknown, the log joint density cannot be evaluated."
    result = judged(guide, density, _JUDGED)
    return *result[:4], _JUDGED, result.verdict
