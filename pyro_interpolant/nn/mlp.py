r"""A multilayer perceptron :math:`v_t(x \mid c)` whose divergence is exact and cheap.

With two hidden layers, :math:`v = W_3 s(W_2 s(W_1 x + b_1) + b_2) + b_3` has

.. math:: \nabla \cdot v = d_2^T (W_2 \odot (W_1 W_3)^T) d_1, \quad d_i = s'(z_i),

at about twice the price of v itself, for any D; more layers carry D tangents forward.
:class:`VelocityMLP` is the default network on :math:`\mathbb R^D`.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import index
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .._package import check_sizes
from .._torch import broadcast_shapes, is_watched
from .record import MLPRecord, Record, by_row, is_recordable
from .velocity import StateFunction, is_product, location_and_scale

_EMBEDDING_WIDTH = 64
_MAX_DEEP_DIM = 32  # up to this D three layers: a trace takes D products of matrices with each
_MAX_SHARP_DIM = 8  # up to this D finer times
# Up to 8 dimensions training takes times 1 - (1 - u)^2, dense near the data, where sharp features
# are learned: in a minute this gains 0.11 nats on rings and 0.05 on POWER. In 63 dimensions it
# loses 0.3 (BSDS300).
_SHARP_TIME_EXPONENT = 2.0
# From 3 to 8 dimensions the first layer starts with weights this many times as large as torch's:
# what differs at short distances is learned sooner. In 63 dimensions this loses 1.6 nats in a
# minute (BSDS300); in 2 it gains little, and a population behind noise is calibrated worse.
_SHARPNESS, _LEAST_SHARP_DIM = 3.0, 3
# Elements of the largest intermediate in a call: memory that was freed takes long to get back.
_VALUES_AT_ONCE = 2**17  # of the widest layer
_REACH_PER_ROW = 2.0  # the gate's reach over the distance of the farthest training row
_BASE_REACH = 5.0  # standard deviations, which draws of N(0, I) hardly leave


class Modulation(NamedTuple):
    """The layers, with their shifts and scales as functions of time and context.

    Attributes:
        products: The weights of all layers, the output's last, or what was put in place of one.
        shifts: Added before each activation, and to the output, each ``(*, width)``.
        scales: Factors of the activations, each ``(*, width)``.
    """

    products: list[Tensor | nn.Module]
    shifts: tuple[Tensor, ...]
    scales: tuple[Tensor, ...]

    def unbind(self) -> "list[Modulation]":
        """Return one modulation per entry of the first dimension."""
        times = zip(*(part.unbind() for part in (*self.shifts, *self.scales)), strict=True)
        count = len(self.shifts)
        return [Modulation(self.products, s[:count], s[count:]) for s in times]


Trace = Callable[[Tensor, list[Tensor]], Tensor]  # of the first layer's inputs, and all slopes


class VelocityMLP(nn.Module):
    r"""A velocity :math:`v_t(x \mid c)` with an exact divergence at a small multiple of its price.

    With :math:`s` the SiLU, shifts :math:`b_i(t, c)` and scales :math:`a_i(t, c)` from a small
    embedding of time and context,

    .. math:: h_1 = a_1 \odot s(W_1 x + b_1), \quad
              h_i = [h_{i-1} +] a_i \odot s(W_i h_{i-1} + b_i), \quad
              v = g(x) \, (W_{L+1} h_L + b_{L+1}).

    The residual term in brackets is there from three layers on, between layers of equal width.
    With two layers the trace of the Jacobian is :math:`d_2^T (W_2 \odot (W_1 W_3)^T) d_1` with
    :math:`d_i = a_i \odot s'(z_i)`; deeper networks carry the D tangents forward through all
    layers in one batch.

    The gate :math:`g(x) = (1 + \sum_i (x_i / R_i)^4)^{-1/4}` is 1 where the data are, and bounds
    the velocity far away, where the layers extrapolate linearly: the flow moves points by a
    bounded distance there, along a ray by the same, so densities keep falling. ``reach`` R, of
    shape ``(2, D)`` for either sign of :math:`x_i`, is a buffer, infinite (no gate) until
    :func:`~pyro_interpolant.fit` sets it from the data.

    The last layer starts at zero: an untrained flow is its whitening map. From 3 to 8 dimensions
    the first starts at three times the size that torch gives it.

    Args:
        event_dim: D, the size of the last dimension of x.
        hidden_dims: The widths of the hidden layers. By default ``(96, 96, 96)`` up to 32
            dimensions, and ``(384, 384)`` above.
        context_dim: C, the size of the last dimension of the context; 0 for none.
        classes: K, for contexts that are labels 0 to K - 1, each with shifts and scales of its
            own; 0 for none.

    Raises:
        TypeError: If a size is not a whole number, or the widths are no sequence of them.
        ValueError: If a size is not positive.

    Example:
        >>> velocity = VelocityMLP(3, (32, 32))
        >>> x = torch.randn(10, 3)
        >>> v, divergence = velocity.forward_and_divergence(torch.tensor(0.3), x)
        >>> v.shape, divergence.shape
        (torch.Size([10, 3]), torch.Size([10]))
    """

    broadcasts_time = True
    is_periodic = False

    reach: Tensor
    context_loc: Tensor
    context_scale: Tensor

    def __init__(
        self,
        event_dim: int,
        hidden_dims: Sequence[int] | None = None,
        context_dim: int = 0,
        classes: int = 0,
    ) -> None:
        super().__init__()
        if hidden_dims is None:
            hidden_dims = (96, 96, 96) if event_dim <= _MAX_DEEP_DIM else (384, 384)
        check_sizes("sizes", (event_dim, context_dim, classes))
        check_sizes("hidden_dims", hidden_dims)
        # Of numbers of numpy or torch, too: others ask for plain ones.
        event_dim, context_dim, classes = map(index, (event_dim, context_dim, classes))
        self.event_dim = event_dim
        self.hidden_dims = tuple(map(index, hidden_dims))
        self.context_dim = 1 if classes else context_dim
        self.classes = classes
        sizes = context_dim, classes
        if not self.hidden_dims or min(event_dim, *self.hidden_dims) < 1 or min(sizes) < 0:
            raise ValueError(
                "expected a positive event_dim, at least one positive hidden width and a "
                f"context_dim >= 0, got {event_dim}, {self.hidden_dims} and {context_dim}, with "
                f"{classes} classes"
            )
        if all(sizes):
            raise ValueError(
                f"expected context_dim or classes, got both: {context_dim} and {classes}"
            )
        widths = (event_dim, *self.hidden_dims)
        self.layers = nn.ModuleList(
            nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:], strict=False)
        )
        self.output = nn.Linear(widths[-1], event_dim, bias=False)
        # High frequencies cost quadrature nodes in many dimensions (BSDS300: 37 against 17).
        self.frequencies = 8 if event_dim <= _MAX_SHARP_DIM else 4
        self.time_exponent = _SHARP_TIME_EXPONENT if event_dim <= _MAX_SHARP_DIM else 1.0
        self.embedding = nn.Linear(2 * self.frequencies + sum(sizes), _EMBEDDING_WIDTH)
        self.shifts = nn.Linear(_EMBEDDING_WIDTH, sum(self.hidden_dims) + event_dim)
        self.scales = nn.Linear(_EMBEDDING_WIDTH, sum(self.hidden_dims))
        nn.init.ones_(self.scales.bias)
        out = self.shifts.weight[-event_dim:], self.shifts.bias[-event_dim:]
        for part in (self.output.weight, *out, self.scales.weight):
            nn.init.zeros_(part)
        with torch.no_grad():
            next(self.layers.parameters()).mul_(sharpness(event_dim))
        self.register_buffer("reach", torch.full((2, event_dim), math.inf))
        self.register_buffer("context_loc", torch.zeros(self.context_dim))
        self.register_buffer("context_scale", torch.ones(self.context_dim))

    def set_scales(self, w: Tensor, context: Tensor | None = None) -> None:
        """Set the gate's reach, and location and scale of the context, from training rows.

        Args:
            w: Whitened rows, shape ``(N, D)``.
            context: Their contexts, shape ``(N, C)``, or None.
        """
        # Draws of the base and of the path between must be well inside too.
        self.reach.copy_(
            _REACH_PER_ROW * torch.stack((-w.amin(0), w.amax(0))).clamp(min=_BASE_REACH)
        )
        if context is not None and not self.classes:
            loc, scale = location_and_scale(context)
            self.context_loc.copy_(loc)
            self.context_scale.copy_(scale)

    def is_untrained(self) -> bool:
        """Return whether the last layer is zero, as it starts."""
        weight = getattr(self.output, "weight", None)  # what was put in its place may have none
        return isinstance(weight, Tensor) and not bool(weight.any())

    def untrained_copy(self) -> "VelocityMLP":
        """Return an untrained network of the same shape and scales."""
        return self._with_scales(VelocityMLP(*self.arguments()))

    def _with_scales(self, new: "VelocityMLP") -> "VelocityMLP":
        """Return a network with the scales of this one."""
        new = new.to(self.reach)
        for name, value in new.named_buffers():  # of a layer of this one there may be more
            value.copy_(self.get_buffer(name))
        return new

    def has_other_layers(self) -> bool:
        """Return whether a layer is not, or not only, the product with its weight."""
        return not all(is_product(layer) for layer in (*self.layers, self.output))

    def rows_at_once(self) -> int:
        """Return the number of rows for which one call is fastest, without gradients."""
        deep = self.event_dim if len(self.hidden_dims) > 2 else 1
        return max(32, _VALUES_AT_ONCE // (deep * max(self.hidden_dims)))

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the constructor, without ``classes`` where there are none."""
        if self.classes:
            return self.event_dim, self.hidden_dims, 0, self.classes
        return self.event_dim, self.hidden_dims, self.context_dim

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity, shape ``(*, D)``.

        Args:
            t: Times, broadcastable to ``(*)``: ``(T, 1)`` beside x of ``(T, N, D)`` is cheap.
            x: States, shape ``(*, D)``.
            context: Contexts, broadcastable to ``(*, C)``, or None.

        Raises:
            ValueError: If the context is missing, superfluous, or of another size.
        """
        return self._velocity(x, self._modulation(t, context))

    def field(self, times: Tensor, context: Tensor | None = None) -> list[StateFunction]:
        """Return one function ``x -> v`` per time, the time embedding computed once for all.

        Args:
            times: Times, shape ``(T,)``.
            context: Contexts, broadcastable to ``(*, C)``, or None.
        """
        inverses = self._inverse_reach()
        return [
            partial(self._velocity, modulation=m, inverses=inverses)
            for m in self._modulations(times, context)
        ]

    def record(self, times: Tensor, x: Tensor, context: Tensor | None = None) -> Record | None:
        """Return a record of evaluations at the times, or None where autograd is as fast.

        Args:
            times: Times, shape ``(T,)``.
            x: States, shape ``(*, D)``; those of the evaluations are like them.
            context: Contexts, broadcastable to ``(*, C)``, or None.
        """
        if self.is_periodic or not is_recordable(x, max(self.hidden_dims)):
            return None
        batch = () if context is None else context.shape[:-1]
        if batch and broadcast_shapes(batch, x.shape[:-1]) != x.shape[:-1]:
            return None
        modulation = self._modulation(times.reshape(-1, *(1,) * len(batch)), context)
        shifts, scales = (
            [by_row(p, x.shape[:-1]) for p in parts]
            for parts in (modulation.shifts, modulation.scales)
        )
        residual = [self._is_residual(i) for i in range(len(self.hidden_dims))]
        weights = [*self._weights(), self.output.weight]
        return MLPRecord(weights, shifts, scales, residual, self._inverse_reach())

    def forward_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity, shape ``(*, D)``, and its exact divergence, shape ``(*)``.

        Args:
            t: Times, broadcastable to ``(*)``.
            x: States, shape ``(*, D)``.
            context: Contexts, broadcastable to ``(*, C)``, or None.

        Raises:
            ValueError: If the context is missing, superfluous, or of another size.
        """
        return self._both(x, self._modulation(t, context), self._tracer())

    def divergence_field(
        self, times: Tensor, context: Tensor | None = None
    ) -> list[StateFunction]:
        """Return one function ``x -> divergence`` per time, what they share computed once.

        Args:
            times: Times, shape ``(T,)``.
            context: Contexts, broadcastable to ``(*, C)``, or None.
        """
        trace = self._tracer()
        return [
            partial(self._divergence, modulation=m, trace=trace)
            for m in self._modulations(times, context)
        ]

    def _divergence(self, x: Tensor, modulation: Modulation, trace: Trace) -> Tensor:
        return self._both(x, modulation, trace)[1]

    def _both(self, x: Tensor, modulation: Modulation, trace: Trace) -> tuple[Tensor, Tensor]:
        """Return velocity and divergence."""
        slopes: list[Tensor] = []
        inputs = self._inputs(x)
        u = self._ungated(inputs, modulation, slopes)
        if self.is_periodic:
            return u, trace(inputs, slopes)
        y, inverse, g = self._gate(x)
        # div(g u) = g div u + u . grad g, where grad_i g = -g^5 y_i^3 / R_i
        along = (y * y * y * inverse * u).sum(-1)
        return g[..., None] * u, g * trace(inputs, slopes) - g**5 * along

    def _modulations(self, times: Tensor, context: Tensor | None) -> list[Modulation]:
        """Return the modulation at each of the times, shape ``(T,)``."""
        batch = 0 if context is None else context.dim() - 1
        return self._modulation(times.reshape(-1, *(1,) * batch), context).unbind()

    def _modulation(self, t: Tensor, context: Tensor | None) -> Modulation:
        features = self._features(t)
        if self.context_dim:
            if context is None or context.shape[-1] != self.context_dim:
                got = "none" if context is None else f"shape {tuple(context.shape)}"
                raise ValueError(f"expected a context of shape (*, {self.context_dim}), got {got}")
            if self.classes:
                own = context == torch.arange(self.classes, device=context.device)
                # A label of no class, which nobody can refuse under torch.func, has no velocity.
                context = own.to(t).masked_fill(~own.any(-1, keepdim=True), math.nan)
            else:
                context = (context - self.context_loc) / self.context_scale
            batch = broadcast_shapes(features.shape[:-1], context.shape[:-1])
            features = torch.cat((features.expand(*batch, -1), context.expand(*batch, -1)), dim=-1)
        elif context is not None:
            raise ValueError(
                f"expected no context, got shape {tuple(context.shape)}: this velocity was made "
                "with context_dim=0"
            )
        embedded = nn.functional.silu(self.embedding(features))
        shifts = self.shifts(embedded).split((*self.hidden_dims, self.event_dim), dim=-1)
        # Looked up here, once for all times, and not in each evaluation.
        layers = cast("list[nn.Linear]", [*self.layers, self.output])
        products: list[Tensor | nn.Module] = [
            layer.weight if is_product(layer) else layer for layer in layers
        ]
        return Modulation(products, shifts, self.scales(embedded).split(self.hidden_dims, dim=-1))

    def _features(self, t: Tensor) -> Tensor:
        k = torch.arange(self.frequencies, dtype=t.dtype, device=t.device)
        angle = math.pi * t[..., None] * (k + 1)
        return torch.cat((angle.cos(), angle.sin()), dim=-1)

    def _velocity(
        self, x: Tensor, modulation: Modulation, inverses: Sequence[Tensor] | None = None
    ) -> Tensor:
        u = self._ungated(self._inputs(x), modulation)
        return u if self.is_periodic else self._gate(x, inverses)[-1][..., None] * u

    def _inputs(self, x: Tensor) -> Tensor:
        """Return the inputs of the first layer, shape ``(*, width)``: the states."""
        return x

    def _ungated(
        self, inputs: Tensor, modulation: Modulation, slopes: list[Tensor] | None = None
    ) -> Tensor:
        """Return the last layer, and append those of the scaled activations to ``slopes``."""
        h, plain = inputs, not is_watched()
        *products, last = modulation.products
        parts = zip(products, modulation.shifts[:-1], modulation.scales, strict=True)
        for i, (product, shift, scale) in enumerate(parts):
            z, is_residual = _affine(product, h, shift), self._is_residual(i)
            if plain:  # fewer passes over memory
                if slopes is not None:
                    slopes.append(torch.ops.aten.silu_backward(scale.expand_as(z), z))
                s = nn.functional.silu(z, inplace=True)
                h = h.addcmul_(s, scale) if is_residual else s.mul_(scale)
                continue
            if slopes is None:
                s = nn.functional.silu(z)
            else:
                sigmoid = z.sigmoid()
                s = z * sigmoid
                slopes.append((sigmoid + s - s * sigmoid) * scale)
            h = h + s * scale if is_residual else s * scale
        return _affine(last, h, modulation.shifts[-1])

    def _weights(self) -> list[Tensor]:
        if self.has_other_layers():
            raise ValueError(
                "expected layers without biases, adapters and hooks for a divergence in closed "
                "form: a flow computes that of any"
            )
        return [cast(nn.Linear, layer).weight for layer in self.layers]

    def _is_residual(self, i: int) -> bool:
        w = self.hidden_dims
        return len(w) > 2 and i > 0 and w[i] == w[i - 1]

    def _inverse_reach(self) -> Sequence[Tensor]:
        """Return ``1 / R`` below and above zero, shape ``(D,)`` each."""
        return self.reach.reciprocal().unbind()

    def _gate(
        self, x: Tensor, inverses: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``y_i = x_i / R_i`` and ``1 / R_i``, shape ``(*, D)``, and the gate, ``(*)``."""
        below, above = inverses or self._inverse_reach()
        inverse = torch.where(x < 0, below, above)
        y = x * inverse
        return y, inverse, torch.rsqrt(1 + y.square().square().sum(-1)).sqrt()

    def _tracer(self) -> Trace:
        """Return the trace of the ungated network's Jacobian, ``(*)``, of inputs and slopes."""
        first, *inner = self._weights()
        last = self.output.weight
        if not inner:
            ends = (first * last.T).sum(-1)
            return lambda inputs, slopes: slopes[0] @ ends
        if len(inner) == 1:
            coupling = inner[0] * (first @ last).T
            return lambda inputs, slopes: (
                nn.functional.linear(slopes[0], coupling) * slopes[1]
            ).sum(-1)
        return lambda inputs, slopes: self._deep_trace(slopes, first.T)

    def _deep_trace(self, slopes: list[Tensor], into: Tensor) -> Tensor:
        """Return the trace, given the derivative of the first product, ``(*, D, width)``."""
        # Of all D directions: J^T, (*, D, width). In another layout, where weights are frozen,
        # torch takes a product for each row, which is many times slower.
        tangents = slopes[0][..., None, :] * into.contiguous()
        inner = zip(slopes[1:], self._weights()[1:], strict=True)
        for i, (slope, weight) in enumerate(inner, start=1):
            through = nn.functional.linear(tangents, weight)
            slope = slope[..., None, :]
            if self._is_residual(i):
                tangents = torch.addcmul(tangents, slope, through)
            else:
                tangents = slope * through
        return tangents.flatten(-2) @ self.output.weight.flatten()


def _affine(product: Tensor | nn.Module, x: Tensor, shift: Tensor) -> Tensor:
    """Return ``W x + b`` in one fused call where the shift is shared by all rows.

    Args:
        product: W, or what was put in its place, which is called.
        x: Inputs, shape ``(*, K)``.
        shift: b, broadcastable to the outputs.
    """
    if isinstance(product, nn.Module):
        return product(x) + shift
    if shift.dim() == 1:
        return nn.functional.linear(x, product, shift)
    return nn.functional.linear(x, product) + shift


def untrained_like(
    velocity: nn.Module, event_dim: int, context_dim: int, classes: int
) -> nn.Module:
    """Return an untrained network of the same states and contexts, to learn the latent noise.

    Args:
        velocity: The network; its own ``untrained_copy()`` is taken, where it has that method.
        event_dim: D, the size of states.
        context_dim: C, the size of contexts; 0 for none, 1 for labels.
        classes: The number of labels; 0 for none.
    """
    own = getattr(velocity, "untrained_copy", None)
    return own() if own else VelocityMLP(event_dim, None, 0 if classes else context_dim, classes)


def sharpness(event_dim: int) -> float:
    """Return the size of the first layer's weights at the start, over what torch gives them."""
    return _SHARPNESS if _LEAST_SHARP_DIM <= event_dim <= _MAX_SHARP_DIM else 1.0
