"""Solves for a few rows by numpy, and their gradients, against every operation by torch."""

import copy
import dataclasses
import warnings
from functools import partial

import pytest
import torch
from gradients import at_a_time, flow, gradient, of_density, of_sample
from torch import nn

from pyro_interpolant import (
    ConditionalInterpolantTransform,
    FixedGrid,
    InterpolantTransform,
    TorusMLP,
    VelocityMLP,
)
from pyro_interpolant.nn import EmbeddedVelocity, record
from pyro_interpolant.solvers import RandomGrid, recorded


def mlp(*hidden, dtype=torch.float64, **options):
    velocity = VelocityMLP(3, hidden, **options).to(dtype)
    nn.init.normal_(velocity.output.weight, std=0.3)
    nn.init.normal_(velocity.scales.weight, std=0.3)
    velocity.reach.copy_(torch.tensor([[2.0, 3.0, 4.0], [4.0, 2.5, 3.0]]))
    return velocity


def by_torch(transform):
    """Return a copy whose solves keep nothing, and so are torch's."""
    other = copy.deepcopy(transform)
    other.solver = dataclasses.replace(transform.solver, checkpoint=True)
    return other


close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def solves(monkeypatch):
    """Return a list that grows by one with each solve that is recorded."""
    found, real = [], recorded._states
    monkeypatch.setattr(recorded, "_states", lambda *a: found.append(1) or real(*a))
    return found


NETWORKS = {
    "one layer": (16,),
    "two layers": (16, 12),
    "residual": (16, 16, 16),
    "deep": (16, 12, 8),
}


@pytest.mark.parametrize(
    ("name", "value", "shape"),
    [
        ("one layer", of_density, (5, 3)),
        ("two layers", of_sample, (3,)),
        ("residual", at_a_time, (2, 4, 3)),
        ("residual", of_density, (3,)),
        ("deep", of_sample, (2, 4, 3)),
    ],
)
def test_values_and_gradients_are_those_of_torch(name, value, shape, solves):
    z = 2 * torch.randn(shape, dtype=torch.float64)
    transform = flow(mlp(*NETWORKS[name]), FixedGrid(6, warp=0.3))
    close(value(transform, z.requires_grad_()), value(by_torch(transform), z))
    close(gradient(value, transform, z), gradient(value, by_torch(transform), z))
    assert len(solves) == 2


@pytest.mark.parametrize(
    ("method", "grid"),
    [
        ("rk4", partial(RandomGrid, seed=3)),
        ("midpoint", FixedGrid),
        ("heun", partial(RandomGrid, seed=3)),
        ("euler", FixedGrid),
    ],
    ids=["rk4, random", "midpoint", "heun, random", "euler"],
)
def test_every_method_and_grid(method, grid, solves):
    z = torch.randn(4, 3, dtype=torch.float64)
    transform = flow(mlp(16, 16), grid(5, method))
    close(gradient(of_sample, transform, z), gradient(of_sample, by_torch(transform), z))
    close(gradient(of_density, transform, z), gradient(of_density, by_torch(transform), z))
    assert len(solves) == 2


def test_large_products_are_the_same(monkeypatch):
    z = torch.randn(4, 3, dtype=torch.float64)
    transform = flow(mlp(16, 16, 16), FixedGrid(5))
    expected = gradient(of_density, transform, z)
    monkeypatch.setattr(record, "_MOST_MULTIPLICATIONS", 0)
    close(gradient(of_density, transform, z), expected)


def test_rows_that_are_far_away():
    rows = torch.tensor([[1.0, 0.3, -1.0], [-0.5, 1.0, 1.0], [0.0, 0.0, 1.0]]).float()
    transform = flow(mlp(16, 16, dtype=torch.float32), FixedGrid(6))
    for far in (30.0, 1e6, 1e9):
        found = gradient(of_sample, transform, far * rows)
        expected = gradient(of_sample, by_torch(transform), far * rows)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    z = torch.tensor([1e12, -1e25, 0.0], dtype=torch.float32)  # where the gate overflows
    found = gradient(lambda transform, z: transform(z).sum(), transform, z)
    torch.testing.assert_close(found, transform.flow.whitening.linear.sum(0))


def test_a_network_without_a_gate_and_in_single_precision(solves):
    z = 20 * torch.randn(4, 3, dtype=torch.float64)
    transform = flow(mlp(16, 16), FixedGrid(6))
    transform.velocity.reach.fill_(torch.inf)
    close(gradient(of_sample, transform, z), gradient(of_sample, by_torch(transform), z))
    transform, z = transform.float(), torch.randn(4, 3, dtype=torch.float32)
    solves.clear()
    found = gradient(of_density, transform, z)
    assert solves
    torch.testing.assert_close(found, gradient(of_density, by_torch(transform), z))
    assert found.dtype == torch.float32
    solves.clear()
    with torch.autocast("cpu"):  # a precision that was asked for is torch's
        gradient(lambda transform, z: transform(z).sum(), transform, z)
    assert not solves


def test_what_is_not_finite_passes_silently():
    transform = flow(mlp(16, 16), FixedGrid(6))
    z = torch.tensor([[torch.nan, 0.0, 0.0], [0.1, 0.2, 0.3]], dtype=torch.float64)
    found = gradient(of_sample, transform, z)
    assert found[0].isnan().any()
    close(found[1], gradient(of_sample, transform, z[1]))


def embedded():
    velocity = EmbeddedVelocity(3, [(2,)], hidden_dims=(16, 16)).double()
    nn.init.normal_(velocity.network.output.weight, std=0.3)
    velocity.network.reach.fill_(4.0)
    for part in (velocity.slope, velocity.offset, velocity.log_slope, velocity.log_offset):
        nn.init.normal_(part, std=0.5)
    velocity.log_bounds.copy_(torch.tensor([[-2.0], [2.0]]).expand(2, 3))
    return velocity


WITH_CONTEXTS = {"plain": lambda: mlp(16, 16, context_dim=2), "embedded": embedded}


@pytest.mark.parametrize("name", WITH_CONTEXTS)
def test_contexts_are_heeded(name, solves):
    family = ConditionalInterpolantTransform(WITH_CONTEXTS[name](), 3, solver=FixedGrid(6))
    family = family.double().requires_grad_(requires_grad=False)
    other = copy.deepcopy(family)
    other.solver = FixedGrid(6, checkpoint=True)
    for shape in ((2,), (5, 2), (4, 1, 2)):
        solves.clear()
        context, z = torch.randn(shape).double(), torch.randn(4, 5, 3, dtype=torch.float64)
        found = gradient(of_sample, family.condition(context), z)
        close(found, gradient(of_sample, other.condition(context), z))
        assert solves
        asked = context.clone().requires_grad_()  # of the context: by torch
        of_sample(family.condition(asked), z.clone().requires_grad_()).backward()
        known = context.clone().requires_grad_()
        of_sample(other.condition(known), z.clone().requires_grad_()).backward()
        close(asked.grad, known.grad)
        assert len(solves) == 1


def test_labels_are_heeded(solves):
    family = ConditionalInterpolantTransform(mlp(16, 16, classes=3), 3, solver=FixedGrid(6))
    family = family.double().requires_grad_(requires_grad=False)
    z, labels = torch.randn(3, 3, dtype=torch.float64), torch.tensor([0, 2, 1])
    found = gradient(of_sample, family.condition(labels), z)
    each = [
        gradient(of_sample, family.condition(k), row) for k, row in zip(labels, z, strict=True)
    ]
    close(found, torch.stack(each))
    assert len(solves) == 4


def test_derivatives_of_any_order():
    z = torch.randn(2, 3, dtype=torch.float64)
    transform = flow(mlp(16, 16), FixedGrid(5))
    other = by_torch(transform)
    hessian = torch.autograd.functional.hessian
    expected = hessian(partial(of_sample, other), z)
    close(hessian(partial(of_sample, transform), z), expected)
    close(
        torch.func.hessian(partial(of_density, transform))(z),
        hessian(partial(of_density, other), z),
    )
    jacobian = torch.autograd.functional.jacobian
    close(jacobian(transform, z, vectorize=True), jacobian(other, z))
    assert torch.autograd.gradgradcheck(transform, z[0].clone().requires_grad_())


def test_transforms_and_traces_see_torch(solves):
    transform = flow(mlp(16, 16), FixedGrid(5))
    z = torch.randn(4, 3, dtype=torch.float64)
    expected = gradient(of_density, transform, z)
    solves.clear()
    close(torch.func.vmap(torch.func.grad(partial(of_density, transform)))(z), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = z.clone().requires_grad_()
        traced = torch.jit.trace(lambda y: of_density(transform, y), start, check_trace=False)
    y = (z + 1).requires_grad_()
    traced(y).backward()
    assert not solves
    close(y.grad, gradient(of_density, transform, z + 1))


def test_weights_that_change_are_noticed():
    z = torch.randn(3, dtype=torch.float64, requires_grad=True)
    transform = flow(mlp(16, 16), FixedGrid(5))
    before, x = gradient(of_sample, transform, z), transform(z)
    for part in (transform.velocity.layers[1].weight, transform.velocity.shifts.bias):
        part.data.mul_(1.5)
        after = gradient(of_sample, transform, z)
        assert not torch.allclose(before, after)
        close(after, gradient(of_sample, by_torch(transform), z))
        before = after
    with torch.no_grad():
        transform.velocity.layers[1].weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_only_few_rows_with_frozen_weights_are_recorded(solves):
    transform = flow(mlp(16, 16), FixedGrid(5))
    most = record._MOST_NUMBERS // 16
    few, many = (torch.randn(n, 3, dtype=torch.float64) for n in (most, most + 1))
    gradient(of_sample, transform, many)
    transform(few)  # without a gradient
    gradient(of_sample, copy.deepcopy(transform).requires_grad_(), few)
    assert not solves
    gradient(of_sample, transform, few)
    assert solves


class Own(VelocityMLP):
    """A network with a velocity of its own."""

    def forward(self, t, x, context=None):
        return 0.5 * super().forward(t, x, context)


class OwnGrid(FixedGrid):
    """A grid with a solve of its own."""

    def solve(self, field, x, times):
        return super().solve(field, 2 * x, times)


def test_what_is_the_users_own_is_left_to_it(solves):
    z = torch.randn(4, 3, dtype=torch.float64)
    torus = InterpolantTransform(TorusMLP(3, (16, 16)), solver=FixedGrid(5)).double()
    for transform in (
        flow(Own(3, (16, 16)).double(), FixedGrid(5)),
        flow(mlp(16, 16), OwnGrid(5)),
        torus.requires_grad_(requires_grad=False),
    ):
        gradient(of_sample, transform, z)
    assert not solves
