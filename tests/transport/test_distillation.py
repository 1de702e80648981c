"""Students of a flow: how far they are from it, on which supports, and under NUTS."""

import copy
import math
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import random_flow, random_prior
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import affine_autoregressive, affine_coupling
from torch import nn
from torch.distributions import AffineTransform, ComposeTransform, Transform

import pyro_interpolant as pi
from pyro_interpolant.training.preprocessing import marginal_transform
from pyro_interpolant.transforms.gaussianize import Gaussianized

QUICK = {"count": 2000, "steps": 40, "batch_size": 128, "seed": 0, "progress": False}


def gaussian(dim=2, **kwargs):
    """An untrained flow, N(loc, L L^T)."""
    flow = pi.interpolant_transform(dim, (8,)).double()
    flow.flow.whitening.set(3.0 + torch.arange(float(dim)), 2.0 * torch.eye(dim))
    return pi.InterpolantDistribution(flow, **kwargs).freeze()


@pytest.mark.slow
def test_the_student_of_a_gaussian_is_near_and_says_how_near():
    flow = gaussian()
    result = pi.distill(flow, **QUICK)
    assert abs(result.relative_entropy) < 0.02
    assert 0 < result.stderr < 0.01
    student, x = result.distribution, flow.sample((3000,))
    assert (flow.log_prob(x) - student.log_prob(x)).mean().abs() < 0.02
    assert (student.sample((4000,)).mean(0) - torch.tensor([3.0, 4.0])).abs().max() < 0.2
    assert "nats from the flow, after 40 steps" in repr(result)


@pytest.mark.slow
def test_the_relative_entropy_is_that_of_known_densities():
    flow = gaussian()
    shift = AffineTransform(torch.tensor([0.5, 0.0]), torch.ones(2), event_dim=1)
    result = pi.distill(flow, [shift], **{**QUICK, "count": 20_000})  # nothing to train
    assert abs(result.relative_entropy - 0.125) < 4 * result.stderr + 0.02


def test_the_relative_entropy_is_of_draws_that_set_no_coordinates():
    flow = gaussian(20)
    settings = {**QUICK, "count": 400, "steps": 1, "learning_rate": 1e-9}  # moments of 360 draws
    result, x = pi.distill(flow, **settings), flow.sample((1000,))
    true = (flow.log_prob(x) - result.distribution.log_prob(x)).mean()
    assert true > 0.2
    assert abs(result.relative_entropy - true) < 3 * result.stderr


def test_the_score_of_a_student_has_no_kinks():
    """NUTS takes the steps that a potential's jumps allow."""
    student = pi.distill(random_prior(3), **{**QUICK, "count": 500}).distribution
    ends = torch.tensor([[-2.0, 1.0, -2.0], [2.0, -1.5, 2.0]]).double()
    jumps = []
    for count in (2001, 4001):
        x = torch.lerp(*ends, torch.linspace(0, 1, count).double()[:, None]).requires_grad_()
        (score,) = torch.autograd.grad(student.log_prob(x).sum(), x)
        jumps.append(float(score.diff(dim=0).norm(dim=-1).max()))
    assert jumps[1] < 0.6 * jumps[0]


@pytest.mark.slow
@pytest.mark.parametrize("support", [constraints.simplex, constraints.real])
def test_students_are_on_the_support_of_the_flow(support):
    dim = 1 if support is constraints.real else 2
    flow = random_prior(dim, support=support)
    student = pi.distill(flow, **QUICK).distribution
    x = student.sample((100,))
    assert student.event_shape == flow.event_shape
    assert bool(support.check(x).all())
    assert (student.log_prob(x) - flow.log_prob(x)).abs().median() < 1.0
    assert student.support == flow.support  # which samplers ask for
    assert student.expand((3,)).support == flow.support


@pytest.mark.parametrize(
    ("support", "outside"),
    [
        (constraints.positive, [[-0.5, 1.0], [math.inf, 1.0]]),
        (constraints.simplex, [[-0.1, 0.5, 0.6], [0.4, 0.7, -0.1]]),
        (constraints.unit_interval, [-0.1, 1.1]),  # scalars
    ],
)
def test_a_student_is_nowhere_that_the_flow_is_not(support, outside):
    shape = () if support is constraints.unit_interval else None
    flow = random_prior(2 if shape is None else 1, support=support, event_shape=shape)
    student = pi.distill(flow, **{**QUICK, "count": 100, "steps": 1}).distribution
    with pytest.raises(ValueError, match="within the support"):
        student.log_prob(torch.full(flow.event_shape, math.nan))
    flow._validate_args = student._validate_args = False
    y = torch.cat([flow.sample((2,)), torch.tensor(outside)]).requires_grad_()
    for each in (student, student.expand((4,))):
        found = each.log_prob(y)
        assert torch.equal(found.isinf(), flow.log_prob(y).isinf())
        assert found.isinf().tolist() == [False, False, True, True]
        (gradient,) = torch.autograd.grad(found[:2].sum() + found.exp().sum(), y)
        assert bool(gradient.isfinite().all())
        assert not gradient[2:].any()
    assert bool(student.log_prob(torch.full(flow.event_shape, math.nan)).isnan())


def test_a_base_that_comes_from_samples_has_no_density_either():
    base = pi.InterpolantDistribution(random_flow(2), pi.Samples(torch.randn(500, 2))).freeze()
    flow = pi.InterpolantDistribution(random_flow(2), base).freeze()
    assert not flow.has_density()
    assert math.isnan(pi.distill(flow, **{**QUICK, "steps": 1}).relative_entropy)
    assert flow.moments().mean.isfinite().all()


class Growing(nn.Module):
    event_dim = 2

    def forward(self, t, x, context=None):
        return 2 * x


def test_a_base_with_bounds_has_the_densities_of_the_draws():
    """A solve back from the draws leads some beyond the bounds."""
    base = dist.Uniform(-torch.ones(2), torch.ones(2)).to_event(1)
    flow = pi.InterpolantDistribution(
        pi.InterpolantTransform(Growing(), solver=pi.FixedGrid(1)), base
    )
    assert flow.log_prob(flow.sample((100,)).clone()).isinf().any()
    with torch.inference_mode():
        result = pi.distill(flow, **{**QUICK, "steps": 1})
    assert math.isfinite(result.relative_entropy)
    assert math.isfinite(result.stderr)


@pytest.mark.slow
def test_one_seed_gives_one_student_and_leaves_the_generator():
    flow, before = random_prior(2), torch.get_rng_state()
    one, other = (pi.distill(flow, **QUICK) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.relative_entropy == other.relative_entropy
    x = flow.sample((5,))
    assert torch.equal(one.distribution.log_prob(x), other.distribution.log_prob(x))


@pytest.mark.slow
def test_students_are_frozen_and_can_be_copied():
    student = pi.distill(random_prior(2), **QUICK).distribution
    modules = [part for part in student.transforms if isinstance(part, nn.Module)]
    assert modules
    assert not any(part.training for part in modules)
    assert not any(p.requires_grad for part in modules for p in part.parameters())
    x = torch.randn(5, 2)
    student.log_prob(x.requires_grad_()).sum().backward()  # of which caches keep the graph
    before = torch.get_rng_state()
    for copied in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert torch.equal(copied.log_prob(x), student.log_prob(x))
    assert torch.equal(torch.get_rng_state(), before)
    # What was drawn, and is known to the caches, has a gradient too.
    z = student.sample((5,))
    known = student.log_prob(z)
    (found,) = torch.autograd.grad(student.log_prob(z.requires_grad_()).sum(), z)
    other = z.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(student.log_prob(other).sum(), other)
    assert torch.allclose(found, expected)
    assert torch.equal(student.expand((5,)).log_prob(z), known)


class LikeZuko(nn.Module):
    """A module whose call gives a distribution with a transform from draws to N(0, I)."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self):
        base = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        new = dist.TransformedDistribution(base, [])
        new.transform = AffineTransform(self.shift, torch.ones(2), event_dim=1)
        return new


@pytest.mark.slow
def test_students_of_ones_own():
    flow = random_prior(2)
    couplings = [affine_coupling(2, [16]), affine_coupling(2, [16])]
    ours = pi.distill(flow, couplings, **QUICK)
    assert ours.distribution.transforms[1:3] == couplings
    slow = affine_autoregressive(2, [16])
    before = next(slow.parameters()).clone()
    pi.distill(flow, [ComposeTransform([slow.inv])], **{**QUICK, "steps": 3})
    assert not torch.equal(next(slow.parameters()), before)  # modules inside of others, too
    module = LikeZuko()
    theirs = pi.distill(flow, module, **QUICK)
    assert float(module.shift.abs().max()) > 0  # it was trained
    assert not module.shift.requires_grad
    assert max(ours.relative_entropy, theirs.relative_entropy) < 0.1


class Broken(Transform):
    domain = codomain = constraints.real_vector
    bijective = True

    def _call(self, x):
        return x

    def _inverse(self, y):
        return y

    def log_abs_det_jacobian(self, x, y):
        return math.nan * x.sum(-1)


def test_refusals():
    family = pi.ConditionalInterpolantDistribution(pi.conditional_interpolant_transform(2, 1))
    with pytest.raises(TypeError, match=r"condition\(c\)"):
        pi.distill(family, **QUICK)
    with pytest.raises(ValueError, match=r"batch of shape \(3,\)"):
        pi.distill(family.condition(torch.zeros(3, 1)), **QUICK)
    torus = pi.InterpolantTransform(pi.TorusMLP(1, (8,)), interpolant=pi.Geodesic())
    with pytest.raises(ValueError, match="got angles"):
        pi.distill(pi.InterpolantDistribution(torus, support=pi.circular), **QUICK)
    flow, quick = random_prior(2), QUICK | {"count": 200, "steps": 2}
    with pytest.raises(TypeError, match="expected transforms"):
        pi.distill(flow, [nn.Linear(2, 2)], **quick)
    with pytest.raises(ValueError, match=r"expected a student of draws of shape \(\*, 2\)"):
        pi.distill(flow, [affine_coupling(3, [8])], **quick)
    with pytest.raises(ValueError, match="steps >= 1, a whole number"):
        pi.distill(flow, **{**quick, "steps": 0})
    student = [affine_coupling(2, [8])]
    trained = pi.distill(flow, student, **quick).distribution
    with pytest.raises(ValueError, match="that has been trained are: build a new one"):
        pi.distill(flow, student, **quick)
    with pytest.raises(RuntimeError, match="not finite for 20 of 20"):
        pi.distill(flow, [affine_coupling(2, [8]), Broken()], **quick)
    with pytest.raises(ValueError, match="float64, the type of the student, got torch.float32: "):
        trained.log_prob(torch.zeros(3, 2).float())
    with pytest.raises(ValueError, match=r"a value of shape \(\*, 2\), got \(3, 1\)"):
        trained.log_prob(torch.zeros(3, 1))


# ----------------------------------------------------------------------------------- under NUTS


# Far enough from zero that the scale is, too: in the neck of a funnel chains hardly move.
Y = torch.tensor([1.5, -2.0], dtype=torch.float64)


def model():
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("rows", 2):
        x = pyro.sample("x", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Normal(x, 0.5), obs=Y)


def trained_guide():
    guide = pi.AutoInterpolant(model, hidden_dims=(16, 16))
    guide()
    return guide


@pytest.mark.slow
def test_the_density_under_a_student_is_the_models_own():
    guide = trained_guide()
    student = pi.distill(guide.get_posterior(), **QUICK).distribution
    base = pi.neutra(guide, student=student)
    w = 2 * torch.randn(3)  # the student is a poor one, which does not matter
    trace = poutine.trace(poutine.condition(base, data={"scale_shared_latent": w})).get_trace()
    transform = ComposeTransform(student.transforms)
    z = transform(w)
    expected = pi.log_joint(model)(z[None])[0] + transform.log_abs_det_jacobian(w, z)
    assert torch.allclose(trace.log_prob_sum(), expected)
    sites = base.samples({"scale_shared_latent": w[None]})
    assert torch.allclose(sites["x"][0], z[1:])
    brief = {**QUICK, "count": 100, "steps": 1}
    with pytest.raises(ValueError, match=r"event shape \(3,\)"):
        pi.neutra(guide, student=pi.distill(random_prior(2), **brief).distribution)
    inside = random_prior(3, support=constraints.positive)
    with pytest.raises(ValueError, match="real vector"):
        pi.neutra(guide, student=pi.distill(inside, **brief).distribution)
    with pytest.raises(TypeError, match="got DistillResult"):
        pi.neutra(guide, student=pi.distill(inside, **brief))


def test_a_student_behind_a_map_of_columns_takes_the_guides_place():
    guide = trained_guide()
    behind = Gaussianized(constraints.real_vector, marginal_transform(torch.randn(400, 3).sinh()))
    flow = pi.InterpolantDistribution(random_flow(3), support=behind).freeze()
    student = pi.distill(flow, **{**QUICK, "count": 100, "steps": 1}).distribution
    base, w = pi.neutra(guide, student=student), torch.randn(3)
    trace = poutine.trace(poutine.condition(base, data={"scale_shared_latent": w})).get_trace()
    transform = ComposeTransform(student.transforms)
    z = transform(w)
    expected = pi.log_joint(model)(z[None])[0] + transform.log_abs_det_jacobian(w, z)
    assert torch.allclose(trace.log_prob_sum(), expected)


def test_the_map_of_a_student_has_gradients_whatever_it_was_called_for():
    """Pyro's couplings find what they were called with again, without gradients or freed."""
    student = pi.distill(random_prior(2), **{**QUICK, "count": 100, "steps": 1}).distribution
    transform, z = ComposeTransform(student.transforms), torch.randn(2)
    with torch.no_grad():
        transform(z)
    z.requires_grad_()
    found = [torch.autograd.grad(transform(z).sum(), z)[0] for _ in range(2)]
    (expected,) = torch.autograd.grad(transform(z.clone()).sum(), z)
    for gradient in found:
        assert torch.equal(gradient, expected)
