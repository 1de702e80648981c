"""Shorter paths: how near to optimal transport, how straight after reflow, how good on real cells.

Each finished cell appends a line; a rerun skips what is there; the tables are made from the lines.

    python benchmarks/transport.py --data DIR      # an hour, 2 cores
    python benchmarks/transport.py --smoke         # seconds
"""

import argparse
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import torch
from _cells import Cells
from scipy.optimize import linear_sum_assignment

import pyro_interpolant as pi

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from gaussians import GaussianTransport  # noqa: E402

METHODS = ("trigonometric", "scalar", "matrices")


def distance(x0, x1, power):
    """Return the Wasserstein distance of two samples, to a power, by exact assignment."""
    cost = torch.cdist(x0, x1).double() ** power
    return float(cost[linear_sum_assignment(cost)].mean())


def gaussian(args, method, dim, seed):
    """Train one flow between two Gaussians, and compare with the closed forms."""
    pair = GaussianTransport(seed, dim)
    base = dist.MultivariateNormal(pair.means[0].float(), pair.covs[0].float())
    torch.manual_seed(seed)
    interpolant = {
        "trigonometric": pi.Trigonometric(),
        "scalar": pi.LearnedInterpolant(args.modes),
        "matrices": pi.LearnedInterpolant(8, event_dim=dim, matrices=True),
    }[method]
    transform = pi.interpolant_transform(dim, (128, 128), interpolant=interpolant)
    flow = pi.InterpolantDistribution(transform, base)
    data, start = pair.sample(1, args.rows).float(), time.perf_counter()
    options = {"steps": args.steps, "seed": 0, "progress": False}
    if method == "trigonometric":
        pi.fit(flow, data, **options)
    else:
        pi.learn_interpolant(flow, data, alternations=args.alternations, **options)
    energy = pi.path_energy(flow, count=args.rows // 10)
    y = flow.sample((args.rows,)).double()
    scale = pair.covs[1].diagonal().sqrt()
    cov = torch.linalg.matrix_norm(y.T.cov() - pair.covs[1]) / torch.linalg.matrix_norm(
        pair.covs[1]
    )
    # A given base and the data are centred between their means.
    trigonometric = pair.energy(pi.Trigonometric(), about=pair.means.mean(0))
    exact = {
        "trigonometric": lambda: trigonometric,
        "scalar": lambda: pair.energy(interpolant.double(), centred=True),
        "matrices": lambda: None,
    }[method]()
    return {
        "w2": pair.w2(),
        "trigonometric": trigonometric,
        "energy": energy.value,
        "stderr": energy.stderr,
        "exact": exact,
        "mean_error": float(((y.mean(0) - pair.means[1]).abs() / scale).max()),
        "cov_error": float(cov),
        "seconds": time.perf_counter() - start,
    }


def mixtures(args):
    """Shorten the path between two mixtures in the plane, and compare with exact assignment."""

    def draw(end, count):
        angle = 2 * torch.pi * (torch.randint(3, (count,)) / 3 + (0.5 if end else 0.0) / 3)
        centre = (3 if end else 1.5) * torch.stack((angle.cos(), angle.sin()), -1)
        return centre + 0.3 * torch.randn(count, 2)

    torch.manual_seed(0)
    count, few = (1000, 200) if args.smoke else (20_000, 2000)
    x0, x1, start = draw(0, count), draw(1, count), time.perf_counter()
    out = {"w2": distance(draw(0, few), draw(1, few), 2)}
    for name, interpolant, coupling in (
        ("trigonometric", pi.Trigonometric(), pi.independent),
        ("optimal pairs", pi.Linear(), pi.optimal_transport),
        (
            "network",
            pi.LearnedInterpolant(6, event_dim=2, matrices=True, network=(64, 64)),
            pi.independent,
        ),
    ):
        flow = pi.InterpolantDistribution(pi.interpolant_transform(2, interpolant=interpolant))
        options = {"base_samples": x0, "steps": args.steps, "seed": 0, "progress": False}
        if name == "network":
            pi.learn_interpolant(flow, x1, alternations=args.alternations, **options)
        else:
            # Exact assignment costs the cube of the batch.
            pi.fit(flow, x1, coupling=coupling, batch_size=256, **options)
        out[name] = pi.path_energy(flow, count=args.rows // 20).value
    return {**out, "seconds": time.perf_counter() - start}


def cells(args, source, target):
    """Carry the cells of one mouse to another, against the floor of two samples of the target."""
    with np.load(args.data / "hsct.npz") as file:
        x, subject = file["x"].astype(np.float32), file["subject"]
    random = np.random.default_rng(0)
    both = [
        x[subject == s] + random.random(x[subject == s].shape, dtype=np.float32)
        for s in (source, target)
    ]
    scale = both[1].std(0)
    x0, x1 = (torch.from_numpy(random.permutation(s / scale)) for s in both)
    held = min(len(x1) // 2, 4000)
    fresh, rest = x1[:held], x1[held:]
    start = time.perf_counter()
    flow = pi.InterpolantDistribution(pi.interpolant_transform(x.shape[1]))
    pi.fit(flow, rest, base_samples=x0, steps=args.steps, seed=0, progress=False)
    found, floor = [], []
    count = min(2000, held // 2)
    for repeat in range(5):
        torch.manual_seed(repeat)
        order = torch.randperm(held)
        one, other = fresh[order[:count]], fresh[order[count : 2 * count]]
        found.append(distance(flow.sample((count,)), one, 1))
        floor.append(distance(other, one, 1))
    return {
        "w1": float(np.mean(found)),
        "w1_sd": float(np.std(found)),
        "floor": float(np.mean(floor)),
        "before": distance(x0[:count], fresh[:count], 1),
        "count": count,
        "seconds": time.perf_counter() - start,
    }


def table_rows(args, name):
    """Return the train and test rows of a table, standardised by the training rows."""
    if name == "power":
        x = np.load(args.data / "power_41k.npz")["x"].astype(np.float64)
    else:
        x = np.load(args.data / "wine.npz")["white"].astype(np.float64)
        random = np.random.RandomState(1)
        for column in x.T:
            step = np.diff(np.unique(column))
            column += (random.rand(len(x)) - 0.5) * step[step > 1e-9].min()
    x = x[np.random.RandomState(0).permutation(len(x))]
    train, test = x[: int(0.9 * len(x))], x[int(0.9 * len(x)) :]
    mean, sd = train.mean(0), train.std(0)
    return [torch.from_numpy((s - mean) / sd).float() for s in (train, test)]


def straightened(args, name):
    """Reflow a flow trained on a table."""
    train, test = table_rows(args, name)
    start = time.perf_counter()
    torch.manual_seed(0)
    flow = pi.InterpolantDistribution(pi.interpolant_transform(train.shape[1]))
    pi.fit(flow, train, steps=2 * args.steps, seed=0, progress=False)
    result = pi.reflow(
        flow, count=args.pairs, steps=2 * args.steps, seed=0, progress=False, patience=100
    )
    test = test[:1000].double()
    values = []
    for one in (flow, result.distribution):
        one.to(torch.float64).transform.solver = pi.FixedGrid(96)
        with torch.no_grad():
            values.append(float(one.log_prob(test).mean()))
    before, after = result.before, result.after
    return {
        "errors_before": list(before.sampling_errors.values()),
        "errors_after": list(after.sampling_errors.values()),
        "steps_before": before.density_steps,
        "steps_after": after.density_steps,
        "log_prob_before": values[0],
        "log_prob_after": values[1],
        "seconds": time.perf_counter() - start,
    }


def wanted(args):
    """Return the cells by name: a function and its arguments."""
    out = {}
    for dim in args.dims:
        for seed in range(args.seeds):
            for method in args.methods:
                out[f"gaussian {dim} {seed} {method}"] = (gaussian, (method, dim, seed))
    out["mixtures"] = (mixtures, ())
    if args.data:
        out["cells 6 9"] = (cells, (6, 9))
        out["cells 5 9"] = (cells, (5, 9))
        for name in ("power", "wine"):
            out[f"reflow {name}"] = (straightened, (name,))
    return out


def report(done):
    """Return the Markdown tables of the finished cells."""
    out = ["| pair | method | W2^2 | energy | / W2^2 | gap / trigonometric gap | mean | cov | s |"]
    out.append("| --- " * 9 + "|")
    for name, r in done.items():
        if name.startswith("gaussian"):
            _, dim, seed, method = name.split()
            gap = (r["exact"] or r["energy"]) - r["w2"]
            share = gap / (r["trigonometric"] - r["w2"])
            out.append(
                f"| D = {dim}, seed {seed} | {method} | {r['w2']:.3f} | {r['energy']:.3f} +- "
                f"{r['stderr']:.3f} | {r['energy'] / r['w2']:.3f} | {share:.2f} | "
                f"{r['mean_error']:.3f} | {r['cov_error']:.3f} | {r['seconds']:.0f} |"
            )
    for name, r in done.items():
        if not name.startswith("gaussian"):
            parts = ", ".join(
                f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in r.items()
            )
            out.append(f"\n{name}: {parts}")
    return "\n".join(out)


def main():
    """Run what is missing, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, help="the folder with hsct.npz, power_41k.npz and wine.npz")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "transport.jsonl")
    add("--dims", type=int, nargs="+", default=[2, 8])
    add("--seeds", type=int, default=5)
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--modes", type=int, default=10, help="of the scalar interpolant")
    add("--steps", type=int, default=3000)
    add("--alternations", type=int, default=400)
    add("--rows", type=int, default=200_000, help="of Gaussians, to learn from and to judge by")
    add("--pairs", type=int, default=100_000)
    add("--only", default="", help="cells whose name starts so")
    add("--smoke", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    scratch = tempfile.TemporaryDirectory()
    if args.smoke:
        args.dims, args.seeds, args.steps, args.alternations = [2], 1, 5, 3
        args.methods = ["scalar"]
        args.rows, args.pairs, args.out = 2000, 2000, Path(scratch.name) / "smoke.jsonl"
    torch.set_num_threads(1)
    settings = {k: getattr(args, k) for k in ("modes", "steps", "alternations", "rows", "pairs")}
    finished, done = Cells(args.out), {}
    for name, (run, arguments) in wanted(args).items():
        if not name.startswith(args.only):
            continue
        asked = {"cell": name, **settings}
        line = finished.find(asked)
        if line is None:
            line = finished.add(asked, run(args, *arguments))
            print(f"{name}: {line['seconds']:.0f} s", file=sys.stderr, flush=True)
        done[name] = {k: v for k, v in line.items() if k not in asked}
    print(report(done))


if __name__ == "__main__":
    main()
