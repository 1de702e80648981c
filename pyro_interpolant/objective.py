r"""What a training step minimises: the regression loss on draws of pairs, times and noise."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .bases import Samples
from .couplings import independent
from .data import drawn
from .flow import Flow
from .interpolants import Interpolant
from .losses import Points, path_points, regression_loss
from .scopes import evaluated

__all__ = ["Coupling", "Draw", "Objective", "Rows"]

Coupling = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_TIMES = 64  # distinct times per batch
_HELD_DRAWS = 8192


class Rows(NamedTuple):
    """Whitened rows, shape ``(N, D)``, with what belongs to each.

    Attributes:
        w: The rows.
        context: Their contexts, shape ``(N, C)``, or None.
        partner: Their partners at the base, whitened, shape ``(N, D)``, or None.
        weight: Their weights, shape ``(N,)``, or None.
    """

    w: Tensor
    context: Tensor | None
    partner: Tensor | None = None
    weight: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> "Rows":
        """Return the rows with a function applied to each part that is there."""
        return Rows(*(None if part is None else function(part) for part in self))  # type: ignore[arg-type]

    def take(self, index: Tensor) -> "Rows":
        """Return the rows of an index, shape ``(B,)``."""
        return self.each(lambda part: part.index_select(0, index))

    def rest(self, used: int) -> "Rows":
        """Return all rows but the first."""
        return self.each(lambda part: part[used:])

    def to(self, device: torch.device) -> "Rows":
        """Return the rows on a device."""
        return self.each(lambda part: part.to(device))

    def split(self, count: int, *, shuffle: bool) -> tuple["Rows", "Rows"]:
        """Return ``count`` rows, the last or any, and the others."""
        total = len(self.w)
        order = torch.randperm(total) if shuffle else torch.arange(total).roll(count)
        order = order.to(self.w.device)
        return self.take(order[:count]), self.take(order[count:])

    def repeated(self, count: int) -> "Rows":
        """Return ``count`` rows or a little less: whole copies of all, or drawn by weight.

        Where there are more, they are evenly spaced: rows may come in an order.
        """
        total, device = len(self.w), self.w.device
        if self.weight is not None:
            return self.take(drawn(self.weight, count))
        if total > count:
            return self.take(torch.arange(count, device=device) * total // count)
        return self.take(torch.arange(total, device=device).repeat(count // total))

    def effective(self) -> float:
        """Return the number of rows that weigh as much."""
        if self.weight is None:
            return len(self.w)
        share = self.weight.double() / self.weight.max().double()
        return float(share.sum() ** 2 / share.square().sum())


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
