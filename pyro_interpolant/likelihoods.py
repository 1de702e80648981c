r"""The likelihood of a flow's stochastic model, by an expectation over paths.

References:
    Albergo, Boffi & Vanden-Eijnden, arXiv 2303.08797, Section 2.5.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .conversions import score_terms
from .distributions import InterpolantDistribution
from .scores import conditional_mean
from .sde import Diffusion, InterpolantSDE, check_determined, grid, inside, whiten
from .supports import is_trivial

__all__ = ["sde_log_prob"]


def sde_log_prob(
    distribution: InterpolantDistribution,
    x: Tensor,
    *,
    diffusion: Diffusion | None = None,
    paths: int = 64,
    steps: int = 200,
    guidance: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""Estimate the log-density of the stochastic model, the law of :func:`sample_sde`.

    With :math:`b = v + \epsilon S` the forward drift, and Y run back from x by
    :math:`dY = b\,dt + \sqrt{2\epsilon}\,dW`,

    .. math:: \rho_1(x) = E\left[\exp\left(-\int_0^1 \nabla\cdot b_t(Y_t)\, dt\right)
              \rho_0(Y_0)\right].

    These paths run away from the data, and the variance grows exponentially with D. With guidance
    :math:`\kappa` they follow the drift :math:`b - 2\kappa\epsilon S` instead, which at
    :math:`\kappa = 1` is that of the backward equation, and Girsanov's weights make up for it.
    Summed in Stratonovich's sense the exponent is

    .. math:: -\int \left[\nabla\cdot v + (1 - \kappa)\,\epsilon\nabla\cdot S +
              \kappa^2\epsilon|S|^2\right] dt - \kappa \int \sqrt{2\epsilon}\, S \circ dW.

    At :math:`\kappa = 1`, v and S exact, it is the same for all paths: :math:`\log\rho_1(x) -
    \log\rho_0(Y_0)`. No second derivative is needed: :math:`\nabla\cdot S` is linear in
    :math:`\nabla\cdot v`.

    Args:
        distribution: A trained flow; a conditional one with its context.
        x: Rows, shape ``(*, *event_shape)``.
        diffusion: :math:`\epsilon(t) \ge 0`, as in :class:`InterpolantSDE`; the model depends on
            it. Zero gives ``log_prob``.
        paths: The number of paths of each row.
        steps: The number of steps.
        guidance: :math:`\kappa`; 0 is the estimator of the paper.

    Returns:
        The logarithm of the estimated density, nats, and its standard error, each of shape
        ``(*)``. The density is estimated without bias but for the time steps; its logarithm is too
        low by half the squared standard error. Where few paths bear all the weight, both are off.

    Raises:
        TypeError: As :class:`InterpolantSDE`.
        ValueError: As :class:`InterpolantSDE`; also if paths or steps are too few, a row is
            outside the support, the score is not determined at all times, or the base has no
            density.

    References:
        arXiv 2303.08797, Section 2.5.
    """
    if paths < 2:
        raise ValueError(f"expected at least two paths to tell their spread, got paths={paths}")
    sde = InterpolantSDE(distribution, diffusion, forward=False)
    times = grid(sde, steps)
    if float(times[0]) > 0:
        check_determined(sde, inside(times))
    with torch.no_grad():
        white = whiten(sde, distribution, x)
        w = white.expand(paths, *white.shape)
        rates, gap = sde.rate(times), float((times[0] - times[1]).abs())
        now, total = _look(sde, times[0], w, guidance), w.new_zeros(w.shape[:-1])
        for i in range(steps):
            kick = (gap * (rates[i] + rates[i + 1])).sqrt() * torch.randn_like(w)
            guess = _look(sde, times[i + 1], w + gap * now.drift + kick, guidance)
            w = w + 0.5 * gap * (now.drift + guess.drift) + kick
            then = _look(sde, times[i + 1], w, guidance)
            work = 0.5 * guidance * ((now.score + then.score) * kick).sum(-1)
            total = total - work - 0.5 * gap * (now.growth() + then.growth())
            now = then
        total = total + _base_log_prob(sde, distribution, w) - sde.flow.linear_log_det
        if not is_trivial(distribution.constraint):
            y = distribution.unconstrained(x)
            volume = distribution.transforms[-1].log_abs_det_jacobian(y, x)
            total = total - volume.reshape(*y.shape[:-1], -1).sum(-1)  # some are per element
        value = total.logsumexp(0) - math.log(paths)
        stderr = (total - value).exp().std(0) / math.sqrt(paths)
    return value, stderr


class _Look(NamedTuple):
    """What a path of the likelihood meets: its drift, the score, and the rate of its exponent."""

    drift: Tensor
    score: Tensor
    growth: Callable[[], Tensor]


def _look(sde: InterpolantSDE, t: Tensor, w: Tensor, guidance: float) -> _Look:
    t = inside(t)
    v = conditional_mean(sde.transform, sde.flow.velocity, t, w)
    score, rate = sde.score(t, w, v), sde.rate(t)

    def growth() -> Tensor:
        divergence, network = sde.transform.divergence, sde.flow.velocity
        total = divergence(network, t, w, sde.transform.context)
        slope = guidance**2 * score.square().sum(-1)
        if guidance != 1:
            slope = slope + (1 - guidance) * _score_divergence(sde, t, w, total)
        return total + rate * slope

    return _Look((2 * guidance - 1) * rate * score - v, score, growth)


def _score_divergence(sde: InterpolantSDE, t: Tensor, w: Tensor, divergence: Tensor) -> Tensor:
    """Return the divergence of the score, shape ``(*)``, given that of the velocity."""
    if sde.flow.noise is not None:
        view = sde.transform
        return -view.divergence(sde.flow.noise, t, w, view.context) / sde.divisor(t)
    p, q, divisor = score_terms(sde.transform.interpolant, t)
    return (p * divergence + q * w.shape[-1]) / divisor


def _base_log_prob(
    sde: InterpolantSDE, distribution: InterpolantDistribution, w: Tensor
) -> Tensor:
    """Return the base's log-density of whitened states, shape ``(*)``."""
    if distribution.base is None:
        return distribution.base_dist.log_prob(w)
    return distribution.base.log_prob(sde.flow.from_white(w)) + sde.flow.linear_log_det
