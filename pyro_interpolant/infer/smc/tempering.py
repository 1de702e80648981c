r"""Particles on an unnormalised density: its evaluation, tempering, and Metropolis moves."""

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...diagnostics.psis import effective_sample_size, systematic_resampling

__all__ = ["Density", "Kernel", "Particles", "annealed"]


_CHUNKS = (128, 1024, 4096)  # rows evaluated at once that are tried
_TUNING = 1.0  # seconds, beyond which larger blocks are not tried
_TARGET = 0.7  # acceptance of the longer steps
_DECADES = (-2.0, 0.8)  # the other steps, in powers of ten of the usual one
_ESS = (0.5, 0.2, 0.05)  # shares that stay effective from level to level: in time, late, very late
_MOVES = 4  # per temperature
_DEPENDENT = 1e-10  # eigenvalues of a correlation below this are noise


class Density:
    r"""An unnormalised log-density, evaluated in chunks of rows, with its gradient.

    What is not finite counts as zero density.

    Args:
        function: From rows, shape ``(N, D)``, to log-densities, shape ``(N,)``.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.rows = 256  # at once
        self.seconds = 0.0  # per row, with its gradient

    def check(self, x: Tensor) -> None:
        """Raise a ValueError unless the density is finite at some of the rows, and has a slope.

        Args:
            x: Rows to try on, shape ``(N, D)``.
        """
        with torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            value = self._value(leaf)
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

    def tune(self, x: Tensor) -> None:
        """Learn by the clock what a row costs, and how many are best evaluated at once.

        Large blocks leave the processor's cache, small ones pay for every call.

        Args:
            x: Rows to try on, shape ``(N, D)``.
        """
        best = math.inf
        for rows in sorted({min(r, len(x)) for r in _CHUNKS}):
            few, self.rows = x[: 2 * rows], rows
            began = time.monotonic()
            self.with_gradient(few)
            each = (time.monotonic() - began) / len(few)
            if each < 0.9 * best:
                best, chosen = each, rows
            if 10 * each * len(few) > _TUNING:
                break
        self.rows, self.seconds = chosen, best

    def __call__(self, x: Tensor) -> Tensor:
        """Return the log-density, shape ``(N,)``, of rows of shape ``(N, D)``."""
        with torch.no_grad():
            return torch.cat([self._value(part) for part in self._parts(x)])

    def with_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-density, shape ``(N,)``, and its gradient, shape ``(N, D)``."""
        values, gradients = [], []
        for part in self._parts(x):
            with torch.enable_grad():
                leaf = part.detach().clone().requires_grad_()
                value = self._value(leaf)
                (gradient,) = torch.autograd.grad(value.sum(), leaf)
            finite = torch.isfinite(gradient).all(-1) & (value > -math.inf)
            values.append(value.detach())
            gradients.append(torch.where(finite[:, None], gradient, 0.0))
        return torch.cat(values), torch.cat(gradients)

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.split(self.rows)

    def _value(self, x: Tensor) -> Tensor:
        value = self.function(x)
        if value.shape != x.shape[:1]:
            raise ValueError(
                f"expected log densities of shape ({len(x)},) for rows of shape "
                f"{tuple(x.shape)}, got {tuple(value.shape)}"
            )
        return torch.where(torch.isfinite(value), value, -math.inf)


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

    @classmethod
    def at(cls, x: Tensor, density: Callable[[Tensor], tuple[Tensor, Tensor]]) -> "Particles":
        """Return particles at rows, shape ``(N, D)``."""
        return cls(x, *density(x))

    def take(self, index: Tensor) -> "Particles":
        """Return the particles of an index, shape ``(B,)``."""
        return Particles(*(part[index] for part in self))

    def where(self, chosen: Tensor, other: "Particles") -> "Particles":
        """Return these particles where ``chosen``, shape ``(N,)``, and the others elsewhere."""
        return Particles(
            *(
                torch.where(chosen.reshape(-1, *(1,) * (a.dim() - 1)), a, b)
                for a, b in zip(self, other, strict=True)
            )
        )


class Kernel:
    r"""Hamiltonian moves in the metric of the particles, with steps of many sizes.

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
        self.root = (scale[:, None] * vectors * values.clamp_min(_DEPENDENT).sqrt()).to(x)

    def __call__(
        self, particles: Particles, density: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> tuple[Particles, float]:
        """Move all particles once; return them and the mean acceptance of the longer steps."""
        root, count = self.root, len(particles.x)
        u = torch.rand(count, 1).to(particles.x)
        long = torch.rand(count, 1).to(u) < 0.5
        other = 10.0 ** (_DECADES[0] + (_DECADES[1] - _DECADES[0]) * u)
        size = self.step * torch.where(long, 0.6 + 0.6 * u, other)
        momentum = torch.randn_like(particles.x)
        energy = particles.log_p - 0.5 * momentum.square().sum(-1)
        new, p = particles, momentum
        for _ in range(int(torch.randint(1, self.leaps + 1, ()))):
            p = p + 0.5 * size * (new.gradient @ root)
            new = Particles.at(new.x + size * (p @ root.T), density)
            p = p + 0.5 * size * (new.gradient @ root)
        gain = new.log_p - 0.5 * p.square().sum(-1) - energy
        gain = torch.where(torch.isnan(gain), -math.inf, gain)
        accepted = torch.rand(count).to(gain).log() < gain
        rate = float(gain.clamp_max(0.0).exp()[long[:, 0]].mean()) if bool(long.any()) else 0.0
        self.step *= math.exp(0.5 * (rate - _TARGET))
        return new.where(accepted, particles), rate


def annealed(
    x: Tensor,
    density: Density,
    start: Callable[[Tensor], tuple[Tensor, Tensor]],
    kernel: Kernel,
    *,
    deadline: float,
    give_up: float = math.inf,
    look: Callable[[float, float, float, Tensor], None] | None = None,
) -> tuple[Particles, float]:
    r"""Carry draws of q to p along :math:`p^b q^{1-b}`, b from 0 to 1.

    Each b is the largest at which half the particles stay effective; they are then drawn by weight
    and moved.

    Args:
        x: Draws of q, shape ``(N, D)``.
        density: :math:`\log p`.
        start: :math:`\log q` with its gradient.
        kernel: The moves.
        deadline: The time, by :func:`time.monotonic`, from which b rises faster, and, when as much
            again is spent, faster still.
        give_up: The time from which it stops where it is.
        look: Called with b, the mean acceptance, the log-evidence and the rows, ``(N, D)``.

    Returns:
        Particles of p, or of the path where it was given up, and the log-evidence.

    References:
        Del Moral, Doucet & Jasra, *Sequential Monte Carlo samplers*, JRSS B 68, 2006.
    """
    b, evidence, began = 0.0, 0.0, time.monotonic()
    p, q = Particles.at(x, density.with_gradient), Particles.at(x, start)
    while b < 1.0 and time.monotonic() < give_up:
        ratio = p.log_p - q.log_p
        if not bool(torch.isfinite(ratio).any()):
            break
        late = (time.monotonic() > deadline) + (time.monotonic() > 2 * deadline - began)
        new = _next(ratio, b, _ESS[late])
        weights = (new - b) * ratio
        evidence += float(weights.double().logsumexp(0)) - math.log(len(weights))
        index, b = systematic_resampling(weights, len(x)), new
        p, q = p.take(index), q.take(index)
        kernel.adapt_metric(p.x)
        rates = []

        def joint(x: Tensor, b: float = b) -> tuple[Tensor, Tensor]:
            p, q = density.with_gradient(x), start(x)
            return b * p[0] + (1 - b) * q[0], b * p[1] + (1 - b) * q[1]

        state = Particles(
            p.x, b * p.log_p + (1 - b) * q.log_p, b * p.gradient + (1 - b) * q.gradient
        )
        for _ in range(_MOVES if not late else _MOVES // 2):
            state, rate = kernel(state, joint)
            rates.append(rate)
        p, q = Particles.at(state.x, density.with_gradient), Particles.at(state.x, start)
        if look is not None:
            look(b, sum(rates) / len(rates), evidence, p.x)
    return p, evidence


def _next(ratio: Tensor, b: float, share: float) -> float:
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
