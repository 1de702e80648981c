"""Compiled Pyro models: the solve of a flow is one operation of them, with its gradient."""

import subprocess
import sys
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from gradients import flow
from pyro import poutine
from pyro.infer import NUTS
from pyro.ops.integrator import potential_grad
from torch import nn

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    FixedGrid,
    InterpolantDistribution,
    VelocityMLP,
    base_space,
)
from pyro_interpolant.nn import record

pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning", "ignore:.torch.jit", "ignore:The .grad attribute"
)
OPERATION = "pyro_interpolant::recorded_solve"
close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-9)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def prior(solver=None, kind=VelocityMLP, hidden=(16, 16, 16), **options):
    """A flow with frozen weights that moves its base."""
    velocity = kind(3, hidden, **options)
    nn.init.normal_(velocity.output.weight, std=0.3)
    nn.init.normal_(velocity.scales.weight, std=0.3)
    return InterpolantDistribution(flow(velocity, solver or FixedGrid(5, warp=0.2)))


def rows_of(learned, count=3):
    def model():
        with pyro.plate("rows", count):
            z = pyro.sample("z", learned)
            pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.ones(count))

    return model


def potentials(model):
    """The potentials of a model in base space, plain and compiled, and the latter's operations."""
    found = []
    for compiled in (False, True):
        kernel = NUTS(base_space(model), jit_compile=compiled, ignore_jit_warnings=True)
        kernel.setup(1)
        found.append(kernel)
    plain, compiled = found
    graph = compiled.potential_fn.func.__self__._compiled_fn.graph
    names = [node.kind() for node in graph.nodes()]
    return plain, compiled, names


def check_same(plain, compiled):
    for _ in range(3):
        at = {name: torch.randn_like(value) for name, value in plain.initial_params.items()}
        one, other = (potential_grad(kernel.potential_fn, at) for kernel in (plain, compiled))
        close(other[1], one[1])
        for name, gradient in one[0].items():
            assert gradient.abs().max() > 1e-3
            close(other[0][name], gradient)


@pytest.mark.parametrize(
    ("method", "hidden"), [("heun", (16,)), ("euler", (16, 12)), ("rk4", (16, 16, 16))]
)
def test_a_compiled_potential_has_one_operation_a_solve_and_the_same_gradient(method, hidden):
    plain, compiled, names = potentials(rows_of(prior(FixedGrid(5, method), hidden=hidden)))
    assert names.count(OPERATION) == 1
    assert names.count("aten::silu") == 1  # of the times, whose embedding no state changes
    check_same(plain, compiled)


def traced(transform, x):
    """The transform as a tracer takes it inside of a Pyro model."""

    def function(w):
        with poutine.block():
            return transform(w)

    return torch.jit.trace(function, x, check_trace=False)


def test_other_rows_and_the_way_back_are_solved_in_pieces(monkeypatch):
    monkeypatch.setattr(record, "_MOST_NUMBERS", 64)  # of 16 units, four rows
    transform = prior().transform
    for direction in (transform, transform.inv):
        found = traced(direction, torch.randn(2, 3))
        assert OPERATION in str(found.graph)
        for shape in ((3,), (2, 5, 3)):
            w = torch.randn(shape).requires_grad_()
            close(found(w), direction(w))
            close(*(torch.autograd.grad(f(w).sin().sum(), w)[0] for f in (found, direction)))
        assert found(torch.zeros(0, 3)).shape == (0, 3)
        with torch.inference_mode():
            close(found(w.detach()), direction(w.detach()))


def test_a_context_that_is_sampled_has_its_gradient():
    velocity = VelocityMLP(3, (16, 16), context_dim=1)
    nn.init.normal_(velocity.output.weight, std=0.3)
    nn.init.normal_(velocity.shifts.weight, std=0.3)
    transform = ConditionalInterpolantTransform(velocity, 3, solver=FixedGrid(2, "heun"))
    learned = ConditionalInterpolantDistribution(transform.requires_grad_(requires_grad=False))

    def model():
        c = pyro.sample("c", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        z = pyro.sample("z", learned.condition(c))
        pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(1.0))

    plain, compiled, names = potentials(model)
    assert OPERATION not in names
    check_same(plain, compiled)


class Own(VelocityMLP):
    def forward(self, t, x, context=None):
        return super().forward(t, x, context) + 0.1


@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        (Own, FixedGrid(2, "euler")),
        (VelocityMLP, FixedGrid(2, "euler", checkpoint=True)),
    ],
)
def test_what_is_not_recorded_is_traced_as_it_is(kind, solver):
    plain, compiled, names = potentials(rows_of(prior(solver, kind)))
    assert OPERATION not in names
    check_same(plain, compiled)


def test_functions_outside_of_models_stay_those_of_torch():
    found = torch.jit.trace(prior().transform, torch.randn(2, 3), check_trace=False)
    assert OPERATION not in str(found.graph)


def test_weights_that_no_longer_are_frozen_are_refused():
    transform = prior().transform
    found = traced(transform, torch.randn(2, 3))
    transform.requires_grad_()
    with pytest.raises(RuntimeError, match="gradients in weights that were frozen"):
        found(torch.randn(2, 3))


@pytest.mark.parametrize(("method", "hidden"), [("heun", (16,)), ("rk4", (16, 16, 12))])
def test_second_derivatives_are_those_of_torch(method, hidden):
    transform = prior(FixedGrid(3, method), hidden=hidden).transform
    found, w = traced(transform, torch.randn(2, 3)), torch.randn(2, 3)

    def second(f):
        return torch.autograd.functional.hessian(lambda w: f(w).sin().sum(), w)

    close(second(found), second(transform))


def test_transforms_of_functions_take_it():
    transform = prior().transform
    found, w = traced(transform, torch.randn(2, 3)), torch.randn(4, 2, 3)
    for name in ("vmap", "jacrev", "jacfwd"):
        function = getattr(torch.func, name)
        close(function(found)(w), function(transform)(w))


@pytest.mark.slow
def test_a_saved_function_is_loaded_where_the_package_is(tmp_path):
    found, w = traced(prior().transform, torch.randn(2, 3)), torch.randn(2, 3)
    torch.jit.save(found, str(tmp_path / "traced.pt"))
    torch.save((w, found(w)), tmp_path / "values.pt")
    program = (
        "import sys, pathlib, torch\n"
        "from pyro_interpolant import InterpolantTransform\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "w, known = torch.load(folder / 'values.pt')\n"
        "torch.testing.assert_close(torch.jit.load(str(folder / 'traced.pt'))(w), known)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
