r"""Angles: flows on the flat torus :math:`(\mathbb R / 2\pi\mathbb Z)^D`, where -pi and pi meet.

A velocity of period :math:`2\pi` in every coordinate moves real vectors so that whole turns stay
whole turns: solved on the real line, without a seam, it is a flow on the torus. Where the base has
period :math:`2\pi` too, so has the density.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints
from torch.func import jvp

from .interpolants import Coefficients, Interpolant
from .networks import Modulation, VelocityMLP
from .supports import circular

__all__ = ["Geodesic", "Planar", "TorusMLP", "UniformTorus", "Wrap", "check_torus", "directions",
           "in_planes", "wrap"]  # fmt: skip

_TURN = 2 * math.pi
_HARMONICS = 2  # what VelocityMLP sees of an angle: on von Mises mixtures 1 needs more steps


def wrap(x: Tensor) -> Tensor:
    """Return angles less their whole turns: in [-pi, pi), of the shape of x, with slope 1.

    Example:
        >>> wrap(torch.tensor([3.0, 4.0])).tolist()
        [3.0, -2.2831854820251465]
    """
    x = x - _TURN * torch.round(x / _TURN)
    # Rounding leaves half turns, and what is next to them, on either side.
    return x + _TURN * ((x < -math.pi).to(x) - (x >= math.pi).to(x))


def in_planes(u: Tensor, radius: Tensor | float) -> Tensor:
    """Return points of the plane in the directions u, shape ``(*, D)``, as ``(*, 2 D)``."""
    return torch.cat((radius * u.cos(), radius * u.sin()), dim=-1)


def directions(w: Tensor) -> Tensor:
    """Return the angles, shape ``(*, D)``, of points of the plane, shape ``(*, 2 D)``."""
    x, y = w.chunk(2, dim=-1)
    return torch.atan2(y, torch.where((x == 0) & (y == 0), 1.0, x))  # a finite slope at 0


@dataclass(frozen=True)
class Geodesic(Interpolant):
    r"""The shortest way on the torus, :math:`I_t = x_0 + \beta(t) \, \mathrm{wrap}(x_1 - x_0)`.

    Every coordinate goes the shorter way round, at most :math:`\pi`. The path is not linear, so it
    has no coefficients; it ends at :math:`x_1` or whole turns away from it.

    Args:
        schedule: :math:`\beta`, a function of times of any shape with :math:`\beta(0) = 0` and
            :math:`\beta(1) = 1`. By default t: constant speed.

    References:
        arXiv 2209.15571, Section 2; Chen & Lipman, *Flow matching on general geometries*,
        ICLR 2024, arXiv 2302.03660, Section 3.2.

    Example:
        >>> x_t, dx_t = Geodesic().sample(
        ...     torch.tensor(0.5), torch.tensor([3.0]), torch.tensor([-3.0])
        ... )
        >>> round(float(x_t), 4), round(float(dx_t), 4)
        (3.1416, 0.2832)
    """

    schedule: Callable[[Tensor], Tensor] | None = None

    def coefficients(self, t: Tensor) -> Coefficients:
        """Raise a TypeError, for times of any shape: the path is not linear in its ends."""
        raise TypeError(f"{type(self).__name__} is not linear: it has no coefficients")

    def has_latent(self) -> bool:
        """Return False."""
        return False

    def check_ends(self, dim: int) -> None:
        """Raise a ValueError unless the path, modulo whole turns, joins base and data."""
        ends = self._beta(torch.tensor([0.0, 1.0], dtype=torch.float64))
        if ends.shape != (2,) or not bool(((ends - torch.tensor([0.0, 1.0])).abs() < 1e-6).all()):
            raise ValueError(
                f"expected a schedule that is 0 at t = 0 and 1 at t = 1, got {ends.tolist()}"
            )

    def sample(
        self, t: Tensor, x0: Tensor, x1: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the path, not wrapped, and its time derivative, each of shape ``(*, D)``.

        Args:
            t: Times in [0, 1], broadcastable to ``(*)``.
            x0: Base draws, shape ``(*, D)``: angles, plus any number of turns.
            x1: Data rows, shape ``(*, D)``: angles, plus any number of turns.
            z: Unused: there is no latent term.
        """
        t = t.contiguous()  # forward mode cannot carry stride-0 tangents
        beta, slope = jvp(self._beta, (t,), (torch.ones_like(t),))[:2]
        way = wrap(x1 - x0)
        return x0 + beta[..., None] * way, slope[..., None] * way

    def _beta(self, t: Tensor) -> Tensor:
        return t.clone() if self.schedule is None else self.schedule(t)


class TorusMLP(VelocityMLP):
    r"""A velocity on the torus: :class:`VelocityMLP` fed with cosines and sines of the angles.

    It sees every angle and its double, and has period :math:`2\pi` in every coordinate of x. Its
    exact divergence carries the D tangents forward through all layers in one batch. There is no
    gate: the torus has no far away.

    Args:
        event_dim: D, the number of angles.
        hidden_dims: As in :class:`VelocityMLP`.
        context_dim: C, the size of the last dimension of the context; 0 for none.

    Raises:
        ValueError: If a size is not positive.

    Example:
        >>> velocity = TorusMLP(2, (32, 32))
        >>> flow = InterpolantTransform(velocity, interpolant=Geodesic())
        >>> angles = InterpolantDistribution(flow, UniformTorus(2), support=circular)
        >>> x = angles.sample((10,))
        >>> bool((x.abs() <= torch.pi).all()), angles.log_prob(x).shape
        (True, torch.Size([10]))
    """

    def __init__(
        self, event_dim: int, hidden_dims: Sequence[int] | None = None, context_dim: int = 0
    ) -> None:
        super().__init__(event_dim, hidden_dims, context_dim)
        self.layers[0] = nn.Linear(2 * _HARMONICS * event_dim, self.hidden_dims[0], bias=False)

    def precondition(self, w: Tensor, context: Tensor | None = None) -> None:
        """Set the scale of contexts, shape ``(N, C)``, of angles, ``(N, D)``; there is no gate."""
        super().precondition(w, context)
        self.reach.fill_(math.inf)

    def forward_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity, shape ``(*, D)``, and its exact divergence, shape ``(*)``.

        Args:
            t: Times, broadcastable to ``(*)``.
            x: Angles, shape ``(*, D)``.
            context: Contexts, broadcastable to ``(*, C)``, or None.

        Raises:
            ValueError: If the context is missing, superfluous, or of another size.
        """
        modulation = self._modulation(t, context)
        circles = _circles(x)
        hidden, slopes = self._hidden(circles, modulation)
        by_wave = (_HARMONICS, 2, self.event_dim)  # which multiple, cosine or sine, of which angle
        cos, sin = circles.unflatten(-1, by_wave).unbind(-2)
        k = torch.arange(1, _HARMONICS + 1, device=x.device)[:, None, None]
        turned = k * torch.stack((-sin, cos), dim=-2)  # d circles / d x
        first = self._weights()[0].T.unflatten(0, by_wave)
        into = torch.einsum("...kcd,kcdh->...dh", turned, first)
        velocity = nn.functional.linear(hidden, self.output.weight) + modulation.shifts[-1]
        return velocity, self._deep_trace(slopes, into)

    def _velocity(self, x: Tensor, modulation: Modulation, inverses: Any = None) -> Tensor:
        return self._ungated(_circles(x), modulation)


def _circles(x: Tensor) -> Tensor:
    """Return cosine and sine of angles, then of their multiples, shape ``(*, 2 K D)``."""
    multiples = [k * x for k in range(1, _HARMONICS + 1)]
    return torch.cat([s for kx in multiples for s in (kx.cos(), kx.sin())], dim=-1)


class UniformTorus(dist.TorchDistribution):
    r"""The uniform base on the torus: density :math:`(2\pi)^{-D}` at every real vector.

    Draws are in [-pi, pi). Its density takes angles with any number of turns, as the way back from
    data to base gives them.

    Args:
        event_dim: D, the number of angles.

    Raises:
        ValueError: If ``event_dim`` is below 1.

    Example:
        >>> round(float(UniformTorus(2).log_prob(torch.tensor([0.5, 9.0]))), 4)
        -3.6758
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, event_dim: int, *, validate_args: bool | None = None) -> None:
        if event_dim < 1:
            raise ValueError(f"expected event_dim >= 1, got {event_dim}")
        self.origin = torch.zeros(event_dim)  # tells the type and the device of draws
        super().__init__(torch.Size(), self.origin.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "UniformTorus":
        """Return the base with another batch shape."""
        new = self._get_checked_instance(UniformTorus, _instance)
        new.origin = self.origin
        super(UniformTorus, new).__init__(torch.Size(batch_shape), self.event_shape)
        return new

    def to(self, like: Tensor) -> "UniformTorus":
        """Return the base in the type and on the device of a tensor of any shape."""
        new = self.expand(self.batch_shape)
        new.origin = self.origin.to(like)
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws in [-pi, pi), shape ``(*sample_shape, *batch_shape, D)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        like = self.origin
        return wrap(_TURN * torch.rand(shape, dtype=like.dtype, device=like.device))

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return :math:`-D \log 2\pi`, shape ``(*)``, of real values of shape ``(*, D)``."""
        if self._validate_args:
            self._validate_sample(value)
        batch = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        # Constant, yet a function of the value: whoever asks for its gradient gets zeros.
        flat = (0 * value).sum(-1) - self.event_shape[0] * math.log(_TURN)
        return flat.expand(batch)


class Planar(dist.TorchDistribution):
    r"""A base on the torus as a proper density on real vectors, for samplers that walk there.

    Each angle becomes the direction of a point of the plane at a Rayleigh distance; the vector w
    of these points has density :math:`p(u) \, e^{-|w|^2 / 2}`, normal where p is uniform. A circle
    has no seam there. (On the real line p is improper, and a window tilts what is at its edge.)

    Args:
        base: A distribution of D angles whose density, shape ``(*)``, has period :math:`2\pi`.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector

    def __init__(self, base: Any, *, validate_args: bool | None = None) -> None:
        self.inner, self.has_rsample = base, base.has_rsample
        event_shape = torch.Size((2 * base.event_shape[0],))
        super().__init__(base.batch_shape, event_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Planar":
        """Return the distribution with another batch shape."""
        return Planar(self.inner.expand(torch.Size(batch_shape)))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws without gradient, shape ``(*sample_shape, *batch_shape, 2 D)``."""
        with torch.no_grad():
            return self._at_random_radii(self.inner.sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Return draws, shape ``(*sample_shape, *batch_shape, 2 D)``."""
        return self._at_random_radii(self.inner.rsample(torch.Size(sample_shape)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, shape ``(*)``, of real values, shape ``(*, 2 D)``."""
        return self.inner.log_prob(directions(value)) - 0.5 * value.square().sum(-1)

    @staticmethod
    def _at_random_radii(u: Tensor) -> Tensor:
        return in_planes(u, torch.hypot(torch.randn_like(u), torch.randn_like(u)))


class Wrap(Transform):
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


def check_torus(interpolant: Interpolant, velocity: nn.Module, linear: Tensor) -> None:
    """Raise a ValueError unless parts, the map of shape ``(D, D)``, make a flow on the torus."""
    if not isinstance(interpolant, Geodesic):
        raise ValueError(
            f"expected the interpolant Geodesic() for angles, got {type(interpolant).__name__}"
        )
    if isinstance(velocity, VelocityMLP) and not isinstance(velocity, TorusMLP):
        raise ValueError(
            "expected a velocity of period 2 pi in every angle, such as TorusMLP, got "
            f"{type(velocity).__name__}"
        )
    if not torch.equal(linear, torch.eye(len(linear)).to(linear)):
        raise ValueError(
            "expected no whitening map for angles, whose scale is that of the circle: leave "
            "transform.precondition alone"
        )
