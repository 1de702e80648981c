r"""The numerics of a flow in jax: a path through it, and its log-determinant, in one program.

One ``lax.scan`` runs over all Runge-Kutta stages of all steps: with k the slope before, a stage is
:math:`k = v(x + h a k)`, and adds :math:`h b k` to the end of its step. The divergences at the
nodes come after it, all at once. What depends on time alone is a table that numpy made.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from .._files import PROBES
from ..solvers.quadrature import clenshaw_curtis, random_offsets
from ..solvers.tableaus import TABLEAUS
from . import mlp
from .frozen import Frozen, Weights

_Table: TypeAlias = mlp.Modulation | Array  # by time: layers, or what contexts are added to
_Layers = Callable[[Any], mlp.Modulation]  # those of a row of a table
_States = tuple[Array, Array, Array]  # of a step: where it is, its slope, where it ends

_VALUES_AT_ONCE = 2**25  # of the largest intermediate of a divergence: 256 MiB in float64


class Grid(NamedTuple):
    """How a path is solved: numbers and names, equal by value.

    Attributes:
        steps: The number of steps, N.
        method: A Runge-Kutta method.
        warp: How far Clenshaw-Curtis nodes move toward the data.
        seed: Of random nodes, or None.
        end: The time at which the path stops.
    """

    steps: int
    method: str = "rk4"
    warp: float = 0.0
    seed: int | None = None
    end: float = 1.0


class _Stages(NamedTuple):
    """The stages of all steps in one direction, each array of shape ``(S,)``.

    Attributes:
        times: Which of a table's times each is at.
        before: By how much of the slope before each starts from the step's first state.
        share: How much of its slope is added to the end of the step.
        last: Whether it ends its step.
    """

    times: NDArray[np.int32]
    before: NDArray[np.float64]
    share: NDArray[np.float64]
    last: NDArray[np.bool_]


class _Plan(NamedTuple):
    """All times at which a velocity is evaluated, and what is done there.

    Attributes:
        times: Ascending, shape ``(T,)``.
        nodes: Which of them are nodes, shape ``(N + 1,)``.
        weights: Of the quadrature at the nodes, shape ``(N + 1,)``.
        forward: The stages from base to data.
        backward: Those from data to base.
    """

    times: NDArray[np.float64]
    nodes: NDArray[np.int32]
    weights: NDArray[np.float64]
    forward: _Stages
    backward: _Stages


@lru_cache(maxsize=64)
def _plan(grid: Grid) -> _Plan:
    nodes, weights = _nodes(grid)
    nodes, weights = nodes * grid.end, weights * grid.end
    count = len(nodes) - 1
    c, a, b = TABLEAUS[grid.method]
    step = np.arange(count)[:, None]
    ahead = step + np.array(c)  # where the stages are, in steps
    places, index = np.unique(
        np.concatenate((np.arange(count + 1.0), ahead.ravel(), (count - ahead).ravel())),
        return_inverse=True,
    )
    parts = np.split(index.astype(np.int32), (count + 1, count + 1 + ahead.size))
    before = np.array([row[-1] if row else 0.0 for row in a])
    gaps = np.diff(nodes)[:, None]

    def stages(times: NDArray[np.int32], gaps: NDArray[np.float64]) -> _Stages:
        last = np.tile(np.arange(len(c)) == len(c) - 1, count)
        return _Stages(times, (gaps * before).ravel(), (gaps * np.array(b)).ravel(), last)

    return _Plan(
        np.interp(places, np.arange(count + 1.0), nodes),
        parts[0],
        weights,
        stages(parts[1], gaps),
        stages(parts[2], -gaps[::-1]),
    )


def _nodes(grid: Grid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the nodes on [0, 1] and their weights, as the solvers of the package have them."""
    if grid.seed is None:
        return clenshaw_curtis(grid.steps, grid.warp)
    nodes = (np.arange(grid.steps) + random_offsets(grid.steps, grid.seed)) / grid.steps
    weights = np.full(grid.steps, 1 / grid.steps)
    return np.concatenate(([0.0], nodes, [1.0])), np.concatenate(([0.0], weights, [0.0]))


def check_grid(grid: Grid) -> None:
    """Raise a ValueError for a grid that is none."""
    if grid.method not in TABLEAUS:
        raise ValueError(f"expected a method among {sorted(TABLEAUS)}, got {grid.method!r}")
    _plan(grid)


def solve(
    weights: Weights, x: Array, context: Array | None, grid: Grid, *, forward: bool, density: bool
) -> tuple[Array, Array | None]:
    """Return the other end of a path, and its log-determinant if wanted.

    Args:
        weights: Those of the flow, by their names in a file.
        x: Where it starts, shape ``(*, D)``: whitened base draws (``forward``), or data.
        context: Contexts, broadcastable to ``(*, C)``, or None.
        grid: How it is solved.
        forward: Whether it starts at the base.
        density: Whether ``log |dy/dx|`` is wanted, shape ``(*)``, y the data, x the base draw.
    """
    if isinstance(weights, Frozen):
        weights = weights.derived(grid, partial(_with_table, weights, grid))
    else:
        weights = _with_table(_held(weights), grid)
    return _solve(weights, x, context, grid=grid, forward=forward, density=density)


def _held(weights: Weights) -> dict[str, Any]:
    """Return weights such that gradients reach only those that torch trains.

    The rest are its buffers. Trained one by one, ``loc``, ``linear``, ``whitening`` and
    ``linear_log_det`` would no longer describe the same affine map.
    """
    return {
        name: array if name.endswith((".weight", ".bias")) else jax.lax.stop_gradient(array)
        for name, array in weights.items()
    }


def _with_table(weights: Weights, grid: Grid) -> dict[str, Any]:
    """Return the weights and, for all times of a grid, the table that makes layers of them."""
    network, dtype = mlp.of_network(weights), weights["loc"].dtype
    if isinstance(weights, Frozen):  # once, so in float64
        network = {name: array.astype(np.float64) for name, array in network.items()}
    table = {"embedded": mlp.embed_times(network, _plan(grid).times)}
    if not len(network["context_loc"]):
        table = mlp.modulate(network, table["embedded"])._asdict()
    return {**weights, **{name: array.astype(dtype) for name, array in table.items()}}


@partial(jax.jit, static_argnames=("grid", "forward", "density"))
def _solve(
    weights: Weights, x: Array, context: Array | None, *, grid: Grid, forward: bool, density: bool
) -> tuple[Array, Array | None]:
    """Return what :func:`solve` returns, in chunks of rows where there are many."""
    batch, count = x.shape[:-1], math.prod(x.shape[:-1])
    once = partial(_solve_rows, weights, grid=grid, forward=forward, density=density)
    largest = mlp.largest_intermediate(mlp.of_network(weights)) * len(_plan(grid).nodes)
    at_once = max(1, _VALUES_AT_ONCE // largest)
    if count <= at_once or not density:
        return once(x, context)
    chunks = -(-count // at_once)
    size = -(-count // chunks)

    def split(rows: Array) -> Array:
        flat = jnp.broadcast_to(rows, (*batch, rows.shape[-1])).reshape(count, rows.shape[-1])
        padded = jnp.pad(flat, ((0, chunks * size - count), (0, 0)), mode="edge")
        return padded.reshape(chunks, size, -1)

    if context is None or context.ndim == 1:
        parts = jax.lax.map(lambda rows: once(rows, context), split(x))
    else:
        parts = jax.lax.map(lambda rows: once(*rows), (split(x), split(context)))
    return jax.tree.map(
        lambda part: part.reshape(-1, *part.shape[2:])[:count].reshape(*batch, *part.shape[2:]),
        parts,
    )


def _solve_rows(
    weights: Weights, x: Array, context: Array | None, *, grid: Grid, forward: bool, density: bool
) -> tuple[Array, Array | None]:
    white = x if forward else to_white(weights, x)
    states = white[None]
    if grid.end > 0:
        table, at = _modulations(weights, context)
        states = _integrate(weights, white, table, at, grid, forward=forward, all_nodes=density)
    end = from_white(weights, states[-1]) if forward else states[0]
    if not density:
        return end, None
    log_det = jnp.broadcast_to(weights["linear_log_det"], white.shape[:-1]).astype(white.dtype)
    if grid.end > 0:
        log_det = log_det + _log_det(weights, states, table, at, grid)
    return end, log_det


def _modulations(weights: Weights, context: Array | None) -> tuple[_Table, _Layers]:
    """Return a table by time, and the function that makes layers of one of its rows."""
    if context is None:
        return mlp.Modulation(weights["shifts"], weights["scales"]), lambda row: row
    network = mlp.of_network(weights)
    given = mlp.embed_context(network, context)
    if given.ndim == 1:  # all rows share it
        return mlp.modulate(network, weights["embedded"] + given), lambda row: row
    return weights["embedded"], lambda row: mlp.modulate(network, row + given)


def _integrate(
    weights: Weights,
    x: Array,
    table: _Table,
    at: _Layers,
    grid: Grid,
    *,
    forward: bool,
    all_nodes: bool,
) -> Array:
    """Return the states at the nodes, ascending in time, ``(N + 1, *, D)``, or the end alone."""
    network = mlp.of_network(weights)
    plan = _plan(grid)
    stages = plan.forward if forward else plan.backward

    # Of a stage only products are kept for gradients: all else takes longer to store and fetch
    # than to compute again (1,000 rows: 140 ms against 192 for a gradient of three layers).
    @partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable, prevent_cse=False)
    def advanced(states: _States, row: _Table, now: Sequence[Array]) -> _States:
        x, k, end = states
        before, share, last = now
        k = mlp.velocity(network, at(row), x + before * k)
        end = end + share * k
        return jnp.where(last, end, x), k, end

    # Of many rows the layers come one stage ahead, through the carry: those that are looked up in
    # the stage itself are looked up anew for each number (1,000 rows: 65 ms against 34). For a
    # single one that is cheaper than to carry them (a gradient: 0.32 ms against 0.39).
    def stage(
        carry: tuple[_States, _Table | None], now: tuple[Any, ...]
    ) -> tuple[tuple[_States, _Table | None], Array | None]:
        states, row = carry
        new, *rest = now
        states = advanced(states, new if row is None else row, rest)
        return (states, None if row is None else new), states[-1] if all_nodes else None

    first, times = None, stages.times
    if x.ndim > 1:
        first = jax.tree.map(lambda part: jnp.asarray(part[times[0]]), table)
        times = np.roll(times, -1)
    rows = jax.tree.map(lambda part: part[times], table)
    steps = stages.before.astype(x.dtype), stages.share.astype(x.dtype), stages.last
    start = (x, jnp.zeros_like(x), x)
    ((last, *_), _), ends = jax.lax.scan(stage, (start, first), (rows, *steps))
    if ends is None:
        return last[None]
    per_step = len(TABLEAUS[grid.method][0])
    states = jnp.concatenate((x[None], ends[per_step - 1 :: per_step]))
    return states if forward else states[::-1]


def _log_det(weights: Weights, states: Array, table: _Table, at: _Layers, grid: Grid) -> Array:
    """Return the weighted sum of divergences along states, ``(N + 1, *, D)``, shape ``(*)``."""
    network = mlp.of_network(weights)
    plan = _plan(grid)

    def rate(row: _Table, x: Array) -> Array:
        if PROBES in weights:
            return _estimate(network, at(row), x, weights[PROBES].astype(x.dtype))
        return mlp.divergence(network, at(row), x)

    rows = jax.tree.map(lambda part: part[plan.nodes], table)
    rates = jax.vmap(rate)(rows, states)
    return jnp.tensordot(plan.weights.astype(states.dtype), rates, 1, precision="highest")


def _estimate(network: Weights, modulation: mlp.Modulation, x: Array, probes: Array) -> Array:
    """Return the mean of ``e J e`` over the probes e, shape ``(P, D)``: shape ``(*)``."""
    field = partial(mlp.velocity, network, modulation)

    def form(probe: Array) -> Array:
        tangent = jax.jvp(field, (x,), (jnp.broadcast_to(probe, x.shape),))[1]
        return (tangent * probe).sum(-1)

    return jax.vmap(form)(probes).mean(0)


def to_white(weights: Weights, y: Array) -> Array:
    """Return whitened coordinates of data coordinates, each of shape ``(*, D)``."""
    centred = y - weights["loc"]
    if weights["linear"].ndim < 2:
        return centred / weights["linear"]
    return jnp.matmul(centred, weights["whitening"].T, precision="highest")


def from_white(weights: Weights, w: Array) -> Array:
    """Return data coordinates of whitened coordinates, each of shape ``(*, D)``."""
    if weights["linear"].ndim < 2:
        return weights["loc"] + w * weights["linear"]
    return weights["loc"] + jnp.matmul(w, weights["linear"].T, precision="highest")
