r"""A flow in one dimension, of many values at once: solved for at knots, a spline between them.

The map :math:`y = T(w)` of such a flow is monotone. Where many values share a context, it is
solved for at evenly spaced knots, with a monotone spline through them. The spline through every
other knot is compared with the knots left out, as a probability: values between two that it
misses, on a steep flank between modes, are solved for themselves.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .._torch import is_tracing, is_transformed
from .gaussianize import MarginalTransform, with_slopes
from .interpolant import InterpolantTransform

_VALUES_PER_CELL = 2  # of one context, from which a cell between two knots pays
_MIN_CELLS, _MAX_CELLS = 512, 2048
_TOLERANCE = 3e-4  # the probability by which the spline through every other knot may be off

Map = Callable[[Tensor], Tensor]


def mapped(transform: InterpolantTransform, w: Tensor, probability: Map) -> Tensor:
    """Return ``transform(w)``, shape ``(*, 1)``, of finite scalars, many of them by a spline.

    It is within 1e-4 in probability (of two modes 10 sd apart). Where a gradient is wanted, or
    fewer than 1,024 values share a context, it is the transform's own.

    Args:
        transform: A flow in one dimension.
        w: Inputs, shape ``(*, 1)``, those of each context along the first dimensions.
        probability: The base's, from inputs of any shape.
    """
    context = transform.context
    own = torch.Size() if context is None else context.shape[:-1]
    if w.shape[w.dim() - 1 - len(own) : -1] != own or _needs_graph(transform, w):
        return transform(w)
    values = w.reshape(-1, own.numel())
    most = min(_MAX_CELLS, len(values) // _VALUES_PER_CELL)
    if most < _MIN_CELLS:
        return transform(w)
    cells = 2 * (most // 2)
    contexts = context.flatten(0, -2) if context is not None and own else context
    view = InterpolantTransform._view(transform, contexts, transform.end)
    steps = torch.linspace(0, 1, cells + 1, dtype=w.dtype, device=w.device)[:, None]
    x = torch.lerp(values.amin(0), values.amax(0), steps)
    y = transform.sign * view(x[..., None])[..., 0]
    if not bool(((x.diff(dim=0) > 0) & (y.diff(dim=0) > 0)).all()):
        return transform(w)  # all values alike, or closer than their type tells
    coarse, fine = _spline(x[::2], y[::2]), _spline(x, y)
    left_out = x[1::2]
    misses = probability(fine(coarse.inv(left_out))) - probability(left_out)
    place = ((values - x[0]) / (x[2] - x[0])).long().clamp(0, cells // 2 - 1)
    steep = misses.abs() > _TOLERANCE  # whose slopes at both ends are then off as well
    steep[1:] |= steep[:-1].clone()
    steep[:-1] |= steep[1:].clone()
    steep = steep.gather(0, place)
    found = transform.sign * fine.inv(values)
    if bool(steep.any()):
        every = (
            contexts if contexts is None or not own else contexts.expand(*values.shape, -1)[steep]
        )
        view = InterpolantTransform._view(transform, every, transform.end)
        found[steep] = view(values[steep][:, None])[:, 0]
    return found.reshape(w.shape)


def _needs_graph(transform: InterpolantTransform, w: Tensor) -> bool:
    sources = (w, transform.context, *transform.flow.parameters())
    wanted = any(s is not None and s.requires_grad for s in sources)
    return is_tracing() or is_transformed() or (wanted and torch.is_grad_enabled())


def _spline(x: Tensor, y: Tensor) -> MarginalTransform:
    """Return the map of which the inverse takes knots x to y, shape ``(K, B)`` each."""
    return MarginalTransform(*with_slopes(x.T, y.T))
