r"""Whether a map pays, and which: a few Gaussians behind it, against as many without it."""

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from .data import drawn, moments, usual
from .marginals import FEWEST, Chart, Gaussianized, marginal_transform
from .radial import radial_transform
from .supports import Constraint

__all__ = ["preferred_support"]

_GAIN = 0.05  # nats per row
_SAMPLE = 50_000  # rows that set the knots
_FEW = 4000  # of them, for the comparison, or
_FEW_EACH = 100  # times the dimension
_WIDEST = 64  # dimensions: beyond, the comparison would take too long
_SPLITS = 3
_TRIMMED = 0.01  # of the differences, on either side
_COMPONENTS = 8
_ROWS_EACH = 10  # times the dimension, for a component
_ITERATIONS = 20
_NARROW = 1e-5  # added to the variances of whitened rows


def preferred_support(
    rows: Tensor, support: Constraint, weights: Tensor | None = None, *, always: bool = False
) -> Constraint:
    """Return a support behind the map that pays, set by rows, or itself where none does.

    One pays where a mixture of eight Gaussians, fitted to the rows behind the map, has 0.05 nats
    more on held-out rows, and more than chance, than one fitted to the rows themselves, in each
    of three splits; of two, the one with more in its worst split. A map of single columns does so
    for spikes, slabs and tails of single columns; one of lengths where one scale is common to all
    columns; none for separate modes, whose shapes they would bend. Where there are fewer than
    80 D rows to fit, or D > 64, the support is returned as it is. The answer depends on the rows
    alone, and on no generator's state.

    Args:
        rows: Unconstrained rows, shape ``(N, D)``.
        support: The support they come from.
        weights: Non-negative weights, shape ``(N,)``, or None.
        always: Whether to take a map of single columns without comparing.

    Raises:
        ValueError: If a map is to be taken always, and there are too few rows to set one.
    """
    if always and len(rows) < FEWEST:
        raise ValueError(f"expected at least {FEWEST} rows for marginals=True, got {len(rows)}")
    few = rows[_drawn(len(rows), weights).to(rows.device)].cpu().double()  # where maps are kept
    make = marginal_transform if always else _best(few[: max(_FEW, _FEW_EACH * rows.shape[1])])
    chart = None if make is None else make(few)
    return support if chart is None else Gaussianized(support, chart)


def _drawn(count: int, weights: Tensor | None) -> Tensor:
    """Return which rows to look at, in a random order, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    if weights is None:
        return torch.randperm(count, generator=generator)[:_SAMPLE]
    return drawn(weights.cpu(), min(count, _SAMPLE), generator)


def _best(rows: Tensor) -> Callable[[Tensor], Chart | None] | None:
    """Return what makes the map that pays most, or None."""
    if rows.shape[1] > _WIDEST:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fit gives them
            m = moments(rows)
            rows = rows[usual(m.white(rows))]
            # Rows that repeat, as a Markov chain's or weighted ones do, are held out together.
            part = torch.unique(rows, dim=0, return_inverse=True)[1] % 10
            gains = dict.fromkeys((marginal_transform, radial_transform), math.inf)
            for i in range(_SPLITS):
                split = _Split(rows[part != i], rows[part == i])
                found = {make: min(gain, split.gain(make)) for make, gain in gains.items()}
                gains = {make: gain for make, gain in found.items() if gain > 0}
                if not gains:
                    break
    except (ValueError, torch.linalg.LinAlgError):  # columns that the fit refuses, and says why
        return None
    return max(gains, key=lambda make: gains[make], default=None)


class _Split:
    """Rows to fit eight Gaussians to, and rows held out.

    Args:
        kept: The former, shape ``(N, D)``.
        held: The latter, shape ``(M, D)``.
    """

    def __init__(self, kept: Tensor, held: Tensor) -> None:
        self.kept, self.held = kept, held
        enough = len(kept) >= _COMPONENTS * _ROWS_EACH * kept.shape[1]
        self.plain = _mixture(kept, held) if enough else None

    def gain(self, make: Callable[[Tensor], Chart | None]) -> float:
        """Return the mean nats per held-out row gained behind a map, 0 if it might be chance."""
        chart = None if self.plain is None else make(self.kept)
        if chart is None:
            return 0.0
        u = chart.inv(self.held)
        try:
            behind = _mixture(chart.inv(self.kept), u) - chart.log_abs_det_jacobian(u, self.held)
        except (ValueError, torch.linalg.LinAlgError):  # columns that depend on each other there
            return 0.0
        gain = (behind - self.plain).sort().values
        gain = gain[int(_TRIMMED * len(gain)) : math.ceil((1 - _TRIMMED) * len(gain))]
        chance = 2 * float(gain.std()) / math.sqrt(len(gain))
        return float(gain.mean()) if float(gain.mean()) > max(_GAIN, chance) else 0.0


def _mixture(kept: Tensor, held: Tensor) -> Tensor:
    """Return held-out log-densities, shape ``(M,)``, of a Gaussian mixture fitted by EM."""
    m = moments(kept)
    x, dim = m.white(kept), kept.shape[1]
    nearest = torch.cdist(x, x[:_COMPONENTS]).argmin(1)
    shares = torch.nn.functional.one_hot(nearest, _COMPONENTS).T.to(x)

    def joint(w: Tensor) -> Tensor:
        inverses = torch.linalg.inv(roots).mT
        # One component at a time: all at once would leave the cache.
        square = torch.stack(
            [((w - m) @ r).square().sum(1) for m, r in zip(locs, inverses, strict=True)]
        )
        volume = roots.diagonal(dim1=1, dim2=2).log().sum(1) + 0.5 * dim * math.log(2 * math.pi)
        return (logits - volume)[:, None] - 0.5 * square

    for _ in range(_ITERATIONS):
        total = shares.sum(1, keepdim=True).clamp(min=1.0)
        logits, shares = (total / total.sum()).log()[:, 0], shares / total
        locs = shares @ x
        centred = ((x - m) * s.sqrt()[:, None] for m, s in zip(locs, shares, strict=True))
        covs = torch.stack([part.T @ part for part in centred])
        roots = torch.linalg.cholesky(covs + _NARROW * torch.eye(dim).to(x))
        shares = joint(x).softmax(0)
    log_density = joint(m.white(held)).logsumexp(0)
    return log_density - torch.linalg.slogdet(m.linear).logabsdet
