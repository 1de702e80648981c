r"""The objective: a quadratic regression whose minimiser is the velocity.

.. math:: G(v) = \int_0^1 E\left[|v_t(I_t)|^2 - 2\, \partial_t I_t \cdot v_t(I_t)\right] dt

Points :math:`I_t(x_0, x_1)` of paths and their rates are drawn first, from pairs, times and noise;
the loss is then a mean over points.

References:
    Albergo & Vanden-Eijnden, ICLR 2023, arXiv 2209.15571, eq. 10.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .._torch import broadcast_shapes
from ..diffusion.conversions import checked_times
from ..distributions.bases import Samples, WhitenedBase
from ..distributions.interpolant import (
    AnyDistribution,
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
)
from ..distributions.rows import FLOATED, check_value
from ..interpolants.couplings import independent, optimal_transport
from ..interpolants.linear import Interpolant
from ..interpolants.nonlinear import Geodesic
from ..nn.mlp import untrained_like
from ..nn.modes import evaluated
from ..nn.velocity import (
    couples_rows,
    embedded,
    evaluate,
    image_shape,
    size_of,
    time_exponent,
)
from ..transforms.flow import Flow
from ..transforms.interpolant import check_tensor
from .checkpoint import Checkpoint
from .distributed import Process
from .image_rows import HELD_BATCHES, are_levels
from .paths import Pairs, Points, Target, mean_rates, path_points, rows_together
from .rows import Rows
from .whitening import inliers

Metric = Callable[[Tensor], Tensor]
Coupling = Callable[[Tensor, Tensor, Tensor | None], Tensor]
TIMES_PER_BATCH = 64  # distinct ones, which share their embedding
_HELD_DRAWS = 8192
# Of contexts of more than a thousand numbers fewer draws: those of data are embedded in each look.
_HELD_NUMBERS = 2**23
# Up to this D many paths cross at a point: with more columns mean rates cost steps (BSDS300: 12%,
# and 0.13 nats in a minute) and give nothing.
_MOST_SHARED_DIM = 8
_NULL_SHARE = 0.1  # of labels, as Ho & Salimans have it


def regression_loss(
    velocity: nn.Module, points: tuple[Points, ...], metric: Metric | None = None
) -> Tensor:
    r"""Return :math:`|v_t(I_t)|^2 - 2\,\partial_t I_t \cdot v_t(I_t)` in whitened coordinates.

    Args:
        velocity: The network.
        points: Sets of points, over which the mean is taken.
        metric: A linear map L of vectors, ``(*, D)``: norms are then :math:`|L u|`.

    Returns:
        The loss of each row, shape ``(*)``.

    Raises:
        ValueError: If the network returns rates of another shape than that of states.

    References:
        arXiv 2209.15571, eq. 10.
    """
    losses = []
    for t, w, target, context in points:
        n = evaluate(velocity, t, w, context)
        if n.shape != w.shape:  # one that broadcasts would be learned as the rate of all columns
            raise ValueError(
                f"expected {type(velocity).__name__}.forward(t, x, context) to return rates of "
                f"the shape of x, {tuple(w.shape)}, got {tuple(n.shape)}"
            )
        if metric is not None:
            n, target = metric(n), metric(target)
        losses.append((n * torch.sub(n, target, alpha=2)).sum(-1))
    return losses[0] if len(losses) == 1 else 0.5 * (losses[0] + losses[1])


def interpolant_loss(
    distribution: InterpolantDistribution | ConditionalInterpolantDistribution,
    x1: Tensor,
    *,
    x0: Tensor | None = None,
    t: Tensor | float | None = None,
    context: Tensor | None = None,
) -> Tensor:
    r"""Return the paper's objective, one value per row, for a training loop of your own.

    :math:`G(v) = E[|v_t(I_t)|^2 - 2\,\partial_t I_t \cdot v_t(I_t)]`, in whitened units: its
    minimum over v is :math:`-E|v^\star|^2`, so values are negative where something has been
    learned, and only differences matter. No ODE is solved. Of a network with a label for none of
    its classes, as :class:`~pyro_interpolant.nn.UNet` has, a tenth of labels become that one.

    Args:
        distribution: The flow to train; its whitening map is used as it is.
        x1: Data, shape ``(*, *event_shape)``; images of whole levels, ``uint8``, are spread over
            their levels anew, as :func:`~pyro_interpolant.fit` does.
        x0: Base draws paired with them: data coordinates for a given base, :math:`N(0, I)` draws
            in whitened coordinates for the default one; shape ``(*, D)``. Drawn if not given. Of
            partners that are not independent of the data tell the flow, which cannot know it,
            ``distribution.transform.flow.independent = False``: no score follows from its
            velocity.
        t: Times in [0, 1], broadcastable to ``(*)``. Drawn uniformly, one per row, if not given.
        context: Contexts, shape ``(*, C)``, for a conditional flow, or labels, whole numbers of
            shape ``(*)`` too. The columns of data frames are taken by name.

    Returns:
        The loss of each row, shape ``(*)``, differentiable in the weights.

    Raises:
        TypeError: If data are no tensor, or neither of a floating type nor such images.
        ValueError: If data, base draws, times or contexts are of another shape or type, data
            outside the support, times outside [0, 1], or a label is none of the classes.

    References:
        arXiv 2209.15571, eq. 10.
    """
    flow, base = distribution.transform.flow, distribution.white_base()
    x1 = _floating(distribution, x1)
    rows = x1.dim() - len(distribution.row_shape)
    if isinstance(context, Tensor) and context.dim() > rows and not context.is_floating_point():
        context = context.to(flow.loc)  # labels of shape (*, 1)
    view = distribution.given(context)
    for values, shape in (x1, view.row_shape), (x0, (flow.event_dim,)):
        if values is not None:
            check_value(values, shape, flow.loc.dtype)
            view.transform.check_type(values)
    context = _some_null(flow.velocity, view.transform.context, torch.rand)
    w1 = flow.whitening.to_white(distribution.to_flow(x1))
    w0 = base.sample(w1.shape[:-1]) if x0 is None else base.to_white(x0)
    if t is None:
        t = torch.rand(w1.shape[:-1], dtype=w1.dtype, device=w1.device)
    else:
        t = checked_times(t, w1)
    for name, shape in ("times", t.shape), ("base draws", w0.shape[:-1]):
        _refuse_other_rows(name, shape, w1.shape[:-1])
    points = path_points(flow.interpolant, t, w0, w1)
    return regression_loss(flow.velocity, tuple(p._replace(context=context) for p in points))


def _refuse_other_rows(name: str, shape: torch.Size, rows: torch.Size) -> None:
    """Raise a ValueError unless what goes with rows of a shape is broadcastable to it."""
    try:
        good = broadcast_shapes(shape, rows) == rows
    except RuntimeError:
        good = False
    if not good:
        raise ValueError(
            f"expected {name} for rows of shape {tuple(rows)}, one for each or broadcastable to "
            f"them, got {tuple(shape)}"
        )


def _floating(distribution: AnyDistribution, x1: Tensor) -> Tensor:
    """Return data as they are, and whole levels of images spread over their cells."""
    x1 = distribution.value_of(x1)
    check_tensor(x1, distribution.transform.flow.loc.dtype)
    if are_levels(x1, distribution.row_shape):
        return Rows(x1, None).dequantized(distribution.transform.flow.loc).w
    if not x1.is_floating_point():
        raise TypeError(
            f"expected data of a floating type, got {x1.dtype}: convert tensors with {FLOATED}, "
            "and spread whole ones by pi.dequantize(x)"
        )
    return x1


def exponent_of(flow: Flow, base: WhitenedBase, target: Target, state: Checkpoint | None) -> float:
    """Return the exponent p of the times at which a flow's network is trained.

    That of the velocity on paths from N(0, I), whose rates are sharp near the data alone. Else 1:
    another base has structure of its own, which needs times near it.

    Args:
        flow: The flow.
        base: Its base.
        target: What is trained.
        state: What the run goes on from, if anything: at the times that it began with.
    """
    if state is not None:
        return state.numbers.get("time_exponent", 1.0)  # states of version 0.1.0 have none
    return time_exponent(flow.velocity) if base.base is None and target == "velocity" else 1.0


def takes_means(state: Checkpoint | None) -> bool:
    """Return whether rates are means over rows, or what a run goes on from began without."""
    return state is None or bool(state.numbers.get("means", False))


class Objective(nn.Module):
    """The regression loss of a flow's network on batches of whitened rows.

    Args:
        flow: The flow.
        base: Its base.
        coupling: Which base draw is paired with which row; of classes, it is given the rows of one
            label at a time.
        process: This process, or one of several that share each batch: each draws the times, base
            draws and noise of all, and keeps its own.
        target: Whether the velocity is trained, or the network of the latent noise, which a flow
            is given where it has none.
        metric: A linear map L of vectors, ``(*, D)``: norms of the loss are then :math:`|L u|`.
        exponent: p of the times :math:`1 - (1 - u)^p`, u uniform on [0, 1].
        means: Whether rates are means over rows, where paths cross.

    Attributes:
        network: The network that is trained, the one submodule.
        means: Whether they are, of rows without contexts and partners.
    """

    flow: Flow

    def __init__(
        self,
        flow: Flow,
        base: WhitenedBase,
        coupling: Coupling,
        process: Process | None = None,
        *,
        target: Target = "velocity",
        metric: Metric | None = None,
        exponent: float = 1.0,
        means: bool = True,
    ) -> None:
        super().__init__()
        network = flow.velocity
        if target == "noise":
            sizes = flow.event_dim, flow.context_dim or 0, flow.classes
            # Made beside a known one, too: a run that goes on draws what it drew when it began.
            new = untrained_like(flow.velocity, *sizes).to(flow.loc)
            network = flow.noise = new if flow.noise is None else flow.noise
        if next(network.parameters(), None) is None:
            raise ValueError(
                f"expected a network with weights to train, got {type(network).__name__}, which "
                "has none"
            )
        self.network = network
        self.__dict__["flow"] = flow  # no part: whoever wraps this module sees one network
        if coupling is optimal_transport and isinstance(flow.interpolant, Geodesic):
            coupling = partial(optimal_transport, on_torus=True)
        self.base, self.coupling, self.target, self.metric = base, coupling, target, metric
        self.process = Process() if process is None else process
        self.exponent = exponent
        self.has_latent = flow.interpolant.has_latent()
        from_normal = base.base is None and flow.interpolant.is_linear()
        is_small = flow.event_dim <= _MOST_SHARED_DIM
        self.means = means and from_normal and is_small and target == "velocity"

    def whitened(self, rows: Rows) -> Rows:
        """Return rows given in the flow's coordinates whitened, by float64, in its type.

        Images of whole levels are spread over their cells first.
        """
        rows = rows.dequantized(self.flow.loc)
        partner = None if rows.partner is None else self.base.to_white(rows.partner)
        return rows._replace(w=self.flow.whitening.double_to_white(rows.w), partner=partner)

    def without_outliers(self, rows: Rows) -> Rows:
        """Return rows, given in the flow's coordinates, with others in the stead of outliers."""
        known = None if self.flow.classes else rows.context  # labels are no numbers
        return rows.take(inliers(self.whitened(rows).w, known, rows.weight))

    def check_rows_apart(self, rows: Rows) -> None:
        """Raise a ValueError if the value of a row depends on others, as far as three rows tell.

        Args:
            rows: The rows, in the flow's coordinates.
        """
        few = rows.each(lambda part: part[:3]).to(self.flow.loc.device)
        w, velocity = self.flow.whitening.to_white(few.w.to(self.flow.loc)), self.flow.velocity
        with torch.no_grad(), evaluated(velocity), evaluated(self.network):
            if couples_rows(self.network, w, embedded(velocity, few.context)):
                raise ValueError(
                    "expected a velocity that treats rows independently, got one that is another "
                    "for a row beside other rows, so that densities are wrong: torch's attention "
                    "and recurrent layers take batch_first=True"
                )

    def points(self, draws: Sequence[Callable[[], Rows]]) -> list[tuple[Points, ...]]:
        """Return the points of several batches of equal size, whose paths are evaluated at once.

        Args:
            draws: For each batch a function that returns its whitened rows.
        """
        pairs = [self._pairs(draw(), self.base, self.process) for draw in draws]
        if len(pairs) == 1:
            return [self._points(pairs[0])]
        t, w0, w1 = (torch.stack(parts) for parts in zip(*(p[:3] for p in pairs), strict=True))
        context, z = (_stacked(parts) for parts in zip(*(p[3:5] for p in pairs), strict=True))
        together = self._points(Pairs(t, w0, w1, context, z, *pairs[0][5:]))
        return [tuple(part.at(i) for part in together) for i in range(len(pairs))]

    def fixed_points(self, held: Rows, base: WhitenedBase, size: int) -> tuple[Points, ...]:
        """Return points of held-out rows to keep throughout a run.

        Rows may come in any order, and times go by places: so they are shuffled, always alike.

        Args:
            held: The rows, in the flow's coordinates.
            base: The base to draw from.
            size: Rows per coupling, as in training.
        """
        are_images = image_shape(self.network) is not None
        columns = 1 if held.context is None else max(1, held.context[0].numel())
        most = min(_HELD_DRAWS, max(len(held.w), _HELD_NUMBERS // columns))
        rows = self.whitened(held).repeated(HELD_BATCHES * size if are_images else most)
        order = torch.randperm(len(rows.w), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            rows = rows.take(order.to(rows.w.device))
            if rows.partner is None and self.coupling is not independent:
                rows = rows._replace(partner=self._coupled(rows, base, size, Process()))
            return self._points(self._pairs(rows, base, Process()))

    def can_draw_ahead(self) -> bool:
        """Return whether points of several steps may be made together, before the first of them.

        They are cheap, and depend on nothing that a step may change.
        """
        linear = type(self.flow.interpolant).sample is Interpolant.sample
        given = self.base.base is None or isinstance(self.base.base, Samples)
        return linear and given and self.coupling is independent

    def losses(self, points: tuple[Points, ...]) -> Tensor:
        """Return the regression losses at points, one for each, of any shape."""
        network = self.flow.velocity
        points = tuple(p._replace(context=embedded(network, p.context)) for p in points)
        return regression_loss(self.network, points, self.metric)

    def loss(self, points: tuple[Points, ...]) -> Tensor:
        """Return their mean."""
        return self.losses(points).mean()

    def held_losses(self, points: tuple[Points, ...]) -> Tensor:
        """Return the losses of the network as it is used: dropout and its like are off."""
        with torch.no_grad(), evaluated(self.network):
            return self.losses(points)

    def forward(self, points: Callable[[], tuple[Points, ...]]) -> Tensor:
        """Return the loss at the points that a function returns.

        Fabric would cast tensors that are passed to forward, so a function that returns them is
        passed.
        """
        return self.loss(points())

    def _pairs(self, rows: Rows, base: WhitenedBase, process: Process) -> Pairs:
        """Return everything random in a loss: this process's share, in groups of one time each.

        Beside it are the groups that share points with some of its own.
        """
        count, world = len(rows.w), process.world
        whole = count * world if process.own_rows else count
        times = world * max(1, min(TIMES_PER_BATCH, whole) // world)
        w0 = self._coupled(rows, base, count, process) if rows.partner is None else rows.partner
        t = self._times((torch.arange(times) + torch.rand(times)).to(rows.w) / times)
        z = process.share(partial(_normal, rows.w), count) if self.has_latent else None
        first, end = (rank * times // world for rank in (process.rank, process.rank + 1))
        groups = times
        if process.own_rows and world > 1:
            # Its rows may be unlike the others', and so need times everywhere: a slot of each run
            # of slots, and another one at each step.
            slot = int(torch.randperm(world)[process.rank])
            t, groups, first, end = t[slot::world], times // world, 0, times // world
        keep = count - count % groups
        size = keep // groups
        together = rows_together(groups, size) if self._shares_points(rows) else 0
        piece = max(1, together // size)
        near = slice(first - first % piece, end + -end % piece)

        def grouped(s: Tensor) -> Tensor:
            return s[:keep].reshape(groups, -1, s.shape[-1])[near]

        context = _some_null(
            self.network,
            rows.context,
            lambda shape: process.share(lambda count: torch.rand(count, *shape[1:]), shape[0]),
        )
        context, z = (None if s is None else grouped(s) for s in (context, z))
        own = slice(first - near.start, end - near.start)
        return Pairs(t[near, None], grouped(w0), grouped(rows.w), context, z, own, together)

    def _shares_points(self, rows: Rows) -> bool:
        """Return whether a point on the path to one of some rows may as well lead to another."""
        return (
            (rows.context is None or self.flow.classes > 0)
            and rows.partner is None
            and self.coupling is independent
            and self.means
        )

    def _times(self, u: Tensor) -> Tensor:
        """Return times before 1 from uniform ones, shape ``(T,)``."""
        if self.exponent == 1:  # 1 - (1 - u) is not u to the bit
            return u
        return (1 - (1 - u) ** self.exponent).clamp(max=1 - torch.finfo(u.dtype).eps)

    def _points(self, pairs: Pairs) -> tuple[Points, ...]:
        path, (t, w0, w1, context, z, own, together) = self.flow.interpolant, pairs
        points = path_points(path, t, w0, w1, z, target=self.target)
        if together:
            points = tuple(
                p._replace(target=mean_rates(path, *p[:3], w1, together, context)) for p in points
            )
        return tuple(p._replace(context=context).of_groups(own) for p in points)

    def _coupled(self, rows: Rows, base: WhitenedBase, size: int, process: Process) -> Tensor:
        """Return base draws coupled with the rows, in batches of so many."""
        found = []
        for part in torch.arange(len(rows.w), device=rows.w.device).split(size):
            few = rows.take(part)
            x0 = process.share(lambda count: base.sample((count,)), len(part))
            found.append(self._paired(x0, few))
        return torch.cat(found)

    def _paired(self, x0: Tensor, rows: Rows) -> Tensor:
        """Return base draws coupled with rows, shape ``(N, D)`` each.

        The rows of each class are coupled by themselves, for labels have no distances: the draws
        of each class so remain draws of the base.
        """
        if not self.flow.classes or rows.context is None or self.coupling is independent:
            return self._partners(x0, rows)
        found = torch.empty_like(x0)
        for label in rows.context.unique():
            own = (rows.context[:, 0] == label).nonzero().flatten()
            few = rows.take(own)
            found[own] = self._partners(x0[own], few)
        return found

    def _partners(self, x0: Tensor, rows: Rows) -> Tensor:
        found = self.coupling(x0, rows.w, rows.context)
        shape = getattr(found, "shape", None)
        if shape != x0.shape:
            got = type(found).__name__ if shape is None else tuple(shape)
            raise ValueError(
                "expected a coupling that returns a partner of each row, shape "
                f"{tuple(x0.shape)}, got {got}: return the base draws in another order"
            )
        return found


def _some_null(
    network: nn.Module, context: Tensor | None, uniform: Callable[[Sequence[int]], Tensor]
) -> Tensor | None:
    """Return contexts, a tenth of which are the null label of a network that has one.

    Args:
        network: The network.
        context: Contexts, shape ``(*, C)``, or None.
        uniform: Draws uniform numbers of a shape.
    """
    null = size_of(network, "null_label")
    if context is None or null is None:
        return context
    u = uniform((*context.shape[:-1], 1)).to(context.device)
    return context.masked_fill(u < _NULL_SHARE, null)


def _normal(like: Tensor, count: int) -> Tensor:
    """Return draws of N(0, I), shape ``(count, D)``, of the kind of a tensor, ``(*, D)``."""
    return torch.randn(count, like.shape[-1], dtype=like.dtype, device=like.device)


def _stacked(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return tensors stacked, or None where they are not there."""
    there = [part for part in parts if part is not None]
    return torch.stack(there) if there else None
