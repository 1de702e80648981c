r"""The clock of a run: how its time is shared out, and how its learning rate falls."""

import dataclasses
import math
import time
from collections.abc import Iterator

from ..training.clock import Clock

_RATE = 2e-3  # the learning rate, before it falls
_CONSTANT_SHARE = 0.4  # of the training, before the rate falls
_LANDING_SHARE = 0.5  # of the time trained so far, in which the rate of a flat run falls


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


@dataclasses.dataclass(frozen=True)
class RateSchedule:
    """The learning rate: constant, then half a cosine to zero.

    Attributes:
        first: The time at which training began, in seconds since the start of the run.
        end: The time at which it ends.
        constant: The share of the training before the rate falls.
        landing: Whether the rate falls early, because nothing improved any more.
    """

    first: float
    end: float
    constant: float = _CONSTANT_SHARE
    landing: bool = False

    def done(self, spent: float, share: float) -> float:
        """Return which share of the training is done at a time, or another one if that is later.

        Args:
            spent: The seconds since the start of the run.
            share: Which share of the rounds, or of the steps, is done.
        """
        return max((spent - self.first) / max(self.end - self.first, 1e-9), share)

    def rate(self, spent: float, share: float) -> float:
        """Return the learning rate there, see :meth:`done`."""
        late = (self.done(spent, share) - self.constant) / (1 - self.constant)
        late = min(1.0, max(0.0, late))
        return _RATE * 0.5 * (1 + math.cos(math.pi * late))

    def landed(self, spent: float) -> "RateSchedule":
        """Return the schedule whose rate falls from now on."""
        trained = spent - self.first
        end = min(self.end, spent + _LANDING_SHARE * trained)
        return RateSchedule(self.first, end, trained / (end - self.first), landing=True)


def clocked(seconds: float, fewest: int, most: int) -> Iterator[int]:
    """Count from 0: to ``fewest`` at the least, then while there is time, up to ``most``."""
    until = time.monotonic() + seconds
    for i in range(most):
        if i >= fewest and time.monotonic() > until:
            return
        yield i
