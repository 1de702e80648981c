"""A network in training or in evaluation, for the duration of a block."""

import contextlib
from collections.abc import Iterator

from torch import nn

from .velocity import fixed_weights


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
    flags, fixed = [p.requires_grad for p in network.parameters()], fixed_weights(network)
    for name, p in network.named_parameters():
        p.requires_grad = name not in fixed
    try:
        with _in_mode(network, train=True):
            yield
    finally:
        for p, flag in zip(network.parameters(), flags, strict=True):
            p.requires_grad = flag
            p.grad = None
