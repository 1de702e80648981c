import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from kinds import KINDS

import pyro_interpolant as pi
from pyro_interpolant.diagnostics.psis import (
    K_HAT_LIMIT,
    change_of_mean,
    effective_sample_size,
    log_total,
    pareto_smooth,
    recompute_largest,
    solver_error_of_mean,
    summarise_weights,
    weighted_draws,
)


def pareto(k, count):
    """Return ascending quantiles of a generalised Pareto distribution."""
    p = (torch.arange(count) + 0.5) / count
    return torch.expm1(-k * torch.log1p(-p)) / k


@pytest.mark.parametrize("k", [0.2, 0.8])
def test_k_hat_is_the_index_of_the_tail(k):
    x = torch.distributions.Exponential(1.0).sample((40_000,))
    assert pareto_smooth(k * x).k_hat == pytest.approx(k, abs=0.12)


def test_k_hat_of_a_proposal_with_light_tails_is_large():
    wide, narrow = torch.distributions.Exponential(0.1), torch.distributions.Exponential(1.0)
    x, y = narrow.sample((4000,)), wide.sample((4000,))
    assert pareto_smooth(wide.log_prob(x) - narrow.log_prob(x)).k_hat > 0.5  # 0.9 in the limit
    assert pareto_smooth(narrow.log_prob(y) - wide.log_prob(y)).k_hat < 0.3  # bounded


def test_only_the_tail_changes_and_keeps_its_order():
    raw = torch.randn(1000) * 2
    smoothed = pareto_smooth(raw).log_weights
    assert float(smoothed.logsumexp(0)) == pytest.approx(0.0, abs=1e-12)
    order = raw.argsort()
    assert bool((smoothed[order].diff() >= -1e-12).all())
    shift = smoothed - raw
    body = order[: 1000 - math.ceil(3 * math.sqrt(1000))]
    torch.testing.assert_close(shift[body], shift[body[:1]].expand(len(body)))
    assert float((shift[order[-90:]] - shift[body[0]]).abs().max()) > 1e-3
    assert float(smoothed.max() - shift[body[0]]) <= float(raw.max()) + 1e-12


def test_smoothing_leaves_a_tail_of_pareto_as_it_is():
    tail = 1 + pareto(0.4, 135)  # as many as are the tail of 2,000 weights
    raw = torch.cat((torch.rand(1864), torch.ones(1), tail)).log()
    change = pareto_smooth(raw).log_weights - raw
    assert float((change - change[0]).abs().max()) < 0.1


def test_weights_without_a_tail_to_judge():
    raw = torch.cat((torch.randn(200), torch.full((50,), -math.inf)))
    smoothed = pareto_smooth(raw)
    assert bool((smoothed.log_weights[200:] == -math.inf).all())
    assert math.isfinite(smoothed.k_hat)
    flat = pareto_smooth(torch.zeros(100))
    assert flat.k_hat == -math.inf
    torch.testing.assert_close(flat.log_weights, torch.full((100,), -math.log(100)))
    short = pareto_smooth(torch.randn(10).float())
    assert short.k_hat == math.inf
    assert short.log_weights.dtype == torch.float32
    assert float(short.log_weights.logsumexp(0)) == pytest.approx(0.0, abs=1e-6)
    one = torch.full((500,), -math.inf)
    one[7] = 0.0
    assert pareto_smooth(one).k_hat > 0.7


def test_weights_may_be_an_array_or_whole_numbers():
    weights, whole = torch.randn(200), torch.arange(40) % 7
    assert torch.equal(pareto_smooth(weights.numpy())[0], pareto_smooth(weights)[0])
    assert torch.equal(pareto_smooth(whole)[0], pareto_smooth(whole.double())[0])
    assert effective_sample_size(weights.tolist()) == effective_sample_size(weights)


def test_the_effective_sample_size_in_closed_form():
    assert effective_sample_size(torch.full((40,), 700.0)) == pytest.approx(40)
    assert effective_sample_size(torch.tensor([0.0, math.log(3.0)])) == pytest.approx(1.6)
    assert effective_sample_size(torch.tensor([0.0, -math.inf])) == pytest.approx(1.0)


def test_the_largest_weights_are_computed_again_at_doubled_steps():
    transform = pi.interpolant_transform(2, (8, 8))
    with torch.no_grad():
        transform.velocity.output.weight.normal_(std=2.0)
    transform.solver = pi.FixedGrid(3, "euler")
    flow = pi.InterpolantDistribution(transform).freeze()
    x, log_q = flow.rsample_and_log_prob((50,))
    log_p = torch.linspace(-1, 1, 50)
    new, change = recompute_largest(flow, x, log_p, log_q, 7)
    largest = (log_p - log_q).topk(7).indices
    assert transform.solver == pi.FixedGrid(3, "euler")
    transform.solver = pi.FixedGrid(6, "euler")
    torch.testing.assert_close(new[largest], flow.log_prob(x)[largest])
    assert int((new != log_q).sum()) == 7
    assert change == pytest.approx(float((new - log_q)[largest].abs().mean()))
    unknown = log_p.clone()
    unknown[:9] = math.nan  # of draws without a target, which have no weight
    transform.solver = pi.FixedGrid(3, "euler")
    new, _ = recompute_largest(flow, x, unknown, log_q, 7)
    largest = 9 + (log_p - log_q)[9:].topk(7).indices
    assert (new != log_q).nonzero().flatten().tolist() == sorted(largest.tolist())
    transform.solver = pi.Adaptive()
    same, change = recompute_largest(flow, x, log_p, log_q, 7)
    assert same is log_q
    assert change == 0.0


def test_the_change_of_a_mean_weight_without_one_is_infinite():
    some, none = torch.randn(50), torch.full((50,), -math.inf)
    for before, after in ((some, none), (none, some), (none, none)):
        assert change_of_mean(before, after) == math.inf
    unknown, zero = some.clone(), some.clone()
    unknown[3], zero[3] = math.nan, -math.inf  # no density, no weight
    assert change_of_mean(unknown, some) == change_of_mean(zero, some) < math.inf


def test_every_draw_is_weighed_once():
    q, p, seen = dist.Normal(0.0, 1.0), dist.Normal(0.2, 0.9), []

    def density(x):
        seen.append(x)
        return p.log_prob(x)

    drawn = weighted_draws(q, density, 500)
    x, log_weights, change, solver_error = drawn
    assert torch.equal(x, torch.cat(seen))
    assert len(x) == 500
    torch.testing.assert_close(log_weights, p.log_prob(x) - q.log_prob(x))
    assert (change, solver_error) == (0.0, 0.0)
    assert drawn.summary() == summarise_weights(log_weights)


def test_the_error_of_the_evidence_counts_that_of_the_solver():
    """Of a target of mass 1 the log-evidence is 0, but a coarse solver's density is not exact."""
    torch.manual_seed(1)
    transform = pi.interpolant_transform(2, (8, 8))
    with torch.no_grad():
        transform.velocity.output.weight.normal_(std=0.9)
    flow = pi.InterpolantDistribution(transform).freeze()
    target = dist.Normal(torch.zeros(2), 0.9).to_event(1)
    found = {}
    for steps in (2, 32):
        transform.solver = pi.FixedGrid(steps)
        drawn = weighted_draws(flow, target.log_prob, 20_000)
        found[steps] = *drawn.summary()[2:], float(log_total(drawn.log_weights)[1])
    value, stderr, chance = found[2]
    assert 5 * chance < abs(value) < 3 * stderr
    value, stderr, chance = found[32]
    assert abs(value) < 3 * stderr
    assert stderr == pytest.approx(chance, rel=0.01)
    transform.solver = pi.Adaptive()
    assert solver_error_of_mean(flow, target.log_prob, 20) == 0.0


@pytest.mark.parametrize("kind", ["joint, gaussianized", "laplace, positive", "halfway"])
def test_what_is_computed_again_is_the_density_of_the_whole_distribution(kind):
    flow = KINDS[kind]().freeze()
    flow.transform.solver = pi.FixedGrid(3, "euler")
    x, log_q = flow.rsample_and_log_prob((20,))
    new, _ = recompute_largest(flow, x, torch.zeros(20), log_q, 20)
    flow.transform.solver = pi.FixedGrid(6, "euler")
    torch.testing.assert_close(new, flow.log_prob(x))


def test_the_mean_weight_and_its_error():
    value, stderr = summarise_weights(torch.tensor([1.0, 3.0, 2.0, 2.0]).log() + 900)[2:]
    assert value == pytest.approx(math.log(2.0) + 900)
    deviation = math.sqrt(2 / 4) / 2  # relative
    assert stderr == pytest.approx(deviation / math.sqrt(4))
    assert summarise_weights(torch.zeros(9))[3] == pytest.approx(0.0, abs=1e-7)
    assert summarise_weights(torch.full((9,), -math.inf)) == (math.inf, 0.0, -math.inf, math.inf)


def test_the_error_of_the_evidence_counts_the_rounding_of_densities():
    """A constant that all draws share is rounded alike, whatever their number."""
    noise, within = 0.01 * torch.randn(2000), 0
    for constant in torch.linspace(-1e6, -6e5, 20).tolist():
        rounded = torch.tensor(constant, dtype=torch.float32) + noise.float()
        found = summarise_weights(rounded)
        exact = summarise_weights(noise + constant)
        assert exact.log_evidence_stderr < 1e-3
        within += abs(found.log_evidence - constant) < 2 * found.log_evidence_stderr
    assert within == 20


@pytest.mark.parametrize("function", [pareto_smooth, effective_sample_size])
def test_refusals(function):
    with pytest.raises(ValueError, match=r"shape \(N,\), N >= 1, got \(2, 2\)"):
        function(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="got 1 NaN or .inf and 1 finite ones of 2"):
        function(torch.tensor([0.0, math.nan]))
    with pytest.raises(ValueError, match="got 0 NaN or .inf and 0 finite ones of 3"):
        function(torch.full((3,), -math.inf))


def test_rounded_weights_have_the_tail_that_they_had():
    """Many tie with the cutoff: they are not of another order of magnitude than the next."""
    raw = 0.01 * torch.randn(10_000)
    for rounded in ((raw * 200).round() / 200, raw.float() + 3e4):
        assert pareto_smooth(rounded).k_hat < 0.3
    equal = torch.full((10_000,), 3e4, dtype=torch.float32)
    equal[:3] = torch.nextafter(equal[:3], equal.new_tensor(torch.inf))
    assert pareto_smooth(equal).k_hat == -math.inf
    equal[0] += 5.0  # more than rounding
    assert pareto_smooth(equal).k_hat == math.inf


@pytest.mark.parametrize("seed", range(2))
def test_nearly_equal_weights_are_judged_by_their_tail_alone(seed):
    """A normal proposal of a posterior all but normal: the 300 largest weights are mostly bulk."""
    pyro.set_rng_seed(seed)
    x = 1.2 * torch.randn(10_000)
    bulk = dist.StudentT(4.0).log_prob(x / 1.2) - dist.Normal(0.0, 1.2).log_prob(x)
    weights = 0.05 * torch.tanh(4 * bulk) + 0.3 * (x.abs() - 3.5).clamp_min(0.0)
    assert effective_sample_size(weights) > 9_900
    assert pareto_smooth(weights).k_hat < K_HAT_LIMIT


def test_weights_rounded_by_more_than_a_nat_tell_nothing():
    noise = torch.randn(1000)
    for size in (5e8, 5e13):
        assert pareto_smooth((noise - size).float()).k_hat == math.inf
        assert pareto_smooth((1e7 * noise - size).float()).k_hat == math.inf
    assert pareto_smooth(noise - 5e8).k_hat < K_HAT_LIMIT
    assert pareto_smooth((noise - 1e5).float()).k_hat < K_HAT_LIMIT


def test_few_heavy_weights_among_nearly_equal_ones_stay_heavy():
    """One in a thousand is from a wide part that the proposal misses: 0.0007 of the evidence."""
    pyro.set_rng_seed(0)
    x = torch.randn(10_000)
    wide = dist.Normal(0.0, 10.0).log_prob(x) + math.log(1e-3)
    weights = torch.logaddexp(wide, dist.Normal(0.0, 1.0).log_prob(x) + math.log1p(-1e-3))
    weights = weights - dist.Normal(0.0, 1.0).log_prob(x)
    assert effective_sample_size(weights) > 9_990
    assert pareto_smooth(weights).k_hat > K_HAT_LIMIT


def test_a_rare_mode_is_no_tail_to_be_judged_alone():
    """Half the mass on 20 of 10,000 draws: the alarm is theirs, equal though they are."""
    weights = 0.01 * torch.randn(10_000)
    weights[:20] += 6.2
    assert pareto_smooth(weights).k_hat > K_HAT_LIMIT
