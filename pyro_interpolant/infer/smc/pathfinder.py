r"""Pathfinder: Gaussians :math:`N(x_k, |H_k|^{-1})` along Newton's way uphill, by evidence bound.

Those found, with heavier tails, and the wide start beside them are the mixture of Student-t's
from which particles are carried to the target.
"""

import math

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..._torch import draws_nothing
from ...training.clock import Clock
from .tempering import HMCKernel, LogDensity, tempered_smc

_START_SCALE = 4.0  # of the default start
_START_ROWS = 2000  # that are drawn of a start given as a distribution
_SEARCHES = 64  # 4 leave modes to tempering, which may lose them
_MAX_COMPONENTS = 32  # besides the wide one
_SCOUTS = 512  # particles carried from the wide start
_MAX_ITERATIONS = 60  # of a search
_STEPS = (8.0, 3.0, 1.0, 0.5, 0.2, 0.04, 0.003)  # along Newton's direction that are tried
_TRIED = 16  # draws of the start, at which second derivatives are looked for
_BOUND_DRAWS = 8  # for the evidence bound of each Gaussian on the way
_WIDE_SHARE = 0.15  # of the mixture, for the wide component
_DF = 5.0  # degrees of freedom
_INFLATION = 1.3  # the scale of a component, in standard deviations of its Gaussian
_MIN_DISTANCE = 0.3  # of components: mean squared standard deviations per dimension
_MIN_GAIN = 1e-2  # nats, below which a search has arrived
_MAX_DIM = 64  # above which no Hessians are computed


class StudentTMixture:
    """A mixture of multivariate Student-t's with 5 degrees of freedom.

    Args:
        share: Weights, shape ``(K,)``.
        loc: Centres, shape ``(K, D)``.
        root: Scales L with L L^T the shape matrix, shape ``(K, D, D)``.
    """

    def __init__(self, share: Tensor, loc: Tensor, root: Tensor) -> None:
        self.log_share, self.loc, self.root = share.log(), loc, root
        exact = torch.linalg.inv(root.double())
        self.inverse = exact.to(root)
        self.log_det = torch.linalg.slogdet(exact).logabsdet.to(root)

    def sample(self, count: int) -> Tensor:
        """Return draws, shape ``(count, D)``."""
        k = torch.multinomial(self.log_share.exp(), count, replacement=True)
        z = torch.randn(count, self.loc.shape[1]).to(self.loc)
        chi = torch._standard_gamma(torch.full((count, 1), _DF / 2)).to(z) * 2 / _DF
        return self.loc[k] + torch.einsum("nij,nj->ni", self.root[k], z / chi.sqrt())

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log-density, shape ``(N,)``, of rows of shape ``(N, D)``."""
        dim = x.shape[1]
        z = torch.einsum("kij,nkj->nki", self.inverse, x[:, None] - self.loc)
        constant = math.lgamma((_DF + dim) / 2) - math.lgamma(_DF / 2)
        constant -= 0.5 * dim * math.log(math.pi * _DF)
        each = self.log_det - 0.5 * (_DF + dim) * torch.log1p(z.square().sum(-1) / _DF)
        return (constant + each + self.log_share).logsumexp(-1)


def initial_mixture(start: Tensor | Distribution | None, like: Tensor) -> StudentTMixture:
    """Return a Student-t wider than, and around, the start that a user gave.

    Args:
        start: Rows, shape ``(M, D)``, a centre, shape ``(D,)``, a distribution over ``(D,)``, or
            None.
        like: A tensor of shape ``(D,)``, of the type and on the device to work in.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is of another shape, or not finite, or its rows do not vary.
    """
    dim, root = len(like), _START_SCALE * torch.eye(len(like))
    if start is None:
        start = torch.zeros_like(like)
    if isinstance(start, Distribution):
        if start.event_shape != (dim,) or start.batch_shape:
            raise ValueError(
                f"expected a start of event shape ({dim},) and no batch, got "
                f"{tuple(start.event_shape)} and {tuple(start.batch_shape)}"
            )
        start = start.sample((_START_ROWS,))
    if not isinstance(start, Tensor):
        raise TypeError(
            f"expected start to be a tensor or a distribution, got {type(start).__name__}"
        )
    if start.dim() not in (1, 2) or start.shape[-1] != dim:
        raise ValueError(
            f"expected a start of shape (M, {dim}) or ({dim},), got {tuple(start.shape)}"
        )
    if not bool(torch.isfinite(start).all()):
        raise ValueError("expected a finite start, got NaN or infinite values")
    if start.dim() == 2:
        start = start.double()  # whole numbers have no mean
        spread = start.std(0)
        if len(start) < 2 or not float(spread.min()) > 0:
            raise ValueError("expected rows of start that vary in every column: pass more")
        start, root = start.mean(0), _INFLATION * torch.diag(spread)
    return StudentTMixture(like.new_ones(1), start.to(like)[None], root.to(like)[None])


@torch.no_grad()
def pathfinder(density: LogDensity, wide: StudentTMixture, clock: Clock) -> StudentTMixture:
    r"""Return a mixture of the best Gaussians on Newton's way uphill, and of the wide start.

    From each start a saddle-free Newton search goes uphill; of the Gaussians
    :math:`N(x_k, |H_k|^{-1})` on its way the one with the largest evidence bound is kept: that
    need not be the one at the mode, where there may be next to no mass.

    Args:
        density: The target.
        wide: Where to start from.
        clock: The time, whose limit ends the searches.

    References:
        Zhang, Carpenter, Gelman & Vehtari, *Pathfinder*, JMLR 2022, arXiv 2108.03782; Dauphin et
        al., arXiv 1406.2572 (saddle-free).
    """
    if wide.loc.shape[1] > _MAX_DIM or not _has_curvature(density, wide):
        return wide
    x = _spread(_scouts(density, wide, clock), _SEARCHES)
    floor = 1e-4 / wide.root.double().square().sum(-1).mean(0)  # precisions, shape (D,)
    bound = x.new_full((len(x),), -math.inf, dtype=torch.float64)
    loc, root = x.clone(), wide.root[0].double().repeat(len(x), 1, 1)
    value, active = density(x), torch.arange(len(x), device=x.device)
    for _ in range(_MAX_ITERATIONS):
        here = x[active]
        step, own = _newton(*_derivatives(density, here), floor)
        new = _bound(density, here, own)
        better = new > bound[active]
        at = active[better]
        bound[at], loc[at], root[at] = new[better], here[better], own[better]
        tried = here + here.new_tensor(_STEPS)[:, None, None] * step.to(here)
        values = density(tried.flatten(0, 1)).reshape(len(_STEPS), -1)
        best = values.max(0)
        gain = (best.values - value[active]).nan_to_num(nan=0.0, posinf=math.inf)
        moved = gain > 0
        at = active[moved]
        found = tried[best.indices, torch.arange(len(here), device=x.device)]
        x[at], value[at] = found[moved], best.values[moved]
        active = active[gain > _MIN_GAIN]
        if len(active) == 0 or clock.is_over():
            break
    return _mixed(wide, bound, loc, root)


def _scouts(density: LogDensity, wide: StudentTMixture, clock: Clock) -> Tensor:
    """Return rows from the wide start and from all along its path to the density."""
    draws, start, rows = wide.sample(_SCOUTS), LogDensity(wide.log_prob), list[Tensor]()
    for level in tempered_smc(draws, start, density, HMCKernel()):
        rows.append(level.particles.x)
        if clock.is_over():
            break
    return torch.cat(rows)


def _spread(x: Tensor, count: int) -> Tensor:
    """Return rows far apart: each is drawn by its squared distance from those drawn already.

    References:
        Arthur & Vassilvitskii, *k-means++*, SODA 2007.
    """
    white = (x - x.mean(0)) / x.std(0)
    chosen = [int(torch.randint(len(x), ()))]
    nearest = torch.full((len(x),), math.inf).to(white)
    for _ in range(min(count, len(x)) - 1):
        nearest = torch.minimum(nearest, (white - white[chosen[-1]]).square().sum(-1))
        chosen.append(int(torch.multinomial(nearest.clamp_max(1e30), 1)))
    return x[chosen]


def _has_curvature(density: LogDensity, wide: StudentTMixture) -> bool:
    """Return whether the density has second derivatives at draws of the start."""
    return bool(_derivatives(density, wide.sample(_TRIED))[1].any())


def _distinct(bound: Tensor, loc: Tensor, root: Tensor) -> list[int]:
    """Return the best Gaussians, each well apart from all better ones."""
    kept: list[int] = []
    least = float(bound.max()) - 10 - loc.shape[1]
    inverse = torch.linalg.inv(root)
    for i in bound.argsort(descending=True).tolist():
        if not (bound[i].isfinite() and bound[i] >= least) or len(kept) == _MAX_COMPONENTS:
            break
        away = torch.einsum("kij,kj->ki", inverse[kept], (loc[i] - loc[kept]).double())
        if not bool((away.square().mean(-1) < _MIN_DISTANCE).any()):
            kept.append(i)
    return kept


def _mixed(wide: StudentTMixture, bound: Tensor, loc: Tensor, root: Tensor) -> StudentTMixture:
    """Return the wide start and, equally weighted, the best Gaussians with heavier tails."""
    kept = _distinct(torch.where(bound.isnan(), -math.inf, bound), loc, root)
    if not kept:
        return wide
    loc, root, bound = loc[kept], root[kept], bound[kept]
    share = (1 - _WIDE_SHARE) * torch.ones_like(bound) / len(bound)
    share = torch.cat((share, _WIDE_SHARE * wide.log_share.double().exp()))
    roots = torch.cat((_INFLATION * root.to(loc), wide.root))
    return StudentTMixture(share.to(loc), torch.cat((loc, wide.loc)), roots)


def _derivatives(density: LogDensity, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients, shape ``(S, D)``, and Hessians, shape ``(S, D, D)``, float64."""
    leaf = x.detach().clone().requires_grad_()
    with torch.enable_grad(), draws_nothing():
        value = density(leaf)
        (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
        rows = [_gradient_of_sum(gradient[:, j], leaf) for j in range(x.shape[1])]
    hessian = torch.stack(rows, 1).double()
    return gradient.detach().double().nan_to_num(0, 0, 0), hessian.nan_to_num(0, 0, 0)


def _gradient_of_sum(value: Tensor, leaf: Tensor) -> Tensor:
    """Return the gradient of the sum of values, zero where none exists or can be computed."""
    try:
        return torch.autograd.grad(value.sum(), leaf, retain_graph=True, materialize_grads=True)[0]
    except RuntimeError:  # a constant, or without second derivatives
        return torch.zeros_like(leaf)


def _newton(gradient: Tensor, hessian: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Return the saddle-free step, shape ``(S, D)``, and roots of ``|H|^-1``, ``(S, D, D)``."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).abs()
    scale = torch.maximum(diagonal, floor).rsqrt()
    scaled = -0.5 * (hessian + hessian.mT) * scale[:, None] * scale[:, :, None]
    scaled = scaled + torch.diag_embed(floor * scale.square())
    values, vectors = torch.linalg.eigh(scaled)
    precision = values.abs().clamp_min(1e-7)
    root = scale[:, :, None] * vectors * precision.rsqrt()[:, None]
    step = torch.einsum("sij,skj,sk->si", root, root, gradient)
    return step, root


def _bound(density: LogDensity, loc: Tensor, root: Tensor) -> Tensor:
    """Return the evidence bound of each Gaussian by a few draws, shape ``(S,)``."""
    z = torch.randn(_BOUND_DRAWS // 2, *loc.shape, dtype=torch.float64, device=loc.device)
    z = torch.cat((z, -z))
    x = loc + torch.einsum("sij,msj->msi", root, z).to(loc.dtype)
    log_p = density(x.flatten(0, 1)).reshape(_BOUND_DRAWS, -1).double()
    log_det = torch.linalg.slogdet(root).logabsdet
    dim = loc.shape[1]
    return log_p.mean(0) + log_det + 0.5 * dim * (1 + math.log(2 * math.pi))
