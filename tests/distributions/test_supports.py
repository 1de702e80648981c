"""Supports in parts, with bounds of each member, and in other types than the flow."""

import math

import pytest
import torch
from cases import SUPPORTS, random_flow
from pyro.distributions import constraints

from pyro_interpolant import InterpolantDistribution
from pyro_interpolant.distributions.constraints import Shaped

POSITIVE, UNIT = constraints.positive, constraints.unit_interval
CAT = constraints.cat([POSITIVE, UNIT], dim=-1, lengths=[2, 1])
IN_PARTS = {
    "independent, in a row": (Shaped(constraints.independent(CAT, 0), (1, 3)), (1, 3)),
    "cat of a vector": (
        constraints.cat([constraints.independent(POSITIVE, 1), UNIT], -1, [2, 1]),
        (3,),
    ),
    "stack in a column": (
        Shaped(constraints.stack([POSITIVE, POSITIVE, UNIT], dim=-1), (3, 1)),
        (3, 1),
    ),
}
WITHIN = [[1.0, 2.0, 0.5], [0.0, 1.0, 0.5], [1.0, -1.0, 0.5], [1.0, 1.0, 1.0], [1.0, 1.0, 1.5]]


@pytest.mark.parametrize("name", IN_PARTS)
def test_bounds_of_supports_in_parts_are_those_of_each(name):
    support, shape = IN_PARTS[name]
    d = InterpolantDistribution(random_flow(3), support=support, validate_args=False)
    y = torch.tensor(WITHIN).reshape(5, *shape)
    assert d.unconstrained(y[:1]).isfinite().all()
    with pytest.raises(ValueError, match="got 4 of 5 rows outside it or on its edge"):
        d.unconstrained(y)
    found = d.log_prob(y)
    assert found[0].isfinite()
    assert (found[[2, 4]] == -math.inf).all()


PARTS = [POSITIVE, constraints.interval(-1.0, 2.0), constraints.less_than(3.0)]
PAIR = constraints.stack(PARTS[:2], dim=-1)
ALIKE = {
    "stacks": constraints.cat([PAIR, constraints.stack(PARTS[2:], dim=-1)], -1, [2, 1]),
    "shaped": Shaped(constraints.cat([PAIR, PARTS[2]], -1, [2, 1]), (3,)),
    "inner": constraints.independent(
        constraints.cat(
            [constraints.cat([constraints.independent(PAIR, 0)], -1, [2]), PARTS[2]], -1, [2, 1]
        ),
        0,
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
    y = torch.tensor([0.5, 0.5])
    found = d.log_prob(y)
    first = constraints.interval(low[0], low[0] + 1)
    alone = InterpolantDistribution(d.transform, support=first).log_prob(y)
    torch.testing.assert_close(found, torch.stack([alone, *torch.full((2,), -math.inf)]))
    assert d.support.check(y).tolist() == [True, False, False]


def test_flow_coordinates_and_unconstrained_ones_differ_by_the_map():
    case = SUPPORTS["gaussianized stack"]
    flow = InterpolantDistribution(random_flow(case.dim), support=case.support)
    y = flow.sample((5,))
    chart = case.support.gaussianizer
    torch.testing.assert_close(chart(flow.to_flow(y)), flow.unconstrained(y))
    plain = flow.without_support()
    change = flow.transforms[-1].log_abs_det_jacobian(flow.to_flow(y), y)
    torch.testing.assert_close(flow.log_prob(y), plain.log_prob(flow.to_flow(y)) - change)
