"""How many threads steps take: one, or all that torch was given, whichever is faster now.

A step is many small operations, and at the end of each all threads wait for the last. Where
another process keeps a core busy, that is the one that has lost its core; where none does, more
threads gain more or less, by the sizes of the operations. So neither these sizes nor the number of
cores tell which is faster: the clock does, and again while a run goes on.
"""

import contextlib
from collections import deque
from collections.abc import Iterator

import torch

_TRIED = 8  # steps of a trial, as many as are prepared at once: any so many do the same work
_TRIAL_SHARE = 0.02  # of the time, that trials may lose


class Threads:
    """Sets torch's number of threads to one or to all, by how long steps took on each.

    It begins with one. The other number is tried for eight steps, or until these have taken longer
    than the last eight did, and is kept if they have not. The next trial follows when the time
    that this one lost is a fiftieth of that since.

    Args:
        choose: Whether there is a choice: not where steps run on a GPU, or several processes take
            them together.
    """

    def __init__(self, *, choose: bool) -> None:
        total = torch.get_num_threads()
        self.used, self.other = 1 if choose else total, total
        self.recent: deque[float] = deque(maxlen=_TRIED)  # seconds of steps on the number in use
        self.tried: list[float] | None = None  # of those on the other, in a trial
        self.until = 0.0  # seconds until the next trial
        torch.set_num_threads(self.used)

    def took(self, seconds: float) -> None:
        """Take note of a step's time, and set the number of threads of the next."""
        if self.used == self.other:
            return
        if self.tried is None:
            self.recent.append(seconds)
            self.until -= seconds
            if self.until <= 0 and len(self.recent) == _TRIED:
                self.tried = []
                torch.set_num_threads(self.other)
            return
        self.tried.append(seconds)
        usual, spent = sum(self.recent), sum(self.tried)
        if len(self.tried) < _TRIED and spent < usual:
            return
        self.until = abs(spent - usual * len(self.tried) / _TRIED) / _TRIAL_SHARE
        if spent < usual:
            self.used, self.other = self.other, self.used
            self.recent.extend(self.tried)
        self.tried = None
        torch.set_num_threads(self.used)


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """Leave torch's number of threads as it was before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
