"""Which weights are kept, and when a run ends, by hand-made scores of rows held out."""

import math

import torch

from pyro_interpolant.training.selection import Scores, Selection, rises

ROWS = torch.linspace(-1, 1, 400).double()  # what all flows find hard, and is no difference


def judged(means, spread=0.0, every=500):
    """Return a selection, and whether it kept each of scores that have these means.

    Args:
        means: The means.
        spread: The standard deviation, over rows, of the difference from the first.
        every: The number of steps between two.
    """
    selection, kept = Selection(), []
    normal = torch.special.ndtri((torch.arange(400) + 0.5).double() / 400)
    for i, mean in enumerate(means):
        values = mean + 3 * ROWS + (spread * normal if i else 0.0)
        kept.append(selection.judge(every * (i + 1), Scores.equal(values)))
    return selection, kept


def test_what_is_kept_is_the_latest_within_a_standard_error_of_the_best():
    # A spread of 2 over 400 rows: a standard error of 0.1.
    selection, kept = judged([1.0, 1.05, 1.2, 1.09, 1.11], spread=2.0)
    assert kept == [True, True, False, True, False]
    assert selection.kept_step == 2000
    assert math.isclose(selection.error, 0.1, rel_tol=0.01)


def test_what_rows_have_in_common_is_no_doubt():
    """Scores that differ by a constant are as sure as can be, however far rows lie apart."""
    assert judged([1.0, 1.0 + 1e-6])[1] == [True, False]


def test_rows_that_became_impossible_are_no_doubt_of_the_others():
    """By its standard error a mean that a single row lowers would never be worse."""
    selection, values = Selection(), 3 * ROWS
    selection.judge(500, Scores.equal(values))
    values = values + 0.01 * torch.randn(400).double()
    values[7] += 500.0
    assert not selection.judge(1000, Scores.equal(values))
    assert selection.is_worse(30)


RUNS = {
    "rising": ([1.0, 1.1, 1.2, 1.3, 1.4], 0.5, True),
    "risen, and level": ([1.0, 1.2, 1.3, 1.3, 1.3], 0.5, True),
    "level": ([1.0, 1.01, 1.02, 1.01, 1.02], 0.5, False),
    "rising by less than chance does": ([1.0, 1.1, 1.2, 1.3, 1.4], 5.0, False),
    "coming down again": ([1.0, 1.6, 1.4, 1.3, 1.2], 0.5, False),
    "one look since": ([1.0, 1.5], 0.5, True),
    "as good again, after a bad look": ([1.0, 1.1, 1.1, 1.9, 1.09], 2.0, False),
    "falling": ([1.4, 1.3, 1.2, 1.1, 1.0], 0.5, False),
    "no number at any look": ([math.nan, math.nan], 0.5, False),
}


def test_a_run_ends_where_it_gets_worse_and_not_where_it_comes_back():
    for name, (means, spread, is_worse) in RUNS.items():
        assert judged(means, spread)[0].is_worse(30) is is_worse, name


def test_a_run_does_not_end_early():
    assert not judged([1.0, 1.5], every=200)[0].is_worse(30)
    long_best = judged([1.4, 1.3, 1.2, 1.0, 1.1, 1.2])[0]  # the best at step 2,000, now 3,000
    assert not long_best.is_worse(60)
    assert long_best.is_worse(40)


def test_a_row_without_a_density_hides_no_other():
    selection = Selection()
    values = torch.tensor([math.inf, 2.0, 3.0]).double()
    assert selection.judge(1, Scores.equal(values))
    assert selection.judge(2, Scores.equal(values - 1))  # better
    assert not selection.judge(3, Scores.equal(values.nan_to_num(nan=0.0, posinf=math.nan)))
    assert selection.kept_step == 2
    assert not Selection().judge(1, Scores.equal(torch.full((3,), math.nan)))


def test_copies_of_a_row_are_one_and_weights_count():
    one = Scores.equal(torch.tensor([0.0, 1.0, 4.0]))
    each = torch.tensor([0, 0, 1, 1, 2, 2])
    twice = Scores(one.values[each], torch.full((6,), 1 / 6).double(), each)
    assert math.isclose(twice.mean(), one.mean())
    assert math.isclose(twice.error(), one.error())
    assert math.isclose(twice.bulk_error(), one.bulk_error())
    assert math.isclose(one.error(), float(one.values.std()) / math.sqrt(3))
    weighted = Scores(one.values, torch.tensor([0.0, 0.5, 0.5]).double(), one.groups)
    assert weighted.mean() == 2.5


def test_a_state_goes_on_as_if_nothing_had_happened():
    selection = judged([1.0, 1.2], spread=2.0)[0]
    other = Selection()
    other.restore(*selection.state())
    for found in (selection, other):
        found.judge(1500, Scores.equal(1.05 + 3 * ROWS))
    assert vars(selection).keys() == vars(other).keys()
    for name, value in vars(selection).items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, vars(other)[name])


RISES = {
    "rising": ([-6.0, -5.9, -5.8, -5.7, -5.6], True),
    "level": ([-6.0, -5.99, -5.98, -5.99, -5.98], False),
    "coming down again": ([-6.0, -5.4, -5.6, -5.7, -5.8], False),
    "no number at a look": ([math.nan, -6.0, -5.0], True),
    "no number at any look": ([math.nan, math.nan], False),
}


def test_losses_rise_by_a_share_of_the_lowest():
    for name, (losses, found) in RISES.items():
        steps = [500 * (i + 1) for i in range(len(losses))]
        assert rises(steps, losses, 30, 0.01, 0.02) is found, name
