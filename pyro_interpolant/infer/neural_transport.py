r"""A model in the base space of a trained guide: all latent sites are maps of one draw of N(0, I).

By ``neutra``, as ``reparam`` does it for learned priors inside of a model.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import sum_rightmost
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.mask_messenger import MaskMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.scale_messenger import ScaleMessenger
from torch import Tensor
from torch.distributions import ComposeTransform, Transform

from .._torch import broadcast_shapes, seeded, with_gradients
from ..distributions.constraints import is_all_real
from ..distributions.joint import sample_in_place
from ..distributions.rows import as_tensor
from ..distributions.supports import OnEvents
from ..transforms.bijections import Unseen, biject
from ..transforms.gaussianize import without_gaussianizer
from .autoguide import AutoInterpolant
from .reparam import holders, requested_value
from .runs import nodes_of
from .sites import (
    LatentSites,
    Model,
    Site,
    check_fixed_shape,
    check_fixed_support,
    unchecked,
    whole_model,
)
from .validity import has_density, log_prob_left_out, without_masks

_SITE = "_shared_latent"  # how NeuTraReparam names the base draw, after the first site
_JACOBIAN = "_log_jacobian"
_LEFT_OUT = "_left_out"  # of each site: what masks leave out, and minus infinity where it is none


class Neutra:
    """A model whose latent sites are sampled together, in the base space of a guide.

    Made by :func:`neutra`; call it as the model.

    Args:
        guide: A trained guide; frozen here.
        model: Its model.
        student: A distribution whose transforms take the place of the guide's, or None.
    """

    _moved: frozenset[str] | None = None  # observed sites, known from the first run on

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
        name = first + _SITE
        base = self.guide.get_base_dist()  # not scored: the density is the model's
        with self._start(*args, **kwargs):
            points = [sample_in_place(name, base.mask(mask=False), {})]
        chain = transform.parts if isinstance(transform, ComposeTransform) else [transform]
        for part in chain:
            points.append(part(points[-1]))
        z = points[-1]
        parts = {name: (real, t) for name, t, real in self.sites.split(z)}
        images = _Images(parts, self.sites.shapes, z, name, self._moved_data(*args, **kwargs))
        with images:
            result = self.model(*args, **kwargs)
        if images.parts:
            raise ValueError(
                "expected the latent sites the guide has seen, got a model without "
                f"{sorted(images.parts)}"
            )
        if _mask() is not False:
            with _unweighted():
                pyro.factor(first + _JACOBIAN, images.total + _log_det(chain, points))
        return result

    def _transform(self, *args: object, **kwargs: object) -> Transform:
        """Return the map from base space to the unconstrained vector."""
        if self.student is not None:
            return ComposeTransform([Unseen(), *self.student.transforms])
        return self.guide.get_transform(*args, **kwargs)

    def _moved_data(self, *args: object, **kwargs: object) -> frozenset[str]:
        """Return the names of observed sites whose values latent ones move, as those of residuals.

        These alone may come off a support that is fixed, where formulas go on.
        """
        if self._moved is None:
            model = functools.partial(self.model, *args, **kwargs)
            with with_gradients(), unchecked(), seeded(0):
                z = self.guide._init_loc().requires_grad_()
                values = {name: value[0] for name, value in self.sites.unpack(z[None]).items()}
                try:
                    nodes = nodes_of(poutine.condition(model, values))
                except Exception:  # of which the run itself will tell; the next may do
                    return frozenset()
            sampled = {k: node["value"] for k, node in nodes.items() if node["type"] == "sample"}
            self._moved = frozenset(
                k for k, v in sampled.items() if isinstance(v, Tensor) and v.requires_grad
            )
        return self._moved

    def _first(self) -> str:
        """Return the name of the first site, after which the base draw is named."""
        return next(iter(self.sites.shapes))

    def _start(self, *args: object, **kwargs: object) -> contextlib.AbstractContextManager[object]:
        """Return what starts the base draw where an enclosing strategy names values of sites.

        Sites without a value start at the guide's median.
        """
        prototype = self.guide.prototype_trace.nodes
        named = {name: requested_value(prototype[name]) for name in self.sites.shapes}
        values = {name: value for name, value in named.items() if value is not None}
        if not values:
            return contextlib.nullcontext()
        values = {k: v[None] for k, v in {**self.guide.median(*args, **kwargs), **values}.items()}
        with torch.no_grad():
            w = self._transform(*args, **kwargs).inv(self.sites.pack(values)[0])
        return InitMessenger(init_to_value(values={self._first() + _SITE: w}))

    @torch.no_grad()
    def samples(
        self, draws: Mapping[str, ArrayLike], *args: object, **kwargs: object
    ) -> dict[str, Tensor]:
        """Return draws in the model's sites, each ``(*, *site_shape)``, in one solve.

        Args:
            draws: What ``mcmc.get_samples()`` gives, by chain or not: the base draw, ``(*, D)``,
                and as they are the sites that the guide was not given.
            *args: The arguments of the model, with which an amortised guide finds its data.
            **kwargs: Its named arguments.

        Raises:
            ValueError: If they are not draws of this model in base space.
        """
        values = {name: as_tensor(value, f"draws of {name!r}") for name, value in draws.items()}
        names = [name for name in values if name.endswith(_SITE)]
        dim = self.guide.latent_dim
        if len(names) != 1 or values[names[0]].shape[-1:] != (dim,):
            got = {name: tuple(value.shape) for name, value in values.items()}
            raise ValueError(
                f"expected draws of one site '*{_SITE}' of shape (*, {dim}), from MCMC with this "
                f"model, got {got}"
            )
        base = values[names[0]].to(self.guide.transform.flow.loc)  # arrays are of float64
        transform = self._transform(*args, **kwargs)
        sites = self.sites.unpack(transform(base.reshape(-1, dim)))
        found = {k: v.reshape(base.shape[:-1] + v.shape[1:]) for k, v in sites.items()}
        return found | {name: value for name, value in values.items() if name not in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set the state of a pickle, in which the guide has no model."""
        self.__dict__.update(state)
        self.guide.attach(self.model)


def _log_det(chain: Sequence[Transform], points: Sequence[Tensor]) -> Tensor:
    """Return the log-determinant, shape ``(*)``, of transforms.

    As :class:`~torch.distributions.ComposeTransform` does, which would call each once more.

    Args:
        chain: The transforms.
        points: What they were given one after another, and the end, each of shape ``(*, D)``.
    """
    total = points[0].new_zeros(points[0].shape[:-1])
    for part, x, y in zip(chain, points[:-1], points[1:], strict=True):
        term = part.log_abs_det_jacobian(x, y)
        total = total + sum_rightmost(term, term.dim() - x.dim() + 1)
    return total


@contextlib.contextmanager
def _unweighted() -> Iterator[None]:
    """Keep what is inside from the scales and masks around, which weigh densities of sites."""
    around = list(_PYRO_STACK)
    _PYRO_STACK[:] = [m for m in around if not isinstance(m, ScaleMessenger | MaskMessenger)]
    try:
        yield
    finally:
        _PYRO_STACK[:] = around


def is_same_map(one: Transform, other: Transform) -> bool:
    """Return whether two bijections are equal part by part, as torch compares few of them."""
    one, other = _unwrapped(one), _unwrapped(other)
    parts, others = _parts(one), _parts(other)
    if not parts or type(one) is not type(other):
        return bool(one == other)
    return len(parts) == len(others) and all(map(is_same_map, parts, others))


def _parts(transform: Transform) -> list[Transform]:
    """Return the transforms that a transform joins or composes."""
    return list(getattr(transform, "parts", getattr(transform, "transforms", [])))


def _unwrapped(transform: Transform) -> Transform:
    """Return the transform inside those that only sum its log-determinant, or keep its values."""
    inner = getattr(transform, "base_transform", getattr(transform, "wrapped", None))
    return transform if inner is None else _unwrapped(inner)


class _Image(dist.Delta):
    """The image of a base draw, also where a value of it that was kept differs by its rounding."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density of the image, shape ``(*)``, at x, ``(*, *event_shape)``."""
        batch = broadcast_shapes(self.batch_shape, x.shape[: x.dim() - self.event_dim])
        return self.log_density.expand(batch)


class _Images(Messenger):
    """Give latent sites their parts of one unconstrained vector, and add up the Jacobians.

    The Jacobians are of the whole vector: they are no part of the density of a site, which counts
    once for each member of a plate, or not at all under a mask.

    Args:
        parts: The unconstrained value of each site, and the bijection by which its draws come
            back; each is taken out as its site comes.
        shapes: The shape of each site.
        z: The vector, shape ``(*, D)``.
        base: The name of the site that it is made of.
        moved: The observed sites whose values latent ones move, perhaps off a fixed support.

    Attributes:
        total: The sum so far of the log-determinants, shape ``(*)``.
        left_out: Of the site that is sampled now: what counts beside it, unscaled, where masks
            leave a latent out; minus infinity where it has no density, which its formula may not
            tell. None of most sites.
    """

    left_out: Tensor | None = None

    def __init__(
        self,
        parts: dict[str, tuple[Tensor, Transform]],
        shapes: Mapping[str, torch.Size],
        z: Tensor,
        base: str,
        moved: Collection[str],
    ) -> None:
        super().__init__()
        self.parts, self.shapes, self.base, self.moved = parts, shapes, base, moved
        self.total = z.new_zeros(z.shape[:-1])

    def _pyro_sample(self, msg: Site) -> None:
        if msg["name"] not in self.parts:
            if msg["is_observed"] and not msg["infer"].get("_deterministic"):
                moved = msg["name"] in self.moved
                valid = has_density(msg["fn"], msg["value"], mask=_mask(), moved=moved)
                if not isinstance(valid, bool):
                    self.left_out = torch.where(valid, 0.0, -math.inf)
                    msg["fn"] = msg["fn"].mask(valid)  # its formula may give no number there
            return
        others = list(holders(msg["name"], self.base, self))
        if msg["is_observed"] or any(isinstance(m, ConditionMessenger) for m in others):
            raise ValueError(
                f"expected site {msg['name']!r} to be latent, as when the guide was set up, got "
                "it observed: train a guide of the model with these data"
            )
        if others:
            raise ValueError(
                f"expected values of the base draw {self.base!r}, got site {msg['name']!r} "
                "replayed, as of a guide over it: give such a guide the model itself"
            )
        (real, known), fn = self.parts.pop(msg["name"]), msg["fn"]
        transform = biject(fn.support)
        value = transform(real)
        shape = _unenumerated(fn.batch_shape) + fn.event_shape
        check_fixed_shape(msg["name"], shape, value, self.shapes[msg["name"]])
        if not is_same_map(transform, known):  # which most supports spare comparing values
            check_fixed_support(msg["name"], value, known(real))
        log_det = transform.log_abs_det_jacobian(real, value)
        log_det = sum_rightmost(log_det, log_det.dim() - value.dim() + fn.event_dim)
        self.total = self.total + log_det.sum_to_size(self.total.shape)
        msg["fn"] = self._image(fn, value)
        msg["value"], msg["is_observed"] = value, True

    def _image(self, fn: TorchDistributionMixin, value: Tensor) -> dist.Delta:
        """Return a latent site's value as a distribution whose log density is that of its own."""
        mask, events = _mask(), value.dim() - fn.event_dim
        score = value.new_zeros(()) if mask is False else fn.log_prob(value)
        beside = log_prob_left_out(fn, value, mask=mask)
        valid = has_density(without_masks(fn), None, mask=mask)
        if not isinstance(valid, bool):
            score = torch.where(valid, score, 0.0)
            beside = torch.where(valid, 0.0 if beside is None else beside, -math.inf)
        self.left_out = beside
        # Of an enumerated site the score may have dimensions more.
        batch = broadcast_shapes(score.shape, value.shape[:events])
        image = value.expand(batch + value.shape[events:])
        return _Image(image, score.expand(batch), event_dim=fn.event_dim)

    def _pyro_post_sample(self, msg: Site) -> None:
        if self.left_out is not None:  # only now is the site known to the handlers around
            left_out, self.left_out = self.left_out, None
            with _unweighted():
                pyro.factor(msg["name"] + _LEFT_OUT, left_out)


def _mask() -> Tensor | bool | None:
    """Return the mask of the handlers around, ``False`` where one of them masks all out."""
    masks = [m.mask for m in _PYRO_STACK if isinstance(m, MaskMessenger)]
    return False if any(mask is False for mask in masks) else poutine.get_mask()


def _unenumerated(batch_shape: torch.Size) -> torch.Size:
    """Return a batch shape without the dimensions of enumerated sites around, left of plates."""
    first = [m.first_available_dim for m in _PYRO_STACK if isinstance(m, EnumMessenger)]
    if not first or first[0] is None or len(batch_shape) < -first[0]:
        return batch_shape
    return batch_shape[len(batch_shape) + first[0] + 1 :]


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
    adds it to the first site, where it counts once for each member of that site's plate. A scale
    or a mask around the result weighs the density of the model, as one around the model.

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
    support = student.support
    inner = support.inner if isinstance(support, OnEvents) else support
    is_real = is_all_real(without_gaussianizer(inner))
    if student.batch_shape or student.event_shape != (dim,) or not is_real:
        raise ValueError(
            f"expected a student of event shape {(dim,)}, the guide's real vector, got event "
            f"shape {tuple(student.event_shape)} on {support} and batch shape "
            f"{tuple(student.batch_shape)}: {remedy}"
        )
