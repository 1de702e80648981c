r"""Paths that are not linear in their ends: any function of yours, geodesics of the torus.

A path is a function :math:`I_t(x_0, x_1)` with :math:`I_0 = x_0` and :math:`I_1 = x_1`; its time
derivative comes by forward-mode differentiation. It has no coefficients, and so no score or
denoiser follows from its velocity.

References:
    Albergo & Vanden-Eijnden, *Building Normalizing Flows with Stochastic Interpolants*, ICLR 2023,
    arXiv 2209.15571, Section 2.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch import jvp
from .linear import Coefficients, Interpolant, check_function


class _WithoutCoefficients(Interpolant):
    r"""A path without coefficients, and without a latent term :math:`\gamma z`."""

    def has_latent(self) -> bool:
        """Return False."""
        return False

    def coefficients(self, t: Tensor) -> Coefficients:
        """Raise a TypeError, for times of any shape."""
        raise TypeError(f"{type(self).__name__} is not linear: it has no coefficients")


@dataclass(frozen=True)
class NonlinearInterpolant(_WithoutCoefficients):
    r"""A path of your own, :math:`I_t(x_0, x_1)`; its time derivative comes by forward mode.

    Args:
        function: ``(t, x0, x1) -> x_t`` with t of shape ``(*, 1)`` and pairs of shape ``(*, D)``;
            it returns ``x0`` at t = 0 and ``x1`` at t = 1.

    Raises:
        TypeError: If it is no function.

    References:
        arXiv 2209.15571, Section 2.

    Example:
        >>> def arc(t, x0, x1):
        ...     return (1 - t) * x0 + t * x1 + t * (1 - t) * (x1 - x0).tanh()
        >>> x_t, dx_t = NonlinearInterpolant(arc).sample(
        ...     torch.tensor(0.0), torch.zeros(1), torch.ones(1)
        ... )
        >>> float(x_t), round(float(dx_t), 4)
        (0.0, 1.7616)
    """

    function: Callable[[Tensor, Tensor, Tensor], Tensor]

    def __post_init__(self) -> None:
        """Check the function."""
        check_function("a path", self.function, "lambda t, x0, x1: (1 - t) * x0 + t * x1")

    def check_ends(self, dim: int) -> None:
        """Raise a ValueError unless the path of D-dimensional pairs joins base and data."""
        generator = torch.Generator().manual_seed(0)
        x0, x1 = torch.randn(2, 16, dim, generator=generator, dtype=torch.float64)
        for t, x, name in ((0.0, x0, "x0"), (1.0, x1, "x1")):
            found = self.function(torch.full((16, 1), t, dtype=torch.float64), x0, x1)
            if found.shape != x.shape or not bool(((found - x).abs() < 1e-6).all()):
                raise ValueError(
                    f"expected the path to be {name} at t = {t:g}, got values up to "
                    f"{float((found - x).abs().max()):.3g} away"
                    if found.shape == x.shape
                    else f"expected paths of shape {tuple(x.shape)}, got {tuple(found.shape)}"
                )

    def sample(
        self, t: Tensor, x0: Tensor, x1: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the path and its time derivative, each of shape ``(*, D)``.

        Args:
            t: Times in [0, 1], broadcastable to ``(*)``.
            x0: Base draws, shape ``(*, D)``.
            x1: Data rows, shape ``(*, D)``.
            z: Unused: there is no latent term.
        """
        t = t.expand(x0.shape[:-1])[..., None].clone()
        return jvp(lambda t: self.function(t, x0, x1), (t,), (torch.ones_like(t),))[:2]


_TWO_PI = 2 * math.pi


def wrap(x: Tensor) -> Tensor:
    """Return angles modulo 2 pi, in [-pi, pi), of the shape of x; the derivative is 1.

    Example:
        >>> wrap(torch.tensor([3.0, 4.0])).tolist()
        [3.0, -2.2831854820251465]
    """
    x = x - _TWO_PI * torch.round(x / _TWO_PI)
    # The quotient is rounded, so angles within rounding of pi or -pi can lie on either side.
    return x + _TWO_PI * ((x < -math.pi).to(x) - (x >= math.pi).to(x))


@dataclass(frozen=True)
class Geodesic(_WithoutCoefficients):
    r"""The shortest way on the torus, :math:`I_t = x_0 + \beta(t) \, \mathrm{wrap}(x_1 - x_0)`.

    Every coordinate goes the shorter way round, at most :math:`\pi`. The path is not linear, so it
    has no coefficients; it ends at :math:`x_1` or whole turns away from it.

    Args:
        schedule: :math:`\beta`, a function of times of any shape with :math:`\beta(0) = 0` and
            :math:`\beta(1) = 1`. By default t: constant speed.

    Raises:
        TypeError: If it is no function.

    References:
        arXiv 2209.15571, Section 2; Chen & Lipman, *Flow matching on general geometries*,
        ICLR 2024, arXiv 2302.03660, Section 3.2.

    Example:
        >>> x_t, dx_t = Geodesic().sample(
        ...     torch.tensor(0.5), torch.tensor([3.0]), torch.tensor([-3.0])
        ... )
        >>> round(float(x_t), 4), round(float(dx_t), 4)
        (3.1416, 0.2832)
    """

    schedule: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Check the schedule."""
        if self.schedule is not None:
            check_function("schedule", self.schedule, "lambda t: t**2")

    def check_ends(self, dim: int) -> None:
        """Raise a ValueError unless the path, modulo whole turns, joins base and data."""
        ends = self._beta(torch.tensor([0.0, 1.0], dtype=torch.float64))
        if ends.shape != (2,) or not bool(((ends - torch.tensor([0.0, 1.0])).abs() < 1e-6).all()):
            raise ValueError(
                f"expected a schedule that is 0 at t = 0 and 1 at t = 1, got {ends.tolist()}"
            )

    def sample(
        self, t: Tensor, x0: Tensor, x1: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the path, not wrapped, and its time derivative, each of shape ``(*, D)``.

        Args:
            t: Times in [0, 1], broadcastable to ``(*)``.
            x0: Base draws, shape ``(*, D)``: angles, plus any number of turns.
            x1: Data rows, shape ``(*, D)``: angles, plus any number of turns.
            z: Unused: there is no latent term.
        """
        t = t.contiguous()  # forward mode cannot carry stride-0 tangents
        beta, slope = jvp(self._beta, (t,), (torch.ones_like(t),))[:2]
        difference = wrap(x1 - x0)
        return x0 + beta[..., None] * difference, slope[..., None] * difference

    def _beta(self, t: Tensor) -> Tensor:
        return t.clone() if self.schedule is None else self.schedule(t)
