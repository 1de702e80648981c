from functools import partial
from itertools import cycle

import pyro.distributions as dist
import pytest
import torch
from cases import INTERPOLANTS, LATENT, random_flow, random_prior
from oracles import random_mixture
from pyro.distributions import constraints
from torch import nn

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    Geodesic,
    InterpolantDistribution,
    InterpolantTransform,
    NonlinearInterpolant,
    Samples,
    TorusMLP,
    UniformTorus,
    VelocityMLP,
    interpolant_loss,
)
from pyro_interpolant.distributions.bases import WhitenedBase
from pyro_interpolant.interpolants.couplings import independent, optimal_transport
from pyro_interpolant.nn.embedded import EmbeddedVelocity
from pyro_interpolant.training.distributed import Process
from pyro_interpolant.training.objective import (
    Objective,
    exponent_of,
    regression_loss,
)
from pyro_interpolant.training.paths import path_points
from pyro_interpolant.training.rows import Rows


def by_hand(velocity, interpolant, t, w0, w1, *context):
    """|v|^2 - 2 dI . v, from the definition."""
    w_t, dw_t = interpolant.sample(t, w0, w1)
    v = velocity(t.expand(w_t.shape[:-1]), w_t, *context)
    return v.square().sum(-1) - 2 * (dw_t * v).sum(-1)


@pytest.mark.parametrize("name", INTERPOLANTS)
@pytest.mark.parametrize(("times", "rows"), [((), (5,)), ((4, 1), (4, 3))])
def test_regression_loss_is_its_definition(name, times, rows):
    velocity = random_flow(3).velocity
    t, w0, w1 = torch.rand(times), torch.randn(*rows, 3), torch.randn(*rows, 3)
    value = regression_loss(velocity, path_points(INTERPOLANTS[name], t, w0, w1))
    assert value.shape == rows
    torch.testing.assert_close(value, by_hand(velocity, INTERPOLANTS[name], t, w0, w1))


PATHS = {
    **INTERPOLANTS,
    **LATENT,
    "non-linear": NonlinearInterpolant(
        lambda t, x0, x1: (1 - t) * x0 + t * x1 + t * (1 - t) * (x1 - x0).tanh()
    ),
}


@pytest.mark.parametrize(("context_dim", "target"), [(0, "velocity"), (3, "noise")])
@pytest.mark.parametrize("name", PATHS)
def test_points_of_several_draws_are_those_of_each(name, context_dim, target):
    velocity, noise = (random_flow(2, context_dim=context_dim).velocity for _ in range(2))
    flow = InterpolantTransform(velocity, interpolant=PATHS[name])
    flow.flow.noise = noise
    base = WhitenedBase(None, flow.flow.whitening)
    objective = Objective(flow.flow, base, independent, target=target)
    context = torch.randn(3, 128, context_dim) if context_dim else [None] * 3
    rows = [Rows(torch.randn(128, 2), context[i]) for i in range(3)]
    torch.manual_seed(1)
    together = objective.points([partial(rows.__getitem__, i) for i in range(3)])
    torch.manual_seed(1)
    draws = [objective._pairs(part, base, objective.process) for part in rows]
    for draw, points in zip(draws, together, strict=True):
        expected = regression_loss(objective.network, objective._points(draw)).mean()
        torch.testing.assert_close(objective.loss(points), expected)


class Own(nn.Linear):
    time_exponent = 1.5

    def forward(self, t, x, context=None):
        return x


EXPONENTS = {
    "few dimensions": (lambda: VelocityMLP(2, (8,)), 2.0),
    "many dimensions": (lambda: VelocityMLP(9, (8,)), 1.0),
    "given data": (lambda: EmbeddedVelocity(9, [(2,)], hidden_dims=(8,)), 3.0),
    "a user's own": (lambda: Own(2, 2), 1.5),
    "a user's own, which says nothing": (lambda: nn.Linear(2, 2), 1.0),
}


@pytest.mark.parametrize("name", EXPONENTS)
def test_times_are_as_many_near_the_data_as_the_network_asks_for(name):
    """Between a and b lies the share (1 - a)^(1/p) - (1 - b)^(1/p) of all."""
    make, exponent = EXPONENTS[name]
    dtype = torch.float32 if "many" in name else torch.float64
    dim = 9 if "many" in name or "given" in name else 2
    flow = InterpolantTransform(make(), event_dim=dim).to(dtype).flow
    base = WhitenedBase(None, flow.whitening)
    assert exponent_of(flow, base, "velocity", None) == exponent
    assert exponent_of(flow, base, "noise", None) == 1
    given = WhitenedBase(dist.Normal(torch.zeros(dim), 1.0).to_event(1), flow.whitening)
    assert exponent_of(flow, given, "velocity", None) == 1
    objective = Objective(flow, base, independent, exponent=exponent)
    rows = Rows(torch.randn(64, dim, dtype=dtype), None)
    t = torch.cat([objective._pairs(rows, base, Process())[0].flatten() for _ in range(100)])
    assert t.dtype == dtype
    assert 0 <= t.min() <= t.max() < 1
    for a, b in (0.0, 0.5), (0.5, 0.9), (0.9, 1.0):
        share = float(((a <= t) & (t < b)).double().mean())
        expected = (1 - a) ** (1 / exponent) - (1 - b) ** (1 / exponent)
        assert share == pytest.approx(expected, abs=0.016)  # of 64 strata, one has an edge


def test_rows_of_a_class_are_coupled_by_themselves():
    """Labels are no numbers: draws of the base that move between classes bias each of them."""
    flow = InterpolantTransform(VelocityMLP(2, (8,), classes=10)).flow
    base = WhitenedBase(None, flow.whitening)
    labels = torch.randint(0, 10, (256, 1))
    turn = 2 * torch.pi * labels / 10
    rows = Rows(3 * torch.cat((turn.cos(), turn.sin()), -1), labels.double())
    torch.manual_seed(1)
    x0 = base.sample((256,))
    for coupling in (independent, optimal_transport):
        torch.manual_seed(1)
        found = Objective(flow, base, coupling)._coupled(rows, base, 256, Process())
        for label in range(10):
            own = (labels == label).flatten()
            assert torch.equal(found[own], coupling(x0[own], rows.w[own]))


def test_angles_are_coupled_by_their_distance_on_the_torus():
    flow = InterpolantTransform(TorusMLP(2, (8,)), interpolant=Geodesic()).flow
    base = WhitenedBase(UniformTorus(2), flow.whitening)
    x0, rows = base.sample((64,)), Rows(base.sample((64,)), None)
    found = Objective(flow, base, optimal_transport)._partners(x0, rows)
    assert torch.equal(found, optimal_transport(x0, rows.w, on_torus=True))
    assert not torch.equal(found, optimal_transport(x0, rows.w))


def test_given_base_draws_and_times_it_is_a_function():
    flow = random_flow(2)
    x1, x0, t = torch.randn(7, 2), torch.randn(7, 2), torch.rand(7)
    distribution = InterpolantDistribution(flow)
    value = interpolant_loss(distribution, x1, x0=x0, t=t)
    assert value.shape == (7,)
    assert value.requires_grad
    white = (x1 - flow.flow.loc) @ torch.linalg.inv(flow.flow.whitening.linear).T
    torch.testing.assert_close(value, by_hand(flow.velocity, flow.interpolant, t, x0, white))
    assert torch.equal(value, interpolant_loss(distribution, x1, x0=x0, t=t))
    one = interpolant_loss(distribution, x1[2], x0=x0[2], t=t[2])
    torch.testing.assert_close(one, value[2])


ONES = torch.ones(4, 2, dtype=torch.float32)
BAD_ARGUMENTS = {
    "a column for two": ((ONES[:, :1], None, None), r"shape \(\*, 2\), got \(4, 1\)"),
    "a finer type": ((ONES.double(), None, None), "expected torch.float32"),
    "a label of no class": ((ONES[:2], None, torch.tensor([0, 7])), "labels from 0 to 2"),
    "base draws of others": ((ONES, ONES[:3], None), r"base draws for rows of shape \(4,\).*\(3,"),
    "a column of times": ((ONES, None, None, ONES[:, :1]), r"times for .* \(4,\), .*got \(4, 1\)"),
    "times beyond": ((ONES, None, None, 1.5 * ONES[:, 0]), r"times in \[0, 1\], got 1.5 to 1.5"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_arguments_that_would_broadcast_are_refused(name):
    (x1, x0, labels, *times), message = BAD_ARGUMENTS[name]
    kind, classes = InterpolantTransform, 0
    if labels is not None:
        kind, classes = ConditionalInterpolantTransform, 3
    flow = kind(VelocityMLP(2, (4,), classes=classes)).float()
    of = ConditionalInterpolantDistribution if classes else InterpolantDistribution
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        interpolant_loss(of(flow), x1, x0=x0, context=labels, t=times[0] if times else None)


class OfOtherShape(nn.Linear):
    """A network with rates of too few numbers: of one column."""

    def forward(self, t, x, context=None):
        return super().forward(x)


def test_rates_of_another_shape_are_refused():
    flow = InterpolantDistribution(InterpolantTransform(OfOtherShape(2, 1), 2))
    message = r"OfOtherShape.*to return rates of the shape of x, \(2, 2\), got \(2, 1\)"
    with pytest.raises(ValueError, match=message):  # of two rows, they would broadcast
        interpolant_loss(flow, torch.randn(2, 2))


@pytest.mark.slow
def test_a_given_base_lives_in_data_coordinates():
    flow = random_flow(2)
    base = dist.MultivariateNormal(torch.tensor([5.0, -2.0]), torch.eye(2))
    distribution = InterpolantDistribution(flow, base)
    x0, x1, t = base.sample((6,)), torch.randn(6, 2), torch.rand(6)
    value = interpolant_loss(distribution, x1, x0=x0, t=t)
    w0, w1 = (flow.flow.whitening.to_white(x) for x in (x0, x1))
    torch.testing.assert_close(value, by_hand(flow.velocity, flow.interpolant, t, w0, w1))
    # Drawn: from that base.
    x1, t = x1.repeat(300, 1), t.repeat(300)
    drawn = interpolant_loss(distribution, x1, t=t).detach()
    moved = interpolant_loss(distribution, x1, x0=base.sample((1800,)), t=t).detach()
    assert abs(drawn.mean() - moved.mean()) < 5 * (drawn.var() / 1800 + moved.var() / 1800) ** 0.5


def test_data_on_a_support_are_unconstrained_first():
    flow = random_flow(2)
    t, x0, real = torch.rand(5), torch.randn(5, 2), torch.randn(5, 2)
    on_positive = InterpolantDistribution(flow, support=constraints.positive)
    value = interpolant_loss(on_positive, real.exp(), x0=x0, t=t)
    torch.testing.assert_close(
        value, interpolant_loss(InterpolantDistribution(flow), real, x0=x0, t=t)
    )
    with pytest.raises(ValueError, match="strictly inside the support"):
        interpolant_loss(on_positive, -real.exp(), x0=x0, t=t)


def test_contexts():
    flow = random_flow(2, context_dim=3)
    distribution = ConditionalInterpolantDistribution(flow)
    t, x0, x1, context = torch.rand(5), torch.randn(5, 2), torch.randn(5, 2), torch.randn(5, 3)
    value = interpolant_loss(distribution, x1, x0=x0, t=t, context=context)
    white = (x1 - flow.flow.loc) @ torch.linalg.inv(flow.flow.whitening.linear).T
    expected = by_hand(flow.velocity, flow.interpolant, t, x0, white, context)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(
        interpolant_loss(distribution.condition(context), x1, x0=x0, t=t), expected
    )
    assert (interpolant_loss(distribution, x1, x0=x0, t=t, context=context + 1) != value).all()
    with pytest.raises(ValueError, match="expected a context"):
        interpolant_loss(distribution, x1, x0=x0, t=t)
    with pytest.raises(ValueError, match="expected no context"):
        interpolant_loss(InterpolantDistribution(random_flow(2)), x1, context=context)


class Perturbed(nn.Module):
    def __init__(self, velocity, change):
        super().__init__()
        self.velocity, self.change = velocity, change

    def forward(self, t, x, context=None):
        return self.change(self.velocity(t, x), x)


PERTURBATIONS = {
    "shift": lambda v, x: v + 0.2,
    "scale up": lambda v, x: 1.2 * v,
    "scale down": lambda v, x: 0.8 * v,
    "turn": lambda v, x: v + 0.2 * x.flip(-1),
    "still": lambda v, x: 0.0 * v,
}


@pytest.mark.parametrize(
    ("change", "name"), [*zip(PERTURBATIONS, cycle(INTERPOLANTS), strict=False)]
)
def test_the_closed_form_velocity_is_the_minimiser(change, name):
    interpolant, count = INTERPOLANTS[name], 20_000
    velocity = random_mixture(2, interpolant)
    x0, x1, t = torch.randn(count, 2), velocity.sample(1.0, count), torch.rand(count)
    flows = (
        InterpolantTransform(v, 2, interpolant=interpolant)
        for v in (velocity, Perturbed(velocity, PERTURBATIONS[change]))
    )
    losses = [interpolant_loss(InterpolantDistribution(f), x1, x0=x0, t=t) for f in flows]
    rise = losses[1] - losses[0]
    assert rise.mean() > 5 * rise.std() / count**0.5
    # The rise is E|u - v|^2, the minimum -E|v|^2.
    x_t, _ = interpolant.sample(t, x0, x1)
    v = velocity(t, x_t)
    distance = (PERTURBATIONS[change](v, x_t) - v).square().sum(-1).mean()
    assert float(rise.mean()) == pytest.approx(float(distance), rel=0.2)
    floor = losses[0].std() / count**0.5
    assert abs(float(losses[0].mean() + v.square().sum(-1).mean())) < 5 * floor


def test_whole_numbers_are_spread_or_refused():
    images = torch.randint(256, (50, 1, 2, 2), dtype=torch.uint8)
    flow = random_prior(4, event_shape=(1, 2, 2))
    torch.manual_seed(0)
    found = interpolant_loss(flow, images, x0=torch.zeros(50, 4), t=torch.zeros(50))
    torch.manual_seed(0)
    spread = (images.flatten(1) + torch.rand(50, 4)).reshape(images.shape) / 256
    expected = interpolant_loss(flow, spread, x0=torch.zeros(50, 4), t=torch.zeros(50))
    assert torch.allclose(found, expected)
    with pytest.raises(TypeError, match="floating type"):
        interpolant_loss(random_prior(2), torch.ones(5, 2, dtype=torch.int64))


def test_held_out_rows_are_coupled_with_the_draws_of_the_base_that_are_held_out():
    flow = InterpolantTransform(VelocityMLP(2, (8,))).flow
    seen, unseen = WhitenedBase(Samples(torch.randn(100, 2)), flow.whitening).split(0.2)
    objective = Objective(flow, seen, optimal_transport)
    drawn = []

    def pairs(rows, base, process):
        drawn.append(rows.partner)
        return found(rows, base, process)

    found, objective._pairs = objective._pairs, pairs
    objective.fixed_points(Rows(torch.randn(64, 2), None), unseen, 64)
    own = {tuple(row) for row in unseen.base.rows.tolist()}
    assert {tuple(row) for row in drawn[0].tolist()} <= own
