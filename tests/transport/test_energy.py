import math

import pyro.distributions as dist
import pytest
import torch
from cases import random_flow
from gaussians import GaussianTransport
from oracles import MixtureVelocity
from torch import nn

import pyro_interpolant as pi


class Affine(nn.Module):
    """The velocity of a linear interpolant between two Gaussians, in data coordinates."""

    def __init__(self, pair, interpolant):
        super().__init__()
        self.pair, self.interpolant = pair, interpolant
        self.event_dim = len(pair.means[0])

    def forward(self, t, x, context=None):
        t = t.contiguous()
        a, b, _ = (c[..., None, None] for c in self.interpolant.coefficients(t))
        da, db, _ = (c[..., None, None] for c in self.interpolant.derivatives(t))
        s0, s1 = self.pair.covs
        m0, m1 = self.pair.means
        s, c = a**2 * s0 + b**2 * s1, a * da * s0 + b * db * s1
        centred = x - (a[..., 0] * m0 + b[..., 0] * m1)
        drift = da[..., 0] * m0 + db[..., 0] * m1
        return drift + (c @ torch.linalg.inv(s) @ centred[..., None])[..., 0]


def exact_flow(seed, dim, interpolant):
    pair = GaussianTransport(seed, dim)
    base = dist.MultivariateNormal(pair.means[0], pair.covs[0])
    flow = pi.InterpolantTransform(Affine(pair, interpolant), interpolant=interpolant)
    flow.solver = pi.FixedGrid(steps=30)
    return pair, pi.InterpolantDistribution(flow, base)


@pytest.mark.parametrize(
    ("interpolant", "dim"),
    [(pi.Linear(), 2), pytest.param(pi.Trigonometric(), 5, marks=pytest.mark.slow)],
)
def test_the_energy_is_the_closed_form(interpolant, dim):
    pair, distribution = exact_flow(0, dim, interpolant)
    energy = pi.path_energy(distribution, count=4000)
    assert energy.value == pytest.approx(pair.energy(interpolant), abs=5 * energy.stderr)
    assert 0 < energy.stderr < 0.05 * energy.value
    assert energy.value > pair.w2()


def test_the_energy_needs_more_steps_than_the_density():
    """From N(0, 1) to itself over a bridge, where a calibration stops at one step."""
    path = pi.Latent(pi.Linear(), pi.BrownianBridge())
    velocity = MixtureVelocity(torch.ones(1), torch.zeros(1, 1), torch.ones(1, 1, 1), path)
    transform = pi.InterpolantTransform(velocity, interpolant=path, solver=pi.FixedGrid(steps=1))
    energy = pi.path_energy(pi.InterpolantDistribution(transform), count=400)
    t = (torch.arange(20_000) + 0.5) / 20_000
    (a, b, g), (da, db, dg) = path.coefficients(t), path.derivatives(t)
    variance, half_rate = a**2 + b**2 + g**2, a * da + b * db + g * dg
    exact = float((half_rate**2 / variance).mean())
    assert energy.value == pytest.approx(exact, abs=4 * energy.stderr)


def test_energies_and_bounds_in_units_whose_squares_float32_does_not_hold():
    flow, x = pi.InterpolantDistribution(random_flow(2).float()), torch.randn(50, 2).float()
    transform, found = flow.transform, []
    for unit in (1.0, 1e-25, 1e25):
        transform.flow.whitening.set(torch.zeros(2), unit * torch.eye(2))
        torch.manual_seed(0)
        energy = pi.path_energy(flow, count=50).value
        found.append(torch.tensor([energy, pi.w2_bound(flow, unit * x).excess]) / unit**2)
    torch.testing.assert_close(found[1:], [found[0], found[0]], rtol=1e-4, atol=0.0)


def test_refusals():
    flow, context = pi.InterpolantDistribution(random_flow(2)), torch.randn(9, 3)
    family = pi.ConditionalInterpolantDistribution(random_flow(2, context_dim=3))
    with pytest.raises(ValueError, match="expected a context for a conditional flow"):
        pi.path_energy(family)
    with pytest.raises(ValueError, match="one for each of 7 paths, got a batch"):
        pi.path_energy(family, count=7, context=context)
    with pytest.raises(ValueError, match=r"got a batch of shape \(9, 1\)"):
        pi.path_energy(family, count=9, context=context[:, None])
    with pytest.raises(ValueError, match="expected no context"):
        pi.path_energy(flow, context=context)
    with pytest.raises(ValueError, match="count >= 2, a whole number"):
        pi.path_energy(flow, count=1)
    x = torch.randn(20, 2)
    with pytest.raises(ValueError, match=r"ends at the data, t = 1, got one stopped at t = 0\.5"):
        pi.w2_bound(flow.at(0.5), x)
    with pytest.raises(ValueError, match="expected a finite minimum, or None, got"):
        pi.w2_bound(flow, x, minimum=math.nan)
    base = dist.Normal(torch.zeros(3, 2), 1.0).to_event(1)
    for bound in (lambda d: pi.w2_bound(d, x), lambda d: pi.path_energy(d, count=3)):
        with pytest.raises(ValueError, match=r"one base for all rows.*batch shape \(3,\)"):
            bound(pi.InterpolantDistribution(flow.transform, base))


class Told(nn.Module):
    """A velocity of states and of what is given, one number."""

    event_dim, context_dim = 2, 1

    def __init__(self, rate):
        super().__init__()
        self.rate = rate

    def forward(self, t, x, context=None):
        return self.rate(x, context)


def told(rate):
    path = pi.ConditionalInterpolantTransform(Told(rate), interpolant=pi.Linear())
    return pi.ConditionalInterpolantDistribution(path)


def test_each_path_has_the_context_of_its_own():
    """Of more paths than are solved at once."""
    family = told(lambda x, c: c.expand_as(x))
    c = torch.linspace(0, 3, 700)[:, None]
    energy = pi.path_energy(family, count=700, context=c)
    assert energy.value == pytest.approx(2 * float(c.square().mean()))
    assert pi.path_energy(family, context=c[-1:]).value == pytest.approx(18.0)


def test_the_bound_takes_the_context_of_each_row():
    c = torch.linspace(0, 3, 50)[:, None]
    assert pi.w2_bound(told(lambda x, c: c * x), c + torch.randn(50, 2), context=c).lipschitz == 3
    # Rows at 2 c, of which c is learned: the excess is E|c - (x1 - x0)|^2 = E|c|^2 + E|x0|^2.
    c = c.repeat(40, 1)
    found = pi.w2_bound(told(lambda x, c: c.expand_as(x)), 2 * c.expand(-1, 2), context=c)
    assert found.excess == pytest.approx(2 * float(c.square().mean()) + 2, rel=0.1)


def test_the_bound_is_the_excess_times_the_growth():
    """A velocity off by a constant shift: H is the shift squared, and W2^2 is no more."""

    class Shifted(nn.Module):
        event_dim = 2

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, t, x, context=None):
            return self.inner(t, x) + 0.3

    pair, distribution = exact_flow(0, 2, pi.Trigonometric())
    flow = pi.InterpolantTransform(Shifted(distribution.transform.velocity))
    shifted = pi.InterpolantDistribution(flow, distribution.base)
    data = pair.sample(1, 40_000)
    minimum = -pair.energy(pi.Trigonometric())
    known = pi.w2_bound(shifted, data, minimum=minimum)
    none = pi.w2_bound(distribution, data, minimum=minimum)  # the same draws, no error
    assert known.exact
    assert known.excess - none.excess == pytest.approx(2 * 0.3**2, abs=0.06)
    assert abs(none.excess) < 0.05 * abs(minimum)
    assert known.bound == pytest.approx(math.exp(1 + 2 * known.lipschitz) * max(known.excess, 0.0))
    unknown = pi.w2_bound(shifted, data)
    assert not unknown.exact
    assert unknown.excess > known.excess
    assert pi.w2_bound(shifted, data[:500], seed=3) == pi.w2_bound(shifted, data[:500], seed=3)
    assert pi.w2_bound(shifted, data[:500], seed=3) != pi.w2_bound(shifted, data[:500], seed=4)


def test_the_error_of_the_excess_is_that_of_repetitions():
    """Of an exact velocity it is zero, and comes out negative as often as not."""
    pair, distribution = exact_flow(0, 2, pi.Trigonometric())
    minimum, found = -pair.energy(pi.Trigonometric()), []
    for seed in range(60):
        bound = pi.w2_bound(distribution, pair.sample(1, 300), minimum=minimum, seed=seed)
        found.append((bound.excess, bound.excess_stderr))
    excess, stated = torch.tensor(found).T
    assert 0.25 < float((excess < 0).double().mean()) < 0.75
    assert 0.7 < float(excess.square().mean().sqrt() / stated.square().mean().sqrt()) < 1.4
    assert "W2^2 at most 0 ± " in repr(bound._replace(bound=0.0))


def test_the_lipschitz_constant_is_the_spectral_norm_in_data_coordinates():
    matrix = torch.tensor([[1.0, 4.0], [0.0, -2.0]])

    class Field(nn.Module):
        event_dim = 2

        def forward(self, t, x, context=None):
            return x @ matrix.T

    flow = pi.InterpolantTransform(Field())
    linear = torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    flow.flow.whitening.set(torch.zeros(2), linear)
    bound = pi.w2_bound(pi.InterpolantDistribution(flow), torch.randn(50, 2))
    expected = torch.linalg.matrix_norm(linear @ matrix @ linear.inverse(), ord=2)
    assert bound.lipschitz == pytest.approx(float(expected))


class Heads(nn.Module):
    """Attention between the numbers of a row."""

    event_dim = 3

    def __init__(self):
        super().__init__()
        self.places, self.numbers = nn.Linear(1, 4), nn.Linear(4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, t, x):
        h = self.places(x[..., None])
        return self.numbers(self.attention(h, h, h, need_weights=False)[0])[..., 0]


def test_the_lipschitz_constant_of_attention_whose_kernel_has_no_forward_mode():
    torch.manual_seed(0)
    velocity, seen = Heads(), []
    flow = pi.InterpolantDistribution(pi.InterpolantTransform(velocity))
    velocity.register_forward_pre_hook(lambda _, given: seen.append(given))
    bound = pi.w2_bound(flow, torch.randn(5, 3))
    t, x = seen[0]
    rows = [torch.autograd.functional.jacobian(velocity, row) for row in zip(t, x, strict=True)]
    expected = torch.linalg.matrix_norm(torch.stack([part[1] for part in rows]), ord=2).max()
    assert bound.lipschitz == pytest.approx(float(expected))


def test_rows_of_the_same_seed_are_paired_with_other_base_draws():
    torch.manual_seed(0)
    x = torch.randn(4000, 2)  # what the default seed draws for the base
    flow = pi.InterpolantDistribution(pi.interpolant_transform(2, (8,), interpolant=pi.Linear()))
    # No velocity: the excess is the energy of the paths from base to data, E|x1 - x0|^2.
    assert pi.w2_bound(flow, x).excess == pytest.approx(4.0, rel=0.1)


def test_rows_may_come_in_order():
    """Their times do not: else far rows would be seen near one end of the path alone."""
    x = torch.tensor([0.0, 4.0]).repeat_interleave(2000)[:, None].expand(-1, 2)
    flow = pi.InterpolantDistribution(
        pi.interpolant_transform(2, (8,), interpolant=pi.Trigonometric())
    )
    # No velocity: (pi / 2)^2 E[sin^2(pi t / 2) |x0|^2 + cos^2(pi t / 2) |x1|^2].
    assert pi.w2_bound(flow, x).excess == pytest.approx((math.pi / 2) ** 2 * (1 + 8), rel=0.1)
