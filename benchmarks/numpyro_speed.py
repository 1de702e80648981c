"""The same file in Pyro and in NumPyro: gradients a second, NUTS, compiling, chains side by side.

Everything on one thread, in CPU seconds, in float32. Gradients are those that NUTS asks for: of a
log-density (data space) and through the map from base to data (base space), for some rows at once.
The model of NUTS is one draw of a banana that a sum of its coordinates is measured of.

    python benchmarks/numpyro_speed.py             # ten minutes
    python benchmarks/numpyro_speed.py --smoke     # seconds
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import torch
from numpyro.diagnostics import effective_sample_size
from numpyro.infer import MCMC as NumPyroMCMC
from numpyro.infer import NUTS as NumPyroNUTS
from pyro.infer import MCMC, NUTS

import pyro_interpolant as pi

SHAPES = ((2, (128, 128, 128)), (8, (256, 256)), (8, (128, 128, 128)))
STEPS = 9


def flows(flow):
    """Return a flow of torch's and its twin, through a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flow.safetensors"
        pi.save(flow, path)
        return pi.load(path), pi.numpyro.load(path)


def untrained(dim, hidden):
    """Return a flow whose velocity is not zero: what it costs does not depend on its weights."""
    torch.manual_seed(0)
    transform = pi.interpolant_transform(dim, hidden, solver=pi.FixedGrid(STEPS))
    with torch.no_grad():
        transform.velocity.output.weight.normal_(std=0.1)
    return flows(pi.InterpolantDistribution(transform).freeze())


def milliseconds(function, count):
    function()
    start = time.process_time()
    for _ in range(count):
        function()
    return 1e3 * (time.process_time() - start) / count


def gradient_rows(dim, hidden, rows, count):
    """Yield a table row for each space: milliseconds of a gradient in both, and compiling."""
    ours, theirs = untrained(dim, hidden)
    x = torch.randn(rows, dim) if rows > 1 else torch.randn(dim)
    value = jnp.asarray(x.numpy())
    spaces = {
        "data": (lambda z: ours.log_prob(z).sum(), lambda z: theirs.log_prob(z).sum()),
        "base": (
            lambda z: ours.transform(z).square().sum(),
            lambda z: jnp.square(theirs.transform(z)).sum(),
        ),
    }
    for space, (by_torch, by_jax) in spaces.items():

        def slow(by_torch=by_torch):
            leaf = x.clone().requires_grad_()
            torch.autograd.grad(by_torch(leaf), leaf)

        start = time.process_time()
        gradient = jax.jit(jax.grad(by_jax))
        gradient(value).block_until_ready()
        compiling = time.process_time() - start
        a = milliseconds(slow, count)
        b = milliseconds(lambda f=gradient: f(value).block_until_ready(), 5 * count)
        layers = "x".join(map(str, hidden))
        cells = (dim, layers, rows, space, f"{a:.2f}", f"{b:.3f}", f"{a / b:.1f}")
        yield f"| {' | '.join(map(str, cells))} | {compiling:.1f} |"


def banana(smoke):
    x = torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    x = torch.cat((x[:, :1], x[:, :1] ** 2 + 0.3 * x[:, 1:]), -1)
    options = {"steps": 20, "tolerance": 1e3} if smoke else {"steps": 1000}
    return flows(pi.from_samples(x, seed=0, progress=False, **options))


def nuts_rows(ours, theirs, warmup, samples):
    """Yield a table row for each engine and space: effective draws a second, and the mean."""

    def pyro_model():
        z = pyro.sample("z", ours)
        pyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=torch.tensor(1.0))

    def numpyro_model():
        z = numpyro.sample("z", theirs)
        numpyro.sample("y", ndist.Normal(z.sum(-1), 0.5), obs=1.0)

    def report(engine, space, chains, z, seconds):
        least = float(min(effective_sample_size(z)))
        mean = ", ".join(f"{m:.2f}" for m in z.mean((0, 1)))
        return (
            f"| {engine} | {space} | {chains} | {seconds:.1f} | {least:.0f} "
            f"| {least / seconds:.2f} | {mean} |"
        )

    for space in ("base", "data"):
        pyro.set_rng_seed(0)
        model = pi.base_space(pyro_model) if space == "base" else pyro_model
        start = time.process_time()
        mcmc = MCMC(NUTS(model), samples, warmup, disable_progbar=True)
        mcmc.run()
        seconds = time.process_time() - start
        z = mcmc.get_samples()
        z = z["z"] if space == "data" else pi.base_space(pyro_model).samples(z)["z"]
        yield report("Pyro", space, 1, z[None].numpy(), seconds)
        inner = pi.numpyro.base_space(numpyro_model) if space == "base" else numpyro_model
        for chains in (1, 4):
            options = {"num_chains": chains, "chain_method": "vectorized"}
            start = time.process_time()
            run = NumPyroMCMC(
                NumPyroNUTS(inner), num_warmup=10 * warmup, num_samples=10 * samples,
                progress_bar=False, **options,
            )  # fmt: skip
            run.run(jax.random.key(0))
            seconds = time.process_time() - start
            z = run.get_samples(group_by_chain=True)["z"]
            yield report("NumPyro", space, chains, z, seconds)


def main():
    """Print two Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| D | layers | rows | space | Pyro, ms | NumPyro, ms | ratio | compiling, s |")
    print("|" + " --- |" * 8)
    for dim, hidden in SHAPES[:1] if args.smoke else SHAPES:
        for rows in (1,) if args.smoke else (1, 100, 1000):
            count = 3 if args.smoke else max(5, 200 // rows)
            for line in gradient_rows(dim, hidden, rows, count):
                print(line, flush=True)
    print("\nNumPyro takes ten times as many draws; its seconds include compiling.\n")
    print("| engine | space | chains | s | effective draws | a second | mean |")
    print("|" + " --- |" * 7)
    warmup, samples = (5, 10) if args.smoke else (200, 200)
    for line in nuts_rows(*banana(args.smoke), warmup, samples):
        print(line, flush=True)


if __name__ == "__main__":
    main()
