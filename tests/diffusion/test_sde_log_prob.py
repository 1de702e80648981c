import pyro.distributions as dist
import pytest
import torch
from cases import random_flow
from oracles import LatentNoise, MixtureVelocity, PairVelocity, random_mixture
from pyro.distributions import constraints
from torch import nn

import pyro_interpolant as pi
from pyro_interpolant.diffusion import sde, sde_log_prob

LOC = torch.tensor([3.0, -1.0], dtype=torch.float64)
LINEAR = torch.tensor([[2.0, 0.0], [0.7, 0.8]], dtype=torch.float64)


def flow_of(velocity, base=None, noise=None, **kwargs):
    transform = pi.InterpolantTransform(
        velocity, interpolant=velocity.interpolant, solver=pi.FixedGrid(40)
    )
    dim = transform.flow.event_dim
    transform.flow.whitening.set(LOC[:dim], LINEAR[:dim, :dim])
    transform.flow.noise = noise
    return pi.InterpolantDistribution(transform, base, **kwargs)


def log_prob(truth, y, t=1.0):
    dim = y.shape[-1]
    w = (y - LOC[:dim]) @ torch.linalg.inv(LINEAR[:dim, :dim]).T
    return truth.log_prob(torch.tensor(t), w) - torch.logdet(LINEAR[:dim, :dim])


MEMBERS = {
    "trigonometric": pi.Trigonometric(),
    "linear": pi.Linear(),
    "encoding-decoding": pi.EncodingDecoding(),
    "bridge": pi.Latent(pi.Linear(), pi.BrownianBridge(0.5)),
}


@pytest.fixture
def _guided_to_the_ends(monkeypatch):
    """Guide paths where only an exact score can be trusted: their weights are then all equal."""
    monkeypatch.setattr(sde, "_GUIDED_SHARE", 1e-9)


@pytest.mark.usefixtures("_guided_to_the_ends")
@pytest.mark.parametrize("name", ["linear", "encoding-decoding"])
def test_guided_paths_all_tell_the_density_of_an_exact_flow(name):
    truth = random_mixture(2, MEMBERS[name])
    flow, y = flow_of(truth), LOC + truth.sample(1.0, 8) @ LINEAR.T
    value, stderr = sde_log_prob(flow, y, paths=8, steps=50)
    assert value.shape == stderr.shape == (8,)
    assert float((value - log_prob(truth, y)).abs().max()) < 0.01
    assert float(stderr.max()) < 0.01


@pytest.mark.usefixtures("_guided_to_the_ends")
def test_finer_steps_bring_it_nearer():
    truth = random_mixture(2, pi.Trigonometric())
    flow, y = flow_of(truth), LOC + truth.sample(1.0, 40) @ LINEAR.T
    errors = []
    for steps in (5, 20):
        value, _ = sde_log_prob(flow, y, paths=64, steps=steps)
        errors.append(float((value - log_prob(truth, y)).abs().mean()))
    assert errors[1] < 0.25 * errors[0] < 0.01


def test_narrow_data_have_their_density():
    variance = 0.03**2 * torch.eye(1)[None]
    preserving = pi.VariancePreserving(lambda t: t**2)
    truth = MixtureVelocity(torch.ones(1), torch.zeros(1, 1), variance, preserving)
    flow, y = flow_of(truth), LOC[:1] + truth.sample(1.0, 8) @ LINEAR[:1, :1].T
    value, _ = sde_log_prob(flow, y, paths=8, steps=50)
    assert float((value - log_prob(truth, y)).abs().max()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["trigonometric", "bridge"])
def test_guidance_that_fades_at_the_ends_costs_little(name):
    truth = random_mixture(2, MEMBERS[name])
    flow, y = flow_of(truth), LOC + truth.sample(1.0, 8) @ LINEAR.T
    value, stderr = sde_log_prob(flow, y, paths=16, steps=50)
    assert float(stderr.max()) < 0.05
    assert float(((value - log_prob(truth, y)).abs() / (stderr + 0.001)).max()) < 4.5


@pytest.mark.slow
def test_a_score_that_is_wrong_at_the_ends_does_no_harm():
    truth = random_mixture(2, pi.Latent(pi.Linear(), pi.SineSquared(0.8)))

    class Off(LatentNoise):
        def forward(self, t, x, context=None):
            return super().forward(t, x) + 0.02 * torch.cos(3 * x)

    flow, y = flow_of(truth, noise=Off(truth)), LOC + truth.sample(1.0, 8) @ LINEAR.T
    value, stderr = sde_log_prob(flow, y, paths=16, steps=50)
    assert float(stderr.max()) < 0.2
    assert float((value - log_prob(truth, y)).abs().max()) < 0.4


class Perturbed(nn.Module):
    """A velocity with an error, which makes the stochastic model another than the flow."""

    def __init__(self, truth):
        super().__init__()
        self.truth, self.event_dim, self.interpolant = truth, truth.event_dim, truth.interpolant

    def forward(self, t, x, context=None):
        return self.truth(t, x) + 0.4 * (1 - t)[..., None] * torch.sin(2 * x)


@pytest.mark.slow
def test_guidance_changes_the_variance_and_not_the_model():
    flow = flow_of(Perturbed(random_mixture(1, pi.Trigonometric(), seed=2)))
    y = LOC[:1] + torch.linspace(-1.5, 1.5, 5)[:, None]
    options = {"paths": 2000, "steps": 20, "diffusion": lambda t: 0.8 * (1 - t)}
    a, ea = sde_log_prob(flow, y, guidance=0.0, **options)
    b, eb = sde_log_prob(flow, y, guidance=1.0, **options)
    assert float(((a - b).abs() / (ea + eb + 0.01)).max()) < 3
    assert bool((eb < 0.5 * ea).all())
    assert float((b - flow.log_prob(y)).abs().max()) > 0.05  # of the flow, it is not


@pytest.mark.slow
def test_without_diffusion_it_is_the_log_prob_of_the_flow():
    truth = random_mixture(2, pi.Linear())
    flow, y = flow_of(truth), LOC + truth.sample(1.0, 6) @ LINEAR.T
    value, stderr = sde_log_prob(
        flow, y, diffusion=lambda t: 0.0, paths=2, steps=200, guidance=1.0
    )
    assert torch.allclose(value, flow.log_prob(y), atol=1e-3)
    assert float(stderr.max()) < 1e-12


@pytest.mark.slow
@pytest.mark.usefixtures("_guided_to_the_ends")
def test_any_time_and_any_support():
    truth = random_mixture(2, pi.Trigonometric())
    y = LOC + truth.sample(0.6, 5) @ LINEAR.T
    value, _ = sde_log_prob(flow_of(truth).at(0.6), y, paths=8, steps=40)
    assert float((value - log_prob(truth, y, 0.6)).abs().max()) < 0.01
    positive = flow_of(truth, support=constraints.positive)
    x = LOC + 0.2 * truth.sample(1.0, 5) @ LINEAR.T
    value, _ = sde_log_prob(positive, x.exp(), paths=8, steps=40)
    assert float((value - (log_prob(truth, x) - x.sum(-1))).abs().max()) < 0.01


@pytest.mark.slow
def test_a_learned_noise_and_a_base_of_ones_own():
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.8]])
    interpolant = pi.Latent(pi.Linear(), pi.BrownianBridge(0.5))
    truth = PairVelocity(torch.tensor([0.4, -1.0]), cov, random_mixture(2, interpolant))
    base = dist.MultivariateNormal(LOC + LINEAR @ truth.loc, LINEAR @ cov @ LINEAR.T)
    flow = flow_of(truth, base, LatentNoise(truth))
    y = LOC + random_mixture(2, pi.Linear()).sample(1.0, 5) @ LINEAR.T
    value, _ = sde_log_prob(flow, y, paths=8, steps=60)
    assert float((value - log_prob(truth, y)).abs().max()) < 0.02


def test_shapes_contexts_and_types():
    likelihood = pi.ConditionalInterpolantDistribution(random_flow(2, context_dim=3))
    given = likelihood.condition(torch.randn(5, 3))
    x = given.sample((4,))
    value, stderr = sde_log_prob(given, x, paths=3, steps=3)
    assert value.shape == stderr.shape == (4, 5)
    assert not value.requires_grad
    value, _ = sde_log_prob(given, x[0, 0], paths=3, steps=3)
    assert value.shape == (5,)
    flow = pi.InterpolantDistribution(pi.interpolant_transform(2, (8, 8)).float())
    x = torch.randn(3, 2, dtype=torch.float32)
    value, stderr = sde_log_prob(flow, x, paths=8, steps=40)
    assert value.dtype == stderr.dtype == torch.float32
    error = (value - flow.log_prob(x).detach()).abs()
    assert float((error / (stderr + 1e-3)).max()) < 4.5


def test_a_path_is_that_of_every_member_of_a_batch_of_bases():
    base = dist.Normal(torch.tensor([[0.0], [5.0], [-4.0]]).expand(3, 2), 1.0).to_event(1)
    transform = pi.interpolant_transform(2, (8,), interpolant=pi.Latent())
    transform.flow.noise = transform.velocity
    flow, x = pi.InterpolantDistribution(transform, base), torch.tensor([0.5, -0.3])
    for paths in (3, 4):
        value, _ = sde_log_prob(
            flow, x, paths=paths, steps=20, guidance=0.0, diffusion=lambda t: 0.0
        )
        assert torch.allclose(value, flow.log_prob(x), atol=1e-3)
    with pytest.raises(ValueError, match="a batch shape that broadcasts"):
        sde_log_prob(flow, x.expand(4, 2))


def test_refusals():
    flow, x = pi.InterpolantDistribution(pi.interpolant_transform(2, (8, 8))), torch.zeros(3, 2)
    with pytest.raises(ValueError, match="paths >= 2, a whole number, got 1"):
        sde_log_prob(flow, x, paths=1)
    with pytest.raises(ValueError, match="steps >= 1, a whole number, got 0"):
        sde_log_prob(flow, x, steps=0)
    with pytest.raises(ValueError, match=r"expected guidance in \[0, 1\], got"):
        sde_log_prob(flow, x, guidance=1.5)
    overtaking = flow_of(random_mixture(2, pi.Latent(pi.Linear(), pi.SineSquared(4.0))))
    with pytest.raises(ValueError, match="a score at all times of a density.*not determined, as"):
        sde_log_prob(overtaking, x)
    truth = random_mixture(2, pi.Mirror(pi.SineSquared(1.0)))
    rows = flow_of(truth, pi.Samples(torch.randn(10, 2)), LatentNoise(truth))
    with pytest.raises(ValueError, match="samples alone"):
        sde_log_prob(rows, x, paths=2, steps=2)
    with pytest.raises(ValueError, match="expected samples to start from"):
        sde_log_prob(flow_of(truth, noise=LatentNoise(truth)), x, paths=2, steps=2)
