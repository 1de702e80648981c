r"""What takes the steps: this process alone, or one of several under a Lightning Fabric.

Several processes hold the same weights and draw the same numbers. Each computes the loss of its
own share of a batch; the engine averages the gradients, so every process takes the step that one
process with the whole batch would take.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["Engine"]


_NEEDED = ("setup", "backward", "broadcast", "all_reduce", "barrier", "global_rank", "world_size")
_TYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16, "64-true": torch.float64}
Value = TypeVar("Value", int, float, Tensor)


class _Loss(nn.Module):
    """A loss as a module that owns the network, for an engine to wrap."""

    def __init__(self, network: nn.Module, loss: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, draw: Callable[[], Any]) -> Tensor:
        """Return the loss of what a function returns: engines round the tensors they are given."""
        return self.loss(draw())


class Engine:
    """One process, or one of several.

    Args:
        fabric: A ``lightning_fabric.Fabric``, launched, or None for this process alone.

    Attributes:
        rank: The number of this process.
        world: The number of processes.

    Raises:
        TypeError: If ``fabric`` is not a Fabric.
    """

    def __init__(self, fabric: Any = None) -> None:
        missing = [] if fabric is None else [n for n in _NEEDED if not hasattr(fabric, n)]
        if missing:
            raise TypeError(
                f"expected fabric to be a lightning_fabric.Fabric, got {type(fabric).__name__} "
                f"without {', '.join(missing)}"
            )
        self.fabric = fabric
        self.rank: int = 0 if fabric is None else fabric.global_rank
        self.world: int = 1 if fabric is None else fabric.world_size
        self.module: Any = None
        self.optimizer: Any = None

    def place(self, distribution: Any) -> None:
        """Move a distribution to where the engine computes."""
        if self.fabric is not None:
            distribution.to(self.fabric.device)

    def seed(self, seed: int | None) -> int | None:
        """Return the seed of all processes: the given one, or, for several, a new one."""
        if seed is not None or self.world == 1:
            return seed
        return int(self.fabric.broadcast(int(torch.randint(2**62, ()))))

    def agreed(self, value: Value) -> Value:
        """Return the first process's value, to every process."""
        return value if self.world == 1 else self.fabric.broadcast(value)

    def agree(self, values: Iterable[Tensor]) -> None:
        """Copy the first process's values of any shapes over those of every process."""
        for value in values:
            value.copy_(self.agreed(value))

    def set_up(
        self,
        network: nn.Module,
        loss: Callable[[Any], Tensor],
        parameters: Sequence[Tensor],
        learning_rate: float,
        weight_decay: float = 0.0,
    ) -> None:
        """Make the optimiser, and let the engine wrap it and the loss.

        Raises:
            ValueError: If the engine would turn the weights into another type.
        """
        self._check_type(parameters[0].dtype)
        self.module = _Loss(network, loss)
        self.optimizer = torch.optim.AdamW(
            list(parameters), lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay,
            fused=self._scaler() is None,
        )  # fmt: skip
        if self.fabric is not None:
            self.module, self.optimizer = self.fabric.setup(self.module, self.optimizer)

    def _check_type(self, dtype: torch.dtype) -> None:
        precision: Any = getattr(getattr(self.fabric, "_precision", None), "precision", None)
        if _TYPES.get(precision, dtype) != dtype:
            raise ValueError(
                f"expected a fabric that leaves weights in their type, {dtype}, got precision "
                f"{precision!r}: take a mixed one, or give distribution and rows in another type"
            )

    def backward(self, given: Any) -> Tensor:
        """Set the gradients of the loss of something, the processes' mean; return the loss."""
        loss = self.module(lambda: given)
        for p in self.optimizer.param_groups[0]["params"]:  # what zero_grad does, in less time
            p.grad = None
        if self.fabric is None:
            loss.backward()
        else:
            self.fabric.backward(loss)
        return loss.detach()

    def norm(self, gradients: list[Tensor], loss: Tensor) -> float:
        """Return the norm of the gradients, not finite where the loss is not."""
        if self._scaler() is not None:  # the engine undoes its own scaling first
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
