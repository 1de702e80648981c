import dataclasses
import math

import pytest
import torch
from cases import SOLVERS, random_flow
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import nn
from torch.autograd import forward_ad

from pyro_interpolant import (
    Adaptive,
    ConditionalInterpolantDistribution,
    FixedGrid,
    HutchinsonDivergence,
    InterpolantDistribution,
    InterpolantTransform,
)
from pyro_interpolant.solvers import RandomGrid

ORDERS = {"rk4": 4, "midpoint": 2, "heun": 2, "euler": 1}


def logistic(times):
    """A nonlinear, time-dependent field: dx/dt = cos(3 t) x (1 - x)."""
    return [lambda x, t=t: (3 * t).cos() * x * (1 - x) for t in times]


def logistic_at(x0, t):
    odds = x0 / (1 - x0) * torch.exp(torch.sin(3 * t) / 3)
    return odds / (1 + odds)


STARTS = torch.tensor([[0.1, 0.4], [0.7, 0.95]], dtype=torch.float64)


@pytest.mark.parametrize("method", ORDERS)
def test_the_error_falls_with_the_order_of_the_method(method):
    """Forward and backward in time."""
    errors, back = [], []
    end = logistic_at(STARTS, torch.tensor(1.0))
    for steps in (48, 96, 192):
        solver = FixedGrid(steps=steps, method=method)
        times, _ = solver.grid()
        errors.append(float((solver.solve(logistic, STARTS, times)[-1] - end).abs().max()))
        states = solver.solve(logistic, end, times.flip(0))
        back.append(float((states[-1] - STARTS).abs().max()))
    for found in (errors, back):
        for coarse, fine in zip(found, found[1:], strict=False):
            assert math.log2(coarse / fine) == pytest.approx(ORDERS[method], abs=0.35)


@pytest.mark.parametrize("name", SOLVERS)
def test_states_are_those_at_the_nodes(name):
    """Whatever the default device is; also of the path back, and with their gradients."""
    solver, start = SOLVERS[name], STARTS.clone().requires_grad_()
    times, weights = solver.grid()
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0))
    states = solver.solve(logistic, start, times)
    assert states.shape == (len(times), *STARTS.shape)
    assert torch.equal(states[0], STARTS)
    truth = torch.stack([logistic_at(STARTS, t) for t in times])
    tolerances = {"midpoint": 5e-3, "heun": 5e-3, "euler": 0.05, "adaptive": 1e-3}
    torch.testing.assert_close(states, truth, rtol=0, atol=tolerances.get(name, 1e-4))
    back = solver.solve(logistic, states[-1], times.flip(0)).flip(0)
    tolerances = {"euler": 0.1, "midpoint": 1e-2}
    torch.testing.assert_close(back, states, rtol=0, atol=tolerances.get(name, 1e-3))
    gradient = torch.autograd.grad(states[-1].sum(), start)[0]
    ratio = torch.exp(torch.sin(torch.tensor(3.0)) / 3)
    expected = ratio / (1 - STARTS + STARTS * ratio) ** 2
    torch.testing.assert_close(gradient[0], expected[0], rtol=0.05, atol=0)
    if name != "adaptive":
        with torch.device("meta"):
            again = solver.solve(logistic, STARTS, solver.grid()[0])
        torch.testing.assert_close(again, states.detach(), rtol=0, atol=0)
    assert dataclasses.replace(solver) == solver
    assert hash(dataclasses.replace(solver)) == hash(solver)


@pytest.mark.parametrize("method", ["rk4", "heun"])
def test_rows_are_independent(method):
    flow = random_flow(3, solver=FixedGrid(steps=6, method=method))
    x = torch.randn(40, 3)
    whole = flow(x)
    torch.testing.assert_close(flow(x[7]), whole[7], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flow(x[5:9].clone()), whole[5:9], rtol=1e-12, atol=1e-12)
    wild = x.clone()
    wild[0] = 1e6
    torch.testing.assert_close(flow(wild)[1:], whole[1:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["dopri5", "dopri8", "bosh3"])
def test_adaptive_meets_its_tolerance(method):
    solver = Adaptive(rtol=1e-8, atol=1e-8, method=method, nodes=10)
    times, _ = solver.grid()
    assert len(times) == 11
    truth = torch.stack([logistic_at(STARTS, t) for t in times])
    for t, start in ((times, truth[0]), (times.flip(0), truth[-1])):
        states = solver.solve(logistic, start, t)
        expected = truth if t is times else truth.flip(0)
        torch.testing.assert_close(states, expected, rtol=0, atol=3e-5)


def test_each_tolerance_is_its_own():
    """Of states as small as the absolute tolerance is loose, the relative one decides."""
    start = torch.tensor([1e-6], dtype=torch.float64)
    for rtol, atol, worst in ((1e-8, 1e-16, 1e-5), (1e-8, 1e-6, 1.0)):
        solver = Adaptive(rtol=rtol, atol=atol, nodes=2)
        end = solver.solve(lambda times: [lambda x: 5 * x] * len(times), start, solver.grid()[0])
        error = abs(float(end[-1]) / (1e-6 * math.exp(5)) - 1)
        assert error < worst
    assert error > 1e-4  # a loose one is loose


def test_what_a_choice_gives_may_be_changed_in_place():
    """It is computed once and kept, for every flow of the process."""
    for given in (
        FixedGrid(5).grid,
        Adaptive(nodes=5).grid,
        lambda: [FixedGrid(5).matrix()],
        lambda: [HutchinsonDivergence(2).directions(3)],
    ):
        expected = [part.clone() for part in given()]
        for part in given():
            part.fill_(7.0)
        for part, kept in zip(given(), expected, strict=True):
            assert torch.equal(part, kept)


def test_adaptive_agrees_with_a_fine_grid_through_a_flow():
    flow = random_flow(3).requires_grad_(requires_grad=False)
    distribution = InterpolantDistribution(flow)
    x = torch.randn(8, 3)
    values = []
    for solver in (Adaptive(rtol=1e-10, atol=1e-10, nodes=48), FixedGrid(steps=48)):
        flow.solver = solver
        values.append(distribution.log_prob(x))
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("wanted", ["x", "weights", "context", "draws"])
def test_scipy_gives_values_and_no_gradient(wanted):
    """A gradient would leave out that the states move, and be wrong in silence."""
    solver = Adaptive(rtol=1e-8, atol=1e-8, method="scipy_solver", nodes=10)
    flow = random_flow(2, context_dim=1, solver=solver).requires_grad_(requires_grad=False)
    x, c = torch.randn(3, 2), torch.randn(1)
    d = ConditionalInterpolantDistribution(flow).condition(c)
    values = d.log_prob(x)
    assert not values.requires_grad
    leaf = {"x": x, "context": c}.get(wanted, flow.flow.velocity.output.weight).requires_grad_()
    d = ConditionalInterpolantDistribution(flow).condition(c)
    found = d.rsample((2,)) if wanted == "draws" else d.log_prob(x)
    if wanted in ("x", "context"):  # of weights to be trained nodes are random
        torch.testing.assert_close(found, values)
    with pytest.raises(ValueError, match=r"through whose states there are none: .*dopri5"):
        torch.autograd.grad(found.sum(), leaf)


def test_scipy_drops_no_tangent_in_silence():
    flow = random_flow(2, context_dim=1, solver=Adaptive(method="scipy_solver", nodes=10))
    d = ConditionalInterpolantDistribution(flow).freeze()
    plain = {"x": torch.randn(3, 2), "context": torch.randn(3, 1)}
    for wanted in plain:
        given = dict(plain)
        with forward_ad.dual_level():
            assert d.condition(given["context"]).log_prob(given["x"]).isfinite().all()
            given[wanted] = forward_ad.make_dual(given[wanted], torch.ones_like(given[wanted]))
            with pytest.raises(ValueError, match=r"through whose states there are none: .*dopri5"):
                d.condition(given["context"]).log_prob(given["x"])


@pytest.mark.parametrize("name", ["rk4", "random", "adaptive", "scipy"])
def test_states_have_the_origin_that_pyro_tracks(name):
    """TraceGraph_ELBO knows by it which costs follow from a discrete choice."""
    solver = Adaptive(method="scipy_solver", nodes=4) if name == "scipy" else SOLVERS[name]
    given, origin = {"x": STARTS[0], "context": torch.ones(2).double()}, frozenset({"a"})

    def states(given):
        return solver.solve(
            lambda times: [lambda x: -x * given["context"] for _ in times],
            given["x"],
            solver.grid()[0],
        )

    for wanted in given:
        found = states({**given, wanted: track_provenance(given[wanted], origin)})
        assert get_provenance(found) == origin, wanted
        torch.testing.assert_close(detach_provenance(found), states(given))


class Exploding(nn.Module):
    """A velocity whose solution from x = 2 leaves every bound before t = 1."""

    event_dim = 1

    def forward(self, t, x, context=None):
        return x**3


class NotANumber(nn.Module):
    event_dim = 2

    def forward(self, t, x, context=None):
        return x * math.nan


@pytest.mark.parametrize(("velocity", "dim"), [(Exploding(), 1), (NotANumber(), 2)])
def test_an_adaptive_solve_that_fails_says_what_to_do(velocity, dim):
    flow = InterpolantTransform(velocity, solver=Adaptive())
    with pytest.raises(ValueError, match=r"dopri5 gave up at rtol=1e-05.*loosen the tolerances"):
        flow(torch.full((2, dim), 2.0))


@pytest.mark.parametrize("method", ["dopri5", "scipy_solver"])
def test_times_of_adaptive_solvers_go_one_way(method):
    for times in ([0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 0.2]):
        with pytest.raises(ValueError, match=r"ascending or descending without a repetition"):
            Adaptive(method=method).solve(logistic, torch.ones(3, 2), torch.tensor(times))
    x = torch.randn(3, 2)
    states = Adaptive(method=method).solve(logistic, x, torch.tensor([0.5]))
    assert torch.equal(states, x[None])  # at one time there is the start


IMPOSSIBLE = {
    "steps >= 1, a whole number, got 0": lambda: FixedGrid(steps=0),
    "steps >= 1, a whole number, got 14.5": lambda: FixedGrid(29 / 2),
    "steps >= 1, a whole number, got 7.5": lambda: RandomGrid(7.5),
    "seed >= 0, a whole number, got 1.5": lambda: RandomGrid(7, seed=1.5),
    "a method among .*'rk4'.*'ralston'": lambda: FixedGrid(method="ralston"),
    "a method among .*'rk9'": lambda: RandomGrid(4, method="rk9"),
    r"a warp in \[0, 1\), got 1.0": lambda: FixedGrid(warp=1.0),
    r"a warp in \[0, 1\), got -0.1": lambda: FixedGrid(warp=-0.1),
    "positive tolerances, got 0.0": lambda: Adaptive(rtol=0.0),
    "nodes >= 1, a whole number, got 0": lambda: Adaptive(nodes=0),
    "a method among .*'dopri5'.*got 'rk4'": lambda: Adaptive(method="rk4"),
    "probes >= 1, a whole number, got 0": lambda: HutchinsonDivergence(0),
    "probes >= 1, a whole number, got 1.5": lambda: HutchinsonDivergence(1.5),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible_choices_are_refused(message):
    with pytest.raises(ValueError, match=message):
        IMPOSSIBLE[message]()


def test_random_nodes_give_an_unbiased_log_determinant():
    flow = random_flow(2).requires_grad_(requires_grad=False)
    x = torch.randn(5, 2)
    flow.solver = FixedGrid(64)
    exact = flow.log_abs_det_jacobian(x, flow(x))
    estimates = []
    for seed in range(100):
        flow.solver = RandomGrid(4, seed=seed)
        estimates.append(flow.log_abs_det_jacobian(x, flow(x)))
    estimates = torch.stack(estimates)
    error = estimates.std(0) / 100**0.5
    assert ((estimates.mean(0) - exact).abs() < 5 * error + 1e-3).all()
    assert not torch.equal(*(RandomGrid(4, seed=seed).grid()[0] for seed in (0, 1)))
    assert torch.equal(*(RandomGrid(4, seed=3).grid()[0] for _ in range(2)))


def test_no_rows_end_as_none():
    for solver in (FixedGrid(4), Adaptive()):
        states = solver.solve(logistic, torch.zeros(0, 2), solver.grid()[0])
        assert states.shape == (len(solver.grid()[0]), 0, 2)
