r"""What a model says of its data: whether some are hidden, and whether their rows are sets.

Values behind a missing-data mask or a summary are hidden: they can change while everything that a
guide is given stays the same. The density of all data is then not that of what is observed, and no
weights come from it.

Where rows may change places without any density of the model being another, the posterior depends
on the set of them alone: :math:`p(x \mid y)` is that of all orders of y, as :math:`p(y \mid x)`
is.
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._torch import seeded, warn_user
from ..nn.embedded import MOST_SUMMARIES
from ..nn.embedding import SetEmbedding
from .runs import attempts, data_of, nodes_of
from .simulation import Simulator
from .simulations import all_of

# How many numbers of a site are replaced to test it. Where one in 50 is hidden, none of these is
# among 256 once in 170 runs.
_REPLACED, _REPLACED_LOOPED = 256, 64  # at once, and one by one
# Simulations whose rows change places, at once, and one by one; at least.
_TRIED, _LOOPED, _LEAST = 256, 16, 3
# Roundings of log densities, of which those of many rows mostly cancel in their sum.
_ROUNDING = 32


@torch.no_grad()
def is_hidden(simulator: Simulator, values: Mapping[str, Tensor] | None = None) -> bool:
    """Return whether some of the data can change while all that is observed stays the same.

    It can where more real numbers are drawn than observed, as behind a summary. Else numbers
    are replaced, one at a time, by those of other simulations: all of few, 256 of many, evenly
    spread over simulations and numbers. What is missing more rarely may not be found.

    Args:
        simulator: The model, with what is observed.
        values: The sampled and observed sites of simulations, each ``(N, *site_shape)``; by
            default those of one run with the arguments of the model, which may hold data.
    """
    known = (*simulator.latents, *simulator.observed)
    hidden = [k for k in simulator.sampled if k not in known and simulator.shapes[k].numel()]
    if not hidden:
        return False
    probes = torch.arange(_REPLACED_LOOPED if simulator.batching == "loop" else _REPLACED)
    others = simulator.at(len(probes)).data
    real = [name for name in hidden if bool((others[name] != others[name].round()).any())]
    drawn, seen_numbers = (
        sum(simulator.shapes[name].numel() for name in names)
        for names in (real, simulator.observed)
    )
    if seen_numbers < drawn:  # as behind summaries, which every single number changes
        return True
    if values is None:  # those of an observation that broadcasts, too
        shapes = simulator.latents | simulator.shapes
        found = data_of(nodes_of(simulator.model), shapes)
        values = {name: value.reshape(1, *shapes[name]) for name, value in found.items()}
    for name in hidden:
        own = values[name].reshape(len(values[name]), -1)
        stride = max(1.0, own.numel() / len(probes))
        which = (probes.double() * stride).long() % own.numel()
        rows, at = which % len(own), which // len(own)
        before, after = own[rows], own[rows]
        after[probes, at] = others[name].reshape(len(probes), -1)[probes, at].to(own)
        given = {k: torch.cat((values[k][rows],) * 2) for k in simulator.sampled}
        given[name] = torch.cat((before, after)).reshape(given[name].shape)
        seen = simulator.at(2 * len(probes), given).data
        pairs = (seen[k].reshape(2, len(probes), -1) for k in simulator.observed)
        same = torch.stack([(one == other).all(1) for one, other in pairs]).all(0)
        if bool((same & (before != after).any(1)).any()):
            return True
    return False


@torch.no_grad()
def tell_if_determined(simulator: Simulator) -> None:
    """Warn where the data are functions of the latents alone, as of sites that were to be data.

    A posterior then has no density: it lies where the functions have the values of the data.

    Args:
        simulator: The model, with what is observed.
    """
    if simulator.sampled != [*simulator.latents]:
        return
    given = simulator.at(1).latents
    one, other = (simulator.at(1, given).data for _ in range(2))
    if all(torch.equal(one[name], other[name]) for name in simulator.observed):
        warn_user(
            f"the data {list(simulator.observed)} are functions of the latent sites "
            f"{list(simulator.latents)} alone, given which the model draws nothing: a posterior "
            "has no density where they fix numbers of these. Of sites that are to be data, give "
            "the model values of the right shapes in its arguments, whatever these are"
        )


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
    each = torch.arange(len(order))[:, None]
    moved = given | {name: given[name][each, order] for name in sites}
    before, after = (simulator.log_densities(v).double() for v in (given, moved))
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
