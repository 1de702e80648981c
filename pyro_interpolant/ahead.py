r"""Points of the coming steps, and their place among all draws."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .losses import Points
from .objective import Objective

__all__ = ["Ahead"]


class Ahead:
    """The points of the coming steps: paths and their rates are evaluated for many at once.

    One batch of few dimensions takes as long as eight.

    Args:
        objective: What draws times, base draws and noise, and evaluates paths.
        batches: What gives rows.
    """

    def __init__(self, objective: Objective, batches: Any) -> None:
        self.objective, self.batches = objective, batches
        self.count = batches.at_once if objective.is_plain() else 1
        self.points: list[tuple[Points, ...]] = []
        self.before: tuple[dict[str, Tensor], dict[str, Any]] = {}, {}

    def next(self) -> tuple[Points, ...]:
        """Return the points of the next step."""
        if not self.points:
            if self.count > 1:  # the place of a stream may be slow to tell
                self.before = self._place()
            self._draw()
        return self.points.pop(0)

    def _draw(self) -> None:
        draw = self.objective.draw
        draws = [draw(self.batches.next()) for _ in range(self.count)]
        with torch.no_grad():  # steps must not share a graph
            self.points = self.objective.points(draws)

    def _place(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = self.batches.state()
        return {**tensors, "before": torch.get_rng_state()}, numbers

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state before what is still to come was drawn, and how much that is."""
        tensors, numbers = self.before if self.points else self._place()
        return tensors, {**numbers, "left": len(self.points)}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take a state back."""
        self.batches.restore(tensors, numbers)
        if numbers["left"]:
            torch.set_rng_state(tensors["before"])
            self.before = self._place()
            self._draw()
            self.points = self.points[-numbers["left"] :]
