"""Fingerprints: what tells values apart, and what does not count."""

import collections
import datetime
import functools
import logging
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from cases import OwnVelocity
from torch import nn

import pyro_interpolant as pi
from pyro_interpolant.distributions.fingerprint import fingerprint, layers_of


@dataclass(frozen=True, slots=True)
class Slots:
    scale: float


class PlainSlots:
    __slots__ = ("scale",)

    def __init__(self, scale):
        self.scale = scale


class Number(float):
    pass


class Own:
    def __init__(self, scale):
        self.scale, self.itself = scale, self

    def method(self, x):
        return self.scale * x


class Lazy:
    def __init__(self, scale):
        self.scale = scale

    @functools.cached_property
    def double(self):
        return 2 * self.scale


class Factor(nn.Module):
    """A layer whose setting its repr alone tells."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def extra_repr(self):
        return f"{self.scale} of {object()}"


class Layer(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale, self.weight = 3.0, nn.Parameter(torch.full((2,), scale))


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


def recursive(scale):
    def function(x):
        return function(x - scale)

    return function


def calls(scale):
    return (lambda x: x.sin()) if scale == 1 else (lambda x: x.cos())


MADE = {
    "number": lambda scale: scale,
    "text": str,
    "tensor": lambda scale: torch.full((2,), scale),
    "shape": lambda scale: torch.zeros(int(scale), 2),
    "dtype": lambda scale: torch.ones(2, dtype=torch.float32 if scale == 1 else torch.int32),
    "bfloat16": lambda scale: torch.full((2,), scale, dtype=torch.bfloat16),
    "array": lambda scale: np.full((2, 3), scale).T,
    "frame": lambda scale: pd.DataFrame({"a": ["x", f"y{scale}"], "b": [1.0, 2.0]}),
    "nested": lambda scale: {"a": [(1, scale)], "b": {2, 3}},
    "set": lambda scale: {"a", "b", f"c{scale}"},
    "partial": lambda scale: functools.partial(local, scale=scale),
    "local": local,
    "lambda": lambda scale: (lambda x: x) if scale == 1 else (lambda x: x + x),
    "names of a lambda": calls,
    "default": lambda scale: lambda x, y=scale: x + y,
    "edited": edited,
    "recursive": recursive,
    "bound": lambda scale: Own(scale).method,
    "object": Own,
    "slots": Slots,
    "plain slots": PlainSlots,
    "fraction": Fraction,
    "decimal": Decimal,
    "date": lambda scale: datetime.date(int(scale), 1, 1),
    "path of a file": lambda scale: Path(f"{scale}"),
    "deque": lambda scale: collections.deque([scale]),
    "bytes": lambda scale: bytearray(int(scale)),
    "kind of number": lambda scale: Number(scale),
    "sparse": lambda scale: torch.tensor([0.0, scale]).to_sparse(),
    "conjugate": lambda scale: torch.tensor([1.0, scale * 1j]).conj(),
    "meta": lambda scale: torch.empty(int(scale), device="meta"),
    "logger": lambda scale: logging.getLogger(f"{scale}"),
    "module": Layer,
    "attribute": lambda scale: types.SimpleNamespace(layer=nn.LeakyReLU(scale)),
    "path": lambda scale: pi.VariancePreserving(local(scale)),
    "solver": lambda scale: pi.FixedGrid(int(scale)),
    "base": lambda scale: dist.Normal(torch.zeros(2), scale).to_event(1).mask(mask=scale == 1),
    "mixture": lambda scale: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(torch.zeros(2), scale)
    ),
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
    assert fingerprint(object()) == fingerprint(object())
    assert fingerprint(torch.ones(2, 3).T) == fingerprint(torch.ones(3, 2))
    assert fingerprint(np) == fingerprint(np) != fingerprint(torch)
    layer = Layer(1.0)
    before = fingerprint(layer)
    layer.eval().register_forward_hook(print)
    assert fingerprint(layer) == before


def test_arrays_and_tensors_of_the_same_numbers_are_the_same():
    x = torch.randn(3, 2)
    assert fingerprint(x) == fingerprint(x.numpy()) != fingerprint(x.float())


def test_what_is_not_there_yet_and_what_is_remembered_do_not_count():
    def later():
        return unknown

    before = fingerprint(later)
    unknown = 1.0
    assert fingerprint(later) != before
    value = Lazy(2.0)
    before = fingerprint(value)
    assert value.double == 4.0
    assert fingerprint(value) == before
    logger = logging.getLogger("one")
    before = fingerprint(logger)
    logging.getLogger("one more of a test of fingerprints")
    assert fingerprint(logger) == before


def test_a_flow_that_was_used_is_the_same_base():
    base = pi.InterpolantDistribution(pi.interpolant_transform(2, (8,)))
    before = fingerprint(base)
    base.log_prob(base.sample((3,)))
    base.report = pi.distributions.report.Report(2, 10, 3.0, 1, 2)
    assert fingerprint(base) == before
    other = pi.InterpolantDistribution(
        pi.InterpolantTransform(base.transform.velocity, interpolant=pi.Linear())
    )
    assert fingerprint(other) != before


def test_layers_tell_networks_apart_whatever_their_weights():
    def layers(network):
        return fingerprint(layers_of(network))

    assert layers(pi.VelocityMLP(2, (8,))) == layers(pi.VelocityMLP(2, (8,)))
    others = (pi.VelocityMLP(2, (8,)), pi.VelocityMLP(2, (9,)), pi.VelocityMLP(3, (8,)))
    others += OwnVelocity(2), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2), Factor(1.0), Factor(2.0)
    assert layers(Factor(1.0)) == layers(Factor(1.0))
    assert len({layers(network) for network in others}) == len(others)


IN_A_PROCESS = """
import torch
import pyro.distributions as dist
from pyro_interpolant import independent
from pyro_interpolant.distributions.fingerprint import fingerprint

scale = torch.ones(2)
print(fingerprint(
    {"a", "b", "c"}, lambda x: scale * x if x in {"d", "e", "f"} else x, independent, object(),
    dist.Normal(0.0, scale), torch.sin, torch.Generator(),
))
"""


@pytest.mark.slow
def test_a_fingerprint_is_the_same_in_another_process():
    found = set()
    for seed in "12":
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", IN_A_PROCESS]
        found.add(subprocess.run(command, check=True, capture_output=True, env=environment).stdout)
    assert len(found) == 1
