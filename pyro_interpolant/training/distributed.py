r"""Processes: this one alone, or one of several under a Lightning Fabric.

Several processes hold the same weights and draw the same numbers. Each computes the loss of its
own share of a batch; Fabric averages the gradients, so every process takes the step that one
process with the whole batch would take.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_NEEDED = ("setup", "backward", "broadcast", "all_reduce", "barrier", "global_rank", "world_size")
_TYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
Value = TypeVar("Value")


class Process:
    """One process, or one of several.

    Args:
        fabric: A ``lightning_fabric.Fabric``, launched, or None for this process alone.
        own_rows: Whether each process has rows of its own in a batch, and not those of all.

    Attributes:
        rank: The number of this process.
        world: The number of processes.
        device: Where this process computes, or None for where the flow is.
        factor: What the loss of this process counts for in their mean: 1 where all have as many
            rows, of as much weight.

    Raises:
        TypeError: If ``fabric`` is not a Fabric.
    """

    def __init__(self, fabric: "Fabric | None" = None, *, own_rows: bool = False) -> None:
        missing = [] if fabric is None else [n for n in _NEEDED if not hasattr(fabric, n)]
        if missing:
            raise TypeError(
                f"expected fabric to be a lightning_fabric.Fabric, got {type(fabric).__name__} "
                f"without {', '.join(missing)}"
            )
        self.fabric: Any = fabric
        self.own_rows = own_rows
        self.rank: int = 0 if fabric is None else fabric.global_rank
        self.world: int = 1 if fabric is None else fabric.world_size
        self.factor = 1.0
        self.device: torch.device | None = None if fabric is None else fabric.device

    def seed(self, seed: int | None) -> int | None:
        """Return the seed of all processes: the given one, or, for several, a new one."""
        if seed is not None or self.world == 1:
            return seed
        return int(self.fabric.broadcast(int(torch.randint(2**62, ()))))

    def agreed(self, value: Value) -> Value:
        """Return the first process's value, to every process."""
        return value if self.world == 1 else self.fabric.broadcast(value)

    def gathered(self, value: Value) -> list[Value]:
        """Return the values of all processes, in their order, to every process."""
        if self.world == 1:
            return [value]
        return [self.fabric.broadcast(value, src=rank) for rank in range(self.world)]

    def check_same(self, what: str, value: object, advice: str) -> None:
        """Raise a ValueError, in all processes, unless all have the same value.

        Args:
            what: What it is.
            value: That of this process.
            advice: What to do where they differ.
        """
        found = self.gathered(value)
        if any(other != found[0] for other in found):
            raise ValueError(
                f"expected the same {what} in all processes, got {', '.join(map(str, found))} in "
                f"processes 0 to {self.world - 1}: {advice}"
            )

    def agree(self, values: Iterable[Tensor]) -> None:
        """Copy the first process's values of any shapes over those of every process."""
        for value in values:
            value.copy_(self.agreed(value))

    def share(self, sample: Callable[[int], Tensor], count: int) -> Tensor:
        """Return this process's share of what all draw together, ``(count, D)``.

        Args:
            sample: From a number to so many draws, the same in every process.
            count: How many rows this process has in a batch.
        """
        if not self.own_rows:
            return sample(count)
        return sample(count * self.world).chunk(self.world)[self.rank]

    def set_up(
        self,
        objective: nn.Module,
        parameters: Sequence[Tensor],
        weight_decay: float = 0.0,
    ) -> None:
        """Make the optimiser of a loss, and let Fabric wrap both.

        Args:
            objective: A module that owns the network, from a function without arguments to the
                loss at what it returns.
            parameters: The weights to train, of any shapes.
            weight_decay: AdamW's.

        Raises:
            ValueError: If Fabric would turn the weights into another type.
        """
        self._check_type(parameters[0].dtype)
        self.module: nn.Module = objective
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            list(parameters), betas=(0.9, 0.99), weight_decay=weight_decay,
            fused=self._scaler() is None,
        )  # fmt: skip
        if self.fabric is not None:
            self.module, self.optimizer = self.fabric.setup(self.module, self.optimizer)

    def _check_type(self, dtype: torch.dtype) -> None:
        precision: str = getattr(getattr(self.fabric, "_precision", None), "precision", "")
        if _TYPES.get(precision, dtype) != dtype:
            raise ValueError(
                f"expected a fabric that leaves weights in their type, {dtype}, got precision "
                f"{precision!r}: take a mixed one, or give distribution and rows in another type"
            )

    def backward(self, pieces: Sequence[tuple[float, Any]]) -> Tensor:
        """Set the gradients of the loss at points, the processes' mean; return this one's part.

        Args:
            pieces: Points, evaluated one after the other, and each one's share of the loss.
        """
        for p in self.optimizer.param_groups[0]["params"]:  # what zero_grad does, in less time
            p.grad = None
        losses = []
        for i, (share, given) in enumerate(pieces):
            with self._synchronised(at_once=i == len(pieces) - 1):
                loss = self.module(lambda given=given: given)
                share *= self.factor
                loss = loss if share == 1 else share * loss
                if self.fabric is None:
                    loss.backward()
                else:
                    self.fabric.backward(loss)
            losses.append(loss.detach())
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _synchronised(self, *, at_once: bool) -> contextlib.AbstractContextManager[Any]:
        """Return a scope in which processes average gradients at once, or leave it for later."""
        if self.fabric is None or at_once:
            return contextlib.nullcontext()
        return self.fabric.no_backward_sync(self.module)

    def norm(self, gradients: list[Tensor], loss: Tensor) -> float:
        """Return the norm of the gradients, not finite where the loss is not."""
        if self._scaler() is not None:  # Fabric undoes its own scaling first
            limit = {"max_norm": math.inf, "error_if_nonfinite": False}
            self.fabric.clip_gradients(self.module, self.optimizer, **limit)
        norms = list(torch._foreach_norm(gradients))
        if self.world == 1:  # of several, the loss of one alone must not part their ways
            norms.append(0 * loss)
        return float(torch.stack(norms).norm())

    def step(self) -> None:
        """Take the step."""
        self.optimizer.step()

    def skip(self) -> None:
        """Take none; a scaler, which would take none either, learns of it."""
        if self._scaler() is not None:
            self.optimizer.step()

    def mean(self, value: Tensor) -> Tensor:
        """Return the mean of a value over the processes."""
        return value if self.world == 1 else self.fabric.all_reduce(value, reduce_op="mean")

    def _scaler(self) -> Any:
        return getattr(getattr(self.fabric, "_precision", None), "scaler", None)
