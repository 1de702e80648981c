r"""The flow as a NumPyro distribution: a learned prior or likelihood for ``numpyro.sample``.

In the chain base, flow, bijection of the support, a log-density is one solve, and so are a draw
and its log-density together. Frozen weights are no leaves, so that ``scan`` and ``vmap`` stack
nothing but contexts and what the base is made of.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax
from jax.typing import ArrayLike
from numpy.typing import NDArray
from numpyro.distributions.batch_util import promote_batch_shape
from numpyro.distributions.transforms import Transform
from numpyro.distributions.util import validate_sample
from numpyro.util import not_jax_tracer

from .._package import names_of, order_of
from .bases import base_log_prob, in_batch
from .flow import to_white
from .frozen import Weights
from .given import given_value
from .supports import OnEvents, backward, bijection, in_own_type, per_event, text_of
from .transforms import InterpolantTransform

__all__ = [
    "ConditionalInterpolantDistribution",
    "InterpolantDistribution",
    "JointInterpolantDistribution",
]

_Shape = tuple[int, ...]


class InterpolantDistribution(dist.TransformedDistribution):
    r"""A distribution learned by a stochastic interpolant; made by ``load``.

    As :class:`pyro_interpolant.InterpolantDistribution`, to which it is equal.

    Args:
        base_distribution: The distribution of what the first transform takes, event shape
            ``(D,)``.
        transforms: Those from the base to the support, an :class:`InterpolantTransform` among
            them.
    """

    @property
    def transform(self) -> InterpolantTransform:
        """The flow."""
        return self.transforms[_place(self.transforms)]

    @validate_sample
    def log_prob(self, value: Array, intermediates: Sequence[Any] | None = None) -> Array:
        """Return the log-density, shape ``(*)``, of values of shape ``(*, *event_shape)``.

        Beyond the support and at infinity it is ``-inf``; with validation on, for NaN too.

        Args:
            value: Values; those just drawn may come with their intermediates.
            intermediates: What ``sample_with_intermediates`` gave beside the values, or None.

        Raises:
            ValueError: If the last dimensions are not the event's.
        """
        shape, event = jnp.shape(value), len(self.event_shape)
        if len(shape) < event or shape[len(shape) - event :] != self.event_shape:
            hint = " For N scalars pass shape (N, 1): x[..., None]."
            raise ValueError(
                f"expected a value of shape (*, {', '.join(map(str, self.event_shape))}), got "
                f"{shape}.{hint if self.event_shape == (1,) else ''}"
            )
        batch = lax.broadcast_shapes(shape[: len(shape) - event], self.batch_shape)
        if 0 in batch:  # on which NumPyro's own methods fail
            return jnp.zeros(batch, jnp.result_type(value, self.transform.weights["loc"]))
        if intermediates:
            return super().log_prob(value, intermediates)
        x, finite = value, jnp.ones((), bool)
        log_det: Array | float = 0.0
        for transform in reversed(self.transforms):
            if isinstance(transform, InterpolantTransform):
                x, finite = _finite(x, transform.weights, finite)
            x, term = backward(transform, x)
            log_det = log_det + per_event(term, jnp.shape(x)[:-1])
        log_prob = base_log_prob(self.base_dist, x) - log_det
        unknown = jnp.isnan(value).any(tuple(range(len(shape) - event, len(shape))))
        return jnp.where(finite, log_prob, jnp.where(unknown, jnp.nan, -jnp.inf))

    def _validate_sample(self, value: Array) -> Any:
        return super()._validate_sample(value) if jnp.size(value) else True

    def rsample_and_log_prob(
        self, key: Array, sample_shape: tuple[int, ...] = ()
    ) -> tuple[Array, Array]:
        """Return samples, ``(*sample_shape, *batch, *event)``, and log-densities, in one solve."""
        value, intermediates = self.sample_with_intermediates(key, sample_shape)
        return value, self.log_prob(value, intermediates)

    def at(self, t: float) -> "InterpolantDistribution":
        """Return the distribution at time t: the base at 0, the model at 1.

        Args:
            t: A time in [0, 1].

        Raises:
            ValueError: If t is outside [0, 1].
        """
        transforms, place = list(self.transforms), _place(self.transforms)
        transforms[place] = self.transform.at(t)
        return InterpolantDistribution(
            self.base_dist, transforms, validate_args=self.__dict__.get("_validate_args")
        )

    @classmethod
    def infer_shapes(cls, *args: object, **kwargs: object) -> NoReturn:
        """Raise an error: no argument is an array, the flow has the shapes."""
        raise NotImplementedError(f"{cls.__name__} has its shapes from a flow, not from arguments")

    def __repr__(self) -> str:
        """Name the event, the batch and the support."""
        return (
            f"{type(self).__name__}(event_shape={self.event_shape}, "
            f"batch_shape={self.batch_shape}, support={self.support})"
        )


def _place(transforms: Sequence[Transform]) -> int:
    """Return the index of the flow, the last :class:`InterpolantTransform`.

    A base that is a flow puts its own in front.
    """
    flows = [isinstance(t, InterpolantTransform) for t in transforms]
    return len(flows) - 1 - flows[::-1].index(True)


def _finite(x: Array, weights: Weights, before: Array) -> tuple[Array, Array]:
    """Return rows, ``(*, D)``, with loc for those that are not finite, and which are, ``(*)``.

    A row far away may be infinite in the flow's coordinates alone.
    """
    finite = jnp.isfinite(to_white(weights, x)).all(-1)
    return jnp.where(finite[..., None], x, weights["loc"]), finite & before


@promote_batch_shape.register
def _(distribution: InterpolantDistribution) -> InterpolantDistribution:
    """Take the batch shape that ``scan`` has given to the base and to contexts."""
    new = copy.copy(distribution)
    new.base_dist = promote_batch_shape(distribution.base_dist)
    own = distribution.transform.batch_shape
    new._batch_shape = jnp.broadcast_shapes(new.base_dist.batch_shape, own)
    return new


class ConditionalInterpolantDistribution:
    r"""A learned conditional distribution :math:`\rho_1(x | c)`; made by ``load``.

    Args:
        base_distribution: As in :class:`InterpolantDistribution`.
        transforms: As in :class:`InterpolantDistribution`.
        sites: As in :class:`JointInterpolantDistribution`, or nothing.
        context_columns: The names of the columns of contexts in the order of the flow, or nothing.
    """

    context_columns: tuple[str, ...] = ()  # older pickles have none

    def __init__(
        self,
        base_distribution: dist.Distribution,
        transforms: Sequence[Transform],
        *,
        sites: Sequence[tuple[str, Sequence[int], Any]] = (),
        context_columns: Sequence[str] = (),
    ) -> None:
        self.base_dist, self.transforms = base_distribution, list(transforms)
        self._sites, self.context_columns = json.dumps(list(sites)), tuple(context_columns)

    def condition(self, context: ArrayLike | Sequence[Any]) -> InterpolantDistribution:
        """Return the distribution given a context of shape ``(*, C)``: batch shape ``(*)``.

        Of named sites it is a :class:`JointInterpolantDistribution`. Contexts of a flow of classes
        are labels, whole numbers of shape ``(*)``. The columns of a data frame, or of a row of
        it, are taken by name.

        Raises:
            TypeError: If they are whole numbers, and no labels.
            ValueError: If the last dimension is not the velocity's C, or the columns of a data
                frame have other names than those that the flow was trained on.
        """
        if hasattr(context, "to_numpy"):
            context = self._by_name(context)
        transforms = list(self.transforms)
        place = _place(transforms)
        flow = transforms[place].condition(context)
        batch = jnp.broadcast_shapes(self.base_dist.batch_shape, flow.batch_shape)
        # Contexts and base have all dimensions of the batch: see in_batch.
        transforms[place] = flow.in_front(len(batch) - len(flow.batch_shape))
        base = in_batch(self.base_dist, batch)
        sites = json.loads(self._sites)
        if sites:
            return JointInterpolantDistribution(base, transforms, sites=sites)
        return InterpolantDistribution(base, transforms)

    def _by_name(self, frame: Any) -> NDArray[Any]:
        """Return the contexts in a data frame, or in a row of it: labels of shape ``(N,)``."""
        columns, values = self.context_columns, np.asarray(frame.to_numpy())
        order = order_of(names_of(frame, columns), columns, "context")
        values = values if order is None else values[..., order]
        are_labels = "velocity.classes" in self.transforms[_place(self.transforms)].weights
        return values[:, 0] if are_labels and values.shape[1:] == (1,) else values


jax.tree_util.register_pytree_node(
    ConditionalInterpolantDistribution,
    lambda d: ((d.base_dist, d.transforms), (d._sites, d.context_columns)),
    lambda names, parts: ConditionalInterpolantDistribution(
        *parts, sites=json.loads(names[0]), context_columns=names[1]
    ),
)


class JointInterpolantDistribution(InterpolantDistribution):
    r"""A learned joint distribution of named sites; made by ``load``.

    The event is the packed vector :math:`(b_1^{-1}(s_1), \dots, b_k^{-1}(s_k))` of all sites,
    unconstrained by the bijections of their supports.

    Args:
        base_distribution: As in :class:`InterpolantDistribution`.
        transforms: As in :class:`InterpolantDistribution`.
        sites: Of each site its name, shape and support as a file describes it.

    Raises:
        ValueError: If the packed size of the sites is not the flow's dimension.
    """

    pytree_aux_fields = ("_sites",)

    def __init__(
        self,
        base_distribution: dist.Distribution,
        transforms: list[Transform],
        *,
        sites: Sequence[tuple[str, Sequence[int], Any]],
        validate_args: bool | None = None,
    ) -> None:
        super().__init__(base_distribution, transforms, validate_args=validate_args)
        self._sites = json.dumps(list(sites))
        size = sum(math.prod(real) for _, _, real, *_ in self._parts())
        if size != self.transform.event_dim:
            raise ValueError(
                f"expected a flow of dimension {size}, got {self.transform.event_dim}"
            )

    @property
    def sites(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the sites by name, in the order of packing."""
        return {name: tuple(shape) for name, shape, _ in json.loads(self._sites)}

    def _parts(self) -> Iterator[tuple[str, _Shape, _Shape, Transform, OnEvents]]:
        """Yield of each site its name, shape, unconstrained shape, bijection and support."""
        for name, shape, support in json.loads(self._sites):
            transform = bijection(support)
            real = tuple(transform.inverse_shape(tuple(shape)))
            yield name, tuple(shape), real, transform, OnEvents(text_of(support))

    def sample_sites(self, name: str) -> dict[str, Array]:
        """Sample all sites inside a NumPyro model: one latent site, and named deterministic ones.

        Args:
            name: The name of the latent site that holds the packed vector, shape ``(D,)``.

        Returns:
            The sites by name, each of its own shape, with the batch of the packed vector in front.
            ``do``, ``condition`` and draws given to ``Predictive`` by these names replace values,
            such draws where they have none of the packed vector. None of them changes a density,
            nor what other sites are: to condition on a part of them, learn the others given it.
            Inside ``scan``, ``cond`` and ``block`` these names are not seen from outside: give
            values of the packed vector.

        Raises:
            ValueError: If the packed vector has no value, and there is no key to draw it with.
        """
        try:
            packed, sites = numpyro.sample(name, self), {}
        except AssertionError as error:
            if numpyro.prng_key() is not None:  # a key is not what was missing
                raise
            raise ValueError(
                f"expected values of {name!r}, the packed vector of the sites {list(self.sites)}, "
                "or a random key: as log_likelihood has none, give it what mcmc.get_samples() "
                f"gives, or beside draws of all sites {name!r}: joint.pack(draws)"
            ) from error
        for k, value in self.unpack(packed).items():
            given = given_value(k, name)
            sites[k] = numpyro.deterministic(k, value if given is None else given)
        return sites

    def sample_dict(self, key: Array, sample_shape: tuple[int, ...] = ()) -> dict[str, Array]:
        """Return draws by name, each on its support, ``(*sample_shape, *batch, *site_shape)``."""
        return self.unpack(self.sample(key, sample_shape))

    def unpack(self, packed: Array) -> dict[str, Array]:
        """Return the sites, each ``(*, *site_shape)``, of packed vectors, shape ``(*, D)``.

        Raises:
            ValueError: If they are of another size.
        """
        size, found = self.transform.event_dim, jnp.shape(packed)
        if found[-1:] != (size,):
            raise ValueError(f"expected packed vectors of shape (*, {size}), got {found}")
        sites, start = {}, 0
        for name, _, real, transform, _ in self._parts():
            part = packed[..., start : start + math.prod(real)]
            start += math.prod(real)
            sites[name] = in_own_type(transform, part.reshape(*part.shape[:-1], *real))
        return sites

    def pack(self, draws: Mapping[str, ArrayLike]) -> Array:
        """Return packed vectors, shape ``(*, D)``, of sites, each ``(*, *site_shape)``.

        Raises:
            ValueError: If a site is missing, of another shape or batch, or, where values are
                known, outside its support.
        """
        parts = {}
        for name, shape, real, transform, support in self._parts():
            value = jnp.asarray(draws[name]) if name in draws else None
            batch = -1 if value is None else value.ndim - len(shape)
            if value is None or batch < 0 or value.shape[batch:] != shape:
                got = "none" if value is None else f"shape {value.shape}"
                raise ValueError(
                    f"expected site {name!r} of shape (*, {', '.join(map(str, shape))}), got {got}"
                )
            packed = transform.inv(value).reshape(*value.shape[:batch], math.prod(real))
            # Some inverses are finite beside the support, as that of rows that do not sum to one.
            inside = support(value if shape else value[..., None]).all()
            inside = inside & jnp.isfinite(packed).all()
            if not_jax_tracer(inside) and not inside:
                raise ValueError(f"expected site {name!r} strictly inside its support")
            parts[name] = packed
        batches = {name: part.shape[:-1] for name, part in parts.items()}
        if len(set(batches.values())) > 1:
            raise ValueError(f"expected draws of every site in one batch shape, got {batches}")
        return jnp.concatenate(list(parts.values()), -1)
