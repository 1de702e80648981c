r"""Shorter and straighter paths, toward optimal transport.

``energy`` measures paths: their kinetic energy, which bounds the squared Wasserstein distance of
base and model, and a bound of that between model and data. ``max_min`` shortens them by learning
the interpolant; ``rectified`` straightens them by training on the flow's own pairs;
``distillation`` fits a map of one pass to the flow's draws.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .distillation import *
    from .energy import *
    from .max_min import *
    from .rectified import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "distillation": ["DistillResult", "Student", "distill"],
        "energy": ["PathEnergy", "W2Bound", "path_energy", "w2_bound"],
        "max_min": ["TransportResult", "learn_interpolant"],
        "rectified": ["PathReport", "ReflowResult", "reflow"],
    },
)
