r"""Plots of flows by matplotlib (extra ``[plot]``), which the first plot imports.

Every function draws on the axes it is given, or on new ones, and returns them. ``flows`` draws
what a flow does, ``tables`` samples beside data, ``checks`` training runs and checks of a density,
and ``grids`` images; ``axes`` is what they share.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .checks import *
    from .flows import *
    from .grids import *
    from .tables import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "checks": [
            "coverage_curve",
            "predictive_check",
            "rank_histogram",
            "ranks",
            "training_curve",
        ],
        "flows": ["coefficients", "conditional", "density", "evolution", "trajectories"],
        "grids": ["images"],
        "tables": ["corner"],
    },
)
