"""What a training step costs beyond its network: all of `fit` against a bare forward and backward.

A step of `fit` draws rows, times and base draws, evaluates the interpolant and its rate, clips,
steps AdamW and averages the weights. Between any two looks at the held-out loss the same network
takes as many bare steps (forward, mean square, backward) on one batch that stays, so that both
meet the same machine. Looks are not counted: each evaluates 8,192 draws, as much as two or three
steps, and a run of 6,000 steps has some 130 of them.

    python benchmarks/step_cost.py             # minutes
    python benchmarks/step_cost.py --smoke     # seconds
"""

import argparse
import copy
import math
import platform
import statistics
import time

import torch

import pyro_interpolant as pi

CASES = ((2, None), (11, None), (24, None), (63, None), (63, (256, 256)), (8, (512, 512)))
TIMES = 64  # distinct ones in a batch, which share their embedding, as in `fit`


def bare_steps(network, batch, count):
    """Return the seconds that forward and backward alone take, `count` times."""
    t, x, target = batch
    start = time.perf_counter()
    for _ in range(count):
        network.zero_grad()
        ((network(t, x) - target) ** 2).mean().backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(flow, rows, batch_size, looks, between):
    """Return milliseconds of a bare step, and `looks` ratios of a whole step to a bare one.

    Looks themselves are left out of whole steps: early in a run they come often.

    Args:
        flow: An untrained flow.
        rows: What it is trained on, shape ``(N, *event_shape)``.
        batch_size: Rows per step.
        looks: How many ratios.
        between: The fewest steps of each.
    """
    torch.manual_seed(0)
    network = copy.deepcopy(flow.transform.velocity)
    times = math.gcd(TIMES, batch_size)
    shape = (times, batch_size // times, network.event_dim)
    batch = torch.rand(times, 1), torch.randn(shape), torch.randn(shape)
    batch = tuple(part.to(flow.transform.flow.loc.device) for part in batch)
    whole, bare, state = [], [], {"steps": 0, "seconds": 0.0, "at": 0, "from": None}

    def look(now):
        if state["from"] is not None:
            state["steps"] += now.step - state["at"]
            state["seconds"] += began + now.seconds - state["from"]
        if state["steps"] >= between:
            whole.append(state["seconds"] / state["steps"])
            bare.append(bare_steps(network, batch, state["steps"]) / state["steps"])
            state["steps"], state["seconds"] = 0, 0.0
        state["at"], state["from"] = now.step, time.monotonic()
        return len(whole) == looks

    began = time.monotonic()
    pi.fit(
        flow, rows, validation=rows[:64], batch_size=batch_size, steps=100 * between,
        whiten=False, seed=0, progress=False, callback=look, tolerance=1e3,
    )  # fmt: skip
    return 1e3 * statistics.median(bare), [a / b for a, b in zip(whole, bare, strict=True)]


def main():
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    if args.smoke:
        args.threads, args.batch_size = 1, 128
    torch.set_num_threads(args.threads)
    looks, between = (2, 1) if args.smoke else (10, 200)
    print(f"{args.threads} threads, {platform.machine()}, torch {torch.__version__},")
    print(f"batches of {args.batch_size}.\n")
    print("| D | hidden layers | bare step, ms | whole / bare | quartiles |")
    print("| --- | --- | --- | --- | --- |")
    for dim, hidden in CASES[:1] if args.smoke else CASES:
        flow = pi.InterpolantDistribution(pi.interpolant_transform(dim, hidden))
        bare, found = ratios(flow, torch.randn(20_000, dim), args.batch_size, looks, between)
        low, middle, high = statistics.quantiles(found, n=4)
        name = "default" if hidden is None else str(list(hidden))
        spread = f"{middle:.2f} | {low:.2f} to {high:.2f}"
        print(f"| {dim} | {name} | {bare:.2f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
