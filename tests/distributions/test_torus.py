import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, Predictive
from torch import nn
from torch.distributions import biject_to

import pyro_interpolant as pi
from pyro_interpolant.distributions.bases import Planar, directions, in_planes
from pyro_interpolant.interpolants.nonlinear import wrap

pytestmark = pytest.mark.usefixtures("_few_held_draws")

TURN = 2 * math.pi


def random_velocity(dim, hidden_dims=(16, 16), context_dim=0, kind=pi.TorusMLP):
    velocity = kind(dim, hidden_dims, context_dim)
    with torch.no_grad():
        velocity.output.weight.normal_(std=1.0)
        velocity.shifts.weight[-dim:].normal_(std=1.0)
        velocity.scales.weight.normal_(std=0.05)
    return velocity


def random_transform(dim, hidden_dims=(16, 16), context_dim=0, **choices):
    choices = {"interpolant": pi.Geodesic(), "solver": pi.FixedGrid(steps=24), **choices}
    kind = pi.ConditionalInterpolantTransform if context_dim else pi.InterpolantTransform
    return kind(random_velocity(dim, hidden_dims, context_dim), **choices)


def random_angles(dim, base=None, **choices):
    return pi.InterpolantDistribution(random_transform(dim, **choices), base, support=pi.circular)


def von_mises(dim):
    return dist.VonMises(torch.linspace(3.0, 4.5, dim), torch.full((dim,), 1.5)).to_event(1)


BASES = {"uniform": lambda dim: None, "von Mises": von_mises}


def grid(dim, count):
    """Equally spaced angles, shape (count ** dim, dim), and the volume each stands for."""
    line = TURN * torch.arange(count) / count - math.pi
    mesh = torch.meshgrid(*[line] * dim, indexing="ij")
    return torch.stack([m.reshape(-1) for m in mesh], -1), (TURN / count) ** dim


class Drift(nn.Module):
    """A velocity of closed form: ``a sin(x)``, whose flow from the uniform is wrapped Cauchy."""

    event_dim = 1

    def __init__(self, a=1.2):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, t, x, context=None):
        return self.a * x.sin()


class Straight(nn.Module):
    """A velocity that is not periodic."""

    event_dim = 2

    def forward(self, t, x, context=None):
        return 0.1 * x


# ---- angles -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrap_takes_whole_turns_off_and_has_slope_one(dtype):
    x = wrap((20 * torch.rand(5000) - 10).to(dtype))
    pi = torch.tensor(math.pi, dtype=dtype)
    near = [torch.nextafter(s * pi, s * e * pi) for s in (1, -1) for e in (0, 2)]
    edges = torch.stack([pi, -pi, *near, 3 * pi, -3 * pi, torch.zeros_like(pi)])
    for values in (x, edges):
        w = wrap(values)
        assert bool(((w >= -math.pi) & (w < math.pi)).all())
        torch.testing.assert_close(w.cos(), values.cos())
        torch.testing.assert_close(w.sin(), values.sin(), rtol=1e-5, atol=5e-6)
        assert torch.equal(wrap(w), w)
    assert torch.equal(wrap(x), x)
    assert float(wrap(pi)) == -float(pi)
    assert torch.equal(torch.func.grad(lambda x: wrap(x).sum())(x), torch.ones_like(x))
    assert torch.equal(torch.func.jvp(wrap, (x,), (x,))[1], x)


def test_the_geodesic_joins_its_ends_by_the_shorter_way():
    x0, x1 = TURN * torch.rand(2, 200, 3) - math.pi
    for t, end in ((0.0, x0), (1.0, x1)):
        x_t, dx_t = pi.Geodesic().sample(torch.tensor(t), x0, x1)
        torch.testing.assert_close(wrap(x_t - end), torch.zeros_like(x_t), rtol=0, atol=1e-14)
    assert bool(((x1 - x0).abs() > math.pi).any())  # some go through the seam
    shorter = torch.minimum((x1 - x0).abs(), TURN - (x1 - x0).abs())
    torch.testing.assert_close(dx_t.abs(), shorter)
    t = torch.rand(200)
    x_t, dx_t = pi.Geodesic().sample(t, x0, x1)
    turns = TURN * torch.randint(-2, 3, (2, 200, 3))
    there, same = pi.Geodesic().sample(t, x0 + turns[0], x1 + turns[1])
    torch.testing.assert_close(same, dx_t, rtol=0, atol=1e-13)
    torch.testing.assert_close(there, x_t + turns[0], rtol=0, atol=1e-13)


def test_the_slope_of_the_geodesic_is_that_of_its_schedule():
    interpolant = pi.Geodesic(lambda t: torch.sin(0.5 * math.pi * t) ** 2)
    interpolant.check_ends(2)
    x0, x1 = TURN * torch.rand(2, 8, 5, 2) - math.pi
    t = torch.linspace(0.1, 0.9, 8)[:, None]
    ahead, behind = (interpolant.sample(t + s, x0, x1)[0] for s in (1e-6, -1e-6))
    _, dx_t = interpolant.sample(t, x0, x1)
    torch.testing.assert_close(dx_t, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)


# ---- the velocity -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden_dims", "context_dim"),
    [((12,), 3), ((12, 10), 0), ((12, 12, 12), 3), ((12, 12, 8), 0)],
)
def test_the_divergence_is_the_trace_and_the_velocity_periodic(hidden_dims, context_dim):
    velocity = random_velocity(3, hidden_dims, context_dim)
    t, x = torch.rand(20), 10 * torch.randn(20, 3)
    context = torch.randn(20, context_dim)
    given = context if context_dim else None
    v, divergence = velocity.forward_and_divergence(t, x, given)

    def one(t, x, c):
        return velocity(t, x, c if context_dim else None)

    jacobian = torch.func.vmap(torch.func.jacrev(one, argnums=1))(t, x, context)
    torch.testing.assert_close(divergence, jacobian.diagonal(dim1=-2, dim2=-1).sum(-1))
    torch.testing.assert_close(v, velocity(t, x, given))
    assert bool((divergence.abs() > 1e-4).all())
    for shift in TURN * torch.eye(3):
        there = velocity.forward_and_divergence(t, x + shift, given)
        torch.testing.assert_close(there, (v, divergence), rtol=1e-12, atol=1e-12)
        assert not torch.allclose(velocity(t, x + 0.5 * shift, given), v)


# ---- the base -----------------------------------------------------------------------------------


def test_the_uniform_base():
    base = pi.UniformTorus(3)
    x = base.sample((4000,))
    assert bool(((x >= -math.pi) & (x < math.pi)).all())
    bound = 5 * (3 / 2 / 4000) ** 0.5  # of three means of cosines, five standard errors
    assert float(x.cos().mean(0).norm()) < bound
    assert float(x.sin().mean(0).norm()) < bound
    far = (20 * torch.randn(5, 3)).requires_grad_()
    torch.testing.assert_close(base.log_prob(far), torch.full((5,), -3 * math.log(TURN)))
    assert torch.equal(torch.autograd.grad(base.log_prob(far).sum(), far)[0], torch.zeros(5, 3))
    for value in (torch.zeros(2), torch.full((3,), torch.nan)):
        with pytest.raises(ValueError, match="value"):
            pi.UniformTorus(3, validate_args=True).log_prob(value)


def test_a_base_without_a_period_is_refused_and_changes_nothing():
    message = "a base with a density of period 2 pi in every angle, such as VonMises, or None"
    normal = dist.Normal(torch.zeros(2), 2.0).to_event(1)
    with pytest.raises(ValueError, match=message):
        random_angles(2, dist.Uniform(torch.full((2,), -math.pi), math.pi).to_event(1))
    with pytest.raises(ValueError, match=message):
        pi.ConditionalInterpolantDistribution(
            random_transform(2, (8,), 1), normal, support=pi.circular
        )
    model = random_angles(2, von_mises(2))
    kept = model.base
    for base in (normal, dist.Normal(torch.zeros(3, 2), 2.0).to_event(1)):
        with pytest.raises(ValueError, match=message):
            model.set_base(base)
    assert model.base is kept
    model.set_base(None)
    assert isinstance(model.base, pi.UniformTorus)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_a_planar_base_is_proper_and_points_as_the_base(base):
    base = pi.UniformTorus(1) if base(1) is None else base(1)
    planar = Planar(base)
    u, volume = grid(1, 100)
    r = torch.linspace(0, 9, 901)[1:]
    q = planar.log_prob(in_planes(u, r[:, None, None])).exp()
    # The area element is r dr du.
    angular = torch.trapezoid(q * r[:, None], r, dim=0)
    torch.testing.assert_close(angular, base.log_prob(u).exp(), rtol=1e-4, atol=0)
    assert float(angular.sum() * volume) == pytest.approx(1.0, abs=1e-4)
    draws = planar.sample((20_000,))
    assert planar.has_rsample == base.has_rsample
    assert draws.shape == (20_000, 2)
    assert float(draws.square().sum(-1).mean()) == pytest.approx(2.0, rel=0.03)
    cosine = (base.log_prob(u).exp() * u[:, 0].cos()).sum() * volume
    assert float(directions(draws).cos().mean()) == pytest.approx(float(cosine), abs=0.02)


# ---- the density --------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_the_density_is_periodic_and_has_no_seam(base):
    model = random_angles(2, base(2))
    lifted = pi.InterpolantDistribution(model.transform, model.base)  # takes any real angle
    x = TURN * torch.rand(20, 2) - math.pi
    for coordinate in (0, 1):
        turns = torch.tensor([[1.0], [-3.0]]) * TURN * torch.eye(2)[coordinate]
        there = lifted.log_prob(x + turns[:, None])
        here = lifted.log_prob(x).expand(2, 20)
        torch.testing.assert_close(there, here, rtol=1e-10, atol=1e-10)
        below, above = x.clone(), x.clone()
        below[:, coordinate] = math.pi - 1e-7
        above[:, coordinate] = -math.pi + 1e-7
        torch.testing.assert_close(model.log_prob(below), model.log_prob(above), rtol=0, atol=1e-5)
        torch.testing.assert_close(model.score(below), model.score(above), rtol=0, atol=1e-5)


def test_the_wrapped_cauchy_density_is_reached():
    model = pi.InterpolantDistribution(
        pi.InterpolantTransform(
            Drift(1.2), interpolant=pi.Geodesic(), solver=pi.FixedGrid(steps=64)
        ),
        support=pi.circular,
    )
    y = grid(1, 50)[0]
    for t in (0.0, 0.5, 1.0):
        a = torch.tensor(1.2 * t)
        exact = -(TURN * (a.cosh() + a.sinh() * y[:, 0].cos())).log()
        with torch.no_grad():
            torch.testing.assert_close(model.at(t).log_prob(y), exact, rtol=0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_samples_are_in_range_and_follow_the_density(base):
    model = random_angles(1, base(1))
    with torch.no_grad():
        x = model.sample((8000,))
        assert bool(((x >= -math.pi) & (x < math.pi)).all())
        probability = model.log_prob(grid(1, 320)[0]).exp().reshape(16, 20)
    # Trapezes on the closed bins.
    closed = torch.cat((probability, probability.roll(-1, 0)[:, :1]), 1)
    expected = 8000 * torch.trapezoid(closed, dx=TURN / 320)
    counts = torch.histc(x, 16, -math.pi, math.pi)
    chi_squared = float(((counts - expected) ** 2 / expected).sum())
    assert chi_squared < 44.3  # 15 degrees of freedom, one in ten thousand


def test_gradients_pass_through_the_seam():
    model = random_angles(2, von_mises(2))
    x0 = TURN * torch.rand(20, 2) - math.pi
    x0.requires_grad_()
    angles = x0
    for part in model.transforms:
        angles = part(angles)
    assert bool((angles != model.transform(x0)).any())
    own = torch.autograd.grad(angles.sum(), x0, retain_graph=True)[0]
    torch.testing.assert_close(own, torch.autograd.grad(model.transform(x0).sum(), x0)[0])


# ---- the support --------------------------------------------------------------------------------


def test_circular_refuses_what_is_out_of_range():
    model = random_angles(2)
    assert model.support is pi.circular
    assert pi.circular.event_dim == 1
    assert repr(pi.circular) == "circular"
    values = torch.tensor([[0.0, 3.0], [4.0, 0.0], [math.pi, -math.pi], [math.nan, 0.0]])
    assert pi.circular.check(values).tolist() == [True, False, True, False]
    assert bool(pi.circular.check(values[2].float()))
    with pytest.raises(ValueError, match="within the support"):
        model.log_prob(torch.tensor([4.0, 0.0]))
    with pytest.raises(ValueError, match="in radians, got 2 of 4 rows outside"):
        model.unconstrained(values)
    assert torch.equal(model.unconstrained(values[:1]), values[:1])


def test_circular_has_no_bijection():
    with pytest.raises(NotImplementedError, match=r"use base_space\(model\)"):
        biject_to(pi.circular)
    with pytest.raises(ValueError, match=r"x\[:, None\] of one angle each"):
        pi.from_samples(torch.zeros(30), support=pi.circular)


def test_only_flows_on_the_torus_have_the_support():
    scaled = random_transform(2)
    scaled.flow.whitening.set(torch.zeros(2), 2 * torch.eye(2))
    flat = pi.InterpolantTransform(pi.VelocityMLP(2), interpolant=pi.Geodesic())
    for transform, message in (
        (pi.InterpolantTransform(pi.TorusMLP(2)), r"Geodesic\(\) for angles, got Trigonometric"),
        (flat, "period 2 pi in every angle.*got VelocityMLP"),
        (scaled, "no whitening map for angles"),
    ):
        with pytest.raises(ValueError, match=message):
            pi.InterpolantDistribution(transform, support=pi.circular)


# ---- inference ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_nuts_in_base_space_finds_the_posterior_across_the_seam():
    torch.manual_seed(1)  # the posterior lies across the seam of the base, too
    prior = random_angles(2, solver=pi.FixedGrid(steps=2, method="euler")).freeze()
    seen = torch.tensor([3.0, -2.0])

    def model():
        with pyro.plate("copies", 16):  # independent: as many draws a step
            angles = pyro.sample("angles", prior)
            noise = dist.VonMises(angles, torch.tensor([6.0, 12.0])).to_event(1)
            pyro.sample("seen", noise, obs=seen.expand(16, 2))

    kernel = NUTS(pi.base_space(model), max_tree_depth=4)
    mcmc = MCMC(kernel, num_samples=50, warmup_steps=40, disable_progbar=True)
    mcmc.run()
    assert mcmc.get_samples()["angles_base"].shape == (50, 16, 4)
    draws = Predictive(pi.base_space(model), mcmc.get_samples())()["angles"].flatten(0, 1)
    with torch.no_grad():
        x = prior.transform(grid(2, 64)[0])  # of equal weight under the prior
        weight = dist.VonMises(x, torch.tensor([6.0, 12.0])).to_event(1).log_prob(seen).softmax(0)
        exact = weight @ x.cos(), weight @ x.sin()
    assert bool(pi.circular.check(draws).all())
    assert bool((draws[:, 0] > 2).any())
    assert bool((draws[:, 0] < -2).any())  # both sides of the seam
    torch.testing.assert_close(draws.cos().mean(0), exact[0], rtol=0, atol=0.08)
    torch.testing.assert_close(draws.sin().mean(0), exact[1], rtol=0, atol=0.08)


# ---- training -----------------------------------------------------------------------------------


def test_training_refuses_what_are_not_angles():
    angles = TURN * torch.rand(100, 2) - math.pi
    model = random_angles(2)
    with pytest.raises(ValueError, match="in radians, got 100 of 100 rows outside"):
        pi.fit(model, angles + 10, steps=1, progress=False)
    open_ended = pi.InterpolantDistribution(random_transform(2), pi.UniformTorus(2))
    with pytest.raises(ValueError, match="support=circular for the interpolant Geodesic"):
        pi.fit(open_ended, angles, steps=1, progress=False)
    straight = pi.InterpolantTransform(Straight(), interpolant=pi.Geodesic())
    model = pi.InterpolantDistribution(straight, support=pi.circular)
    with pytest.raises(ValueError, match="got Straight, which differs by .* whole turns away"):
        pi.fit(model, angles, steps=1, progress=False)


@pytest.mark.slow
def test_training_conditional_flows_keeps_the_scale_of_the_circle():
    flow = random_transform(2, context_dim=1)
    model = pi.ConditionalInterpolantDistribution(flow, support=pi.circular)
    context = torch.randn(300, 1)
    data = wrap(3 + 0.1 * torch.randn(300, 2) + context)
    pi.fit(model, data, context=context, steps=5, seed=0, progress=False, tolerance=0.1)
    assert torch.equal(flow.flow.whitening.linear, torch.eye(2))
    assert torch.equal(flow.flow.loc, torch.zeros(2))
    assert (flow.velocity.reach == math.inf).all()


def test_a_flow_on_the_torus_has_its_period_as_a_base():
    def torus(base=None):
        transform = pi.InterpolantTransform(pi.TorusMLP(1, (16, 16)), interpolant=pi.Geodesic())
        return pi.InterpolantDistribution(transform, base, support=pi.circular)

    first = torus()
    with torch.no_grad():
        first.transform.flow.velocity.output.weight.normal_(std=0.3)
    first.freeze()
    turned = torus(first)
    with torch.no_grad():
        turned.transform.flow.velocity.shifts.bias[-1] = 3.0  # turns by three radians
    turned.freeze()
    x = torch.tensor([[-2.0], [0.5], [3.0]])
    expected = first.log_prob(wrap(x - 3.0))
    for same in (turned, copy.deepcopy(turned)):
        assert torch.allclose(same.log_prob(x), expected, atol=1e-6)


@pytest.mark.slow
def test_a_trained_flow_has_the_density_and_no_seam():
    target = dist.VonMises(torch.tensor([math.pi, 1.0]), torch.tensor([2.0, 5.0])).to_event(1)
    rows = wrap(target.sample((10_000,)))
    network = pi.TorusMLP(2, (32, 32))
    options = {"steps": 300, "learning_rate": 1e-2, "batch_size": 512, "network": network}
    model = pi.from_samples(rows, support=pi.circular, seed=0, progress=False, **options)
    assert isinstance(model.base, pi.UniformTorus)
    test_rows = wrap(target.sample((2000,)))
    with torch.no_grad():
        gap = float((target.log_prob(test_rows) - model.log_prob(test_rows)).mean())
        assert -0.02 < gap < 0.05
        below, above = test_rows[:500].clone(), test_rows[:500].clone()
        below[:, 0], above[:, 0] = 3.14159, -3.14159  # the seam runs through the mode
        p, q = model.log_prob(below).exp(), model.log_prob(above).exp()
        assert float((p - q).abs().max()) < 1e-3
        counts = torch.histc(model.sample((20_000,))[:, 0], 120, -math.pi, math.pi)
    left, right = counts[-1], counts[0]  # the bins on the two sides, of one density
    assert float(left.minimum(right)) > 100
    assert float((left - right).abs() / (left + right).sqrt()) < 5
