"""Gradients through the nodes alone, against those through every stage."""

import copy
import dataclasses
import warnings

import pytest
import torch
from gradients import at_a_time, flow, gradient, of_density, of_sample
from torch import nn

from pyro_interpolant import (
    ConditionalInterpolantTransform,
    FixedGrid,
    VelocityMLP,
)
from pyro_interpolant.nn.mlp import sharpness
from pyro_interpolant.solvers import ode


class Own(nn.Module):
    """A velocity of one's own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3)).double()

    def forward(self, t, x, context=None):
        return self.layers(torch.cat((t[..., None], x), -1))


def mlp(hidden, context_dim=0):
    velocity = VelocityMLP(3, hidden, context_dim).double()
    nn.init.normal_(velocity.output.weight, std=0.3)
    with torch.no_grad():
        velocity.layers[0].weight.div_(sharpness(3))  # as smooth as few steps ask
    velocity.reach.fill_(4.0)
    return velocity


def with_adjoint(transform):
    other = copy.deepcopy(transform)
    other.solver = dataclasses.replace(transform.solver, adjoint=True)
    return other


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


VELOCITIES = {
    "two layers": lambda: mlp((16, 16)),
    "deep": lambda: mlp((16, 16, 16)),
    "own": Own,
}


@pytest.mark.parametrize(
    ("name", "value", "warp", "shape"),
    [
        ("two layers", of_sample, 0.4, (2, 4, 3)),
        ("two layers", at_a_time, 0.0, (3,)),
        ("deep", of_density, 0.4, (5, 3)),
        ("deep", of_sample, 0.0, (2, 4, 3)),
        ("own", at_a_time, 0.4, (2, 4, 3)),
        ("own", of_density, 0.0, (3,)),
    ],
)
def test_the_gradient_is_that_of_every_stage_to_the_solvers_error(name, value, warp, shape):
    z = torch.randn(shape, dtype=torch.float64)
    velocity, errors = VELOCITIES[name](), []
    for steps in (12, 24):
        plain = flow(velocity, FixedGrid(steps=steps, warp=warp))
        expected = gradient(value, plain, z)
        found = gradient(value, with_adjoint(plain), z)
        errors.append(float((found - expected).abs().max() / expected.abs().max()))
    assert errors[0] < 5e-3
    assert errors[1] < max(1e-9, errors[0] / 8)  # rk4: a sixteenth


def test_rows_solved_in_parts_give_the_same(monkeypatch):
    z = torch.randn(7, 3, dtype=torch.float64)
    transform = with_adjoint(flow(mlp((16, 16)), FixedGrid(steps=6)))
    expected = gradient(of_sample, transform, z)
    monkeypatch.setattr(ode, "_VALUES_AT_ONCE", 1)
    torch.testing.assert_close(gradient(of_sample, transform, z), expected, rtol=0, atol=1e-12)


def test_contexts_are_heeded():
    base = ConditionalInterpolantTransform(mlp((16, 16), 2), 3, solver=FixedGrid(24)).double()
    base.requires_grad_(requires_grad=False)
    other, z = copy.deepcopy(base), torch.randn(5, 3, dtype=torch.float64)
    other.solver = FixedGrid(24, adjoint=True)
    for shape in ((2,), (5, 2)):  # shared, and each row's own
        context = torch.randn(shape, dtype=torch.float64)
        expected = gradient(of_sample, base.condition(context), z)
        found = gradient(of_sample, other.condition(context), z)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        asked = context.clone().requires_grad_()  # of the context: through every stage
        of_sample(other.condition(asked), z.clone().requires_grad_()).backward()
        known = context.clone().requires_grad_()
        of_sample(base.condition(known), z.clone().requires_grad_()).backward()
        torch.testing.assert_close(asked.grad, known.grad)


def test_hessians_are_those_of_every_stage_to_the_solvers_error():
    z = torch.randn(3, dtype=torch.float64)
    plain = flow(mlp((16, 16)), FixedGrid(steps=32))
    expected = torch.autograd.functional.hessian(lambda s: of_sample(plain, s), z)
    found = torch.autograd.functional.hessian(lambda s: of_sample(with_adjoint(plain), s), z)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - found.T).abs().max() < 1e-4


def test_weights_that_learn_get_their_gradients():
    plain = flow(mlp((16, 16)), FixedGrid(steps=6)).requires_grad_(requires_grad=True)
    other, z = with_adjoint(plain), torch.randn(4, 3, dtype=torch.float64)
    values = []
    for transform in (plain, other):
        value = of_sample(transform, z.requires_grad_())
        value.backward()
        values.append(value.item())
    assert values[0] == pytest.approx(values[1], abs=1e-12)
    for a, b in zip(plain.parameters(), other.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_transforms_and_traces_take_every_stage():
    plain = flow(mlp((16, 16)), FixedGrid(steps=6))
    other, z = with_adjoint(plain), torch.randn(4, 3, dtype=torch.float64)
    expected = gradient(of_density, plain, z)
    found = torch.func.vmap(torch.func.grad(lambda y: of_density(other, y)))(z)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = z.clone().requires_grad_()
        traced = torch.jit.trace(lambda y: of_density(other, y), start, check_trace=False)
    y = z.clone().requires_grad_()
    traced(y).backward()
    torch.testing.assert_close(y.grad, expected, rtol=0, atol=1e-10)
