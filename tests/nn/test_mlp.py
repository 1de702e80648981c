import math

import pytest
import torch
from cases import HIDDEN_DIMS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_interpolant as pi
from pyro_interpolant.nn.velocity import field


def network(hidden_dims=(16, 16), context_dim=0, dim=3):
    velocity = pi.VelocityMLP(dim, hidden_dims, context_dim)
    with torch.no_grad():
        velocity.output.weight.normal_()
        velocity.shifts.weight.normal_(std=0.3)
        velocity.shifts.bias.normal_(std=0.3)
        velocity.scales.weight.normal_(std=0.3)
    return velocity


@pytest.mark.parametrize(
    ("name", "context_dim", "reach"),
    [("one", 2, 2.0), ("two", 0, math.inf), ("residual", 2, math.inf), ("residual", 0, 2.0)],
)
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


def test_time_and_context_matter():
    velocity = network((16, 16, 16), 2)
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


def test_refusals():
    t, x = torch.tensor(0.5), torch.randn(4, 3)
    conditional, plain = network(context_dim=2), network()
    for call in (pi.VelocityMLP.__call__, pi.VelocityMLP.forward_and_divergence):
        with pytest.raises(ValueError, match=r"a context of shape \(\*, 2\), got none"):
            call(conditional, t, x)
        with pytest.raises(ValueError, match=r"a context of shape \(\*, 2\), got shape \(4, 3\)"):
            call(conditional, t, x, torch.randn(4, 3))
        with pytest.raises(ValueError, match=r"no context, got shape \(4, 2\).*context_dim=0"):
            call(plain, t, x, torch.randn(4, 2))
    with pytest.raises(ValueError, match="got none"):
        conditional.field(torch.rand(3))
    for arguments in ((0, (8,)), (2, ()), (2, (8, 0)), (2, (8,), -1)):
        with pytest.raises(ValueError, match="expected a positive event_dim"):
            pi.VelocityMLP(*arguments)


def test_the_gate_leaves_the_data_alone_and_bounds_the_far_field():
    velocity = network((16, 16, 16))
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


def test_a_context_that_is_the_same_in_all_rows_has_no_scale():
    """The mean of 900 times 0.1 is off by 1e-17, which is no unit to measure other contexts in."""
    velocity, value = network(context_dim=1), 0.1
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


@pytest.mark.parametrize("kind", [pi.VelocityMLP, pi.TorusMLP])
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


@pytest.mark.parametrize("dim", [1, 9])
def test_an_untrained_default_network_is_zero(dim):
    velocity = pi.VelocityMLP(dim)
    v, divergence = velocity.forward_and_divergence(torch.rand(5), torch.randn(5, dim))
    assert (v == 0).all()
    assert (divergence == 0).all()
    flow = pi.InterpolantTransform(velocity)
    x = torch.randn(5, dim)
    assert torch.equal(flow(x), x)


def test_arguments_rebuild_the_network_and_the_type_follows():
    velocity = network((16, 16, 16), 2).float()
    again = pi.VelocityMLP(*velocity.arguments()).float()
    again.load_state_dict(velocity.state_dict())
    given = torch.rand(4).float(), torch.randn(4, 3).float(), torch.randn(4, 2).float()
    v, divergence = velocity.forward_and_divergence(*given)
    assert v.dtype == divergence.dtype == velocity.reach.dtype == torch.float32
    assert torch.equal(again(*given), velocity(*given))


@pytest.mark.parametrize(
    ("hidden", "dtype"),
    [((16,), torch.float64), ((16, 16, 16), torch.float32), ((12, 16, 16, 8), torch.float64)],
)
def test_values_are_the_same_with_and_without_gradients(hidden, dtype):
    """Without gradients activations are computed in place, and slopes by a fused kernel."""
    velocity = pi.VelocityMLP(3, hidden).to(dtype)
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
    velocity = pi.VelocityMLP(2, (8, 8))
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


def test_the_first_layer_starts_sharper_from_3_to_8_dimensions():
    for dim, factor in ((2, 1.0), (3, 3.0), (8, 3.0), (9, 1.0)):
        weight = pi.VelocityMLP(dim, (256, 256)).layers[0].weight.detach()
        largest = float(weight.abs().max()) * math.sqrt(dim)
        assert 0.95 * factor < largest <= factor + 1e-6, dim


class Products(TorchDispatchMode):
    """The shapes of what is multiplied by a matrix inside."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.mm.default:
            self.shapes.add(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "needs_grad"), [(pi.VelocityMLP, True), (pi.TorusMLP, False)])
def test_a_deep_divergence_takes_one_product_for_all_rows_and_directions(kind, needs_grad):
    velocity = kind(2, (16, 16, 16)).double().requires_grad_(requires_grad=False)
    x = torch.randn(5, 7, 2).double().requires_grad_(needs_grad)
    with torch.set_grad_enabled(needs_grad), Products() as products:
        velocity.forward_and_divergence(torch.tensor(0.5).double(), x)
    assert (5 * 7 * 2, 16) in products.shapes
