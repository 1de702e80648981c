"""A classifier between two sets of draws: alike, apart, and what it refuses."""

import numpy as np
import pytest
import torch

from pyro_interpolant.diagnostics import c2st

pytest.importorskip("sklearn")


def test_sets_that_are_alike_cannot_be_told_apart():
    found = c2st(torch.randn(400, 2), torch.randn(500, 2))
    assert abs(found.accuracy - 0.5) < 3 * found.stderr
    assert found.stderr == pytest.approx(0.5 / 800**0.5)
    assert found.verdict.startswith("a classifier cannot tell the sets apart: it is right for 0.")


def test_of_the_larger_set_draws_are_taken_from_all_over_by_the_seed(monkeypatch):
    """A chain comes in its order, and its beginning is not all of it."""
    seen = []

    def tried(network, rows, labels, cv, scoring):
        seen.append((network.random_state, rows[labels == 1], [test.tolist() for _, test in cv]))
        return np.array([0.5])

    monkeypatch.setattr("sklearn.model_selection.cross_val_score", tried)
    x, y = torch.randn(100, 1), torch.linspace(-1, 1, 1000)[:, None]
    for seed in (0, 0, 1):
        c2st(x, y, seed=seed)
    assert abs(np.median(seen[0][1])) < 0.4
    assert [state for state, *_ in seen] == [0, 0, 1]
    assert np.array_equal(seen[0][1], seen[1][1])
    assert not np.array_equal(seen[0][1], seen[2][1])
    assert seen[0][2] == seen[1][2] != seen[2][2]


def zero_inflated(count):
    return torch.randn(count, 2) * (torch.rand(count, 1) < 0.5)


@pytest.mark.parametrize(
    ("x", "y", "are_copies"),
    [
        (lambda: torch.randn(60, 2)[torch.randint(60, (200,))], lambda: torch.randn(200, 2), True),
        (lambda: torch.poisson(torch.full((200, 3), 2.0)), lambda: torch.ones(200, 3), False),
        (lambda: zero_inflated(200), lambda: zero_inflated(200), False),
    ],
    ids=["redrawn", "counts", "zeros"],
)
def test_copies_are_in_one_fold_and_what_is_equal_by_chance_is_not(monkeypatch, x, y, are_copies):
    """Copies in other folds would tell a classifier of those that it is tried on."""
    seen = []

    def tried(network, rows, labels, cv, scoring):
        for learned, test in cv:
            assert len(learned) + len(test) == len(rows)
            assert scoring == "balanced_accuracy"
            both = {tuple(row) for row in rows[learned]} & {tuple(row) for row in rows[test]}
            seen.append(len(both))
            assert 0.3 < labels[test].mean() < 0.7
        return np.array([0.5])

    monkeypatch.setattr("sklearn.model_selection.cross_val_score", tried)
    found = c2st(x(), y())
    assert (sum(seen) == 0) is are_copies
    assert (found.stderr > 1.1 * 0.5 / 400**0.5) is are_copies


@pytest.mark.slow
def test_sets_that_differ_only_in_how_columns_depend_are_told_apart():
    """The best classifier of N(0, I) and N(0, C), C of correlation 0.9, is right for 0.75.

    In any units of the columns.
    """
    scale, shift = torch.tensor([1e-20, 1e6]), torch.tensor([0.0, 5e8])
    x = torch.randn(800, 2)
    y = torch.randn(800, 2) @ torch.linalg.cholesky(torch.tensor([[1, 0.9], [0.9, 1.0]])).T
    found = c2st(x * scale + shift, y * scale + shift, folds=2)
    assert 0.68 < found.accuracy < 0.82
    assert "tells the sets apart" in repr(found)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match=r"y of shape \(N, 2\), got \(30, 3\)"):
        c2st(torch.randn(30, 2), torch.randn(30, 3))
    with pytest.raises(ValueError, match="at least 20 draws on either side, got 9"):
        c2st(torch.randn(30, 2), torch.randn(9, 2))
    with pytest.raises(ValueError, match="folds from 1 to 5, got 6"):
        c2st(torch.randn(30, 2), torch.randn(30, 2), folds=6)


@pytest.mark.slow
def test_a_constant_column_hides_nothing():
    x, y = torch.randn(60, 2), torch.randn(60, 2)
    x[:, 1], y[:, 1] = 1.0, 1 + 1e-3 * y[:, 1].abs()
    assert c2st(x, y).accuracy > 0.9


@pytest.mark.slow
def test_columns_are_compared_by_their_names():
    pd = pytest.importorskip("pandas")
    x = pd.DataFrame(torch.randn(400, 2).numpy() + [0.0, 10.0], columns=["a", "b"])
    y = pd.DataFrame(torch.randn(400, 2).numpy() + [0.0, 10.0], columns=["a", "b"])[["b", "a"]]
    assert abs(c2st(x, y, folds=1).accuracy - 0.5) < 0.3
    draws = {name: y[name].to_numpy() for name in y}
    assert c2st(x, draws, folds=1) == c2st(x, y, folds=1)
    with pytest.raises(ValueError, match=r"y with the columns \['a', 'b'\].*got \['b', 'c'\]"):
        c2st(x, y.rename(columns={"a": "c"}))


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_a_far_draw_hides_nothing(which):
    sets = [torch.randn(200, 1), torch.randn(200, 1) + 3]
    sets[which][0] = 1e6
    assert c2st(*sets, folds=1).accuracy > 0.85
