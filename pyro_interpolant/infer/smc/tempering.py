r"""Sequential Monte Carlo along :math:`p^b q^{1 - b}`, from draws of q to an unnormalised p.

Each level raises b, draws the particles by their weights :math:`(p / q)^{\Delta b}`, and moves
them by Hamiltonian Monte Carlo that leaves the level's density as it is. ``LogDensity`` evaluates
p in blocks, ``Particles`` are rows with their gradients, ``HMCKernel`` moves them: the rest of the
room uses all three.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..._torch import NumbersComputed, draws_nothing
from ...diagnostics.psis import effective_sample_size, finite_or_minus_inf, systematic_resampling

# Rows are evaluated in blocks that compute so many numbers: larger ones leave the processor's
# cache, smaller ones pay for every call. On one thread, microseconds a row in blocks of 128, 1,024
# and 4,096: eight schools (453 numbers a row) 13, 1.9, 0.85; a regression of 500 rows (9,173) 24,
# 36, 32; a mixture of three (178) 7.6, 1.2, 0.51.
_NUMBERS_AT_ONCE, _FEWEST_ROWS, _MOST_ROWS = 2**21, 32, 4096
_CHECKED = 32  # rows at a time, until one has a density
_TARGET_ACCEPTANCE = 0.7  # of the longer steps
_STEP_DECADES = (-2.0, 0.8)  # the other steps, in powers of ten of the usual one
_EFFECTIVE_SHARE = 0.5  # from level to level
_MOVES_PER_LEVEL = 4
_MIN_EIGENVALUE = 1e-10  # of a correlation, below which it is noise


class Particles(NamedTuple):
    """Rows with their log-densities and gradients.

    Attributes:
        x: Rows, shape ``(N, D)``.
        log_p: Log-densities, shape ``(N,)``.
        gradient: Their gradients, shape ``(N, D)``.
    """

    x: Tensor
    log_p: Tensor
    gradient: Tensor

    def take(self, index: Tensor) -> "Particles":
        """Return the particles of an index, shape ``(B,)``."""
        return Particles(*(part[index] for part in self))

    def where(self, chosen: Tensor, other: "Particles") -> "Particles":
        """Return these particles where ``chosen``, shape ``(N,)``, and the others elsewhere."""
        rows = chosen[:, None]
        return Particles(
            torch.where(rows, self.x, other.x),
            torch.where(chosen, self.log_p, other.log_p),
            torch.where(rows, self.gradient, other.gradient),
        )


class LogDensity:
    r"""An unnormalised log density, evaluated in blocks of rows, with its gradient.

    What is not finite counts as zero density.

    Args:
        function: From rows, shape ``(N, D)``, to log densities, shape ``(N,)``.

    Attributes:
        rows: How many rows are evaluated at once, by how many numbers each computes.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function, self.rows = function, 1024

    def check(self, x: Tensor) -> None:
        """Raise a ValueError unless the density is finite at some rows and differentiable.

        Args:
            x: Rows to try on, shape ``(N, D)``.
        """
        for few in x.split(_CHECKED):
            with torch.enable_grad(), NumbersComputed() as numbers:
                value = self(few.detach().clone().requires_grad_())
            if bool(torch.isfinite(value).any()):
                break
        if not value.requires_grad:
            raise ValueError(
                "expected a log density that can be differentiated, got one without a graph: "
                "compute it with torch operations, outside torch.no_grad()"
            )
        if not bool(torch.isfinite(value).any()):
            raise ValueError(
                f"expected a log density that is finite somewhere, got none of {len(x)} draws of "
                "the start: pass start=, rows near the target, or its centre"
            )
        rows = _NUMBERS_AT_ONCE * len(few) // max(1, numbers.count)
        self.rows = max(_FEWEST_ROWS, min(_MOST_ROWS, rows))

    def __call__(self, x: Tensor) -> Tensor:
        """Return the log density, shape ``(N,)``, of rows of shape ``(N, D)``, differentiable."""
        with draws_nothing():
            return torch.cat([self._value(part) for part in x.split(self.rows)])

    def particles(self, x: Tensor) -> Particles:
        """Return rows, shape ``(N, D)``, with their log densities and gradients."""
        parts = [self._differentiated(part) for part in x.split(self.rows)]
        return Particles(x, *map(torch.cat, zip(*parts, strict=True)))

    def _differentiated(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log densities and gradients of rows that are evaluated at once, ``(N, D)``."""
        with torch.enable_grad(), draws_nothing():
            leaf = x.detach().clone().requires_grad_()
            value = self._value(leaf)
            (gradient,) = torch.autograd.grad(value.sum(), leaf)
        finite = torch.isfinite(gradient).all(-1) & (value > -math.inf)
        return value.detach(), torch.where(finite[:, None], gradient, 0.0)

    def _value(self, x: Tensor) -> Tensor:
        value = self.function(x)
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"expected log densities of shape ({len(x)},) for rows of shape "
                f"{tuple(x.shape)}, got {tuple(value.shape)}"
            )
        return finite_or_minus_inf(value)


class HMCKernel:
    r"""Hamiltonian Monte Carlo in the metric of the particles, with step sizes drawn at random.

    Half of the particles take steps of the size that is accepted often, half log-uniform ones
    from a hundredth of it to six times it: narrow and wide places stay within reach. The step of a
    particle is drawn apart from where it is, so each move leaves the density as it is.

    Args:
        leaps: The most leapfrog steps in a move.
    """

    def __init__(self, leaps: int = 8) -> None:
        self.leaps, self.step = leaps, 0.5
        self.root = torch.eye(1)

    def adapt_metric(self, x: Tensor) -> None:
        """Set the metric from particles, shape ``(N, D)``."""
        rows = x.double()
        covariance = torch.atleast_2d(rows.T.cov())
        scale = covariance.diagonal().sqrt().clamp_min(1e-30)
        correlation = covariance / scale / scale[:, None]
        values, vectors = torch.linalg.eigh(correlation)
        self.root = (scale[:, None] * vectors * values.clamp_min(_MIN_EIGENVALUE).sqrt()).to(x)

    def __call__(
        self, particles: Particles, density: Callable[[Tensor], Particles]
    ) -> tuple[Particles, float]:
        """Move all particles once; return them and the mean acceptance of the longer steps.

        Args:
            particles: Particles of the density, N of them.
            density: From rows, shape ``(N, D)``, to particles there.
        """
        root, count = self.root, len(particles.x)
        u = torch.rand(count, 1).to(particles.x)
        long = torch.rand(count, 1).to(u) < 0.5
        other = 10.0 ** (_STEP_DECADES[0] + (_STEP_DECADES[1] - _STEP_DECADES[0]) * u)
        size = self.step * torch.where(long, 0.6 + 0.6 * u, other)
        momentum = torch.randn_like(particles.x)
        energy = particles.log_p - 0.5 * momentum.square().sum(-1)
        new, p = particles, momentum
        for _ in range(int(torch.randint(1, self.leaps + 1, ()))):
            p = p + 0.5 * size * (new.gradient @ root)
            new = density(new.x + size * (p @ root.T))
            p = p + 0.5 * size * (new.gradient @ root)
        gain = new.log_p - 0.5 * p.square().sum(-1) - energy
        gain = torch.where(torch.isnan(gain), -math.inf, gain)
        accepted = torch.rand(count).to(gain).log() < gain
        rate = float(gain.clamp_max(0.0).exp()[long[:, 0]].mean()) if bool(long.any()) else 0.0
        self.step *= math.exp(0.5 * (rate - _TARGET_ACCEPTANCE))
        return new.where(accepted, particles), rate


class Level(NamedTuple):
    r"""Particles of :math:`p^b q^{1 - b}`.

    Attributes:
        exponent: b, from 0 at the start to 1 at the target.
        particles: N rows, with log p and its gradient.
        log_evidence: The log of :math:`\int p^b q^{1 - b}`, an estimate.
    """

    exponent: float
    particles: Particles
    log_evidence: float


def tempered_smc(x: Tensor, q: LogDensity, p: LogDensity, kernel: HMCKernel) -> Iterator[Level]:
    r"""Carry draws of q to p along :math:`p^b q^{1-b}`, b from 0 to 1, and yield each level.

    Each b is the largest at which half the particles stay effective; they are then drawn by weight
    and moved. The last level is p itself, unless p has no density at any particle.

    Args:
        x: Draws of q, shape ``(N, D)``.
        q: :math:`\log q`.
        p: :math:`\log p`.
        kernel: The moves.

    References:
        Del Moral, Doucet & Jasra, *Sequential Monte Carlo samplers*, JRSS B 68, 2006.
    """
    b, evidence = 0.0, 0.0
    of_p, of_q = p.particles(x), q.particles(x)
    yield Level(b, of_p, evidence)
    while b < 1.0:
        ratio = of_p.log_p - of_q.log_p
        if not bool(torch.isfinite(ratio).any()):
            return
        new = _next_exponent(ratio, b, _EFFECTIVE_SHARE)
        weights = (new - b) * ratio
        evidence += float(weights.double().logsumexp(0)) - math.log(len(x))
        index, b = systematic_resampling(weights, len(x)), new
        of_p, of_q = of_p.take(index), of_q.take(index)
        kernel.adapt_metric(of_p.x)

        def between(x: Tensor, b: float = b) -> Particles:
            return _geometric_mean(p.particles(x), q.particles(x), b)

        state = _geometric_mean(of_p, of_q, b)
        for _ in range(_MOVES_PER_LEVEL):
            state, _ = kernel(state, between)
        of_p, of_q = p.particles(state.x), q.particles(state.x)
        yield Level(b, of_p, evidence)


def _geometric_mean(p: Particles, q: Particles, b: float) -> Particles:
    """Return particles of :math:`p^b q^{1-b}`, of those of p and q at the same rows."""
    log_p = b * p.log_p + (1 - b) * q.log_p
    return Particles(p.x, log_p, b * p.gradient + (1 - b) * q.gradient)


def _next_exponent(ratio: Tensor, b: float, share: float) -> float:
    """Return the largest exponent up to 1 at which the share of the particles is effective."""

    def enough(new: float) -> bool:
        return effective_sample_size((new - b) * ratio) >= share * len(ratio)

    if enough(1.0):
        return 1.0
    low, high = b, 1.0
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low if low > b else high
