r"""The flow as a Pyro distribution: a learned prior or likelihood for ``pyro.sample``.

With :math:`x_t` the path through x, :math:`\dot x_t = v_t(x_t)`, the density is
:math:`\log\rho_1(x) = \log\rho_0(x_0) - \int_0^1 \nabla\cdot v_t(x_t)\,dt`, in the chain base,
transform, bijection of the support. Given a context c, a conditional flow has the density
:math:`\rho_1(x | c)`.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from numpy.typing import ArrayLike
from pyro.distributions.conditional import ConditionalTransformedDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import ComposeTransform, Transform, constraints

from .._torch import (
    has_other_leaves,
    is_compiling,
    is_functional,
    is_tracing,
    with_gradients,
)
from ..transforms.bijections import Whiten
from ..transforms.interpolant import (
    ConditionalInterpolantTransform,
    InterpolantTransform,
    broadcast_batch,
)
from .bases import base_log_prob, check_expansion, only_possible
from .constraints import Constraint, shaped
from .flow import FlowDistribution
from .rows import check_same_order, check_value, checked_rows
from .summaries import Summaries, pushed

if TYPE_CHECKING:
    from typing_extensions import Self

_Given = TypeVar("_Given", bound="InterpolantDistribution")


class InterpolantDistribution(Summaries):
    r"""A distribution learned by a stochastic interpolant.

    .. math:: \log\rho_1(x) = \log\rho_0(x_0) - \int_0^1 \nabla\cdot v_t(x_t)\, dt, \qquad
              \dot x_t = v_t(x_t), \quad x_1 = x.

    ``x ~ InterpolantDistribution(transform)`` has event shape ``(D,)``, or that of the support.

    Args:
        transform: The flow.
        base: What the flow starts from, a Pyro distribution of event shape ``(D,)`` in data
            coordinates (under a support: in its unconstrained space), fixed. By default
            :math:`N(0, I)` in whitened coordinates, which is :math:`N(\mathrm{loc}, L L^T)` in
            data coordinates and follows the flow's type and device.
        support: Where the data live: any Pyro constraint with a bijection from real vectors; or
            :data:`circular`, angles, where the base must have period :math:`2\pi` and is
            :class:`UniformTorus` by default.
        event_shape: The shape of an event, where it has more than one dimension, of the size that
            the support needs; elements in row-major order.

    Raises:
        TypeError: If ``transform`` or ``base`` is of the wrong kind.
        ValueError: If the base has another event shape, the support has no bijection, or the flow
            is not one on the torus where the support is :data:`circular`.

    References:
        Albergo & Vanden-Eijnden, ICLR 2023, arXiv 2209.15571.

    Example:
        >>> prior = InterpolantDistribution(interpolant_transform(2, hidden_dims=(32, 32)))
        >>> x = prior.sample((10,))
        >>> prior.log_prob(x).shape
        torch.Size([10])
    """

    transform: InterpolantTransform
    _transform_kind = InterpolantTransform
    has_rsample = True  # a plain attribute: handlers such as pyro.poutine.broadcast set it

    def __init__(
        self,
        transform: InterpolantTransform,
        base: TorchDistributionMixin | None = None,
        *,
        support: Constraint = constraints.real_vector,
        event_shape: Sequence[int] | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self._set_parts(transform, base, shaped(support, event_shape))
        super().__init__(self._flow_base(), self._chain(), validate_args=validate_args)
        self._check_event_shape(event_shape)
        self.has_rsample = self.base_dist.has_rsample

    def _chain(self) -> list[Transform]:
        """Return the transforms from the base to the support."""
        flow = self.transform.flow
        first = [] if self.base is None else [Whiten(flow.whitening)]
        return [*first, self.transform, *self.space.transforms(flow)]

    def _set_chain(self) -> None:
        self.base_dist = self._flow_base().expand(self.base_dist.batch_shape)
        self.transforms = self._chain()
        self.has_rsample = self.base_dist.has_rsample
        self.clear_cache()

    @constraints.dependent_property(is_discrete=False)  # which Pyro may ask the class for
    def support(self) -> Constraint:
        """The support of one event."""
        return self.space.event_constraint()

    @property
    def base_dist(self) -> TorchDistributionMixin:
        """The distribution of the flow's input, in the type and on the device of the flow."""
        base = self.__dict__["base_dist"]
        if self.base is None:  # made anew: the flow's type may change, also inside torch.func
            return self._flow_base().expand(base.batch_shape)
        return base

    @base_dist.setter
    def base_dist(self, value: TorchDistributionMixin) -> None:
        self.__dict__["base_dist"] = value

    def expand(self, batch_shape: Sequence[int], _instance: "Self | None" = None) -> "Self":
        """Return the distribution with another batch shape; weights and cache are shared.

        Raises:
            TypeError: If it is no sequence of whole numbers.
            ValueError: If the batch shape does not expand to it.
        """
        check_expansion(self.batch_shape, batch_shape)
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new.__dict__.update(
            {k: v for k, v in self.__dict__.items() if k not in ("base_dist", "_batch_shape")}
        )
        return super().expand(torch.Size(batch_shape), _instance=new)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, shape ``(*)``, of values of shape ``(*, *event_shape)``.

        It is ``-inf`` at infinity, where whitened values leave the range of their type, and, with
        validation off, beyond the bounds of the support. Angles may then have any number of turns,
        as those of Pyro's ``VonMises``. The columns of a data frame are taken by name.

        Raises:
            TypeError: If the value is neither a tensor nor a data frame.
            ValueError: If the shape or the type does not match, a value is outside the support
                (while validation is on), or a path from the data has none to start from.
        """
        self.check_start()
        value = self.value_of(value)
        check_value(value, self.event_shape, self.transform.flow.loc.dtype)
        self.transform.check_type(value)  # first: a bijection may take other types
        given = value.shape[: value.dim() - len(self.event_shape)]
        batch = broadcast_batch(given, self.batch_shape)
        if 0 in batch:  # which neither torch's checks nor its sums can take
            return (0 * value.sum()).expand(batch)
        if self._validate_args:
            self._validate_sample(value)
        possible = self.space.within_bounds(value)
        x = value
        log_det: Tensor | float = 0.0
        chain: list[Any] = self.transforms
        for transform in reversed(chain):
            if transform is self.transform:
                x, possible = self._finite(x, possible)
            x, term = transform.inverse_and_log_det(x)
            log_det = log_det + term
        base = self.base_dist
        log_base = base.log_prob(x) if self.base is None else base_log_prob(base, x)
        log_prob = log_base - log_det
        if self.batch_shape:  # otherwise a tracer may leave the batch of values open
            log_prob = log_prob.expand(batch)
        if possible is None:
            return log_prob
        return only_possible(log_prob, possible, value, len(self.event_shape))

    def _finite(self, x: Tensor, possible: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Replace values of density zero by ``loc``, and return which have a density.

        Args:
            x: Unconstrained values, shape ``(*, D)``.
            possible: Which are within bounds, shape ``(*)``, or None for all.

        Returns:
            The values, and which can be, shape ``(*)``, or None for all.
        """
        with torch.no_grad():  # a value far away may be infinite in the flow's coordinates alone
            finite = self.transform.flow.whitening.to_white(x).isfinite().all(-1)
        possible = finite if possible is None else finite & possible
        if is_tracing() and not is_compiling():  # a guide's own draws, which the cache must know
            return x, possible
        if not is_functional() and not is_compiling() and bool(possible.all()):
            return x, None
        return x.where(possible[..., None], self.transform.flow.loc.to(x)), possible

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return samples, ``(*sample_shape, *batch, *event)``; of many scalars by their quantiles.

        Those are read off a spline, see :meth:`icdf`; :meth:`rsample` solves for each.

        Raises:
            ValueError: If a path from the data has none to start from.
        """
        self.check_start()
        if self.base is not None or self.transform.flow.event_dim > 1:
            return super().sample(sample_shape)
        with torch.no_grad():
            return pushed(self, self.base_dist.sample(sample_shape))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return samples that have gradients, shape ``(*sample_shape, *batch, *event)``.

        Raises:
            NotImplementedError: If draws of the base have none.
            ValueError: If a path from the data has none to start from.
        """
        self.check_start()
        try:
            return super().rsample(sample_shape)
        except NotImplementedError as error:
            if self.base_dist.has_rsample:
                raise  # of a network, or of a device that lacks an operation
            raise NotImplementedError(
                f"draws of the base, {type(self.base).__name__}, have no gradient: take sample()"
            ) from error

    def rsample_and_log_prob(self, sample_shape: Sequence[int] = ()) -> tuple[Tensor, Tensor]:
        """Return samples, ``(*sample_shape, *batch, *event)``, and log-densities, in one solve."""
        x = self.rsample(torch.Size(sample_shape))
        return x, self.log_prob(x)

    def white_draws(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return draws of the base in whitened coordinates, ``(*sample_shape, *batch, D)``.

        Raises:
            ValueError: If a path from the data has none to start from.
        """
        self.check_start()
        white = self.white_base()
        if self.base is None:
            return white.sample((*sample_shape, *self.batch_shape))
        with torch.no_grad():
            return white.to_white(self.base_dist.sample(torch.Size(sample_shape)))

    def score(self, x: Tensor) -> Tensor:
        r"""Return :math:`\nabla_x \log\rho_1(x)`, exact for this solver, ``(*, *event_shape)``.

        It can be differentiated itself, in x, weights and context, while gradients are enabled,
        and under :mod:`torch.func`.

        Args:
            x: Values, shape ``(*, *event_shape)``, broadcast with the batch shape: each member of
                the batch has its own score.

        Raises:
            TypeError: As :meth:`log_prob`.
            ValueError: As :meth:`log_prob`.
        """
        x = self.value_of(x)
        check_value(x, self.event_shape, self.transform.flow.loc.dtype)
        self.transform.check_type(x)
        batch = x.shape[: max(0, x.dim() - len(self.event_shape))]
        shape = broadcast_batch(batch, self.batch_shape) + x.shape[len(batch) :]
        enabled = torch.is_grad_enabled()
        density = self if enabled else self._as_function()
        if is_functional():
            return torch.func.grad(lambda value: density.log_prob(value).sum())(x.expand(shape))
        with with_gradients():
            value = x.expand(shape).clone()
            if not value.requires_grad:
                value.requires_grad_()
            total = density.log_prob(value).sum()
            graph = enabled and (x.requires_grad or has_other_leaves(total, value))
            return torch.autograd.grad(total, value, create_graph=graph)[0]

    def _as_function(self) -> "InterpolantDistribution":
        """Return the distribution at the solver's own nodes, also while gradients are enabled."""
        same = self.at(self.transform.end)
        same.transform.trains_weights, same._validate_args = False, self._validate_args
        if isinstance(self.base, InterpolantDistribution):
            same.set_base(self.base._as_function())
        return same

    def transport(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        r"""Return where the flow carries points of one's own, all in data coordinates.

        The path that starts at x ends at the result; the base has the density ``at(0)``, that of
        :math:`N(\mathrm{loc}, L L^T)` by default. (``transform(w)`` takes whitened draws
        :math:`w \sim N(0, I)` instead, :math:`x = \mathrm{loc} + L w`.)

        Args:
            x: Points of the base, shape ``(*, D)``; under a support, in its unconstrained space.
                With ``inverse``, data, shape ``(*, *event_shape)``.
            inverse: Whether to go from the data to the base instead.

        Returns:
            Data, shape ``(*, *event_shape)``, or, with ``inverse``, points of the base.

        Raises:
            ValueError: If the shape or the type does not match, or data are outside the support.

        Example:
            >>> prior = InterpolantDistribution(interpolant_transform(2))
            >>> x = torch.randn(5, 2)
            >>> y = prior.transport(x)
            >>> bool(torch.allclose(prior.transport(y, inverse=True), x, atol=1e-5))
            True
        """
        first = [] if self.base is not None else [Whiten(self.transform.flow.whitening)]
        chain, flow = ComposeTransform([*first, *self.transforms]), self.transform.flow
        x = self.value_of(x)
        check_value(x, self.event_shape if inverse else (flow.event_dim,), flow.loc.dtype)
        if not inverse:
            return chain(self.gaussianizer.inv(x))
        self.to_flow(x)  # raises for data outside the support
        return self.gaussianizer(chain.inv(x))

    def at(self, t: float) -> "InterpolantDistribution":
        """Return the distribution at time t: the base at 0, the model at 1.

        Args:
            t: A time in [0, 1].

        Raises:
            ValueError: If t is outside [0, 1].
        """
        new = InterpolantDistribution(self.transform.at(t), self.base, support=self.constraint)
        new.columns, new._validate_args = self.columns, self._validate_args
        return new.expand(self.batch_shape)

    def without_support(self) -> "InterpolantDistribution":
        """Return the distribution of the flow's own coordinates: real vectors."""
        is_checked = self._validate_args
        return InterpolantDistribution(self.transform, self.base, validate_args=is_checked)

    def given(self, context: Tensor | None) -> "InterpolantDistribution":
        """Return the distribution itself, which takes no context.

        Args:
            context: None; a conditional flow takes one of shape ``(*, C)``.

        Raises:
            ValueError: If there is a context.
        """
        if context is not None:
            raise ValueError("expected no context: this distribution takes none")
        return self

    def __repr__(self) -> str:
        """Name the event, the batch and the support."""
        return (
            f"{type(self).__name__}(event_shape={tuple(self.event_shape)}, "
            f"batch_shape={tuple(self.batch_shape)}, support={self.constraint})"
        )


class ConditionalInterpolantDistribution(FlowDistribution, ConditionalTransformedDistribution):
    r"""A learned conditional distribution :math:`\rho_1(x | c)`, by a velocity :math:`v_t(x | c)`.

    ``condition(context)`` gives an ordinary one.

    Args:
        transform: The conditional flow.
        base: As in :class:`InterpolantDistribution`.
        support: As in :class:`InterpolantDistribution`.
        event_shape: As in :class:`InterpolantDistribution`.

    Raises:
        TypeError: If ``transform`` or ``base`` is of the wrong kind.
        ValueError: If the base has another event shape, or the support has no bijection.

    Example:
        >>> flow = conditional_interpolant_transform(2, context_dim=3, hidden_dims=(32, 32))
        >>> likelihood = ConditionalInterpolantDistribution(flow)
        >>> likelihood.condition(torch.randn(10, 3)).sample().shape
        torch.Size([10, 2])
    """

    transform: ConditionalInterpolantTransform
    _transform_kind = ConditionalInterpolantTransform

    def __init__(
        self,
        transform: ConditionalInterpolantTransform,
        base: TorchDistributionMixin | None = None,
        *,
        support: Constraint = constraints.real_vector,
        event_shape: Sequence[int] | None = None,
    ) -> None:
        self._set_parts(transform, base, shaped(support, event_shape))
        self.space.transforms(transform.flow)  # raises if the flow is not one for this support
        self._check_event_shape(event_shape)
        self._set_chain()

    def _set_chain(self) -> None:
        super().__init__(self._flow_base(), [self.transform])

    def condition(self, context: Tensor) -> InterpolantDistribution:
        """Return the distribution given a context of shape ``(*, C)``: batch shape ``(*)``.

        Where the velocity has ``classes`` it may be labels, whole numbers of shape ``(*)``. The
        columns of a data frame of contexts are taken by name.

        Raises:
            TypeError: If it is neither a tensor nor a data frame, or whole numbers of shape
                ``(C,)`` where the velocity has no ``classes``.
            ValueError: If the last dimension is not the velocity's ``context_dim``, or a label is
                none of the classes.
        """
        return self._given(context)

    def _given(self, context: Tensor) -> InterpolantDistribution:
        """Return the distribution given a context, as :meth:`condition`, without a warning."""
        return self._conditioned(context, InterpolantDistribution)

    def _conditioned(self, context: Tensor, kind: Callable[..., _Given]) -> _Given:
        """Return the distribution given a context, of its batch shape, and of that of parts.

        Args:
            context: The context, shape ``(*, C)``.
            kind: From a transform, a base and a support to the distribution.
        """
        context = self.context_of(context)
        transform = self.transform.condition(context)
        new = kind(transform, self.base, support=self.constraint)
        new.columns = self.columns
        # The flow has dropped leading ones of the batch, and bounds and a base may have their own.
        labels = self.transform.flow.classes and not context.is_floating_point()
        own = context.shape if labels else context.shape[:-1]
        batch = broadcast_batch(own, new.batch_shape)
        return new if batch == new.batch_shape else new.expand(batch)

    def given(self, context: Tensor | None) -> InterpolantDistribution:
        """Return the distribution given a context of shape ``(*, C)``, as :meth:`condition`.

        For training and checks, which go through many: it never warns.

        Raises:
            ValueError: If there is none.
        """
        if context is None:
            raise ValueError("expected a context for a conditional flow, got none")
        return self._given(context)

    def without_support(self) -> "ConditionalInterpolantDistribution":
        """Return the distribution of the flow's own coordinates: real vectors."""
        new = ConditionalInterpolantDistribution(self.transform, self.base)
        new.context_columns = self.context_columns
        return new


AnyDistribution = InterpolantDistribution | ConditionalInterpolantDistribution


def check_has_context(distribution: object) -> None:
    """Raise a TypeError unless it is one density: not a conditional one without its context."""
    if not isinstance(distribution, InterpolantDistribution):
        raise TypeError(
            f"expected an InterpolantDistribution, got {type(distribution).__name__}: a "
            "conditional one gives it by .condition(context)"
        )


def rows_given(
    distribution: AnyDistribution, x: ArrayLike, context: Tensor | None
) -> tuple[InterpolantDistribution, Tensor]:
    """Return a distribution given contexts, and rows that its density can be asked for.

    Args:
        distribution: The distribution, conditional or not.
        x: Rows, shape ``(N, *event_shape)``; the columns of a data frame are taken by name.
        context: Their contexts, shape ``(N, C)``, or one, or None.

    Returns:
        The distribution, of no batch or one of 1 or N, and the rows, detached.

    Raises:
        TypeError: If rows are no array of a floating type.
        ValueError: If rows are of another shape or type or not finite, there are none, or another
            number than of contexts.
    """
    check_same_order(x=x, context=context)
    view = distribution.given(context)
    rows = checked_rows(view.value_of(x), "x", view.row_shape)
    view.transform.check_type(rows)
    batch = tuple(view.batch_shape)
    if batch not in ((), (1,), (len(rows),)):
        raise ValueError(
            f"expected one density for all of {len(rows):,} rows, or one for each, got a batch of "
            f"shape {batch}: pass as many contexts as rows"
        )
    return view, rows
