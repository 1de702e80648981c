"""Models to learn guides from by simulation, where worker processes can import them."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch

ROWS = 4
QUICK = {"progress": False, "seed": 0, "options": {"steps": 40}}


def rows_of_a_normal(y=None):
    """Location N(0, 2^2), rows N(location, 1)."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", ROWS):
        y = pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    pyro.deterministic("mean", y.mean(-1))
    pyro.deterministic("first", y[..., 0])


def rows_with_errors(y=None):
    """Location N(0, 2^2), rows about it with an error of their own each."""
    loc = pyro.sample("loc", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", ROWS):
        pyro.sample("y", dist.Normal(loc, torch.linspace(0.5, 2.0, ROWS)), obs=y)


def rows_with_gaps(y=None, there=None):
    """Location N(0, 1), rows N(location, 1), of which one half are there."""
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 6):
        there = pyro.sample("there", dist.Bernoulli(0.5), obs=there)
        y = pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
    pyro.deterministic("seen", torch.stack((y * there, there), -1))


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
