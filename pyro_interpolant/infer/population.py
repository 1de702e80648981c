r"""Populations: the density of x behind a catalogue whose rows y are noisy, or are posteriors.

The population :math:`\rho` that maximises :math:`\sum_i \log \int \rho(x) p(y_i | x) dx` is found
by simulated expectation maximisation. A round draws latents of some rows under the present flow
(the E-step), and regresses the flow on the latents of the last rounds (the M-step). It starts
from latents of the rows under a mixture of Gaussians. The log-evidence of rows held out, by
importance sampling, chooses the round that is kept.

References:
    Dempster, Laird & Rubin, J. R. Stat. Soc. B 39 (1977); Celeux & Diebolt, Comput. Stat. Quart. 2
    (1985) (simulated latents); Bovy, Hogg & Roweis, *Extreme deconvolution*, Ann. Appl. Stat. 5
    (2011) (the same likelihood, a mixture of Gaussians); Hogg, Myers & Bovy, ApJ 725 (2010)
    (posterior draws, reweighted).
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from .._package import check_ranges, check_sizes, number, whole
from .._torch import seeded, with_gradients
from ..distributions.constraints import Constraint, shaped
from ..distributions.interpolant import AnyDistribution
from ..distributions.rows import (
    as_tensor,
    check_same_order,
    checked_rows,
    columns_in_order,
    contexts_of_rows,
    counted,
    in_order,
    names_of,
)
from ..distributions.supports import BijectiveSupport, CircularSupport, support_of
from ..nn.velocity import fixed_weights
from ..solvers.parallel import one_thread_each
from ..training.building import context_names, contexts_for, from_samples, new_network
from ..training.clock import Clock
from ..training.names import Names
from ..training.repeats import rows_to_tell
from .deconvolution import gaussian_latents
from .expectation_maximization import NoisyRows, PosteriorDraws, held_out, in_turn, learn
from .latents import of_population
from .noise import Measurements, Noise, measurements

_STEPS = 6000  # by default, in all
_START_SHARE = 0.15  # of the steps and the time, for the flow to start from
_FEWEST_ROWS = 50  # to start from
_TRIES = 4  # draws for each latent to start from, as some lie off the support
_START_DRAWS = 20_000  # latents to start from; of posterior draws, where there are as many


@one_thread_each()
@with_gradients()
def from_noisy_samples(
    y: ArrayLike,
    noise: Noise,
    *,
    noise_data: ArrayLike | None = None,
    context: ArrayLike | None = None,
    support: Constraint = constraints.real_vector,
    event_shape: Sequence[int] | None = None,
    start: ArrayLike | Distribution | None = None,
    network: nn.Module | None = None,
    marginals: bool | None = None,
    steps: int | None = None,
    max_seconds: float | None = None,
    validation: float = 0.1,
    seed: int | None = None,
    progress: bool = True,
) -> AnyDistribution:
    r"""Learn the density of x from rows :math:`y_i \sim p(y | x_i)`, each with its own noise.

    What is learned is the density before the noise, its deconvolution: ``log_prob`` is that of x.
    :func:`object_posteriors` then gives the posterior of each row, or of new ones. How large an
    error is must not depend on x except through ``context``: where faint objects have wider
    errors, pass what the errors depend on as contexts.

    Args:
        y: Rows, shape ``(N, D)``, or N scalars, shape ``(N,)``. The population keeps the names of
            the columns of a data frame, by which those of ``start`` are taken, and of ``noise``
            where it has the same.
        noise: Standard deviations of Gaussian errors, of the shape of y; their covariances, shape
            ``(N, D, D)``; or ``noise(x, row)``, a function that returns a Pyro distribution of y
            given latents x, shape ``(n or 1, S, *event_shape)``, and ``row``, those rows of
            ``noise_data``, shape ``(n, 1, ...)``; several threads may call it at once. A missing
            number has an infinite standard deviation or variance, ``torch.inf``, and may be NaN
            in y.
        noise_data: For a function: what it takes of each row, ``(N, ...)``, in the type of y.
        context: What the population is given, shape ``(N, C)``, as in
            :func:`~pyro_interpolant.from_samples`: the result is then conditional. Rows of equal
            contexts share draws: round them to some dozen values, and a round takes half the time.
        support: Where x lives. Errors may lead out of it.
        event_shape: The shape of an x, where it has more than one dimension.
        start: A guess that is wider than the population, from which it narrows: rows, shape
            ``(M, *event_shape)``, or a Pyro distribution of x. By default 20,000 latents of the
            rows, or one of each, under the mixture of Gaussians that explains rows held out best;
            needed beside a function.
        network: As in :func:`~pyro_interpolant.from_samples`.
        marginals: As in :func:`~pyro_interpolant.from_samples`, decided on the start.
        steps: The number of optimiser steps in all; by default 6,000.
        max_seconds: A limit of the time for steps, by default none; after one round at the
            earliest. A warning says where it cut the run.
        validation: The share of rows held out, at most 2,000, with all copies of each.
        seed: Makes the run reproducible.
        progress: Whether to show a bar, and the report.

    Returns:
        A trained distribution with frozen weights. Its ``report`` has the mean
        :math:`\log p(y)` of rows held out, by importance sampling, its standard error over rows
        and draws, and, as the reference, that of the start.

    Raises:
        TypeError: If something is of a wrong type.
        ValueError: If rows, errors, contexts, the start or a setting cannot work; the message
            says which row.
        RuntimeError: If gradients stay non-finite.

    Example:
        >>> x = torch.randn(200, 2)
        >>> sds = torch.rand(200, 2) + 0.1
        >>> y = x + sds * torch.randn(200, 2)
        >>> population = from_noisy_samples(y, sds, steps=50, seed=0, progress=False)
        >>> population.sample((5,)).shape
        torch.Size([5, 2])
    """
    clock = _checked_settings(support, steps, max_seconds, validation)
    if event_shape is not None:
        check_sizes("event_shape", event_shape)
    columns = _names_of_latents(y, noise, start)
    check_same_order(y=y, noise=noise, noise_data=noise_data, context=context)
    rows = measurements(y, noise, noise_data, columns)
    held, kept = held_out(rows_to_tell(rows.y), validation, seed)
    if rows.is_gaussian():
        event_shape = rows.y.shape[1:] if event_shape is None else event_shape
        rows.check_shape(event_shape)
    with seeded(seed):
        constraint = shaped(support, event_shape)
        first, index = _start_rows(rows.take(kept), constraint, start, columns)
    rows.check(first)
    context, of_contexts, sizes = _checked_context(context, rows.y, network)
    names = Names(columns if first.shape[1:] == (len(columns),) else (), of_contexts)
    options: dict[str, Any] = {"support": support, "event_shape": event_shape, "network": network}
    options |= {"marginals": marginals, "seed": seed}
    contexts = None if context is None else context[kept[index.cpu()]]
    distribution, rest = _started(first, contexts, sizes, names, options, steps, clock)
    loc = distribution.transform.flow.loc
    catalogue = NoisyRows(of_population(rows, distribution, context), loc)
    learn(distribution, catalogue, held, rest, clock, seed=seed, progress=progress)
    return distribution


@one_thread_each()
@with_gradients()
def from_posterior_samples(
    draws: ArrayLike,
    log_interim_prior: ArrayLike | Callable[[Tensor], Tensor],
    *,
    context: ArrayLike | None = None,
    support: Constraint = constraints.real_vector,
    network: nn.Module | None = None,
    marginals: bool | None = None,
    steps: int | None = None,
    max_seconds: float | None = None,
    validation: float = 0.1,
    seed: int | None = None,
    progress: bool = True,
) -> AnyDistribution:
    r"""Learn a population from posterior draws of each object, made under another prior.

    Draws of :math:`p(x | y_i) \propto \pi(x) p(y_i | x)` are weighted by
    :math:`\rho(x) / \pi(x)`, the population over the interim prior. That prior must be wider than
    the population: where there are no draws, there is nothing to weigh. The draws of each object
    must be many: of a normal population, errors as wide as it, and a prior three times as wide,
    the standard deviation comes out 40%, 22%, 8% and 2% too large by K = 2, 5, 20 and 100 draws of
    each object, however many objects there are. Where log-evidences are more than 0.01 nats too
    low for this, a warning says so.

    Args:
        draws: K draws of each of N objects, shape ``(N, K, D)``; or a list of the draws of each,
            as many as there are, shapes ``(K_i, D)``; of data frames columns are taken by name.
        log_interim_prior: :math:`\log \pi` of the draws, shape ``(N, K)``, or a list of shapes
            ``(K_i,)``, up to a constant; or a function that returns it, such as the ``log_prob``
            of a distribution of events of shape ``(D,)``, called with the draws, or with those of
            each object of a list.
        context: As in :func:`from_noisy_samples`, shape ``(N, C)``.
        support: Where x lives.
        network: As in :func:`from_noisy_samples`.
        marginals: As in :func:`from_noisy_samples`.
        steps: As in :func:`from_noisy_samples`.
        max_seconds: As in :func:`from_noisy_samples`.
        validation: The share of objects held out, at most 2,000, with all copies of each.
        seed: As in :func:`from_noisy_samples`.
        progress: As in :func:`from_noisy_samples`.

    Returns:
        A trained distribution with frozen weights. Its ``report`` has the mean
        :math:`\log p(y_i)` of objects held out, beyond that under the interim prior.

    Raises:
        TypeError: As :func:`from_noisy_samples`.
        ValueError: As :func:`from_noisy_samples`.
        RuntimeError: If gradients stay non-finite.

    References:
        Hogg, Myers & Bovy, ApJ 725 (2010), arXiv 1008.4146, eq. 8.

    Example:
        >>> interim = torch.distributions.Normal(0.0, 3.0)
        >>> centres = torch.randn(100, 1, 1)
        >>> draws = 0.9 * (centres + torch.randn(100, 1, 1)) + 0.95 * torch.randn(100, 20, 1)
        >>> log_prior = interim.log_prob(draws).sum(-1)
        >>> population = from_posterior_samples(draws, log_prior, steps=50, progress=False)
        >>> population.sample((5,)).shape
        torch.Size([5, 1])
    """
    clock = _checked_settings(support, steps, max_seconds, validation)
    check_same_order(log_interim_prior=log_interim_prior, context=context)
    x, log_prior, counts, columns = _checked_draws(draws, log_interim_prior)
    objects = torch.arange(len(counts)).repeat_interleave(counts)
    bad = ~BijectiveSupport(shaped(support, x.shape[1:])).strictly_inside(x)
    if bool(bad.any()):
        which = objects[bad.cpu()].unique()
        raise ValueError(
            f"expected draws strictly inside the support {support}, got others of {len(which)} "
            f"objects, the first being object {int(which[0])}: remove them"
        )
    first = x[counts.cumsum(0) - counts]
    held, kept = held_out(rows_to_tell(first), validation, seed)
    context, of_contexts, sizes = _checked_context(context, first, network)
    with seeded(seed):
        some = in_turn(objects, kept)[: max(_START_DRAWS, len(counts))]
    first = x[some]
    contexts = None if context is None else context[objects[some]]
    options = {"support": support, "network": network, "marginals": marginals, "seed": seed}
    names = Names(columns, of_contexts)
    distribution, rest = _started(first, contexts, sizes, names, options, steps, clock)
    flow = distribution.transform.flow
    u = distribution.to_flow(x).to(flow.loc)
    with torch.no_grad():
        log_prior = log_prior.to(u.device) + distribution.from_flow(u)[1]
    if context is not None:
        context = contexts_of_rows(context, flow, of_contexts, len(counts))
    with seeded(seed):
        catalogue = PosteriorDraws(u, log_prior, counts, context)
    learn(distribution, catalogue, held, rest, clock, seed=seed, progress=progress)
    return distribution


def _checked_context(
    context: ArrayLike | None, rows: Tensor, network: nn.Module | None
) -> tuple[Tensor | None, tuple[str, ...], tuple[int, ...]]:
    """Return contexts, before there is a flow that takes them, or None, their names and sizes.

    Args:
        context: Contexts, shape ``(N, C)``, labels, shape ``(N,)``, or None.
        rows: What there is of each object, shape ``(N, ...)``.
        network: The velocity, or None for a new one.
    """
    found, sizes = contexts_for(context, rows, network)
    taken = found
    if context is not None and len(sizes) == 2:  # labels stay labels
        taken = as_tensor(context, "context")
    return taken, context_names(context, found), sizes


def _checked_log_prior(
    log_interim_prior: ArrayLike | Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """Return the log density of draws under their own prior, shape ``(N, K)``, in float64.

    Args:
        log_interim_prior: As in :func:`from_posterior_samples`.
        x: The draws, shape ``(N, K, D)``.
    """
    log_prior = log_interim_prior(x) if callable(log_interim_prior) else log_interim_prior
    if getattr(log_prior, "shape", ()) == x.shape:
        raise ValueError(
            f"expected log_interim_prior of shape {tuple(x.shape[:2])}, got {tuple(x.shape)}, a "
            "number for each column: of a distribution of scalars give distribution.to_event(1)"
        )
    log_prior = checked_rows(log_prior, "log_interim_prior", (x.shape[1],)).double()
    if len(log_prior) != len(x):
        raise ValueError(
            f"expected log_interim_prior of shape {tuple(x.shape[:2])}, got "
            f"{tuple(log_prior.shape)}"
        )
    return log_prior


def _checked_draws(
    draws: ArrayLike, log_interim_prior: ArrayLike | Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Return the draws of all objects one after another, or raise an error for other ones.

    Args:
        draws: As in :func:`from_posterior_samples`.
        log_interim_prior: As there.

    Returns:
        The draws, shape ``(M, D)``, their log densities under their own prior, shape ``(M,)``, in
        float64, the number of draws of each object, shape ``(N,)``, and the names of columns.
    """
    if hasattr(log_interim_prior, "log_prob"):
        raise TypeError(
            "expected log_interim_prior of numbers or a function, got "
            f"{type(log_interim_prior).__name__}: pass its log_prob"
        )
    names: tuple[str, ...] = ()
    if isinstance(draws, list | tuple):
        names = next(filter(None, map(names_of, draws)), ())
        named = ((f"draws[{i}]", few) for i, few in enumerate(draws))
        sets = [checked_rows(columns_in_order(x, names, name), name) for name, x in named]
        each: Any = log_interim_prior
        is_one = not isinstance(each, Iterable) or getattr(each, "ndim", 1) == 0
        each = map(each, sets) if callable(each) else [each] if is_one else each
        log_priors: list[Any] = [as_tensor(few, "log_interim_prior")[None] for few in each]
        sets = [few[None] for few in sets]
    else:
        x = as_tensor(draws, "draws")
        if x.dim() != 3:
            raise ValueError(
                "expected draws of shape (N, K, D), or a list of each object's, (K_i, D), got "
                f"{tuple(x.shape)}: of one number x that is draws[..., None]"
            )
        sets, log_priors = [checked_rows(x, "draws", (None, None))], [log_interim_prior]
    counts = torch.tensor([x.shape[1] for x in sets for _ in x])
    dims = {x.shape[2] for x in sets}
    if len(dims) != 1 or len(log_priors) != len(sets):
        raise ValueError(
            "expected draws of the same D numbers for each object, and their log_interim_prior, "
            f"got {len(sets)} objects with D in {sorted(dims)} and {len(log_priors)} priors"
        )
    if int(counts.min()) < 2:
        raise ValueError(
            "expected at least two draws of each object, among which to choose, got one for "
            f"{counted(counts < 2, 'objects')}: rows that are known are what from_samples takes"
        )
    known = map(_checked_log_prior, log_priors, sets)
    log_prior = torch.cat([few.flatten() for few in known])
    return torch.cat([x.flatten(0, 1) for x in sets]), log_prior, counts, names


def _checked_settings(
    support: Constraint, steps: int | None, max_seconds: float | None, validation: float
) -> Clock:
    """Return the clock of a run, or raise an error for a setting that cannot work."""
    if isinstance(support_of(support), CircularSupport):
        raise ValueError(
            "expected a support that is an image of real vectors, got angles: take a range of "
            "them that no row crosses, constraints.interval(...)"
        )
    check_ranges(
        whole("steps", steps, 1, or_none=True),
        number("validation between 0 and 1", validation, lambda n: 0 < n < 1),
    )
    return Clock(max_seconds)


def _names_of_latents(
    y: ArrayLike, noise: Noise, start: ArrayLike | Distribution | None
) -> tuple[str, ...]:
    """Return the names of the columns of latents: those of y, or of what they start from.

    Beside a function, y may be other numbers than x: names of x are then those of the start.
    """
    of_y, of_start = names_of(y), names_of(start)
    is_other = callable(noise) and bool(of_start) and set(of_start) != set(of_y)
    return of_start if is_other else of_y or of_start


def _start_rows(
    rows: Measurements,
    constraint: Constraint,
    start: ArrayLike | Distribution | None,
    names: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """Return what a population starts from, and the indices of rows whose contexts it has.

    Args:
        rows: The measurements.
        constraint: The support, of events of their shape.
        start: What the user gave: rows, a distribution, or None.
        names: The names of the columns of latents in their order, or none.

    Raises:
        ValueError: If there is nothing to start from, or too little of it on the support; or if
            it has columns of other names.
    """
    if start is not None:
        drawn = start.sample((len(rows),)) if isinstance(start, Distribution) else start
        wide = in_order(as_tensor(drawn, "start"), names_of(start), names, "start").to(rows.y)
        if wide.numel() == 0:
            raise ValueError(
                f"expected rows to start from, shape (M, *event_shape), got {tuple(wide.shape)}"
            )
        index = torch.arange(max(len(rows), len(wide)))
        return wide[index % len(wide)], index % len(rows)
    if not rows.is_gaussian():
        raise ValueError(
            "expected start beside a function noise(x, row), got none: rows, shape "
            "(M, *event_shape), or a distribution of x that is wider than the population"
        )
    return _latents_of_mixture(rows, constraint)


def _latents_of_mixture(rows: Measurements, constraint: Constraint) -> tuple[Tensor, Tensor]:
    """Return latents of rows on the support, under a mixture of Gaussians, and whose they are.

    Args:
        rows: The measurements, with Gaussian errors.
        constraint: The support.

    Raises:
        ValueError: If a column is measured nowhere, or too few rows have latents on the support.
    """
    precisions = rows.precisions()
    if not bool((precisions.diagonal(dim1=-2, dim2=-1) > 0).any(0).all()):
        raise ValueError(
            "expected each column of y to be measured somewhere, got one of "
            "which all errors are infinite: leave it out, or pass start"
        )
    y, each = rows.y.reshape(len(rows), -1).double(), math.ceil(_START_DRAWS / len(rows))

    def is_inside(x: Tensor) -> Tensor:
        shape, events = x.shape[:-1], x.to(rows.y).reshape(*x.shape[:-1], *rows.y.shape[1:])
        return BijectiveSupport(constraint).strictly_inside(events).reshape(*shape, -1).all(-1)

    part = None if support_of(constraint).is_real() else is_inside
    drawn = gaussian_latents(y, precisions, _TRIES * each, part).to(rows.y)
    inside = is_inside(drawn)
    drawn = drawn.reshape(*drawn.shape[:2], *rows.y.shape[1:])
    # Of each row the first ones that are inside: without others, edges would be empty.
    first = inside.byte().argsort(dim=0, descending=True, stable=True)[:each]
    kept = inside.gather(0, first)
    if int(kept.sum()) < _FEWEST_ROWS * each:
        raise ValueError(
            f"expected at least {_FEWEST_ROWS} rows of y on the support {constraint}, to start "
            f"from, beside those held out, got {int(kept.sum()) // each}: pass start, rows or a "
            "distribution of x that is wider than the population"
        )
    found = drawn[first, torch.arange(len(rows), device=first.device)]
    return found[kept], kept.nonzero()[:, 1]


def _started(
    first: Tensor,
    context: Tensor | None,
    sizes: tuple[int, ...],
    names: Names,
    options: dict[str, Any],
    steps: int | None,
    clock: Clock,
) -> tuple[AnyDistribution, int]:
    """Return a flow trained on what a population starts from, and how many steps are left.

    Args:
        first: The rows, shape ``(M, *event_shape)``.
        context: Their contexts, or None.
        sizes: Those of the contexts of all rows, of which the first may lack a class.
        names: Those of the columns of rows and contexts.
        options: For :func:`~pyro_interpolant.from_samples`.
        steps: The number of steps in all, or None.
        clock: The time.
    """
    total = int(steps or _STEPS)
    start = max(1, int(_START_SHARE * total))
    rest = total - start
    with warnings.catch_warnings():  # about rows that are not what is learned
        warnings.simplefilter("ignore")
        options = {**options, "context": context, "steps": start, "max_seconds": clock.left()}
        if options["network"] is None:
            space = support_of(shaped(options["support"], first.shape[1:]))
            with seeded(options["seed"]):
                options["network"] = new_network(space, first, sizes)
        distribution = from_samples(first, progress=False, **options)
    if fixed := fixed_weights(options["network"]):  # the rounds leave them, too
        for name, weight in distribution.transform.velocity.named_parameters():
            weight.requires_grad = name not in fixed
    names.give_to(distribution)
    return distribution, rest
