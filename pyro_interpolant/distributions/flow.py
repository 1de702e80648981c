r"""What distributions are made of, conditional or not: a base, a flow and a support.

Values y live on the support, real vectors u in the flow's coordinates; between them may be real
vectors x in front of a Gaussianizing map.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from numpy.typing import ArrayLike
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Transform

from ..solvers.divergence import NoDensity
from ..transforms.bijections import identity
from ..transforms.gaussianize import Gaussianized, without_gaussianizer
from ..transforms.interpolant import ConditionalInterpolantTransform, InterpolantTransform
from .base_support import has_bounds, stated_support
from .bases import (
    Samples,
    WhitenedBase,
    check_expansion,
    check_is_base,
    check_single,
    copy_like,
    has_density,
    standard_normal,
)
from .constraints import Circular, Constraint, Sites
from .report import Report
from .rows import checked_context, checked_rows, columns_in_order, is_frame, names_of
from .supports import Support, support_of

if TYPE_CHECKING:
    from typing_extensions import Self

AnyTransform = InterpolantTransform | ConditionalInterpolantTransform
Values = TypeVar("Values", bound=ArrayLike)


class FlowDistribution:
    """The parts of a distribution, conditional or not: a base, a flow and a support.

    Attributes:
        transform: The flow.
        base: The base in data coordinates, or None for N(0, I) in whitened ones.
        constraint: The support as a constraint.
        space: The support.
        report: What training measured, or None before.
        columns: The names of the columns of a data frame that it was trained on, or nothing.
        context_columns: The same of contexts, where it takes them.
        sites: The sites of a joint distribution, by name in the order of packing, or None.
        refined_for: The context, shape ``(C,)``, for which alone it was trained in later rounds,
            or None for all.
    """

    transform: AnyTransform
    base: TorchDistributionMixin | None
    constraint: Constraint
    space: Support
    report: Report | None = None
    columns: tuple[str, ...] = ()
    context_columns: tuple[str, ...] = ()
    sites: Sites | None = None
    refined_for: Tensor | None = None
    clear_cache: Callable[[], None]
    _transform_kind: type[AnyTransform]

    def _set_parts(
        self, transform: AnyTransform, base: TorchDistributionMixin | None, constraint: Constraint
    ) -> None:
        if not isinstance(transform, self._transform_kind):
            raise TypeError(
                f"expected transform to be of class {self._transform_kind.__name__}, got "
                f"{type(transform).__name__}: use ConditionalInterpolantDistribution for "
                "conditional transforms, InterpolantDistribution for all others"
            )
        self.transform = transform
        self.constraint, self.space = constraint, support_of(constraint)
        self.base = self._given_base(base)

    def _check_event_shape(self, given: Sequence[int] | None) -> None:
        """Raise a ValueError if events have another shape than they were to have."""
        if given is not None and tuple(given) != self.row_shape:
            raise ValueError(
                f"expected event_shape={tuple(self.row_shape)}, that of a flow of "
                f"{self.transform.flow.event_dim} dimensions on {self.constraint}, got "
                f"{tuple(given)}"
            )

    def _given_base(self, base: TorchDistributionMixin | None) -> TorchDistributionMixin | None:
        """Return what is to be the base: where none is given, that of the support."""
        flow = self.transform.flow
        if base is None:
            return self.space.default_base(flow)
        check_is_base(base, flow.loc)
        if getattr(self.transform, "raw_context", None) is not None:
            return base  # checked with the family that this is a member of, which is often called
        return self.space.checked_base(flow, base)

    def _flow_base(self) -> TorchDistributionMixin:
        """Return the distribution of the flow's input, of event shape ``(D,)``."""
        return standard_normal(self.transform.flow.loc) if self.base is None else self.base

    @abstractmethod
    def _set_chain(self) -> None:
        """Set the attributes by which Pyro knows the parts: ``base_dist`` and ``transforms``."""

    def set_base(self, base: TorchDistributionMixin | None) -> None:
        """Replace the base by another of event shape ``(D,)`` in data coordinates.

        Raises:
            TypeError: If it is not a distribution that Pyro can sample.
            ValueError: If it has another event shape, a batch that does not expand to the present
                one, or, of angles, no period of 2 pi.
        """
        found, batch = self._given_base(base), getattr(self, "batch_shape", None)
        if found is not None and batch is not None:
            check_expansion(found.batch_shape, batch)
        self.base = found
        self._set_chain()

    def set_base_samples(self, samples: ArrayLike) -> None:
        """Start from a copy of samples, shape ``(M, D)`` in data coordinates, from now on.

        Raises:
            ValueError: If they are of another shape, or there is a base with a density.
        """
        if not isinstance(self.base, Samples | None):
            raise ValueError(
                "expected base_samples or a base, got both: this distribution starts from a "
                f"{type(self.base).__name__}, which training draws from"
            )
        flow = self.transform.flow
        samples = checked_rows(samples, "base_samples", (flow.event_dim,))
        self.set_base(Samples(samples.to(flow.loc, copy=True)))

    def check_start(self) -> None:
        """Raise a ValueError if a path from the data, as a mirror's, has none to start from."""
        interpolant = self.transform.flow.interpolant
        if self.base is None and interpolant.starts_from_data():
            raise ValueError(
                f"expected samples to start from: the base of {type(interpolant).__name__} is the "
                "data, which this flow was not fitted to. Fit it, pass a base, or give sample_sde "
                "rows x"
            )

    def check_single_base(self, *, rows: bool = False) -> None:
        """Raise a ValueError if the base has a batch, each member of which would need rows.

        Args:
            rows: Whether rows are drawn from it, and so a batch of one is one too many.
        """
        check_single(self.base, rows=rows)

    def has_density(self) -> bool:
        """Return whether there is a log_prob: not of what is guided, nor where the base has none.

        None have samples alone, and distributions of whole numbers or on a simplex.
        """
        own, base = not isinstance(self.transform.divergence, NoDensity), self.base
        if isinstance(base, FlowDistribution) and not base.has_density():
            return False
        return own and (base is None or has_density(base))

    def has_bounded_base(self) -> bool:
        """Return whether its base, or the base of that, has bounds, as far as it says; angles not.

        Beyond them there is no density.
        """
        base = self.base
        if isinstance(base, FlowDistribution) and base.has_bounded_base():
            return True
        is_circle = base is not None and isinstance(stated_support(base), Circular)
        return base is not None and not is_circle and has_bounds(base)

    def white_base(self) -> WhitenedBase:
        """Return the base in whitened coordinates, those of the velocity."""
        return WhitenedBase(self.base, self.transform.flow.whitening)

    @property
    def row_shape(self) -> torch.Size:
        """The shape of an event, of a conditional flow too."""
        return self.space.event_shape(self.transform.flow.event_dim)

    @property
    def ungaussianized_space(self) -> Support:
        """The support without a Gaussianizing map."""
        return support_of(without_gaussianizer(self.constraint))

    @property
    def gaussianizer(self) -> Transform:
        """The map from the flow's coordinates to unconstrained ones: the identity without one."""
        given = self.constraint
        return given.gaussianizer if isinstance(given, Gaussianized) else identity

    def unconstrained(self, value: Tensor) -> Tensor:
        """Return values, shape ``(*, *event_shape)``, as real vectors, shape ``(*, D)``.

        Raises:
            ValueError: If a value is outside the support.
        """
        return self.ungaussianized_space.unconstrained(value)

    def value_of(self, value: Values) -> Values | Tensor:
        """Return values, and those of a data frame as a tensor, its columns taken by name.

        Args:
            value: Values, shape ``(*, *event_shape)``, or a data frame of them.

        Raises:
            TypeError: If columns of a data frame are no numbers.
            ValueError: If they have other names than those that the flow was trained on.
        """
        if not is_frame(value):
            return value
        rows = columns_in_order(value, self.columns, "value")
        if names_of(value) and self.row_shape == () and rows.shape[1:] == (1,):
            rows = rows[:, 0]  # a frame is always a table of rows
        return rows.to(self.transform.flow.loc) if rows.is_floating_point() else rows

    def context_of(self, context: Values) -> Values | Tensor:
        """Return contexts, and those of a data frame as a tensor, its columns taken by name.

        Args:
            context: Contexts, shape ``(*, C)``, or a data frame of them.

        Raises:
            TypeError: If columns of a data frame are no numbers, or whole ones without classes.
            ValueError: If there are others than the flow was trained on.
        """
        if not is_frame(context):
            return context
        flow, dtype = self.transform.flow, self.transform.flow.loc.dtype
        rows = columns_in_order(context, self.context_columns, "context")
        if rows.shape == (flow.context_dim,) != (1,) and not flow.classes:  # one row of a frame
            return checked_context(rows[None], flow.context_dim, 0, dtype)[0].to(flow.loc)
        return checked_context(rows, flow.context_dim, flow.classes, dtype).to(flow.loc)

    def to_flow(self, value: Tensor) -> Tensor:
        """Return values as real vectors in the flow's coordinates, behind a map if there is one.

        Raises:
            ValueError: If a value is outside the support.
        """
        return self.space.unconstrained(value)

    def from_flow(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Return values of real vectors in the flow's coordinates, back from :meth:`to_flow`.

        Args:
            u: Real vectors, shape ``(*, D)``.

        Returns:
            Values, shape ``(*, *event_shape)``, and ``log |dy/du|``, shape ``(*)``.
        """
        y = self.space.onto(u)
        return y, self.space.onto.log_abs_det_jacobian(u, y)

    def freeze(self) -> "Self":
        """Fix all weights, so that no inference trains them, and return self."""
        self.transform.eval()
        self.transform.flow.requires_grad_(requires_grad=False).eval()  # of a view, no part of it
        if isinstance(self.base, FlowDistribution):
            self.base.freeze()
        self.clear_cache()
        return self

    def to(self, *args: Any, **kwargs: Any) -> "Self":
        """Convert weights, buffers and base to a type or device, in place; return self.

        The base is replaced by a converted copy, for others may start from it, too: one that is
        trained is from then on ``self.base``.

        Raises:
            ValueError: If a copy would cut the base off from a tensor that requires a gradient.
        """
        like = self.transform.flow.loc.new_empty(1, 1, 1, 1).to(*args, **kwargs)
        base = copy_like(self.base, like)  # first, for it may refuse
        self.transform.to(*args, **kwargs)
        if base is not None:
            self.set_base(base)
        self.clear_cache()
        return self
