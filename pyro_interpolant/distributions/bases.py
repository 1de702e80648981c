r"""The base :math:`\rho_0` of a flow: what its paths start from, in data coordinates.

By default it is :math:`N(0, I)` in whitened coordinates. Any distribution will do, and one without
a density too: from samples alone a flow still transports, and is sampled from. On the torus it is
uniform, :math:`\rho_0(x) = (2\pi)^{-D}`.
"""

import contextlib
import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution, Transform, constraints

from .._package import check_ranges, check_sizes, whole
from ..interpolants.nonlinear import wrap
from ..transforms.interpolant import broadcast_batch
from ..transforms.whitening import Whitening
from .base_support import inside_base, stated_support
from .constraints import Circular, is_discrete, is_flat
from .rows import checked_rows, rows_held

if TYPE_CHECKING:
    from typing_extensions import Self

_T = TypeVar("_T")


class _Base(dist.TorchDistribution):
    """A distribution of real vectors without parameters that torch would check."""

    arg_constraints: dict[str, constraints.Constraint] = {}
    support = constraints.real_vector

    def expand(self, batch_shape: Sequence[int], _instance: "Self | None" = None) -> "Self":
        """Return the base with another batch shape.

        Raises:
            ValueError: If the batch shape does not expand to it.
        """
        check_expansion(self.batch_shape, batch_shape)
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new.__dict__.update(self.__dict__, _batch_shape=torch.Size(batch_shape))
        return new

    def to(self, like: Tensor) -> "Self":
        """Return the base in the type and on the device of a tensor of any shape."""
        return _with_parts(self, lambda part: copy_like(part, like))


class _DerivedBase(_Base):
    """A base whose draws are a function of those of another distribution, its source."""

    @abstractmethod
    def _source(self) -> Distribution:
        """Return the other distribution, of any batch shape."""

    def _from_source(self, x: Tensor) -> Tensor:
        """Return draws of this base, given those of the source."""
        return x

    def _expanded(self) -> Distribution:
        source = self._source()
        same = source.batch_shape == self.batch_shape
        return source if same else source.expand(self.batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return draws without gradient, shape ``(*sample_shape, *batch_shape, *event_shape)``."""
        with torch.no_grad():
            return self._from_source(self._expanded().sample(torch.Size(sample_shape)))

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return draws, shape ``(*sample_shape, *batch_shape, *event_shape)``."""
        return self._from_source(self._expanded().rsample(torch.Size(sample_shape)))


class Samples(_Base):
    """A base of which only samples are known: it can be drawn from, and has no density.

    Args:
        rows: Its samples, shape ``(N, D)``, in data coordinates; draws are with replacement.

    Raises:
        ValueError: If the rows are not of shape ``(N, D)``, or not finite.

    Example:
        >>> Samples(torch.zeros(10, 2)).sample((5,)).shape
        torch.Size([5, 2])
    """

    has_rsample = False

    def __init__(self, rows: Tensor, *, validate_args: bool | None = None) -> None:
        self.rows = checked_rows(rows, "base samples")
        super().__init__(torch.Size(), self.rows.shape[-1:], validate_args=validate_args)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return rows drawn with replacement, shape ``(*sample_shape, *batch_shape, D)``."""
        shape = torch.Size(sample_shape) + self.batch_shape
        return self.rows[torch.randint(len(self.rows), shape, device=self.rows.device)]

    def log_prob(self, value: Tensor) -> Tensor:
        """Raise a ValueError, for values of any shape: samples have no density."""
        raise _lacks_density(self)


class ExternalBase(_DerivedBase):
    """A base from another library: any torch distribution, or a module whose call gives one.

    A zuko flow is such a module: ``ExternalBase(zuko.flows.NSF(3))``. Its weights are its own: it
    is neither trained nor saved with the flow.

    Args:
        source: A distribution of event shape ``(D,)``, in data coordinates, or a module that
            returns one when called without arguments.

    Raises:
        TypeError: If the source gives no distribution.
    """

    def __init__(
        self, source: Distribution | nn.Module, *, validate_args: bool | None = None
    ) -> None:
        self.source = source
        inner = self._source()
        if not isinstance(inner, Distribution):
            raise TypeError(
                "expected a torch distribution, or a module that returns one when called without "
                f"arguments, got {type(source).__name__}"
            )
        self.has_rsample = inner.has_rsample
        super().__init__(inner.batch_shape, inner.event_shape, validate_args=validate_args)

    def _source(self) -> Distribution:
        return self.source() if isinstance(self.source, nn.Module) else self.source

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> Any:
        """The support of the source; all real vectors where it states none."""
        with contextlib.suppress(NotImplementedError):
            return self._source().support
        return constraints.real_vector

    @property
    def mean(self) -> Tensor:
        """The mean of the source, shape ``(*batch_shape, D)``, where it states one."""
        return self._expanded().mean

    @property
    def variance(self) -> Tensor:
        """The variance of the source, shape ``(*batch_shape, D)``, where it states one."""
        return self._expanded().variance

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, shape ``(*)``, of values of shape ``(*, D)``."""
        return self._expanded().log_prob(value)


class WhitenedBase:
    r"""The base in whitened coordinates :math:`w = L^{-1}(x - \mathrm{loc})`.

    Its density there is :math:`\rho_0(\mathrm{loc} + L w)\,|\det L|`.

    Args:
        base: A distribution in data coordinates, or None for N(0, I) in whitened ones.
        whitening: The map :math:`x = \mathrm{loc} + L w`.
    """

    def __init__(self, base: Distribution | None, whitening: Whitening) -> None:
        self.base, self.whitening = base, whitening

    def sample(self, shape: Sequence[int]) -> Tensor:
        """Return whitened draws without gradient, shape ``(*shape, D)``.

        Raises:
            ValueError: If the base has a batch.
        """
        check_single(self.base, rows=True)
        like = self.whitening.loc
        if self.base is None:
            return torch.randn(*shape, len(like), dtype=like.dtype, device=like.device)
        with torch.no_grad():
            return self.to_white(self.base.sample(torch.Size(shape)))

    def log_prob(self, w: Tensor) -> Tensor:
        """Return the log-density, shape ``(*)``, of whitened states, shape ``(*, D)``."""
        if self.base is None:
            return standard_normal(w).log_prob(w)
        return base_log_prob(self.base, self.whitening.from_white(w)) + self.whitening.log_det

    def split(self, share: float) -> "tuple[WhitenedBase, WhitenedBase]":
        """Return the base to train on and that of the held-out loss: disjoint where samples.

        Of the same samples they are the same at each call.

        Args:
            share: The share of the samples for the latter.
        """
        if not isinstance(self.base, Samples):
            return self, self
        rows = self.base.rows
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows = rows[order.to(rows.device)]
        count = rows_held(share, len(rows))
        kept, held = rows[count:] if len(rows) > count else rows, rows[:count]
        return WhitenedBase(Samples(kept), self.whitening), WhitenedBase(
            Samples(held), self.whitening
        )

    def to_white(self, x0: Tensor) -> Tensor:
        """Return draws of the base whitened, shape ``(*, D)``: those of N(0, I) as they are."""
        if self.base is None:
            return x0.to(self.whitening.loc)
        return self.whitening.double_to_white(x0)


def check_single(base: Distribution | None, *, rows: bool = False) -> None:
    """Raise a ValueError if a base has a batch, each member of which would need rows.

    Args:
        base: The base, or None.
        rows: Whether rows are drawn from it, and so a batch of one is one too many.
    """
    if base is not None and (len(base.batch_shape) if rows else base.batch_shape.numel() != 1):
        raise ValueError(
            "expected one base for all rows, of no batch shape, got one of batch shape "
            f"{tuple(base.batch_shape)}: make a flow from each of its members"
        )


def check_expansion(old: Sequence[int], new: Sequence[int]) -> None:
    """Raise an error unless a batch shape expands to another.

    Raises:
        TypeError: If that is no sequence of whole numbers.
        ValueError: If the batch shape does not expand to it.
    """
    check_sizes("a batch shape", new)
    old, new = tuple(old), tuple(new)
    if any(n < 0 for n in new):
        raise ValueError(f"expected a batch shape of sizes of at least 0, got {new}")
    last = new[len(new) - len(old) :]
    if len(old) > len(new) or any(o not in (1, n) for o, n in zip(old, last, strict=True)):
        raise ValueError(
            f"expected a shape that the batch shape {old} expands to, with its sizes, or any in "
            f"place of ones, on the right, got {new}"
        )


def standard_normal(like: Tensor) -> TorchDistributionMixin:
    """Return N(0, I), event shape ``(D,)``, in the type and on the device of ``(*, D)``."""
    zero = torch.zeros_like(like[(0,) * (like.dim() - 1)])
    return dist.Normal(zero, torch.ones_like(zero), validate_args=False).to_event(1)


def has_density(base: Distribution) -> bool:
    """Return whether a base has a density: not of points, nor on a set without volume."""
    parts: list[Any] = [base]
    inner = ("base_dist", "component_distribution", "component0", "component1")
    for part in parts:
        if isinstance(part, Samples | dist.Delta | dist.ZeroInflatedDistribution):
            return False
        if part.has_enumerate_support or is_discrete(stated_support(part)):
            return False
        parts += [getattr(part, name) for name in inner if hasattr(part, name)]
    return not is_flat(stated_support(base), base.event_shape)


def _lacks_density(base: Distribution) -> ValueError:
    what = "samples alone" if isinstance(base, Samples) else base
    return ValueError(
        f"expected a base with a density, got {what}: this flow transports and can be sampled "
        "from, but has no log_prob. Pass a base distribution that has one, for example an "
        "InterpolantDistribution that was fitted to samples"
    )


def base_log_prob(base: Distribution, x: Tensor) -> Tensor:
    """Return the log-density of a base, shape ``(*)``, of real vectors, shape ``(*, D)``.

    It is ``-inf`` beyond the support of the base, to where a flow may lead back.

    Raises:
        ValueError: If the base has no density.
    """
    if not has_density(base):
        raise _lacks_density(base)
    if isinstance(stated_support(base), Circular):
        return base.log_prob(wrap(x))
    found = inside_base(base, x)
    if found is None:
        return base.log_prob(x)
    within, known = found
    return only_possible(base.log_prob(x.where(within[..., None], known)), within, x, 1)


def only_possible(log_prob: Tensor, possible: Tensor, value: Tensor, event_dim: int) -> Tensor:
    """Return log-densities, shape ``(*)``, that are ``-inf`` where values cannot be.

    Args:
        log_prob: The log-densities, shape ``(*)``.
        possible: Which values can be, shape ``(*)``.
        value: The values, shape ``(*, *event_shape)``, of which those with NaN have NaN.
        event_dim: The number of dimensions of an event.
    """
    unknown = value.isnan().reshape(*value.shape[: value.dim() - event_dim], -1).any(-1)
    return log_prob.where(possible, torch.where(unknown, math.nan, -math.inf).to(log_prob))


def check_is_base(base: object, like: Tensor) -> None:
    """Raise an error unless a flow can start from a base.

    Args:
        base: What was given.
        like: A tensor of the flow's, shape ``(D,)``.

    Raises:
        TypeError: If it is not a distribution that Pyro can sample.
        ValueError: If its event shape is not ``(D,)``.
    """
    if not isinstance(base, TorchDistributionMixin):
        raise TypeError(
            "expected a base from pyro.distributions (torch's own cannot be sampled by Pyro), got "
            f"{type(base).__name__}"
        )
    if base.event_shape != like.shape:
        hint = ": add .to_event(1)" if base.batch_shape[-1:] == like.shape else ""
        raise ValueError(
            f"expected a base of event shape {tuple(like.shape)}, got event shape "
            f"{tuple(base.event_shape)} and batch shape {tuple(base.batch_shape)}{hint}"
        )


def copy_like(value: Any, like: Tensor) -> Any:
    """Return a copy of a distribution in the type and on the device of a tensor of any shape.

    Distributions have no ``to`` of their own: all tensors among their parts are converted. A
    module or a flow, which converts itself in place, is returned as it is where it is so already,
    and else copied: others may have it, too.

    Raises:
        ValueError: If a tensor that requires a gradient is not of that type and device: the copy
            would not follow its training.
    """
    flow = getattr(getattr(value, "transform", None), "flow", None)
    module = value if isinstance(value, nn.Module) else flow
    if isinstance(module, nn.Module):
        stays = all(
            own.device == like.device and (own.dtype == like.dtype or not own.is_floating_point())
            for own in (*module.parameters(), *module.buffers())
        )
        return value if stays else copy.deepcopy(value).to(like)
    if isinstance(value, Distribution) and hasattr(value, "to"):
        return value.to(like)
    if isinstance(value, Tensor):
        new = value.to(like) if value.is_floating_point() else value.to(like.device)
        if new is not value and value.requires_grad:
            raise ValueError(
                f"expected a base of {new.dtype} on {new.device}, got one of {value.dtype} on "
                f"{value.device} with a tensor that requires a gradient, which a copy would not "
                "follow: make a base from converted tensors, or detach them"
            )
        return new
    return _with_parts(value, lambda part: copy_like(part, like))


def detached(value: Any) -> Any:
    """Return a copy of a distribution through which no gradient reaches its parameters."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, nn.Module):
        return copy.deepcopy(value).requires_grad_(requires_grad=False)
    return _with_parts(value, detached)


def _with_parts(value: _T, changed: Callable[[Any], Any]) -> _T:
    """Return a copy of a distribution, a transform or a list, of changed parts; else the value."""
    if isinstance(value, (list, tuple)):
        return type(value)(changed(part) for part in value)
    if not isinstance(value, (Distribution, Transform)):
        return value
    new, parts = copy.copy(value), dict(value.__dict__)
    is_inverse = isinstance(value, torch.distributions.transforms._InverseTransform)
    if isinstance(value, Transform) and not is_inverse:
        parts["_inv"] = None  # which torch remembers: it is of the old parts, and leads back here
    new.__dict__.update({k: changed(v) for k, v in parts.items()})
    return new


_FULL_TURN = 2 * math.pi


def in_planes(u: Tensor, radius: Tensor | float) -> Tensor:
    """Return points of the plane in the directions u, shape ``(*, D)``, as ``(*, 2 D)``."""
    return torch.cat((radius * u.cos(), radius * u.sin()), dim=-1)


def directions(w: Tensor) -> Tensor:
    """Return the angles, shape ``(*, D)``, of points of the plane, shape ``(*, 2 D)``."""
    x, y = w.chunk(2, dim=-1)
    return torch.atan2(y, torch.where((x == 0) & (y == 0), 1.0, x))  # a finite slope at 0


class UniformTorus(_Base):
    r"""The uniform base on the torus: density :math:`(2\pi)^{-D}` at every real vector.

    Draws are in [-pi, pi). Its density takes angles with any number of turns, as the way back from
    data to base gives them: under another support than ``circular`` it has no integral, no more
    than that of ``VonMises`` has.

    Args:
        event_dim: D, the number of angles.

    Raises:
        ValueError: If ``event_dim`` is below 1.

    Example:
        >>> round(float(UniformTorus(2).log_prob(torch.tensor([0.5, 9.0]))), 4)
        -3.6758
    """

    has_rsample = True

    def __init__(self, event_dim: int, *, validate_args: bool | None = None) -> None:
        check_ranges(whole("event_dim", event_dim, 1))
        self.origin = torch.zeros(int(event_dim))  # of the type and on the device of draws
        super().__init__(torch.Size(), self.origin.shape, validate_args=validate_args)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return draws in [-pi, pi), shape ``(*sample_shape, *batch_shape, D)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        like = self.origin
        return wrap(_FULL_TURN * torch.rand(shape, dtype=like.dtype, device=like.device))

    def log_prob(self, value: Tensor) -> Tensor:
        r"""Return :math:`-D \log 2\pi`, shape ``(*)``, of real values of shape ``(*, D)``."""
        if self._validate_args:
            self._validate_sample(value)
        batch = broadcast_batch(value.shape[:-1], self.batch_shape)
        # Constant, yet a function of the value: whoever asks for its gradient gets zeros.
        flat = (0 * value).sum(-1) - self.event_shape[0] * math.log(_FULL_TURN)
        return flat.expand(batch)


class Planar(_DerivedBase):
    r"""A base on the torus as a density on :math:`R^{2D}`, for samplers on real vectors.

    Each angle is the direction of a point of the plane, at a Rayleigh distance from its origin.
    The vector w of these points has density :math:`p(u) \, e^{-|w|^2 / 2}`, normal where p is
    uniform. The plane has no seam; on the real line p would be improper, and cut off at a period
    it would be distorted at the edges.

    Args:
        base: A distribution of D angles whose density, shape ``(*)``, has period :math:`2\pi`.
    """

    def __init__(self, base: Distribution) -> None:
        self.inner, self.has_rsample = base, base.has_rsample
        super().__init__(base.batch_shape, torch.Size((2 * base.event_shape[0],)))

    def _source(self) -> Distribution:
        return self.inner

    def _from_source(self, x: Tensor) -> Tensor:
        return in_planes(x, torch.hypot(torch.randn_like(x), torch.randn_like(x)))

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, shape ``(*)``, of real values, shape ``(*, 2 D)``."""
        return self._expanded().log_prob(directions(value)) - 0.5 * value.square().sum(-1)
