"""Models that run one simulation at a time, where worker processes can import them."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch


def by_numpy(limit=10.0, y=None):
    """A simulator that leaves torch, and fails beyond a limit."""
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    if float(w) > limit:
        raise ZeroDivisionError("the population died out")
    value = torch.tensor([float(w), 1.0]) + torch.tensor(np.random.randn(2))
    return pyro.sample("y", dist.Delta(value, event_dim=1), obs=y)


def of_a_parameter(y=None):
    """Data that are a parameter of Pyro's."""
    shift = pyro.param("shift", torch.tensor(0.0))
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    value = torch.tensor(float(w)) * 0 + shift
    return pyro.sample("y", dist.Delta(value), obs=y)
