r"""Quadrature on the unit interval, :math:`\int_0^1 f(t)\,dt \approx \sum_j w_j f(t_j)`.

The log-determinant of a flow is one integral over time, :math:`\int_0^1 \nabla\cdot v\,dt`, of a
function that is smooth but changes fast near the ends. Chebyshev-Lobatto nodes,
:math:`t_j = (1 - \cos(\pi j / N)) / 2`, are dense there and their Clenshaw-Curtis weights converge
spectrally. Numpy alone, for those who integrate without torch.
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from .._package import check_ranges, number, whole

Array = NDArray[np.float64]


@lru_cache(maxsize=64)
def clenshaw_curtis(steps: int, warp: float = 0.0) -> tuple[Array, Array]:
    r"""Return nodes and weights for :math:`\int_0^1 f(t)\,dt \approx \sum_j w_j f(t_j)`.

    With :math:`s_j = (1 - \cos(\pi j / N)) / 2` and Clenshaw-Curtis weights :math:`c_j`, the nodes
    are :math:`t_j = (1 + a) s_j - a s_j^2` and the weights :math:`w_j = t'(s_j)\,c_j`: the warp
    :math:`a` moves nodes from the base end (t = 0) toward the data end (t = 1), where velocities
    change fastest, and the rule stays spectral because the warp is a polynomial.

    The rule integrates polynomials in t of degree ``N`` exactly at ``warp = 0``, and of degree
    ``(N - 1) // 2`` otherwise.

    Args:
        steps: The number of gaps, :math:`N \ge 1`; there are ``N + 1`` nodes.
        warp: :math:`a \in [0, 1)`; 0 leaves the nodes symmetric.

    Returns:
        Nodes and weights, each float64 of shape ``(N + 1,)``. They are shared: do not modify.

    Raises:
        ValueError: If ``steps`` is not whole or below 1, or ``warp`` outside [0, 1).

    References:
        Trefethen, *Is Gauss quadrature better than Clenshaw-Curtis?*, SIAM Review 50 (2008).

    Example:
        >>> nodes, weights = clenshaw_curtis(4)
        >>> float((weights * nodes**3).sum())
        0.25
    """
    check_ranges(whole("steps", steps, 1), number("a warp in [0, 1)", warp, lambda n: 0 <= n < 1))
    theta = np.pi * np.arange(steps + 1) / steps
    harmonics = np.arange(1, steps // 2 + 1)
    factors = np.where(2 * harmonics == steps, 1.0, 2.0) / (4 * harmonics**2 - 1)
    weights = 1 - np.cos(2 * theta[:, None] * harmonics) @ factors
    weights = weights / steps
    weights[0] /= 2
    weights[-1] /= 2
    s = (1 - np.cos(theta)) / 2
    s[0], s[-1] = 0.0, 1.0
    return (1 + warp) * s - warp * s**2, (1 + warp - 2 * warp * s) * weights


@lru_cache(maxsize=64)
def integration_matrix(steps: int, warp: float = 0.0) -> Array:
    r"""Return Q with :math:`\int_0^{t_n} f(t)\,dt \approx \sum_m Q_{nm} f(t_m)`.

    The nodes are those of :func:`clenshaw_curtis`, whose weights are the last row; what is
    integrated is the polynomial through all values, in s.

    Args:
        steps: The number of gaps, N.
        warp: How far the nodes move toward t = 1.

    Returns:
        Float64, of shape ``(N + 1, N + 1)``. It is shared: do not modify.

    Raises:
        ValueError: If ``steps`` is not whole or below 1, or ``warp`` outside [0, 1).

    Example:
        >>> nodes, _ = clenshaw_curtis(4)
        >>> error = integration_matrix(4) @ nodes**3 - nodes**4 / 4
        >>> bool(abs(error).max() < 1e-14)
        True
    """
    clenshaw_curtis(steps, warp)
    k = np.arange(steps + 1)
    theta = (np.pi * k / steps)[:, None]  # 2 s - 1 = -cos(theta)
    values = np.cos(k * (np.pi - theta))  # Chebyshev's polynomials at the nodes
    up = np.cos((k + 1) * (np.pi - theta)) / (k + 1)
    down = np.cos((k - 1) * (np.pi - theta)) / np.where(k == 1, np.inf, k - 1)
    integrals = (up - down) / 2
    q = 0.5 * (integrals - integrals[0]) @ np.linalg.inv(values)
    s = (1 - np.cos(theta[:, 0])) / 2
    return q * (1 + warp - 2 * warp * s)


def random_offsets(steps: int, seed: int) -> Array:
    """Return where random nodes lie in each of N equal pieces of time, in [0, 1).

    Args:
        steps: The number N of pieces.
        seed: Of the nodes.

    Returns:
        Float64, of shape ``(N,)``: node j is at ``(j + offset) / N``.
    """
    return np.random.default_rng(seed).random(steps)
