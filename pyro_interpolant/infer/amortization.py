r"""Training of an amortised guide on simulations, and its verdict on fresh ones.

For one data set, in rounds: from the second on, latents come from the prior truncated to the
region where the guide has its mass. Truncation leaves the posterior as it is, up to the share of
mass outside, so that all simulations in the region train the next round.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor, nn

from .._torch import warn_user
from ..diagnostics.predictive import CalibrationCheck, band_of, coverage, sbc, tarp
from ..diagnostics.psis import K_HAT_LIMIT
from ..distributions.constraints import Constraint, real_shape
from ..distributions.interpolant import InterpolantDistribution
from ..distributions.joint import ConditionalJointInterpolantDistribution, log_det_of_sites
from ..distributions.rounding import are_close
from ..distributions.rows import flat_names
from ..nn.embedded import EmbeddedVelocity
from ..training.clock import Clock
from ..training.fitting import FitResult, check_options
from ..training.whitening import warn_if_coarse
from ..transforms.bijections import biject
from ..transforms.interpolant import ConditionalInterpolantTransform
from .data import is_hidden
from .importance_sampling import GOOD_SHARE, at_edges, importance_of
from .log_density import LogJoint, NoDensityError
from .simulation import Simulator
from .simulations import Simulations
from .sites import LatentSites

NO_DENSITY = "What it is given has no density to weigh by: see calibration()."
JUDGED_ROWS = 1000  # fresh simulations on which densities are measured
_JUDGED_SETS, _JUDGED_DRAWS = 20, 1000  # data sets judged by importance weights, and draws of each
_LEVELS = (0.05, 0.5, 0.95)  # of the quantiles over data sets
_OUTSIDE = 1e-4  # the share of a guide's mass outside the region that a prior is truncated to
_REGION_DRAWS, _LOOPED_DRAWS = 10_000, 1000  # of the prior at once, and one by one
# A later round needs this share of the first round's simulations. For a line through ten rows,
# after 2,000 of them, 500 more raised the number of effective draws by 18%, 200 lowered it by 7%,
# and 100 by 74%.
_ROUND_SHARE = 0.1
_MOST_TRIES = 1000  # prior draws for each that is kept
# The learning rate with an embedding, whose training 1e-2 makes unstable: after 1,000 steps of 256
# sets of 20 rows, a posterior of two modes had 1.4 nats at this rate and 0.5 at 1e-2.
_EMBEDDING_RATE = 2e-3
# The fewest steps, else one for each simulation; and the patience. So the rate falls to the end (a
# gain of 0.26 nats on gaussian_mixture, 1,000 simulations), and a loss that rises early by chance
# does not end the run (0.14 at 10,000).
_FEWEST_STEPS, _PATIENCE = 2000, 100

Pack = Callable[[Simulations], tuple[Tensor, Tensor]]
Region = tuple[InterpolantDistribution, float]  # where a density is above an edge


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise an error unless settings of a guide's training are some of ``fit``, before any work.

    Raises:
        TypeError: If there is none of a name.
        ValueError: If a setting cannot work, or the guide sets it itself.
    """
    own = ("base_samples", "context")
    check_options(settings, own, "a guide starts from N(0, I), and has its data from the model")


def pace(velocity: nn.Module, rows: object, clock: Clock) -> dict[str, Any]:
    """Return options of :func:`~pyro_interpolant.fit`, where the caller gives no others.

    Args:
        velocity: The network.
        rows: Packed rows, ``(N, D)``, or batches of them.
        clock: The time.
    """
    options: dict[str, Any] = {"max_seconds": clock.left()}
    if isinstance(velocity, EmbeddedVelocity) and velocity.embedding is not None:
        options["learning_rate"] = _EMBEDDING_RATE
    if isinstance(rows, Tensor):
        options |= {"steps": max(_FEWEST_STEPS, len(rows)), "patience": _PATIENCE}
    return options


class AmortizedResult(NamedTuple):
    """What training on simulations gave, measured on fresh ones.

    Attributes:
        k_hat: Pareto's k-hat of the weights over fresh data sets, its quantiles at 5%, 50% and
            95%; NaN where the model has no density of its data.
        ess: The same quantiles of the effective share of draws.
        log_evidence: The same quantiles of the log-evidence of the data sets, nats.
        data_sets: How many these were.
        gain: How many nats more than the prior the guide gives the latents of fresh simulations;
            NaN where the prior's density is not known, as it depends on what the model hides, or
            on sites that batches of simulations leave out.
        gain_stderr: Its standard error.
        simulations: The number of simulations the guide was trained on.
        improper: The share of simulations left out, as they were not finite.
        verdict: What follows, in a sentence.
        seconds: The duration.
        training: What the training did.
    """

    k_hat: tuple[float, ...]
    ess: tuple[float, ...]
    log_evidence: tuple[float, ...]
    data_sets: int
    gain: float
    gain_stderr: float
    simulations: int
    improper: float
    verdict: str
    seconds: float
    training: FitResult

    def __repr__(self) -> str:
        """Say the verdict."""
        return self.verdict


class Calibration(NamedTuple):
    """Whether a guide is calibrated, on data sets simulated from its model.

    Attributes:
        sbc: The ranks of the latents, and of their density, among draws given their data.
        coverage: The levels of the highest-density regions on whose edge the latents lie.
        tarp: The shares of draws that are nearer than the latents to those of similar data.
        verdict: What follows from all, in a sentence. Chance fails a check, by its own band, in 1%
            of all cases, and this, too: it names checks beyond the band of all three at once.
    """

    sbc: CalibrationCheck
    coverage: CalibrationCheck
    tarp: CalibrationCheck
    verdict: str

    def __repr__(self) -> str:
        """Say the verdict."""
        return self.verdict


def calibration_of(
    posterior: ConditionalJointInterpolantDistribution,
    latents: Mapping[str, Tensor],
    context: Tensor,
    seed: int,
) -> Calibration:
    """Return the checks of a posterior on simulations.

    Args:
        posterior: The posterior.
        latents: Latents by name, each ``(N, *site_shape)``.
        context: Their data, flattened, shape ``(N, C)``.
        seed: Of the draws.
    """
    checks = [check(posterior, latents, context, seed=seed) for check in (sbc, coverage, tarp)]
    # Of the same draws, what coverage looks at is the last quantity of sbc.
    band = band_of(len(context), len(checks[0].names) + len(checks[2].names))
    failed = [
        f"{name}: {check.verdict}"
        for name, check in zip(Calibration._fields, checks, strict=False)
        if not float(check.distances.max()) <= band
    ]
    verdict = "; ".join(failed) or f"calibrated as far as {len(context):,} data sets tell"
    return Calibration._make((*checks, verdict))


@torch.no_grad()
def measured_on_simulations(
    posterior: ConditionalJointInterpolantDistribution,
    fresh: Simulations,
    pack: Pack,
    simulator: Simulator,
    sites: LatentSites,
    clock: Clock,
    training: FitResult,
    size: int,
    improper: float,
) -> AmortizedResult:
    """Return what training on simulations gave, measured on fresh ones.

    The report of the posterior becomes that on the fresh simulations, beside the prior.

    Args:
        posterior: The trained posterior.
        fresh: Simulations it has not seen.
        pack: From simulations to packed rows, ``(N, D)``, and contexts, ``(N, C)``.
        simulator: The model, which knows what has to be there for a density of the data.
        sites: The latent sites, with the model and its arguments.
        clock: The time.
        training: What the training did.
        size: The number of simulations it was given.
        improper: The share of all that was left out.
    """
    rows, context = pack(fresh)
    log_q = posterior.given(context).log_prob(rows).double()
    log_prior = fresh.log_prior if simulator.is_told_early else fresh.log_prior * math.nan
    log_p = (log_prior + log_det_of_sites(posterior.sites, rows)).double()
    gains, error = log_q - log_p, math.sqrt(len(rows))
    if posterior.report is not None:
        posterior.report = replace(
            posterior.report,
            held_out=float(log_q.mean()),
            held_out_stderr=float(log_q.std()) / error,
            reference=float(log_p.mean()) if bool(log_p.isfinite().all()) else None,
            reference_name="the prior",
        )
    # Data that are no sample sites, but functions of numbers drawn otherwise, have no density,
    # and the density of all data is not that of those that are there, where some are missing.
    is_whole = {*fresh.latents} < {*simulator.sampled} <= {*fresh.latents, *fresh.data}
    is_whole = is_whole and not is_hidden(simulator, fresh.latents | fresh.data)
    found, reason = list[tuple[float, float, float]](), NO_DENSITY
    if is_whole:
        found, reason = _importance_of_data_sets(posterior, fresh, (rows, context), sites)
    levels = torch.tensor(_LEVELS, dtype=torch.float64)
    numbers = torch.tensor(found or [(math.nan,) * 3], dtype=torch.float64)
    found_at = [torch.quantile(s, levels, interpolation="nearest") for s in numbers.T]
    k_hat, ess, evidence = (tuple(s.tolist()) for s in found_at)
    gain = float(gains.mean()), float(gains.std()) / error
    result = AmortizedResult(
        k_hat, ess, evidence, len(found), *gain, size, improper, "", clock.spent(), training
    )
    return result._replace(verdict=verdict_of_amortised(result, reason))


def _importance_of_data_sets(
    posterior: ConditionalJointInterpolantDistribution,
    fresh: Simulations,
    packed: tuple[Tensor, Tensor],
    sites: LatentSites,
) -> tuple[list[tuple[float, float, float]], str]:
    """Return k-hat, the effective share of draws, and log-evidence, of some data sets.

    Of none where the data have no density, or it cannot be
    evaluated, beside a sentence that says why: it is first tried at the latents that gave them.
    Where it fails there for some, no draw counts.
    """
    (rows, context), found, failed, reason, edges = packed, [], 0, NO_DENSITY, ""
    for i in range(min(_JUDGED_SETS, len(context))):
        view = posterior.given(context[i])
        data = {name: value[i] for name, value in fresh.data.items()}
        try:
            density = LogJoint(sites, poutine.condition(sites.model, data), rows[i : i + 1])
            drawn = importance_of(view, density, _JUDGED_DRAWS)
        except NoDensityError:
            return [], NO_DENSITY
        except (ValueError, RuntimeError) as error:
            reason = reason if failed else f"No weights, see calibration(): {error}"
            failed += 1
        else:
            summary = drawn.summary()
            edges = edges or at_edges(view.log_prob, density, drawn.x, summary.log_evidence)
            found.append((summary.k_hat, summary.ess / len(drawn.x), summary.log_evidence))
    if edges:
        warn_user(f"of one data set {edges}")
    return found + failed * [(math.inf, 0.0, -math.inf)] if found else [], reason


def verdict_of_amortised(result: AmortizedResult, reason: str = NO_DENSITY) -> str:
    """Return the verdict on an amortised guide, in a sentence.

    Args:
        result: What was measured.
        reason: Why k-hat is NaN where it is, in a sentence.
    """
    k_hat, ess, improper = result.k_hat, result.ess, result.improper
    gain = f"{result.gain:.2f} ± {result.gain_stderr:.2f}"
    found = f"{gain} nats more than the prior on fresh simulations"
    if math.isnan(result.gain):
        found = "trained, but the prior's density, to compare with, is not known"
    left = f"; {improper:.2%} of the simulations were not finite and left out" if improper else ""
    if math.isnan(k_hat[-1]):
        return f"{found}{left}. {reason}"
    count = result.data_sets
    weights = (
        f"over {count} data set{'s' * (count != 1)} {ess[1]:.0%} of draws effective (median; 5% "
        f"quantile {ess[0]:.0%}), k-hat {k_hat[1]:.2f} (median; 95% quantile {k_hat[-1]:.2f})"
    )
    if k_hat[-1] <= K_HAT_LIMIT and ess[0] >= GOOD_SHARE:
        return f"Good: {found}, {weights}{left}. importance(guide, *args) makes draws exact."
    if k_hat[-1] <= K_HAT_LIMIT:
        return (
            f"Usable with weights: {found}, {weights}{left}. The guide's own draws are not those "
            "of the posterior, importance(guide, *args) makes them so; more simulations or time, "
            "an embedding, or rounds=2 would help."
        )
    if ess[0] >= GOOD_SHARE:
        return (
            f"Good, but for the rarest draws of some data sets: {found}, {weights}{left}. "
            "importance(guide, *args) judges one, and corrects its draws."
        )
    return (
        f"Not to be relied on for every data set: {found}, {weights}{left}. importance(guide, "
        "*args) judges one; more simulations or time, an embedding, or rounds=2 would help."
    )


@torch.no_grad()
def truncated(
    simulator: Simulator,
    posteriors: list[Region],
    count: int,
    pack: Callable[[Mapping[str, Tensor]], Tensor],
) -> Simulations | None:
    """Return simulations whose latents come from the prior truncated to regions, or None of none.

    Args:
        simulator: The model.
        posteriors: The guide's posterior given the data after each round, and its density on the
            edge of the region.
        count: How many simulations.
        pack: From latents to packed rows.
    """
    is_told = simulator.is_told_early  # what is hidden cannot be given: then all is drawn at once
    kept: list[Simulations] = []
    there = tries = 0
    size = _LOOPED_DRAWS if simulator.batching == "loop" else max(count, _REGION_DRAWS)
    while there < count and tries < _MOST_TRIES * count:
        found = simulator.prior(size) if is_told else simulator(size)
        inside = is_inside(posteriors, pack(found.latents))
        kept.append(found.take(inside))
        there, tries = there + int(inside.sum()), tries + size
    if not there:
        return None
    found = Simulations.joined(kept).take(torch.arange(min(count, there)))
    given = found.latents | found.data
    return simulator(len(found.log_prior), given) if is_told else found


def are_enough(found: Simulations, count: int, number: int) -> bool:
    """Return whether a later round can learn from simulations, and warn where it cannot.

    Args:
        found: All that are where the guide has its mass.
        count: How many the first round had.
        number: That of the round.
    """
    there = len(found.log_prior)
    if there >= _ROUND_SHARE * count:
        return True
    warn_user(
        f"round {number} is left out: it has {there:,} simulations where the guide has its mass, "
        f"too few to learn more from than it did from {count:,}. Give more simulations, or "
        "weigh its draws by importance(guide, *args)"
    )
    return False


def is_inside(posteriors: list[Region], rows: Tensor) -> Tensor:
    """Return which packed rows, shape ``(N, D)``, are in all regions, shape ``(N,)``."""
    inside = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for posterior, edge in posteriors:
        index = inside.nonzero()[:, 0]
        inside[index] = posterior.log_prob(rows[index]) >= edge
    return inside


@torch.no_grad()
def region(posterior: InterpolantDistribution) -> Region:
    """Return a posterior, and the density on the edge of the region that holds its mass."""
    log_q = posterior.log_prob(posterior.sample((_REGION_DRAWS,)))
    return posterior, float(log_q.quantile(_OUTSIDE))


def tell_if_coarse(found: Simulations, observed: Sequence[str], dtype: torch.dtype) -> None:
    """Warn where the type of a guide rounds away what its data vary by.

    Args:
        found: Simulations.
        observed: The sites that the guide is given.
        dtype: The type.
    """
    for name in observed:
        value = found.data[name].reshape(len(found.log_prior), -1)
        value = value if value.is_floating_point() else value.double()
        warn_if_coarse(value, dtype, f"site {name!r}")


def untrained_posterior(
    sites: LatentSites,
    shapes: Mapping[str, torch.Size],
    embedding: nn.Module | None,
    hidden_dims: Sequence[int] | None,
    like: Tensor,
) -> ConditionalJointInterpolantDistribution:
    """Return a posterior that knows nothing of its data yet.

    Args:
        sites: The latent sites.
        shapes: The shapes of the observed sites, in their order.
        embedding: What embeds them, or None.
        hidden_dims: The widths of the velocity's hidden layers, or None.
        like: A tensor of the type and on the device that its weights are to have.
    """
    if not isinstance(embedding, nn.Module | None):
        raise TypeError(f"expected embedding to be a module, got {embedding!r}")
    dim = sites.guide.latent_dim
    velocity = EmbeddedVelocity(dim, list(shapes.values()), embedding, hidden_dims)
    transform = ConditionalInterpolantTransform(velocity).to(like)
    posterior = ConditionalJointInterpolantDistribution(transform, sites=sites.sites)
    posterior.context_columns = _data_names(shapes)
    return posterior


def check_posterior(
    posterior: ConditionalJointInterpolantDistribution,
    sites: LatentSites,
    shapes: Mapping[str, torch.Size],
) -> None:
    """Raise an error unless a posterior is one of these sites given these data.

    Args:
        posterior: The posterior, from the sites' unconstrained vector to N(0, I).
        sites: The latent sites.
        shapes: The shapes of the observed sites, in their order.

    Raises:
        TypeError: If it is no conditional density of named sites.
        ValueError: If it is one of others.
    """
    if not isinstance(posterior, ConditionalJointInterpolantDistribution):
        raise TypeError(
            "expected a conditional density of named sites as posterior, as from_samples({...}, "
            f"context=data) returns it, got {type(posterior).__name__}"
        )
    own = {name: shape for name, (shape, _) in posterior.sites.items()}
    size = sum(shape.numel() for shape in shapes.values())
    if list(own.items()) != list(sites.shapes.items()):
        raise ValueError(f"expected a posterior of the sites {sites.shapes}, got one of {own}")
    for name, (shape, support) in sites.sites.items():
        known = posterior.sites[name][1]
        if not _are_alike(known, support, shape, posterior.transform.flow.loc):
            raise ValueError(
                f"expected a posterior of site {name!r} on {support}, as in the model, got one on "
                f"{known}: from_samples(draws, support={{{name!r}: ...}}, context=data)"
            )
    if posterior.transform.flow.context_dim != size:
        raise ValueError(
            f"expected a posterior given {size} numbers, those of {dict(shapes)}, got one given "
            f"{posterior.transform.flow.context_dim}"
        )
    velocity = posterior.transform.velocity
    if isinstance(velocity, EmbeddedVelocity) and velocity.shapes != tuple(shapes.values()):
        raise ValueError(
            f"expected a posterior given data of shapes {dict(shapes)}, in this order, got one "
            f"given {velocity.shapes}: AmortizedInterpolant(model, observed=...)"
        )
    names, others = _data_names(shapes), posterior.context_columns
    if names != others and sorted(names) == sorted(others):
        raise ValueError(
            f"expected a posterior given the data {list(names)}, in this order, got one given "
            f"{list(others)}: AmortizedInterpolant(model, observed=...)"
        )
    if posterior.base is not None:
        raise ValueError(f"expected a posterior from the base N(0, I), got {posterior.base}")


def _data_names(shapes: Mapping[str, torch.Size]) -> tuple[str, ...]:
    """Return what to call the numbers of observed sites of given shapes, flattened and joined."""
    return flat_names({name: shape.numel() for name, shape in shapes.items()})


def _are_alike(one: Constraint, other: Constraint, shape: torch.Size, like: Tensor) -> bool:
    """Return whether events of a shape have the same unconstrained values on two supports."""
    real = real_shape(shape, one)
    if real != real_shape(shape, other):
        return False
    z = torch.linspace(-1.0, 1.0, 3 * real.numel()).to(like).reshape(3, *real)
    return are_close(biject(one)(z).double(), biject(other)(z).double(), rtol=1e-4)
