r"""Solves of few rows in numpy, with a hand-written backward pass.

One Runge-Kutta step is :math:`y = x + h \sum_i b_i k_i`, :math:`k_i = v(u_i)`, :math:`u_i = x + h
\sum_j a_{ij} k_j`. Cotangents are pulled back through it from the last stage to the first,

.. math:: \bar k_i = h \, b_i \, \bar y + h \sum_l a_{li} \, \bar u_l, \quad
          \bar u_i = (\partial v / \partial u_i)^T \, \bar k_i, \quad
          \bar x = \bar y + \sum_i \bar u_i,

which is the gradient of the discretised solve, not of the differential equation.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from .._torch import (
    constant,
    current_trace,
    is_batch_of_gradients,
    is_for_numpy,
    is_functional,
    needs_graph,
)
from ..nn.record import Array, MLPRecord, Record, rows_at_once
from ..nn.velocity import StateFunction, record
from .ode import FixedGrid, takes_own_steps
from .tableaus import TABLEAUS

_Values = TypeVar("_Values", Array, Tensor)


def stage_times(times: Tensor, method: str) -> Tensor:
    """Return the times of all stages of all steps between nodes, shape ``(N * stages,)``.

    Args:
        times: The nodes, shape ``(N + 1,)``.
        method: The Runge-Kutta method.
    """
    c = constant(np.array(TABLEAUS[method][0])).to(times)
    return (times[:-1, None] + times.diff()[:, None] * c).reshape(-1)


def recorded_solve(
    kept: Record, x: Tensor, times: Tensor, method: str, solve: StateFunction
) -> Tensor:
    """Return the states at the nodes, shape ``(N + 1, *, D)``, with their gradient in x.

    Args:
        kept: The velocity at :func:`stage_times`.
        x: The state at the first node, shape ``(*, D)``.
        times: The nodes, shape ``(N + 1,)``.
        method: The Runge-Kutta method.
        solve: The same solve by torch alone, for gradients that are differentiated themselves.
    """
    return _Recorded.apply(x, kept, times.diff().tolist(), method, solve)


def traced_solve(velocity: nn.Module, solver: object, x: Tensor, times: Tensor) -> Tensor | None:
    """Return the states at the nodes, ``(N + 1, *, D)``, by one operation of what is traced.

    A compiled function takes as long as its operations are many. It is called later, with
    gradients or without, for any number of rows, where this package is.

    Args:
        velocity: The network, which is given no context.
        solver: How it is integrated.
        x: The state at the first node, shape ``(*, D)``.
        times: The nodes, shape ``(N + 1,)``.

    Returns:
        The states, or None outside of a trace, and for networks, weights to train and solvers that
        are not recorded.
    """
    if (
        current_trace() is None
        or is_functional()
        or not (isinstance(solver, FixedGrid) and takes_own_steps(solver))
        or solver.checkpoint
        or any(p.requires_grad for p in velocity.parameters())
    ):
        return None
    found = record(velocity, stage_times(times, solver.method).to(x), x, None)
    if not isinstance(found, MLPRecord):
        return None
    parts = found.weights, *found.modulation, map(int, found.residual), found.inverses
    return _OPERATION(x, times.diff(), solver.method, *map(list, parts))


def _operation() -> Any:
    """Return the operation of :func:`traced_solve`, from the import to the end of the process.

    Compiled functions hold it, and files of them name it.
    """
    ours: Any = torch.ops.pyro_interpolant
    if not hasattr(ours, "recorded_solve"):  # this file may be imported again
        ours.library = library = torch.library.Library("pyro_interpolant", "FRAGMENT")
        library.define(
            "recorded_solve(Tensor x, Tensor gaps, str method, Tensor[] weights, Tensor[] shifts, "
            "Tensor[] scales, int[] residual, Tensor[] inverses) -> Tensor"
        )
        for key in ("Autograd", "CPU", "FuncTorchBatched"):
            library.impl("recorded_solve", _called, key)
    return ours.recorded_solve


def _called(x: Tensor, gaps: Tensor, method: str, *record: Sequence[Any]) -> Tensor:
    """Return the states at the nodes, as the operation of :func:`traced_solve`.

    Args:
        x: Initial states, shape ``(*, D)``.
        gaps: The lengths of the steps.
        method: The method of Runge and Kutta.
        *record: The fields of a :class:`MLPRecord`, of numbers where those are booleans: tracers
            take no lists of these.

    Raises:
        RuntimeError: If gradients in weights are wanted, which are constants of the trace in part.
    """
    weights, shifts, scales, residual, inverses = record
    if needs_graph(*weights, *shifts, *scales, *inverses):
        raise RuntimeError(
            "expected a traced model of flows with frozen weights, got gradients in weights that "
            "were frozen when it was traced: set it up anew"
        )
    parts = weights, shifts, scales, list(map(bool, residual)), inverses
    steps = gaps.tolist()
    by_torch = partial(_solved, gaps=steps, method=method, parts=parts)
    if is_functional() or not (x.numel() and is_for_numpy(x)):
        return by_torch(x)
    rows = x.reshape(-1, x.shape[-1]).split(rows_at_once(max(map(len, weights))))
    found = [_Recorded.apply(some, MLPRecord(*parts), steps, method, by_torch) for some in rows]
    return torch.cat(found, 1).reshape(-1, *x.shape)


def _solved(x: Tensor, gaps: Sequence[float], method: str, parts: Sequence[Any]) -> Tensor:
    """Return the states at the nodes by torch alone, as :class:`MLPRecord` has them in numpy.

    Gradients of gradients, :mod:`torch.func`, autocast and states of no rows need it.
    """
    (*hidden, output), (*inner, shift), scales, residual, (below, above) = parts
    calls = count()

    def velocity(x: Tensor) -> Tensor:
        e, h = next(calls), x
        for w, b, a, adds in zip(hidden, inner, scales, residual, strict=True):
            s = a[e] * nn.functional.silu(h @ w.T + b[e])
            h = h + s if adds else s
        y = torch.cat((x * above, -x * below), -1).relu()
        return (h @ output.T + shift[e]) / (1 + y.pow(4).sum(-1, keepdim=True)).pow(0.25)

    return torch.stack(_states(velocity, x, gaps, method))


class _RecordedContext(FunctionCtx):
    """What the forward pass of :class:`_Recorded` keeps for the backward pass."""

    saved_tensors: tuple[Tensor, ...]  # x and the weights
    record: Record
    gaps: Sequence[float]
    method: str
    solve: StateFunction


class _Recorded(torch.autograd.Function):
    """The solve of :func:`recorded_solve`."""

    @staticmethod
    def forward(
        ctx: _RecordedContext,
        x: Tensor,
        record: Record,
        gaps: Sequence[float],
        method: str,
        solve: StateFunction,
    ) -> Tensor:
        with np.errstate(all="ignore"):  # as torch
            start = x.detach().reshape(-1, x.shape[-1]).numpy()
            record.begin(len(start))
            states = _states(record, start, gaps, method)
            record.linearize()
        ctx.save_for_backward(x, *record.weights)  # which notices a change of theirs
        ctx.record, ctx.gaps, ctx.method, ctx.solve = record, gaps, method, solve
        return torch.from_numpy(np.stack(states)).reshape(-1, *x.shape)

    @staticmethod
    def backward(
        ctx: _RecordedContext, *cotangents: Tensor
    ) -> tuple[Tensor, None, None, None, None]:
        (g,), (x, *_) = cotangents, ctx.saved_tensors
        again = torch.is_grad_enabled()  # the gradient is to be differentiated itself
        if again or is_batch_of_gradients(g):
            with torch.enable_grad():
                leaf = x if again else x.detach().requires_grad_()
                states = ctx.solve(leaf)
            (gradient,) = torch.autograd.grad(states, leaf, g, create_graph=again)
        else:
            with np.errstate(all="ignore"):
                rows = g.reshape(len(g), -1, g.shape[-1]).numpy()
                start = _pulled(ctx.record, rows, ctx.gaps, ctx.method)
            gradient = torch.from_numpy(start).reshape(x.shape)
        return gradient, None, None, None, None


def _states(
    velocity: Callable[[_Values], _Values], x: _Values, gaps: Sequence[float], method: str
) -> list[_Values]:
    """Return the states at the nodes, each ``(R, D)``, of a velocity at the stages in order."""
    _, a, b = TABLEAUS[method]
    states = [x]
    for h in gaps:
        slopes: list[_Values] = []
        for row in a:
            slopes.append(velocity(_step(x, h, row, slopes)))
        x = _step(x, h, b, slopes)
        states.append(x)
    return states


def _step(x: _Values, h: float, weights: Sequence[float], slopes: Sequence[_Values]) -> _Values:
    """Return ``x + h sum_i weights_i slopes_i``, shape ``(R, D)``."""
    for w, k in zip(weights, slopes, strict=True):
        if w:
            x = x + (h * w) * k
    return x


def _pulled(record: Record, g: Array, gaps: Sequence[float], method: str) -> Array:
    """Return the cotangent of the first state, ``(R, D)``, from all, ``(N + 1, R, D)``."""
    _, a, b = TABLEAUS[method]
    stages, at_end = len(b), g[-1]
    for n in range(len(gaps) - 1, -1, -1):
        h, total = gaps[n], at_end + g[n]
        of_stages: list[Array] = []  # from the last stage to the first
        for i in range(stages - 1, -1, -1):
            k = (h * b[i]) * at_end
            for row, u in zip(a[:i:-1], of_stages, strict=True):
                if row[i]:
                    k += (h * row[i]) * u
            of_stages.append(record.pull(n * stages + i, k))
            total += of_stages[-1]
        at_end = total
    return at_end


_OPERATION = _operation()
