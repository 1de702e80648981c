r"""Metropolis-Hastings moves whose proposal is the flow q: accepted by the ratio of w = p / q.

No gradient is taken, of the target or through the solver.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ...diagnostics.psis import finite_or_minus_inf
from ...distributions.interpolant import InterpolantDistribution
from ...solvers.ode import FixedGrid
from .tempering import LogDensity, Particles

_GRID_STEPS = (6, 8, 12, 16, 24, 32, 48)  # that are tried
_MAX_SOLVER_ERROR = 0.03  # nats, mean, within a round
_ERROR_ROWS = 64  # on which it is measured
_INDEPENDENT_SHARE = 0.6  # of the particles, which jump to independent draws
_JUMP_DECADES = 1.3  # how far below 1 the size s of the other jumps goes


class Jump(NamedTuple):
    r"""The result of one proposal of the flow to each particle.

    Attributes:
        particles: Where the particles are now.
        log_weights: Of the independent draws, :math:`\log p - \log q`, shape ``(M,)``.
        gap: The mean of :math:`\log p - \log q` over the particles before they jumped: the
            divergence :math:`KL(p \| q)` plus the log-evidence.
        acceptance: The mean acceptance of the independent draws.
    """

    particles: Particles
    log_weights: Tensor
    gap: float
    acceptance: float


def flow_proposal_step(
    distribution: InterpolantDistribution, particles: Particles, density: LogDensity
) -> Jump:
    r"""Propose a new place to each particle by the flow; accept by Metropolis-Hastings.

    With z the base point of x, :math:`z' = \sqrt{1 - s^2} z + s \xi`, :math:`\xi \sim N(0, I)`
    leaves the base, and so x' = f(z') the flow, as it is: for every s the jump is accepted with
    probability :math:`\min(1, w(x') / w(x))`, w = p / q. At s = 1, for most particles, x' is an
    independent draw; the others keep part of the geometry that the flow has learned.

    Args:
        distribution: The flow, from its default base.
        particles: Particles of the target, N of them.
        density: The target.

    References:
        Cotter, Roberts, Stuart & White, *MCMC methods for functions*, Statistical Science 28,
        2013, eq. 4.7; Gabrie, Rotskoff & Vanden-Eijnden, *Adaptive Monte Carlo augmented with
        normalizing flows*, PNAS 119, 2022, arXiv 2105.12603.
    """
    transform, x = distribution.transform, particles.x
    log_q, z = distribution.log_prob(x), transform.inv(x)
    whole = torch.rand(len(x), 1).to(x) < _INDEPENDENT_SHARE
    whole[0] = True
    size = torch.where(whole, 1.0, 10.0 ** (-_JUMP_DECADES * torch.rand(len(x), 1).to(x)))
    new_x = transform((1 - size**2).sqrt() * z + size * torch.randn_like(z))
    new = density.particles(new_x)
    log_weights = finite_or_minus_inf(new.log_p - distribution.log_prob(new_x))
    ratio = log_weights - (particles.log_p - log_q)
    accepted = torch.rand(len(x)).to(ratio).log() < ratio
    gap = float((particles.log_p - log_q).double().mean())
    chosen = whole[:, 0]
    rate = float(accepted[chosen].double().mean())
    return Jump(new.where(accepted, particles), log_weights[chosen], gap, rate)


def coarse_solver(distribution: InterpolantDistribution, x: Tensor) -> None:
    """Set the coarsest grid on which densities hardly change at the next finer one.

    A solver that is no fixed grid is left alone.

    Args:
        distribution: The flow.
        x: Rows, shape ``(N, D)``, on some of which densities are compared.
    """
    present = distribution.transform.solver
    if not isinstance(present, FixedGrid):
        return
    x = x[torch.randperm(len(x))[:_ERROR_ROWS].to(x.device)]
    last, chosen = None, _GRID_STEPS[0]
    for steps in _GRID_STEPS:
        distribution.transform.solver = replace(present, steps=steps)
        value = distribution.log_prob(x)
        if last is not None and float((value - last).abs().mean()) < _MAX_SOLVER_ERROR:
            break
        last, chosen = value, steps
    distribution.transform.solver = replace(present, steps=chosen)
