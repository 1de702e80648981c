"""A network is trained in a block, and is as it was afterwards; what was frozen in it stays."""

import contextlib

import pytest
import torch
from torch import nn

from pyro_interpolant.nn.modes import trainable


@pytest.mark.parametrize(("frozen", "error"), [("none", True), ("bias", False), ("all", True)])
def test_a_network_that_was_trained_in_a_scope_is_as_it_was(frozen, error):
    network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).eval()
    network[1].train()
    network[0].weight.requires_grad_(requires_grad=frozen != "all")
    network[0].bias.requires_grad_(requires_grad=frozen == "none")
    flags = [p.requires_grad for p in network.parameters()]
    with contextlib.suppress(KeyError), trainable(network):
        assert all(module.training for module in network.modules())
        network(torch.ones(3, 2)).sum().backward()
        assert network[0].weight.grad is not None
        assert (network[0].bias.grad is None) == (frozen == "bias")
        if error:
            raise KeyError
    assert [module.training for module in network.modules()] == [False, False, True]
    assert [p.requires_grad for p in network.parameters()] == flags
    assert all(p.grad is None for p in network.parameters())
