r"""Stochastic paths with the flow's own densities, from the base to the data and back.

For every :math:`\epsilon(t) \ge 0`, with v the velocity and S the score, the diffusions

.. math:: dX = (v + \epsilon S)\, dt + \sqrt{2\epsilon}\, dW \quad\text{(forward)}, \qquad
          dX = (v - \epsilon S)\, dt + \sqrt{2\epsilon}\, dW \quad\text{(backward, from 1 to 0)}

have the density :math:`\rho_t` of the interpolant at every t. The noise is isotropic in whitened
coordinates: in data coordinates, :math:`y = \mathrm{loc} + L w`, it is :math:`L\,dW`.

The default is :math:`\epsilon = |\Delta|, \Delta = \dot\beta\sigma^2 - \beta\sigma\dot\sigma`, the
divisor of the score (see :func:`~pyro_interpolant.diffusion.convert`; :math:`\sigma^2` where
:math:`\beta = \dot\beta = 0`). The forward drift is then :math:`(1 + \beta) v - \dot\beta x`:
nothing is divided by, and both ends are finite. It is :math:`\beta` times the diffusion at which
an error e of the velocity costs least. That is one of :math:`(1 + \epsilon\beta/\Delta)\, e` of
the drift, and adds :math:`(1 + \epsilon\beta/\Delta)^2 |e|^2 / 4\epsilon` to the bound of the
divergence between data and model: smallest at :math:`\Delta/\beta`, which is infinite at t = 0.

References:
    Albergo, Boffi & Vanden-Eijnden, arXiv 2303.08797, Sections 2.3 and 2.4; Ma et al., *SiT*,
    arXiv 2401.08740 (on the choice of :math:`\epsilon`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..distributions.constraints import is_trivial
from ..distributions.interpolant import InterpolantDistribution
from ..interpolants.linear import NEAR
from .conversions import noise_and_data, roundoff, score_terms
from .scores import conditional_mean, transform_with_score

__all__ = [
    "Diffusion",
    "InterpolantSDE",
    "Terms",
    "check_determined",
    "grid",
    "sample_sde",
    "sde_log_prob",
    "whiten",
]


Diffusion = Callable[[Tensor], Tensor | float]


class Terms(NamedTuple):
    """What the equation takes from the time alone, each of its shape.

    Attributes:
        t: The flow's time, moved off the ends.
        rate: The diffusion.
        p: What the velocity is multiplied by in the score.
        q: What the state is multiplied by in the score.
        divisor: What their sum, or the negative of the noise, is divided by.
    """

    t: Tensor
    rate: Tensor
    p: Tensor
    q: Tensor
    divisor: Tensor

    def at(self, i: int) -> "Terms":
        """Return the terms of one of several times."""
        return Terms(*(part[i] for part in self))


class InterpolantSDE:
    r"""The stochastic differential equation of a flow, in the protocol of torchsde.

    States are in data coordinates; under a support, in its unconstrained space; behind a
    map of :func:`from_samples`, in its coordinates, ``distribution.to_flow(x)``. Scores may be
    singular at the ends: within 1e-3 of one, drift and diffusion are those at that distance.

    Args:
        distribution: A trained flow; a conditional one with its context.
        diffusion: :math:`\epsilon(t) \ge 0`, a function of times of any shape, in whitened units
            squared per unit of time. By default :math:`|\dot\beta\sigma^2 -
            \beta\sigma\dot\sigma|` (trigonometric: :math:`\frac\pi2\cos\frac{\pi t}2`, linear:
            :math:`1 - t`), or :math:`\gamma` for a flow that learned the noise: either vanishes
            where the score is singular.
        forward: Whether paths run from the base to the data. Backward ones run from the data to
            the base in the time :math:`s = 1 - t`, so that solvers see it increase.

    Attributes:
        noise_type: ``"additive"``: the diffusion does not depend on the state.
        sde_type: ``"ito"``.

    Raises:
        TypeError: As :func:`~pyro_interpolant.score`.
        ValueError: As :func:`~pyro_interpolant.score`; also if the diffusion is negative or not
            finite, or positive where the score is not determined.

    Example:
        >>> prior = InterpolantDistribution(interpolant_transform(2))
        >>> sde = InterpolantSDE(prior, lambda t: 1 - t)
        >>> y, t = torch.randn(5, 2), torch.tensor(0.5)
        >>> sde.f(t, y).shape, sde.g(t, y).shape  # torchsde.sdeint(sde, y, ...) calls these
        (torch.Size([5, 2]), torch.Size([5, 2, 2]))
    """

    noise_type = "additive"
    sde_type = "ito"

    def __init__(
        self,
        distribution: InterpolantDistribution,
        diffusion: Diffusion | None = None,
        *,
        forward: bool = True,
    ) -> None:
        self.transform = transform_with_score(distribution)
        self.flow = self.transform.flow
        self.diffusion = diffusion
        self.forward = forward
        terms = self.terms(torch.linspace(NEAR, 1 - NEAR, 257).to(self.flow.loc))
        rate = terms.rate
        if not bool(((rate >= 0) & torch.isfinite(rate)).all()):
            raise ValueError(
                f"expected a diffusion that is finite and at least 0, got {float(rate.min()):.3g} "
                f"to {float(rate.max()):.3g}"
            )
        if diffusion is not None:
            check_determined(self, Terms(*(part[rate > 0] for part in terms)))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the drift, shape ``(B, D)``.

        Args:
            t: The time, shape ``()``; 1 - t for paths that run backward.
            y: States, shape ``(B, D)``.
        """
        w = self.flow.to_white(self.transform._checked(y))
        return self.drift(self.terms(self._real(t, y)), w) @ self.flow.linear.T

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        r"""Return the diffusion matrix :math:`\sqrt{2\epsilon}\, L`, shape ``(B, D, D)``.

        Args:
            t: The time, shape ``()``; 1 - t for paths that run backward.
            y: States, shape ``(B, D)``.
        """
        scale = (2 * self.terms(self._real(t, y)).rate).sqrt()
        return (scale * self.flow.linear).expand(*y.shape[:-1], -1, -1)

    def terms(self, t: Tensor) -> Terms:
        """Return what depends on the flow's times alone, each of the shape of t."""
        t = t.clamp(NEAR, 1 - NEAR)
        if self.flow.noise is None:
            p, q, divisor = score_terms(*noise_and_data(self.transform.interpolant, t))
        else:
            divisor = self.transform.interpolant.coefficients(t)[2]
            p = q = torch.zeros_like(t)
        rate = divisor.abs() if self.diffusion is None else self.diffusion(t)
        rate = torch.as_tensor(rate, dtype=t.dtype, device=t.device).expand_as(t)
        return Terms(t, rate, p, q, divisor)

    def drift(self, now: Terms, w: Tensor) -> Tensor:
        """Return the drift in whitened coordinates, shape ``(*, D)``.

        Args:
            now: The terms of the time.
            w: Whitened states, shape ``(*, D)``.
        """
        v = conditional_mean(self.transform, self.flow.velocity, now.t, w)
        if self.diffusion is None:  # it undoes the division, which is then not done at all
            ratio = now.divisor.sign()
        else:
            still = now.rate == 0
            ratio = torch.where(still, 0, now.rate / torch.where(still, 1, now.divisor))
        push = ratio[..., None] * self._multiple(now, w, v)
        return v + push if self.forward else push - v

    def score(self, now: Terms, w: Tensor, v: Tensor) -> Tensor:
        """Return the score in whitened coordinates, shape ``(*, D)``, given the velocity there.

        Args:
            now: The terms of the time.
            w: Whitened states, shape ``(*, D)``.
            v: The velocity, shape ``(*, D)``.
        """
        return self._multiple(now, w, v) / now.divisor[..., None]

    def _multiple(self, now: Terms, w: Tensor, v: Tensor) -> Tensor:
        """Return the score times its divisor, shape ``(*, D)``."""
        if self.flow.noise is not None:
            return -conditional_mean(self.transform, self.flow.noise, now.t, w)
        return now.p[..., None] * v + now.q[..., None] * w

    def _real(self, t: Tensor, y: Tensor) -> Tensor:
        t = torch.as_tensor(t, dtype=y.dtype, device=y.device)
        return t if self.forward else 1 - t


def sample_sde(
    distribution: InterpolantDistribution,
    shape: Sequence[int] = (),
    *,
    diffusion: Diffusion | None = None,
    steps: int = 200,
    method: Literal["heun", "euler"] = "heun",
    x: Tensor | None = None,
) -> Tensor:
    r"""Sample along the stochastic differential equation, from the base or back to it.

    Without gradient, on a uniform grid. ``"heun"`` evaluates the drift at both ends of a step (2
    evaluations), ``"euler"`` at its start (Euler-Maruyama); both give a step the noise of the mean
    diffusion at its ends.

    Args:
        distribution: A trained flow; a conditional one with its context. That of
            ``distribution.at(t)`` is sampled at t.
        shape: How many samples; of each row where rows are given.
        diffusion: :math:`\epsilon(t) \ge 0`, as in :class:`InterpolantSDE`; zero gives the
            ordinary flow.
        steps: The number of steps.
        method: ``"heun"`` or ``"euler"``.
        x: Rows of data, shape ``(*, *event_shape)``, to run backward from: the result has the law
            of ``distribution.at(0)`` given that the path ends at them.

    Returns:
        Samples, shape ``(*shape, *batch_shape, *event_shape)``, or ``(*shape, *x.shape)``, on the
        support.

    Raises:
        TypeError: As :class:`InterpolantSDE`.
        ValueError: As :class:`InterpolantSDE`; also if steps or method are not as above, a row is
            outside the support, or there is no base to start from.

    References:
        Kloeden & Platen, *Numerical Solution of Stochastic Differential Equations*, Section 15.1.

    Example:
        >>> prior = InterpolantDistribution(interpolant_transform(2))
        >>> sample_sde(prior, (10,), steps=5).shape
        torch.Size([10, 2])
    """
    if method not in ("heun", "euler"):
        raise ValueError(f"expected the method 'heun' or 'euler', got {method!r}")
    sde = InterpolantSDE(distribution, diffusion, forward=x is None)
    with torch.no_grad():
        if x is None:
            w = _base_draws(distribution, shape)
        else:
            w = whiten(sde, distribution, x)
            w = w.expand(*shape, *w.shape)
        terms, gap = grid(sde, steps)
        for i in range(steps):
            now, then = terms.at(i), terms.at(i + 1)
            kick = (gap * (now.rate + then.rate)).sqrt() * torch.randn_like(w)
            slope = sde.drift(now, w)
            if method == "heun":
                slope = 0.5 * (slope + sde.drift(then, w + gap * slope + kick))
            w = w + gap * slope + kick
        y = sde.flow.from_white(w)
        return y if is_trivial(distribution.constraint) else distribution.transforms[-1](y)


def grid(sde: InterpolantSDE, steps: int) -> tuple[Terms, float]:
    """Return the terms at equal steps, first to last, each of shape ``(steps + 1,)``, and the gap.

    Raises:
        ValueError: If there is no step.
    """
    if steps < 1:
        raise ValueError(f"expected at least one step, got steps={steps}")
    end = sde.transform.end
    times = torch.linspace(0.0, end, steps + 1).to(sde.flow.loc)
    return sde.terms(times if sde.forward else times.flip(0)), end / steps


def whiten(sde: InterpolantSDE, distribution: InterpolantDistribution, x: Tensor) -> Tensor:
    """Return values, shape ``(*, *event_shape)``, in whitened coordinates, shape ``(*, D)``."""
    return sde.flow.to_white(sde.transform._checked(distribution.to_flow(x)))


def _base_draws(distribution: InterpolantDistribution, shape: Sequence[int]) -> Tensor:
    flow: Any = distribution.transform.flow
    if distribution.base is None and flow.interpolant.ends[0][0] == 0:
        raise ValueError(
            f"expected rows x to start from: the base of {type(flow.interpolant).__name__} is the "
            "data, which this flow was not fitted to"
        )
    x0 = distribution.base_dist.sample(torch.Size(shape))
    return x0 if distribution.base is None else flow.to_white(x0)


def check_determined(sde: InterpolantSDE, terms: Terms) -> None:
    """Raise a ValueError unless the score is determined at given times, shape ``(T,)``."""
    divisor, t = terms.divisor, terms.t
    lost = (divisor.abs() <= roundoff(t)) | (divisor.sign() != divisor[-1:].sign())
    if bool(lost.any()):
        reason = "data do not gain on noise there; or train with fit(..., learn='noise')"
        raise ValueError(
            "expected a diffusion that is zero where the score is not determined, as near t = "
            f"{float(t[lost][-1]):.3g} ({reason if sde.flow.noise is None else 'gamma is zero'}): "
            "leave it at its default"
        )


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
