r"""The solver and the divergence: from a velocity to states at nodes, and to a log-determinant.

``ode`` integrates :math:`\dot x = v_t(x)` and returns the states at the nodes of ``quadrature``;
``divergence`` is evaluated along them afterwards, exactly or by Hutchinson's probes, and its
weighted sum is the log-determinant. ``parallel`` runs blocks of rows side by side on the cores.

To add a solver, write a frozen dataclass with ``grid()`` and ``solve(field, x, times)``; a
divergence is a callable ``(velocity, t, x, context)``.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .ode import *
    from .divergence import *
    from .quadrature import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "ode": ["Adaptive", "FixedGrid", "RandomGrid", "random_nodes"],
        "divergence": ["ExactDivergence", "HutchinsonDivergence"],
        "quadrature": ["clenshaw_curtis", "integration_matrix"],
    },
)
