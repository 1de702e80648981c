r"""Solvers of :math:`\dot x = v_t(x)`: from a velocity to the states at the quadrature nodes.

A solver integrates the velocity *alone*: the divergence does not feed back into x, so it is
evaluated afterwards, along the stored states, where a density is computed.

- :class:`FixedGrid` takes one Runge-Kutta step, :math:`x + h \sum_i b_i k_i` with
  :math:`k_i = v_{t + c_i h}(x + h \sum_j a_{ij} k_j)`, per gap between Clenshaw-Curtis nodes.
- :class:`RandomGrid` takes the same steps between random nodes, whose quadrature is unbiased. Any
  solver reports at such nodes while weights are trained through it, see :func:`random_nodes`.
- :class:`Adaptive` chooses its steps by torchdiffeq, and reports at the nodes.
- :func:`through_nodes` gives a solve the gradient of the differential equation: with J the
  Jacobians of the velocity at the nodes and Q the integration matrix, the states obey
  :math:`\delta x_n = \delta x_0 + \sum_m Q_{nm} J_m \delta x_m`, one linear system.

A field is a function from times, shape ``(T,)``, to T functions ``x -> v``: a velocity that knows
all its times in advance can share work between them.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeGuard

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from torchdiffeq import odeint

from .._package import check_ranges, keep_whole, number
from .._torch import (
    constant,
    is_abstract,
    is_functional,
    is_tracing,
    needs_graph,
    recomputed,
)
from ..nn.velocity import Field, StateFunction
from .quadrature import clenshaw_curtis, integration_matrix, random_offsets
from .tableaus import TABLEAUS

_ADAPTIVE = ("dopri5", "dopri8", "bosh3", "fehlberg2", "adaptive_heun", "scipy_solver")
_VALUES_AT_ONCE = 2**24  # of the matrices of linear systems


def _nodes(steps: int, warp: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the nodes on [0, 1] and their weights as tensors, shape ``(N + 1,)``."""
    nodes, weights = clenshaw_curtis(steps, warp)
    return constant(nodes), constant(weights)


def _check_method(method: object, known: Collection[str]) -> None:
    if method not in known:
        raise ValueError(f"expected a method among {sorted(known)}, got {method!r}")


class Solver(Protocol):
    """An integrator of a velocity: ``grid()`` on [0, 1], and ``solve`` between its nodes."""

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return the nodes on [0, 1] and their quadrature weights, each of shape ``(N + 1,)``."""
        ...

    def solve(self, field: Field, x: Tensor, times: Tensor) -> Tensor:
        """Return the states at ``times``, ``(N + 1, *, D)``, starting from x at the first."""
        ...


@dataclass(frozen=True)
class _RungeKutta:
    """One step of an explicit Runge-Kutta method per gap between the nodes of ``grid()``."""

    steps: int
    method: str = "rk4"
    checkpoint: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the choice."""
        keep_whole(self, steps=1)
        _check_method(self.method, TABLEAUS)

    def solve(self, field: Field, x: Tensor, times: Tensor) -> Tensor:
        """Return the states at ``times``, ``(N + 1, *, D)``, starting from x at the first.

        Args:
            field: The velocity, as a function from times to functions of x.
            x: The state at ``times[0]``, shape ``(*, D)``.
            times: Ascending or descending, shape ``(N + 1,)``.
        """
        c, a, b = TABLEAUS[self.method]
        gaps = times.diff()
        # Equal stage times are evaluated once: rk4 needs its midpoint twice.
        distinct = sorted(set(c))
        stage_times = times[:-1, None] + gaps[:, None] * times.new_tensor(distinct)
        stages = field(stage_times.reshape(-1).to(x))
        if self.checkpoint:
            stages = [recomputed(stage) for stage in stages]
        states = [x]
        # As numbers they save a kernel each; a tracer may draw them anew, a compiler has none, and
        # inside torch.func some versions of torch cannot read them.
        as_tensors = is_tracing() or is_functional()
        for i, h in enumerate(gaps.to(x).unbind() if as_tensors else gaps.tolist()):
            slopes: list[Tensor] = []
            for cj, row in zip(c, a, strict=True):
                f = stages[i * len(distinct) + distinct.index(cj)]
                slopes.append(f(_step(x, h, row, slopes)))
            x = _step(x, h, b, slopes)
            states.append(x)
        return torch.stack(states)


def takes_own_steps(solver: object) -> TypeGuard[_RungeKutta]:
    """Return whether a solver takes the steps written here: none of the user's, nor adaptive."""
    return getattr(type(solver), "solve", None) is _RungeKutta.solve


def _step(
    x: Tensor, h: float | Tensor, weights: Sequence[float], slopes: Sequence[Tensor]
) -> Tensor:
    """Return ``x + h sum_i weights_i slopes_i``, shape ``(*, D)``."""
    for w, k in zip(weights, slopes, strict=True):
        if w:
            x = x + (h * w) * k if isinstance(h, Tensor) else torch.add(x, k, alpha=h * w)
    return x


@dataclass(frozen=True)
class FixedGrid(_RungeKutta):
    r"""Integrate with one Runge-Kutta step per gap between the quadrature nodes.

    Rows never influence one another, so the density of a row does not depend on its batch: plates
    and HMC rely on it.

    Args:
        steps: The number N of steps; :func:`~pyro_interpolant.calibrate` chooses it by error.
        method: ``"rk4"`` (4 evaluations a step), ``"midpoint"`` or ``"heun"`` (2), or ``"euler"``
            (1).
        warp: How far the nodes move toward the data end, see
            :func:`~pyro_interpolant.solvers.clenshaw_curtis`.
        checkpoint: Whether the backward pass recomputes each evaluation instead of storing all of
            them: the same gradients, about a third slower, in a fraction of the memory.
        adjoint: Whether gradients in x alone, with frozen weights, are those of the differential
            equation, from one linear system over all nodes. With networks of one's own, for HMC
            over one vector in about half the time, for more than some twenty numbers (rows times
            D) in more. They differ from those of the discretisation by its error, which leaves HMC
            exact. Of few rows, those of the package's networks are faster without, and exact.

    Raises:
        ValueError: If ``steps`` is not whole or below 1, ``method`` unknown or ``warp`` outside
            [0, 1).

    Example:
        >>> grid = FixedGrid(steps=8)
        >>> times, _ = grid.grid()
        >>> decay = lambda times: [lambda x: -x] * len(times)
        >>> states = grid.solve(decay, torch.ones(1, dtype=torch.float64), times)
        >>> bool((states[-1] - torch.tensor(-1.0).double().exp()).abs() < 1e-5)
        True
    """

    steps: int = 20
    warp: float = 0.0
    adjoint: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the choice."""
        super().__post_init__()
        clenshaw_curtis(self.steps, self.warp)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return the nodes on [0, 1] and their quadrature weights, each of shape ``(N + 1,)``."""
        return _nodes(self.steps, self.warp)

    def matrix(self) -> Tensor:
        """Return the matrix that integrates from 0 to each node, shape ``(N + 1, N + 1)``."""
        return constant(integration_matrix(self.steps, self.warp))


@dataclass(frozen=True)
class Adaptive:
    r"""Integrate with torchdiffeq's adaptive steps, reporting at the quadrature nodes.

    The step sizes are chosen for the batch as a whole, so a row's density depends slightly, within
    the solver's error, on the rows beside it: use it to check, and :class:`FixedGrid` inside
    inference. That error is larger than the tolerances, which are those of a step, and grows with
    sharpness: by default log_prob was off by up to 0.007 nats where a part of a mixture had a
    standard deviation of 0.3, by 0.03 and 1 where of 0.03 and 0.003. To check, tighten them, and
    take more nodes, which bound the error of the integral: ``Adaptive(1e-8, 1e-8, nodes=256)``.

    Args:
        rtol: The relative tolerance.
        atol: The absolute tolerance, in whitened units.
        method: One of torchdiffeq's adaptive methods: ``"dopri5"``, ``"dopri8"``, ``"bosh3"``,
            ``"fehlberg2"``, ``"adaptive_heun"``, or ``"scipy_solver"``, whose states
            have no gradient: a backward pass through them, or forward mode, raises a ValueError.
            States at the nodes are interpolated within steps; those of ``"dopri8"`` and
            ``"bosh3"``, whose interpolants are of a lower order than their steps, may be off by a
            thousand times the tolerance (1e-6 at 1e-9).
        nodes: The number of gaps between the quadrature nodes.
        checkpoint: As in :class:`FixedGrid`.

    Raises:
        ValueError: If a tolerance is not positive, ``method`` is unknown or not adaptive, or
            ``nodes`` is not whole or below 1.
    """

    rtol: float = 1e-5
    atol: float = 1e-5
    method: str = "dopri5"
    nodes: int = 32
    checkpoint: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        """Check the choice."""
        both = self.rtol, self.atol
        check_ranges(*(number("positive tolerances", each, lambda n: n > 0) for each in both))
        _check_method(self.method, _ADAPTIVE)
        keep_whole(self, nodes=1)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return the nodes on [0, 1] and their quadrature weights, each of shape ``(N + 1,)``."""
        return _nodes(self.nodes)

    def solve(self, field: Field, x: Tensor, times: Tensor) -> Tensor:
        """Return the states at ``times``, ``(N + 1, *, D)``, starting from x at the first.

        Args:
            field: The velocity, as a function from times to functions of x.
            x: The state at ``times[0]``, shape ``(*, D)``.
            times: Strictly ascending or descending, shape ``(N + 1,)``.

        Raises:
            ValueError: If the velocity is too stiff or not finite, times are not as above, or the
                values are not known, inside :mod:`torch.func` or a tracer, or have tangents, which
                scipy would drop.
        """
        if is_abstract():
            raise ValueError(
                "expected a FixedGrid under torch.func or a tracer, got Adaptive, "
                "whose steps depend on the values: set transform.solver = FixedGrid(), or "
                "calibrate the distribution, which chooses its steps"
            )
        if x.numel() == 0:  # no error to choose steps by
            return x.expand(len(times), *x.shape)
        times = times.to(x)
        gaps = times.diff()
        if len(times) == 0 or not bool((gaps > 0).all() | (gaps < 0).all()):
            raise ValueError(
                "expected one time or more, ascending or descending without a repetition, got "
                f"{times.tolist()}"
            )
        if len(times) == 1:
            return x[None]

        seen = x

        def rate(t: Tensor, x: Tensor) -> Tensor:
            nonlocal seen
            stage = field(t[None])[0]
            seen = recomputed(stage)(x) if self.checkpoint else stage(x)
            return seen

        try:
            tolerances = {"rtol": self.rtol, "atol": self.atol}
            states = odeint(rate, x, times, method=self.method, **tolerances)
        except AssertionError as error:
            raise ValueError(
                f"{self.method} gave up at rtol={self.rtol}, atol={self.atol} ({error}): the "
                f"velocity is not finite, or too stiff for {x.dtype}. Check the inputs for wild "
                "values, loosen the tolerances, use float64, or use FixedGrid."
            ) from error
        if self.method == "scipy_solver":
            seen = x + rate(times[0], x)
            if (tangent := forward_ad.unpack_dual(seen).tangent) is not None:
                _refuse_gradient(tangent)
            if needs_graph(seen):  # else gradients would leave the states out
                states = states + 0 * seen
                states.register_hook(_refuse_gradient)
        if type(seen) is not Tensor:  # states were written into a plain one, and Pyro's tags lost
            states = states + 0 * seen.detach()
        return states


def _refuse_gradient(gradient: Tensor) -> None:
    """Raise a ValueError, for the gradient or tangent of states that scipy computed, any shape."""
    raise ValueError(
        "expected a solver with gradients, got Adaptive(method='scipy_solver'), through whose "
        "states there are none: set transform.solver = Adaptive(method='dopri5'), or FixedGrid()"
    )


def random_nodes(steps: int, seed: int) -> tuple[Tensor, Tensor]:
    r"""Return random nodes on [0, 1], one in each of N equal pieces, and their weights.

    With nodes :math:`t_j = (j + u_j) / N`, :math:`u_j \sim U(0, 1)`, and equal weights, the
    log-determinant :math:`\frac1N \sum_j \nabla \cdot v_{t_j}` is unbiased: over seeds, its error
    averages out. So training through the solver cannot profit from it, whereas a velocity learns
    to peak between the nodes of a quadrature that stays.

    Args:
        steps: The number N of pieces of time.
        seed: Of the nodes. A tracer records draws of the global generator instead, so that what
            it has recorded draws its nodes anew at each call.

    Returns:
        Ascending nodes that begin with 0 and end with 1, and their quadrature weights, zero at the
        ends, each of shape ``(N + 2,)``.
    """
    if is_tracing():
        offsets = torch.rand(steps, dtype=torch.float64)
    else:  # by numpy: torch.func.vmap refuses random numbers of torch's
        offsets = torch.from_numpy(random_offsets(steps, seed))
    pieces = torch.arange(steps, dtype=offsets.dtype, device=offsets.device)
    nodes = (pieces + offsets) / steps
    weights = torch.full_like(offsets, 1 / steps)
    pad = torch.nn.functional.pad
    return pad(pad(nodes, (1, 0)), (0, 1), value=1.0), pad(weights, (1, 1))


@dataclass(frozen=True)
class RandomGrid(_RungeKutta):
    r"""Integrate between random nodes, one in each of N equal pieces of time.

    The nodes are those of :func:`random_nodes`, whose quadrature is unbiased over seeds. For one
    seed they are always the same, and a density is a function.

    A flow whose weights are being trained draws such nodes by itself, whatever its solver; as a
    solver of one's own this is for studying what they cost.

    Args:
        steps: The number N of pieces of time.
        method: As in :class:`FixedGrid`.
        seed: Of the nodes.
        checkpoint: As in :class:`FixedGrid`.

    Raises:
        ValueError: If ``steps`` or ``seed`` is not whole, or below 1 or 0, or ``method`` unknown.

    Example:
        >>> nodes, weights = RandomGrid(steps=4, seed=0).grid()
        >>> (nodes[1:-1] * 4).long().tolist(), weights.tolist()
        ([0, 1, 2, 3], [0.0, 0.25, 0.25, 0.25, 0.25, 0.0])
    """

    seed: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        """Check the choice."""
        super().__post_init__()
        keep_whole(self, seed=0)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Return the nodes on [0, 1] and their quadrature weights, each of shape ``(N + 2,)``."""
        return random_nodes(self.steps, self.seed)


def through_nodes(solve: StateFunction, rate: StateFunction, q: Tensor, x: Tensor) -> Tensor:
    """Return ``solve(x)``, with the gradient in x from the states at the nodes.

    The gradient is that of the differential equation, not of its discretisation: the two agree to
    the solver's error. Where it is to be differentiated again, it is that of the discretisation.

    Args:
        solve: From x, shape ``(*, D)``, to the states at the nodes, ``(N + 1, *, D)``.
        rate: From states, ``(*, N + 1, *, D)``, to their velocities.
        q: The integration matrix from the node at which x is, ``(N + 1, N + 1)``.
        x: The state at one end.
    """
    return _ThroughNodes.apply(x, solve, rate, q)


class _ThroughContext(FunctionCtx):
    """What the forward pass of :class:`_ThroughNodes` keeps for the backward pass."""

    saved_tensors: tuple[Tensor, ...]  # x and the states at the nodes
    solve: StateFunction
    rate: StateFunction
    q: Tensor


class _ThroughNodes(torch.autograd.Function):
    """The solve of :func:`through_nodes`, whose backward pass is one linear system."""

    @staticmethod
    def forward(
        ctx: _ThroughContext, x: Tensor, solve: StateFunction, rate: StateFunction, q: Tensor
    ) -> Tensor:
        states = solve(x)
        ctx.save_for_backward(x, states)
        ctx.solve, ctx.rate, ctx.q = solve, rate, q
        return states

    @staticmethod
    def backward(ctx: _ThroughContext, *cotangents: Tensor) -> tuple[Tensor, None, None, None]:
        (g,) = cotangents
        x, states = ctx.saved_tensors
        if torch.is_grad_enabled():  # the gradient is to be differentiated itself
            (gradient,) = torch.autograd.grad(ctx.solve(x), x, g, create_graph=True)
            return gradient, None, None, None
        jacobians = _jacobians(ctx.rate, states)
        nodes, dim = len(states), states.shape[-1]
        shape = (nodes, -1, dim)
        j, g = jacobians.reshape(dim, *shape), g.reshape(shape)
        at_once = max(1, _VALUES_AT_ONCE // (nodes * dim) ** 2)
        parts = zip(j.split(at_once, dim=2), g.split(at_once, dim=1), strict=True)
        start = torch.cat([_pulled(*part, ctx.q) for part in parts])
        return start.reshape(x.shape), None, None, None


def _jacobians(rate: StateFunction, states: Tensor) -> Tensor:
    """Return the derivatives of velocity i by coordinate j, shape ``(D, N + 1, *, D)``."""
    dim = states.shape[-1]
    with torch.enable_grad():
        copies = states.detach().expand(dim, *states.shape).clone().requires_grad_()
        own = rate(copies).diagonal(dim1=0, dim2=-1).sum()  # of copy i, velocity i
    return torch.autograd.grad(own, copies)[0]


def _pulled(j: Tensor, g: Tensor, q: Tensor) -> Tensor:
    """Return the cotangents of the first state, ``(R, D)``, from those ``g`` of all states."""
    nodes, rows, dim = g.shape
    system = -torch.einsum("mn,inrj->rnjmi", q, j).reshape(rows, nodes * dim, nodes * dim)
    system.diagonal(dim1=-2, dim2=-1).add_(1)
    solution = torch.linalg.solve(system, g.transpose(0, 1).reshape(rows, nodes * dim))
    return solution.reshape(rows, nodes, dim).sum(1)
