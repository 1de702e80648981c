r"""The path: interpolants :math:`I_t(x_0, x_1)` between a draw of the base and a row of data.

The linear family is :math:`I_t = \alpha(t) x_0 + \beta(t) x_1 + \gamma(t) z` with :math:`z \sim
N(0, I)`: ``linear`` has its members, and the latent terms :math:`\gamma`. Paths without
coefficients are in ``nonlinear`` (any function, geodesics of the torus), those with weights of
their own in ``learned``. ``couplings`` decide which draw of the base is paired with which row.

To add an interpolant, state its ``coefficients`` in a frozen dataclass of ``linear``; a path that
has none overrides ``sample`` and ``check_ends``, in ``nonlinear``.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .linear import *
    from .nonlinear import *
    from .learned import *
    from .couplings import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "linear": [
            "BrownianBridge",
            "EncodingDecoding",
            "Interpolant",
            "Latent",
            "Linear",
            "Mirror",
            "SineSquared",
            "Trigonometric",
            "VariancePreserving",
        ],
        "nonlinear": ["Geodesic", "NonlinearInterpolant"],
        "learned": ["LearnedInterpolant"],
        "couplings": ["independent", "optimal_transport"],
    },
)
