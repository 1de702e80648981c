r"""The training run: steps on a schedule, looks at rows held out, a state to resume from."""

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._package import check_ranges, number, whole
from .._torch import rng_state, set_rng_state, warn_user
from ..nn.modes import evaluated
from ..nn.velocity import image_shape
from ..solvers.parallel import threads_for
from .checkpoint import Checkpoint, buffers_of
from .clock import Clock
from .data import TableBatches
from .objective import TIMES_PER_BATCH, Objective
from .optimization import (
    Descent,
    NonFiniteError,
    assign,
    fill,
    numbered,
)
from .paths import Points
from .reporting import HeldOutDensity, Show, percent_bar, tell
from .selection import Scores, Selection, rises
from .streaming import StreamBatches

Callback = Callable[["TrainingState"], bool | None]

_log = logging.getLogger("pyro_interpolant")
_FEWEST_STEPS, _MOST_STEPS = 2000, 6000  # of a run by default
_NUMBERS_PER_STEP = 6.0  # in all rows, N D: fewer steps lost nothing for 3,000 rows in 5-d
_DECAY_FACTOR, _MOST_DECAY = 70.0, 0.5  # of the default weight decay
_LOOK_SHARE = 0.02  # of the schedule, between two looks at rows held out
_LOOK_GROWTH = 0.1  # of the way so far, where that is less: few rows are learned early
_LEAST_LOOK_STEPS = 10  # at least: a look takes as long as some steps
_WARMUP_SHARE = 0.02  # of the schedule, until the second look
# The rate rises over 200 steps, or a tenth of the schedule if that is less. On bernoulli_glm all
# units of a layer of a network given data fell silent in 4 of 5 runs with a warm-up of 40 steps,
# and in none with 200.
_RISE_STEPS, _RISE_SHARE = 200, 0.1
_RISE, _RISE_PER_COLUMN = 0.02, 0.005  # of the lowest loss, and a column: wandering on plateaus
_PLACE = ("next_look", "done", "ended")


class TrainingState(NamedTuple):
    """What a callback is called with at each look at rows held out.

    Attributes:
        step: The number of steps taken.
        loss: The mean training loss since the last time.
        validation_loss: The held-out loss of the averaged weights, at fixed times and base draws.
        learning_rate: The present learning rate.
        seconds: The time since the start.
    """

    step: int
    loss: float
    validation_loss: float
    learning_rate: float
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """How long a run lasts, and its learning rate: a warm-up, then a cosine to zero.

    Args:
        steps: The number of steps, or None.
        learning_rate: The peak.
        weight_decay: AdamW's, or None until the number of rows decides it.
        patience: The percentage of the steps up to the best scores of rows held out, after which a
            run may end.
        ema: The decay of the averaged weights.
        accumulate: In how many pieces a gradient is computed.

    Raises:
        ValueError: If a setting is out of range.
    """

    steps: int | None
    learning_rate: float
    weight_decay: float | None
    patience: int
    ema: float
    accumulate: int = 1

    def __post_init__(self) -> None:
        """Check the settings."""
        decay, pieces = "a finite weight_decay >= 0", range(1, TIMES_PER_BATCH + 1)
        check_ranges(
            whole("steps", self.steps, 1, or_none=True),
            number("a finite learning_rate > 0", self.learning_rate, lambda n: 0 < n < math.inf),
            number(decay, self.weight_decay, lambda n: 0 <= n < math.inf, or_none=True),
            number("patience >= 1", self.patience, lambda n: n >= 1),
            number("ema in [0, 1)", self.ema, lambda n: 0 <= n < 1),
            (
                f"accumulate from 1 to {TIMES_PER_BATCH}, whole",
                self.accumulate in pieces,
                self.accumulate,
            ),
        )

    def decay(self, columns_per_row: float) -> float:
        """Return the weight decay, by default :math:`(70 D / N)^2`, at most 0.5, given D / N."""
        if self.weight_decay is not None:
            return self.weight_decay
        return min(_MOST_DECAY, (_DECAY_FACTOR * columns_per_row) ** 2)

    def length(self, numbers: float) -> int:
        """Return the number of steps.

        Args:
            numbers: How many there are in all rows, N D, which decides where nothing else does.
        """
        if self.steps is not None:
            return self.steps
        return int(max(_FEWEST_STEPS, min(_MOST_STEPS, numbers / _NUMBERS_PER_STEP)))

    def rate(self, taken: int, length: float) -> float:
        """Return the learning rate after some steps: half a cosine, behind the warm-up.

        Args:
            taken: The number of steps taken.
            length: The number of steps of the run.
        """
        progress = taken / length
        warm = min(1.0, (taken + 1) / min(_RISE_STEPS, max(1.0, _RISE_SHARE * length)))
        return self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class HeldOutMonitor:
    """The loss of averaged weights on rows held out over time, their scores, and those to keep.

    Args:
        descent: The steps that average the weights, and the loss that they minimise.
        points: The points at which the loss is evaluated.
        density: What gives the density of rows held out, or None.
        callback: Called each time; it stops the run by returning True.

    Attributes:
        selection: Which weights are kept.
    """

    def __init__(
        self,
        descent: Descent,
        points: tuple[Points, ...],
        density: HeldOutDensity | None,
        callback: Callback | None,
    ) -> None:
        self.descent, self.objective, self.points = descent, descent.objective, points
        self.density, self.callback = density, callback
        self.stopped = False
        self.nats = ""  # to show
        self.total: list[Tensor] = []  # training losses since the last time
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.held_losses: list[float] = []
        self.selection = Selection()
        self.kept_values, self.kept_buffers = self._present()

    def look(self, step: int, rate: float, seconds: float) -> None:
        """Evaluate the averaged weights on rows held out, and keep them if they are to be."""
        process = self.objective.process
        with torch.no_grad(), self.descent.averaged():
            losses = self.objective.held_losses(self.points)
            found = None if self.density is None else self.density.scores()
            scores = process.agreed(Scores.equal(losses) if found is None else found)
            held = process.agreed(float(losses.mean()))
        recent = torch.stack(self.total).mean() if self.total else torch.tensor(math.nan)
        loss = float(process.mean(recent))
        if self.density is not None and found is not None and process.rank == 0:
            self.nats = self.density.text(scores)
        if self.selection.judge(step, scores):
            self.kept_values, self.kept_buffers = self._present()
        # Last of all: a run that is interrupted before looks again.
        self.steps.append(step)
        self.losses.append(loss)
        self.held_losses.append(held)
        self.total.clear()
        wanted: Any = False
        if self.callback is not None and process.rank == 0:
            state = TrainingState(step, self.losses[-1], held, rate, seconds)
            with self.descent.averaged(), evaluated(self.objective.network):
                wanted = self.callback(state)
        if getattr(wanted, "ndim", None) == 0:  # numpy's and torch's
            wanted = wanted.item()
        self.stopped = bool(process.agreed(float(wanted is True)))

    def _present(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return copies of the averaged weights and, as statistics may move, of the buffers."""
        values, buffers = self.descent.average, self.objective.network.buffers()
        return [v.clone() for v in values], [b.clone() for b in buffers]

    def use_kept(self) -> None:
        """Leave the averaged weights to keep in the network, and the buffers beside them."""
        assign(self.descent.parameters, self.kept_values)
        assign(list(self.objective.network.buffers()), self.kept_buffers)

    def check(self) -> None:
        """Raise an error if no look had a finite loss: then no weights were to be kept.

        Raises:
            NonFiniteError: If so.
        """
        if self.selection.steps and self.selection.best == math.inf:
            raise NonFiniteError(
                "the held-out loss was not finite at any look: the weights are those before the "
                "run. Look for wild rows or contexts among those held out"
            )

    def forgets(self, patience: float) -> bool:
        """Return whether what is learned no longer holds for rows held out: both measures say so.

        A few far rows lift the loss for long (a thin line with outliers came down from it in six
        times as many steps), and the density where it is narrow.

        Args:
            patience: The percentage of the steps up to the best look that may pass without one.
        """
        wander = _RISE_PER_COLUMN * self.objective.flow.event_dim
        risen = rises(self.steps, self.held_losses, patience, wander, _RISE)
        return risen and self.selection.is_worse(patience)

    def text(self, rate: float, skipped: int) -> str:
        """Return the step and the last losses in a few words."""
        text = f"step={self.steps[-1]:,} held-out={self.held_losses[-1]:.4g} rate={rate:.1e}"
        text = f"{text} skipped={skipped}" if skipped else text
        return f"{text}, {self.nats}" if self.nats else text

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors and numbers."""
        recent = torch.stack(self.total) if self.total else torch.zeros(0)
        scores, selected = self.selection.state()
        tensors = {"recent": recent, **scores, **numbered("best", self.kept_values)}
        tensors |= numbered("best_buffer", self.kept_buffers)
        names = ("steps", "losses", "held_losses")
        numbers = {name: getattr(self, name) for name in names} | {"selection": selected}
        return tensors, numbers | {"by_density": self.density is not None and self.density.judges}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take a state back; weights that were chosen by another rule stay until others are."""
        self.__dict__.update({name: numbers[name] for name in ("steps", "losses", "held_losses")})
        lowest = min(zip(self.held_losses, self.steps, strict=True), default=(0.0, 0))[1]
        selected = numbers.get("selection", {"kept_step": lowest})  # as version 0.1.0 chose
        self.selection.restore(tensors, selected)
        if self.density is not None:
            self.density.go_on(self.selection.best_values, judges=numbers.get("by_density", True))
        self.total = list(tensors["recent"].to(self.kept_values[0]).unbind())
        fill(self.kept_values, "best", tensors)
        if "best_buffer.0" in tensors:  # states of version 0.1.0 have none
            fill(self.kept_buffers, "best_buffer", tensors)


class Run:
    """A run of training: it leaves the averaged weights to keep in the network, whatever ends it.

    A run that gets worse on rows held out ends, and so does one that a keyboard interrupt meets;
    of several processes each is left by the interrupt, for it meets them in different places.

    Args:
        objective: The loss.
        batches: What gives the points of the steps, and tells its state.
        held: The points at which the held-out loss is evaluated.
        density: What gives the density of rows held out, or None.
        schedule: When to stop, and the learning rate on the way.
        clock: The time, which may have a limit.
        callback: Called at each look at rows held out; it stops the run by returning True.
        checkpoint: Where to keep the state, and what to resume from.

    Attributes:
        monitor: The losses.
        ended: What ended it: ``"schedule"``, ``"patience"``, ``"callback"``, ``"time"`` or
            ``"interrupt"``.
        done: The share of the schedule that is done.
    """

    def __init__(
        self,
        objective: Objective,
        batches: TableBatches | StreamBatches,
        held: tuple[Points, ...],
        density: HeldOutDensity | None,
        schedule: Schedule,
        clock: Clock,
        callback: Callback | None,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.batches, self.checkpoint, self.schedule = batches, checkpoint, schedule
        self.clock, self.seconds_before = clock, 0.0
        self.process, self.device = objective.process, objective.flow.loc.device
        columns, total = objective.flow.event_dim, self.process.agreed(batches.total)
        self.length = schedule.length(columns * total)
        # Networks of images share weights between pixels: rows per column say nothing of them.
        # MNIST, 20 minutes: FID 3.31 at a decay of 0.5, which the default would be, 1.85 without.
        of_images = image_shape(objective.network) is not None
        self.descent = Descent(
            objective,
            weight_decay=schedule.decay(0.0 if of_images else columns / total),
            ema=schedule.ema,
            pieces=schedule.accumulate,
        )
        self.monitor = HeldOutMonitor(self.descent, held, density, callback)
        self.done, self.next_look = 0.0, 0.0  # shares of the schedule
        self.ended = "schedule"
        if checkpoint is not None and checkpoint.tensors:
            self.restore(checkpoint.tensors, checkpoint.numbers)

    def to_the_end(self, *, progress: bool) -> None:
        """Take all steps.

        Args:
            progress: Whether to show a bar.

        Raises:
            NonFiniteError: If gradients stay non-finite; the weights kept are in the network.
            KeyboardInterrupt: If one meets one of several processes; the same holds.
        """
        progress = progress and self.process.rank == 0
        with percent_bar("fit", self.done, progress=progress) as show:
            try:
                with threads_for(self.descent.objective.network):
                    self._go(show)
                if self.descent.is_stuck():
                    self._look_back()
            except KeyboardInterrupt:
                if self.process.world > 1:  # no other process may be where this one is
                    raise
                self.ended = "interrupt"
                self._look_back()
                warn_user("the run was interrupted: the best weights so far are kept")
            finally:
                self.monitor.use_kept()
            self.descent.check()
            self.monitor.check()
            if self.done < 1:
                self._say_why(progress=progress)

    def outcome(self) -> tuple[Any, ...]:
        """Return the fields of :class:`~pyro_interpolant.training.FitResult` before the solver."""
        seen = self.monitor
        losses = seen.steps, seen.losses, seen.held_losses, seen.selection.kept_step
        return *losses, self.done < 1, self.ended, self.descent.skipped, self.seconds()

    def seconds(self) -> float:
        """Return the time spent, in this process and those it resumes."""
        return self.clock.spent() + self.seconds_before

    def rate(self) -> float:
        """Return the present learning rate."""
        return self.schedule.rate(self.descent.steps, self.length)

    def _go(self, show: Show) -> None:
        """Take steps to the end, show what looks see, and write the state when it is due."""
        going = self.done < 1 and self.ended == "schedule"
        while going:
            before = self.next_look
            going = self._advance()
            looked = self.next_look > before
            if looked:
                show(self.done, self.monitor.text(self.rate(), self.descent.skipped))
            if self.checkpoint is not None:
                every = self.checkpoint.every
                due = looked if every is None else not self.descent.steps % every
                if due or not going:
                    self.save(self.checkpoint)

    def _advance(self) -> bool:
        """Take a step, look if it is time, and return whether to go on."""
        monitor, points = self.monitor, self.batches.next()
        loss = self.descent(points, self.rate())
        if loss is not None:
            monitor.total.append(loss)
        elif self.descent.is_stuck():
            return False
        self.done = self.descent.steps / self.length
        is_over = self._is_over()
        if self.done < min(1.0, self.next_look) and not is_over:
            return True
        monitor.look(self.descent.steps, self.rate(), self.seconds())
        self.descent.draws = None  # a callback may have switched dropout on
        self._plan_look()
        if self.done >= 1:
            return False
        if monitor.stopped:
            self.ended = "callback"
        elif monitor.forgets(self.schedule.patience):
            self.ended = "patience"
        elif is_over:
            self.ended = "time"
        return self.ended == "schedule"

    def _plan_look(self) -> None:
        """Set when the next look is due, after one now; the first is at the first step."""
        way = min(_LOOK_SHARE, _LOOK_GROWTH * self.done)
        way = max(way, _LEAST_LOOK_STEPS / self.length)
        self.next_look = max(self.done + way, _WARMUP_SHARE)

    def _is_over(self) -> bool:
        """Return whether the limit of time is over, as the first of the processes sees it."""
        return self.clock.is_limited and bool(self.process.agreed(float(self.clock.is_over())))

    def _look_back(self) -> None:
        """Evaluate what came of the steps since the last look, where a run ends early."""
        if self.descent.steps not in self.monitor.steps[-1:]:
            self.monitor.look(self.descent.steps, self.rate(), self.seconds())

    def _say_why(self, *, progress: bool) -> None:
        """Say that a run stopped early, and why, in the log and beside a bar."""
        kept = self.monitor.selection.kept_step
        text = (
            f"fit stopped early at step {self.descent.steps}, {100 * self.done:.0f}% of its "
            f"schedule, by {self.ended}: the weights of step {kept} were kept"
        )
        _log.info(text)
        if progress:
            tell(text)

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the state, from the first of the processes."""
        if self.process.rank:
            return
        weights, counts = self.descent.state()
        best, looks = self.monitor.state()
        rows, place = self.batches.state()
        kept = buffers_of(self.monitor.objective.flow)
        tensors = {**weights, **best, **rows, **kept, "generator": rng_state(self.device)}
        numbers = {
            "run": {"step": self.descent.steps, **{name: getattr(self, name) for name in _PLACE}},
            "seconds": self.seconds(),
            "time_exponent": self.monitor.objective.exponent,
            "means": self.monitor.objective.means,
            "batches": place,
            "clip": counts,
            "looks": looks,
        }
        checkpoint.write(tensors, numbers)

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take a state back."""
        self.descent.restore(tensors, numbers["clip"])
        self.monitor.restore(tensors, numbers["looks"])
        self.__dict__.update({name: numbers["run"][name] for name in ("done", "ended")})
        self.next_look = numbers["run"].get("next_look", self.done + _LOOK_SHARE)
        if self.ended == "time":  # which a run that goes on has again
            self.ended = "schedule"
        self.seconds_before = numbers["seconds"]
        self.batches.restore(tensors, numbers["batches"])
        set_rng_state(tensors["generator"], self.device)
