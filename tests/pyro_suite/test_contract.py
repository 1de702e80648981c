"""What Pyro asks of a transform: its own harness, and how many solves its algorithms cost."""

import copy

import pyro
import pyro.distributions as dist
import pyro.distributions.transforms as pyro_transforms
import pytest
import torch
from cases import FLOWS, CountingDivergence, CountingSolver, losses_of_adam
from pyro.infer import (
    SVI,
    Trace_ELBO,
)
from pyro.infer.autoguide import AutoNormal
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import TransformReparam
from torch import nn
from torch.distributions import constraints

from pyro_interpolant import (
    FixedGrid,
    InterpolantDistribution,
    base_space,
    interpolant_transform,
)

# Raised inside torch, by its own first use of forward-mode differentiation.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

COARSE = FixedGrid(steps=12)  # where no way out and way back have to agree


def build(kind, dim, **choices):
    return FLOWS[kind](dim, solver=FixedGrid(steps=48), **choices)


def normal(*shape):
    return dist.Normal(torch.zeros(shape), torch.ones(shape))


# Pyro's harness, of which more is in test_transforms

THROUGH_THE_INVERSE = {
    "at, own": lambda: build("own", 2).at(0.6),
    "inverted family, three": lambda: (
        build("three", 2, context_dim=3).inv.condition(torch.rand(1, 3)).inv
    ),
}


@pytest.mark.parametrize("name", THROUGH_THE_INVERSE)
def test_three_steps_of_adam_through_the_inverse(name):
    transform = THROUGH_THE_INVERSE[name]()
    transform.solver = COARSE
    flow = dist.TransformedDistribution(normal(2), [transform.inv])
    x = flow.sample((10,)) + 1.0

    def check():
        fresh = -copy.deepcopy(flow).log_prob(x).mean().item()
        assert -flow.log_prob(x).mean().item() == pytest.approx(fresh, rel=1e-12)

    losses = losses_of_adam(flow, transform.flow.parameters(), x, rate=2e-3, check=check)
    assert losses[2] < losses[1] < losses[0]


def test_inverses():
    transform, family = build("two", 2), build("two", 2, context_dim=3)
    context = torch.rand(4, 3)
    member, inverse = family.condition(context), family.inv
    for t in (transform, transform.at(0.3), member):
        assert t.inv.inv is t
        assert t.inv is t.inv
        assert t.bijective
        for cache_size in (0, 1):
            assert t.with_cache(cache_size) is t
            assert t.inv.with_cache(cache_size).inv is t
    assert inverse.inv is family
    assert set(inverse.parameters()) == set(family.parameters())
    x = torch.randn(4, 2)
    y, back = member(x), inverse.condition(context)
    log_det = member.log_abs_det_jacobian(x, y)
    torch.testing.assert_close(back(y), x, rtol=0, atol=1e-6)
    torch.testing.assert_close(back.log_abs_det_jacobian(y, x), -log_det, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("compose", "cache_size"),
    [(dist.transforms.ComposeTransform, 1), (dist.transforms.ComposeTransformModule, 0)],
)
def test_composition(compose, cache_size):
    parts = [build("two", 2), build("two", 2)]
    chain = compose(parts, cache_size=cache_size)
    if isinstance(chain, nn.Module):
        assert set(chain.parameters()) == {p for part in parts for p in part.parameters()}
    x = torch.randn(5, 2)
    middle = parts[0](x)
    y = chain(x)
    torch.testing.assert_close(y, parts[1](middle))
    torch.testing.assert_close(
        chain.log_abs_det_jacobian(x, y),
        parts[0].log_abs_det_jacobian(x, middle) + parts[1].log_abs_det_jacobian(middle, y),
    )
    torch.testing.assert_close(chain.inv(y.detach()), x, rtol=0, atol=1e-6)


def test_composition_of_families():
    family, fixed = build("two", 2, context_dim=3), build("two", 2)
    affine = dist.transforms.AffineTransform(torch.ones(2), 2.0, event_dim=1)
    chain = dist.conditional.ConditionalComposeTransformModule(
        [family, affine, fixed], cache_size=1
    )
    assert set(chain.parameters()) == {*family.parameters(), *fixed.parameters()}
    context, x = torch.rand(5, 3), torch.randn(5, 2)
    member = chain.condition(context)
    y = member(x)
    torch.testing.assert_close(y, fixed(affine(family.condition(context)(x))))
    torch.testing.assert_close(member.inv(y), x, rtol=0, atol=1e-6)
    flow = dist.conditional.ConditionalTransformedDistribution(normal(2).to_event(1), [chain])
    assert flow.condition(context).batch_shape == (5,)
    flow.condition(context).log_prob(y.detach()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in chain.parameters())


def test_iterated():
    chain = pyro_transforms.iterated(2, interpolant_transform, 2, hidden_dims=(8, 8))
    x = torch.randn(4, 2)
    assert len(list(chain.parameters())) == 2 * len(list(chain.parts[0].parameters()))
    torch.testing.assert_close(chain(x), x)  # untrained: the identity


# How many solves

SUPPORTS = {
    "real": constraints.real_vector,
    "positive": constraints.positive,
    "simplex": constraints.simplex,
    "interval": constraints.interval(-1.0, 2.0),
}


def counted(kind="two", support="real", *, frozen):
    """A distribution whose transform counts its solves and divergences."""
    transform = FLOWS[kind](2, solver=CountingSolver(), divergence=CountingDivergence())
    prior = InterpolantDistribution(transform, support=SUPPORTS[support])
    return prior.freeze() if frozen else prior


def counts(prior):
    """Return and reset the numbers of solves and of divergence evaluations."""
    solver, divergence = prior.transform.solver, prior.transform.divergence
    found = solver.solves, divergence.calls
    solver.solves = divergence.calls = 0
    return found


every_case = pytest.mark.parametrize(
    ("kind", "support", "frozen"),
    [
        *(("own", "real", False), ("three", "interval", True)),
        *(("two", "positive", False), ("two", "simplex", True)),
    ],
)


@every_case
def test_solves_of_draws_and_densities(kind, support, frozen):
    prior = counted(kind, support, frozen=frozen)
    x = prior.sample((3,))
    y = prior.rsample((3,))
    assert counts(prior) == (2, 0)
    prior.log_prob(y)
    assert counts(prior) == (0, 1)
    _, log_prob = prior.rsample_and_log_prob((3,))
    assert counts(prior) == (1, 1)
    assert log_prob.requires_grad is not frozen
    for value in (x.clone(), x.clone().requires_grad_()):
        prior.log_prob(value)
        assert counts(prior) == (1, 1)
    with torch.no_grad():
        prior.log_prob(x.clone())
        assert counts(prior) == (1, 1)
        x = prior.sample((3,))
        prior.log_prob(x)
        prior.log_prob(x)
    assert counts(prior) == (1, 1)


@every_case
def test_solves_of_expanded_ones_and_of_two_sites(kind, support, frozen):
    prior = counted(kind, support, frozen=frozen)
    for expanded in (prior.expand((4,)), prior.expand((1,)).expand((3, 4)), prior.expand_by((2,))):
        expanded.log_prob(expanded.rsample())
        assert counts(prior) == (1, 1)
        expanded.log_prob(expanded.sample().clone())
        assert counts(prior) == (2, 1)
    mask = torch.tensor([True, False, True, True])
    for view in (prior.expand((4,)).to_event(1), prior.expand((4,)).mask(mask)):
        view.log_prob(view.rsample())
        assert counts(prior) == (1, 1)

    def model():
        for name in ("a", "b"):
            with pyro.plate(f"plate_{name}", 3):
                pyro.sample(name, prior)

    trace = pyro.poutine.trace(model).get_trace()
    assert counts(prior) == (2, 0)
    trace.compute_log_prob()
    remembered = frozen or trace.nodes["a"]["value"].requires_grad
    assert counts(prior) == (0 if remembered else 2, 2)


def test_transform_and_its_inverse_share_one_solve():
    prior = counted(frozen=True)
    transform = prior.transform
    x = torch.randn(3, 2)
    y = transform(x)
    assert transform.inv(y) is x
    transform.log_abs_det_jacobian(x, y)
    transform.inv.log_abs_det_jacobian(y, x)
    assert counts(prior) == (1, 1)
    z = torch.randn(3, 2)
    w = transform.inv(z)
    assert transform(w) is z
    transform.inv.log_abs_det_jacobian(z, w)
    assert counts(prior) == (1, 1)


def latent_model(prior):
    def model():
        with pyro.plate("rows", 2):
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor([0.3, -0.5]))

    return model


REPARAM = {
    "base_space": base_space,
    "TransformReparam": lambda model: pyro.poutine.reparam(
        model, config={"z": TransformReparam()}
    ),
}


@pytest.mark.parametrize(
    ("how", "support"),
    [("base_space", "simplex"), ("base_space", "real"), ("TransformReparam", "positive")],
)
def test_inference_in_base_space_solves_forward_only(how, support):
    """Without a divergence, and with the potential of its definition."""
    prior = counted(support=support, frozen=True)
    model = REPARAM[how](latent_model(prior))
    svi = SVI(model, AutoNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step()
    counts(prior)
    svi.step()
    assert counts(prior) == (1, 0)
    initial, potential, *_ = initialize_model(model)
    assert list(initial) == ["z_base"]
    counts(prior)
    z = initial["z_base"].clone().requires_grad_()
    energy = potential({"z_base": z})
    (gradient,) = torch.autograd.grad(energy, z)
    assert counts(prior) == (1, 0)
    value = z.detach()
    for transform in prior.transforms:
        value = transform(value)
    expected = -dist.Normal(0.0, 1.0).log_prob(z.detach()).sum()
    observed = torch.tensor([0.3, -0.5])
    expected = expected - dist.Normal(value.sum(-1), 1.0).log_prob(observed).sum()
    torch.testing.assert_close(energy.detach(), expected)
    assert gradient.abs().min() > 0


def test_inference_in_data_space_is_one_solve():
    """Of a latent site under a frozen prior, and of data under a flow that learns."""
    prior = counted(frozen=True)
    initial, potential, *_ = initialize_model(latent_model(prior))
    counts(prior)
    z = initial["z"].clone().requires_grad_()
    torch.autograd.grad(potential({"z": z}), z)
    assert counts(prior) == (1, 1)
    flow, data = counted(frozen=False), torch.randn(6, 2)

    def model():
        pyro.module("flow", flow.transform)
        with pyro.plate("rows", 6):
            pyro.sample("x", flow, obs=data)

    svi = SVI(model, lambda: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = []
    for _ in range(4):
        losses.append(svi.step())
        assert counts(flow) == (1, 1)
    assert losses[-1] < losses[0]
