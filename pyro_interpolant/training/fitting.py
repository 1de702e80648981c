r"""What is done before training: checks with clear errors, and the choice of a map."""

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .._torch import seeded, trainable
from ..diagnostics.calibration import calibrate
from ..distributions.bases import Samples
from ..distributions.constraints import (
    Constraint,
    bijection,
    checked_rows,
    is_circular,
    shaped,
    to_unconstrained,
)
from ..distributions.interpolant import (
    AnyDistribution,
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
)
from ..distributions.joint import JointInterpolantDistribution, pack, sites_of
from ..interpolants.couplings import independent
from ..interpolants.nonlinear import Geodesic
from ..nn.mlp import TorusMLP, VelocityMLP
from ..solvers.ode import FixedGrid
from ..transforms.flow import Flow
from ..transforms.gaussianize import Gaussianized, RadialTransform
from ..transforms.interpolant import InterpolantTransform, interpolant_transform
from .batches import Rows
from .checkpoint import check_place, checksum, named, opened, warn_inexact
from .data import check_partners, checked_weights, own_flow, present, set_base
from .distributed import Engine
from .loop import NonFiniteError, Schedule, TrainingState, train
from .objective import Coupling, Objective
from .preprocessing import preferred_support, warn_if_rounded
from .streaming import first_rows, is_stream, loaded
from .whitening import inform, moments, precondition, usual

__all__ = ["FitResult", "check_settings", "choose_support", "fit", "from_samples", "noise_network"]


def noise_network(flow: Flow) -> nn.Module:
    """Return the network that learns the latent noise, made beside the velocity if missing."""
    if not flow.interpolant.has_latent():
        raise ValueError(
            f"expected an interpolant with a latent term to learn the noise, got "
            f"{type(flow.interpolant).__name__}: use Latent(...), or score(), which needs no "
            "network for a Gaussian base"
        )
    if flow.noise is None:
        velocity = flow.velocity
        if isinstance(velocity, VelocityMLP):
            flow.noise = VelocityMLP(*velocity.arguments()).to(flow.loc)
            for name, value in velocity.named_buffers():
                getattr(flow.noise, name).copy_(value)
        else:
            context_dim = getattr(velocity, "context_dim", 0)
            flow.noise = VelocityMLP(flow.dim, context_dim=context_dim).to(flow.loc)
    return flow.noise


def check_settings(
    steps: int | None,
    max_seconds: float | None,
    learning_rate: float,
    weight_decay: float | None,
    validation: Any,
    patience: int,
    ema: float,
    tolerance: float,
) -> None:
    """Raise a ValueError that names the first setting out of range."""
    share = validation if isinstance(validation, int | float) else None
    for name, good, value in (
        ("steps >= 1", steps is None or steps >= 1, steps),
        ("max_seconds > 0", max_seconds is None or max_seconds > 0, max_seconds),
        ("learning_rate > 0", learning_rate > 0, learning_rate),
        ("weight_decay >= 0", weight_decay is None or weight_decay >= 0, weight_decay),
        ("validation between 0 and 1, or rows", share is None or 0 < share < 1, share),
        ("patience >= 1", patience >= 1, patience),
        ("ema in [0, 1)", 0 <= ema < 1, ema),
        ("tolerance > 0", tolerance > 0, tolerance),
    ):
        if not good:
            raise ValueError(f"expected {name}, got {value}")


def choose_support(
    rows: Tensor | None, support: Constraint, fit_options: dict[str, Any], marginals: Any
) -> Constraint:
    """Return a support, behind a map set by rows, ``(N, *event_shape)``, if so wanted."""
    fixed = any(fit_options.get(name) is not None for name in ("base_samples", "pairs"))
    if rows is None or is_circular(support) or fixed:
        if marginals:
            raise ValueError(
                "expected marginals=True beside a table of rows that are no angles, without pairs "
                "or base_samples"
            )
        return support
    if marginals is False:
        return support
    weights = checked_weights(fit_options.get("weights"), len(rows))
    real = to_unconstrained(rows, support)
    found = preferred_support(real, support, weights, always=bool(marginals))
    if isinstance(found, Gaussianized) and isinstance(found.chart, RadialTransform):
        warn_if_rounded(real)  # what is wrong with columns, the fit cannot see behind the map
        moments(real)
    return found


_CALIBRATION_ROWS = 256
_DECAY, _MOST_DECAY = 70.0, 0.5  # times D / N, then squared, and at the most


class FitResult(NamedTuple):
    """What a training run did. Losses are the paper's G: negative where something is learned.

    Attributes:
        steps: The step of each look at the held-out loss.
        losses: The mean training loss before each look.
        validation_losses: The held-out loss of the averaged weights at each look.
        best_step: The step whose weights were kept.
        stopped_early: Whether anything ended the run before its schedule did.
        stopped_by: What ended it: ``"schedule"``, ``"patience"``, ``"callback"`` or
            ``"interrupt"``.
        skipped: The number of steps skipped because their loss or gradient was not finite.
        seconds: The duration, without calibration.
        solver: The calibrated solver that was set.
    """

    steps: list[int]
    losses: list[float]
    validation_losses: list[float]
    best_step: int
    stopped_early: bool
    stopped_by: str
    skipped: int
    seconds: float
    solver: FixedGrid


def fit(
    distribution: AnyDistribution,
    data: Any,
    *,
    context: Any = None,
    pairs: Any = None,
    base_samples: Any = None,
    weights: Any = None,
    steps: int | None = None,
    max_seconds: float | None = None,
    batch_size: int | None = None,
    learning_rate: float = 1e-2,
    weight_decay: float | None = None,
    validation: Any = 0.1,
    patience: int = 30,
    ema: float = 0.999,
    coupling: Coupling = independent,
    learn: Literal["velocity", "noise"] = "velocity",
    whiten: bool = True,
    tolerance: float = 1e-2,
    seed: int | None = None,
    progress: bool = True,
    callback: Callable[[TrainingState], bool | None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    fabric: Any = None,
) -> FitResult:
    r"""Train a flow on data, in place, then calibrate its solver.

    The whitening map is set from the data; the velocity is trained by regression on the
    interpolant with AdamW, a cosine schedule, clipped gradients and averaged weights; the weights
    kept are those with the best loss on held-out rows, at times and base draws that are fixed
    throughout.

    Args:
        distribution: The flow to train. Frozen weights are trained too, and are frozen afterwards.
        data: Rows of shape ``(N, *event_shape)``, or, for a
            :class:`~pyro_interpolant.JointInterpolantDistribution`, a dictionary of draws. Or a
            ``DataLoader`` or another iterable that gives batches of them each time it is gone
            through, which may be larger than memory: for a conditional flow
            ``(rows, contexts)``, and with weights as a last part. The whitening comes from a first
            pass.
        context: Contexts of shape ``(N, C)`` for a conditional flow.
        pairs: The partner of each row at the base, shape ``(N, D)``, for a coupling you already
            have: in data coordinates (under a support: unconstrained) where a base is given,
            draws of N(0, I) otherwise.
        base_samples: Samples of the base, shape ``(M, D)``, where no density of it is known: the
            flow then starts from them, transports and samples, and has no ``log_prob``.
        weights: Non-negative weights of the rows, shape ``(N,)``, or counts, or a mask; batches
            are drawn in their proportion, and rows of weight 0 count as absent.
        steps: The number of optimiser steps; by default 6,000, or as many as ``max_seconds``
            allows.
        max_seconds: Stop after this time; the schedule adapts to whichever ends first.
        batch_size: Rows per step and process; by default 1,024, or all training rows if fewer;
            of an iterable as many as its first batch has, but 64 at least. Above 64, rows come
            in whole multiples of it.
        learning_rate: The peak of the schedule.
        weight_decay: AdamW's, which shrinks all weights by this share of the learning rate at each
            step; by default (70 D / N)^2 for N training rows, at most 0.5; none where no first
            pass counts an iterable's rows.
        validation: The share of rows held out, of an iterable from its first batches; or rows of
            your own, shape ``(M, *event_shape)``; for a conditional flow ``(rows, contexts)``.
        patience: After this many looks at the held-out loss, of 100 in all, without a better one,
            go back to the best weights and let the rate fall to zero within a fifth of the
            schedule; not in its first three tenths.
        ema: The decay of the moving average of the weights.
        coupling: Who is paired with whom in a batch; see :mod:`~pyro_interpolant.couplings`.
        learn: ``"velocity"``; or, once that is trained and the interpolant has a latent term,
            ``"noise"``: :math:`E[z \mid I_t]`, which gives :func:`~pyro_interpolant.score` for any
            base and coupling.
        whiten: Whether to set the whitening map from the data; False keeps the present one, to
            train on from weights that know it; a network without any is told of the rows even so.
        tolerance: For :func:`~pyro_interpolant.calibrate`, nats.
        seed: Makes the run reproducible: same seed, same weights. The global generator is left as
            it was.
        progress: Whether to show a bar.
        callback: Called with a :class:`TrainingState` at each look; to stop the run it returns
            True.
        checkpoint: A file to keep the state of the run in. The same call resumes from it: with
            ``steps`` and the same number of threads to bitwise the same weights; an iterable, or
            its sampler, must have ``state_dict`` and ``load_state_dict`` for that.
        checkpoint_every: After how many steps it is written; by default at each look.
        fabric: A launched ``lightning_fabric.Fabric``: its device, precision and processes. A
            table of rows is shared out; an iterable gives each process its own batches.

    Returns:
        Both loss curves and what happened.

    Raises:
        TypeError: If the data are not of a floating type.
        ValueError: If the data, the context or a setting cannot work; raised before any work.
        RuntimeError: If gradients stay non-finite; the last good weights are kept.

    References:
        arXiv 2209.15571, Algorithm 1.
    """
    flow, engine = own_flow(distribution), Engine(fabric)
    flow.interpolant.check_ends(flow.dim)
    limits, rates = (steps, max_seconds), (learning_rate, weight_decay)
    check_settings(*limits, *rates, validation, patience, ema, tolerance)
    check_place(None if engine.rank else checkpoint, checkpoint_every)
    given = {"context": context, "pairs": pairs, "weights": weights}
    engine.place(distribution)
    source = loaded(distribution, flow, data, given, validation, batch_size, engine)
    with seeded(engine.seed(seed), flow.loc.device):
        share = validation if isinstance(validation, float) else None
        settings = [*limits, *rates, batch_size, patience, ema, learn, seed, share, whiten]
        parts = [distribution.base, flow, base_samples, coupling, validation]
        identity = lambda: [source.checksum, settings, _described(*parts)]  # noqa: E731
        keeper = opened(checkpoint, checkpoint_every, identity)
        if keeper is not None and not source.exact:
            warn_inexact()
        held, kept, total, size, batches = source.split(whiten and learn == "velocity")
        set_base(distribution, flow, base_samples, torch.cat((kept.w, held.w)))
        check_partners(distribution, kept.partner)
        noise = noise_network(flow) if learn == "noise" else None
        if learn == "velocity":
            flow.independent = coupling is independent and pairs is None
            if whiten:
                precondition(flow, distribution, kept)
            elif math.isfinite(total):
                inform(flow, kept)
            engine.agree(flow.buffers())
        shown, unseen = _split_base(distribution.base, validation)
        objective = Objective(flow, shown, coupling, size, noise)
        held = held.take(usual(objective.prepared(held).w))
        fixed = objective.with_base(unseen).fixed_draw(objective.prepared(held))
        objective.share(engine.rank, engine.world, own=source.checksum is None)
        if weight_decay is None:
            weight_decay = engine.agreed(min(_MOST_DECAY, (_DECAY * flow.dim / total) ** 2))
        schedule = Schedule(steps, max_seconds, learning_rate, weight_decay, patience, ema)
        with trainable(objective.network):
            outcome = train(
                objective, batches(objective.prepared), fixed, schedule, engine,
                progress=progress, callback=callback, keeper=keeper,
            )  # fmt: skip
    distribution.clear_cache()
    solver: Any = flow.solver
    if learn == "velocity" and not isinstance(distribution.base, Samples):
        solver = _calibrated(distribution, held, tolerance)
    return FitResult(*outcome, solver)


def _described(
    base: Any, flow: Flow, base_samples: Any, coupling: Coupling, held: Any
) -> list[Any]:
    """Return what tells a run of this flow from one of another."""
    base = None if isinstance(base, Samples) else base  # set by this very call
    names = [named(part) for part in (flow.interpolant, flow.velocity, base, coupling)]
    shapes = [list(p.shape) for p in flow.velocity.parameters()]
    return [names, shapes, checksum(_tensors([flow.interpolant, base, base_samples, held]))]


def _tensors(value: Any) -> list[torch.Tensor]:
    """Return the numbers that a part is made of, of any shapes."""
    if isinstance(value, torch.nn.Module):
        return list(value.state_dict().values())
    if hasattr(value, "__array__"):
        return [torch.as_tensor(value)]
    if isinstance(value, torch.distributions.Distribution):
        names: Any = type(value).arg_constraints  # a property where its author wrote none
        numbers = [getattr(value, name) for name in names] if isinstance(names, dict) else []
        value = [*numbers, getattr(value, "base_dist", None), getattr(value, "transforms", None)]
    parts = value if isinstance(value, (list, tuple)) else []
    return [tensor for part in parts for tensor in _tensors(part)]


def _calibrated(distribution: AnyDistribution, held: Rows, tolerance: float) -> Any:
    """Return the solver calibrated to held-out rows; an interrupt leaves the one that is there."""
    few = held._replace(weight=None).repeated(min(_CALIBRATION_ROWS, len(held.w)))
    rows = few.w.to(distribution.transform.loc)
    try:
        return calibrate(_bare(distribution), rows, context=few.context, tolerance=tolerance)
    except KeyboardInterrupt:
        warnings.warn(
            "the calibration was interrupted: the weights are trained, and the solver is the one "
            "before. Call calibrate(distribution, rows)",
            stacklevel=3,
        )
        return distribution.transform.solver


def _split_base(base: Any, validation: Any) -> tuple[Any, Any]:
    """Return the base for training and the one for the held-out loss: disjoint samples."""
    if not isinstance(base, Samples):
        return base, base
    rows = base.rows[torch.randperm(len(base.rows), device=base.rows.device)]
    share = validation if isinstance(validation, float) else 0.1
    count = max(1, round(share * len(rows)))
    return Samples(rows[count:] if len(rows) > count else rows), Samples(rows[:count])


def _bare(distribution: AnyDistribution) -> AnyDistribution:
    """Return the same flow without its support."""
    kind: Any = (
        ConditionalInterpolantDistribution
        if isinstance(distribution, ConditionalInterpolantDistribution)
        else InterpolantDistribution
    )
    return kind(distribution.transform, distribution.base)


def from_samples(
    x: Any,
    *,
    support: Constraint | Mapping[str, Constraint] = constraints.real_vector,
    event_shape: Sequence[int] | None = None,
    marginals: bool | None = None,
    seed: int | None = None,
    **fit_options: Any,
) -> InterpolantDistribution:
    """Learn a distribution from samples: build a flow, train it, calibrate it, freeze it.

    Args:
        x: Rows of shape ``(N, *event_shape)``; or named draws, a dictionary of tensors of shape
            ``(N, *site_shape)`` such as ``mcmc.get_samples()``: the result is then a
            :class:`~pyro_interpolant.JointInterpolantDistribution`; or an iterable of batches.
        support: Where the samples live; for named draws, a dictionary that names the supports of
            the sites that are not real.
        event_shape: The shape of a row, where it has more than one dimension.
        marginals: Whether each unconstrained column is first made normal by a monotone spline, so
            that the flow learns only how they depend on each other: the remedy for slabs, spikes
            and long tails in single columns. By default where eight Gaussians fit held-out rows
            better behind the splines, by 0.05 nats and more than chance, in up to 64 dimensions
            of at least 90 rows each. By default only, and where the same rule finds that to gain
            more, the lengths of whitened rows are brought half-way to normal ones instead: the
            remedy for one scale that is common to all columns. Neither for an iterable, for
            angles, or beside ``base_samples`` or ``pairs``. Paths and SDEs then live behind the
            map. True asks for 400 rows at least.
        seed: As in :func:`fit`; also of the initial weights.
        **fit_options: Passed to :func:`fit`.

    Returns:
        A trained distribution in the type of the samples, with frozen weights: no inference trains
        it by accident. ``distribution.transform.requires_grad_(True)`` unfreezes it.

    Raises:
        TypeError: If the samples are not of a floating type.
        ValueError: If the samples or the support cannot work.
        RuntimeError: If gradients stay non-finite; its ``distribution`` has the last good weights.

    Example:
        >>> x = torch.randn(2000, 2).exp()
        >>> prior = from_samples(x, support=constraints.positive, steps=50, progress=False)
        >>> bool((prior.sample((5,)) > 0).all())
        True
    """
    few = x
    if is_stream(x):
        with seeded(seed):
            few = first_rows(x)
    weights = fit_options.get("weights")
    if weights is not None and few is x:
        few, pairs, weights = present(weights, x, fit_options.get("pairs"))
        x, fit_options = few, {**fit_options, "weights": weights, "pairs": pairs}
    if isinstance(x, Mapping):
        if event_shape is not None:
            raise TypeError("expected no event_shape beside named draws, which have their own")
        sites = sites_of(x, {} if support is constraints.real_vector else support)
        rows = pack(sites, x)
        dim = rows.shape[-1]
    elif isinstance(support, Mapping):
        raise TypeError("expected one support for one tensor of samples, got a dictionary")
    elif is_circular(support):
        rows = checked_rows(few, "x")
        dim = rows.shape[-1]
    else:
        support = shaped(support, event_shape)
        event_dim = max(1, bijection(support).codomain.event_dim)
        rows = checked_rows(few, "x", event_shape or (None,) * event_dim)
        dim = bijection(support).inverse_shape(rows.shape[1:])[-1]
    with seeded(seed, rows.device):
        if not isinstance(support, Mapping) and is_circular(support):
            transform = InterpolantTransform(TorusMLP(dim), interpolant=Geodesic()).to(rows)
        else:
            transform = interpolant_transform(dim).to(rows)
    event: Constraint = constraints.real_vector if isinstance(support, Mapping) else support
    event = choose_support(rows if few is x else None, event, fit_options, marginals)
    distribution: InterpolantDistribution
    if isinstance(x, Mapping):
        distribution = JointInterpolantDistribution(transform, sites=sites, support=event)
    else:
        distribution = InterpolantDistribution(transform, support=event)
    try:
        fit(distribution, rows if few is x else x, seed=seed, **fit_options)
    except NonFiniteError as error:
        error.distribution = distribution.freeze()
        raise
    return distribution.freeze()
