"""Where latent sites start in the first run of a model, and which no guide here can hold."""

import contextlib
from collections.abc import Callable

import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike
from pyro.infer.autoguide.guides import prototype_hide_fn
from pyro.infer.autoguide.initialization import init_to_median
from pyro.poutine.runtime import Message
from torch import Tensor

from .._torch import seeded
from ..distributions.constraints import is_discrete
from ..distributions.rows import as_tensor
from .sites import Site, bijection_of
from .validity import innermost_distribution


def init_to_support(
    site: Site, init: Callable[..., Tensor] = init_to_median, spread: float = 0.0
) -> Tensor:
    """Return an initial value of a latent site, if a guide over one vector can hold it.

    Of a site that has no bijection, too: a reparametrisation may be about to replace it.

    Args:
        site: The site.
        init: One of Pyro's initialisation functions, from a site to a value.
        spread: The standard deviation, unconstrained, of a site whose prior is improper.

    Returns:
        The value, shape ``(*batch_shape, *event_shape)``.

    Raises:
        ValueError: If the site is discrete, a value that was to be deterministic, in a subsampled
            plate, in a sequential one, or on a support without a bijection on which there is no
            value to be had, or if the value does not broadcast to its shape.
    """
    fn = site["fn"]
    # Else a site only asks whether there is a value for its name, and tells its support alone.
    is_whole = isinstance(fn, torch.distributions.Distribution)
    _check_site(site, is_whole=is_whole)
    try:
        value = init(site)
        return whole_value(site, value) if is_whole else value
    except NotImplementedError:  # improper priors cannot be sampled, not even for their shape
        transform = bijection_of(site)
        shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
        return transform(spread * torch.randn(shape))


def whole_value(site: Site, value: ArrayLike) -> Tensor:
    """Return a value of a site in its shape, of one for a plate the same for each member.

    Else the plate would expand it as it comes, and all members would be one latent.

    Args:
        site: The site.
        value: Its value, which broadcasts to ``(*batch_shape, *event_shape)``.

    Raises:
        TypeError: If it is no number, tensor or array.
        ValueError: If it does not.
    """
    shape, found = site["fn"].shape(), as_tensor(value, f"the value of site {site['name']!r}")
    if not (isinstance(value, Tensor) and found.is_floating_point()):
        found = found.to(_type_of(site))  # whole numbers have none, and arrays are of float64
    try:
        return found if found.shape == shape else found.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"expected an initial value of site {site['name']!r} that broadcasts to its shape "
            f"{tuple(shape)}, got shape {tuple(found.shape)}: pass one for each member of its "
            "plates, or one for all"
        ) from error


def _type_of(site: Site) -> torch.dtype:
    """Return the type of draws of a site; the default one where it has no draws."""
    with contextlib.suppress(NotImplementedError), seeded(0):
        return site["fn"].sample().dtype
    return torch.get_default_dtype()


def init_latent(observed: tuple[str, ...], init: Callable[..., Tensor], site: Site) -> Tensor:
    """Return an initial value of a latent site, and of one that is to be observed a draw.

    Args:
        observed: The names of the sites that are to be observed.
        init: One of Pyro's initialisation functions, from a site to a value.
        site: The site.

    Raises:
        ValueError: If a latent site is discrete, as counts of another name than those observed.
    """
    name = site["name"]
    if name in observed:
        return site["fn"].sample()
    if _is_discrete(site):
        raise ValueError(
            f"expected observed or continuous sites, got the discrete site {name!r} beside the "
            f"observed ones {list(observed)}: marginalise it (a mixture distribution), or, if "
            f"it is data, name it, AmortizedInterpolant(model, observed=({name!r},))"
        )
    return init(site)


def is_not_latent(observed: tuple[str, ...], msg: Message) -> bool:
    """Return whether a site is hidden from the guide's prototype.

    By Pyro's own rule, or as one of the observed names, which count as data even in a run without
    data.
    """
    return prototype_hide_fn(msg) or msg["name"] in observed


def _is_discrete(site: Site) -> bool:
    """Return whether a site is known to have separate values; not where it states no support."""
    with contextlib.suppress(NotImplementedError):
        return is_discrete(site["fn"].support)
    return False


def _check_site(site: Site, *, is_whole: bool) -> None:
    """Raise a ValueError if a site has no density, or is in a plate that no guide here holds."""
    name = site["name"]
    if _is_discrete(site):
        raise ValueError(
            f"expected continuous latent sites, got the discrete site {name!r}: marginalise it "
            "(a mixture distribution), or hide it, AutoInterpolant(poutine.block(model, "
            f"hide=[{name!r}])), and enumerate it in SVI with TraceEnum_ELBO, see "
            "https://pyro.ai/examples/enumeration.html"
        )
    if is_whole and isinstance(innermost_distribution(site["fn"]), dist.Delta):
        raise ValueError(
            f"expected latent sites with a density, got {name!r} from a Delta, which has "
            f"one value: write it as pyro.deterministic({name!r}, value)"
        )
    for frame in site["cond_indep_stack"]:
        if not frame.vectorized:
            raise ValueError(
                f"expected vectorised plates, got latent site {name!r} in the sequential plate "
                f"{frame.name!r}: use `with pyro.plate(...)`, or a plain range"
            )
        if frame.full_size is not None and frame.full_size != frame.size:
            raise ValueError(
                f"expected latent sites of a fixed size, got {name!r} in plate {frame.name!r}, "
                f"which holds {frame.size} of {frame.full_size} at a time: a flow over one vector "
                "has no place for local latents that come and go. Do not subsample, or hide the "
                "site and give it a guide of its own in an AutoGuideList"
            )
