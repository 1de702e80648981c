r"""Sequential Monte Carlo with a flow: both learn an unnormalised density; no Pyro model is known.

``pathfinder`` finds where to begin, ``tempering`` carries particles from there to the target,
and ``train`` regresses the flow on them and proposes to them by the flow, round by round.
"""

from typing import TYPE_CHECKING

from ..._package import attach

if TYPE_CHECKING:
    from .train import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "train": ["Round", "RoundsResult", "train_from_density"],
    },
)
