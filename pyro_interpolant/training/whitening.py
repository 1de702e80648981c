r"""What is done to data before training: checks, moments, batches."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions.constraints import is_circular
from ..distributions.interpolant import AnyDistribution
from ..interpolants.nonlinear import Geodesic
from ..nn.mlp import VelocityMLP
from ..nn.velocity import evaluate
from ..transforms.flow import Flow
from .batches import Rows, some

__all__ = ["Moments", "inform", "moments", "precondition", "tamed", "usual"]


_DEPENDENT = 1e-12  # a correlation eigenvalue below this means linearly dependent columns
_NARROW = 1e-3  # a standard deviation along an eigenvector, of scaled columns
_RARE = 0.005  # the share of values on either side that may be outliers
_RESOLVED = 0.1  # of the smallest spread, beyond which rounding is warned of
_CLIP = 20.0  # robust standard deviations beyond which a value does not stretch the whitening
_IQR, _MOST = 1.349, 5.152  # standard deviations between the quartiles, and between rare values
_VALUES = 2**20  # looked at for quantiles
_CUTS = 3  # along the axes, at the most


class Moments(NamedTuple):
    """An affine map that whitens data: ``x = loc + linear @ w`` with ``w`` of unit covariance.

    Attributes:
        loc: The centre, float64, shape ``(D,)``.
        linear: The map L, float64, shape ``(D, D)``.
        whitening: Its inverse, float64, shape ``(D, D)``.
    """

    loc: Tensor
    linear: Tensor
    whitening: Tensor

    def white(self, x: Tensor) -> Tensor:
        """Return rows whitened, float64, shape ``(N, D)``."""
        return (x.to(self.loc) - self.loc) @ self.whitening.T


def tamed(x: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return rows whose wild values are cut, ``(N, D)``; x itself where there are none.

    Wild is what is beyond 20 robust standard deviations and among the 0.5% farthest on its side:
    what is far and not so rare is a mode.

    Args:
        x: Rows, shape ``(N, D)``.
        weights: Their weights, shape ``(N,)``, or None.
    """
    few = x[_few(x, weights)]
    levels = x.new_tensor([_RARE, 0.25, 0.5, 0.75, 1 - _RARE])
    low, first, median, third, high = torch.quantile(few, levels, dim=0)
    # Where most values are one and the same, the few others tell the scale.
    deviation = torch.where(third > first, (third - first) / _IQR, (high - low) / _MOST)
    spread = torch.where(deviation > 0, _CLIP * deviation, torch.inf)
    low, high = torch.minimum(median - spread, low), torch.maximum(median + spread, high)
    if bool(((x >= low) & (x <= high)).all()):
        return x
    return torch.minimum(torch.maximum(x, low), high)


def _few(x: Tensor, weights: Tensor | None) -> Tensor:
    """Return which rows tell the quantiles."""
    return some(len(x), max(1, _VALUES // x.shape[1]), weights).to(x.device)


class _Axes(NamedTuple):
    """Centre and scale of columns, ``(D,)``; the correlation's eigenvalues and eigenvectors."""

    loc: Tensor
    scale: Tensor
    eigenvalues: Tensor
    vectors: Tensor

    def along(self, x: Tensor) -> Tensor:
        """Return rows along the axes, shape ``(N, D)``."""
        return (x - self.loc) / self.scale @ self.vectors

    def across(self, z: Tensor) -> Tensor:
        """Return rows along the axes in columns again, shape ``(N, D)``."""
        return self.loc + self.scale * (z @ self.vectors.T)


def _axes(x: Tensor, share: Tensor) -> _Axes:
    share = share / share.sum()
    loc = share @ x
    centred = x - loc
    scale = (share @ centred.square()).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)  # some of the rows may not vary
    z = centred / scale
    return _Axes(loc, scale, *torch.linalg.eigh((share[:, None] * z).T @ z))


def _robust_axes(x: Tensor, weights: Tensor | None) -> _Axes:
    """Return the axes of rows whose wild values are cut, first by column, then along the axes.

    Where columns nearly depend on each other, a row that is tame in each may be wild between them.
    It also turns the axes: once it is cut along them, they are better, and it is cut again.
    """
    share = x.new_ones(len(x)) if weights is None else weights.double()
    x = tamed(x, weights)
    few = x[_few(x, weights)]  # by weight, where there are any
    for _ in range(_CUTS):
        axes = _axes(few, few.new_ones(len(few)))
        along = axes.along(few)
        cut = tamed(along)
        if cut is along:
            break
        few = axes.across(cut)
    along = axes.along(x)
    cut = tamed(along, weights)
    return _axes(x if cut is along else axes.across(cut), share)


def moments(x: Tensor, weights: Tensor | None = None) -> Moments:
    """Return the map that whitens the rows of x.

    Columns are centred and scaled first, so that their units do not matter, then multiplied by the
    symmetric inverse root of their correlation: each whitened column stays as near to its own as
    can be, and the map is unique; where columns nearly depend on each other, they are scaled along
    the eigenvectors. Values beyond 20 robust standard deviations and among the 0.5% farthest on
    their side, in a column or along an eigenvector, count as if they were there: a wild row does
    not set the scale of all others.

    Args:
        x: Finite rows, shape ``(N, D)``.
        weights: Non-negative weights, shape ``(N,)``, or None.

    Warns:
        UserWarning: If the columns are dependent but for little more than rounding.

    Raises:
        ValueError: If there are fewer rows than columns, a constant column, or linearly dependent
            columns.
    """
    count, dim = x.shape
    if count <= dim:
        raise ValueError(
            f"expected more rows than dimensions, got {count} rows of {dim}: get more data, or "
            "drop columns"
        )
    eps, x = torch.finfo(x.dtype).eps, x.double()
    constant = (x == x[0]).all(dim=0)
    if bool(constant.any()):
        columns = constant.nonzero().flatten().tolist()
        raise ValueError(
            f"expected columns that vary, got constant columns {columns}: drop them, they have no "
            "density"
        )
    loc, scale, eigenvalues, vectors = _robust_axes(x, weights)
    if float(eigenvalues[0]) < _DEPENDENT:
        worst = vectors[:, 0].abs().topk(min(2, dim)).indices.tolist()
        raise ValueError(
            f"expected linearly independent columns, got dependent ones (columns {sorted(worst)} "
            "take part): drop one, or add noise of the size of the measurement's error"
        )
    roots = eigenvalues.sqrt()
    rounding = eps * (loc.abs() + scale) / scale
    _warn_if_unresolved(vectors[:, 0], rounding, float(roots[0]))
    # Near dependence the eigenvectors keep the rounding of the narrow directions to themselves.
    turn = vectors if float(roots[0]) > _NARROW else torch.eye(dim).to(vectors)
    linear = scale[:, None] * ((vectors * roots) @ turn.T)
    return Moments(loc, linear, (turn / roots) @ vectors.T / scale)


def _warn_if_unresolved(direction: Tensor, rounding: Tensor, spread: float) -> None:
    """Warn where data hardly vary by more than their rounding along a direction, ``(D,)``."""
    noise = float((direction * rounding).norm())
    if noise > _RESOLVED * spread:
        worst = sorted(direction.abs().topk(min(2, len(direction))).indices.tolist())
        warnings.warn(
            f"a combination of columns (columns {worst} take part) varies by {spread:.1e} of "
            f"their spread, and rounding is {noise:.1e}: a flow learns the rounding. Give rows "
            "and flow in float64, centre columns far from zero, drop one, or add noise of the "
            "size of the measurement's error",
            stacklevel=4,
        )


def usual(w: Tensor) -> Tensor:
    """Return the places of whitened rows but for outliers, those both far and rare, ``(N,)``.

    Far is 20 times the median distance from the centre, rare the farthest 0.5%. One such row would
    decide alone which weights have the best held-out loss. Other rows come twice in their stead.

    Args:
        w: Whitened rows, shape ``(N, D)``.
    """
    distance = w.double().norm(dim=-1)
    few = distance[some(len(w), _VALUES).to(w.device)]
    good = distance <= torch.maximum(_CLIP * few.median(), few.quantile(1 - _RARE))
    places = good.nonzero().flatten()
    return places[torch.arange(len(w), device=w.device) % len(places)]


def precondition(flow: Flow, distribution: AnyDistribution, raw: Rows) -> None:
    """Set the whitening map, and what the network is told, from training rows."""
    rows, contexts, partners = raw.w, raw.context, raw.partner
    m = moments(rows, raw.weight)
    if isinstance(flow.interpolant, Geodesic):
        _check_angles(flow, distribution, rows, contexts)
    elif distribution.base is None:
        flow.precondition(*(m if partners is None else _aligned(m, rows, partners)))
    else:  # one scalar: a full whitening would change what the shortest path is
        base = tamed(distribution.base.sample((len(rows),)).double())
        target = tamed(rows.double(), raw.weight)
        share = target.new_ones(len(rows))
        start, spread = _about(base, share)
        end, other = _about(target, share if raw.weight is None else raw.weight.double())
        scale = ((spread + other) / 2).sqrt()
        eye = torch.eye(flow.dim, dtype=torch.float64, device=rows.device)
        flow.precondition((start + end) / 2, scale * eye, eye / scale)
    inform(flow, raw, again=True)


def inform(flow: Flow, raw: Rows, *, again: bool = False) -> None:
    """Tell the network the reach of rows and the scale of contexts: an untrained one, or again."""
    if isinstance(flow.velocity, VelocityMLP) and (again or _is_untrained(flow.velocity)):
        contexts = None if raw.context is None else tamed(raw.context.double())
        flow.velocity.precondition(flow.to_white(raw.w.to(flow.loc)), contexts)


def _is_untrained(velocity: VelocityMLP) -> bool:
    return not bool(velocity.output.weight.any())


def _about(x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean, shape ``(D,)``, and the mean variance of a column, of weighted rows."""
    share = weights / weights.sum()
    loc = share @ x
    return loc, (share @ (x - loc).square()).mean()


def _check_angles(
    flow: Flow, distribution: AnyDistribution, rows: Tensor, contexts: Tensor | None
) -> None:
    """Leave the whitening map the identity, and check what else angles need."""
    if not is_circular(distribution.constraint):
        raise ValueError(
            f"expected support=circular for the interpolant {type(flow.interpolant).__name__}, "
            f"got support={distribution.constraint}"
        )
    x = rows[:64].to(flow.loc)
    few = None if contexts is None else contexts[:64].to(flow.loc)
    t = torch.linspace(0.1, 0.9, len(x)).to(x)
    turns = 2 * torch.pi * torch.arange(1, flow.dim + 1).to(x)
    with torch.no_grad():
        here, there = (evaluate(flow.velocity, t, s, few) for s in (x, x + turns))
    far = float((here - there).abs().max())
    if far > 1e-3 * (1 + float(here.abs().max())):
        raise ValueError(
            "expected a velocity of period 2 pi in every angle, such as TorusMLP, got "
            f"{type(flow.velocity).__name__}, which differs by {far:.3g} whole turns away: feed "
            "it with cosines and sines"
        )
    eye = torch.eye(flow.dim)
    flow.precondition(torch.zeros(flow.dim), eye, eye)


def _aligned(m: Moments, rows: Tensor, partners: Tensor) -> Moments:
    """Return whitening turned toward the partners: paths of a pair must not be made to cross."""
    w = m.white(rows)
    u, _, vh = torch.linalg.svd(w.T @ partners.double())
    turn = u @ vh
    return Moments(m.loc, m.linear @ turn, turn.T @ m.whitening)
