"""Marginal quantiles by quasi-random draws."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import ComposeTransform

from .._package import check_ranges
from ..distributions.interpolant import InterpolantDistribution
from ..distributions.quasi_random import normal_points
from .sites import check_one_data_set

SPREAD_DRAWS = 4096


def spread_of(posterior: InterpolantDistribution) -> Tensor:
    """Return quasi-random draws, always the same, of a flow from N(0, I), shape ``(4096, D)``.

    Raises:
        ValueError: If it has a batch, of data sets.
    """
    check_one_data_set(posterior.batch_shape)
    z = normal_points(posterior.transform.flow.loc, SPREAD_DRAWS)
    return ComposeTransform(posterior.transforms)(z)


def quantiles_of(draws: Tensor, levels: Sequence[float] | Tensor) -> Tensor:
    """Return the quantiles of each number, shape ``(Q, *shape)``, of draws, ``(N, *shape)``.

    Those of :func:`torch.quantile`, of any number of numbers.

    Args:
        draws: The draws.
        levels: Q numbers between 0 and 1.

    Raises:
        ValueError: If one of them is not.
    """
    at = torch.as_tensor(levels, dtype=torch.float64, device=draws.device)
    check_ranges(("quantiles between 0 and 1", bool(((at >= 0) & (at <= 1)).all()), levels))
    ordered, place = draws.sort(0).values, at * (len(draws) - 1)
    share = place.frac().reshape((*at.shape, *(1,) * (draws.dim() - 1)))
    return torch.lerp(ordered[place.floor().long()], ordered[place.ceil().long()], share.to(draws))
