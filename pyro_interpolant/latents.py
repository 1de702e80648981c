r"""Latent terms: interpolants :math:`I_t(x_0, x_1) + \gamma(t) z` with :math:`z \sim N(0, I)`.

The noise smooths the density in between, and makes scores and diffusions possible for any base.

References:
    Albergo, Boffi & Vanden-Eijnden, *Stochastic interpolants: a unifying framework for flows and
    diffusions*, arXiv 2303.08797.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .interpolants import NEAR, Coefficients, Interpolant, Linear

__all__ = ["BrownianBridge", "Latent", "Mirror", "SineSquared"]


@dataclass(frozen=True)
class BrownianBridge:
    r"""The deviation of a Brownian bridge, :math:`\gamma(t) = \sqrt{a\, t (1 - t)}`.

    Args:
        scale: :math:`a > 0`, in whitened units squared.
    """

    scale: float = 1.0

    interior = (NEAR, 1 - NEAR)

    def __call__(self, t: Tensor) -> Tensor:
        """Return the deviation, of the shape of t."""
        return (self.scale * t * (1 - t)).clamp(min=0).sqrt()


@dataclass(frozen=True)
class SineSquared:
    r"""A smooth deviation, :math:`\gamma(t) = a \sin^2(\pi t)`.

    Args:
        scale: :math:`a > 0`, in whitened units.
    """

    scale: float = 1.0

    def __call__(self, t: Tensor) -> Tensor:
        """Return the deviation, of the shape of t."""
        return self.scale * torch.sin(math.pi * t) ** 2


@dataclass(frozen=True)
class Latent(Interpolant):
    r"""Another interpolant with a latent term, :math:`I_t(x_0, x_1) + \gamma(t) z`.

    Args:
        interpolant: A linear interpolant without one.
        gamma: :math:`\gamma`, a function of times of any shape that vanishes at both ends; one
            whose slope is infinite there states an ``interior`` as :class:`BrownianBridge` does.

    References:
        arXiv 2303.08797, Definition 1 and Section 3.
    """

    interpolant: Interpolant = field(default_factory=Linear)
    gamma: Callable[[Tensor], Tensor] = field(default_factory=SineSquared)

    def __post_init__(self) -> None:
        """Inherit the interior of both."""
        low, high = getattr(self.gamma, "interior", (0.0, 1.0))
        inner = self.interpolant.interior
        object.__setattr__(self, "interior", (max(low, inner[0]), min(high, inner[1])))

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients of base, data and noise, each of the shape of t."""
        alpha, beta, _ = self.interpolant.coefficients(t)
        return alpha, beta, self.gamma(t)


@dataclass(frozen=True)
class Mirror(Interpolant):
    r"""From the data to the data through noise, :math:`I_t = x_1 + \gamma(t) z`.

    There is no density to start from: velocity, score and diffusion only.

    Args:
        gamma: As in :class:`Latent`, a function of times of any shape.

    References:
        arXiv 2303.08797, Section 3.3.
    """

    gamma: Callable[[Tensor], Tensor] = field(default_factory=SineSquared)

    ends = ((0.0, 1.0, 0.0), (0.0, 1.0, 0.0))

    def __post_init__(self) -> None:
        """Inherit the interior."""
        object.__setattr__(self, "interior", getattr(self.gamma, "interior", (0.0, 1.0)))

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients of base, data and noise, each of the shape of t."""
        return torch.zeros_like(t), torch.ones_like(t), self.gamma(t)
