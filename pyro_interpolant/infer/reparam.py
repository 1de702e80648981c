r"""Inference in base space: :math:`z \sim q` becomes :math:`z = T(w)`, :math:`w \sim N(0, I)`.

By ``base_space`` for learned priors inside a model; by ``neutra`` for all latent sites together,
through a trained guide.
"""

import contextlib
import copy
import functools
from collections.abc import Mapping
from typing import NoReturn, cast

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import ComposeTransform, Transform, biject_to

from .._torch import are_close
from ..distributions.constraints import is_all_real
from ..distributions.interpolant import InterpolantDistribution
from ..distributions.joint import NAMED
from .autoguide import AutoInterpolant
from .sites import (
    LatentSites,
    Model,
    Nodes,
    Site,
    check_fixed_shape,
    check_fixed_support,
    is_same_map,
    whole_model,
    whole_value,
)
from .validity import log_prob_left_out

_BASE = "_base"  # what a site in base space has after its name
_FLOW = "_interpolant_flow"  # where a trace keeps the distribution of a site in base space


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
        self, draws: Mapping[str, Tensor], *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """Return draws in the sites of the model: ``z_base`` becomes z, or its sites by name.

        For summaries, ``pyro.infer.mcmc.util.print_summary(base.samples(draws, *args))``, and for
        ``Predictive`` with the model itself.

        Args:
            draws: What ``mcmc.get_samples()`` gives, by chain or not, each ``(*, *site_shape)``.
            *args: The arguments of the model.
            **kwargs: Its named arguments.

        Returns:
            Every site that is no ``z_base`` as it was; in place of each such, ``z``, in one solve,
            or, where ``sample_sites`` drew it, the sites of a joint distribution by name.

        Raises:
            ValueError: If a prior depends on another site, so that each draw has its own.
        """
        nodes = cast("Nodes", poutine.trace(self).get_trace(*args, **kwargs).nodes)
        named = dict(draws)
        last = self._last(nodes, draws, *args, **kwargs)
        for name, node in nodes.items():
            options = node.get("infer") or {}
            flow = options.get(_FLOW)
            if flow is None or name + _BASE not in named:
                continue
            if flow.transform.context is not None:
                raise ValueError(
                    f"expected priors that are the same for all draws, got the site {name!r} with "
                    "a context: use Predictive(base_space(model), draws)"
                )
            w = named.pop(name + _BASE)
            value, row = _image(flow, w), w.reshape(-1, *last[name + _BASE]["value"].shape)[-1]
            own = last[name]["infer"][_FLOW]
            if own is not flow and not are_close(_image(own, row), _image(flow, row)):
                raise ValueError(
                    f"expected priors that are the same for all draws, got the site {name!r} with "
                    "one that depends on other sites: use Predictive(base_space(model), draws)"
                )
            named |= flow.unpack(value) if options.get(NAMED) else {name: value}
        return named

    def _last(
        self, nodes: Nodes, draws: Mapping[str, Tensor], *args: object, **kwargs: object
    ) -> Nodes:
        """Return the sites of a run with the last of the draws of its sites."""
        values = {}
        for name, node in nodes.items():
            if name in draws and node["type"] == "sample" and not node["is_observed"]:
                values[name] = draws[name].reshape(-1, *node["value"].shape)[-1]
        run = poutine.condition(self, data=values)
        return cast("Nodes", poutine.trace(run).get_trace(*args, **kwargs).nodes)


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
    inside or around, is observed in data space. A scale or a mask weighs the base, as with Pyro's
    ``TransformReparam``: the ELBO is the same, what a sampler explores is not.

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
        flow, wrappers = _unwrapped(msg["fn"])
        if flow is None or _is_conditioned(msg["name"]):
            return
        event_dim = msg["fn"].event_dim
        value = msg["value"]
        value = _requested_value(msg) if value is None else whole_value(msg, value)
        z = _sampled(msg["name"], flow, wrappers, value)
        # As pyro.deterministic does it, in place of the site.
        msg["fn"] = dist.Delta(z, event_dim=event_dim).mask(mask=False)
        msg["value"] = z
        msg["is_observed"] = True
        msg["infer"] = {**msg["infer"], "_deterministic": True, _FLOW: flow}


def _sampled(
    name: str,
    flow: InterpolantDistribution,
    wrappers: list[TorchDistributionMixin],
    value: Tensor | None,
) -> Tensor:
    """Sample the base of a flow, inside its wrappers, and return the value of the site."""
    space = flow.space
    base = space.sampled_base(flow.base_dist)
    for wrapper in reversed(wrappers):
        if isinstance(wrapper, dist.MaskedDistribution):
            base = base.mask(wrapper._mask)
        else:
            base = base.to_event(wrapper.reinterpreted_batch_ndims)
    start: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    if value is not None:
        if flow._validate_args:
            flow._validate_sample(value)  # else NaN in base space, outside of the support
        with torch.no_grad():
            value = space.to_sampled(ComposeTransform(flow.transforms).inv(value))
        start = InitMessenger(init_to_value(values={name + _BASE: value}))
    with start:
        return _image(flow, pyro.sample(name + _BASE, base))


def _image(flow: InterpolantDistribution, z: Tensor) -> Tensor:
    """Return the values, ``(*, *event_shape)``, of what is sampled in base space."""
    return ComposeTransform(flow.transforms)(flow.space.from_sampled(z))


def _unwrapped(
    fn: TorchDistributionMixin,
) -> tuple[InterpolantDistribution | None, list[TorchDistributionMixin]]:
    """Return the flow inside ``to_event`` and ``mask``, or None, and its wrappers from outside."""
    wrappers = []
    while isinstance(fn, (dist.MaskedDistribution, torch.distributions.Independent)):
        wrappers.append(fn)
        fn = fn.base_dist
    return (fn if isinstance(fn, InterpolantDistribution) else None), wrappers


def _is_conditioned(name: str) -> bool:
    """Return whether an enclosing ``condition`` is about to observe the site."""
    return any(isinstance(m, ConditionMessenger) and name in m.data for m in _PYRO_STACK)


class _AskedForMore(Exception):
    """A strategy looked at the distribution of a site, so that it has no value for its name."""


class _OnlySupport:
    """A distribution that only tells its support."""

    def __init__(self, fn: TorchDistributionMixin) -> None:
        self.support = fn.support

    def __getattr__(self, name: str) -> NoReturn:
        raise _AskedForMore(name)


def _requested_value(msg: Site) -> Tensor | None:
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


_SITE = "_shared_latent"  # how NeuTraReparam names the base draw, after the first site
_JACOBIAN = "_log_jacobian"


class Neutra:
    """A model whose latent sites are sampled together, in the base space of a guide.

    Made by :func:`neutra`; call it as the model.

    Args:
        guide: A trained guide; frozen here.
        model: Its model.
        student: A distribution whose transforms take the place of the guide's, or None.
    """

    def __init__(
        self,
        guide: AutoInterpolant,
        model: Model,
        student: dist.TransformedDistribution | None = None,
    ) -> None:
        self.guide = guide
        self.model = model
        self.student = student
        self.sites = LatentSites(guide)

    def __call__(self, *args: object, **kwargs: object) -> object:
        """Run the model in base space; the latent sites are deterministic functions of it.

        Raises:
            ValueError: If the model has not the latent sites that the guide has seen.
        """
        first, transform = self._first(), self._transform(*args, **kwargs)
        base = self.guide.get_base_dist()  # not scored: the density is the model's
        with self._start(*args, **kwargs):
            w = pyro.sample(first + _SITE, base.mask(mask=False))
            if self.student is not None:  # a view, which the caches of its transforms do not know
                w = w.view_as(w)
        z = transform(w)
        parts = {name: (real, t) for name, t, real in self.sites.split(z)}
        images = _Images(parts, self.sites.shapes, z)
        with images:
            result = self.model(*args, **kwargs)
        if images.parts:
            raise ValueError(
                "expected the latent sites the guide has seen, got a model without "
                f"{sorted(images.parts)}"
            )
        if poutine.get_mask() is not False:
            log_det = images.total + transform.log_abs_det_jacobian(w, z)
            pyro.factor(first + _JACOBIAN, log_det)
        return result

    def _transform(self, *args: object, **kwargs: object) -> Transform:
        """Return the map from base space to the unconstrained vector."""
        if self.student is not None:
            return ComposeTransform(self.student.transforms)
        return self.guide.get_transform(*args, **kwargs)

    def _first(self) -> str:
        """Return the name of the first site, after which the base draw is named."""
        return next(iter(self.sites.shapes))

    def _start(self, *args: object, **kwargs: object) -> contextlib.AbstractContextManager[object]:
        """Return what starts the base draw where an enclosing strategy names values of sites.

        Sites without a value start at the guide's median.
        """
        prototype = self.guide.prototype_trace.nodes
        named = {name: _requested_value(prototype[name]) for name in self.sites.shapes}
        values = {name: value for name, value in named.items() if value is not None}
        if not values:
            return contextlib.nullcontext()
        values = {k: v[None] for k, v in {**self.guide.median(*args, **kwargs), **values}.items()}
        with torch.no_grad():
            w = self._transform(*args, **kwargs).inv(self.sites.pack(values)[0])
        return InitMessenger(init_to_value(values={self._first() + _SITE: w}))

    @torch.no_grad()
    def samples(
        self, draws: Mapping[str, Tensor], *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """Return draws in the model's sites, each ``(*, *site_shape)``, in one solve.

        Args:
            draws: What ``mcmc.get_samples()`` gives, by chain or not: one site, ``(*, D)``.
            *args: The arguments of the model, with which an amortised guide finds its data.
            **kwargs: Its named arguments.

        Raises:
            ValueError: If they are not draws of this model in base space.
        """
        names = [name for name in draws if name.endswith(_SITE)]
        dim = self.guide.latent_dim
        if len(names) != 1 or draws[names[0]].shape[-1] != dim:
            got = {name: tuple(value.shape) for name, value in draws.items()}
            raise ValueError(
                f"expected draws of one site '*{_SITE}' of shape (*, {dim}), from MCMC with this "
                f"model, got {got}"
            )
        base = draws[names[0]]
        transform = self._transform(*args, **kwargs)
        sites = self.sites.unpack(transform(base.reshape(-1, dim)))
        return {k: v.reshape(base.shape[:-1] + v.shape[1:]) for k, v in sites.items()}


class _Images(Messenger):
    """Give latent sites their parts of one unconstrained vector, and add up the Jacobians.

    The Jacobians are of the whole vector: they are no part of the density of a site, which counts
    once for each member of a plate, or not at all under a mask.

    Args:
        parts: The unconstrained value of each site, and the bijection by which its draws come
            back; each is taken out as its site comes.
        shapes: The shape of each site.
        z: The vector, shape ``(*, D)``.

    Attributes:
        total: The sum so far of the log-determinants, and of the log densities of rows that are
            masked out, shape ``(*)``.
    """

    def __init__(
        self,
        parts: dict[str, tuple[Tensor, Transform]],
        shapes: Mapping[str, torch.Size],
        z: Tensor,
    ) -> None:
        super().__init__()
        self.parts, self.shapes, self.total = parts, shapes, z.new_zeros(z.shape[:-1])

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] not in self.parts:
            return
        if msg["is_observed"] or _is_conditioned(msg["name"]):
            raise ValueError(
                f"expected site {msg['name']!r} to be latent, as when the guide was set up, got "
                "it observed: train a guide of the model with these data"
            )
        (real, known), fn = self.parts.pop(msg["name"]), msg["fn"]
        transform = biject_to(fn.support)
        value = transform(real)
        check_fixed_shape(msg["name"], fn, value, self.shapes[msg["name"]])
        if not is_same_map(transform, known):  # which most supports spare comparing values
            check_fixed_support(msg["name"], value, known(real))
        log_det = transform.log_abs_det_jacobian(real, value)
        log_det = sum_rightmost(log_det, log_det.dim() - value.dim() + fn.event_dim)
        self.total = self.total + log_det.sum_to_size(self.total.shape)
        left_out = log_prob_left_out(fn, value, mask=msg["mask"])
        if left_out is not None:
            self.total = self.total + left_out.sum_to_size(self.total.shape)
        score = 0.0 if poutine.get_mask() is False else fn.log_prob(value)
        msg["fn"] = dist.Delta(value, score, event_dim=fn.event_dim)
        msg["value"], msg["is_observed"] = value, True


def neutra(
    guide: AutoInterpolant,
    model: Model | None = None,
    *,
    student: dist.TransformedDistribution | None = None,
) -> Neutra:
    """Return the model in the guide's base space, where a good guide makes it N(0, I) for NUTS.

    The guide is copied and the copy frozen: nothing here trains it, and it can be trained on.
    ``init_to_value`` with values of sites is honoured, by inverting the flow once; a site without
    one starts at the guide's median. The Jacobian is a site of its own: Pyro's ``NeuTraReparam``
    adds it to the first site, where it counts once for each member of that site's plate.

    Args:
        guide: A trained guide.
        model: Its model, with all its sites; by default the one it was made with.
        student: The ``distribution`` of what :func:`~pyro_interpolant.distill` makes of
            ``guide.get_posterior()``: its map, of one pass, takes the place of the guide's, for
            cheaper gradients. The posterior is exact with either.

    Returns:
        A model for ``NUTS``, and, by its method ``samples``, draws in the sites of the model.

    Raises:
        TypeError: If the guide is not an :class:`~pyro_interpolant.AutoInterpolant`, or the
            student no distribution of transforms.
        ValueError: If it has not seen its model yet, lost it in a pickle, or was made with one
            that ``poutine.block`` wraps, or the student is not one of its unconstrained vector.

    References:
        Hoffman et al., arXiv 1903.03704.

    Example:
        >>> from pyro.infer import MCMC, NUTS
        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 1.0))
        >>> guide = AutoInterpolant(model)
        >>> _ = guide()
        >>> base = neutra(guide)
        >>> mcmc = MCMC(NUTS(base), num_samples=5, warmup_steps=5, disable_progbar=True)
        >>> mcmc.run()
        >>> base.samples(mcmc.get_samples())["x"].shape
        torch.Size([5])
    """
    if not isinstance(guide, AutoInterpolant):
        raise TypeError(
            f"expected an AutoInterpolant, got {type(guide).__name__}: use Pyro's NeuTraReparam"
        )
    if guide.prototype_trace is None:
        raise ValueError("expected a guide that has seen its model: train it, or call it once")
    if student is not None:
        _check_student(student, guide.latent_dim)
    frozen = copy.deepcopy(guide).requires_grad_(requires_grad=False).eval()
    return Neutra(frozen, whole_model(guide.model) if model is None else model, student)


def _check_student(student: object, dim: int) -> None:
    """Raise an error unless a student is one of real vectors, shape ``(dim,)``."""
    remedy = "distill(guide.get_posterior()).distribution"
    if not isinstance(student, dist.TransformedDistribution):
        raise TypeError(
            f"expected a student that is a distribution, got {type(student).__name__}: {remedy}"
        )
    is_real = is_all_real(student.support)
    if student.batch_shape or student.event_shape != (dim,) or not is_real:
        raise ValueError(
            f"expected a student of event shape {(dim,)}, the guide's real vector, got event "
            f"shape {tuple(student.event_shape)} on {student.support} and batch shape "
            f"{tuple(student.batch_shape)}: {remedy}"
        )
