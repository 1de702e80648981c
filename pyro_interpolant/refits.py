r"""The regression of a flow on rows that keep changing, its optimiser kept from round to round."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .couplings import independent
from .engine import Engine
from .flow import Flow
from .monitors import Average, Clip
from .objective import Objective, Rows

__all__ = ["Refit"]

_BATCH = 512
_RATE = 1e-3  # before the first is asked for
_EMA = 0.999
_WARM = 100  # steps in which the rate rises
_KEPT = 10  # the most rounds whose rows are kept; of fewer, the later half
_LEAST = 10  # steps whatever the clock says


class Refit:
    """Train a velocity on a pool of rows.

    Args:
        flow: The flow, its whitening map set.
        pools: Rows to begin with, each of shape ``(N, D)``.
    """

    def __init__(self, flow: Flow, pools: list[Tensor]) -> None:
        self.objective = Objective(flow, None, independent, _BATCH)
        self.parameters = list(flow.velocity.parameters())
        self.engine = Engine()
        self.engine.set_up(flow.velocity, self.objective.loss, self.parameters, _RATE)
        self.average = Average(self.parameters, _EMA)
        self.clip = Clip(self.parameters, self.engine)
        self.pools = pools[-_KEPT:]
        self.step, self.added = 0, 0

    def add(self, rows: Tensor) -> None:
        """Add the rows of a round, shape ``(N, D)``, and drop the oldest."""
        self.added += 1
        keep = max(2, min(_KEPT, self.added // 2 + 1))
        self.pools = [*self.pools, rows][-keep:]

    def __call__(self, steps: int, rate: Callable[[], float], *, seconds: float) -> float:
        """Take steps, at most as many as the time allows; return the mean loss.

        Args:
            steps: The number of steps.
            rate: The present learning rate.
            seconds: The time to spend.

        Raises:
            RuntimeError: If gradients stay non-finite.
        """
        until, losses = time.monotonic() + seconds, []
        rows = self.objective.prepared(Rows(torch.cat(self.pools), None))
        count = len(rows.w)
        for i in range(steps):
            if i >= _LEAST and time.monotonic() > until:
                break
            self.step += 1
            self.engine.optimizer.param_groups[0]["lr"] = rate() * min(1.0, self.step / _WARM)
            batch = rows.take(torch.randint(count, (min(_BATCH, count),)).to(rows.w.device))
            with torch.enable_grad():
                loss = self.engine.backward(self.objective.draw(batch))
            if self.clip(loss):
                self.engine.step()
                self.average.update(self.step)
                losses.append(loss)
            elif self.clip.stuck():
                self.clip.check(self.step)
        return float(torch.stack(losses).mean()) if losses else math.nan

    def values(self) -> list[Tensor]:
        """Return copies of the averaged weights."""
        return [v.clone() for v in self.average.values]

    def assign(self, values: list[Tensor]) -> None:
        """Put weights into the network."""
        with torch.no_grad():
            for p, v in zip(self.parameters, values, strict=True):
                p.copy_(v)
