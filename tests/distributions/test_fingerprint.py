"""Fingerprints by which a run knows its checkpoint: what tells values apart, what does not count.

That a run with another choice is not resumed is tested in training/test_checkpoint.py.
"""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_interpolant as pi
from pyro_interpolant.distributions.fingerprint import fingerprint


class Own:
    def __init__(self, scale):
        self.scale, self.itself = scale, self

    def method(self, x):
        return self.scale * x


class Layer(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), scale))


def local(scale):
    def function(x):
        return scale * x

    return function


def edited(scale):
    """A function of the same name and place as another, as of a script that has been edited."""
    code = compile(f"def edited(t): return t * {scale}", "script", "exec")
    found = {"__name__": "__main__"}
    exec(code, found)
    return found["edited"]


MADE = {
    "tensor": lambda scale: torch.full((2,), scale),
    "nested": lambda scale: {"a": [(1, scale)], "b": {2, 3}},
    "names of a lambda": lambda scale: (lambda x: x.sin()) if scale == 1 else (lambda x: x.cos()),
    "default": lambda scale: lambda x, y=scale: x + y,
    "edited": edited,
    "bound": lambda scale: Own(scale).method,
    "module": Layer,
    "path": lambda scale: pi.VariancePreserving(local(scale)),
    "base": lambda scale: dist.Normal(torch.zeros(2), scale).to_event(1).mask(mask=scale == 1),
}


@pytest.mark.parametrize("name", MADE)
def test_equal_values_have_one_fingerprint_and_others_another(name):
    make = MADE[name]
    one, other = make(1.0), make(2.0)
    assert fingerprint(one) == fingerprint(make(1.0)) != fingerprint(other)
    assert fingerprint(one, one) == fingerprint(one, make(1.0))  # whether shared or not
    assert fingerprint(one, other) != fingerprint(other, one)


def test_what_does_not_count():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint(torch.ones(2, 3).T) == fingerprint(torch.ones(3, 2))
    x = torch.randn(3, 2)
    assert fingerprint(x) == fingerprint(x.numpy()) != fingerprint(x.float())
    base = pi.InterpolantDistribution(pi.interpolant_transform(2, (8,)))
    before = fingerprint(base)
    base.log_prob(base.sample((3,)))
    base.transform.eval().register_forward_hook(print)
    assert fingerprint(base) == before
