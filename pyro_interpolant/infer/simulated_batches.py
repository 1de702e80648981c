"""Batches of simulations made elsewhere: rows and contexts to train on, and some held out."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributions.rows import as_tensor
from ..training.repeats import distinguished, shared_keys
from ..training.rows import Rows, keys_of
from ..training.streaming import check_again, naming_batch
from ..training.survey import HeldOutKeys
from .amortization import JUDGED_ROWS, Pack
from .simulation import Simulator
from .simulations import Simulations, all_of

_HELD_SHARE = 10  # at most one out of so many of the first ones
_FEWEST = 10


class SimulatedBatches:
    """Batches of simulations as :func:`~pyro_interpolant.fit` takes them, ``(rows, contexts)``.

    A tenth of the first 10,000 simulations is held out, wherever they come again. Where some of
    these repeat, as rounded latents beside counts do, a tenth of all later ones is held out, too:
    to leave out only copies of the first would favour improbable simulations in training. Those
    that are not finite are left out, and counted.

    Args:
        batches: What gives, each time it is gone through, ``(latents, data)``: two dictionaries by
            site, each value ``(B, *site_shape)``.
        simulator: The model, which knows the sites.
        pack: From simulations to packed rows, ``(N, D)``, and contexts, ``(N, C)``.

    Attributes:
        held: The simulations held out of the first ones.
        count: How many finite ones a pass over the batches has given, at most, so far.
        trained: How many of them were not held out.
        improper: How many others.

    Raises:
        ValueError: If the batches can be gone through only once, are of another form, or hold
            fewer than 10 finite simulations.
    """

    def __init__(self, batches: Iterable[Any], simulator: Simulator, pack: Pack) -> None:
        check_again(batches)
        self.batches, self.simulator, self.pack = batches, simulator, pack
        self.names = [*simulator.latents, *simulator.observed]
        self.shapes = simulator.shapes | simulator.latents
        self.count, self.improper, self.trained = 0, 0, 0
        first, total = [], 0
        for found in self._finite():
            first.append(found)
            total += len(found.log_prior)
            if total >= JUDGED_ROWS * _HELD_SHARE:
                break
        if total < _FEWEST:
            raise ValueError(
                f"expected batches of at least {_FEWEST} finite simulations, got {total} and "
                f"{self.improper} with NaN or infinite numbers"
            )
        simulations = Simulations.joined(first)
        rows = Rows(*pack(simulations))
        keys = keys_of(rows)
        shared, count = shared_keys(rows, keys), min(JUDGED_ROWS, total // _HELD_SHARE)
        self._marker = HeldOutKeys.lowest(distinguished(keys, shared), shared, count)
        marks = self._marker.mark(keys)
        # Where none repeats, all later ones are others, and none is to be left out for its key.
        self._held_keys = keys[marks] if len(keys.unique()) == total else None
        held = simulations.take(marks.nonzero().flatten().cpu())
        self.held = held._replace(log_prior=simulator.log_prior(held.data | held.latents))
        self.trained = total - len(held.log_prior)

    def __len__(self) -> int:
        """Return the number of batches, if they know it."""
        return len(self.batches)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows, ``(B, D)``, and contexts, ``(B, C)``, of those that are not held out."""
        start = trained = 0
        for found in self._finite():
            rows, context = self.pack(found)
            keys, held = keys_of(Rows(rows, context)), self._held_keys
            new = ~(self._marker.mark(keys, start) if held is None else torch.isin(keys, held))
            start, trained = start + len(new), trained + int(new.sum())
            self.trained = max(self.trained, trained)
            if bool(new.any()):
                yield rows[new], context[new]

    def _finite(self) -> Iterator[Simulations]:
        """Yield the finite simulations of each batch, and count."""
        count = improper = 0
        for number, batch in enumerate(self.batches):
            with naming_batch(number):
                found = self._checked(batch)
            count, improper = count + len(found.log_prior), improper + found.improper
            self.count, self.improper = max(self.count, count), max(self.improper, improper)
            if len(found.log_prior):
                yield found

    def _checked(self, batch: object) -> Simulations:
        """Return the finite simulations of a batch; their prior's density is left at 0."""
        parts = list(batch[:2]) if isinstance(batch, list | tuple) else []
        if len(parts) < 2 or not all(isinstance(part, Mapping) for part in parts):
            raise ValueError(
                "expected (latents, data), two dictionaries by site, each value "
                f"(B, *site_shape), got {type(batch).__name__}"
            )
        latents, data = ({k: as_tensor(v, k) for k, v in part.items()} for part in parts)
        values = {**latents, **data}
        missing = [name for name in self.simulator.latents if name not in latents]
        missing += [name for name in self.simulator.observed if name not in data]
        if missing:
            raise ValueError(
                f"expected latents {list(self.simulator.latents)} and data "
                f"{list(self.simulator.observed)}, got none of {missing}: the latents are "
                f"{sorted(latents)}, the data {sorted(data)}"
            )
        sizes = {name: len(value) if value.dim() else 0 for name, value in values.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"expected one value per simulation at each site, got {sizes}")
        count = next(iter(sizes.values()))
        own = {name: latents[name] for name in self.simulator.latents}
        found = Simulations(own, data, torch.zeros(count), 0)
        if count == 0:
            return found
        for name in self.names:
            shape, given = self.shapes[name], values[name].shape
            if given[1:] != shape:
                want = ", ".join(("*", *map(str, shape)))
                raise ValueError(f"expected site {name!r} of shape ({want}), got {tuple(given)}")
        proper = self.simulator.proper(found)
        good = all_of({name: proper[name] for name in self.names})
        return found.take(good)._replace(improper=count - int(good.sum()))
