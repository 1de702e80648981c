r"""What watches a run: averaged weights, clipped gradients, looks at the held-out loss.

Each can tell its state as tensors and numbers, and take it back, so that a run can be resumed.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .engine import Engine

__all__ = [
    "Average",
    "Clip",
    "Looks",
    "NonFiniteError",
    "TrainingState",
    "fill",
    "numbered",
]

_SKIPPED = 20  # consecutive steps without a finite gradient
_CLIP = 2.0  # times the running norm of the gradient


class NonFiniteError(RuntimeError):
    """Steps without a finite gradient ended a run.

    Attributes:
        distribution: With the last good weights, where the caller has none of his own.
    """

    distribution: Any = None


class TrainingState(NamedTuple):
    """What a callback is told each time the held-out loss is looked at.

    Attributes:
        step: The number of steps taken.
        loss: The mean training loss since the last look.
        validation_loss: The held-out loss of the averaged weights, on fixed draws.
        learning_rate: The present learning rate.
        seconds: The time since the start.
    """

    step: int
    loss: float
    validation_loss: float
    learning_rate: float
    seconds: float


class Average:
    """An exponential moving average of weights."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = [p.detach().clone() for p in parameters]

    def update(self, step: int) -> None:
        """Move toward the present weights, faster while the run is young."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Lend the average to the network."""
        present = [p.detach().clone() for p in self.parameters]
        _assign(self.parameters, self.values)
        try:
            yield
        finally:
            _assign(self.parameters, present)


class Clip:
    """Clip the gradient at twice its running norm, and tell whether it is finite."""

    def __init__(self, parameters: Sequence[Tensor], engine: Engine) -> None:
        self.parameters, self.engine = parameters, engine
        self.skipped = self.consecutive = self.taken = 0
        self.running = math.inf

    def __call__(self, loss: Tensor) -> bool:
        """Clip the present gradient, and return whether it and the loss are finite."""
        limit = _CLIP * self.running
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = self.engine.norm(gradients, loss)
        if not math.isfinite(norm):
            self.skipped += 1
            self.consecutive += 1
            return False
        if norm > limit:
            torch._foreach_mul_(gradients, limit / norm)
        self.consecutive = 0
        self.taken += 1
        new = min(norm, limit)
        self.running = new if self.running == math.inf else 0.98 * self.running + 0.02 * new
        return True

    def numbers(self) -> dict[str, Any]:
        """Return the state."""
        names = ("skipped", "consecutive", "taken", "running")
        return {name: getattr(self, name) for name in names}

    def stuck(self) -> bool:
        """Tell whether too many steps in a row had no finite gradient."""
        return self.consecutive >= _SKIPPED

    def check(self, step: int) -> None:
        """Raise if the run ended in, or consisted of, steps without a finite gradient."""
        if self.stuck() or (self.skipped and not self.taken):
            raise NonFiniteError(
                f"the gradient was not finite for {self.consecutive} steps in a row, the last at "
                f"step {step}: the last good weights were kept. Lower learning_rate, or look for "
                "wild rows."
            )


class Looks:
    """The held-out loss of the averaged weights over time, and the best of them."""

    def __init__(
        self,
        average: Average,
        held_loss: Callable[[], Tensor],
        callback: Callable[[TrainingState], bool | None] | None,
        engine: Engine,
    ) -> None:
        self.average, self.held_loss, self.callback = average, held_loss, callback
        self.engine, self.stopped = engine, False
        self.total: list[Tensor] = []
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.held_losses: list[float] = []
        self.best, self.best_step, self.since_best = math.inf, 0, 0
        self.best_values = [v.clone() for v in average.values]

    def look(self, step: int, rate: float, seconds: float) -> None:
        """Look at the held-out loss of the average, and keep its weights if it is the best."""
        with torch.no_grad(), self.average.applied():
            held = self.engine.agreed(float(self.held_loss()))
        recent = torch.stack(self.total).mean() if self.total else torch.tensor(math.nan)
        self.steps.append(step)
        self.losses.append(float(self.engine.mean(recent)))
        self.held_losses.append(held)
        self.total.clear()
        self.since_best += 1
        if held < self.best:
            self.best, self.best_step, self.since_best = held, step, 0
            self.best_values = [v.clone() for v in self.average.values]
        wanted: Any = False
        if self.callback is not None and self.engine.rank == 0:
            wanted = self.callback(TrainingState(step, self.losses[-1], held, rate, seconds))
        if getattr(wanted, "ndim", None) == 0:  # numpy's and torch's
            wanted = wanted.item()
        self.stopped = bool(self.engine.agreed(float(wanted is True)))

    def keep_best(self) -> None:
        """Leave the best average in the network."""
        _assign(self.average.parameters, self.best_values)

    def return_to_best(self) -> None:
        """Go on from the best average."""
        self.keep_best()
        _assign(self.average.values, self.best_values)

    def text(self, rate: float, skipped: int) -> str:
        """Return the last look in a few words."""
        text = f"loss={self.losses[-1]:.4g} held-out={self.held_losses[-1]:.4g} rate={rate:.1e}"
        return f"{text} skipped={skipped}" if skipped else text

    def tensors(self) -> dict[str, Tensor]:
        """Return the state that is tensors."""
        recent = torch.stack(self.total) if self.total else torch.zeros(0)
        return {"recent": recent, **numbered("best", self.best_values)}

    def numbers(self) -> dict[str, Any]:
        """Return the state that is numbers."""
        names = ("steps", "losses", "held_losses", "best", "best_step", "since_best")
        return {name: getattr(self, name) for name in names}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take a state back."""
        self.__dict__.update(numbers)
        self.total = list(tensors["recent"].to(self.best_values[0]).unbind())
        fill(self.best_values, "best", tensors)


def numbered(name: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return values of any shapes under their name and number."""
    return {f"{name}.{i}": value for i, value in enumerate(values)}


def fill(values: Sequence[Tensor], name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy numbered tensors of any shapes into values of the same shapes."""
    with torch.no_grad():
        for i, value in enumerate(values):
            value.copy_(tensors[f"{name}.{i}"])


def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
