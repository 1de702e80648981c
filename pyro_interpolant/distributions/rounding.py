r"""Rounded values: columns that repeat them, which have no density, and how to compare them.

Single values with a share of all rows have no density either.
"""

import torch
from torch import Tensor

from .._torch import warn_user
from .rows import evenly_spaced, subsample

_CHECKED_ROWS, _CHECKED_COLUMNS = 20_000, 128  # for repeated values
_MIN_CHECKED_ROWS = 100  # rows that tell
REPEATED_SHARE = 0.1  # the share of repeated values in a column from which a user is warned
_REDRAWN_SHARE = 0.5  # the same of a column alone: rows drawn again repeat up to 0.37
ATOM_SHARE = 0.05  # the share of rows from which one value counts as an atom
ATOMS = (
    "repeat single values, such as zeros or a limit, beside others that do not repeat: a share of "
    "rows at one value has no density. Learn the other rows alone, and the share as a probability"
)


def warn_if_rounded(x: Tensor) -> None:
    """Warn where columns repeat their values: rounded and discrete data have no density.

    Rows that repeat as a whole, as a Markov chain's do, count once: in one dimension, or where
    hardly any others are left, those that follow each other, and a share of 1/2 is then noticed.
    A single value that a twentieth of rows have is noticed in any case. Of many columns some are
    looked at; images of whole levels are spread over them later.

    Args:
        x: Rows, shape ``(N, D)``.
    """
    for message in rounded(x)[1]:
        warn_user(message)


def rounded(x: Tensor) -> tuple[bool, list[str]]:
    """Return whether all columns of rows, ``(N, D)``, repeat their values, and what to say.

    Columns that repeat single values count where another is rounded.
    """
    if not x.is_floating_point():
        return False, []
    looked_at = min(x.shape[1], _CHECKED_COLUMNS)
    names = evenly_spaced(x.shape[1], looked_at).tolist()
    x = x[:, names] if looked_at < x.shape[1] else x
    places = subsample(len(x), _CHECKED_ROWS).to(x.device)
    few = x[places]
    enough = len(few) >= _MIN_CHECKED_ROWS
    atoms = [i for i, column in enumerate(few.T) if enough and atoms_in(column)]
    if x.shape[1] > 1 or not _is_sorted(x[:, 0]):
        few = few[(places == 0) | (few != x[places - 1]).any(1)]
    distinct, limit = torch.unique(few, dim=0), _REDRAWN_SHARE
    if x.shape[1] > 1 and len(distinct) >= _MIN_CHECKED_ROWS:
        few, limit = distinct, REPEATED_SHARE
    found, shares = list[int](), [0.0]
    if len(few) >= _MIN_CHECKED_ROWS:
        counts = [len(torch.unique(column)) for column in few.T]
        shares = [1 - count / len(few) if count > 1 else 0.0 for count in counts]
        found = [i for i, share in enumerate(shares) if share > limit and i not in atoms]
    messages = [f"columns {[names[i] for i in atoms]} {ATOMS}"] if atoms else []
    if found:
        messages.append(
            f"columns {[names[i] for i in found]} repeat up to {max(shares):.0%} of their values, "
            "as rounded or discrete data do, which have no density: a flow learns spikes. Spread "
            "them over their rounding step first, fit(distribution, dequantize(x))"
        )
    return len(found) > 0 and len(found) + len(atoms) == len(names), messages


def _is_sorted(column: Tensor) -> bool:
    """Return whether values, shape ``(N,)``, come in order: equal ones then follow each other."""
    steps = column.diff()
    return bool((steps >= 0).all()) or bool((steps <= 0).all())


def atoms_in(column: Tensor) -> bool:
    """Return whether few values repeat, shape ``(N,)``, beside others that hardly do."""
    _, counts = torch.unique(column, return_counts=True)
    others = counts[counts < ATOM_SHARE * len(column)]
    rows = int(others.sum())
    return len(column) > rows > ATOM_SHARE * len(column) and (
        len(others) >= (1 - REPEATED_SHARE) * rows
    )


def are_close(one: Tensor, other: Tensor, rtol: float = 1e-5) -> bool:
    """Return whether values, of shapes that broadcast, are the same but for rounding, in any unit.

    Beside an absolute tolerance, such as that of :func:`torch.allclose`, all small numbers are the
    same; here it is a rounding of the largest.

    Args:
        one: Values.
        other: Other ones, of the same type.
        rtol: How far apart they may be, as a share of each.
    """
    size = max(_largest(one), _largest(other))
    eps = torch.finfo(one.dtype).eps if one.is_floating_point() else 0.0
    return torch.allclose(one, other, rtol=rtol, atol=8 * eps * size, equal_nan=True)


def _largest(x: Tensor) -> float:
    """Return the largest size of finite numbers; 0 if there are none."""
    x = x.detach().double().nan_to_num(0.0, 0.0, 0.0)
    return float(x.abs().max()) if x.numel() else 0.0
