r"""Training: a quadratic regression on the interpolant. No step solves an ODE.

``building`` has ``from_samples``: it builds a flow for data. ``fitting`` has ``fit`` and reads as
the story: check the ``data`` (a table, or a ``streaming`` one), hold some out, set the flow's
start, ``whitening`` and scales from the others by ``preparation``, minimise the ``objective`` at
points of ``paths`` in the ``loop``, by steps of ``optimization``, with a ``checkpoint`` to resume
from, alone or ``distributed`` over processes, of ``shards``; ``selection`` says which weights are
kept. ``rows`` are rows in memory; ``preprocessing`` is what may be done to data before:
dequantisation, and the choice of a Gaussianizing map.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .building import *
    from .fitting import *
    from .loop import *
    from .optimization import *
    from .objective import *
    from .preprocessing import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "building": ["from_samples"],
        "fitting": ["FitResult", "fit"],
        "loop": ["TrainingState"],
        "optimization": ["NonFiniteError"],
        "objective": ["interpolant_loss"],
        "preprocessing": ["dequantize"],
    },
)
