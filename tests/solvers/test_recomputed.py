import os
import subprocess
import sys
import warnings

import pytest
import torch
from cases import random_flow, slow_but
from torch.func import grad, vmap

from pyro_interpolant import (
    Adaptive,
    ConditionalInterpolantDistribution,
    FixedGrid,
    HutchinsonDivergence,
    InterpolantDistribution,
)
from pyro_interpolant._torch import recomputed

PAIRS = {
    "rk4": (FixedGrid(6), FixedGrid(6, checkpoint=True)),
    "adaptive": (Adaptive(nodes=6), Adaptive(nodes=6, checkpoint=True)),
}
NETWORKS = {"two": (16, 16), "residual": (8, 8, 8)}


def gradients(distribution, solver, x, context):
    distribution.transform.solver = solver
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
    weights = list(distribution.transform.velocity.parameters())
    value = distribution.condition(context).log_prob(x)
    return value, torch.autograd.grad(value.square().sum(), [x, context, *weights])


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("hidden", slow_but(NETWORKS, "two"))
@pytest.mark.parametrize("per_row", [True, False])
def test_gradients_are_those_of_plain_back_propagation(name, hidden, per_row):
    flow = random_flow(3, NETWORKS[hidden], context_dim=2)
    distribution, x = ConditionalInterpolantDistribution(flow), torch.randn(5, 3)
    context = torch.randn(5, 2) if per_row else torch.randn(2)
    plain, again = (gradients(distribution, solver, x, context) for solver in PAIRS[name])
    assert torch.equal(plain[0], again[0])
    assert all(g.abs().max() > 0 for g in again[1][:2])
    for a, b in zip(plain[1], again[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("divergence", [None, HutchinsonDivergence(2)])
def test_gradients_through_samples_too(divergence):
    flow, results = random_flow(3, divergence=divergence), []
    for solver in PAIRS["rk4"]:
        flow.solver = solver
        torch.manual_seed(0)
        x, value = InterpolantDistribution(flow).rsample_and_log_prob((4,))
        loss = (value + x.sum(-1)).sum()
        results.append(torch.autograd.grad(loss, list(flow.velocity.parameters())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_second_derivatives():
    flow, values = random_flow(2), []
    for solver in PAIRS["rk4"]:
        flow.solver = solver
        hessian = torch.autograd.functional.hessian
        x = torch.randn(2, generator=torch.Generator().manual_seed(0))
        values.append(hessian(InterpolantDistribution(flow).log_prob, x))
    torch.testing.assert_close(values[0], values[1], rtol=1e-9, atol=1e-9)


def test_torch_func_and_tracing_go_the_plain_way():
    flow = random_flow(2, solver=FixedGrid(4, checkpoint=True)).requires_grad_(requires_grad=False)
    distribution, x = InterpolantDistribution(flow, validate_args=False), torch.randn(3, 2)
    by_row = vmap(grad(distribution.log_prob))(x)
    torch.testing.assert_close(by_row, distribution.score(x), rtol=1e-9, atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(distribution.log_prob, x, check_trace=False)
    y = torch.randn(3, 2)
    torch.testing.assert_close(traced(y), distribution.log_prob(y))


def test_the_function_runs_again_on_the_way_back_alone():
    calls = []

    def double(x):
        calls.append(torch.is_grad_enabled())
        return 2 * x.square()

    x = torch.ones(3, requires_grad=True)
    y = recomputed(double)(x)
    assert len(calls) == 1
    y.sum().backward()
    assert len(calls) == 2
    assert torch.equal(x.grad, torch.full((3,), 4.0))
    with torch.no_grad():
        recomputed(double)(x)
    assert len(calls) == 3


MEMORY = """
import os, re, torch
import pyro_interpolant as pi
def most():  # this program's own most: ru_maxrss can start with that of the one that forked it
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
torch.set_num_threads(1)
for checkpoint in (False, True):
    if os.fork():
        os.wait()
        continue
    solver = pi.FixedGrid(30, checkpoint=checkpoint)
    distribution = pi.InterpolantDistribution(
        pi.interpolant_transform(8, (128, 128), solver=solver)
    )
    distribution.log_prob(torch.randn(2, 8)).sum().backward()
    before = most()
    distribution.log_prob(torch.randn(800, 8)).sum().backward()
    print(most() - before, flush=True)
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_saved():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY],
        # Freed blocks go back at once, and do not count by chance: 64 to 132 MB without.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    plain, saved = map(int, done.stdout.split())
    assert saved < plain / 4
