r"""Torch's private parts and global state: what the package needs of them, in one file.

Whether autograd, :mod:`torch.func` or a tracer sees a computation; scopes with a generator of
their own, or with a network in another mode; activations recomputed in the backward pass;
derivatives :math:`\partial_t f(t)` by forward mode; and warnings at the user's line.
"""

import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import jvp
from torch.utils.checkpoint import checkpoint

# No warning is raised at lines of this package, of torch, or of what runs decorated functions.
_NOT_THE_USERS = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__)) + (
    contextlib.__file__,
)


def is_transformed() -> bool:
    """Return whether :mod:`torch.func`, forward mode or a tracer is active."""
    return (
        is_functional()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_functional() -> bool:
    """Return whether a transform of :mod:`torch.func` is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_watched() -> bool:
    """Return whether autograd, :mod:`torch.func` or a tracer may need intermediate results.

    Where none does, they may be overwritten in place.
    """
    return torch.is_grad_enabled() or is_transformed()


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed the generators of all devices in use, and restore their states afterwards.

    Args:
        seed: The seed; None leaves the generators as they are.
    """
    if seed is None:
        yield
        return
    in_use = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(in_use)):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def evaluated(network: nn.Module) -> Iterator[None]:
    """Set a network to evaluation, dropout off, and restore the mode of each part afterwards."""
    with _in_mode(network, train=False):
        yield


@contextlib.contextmanager
def _in_mode(network: nn.Module, *, train: bool) -> Iterator[None]:
    modes = [(module, module.training) for module in network.modules()]
    network.train(train)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def trainable(network: nn.Module) -> Iterator[None]:
    """Set a network to training, with gradients, and restore its modes and flags afterwards."""
    flags = [p.requires_grad for p in network.parameters()]
    network.requires_grad_(requires_grad=True)
    try:
        with _in_mode(network, train=True):
            yield
    finally:
        for p, flag in zip(network.parameters(), flags, strict=True):
            p.requires_grad = flag
            p.grad = None


def recomputed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the same function, which stores only its arguments for the backward pass.

    Gradients of any order are those of plain back-propagation, with respect to the arguments and
    to whatever the function closes over. Inside :mod:`torch.func`, which has no hooks on saved
    tensors, and while tracing, the function is called as it is.
    """

    def call(*args: Tensor) -> Tensor:
        if is_functional() or not torch.is_grad_enabled() or torch._C._get_tracing_state():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False)

    return call


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Make the C library keep freed memory, by one block that is larger than those to come.

    Until it has seen one of a few MiB, glibc returns every freed piece to the system at once, and
    getting it back, page by page, takes as long as the arithmetic.
    """
    torch.empty(2**24, dtype=torch.uint8)


def constant(values: np.ndarray) -> Tensor:
    """Return numbers as a tensor of their own, on the CPU and of the array's type and shape.

    What is computed once and shared is kept as numpy arrays. A tensor made inside
    :mod:`torch.func`, ``torch.export``, inference mode or ``torch.device("meta")`` belongs there,
    and would break, or be broken by, whoever meets it outside.
    """
    return torch.from_numpy(values.copy())  # wherever the default device is


def is_tracing() -> bool:
    """Return whether a tracer records what is computed now: for ``torch.jit`` or a compiler."""
    return torch._C._get_tracing_state() is not None or is_compiling()


def is_compiling() -> bool:
    """Return whether tensors may be without values: for ``torch.compile``, ``torch.export``, ..."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def is_functorch_tensor(x: Tensor) -> bool:
    """Return whether a tensor, of any shape, lives inside ``torch.func.grad``, ``vmap``, ..."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def has_other_leaves(y: Tensor, x: Tensor) -> bool:
    """Return whether the graph of y leads to a leaf that requires a gradient, other than x."""
    seen, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", x) is not x:
            return True
        stack.extend(above for above, _ in node.next_functions)
    return False


def innermost(x: Tensor) -> Tensor:
    """Return the plain tensor inside all wrappers of ``torch.func.grad``, ``vmap``, ..."""
    while is_functorch_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def slopes(
    function: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], t: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the derivatives of a function of t by forward mode, each of the shape of t."""
    if torch.is_inference_mode_enabled():  # which drops tangents silently
        with torch.inference_mode(mode=False):
            return slopes(function, t.clone())
    tangent = torch.ones_like(t)
    if is_functional() or forward_ad._current_level >= 0:
        return jvp(function, (t,), (tangent,))[1]
    with forward_ad.dual_level():  # the same at a third of the price; it cannot be nested
        found = map(forward_ad.unpack_dual, function(forward_ad.make_dual(t, tangent)))
        a, b, g = (torch.zeros_like(t) if s.tangent is None else s.tangent for s in found)
        return a, b, g


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside the package, and outside torch's decorators, that led here.

    Args:
        message: What is wrong, and what to do.
        category: The kind of the warning.
    """
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
