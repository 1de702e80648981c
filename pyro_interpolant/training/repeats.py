r"""Copies of rows, as a Markov chain that stands still makes: they are held out together.

A copy to train on would give away the one held out. Rows that are equal by chance are no copies:
of zeros, or of rows at a limit, the same share is held out as of others.
"""

import torch
from torch import Tensor

from ..distributions.rounding import ATOM_SHARE, REPEATED_SHARE, rounded
from .rows import Rows, keys_of, row_keys

# Of rows, not counting those that follow their equal: no row of a chain comes so often.
_SHARED_SHARE = 0.01
_MIN_SHARED = 10  # equal rows, from which on their share counts


def rows_to_tell(values: Tensor) -> Rows:
    """Return what there is of each object, shape ``(n, ...)``, as rows by which copies are told.

    Of posterior draws that is the first of each. Numbers may be missing.
    """
    return Rows(values.reshape(len(values), -1).nan_to_num(), None)


def copy_keys(rows: Rows) -> Tensor:
    """Return one integer per row, shape ``(N,)``, which copies of a row share, and no others."""
    keys = keys_of(rows)
    return distinguished(keys, shared_keys(rows, keys))


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
    many = (apart >= _SHARED_SHARE * total) | (counts >= ATOM_SHARE * total)
    many &= counts >= _MIN_SHARED
    others = counts[~many]
    return found[many] if len(others) >= (1 - REPEATED_SHARE) * int(others.sum()) else found[:0]


def distinguished(keys: Tensor, shared: Tensor, start: int = 0) -> Tensor:
    """Return keys, shape ``(N,)``, and new ones for rows that share theirs by chance.

    Args:
        keys: Those of rows.
        shared: Those that are shared by chance, shape ``(K,)``.
        start: The place of the first row: new keys differ by the place of their row.
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
