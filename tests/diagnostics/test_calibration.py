import copy
import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from cases import random_flow, slow_but
from oracles import MixtureVelocity
from pyro.distributions import constraints

import pyro_interpolant as pi
from pyro_interpolant.diagnostics import (
    SolverError,
    calibrate_sampler,
    calibration,
)
from pyro_interpolant.solvers import RandomGrid


def narrow_mixture(deviation=0.15):
    angle = torch.arange(5) * (2 * torch.pi / 5)
    means = 1.4 * torch.stack((angle.cos(), angle.sin()), -1)
    covs = deviation**2 * torch.eye(2).expand(5, 2, 2)
    return MixtureVelocity(torch.ones(5), means, covs, pi.Trigonometric())


def flow_of(velocity, **choices):
    return pi.InterpolantDistribution(pi.InterpolantTransform(velocity, **choices))


def error_of(distribution, truth, x, grid):
    distribution.transform.solver = grid
    return (distribution.log_prob(x) - truth).abs()


def test_a_flow_that_does_nothing_needs_hardly_a_step():
    distribution = flow_of(pi.VelocityMLP(2, (8, 8)))
    grid = pi.calibrate(distribution, torch.randn(50, 2))
    assert grid.steps <= 2
    assert distribution.transform.solver is grid
    error = pi.solver_error(distribution, torch.randn(50, 2))
    assert error.density_worst < 1e-12
    assert error.round_trip_worst < 1e-12


@pytest.mark.parametrize("present", [pi.Adaptive, partial(RandomGrid, 5), pi.FixedGrid])
def test_gradients_go_on_to_recompute_evaluations(present):
    distribution = flow_of(pi.VelocityMLP(2, (8, 8)), solver=present(checkpoint=True))
    assert pi.calibrate(distribution, torch.randn(20, 2)).checkpoint
    distribution.transform.solver = present(checkpoint=True)
    assert calibrate_sampler(distribution).checkpoint


def test_the_method_and_the_warp_are_kept():
    start = pi.FixedGrid(steps=3, method="midpoint", warp=0.4)
    distribution = flow_of(pi.VelocityMLP(2, (8, 8)), solver=start)
    grid = pi.calibrate(distribution, torch.randn(20, 2))
    assert (grid.method, grid.warp, grid.checkpoint) == ("midpoint", 0.4, False)


@pytest.mark.parametrize("tolerance", slow_but([1e-1, 1e-3], 1e-1))
def test_the_grid_meets_the_closed_form_and_is_the_fewest(tolerance):
    velocity = narrow_mixture()
    distribution = flow_of(velocity)
    x = velocity.sample(1.0, 100)
    truth = velocity.log_prob(torch.tensor(1.0), x)
    grid = pi.calibrate(distribution, x, tolerance=tolerance)
    assert grid.steps > 4
    error = error_of(distribution, truth, x, grid)
    assert error.mean() <= tolerance * 1.001 + 1e-6
    assert error.max() <= 5 * tolerance * 1.001 + 1e-6
    fewer = pi.FixedGrid(steps=grid.steps - 1, method=grid.method, warp=grid.warp)
    error = error_of(distribution, truth, x, fewer)
    assert error.mean() > tolerance or error.max() > 5 * tolerance


@pytest.mark.slow
def test_the_solver_advised_where_no_grid_suffices_is_better_than_that_grid(monkeypatch):
    monkeypatch.setattr(calibration, "_MAX_STEPS", 64)
    velocity = narrow_mixture(0.003)
    distribution, x = flow_of(velocity), velocity.sample(1.0, 20)
    advice = r"no grid up to 64 steps.*1e-06 nats.*Adaptive\(1e-8, 1e-8, nodes=256\)"
    with pytest.warns(UserWarning, match=advice) as caught:
        grid = pi.calibrate(distribution, x, tolerance=1e-6)
    assert [warning.filename for warning in caught] == [__file__]
    assert grid.steps == 64
    assert distribution.transform.solver is grid
    truth = velocity.log_prob(torch.tensor(1.0), x)
    advised = error_of(distribution, truth, x, pi.Adaptive(1e-8, 1e-8, nodes=256))
    assert advised.mean() < 0.1 * error_of(distribution, truth, x, grid).mean()


CHECKS = (pi.calibrate, pi.solver_error, pi.log_prob_stderr, pi.w2_bound)


@pytest.mark.parametrize("check", CHECKS)
def test_refusals(check):
    flow = flow_of(pi.VelocityMLP(2, (8,)))
    with pytest.raises(ValueError, match="expected rows of x, got none"):
        check(flow, torch.zeros(0, 2))
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 2\), got \(4, 1\)"):
        check(flow, torch.zeros(4, 1))
    with pytest.raises(ValueError, match="float64, the type of the flow, got torch.flo"):
        check(flow, torch.zeros(4, 2).float())
    with pytest.raises(ValueError, match="expected finite x, got NaN or infinite values in 4"):
        check(flow, torch.zeros(4, 2) / 0)
    with pytest.raises(ValueError, match="expected no context"):
        check(flow, torch.zeros(4, 2), context=torch.zeros(4, 1))
    mirror = flow_of(pi.VelocityMLP(2, (8,)), interpolant=pi.Mirror())
    with pytest.raises(ValueError, match="expected samples to start from"):
        check(mirror, torch.zeros(4, 2))


def test_refusals_of_one_function_alone():
    flow, x = (
        flow_of(pi.VelocityMLP(2, (8,)), divergence=pi.HutchinsonDivergence(1)),
        torch.zeros(4, 2),
    )
    with pytest.raises(ValueError, match="a positive tolerance in nats"):
        pi.calibrate(flow, x, tolerance=float("nan"))
    with pytest.raises(ValueError, match="at least two probes"):
        pi.log_prob_stderr(flow, x)
    positive = pi.InterpolantDistribution(random_flow(2), support=constraints.positive)
    with pytest.raises(ValueError, match="strictly inside the support"):
        pi.calibrate(positive, x - 1)


@pytest.mark.parametrize("check", CHECKS)
def test_there_are_as_many_contexts_as_rows_or_one(check):
    """Rows may be arrays, too."""
    family = pi.ConditionalInterpolantDistribution(random_flow(2, context_dim=1))
    x, context = torch.randn(4, 2), torch.ones(4, 1)
    one = str(check(family, x, context=context))
    assert {str(check(family, x.numpy(), context=c)) for c in (context[0], context[:1])} == {one}
    with pytest.raises(ValueError, match="a context for a conditional flow, got none"):
        check(family, x)
    for few, rows in (context[:3], x), (context, x[:1]):
        with pytest.raises(ValueError, match=r"or one for each, got a batch of shape"):
            check(family, rows, context=few)


@pytest.mark.filterwarnings("error")
def test_rows_beyond_the_bounds_of_a_base():
    """Where both solves say so there is no error; where one does, it is not counted."""
    base = dist.Uniform(torch.zeros(2), torch.ones(2)).to_event(1)
    flow = pi.InterpolantDistribution(random_flow(2, solver=pi.FixedGrid(1)), base)
    inside = torch.cat((flow.sample((30,)), flow.transport(torch.full((1, 2), 0.5))))
    x = torch.cat((inside, torch.full((1, 2), 9.0)))
    assert flow.log_prob(x[-1:]) == -math.inf
    error = pi.solver_error(flow, x)
    assert 0 < error.density_mean <= error.density_worst < math.inf
    assert pi.calibrate(flow, x, tolerance=1e-2).steps < 40
    assert pi.solver_error(flow, x[-1:]).density_worst == 0.0


def test_solver_error_is_the_error_against_the_closed_form():
    velocity = narrow_mixture()
    distribution = flow_of(velocity, solver=pi.FixedGrid(steps=6))
    x = velocity.sample(1.0, 80)
    error = pi.solver_error(distribution, x)
    assert isinstance(error, SolverError)
    difference = distribution.log_prob(x) - velocity.log_prob(torch.tensor(1.0), x)
    assert error.density_mean == pytest.approx(float(difference.abs().mean()), abs=1e-5)
    assert error.density_worst == pytest.approx(float(difference.abs().max()), abs=1e-5)
    assert error.density_bias == pytest.approx(float(difference.mean()), abs=1e-5)
    transform = distribution.transform
    with torch.no_grad():
        trip = (transform._call(transform._inverse(x)) - x).norm(dim=-1)
    assert error.round_trip_mean == pytest.approx(float(trip.mean()))
    assert error.round_trip_worst == pytest.approx(float(trip.max()))
    assert error.density_worst > error.density_mean > 1e-3


def test_round_trips_are_in_whitened_units():
    flow = random_flow(2, solver=pi.FixedGrid(steps=2))
    distribution = pi.InterpolantDistribution(flow)
    w = torch.randn(30, 2)
    before = pi.solver_error(distribution, flow.flow.whitening.from_white(w))
    flow.flow.whitening.set(torch.tensor([3.0, 4.0]), 1e6 * torch.eye(2))
    after = pi.solver_error(distribution, flow.flow.whitening.from_white(w))
    assert after.round_trip_mean == pytest.approx(before.round_trip_mean, rel=1e-6)
    assert after.density_mean == pytest.approx(before.density_mean, abs=1e-7)


@pytest.mark.slow
def test_the_grid_of_a_conditional_flow_serves_all_contexts():
    flow = random_flow(2, context_dim=2).requires_grad_(requires_grad=False)
    distribution = pi.ConditionalInterpolantDistribution(flow)
    x, context = torch.randn(40, 2), torch.randn(40, 2)
    grid = pi.calibrate(distribution, x, context=context, tolerance=1e-4)
    assert flow.solver is grid
    conditioned = distribution.condition(context)
    flow.solver = pi.Adaptive(rtol=1e-9, atol=1e-9, nodes=64)
    truth = distribution.condition(context).log_prob(x)
    assert (conditioned.log_prob(x) - truth).abs().mean() < 1.1e-4


def test_on_a_support_the_rows_are_those_of_the_support():
    flow = random_flow(2)
    distribution = pi.InterpolantDistribution(flow, support=constraints.positive)
    y = torch.randn(40, 2).exp()
    plain = pi.solver_error(pi.InterpolantDistribution(flow), y.log())
    assert pi.solver_error(distribution, y) == pytest.approx(plain, abs=1e-9)


def test_neither_weights_nor_gradients_nor_the_generator_are_touched():
    flow = random_flow(2)
    distribution = pi.InterpolantDistribution(flow)
    x, before = torch.randn(20, 2), copy.deepcopy(flow.state_dict())
    state = torch.get_rng_state()
    pi.calibrate(distribution, x)
    pi.solver_error(distribution, x)
    assert torch.equal(state, torch.get_rng_state())
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.requires_grad and p.grad is None for p in flow.parameters())


def test_the_standard_error_is_that_of_single_probes():
    class OneOf(pi.HutchinsonDivergence):
        def __call__(self, velocity, t, x, context):
            return pi.HutchinsonDivergence(3, seed=2).samples(velocity, t, x, context)[self.seed]

    flow = random_flow(4, context_dim=2, divergence=pi.HutchinsonDivergence(3, seed=2))
    distribution = pi.ConditionalInterpolantDistribution(flow, support=constraints.positive)
    x, context = torch.randn(5, 4).exp(), torch.randn(5, 2)
    error = pi.log_prob_stderr(distribution, x, context=context)
    values = []
    for p in range(3):
        flow.divergence = OneOf(1, seed=p)
        with torch.no_grad():
            values.append(distribution.condition(context).log_prob(x))
    torch.testing.assert_close(error, torch.stack(values).std(0) / 3**0.5)
    flow.divergence = pi.ExactDivergence()
    assert torch.equal(pi.log_prob_stderr(distribution, x, context=context), torch.zeros(5))


def test_a_tight_solve_meets_the_network_in_evaluation():
    modes = []

    class Watched(pi.VelocityMLP):
        def forward_and_divergence(self, t, x, context=None):
            modes.append(self.training)
            return super().forward_and_divergence(t, x, context)

    flow = flow_of(Watched(2, (8,)))
    flow.transform.train()
    pi.solver_error(flow, torch.randn(5, 2))
    assert modes[0]  # the present solver's, as the caller has it
    assert not modes[-1]
    assert flow.transform.training


def test_samples_that_choose_a_grid_are_the_same_each_time_and_leave_the_generator():
    distribution, found = pi.InterpolantDistribution(random_flow(2)), []
    for _ in range(2):
        state = torch.get_rng_state()
        found.append(calibrate_sampler(distribution, tolerance=1e-2))
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
    assert found[0] == found[1]
