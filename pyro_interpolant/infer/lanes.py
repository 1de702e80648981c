"""Random numbers drawn under :func:`torch.func.vmap`, other ones in each lane."""

import math
import random
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch import is_functorch_tensor

_T = TypeVar("_T")
_IN_PLACE = {
    Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.cauchy_, Tensor.bernoulli_,
    Tensor.random_,
}  # fmt: skip


class DrawnInLanes(TorchFunctionMode):
    """Draw random numbers in place for every lane of a vmap, also into tensors without lanes.

    The call returns the drawn numbers; the original tensor cannot hold one value per lane, so it
    is filled with NaN, and a run of a model that reads it counts as none.

    Args:
        lane: A scalar that is another in each lane.
    """

    def __init__(self, lane: Tensor) -> None:
        super().__init__()
        self.lane = lane

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        """Call a function of torch, one that draws in place on a copy with lanes."""
        if (kwargs or {}).get("generator") is not None:
            # A run of its own draws the same from one that it seeds, each lane something else.
            raise TypeError("expected draws from torch's global generator, got one of its own")
        if func in _IN_PLACE:
            tensor, *others = args
            if is_functorch_tensor(tensor):
                return func(*args, **(kwargs or {}))
            if not tensor.is_floating_point():
                raise TypeError(f"expected to draw into floating numbers, got {tensor.dtype}")
            into = torch.zeros_like(tensor) + self.lane.to(tensor)
            tensor.fill_(math.nan)
            return func(into, *others, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def state_of_others() -> tuple[object, ...]:
    """Return the states of numpy's and Python's generators, from which all lanes draw at once."""
    state: Any = np.random.get_state()  # a name, words, and where it is in them
    return state[1].tobytes(), state[2:], random.getstate()


def in_lanes(function: Callable[..., _T], count: int, *batches: Tensor | dict[str, Tensor]) -> _T:
    """Return what a function returns in each lane of a vmap, all of them drawing other numbers.

    Args:
        function: Of one row of each of the batches.
        count: The number of lanes.
        *batches: Tensors, shape ``(count, *)``, or dictionaries of them.
    """

    def one(lane: Tensor, *rows: Tensor | dict[str, Tensor]) -> _T:
        with DrawnInLanes(lane):
            return function(*rows)

    return torch.func.vmap(one, randomness="different")(torch.zeros(count), *batches)
