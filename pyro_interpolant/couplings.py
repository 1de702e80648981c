"""Who is paired with whom: couplings of a batch of base draws with a batch of data."""

from scipy.optimize import linear_sum_assignment
from torch import Tensor, cdist, from_numpy

__all__ = ["independent", "optimal_transport"]


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


def optimal_transport(x0: Tensor, x1: Tensor, context: Tensor | None = None) -> Tensor:
    r"""Return the base draws reordered to minimise :math:`\sum_i |x_{0,i} - x_{1,i}|^2`.

    The assignment is exact, within the batch, without replacement; rows of data keep their place,
    so they stay beside their context. With a context, pairs are matched across contexts: the
    conditional flow is then biased by an amount that shrinks as the batch grows.

    Args:
        x0: Base draws, shape ``(N, D)``.
        x1: Data rows, shape ``(N, D)``.
        context: Contexts of the data rows, shape ``(N, C)``, or None. Unused.

    Returns:
        The partners of ``x1``, shape ``(N, D)``: a permutation of the rows of ``x0``.

    References:
        Pooladian et al., *Multisample flow matching*, ICML 2023.
    """
    # Without the shortcut by matrix products, which loses digits far from the origin.
    distance = cdist(x1.detach(), x0.detach(), compute_mode="donot_use_mm_for_euclid_dist")
    _, columns = linear_sum_assignment(distance.square().cpu().numpy())
    return x0[from_numpy(columns).to(x0.device)]
