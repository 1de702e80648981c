r"""A flow and particles teach each other an unnormalised density; no model of Pyro's is known.

``pathfinder`` finds where to begin, ``tempering`` carries particles from there to the target by
sequential Monte Carlo, ``flow_proposal`` lets them jump through the flow, and ``train`` regresses
the flow on them, round by round.
"""

from typing import TYPE_CHECKING

from ..._lazy import attach

if TYPE_CHECKING:
    from .train import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "train": ["Round", "RoundsResult", "train_from_density"],
    },
)
