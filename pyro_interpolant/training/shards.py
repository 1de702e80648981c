r"""Shards: what the processes of a run have in all, each with batches of its own.

Each goes through its own batches once. What these first passes learned is put together, as one
pass over all batches would have learned it: so all processes hold out the same rows, and whiten by
the same map, and the loss of a process with more rows, or heavier ones, counts for more.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .distributed import Process
from .repeats import distinguished
from .rows import Rows
from .survey import Survey

_EQUAL = 1e-6  # up to which factors are the same


def put_together(own: Survey, process: Process) -> tuple[Survey, float]:
    """Return what all processes have, from the first pass of each, and set what each counts for.

    Args:
        own: What this one's first pass learned.
        process: This process, or one of several.

    Returns:
        What a first pass over all batches would have learned, and the number of all rows that
        weigh as much, infinite where nobody knows.

    Raises:
        ValueError: In all processes, if one has fewer than two rows, or weights, and another none.
    """
    fewest = min(process.gathered(own.total))
    if fewest < 2:
        raise ValueError(f"expected batches of rows, got an iterable with {fewest} rows in all")
    if process.world == 1:
        return own, own.effective() * own.times
    parts = "rows alone" if own.kept[0][0].weight is None else "rows with weights"
    process.check_same("parts of batches", parts, "give weights in all of them or in none")
    counted = process.gathered(own.without_rows())
    shares, effective = shares_of_weight(counted)
    process.factor = shares[process.rank] * process.world
    weights = [each.weight for each in counted]
    surveys = process.gathered(_to_send(own, shares, weights, process))
    return _joined(surveys, own.kept[0][1].device), effective


def shares_of_weight(surveys: Sequence[Survey]) -> tuple[list[float], float]:
    """Return each process's share of all weight, and the number of rows that weigh as much.

    Where one has rows without end, all have as many.

    Args:
        surveys: What the first pass of each learned.
    """
    endless = any(s.times == math.inf for s in surveys)
    weights = [s.weight / s.total if endless else s.weight * s.times for s in surveys]
    total = math.fsum(w / max(weights) for w in weights)
    shares = [w / max(weights) / total for w in weights]
    if endless:
        return shares, math.inf
    pairs = zip(shares, surveys, strict=True)
    return shares, 1 / math.fsum(share**2 / (s.effective() * s.times) for share, s in pairs)


def _to_send(
    own: Survey, shares: Sequence[float], weights: Sequence[float], process: Process
) -> Survey:
    """Return what a first pass learned, with a sample such that those of all fit in memory.

    Args:
        own: That.
        shares: Each process's share of all weight, which its part of the sample has, too.
        weights: The sum of the weights of rows that each went through.
        process: This process, which agrees with the others on the share of batches in samples.
    """
    sizes = process.gathered((own.stride, own.values))
    stride = max(each for each, _ in sizes)
    while sum(values * each / stride for each, values in sizes) > own.most_values():
        stride *= 2
    rows, keys, shared = own.candidates()
    sent, cpu = copy.copy(own), own.kept[0][1].cpu().device
    # Of unlike batches, the same share of them holds other shares of the rows.
    kept = own.kept[:: stride // own.stride]
    of_kept = process.gathered(math.fsum(_weight(part) for part, _ in kept))
    sent.kept = _moved(kept, cpu, _factor(shares, of_kept, process.rank))
    # Where some first passes saw a part of their rows, these stand for the others.
    factor = _factor(shares, weights, process.rank)
    sent.lowest, sent.shared = _moved([(rows, keys)], cpu, factor), shared
    return sent


def _weight(rows: Rows) -> float:
    """Return the sum of the weights of rows."""
    return len(rows.w) if rows.weight is None else float(rows.weight.double().sum())


def _factor(shares: Sequence[float], weights: Sequence[float], rank: int) -> float | None:
    """Return by what to multiply the weights of a process's rows, or None for no difference.

    Args:
        shares: What the weight of each process's rows is to be, of all.
        weights: What it is.
        rank: The number of the process.
    """
    factors = [s / w if w > 0 else 0.0 for s, w in zip(shares, weights, strict=True)]
    alike = min(factors) >= (1 - _EQUAL) * max(factors)
    return None if alike else factors[rank] / max(factors)


def _joined(surveys: Sequence[Survey], device: torch.device) -> Survey:
    """Return what one pass over the batches of all would have learned, on a device."""
    joined = copy.copy(surveys[0])
    joined.total = sum(each.total for each in surveys)
    joined.checksum = sum(each.checksum for each in surveys) % 2**64
    reached: list[Any] = [each.reached for each in surveys]
    joined.reached = reached if any(reached) else None
    known = [each.shared for each in surveys if each.shared is not None]
    joined.shared = torch.cat(known).unique()
    joined.kept = [part for each in surveys for part in _moved(each.kept, device)]
    lowest = [part for each in surveys for part in _moved(each.lowest, device)]
    # Keys that rows of one process alone were seen to share may be those of others' rows.
    joined.lowest = [(rows, distinguished(keys, joined.shared)) for rows, keys in lowest]
    return joined


def _moved(
    parts: Sequence[tuple[Rows, Tensor]], device: torch.device, factor: float | None = None
) -> list[tuple[Rows, Tensor]]:
    """Return rows and keys on a device, with their weights multiplied by a factor, if any."""
    found = []
    for rows, keys in parts:
        if factor is not None:
            weight = torch.ones_like(keys) if rows.weight is None else rows.weight
            rows = rows._replace(weight=weight.double() * factor)
        found.append((rows.to(device), keys.to(device)))
    return found
