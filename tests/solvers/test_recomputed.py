import warnings

import pytest
import torch
from cases import random_flow
from torch.func import grad, vmap

from pyro_interpolant import (
    Adaptive,
    ConditionalInterpolantDistribution,
    FixedGrid,
    HutchinsonDivergence,
    InterpolantDistribution,
)

PAIRS = {
    "rk4": (FixedGrid(6), FixedGrid(6, checkpoint=True)),
    "adaptive": (Adaptive(nodes=6), Adaptive(nodes=6, checkpoint=True)),
}


def gradients(distribution, solver, x, context):
    distribution.transform.solver = solver
    x, context = x.clone().requires_grad_(), context.clone().requires_grad_()
    weights = list(distribution.transform.velocity.parameters())
    value = distribution.condition(context).log_prob(x)
    return value, torch.autograd.grad(value.square().sum(), [x, context, *weights])


@pytest.mark.parametrize(
    ("name", "hidden", "per_row"),
    [("rk4", (16, 16), True), ("rk4", (8, 8, 8), False), ("adaptive", (16, 16), False)],
)
def test_gradients_are_those_of_plain_back_propagation(name, hidden, per_row):
    flow = random_flow(3, hidden, context_dim=2)
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


def kept_elements(solver):
    """Return how many elements the graph of a density keeps for the way back."""
    flow, kept = random_flow(4, (32, 32), solver=solver), {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        InterpolantDistribution(flow).log_prob(torch.randn(200, 4))
    return sum(tensor.numel() for tensor in kept.values())


def test_memory_is_saved():
    plain, saved = (kept_elements(FixedGrid(20, checkpoint=c)) for c in (False, True))
    assert saved < plain / 4
