r"""The flow as a guide for a NumPyro model: trained in torch, used in jax.

The model's log joint density of the unconstrained vector of its latent sites is compiled by jax
and handed to torch with its gradient; the flow that torch has trained comes back through what a
file would hold.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.distributions import Distribution
from numpyro.infer import Predictive, init_to_uniform
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.util import constrain_fn, unconstrain_fn
from numpyro.util import not_jax_tracer

from .._package import check_ranges
from .distributions import InterpolantDistribution
from .loading import from_torch
from .log_density import (
    Arguments,
    Named,
    Site,
    check_plates,
    check_random_numbers,
    displacements,
    draws_of,
    log_density,
    sites_without_density_named,
)
from .transforms import InterpolantTransform
from .validity import innermost_distribution

if TYPE_CHECKING:
    from torch import Tensor
    from torch.autograd.function import FunctionCtx

    from ..infer.importance_sampling import GuideResult
    from ..infer.smc.train import RoundsResult
    from ..training.fitting import FitResult

__all__ = ["AutoInterpolant", "fit_guide"]

_BLOCKS = (16, 128, 1024, 4096)  # numbers of rows for which a density is compiled
_ROUNDED = 1e-3  # of the greatest number of a draw, off which one on a support may come back


class AutoInterpolant(AutoContinuous):
    """A guide over all latent sites of a NumPyro model at once: a continuous normalizing flow.

    Train it by :func:`fit_guide`. It has no parameters: where NumPyro wants some, give ``{}``, as
    in ``guide.sample_posterior(key, {}, sample_shape=(100,))``, ``guide.get_posterior({})``,
    ``guide.get_transform({})`` and ``NeuTraReparam(guide, {})``. :func:`importance` weighs its
    draws, and :func:`neutra` is the model in its base space.

    Args:
        model: A NumPyro model whose latent sites are continuous.
        hidden_dims: The widths of the velocity's hidden layers; by default chosen by the number of
            latent dimensions.
        prefix: What the names of the guide's own sites begin with.
        init_loc_fn: What the sites are where the model is first run, one of NumPyro's
            initialisation strategies; training starts elsewhere, from draws of the prior.

    Raises:
        TypeError: If the model is not callable.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(3.0, 1.0))
        >>> guide = AutoInterpolant(model, hidden_dims=(32, 32))
        >>> draws = {"x": 3 + jax.random.normal(jax.random.key(0), (2000,))}
        >>> result = fit_guide(
        ...     guide, jax.random.key(0), samples=draws, seed=0, progress=False,
        ...     options={"steps": 50},
        ... )
        >>> result.k_hat < 0.7, abs(result.log_evidence) < 0.1
        (True, True)
        >>> guide.sample_posterior(jax.random.key(1), {}, sample_shape=(5,))["x"].shape
        (5,)
    """

    posterior: InterpolantDistribution | None = None

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        hidden_dims: Sequence[int] | None = None,
        prefix: str = "auto",
        init_loc_fn: Callable[..., Any] = init_to_uniform,
    ) -> None:
        if not callable(model):
            raise TypeError(f"expected a model, a callable, got {type(model).__name__}")
        super().__init__(model, prefix=prefix, init_loc_fn=init_loc_fn)
        self.hidden_dims = hidden_dims

    def _get_posterior(self) -> InterpolantDistribution:
        if self.posterior is None:
            raise ValueError("expected a trained guide: call fit_guide(guide, key, *args) first")
        return self.posterior

    def get_base_dist(self) -> Distribution:
        """Return N(0, I), of event shape ``(D,)``."""
        return self._get_posterior().base_dist

    def get_transform(self, params: Mapping[str, Any] | None = None) -> InterpolantTransform:
        """Return the flow, from N(0, I) to unconstrained vectors, each of shape ``(*, D)``."""
        return self._get_posterior().transform

    def get_posterior(self, params: Mapping[str, Any] | None = None) -> InterpolantDistribution:
        """Return the distribution of the unconstrained latent vector, of event shape ``(D,)``."""
        return self._get_posterior()

    def median(self, params: Mapping[str, Any] | None = None) -> dict[str, Array]:
        """Return a point in the middle of the latent sites, on their supports, of their shapes.

        It has the median of each unconstrained dimension, so that real and positive numbers and
        those of an interval have their marginal medians. Those of a simplex or a matrix, which
        :meth:`quantiles` gives, need not lie on the support together.
        """
        return self._unpack_and_constrain(jnp.median(self._spread(), 0), {})

    def quantiles(
        self, params: Mapping[str, Any] | None, quantiles: Sequence[float]
    ) -> dict[str, Array]:
        """Return marginal quantiles of the latent sites, each ``(Q, *site_shape)``.

        They are those of each number of a site, over draws that are always the same.

        Args:
            params: Ignored.
            quantiles: Q numbers between 0 and 1.

        Raises:
            ValueError: If one of them is known not to be.
        """
        if all(map(not_jax_tracer, jax.tree.leaves(quantiles))):
            at = np.asarray(quantiles)
            good = bool(((at >= 0) & (at <= 1)).all())
            check_ranges(("quantiles between 0 and 1", good, quantiles))
        draws = self._unpack_and_constrain(self._spread(), {})
        return {k: jnp.quantile(v, jnp.array(quantiles), 0) for k, v in draws.items()}

    def _spread(self) -> Array:
        """Return draws of the unconstrained vector, always the same, shape ``(4096, D)``."""
        return self._get_posterior().sample(jax.random.key(0), (4096,))


def fit_guide(
    guide: AutoInterpolant,
    key: Array,
    *args: object,
    samples: Mapping[str, ArrayLike] | None = None,
    rounds: int | None = None,
    max_seconds: float | None = None,
    seed: int | None = None,
    progress: bool = True,
    options: Mapping[str, Any] | None = None,
    **kwargs: object,
) -> "GuideResult":
    r"""Train a guide of a NumPyro model, in place, with no gradient through an ODE.

    As :func:`pyro_interpolant.fit_guide`, of which it is the twin: by rounds of drawing, weighing
    and regression from draws of the prior, or by regression on posterior draws. A guide whose
    training is refused or interrupted stays as it was. Needs torch.

    Args:
        guide: The guide.
        key: For the model's initial values, and draws of the prior.
        *args: The arguments of the model.
        samples: Posterior draws of every latent site on its own support, each
            ``(N, *site_shape)`` or by chain ``(C, N, *site_shape)``, such as
            ``mcmc.get_samples()``, or None.
        rounds: The most rounds of training from the model alone, by default 20.
        max_seconds: A limit of the time until the training ends, by default none.
        seed: Makes the run reproducible.
        progress: Whether to show a bar.
        options: Further options of :func:`~pyro_interpolant.fit`, or, without samples, of
            :func:`~pyro_interpolant.train_from_density`.
        **kwargs: The named arguments of the model.

    Returns:
        The verdict on fresh draws, a :class:`~pyro_interpolant.infer.GuideResult`, with a warning
        if they cannot be relied on.

    Raises:
        TypeError: If the guide is not an :class:`AutoInterpolant` of NumPyro, there is no key, or
            samples are not by site.
        ValueError: If the samples miss a site, have another shape or are off its support, a
            setting cannot work, a latent site is discrete, or the log density is noisy (a
            subsampled plate, a latent site that ``block`` hides).
    """
    import torch

    from .. import distributions, transforms
    from .._torch import seeded, with_gradients
    from ..infer import autoguide, train_from_density
    from ..infer.amortization import check_settings
    from ..infer.importance_sampling import importance_verdict
    from ..nn import VelocityMLP
    from ..training import fit
    from ..training.clock import Clock

    check_guide(guide)
    check_key(key)
    clock = Clock(max_seconds)
    if samples is not None:
        if rounds is not None:
            raise ValueError("expected samples or rounds, got both: samples are learned in one")
        check_settings(options or {})
    setup, draw = jax.random.split(key)
    with with_gradients(), _kept_if_refused(guide):
        with handlers.seed(rng_seed=setup), sites_without_density_named(guide, args, kwargs):
            guide._setup_prototype(*args, **kwargs)
        check_plates(guide.prototype_trace)
        check_random_numbers(guide, args, kwargs)
        dtype = torch.float64 if jnp.result_type(float) == np.float64 else torch.float32
        settings: dict[str, Any] = {
            "max_seconds": clock.left(),
            "seed": seed,
            "progress": progress,
            **(options or {}),
        }
        with seeded(settings["seed"]):
            network = VelocityMLP(guide.latent_dim, guide.hidden_dims).to(dtype)
        posterior = distributions.InterpolantDistribution(transforms.InterpolantTransform(network))
        density = TorchDensity(guide, args, kwargs)
        if samples is None:
            start = _prior_draws(guide, draw, args, kwargs, autoguide.PRIOR_DRAWS)
            settings = {"start": start, "rounds": rounds, **settings}
            training: FitResult | RoundsResult = train_from_density(posterior, density, **settings)
        else:
            rows = torch.tensor(np.asarray(_packed(guide, samples, args, kwargs)), dtype=dtype)
            training = fit(posterior, rows, **settings)
        result = importance_verdict(posterior, density, clock, settings["seed"], training)
        guide.posterior = cast(InterpolantDistribution, from_torch(posterior))
        return result


@contextlib.contextmanager
def _kept_if_refused(guide: AutoInterpolant) -> Iterator[None]:
    """Leave a guide as it was where its training is refused or interrupted."""
    before = {k: v.copy() if isinstance(v, dict) else v for k, v in vars(guide).items()}
    try:
        yield
    except BaseException:
        guide.__dict__ = before
        raise


def check_guide(guide: object) -> None:
    """Raise a TypeError for what is no guide of this room."""
    if not isinstance(guide, AutoInterpolant):
        kind = type(guide)
        raise TypeError(
            "expected an AutoInterpolant of pyro_interpolant.numpyro, got "
            f"{kind.__module__}.{kind.__name__}"
        )


def check_key(key: object, place: str = "second") -> None:
    """Raise a TypeError for what is no random key, such as data where it was forgotten.

    Args:
        key: What was given.
        place: Which argument it is.
    """
    got, good = type(key).__name__, False
    if isinstance(key, jax.Array | np.ndarray):
        got = f"an array of {key.dtype}, shape {key.shape}"
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        good = not key.shape if is_typed else key.ndim == 1 and key.dtype == np.uint32
    if not good:
        raise TypeError(
            f"expected a key of jax.random as the {place} argument, such as jax.random.key(0), "
            f"got {got}"
        )


def _packed(
    guide: AutoInterpolant, draws: Mapping[str, ArrayLike], args: Arguments, kwargs: Named
) -> Array:
    """Return unconstrained vectors, shape ``(N, D)``, of draws by site, by chain or not.

    Raises:
        ValueError: If a site is missing, of another shape, or outside its support.
    """
    parts = _unconstrained(guide, draws, args, kwargs)
    for name, part in parts.items():
        outside = ~jnp.isfinite(part).all(1)
        if outside.any():
            support = guide.prototype_trace[name]["fn"].support
            raise ValueError(
                f"expected draws of site {name!r} strictly inside its support {support}, got "
                f"{outside.sum()} of {len(outside)} outside it or on its edge, the first being "
                f"draw {outside.argmax()}"
            )
    return jnp.concatenate(list(parts.values()), -1)


def _unconstrained(
    guide: AutoInterpolant, draws: Mapping[str, ArrayLike], args: Arguments, kwargs: Named
) -> dict[str, Array]:
    """Return the part of each site in unconstrained vectors, ``(N, size)``, of draws by site.

    Those of draws outside a support or on its edge are not finite.

    Raises:
        TypeError: If draws are not by site.
        ValueError: If a site is missing, or of another shape, or there are no draws.
    """
    if not isinstance(draws, Mapping):
        raise TypeError(
            f"expected draws of each site {list(guide._init_locs)} by name, as "
            f"mcmc.get_samples() gives them, got {type(draws).__name__}"
        )
    shapes = {name: guide.prototype_trace[name]["value"].shape for name in guide._init_locs}
    missing = sorted(set(shapes) - set(draws))
    if missing:
        raise ValueError(f"expected draws of the sites {list(shapes)}, got none of {missing}")
    rows = {}
    for name, shape in shapes.items():
        value = jnp.asarray(draws[name])
        if (
            value.ndim - len(shape) not in (1, 2)
            or value.shape[value.ndim - len(shape) :] != shape
        ):
            raise ValueError(
                f"expected draws of site {name!r}, of shape {shape}, along one dimension or two, "
                f"got shape {value.shape}"
            )
        rows[name] = value.reshape(-1, *shape)
    if len({len(value) for value in rows.values()}) > 1:
        raise ValueError(
            "expected as many draws of every site, got "
            f"{ {name: len(value) for name, value in rows.items()} }"
        )
    if not all(map(len, rows.values())):
        raise ValueError("expected draws of every site, got none")

    def real_of(sites: dict[str, Array]) -> dict[str, Array]:
        model = handlers.seed(guide.model, rng_seed=0)  # for parameters that a function draws
        real = unconstrain_fn(model, args, kwargs, sites)
        real = {name: real[name] for name in shapes}
        back = constrain_fn(model, args, kwargs, real)
        # Some inverses are finite beside the support, as that of rows that do not sum to one.
        good = {name: _is_near(back[name], sites[name]) for name in shapes}
        return {name: jnp.where(good[name], jnp.ravel(real[name]), jnp.nan) for name in shapes}

    parts = jax.jit(jax.vmap(real_of))(rows)
    return {name: parts[name] for name in shapes}


def _is_near(value: Array, other: Array) -> Array:
    """Return whether the numbers of a value are those of another, up to rounding."""
    return jnp.abs(value - other).max(initial=0.0) <= _ROUNDED * jnp.abs(other).max(initial=0.0)


def _prior_draws(
    guide: AutoInterpolant, key: Array, args: Arguments, kwargs: Named, count: int
) -> "Tensor | None":
    """Return unconstrained draws of the prior, ``(<= count, D)``, or None where there are none.

    Sites with an improper prior are drawn widely. Draws that rounding has put on the edge of a
    support are left out, and the rarest 1% is clamped to the rest, for priors without moments.
    """
    import torch

    from ..infer.prior import without_extremes

    try:
        model = handlers.substitute(guide.model, substitute_fn=_wide_draw)
        draws = Predictive(model, num_samples=count)(key, *args, **kwargs)
        parts = _unconstrained(guide, draws, args, kwargs)
    except (NotImplementedError, ValueError):  # a prior that cannot be sampled
        return None
    return without_extremes(torch.tensor(np.concatenate(list(parts.values()), -1)))


def _wide_draw(site: Site) -> Array | None:
    """Return a wide draw of a site whose prior is improper, which has none of its own, or None."""
    from ..infer.prior import IMPROPER_SCALE

    if site["type"] != "sample":
        return None
    fn = site["fn"]
    if not isinstance(innermost_distribution(fn), dist.ImproperUniform):
        return None
    key, transform = site["kwargs"]["rng_key"], dist.biject_to(fn.support)
    shape = transform.inverse_shape(fn.shape(draws_of(site)))
    key = numpyro.prng_key() if key is None else key
    return transform(IMPROPER_SCALE * jax.random.normal(key, shape))


class TorchDensity:
    """The log joint density of a NumPyro model for torch, twice differentiable.

    Args:
        guide: A guide that knows its model.
        args: The arguments of the model.
        kwargs: Its named arguments.
    """

    def __init__(self, guide: AutoInterpolant, args: Arguments, kwargs: Named) -> None:
        self._log_density = _for_torch(log_density(guide, args, kwargs))
        self._names = sorted(guide._init_locs)  # in the order of jax's leaves
        self._moved = in_blocks(jax.vmap(displacements(guide, args, kwargs)))

    def __call__(self, z: "Tensor") -> "Tensor":
        """Return log densities, shape ``(N,)``, of unconstrained vectors, shape ``(N, D)``."""
        return self._log_density(z)

    def displacements(self, z: "Tensor") -> dict[str, "Tensor"]:
        """Return by site how far numbers of z move there and back, each ``(N, size)``."""
        return dict(zip(self._names, self._moved(z), strict=True))


def _for_torch(density: Callable[[Array], Array]) -> Callable[["Tensor"], "Tensor"]:
    """Return a density for torch, from rows ``(N, D)`` to ``(N,)``, twice differentiable."""
    import torch

    both = in_blocks(jax.vmap(jax.value_and_grad(density)))
    pulled = in_blocks(jax.vmap(lambda z, v: jax.vjp(jax.grad(density), z)[1](v)))

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: "FunctionCtx", z: "Tensor") -> "Tensor":
            ctx.save_for_backward(z)
            return both(z)[1]

        @staticmethod
        def backward(ctx: Any, *cotangents: "Tensor") -> "Tensor":
            try:
                return pulled(*ctx.saved_tensors, cotangents[0])[0]
            except (TypeError, ValueError) as error:  # of jax: there is no second derivative
                raise NotImplementedError(str(error)) from error

    class LogDensity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: "FunctionCtx", z: "Tensor") -> "Tensor":
            values, slopes = both(z)
            ctx.save_for_backward(z, slopes)
            return values

        @staticmethod
        def backward(ctx: Any, *cotangents: "Tensor") -> "Tensor":
            z, slopes = ctx.saved_tensors
            if torch.is_grad_enabled():  # a gradient that is to be differentiated again
                slopes = Gradient.apply(z)
            return cotangents[0][:, None] * slopes

    return LogDensity.apply


def in_blocks(function: Callable[..., Any]) -> Callable[..., list["Tensor"]]:
    """Return a function of jax for rows of torch, in blocks of few sizes: few compilations.

    Rows of float64 are computed in that type, also where jax has float32 by default.

    Args:
        function: From arrays of rows, each ``(N, D)``, to one or several of as many rows.
    """
    import torch

    compiled = jax.jit(lambda *rows: jax.tree.leaves(function(*rows)))

    def block(*rows: "Tensor") -> list["Tensor"]:
        count = len(rows[0])
        more = next(size for size in _BLOCKS if size >= count) - count
        arrays = (part.detach().cpu().numpy() for part in rows)
        padded = [np.concatenate((part, np.repeat(part[-1:], more, 0))) for part in arrays]
        finer = rows[0].dtype == torch.float64 and jnp.result_type(float) != np.float64
        with jax.enable_x64(new_val=True) if finer else contextlib.nullcontext():
            found = compiled(*padded)
        return [torch.tensor(np.asarray(part)[:count]).to(rows[0]) for part in found]

    def blocks(*rows: "Tensor") -> list["Tensor"]:
        parts = zip(*(part.split(_BLOCKS[-1]) for part in rows), strict=True)
        return [torch.cat(found) for found in zip(*(block(*p) for p in parts), strict=True)]

    return blocks
