r"""Whether the rows of the data may change places without any density of the model being another.

The posterior given such data depends on the set of their rows alone: :math:`p(x \mid y)` is that
of all orders of y, as :math:`p(y \mid x)` is.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor

from .._torch import seeded
from ..nn.embedded import MOST_SUMMARIES
from ..nn.embedding import SetEmbedding
from .runs import attempts
from .simulation import Simulator
from .simulations import all_of

# Simulations whose rows change places, at once, and one by one; at least.
_TRIED, _LOOPED, _LEAST = 256, 16, 3
# Roundings of log densities, of which those of many rows mostly cancel in their sum.
_ROUNDING = 32


def exchangeable_columns(simulator: Simulator) -> int | None:
    """Return how many columns rows have that are exchangeable, or None where order may count.

    Rows are the first dimension of all observed sites, of a plate or of events. They are put in
    another order in simulations, alike in all sites, while the latent sites stay: rows that have
    covariates, groups, errors or latent sites of their own then have another density, and so
    have the times of a series. Beyond 29 columns the summary of a set is more than regressions
    take, and the network that sees all numbers learns faster.

    Args:
        simulator: The model, with what is observed.
    """
    shapes = [simulator.shapes[name] for name in simulator.observed]
    is_table = all(1 <= len(shape) <= 2 and shape.numel() for shape in shapes)
    is_whole = {*simulator.sampled} == {*simulator.latents, *simulator.observed}
    if not (is_table and is_whole) or len({shape[0] for shape in shapes}) > 1:
        return None
    columns, may_move = sum(shape.numel() for shape in shapes) // shapes[0][0], False
    # A model may have no density of its data, none of rows elsewhere, or fail at some values, as
    # its simulations are allowed to: nothing is known then, and a guide is set up all the same.
    with seeded(0), attempts(), contextlib.suppress(Exception):
        size = SetEmbedding(columns).summary(torch.zeros(1, 1, columns)).shape[1]
        may_move = size <= MOST_SUMMARIES and _rows_may_move(simulator, shapes[0][0])
    return columns if may_move else None


def are_sets(simulator: Simulator, velocity: Any, *, is_own: bool) -> bool:
    """Return whether rows to learn from are sets, as a guide took them for at its first call.

    Args:
        simulator: The model with the arguments of training, which may be others.
        velocity: The network, which embeds sets.
        is_own: Whether its own simulations are learned from. Beside those made elsewhere its
            density may be a placeholder, which knows no order.

    Raises:
        ValueError: If they are none, and the network has learned from sets already.
    """
    has_learned = not velocity.is_untrained()
    if exchangeable_columns(simulator) is not None if is_own else has_learned:
        return True
    if has_learned:
        raise ValueError(
            "expected rows of data in any order, as when the guide was trained, got rows that "
            "the model tells apart with these arguments: set up a new guide for them"
        )
    return False


def _rows_may_move(simulator: Simulator, count: int) -> bool:
    """Return whether so many rows in another order have the same density in all simulations."""
    sites, most = simulator.observed, _TRIED if simulator.batching == "plate" else _LOOPED
    found = simulator.at(max(_LEAST, min(most, simulator.rows)))
    values = found.take(all_of(simulator.proper(found)))
    given = values.latents | values.data
    order = torch.rand(len(values.log_prior), count).argsort(-1)
    moved = given | {name: _taken(given[name], order) for name in sites}
    before, after = (simulator.log_densities(each).double() for each in (given, moved))
    rounding = _ROUNDING * torch.finfo(values.log_prior.dtype).eps * before.norm(dim=-1)
    near = (after.sum(-1) - before.sum(-1)).abs() <= rounding
    # Of rare events most rows have none, in any order: each place must have had another value.
    is_other = [(given[name] != moved[name]).any(0).reshape(count, -1) for name in sites]
    is_set = bool(near.all()) and all(bool(each.any(1).all()) for each in is_other)
    return is_set and _tells_of_latents(simulator, given, before, rounding)


def _tells_of_latents(
    simulator: Simulator, given: dict[str, Tensor], before: Tensor, rounding: Tensor
) -> bool:
    """Return whether the density of the data is more than a placeholder, which knows no order.

    One of data alone, such as zero, is in the mean the same where simulations swap their data.
    """
    swapped = given | {name: given[name].roll(1, 0) for name in simulator.observed}
    try:
        after = simulator.log_densities(swapped).double()
    except ValueError:  # data that these latents cannot give
        return True
    return not bool((after.sum() - before.sum()).abs() <= rounding.sum())


def _taken(values: Tensor, order: Tensor) -> Tensor:
    """Return rows, ``(N, n, *)``, in an order of each of N, shape ``(N, n)``."""
    return values[torch.arange(len(values))[:, None], order]
