r"""The joint density of named sites: a posterior that becomes the next model's prior.

With :math:`b_i` the bijection to the support of site i, the flow learns the packed vector
:math:`x = (b_1^{-1}(s_1), \dots, b_k^{-1}(s_k))` of all sites, on real vectors.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, cast

import pyro
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import InferDict, Message
from torch import Tensor
from torch.distributions import constraints

from .._torch import is_functional, is_tracing, warn_user
from ..nn.velocity import is_beyond
from ..transforms.bijections import biject
from ..transforms.gaussianize import without_gaussianizer
from ..transforms.interpolant import ConditionalInterpolantTransform, InterpolantTransform
from .constraints import Constraint, Shaped, Sites, bijection, real_shape
from .flow import FlowDistribution, Values
from .interpolant import (
    AnyDistribution,
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
)
from .rows import (
    RowsLike,
    as_tensor,
    check_value,
    checked_rows,
    flat_names,
    in_order,
    is_frame,
    named_columns,
)
from .supports import BijectiveSupport, CircularSupport, support_of

# Among what "infer" holds: what a packed site shares with the sites that are its parts, which
# handlers may rename; and that with the name that each has in the distribution.
PACKED, PART = "_interpolant_packed", "_interpolant_part"


class NamedSites(FlowDistribution):
    """A distribution of packed vectors, and the sites that they are made of.

    Attributes:
        sites: For each site its event shape and its support, in the order of packing.
    """

    sites: dict[str, tuple[torch.Size, Constraint]]

    def _set_sites(
        self, sites: Mapping[str, tuple[Sequence[int], Constraint]], event_dim: int
    ) -> None:
        self.sites = {k: (torch.Size(shape), support) for k, (shape, support) in sites.items()}
        size = sum(real_shape(*site).numel() for site in self.sites.values())
        if size != event_dim:
            raise ValueError(f"expected a flow of dimension {size}, got {event_dim}")

    def unpack(self, packed: Tensor) -> dict[str, Tensor]:
        """Return the sites, each ``(*, *site_shape)``, of packed vectors, shape ``(*, D)``.

        Raises:
            TypeError: If they are not a tensor.
            ValueError: If they are of another size.
        """
        found = unpack(self.sites, packed)
        if not packed.is_floating_point():
            return found
        return {name: value.to(packed.dtype) for name, value in found.items()}  # finer bounds

    def pack(self, draws: Mapping[str, ArrayLike]) -> Tensor:
        """Return packed vectors, shape ``(*, D)``, of sites, each ``(*, *site_shape)``.

        Raises:
            ValueError: If a site is missing, of another shape, or outside its support.
        """
        return pack(self.sites, draws)

    def _named(self) -> str:
        """Return the sites, with their shapes and supports."""
        sites = ", ".join(
            f"{name}: {tuple(shape)} on {support}" for name, (shape, support) in self.sites.items()
        )
        return f"sites={{{sites}}}"


class JointInterpolantDistribution(NamedSites, InterpolantDistribution):
    r"""A learned joint distribution of named sites, each with its own shape and support.

    The event is the packed vector :math:`(b_1^{-1}(s_1), \dots, b_k^{-1}(s_k))` of all sites,
    unconstrained by the bijections of their supports. In a model,
    :meth:`sample_sites` draws it and gives the sites back under their names; everywhere else it is
    an :class:`InterpolantDistribution`. :meth:`sample_dict` draws the sites by name, outside of
    models. :func:`~pyro_interpolant.from_samples` makes one from a dictionary of draws.

    Args:
        transform: The flow over packed vectors.
        base: As in :class:`InterpolantDistribution`.
        sites: For each site its event shape and its support, in the order of packing.
        support: All real vectors, or a Gaussianized support of them.

    Raises:
        ValueError: If the packed size of the sites is not the flow's dimension, or a support has
            events of another shape than its site.
    """

    def __init__(
        self,
        transform: InterpolantTransform,
        base: TorchDistributionMixin | None = None,
        *,
        sites: Mapping[str, tuple[Sequence[int], Constraint]],
        support: Constraint = constraints.real_vector,
        validate_args: bool | None = None,
    ) -> None:
        self._set_sites(sites, transform.flow.event_dim)
        super().__init__(transform, base, support=support, validate_args=validate_args)

    def sample_sites(
        self, name: str, *, plates: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Sample all sites inside a Pyro model, as one latent site and named deterministic values.

        Args:
            name: The name of the latent site that holds the packed vector, shape ``(D,)``.
            plates: For sites to be used inside plates that are entered afterwards, how many of
                their first dimensions these are: ``{"theta": 1}`` of shape ``(8,)`` in
                ``pyro.plate("groups", 8)``. They take the place of as many dimensions of the
                packed vector's batch, which is ``(P, 1)`` of P vectorised particles.

        Returns:
            The sites by name, each of its own shape, with the batch of the packed vector in front:
            what ``pyro.deterministic`` returns, so that ``do``, ``condition`` and draws given to
            ``Predictive`` by these names replace values. None of them changes a density, nor what
            other sites are: to condition on a part of them, learn the others given it,
            ``from_samples(others, context=part)``.

        Raises:
            ValueError: If plates are given of a site that is not there, more than it has
                dimensions, or the packed vector is in plates that would have to make room.
        """
        plates = self._checked_plates({} if plates is None else plates)
        mark = object()
        found = {}
        for site, packed in self.unpack(sample_in_place(name, self, {PACKED: mark})).items():
            inner, within = len(self.sites[site][0]), plates.get(site, 0)
            # As pyro.deterministic does it. Whole: no plate is there.
            own: Any = {"_deterministic": True, PART: (mark, site)}
            fn = dist.Delta(packed, event_dim=inner).mask(mask=False)
            value = pyro.sample(site, fn, obs=packed, infer=own)
            batch = value.shape[: value.dim() - inner]
            # Values that Predictive gives may have the plates' places already.
            kept = batch[: max(0, packed.dim() - inner - within)]
            if math.prod(kept) != math.prod(batch):
                raise ValueError(
                    f"expected sample_sites outside of the {within} plates of site {site!r}, got "
                    f"a packed vector of batch shape {tuple(batch)}: call it before they begin"
                )
            found[site] = value.reshape(kept + value.shape[len(batch) :])
        return found

    def _checked_plates(self, plates: Mapping[str, int]) -> Mapping[str, int]:
        """Return how many dimensions of sites are plates, or raise a ValueError."""
        for site, count in plates.items():
            most = len(self.sites[site][0]) if site in self.sites else -1
            if not 0 <= count <= most:
                raise ValueError(
                    f"expected plates of sites among {self._named()}, at most as many as each has "
                    f"dimensions, got {dict(plates)}"
                )
        return plates

    def value_of(self, value: Values) -> Values:
        """Return packed vectors, shape ``(*, D)``, as they are.

        Raises:
            TypeError: If they are sites by name: a dictionary or a data frame.
        """
        if isinstance(value, Mapping) or is_frame(value):
            raise TypeError(
                "expected packed vectors, whose density it is, got sites by name: "
                "log_prob(joint.pack(draws)), of a dictionary of them"
            )
        return value

    def sample_dict(self, sample_shape: Sequence[int] = ()) -> dict[str, Tensor]:
        """Return draws by name, each on its support, ``(*sample_shape, *batch, *site_shape)``."""
        return self.unpack(self.sample(torch.Size(sample_shape)))

    def __repr__(self) -> str:
        """Name the sites, with their shapes and supports, and the batch."""
        return f"{type(self).__name__}({self._named()}, batch_shape={tuple(self.batch_shape)})"


class ConditionalJointInterpolantDistribution(NamedSites, ConditionalInterpolantDistribution):
    r"""A learned joint distribution of named sites given a context c.

    ``condition(context)`` gives a :class:`JointInterpolantDistribution`.
    :func:`~pyro_interpolant.from_samples` makes one from a dictionary of draws and their contexts.

    Args:
        transform: The conditional flow over packed vectors.
        base: As in :class:`InterpolantDistribution`.
        sites: As in :class:`JointInterpolantDistribution`.
        support: As in :class:`JointInterpolantDistribution`.

    Raises:
        ValueError: If the packed size of the sites is not the flow's dimension, or a support has
            events of another shape than its site.
    """

    def __init__(
        self,
        transform: ConditionalInterpolantTransform,
        base: TorchDistributionMixin | None = None,
        *,
        sites: Mapping[str, tuple[Sequence[int], Constraint]],
        support: Constraint = constraints.real_vector,
    ) -> None:
        self._set_sites(sites, transform.flow.event_dim)
        super().__init__(transform, base, support=support)

    def condition(self, context: Tensor) -> JointInterpolantDistribution:
        """Return the joint distribution given a context of shape ``(*, C)``: batch shape ``(*)``.

        Raises:
            ValueError: If the last dimension is not the velocity's ``context_dim``.

        Warns:
            UserWarning: If it is a posterior, and data lie beyond all simulations that it was
                trained on, or it was trained in rounds for others.
        """
        context = self.context_of(context)
        self._warn_if_untrained_for(context)
        return self._given(context)

    def _given(self, context: Tensor) -> JointInterpolantDistribution:
        return self._conditioned(context, partial(JointInterpolantDistribution, sites=self.sites))

    def _warn_if_untrained_for(self, context: Tensor) -> None:
        """Warn where training has not seen the like of contexts, ``(*, C)``."""
        if is_tracing() or is_functional():  # which have no values
            return
        beyond = is_beyond(self.transform.velocity, context)
        if beyond is not None and bool(beyond.any()):
            several = f"{int(beyond.sum())} of {beyond.numel()} data sets"
            warn_user(
                f"{several if beyond.numel() > 1 else 'the data'} lie beyond all simulations that "
                "the posterior was trained on, and it takes them for nearer ones: it is not "
                "theirs. Check their units, or train on simulations of a wider prior"
            )
        self.warn_if_refined_for_others(context)

    def warn_if_refined_for_others(self, context: Tensor) -> None:
        """Warn where contexts, ``(*, C)``, are not the one that rounds of training were for."""
        known = self.refined_for  # numbers of any units: each is compared in its own
        if known is not None and not torch.allclose(context, known.to(context), atol=0.0):
            warn_user(
                "the posterior was trained in rounds for other data, and on a prior truncated to "
                "theirs: train the guide by fit_guide for these, or a copy of it in rounds"
            )

    def __repr__(self) -> str:
        """Name the sites, with their shapes and supports."""
        return f"{type(self).__name__}({self._named()})"


def sample_in_place(name: str, fn: TorchDistributionMixin, infer: dict[str, object]) -> Tensor:
    """Sample a site of a Pyro model, with its batch where its plates are.

    ``Predictive`` in parallel pads draws by the greatest number of plates of the model less the
    number of dimensions of the draw, those of its event among them: S draws of a vector outside of
    plates come as ``(S, D)``, where the site of a model with one plate is ``(S, 1, D)``.

    Args:
        name: The name of the site.
        fn: Its distribution.
        infer: What Pyro keeps with the site.

    Returns:
        The value, shape ``(*batch_shape, *event_shape)`` of the site if only dimensions of size
        one were elsewhere, else as it comes.
    """
    with _InPlace():
        # Pyro's type names the keys of its own alone.
        return pyro.sample(name, fn, infer=cast("InferDict", infer))


class _InPlace(Messenger):
    """Give a value the shape of its site, where they differ in dimensions of size one alone."""

    def _pyro_post_sample(self, msg: Message) -> None:
        value, fn = msg["value"], msg["fn"]
        if isinstance(value, Tensor) and isinstance(fn, TorchDistributionMixin):
            shape = fn.shape()
            if value.shape != shape and _sizes(value.shape) == _sizes(shape):
                msg["value"] = value.reshape(shape)


def _sizes(shape: Sequence[int]) -> list[int]:
    """Return the sizes that are not one."""
    return [size for size in shape if size != 1]


def sites_of(
    draws: Mapping[str, ArrayLike], supports: object
) -> dict[str, tuple[torch.Size, Constraint]]:
    """Return the shape and support of each site of named draws, each ``(N, *site_shape)``.

    Raises:
        TypeError: If the draws of a site are not a floating tensor, or the supports not a
            dictionary.
        ValueError: If there are no sites, sites of different lengths, non-finite draws, a support
            of a site that is not there, one without a bijection, or one of events of another
            shape.
    """
    if not isinstance(supports, Mapping):
        raise TypeError("expected the supports of named draws as a dictionary, site by site")
    unknown = sorted(set(supports) - set(draws))
    if not draws or unknown:
        raise ValueError(
            f"expected named draws, and supports of sites among {sorted(draws)}, got supports of "
            f"{unknown or 'nothing'}"
        )
    sites, lengths = {}, {}
    for name, value in draws.items():
        rows = as_tensor(value, f"site {name!r}")
        shape = rows.shape[1:]
        lengths[name] = len(checked_rows(rows, f"site {name!r}", shape))
        support = supports.get(name, constraints.real)
        try:
            bijection(support)
            real_shape(shape, support)
        except (TypeError, ValueError) as error:
            raise type(error)(f"site {name!r}: {error}") from error
        sites[name] = (torch.Size(shape), support)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"expected as many draws of every site, got {lengths}")
    return sites


def pack(sites: Sites, draws: Mapping[str, ArrayLike]) -> Tensor:
    """Return packed unconstrained vectors, shape ``(*, D)``, of sites, each ``(*, *site_shape)``.

    Raises:
        ValueError: If a site is missing, of another shape or batch, or outside its support.
    """
    parts = []
    for name, (shape, support) in sites.items():
        value = as_tensor(draws[name]) if name in draws else None
        batch = 0 if value is None else value.dim() - len(shape)
        if value is None or batch < 0 or value.shape[batch:] != shape:
            got = "none" if value is None else f"shape {tuple(value.shape)}"
            raise ValueError(
                f"expected site {name!r} of shape (*, {', '.join(map(str, shape))}), got {got}"
            )
        try:
            of_events = value if shape else value[..., None]
            real = BijectiveSupport(support).unconstrained(of_events)
        except ValueError as error:
            raise ValueError(f"site {name!r}: {error}") from error
        parts.append(real.reshape(*value.shape[:batch], -1))
    batches = {name: tuple(part.shape[:-1]) for name, part in zip(sites, parts, strict=True)}
    if len(set(batches.values())) > 1:
        raise ValueError(f"expected draws of every site in one batch shape, got {batches}")
    return torch.cat(parts, dim=-1)


def unpack(sites: Sites, packed: Tensor) -> dict[str, Tensor]:
    """Return the sites, each ``(*, *site_shape)``, of packed vectors, shape ``(*, D)``.

    Raises:
        TypeError: If they are not a tensor.
        ValueError: If they are of another size.
    """
    return {name: biject(sites[name][1])(real) for name, real in split(sites, packed).items()}


def log_det_of_sites(sites: Sites, packed: Tensor) -> Tensor:
    """Return the log-determinant of :func:`unpack` at packed vectors, ``(*, D)``, shape ``(*)``.

    Raises:
        TypeError: If they are not a tensor.
        ValueError: If they are of another size.
    """
    total = packed.new_zeros(packed.shape[:-1])
    for name, real in split(sites, packed).items():
        bijection = biject(sites[name][1])
        log_det = bijection.log_abs_det_jacobian(real, bijection(real))
        total = total + log_det.reshape(*total.shape, -1).sum(-1)
    return total


def split(sites: Sites, packed: Tensor) -> dict[str, Tensor]:
    """Return the unconstrained parts, by site, of packed vectors, as :func:`unpack` does."""
    shapes = {name: real_shape(*site) for name, site in sites.items()}
    sizes = [s.numel() for s in shapes.values()]
    check_value(packed, (sum(sizes),), torch.get_default_dtype())
    parts = packed.split(sizes, dim=-1)
    return {
        name: part.reshape(part.shape[:-1] + shape)
        for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }


def rows_by_name(
    x: RowsLike, names: Sequence[str], sites: Sites | None = None, name: str = "data"
) -> RowsLike:
    """Return rows or named draws as they are, but the columns of a data frame by their names.

    Args:
        x: Rows, shape ``(N, *event_shape)``, a data frame, or named draws.
        names: The names of the columns of rows in their order, or none; sites have their own.
        sites: The sites that x is draws of, if it is. The columns of a data frame are values on
            their supports, called ``mu``, or ``mu[0]``, ``mu[1]``, ... of a site of several
            numbers.
        name: What to call x in messages.

    Returns:
        Named draws as given; a data frame of named sites as named draws; other rows as a tensor,
        shape ``(N, *event_shape)``.

    Raises:
        TypeError: As :func:`~pyro_interpolant.distributions.rows.as_tensor`.
        ValueError: If a data frame has columns of other names.
    """
    if isinstance(x, Mapping):
        return x
    rows, found = named_columns(x, name)
    if not found or sites is None:
        return in_order(rows, found, names, name)
    sizes = [shape.numel() for shape, _ in sites.values()]
    parts = in_order(rows, found, site_columns(sites), name).split(sizes, 1)
    return {
        site: part.reshape(len(part), *shape)
        for (site, (shape, _)), part in zip(sites.items(), parts, strict=True)
    }


def names_in_frames(distribution: AnyDistribution) -> tuple[str, ...]:
    """Return the names by which columns of a data frame are taken, in their order, or none."""
    sites = distribution.sites
    return distribution.columns if sites is None else site_columns(sites)


def site_columns(sites: Sites) -> tuple[str, ...]:
    """Return the names of the numbers of all sites, in the order of packing."""
    return flat_names({site: shape.numel() for site, (shape, _) in sites.items()})


def column_names(distribution: AnyDistribution) -> list[str]:
    """Return what to call each unconstrained column."""
    if distribution.sites is None:
        constraint = without_gaussianizer(distribution.constraint)
        if isinstance(constraint, Shaped):
            constraint = constraint.base_constraint
        space = support_of(constraint)
        given = space.is_real() or isinstance(space, CircularSupport)
        kind = "column" if given else "unconstrained column"
        size = distribution.transform.flow.event_dim
        if len(distribution.columns) == size:
            return [f"{kind} {name!r}" for name in distribution.columns]
        return [f"{kind} {i}" for i in range(size)]
    names = []
    for name, (shape, support) in distribution.sites.items():
        size = real_shape(shape, support).numel()
        names += [f"site {name!r}" if size == 1 else f"site {name!r}[{i}]" for i in range(size)]
    return names
