r"""How well does a guide match a posterior? Twelve of posteriordb, two mixtures, NUTS.

Each cell trains one guide on one model for the same wall time in a process of its own, and appends
a JSON line; a rerun skips finished cells; the table is made from the lines. No method sees the
reference draws: they score alone. Scores are taken where positive scales are logged:

mean        worst error of a mean, in reference standard deviations
sd          worst ratio of standard deviations, the farther from 1
C2ST        accuracy of a small classifier, 5,000 raw draws against 5,000 reference draws (5-fold)
quantile    worst error of a 1% or 99% quantile, in reference standard deviations
R-hat       split, of chains by NUTS, whose seconds are with their warm-up
k-hat       of 5,000 weights p / q

python benchmarks/posteriors.py --data DIR            # hours on 2 cores
python benchmarks/posteriors.py --smoke               # a minute, on a made-up posterior
python benchmarks/posteriors.py --data DIR --methods fit_guide "fit_guide in NumPyro" \
    --tasks kilpisjarvi arma mesquite eight_schools --nuts-tasks    # the same models in NumPyro
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
import warnings
from pathlib import Path

from _cells import Cells
from _posteriors import FILES, load

METHODS = ("AutoNormal", "AutoMultivariateNormal", "AutoIAFNormal", "zuko NSF", "SVI", "fit_guide")
TWIN = "fit_guide in NumPyro"  # of models written in NumPyro, where jax is installed
IN_NUMPYRO = ("smoke", "eight_schools", "arma", "kilpisjarvi", "mesquite")
STUDENT = "base space of the guide's student"
COMPILED = ", compiled"  # by NUTS(jit_compile=True)
WAYS = ("guide's base space", STUDENT, "centred", "LocScaleReparam")
SAMPLERS = (*WAYS, *(way + COMPILED for way in WAYS))
MIXTURES, NUTS_TASKS = ("mixture2", "mixture8"), ("eight_schools", "funnel")
CHUNK, PARTICLES, CHAINS = 500, 16, 10
SHARE = 0.2  # of the time, for the Gaussian that zuko's flow and ours by SVI start from


# ---- methods: a function from a model and seconds to (sites, log weights, extras) -------


def svi(model, guide, seconds, rate):
    """Train a guide by Adam on the evidence bound, its rate falling over the time."""
    import torch
    from pyro.infer import Trace_ELBO

    start = time.monotonic()
    elbo = Trace_ELBO(num_particles=PARTICLES, vectorize_particles=True)
    loss = elbo(model, guide)
    loss()
    parameters = [p for p in loss.parameters() if p.requires_grad]
    optimizer, step = torch.optim.Adam(parameters, lr=rate), 0
    while (spent := (time.monotonic() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * spent))
        optimizer.zero_grad()
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        if all(p.grad is None or bool(torch.isfinite(p.grad).all()) for p in parameters):
            optimizer.step()
        step += 1
    return {"steps": step}


def drawn(model, guide, count):
    """Return raw draws by site, each (count, *site_shape), and log p / q, (count,)."""
    import pyro
    import torch
    from pyro import poutine

    with torch.no_grad():
        values = guide()
        nodes = poutine.trace(poutine.condition(model, values)).get_trace().nodes.values()
    shapes = {name: value.shape for name, value in values.items()}
    frames = [f for n in nodes if n["type"] == "sample" for f in n["cond_indep_stack"]]
    nesting = max((-f.dim for f in frames if f.vectorized), default=0)
    parts, weights = [], []
    for size in torch.arange(count).split(CHUNK):
        with torch.no_grad(), pyro.plate("_draws", len(size), dim=-1 - nesting):
            q = poutine.trace(guide).get_trace()
            p = poutine.trace(poutine.replay(model, q)).get_trace()
        log_weight = torch.zeros(len(size), dtype=torch.float64)
        for sign, trace in ((1, p), (-1, q)):
            trace.compute_log_prob()
            for node in trace.nodes.values():
                if "log_prob" in node:
                    value = (
                        node["log_prob"].double().expand(len(size), *node["log_prob"].shape[1:])
                    )
                    log_weight += sign * value.reshape(len(size), -1).sum(-1)
        parts.append({n: p.nodes[n]["value"].reshape(len(size), *shapes[n]) for n in shapes})
        weights.append(log_weight)
    return {n: torch.cat([part[n] for part in parts]) for n in shapes}, torch.cat(weights)


def gaussian(model, seconds):
    """Return a multivariate normal guide trained by SVI."""
    from pyro.infer.autoguide import AutoMultivariateNormal, init_to_feasible

    guide = AutoMultivariateNormal(model, init_loc_fn=init_to_feasible)
    svi(model, guide, seconds, 2e-2)
    return guide


def pyro_guide(name):
    """Return the method of one of Pyro's own guides."""

    def method(model, seconds, count):
        import pyro.infer.autoguide as autoguide

        options = {"num_transforms": 2, "hidden_dim": [64, 64]} if "IAF" in name else {}
        guide = getattr(autoguide, name)(model, init_loc_fn=autoguide.init_to_feasible, **options)
        extra = svi(model, guide, seconds, 3e-3 if "IAF" in name else 2e-2)
        return *drawn(model, guide, count), extra

    return method


def interpolant(model):
    """Return our guide, as it is by default."""
    from pyro.infer.autoguide import init_to_feasible

    import pyro_interpolant as pi

    return pi.AutoInterpolant(model, init_loc_fn=init_to_feasible)


def ours_svi(model, seconds, count):
    """Way 1: through the solver, from a Gaussian."""
    guide = interpolant(model)
    guide.start_from(gaussian(model, SHARE * seconds))
    extra = svi(model, guide, (1 - SHARE) * seconds, 2e-3)
    return *drawn(model, guide, count), extra


def ours(model, seconds, count):
    """Way 3: from the model alone, with no gradient through an ODE."""
    import pyro_interpolant as pi

    guide = interpolant(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a poor k-hat: it is in the table
        result = pi.fit_guide(guide, max_seconds=seconds, seed=0, progress=False)
    extra = {
        "log_evidence": result.log_evidence,
        "log_evidence_stderr": result.log_evidence_stderr,
    }
    extra |= {"rounds": len(result.training.rounds), "k_hat": result.k_hat}
    return *drawn(model, guide, count), extra


def zuko_flow(model, seconds, count):
    """A neural spline flow of zuko, by the evidence bound, in the coordinates of a Gaussian."""
    import torch
    import zuko
    from pyro.infer.autoguide import init_to_feasible

    import pyro_interpolant as pi

    start = time.monotonic()
    base = gaussian(model, SHARE * seconds)
    with torch.no_grad():
        z = base.get_posterior().sample((4000,))
    density = pi.log_joint(pi.AutoInterpolant(model, init_loc_fn=init_to_feasible))
    loc, root = z.mean(0), torch.linalg.cholesky(z.T.cov())
    log_det = root.diagonal().log().sum()
    flow = zuko.flows.NSF(z.shape[1], transforms=3, hidden_features=(128, 128), bins=8)
    optimizer, rate, step = torch.optim.Adam(flow.parameters(), lr=1e-3), 1e-3, 0
    while (spent := (time.monotonic() - start) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * spent))
        w, log_q = flow().rsample_and_log_prob((64,))
        loss = (log_q - log_det - density(loc + w @ root.T)).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(flow.parameters(), 10.0)
        if all(
            bool(torch.isfinite(p.grad).all()) for p in flow.parameters() if p.grad is not None
        ):
            optimizer.step()
        step += 1
    with torch.no_grad():
        w, log_q = flow().rsample_and_log_prob((count,))
        x = loc + w @ root.T
        weights = density(x) - (log_q - log_det)
    return density.unpack(x), weights.double(), {"steps": step}


def method_of(name):
    """Return the training function of a method."""
    own = {"SVI": ours_svi, "fit_guide": ours, "zuko NSF": zuko_flow}
    return own.get(name) or pyro_guide(name)


# ---- scores ---------------------------------------------------------------------------------


def c2st(x, y, seed=0):
    """Return the accuracy of a small classifier between two samples, by 5-fold validation."""
    import numpy as np
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    classifier = MLPClassifier((64, 64), max_iter=60, early_stopping=True, random_state=seed)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    label = np.r_[np.zeros(len(x)), np.ones(len(y))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of iterations that came to their end
        return float(cross_val_score(classifier, np.r_[x, y], label, cv=folds).mean())


def scores(x, reference, rows, floor):
    """Return how far draws are from reference draws, each (N, D)."""
    import torch

    loc, scale = reference.mean(0), reference.std(0)
    x, reference = ((s - loc) / scale for s in (x, reference))
    x = x.nan_to_num(0.0, 30.0, -30.0).clamp(-30, 30)
    half = min(rows, len(reference) // 2)
    levels = torch.tensor([0.01, 0.99], dtype=x.dtype)
    ratio = x.std(0)
    tails = x.quantile(levels, 0) - reference.quantile(levels, 0)
    return {
        "mean": float(x.mean(0).abs().max()),
        "sd": float(ratio[ratio.log().abs().argmax()]),
        "quantile": float(tails.abs().max()),
        "c2st": c2st(x[:half].numpy(), reference[:half].numpy()),
        "floor": floor or c2st(reference[half : 2 * half].numpy(), reference[:half].numpy()),
    }


def run_guide(args):
    """Train one guide on one target, and return its numbers."""
    import torch

    from pyro_interpolant.diagnostics.psis import effective_sample_size, pareto_smooth

    target = load(args.task, args.data)
    start = time.monotonic()
    if args.cell == TWIN:
        from _numpyro_posteriors import fitted

        sites, weights, extra = fitted(args.task, args.data, args.seconds, args.rows)
    else:
        sites, weights, extra = method_of(args.cell)(target.model, args.seconds, args.rows)
    spent = time.monotonic() - start
    x = target.coordinates(sites)
    weights = weights.detach().nan_to_num(-math.inf, -math.inf, -math.inf)
    line = {"seconds": spent, "elbo": float(weights[torch.isfinite(weights)].mean())}
    if bool(torch.isfinite(weights).any()):
        line |= {
            "k_hat": pareto_smooth(weights).k_hat,
            "ess": effective_sample_size(weights) / len(weights),
        }
    line |= scores(x, target.reference, args.rows, args.floor) | extra
    if target.means is not None:
        nearest = torch.cdist(x, target.means.double()).argmin(1)
        shares = torch.bincount(nearest, minlength=4) / len(x)
        line["share_error"] = float((shares - target.shares).abs().max())
    return line


def bulk_ess(chains):
    """Return the bulk effective sample size of chains, (C, N): rank-normalised, split."""
    import torch
    from pyro.ops.stats import effective_sample_size

    half = chains.shape[1] // 2
    split = torch.cat((chains[:, :half], chains[:, half : 2 * half])).double()
    ranks = split.flatten().argsort().argsort().double() + 1
    z = torch.special.ndtri((ranks - 0.375) / (split.numel() + 0.25)).reshape(split.shape)
    return float(effective_sample_size(z, chain_dim=0, sample_dim=1))


def run_nuts(args):
    """Sample a funnel by NUTS in one of the ways, and return effective draws per second."""
    import pyro
    import torch
    from _pyro_speed import gradients_counted
    from pyro.infer import MCMC, NUTS
    from pyro.infer.reparam import LocScaleReparam
    from pyro.ops.stats import split_gelman_rubin

    import pyro_interpolant as pi

    target, inner, prepared = load(args.task, args.data), None, 0.0
    model, base = target.model, None
    way, compiled = args.cell.removesuffix(COMPILED), args.cell.endswith(COMPILED)
    options = {"jit_compile": compiled, "ignore_jit_warnings": True}
    if way == "LocScaleReparam":
        site = "theta" if args.task == "eight_schools" else "x"
        model = pyro.poutine.reparam(model, config={site: LocScaleReparam(0.0)})
    elif way != "centred":
        start, inner = time.monotonic(), interpolant(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pi.fit_guide(inner, max_seconds=args.seconds, seed=0, progress=False)
        student = None
        if way == STUDENT:
            student = pi.distill(inner.get_posterior(), seed=0, progress=False).distribution
        prepared = time.monotonic() - start
        model = base = pi.neutra(inner, student=student)
    calls, chains, start = gradients_counted(), [], time.monotonic()
    for seed in range(CHAINS):
        pyro.set_rng_seed(seed)
        count, kernel = args.nuts_samples, NUTS(model, **options)
        mcmc = MCMC(kernel, num_samples=count, warmup_steps=count, disable_progbar=True)
        mcmc.run()
        draws = mcmc.get_samples()
        chains.append(base.samples(draws) if base is not None else draws)
    spent = time.monotonic() - start
    names = ("mu", "tau") if args.task == "eight_schools" else ("v",)
    values = {n: torch.stack([c[n].reshape(-1) for c in chains]) for n in names}
    if "tau" in values:
        values["tau"] = values["tau"].log()
    ess = min(bulk_ess(v) for v in values.values())
    r_hat = max(float(split_gelman_rubin(v.double())) for v in values.values())
    columns = {"mu": -2, "tau": -1, "v": 0}
    known = {n: target.reference[:, columns[n]] for n in names}
    apart = max(
        float((v.mean() - known[n].mean()).abs() / known[n].std()) for n, v in values.items()
    )
    return {
        "ess": ess,
        "seconds": spent,
        "ess_per_second": ess / spent,
        "ess_per_1000_gradients": 1000 * ess / calls[0],
        "r_hat": r_hat,
        "mean": apart,
        "prepared": prepared,
    }


def run_cell(args):
    """Run one cell, and print a JSON line."""
    import pyro
    import torch

    torch.set_num_threads(args.threads)
    pyro.settings.set(module_local_params=True)
    pyro.set_rng_seed(args.seed)
    torch.optim.Adam([torch.zeros(1, requires_grad=True)])  # its first use imports for seconds
    sampled = args.cell in SAMPLERS
    print(json.dumps(run_nuts(args) if sampled else run_guide(args)))


# ---- the parent ---------------------------------------------------------------------------------


def cells(args):
    """Return what is wanted, as dictionaries."""
    common = {f"asked_{k}": getattr(args, k) for k in ("seconds", "threads", "seed", "rows")}
    for task in args.tasks:
        for method in args.methods:
            if method != TWIN or task in IN_NUMPYRO:
                yield {"task": task, "method": method, **common}
    common["asked_nuts_samples"] = args.nuts_samples
    for task in args.nuts_tasks:
        for method in SAMPLERS:
            yield {"task": task, "method": method, **common}


def number(value, digits=2):
    """Return a number in few digits, or a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def tables(done, args):
    """Return the Markdown tables of the finished cells."""
    head = ["posterior", "guide", "C2ST", "floor", "mean", "sd", "quantile", "k-hat", "ELBO"]
    head += ["log-evidence", "seconds"]
    out = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    for task in args.tasks:
        for method in args.methods:
            v = done.get((task, method))
            if v is None:
                continue
            evidence = number(v.get("log_evidence"), 3)
            if "share_error" in v:
                evidence += f" (shares within {v['share_error']:.3f})"
            row = [task, method, number(v["c2st"], 3), number(v["floor"], 3)]
            row += [number(v.get(k)) for k in ("mean", "sd", "quantile", "k_hat", "elbo")]
            out.append("| " + " | ".join([*row, evidence, number(v["seconds"], 0)]) + " |")
    if args.nuts_tasks:
        head = f"| NUTS, {CHAINS} chains | in | bulk ESS / s | of 1,000 gradients |"
        out += ["", head + " bulk ESS | s | R-hat | mean | training, s |"]
        out.append("| --- " * 9 + "|")
    for task in args.nuts_tasks:
        for method in SAMPLERS:
            v = done.get((task, method))
            if v is not None:
                names = "ess_per_second", "ess_per_1000_gradients", "ess", "seconds"
                few = [number(v[k]) for k in names]
                few += [number(v["r_hat"], 3), number(v["mean"]), number(v["prepared"], 0)]
                out.append(f"| {task} | {method} | " + " | ".join(few) + " |")
    return "\n".join(out)


def parsed():
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--data", type=Path, default=Path("."), help="a folder of posteriordb's .npz files")
    add("--seconds", type=float, default=120.0, help="wall time of training in each cell")
    add("--tasks", nargs="*", default=[*FILES, *MIXTURES])
    add("--methods", nargs="+", choices=(*METHODS, TWIN), default=list(METHODS))
    add("--nuts-tasks", nargs="*", choices=NUTS_TASKS, default=list(NUTS_TASKS))
    add("--nuts-samples", type=int, default=500, help="of a chain, after as many for warm-up")
    add("--rows", type=int, default=5000, help="draws that are scored")
    add("--threads", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path(__file__).parent / "results" / "posteriors.jsonl")
    add("--smoke", action="store_true")
    add("--cell", help=argparse.SUPPRESS)
    add("--floor", type=float, help=argparse.SUPPRESS)  # of an earlier cell of the task
    add("--task", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Run the cells that are missing, one at a time, and print the tables."""
    args = parsed()
    if args.cell:
        run_cell(args)
        return
    scratch = tempfile.TemporaryDirectory()
    if args.smoke:
        args.tasks, args.nuts_tasks, args.seconds, args.rows = ["smoke"], [], 0.3, 100
        args.threads = 1
        args.methods = ["AutoIAFNormal", "SVI", "fit_guide"]
        args.methods += [TWIN] if importlib.util.find_spec("numpyro") else []
        args.out = Path(scratch.name) / "smoke.jsonl"
    for name in ("tasks", "nuts_tasks"):
        there = [
            t
            for t in getattr(args, name)
            if t not in FILES or (args.data / f"{FILES[t]}.npz").exists()
        ]
        setattr(args, name, there)
    finished, done = Cells(args.out), {}
    for cell in cells(args):
        task, method = cell["task"], cell["method"]
        if line := finished.find(cell):
            done[task, method] = line
            continue
        command = [sys.executable, __file__, "--cell", method, "--task", task]
        for name in ("seconds", "threads", "seed", "rows", "data", "nuts_samples"):
            command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        floors = [v["floor"] for (other, _), v in done.items() if other == task and "floor" in v]
        command += ["--floor", str(floors[0])] if floors else []
        child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if child.returncode:
            failed = f"{task}, {method}: failed with {child.returncode}"
            if args.smoke:  # of what is there, all has to run
                raise SystemExit(failed)
            print(failed, file=sys.stderr, flush=True)
            continue
        line = finished.add(cell, json.loads(child.stdout.splitlines()[-1]))
        done[task, method] = line
        print(f"{task}, {method}: {line}", file=sys.stderr, flush=True)
    print(f"{args.seconds:g} s each, {args.threads} threads, {platform.machine()}.\n")
    print(tables(done, args))


if __name__ == "__main__":
    main()
