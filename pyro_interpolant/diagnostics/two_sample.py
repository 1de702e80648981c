r"""Can a classifier tell two sets of draws apart? 1/2 is the best that it can be fooled to.

References:
    Lopez-Paz & Oquab, *Revisiting classifier two-sample tests*, ICLR 2017, arXiv 1610.06545;
    Lueckmann et al., AISTATS 2021, arXiv 2101.04653 (the classifier).
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from .._package import needing
from .._torch import robust_deviation
from ..distributions.rounding import ATOM_SHARE, rounded
from ..distributions.rows import RowsLike, checked_rows, in_order, named_columns

_FOLDS = 5
_WIDTH_PER_COLUMN = 10  # of both hidden layers
_STEPS = 1000  # at most
_FAR = 20.0  # deviations of x's middle 90%, beyond which distances are logarithmic
_LEVEL = 3.0  # standard errors beyond 1/2 that chance does not reach
_SEEDS = 2**32  # that scikit-learn has


class TwoSampleTest(NamedTuple):
    """How well a classifier tells two sets of draws apart.

    Attributes:
        accuracy: The share of draws that it assigns to the right set, of those it was not trained
            on: 0.5 where the sets are alike, 1 where they are apart.
        stderr: Its standard error, of sets that are alike, as if each distinct draw were tried by
            a classifier of its own. Five folds share most of what they learn from: of them it is
            too small, by 1.2 to 1.4.
        verdict: What follows, in a sentence.
    """

    accuracy: float
    stderr: float
    verdict: str

    def __repr__(self) -> str:
        """Say the verdict."""
        return self.verdict


def c2st(x: RowsLike, y: RowsLike, *, folds: int = _FOLDS, seed: int = 0) -> TwoSampleTest:
    """Compare two sets of draws by a classifier: scikit-learn's network, in five folds.

    It has two hidden layers of ten units a column, and sees columns in units of those of x. What
    is farther than 20 deviations of its middle 90% is drawn in by a logarithm: one far draw must
    not hide all else. Of the larger set as many draws are taken as the smaller one has. (``pip
    install scikit-learn``)

    Args:
        x: Draws, shape ``(N, D)``, a data frame or draws by name.
        y: Other draws, shape ``(M, D)``; where both have names, columns are compared by them.
        folds: In how many of the five the classifier is tried: one takes a fifth of the time.
        seed: Of the folds and of the network.

    Raises:
        ImportError: If scikit-learn is not installed.
        TypeError: If the draws are not of a floating type.
        ValueError: If they are of other shapes or names, not finite, or fewer than 20, or the
            folds are not 1 to 5.

    Example:
        >>> c2st(torch.randn(100, 1), torch.randn(100, 1) + 5).accuracy > 0.9
        True
    """
    rows, names = named_columns(x, "x")
    one = checked_rows(rows, "x").double().cpu()
    rows = in_order(*named_columns(y, "y"), names, "y")
    other = checked_rows(rows, "y", (one.shape[1],)).double().cpu()
    count = min(len(one), len(other))
    if count < 4 * _FOLDS:
        raise ValueError(f"expected at least {4 * _FOLDS} draws on either side, got {count}")
    if folds not in range(1, _FOLDS + 1):
        raise ValueError(f"expected folds from 1 to {_FOLDS}, got {folds}")
    with needing("c2st", "scikit-learn"):
        from sklearn.model_selection import cross_val_score
        from sklearn.neural_network import MLPClassifier

    generator = torch.Generator().manual_seed(seed)
    sets = [part[torch.randperm(len(part), generator=generator)[:count]] for part in (one, other)]
    group = _copies(torch.cat(sets))
    middle, unit = sets[0].median(0).values, robust_deviation(sets[0])
    sets = [_squeezed((part - middle) / unit) for part in sets]
    loc, scale = sets[0].mean(0), sets[0].std(0)
    scale = scale.where(scale > 0, torch.cat(sets).std(0))
    scale = scale.where(scale > 0, 1.0)
    both = ((torch.cat(sets) - loc) / scale).numpy()
    labels = np.repeat([0, 1], count)
    width = _WIDTH_PER_COLUMN * both.shape[1]
    network = MLPClassifier((width, width), max_iter=_STEPS, random_state=seed % _SEEDS)
    splits = _splits(labels, group, seed)[: int(folds)]
    # Each set counts the same: where copies leave more of one to learn from, fewer are tried.
    each = cross_val_score(network, both, labels, cv=splits, scoring="balanced_accuracy")
    accuracy = float(each.mean())
    tried = sum(len(test) for _, test in splits)
    copies = np.bincount(group[np.concatenate([test for _, test in splits])])
    stderr = 0.5 * math.sqrt(np.square(copies).sum()) / tried
    apart = accuracy > 0.5 + _LEVEL * stderr
    word = "tells the sets apart" if apart else "cannot tell the sets apart"
    verdict = (
        f"a classifier {word}: it is right for {accuracy:.3f} of {tried:,} draws, where "
        f"chance is 0.500 ± {stderr:.3f}"
    )
    return TwoSampleTest(accuracy, stderr, verdict)


def _copies(rows: torch.Tensor) -> np.ndarray:
    """Return one integer per row, shape ``(N,)``, which copies of a row share, and no others.

    Rows, shape ``(N, D)``, that are equal by chance are no copies: those of rounded columns alone,
    and a value that a twentieth of them have.
    """
    found, group, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
    by_chance = (counts[group] > ATOM_SHARE * len(rows)) | rounded(rows)[0]
    return group.where(~by_chance, len(found) + torch.arange(len(rows))).numpy()


def _splits(
    labels: np.ndarray, group: np.ndarray, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return which rows to learn from and to try, in each fold: a group, ``(N,)``, in one of them.

    As many of each label, shape ``(N,)``: where a fold has more of one, the rest have fewer, and a
    classifier that has learned that alone is wrong more often than not.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    settings = {"n_splits": _FOLDS, "shuffle": True, "random_state": seed % _SEEDS}
    if len(np.unique(group)) == len(group):
        return list(StratifiedKFold(**settings).split(labels, labels))
    return list(StratifiedGroupKFold(**settings).split(labels, labels, group))


def _squeezed(z: torch.Tensor) -> torch.Tensor:
    """Return numbers as they are up to 20, and their order beyond."""
    beyond = (z.abs() - _FAR).clamp(min=0.0)
    return z - z.sign() * (beyond - beyond.log1p())
