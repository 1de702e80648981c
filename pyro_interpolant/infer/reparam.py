r"""Inference in base space: :math:`z \sim q` becomes :math:`z = T(w)`, :math:`w \sim N(0, I)`.

``base_space`` does so for learned priors in a model, ``neural_transport`` for all latent sites.
"""

import contextlib
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn, cast

import pyro
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike
from pyro.contrib.autoname.scoping import NameCountMessenger, ScopeMessenger
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.markov_messenger import MarkovMessenger
from pyro.poutine.messenger import Messenger, block_messengers
from pyro.poutine.plate_messenger import PlateMessenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import _PYRO_STACK, Message
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor
from torch.distributions import ComposeTransform

from .._torch import seeded
from ..distributions.interpolant import InterpolantDistribution
from ..distributions.joint import PACKED, PART, sample_in_place
from ..distributions.rounding import are_close
from ..distributions.rows import as_tensor
from .initialization import whole_value
from .runs import nodes_of
from .sites import OWN_FACTOR, Model, Nodes, Site

_BASE = "_base"  # what a site in base space has after its name
_JACOBIAN = "_log_jacobian"  # and what the site has of its Jacobian where a scale weighs it
_MARK = "_interpolant_flow"  # where a site in base space keeps its flow, and the site it is of
# Of what "infer" holds, no part of the base draw's.
_SITES_OWN = (PACKED, "was_observed", "obs", "_markov_scope", "_markov_depth")
_RUNS = 16  # of a model, which tell whether all draws have one prior


class BaseSpace:
    """A model whose learned priors are sampled in base space; made by :func:`base_space`.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        functools.update_wrapper(self, model, updated=())
        self.model = model

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the model with its learned priors in base space."""
        with _BaseSpaceMessenger():
            return self.model(*args, **kwargs)

    @torch.no_grad()
    def samples(
        self, draws: Mapping[str, ArrayLike], *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """Return draws in the sites of the model: ``z_base`` becomes z, or its sites by name.

        For summaries, ``pyro.infer.mcmc.util.print_summary(base.samples(draws, *args))``, and for
        ``Predictive`` with the model itself; with the model in base space it takes the draws as
        they are.

        Args:
            draws: What ``mcmc.get_samples()`` gives, by chain or not, each ``(*, *site_shape)``.
            *args: The arguments of the model.
            **kwargs: Its named arguments.

        Returns:
            Every site that is no ``z_base`` as it was; in place of each such, ``z``, in one solve,
            or, where ``sample_sites`` drew it, the sites of a joint distribution by name.

        Raises:
            ValueError: If a prior has a context, or depends on another site, so that each draw may
                have its own, as runs of the model at up to 16 of the draws tell of the latter.
        """
        named = {name: as_tensor(value, f"draws of {name!r}") for name, value in draws.items()}
        with seeded(0):  # what no draw fixes, the same at each call
            first, count = self._at(0.0, named, *args, **kwargs)
            places = torch.linspace(0, 1, min(count, _RUNS)).tolist()[1:]
            runs = [first, *(self._at(p, named, *args, **kwargs)[0] for p in places)]
        # Of each part of a packed site: its name, what the two share, and its site.
        nodes = [(name, node.get("infer") or {}) for run in runs for name, node in run.items()]
        parts = [(name, *infer[PART]) for name, infer in nodes if PART in infer]
        for name, node in {k: v for run in reversed(runs) for k, v in run.items()}.items():
            mark = (node.get("infer") or {}).get(_MARK)
            if mark is None or name not in named:
                continue
            flow, site, packed = mark
            other = None if flow.transform.raw_context is None else "a context"
            if other is None and not all(_has_map(run.get(name), flow) for run in runs):
                other = "one that depends on other sites"
            if other is not None:
                raise ValueError(
                    f"expected priors that are the same for all draws, got the site {site!r} with "
                    f"{other}: use Predictive(base_space(model), draws)"
                )
            value = _image(flow, named.pop(name))
            if packed is None:
                named[site] = value
            else:
                by_site = flow.unpack(value)
                named |= {name: by_site[part] for name, own, part in parts if own is packed}
        return named

    def _at(
        self, place: float, draws: Mapping[str, Tensor], *args: object, **kwargs: object
    ) -> tuple[Nodes, int]:
        """Return the sites of a run with one of the draws, and how many draws there are."""
        given = _AtDraw(draws, place)
        return nodes_of(given(functools.partial(self, *args, **kwargs))), given.count


class _AtDraw(Messenger):
    """Give the sites of a model one of their draws.

    Args:
        draws: The draws of each site, ``(*, *site_shape)``.
        place: Which of them, from 0, the first, to 1, the last.

    Attributes:
        count: The number of draws, known after a run.
    """

    def __init__(self, draws: Mapping[str, Tensor], place: float) -> None:
        super().__init__()
        self.draws, self.place, self.count = draws, place, 1

    def _pyro_sample(self, msg: Site) -> None:
        known, fn = self.draws.get(msg["name"]), msg["fn"]
        if known is None or msg["is_observed"] or not isinstance(fn, TorchDistributionMixin):
            return
        shape = _drawn_shape(msg, known)
        if known.numel() % max(1, shape.numel()):
            raise ValueError(
                f"expected draws of site {msg['name']!r} of shape "
                f"(*, {', '.join(map(str, shape))}), got {tuple(known.shape)}"
            )
        rows = known.reshape(-1, *shape)
        self.count = len(rows)
        if self.count:
            value = rows[round(self.place * (self.count - 1))]
            is_part = shape != fn.shape()
            msg["value"] = pyro.subsample(value, event_dim=fn.event_dim) if is_part else value


def _drawn_shape(site: Site, draws: Tensor) -> torch.Size:
    """Return the shape of a site in draws, maybe of the whole of a plate that subsamples."""
    fn = site["fn"]
    shape = list(fn.shape())
    for frame in site["cond_indep_stack"]:
        if frame.vectorized:
            dim = frame.dim - fn.event_dim
            if draws.dim() >= -dim and draws.shape[dim] == frame.full_size:
                shape[dim] = frame.full_size
    return torch.Size(shape)


def _has_map(node: Site | None, flow: InterpolantDistribution) -> bool:
    """Return whether a site in base space, if it is there, is mapped as by a flow."""
    mark = None if node is None else node["infer"].get(_MARK)
    if node is None or mark is None:
        return False
    own, w = mark[0], node["value"]
    return own.transforms is flow.transforms or are_close(_image(own, w), _image(flow, w))


def base_space(model: Model) -> BaseSpace:
    r"""Return the model with its learned priors sampled in base space.

    Every latent site ``z`` whose distribution is an
    :class:`~pyro_interpolant.InterpolantDistribution` (conditioned, expanded, in plates, under
    ``to_event`` or ``mask``) becomes ``z_base ~ base`` and ``z = T(z_base)``, a deterministic site
    under the same name. Inference then needs the forward solve alone: no divergence, and a
    geometry that is Gaussian before the data are seen. Observed sites are left alone. For D angles
    ``z_base`` has shape ``(2 D,)``: a point of the plane in the direction of each, normal where
    the base is uniform, so that samplers see no seam.

    Initial values are proposed in base space too, where zero is the centre: strategies apply to
    ``z_base``, but for one that has a value for the name z, such as ``init_to_value(values={"z":
    ...})``, which is honoured by inverting the flow once. A site that ``pyro.condition`` fixes,
    inside or around, is observed in data space, and one of which ``poutine.replay`` has a value,
    as that of a guide over z, is sampled there. A scale inside of the model weighs the density of
    z, of which the Jacobian's part is a factor beside the base; one around the result weighs the
    density of what is sampled there, as a mask does. ``Predictive`` lists that factor as
    ``z_log_jacobian``, an empty tensor whose last dimension is 0.

    Args:
        model: A Pyro model.

    Returns:
        A model with the same joint density, for any inference Pyro has. ``Predictive`` with it
        gives z itself, and its method ``samples`` that of draws.

    Example:
        >>> prior = InterpolantDistribution(interpolant_transform(2)).freeze()
        >>> def model():
        ...     z = pyro.sample("z", prior)
        ...     pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))
        >>> base = base_space(model)
        >>> sorted(pyro.poutine.trace(base).get_trace().stochastic_nodes)
        ['z_base']
        >>> base.samples({"z_base": torch.zeros(10, 2)})["z"].shape
        torch.Size([10, 2])
    """
    return BaseSpace(model)


class _BaseSpaceMessenger(Messenger):
    """Replace each learned prior by a sample of its base and a deterministic function of it."""

    def _pyro_sample(self, msg: Site) -> None:
        if msg["is_observed"] or msg["done"]:
            return
        name, (flow, wrappers) = msg["name"], _unwrapped(msg["fn"])
        base = name + _BASE
        if flow is None or any(holders(name, base, self)):
            return
        event_dim = msg["fn"].event_dim
        value, site = msg["value"], _in_all_plates(msg, self)
        value = requested_value(site) if value is None else whole_value(site, value)
        inside = _PYRO_STACK[_PYRO_STACK.index(self) :]
        # A block that let the site through by its name might stop its base by another.
        with block_messengers(lambda m: isinstance(m, BlockMessenger) and m in inside):
            w, x, z = _sampled(msg, flow, wrappers, value)
            scale = math.prod(m.scale for m in inside if isinstance(m, ScaleMessenger))
            if isinstance(scale, Tensor) or scale != 1:
                log_det = ComposeTransform(flow.transforms).log_abs_det_jacobian(x, z)
                log_det = log_det + flow.space.beside_base(w)  # no more the site's to weigh
                _count_jacobian(name, log_det, scale, wrappers)
        # As pyro.deterministic does it, in place of the site.
        msg["fn"] = dist.Delta(z, event_dim=event_dim).mask(mask=False)
        msg["value"] = z
        msg["is_observed"] = True
        msg["infer"] = {**msg["infer"], "_deterministic": True}


def _in_all_plates(msg: Site, messenger: Messenger) -> Site:
    """Return a site as it will be in the plates around a messenger too, of which values are."""
    site = {**msg}
    for outer in reversed(_PYRO_STACK[: _PYRO_STACK.index(messenger)]):
        if isinstance(outer, PlateMessenger):
            outer._process_message(cast("Message", site))
    return site


def _sampled(
    msg: Site,
    flow: InterpolantDistribution,
    wrappers: list[TorchDistributionMixin],
    value: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample the base of a flow, inside its wrappers.

    Returns:
        What is sampled, the draw of the base that it is, and the site's value.
    """
    name, space = msg["name"], flow.space
    base = _wrapped(space.sampled_base(flow.base_dist), wrappers)
    start: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if value is not None:
        value = value.to(flow.transform.flow.loc)
        if flow._validate_args:
            flow._validate_sample(value)  # else NaN in base space, outside of the support
        with torch.no_grad():
            value = space.to_sampled(ComposeTransform(flow.transforms).inv(value))
        start = InitMessenger(init_to_value(values={name + _BASE: value}))
    infer: dict[str, object] = {k: v for k, v in msg["infer"].items() if k not in _SITES_OWN}
    infer[_MARK] = (flow, name, msg["infer"].get(PACKED))
    with start, _not_yet_sampled(name):
        w = sample_in_place(name + _BASE, base, infer)
        x = _from_sampled(flow, w)
    return w, x, ComposeTransform(flow.transforms)(x)


def _count_jacobian(
    name: str, log_det: Tensor, scale: float | Tensor, wrappers: list[TorchDistributionMixin]
) -> None:
    r"""Add what a scale s inside of base space takes from the Jacobian of a site.

    The density :math:`q(z)^s` is :math:`p(w)^s |\det J|^{1 - s}` in terms of the base draw w. The
    scale weighs the base's :math:`\log p(w)` already, and the factor beside it too, which is
    therefore :math:`\frac{1 - s}{s} \log |\det J|`: enumeration takes sites of one scale alone.

    Args:
        name: The name of the site.
        log_det: The log-determinant of each event of the flow, ``(*)``; of angles the log-density
            of their points' distances from 0, too, which is none of the site's.
        scale: s > 0, of the shape that the site's density broadcasts with.
        wrappers: What is around the flow.
    """
    each = _wrapped(dist.Unit(log_det), wrappers)
    unit = dist.Unit((1 - scale) / scale * each.log_prob(each.sample()))
    own: Any = {"is_auxiliary": True, OWN_FACTOR: True}
    pyro.sample(name + _JACOBIAN, unit, obs=unit.sample(), infer=own)


def _wrapped(
    base: TorchDistributionMixin, wrappers: list[TorchDistributionMixin]
) -> TorchDistributionMixin:
    """Return a base inside the wrappers that a flow has, which come from outside."""
    for wrapper in reversed(wrappers):
        if isinstance(wrapper, dist.MaskedDistribution):
            base = base.mask(wrapper._mask)
        else:
            base = base.to_event(wrapper.reinterpreted_batch_ndims)
    return base


@contextlib.contextmanager
def _not_yet_sampled(name: str) -> Iterator[None]:
    """Let ``pyro.markov`` forget a site that enumeration has not met, while its base is drawn."""
    markov = (m for m in _PYRO_STACK if isinstance(m, MarkovMessenger))
    scopes = [names for messenger in markov for names in messenger._stack if name in names]
    for names in scopes:
        names.discard(name)
    try:
        yield
    finally:
        for names in scopes:
            names.add(name)


def _image(flow: InterpolantDistribution, z: Tensor) -> Tensor:
    """Return the values, ``(*, *event_shape)``, of what is sampled in base space."""
    return ComposeTransform(flow.transforms)(_from_sampled(flow, z))


def _from_sampled(flow: InterpolantDistribution, z: Tensor) -> Tensor:
    """Return the base's values, ``(*, D)``, of what is sampled in base space."""
    return flow.space.from_sampled(z.to(flow.transform.flow.loc))  # arrays are of float64


def _unwrapped(
    fn: TorchDistributionMixin,
) -> tuple[InterpolantDistribution | None, list[TorchDistributionMixin]]:
    """Return the flow inside ``to_event`` and ``mask``, or None, and its wrappers from outside."""
    wrappers = []
    while isinstance(fn, (dist.MaskedDistribution, torch.distributions.Independent)):
        wrappers.append(fn)
        fn = fn.base_dist
    return (fn if isinstance(fn, InterpolantDistribution) else None), wrappers


def holders(name: str, base: str, messenger: Messenger) -> Iterator[Messenger]:
    """Yield what conditions or replays, around a messenger, with a value of a site, not its base.

    Such as ``replay`` with that of a guide over the site. By the names that both have there,
    behind the scopes between. Where there are values of both, as of draws that hold deterministic
    sites too, the base counts, and the site's value is taken for its image, unchecked.

    Args:
        name: The site.
        base: What is sampled in its place.
        messenger: The messenger.
    """
    own: Message = {"name": name}
    under: Message = {"name": base}
    for outer in reversed(_PYRO_STACK[: _PYRO_STACK.index(messenger)]):
        values: Any = ()
        if isinstance(outer, ConditionMessenger):
            values = outer.data
        elif isinstance(outer, ReplayMessenger):
            values = outer.trace or ()
        if own["name"] in values and under["name"] not in values:
            yield outer
        if isinstance(outer, (ScopeMessenger, NameCountMessenger)):
            for msg in (own, under):
                outer._pyro_sample(msg)  # renames it


class _AskedForMore(Exception):
    """A strategy looked at the distribution of a site, so that it has no value for its name."""


class _OnlySupport:
    """A distribution that only tells its support."""

    def __init__(self, fn: TorchDistributionMixin) -> None:
        self.support = fn.support

    def __getattr__(self, name: str) -> NoReturn:
        raise _AskedForMore(name)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        raise _AskedForMore("__call__")


def requested_value(msg: Site) -> Tensor | None:
    """Return the value that an enclosing strategy names for this very site, or None.

    By asking it, since ``init_to_value`` may be inside another: a strategy that has a value for
    the name does not look at the distribution.

    Raises:
        ValueError: If the value does not broadcast to the shape of the site.
    """
    for messenger in reversed(_PYRO_STACK):
        if isinstance(messenger, InitMessenger):
            try:
                value = messenger.init_fn({**msg, "fn": _OnlySupport(msg["fn"])})
                return None if value is None else whole_value(msg, value)
            except (_AskedForMore, KeyError):  # KeyError: a function of the names it knows
                continue
    return None
