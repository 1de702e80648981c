r"""The numerics of a flow: states along its velocity, and its log-determinant.

The input ``w_0`` moves by :math:`\dot w = v_t(w)` to ``w_1``, and :math:`y = \mathrm{loc} + L w_1`
with L whitening the data. The solver stores the states at the quadrature nodes :math:`t_j`; then

.. math:: \log |\det \partial y / \partial w_0|
          = \log |\det L| + \sum_j q_j \, \nabla \cdot v_{t_j}(w_{t_j})

is one weighted sum along them, computed only where a density is wanted.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import repeat
from numbers import Integral
from typing import Any

import torch
from pyro.poutine.runtime import am_i_wrapped
from torch import Tensor, nn

from .._package import check_ranges, flag
from .._torch import (
    innermost,
    is_functional,
    is_reached_backward,
    is_tracing,
    is_transformed,
    needs_graph,
    recomputed,
    watching_the_first,
)
from ..interpolants.linear import Interpolant, Trigonometric
from ..nn.velocity import (
    StateFunction,
    check_velocity,
    evaluate,
    exact_divergence,
    field,
    images_at_once,
    keeps_nothing,
    record,
    rows_at_once,
    size_of,
)
from ..solvers.divergence import Divergence, ExactDivergence
from ..solvers.ode import (
    Adaptive,
    FixedGrid,
    Solver,
    random_nodes,
    takes_own_steps,
    through_nodes,
)
from ..solvers.parallel import side_by_side, threads_at_once
from ..solvers.recorded import recorded_solve, stage_times, traced_solve
from .whitening import DenseWhitening, Whitening

ROWS_PER_SOLVE = 2048  # the most, without gradients
_ROWS_APART = 512  # from more than so many on, blocks of rows are solved side by side
_MAX_KEPT_BYTES = 2**26  # of a trajectory that is kept: 64 MiB
_OWN_SOLVES = (FixedGrid.solve, Adaptive.solve)  # which draw nothing themselves
MOVED = -1  # in place of a fingerprint: weights have moved
_MIN_RANDOM_NODES = 12  # however few a solver needs for weights that are trained already


@dataclasses.dataclass(frozen=True)
class Path:
    """One way through a flow: its context, its end in time, and how it is computed.

    Attributes:
        context: The context, shape ``(*, C)``, or None.
        end: The time in [0, 1] at which the path stops.
        solver: How it is integrated.
        divergence: How the rate of its log-determinant is computed.
        seed: Of random nodes, for weights that are being trained, or None for those of the solver.
    """

    context: Tensor | None = dataclasses.field(compare=False)  # tensors have no one truth value
    end: float
    solver: Solver
    divergence: Divergence
    seed: int | None = None

    @property
    def times(self) -> tuple[Tensor, Tensor]:
        """The nodes on [0, end] and their weights, each of shape ``(N + 1,)``."""
        if "times" not in vars(self):  # no cached_property, whose lock compilers cannot take
            vars(self)["times"] = self._times()
        return vars(self)["times"]

    def _times(self) -> tuple[Tensor, Tensor]:
        if self.end == 0.0:
            return torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        nodes, weights = self.solver.grid()
        if self.seed is not None:
            nodes, weights = random_nodes(max(len(nodes) - 1, _MIN_RANDOM_NODES), self.seed)
        return nodes * self.end, weights * self.end

    def recomputes(self) -> bool:
        """Return whether gradients recompute each evaluation instead of keeping all of them."""
        return getattr(self.solver, "checkpoint", False)


class Flow(nn.Module):
    r"""A velocity in whitened coordinates, and the whitening map to those of the data.

    Args:
        velocity: A module with ``forward(t, x, context=None)``.
        event_dim: D. By default ``velocity.event_dim``.
        interpolant: The path the velocity is trained for. By default trigonometric.
        whitening: The map to data space, or, where the velocity is of another type or device, one
            to copy. By default dense, the identity until it is set.

    Attributes:
        noise: The network for :math:`E[z | w_t]`, where training has learned it, or None.
        independent: Whether training paired base and data at random.
        reached: A fingerprint of the weights that the gradient of a solve reached last, or None;
            :data:`MOVED` once such weights have moved.
        levels: L, where training spread whole levels of images over :math:`(v + u) / L`, u uniform
            on [0, 1); None where it was given other rows.

    Raises:
        ValueError: If the size D is not known, or the velocity is one for another, or couples
            rows (batch normalisation).
        TypeError: If the velocity is not a module, or a Pyro module with random weights.
    """

    def __init__(
        self,
        velocity: nn.Module,
        event_dim: int | None = None,
        *,
        interpolant: Interpolant | None = None,
        whitening: Whitening | None = None,
    ) -> None:
        super().__init__()
        check_velocity(velocity)
        own = size_of(velocity, "event_dim")
        size = own if event_dim is None else event_dim
        size = int(size) if isinstance(size, Integral) else size  # of numpy, too
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                "expected event_dim, the size of the last dimension of x: pass it after the "
                f"velocity, or give the velocity an attribute event_dim; got {size!r}"
            )
        if own not in (None, size):
            raise ValueError(
                f"expected a velocity for {size} dimensions, got {type(velocity).__name__} with "
                f"event_dim={own}"
            )
        self.event_dim = size
        self.velocity = velocity
        self.noise: nn.Module | None = None
        self.independent = True
        self.reached: int | None = None
        self.levels: int | None = None
        self.interpolant = Trigonometric() if interpolant is None else interpolant
        whitening = DenseWhitening(size) if whitening is None else whitening
        # A velocity without parameters states no type: a whitening then keeps its own.
        like = next(velocity.parameters(), whitening.loc)
        if (like.dtype, like.device) != (whitening.loc.dtype, whitening.loc.device):
            whitening = copy.deepcopy(whitening).to(like)  # another flow may have it, too
        self.whitening = whitening

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a path of numbers may take the place of a learned one, a module."""
        if name == "interpolant":
            self._modules.pop(name, None)
        super().__setattr__(name, value)

    @property
    def loc(self) -> Tensor:
        """The centre in data space, shape ``(D,)``; its type and device are the flow's."""
        return self.whitening.loc

    @property
    def context_dim(self) -> int | None:
        """C, the size of a context; None where the velocity has no ``context_dim``."""
        return 1 if self.classes else size_of(self.velocity, "context_dim")

    @property
    def classes(self) -> int:
        """K, where contexts are labels 0 to K - 1; else 0."""
        return size_of(self.velocity, "classes") or 0

    def node_seed(self) -> int | None:
        """Return a seed of random nodes where a gradient may reach the weights, else None.

        A density that is maximised in the weights would rise by errors of the quadrature, if its
        nodes stayed. The seed is a function of the weights, the bits of a sum over all of them: so
        the nodes change whenever the weights do, and a density remains a function of both.
        """
        if not torch.is_grad_enabled() or not any(p.requires_grad for p in self.parameters()):
            return None
        if is_tracing():
            return 0
        return self._bits()

    def was_trained_through_solver(self) -> bool:
        """Return whether weights have moved after a gradient reached them through a solve.

        A velocity that maximises a likelihood is not the mean of a path's rate. Only a new
        regression makes it one: not a later gradient, a copy, or another type or device. Weights
        that are loaded bring along what their state says of them.
        """
        if self.reached in (None, MOVED):
            return self.reached == MOVED
        return self.reached != self._bits()

    def _note_gradient(self, gradient: Tensor) -> None:
        """Note that a gradient runs back through a solve of these weights, if it reaches them."""
        if any(p.requires_grad and is_reached_backward(p) for p in self.parameters()):
            self.reached = MOVED if self.was_trained_through_solver() else self._bits()

    def _apply(self, fn: StateFunction, *args: bool, **kwargs: bool) -> "Flow":
        # Converted weights have another fingerprint: note whether they have moved, instead of it.
        self.set_history({})
        return super()._apply(fn, *args, **kwargs)

    def history(self) -> dict[str, bool]:
        """Return how its weights were trained, as far as is known, for what holds them."""
        return {"independent": self.independent, "moved": self.was_trained_through_solver()}

    def set_history(self, known: Mapping[str, object]) -> None:
        """Take over what :meth:`history` has told of the weights it has now.

        Raises:
            ValueError: If something is neither True nor False.
        """
        told = {name: known.get(name, value) for name, value in self.history().items()}
        check_ranges(*(flag(name, value) for name, value in told.items()))
        self.independent = told["independent"] is True
        self.reached = MOVED if told["moved"] else None

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, *args: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, *args)
        # Beside the tensors, where torch keeps the version of a module: states keep their names.
        getattr(destination, "_metadata", {}).get(prefix[:-1], {}).update(self.history())

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, object],
        *args: object,
    ) -> None:
        self.set_history(local_metadata)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _bits(self) -> int:
        """Return the bits of a sum over all weights, which tell these from others."""
        total = sum(innermost(p).detach().double().square().sum() for p in self.parameters())
        return abs(int(torch.as_tensor(total).cpu().view(torch.int64)))

    def integrate(self, white: Tensor, path: Path, *, forward: bool) -> Tensor:
        """Return the whitened states at the nodes, ascending in time, shape ``(N + 1, *, D)``.

        Args:
            white: The state at time 0 (``forward``) or at the path's end, shape ``(*, D)``.
            path: The way through the flow.
            forward: Whether ``white`` is the first state or the last.
        """
        if path.end == 0.0:
            return white[None]
        times, _ = path.times
        times = times if forward else times.flip(0)
        velocity_at = partial(field, self.velocity, context=path.context)

        def solve(white: Tensor) -> Tensor:
            # Of a traced model: other functions may be saved, to be called where this package is
            # not. A context may depend on what is sampled, and its gradient is asked for later.
            if path.context is None and am_i_wrapped():
                traced = traced_solve(self.velocity, path.solver, white, times)
                if traced is not None:
                    return traced
            if is_tracing() or getattr(type(path.solver), "solve", None) not in _OWN_SOLVES:
                return path.solver.solve(velocity_at, white, times)
            with watching_the_first() as watched:

                def watched_at(times: Tensor) -> list[StateFunction]:
                    return [watched(function) for function in velocity_at(times)]

                return path.solver.solve(watched_at, white, times)

        others = path.context, *self.parameters()
        if needs_graph(white) and not needs_graph(*others) and not is_transformed():
            states = self._solve_for_gradient(solve, white, path, times)
        else:
            states = solve(white)
        has_graph = states.requires_grad and not is_functional() and not is_tracing()
        if path.seed is not None and has_graph:
            states.register_hook(self._note_gradient)
        return states if forward else states.flip(0)

    def _solve_for_gradient(
        self, solve: StateFunction, white: Tensor, path: Path, times: Tensor
    ) -> Tensor:
        """Return the states at the times, with the cheapest gradient in the first of them.

        Args:
            solve: The solve, all of whose operations autograd sees.
            white: The first state, shape ``(*, D)``.
            path: The way through the flow.
            times: Its nodes, in the order of the solve, shape ``(N + 1,)``.
        """
        solver = path.solver
        if isinstance(solver, FixedGrid) and solver.adjoint:
            q = path.end * solver.matrix()
            q = (q if times[0] == 0 else (q - q[-1]).flip(0, 1)).to(white)
            at = times.to(white).reshape(-1, *[1] * (white.dim() - 1))
            rate = partial(evaluate, self.velocity, at, context=path.context)
            return through_nodes(solve, rate, q, white)
        if takes_own_steps(solver) and not (solver.checkpoint or is_tracing()):
            at = stage_times(times, solver.method).to(white)
            with torch.no_grad():
                kept = record(self.velocity, at, white, path.context)
            if kept is not None:
                return recorded_solve(kept, white, times, solver.method, solve)
        return solve(white)

    def log_det(self, states: Tensor, path: Path) -> Tensor:
        """Return the integral of the divergence along the states, plus log |det L|, shape ``(*)``.

        Args:
            states: The whitened states at the path's nodes, shape ``(N + 1, *, D)``.
            path: The way through the flow.
        """
        if path.end == 0.0:
            return self.whitening.log_det.expand(states.shape[1:-1]).clone()
        times, weights = (s.to(states) for s in path.times)
        if is_tracing() or (not path.recomputes() and self._needs_graph(states, path)):
            shape = (-1,) + (1,) * (states.dim() - 2)
            together = self._rate(times.reshape(shape), path)(states)
            return self.whitening.log_det + torch.tensordot(weights, together, dims=1)
        # In pieces that stay in the processor's cache.
        size = rows_at_once(self.velocity)

        def total(part: Tensor, own_path: Path) -> Tensor:
            part = part.contiguous()
            nodes = max(1, size // max(1, part[0, ..., 0].numel()))
            total = self.whitening.log_det
            rates = self._rates(times, nodes, own_path)
            pieces = zip(part.split(nodes), rates, weights.split(nodes), strict=True)
            with watching_the_first() as watched:
                for s, rate, w in pieces:
                    total = total + torch.tensordot(w, watched(rate)(s), dims=1)
            return total[None]

        # Forward mode lets one thread be at a time.
        is_own = isinstance(path.divergence, ExactDivergence) and exact_divergence(self.velocity)
        threads = self._blocks_at_once(states[0], path) if is_own else 1
        blocks = _Blocks(states, path, size, threads)
        return blocks.joined(side_by_side(total, blocks, threads=threads))[0]

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
            density: Whether the log-determinant will be needed.

        Returns:
            The states, and the log-determinant, shape ``(*)``, where it was computed here.
        """
        if is_tracing():
            return self.integrate(white, path, forward=forward), None
        _keep_freed_memory()
        row_bytes = len(path.times[0]) * self.event_dim * white.element_size()
        rows = white.numel() // self.event_dim
        most = min(
            images_at_once(self.velocity) or ROWS_PER_SOLVE, max(1, _MAX_KEPT_BYTES // row_bytes)
        )
        threads = self._blocks_at_once(white, path)
        if (threads == 1 and rows <= most) or self._needs_graph(white, path):
            return self.integrate(white, path, forward=forward), None
        keep = rows * row_bytes <= _MAX_KEPT_BYTES

        def solved(part: Tensor, own_path: Path) -> tuple[Tensor, Tensor | None]:
            chunk = self.integrate(part[0].contiguous(), own_path, forward=forward)
            if keep:
                return chunk, None
            log_det = self.log_det(chunk, own_path)[None] if density else None
            return chunk[[0, -1]], log_det

        blocks = _Blocks(white[None], path, most, threads)
        states, log_dets = zip(*side_by_side(solved, blocks, threads=threads), strict=True)
        has_density = density and not keep
        return blocks.joined(states), blocks.joined(log_dets)[0] if has_density else None

    def _blocks_at_once(self, white: Tensor, path: Path) -> int:
        """Return how many blocks of states, ``(*, D)``, are best computed side by side.

        One where few rows make short operations, between which threads of Python wait for one
        another, and where layers of images are as fast on torch's threads.
        """
        is_apart = (
            white.is_cpu
            and white.numel() > _ROWS_APART * self.event_dim
            and images_at_once(self.velocity) is None
            and keeps_nothing(self.velocity)
            and takes_own_steps(path.solver)
            and not (is_transformed() or torch.is_autocast_enabled(white.device.type))
        )
        return threads_at_once() if is_apart else 1

    def _rate(self, t: Tensor, path: Path) -> StateFunction:
        """Return the rate of the log-determinant at times t as a function of the states."""

        def rate(states: Tensor) -> Tensor:
            return path.divergence(self.velocity, t, states, path.context)

        return recomputed(rate) if path.recomputes() else rate

    def _rates(self, times: Tensor, nodes: int, path: Path) -> Sequence[StateFunction]:
        """Return the rate for each run of so many nodes, which come first in the states."""
        shared = getattr(path.divergence, "field", None) if nodes == 1 else None
        if shared is None:
            return [self._rate(t[:, None, None], path) for t in times.split(nodes)]
        rates = shared(self.velocity, times, path.context)
        return [recomputed(rate) if path.recomputes() else rate for rate in rates]

    def _needs_graph(self, states: Tensor, path: Path) -> bool:
        return needs_graph(states, path.context, *self.parameters())


@lru_cache(maxsize=1)
def _keep_freed_memory() -> None:
    """Make the C library keep freed memory, by one block that is larger than those to come.

    Until it has seen one of a few MiB, glibc returns every freed piece to the system at once, and
    getting it back, page by page, takes as long as the arithmetic.
    """
    torch.empty(2**24, dtype=torch.uint8)


class _Blocks:
    """States in blocks of rows, with the path of each.

    Rows that share a context are in one block, so that it is embedded once for all of them.

    Args:
        states: States, shape ``(T, *, D)``.
        path: Their path; its context, shape ``(*, C)``, broadcasts with theirs.
        most: The most rows in a block; there are as few blocks as that allows, of equal size.
        at_once: How many blocks are computed at once; their number is a multiple of that.
    """

    def __init__(self, states: Tensor, path: Path, most: int, at_once: int) -> None:
        self.path, rows = path, states[0, ..., 0].numel()
        each = max(1, math.ceil(rows / (at_once * most)))  # of those that are computed at once
        self.size = max(1, math.ceil(rows / (at_once * each)))
        batch, c = states.shape[1:-1], path.context
        own = () if c is None else tuple(c.shape[:-1])
        own = (1,) * (len(batch) - len(own)) + own
        # The dimensions along which contexts differ come first.
        self.order = sorted(range(len(batch)), key=lambda i: own[i] == 1)
        self.sizes = [batch[i] for i in self.order]
        moved = states.permute(0, *(i + 1 for i in self.order), -1)
        many = math.prod(own)
        shape = many, math.prod(batch) // max(1, many)
        self.rows = moved.reshape(len(states), *shape, states.shape[-1])

    def __iter__(self) -> Iterator[tuple[Tensor, Path]]:
        """Yield states, shape ``(T, b, r, D)``, and their path, with contexts ``(b, 1, C)``.

        They are views: what computes a block copies it, so that few copies are held at once.
        """
        each = max(1, min(self.rows.shape[2], self.size))
        count, c = max(1, self.size // each), self.path.context
        blocks = self.rows.split(count, dim=1)
        contexts: Iterable[Tensor | None] = repeat(None)
        if c is not None:  # one of all rows as a vector, which a network adds in one call
            flat = c.reshape(self.rows.shape[1], 1, c.shape[-1])
            contexts = [flat[0, 0]] if len(flat) == 1 else flat.split(count)
        for block, context in zip(blocks, contexts, strict=False):
            path = dataclasses.replace(self.path, context=context)
            for part in block.split(each, dim=2):
                yield part, path

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Return what was computed of all blocks, each ``(T, b, r, ...)``, as ``(T, *, ...)``."""
        flat = torch.cat([part.flatten(1, 2) for part in parts], dim=1)
        whole = flat.reshape(len(flat), *self.sizes, *flat.shape[2:])
        back = [0, *(1 + self.order.index(i) for i in range(len(self.order)))]
        return whole.permute(*back, *range(len(back), whole.dim()))
