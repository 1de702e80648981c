from functools import partial

import pyro.distributions as dist
import pytest
import torch
from cases import INTERPOLANTS, LATENT, random_flow, random_prior
from oracles import random_mixture
from pyro.distributions import constraints
from torch import Tensor, nn

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
from pyro_interpolant.training.checkpoint import Checkpoint
from pyro_interpolant.training.distributed import Process
from pyro_interpolant.training.objective import (
    Objective,
    exponent_of,
    regression_loss,
    takes_means,
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


@pytest.mark.parametrize("exponent", [0.0, float("nan")])
def test_times_beyond_the_path_are_refused_when_a_transform_is_made(exponent):
    velocity = Own(2, 2)
    velocity.time_exponent = exponent
    with pytest.raises(ValueError, match="expected a finite time_exponent > 0, got"):
        InterpolantTransform(velocity, event_dim=2)


def test_rows_of_a_class_are_coupled_by_themselves():
    """Labels are no numbers: draws of the base that move between classes bias each of them."""
    seen = []

    def coupling(x0, x1, context):
        seen.append((len(x0), context.unique().tolist()))
        return optimal_transport(x0, x1, context)

    flow = InterpolantTransform(VelocityMLP(2, (8,), classes=10)).flow
    base = WhitenedBase(None, flow.whitening)
    labels = torch.randint(0, 10, (256, 1))
    turn = 2 * torch.pi * labels / 10
    rows = Rows(3 * torch.cat((turn.cos(), turn.sin()), -1), labels.double())
    torch.manual_seed(1)
    x0 = base.sample((256,))
    torch.manual_seed(1)
    found = Objective(flow, base, coupling)._coupled(rows, base, 256, Process())
    for label in range(10):
        own = (labels == label).flatten()
        assert (int(own.sum()), [label]) in seen
        assert torch.equal(found[own], optimal_transport(x0[own], rows.w[own]))
    torch.manual_seed(1)
    alone = Objective(flow, base, independent)._coupled(rows, base, 256, Process())
    assert torch.equal(alone, x0)


def test_angles_are_coupled_by_their_distance_on_the_torus():
    flow = InterpolantTransform(TorusMLP(2, (8,)), interpolant=Geodesic()).flow
    base = WhitenedBase(UniformTorus(2), flow.whitening)
    x0, rows = base.sample((64,)), Rows(base.sample((64,)), None)
    found = Objective(flow, base, optimal_transport)._partners(x0, rows)
    assert torch.equal(found, optimal_transport(x0, rows.w, on_torus=True))
    assert not torch.equal(found, optimal_transport(x0, rows.w))


def test_regression_loss_of_a_users_own_velocity_and_context():
    class Own(nn.Module):
        def forward(self, t, x, context):
            assert t.shape == x.shape[:-1] == context.shape[:-1]
            return x * t[..., None] + context

    t, w0, w1 = torch.rand(4, 1), torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    context = torch.randn(3, 2)
    interpolant = INTERPOLANTS["linear"]
    (points,) = path_points(interpolant, t, w0, w1)
    value = regression_loss(Own(), (points._replace(context=context),))
    expected = by_hand(Own(), interpolant, t, w0, w1, context.expand(4, 3, 2))
    torch.testing.assert_close(value, expected)


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


def test_times_are_of_any_type_and_shape_that_broadcasts():
    flow = InterpolantDistribution(random_flow(2))
    x0, x1 = torch.randn(2, 5, 3, 2)
    t = torch.rand(5, 1).float()
    found = interpolant_loss(flow, x1, x0=x0, t=t)
    torch.testing.assert_close(found, interpolant_loss(flow, x1, x0=x0, t=t.double().expand(5, 3)))
    half = interpolant_loss(flow, x1, x0=x0, t=0.5)
    torch.testing.assert_close(half, interpolant_loss(flow, x1, x0=x0, t=torch.full((5, 3), 0.5)))


class _OfOtherShape(nn.Module):
    """A network with rates of too few numbers: of one column, or of none."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.out = size, nn.Linear(2, 1)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        rates = self.out(x)
        return rates if self.size else rates[..., 0]


@pytest.mark.parametrize("size", [0, 1])
def test_rates_of_another_shape_are_refused(size):
    flow = InterpolantDistribution(InterpolantTransform(_OfOtherShape(size), 2))
    message = r"_OfOtherShape.*to return rates of the shape of x, \(2, 2\), got \(2, 1\)"
    message = message if size else message.replace("2, 1", "2,")
    with pytest.raises(ValueError, match=message):  # of two rows, both would broadcast
        interpolant_loss(flow, torch.randn(2, 2))


def test_labels_may_be_whole_numbers():
    family = ConditionalInterpolantDistribution(
        ConditionalInterpolantTransform(VelocityMLP(2, (4,), classes=3))
    )
    draws = {"x0": torch.randn(4, 2), "t": torch.rand(4)}
    x1, labels = torch.randn(4, 2), torch.tensor([0, 1, 2, 1])
    found = interpolant_loss(family, x1, context=labels, **draws)
    for column in (labels[:, None], labels[:, None] + 0.0):
        assert torch.equal(found, interpolant_loss(family, x1, context=column, **draws))


def test_drawn_times_and_base_one_value_per_row():
    shape = (2, 3)
    distribution, x1 = InterpolantDistribution(random_flow(2)), torch.randn(*shape, 2)
    first, second = (interpolant_loss(distribution, x1) for _ in range(2))
    assert first.shape == second.shape == shape
    assert not torch.allclose(first, second)
    first.sum().backward()
    assert distribution.transform.velocity.output.weight.grad.abs().max() > 0


@pytest.mark.slow
def test_a_given_base_lives_in_data_coordinates():
    flow = random_flow(2)
    base = dist.MultivariateNormal(torch.tensor([5.0, -2.0]), torch.eye(2))
    distribution = InterpolantDistribution(flow, base)
    x0, x1, t = base.sample((6,)), torch.randn(6, 2), torch.rand(6)
    value = interpolant_loss(distribution, x1, x0=x0, t=t)
    white = torch.linalg.inv(flow.flow.whitening.linear).T
    expected = by_hand(
        flow.velocity,
        flow.interpolant,
        t,
        (x0 - flow.flow.loc) @ white,
        (x1 - flow.flow.loc) @ white,
    )
    torch.testing.assert_close(value, expected)
    # Drawn: from that base.
    drawn = torch.cat([interpolant_loss(distribution, x1, t=t).detach() for _ in range(300)])
    moved = [interpolant_loss(distribution, x1, x0=base.sample((6,)), t=t) for _ in range(300)]
    moved = torch.cat(moved).detach()
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
    ("name", "change"),
    [(name, c) for i, c in enumerate(PERTURBATIONS) for name in [[*INTERPOLANTS][i % 2]]],
)
def test_the_closed_form_velocity_is_the_minimiser(name, change):
    interpolant = INTERPOLANTS[name]
    velocity = random_mixture(2, interpolant)
    x1, count = velocity.sample(1.0, 20_000), 20_000
    x0, t = torch.randn(count, 2), torch.rand(count)
    losses = [
        interpolant_loss(
            InterpolantDistribution(InterpolantTransform(v, 2, interpolant=interpolant)),
            x1,
            x0=x0,
            t=t,
        )
        for v in (velocity, Perturbed(velocity, PERTURBATIONS[change]))
    ]
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


def test_of_long_contexts_fewer_points_are_held_but_one_of_each_row():
    flow = ConditionalInterpolantTransform(VelocityMLP(2, (8,), 4000)).flow
    objective = Objective(flow, WhitenedBase(None, flow.whitening), independent)
    for count, long, expected in (50, 4000, 2050), (3000, 4000, 3000), (50, 4, 8150):
        rows = Rows(torch.randn(count, 2), torch.zeros(count, 1).expand(count, long))
        points = objective.fixed_points(rows, objective.base, 64)
        found = sum(p.t.expand(p.w.shape[:-1]).numel() for p in points)
        assert found / len(points) == pytest.approx(expected, abs=64)


def test_a_run_goes_on_with_the_times_and_the_rates_that_it_began_with(tmp_path):
    """A network that asks for others by now has them in the next run."""
    flow = InterpolantTransform(Own(2, 2), event_dim=2).flow
    base = WhitenedBase(None, flow.whitening)
    state = Checkpoint(tmp_path / "run", None, [], torch.device("cpu"))
    assert exponent_of(flow, base, "velocity", None) == 1.5  # there is nothing to go on from
    assert takes_means(None)
    for exponent, means in ((2.5, True), (1.0, False)):
        state.numbers = {"time_exponent": exponent, "means": means}
        assert exponent_of(flow, base, "velocity", state) == exponent
        assert takes_means(state) == means
    state.numbers = {}  # of a version that knew of neither
    assert exponent_of(flow, base, "velocity", state) == 1
    assert not takes_means(state)
