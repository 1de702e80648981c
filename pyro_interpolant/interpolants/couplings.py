r"""Couplings: which base draw is paired with which row of a batch of data.

A coupling is a function :math:`(x_0, x_1) \mapsto x_{0,\pi}` that reorders the base draws of a
batch; training then regresses on paths from :math:`x_{0,\pi(i)}` to :math:`x_{1,i}`. Independent
pairs, :math:`\pi = 1`, are the product coupling of the paper; those of the smallest total squared
distance make paths straighter. Where contexts are labels of classes, training gives a coupling the
rows of one label at a time.
"""

import torch
from torch import Tensor

from .._torch import robust_deviation
from .nonlinear import wrap

_CONTEXT_WEIGHT = 10.0  # of squared distances between contexts in the cost


def independent(x0: Tensor, x1: Tensor, context: Tensor | None = None) -> Tensor:
    """Return the base draws as they came: the product coupling of the paper.

    Args:
        x0: Base draws, shape ``(N, D)``.
        x1: Data rows, shape ``(N, D)``.
        context: Contexts of the data rows, shape ``(N, C)``, or None. Unused.

    Returns:
        The partners of ``x1``, shape ``(N, D)``.
    """
    return x0


def optimal_transport(
    x0: Tensor, x1: Tensor, context: Tensor | None = None, *, on_torus: bool = False
) -> Tensor:
    r"""Return the base draws reordered to minimise :math:`\sum_i |x_{0,i} - x_{1,i}|^2`.

    The assignment is exact, within the batch, without replacement; rows of data keep their place,
    so they stay beside their context. With a context, each base draw has the context of the row of
    its own index, and the cost becomes :math:`|x_0 - x_1|^2 + 10\,|c_0 - c_1|^2`, contexts in
    units of the deviation of their middle 90%, which far ones do not change: draws are exchanged
    only between rows of like context. What remains is a bias: draws for one context are no longer
    exactly distributed as the base, by an amount that shrinks as the batch grows and rows of like
    context become many.

    Args:
        x0: Base draws, shape ``(N, D)``.
        x1: Data rows, shape ``(N, D)``.
        context: Contexts of the data rows, shape ``(N, C)``, or None.
        on_torus: Whether coordinates are angles, whose distances are those the shorter way around;
            so they are in the training of flows on angles.

    Returns:
        The partners of ``x1``, shape ``(N, D)``: a permutation of the rows of ``x0``.

    References:
        Pooladian et al., *Multisample flow matching*, ICML 2023; Hosseini et al., *Conditional
        optimal transport on function spaces*, SIAM/ASA JUQ 2025.
    """
    if on_torus:
        cost = x0.new_zeros(len(x1), len(x0))
        for a, b in zip(x1.detach().unbind(-1), x0.detach().unbind(-1), strict=True):
            cost += wrap(a[:, None] - b).square()
    else:
        cost = _squared_distances(x1, x0)
    if context is not None:
        c = context / robust_deviation(context)
        cost = cost + _CONTEXT_WEIGHT * _squared_distances(c, c)
    from scipy.optimize import linear_sum_assignment  # slow to import

    _, columns = linear_sum_assignment(cost.cpu().numpy())
    return x0[torch.from_numpy(columns).to(x0.device)]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    # Not by matrix products, |a|^2 - 2 a.b + |b|^2, which lose digits far from the origin.
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(a.detach(), b.detach(), compute_mode=mode).square()
