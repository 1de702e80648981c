r"""Latents behind noisy rows: weighted draws of x given y, under a flow as the prior of x.

With z the base point of x, :math:`x = f(z)` and :math:`z \sim N(0, I)`, so the posterior of z is
:math:`\propto N(z; 0, I)\, p(y | f(z))`: it needs no density of the flow. Two proposals share it
by the balance heuristic: M draws of the flow, the same for all rows, good where errors are large;
and K draws of a mixture of Student-t fitted to each row, good where they are small. Over all M + K
draws,

.. math:: w = \frac{N(z; 0, I)\, p(y | f(z))}{M N(z; 0, I) + K q(z)}, \qquad \sum w \approx p(y).

The mixture is fitted to other draws, weighted in the same way: of the flow, and around the mode.
Draws that it was fitted to would be where it is high, and their weights too small.

References:
    Veach & Guibas, *Optimally combining sampling techniques*, SIGGRAPH 1995 (the balance
    heuristic, which is deterministic-mixture importance sampling); West, J. R. Stat. Soc. B 55
    (1993) (mixtures of kernels fitted to weighted draws, of their mean and covariance).
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .._package import check_ranges, whole
from .._torch import evaluated, seeded
from ..diagnostics.psis import log_total, pareto_smooth, shuffled_resampling
from ..distributions.interpolant import AnyDistribution, InterpolantDistribution
from ..distributions.joint import names_in_frames, own_sites
from ..distributions.rows import contexts_of_rows
from ..distributions.supports import support_of
from ..solvers.parallel import one_thread_each
from .noise import Measurements, Noise, measurements

_NUMBERS_AT_ONCE = 2**24  # of the draws of a chunk of rows
_DIFFERENCE = 1e-2  # in the base, which gives the slopes of the flow
_STEP_SIZES = (1.0, 0.3, 0.1, 0.03)  # of Gauss-Newton steps; the best is taken, if one is good
_STARTS = 1024  # draws of the flow, that proposals are fitted to: from the best to the mode
_ROWS_PER_SET = 32  # of equal contexts, from which on they share all draws
_OBJECT_STEPS = 4  # Gauss-Newton steps per object, from the flow's best draw
_TAIL = 5.0  # degrees of freedom of the proposal at the mode
_WIDENING = 1.2  # of its variance, beyond what the curvature at the mode says
_KERNELS = 4  # of a proposal, beside the one at the mode; 16 take four times as long for as much
_TRIED_SHARE = 4  # own draws, for one more that the proposal is fitted to


class Draws(NamedTuple):
    r"""Weighted draws of the latents of n rows, in the flow's coordinates.

    Attributes:
        shared: M draws for each of G sets of rows that share them, shape ``(G, M, D)``.
        which: The set of each row, shape ``(n,)``.
        own: K draws around the mode of each row, shape ``(n, K, D)``.
        log_weights: Of all, shape ``(n, M + K)``; the sum of the weights estimates p(y).
    """

    shared: Tensor
    which: Tensor
    own: Tensor
    log_weights: Tensor

    def at(self, index: Tensor) -> Tensor:
        """Return the draws of an index below M + K, shape ``(n, S)``: ``(n, S, D)``."""
        count = self.shared.shape[1]
        wide = index[..., None].expand(*index.shape, self.own.shape[-1])
        shared = self.shared[self.which[:, None], index.clamp(max=count - 1)]
        own = self.own.gather(1, (wide - count).clamp(min=0))
        return torch.where(wide < count, shared, own)

    def take(self, index: Tensor) -> "Draws":
        """Return those of some rows."""
        return Draws(self.shared, self.which[index], self.own[index], self.log_weights[index])

    def pick(self, count: int) -> Tensor:
        """Return draws by weight, with replacement, shape ``(n, count, D)``."""
        return self.at(torch.multinomial(self.log_weights.softmax(-1), count, replacement=True))

    def log_evidence(self) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\log p(y)` and its standard error, shape ``(n,)`` each."""
        return log_total(self.log_weights)


class LocalProposal(NamedTuple):
    """An even mixture of J Student-t for each of n rows.

    Attributes:
        means: Shape ``(n, J, D)``.
        roots: The Cholesky factors of the scale matrices, shape ``(n, J, D, D)``.
    """

    means: Tensor
    roots: Tensor

    def sample(self, count: int) -> Tensor:
        """Return draws, shape ``(n, count, D)``, of the parts in turn."""
        n, parts, dim = self.means.shape
        chi2 = torch.distributions.Chi2(self.means.new_tensor(_TAIL)).sample((n, count, 1))
        z = torch.randn(n, count, dim, dtype=chi2.dtype, device=chi2.device)
        z *= (_TAIL / chi2).sqrt()
        row, turn = (torch.arange(size, device=z.device) for size in (n, count))
        row, part = row[:, None], (torch.randint(parts, (n, 1)).to(turn) + turn) % parts
        return self.means[row, part] + (self.roots[row, part] @ z[..., None])[..., 0]

    def log_prob(self, z: Tensor) -> Tensor:
        """Return log-densities, shape ``(n, S)``, of points of shape ``(n or 1, S, D)``."""
        parts, dim = self.means.shape[1:]
        volumes = self.roots.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = math.lgamma((_TAIL + dim) / 2) - math.lgamma(_TAIL / 2)
        constant -= 0.5 * dim * math.log(_TAIL * math.pi) + math.log(parts)
        found = []
        for mean, inverse, volume in zip(
            self.means.unbind(1), torch.linalg.inv(self.roots).unbind(1), volumes.T, strict=True
        ):
            white = (z - mean[:, None]) @ inverse.mT
            far = torch.log1p(white.square().sum(-1) / _TAIL)
            found.append(constant - volume[:, None] - 0.5 * (_TAIL + dim) * far)
        return torch.stack(found).logsumexp(0)


def standard_log_prob(z: Tensor) -> Tensor:
    """Return the log-density of N(0, I), shape ``(*)``."""
    return -0.5 * (z.square().sum(-1) + z.shape[-1] * math.log(2 * math.pi))


def draw_latents(
    distribution: AnyDistribution,
    rows: Measurements,
    *,
    shared: int,
    own: int,
    steps: int,
    enough: float = math.inf,
    present: Tensor | None = None,
) -> Draws:
    """Draw latents of rows, and weight them.

    Args:
        distribution: The population.
        rows: The measurements, n of them, with contexts if it takes any.
        shared: M, the number of draws that all rows share. With contexts those of equal contexts
            do, and have fewer where there are many sets of them.
        own: K, the number of each row's own.
        steps: Gauss-Newton steps to the mode.
        enough: A row with as many effective draws among those that are shared gets none of its
            own: they have no weight.
        present: A latent of each row in the flow's coordinates, shape ``(n, D)``, NaN for none,
            that competes with its draws and is the last of its own: one by weight is then a step
            of a Markov chain whose law is the posterior (iterated sampling-importance-resampling:
            Andrieu, Lee & Vihola, Bernoulli 24, 2018).
    """
    contexts, which = _sets(rows)
    count = 1 if contexts is None else len(contexts)
    share = min(1.0, max(1.0, len(rows) / _ROWS_PER_SET) / count)
    shared, starts = max(own, int(share * shared)), max(1, int(share * _STARTS))
    loc = distribution.transform.flow.loc
    z = torch.randn(count, starts + shared, len(loc), dtype=loc.dtype, device=loc.device)
    sets = given(distribution, contexts)
    u = sets.transform(z)
    x = sets.from_flow(u)[0]
    # Those that the proposals are fitted to, and the draws themselves.
    (tried, z), (tried_x, x) = (part.split((starts, shared), dim=1) for part in (z, x))
    likelihood = rows.log_likelihood(_of_rows(x, which))
    effective = 1 / likelihood.softmax(-1).square().sum(-1)
    poor = ~(effective >= enough)
    last = 0 if present is None else 1
    log_weights = likelihood.new_full((len(rows), shared + own + last), -math.inf)
    log_weights[:, :shared] = likelihood - math.log(shared)
    own_u, known = u.new_zeros(len(rows), own + last, len(loc)), likelihood[:, :0]
    if present is not None:
        own_u[:, own:] = present[:, None].nan_to_num()
        known_x = given(distribution, rows.context).from_flow(own_u[:, own:])[0]
        known = rows.log_likelihood(known_x).where(present[:, :1].isfinite(), -math.inf)
        log_weights[:, shared + own :] = known - math.log(shared)
    if bool(poor.any()):
        few, which_few = rows.take(poor), which[poor]
        flow = given(distribution, few.context)
        # Where it begins from fewer draws: at twice the steps it misses half as many.
        steps = steps if share == 1 else 2 * steps
        start = _of_rows(tried, which_few), few.log_likelihood(_of_rows(tried_x, which_few))
        proposal = fitted_proposal(flow, few, *start, steps, max(1, own // _TRIED_SHARE))
        own_z = proposal.sample(own)
        own_u[poor, :own], found = _pushed(flow, few, own_z)
        points = [(_of_rows(z, which_few), likelihood[poor]), (own_z, found)]
        if present is not None:
            points.append((flow.transform.inv(own_u[poor, own:]), known[poor]))
        counts = math.log(shared), math.log(own)
        parts = [_balanced(proposal, *found, counts) for found in points]
        log_weights[poor] = torch.cat(parts, -1)
    return Draws(u[:, starts:], which, own_u, log_weights)


def _balanced(
    proposal: LocalProposal, z: Tensor, likelihood: Tensor, counts: tuple[float, float]
) -> Tensor:
    """Return the log-weights of base points by the balance heuristic, shape ``(n, S)``.

    Args:
        proposal: That of each row, beside N(0, I).
        z: The points, shape ``(n or 1, S, D)``.
        likelihood: Their log-likelihoods, shape ``(n, S)``.
        counts: The logs of how many points are from N(0, I), and from the proposal.
    """
    log_prior, log_own = standard_log_prob(z), proposal.log_prob(z)
    mixture = torch.logaddexp(log_prior + counts[0], log_own + counts[1])
    return log_prior + likelihood - mixture


def fitted_proposal(
    flow: InterpolantDistribution,
    rows: Measurements,
    z: Tensor,
    likelihood: Tensor,
    steps: int,
    own: int,
) -> LocalProposal:
    r"""Return a proposal for each row's posterior in the base, fitted to weighted draws.

    One part is the Student-t at the mode. The others are kernels around draws z of N(0, I) and of
    that one, chosen by weight: with m and C the mean and covariance of all draws by weight, and
    :math:`h = J^{-1 / (D + 4)}`, their centres are :math:`m + \sqrt{1 - h^2} (z - m)` and their
    scales :math:`h^2 C`, widened as that at the mode. Where few draws are effective, C is drawn to
    the curvature at the mode.

    Args:
        flow: The population.
        rows: The measurements, n of them.
        z: Draws of N(0, I), shape ``(n or 1, S, D)``.
        likelihood: Their log-likelihoods, shape ``(n, S)``.
        steps: Gauss-Newton steps to the mode.
        own: How many draws around the mode of each row.
    """
    row = torch.arange(len(rows), device=z.device)[:, None]
    dim = z.shape[-1]
    best = (standard_log_prob(z) + likelihood).argmax(-1)
    z = z.expand(len(rows), -1, -1)
    mode = local_proposal(flow, rows, z[row[:, 0], best], steps)
    own_z = mode.sample(own)
    own_likelihood = _pushed(flow, rows, own_z)[1]
    z, likelihood = torch.cat((z, own_z), 1), torch.cat((likelihood, own_likelihood), 1)
    counts = math.log(z.shape[1] - own), math.log(own)
    weights = (
        _balanced(mode, z, likelihood, counts).softmax(-1).to(z).nan_to_num(nan=1 / z.shape[1])
    )
    mean = (weights[..., None] * z).sum(1, keepdim=True)
    far = (weights.sqrt()[..., None] * (z - mean)).double()
    one = weights.square().sum(-1).double()[:, None, None]  # over the number of effective draws
    root = mode.roots[:, 0].double()
    covariance = (1 - one) * far.mT @ far + one * root @ root.mT / _WIDENING
    h = _KERNELS ** (-1 / (dim + 4))
    scale, failed = torch.linalg.cholesky_ex(_WIDENING * h**2 * covariance)
    scale = torch.where((failed > 0)[:, None, None], root, scale).to(z)[:, None]
    chosen = z[row, torch.multinomial(weights, _KERNELS, replacement=True)]
    kernels = LocalProposal(
        mean + math.sqrt(1 - h**2) * (chosen - mean), scale.expand(-1, _KERNELS, -1, -1)
    )
    return LocalProposal(*(torch.cat(pair, 1) for pair in zip(mode, kernels, strict=True)))


def _sets(rows: Measurements) -> tuple[Tensor | None, Tensor]:
    """Return the contexts that rows have, each once, or None, and the set of each row."""
    if rows.context is None:
        return None, torch.zeros(len(rows), dtype=torch.long, device=rows.y.device)
    return torch.unique(rows.context, dim=0, return_inverse=True)


def _of_rows(part: Tensor, which: Tensor) -> Tensor:
    """Return what the set of each row has, of ``(G, ...)``; where there is one, to broadcast."""
    return part if len(part) == 1 else part[which]


def _pushed(flow: InterpolantDistribution, rows: Measurements, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return what base points, ``(n, S, D)``, become, and their log-likelihoods, ``(n, S)``.

    They are in the flow's coordinates.
    """
    u = flow.transform(z)
    x = flow.from_flow(u)[0]
    return u, rows.log_likelihood(x)


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
    offsets = torch.cat((z.new_zeros(1, dim), _DIFFERENCE * identity.to(z)))
    sizes = z.new_tensor((0.0, *_STEP_SIZES))[:, None]
    root = identity.expand(len(z), dim, dim)
    for _ in range(steps):
        u = flow.transform(z[:, None] + offsets)
        x = flow.from_flow(u)[0]
        slopes = (x[:, 1:] - x[:, :1]).reshape(len(z), dim, -1).mT.double() / _DIFFERENCE
        gradient, hessian = (part.double() for part in likelihood_derivatives(rows, x[:, 0]))
        precision = identity + _positive_part(-slopes.mT @ hessian @ slopes)
        found, failed = torch.linalg.cholesky_ex(precision.nan_to_num())
        root = torch.where((failed > 0)[:, None, None], identity, found)
        slope = (slopes.mT @ gradient[..., None])[..., 0] - z
        step = torch.cholesky_solve(slope[..., None], root)[..., 0].nan_to_num()
        tries = z[:, None] + sizes * step[:, None].to(z)
        value = standard_log_prob(tries) + _pushed(flow, rows, tries)[1]
        z = tries[each, value.argmax(-1)]
    root, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(root))
    root = torch.where((failed > 0)[:, None, None], identity, root)
    return LocalProposal(z[:, None], math.sqrt(_WIDENING) * root.to(z)[:, None])


def likelihood_derivatives(rows: Measurements, x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return the gradient and the Hessian of :math:`\log p(y | x)`.

    Args:
        rows: The measurements, n of them.
        x: A latent of each, shape ``(n, *event_shape)``.

    Returns:
        Shapes ``(n, E)`` and ``(n, E, E)``, E the number of values of an event. Zero where the
        likelihood has no derivative.
    """
    flat = x.reshape(len(x), -1)
    with torch.enable_grad():
        flat = flat.detach().requires_grad_()
        total = rows.log_likelihood(flat.reshape(x.shape)[:, None]).sum()
        if not total.requires_grad:
            return torch.zeros_like(flat), torch.zeros_like(flat)[..., None].expand(
                *flat.shape, flat.shape[1]
            )
        (gradient,) = torch.autograd.grad(total, flat, create_graph=True)
        columns = [
            torch.autograd.grad(gradient[:, i].sum(), flat, retain_graph=True)[0]
            for i in range(flat.shape[1])
            if gradient.requires_grad
        ]
    hessian = torch.stack(columns, 1) if columns else flat.new_zeros(*flat.shape, flat.shape[1])
    return gradient.detach().nan_to_num(), hessian.detach().nan_to_num()


def _positive_part(matrices: Tensor) -> Tensor:
    """Return matrices, shape ``(n, D, D)``, symmetric and without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(0.5 * (matrices + matrices.mT).nan_to_num())
    return vectors @ torch.diag_embed(values.clamp(min=0)) @ vectors.mT


class ObjectPosteriors(NamedTuple):
    r"""What is known of each of N objects: weighted draws of x given y and the population.

    Attributes:
        draws: S for each object, shape ``(N, S, *event_shape)``.
        log_weights: Pareto-smoothed, normalised for each object, shape ``(N, S)``.
        k_hat: Pareto's k-hat of each object's weights: above 0.7 they are not to be relied on;
            shape ``(N,)``.
        log_evidence: :math:`\log p(y)` of each object under the population, nats, ``(N,)``.
        log_evidence_stderr: Its standard error; too small where k-hat is large.

    An object whose y has no likelihood under any draw has weights of zero, an infinite k-hat and
    an evidence of ``-inf``.
    """

    draws: Tensor
    log_weights: Tensor
    k_hat: Tensor
    log_evidence: Tensor
    log_evidence_stderr: Tensor

    def resampled(self, count: int, *, seed: int | None = None) -> Tensor:
        """Return equally weighted draws, shape ``(N, count, *event_shape)``.

        Args:
            count: How many of each object, by systematic resampling, in random order.
            seed: Makes them reproducible; the global generator is then left as it was.

        Raises:
            ValueError: If ``count`` is below 1, or an object has no draw of positive weight.
        """
        check_ranges(whole("count", count, 1))
        count = int(count)
        none = ~self.log_weights.isfinite().any(-1)
        if bool(none.any()):
            raise ValueError(
                f"expected draws of positive weight of each object, got none of {int(none.sum())}"
                f" objects, the first being {int(none.nonzero()[0])}: no draw of x explains its y"
            )
        with seeded(seed):
            chosen = [
                draws[shuffled_resampling(w, count)]
                for draws, w in zip(self.draws, self.log_weights, strict=True)
            ]
        return torch.stack(chosen)


@one_thread_each()
@torch.no_grad()
def object_posteriors(
    distribution: AnyDistribution,
    y: ArrayLike,
    noise: Noise,
    *,
    noise_data: ArrayLike | None = None,
    context: ArrayLike | None = None,
    draws: int = 1000,
    seed: int | None = None,
) -> ObjectPosteriors:
    r"""Return the posterior of each object, :math:`p(x | y) \propto \rho(x)\, p(y | x)`.

    The population shrinks each measurement toward where objects are. Importance sampling in the
    base of the flow: half of the draws are the flow's own, the same for all objects, half are
    from a mixture of Student-t fitted to each object's posterior.

    Args:
        distribution: The population :math:`\rho`, such as :func:`from_noisy_samples` or
            :func:`~pyro_interpolant.from_samples` returns.
        y: Measurements, shape ``(N, D)``, or ``(N,)``; of objects it has seen or not. The columns
            of a data frame are taken by the names that the population has.
        noise: As in :func:`from_noisy_samples`.
        noise_data: As in :func:`from_noisy_samples`, shape ``(N, ...)``.
        context: Contexts of a conditional population, shape ``(N, C)``.
        draws: S, the number of draws for each object.
        seed: Makes them reproducible; the global generator is then left as it was.

    Raises:
        TypeError: If something is of a wrong type.
        ValueError: If the measurements, the errors, the contexts or the number of draws cannot
            work, the flow starts from another base than N(0, I), or there is a batch of flows.

    Example:
        >>> population = from_samples(torch.randn(1000, 1), steps=50, seed=0, progress=False)
        >>> found = object_posteriors(population, torch.tensor([[2.0]]), torch.tensor([[1.0]]))
        >>> found.draws.shape, bool(found.k_hat < 0.7)
        (torch.Size([1, 1000, 1]), True)
    """
    check_ranges(("draws >= 100, an even number", draws >= 100 and draws % 2 == 0, draws))
    check_base(distribution)
    batch = tuple(getattr(distribution, "batch_shape", ()))
    if batch:
        raise ValueError(
            f"expected one population, got a batch of shape {batch}: pass the conditional one, "
            "and what each object is given as context="
        )
    names = names_in_frames(distribution)
    rows = of_population(measurements(y, noise, noise_data, names), distribution, context)
    found, draws = [], int(draws)
    with seeded(seed), evaluated(distribution.transform.flow):
        first = None if rows.context is None else rows.context[0]
        rows.check(distribution.given(first).sample((3,)))
        for part in chunks(distribution, len(rows), max(draws, _STARTS)):
            few = rows.take(part)
            half = draws // 2
            drawn = draw_latents(
                distribution, few, shared=half, own=draws - half, steps=_OBJECT_STEPS
            )
            found.append(_of_objects(given(distribution, few.context), drawn))
    return ObjectPosteriors(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def _of_objects(flow: InterpolantDistribution, draws: Draws) -> tuple[Tensor, ...]:
    """Return the fields of :class:`ObjectPosteriors` for the rows of weighted draws."""
    n, count = draws.log_weights.shape
    u = draws.at(torch.arange(count, device=draws.own.device).expand(n, -1))
    smoothed = [
        pareto_smooth(w) if bool(w.isfinite().any()) else (w, math.inf) for w in draws.log_weights
    ]
    k_hat = torch.tensor([k for _, k in smoothed], dtype=torch.float64)
    weights = torch.stack([w for w, _ in smoothed])
    x = flow.from_flow(u)[0]
    return x, weights, k_hat, *draws.log_evidence()


def of_population(
    rows: Measurements, distribution: AnyDistribution, context: ArrayLike | None = None
) -> Measurements:
    """Return measurements in the type of a population, with what it is given, ``(N, C)``.

    Raises:
        TypeError: If contexts are of a wrong type.
        ValueError: If they are of another shape or number, or there are none and there must be.
    """
    flow = distribution.transform.flow
    c, names = None, distribution.context_columns
    if context is not None:
        c = contexts_of_rows(context, flow, names, len(rows), "rows of y")
    distribution.given(None if c is None else c[:1])  # or raise
    return dataclasses.replace(rows.to(flow.loc), context=c)


def chunks(distribution: AnyDistribution, count: int, draws: int) -> tuple[Tensor, ...]:
    """Return the indices of ``count`` rows in parts, for so many draws of each row."""
    each = draws * distribution.transform.flow.event_dim
    return torch.arange(count).split(max(1, _NUMBERS_AT_ONCE // each))


def given(distribution: AnyDistribution, context: Tensor | None) -> InterpolantDistribution:
    """Return the distribution given contexts, ``(n, C)``, for draws of shape ``(n, S, D)``."""
    return distribution.given(None if context is None else context[:, None])


def check_base(distribution: object) -> None:
    """Raise an error unless a distribution is a flow from N(0, I).

    Raises:
        TypeError: If it is no flow.
        ValueError: If it starts from another base, or holds named sites unconstrained.
    """
    if not isinstance(distribution, AnyDistribution):
        raise TypeError(
            f"expected the distribution of a flow, got {type(distribution).__name__}: "
            "from_samples or from_noisy_samples returns one"
        )
    if distribution.base is not None:
        raise ValueError(
            f"expected a flow from its default base N(0, I), got {distribution.base}, from which "
            "latents cannot be drawn: train it without base, base_samples or circular support"
        )
    sites = own_sites(distribution) or {}
    moved = [name for name, (_, support) in sites.items() if not support_of(support).is_real()]
    if moved:
        raise ValueError(
            f"expected a population of rows, got one of named sites with {moved} on a support, of "
            "which it holds unconstrained numbers: learn rows, from_samples(x, support=...)"
        )
