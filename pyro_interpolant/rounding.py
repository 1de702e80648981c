r"""Rounded and discrete values, which have no density: noticed, and spread over their step."""

import warnings

import torch
from torch import Tensor

from .data import checked_rows, some

__all__ = ["dequantize", "warn_if_rounded"]

_LOOKED_AT = 20_000  # rows, for repeated values
_FEWEST = 100  # rows that tell
_REPEATED = 0.1  # the share of repeated values in a column from which a user is warned
_REDRAWN = 0.5  # the same of a column alone: rows drawn again repeat up to 0.37
_ULPS = 1.5  # units in the last place within which values are the same


def warn_if_rounded(x: Tensor) -> None:
    """Warn where columns repeat their values: rounded and discrete data have no density.

    Rows that repeat as a whole, as a Markov chain's do, count once: in one dimension, or where
    hardly any others are left, those that follow each other, and a share of 1/2 is then noticed.

    Args:
        x: Rows, shape ``(N, D)``.
    """
    places = some(len(x), _LOOKED_AT).to(x.device)
    few = x[places]
    few = few[(places == 0) | (few != x[places - 1]).any(1)]
    distinct, limit = torch.unique(few, dim=0), _REDRAWN
    if x.shape[1] > 1 and len(distinct) >= _FEWEST:
        few, limit = distinct, _REPEATED
    if len(few) < _FEWEST:
        return
    counts = [len(torch.unique(column)) for column in few.T]
    shares = [1 - count / len(few) if count > 1 else 0.0 for count in counts]
    found = [i for i, share in enumerate(shares) if share > limit]
    if found:
        warnings.warn(
            f"columns {found} repeat up to {max(shares):.0%} of their values, as rounded or "
            "discrete data do, which have no density: a flow learns spikes. Spread them over "
            "their rounding step first, fit(distribution, dequantize(x))",
            stacklevel=4,
        )


def dequantize(x: Tensor, step: Tensor | float | None = None, *, seed: int = 0) -> Tensor:
    """Spread rounded or discrete values uniformly over their rounding step.

    Densities learned from the result are those of the values per step: the probability of a value
    is the mean density over its step times the step.

    Args:
        x: Rows of numbers of any type, shape ``(N, *event_shape)``.
        step: The rounding step, one or per column, shape ``event_shape``; 0 leaves a column alone.
            By default the smallest difference between values of the column, where it repeats any.
        seed: Of the noise.

    Returns:
        ``x + step * (u - 1/2)`` with u uniform on [0, 1), shape ``(N, *event_shape)``, floating.

    Raises:
        ValueError: If a step is negative, or x has no rows of values.

    Example:
        >>> x = dequantize(torch.tensor([[1.0], [2.0], [2.0], [4.0]]))
        >>> bool(((x.round() - torch.tensor([[1.0], [2.0], [2.0], [4.0]])).abs() < 0.51).all())
        True
    """
    given = torch.as_tensor(x)
    x = given if given.is_floating_point() else given.to(torch.get_default_dtype())
    x = checked_rows(x, "x", (None,) * max(1, x.dim() - 1))
    if step is None:
        eps = torch.finfo(x.dtype).eps if given.is_floating_point() else 0.0
        columns = given.detach().double().flatten(1).T
        steps = [_rounding_step(column, _ULPS * eps) for column in columns]
        step = torch.stack(steps).reshape(x.shape[1:])
    step = torch.as_tensor(step, dtype=x.dtype, device=x.device)
    if float(step.min()) < 0:
        raise ValueError(f"expected steps of at least 0, got {float(step.min()):.3g}")
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return x + step * (u - 0.5)


def _rounding_step(column: Tensor, precision: float) -> Tensor:
    """Return the smallest gap between values, shape ``()``, 0 where they hardly repeat."""
    values = torch.unique(column)
    if len(values) < 2 or len(values) > (1 - _REPEATED) * len(column):
        return column.new_zeros(())
    gaps, size = values.diff(), values.abs()
    # Values that arithmetic has parted by its own rounding are one.
    size = torch.maximum(size[1:], size[:-1]).clamp(min=float(size.median()))
    real = gaps > precision * size
    return gaps[real].min() if bool(real.any()) else column.new_zeros(())
