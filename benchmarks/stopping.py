"""When training stops: how long after its best weights, and what they are worth.

Five sets of few or many rows, with the defaults of `from_samples` and no limit of time. A run is
measured in steps, which no other process changes: all that were taken, the step whose weights
were kept, and the held-out nats of rows that no training saw. The sixth set is normal: there is
nothing to learn.

    python benchmarks/stopping.py --data DIR             # half an hour
    python benchmarks/stopping.py --smoke                # seconds
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from _cells import Cells
from tabular import load

import pyro_interpolant as pi

TASKS = ("eight schools", "digits", "wine", "banana", "power", "normal")
SEEDS = 3


def rows_of(task, folder):
    """Return rows to learn from and rows to test on, float32 tensors of shape (N, D)."""
    random = np.random.RandomState(2)
    if task == "eight schools":  # the funnel: three effects, their mean, the log of their scale
        file = folder / "eight_schools-eight_schools_noncentered.npz"
        draws = dict(zip(*(np.load(file)[name].T for name in ("names", "draws")), strict=True))
        names = ("theta[1]", "theta[2]", "theta[3]", "mu")
        x = np.stack([*(draws[name] for name in names), np.log(draws["tau"])], 1)
        x = x[random.permutation(len(x))]
        return torch.tensor(x[:3000]).float(), torch.tensor(x[3000:]).float()
    if task == "digits":
        from sklearn.datasets import load_digits

        x = load_digits().data
        x = torch.tensor((x + random.rand(*x.shape)) / 17).float()
        order = torch.as_tensor(random.permutation(len(x)))
        return x[order[:1500]], x[order[1500:]]
    if task in ("wine", "power"):
        train, validation, test = load(task, folder)
        return torch.cat((train, validation))[:20_000], test
    x = random.randn(20_000, 2 if task == "banana" else 5)
    if task == "banana":
        x[:, 1] += x[:, 0] ** 2
    count = 10_000 if task == "banana" else 800
    return torch.tensor(x[:count]).float(), torch.tensor(x[count:]).float()


def run(task, folder, seed, options):
    """Return what a run took, and what came of it."""
    train, test = rows_of(task, folder)
    looks, start = [], time.process_time()
    flow = pi.from_samples(train, seed=seed, progress=False, callback=looks.append, **options)
    seconds = time.process_time() - start
    nats = torch.cat([flow.log_prob(rows) for rows in test[:10_000].split(2000)]).double()
    return {
        "rows": len(train),
        "dim": train.shape[1],
        "steps": looks[-1].step,
        "best": flow.report.best_step,
        "nats": float(nats.mean()),
        "error": float(nats.std() / len(nats) ** 0.5),
        "cpu": seconds,
        "report": str(flow.report),
        "looks": [(look.step, look.validation_loss) for look in looks],
    }


def table(lines):
    """Print the means over seeds."""
    print(
        "| set | rows | D | steps | best at | steps / best | nats | CPU s |\n" + "| --- " * 8 + "|"
    )
    for task in TASKS:
        cells = [line for line in lines if line["task"] == task]
        if cells:
            ratios = [c["steps"] / max(1, c["best"]) for c in cells]
            mean = {k: np.mean([c[k] for c in cells]) for k in ("steps", "best", "nats", "cpu")}
            spread = np.ptp([c["nats"] for c in cells])
            print(
                f"| {task} | {cells[0]['rows']:,} | {cells[0]['dim']} | {mean['steps']:,.0f} | "
                f"{mean['best']:,.0f} | {max(ratios):.2f} at most | {mean['nats']:.3f} "
                f"(range {spread:.3f}) | {mean['cpu']:.0f} |"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="the folder that holds density and posteriors")
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--out", type=Path, help="lines are appended; finished ones are skipped")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    options, tasks, seeds = {}, args.tasks, range(args.seeds)
    if args.smoke:
        options, tasks, seeds = {"steps": 20, "marginals": False}, ("normal",), range(1)
    done, lines = Cells(None if args.smoke else args.out), []
    for seed in seeds:
        for task in tasks:
            asked = {"task": task, "seed": seed}
            folder = args.data and args.data / (
                "posteriors" if task == "eight schools" else "density"
            )
            line = done.find(asked) or done.add(asked, run(task, folder, seed, options))
            lines.append(line)
    table(lines)


if __name__ == "__main__":
    main()
