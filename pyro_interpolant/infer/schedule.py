r"""The clock of rounds: how long each takes, and how their learning rate falls."""

import dataclasses
import math
import time
from collections.abc import Iterator

_RATE = 2e-3  # the learning rate, before it falls
_CONSTANT_SHARE = 0.4  # of the training, before the rate falls
_LANDING_SHARE = 0.5  # of the time trained so far, in which the rate of a flat run falls


@dataclasses.dataclass(frozen=True)
class RateSchedule:
    """The learning rate: constant, then half a cosine to zero.

    Attributes:
        first: The time at which training began, in seconds since the start of the run.
        end: The time at which it ends.
        constant: The share of the training before the rate falls.
        landing: Whether the rate falls early, because nothing improved any more.
        peak: The rate before it falls.
    """

    first: float
    end: float
    constant: float = _CONSTANT_SHARE
    landing: bool = False
    peak: float = _RATE

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
        return self.peak * 0.5 * (1 + math.cos(math.pi * late))

    def landed(self, spent: float) -> "RateSchedule":
        """Return the schedule whose rate falls from now on."""
        trained = spent - self.first
        end = min(self.end, spent + _LANDING_SHARE * trained)
        share = trained / (end - self.first)
        return dataclasses.replace(self, end=end, constant=share, landing=True)


def clocked(seconds: float, fewest: int, most: int) -> Iterator[int]:
    """Count from 0: to ``fewest`` at the least, then while there is time, up to ``most``."""
    until = time.monotonic() + seconds
    for i in range(most):
        if i >= fewest and time.monotonic() > until:
            return
        yield i
