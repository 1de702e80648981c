import math

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    InterpolantDistribution,
    InterpolantTransform,
    Samples,
    independent,
    interpolant_transform,
)
from pyro_interpolant.distributions.rounding import warn_if_rounded
from pyro_interpolant.distributions.rows import weighted_indices
from pyro_interpolant.nn import EmbeddedVelocity, VelocityMLP
from pyro_interpolant.training import whitening
from pyro_interpolant.training.data import Table, TableBatches, mask_of
from pyro_interpolant.training.distributed import Process
from pyro_interpolant.training.objective import Objective
from pyro_interpolant.training.preprocessing import dequantize
from pyro_interpolant.training.repeats import random_order
from pyro_interpolant.training.rows import Rows, keys_of
from pyro_interpolant.training.whitening import inliers, set_whitening, whitening_map
from pyro_interpolant.transforms import DiagonalWhitening


def data(count, dim):
    mix = torch.randn(dim, dim) + 2 * torch.eye(dim)
    return torch.randn(count, dim) @ mix + 10 * torch.randn(dim)


@pytest.mark.parametrize(("dim", "dtype"), [(1, torch.float64), (7, torch.float32)])
def test_whitened_rows_have_zero_mean_and_unit_covariance(dim, dtype):
    x = data(500, dim).to(dtype)
    m = whitening_map(x)
    assert m.loc.dtype == m.linear.dtype == m.inverse.dtype == torch.float64
    w = (x.double() - m.loc) @ m.inverse.T
    torch.testing.assert_close(w.mean(0), torch.zeros(dim), rtol=0, atol=1e-10)
    cov = (w.T @ w / 500).reshape(dim, dim)
    torch.testing.assert_close(cov, torch.eye(dim), rtol=0, atol=1e-9)
    torch.testing.assert_close(m.linear @ m.inverse, torch.eye(dim), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scales", [(1e-12, 1e12), (1e-30, 1e30)])
def test_units_and_offsets_do_not_matter(scales):
    x = data(400, 2)
    plain, scaled = whitening_map(x), whitening_map(x * torch.tensor(scales))
    w = (x * torch.tensor(scales) - scaled.loc) @ scaled.inverse.T
    torch.testing.assert_close(w.T @ w / 400, torch.eye(2), rtol=0, atol=1e-9)
    assert torch.isfinite(scaled.linear).all()
    torch.testing.assert_close(scaled.loc / torch.tensor(scales), plain.loc)
    moved = whitening_map(x - 1e9)
    w = (x - 1e9 - moved.loc) @ moved.inverse.T
    torch.testing.assert_close(w.T @ w / 400, torch.eye(2), rtol=0, atol=1e-4)


def plane(count):
    """Rows near a plane, of which one that is wild in a column parts what belongs together."""
    x = torch.randn(count, 3)
    x[:, 2] = x[:, 0] + x[:, 1] + 1e-4 * x[:, 2]
    return x


def mostly_zero(count):
    x = torch.randn(count, 2)
    x[: 4 * count // 5, 1] = 0.0
    return x


WILD = {  # rows, the places and values of those far off, and the bound of what these change
    "a row": (lambda: data(500, 2), [(17, slice(None), 1e12)], 3),
    "a row off a plane": (lambda: plane(20_000), [(9, 1, 1e4), (9, 2, -1e9)], 1.25),
    "a row near a plane": (lambda: plane(20_000), [(9, 0, 3.0), (9, 1, 0.0), (9, 2, -3.0)], 1.25),
    "each column": (
        lambda: torch.randn(20_000, 10) @ (torch.eye(10) + 0.3),
        [(slice(80 * i, 80 * i + 80), i, 1e6) for i in range(10)],
        5,
    ),
    "beside one value": (lambda: mostly_zero(5000), [(7, 1, 1e7)], 2),
}


@pytest.mark.parametrize("name", WILD)
def test_wild_values_do_not_set_the_scale(name):
    make, places, bound = WILD[name]
    x = make()
    before = whitening_map(x)
    for row, column, value in places:
        x[row, column] = value
    after = whitening_map(x)
    ratio = torch.linalg.svdvals(before.inverse @ after.linear)
    assert 1 / bound < ratio.min() <= ratio.max() < bound
    assert ((after.loc - before.loc) @ before.inverse.T).norm() < 0.5


def test_rows_that_come_in_an_order_are_looked_at_everywhere(monkeypatch):
    monkeypatch.setattr(whitening, "_QUANTILE_VALUES", 4000)  # 2,000 of the rows
    x = torch.randn(20_000, 2)
    x[18_000:] += 1000.0  # a class, not outliers
    m = whitening_map(x)
    torch.testing.assert_close(m.loc, x.mean(0), rtol=1e-4, atol=0)
    assert len(inliers(m.to_white(x)).unique()) >= 19_800


@pytest.mark.parametrize("weighted", [False, True])
def test_many_columns_are_as_wide_as_all_rows_are(weighted, monkeypatch):
    monkeypatch.setattr(whitening, "_QUANTILE_VALUES", 1500)  # of 25 rows, fewer than columns
    x = torch.randn(600, 60)
    map_ = whitening_map(x, torch.ones(600) if weighted else None)
    found = torch.linalg.svdvals(map_.linear / x.std(0)[:, None])
    torch.testing.assert_close(
        found, torch.linalg.svdvals(x.T.corrcoef()).sqrt(), rtol=0.01, atol=0
    )


def test_rows_that_weigh_most_are_no_outliers():
    x = torch.randn(1000, 2)
    x[:4] += 1e5
    weights = torch.full((1000,), 1e-3)
    weights[:4] = 1000.0
    m = whitening_map(x, weights)
    torch.testing.assert_close(m.loc, weights @ x / weights.sum(), rtol=1e-3, atol=0)
    assert m.linear.isfinite().all()


def test_rows_are_drawn_by_weight():
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 1e-30, 0.0])
    share = weighted_indices(weights, 40_000).bincount(minlength=6) / 40_000
    torch.testing.assert_close(share, weights.float() / 4, rtol=0, atol=0.02, check_dtype=False)
    many = torch.zeros(2**24 + 5, dtype=torch.float32)
    many[[3, -1]] = 1e-3
    assert weighted_indices(many, 50).unique().tolist() == [3, 2**24 + 4]


def constant():
    """A column without a scale, but for the rounding of its mean."""
    x = torch.randn(270, 2)
    x[:, 1] = 0.3
    return x


def dependent(count):
    x = torch.randn(50, 3)
    x[:, 2] = -3 * x[:, 0] + 1 if count == 2 else x[:, 0] + 2 * x[:, 1]
    return x


def shares():
    return 100 * torch.distributions.Dirichlet(torch.tensor([1.0, 2.0, 3.0])).sample((50,))


NO_MAP = {
    "constant": (constant, r"constant columns \[1\]: drop them"),
    "all constant": (lambda: torch.ones(60, 50), r"constant columns \[0, 1, .*, 19\] and 30 more"),
    "a line": (lambda: dependent(2), r"columns \[0, 2\] take part.*add noise"),
    "a plane": (lambda: dependent(3), r"columns \[0, 1, 2\] take part(?!.*simplex)"),
    "shares": (shares, r"\[0, 1, 2\] take part.*constraints\.simplex"),
    "few rows": (lambda: torch.randn(2, 2), "more rows than dimensions, got 2 rows of 2"),
}


@pytest.mark.parametrize("name", NO_MAP)
def test_rows_that_no_map_whitens_are_refused(name):
    make, message = NO_MAP[name]
    x = make()
    with pytest.raises(ValueError, match=f"(?s){message}"):
        whitening_map(x)
    if "constant" in name:
        velocity, dim = VelocityMLP(x.shape[1], (8,)), x.shape[1]
        transform = InterpolantTransform(velocity, whitening=DiagonalWhitening(dim))
        with pytest.raises(ValueError, match=message):
            set_whitening(InterpolantDistribution(transform), Rows(x, None))


def batches(count, size, weights=None):
    distribution = InterpolantDistribution(interpolant_transform(1, (4,)))
    objective = Objective(distribution.transform.flow, distribution.white_base(), independent)
    return TableBatches(Rows(torch.arange(count)[:, None], None, None, weights), size, objective)


def places(stream):
    return stream.next_rows().w[:, 0]


@pytest.mark.parametrize(("count", "size"), [(12, 4), (12, 12)])
def test_batches_cover_all_rows_each_epoch_in_new_orders(count, size):
    stream, epochs = batches(count, size), []
    for _ in range(3):
        epochs.append(torch.cat([places(stream) for _ in range(count // size)]))
        assert torch.equal(epochs[-1].sort().values, torch.arange(count))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])
    uneven = batches(10, 4)
    assert len(torch.cat([places(uneven) for _ in range(40)]).unique()) == 10


def test_weighted_batches_are_in_proportion():
    weights = torch.tensor([0.0, 1.0, 3.0])
    stream = batches(3, 1000, weights)
    counts = torch.bincount(torch.cat([places(stream) for _ in range(20)]), minlength=3) / 20_000
    assert counts[0] == 0
    torch.testing.assert_close(counts[2].double(), torch.tensor(0.75), rtol=0, atol=0.015)


def test_weighted_moments_are_those_of_repeated_rows():
    x, weights = torch.randn(30, 3), torch.randint(1, 4, (30,)).double()
    repeated = x.repeat_interleave(weights.long(), dim=0)
    found, expected = whitening_map(x, weights), whitening_map(repeated)
    for a, b in zip(found.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a.abs(), b.abs())


def far_off(count):
    """Rows with contexts, a third of them far off and of hardly any weight, and which are near."""
    near = torch.arange(count) % 3 > 0
    context = torch.where(near[:, None], torch.randn(count, 2), torch.full((1, 2), -9999.0))
    weights = torch.where(near, 1.0, 1e-9)
    return Rows(context + torch.randn(count, 2), context, None, weights), near


@pytest.mark.parametrize("embedded", [False, True])
def test_rows_of_hardly_any_weight_do_not_set_the_scales_of_a_network(embedded):
    def buffers(rows):
        velocity = EmbeddedVelocity(2, [(2,)]) if embedded else VelocityMLP(2, (8,), 2)
        transform = ConditionalInterpolantTransform(velocity.double())
        set_whitening(ConditionalInterpolantDistribution(transform), rows)
        return dict(velocity.named_buffers()), transform.flow.whitening

    rows, near = far_off(6000)
    (found, map_), (expected, other) = buffers(rows), buffers(rows.take(near.nonzero()[:, 0]))
    for name in ("loc", "scale") if embedded else ("context_loc", "context_scale", "reach"):
        torch.testing.assert_close(found[name], expected[name], rtol=0.05, atol=0.05)
    torch.testing.assert_close(map_.linear, other.linear, rtol=0.05, atol=0.05)


def test_between_a_base_and_data_the_map_is_one_scale_midway():
    """Of both, and of rows by their weights: a full whitening would bend the shortest path."""
    start = torch.rand(400, 2) * torch.tensor([1.0, 3.0]) + torch.tensor([10.0, 0.0])
    x, weight = torch.rand(400, 2) + 4.0, torch.rand(400)
    base = Samples(start)
    distribution = InterpolantDistribution(interpolant_transform(2, (8,)), base)
    base.sample = lambda shape: start
    set_whitening(distribution, Rows(x, None, None, weight))
    share = (weight / weight.sum())[:, None]
    middle = (share * x).sum(0)
    variance = (share * (x - middle).square()).sum(0)
    whitening = distribution.transform.flow.whitening
    torch.testing.assert_close(whitening.loc, (start.mean(0) + middle) / 2)
    scale = ((start.var(0, correction=0).mean() + variance.mean()) / 2).sqrt()
    torch.testing.assert_close(whitening.matrix(), scale * torch.eye(2))


def test_rows_lie_nearest_to_their_partners_behind_the_map():
    """Of all turns: rows and partners then have a symmetric positive definite product."""
    partners = torch.rand(300, 3) - 0.5
    x = partners @ torch.randn(3, 3) + 0.1 * torch.rand(300, 3)
    distribution = InterpolantDistribution(interpolant_transform(3, (8,)))
    set_whitening(distribution, Rows(x, None, partners))
    whitening = distribution.transform.flow.whitening
    w = whitening.to_white(x)
    torch.testing.assert_close(w.T.cov(), torch.eye(3), atol=0.02, rtol=0.0)
    product = w.T @ partners
    torch.testing.assert_close(product, product.T)
    assert float(torch.linalg.eigvalsh(product).min()) > 0
    torch.testing.assert_close(whitening.from_white(w), x)


def test_rounded_columns_are_noticed_and_spread_and_a_chain_is_not():
    x = torch.randn(2000, 3)
    warn_if_rounded(x)
    warn_if_rounded(x[:500].repeat_interleave(4, dim=0))
    x[:, 1] = (x[:, 1] * 4).round() / 4
    with pytest.warns(UserWarning, match=r"columns \[1\] repeat up to 9\d% .*dequantize"):
        warn_if_rounded(x)
    y = dequantize(x)
    warn_if_rounded(y)
    assert torch.equal(y[:, 0], x[:, 0])
    noise = (y - x)[:, 1]
    assert noise.abs().max() <= 0.125
    assert float(noise.std()) == pytest.approx(0.25 / 12**0.5, rel=0.05)
    assert torch.equal(dequantize(x), y)
    assert not torch.equal(dequantize(x, seed=1), y)
    x[5, 1] = 1e6  # which does not hide the step
    assert (dequantize(x) - x)[:, 1].abs().max() == pytest.approx(0.125, rel=0.01)


def test_columns_that_are_spread_one_at_a_time_have_noise_of_their_own():
    x = torch.randint(0, 6, (2000, 2)).double()
    u, v = (dequantize(column) - column for column in x.T)
    assert abs(float(torch.corrcoef(torch.stack((u, v)))[0, 1])) < 0.1


@pytest.mark.parametrize("offset", [0, 16 * 10**6])
def test_whole_numbers_have_a_step_of_one(offset):
    x = offset + torch.randint(0, 50, (2000, 1))
    noise = dequantize(x.double()) - x
    assert 0.45 < noise.abs().max() <= 0.5
    assert dequantize(x).diff(dim=0).abs().max() < 52
    floats = offset / 100 + torch.randint(0, 50, (2000, 1)).float() / 10
    assert 0.04 < (dequantize(floats) - floats).abs().max() < 0.06


def test_steps_of_ones_own():
    x = torch.arange(12).reshape(6, 2)
    y = dequantize(x, torch.tensor([1.0, 0.0]))
    assert torch.equal(y[:, 1], x[:, 1].double())
    assert (y[:, 0] != x[:, 0]).all()
    frame = pd.DataFrame({"a": x[:, 0], "b": x[:, 1]})
    by_name = dequantize(frame, pd.Series({"b": 0.0, "a": 1.0}))
    assert by_name.equals(dequantize(frame, torch.tensor([1.0, 0.0])))


@pytest.mark.parametrize(
    ("step", "kind", "message"),
    [
        (math.nan, ValueError, "expected finite steps"),
        (-1.0, ValueError, "steps of at least 0, got -1"),
        (torch.ones(3), ValueError, r"one per column, shape \(2,\), got shape \(3,\)"),
        ("1", TypeError, "expected step to be a tensor or an array, got str"),
    ],
)
def test_steps_that_cannot_be_are_refused(step, kind, message):
    with pytest.raises(kind, match=message):
        dequantize(torch.arange(12).reshape(6, 2), step)


def test_columns_that_are_dependent_but_for_rounding_are_told():
    x = torch.randn(2000, 2)
    x[:, 1] = x[:, 0] + 1e-5 * x[:, 1] + 30.0
    whitening_map(x)  # in double precision there is no lack of digits
    with pytest.warns(UserWarning, match=r"columns \[0, 1\] take part.*in float64, centre"):
        whitening_map(x.float())


def test_outliers_are_few_and_far():
    w = torch.randn(1000, 3)
    assert inliers(w).tolist() == list(range(1000))
    w[17] = 1e9
    assert inliers(w).tolist() == [i for i in range(1000) if i != 17] + [0]
    w[:100] += 1e4  # a mode: far, and not rare
    w[17] = 1e9
    assert 17 not in inliers(w)
    assert len(inliers(w).unique()) >= 995


@pytest.mark.parametrize("context", [None, 2])
def test_copies_of_a_row_are_held_out_together(context):
    x = torch.randn(120, 3).repeat_interleave(torch.randint(1, 9, (120,)), dim=0)
    x = x[torch.randperm(len(x))]
    if context is not None:  # the same rows twice, which contexts tell apart
        x = torch.cat((x, x))
        context = torch.arange(2.0, dtype=x.dtype).repeat_interleave(len(x) // 2)[:, None]
    rows = Rows(x, context)
    held, kept = split(rows, len(x) // 4)
    assert 0.1 * len(x) < len(held.w) <= len(x) // 4
    assert len(held.w) + len(kept.w) == len(x)
    assert not torch.isin(keys_of(held), keys_of(kept)).any()
    assert torch.equal(keys_of(Rows.joined([held, kept])).sort()[0], keys_of(rows).sort()[0])


def test_a_row_of_many_copies_is_held_out_no_sooner_than_another():
    x = torch.cat((torch.randn(2000, 1), (torch.randn(400, 1) - 40).repeat(5, 1)))
    held, kept = split(Rows(x, None), 400)
    # Of 400 groups of which a sixth has five rows: a standard deviation of 0.04.
    assert float((held.w < -20).double().mean()) == pytest.approx(0.5, abs=0.13)
    few = torch.cat((torch.zeros(9, 1), torch.randn(40, 1)))  # more copies than are held out
    held, _ = split(Rows(few, None), 4)
    assert len(held.w) == 4
    assert not (held.w == 0).any()


@pytest.mark.parametrize(("share", "dim", "is_sorted"), [(0.06, 1, True), (0.3, 2, False)])
def test_of_a_value_with_a_share_of_all_rows_as_many_are_held_out(share, dim, is_sorted):
    x = torch.randn(4000, dim)
    x[torch.rand(4000) < share] = 0.0
    if is_sorted:
        x = x[x[:, 0].argsort()]
    held, kept = split(Rows(x, None), 400)
    expected = float((x[:, 0] == 0).double().mean())
    error = (expected * (1 - expected) / 400) ** 0.5
    assert float((held.w[:, 0] == 0).double().mean()) == pytest.approx(expected, abs=4 * error)
    assert len(held.w) + len(kept.w) == 4000
    with pytest.warns(UserWarning, match=r"columns \[0(, 1)?\] repeat single values"):
        warn_if_rounded(x)


def split(rows, count):
    order, count = random_order(rows, count)
    return rows.take(order[:count]), rows.take(order[count:])


def test_a_mask_is_of_booleans_without_gaps():
    held, there = np.arange(50) % 7 == 3, np.arange(50) != 10
    gaps = pd.Series(held, dtype="boolean").where(there)
    for mask, message in (
        (held.astype(int), "of booleans, got .*: a mask of 0 and 1 is"),
        (np.ma.masked_array(held, mask=~there), "without missing entries, got 1: write True or"),
        (gaps, "without missing entries, got 1: write True or False"),
    ):
        with pytest.raises(TypeError, match=message):
            mask_of(mask)


def test_a_mask_says_which_rows_are_held_out():
    x, weights = torch.randn(50, 2), torch.ones(50)
    weights[3] = 0.0  # of no weight: neither held out nor learned
    mask, flow = torch.arange(50) % 7 == 3, InterpolantDistribution(interpolant_transform(2))
    for given in (mask, mask.numpy()):
        split = Table(flow, x, given, weights=weights).split(Process(), None)
        assert torch.equal(split.held.w, x[mask & (weights > 0)])
        assert torch.equal(split.kept.w, x[~mask])
    for wrong in (mask[1:], torch.ones_like(mask), mask[:, None]):
        with pytest.raises(ValueError, match=r"mask of .*(shape \(50,\), got|got (0|50) of 50)"):
            Table(flow, x, wrong)
    with pytest.raises(ValueError, match=r"got 0 of 43 rows: those of weight 0 count as absent"):
        Table(flow, x, mask, weights=~mask)


def test_values_that_agree_by_chance_are_held_out_singly():
    flow = InterpolantDistribution(interpolant_transform(1))
    x = torch.randint(18, 80, (2000, 1)).double()
    with pytest.warns(UserWarning, match="repeat"):
        table = Table(flow, x, 0.1)
    split = table.split(Process(), None)
    assert len(split.held.w) == 200
    assert len(split.kept.w.unique()) == len(x.unique())
    x = torch.randn(500, 2).repeat(3, 1)
    copies = Table(InterpolantDistribution(interpolant_transform(2)), x, 0.1)
    split = copies.split(Process(), None)
    assert not torch.isin(split.held.w[:, 0], split.kept.w[:, 0]).any()
