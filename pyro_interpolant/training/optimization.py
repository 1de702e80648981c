r"""Optimisation: one step of the regression, for whoever minimises it.

A step is backward, clip, AdamW, average: the gradient is clipped at twice the running mean of its
norm, and a moving average follows the weights. Steps whose loss or gradient is not finite are
skipped, and counted.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import draws, draws_nothing
from ..distributions.interpolant import AnyDistribution
from .objective import Objective
from .paths import Points

_MOST_SKIPPED_STEPS = 20
_CLIP_RATIO = 2.0  # of the gradient's norm to its running mean
_NORM_DECAY, _NORM_WEIGHT = 0.98, 0.02  # of that mean, and what the last norm adds
_COUNTS = ("skipped", "consecutive", "taken", "running")


class NonFiniteError(RuntimeError):
    """Steps without a finite gradient ended a run.

    Attributes:
        distribution: With the last good weights, where the caller has none of his own.
    """

    distribution: AnyDistribution | None = None


class Descent:
    """Steps of AdamW on an objective, with clipped gradients and averaged weights.

    Args:
        objective: What is minimised over the weights of its network, by its process, or by several
            that take the same steps.
        weight_decay: AdamW's.
        ema: The decay of the average per step.
        pieces: In how many, at most, the points of a step are evaluated, one after the other.

    Attributes:
        average: The exponential moving average of the weights, of their shapes.
        skipped: The number of steps without a finite gradient.
        consecutive: The number of those since the last one taken.
        taken: The number of the others.
        running: The running mean of the gradient's norm.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        weight_decay: float = 0.0,
        ema: float = 0.999,
        pieces: int = 1,
    ) -> None:
        self.objective, self.pieces, self.ema = objective, int(pieces), ema
        parts = list(objective.network.parameters())
        self.parameters = [p for p in parts if p.requires_grad]
        self.fixed = [p for p in parts if not p.requires_grad]  # which the others were trained on
        self.process = objective.process
        self.process.set_up(objective, self.parameters, weight_decay)
        self.average = [p.detach().clone() for p in self.parameters]
        self.skipped = self.consecutive = self.taken = 0
        self.running = math.inf
        self.draws: bool | None = None  # whether the network draws random numbers

    @property
    def steps(self) -> int:
        """The number of steps, those that were skipped too."""
        return self.taken + self.skipped

    def __call__(self, points: tuple[Points, ...], learning_rate: float) -> Tensor | None:
        """Take a step, and return the loss before it, a scalar; None if it had to be skipped."""
        if self.draws is None:  # by the first step after a look: dropout does so in each
            before = draws()
            loss = self._step(points, learning_rate)
            self.draws = draws() > before
            return loss
        with contextlib.nullcontext() if self.draws else draws_nothing():
            return self._step(points, learning_rate)

    def _step(self, points: tuple[Points, ...], learning_rate: float) -> Tensor | None:
        process = self.process
        process.optimizer.param_groups[0]["lr"] = learning_rate
        loss = process.backward(in_pieces(points, self.pieces))
        if not self._clip(loss):
            process.skip()
            return None
        process.step()
        # Faster in the first steps.
        decay = min(self.ema, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return loss

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the average into the network for the duration of a block."""
        present = [p.detach().clone() for p in self.parameters]
        assign(self.parameters, self.average)
        try:
            yield
        finally:
            assign(self.parameters, present)

    def _clip(self, loss: Tensor) -> bool:
        """Clip the present gradient, and return whether it and the loss are finite."""
        limit = _CLIP_RATIO * self.running
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = self.process.norm(gradients, loss)
        if not math.isfinite(norm):
            self.skipped += 1
            self.consecutive += 1
            return False
        if norm > limit:
            torch._foreach_mul_(gradients, limit / norm)
        self.consecutive = 0
        self.taken += 1
        new = min(norm, limit)
        if self.running == math.inf:
            self.running = new
        else:
            self.running = _NORM_DECAY * self.running + _NORM_WEIGHT * new
        return True

    def is_stuck(self) -> bool:
        """Return whether too many steps in a row had no finite gradient."""
        return self.consecutive >= _MOST_SKIPPED_STEPS

    def check(self) -> None:
        """Raise an error if the last steps, or all, were without a finite gradient.

        Raises:
            NonFiniteError: If so.
        """
        if self.is_stuck() or (self.skipped and not self.taken):
            raise NonFiniteError(
                f"the gradient was not finite for {self.consecutive} steps in a row, the last at "
                f"step {self.steps}: the last good weights were kept. Lower learning_rate, or "
                "look for wild rows."
            )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors and numbers."""
        states = [self.process.optimizer.state.get(p, {}) for p in self.parameters]
        moments = {
            f"{name}.{i}": state[name]
            for i, state in enumerate(states)
            for name in ("exp_avg", "exp_avg_sq", "step")
            if state
        }
        return {
            **numbered("weight", self.parameters),
            **numbered("fixed", self.fixed),
            **numbered("average", self.average),
            **moments,
        }, {name: getattr(self, name) for name in _COUNTS}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take a state back."""
        fill(self.parameters, "weight", tensors)
        if "fixed.0" in tensors:  # states of a time before have none
            fill(self.fixed, "fixed", tensors)
        fill(self.average, "average", tensors)
        for i, p in enumerate(self.parameters):
            if f"step.{i}" in tensors:
                self.process.optimizer.state[p] = {
                    name: tensors[f"{name}.{i}"].to(p.device)
                    for name in ("step", "exp_avg", "exp_avg_sq")
                }
        for name in _COUNTS:
            setattr(self, name, numbers[name])


def in_pieces(points: tuple[Points, ...], count: int) -> list[tuple[float, tuple[Points, ...]]]:
    """Return the points of a step in pieces of whole groups of a time, and each one's share.

    Args:
        points: The points, shape ``(T, *, D)``.
        count: The most pieces, at most T of which there are.
    """
    if count == 1:
        return [(1.0, points)]
    groups = torch.arange(len(points[0].w)).tensor_split(min(count, len(points[0].w)))
    return [
        (len(some) / len(points[0].w), tuple(part.at(some) for part in points)) for some in groups
    ]


def numbered(name: str, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return values of any shapes under their name and number."""
    return {f"{name}.{i}": value for i, value in enumerate(values)}


def fill(values: Sequence[Tensor], name: str, tensors: Mapping[str, Tensor]) -> None:
    """Copy numbered tensors of any shapes into values of the same shapes."""
    assign(values, [tensors[f"{name}.{i}"] for i in range(len(values))])


def assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy values into weights of the same shapes."""
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
