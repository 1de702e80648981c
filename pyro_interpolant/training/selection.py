r"""Which weights of a run are kept: the latest that rows held out do not speak against.

The scores of a flow on rows held out are their :math:`-\log\rho`, or losses where there is no
density, or none beyond bounds of the base. The regression loss is a poor judge of a density: its
error at a time t counts in it by about :math:`1 / (1 - t)`, and given data early times are learned
by heart first. Of two flows the scores of the same rows are compared: what all flows find hard
says nothing.

References:
    Breiman, Friedman, Olshen & Stone, *Classification and regression trees*, 1984, section 3.4.3
    (the rule of one standard error).
"""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FIRST_STEPS = 500  # before which averages of few weights wander by more than plateaus do
_KEPT_ERRORS, _WORSE_ERRORS = 1.0, 2.0  # standard errors: of the weights kept, and of a run's end
_WORST = 1e6  # of a row: one without a density must not hide the others


class Scores(NamedTuple):
    """How hard a flow finds rows, each: lower is better.

    Attributes:
        values: One number for each row, float64, shape ``(N,)``.
        shares: The share of each in their mean, shape ``(N,)``.
        groups: Whole numbers that are the same for copies of a row, which are one, ``(N,)``.
    """

    values: Tensor
    shares: Tensor
    groups: Tensor

    @classmethod
    def equal(cls, values: Tensor) -> "Scores":
        """Return scores of rows that differ and weigh the same."""
        values = values.flatten().double()
        shares = torch.full_like(values, 1 / len(values))
        return cls(values, shares, torch.arange(len(values), device=values.device))

    def mean(self) -> float:
        """Return the mean."""
        return float(self.shares @ self.values)

    def error(self) -> float:
        """Return its standard error; NaN of one row."""
        share = self._of_groups(self.shares)
        parts = self._of_groups(self.shares * (self.values - self.mean()))
        count = len(share)
        return float(parts.norm()) * math.sqrt(count / (count - 1)) if count > 1 else math.nan

    def bulk_error(self) -> float:
        """Return what it would be if all values were spread as the middle half is.

        A few rows that became impossible lower the mean, and are no doubt about it.
        """
        spread = 1.4826 * (self.values - self.values.median()).abs().median()
        return float(spread * self._of_groups(self.shares).norm())

    def _of_groups(self, values: Tensor) -> Tensor:
        """Return the sums of values over copies of rows."""
        return values.new_zeros(int(self.groups.max()) + 1).index_add(0, self.groups, values)


def rises(
    steps: Sequence[int],
    values: Sequence[float],
    patience: float,
    wander: float,
    share: float = 0.0,
) -> bool:
    """Return whether the lowest value is long ago, and values have risen since.

    The mean of the later half lies above the lowest, and above that of the earlier half: a few
    steps gone wrong lift what is measured of averaged weights, for as long as they remember them,
    and it then comes down again.

    Args:
        steps: The steps of looks.
        values: What each has seen; what is not finite is no lowest one.
        patience: What is long, a percentage of the steps up to the lowest.
        wander: How far values on a plateau may be above the lowest.
        share: That as a share of the lowest, where it is more.
    """
    found = [value if math.isfinite(value) else math.inf for value in values]
    lowest = min(range(len(found)), key=found.__getitem__)
    since, count = steps[-1] - steps[lowest], len(found) - 1 - lowest
    is_early = steps[-1] < _FIRST_STEPS or since < patience / 100 * steps[lowest]
    if is_early or not count or found[lowest] == math.inf:
        return False
    half = -(count + 1) // 2
    earlier, later = found[-count - 1 : half], found[half:]
    wander = max(wander, share * abs(found[lowest]))
    return fmean(later) > max(found[lowest] + wander, fmean(earlier))


class Selection:
    """The scores of averaged weights over time: which are kept, and whether they get worse.

    Attributes:
        best: The lowest mean score so far.
        kept_step: The step of the weights to keep, the latest whose mean is within a standard
            error of the best: later ones have seen a lower learning rate.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.means: list[float] = []
        self.best, self.kept_step, self.error = math.inf, 0, 0.0
        self.best_values: Tensor | None = None

    def judge(self, step: int, scores: Scores) -> bool:
        """Take the scores of a step, and return whether its weights are to be kept."""
        if not bool(scores.values.isfinite().any()):
            scores = scores._replace(values=torch.full_like(scores.values, math.inf))
        else:
            values = scores.values.nan_to_num(nan=_WORST, posinf=_WORST, neginf=-_WORST)
            scores = scores._replace(values=values)
        mean = scores.mean()
        self.steps.append(step)
        self.means.append(mean)
        if mean < self.best:
            self.best, self.best_values, self.error = mean, scores.values, 0.0
        elif self.best_values is not None:
            best = self.best_values.to(scores.values)  # a state is read to the CPU
            self.error = scores._replace(values=scores.values - best).bulk_error()
        is_kept = mean < math.inf and mean <= self.best + _KEPT_ERRORS * self.error
        if is_kept:
            self.kept_step = step
        return is_kept

    def is_worse(self, patience: float) -> bool:
        """Return whether means have risen by more than two standard errors, see :func:`rises`.

        They have not where the last weights are to be kept.
        """
        is_kept = self.kept_step == self.steps[-1]
        return not is_kept and rises(self.steps, self.means, patience, _WORSE_ERRORS * self.error)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state as tensors and numbers."""
        numbers = {name: value for name, value in vars(self).items() if name != "best_values"}
        tensors = {} if self.best_values is None else {"best_scores": self.best_values}
        return tensors, numbers

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take a state back."""
        self.__dict__.update(numbers)
        self.best_values = tensors.get("best_scores")
