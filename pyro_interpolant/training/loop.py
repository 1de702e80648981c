r"""What watches a run: averaged weights, clipped gradients, looks at the held-out loss.

Each can tell its state as tensors and numbers, and take it back, so that a run can be resumed.
"""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .checkpoint import Keeper, write
from .distributed import Engine
from .objective import Ahead, Draw, Objective

__all__ = [
    "Average",
    "Clip",
    "Looks",
    "NonFiniteError",
    "Outcome",
    "Schedule",
    "TrainingState",
    "fill",
    "numbered",
    "train",
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


_log = logging.getLogger("pyro_interpolant")
_STEPS = 6000
_LOOKS = 100  # how often the held-out loss is looked at
_WARMUP = 0.02  # of the schedule
_PATIENT = 0.3  # of the schedule, before which no run is found to have stalled
_PLACE = ("step", "seen", "done", "stalled", "ended")
_LANDING = 0.2  # of the schedule, in which the rate of a stalled run falls to zero


class Outcome(NamedTuple):
    """What the loop did; the fields are those of :class:`~pyro_interpolant.FitResult`."""

    steps: list[int]
    losses: list[float]
    validation_losses: list[float]
    best_step: int
    stopped_early: bool
    stopped_by: str
    skipped: int
    seconds: float


class Schedule(NamedTuple):
    """When to stop, and how to step: a warm-up, then a cosine to zero; decay; averaging."""

    steps: int | None
    max_seconds: float | None
    learning_rate: float
    weight_decay: float
    patience: int
    ema: float

    def progress(self, step: int, seconds: float) -> float:
        """Return the share of the run that is done, 1 at its end."""
        limit = self.steps or (_STEPS if self.max_seconds is None else math.inf)
        return max(step / limit, seconds / (self.max_seconds or math.inf))

    def rate(self, progress: float, stalled: float | None = None) -> float:
        """Return the learning rate at a share of the run, which may have stalled at another."""
        if stalled is not None:
            return self.rate(stalled) * _falling((progress - stalled) / _LANDING)
        return self.learning_rate * min(1.0, (progress + 1e-3) / _WARMUP) * _falling(progress)


def _falling(share: float) -> float:
    """Return half a cosine, from 1 to 0."""
    return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


class _Run:
    """A run: what is trained, how, and how far it has come."""

    def __init__(
        self,
        objective: Objective,
        batches: Any,
        fixed: Draw,
        schedule: Schedule,
        callback: Callable[[TrainingState], bool | None] | None,
        engine: Engine,
    ) -> None:
        self.ahead, self.schedule = Ahead(objective, batches), schedule
        self.engine = engine
        self.parameters = [p for p in objective.network.parameters() if p.requires_grad]
        engine.set_up(
            objective.network, objective.loss_at, self.parameters,
            schedule.learning_rate, schedule.weight_decay,
        )  # fmt: skip
        self.optimizer = engine.optimizer
        self.average = Average(self.parameters, schedule.ema)
        with torch.no_grad():
            (held,) = objective.points([fixed])
        self.looks = Looks(self.average, lambda: objective.held_loss(held), callback, engine)
        self.clip = Clip(self.parameters, engine)
        self.step, self.seen, self.done = 0, 0, 0.0
        self.stalled: float | None = None  # the share of the schedule at which it did
        self.ended = "schedule"
        self.start = time.monotonic()

    def seconds(self) -> float:
        """Return the time spent, in this process and those it resumes."""
        spent = time.monotonic() - self.start
        return spent if self.schedule.max_seconds is None else self.engine.agreed(spent)

    def rate(self) -> float:
        """Return the present learning rate."""
        return self.schedule.rate(self.done, self.stalled)

    def advance(self) -> bool:
        """Take a step, look if it is time, and return whether to go on."""
        looks = self.looks
        self.optimizer.param_groups[0]["lr"] = self.rate()
        loss = self.engine.backward(self.ahead.next())
        self.step += 1
        if self.clip(loss):
            self.engine.step()
            self.average.update(self.step)
            looks.total.append(loss)
        else:
            self.engine.skip()
            if self.clip.stuck():
                return False
        seconds = self.seconds()
        self.done = self.schedule.progress(self.step, seconds)
        if int(self.done * _LOOKS) <= self.seen and self.done < 1:
            return True
        self.seen = int(self.done * _LOOKS)
        looks.look(self.step, self.rate(), seconds)
        if self.done >= 1:
            return False
        if looks.stopped:
            self.ended = "callback"
        elif self.stalled is not None and self.done >= self.stalled + _LANDING:
            self.ended = "patience"
        elif self.stalled is None and self._stalls():
            self.stalled = self.done
            looks.return_to_best()
        return self.ended == "schedule"

    def look_back(self) -> None:
        """Look at what came of the steps since the last look, where a run ends early."""
        if self.step not in self.looks.steps[-1:]:
            self.looks.look(self.step, self.rate(), self.seconds())

    def _stalls(self) -> bool:
        return self.done > _PATIENT and self.looks.since_best >= self.schedule.patience

    def save(self, keeper: Keeper) -> None:
        """Write the state, from the first of the processes."""
        seconds = self.seconds()  # which all processes agree on
        if self.engine.rank:
            return
        rows, place = self.ahead.state()
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
            **rows,
            "generator": torch.get_rng_state(),
            "initial": keeper.initial,
        }
        numbers = {
            "identity": keeper.identity,
            "run": {n: getattr(self, n) for n in _PLACE},
            "seconds": seconds,
            "batches": place,
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
        self.ahead.restore(tensors, numbers["batches"])
        torch.set_rng_state(tensors["generator"])


def train(
    objective: Objective,
    batches: Any,
    fixed: Draw,
    schedule: Schedule,
    engine: Engine,
    *,
    progress: bool,
    callback: Callable[[TrainingState], bool | None] | None,
    keeper: Keeper | None = None,
) -> Outcome:
    """Run the loop and leave the best averaged weights in the network, whatever ends it.

    A run that stalls lands: it goes back to the best weights, and its learning rate falls to zero
    within a fifth of the schedule. A keyboard interrupt ends a run at once.

    Args:
        objective: The loss.
        batches: What gives training rows, and tells its state.
        fixed: Held-out rows with their times and base draws, drawn once.
        schedule: When to stop, and the learning rate on the way.
        engine: What takes the steps.
        progress: Whether to show a bar.
        callback: Called at each look at the held-out loss; it stops the run by returning True.
        keeper: Where to keep the state, and what to resume from.

    Raises:
        NonFiniteError: If gradients stay non-finite; the best weights so far are in the network.
    """
    run = _Run(objective, batches, fixed, schedule, callback, engine)
    if keeper is not None and keeper.snapshot is not None:
        run.restore(*keeper.snapshot)
    hidden = not progress or engine.rank > 0
    with tqdm(
        total=_LOOKS, initial=run.seen, disable=hidden, desc="fit", unit="%", leave=False
    ) as bar:
        try:
            _go(run, bar, keeper)
            if run.clip.stuck():
                run.look_back()
        except KeyboardInterrupt:
            run.ended = "interrupt"
            run.look_back()
        finally:
            run.looks.keep_best()
        run.clip.check(run.step)
        if run.done < 1:
            _tell(run, bar)
    looks = run.looks
    return Outcome(
        looks.steps,
        looks.losses,
        looks.held_losses,
        looks.best_step,
        run.done < 1,
        run.ended,
        run.clip.skipped,
        run.seconds(),
    )


def _go(run: _Run, bar: Any, keeper: Keeper | None) -> None:
    """Take steps to the end, and write the state when it is due."""
    going = run.done < 1 and run.ended == "schedule"
    while going:
        before = run.seen
        going = run.advance()
        looked = run.seen > before
        if looked:
            bar.set_postfix_str(run.looks.text(run.rate(), run.clip.skipped), refresh=False)
            bar.update(min(_LOOKS, run.seen) - bar.n)
        if keeper is not None:
            due = looked if keeper.every is None else not run.step % keeper.every
            if due or not going:
                run.save(keeper)


def _tell(run: _Run, bar: Any) -> None:
    """Say that a run stopped early, and why, beside the bar and in the log."""
    text = (
        f"fit stopped early at step {run.step}, {100 * run.done:.0f}% of its schedule, by "
        f"{run.ended}: the weights of step {run.looks.best_step} were kept"
    )
    _log.info(text)
    if not bar.disable:
        bar.write(text)
