import contextlib
import copy
import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch import nn

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    FixedGrid,
    InterpolantDistribution,
    InterpolantTransform,
    Latent,
    Linear,
    VelocityMLP,
    conditional_interpolant_transform,
    fit,
    from_samples,
    interpolant_loss,
    interpolant_transform,
    optimal_transport,
    score,
)
from pyro_interpolant.training import loop
from pyro_interpolant.training.reporting import HeldOutDensity
from pyro_interpolant.training.selection import Scores

pytestmark = pytest.mark.usefixtures("_few_held_draws")


PLACES = torch.arange(100.0, dtype=torch.float64)
X, C = torch.stack(((0.7 * PLACES).sin(), (1.3 * PLACES).cos()), -1), PLACES[:, None] / 100


def tiny(dim=2, **kwargs):
    return InterpolantDistribution(interpolant_transform(dim, (32, 32)), **kwargs)


def tiny_conditional(context_dim=1, **kwargs):
    return ConditionalInterpolantDistribution(
        conditional_interpolant_transform(2, context_dim, (32, 32), **kwargs)
    )


class Still(nn.Module):
    def forward(self, t, x, context=None):
        return torch.zeros_like(x)


def still():
    return InterpolantDistribution(InterpolantTransform(Still(), 2))


def bimodal():
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]])
    scales = torch.tensor([[0.6, 1.0], [0.8, 0.5]])
    parts = dist.Normal(means, scales).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.4, 0.6])), parts)


def quick(distribution, data, **options):
    settings = {"steps": 20, "patience": 100, "seed": 0, "progress": False, "tolerance": 0.1}
    return fit(distribution, data, **{**settings, **options})


LAST_LAYER = "flow.velocity.output.weight"


def weights_of(distribution):
    return {k: v.clone() for k, v in distribution.transform.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_wild_context_held_out_does_not_choose_the_weights():
    best = []
    for wild in (0.0, 1e20):
        torch.manual_seed(3)
        c, held = torch.randn(1000, 1), torch.randn(300, 1)
        x, unseen = (0.5 * s + torch.randn(len(s), 2) for s in (c, held))
        held[0] = held[0] + wild
        d = tiny_conditional()
        result = quick(d, x, context=c, validation=(unseen, held), steps=300)
        best.append(result.best_step)
    assert best[0] == best[1] > 30


@pytest.mark.slow
def test_fit_learns_a_bimodal_mixture():
    truth, distribution = bimodal(), tiny()
    result = quick(
        distribution, truth.sample((4000,)), steps=500, learning_rate=5e-3, tolerance=1e-2
    )
    x = truth.sample((1500,))
    gap = (truth.log_prob(x) - distribution.log_prob(x)).mean()
    assert -0.02 < gap < 0.1
    assert distribution.transform.solver == result.solver
    y = distribution.sample((4000,))
    assert float((y[:, 0] > 0).double().mean()) == pytest.approx(0.6, abs=0.05)


@pytest.mark.parametrize("make", ["fit", pytest.param("from_samples", marks=pytest.mark.slow)])
def test_same_seed_same_weights_and_the_global_generator_is_left_alone(make):
    x, start, runs = torch.randn(200, 2), interpolant_transform(2, (32, 32)), []
    for seed in (3, 3, 4, None):
        torch.randn(7)  # the state of the global generator must not matter
        state = torch.get_rng_state()
        if make == "fit":
            distribution = InterpolantDistribution(copy.deepcopy(start))
            quick(distribution, x, seed=seed)
        else:
            distribution = from_samples(x, seed=seed, steps=5, progress=False)
        assert torch.equal(torch.get_rng_state(), state) == (seed is not None)
        runs.append(weights_of(distribution))
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])
    assert not any(equal(run, runs[3]) for run in runs[:3])


class Dropping(VelocityMLP):
    def forward(self, t, x, context=None):
        return super().forward(t, nn.functional.dropout(x, 0.2, self.training), context)


@pytest.mark.slow
def test_seeded_runs_in_threads_end_in_the_weights_of_one_alone():
    """However their draws and those of a callback between them come by turns."""
    start = InterpolantTransform(Dropping(2, (16, 16)))

    def train(barrier=None):
        distribution = InterpolantDistribution(copy.deepcopy(start))
        wait = None if barrier is None else lambda state: barrier.wait(900) < 0
        quick(distribution, X, callback=wait)
        return weights_of(distribution)

    expected, barrier = train(), threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(train, [barrier, barrier]))
    assert all(equal(weights, expected) for weights in found)


@pytest.mark.slow
def test_the_result_and_the_callback_tell_the_same_story():
    told = []
    result = quick(tiny(), torch.randn(300, 2), steps=40, callback=told.append)
    assert result.steps == [state.step for state in told] == sorted(set(result.steps))
    assert result.steps[-1] == 40
    assert result.losses == [state.loss for state in told]
    assert result.validation_losses == [state.validation_loss for state in told]
    assert all(math.isfinite(v) for v in (*result.losses, *result.validation_losses))
    assert told[-1].learning_rate < max(state.learning_rate for state in told) / 10
    assert (result.stopped_early, result.skipped) == (False, 0)


@pytest.mark.slow
def test_a_run_that_forgets_how_to_generalise_ends_and_keeps_the_best_weights():
    """Without averaging the weights that are kept are those the callback saw there."""
    distribution = InterpolantDistribution(interpolant_transform(2, (128, 128)))
    seen, x = {}, torch.randn(300, 2)

    def remember(state):
        seen[state.step] = weights_of(distribution)

    options = {"learning_rate": 0.005, "weight_decay": 0.0, "ema": 0.0, "callback": remember}
    result = quick(distribution, x, steps=3000, validation=torch.arange(300) >= 60, **options)
    assert (result.stopped_early, result.stopped_by) == (True, "patience")
    assert result.steps[-1] >= max(500, 1.3 * result.best_step)
    assert equal(weights_of(distribution), seen[result.best_step])
    held = distribution.log_prob(x[60:]).mean()
    distribution.transform.load_state_dict(seen[result.steps[-1]])
    distribution.clear_cache()
    assert held > distribution.log_prob(x[60:]).mean() + 0.05


class Counting(nn.Module):
    """A velocity with a statistic that moves in training."""

    event_dim = 2

    def __init__(self):
        super().__init__()
        self.network = VelocityMLP(2, (8,))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, t, x, context=None):
        if self.training:
            self.seen = self.seen + 1
        return self.network(t, x, context)


def test_the_density_of_rows_held_out_chooses_weights_and_buffers_and_not_the_loss(monkeypatch):
    looks, network, at = itertools.count(), Counting(), {}

    def scores(density):
        return Scores.equal(torch.full((len(density.judging.w),), abs(next(looks) - 2.0)))

    def look(now):
        at[now.step] = float(network.seen)

    monkeypatch.setattr(HeldOutDensity, "scores", scores)
    flow = InterpolantDistribution(InterpolantTransform(network))
    result = quick(flow, torch.randn(100, 2), steps=60, seed=0, callback=look)
    losses = result.validation_losses
    assert result.best_step == result.steps[2] < result.steps[-1]
    assert losses[2] > min(losses)
    assert float(network.seen) == at[result.best_step]


def test_the_rate_rises_over_200_steps_or_a_tenth_of_the_schedule_and_falls_to_zero():
    schedule = loop.Schedule(None, 1e-2, None, 30, 0.999)
    fall = [0.5 * (1 + math.cos(math.pi * p)) for p in (0.0, 0.0495, 0.5)]
    rates = [schedule.rate(taken, 2000) for taken in (0, 99, 1000)]
    assert rates == pytest.approx([1e-2 / 200, 1e-2 * fall[1] / 2, 1e-2 * fall[2]])
    assert schedule.rate(0, 50) == pytest.approx(1e-2 / 5)
    assert schedule.rate(2000, 2000) == pytest.approx(0.0)


def test_a_limit_of_time_ends_the_run_and_says_so(monkeypatch):
    ticks = itertools.count()
    monkeypatch.setattr("pyro_interpolant._package.now", lambda: 0.01 * next(ticks))
    result = quick(tiny(), torch.randn(200, 2), steps=1000, max_seconds=0.4)
    assert 5 < result.steps[-1] <= 40
    assert (result.stopped_early, result.stopped_by) == (True, "time")


@pytest.mark.parametrize("tick", [1e-6, 1e-2])
def test_the_clock_changes_nothing_of_a_run_without_a_limit(tick, monkeypatch):
    first = tiny()
    flows = [first, copy.deepcopy(first)]
    expected = quick(flows[0], X, steps=30, seed=0)
    ticks = itertools.count()
    monkeypatch.setattr("pyro_interpolant._package.now", lambda: tick * next(ticks))
    found = quick(flows[1], X, steps=30, seed=0)
    assert equal(weights_of(flows[0]), weights_of(flows[1]))
    assert found._replace(seconds=0.0, report=None) == expected._replace(seconds=0.0, report=None)


@pytest.mark.slow
def test_the_weights_kept_are_the_averaged_ones_that_a_callback_sees():
    last, start = {}, interpolant_transform(2, (32, 32))
    for ema in (0.999, 0.0):
        distribution, seen = InterpolantDistribution(copy.deepcopy(start)), {}
        weight = distribution.transform.velocity.layers[0].weight

        def remember(state, weight=weight, seen=seen):
            seen[state.step] = weight.detach().clone()

        result = quick(distribution, X, steps=60, ema=ema, seed=0, callback=remember)
        assert torch.equal(weight, seen[result.best_step])
        last[ema] = (seen[60] - start.velocity.layers[0].weight).norm()
    # An average lies behind what it averages: nearer to the start, as all weights move.
    assert 0 < last[0.999] < last[0.0]


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [True, False])
def test_weights_are_frozen_afterwards_and_trained_all_the_same(frozen):
    distribution = tiny()
    if frozen:
        distribution.freeze()
    before = weights_of(distribution)
    quick(distribution, torch.randn(200, 2))
    assert all(not p.requires_grad and p.grad is None for p in distribution.transform.parameters())
    assert not any(part.training for part in distribution.transform.modules())
    assert not torch.equal(weights_of(distribution)[LAST_LAYER], before[LAST_LAYER])


def test_weights_frozen_beside_others_stay_as_they_are():
    network = VelocityMLP(2, (8,))
    fixed = network.embedding.requires_grad_(requires_grad=False)
    before = {name: p.clone() for name, p in network.named_parameters()}
    flow = from_samples(torch.randn(200, 2), network=network, steps=20, seed=0, progress=False)
    assert not any(p.requires_grad for p in flow.transform.parameters())
    moved = {
        name
        for name, p in flow.transform.velocity.named_parameters()
        if not torch.equal(p, before[name])
    }
    assert moved == before.keys() - {f"embedding.{name}" for name, _ in fixed.named_parameters()}


def test_an_error_leaves_no_network_of_the_noise_that_has_learned_nothing(monkeypatch):
    distribution, x = tiny(), torch.randn(200, 2)
    distribution.transform.flow.interpolant = Latent(Linear())
    quick(distribution, x)
    before = score(distribution, 0.5, x)
    with monkeypatch.context() as patched:
        patched.setattr(loop.Run, "_advance", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quick(distribution, x, learn="noise")
    assert distribution.transform.flow.noise is None
    assert torch.equal(score(distribution, 0.5, x), before)
    quick(distribution, x, learn="noise")
    known = distribution.transform.flow.noise
    monkeypatch.setattr(loop.Run, "_advance", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        quick(distribution, x, learn="noise")
    assert distribution.transform.flow.noise is known


def test_an_error_in_the_middle_leaves_flags_and_modes_as_they_were():
    distribution = tiny()
    distribution.transform.velocity.shifts.weight.requires_grad_(False)  # noqa: FBT003
    flags = [p.requires_grad for p in distribution.transform.parameters()]
    mode, before = distribution.transform.velocity.training, weights_of(distribution)

    def fail(state):
        if state.step >= 10:
            raise KeyError(state.step)

    with pytest.raises(KeyError):
        quick(distribution, torch.randn(200, 2), callback=fail)
    assert [p.requires_grad for p in distribution.transform.parameters()] == flags
    assert distribution.transform.velocity.training == mode
    assert not torch.equal(weights_of(distribution)[LAST_LAYER], before[LAST_LAYER])


class Poisoned(VelocityMLP):
    """Turns to NaN after some calls while it is being trained."""

    def __init__(self, good):
        super().__init__(2, (16, 16))
        self.good, self.calls = good, 0

    def forward(self, t, x, context=None):
        v = super().forward(t, x, context)
        if torch.is_grad_enabled():
            self.calls += 1
        return v * math.nan if self.calls > self.good else v


@pytest.mark.slow
def test_a_loss_that_turns_to_nan_keeps_the_last_good_weights():
    x = torch.randint(0, 2, (300, 1)) * 4.0 + 0.2 * torch.randn(300, 2)
    options = {"steps": 800, "seed": 0, "progress": False, "learning_rate": 5e-3}
    with pytest.raises(RuntimeError, match="not finite for .* last good .*Lower") as caught:
        from_samples(x, network=Poisoned(400).double(), marginals=False, **options)
    distribution = caught.value.distribution
    after = weights_of(distribution)
    assert all(torch.isfinite(v).all() for k, v in after.items() if "reach" not in k)
    distribution.transform.velocity.good = math.inf
    draws = {"x0": torch.randn(300, 2), "t": torch.rand(300)}
    # Better than the untrained velocity, whose loss is zero.
    assert interpolant_loss(distribution, x, **draws).mean() < -0.1


@pytest.mark.slow
def test_looks_see_the_network_as_it_is_used():
    modes = []

    class Watched(Dropping):
        def forward(self, t, x, context=None):
            if not torch.is_grad_enabled():
                modes.append(self.training)
            return super().forward(t, x, context)

    quick(InterpolantDistribution(InterpolantTransform(Watched(2, (16,)))), X)
    assert modes
    assert not any(modes)


def test_a_single_bad_step_is_skipped():
    class Once(Poisoned):
        def forward(self, t, x, context=None):
            v = super().forward(t, x, context)
            return v * math.nan if torch.is_grad_enabled() and self.calls == 9 else v

    distribution = InterpolantDistribution(InterpolantTransform(Once(math.inf)))
    result = quick(distribution, torch.randn(200, 2), steps=30)
    assert result.skipped == 1
    assert torch.isfinite(distribution.log_prob(torch.randn(3, 2))).all()


NAN = X.masked_fill(PLACES[:, None] == 3, math.nan)
FEW = lambda x0, x1, context: x0[:3]  # noqa: E731
TEXT = np.array([["f", "m"]])
POSITIVE = {"support": constraints.positive}
BAD = {
    "nan": (tiny, NAN, {}, ValueError, "in 1 of 100 .* row 3"),
    "constant": (tiny, X * torch.tensor([1.0, 0.0]), {}, ValueError, r"constant columns \[1\]"),
    "few rows": (tiny, X[:2], {}, ValueError, "1 rows of 2, not counting those held"),
    "no rows": (tiny, X[:0], {}, ValueError, "expected rows of data, got none"),
    "integers": (tiny, X.long(), {}, TypeError, r"int64.*\.float\(\).*dequantize"),
    "few bits": (lambda: tiny().to(torch.float16), X, {}, TypeError, "of too few bits to train"),
    "text": (tiny, TEXT, {}, TypeError, r"numbers, got an array of <U1.*numpy\.unique"),
    "columns": (tiny, torch.cat((X, C), -1), {}, ValueError, r"\(N, 2\), got \(100, 3\)"),
    "scalars": (lambda: tiny(1), X[:, 0], {}, ValueError, r"pass shape \(N, 1\)"),
    "support": (lambda: tiny(**POSITIVE), X, {}, ValueError, "strictly inside the support"),
    "edge": (lambda: tiny(**POSITIVE), X.clamp(min=0), {}, ValueError, "on its edge"),
    "named": (tiny, {"a": X}, {}, TypeError, "only a JointInterpolantDistribution"),
    "no context": (tiny_conditional, X, {}, ValueError, r"context of shape \(100, C\)"),
    "a context": (tiny, X, {"context": C}, ValueError, "expected no context"),
    "short context": (tiny_conditional, X, {"context": C[:60]}, ValueError, "data, 100, got 60"),
    "wide context": (tiny_conditional, X, {"context": X}, ValueError, r"\(N, 1\), got \(100, 2\)"),
    "nan context": (tiny_conditional, X, {"context": C / 0}, ValueError, "finite context, got"),
    "batch": (tiny, X, {"batch_size": 101}, ValueError, "batch_size between 1 and the 90"),
    "few weights": (tiny, X, {"weights": C[:60, 0]}, ValueError, "non-negative weights"),
    "bad weights": (tiny, X, {"weights": -C[:, 0]}, ValueError, "non-negative weights"),
    "nan held out": (tiny, X, {"validation": NAN}, ValueError, "finite validation.* 1 of 100"),
    "all held out": (tiny, X, {"validation": 1.0}, ValueError, "between 0 and 1, or rows, got 1"),
    "none held out": (tiny, X, {"validation": None}, ValueError, "between 0 and 1, or rows, got"),
    "parts": (tiny, X, {"validation": (X, C, C)}, ValueError, r"\(rows, contexts\), got 3 parts"),
    "both": (tiny, X, {"validation": X, "pairs": X}, ValueError, "a share for validation beside"),
    "steps": (tiny, X, {"steps": "5"}, ValueError, "steps >= 1, a .*got '5'"),
    "seconds": (tiny, X, {"max_seconds": -1.0}, ValueError, "max_seconds > 0, got -1.0"),
    "rate": (tiny, X, {"learning_rate": math.inf}, ValueError, "a finite learning_rate > 0, got"),
    "decay": (tiny, X, {"weight_decay": -1.0}, ValueError, "weight_decay >= 0, got -1.0"),
    "patience": (tiny, X, {"patience": 0}, ValueError, "patience >= 1"),
    "average": (tiny, X, {"ema": 1.0}, ValueError, r"ema in \[0, 1\)"),
    "tolerance": (tiny, X, {"tolerance": 0.0}, ValueError, "positive tolerance|tolerance >"),
    "aim": (tiny, X, {"learn": "noises"}, ValueError, "learn='noise', got 'noises'"),
    "coupling": (tiny, X, {"coupling": "independent"}, TypeError, "a function, not its name"),
    "partners": (tiny, X, {"coupling": FEW, "base_samples": X}, ValueError, "a partner of each"),
    "coupled": (tiny, X, {"pairs": X, "coupling": optimal_transport}, ValueError, "got both"),
    "seed": (tiny, X, {"seed": 1.5}, ValueError, "a seed that is whole.*1.5"),
    "callback": (tiny, X, {"callback": 3}, TypeError, "expected callback to be a function"),
    "no network": (still, X, {}, ValueError, "a network with weights to train, got Still"),
    "of a time": (lambda: tiny().at(0.5), X, {}, ValueError, "fit the distribution it came from"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_any_work(name):
    make, data, options, kind, message = BAD[name]
    distribution, told = make(), []
    before, base = weights_of(distribution), distribution.base
    with pytest.raises(kind, match=f"(?s){message}"):
        quick(distribution, data, **{"callback": told.append, **options})
    assert equal(weights_of(distribution), before)
    assert distribution.base is base
    assert not told


@pytest.mark.slow
def test_a_coupling_trains_on_batches_alone(monkeypatch):
    monkeypatch.undo()  # as many held-out rows as there ever are
    seen = []

    def watched(x0, x1, context):
        seen.append((*x0.shape, *x1.shape, context))
        return optimal_transport(x0, x1, context)

    options = {"steps": 300, "batch_size": 64, "coupling": watched, "patience": 1000}
    result = quick(tiny(), bimodal().sample((300,)), **options)
    assert len(seen) >= 300
    assert (64, 2, 64, 2, None) in seen
    # An exact assignment costs the cube of the rows: a held-out set must not be one batch.
    assert max(rows for _, _, rows, _, _ in seen) <= 1024
    assert min(result.validation_losses) < 0


def test_rows_of_another_type_train_a_flow_in_its_own():
    for x in (X.numpy(), X.float()):
        distribution = tiny()
        quick(distribution, x, steps=3)
        assert distribution.transform.flow.loc.dtype == torch.float64
    distribution = InterpolantDistribution(interpolant_transform(2, (16, 16)).float())
    quick(distribution, 1e5 + X)
    assert distribution.sample((5,)).dtype == torch.float32


@pytest.mark.slow
def test_a_conditional_flow_learns_a_mean_that_moves():
    distribution = tiny_conditional()
    context = 2 * torch.rand(3000, 1) - 1
    x = torch.cat((3 * context, -context), -1) + 0.3 * torch.randn(3000, 2)
    quick(distribution, x, context=context, steps=250, learning_rate=5e-3)
    for c in (-0.8, 0.0, 0.8):
        given = distribution.condition(torch.tensor([c]))
        y = given.sample((1000,))
        torch.testing.assert_close(y.mean(0), torch.tensor([3 * c, -c]), rtol=0, atol=0.15)
        torch.testing.assert_close(y.std(0), torch.tensor([0.3, 0.3]), rtol=0.3, atol=0)


@pytest.mark.slow
def test_a_given_base_is_where_it_starts():
    base = dist.MultivariateNormal(torch.tensor([4.0, 4.0]), 0.5 * torch.eye(2))
    distribution = tiny(base=base)
    data = torch.tensor([-3.0, 1.0]) + torch.randn(1000, 2) * torch.tensor([1.0, 0.4])
    quick(distribution, data, steps=350, learning_rate=5e-3)
    x = base.sample((50,))
    torch.testing.assert_close(distribution.at(0.0).log_prob(x), base.log_prob(x))
    y = distribution.sample((2000,))
    torch.testing.assert_close(y.mean(0), data.mean(0), rtol=0, atol=0.2)
    torch.testing.assert_close(y.std(0), data.std(0), rtol=0.35, atol=0)


def test_data_on_a_support():
    truth = dist.LogNormal(torch.tensor([0.0, 3.0]), torch.tensor([0.5, 1.0])).to_event(1)
    distribution = tiny(support=constraints.positive)
    quick(distribution, truth.sample((2000,)), steps=200)
    x = truth.sample((500,))
    gap = (truth.log_prob(x) - distribution.log_prob(x)).mean()
    assert abs(gap) < 0.1
    assert (distribution.sample((500,)) > 0).all()


def test_why_a_run_stopped_is_said_beside_the_bar(capsys):
    quick(tiny(), torch.randn(60, 2), progress=True, callback=lambda state: True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "fit stopped early at step 1" in captured.err


def test_no_stale_density_after_fit():
    distribution, x = tiny(), torch.randn(5, 2)
    before = distribution.log_prob(x)
    quick(distribution, 3 + 2 * torch.randn(200, 2))
    assert (distribution.log_prob(x) - before).abs().min() > 1e-3


@pytest.mark.slow
def test_from_samples_on_a_support():
    for support, event in (constraints.simplex, (3,)), (constraints.corr_cholesky, (3, 3)):
        real = torch.distributions.biject_to(support)
        x = real(0.3 * torch.randn(200, *real.inverse_shape(torch.Size(event))))
        distribution = from_samples(x, support=support, steps=5, progress=False, seed=0)
        assert distribution.event_shape == event
        y = distribution.sample((20,))
        assert support.check(y).all()
        assert torch.isfinite(distribution.log_prob(y)).all()


# ---- far from the data --------------------------------------------------------------------------


def student(count, dim):
    return dist.StudentT(1.5).sample((count, dim))


def singular(count, dim):
    x = torch.randn(count, dim)
    x[:, 1] = x[:, 0] + 1e-4 * x[:, 1]
    return x


def far_mode(count, dim):
    centre = torch.where(torch.rand(count, 1) < 0.02, 1000.0, 0.0)
    return centre + torch.randn(count, dim)


def lognormal(count, dim):
    return (2 * torch.randn(count, dim)).exp()


RADII = torch.tensor([3.0, 10.0, 30.0, 100.0, 300.0, 1000.0])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no grid up to:UserWarning")
@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # a far mode flattens the other
@pytest.mark.parametrize(
    ("make", "dim"),
    [(student, 2), (far_mode, 2), (lognormal, 10), (singular, 10)],
)
def test_of_wild_data_densities_fall_far_away_and_gradients_and_samples_are_finite(make, dim):
    data, options = make(2000, dim).float(), {"seed": 0, "progress": False, "tolerance": 0.5}
    rates = {"steps": 150, "batch_size": 256, "learning_rate": 5e-3, "validation": 0.02}
    distribution = from_samples(data, **options, **rates)
    axes = torch.cat((torch.eye(dim), -torch.eye(dim)))
    directions = torch.cat((axes, torch.nn.functional.normalize(torch.randn(24, dim), dim=-1)))
    rays = (RADII[:, None, None] * directions).float()
    x = (data.mean(0) + data.std(0) * rays).requires_grad_()
    value = distribution.log_prob(x)
    assert torch.isfinite(value).all()
    falls = value[1:-1] > value[2:]
    assert falls.all(), f"rising at {(~falls).nonzero().tolist()}"
    gradient = torch.autograd.grad(value.sum(), x)[0]
    assert torch.isfinite(gradient).all()
    distribution.transform.solver = FixedGrid(steps=min(distribution.transform.solver.steps, 24))
    y = distribution.sample((5000,))
    assert torch.isfinite(y).all()
    assert torch.isfinite(distribution.log_prob(y[:500])).all()
    extent = (data - data.mean(0)).abs().amax(0)
    assert ((y - data.mean(0)).abs() < 20 * extent).all()


def test_a_refused_fit_leaves_a_flow_as_it_was():
    frame, flow = pd.DataFrame(X.numpy(), columns=["a", "b"]), tiny()
    quick(flow, frame, steps=3)
    before, loc = flow.log_prob(X), flow.transform.flow.loc.clone()
    with pytest.raises(ValueError, match="constant"):
        quick(flow, frame[["b", "a"]].assign(a=1.0), coupling=optimal_transport)
    assert flow.columns == ("a", "b")
    assert flow.transform.flow.independent
    assert torch.equal(flow.transform.flow.loc, loc)
    assert torch.equal(flow.log_prob(X), before)


def test_a_callback_says_stop_in_any_library():
    result = quick(tiny(), torch.randn(60, 2), callback=lambda state: np.bool_(True))  # noqa: FBT003
    assert (result.stopped_by, result.steps) == ("callback", [1])


def test_contexts_that_the_type_rounds_away_are_warned_of():
    t = 2_459_000 + 3 * torch.rand(400, 1, dtype=torch.float64)
    y = torch.sin(6 * t).float() + 0.1 * torch.randn(400, 1).float()
    flow = ConditionalInterpolantDistribution(
        conditional_interpolant_transform(1, 1, (8,)).float()
    )
    with pytest.warns(UserWarning, match="columns .0. of context"):
        fit(flow, y, context=t, steps=3, progress=False, seed=0)


class Sequences(nn.Module):
    """Attention between the numbers of a row; or, by torch's default, between rows."""

    def __init__(self, *, batch_first):
        super().__init__()
        self.event_dim, self.out, self.places = 2, nn.Linear(4, 1), nn.Linear(2, 4)
        self.heads = nn.MultiheadAttention(4, 2, batch_first=batch_first)

    def forward(self, t, x, context=None):
        h = self.places(torch.stack((x, t[..., None].expand_as(x)), -1)).reshape(-1, 2, 4)
        return self.out(self.heads(h, h, h, need_weights=False)[0]).reshape(x.shape)


@pytest.mark.usefixtures("_small_runs")
@pytest.mark.parametrize("starts_at_zero", [False, True])
def test_a_velocity_whose_rows_depend_on_each_other_is_told_of(starts_at_zero):
    """Before any work, but where it is still zero: then at the end, and nothing is lost."""
    torch.manual_seed(0)
    x = torch.randn(200, 2)
    for batch_first in (True, False):
        velocity = Sequences(batch_first=batch_first)
        if starts_at_zero:
            nn.init.zeros_(velocity.out.weight)
        flow = InterpolantDistribution(InterpolantTransform(velocity))
        told = contextlib.nullcontext()
        if not batch_first:
            way = pytest.warns(UserWarning, match="take batch_first=True")
            told = way if starts_at_zero else pytest.raises(ValueError, match="take batch_first")
        with told:
            fit(flow, x, steps=30, seed=0, progress=False)
        assert (flow.report is not None) == (batch_first or starts_at_zero)
