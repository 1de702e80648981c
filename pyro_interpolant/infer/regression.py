r"""The regression of a flow on rows that change from round to round, and how its rate falls."""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..distributions.bases import WhitenedBase
from ..distributions.interpolant import AnyDistribution
from ..interpolants.couplings import independent
from ..training.objective import Objective
from ..training.optimization import Descent, assign
from ..training.rows import Rows

_BATCH_ROWS = 512  # in a regression step
_WARMUP_STEPS = 100  # in which the rate rises
_MAX_POOLS = 10
_DECAY = 0.999
_RATE = 2e-3  # the learning rate, before it falls
_CONSTANT_SHARE = 0.4  # of the training, before the rate falls
_LANDING_SHARE = 0.5  # of the training so far, in which the rate of a flat run falls


@dataclasses.dataclass(frozen=True)
class RateSchedule:
    """The learning rate: constant, then half a cosine to zero.

    Attributes:
        end: Where training ends, a number of rounds or of steps.
        constant: The share of the training before the rate falls.
        landing: Whether the rate falls early, because nothing improved any more.
        peak: The rate before it falls.
    """

    end: float
    constant: float = _CONSTANT_SHARE
    landing: bool = False
    peak: float = _RATE

    def rate(self, done: float) -> float:
        """Return the learning rate after so many rounds or steps."""
        late = (done / self.end - self.constant) / max(1 - self.constant, 1e-9)
        late = min(1.0, max(0.0, late))
        return self.peak * 0.5 * (1 + math.cos(math.pi * late))

    def landed(self, done: float) -> "RateSchedule":
        """Return the schedule whose rate falls from now on."""
        end = min(self.end, math.ceil((1 + _LANDING_SHARE) * done))
        return dataclasses.replace(self, end=end, constant=done / end, landing=True)


class FlowRegression:
    """The regression of a flow on rows that change from round to round, its optimiser kept.

    Args:
        distribution: The flow, its whitening map set.
        pools: Rows to begin with, in the flow's coordinates.
        most: The most rounds whose rows are kept, two at least; of fewer, the later half.
        ema: The decay of the average of the weights.
    """

    def __init__(
        self,
        distribution: AnyDistribution,
        pools: list[Rows],
        *,
        most: int = _MAX_POOLS,
        ema: float = _DECAY,
    ) -> None:
        self.distribution, flow = distribution, distribution.transform.flow
        self.objective = Objective(flow, WhitenedBase(None, flow.whitening), independent)
        self.descent = Descent(self.objective, ema=ema)
        flow.independent, flow.reached = True, None
        self.pools, self.most = pools[-most:], most
        self.added = 0

    def add(self, rows: Rows) -> None:
        """Add the rows of a round, and drop the oldest."""
        self.added += 1
        keep = max(2, min(self.most, self.added // 2 + 1))
        self.pools = [*self.pools, rows][-keep:]

    def steps_of(self, passes: int) -> int:
        """Return in how many steps the rows are gone through so many times."""
        return passes * sum(len(pool.w) for pool in self.pools) // _BATCH_ROWS

    def __call__(self, steps: int, rate: Callable[[int], float]) -> None:
        """Take steps.

        Args:
            steps: The number of steps.
            rate: The learning rate of each of them, from 0.

        Raises:
            RuntimeError: If gradients stay non-finite.
        """
        rows = self.objective.whitened(Rows.joined(self.pools))
        count = len(rows.w)

        def batch() -> Rows:
            return rows.take(torch.randint(count, (min(_BATCH_ROWS, count),)).to(rows.w.device))

        for i in range(steps):
            warm = min(1.0, (self.descent.steps + 1) / _WARMUP_STEPS)
            (points,) = self.objective.points([batch])
            with torch.enable_grad():
                self.descent(points, rate(i) * warm)
            if self.descent.is_stuck():
                self.descent.check()

    def values(self) -> list[Tensor]:
        """Return copies of the averaged weights."""
        return [v.clone() for v in self.descent.average]

    def use(self, weights: list[Tensor]) -> None:
        """Put weights, such as :meth:`values` returned, into the network."""
        assign(self.descent.parameters, weights)
        self.distribution.clear_cache()
