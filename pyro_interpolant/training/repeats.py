r"""Values that repeat: rounded columns, single values with a share of all rows, copies of rows.

Copies of a row, as a Markov chain that stands still makes, are held out together: those left in
one part would tell the other's. Rows that many others equal by chance are no copies: of zeros, or
of a limit, as many are held out as of any others.
"""

import torch
from torch import Tensor

from .._torch import warn_user
from .rows import Rows, keys_of, row_keys, subsample

_CHECKED_ROWS, _CHECKED_COLUMNS = 20_000, 128  # for repeated values
_MIN_CHECKED_ROWS = 100  # rows that tell
REPEATED_SHARE = 0.1  # the share of repeated values in a column from which a user is warned
_REDRAWN_SHARE = 0.5  # the same of a column alone: rows drawn again repeat up to 0.37
_ATOM_SHARE = 0.05  # the share of rows from which one value counts as an atom
_SHARED_SHARE = 0.01  # the share of rows that no row of a chain has, if they do not follow it
_MIN_SHARED = 10  # rows, for a share to tell
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
    names = (torch.arange(looked_at) * x.shape[1] // looked_at).tolist()
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
    others = counts[counts < _ATOM_SHARE * len(column)]
    rows = int(others.sum())
    return len(column) > rows > _ATOM_SHARE * len(column) and (
        len(others) >= (1 - REPEATED_SHARE) * rows
    )


def copy_keys(rows: Rows) -> Tensor:
    """Return one integer per row, shape ``(N,)``, which copies of a row share, and no others."""
    keys = keys_of(rows)
    return told_apart(keys, shared_keys(rows, keys))


def shared_keys(rows: Rows, keys: Tensor) -> Tensor:
    """Return the keys that rows share by chance, shape ``(K,)``, and not as copies do.

    Where all columns are rounded, they are all that repeat. Else those of 10 rows or more that are

    - a hundredth of all rows, not counting any that follows its equal, as a Markov chain's do, or
    - a twentieth of them;

    and none where other rows repeat, too, as shuffled chains and rows drawn by weight do.

    Args:
        rows: The rows.
        keys: Theirs, which are equal where rows and contexts are, shape ``(N,)``.
    """
    found, group, counts = keys.unique(return_inverse=True, return_counts=True)
    if len(found) == len(keys):
        return found[:0]
    if rounded(rows.w)[0]:
        return found[counts > 1]
    first = torch.ones_like(keys)
    first[1:] = keys[1:] != keys[:-1]
    apart = torch.zeros_like(found).index_add(0, group, first)
    total = len(keys)
    many = (apart >= _SHARED_SHARE * total) | (counts >= _ATOM_SHARE * total)
    many &= counts >= _MIN_SHARED
    others = counts[~many]
    return found[many] if len(others) >= (1 - REPEATED_SHARE) * int(others.sum()) else found[:0]


def told_apart(keys: Tensor, shared: Tensor, start: int = 0) -> Tensor:
    """Return keys, shape ``(N,)``, of which those that rows share by chance are made different.

    Args:
        keys: Those of rows.
        shared: Those that are shared by chance, shape ``(K,)``.
        start: The place of the first row, with which its new key differs.
    """
    places = torch.isin(keys, shared.to(keys.device)).nonzero().flatten()
    if not len(places):
        return keys
    new = torch.stack((keys[places], places + start), -1)
    return keys.index_copy(0, places, row_keys(new))


def random_order(rows: Rows, count: int) -> tuple[Tensor, int]:
    """Return a random order of rows, in which copies follow each other, and where to cut it.

    Every distinct row is equally likely to come first, however many copies it has.

    Args:
        rows: The rows.
        count: How many to cut off, or fewer, as copies stay together: but all of the first row.
    """
    order = torch.randperm(len(rows.w)).to(rows.w.device)
    distinct, group, copies = copy_keys(rows)[order].unique(
        return_inverse=True, return_counts=True
    )
    if len(distinct) in (1, len(order)):
        return order, count
    first = torch.randperm(len(distinct)).to(order.device)
    first = first + len(order) * (copies > count)  # which no cut before ``count`` could follow
    first, by_copies = first[group].sort(stable=True)
    ends = (first.diff() > 0).nonzero().flatten() + 1
    few = ends[ends <= count]
    return order[by_copies], int(few[-1] if len(few) else ends[0])
