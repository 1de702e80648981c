"""What both kinds of support offer: values to real vectors and back, sizes, bases, checks."""

import math

import pyro.distributions as dist
import pytest
import torch
from cases import SUPPORTS, random_flow
from pyro.distributions import constraints
from torch import nn

import pyro_interpolant as pi
from pyro_interpolant import (
    Geodesic,
    InterpolantDistribution,
    InterpolantTransform,
    TorusMLP,
    UniformTorus,
    VelocityMLP,
    circular,
)
from pyro_interpolant.distributions.bases import Planar
from pyro_interpolant.distributions.constraints import Shaped
from pyro_interpolant.distributions.supports import BijectiveSupport, CircularSupport, support_of


def torus_flow(dim, **choices):
    return InterpolantTransform(TorusMLP(dim, (8,)), interpolant=Geodesic(), **choices).flow


def composed(transforms, x):
    """The value of a chain at x, and its log-determinant."""
    total = x.new_zeros(x.shape[:-1])
    for transform in transforms:
        y = transform(x)
        total, x = total + transform.log_abs_det_jacobian(x, y), y
    return x, total


# ---- bijective images ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUPPORTS)
def test_values_come_back_from_real_vectors(name):
    case = SUPPORTS[name]
    space = support_of(case.support)
    assert isinstance(space, BijectiveSupport)
    u = torch.randn(6, case.dim)
    y, log_det = composed(space.transforms(random_flow(case.dim).flow), u)
    assert y.shape == (6, *case.event_shape)
    assert log_det.shape == (6,)
    assert bool(space.event_constraint().check(y).all())
    assert space.event_constraint().check(y).shape == (6,)
    torch.testing.assert_close(space.unconstrained(y), u)


@pytest.mark.parametrize("name", SUPPORTS)
def test_sizes_and_shapes_are_inverse(name):
    case = SUPPORTS[name]
    space = support_of(case.support)
    assert space.event_shape(case.dim) == case.event_shape
    assert space.size(torch.Size(case.event_shape)) == case.dim
    assert space.size(space.event_shape(case.dim)) == case.dim


@pytest.mark.parametrize("name", ["real_vector", *SUPPORTS])
def test_no_values_have_as_many_volumes(name):
    case = SUPPORTS.get(name)
    support, dim = (constraints.real_vector, 2) if case is None else (case.support, case.dim)
    flow = InterpolantDistribution(random_flow(dim), support=support)
    y, log_det = flow.from_flow(torch.empty(0, 4, dim))
    assert y.shape == (0, 4, *flow.event_shape)
    assert log_det.shape == (0, 4)


@pytest.mark.parametrize(
    "real",
    [constraints.real, constraints.real_vector, constraints.independent(constraints.real, 1)],
    ids=["real", "real_vector", "independent"],
)
def test_real_vectors_are_left_alone(real):
    space = support_of(real)
    x = torch.randn(3, 2)
    assert space.is_real()
    assert space.event_constraint() is constraints.real_vector
    assert space.unconstrained(x) is x
    assert space.transforms(random_flow(2).flow) == []
    assert (space.event_shape(2), space.size(torch.Size((2,)))) == ((2,), 2)


def test_no_other_support_is_real():
    others = [case.support for case in SUPPORTS.values()] + [circular]
    assert not any(support_of(support).is_real() for support in others)


def test_a_bijective_support_keeps_the_base():
    space, base, z = support_of(constraints.positive), dist.Normal(0, 1), torch.randn(3, 2)
    assert space.default_base(random_flow(2).flow) is None
    assert space.sampled_base(base) is base
    assert space.from_sampled(z) is z
    assert space.to_sampled(z) is z
    velocity = space.new_velocity(3, 2)
    assert (type(velocity), velocity.arguments()) == (VelocityMLP, (3, (96,) * 3, 2))
    assert space.default_path() is None


def test_a_path_on_the_torus_needs_angles():
    space, rows = support_of(constraints.positive), torch.randn(5, 2)
    space.check_rows(random_flow(2).flow, rows, None)
    with pytest.raises(ValueError, match=r"support=circular for the interpolant Geodesic, got"):
        space.check_rows(torus_flow(2), rows, None)


CAT = constraints.cat([constraints.positive, constraints.unit_interval], dim=-1, lengths=[2, 1])
HALVES = [constraints.independent(constraints.positive, 1), constraints.unit_interval]
WITHIN = [[1.0, 2.0, 0.5], [0.0, 1.0, 0.5], [1.0, -1.0, 0.5], [1.0, 1.0, 1.0], [1.0, 1.0, 1.5]]


@pytest.mark.parametrize(
    "support",
    [
        CAT,
        constraints.independent(CAT, 0),
        Shaped(CAT, (3,)),
        Shaped(CAT, (1, 3)),
        constraints.cat(HALVES, -1, [2, 1]),
        Shaped(constraints.cat(HALVES, -1, [2, 1]), (3, 1)),
        constraints.stack(
            [constraints.positive, constraints.positive, constraints.unit_interval], dim=-1
        ),
        Shaped(
            constraints.stack(
                [constraints.positive, constraints.positive, constraints.unit_interval], dim=-1
            ),
            (3, 1),
        ),
    ],
    ids=[
        "cat",
        "independent",
        "vector",
        "row",
        "of a vector",
        "same in a column",
        "stack",
        "column",
    ],
)
def test_bounds_of_supports_in_parts_are_those_of_each(support):
    space = support_of(support)
    y = torch.tensor(WITHIN).reshape(5, *space.event_shape(3))
    assert space.within_bounds(y).tolist() == [True, True, False, True, False]
    assert space.unconstrained(y[:1]).isfinite().all()
    with pytest.raises(ValueError, match="got 4 of 5 rows outside it or on its edge"):
        space.unconstrained(y)
    d = InterpolantDistribution(random_flow(3), support=support, validate_args=False)
    found = d.log_prob(y)
    assert found[0].isfinite()
    assert (found[[2, 4]] == -math.inf).all()


PARTS = [constraints.positive, constraints.interval(-1.0, 2.0), constraints.less_than(3.0)]
PAIR = constraints.stack(PARTS[:2], dim=-1)
ALIKE = {
    "stack": constraints.cat([PAIR, PARTS[2]], -1, [2, 1]),
    "stacks": constraints.cat([PAIR, constraints.stack(PARTS[2:], dim=-1)], -1, [2, 1]),
    "nested": constraints.cat([constraints.cat([PAIR], -1, [2]), PARTS[2]], -1, [2, 1]),
    "independent": constraints.independent(constraints.cat([PAIR, PARTS[2]], -1, [2, 1]), 0),
    "shaped": Shaped(constraints.cat([PAIR, PARTS[2]], -1, [2, 1]), (3,)),
    "inner": constraints.cat(
        [constraints.cat([constraints.independent(PAIR, 0)], -1, [2]), PARTS[2]], -1, [2, 1]
    ),
}


@pytest.mark.parametrize("name", ALIKE)
def test_joined_parts_have_the_density_of_their_columns(name):
    transform = random_flow(3)
    d = InterpolantDistribution(transform, support=ALIKE[name])
    known = InterpolantDistribution(transform, support=constraints.stack(PARTS, dim=-1))
    for shape in ((2,), (3, 1)):  # as many as the first part has columns, and others
        y = known.sample(shape)
        torch.testing.assert_close(d.log_prob(y), known.log_prob(y))
        _, found = d.rsample_and_log_prob(shape)
        assert found.shape == shape


@pytest.mark.parametrize("per_event", [False, True])
def test_each_member_of_a_batch_has_its_bounds(per_event):
    low = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    support = constraints.interval(low, low + 1)
    support = constraints.independent(support, 1) if per_event else support
    d = InterpolantDistribution(random_flow(2), support=support, validate_args=False)
    assert (d.batch_shape, d.event_shape) == ((3,), (2,))
    assert d.space.event_shape(2) == (2,)
    y = torch.tensor([0.5, 0.5])
    found = d.log_prob(y)
    first = constraints.interval(low[0], low[0] + 1)
    alone = InterpolantDistribution(d.transform, support=first).log_prob(y)
    torch.testing.assert_close(found, torch.stack([alone, *torch.full((2,), -math.inf)]))
    assert d.support.check(y).tolist() == [True, False, False]
    assert d.space.strictly_inside(y).tolist() == [True, False, False]


def test_bounds_of_another_size_than_the_flow_are_refused():
    support = constraints.interval(torch.zeros(3), torch.ones(3))
    for options in ({}, {"event_shape": (3,)}, {"event_shape": ()}):
        with pytest.raises(ValueError, match="expected a support of "):
            InterpolantDistribution(random_flow(1), support=support, **options)
    assert InterpolantDistribution(random_flow(3), support=support).event_shape == (3,)


@pytest.mark.parametrize("kind", ["stack", "cat"])
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_parts_along_another_dimension_than_the_last_are_refused(kind, dim):
    support = getattr(constraints, kind)([constraints.positive, constraints.real], dim)
    for given in (support, Shaped(constraints.cat([support], -1, [2]), (1, 2))):
        with pytest.raises(ValueError, match=rf"got constraints.{kind} with dim={dim}: pass dim"):
            support_of(given)


@pytest.mark.parametrize("what", ["positive", 1.0, None])
def test_what_is_no_constraint_is_refused(what):
    with pytest.raises(TypeError, match="support to be a constraint such as"):
        support_of(what)


# ---- the torus ----------------------------------------------------------------------------------


def test_angles_come_back_up_to_whole_turns():
    space = support_of(circular)
    assert isinstance(space, CircularSupport)
    assert space.event_constraint() is circular
    u = 20 * torch.rand(50, 2) - 10
    y, log_det = composed(space.transforms(torus_flow(2)), u)
    assert bool(circular.check(y).all())
    assert torch.equal(log_det, torch.zeros(50))
    back = space.unconstrained(y)
    assert back is y
    turns = (u - back) / (2 * math.pi)
    torch.testing.assert_close(turns, turns.round(), atol=1e-12, rtol=0)
    assert (space.event_shape(2), space.size(torch.Size((2,)))) == ((2,), 2)
    with pytest.raises(ValueError, match=r"angles in \[-pi, pi\], in radians, got 1 of 2 rows"):
        space.unconstrained(torch.tensor([[0.0, 1.0], [0.0, 4.0]]))


def test_the_base_of_angles_is_uniform_and_sampled_in_planes():
    space = support_of(circular)
    flow = torus_flow(3)
    base = space.default_base(flow)
    assert isinstance(base, UniformTorus)
    assert base.sample().shape == (3,)
    planar = space.sampled_base(base)
    assert isinstance(planar, Planar)
    x = base.sample((40,))
    z = space.to_sampled(x)
    assert z.shape == (40, 6)
    torch.testing.assert_close(space.from_sampled(z), x)
    torch.testing.assert_close(z.square().sum(-1), torch.full((40,), 6.0))  # as on average
    assert planar.sample((40,)).shape == (40, 6)
    velocity = space.new_velocity(3, 0, 4)
    assert (type(velocity), velocity.arguments()) == (TorusMLP, (3, (96,) * 3, 0, 4))
    assert space.default_path() == Geodesic()


class Straight(nn.Module):
    event_dim = 2

    def forward(self, t, x, context=None):
        return 0.1 * x if context is None else 0.1 * x + context


class Turning(nn.Module):
    event_dim = 2

    def forward(self, t, x, context=None):
        return x.sin() if context is None else x.sin() + context


@pytest.mark.parametrize("context", [None, torch.ones(7, 2)], ids=["plain", "context"])
def test_a_velocity_without_a_period_is_found(context):
    space, rows = support_of(circular), torch.rand(7, 2)
    flow = InterpolantTransform(Turning(), interpolant=Geodesic()).flow
    space.check_rows(flow, rows, context)
    flow = InterpolantTransform(Straight(), interpolant=Geodesic()).flow
    with pytest.raises(ValueError, match="period 2 pi .* got Straight, which differs by 1.26 "):
        space.check_rows(flow, rows, context)


def test_what_is_no_flow_on_the_torus_is_refused():
    space = support_of(circular)
    with pytest.raises(ValueError, match=r"Geodesic\(\) for angles, got Trigonometric"):
        space.transforms(random_flow(2).flow)
    with pytest.raises(ValueError, match="period 2 pi .* got VelocityMLP"):
        space.transforms(InterpolantTransform(VelocityMLP(2), interpolant=Geodesic()).flow)
    flow = torus_flow(2)
    flow.whitening.set(torch.zeros(2), 2 * torch.eye(2))
    with pytest.raises(ValueError, match="no whitening map for angles"):
        space.transforms(flow)


# ---- both, of a distribution --------------------------------------------------------------------


def test_flow_coordinates_and_unconstrained_ones_differ_by_the_map():
    case = SUPPORTS["gaussianized stack"]
    flow = InterpolantDistribution(random_flow(case.dim), support=case.support)
    y = flow.sample((5,))
    chart = case.support.gaussianizer
    torch.testing.assert_close(chart(flow.to_flow(y)), flow.unconstrained(y))
    plain = flow.without_support()
    assert plain.space.is_real()
    change = flow.transforms[-1].log_abs_det_jacobian(flow.to_flow(y), y)
    torch.testing.assert_close(flow.log_prob(y), plain.log_prob(flow.to_flow(y)) - change)


def test_bounds_of_a_finer_type_than_the_flow():
    low = torch.zeros(2, dtype=torch.float64)
    flow = random_flow(2).float()
    prior = InterpolantDistribution(flow, support=constraints.interval(low, low + 1)).freeze()
    x = prior.sample((5,))
    assert x.dtype == torch.float32
    same = InterpolantDistribution(
        flow, support=constraints.interval(low.float(), low.float() + 1)
    ).freeze()
    assert torch.allclose(prior.log_prob(x), same.log_prob(x))
    assert prior.to_flow(x).dtype == torch.float32
    assert pi.solver_error(prior, x).density_mean < 1.0
    assert pi.sample_sde(prior, x=x, steps=2).dtype == torch.float32
