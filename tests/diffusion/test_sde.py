from typing import NamedTuple

import pyro.distributions as dist
import pytest
import torch
import torchsde
from cases import random_flow
from oracles import (
    LatentNoise,
    MixtureVelocity,
    PairVelocity,
    discrepancy,
    energy_distance,
    energy_floor,
    random_mixture,
)
from pyro.distributions import constraints

import pyro_interpolant as pi
from pyro_interpolant.diffusion import sde_log_prob
from pyro_interpolant.diffusion.conversions import path_times
from pyro_interpolant.diffusion.sde import path_ends

LOC = torch.tensor([3.0, -1.0], dtype=torch.float64)
LINEAR = torch.tensor([[2.0, 0.0], [0.7, 0.8]], dtype=torch.float64)
COUNT = 1200


def flow_of(velocity, base=None, noise=None, **kwargs):
    transform = pi.InterpolantTransform(
        velocity, interpolant=velocity.interpolant, solver=pi.FixedGrid(24)
    )
    transform.flow.whitening.set(LOC.to(transform.flow.loc), LINEAR.to(transform.flow.loc))
    transform.flow.noise = noise
    return pi.InterpolantDistribution(transform, base, **kwargs)


class Exact(NamedTuple):
    """The law of an exact velocity at time t, in whitened coordinates."""

    truth: MixtureVelocity | PairVelocity
    t: float

    def __call__(self, count):
        return LOC + self.truth.sample(self.t, count) @ LINEAR.T

    def features(self, y):
        """Means, spreads and the log-density, which sees what is too wide or too narrow."""
        w = (y - LOC) @ torch.linalg.inv(LINEAR).T
        log_prob = self.truth.log_prob(torch.tensor(self.t), w)
        return torch.stack((*w.T, *w.square().T, w.prod(-1), log_prob), -1)


FLOORS = {}


def floor(law):
    key = type(law.truth), law.truth.interpolant, law.t
    if key not in FLOORS:
        with torch.random.fork_rng():
            torch.manual_seed(5)
            FLOORS[key] = energy_floor(law, COUNT)
    return FLOORS[key]


def has_law(samples, law):
    """Whether samples are as near to exact ones as exact ones are to one another."""
    near = energy_distance(samples, law(COUNT)) < floor(law)
    return near and discrepancy(law.features(samples), law.features(law(20_000))) < 4.5


@pytest.mark.parametrize(
    ("diffusion", "forward"),
    [
        (None, True),
        (lambda t: 0.4, False),
        pytest.param(lambda t: torch.sin(torch.pi * t) ** 2, True, marks=pytest.mark.slow),
    ],
    ids=["default", "constant", "sine"],
)
def test_paths_have_the_marginals_of_the_flow(diffusion, forward):
    """By our steps to one end, and by those of torchsde half way."""
    truth = random_mixture(2, pi.Trigonometric())
    flow = flow_of(truth)
    start, end = (0.0, 1.0) if forward else (1.0, 0.0)
    x = None if forward else Exact(truth, start)(COUNT)
    y = pi.sample_sde(flow, (COUNT,) if forward else (), diffusion=diffusion, steps=40, x=x)
    assert has_law(y, Exact(truth, end))
    sde = pi.InterpolantSDE(flow, diffusion, forward=forward)
    half = torchsde.sdeint(
        sde, Exact(truth, start)(COUNT), torch.tensor([0.0, 0.5]), dt=1 / 40, method="srk"
    )
    assert has_law(half[-1], Exact(truth, 0.5))


INTERPOLANTS = {
    "variance-preserving": pi.VariancePreserving(lambda t: t**2 * (3 - 2 * t)),
    "encoding-decoding": pi.EncodingDecoding(),
    "overtaking": pi.Latent(pi.Linear(), pi.SineSquared(4.0)),  # its score is lost at two times
}


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERPOLANTS)
def test_the_default_diffusion_serves_every_interpolant(name):
    truth = random_mixture(2, INTERPOLANTS[name])
    flow = flow_of(truth)
    assert has_law(pi.sample_sde(flow, (COUNT,), steps=50), Exact(truth, 1.0))
    assert has_law(pi.sample_sde(flow, x=Exact(truth, 1.0)(COUNT), steps=50), Exact(truth, 0.0))


def narrow(interpolant):
    """A flow whose data are 0.03 wide, exactly."""
    variance = 0.03**2 * torch.eye(1)[None]
    truth = MixtureVelocity(torch.ones(1), torch.zeros(1, 1), variance, interpolant)
    return pi.InterpolantDistribution(pi.InterpolantTransform(truth, interpolant=interpolant))


@pytest.mark.parametrize(
    ("interpolant", "steps"),
    [
        (pi.Trigonometric(), 50),
        pytest.param(pi.VariancePreserving(lambda t: t), 200, marks=pytest.mark.slow),
        pytest.param(pi.Latent(pi.Linear(), pi.BrownianBridge(4.0)), 200, marks=pytest.mark.slow),
    ],
    ids=["trigonometric", "preserving", "wide bridge"],
)
def test_narrow_data_keep_their_width(interpolant, steps):
    deviation = pi.sample_sde(narrow(interpolant), (10_000,), steps=steps).std().item()
    assert deviation == pytest.approx(0.03, rel=0.03)


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
def test_narrow_data_keep_their_width_at_either_end_of_a_mirror(forward):
    sde = pi.InterpolantSDE(narrow(pi.Mirror(pi.BrownianBridge(1.0))), forward=forward)
    deviation = path_ends(sde, 0.03 * torch.randn(4000, 1), path_times(100)).std().item()
    assert deviation == pytest.approx(0.03, rel=0.1)


@pytest.mark.slow
def test_noise_that_no_score_makes_up_for_is_seen():
    truth = random_mixture(2, pi.Trigonometric())
    flow = flow_of(truth)
    wrong = pi.InterpolantSDE(flow, lambda t: 0.2)
    wrong.g = pi.InterpolantSDE(flow, lambda t: 0.3).g
    y = Exact(truth, 0.0)(COUNT)
    end = torchsde.sdeint(wrong, y, torch.tensor([0.0, 1.0]), dt=1 / 40, method="srk")[-1]
    assert not has_law(end, Exact(truth, 1.0))


def test_drift_and_diffusion_are_those_of_the_equation_in_data_coordinates():
    truth = random_mixture(2, pi.Linear())
    flow = flow_of(truth)
    y = LOC + torch.randn(7, 2) @ LINEAR.T
    w = flow.transform.flow.whitening.to_white(y)
    for t in (0.2, 0.7):
        time = torch.full((7,), t)
        v, s, e = truth(time, w), truth.score(time, w), 0.3 + t
        forward = pi.InterpolantSDE(flow, lambda t: 0.3 + t)
        assert torch.allclose(forward.f(torch.tensor(t), y), (v + e * s) @ LINEAR.T)
        assert torch.allclose(forward.g(t, y), ((2 * e) ** 0.5 * LINEAR).expand(7, 2, 2))
        backward = pi.InterpolantSDE(flow, lambda t: 0.3 + t, forward=False)
        assert torch.allclose(backward.f(torch.tensor(1 - t), y), (e * s - v) @ LINEAR.T)
        assert torch.allclose(backward.g(1 - t, y), forward.g(t, y))
    assert (forward.noise_type, forward.sde_type) == ("additive", "ito")


def test_the_default_diffusion():
    t = torch.tensor([0.1, 0.5, 0.9])
    for interpolant, expected in (
        (pi.Linear(), 1 - t),
        (pi.Trigonometric(), torch.pi / 2 * torch.cos(torch.pi * t / 2)),
        (
            pi.Mirror(pi.SineSquared(1.0)),
            (torch.pi * torch.sin(torch.pi * t) ** 3 * 2 * torch.cos(torch.pi * t)).abs(),
        ),
    ):
        sde = pi.InterpolantSDE(flow_of(random_mixture(2, interpolant)))
        assert torch.allclose(sde.terms(t).rate, expected)


@pytest.mark.slow
def test_a_mirror_diffuses_the_data_and_back():
    truth = random_mixture(2, pi.Mirror(pi.SineSquared(1.0)))
    draw = Exact(truth, 1.0)
    flow = flow_of(truth, pi.Samples(draw(20_000)))
    for t in (0.5, 1.0):
        assert has_law(pi.sample_sde(flow.at(t), (COUNT,), steps=50), Exact(truth, t))
    by_noise = flow_of(truth, pi.Samples(draw(20_000)), LatentNoise(truth))
    y = pi.sample_sde(by_noise, (COUNT,), diffusion=lambda t: 0.5, steps=50)
    assert has_law(y, draw)


@pytest.mark.slow
def test_with_a_learned_noise_any_base_will_do():
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.8]])
    mixture = random_mixture(2, pi.Latent(pi.Linear(), pi.BrownianBridge(0.5)))
    truth = PairVelocity(torch.tensor([0.4, -1.0]), cov, mixture)
    base = dist.MultivariateNormal(LOC + LINEAR @ truth.loc, LINEAR @ cov @ LINEAR.T)
    flow, data = flow_of(truth, base, LatentNoise(truth)), Exact(truth, 1.0)
    forward = pi.sample_sde(flow, (COUNT,), diffusion=lambda t: 4 * t * (1 - t), steps=50)
    assert has_law(forward, data)
    back = pi.sample_sde(flow, x=data(COUNT), diffusion=lambda t: 0.2, steps=50)
    assert has_law(back, Exact(truth, 0.0))


def test_shapes():
    flow = pi.InterpolantDistribution(random_flow(3))
    x = flow.sample((6,))
    assert pi.sample_sde(flow, steps=2).shape == (3,)
    assert pi.sample_sde(flow, (4, 5), steps=2).shape == (4, 5, 3)
    assert pi.sample_sde(flow, (7,), x=x, steps=2).shape == (7, 6, 3)
    assert pi.sample_sde(flow, x=x[:0], steps=2).shape == (0, 3)
    assert pi.sample_sde(flow.expand((4,)), (2,), steps=2).shape == (2, 4, 3)
    assert pi.sample_sde(flow.at(0.0), (2,), steps=2).shape == (2, 3)
    assert not pi.sample_sde(flow, (2,), steps=2).requires_grad


def test_a_conditional_flow_follows_its_context():
    likelihood = pi.ConditionalInterpolantDistribution(random_flow(2, context_dim=3))
    c = torch.randn(5, 3)
    given = likelihood.condition(c)
    assert pi.sample_sde(given, (4,), steps=2).shape == (4, 5, 2)
    x = given.sample()
    assert pi.sample_sde(given, (4,), x=x, steps=2).shape == (4, 5, 2)
    sde, one = pi.InterpolantSDE(given), pi.InterpolantSDE(likelihood.condition(c[2]))
    t = torch.tensor(0.3)
    assert torch.allclose(sde.f(t, x)[2], one.f(t, x[2:3])[0])
    ys = torchsde.sdeint(sde, x, torch.tensor([0.0, 1.0]), dt=0.5)
    assert ys.shape == (2, 5, 2)


def test_without_diffusion_it_is_the_flow_and_back():
    flow = flow_of(random_mixture(2, pi.Trigonometric()))
    x = flow.sample((20,))
    base = pi.sample_sde(flow, x=x, diffusion=lambda t: 0.0, steps=200)
    w = flow.transform.inv(x)
    assert torch.allclose(base, flow.transform.flow.whitening.from_white(w), atol=1e-3)


def test_samples_are_on_the_support():
    flow = flow_of(random_mixture(2, pi.Linear()), support=constraints.positive)
    y = pi.sample_sde(flow, (50,), steps=10)
    assert bool((y > 0).all())
    back = pi.sample_sde(flow, x=y, steps=10)
    assert bool((back > 0).all())
    with pytest.raises(ValueError, match="strictly inside the support"):
        pi.sample_sde(flow, x=-y, steps=10)


def test_rows_of_a_frame_are_taken_by_name():
    pd = pytest.importorskip("pandas")
    flow = pi.InterpolantDistribution(random_flow(2), support=constraints.positive)
    flow.columns, x = ("a", "b"), torch.rand(3, 2)
    frame = pd.DataFrame(x.flip(-1).numpy(), columns=["b", "a"])
    found = []
    for rows in (x, frame):
        torch.manual_seed(0)
        value, _ = sde_log_prob(flow, rows, paths=2, steps=2)
        found.append((pi.sample_sde(flow, x=rows, steps=2), value))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.slow
def test_the_order_of_a_step():
    truth = MixtureVelocity(
        torch.ones(1), torch.zeros(1, 1), torch.full((1, 1, 1), 4.0), pi.Linear()
    )
    flow = pi.InterpolantDistribution(pi.InterpolantTransform(truth, interpolant=pi.Linear()))

    def error(method, steps):
        times = torch.linspace(0.0, 1.0, steps + 1)
        with torch.no_grad():
            ends = path_ends(pi.InterpolantSDE(flow), torch.randn(200_000, 1), times, method)
        return abs(float(ends.var()) - 4)

    noise = 4 * (2 / 200_000) ** 0.5  # 0.013
    euler, heun = ([error(m, steps) for steps in (4, 8)] for m in ("euler", "heun"))
    assert 1.4 < euler[0] / euler[1] < 2.6
    assert heun[0] < euler[0] / 8
    assert heun[1] < heun[0] / 4 + 3 * noise


def test_refusals():
    flow = pi.InterpolantDistribution(pi.interpolant_transform(2, (8, 8)))
    with pytest.raises(ValueError, match="steps >= 1, a whole number, got 0"):
        pi.sample_sde(flow, steps=0)
    with pytest.raises(ValueError, match="'heun' or 'euler', got 'milstein'"):
        pi.sample_sde(flow, method="milstein")
    with pytest.raises(TypeError, match="function of times, got 0.5: pass lambda t: 0.5"):
        pi.sample_sde(flow, (3,), diffusion=0.5)
    with pytest.raises(ValueError, match="at least 0, got -0.499 to 0.499"):
        pi.InterpolantSDE(flow, lambda t: t - 0.5)
    with pytest.raises(ValueError, match="finite and at least 0"):
        pi.InterpolantSDE(flow, lambda t: t.log().log())
    laplace = dist.Laplace(torch.zeros(2), torch.ones(2)).to_event(1)
    with pytest.raises(ValueError, match="expected the default base"):
        pi.InterpolantSDE(pi.InterpolantDistribution(flow.transform, laplace))
    likelihood = pi.ConditionalInterpolantDistribution(random_flow(2, context_dim=3))
    with pytest.raises(TypeError, match=r"\.condition\(context\)"):
        pi.sample_sde(likelihood)
    mirror = flow_of(random_mixture(2, pi.Mirror(pi.SineSquared(1.0))))
    with pytest.raises(ValueError, match="expected samples to start from: the base of Mirror"):
        pi.sample_sde(mirror, (5,))
    with pytest.raises(ValueError, match=r"not determined, as near t = 0\.5.*learn='noise'"):
        pi.InterpolantSDE(mirror, lambda t: 0.1)


def test_samples_of_a_base_with_a_batch_have_it_once():
    loc = 100 * torch.arange(3.0)[:, None].expand(3, 2)
    transform = pi.interpolant_transform(2, (8,), interpolant=pi.Latent())
    transform.flow.noise = transform.velocity
    flow = pi.InterpolantDistribution(transform, dist.Normal(loc, 1.0).to_event(1))
    x = pi.sample_sde(flow.expand((4, 3)), (5,), steps=1, diffusion=lambda t: 0.0)
    assert x.shape == (5, 4, 3, 2)
    assert ((x - loc).abs() < 20).all()
