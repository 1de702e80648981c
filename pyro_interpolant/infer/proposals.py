r"""Proposals for the latents behind noisy rows, in the base of a flow.

That of a row is a mixture of Student-t fitted to draws of the flow and around modes of its
posterior, :math:`\propto N(z; 0, I)\, p(y | f(z))`, which are weighted and then left: they are
where the mixture is high, so that their own weights under it would be too small.

References:
    West, J. R. Stat. Soc. B 55 (1993) (mixtures of kernels fitted to weighted draws, of their mean
    and covariance).
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributions.interpolant import InterpolantDistribution
from .noise import Measurements

_DIFFERENCE = 1e-2  # in the base, which gives the slopes of the flow
_LONGEST_STEP = 1e30  # in the base
_STEP_SIZES = (1.0, 0.3, 0.1, 0.03)  # of Gauss-Newton steps; the best is taken, if one is good
_TAIL = 5.0  # degrees of freedom of proposals
_WIDENING = 1.2  # of its variance, beyond what the curvature at the mode says
# Of parts at modes: with 0.4 at one, k-hat of bent posteriors is above 0.7 four times as often.
_MODE_SHARE = 0.3
_KERNELS = 4  # beside the parts at modes; 16 and 48 were no better
# Of the search for a sharp core: rounds for each Gauss-Newton step, new points in each, and the
# best that they are drawn from, whose covariance is widened. It is taken about the previous mean.
# About their own, the search ended too early for two to seven of ten rows that lie beyond all
# draws; this way for none.
_ROUNDS, _ROUND_POINTS, _BEST, _SPREAD = 10, 128, 32, 1.3


class LocalProposal(NamedTuple):
    """A mixture of J Student-t for each of n rows.

    Attributes:
        means: Shape ``(n, J, D)``.
        roots: The Cholesky factors of the scale matrices, shape ``(n, J, D, D)``.
        shares: Of the parts, shape ``(J,)``.
    """

    means: Tensor
    roots: Tensor
    shares: Tensor

    def beside(self, other: "LocalProposal", share: float) -> "LocalProposal":
        """Return the mixture of this one, with a share of it, and another."""
        means, roots = (torch.cat(parts, 1) for parts in zip(self[:2], other[:2], strict=True))
        shares = torch.cat((share * self.shares, (1 - share) * other.shares))
        return LocalProposal(means, roots, shares)

    def sample(self, count: int) -> Tensor:
        """Return draws, shape ``(n, count, D)``."""
        n, _, dim = self.means.shape
        chi2 = torch.distributions.Chi2(self.means.new_tensor(_TAIL)).sample((n, count, 1))
        z = torch.randn(n, count, dim, dtype=chi2.dtype, device=chi2.device)
        z *= (_TAIL / chi2).sqrt()
        part = torch.multinomial(self.shares.expand(n, -1), count, replacement=True)[..., None]
        found = z
        for i, (mean, root, _) in enumerate(self._each()):  # a root for each draw might not fit
            found = torch.where(part == i, mean[:, None] + z @ root.mT, found)
        return found

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log-densities, shape ``(n, S)``, of points of shape ``(n or 1, S, D)``."""
        dim = z.shape[-1]
        constant = math.lgamma((_TAIL + dim) / 2) - math.lgamma(_TAIL / 2)
        constant -= 0.5 * dim * math.log(_TAIL * math.pi)

        def of_part(mean: Tensor, root: Tensor, share: Tensor) -> Tensor:
            white = (z - mean[:, None]) @ torch.linalg.inv(root).mT
            far = torch.log1p(white.square().sum(-1) / _TAIL)
            volume = root.diagonal(dim1=-2, dim2=-1).log().sum(-1, keepdim=True)
            return share.log() + constant - volume - 0.5 * (_TAIL + dim) * far

        return functools.reduce(torch.logaddexp, (of_part(*part) for part in self._each()))

    def _each(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return zip(self.means.unbind(1), self.roots.unbind(1), self.shares, strict=True)


def standard_log_prob(z: Tensor) -> Tensor:
    """Return the log-density of N(0, I), shape ``(*)``."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))


def balanced(
    proposal: LocalProposal, z: Tensor, likelihood: Tensor, counts: tuple[int, int]
) -> Tensor:
    """Return the log-weights of base points by the balance heuristic, shape ``(n, S)``.

    Args:
        proposal: That of each row, beside N(0, I).
        z: The points, shape ``(n or 1, S, D)``.
        likelihood: Their log-likelihoods, shape ``(n, S)``.
        counts: How many points are from N(0, I), and from the proposal.
    """
    log_prior, log_own = standard_log_prob(z), proposal.log_prob(z)
    shared, own = (math.log(count) for count in counts)
    weights = log_prior + likelihood - torch.logaddexp(log_prior + shared, log_own + own)
    return weights.masked_fill(weights.isnan(), -math.inf)


def fitted_proposal(
    flow: InterpolantDistribution,
    rows: Measurements,
    z: Tensor,
    likelihood: Tensor,
    steps: int,
    own: int,
) -> LocalProposal:
    r"""Return a proposal for each row's posterior in the base, fitted to weighted draws.

    Two parts are Student-t at modes, looked for from the best draw and from that of most weight
    beside the first part: where there is another mode, it is there, and what is as wide as both
    together would hardly meet either. The others are J kernels around draws z of N(0, I) and of
    those two, chosen by weight: with m and C the mean and covariance of all draws by weight, and
    :math:`h = J^{-1 / (D + 4)}`, their centres are :math:`m + \sqrt{1 - h^2} (z - m)` and their
    scales :math:`h^2 C`, widened as those at modes. Where few draws are effective, C is drawn to
    the curvature at the first mode.

    Args:
        flow: The population.
        rows: The measurements, n of them.
        z: Draws of N(0, I), shape ``(n or 1, S, D)``.
        likelihood: Their log-likelihoods, shape ``(n, S)``.
        steps: Gauss-Newton steps to a mode.
        own: How many draws around the modes of each row; of one there is one mode.
    """
    row = torch.arange(len(rows), device=z.device)[:, None]
    dim = z.shape[-1]
    best = (standard_log_prob(z) + likelihood).argmax(-1)
    z = z.expand(len(rows), -1, -1)
    modes = local_proposal(flow, rows, z[row[:, 0], best], steps)
    if own > 1:
        other = balanced(modes, z, likelihood, (z.shape[1], own)).argmax(-1)
        modes = modes.beside(local_proposal(flow, rows, z[row[:, 0], other], steps), 0.5)
    own_z = modes.sample(own)
    own_likelihood = pushed(flow, rows, own_z)[-1]
    z, likelihood = torch.cat((z, own_z), 1), torch.cat((likelihood, own_likelihood), 1)
    weights = balanced(modes, z, likelihood, (z.shape[1] - own, own)).softmax(-1).to(z)
    weights = weights.nan_to_num(nan=1 / z.shape[1])  # of no likelihood anywhere: any of them
    mean = (weights[..., None] * z).sum(1, keepdim=True)
    far = (weights.sqrt()[..., None] * (z - mean)).double()
    one = weights.square().sum(-1).double()[:, None, None]  # over the number of effective draws
    root = modes.roots[:, 0].double()
    covariance = (1 - one) * far.mT @ far + one * root @ root.mT / _WIDENING
    h = _KERNELS ** (-1 / (dim + 4))
    scale = _root_of(_WIDENING * h**2 * covariance, root).to(z)[:, None]
    chosen = z[row, torch.multinomial(weights, _KERNELS, replacement=True)]
    centres = mean + math.sqrt(1 - h**2) * (chosen - mean)
    even = z.new_full((_KERNELS,), 1 / _KERNELS)
    kernels = LocalProposal(centres, scale.expand(-1, _KERNELS, -1, -1), even)
    return modes.beside(kernels, _MODE_SHARE)


def sharpened(
    flow: InterpolantDistribution,
    rows: Measurements,
    z: Tensor,
    u: Tensor,
    likelihood: Tensor,
    steps: int,
) -> tuple[Tensor, Tensor]:
    r"""Return draws, and one more of each row in a sharp core of its likelihood, if there is one.

    Where a likelihood has heavy or flat tails, draws may all lie in these, and slopes there do not
    tell of the core. Rounds of cross-entropy: of all points the best by likelihood are kept, and
    new ones drawn from their mean and covariance, as sums of them. In the flow's coordinates, so
    that nothing is solved for; the same sums of base points tell how probable they are. Of all,
    that of highest posterior density is then looked for in the base.

    Args:
        flow: The population.
        rows: The measurements, n of them.
        z: Draws of N(0, I), shape ``(n or 1, S, D)``.
        u: What they become in the flow's coordinates, of the same shape.
        likelihood: Their log-likelihoods, shape ``(n, S)``.
        steps: Gauss-Newton steps that follow, each of which some rounds are for.

    Returns:
        Base points, shape ``(n, S + 1, D)``, and their log-likelihoods, ``(n, S + 1)``.
    """
    dim, points, value = z.shape[-1], torch.cat((z, u), -1).expand(len(rows), -1, -1), likelihood
    tops, centre = [], None  # the mean of the last round: about it, steps widen the search
    for _ in range(_ROUNDS * steps):
        points, value = _highest(points, value, _BEST)
        mean, count = points.mean(1, keepdim=True), points.shape[1]
        sums = torch.randn(_ROUND_POINTS, count).to(z) * math.sqrt(_SPREAD / count)
        new = mean + sums @ (points - (mean if centre is None else centre))
        centre = mean
        found = rows.log_likelihood(flow.from_flow(new[..., dim:])[0])
        points, value = torch.cat((points, new), 1), torch.cat((value, found), 1)
        tops.append(_highest(points, standard_log_prob(points[..., :dim]) + value, 1))
    points, values = (torch.cat(parts, 1) for parts in zip(*tops, strict=True))
    more = base_points(flow, _highest(points, values, 1)[0][..., dim:])
    z = torch.cat((z.expand(len(rows), -1, -1), more), 1)
    return z, torch.cat((likelihood, pushed(flow, rows, more)[-1]), 1)


def _highest(points: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the points of highest value, ``(n, S, D)``, and their values, ``(n, S)``."""
    values, index = values.topk(min(count, values.shape[1]))
    return points.gather(1, index[..., None].expand(*index.shape, points.shape[-1])), values


def base_points(flow: InterpolantDistribution, u: Tensor) -> Tensor:
    """Return the base points of points in the flow's coordinates, ``(n, S, D)``.

    The solver backward is not quite the inverse of the solver forward, and where errors are small
    a posterior is narrower than what they differ by. One correction takes that off; copies, as the
    transform remembers what came of what.
    """
    z = flow.transform.inv(u).clone()
    return 2 * z - flow.transform.inv(flow.transform(z).clone())


def pushed(
    flow: InterpolantDistribution, rows: Measurements, z: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what base points become in the flow's coordinates, and as x, and log-likelihoods.

    Args:
        flow: The population.
        rows: The measurements, n of them.
        z: The points, shape ``(n, S, D)``.
    """
    u = flow.transform(z)
    x = flow.from_flow(u)[0]
    return u, x, rows.log_likelihood(x)


def local_proposal(
    flow: InterpolantDistribution, rows: Measurements, z: Tensor, steps: int
) -> LocalProposal:
    r"""Return the Student-t at the mode of each row's posterior in the base.

    The curvature is that of Gauss and Newton: :math:`I + J^T H J`, with J the slopes of the flow
    and H the Hessian of :math:`-\log p(y | x)`. Negative parts of the second term are left out.

    Args:
        flow: The population.
        rows: The measurements, n of them.
        z: Where to begin, shape ``(n, D)``.
        steps: How many steps to take.
    """
    dim, each = z.shape[-1], torch.arange(len(z), device=z.device)
    # In float64: noise may be 10,000 times wider in one direction than in another.
    identity = torch.eye(dim, dtype=torch.float64, device=z.device)
    offsets = _DIFFERENCE * identity.to(z)
    sizes = z.new_tensor(_STEP_SIZES)[:, None]
    root, (x, value) = identity.expand(len(z), dim, dim), _valued(flow, rows, z[:, None])
    for _ in range(steps):
        beside = flow.from_flow(flow.transform(z[:, None] + offsets))[0]
        slopes = (beside - x).reshape(len(z), dim, -1).mT.double() / _DIFFERENCE
        gradient, hessian = rows.derivatives(x[:, 0], slopes)
        root = _root_of(identity + _positive_part(-hessian), identity)
        step = torch.cholesky_solve((gradient - z)[..., None], root)[..., 0]
        # Not beyond the type of z, where none of the step would be infinity times zero.
        step = step.nan_to_num().clamp(-_LONGEST_STEP, _LONGEST_STEP).to(z)
        tries = z[:, None] + sizes * step[:, None]
        found = zip((z[:, None], x, value), (tries, *_valued(flow, rows, tries)), strict=True)
        tries, x, value = (torch.cat(parts, 1) for parts in found)
        best = value.argmax(-1)
        z, x, value = (part[each, best] for part in (tries, x, value))
        x, value = x[:, None], value[:, None]
    root = math.sqrt(_WIDENING) * _root_of(torch.cholesky_inverse(root), identity).to(z)
    return LocalProposal(z[:, None], root[:, None], z.new_ones(1))


def _valued(flow: InterpolantDistribution, rows: Measurements, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return what base points, ``(n, S, D)``, become, and their log posteriors, ``(n, S)``."""
    _, x, likelihood = pushed(flow, rows, z)
    return x, standard_log_prob(z) + likelihood


def _root_of(matrices: Tensor, other: Tensor) -> Tensor:
    """Return the Cholesky factors of matrices, ``(n, D, D)``, or another where there is none."""
    roots, failed = torch.linalg.cholesky_ex(matrices)
    return torch.where((failed > 0)[:, None, None], other, roots)


def _positive_part(matrices: Tensor) -> Tensor:
    """Return matrices, shape ``(n, D, D)``, symmetric and without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(0.5 * (matrices + matrices.mT).nan_to_num())
    return vectors @ torch.diag_embed(values.clamp(min=0)) @ vectors.mT
