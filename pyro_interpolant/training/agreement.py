r"""Whether draws of a trained flow agree with the rows held out, and a warning where they do not.

Each column is compared by distribution functions, which no unit, spline or wild value changes:
:math:`\max_x |F_\text{draws}(x) - F_\text{rows}(x)|`, and how many draws lie beyond the farthest
rows. All of them together, with their contexts, are compared by the energy distance
:math:`2 E|z - z'| - E|z - \tilde z| - E|z' - \tilde z'|` of draws z and rows z', each column in
units of the distribution function of the rows.

References:
    Szekely & Rizzo, *Energy statistics*, J. Stat. Plan. Inference 143 (2013).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .._torch import seeded, warn_user
from ..distributions.interpolant import AnyDistribution
from ..distributions.joint import column_names
from ..distributions.supports import CircularSupport
from ..interpolants.nonlinear import wrap
from .rows import Rows

_MOST_ROWS = 1000  # that are compared
_DRAWS = (200, 1000)  # the fewest and the most that they are compared with; else two for each row
# Of 62 fits of 11 kinds of data, in 20 to 300 steps: where the draws' interquartile range was
# within 1.7 times the rows', differences were up to 0.10 beyond chance, tails up to 2.5 times as
# frequent as the rows', and energies up to 0.02 beyond chance. Where far values had flattened the
# bulk of the draws, these three were 0.18 to 0.47, up to 20 times, and 0.10 to 0.31.
_MOST_DIFFERENCE = 0.15  # of two distribution functions, beyond chance
_MOST_TIMES = 5.0  # that draws lie beyond the farthest rows more or less often than rows do
_MOST_ENERGY = 0.05  # beyond chance, of the mean distance between draws and rows
_CHANCE = 2.0  # of such a difference, in units of sqrt(1/n + 1/m): exceeded once in 3,000 times
_TAIL_CHANCE = 4.0  # standard deviations of the number of draws beyond the farthest rows
_TAIL_ROWS, _TAIL_SHARE = 5, 0.01  # the farthest: so many, or this share if that is more
_SHUFFLES = 50  # that tell which energies are chance
_NAMED_COLUMNS = 3  # that a warning names


def disagreement(draws: Tensor, rows: Tensor, context: Tensor | None, names: Sequence[str]) -> str:
    """Return in words how draws differ from rows, nothing where they do not.

    They do where a column of theirs differs by more than chance and what good fits do, or its
    tails alone; else where all of them together have another energy.

    Args:
        draws: Draws, shape ``(M, D)``, of as many for each row, the rows over and over.
        rows: Rows, shape ``(N, D)``.
        context: The contexts of the rows, shape ``(N, C)``, or None.
        names: Those of the columns.
    """
    z, y = _in_units(draws, rows), _in_units(rows, rows)
    parts = _columns_off(draws, rows, _differences(z, y), names)
    if not parts:
        if context is not None:
            c = _in_units(context, context)
            z, y = torch.cat((z, c.repeat(len(draws) // len(rows), 1)), 1), torch.cat((y, c), 1)
        energy = _energy(z, y)
        if energy > _MOST_ENERGY:
            parts = [
                "columns of draws do not depend on each other, or on contexts, as those of the "
                f"rows held out (an energy distance {energy:.0%} of the mean one)"
            ]
    more = f"; and so {len(parts) - _NAMED_COLUMNS} more" if parts[_NAMED_COLUMNS:] else ""
    return "; ".join(parts[:_NAMED_COLUMNS]) + more


def _columns_off(
    draws: Tensor, rows: Tensor, difference: Tensor, names: Sequence[str]
) -> list[str]:
    """Return what is off in words, for each column where something is, the worst first.

    Args:
        draws: Draws, shape ``(M, D)``.
        rows: Rows, shape ``(N, D)``.
        difference: The largest difference of their distribution functions, shape ``(D,)``.
        names: Those of the columns.
    """
    n, m = len(rows), len(draws)
    middle = rows.median(0).values
    far, reach = (draws - middle).abs(), (rows - middle).abs()
    count = min(n, max(_TAIL_ROWS, int(_TAIL_SHARE * n)))
    beyond = (far >= reach.topk(count, dim=0).values[-1]).double().sum(0) * n / m
    ranges, times = _range(draws) / _range(rows), beyond / count
    wrong = difference > _MOST_DIFFERENCE + _CHANCE * math.sqrt(1 / n + 1 / m)
    off = 2 * (beyond.sqrt() - math.sqrt(count)) / math.sqrt(1 + n / m)
    often = (times > _MOST_TIMES) | (times < 1 / _MOST_TIMES)
    wrong_tails = often & (off.abs() > _TAIL_CHANCE)
    parts = []
    for i in difference.argsort(descending=True).tolist():
        if bool(wrong[i]):
            parts.append(
                f"{names[i]} of draws has {float(ranges[i]):.2g} times the interquartile range of "
                "the rows held out, and the shares below a value differ by up to "
                f"{100 * float(difference[i]):.0f} percentage points"
            )
        elif bool(wrong_tails[i]):
            parts.append(
                f"{names[i]} of draws is beyond the farthest rows held out "
                f"{float(times[i]):.2g} times as often as theirs"
            )
    return parts


def _in_units(x: Tensor, rows: Tensor) -> Tensor:
    """Return values in units of the distribution function of rows, both of shape ``(*, D)``.

    It is linear between rows; values that repeat have the middle of their step.
    """
    found = []
    for column, known in zip(x.T, rows.T, strict=True):
        values, repeats = torch.unique(known, return_counts=True)
        levels = (repeats.cumsum(0) - 0.5 * repeats) / len(known)
        found.append(np.interp(column.numpy(), values.numpy(), levels.numpy(), 0.0, 1.0))
    return torch.from_numpy(np.stack(found, axis=1))


def _differences(z: Tensor, y: Tensor) -> Tensor:
    """Return the largest difference of distribution functions by column, shape ``(D,)``."""
    found = []
    for a, b in zip(z.T, y.T, strict=True):
        at, (a, b) = torch.unique(b), (a.sort().values, b.sort().values)
        shares = [
            (torch.searchsorted(s, at) + torch.searchsorted(s, at, right=True)) / (2 * len(s))
            for s in (a, b)
        ]
        found.append((shares[0] - shares[1]).abs().max())
    return torch.stack(found)


def _range(x: Tensor) -> Tensor:
    low, high = torch.quantile(x, x.new_tensor([0.25, 0.75]), dim=0)
    return high - low


def _energy(z: Tensor, y: Tensor) -> float:
    """Return the energy distance of draws and rows, beyond chance, over their mean distance."""
    n, m = len(y), len(z)
    both = torch.cat((y, z))
    distance = torch.cdist(both, both)
    signs = torch.cat((both.new_full((n,), 1 / n), both.new_full((m,), -1 / m)))
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(n + m, generator=generator) for _ in range(_SHUFFLES)]
    shuffled = torch.stack([signs, *(signs[order] for order in orders)])
    energies = -((shuffled @ distance) * shuffled).sum(1)
    chance = 2 * energies[1:].max() - energies[1:].mean()
    return float((energies[0] - chance) / (2 * distance[:n, n:].mean()).clamp(min=1e-9))


@torch.no_grad()
def warn_if_draws_differ(distribution: AnyDistribution, held: Rows, kept: Rows) -> None:
    """Warn where draws of a trained flow are not like the rows held out.

    These may be unlike all others, as a group is that a user holds out: it is said where draws are
    like the rows trained on.

    Args:
        distribution: The distribution of the flow.
        held: The rows held out, in the flow's coordinates, with contexts and weights.
        kept: Those trained on.
    """
    where = ""
    with seeded(0):  # the global generator is the user's
        rows, draws = _compared(distribution, held)
        wild = int((~torch.isfinite(draws).all(1)).sum())
        found = f"{wild} of {len(draws)} draws are not finite"
        if not wild:
            found = _difference(distribution, rows, draws)
        if found and not wild:
            rows, again = _compared(distribution, kept)
            if not _difference(distribution, rows, again):
                where = ", or the rows held out are unlike those trained on, which draws are like"
    if found:
        warn_user(
            f"the fit came out wrong{where}: {found}. Train longer, or with a wider network; look "
            "for far values, which flatten all others: remove them, choose the support that the "
            "data have, or try from_samples(..., marginals=True)"
        )


def _difference(distribution: AnyDistribution, rows: Rows, draws: Tensor) -> str:
    """Return how draws, shape ``(M, D)``, differ from rows, in words; else nothing."""
    context = None if rows.context is None else rows.context.double().cpu()
    there = _unconstrained(distribution, rows.w.to(draws)).double().cpu()
    draws = _unconstrained(distribution, draws).double().cpu()
    return disagreement(draws, there, context, column_names(distribution))


def _compared(distribution: AnyDistribution, rows: Rows) -> tuple[Rows, Tensor]:
    """Return rows, and draws for them, ``(M, D)``, in turns."""
    bare = distribution.without_support()

    def drawn(rows: Rows, times: int) -> Tensor:
        if rows.context is None:
            return bare.given(None).sample((times * len(rows.w),))
        return bare.given(rows.context.repeat(times, 1)).sample()

    rows = rows.repeated(min(_MOST_ROWS, len(rows.w), math.ceil(rows.effective())))
    least, most = _DRAWS
    count = len(rows.w)
    return rows, drawn(rows, math.ceil(max(least, min(most, 2 * count)) / count))


def _unconstrained(distribution: AnyDistribution, u: Tensor) -> Tensor:
    """Return values of the flow's coordinates, ``(*, D)``, in front of any Gaussianizing map."""
    x = distribution.gaussianizer(u)
    return wrap(x) if isinstance(distribution.space, CircularSupport) else x
