r"""Latent sites :math:`x = x(z)` of a guide as one unconstrained vector z, with the Jacobian.

Pyro's guides over one vector (``AutoContinuous``) pack their latent sites in the order of the
model, each through the bijection of its support.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import ComposeTransform, Transform, constraints, register_kl

from .._package import check_ranges
from .._torch import broadcast_shapes, is_functional
from ..distributions.constraints import innermost_constraint
from ..distributions.interpolant import InterpolantDistribution
from ..distributions.joint import pack, split, unpack
from ..distributions.quasi_random import normal_points
from ..distributions.rounding import are_close
from ..distributions.rows import as_tensor
from ..distributions.supports import OnEvents
from ..transforms.bijections import biject
from .validity import without_validation

Site = dict[str, Any]  # a site of a trace, Pyro's message
Nodes = dict[str, Site]
Model = Callable[..., Any]
OWN_FACTOR = "_interpolant_jacobian"  # marks base space's own factors, which no user wrote
SPREAD_DRAWS = 4096  # of a posterior, whose middle and quantiles are to be known
_EXTREMES = 256  # rows with the most extreme numbers, in whose company others are evaluated


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Keep a run of a model from all enclosing handlers and plates.

    To the left of these its own plates would have other dimensions, and its sites other shapes.
    """
    stack, _DIM_ALLOCATOR._stack = _DIM_ALLOCATOR._stack, []
    try:
        with poutine.block():
            yield
    finally:
        _DIM_ALLOCATOR._stack = stack


@contextlib.contextmanager
def unsupported_sites_named(guide: AutoContinuous) -> Iterator[None]:
    """Raise a ValueError that names the site where a guide meets one without a bijection."""
    try:
        yield
    except (NotImplementedError, ValueError):
        if guide.prototype_trace is not None:
            for _, site in guide.prototype_trace.iter_stochastic_nodes():
                bijection_of(site)
        raise


class Substitute(ConditionMessenger):
    """Substitute values for sites that must be latent, and of the shapes they had.

    Args:
        values: The values by name, each ``(*, *site_shape)``.
        shapes: The shapes of the sites.
    """

    data: dict[str, Tensor]

    def __init__(self, values: dict[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
        super().__init__(values)
        self.shapes = shapes

    def _pyro_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        if name not in self.data:
            return
        if msg["is_observed"]:
            raise ValueError(
                f"expected site {name!r} to be latent, as when the guide was set up, got it "
                "observed: set the guide up with the data, guide(*args)"
            )
        fn: Any = msg["fn"]
        shape, value = fn.batch_shape + fn.event_shape, self.data[name]
        check_fixed_shape(name, shape, value, self.shapes[name])
        super()._pyro_sample(msg)


class Image(dist.Delta):
    """A site's value as the image of an unconstrained one, whose Jacobian is its log-density.

    Divergences of Pyro's ``Delta`` leave the log-density out, and ``TraceMeanField_ELBO`` with it;
    of a value held constant, as by ``ReweightedWakeSleep``, ``Delta`` leaves it free to move.
    """

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density, shape ``(*)``."""
        log_prob = super().log_prob(x)
        return log_prob if x.requires_grad or is_functional() else log_prob.detach()


@register_kl(Image, dist.Distribution)
def _(image: Image, other: dist.Distribution) -> Tensor:
    return image.log_density - other.log_prob(image.v)


class Imaged(Messenger):
    """Make an :class:`Image` of each value that a guide over one vector gives its sites."""

    def _pyro_sample(self, msg: Message) -> None:
        fn = msg["fn"]
        if type(fn) is dist.Delta:
            msg["fn"] = Image(fn.v, fn.log_density, fn.event_dim)


def forget_data(guide: AutoContinuous) -> None:
    """Keep of a guide's prototype the structure alone: no data, no parameters of the model."""
    trace = guide.prototype_trace
    for name in ("_INPUT", "_RETURN"):
        if name in trace:
            trace.remove_node(name)
    for _, site in trace.iter_stochastic_nodes():
        fn = site["fn"]
        site["fn"] = dist.ImproperUniform(fn.support, fn.batch_shape, fn.event_shape)
        site["args"], site["kwargs"] = (), {}


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Run a model without validation, which branches on values, and without warnings.

    Under ``torch.func.vmap`` nothing may branch on them, and some samplers loop, and say so.
    """
    with without_validation, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def is_subsample(site: Site) -> bool:
    """Return whether a site draws the indices of a plate."""
    return site_is_subsample(cast("Message", site))


def is_deterministic(site: Site) -> bool:
    """Return whether a site is a value: of ``pyro.deterministic``, or of ``poutine.reparam``.

    A reparametrised site is a function of the sites that take its place, with the same masked
    distribution as a deterministic one, but without a mark.
    """
    if site["infer"].get("_deterministic"):
        return True
    fn = site["fn"]
    is_unscored = isinstance(fn, dist.MaskedDistribution) and fn._mask is False
    return site["is_observed"] and is_unscored and isinstance(fn.base_dist, dist.Delta)


def is_sampled(node: Site) -> bool:
    """Return whether a node of a trace is a sample: no plate's indices, no deterministic value."""
    return node["type"] == "sample" and not is_subsample(node) and not is_deterministic(node)


def subsampling_plates(nodes: Nodes) -> list[str]:
    """Return the names of a trace's plates that hold fewer rows than there are."""
    return [
        name
        for name, site in nodes.items()
        if site["type"] == "sample" and is_subsample(site)
        and len(site["value"]) < site["fn"].size
    ]  # fmt: skip


def unwrapped_model(model: Model) -> Model:
    """Return the model inside the messenger by which a guide initialises it."""
    arguments: tuple[Any, ...] = getattr(getattr(model, "func", None), "args", ())
    if len(arguments) == 2 and isinstance(arguments[0], InitMessenger):
        return arguments[1]
    return model


def whole_model(model: Model) -> Model:
    """Return the model inside the messenger by which a guide initialises it, if it has all sites.

    What ``poutine.block`` hides is drawn anew in each run, out of any sampler's sight.

    Raises:
        ValueError: If the model hides sites.
    """
    inner = model = unwrapped_model(model)
    while arguments := getattr(getattr(inner, "func", None), "args", ()):
        if isinstance(arguments[0], BlockMessenger):
            raise ValueError(
                "expected a guide of a model with all its sites, got one that poutine.block "
                "wraps, whose hidden sites would be noise: pass the model itself, "
                "neutra(guide, model), which a sampler can enumerate or sample"
            )
        inner = arguments[-1]
    return model


class LatentSites:
    r"""The latent sites of a guide, and the bijection :math:`x(z)` from one real vector to them.

    Args:
        guide: A guide over one unconstrained vector; it learns its sites here, if it does not
            know them yet.
        *args: The arguments of the model.
        **kwargs: Its named arguments.

    Attributes:
        sites: The shape and the support of each, by name, in the order of packing.
        shapes: The shapes alone.
    """

    def __init__(self, guide: AutoContinuous, *args: object, **kwargs: object) -> None:
        with apart(), unsupported_sites_named(guide):
            if guide.master is not None and guide.master().prototype_trace is None:  # it is a part
                guide.master()(*args, **kwargs)
            if guide.prototype_trace is None:
                guide._setup_prototype(*args, **kwargs)
            if not hasattr(guide, "plates"):
                guide._create_plates(*args, **kwargs)
        self.guide, self.args, self.kwargs = guide, args, kwargs
        self.sites = {
            name: (site["value"].shape, _support_of(site))
            for name, site in guide.prototype_trace.iter_stochastic_nodes()
        }
        self.shapes = {name: shape for name, (shape, _) in self.sites.items()}

    @property
    def model(self) -> Model:
        """The model with its arguments, a function of none."""
        return functools.partial(unwrapped_model(self.guide.model), *self.args, **self.kwargs)

    def centers(self) -> Tensor:
        """Return points about which a density is tried, one after the other, shape ``(K, D)``.

        That of the guide's initialisation, unless the guide knows likely ones.
        """
        own = getattr(self.guide, "likely_points", None)
        return self.guide._init_loc()[None] if own is None else own(*self.args, **self.kwargs)

    def check_start(self, z: Tensor) -> None:
        """Raise a ValueError where the start of a site, part of z, ``(D,)``, is not finite."""
        bad = [name for name, _, real in self.split(z) if not bool(real.isfinite().all())]
        if bad:
            raise ValueError(
                f"expected initial values that are finite and strictly inside the supports, got "
                f"others of the sites {bad}: pass another init_loc_fn to the guide"
            )

    def split(self, z: Tensor) -> Iterator[tuple[str, Transform, Tensor]]:
        """Yield the name of each site, the bijection to its support, and its part of z, ``(D,)``.

        In front of z there may be dimensions, those of the draws and one for each dimension of
        the plates: ``(N, 1, .., 1, D)``.
        """
        for site, real in self.guide._unpack_latent(z):
            yield site["name"], biject(site["fn"].support), real

    def constrain(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        r"""Return the sites and :math:`\log |dx / dz|`, ``(N)``, of z, ``(N, 1, .., 1, D)``.

        Raises:
            ValueError: If the bijection of a site has no Jacobian.
        """
        values, total = {}, z.new_zeros(z.shape[:1] if z.dim() > 1 else ())
        for name, transform, real in self.split(z):
            values[name] = transform(real)
            try:
                log_det = transform.log_abs_det_jacobian(real, values[name])
            except NotImplementedError as error:
                raise _unsupported(name, self.sites[name][1]) from error
            total = total + log_det.reshape(*total.shape, -1).sum(-1)
        return values, total

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """Return the sites, each ``(N, *site_shape)``, of vectors of shape ``(N, D)``."""
        return unpack(self.sites, z)

    def displacements(self, z: Tensor) -> dict[str, Tensor]:
        """Return by site how far numbers of vectors, ``(N, D)``, move there and back.

        Each of shape ``(N, size)``: values on a support are rounded.
        """
        moved = {}
        for name, real in split(self.sites, z).items():
            transform = biject(self.sites[name][1])
            moved[name] = (transform.inv(transform(real)) - real).abs().reshape(len(z), -1)
        return moved

    def pack(self, draws: Mapping[str, ArrayLike]) -> Tensor:
        """Return vectors, shape ``(N, D)``, of draws of the sites, each ``(*, *site_shape)``.

        Leading dimensions, of chains or of Pyro's ``Predictive``, are flattened. The vectors are
        in the type of the model, as which it is evaluated; arrays are of float64.

        Raises:
            TypeError: If they are not given by site, or not as tensors or arrays.
            ValueError: If a site is missing, of another shape, or outside its support, or there
                are not as many draws of each, or none.
        """
        if not isinstance(draws, Mapping):
            raise TypeError(
                f"expected draws of each site {list(self.shapes)} by name, as mcmc.get_samples() "
                f"gives them, got {type(draws).__name__}"
            )
        flat = {}
        for name, shape in self.shapes.items():
            value = as_tensor(draws[name], f"draws of {name!r}") if name in draws else None
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
        if 0 in counts.values():
            raise ValueError("expected draws of every site, got none")
        return pack(self.sites, flat).to(self.guide._init_loc())


def bijection_of(site: Site) -> Transform:
    """Return the bijection of a latent site, or raise a ValueError where there is none."""
    support: Any = "a support that it does not state"
    try:
        support = site["fn"].support
        return biject(support)
    except NotImplementedError as error:
        raise _unsupported(site["name"], support) from error


def _support_of(site: Site) -> constraints.Constraint:
    """Return the support of the smallest events of a site; of a learned prior what it was given.

    Files hold that one, and values on its edges are known by it.
    """
    support = innermost_constraint(site["fn"].support)
    return innermost_constraint(support.inner) if isinstance(support, OnEvents) else support


def check_fixed_shape(name: str, now: torch.Size, value: Tensor, shape: torch.Size) -> None:
    """Raise a ValueError where a site's shape is another than when the guide was set up.

    Args:
        name: The site.
        now: That of its distribution.
        value: Its value, shape ``(*, *shape)``, with the dimensions of draws in front.
        shape: The shape that the guide knows.
    """
    try:
        is_whole = broadcast_shapes(now, value.shape) == value.shape
    except RuntimeError:
        is_whole = False
    if not is_whole or now[len(now) - len(shape) :] != shape:
        raise ValueError(
            f"expected site {name!r} of shape {tuple(shape)}, as when the guide was set up, got "
            f"shape {tuple(now)}: set up a new guide with these arguments, guide(*args)"
        )


def check_one_data_set(batch_shape: torch.Size) -> None:
    """Raise a ValueError where the arguments of a model hold several data sets.

    Args:
        batch_shape: That of a guide's posterior given them.
    """
    if batch_shape:
        raise ValueError(
            f"expected one data set in the arguments, got a batch of shape {tuple(batch_shape)}: "
            "guide.condition(y=...) takes many at once; rows of one belong in a pyro.plate"
        )


def one_posterior(guide: AutoContinuous, *args: object, **kwargs: object) -> Any:
    """Return a guide's distribution of the unconstrained vector, shape ``(D,)``, of one data set.

    Raises:
        ValueError: If the arguments of its model hold several.
    """
    posterior = guide.get_posterior(*args, **kwargs)
    check_one_data_set(posterior.batch_shape)
    return posterior


def spread_of(posterior: InterpolantDistribution) -> Tensor:
    """Return quasi-random draws, always the same, of a flow from N(0, I), shape ``(4096, D)``.

    Raises:
        ValueError: If it has a batch, of data sets.
    """
    check_one_data_set(posterior.batch_shape)
    z = normal_points(posterior.transform.flow.loc, SPREAD_DRAWS)
    return ComposeTransform(posterior.transforms)(z)


def quantiles_of(draws: Tensor, levels: Sequence[float] | Tensor) -> Tensor:
    """Return the quantiles of each number, shape ``(Q, *shape)``, of draws, ``(N, *shape)``.

    Those of :func:`torch.quantile`, of any number of numbers.

    Args:
        draws: The draws.
        levels: Q numbers between 0 and 1.

    Raises:
        ValueError: If one of them is not.
    """
    at = torch.as_tensor(levels, dtype=torch.float64, device=draws.device)
    check_ranges(("quantiles between 0 and 1", bool(((at >= 0) & (at <= 1)).all()), levels))
    ordered, place = draws.sort(0).values, at * (len(draws) - 1)
    share = place.frac().reshape((*at.shape, *(1,) * (draws.dim() - 1)))
    return torch.lerp(ordered[place.floor().long()], ordered[place.ceil().long()], share.to(draws))


def extreme_rows(values: Iterable[Tensor]) -> Tensor:
    """Return the indices of rows in which a number is the greatest or the least of all rows.

    Of 256 rows at most, those of the first numbers.

    Args:
        values: Rows, each ``(N, *)``.
    """
    found = []
    for value in values:
        columns = value.reshape(len(value), -1)[:, :_EXTREMES].double()
        found.append(torch.stack((columns.argmax(0), columns.argmin(0)), 1).flatten())
    return torch.cat(found)[:_EXTREMES].unique()


def check_fixed_support(name: str, now: Tensor, known: Tensor) -> None:
    """Raise a ValueError where a site's support is another than when the guide was set up.

    Args:
        name: The site.
        now: The image of an unconstrained value under the bijection of its support, any shape.
        known: The same under that of the support that the guide knows.
    """
    if not are_close(now, known, rtol=1e-4):
        raise ValueError(
            f"expected site {name!r} to have a fixed support, got one that depends on other "
            "sites: sample it on a fixed support and transform it"
        )


def _unsupported(name: str, support: object) -> ValueError:
    """Return the error for a site whose support has no bijection, or none with a Jacobian."""
    return ValueError(
        f"expected supports with a bijection from real vectors and its Jacobian, got site "
        f"{name!r} on {support}: write a covariance as an LKJCholesky factor "
        "and scales, a direction by ProjectedNormalReparam, learned priors of angles in "
        "base_space(model), anything else as an ImproperUniform site and a pyro.factor"
    )
