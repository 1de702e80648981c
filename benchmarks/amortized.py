"""Amortised posteriors on sbibm's tasks: can a classifier tell them from reference draws?

For each task and number of simulations one guide is trained, then asked for the posteriors of ten
observations: C2ST against 10,000 reference draws (0.5 is the best), of its own draws and after
importance resampling with the known likelihood; SBC on 1,000 fresh data sets; the time of 10,000
draws. Beside it sbi's NPE and FMPE at their defaults, on the same simulations, where sbi is there.
Of sir and lotka_volterra, which have no targets, sbibm's files are read; torchdiffeq simulates.

    pip install --no-deps sbibm            # tasks, simulators, reference draws
    python benchmarks/amortized.py         # 5 tasks x 2 sizes, about three hours on two cores
    python benchmarks/amortized.py --tasks sir lotka_volterra
    python benchmarks/amortized.py --tasks "slcp rows"  # its eight numbers are four rows
    python benchmarks/amortized.py --methods ours npe fmpe
    python benchmarks/amortized.py --smoke # seconds, without sbibm

Each cell runs in a process of its own and appends one line to the file; a rerun skips what is
there. The table is made from the lines.
"""

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _cells import Cells
from pyro.distributions import TorchDistribution, constraints
from torchdiffeq import odeint

import pyro_interpolant as pi
from pyro_interpolant.diagnostics import c2st

TASKS = ("two_moons", "slcp", "gaussian_linear", "bernoulli_glm", "gaussian_mixture")
SECONDS = {10_000: 600.0, 1_000: 180.0}
TARGETS = {
    10_000: dict(zip(TASKS, (0.56, 0.80, 0.53, 0.60, 0.55), strict=True)),
    1_000: dict(zip(TASKS, (0.66, 0.93, 0.60, 0.78, 0.62), strict=True)),
}
PROPOSALS, RESAMPLED = 100_000, 10_000
ROWS = {"slcp rows": ("slcp", (4, 2))}  # the task, and the rows that its data are


class _Simulated(TorchDistribution):
    """Data of a simulator given parameters, ``(*, *event_shape)``, with their log-density."""

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(self, theta, simulate, density, event_shape, batch_shape=None):
        self.theta, self.simulate, self.density = theta, simulate, density
        shape = theta.shape[:-1] if batch_shape is None else batch_shape
        super().__init__(torch.Size(shape), torch.Size(event_shape), validate_args=False)

    def sample(self, sample_shape=()):
        shape = torch.Size(sample_shape) + self.batch_shape
        rows = self.theta.expand(*shape, self.theta.shape[-1]).reshape(-1, self.theta.shape[-1])
        with pyro.poutine.block():  # sbibm's simulators have sites of their own
            return self.simulate(rows).reshape(*shape, *self.event_shape)

    def log_prob(self, value):
        numbers = value.flatten(-len(self.event_shape))
        return self.density(numbers, self.theta).expand(
            torch.broadcast_shapes(numbers.shape[:-1], self.batch_shape)
        )

    def expand(self, batch_shape, _instance=None):
        args = self.theta, self.simulate, self.density, self.event_shape
        return _Simulated(*args, batch_shape=torch.Size(batch_shape))


class _Crescent:
    """The density of two_moons: an arc of radius 0.1 about a point that folds the parameters."""

    def __call__(self, y, theta):
        fold = -(theta.sum(-1).abs()), theta[..., 1] - theta[..., 0]
        centre = torch.stack(fold, -1) / math.sqrt(2) + y.new_tensor([0.25, 0.0])
        p = y - centre
        radius = p.norm(dim=-1)
        inside = dist.Normal(0.1, 0.01).log_prob(radius) - (math.pi * radius).log()
        return torch.where(p[..., 0] > 0, inside, -math.inf)


def slcp(y, theta):
    m, s1, s2 = theta[..., :2], theta[..., 2] ** 2, theta[..., 3] ** 2
    rho = theta[..., 4].tanh()
    off = rho * s1 * s2
    cov = torch.stack((s1**2 + 1e-6, off, off, s2**2 + 1e-6), -1).reshape(*off.shape, 1, 2, 2)
    normal = dist.MultivariateNormal(m[..., None, :], cov, validate_args=False)
    return normal.log_prob(y.reshape(*y.shape[:-1], 4, 2)).sum(-1)


def mixture(y, theta):
    each = [dist.Normal(theta, s).log_prob(y).sum(-1) + math.log(0.5) for s in (1.0, 0.1)]
    return torch.stack(each).logsumexp(0)


def density_of(name, task):
    """Return the log-likelihood of a task, up to a constant, as a function of data and theta."""
    if name == "two_moons":
        return _Crescent()
    if name == "bernoulli_glm":
        design = torch.load(task.path / "files" / "design_matrix.pt")

        def glm(y, theta):  # the data are the sufficient statistics
            return (theta * y).sum(-1) - torch.nn.functional.softplus(theta @ design.T).sum(-1)

        return glm
    known = {
        "slcp": slcp,
        "gaussian_mixture": mixture,
        "gaussian_linear": lambda y, t: dist.Normal(t, 0.1**0.5).log_prob(y).sum(-1),
    }
    return known[name]


class _Toy:
    """A task for ``--smoke``: a Gaussian mean, with reference draws in closed form."""

    path = None

    def get_prior_dist(self):
        return dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def get_simulator(self):
        return lambda theta: theta + 0.1**0.5 * torch.randn_like(theta)

    def get_observation(self, i):
        return torch.tensor([[0.3 * i, -0.2 * i]])

    def get_reference_posterior_samples(self, i):
        y = self.get_observation(i)
        return y / 1.1 + (0.1 / 1.1) ** 0.5 * torch.randn(500, 2)


def _solved(field, start, theta, times):
    """Return the states of an ODE at some times, shape ``(*, T, 2)``, given parameters."""
    rows = theta.double().reshape(-1, theta.shape[-1])
    begin = torch.tensor(start).double().expand(len(rows), 2)
    options = {"norm": lambda error: error.abs().max()}  # each row keeps the tolerance
    at = torch.as_tensor(times, dtype=torch.float64)
    u = odeint(lambda _, u: field(u, *rows.T), begin, at, rtol=1e-6, atol=1e-9, options=options)
    return u.movedim(0, 1).reshape(*theta.shape[:-1], len(times), 2)


def epidemic(theta):
    """Return the law of sir's data: of 1,000 people, how many are infected, every 17 days."""

    def field(u, beta, gamma):  # of the shares of susceptible and infected people
        new = beta * u[:, 0] * u[:, 1]
        return torch.stack((-new, new - gamma * u[:, 1]), -1)

    share = _solved(field, [1 - 1e-6, 1e-6], theta, range(0, 161, 17))[..., 1]
    return dist.Binomial(1000, share.clamp(1e-12, 1.0).to(theta), validate_args=False).to_event(1)


def predation(theta):
    """Return the law of lotka_volterra's data: prey, then predators, every 2.1 units of time."""

    def field(u, alpha, beta, gamma, delta):  # of the logarithms of both
        prey, predators = u.exp().unbind(-1)
        return torch.stack((alpha - beta * predators, delta * prey - gamma), -1)

    times = torch.arange(10) * 2.1
    logs = _solved(field, [math.log(30.0), 0.0], theta, times).mT.flatten(-2)
    logs = logs.clamp(math.log(1e-10), math.log(1e4)).to(theta)
    return dist.LogNormal(logs, 0.1, validate_args=False).to_event(1)


class _Stored:
    """A task whose observations and reference draws are sbibm's files.

    Its own class there needs Julia.
    """

    def __init__(self, name):
        import sbibm

        self.path = Path(sbibm.__file__).parent / "tasks" / name
        mean, scale, self.law = {
            "sir": ([math.log(0.4), math.log(0.125)], [0.5, 0.2], epidemic),
            "lotka_volterra": ([-0.125, -3.0, -0.125, -3.0], [0.5] * 4, predation),
        }[name]
        self.prior = dist.LogNormal(torch.tensor(mean), torch.tensor(scale)).to_event(1)

    def get_prior_dist(self):
        return self.prior

    def get_simulator(self):
        return lambda theta: self.law(theta).sample()

    def density(self, y, theta):
        return self.law(theta).log_prob(y)

    def _read(self, i, name):
        import pandas

        path = self.path / "files" / f"num_observation_{i}" / name
        return torch.tensor(pandas.read_csv(path).values)

    def get_observation(self, i):
        return self._read(i, "observation.csv").float()

    def get_reference_posterior_samples(self, i):
        return self._read(i, "reference_posterior_samples.csv.bz2").float()


def load_task(name):
    if name == "toy":
        return _Toy(), lambda y, t: dist.Normal(t, 0.1**0.5).log_prob(y).sum(-1)
    if name in ("sir", "lotka_volterra"):
        task = _Stored(name)
        return task, task.density
    import sbibm

    name, _ = ROWS.get(name, (name, None))
    task = sbibm.get_task(name)
    return task, density_of(name, task)


def model_of(task, density, shape):
    """Return the task as a Pyro model, whose data "y" have a shape."""
    prior, simulate = task.get_prior_dist(), task.get_simulator()

    def model(y=None):
        theta = pyro.sample("theta", prior)
        return pyro.sample("y", _Simulated(theta, simulate, density, shape), obs=y)

    return model


def accuracy(draws, reference):
    """Return C2ST as sbibm has it, in the first of five folds: on 4,000 draws its error is 0.008.

    It is of as many draws as there are of both.
    """
    return c2st(reference, draws[: len(reference)], folds=1).accuracy


def ours(task, density, cell):
    """Train a guide, and return what it is worth."""
    like, count = task.get_observation(1)[0], cell["simulations"]
    _, shape = ROWS.get(cell["task"], (None, like.shape))
    model, begin, like = model_of(task, density, shape), time.monotonic(), like.reshape(shape)
    guide = pi.AmortizedInterpolant(model)  # which finds out by itself that rows are exchangeable

    options = {"max_seconds": cell["seconds"], "seed": cell["seed"], "progress": False}
    result = pi.fit_guide(guide, like, simulations=count, **options, options=cell["fit"])
    found = {"train": time.monotonic() - begin, "gain": result.gain, "k_hat": result.k_hat}
    found |= {"verdict": result.verdict, "report": repr(guide.posterior.report)}
    with torch.no_grad():
        guide.condition(y=like).sample((10,))
        begin = time.monotonic()
        guide.condition(y=like).sample((10_000,))
        found["draws"] = time.monotonic() - begin
        check = guide.calibration(like, count=cell["data_sets"]).sbc
        found |= {"sbc": float(check.distances.max()), "band": check.band}
        numbers, weighed = [], []
        for i in cell["observations"]:
            y, reference = task.get_observation(i)[0], task.get_reference_posterior_samples(i)
            y = y.reshape(shape)
            draws = guide.condition(y=y).sample_dict((len(reference),))["theta"]
            numbers.append(accuracy(draws, reference))
            weights = weighted(guide, y, cell["proposals"])
            if weights is not None:
                weighed.append(accuracy(weights, reference))
    return found | {"c2st": numbers, "c2st_weighed": weighed}


def weighted(guide, y, count):
    """Return draws without repetition by their importance weights, as many as a tenth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = pi.importance(guide, y, count=count, seed=0)
    noise = -torch.log(-torch.log(torch.rand(count).clamp(min=1e-12)))
    chosen = (result.log_weights + noise).topk(min(RESAMPLED, count // 10)).indices
    return result.draws["theta"][chosen]


def peer(task, cell):
    """Train sbi's NPE or FMPE at its defaults, and return the same numbers."""
    from sbi.inference import FMPE, NPE

    torch.manual_seed(cell["seed"])
    prior = task.get_prior_dist()
    theta = prior.sample((cell["simulations"],))
    x, begin = task.get_simulator()(theta), time.monotonic()
    trainer = {"npe": NPE, "fmpe": FMPE}[cell["method"]](prior=prior)
    trainer.append_simulations(theta, x).train()
    posterior, took = trainer.build_posterior(), time.monotonic() - begin
    numbers = []
    for i in cell["observations"]:
        reference = task.get_reference_posterior_samples(i)
        draws = posterior.sample((len(reference),), x=task.get_observation(i))
        numbers.append(accuracy(draws, reference))
    return {"train": took, "c2st": numbers, "c2st_weighed": []}


def run(cell):
    """Run one cell in this process, and return what is found."""
    torch.set_num_threads(cell["threads"])
    np.random.seed(cell["seed"])
    torch.manual_seed(cell["seed"])
    task, density = load_task(cell["task"])
    return ours(task, density, cell) if cell["method"] == "ours" else peer(task, cell)


def table(lines):
    """Print the mean C2ST of each cell beside its target."""
    print("task, simulations, method: C2ST (target), weighed, SBC distance (band), 10,000 draws")
    for line in lines:
        mean = sum(line["c2st"]) / len(line["c2st"])
        name, _ = ROWS.get(line["task"], (line["task"], None))
        target = TARGETS.get(line["simulations"], {}).get(name, math.nan)
        weighed = line["c2st_weighed"]
        text = f"{line['task']:>17} {line['simulations']:>7,} {line['method']:>5}: {mean:.3f} "
        text += f"({target:.2f})"
        if weighed:
            text += f", {sum(weighed) / len(weighed):.3f}"
        if "band" in line:
            text += f", {line['sbc']:.3f} ({line['band']:.3f}), {line['draws']:.2f} s"
        print(text, f"trained {line['train']:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--simulations", nargs="+", type=int, default=list(SECONDS))
    parser.add_argument("--methods", nargs="+", default=["ours"])
    parser.add_argument("--seconds", type=float, help="of training; 600 and 180 by default")
    parser.add_argument("--observations", type=int, default=10)
    parser.add_argument("--data-sets", type=int, default=1000, help="for SBC")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fit", type=json.loads, default={}, help="options of fit, as JSON")
    parser.add_argument("--out", type=Path, default=Path("amortized.jsonl"))
    parser.add_argument("--cell", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.cell:
        print("\n" + json.dumps(run(args.cell)))  # on a line of its own: sbi's last one has no end
        return
    if args.smoke:
        args.out, args.tasks, args.simulations, args.observations = None, ["toy"], [500], 1
        args.fit, args.seconds, args.threads = {"steps": 20}, 30.0, 1
    done, lines = Cells(args.out), []
    for task in args.tasks:
        for count in args.simulations:
            for method in args.methods:
                cell = {
                    "task": task, "simulations": count, "method": method, "seed": args.seed,
                    "seconds": args.seconds or SECONDS.get(count, 600.0), "fit": args.fit,
                    "observations": list(range(1, args.observations + 1)),
                    "threads": args.threads,
                    "data_sets": 50 if args.smoke else args.data_sets,
                    "proposals": 1000 if args.smoke else PROPOSALS,
                }  # fmt: skip
                line = done.find(cell)
                if line is None:
                    command = [sys.executable, __file__, "--cell", json.dumps(cell)]
                    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    line = done.add(cell, json.loads(out.stdout.splitlines()[-1]))
                    table([line])
                lines.append(line)
    table(lines)


if __name__ == "__main__":
    main()
