r"""A flow in one dimension, of many values at once: solved for at knots, a spline between them.

The map :math:`y = T(w)` of such a flow is monotone. Where many values share a context, it is
solved for at a few evenly spaced knots, with a monotone spline through them. Cells between two
knots are halved, and the halves again, until halving a cell and those beside it moves no value by
more than a tolerance: on the staircase of near-discrete values one cell alone may pass by chance.
Values in cells with too few for another halving, on a steep flank between modes, are solved for
themselves. The cells of all contexts are halved together, each where it needs it.

References:
    Delbourgo & Gregory, *Determination of derivative parameters for a monotonic rational quadratic
    interpolant*, IMA J. Numer. Anal. 5 (1985) (the slopes: geometric means of those of chords).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .._torch import is_tracing, is_transformed, needs_graph
from .flow import ROWS_PER_SOLVE
from .gaussianize import inverse_spline, spline
from .interpolant import InterpolantTransform

_MIN_VALUES = 128  # of one context, from which a spline pays
_VALUES_PER_CELL, _MAX_CELLS = 12, 512  # before the first halving
_MIN_HALVED = 3  # values in a cell, from which halving it pays
_TOLERANCE = 1e-3  # of log-odds, by which the last halving of a cell may move a value

Map = Callable[[Tensor], Tensor]


def mapped(transform: InterpolantTransform, w: Tensor, log_odds: Map) -> Tensor:
    """Return ``transform(w)``, shape ``(*, 1)``, of finite scalars, many of them by a spline.

    It is within 1e-4 in probability, and in a tail within 1e-3 of that tail's (learned densities
    that are normal, bounded, heavy in the tails, or have two modes 40 sd apart). Where a gradient
    is wanted, or fewer than 128 values share a context, it is the transform's own.

    Args:
        transform: A flow in one dimension.
        w: Inputs, shape ``(*, 1)``, those of each context along the first dimensions.
        log_odds: ``log F / (1 - F)`` of the base's distribution function, of any shape.
    """
    context = transform.context
    own = torch.Size(() if context is None else context.shape[:-1])  # a tuple of some subclasses
    is_whole = w.numel() and w.shape[w.dim() - 1 - len(own) : -1] == own
    has_graph = needs_graph(w, context, *transform.flow.parameters())
    if not is_whole or has_graph or is_tracing() or is_transformed():
        return transform(w)
    values = w.reshape(-1, own.numel()).T
    if values.shape[1] < _MIN_VALUES:
        return transform(w)
    contexts = None if context is None else context.reshape(own.numel(), -1)
    found = _by_spline(_Solver(transform, contexts), values, log_odds)
    return transform.sign * found.reshape(values.shape).T.reshape(w.shape)


def _by_spline(solve: "_Solver", w: Tensor, log_odds: Map) -> Tensor:
    """Return where the flow takes values of B contexts, ``(B, M)``, as ``(B M)``, ascending."""
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    cells = min(_MAX_CELLS, w.shape[1] // _VALUES_PER_CELL)
    steps = torch.linspace(0, 1, cells + 1, dtype=w.dtype, device=w.device)
    x, every = torch.lerp(low, high, steps).flatten(), torch.arange(len(w), device=w.device)
    owner = every.repeat_interleave(cells + 1)
    spline = _Spline(x, solve(x, owner), owner)
    cell = ((w - low) / (high - low) * cells).nan_to_num().long().clamp(0, cells - 1)
    cell = (cell + every[:, None] * (cells + 1)).flatten()
    w, owner = w.flatten(), every.repeat_interleave(w.shape[1])
    fails = torch.ones(len(x) - 1, dtype=torch.bool, device=w.device)
    while True:
        middle = spline.x[:-1] + spline.width / 2
        split = fails & (torch.bincount(cell, minlength=len(fails)) >= _MIN_HALVED)
        split &= (spline.x[:-1] < middle) & (middle < spline.x[1:])  # in their type
        at = split.nonzero()[:, 0]
        if not len(at):
            break
        y = solve(middle[at], spline.owner[at])
        finer, place = spline.halved(at, middle[at], y)
        left = place[at]
        moves = spline.moves(finer, at, left, log_odds)
        cell = place[cell] + (split[cell] & (w > middle[cell]))
        spline, before = finer, fails
        fails = torch.zeros_like(finer.width, dtype=torch.bool)
        fails[place[:-1]] = before
        fails[left] = fails[left + 1] = ~(moves <= _TOLERANCE)  # of NaN too
        beside = fails[(left - 1).clamp(min=0)] | fails[(left + 2).clamp(max=len(fails) - 1)]
        fails[left] = fails[left + 1] = fails[left] | beside
    found = spline.at(w, cell)
    alone = fails[cell] | found.isnan()  # beside knots in an order that is no more than noise
    found[alone] = solve(w[alone], owner[alone])
    return found


class _Spline:
    """Monotone splines of several contexts, the knots of one after those of another.

    Cell i is that from knot i to the next. From the last of a context to the first of another
    there is none; its numbers mean nothing.

    Args:
        x: The knots, ascending for each context, shape ``(K,)``.
        y: Where they go, ascending for each context, shape ``(K,)``.
        owner: The contexts that they belong to, ascending, shape ``(K,)``.
    """

    def __init__(self, x: Tensor, y: Tensor, owner: Tensor) -> None:
        self.x, self.y, self.owner = x, y, owner
        self.width, self.height = x.diff(), y.diff()
        chord = self.height / self.width
        inside = owner[1:] == owner[:-1]
        between = inside[1:] & inside[:-1]
        share = self.width[1:] / (self.width[1:] + self.width[:-1])
        mean = chord[:-1] ** share * chord[1:] ** (1 - share)
        start = torch.cat((chord[:1], mean.where(between, chord[1:])))
        end = torch.cat((mean.where(between, chord[:-1]), chord[-1:]))
        self.p0, self.p1 = start / chord, end / chord

    def at(self, x: Tensor, cell: Tensor) -> Tensor:
        """Return where the splines of cells, shape ``(*)``, take x, shape ``(*)``."""
        come = (x - self.x[cell]) / self.width[cell]
        return self.y[cell] + self.height[cell] * spline(come, self.p0[cell], self.p1[cell])

    def inverse(self, y: Tensor, cell: Tensor) -> Tensor:
        """Return what the splines of cells, shape ``(*)``, take to y, shape ``(*)``."""
        come = (y - self.y[cell]) / self.height[cell]
        return self.x[cell] + self.width[cell] * inverse_spline(come, self.p0[cell], self.p1[cell])

    def halved(self, cells: Tensor, x: Tensor, y: Tensor) -> tuple["_Spline", Tensor]:
        """Return the splines with a knot more in each of some cells, and the places of the old.

        Args:
            cells: The cells, ascending, shape ``(S,)``.
            x: The new knots, shape ``(S,)``.
            y: Where they go, shape ``(S,)``.
        """
        place = torch.arange(len(self.x), device=x.device)
        place += torch.bincount(cells + 1, minlength=len(place)).cumsum(0)
        new, size = place[cells] + 1, len(place) + len(cells)

        def joined(old: Tensor, added: Tensor) -> Tensor:
            both = old.new_empty(size)
            both[place], both[new] = old, added
            return both

        owner = joined(self.owner, self.owner[cells])
        return _Spline(joined(self.x, x), joined(self.y, y), owner), place

    def moves(self, finer: "_Spline", cells: Tensor, left: Tensor, log_odds: Map) -> Tensor:
        """Return by how much the log-odds of values differ between two splines, shape ``(S,)``.

        Compared are the middle of a cell, where it was halved, and the middle of either half: of a
        flank that is the same to the left and to the right, the first alone would not tell.

        Args:
            finer: The splines with these cells halved.
            cells: The cells, shape ``(S,)``.
            left: Their left halves, shape ``(S,)``.
            log_odds: As in :func:`mapped`.
        """
        parts = torch.tensor([0.25, 0.5, 0.75], dtype=self.x.dtype, device=self.x.device)
        x = self.x[cells] + parts[:, None] * self.width[cells]
        y = self.at(x, cells)
        back = finer.inverse(y, left + (y > finer.y[left + 1]))
        return (log_odds(back) - log_odds(x)).abs().amax(0)


class _Solver:
    """The flow itself, with the sign by which it increases.

    Args:
        transform: A flow in one dimension.
        contexts: The contexts that it is given, shape ``(B, C)``, or None.
    """

    def __init__(self, transform: InterpolantTransform, contexts: Tensor | None) -> None:
        self.transform, self.contexts = transform, contexts

    def __call__(self, w: Tensor, owner: Tensor) -> Tensor:
        """Return where it takes values, shape ``(N,)``, of contexts, ascending, ``(N,)``."""
        if self.contexts is None or len(self.contexts) == 1 or not len(w):
            context = None if self.contexts is None else self.contexts[0]
            return self._solved(w, context)
        counts = torch.bincount(owner, minlength=len(self.contexts))
        first, found = counts.cumsum(0) - counts, torch.empty_like(w)
        order = counts.argsort(descending=True)[: int((counts > 0).sum())]
        # Contexts with about as many values together: those of each share its embedding.
        while len(order):
            most = int(counts[order[0]])
            many = max(1, ROWS_PER_SOLVE // most)
            some, order = order[:many], order[many:]
            rows = torch.arange(most, device=w.device)[:, None].minimum(counts[some] - 1)
            rows = rows + first[some]  # the last of a context again where others have more
            found[rows] = self._solved(w[rows], self.contexts[some])
        return found

    def _solved(self, w: Tensor, context: Tensor | None) -> Tensor:
        end = self.transform.end
        view = InterpolantTransform._view(self.transform, context, end, embeds=False)
        return self.transform.sign * view(w[..., None])[..., 0]
