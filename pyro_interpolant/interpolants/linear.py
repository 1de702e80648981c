r"""Linear interpolants, :math:`I_t = \alpha(t) x_0 + \beta(t) x_1 + \gamma(t) z`.

:math:`x_0` is a draw of the base, :math:`x_1` a row of data and :math:`z \sim N(0, I)` is
independent of both. A member states its coefficients; their derivatives come from forward-mode
differentiation and are never written by hand. They must be finite at both ends, and be the slopes
of the path at every time, else its velocity does not lead to the data. So a root that vanishes at
an end (of a Brownian bridge) becomes a straight line within about ``_END_MARGIN`` of it, smoothly:
a velocity that jumped would cost solvers steps.

References:
    Albergo & Vanden-Eijnden, *Building Normalizing Flows with Stochastic Interpolants*, ICLR 2023,
    arXiv 2209.15571, eq. 4; Albergo, Boffi & Vanden-Eijnden, arXiv 2303.08797, Definition 1.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._package import check_ranges, number
from .._torch import slopes

Coefficients = tuple[Tensor, Tensor, Tensor]

_END_MARGIN = 1e-3  # the time from an end at which a root that vanishes there turns into a line
# The same of the roots that weigh draws and data. Their slopes are noise in training, which no
# antithetic draw takes away: with 1e-3 held-out rows of two narrow arms lost 0.05 nats.
_SHARE_MARGIN = 4e-3


def check_function(name: str, value: object, example: str) -> None:
    """Raise a TypeError unless a part, called by its name, is a function, and no class of them."""
    if isinstance(value, type) or not callable(value):
        got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(f"expected {name} to be a function, such as {example}, got {got}")


class Interpolant(ABC):
    r"""A path :math:`I_t(x_0, x_1)`: the one abstract method is :meth:`coefficients`.

    A path that is not linear in its ends is a :class:`NonlinearInterpolant`.

    Attributes:
        ends: The coefficients at t = 0 and t = 1.

    Example:
        >>> class Squared(Interpolant):
        ...     def coefficients(self, t):
        ...         return (1 - t) ** 2, t**2, torch.zeros_like(t)
        >>> [float(c) for c in Squared().derivatives(torch.tensor(0.5))]
        [-1.0, 1.0, 0.0]
    """

    ends: tuple[tuple[float, float, float], ...] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))

    @abstractmethod
    def coefficients(self, t: Tensor) -> Coefficients:
        r"""Return :math:`\alpha(t), \beta(t), \gamma(t)`, each of the shape of t.

        The ends are :math:`(1, 0, 0)` at t = 0 and :math:`(0, 1, 0)` at t = 1.
        """

    def derivatives(self, t: Tensor) -> Coefficients:
        r"""Return :math:`\dot\alpha(t), \dot\beta(t), \dot\gamma(t)`, each of the shape of t."""
        t = t.contiguous()  # forward mode cannot carry stride-0 tangents
        da, db, dg = slopes(self.coefficients, t)
        return da.to(t), db.to(t), dg.to(t)

    def is_linear(self) -> bool:
        """Return whether the path is linear in its ends, with :meth:`coefficients`.

        One that has a :meth:`sample` of its own is not, unless it says so here.
        """
        return type(self).sample is Interpolant.sample

    def has_latent(self) -> bool:
        r"""Return whether :math:`\gamma` is anything but zero."""
        return bool((self.coefficients(torch.linspace(0.0, 1.0, 9))[2] != 0).any())

    def starts_from_data(self) -> bool:
        """Return whether no draw of the base is left at t = 0, as of a mirror."""
        return self.ends[0][0] == 0

    def check_ends(self, dim: int) -> None:
        """Raise a ValueError unless the path of D-dimensional pairs joins base and data."""
        times = torch.tensor([0.0, 1.0], dtype=torch.float64)
        given: Any = self.coefficients(times)
        shapes = [tuple(c.shape) if isinstance(c, Tensor) else type(c).__name__ for c in given]
        if shapes != [(2,), (2,), (2,)]:
            raise ValueError(
                f"expected coefficients(t) of {type(self).__name__} to be three tensors of the "
                f"shape of t, (2,), torch.zeros_like(t) for no latent term, got {shapes}"
            )
        found = torch.stack(given).T
        expected = torch.tensor(self.ends, dtype=torch.float64)
        if not bool(((found - expected).abs() < 1e-6).all()):
            raise ValueError(
                f"expected coefficients {expected.tolist()} at t = 0 and t = 1, got "
                f"{found.tolist()} from {type(self).__name__}"
            )
        rates = torch.stack(self.derivatives(times)).T
        if not bool(torch.isfinite(rates).all()):
            raise ValueError(
                "expected coefficients with finite slopes at t = 0 and t = 1, got "
                f"{rates.tolist()} from {type(self).__name__}: for a root sqrt(u) that vanishes "
                f"at an end take u / sqrt(u + {_END_MARGIN:g})"
            )

    def sample(
        self, t: Tensor, x0: Tensor, x1: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Return :math:`x_t = I_t(x_0, x_1)` and its time derivative, each of shape ``(*, D)``.

        Args:
            t: Times in [0, 1], broadcastable to ``(*)``.
            x0: Base draws, shape ``(*, D)``.
            x1: Data rows, shape ``(*, D)``.
            z: Latent draws of N(0, I), shape ``(*, D)``; drawn, where there is a latent term, if
                not given.
        """
        a, b, g = (c[..., None] for c in self.coefficients(t))
        da, db, dg = (c[..., None] for c in self.derivatives(t))
        x_t, dx_t = torch.addcmul(a * x0, b, x1), torch.addcmul(da * x0, db, x1)
        if z is None and self.has_latent():
            z = torch.randn_like(x0)
        if z is not None:
            x_t, dx_t = x_t + g * z, dx_t + dg * z
        return x_t, dx_t


@dataclass(frozen=True)
class Trigonometric(Interpolant):
    r"""The paper's default, :math:`I_t = \cos(\pi t/2)\, x_0 + \sin(\pi t/2)\, x_1` (eq. 5).

    It keeps the covariance of whitened data constant: between Gaussians of equal moments the
    velocity is exactly zero.
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients of base, data and noise, each of the shape of t."""
        # pi/2 t, as a sum: in forward mode a product with a constant costs half a millisecond.
        angle = torch.add(t, t, alpha=0.5 * math.pi - 1)
        return angle.cos(), angle.sin(), torch.zeros_like(t)

    def has_latent(self) -> bool:
        """Return False."""
        return False


@dataclass(frozen=True)
class Linear(Interpolant):
    r"""The straight line, :math:`I_t = (1 - t)\, x_0 + t\, x_1` (rectified flow)."""

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients of base, data and noise, each of the shape of t."""
        return 1 - t, t, torch.zeros_like(t)

    def has_latent(self) -> bool:
        """Return False."""
        return False


@dataclass(frozen=True)
class VariancePreserving(Interpolant):
    r"""A diffusion's path, :math:`I_t = \sqrt{1 - \alpha_t}\, x_0 + \sqrt{\alpha_t}\, x_1`.

    Args:
        schedule: :math:`\alpha_t`, the share of the variance that is the data's, an increasing
            function of times of any shape with :math:`\alpha_0 = 0` and :math:`\alpha_1 = 1`;
            :math:`\sin^2(\pi t/2)` gives :class:`Trigonometric`, to within 0.002.

    A root has an infinite slope where it vanishes. With :math:`\delta = 0.004` and
    :math:`s = \delta + (1 - \delta) t` the second one is :math:`\sqrt{\alpha_s}\, t / s`, and the
    first likewise: straight at its end, and unchanged where :math:`\sqrt{\alpha_t} = t`.

    Raises:
        TypeError: If the schedule is no function.

    References:
        arXiv 2303.08797, Section 5.2; Song et al., *Score-based generative modeling through
        stochastic differential equations*, ICLR 2021.
    """

    schedule: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        """Check the schedule."""
        check_function("schedule", self.schedule, "lambda t: t**2")

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients of base, data and noise, each of the shape of t."""
        early, late = (1 - _SHARE_MARGIN) * t, _SHARE_MARGIN + (1 - _SHARE_MARGIN) * t
        base = (1 - self.schedule(early)).clamp(min=0).sqrt() * ((1 - t) / (1 - early))
        data = self.schedule(late).clamp(min=0).sqrt() * (t / late)
        return base, data, torch.zeros_like(t)


@dataclass(frozen=True)
class EncodingDecoding(Interpolant):
    r"""Base to noise, noise to data: all paths pass through N(0, I) at t = 1/2.

    :math:`\alpha = \cos^2(\pi t)` until 1/2 and :math:`\beta = \cos^2(\pi t)` after it, 0 else;
    :math:`\gamma = \sin^2(\pi t)`.

    References:
        arXiv 2303.08797, Section 3.4, Table 8.
    """

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients of base, data and noise, each of the shape of t."""
        wave, zero = torch.cos(math.pi * t) ** 2, torch.zeros_like(t)
        return (
            torch.where(t < 0.5, wave, zero),
            torch.where(t >= 0.5, wave, zero),
            torch.sin(math.pi * t) ** 2,
        )


@dataclass(frozen=True)
class BrownianBridge:
    r"""The deviation of a Brownian bridge, but for its ends, where its slope would be infinite.

    .. math:: \gamma(t) = u\,\sqrt{\frac{a}{u + 10^{-3}}} \approx \sqrt{a u}, \qquad u = t (1 - t)

    Args:
        scale: :math:`a > 0`, in whitened units squared.

    Raises:
        ValueError: If it is not positive.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the scale."""
        check_ranges(number("scale > 0", self.scale, lambda n: n > 0))

    def __call__(self, t: Tensor) -> Tensor:
        """Return the deviation, of the shape of t."""
        u = t * (1 - t)
        u = torch.where(u < 0, 0.0, u)  # with its slope at 0, unlike clamp of torch 2.15
        return u * (self.scale / (u + _END_MARGIN)).sqrt()


@dataclass(frozen=True)
class SineSquared:
    r"""A smooth deviation, :math:`\gamma(t) = a \sin^2(\pi t)`.

    Args:
        scale: :math:`a > 0`, in whitened units.

    Raises:
        ValueError: If it is not positive.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the scale."""
        check_ranges(number("scale > 0", self.scale, lambda n: n > 0))

    def __call__(self, t: Tensor) -> Tensor:
        """Return the deviation, of the shape of t."""
        return self.scale * torch.sin(math.pi * t) ** 2


@dataclass(frozen=True)
class Latent(Interpolant):
    r"""Another interpolant with a latent term, :math:`I_t(x_0, x_1) + \gamma(t) z`.

    Args:
        interpolant: A linear interpolant without one.
        gamma: :math:`\gamma`, a function of times of any shape that vanishes at both ends, with
            slopes that are finite there.

    Raises:
        TypeError: If the interpolant is none, or gamma no function.
        ValueError: If the interpolant has a latent term, or is not linear.

    References:
        arXiv 2303.08797, Definition 1 and Section 3.
    """

    interpolant: Interpolant = field(default_factory=Linear)
    gamma: Callable[[Tensor], Tensor] = field(default_factory=SineSquared)

    def __post_init__(self) -> None:
        """Check both."""
        if not isinstance(self.interpolant, Interpolant):
            raise TypeError(f"expected an interpolant, such as Linear(), got {self.interpolant!r}")
        check_function("gamma", self.gamma, "SineSquared()")
        if self.interpolant.has_latent():
            raise ValueError(
                "expected an interpolant without a latent term, which would be left out, got "
                f"{self.interpolant}: give Latent the one gamma, and the path that it is added to"
            )
        if not self.interpolant.is_linear():
            raise ValueError(
                "expected an interpolant that is its coefficients, to which a latent term is "
                f"added, got {self.interpolant}, whose path is another"
            )

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

    Raises:
        TypeError: If it is no function.

    References:
        arXiv 2303.08797, Section 3.3.
    """

    gamma: Callable[[Tensor], Tensor] = field(default_factory=SineSquared)

    ends = ((0.0, 1.0, 0.0), (0.0, 1.0, 0.0))

    def __post_init__(self) -> None:
        """Check the function."""
        check_function("gamma", self.gamma, "SineSquared()")

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients of base, data and noise, each of the shape of t."""
        return torch.zeros_like(t), torch.ones_like(t), self.gamma(t)
