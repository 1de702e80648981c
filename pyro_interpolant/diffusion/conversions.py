r"""Velocity, score, denoiser and noise of a linear interpolant: any one gives the others.

With a base :math:`N(0, I)` independent of the data, :math:`x_t = \alpha x_0 + \beta x_1 + \gamma z
= \sigma n + \beta x_1` with :math:`n \sim N(0, I)` and :math:`\sigma^2 = \alpha^2 + \gamma^2`.
Write S for the score :math:`\nabla\log\rho_t` and d for the denoiser :math:`E[x_1 | x_t]`. By
Gaussian integration by parts :math:`E[n | x_t] = -\sigma S`, so that

.. math:: x = -\sigma^2 S + \beta d, \qquad v = -\sigma\dot\sigma S + \dot\beta d.

Two linear equations: with :math:`\Delta = \dot\beta\sigma^2 - \beta\sigma\dot\sigma`,

.. math:: S = (\beta v - \dot\beta x) / \Delta, \qquad d = (\sigma^2 v - \sigma\dot\sigma x) /
          \Delta.

:math:`\Delta` is :math:`\sigma^2\beta` times the slope of :math:`\log(\beta / \sigma)`: where data
do not gain on noise, as at t = 1 where there is no noise left, the velocity does not tell them
apart. Where :math:`\beta = \dot\beta = 0`, :math:`S = -x/\sigma^2`.

All of it in whitened coordinates; :mod:`~pyro_interpolant.scores` has the same of a distribution.

References:
    Albergo, Boffi & Vanden-Eijnden, arXiv 2303.08797, Sections 3.2 and 4.4.
"""

import torch
from torch import Tensor

from ..interpolants.linear import Interpolant

__all__ = [
    "Time",
    "check_linear",
    "checked_times",
    "denoiser_to_score",
    "noise_to_score",
    "refuse",
    "score_terms",
    "score_to_denoiser",
    "score_to_noise",
    "score_to_velocity",
    "tiny",
    "velocity_to_denoiser",
    "velocity_to_score",
]


Time = Tensor | float

INSTEAD = "another, or the gradient of a density, distribution.at(t).score(x)"


def velocity_to_score(interpolant: Interpolant, t: Time, x: Tensor, v: Tensor) -> Tensor:
    r"""Return the score :math:`(\beta v - \dot\beta x) / \Delta`, shape ``(*, D)``.

    Args:
        interpolant: A member of the linear family.
        t: Times in [0, 1], broadcastable to ``(*)``.
        x: States, shape ``(*, D)``, whitened, as is all below.
        v: The velocity there, shape ``(*, D)``.

    Raises:
        ValueError: If the interpolant is not linear, a time is outside [0, 1], or it is one where
            the velocity does not determine the score.

    Example:
        >>> x = torch.randn(5, 2)  # from N(0, I) to N(0, I): the velocity is zero
        >>> s = velocity_to_score(Trigonometric(), 0.3, x, torch.zeros(5, 2))
        >>> bool(torch.allclose(s, -x))
        True
    """
    t = checked_times(t, x)
    p, q, divisor = (c[..., None] for c in score_terms(interpolant, t))
    refuse(divisor.abs() <= tiny(x), t, "the velocity determines the score", INSTEAD)
    return (p * v + q * x) / divisor


def score_to_velocity(interpolant: Interpolant, t: Time, x: Tensor, score: Tensor) -> Tensor:
    r"""Return the velocity :math:`(\dot\beta x + \Delta S) / \beta`, shape ``(*, D)``.

    Where :math:`\beta = \dot\beta = 0` it is :math:`-\sigma\dot\sigma S`.

    Args:
        interpolant: A member of the linear family.
        t: Times in [0, 1], broadcastable to ``(*)``.
        x: States, shape ``(*, D)``.
        score: The score there, shape ``(*, D)``.

    Raises:
        ValueError: If the interpolant is not linear, a time is outside [0, 1], or it is one where
            the score says nothing of the data, as at t = 0.
    """
    t = checked_times(t, x)
    b, db, square, half = (c[..., None] for c in _terms(interpolant, t))
    apart, still = b.abs() <= tiny(x), db.abs() <= tiny(x)
    refuse(apart & ~still, t, "the path depends on the data", "a later one")
    delta = db * square - b * half
    return torch.where(apart, -half * score, (db * x + delta * score) / torch.where(apart, 1, b))


def velocity_to_denoiser(interpolant: Interpolant, t: Time, x: Tensor, v: Tensor) -> Tensor:
    r"""Return :math:`E[x_1 | x_t = x] = (\sigma^2 v - \sigma\dot\sigma x) / \Delta`, ``(*, D)``.

    Unlike the score it exists at both ends: the mean of the data at t = 0, x itself at t = 1.

    Args:
        interpolant: A member of the linear family.
        t: Times in [0, 1], broadcastable to ``(*)``.
        x: States, shape ``(*, D)``.
        v: The velocity there, shape ``(*, D)``.

    Raises:
        ValueError: If the interpolant is not linear, a time is outside [0, 1], or it is one where
            the velocity does not determine the denoiser.
    """
    t = checked_times(t, x)
    b, db, square, half = (c[..., None] for c in _terms(interpolant, t))
    clear = (square <= tiny(x)) & (b.abs() > tiny(x))  # no noise left: x is beta x1
    top = torch.where(clear, x, square * v - half * x)
    bottom = torch.where(clear, b, db * square - b * half)
    refuse(bottom.abs() <= tiny(x), t, "the velocity determines the denoiser", "another")
    return top / bottom


def score_to_denoiser(interpolant: Interpolant, t: Time, x: Tensor, score: Tensor) -> Tensor:
    r"""Return :math:`E[x_1 | x_t = x] = (x + \sigma^2 S) / \beta`, shape ``(*, D)``.

    Args:
        interpolant: A member of the linear family.
        t: Times in [0, 1], broadcastable to ``(*)``.
        x: States, shape ``(*, D)``.
        score: The score there, shape ``(*, D)``.

    Raises:
        ValueError: If the interpolant is not linear, a time is outside [0, 1], or it is one where
            the state says nothing of the data, as at t = 0.

    References:
        Efron, *Tweedie's formula and selection bias*, JASA 106 (2011).
    """
    t = checked_times(t, x)
    b, _, square, _ = (c[..., None] for c in _terms(interpolant, t))
    refuse(b.abs() <= tiny(x), t, "the state depends on the data", "a later one")
    return (x + square * score) / b


def denoiser_to_score(interpolant: Interpolant, t: Time, x: Tensor, denoised: Tensor) -> Tensor:
    r"""Return the score :math:`(\beta d - x) / \sigma^2`, shape ``(*, D)``.

    Args:
        interpolant: A member of the linear family.
        t: Times in [0, 1], broadcastable to ``(*)``.
        x: States, shape ``(*, D)``.
        denoised: :math:`d = E[x_1 | x_t = x]`, shape ``(*, D)``.

    Raises:
        ValueError: If the interpolant is not linear, a time is outside [0, 1], or it is one
            without noise, as t = 1.
    """
    t = checked_times(t, x)
    b, _, square, _ = (c[..., None] for c in _terms(interpolant, t))
    refuse(square <= tiny(x) ** 2, t, "there is noise", INSTEAD)
    return (b * denoised - x) / square


def score_to_noise(interpolant: Interpolant, t: Time, score: Tensor) -> Tensor:
    r"""Return :math:`E[n | x_t] = -\sigma S`, the noise in the state, shape ``(*, D)``.

    The latent part of it is :math:`E[z | x_t] = -\gamma S`.

    Args:
        interpolant: A member of the linear family.
        t: Times in [0, 1], broadcastable to ``(*)``.
        score: The score, shape ``(*, D)``.

    Raises:
        ValueError: If the interpolant is not linear or a time is outside [0, 1].
    """
    return -_terms(interpolant, checked_times(t, score))[2].sqrt()[..., None] * score


def noise_to_score(interpolant: Interpolant, t: Time, noise: Tensor) -> Tensor:
    r"""Return the score :math:`-E[n | x_t] / \sigma`, shape ``(*, D)``.

    Args:
        interpolant: A member of the linear family.
        t: Times in [0, 1], broadcastable to ``(*)``.
        noise: :math:`E[n | x_t]`, shape ``(*, D)``.

    Raises:
        ValueError: If the interpolant is not linear, a time is outside [0, 1], or it is one
            without noise, as t = 1.
    """
    t = checked_times(t, noise)
    square = _terms(interpolant, t)[2][..., None]
    refuse(square <= tiny(noise) ** 2, t, "there is noise", INSTEAD)
    return -noise / square.sqrt()


def score_terms(interpolant: Interpolant, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return p, q and :math:`\Delta`, each of the shape of t: the score is (p v + q x) / Delta.

    Where :math:`\beta = \dot\beta = 0` they are :math:`0, -1, \sigma^2`.

    Raises:
        ValueError: If the interpolant is not linear.
    """
    b, db, square, half = _terms(interpolant, t)
    free = (b.abs() <= tiny(t)) & (db.abs() <= tiny(t))
    delta = torch.where(free, square, db * square - b * half)
    return torch.where(free, 0, b), torch.where(free, -1, -db), delta


def _terms(interpolant: Interpolant, t: Tensor) -> tuple[Tensor, ...]:
    r"""Return :math:`\beta, \dot\beta, \sigma^2, \sigma\dot\sigma`, each of the shape of t."""
    check_linear(interpolant)
    (a, b, g), (da, db, dg) = interpolant.coefficients(t), interpolant.derivatives(t)
    # Slopes are those of the loss, which takes them inside the interior: so is the velocity.
    return b, db, a * a + g * g, a * da + g * dg


def check_linear(interpolant: Interpolant) -> None:
    """Raise a ValueError unless the path is linear in its ends."""
    try:
        interpolant.coefficients(torch.tensor(0.5))
    except TypeError as error:
        raise ValueError(
            f"expected a linear interpolant, got {type(interpolant).__name__}: a velocity gives "
            "the score where the path is a sum of Gaussian noise and data. "
            "distribution.at(t).score(x) is the gradient of the log-density"
        ) from error


def checked_times(t: Time, x: Tensor) -> Tensor:
    """Return times as a tensor of their own shape, in the type and on the device of x.

    Raises:
        ValueError: If one is outside [0, 1].
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"expected times in [0, 1], got {float(t.min())} to {float(t.max())}")
    return t


def tiny(x: Tensor) -> float:
    """Return what cannot be told from zero in the type of a tensor of any shape."""
    return 8 * torch.finfo(x.dtype).eps


def refuse(singular: Tensor, t: Tensor, wanted: str, instead: str) -> None:
    """Raise a ValueError that names the first singular time, if any of ``(*, 1)`` is."""
    if bool(singular.any()):
        first = float(t.expand(singular.shape[:-1])[singular[..., 0]].flatten()[0])
        raise ValueError(f"expected times at which {wanted}, got t = {first:g}: take {instead}")
