r"""Draws of a model's prior as unconstrained vectors, from which training on a density starts."""

import contextlib
import functools

import torch
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from torch import Tensor

from ..transforms.bijections import biject
from .initialization import init_to_support
from .log_density import LogJoint
from .runs import in_lanes, in_plate, nodes_of
from .sites import unchecked

_RARE = 0.005  # the share of prior draws on either side that is clamped to the rest
IMPROPER_SCALE = 2.0  # of unconstrained sites with an improper prior
_RUNS = 128  # of a model that gives one draw in each: enough for a centre and a spread


@torch.no_grad()
def prior_draws(density: LogJoint, count: int) -> Tensor | None:
    """Return unconstrained draws of the prior, ``(<= count, D)``, or None where there are none.

    Sites with an improper prior are drawn widely; the rarest 1% is clamped to the rest, for priors
    without moments. There are 128 at most where they cannot be drawn at once, as shares cannot
    under ``torch.func.vmap``.

    Raises:
        ValueError: If the density of many of them is another than one at a time.
    """
    init = functools.partial(init_to_support, init=init_to_sample, spread=IMPROPER_SCALE)

    def draw(count: int | None = None) -> Tensor:
        model = InitMessenger(init)(in_plate(density.model, count, density.nesting))
        nodes, batch = nodes_of(model, density.sites.sites), () if count is None else (count,)
        parts = [
            biject(support).inv(nodes[name]["value"]).reshape(*batch, -1)
            for name, (_, support) in density.sites.sites.items()
        ]
        return torch.cat(parts, dim=-1)

    def draw_at_once() -> Tensor:
        return draw(count) if density.batching == "plate" else in_lanes(draw, count)

    def draw_one_by_one() -> Tensor:
        return torch.stack([draw() for _ in range(min(count, _RUNS))])

    z = None
    for way in (draw_at_once, draw_one_by_one):  # the first that works
        with contextlib.suppress(RuntimeError, TypeError, ValueError), unchecked():
            z = way()
            break
    found = None if z is None else without_extremes(z)
    if found is not None:
        density.check(found)
    return found


def without_extremes(z: Tensor) -> Tensor | None:
    """Return finite draws, shape ``(<= N, D)``, the rarest 1% clamped to the rest.

    Args:
        z: Draws, shape ``(N, D)``.

    Returns:
        The draws, or None where at most half are finite.
    """
    count = len(z)
    z = z[torch.isfinite(z).all(-1)]
    if len(z) <= count // 2:
        return None
    low, high = torch.quantile(z, z.new_tensor([_RARE, 1 - _RARE]), dim=0)
    return torch.maximum(low, torch.minimum(z, high))
