"""Kill runs at random moments with SIGKILL, resume them, and compare every result to the bit.

python benchmarks/kill_resume.py --kills 20 --seed 0

Each run is killed once, some random time after a random step, and resumed by the same call; its
weights, buffers and solver are compared with those of an uninterrupted one. The state is written
every few steps, so kills fall into writing too. Every run is a process of its own, forked
from one that has imported everything and trained nothing. One JSON line a run.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from pathlib import Path

import torch

import pyro_interpolant as pi

EVERY = 3  # steps from one state to the next


def train(path, tell, steps, *, keep):
    """Train and save; the bytes of the saved flow are what is compared."""
    torch.manual_seed(0)
    x = torch.randn(2000, 2)
    x[:, 1] += x[:, 0] ** 2
    flow = pi.InterpolantDistribution(pi.interpolant_transform(2, (32, 32)))
    options = {"steps": steps, "batch_size": 256, "seed": 3, "tolerance": 0.1}
    if keep:
        options.update(checkpoint=path, checkpoint_every=EVERY)
    pi.fit(flow, x, progress=False, callback=tell, **options)
    flow.report = None  # which tells the time
    pi.save(flow, path.with_name(path.name + ".done"))


def started(path, steps, *, keep=True):
    """Start a run in a process of its own; return its number and where it tells its steps."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, os.fdopen(read)
    code = 1
    try:  # the child; it never returns
        os.close(read)
        with os.fdopen(write, "w", buffering=1) as told:
            train(path, lambda state: print(state.step, file=told), steps, keep=keep)
        code = 0
    finally:
        os._exit(code)


def finished(path, steps, *, keep=True):
    """Run to the end; return the first step it told of, if any, and the bytes of the result."""
    child, told = started(path, steps, keep=keep)
    with told:
        lines = told.read().split()
    if os.waitpid(child, 0)[1]:
        raise SystemExit("a run failed")
    return int(lines[0]) if lines else None, path.with_name(path.name + ".done").read_bytes()


def killed(path, steps, draw):
    """Start a run and kill it; return the step and the delay after it."""
    step, seen, pace, before = draw.randint(1, steps - 2), 0, 0.0, time.monotonic()
    child, told = started(path, steps)
    with told:
        for line in told:
            now = time.monotonic()
            seen, before, pace = int(line), now, now - before
            if seen >= step:
                break
        delay = draw.random() * min(2 * pace, 0.5)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return seen, delay


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    draw, same = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        _, whole = finished(Path(folder) / "whole", args.steps, keep=False)
        for number in range(args.kills):
            path = Path(folder) / f"run{number}"
            step, delay = killed(path, args.steps, draw)
            again, result = finished(path, args.steps)
            resumed = step < EVERY or again is None or again > EVERY  # and did not start anew
            same += result == whole and resumed
            line = {
                "kill": number, "after step": step, "and ms": round(1000 * delay, 1),
                "resumed at step": again, "identical": result == whole and resumed,
            }  # fmt: skip
            print(json.dumps(line), flush=True)
    print(f"{same} of {args.kills} results identical")
    raise SystemExit(same != args.kills)


if __name__ == "__main__":
    main()
