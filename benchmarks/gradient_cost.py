"""What a gradient through a learned prior costs NUTS, and how many effective draws it gives.

The prior is a banana in two dimensions, of which rows are seen in part: y = z_2 + noise. A
gradient in base space goes through the map from base to data, one in data space through the
log-density; both are compared with forward and backward of the bare network for as many rows, in
the states alone. NUTS then samples three rows in base space; effective draws, of the slowest
number, are by the second after the warm-up, and by 1,000 gradients. Everything on one thread, in
CPU seconds and in float32. Each round runs in a process of its own; the engines take turns.

With --old, a checkout of version 0.1.0 trains and writes the prior, and is timed beside this one.
"Straightened" is another prior, of `reflow`: how far from the first is printed too. "Compiled" is
NUTS(jit_compile=True), of each.

    python benchmarks/gradient_cost.py --old DIR     # a quarter of an hour
    python benchmarks/gradient_cost.py --smoke       # a minute
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _pyro_speed import gradients_counted, milliseconds
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size

import pyro_interpolant as pi

HERE = Path(__file__).parent
NOISE, OBSERVED = 0.5, (-0.3, 0.2, 0.6)  # each of one mode: of two, few draws say little
FILE, STRAIGHT, DRAWS = "banana.safetensors", "straight.safetensors", "draws.npy"


def write_prior(folder, smoke):
    """Train the prior, and write it."""
    torch.manual_seed(0)
    x = torch.randn(8000, 2)
    x = torch.stack((x[:, 0], x[:, 0] ** 2 + 0.3 * x[:, 1]), -1)
    few = {"steps": 20, "tolerance": 1e3} if smoke else {"steps": 2000}
    prior = pi.from_samples(x, seed=0, progress=False, **few)
    pi.save(prior, folder / FILE)


def write_straight(folder, smoke):
    """Straighten the paths of the prior, write it, and print what that took."""
    prior = pi.load(folder / FILE)
    few = {"steps": 20, "tolerance": 1e3, "count": 500} if smoke else {"steps": 3000}
    start = time.process_time()
    straight = pi.reflow(prior, seed=0, progress=False, **few).distribution
    seconds = time.process_time() - start
    pi.save(straight, folder / STRAIGHT)
    with torch.no_grad():
        z, w = prior.sample((5000,)), torch.randn(5000, 2)
        nats = prior.log_prob(z) - straight.log_prob(z)
        apart = (prior.transform(w) - straight.transform(w)) / z.std(0)
    steps = [p.transform.solver.steps for p in (prior, straight)]
    print(
        f"`reflow` in {seconds:.0f} s: {steps[0]} steps of rk4, then {steps[1]}; the relative "
        f"entropy of the prior to the straightened one is {nats.mean():.4f} +- "
        f"{nats.std() / len(z) ** 0.5:.4f} nats, its map is within "
        f"{apart.square().mean().sqrt():.3f} sd (root mean square)\n"
    )


def print_gradients(prior, rows, seconds):
    """Print the milliseconds of a gradient, for each number of rows."""
    network, at = prior.transform.velocity, torch.tensor(0.3)
    functions = {
        "bare": lambda z: network(at, z).sum(),
        "base": lambda z: prior.transform(z).square().sum(),
        "data": lambda z: prior.log_prob(z).sum(),
    }
    for count in rows:
        x, ms = prior.sample((count,)), {}
        for name, function in functions.items():

            def gradient(function=function, x=x):
                leaf = x.clone().requires_grad_()
                torch.autograd.grad(function(leaf), leaf)

            ms[name] = milliseconds(gradient, seconds)
        print(json.dumps({"rows": count, **ms}), flush=True)


def print_nuts(prior, folder, seed, draws, *, compiled):
    """Sample three rows, write their draws, and print the cost after the warm-up."""
    pyro.set_rng_seed(seed)
    calls, began = gradients_counted(), []

    def model(y):
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z[..., 1], NOISE), obs=y)

    def note(_kernel, _samples, stage, _i):
        if stage != "Sample":
            began[:] = [time.process_time(), calls[0]]

    options = {"jit_compile": compiled, "ignore_jit_warnings": True}
    kernel = NUTS(pi.base_space(model), max_tree_depth=6, **options)
    mcmc = MCMC(kernel, draws, draws, disable_progbar=True, hook_fn=note)
    mcmc.run(torch.tensor(OBSERVED))
    seconds, gradients = time.process_time() - began[0], calls[0] - began[1]
    with torch.no_grad():
        z = prior.transform(mcmc.get_samples()["z_base"])
    np.save(folder / DRAWS, z.numpy())
    effective = float(effective_sample_size(z[None], sample_dim=1).min())
    print(json.dumps({"seconds": seconds, "gradients": gradients, "effective": effective}))


def asked(engine, folder, what, *rest, args):
    """Return the JSON lines of a part of this file, run by an engine: a package, and a file."""
    root, file, compiled = engine
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--part", *map(str, (folder / file, what, *rest))]
    command += ["--draws", str(args.draws), *(["--smoke"] if args.smoke else [])]
    command += ["--compiled"] if compiled else []
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def spread(values, digits):
    """Return a median and the quartiles around it."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def print_table(head, lines):
    """Print a Markdown table."""
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for line in lines:
        print(f"| {' | '.join(map(str, line))} |")
    print(flush=True)


def compare_gradients(engines, folder, args):
    """Print what a gradient costs with each engine."""
    found = {name: [] for name in engines}
    for _ in range(args.rounds):
        for name, engine in engines.items():
            found[name].append(asked(engine, folder, "gradients", args=args))
    lines = []
    for name, rounds in found.items():
        for cells in zip(*rounds, strict=True):
            line = [name, cells[0]["rows"], spread([c["bare"] for c in cells], 3)]
            for space in ("base", "data"):
                line.append(spread([c[space] for c in cells], 2))
                line.append(spread([c[space] / c["bare"] for c in cells], 1))
            lines.append(line)
    head = ["engine", "rows", "bare network, ms", "base space, ms", "of bare"]
    print_table([*head, "data space, ms", "of bare"], lines)


def compare_nuts(engines, folder, args):
    """Print effective draws of each engine, and whether means agree."""
    found, draws = ({name: [] for name in engines} for _ in range(2))
    for seed in range(args.rounds):
        for name, engine in engines.items():
            found[name] += asked(engine, folder, "nuts", seed, args=args)
            draws[name].append(np.load(folder / DRAWS))
    first, lines = next(iter(engines)), []
    speeds = {k: [c["effective"] / c["seconds"] for c in cells] for k, cells in found.items()}
    of_first = np.concatenate(draws[first])
    total = {name: sum(c["effective"] for c in cells) for name, cells in found.items()}
    for name, cells in found.items():
        z = np.concatenate(draws[name])
        error = np.sqrt(z.var(0) / total[name] + of_first.var(0) / total[first])
        apart = np.abs(z.mean(0) - of_first.mean(0)) / error
        by_gradients = [1e3 * c["effective"] / c["gradients"] for c in cells]
        ms = [1e3 * c["seconds"] / c["gradients"] for c in cells]
        ratios = [a / b for a, b in zip(speeds[name], speeds[first], strict=True)]
        line = [name, spread(ms, 2), spread(by_gradients, 0), spread(speeds[name], 1)]
        lines.append([*line, spread(ratios, 1), f"{apart.max():.1f}"])
    head = ["engine", "a gradient with Pyro, ms", "effective draws, of 1,000 gradients"]
    head += ["a second", f"times {first}", "means apart [s. e.]"]
    print_table(head, lines)


def main():
    """Print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old", type=Path, help="a checkout of version 0.1.0")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=200, help="after as many to warm up")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--compiled", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part:
        run_part(Path(args.part[0]), *args.part[1:], args=args)
        return
    if args.smoke:
        args.rounds, args.draws = 1, 10
    here = {"this version": FILE, "straightened": STRAIGHT}
    engines = {"0.1.0": (args.old.resolve(), FILE, False)} if args.old else {}
    engines |= {name: (HERE.parent, file, False) for name, file in here.items()}
    compiled = {f"{name}, compiled": (*engine[:2], True) for name, engine in engines.items()}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        asked(next(iter(engines.values())), folder, "prior", args=args)
        write_straight(folder, args.smoke)
        compare_gradients(engines, folder, args)
        compare_nuts(engines | compiled, folder, args)


def run_part(file, what, *rest, args):
    """Run what the main process asks for of a process of its own."""
    if what == "prior":
        write_prior(file.parent, args.smoke)
    elif what == "gradients":
        rows = (1,) if args.smoke else (1, 3, 100)
        print_gradients(pi.load(file), rows, 0.01 if args.smoke else 0.5)
    else:
        print_nuts(pi.load(file), file.parent, int(rest[0]), args.draws, compiled=args.compiled)


if __name__ == "__main__":
    main()
