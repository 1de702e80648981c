r"""The time and the rounds of a run, and how they are shared out among its parts."""

import dataclasses
import math

from ...training.clock import Clock


@dataclasses.dataclass(frozen=True)
class Budget:
    """The time and the rounds of a run, and the shares of the time that its parts may take.

    Attributes:
        rounds: The most rounds, or None.
        clock: What tells the time, and how much there is.
        pathfinder: The share for finding where to begin.
        tempering: The share at which tempering should have reached the target.
        gradients: The share for the fewest gradients of each particle on the way.
        mixing: The share for moves at the target before the first round.
        regression: The share for the regression of a round, at the most.
        moves: The share for moves, of the time of the rest of a round.
        verdict: The share for the calibration and the weights of fresh draws.
    """

    rounds: int | None
    clock: Clock
    pathfinder: float = 0.07
    tempering: float = 0.25
    gradients: float = 0.2
    mixing: float = 0.08
    regression: float = 0.05
    moves: float = 0.35
    verdict: float = 0.06

    def spent(self) -> float:
        """Return the seconds since the start."""
        return self.clock.spent()

    def share_of_rounds(self, count: int) -> float:
        """Return which share of the rounds, where their number is limited, ``count`` are."""
        return count / (self.rounds or math.inf)

    def done(self, count: int = 0) -> float:
        """Return which share of the run is done, after ``count`` rounds."""
        return max(self.spent() / self.clock.limit, self.share_of_rounds(count))
