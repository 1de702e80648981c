r"""Explicit Runge-Kutta methods: :math:`x + h \sum_i b_i k_i`, :math:`k_i` at times :math:`c_i`.

With :math:`k_i = v_{t + c_i h}(x + h \sum_j a_{ij} k_j)`; each stage needs at most the one before
it. Numbers alone, for those who integrate without torch.
"""

from collections.abc import Sequence

# Stage times c, stage matrix a (rows), weights b.
Tableau = tuple[Sequence[float], Sequence[Sequence[float]], Sequence[float]]
TABLEAUS: dict[str, Tableau] = {
    "euler": ((0.0,), ((),), (1.0,)),
    "midpoint": ((0.0, 0.5), ((), (0.5,)), (0.0, 1.0)),
    "heun": ((0.0, 1.0), ((), (1.0,)), (0.5, 0.5)),
    "rk4": (
        (0.0, 0.5, 0.5, 1.0),
        ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)),
        (1 / 6, 1 / 3, 1 / 3, 1 / 6),
    ),
}
