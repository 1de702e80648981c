"""What ``numpyro_speed.py`` runs of Pyro, in a process of its own, of this version or 0.1.0.

    python benchmarks/_pyro_speed.py FOLDER

It reads lines of JSON, and answers each by lines of JSON and an empty one:

    ["files"]                       # trains the flows, and writes them
    ["gradients", "8 default:1"]    # a line for each cell
    ["nuts", "stars", "base"]

Only names that version 0.1.0 has are used here.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_value

import pyro_interpolant as pi

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
SHAPES = {"2 128x128x128": (2, (128,) * 3), "8 256x256": (8, (256,) * 2), "8 default": (8, None)}
STEPS, STARS = 9, 3


def write_files(folder, smoke):
    """Train the priors, make untrained flows, and write all of them with what is observed."""
    import stellar_distances as stars
    from numpyro_prior import precise

    for name, (dim, hidden) in SHAPES.items():
        torch.manual_seed(0)
        transform = pi.interpolant_transform(dim, hidden, solver=pi.FixedGrid(STEPS))
        with torch.no_grad():  # what a velocity costs does not depend on its weights
            transform.velocity.output.weight.normal_(std=0.1)
        pi.save(pi.InterpolantDistribution(transform).freeze(), folder / f"{name}.safetensors")
    pyro.set_rng_seed(0)

    def few():
        tiny = pi.VelocityMLP(2, (16, 16))
        return {"steps": 20, "tolerance": 1e3, "network": tiny} if smoke else {}

    magnitude, colour, error, absolute = precise()
    known = torch.stack((colour, absolute), -1)
    test, train = torch.randperm(len(known)).split((STARS, len(known) - STARS))
    prior = pi.from_samples(known[train], seed=0, progress=False, **{"steps": 5000, **few()})
    pi.save(prior, folder / "stars.safetensors")
    exact = stars.parallax_of(absolute[test], magnitude[test])
    columns = (magnitude[test], colour[test], error[test], exact * (1 + torch.randn(STARS) / 2))
    start = torch.stack((colour[test], absolute[test]), -1)
    np.savez(folder / "stars.npz", start=start, data=torch.stack((*columns, exact / 2)))
    x = torch.randn(8000, 2) @ torch.tensor([[1.0, 0.0], [0.8, 0.6]]).T
    prior = pi.from_samples(x, seed=0, progress=False, **{"steps": 500, **few()})
    pi.save(prior, folder / "conjugate.safetensors")
    np.savez(folder / "conjugate.npz", start=torch.zeros(2), data=torch.tensor([1.0, -0.5]))


def milliseconds(function, seconds):
    """Return what a call costs, of as many as there is time for."""
    function()
    start, count = time.process_time(), 0
    while count < 3 or time.process_time() - start < seconds:
        function()
        count += 1
    return 1e3 * (time.process_time() - start) / count


def gradients_counted():
    """Return a list of one number: of the gradients that Pyro's samplers take from here on."""
    calls, gradient = [0], pyro.ops.integrator.potential_grad

    def counted(*args):
        calls[0] += 1
        return gradient(*args)

    pyro.ops.integrator.potential_grad = counted
    return calls


def print_gradients(folder, cells, seconds):
    """Print what a gradient costs, in both spaces, for each shape and number of rows."""
    for name, rows in cells:
        flow = pi.load(folder / f"{name}.safetensors")
        x = torch.randn(*([rows] if rows > 1 else []), flow.event_shape[0])
        for space, function in {
            "data": lambda z, flow=flow: flow.log_prob(z).sum(),
            "base": lambda z, flow=flow: flow.transform(z).square().sum(),
        }.items():

            def gradient(function=function, x=x):
                leaf = x.clone().requires_grad_()
                torch.autograd.grad(function(leaf), leaf)

            cell = {"name": name, "rows": rows, "space": space}
            print(json.dumps({**cell, "ms": milliseconds(gradient, seconds)}), flush=True)


def stars_model(prior, magnitude, colour, colour_error, parallax, parallax_error):
    with pyro.plate("stars", len(magnitude)):
        z = pyro.sample("z", prior)
        pyro.sample("colour", dist.Normal(z[..., 0], colour_error), obs=colour)
        expected = 10 ** (0.2 * (z[..., 1] - magnitude + 10))
        pyro.sample("parallax", dist.Normal(expected, parallax_error), obs=parallax)


def conjugate_model(prior, *y):
    z = pyro.sample("z", prior)
    pyro.sample("y", dist.Normal(z, 0.5).to_event(1), obs=torch.stack(y))


def print_nuts(folder, name, space, count):
    """Sample, write the draws of z, and print how long it took after the warm-up."""
    pyro.set_rng_seed(0)
    prior = pi.load(folder / f"{name}.safetensors")
    with np.load(folder / f"{name}.npz") as file:
        data, start = torch.tensor(file["data"]), torch.tensor(file["start"])
    inner = {"stars": stars_model, "conjugate": conjugate_model}[name]
    model = pi.base_space(inner) if space == "base" else inner
    began, warm = time.process_time(), []

    def note(_kernel, _samples, stage, _i):
        if stage != "Sample":
            warm[:] = [time.process_time()]

    start = init_to_value(values={"z": start})
    kernel = NUTS(model, init_strategy=start, full_mass=True, max_tree_depth=6)
    mcmc = MCMC(kernel, count, count, disable_progbar=True, hook_fn=note)
    mcmc.run(prior, *data)
    end = time.process_time()
    draws = mcmc.get_samples()
    z = draws["z"] if space == "data" else prior.transform(draws["z_base"])
    np.save(folder / "draws.npy", z.detach().numpy())
    print(json.dumps({"warmup": warm[0] - began, "seconds": end - warm[0]}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--draws", type=int, default=150)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for line in sys.stdin:
        what, *rest = json.loads(line)
        if what == "files":
            write_files(args.folder, args.smoke)
        elif what == "gradients":
            cells = [(cell.rpartition(":")[0], int(cell.rpartition(":")[2])) for cell in rest]
            print_gradients(args.folder, cells, 0.01 if args.smoke else 1.0)
        else:
            print_nuts(args.folder, *rest, args.draws)
        print(flush=True)


if __name__ == "__main__":
    main()
