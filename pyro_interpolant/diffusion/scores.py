r"""The score and the denoiser of a flow, in data coordinates.

With :math:`y = \mathrm{loc} + L w` the score is :math:`L^{-T} S(w)` and the denoiser
:math:`\mathrm{loc} + L\, d(w)`, of whitened states. S and d follow from the velocity where base
and data are independent and the base is N(0, I); a flow that learned the noise of a latent term
has :math:`S = -E[z | x_t] / \gamma` for any base and coupling.

References:
    Albergo, Boffi & Vanden-Eijnden, arXiv 2303.08797, Sections 3.2 and 4.4.
"""

import torch
from torch import Tensor, where

from .._torch import broadcast_shapes
from ..distributions.interpolant import InterpolantDistribution, check_has_context
from ..nn.velocity import evaluate
from ..transforms.gaussianize import Gaussianized, refuse_gaussianized
from ..transforms.interpolant import InterpolantTransform
from .conversions import (
    SCORE_INSTEAD,
    Time,
    check_linear,
    checked_times,
    convert,
    raise_if_singular,
    roundoff,
)


def score(distribution: InterpolantDistribution, t: Time, x: Tensor) -> Tensor:
    r"""Return :math:`\nabla\log\rho_t(x)`, shape ``(*, D)``, from the velocity: no ODE is solved.

    At t = 1 there is no noise left, and the velocity does not determine the score. There, or to be
    exact for the solver, take ``distribution.at(t).score(x)``, the gradient of the log-density. A
    flow that learned the noise of a latent term uses :math:`-E[z | x_t] / \gamma` instead.

    Args:
        distribution: A trained flow; a conditional one with its context.
        t: Times in [0, 1], broadcastable with ``(*)``.
        x: States at time t, shape ``(*, D)``, in data coordinates; under a support, in its
            unconstrained space, where ``distribution.unconstrained(x)`` takes values. The score
            is that of the density there.

    Raises:
        TypeError: If the distribution is conditional and lacks its context, or states are no
            tensor.
        ValueError: If the score does not follow from what was learned: another base, a coupling
            that is not independent, a non-linear interpolant; or not at this time.

    References:
        arXiv 2303.08797, Section 4.4.

    Example:
        >>> prior = InterpolantDistribution(interpolant_transform(2))  # untrained: N(0, I)
        >>> x = torch.randn(5, 2)
        >>> bool(torch.allclose(score(prior, 0.5, x), -x, atol=1e-6))
        True
    """
    transform, support = transform_with_score(distribution), distribution.constraint
    if not isinstance(support, Gaussianized):
        return _flow_score(transform, t, x)
    gaussianizer, x = support.gaussianizer, transform._checked(x)
    own = () if transform.context is None else transform.context.shape[:-1]
    x = x.expand(*broadcast_shapes(checked_times(t, x).shape, x.shape[:-1], own), -1)
    log_det_score = torch.func.grad(lambda y: -gaussianizer.log_abs_det_jacobian(y, y).sum())(x)
    u, pullback, *_ = torch.func.vjp(gaussianizer._inverse, x)
    return pullback(_flow_score(transform, t, u))[0] + log_det_score


def _flow_score(transform: InterpolantTransform, t: Time, x: Tensor) -> Tensor:
    """Return the score of the flow before any map of its support, shape ``(*, D)``."""
    time, w = _prepared(transform, t, x)
    noise = transform.flow.noise
    if noise is None:
        v = evaluate(transform.flow.velocity, time, w, transform.context)
        white = convert(transform.interpolant, time, w, velocity=v).score
    else:
        gamma = transform.interpolant.coefficients(time)[2][..., None]
        raise_if_singular(gamma.abs() <= roundoff(w), time, "gamma is positive", SCORE_INSTEAD)
        white = -evaluate(noise, time, w, transform.context) / gamma
    return transform.flow.whitening.pull(white)


def denoiser(distribution: InterpolantDistribution, t: Time, x: Tensor) -> Tensor:
    r"""Return :math:`E[x_1 | x_t = x]`, the data expected at the end of the path, ``(*, D)``.

    Args:
        distribution: A trained flow; a conditional one with its context.
        t: Times in [0, 1], broadcastable with ``(*)``.
        x: States at time t, shape ``(*, D)``, in data coordinates; under a support, they and the
            result are in its unconstrained space, as in :func:`score`.

    Raises:
        TypeError: As in :func:`score`.
        ValueError: As in :func:`score`; or if the flow is behind a map of :func:`from_samples`.
    """
    transform = transform_with_score(distribution)
    time, w = _prepared(transform, t, x)
    refuse_gaussianized(distribution.constraint, "the mean of what a path leads to")
    interpolant, noise = transform.interpolant, transform.flow.noise
    to_data = transform.flow.whitening.from_white
    v = evaluate(transform.flow.velocity, time, w, transform.context)
    if noise is None:
        return to_data(convert(interpolant, time, w, velocity=v).denoiser)
    # Any base: x and v less their noise are two equations for the means of x0 and x1.
    z = evaluate(noise, time, w, transform.context)
    a, b, g = (c[..., None] for c in interpolant.coefficients(time))
    da, db, dg = (c[..., None] for c in interpolant.derivatives(time))
    state, slope = w - g * z, v - dg * z
    # Where there is no x0, the first alone is solved.
    no_base = (a.abs() <= roundoff(w)) & (da.abs() <= roundoff(w))
    bottom = where(no_base, b, a * db - da * b)
    needed = "the path depends on the data"
    raise_if_singular(bottom.abs() <= roundoff(w), time, needed, "another")
    return to_data(where(no_base, state, a * slope - da * state) / bottom)


def transform_with_score(distribution: InterpolantDistribution) -> InterpolantTransform:
    """Return the transform of a flow of which a score is known.

    Raises:
        TypeError: If the distribution is conditional and lacks its context.
        ValueError: If the score does not follow from what was learned.
    """
    check_has_context(distribution)
    transform = distribution.transform
    check_linear(transform.interpolant)
    if transform.flow.was_trained_through_solver():
        raise ValueError(
            "expected a velocity trained by regression, got weights that were trained through the "
            "solver, as SVI and maximum likelihood do: they move draws, but no score follows from "
            "them. Fit a flow to these draws, fit(new, distribution.sample((N,)))"
        )
    if transform.flow.noise is not None or transform.interpolant.starts_from_data():
        return transform  # no condition on the base: its score is not used
    instead = "use an interpolant with a latent term and fit(..., learn='noise')"
    if distribution.base is not None:
        raise ValueError(
            "expected the default base: the score follows from the velocity where the base is "
            f"N(0, I), got {type(distribution.base).__name__}; {instead}"
        )
    if not transform.flow.independent:
        raise ValueError(
            "expected a flow trained with the independent coupling: the score does not follow "
            f"from the velocity where base and data are paired; {instead}"
        )
    return transform


def _prepared(transform: InterpolantTransform, t: Time, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the times, and whitened states of the batch of states and times."""
    w = transform.flow.whitening.to_white(transform._checked(x))
    times = checked_times(t, w)
    return times, w.expand(*broadcast_shapes(times.shape, w.shape[:-1]), -1)
