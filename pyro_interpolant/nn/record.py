r"""Evaluations of a network recorded in numpy, for a hand-written backward pass.

A solve for a few rows, and its gradient, take as long as their operations are many: some 8,000 of
torch's for 44 evaluations, with autograd's bookkeeping. Here both are numpy's, whose calls cost a
third, on arrays of their own. The slopes of all evaluations are computed together, so that a
pullback is one product of matrices for each layer and little else.
"""

from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._torch import is_for_numpy

Array = NDArray[Any]

# Rows times the width of a layer, up to which this is faster than autograd: layers of 128 to 512
# units take 0.65 of autograd's time at 2^13, 0.75 at 2^14, 0.88 at 2^15.
_MOST_NUMBERS = 2**15
# Multiplications in a matrix product, up to which numpy's is faster than torch's. Beyond, numpy
# would also start threads of its own.
_MOST_MULTIPLICATIONS = 2**18


class Record(Protocol):
    """A network at E times, called once for each, in order, with R rows."""

    weights: Sequence[Tensor]  # which must not change before the last pullback

    def begin(self, rows: int) -> None:
        """Take the numbers of the network, for so many rows, before the first call."""
        ...

    def __call__(self, x: Array) -> Array:
        """Return the velocity at the next of the times, of states x, shape ``(R, D)`` each."""
        ...

    def linearize(self) -> None:
        """Prepare the pullbacks of all calls."""
        ...

    def pull(self, e: int, cotangent: Array) -> Array:
        """Return the cotangent of the state in call e from that of the velocity, ``(R, D)``."""
        ...


def is_recordable(x: Tensor, width: int) -> bool:
    """Return whether numpy has the numbers of x, shape ``(*, D)``, and layers of them are small.

    Args:
        x: States.
        width: The largest width of a layer.
    """
    return is_for_numpy(x) and 0 < x[..., 0].numel() * width <= _MOST_NUMBERS


def rows_at_once(width: int) -> int:
    """Return of how many rows layers are small, of which the largest has a width."""
    return max(1, _MOST_NUMBERS // width)


def by_row(part: Tensor, batch: Sequence[int]) -> Tensor:
    """Return numbers by row, shape ``(T, R, width)``, from those of contexts, ``(T, *, width)``.

    Args:
        part: The numbers; where contexts have no batch dimension they are returned as they are.
        batch: The batch shape of R rows, to which that of the contexts broadcasts.
    """
    if part.dim() == 2:
        return part
    missing = len(batch) + 2 - part.dim()
    part = part.reshape(len(part), *(1,) * missing, *part.shape[1:])
    return part.expand(-1, *batch, -1).flatten(1, -2)


class MLPRecord:
    r"""A record of a :class:`~pyro_interpolant.VelocityMLP`.

    The SiLU is :math:`s(2 z) = z (1 + \tanh z)`. With :math:`n = \|(x_1 / R_1, \dots, x_D / R_D,
    1)\|_4` the inverse of the gate, the velocity is :math:`v = u(x) / n`, and a cotangent
    :math:`\bar v` pulls back to

    .. math:: \bar x = \Big(\frac{\partial u}{\partial x}\Big)^T \frac{\bar v}{n}
              - (\bar v \cdot v) \, \frac{1}{n R} \Big(\frac{x}{n R}\Big)^3 .

    Args:
        weights: Of all layers, each ``(width, inputs)``.
        shifts: Of all layers, each ``(E, width)`` or, by row, ``(E, R, width)``.
        scales: Of the hidden layers, alike.
        residual: Whether the input of each hidden layer is added to its output.
        inverses: ``1 / R`` below and above zero, ``(D,)`` each.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        shifts: Sequence[Tensor],
        scales: Sequence[Tensor],
        residual: Sequence[bool],
        inverses: Sequence[Tensor],
    ) -> None:
        self.weights, self.residual = weights, residual
        self.modulation, self.inverses = (shifts, scales), inverses

    def begin(self, rows: int) -> None:
        """Take the numbers of the network, for so many rows, before the first call."""
        weights, (shifts, scales), inverses = self.weights, self.modulation, self.inverses
        *self.hidden, self.output = (w.detach().numpy() for w in weights)
        self.halves = [(w / 2).T for w in self.hidden]
        *inner, self.shift = (b.detach().numpy() for b in shifts)
        self.shifts = [b / 2 for b in inner]
        self.scales = [a.detach().numpy() for a in scales]
        below, above = (np.diag(r.detach().numpy()) for r in inverses)
        self.reach = np.concatenate((above, -below), 1)  # of |x_i| / R_i: the one above zero
        times, dim, like = len(self.shift), len(self.output), self.output
        self.y = np.empty((times, rows, 2 * dim), like.dtype)
        self.n = np.empty((times, rows, 1), like.dtype)
        self.v = np.empty((times, rows, dim), like.dtype)
        shapes = [(times, rows, len(w)) for w in self.hidden]
        self.z, self.tanh = ([np.empty(shape, like.dtype) for shape in shapes] for _ in range(2))
        self.zeros, self.one = np.zeros_like(self.y[0]), np.ones_like(self.n[0])
        self.sum = np.ones((2 * dim, 1), like.dtype)
        largest = max(w.size for w in self.hidden)
        is_small = rows * largest <= _MOST_MULTIPLICATIONS
        self.product: Callable[..., Array] = np.dot if is_small else _product
        self.slopes: list[Array] = []
        self.calls = count()

    def __call__(self, x: Array) -> Array:
        """Return the velocity at the next of the times, of states x, shape ``(R, D)`` each."""
        e, product = next(self.calls), self.product
        y = np.maximum(product(x, self.reach, self.y[e]), self.zeros, out=self.y[e])
        q = y * y
        n = product(np.multiply(q, q, out=q), self.sum, self.n[e])
        n += self.one
        np.sqrt(np.sqrt(n, out=n), out=n)
        h = x
        for w, b, a, z, tanh, adds in zip(
            self.halves, self.shifts, self.scales, self.z, self.tanh, self.residual, strict=True
        ):
            half = product(h, w, z[e])
            half += b[e]
            s = half * np.tanh(half, out=tanh[e])
            s += half
            s *= a[e]
            if adds:
                s += h
            h = s
        v = product(h, self.output.T, self.v[e])
        v += self.shift[e]
        v /= n
        return v

    def linearize(self) -> None:
        """Prepare the pullbacks of all calls."""
        self.gate = 1 / self.n
        y = (self.y * self.gate).reshape(-1, self.reach.shape[1])
        self.along = _product(y * y * y, self.reach.T).reshape(self.v.shape) * -self.gate
        for z, tanh, a in zip(self.z, self.tanh, self.scales, strict=True):
            slope = 1 - tanh
            slope *= z
            slope += 1
            tanh += 1
            slope *= tanh
            slope *= (a if a.ndim == 3 else a[:, None]) / 2
            self.slopes.append(slope)
        self.z = self.tanh = []

    def pull(self, e: int, cotangent: Array) -> Array:
        """Return the cotangent of the state in call e from that of the velocity, ``(R, D)``."""
        product = self.product
        p = product(cotangent * self.gate[e], self.output)
        for i in range(len(self.hidden) - 1, 0, -1):
            q = product(p * self.slopes[i][e], self.hidden[i])
            if self.residual[i]:
                q += p
            p = q
        p *= self.slopes[0][e]
        x = product(p, self.hidden[0])
        x += product(cotangent * self.v[e], self.sum[: len(self.output)]) * self.along[e]
        return x


class MovedRecord:
    r"""A record of :math:`v(x) = r + s \odot (g \odot z + u(z))`, :math:`z = (x - m) / s`.

    Args:
        record: Of u.
        m, r, s, g: At all times, each ``(E, D)`` or, by row, ``(E, R, D)``.
    """

    def __init__(self, record: Record, m: Tensor, r: Tensor, s: Tensor, g: Tensor) -> None:
        self.record, self.weights, self.path = record, record.weights, (m, r, s, g)

    def begin(self, rows: int) -> None:
        """Take the numbers of path and network, for so many rows, before the first call."""
        self.record.begin(rows)
        self.calls = count()
        self.m, self.r, self.s, self.g = (part.detach().numpy() for part in self.path)

    def __call__(self, x: Array) -> Array:
        """Return the velocity at the next of the times, of states x, shape ``(R, D)`` each."""
        e = next(self.calls)
        z = (x - self.m[e]) / self.s[e]
        return self.r[e] + self.s[e] * (self.g[e] * z + self.record(z))

    def linearize(self) -> None:
        """Prepare the pullbacks of all calls."""
        self.record.linearize()

    def pull(self, e: int, cotangent: Array) -> Array:
        """Return the cotangent of the state in call e from that of the velocity, ``(R, D)``."""
        inner = self.record.pull(e, self.s[e] * cotangent)
        return self.g[e] * cotangent + inner / self.s[e]


def _product(x: Array, w: Array, out: Array | None = None) -> Array:
    """Return a product of matrices by torch, shape ``(R, width)``, as :func:`numpy.dot`."""
    target = None if out is None else torch.from_numpy(out)
    found = torch.mm(torch.from_numpy(x), torch.from_numpy(w), out=target)
    return found.numpy() if out is None else out
