r"""A guide's latent sites: which it can hold, and how they become one unconstrained vector."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import InitMessenger, init_to_median
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to, constraints

from ..distributions.joint import pack

__all__ = [
    "Initial",
    "Placed",
    "bare_model",
    "check_jacobians",
    "pack_sites",
    "set_up",
    "strip",
    "unpack_sites",
]


class Initial:
    """An initialisation of latent sites that says clearly which sites no guide here can hold.

    Args:
        init: One of Pyro's initialisation functions, from a site to a value.
    """

    def __init__(self, init: Callable[..., Any] = init_to_median) -> None:
        self.init = init

    def __call__(self, site: Any) -> Tensor:
        """Return an initial value, shape ``(*, *event_shape)``, of a latent site.

        Raises:
            ValueError: If the site is discrete, in a subsampled plate, or in a sequential one.
        """
        _check_site(site)
        try:
            transform = biject_to(site["fn"].support)
        except NotImplementedError as error:
            raise _unsupported(site) from error
        try:
            return self.init(site)
        except NotImplementedError:  # improper priors cannot be sampled, not even for their shape
            fn = site["fn"]
            shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
            return transform(torch.zeros(shape))


class Placed(Messenger):
    """Give latent sites their values.

    Args:
        values: By name, each of shape ``(*, *site_shape)``.
    """

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.values:
            return
        if msg["is_observed"]:
            raise ValueError(
                f"expected site {msg['name']!r} to be latent, as when the guide was set up, got "
                "it observed: set the guide up with the data, guide(*args)"
            )
        msg["value"], msg["is_observed"] = self.values[msg["name"]], True


def set_up(guide: AutoContinuous, *args: Any, **kwargs: Any) -> None:
    """Let a guide learn the structure of its model, if it does not know it yet."""
    if guide.prototype_trace is None:
        guide._setup_prototype(*args, **kwargs)
    if not hasattr(guide, "plates"):
        with poutine.block():
            guide._create_plates(*args, **kwargs)


def check_jacobians(guide: AutoContinuous) -> None:
    """Raise a ValueError if a support of a guide's sites is reached without a Jacobian."""
    for site, real in guide._unpack_latent(guide._init_loc()):
        transform = biject_to(site["fn"].support)
        try:
            transform.log_abs_det_jacobian(real, transform(real))
        except NotImplementedError as error:
            raise _unsupported(site) from error


def strip(guide: AutoContinuous) -> None:
    """Keep of what a guide has seen only the structure: no data, no parameters of the model."""
    trace = guide.prototype_trace
    for name in ("_INPUT", "_RETURN"):
        if name in trace:
            trace.remove_node(name)
    for _, site in _latent(guide):
        fn = site["fn"]
        site["fn"] = dist.ImproperUniform(fn.support, fn.batch_shape, fn.event_shape)
        site["args"], site["kwargs"] = (), {}


def unpack_sites(guide: AutoContinuous, z: Tensor) -> dict[str, Tensor]:
    """Return a guide's latent sites, each ``(N, *site_shape)``, of vectors of shape ``(N, D)``."""
    shapes = {name: site["value"].shape for name, site in _latent(guide)}
    nesting = max(len(shape) for shape in shapes.values())
    latent = z.reshape(len(z), *(1,) * nesting, -1)
    return {
        site["name"]: biject_to(site["fn"].support)(real).reshape(-1, *shapes[site["name"]])
        for site, real in guide._unpack_latent(latent)
    }


def pack_sites(guide: AutoContinuous, draws: Mapping[str, Any]) -> Tensor:
    """Return vectors, shape ``(N, D)``, of draws of a guide's sites, each ``(*, *site_shape)``.

    Leading dimensions, of chains or of Pyro's ``Predictive``, are flattened.

    Raises:
        ValueError: If a site is missing, of another shape, or outside its support, or there are
            not as many draws of each.
    """
    sites, flat = {}, {}
    for name, site in _latent(guide):
        shape, support = site["value"].shape, site["fn"].support
        while isinstance(support, constraints.independent):  # what is in it knows its own events
            support = support.base_constraint
        sites[name] = (shape, support)
        value = None if name not in draws else torch.as_tensor(draws[name])
        lead = -1 if value is None else value.dim() - len(shape)
        if value is None or lead < 1 or value.shape[lead:] != shape:
            got = "none" if value is None else f"shape {tuple(value.shape)}"
            want = ", ".join(map(str, ("N", *shape)))
            raise ValueError(
                f"expected draws of site {name!r} of shape ({want}), as "
                f"mcmc.get_samples() gives them, got {got}"
            )
        flat[name] = value.reshape(-1, *shape)
    counts = {name: len(value) for name, value in flat.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"expected as many draws of every site, got {counts}")
    return pack(sites, flat)


def _check_site(site: Any) -> None:
    name = site["name"]
    if getattr(site["fn"].support, "is_discrete", False):
        raise ValueError(
            f"expected continuous latent sites, got the discrete site {name!r}: marginalise it "
            "(a mixture distribution), or hide it, AutoInterpolant(poutine.block(model, "
            f"hide=[{name!r}])), and enumerate it in SVI with TraceEnum_ELBO"
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


def _unsupported(site: Any) -> ValueError:
    return ValueError(
        f"expected supports with a bijection from real vectors and its Jacobian, got site "
        f"{site['name']!r} on {site['fn'].support}: write a covariance as an LKJCholesky factor "
        "and scales, a direction by ProjectedNormalReparam, anything else as an ImproperUniform "
        "site and a pyro.factor"
    )


def _latent(guide: AutoContinuous) -> Iterator[tuple[str, Any]]:
    return guide.prototype_trace.iter_stochastic_nodes()


def bare_model(model: Any) -> Any:
    """Return the model inside the messenger by which a guide initialises it."""
    inner = getattr(model, "func", None)
    arguments: Any = getattr(inner, "args", ())
    if len(arguments) == 2 and isinstance(arguments[0], InitMessenger):
        return arguments[1]
    return model
