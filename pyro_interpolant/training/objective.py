r"""The objective: a quadratic regression whose minimiser is the velocity."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import evaluated
from ..distributions.bases import Samples
from ..distributions.interpolant import ConditionalInterpolantDistribution, InterpolantDistribution
from ..interpolants.couplings import independent
from ..interpolants.linear import Interpolant
from ..nn.mlp import VelocityMLP
from ..nn.velocity import evaluate
from ..transforms.flow import Flow
from .batches import Rows

__all__ = [
    "Ahead",
    "Coupling",
    "Draw",
    "Objective",
    "Points",
    "interpolant_loss",
    "path_points",
    "regression_loss",
]


class Points(NamedTuple):
    """Points of paths and what the network is to match there.

    Attributes:
        t: Times, broadcastable to ``(*)``.
        w: Points, shape ``(*, D)``.
        target: Rates of the paths, or the noise, shape ``(*, D)``.
        context: Contexts, shape ``(*, C)``, or None.
    """

    t: Tensor
    w: Tensor
    target: Tensor
    context: Tensor | None

    def at(self, i: int) -> "Points":
        """Return those at one index of the first dimension."""
        return Points(*(None if part is None else part[i] for part in self))  # type: ignore[arg-type]


def path_points(
    interpolant: Interpolant,
    t: Tensor,
    w0: Tensor,
    w1: Tensor,
    context: Tensor | None = None,
    z: Tensor | None = None,
    *,
    of_noise: bool = False,
) -> tuple[Points, ...]:
    r"""Return points of the paths between pairs: one set, or one for z and one for -z.

    The mean over both has a finite variance where the slope of :math:`\gamma` is not finite.

    Args:
        interpolant: The path between pairs.
        t: Times in [0, 1], broadcastable to ``(*)``.
        w0: Whitened base draws, shape ``(*, D)``.
        w1: Whitened data, shape ``(*, D)``.
        context: Contexts, shape ``(*, C)``, or None.
        z: Latent draws, shape ``(*, D)``; drawn, where there is a latent term, if not given.
        of_noise: Whether the network is to learn :math:`E[z \mid I_t]` instead of the velocity.

    References:
        arXiv 2303.08797, Section 6.1 (antithetic draws).
    """
    if z is None and interpolant.has_latent():
        z = torch.randn_like(w0)
    if z is None:
        return (Points(t, *interpolant.sample(t, w0, w1), context),)
    found = []
    for s in (z, -z):
        w_t, dw_t = interpolant.sample(t, w0, w1, s)
        found.append(Points(t, w_t, s if of_noise else dw_t, context))
    return tuple(found)


def regression_loss(
    velocity: nn.Module, points: tuple[Points, ...], metric: Tensor | None = None
) -> Tensor:
    r"""Return :math:`|v_t(I_t)|^2 - 2\,\partial_t I_t \cdot v_t(I_t)` in whitened coordinates.

    Args:
        velocity: The network.
        points: Sets of points, over which the mean is taken.
        metric: A map L, shape ``(D, D)``: norms are then :math:`|L u|`.

    Returns:
        The loss of each row, shape ``(*)``.

    References:
        arXiv 2209.15571, eq. 10.
    """
    losses = [_row_loss(velocity, *part, metric) for part in points]
    return losses[0] if len(losses) == 1 else 0.5 * (losses[0] + losses[1])


def _row_loss(
    network: nn.Module,
    t: Tensor,
    w: Tensor,
    target: Tensor,
    context: Tensor | None,
    metric: Tensor | None,
) -> Tensor:
    """Return ``|n|^2 - 2 target . n``, whose minimiser is the target's mean given t and w."""
    # The default network computes its time embedding once per distinct time it is given.
    if isinstance(network, VelocityMLP):
        n = network(t, w, context)
    else:
        n = evaluate(network, t, w, context)
    if metric is not None:
        n, target = n @ metric.T, target @ metric.T
    return (n * torch.sub(n, target, alpha=2)).sum(-1)


def interpolant_loss(
    distribution: InterpolantDistribution | ConditionalInterpolantDistribution,
    x1: Tensor,
    *,
    x0: Tensor | None = None,
    t: Tensor | None = None,
    context: Tensor | None = None,
) -> Tensor:
    r"""Return the paper's objective, one value per row, for a training loop of your own.

    :math:`G(v) = E[|v_t(I_t)|^2 - 2\,\partial_t I_t \cdot v_t(I_t)]`, in whitened units: its
    minimum over v is :math:`-E|v^\star|^2`, so values are negative where something has been
    learned, and only differences matter. No ODE is solved.

    Args:
        distribution: The flow to train; its whitening map is used as it is.
        x1: Data, shape ``(*, *event_shape)``.
        x0: Base draws paired with them: data coordinates for a given base, :math:`N(0, I)` draws
            in whitened coordinates for the default one; shape ``(*, D)``. Drawn if not given.
        t: Times in [0, 1], broadcastable to ``(*)``. Drawn uniformly, one per row, if not given.
        context: Contexts, shape ``(*, C)``, for a conditional flow.

    Returns:
        The loss of each row, shape ``(*)``, differentiable in the weights.

    References:
        arXiv 2209.15571, eq. 10.
    """
    transform: Any = distribution.transform
    flow = getattr(transform, "flow", transform)
    if context is None:
        context = getattr(transform, "context", None)
    w1 = flow.to_white(distribution.to_flow(x1))
    if x0 is None:
        base = distribution.base
        x0 = torch.randn_like(w1) if base is None else base.sample(w1.shape[:-1])
    w0 = x0 if distribution.base is None else flow.to_white(x0)
    if t is None:
        t = torch.rand(w1.shape[:-1], dtype=w1.dtype, device=w1.device)
    return regression_loss(flow.velocity, path_points(flow.interpolant, t, w0, w1, context))


Coupling = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_TIMES = 64  # distinct times per batch
_HELD_DRAWS = 8192


class Draw(NamedTuple):
    """Everything random in a loss, grouped by time: T times, B rows.

    Attributes:
        t: Times, shape ``(T, 1)``.
        w0: Whitened base draws, shape ``(T, B / T, D)``.
        w1: Whitened rows, shape ``(T, B / T, D)``.
        context: Contexts, shape ``(T, B / T, C)``, or None.
        z: Latent draws, shape ``(T, B / T, D)``, or None.
    """

    t: Tensor
    w0: Tensor
    w1: Tensor
    context: Tensor | None
    z: Tensor | None


class Objective:
    """The regression loss of a flow's network on batches of whitened rows.

    Args:
        flow: The flow.
        base: Its base, None for N(0, I).
        coupling: Who is paired with whom.
        batch_size: Rows per step, and per coupling.
        noise: The network to train for the latent noise, or None to train the velocity.

    Attributes:
        rank: The number of this process.
        world: The number of processes that share a batch: each draws the times, base draws and
            noise of all, and keeps its own.
        own: Whether the rows of a batch are this process's own, or those of all.
    """

    def __init__(
        self,
        flow: Flow,
        base: Any,
        coupling: Coupling,
        batch_size: int,
        noise: nn.Module | None = None,
    ) -> None:
        self.flow, self.base, self.coupling = flow, base, coupling
        self.batch_size = batch_size
        self.of_noise = noise is not None
        self.network: nn.Module = flow.velocity if noise is None else noise
        self.has_latent = flow.interpolant.has_latent()
        self.rank, self.world, self.own = 0, 1, False

    def share(self, rank: int, world: int, *, own: bool) -> None:
        """Share each batch with other processes from now on."""
        self.rank, self.world, self.own = rank, world, own

    def with_base(self, base: Any) -> "Objective":
        """Return the same objective with other base draws."""
        noise = self.network if self.of_noise else None
        return Objective(self.flow, base, self.coupling, self.batch_size, noise)

    def prepared(self, raw: Rows) -> Rows:
        """Return rows given in the flow's coordinates whitened, by float64, in its type."""
        partner = None if raw.partner is None else self._white_base(raw.partner)
        return raw._replace(w=self._white(raw.w), partner=partner)

    def fixed_draw(self, held: Rows) -> Draw:
        """Return a draw of held-out rows to keep throughout, in any order: times go by places."""
        rows = held.repeated(_HELD_DRAWS)
        order = torch.randperm(len(rows.w), generator=torch.Generator().manual_seed(0))
        return self.draw(rows.take(order.to(rows.w.device)))

    def draw(self, rows: Rows) -> Draw:
        """Return stratified times, base draws, rows, contexts and noise: this process's share."""
        count, world = len(rows.w), self.world
        whole = count * world if self.own else count
        times = world * max(1, min(_TIMES, whole) // world)
        w0 = self._coupled(rows) if rows.partner is None else rows.partner
        t = (torch.arange(times) + torch.rand(times)).to(rows.w) / times
        z = self._normal(count) if self.has_latent else None
        mine = slice(self.rank * times // world, (self.rank + 1) * times // world)
        groups = times // world if self.own else times
        keep = count - count % groups

        def grouped(s: Tensor | None) -> Tensor | None:
            if s is None:
                return None
            s = s[:keep].reshape(groups, -1, s.shape[-1])
            return s if self.own or world == 1 else s[mine]

        w0, w1, context, z = map(grouped, (w0, rows.w, rows.context, z))  # type: ignore[assignment]
        return Draw(t[mine, None], w0, w1, context, z)  # type: ignore[arg-type]

    def points(self, draws: list[Draw]) -> list[tuple[Points, ...]]:
        """Return the points of paths of several draws, of equal shapes, evaluated at once."""
        if len(draws) == 1:
            return [self._points(*draws[0])]
        parts = zip(*draws, strict=True)
        stacked: Any = (None if part[0] is None else torch.stack(part) for part in parts)
        found = self._points(*stacked)
        return [tuple(points.at(i) for points in found) for i in range(len(draws))]

    def _points(self, *draw: Any) -> tuple[Points, ...]:
        return path_points(self.flow.interpolant, *draw, of_noise=self.of_noise)

    def is_plain(self) -> bool:
        """Tell whether draws neither cost much nor depend on anything that a step may change."""
        linear = type(self.flow.interpolant).sample is Interpolant.sample
        given = self.base is None or isinstance(self.base, Samples)
        return linear and given and self.coupling is independent

    def loss_at(self, points: tuple[Points, ...], metric: Tensor | None = None) -> Tensor:
        """Return the mean regression loss at points, in a metric L, ``(D, D)``, if given."""
        return regression_loss(self.network, points, metric).mean()

    def held_loss(self, points: tuple[Points, ...]) -> Tensor:
        """Return the same loss of the network as it is used: dropout and its like are off."""
        with evaluated(self.network):
            return self.loss_at(points)

    def loss(self, draw: Draw, metric: Tensor | None = None) -> Tensor:
        """Return the same of a draw."""
        return self.loss_at(self._points(*draw), metric)

    def _white(self, rows: Tensor) -> Tensor:
        flow = self.flow
        w = (rows.double() - flow.loc.double()) @ flow.whitening.double().T
        return w.to(flow.loc)

    def _white_base(self, x0: Tensor) -> Tensor:
        return x0.to(self.flow.loc) if self.base is None else self._white(x0)

    def base_draws(self, count: int) -> Tensor:
        """Return draws of the base in whitened coordinates, shape ``(count, D)``."""
        if self.base is None:
            return self._normal(count)
        with torch.no_grad():
            return self._white(self._mine(self.base.sample((self._drawn(count),))))

    def _normal(self, count: int) -> Tensor:
        like = self.flow.loc
        return self._mine(
            torch.randn(self._drawn(count), self.flow.dim, dtype=like.dtype, device=like.device)
        )

    def _drawn(self, count: int) -> int:
        return count * self.world if self.own else count

    def _mine(self, draws: Tensor) -> Tensor:
        return draws.chunk(self.world)[self.rank] if self.own else draws

    def _coupled(self, rows: Rows) -> Tensor:
        """Return base draws coupled with the rows, in batches of the training's size."""
        count = len(rows.w)
        if count <= self.batch_size:
            return self.coupling(self.base_draws(count), rows.w, rows.context)
        parts = torch.arange(count, device=rows.w.device).split(self.batch_size)
        return torch.cat([self._coupled(rows.take(part)) for part in parts])


class Ahead:
    """The points of the coming steps: paths and their rates are evaluated for many at once.

    One batch of few dimensions takes as long as eight.

    Args:
        objective: What draws times, base draws and noise, and evaluates paths.
        batches: What gives rows.
    """

    def __init__(self, objective: Objective, batches: Any) -> None:
        self.objective, self.batches = objective, batches
        self.count = batches.at_once if objective.is_plain() else 1
        self.points: list[tuple[Points, ...]] = []
        self.before: tuple[dict[str, Tensor], dict[str, Any]] = {}, {}

    def next(self) -> tuple[Points, ...]:
        """Return the points of the next step."""
        if not self.points:
            if self.count > 1:  # the place of a stream may be slow to tell
                self.before = self._place()
            self._draw()
        return self.points.pop(0)

    def _draw(self) -> None:
        draw = self.objective.draw
        draws = [draw(self.batches.next()) for _ in range(self.count)]
        with torch.no_grad():  # steps must not share a graph
            self.points = self.objective.points(draws)

    def _place(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = self.batches.state()
        return {**tensors, "before": torch.get_rng_state()}, numbers

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the state before what is still to come was drawn, and how much that is."""
        tensors, numbers = self.before if self.points else self._place()
        return tensors, {**numbers, "left": len(self.points)}

    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Take a state back."""
        self.batches.restore(tensors, numbers)
        if numbers["left"]:
            torch.set_rng_state(tensors["before"])
            self.before = self._place()
            self._draw()
            self.points = self.points[-numbers["left"] :]
