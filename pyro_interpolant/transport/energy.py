r"""The kinetic energy of a flow's paths, and a bound of the distance between model and data.

The energy :math:`\int_0^1 E|v_t(x_t)|^2 dt` bounds :math:`W_2^2` of base and model from above; the
excess H of the regression's loss over its minimum bounds that of model and data by
:math:`e^{1 + 2K} H`, with K the velocity's Lipschitz constant.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import jacfwd, vmap

from .._package import check_ranges, number, whole
from .._torch import forward_mode, seeded
from ..distributions.interpolant import AnyDistribution, rows_given
from ..distributions.report import with_error
from ..nn.elementary import Elementary
from ..nn.velocity import evaluate
from ..solvers.ode import FixedGrid
from ..transforms.flow import Flow
from ..transforms.gaussianize import refuse_gaussianized

_PATHS_PER_CHUNK = 512
_LEAST_STEPS = 48  # a bridge's energy is then within 0.01%, on a calibrated grid of 9 within 1.5%
_JACOBIAN_ROWS = 512  # over which the largest norm of the velocity's Jacobian is taken


class PathEnergy(NamedTuple):
    r"""The kinetic energy of a flow's paths, :math:`\int E|v_t(x_t)|^2 dt`, data units squared.

    Attributes:
        value: The mean over paths.
        stderr: Its standard error.
    """

    value: float
    stderr: float

    def __repr__(self) -> str:
        """Say it with its error."""
        return f"path energy {with_error(self.value, self.stderr)}"


class W2Bound(NamedTuple):
    r"""An upper bound of :math:`W_2^2` between the flow's law and the data's.

    Attributes:
        bound: :math:`e^{1 + 2K} H`, data units squared.
        excess: H, or an upper bound of it.
        lipschitz: K, the largest spectral norm of the velocity's Jacobian seen on the draws: the
            supremum that the theorem asks for can be larger.
        exact: Whether ``excess`` is H itself, the minimum being known, up to sampling; else it
            contains the variance that no velocity can explain, and the bound is loose.
        excess_stderr: The standard error of ``excess``, of the rows, times and base draws. Where
            that is not small beside it, ``bound`` may be too low by the same factor: it is zero
            for an excess that came out negative.
    """

    bound: float
    excess: float
    lipschitz: float
    exact: bool
    excess_stderr: float = math.nan

    def __repr__(self) -> str:
        """Say the bound, and what it is made of, with the error that sampling leaves."""
        kind = "" if self.exact else "at most "
        return (
            f"W2^2 at most {self.bound:.3g} ± {_growth(self.lipschitz) * self.excess_stderr:.2g}: "
            f"excess {kind}{self.excess:.3g} ± {self.excess_stderr:.2g}, Lipschitz constant "
            f"{self.lipschitz:.3g}"
        )


def path_energy(
    distribution: AnyDistribution, *, count: int = 4096, context: Tensor | None = None
) -> PathEnergy:
    r"""Return the kinetic energy of a flow's paths, :math:`\int_0^1 E|v_t(x_t)|^2\,dt`.

    It bounds the squared Wasserstein distance between base and model from above. Norms are those
    of data coordinates, :math:`|L u|` (under a support: unconstrained). A
    :class:`~pyro_interpolant.FixedGrid` is taken with 48 steps or more, for one that is calibrated
    has few, which suffice for densities; another solver as it is.

    Args:
        distribution: A flow; paths start from its base.
        count: The number of paths.
        context: One context, shape ``(C,)``, or one per path, shape ``(count, C)``, for a
            conditional flow.

    Raises:
        ValueError: If ``count`` is below 2, a context is missing, there are others than one or
            ``count``, or the flow is behind a map of :func:`from_samples`.

    References:
        arXiv 2209.15571, eq. 12.
    """
    check_ranges(whole("count", count, 2))
    count = int(count)
    refuse_gaussianized(distribution.constraint, "distance")
    distribution.check_single_base()
    given = distribution.given(context)
    given.check_start()
    if tuple(given.batch_shape) not in ((), (1,), (count,)):
        raise ValueError(
            f"expected one context, or one for each of {count:,} paths, got a batch of shape "
            f"{tuple(given.batch_shape)}: the energy is a mean over paths"
        )
    flow = given.transform.flow
    with torch.no_grad():
        path = given.transform.path()
        if isinstance(path.solver, FixedGrid):
            steps = max(path.solver.steps, _LEAST_STEPS)
            path = replace(path, solver=replace(path.solver, steps=steps))
        times, weights = (s.to(flow.loc) for s in path.times)
        w0 = given.white_base().sample((count,))
        energies = []
        for i in range(0, count, _PATHS_PER_CHUNK):
            own, chunk = path.context, slice(i, i + _PATHS_PER_CHUNK)
            if own is not None and own.dim() > 1:
                own = own[chunk]
            states = flow.integrate(w0[chunk], replace(path, context=own), forward=True)
            total = torch.zeros_like(states[0, :, 0], dtype=torch.float64)
            for t, w, x in zip(times, weights, states, strict=True):
                # In float32 squares of 1e20 are infinite, and of 1e-25 zero.
                v = flow.whitening.push(evaluate(flow.velocity, t, x, own)).double()
                total = total + w * v.square().sum(-1)
            energies.append(total)
        energy = torch.cat(energies)
    return PathEnergy(float(energy.mean()), float(energy.std()) / math.sqrt(count))


def w2_bound(
    distribution: AnyDistribution,
    data: Tensor,
    *,
    minimum: float | None = None,
    context: Tensor | None = None,
    seed: int = 0,
) -> W2Bound:
    r"""Bound the Wasserstein distance of the flow's law to the data's by the regression's excess.

    .. math:: W_2^2(\rho_1, \hat\rho_1) \le e^{1 + 2K} H, \qquad
              H = G(\hat v) - \min_v G(v) = \int_0^1 E|\hat v_t - v_t|^2 dt,

    with K the Lipschitz constant of :math:`\hat v`. Without the minimum,
    :math:`H \le \int E|\hat v_t(I_t) - \partial_t I_t|^2 dt` is used, which is far larger.
    Base draws are paired with rows at random, whatever pairs the flow was trained on: for others
    the bound holds, and is loose.

    Args:
        distribution: A flow.
        data: Rows, shape ``(N, *event_shape)``, better not those it was trained on.
        minimum: :math:`\min_v G(v)` of random pairs, minus the energy of the interpolant's own
            velocity, in data units squared, where it is known.
        context: Contexts, shape ``(N, C)``, or one, for a conditional flow.
        seed: Of the times and base draws.

    Raises:
        TypeError: If rows are not of a floating type: images of whole levels are not what was
            learned, which is spread over them.
        ValueError: If rows are of another shape or type, not finite or outside the support, there
            are none, or others than their contexts, a context is missing, the minimum is no finite
            number, or the flow is behind a map of :func:`from_samples`, stopped by ``at(t)``, from
            a base with a batch, or a mirror that was not fitted.

    References:
        arXiv 2209.15571, Proposition 3.
    """
    check_ranges(number("a finite minimum, or None", minimum, math.isfinite, or_none=True))
    refuse_gaussianized(distribution.constraint, "distance")
    distribution.check_single_base(rows=True)
    distribution.check_start()
    given, rows = rows_given(distribution, data, context)
    if given.transform.end != 1:
        raise ValueError(
            "expected a flow that ends at the data, t = 1, got one stopped at t = "
            f"{given.transform.end:g}: pass the distribution it came from"
        )
    flow, context = given.transform.flow, given.transform.context
    if context is not None and context.dim() > 1:
        context = context.expand(len(rows), -1)
    with torch.no_grad(), seeded(seed):
        w1 = flow.whitening.to_white(given.to_flow(rows))
        w0 = given.white_base().sample(w1.shape[:1])
        w0 = w0[torch.randperm(len(w0))]  # rows may be made of the same seed's draws, in order
        t = (torch.arange(len(w1)) + torch.rand(len(w1))).to(w1) / len(w1)
        t = t[torch.randperm(len(t))]
        w_t, dw_t = flow.interpolant.sample(t, w0, w1)
        v = flow.whitening.push(evaluate(flow.velocity, t, w_t, context)).double()
        target = flow.whitening.push(dw_t).double()
        each = ((v - target).square() if minimum is None else v * (v - 2 * target)).sum(-1)
        excess = float(each.mean()) - (minimum or 0.0)
        error = float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        lipschitz = _lipschitz(flow, t[:_JACOBIAN_ROWS], w_t[:_JACOBIAN_ROWS], context)
    growth = _growth(lipschitz)
    bound = growth * max(excess, 0.0) if growth < math.inf else math.inf
    return W2Bound(bound, excess, lipschitz, minimum is not None, error)


def _growth(lipschitz: float) -> float:
    """Return what the excess is multiplied by, infinite where that is beyond all numbers."""
    return math.exp(1 + 2 * lipschitz) if lipschitz < 300 else math.inf


def _lipschitz(flow: Flow, t: Tensor, w: Tensor, context: Tensor | None) -> float:
    """Return the largest spectral norm of the Jacobian in data coordinates over some rows."""

    def field(w: Tensor, t: Tensor, c: Tensor | None) -> Tensor:
        return evaluate(flow.velocity, t, w, c)

    of_context = None  # the dimension of rows, where each has a context of its own
    if context is not None and context.dim() > 1:
        context, of_context = context[: len(t)], 0
    with forward_mode(), Elementary():
        jacobian = vmap(jacfwd(field), in_dims=(0, 0, of_context))(w, t, context)
    jacobian = flow.whitening.pull(flow.whitening.push(jacobian.mT).mT)
    return float(torch.linalg.matrix_norm(jacobian, ord=2).max())
