r"""The training loop: batches, schedule, averaging, clipping, the held-out loss."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import batches
from .objective import Draw, Objective, Rows

__all__ = ["Outcome", "Schedule", "TrainingState", "train"]

_STEPS = 6000
_LOOKS = 100  # how often the held-out loss is looked at
_WARMUP = 0.02  # of the schedule
_CLIP = 2.0  # times the running norm of the gradient
_PATIENT = 0.3  # of the schedule, before which no run stops early
_SKIPPED_LIMIT = 20  # consecutive steps without a finite gradient


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


class Outcome(NamedTuple):
    """What the loop did; the fields are those of :class:`~pyro_interpolant.FitResult`."""

    steps: list[int]
    losses: list[float]
    validation_losses: list[float]
    best_step: int
    stopped_early: bool
    skipped: int
    seconds: float


class Schedule(NamedTuple):
    """When to stop, and how fast to learn on the way: a warm-up, then a cosine to zero."""

    steps: int | None
    max_seconds: float | None
    learning_rate: float
    patience: int
    ema: float

    def progress(self, step: int, seconds: float) -> float:
        """Return the share of the run that is done, 1 at its end."""
        limit = self.steps or (_STEPS if self.max_seconds is None else math.inf)
        return max(step / limit, seconds / (self.max_seconds or math.inf))

    def rate(self, progress: float) -> float:
        """Return the learning rate at a share of the run."""
        warm = min(1.0, (progress + 1e-3) / _WARMUP)
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class _Average:
    """An exponential moving average of weights."""

    def __init__(self, parameters: Sequence[Tensor], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = [p.detach().clone() for p in parameters]

    def update(self, step: int) -> None:
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


def train(
    objective: Objective,
    rows: Rows,
    fixed: Draw,
    schedule: Schedule,
    progress: bool,  # noqa: FBT001
    callback: Callable[[TrainingState], None] | None,
) -> "Outcome":
    """Run the loop and leave the best averaged weights in the network.

    Args:
        objective: The loss.
        rows: Training rows.
        fixed: Held-out rows with their times and base draws, drawn once.
        schedule: When to stop, and the learning rate on the way.
        progress: Whether to show a bar.
        callback: Called at each look at the held-out loss.

    Raises:
        RuntimeError: If gradients stay non-finite; the best weights so far are in the network.
    """
    parameters = [p for p in objective.network.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=schedule.learning_rate, betas=(0.9, 0.99))
    average = _Average(parameters, schedule.ema)
    looks = _Looks(average, lambda: objective.loss(fixed), callback)
    step, seen, done, start = 0, 0, 0.0, time.monotonic()
    clip = _Clip(parameters)
    with tqdm(total=_LOOKS, disable=not progress, desc="fit", unit="%", leave=False) as bar:
        for index in batches(len(rows.w), objective.batch_size, rows.w.device):
            optimizer.param_groups[0]["lr"] = schedule.rate(done)
            loss = objective.loss(objective.draw(rows.take(index)))
            optimizer.zero_grad()
            loss.backward()
            step += 1
            if clip():
                optimizer.step()
                average.update(step)
                looks.total.append(loss.detach())
            elif clip.consecutive >= _SKIPPED_LIMIT:
                break
            seconds = time.monotonic() - start
            done = schedule.progress(step, seconds)
            if int(done * _LOOKS) > seen or done >= 1:
                seen = int(done * _LOOKS)
                looks.look(step, schedule.rate(done), seconds)
                bar.set_postfix_str(looks.text(), refresh=False)
                bar.update(min(_LOOKS, seen) - bar.n)
                if done >= 1 or (done > _PATIENT and looks.since_best >= schedule.patience):
                    break
    looks.keep_best()
    clip.check(step)
    seconds = time.monotonic() - start
    return Outcome(
        looks.steps,
        looks.losses,
        looks.held_losses,
        looks.best_step,
        done < 1,
        clip.skipped,
        seconds,
    )


class _Clip:
    """Clip the gradient at twice its running norm, and tell whether it is finite."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.parameters = parameters
        self.skipped = self.consecutive = self.taken = 0
        self.running = math.inf

    def __call__(self) -> bool:
        limit = _CLIP * self.running
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit if limit < math.inf else 1e9))
        if not math.isfinite(norm):
            self.skipped += 1
            self.consecutive += 1
            return False
        self.consecutive = 0
        self.taken += 1
        new = min(norm, limit)
        self.running = new if self.running == math.inf else 0.98 * self.running + 0.02 * new
        return True

    def check(self, step: int) -> None:
        """Raise if the run ended in, or consisted of, steps without a finite gradient."""
        if self.consecutive >= _SKIPPED_LIMIT or not self.taken:
            raise RuntimeError(
                f"the gradient was not finite for {self.consecutive} steps in a row, the last at "
                f"step {step}: the last good weights were kept. Lower learning_rate, or look for "
                "wild rows."
            )


class _Looks:
    """The held-out loss of the averaged weights over time, and the best of them."""

    def __init__(
        self,
        average: _Average,
        held_loss: Callable[[], Tensor],
        callback: Callable[[TrainingState], None] | None,
    ) -> None:
        self.average, self.held_loss, self.callback = average, held_loss, callback
        self.total: list[Tensor] = []
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.held_losses: list[float] = []
        self.best, self.best_step, self.since_best = math.inf, 0, 0
        self.best_values = [v.clone() for v in average.values]

    def look(self, step: int, rate: float, seconds: float) -> None:
        with torch.no_grad(), self.average.applied():
            held = float(self.held_loss())
        self.steps.append(step)
        self.losses.append(float(torch.stack(self.total).mean()) if self.total else math.nan)
        self.held_losses.append(held)
        self.total.clear()
        self.since_best += 1
        if held < self.best:
            self.best, self.best_step, self.since_best = held, step, 0
            self.best_values = [v.clone() for v in self.average.values]
        if self.callback is not None:
            self.callback(TrainingState(step, self.losses[-1], held, rate, seconds))

    def keep_best(self) -> None:
        _assign(self.average.parameters, self.best_values)

    def text(self) -> str:
        return f"loss={self.losses[-1]:.4g} held-out={self.held_losses[-1]:.4g}"


def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
