r"""A guide that learns :math:`p(\text{latents} \mid \text{data})` once, from simulations alone.

Latents and data are drawn from the model, and a conditional flow is trained on them by regression;
any data the model may give are then a call. What it is worth is measured on fresh simulations.
"""

import copy
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform

from .._package import check_ranges, whole
from .._torch import seeded
from ..distributions.joint import (
    ConditionalJointInterpolantDistribution,
    JointInterpolantDistribution,
)
from ..nn.embedding import SetEmbedding
from ..nn.modes import trainable
from ..training.clock import Clock
from ..training.fitting import FitResult, fit
from ..transforms.interpolant import ConditionalInterpolantTransform
from .amortization import (
    JUDGED_ROWS,
    NO_DENSITY,
    AmortizedResult,
    Calibration,
    Region,
    are_enough,
    calibration_of,
    check_posterior,
    check_settings,
    is_inside,
    measured_on_simulations,
    pace,
    region,
    tell_if_coarse,
    truncated,
    untrained_posterior,
)
from .autoguide import AutoInterpolant
from .data import are_sets, exchangeable_columns, is_hidden, tell_if_determined
from .importance_sampling import GuideResult
from .initialization import init_latent, is_not_latent
from .log_density import known_log_joint
from .runs import (
    check_data,
    check_rows_count,
    data_of,
    example_of,
    flattened,
    is_alike,
    nodes_of,
    plate_nesting,
    tell_of_others,
)
from .simulated_batches import SimulatedBatches
from .simulation import Simulator
from .simulations import Simulations
from .sites import LatentSites, Model, check_one_data_set, one_posterior

_SIMULATIONS = 10_000
_POINTS = 64  # draws at which the density of a model is tried


class AmortizedInterpolant(AutoInterpolant):
    r"""A guide of the latent sites given the data: a conditional flow, learned from simulations.

    ``guide(*args)`` finds the data in the arguments of the model, or where the model is
    conditioned on them, and samples the latents given them: it works wherever a guide does, in
    :class:`~pyro.infer.Predictive`, :func:`~pyro_interpolant.importance`,
    :func:`~pyro_interpolant.neutra` and :class:`~pyro.infer.SVI`, which refines it for one data
    set. :meth:`condition` takes data by name, many data sets at once.

    Train it by :func:`~pyro_interpolant.fit_guide`. The posterior inside, ``guide.posterior``, is
    what :func:`~pyro_interpolant.save` writes.

    Args:
        model: A Pyro model that simulates its data: what it observes are sample sites, not
            factors; its latent sites are continuous, of fixed shapes and supports.
        observed: The names of the sites that the latents are given: observed sample sites, or
            deterministic functions of them. Other sites that the model observes keep their
            values. Where data are missing, such a function holds them with zeros in their places,
            and a mask beside them; the guide is then to be trained with data of the right shapes
            in the arguments, whose values do not matter, as all that is observed is drawn: fix a
            site by ``pyro.do`` there.
        embedding: A module that is called with the observed sites, each ``(N, *site_shape)``, and
            returns ``(N, E)``, trained along. By default that is
            :class:`~pyro_interpolant.nn.SetEmbedding` where no density of the model tells the
            order of the rows of its data, as in a plate; else, and where simulations are made
            elsewhere, the network sees all numbers.
        posterior: A posterior that is trained already, as :func:`~pyro_interpolant.load` gives it:
            of the latent sites on their supports, given the observed ones in this order. It
            becomes the guide's own, whose weights ``SVI`` trains.
        hidden_dims: The widths of the velocity's hidden layers.
        num_workers: How many processes simulate where the model can only be run for one simulation
            at a time; 0 for this one alone. They import the model, and with one seed they give the
            same simulations however many they are.

    Raises:
        TypeError: If the model is not callable; at the first call, if an embedding is no module.
        ValueError: If there are no observed sites, or one is named twice, fewer than no workers,
            or what makes a new network beside a posterior; at the first call, if an observed site
            is not in the model, it has a factor, or latent sites as :class:`AutoInterpolant`
            refuses them.

    References:
        Papamakarios & Murray, NeurIPS 2016, arXiv 1605.06376 (posterior estimation); Wildberger
        et al., NeurIPS 2023, arXiv 2305.17161 (by flow matching).

    Example:
        >>> def model(y=None):
        ...     loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("rows", 5):
        ...         pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        >>> guide = AmortizedInterpolant(model)
        >>> guide(torch.ones(5))["loc"].shape
        torch.Size([])
        >>> guide.condition(y=torch.randn(10, 5)).sample_dict((100,))["loc"].shape
        torch.Size([100, 10])
    """

    transform: ConditionalInterpolantTransform  # type: ignore[assignment]
    _posterior: ConditionalJointInterpolantDistribution | None = None
    _example: dict[str, Tensor] | None = None  # of a simulation of the model that was trained with
    _sees_sets: bool = False  # whether rows of the data are a set, because the model says so

    def __init__(
        self,
        model: Model,
        observed: Sequence[str] = ("y",),
        embedding: nn.Module | None = None,
        *,
        posterior: ConditionalJointInterpolantDistribution | None = None,
        hidden_dims: Sequence[int] | None = None,
        num_workers: int = 0,
    ) -> None:
        # The prototype's initialisation, set up before a module is there, knows the names.
        self.__dict__["observed"] = (observed,) if isinstance(observed, str) else tuple(observed)
        super().__init__(model, hidden_dims=hidden_dims)
        if not self.observed or len(set(self.observed)) < len(self.observed):
            raise ValueError(f"expected names of observed sites, each once, got {self.observed}")
        if posterior is not None and (embedding is not None or hidden_dims is not None):
            raise ValueError("expected a posterior, or embedding and hidden_dims, got both")
        check_ranges(whole("num_workers", num_workers, 0))
        self.num_workers = int(num_workers)
        self._given = embedding, posterior
        self._prototype_hide_fn = functools.partial(is_not_latent, self.observed)

    def _initializer(self, init_loc_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return functools.partial(init_latent, self.observed, super()._initializer(init_loc_fn))

    def _set_flow(self, loc: Tensor, *args: object, **kwargs: object) -> None:
        sites = LatentSites(self, *args, **kwargs)
        simulator = Simulator(sites, self.observed)
        self.shapes = {name: simulator.shapes[name] for name in self.observed}
        embedding, posterior = self._given
        if posterior is None:
            if embedding is None and (columns := exchangeable_columns(simulator)):
                self._sees_sets, embedding = True, SetEmbedding(columns)
            posterior = untrained_posterior(sites, self.shapes, embedding, self._hidden_dims, loc)
        else:
            check_posterior(posterior, sites, self.shapes)
            posterior.transform.requires_grad_(requires_grad=True)  # SVI may train on
        self._take(posterior)
        del self._given  # the embedding is a part of the flow

    def _take(self, posterior: ConditionalJointInterpolantDistribution) -> None:
        """Take a posterior's flow as its own."""
        self.transform, self._posterior = posterior.transform, posterior
        self.transform.eval()  # dropout is for the regression: SVI and draws do without

    def _see_rows(self, sites: LatentSites, simulator: Simulator, *, is_own: bool) -> None:
        """See all numbers where rows to learn from are no sets, as those at first were."""
        if self._sees_sets and not are_sets(simulator, self.transform.velocity, is_own=is_own):
            given = self.shapes, None, self._hidden_dims, self.transform.flow.loc
            self._take(untrained_posterior(sites, *given))
            self._sees_sets = False

    @property
    def posterior(self) -> ConditionalJointInterpolantDistribution:  # type: ignore[override]
        """The joint distribution of the latent sites by name, given the data, flattened.

        Raises:
            ValueError: If the guide does not know its model yet.
        """
        if self._posterior is None:
            raise ValueError(
                "expected a guide that knows its model: call fit_guide(guide, *args), or "
                "guide(*args), first"
            )
        return self._posterior

    def get_posterior(self, *args: object, **kwargs: object) -> JointInterpolantDistribution:
        """Return the distribution of the unconstrained latent vector given the data.

        Args:
            *args: The arguments of the model.
            **kwargs: Its named arguments.

        Raises:
            ValueError: If the data are not there, or of another shape than in the simulations.
        """
        context = self._seen(*args, **kwargs)  # the first call sets the posterior up
        return self.posterior.condition(context)

    def likely_points(self, *args: object, **kwargs: object) -> Tensor:
        """Return draws given the data, always the same, the likeliest first, shape ``(P, D)``.

        Args:
            *args: The arguments of the model.
            **kwargs: Its named arguments.
        """
        posterior = one_posterior(self, *args, **kwargs)
        with torch.no_grad(), seeded(0):
            draws = posterior.sample((_POINTS,))
            return draws[posterior.log_prob(draws).argsort(descending=True)]

    def get_transform(self, *args: object, **kwargs: object) -> Transform:
        """Return the flow given the data, and the map behind it if the posterior has one."""
        posterior = one_posterior(self, *args, **kwargs)
        parts = posterior.transforms
        return parts[0] if len(parts) == 1 else ComposeTransform(parts)

    def condition(self, **data: ArrayLike) -> JointInterpolantDistribution:
        """Return the distribution of the latents given data, of many data sets at once.

        Args:
            **data: Every observed site by name, ``(*, *site_shape)``.

        Returns:
            The joint distribution of the latent sites, of batch shape ``(*)``: ``sample_dict``
            draws them by name, ``pack`` makes of them what ``log_prob`` takes.

        Raises:
            ValueError: If a site is missing, unknown or of another shape, or the guide does not
                know its model yet.

        Warns:
            UserWarning: If data lie beyond all simulations the guide was trained on, or it was
                trained in rounds for others.
        """
        posterior = self.posterior.condition(self._context(data))
        posterior.transform.trains_weights = False  # it is there to be read
        posterior.report = self.posterior.report
        return posterior

    def simulate(self, count: int, *args: object, **kwargs: object) -> Simulations:
        """Return simulations from the model, those that are finite.

        Args:
            count: How many, N, to try.
            *args: The arguments of the model.
            **kwargs: Its named arguments.

        Raises:
            ValueError: If none is finite, or workers cannot import the model.
            RuntimeError: If a simulation fails in a worker.
        """
        check_ranges(whole("count", count, 1))
        sites = LatentSites(self, *args, **kwargs)
        return Simulator(sites, self.observed, self.num_workers)(int(count))

    def rows_of(self, simulations: Simulations) -> tuple[Tensor, Tensor]:
        """Return latents, packed, shape ``(N, D)``, and their data, flattened, ``(N, C)``."""
        rows = self._packed(simulations.latents)
        return rows, self._context({name: simulations.data[name] for name in self.observed})

    def _packed(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Return latents, packed, in the type of the guide, shape ``(N, D)``."""
        return self.posterior.pack(latents).to(self.transform.flow.loc)

    def _context(self, data: Mapping[str, Any]) -> Tensor:
        """Return data, each ``(*, *site_shape)``, flattened and joined, shape ``(*, C)``."""
        return flattened(data, self.shapes, self.transform.flow.loc)

    def _seen(self, *args: object, **kwargs: object) -> Tensor:
        """Return the context of a run of the model, shape ``(*, C)``, of one data set ``(C,)``.

        Raises:
            ValueError: If there are several where the plates of the model are.
        """
        sites = LatentSites(self, *args, **kwargs)
        with torch.no_grad():
            nodes = nodes_of(sites.model)
        check_rows_count(nodes)
        check_data(nodes, sites.shapes, self.observed)
        if self._example is not None:
            tell_of_others(sites.model, nodes, self.observed, self._example)
        context = self._context(data_of(nodes, self.shapes))
        batch = context.shape[:-1]
        if batch.numel() == 1:
            return context.flatten()
        if batch[max(0, len(batch) - plate_nesting(nodes)) :].numel() != 1:
            check_one_data_set(batch)
        return context

    @torch.no_grad()
    def calibration(
        self, *args: object, count: int = 1000, seed: int = 0, **kwargs: object
    ) -> Calibration:
        """Check by simulation whether the posteriors are calibrated: SBC, coverage and TARP.

        Args:
            *args: The arguments of the model.
            count: How many data sets to simulate, N.
            seed: Of the simulations and the draws.
            **kwargs: The named arguments of the model.

        Returns:
            The three checks of :mod:`~pyro_interpolant.diagnostics.predictive`, and what follows.

        Warns:
            UserWarning: If it was trained in rounds for one data set: others are checked.

        References:
            Talts et al., arXiv 1804.06788; Lemos et al., arXiv 2302.03026.
        """
        check_ranges(whole("count", count, 2))
        with seeded(seed):  # other simulations than those that training had of the same seed
            own = int(torch.randint(2**62, ()))
        with seeded(own):
            found = self.simulate(count, *args, **kwargs)
        context = self.rows_of(found)[1]
        self.posterior.warn_if_refined_for_others(context)
        return calibration_of(self.posterior, found.latents, context, seed)

    def train_from(
        self,
        sites: LatentSites,
        clock: Clock,
        settings: dict[str, Any],
        *,
        samples: Mapping[str, ArrayLike] | None,
        simulations: int | Iterable[Any] | None,
        rounds: int | None,
    ) -> AmortizedResult | GuideResult:
        """Train on simulations; called by :func:`~pyro_interpolant.fit_guide`.

        Args:
            sites: The latent sites, with the model and its arguments.
            clock: The time.
            settings: Options of :func:`~pyro_interpolant.fit`.
            samples: None.
            simulations: How many simulations, batches of them, or None.
            rounds: In how many rounds; None is one.
        """
        if samples is not None:
            raise ValueError(
                "expected no samples for an AmortizedInterpolant, which learns from simulations: "
                "of simulations made elsewhere, from_samples(latents, context=data, ...) learns "
                "what guide.posterior holds"
            )
        check_settings(settings)
        count: Any = _SIMULATIONS if simulations is None else simulations
        rounds = 1 if rounds is None else rounds
        check_ranges(whole("rounds", rounds, 1))
        rounds, seed = int(rounds), settings["seed"]
        self._check_simulated(sites)
        if rounds > 1:
            with seeded(seed):
                check_one_data_set(self._seen(*sites.args, **sites.kwargs).shape[:-1])
        if isinstance(count, Iterable) and getattr(count, "ndim", 1) > 0:  # not a tensor(200)
            return self._train_from_batches(count, rounds, sites, clock, settings)
        check_ranges(whole("simulations", count, 10))
        count = int(count)
        if settings.get("checkpoint") is not None and (seed is None or rounds > 1):
            raise ValueError(
                "expected a seed beside a checkpoint, with which the same simulations are drawn "
                f"again, and one round, got seed={seed} and rounds={rounds}"
            )
        with seeded(seed):
            simulator = Simulator(sites, self.observed, self.num_workers)
            self._see_rows(sites, simulator, is_own=True)
            found = simulator(count)
            tell_if_coarse(found, self.observed, self.transform.flow.loc.dtype)
            tell_if_determined(simulator)
            fresh = simulator(JUDGED_ROWS) if rounds == 1 else found
        self._begin(sites)
        training = self._regress(found, clock, settings)
        if rounds > 1:
            return self._in_rounds(rounds, sites, simulator, (found, training), clock, settings)
        size = len(found.log_prior)
        improper = found.improper / (size + found.improper)
        with seeded(None if seed is None else seed + 1):
            given = simulator, sites, clock, training, size, improper
            return measured_on_simulations(self.posterior, fresh, self.rows_of, *given)

    def _check_simulated(self, sites: LatentSites) -> None:
        """Raise a ValueError where the arguments hold more at a site than a simulation of it.

        Rows outside of plates are one data set for a density, and one each for a simulation.
        """
        with torch.no_grad(), seeded(0):
            nodes = nodes_of(sites.model)
        shapes = {name: shape for name, shape in self.shapes.items() if name in nodes}
        for name, value in data_of(nodes, shapes).items():
            batch = value.shape[: value.dim() - len(shapes[name])]
            if batch.numel() > 1:
                check_one_data_set(batch)

    def _begin(self, sites: LatentSites) -> None:
        """Forget what earlier training was for and worth, and note what this one is for."""
        self.posterior.refined_for = self.poor = None
        first, second = (example_of(sites.model, self.observed) for _ in range(2))
        # Alike, unless the model draws numbers that are not torch's.
        self._example = first if is_alike(first, second) else None

    def _train_from_batches(
        self,
        batches: Iterable[Any],
        rounds: int,
        sites: LatentSites,
        clock: Clock,
        settings: dict[str, Any],
    ) -> AmortizedResult:
        """Train on batches of simulations made elsewhere, the first of which judge the guide."""
        if rounds > 1:
            raise ValueError(
                f"expected a number of simulations beside rounds={rounds}, got batches: "
                "later rounds simulate where the guide has its mass"
            )
        with seeded(settings["seed"]):
            simulator = Simulator(sites, self.observed)
            self._see_rows(sites, simulator, is_own=False)
            found = SimulatedBatches(batches, simulator, self.rows_of)
        tell_if_coarse(found.held, self.observed, self.transform.flow.loc.dtype)
        held = {"validation": self.rows_of(found.held), **settings}
        self._begin(sites)
        training = self._fit(found, clock, held)
        improper = found.improper / (found.count + found.improper)
        with seeded(None if settings["seed"] is None else settings["seed"] + 1):
            given = simulator, sites, clock, training, found.trained, improper
            return measured_on_simulations(self.posterior, found.held, self.rows_of, *given)

    def _in_rounds(
        self,
        rounds: int,
        sites: LatentSites,
        simulator: Simulator,
        first: tuple[Simulations, FitResult],
        clock: Clock,
        settings: dict[str, Any],
    ) -> GuideResult:
        """Train on, after the first round, on simulations where the guide has its mass."""
        found, training = first
        seed, count = settings["seed"], len(found.log_prior) + found.improper
        with seeded(seed):
            known = self._seen(*sites.args, **sites.kwargs)
            hides = is_hidden(simulator)
            z = self.posterior.pack(found.latents)
            density = None if hides else known_log_joint(sites, z)
        regions: list[Region] = []
        for i in range(1, rounds):
            if training.stopped_by in ("interrupt", "time"):
                break
            ended = copy.deepcopy(self.posterior).freeze()  # the weights go on
            with seeded(None if seed is None else seed + i):
                regions.append(region(ended.given(known)))
                new = truncated(simulator, regions, count, self._packed)
            inside = found.take(is_inside(regions, self._packed(found.latents)))
            found = inside if new is None else Simulations.joined([inside, new])
            if not are_enough(found, count, i + 1):
                break
            self.posterior.refined_for = known
            training = self._regress(found, clock, settings)
        posterior = self.posterior.given(known)
        result = self._judged(posterior, density, clock, seed, training)
        return result._replace(verdict=NO_DENSITY) if hides else result

    def _regress(self, found: Simulations, clock: Clock, settings: dict[str, Any]) -> FitResult:
        """Train on simulations."""
        rows, context = self.rows_of(found)
        return self._fit(rows, clock, {"context": context, **settings})

    def _fit(self, rows: Any, clock: Clock, settings: dict[str, Any]) -> FitResult:
        """Train on packed rows, or on batches of them and their contexts."""
        defaults = pace(self.transform.velocity, rows, clock)
        names = self.posterior.context_columns
        with trainable(self.transform):  # and then as it was: SVI may train on
            training = fit(self.posterior, rows, **{**defaults, **settings})
        self.posterior.context_columns = names  # of sites, which the rows do not tell
        return training
