r"""Simulations from a model: its latent sites drawn from the prior, and the data they give.

Many are drawn in one run of the model, in a plate to the left of all its own, where every density
there is that of a run of its own; else under :func:`torch.func.vmap`; else one by one, in worker
processes if asked.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import pyro
import torch
from pyro import poutine
from torch import Tensor

from .._torch import draws, seeded, warn_user
from ..distributions.supports import BijectiveSupport
from ..transforms.bijections import biject
from .log_density import log_prior_of
from .runs import (
    Unobserved,
    attempts,
    check_drawn,
    check_names,
    check_reached,
    check_rows_count,
    in_lanes,
    in_plate,
    nodes_of,
    plate_nesting,
    state_of_others,
)
from .simulations import Simulations, all_of, is_near
from .sites import (
    LatentSites,
    Nodes,
    check_fixed_shape,
    check_fixed_support,
    extreme_rows,
    is_sampled,
    unchecked,
)
from .workers import called_in_workers

_PROBES = 3  # simulations on which a plate is compared with single runs
# They are taken from the first 16 of 256 simulations and those with the most extreme numbers.
_FIRST, _TRIED = 16, 256
_VALUES_AT_ONCE = 2**22  # of all sites together
_CALL = 16  # simulations, one by one, in one call, whatever the number of processes

Batching = Literal["plate", "vmap", "loop"]


class Simulator:
    """A model that simulates.

    Args:
        sites: The latent sites, with the model and its arguments.
        observed: The names of what is to be simulated: sample sites, or deterministic functions
            of them.
        num_workers: How many processes simulate, where it is one by one; 0 for this one alone.

    Attributes:
        shapes: The shapes of what is simulated, by name.
        drawn: Which of the sites that the model observes are drawn: the observed ones, where all
            of them are sample sites. The others keep their values. Else None, for all.
        early: The shapes of the sites that are drawn before the last of the latents, by name: the
            prior of the latents may depend on them.

    Raises:
        ValueError: If a name is not in the model, the model cannot be simulated, or the support
            of a latent site depends on other sites.
    """

    def __init__(self, sites: LatentSites, observed: Sequence[str], num_workers: int = 0) -> None:
        self.latents, self.num_workers = sites.shapes, num_workers
        self.observed = tuple(observed)
        self.supports = {name: support for name, (_, support) in sites.sites.items()}
        self.model = sites.model
        self.drawn: Sequence[str] | None = None
        self.kept: dict[str, Tensor] = {}  # log densities of observed sites that keep their values
        self.shapes, self.early, self.nesting = {}, {}, 0  # until they are known, by runs
        try:
            nodes = self._run()
        except NotImplementedError as error:
            raise ValueError(
                "expected a model that can be simulated, got a site that cannot be drawn from "
                f"({str(error).splitlines()[0]}): give improper priors a proper one"
            ) from error
        check_names(nodes, self.latents, observed)
        if all(is_sampled(nodes[name]) for name in observed):
            self.drawn = observed
            nodes = self._run()
            self._keep(nodes)
            self._check_kept(self._run())
        else:
            check_drawn(nodes, observed, self._run)
        check_rows_count(nodes)
        self._check_supports(nodes)
        drawn = [k for k, n in nodes.items() if is_sampled(n) and not n["is_observed"]]
        sampled = [k for k in drawn if k not in self.latents]
        names = list(dict.fromkeys([*sampled, *observed]))
        self.sampled = [*self.latents, *sampled]
        self.shapes = {name: nodes[name]["value"].shape for name in names}
        order = list(nodes)
        last = max(map(order.index, self.latents))
        self.early = {k: self.shapes[k] for k in sampled if order.index(k) < last}
        self.batch_dims = {k: len(n["fn"].batch_shape) for k, n in nodes.items() if is_sampled(n)}
        self.nesting = max([plate_nesting(nodes), *self.batch_dims.values()])
        numbers = sum(nodes[name]["value"].numel() for name in [*self.latents, *names])
        self.rows = max(1, _VALUES_AT_ONCE // numbers)
        if num_workers > 0 and self.batching == "loop":
            self._tell_of_own_generators()

    @torch.no_grad()
    def __call__(
        self,
        count: int,
        given: Mapping[str, Tensor] | None = None,
    ) -> Simulations:
        """Simulate; those with numbers that are not finite are left out, and counted.

        Args:
            count: How many, N, of which those that are finite are returned.
            given: Values of sites to simulate from, each ``(N, *site_shape)``; by default none.

        Raises:
            ValueError: If none is finite.
        """
        calls = self._calls(count, given)
        drawn: Iterable[Simulations] = (self._drawn(*call) for call in calls)
        if self.num_workers > 0 and self.batching == "loop":
            drawn = called_in_workers(self._drawn, calls, self.num_workers)
        found = Simulations.joined(list(drawn))
        count, proper = len(found.log_prior), self.proper(found)
        good = all_of(proper)
        improper = count - int(good.sum())
        if improper == count:
            bad = [name for name, each in proper.items() if not bool(each.any())]
            raise ValueError(
                f"expected finite simulations, got {count:,} with NaN or infinite numbers each, "
                f"or latents on the edge of their support, in {bad or list(proper)}: run the "
                "model, and see where they come from"
            )
        if self.batching == "plate" and not self._agrees(found.take(good)):
            self.batching = self._without_plate()
            return self(count, given)
        if improper:
            warn_user(
                f"{improper:,} of {count:,} simulations ({improper / count:.2%}) have numbers "
                "that are not finite, or latents on the edge of their support, and are left out: "
                "the prior is then that of the others"
            )
        return found.take(good)._replace(improper=improper)

    def proper(self, found: Simulations) -> dict[str, Tensor]:
        """Return, by name, which of N simulations a flow can learn, shape ``(N,)`` each.

        They are finite, and latents are strictly inside their support: rounded draws may lie on
        its edge, which a bijection takes to infinity.
        """
        values = {**found.latents, **found.data, "the prior's log density": found.log_prior}
        count = len(found.log_prior)
        good = {name: v.isfinite().reshape(count, -1).all(1) for name, v in values.items()}
        for name, support in self.supports.items():
            value = values[name] if self.latents[name] else values[name][..., None]
            inside = BijectiveSupport(support).strictly_inside(value)  # of events, none of them ()
            good[name] = good[name] & inside.reshape(count, -1).all(1)
        return good

    def _check_supports(self, nodes: Nodes) -> None:
        """Raise a ValueError where the shape or support of a latent site is another in this run.

        The run draws the sites that it may depend on, which the guide has seen elsewhere.

        Args:
            nodes: The sites of a run.
        """
        for name, known in self.supports.items():
            fn, value = nodes[name]["fn"], nodes[name]["value"]
            check_fixed_shape(name, fn.batch_shape + fn.event_shape, value, self.latents[name])
            shape = biject(known).inverse_shape(self.latents[name])
            real = torch.linspace(-1.0, 1.0, shape.numel()).to(value).reshape(shape)
            check_fixed_support(name, biject(fn.support)(real), biject(known)(real))

    def _keep(self, nodes: Nodes) -> None:
        """Note the log densities of observed sites that keep their values.

        Args:
            nodes: The sites of a run.

        Raises:
            ValueError: If one is latent.
        """
        kept = [name for name, n in nodes.items() if is_sampled(n) and n["is_observed"]]
        latent = [name for name in kept if name in self.latents]
        if latent:
            raise ValueError(
                f"expected sites {latent} to be latent, as when the guide was set up, got them "
                "observed: set up a new guide with these arguments, guide(*args)"
            )
        self.kept = {name: self._log_probs(nodes, [name]).sum() for name in kept}

    def _check_kept(self, nodes: Nodes, count: int | None = None) -> None:
        """Raise a ValueError where an observed site that keeps its value is one of the data.

        Data depend on the latent sites, so that their density is another where those are: perhaps
        only where they are rare, so that each run is looked at.

        Args:
            nodes: The sites of a run.
            count: The number of simulations in it; None for a single one.
        """
        data = []
        for name, known in self.kept.items():
            found = self._log_probs(nodes, [name], count).sum(-1)
            if not torch.allclose(found, known.expand_as(found), rtol=1e-4, atol=1e-4):
                data.append(name)
        if data:
            raise ValueError(
                f"expected all data among the observed sites {list(self.drawn or ())}, got {data} "
                "observed too, which depend on the latent sites: AmortizedInterpolant(model, "
                "observed=(...))"
            )

    @functools.cached_property
    def batching(self) -> Batching:
        """The first way of many simulations in one run that works and is right.

        It is found by some runs of the model, which who asks for shapes alone is spared.
        """
        with attempts():
            before = state_of_others()
            if self._repeats() is not True or state_of_others() != before:
                return "loop"  # numbers that torch does not draw would be drawn once for all
            with contextlib.suppress(Exception):  # whatever a model does with shapes
                found = self._drawn(max(_PROBES, min(_TRIED, self.rows)), "plate")
                if self._agrees(found.take(all_of(self.proper(found)))):
                    return "plate"
        return self._without_plate()

    def _without_plate(self) -> Batching:
        """Return the first way but a plate that works."""
        with attempts(), contextlib.suppress(Exception):
            found = self._drawn(_PROBES, "vmap")
            if bool(all_of(self.proper(found)).any()):
                return "vmap"
        return "loop"

    def _tell_of_own_generators(self) -> None:
        """Warn of a model whose numbers are not those of the seeds that workers are given."""
        state = pyro.util.get_rng_state()
        if self._repeats(lambda: pyro.util.set_rng_state(state)) is False:
            warn_user(
                "the model draws numbers from a generator of its own, which no seed reaches: "
                "worker processes that import it may all draw the same ones. Make it in the "
                "model, np.random.default_rng(int(torch.randint(2**31, ())))"
            )

    def _repeats(self, begin: Callable[[], None] = lambda: None) -> bool | None:
        """Return whether two runs from one seed of torch's give the same simulation.

        Args:
            begin: What is called before each, such as to seed other generators.

        Returns:
            True or False, or None for a model that fails with these numbers.
        """
        runs = []
        with contextlib.suppress(Exception):
            for _ in range(2):
                begin()
                with seeded(0):
                    runs.append(self._run())
        return self._are_equal(*runs) if len(runs) == 2 else None

    def _are_equal(self, one: Nodes, other: Nodes) -> bool:
        """Return whether two runs gave the same latents and data, to the last digit."""
        pairs = ((one[k]["value"], other[k]["value"]) for k in (*self.latents, *self.shapes))
        return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)

    def _agrees(self, found: Simulations) -> bool:
        """Return whether single runs give the simulations of a plate the densities it gives.

        They are compared one by one: in the rounding of a sum of many, what is wrong may hide.
        Those with the most extreme numbers are in the plate too: a model may branch on whether one
        of its values is rare, and be another for all.
        """
        first = torch.arange(min(_FIRST, len(found.log_prior)))
        values = found.latents | found.data
        extreme = extreme_rows(values[name] for name in self.sampled)
        index = torch.cat((first.to(extreme), extreme))[: max(_PROBES, self.rows)]
        values, count = {name: value[index] for name, value in values.items()}, len(index)
        given = {name: values[name] for name in self.sampled}
        with seeded(0):
            runs = self._run(count, given), self._run(count, given)
            if draws() > 0:  # noise that is no site's may be drawn once for all of a plate
                return False
        together, again = (self._log_probs(nodes, self.sampled, count) for nodes in runs)
        is_same = torch.equal(together.nan_to_num(), again.nan_to_num())
        if not (is_same and self._are_equal(*runs)):  # noise, not torch's
            return False
        finite = together.isfinite().all(-1).nonzero()[:_PROBES, 0]
        if not len(finite):  # of a simulator's own noise: they tell nothing
            return False
        together, values = together[finite], {k: v[finite] for k, v in values.items()}
        for i in range(len(finite)):
            own = self._run(None, {name: values[name][i] for name in self.sampled})
            alone = self._log_probs(own, self.sampled)
            if not torch.allclose(alone, together[i], rtol=1e-4, atol=1e-4):
                return False
            # Deterministic ones, too, in whatever unit.
            if not all(is_near(own[name]["value"], values[name], i) for name in self.shapes):
                return False
        return True

    def at(self, count: int, values: Mapping[str, Tensor] | None = None) -> Simulations:
        """Return simulations, finite or not.

        Args:
            count: How many, N.
            values: Values of sites, each ``(N, *site_shape)``, that are not drawn then.
        """
        return Simulations.joined([self._drawn(*call) for call in self._calls(count, values)])

    def _calls(
        self, count: int, given: Mapping[str, Tensor] | None
    ) -> list[tuple[int, Batching, dict[str, Tensor]]]:
        """Return the arguments of calls that make so many simulations, as many as go at once each.

        Args:
            count: How many, N.
            given: Values of sites, each ``(N, *site_shape)``, that are not drawn then, or None.
        """
        size, known = _CALL if self.batching == "loop" else self.rows, given or {}
        return [
            (min(size, count - i), self.batching, {k: v[i : i + size] for k, v in known.items()})
            for i in range(0, count, size)
        ]

    def prior(self, count: int) -> Simulations:
        """Return draws of the latents, their data those of the ``early`` sites alone.

        Given both, the rest of a simulation follows, as :attr:`is_told_early` says.

        Args:
            count: How many, of which those N that are proper are returned.
        """
        found = self._drawn(count, self.batching, {}, latents_alone=True)
        return found.take(all_of(self.proper(found)))

    @functools.cached_property
    def is_told_early(self) -> bool:
        """Whether latents and ``early`` sites are all that is drawn up to the last of the latents.

        Else a model draws there what it hides, of which both the latents and the data may be made.
        """
        with attempts(), seeded(0):
            nodes = self._run(latents_alone=True)
        given = {name: nodes[name]["value"] for name in (*self.latents, *self.early)}
        found = []
        for seed in range(2):
            with attempts(), seeded(seed):
                nodes = self._run(None, given, latents_alone=True)
                if draws() > 0:
                    return False
            found.append(self._log_probs(nodes, self.latents))
        return torch.equal(*(each.nan_to_num() for each in found))

    def log_prior(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the log density of latents, shape ``(N,)``; NaN where it is not known.

        Args:
            values: The latents, each ``(N, *site_shape)`` on its support, and other sites: no
                data are simulated with them. It is known if the ``early`` sites are among them,
                and are all that the prior of the latents depends on.
        """
        given = {k: values[k] for k in (*self.latents, *self.early) if k in values}
        count = len(next(iter(given.values())))
        if not (self.early.keys() <= given.keys() and self.is_told_early):
            return torch.full((count,), math.nan)
        return self._drawn(count, self.batching, given, latents_alone=True).log_prior

    def log_densities(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return the log densities of all rows of all sampled sites, shape ``(N, M)``.

        Args:
            values: Of all sampled sites, each ``(N, *site_shape)``.
        """
        count = len(next(iter(values.values())))
        if self.batching == "plate":
            return self._log_probs(self._run(count, values), self.sampled, count)
        runs = (self._run(None, {k: v[i] for k, v in values.items()}) for i in range(count))
        return torch.stack([self._log_probs(run, self.sampled) for run in runs])

    @torch.no_grad()
    def _drawn(
        self,
        count: int,
        batching: Batching,
        given: dict[str, Tensor] | None = None,
        *,
        latents_alone: bool = False,
    ) -> Simulations:
        """Return simulations, finite or not."""
        given = given or {}

        def simulated(values: dict[str, Tensor], number: int | None = None) -> Simulations:
            nodes = self._run(number, values, latents_alone=latents_alone)
            return self._collected(nodes, number, latents_alone=latents_alone)

        if batching == "plate":
            return simulated(given, count)
        if batching == "vmap":
            with unchecked():
                return Simulations(*in_lanes(lambda row: simulated(row)[:3], count, given), 0)
        rows = ({k: v[i] for k, v in given.items()} for i in range(count))
        return Simulations.joined([simulated(row) for row in rows], torch.stack)

    def _collected(
        self, nodes: Nodes, count: int | None = None, *, latents_alone: bool = False
    ) -> Simulations:
        """Return the simulations of a run, of one without a batch.

        Raises:
            ValueError: If a row does not count there, or an observed site that keeps its value
                depends on the latent ones.
        """
        lead = () if count is None else (count,)

        def of(shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
            found = {}
            for name, shape in shapes.items():
                value = nodes[name]["value"]
                if count is not None and value.shape[:1] != (count,):
                    raise ValueError(f"site {name!r} has not one value for each simulation")
                found[name] = value.reshape((*lead, *shape))
            return found

        if not latents_alone:  # of these latents, and perhaps of no others
            check_rows_count(nodes)
            self._check_kept(nodes, count)
        each = [log_prior_of(nodes[name]).reshape((*lead, -1)).sum(-1) for name in self.latents]
        shapes = self.early if latents_alone else self.shapes
        return Simulations(of(self.latents), of(shapes), torch.stack(each).sum(0), 0)

    def _log_probs(self, nodes: Nodes, names: Iterable[str], count: int | None = None) -> Tensor:
        """Return all log densities of sites, shape ``(M,)``, or ``(N, M)`` of N simulations."""
        lead = () if count is None else (count,)
        found = [nodes[name]["fn"].log_prob(nodes[name]["value"]) for name in names]
        return torch.cat([f.reshape((*lead, -1)) for f in found], -1)

    def _run(
        self,
        count: int | None = None,
        values: Mapping[str, Tensor] | None = None,
        *,
        latents_alone: bool = False,
    ) -> Nodes:
        """Return the sites of a run of the model that draws its data.

        Args:
            count: The number of simulations in a plate to the left of all others, or None.
            values: Values of sites, each ``(*, *site_shape)``, that are not drawn then.
            latents_alone: Whether to stop the run once all latent sites have been drawn.
        """
        given = dict(values or {})
        if count is not None:
            for name, value in given.items():
                ones = (1,) * (self.nesting - self.batch_dims[name])
                given[name] = value.reshape(count, *ones, *value.shape[1:])
        model = in_plate(self.model, count, self.nesting)
        model = poutine.condition(Unobserved(self.drawn)(model), given)
        nodes = nodes_of(model, self.latents if latents_alone else ())
        others = self.early if latents_alone else self.shapes | self.kept
        check_reached(nodes, [*self.latents, *others])
        return nodes
