import math
from types import SimpleNamespace

import pyro.distributions as dist
import pytest
import torch
from cases import gaussian_prior, slow_but
from pyro.distributions import constraints
from torch.utils._python_dispatch import _get_current_dispatch_mode

from pyro_interpolant import (
    Adaptive,
    ConditionalInterpolantDistribution,
    FixedGrid,
    InterpolantDistribution,
    Latent,
    Mirror,
    SineSquared,
    Trigonometric,
    conditional_interpolant_transform,
    fit,
    interpolant_transform,
)
from pyro_interpolant._torch import seeded
from pyro_interpolant.diagnostics.psis import (
    K_HAT_LIMIT,
    WeightedDraws,
    systematic_resampling,
    weighted_draws,
)
from pyro_interpolant.infer.regression import FlowRegression, RateSchedule
from pyro_interpolant.infer.smc import train
from pyro_interpolant.infer.smc.pathfinder import (
    StudentTMixture,
    _derivatives,
    initial_mixture,
    pathfinder,
)
from pyro_interpolant.infer.smc.tempering import HMCKernel, LogDensity, tempered_smc
from pyro_interpolant.infer.smc.train import (
    RoundsResult,
    coarse_solver,
    flow_proposal_step,
    train_from_density,
)
from pyro_interpolant.training.clock import Clock
from pyro_interpolant.training.rows import Rows


def gaussian(loc, scale_tril):
    """Return a Gaussian distribution of rows."""
    return dist.MultivariateNormal(torch.as_tensor(loc), scale_tril=torch.as_tensor(scale_tril))


def slanted():
    return gaussian([3.0, -1.0], [[0.5, 0.0], [0.9, 0.2]])


def modes(dim, count=4):
    """Return a mixture of well separated Gaussians of unequal weights, and its weights."""
    means = torch.zeros(count, dim)
    means[:, :2] = 4.0 * torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]])[:count]
    weights = torch.arange(1.0, count + 1) / (count * (count + 1) / 2)
    parts = dist.Normal(means, 0.7).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(weights), parts), means, weights


def funnel(x):
    v = x[:, 0]
    rest = -0.5 * (x[:, 1:].square() * (-v).exp()[:, None] + v[:, None]).sum(-1)
    return rest - v.square() / 18


def wide(dim, scale=4.0):
    return StudentTMixture(torch.ones(1), torch.zeros(1, dim), scale * torch.eye(dim)[None])


def tiny(dim=2):
    return InterpolantDistribution(interpolant_transform(dim, (32, 32)))


def quick(distribution, density, **options):
    settings = {"steps": 60, "rounds": 2, "draws": 1000, "seed": 0, "progress": False}
    return train_from_density(distribution, density, **{**settings, **options})


@pytest.mark.usefixtures("_small_runs")
@pytest.mark.slow
def test_what_was_learned_of_other_rows_is_forgotten():
    flow = InterpolantDistribution(
        interpolant_transform(2, (8,), interpolant=Latent(Trigonometric(), SineSquared()))
    )
    options = {"steps": 5, "seed": 0, "progress": False, "tolerance": 1.0}
    x = 5 + torch.randn(100, 2)
    fit(flow, x, **options)
    fit(flow, x, learn="noise", **options)
    flow.transform.requires_grad_()
    quick(flow, slanted().log_prob, steps=10, draws=100)
    assert flow.transform.flow.noise is None
    assert flow.report is None


# ---- a density ------------------------------------------------------------------------------


def test_a_density_gives_values_and_gradients_in_chunks():
    target, x = slanted(), torch.randn(300, 2)
    density = LogDensity(target.log_prob)
    density.rows = 7
    _, value, gradient = density.particles(x)
    leaf = x.clone().requires_grad_()
    expected = target.log_prob(leaf)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])
    torch.testing.assert_close(density(x), expected.detach())


def test_rows_are_evaluated_in_blocks_by_what_each_computes():
    rows = []
    for width in (1, 10_000, 10**6):
        density = LogDensity(lambda x, width=width: -x.expand(-1, width).square().sum(-1))
        density.check(torch.randn(64, 1))
        rows.append(density.rows)
    assert rows[0] == 4096
    assert 32 < rows[1] < 256
    assert rows[2] == 32


def test_a_density_may_take_derivatives_by_torch_func():
    def log_density(x):  # -|z|^2 / 2, by the gradient of |z|^2 / 2
        slope = torch.func.vmap(torch.func.grad(lambda z: 0.5 * z.square().sum()))(x)
        return -0.5 * slope.square().sum(-1)

    density, x = LogDensity(log_density), torch.randn(64, 2)
    density.check(x)
    torch.testing.assert_close(density(x), -0.5 * x.square().sum(-1))
    torch.testing.assert_close(density.particles(x).gradient, -x)


def test_gradients_are_not_looked_at_for_random_numbers():
    """Each operation would take some microseconds more, in a seeded scope: twice the time."""
    watched = []

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            watched.append(_get_current_dispatch_mode())
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            watched.append(_get_current_dispatch_mode())
            return gradient.clone()

    def log_prob(x):
        return slanted().log_prob(Identity.apply(x))

    with seeded(0):
        assert _get_current_dispatch_mode() is not None
        LogDensity(log_prob).particles(torch.randn(5, 2))
        _derivatives(LogDensity(log_prob), torch.randn(5, 2))
    assert len(watched) >= 6
    assert not any(watched)


def test_what_is_not_finite_counts_as_no_density():
    density = LogDensity(lambda x: x[:, 0].log())
    _, value, gradient = density.particles(torch.tensor([[2.0], [-1.0], [0.0]]))
    assert value.tolist() == [math.log(2.0), -math.inf, -math.inf]
    assert gradient.tolist() == [[0.5], [0.0], [0.0]]
    assert float(LogDensity(lambda x: x[:, 0] / 0)(torch.ones(1, 1))) == -math.inf


def test_a_density_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"shape \(5,\) for rows of shape \(5, 2\), got \(5, 2\)"):
        LogDensity(lambda x: x)(torch.randn(5, 2))


# ---- moves ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_moves_leave_the_density_as_it_is():
    x = torch.randn(3000, 2)
    x[:, 1] = x[:, 1] * 0.3 + x[:, 0] ** 2  # a banana

    def banana(x):
        return dist.Normal(0.0, 1.0).log_prob(x[:, 0]) + dist.Normal(x[:, 0] ** 2, 0.3).log_prob(
            x[:, 1]
        )

    density, kernel = LogDensity(banana), HMCKernel()
    particles = density.particles(x)
    kernel.adapt_metric(x)
    for _ in range(25):
        particles, rate = kernel(particles, density.particles)
    assert 0.5 < rate < 0.9
    y = particles.x
    assert float((y != x).all(-1).double().mean()) > 0.85
    torch.testing.assert_close(particles.log_p, banana(y))
    assert float(y[:, 0].mean()) == pytest.approx(0.0, abs=0.08)
    assert float(y[:, 0].std()) == pytest.approx(1.0, abs=0.06)
    noise = y[:, 1] - y[:, 0] ** 2
    assert float(noise.std()) == pytest.approx(0.3, abs=0.02)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.02)


@pytest.mark.slow
def test_moves_find_the_density_from_elsewhere():
    target, kernel = slanted(), HMCKernel()
    density = LogDensity(target.log_prob)
    particles = density.particles(target.mean + 2 * torch.randn(2000, 2))
    for _ in range(60):
        kernel.adapt_metric(particles.x)
        particles, _ = kernel(particles, density.particles)
    torch.testing.assert_close(particles.x.mean(0), target.mean, rtol=0, atol=0.08)
    torch.testing.assert_close(particles.x.T.cov(), target.covariance_matrix, rtol=0.15, atol=0.02)


def test_systematic_draws_come_as_often_as_their_weight_says():
    weights = torch.tensor([0.05, 0.0, 0.5, 0.449, 0.001])
    counts = torch.bincount(systematic_resampling(weights.log(), 1000), minlength=5)
    assert bool(((counts - 1000 * weights).abs() <= 1).all())
    assert int(counts[1]) == 0


def test_tempering_carries_a_wide_start_to_a_narrow_target():
    target = gaussian([3.0, -1.0], [[0.05, 0.0], [0.1, 0.02]])
    density = LogDensity(lambda x: target.log_prob(x) - 7.0)
    q = wide(2)
    start = LogDensity(q.log_prob)
    found = list(tempered_smc(q.sample(2000), start, density, HMCKernel()))
    levels, (_, particles, evidence) = [level.exponent for level in found], found[-1]
    assert levels == sorted(levels)
    assert levels[-1] == 1.0
    assert len(levels) > 3
    assert evidence == pytest.approx(-7.0, abs=0.25)
    z = torch.linalg.solve_triangular(
        target.scale_tril, (particles.x - target.mean).T, upper=False
    )
    torch.testing.assert_close(z.mean(1), torch.zeros(2), rtol=0, atol=0.12)
    torch.testing.assert_close(z.std(1), torch.ones(2), rtol=0, atol=0.1)


def test_tempering_weighs_the_way_to_the_target_once():
    """Without moves: those would mend particles that are weighed too often."""

    class Still(HMCKernel):
        def __call__(self, particles, density):
            return particles, 1.0

    start, target = dist.Normal(torch.zeros(1), 8.0).to_event(1), gaussian([0.0], [[1.0]])
    q, p = (LogDensity(d.log_prob) for d in (start, target))
    levels = list(tempered_smc(start.sample((8000,)), q, p, Still()))
    assert len(levels) > 3
    assert float(levels[-1].particles.x.std()) == pytest.approx(1.0, abs=0.1)


def test_tempering_begins_at_its_start_and_stops_without_a_density():
    q, density = wide(2), LogDensity(lambda x: x.sum(-1) - math.inf)
    start = LogDensity(q.log_prob)
    (level,) = tempered_smc(q.sample(500), start, density, HMCKernel())
    assert level.exponent == level.log_evidence == 0.0
    assert level.particles.x.shape == (500, 2)


# ---- search ---------------------------------------------------------------------------------


def test_a_mixture_has_the_density_the_gradient_and_the_draws_of_student_ts():
    root = torch.stack((torch.tensor([[0.3, 1.0], [-0.5, 0.2]]), 0.5 * torch.eye(2)))
    loc, share = torch.tensor([[0.0, 1.0], [4.0, -2.0]]), torch.tensor([0.3, 0.7])
    mixture = StudentTMixture(share, loc, root)
    parts = dist.MultivariateStudentT(
        torch.tensor(5.0), loc, torch.linalg.cholesky(root @ root.mT)
    )
    x = mixture.sample(4000)
    leaf = x[:50].clone().requires_grad_()
    expected = (parts.log_prob(leaf[:, None]) + share.log()).logsumexp(-1)
    _, value, gradient = LogDensity(mixture.log_prob).particles(x[:50])
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(mixture.log_prob(x[:50]), value)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])
    second = x[:, 0] > 2
    assert float(second.double().mean()) == pytest.approx(0.7, abs=0.03)
    torch.testing.assert_close(x[second].median(0).values, loc[1], rtol=0, atol=0.06)


@pytest.mark.slow
def test_the_search_finds_a_far_narrow_slanted_target():
    target = gaussian([30.0, -0.5], [[1e-3, 0.0], [5e-3, 1e-4]])
    found = pathfinder(LogDensity(target.log_prob), wide(2), Clock(None))
    assert len(found.loc) == 2  # and the wide start
    torch.testing.assert_close(found.loc[0], target.mean, rtol=0, atol=1e-6)
    shape = found.root[0] @ found.root[0].T
    torch.testing.assert_close(shape, 1.3**2 * target.covariance_matrix, rtol=1e-3, atol=0)
    assert float(found.log_share.exp().sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("dim", slow_but([2, 8], 2))
def test_the_search_finds_four_modes(dim):
    target, means, _ = modes(dim)
    found = pathfinder(LogDensity(target.log_prob), wide(dim), Clock(None))
    away = torch.cdist(means, found.loc).min(1).values
    assert float(away.max()) < 1.0


@pytest.mark.slow
def test_the_search_does_not_end_at_a_mode_without_mass():
    found = pathfinder(LogDensity(funnel), wide(10), Clock(None))  # whose mode is at v = -40
    assert float(found.loc[:, 0].min()) > -25


def test_many_dimensions_start_wide_alone():
    start, density = wide(70), LogDensity(lambda x: -x.square().sum(-1))
    assert pathfinder(density, start, Clock(None)) is start


def test_without_a_density_to_climb_the_start_is_what_is_left():
    start = wide(2)
    x = torch.full((1,), -math.inf)
    found = pathfinder(LogDensity(lambda s: x + 0 * s.sum(-1)), start, Clock(None))
    assert found is start


@pytest.mark.slow
def test_a_density_without_second_derivatives_is_searched_all_the_same():
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return -0.5 * x.square().sum(-1)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, g):
            return -g[:, None] * ctx.saved_tensors[0]

    found = pathfinder(LogDensity(Once.apply), wide(2), Clock(None))
    assert float(found.log_prob(torch.zeros(1, 2))) > -6


def test_starts_of_every_kind():
    like = torch.zeros(2)
    default = initial_mixture(None, like)
    torch.testing.assert_close(default.root, 4 * torch.eye(2)[None])
    centre = initial_mixture(torch.tensor([1.0, 2.0]), like)
    torch.testing.assert_close(centre.loc, torch.tensor([[1.0, 2.0]]))
    whole = initial_mixture(torch.tensor([[1, 5], [2, 1]]), like)
    torch.testing.assert_close(whole.loc, torch.tensor([[1.5, 3.0]]))
    prior = dist.Normal(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.1])).to_event(1)
    for start in (prior, prior.sample((2000,))):
        given = initial_mixture(start, like)
        torch.testing.assert_close(given.loc, torch.tensor([[1.0, 2.0]]), rtol=0, atol=0.3)
        torch.testing.assert_close(
            given.root[0].diagonal(), 1.3 * torch.tensor([3.0, 0.1]), rtol=0.1, atol=0
        )


@pytest.mark.parametrize(
    ("start", "error", "message"),
    [
        ("prior", TypeError, "start to be a tensor or a distribution, got str"),
        (torch.zeros(5, 3), ValueError, r"shape \(M, 2\) or \(2,\), got \(5, 3\)"),
        (torch.zeros(3), ValueError, r"shape \(M, 2\) or \(2,\), got \(3,\)"),
        (torch.full((2,), math.nan), ValueError, "a finite start, got NaN"),
        (torch.ones(5, 2), ValueError, "vary in every column"),
        (dist.Normal(0.0, 1.0), ValueError, r"event shape \(2,\) and no batch, got \(\) and \(\)"),
    ],
)
def test_starts_that_do_not_fit_are_refused(start, error, message):
    with pytest.raises(error, match=message):
        initial_mixture(start, torch.zeros(2))


# ---- jumps and refits -------------------------------------------------------------------------


@pytest.mark.slow
def test_jumps_leave_the_density_as_it_is_and_measure_the_divergence():
    flow = gaussian_prior(torch.tensor([2.5, -1.0]), torch.tensor([[0.8, 0.0], [0.9, 0.5]]))
    target, x = slanted(), slanted().sample((6000,))
    density = LogDensity(lambda x: target.log_prob(x) + 4.0)
    particles = density.particles(x)
    for _ in range(8):
        jump = flow_proposal_step(flow, particles, density)
        particles = jump.particles
    y = particles.x
    assert float((y != x).all(-1).double().mean()) > 0.8
    torch.testing.assert_close(particles.log_p, target.log_prob(y) + 4.0)
    torch.testing.assert_close(y.mean(0), target.mean, rtol=0, atol=0.06)
    torch.testing.assert_close(y.T.cov(), target.covariance_matrix, rtol=0.1, atol=0.01)
    q = gaussian(flow.transform.flow.loc, flow.transform.flow.whitening.matrix())
    kl = torch.distributions.kl_divergence(target, q)
    assert jump.gap == pytest.approx(float(kl) + 4.0, abs=0.1)
    evidence = float(jump.log_weights.logsumexp(0)) - math.log(len(jump.log_weights))
    assert evidence == pytest.approx(4.0, abs=0.1)
    assert 0.05 < jump.acceptance < 0.95


def test_weights_of_a_flow_that_is_the_target_are_equal():
    flow = gaussian_prior(torch.tensor([2.5, -1.0]), torch.tensor([[0.8, 0.0], [0.9, 0.5]]))
    q = gaussian(flow.transform.flow.loc, flow.transform.flow.whitening.matrix())
    solver = flow.transform.solver
    w = weighted_draws(flow, lambda x: q.log_prob(x) + 1.5, 2500).log_weights
    torch.testing.assert_close(w, torch.full((2500,), 1.5))
    assert flow.transform.solver == solver


def test_the_solver_of_a_round_is_as_coarse_as_the_flow_allows():
    flow = gaussian_prior(torch.zeros(2), torch.eye(2))
    coarse_solver(flow, torch.randn(100, 2))
    assert flow.transform.solver.steps == 6
    with torch.no_grad():
        flow.transform.velocity.output.weight.normal_(std=3.0)
    coarse_solver(flow, torch.randn(100, 2))
    assert flow.transform.solver.steps > 6
    flow.transform.solver = Adaptive()
    coarse_solver(flow, torch.randn(100, 2))
    assert flow.transform.solver == Adaptive()


@pytest.mark.slow
def test_a_refit_learns_and_keeps_the_latest_rows():
    flow = InterpolantDistribution(interpolant_transform(2, (32, 32)))
    rows = torch.where(torch.rand(1000, 1) < 0.5, 1.0, -1.0) + 0.2 * torch.randn(1000, 2)
    refit = FlowRegression(flow, [Rows(rows, None)])
    first = float(flow.log_prob(rows).detach().mean())
    refit(200, lambda step: 5e-3)
    assert float(flow.log_prob(rows).detach().mean()) > first + 0.1
    assert refit.descent.steps == 200
    for i in range(30):
        refit.add(Rows(torch.full((1, 2), float(i)), None))
    assert [float(pool.w[0, 0]) for pool in refit.pools] == list(range(20, 30))


def test_few_rows_are_not_gone_through_more_than_20_times_in_a_round(monkeypatch):
    taken, regress = [], FlowRegression.__call__

    def counted(self, steps, rate):
        before = self.descent.steps
        regress(self, steps, rate)
        taken.append((sum(len(pool.w) for pool in self.pools), self.descent.steps - before))

    monkeypatch.setattr(FlowRegression, "__call__", counted)
    quick(tiny(), slanted().log_prob, draws=300, steps=800, rounds=3)
    assert len(taken) == 3
    for rows, steps in taken:
        assert steps == 20 * rows // 512 > 10


def test_weights_that_a_refit_returned_stay_as_it_goes_on():
    flow = InterpolantDistribution(interpolant_transform(2, (4,)))
    refit = FlowRegression(flow, [Rows(1 + torch.randn(50, 2), None)])
    kept = refit.values()
    before = [value.clone() for value in kept]
    refit(3, lambda step: 0.1)
    assert all(map(torch.equal, kept, before))
    assert not all(map(torch.equal, refit.values(), before))


def test_a_refit_whose_gradients_stay_wild_says_so():
    flow = InterpolantDistribution(interpolant_transform(2, (8, 8)))
    refit = FlowRegression(flow, [Rows(torch.full((10, 2), math.inf), None)])
    with pytest.raises(RuntimeError, match="gradient was not finite"):
        refit(100, lambda step: 1e-3)


def test_the_rate_is_constant_then_falls_to_zero_and_lands_early_from_where_it_is():
    schedule = RateSchedule(end=100, peak=3e-3)
    rates = [schedule.rate(done) for done in (0, 39, 70, 100, 190)]
    assert rates[0] == rates[1] == 3e-3 > rates[2] > rates[3] == rates[4] == 0.0
    assert rates[2] == pytest.approx(rates[0] / 2)
    landed = schedule.landed(20)
    assert landed.landing
    assert landed.end == 30
    assert landed.rate(20) == pytest.approx(rates[0])
    assert landed.rate(30) == 0.0
    assert schedule.landed(90).end == 100


# ---- the whole ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_gaussian_is_learned_from_its_density_alone(monkeypatch):
    monkeypatch.setattr("pyro_interpolant.infer.smc.train._MIXING_MOVES", 10)
    target, flow = slanted(), tiny()
    result = quick(flow, lambda x: target.log_prob(x) - 11.0, draws=2000, steps=100)
    assert isinstance(result, RoundsResult)
    assert result.k_hat < K_HAT_LIMIT
    assert result.ess > 0.9 * result.draws
    assert result.log_evidence == pytest.approx(-11.0, abs=0.02)
    assert 0 < result.log_evidence_stderr < 0.01
    assert len(result.rounds) == 2
    assert 0 <= result.best_round < 2
    assert result.rounds[-1].seconds < result.seconds
    assert flow.transform.solver == result.solver
    x = flow.sample((4000,))
    torch.testing.assert_close(x.mean(0), target.mean, rtol=0, atol=0.06)
    torch.testing.assert_close(x.T.cov(), target.covariance_matrix, rtol=0.15, atol=0.01)
    torch.testing.assert_close(result.particles.mean(0), target.mean, rtol=0, atol=0.12)


@pytest.mark.slow
def test_four_modes_are_found_and_weighed():
    target, means, weights = modes(2)
    flow = InterpolantDistribution(interpolant_transform(2, (48, 48)))
    result = quick(flow, target.log_prob, steps=150, rounds=3, draws=2000)
    assert result.log_evidence == pytest.approx(0.0, abs=0.05)
    which = torch.cdist(flow.sample((4000,)), means).argmin(1)
    shares = torch.bincount(which, minlength=4) / 4000
    torch.testing.assert_close(shares, weights, rtol=0, atol=0.05)


@pytest.mark.parametrize("better", [True, False])
def test_the_flow_that_is_kept_is_the_one_that_was_judged(better, monkeypatch):
    """The best round's, if its draws are more effective than those of the last one."""
    used, equal = [], torch.full((200,), 2.0)
    unequal = torch.linspace(-3.0, 3.0, 200)
    weights = {"best": equal, "last": unequal} if better else {"best": unequal, "last": equal}
    monkeypatch.setattr(train, "_VERDICT_DRAWS", 200)
    monkeypatch.setattr(train, "calibrated", lambda *_, **__: SimpleNamespace(solver="s"))
    run = SimpleNamespace(
        regression=SimpleNamespace(values=lambda: "last", use=used.append),
        particles=SimpleNamespace(x=torch.zeros(200, 1)),
        distribution=None,
        history=[None] * 3,
        best_round=0,
        best_weights="best",
        clock=Clock(None),
        done=lambda: 1.0,
        _weighed=lambda: WeightedDraws(run.particles.x, weights[used[-1]], 0.0, 0.0),
    )
    result = train.Rounds.verdict(run, interrupted=False)
    assert used[-1] == ("best" if better else "last")
    assert result.best_round == (0 if better else 2)
    assert (result.ess, result.log_evidence) == pytest.approx((200.0, 2.0))


@pytest.mark.slow
def test_a_flat_run_lands_before_its_last_round():
    result = quick(tiny(), slanted().log_prob, rounds=100, steps=10, draws=200)
    assert 10 <= len(result.rounds) < 100
    assert result.stopped_by == "rounds"


@pytest.mark.usefixtures("_small_runs")
@pytest.mark.slow
def test_no_gradient_goes_through_a_solve_and_nothing_but_weights_changes(monkeypatch):
    solves, solve = [], FixedGrid.solve

    def watched(self, field, x, times):
        solves.append(torch.is_grad_enabled() or x.requires_grad)
        return solve(self, field, x, times)

    monkeypatch.setattr(FixedGrid, "solve", watched)
    flow = tiny().freeze()
    state = torch.get_rng_state()
    before = flow.transform.velocity.output.weight.clone()
    quick(flow, modes(2)[0].log_prob, steps=10, draws=100)
    assert solves
    assert not any(solves)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(flow.transform.velocity.output.weight, before)
    assert not any(p.requires_grad for p in flow.transform.parameters())


@pytest.mark.slow
def test_the_type_of_the_flow_is_that_of_the_rows():
    seen, flow = set(), tiny().to(torch.float32)

    def density(x):
        seen.add(x.dtype)
        return -0.5 * x.square().sum(-1)

    result = quick(flow, density)
    assert seen == {torch.float32}
    assert result.log_evidence == pytest.approx(math.log(2 * math.pi), abs=0.02)


@pytest.mark.slow
def test_a_start_far_away_is_used():
    target = gaussian([1e4, 0.0], [[0.5, 0.0], [0.0, 0.5]])
    hidden = lambda x: torch.where((x[:, 0] > 9e3), target.log_prob(x), -torch.inf)  # noqa: E731
    result = quick(tiny(), hidden, start=torch.tensor([1e4, 0.0]))
    assert result.log_evidence == pytest.approx(0.0, abs=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seconds": 0.0}, "max_seconds > 0, got 0.0"),
        ({"draws": 150.5}, "draws >= 100, a whole number, got 150.5"),
        ({"steps": 1.5}, "steps >= 1, a whole number, got 1.5"),
        ({"draws": 99}, "draws >= 100, a whole number, got 99"),
        ({"steps": 0}, "steps >= 1, a whole number, got 0"),
        ({"rounds": 0}, "rounds >= 1, a whole number, got 0"),
        ({"start": torch.zeros(3)}, r"a start of shape \(M, 2\)"),
    ],
)
def test_settings_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        quick(tiny(), slanted().log_prob, **options)


def test_tempering_ends_with_the_time_and_says_how_far_it_came(monkeypatch):
    target, rows = dist.Normal(torch.full((20,), 10.0), 1e-3).to_event(1), []

    def far(x):
        rows.append(len(x))
        return target.log_prob(x)

    monkeypatch.setattr(train, "pathfinder", lambda density, start, clock: start)
    late = Clock(1.0)
    late.began -= 100.0
    with (
        torch.no_grad(),
        pytest.warns(UserWarning, match="1 s, was too short .* they are .* of the way"),
    ):
        found, kernel, _ = train._find_particles(
            LogDensity(far), wide(20), 100, late, lambda *_: None
        )
    assert found.x.shape == (100, 20)
    assert sum(rows) == 100  # the start alone


@pytest.mark.usefixtures("_small_runs")
def test_few_particles_are_more_than_there_are_dimensions():
    density = LogDensity(gaussian(torch.zeros(80), torch.eye(80)).log_prob)
    with torch.no_grad():
        found, *_ = train._find_particles(density, wide(80), 100, Clock(None), lambda *_: None)
    assert float(found.x.var(0).mean()) == pytest.approx(1.0, abs=0.1)


def test_an_interrupt_keeps_what_was_learned(monkeypatch):
    flow, kept = tiny(), {}

    def interrupted(run, steps):
        kept["run"] = run
        if not run.history:
            plain(run, steps)
            return True
        run.regression(10, lambda step: 1e-3)
        raise KeyboardInterrupt

    plain = train.Rounds.round
    monkeypatch.setattr(train.Rounds, "round", interrupted)
    monkeypatch.setattr(train, "_VERDICT_DRAWS", 200)
    with pytest.warns(UserWarning, match="interrupted: the best weights so far are kept"):
        result = quick(flow, slanted().log_prob, steps=10, draws=100)
    assert len(result.rounds) == 1
    assert result.draws > 0
    assert not any(p.requires_grad for p in flow.transform.parameters())
    assert result.solver == flow.transform.solver
    assert result.stopped_by == "interrupt"
    weights, regression = list(flow.transform.velocity.parameters()), kept["run"].regression
    choices = (regression.values(), kept["run"].best_weights)
    assert any(all(map(torch.equal, weights, choice)) for choice in choices)  # averages


def test_an_interrupt_before_a_round_is_done_is_passed_on(monkeypatch):
    def interrupted(run, jump):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Rounds, "_moved", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quick(tiny(), slanted().log_prob, steps=10, draws=100)


@pytest.mark.parametrize(
    ("density", "message"),
    [
        (lambda x: x, r"log densities of shape \(32,\)"),
        (lambda x: x.detach().sum(-1), "that can be differentiated"),
        (lambda x: x.sum(-1) - math.inf, "finite somewhere, got none of 256 draws"),
    ],
)
def test_densities_that_cannot_work_are_refused(density, message):
    with pytest.raises(ValueError, match=message):
        quick(tiny(), density)


def test_flows_that_cannot_be_trained_this_way_are_refused():
    transform = interpolant_transform(2, (8, 8))
    for flow in (
        InterpolantDistribution(transform, support=constraints.positive),
        InterpolantDistribution(transform, dist.Normal(torch.zeros(2), 1.0).to_event(1)),
        InterpolantDistribution(transform).expand([3]),
        InterpolantDistribution(interpolant_transform(2, (8, 8), interpolant=Mirror())),
    ):
        with pytest.raises(ValueError, match="on real vectors from its default base, which"):
            quick(flow, slanted().log_prob)
    conditional = ConditionalInterpolantDistribution(conditional_interpolant_transform(2, 1))
    with pytest.raises(TypeError, match="an InterpolantDistribution, got Conditional"):
        quick(conditional, slanted().log_prob)
