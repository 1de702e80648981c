"""Importance sampling with a guide of a NumPyro model: how well it covers its posterior."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers
from numpyro.infer.util import constrain_fn

from .._package import check_ranges, whole
from .autoguide import AutoInterpolant, TorchDensity, check_guide, check_key, in_blocks
from .distributions import InterpolantDistribution
from .log_density import Arguments, Named, check_as_seen, log_density
from .transforms import InterpolantTransform

__all__ = ["ImportanceResult", "importance"]


class ImportanceResult(NamedTuple):
    r"""How well a guide covers its posterior, by weights ``w = p / q`` of its own draws.

    Attributes:
        k_hat: Pareto's k-hat of the weights: below 0.5 all is well, above 0.7 none of this is
            reliable, unless 99% of the draws are effective: then it is of a tail too small to
            matter.
        ess: The effective sample size :math:`(\sum w)^2 / \sum w^2` of the draws.
        log_evidence: :math:`\log \frac1N \sum w`, an estimate of the model's log-evidence, nats.
        log_evidence_stderr: Its standard error, of chance, of the rounding of densities and of
            the flow's solver, whose part is what doubling its steps changes; too small where k-hat
            is large.
        verdict: What follows, in a sentence.
        log_weights: Pareto-smoothed, normalised, shape ``(N,)``.
        draws: The guide's draws by site, each ``(N, *site_shape)``.
    """

    k_hat: float
    ess: float
    log_evidence: float
    log_evidence_stderr: float
    verdict: str
    log_weights: Array
    draws: dict[str, Array]

    def __repr__(self) -> str:
        """Say the verdict, the evidence and the sites that there are draws of."""
        from ..distributions.report import with_error

        evidence = with_error(self.log_evidence, self.log_evidence_stderr)
        return f"{self.verdict}\nlog-evidence {evidence} nats; draws of {', '.join(self.draws)}"

    def resampled(self, key: Array, count: int | None = None) -> dict[str, Array]:
        """Return draws resampled by their weights: posterior samples for ``Predictive``.

        Args:
            key: A random key.
            count: How many, M, by systematic resampling, in random order; by default as many as
                there are draws.

        Returns:
            Sites by name, each ``(M, *site_shape)``.

        Raises:
            TypeError: If there is no key.
            ValueError: If ``count`` is below 1 or not whole, or no weight is positive.
        """
        check_key(key, "first")
        check_ranges(whole("count", count, 1, or_none=True))
        count = len(self.log_weights) if count is None else int(count)
        if not self.ess > 0:
            raise ValueError("expected draws with positive weights, got none")
        one, other = jax.random.split(key)
        total = np.cumsum(np.exp(np.asarray(self.log_weights, np.float64)))
        u = (np.arange(count) + float(jax.random.uniform(one))) / count
        chosen = np.searchsorted(total / total[-1], u).clip(max=len(total) - 1)
        chosen = chosen[jax.random.permutation(other, count)]
        return {name: value[chosen] for name, value in self.draws.items()}


def importance(
    guide: AutoInterpolant, key: Array, *args: object, count: int = 10_000, **kwargs: object
) -> ImportanceResult:
    """Judge a trained guide by Pareto-smoothed importance weights of its draws.

    As :func:`pyro_interpolant.importance`, of which it is the twin. Needs torch.

    Args:
        guide: The guide.
        key: A random key.
        *args: The arguments of the model.
        count: The number of draws N.
        **kwargs: The named arguments of the model.

    Returns:
        The verdict, with a warning if the draws cannot be relied on; the weights; and draws that
        ``resampled`` turns into posterior samples. It warns of a solver that is too coarse, too.

    Raises:
        TypeError: If the guide is not an :class:`AutoInterpolant` of NumPyro, or there is no key.
        ValueError: If it is not trained, ``count`` is below 100, the model has not the latent
            sites that the guide has seen, such as data that were forgotten, or its log density is
            noisy, as in :func:`fit_guide`.
    """
    import torch

    from ..diagnostics import psis
    from ..infer import importance_sampling

    check_guide(guide)
    check_key(key)
    check_ranges(whole("count", count, psis.MIN_DRAWS))
    count = int(count)
    posterior = guide.get_posterior()
    check_as_seen(guide, args, kwargs)
    density = log_density(guide, args, kwargs)
    z, log_p, log_q, change = _weighed(posterior, density, key, count, psis.tail_length(count))
    importance_sampling.warn_coarse_solver(change, "Train it again by fit_guide")
    raw = psis.log_ratio(*(torch.tensor(np.asarray(part)) for part in (log_p, log_q)))
    pair = _both_ways(posterior, density, jax.random.fold_in(key, 1), psis.tail_length(count))
    solver_error = psis.change_of_mean(*(torch.tensor(np.asarray(part)) for part in pair))
    summary = psis.summarise_weights(raw, solver_error)
    log_prob, torch_density = in_blocks(posterior.log_prob), TorchDensity(guide, args, kwargs)
    rows = torch.tensor(np.asarray(z))
    verdict = importance_sampling.judged(
        lambda some: log_prob(some)[0], torch_density, rows, summary, count
    )
    weights = psis.pareto_smooth(raw).log_weights if summary.ess > 0 else raw
    draws = _constrained(guide, z, args, kwargs)
    return ImportanceResult(*summary, verdict, jnp.asarray(weights.numpy()), draws)


def _constrained(
    guide: AutoInterpolant, z: Array, args: Arguments, kwargs: Named
) -> dict[str, Array]:
    """Return the sites, each ``(N, *site_shape)``, of unconstrained vectors, shape ``(N, D)``.

    Their supports may depend on the arguments of the model, so may differ from the guide's own.
    """
    model = handlers.seed(guide.model, rng_seed=0)  # for what is drawn beside the latent sites

    def of_one(row: Array) -> dict[str, Array]:
        found = constrain_fn(model, args, kwargs, guide._unpack_latent(row))
        return {name: found[name] for name in guide._init_locs}

    return jax.jit(jax.vmap(of_one))(z)


def _weighed(
    posterior: InterpolantDistribution,
    density: Callable[[Array], Array],
    key: Array,
    count: int,
    largest: int,
) -> tuple[Array, Array, Array, float]:
    """Return draws, ``(N, D)``, their log joint densities and those under the guide, ``(N,)``.

    Where the weights are largest the latter are computed again, at doubled solver steps: the last
    is by how much they move in the mean, nats.
    """
    z, log_q = posterior.rsample_and_log_prob(key, (count,))
    log_p = jax.jit(jax.vmap(density))(z)
    ratio = log_p - log_q
    chosen = jnp.argsort(jnp.where(jnp.isnan(ratio), -jnp.inf, ratio))[-largest:]
    new = _finer(posterior).log_prob(z[chosen])
    change = jnp.nan_to_num(jnp.abs(new - log_q[chosen]), nan=jnp.inf, posinf=jnp.inf).mean()
    return z, log_p, log_q.at[chosen].set(new), float(change)


def _both_ways(
    posterior: InterpolantDistribution,
    density: Callable[[Array], Array],
    key: Array,
    count: int,
) -> tuple[Array, Array]:
    """Return log weights of the same base draws at the guide's solver steps and at twice as many.

    Args:
        posterior: The guide's distribution.
        density: The log joint density of one draw.
        key: A random key.
        count: The number of base draws N.
    """
    log_p = jax.jit(jax.vmap(density))  # compiled once, for both

    def weights(q: InterpolantDistribution) -> Array:
        z, log_q = q.rsample_and_log_prob(key, (count,))
        return log_p(z) - log_q

    return weights(posterior), weights(_finer(posterior))


def _finer(posterior: InterpolantDistribution) -> InterpolantDistribution:
    """Return a flow of the same weights at doubled solver steps."""
    flow = posterior.transform
    grid = flow.grid._replace(steps=2 * flow.grid.steps)
    return InterpolantDistribution(posterior.base_dist, [InterpolantTransform(flow.weights, grid)])
