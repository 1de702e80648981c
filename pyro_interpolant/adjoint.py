r"""Gradients of a solve without its graph: one linear system over all nodes.

The states at the nodes satisfy :math:`x_n = x_0 + \sum_m Q_{nm} v_{t_m}(x_m)`, up to the error of
quadrature, with the integration matrix Q. Cotangents g of the states therefore belong to
:math:`\sum_n \lambda_n` at the start, where :math:`\lambda_n - \sum_m Q_{mn} J_n^T \lambda_m =
g_n` and :math:`J_n` is the Jacobian of the velocity at node n. All Jacobians are one batch of
``(N + 1) D`` rows: for few rows of x this takes a fraction of the time of going back through the
stages one by one.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from .scopes import is_transformed

__all__ = ["is_alone", "through_nodes"]

_ELEMENTS = 2**24  # of the systems solved at once


def is_alone(x: Tensor, others: Iterable[Tensor | None]) -> bool:
    """Return whether plain gradients are asked for, in x and in none of the others."""
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and not any(s is not None and s.requires_grad for s in others)
        and not is_transformed()
    )


def through_nodes(
    solve: Callable[[Tensor], Tensor], rate: Callable[[Tensor], Tensor], q: Tensor, x: Tensor
) -> Tensor:
    """Return ``solve(x)``, whose gradient in x goes through the nodes alone.

    The gradient is that of the differential equation, not of its discretisation: the two agree to
    the solver's error. Where it is to be differentiated again, it is that of the discretisation.

    Args:
        solve: From x, shape ``(*, D)``, to the states at the nodes, ``(N + 1, *, D)``.
        rate: From states, ``(*, N + 1, *, D)``, to their velocities.
        q: The integration matrix from the node at which x is, ``(N + 1, N + 1)``.
        x: The state at one end.
    """
    return _ThroughNodes.apply(x, solve, rate, q)


class _ThroughNodes(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        solve: Callable[[Tensor], Tensor],
        rate: Callable[[Tensor], Tensor],
        q: Tensor,
    ) -> Tensor:
        states = solve(x)
        ctx.save_for_backward(x, states)
        ctx.solve, ctx.rate, ctx.q = solve, rate, q
        return states

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None, None, None]:
        (g,) = cotangents
        x, states = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody will differentiate the gradient
            (gradient,) = torch.autograd.grad(ctx.solve(x), x, g, create_graph=True)
            return gradient, None, None, None
        jacobians = _jacobians(ctx.rate, states)
        nodes, dim = len(states), states.shape[-1]
        shape = (nodes, -1, dim)
        j, g = jacobians.reshape(dim, *shape), g.reshape(shape)
        at_once = max(1, _ELEMENTS // (nodes * dim) ** 2)
        parts = zip(j.split(at_once, dim=2), g.split(at_once, dim=1), strict=True)
        start = torch.cat([_pulled(*part, ctx.q) for part in parts])
        return start.reshape(x.shape), None, None, None


def _jacobians(rate: Callable[[Tensor], Tensor], states: Tensor) -> Tensor:
    """Return the derivatives of velocity i by coordinate j, shape ``(D, N + 1, *, D)``."""
    dim = states.shape[-1]
    with torch.enable_grad():
        copies = states.detach().expand(dim, *states.shape).clone().requires_grad_()
        own = rate(copies).diagonal(dim1=0, dim2=-1).sum()  # of copy i, velocity i
    return torch.autograd.grad(own, copies)[0]


def _pulled(j: Tensor, g: Tensor, q: Tensor) -> Tensor:
    """Return the cotangents of the start, ``(R, D)``, from those of the states."""
    nodes, rows, dim = g.shape
    system = -torch.einsum("mn,inrj->rnjmi", q, j).reshape(rows, nodes * dim, nodes * dim)
    system.diagonal(dim1=-2, dim2=-1).add_(1)
    solution = torch.linalg.solve(system, g.transpose(0, 1).reshape(rows, nodes * dim))
    return solution.reshape(rows, nodes, dim).sum(1)
