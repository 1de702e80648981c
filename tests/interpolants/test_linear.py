import math

import pytest
import torch
from cases import INTERPOLANTS, LATENT, slow_but
from oracles import random_mixture
from torch.func import vmap

from pyro_interpolant import (
    Adaptive,
    BrownianBridge,
    EncodingDecoding,
    FixedGrid,
    Geodesic,
    InterpolantDistribution,
    InterpolantTransform,
    Latent,
    LearnedInterpolant,
    Linear,
    Mirror,
    NonlinearInterpolant,
    Trigonometric,
    VariancePreserving,
)
from pyro_interpolant import Interpolant as Base
from pyro_interpolant.interpolants import SineSquared


class Quadratic(Base):
    """A user's own member: no derivative is written."""

    def coefficients(self, t):
        return (1 - t) ** 2, t * (2 - t), torch.zeros_like(t)


class Noisy(Base):
    """A user's own member with a latent noise in between."""

    def coefficients(self, t):
        return 1 - t, t, 0.8 * torch.sin(math.pi * t) ** 2


MEMBERS = {
    **INTERPOLANTS,
    **LATENT,
    "variance-preserving": VariancePreserving(lambda t: t * t * (3 - 2 * t)),
    "quadratic": Quadratic(),
    "noisy": Noisy(),
}
WITHOUT = [name for name in MEMBERS if not MEMBERS[name].has_latent()]


@pytest.mark.parametrize("name", MEMBERS)
def test_a_path_ends_in_its_pair_and_has_the_derivatives_of_finite_differences(name):
    path = MEMBERS[name]
    for t, expected in ((0.0, (1.0, 0.0, 0.0)), (1.0, (0.0, 1.0, 0.0))):
        values = torch.stack(path.coefficients(torch.tensor(t)))
        torch.testing.assert_close(values, torch.tensor(expected), rtol=0, atol=1e-15)
    x0, x1 = torch.randn(5, 3), torch.randn(5, 3)
    for t, x in ((0.0, x0), (1.0, x1)):
        sampled = path.sample(torch.tensor(t), x0, x1)[0]
        torch.testing.assert_close(sampled, x, rtol=0, atol=1e-14)
    t, h = torch.linspace(0.05, 0.95, 20), 1e-5
    ahead, behind = (path.coefficients(t + s) for s in (h, -h))
    slopes = path.derivatives(t)
    for d, a, b in zip(slopes, ahead, behind, strict=True):
        assert d.shape == t.shape
        torch.testing.assert_close(d, (a - b) / (2 * h), rtol=0, atol=1e-8)
    with torch.inference_mode():  # which drops the tangents of forward mode without a word
        for inside in (t, torch.empty(20).copy_(t)):
            for one, other in zip(path.derivatives(inside), slopes, strict=True):
                assert torch.equal(one, other)
    expanded = torch.tensor(0.3).expand(4)
    for d, e in zip(path.derivatives(expanded), path.derivatives(expanded[0]), strict=True):
        torch.testing.assert_close(d, e.expand(4))
    for times, rows in [((), ()), ((), (5,)), ((5,), (5,)), ((4, 1), (4, 5))]:
        for dtype in (torch.float32, torch.float64):
            x0, x1 = torch.randn(2, *rows, 3, dtype=dtype)
            x_t, dx_t = path.sample(torch.rand(times, dtype=dtype), x0, x1)
            assert x_t.shape == dx_t.shape == (*rows, 3)
            assert x_t.dtype == dx_t.dtype == dtype


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_a_path_and_its_derivative(name):
    x0, x1, t = torch.randn(6, 2), torch.randn(6, 2), torch.rand(6)
    x_t, dx_t = INTERPOLANTS[name].sample(t, x0, x1)
    a, b, _ = INTERPOLANTS[name].coefficients(t)
    torch.testing.assert_close(x_t, a[:, None] * x0 + b[:, None] * x1)
    h = 1e-6
    ahead, behind = (INTERPOLANTS[name].sample(t + s, x0, x1)[0] for s in (h, -h))
    torch.testing.assert_close(dx_t, (ahead - behind) / (2 * h), rtol=0, atol=1e-8)


def test_the_latent_term_draws_one_noise_for_path_and_derivative():
    t, zero, z = torch.tensor(0.3), torch.zeros(50_000, 1), torch.randn(50_000, 1)
    (_, _, g), (_, _, dg) = Noisy().coefficients(t), Noisy().derivatives(t)
    x_t, dx_t = Noisy().sample(t, zero, zero)
    assert float(x_t.std()) == pytest.approx(float(g), rel=0.02)
    torch.testing.assert_close(dx_t, x_t * dg / g)
    assert not torch.equal(Noisy().sample(t, zero, zero)[0], x_t)
    x_t, dx_t = Noisy().sample(t, zero, zero, z)  # noise that is given is used in both
    torch.testing.assert_close(x_t, g * z)
    torch.testing.assert_close(dx_t, dg * z)


def test_a_latent_term_may_vanish_in_the_middle():
    path = Latent(Linear(), lambda t: t * (1 - t) * (1 - 2 * t).square())
    assert path.has_latent()
    x0, x1 = torch.zeros(2, 9, 2)
    assert path.sample(torch.tensor(0.25), x0, x1)[0].abs().min() > 0


def test_without_a_latent_term_nothing_is_drawn():
    state, x = torch.get_rng_state(), torch.ones(4, 2)
    for name in WITHOUT:
        MEMBERS[name].sample(torch.linspace(0, 1, 4), x, x)
        assert torch.equal(state, torch.get_rng_state()), name


def test_members_state_coefficients_and_compare_by_value():
    with pytest.raises(TypeError, match="coefficients"):
        Base()
    assert type(INTERPOLANTS["linear"])() == INTERPOLANTS["linear"]
    assert INTERPOLANTS["linear"] != INTERPOLANTS["trigonometric"]


@pytest.mark.parametrize("name", ["trigonometric", "encoding-decoding", "noisy"])
def test_the_oracle_is_a_mixture_at_every_time(name):
    """The oracle itself: continuity equation, score, and moments by draws of the path."""
    velocity = random_mixture(2, MEMBERS[name])
    x, t, h = torch.randn(6, 2), torch.full((6,), 0.4), 1e-5
    rate = (velocity.log_prob(t + h, x) - velocity.log_prob(t - h, x)) / (2 * h)
    jacobian = vmap(torch.func.jacfwd(velocity, argnums=1))(t, x)
    divergence = jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
    flux = divergence + (velocity(t, x) * velocity.score(t, x)).sum(-1)
    torch.testing.assert_close(rate, -flux, rtol=0, atol=1e-7)
    leaf = x.clone().requires_grad_()
    gradient = torch.autograd.grad(velocity.log_prob(t, leaf).sum(), leaf)[0]
    torch.testing.assert_close(gradient, velocity.score(t, x))
    x1 = velocity.sample(1.0, 40_000)
    drawn = MEMBERS[name].sample(torch.tensor(0.4), torch.randn_like(x1), x1)[0]
    mean, cov = velocity.moments(0.4)
    torch.testing.assert_close(drawn.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(drawn.T.cov(), cov, rtol=0.05, atol=0.05)


SOLVED = [  # members, dimensions and times
    ("trigonometric", 2, 1.0),
    ("trigonometric", 5, 0.5),
    ("linear", 1, 0.75),
    ("linear", 2, 0.0),
    ("encoding-decoding", 2, 1.0),
    ("linear, bridge", 2, 1.0),
    ("linear, smooth", 2, 0.75),
    ("trigonometric, smooth", 2, 1.0),
    ("variance-preserving", 2, 1.0),
    ("quadratic", 2, 0.75),
    ("noisy", 2, 1.0),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dim", "t"), SOLVED)
def test_log_prob_is_the_closed_form_at_every_time(name, dim, t):
    velocity = random_mixture(dim, MEMBERS[name])
    steps = 400 if name == "encoding-decoding" else 140  # coefficients with a kink at 1/2
    flow = InterpolantTransform(velocity, interpolant=MEMBERS[name], solver=FixedGrid(steps))
    x = torch.cat((velocity.sample(t, 12), 2 * torch.randn(4, dim)))
    value = InterpolantDistribution(flow).at(t).log_prob(x)
    truth = velocity.log_prob(torch.tensor(t), x)
    torch.testing.assert_close(value[:12], truth[:12], rtol=0, atol=1e-6)
    torch.testing.assert_close(value, truth, rtol=2e-6, atol=1e-6)


@pytest.mark.slow
def test_the_closed_form_holds_in_data_coordinates():
    velocity = random_mixture(2, MEMBERS["linear"])
    flow = InterpolantTransform(velocity, solver=FixedGrid(steps=160))
    loc, linear = torch.tensor([100.0, -3.0]), torch.tensor([[4.0, 0.0], [1.0, 1e-3]])
    flow.flow.whitening.set(loc, linear)
    distribution = InterpolantDistribution(flow)
    for t in (0.5, 1.0):
        w = velocity.sample(t, 10)
        truth = velocity.log_prob(torch.tensor(t), w) - linear.det().log()
        value = distribution.at(t).log_prob(loc + w @ linear.T)
        torch.testing.assert_close(value, truth, rtol=0, atol=1e-6)
        score = distribution.at(t).score(loc + w @ linear.T)
        expected = velocity.score(torch.tensor(t), w) @ linear.inverse()
        torch.testing.assert_close(score, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "t"), [("noisy", 1.0), pytest.param("encoding-decoding", 0.5, marks=pytest.mark.slow)]
)
def test_samples_have_the_moments_of_the_closed_form(name, t):
    velocity = random_mixture(2, MEMBERS[name])
    flow = InterpolantTransform(velocity, solver=FixedGrid(steps=16))
    x = InterpolantDistribution(flow).at(t).sample((4000,))
    mean, cov = velocity.moments(t)
    error = 5 * (cov.diagonal() / 4000).sqrt()
    assert ((x.mean(0) - mean).abs() < error).all()
    torch.testing.assert_close(x.T.cov(), cov, rtol=0.08, atol=0.08)


# ---- latent terms and ends ----------------------------------------------------------------------


STEEP = {  # roots, with infinite slopes at their ends were they not made straight there
    "bridge": Latent(Linear(), BrownianBridge(1.0)),
    "wide bridge": Latent(Linear(), BrownianBridge(4.0)),
    "variance-preserving": VariancePreserving(lambda t: t),
    "variance-preserving, square": VariancePreserving(lambda t: t**2),
}


def test_a_bridge_is_brownian_but_for_its_ends():
    gamma, t = BrownianBridge(0.7), torch.linspace(0, 1, 11)
    torch.testing.assert_close(gamma(t) ** 2, 0.7 * t * (1 - t), rtol=0, atol=1e-3)
    near = torch.tensor([1e-6, 1 - 1e-6])
    torch.testing.assert_close(
        gamma(near), 1e-6 * (0.7 / 1e-3) ** 0.5 * torch.ones(2), rtol=2e-3, atol=0
    )


def test_a_root_that_is_straight_at_an_end_remains_what_it_is():
    t = torch.linspace(0, 1, 101)
    torch.testing.assert_close(VariancePreserving(torch.square).coefficients(t)[1], t)
    like = VariancePreserving(lambda t: torch.sin(math.pi * t / 2) ** 2)
    for one, other in zip(like.coefficients(t), Trigonometric().coefficients(t), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-3)


@pytest.mark.parametrize("name", STEEP)
def test_the_rate_of_a_steep_path_is_its_slope_up_to_the_ends(name):
    t = torch.tensor([0.0, 1e-9, 1e-4, 1e-3, 1 - 1e-3, 1 - 1e-4, 1 - 1e-9, 1.0])
    interpolant, h = STEEP[name], 1e-7
    ahead, behind = ((t + s).clamp(0, 1) for s in (h, -h))
    pairs = zip(interpolant.coefficients(ahead), interpolant.coefficients(behind), strict=True)
    for slope, (a, b) in zip(interpolant.derivatives(t), pairs, strict=True):
        torch.testing.assert_close(slope, (a - b) / (ahead - behind), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", slow_but(STEEP, "bridge", "variance-preserving"))
def test_the_exact_velocity_of_a_steep_path_leads_to_narrow_data(name):
    """The velocity by the path's own coefficients and rates, which are what the loss sees."""
    interpolant, deviation = STEEP[name], 0.02

    class Narrow(torch.nn.Module):
        event_dim = 1

        def forward(self, t, x, context=None):
            t = t.clamp(0, 1)[..., None]  # an adaptive solver looks beyond the ends
            (a, b, g), (da, db, dg) = interpolant.coefficients(t), interpolant.derivatives(t)
            variance = deviation**2
            return (a * da + g * dg + b * db * variance) / (a * a + g * g + b * b * variance) * x

    solver = Adaptive(rtol=1e-6, atol=1e-8, nodes=2)
    flow = InterpolantTransform(Narrow(), interpolant=interpolant, solver=solver)
    found = flow(torch.ones(1, 1)).item()  # of a linear map
    assert found == pytest.approx(deviation, rel=0.01)


def test_a_path_with_an_infinite_slope_at_an_end_is_refused():
    def root(t):
        return (t * (1 - t)).sqrt()

    with pytest.raises(ValueError, match=r"finite slopes at t = 0 and t = 1, got .*inf.* Latent"):
        Latent(Linear(), root).check_ends(2)
    for interpolant in STEEP.values():
        interpolant.check_ends(2)


def test_encoding_and_decoding_meet_in_pure_noise():
    middle = torch.stack(EncodingDecoding().coefficients(torch.tensor(0.5)))
    torch.testing.assert_close(middle, torch.tensor([0.0, 0.0, 1.0]))
    for t, absent in ((0.2, 1), (0.8, 0)):
        assert EncodingDecoding().coefficients(torch.tensor(t))[absent] == 0


def test_a_mirror_starts_and_ends_at_the_data():
    x1, t = torch.randn(5, 2), torch.tensor([0.0, 1.0])
    for end in t:
        torch.testing.assert_close(Mirror().sample(end, torch.randn(5, 2), x1)[0], x1)
    Mirror().check_ends(2)
    assert Mirror().has_latent()


def test_a_non_linear_path_has_the_slope_of_finite_differences():
    def bow(t, x0, x1):
        return (1 - t) * x0 + t * x1 + t * (1 - t) * (x1 * x0).sin()

    interpolant, h = NonlinearInterpolant(bow), 1e-6
    for times, shape in [((), (5, 3)), ((5,), (5, 3)), ((4, 1), (4, 5, 3))]:
        t, x0, x1 = 0.1 + 0.8 * torch.rand(times), torch.randn(shape), torch.randn(shape)
        x_t, dx_t = interpolant.sample(t, x0, x1)
        assert x_t.shape == dx_t.shape == shape
        ahead, behind = (interpolant.sample(t + s, x0, x1)[0] for s in (h, -h))
        torch.testing.assert_close(dx_t, (ahead - behind) / (2 * h), rtol=0, atol=1e-8)
    interpolant.check_ends(3)
    with pytest.raises(TypeError, match="NonlinearInterpolant is not linear"):
        interpolant.coefficients(t)


def moved_centres():
    learned = LearnedInterpolant(2, event_dim=1)
    learned.centres[1] = 5.0
    return learned


REFUSED = {
    "without a latent term.* got Latent": lambda: Latent(Latent(Linear()), BrownianBridge()),
    "without a latent term.* got Enc": lambda: Latent(EncodingDecoding(), BrownianBridge()),
    "that is its coefficients.*Learned": lambda: Latent(moved_centres(), BrownianBridge()),
    "that is its coefficients.*Geodesic": lambda: Latent(Geodesic(), BrownianBridge()),
    "expected scale > 0, got 0.0": lambda: BrownianBridge(0.0),
    "expected scale > 0, got -1.0": lambda: SineSquared(-1.0),
    "expected gamma to be a function": lambda: Latent(Linear(), BrownianBridge),
    "expected schedule to be a function": lambda: VariancePreserving(0.5),
    "expected a path to be a function": lambda: NonlinearInterpolant(None),
    r"such as Linear\(\), got <class": lambda: Latent(Linear),
}


@pytest.mark.parametrize("message", REFUSED)
def test_paths_that_cannot_work_are_refused(message):
    with pytest.raises((ValueError, TypeError), match=message):
        REFUSED[message]()
