r"""The whitening map, and what a network is told of the rows, set before training."""

import torch
from torch import Tensor

from .data import Moments, moments, tamed
from .divergence import evaluate
from .flow import Flow
from .networks import VelocityMLP
from .objective import Rows
from .preparation import AnyDistribution
from .supports import is_circular
from .torus import Geodesic

__all__ = ["inform", "precondition"]


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
        flow.velocity.precondition(flow.to_white(raw.w.to(flow.loc)), raw.context)


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
