r"""Training from an unnormalised log-density alone, with no gradient through an ODE.

First particles: from a wide start and what Newton's method finds, tempered to the target. Then
rounds: regress the flow on the particles, let each particle jump to where the flow sends it or
another draw, accepted by Metropolis's rule with the weights p / q, move them by the gradient of the
target, and regress again. The flow makes jumps between modes; the gradient, of the target alone,
makes what the flow has not learned yet.
"""

import copy
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .diagnostics import calibrate
from .distributions import InterpolantDistribution
from .moves import Density, Kernel, Particles, annealed
from .objective import Objective, Rows
from .preparation import own_flow, precondition
from .monitors import Average, Clip
from .psis import effective_sample_size, log_mean_weight, pareto_smooth
from .search import Mixture, search
from .solvers import FixedGrid
from .training import seeded, trainable
from .couplings import independent

__all__ = ["Round", "RoundsResult", "train_from_density"]

_WIDE = 4.0  # the scale of the default start
_SEARCH, _ANNEAL, _CHECK = 0.07, 0.25, 0.06  # shares of the time
_CONSTANT = 0.4  # of the training, before the rate falls
_RATE = 2e-3
_EMA = 0.999
_POOL = 8  # rounds whose particles are kept
_BATCH = 1024
_GRIDS = (6, 8, 12, 16, 24, 32, 48)
_GRID_ERROR = 0.03  # nats


class Round(NamedTuple):
    r"""What one round saw.

    Attributes:
        temper: The exponent b of the path :math:`p^b q_0^{1-b}`; 1 for the target.
        acceptance: The mean acceptance of the Metropolis moves.
        ess: The effective share of the draws, between 0 and 1.
        k_hat: Pareto's k-hat of the weights of the draws.
        log_evidence: The log of the mean weight.
        seconds: The time since the start.
    """

    temper: float
    acceptance: float
    ess: float
    k_hat: float
    log_evidence: float
    seconds: float


class RoundsResult(NamedTuple):
    r"""What training from a density did, judged on fresh draws of the flow that was kept.

    Attributes:
        k_hat: Pareto's k-hat of the weights p / q: above 0.7 the flow misses part of the tail.
        ess: The effective sample size of ``draws`` fresh draws.
        log_evidence: :math:`\log \int p`, an estimate.
        log_evidence_stderr: Its standard error; too small where k-hat is large.
        draws: The number of fresh draws these come from.
        rounds: The history.
        best_round: The index of the round whose flow was kept.
        seconds: The duration.
        solver: The calibrated solver that was set.
    """

    k_hat: float
    ess: float
    log_evidence: float
    log_evidence_stderr: float
    draws: int
    rounds: list[Round]
    best_round: int
    seconds: float
    solver: FixedGrid


class _Trainer:
    """The regression, with its optimiser kept from round to round."""

    def __init__(self, flow, rows):
        self.flow = flow
        self.objective = Objective(flow, None, independent, _BATCH)
        self.parameters = list(flow.velocity.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=_RATE, betas=(0.9, 0.99), fused=True)
        self.average = Average(self.parameters, _EMA)
        self.clip = Clip(self.parameters)
        self.pool = [rows]
        self.step = 0

    def add(self, rows):
        self.pool = [*self.pool[-_POOL + 1 :], rows]

    def run(self, steps, rate):
        x = torch.cat(self.pool)
        rows = self.objective.prepared(Rows(x, None))
        total = 0.0
        for i in range(steps):
            self.step += 1
            self.optimizer.param_groups[0]["lr"] = rate() * min(1.0, self.step / 100)
            index = torch.randint(len(x), (min(_BATCH, len(x)),))
            loss = self.objective.loss(self.objective.draw(rows.take(index)))
            self.optimizer.zero_grad()
            loss.backward()
            if self.clip():
                self.optimizer.step()
                self.average.update(self.step)


def _base_log_prob(z):
    return -0.5 * z.square().sum(-1) - 0.5 * z.shape[-1] * math.log(2 * math.pi)


def _grid(distribution, x):
    transform = distribution.transform
    last = None
    for steps in _GRIDS:
        transform.solver = FixedGrid(steps)
        value = distribution.log_prob(x)
        if last is not None and float((value - last).abs().mean()) < _GRID_ERROR:
            break
        last = value
    # the coarser of the last two was good enough
    i = max(0, _GRIDS.index(steps) - 1)
    transform.solver = FixedGrid(_GRIDS[i])


def train_from_density(distribution, log_density, *, start=None, max_seconds=120.0, draws=4000, steps=800, rounds=None, seed=None, progress=True, verbose=None):
    flow = own_flow(distribution)
    transform = distribution.transform
    began = time.monotonic()
    density = Density(log_density)
    spent = lambda: time.monotonic() - began
    with seeded(seed, flow.loc.device), torch.no_grad():
        eye = torch.eye(flow.dim).to(flow.loc)
        wide = Mixture.of(torch.ones(1).to(eye), torch.zeros_like(eye[:1]), _WIDE * eye[None])
        q0 = search(density, wide, seconds=_SEARCH * max_seconds)
        t_search = spent()
        count = int(max(500, min(draws, 0.2 * max_seconds / (40 * density.seconds))))
        kernel = Kernel()
        levels = []
        particles, evidence = annealed(q0.sample(count), density, q0.with_gradient, kernel,
            deadline=began + _ANNEAL * max_seconds, look=lambda b, rate, e, x: levels.append((b, rate)))
        if verbose: verbose(f"search {t_search:.1f}s K={len(q0.loc)} anneal {spent():.1f}s n={count} levels {len(levels)} evidence {evidence:.3f} rows {density.rows} {density.seconds*count:.3f}s")
        pool = [particles.x]
        until = time.monotonic() + 0.05 * max_seconds
        kernel.adapt_metric(particles.x)
        for i in range(30):
            particles, rate = kernel(particles, density.with_gradient)
            if i % 5 == 4: pool.append(particles.x)
            if time.monotonic() > until: break
        precondition(flow, distribution, Rows(particles.x, None))
        trainer = _Trainer(flow, torch.cat(pool))
        trainer.pool = pool[-_POOL:]
        first = spent()
        end = (1 - _CHECK) * max_seconds
        history = []

        def rate():
            done = (spent() - first) / (end - first)
            if rounds is not None: done = max(done, (len(history)) / rounds)
            late = max(0.0, (done - _CONSTANT) / (1 - _CONSTANT))
            return _RATE * 0.5 * (1 + math.cos(math.pi * min(1.0, late)))

        best, kept, best_round = math.inf, None, 0
        with trainable(flow.velocity):
            while spent() < end and (rounds is None or len(history) < rounds):
                t0 = time.monotonic()
                with torch.enable_grad():
                    trainer.run(steps, rate)
                t1 = time.monotonic()
                with trainer.average.applied():
                    transform.clear_cache()
                    n = len(particles.x)
                    _grid(distribution, particles.x[torch.randperm(n)[:64]])
                    z = transform.inv(particles.x)
                    log_q = _base_log_prob(z) - transform.log_abs_det_jacobian(z, particles.x)
                    gap = float((particles.log_p - log_q).double().mean())
                    if gap < best:
                        best, best_round = gap, len(history)
                        kept = [p.detach().clone() for p in trainer.parameters]
                    whole = torch.rand(n, 1).to(z) < 0.6
                    size = torch.where(whole, 1.0, 10 ** (-1.3 * torch.rand(n, 1).to(z)))
                    new_z = (1 - size**2).sqrt() * z + size * torch.randn_like(z)
                    new_x = transform(new_z)
                    new_q = _base_log_prob(new_z) - transform.log_abs_det_jacobian(new_z, new_x)
                t2 = time.monotonic()
                new = Particles.at(new_x, density.with_gradient)
                ratio = (new.log_p - new_q) - (particles.log_p - log_q)
                accept = torch.rand(n).to(ratio).log() < ratio
                particles = new.where(accept, particles)
                fresh = (new.log_p - new_q)[whole[:, 0]]
                k_hat = pareto_smooth(fresh).k_hat
                z_hat, err = log_mean_weight(fresh)
                kernel.adapt_metric(particles.x)
                rates, moves = [], 0
                while moves < 3 or (time.monotonic() - t2 < 0.5 * (t2 - t1) and moves < 20):
                    particles, r = kernel(particles, density.with_gradient)
                    rates.append(r); moves += 1
                trainer.add(particles.x)
                history.append(Round(1.0, sum(rates)/len(rates), effective_sample_size(fresh)/len(fresh), k_hat, z_hat, spent()))
                if verbose:
                    verbose(f"{spent():6.1f}s train {t1-t0:.1f} flow {t2-t1:.1f} moves {time.monotonic()-t2:.1f}({moves}) grid {transform.solver.steps} lr {rate():.1e} "
                      f"k {k_hat:.2f} ess {history[-1].ess:.2f} logZ {z_hat:.3f}+-{err:.3f} kl {gap - z_hat + 2*0:.4f} gap {gap:.4f} acc1 {float(accept[whole[:,0]].double().mean()):.2f} accp {float(accept[~whole[:,0]].double().mean()):.2f} hmc {history[-1].acceptance:.2f} step {kernel.step:.2f}", particles.x)
        with torch.no_grad():
            for p, v in zip(trainer.parameters, kept): p.copy_(v)
        distribution.clear_cache()
        solver = calibrate(distribution, particles.x[torch.randperm(len(particles.x))[:128]])
        x, log_q = distribution.rsample_and_log_prob((10000,))
        w = density(x) - log_q
        z_hat, err = log_mean_weight(w)
        return RoundsResult(pareto_smooth(w).k_hat, effective_sample_size(w), z_hat, err, len(x), history, best_round, spent(), solver), particles
