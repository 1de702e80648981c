r"""The objective: a quadratic regression whose minimiser is the velocity."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .distributions import ConditionalInterpolantDistribution, InterpolantDistribution
from .divergence import evaluate
from .interpolants import Interpolant
from .networks import VelocityMLP

__all__ = ["Points", "interpolant_loss", "path_points", "regression_loss"]


class Points(NamedTuple):
    """Points of paths and what the network is to match there.

    Attributes:
        t: Times, broadcastable to ``(*)``.
        w: Points, shape ``(*, D)``.
        target: Rates of the paths, or the noise, shape ``(*, D)``.
        context: Contexts, shape ``(*, C)``, or None.
    """

    t: Tensor
    w: Tensor
    target: Tensor
    context: Tensor | None

    def at(self, i: int) -> "Points":
        """Return those at one index of the first dimension."""
        return Points(*(None if part is None else part[i] for part in self))  # type: ignore[arg-type]


def path_points(
    interpolant: Interpolant,
    t: Tensor,
    w0: Tensor,
    w1: Tensor,
    context: Tensor | None = None,
    z: Tensor | None = None,
    *,
    of_noise: bool = False,
) -> tuple[Points, ...]:
    r"""Return points of the paths between pairs: one set, or one for z and one for -z.

    The mean over both has a finite variance where the slope of :math:`\gamma` is not finite.

    Args:
        interpolant: The path between pairs.
        t: Times in [0, 1], broadcastable to ``(*)``.
        w0: Whitened base draws, shape ``(*, D)``.
        w1: Whitened data, shape ``(*, D)``.
        context: Contexts, shape ``(*, C)``, or None.
        z: Latent draws, shape ``(*, D)``; drawn, where there is a latent term, if not given.
        of_noise: Whether the network is to learn :math:`E[z \mid I_t]` instead of the velocity.

    References:
        arXiv 2303.08797, Section 6.1 (antithetic draws).
    """
    if z is None and interpolant.has_latent():
        z = torch.randn_like(w0)
    if z is None:
        return (Points(t, *interpolant.sample(t, w0, w1), context),)
    found = []
    for s in (z, -z):
        w_t, dw_t = interpolant.sample(t, w0, w1, s)
        found.append(Points(t, w_t, s if of_noise else dw_t, context))
    return tuple(found)


def regression_loss(
    velocity: nn.Module, points: tuple[Points, ...], metric: Tensor | None = None
) -> Tensor:
    r"""Return :math:`|v_t(I_t)|^2 - 2\,\partial_t I_t \cdot v_t(I_t)` in whitened coordinates.

    Args:
        velocity: The network.
        points: Sets of points, over which the mean is taken.
        metric: A map L, shape ``(D, D)``: norms are then :math:`|L u|`.

    Returns:
        The loss of each row, shape ``(*)``.

    References:
        arXiv 2209.15571, eq. 10.
    """
    losses = [_row_loss(velocity, *part, metric) for part in points]
    return losses[0] if len(losses) == 1 else 0.5 * (losses[0] + losses[1])


def _row_loss(
    network: nn.Module,
    t: Tensor,
    w: Tensor,
    target: Tensor,
    context: Tensor | None,
    metric: Tensor | None,
) -> Tensor:
    """Return ``|n|^2 - 2 target . n``, whose minimiser is the target's mean given t and w."""
    # The default network computes its time embedding once per distinct time it is given.
    if isinstance(network, VelocityMLP):
        n = network(t, w, context)
    else:
        n = evaluate(network, t, w, context)
    if metric is not None:
        n, target = n @ metric.T, target @ metric.T
    return (n * torch.sub(n, target, alpha=2)).sum(-1)


def interpolant_loss(
    distribution: InterpolantDistribution | ConditionalInterpolantDistribution,
    x1: Tensor,
    *,
    x0: Tensor | None = None,
    t: Tensor | None = None,
    context: Tensor | None = None,
) -> Tensor:
    r"""Return the paper's objective, one value per row, for a training loop of your own.

    :math:`G(v) = E[|v_t(I_t)|^2 - 2\,\partial_t I_t \cdot v_t(I_t)]`, in whitened units: its
    minimum over v is :math:`-E|v^\star|^2`, so values are negative where something has been
    learned, and only differences matter. No ODE is solved.

    Args:
        distribution: The flow to train; its whitening map is used as it is.
        x1: Data, shape ``(*, *event_shape)``.
        x0: Base draws paired with them: data coordinates for a given base, :math:`N(0, I)` draws
            in whitened coordinates for the default one; shape ``(*, D)``. Drawn if not given.
        t: Times in [0, 1], broadcastable to ``(*)``. Drawn uniformly, one per row, if not given.
        context: Contexts, shape ``(*, C)``, for a conditional flow.

    Returns:
        The loss of each row, shape ``(*)``, differentiable in the weights.

    References:
        arXiv 2209.15571, eq. 10.
    """
    transform: Any = distribution.transform
    flow = getattr(transform, "flow", transform)
    if context is None:
        context = getattr(transform, "context", None)
    w1 = flow.to_white(distribution.to_flow(x1))
    if x0 is None:
        base = distribution.base
        x0 = torch.randn_like(w1) if base is None else base.sample(w1.shape[:-1])
    w0 = x0 if distribution.base is None else flow.to_white(x0)
    if t is None:
        t = torch.rand(w1.shape[:-1], dtype=w1.dtype, device=w1.device)
    return regression_loss(flow.velocity, path_points(flow.interpolant, t, w0, w1, context))
