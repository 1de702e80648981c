"""Draws of the prior and the data simulated with them."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Simulations(NamedTuple):
    """Draws of the prior and the data simulated with them.

    Attributes:
        latents: Each latent site, ``(N, *site_shape)``.
        data: Each site simulated with them, or deterministic one that is observed, alike.
        log_prior: The log density of the latents, each on its support, shape ``(N,)``.
        improper: How many more were simulated that had numbers that are not finite.
    """

    latents: dict[str, Tensor]
    data: dict[str, Tensor]
    log_prior: Tensor
    improper: int

    @classmethod
    def joined(
        cls,
        parts: "Sequence[Simulations]",
        join: Callable[[list[Tensor]], Tensor] = torch.cat,
    ) -> "Simulations":
        """Return all of several, one after the other, or of single ones, by ``torch.stack``."""

        def joined(which: str) -> dict[str, Tensor]:
            found = [getattr(part, which) for part in parts]
            return {name: join([f[name] for f in found]) for name in found[0]}

        log_prior = join([part.log_prior for part in parts])
        improper = sum(part.improper for part in parts)
        return cls(joined("latents"), joined("data"), log_prior, improper)

    def take(self, index: Tensor) -> "Simulations":
        """Return those of an index or a mask, shape ``(M,)``; none of them improper."""
        latents, data = ({k: v[index] for k, v in part.items()} for part in self[:2])
        return Simulations(latents, data, self.log_prior[index], 0)


def all_of(masks: Mapping[str, Tensor]) -> Tensor:
    """Return where all of several masks hold, shape ``(N,)`` each."""
    return torch.stack(list(masks.values())).all(0)


def is_near(value: Tensor, values: Tensor, i: int) -> bool:
    """Return whether the value of a single run is that of simulation i among N of a plate.

    Each number in its own unit, which the others of its place have: a site may hold several.

    Args:
        value: The value, shape ``(*site_shape)``.
        values: Those of the plate, shape ``(N, *site_shape)``.
        i: Which of them.
    """
    value, values = value.double(), values.double()
    size = values.abs().nan_to_num(0.0, 0.0, 0.0).amax(0)
    near = (value - values[i]).abs() <= 1e-4 * values[i].abs() + 1e-5 * size
    return bool((near | (value == values[i])).all())
