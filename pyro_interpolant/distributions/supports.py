r"""Supports: from a flow on real vectors x to a density on the values y that a constraint allows.

There are two. A bijective image of real vectors, :math:`y = b(x)`, such as positive numbers or a
simplex, has density :math:`\rho(x)\,|\det \partial x / \partial y|`. The torus is no such image:
a flow of period :math:`2\pi` runs on the real line, whole turns included, and its end is wrapped,
:math:`y = x \bmod 2\pi`.
"""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to

from .._torch import is_functional, is_tracing
from ..interpolants.linear import Interpolant
from ..interpolants.nonlinear import Geodesic, wrap
from ..nn.mlp import VelocityMLP
from ..nn.torus import TorusMLP
from ..nn.velocity import embedded, evaluate, may_be_periodic
from ..transforms.bijections import Cached, PerEvent
from ..transforms.flow import Flow
from ..transforms.gaussianize import without_gaussianizer
from .base_support import stated_support
from .bases import (
    Planar,
    UniformTorus,
    base_log_prob,
    directions,
    has_density,
    in_planes,
)
from .constraints import (
    Circular,
    Constraint,
    Shaped,
    bijection,
    check_parts,
    circular,
    is_all_real,
    of_events,
)
from .rounding import are_close
from .rows import counted

_RAYLEIGH_RMS = 2**0.5  # the root mean square of a Rayleigh distance
_PERIOD_ROWS = 64  # on which the period of a velocity is checked


class Support(ABC):
    """The set that values live in, and its map from real vectors.

    Args:
        constraint: The constraint.
    """

    def __init__(self, constraint: Constraint) -> None:
        self.constraint = constraint

    def event_constraint(self) -> Constraint:
        """Return the constraint with one boolean per event, which Pyro checks values with."""
        return self.constraint

    @abstractmethod
    def unconstrained(self, value: Tensor) -> Tensor:
        """Return values, shape ``(*, *event_shape)``, as real vectors, shape ``(*, D)``.

        Raises:
            ValueError: If a value is outside the support, or on its edge, which maps to infinity.
        """

    def event_shape(self, size: int) -> torch.Size:
        """Return the shape of an event that has ``size`` unconstrained coordinates."""
        return torch.Size((size,))

    def size(self, event_shape: torch.Size) -> int:
        """Return the number of unconstrained coordinates of an event of a shape."""
        return event_shape[-1]

    @abstractmethod
    def transforms(self, flow: Flow) -> list[Transform]:
        """Return the transforms from the end of a flow to the support.

        Raises:
            ValueError: If the flow is not one for this support.
        """

    @property
    @abstractmethod
    def onto(self) -> Transform:
        """The map from real vectors to the support, which remembers no pairs."""

    def within_bounds(self, value: Tensor) -> Tensor | None:
        """Return which events, shape ``(*)``, are within bounds that the bijection would clamp to.

        Args:
            value: Values, shape ``(*, *event_shape)``.

        Returns:
            One boolean an event, or None where there are no such bounds.
        """
        return None

    def is_real(self) -> bool:
        """Return whether values are real vectors themselves."""
        return False

    def default_base(self, flow: Flow) -> TorchDistributionMixin | None:
        """Return the base of a flow without one of its own; None for N(0, I)."""
        return None

    def checked_base(self, flow: Flow, base: TorchDistributionMixin) -> TorchDistributionMixin:
        """Return a base that was given to a flow, or raise a ValueError: here any will do."""
        return base

    def new_velocity(self, size: int, context_dim: int = 0, classes: int = 0) -> VelocityMLP:
        """Return an untrained network for ``size`` unconstrained coordinates."""
        return VelocityMLP(size, None, context_dim, classes)

    def default_path(self) -> Interpolant | None:
        """Return the one path that a flow on this support can have; None for any."""
        return None

    @abstractmethod
    def check_rows(self, flow: Flow, rows: Tensor, context: Tensor | None) -> None:
        """Raise a ValueError unless a flow can be trained on unconstrained rows.

        Args:
            flow: The flow.
            rows: Rows, shape ``(N, D)``.
            context: Their contexts, shape ``(N, C)``, or None.
        """

    # Samplers explore the base; on the torus, in a plane for each angle, which has no seam.

    def sampled_base(self, base: TorchDistributionMixin) -> TorchDistributionMixin:
        """Return the base as a proper density on real vectors, for samplers."""
        return base

    def from_sampled(self, z: Tensor) -> Tensor:
        """Return the base draws, ``(*, D)``, of what :meth:`sampled_base` samples."""
        return z

    def to_sampled(self, x: Tensor) -> Tensor:
        """Return a typical point of :meth:`sampled_base` for base draws, shape ``(*, D)``."""
        return x

    def beside_base(self, z: Tensor) -> Tensor | float:
        """Return the log-density, ``(*)``, of what :meth:`sampled_base` has beside base draws."""
        return 0.0


class BijectiveSupport(Support):
    r"""A bijective image :math:`y = b(x)` of real vectors, perhaps behind a Gaussianizing map.

    Args:
        constraint: A constraint with a bijection in Pyro's registry.

    Raises:
        TypeError: If it is not a constraint.
        ValueError: If it has no such bijection.
    """

    def __init__(self, constraint: Constraint) -> None:
        super().__init__(constraint)
        self.bijection = bijection(constraint)
        self.on_events = OnEvents(constraint, self.bijection.codomain.event_dim)

    def is_real(self) -> bool:
        """Return whether values are real vectors themselves."""
        return is_all_real(self.constraint) and self.constraint.event_dim <= 1

    def event_constraint(self) -> Constraint:
        """Return the constraint with one boolean per event."""
        return constraints.real_vector if self.is_real() else self.on_events

    def unconstrained(self, value: Tensor) -> Tensor:
        """Return values, shape ``(*, *event_shape)``, as real vectors, shape ``(*, D)``.

        Raises:
            ValueError: If a value is outside the support, or on its edge, which maps to infinity.
        """
        if self.is_real():
            return value
        inside = self.strictly_inside(value)
        if bool(inside.all()):
            real = self.bijection.inv(value)
            inside = torch.isfinite(real).all(-1)
            if bool(inside.all()):  # bounds of another type do not make it one of values
                return real.to(value.dtype) if value.is_floating_point() else real
        outside = f"of {inside.numel()} rows outside it or on its edge"
        raise ValueError(
            f"expected values strictly inside the support {self.constraint}, got "
            f"{counted(~inside.reshape(-1), outside)}: remove them, or choose the support that "
            "the data have"
        )

    def strictly_inside(self, value: Tensor) -> Tensor:
        """Return which events, shape ``(*)``, of values are inside the support, off its edge.

        Args:
            value: Values, shape ``(*, *event_shape)``.
        """
        batch = value.shape[: value.dim() - self.on_events.event_dim]
        if 0 in batch:  # which torch's checks cannot take
            return torch.ones(batch, dtype=torch.bool, device=value.device)
        off_the_edge = _within_bounds(self.constraint, value, operator.gt)
        batch_dim = off_the_edge.dim() - self.on_events.event_dim
        return self.on_events.check(value) & of_events(off_the_edge, batch_dim)

    def within_bounds(self, value: Tensor) -> Tensor | None:
        """Return which events, shape ``(*)``, of values are within bounds or on them.

        Args:
            value: Values, shape ``(*, *event_shape)``.
        """
        if self.is_real():
            return None
        within = _within_bounds(self.constraint, value, operator.ge)
        return of_events(within, within.dim() - self.on_events.event_dim)  # perhaps of bounds

    def event_shape(self, size: int) -> torch.Size:
        """Return the shape of an event that has ``size`` unconstrained coordinates."""
        shape = torch.Size(self.bijection.forward_shape(torch.Size((size,))))
        return shape[len(shape) - self.on_events.event_dim :]  # without the batch of bounds

    def size(self, event_shape: torch.Size) -> int:
        """Return the number of unconstrained coordinates of an event of a shape."""
        return self.bijection.inverse_shape(event_shape)[-1]

    def transforms(self, flow: Flow) -> list[Transform]:
        """Return the bijection, unless values are real vectors.

        Raises:
            ValueError: If the support has not the flow's number of unconstrained dimensions.
        """
        if self.is_real():
            return []
        try:
            y = self.bijection(torch.zeros_like(flow.loc))
            size = self.size(y.shape[y.dim() - self.on_events.event_dim :])
        except (RuntimeError, ValueError, AssertionError, IndexError):
            size = 0
        if size != flow.event_dim:
            raise ValueError(
                f"expected a support of {flow.event_dim} unconstrained dimensions, the flow's, "
                f"got {self.constraint}"
            )
        return [Cached(self.bijection)]

    @property
    def onto(self) -> Transform:
        """The bijection, its log-determinant one number an event."""
        return PerEvent(self.bijection)

    def check_rows(self, flow: Flow, rows: Tensor, context: Tensor | None) -> None:
        """Raise a ValueError for a path on the torus; rows of shape ``(N, D)`` may be any."""
        if isinstance(flow.interpolant, Geodesic):
            raise ValueError(
                f"expected support=circular for the interpolant {type(flow.interpolant).__name__},"
                f" got support={self.constraint}"
            )


class CircularSupport(Support):
    r"""Angles in :math:`[-\pi, \pi]`, where :math:`-\pi` and :math:`\pi` are one point.

    A velocity of period :math:`2\pi` in every coordinate moves real vectors so that whole turns
    stay whole turns: solved on the real line, without a seam, it is a flow on the torus. Where the
    base has period :math:`2\pi` too, so has the density.
    """

    def __init__(self) -> None:
        super().__init__(circular)

    def unconstrained(self, value: Tensor) -> Tensor:
        """Return angles, shape ``(*, D)``, as they are.

        Raises:
            ValueError: If one is out of range.
        """
        inside = circular.check(value)
        if bool(inside.all()):
            return value
        raise ValueError(
            f"expected angles in [-pi, pi], in radians, got {int((~inside).sum())} of "
            f"{inside.numel()} rows outside: take whole turns off, "
            "torch.remainder(x + torch.pi, 2 * torch.pi) - torch.pi"
        )

    def transforms(self, flow: Flow) -> list[Transform]:
        """Return the map that subtracts whole turns.

        Raises:
            ValueError: If the flow is not one on the torus.
        """
        if not isinstance(flow.interpolant, Geodesic):
            raise ValueError(
                "expected the interpolant Geodesic() for angles, got "
                f"{type(flow.interpolant).__name__}"
            )
        if not may_be_periodic(flow.velocity):
            raise ValueError(
                "expected a velocity of period 2 pi in every angle, such as TorusMLP, got "
                f"{type(flow.velocity).__name__}"
            )
        if not flow.whitening.is_identity():
            raise ValueError(
                "expected no whitening map for angles, whose scale is that of the circle: leave "
                "transform.flow.whitening alone"
            )
        return [Cached(self.onto)]

    @property
    def onto(self) -> Transform:
        """The map that subtracts whole turns."""
        return _Wrap()

    def default_base(self, flow: Flow) -> UniformTorus:
        """Return the uniform base: there is no normal one."""
        return UniformTorus(flow.event_dim, validate_args=False).to(flow.loc)

    def checked_base(self, flow: Flow, base: TorchDistributionMixin) -> TorchDistributionMixin:
        r"""Return a base, or raise a ValueError unless its density has period :math:`2\pi`.

        Paths back to it end any number of turns away from its draws.

        Args:
            flow: The flow.
            base: The base.
        """
        no_density = not has_density(base) or is_tracing() or is_functional()
        if no_density or isinstance(stated_support(base), Circular):
            return base
        x = torch.linspace(-3, 3, _PERIOD_ROWS).to(flow.loc)
        x = x.reshape(-1, *[1] * len(base.batch_shape), 1).expand(*base.shape((_PERIOD_ROWS,)))
        here, there = (base_log_prob(base, s) for s in (x, x + 2 * torch.pi))
        if not are_close(here, there, rtol=1e-3):
            raise ValueError(
                "expected a base with a density of period 2 pi in every angle, such as VonMises, "
                f"or None for the uniform one, got {base}, whose draws would not have the density "
                "of the flow"
            )
        return base

    def new_velocity(self, size: int, context_dim: int = 0, classes: int = 0) -> VelocityMLP:
        """Return an untrained network for ``size`` angles."""
        return TorusMLP(size, None, context_dim, classes)

    def default_path(self) -> Interpolant | None:
        """Return the path along geodesics."""
        return Geodesic()

    def check_rows(self, flow: Flow, rows: Tensor, context: Tensor | None) -> None:
        r"""Raise a ValueError unless the velocity has period :math:`2\pi` at rows.

        Args:
            flow: The flow.
            rows: Angles, shape ``(N, D)``.
            context: Their contexts, shape ``(N, C)``, or None.
        """
        x = rows[:_PERIOD_ROWS].to(flow.loc)
        c = None if context is None else context[:_PERIOD_ROWS].to(flow.loc)
        c = embedded(flow.velocity, c)
        t = torch.linspace(0.1, 0.9, len(x)).to(x)
        turns = 2 * torch.pi * torch.arange(1, flow.event_dim + 1).to(x)
        with torch.no_grad():
            here, there = (evaluate(flow.velocity, t, s, c) for s in (x, x + turns))
        far = float((here - there).abs().max())
        if far > 1e-3 * (1 + float(here.abs().max())):
            raise ValueError(
                "expected a velocity of period 2 pi in every angle, such as TorusMLP, got "
                f"{type(flow.velocity).__name__}, which differs by {far:.3g} whole turns away: "
                "feed it with cosines and sines"
            )

    def sampled_base(self, base: TorchDistributionMixin) -> Planar:
        """Return the base in a plane for each angle."""
        return Planar(base)

    def from_sampled(self, z: Tensor) -> Tensor:
        """Return the angles, ``(*, D)``, of points of the planes, ``(*, 2 D)``."""
        return directions(z)

    def to_sampled(self, x: Tensor) -> Tensor:
        """Return points of the planes, ``(*, 2 D)``, for angles, ``(*, D)``."""
        return in_planes(x, _RAYLEIGH_RMS)

    def beside_base(self, z: Tensor) -> Tensor:
        """Return the log-density, ``(*)``, of the distances of points, ``(*, 2 D)``, from 0."""
        return -0.5 * z.square().sum(-1)


def support_of(constraint: Constraint) -> Support:
    """Return the support of a constraint.

    Raises:
        TypeError: If it is not a constraint.
        ValueError: If it is no bijective image of real vectors, nor :data:`circular`.
    """
    return CircularSupport() if isinstance(constraint, Circular) else BijectiveSupport(constraint)


class OnEvents(Constraint):
    """A support as a constraint on whole events: one boolean for each.

    Pyro's own do not serve. The codomain of a composed bijection is that of its last, element-wise
    part, and some constraints check single elements although their event has a dimension.

    Args:
        support: The support.
        event_dim: The number of dimensions of an event, of its bijection.
    """

    def __init__(self, support: Constraint, event_dim: int) -> None:
        self.inner = support
        shaped = isinstance(without_gaussianizer(support), Shaped)  # so scalars, of dimension 0
        self.event_dim = event_dim if shaped else max(1, event_dim)
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return which events, ``(*)``, of values, ``(*, *event_shape)``, are on the support."""
        within = _within_bounds(self.inner, value, operator.ge)
        value = value.expand(within.shape)  # whose batch may be that of bounds
        inside = check_parts(without_gaussianizer(self.inner), value)
        return of_events(inside, value.dim() - self.event_dim)

    def __repr__(self) -> str:
        """Name the support."""
        return repr(self.inner)


@biject_to.register(OnEvents)
def _(constraint: OnEvents) -> Transform:
    return Cached(bijection(constraint.inner))


@transform_to.register(OnEvents)
def _(constraint: OnEvents) -> Transform:
    return transform_to(constraint.inner)


class _Wrap(Transform):
    """Map real vectors, shape ``(*, D)``, to angles in [-pi, pi); its volume factor is 1."""

    domain = constraints.real_vector
    codomain = circular
    bijective = True  # of the torus: real vectors that differ by whole turns are one point there

    def _call(self, x: Tensor) -> Tensor:
        return wrap(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return wrap(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return zeros, shape ``(*)``, for vectors of shape ``(*, D)``."""
        return x.new_zeros(x.shape[:-1])


def _within_bounds(
    support: Constraint, value: Tensor, above: Callable[[Any, Any], Tensor]
) -> Tensor:
    """Return which elements are above the lower bound and below the upper, to which maps clamp.

    Args:
        support: The support.
        value: Values, shape ``(*, *event_shape)``.
        above: ``>``, or ``>=`` to allow for the bounds themselves.
    """
    if isinstance(support, Shaped):
        flat = value.flatten(-support.event_dim) if support.event_dim else value[..., None]
        inside = _within_bounds(support.base_constraint, flat, above)
        return inside.reshape(inside.shape[:-1] + support.shape)
    inner = getattr(support, "base_constraint", None)
    if inner is not None:
        return _within_bounds(inner, value, above)
    if isinstance(support, (constraints.stack, constraints.cat)):
        lengths = getattr(support, "lengths", [1] * len(support.cseq))
        parts = zip(support.cseq, value.split(lengths, support.dim), strict=True)
        return torch.cat([_within_bounds(c, v, above) for c, v in parts], support.dim)
    inside = torch.ones_like(value, dtype=torch.bool)
    lower, upper = (getattr(support, f"{side}_bound", None) for side in ("lower", "upper"))
    lower, upper = (b.to(value) if isinstance(b, Tensor) else b for b in (lower, upper))
    if isinstance(support, type(constraints.simplex)):
        lower = 0.0
    if lower is not None:
        inside = inside & above(value, lower)
    return inside if upper is None else inside & above(upper, value)
