"""The same files in Pyro and in NumPyro: gradients a second, NUTS, compiling, chains side by side.

Everything on one thread, in CPU seconds, in float32. Gradients are those that NUTS asks for: of a
log-density (data space) and through the map from base to data (base space), for some rows at once.
NUTS samples three stars with the prior of examples/stellar_distances.py, and a Gaussian prior with
a Gaussian measurement, with the same settings in both engines; effective draws, counted in
stretches of equal length, are by the second after the warm-up, without what is compiled.
Posteriors are compared: how far means are from one another, in standard errors of the difference,
and the ratio of standard deviations.

With --old, a checkout of version 0.1.0 trains and writes the flows, and is timed beside this one.

    python benchmarks/numpyro_speed.py --old DIR     # half an hour
    python benchmarks/numpyro_speed.py --smoke       # a minute
"""

import argparse
import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    (os.environ.get("XLA_FLAGS", "") if "--smoke" in sys.argv else "")  # timings are of these
    + " --xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _pyro_speed import SHAPES, milliseconds
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC, NUTS, init_to_value

import pyro_interpolant as pi

HERE = Path(__file__).parent
MODELS = ("conjugate", "stars")


def started(root, folder, args):
    """Start _pyro_speed.py with the package that is in a folder; return its process."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HERE / "_pyro_speed.py"), str(folder)]
    command += ["--draws", str(args.draws), *(["--smoke"] if args.smoke else [])]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def by_pyro(process, *what):
    """Run a part of _pyro_speed.py; return its JSON lines."""
    print(json.dumps(what), file=process.stdin, flush=True)
    found = []
    for line in process.stdout:
        if line == "\n":
            return found
        if line.startswith("{"):
            found.append(json.loads(line))
    raise RuntimeError(f"{what} in Pyro ended with an error")


def print_gradients(engines, folder, args):
    """Print what a gradient costs in each engine."""
    rows = (1,) if args.smoke else (1, 100, 1000)
    cells = [(name, n) for name in list(SHAPES)[: 1 if args.smoke else None] for n in rows]
    texts = [f"{name}:{n}" for name, n in cells]
    slow = [by_pyro(process, "gradients", *texts) for process in engines.values()]
    head = ["D, layers", "rows", "space", *(f"{engine}, ms" for engine in engines)]
    head += ["NumPyro, ms", *(f"times {engine}" for engine in engines), "compiling, s"]
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    for each in zip(*slow, strict=True):
        name, n, space = (each[0][k] for k in ("name", "rows", "space"))
        flow = pi.numpyro.load(folder / f"{name}.safetensors")
        x = jax.random.normal(jax.random.key(0), (*([n] if n > 1 else []), *flow.event_shape))
        function = {
            "data": lambda z, flow=flow: flow.log_prob(z).sum(),
            "base": lambda z, flow=flow: jnp.square(flow.transform(z)).sum(),
        }[space]
        gradient = jax.jit(jax.grad(function))
        start = time.process_time()
        gradient(x).block_until_ready()
        compiling = time.process_time() - start
        ms = milliseconds(
            lambda f=gradient, x=x: f(x).block_until_ready(), 0.01 if args.smoke else 1.0
        )
        line = [name, n, space, *(f"{e['ms']:.2f}" for e in each), f"{ms:.3f}"]
        line += [*(f"{e['ms'] / ms:.1f}" for e in each), f"{compiling:.1f}"]
        print(f"| {' | '.join(map(str, line))} |", flush=True)


def stars_model(prior, magnitude, colour, colour_error, parallax, parallax_error):
    with numpyro.plate("stars", len(magnitude)):
        z = numpyro.sample("z", prior)
        numpyro.sample("colour", dist.Normal(z[..., 0], colour_error), obs=colour)
        expected = 10 ** (0.2 * (z[..., 1] - magnitude + 10))
        numpyro.sample("parallax", dist.Normal(expected, parallax_error), obs=parallax)


def conjugate_model(prior, *y):
    z = numpyro.sample("z", prior)
    numpyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=jnp.stack(y))


@functools.cache  # small runs ask twice for the same
def by_numpyro(folder, name, space, draws, chains=1):
    """Return draws, (chains, draws, ...), the seconds of sampling alone, and of a run of one draw.

    The loop is compiled in each run: of two runs of different lengths the difference is sampling.
    """
    prior = pi.numpyro.load(folder / f"{name}.safetensors")
    with np.load(folder / f"{name}.npz") as file:
        data, start = jnp.asarray(file["data"]), jnp.asarray(file["start"])
    inner = {"stars": stars_model, "conjugate": conjugate_model}[name]
    model = pi.numpyro.base_space(inner) if space == "base" else inner
    start = init_to_value(values={"z": start})
    warmup, seconds, state, z = draws // 4, [], None, None
    for count in (1, draws):
        kernel = NUTS(model, init_strategy=start, dense_mass=True, max_tree_depth=6)
        options = {"num_chains": chains, "chain_method": "vectorized", "progress_bar": False}
        mcmc = MCMC(kernel, num_warmup=warmup, num_samples=count, **options)
        began = time.process_time()
        if state is None:
            mcmc.warmup(jax.random.key(0), prior, *data)
            state = mcmc.post_warmup_state
            warmed = time.process_time() - began
            began = time.process_time()
        mcmc.post_warmup_state = state
        mcmc.run(state.rng_key, prior, *data)
        z = jax.block_until_ready(mcmc.get_samples(group_by_chain=True)["z"])
        seconds.append(time.process_time() - began)
    return np.asarray(z), seconds[1] - seconds[0], warmed, seconds[0]


def moments(z):
    """Return means, standard deviations and effective draws of a chain, (N, ...)."""
    z = z.reshape(len(z), -1)
    return z.mean(0), z.std(0), effective_sample_size(z[None])


def least_effective(z, stretch):
    """Return the effective draws of a chain's slowest number, counted in stretches of draws.

    A short chain does not see how slowly it mixes: of chains of different lengths the long one
    would seem to mix more slowly.
    """
    parts = z.reshape(-1, stretch, math.prod(z.shape[1:]))
    return sum(effective_sample_size(part[None]) for part in parts).min()


def print_nuts(engines, folder, args):
    """Print effective draws a second of each engine, and how posteriors compare."""
    head = ["model", "space", "engine", "draws", "s", "effective", "a second", "NumPyro's ratio"]
    head += ["means apart [s. e.]", "sd ratio"]
    print(f"\n| {' | '.join(head)} |\n|{' --- |' * len(head)}")
    notes = []
    for name in MODELS:
        for space in ("base",) if args.smoke else ("base", "data"):
            count = 20 if args.smoke else 20 * args.draws
            z, seconds, warmed, compiled = by_numpyro(folder, name, space, count)
            mean, sd, effective = moments(z[0])
            least = least_effective(z[0], args.draws)
            fast = least / seconds
            line = [name, space, "NumPyro", count, f"{seconds:.1f}", f"{least:.0f}"]
            print(f"| {' | '.join(map(str, line))} | {fast:.2f} | | | |", flush=True)
            notes.append(
                f"{name}, {space} space: warm-up of {count // 4} with compiling {warmed:.1f} s, "
                f"a run of one draw, compiled anew, {compiled:.1f} s"
            )
            for engine, process in engines.items():
                (found,) = by_pyro(process, "nuts", name, space)
                other, other_sd, few = moments(np.load(folder / "draws.npy"))
                slow = few.min() / found["seconds"]
                apart = (other - mean) / np.sqrt(sd**2 / effective + other_sd**2 / few)
                ratio = other_sd / sd
                line = [name, space, engine, args.draws, f"{found['seconds']:.1f}"]
                line += [f"{few.min():.0f}", f"{slow:.2f}", f"{fast / slow:.0f}"]
                line += [f"{np.abs(apart).max():.1f}", f"{ratio.min():.2f} to {ratio.max():.2f}"]
                print(f"| {' | '.join(map(str, line))} |", flush=True)
    print("\n" + "\n".join(notes))


def print_chains(folder, args):
    """Print what four chains side by side cost beside one."""
    count = 20 if args.smoke else 10 * args.draws
    _, one, _, _ = by_numpyro(folder, "conjugate", "base", count)
    _, four, _, _ = by_numpyro(folder, "conjugate", "base", count, chains=4)
    print(f"\nfour vectorized chains take {four / one:.1f} times as long as one: {four:.1f} s")


def main():
    """Print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--old", type=Path, help="a checkout of version 0.1.0")
    parser.add_argument("--draws", type=int, default=150, help="of Pyro, after as many to warm up")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    args.draws = 10 if args.smoke else args.draws
    roots = {"0.1.0": args.old.resolve()} if args.old else {}
    roots["Pyro"] = HERE.parent
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as processes:
        folder = Path(scratch)
        engines = {}
        for engine, root in roots.items():
            engines[engine] = processes.enter_context(started(root, folder, args))
        by_pyro(next(iter(engines.values())), "files")
        print_gradients(engines, folder, args)
        print_nuts(engines, folder, args)
        print_chains(folder, args)


if __name__ == "__main__":
    main()
