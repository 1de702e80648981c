"""What describes a flow: constraints, whitening maps and bases, as names and numbers."""

import copy
import json

import pyro.distributions as dist
import pytest
import torch
from cases import SUPPORTS, random_flow
from pyro.distributions import constraints
from torch import nn

from pyro_interpolant import (
    InterpolantDistribution,
    InterpolantTransform,
    Samples,
    TorusMLP,
    UniformTorus,
    VelocityMLP,
    load,
    save,
)
from pyro_interpolant.distributions import constraints as ours
from pyro_interpolant.distributions.constraints import Constraint, Shaped, circular
from pyro_interpolant.distributions.description import build, describe
from pyro_interpolant.distributions.part_description import (
    build_constraint,
    describe_constraint,
)
from pyro_interpolant.transforms.whitening import (
    DenseWhitening,
    DiagonalWhitening,
    ScalarWhitening,
)

# ---- constraints --------------------------------------------------------------------------------

BOUNDS = torch.tensor([0.1, 1.0], dtype=torch.float64)

# As files have them, since version 0.1.0.
WRITTEN = [
    (circular, "circular"),
    (constraints.positive, "positive"),
    (constraints.softplus_positive, "softplus_positive"),
    (constraints.interval(-2.0, 3.0), ["bounded", "interval", [-2.0, 3.0]]),
    (constraints.less_than(2.0), ["bounded", "less_than", [None, 2.0]]),
    (
        constraints.greater_than(BOUNDS),
        ["bounded", "greater_than", [["float64", [0.1, 1.0]], None]],
    ),
    (constraints.independent(constraints.real, 1), ["independent", "real", 1]),
    (
        constraints.stack([constraints.positive, constraints.less_than(0.0)], dim=-1),
        ["stack", ["positive", ["bounded", "less_than", [None, 0.0]]], -1],
    ),
    (
        constraints.cat([constraints.less_than(0.0), constraints.real], -1, [2, 1]),
        ["cat", [["bounded", "less_than", [None, 0.0]], "real"], -1, [2, 1]],
    ),
    (Shaped(constraints.positive, (2, 3)), ["shaped", "positive", [2, 3]]),
]


@pytest.mark.parametrize(("constraint", "expected"), WRITTEN, ids=str)
def test_constraints_are_written_as_they_were(constraint, expected):
    assert describe_constraint(constraint) == expected
    assert describe_constraint(build_constraint(expected)) == expected


@pytest.mark.parametrize("name", SUPPORTS)
def test_a_description_is_json_and_gives_the_constraint_back(name):
    support = SUPPORTS[name].support
    text = json.dumps(describe_constraint(support))
    again = build_constraint(json.loads(text))
    assert type(again) is type(support)
    assert json.dumps(describe_constraint(again)) == text


@pytest.mark.parametrize("name", SUPPORTS)
def test_a_copy_is_the_same_constraint(name):
    case = SUPPORTS[name]
    again = build_constraint(describe_constraint(copy.deepcopy(case.support)))
    value = case.support.check(torch.ones(case.event_shape))
    assert torch.equal(again.check(torch.ones(case.event_shape)), value)


@pytest.mark.parametrize(
    ("old", "expected"),
    [
        (["stack", ["real", "positive"], -1, None], ["stack", ["real", "positive"], -1]),
        (["bounded", "simplex", [None, None]], "simplex"),
    ],
)
def test_what_version_0_1_wrote_otherwise(old, expected):
    assert describe_constraint(build_constraint(old)) == expected


def test_a_constraint_of_this_package_needs_nothing_else(monkeypatch):
    """A class with arguments, and an only one of its class, as if they were in the module."""
    from pyro_interpolant.distributions import part_description as description

    class Above(Constraint):
        def __init__(self, floor, inner, steps=(1, 2)):
            self.floor, self.inner, self.steps = floor, inner, steps

    class Between(Constraint):
        def __init__(self, upper_bound=None, lower_bound=None):
            self.lower_bound, self.upper_bound = lower_bound, upper_bound

    class Everywhere(Constraint):
        pass

    known = {"above": Above, "between": Between, "everywhere": Everywhere()}
    for name, value in known.items():
        monkeypatch.setitem(description._CONSTRAINTS, name, value)
    monkeypatch.setitem(description._CONSTRAINT_NAMES, Above, "above")
    monkeypatch.setitem(description._CONSTRAINT_NAMES, Between, "between")
    monkeypatch.setitem(description._CONSTRAINT_NAMES, Everywhere, "everywhere")
    above = Above(torch.ones(2), [constraints.real, Above(0.5, Everywhere())], (3, 4))
    described = describe_constraint(above)
    assert described[0] == "above"
    again = build_constraint(json.loads(json.dumps(described)))
    assert torch.equal(again.floor, above.floor)
    assert list(again.steps) == [3, 4]
    assert again.inner[0] is constraints.real
    assert again.inner[1].floor == 0.5
    assert again.inner[1].inner is known["everywhere"]
    below = build_constraint(describe_constraint(Between(upper_bound=2.0)))
    assert (below.upper_bound, below.lower_bound) == (2.0, None)
    with pytest.raises(ValueError, match="made of numbers and supports, got 'x'"):
        describe_constraint(Above("x", 1.0))


def test_each_constraint_has_a_name_of_its_own():
    """A name stands for a class with arguments, or for the only one of a class without."""
    for name, value in vars(ours).items():
        if isinstance(value, Constraint):
            assert not vars(value), f"{name} has arguments: files would forget them"


def test_a_constraint_of_the_users_is_refused():
    class Mine(Constraint):
        pass

    with pytest.raises(ValueError, match=r"a support from pyro.distributions.constraints, got"):
        describe_constraint(Mine())
    with pytest.raises(ValueError, match="unknown support 'mine' in the file"):
        build_constraint(["mine"])


# ---- whitening ----------------------------------------------------------------------------------

WHITENINGS = {
    "dense": (DenseWhitening, torch.tensor([[2.0, 0.0], [0.3, 0.5]])),
    "diagonal": (DiagonalWhitening, torch.tensor([2.0, 0.5])),
    "scalar": (ScalarWhitening, torch.tensor(1.5)),
}


@pytest.mark.parametrize("name", WHITENINGS)
def test_each_whitening_is_saved(name, tmp_path):
    kind, linear = WHITENINGS[name]
    transform = InterpolantTransform(VelocityMLP(2, (8, 8)), whitening=kind(2))
    nn.init.normal_(transform.velocity.output.weight)
    transform.flow.whitening.set(torch.tensor([1.0, -2.0]), linear)
    flow = InterpolantDistribution(transform)
    save(flow, tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors")
    assert type(again.transform.flow.whitening) is kind
    assert torch.equal(again.transform.flow.whitening.matrix(), transform.flow.whitening.matrix())
    x = torch.randn(5, 2)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))


# ---- bases --------------------------------------------------------------------------------------


def laplace():
    return dist.Laplace(torch.tensor([0.5, -1.0]), torch.ones(2)).to_event(1)


def test_a_base_that_is_a_flow_from_a_flow_from_a_base():
    flow = laplace()
    for _ in range(3):
        flow = InterpolantDistribution(random_flow(2), flow)
    again = build(*describe(flow))
    x = torch.randn(5, 2)
    inner, inner_again = flow, again
    for _ in range(3):
        inner, inner_again = inner.base, inner_again.base
        assert type(inner_again) is type(inner)
    tensors = describe(again)[1]
    for name, tensor in describe(flow)[1].items():
        assert torch.equal(tensors[name], tensor), name
    assert torch.equal(again.log_prob(x), flow.log_prob(x))


@pytest.mark.parametrize(
    "base",
    [
        lambda: Samples(torch.randn(7, 2)),
        lambda: UniformTorus(2),
        lambda: InterpolantDistribution(random_flow(2), Samples(torch.randn(7, 2))),
    ],
    ids=["samples", "torus", "flow from samples"],
)
def test_draws_of_a_base_are_kept(base):
    flow = InterpolantDistribution(random_flow(2), base())
    header, tensors = describe(flow)
    again = build(json.loads(json.dumps(header)), tensors)
    torch.manual_seed(1)
    expected = flow.sample((4,))
    torch.manual_seed(1)
    assert torch.equal(again.sample((4,)), expected)


# ---- the noise of a latent term -----------------------------------------------------------------


@pytest.mark.parametrize("kind", [VelocityMLP, TorusMLP])
def test_the_noise_is_a_network_of_its_own_class(kind):
    flow = InterpolantDistribution(random_flow(2))
    flow.transform.flow.noise = kind(2, (8,))
    header, tensors = describe(flow)
    again = build(json.loads(json.dumps(header)), tensors).transform.flow.noise
    assert type(again) is kind
    for name, value in flow.transform.flow.noise.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_a_noise_of_the_users_is_refused():
    flow = InterpolantDistribution(random_flow(2))
    flow.transform.flow.noise = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="a noise of this package, got a Linear"):
        describe(flow)
