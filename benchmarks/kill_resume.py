"""Kill runs at random moments with SIGKILL, resume them, and compare every result to the bit.

python benchmarks/kill_resume.py --kills 20 --seed 0

Each run is killed once, some random time after a random step, and resumed by the same call; its
weights, buffers and solver are compared with those of an uninterrupted one. The state is written at
every third step, so kills fall into writing too. One JSON line a run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUN = """
import sys, torch
import pyro_interpolant as pi
torch.set_num_threads(1)
torch.manual_seed(0)
x = torch.randn(2000, 2)
x[:, 1] += x[:, 0] ** 2
flow = pi.InterpolantDistribution(pi.interpolant_transform(2, (32, 32)))
def tell(state):
    print(state.step, flush=True)
keep = {"checkpoint": sys.argv[1], "checkpoint_every": 3} if sys.argv[2] == "keep" else {}
options = {"steps": int(sys.argv[3]), "batch_size": 256, "seed": 3, "tolerance": 0.1}
pi.fit(flow, x, progress=False, callback=tell, **options, **keep)
pi.save(flow, sys.argv[1] + ".done")
"""


def started(script, path, how, steps):
    command = [sys.executable, str(script), str(path), how, str(steps)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def finished(script, path, how, steps):
    """Run to the end, and return the first step it told of and the bytes of the result."""
    told, _ = (process := started(script, path, how, steps)).communicate()
    if process.returncode != 0:
        raise SystemExit(f"the run ended with {process.returncode}")
    return int(told.split()[0]), path.with_name(path.name + ".done").read_bytes()


def killed(script, path, steps, draw):
    """Start a run and kill it; return the step and the delay after it."""
    process, step = started(script, path, "keep", steps), draw.randint(1, steps - 2)
    seen, before, pace = 0, time.monotonic(), 0.0
    for line in process.stdout:
        now = time.monotonic()
        seen, before, pace = int(line), now, now - before
        if seen >= step:
            break
    delay = draw.random() * min(2 * pace, 0.5)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return seen, delay


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    draw, same = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "run.py"
        script.write_text(RUN)
        _, whole = finished(script, Path(folder) / "whole", "not", args.steps)
        for number in range(args.kills):
            path = Path(folder) / f"run{number}"
            step, delay = killed(script, path, args.steps, draw)
            again, result = finished(script, path, "keep", args.steps)
            same += result == whole
            line = {
                "kill": number, "after step": step, "and ms": round(1000 * delay, 1),
                "resumed at step": again, "identical": result == whole,
            }  # fmt: skip
            print(json.dumps(line), flush=True)
    print(f"{same} of {args.kills} results identical")
    raise SystemExit(same != args.kills)


if __name__ == "__main__":
    main()
