"""Posterior draws against Gaussian posteriors in closed form, and others by quadrature."""

import pyro.distributions as dist
import pytest
import torch
from cases import IMAGE_NETWORKS, IMAGE_SHAPE, LATENT, random_flow, slow_but
from oracles import LatentNoise, MixtureVelocity, random_mixture
from pyro.distributions import constraints

import pyro_interpolant as pi
from pyro_interpolant.diffusion import approximate_posterior
from pyro_interpolant.diffusion.conversions import path_times
from pyro_interpolant.diffusion.sde import InterpolantSDE, path_ends

LOC = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)
LINEAR = torch.tensor([[2.0, 0.0, 0.0], [0.7, 0.8, 0.0], [0.1, -0.5, 0.6]], dtype=torch.float64)
SEEN = torch.tensor([[1.0, 0.5, 0.0], [0.0, -1.0, 2.0]], dtype=torch.float64)
NOISE = torch.tensor([0.3, 0.1], dtype=torch.float64)


class GaussianPrior:
    """A flow that is exact for a Gaussian, whitened by a map that is not its own, and its law."""

    def __init__(self, interpolant, **kwargs):
        lower = 0.5 * torch.randn(3, 3)
        white, cov = torch.randn(3), lower @ lower.T + 0.2 * torch.eye(3)
        velocity = MixtureVelocity(torch.ones(1), white[None], cov[None], interpolant)
        transform = pi.InterpolantTransform(velocity, interpolant=interpolant)
        transform.flow.whitening.set(LOC, LINEAR)
        self.flow = pi.InterpolantDistribution(transform, **kwargs)
        self.mean, self.cov = LOC + LINEAR @ white, LINEAR @ cov @ LINEAR.T

    def posterior(self, y):
        """Mean and covariance given y ~ N(SEEN x, NOISE^2)."""
        precision = torch.linalg.inv(self.cov)
        cov = torch.linalg.inv(precision + SEEN.T @ (SEEN / NOISE[:, None] ** 2))
        return cov @ (precision @ self.mean + SEEN.T @ (y / NOISE**2)), cov


def likelihood(y):
    return lambda x: dist.Normal(x @ SEEN.T, NOISE).to_event(1).log_prob(y)


def assert_normal(draws, mean, cov):
    """Draws have these moments: time steps add a few per cent to a narrow variance."""
    white = torch.linalg.solve(torch.linalg.cholesky(cov), (draws - mean).T).T
    assert white.mean(0).abs().max() < 4 / len(draws) ** 0.5
    assert (torch.cov(white.T) - torch.eye(len(mean))).abs().max() < 0.12


PATHS = {
    "trigonometric": pi.Trigonometric(),
    "linear": pi.Linear(),
    "encoding-decoding": pi.EncodingDecoding(),
    "bridge": pi.Latent(pi.Linear(), pi.BrownianBridge(0.5)),
}


@pytest.mark.parametrize("name", slow_but(PATHS, "linear"))
def test_it_has_the_posterior_of_gaussians(name):
    prior, y = GaussianPrior(PATHS[name]), torch.tensor([2.0, 3.0])
    draws = approximate_posterior(prior.flow, likelihood(y), (1500,))
    assert_normal(draws, *prior.posterior(y))


class Rippled(torch.nn.Module):
    """A velocity that is not quite another, as a learned one: its Jacobian is no covariance."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.mixed = velocity, torch.randn(3, 3)

    def forward(self, t, x, context=None):
        return self.velocity(t, x) + 0.08 * torch.sin(4 * x @ self.mixed)


@pytest.mark.parametrize(("name", "seed"), [("linear", 0), ("trigonometric", 1)])
def test_no_draw_runs_away_under_a_velocity_that_is_not_quite_right(name, seed):
    prior = GaussianPrior(PATHS[name])
    flow = prior.flow.transform.flow
    flow.velocity = Rippled(flow.velocity)
    torch.manual_seed(seed)
    precision = torch.linalg.inv(prior.cov) + torch.outer(SEEN[0], SEEN[0]) / 0.3**2
    lower = torch.linalg.cholesky(torch.linalg.inv(precision))

    def log_likelihood(x):
        return -0.5 * ((x @ SEEN[0] - 2.0) / 0.3).square()

    draws = approximate_posterior(prior.flow, log_likelihood, (2000,), steps=60)
    white = torch.linalg.solve(lower, (draws - draws.mean(0)).T)
    assert white.abs().max() < 6
    assert (torch.cov(white) - torch.eye(3)).abs().max() < 0.25


@pytest.mark.slow
def test_each_of_several_observations_has_its_own_posterior():
    prior, y = GaussianPrior(pi.Trigonometric()), torch.tensor([[2.0, 3.0], [-1.0, 0.0]])
    draws = approximate_posterior(prior.flow, likelihood(y), (600, 2), steps=25)
    for i in range(2):
        mean, cov = prior.posterior(y[i])
        off = torch.linalg.solve(torch.linalg.cholesky(cov), draws[:, i].mean(0) - mean)
        assert off.abs().max() < 4 / 600**0.5


def test_a_likelihood_that_says_nothing_leaves_the_prior():
    flow = random_flow_distribution()
    torch.manual_seed(1)
    draws = approximate_posterior(flow, lambda x: torch.zeros(x.shape[:-1]), (50,), steps=10)
    torch.manual_seed(1)
    sde = InterpolantSDE(flow)
    expected = path_ends(sde, torch.randn(50, 2), path_times(10))
    torch.testing.assert_close(draws, flow.transform.flow.whitening.from_white(expected))


def test_values_are_on_the_support():
    """Of a log-normal prior, and of an observation with log-normal noise: normal in logarithms."""
    prior = GaussianPrior(pi.Trigonometric(), support=constraints.positive)
    y = torch.tensor([2.0, 3.0])
    draws = approximate_posterior(prior.flow, lambda x: likelihood(y)(x.log()), (1500,), steps=30)
    assert bool((draws > 0).all())
    assert_normal(draws.log(), *prior.posterior(y))


def random_flow_distribution(**kwargs):
    flow = random_flow(2, **kwargs)
    flow.flow.whitening.set(LOC[:2], LINEAR[:2, :2])
    return pi.InterpolantDistribution(flow).freeze()


@pytest.mark.parametrize("name", slow_but(IMAGE_NETWORKS, "adapter"))
def test_images_and_their_labels(name):
    if name == "unet":
        pytest.importorskip("diffusers")
    velocity = IMAGE_NETWORKS[name](3)
    transform = pi.ConditionalInterpolantTransform(velocity, solver=pi.FixedGrid(1))
    images = pi.ConditionalInterpolantDistribution(transform, event_shape=IMAGE_SHAPE).freeze()
    given, y = images.condition(torch.tensor([0, 2])), torch.rand(2, *IMAGE_SHAPE)
    draws = approximate_posterior(
        given, lambda x: dist.Normal(x, 0.01).to_event(3).log_prob(y), (3,), steps=20
    )
    assert draws.shape == (3, 2, *IMAGE_SHAPE)
    assert (draws - y).abs().max() < 0.1


def with_noise():
    truth = random_mixture(2, LATENT["trigonometric, smooth"])
    transform = pi.InterpolantTransform(truth, interpolant=truth.interpolant)
    transform.flow.noise = LatentNoise(truth)
    return pi.InterpolantDistribution(transform)


def with_base():
    base = dist.Laplace(torch.zeros(2), torch.ones(2)).to_event(1)
    return pi.InterpolantDistribution(pi.interpolant_transform(2), base)


def test_refusals():
    def total(x):
        return x.sum(-1)

    with pytest.raises(ValueError, match="expected the default base.*got Independent"):
        approximate_posterior(with_base(), total, (3,))
    with pytest.raises(ValueError, match="learned the velocity alone, got one that learned the"):
        approximate_posterior(with_noise(), total, (3,))
    with pytest.raises(ValueError, match="starts from noise alone.*got Mirror, which starts from"):
        approximate_posterior(random_flow_distribution(interpolant=pi.Mirror()), total, (3,))
    flow = random_flow_distribution()
    with pytest.raises(ValueError, match="ends at the data, t = 1, got one stopped at t = 0.5"):
        approximate_posterior(flow.at(0.5), total, (3,))
    with pytest.raises(ValueError, match=r"of shape \(3,\), one for each.*got \(3, 2\): sum over"):
        approximate_posterior(flow, lambda x: -x.square(), (3,))
    family = pi.ConditionalInterpolantDistribution(random_flow(2, context_dim=1))
    with pytest.raises(TypeError, match=r"a conditional one gives it by \.condition"):
        approximate_posterior(family, total, (3,))


def test_named_sites_are_seen_and_drawn_by_name():
    """What is said of a positive site is said of its values, not of their logarithms."""
    sites = {"a": ((2,), constraints.real), "sd": ((), constraints.positive)}
    joint = pi.JointInterpolantDistribution(random_flow(3), sites=sites).freeze()

    def log_likelihood(x):
        assert (x["sd"] > 0).all()
        assert x["a"].shape == (*x["sd"].shape, 2)
        return -0.5 * (x["sd"] - 2.0).square()

    torch.manual_seed(3)
    draws = approximate_posterior(joint, log_likelihood, (4,), steps=3)
    torch.manual_seed(3)
    packed = joint.at(1.0)  # no names
    rows = approximate_posterior(packed, lambda x: log_likelihood(joint.unpack(x)), (4,), steps=3)
    for name, value in joint.unpack(rows).items():
        torch.testing.assert_close(draws[name], value)
