"""The child of ``density_cost.py``: one peer, in a process of its own, asked over pipes.

Every continuous peer integrates the velocity that we trained, in whitened coordinates. A peer is
imported in its own class only: zuko, on import, switches off torch's validation for all.
"""

import json
import math
import os
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.distributions import Independent, Normal

import pyro_interpolant as pi

_TOLERANCE = 1e-2  # nats
_TOLERANCES = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
_STEPS = (10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320, 448, 640, 896, 1280)
_TRAINING_ROWS = 20_000
_TIMES = 64  # distinct times in a training batch, as in ``fit``
_PROBES = 8  # draws of the probe for its standard deviation


def _means(dim):
    return torch.randn(12, dim, generator=torch.Generator().manual_seed(dim))


def mixture_log_prob(x):
    """Return the log density that the rows of :func:`mixture` have, shape ``(N,)``."""
    parts = Independent(Normal(_means(x.shape[-1]), 0.15), 1)
    return parts.log_prob(x[:, None]).logsumexp(-1) - math.log(12)


def mixture(dim, count, seed):
    """Return rows of 12 Gaussians of standard deviation 0.15, shape ``(count, dim)``."""
    means, generator = _means(dim), torch.Generator().manual_seed(seed)
    which = torch.randint(12, (count,), generator=generator)
    return means[which] + 0.15 * torch.randn(count, dim, generator=generator)


def patches(folder, split, count, seed):
    """Return dequantized, centred BSDS300 patches without their last pixel, ``(count, 63)``."""
    random = np.random.default_rng(seed)
    with np.load(Path(folder) / "bsds300_8x8_uint8.npz") as file:
        x = file[split]
    x = x[random.choice(len(x), count, replace=False)]
    x = (x + random.random(x.shape)) / 256
    return torch.from_numpy((x - x.mean(1, keepdims=True))[:, :-1]).float()


def prepare(args):
    """Train our network, and write it with the rows and their reference densities."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.dim == 63:
        train = patches(args.data, "train", 10 * _TRAINING_ROWS, 1)
        rows = patches(args.data, "test", args.rows, 2)
    else:
        train, rows = mixture(args.dim, _TRAINING_ROWS, 1), mixture(args.dim, args.rows, 2)
    velocity = pi.VelocityMLP(args.dim, args.hidden)
    distribution = pi.InterpolantDistribution(pi.InterpolantTransform(velocity))
    pi.fit(distribution, train, steps=args.steps, seed=0, progress=False)
    solver = pi.calibrate(distribution, rows, tolerance=_TOLERANCE)
    pi.save(distribution, args.network)
    transform = distribution.transform
    calibrated, matched = solver.steps, None
    with torch.no_grad():
        white = transform.flow.whitening.to_white(rows)
        transform.solver = pi.Adaptive(rtol=1e-8, atol=1e-8, nodes=96)
        exact = distribution.to(torch.float64).log_prob(rows.double())
        exact_white = exact + transform.flow.whitening.log_det
        # Peers are held to the mean alone, and so are we.
        for steps in range(1, calibrated + 1):
            transform.solver, matched = pi.FixedGrid(steps), steps
            if float((distribution.log_prob(rows.double()) - exact).abs().mean()) <= _TOLERANCE:
                break
    arrays = {"rows": rows, "white": white, "exact": exact, "exact_white": exact_white}
    scratch = Path(args.network).with_suffix(".part.npz")
    steps = {"steps": matched, "calibrated": calibrated}
    np.savez(scratch, **steps, **{k: v.numpy() for k, v in arrays.items()})
    os.replace(scratch, Path(args.network).with_suffix(".npz"))


class Peer:
    """What can be timed. ``module`` owns the weights; ``rows`` and ``exact`` are its own units."""

    default: dict = {}
    candidates: tuple = ()  # settings, loosest first
    tight: dict = {}  # the setting that is the reference of one probe
    trial = False  # whether the divergence comes in closed form, to choose a setting

    def __init__(self, velocity, arrays, *, stochastic=False):
        self.stochastic = stochastic
        self.velocity = self.module = velocity
        self.rows = arrays["white"]
        self.exact = None if self.stochastic else arrays["exact_white"]
        zero = torch.zeros(self.rows.shape[-1])
        self.base = Independent(Normal(zero, torch.ones_like(zero)), 1)

    def use(self, setting):
        """Set the accuracy of the solver."""
        self.setting = setting

    def fresh(self):
        """Forget what an earlier call left."""

    def training_loss(self, x):
        """Return the mean loss of one training step: by default maximum likelihood."""
        return -self.log_prob(x).mean()

    def solved(self, setting, seed=0):
        """Return log_prob of the rows, shape ``(N,)``, at a setting with a given probe."""
        self.use(setting)
        torch.manual_seed(seed)
        with torch.no_grad():
            return self.log_prob(self.rows.clone()).detach().double()

    def reference(self):
        """Return the log_prob that errors are measured against, shape ``(N,)``."""
        if self.exact is None:
            self.exact = self.solved(self.tight)
        return self.exact

    def matched(self):
        """Return the loosest setting within the tolerance, and the spread over probes.

        The exact peers are tried with the closed form in place of their D backward passes: the
        same numbers for less; :meth:`error` asks the peer itself.
        """
        reference, found = self.reference(), None
        self.trial = not self.stochastic
        for setting in self.candidates:
            try:
                error = float((self.solved(setting) - reference).abs().mean())
            except (AssertionError, RuntimeError):  # a step size that underflows
                continue
            if error <= _TOLERANCE:
                found = setting
                break
        self.trial = False
        report = {"matched": found}
        if self.stochastic:
            draws = [self.solved(found or self.default, seed) for seed in range(1, _PROBES + 1)]
            report["probe_sd"] = float(torch.stack(draws).std(0).mean())
        return report

    def error(self, setting):
        """Return the mean solver error of log_prob, nats."""
        return float((self.solved(setting) - self.reference()).abs().mean())


class Ours(Peer):
    """This package, in data coordinates, on its own fixed grid."""

    default = {"steps": pi.FixedGrid().steps}

    def __init__(self, distribution, arrays):
        super().__init__(distribution.transform.velocity, arrays)
        self.distribution = distribution
        self.fewest = {"steps": int(arrays["steps"])}
        self.calibrated = int(arrays["calibrated"])
        self.rows, self.exact = arrays["rows"], arrays["exact"]

    def use(self, setting):
        self.distribution.transform.solver = pi.FixedGrid(setting["steps"])

    def fresh(self):
        self.distribution.clear_cache()
        self.distribution.transform.clear_cache()

    def log_prob(self, x):
        return self.distribution.log_prob(x)

    def sample(self, count):
        return self.distribution.sample((count,))

    def training_loss(self, x):
        times = math.gcd(_TIMES, len(x))
        t = (torch.arange(times) + torch.rand(times)) / times
        grouped = x.reshape(times, -1, x.shape[-1])
        return pi.interpolant_loss(self.distribution, grouped, t=t[:, None]).mean()

    def matched(self):
        return {"matched": self.fewest, "calibrated": self.calibrated}


class ZukoCNF(Peer):
    """``zuko.flows.CNF`` around our velocity; its time runs from data to base."""

    default = {"atol": 1e-6, "rtol": 1e-5}
    candidates = tuple({"atol": t, "rtol": t} for t in _TOLERANCES)
    tight = {"atol": 1e-6, "rtol": 1e-6}

    def __init__(self, velocity, arrays, *, exact=True):
        super().__init__(velocity, arrays, stochastic=not exact)
        from zuko.flows import CNF
        from zuko.flows.continuous import FFJTransform

        class Field(FFJTransform):
            def f(self, t, x, c=None):
                return -self.ode(1 - t, x)

        dim = self.rows.shape[-1]
        self.module = CNF(dim)
        self.module.transform = Field(dim, exact=exact)
        self.module.transform.ode = velocity

    def use(self, setting):
        self.module.transform.atol = setting["atol"]
        self.module.transform.rtol = setting["rtol"]

    def log_prob(self, x):
        return self._closed_form(x) if self.trial else self.module().log_prob(x)

    def _closed_form(self, x):
        from zuko.utils import odeint

        own = self.module.transform()

        def rate(t, y, _):
            v, divergence = self.velocity.forward_and_divergence(1 - t, y)
            return -v, -divergence * own.trace_scale

        state = (x, torch.zeros_like(x[:, 0]))
        z, log_det = odeint(rate, state, own.t0, own.t1, atol=own.atol, rtol=own.rtol)
        return self.base.log_prob(z) + log_det / own.trace_scale

    def sample(self, count):
        return self.module().sample((count,))


class TorchCFM(Peer):
    """The recipe of torchcfm's tutorial: one joint state through torchdiffeq.

    The tutorial draws a new probe at each evaluation, which defeats an adaptive solver; here one
    probe is kept per solve, in the peer's favour.
    """

    default = {"atol": 1e-4, "rtol": 1e-4}
    candidates = ZukoCNF.candidates
    tight = {"atol": 1e-6, "rtol": 1e-6}

    def __init__(self, velocity, arrays, *, exact=True):
        super().__init__(velocity, arrays, stochastic=not exact)
        from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

        self.matcher = ConditionalFlowMatcher(sigma=0.0)
        self.joint = _Joint(velocity)

    def log_prob(self, x):
        from torchdiffeq import odeint, odeint_adjoint

        self.joint.probe, self.joint.trial = None, self.trial
        if self.stochastic:
            self.joint.probe = torch.randint_like(x, 2) * 2.0 - 1.0
        state = torch.cat((x, torch.zeros_like(x[:, :1])), dim=-1)
        # sensitivity="adjoint" in the tutorial
        solve = odeint_adjoint if torch.is_grad_enabled() else odeint
        end = solve(self.joint, state, torch.tensor([1.0, 0.0]), method="dopri5", **self.setting)
        return self.base.log_prob(end[-1, :, :-1]) + end[-1, :, -1]

    def sample(self, count):
        from torchdiffeq import odeint

        x, times = self.base.sample((count,)), torch.tensor([0.0, 1.0])
        return odeint(self.velocity, x, times, method="dopri5", **self.setting)[-1]

    def training_loss(self, x):
        t, xt, ut = self.matcher.sample_location_and_conditional_flow(torch.randn_like(x), x)
        return (self.velocity(t, xt) - ut).square().mean()


class _Joint(nn.Module):
    """The rate of (x, log-density), exact or by one probe, as torchcfm's tutorial computes it."""

    def __init__(self, velocity):
        super().__init__()
        self.velocity, self.probe, self.trial = velocity, None, False

    def forward(self, t, state):
        x = state[..., :-1]
        if self.trial:
            v, divergence = self.velocity.forward_and_divergence(t, x)
            return torch.cat((v, divergence[:, None]), dim=-1)

        def field(y):
            return self.velocity(t, y)

        def exact(y):
            return torch.trace(torch.func.jacrev(field)(y))

        def estimate(y, probe):
            return (torch.func.vjp(field, y)[1](probe)[0] * probe).sum()

        if self.probe is None:
            rate = torch.vmap(exact)(x)
        else:
            rate = torch.vmap(estimate)(x, self.probe)
        return torch.cat((field(x), rate[:, None]), dim=-1)


class FlowMatching(Peer):
    """``flow_matching.solver.ODESolver``, midpoint with steps of 0.05 as in its examples."""

    default = {"steps": 20}
    candidates = tuple({"steps": n} for n in _STEPS)
    tight = {"steps": 1280}

    def __init__(self, velocity, arrays, *, exact=True):
        super().__init__(velocity, arrays, stochastic=not exact)
        from flow_matching.path import AffineProbPath
        from flow_matching.path.scheduler import CondOTScheduler
        from flow_matching.solver import ODESolver
        from flow_matching.utils import ModelWrapper

        class Wrapped(ModelWrapper):
            def forward(self, x, t, **extras):
                return self.model(t, x)

        self.solver = ODESolver(Wrapped(velocity))
        self.path = AffineProbPath(CondOTScheduler())

    def log_prob(self, x):
        if torch.is_grad_enabled():
            raise NotImplementedError("compute_likelihood detaches its result")
        options = {"method": "midpoint", "step_size": 1 / self.setting["steps"]}
        if self.trial:
            return self._closed_form(x, options)
        exact = not self.stochastic
        return self.solver.compute_likelihood(
            x_1=x, log_p0=self.base.log_prob, exact_divergence=exact, **options
        )[1]

    def _closed_form(self, x, options):
        from torchdiffeq import odeint

        ends = odeint(
            lambda t, state: self.velocity.forward_and_divergence(t, state[0]),
            (x, torch.zeros_like(x[:, 0])),
            torch.tensor([1.0, 0.0]),
            method=options["method"],
            options={"step_size": options["step_size"]},
        )
        return self.base.log_prob(ends[0][-1]) + ends[1][-1]

    def sample(self, count):
        x, step = self.base.sample((count,)), 1 / self.setting["steps"]
        return self.solver.sample(x_init=x, method="midpoint", step_size=step)

    def training_loss(self, x):
        draw = self.path.sample(t=torch.rand(len(x)), x_0=torch.randn_like(x), x_1=x)
        return (self.velocity(draw.t, draw.x_t) - draw.dx_t).square().mean()


class Autoregressive(Peer):
    """zuko's NSF or MAF, three transforms, untrained: by default 64 wide, matched as ours."""

    default = {"hidden": [64, 64]}

    def __init__(self, velocity, arrays, *, kind):
        super().__init__(velocity, arrays)
        import zuko

        self.kind, self.flows = getattr(zuko.flows, kind), {}
        self.same = {"hidden": list(velocity.hidden_dims)}

    def use(self, setting):
        key = tuple(setting["hidden"])
        if key not in self.flows:
            self.flows[key] = self.kind(self.rows.shape[-1], transforms=3, hidden_features=key)
        self.module = self.flows[key]

    def log_prob(self, x):
        return self.module().log_prob(x)

    def sample(self, count):
        return self.module().sample((count,))

    def matched(self):
        return {"matched": self.same}

    def error(self, setting):
        return None


def make(name, path):
    """Return a peer by name, around the network in a file."""
    distribution = pi.load(path)
    with np.load(Path(path).with_suffix(".npz")) as file:
        arrays = {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}
    velocity = distribution.transform.velocity
    if name == "ours":
        return Ours(distribution, arrays)
    if name in ("zuko NSF", "zuko MAF"):
        return Autoregressive(velocity, arrays, kind=name[-3:])
    kinds = {"zuko CNF": ZukoCNF, "torchcfm": TorchCFM, "flow_matching": FlowMatching}
    library, _, divergence = name.rpartition(", ")
    return kinds[library](velocity, arrays, exact=divergence == "exact")


def action(peer, op):
    """Return the function to time, of fresh rows, and whether weights are to be frozen."""
    if op == "log_prob":
        return torch.no_grad()(peer.log_prob), True
    if op == "sample":
        return torch.no_grad()(lambda x: peer.sample(len(x))), True
    if op == "gradient in x":

        def in_x(x):
            return torch.autograd.grad(peer.log_prob(x.requires_grad_()).sum(), x)

        return in_x, True
    if op == "gradient in weights":
        return lambda x: peer.log_prob(x).sum().backward(), False
    # A rate of zero: the arithmetic of Adam, and weights that stay for the next peer's turn.
    optimizer = torch.optim.Adam(peer.module.parameters(), lr=0.0)

    def step(x):
        optimizer.zero_grad()
        peer.training_loss(x).backward()
        optimizer.step()

    return step, False


def timed(peer, run):
    """Return the seconds of one call on a fresh copy of the rows."""
    peer.fresh()
    peer.module.zero_grad()
    x = peer.rows.clone()
    start = time.perf_counter()
    run(x)
    return time.perf_counter() - start


def measure(peer, op, setting, *, warm):
    """Return the median milliseconds of a call, over as many as fit in a quarter of a second."""
    peer.use(setting)
    run, frozen = action(peer, op)
    peer.module.requires_grad_(not frozen)
    first = timed(peer, run)
    if not warm and first > 1.0:
        return 1e3 * first
    times = [first] if warm else []
    while not times or (sum(times) < 0.25 and len(times) < 25):
        times.append(timed(peer, run))
    return 1e3 * statistics.median(times)


def memory():
    """Return the peak resident memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if _MAC else 2**10)


_MAC = sys.platform == "darwin"


def serve(args):
    """Answer requests, one JSON line each, until the input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    seen = set()

    def reply(request):
        nonlocal base, peer
        if request["do"] == "start":
            peer = make(args.cell, args.network)
            peer.use(peer.default)
            few = peer.rows
            peer.rows = few[:8]
            for op in ("log_prob", "sample"):
                timed(peer, action(peer, op)[0])
            peer.rows, base = few, memory()
            return {"default": peer.default}
        if request["do"] == "match":
            return peer.matched()
        if request["do"] == "error":
            return {"error": peer.error(request["setting"])}
        key = (request["op"], json.dumps(request["setting"]))
        value = measure(peer, request["op"], request["setting"], warm=key in seen)
        seen.add(key)
        return {"ms": value, "memory": memory() - base}

    base, peer = 0.0, None
    for line in sys.stdin:
        try:
            answer = reply(json.loads(line))
        except Exception as error:  # noqa: BLE001  # the table says which cell failed, and why
            answer = {"failed": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(answer), file=answers, flush=True)
