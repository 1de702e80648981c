r"""Velocity, score, denoiser and noise of a linear interpolant: any one gives the others.

With a base :math:`N(0, I)` independent of the data, :math:`x_t = \alpha x_0 + \beta x_1 + \gamma z
= \sigma n + \beta x_1` with :math:`n \sim N(0, I)` and :math:`\sigma^2 = \alpha^2 + \gamma^2`.
Write S for the score :math:`\nabla\log\rho_t` and d for the denoiser :math:`E[x_1 | x_t]`. By
Gaussian integration by parts :math:`E[n | x_t] = -\sigma S`, so that

.. math:: x = -\sigma^2 S + \beta d, \qquad v = -\sigma\dot\sigma S + \dot\beta d.

Two linear equations: with :math:`\Delta = \dot\beta\sigma^2 - \beta\sigma\dot\sigma`,

.. math:: S = (\beta v - \dot\beta x) / \Delta, \qquad d = (\sigma^2 v - \sigma\dot\sigma x) /
          \Delta.

:math:`\Delta` is :math:`\sigma^2\beta` times the slope of :math:`\log(\beta / \sigma)`. Where the
ratio of data to noise does not change, as at t = 1 where no noise is left, it is zero and the
velocity determines neither. Where :math:`\beta = \dot\beta = 0`, :math:`S = -x/\sigma^2`.

All of it in whitened coordinates; :mod:`~pyro_interpolant.diffusion.scores` has the same of a
distribution, in data coordinates.

References:
    Albergo, Boffi & Vanden-Eijnden, arXiv 2303.08797, Sections 3.2 and 4.4.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

from .._torch import innermost, is_tracing
from ..interpolants.linear import Interpolant
from ..solvers.ode import FixedGrid

Time = Tensor | float

SCORE_INSTEAD = "another, or the gradient of a density, distribution.at(t).score(x)"
_LATER = "a later one"
_WARP = 0.6  # of paths' nodes: steps at the data end are a quarter of those at the base end
# A score counts as lost where Delta is below this many times its rounding: there a score of the
# encoding-decoding path in float32 is off by 6%, and at a sixteenth of that Delta by 270%.
_LOST = 32


class Conversion:
    r"""Velocity, score, denoiser and noise at some states, shape ``(*, D)``, given one of them.

    Each of the others is computed when it is first asked for, and raises a ValueError if what is
    given does not determine it at one of the times. Made by :func:`convert`.
    """

    def __init__(
        self, interpolant: Interpolant, t: Time, x: Tensor, given: str, value: Tensor
    ) -> None:
        if value.shape[-1:] != x.shape[-1:]:  # one column would be that of all
            raise ValueError(
                f"expected a {given} of as many columns as states of shape {tuple(x.shape)}, got "
                f"shape {tuple(value.shape)}"
            )
        self._given, self._x, self._t = given, x, checked_times(t, x)
        self._terms = [c[..., None] for c in noise_and_data(interpolant, self._t)]
        self.__dict__[given] = value  # found before the property of that name, which is not run

    @cached_property
    def velocity(self) -> Tensor:
        r"""The velocity :math:`(\dot\beta x + \Delta S) / \beta`.

        Not where :math:`\beta = 0`, as at t = 0; where :math:`\dot\beta = 0` too it is
        :math:`-\sigma\dot\sigma S`. Of the denoiser it is :math:`\dot\beta d + \dot\sigma
        E[n | x_t]`.
        """
        x, (b, db, square, half) = self._x, self._terms
        if self._given == "denoiser":  # without the score, which is lost in rounding far earlier
            return db * self.denoiser + self.noise * half / square.sqrt()
        no_data, no_slope = b.abs() <= roundoff(x), db.abs() <= roundoff(x)
        raise_if_singular(no_data & ~no_slope, self._t, "the path depends on the data", _LATER)
        both = (db * x + (db * square - b * half) * self.score) / torch.where(no_data, 1, b)
        return torch.where(no_data, -half * self.score, both)

    @cached_property
    def score(self) -> Tensor:
        r"""The score :math:`(\beta v - \dot\beta x) / \Delta`.

        Not where :math:`\Delta = 0`, as at t = 1. Of the noise it is :math:`-E[n | x_t] /
        \sigma`, not where :math:`\sigma = 0`; of the denoiser :math:`(\beta d - x) / \sigma^2`,
        not where :math:`\sigma^2` is as small as the rounding of the state.
        """
        x, square = self._x, self._terms[2]
        if self._given == "velocity":
            p, q, divisor = score_terms(*self._terms)
            needed = "the velocity determines the score"
            lost = divisor.abs() <= _LOST * roundoff(x)
            raise_if_singular(lost, self._t, needed, SCORE_INSTEAD)
            return (p * self.velocity + q * x) / divisor
        if self._given == "noise":
            raise_if_singular(square <= roundoff(x) ** 2, self._t, "there is noise", SCORE_INSTEAD)
        else:  # off by up to 6%, in single precision
            needed = "the denoiser determines the score"
            raise_if_singular(square <= roundoff(x), self._t, needed, SCORE_INSTEAD)
        return -self.noise / square.sqrt()

    @cached_property
    def denoiser(self) -> Tensor:
        r"""The denoiser :math:`(\sigma^2 v - \sigma\dot\sigma x) / \Delta`.

        Of the velocity it exists at both ends: the mean of the data at t = 0, x itself at t = 1.
        Of the score :math:`(x + \sigma^2 S) / \beta`, Tweedie's formula; not where
        :math:`\beta = 0`, as at t = 0.
        """
        x, (b, db, square, half) = self._x, self._terms
        if self._given == "velocity":
            # Over sigma, which is small near the data: both terms would vanish with its square.
            sd = square.sqrt()
            slope = half / sd.where(sd > 0, 1)
            bottom = db * sd - b * slope
            no_noise = (sd == 0) | ((sd <= roundoff(x)) & (bottom.abs() <= roundoff(x)))
            no_noise &= b.abs() > roundoff(x)
            top = torch.where(no_noise, x, sd * self.velocity - slope * x)
            bottom = torch.where(no_noise, b, bottom)
            needed = "the velocity determines the denoiser"
            raise_if_singular(bottom.abs() <= roundoff(x), self._t, needed, "another")
            return top / bottom
        needed = "the state depends on the data"
        raise_if_singular(b.abs() <= roundoff(x), self._t, needed, _LATER)
        if self._given == "noise":
            return (x - square.sqrt() * self.noise) / b
        return (x + square * self.score) / b

    @cached_property
    def noise(self) -> Tensor:
        r"""The noise :math:`-\sigma S`; its latent part is :math:`E[z | x_t] = -\gamma S`.

        Of the denoiser it is :math:`(x - \beta d) / \sigma`; not where :math:`\sigma = 0`.
        """
        x, (b, _, square, _) = self._x, self._terms
        if self._given == "denoiser":
            raise_if_singular(square <= roundoff(x) ** 2, self._t, "there is noise", SCORE_INSTEAD)
            return (x - b * self.denoiser) / square.sqrt()
        return -square.sqrt() * self.score


def convert(
    interpolant: Interpolant,
    t: Time,
    x: Tensor,
    *,
    velocity: Tensor | None = None,
    score: Tensor | None = None,
    denoiser: Tensor | None = None,
    noise: Tensor | None = None,
) -> Conversion:
    r"""Return velocity, score, denoiser and noise of a linear interpolant, given one of them.

    Args:
        interpolant: A member of the linear family.
        t: Times in [0, 1], broadcastable to ``(*)``.
        x: States, shape ``(*, D)``, whitened, as is all else.
        velocity: :math:`v_t(x)`, shape ``(*, D)``.
        score: :math:`\nabla\log\rho_t(x)`, shape ``(*, D)``.
        denoiser: :math:`E[x_1 | x_t = x]`, shape ``(*, D)``.
        noise: :math:`E[n | x_t = x]`, shape ``(*, D)``.

    Returns:
        An object with these four as attributes, each of shape ``(*, D)``.

    Raises:
        ValueError: If not exactly one of the four is given, or one of other columns than states,
            the interpolant is not linear, or a time is outside [0, 1]; from an attribute, if it is
            not determined at one of the times: the score of the velocity at t = 1, the denoiser
            and velocity of the score at t = 0.

    References:
        arXiv 2303.08797, Sections 3.2 and 4.4; Efron, *Tweedie's formula and selection bias*,
        JASA 106 (2011).

    Example:
        >>> x = torch.randn(5, 2)  # from N(0, I) to N(0, I): the velocity is zero
        >>> s = convert(Trigonometric(), 0.3, x, velocity=torch.zeros(5, 2)).score
        >>> bool(torch.allclose(s, -x))
        True
    """
    forms = {"velocity": velocity, "score": score, "denoiser": denoiser, "noise": noise}
    given = {name: value for name, value in forms.items() if value is not None}
    if len(given) != 1:
        names = " and ".join(given) or "none"
        raise ValueError(f"expected one of velocity, score, denoiser and noise, got {names}")
    return Conversion(interpolant, t, x, *given.popitem())


def score_terms(
    b: Tensor, db: Tensor, square: Tensor, half: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return p, q and :math:`\Delta` of :func:`noise_and_data`: the score is (p v + q x) / Delta.

    Where :math:`\beta = \dot\beta = 0` they are :math:`0, -1, \sigma^2`.
    """
    no_data = (b.abs() <= roundoff(b)) & (db.abs() <= roundoff(b))
    divisor = torch.where(no_data, square, db * square - b * half)
    return torch.where(no_data, 0, b), torch.where(no_data, -1, -db), divisor


def noise_and_data(interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Return :math:`\beta, \dot\beta, \sigma^2, \sigma\dot\sigma`, each of the shape of t.

    Raises:
        ValueError: If the interpolant is not linear.
    """
    check_linear(interpolant)
    (a, b, g), (da, db, dg) = interpolant.coefficients(t), interpolant.derivatives(t)
    return b, db, a * a + g * g, a * da + g * dg


def check_linear(interpolant: Interpolant) -> None:
    """Raise a ValueError unless the path is linear in its ends."""
    if not interpolant.is_linear():
        raise ValueError(
            f"expected a linear interpolant, got {type(interpolant).__name__}: a velocity gives "
            "the score where the path is a sum of Gaussian noise and data. "
            "distribution.at(t).score(x) is the gradient of the log-density"
        )


def checked_times(t: Time, x: Tensor) -> Tensor:
    """Return times as a tensor of their own shape, in the type and on the device of x.

    Raises:
        ValueError: If one is outside [0, 1].
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    values = innermost(t)  # all that vmap goes through
    if not is_tracing() and not bool(((values >= 0) & (values <= 1)).all()):
        least, most = float(values.min()), float(values.max())
        raise ValueError(f"expected times in [0, 1], got {least} to {most}")
    return t


def path_times(steps: int, end: float = 1.0) -> Tensor:
    """Return times from 0 to an end, in steps that shorten toward both, float64, ``(steps + 1,)``.

    Raises:
        ValueError: If there is no step.
    """
    return end * FixedGrid(steps, warp=_WARP).grid()[0]


def roundoff(x: Tensor) -> float:
    """Return 8 eps of the type of x, of any shape: a coefficient below it counts as zero."""
    return 8 * torch.finfo(x.dtype).eps


def raise_if_singular(singular: Tensor, t: Tensor, needed: str, instead: str) -> None:
    """Raise a ValueError that names the first singular time, if any of ``(*, 1)`` is."""
    if is_tracing():
        return
    found = innermost(t.where(singular[..., 0], math.nan))  # all that vmap goes through
    found = found[~found.isnan()]
    if found.numel():
        first = float(found[0])
        raise ValueError(f"expected times at which {needed}, got t = {first:g}: take {instead}")
