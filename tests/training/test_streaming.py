"""Iterables of batches in place of a table: checks, a first pass, held-out rows, resuming."""

import contextlib
import math
import warnings
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from arrays import PolarsFrame
from pyro.distributions import constraints
from torch import nn
from torch.utils.data import DataLoader

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
    InterpolantTransform,
    conditional_interpolant_transform,
    fit,
    from_samples,
    interpolant_transform,
)
from pyro_interpolant.interpolants.couplings import independent
from pyro_interpolant.nn import ImageVelocity
from pyro_interpolant.training.distributed import Process
from pyro_interpolant.training.objective import Objective
from pyro_interpolant.training.rows import row_keys
from pyro_interpolant.training.streaming import Stream, first_rows, is_stream
from pyro_interpolant.training.whitening import whitening_map
from pyro_interpolant.transforms import ScalarWhitening

pytestmark = pytest.mark.usefixtures("_small_runs")

QUICK = {"progress": False, "seed": 0, "steps": 40, "tolerance": 0.1}


def made(dim=2):
    torch.manual_seed(7)
    return InterpolantDistribution(interpolant_transform(dim, (12, 12)))


def made_conditional():
    torch.manual_seed(7)
    return ConditionalInterpolantDistribution(conditional_interpolant_transform(2, 1, (12, 12)))


def rows(count=600):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 2, generator=generator)
    return torch.cat((x[:, :1] + 5, x[:, 1:] + x[:, :1] ** 2), -1)


def weights_of(distribution):
    return [p.detach().clone() for p in distribution.transform.parameters()]


def same(a, b):
    return all(map(torch.equal, weights_of(a), weights_of(b)))


class Again:
    """Batches from a function of the number of the pass, anew each time."""

    def __init__(self, function):
        self.function, self.passes = function, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.function(self.passes))


def test_what_is_an_iterable_of_batches():
    one = torch.ones(3, 2)
    batches = [one], [one.numpy()], [(one, one[:, 0])], [{"a": one}], DataLoader(one)
    tables = one, one.numpy(), one.tolist(), {"a": one}, "text", [np.float64(1.0)]
    assert all(map(is_stream, (*batches, Again(lambda _: []), [PolarsFrame(a=np.ones(3))])))
    assert not any(map(is_stream, tables))


LOADERS = {
    "list": lambda x: list(x.split(77)),
    "shuffled": lambda x: DataLoader(x, batch_size=70, shuffle=True),
}


@pytest.mark.slow
def test_a_run_on_batches_is_as_good_as_one_on_the_table(monkeypatch):
    monkeypatch.undo()  # both are judged by as many held-out rows as there ever are
    x, held = rows(2600).split((2000, 600))  # with rows held out of each, losses differ by those
    options = {**QUICK, "steps": 250, "learning_rate": 5e-3, "batch_size": 256}
    flows = made(), made()
    losses = [
        fit(flow, data, **options, validation=held).validation_losses[-1]
        for flow, data in zip(flows, (x, LOADERS["shuffled"](x)), strict=True)
    ]
    assert losses[1] == pytest.approx(losses[0], abs=0.06)
    with torch.no_grad():
        table, stream = (flow.log_prob(x) for flow in flows)
    assert float((table - stream).mean()) == pytest.approx(0, abs=0.06)
    torch.testing.assert_close(flows[1].transform.flow.loc, x.mean(0), rtol=0, atol=0.1)


@pytest.mark.slow
def test_the_first_pass_finds_the_moments_of_all_rows_it_did_not_hold_out():
    x = rows(1000)
    found = Stream(made(), list(x.split(90)), 0.1).split(Process(), None)
    held = {tuple(row) for row in found.held.w.tolist()}
    assert len(found.held.w) == len(held) == 100
    kept = torch.tensor([tuple(row) not in held for row in x.tolist()])
    assert torch.equal(found.kept.w, x[kept])
    assert (found.total, found.size) == (900, 90)
    distribution = made()
    fit(distribution, list(x.split(90)), **QUICK)
    torch.testing.assert_close(distribution.transform.flow.loc, whitening_map(x[kept]).loc)


def test_the_rows_held_out_are_the_same_in_any_order():
    x = rows(1000)
    parts = x, x.flip(0), x[torch.randperm(1000)], x + 1e-9
    streams = [Stream(made(), list(part.split(90)), 0.1) for part in parts]
    held = [stream.split(Process(), None).held.w for stream in streams]
    first, *_, other = streams
    for stream, rows_held in zip(streams[1:-1], held[1:-1], strict=True):
        assert torch.equal(rows_held, held[0])
        assert stream.held_keys.below == first.held_keys.below
        assert stream.surveyed == first.surveyed
    assert other.surveyed.checksum != first.surveyed.checksum


def one_pass(data, distribution=None, share=0.1):
    """Rows held out, and those that train in one pass, ``(N, D)``, with their contexts."""
    distribution = distribution or made()
    stream = Stream(distribution, data, share)
    found = stream.split(Process(), 64)
    batches = stream.batches(found, unwhitened(distribution))
    parts = [batches._chosen(stream.rows(batch, i)) for i, batch in enumerate(data)]
    join = [torch.cat([v for v in part if v is not None], -1) for part in (found.held, *parts)]
    return join[0], torch.cat(join[1:])


def test_rows_that_repeat_train_as_often_as_in_a_table():
    """A chain with rejections, an oversampled minority: copies must not vanish."""
    x = torch.cat((rows(2000), (rows(400) - 40).repeat(5, 1)))
    data = list(x[torch.randperm(len(x))].split(100))
    held, seen = one_pass(data)
    times = Counter(map(tuple, seen.tolist()))
    copies = Counter(map(tuple, held.tolist()))
    assert not set(times) & set(copies)
    assert times + copies == Counter(map(tuple, x.tolist()))
    assert 320 <= len(held) <= 400  # a tenth, but for copies that would go beyond
    assert float((seen[:, 0] < -20).double().mean()) == pytest.approx(0.5, abs=0.03)


@pytest.mark.filterwarnings("ignore:columns .* repeat")
def test_rows_with_other_contexts_are_other_rows_and_keep_their_contexts():
    """Many simulations of each of few parameters."""
    x, context = rows(20).repeat(50, 1), torch.rand(1000, 1)
    data = list(zip(x.split(100), context.split(100), strict=True))
    held, seen = one_pass(data, made_conditional())
    assert len(held) == 100
    assert len({tuple(row) for row in seen[:, :2].tolist()}) == 20
    given = torch.cat((x, context), -1).tolist()
    assert sorted(torch.cat((held, seen)).tolist()) == sorted(given)


@pytest.mark.filterwarnings("ignore:columns .* repeat")
@pytest.mark.parametrize(
    ("count", "times", "share", "held_out"),
    [(2, 1, 0.1, 1), (30, 1, 0.99, 29), (5, 9, 0.1, 9), (150, 2, 0.1, 30)],
)
def test_one_row_is_held_out_at_least_and_one_is_left(count, times, share, held_out):
    held, seen = one_pass(list(rows(count).repeat(times, 1).split(7)), share=share)
    assert (len(held), len(held) + len(seen)) == (held_out, count * times)


@pytest.mark.filterwarnings("ignore:columns .* repeat")
@pytest.mark.parametrize(("dim", "most_held", "size"), [(1, 8192, 40), (2, 200, 40), (2, 8192, 1)])
def test_of_a_value_with_a_share_of_all_rows_as_many_are_held_out(dim, most_held, size):
    x = torch.randn(4000 if size > 1 else 1000, dim)
    x[torch.rand(len(x)) < 0.3] = 0.0
    stream = Stream(made(dim), list(x.split(size)), 0.1)
    stream.most_held = most_held
    found = stream.split(Process(), 50)
    count, share = min(len(x) // 10, most_held), float((x == 0).all(1).double().mean())
    assert len(found.held.w) == count
    error = (0.3 * 0.7 / count) ** 0.5
    assert float((found.held.w == 0).all(1).double().mean()) == pytest.approx(share, abs=4 * error)
    batches = stream.batches(found, unwhitened(stream.distribution))
    seen = torch.cat([batches.next_rows().w for _ in range(len(x) // 50)])
    assert float((seen == 0).all(1).double().mean()) == pytest.approx(share, abs=0.03)


def test_empty_batches_are_passed_over():
    x, empty = rows(600), rows(600)[:0]
    batches = [empty, x[:400], empty, x[400:]]
    weighted = [(b, b.new_ones(len(b))) for b in batches]
    for data in (batches, weighted):
        found = Stream(made(), data, 0.1).split(Process(), 50)
        assert len(torch.cat((found.held.w, found.kept.w))) == 600
        assert torch.equal(first_rows(data)[1], x[:400])


@pytest.mark.parametrize("scale", [1.0, 1e-300, 1e200])
def test_rows_that_weigh_more_later_count_as_in_a_table(scale):
    x, weights = rows(600), torch.linspace(0.1, 9.0, 600)
    data = list(zip(x.split(50), (scale * weights).split(50), strict=True))
    stream = Stream(made(), data, 0.1)
    found = stream.split(Process(), 50)
    effective = float(weights.sum() ** 2 / weights.square().sum())
    assert found.total == pytest.approx(0.9 * effective, rel=1e-12)
    assert stream.mean_weight == pytest.approx(scale * float(weights.mean()), rel=1e-12)


def batches_of(distribution, data):
    stream = Stream(distribution, data, 0.1)
    split = stream.split(Process(), 64)
    flow, base = distribution.transform.flow, distribution.white_base()
    return stream.batches(split, Objective(flow, base, independent))


def test_rows_that_are_left_of_a_batch_keep_their_contexts():
    c = torch.randn(300, 1)
    data = list(zip(torch.randn(300, 2).split(100), c.split(100), strict=True))
    first, again = (batches_of(made_conditional(), data) for _ in range(2))
    first.next_rows()
    again.restore(*first.state())
    found = []
    for batches in (first, again):
        torch.manual_seed(1)
        found.append(batches.next_rows())
    for name in ("w", "context"):
        assert torch.equal(*(getattr(each, name) for each in found))


def test_keys_are_as_if_at_random():
    grids = {
        "binary": torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 12),
        "line": torch.linspace(-1, 1, 4096)[:, None],
        "whole": torch.arange(4096.0)[:, None],
        "short": torch.randn(4096, 2).bfloat16(),
        "levels": torch.cartesian_prod(torch.arange(64), torch.arange(64)).to(torch.uint8),
    }
    for name, grid in grids.items():
        keys = row_keys(grid)
        assert len(keys.unique()) == len(grid.unique(dim=0)) > 4000, name
        u = (keys.double() / 2.0**64 + 0.5).sort().values
        even = (torch.arange(4096) + 0.5) / 4096
        # Kolmogorov's: 1.95 at a chance of 0.001
        assert float((u - even).abs().max()) < 2 / 64, name
        order = keys.argsort().argsort().double()
        both = torch.stack((order, torch.arange(4096.0)))
        assert abs(float(both.corrcoef()[0, 1])) < 4 / 64, name


@pytest.mark.slow
def test_a_stream_larger_than_the_sample_is_thinned_evenly(monkeypatch):
    monkeypatch.setattr("pyro_interpolant.training.survey.SAMPLE_VALUES", 400)
    x = torch.arange(4000.0)[:, None].expand(-1, 2) + torch.rand(4000, 2)
    whole = Stream(made(), list(x.split(10)), x[:2]).split(Process(), None)
    assert 100 <= len(whole.kept.w) <= 200
    assert float(whole.kept.w.mean()) == pytest.approx(2000, rel=0.05)
    found = Stream(made(), list(x.split(10)), 0.1).split(Process(), None)
    assert len(found.held.w) == 400
    assert found.total == 3600
    held, kept, sample = (
        {tuple(row) for row in part.w.tolist()} for part in (found.held, found.kept, whole.kept)
    )
    assert kept == sample - held


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # after one step
def test_weights_decay_by_the_number_of_training_rows(monkeypatch):
    optimizer, found = torch.optim.AdamW, []

    def noted(*args, **kwargs):
        found.append(kwargs["weight_decay"])
        return optimizer(*args, **kwargs)

    monkeypatch.setattr(torch.optim, "AdamW", noted)
    x = rows(2000)
    for data, options in (
        (x, {}),
        (list(x.split(100)), {}),
        (x[:100], {"batch_size": 50}),
        (x, {"weight_decay": 0.3}),
        (list(x.split(100)), {"whiten": False, "validation": x[:50]}),  # which nobody has counted
    ):
        fit(made(), data, **{**QUICK, "steps": 1, "tolerance": 1e3, **options})
    assert found == pytest.approx([(140 / 1800) ** 2, (140 / 1800) ** 2, 0.5, 0.3, 0.0])


def unwhitened(distribution):
    """The objective of a flow whose whitening map is the identity still."""
    flow = distribution.transform.flow
    return Objective(flow, distribution.white_base(), independent)


def test_rows_held_out_are_never_trained_on():
    x = rows(500)
    distribution = made()
    stream = Stream(distribution, LOADERS["shuffled"](x), 0.2)
    found = stream.split(Process(), 100)
    held = {tuple(row) for row in found.held.w.tolist()}
    batches = stream.batches(found, unwhitened(distribution))
    seen = [tuple(row) for _ in range(12) for row in batches.next_rows().w.tolist()]
    assert len(seen) == 12 * 64
    assert not held & set(seen)
    assert set(seen) | held == {tuple(row) for row in x.tolist()}
    times = Counter(seen)
    assert set(times.values()) == {1, 2}  # each once before any comes again
    assert len(set(seen[:384])) == 384


def test_rows_without_weight_are_absent():
    """Also the first of all, whatever they hold."""
    x, bad = rows(200), torch.full((100, 2), torch.nan)
    parts = [(bad, torch.zeros(100)), (x[:100], torch.ones(100))]
    parts += [(bad, torch.zeros(100)), (x[100:], torch.ones(100).bool())]
    flow = made()
    fit(flow, parts, validation=x[:10], **{**QUICK, "steps": 3})
    torch.testing.assert_close(flow.transform.flow.loc, x.mean(0))
    found = from_samples(parts, **{**QUICK, "steps": 3})
    assert found.report.rows == 200


def test_weights_come_as_the_last_part_and_rows_in_their_proportion():
    x = torch.cat((torch.randn(1000, 1) * 0.3 - 2, torch.randn(1000, 1) * 0.3 + 2))
    weights = torch.cat((torch.ones(1000), 4 * torch.ones(1000)))
    order = torch.randperm(2000)
    data = list(zip(x[order].split(200), weights[order].split(200), strict=True))
    batches = batches_of(made(1), data)
    seen = torch.cat([batches.next_rows().w for _ in range(60)])
    # Of nearly each row once or four times in a few passes.
    assert float((seen > 0).double().mean()) == pytest.approx(0.8, abs=0.03)
    flow = made(1)
    fit(flow, data, **{**QUICK, "steps": 3})
    assert float(flow.transform.flow.loc) == pytest.approx(1.2, abs=0.1)


def test_from_samples_takes_batches_of_named_draws_in_their_type():
    named = {"a": torch.randn(300).float(), "b": torch.rand(300, 2).float()}
    batches = [{k: v[i : i + 100] for k, v in named.items()} for i in (0, 100, 200)]
    options = {"support": {"b": constraints.positive}, "seed": 0, "steps": 5, "progress": False}
    found = from_samples(batches, **options)
    assert found.sample_dict((4,))["b"].shape == (4, 2)
    assert found.sample().dtype == torch.float32
    assert found.report.rows == 300


LINE = torch.arange(200.0).reshape(100, 2).cos()
ONE = torch.ones(100)
NAN = LINE.masked_fill((LINE == LINE[3])[:, :1], math.nan)
BAD = {
    "shape": ([LINE, LINE[:, :1]], {}, ValueError, r"in batch 1, .*\(N, 2\), got \(100, 1\)"),
    "integers": ([LINE, LINE.long()], {}, TypeError, "in batch 1, .*floating type"),
    "nan": ([LINE, NAN], {}, ValueError, "in batch 1, .*finite data.*being row 3"),
    "parts": ([(LINE, LINE, LINE)], {}, ValueError, "in batch 0, .*expected rows, .*got 3 parts"),
    "labels": ([(LINE, ONE.long())], {}, TypeError, "in batch 0, .*got torch.int64.*labels"),
    "weights": ([(LINE, -ONE)], {}, ValueError, "in batch 0, .*non-negative weights"),
    "some weights": ([LINE, (LINE, ONE)], {}, ValueError, "batch 1, .*in all batches or in none"),
    "then none": ([(LINE, ONE), LINE], {}, ValueError, "batch 1, .*none after others with them"),
    "no weight": ([(LINE, 0 * ONE)], {}, ValueError, "an iterable with 0 rows"),
    "empty": (DataLoader([], batch_size=2), {}, ValueError, "an iterable with 0 rows"),
    "few": ([LINE[:2]], {}, ValueError, "more rows than dimensions"),
    "equal": ([LINE[:1].repeat(9, 1)], {}, ValueError, "rows that differ, got 9 that are equal"),
    "a generator": ((part for part in [LINE]), {}, ValueError, "a generator, .* used up"),
    "contexts": ([LINE], {"context": LINE}, ValueError, "got context beside an iterable"),
    "pairs": ([LINE], {"pairs": LINE}, ValueError, "got pairs beside an iterable"),
    "a mask": ([LINE], {"validation": ONE > 0}, ValueError, "a share for validation, or rows, b"),
    "batch size": ([LINE], {"batch_size": 0}, ValueError, "batch_size >= 1, a whole number"),
}


@pytest.mark.filterwarnings("ignore:columns .* repeat")
@pytest.mark.parametrize("name", BAD)
def test_bad_batches_are_refused_and_named(name):
    data, options, kind, message = BAD[name]
    distribution = made()
    before = {k: v.clone() for k, v in distribution.transform.state_dict().items()}
    with pytest.raises(kind, match=f"(?s){message}"):
        fit(distribution, data, **options, **QUICK)
    after = distribution.transform.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    if name == "shape":
        with pytest.raises(ValueError, match=r"in batch 0, .*\(rows, contexts\).*got 1 parts"):
            fit(made_conditional(), data, **QUICK)


@pytest.mark.slow
def test_a_batch_that_turns_bad_later_ends_the_run_with_the_best_weights():
    def batches(number):
        parts = rows(600).split(100)
        return [*parts[:3], parts[3] * (math.nan if number > 4 else 1.0), *parts[4:]]

    distribution, told = made(), []
    before = weights_of(distribution)
    with pytest.raises(ValueError, match="in batch 3, .*NaN"):
        fit(distribution, Again(batches), callback=told.append, **{**QUICK, "steps": 100})
    assert told
    assert all(torch.isfinite(p).all() for p in weights_of(distribution))
    assert not all(map(torch.equal, before, weights_of(distribution)))


# ---- resuming -----------------------------------------------------------------------------------


class Stop(Exception):
    pass


def stopping(at):
    def callback(state):
        if state.step >= at:
            raise Stop

    return callback


class Stateful:
    """A loader with a generator of its own, which tells and takes its state."""

    def __init__(self, x, size):
        self.x, self.size, self.generator = x, size, torch.Generator().manual_seed(3)
        self.order, self.place = None, 0

    def __iter__(self):
        if self.order is None:
            self.order, self.place = torch.randperm(len(self.x), generator=self.generator), 0
        while self.place < len(self.x):
            self.place += self.size
            yield self.x[self.order[self.place - self.size : self.place]]
        self.order = None

    def state_dict(self):
        state = self.generator.get_state()
        return {"order": self.order, "place": self.place, "generator": state}

    def load_state_dict(self, state):
        self.order, self.place = state["order"], state["place"]
        self.generator.set_state(state["generator"])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "every"), [("stateful", 1), ("list", 7), ("shuffled", None)])
def test_a_run_on_batches_resumes_to_the_same_bits(kind, every, tmp_path):
    def run(distribution, **options):
        loader = Stateful(rows(), 70) if kind == "stateful" else LOADERS[kind](rows())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with contextlib.suppress(Stop):
                losses.append(fit(distribution, loader, **QUICK, **options).validation_losses)
        told = [w for w in caught if "to the bit only if" in str(w.message)]
        assert len(told) == ("checkpoint" in options and kind != "stateful")

    whole, first, again, losses = made(), made(), made(), []
    run(whole)
    keep = {"checkpoint": tmp_path / "run", "checkpoint_every": every}
    run(first, callback=stopping(22), **keep)
    torch.manual_seed(99)
    run(again, **keep)
    assert same(whole, again)
    assert losses[0] == losses[1]


def started(path, data):
    """A flow in the middle of a run on data, whose state is kept."""
    flow = made()
    with pytest.raises(Stop):
        with warnings.catch_warnings(action="ignore"):
            fit(flow, data, checkpoint=path, callback=stopping(22), **QUICK)
    return flow


def test_a_run_on_other_rows_is_not_resumed(tmp_path):
    started(tmp_path / "run", LOADERS["list"](rows()))
    message = r"expected the 600 rows with which .* began, got 599"
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match=message):
        fit(made(), LOADERS["list"](rows(599)), checkpoint=tmp_path / "run", **QUICK)


def test_weights_and_whitening_of_a_resumed_run_belong_together(tmp_path):
    first = started(tmp_path / "run", LOADERS["list"](rows()))
    flow = made()
    with (
        pytest.warns(UserWarning, match="to the bit only if"),
        pytest.warns(UserWarning, match="gave other rows than when the run in .* began"),
    ):
        fit(flow, LOADERS["list"](rows() + 0.1), checkpoint=tmp_path / "run", **QUICK)
    for name, value in first.transform.flow.named_buffers():
        assert torch.equal(flow.transform.flow.get_buffer(name), value)


@pytest.mark.slow
def test_frames_of_a_stream_are_taken_by_their_columns():
    frame = pd.DataFrame({"a": torch.randn(400).numpy(), "b": 100 + torch.randn(400).numpy()})
    flow, options = made(), {**QUICK, "steps": 3}
    fit(flow, [frame[:200], frame[200:][["b", "a"]]], **options)
    assert flow.columns == ("a", "b")
    assert (flow.transform.flow.loc - torch.tensor([0.0, 100.0])).abs().max() < 0.3
    held = made()
    fit(held, [frame[:200]], validation=frame[200:][["b", "a"]], **options)
    assert held.columns == ("b", "a")
    assert (held.transform.flow.loc - torch.tensor([100.0, 0.0])).abs().max() < 0.3


def test_a_network_is_told_of_a_stream_whose_map_is_kept():
    c = 2000 + 5 * torch.rand(400, 1)
    y = torch.sin(c) + 0.1 * torch.randn(400, 1)
    flow = ConditionalInterpolantDistribution(conditional_interpolant_transform(1, 1, (8,)))
    flow.transform.flow.whitening.set(y.mean(0), y.std() * torch.eye(1))
    batches = list(zip(y.split(50), c.split(50), strict=True))
    fit(flow, batches, whiten=False, **{**QUICK, "steps": 3})
    velocity = flow.transform.velocity
    assert abs(float(velocity.context_loc) - 2002.5) < 1
    assert bool(velocity.reach.isfinite().all())


@pytest.mark.slow
def test_an_iterable_may_fill_one_tensor_anew_with_each_batch():
    x, buffer = rows(2000) + torch.linspace(-5, 5, 2000)[:, None], torch.empty(100, 2)
    found = []
    for data in (Again(lambda _: map(buffer.copy_, x.split(100))), list(x.split(100))):
        found.append(made())
        fit(found[-1], data, **{**QUICK, "steps": 30})
    assert same(*found)
    assert torch.equal(*(flow.transform.flow.loc for flow in found))


def test_rows_on_another_scale_than_the_levels_of_a_stream_are_refused():
    velocity = ImageVelocity(nn.Flatten(), (1, 2, 2))
    transform = InterpolantTransform(velocity, whitening=ScalarWhitening(4))
    flow = InterpolantDistribution(transform, event_shape=(1, 2, 2))
    levels = torch.randint(0, 256, (60, 1, 2, 2), dtype=torch.uint8)
    stream = Stream(flow, list(levels.split(20)), levels[:10].double())
    with pytest.raises(ValueError, match="expected validation of the type of the data"):
        stream.split(Process(), None)
    stream = Stream(flow, [levels[:20], levels[20:] / 256], 0.1)
    with pytest.raises(ValueError, match="images of whole levels, uint8, in all batches or in no"):
        stream.split(Process(), None)
