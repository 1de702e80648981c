r"""The flow as a guide for any Pyro model with continuous latent sites."""

import copy
import functools
import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro
import torch
from numpy.typing import ArrayLike
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide import AutoContinuous, AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from torch import Tensor
from torch.distributions import Transform

from .._package import check_ranges, number
from .._torch import seeded, warn_user, with_gradients
from ..diagnostics.psis import ImportanceSummary
from ..distributions.bases import standard_normal
from ..distributions.interpolant import InterpolantDistribution
from ..distributions.joint import JointInterpolantDistribution
from ..interpolants.linear import Interpolant
from ..nn.mlp import VelocityMLP
from ..nn.modes import trainable
from ..solvers.divergence import Divergence
from ..solvers.ode import FixedGrid, Solver
from ..training.clock import Clock
from ..training.fitting import FitResult, fit
from ..training.whitening import whitening_map
from ..transforms.interpolant import InterpolantTransform
from .amortization import AmortizedResult, check_settings
from .importance_sampling import (
    GuideResult,
    are_raw_draws_good,
    check_is_density,
    importance_verdict,
    warn_poor,
)
from .initialization import init_to_support
from .log_density import LogJoint, known_log_joint
from .prior import prior_draws
from .sites import (
    SPREAD_DRAWS,
    Imaged,
    LatentSites,
    Model,
    forget_data,
    one_posterior,
    quantiles_of,
    spread_of,
    unsupported_sites_named,
)
from .smc.train import RoundsResult, train_from_density


class AutoInterpolant(AutoContinuous):
    r"""A guide over all latent sites of a model at once: a continuous normalizing flow.

    The unconstrained latent vector is ``z = T(w)`` with ``w ~ N(0, I)`` and T an
    :class:`~pyro_interpolant.InterpolantTransform`, the attribute ``transform`` once the guide
    knows the model. Untrained, it is :math:`N(\text{init loc}, \text{init scale}^2 I)`.

    Train it by :func:`~pyro_interpolant.fit_guide`, with no gradient through an ODE, or by
    :class:`~pyro.infer.SVI` as any guide, which differentiates through the solver.

    Args:
        model: A Pyro model whose latent sites are continuous, of fixed shapes and supports.
        hidden_dims: The widths of the velocity's hidden layers, as in :class:`VelocityMLP`.
        interpolant: The path the velocity is trained for; by default
            :class:`~pyro_interpolant.Trigonometric`.
        solver: By default a :class:`~pyro_interpolant.FixedGrid` of 12 steps. As in any flow
            whose weights are trained through it, random nodes take the place of its own meanwhile
            (:func:`~pyro_interpolant.solvers.random_nodes`): an ELBO learns to exploit a grid
            that stays (12 steps became 75 nats too good).
        divergence: By default exact.
        init_loc_fn: Where the sites start, one of Pyro's initialisation functions.
        init_scale: The standard deviation of each unconstrained dimension at the start.

    Raises:
        TypeError: If the model is not callable.
        ValueError: If ``init_scale`` is not positive, or the path begins at the data; at the first
            call, if a latent site is discrete, in a subsampled or sequential plate, or has a
            support without a Jacobian.

    References:
        Hoffman et al., *NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural
        Transport*, arXiv 1903.03704, for sampling in the guide's base space.

    Example:
        >>> def model():
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     with pyro.plate("rows", 3):
        ...         pyro.sample("x", dist.Normal(0.0, scale))
        >>> guide = AutoInterpolant(model, hidden_dims=(32, 32))
        >>> {name: tuple(value.shape) for name, value in guide().items()}
        {'scale': (), 'x': (3,)}
    """

    transform: InterpolantTransform
    poor: str | None = None  # the verdict to warn with once, if the own draws were found poor

    def __init__(
        self,
        model: Model,
        *,
        hidden_dims: Sequence[int] | None = None,
        interpolant: Interpolant | None = None,
        solver: Solver | None = None,
        divergence: Divergence | None = None,
        init_loc_fn: Callable[..., Tensor] = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        if not callable(model):
            raise TypeError(f"expected a model, a callable, got {type(model).__name__}")
        is_from_noise = interpolant is None or not interpolant.starts_from_data()
        path = "a path from noise, which has a density", is_from_noise, type(interpolant).__name__
        check_ranges(number("init_scale > 0", init_scale, lambda n: n > 0), path)
        self.__dict__["_start"] = start = self._initializer(init_loc_fn)
        super().__init__(model, init_loc_fn=start)
        self._hidden_dims, self._init_scale = hidden_dims, init_scale
        solver = FixedGrid(steps=12) if solver is None else solver
        self._transform_of = functools.partial(
            InterpolantTransform, interpolant=interpolant, solver=solver, divergence=divergence
        )

    def _initializer(self, init_loc_fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Return what gives the sites of the prototype their values."""
        return functools.partial(init_to_support, init=init_loc_fn)

    @property
    def model(self) -> Model:
        """The model, with the guide's initialisation.

        Raises:
            ValueError: If the guide was pickled, which leaves the model behind.
        """
        if self._model is None:
            raise ValueError(
                "expected a guide with its model, got one that was pickled without: call "
                "guide.attach(model) first"
            )
        return super().model

    def _setup_prototype(self, *args: object, **kwargs: object) -> None:
        try:
            with torch.no_grad():  # a prototype with a graph could not be copied
                with unsupported_sites_named(self):
                    super()._setup_prototype(*args, **kwargs)
                loc = self._init_loc()
                LatentSites(self, *args, **kwargs).constrain(loc)  # raises without a Jacobian
                forget_data(self)
            self._set_flow(loc, *args, **kwargs)
        except BaseException:  # the next call sets up again
            self.prototype_trace = None
            raise

    def _set_flow(self, loc: Tensor, *args: object, **kwargs: object) -> None:
        """Make the flow, given a centre of the unconstrained vector, shape ``(D,)``."""
        LatentSites(self, *args, **kwargs).check_start(loc)
        velocity = VelocityMLP(self.latent_dim, self._hidden_dims).to(loc)
        self.transform = self._transform_of(velocity)
        scale = self._init_scale * torch.eye(len(loc)).to(loc)
        self.transform.flow.whitening.set(loc, scale)

    def get_base_dist(self) -> TorchDistributionMixin:
        """Return N(0, I), of event shape ``(D,)``."""
        return standard_normal(self.transform.flow.loc)

    def get_transform(self, *args: object, **kwargs: object) -> Transform:
        """Return the flow; it does not depend on the arguments of the model."""
        return self.transform

    def get_posterior(self, *args: object, **kwargs: object) -> InterpolantDistribution:
        """Return the distribution of the unconstrained latent vector, of event shape ``(D,)``."""
        if self.prototype_trace is None:
            LatentSites(self, *args, **kwargs)
        return InterpolantDistribution(self.transform)

    @property
    def posterior(self) -> JointInterpolantDistribution:
        """The joint distribution of the latent sites by name, as checks and plots take it.

        It is there to be read: gradients go through it at the solver's own nodes, not at the
        random ones by which weights are trained, and a solver set on it is its own. To train the
        guide is :func:`~pyro_interpolant.fit_guide`.

        Raises:
            ValueError: If the guide does not know the model's sites yet.
        """
        if self.prototype_trace is None:
            raise ValueError(
                "expected a guide that knows the sites of its model, got one that was never "
                "called: guide(*args), or train it by fit_guide"
            )
        transform = copy.copy(self.transform)  # of the same weights
        transform.trains_weights = False
        return JointInterpolantDistribution(transform, sites=LatentSites(self).sites)

    def sample_latent(self, *args: object, **kwargs: object) -> Tensor:
        """Sample the unconstrained latent vector, shape ``(*, D)``, as an auxiliary site."""
        self._claim_weights()
        warn_poor(self)
        name = f"_{self._pyro_name}_latent"
        posterior = self.get_posterior(*args, **kwargs)
        return pyro.sample(name, posterior, infer={"is_auxiliary": True})

    def forward(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Sample the latent sites, each of the site's shape, by name."""
        with Imaged():
            return super().forward(*args, **kwargs)

    def _claim_weights(self) -> None:
        """Remove from the parameter store the weights of copies and of guides of the same name.

        Pyro would train what is in the store, and run what is in the guide.
        """
        if not self._pyro_context.active or pyro.settings.get("module_local_params"):
            return
        store, is_lost = pyro.get_param_store(), False
        kept = dict(store.named_parameters())
        prefix = self._pyro_get_fullname("transform")
        for name, weight in dict(self.named_children())["transform"].named_parameters():
            full = pyro.params.param_store.param_with_module_name(prefix, name)
            if (held := kept.get(full, weight)) is not weight:
                is_lost |= _CLAIMED.get(id(held)) is not held and not torch.equal(held, weight)
                del store[full]
            _CLAIMED[id(weight)] = weight
        if is_lost:
            warn_user(
                "the parameter store held other weights of the guide, no flow without its map, "
                "which are left out: keep a guide by torch.save(guide, path), or its state_dict()"
            )

    @torch.no_grad()
    def median(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
        """Return a point in the middle of the latent sites, on their supports, of their shapes.

        It has the median of each unconstrained dimension, so that real and positive numbers and
        those of an interval have their marginal medians. Those of a simplex or a matrix, which
        :meth:`quantiles` gives, need not lie on the support together.
        """
        sites = LatentSites(self, *args, **kwargs)
        middle = quantiles_of(spread_of(self.get_posterior(*args, **kwargs)), [0.5])
        return {name: value[0] for name, value in sites.unpack(middle).items()}

    @torch.no_grad()
    def quantiles(
        self, quantiles: Sequence[float] | Tensor, *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """Return marginal quantiles of the latent sites, each ``(Q, *site_shape)``.

        They are those of each number of a site, over 4,096 quasi-random draws, always the same.

        Args:
            quantiles: Q numbers between 0 and 1.
            *args: The arguments of the model, of which the guide's flow may be a function.
            **kwargs: Its named arguments.
        """
        sites = LatentSites(self, *args, **kwargs)
        draws = sites.unpack(spread_of(self.get_posterior(*args, **kwargs)))
        return {name: quantiles_of(value, quantiles) for name, value in draws.items()}

    @torch.no_grad()
    def start_from(
        self, other: AutoContinuous, *args: object, **kwargs: object
    ) -> "AutoInterpolant":
        r"""Start at the mean and covariance of another guide of the same model, keeping weights.

        For training by ``SVI``: a velocity that starts where a Gaussian guide ends has to learn
        only what is not Gaussian, and a coarse solver will do for it.

        Args:
            other: A trained guide over the same unconstrained vector, such as
                ``AutoMultivariateNormal``.
            *args: The arguments of the model.
            **kwargs: Its named arguments.

        Returns:
            The guide itself.

        Raises:
            TypeError: If the other guide is not over one unconstrained vector.
            ValueError: If it has other sites, or no density.
        """
        check_is_density(other)
        ours, theirs = (LatentSites(g, *args, **kwargs).shapes for g in (self, other))
        if list(ours.items()) != list(theirs.items()):
            raise ValueError(f"expected a guide of the sites {ours}, got one of {theirs}")
        z = one_posterior(other, *args, **kwargs).sample((SPREAD_DRAWS,))
        found = whitening_map(z)
        self.transform.flow.whitening.set(found.loc, found.linear)
        return self

    def train_from(
        self,
        sites: LatentSites,
        clock: Clock,
        settings: dict[str, Any],
        *,
        samples: Mapping[str, ArrayLike] | None,
        simulations: int | Iterable[Any] | None,
        rounds: int | None,
    ) -> GuideResult | AmortizedResult:
        """Train on what there is to learn from; called by :func:`~pyro_interpolant.fit_guide`.

        Args:
            sites: The latent sites, with the model and its arguments.
            clock: The time.
            settings: Options of the training.
            samples: Posterior draws by site, or None.
            simulations: The number of simulations, an iterable of batches of them, or None.
            rounds: In how many rounds, or None.
        """
        if simulations is not None:
            raise ValueError(
                "expected simulations for an AmortizedInterpolant, got them for an "
                f"{type(self).__name__}, which learns one posterior"
            )
        if samples is not None and rounds is not None:
            raise ValueError("expected samples or rounds, got both: samples are learned in one")
        rows = None if samples is None else sites.pack(samples)
        density = None if rows is None else known_log_joint(sites, rows)
        posterior, seed = InterpolantDistribution(self.transform), settings["seed"]
        settings = {"max_seconds": clock.left(), **settings}
        training: FitResult | RoundsResult
        if rows is None:
            if settings.get("checkpoint") is not None:
                raise ValueError(
                    "expected no checkpoint beside the model alone, whose training cannot be "
                    f"resumed, got {settings['checkpoint']}: give samples, or leave it out"
                )
            density = LogJoint(sites)
            with seeded(seed):
                start = prior_draws(density, PRIOR_DRAWS)
            settings = {"start": start, "rounds": rounds, **settings}
            with trainable(self.transform):  # and then as it was: SVI may train on
                training = train_from_density(posterior, density, **settings)
            density.check(training.particles)
        else:
            check_settings(settings)
            rows = rows.to(self.transform.flow.loc)
            with trainable(self.transform):
                training = fit(posterior, rows, **settings)
        return self._judged(posterior, density, clock, seed, training)

    def _judged(
        self,
        posterior: InterpolantDistribution,
        density: LogJoint | None,
        clock: Clock,
        seed: int | None,
        training: FitResult | RoundsResult,
    ) -> GuideResult:
        """Return what training gave, judged where there is a density."""
        self.poor = None
        if density is None:
            unknown = ImportanceSummary(*[math.nan] * 4)
            return GuideResult(*unknown, 0, _UNKNOWN, clock.spent(), training)
        result = importance_verdict(posterior, density, clock, seed, training)
        if not are_raw_draws_good(result, result.draws):
            self.poor = result.verdict
        return result

    def attach(self, model: Model) -> "AutoInterpolant":
        """Give a guide that was pickled, which leaves its model behind, the model again.

        Returns:
            The guide itself.
        """
        is_known = self.prototype_trace is not None
        self._model = (model if is_known else InitMessenger(self._start)(model),)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickles: without the model, and leaving this guide as it is."""
        state = super(AutoGuide, self).__getstate__()  # AutoGuide's own takes them from this one
        start = self._start if self.prototype_trace is None else None  # may be a lambda
        return {**state, "_model": None, "master": None, "_start": start}

    def __deepcopy__(self, memo: dict[int, Any]) -> "AutoInterpolant":
        """Return a guide of the same model with weights of its own."""
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        new.__dict__["_model"] = self._model
        return new


# The weights of guides in the parameter store, by ``id``: others come from elsewhere.
_CLAIMED: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
PRIOR_DRAWS = 4096  # from which training on the model alone starts
_UNKNOWN = "Unknown, the log joint density cannot be evaluated."


@with_gradients()
def fit_guide(
    guide: AutoInterpolant,
    *args: object,
    samples: Mapping[str, ArrayLike] | None = None,
    simulations: int | Iterable[Any] | None = None,
    rounds: int | None = None,
    max_seconds: float | None = None,
    seed: int | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    options: Mapping[str, object] | None = None,
    **kwargs: object,
) -> GuideResult | AmortizedResult:
    r"""Train a guide, in place, with no gradient through an ODE.

    An :class:`~pyro_interpolant.AmortizedInterpolant` learns from simulations of its model.
    Another guide, with ``samples``: by regression on posterior draws of another sampler, as
    :func:`~pyro_interpolant.fit`. Without: from the model alone, by rounds of drawing, weighing
    and regression from a wide start, see :func:`~pyro_interpolant.train_from_density`. ``SVI`` can
    train any on afterwards.

    A mode or a neck that no draw visits stays invisible to k-hat; see
    :func:`~pyro_interpolant.importance` for what helps.

    Args:
        guide: The guide.
        *args: The arguments of the model.
        samples: Posterior draws of every latent site on its own support, each
            ``(N, *site_shape)`` or by chain ``(C, N, *site_shape)``, such as
            ``mcmc.get_samples()``.
        simulations: How many simulations an amortised guide learns from, by default 10,000, in as
            many steps and 2,000 at least. Or batches of simulations made elsewhere: an iterable of
            ``(latents, data)``, two dictionaries by site, each value ``(B, *site_shape)``, again
            each time it is gone through, in memory or not. The first ones, a tenth of 10,000,
            judge the guide.
        rounds: Of training from the model alone, the most, by default 20. Of an amortised guide,
            how many times it is trained for the data in the arguments: from the second on,
            simulations come from the part of the prior where the guide has its mass, so that its
            posterior stays right. By default once, for all data.
        max_seconds: A limit of the time until the training ends, by default none; the calibration
            and the verdict follow. ``result.training.stopped_by`` says where it cut the run.
        seed: Makes the run reproducible; the global generator is left as it was.
        progress: Whether to show a bar.
        checkpoint: A file to keep the state of the training in, as in
            :func:`~pyro_interpolant.fit`; beside samples, or simulations with a seed, which draws
            them again.
        options: Further options of :func:`~pyro_interpolant.fit`, or, where there is nothing to
            learn from but the density, of :func:`~pyro_interpolant.train_from_density`.
        **kwargs: The named arguments of the model.

    Returns:
        A :class:`~pyro_interpolant.infer.GuideResult`, the verdict on fresh draws, with a warning
        if they cannot be relied on or, for a model whose log joint density cannot be evaluated,
        that is not known; of an amortised guide trained in one round an
        :class:`~pyro_interpolant.infer.AmortizedResult`, the verdict on fresh simulations.

    Raises:
        TypeError: If the guide is not an :class:`~pyro_interpolant.AutoInterpolant`, or samples
            are not by site.
        ValueError: If the samples miss a site or have another shape, a setting cannot work, there
            are no samples and the log joint density cannot be evaluated, or no simulation is
            finite.

    Example:
        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 1.0))
        >>> guide = AutoInterpolant(model)
        >>> draws = {"x": 3 + torch.randn(2000)}
        >>> result = fit_guide(
        ...     guide, samples=draws, seed=0, progress=False, options={"steps": 50}
        ... )
        >>> result.k_hat < 0.7, abs(result.log_evidence) < 0.1
        (True, True)
    """
    clock = Clock(max_seconds)
    if not isinstance(guide, AutoInterpolant):
        got = f"{type(guide).__module__}.{type(guide).__name__}"
        raise TypeError(f"expected an AutoInterpolant of pyro_interpolant, got {got}")
    with seeded(seed):
        sites = LatentSites(guide, *args, **kwargs)
    settings = {"seed": seed, "progress": progress, **(options or {})}
    if checkpoint is not None:
        settings["checkpoint"] = checkpoint
    return guide.train_from(
        sites, clock, settings, samples=samples, simulations=simulations, rounds=rounds
    )
