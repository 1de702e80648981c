r"""The stochastic differential equation of a flow: its samples and its likelihood.

For every :math:`\epsilon(t) \ge 0`, with v the velocity and S the score, the diffusions

.. math:: dX = (v + \epsilon S)\, dt + \sqrt{2\epsilon}\, dW \quad\text{(forward)}, \qquad
          dX = (v - \epsilon S)\, dt + \sqrt{2\epsilon}\, dW \quad\text{(backward, from 1 to 0)}

have the density :math:`\rho_t` of the interpolant at every t. The noise is isotropic in whitened
coordinates: in data coordinates, :math:`y = \mathrm{loc} + L w`, it is :math:`L\,dW`.

The default is :math:`\epsilon = |\Delta|, \Delta = \dot\beta\sigma^2 - \beta\sigma\dot\sigma`, the
divisor of the score (see :func:`~pyro_interpolant.diffusion.convert`; :math:`\sigma^2` where
:math:`\beta = \dot\beta = 0`). The forward drift is then :math:`(1 + \beta) v - \dot\beta x`:
without a division, and finite at both ends. It is :math:`\beta` times the diffusion at which
an error e of the velocity costs least. That is one of :math:`(1 + \epsilon\beta/\Delta)\, e` of
the drift, and adds :math:`(1 + \epsilon\beta/\Delta)^2 |e|^2 / 4\epsilon` to the bound of the
divergence between data and model: smallest at :math:`\Delta/\beta`, which is infinite at t = 0.

References:
    Albergo, Boffi & Vanden-Eijnden, arXiv 2303.08797, Sections 2.3 and 2.4; Ma et al., *SiT*,
    arXiv 2401.08740 (on the choice of :math:`\epsilon`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._package import check_ranges, check_sizes, number, whole
from ..distributions.interpolant import InterpolantDistribution
from ..distributions.rows import check_value
from ..nn.velocity import evaluate
from ..transforms.interpolant import broadcast_batch
from .conversions import noise_and_data, path_times, roundoff, score_terms
from .scores import transform_with_score

Diffusion = Callable[[Tensor], Tensor | float]

_MARGIN = 1e-4  # of time from the ends, where scores are singular
_CHECKED_MARGIN = 1e-3  # nearer to an end, rounding may lose a score that a path hardly meets
_GUIDED_SHARE = 0.01  # of the largest divisor: above it the score guides fully


class TimeTerms(NamedTuple):
    r"""The coefficients of drift and diffusion, which depend on the time alone, each of its shape.

    The score is :math:`(p v + q x) / \Delta`; of a flow that learned the noise,
    :math:`-E[z | x_t] / \Delta`.

    Attributes:
        t: The flow's time, at least 1e-4 from both ends.
        rate: The diffusion :math:`\epsilon`.
        p: The coefficient of the velocity in the score.
        q: The coefficient of the state in the score.
        divisor: :math:`\Delta`, or :math:`\gamma`.
    """

    t: Tensor
    rate: Tensor
    p: Tensor
    q: Tensor
    divisor: Tensor

    def at(self, i: int) -> "TimeTerms":
        """Return the terms at the i-th of several times."""
        return TimeTerms(*(part[i] for part in self))


class InterpolantSDE:
    r"""The stochastic differential equation of a flow, in the protocol of torchsde.

    States are in data coordinates; under a support, in its unconstrained space; behind a
    map of :func:`from_samples`, in its coordinates, ``distribution.to_flow(x)``. Scores may be
    singular at the ends: within 1e-4 of one, drift and diffusion are those at that distance.

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
        TypeError: As :func:`~pyro_interpolant.score`; also if the diffusion is no function.
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
        if diffusion is not None and not callable(diffusion):
            raise TypeError(
                f"expected a diffusion that is a function of times, got {diffusion!r}: pass "
                f"lambda t: {diffusion!r}"
            )
        self.transform = transform_with_score(distribution)
        self.flow = self.transform.flow
        self.diffusion = diffusion
        self.forward = forward
        checked = torch.linspace(_CHECKED_MARGIN, 1 - _CHECKED_MARGIN, 257)
        terms = self.terms(checked.to(self.flow.loc))
        rate = terms.rate
        if not bool(((rate >= 0) & torch.isfinite(rate)).all()):
            raise ValueError(
                f"expected a diffusion that is finite and at least 0, got {float(rate.min()):.3g} "
                f"to {float(rate.max()):.3g}"
            )
        if diffusion is not None:
            _check_score_determined(self, TimeTerms(*(part[rate > 0] for part in terms)))

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the drift, shape ``(B, D)``.

        Args:
            t: The time, shape ``()``; 1 - t for paths that run backward.
            y: States, shape ``(B, D)``.
        """
        w = self.flow.whitening.to_white(self.transform._checked(y))
        return self.flow.whitening.push(self.drift(self.terms(self._flow_time(t, y)), w))

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        r"""Return the diffusion matrix :math:`\sqrt{2\epsilon}\, L`, shape ``(B, D, D)``.

        Args:
            t: The time, shape ``()``; 1 - t for paths that run backward.
            y: States, shape ``(B, D)``.
        """
        scale = (2 * self.terms(self._flow_time(t, y)).rate).sqrt()
        return (scale * self.flow.whitening.matrix()).expand(*y.shape[:-1], -1, -1)

    def terms(self, t: Tensor) -> TimeTerms:
        """Return the coefficients at times of the flow, each of the shape of t."""
        t = t.clamp(_MARGIN, 1 - _MARGIN)
        if self.flow.noise is None:
            p, q, divisor = score_terms(*noise_and_data(self.transform.interpolant, t))
        else:
            divisor = self.transform.interpolant.coefficients(t)[2]
            p = q = torch.zeros_like(t)
        rate = divisor.abs() if self.diffusion is None else self.diffusion(t)
        rate = torch.as_tensor(rate, dtype=t.dtype, device=t.device).expand_as(t)
        return TimeTerms(t, rate, p, q, divisor)

    def drift(self, now: TimeTerms, w: Tensor) -> Tensor:
        """Return the drift in whitened coordinates, shape ``(*, D)``.

        Args:
            now: The coefficients at the time.
            w: Whitened states, shape ``(*, D)``.
        """
        v = evaluate(self.flow.velocity, now.t, w, self.transform.context)
        return self.drift_of(now, w, v)

    def drift_of(self, now: TimeTerms, w: Tensor, v: Tensor) -> Tensor:
        """Return the drift in whitened coordinates, shape ``(*, D)``, given the velocity there.

        Args:
            now: The coefficients at the time.
            w: Whitened states, shape ``(*, D)``.
            v: The velocity, shape ``(*, D)``.
        """
        if self.diffusion is None:  # rate / divisor is a sign: no division, and no singularity
            ratio = now.divisor.sign()
        else:
            none = now.rate == 0
            ratio = torch.where(none, 0, now.rate / torch.where(none, 1, now.divisor))
        noise_drift = ratio[..., None] * self._score_times_divisor(now, w, v)
        return v + noise_drift if self.forward else noise_drift - v

    def score(self, now: TimeTerms, w: Tensor, v: Tensor) -> Tensor:
        """Return the score in whitened coordinates, shape ``(*, D)``, given the velocity there.

        Args:
            now: The coefficients at the time.
            w: Whitened states, shape ``(*, D)``.
            v: The velocity, shape ``(*, D)``.
        """
        return self._score_times_divisor(now, w, v) / now.divisor[..., None]

    def _score_times_divisor(self, now: TimeTerms, w: Tensor, v: Tensor) -> Tensor:
        """Return the score times its divisor, shape ``(*, D)``."""
        if self.flow.noise is not None:
            return -evaluate(self.flow.noise, now.t, w, self.transform.context)
        return now.p[..., None] * v + now.q[..., None] * w

    def _flow_time(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the time of the flow, from that of the solver."""
        t = torch.as_tensor(t, dtype=y.dtype, device=y.device)
        return t if self.forward else 1 - t


def _check_score_determined(sde: InterpolantSDE, terms: TimeTerms) -> None:
    """Raise a ValueError unless the score is determined at times of shape ``(T,)``."""
    divisor, t = terms.divisor, terms.t
    undetermined = (divisor.abs() <= roundoff(t)) | (divisor.sign() != divisor[-1:].sign())
    if bool(undetermined.any()):
        reason = "gamma is zero"
        if sde.flow.noise is None:
            reason = "data do not gain on noise there; or train with fit(..., learn='noise')"
        raise ValueError(
            "expected a score at all times of a density, and where a diffusion is not zero: the "
            f"score is not determined, as near t = {float(t[undetermined][-1]):.3g} ({reason}). "
            "Sample with the default diffusion, or train with a smaller gamma"
        )


def sample_sde(
    distribution: InterpolantDistribution,
    shape: Sequence[int] = (),
    *,
    diffusion: Diffusion | None = None,
    steps: int = 200,
    method: Literal["heun", "euler"] = "heun",
    x: Tensor | None = None,
) -> Tensor:
    r"""Sample the stochastic differential equation, from the base or back from rows of data.

    Without gradient, in steps that shorten toward both ends, most toward the data: where little
    noise is left, that of a step must be less. ``"heun"`` evaluates the drift at both ends of a
    step (2 evaluations), ``"euler"`` at its start (Euler-Maruyama); both give a step the noise of
    the mean diffusion at its ends.

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
        TypeError: As :class:`InterpolantSDE`; also if shape is no sequence of sizes, or rows are
            no tensor.
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
    check_sizes("a shape of draws", shape)
    sde = InterpolantSDE(distribution, diffusion, forward=x is None)
    with torch.no_grad():
        sde.transform = sde.transform.with_embedded_context()
        if x is None:
            w = distribution.white_draws(shape)
        else:
            w = sde.flow.whitening.to_white(_real(distribution, x))
            w = w.expand(*shape, *w.shape)
        w = path_ends(sde, w, path_times(steps, sde.transform.end), method)
        return to_values(distribution, w)


def path_ends(
    sde: InterpolantSDE, w: Tensor, times: Tensor, method: Literal["heun", "euler"] = "heun"
) -> Tensor:
    """Return the ends of paths in whitened coordinates, shape ``(*, D)``.

    Args:
        sde: The equation.
        w: Where they start, shape ``(*, D)``.
        times: The flow's times between steps, ascending, shape ``(T,)``.
        method: ``"heun"`` or ``"euler"``.
    """
    times = times.to(w) if sde.forward else times.to(w).flip(0)
    terms = sde.terms(times)
    for i, step in enumerate(times.diff().abs()):
        now, then = terms.at(i), terms.at(i + 1)
        kick = (step * (now.rate + then.rate)).sqrt() * torch.randn_like(w)
        slope = sde.drift(now, w)
        if method == "heun":
            slope = 0.5 * (slope + sde.drift(then, w + step * slope + kick))
        w = w + step * slope + kick
    return w


def _real(distribution: InterpolantDistribution, x: Tensor) -> Tensor:
    """Return real vectors, shape ``(*, D)``, of values, shape ``(*, *event_shape)``."""
    x = distribution.value_of(x)
    check_value(x, distribution.event_shape, distribution.transform.flow.loc.dtype)
    return distribution.transform._checked(distribution.to_flow(x))


def to_values(distribution: InterpolantDistribution, w: Tensor) -> Tensor:
    """Return values, shape ``(*, *event_shape)``, of whitened coordinates, shape ``(*, D)``."""
    y = distribution.transform.flow.whitening.from_white(w)
    return y if distribution.space.is_real() else distribution.transforms[-1](y)


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

    These paths leave the data, and the variance grows exponentially with D. With guidance
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
        x: Rows, shape ``(*, *event_shape)``, broadcast with the batch shape.
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
        ValueError: As :class:`InterpolantSDE`; also if paths or steps are too few or not whole,
            guidance is outside [0, 1], a row is outside the support, the score is not determined
            at all times, or the base has no density.

    References:
        arXiv 2303.08797, Section 2.5.
    """
    within = number("guidance in [0, 1]", guidance, lambda n: 0 <= n <= 1)
    check_ranges(whole("paths", paths, 2), whole("steps", steps, 1), within)
    distribution.check_start()
    paths, steps = int(paths), int(steps)
    sde = InterpolantSDE(distribution, diffusion, forward=False)
    nodes = path_times(steps, sde.transform.end).to(sde.flow.loc)
    times = torch.cat((nodes, (nodes[:-1] + nodes[1:]) / 2)).sort(descending=True).values
    terms = sde.terms(times)
    _check_score_determined(sde, sde.terms(times.clamp(_CHECKED_MARGIN, 1 - _CHECKED_MARGIN)))
    with torch.no_grad():
        sde.transform = sde.transform.with_embedded_context()
        real = _real(distribution, x)
        white = sde.flow.whitening.to_white(real)
        share = terms.divisor.abs() / terms.divisor.abs().max()
        kappa = guidance * (share / _GUIDED_SHARE).clamp(max=1)
        batch = broadcast_batch(white.shape[:-1], distribution.batch_shape)
        w = white.expand(paths, *batch, -1)
        w, exponent = _guided_paths(sde, terms, -times.diff()[::2], kappa, w)
        base = distribution.white_base()
        total = exponent + base.log_prob(w) - sde.flow.whitening.log_det
        total = total - distribution.from_flow(real)[1]
        value = total.logsumexp(0) - math.log(paths)
        stderr = (total - value).exp().std(0) / math.sqrt(paths)
    return value, stderr


def _guided_paths(
    sde: InterpolantSDE, terms: TimeTerms, half_steps: Tensor, kappa: Tensor, w: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Run paths back to the base, and return their ends and the exponents of their weights.

    Args:
        sde: The backward equation.
        terms: Its coefficients at all half steps, each of shape ``(2 N + 1,)``.
        half_steps: Half of each time step, shape ``(N,)``.
        kappa: The guidance at these times, shape ``(2 N + 1,)``.
        w: Whitened states at the data end, shape ``(*, D)``.

    Returns:
        Whitened states at the base end, shape ``(*, D)``, and exponents, shape ``(*)``.
    """
    start = _path_point(sde, terms.at(0), kappa[0], w)
    start_rate, total = _exponent_rate(sde, start), w.new_zeros(w.shape[:-1])
    for i, half_step in zip(range(0, len(kappa) - 1, 2), half_steps, strict=True):
        begin, middle, end = terms.at(i), terms.at(i + 1), terms.at(i + 2)
        # Line integrals by Simpson's rule on the chord of each step, which is of its order.
        variance = 4 * half_step * (begin.rate + 4 * middle.rate + end.rate) / 6
        kick = variance.sqrt() * torch.randn_like(w)
        guess = _path_point(sde, end, kappa[i + 2], w + 2 * half_step * start.drift + kick)
        move = half_step * (start.drift + guess.drift) + kick
        halfway = _path_point(sde, middle, kappa[i + 1], w + 0.5 * move)
        stop = _path_point(sde, end, kappa[i + 2], w + move)
        stop_rate = _exponent_rate(sde, stop)
        line = ((start.guide + 4 * halfway.guide + stop.guide) * move).sum(-1) / 6
        rates = start_rate + 4 * _exponent_rate(sde, halfway) + stop_rate
        total = total - line - half_step * rates / 3
        w, start, start_rate = w + move, stop, stop_rate
    return w, total


class _PathPoint(NamedTuple):
    """A point of a guided path, and what drives the path there.

    Attributes:
        now: The coefficients at its time.
        kappa: The guidance, shape ``()``.
        w: The whitened state, shape ``(*, D)``.
        v: The velocity, shape ``(*, D)``.
        score: The score, shape ``(*, D)``.
    """

    now: TimeTerms
    kappa: Tensor
    w: Tensor
    v: Tensor
    score: Tensor

    @property
    def guide(self) -> Tensor:
        r"""The guiding part of the score, :math:`\kappa S`, shape ``(*, D)``."""
        return self.kappa * self.score

    @property
    def drift(self) -> Tensor:
        """The drift of the path in the time 1 - t, shape ``(*, D)``."""
        return (2 * self.kappa - 1) * self.now.rate * self.score - self.v


def _path_point(sde: InterpolantSDE, now: TimeTerms, kappa: Tensor, w: Tensor) -> _PathPoint:
    """Return the point of whitened states w, shape ``(*, D)``, with velocity and score there."""
    v = evaluate(sde.flow.velocity, now.t, w, sde.transform.context)
    return _PathPoint(now, kappa, w, v, sde.score(now, w, v))


def _exponent_rate(sde: InterpolantSDE, at: _PathPoint) -> Tensor:
    r"""Return the integrand over t of the exponent, shape ``(*)``.

    It is :math:`\nabla\cdot v + \kappa S\cdot v + (1 - \kappa)\epsilon (\nabla\cdot S +
    \kappa |S|^2)`.
    """
    flow, divergence, context = sde.flow, sde.transform.divergence, sde.transform.context
    of_velocity = divergence(flow.velocity, at.now.t, at.w, context)
    rate = of_velocity + (at.guide * at.v).sum(-1)
    if at.kappa == 1:
        return rate
    if flow.noise is None:
        times_divisor = at.now.p * of_velocity + at.now.q * at.w.shape[-1]
    else:
        times_divisor = -divergence(flow.noise, at.now.t, at.w, context)
    of_score = times_divisor / at.now.divisor + (at.guide * at.score).sum(-1)
    return rate + (1 - at.kappa) * at.now.rate * of_score
