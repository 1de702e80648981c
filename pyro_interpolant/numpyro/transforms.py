r"""The flow as a NumPyro transform, and the map that whitens a base.

:class:`InterpolantTransform` takes whitened base draws to data, :math:`y = T(w_0)`. Its weights
are :class:`~pyro_interpolant.numpyro.frozen.Frozen`, or a dictionary of arrays, of which those of
the velocity are trained.
Every transform here gives its log-determinant as the intermediate of a call, and, with
``inverse_with_log_det``, that of an inverse: one solve each.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from numpy.typing import NDArray
from numpyro.distributions import constraints
from numpyro.distributions.transforms import Transform
from numpyro.util import not_jax_tracer

from . import flow
from .flow import Grid
from .frozen import Weights

__all__ = ["InterpolantTransform"]

_Table = NDArray[np.float64]  # of a file


class RealVectorTransform(Transform):
    """A transform of real vectors that gives its log-determinant with a value or an inverse."""

    domain = constraints.real_vector
    codomain = constraints.real_vector

    def __call__(self, x: Array) -> Array:
        """Return y for x, shape ``(*, D)``."""
        return self.call_with_intermediates(x)[0]

    def _inverse(self, y: Array) -> Array:
        return self.inverse_with_log_det(y)[0]

    def call_with_intermediates(self, x: Array) -> tuple[Array, Any]:
        """Return y and the log-determinant, shape ``(*)``, of x, shape ``(*, D)``."""
        raise NotImplementedError

    def inverse_with_log_det(self, y: Array) -> tuple[Array, Array]:
        """Return x with ``y = T(x)`` and ``log |dy/dx|``, shape ``(*)``."""
        raise NotImplementedError

    def log_abs_det_jacobian(
        self, x: Array, y: Array, intermediates: Array | None = None
    ) -> Array:
        """Return ``log |dy/dx|``, shape ``(*)``.

        Args:
            x: Inputs, shape ``(*, D)``.
            y: Their images.
            intermediates: What :meth:`call_with_intermediates` gave, or None.
        """
        return self.call_with_intermediates(x)[1] if intermediates is None else intermediates

    def eq(self, other: object, static: bool = False) -> bool | Array:  # noqa: FBT001, FBT002
        """Return whether another transform has the same parts, as a bool if ``static``."""
        structures: list[Any] = [jax.tree.structure(t) for t in (self, other)]
        if structures[0] != structures[1]:
            return False
        pairs = zip(jax.tree.leaves(self), jax.tree.leaves(other), strict=True)
        same = [jnp.array_equal(a, b) for a, b in pairs]
        return bool(all(same)) if static else jnp.all(jnp.array([True, *same]))


class InterpolantTransform(RealVectorTransform):
    """Map whitened draws of the base to the data along a velocity; made by ``load``.

    Args:
        weights: Those of the flow by their names in a file: ``Frozen``, or a dictionary of arrays
            to be trained. Gradients are those of torch: the velocity's weights have them, the
            whitening and the scales of contexts none. The solver's nodes stay where they are,
            between which a velocity learns to peak: by likelihoods train in torch, which draws
            them at random.
        grid: How paths are solved.
        context: A context, shape ``(*, C)``, or None.
    """

    def __init__(self, weights: Weights, grid: Grid, context: Array | None = None) -> None:
        self.weights, self.grid, self.context = weights, grid, context

    def tree_flatten(self) -> tuple[Any, ...]:
        """Return the arrays, their names, and the rest."""
        return (self.weights, self.context), (("weights", "context"), {"grid": self.grid})

    @property
    def event_dim(self) -> int:
        """D, the size of the last dimension."""
        return self.weights["loc"].shape[-1]

    @property
    def context_dim(self) -> int:
        """C, the size of a context; 0 if there is none."""
        return self.weights["velocity.context_loc"].shape[-1]

    def at(self, t: float) -> "InterpolantTransform":
        """Return the transform that stops at a time t in [0, 1].

        Raises:
            ValueError: If t is outside [0, 1].
        """
        if not 0.0 <= t <= 1.0:
            raise ValueError(f"expected a time t in [0, 1], got {t}")
        return InterpolantTransform(self.weights, self.grid._replace(end=float(t)), self.context)

    def condition(self, context: Any) -> "InterpolantTransform":
        """Return the transform given a context of shape ``(*, C)``.

        Of a flow of classes: given labels, whole numbers of shape ``(*)``, or ``(*, 1)`` of a
        floating type.

        Raises:
            TypeError: If it is of whole numbers, and the flow not one of classes.
            ValueError: If the last dimension is not C, or a label is known to be of no class.
        """
        context = _array(context)
        if "velocity.classes" in self.weights:
            context = self._labels(context)
        shape = jnp.shape(context)
        if not self.context_dim or shape[-1:] != (self.context_dim,):
            raise ValueError(f"expected a context of shape (*, {self.context_dim}), got {shape}")
        kind, labels = jnp.result_type(context), "velocity.classes" in self.weights
        if not labels and not jnp.issubdtype(kind, jnp.floating):
            raise TypeError(
                f"expected a context of a floating type, got {kind} of shape {shape}: convert "
                "numbers with .astype(float), and labels with jax.nn.one_hot(labels, K)"
            )
        return InterpolantTransform(self.weights, self.grid, context)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """The batch shape of the context; that of none is ``()``."""
        return () if self.context is None else jnp.shape(self.context)[:-1]

    def in_front(self, ones: int) -> "InterpolantTransform":
        """Return the transform with ones in front of the batch shape of its context, if any."""
        if self.context is None or not ones:
            return self
        context = jnp.reshape(self.context, (1,) * ones + jnp.shape(self.context))
        return InterpolantTransform(self.weights, self.grid, context)

    def _labels(self, labels: ArrayLike) -> Array:
        """Return labels, ``(*)`` or ``(*, 1)``, as contexts, shape ``(*, 1)``."""
        count = len(self.weights["velocity.classes"])
        # By numpy, which knows values under jit, too, where jax traces what is made of them.
        are_known = all(map(not_jax_tracer, jax.tree.leaves(labels)))
        if are_known and not np.isin(np.asarray(labels), np.arange(count)).all():
            raise ValueError(f"expected labels from 0 to {count - 1}, got others")
        labels = jnp.asarray(labels)
        is_floating = jnp.issubdtype(labels.dtype, jnp.floating)
        return labels if is_floating else labels[..., None]

    def __call__(self, x: Array) -> Array:
        """Return the data, shape ``(*, D)``, of whitened base draws of that shape."""
        return self._solve(x, forward=True, density=False)[0]

    def _inverse(self, y: Array) -> Array:
        return self._solve(y, forward=False, density=False)[0]

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """Return y and ``log |dy/dx|``, shape ``(*)``, from one solve."""
        return self._solve(x, forward=True, density=True)

    def inverse_with_log_det(self, y: Array) -> tuple[Array, Array]:
        """Return x with ``y = T(x)`` and ``log |dy/dx|``, shape ``(*)``, from one solve."""
        return self._solve(y, forward=False, density=True)

    def _solve(self, x: Array, *, forward: bool, density: bool) -> tuple[Array, Any]:
        if jnp.shape(x)[-1:] != (self.event_dim,):
            hint = " For N scalars pass shape (N, 1): x[..., None]." if self.event_dim == 1 else ""
            raise ValueError(
                f"expected a last dimension of size {self.event_dim}, got shape {jnp.shape(x)}."
                f"{hint}"
            )
        x = jnp.asarray(x, jnp.result_type(x, self.weights["loc"]))
        context = self.context
        if self.context_dim and context is None:
            raise ValueError("expected a context: a conditional flow has .condition(context)")
        if context is not None:
            context = jnp.asarray(context, x.dtype)
            x = jnp.broadcast_to(x, self.forward_shape(x.shape))
            while context.ndim > 1 and len(context) == 1:  # one that all rows share is cheaper
                context = context[0]
        return flow.solve(self.weights, x, context, self.grid, forward=forward, density=density)

    def forward_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the output: the input's, broadcast with the context's batch."""
        return (*jnp.broadcast_shapes(tuple(shape[:-1]), self.batch_shape), *shape[-1:])

    def inverse_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the input: the output's, broadcast with the context's batch."""
        return self.forward_shape(shape)


def _array(context: Any) -> Any:
    """Return a context as an array, of numpy's where it is a list of numbers that are known."""
    if not isinstance(context, (list, tuple)):
        return context
    are_known = all(map(not_jax_tracer, jax.tree.leaves(context)))
    return np.asarray(context) if are_known else jnp.asarray(context)


class Whiten(RealVectorTransform):
    r"""The map :math:`w = L^{-1}(x - \mathrm{loc})` from a base in data coordinates.

    Args:
        weights: Those of the flow.
    """

    def __init__(self, weights: Weights) -> None:
        self.weights = weights

    def tree_flatten(self) -> tuple[Any, ...]:
        """Return the weights, their name, and nothing else."""
        return (self.weights,), (("weights",), {})

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """Return whitened coordinates, ``(*, D)``, and ``-log |det L|``, shape ``(*)``."""
        return flow.to_white(self.weights, x), self._log_det(x)

    def inverse_with_log_det(self, y: Array) -> tuple[Array, Array]:
        """Return data coordinates, ``(*, D)``, and ``-log |det L|``, shape ``(*)``."""
        return flow.from_white(self.weights, y), self._log_det(y)

    def _log_det(self, x: Array) -> Array:
        return jnp.broadcast_to(-self.weights["linear_log_det"], jnp.shape(x)[:-1])


class Spline:
    r"""Monotone rational-quadratic splines, one for each column, linear beyond their knots.

    As in :class:`~pyro_interpolant.transforms.gaussianize.MarginalTransform`.

    Args:
        x: Knots of each column in the data, ascending, shape ``(D, K)``.
        y: Where they are taken, ascending, shape ``(D, K)``.
        slopes: The positive derivatives there, shape ``(D, K)``.
    """

    def __init__(self, x: _Table, y: _Table, slopes: _Table) -> None:
        self.x, self.y = x, y
        width, height = np.diff(x), np.diff(y)
        p0, p1 = slopes[:, :-1] * width / height, slopes[:, 1:] * width / height
        self._bins = (x[:, :-1], y[:, :-1], width, height, p0, p1)

    # In each bin u and r are how far x and y have come, and p the slopes over that of the chord.

    def to_normal(self, x: Array) -> tuple[Array, Array]:
        """Return images, shape ``(*, D)``, and the logarithms of the slopes there."""
        x0, y0, width, height, p0, p1 = self._bins_of(x, self.x)
        come = (x - x0) / width
        u = _within(come)
        v = u * (1 - u)
        bottom = 1 + (p0 + p1 - 2) * v
        y = y0 + height * ((u * u + p0 * v) / bottom + _beyond(come, p0, p1))
        top = p1 * u * u + 2 * v + p0 * (1 - u) ** 2
        return y, jnp.log(height / width) + jnp.log(top) - 2 * jnp.log(bottom)

    def to_data(self, y: Array) -> Array:
        """Return the values, shape ``(*, D)``, of images y."""
        x0, y0, width, height, p0, p1 = self._bins_of(y, self.y)
        come = (y - y0) / height
        r = _within(come)
        # The root of the quadratic in u without a difference of numbers that are nearly equal.
        m, v = p0 * (1 - r) - p1 * r, r * (1 - r)
        larger = jnp.sqrt(m * m + 4 * v) + jnp.abs(m)
        u = 2 * r / (2 * r + jnp.where(m < 0, 4 * v / larger, larger))
        return x0 + width * (u + _beyond(come, 1 / p0, 1 / p1))

    def _bins_of(self, value: Array, edges: _Table) -> list[Array]:
        """Return the start of each value's bin in x and y, its sides, and p at its ends."""
        inner = jnp.asarray(edges[:, 1:-1], value.dtype)
        i = (inner < value[..., None]).sum(-1)
        columns = np.arange(len(edges))
        return [jnp.asarray(table, value.dtype)[columns, i] for table in self._bins]


def _within(come: Array) -> Array:
    """Return how far values have come within a bin, from 0 to 1, of their shape.

    At its ends the derivative is that inside: that of ``clip`` is half of it, and knots are rows.
    """
    return jnp.where((come < 0) | (come > 1), (come > 1).astype(come.dtype), come)


def _beyond(come: Array, before: Array, after: Array) -> Array:
    """Return what straight lines add before the start of a bin and past its end, ``(*, D)``."""
    outside = jnp.where(come < 0, come * before, (come - 1) * after)
    return jnp.where((come < 0) | (come > 1), outside, 0.0)


class MarginalTransform(RealVectorTransform):
    """From normal columns to the data's, one by one, by splines.

    Args:
        x: Knots of each column in the data, ascending, shape ``(D, K)``.
        y: Where the inverse takes them, ascending, shape ``(D, K)``.
        slopes: Its positive derivatives there, shape ``(D, K)``.
    """

    def __init__(self, x: _Table, y: _Table, slopes: _Table) -> None:
        self.spline = Spline(x, y, slopes)

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """Return data and the log-determinant, shape ``(*)``, of normal columns, ``(*, D)``."""
        y = self.spline.to_data(x)
        return y, -self.spline.to_normal(y)[1].sum(-1)

    def inverse_with_log_det(self, y: Array) -> tuple[Array, Array]:
        """Return normal columns and the log-determinant, shape ``(*)``, of data, ``(*, D)``."""
        x, log_slopes = self.spline.to_normal(y)
        return x, -log_slopes.sum(-1)


class RadialTransform(RealVectorTransform):
    """From rows of tempered lengths to the data's.

    As in :class:`~pyro_interpolant.transforms.gaussianize.RadialTransform`.

    Args:
        loc: The centre, shape ``(D,)``.
        linear: The map of white rows, shape ``(D, D)``.
        x: Knots of the log-lengths' spline, shape ``(1, K)``.
        y: Its values there, shape ``(1, K)``.
        slopes: Its slopes there, shape ``(1, K)``.
    """

    def __init__(self, loc: _Table, linear: _Table, x: _Table, y: _Table, slopes: _Table) -> None:
        self.loc, self.linear, self.spline = loc, linear, Spline(x, y, slopes)
        self.whitening = np.linalg.inv(linear)
        self.log_det = float(np.linalg.slogdet(linear)[1])

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """Return data and the log-determinant, shape ``(*)``, of tempered rows, ``(*, D)``."""
        length = _log_length(x)
        w = x * jnp.exp(self.spline.to_data(length) - length)
        own = jnp.result_type(self.loc)  # in a coarser type rows far away may coincide
        moved = jnp.matmul(w.astype(own), self.linear.T, precision="highest")
        y = jnp.asarray(self.loc + moved).astype(x.dtype)
        return y, self.inverse_with_log_det(y)[1]

    def inverse_with_log_det(self, y: Array) -> tuple[Array, Array]:
        """Return tempered rows and the log-determinant, shape ``(*)``, of data, ``(*, D)``."""
        own = jnp.result_type(self.loc)
        centred = jnp.asarray(y, own) - self.loc
        w = jnp.matmul(centred, self.whitening.T, precision="highest").astype(y.dtype)
        length = _log_length(w)
        tempered, log_slope = self.spline.to_normal(length)
        stretch = tempered - length
        log_det = self.log_det - (y.shape[-1] * stretch + log_slope)[..., 0]
        return w * jnp.exp(stretch), log_det


def _log_length(w: Array) -> Array:
    """Return the logarithms of lengths, shape ``(*, 1)``, finite and without slope at zero."""
    largest = jax.lax.stop_gradient(jnp.abs(w).max(-1, keepdims=True))
    largest = jnp.maximum(largest, jnp.finfo(w.dtype).tiny)
    squares = jnp.square(w / largest).sum(-1, keepdims=True)
    return jnp.log(largest) + 0.5 * jnp.log(jnp.maximum(squares, 0.5))


class Wrap(RealVectorTransform):
    r"""From real vectors to angles in :math:`[-\pi, \pi)`; its volume factor is 1."""

    def call_with_intermediates(self, x: Array) -> tuple[Array, Array]:
        """Return angles and zeros, shape ``(*)``, of real vectors, shape ``(*, D)``."""
        turn = 2 * math.pi
        x = x - turn * jnp.round(x / turn)
        # The quotient is rounded, so angles near pi or -pi can lie on either side.
        x = x + turn * ((x < -math.pi).astype(x.dtype) - (x >= math.pi).astype(x.dtype))
        return x, jnp.zeros(x.shape[:-1], x.dtype)

    def inverse_with_log_det(self, y: Array) -> tuple[Array, Array]:
        """Return angles and zeros, shape ``(*)``, of angles, shape ``(*, D)``."""
        return self.call_with_intermediates(y)
