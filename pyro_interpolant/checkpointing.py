r"""Memory for time: gradients that recompute what they need."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["recomputed"]


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the same function, which keeps its arguments alone for the way back.

    Gradients of any order are those of plain back-propagation, with respect to the arguments and
    to whatever the function closes over. Inside :mod:`torch.func`, which has no hooks on saved
    tensors, and while tracing, the function is called as it is.
    """

    def call(*args: Tensor) -> Tensor:
        in_transform = torch._C._functorch.peek_interpreter_stack() is not None
        if in_transform or not torch.is_grad_enabled() or torch._C._get_tracing_state():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False)

    return call
