r"""Interpolants :math:`I_t(x_0, x_1)` between a draw of the base and a row of data.

The linear family is :math:`I_t = \alpha(t) x_0 + \beta(t) x_1 + \gamma(t) z` with :math:`z \sim
N(0, 1)` independent. A member states its coefficients; their derivatives come from forward-mode
differentiation and are never written by hand.

References:
    Albergo & Vanden-Eijnden, *Building Normalizing Flows with Stochastic Interpolants*, ICLR 2023,
    arXiv 2209.15571, eq. 4; Albergo, Boffi & Vanden-Eijnden, arXiv 2303.08797, Definition 1.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jvp

__all__ = ["Interpolant", "Linear", "Trigonometric"]

Coefficients = tuple[Tensor, Tensor, Tensor]


class Interpolant(ABC):
    """A path between pairs of points: the one abstract method is :meth:`coefficients`.

    A non-linear interpolant overrides :meth:`sample` instead.

    Example:
        >>> class Squared(Interpolant):
        ...     def coefficients(self, t):
        ...         return (1 - t) ** 2, t**2, torch.zeros_like(t)
        >>> [float(c) for c in Squared().derivatives(torch.tensor(0.5))]
        [-1.0, 1.0, 0.0]
    """

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        r"""Return :math:`\alpha(t), \beta(t), \gamma(t)`, each of the shape of t.

        The ends are :math:`(1, 0, 0)` at t = 0 and :math:`(0, 1, 0)` at t = 1.
        """

    def derivatives(self, t: Tensor) -> Coefficients:
        r"""Return :math:`\dot\alpha(t), \dot\beta(t), \dot\gamma(t)`, each of the shape of t."""
        return self._both(t)[1]

    def sample(self, t: Tensor, x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`x_t = I_t(x_0, x_1)` and its time derivative, each of shape ``(*, D)``.

        Args:
            t: Times in [0, 1], broadcastable to ``(*)``.
            x0: Base draws, shape ``(*, D)``.
            x1: Data rows, shape ``(*, D)``.
        """
        values, slopes = self._both(t)
        a, b, g = (c[..., None] for c in values)
        da, db, dg = (c[..., None] for c in slopes)
        x_t, dx_t = a * x0 + b * x1, da * x0 + db * x1
        if bool((g != 0).any()):
            z = torch.randn_like(x0)
            x_t, dx_t = x_t + g * z, dx_t + dg * z
        return x_t, dx_t

    def _both(self, t: Tensor) -> tuple[Coefficients, Coefficients]:
        """Return the coefficients and their derivatives, of the shape and type of t."""
        t = t.contiguous()  # forward mode cannot carry tangents on stride-0 tensors
        values, slopes = jvp(self.coefficients, (t,), (torch.ones_like(t),))[:2]
        return values, tuple(s.to(t) for s in slopes)


@dataclass(frozen=True)
class Trigonometric(Interpolant):
    r"""The paper's default, :math:`I_t = \cos(\pi t/2)\, x_0 + \sin(\pi t/2)\, x_1` (eq. 5).

    It keeps the covariance of whitened data constant: between Gaussians of equal moments the
    velocity is exactly zero.
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients of base, data and noise, each of the shape of t."""
        angle = 0.5 * math.pi * t
        return angle.cos(), angle.sin(), torch.zeros_like(t)


@dataclass(frozen=True)
class Linear(Interpolant):
    r"""The straight line, :math:`I_t = (1 - t)\, x_0 + t\, x_1` (rectified flow)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients of base, data and noise, each of the shape of t."""
        return 1 - t, t, torch.zeros_like(t)
