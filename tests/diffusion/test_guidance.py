"""Guided samples against a network whose guided velocity is solved in closed form."""

import pyro.distributions as dist
import pytest
import torch
from cases import IMAGE_SHAPE
from torch import nn
from torch.distributions import constraints

import pyro_interpolant as pi
from pyro_interpolant.diagnostics import bits_per_dim
from pyro_interpolant.diffusion import guided, sample_sde, score
from pyro_interpolant.distributions import ConditionalJointInterpolantDistribution
from pyro_interpolant.nn import ImageVelocity

RATES = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)  # of two labels, and of none


class Growing(nn.Module):
    """Images grow at a rate that their label has."""

    def __init__(self):
        super().__init__()
        self.rates = nn.Parameter(RATES.clone())

    def forward(self, t, image, labels):
        return self.rates[labels][:, None, None, None] * image


def family(null_label=2):
    velocity = ImageVelocity(Growing(), IMAGE_SHAPE, 2, null_label)
    transform = pi.ConditionalInterpolantTransform(velocity, solver=pi.FixedGrid(8))
    return pi.ConditionalInterpolantDistribution(transform, event_shape=IMAGE_SHAPE).freeze()


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_samples_follow_the_guided_velocity(scale):
    images, labels, w = family(), torch.tensor([0, 1, 1]), torch.randn(4, 3, 16)
    found = guided(images, scale).condition(labels)
    rate = RATES[2] + scale * (RATES[labels] - RATES[2])
    torch.testing.assert_close(found.transform(w), rate.exp()[:, None] * w, rtol=1e-6, atol=1e-6)
    assert found.sample((4,)).shape == (4, 3, *IMAGE_SHAPE)
    assert guided(images, scale).condition(torch.tensor(1)).sample().shape == IMAGE_SHAPE


def test_it_shares_weights_and_keeps_their_mode():
    images = family()
    found = guided(images, 2.0).condition(torch.tensor([0]))
    w = torch.randn(1, 16)
    before = found.transform(w)
    with torch.no_grad():
        images.transform.velocity.network.rates[2] = 1.0
    assert (found.transform(w) - before).abs().max() > 0.1
    images.transform.train()
    guided(images)
    assert images.transform.velocity.training


class Labelled(nn.Module):
    """A velocity of rows with a label for none of two classes."""

    event_dim, classes, null_label = 2, 2, 2

    def forward(self, t, x, context=None):
        return RATES[context[..., 0].long()][..., None] * x


def test_it_keeps_names_and_sites():
    transform = pi.ConditionalInterpolantTransform(Labelled())
    rows = pi.ConditionalInterpolantDistribution(transform)
    rows.columns, rows.context_columns = ("a", "b"), ("kind",)
    rows.refined_for = torch.ones(1)
    found = guided(rows)
    assert found.refined_for is rows.refined_for
    assert (found.columns, found.context_columns) == (("a", "b"), ("kind",))
    sites = {"mu": ((), constraints.real), "sigma": ((), constraints.positive)}
    joint = ConditionalJointInterpolantDistribution(transform, sites=sites)
    draws = guided(joint).condition(torch.tensor(1)).sample_dict((4,))
    assert bool((draws["sigma"] > 0).all())


def test_it_keeps_base_solver_nodes_and_type():
    transform = pi.ConditionalInterpolantTransform(Labelled(), solver=pi.FixedGrid(3, "euler"))
    transform.trains_weights = False
    base = dist.Normal(torch.tensor([5.0, -5.0]), 0.1).to_event(1)
    given = guided(pi.ConditionalInterpolantDistribution(transform, base)).condition(
        torch.tensor(1)
    )
    assert given.transform.solver == pi.FixedGrid(3, "euler")
    assert not given.transform.trains_weights
    expected = given.transform(base.mean)
    assert (given.sample((200,)).mean(0) - expected).abs().max() < 0.05
    transform = pi.ConditionalInterpolantTransform(Labelled()).float()
    guided(pi.ConditionalInterpolantDistribution(transform))
    assert transform.flow.loc.dtype == torch.float32


def test_it_has_no_density_and_no_file(tmp_path):
    found = guided(family())
    given = found.condition(torch.tensor([0, 1]))
    assert not given.has_density()
    with pytest.raises(NotImplementedError, match="no density that is known.*log_prob of the"):
        given.log_prob(given.sample())
    levels = torch.zeros(2, *IMAGE_SHAPE, dtype=torch.uint8)
    with pytest.raises(NotImplementedError, match="no density that is known"):
        bits_per_dim(found, levels, context=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="expected a divergence of this package, got a NoDen"):
        pi.save(found, tmp_path / "guided.safetensors")


def test_it_is_not_trained_for_the_weights_are_those_of_another():
    original = family()
    with pytest.raises(ValueError, match="got a conditioned or guided one.*it came from"):
        pi.fit(guided(original), torch.rand(8, *IMAGE_SHAPE), context=torch.tensor([0, 1] * 4))
    assert torch.equal(original.transform.velocity.network.rates, RATES)


def test_refusals():
    with pytest.raises(TypeError, match=r"expected a conditional flow, got .*condition\(labels\)"):
        guided(family().condition(torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="expected a finite scale, got"):
        guided(family(), float("nan"))
    with pytest.raises(ValueError, match=r"label for none of its classes.*got ImageVelocity"):
        guided(family(null_label=None))


class Shifted(nn.Module):
    """The noise of images that are moved by as much as their label says."""

    def forward(self, t, image, labels):
        return image + RATES[labels].to(image)[:, None, None, None]


def test_the_score_of_a_guided_flow_is_known_where_its_own_is():
    images, labels = family(), torch.tensor([0, 1])
    flow = images.transform.flow
    flow.reached = flow._bits()  # by a gradient alone
    sample_sde(guided(images).condition(labels), steps=2)
    flow.reached += 1
    with pytest.raises(ValueError, match="trained through the solver"):
        sample_sde(guided(images).condition(labels), steps=2)
    images = family()
    images.transform.flow.independent = False  # trained on pairs
    with pytest.raises(ValueError, match="trained with the independent coupling"):
        sample_sde(guided(images).condition(labels), steps=2)


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_learned_noise_is_guided_too(scale):
    images, labels = family(), torch.tensor([0, 1])
    images.transform.flow.interpolant = pi.Latent(pi.Linear(), pi.BrownianBridge(0.5))
    images.transform.flow.noise = ImageVelocity(Shifted(), IMAGE_SHAPE, 2, 2)
    x, t = torch.randn(2, 16), torch.tensor(0.5)
    found = score(guided(images, scale).condition(labels), t, x)
    gamma = float(images.transform.interpolant.coefficients(t)[2])
    shift = RATES[2] + scale * (RATES[labels] - RATES[2])
    expected = -(x + shift[:, None].to(x)) / gamma
    torch.testing.assert_close(found, expected)
    images.transform.flow.noise = pi.VelocityMLP(16, (8,), classes=2)
    with pytest.raises(ValueError, match=r"label for none of its classes.*got VelocityMLP"):
        guided(images)
