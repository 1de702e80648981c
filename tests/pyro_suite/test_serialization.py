"""What Pyro asserts of pickles, copies and compiled modules, of every kind of flow after use."""

import copy
import io

import pyro
import pytest
import torch
from cases import COPIES
from kinds import KINDS, family
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import nn

from pyro_interpolant import base_space

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def used(kind):
    """Return a flow whose cache holds graphs, a value, and its density where there is one."""
    d = KINDS[kind]().expand_by((2,))
    x = d.sample()
    d.sample((3,))
    if d.has_rsample:
        d.rsample()
    if kind == "samples":
        return d, x, torch.zeros(())
    d.log_prob(d.rsample())
    d.log_prob(x.clone().requires_grad_())
    return d, x, d.log_prob(x.clone()).detach()


def seeded_sample(d):
    torch.manual_seed(3)
    return d.sample((2,))


@pytest.mark.usefixtures("_nodes_stay")
@pytest.mark.parametrize("how", COPIES)
def test_copies(how):
    """Each kind in one way, and one kind in all ways."""
    first = [*COPIES].index(how)
    for kind in ("given", *[*KINDS][first :: len(COPIES)]):
        check_copy(kind, how)


def check_copy(kind, how):
    d, x, expected = used(kind)
    made = COPIES[how](d)
    assert type(made) is type(d)
    assert made.shape() == d.shape()
    assert repr(made) == repr(d)
    assert torch.equal(seeded_sample(made), seeded_sample(d))
    if kind == "samples":
        return
    value = x.clone()
    torch.testing.assert_close(made.log_prob(value).detach(), expected)
    ours, theirs = d.transform.flow.parameters(), made.transform.flow.parameters()
    assert all(a is not b and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    with torch.no_grad():  # the copy has weights of its own
        made.transform.flow.whitening.loc.add_(1.0)
        if how != "another process":  # which shares the memory of tensors
            torch.testing.assert_close(d.log_prob(x.clone()), expected)
        assert not torch.allclose(made.log_prob(value), expected)


@pytest.mark.usefixtures("_nodes_stay")
@pytest.mark.parametrize("how", ["torch", "deepcopy"])
def test_copies_of_a_family(how):
    d, context = family(), torch.randn(4, 3)
    x = d.condition(context).sample()
    expected = d.condition(context).log_prob(x)
    made = COPIES[how](d)
    value = x.clone()
    torch.testing.assert_close(made.condition(context).log_prob(value), expected)
    with torch.no_grad():  # the copy has weights of its own
        made.transform.velocity.output.weight.add_(0.5)
        torch.testing.assert_close(d.condition(context).log_prob(x.clone()), expected)
        assert not torch.allclose(made.condition(context).log_prob(value), expected)


class Density(nn.Module):
    """A module that holds a flow, as a user's own does."""

    def __init__(self, d):
        super().__init__()
        self.flow = d.transform if d.transform.owns_flow() else d.transform.flow
        self.d = [d]

    def forward(self, x):
        return self.d[0].log_prob(x)


TRACED = ["plain", "corr_cholesky", "tempered", "flow base", "given", "angles", "hutchinson"]


@pytest.mark.parametrize("kind", [*TRACED, "joint", "expanded"])
def test_a_traced_density(kind):
    """As a function, and as a module that holds the flow, saved and loaded."""
    d = KINDS[kind]().freeze()
    x, other = d.sample().clone(), d.sample().clone()
    expected = d.log_prob(other.clone())
    traced = torch.jit.trace(d.log_prob, (x,), check_trace=False)
    torch.testing.assert_close(traced(other), expected)
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(Density(d), (x,), check_trace=False), file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(other), expected)


def test_steps_that_depend_on_the_values_are_not_traced():
    d = KINDS["adaptive"]().freeze()
    with pytest.raises(ValueError, match="FixedGrid"):
        torch.jit.trace(d.log_prob, (d.sample().clone(),), check_trace=False)


@pytest.mark.parametrize("kind", ["given rows", "joint", "angles"])
def test_models_that_hold_a_flow(kind):
    """A wrapped model can be copied, and a guide of it."""
    model = base_space(Sites(KINDS[kind]()))
    guide = AutoNormal(model)
    guide()
    for make in COPIES.values():
        other = make(model)
        trace = poutine.trace(other).get_trace()
        replayed = poutine.trace(poutine.replay(model, trace)).get_trace()
        torch.testing.assert_close(trace.nodes["z"]["value"], replayed.nodes["z"]["value"])
    assert copy.deepcopy(guide)().keys() == guide().keys()


class Sites:
    """A model as an object, which can be pickled."""

    def __init__(self, d):
        self.d = d

    def __call__(self):
        with pyro.plate_stack("rows", self.d.batch_shape):
            pyro.sample("z", self.d)
