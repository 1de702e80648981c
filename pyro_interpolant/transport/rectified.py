r"""Straighter paths: reflow, training on the flow's own pairs."""

import copy
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributions import ComposeTransform

from .._package import check_ranges, whole
from .._torch import seeded, with_gradients
from ..diagnostics.calibration import calibrate
from ..distributions.interpolant import AnyDistribution
from ..distributions.rows import as_tensor, contexts_of_rows
from ..interpolants.linear import Interpolant, Linear
from ..solvers.ode import FixedGrid
from ..training.data import rows_of
from ..training.fitting import FitResult, check_options, fit, trainable_flow
from ..training.image_rows import IMAGE_OPTIONS, is_image
from ..training.options import check_repeatable

_COMPARED_ROWS, _COMPARED_IMAGES = 256, 8  # whose paths are compared
_FINE_STEPS = 128  # of what they are compared with


class PathReport(NamedTuple):
    """How straight a flow's paths are, to a solver.

    Attributes:
        sampling_errors: By number of steps, 1 and 2, the mean distance in whitened units between
            a sample and the converged one from the same base draw.
        density_steps: The fewest steps at which log_prob meets the tolerance; None of images,
            whose exact densities take too long, and where the base has none, samples alone.
    """

    sampling_errors: dict[int, float]
    density_steps: int | None

    def __repr__(self) -> str:
        """Say it in a line."""
        errors = (f"{error:.2g} in {steps}" for steps, error in self.sampling_errors.items())
        densities = "" if self.density_steps is None else f"; densities in {self.density_steps}"
        return f"samples within {', '.join(errors)} steps{densities}"


class ReflowResult(NamedTuple):
    """A flow with straighter paths, and what that gave.

    Attributes:
        distribution: The new flow; the old one is as it was.
        before: The paths of the old flow.
        after: The paths of the new one.
        fit: The training.
    """

    distribution: AnyDistribution
    before: PathReport
    after: PathReport
    fit: FitResult

    def __repr__(self) -> str:
        """Say how straight the paths were and are, and what the training did."""
        return f"before: {self.before}\nafter: {self.after}\n{self.fit}"


@with_gradients()
def reflow(
    distribution: AnyDistribution,
    *,
    count: int = 50_000,
    context: ArrayLike | None = None,
    interpolant: Interpolant | None = None,
    tolerance: float = 1e-2,
    seed: int | None = None,
    **fit_options: Any,
) -> ReflowResult:
    """Straighten a flow's paths: train a copy on the pairs that the flow itself makes.

    Pairs of a flow do not cross, so a straight interpolant between them keeps the marginals and
    bends less: one or two steps already sample well. The rate of the log-determinant along a
    straight path is not constant: densities gain less.

    Args:
        distribution: A trained flow.
        count: The number of pairs to draw; with contexts one is drawn for each of them.
        context: Contexts, shape ``(N, C)``, for a conditional flow.
        interpolant: The path between the pairs; by default straight, of angles along geodesics.
        tolerance: Of the density, nats, for the report and the calibration; of images of samples,
            standard deviations.
        seed: As in :func:`~pyro_interpolant.fit`.
        **fit_options: For :func:`~pyro_interpolant.fit`; of images the learning rate is 0.003,
            where none is given.

    Returns:
        The new flow, and steps and errors before and after.

    Raises:
        TypeError: If options are none of ``fit``.
        ValueError: If the flow is conditional and there are not contexts of shape ``(N, C)``,
            ``count`` is below 1, it is a batch of flows, a path from the data has none to start
            from, the flow's type has no numbers for some of its draws, there is a checkpoint
            without a seed, or options of ``fit`` cannot work, or are those that are set here:
            ``pairs``, ``coupling``, ``base_samples``, ``whiten`` and ``learn``.

    References:
        Liu, Gong & Liu, *Flow straight and fast*, ICLR 2023; arXiv 2209.15571, Section 2.3.
    """
    old, contexts = trainable_flow(distribution), None
    distribution.check_start()
    if context is not None:
        names, rows = distribution.context_columns, as_tensor(context, "context")
        contexts = contexts_of_rows(context, old, names, len(rows))
    check_ranges(whole("count", count, 1))
    check_options(
        {**fit_options, "tolerance": tolerance},
        {"pairs", "coupling", "base_samples", "whiten", "learn"},
        "pairs are what the flow makes, in the whitened coordinates that it has, and its velocity "
        "is trained; fit(copy, data, ...) trains on yours",
    )
    check_repeatable(seed, fit_options.get("checkpoint"))
    new = copy.deepcopy(distribution)
    flow = new.transform.flow
    straight = new.space.default_path() or Linear()
    flow.interpolant = straight if interpolant is None else interpolant
    flow.noise = None  # of the path before
    new.transform.solver = FixedGrid()
    with seeded(seed), torch.no_grad():
        shape = (int(count),) if contexts is None else ()
        view = distribution.given(contexts)
        if shape and view.batch_shape:
            raise ValueError(f"expected one flow, got a batch of shape {tuple(view.batch_shape)}")
        base = view.base_dist.sample(shape)  # in the coordinates that fit takes pairs in
        data = ComposeTransform(view.transforms)(base)
    _check_draws(new, data, contexts)
    images = is_image(new.row_shape)
    fit_options = {**(IMAGE_OPTIONS if images else {}), **fit_options}
    outcome = fit(
        new, data, context=contexts, pairs=base, seed=seed, tolerance=tolerance, whiten=False,
        **fit_options,
    )  # fmt: skip
    flow.levels = distribution.transform.flow.levels  # whose spread images its own are
    few = slice(0, _COMPARED_IMAGES if images else _COMPARED_ROWS)
    compared = data[few], None if contexts is None else contexts[few]
    return ReflowResult(
        new,
        _report(distribution, base[few], *compared, tolerance),
        _report(new, base[few], *compared, tolerance),
        outcome,
    )


def _check_draws(distribution: AnyDistribution, x: Tensor, context: Tensor | None) -> None:
    """Raise a ValueError where draws, shape ``(N, *event_shape)``, are no rows to train on."""
    try:
        rows_of(distribution, x, context)
    except ValueError as error:
        raise ValueError(
            f"expected a flow whose type, {x.dtype}, has numbers for its draws, got "
            f"{int((~x.isfinite()).sum())} infinite ones, or some on the edge of the support: "
            "take distribution.to(torch.float64)"
        ) from error


def _report(
    distribution: AnyDistribution,
    base: Tensor,
    data: Tensor,
    context: Tensor | None,
    tolerance: float,
) -> PathReport:
    copied, steps = copy.deepcopy(distribution), None
    if not is_image(copied.row_shape) and copied.has_density():
        steps = calibrate(copied, data, context=context, tolerance=tolerance).steps
    view = copied.given(context)
    flow = view.transform.flow
    w0 = view.white_base().to_white(base)
    ends = {}
    with torch.no_grad():
        for n in (1, 2, _FINE_STEPS):
            path = replace(view.transform.path(), solver=FixedGrid(steps=n))
            ends[n] = flow.integrate(w0, path, forward=True)[-1]
    errors = {n: float((ends[n] - ends[_FINE_STEPS]).norm(dim=-1).mean()) for n in (1, 2)}
    return PathReport(errors, steps)
