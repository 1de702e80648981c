import math

import numpy as np
import pytest
import torch
from cases import HIDDEN_DIMS, OwnVelocity
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_interpolant import (
    ConditionalInterpolantTransform,
    InterpolantTransform,
    TorusMLP,
    VelocityMLP,
)
from pyro_interpolant.nn.mlp import untrained_like
from pyro_interpolant.nn.velocity import field


def network(hidden_dims=(16, 16), context_dim=0, dim=3):
    velocity = VelocityMLP(dim, hidden_dims, context_dim)
    with torch.no_grad():
        velocity.output.weight.normal_()
        velocity.shifts.weight.normal_(std=0.3)
        velocity.shifts.bias.normal_(std=0.3)
        velocity.scales.weight.normal_(std=0.3)
    return velocity


@pytest.mark.parametrize("reach", [math.inf, 2.0])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("name", HIDDEN_DIMS)
def test_three_ways_to_the_same_velocity(name, context_dim, reach):
    velocity = network(HIDDEN_DIMS[name], context_dim)
    velocity.reach.fill_(reach)
    x, times = torch.randn(7, 3), torch.rand(4)
    contexts = [torch.randn(2), torch.randn(7, 2)] if context_dim else [None]
    for context in contexts:
        fields = field(velocity, times, context)
        assert len(fields) == 4
        for t, f in zip(times, fields, strict=True):
            v = velocity(t, x, context)
            assert v.shape == (7, 3)
            torch.testing.assert_close(f(x), v, rtol=1e-12, atol=1e-12)
            both = velocity.forward_and_divergence(t, x, context)
            torch.testing.assert_close(both[0], v, rtol=1e-12, atol=1e-12)
            assert both[1].shape == (7,)


@pytest.mark.parametrize("name", HIDDEN_DIMS)
def test_time_and_context_matter(name):
    velocity = network(HIDDEN_DIMS[name], 2)
    x, context = torch.randn(3), torch.randn(2)
    v = velocity(torch.tensor(0.2), x, context)
    assert (velocity(torch.tensor(0.7), x, context) - v).abs().max() > 1e-3
    assert (velocity(torch.tensor(0.2), x, context + 1) - v).abs().max() > 1e-3
    # 0 and 1 are different times, and so are 0.1 and 0.9.
    for a, b in ((0.0, 1.0), (0.1, 0.9)):
        at_a, at_b = (velocity(torch.tensor(t), x, context) for t in (a, b))
        assert (at_a - at_b).abs().max() > 1e-3


def test_a_residual_network_is_not_the_plain_one():
    velocity = network((16, 16, 16))
    x, t = torch.randn(3), torch.tensor(0.3)
    silu, w = nn.functional.silu, [layer.weight for layer in velocity.layers]
    _, b, a = velocity._modulation(t, None)
    h = a[0] * silu(w[0] @ x + b[0])
    h = h + a[1] * silu(w[1] @ h + b[1])
    h = h + a[2] * silu(w[2] @ h + b[2])
    torch.testing.assert_close(velocity(t, x), velocity.output.weight @ h + b[3])


@pytest.mark.parametrize("call", ["__call__", "forward_and_divergence"])
def test_a_wrong_context_is_refused(call):
    t, x = torch.tensor(0.5), torch.randn(4, 3)
    conditional, plain = network(context_dim=2), network()
    with pytest.raises(ValueError, match=r"a context of shape \(\*, 2\), got none"):
        getattr(conditional, call)(t, x)
    with pytest.raises(ValueError, match=r"a context of shape \(\*, 2\), got shape \(4, 3\)"):
        getattr(conditional, call)(t, x, torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"no context, got shape \(4, 2\).*context_dim=0"):
        getattr(plain, call)(t, x, torch.randn(4, 2))


def test_the_field_refuses_a_wrong_context_too():
    with pytest.raises(ValueError, match="got none"):
        network(context_dim=2).field(torch.rand(3))
    with pytest.raises(ValueError, match="expected no context"):
        network().field(torch.rand(3), torch.randn(2))


@pytest.mark.parametrize("name", HIDDEN_DIMS)
def test_the_gate_leaves_the_data_alone_and_bounds_the_far_field(name):
    velocity = network(HIDDEN_DIMS[name])
    t, direction = torch.tensor(0.4), nn.functional.normalize(torch.randn(3), dim=0)
    ungated = [velocity(t, r * direction).norm() for r in (0.1, 1e4, 1e6)]
    velocity.reach.fill_(10.0)
    gated = [velocity(t, r * direction).norm() for r in (0.1, 1e4, 1e6)]
    torch.testing.assert_close(gated[0], ungated[0], rtol=1e-6, atol=0)
    assert ungated[2] > 10 * ungated[1]
    torch.testing.assert_close(gated[2], gated[1], rtol=1e-2, atol=0)
    assert 0 < gated[2] < 30 * velocity(t, 10 * direction).norm()


def test_preconditioning_sets_the_gate_and_the_scale_of_the_context():
    velocity = network(context_dim=3)
    assert velocity.reach.shape == (2, 3)
    assert (velocity.reach == math.inf).all()
    w = torch.randn(100, 3)
    w[0] = torch.tensor([30.0, 0.0, 40.0])
    context = torch.randn(100, 3) * torch.tensor([1e-3, 1e3, 0.0]) + 7
    velocity.set_scales(w, context)
    # Twice as far as the farthest row on that side, or as draws of the base get.
    farther = torch.tensor([[10.0, 10.0, 10.0], [60.0, 10.0, 80.0]])
    torch.testing.assert_close(velocity.reach, farther)
    torch.testing.assert_close(velocity.context_loc, context.mean(0))
    torch.testing.assert_close(velocity.context_scale[:2], context[:, :2].std(0), rtol=0.1, atol=0)
    assert velocity.context_scale[2] > 0
    # Inside the data the gate is 1 to a few percent.
    t = torch.tensor(0.5)
    gated = velocity(t, w, context)
    assert torch.isfinite(gated).all()
    velocity.reach.fill_(math.inf)
    torch.testing.assert_close(gated, velocity(t, w, context), rtol=0.1, atol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, 7.7])
def test_a_context_that_is_the_same_in_all_rows_has_no_scale(value):
    """The mean of 900 times 0.1 is off by 1e-17, which is no unit to measure other contexts in."""
    velocity = network(context_dim=1)
    velocity.set_scales(torch.randn(900, 3), torch.full((900, 1), value))
    assert velocity.context_scale == 1
    t, x = torch.tensor(0.5), torch.randn(5, 3)
    near, at = (velocity(t, x, torch.full((5, 1), value + step)) for step in (1e-6, 0.0))
    torch.testing.assert_close(near, at, rtol=0, atol=1e-4)


def test_a_context_in_other_units_gives_the_same_velocity():
    a, t, x = network(context_dim=2), torch.tensor(0.3), torch.randn(50, 3)
    b = network(context_dim=2)
    b.load_state_dict(a.state_dict())
    context = torch.randn(50, 2)
    a.set_scales(x, context)
    b.set_scales(x, 1e5 * context - 3e4)
    torch.testing.assert_close(a(t, x, context), b(t, x, 1e5 * context - 3e4))


@pytest.mark.parametrize("kind", [VelocityMLP, TorusMLP])
def test_an_untrained_copy_has_the_scales_of_the_network(kind):
    velocity = kind(2, (8, 8), 3)
    velocity.set_scales(10 * torch.randn(50, 2), 5 + 3 * torch.randn(50, 3))
    torch.nn.init.normal_(velocity.output.weight)
    copy = velocity.untrained_copy()
    assert type(copy) is kind
    assert copy.is_untrained()
    for name, value in velocity.named_buffers():
        assert torch.equal(copy.get_buffer(name), value)
    assert copy.context_scale.min() > 2


@pytest.mark.parametrize("kind", [VelocityMLP, TorusMLP])
def test_an_untrained_copy_has_no_buffers_of_layers_that_were_changed(kind):
    velocity = kind(2, (8, 8))
    prune.random_unstructured(velocity.layers[1], "weight", amount=0.5)
    velocity.set_scales(10 * torch.randn(50, 2))
    copy = velocity.untrained_copy()
    assert copy.is_untrained()
    assert torch.equal(copy.reach, velocity.reach)
    assert [name for name, _ in copy.named_buffers()] == ["reach", "context_loc", "context_scale"]


def test_what_is_put_in_place_of_the_output_may_have_no_weight():
    velocity = VelocityMLP(2, (8,))
    velocity.output = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    assert not velocity.is_untrained()


@pytest.mark.parametrize("number", [np.int64, torch.tensor], ids=["numpy", "torch"])
def test_sizes_may_be_numbers_of_numpy_or_torch(number):
    velocity = VelocityMLP(number(2), (number(8),), classes=number(3))
    flow = ConditionalInterpolantTransform(velocity).flow
    assert (flow.event_dim, flow.context_dim, flow.classes) == (2, 1, 3)
    assert velocity.arguments() == (2, (8,), 0, 3)
    assert VelocityMLP(2, (8,), number(4)).context_dim == 4


@pytest.mark.parametrize("sizes", [(0, 0), (3, 0), (1, 4)])
def test_beside_a_network_that_makes_no_copy_is_one_of_its_states_and_contexts(sizes):
    made = untrained_like(OwnVelocity(2), 2, *sizes)
    assert type(made) is VelocityMLP
    assert made.event_dim == 2
    assert (made.context_dim, made.classes) == sizes
    context = torch.zeros(5, sizes[0]) if sizes[0] else None
    assert made(torch.tensor(0.3), torch.randn(5, 2), context).shape == (5, 2)


def test_tight_data_do_not_gate_the_base():
    velocity = network()
    velocity.set_scales(1e-3 * torch.randn(100, 3))
    v = velocity(torch.tensor(0.1), torch.randn(200, 3))
    velocity.reach.fill_(math.inf)
    velocity_there = velocity(torch.tensor(0.1), torch.randn(200, 3))
    assert v.norm() > 0.5 * velocity_there.norm()


@pytest.mark.parametrize("dim", [1, 2, 8, 9, 30])
def test_an_untrained_default_network_is_zero(dim):
    velocity = VelocityMLP(dim)
    v, divergence = velocity.forward_and_divergence(torch.rand(5), torch.randn(5, dim))
    assert (v == 0).all()
    assert (divergence == 0).all()
    flow = InterpolantTransform(velocity)
    x = torch.randn(5, dim)
    assert torch.equal(flow(x), x)


def test_default_widths_go_by_dimension():
    one, few, many = (VelocityMLP(dim).hidden_dims for dim in (1, 32, 33))
    assert one == few
    assert len(few) == 3
    assert len(many) == 2
    assert few[0] < many[0]


@pytest.mark.parametrize(
    ("dim", "hidden", "context"), [(2, None, 0), (3, (8,), 1), (9, (8, 9), 4)]
)
def test_arguments_rebuild_the_network(dim, hidden, context):
    velocity = VelocityMLP(dim, hidden, context)
    again = VelocityMLP(*velocity.arguments())
    again.load_state_dict(velocity.state_dict())
    assert again.hidden_dims == velocity.hidden_dims
    assert again.context_dim == context


@pytest.mark.parametrize(
    "arguments", [(0, (8,)), (-1, (8,)), (2, ()), (2, (8, 0)), (2, (8,), -1)], ids=str
)
def test_impossible_sizes_are_refused(arguments):
    with pytest.raises(ValueError, match="expected a positive event_dim"):
        VelocityMLP(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_type_follows(dtype):
    velocity = network((16, 16, 16), 2).to(dtype)
    x, context = torch.randn(4, 3, dtype=dtype), torch.randn(4, 2, dtype=dtype)
    v, divergence = velocity.forward_and_divergence(torch.rand(4, dtype=dtype), x, context)
    assert v.dtype == divergence.dtype == velocity.reach.dtype == dtype


@pytest.mark.parametrize("hidden", [(16,), (16, 12), (16, 16, 16), (12, 16, 16, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_the_same_with_and_without_gradients(hidden, dtype):
    """Without gradients activations are computed in place, and slopes by a fused kernel."""
    velocity = VelocityMLP(3, hidden).to(dtype)
    torch.nn.init.normal_(velocity.output.weight)
    torch.nn.init.normal_(velocity.scales.weight, std=0.3)
    velocity.reach.fill_(2.0)
    x, t = torch.randn(4, 5, 3, dtype=dtype), torch.rand(4, 1, dtype=dtype)
    kept = x.clone()
    with torch.enable_grad():
        slow = velocity.forward_and_divergence(t, x)
        plain = velocity(t, x)
    with torch.no_grad():
        fast = velocity.forward_and_divergence(t, x)
        quick = velocity(t, x)
        tangent = torch.func.jvp(lambda x: velocity(t, x), (x,), (torch.ones_like(x),))
    assert torch.equal(x, kept)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    for a, b in ((slow[0], fast[0]), (slow[1], fast[1]), (plain, quick), (plain, tangent[0])):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_tangents_survive_without_gradients():
    velocity = VelocityMLP(2, (8, 8))
    torch.nn.init.normal_(velocity.output.weight)
    x, t, direction = torch.randn(3, 2), torch.tensor(0.4), torch.randn(3, 2)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        v, divergence = velocity.forward_and_divergence(t, dual)
        tangents = [torch.autograd.forward_ad.unpack_dual(s).tangent for s in (v, divergence)]
    step = 1e-6
    ahead, behind = (velocity.forward_and_divergence(t, x + s * direction) for s in (step, -step))
    for tangent, a, b in zip(tangents, ahead, behind, strict=True):
        torch.testing.assert_close(tangent, (a - b) / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("dim", "factor"), [(2, 1.0), (3, 3.0), (8, 3.0), (9, 1.0)])
def test_the_first_layer_starts_sharper_from_3_to_8_dimensions(dim, factor):
    largest = float(VelocityMLP(dim, (256, 256)).layers[0].weight.detach().abs().max())
    assert 0.95 * factor < largest * math.sqrt(dim) <= factor + 1e-6


class Products(TorchDispatchMode):
    """The shapes of what is multiplied by a matrix inside."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.shapes.add(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [VelocityMLP, TorusMLP])
@pytest.mark.parametrize("needs_grad", [False, True])
def test_a_deep_divergence_takes_one_product_for_all_rows_and_directions(kind, needs_grad):
    velocity = kind(2, (16, 16, 16)).double().requires_grad_(requires_grad=False)
    x = torch.randn(5, 7, 2).double().requires_grad_(needs_grad)
    with torch.set_grad_enabled(needs_grad), Products() as products:
        velocity.forward_and_divergence(torch.tensor(0.5).double(), x)
    assert (5 * 7 * 2, 16) in products.shapes
