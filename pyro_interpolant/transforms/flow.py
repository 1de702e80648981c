r"""The numerics of a flow: its velocity, its whitening map, and one way through them.

``y = loc + L w_1`` where :math:`\dot w = v_t(w)` starts at the input ``w_0`` and L whitens the
data. The solver stores the states at the quadrature nodes; the log-determinant is one weighted sum
of divergences along them, computed when somebody asks.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import is_tracing, keep_freed_memory, recomputed
from ..interpolants.linear import Interpolant, Trigonometric
from ..nn.velocity import check_velocity, evaluate
from ..solvers.divergence import Divergence, ExactDivergence
from ..solvers.ode import Field, FixedGrid, Solver, is_alone, through_nodes

__all__ = ["Flow", "Path"]


_KEPT_BYTES = 2**26  # a trajectory above 64 MiB is not kept
_ROWS = 512  # without gradients, rows solved, or rows times nodes differentiated, at once


class Path(NamedTuple):
    """One way through a flow: given what, until when, and computed how.

    Attributes:
        context: The context, shape ``(*, C)``, or None.
        end: The time in [0, 1] at which the path stops.
        solver: How it is integrated.
        divergence: How the rate of its log-determinant is computed.
    """

    context: Tensor | None
    end: float
    solver: Solver
    divergence: Divergence

    def times(self) -> tuple[Tensor, Tensor]:
        """Return the nodes on [0, end] and their weights, each of shape ``(N + 1,)``."""
        if self.end == 0.0:
            return torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        nodes, weights = self.solver.grid()
        return nodes * self.end, weights * self.end


class Flow(nn.Module):
    """What a transform and a conditional one both own: velocity, whitening map, three choices.

    Args:
        velocity: Any module with ``forward(t, x, context=None)``.
        event_dim: D. By default ``velocity.event_dim``.
        interpolant: The path the velocity is trained for. By default trigonometric.
        solver: By default a fixed grid.
        divergence: By default exact.
        **kwargs: For the next class in line.

    Raises:
        ValueError: If the size D is not known, or the velocity couples rows (batch normalisation).
        TypeError: If the velocity is not a module, or a Pyro module with random weights.
    """

    loc: Tensor
    linear: Tensor
    whitening: Tensor
    linear_log_det: Tensor

    def __init__(
        self,
        velocity: nn.Module,
        event_dim: int | None = None,
        *,
        interpolant: Interpolant | None = None,
        solver: Solver | None = None,
        divergence: Divergence | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_velocity(velocity)
        dim = getattr(velocity, "event_dim", None) if event_dim is None else event_dim
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(
                "expected event_dim, the size of the last dimension of x: pass "
                f"{type(self).__name__}(velocity, event_dim) or give the velocity an attribute "
                f"event_dim; got {dim!r}"
            )
        self.dim = dim
        self.velocity = velocity
        self.noise: nn.Module | None = None  # E[z | w_t], where fit(learn="noise") trained it
        self.independent = True  # whether training paired base and data at random
        self.interpolant = Trigonometric() if interpolant is None else interpolant
        self.solver = FixedGrid() if solver is None else solver
        self.divergence = ExactDivergence() if divergence is None else divergence
        like = next(velocity.parameters(), torch.zeros(()))
        eye = torch.eye(dim, dtype=like.dtype, device=like.device)
        self.register_buffer("loc", torch.zeros_like(eye[0]))
        self.register_buffer("linear", eye)
        self.register_buffer("whitening", eye.clone())
        self.register_buffer("linear_log_det", torch.zeros_like(eye[0, 0]))

    def precondition(self, loc: Tensor, linear: Tensor, whitening: Tensor | None = None) -> None:
        r"""Set the affine map :math:`y = \mathrm{loc} + L w` between whitened and data space.

        Args:
            loc: The centre, shape ``(D,)``.
            linear: The invertible map L, shape ``(D, D)``.
            whitening: Its inverse, shape ``(D, D)``; computed in float64 if not given.

        Raises:
            ValueError: If a shape is wrong, or L is not invertible or not finite.
        """
        if loc.shape != (self.dim,) or linear.shape != (self.dim, self.dim):
            raise ValueError(
                f"expected loc of shape ({self.dim},) and linear of shape "
                f"({self.dim}, {self.dim}), got {tuple(loc.shape)} and {tuple(linear.shape)}"
            )
        if whitening is None:
            whitening, info = torch.linalg.inv_ex(linear.double())
            if info.item() or not bool(torch.isfinite(whitening).all()):
                raise ValueError("expected an invertible linear map, got a singular one")
        with torch.no_grad():
            self.loc.copy_(loc)
            self.linear.copy_(linear)
            self.whitening.copy_(whitening)
            self.linear_log_det.copy_(torch.linalg.slogdet(linear.double()).logabsdet)

    def to_white(self, y: Tensor) -> Tensor:
        """Return whitened coordinates of data coordinates, each of shape ``(*, D)``."""
        return (y - self.loc) @ self.whitening.T

    def from_white(self, white: Tensor) -> Tensor:
        """Return data coordinates of whitened coordinates, each of shape ``(*, D)``."""
        return self.loc + white @ self.linear.T

    def integrate(self, white: Tensor, path: Path, *, forward: bool) -> Tensor:
        """Return the whitened states at the nodes, ascending in time, shape ``(N + 1, *, D)``.

        Args:
            white: The state at time 0 (``forward``) or at the path's end, shape ``(*, D)``.
            path: The way through the flow.
            forward: Whether ``white`` is the first state or the last.
        """
        if path.end == 0.0:
            return white[None]
        times, _ = path.times()
        field = self._field(path.context)

        def solve(white: Tensor) -> Tensor:
            if forward:
                return path.solver.solve(field, white, times)
            return path.solver.solve(field, white, times.flip(0)).flip(0)

        adjoint = getattr(path.solver, "adjoint", False)
        if not (adjoint and is_alone(white, (path.context, *self.parameters()))):
            return solve(white)
        q = path.end * path.solver.matrix()  # type: ignore[attr-defined]
        q = (q if forward else q - q[-1]).to(white)
        at = times.to(white).reshape(-1, *[1] * (white.dim() - 1))
        rate = partial(evaluate, self.velocity, at, context=path.context)
        return through_nodes(solve, rate, q, white)

    def log_det(self, states: Tensor, path: Path) -> Tensor:
        """Return the integral of the divergence along the states, plus log |det L|, shape ``(*)``.

        Args:
            states: The whitened states at the path's nodes, shape ``(N + 1, *, D)``.
            path: The way through the flow.
        """
        if path.end == 0.0:
            return self.linear_log_det.expand(states.shape[1:-1])
        times, weights = (s.to(states) for s in path.times())
        again = getattr(path.solver, "checkpoint", False)
        small = (again or not self._needs_graph(states, path)) and not is_tracing()
        rate = self._rate(path, again)
        if not small:
            shape = (-1,) + (1,) * (states.dim() - 2)
            together = rate(times.reshape(shape), states, path.context)
            return self.linear_log_det + torch.tensordot(weights, together, dims=1)
        # In pieces that stay in the processor's cache.
        at_once = getattr(self.velocity, "rows_at_once", lambda: _ROWS)()
        rows, context = _flat(states[0], path.context)
        totals = []
        for part, own in _pieces(states.reshape(len(times), *rows.shape), context, at_once):
            nodes = max(1, at_once // part.shape[1])
            if nodes == 1:
                rates: Any = self._rates(path._replace(context=own), times, again)
            else:
                rates = [lambda s, t=t: rate(t[:, None], s, own) for t in times.split(nodes)]  # noqa: B023
            total = self.linear_log_det
            for s, f, w in zip(part.split(nodes), rates, weights.split(nodes), strict=True):
                total = total + torch.tensordot(w, f(s), dims=1)
            totals.append(total)
        return torch.cat(totals).reshape(states.shape[1:-1])

    def trajectory(
        self, white: Tensor, path: Path, *, forward: bool, density: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return the states as :meth:`integrate`, in chunks of rows where no graph is needed.

        A trajectory too large to keep is reduced to its two ends, shape ``(2, *, D)``; its
        log-determinant is then computed on the way.

        Args:
            white: The state at one end, shape ``(*, D)``.
            path: The way through the flow.
            forward: Whether ``white`` is the first state or the last.
            density: Whether the log-determinant will be asked for.

        Returns:
            The states, and the log-determinant, shape ``(*)``, where it had to be computed here.
        """
        keep_freed_memory()
        row_bytes = len(path.times()[0]) * self.dim * white.element_size()
        rows = white.numel() // self.dim
        at_once = min(_ROWS, max(1, _KEPT_BYTES // row_bytes))
        whole = self._needs_graph(white, path) or rows <= at_once
        if whole or is_tracing():
            return self.integrate(white, path, forward=forward), None
        keep = rows * row_bytes <= _KEPT_BYTES
        flat, context = _flat(white, path.context)
        states, log_dets = [], []
        for part, own in _pieces(flat[None], context, at_once):
            piece = path._replace(context=own)
            chunk = self.integrate(part[0], piece, forward=forward)
            if density and not keep:
                log_dets.append(self.log_det(chunk, piece))
            states.append(chunk if keep else chunk[[0, -1]])
        joined = torch.cat(states, dim=1).reshape(-1, *white.shape)
        return joined, torch.cat(log_dets).reshape(white.shape[:-1]) if log_dets else None

    def _rate(self, path: Path, again: bool) -> Callable[..., Tensor]:  # noqa: FBT001
        """Return the rate of the log-determinant as a function of time, state and context."""

        def rate(t: Tensor, s: Tensor, context: Tensor | None) -> Tensor:
            return path.divergence(self.velocity, t, s, context)

        return recomputed(rate) if again else rate

    def _rates(
        self,
        path: Path,
        times: Tensor,
        again: bool,  # noqa: FBT001
    ) -> list[Callable[[Tensor], Tensor]]:
        """Return the rate at each time as a function of the state."""
        field = getattr(path.divergence, "field", None)
        if field is None:
            rate = self._rate(path, again)
            return [lambda s, t=t: rate(t, s, path.context) for t in times.unbind()]  # type: ignore[misc]
        rates = field(self.velocity, times, path.context)
        return [recomputed(f) for f in rates] if again else rates

    def _needs_graph(self, states: Tensor, path: Path) -> bool:
        sources = (states, path.context, *self.parameters())
        return torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in sources)

    def _field(self, context: Tensor | None) -> Field:
        own = getattr(self.velocity, "field", None)
        if own is not None:
            return lambda times: own(times, context)
        return lambda times: [
            lambda x, t=t: evaluate(self.velocity, t, x, context)  # type: ignore[misc]
            for t in times.unbind()
        ]


def _flat(rows: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return rows, shape ``(R, D)``, and their contexts, ``(R, C)`` where they have their own."""
    if context is not None and context.dim() > 1:
        context = context.expand(rows.shape[:-1] + context.shape[-1:]).flatten(0, -2)
    return rows.reshape(-1, rows.shape[-1]), context


def _pieces(
    states: Tensor, context: Tensor | None, size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield states of shape ``(T, <= size, D)`` and the contexts of their rows."""
    for i, part in enumerate(states.split(size, dim=1)):
        own = context is not None and context.dim() > 1
        yield part, context[i * size : (i + 1) * size] if own else context  # type: ignore[index]
