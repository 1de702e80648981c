r"""The velocity on the torus: a perceptron of cosines and sines, of period :math:`2\pi`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .mlp import Trace, VelocityMLP

_HARMONICS = 2  # multiples of an angle that are seen: on von Mises mixtures 1 needs more steps


class TorusMLP(VelocityMLP):
    r"""A velocity on the torus: :class:`VelocityMLP` fed with cosines and sines of the angles.

    Of every angle :math:`x_i` the first layer sees :math:`\cos x_i, \sin x_i, \cos 2 x_i, \sin 2
    x_i`, so v has period :math:`2\pi` in every coordinate, and is smooth where angles meet. Its
    exact divergence carries the D tangents forward through all layers in one batch. There is no
    gate: the torus has no far away.

    Args:
        event_dim: D, the number of angles.
        hidden_dims: As in :class:`VelocityMLP`.
        context_dim: C, the size of the last dimension of the context; 0 for none.
        classes: As in :class:`VelocityMLP`.

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

    is_periodic = True

    def __init__(
        self,
        event_dim: int,
        hidden_dims: Sequence[int] | None = None,
        context_dim: int = 0,
        classes: int = 0,
    ) -> None:
        super().__init__(event_dim, hidden_dims, context_dim, classes)
        self.layers[0] = nn.Linear(2 * _HARMONICS * event_dim, self.hidden_dims[0], bias=False)

    def set_scales(self, w: Tensor, context: Tensor | None = None) -> None:
        """Set the scale of contexts, shape ``(N, C)``, of angles, ``(N, D)``; there is no gate."""
        super().set_scales(w, context)
        self.reach.fill_(math.inf)

    def untrained_copy(self) -> VelocityMLP:
        """Return an untrained network of the same shape and scales."""
        return self._with_scales(TorusMLP(*self.arguments()))

    def _inputs(self, x: Tensor) -> Tensor:
        """Return cosine and sine of angles, then of their multiples, shape ``(*, 2 K D)``."""
        multiples = [k * x for k in range(1, _HARMONICS + 1)]
        return torch.cat([s for kx in multiples for s in (kx.cos(), kx.sin())], dim=-1)

    def _tracer(self) -> Trace:
        by_wave = (_HARMONICS, 2, self.event_dim)  # which multiple, cosine or sine, of which angle
        first = self._weights()[0].T.unflatten(0, by_wave)
        k = torch.arange(1, _HARMONICS + 1, device=first.device)[:, None, None]

        def trace(circles: Tensor, slopes: list[Tensor]) -> Tensor:
            cos, sin = circles.unflatten(-1, by_wave).unbind(-2)
            turned = k * torch.stack((-sin, cos), dim=-2)  # d circles / d x
            return self._deep_trace(slopes, torch.einsum("...kcd,kcdh->...dh", turned, first))

        return trace
