r"""Bases that files describe, as NumPyro's distributions, and those of the torus.

A base is the class of a Pyro distribution and its arguments; it is looked up here by name, with
the names that NumPyro gives to the same arguments.
"""

import copy
import functools
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.typing import ArrayLike, DTypeLike
from numpy.typing import NDArray
from numpyro.distributions import constraints
from numpyro.distributions import transforms as maps
from numpyro.distributions.batch_util import promote_batch_shape

from .._files import below
from .supports import CIRCULAR, OnEvents
from .transforms import RealVectorTransform, Wrap

WRAPPERS = (dist.ExpandedDistribution, dist.Independent, dist.MaskedDistribution)
_TURN = 2 * math.pi

# Of these the arguments have the same names and meanings.
_SAME = (
    "AsymmetricLaplace",
    "Beta",
    "Categorical",
    "Cauchy",
    "Chi2",
    "Exponential",
    "Gamma",
    "Gumbel",
    "HalfCauchy",
    "HalfNormal",
    "InverseGamma",
    "Kumaraswamy",
    "Laplace",
    "LogNormal",
    "Logistic",
    "LowRankMultivariateNormal",
    "MultivariateNormal",
    "MultivariateStudentT",
    "Normal",
    "Pareto",
    "SoftLaplace",
    "StudentT",
    "Uniform",
    "VonMises",
    "Weibull",
)
_TRANSFORMS = ("AffineTransform", "ExpTransform", "SigmoidTransform", "SoftplusTransform")


class UniformTorus(dist.Distribution):
    r"""The uniform base on the torus: density :math:`(2\pi)^{-D}` at every real vector.

    Args:
        origin: Zeros, shape ``(*batch, D)``.
    """

    arg_constraints = {"origin": constraints.real_vector}
    support = constraints.real_vector
    reparametrized_params = ["origin"]

    def __init__(self, origin: ArrayLike, *, validate_args: bool | None = None) -> None:
        self.origin = origin
        shape = jnp.shape(origin)
        super().__init__(shape[:-1], shape[-1:], validate_args=validate_args)

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        r"""Return draws in :math:`[-\pi, \pi)`, shape ``(*sample_shape, *batch, D)``."""
        dtype = jnp.result_type(self.origin)
        shape = sample_shape + self.batch_shape + self.event_shape
        return jax.random.uniform(key, shape, dtype, -math.pi, math.pi)

    def log_prob(self, value: Array, intermediates: object = None) -> Array:  # noqa: ARG002
        r"""Return :math:`-D \log 2\pi`, shape ``(*)``, of real values of shape ``(*, D)``."""
        shape = jnp.broadcast_shapes(jnp.shape(value)[:-1], self.batch_shape)
        level = -self.event_shape[0] * math.log(_TURN)
        return jnp.full(shape, level, jnp.result_type(value, self.origin))


class Planar(dist.Distribution):
    r"""A base on the torus as a density on :math:`R^{2D}`, for samplers on real vectors.

    Each angle is the direction of a point of the plane: see
    :class:`~pyro_interpolant.distributions.bases.Planar`.

    Args:
        base: A distribution of D angles whose density has period :math:`2\pi`.
    """

    pytree_data_fields = ("base",)
    support = constraints.real_vector

    def __init__(self, base: dist.Distribution) -> None:
        self.base = base
        super().__init__(base.batch_shape, (2 * base.event_shape[0],))

    @property
    def has_rsample(self) -> bool:
        """Whether draws can be differentiated."""
        return self.base.has_rsample

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Return points of the planes, shape ``(*sample_shape, *batch, 2 D)``."""
        one, other = jax.random.split(key)
        u = self.base.sample(one, sample_shape)
        parts = jax.random.normal(other, (2, *u.shape), u.dtype)
        return in_planes(u, jnp.hypot(*parts))

    def log_prob(self, value: Array, intermediates: object = None) -> Array:  # noqa: ARG002
        """Return the log-density, shape ``(*)``, of real values, shape ``(*, 2 D)``."""
        return self.base.log_prob(directions(value)) - 0.5 * jnp.square(value).sum(-1)


@promote_batch_shape.register
def _(distribution: Planar) -> Planar:
    """Take the batch shape that ``scan`` has given to the angles."""
    new = copy.copy(distribution)
    new.base = promote_batch_shape(distribution.base)
    new._batch_shape = new.base.batch_shape
    return new


def in_planes(u: Array, radius: ArrayLike) -> Array:
    """Return points of the plane in the directions u, shape ``(*, D)``, as ``(*, 2 D)``."""
    return jnp.concatenate((radius * jnp.cos(u), radius * jnp.sin(u)), -1)


def directions(w: Array) -> Array:
    """Return the angles, shape ``(*, D)``, of points of the plane, shape ``(*, 2 D)``."""
    x, y = jnp.split(w, 2, -1)
    return jnp.arctan2(y, jnp.where((x == 0) & (y == 0), 1.0, x))  # a finite slope at 0


def standard_normal(dim: int, dtype: DTypeLike) -> dist.Distribution:
    """Return N(0, I), event shape ``(dim,)``."""
    zero, one = np.zeros(dim, dtype), np.ones(dim, dtype)
    return dist.Normal(zero, one, validate_args=False).to_event(1)


def in_batch(base: dist.Distribution, batch: tuple[int, ...]) -> dist.Distribution:
    """Return a base, expanded to a batch shape, whose arrays have all dimensions of the batch.

    NumPyro's ``scan`` puts time in front of each array, where it has to come before the batch. An
    expansion alone has the batch in no array, and that inside another is not seen by ``scan``.
    """
    return _in_front(base, len(batch) - len(base.batch_shape)).expand(batch)


def _in_front(base: dist.Distribution, ones: int) -> dist.Distribution:
    """Return a distribution with ones in front of its batch shape and of its arrays."""
    shape = (1,) * ones + base.batch_shape
    if isinstance(base, dist.ExpandedDistribution):
        inner = base.base_dist
        inner = _in_front(inner, len(shape) - len(inner.batch_shape))
        return dist.ExpandedDistribution(inner, shape)
    rank = len(base.shape())

    def is_part(node: object) -> bool:
        is_one = isinstance(node, dist.Distribution | RealVectorTransform)
        return is_one and node is not base

    def moved(node: Any) -> Any:
        if isinstance(node, RealVectorTransform):  # its weights have no batch
            return node
        if is_part(node):
            return _in_front(node, ones)
        before = ones + max(0, rank - jnp.ndim(node))  # some are numbers, of any shape
        return jnp.reshape(node, (1,) * before + jnp.shape(node)) if before else node

    new = jax.tree.map(moved, base, is_leaf=is_part)
    new._batch_shape = shape
    return new


def unwrapped(fn: Any) -> Any:
    """Return the distribution inside ``expand``, ``to_event`` and ``mask``."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    return fn


def innermost_constraint(constraint: constraints.Constraint) -> constraints.Constraint:
    """Return the constraint on the smallest events, of those independent."""
    while isinstance(constraint, type(constraints.independent(constraints.real, 1))):
        constraint = constraint.base_constraint
    return constraint


def base_log_prob(base: dist.Distribution, x: Array) -> Array:
    """Return the log-density of a base, shape ``(*)``, of real vectors, shape ``(*, D)``.

    It is ``-inf`` outside the base's support, where solving back from data may end.
    """
    end = innermost_constraint(base.support)
    if isinstance(end, type(constraints.circular)) or end == OnEvents(CIRCULAR):
        return base.log_prob(Wrap()(x))
    x = jnp.broadcast_to(x, jnp.broadcast_shapes(x.shape, base.batch_shape + base.event_shape))
    found = _inside(base, x)
    if found is None:
        return base.log_prob(x)
    inside, known = found
    log_prob = base.log_prob(jnp.where(inside[..., None], x, known))
    unknown = jnp.isnan(x).any(-1)
    return jnp.where(inside, log_prob, jnp.where(unknown, jnp.nan, -jnp.inf))


def _inside(base: dist.Distribution, x: Array) -> tuple[Array, Array] | None:
    """Return where a base can have values, shape ``(*)``, and some where it can.

    Values are pulled back through its transforms, and must be in the codomain of each: NumPyro
    states that of the last alone.

    Args:
        base: The base.
        x: Values, shape ``(*, *event_shape)``.

    Returns:
        Both, or None where all values may be.
    """
    inner = unwrapped(base)
    if type(inner).log_prob is not dist.TransformedDistribution.log_prob:  # a formula of its own
        return _inside_support(base.support, x)
    y, event_dim, within = x, base.event_dim, list[Array]()
    transforms = _flat(inner.transforms)
    for transform in reversed(transforms):
        end = transform.codomain
        found = _inside_support(end, y)
        if found is not None:
            y, possible = _kept(y, found, end.event_dim, event_dim)
            within.append(possible)
        y = transform.inv(y)
        event_dim += transform.domain.event_dim - end.event_dim
    found = _inside(inner.base_dist, y)
    if found is not None:
        y, possible = _kept(y, found, inner.base_dist.event_dim, event_dim)
        within.append(possible)
    if not within:
        return None
    for transform in transforms:
        y = transform(y)
    return functools.reduce(operator.and_, within), y


def _kept(
    y: Array, found: tuple[Array, Array], checked_dim: int, event_dim: int
) -> tuple[Array, Array]:
    """Return values with known ones for those that cannot be, and which events can, ``(*)``.

    Args:
        y: The values, shape ``(*, *event_shape)``.
        found: Where they can be, and known ones.
        checked_dim: How many dimensions of y each boolean is for.
        event_dim: The number of dimensions of an event.
    """
    inside, known = found
    possible = inside.all(tuple(range(checked_dim - event_dim, 0)))
    return jnp.where(inside.reshape(inside.shape + (1,) * checked_dim), y, known), possible


def _flat(transforms: Sequence[maps.Transform]) -> list[maps.Transform]:
    """Return transforms, of those that are composed the parts."""
    parts = ((t.parts if isinstance(t, maps.ComposeTransform) else [t]) for t in transforms)
    return [part for several in parts for part in several]


def _inside_support(support: constraints.Constraint, x: Array) -> tuple[Array, Array] | None:
    """Return which values are in a support, and some that are, or None where all may be."""
    end = innermost_constraint(support)
    if isinstance(end, type(constraints.real) | type(constraints.real_vector) | OnEvents):
        return None  # flows know their own
    return jnp.asarray(support(x)), support.feasible_like(x)


def build_base(
    description: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]
) -> dist.Distribution:
    """Return the base of a description, given its arrays by name.

    Raises:
        ValueError: If it is none that NumPyro has; the message names it.
    """
    if "uniform_torus" in description:
        return UniformTorus(tensors["origin"])
    if "samples" in description:
        raise ValueError("its base is samples alone, which have no density")
    if "independent" in description:
        inner = build_base(description["independent"], tensors)
        return inner.to_event(description["ndims"])
    name = description["class"]
    arguments: dict[str, Any] = {key: tensors[key] for key in description["arguments"]}
    for key, part in description.get("parts", {}).items():
        arguments[key] = _build_part(part, below(f"{key}.", tensors))
    new = _build_object(name, arguments)
    shape = description.get("batch_shape")
    return new if shape is None else new.expand(tuple(shape))


def _build_object(name: str, arguments: dict[str, Any]) -> dist.Distribution | maps.Transform:
    if name in _SAME:
        validate = False if name == "VonMises" else None  # of any number of turns
        return getattr(dist, name)(**arguments, validate_args=validate)
    if name == "MixtureSameFamily":
        parts = arguments["mixture_distribution"], arguments["component_distribution"]
        return dist.MixtureSameFamily(*parts)
    if name == "TransformedDistribution":
        return dist.TransformedDistribution(
            arguments["base_distribution"], arguments["transforms"]
        )
    if name in _TRANSFORMS:
        return _build_transform(name, arguments)
    raise ValueError(f"its base has a {name}, which this version cannot make in NumPyro")


def _build_transform(name: str, arguments: dict[str, Any]) -> maps.Transform:
    event_dim, _ = arguments.pop("event_dim", 0), arguments.pop("cache_size", 0)
    if name == "AffineTransform":
        affine = maps.AffineTransform(arguments["loc"], arguments["scale"])
        return maps.IndependentTransform(affine, event_dim) if event_dim else affine
    if not arguments:
        return getattr(maps, name)()
    raise ValueError(f"its base has a {name} of these arguments: {sorted(arguments)}")


def _build_part(part: object, tensors: Mapping[str, NDArray[Any]]) -> object:
    if isinstance(part, list):
        return [_build_part(p, below(f"{i}.", tensors)) for i, p in enumerate(part)]
    return build_base(part, tensors) if isinstance(part, dict) else part
