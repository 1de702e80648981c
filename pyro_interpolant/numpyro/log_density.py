r"""The log joint density of a NumPyro model, :math:`\log p(x(z), y) + \log |dx / dz|`."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions import biject_to
from numpyro.infer.autoguide import AutoContinuous

from .validity import innermost_distribution, is_valid, log_prob_left_out, without_masks

Arguments = tuple[object, ...]  # of a model
Named = Mapping[str, object]
Site = Mapping[str, Any]  # a site of a trace, NumPyro's message


def log_density(guide: AutoContinuous, args: Arguments, kwargs: Named) -> Callable[[Array], Array]:
    """Return the log joint density of one unconstrained vector, shape ``(D,)``, for jax.

    As :func:`pyro_interpolant.log_joint`, ``-inf`` where it is not finite. Unlike NumPyro's
    potential, each Jacobian counts once: it is not multiplied by the scale or mask of its site.

    Args:
        guide: A guide that knows its model.
        args: The arguments of the model.
        kwargs: Its named arguments.
    """
    trace_at = _tracer(guide, args, kwargs)

    def of_one(z: Array) -> Array:
        parts = guide._unpack_latent(z)
        total = jnp.zeros(())
        for name, site in trace_at(parts).items():
            if site["type"] == "sample":
                total = total + _log_prob(name, site, parts)
        return jnp.where(jnp.isfinite(total), total, -jnp.inf)

    return of_one


def displacements(
    guide: AutoContinuous, args: Arguments, kwargs: Named
) -> Callable[[Array], dict[str, Array]]:
    """Return how far numbers of one unconstrained vector move there and back, by site, for jax.

    Each of shape ``(size,)``: values on a support are rounded.

    Args:
        guide: A guide that knows its model.
        args: The arguments of the model.
        kwargs: Its named arguments.
    """
    trace_at = _tracer(guide, args, kwargs)

    def of_one(z: Array) -> dict[str, Array]:
        parts = guide._unpack_latent(z)
        trace, moved = trace_at(parts), {}
        for name, real in parts.items():
            # A compiler knows that log(exp(z)) is z, and would round nothing.
            value = jax.lax.optimization_barrier(trace[name]["value"])
            back = biject_to(trace[name]["fn"].support).inv(value)
            moved[name] = jnp.ravel(jnp.abs(back - real))
        return moved

    return of_one


@contextlib.contextmanager
def sites_without_density_named(
    guide: AutoContinuous, args: Arguments, kwargs: Named
) -> Iterator[None]:
    """Raise a ValueError that names a latent site of no density where a guide has no set-up."""
    try:
        yield
    except (ImportError, NotImplementedError, RuntimeError):
        model = handlers.seed(guide.model, rng_seed=0)
        model = handlers.substitute(model, substitute_fn=guide.init_loc_fn)
        with handlers.block():
            trace = handlers.trace(model).get_trace(*args, **kwargs)
        for name, site in trace.items():
            latent = site["type"] == "sample" and not site["is_observed"]
            if latent and site["fn"].support.is_discrete:
                raise ValueError(
                    f"expected continuous latent sites, got the discrete site {name!r}: "
                    "marginalise it (a mixture distribution)"
                ) from None
            if latent and isinstance(innermost_distribution(site["fn"]), dist.Delta):
                raise ValueError(
                    f"expected latent sites with a density, got {name!r} from a Delta, which has "
                    f"one value: write it as numpyro.deterministic({name!r}, value)"
                ) from None
        raise


def check_plates(trace: Mapping[str, Site]) -> None:
    """Raise a ValueError if a plate of a model draws which of its rows are seen."""
    plates = [
        name
        for name, site in trace.items()
        if site["type"] == "plate" and (site["args"][1] or site["args"][0]) < site["args"][0]
    ]
    if plates:
        raise ValueError(
            f"expected a log density without noise, got plates {plates} that subsample: call with "
            "a model that sees all its data"
        )


def check_random_numbers(guide: AutoContinuous, args: Arguments, kwargs: Named) -> None:
    """Raise a ValueError if a model draws random numbers that are none of its latent sites.

    Args:
        guide: A guide that knows its model, from a run that had a seed.
        args: The arguments of the model.
        kwargs: Its named arguments.
    """
    sites = guide.prototype_trace.items()
    known = {k: site["value"] for k, site in sites if site["type"] in ("sample", "param")}

    def run() -> None:
        with handlers.block(), handlers.substitute(data=known):
            guide.model(*args, **kwargs)

    try:  # without a seed
        jax.eval_shape(run)
    except (AssertionError, TypeError) as error:  # which only the seed can have spared that run
        raise ValueError(
            "expected a log density without noise, got a model that draws random numbers beside "
            "its latent sites: show a site that handlers.block hides, or give it a value by "
            "handlers.substitute inside of the block; pass what numpyro.prng_key() draws"
        ) from error


def check_as_seen(guide: AutoContinuous, args: Arguments, kwargs: Named) -> None:
    """Raise a ValueError unless a model has the latent sites of its guide, and draws no others.

    Args:
        guide: A guide that knows its model.
        args: The arguments of the model.
        kwargs: Its named arguments.
    """
    known, observed, latent = set(guide._init_locs), set[str](), set[str]()
    values = {name: guide.prototype_trace[name]["value"] for name in known}

    def run() -> None:
        with handlers.block(), handlers.trace() as trace, handlers.substitute(data=values):
            handlers.seed(guide.model, rng_seed=0)(*args, **kwargs)
        check_plates(trace)
        for name, site in trace.items():
            if site["type"] == "sample":
                (observed if site["is_observed"] else latent).add(name)

    jax.eval_shape(run)
    if known & observed:
        raise ValueError(
            f"expected sites {sorted(known & observed)} to be latent, as when the guide was set "
            "up, got them observed: train a guide of the model with these data"
        )
    if latent != known:
        raise ValueError(
            "expected the latent sites the guide has seen, got a model with "
            f"{sorted(latent - known)} besides and without {sorted(known - latent)}: give it the "
            "data it was trained with, or train a guide with these arguments"
        )
    check_random_numbers(guide, args, kwargs)


def _tracer(
    guide: AutoContinuous, args: Arguments, kwargs: Named
) -> Callable[[Mapping[str, Array]], Mapping[str, Site]]:
    """Return a function from unconstrained sites to the sites of the model there."""
    potential = guide._potential_fn_gen(*args, **kwargs)

    def trace_at(parts: Mapping[str, Array]) -> Mapping[str, Site]:
        with handlers.block(), handlers.trace() as trace:
            potential(parts)
        return trace

    return trace_at


def _log_prob(name: str, site: Site, latents: Mapping[str, Array]) -> Array:
    """Return the log density of a site, summed, ``-inf`` where it has none.

    Raises:
        ValueError: If a latent site has another shape than when the guide was set up.
    """
    fn, value, scale = site["fn"], site["value"], site["scale"]
    if any(_is_jacobian(name, latent) for latent in latents):
        return jnp.sum(innermost_distribution(fn).log_factor)
    log_prob = fn.log_prob(value) if scale is None else scale * fn.log_prob(value)
    if name in latents:
        check_fixed_shape(name, fn, value, draws_of(site))
        left_out = log_prob_left_out(fn, value)
        if left_out is not None:
            log_prob = log_prob + left_out
        fn, value = without_masks(fn), None  # the value comes from the support
    return jnp.where(is_valid(fn, value), log_prob, -jnp.inf).sum()


def draws_of(site: Site) -> tuple[int, ...]:
    """Return the shape of the draws that a site is of, in front of its distribution's batch."""
    return site["kwargs"].get("sample_shape", ())


def check_fixed_shape(
    name: str, fn: dist.Distribution, value: Array, sample_shape: tuple[int, ...]
) -> None:
    """Raise a ValueError where a site's shape is another than when the guide was set up.

    Args:
        name: The site.
        fn: Its distribution.
        value: Its value, of the shape that the guide knows.
        sample_shape: The shape of the draws that it is of.
    """
    shape = tuple(fn.shape(sample_shape))
    if jnp.shape(value) != shape:
        raise ValueError(
            f"expected site {name!r} of shape {jnp.shape(value)}, as when the guide was set up, "
            f"got shape {shape}: train a new guide with these arguments"
        )


def _is_jacobian(name: str, latent: str) -> bool:
    """Return whether a site is the Jacobian that NumPyro adds for a latent one.

    A scope prefixes the name of the latent site, and that of its Jacobian once more.
    """
    tail = f"_{latent}_log_det"
    return name.endswith(tail) and latent.startswith(name.removesuffix(tail))
