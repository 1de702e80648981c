"""Threads that train at the same time, each with a seed of its own."""

import copy
import threading
import time

import pyro.distributions as dist
import pytest
import torch
from cases import slow_but
from torch import nn

from pyro_interpolant import (
    InterpolantDistribution,
    InterpolantTransform,
    VelocityMLP,
    fit,
    from_samples,
)

pytestmark = pytest.mark.usefixtures("_small_runs")
QUICK = {"seed": 0, "steps": 40, "batch_size": 32, "tolerance": 0.1, "progress": False}


class Dropping(VelocityMLP):
    def forward(self, t, x, context=None):
        return super().forward(t, nn.functional.dropout(x, 0.2, self.training), context)


X = torch.arange(600).reshape(300, 2).double().cos() + torch.tensor([1.0, 2.0])


def learned():
    return lambda: from_samples(X, **QUICK)


def fitted(kind, base=None):
    """Return a function that trains a copy of one flow, whose weights are drawn now."""
    start = InterpolantDistribution(InterpolantTransform(kind(2, (16, 16))), base)

    def train():
        distribution = copy.deepcopy(start)
        fit(distribution, X, **QUICK)
        return distribution

    return train


RUNS = {
    "from_samples": learned,
    "a base of Pyro's": lambda: fitted(
        VelocityMLP, dist.StudentT(5.0, torch.zeros(2), 1.0).to_event(1)
    ),
    "dropout": lambda: fitted(Dropping),
}


@pytest.mark.parametrize("run", slow_but(RUNS, "from_samples"))
def test_a_seeded_run_in_a_thread_ends_in_the_weights_of_one_alone(run):
    train, found, drawn = RUNS[run](), {}, []
    expected = train().transform.state_dict()

    def work(i):
        found[i] = train().transform.state_dict()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    torch.manual_seed(5)
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        drawn.append(torch.randn(()))
        time.sleep(1e-3)
    torch.manual_seed(5)
    assert all(torch.equal(d, torch.randn(())) for d in drawn)
    assert len(drawn) > 10
    for weights in found.values():
        assert all(torch.equal(weights[k], v) for k, v in expected.items())
    assert len(found) == 2
