r"""The training loop: batches, a schedule, and a state that survives being killed."""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .data import Batches
from .monitors import SKIPPED_LIMIT, Average, Clip, Looks, TrainingState, fill, numbered
from .objective import Draw, Objective, Rows
from .snapshots import Snapshot, write

__all__ = ["Keeper", "Outcome", "Schedule", "train"]

_STEPS = 6000
_LOOKS = 100  # how often the held-out loss is looked at
_WARMUP = 0.02  # of the schedule
_PATIENT = 0.3  # of the schedule, before which no run stops early


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


class Keeper(NamedTuple):
    """Where a run keeps its state.

    Attributes:
        path: The file.
        every: After how many steps, or None: at each look.
        identity: What tells this run from another.
        initial: The state of the generator before anything was drawn, shape ``(S,)``.
        snapshot: What to resume from, or None.
    """

    path: str | os.PathLike[str]
    every: int | None
    identity: dict[str, Any]
    initial: Tensor
    snapshot: Snapshot | None


class _Run:
    """A run: what is trained, how, and how far it has come."""

    def __init__(
        self,
        objective: Objective,
        rows: Rows,
        fixed: Draw,
        schedule: Schedule,
        callback: Callable[[TrainingState], None] | None,
    ) -> None:
        self.objective, self.rows, self.schedule = objective, rows, schedule
        self.parameters = [p for p in objective.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=schedule.learning_rate, betas=(0.9, 0.99), fused=True
        )
        self.average = Average(self.parameters, schedule.ema)
        self.looks = Looks(self.average, lambda: objective.loss(fixed), callback)
        self.clip = Clip(self.parameters)
        self.batches = Batches(len(rows.w), objective.batch_size, rows.w.device, rows.weight)
        self.step, self.seen, self.done = 0, 0, 0.0
        self.start = time.monotonic()

    def seconds(self) -> float:
        """Return the time spent, in this process and those it resumes."""
        return time.monotonic() - self.start

    def advance(self) -> bool:
        """Take a step, look if it is time, and return whether to go on."""
        objective, looks = self.objective, self.looks
        self.optimizer.param_groups[0]["lr"] = self.schedule.rate(self.done)
        loss = objective.loss(objective.draw(self.rows.take(self.batches.next())))
        self.optimizer.zero_grad()
        loss.backward()
        self.step += 1
        if self.clip():
            self.optimizer.step()
            self.average.update(self.step)
            looks.total.append(loss.detach())
        elif self.clip.consecutive >= SKIPPED_LIMIT:
            return False
        seconds = self.seconds()
        self.done = self.schedule.progress(self.step, seconds)
        if int(self.done * _LOOKS) <= self.seen and self.done < 1:
            return True
        self.seen = int(self.done * _LOOKS)
        looks.look(self.step, self.schedule.rate(self.done), seconds)
        patient = self.done <= _PATIENT or looks.since_best < self.schedule.patience
        return self.done < 1 and patient

    def save(self, keeper: Keeper) -> None:
        """Write the state."""
        states = [self.optimizer.state.get(p, {}) for p in self.parameters]
        moments = {
            f"{name}.{i}": state[name]
            for i, state in enumerate(states)
            for name in ("exp_avg", "exp_avg_sq", "step")
            if state
        }
        tensors = {
            **numbered("weight", self.parameters),
            **numbered("average", self.average.values),
            **moments,
            **self.looks.tensors(),
            "order": self.batches.order,
            "generator": torch.get_rng_state(),
            "initial": keeper.initial,
        }
        numbers = {
            "identity": keeper.identity,
            "run": {"step": self.step, "seen": self.seen, "done": self.done},
            "seconds": self.seconds(),
            "position": self.batches.position,
            "clip": self.clip.numbers(),
            "looks": self.looks.numbers(),
        }
        write(keeper.path, tensors, numbers)

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take a state back."""
        fill(self.parameters, "weight", tensors)
        fill(self.average.values, "average", tensors)
        for i, p in enumerate(self.parameters):
            if f"step.{i}" in tensors:
                self.optimizer.state[p] = {
                    name: tensors[f"{name}.{i}"].to(p.device)
                    for name in ("step", "exp_avg", "exp_avg_sq")
                }
        self.looks.restore(tensors, numbers["looks"])
        self.clip.__dict__.update(numbers["clip"])
        self.__dict__.update(numbers["run"])
        self.start = time.monotonic() - numbers["seconds"]
        self.batches.order = tensors["order"].to(self.batches.order)
        self.batches.position = numbers["position"]
        torch.set_rng_state(tensors["generator"])


def train(
    objective: Objective,
    rows: Rows,
    fixed: Draw,
    schedule: Schedule,
    *,
    progress: bool,
    callback: Callable[[TrainingState], None] | None,
    keeper: Keeper | None = None,
) -> Outcome:
    """Run the loop and leave the best averaged weights in the network.

    A keyboard interrupt ends the run as patience does.

    Args:
        objective: The loss.
        rows: Training rows.
        fixed: Held-out rows with their times and base draws, drawn once.
        schedule: When to stop, and the learning rate on the way.
        progress: Whether to show a bar.
        callback: Called at each look at the held-out loss.
        keeper: Where to keep the state, and what to resume from.

    Raises:
        RuntimeError: If gradients stay non-finite; the best weights so far are in the network.
    """
    run = _Run(objective, rows, fixed, schedule, callback)
    if keeper is not None and keeper.snapshot is not None:
        run.restore(*keeper.snapshot)
    with tqdm(total=_LOOKS, disable=not progress, desc="fit", unit="%", leave=False) as bar:
        try:
            going = run.done < 1
            while going:
                before = run.seen
                going = run.advance()
                if run.seen > before:
                    rate = schedule.rate(run.done)
                    bar.set_postfix_str(run.looks.text(rate), refresh=False)
                    bar.update(min(_LOOKS, run.seen) - bar.n)
                if keeper is not None:
                    due = (
                        run.seen > before if keeper.every is None else not run.step % keeper.every
                    )
                    if due or not going:
                        run.save(keeper)
        except KeyboardInterrupt:
            if run.step not in run.looks.steps[-1:]:
                run.looks.look(run.step, schedule.rate(run.done), run.seconds())
    looks = run.looks
    looks.keep_best()
    run.clip.check(run.step)
    return Outcome(
        looks.steps,
        looks.losses,
        looks.held_losses,
        looks.best_step,
        run.done < 1,
        run.clip.skipped,
        run.seconds(),
    )
