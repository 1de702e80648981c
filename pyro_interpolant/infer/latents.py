r"""Latents behind noisy rows: weighted draws of x given y, under a flow as the prior of x.

With z the base point of x, :math:`x = f(z)` and :math:`z \sim N(0, I)`, so the posterior of z is
:math:`\propto N(z; 0, I)\, p(y | f(z))`: it needs no density of the flow. Two proposals share it
by the balance heuristic: M draws of the flow, the same for many rows, good where errors are large;
and K draws of a mixture of Student-t fitted to each row, good where they are small. Over all M + K
draws,

.. math:: w = \frac{N(z; 0, I)\, p(y | f(z))}{M N(z; 0, I) + K q(z)}, \qquad \sum w \approx p(y).

References:
    Veach & Guibas, *Optimally combining sampling techniques*, SIGGRAPH 1995 (the balance
    heuristic, which is deterministic-mixture importance sampling).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .._package import check_ranges, number, whole
from .._torch import draws_nothing, seeded, with_gradients
from ..diagnostics.psis import pareto_smooth, shuffled_resampling
from ..distributions.interpolant import AnyDistribution, InterpolantDistribution
from ..distributions.joint import names_in_frames
from ..distributions.rows import check_same_order, contexts_of_rows
from ..distributions.supports import support_of
from ..nn.modes import evaluated
from ..nn.velocity import keeps_nothing
from ..solvers.parallel import one_thread_each, side_by_side, threads_at_once
from .noise import Measurements, Noise, measurements
from .proposals import (
    LocalProposal,
    balanced,
    base_points,
    fitted_proposal,
    pushed,
    sharpened,
    standard_log_prob,
)

_Found = TypeVar("_Found")
_VALUES_AT_ONCE = 2**24  # of the draws of a chunk of rows
# That share draws where there are no contexts, at most. What all share is off for all alike: with
# one set for 3,000 objects, the mean of their log-evidences varied by 0.0025 nats from seed to
# seed, with this by 0.0009.
_SET_ROWS = 256
_STARTS = 1024  # draws of the flow, that proposals are fitted to: from the best to modes
_ROWS_PER_SET = 32  # of equal contexts, from which on they share all draws
_OBJECT_STEPS = 4  # Gauss-Newton steps to each of an object's modes
_TRIED_SHARE = 4  # own draws, for one more that the proposal is fitted to


class Draws(NamedTuple):
    r"""Weighted draws of the latents of n rows, in the flow's coordinates.

    Attributes:
        shared: M draws for each of G sets of rows that share them, shape ``(G, M, D)``.
        which: The set of each row, shape ``(n,)``.
        own: K draws of each row's own proposal, shape ``(n, K, D)``, and its present latent last,
            if there is one.
        log_weights: Of all, shape ``(n, M + K)`` or one more; without a present latent the sum of
            the weights estimates p(y).
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
        """Return the draws of some rows."""
        return Draws(self.shared, self.which[index], self.own[index], self.log_weights[index])

    def pick(self, count: int) -> Tensor:
        """Return draws by weight, with replacement, shape ``(n, count, D)``."""
        return self.at(torch.multinomial(self.log_weights.softmax(-1), count, replacement=True))

    def log_evidence(self) -> tuple[Tensor, Tensor]:
        r"""Return :math:`\log p(y)` and its standard error, shape ``(n,)`` each.

        There is a fixed number of draws of each kind: what their weights differ by from one kind
        to the other is no chance. Counted in, it made errors up to 2.6 times too large.
        """
        total, count = self.log_weights.double().logsumexp(-1), self.shared.shape[1]
        share = (self.log_weights.double() - total[..., None]).exp()
        within = [
            (part - part.mean(-1, keepdim=True)).square().sum(-1)
            for part in share.tensor_split([count], dim=-1)
        ]
        return total, (within[0] + within[1]).sqrt().nan_to_num(math.inf)


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
        shared: M, the number of draws that all rows share. With contexts only rows of equal
            contexts share draws, and fewer of them where there are many different contexts.
        own: K, the number of each row's own.
        steps: Gauss-Newton steps to a mode.
        enough: A row of which this many shared draws are effective gets none of its own: they
            have no weight. The number is estimated from other draws of the flow, and from a
            search for a sharp core.
        present: A latent of each row in the flow's coordinates, shape ``(n, D)``, NaN for none,
            that takes the place of one of its draws and is the last of its own: one by weight is
            then a step of a Markov chain whose law is the posterior (iterated sampling-importance-
            resampling: Andrieu, Lee & Vihola, Bernoulli 24, 2018).
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
    # Where it begins from fewer draws: at twice the steps it misses half as many.
    steps = steps if share == 1 else 2 * steps
    # By the others: a choice by the draws that are weighted would bias their weights.
    tried, tried_likelihood = _of_rows(tried, which), rows.log_likelihood(_of_rows(tried_x, which))
    if not rows.is_gaussian():  # slopes lead to the mode of a Gaussian one from any draw
        flow, tried_u = given(distribution, rows.context), _of_rows(u[:, :starts], which)
        tried, tried_likelihood = sharpened(flow, rows, tried, tried_u, tried_likelihood, steps)
    effective = shared / starts / tried_likelihood.softmax(-1).square().sum(-1)
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
        log_weights[:, :1].masked_fill_(known.isfinite(), -math.inf)  # whose place it takes
    if bool(poor.any()):
        few, which_few = rows.take(poor), which[poor]
        flow = given(distribution, few.context)
        start = (tried if len(tried) == 1 else tried[poor]), tried_likelihood[poor]
        proposal = fitted_proposal(flow, few, *start, steps, max(1, own // _TRIED_SHARE))
        own_z = proposal.sample(own)
        own_u[poor, :own], _, found = pushed(flow, few, own_z)
        counts = shared, own
        of_shared = balanced(proposal, _of_rows(z, which_few), likelihood[poor], counts)
        parts = [of_shared, balanced(proposal, own_z, found, counts)]
        if present is not None:
            parts = _with_present(parts, proposal, flow, own_u[poor, own:], known[poor], counts)
        log_weights[poor] = torch.cat(parts, -1)
    return Draws(u[:, starts:], which, own_u, log_weights)


def _with_present(
    parts: list[Tensor],
    proposal: LocalProposal,
    flow: InterpolantDistribution,
    u: Tensor,
    likelihood: Tensor,
    counts: tuple[int, int],
) -> list[Tensor]:
    """Return the log-weights of draws and of a present latent, which takes the place of one.

    Of a shared draw or of the row's own, by which of the two it would have come from: else the
    chain would not keep to the posterior.

    Args:
        parts: Those of shared draws and of the rows' own, shapes ``(n, M)`` and ``(n, K)``.
        proposal: That of each row.
        flow: The population.
        u: The present latents in its coordinates, shape ``(n, 1, D)``.
        likelihood: Their log-likelihoods, shape ``(n, 1)``; of none -infinity.
        counts: M and K.
    """
    z = base_points(flow, u)
    odds = proposal.log_prob(z) - standard_log_prob(z) + math.log(counts[1] / counts[0])
    is_own, is_known = torch.rand_like(odds) < odds.sigmoid(), likelihood.isfinite()
    for part, given_up in zip(parts, (is_known & ~is_own, is_known & is_own), strict=True):
        part[:, :1].masked_fill_(given_up, -math.inf)
    return [*parts, balanced(proposal, z, likelihood, counts)]


def _sets(rows: Measurements) -> tuple[Tensor | None, Tensor]:
    """Return the contexts that rows have, each once, or None, and the set of each row."""
    if rows.context is None:
        return None, torch.zeros(len(rows), dtype=torch.long, device=rows.y.device)
    return torch.unique(rows.context, dim=0, return_inverse=True)


def _of_rows(part: Tensor, which: Tensor) -> Tensor:
    """Return what the set of each row has, of ``(G, ...)``; where there is one, to broadcast."""
    return part if len(part) == 1 else part[which]


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
@with_gradients()  # of the likelihood, in inference mode too
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
    base of the flow: half of the draws are the flow's own, the same for at most 256 objects, or
    for those of equal contexts, half are from a mixture of Student-t fitted to each object's
    posterior.

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
    text = "draws >= 100, an even number"
    check_ranges(number(text, draws, lambda n: n >= 100 and n % 2 == 0))
    check_base(distribution)
    batch = tuple(getattr(distribution, "batch_shape", ()))
    if batch:
        raise ValueError(
            f"expected one population, got a batch of shape {batch}: pass the conditional one, "
            "and what each object is given as context="
        )
    check_same_order(y=y, noise=noise, noise_data=noise_data, context=context)
    names = names_in_frames(distribution)
    rows = of_population(measurements(y, noise, noise_data, names), distribution, context)
    draws = int(draws)
    half = draws // 2

    def posteriors(few: Measurements) -> tuple[Tensor, ...]:
        drawn = draw_latents(distribution, few, shared=half, own=draws - half, steps=_OBJECT_STEPS)
        with draws_nothing():
            return _of_objects(given(distribution, few.context), drawn)

    with seeded(seed), evaluated(distribution.transform.flow):
        first = None if rows.context is None else rows.context[0]
        rows.check(distribution.given(first).sample((3,)))
        found = by_sets(posteriors, distribution, rows, max(draws, _STARTS))
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
        ValueError: If they are of another shape or number, or there are none and there must be;
            or the measurements are of another shape.
    """
    flow = distribution.transform.flow
    rows.check_shape(distribution.row_shape)
    c, names = None, distribution.context_columns
    if context is not None:
        c = contexts_of_rows(context, flow, names, len(rows), "rows of y")
    distribution.given(None if c is None else c[:1])  # or raise
    size = torch.zeros_like(rows.y[0])
    if distribution.ungaussianized_space.is_real():
        # Real numbers are sums, rounded as the larger part is; positive ones are exponentials.
        spread = flow.whitening.matrix().norm(dim=-1)
        middle, edge = distribution.from_flow(torch.stack((flow.loc, flow.loc + spread)))[0]
        size = middle.abs() + (edge - middle).abs()
    return dataclasses.replace(rows.to(flow.loc, size), context=c)


def chunks(distribution: AnyDistribution, count: int, draws: int) -> tuple[Tensor, ...]:
    """Return the indices of ``count`` rows in parts, for so many draws of each row."""
    each = draws * distribution.transform.flow.event_dim
    return torch.arange(count).split(max(1, _VALUES_AT_ONCE // each))


def by_sets(
    function: Callable[[Measurements], _Found],
    distribution: AnyDistribution,
    rows: Measurements,
    draws: int,
) -> list[_Found]:
    """Return what a function makes of rows in sets, some at once, of which few share draws.

    Each set has a seed that is drawn here: what comes out does not depend on how many run at once.

    Args:
        function: What is called with the rows of a set.
        distribution: The population.
        rows: The measurements.
        draws: How many of each row, for parts as those of :func:`chunks`.
    """
    parts = chunks(distribution, len(rows), draws)
    if rows.context is None:  # equal ones share; of smaller parts each would have fewer draws
        parts = tuple(few for part in parts for few in part.split(_SET_ROWS))
    seeds = torch.randint(2**62, (len(parts),)).tolist()

    def of_set(part: Tensor, seed: int) -> _Found:
        with seeded(seed):
            return function(rows.take(part))

    # What is kept of a call, or held for one thread, would be another's there.
    is_apart = keeps_nothing(distribution.transform.flow.velocity) and rows.y.is_cpu
    is_apart = is_apart and not torch.is_autocast_enabled(rows.y.device.type)
    threads = min(len(parts), threads_at_once()) if is_apart else 1
    return side_by_side(of_set, zip(parts, seeds, strict=True), threads=threads)


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
    sites = distribution.sites or {}
    moved = [name for name, (_, support) in sites.items() if not support_of(support).is_real()]
    if moved:
        raise ValueError(
            f"expected a population of rows, got one of named sites with {moved} on a support, of "
            "which it holds unconstrained numbers: learn rows, from_samples(x, support=...)"
        )
