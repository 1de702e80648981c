r"""Base space for NumPyro: :math:`z \sim q` becomes :math:`z = T(w)`, w a base draw.

By ``base_space`` for learned priors inside a model; by ``neutra`` for all latent sites together,
through a trained guide.
"""

import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike
from numpyro import handlers
from numpyro.distributions.distribution import Unit
from numpyro.infer.reparam import Reparam
from numpyro.primitives import _PYRO_STACK, get_mask
from numpyro.util import not_jax_tracer

from .autoguide import AutoInterpolant, check_guide
from .bases import Planar, directions, in_planes, unwrapped
from .distributions import InterpolantDistribution
from .given import is_given
from .log_density import check_fixed_shape, draws_of
from .supports import CIRCULAR, Bijection, forward, per_event
from .validity import is_valid, log_prob_left_out, without_masks

__all__ = ["base_space", "neutra"]

_BASE = "_base"  # what a site in base space has after its name
_JACOBIAN = "_log_jacobian"  # and what the site has of its Jacobian where a scale weighs it
_RAYLEIGH_RMS = 2**0.5  # the root mean square of a Rayleigh distance


def base_space(model: Callable[..., Any]) -> Callable[..., Any]:
    r"""Return the model with its learned priors sampled in base space.

    Every latent site ``z`` whose distribution is an
    :class:`~pyro_interpolant.numpyro.InterpolantDistribution` (conditioned, expanded, in plates,
    under ``to_event`` or ``mask``) becomes ``z_base ~ base`` and ``z = T(z_base)``, a
    deterministic site under the same name. Inference then needs the forward solve alone, and sees
    a Gaussian before it sees data. For D angles ``z_base`` has shape ``(2 D,)``: a point of the
    plane in the direction of each.

    A site stays as it is where it is observed, or where its own value is given from outside: by
    ``condition``, ``do``, ``substitute`` or ``replay``, so by a guide that has ``z``, or by draws
    of ``z`` without ``z_base`` in ``Predictive``. ``init_to_value(values={"z": ...})`` is honoured
    by inverting the flow once; all other strategies apply to ``z_base``. Sites inside NumPyro's
    ``scan`` are left alone too, but for ``scan(base_space(step), ...)``. A scale inside of the
    model weighs the density of z, of which the Jacobian's part is a factor beside the base; one
    around the result weighs the density of what is sampled there. ``Predictive`` lists that factor
    as ``z_log_jacobian``, an empty array whose last dimension is 0.

    Args:
        model: A NumPyro model.

    Returns:
        A model with the same joint density.

    Example:
        >>> import jax, numpyro, pyro_interpolant as pi
        >>> flow = pi.InterpolantDistribution(pi.interpolant_transform(2))
        >>> pi.save(flow, "prior.safetensors")
        >>> prior = pi.numpyro.load("prior.safetensors")
        >>> def model():
        ...     z = numpyro.sample("z", prior)
        ...     numpyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=1.0)
        >>> seeded = handlers.seed(base_space(model), jax.random.key(0))
        >>> {name: site["type"] for name, site in handlers.trace(seeded).get_trace().items()}
        {'z_base': 'sample', 'z': 'deterministic', 'y': 'sample'}
    """
    return handlers.reparam(model, config=_config)


class _InBaseSpace(Reparam):
    """Sample the base of a flow, inside the flow's own wrappers, and map the draw.

    Args:
        flow: The flow.
        site: The site, before it is sampled.
        value: Where to start from, on the support, or None.
        scales: The scales inside of base space.
    """

    def __init__(
        self,
        flow: InterpolantDistribution,
        site: Mapping[str, Any],
        value: Array | None,
        scales: list[ArrayLike],
    ) -> None:
        self.flow, self.value, self.scales = flow, value, scales
        key = site["kwargs"].get("rng_key")
        self.how = {"sample_shape": draws_of(site), "infer": dict(site["infer"]), "rng_key": key}

    def __call__(self, name: str, fn: dist.Distribution, obs: Array | None) -> tuple[None, Array]:
        """Return no distribution, and the value of the site."""
        flow = self.flow
        with self._start(name, fn):
            w = numpyro.sample(name + _BASE, _base_of(flow, fn), **self.how)
        x = directions(w) if _is_angular(flow) else w
        if all(not_jax_tracer(s) and np.all(np.equal(s, 1)) for s in self.scales):
            for transform in flow.transforms:
                x = transform(x)
            return None, x
        batch, log_det = jnp.shape(x)[:-1], jnp.zeros(())
        for transform in flow.transforms:
            x, term = forward(transform, x)
            log_det = log_det + per_event(term, batch)
        if _is_angular(flow):  # the density of distances from 0 is none of the site's to weigh
            log_det = log_det - 0.5 * jnp.square(w).sum(-1)
        self._count_jacobian(name, fn, log_det)
        return None, x

    def _count_jacobian(self, name: str, fn: dist.Distribution, log_det: Array) -> None:
        r"""Add what a scale s inside of base space takes from the Jacobian of a site.

        The density :math:`q(z)^s` is :math:`p(w)^s |\det J|^{1 - s}` in terms of the base draw w.
        The scale weighs the base's :math:`\log p(w)` already, and the factor beside it too, which
        is therefore :math:`\frac{1 - s}{s} \log |\det J|`: enumeration takes sites of one scale
        alone.

        Args:
            name: The name of the site.
            fn: Its distribution.
            log_det: The log-determinant of each event of the flow, ``(*)``; of angles the
                log-density of their points' distances from 0, too.
        """
        scale: Any = math.prod(self.scales)  # of the shape that the site's density broadcasts with
        each = _wrapped(Unit(log_det), fn)
        log_det = each.log_prob(each.sample(None))
        numpyro.factor(name + _JACOBIAN, (1 - scale) / scale * log_det)

    @contextlib.contextmanager
    def _start(self, name: str, fn: dist.Distribution) -> Iterator[None]:
        """Give the base the value to start from, if there is one: each member of a plate its own.

        Raises:
            ValueError: If the value does not broadcast to the shape of the site, or is known to
                be outside its support.
        """
        if self.value is None:
            yield
            return
        shape = fn.shape(self.how["sample_shape"])
        try:
            x = jnp.broadcast_to(jnp.asarray(self.value), shape)
        except ValueError as error:
            raise ValueError(
                f"expected an initial value of site {name!r} that broadcasts to its shape "
                f"{shape}, got shape {jnp.shape(self.value)}: pass one for each member of its "
                "plates, or one for all"
            ) from error
        for transform in reversed(self.flow.transforms):
            x = transform.inv(x)
        if not_jax_tracer(x) and not np.isfinite(x).all():  # a sampler would find no start
            raise ValueError(
                f"expected an initial value of site {name!r} strictly inside its support "
                f"{fn.support}, got others: pass another to init_to_value"
            )
        x = in_planes(x, _RAYLEIGH_RMS) if _is_angular(self.flow) else x
        with warnings.catch_warnings(), handlers.substitute(data={name + _BASE: x}):
            warnings.filterwarnings("ignore", ".*skipping initialization of site")
            yield


def _config(site: dict[str, Any]) -> Reparam | None:
    """Return how a site is sampled, or None as it is."""
    flow = _flow_in(site["fn"])
    if _is_drawn(site) or site["is_observed"] or flow is None:
        return None
    stack = list(reversed(_PYRO_STACK))  # from the inside
    here = [isinstance(h, handlers.reparam) and h.config is _config for h in stack].index(True)
    # The name has what the scopes inside of here put before it.
    others = [h for i, h in enumerate(stack) if i > here or not isinstance(h, handlers.scope)]
    base = {**site, "name": site["name"] + _BASE, "fn": _base_of(flow, site["fn"])}
    given, start = is_given(site, base, others)
    scales = [h.scale for h in stack[:here] if isinstance(h, handlers.scale)]
    return None if given else _InBaseSpace(flow, site, start, scales)


def _is_drawn(site: dict[str, Any]) -> bool:
    """Return whether a site has its value already, as those that control flow records."""
    return site["value"] is not None


def _flow_in(fn: dist.Distribution) -> InterpolantDistribution | None:
    """Return the flow inside ``expand``, ``to_event`` and ``mask``, or None."""
    fn = unwrapped(fn)
    return fn if isinstance(fn, InterpolantDistribution) else None


def _base_of(flow: InterpolantDistribution, fn: dist.Distribution) -> dist.Distribution:
    """Return what is sampled in base space, inside the wrappers that a flow has."""
    return _wrapped(Planar(flow.base_dist) if _is_angular(flow) else flow.base_dist, fn)


def _wrapped(base: dist.Distribution, fn: dist.Distribution) -> dist.Distribution:
    """Return a base inside the wrappers that a flow has."""
    if isinstance(fn, dist.MaskedDistribution):
        return _wrapped(base, fn.base_dist).mask(fn._mask)
    if isinstance(fn, dist.Independent):
        return _wrapped(base, fn.base_dist).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.ExpandedDistribution):
        inner = _wrapped(base, fn.base_dist)
        return inner if isinstance(base, Unit) else inner.expand(fn.batch_shape)
    return base


def _is_angular(flow: InterpolantDistribution) -> bool:
    last = flow.transforms[-1]
    return isinstance(last, Bijection) and last.text == CIRCULAR


def neutra(guide: AutoInterpolant) -> Callable[..., Any]:
    r"""Return the guide's model in the guide's base space, where a good guide makes it N(0, I).

    All latent sites are deterministic functions of one site, ``auto_shared_latent``, which is of
    shape ``(D,)``, and keep their names. One solve gives them and the Jacobian, where NumPyro's
    :class:`~numpyro.infer.reparam.NeuTraReparam` takes two; nor does the Jacobian count once for
    each member of a plate around the first site, nor is it weighed by a scale or a mask around the
    result. Initial values are those of the base draw. Where a latent site is given its value from
    outside, as by ``condition`` or by draws in ``Predictive``, and the base draw is not, the model
    runs as it is.

    Args:
        guide: A trained guide.

    Returns:
        A model with the same joint density, for NUTS.

    Raises:
        TypeError: If the guide is not an :class:`AutoInterpolant` of NumPyro.
        ValueError: If it is not trained; when the model runs, if it has not the latent sites that
            the guide has seen, draws one inside NumPyro's ``scan`` or ``cond``, or gives one its
            value by a ``substitute`` of its own.

    References:
        Hoffman et al., *NeuTra-lizing Bad Geometry in Hamiltonian Monte Carlo Using Neural
        Transport*, arXiv 1903.03704.
    """
    check_guide(guide)
    posterior = guide.get_posterior()

    @functools.wraps(guide.model)
    def model(*args: object, **kwargs: object) -> object:
        base = posterior.base_dist.mask(mask=False)  # not scored: the density is the model's
        shared = {"type": "sample", "name": f"{guide.prefix}_shared_latent", "fn": base}
        stack = list(reversed(_PYRO_STACK))
        sites = [guide.prototype_trace[name] for name in guide._init_locs]
        if any(is_given(site, {**site, **shared}, stack)[0] for site in sites):
            return guide.model(*args, **kwargs)
        w = numpyro.sample(f"{guide.prefix}_shared_latent", base)
        z, log_det = posterior.transform.call_with_intermediates(w)
        images = _Images(guide._unpack_latent(z))
        with handlers.reparam(config=images.config):
            result = guide.model(*args, **kwargs)
        if get_mask() is not False:
            with _unweighted():
                numpyro.factor(f"{guide.prefix}_log_jacobian", log_det + images.total)
        if images.parts:
            raise ValueError(
                "expected the latent sites the guide has seen, got a model without "
                f"{sorted(images.parts)}"
            )
        return result

    return model


@contextlib.contextmanager
def _unweighted() -> Iterator[None]:
    """Keep what is inside from the scales and masks around, which weigh densities of sites."""
    around = list(_PYRO_STACK)
    _PYRO_STACK[:] = [h for h in around if not isinstance(h, handlers.scale | handlers.mask)]
    try:
        yield
    finally:
        _PYRO_STACK[:] = around


class _Images(Reparam):
    """Give latent sites their parts of one unconstrained vector, and add up the Jacobians.

    The Jacobians are of the whole vector: they are no part of the density of a site, which counts
    as often as its scale says, or not at all under a mask.

    Args:
        parts: The unconstrained value of each site; each is taken out as its site comes.

    Attributes:
        total: The sum so far of the log-determinants, and of the log densities of rows that are
            masked out; minus infinity where a site has no density, which its formula may not tell.
    """

    def __init__(self, parts: Mapping[str, Array]) -> None:
        self.parts, self.total = dict(parts), jnp.zeros(())
        self.shape: tuple[int, ...] = ()  # the sample_shape of the site that comes next

    def config(self, site: dict[str, Any]) -> "_Images | None":
        """Return how a site is sampled, or None as it is."""
        if site["name"] not in self.parts:
            return self if site["is_observed"] else None
        if site["is_observed"]:
            raise ValueError(
                f"expected site {site['name']!r} to be latent, as when the guide was set up, got "
                "it observed: train a guide of the model with these data"
            )
        if _is_drawn(site):
            raise ValueError(
                f"site {site['name']!r} has its value already, inside scan or cond or by "
                "substitute inside of the model, and cannot be replaced: sample the model itself, "
                "NUTS(model), or base_space(model); a value that is to stay is given by "
                "handlers.condition"
            )
        self.shape = draws_of(site)
        return self

    def __call__(
        self, name: str, fn: dist.Distribution, obs: Array | None
    ) -> tuple[dist.Distribution | None, Array | None]:
        """Return no distribution, and the value of the site; of data where they have a density."""
        mask = get_mask()  # also of handlers around, which have not come to fn yet
        masked = fn if mask is None else fn.mask(mask)
        if name not in self.parts:
            valid = self._has_density(masked, obs)
            return fn if isinstance(valid, bool) else fn.mask(valid), obs
        real, transform = self.parts.pop(name), dist.biject_to(fn.support)
        value = transform(real)
        check_fixed_shape(name, fn, value, self.shape)
        left_out = log_prob_left_out(masked, value)
        self.total = self.total + jnp.sum(transform.log_abs_det_jacobian(real, value))
        if left_out is not None:
            self.total = self.total + left_out.sum()
        valid = self._has_density(without_masks(masked), None)
        numpyro.factor(f"_{name}_log_prob", jnp.where(valid, fn.log_prob(value), 0.0))
        return None, value

    def _has_density(self, fn: dist.Distribution, value: Array | None) -> Array | bool:
        """Return where a site has a density, as ``is_valid``; minus infinity counts elsewhere."""
        valid = is_valid(fn, value)
        if not isinstance(valid, bool):
            self.total = jnp.where(valid.all(), self.total, -jnp.inf)
        return valid
