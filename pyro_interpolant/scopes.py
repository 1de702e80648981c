r"""Scopes: who differentiates, a generator seeded apart, a network that may be trained."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["evaluated", "is_transformed", "is_watched", "seeded", "trainable"]


def is_transformed() -> bool:
    """Return whether :mod:`torch.func`, forward mode or a tracer sees what is computed now."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_watched() -> bool:
    """Tell whether autograd or a functorch transform may look back at what is computed now.

    Where none does, buffers may be written over.
    """
    return torch.is_grad_enabled() or is_transformed()


@contextlib.contextmanager
def seeded(seed: int | None, device: torch.device | None = None) -> Iterator[None]:
    """Draw from a generator seeded apart, on a device too, and leave the global one as it was."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[] if device is None or device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def evaluated(network: nn.Module) -> Iterator[None]:
    """Let a network be evaluated, dropout off, then restore the mode of each of its parts."""
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
    """Let a network be trained, then restore who was frozen."""
    flags = [p.requires_grad for p in network.parameters()]
    network.requires_grad_(requires_grad=True)
    try:
        with _in_mode(network, train=True):
            yield
    finally:
        for p, flag in zip(network.parameters(), flags, strict=True):
            p.requires_grad = flag
            p.grad = None
