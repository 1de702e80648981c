"""The limit of a run in seconds.

Work is counted in steps, rounds and draws, so that a seed gives the same run on a busy machine as
on an idle one. A limit only ends a run early, and its result says so.
"""

import math

from .. import _package
from .._package import check_ranges, number


class Clock:
    """The seconds since it was made, and whether a limit is over.

    Args:
        max_seconds: The limit, or None for none.

    Raises:
        ValueError: If the limit is not positive.
    """

    def __init__(self, max_seconds: float | None) -> None:
        positive = number("max_seconds > 0", max_seconds, lambda n: n > 0, or_none=True)
        check_ranges(positive)
        self.limit = math.inf if max_seconds is None else float(max_seconds)
        self.began = _package.now()

    @property
    def is_limited(self) -> bool:
        """Whether there is a limit."""
        return self.limit < math.inf

    def spent(self) -> float:
        """Return the seconds since it was made."""
        return _package.now() - self.began

    def is_over(self) -> bool:
        """Return whether the limit is over."""
        return self.is_limited and self.spent() >= self.limit

    def left(self) -> float | None:
        """Return what is left of the limit, for a run inside this one, or None for no limit."""
        return max(1e-9, self.limit - self.spent()) if self.is_limited else None
