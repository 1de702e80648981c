r"""Whether part of the data can change while everything the guide is given stays the same.

The values behind a missing-data mask or a summary can. The density of all data is then not that of
what is observed, and no weights come from it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .._torch import warn_user
from .runs import data_of, nodes_of
from .simulation import Simulator

# How many numbers of a site are replaced to test it. Where one in 50 is hidden, none of these is
# among 256 once in 170 runs.
_REPLACED, _LOOPED = 256, 64  # at once, and one by one


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
    probes = torch.arange(_LOOPED if simulator.batching == "loop" else _REPLACED)
    others = simulator.at(len(probes)).data
    real = [name for name in hidden if bool((others[name] != others[name].round()).any())]
    drawn, seen_numbers = (
        sum(simulator.shapes[name].numel() for name in names)
        for names in (real, simulator.observed)
    )
    if seen_numbers < drawn:  # as behind summaries, which every single number changes
        return True
    values = _in_arguments(simulator) if values is None else values
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


def _in_arguments(simulator: Simulator) -> dict[str, Tensor]:
    """Return the sampled sites of a run of the model, with data where the arguments hold them.

    Each has shape ``(1, *site_shape)``, that of an observation that broadcasts, too.
    """
    shapes = simulator.latents | simulator.shapes
    found = data_of(nodes_of(simulator.model), shapes)
    return {name: value.reshape(1, *shapes[name]) for name, value in found.items()}


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
