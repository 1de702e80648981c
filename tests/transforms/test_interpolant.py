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
from pyro.infer.autoguide import AutoDelta
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
    base_space,
    conditional_interpolant_transform,
    interpolant_transform,
)
from pyro_interpolant._torch import seeded
from pyro_interpolant.transforms import DenseWhitening, ScalarWhitening

# Raised inside torch, by its own first use of forward-mode differentiation.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
tracing = pytest.mark.filterwarnings("ignore:.torch.jit.trace")

KINDS = sorted(FLOWS)
every_kind = pytest.mark.parametrize("kind", slow_but(KINDS, "two"))


def flow(kind="two", dim=2, steps=4, **choices):
    return FLOWS[kind](dim, solver=FixedGrid(steps=steps), **choices)


def frozen_prior(kind, dim=2, **choices):
    return InterpolantDistribution(flow(kind, dim, **choices)).freeze()


def conditioned_prior(kind, **choices):
    view = flow(kind, context_dim=3, **choices).condition(torch.randn(3))
    return InterpolantDistribution(view).freeze()


# Derivatives


@pytest.mark.parametrize("dim", [1, 2, 3])
@every_kind
def test_score_against_finite_differences(kind, dim):
    prior = frozen_prior(kind, dim)
    x = prior.sample((4,)).requires_grad_()
    (score,) = torch.autograd.grad(prior.log_prob(x).sum(), x)
    steps = 1e-5 * torch.eye(dim)
    with torch.no_grad():
        up, down = (prior.log_prob(x[:, None] + s) for s in (steps, -steps))
    torch.testing.assert_close(score, (up - down) / 2e-5, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(prior.score(x), score)


@pytest.mark.parametrize("divergence", [None, HutchinsonDivergence(probes=2, seed=1)])
@pytest.mark.parametrize("dim", [1, 3])
@every_kind
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
@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.parametrize("conditioned", [False, True])
@every_kind
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


@pytest.mark.parametrize("rows", slow_but([1000, 5000], 5000))
@every_kind
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
@pytest.mark.parametrize("shape", [(5000,), (2500, 2), (2, 2500)])
@pytest.mark.parametrize("kind", KINDS)
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


def test_rows_of_a_strided_or_expanded_batch():
    for kind in KINDS:
        prior = frozen_prior(kind)
        x = torch.randn(2, 6)
        for value in (x.T, torch.randn(2).expand(6, 2), torch.randn(6, 4)[:, ::2]):
            torch.testing.assert_close(
                prior.log_prob(value), prior.log_prob(value.contiguous().clone())
            )
            assert prior.log_prob(value.clone().requires_grad_()).requires_grad


@every_kind
def test_empty_batch(kind):
    transform = flow(kind)
    for direction in (transform, transform.inv):
        x = torch.empty(0, 2)
        y = direction(x)
        assert y.shape == (0, 2)
        assert direction.log_abs_det_jacobian(x, y).shape == (0,)
    assert frozen_prior(kind).sample((0,)).shape == (0, 2)


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
@pytest.mark.parametrize("kind", KINDS)
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


@pytest.mark.slow
@tracing
@pytest.mark.parametrize("kind", KINDS)
def test_jit_elbo_of_a_latent_prior_in_base_space(kind):
    prior = frozen_prior(kind)

    def model():
        with pyro.plate("rows", 2):
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor([0.3, -1.0]))

    found = []
    for elbo in (lambda: JitTrace_ELBO(ignore_jit_warnings=True), Trace_ELBO):
        pyro.clear_param_store()
        pyro.set_rng_seed(1)
        guide = AutoDelta(base_space(model))
        found.append(trained_losses(elbo, base_space(model), guide, guide)[0])
        assert not prior.sample().requires_grad
    jit, plain = found
    assert jit.isfinite().all()
    torch.testing.assert_close(jit, plain, rtol=1e-6, atol=1e-6)


# Contexts


@pytest.mark.parametrize(
    ("context", "shape", "expected"),
    [
        ((3,), (2,), (2,)),
        ((3,), (4, 2), (4, 2)),
        ((10, 3), (2,), (10, 2)),
        ((10, 3), (1, 2), (10, 2)),
        ((10, 3), (10, 2), (10, 2)),
        ((10, 3), (3, 1, 2), (3, 10, 2)),
        ((10, 3), (3, 10, 2), (3, 10, 2)),
        ((1, 3), (2,), (2,)),
        ((1, 1, 3), (5, 2), (5, 2)),
        ((1, 10, 3), (2,), (10, 2)),
        ((4, 1, 3), (5, 2), (4, 5, 2)),
    ],
)
@every_kind
def test_context_broadcasts(kind, context, shape, expected):
    family = flow(kind, context_dim=3)
    c, x = torch.randn(context), torch.randn(shape)
    view = family.condition(c)
    for direction in (view, view.inv):
        assert direction.forward_shape(shape) == expected
        assert direction.inverse_shape(shape) == expected
        y = direction(x)
        assert y.shape == expected
        assert direction.log_abs_det_jacobian(x, y).shape == expected[:-1]
    y = view(x)
    while c.dim() > 1 and len(c) == 1:
        c = c[0]
    full_x, full_c = x.expand(expected), c.expand(*expected[:-1], 3)
    index = (-1,) * (len(expected) - 1)
    torch.testing.assert_close(y[index], family.condition(full_c[index])(full_x[index]))
    prior = InterpolantDistribution(view)
    batch = c.shape[:-1]
    assert prior.batch_shape == batch
    assert prior.sample((7,)).shape == (7, *batch, 2)
    assert prior.log_prob(x).shape == expected[:-1]


@every_kind
def test_context_that_does_not_broadcast(kind):
    view = flow(kind, context_dim=3).condition(torch.randn(4, 3))
    with pytest.raises(ValueError, match=r"broadcasts with \(4,\).*got \(5,\)"):
        view(torch.randn(5, 2))


def test_wrong_context():
    family = random_flow(2, context_dim=3)
    for bad in (torch.randn(4), torch.randn(10, 2), torch.tensor(1.0)):
        message = re.escape(f"expected a context of shape (*, 3), got {tuple(bad.shape)}")
        with pytest.raises(ValueError, match=message):
            family.condition(bad)
    with pytest.raises(ValueError, match=r"expected a context of shape \(\*, 3\), got none"):
        family.velocity(torch.tensor(0.5), torch.randn(2))
    plain = random_flow(2)
    with pytest.raises(ValueError, match=r"expected no context, got shape \(4,\).*context_dim=0"):
        plain.velocity(torch.tensor(0.5), torch.randn(2), torch.randn(4))


def test_numbers_as_contexts_come_with_the_recipe():
    flow = conditional_interpolant_transform(2, context_dim=1, hidden_dims=(8,))
    with pytest.raises(
        ValueError, match=r"\(\*, 1\), got \(5,\).*\(N, 1\), context\[\.\.\., None\]"
    ):
        flow.condition(torch.randn(5))


def test_labels_are_no_context_of_numbers():
    family, x = random_flow(2, context_dim=3), torch.randn(2)
    with pytest.raises(TypeError, match=r"floating type, got torch.int64 .*one_hot"):
        family.condition(torch.arange(3))
    table = torch.eye(3)
    expected = family.condition(table)(x)
    torch.testing.assert_close(family.condition(table.long())(x), expected)


@pytest.mark.usefixtures("_nodes_stay")
@pytest.mark.parametrize("shape", [(3,), (1, 3), (4, 3)])
@every_kind
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


@every_kind
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


@every_kind
def test_a_view_follows_its_flow(kind):
    family = flow(kind, context_dim=3)
    view = family.condition(torch.randn(3))
    assert view.solver == family.solver
    assert view.divergence == family.divergence
    assert view.interpolant == family.interpolant
    view.to(torch.float32)
    assert view.context.dtype == torch.float32
    assert {p.dtype for p in family.parameters()} == {torch.float32}
    assert view(torch.randn(2, dtype=torch.float32)).dtype == torch.float32


@every_kind
def test_contexts_matter_and_are_not_mixed(kind):
    family = flow(kind, context_dim=3)
    x = torch.randn(4, 2)
    c = torch.randn(4, 3)
    together = family.condition(c)(x)
    for i in range(4):
        torch.testing.assert_close(family.condition(c[i])(x[i]), together[i])
    assert (together - family.condition(c.flip(0))(x)).abs().max() > 1e-3


# Times


def any_transform(kind, conditioned, steps=4):
    if conditioned:
        return flow(kind, steps=steps, context_dim=3).condition(torch.randn(5, 3))
    return flow(kind, steps=steps)


both = pytest.mark.parametrize("conditioned", [False, True])


@both
@every_kind
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
@every_kind
def test_at_one_is_the_flow(kind, conditioned):
    transform = any_transform(kind, conditioned)
    x = torch.randn(5, 2)
    end, y = transform.at(1), transform(x)
    torch.testing.assert_close(end(x), y, rtol=0, atol=0)
    torch.testing.assert_close(end.inv(y), transform._inverse(y), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        end.log_abs_det_jacobian(x, end(x)), transform.log_abs_det_jacobian(x, y)
    )


@both
@every_kind
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
@every_kind
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
    assert (transform.at(0.3)(x) - transform.at(0.31)(x)).abs().max() > 1e-4
    torch.testing.assert_close(transform.at(0.7)(x), transform.at(torch.tensor(0.7))(x))


@pytest.mark.parametrize("t", [-0.01, 1.01, 2, float("nan"), float("inf")])
@both
def test_at_outside(conditioned, t):
    transform = any_transform("two", conditioned)
    message = re.escape(f"expected a time t in [0, 1], got {float(t)}")
    with pytest.raises(ValueError, match=message):
        transform.at(t)
    if not conditioned:
        with pytest.raises(ValueError, match=message):
            InterpolantDistribution(transform).at(t)


# The affine map


@every_kind
def test_precondition(kind):
    transform = flow(kind, 3)
    linear = torch.randn(3, 3) + 2 * torch.eye(3)
    transform.flow.whitening.set(torch.tensor([1.0, 2.0, 3.0]), linear)
    y = torch.randn(4, 3)
    torch.testing.assert_close(
        transform.flow.whitening.from_white(transform.flow.whitening.to_white(y)), y
    )
    torch.testing.assert_close(transform.flow.whitening.inverse @ linear, torch.eye(3))
    torch.testing.assert_close(
        transform.flow.whitening.log_det, torch.linalg.slogdet(linear).logabsdet
    )
    before = {k: v.clone() for k, v in transform.state_dict().items()}
    for loc, bad in [
        (torch.zeros(2), torch.eye(3)),
        (torch.zeros(3), torch.eye(2)),
        (torch.zeros(3), torch.ones(3)),
    ]:
        message = re.escape(
            "expected loc of shape (3,) and linear of shape (3, 3), got "
            f"{tuple(loc.shape)} and {tuple(bad.shape)}"
        )
        with pytest.raises(ValueError, match=message):
            transform.flow.whitening.set(loc, bad)
    for singular in (torch.zeros(3, 3), torch.full((3, 3), torch.nan)):
        with pytest.raises(ValueError, match="expected an invertible linear map"):
            transform.flow.whitening.set(torch.zeros(3), singular)
    for name, value in transform.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


# What is refused


FAMILIES = [InterpolantTransform, ConditionalInterpolantTransform]
both_classes = pytest.mark.parametrize("cls", FAMILIES)


class WithNorm(nn.Module):
    event_dim = 2

    def __init__(self, norm):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), norm, nn.Linear(4, 2))

    def forward(self, t, x, context=None):
        return self.net(x)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.SyncBatchNorm(4)])
@both_classes
def test_batch_normalisation(cls, norm):
    message = f"treats rows independently, got one with {type(norm).__name__}: use LayerNorm"
    with pytest.raises(ValueError, match=message):
        cls(WithNorm(norm))
    cls(WithNorm(nn.LayerNorm(4)))


@both_classes
def test_random_weights(cls):
    velocity = VelocityMLP(2, (4, 4))
    to_pyro_module_(velocity)
    cls(velocity)  # as a Pyro module with fixed weights it is welcome
    velocity.output.weight = PyroSample(dist.Normal(0.0, 1.0).expand((2, 4)).to_event(2))
    message = "expected a velocity with fixed weights, got a PyroModule with PyroSample weights"
    with pytest.raises(TypeError, match=message):
        cls(velocity)


@both_classes
@pytest.mark.parametrize("size", [None, 0, -1, 2.0, "2"])
def test_no_event_dim(cls, size):
    velocity = OwnVelocity(2)
    assert not hasattr(velocity, "event_dim")
    message = (
        rf"expected event_dim.*pass it after the velocity, or give the velocity an "
        rf"attribute event_dim; got {re.escape(repr(size))}"
    )
    with pytest.raises(ValueError, match=message):
        cls(velocity, size)
    assert cls(velocity, 2).flow.event_dim == 2
    velocity.event_dim = 2
    assert cls(velocity).flow.event_dim == 2


@both_classes
def test_velocity_for_another_number_of_dimensions(cls):
    message = "expected a velocity for 2 dimensions, got VelocityMLP with event_dim=3"
    with pytest.raises(ValueError, match=message):
        cls(VelocityMLP(3, (4,)), 2)


@both_classes
@pytest.mark.parametrize("velocity", [lambda t, x, context=None: x, None, VelocityMLP])
def test_velocity_that_is_no_module(cls, velocity):
    message = (
        "expected the velocity to be an instance of torch.nn.Module with forward(t, x, "
        f"context=None), got {velocity!r}"
    )
    with pytest.raises(TypeError, match=re.escape(message)):
        cls(velocity, 2)


CALLS = {
    "call": lambda t, x: t(x),
    "inverse": lambda t, x: t.inv(x),
    "_call": lambda t, x: t._call(x),
    "_inverse": lambda t, x: t._inverse(x),
    "log_abs_det_jacobian": lambda t, x: t.log_abs_det_jacobian(x, x),
}


@pytest.mark.parametrize("call", sorted(CALLS))
@every_kind
def test_wrong_last_dimension(kind, call):
    for dim, shape in [(2, (5, 3)), (2, (2, 1)), (2, ()), (3, (3, 2))]:
        message = re.escape(f"expected a last dimension of size {dim}, got shape {shape}.") + "$"
        with pytest.raises(ValueError, match=message):
            CALLS[call](flow(kind, dim), torch.randn(shape))
    recipe = re.escape("got shape (5,). For N scalars with D = 1 pass shape (N, 1): x[..., None].")
    with pytest.raises(ValueError, match=recipe):
        CALLS[call](flow(kind, 1), torch.randn(5))
    assert flow(kind, 1)(torch.randn(5)[..., None]).shape == (5, 1)


@pytest.mark.parametrize("call", sorted(CALLS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64])
def test_wrong_dtype(call, dtype):
    message = (
        rf"expected torch.float64, the type of the flow, got {dtype}: convert the value, or the "
        r"flow by .to\(dtype\)"
    )
    with pytest.raises(ValueError, match=message):
        CALLS[call](flow(), torch.ones(5, 2, dtype=dtype))


def test_factories():
    plain = interpolant_transform(3, (8, 8), solver=FixedGrid(steps=3))
    assert isinstance(plain, InterpolantTransform)
    assert plain.velocity.arguments() == (3, (8, 8), 0)
    assert plain.solver == FixedGrid(steps=3)
    family = conditional_interpolant_transform(3, 2, (8, 8))
    assert isinstance(family, ConditionalInterpolantTransform)
    assert family.velocity.arguments() == (3, (8, 8), 2)
    x = torch.randn(4, 3)
    torch.testing.assert_close(plain(x), x)  # an untrained flow is its affine map
    torch.testing.assert_close(family.condition(torch.randn(4, 2))(x), x)
    assert "VelocityMLP" in repr(plain)


# Random numbers


class Dropping(nn.Module):
    event_dim = 2

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2))

    def forward(self, t, x, context=None):
        return self.layers(torch.cat((t[..., None], x), -1))


@pytest.mark.parametrize("switch", ["mode", "share", "no rows"])
def test_a_network_with_dropout_draws_in_a_seeded_scope_whatever_it_did_before(switch):
    flow = InterpolantTransform(Dropping())
    x, state, drop = torch.randn(3, 2), torch.get_rng_state(), flow.velocity.layers[1]

    def solved(x):
        with seeded(1), torch.no_grad():
            return flow(x.clone())  # a new tensor, of which nothing is kept

    flow.train(switch != "mode")
    drop.p = 0.0 if switch == "share" else 0.5
    quiet = solved(x[:0] if switch == "no rows" else x)
    drop.p = 0.5
    flow.train()
    noisy = solved(x), solved(x)
    assert torch.equal(*noisy)
    assert not torch.equal(noisy[0], quiet)
    assert torch.equal(torch.get_rng_state(), state)
    pickle.dumps(flow)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: interpolant_transform(2, 64), r"hidden_dims, a tuple .* got 64: write \(64,\)"),
        (lambda: interpolant_transform(2, (8.0,)), r"hidden_dims, a tuple .* got \(8\.0,\)"),
        (lambda: interpolant_transform(2.0, (8,)), r"sizes, a tuple .* got \(2\.0, 0, 0\)"),
        (
            lambda: interpolant_transform(2, solver=FixedGrid),
            r"FixedGrid\(\), got the class Fixed",
        ),
        (lambda: interpolant_transform(2, solver="rk4"), r"solver to be an instance.* got 'rk4'"),
        (lambda: interpolant_transform(2, interpolant=Linear), "interpolant .* got the class Lin"),
        (
            lambda: interpolant_transform(2, divergence=ExactDivergence),
            "divergence .* got the class ExactDivergence",
        ),
        (
            lambda: interpolant_transform(2, whitening=DenseWhitening),
            r"whitening .* DenseWhitening\(D\), got the class DenseWhitening",
        ),
    ],
)
def test_what_is_no_instance_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@both_classes
@pytest.mark.parametrize("kind", [DenseWhitening, ScalarWhitening])
@pytest.mark.parametrize("size", [1, 3])
def test_a_whitening_of_another_size_is_refused(cls, kind, size):
    with pytest.raises(ValueError, match=f"whitening for 2 dimensions, .* got one for {size}"):
        cls(OwnVelocity(2), 2, whitening=kind(size))


@both_classes
def test_sizes_of_numpy_are_sizes(cls):
    velocity = OwnVelocity(2)
    assert type(cls(velocity, np.int64(2)).flow.event_dim) is int
    velocity.event_dim, velocity.context_dim = np.int64(2), np.int64(3)
    flow = cls(velocity).flow
    assert (flow.event_dim, flow.context_dim) == (2, 3)
    with pytest.raises(ValueError, match="expected a velocity for 4 dimensions"):
        cls(velocity, 4)
