import copy

import pytest
import torch
from cases import random_flow
from oracles import random_mixture
from torch import nn

from pyro_interpolant import (
    ExactDivergence,
    FixedGrid,
    HutchinsonDivergence,
    InterpolantDistribution,
    InterpolantTransform,
    Linear,
    VelocityMLP,
)

DIM, CONTEXT = 3, 2


class Own(nn.Module):
    """A user's network: no divergence of its own, a product, a normalisation, a context."""

    def __init__(self, dim, context_dim=0, norm=None):
        super().__init__()
        self.first = nn.Linear(dim + 1 + context_dim, 12)
        self.norm = nn.Identity() if norm is None else norm
        self.last = nn.Linear(12, dim)

    def forward(self, t, x, context=None):
        parts = [x, t[..., None]] if context is None else [x, t[..., None], context]
        return self.last(self.norm(self.first(torch.cat(parts, -1)).tanh())) * x.square()


class Grouped(nn.Module):
    """Group normalisation of 12 channels, of which another memory layout has the tangent."""

    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(3, 12, eps=0.1)

    def forward(self, h):
        image = h.reshape(-1, 12, 1).transpose(1, 2).contiguous().transpose(1, 2)
        return self.norm(image).reshape(h.shape)


class Planes(nn.Module):
    """A normalisation of the 3 channels of 4 places that hidden numbers are taken for."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, h):
        return self.norm(h.reshape(-1, 3, 4)).reshape(h.shape)


SCALE, SHIFT = (0.5, 2.0, -1.5), (0.3, -0.2, 1.0)


def torch_group_norm(h):
    h = h.transpose(1, 2).contiguous().transpose(1, 2)  # its tangents have another layout
    return torch.group_norm(h, 3, h.new_tensor(SCALE), bias=h.new_tensor(SHIFT))


class Attending(nn.Module):
    """Causal attention between 4 places of 3 numbers each."""

    def forward(self, h):
        q, k, v = (h.reshape(-1, 1, 4, 3) * s for s in (1.0, 0.5, 2.0))
        found = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.7)
        return found.reshape(h.shape)


class Heads(nn.Module):
    """Torch's layer of attention, which calls the function inside of another."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, h):
        places = h.reshape(-1, 3, 4)
        return self.attention(places, places, places, need_weights=False)[0].reshape(h.shape)


def mlp(hidden_dims, context_dim=0, reach=None):
    velocity = VelocityMLP(DIM, hidden_dims, context_dim)
    with torch.no_grad():
        velocity.output.weight.normal_()
        velocity.shifts.weight.normal_(std=0.3)
        velocity.scales.weight.normal_(std=0.3)
        if reach is not None:
            velocity.reach.fill_(reach)
    return velocity


NETWORKS = {
    "two": lambda c: mlp((16, 12), c),
    "residual": lambda c: mlp((16, 16, 16), c),
    "four": lambda c: mlp((16, 12, 12, 12), c),
    "one gated": lambda c: mlp((16,), c, 1.5),
    "two gated": lambda c: mlp((16, 12), c, 1.5),
    "residual gated": lambda c: mlp((16, 16, 16), c, 1.5),
    "own": lambda c: Own(DIM, c),
    "own layer norm": lambda c: Own(DIM, c, nn.LayerNorm(12, eps=0.1)),
    "own group norm": lambda c: Own(DIM, c, Grouped()),
    "own instance norm": lambda c: Own(DIM, c, Planes(nn.InstanceNorm1d(3, eps=0.1, affine=True))),
    "own kept statistics": lambda c: Own(
        DIM, c, Planes(nn.InstanceNorm1d(3, track_running_stats=True).eval())
    ),
    "torch.group_norm": lambda c: Own(DIM, c, Planes(torch_group_norm)),
    "own attention": lambda c: Own(DIM, c, Attending()),
    "own heads of attention": lambda c: Own(DIM, c, Heads()),
}


def trace(velocity, t, x, context=None):
    """The trace of the autograd Jacobian, one row at a time, shape (*)."""
    shape = x.shape[:-1]
    t = t.expand(shape).reshape(-1)
    rows = x.reshape(-1, x.shape[-1])
    contexts = None
    if context is not None:
        contexts = context.expand(*shape, context.shape[-1]).reshape(-1, context.shape[-1])
    values = []
    for i, row in enumerate(rows):
        given = () if contexts is None else (contexts[i],)
        jacobian = torch.autograd.functional.jacobian(
            lambda y, i=i, given=given: velocity(t[i], y, *given), row
        )
        values.append(jacobian.trace())
    return torch.stack(values).reshape(shape)


@pytest.mark.parametrize("name", NETWORKS)
def test_exact_is_the_trace_of_the_jacobian(name):
    """In both types, with times, contexts and rows of every shape that broadcasts."""
    for dtype, tolerance, context_dim in ((torch.float32, 1e-5, CONTEXT), (None, 1e-10, 0)):
        velocity = NETWORKS[name](context_dim).to(dtype or torch.float64)
        x, t = torch.randn(5, DIM, dtype=dtype), torch.rand(5, dtype=dtype)
        context = torch.randn(5, context_dim, dtype=dtype) if context_dim else None
        value = ExactDivergence()(velocity, t, x, context)
        truth = trace(velocity, t, x, context)
        assert value.dtype == x.dtype
        assert truth.abs().min() > 100 * tolerance
        scale = float(truth.abs().max().clamp(min=1))
        torch.testing.assert_close(value, truth, rtol=0, atol=tolerance * scale)
    for times, shape in [((), ()), ((), (5,)), ((2, 3), (2, 3)), ((4, 1), (4, 6))]:
        x, t = torch.randn(*shape, DIM), torch.rand(times)
        assert HutchinsonDivergence(2)(velocity, t, x, None).shape == shape
        torch.testing.assert_close(ExactDivergence()(velocity, t, x, None), trace(velocity, t, x))


@pytest.mark.parametrize("name", ["residual gated", "own"])
def test_contexts_broadcast_over_times_and_rows(name):
    velocity, x, t = NETWORKS[name](CONTEXT), torch.randn(4, 6, DIM), torch.rand(4, 1)
    for shape in [(CONTEXT,), (6, CONTEXT), (4, 6, CONTEXT)]:
        context = torch.randn(shape)
        value = ExactDivergence()(velocity, t, x, context)
        torch.testing.assert_close(value, trace(velocity, t, x, context))


def test_every_event_size():
    for dim in (1, 2, 40):
        velocity = VelocityMLP(dim, (16, 16, 16))
        nn.init.normal_(velocity.output.weight)
        x, t = torch.randn(3, dim), torch.tensor(0.4)
        truth = trace(velocity, t, x)
        torch.testing.assert_close(ExactDivergence()(velocity, t, x, None), truth)
        first = HutchinsonDivergence(2, seed=5)(velocity, t, x, None)
        assert torch.equal(first, HutchinsonDivergence(2, seed=5)(velocity, t, x, None))
        other = HutchinsonDivergence(2, seed=6)(velocity, t, x, None)
        assert torch.allclose(first, other) == (dim == 1)  # where all signs give the same


class Diagonal(nn.Module):
    def forward(self, t, x, context=None):
        return x.sin() + x**2


def test_hutchinson_is_exact_for_diagonal_jacobians():
    x = torch.randn(6, DIM)
    for probes in (1, 4):
        value = HutchinsonDivergence(probes, seed=3)(Diagonal(), torch.tensor(0.0), x, None)
        torch.testing.assert_close(value, (x.cos() + 2 * x).sum(-1))


@pytest.mark.parametrize("name", ["two", "own"])
def test_many_probes_converge_to_the_trace_within_the_standard_error(name):
    velocity = NETWORKS[name](0)
    x, t = torch.randn(4, DIM), torch.tensor(0.6)
    estimate = HutchinsonDivergence(2000)
    samples = estimate.samples(velocity, t, x)
    assert samples.shape == (2000, 4)
    torch.testing.assert_close(samples.mean(0), estimate(velocity, t, x, None))
    error = samples.std(0) / 2000**0.5
    assert (error > 0).all()
    assert ((samples.mean(0) - trace(velocity, t, x)).abs() < 5 * error).all()
    # Not the sum over probes, and the error falls as the root of their number.
    few = HutchinsonDivergence(20, seed=1).samples(velocity, t, x).std(0)
    torch.testing.assert_close(few, samples.std(0), rtol=0.6, atol=0)


def test_probes_are_shared_by_rows_and_leave_the_global_generator_alone():
    flow = random_flow(4, divergence=HutchinsonDivergence(1, seed=12345))
    distribution, row = InterpolantDistribution(flow), torch.randn(4)
    state = torch.get_rng_state()
    first = distribution.log_prob(row.repeat(3, 1))
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(first, first[:1].expand(3), rtol=1e-12, atol=1e-12)
    torch.manual_seed(99)
    distribution.clear_cache()
    assert torch.equal(first, distribution.log_prob(row.repeat(3, 1)))


def test_hutchinson_log_prob_is_the_same_after_expand_copy_and_at():
    flow = random_flow(4, divergence=HutchinsonDivergence(2, seed=7))
    distribution = InterpolantDistribution(flow)
    x = torch.randn(6, 4)
    value = distribution.log_prob(x)
    flow.divergence = ExactDivergence()
    assert (distribution.log_prob(x) - value).abs().max() > 1e-4
    flow.divergence = HutchinsonDivergence(2, seed=7)
    assert torch.equal(distribution.log_prob(x), value)
    assert torch.equal(distribution.expand((6,)).log_prob(x), value)
    assert torch.equal(distribution.expand((6,)).expand((3, 6)).log_prob(x)[1], value)
    assert torch.equal(copy.deepcopy(distribution).log_prob(x), value)
    assert torch.equal(distribution.at(1.0).log_prob(x), value)
    assert torch.equal(distribution.to_event(0).log_prob(x), value)


def test_the_mixture_oracle_and_states_of_stride_zero():
    velocity = random_mixture(3, Linear())
    for x, t in (
        (torch.randn(5, 3), torch.rand(5)),
        (torch.randn(3).expand(4, 3), torch.rand(())),
    ):
        torch.testing.assert_close(ExactDivergence()(velocity, t, x, None), trace(velocity, t, x))


@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        ("two gated", HutchinsonDivergence(2)),
        ("own", ExactDivergence()),
        ("own kept statistics", ExactDivergence()),
        pytest.param("residual", ExactDivergence(), marks=pytest.mark.slow),
        pytest.param("own layer norm", ExactDivergence(), marks=pytest.mark.slow),
        pytest.param("own group norm", ExactDivergence(), marks=pytest.mark.slow),
        pytest.param("own instance norm", HutchinsonDivergence(2), marks=pytest.mark.slow),
        pytest.param("torch.group_norm", ExactDivergence(), marks=pytest.mark.slow),
    ],
)
def test_the_divergence_has_gradients_of_first_and_second_order(name, divergence):
    velocity = NETWORKS[name](0)
    x, t = torch.randn(2, DIM, requires_grad=True), torch.tensor(0.5)
    assert torch.autograd.gradcheck(lambda x: divergence(velocity, t, x, None), x)
    assert torch.autograd.gradgradcheck(lambda x: divergence(velocity, t, x, None), x)
    divergence(velocity, t, x, None).sum().backward()
    weights = velocity.last if isinstance(velocity, Own) else velocity.output
    assert weights.weight.grad.abs().max() > 0


class Joined(nn.Module):
    """A velocity that joins times and states, and knows its divergence."""

    event_dim = 1

    def forward(self, t, x, context=None):
        return 0.1 * torch.cat((x, t[..., None]), -1).sum(-1, keepdim=True)

    def forward_and_divergence(self, t, x, context=None):
        return self(t, x), torch.full_like(x[..., 0], 0.1)


def test_a_divergence_of_ones_own_is_given_times_of_all_rows():
    flow = InterpolantDistribution(InterpolantTransform(Joined()))
    x = torch.randn(5, 1)
    w = x * torch.tensor(-0.1).exp()  # less what time adds, the same for all
    z = flow.transform.inv(x)
    assert torch.allclose(z - z[:1], w - w[:1], atol=1e-6)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z[:, 0]) - 0.1
    assert torch.allclose(flow.log_prob(x), expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a .functools.lru_cache")
def test_a_compiled_density_has_the_same_probes():
    choices = {"divergence": HutchinsonDivergence(2, seed=7), "solver": FixedGrid(1, "euler")}
    flow = random_flow(3, (8,), **choices)
    distribution, x = InterpolantDistribution(flow).freeze(), torch.randn(4, 3)
    compiled = torch.compile(distribution.log_prob, backend="eager")
    torch.testing.assert_close(compiled(x), distribution.log_prob(x.clone()))
