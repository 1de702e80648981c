r"""Stochastic paths with the flow's own densities, from the base to the data and back.

For every :math:`\epsilon(t) \ge 0`, with v the velocity and S the score, the diffusions

.. math:: dX = (v + \epsilon S)\, dt + \sqrt{2\epsilon}\, dW \quad\text{(forward)}, \qquad
          dX = (v - \epsilon S)\, dt + \sqrt{2\epsilon}\, dW \quad\text{(backward, from 1 to 0)}

have the density :math:`\rho_t` of the interpolant at every t. The noise is isotropic in whitened
coordinates: in data coordinates, :math:`y = \mathrm{loc} + L w`, it is :math:`L\,dW`.

The default is :math:`\epsilon = |\Delta|, \Delta = \dot\beta\sigma^2 - \beta\sigma\dot\sigma`, the
divisor of the score (see :func:`~pyro_interpolant.velocity_to_score`; :math:`\sigma^2` where
:math:`\beta = \dot\beta = 0`). The forward drift is then :math:`(1 + \beta) v - \dot\beta x`:
nothing is divided by, and both ends are finite. It is
:math:`\beta` times the diffusion at which an error of the velocity costs least: an error e of v is
one of :math:`(1 + \epsilon\beta/\Delta)\, e` of the drift and adds
:math:`(1 + \epsilon\beta/\Delta)^2 |e|^2 / 4\epsilon` to the bound of the divergence between data
and model, which is smallest at :math:`\epsilon = \Delta/\beta`; that one is infinite at t = 0.

References:
    Albergo, Boffi & Vanden-Eijnden, arXiv 2303.08797, Sections 2.3 and 2.4; Ma et al., *SiT*,
    arXiv 2401.08740 (on the choice of :math:`\epsilon`).
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from .conversions import score_terms, tiny
from .distributions import InterpolantDistribution
from .interpolants import NEAR
from .scores import conditional_mean, transform_with_score
from .supports import is_trivial

__all__ = [
    "Diffusion",
    "InterpolantSDE",
    "check_determined",
    "grid",
    "inside",
    "sample_sde",
    "whiten",
]

Diffusion = Callable[[Tensor], Tensor | float]


class InterpolantSDE:
    r"""The stochastic differential equation of a flow, in the protocol of torchsde.

    States are in data coordinates; under a support, in its unconstrained space. Scores may be
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
        t = torch.linspace(NEAR, 1 - NEAR, 257).to(self.flow.loc)
        rate = self.rate(t)
        if not bool(((rate >= 0) & torch.isfinite(rate)).all()):
            raise ValueError(
                f"expected a diffusion that is finite and at least 0, got {float(rate.min()):.3g} "
                f"to {float(rate.max()):.3g}"
            )
        if diffusion is not None:
            check_determined(self, t[rate > 0])

    def f(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the drift, shape ``(B, D)``.

        Args:
            t: The time, shape ``()``; 1 - t for paths that run backward.
            y: States, shape ``(B, D)``.
        """
        w = self.flow.to_white(self.transform._checked(y))
        return self.drift(self._real(t, y), w) @ self.flow.linear.T

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        r"""Return the diffusion matrix :math:`\sqrt{2\epsilon}\, L`, shape ``(B, D, D)``.

        Args:
            t: The time, shape ``()``; 1 - t for paths that run backward.
            y: States, shape ``(B, D)``.
        """
        scale = (2 * self.rate(self._real(t, y))).sqrt()
        return (scale * self.flow.linear).expand(*y.shape[:-1], -1, -1)

    def rate(self, t: Tensor) -> Tensor:
        r"""Return :math:`\epsilon` at times t of the flow, of the shape of t."""
        t = inside(t)
        if self.diffusion is not None:
            value = self.diffusion(t)
            return torch.as_tensor(value, dtype=t.dtype, device=t.device).expand_as(t)
        return self.divisor(t).abs()

    def drift(self, t: Tensor, w: Tensor) -> Tensor:
        """Return the drift in whitened coordinates, shape ``(*, D)``.

        Args:
            t: Times of the flow, broadcastable to ``(*)``.
            w: Whitened states, shape ``(*, D)``.
        """
        t = inside(t)
        v = conditional_mean(self.transform, self.flow.velocity, t, w)
        divisor = self.divisor(t)
        # The default diffusion undoes a division, which is then not done at all.
        ratio = divisor.sign() if self.diffusion is None else _ratio(self.rate(t), divisor)
        push = ratio[..., None] * self._multiple(t, w, v)
        return v + push if self.forward else push - v

    def score(self, t: Tensor, w: Tensor, v: Tensor) -> Tensor:
        """Return the score in whitened coordinates, shape ``(*, D)``, given the velocity there.

        Args:
            t: Times of the flow, broadcastable to ``(*)``.
            w: Whitened states, shape ``(*, D)``.
            v: The velocity, shape ``(*, D)``.
        """
        t = inside(t)
        return self._multiple(t, w, v) / self.divisor(t)[..., None]

    def divisor(self, t: Tensor) -> Tensor:
        """Return what the score is a division by, of the shape of t."""
        if self.flow.noise is not None:
            return self.transform.interpolant.coefficients(t)[2]
        return score_terms(self.transform.interpolant, t)[2]

    def _multiple(self, t: Tensor, w: Tensor, v: Tensor) -> Tensor:
        """Return the score times its divisor, shape ``(*, D)``."""
        if self.flow.noise is not None:
            return -conditional_mean(self.transform, self.flow.noise, t, w)
        p, q, _ = score_terms(self.transform.interpolant, t)
        return p[..., None] * v + q[..., None] * w

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
    times = grid(sde, steps)
    with torch.no_grad():
        if x is None:
            w = _base_draws(distribution, shape)
        else:
            w = whiten(sde, distribution, x)
            w = w.expand(*shape, *w.shape)
        rates, gap = sde.rate(times), float((times[1] - times[0]).abs())
        for i in range(steps):
            t, after = times[i], times[i + 1]
            kick = (gap * (rates[i] + rates[i + 1])).sqrt() * torch.randn_like(w)
            slope = sde.drift(t, w)
            if method == "heun":
                slope = 0.5 * (slope + sde.drift(after, w + gap * slope + kick))
            w = w + gap * slope + kick
        y = sde.flow.from_white(w)
        return y if is_trivial(distribution.constraint) else distribution.transforms[-1](y)


def inside(t: Tensor) -> Tensor:
    """Return times moved off the ends, of the shape of t."""
    return t.clamp(NEAR, 1 - NEAR)


def _ratio(rate: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(rate == 0, 0, rate / torch.where(rate == 0, 1, divisor))


def grid(sde: InterpolantSDE, steps: int) -> Tensor:
    """Return the times of the flow from first to last, shape ``(steps + 1,)``."""
    if steps < 1:
        raise ValueError(f"expected at least one step, got steps={steps}")
    times = torch.linspace(0.0, sde.transform.end, steps + 1).to(sde.flow.loc)
    return times if sde.forward else times.flip(0)


def whiten(sde: InterpolantSDE, distribution: InterpolantDistribution, x: Tensor) -> Tensor:
    """Return values, shape ``(*, *event_shape)``, in whitened coordinates, shape ``(*, D)``."""
    return sde.flow.to_white(sde.transform._checked(distribution.unconstrained(x)))


def _base_draws(distribution: InterpolantDistribution, shape: Sequence[int]) -> Tensor:
    flow: Any = distribution.transform.flow
    if distribution.base is None and flow.interpolant.ends[0][0] == 0:
        raise ValueError(
            f"expected rows x to start from: the base of {type(flow.interpolant).__name__} is the "
            "data, which this flow was not fitted to"
        )
    x0 = distribution.base_dist.sample(torch.Size(shape))
    return x0 if distribution.base is None else flow.to_white(x0)


def check_determined(sde: InterpolantSDE, t: Tensor) -> None:
    """Raise a ValueError unless the score is determined at given times, shape ``(T,)``."""
    divisor = sde.divisor(t)
    lost = (divisor.abs() <= tiny(t)) | (divisor.sign() != divisor[-1:].sign())
    if bool(lost.any()):
        reason = "data do not gain on noise there; or train with fit(..., learn='noise')"
        raise ValueError(
            "expected a diffusion that is zero where the score is not determined, as near t = "
            f"{float(t[lost][-1]):.3g} ({reason if sde.flow.noise is None else 'gamma is zero'}): "
            "leave it at its default"
        )
