r"""Bijections around a flow: into whitened coordinates before it, onto a support after it.

``Whiten`` is :math:`w = L^{-1}(x - \mathrm{loc})`, which takes a base that is given in data
coordinates to where the velocity moves. ``PerEvent`` wraps a bijection from real vectors to a
support, such as :math:`y_i = e^{x_i}`, so that its log-determinant is one number an event;
``Cached`` remembers pairs as well, so that a sample is not inverted again; ``Unseen`` keeps the
caches of other libraries from doing so. ``StickBreaking`` is torch's map to a simplex, which keeps
small shares, and ``Between`` the last part of that to an interval, which follows its bounds;
``biject`` finds the bijection to a support, with these in it.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import (
    AffineTransform,
    CatTransform,
    ComposeTransform,
    IndependentTransform,
    SigmoidTransform,
    StackTransform,
    StickBreakingTransform,
    Transform,
    biject_to,
    constraints,
    identity_transform,
)
from torch.distributions.constraint_registry import ConstraintRegistry
from torch.nn.functional import logsigmoid, pad

from .cache import CachedTransform, RealVectorTransform
from .whitening import Whitening


class Whiten(CachedTransform):
    r"""The map :math:`w = L^{-1}(x - \mathrm{loc})` from data to whitened coordinates.

    It gives back the very draw it was called with: a base may have no density a rounding away.
    """

    def __init__(self, whitening: Whitening) -> None:
        super().__init__()
        self.whitening = whitening

    def _sources(self) -> Sequence[Tensor]:
        return list(self.whitening.buffers())

    def _call(self, x: Tensor) -> Tensor:
        return self.whitening.to_white(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.whitening.from_white(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``-log |det L|``, shape ``(*)``."""
        return (-self.whitening.log_det).expand(x.shape[:-1])


class Unseen(RealVectorTransform):
    """The identity as a new view, so that caches keyed by identity miss.

    Those of Pyro's transforms would return what was computed without gradients, or a freed graph.
    """

    def _call(self, x: Tensor) -> Tensor:
        return x.view_as(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.view_as(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return zeros, shape ``(*)``, for vectors of shape ``(*, D)``."""
        return x.new_zeros(x.shape[:-1])


class PerEvent(RealVectorTransform):
    r"""A bijection from vectors, shape ``(*, D)``, whose log-determinant is an event's, ``(*)``.

    For an element-wise one it is :math:`\sum_i \log |dy_i / dx_i|`, where torch gives the terms;
    its ``StackTransform`` does so against its own domain, which breaks compositions with it.

    Args:
        wrapped: A bijection from real vectors, or element-wise.
    """

    def __init__(self, wrapped: Transform) -> None:
        super().__init__()
        self.wrapped, self.bijective = wrapped, wrapped.bijective
        end = wrapped.codomain
        elementwise = wrapped.domain.event_dim == end.event_dim == 0
        self.codomain = constraints.independent(end, 1) if elementwise else end

    def _call(self, x: Tensor) -> Tensor:
        return self.wrapped(x).to(x.dtype)  # bounds may be of a finer type

    def _inverse(self, y: Tensor) -> Tensor:
        return self.wrapped.inv(y).to(y.dtype)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log |dy/dx|``, shape ``(*)``."""
        batch = x.shape[:-1]
        if 0 in batch:  # of which torch's sums over an event have no shape
            return x.new_zeros(batch)
        value = self.wrapped.log_abs_det_jacobian(x, y)
        return value.reshape(*batch, -1).sum(-1).to(x.dtype)

    def forward_shape(self, shape: Sequence[int]) -> Sequence[int]:
        """Return the shape on the support."""
        return self.wrapped.forward_shape(shape)

    def inverse_shape(self, shape: Sequence[int]) -> Sequence[int]:
        """Return the shape as real vectors."""
        return self.wrapped.inverse_shape(shape)


identity = PerEvent(identity_transform)  # gives back the very tensor


class Cached(PerEvent, CachedTransform):
    """A :class:`PerEvent` that gives back the very tensor it was called with."""

    def _sources(self) -> Sequence[Tensor]:
        return _tensors_of(self.wrapped)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log |dy/dx|``, shape ``(*)``.

        Of a pair that came from x, with a graph, it is a function of x alone. Where x is found
        again by y, a gradient in y would be that of a part of what was computed: torch refuses it.
        """
        entry = self._find(x=x, y=y) if y.requires_grad else None
        if entry is not None and entry.forward:
            y = self._call(x)
        return super().log_abs_det_jacobian(x, y)


class StickBreaking(StickBreakingTransform):
    r"""Torch's map from real vectors, shape ``(*, D)``, to a simplex, ``(*, D + 1)``.

    .. math:: x_k = \log y_k - \log \sum_{j > k} y_j + \log (D + 1 - k)

    Torch takes the later shares as one minus the earlier ones, which in float32 leaves nothing of
    the smallest: :math:`1 - y_1` has an error of 6e-8. Here they are added up.
    """

    def _call(self, x: Tensor) -> Tensor:
        z = x - _left(x).log()
        rest = torch.sigmoid(-z).cumprod(-1)
        y = pad(torch.sigmoid(z), [0, 1], value=1.0) * pad(rest, [1, 0], value=1.0)
        y = y / y.sum(-1, keepdim=True)  # of many shares rounding adds up
        return y.clamp(min=torch.finfo(y.dtype).tiny)

    def _inverse(self, y: Tensor) -> Tensor:
        rest = y.flip(-1).cumsum(-1).flip(-1)[..., 1:].clamp(min=torch.finfo(y.dtype).tiny)
        return y[..., :-1].log() - rest.log() + _left(rest).log()

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log |dy/dx|``, shape ``(*)``, a function of x alone."""
        left = _left(x)
        z = x - left.log()
        return (logsigmoid(z) + left * logsigmoid(-z)).sum(-1)


def _left(x: Tensor) -> Tensor:
    """Return how many shares come after each of those that vectors, ``(*, D)``, give: ``(D,)``."""
    return torch.arange(x.shape[-1], 0, -1, dtype=x.dtype, device=x.device)


class Between(AffineTransform):
    """Torch's map from the unit interval to another, of bounds as they are at each call.

    Torch keeps their difference: where tensors are changed in place it moves values, and scales
    them as before.

    Args:
        low: The lower bound, of any shape.
        high: The upper bound.
    """

    def __init__(self, low: Tensor | float, high: Tensor | float) -> None:
        Transform.__init__(self)
        self.loc, self.high, self._event_dim = low, high, 0

    @property
    def scale(self) -> Tensor | float:  # type: ignore[override]
        """How far the bounds are apart, of their shape."""
        return self.high - self.loc

    def with_cache(self, cache_size: int = 1) -> Transform:
        """Return self."""
        return self


class _Bijections(ConstraintRegistry):
    """Torch's registry of bijections, in which some are others, wherever they are in a support."""

    def __call__(self, constraint: constraints.Constraint) -> Transform:
        """Return the bijection to a constraint.

        Raises:
            NotImplementedError: If there is none.
        """
        own = type(constraint) in self._registry
        return super().__call__(constraint) if own else biject_to(constraint)


biject = _Bijections()


@biject.register(constraints.simplex)
def _(constraint: constraints.Constraint) -> Transform:
    known = biject_to(constraint)  # which may be that of a user
    return StickBreaking() if type(known) is StickBreakingTransform else known


@biject.register(constraints.interval)
@biject.register(constraints.half_open_interval)
def _(constraint: Any) -> Transform:
    bounds = constraint.lower_bound, constraint.upper_bound
    if not any(isinstance(bound, Tensor) for bound in bounds):
        return biject_to(constraint)
    return ComposeTransform([SigmoidTransform(), Between(*bounds)])


@biject.register(constraints.independent)
def _(constraint: Any) -> Transform:
    base = biject(constraint.base_constraint)
    return IndependentTransform(base, constraint.reinterpreted_batch_ndims)


@biject.register(constraints.stack)
def _(constraint: Any) -> Transform:
    return StackTransform([biject(part) for part in constraint.cseq], constraint.dim)


@biject.register(constraints.cat)
def _(constraint: Any) -> Transform:
    parts = [biject(part) for part in constraint.cseq]
    # Torch adds up what parts say, and beside a vector's log-determinant an element's broadcasts.
    if any(part.domain.event_dim for part in parts):
        parts = [PerEvent(part) for part in parts]
    return CatTransform(parts, constraint.dim, constraint.lengths)


def contents_of(transform: Transform) -> Iterator[Tensor | nn.Module]:
    """Yield the tensors and modules that a transform is made of, but none it remembers."""
    left: list[object] = [transform]
    seen: set[int] = set()  # an inverse holds what it is the inverse of
    while left:
        part = left.pop(0)
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Tensor | nn.Module):
            yield part
        elif isinstance(part, list | tuple):
            left = [*part, *left]
        elif isinstance(part, Transform):
            held = [value for name, value in vars(part).items() if name != "_cached_x_y"]
            left = [*held, *left]


def _tensors_of(transform: Transform) -> list[Tensor]:
    """Return the tensors that a transform is made of, such as bounds, and those of its modules."""
    found: list[Tensor] = []
    for part in contents_of(transform):
        own = [part] if isinstance(part, Tensor) else [*part.parameters(), *part.buffers()]
        found += own
    return found
