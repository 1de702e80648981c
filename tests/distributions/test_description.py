"""What a file holds of constraints, whitening maps and the noise: names and numbers."""

import pytest
import torch
from cases import WHITENINGS, random_flow
from pyro.distributions import constraints

from pyro_interpolant import InterpolantDistribution, TorusMLP, VelocityMLP, load, save
from pyro_interpolant.distributions.constraints import Shaped, circular
from pyro_interpolant.distributions.part_description import build_constraint, describe_constraint

BOUNDS = torch.tensor([0.1, 1.0], dtype=torch.float64)

# As files have them, since version 0.1.0.
WRITTEN = [
    (circular, "circular"),
    (constraints.positive, "positive"),
    (constraints.interval(-2.0, 3.0), ["bounded", "interval", [-2.0, 3.0]]),
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
WRITTEN_BY_0_1 = [
    (["stack", ["real", "positive"], -1, None], ["stack", ["real", "positive"], -1]),
    (["bounded", "simplex", [None, None]], "simplex"),
]


def test_constraints_are_written_and_read_as_they_were():
    for constraint, expected in WRITTEN:
        assert describe_constraint(constraint) == expected
        assert describe_constraint(build_constraint(expected)) == expected
    for old, expected in WRITTEN_BY_0_1:
        assert describe_constraint(build_constraint(old)) == expected


@pytest.mark.parametrize(
    ("name", "noise"), [("dense", VelocityMLP), ("diagonal", TorusMLP), ("scalar", VelocityMLP)]
)
def test_each_whitening_and_the_noise_are_saved(name, noise, tmp_path):
    kind, linear = WHITENINGS[name]
    transform = random_flow(2)
    transform.flow.whitening = kind(2)
    transform.flow.whitening.set(torch.tensor([1.0, -2.0]), linear(2))
    transform.flow.noise = noise(2, (8,))
    flow = InterpolantDistribution(transform)
    save(flow, tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors")
    assert type(again.transform.flow.whitening) is kind
    x = torch.randn(5, 2)
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert type(again.transform.flow.noise) is noise
    t = torch.tensor(0.4)
    assert torch.equal(again.transform.flow.noise(t, x), transform.flow.noise(t, x))
