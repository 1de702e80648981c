"""The protocol of a velocity: optional parts are used where they are there, and only there."""

import copy

import pytest
import torch
from cases import OwnVelocity, random_flow
from pyro.ops.provenance import detach_provenance, track_provenance
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import pyro_interpolant as pi
from pyro_interpolant.nn import velocity as protocol
from pyro_interpolant.nn.mlp import untrained_like

TIMES = torch.linspace(0.1, 0.9, 3, dtype=torch.float64)


class Decay(nn.Module):
    """The velocity -x, with every optional part, which counts its calls."""

    event_dim, context_dim = 2, 0
    broadcasts_time = is_periodic = False

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, t, x, context=None):
        self.calls.append("forward")
        return -x

    def field(self, times, context=None):
        self.calls.append("field")
        return [lambda x: -x] * len(times)

    def forward_and_divergence(self, t, x, context=None):
        self.calls.append("forward_and_divergence")
        return -x, x.new_full(x.shape[:-1], -2.0)

    def divergence_field(self, times, context=None):
        self.calls.append("divergence_field")
        return [lambda x: x.new_full(x.shape[:-1], -2.0)] * len(times)

    def rows_at_once(self):
        return 7

    def set_scales(self, w, context=None):
        self.calls.append("set_scales")

    def is_untrained(self):
        return False

    def untrained_copy(self):
        return Decay()


class NewForward(Decay):
    """A later velocity, -3 x, whose other parts are left from -x."""

    def forward(self, t, x, context=None):
        return -3 * x


class NewDivergence(Decay):
    def forward_and_divergence(self, t, x, context=None):
        return -x, x.new_full(x.shape[:-1], -5.0)


class NewField(NewForward):
    """The field of the later velocity, said again."""

    def field(self, times, context=None):
        self.calls.append("new field")
        return [lambda x: -3 * x] * len(times)


def values(functions, x):
    return torch.stack([f(x) for f in functions])


# A network with forward alone


def test_a_network_with_forward_alone_has_a_field_and_defaults_for_all_else():
    velocity, x = OwnVelocity(2), torch.randn(4, 2)
    found = values(protocol.field(velocity, TIMES, None), x)
    expected = torch.stack([velocity(t.expand(4), x) for t in TIMES])
    torch.testing.assert_close(found, expected)
    assert protocol.exact_divergence(velocity) is None
    assert protocol.divergence_field(velocity, TIMES, None) is None
    assert protocol.rows_at_once(velocity) > 1
    assert protocol.may_be_periodic(velocity)
    assert protocol.size_of(velocity, "event_dim") is None
    protocol.set_scales(velocity, x, None)
    protocol.set_scales(velocity, x, None, if_trained=False)


def test_times_and_contexts_have_the_shape_of_all_rows_unless_a_network_broadcasts_them():
    shapes = []

    class Shapes(nn.Module):
        def forward(self, t, x, context=None):
            shapes.append((tuple(t.shape), None if context is None else tuple(context.shape)))
            return x

    velocity, x = Shapes(), torch.randn(3, 4, 2)
    protocol.evaluate(velocity, TIMES[:, None], x)
    protocol.evaluate(velocity, TIMES[0], x, torch.randn(5))
    velocity.broadcasts_time = True
    protocol.evaluate(velocity, TIMES[:, None], x, torch.randn(5))
    assert shapes == [((3, 4), None), ((3, 4), (3, 4, 5)), ((3, 1), (5,))]


@torch.no_grad()
def test_times_and_contexts_stay_with_their_images_in_pieces():
    class Images(torch.nn.Module):
        event_dim, image_shape, most = 2, (2, 1, 1), 0

        def rows_at_once(self):
            return 2

        def forward(self, t, x, context):
            self.most = max(self.most, len(x))
            return t[..., None] * x + context

    velocity, x = Images(), torch.randn(3, 5, 2)
    for t in (torch.rand(3, 1), torch.rand(5), torch.rand(3, 5)):
        for context in (torch.randn(2), torch.randn(5, 2), torch.randn(3, 1, 2)):
            found = protocol.evaluate(velocity, t, x, context)
            assert torch.equal(found, t[..., None] * x + context)
    assert velocity.most == 2
    tracked = track_provenance(x, frozenset({"a"}))  # as in ``render_model``
    again = protocol.evaluate(velocity, t, tracked, context)
    assert torch.equal(detach_provenance(again), found)


# A network with all optional parts


def test_every_optional_part_is_used():
    velocity, x = Decay(), torch.randn(4, 2)
    assert torch.equal(values(protocol.field(velocity, TIMES, None), x), (-x).expand(3, 4, 2))
    found = values(protocol.divergence_field(velocity, TIMES, None), x)
    assert torch.equal(found, torch.full((3, 4), -2.0))
    assert velocity.calls == ["field", "divergence_field"]
    assert protocol.exact_divergence(velocity)(TIMES[0], x)[1].tolist() == [-2.0] * 4
    assert protocol.rows_at_once(velocity) == 7
    assert not protocol.may_be_periodic(velocity)
    assert protocol.size_of(velocity, "event_dim") == 2
    assert protocol.size_of(velocity, "context_dim") == 0
    assert type(untrained_like(velocity, 2, 0, 0)) is Decay


def test_scales_of_a_trained_network_are_kept_where_they_shall_be():
    velocity, w = Decay(), torch.randn(4, 2)
    protocol.set_scales(velocity, w, None, if_trained=False)
    assert velocity.calls == []
    protocol.set_scales(velocity, w, None)
    assert velocity.calls == ["set_scales"]
    velocity.is_untrained = lambda: True
    protocol.set_scales(velocity, w, None, if_trained=False)
    assert velocity.calls == ["set_scales"] * 2


def test_a_context_for_every_row_goes_through_forward(monkeypatch):
    velocity, x, context = Decay(), torch.randn(4, 2), torch.randn(4, 1)
    protocol.field(velocity, TIMES, context[0])
    assert velocity.calls == ["field"]
    monkeypatch.setattr(protocol, "_SHARED_CONTEXTS", 3)  # fewer than there are
    values(protocol.field(velocity, TIMES, context), x)
    assert velocity.calls == ["field"] + ["forward"] * 3
    assert protocol.divergence_field(velocity, TIMES, context) is None


# Subclasses


def test_new_parts_are_not_bypassed_by_old_ones():
    x = torch.randn(4, 2)
    later = (-3 * x).expand(3, 4, 2)
    velocity = NewForward()
    assert torch.equal(values(protocol.field(velocity, TIMES, None), x), later)
    assert "field" not in velocity.calls
    velocity = NewField()
    assert torch.equal(values(protocol.field(velocity, TIMES, None), x), later)
    assert velocity.calls == ["new field"]
    velocity = NewDivergence()
    assert protocol.divergence_field(velocity, TIMES, None) is None
    found = values(pi.ExactDivergence().field(velocity, TIMES, None), x)
    assert torch.equal(found, torch.full((3, 4), -5.0))


class DoubledForward(pi.VelocityMLP):
    """A user's network: twice the default's velocity, by whoever overrides that alone."""

    def forward(self, t, x, context=None):
        return 2 * super().forward(t, x, context)


class Plain(nn.Module):
    """The same without any optional part."""

    def __init__(self, velocity):
        super().__init__()
        self.inner = velocity

    def forward(self, t, x, context=None):
        return 2 * self.inner(t, x, context)


@pytest.mark.parametrize("context_dim", [0, 3])
def test_a_flow_of_a_subclass_is_that_of_its_own_forward(context_dim):
    kind = pi.ConditionalInterpolantTransform if context_dim else pi.InterpolantTransform
    inner = random_flow(2, context_dim=context_dim).velocity
    doubled = DoubledForward(2, (16, 16), context_dim)
    doubled.load_state_dict(inner.state_dict())
    flows = [kind(v, 2, solver=pi.FixedGrid(steps=8)) for v in (doubled, Plain(inner))]
    if context_dim:
        context = torch.randn(context_dim)
        flows = [flow.condition(context) for flow in flows]
    x = torch.randn(5, 2)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            (y, log_det), (other, expected) = (
                (f(x), f.log_abs_det_jacobian(x, f(x))) for f in flows
            )
        torch.testing.assert_close(y, other)
        torch.testing.assert_close(log_det, expected)
        assert log_det.abs().max() > 1e-2


# Hooks


class Called(nn.Module):
    """A network that calls another."""

    def __init__(self, velocity):
        super().__init__()
        self.inner = velocity

    def forward(self, t, x, context=None):
        return self.inner(t, x)


def double(module, given, out):
    return 2 * out


def triple(module, given, out):
    return tuple(None if g is None else 3 * g for g in given)


def results(velocity, x):
    """Images, log-determinants, and the gradient in x of both, of a frozen flow."""
    flow = pi.InterpolantTransform(velocity, 2, solver=pi.FixedGrid(steps=4))
    flow.requires_grad_(requires_grad=False)
    with torch.no_grad():
        y = flow(x)
        found = [y, flow.log_abs_det_jacobian(x, y)]
    x = x.clone().requires_grad_()
    y = flow(x)
    total = y.sum() + flow.log_abs_det_jacobian(x, y).sum()
    return torch.cat([part.flatten() for part in (*found, *torch.autograd.grad(total, x))])


HOOKS = {
    "after": lambda v: v.register_forward_hook(double),
    "of a part": lambda v: v.embedding.register_forward_hook(double),
    "backward": lambda v: v.register_full_backward_hook(triple),
    "backward, of a layer": lambda v: v.layers[0].register_full_backward_hook(triple),
    "own forward": lambda v: setattr(v, "forward", lambda t, x, context=None: -x),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_count_in_a_flow_as_in_a_call(hook):
    velocity, x = random_flow(2, (8, 8)).velocity, torch.randn(3, 2)
    before = results(velocity, x)
    HOOKS[hook](velocity)
    after = results(velocity, x)
    torch.testing.assert_close(after, results(Called(velocity), x))
    assert (after - before).abs().max() > 1e-2


COMPUTED = [
    ("layers.1", lambda layer: layer.register_forward_hook(double)),
    ("output", lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    ("output", weight_norm),
    ("layers.1", parametrizations.spectral_norm),
]


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize(("name", "compute"), COMPUTED)
def test_weights_that_are_computed_from_others_follow_them(name, compute):
    velocity, x = random_flow(2, (8, 8, 8)).velocity, torch.randn(3, 2)
    plain, layer = copy.deepcopy(velocity), velocity.get_submodule(name)
    compute(layer)
    velocity.eval()
    layer = velocity.get_submodule(name)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.3 * torch.randn_like(p))
    found = results(velocity, x)  # before a call of the layer itself
    with torch.no_grad():
        plain.get_submodule(name).weight.copy_(layer(torch.eye(8)).T)
    torch.testing.assert_close(found, results(plain, x))


def test_a_layer_with_a_bias_counts():
    velocity, x = random_flow(2, (8, 8)).velocity, torch.randn(3, 2)
    plain = copy.deepcopy(velocity)
    velocity.output = nn.Linear(8, 2)
    velocity.output.weight = plain.output.weight
    with torch.no_grad():
        plain.shifts.bias[-2:] += velocity.output.bias
    torch.testing.assert_close(results(velocity, x), results(plain, x))
    with pytest.raises(ValueError, match="without biases, adapters and hooks"):
        velocity.forward_and_divergence(torch.tensor(0.5), x)
