r"""The clock of a run: what share of its time is spent, and when the rest must be done.

Time counts from the call that the user made, with whatever is done before the first step and
after the last.
"""

import math
import time

from .._package import check_ranges, number

_TRAINING_SHARE = 0.95  # of the time, to the last step; the rest: calibration and comparison
_OVERTIME_SHARE, _OVERTIME = 0.05, 5.0  # of the time, and seconds: what these may take beyond it


class Clock(float):
    """The time of a run: its limit, a number of seconds, with a clock that counts them.

    As a limit of another run it keeps its beginning: that run's time counts from there.

    Args:
        limit: The time that a user gave, or None, which is infinite.
        or_none: Whether it may be None.

    Attributes:
        began: When the run began, by :func:`time.monotonic`.
        before: The time spent by a run that is resumed.

    Raises:
        ValueError: If the limit is not positive, or is None where it may not be.
    """

    began: float
    before: float

    def __new__(cls, limit: float | None, *, or_none: bool = True) -> "Clock":
        """Start it now, or where that of the limit started."""
        check_ranges(number("max_seconds > 0", limit, lambda n: n > 0, or_none=or_none))
        new = super().__new__(cls, math.inf if limit is None else limit)
        new.began, new.before = getattr(limit, "began", time.monotonic()), 0.0
        return new

    @property
    def limit(self) -> float:
        """The time in all, seconds."""
        return float(self)

    def part(self, share: float) -> "Clock":
        """Return the clock of a share of the time, from the same beginning."""
        new = Clock(share * self.limit)
        new.began = self.began
        return new

    def spent(self) -> float:
        """Return the time spent so far."""
        return time.monotonic() - self.began + self.before

    def share(self, seconds: float) -> float:
        """Return which share of the time for training so many seconds are."""
        return seconds / (_TRAINING_SHARE * self.limit)

    def is_beyond(self, share: float) -> bool:
        """Return whether more than a share of all the time is spent."""
        return self.spent() > share * self.limit

    def moment(self, share: float) -> float:
        """Return when a share of all the time is spent, by :func:`time.monotonic`."""
        return self.began - self.before + share * self.limit

    def deadline(self) -> float:
        """Return when all must be done, by :func:`time.monotonic`."""
        return self.moment(1 + _OVERTIME_SHARE) + _OVERTIME

    def deadline_from_now(self) -> float:
        """Return when all must be done of a run that ends now, as after an interrupt."""
        return time.monotonic() + _OVERTIME_SHARE * self.spent() + _OVERTIME
