"""The transform as a function: derivatives, rows, contexts, times, and what it refuses."""

import copy
import pickle
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import FLOWS, OwnVelocity, random_flow, slow_but
from pyro.infer import SVI, JitTrace_ELBO, Trace_ELBO
from pyro.nn import PyroSample
from pyro.nn.module import to_pyro_module_
from torch import nn

from pyro_interpolant import (
    ConditionalInterpolantTransform,
    ExactDivergence,
    FixedGrid,
    HutchinsonDivergence,
    InterpolantDistribution,
    InterpolantTransform,
    Linear,
    VelocityMLP,
    interpolant_transform,
)
from pyro_interpolant._torch import seeded
from pyro_interpolant.transforms import DenseWhitening, ScalarWhitening

# Raised inside torch, by its own first use of forward-mode differentiation.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
tracing = pytest.mark.filterwarnings("ignore:.torch.jit.trace")

KINDS = sorted(FLOWS)
every_kind = pytest.mark.parametrize("kind", slow_but(KINDS, "two"))
two_kinds = pytest.mark.parametrize("kind", ["two", pytest.param("own", marks=pytest.mark.slow)])


def flow(kind="two", dim=2, steps=4, **choices):
    return FLOWS[kind](dim, solver=FixedGrid(steps=steps), **choices)


def frozen_prior(kind, dim=2, **choices):
    return InterpolantDistribution(flow(kind, dim, **choices)).freeze()


def conditioned_prior(kind, **choices):
    view = flow(kind, context_dim=3, **choices).condition(torch.randn(3))
    return InterpolantDistribution(view).freeze()


# Derivatives


@pytest.mark.parametrize(("kind", "dim"), [("two", 1), ("three", 3), ("own", 2)])
def test_score_against_finite_differences(kind, dim):
    prior = frozen_prior(kind, dim)
    x = prior.sample((4,)).requires_grad_()
    (score,) = torch.autograd.grad(prior.log_prob(x).sum(), x)
    steps = 1e-5 * torch.eye(dim)
    with torch.no_grad():
        up, down = (prior.log_prob(x[:, None] + s) for s in (steps, -steps))
    torch.testing.assert_close(score, (up - down) / 2e-5, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(prior.score(x), score)


@pytest.mark.parametrize(
    ("kind", "dim", "divergence"),
    [
        ("two", 3, None),
        ("three", 1, HutchinsonDivergence(probes=2, seed=1)),
        ("own", 3, HutchinsonDivergence(probes=2, seed=1)),
    ],
)
def test_hessian_against_finite_differences(kind, dim, divergence):
    prior = frozen_prior(kind, dim, divergence=divergence)
    x = prior.sample()
    hessian = torch.autograd.functional.hessian(prior.log_prob, x)
    steps = 1e-5 * torch.eye(dim)
    numeric = (prior.score(x + steps) - prior.score(x - steps)) / 2e-5
    torch.testing.assert_close(hessian, numeric, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hessian, hessian.T)
    assert hessian.abs().max() > 0.1


@pytest.mark.usefixtures("_nodes_stay")
@every_kind
def test_gradient_of_the_weights_against_finite_differences(kind):
    prior = InterpolantDistribution(flow(kind))
    x = prior.sample((4,))
    weights = [p for p in prior.transform.parameters() if p.requires_grad]
    directions = [torch.randn_like(p) for p in weights]
    gradients = torch.autograd.grad(prior.log_prob(x).sum(), weights)
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))

    def moved(step):
        twin = copy.deepcopy(prior)
        with torch.no_grad():
            for p, d in zip(twin.transform.parameters(), directions, strict=True):
                p.add_(step * d)
            return twin.log_prob(x).sum()

    torch.testing.assert_close(slope, (moved(1e-6) - moved(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "conditioned"), [("two", False), ("own", True)])
def test_torch_func(kind, conditioned):
    prior = (conditioned_prior if conditioned else frozen_prior)(kind, steps=20)
    x, w = torch.randn(4, 2), torch.randn(4, 2)
    plain, score = prior.log_prob(x), prior.score(x)

    def close(found, expected):
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)

    close(torch.func.vmap(prior.log_prob)(x), plain)
    close(torch.func.vmap(prior.log_prob)(x[:, None])[:, 0], plain)
    close(torch.func.grad(prior.log_prob)(x[0]), score[0])
    close(torch.func.vmap(torch.func.grad(prior.log_prob))(x), score)
    jacobian = torch.func.jacrev(prior.log_prob)(x)
    close(jacobian.sum(1), score)
    close(torch.func.jacfwd(prior.log_prob)(x), jacobian)
    hessian = torch.autograd.functional.hessian(prior.log_prob, x[0])
    close(torch.func.hessian(prior.log_prob)(x[0]), hessian)
    transform = prior.transform
    y = transform(w)
    close(torch.func.vmap(transform)(w), y)
    jacobians = torch.func.vmap(torch.func.jacrev(transform))(w)
    determinant = torch.linalg.slogdet(jacobians).logabsdet
    close(transform.log_abs_det_jacobian(w, y), determinant)


@pytest.mark.parametrize(("kind", "conditioned"), [("two", True), ("own", False)])
def test_torch_func_takes_the_same_steps(kind, conditioned):
    """With few steps the two directions of a solve differ: vmap must not change direction."""
    prior = (conditioned_prior if conditioned else frozen_prior)(kind, steps=2)
    x, w = torch.randn(4, 2), torch.randn(4, 2)
    plain, score = prior.log_prob(x), prior.score(x)
    torch.testing.assert_close(torch.func.vmap(prior.log_prob)(x), plain, rtol=1e-10, atol=1e-10)
    vmapped = torch.func.vmap(torch.func.grad(prior.log_prob))(x)
    torch.testing.assert_close(vmapped, score, rtol=1e-10, atol=1e-10)

    def log_det(w):
        return prior.transform.log_abs_det_jacobian(w, prior.transform(w))

    torch.testing.assert_close(torch.func.vmap(log_det)(w), log_det(w), rtol=1e-10, atol=1e-10)


# Rows


@pytest.mark.parametrize(("kind", "rows"), [("own", 1000), ("two", 5000)])
def test_a_row_alone_is_a_row_in_a_batch(kind, rows):
    """Above 1,024 rows a solve without gradients goes in chunks."""
    prior = frozen_prior(kind)
    x = prior.sample((rows,)).clone()
    with torch.no_grad():
        together = prior.log_prob(x)
        inverse = prior.transform.inv(x)
        forward = prior.transform(inverse.clone())
    assert together.shape == (rows,)
    for i in (0, 1, 17, 999, rows - 905, rows - 904, rows - 1):
        with torch.no_grad():
            torch.testing.assert_close(prior.log_prob(x[i]), together[i], rtol=1e-12, atol=0)
            torch.testing.assert_close(
                prior.transform.inv(x[i : i + 1].clone())[0], inverse[i], rtol=1e-12, atol=1e-13
            )
            torch.testing.assert_close(
                prior.transform(inverse[i].clone()), forward[i], rtol=1e-12, atol=1e-13
            )
    with_graph = prior.log_prob(x.clone().requires_grad_())
    torch.testing.assert_close(with_graph.detach(), together, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "shape"), [("two", (5000,)), ("own", (2, 2500))])
def test_chunks_keep_rows_and_contexts_together(kind, shape):
    family = flow(kind, context_dim=3)
    for batch in (shape, shape[-1:], (*shape[:-1], 1)):
        view = family.condition(torch.randn(*batch, 3))
        prior = InterpolantDistribution(view).freeze()
        x = torch.randn(*shape, 2)
        with torch.no_grad():
            chunked = prior.log_prob(x)
        graph = prior.log_prob(x.clone().requires_grad_()).detach()
        torch.testing.assert_close(chunked, graph, rtol=1e-12, atol=1e-12)
        context = view.context.expand(*shape, 3)
        for i in ((0,) * len(shape), (-1,) * len(shape)):
            alone = InterpolantDistribution(family.condition(context[i])).log_prob(x[i])
            torch.testing.assert_close(chunked[i], alone, rtol=1e-12, atol=0)


@two_kinds
def test_rows_of_a_strided_expanded_or_empty_batch(kind):
    prior = frozen_prior(kind)
    x = torch.randn(2, 6)
    for value in (x.T, torch.randn(2).expand(6, 2), torch.randn(6, 4)[:, ::2]):
        torch.testing.assert_close(
            prior.log_prob(value), prior.log_prob(value.contiguous().clone())
        )
        assert prior.log_prob(value.clone().requires_grad_()).requires_grad
    for direction in (prior.transform, prior.transform.inv):
        x = torch.empty(0, 2)
        y = direction(x)
        assert y.shape == (0, 2)
        assert direction.log_abs_det_jacobian(x, y).shape == (0,)
    assert prior.sample((0,)).shape == (0, 2)


# torch.jit


def trained_losses(make_elbo, model, guide, transform, steps=3):
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), make_elbo())
    losses = [svi.step() for _ in range(steps)]
    return torch.tensor([*losses, svi.evaluate_loss()]), copy.deepcopy(transform.state_dict())


@pytest.mark.slow
@pytest.mark.usefixtures("_nodes_stay")
@tracing
@two_kinds
def test_jit_elbo_of_an_observed_likelihood(kind):
    data = torch.randn(6, 2)
    found = []
    for elbo in (lambda: JitTrace_ELBO(ignore_jit_warnings=True), Trace_ELBO):
        torch.manual_seed(3)
        transform = flow(kind)
        likelihood = InterpolantDistribution(transform)

        def model(likelihood=likelihood, transform=transform):
            pyro.module("flow", transform)
            loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("rows", 6):
                pyro.sample("x", likelihood, obs=data - loc)

        def guide():  # without randomness, which the run before a trace would use up
            loc = pyro.param("guide_loc", torch.zeros(2))
            pyro.sample("loc", dist.Delta(loc, event_dim=1))

        found.append(trained_losses(elbo, model, guide, transform))
    (jit, jit_state), (plain, state) = found
    torch.testing.assert_close(jit, plain, rtol=1e-6, atol=1e-6)
    assert not plain[0].isclose(plain[1])
    for name, value in state.items():
        torch.testing.assert_close(jit_state[name], value, rtol=1e-5, atol=1e-6)


# Contexts


@two_kinds
def test_context_broadcasts(kind):
    family = flow(kind, context_dim=3)
    for context, shape, expected in [
        ((3,), (4, 2), (4, 2)),
        ((10, 3), (2,), (10, 2)),
        ((10, 3), (1, 2), (10, 2)),
        ((10, 3), (3, 10, 2), (3, 10, 2)),
        ((10, 3), (3, 1, 2), (3, 10, 2)),
        ((1, 3), (2,), (2,)),
        ((1, 10, 3), (2,), (10, 2)),
        ((4, 1, 3), (5, 2), (4, 5, 2)),
    ]:
        c, x = torch.randn(context), torch.randn(shape)
        view = family.condition(c)
        for direction in (view, view.inv):
            assert direction.forward_shape(shape) == expected
            assert direction.inverse_shape(shape) == expected
            assert direction.log_abs_det_jacobian(x, direction(x)).shape == expected[:-1]
        y = view(x)
        assert y.shape == expected
        while c.dim() > 1 and len(c) == 1:
            c = c[0]
        full_x, full_c = x.expand(expected), c.expand(*expected[:-1], 3)
        for index in ((0,) * (len(expected) - 1), (-1,) * (len(expected) - 1)):
            alone = family.condition(full_c[index])(full_x[index])
            torch.testing.assert_close(y[index], alone, msg=f"{context}, {shape}")
        prior = InterpolantDistribution(view)
        assert prior.batch_shape == c.shape[:-1]
        assert prior.sample((7,)).shape == (7, *c.shape[:-1], 2)
        assert prior.log_prob(x).shape == expected[:-1]


NO_CONTEXTS = {
    r"broadcasts with \(4,\).*got \(5,\)": lambda f: f.condition(torch.randn(4, 3))(
        torch.randn(5, 2)
    ),
    r"of shape \(\*, 3\), got \(10, 2\)": lambda f: f.condition(torch.randn(10, 2)),
    r"of shape \(\*, 3\), got \(\)": lambda f: f.condition(torch.tensor(1.0)),
    r"of shape \(\*, 3\), got none": lambda f: f.velocity(torch.tensor(0.5), torch.randn(2)),
    r"expected no context, got shape \(4,\)": lambda f: random_flow(2).velocity(
        torch.tensor(0.5), torch.randn(2), torch.randn(4)
    ),
    r"got \(5,\).*\(N, 1\), context\[\.\.\., None\]": lambda f: random_flow(
        2, context_dim=1
    ).condition(torch.randn(5)),
    "floating type, got torch.int64 .*one_hot": lambda f: f.condition(torch.arange(3)),
}


@pytest.mark.parametrize("message", NO_CONTEXTS)
def test_wrong_contexts(message):
    with pytest.raises((ValueError, TypeError), match=message):
        NO_CONTEXTS[message](random_flow(2, context_dim=3))


def test_tables_of_whole_numbers_are_contexts():
    family, x, table = random_flow(2, context_dim=3), torch.randn(2), torch.eye(3)
    expected = family.condition(table)(x)
    torch.testing.assert_close(family.condition(table.long())(x), expected)


@pytest.mark.usefixtures("_nodes_stay")
@pytest.mark.parametrize(("kind", "shape"), [("two", (3,)), ("three", (1, 3)), ("own", (4, 3))])
def test_gradient_of_the_context(kind, shape):
    family = flow(kind, context_dim=3)
    context = torch.randn(shape).requires_grad_()
    x = torch.randn(4, 2)

    def value(context):
        return InterpolantDistribution(family.condition(context)).log_prob(x).sum()

    (gradient,) = torch.autograd.grad(value(context), context)
    direction = torch.randn(shape)
    with torch.no_grad():
        slope = (value(context + 1e-6 * direction) - value(context - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6)
    prior = InterpolantDistribution(family.condition(context)).freeze()
    for _ in range(2):  # frozen weights, sampled: the gradient goes through the sample
        z = prior.rsample()
        (gradient,) = torch.autograd.grad(z.sum() + prior.log_prob(z).sum(), context)
        assert gradient.abs().max() > 1e-3


@two_kinds
def test_a_view_owns_nothing(kind):
    family = flow(kind, context_dim=3)
    context = nn.Parameter(torch.randn(3))
    view = family.condition(context)
    for t in (view, view.at(0.5), flow(kind).at(0.5)):
        assert not list(t.parameters())
        assert not list(t.buffers())
        assert not list(t.children())
        assert not t.state_dict()
    assert view.context is context
    view(torch.randn(2)).sum().backward()
    assert context.grad.abs().max() > 0
    assert all(p is not context for p in family.parameters())
    # As a part of a larger module it does not make its family's weights a second set.
    whole = nn.ModuleDict({"family": family, "view": view})
    assert set(whole.parameters()) == set(family.parameters())
    assert set(whole.state_dict()) == {f"family.{name}" for name in family.state_dict()}


def test_a_view_follows_its_flow():
    family = flow(context_dim=3)
    view = family.condition(torch.randn(3))
    assert view.solver == family.solver
    assert view.divergence == family.divergence
    assert view.interpolant == family.interpolant
    view.to(torch.float32)
    assert view.context.dtype == torch.float32
    assert {p.dtype for p in family.parameters()} == {torch.float32}
    assert view(torch.randn(2, dtype=torch.float32)).dtype == torch.float32


# Times


def any_transform(kind, conditioned, steps=4):
    if conditioned:
        return flow(kind, steps=steps, context_dim=3).condition(torch.randn(5, 3))
    return flow(kind, steps=steps)


both = pytest.mark.parametrize(("kind", "conditioned"), [("two", True), ("own", False)])


@both
def test_at_zero_is_the_affine_map(kind, conditioned):
    transform = any_transform(kind, conditioned)
    owner = transform
    x = torch.randn(5, 2)
    start = transform.at(0)
    y = start(x)
    torch.testing.assert_close(y, owner.flow.loc + x @ owner.flow.whitening.linear.T)
    torch.testing.assert_close(start.inv(y.clone()), x)
    expected = torch.linalg.slogdet(owner.flow.whitening.linear).logabsdet.expand(5)
    torch.testing.assert_close(start.log_abs_det_jacobian(x, y), expected)
    covariance = owner.flow.whitening.linear @ owner.flow.whitening.linear.T
    gaussian = dist.MultivariateNormal(owner.flow.loc, covariance)
    torch.testing.assert_close(
        InterpolantDistribution(start).log_prob(x), gaussian.log_prob(x).expand(5)
    )


@both
def test_at_solves_the_differential_equation(kind, conditioned):
    r"""y_t moves by L v_t(w_t), and its log-determinant by the divergence."""
    transform = any_transform(kind, conditioned, steps=40)
    owner, context, x = transform, transform.context, torch.randn(5, 2)
    t, h = 0.4, 1e-3
    with torch.no_grad():
        here, up, down = (transform.at(s)(x) for s in (t, t + h, t - h))
        w = torch.linalg.solve(owner.flow.whitening.linear, (here - owner.flow.loc).T).T
        arguments = () if context is None else (context,)
        velocity = owner.velocity(torch.full((5,), t), w, *arguments)
        rates = (up - down) / (2 * h)
        torch.testing.assert_close(
            rates, velocity @ owner.flow.whitening.linear.T, rtol=1e-3, atol=1e-3
        )
        dets = [
            transform.at(s).log_abs_det_jacobian(x, transform.at(s)(x)) for s in (t + h, t - h)
        ]
        jacobian = [
            owner.velocity(torch.full((5,), t), w + s * 1e-5 * e, *arguments)
            for s in (1, -1)
            for e in torch.eye(2)
        ]
        divergence = sum((jacobian[i] - jacobian[2 + i])[:, i] / 2e-5 for i in range(2))
        torch.testing.assert_close((dets[0] - dets[1]) / (2 * h), divergence, rtol=1e-3, atol=2e-3)


@both
def test_at_composes(kind, conditioned):
    """A time asked for again is the time, not a fraction of the last one."""
    transform = any_transform(kind, conditioned)
    x = torch.randn(5, 2)
    for t in (0.0, 0.3, 1.0):
        once, twice = transform.at(t), transform.at(0.7).at(t)
        torch.testing.assert_close(once(x), twice(x), rtol=0, atol=0)
        torch.testing.assert_close(
            once.log_abs_det_jacobian(x, once(x)), twice.log_abs_det_jacobian(x, twice(x))
        )
    torch.testing.assert_close(transform.at(1.0)(x), transform(x), rtol=0, atol=0)
    assert (transform.at(0.3)(x) - transform.at(0.31)(x)).abs().max() > 1e-4
    torch.testing.assert_close(transform.at(0.7)(x), transform.at(torch.tensor(0.7))(x))


@pytest.mark.parametrize("t", [-0.01, 1.01, float("nan")])
def test_at_outside(t):
    message = re.escape(f"expected a time t in [0, 1], got {t}")
    for transform in (any_transform("two", conditioned=True), InterpolantDistribution(flow())):
        with pytest.raises(ValueError, match=message):
            transform.at(t)


# What is refused


class WithNorm(nn.Module):
    event_dim = 2

    def __init__(self, norm):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), norm, nn.Linear(4, 2))

    def forward(self, t, x, context=None):
        return self.net(x)


def with_random_weights():
    velocity = VelocityMLP(2, (4, 4))
    to_pyro_module_(velocity)
    InterpolantTransform(velocity)  # as a Pyro module with fixed weights it is welcome
    velocity.output.weight = PyroSample(dist.Normal(0.0, 1.0).expand((2, 4)).to_event(2))
    return velocity


NO_VELOCITIES = {
    "treats rows independently, .*LayerNorm": lambda: [WithNorm(nn.BatchNorm1d(4))],
    "treats rows independently, .*SyncBatchNorm": lambda: [WithNorm(nn.SyncBatchNorm(4))],
    "fixed weights, got a PyroModule with PyroSample": lambda: [with_random_weights()],
    "expected event_dim.*pass it after the velocity": lambda: [OwnVelocity(2)],
    "expected event_dim.*got 0": lambda: [OwnVelocity(2), 0],
    "expected event_dim.*got 2.0": lambda: [OwnVelocity(2), 2.0],
    "expected a velocity for 2 dim.*event_dim=3": lambda: [VelocityMLP(3, (4,)), 2],
    r"instance of torch.nn.Module with forward\(t, x": lambda: [VelocityMLP, 2],
}


@pytest.mark.parametrize("message", NO_VELOCITIES)
@pytest.mark.parametrize("cls", [InterpolantTransform, ConditionalInterpolantTransform])
def test_velocities_that_cannot_work(cls, message):
    with pytest.raises((ValueError, TypeError), match=message):
        cls(*NO_VELOCITIES[message]())


def test_other_norms_and_sizes_of_numpy_are_welcome():
    velocity = OwnVelocity(2)
    assert InterpolantTransform(WithNorm(nn.LayerNorm(4))).flow.event_dim == 2
    assert type(InterpolantTransform(velocity, np.int64(2)).flow.event_dim) is int
    velocity.event_dim, velocity.context_dim = np.int64(2), np.int64(3)
    flow = ConditionalInterpolantTransform(velocity).flow
    assert (flow.event_dim, flow.context_dim) == (2, 3)


CALLS = {
    "call": lambda t, x: t(x),
    "inverse": lambda t, x: t.inv(x),
    "log_abs_det_jacobian": lambda t, x: t.log_abs_det_jacobian(x, x),
}


@pytest.mark.parametrize("call", CALLS)
def test_wrong_values(call):
    for dim, shape in [(2, (5, 3)), (2, (2, 1)), (3, (3, 2))]:
        message = re.escape(f"expected a last dimension of size {dim}, got shape {shape}.") + "$"
        with pytest.raises(ValueError, match=message):
            CALLS[call](flow("two", dim), torch.randn(shape))
    recipe = re.escape("got shape (5,). For N scalars with D = 1 pass shape (N, 1): x[..., None].")
    with pytest.raises(ValueError, match=recipe):
        CALLS[call](flow("two", 1), torch.randn(5))
    for dtype in (torch.float32, torch.int64):
        with pytest.raises(ValueError, match=rf"torch.float64, the type of the flow, got {dtype}"):
            CALLS[call](flow(), torch.ones(5, 2, dtype=dtype))


NO_PARTS = {
    r"hidden_dims.* got 64: write \(64,\)": lambda: interpolant_transform(2, 64),
    r"sizes, .* got \(2\.0, 0, 0\)": lambda: interpolant_transform(2.0, (8,)),
    "got the class Fixed": lambda: interpolant_transform(2, solver=FixedGrid),
    "got the class Linear": lambda: interpolant_transform(2, interpolant=Linear),
    "got the class Exact": lambda: interpolant_transform(2, divergence=ExactDivergence),
    "got the class Dense": lambda: interpolant_transform(2, whitening=DenseWhitening),
    "for 2 dimensions, .* for 3": lambda: interpolant_transform(2, whitening=DenseWhitening(3)),
    "for 2 dimensions, .* for 1": lambda: interpolant_transform(2, whitening=ScalarWhitening(1)),
}


@pytest.mark.parametrize("message", NO_PARTS)
def test_parts_that_cannot_work(message):
    with pytest.raises((TypeError, ValueError), match=message):
        NO_PARTS[message]()


# Random numbers


class Dropping(nn.Module):
    event_dim = 2

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))

    def forward(self, t, x, context=None):
        return self.layers(torch.cat((t[..., None], x), -1))


def test_a_network_with_dropout_draws_in_a_seeded_scope_whatever_it_did_before():
    for switch in ("mode", "share", "no rows"):
        flow = InterpolantTransform(Dropping())
        x, state, drop = torch.randn(3, 2), torch.get_rng_state(), flow.velocity.layers[1]

        def solved(x, flow=flow):
            with seeded(1), torch.no_grad():
                return flow(x.clone())  # a new tensor, of which nothing is kept

        flow.train(switch != "mode")
        drop.p = 0.0 if switch == "share" else 0.5
        quiet = solved(x[:0] if switch == "no rows" else x)
        drop.p = 0.5
        flow.train()
        noisy = solved(x), solved(x)
        assert torch.equal(*noisy), switch
        assert not torch.equal(noisy[0], quiet), switch
        assert torch.equal(torch.get_rng_state(), state), switch
        pickle.dumps(flow)
