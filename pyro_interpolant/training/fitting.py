r"""``fit``: training by a quadratic regression. No step of it solves an ODE."""

import contextlib
import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from numpy.typing import ArrayLike

from .._package import check_ranges, flag, whole
from .._torch import seeded, warn_user, with_gradients
from ..diagnostics.calibration import calibrated, sampler_calibrated
from ..diffusion.guidance import Guided
from ..distributions.fingerprint import identity_of
from ..distributions.interpolant import AnyDistribution, ConditionalInterpolantDistribution
from ..distributions.report import Report
from ..interpolants.couplings import independent
from ..nn.modes import trainable
from ..nn.velocity import is_untrained
from ..solvers.ode import Solver
from ..solvers.parallel import one_thread_each
from ..transforms.flow import Flow
from ..transforms.interpolant import ConditionalInterpolantTransform, InterpolantTransform
from .agreement import warn_if_draws_differ
from .checkpoint import check_place, open_checkpoint
from .clock import Clock
from .data import DEFAULT_SHARE, DataLike, HeldOut, Table, as_held_out
from .distributed import Process
from .image_rows import is_image
from .loop import Callback, Run, Schedule
from .objective import Coupling, Objective, exponent_of, takes_means
from .optimization import NonFiniteError
from .options import check_choices
from .preparation import prepare_flow, start_from
from .reporting import HeldOutDensity, attempted, tell
from .streaming import Stream, is_stream
from .whitening import wild_rows

if TYPE_CHECKING:
    from lightning_fabric import Fabric

_SHARED_TABLE = (
    "read the same file, draw by the same seed, or give each process batches of its own"
)
_SHARED_FILE = "pass all the same checkpoint, on a disk that all see"
_CALIBRATION_ROWS = 256
_CALIBRATION_IMAGES = 8


class FitResult(NamedTuple):
    """What a training run did.

    Losses are the paper's G, which leaves out a constant: 0 for a velocity of zero, lower is
    better. They are means over the times that :func:`fit` takes.

    Attributes:
        steps: The step of each look at the held-out loss.
        losses: The mean training loss before each look.
        validation_losses: The held-out loss of the averaged weights at each look.
        best_step: The step whose weights were kept.
        stopped_early: Whether anything ended the run before its schedule did.
        stopped_by: What ended it: ``"schedule"``, ``"patience"``, ``"callback"``, ``"time"`` or
            ``"interrupt"``.
        skipped: The number of steps skipped because their loss or gradient was not finite.
        seconds: The duration, without calibration.
        solver: The calibrated solver that was set; the one before, where there is no density to
            calibrate it by, as from samples, or a warning says so.
        report: What was measured, in nats; of ``learn="noise"``, by the run before.
    """

    steps: list[int]
    losses: list[float]
    validation_losses: list[float]
    best_step: int
    stopped_early: bool
    stopped_by: str
    skipped: int
    seconds: float
    solver: Solver
    report: Report | None

    def __repr__(self) -> str:
        """Say what was measured, and how it ended."""
        skipped = f", {self.skipped} steps skipped" if self.skipped else ""
        report = "" if self.report is None else f"{self.report}\n"
        return f"{report}ended by {self.stopped_by}{skipped}; {self.solver}"


@with_gradients()
@one_thread_each()
def fit(
    distribution: AnyDistribution,
    data: DataLike,
    *,
    context: ArrayLike | None = None,
    pairs: ArrayLike | None = None,
    base_samples: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    flip: bool = False,
    steps: int | None = None,
    max_seconds: float | None = None,
    batch_size: int | None = None,
    accumulate: int = 1,
    learning_rate: float = 1e-2,
    weight_decay: float | None = None,
    validation: HeldOut = DEFAULT_SHARE,
    patience: int = 30,
    ema: float = 0.999,
    coupling: Coupling = independent,
    learn: Literal["velocity", "noise"] = "velocity",
    whiten: bool = True,
    tolerance: float = 1e-2,
    seed: int | None = None,
    progress: bool = True,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    fabric: "Fabric | None" = None,
) -> FitResult:
    r"""Train a flow on data, in place, then calibrate its solver.

    The whitening map is set from the data; the velocity is trained by regression on the
    interpolant with AdamW, a cosine schedule, clipped gradients and averaged weights. The weights
    kept are the latest under which held-out rows are as likely as ever, but for one standard error
    of the difference. For pairs and couplings, whose paths no density can judge, for images, and
    where there is no density, the held-out loss takes its place, at times and base draws that are
    fixed throughout.

    Times are :math:`1 - (1 - u)^p`, u uniform on [0, 1]: on paths from N(0, I) the networks of
    this package for up to 8 dimensions take p = 2, those given data (of
    :class:`~pyro_interpolant.AmortizedInterpolant`) p = 3, for a density hangs more on rates near
    the data than before; all else p = 1.

    Of at most 8 columns, without contexts other than labels, and on linear paths from N(0, I)
    between independent pairs, the velocity is regressed not on the rate of one path but on the
    mean over the rows, 512 of a batch at most, that its point may as well lead to: the minimiser
    is the same, and the gradient less noisy.

    Args:
        distribution: The flow to train, whose weights are all frozen afterwards. Those frozen
            beside others stay as they are; of a flow that is all frozen, all are trained on.
        data: Rows of shape ``(N, *event_shape)``, or, for a
            :class:`~pyro_interpolant.JointInterpolantDistribution`, a dictionary of draws or a
            data frame of them, with columns ``mu[0]``, ``mu[1]``, ... of a site of several. Or a
            ``DataLoader`` or another iterable that gives batches of them each time it is gone
            through, which may be larger than memory: for a conditional flow
            ``(rows, contexts)``, and with weights as a last part. The whitening comes from a first
            pass. Images, events of three dimensions, may be whole levels in ``uint8``, as in
            :func:`from_samples`.
        context: Contexts of shape ``(N, C)`` for a conditional flow.
        pairs: The partner of each row at the base, shape ``(N, D)``, for a coupling you already
            have: in data coordinates (under a support: unconstrained) where a base is given,
            draws of N(0, I) otherwise. The columns of a data frame, here and below, are taken by
            the names of those of the data.
        base_samples: Samples of the base, shape ``(M, D)``, where no density of it is known: the
            flow then starts from them, transports and samples, and has no ``log_prob``. Without,
            a :class:`~pyro_interpolant.Mirror` starts from the data, drawn by weight where there
            are weights; with contexts, to which the data belong, it needs them.
        weights: Non-negative weights of the rows, shape ``(N,)``, or counts, or a mask; batches
            are drawn in their proportion, and rows of weight 0 count as absent.
        flip: Whether each image of a batch is mirrored left to right with a chance of one half,
            anew each time: for images whose mirror images are as likely. Images held out are left
            as they are.
        steps: The number of optimiser steps; by default N D / 6 for N training rows of D columns,
            2,000 at least and 6,000 at most.
        max_seconds: A limit of the time for steps, by default none. The schedule is one of steps,
            so a run that the limit cuts, ``stopped_by="time"``, has not come to its low rates:
            give fewer ``steps`` for a shorter run.
        batch_size: Rows per step and process; by default 1,024, or 64 images, or all training rows
            if fewer; of an iterable as many as its first batch has, but 64 at least. Above 64,
            rows come in whole multiples of it.
        accumulate: In how many pieces, up to 64, the gradient of a batch is computed one after the
            other: the step is that of the batch, and the memory that of a piece.
        learning_rate: The peak of the schedule.
        weight_decay: AdamW's, which shrinks all weights by this share of the learning rate at each
            step; by default (70 D / N)^2 for N training rows, at most 0.5; none for a network of
            images, or where no first pass counts an iterable's rows.
        validation: The share of rows held out, of an iterable up to 8,192, of images up to
            2^22 / D (256 if that is more), with all copies of each; which rows of a table, a mask
            of shape ``(N,)``; or rows of your own, shape ``(M, *event_shape)``; for a conditional
            flow ``(rows, contexts)``.
        patience: End, after 500 steps at the earliest, where the steps since the best look are
            more than this percentage of those up to it, and rows held out have got worse by both
            measures, in the mean of the later half of the looks since: their loss by 2% and by
            0.005 a column, their density by two standard errors of the difference, and by one at
            the last look. On a plateau a run goes on, for the falling rate improves it yet.
        ema: The decay of the moving average of the weights.
        coupling: Which draws of the base are paired with which rows of a batch, of classes among
            the rows of each label; see :mod:`~pyro_interpolant.interpolants.couplings`.
        learn: ``"velocity"``; or, once that is trained and the interpolant has a latent term,
            ``"noise"``: :math:`E[z \mid I_t]`, which gives :func:`~pyro_interpolant.score` for any
            base and coupling. Coupling or pairs are then to be those of the velocity's run.
        whiten: Whether to set the whitening map from the data, and to forget the noise that an
            earlier run learned; False keeps the present ones, to train on from weights that know
            them, but no noise of independent ends where ends are now paired, or the reverse; an
            untrained network takes its scales from the rows even so. The columns of a data frame
            are taken by the names that the flow was trained with, whose order stays; those of
            other names are for a new map alone, which forgets names where the data have none.
        tolerance: For :func:`~pyro_interpolant.calibrate`, nats; of images for
            :func:`~pyro_interpolant.diagnostics.calibrate_sampler`, standard deviations.
        seed: Makes the run reproducible: same seed, same weights, to the bit on one machine. The
            global generator is left as it was.
        progress: Whether to show a bar.
        callback: Called with a :class:`TrainingState` at each look, while the flow has the
            averaged weights that it is of; to stop the run it returns True.
        checkpoint: A file to keep the state of the run in. The same call resumes from it: with
            ``steps`` to bitwise the same weights, where ``seed`` alone gives them; an iterable, or
            its sampler, must have ``state_dict`` and ``load_state_dict`` for that.
        checkpoint_every: After how many steps it is written; by default at each look.
        fabric: A launched ``lightning_fabric.Fabric``: its device, precision and processes. A
            table, the same in all, is shared out; an iterable gives each process its own batches,
            and rows held out and the map are those of all.

    Returns:
        Both loss curves and what happened.

    Raises:
        TypeError: If the data are not of a floating type, or a function is not one.
        ValueError: If the data, the context or a setting cannot work, or processes have other
            tables, or another state to resume from; raised before any work.
        RuntimeError: If gradients stay non-finite; the last good weights are kept.
        KeyboardInterrupt: If one meets one of several processes; the best weights so far are kept.

    References:
        arXiv 2209.15571, Algorithm 1; Xu, Tong & Jaakkola, *Stable target field for reduced
        variance score estimation in diffusion models*, ICLR 2023 (means over rows).
    """
    clock, process = Clock(max_seconds), Process(fabric, own_rows=is_stream(data))
    schedule = Schedule(steps, learning_rate, weight_decay, patience, ema, accumulate)
    check_choices(learn, coupling, callback, tolerance, whiten, pairs)
    validation = as_held_out(validation)
    check_place(None if process.rank else checkpoint, checkpoint_every)
    at_random = coupling is independent and pairs is None
    flow = _started_flow(distribution, base_samples, learn, process, at_random=at_random)
    kind, anew = Stream if process.own_rows else Table, whiten and learn == "velocity"
    given = {"context": context, "pairs": pairs, "weights": weights}
    source = kind(distribution, data, validation, **given, flip=flip, anew=anew)
    process.check_same("table, by its checksum,", source.checksum, _SHARED_TABLE)
    with seeded(process.seed(seed)):
        # None: where states of earlier versions have a limit of time, which set the schedule then.
        asked = [steps, None, learning_rate, weight_decay, batch_size, patience, ema, learn]
        identity = [source.checksum, [*asked, seed, source.share, whiten, *["flip"] * flip]]
        if checkpoint is not None:  # it goes through all weights and samples
            identity += identity_of(flow, distribution.base, coupling, base_samples, validation)
        exact = source.exact and (process.world == 1 or not process.own_rows)
        state = open_checkpoint(checkpoint, checkpoint_every, identity, source.like, exact=exact)
        process.check_same("step to go on from", state and state.step, _SHARED_FILE)
        before = state if state is not None and state.tensors else None
        split = source.split(process, batch_size, state=before, progress=progress)
        with _restored_on_error(distribution):
            start_from(distribution, base_samples, split, source, process, anew=anew)
            seen, unseen = distribution.white_base().split(source.share or DEFAULT_SHARE)
            exponent = exponent_of(flow, seen, learn, before)
            aim = partial(Objective, target=learn, exponent=exponent, means=takes_means(before))
            density = HeldOutDensity(distribution, split) if learn == "velocity" else None
            if density is not None:
                choices = {"keep": not whiten, "at_random": at_random}
                prepare_flow(distribution, split.kept, before, process, **choices)
            objective = aim(flow, seen, coupling, process)
            objective.check_rows_apart(near := objective.without_outliers(split.held))
            fixed = objective.fixed_points(near, unseen, split.size)
            if density is not None:
                density.near = near
        source.names.give_to(distribution)
        with trainable(objective.network), _explained(source, objective):
            batches = source.batches(split, objective)
            run = Run(objective, batches, fixed, density, schedule, clock, callback, state)
            run.to_the_end(progress=progress)
    outcome = run.outcome()
    distribution.freeze()
    if density is not None:
        _finish(run, density, tolerance, progress=progress)
    return FitResult._make((*outcome, distribution.transform.solver, distribution.report))


def check_options(options: Mapping[str, Any], own: Collection[str] = (), why: str = "") -> None:
    """Raise an error unless options are some of :func:`fit`, and ones that can work.

    For what calls it after other work.

    Args:
        options: What was given, by name.
        own: The names of those that the caller sets itself.
        why: Why it does so, for the message.

    Raises:
        TypeError: If there is none of a name, or one that is to be called is not a function.
        ValueError: If the caller sets one itself, or a setting cannot work.
    """
    taken = sorted(options.keys() & own)
    if taken:
        raise ValueError(f"expected other options of fit than {', '.join(taken)}: {why}")
    known = {n: p for n, p in signature(fit).parameters.items() if p.kind is p.KEYWORD_ONLY}
    unknown = sorted(options.keys() - known.keys())
    if unknown:
        raise TypeError(f"expected options of fit, got {', '.join(unknown)}: see its arguments")
    given = {name: options.get(name, part.default) for name, part in known.items()}
    Clock(given["max_seconds"])
    Schedule(**{field.name: given[field.name] for field in dataclasses.fields(Schedule)})
    check_choices(*(given[name] for name in signature(check_choices).parameters))
    size = whole("batch_size", given["batch_size"], 1, or_none=True)
    check_ranges(size, flag("flip", given["flip"]))
    as_held_out(given["validation"])
    place = None if Process(given["fabric"]).rank else given["checkpoint"]
    check_place(place, given["checkpoint_every"])


@contextlib.contextmanager
def _restored_on_error(distribution: AnyDistribution) -> Iterator[None]:
    """If the block raises, undo what it changed in the flow and its distribution."""
    flow, base, report = distribution.transform.flow, distribution.base, distribution.report
    before = flow.independent, flow.reached, flow.noise, flow.levels
    buffers = {name: value.clone() for name, value in flow.named_buffers()}
    try:
        yield
    except BaseException:
        flow.independent, flow.reached, flow.noise, flow.levels = before
        distribution.report = report
        for name, value in flow.named_buffers():
            value.copy_(buffers[name])
        distribution.set_base(base)
        raise


@contextlib.contextmanager
def _explained(source: Table | Stream, objective: Objective) -> Iterator[None]:
    """Add to the error of a run without finite gradients which rows of a table lie far out.

    No error leaves a flow with a network of the noise that has learned nothing: its score would be
    zero.
    """
    try:
        yield
    except BaseException as error:
        if objective.target == "noise" and is_untrained(objective.network):
            objective.flow.noise = None
        if not isinstance(error, NonFiniteError):
            raise
        where = wild_rows(objective.whitened(source.rows).w) if isinstance(source, Table) else ""
        raise NonFiniteError(f"{error}{where}") from error


def trainable_flow(distribution: AnyDistribution) -> Flow:
    """Return the flow that a distribution owns, or say why it cannot be trained.

    Raises:
        TypeError: If it is no distribution of a flow, or its type is too coarse.
        ValueError: If it does not own its weights, its base has a batch, or its path does not
            join base and data.
    """
    transform = getattr(distribution, "transform", None)
    if not isinstance(transform, InterpolantTransform | ConditionalInterpolantTransform):
        raise TypeError(
            "expected an InterpolantDistribution or a ConditionalInterpolantDistribution, got "
            f"{type(distribution).__name__}"
        )
    if not transform.owns_flow() or isinstance(transform.velocity, Guided):
        raise ValueError(
            "expected a flow that owns its weights, got a conditioned or guided one, or one "
            "stopped by at(t): fit the distribution it came from"
        )
    distribution.check_single_base(rows=True)
    transform.flow.interpolant.check_ends(transform.flow.event_dim)
    loc = transform.flow.loc
    if torch.finfo(loc.dtype).bits < 32:
        raise TypeError(
            f"expected a flow in float32 or float64, got {loc.dtype}, of too few bits to train: "
            "distribution.to(torch.float32), or from_samples(torch.as_tensor(x).float())"
        )
    if any(p.is_inference() for p in transform.flow.state_dict(keep_vars=True).values()):
        raise ValueError(
            "expected a flow made outside torch.inference_mode(), whose weights can change, got "
            "one made inside it"
        )
    return transform.flow


def _started_flow(
    distribution: AnyDistribution,
    base_samples: ArrayLike | None,
    learn: str,
    process: Process,
    *,
    at_random: bool,
) -> Flow:
    """Return the flow to train, moved to the device of its process.

    Raises:
        ValueError: If it is a mirror with contexts and without a base: it starts from the data,
            each row of which belongs to its own context; or if there is no noise to learn, or
            its paths are not those that the velocity was trained on.
    """
    flow = trainable_flow(distribution)
    if learn == "noise" and not flow.interpolant.has_latent():
        raise ValueError(
            "expected an interpolant with a latent term to learn the noise, got "
            f"{type(flow.interpolant).__name__}: use Latent(...), or score(), which needs no "
            "network for a Gaussian base"
        )
    if learn == "noise" and at_random != flow.independent:
        # The marginals between the ends hang on the pairs, and so do noise and score.
        kinds = ("paired by a coupling or by pairs=", "independent")
        raise ValueError(
            "expected the noise of the paths that the velocity was trained on, whose ends were "
            f"{kinds[flow.independent]}, got ends that are {kinds[at_random]}: pass the coupling "
            "or the pairs of that run"
        )
    conditional = isinstance(distribution, ConditionalInterpolantDistribution)
    given = base_samples is not None or distribution.base is not None
    if conditional and flow.interpolant.starts_from_data() and not given:
        raise ValueError(
            "expected base_samples or a base for a conditional flow with a Mirror, got neither: "
            "it starts from the data of its context, and a base is the same for all contexts. "
            "Pass samples that are good for every context, fit a flow for each class, or take a "
            "path from noise, such as Latent(Linear())"
        )
    if process.device is not None:
        distribution.to(process.device)
    return flow


def _finish(run: Run, density: HeldOutDensity, tolerance: float, *, progress: bool) -> None:
    """Calibrate the solver to held-out rows, measure, compare draws; or be interrupted.

    What fails on one of several processes does so before they agree on what the first has found.

    Args:
        run: The run, whose process and time these are.
        density: What was trained, and the rows held out.
        tolerance: Of the calibration, nats.
        progress: Whether to show what is being done, and the report.
    """
    process = run.process
    distribution, progress = density.distribution, progress and process.rank == 0
    taken = run.seconds(), run.monitor.selection.kept_step, run.descent.steps
    report = Report(distribution.transform.flow.event_dim, density.split.rows, *taken)
    distribution.report = report
    few = density.near.evenly(_CALIBRATION_ROWS)
    rows, given = few.w.to(distribution.transform.flow.loc), few.context
    bare, transform = distribution.without_support(), distribution.transform
    images = is_image(distribution.row_shape)
    found: tuple[Solver, float | None] = transform.solver, None
    try:
        if images:
            context = None if given is None else given[:_CALIBRATION_IMAGES]
            with attempted("calibrating the sampler", progress=progress):
                run.monitor.objective.check_rows_apart(few)
                found = sampler_calibrated(distribution, context=context, tolerance=tolerance)
            transform.solver, error = process.agreed(found)
            report = dataclasses.replace(report, sample_error=error)
        elif distribution.has_density():
            with attempted("calibrating the solver", progress=progress):
                run.monitor.objective.check_rows_apart(few)  # that started at zero
                found = calibrated(bare, rows, context=given, tolerance=tolerance)
            transform.solver, error = process.agreed(found)
            report = dataclasses.replace(report, log_prob_error=error)
            with attempted("evaluating held-out rows", progress=progress):
                report = density.measured(report)
            report = process.agreed(report)
        distribution.report = report
        if progress:
            tell(repr(report))
        if process.rank == 0 and not images:
            with attempted("comparing draws", progress=False):
                held, kept = density.split[:2]
                warn_if_draws_differ(distribution, held, kept)
    except KeyboardInterrupt:
        if process.world > 1:  # no other process may be where this one is
            raise
        warn_user(
            "the calibration was interrupted: the weights are trained, and the solver may be the "
            "one before. Call calibrate(distribution, rows)"
        )
