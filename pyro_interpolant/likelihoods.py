r"""The likelihood of a flow's stochastic model, by an expectation over paths.

References:
    Albergo, Boffi & Vanden-Eijnden, arXiv 2303.08797, Section 2.5.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .distributions import InterpolantDistribution
from .scores import conditional_mean
from .sde import Diffusion, InterpolantSDE, Terms, check_determined, grid, whiten
from .supports import is_trivial

__all__ = ["sde_log_prob"]

_TRUSTED = 0.01  # of its largest divisor, below which a learned score magnifies its errors


def sde_log_prob(
    distribution: InterpolantDistribution,
    x: Tensor,
    *,
    diffusion: Diffusion | None = None,
    paths: int = 64,
    steps: int = 100,
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
    With a line integral in Stratonovich's sense the exponent is then

    .. math:: -\int_0^1 \left[\nabla\cdot v + \kappa\, S\cdot v + (1 - \kappa)\,\epsilon
              \left(\nabla\cdot S + \kappa |S|^2\right)\right] dt + \kappa\int S \circ dY

    in the direction of time; at :math:`\kappa = 1` with v and S exact the change of
    :math:`\log\rho_t(Y_t)` on the way: the same sum for all paths. No second derivative is needed:
    :math:`\nabla\cdot S` is linear in :math:`\nabla\cdot v`. Guidance fades at the very ends,
    where a learned score is a small number divided by another.

    Args:
        distribution: A trained flow; a conditional one with its context.
        x: Rows, shape ``(*, *event_shape)``.
        diffusion: :math:`\epsilon(t) \ge 0`, as in :class:`InterpolantSDE`; the model depends on
            it. Zero gives ``log_prob``.
        paths: The number of paths of each row.
        steps: The number of steps.
        guidance: :math:`\kappa` in [0, 1]; 0 is the estimator of the paper.

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
    terms, half = grid(sde, 2 * steps)
    check_determined(sde, terms)
    with torch.no_grad():
        white = whiten(sde, distribution, x)
        w = white.expand(paths, *white.shape)
        trust = terms.divisor.abs() / terms.divisor.abs().max()
        kappa = guidance * (trust / _TRUSTED).clamp(max=1)
        start = _look(sde, terms.at(0), kappa[0], w)
        growth, total = _growth(sde, start), w.new_zeros(w.shape[:-1])
        for i in range(0, 2 * steps, 2):
            begin, middle, end = terms.at(i), terms.at(i + 1), terms.at(i + 2)
            # Line integrals by Simpson's rule on the chord of each step, which is of its order.
            spread = 4 * half * (begin.rate + 4 * middle.rate + end.rate) / 6
            kick = spread.sqrt() * torch.randn_like(w)
            guess = _look(sde, end, kappa[i + 2], w + 2 * half * start.drift + kick)
            move = half * (start.drift + guess.drift) + kick
            halfway = _look(sde, middle, kappa[i + 1], w + 0.5 * move)
            stop = _look(sde, end, kappa[i + 2], w + move)
            last = _growth(sde, stop)
            work = ((start.guide + 4 * halfway.guide + stop.guide) * move).sum(-1) / 6
            total = total - work - half * (growth + 4 * _growth(sde, halfway) + last) / 3
            w, start, growth = w + move, stop, last
        total = total + _base_log_prob(sde, distribution, w) - sde.flow.linear_log_det
        if not is_trivial(distribution.constraint):
            y = distribution.to_flow(x)
            total = total - distribution.transforms[-1].log_abs_det_jacobian(y, x)
        value = total.logsumexp(0) - math.log(paths)
        stderr = (total - value).exp().std(0) / math.sqrt(paths)
    return value, stderr


class _Look(NamedTuple):
    """Where a path is, and what it meets there."""

    now: Terms
    kappa: Tensor
    w: Tensor
    v: Tensor
    score: Tensor

    @property
    def guide(self) -> Tensor:
        """The part of the score that guides, shape ``(*, D)``."""
        return self.kappa * self.score

    @property
    def drift(self) -> Tensor:
        """The drift of the path in the time 1 - t, shape ``(*, D)``."""
        return (2 * self.kappa - 1) * self.now.rate * self.score - self.v


def _look(sde: InterpolantSDE, now: Terms, kappa: Tensor, w: Tensor) -> _Look:
    v = conditional_mean(sde.transform, sde.flow.velocity, now.t, w)
    return _Look(now, kappa, w, v, sde.score(now, w, v))


def _growth(sde: InterpolantSDE, at: _Look) -> Tensor:
    """Return the rate of the exponent, all but its line integral, shape ``(*)``."""
    flow, divergence, context = sde.flow, sde.transform.divergence, sde.transform.context
    of_velocity = divergence(flow.velocity, at.now.t, at.w, context)
    growth = of_velocity + (at.guide * at.v).sum(-1)
    if at.kappa == 1:
        return growth
    if flow.noise is None:
        multiple = at.now.p * of_velocity + at.now.q * at.w.shape[-1]
    else:
        multiple = -divergence(flow.noise, at.now.t, at.w, context)
    slope = multiple / at.now.divisor + (at.guide * at.score).sum(-1)
    return growth + (1 - at.kappa) * at.now.rate * slope


def _base_log_prob(
    sde: InterpolantSDE, distribution: InterpolantDistribution, w: Tensor
) -> Tensor:
    """Return the base's log-density of whitened states, shape ``(*)``."""
    if distribution.base is None:
        return distribution.base_dist.log_prob(w)
    return distribution.base.log_prob(sde.flow.from_white(w)) + sde.flow.linear_log_det
