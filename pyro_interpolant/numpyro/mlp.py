r"""The networks of :mod:`pyro_interpolant.nn` as functions of their weights, for jax.

With :math:`s` the SiLU, shifts b and scales a by time and context,

.. math:: h_i = [h_{i-1} +] a_i \odot s(W_i h_{i-1} + b_i), \quad v = g(x) (W_{L+1} h_L + b_{L+1}),

and the trace of the Jacobian in closed form, as :class:`~pyro_interpolant.VelocityMLP` and
:class:`~pyro_interpolant.TorusMLP` say. What depends on the time alone is computed by numpy.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from .._files import below
from .frozen import Weights

_HARMONICS = 2  # of a TorusMLP


class Modulation(NamedTuple):
    """Shifts and scales of all layers side by side, functions of time and context.

    Attributes:
        shifts: Added before each activation, and to the output, ``(*, sum of widths + D)``.
        scales: Factors of the activations, ``(*, sum of widths)``.
    """

    shifts: Array
    scales: Array


def expected_shapes(
    event_dim: int, hidden_dims: list[int], context_dim: int, classes: int = 0, *, periodic: bool
) -> dict[str, tuple[int | None, ...]]:
    """Return the names and shapes of a network's weights; None stands for any size."""
    frequencies = 8 if event_dim <= 8 else 4  # as VelocityMLP has them
    width = 2 * frequencies + (classes or context_dim)
    context_dim = 1 if classes else context_dim
    first = 2 * _HARMONICS * event_dim if periodic else event_dim
    inputs = [first, *hidden_dims]
    total = sum(hidden_dims)
    return {
        **{f"layers.{i}.weight": (n, inputs[i]) for i, n in enumerate(hidden_dims)},
        "output.weight": (event_dim, inputs[-1]),
        "embedding.weight": (None, width),
        "embedding.bias": (None,),
        "shifts.weight": (total + event_dim, None),
        "shifts.bias": (total + event_dim,),
        "scales.weight": (total, None),
        "scales.bias": (total,),
        "reach": (2, event_dim),
        "context_loc": (context_dim,),
        "context_scale": (context_dim,),
    }


def embed_times(weights: Weights, times: NDArray[np.float64]) -> Array:
    """Return the part of the embedding that the times give, shape ``(T, width)``."""
    weight = weights["embedding.weight"]
    count = (weight.shape[1] - len(weights.get("classes", weights["context_loc"]))) // 2
    angles = np.pi * times[:, None] * np.arange(1, count + 1)
    features = np.concatenate((np.cos(angles), np.sin(angles)), -1)
    features = features.astype(weight.dtype)
    return _product(features, weight[:, : 2 * count]) + weights["embedding.bias"]


def embed_context(weights: Weights, context: Array) -> Array:
    """Return the part that contexts, shape ``(*, C)``, give, shape ``(*, width)``.

    Labels, shape ``(*, 1)``, of none of the classes give NaN.
    """
    if "classes" in weights:
        classes = weights["classes"]
        own = (context == classes).astype(weights["embedding.weight"].dtype)
        given = _product(own, weights["embedding.weight"][:, -len(classes) :])
        return jnp.where(own.any(-1, keepdims=True), given, jnp.nan)
    loc, scale = weights["context_loc"], weights["context_scale"]
    weight = weights["embedding.weight"][:, -len(loc) :]
    return _product((context - loc) / scale, weight)


def modulate(weights: Weights, embedded: Array) -> Modulation:
    """Return shifts and scales, shape ``(*, sum of widths)``, from embeddings, ``(*, width)``."""
    tanh = np.tanh if isinstance(embedded, np.ndarray) else jnp.tanh
    s = 0.5 * embedded * (1 + tanh(0.5 * embedded))  # the SiLU
    parts = Modulation._fields
    return Modulation(*(_product(s, weights[f"{p}.weight"]) + weights[f"{p}.bias"] for p in parts))


def velocity(weights: Weights, modulation: Modulation, x: Array) -> Array:
    """Return the velocity, shape ``(*, D)``, of states x of that shape."""
    u, _ = _ungated(weights, modulation, _inputs(weights, x))
    return u if _is_periodic(weights) else _gate(weights, x)[-1][..., None] * u


def divergence(weights: Weights, modulation: Modulation, x: Array) -> Array:
    """Return the exact divergence, shape ``(*)``, of states x of shape ``(*, D)``."""
    inputs = _inputs(weights, x)
    u, slopes = _ungated(weights, modulation, inputs)
    trace = _trace(weights, inputs, slopes)
    if _is_periodic(weights):
        return trace
    y, inverse, g = _gate(weights, x)
    # div(g u) = g div u + u . grad g, where grad_i g = -g^5 y_i^3 / R_i
    return g * trace - g**5 * (y * y * y * inverse * u).sum(-1)


def largest_intermediate(weights: Weights) -> int:
    """Return the number of elements that a row's divergence needs at once."""
    layers = _layers(weights)
    carried = weights["output.weight"].shape[0] if len(layers) > 2 or _is_periodic(weights) else 1
    return carried * max(layer.shape[0] for layer in layers)


def _layers(weights: Weights) -> list[Any]:
    count = sum(name.startswith("layers.") for name in weights)
    return [weights[f"layers.{i}.weight"] for i in range(count)]


def _is_periodic(weights: Weights) -> bool:
    return weights["layers.0.weight"].shape[1] != weights["output.weight"].shape[0]


def _is_residual(layers: list[Any], i: int) -> bool:
    return len(layers) > 2 and i > 0 and layers[i].shape[0] == layers[i - 1].shape[0]


def _inputs(weights: Weights, x: Array) -> Array:
    """Return the inputs of the first layer: states, or cosine and sine of angles' multiples."""
    if not _is_periodic(weights):
        return x
    multiples = [k * x for k in range(1, _HARMONICS + 1)]
    return jnp.concatenate([s for kx in multiples for s in (jnp.cos(kx), jnp.sin(kx))], -1)


def _ungated(weights: Weights, modulation: Modulation, inputs: Array) -> tuple[Array, list[Array]]:
    """Return the last layer, shape ``(*, D)``, and the slopes of the scaled activations."""
    layers = _layers(weights)
    ends = np.cumsum([layer.shape[0] for layer in layers])
    *shifts, last = jnp.split(modulation.shifts, ends, -1)
    scales = jnp.split(modulation.scales, ends[:-1], -1)
    h, slopes = inputs, []
    for i, (layer, shift, scale) in enumerate(zip(layers, shifts, scales, strict=True)):
        z = _product(h, layer) + shift
        sigmoid = jax.nn.sigmoid(z)
        s = z * sigmoid
        slopes.append((sigmoid + s - s * sigmoid) * scale)
        h = h + s * scale if _is_residual(layers, i) else s * scale
    return _product(h, weights["output.weight"]) + last, slopes


def _product(x: Any, weight: Any) -> Any:
    """Return ``W x``, by numpy where it is known; accelerators would shorten the numbers."""
    if isinstance(x, np.ndarray) and isinstance(weight, np.ndarray):
        return x @ weight.T
    return jnp.matmul(x, weight.T, precision="highest")


def _gate(weights: Weights, x: Array) -> tuple[Array, Array, Array]:
    """Return ``y_i = x_i / R_i`` and ``1 / R_i``, shape ``(*, D)``, and the gate, ``(*)``."""
    low, high = 1 / weights["reach"]
    inverse = jnp.where(x < 0, low, high)
    y = x * inverse
    return y, inverse, jnp.sqrt(jax.lax.rsqrt(1 + jnp.square(jnp.square(y)).sum(-1)))


def _trace(weights: Weights, inputs: Array, slopes: list[Array]) -> Array:
    """Return the trace of the ungated network's Jacobian, shape ``(*)``."""
    first, *inner = _layers(weights)
    last = weights["output.weight"]
    if _is_periodic(weights):
        by_wave = (_HARMONICS, 2, last.shape[0])  # which multiple, cosine or sine, of which angle
        waves = inputs.reshape(*inputs.shape[:-1], *by_wave)
        turned = jnp.stack((-waves[..., 1, :], waves[..., 0, :]), -2)  # d inputs / d k x
        k = np.arange(1, _HARMONICS + 1)[:, None, None]
        tangents = jnp.einsum(
            "...kcd,kcdh->...dh", k * turned, first.T.reshape(*by_wave, -1), precision="highest"
        )
        return _deep_trace(weights, slopes, tangents)
    if not inner:
        return (slopes[0] * (first * last.T).sum(-1)).sum(-1)
    if len(inner) == 1:
        coupling = inner[0] * jnp.matmul(first, last, precision="highest").T
        return (_product(slopes[0], coupling) * slopes[1]).sum(-1)
    return _deep_trace(weights, slopes, first.T)


def _deep_trace(weights: Weights, slopes: list[Array], into: Array) -> Array:
    """Return the trace, given the derivative of the first product, ``(*, D, width)``."""
    layers = _layers(weights)
    tangents = slopes[0][..., None, :] * into  # of all D directions: J^T, (*, D, width)
    for i in range(1, len(layers)):
        step = slopes[i][..., None, :] * _product(tangents, layers[i])
        tangents = tangents + step if _is_residual(layers, i) else step
    return (tangents * weights["output.weight"]).sum((-2, -1))


def of_network(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weights of the velocity by their names in the network."""
    return below("velocity.", weights)
