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

from ..solvers.parallel import is_main_thread, threads_at_once, threads_restored

_TRIAL_STEPS = 4  # that a trial of the other number of threads takes
_TRIAL_SHARE = 0.02  # of the time, that trials may lose


class Threads:
    """Sets torch's number of threads to one or to all, by how long steps take on each.

    It begins with a step on one, for beside busy processes one on all may take a hundred times as
    long. The other number is then tried for one step, later for four, or until these have taken
    longer than as many on this one did, and is kept if they have not. The number that has lost its
    place is tried again at once, for a single step may have taken long by accident; otherwise the
    next trial follows when the time that this one lost is a fiftieth of that since.

    Args:
        choose: Whether there is a choice: not where steps run on a GPU, or several processes take
            them together; nor beside other threads of Python, which torch gives the same number.
    """

    def __init__(self, *, choose: bool) -> None:
        self.is_main = is_main_thread()
        self.other = threads_at_once() if self.is_main else torch.get_num_threads()
        self.used = 1 if choose and self.is_main else self.other
        self.trial_steps = 1
        self.recent = deque[float](maxlen=_TRIAL_STEPS)  # seconds of steps on the number in use
        self.tried: list[float] | None = None  # of those on the other, in a trial
        self.until = 0.0  # seconds until the next trial

    def settle(self) -> None:
        """Set the number that is in use, and end a trial."""
        self.tried = None
        if self.is_main:
            torch.set_num_threads(self.used)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Set that number for a while, or the other, where a trial of it has begun."""
        with threads_restored():
            if self.is_main:
                torch.set_num_threads(self.used if self.tried is None else self.other)
            yield

    def took(self, seconds: float) -> None:
        """Take note of a step's time, and set the number of threads of the next."""
        if self.used == self.other:
            return
        if self.tried is None:
            self.recent.append(seconds)
            self.until -= seconds
            if self.until <= 0 and len(self.recent) >= self.trial_steps:
                self.tried = []
                torch.set_num_threads(self.other)
            return
        self.tried.append(seconds)
        # A trial begins as soon as there are so many steps to compare it with.
        usual, spent, count = sum(self.recent), sum(self.tried), len(self.recent)
        if spent >= usual:
            self.until = (spent - usual * len(self.tried) / count) / _TRIAL_SHARE
        elif len(self.tried) == count:
            self.used, self.other = self.other, self.used
            self.recent.clear()  # so that a trial of the other follows as many steps as it takes
            self.until = 0.0
        else:
            return
        self.trial_steps = _TRIAL_STEPS
        self.settle()
