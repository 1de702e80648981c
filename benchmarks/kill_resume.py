"""Kill runs at random moments with SIGKILL, resume them, and compare every result to the bit.

python benchmarks/kill_resume.py --kills 20 --seed 0

Each of the runs is killed once, at a moment drawn from the whole duration of an uninterrupted one,
resumed by the same call, and its weights, buffers and solver are compared with those of the
uninterrupted one. One JSON line a run.
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
print("ready", flush=True)
keep = {"checkpoint": sys.argv[1], "checkpoint_every": 5} if sys.argv[2] == "keep" else {}
pi.fit(flow, x, steps=int(sys.argv[3]), batch_size=256, seed=3, progress=False, **keep)
pi.save(flow, sys.argv[1] + ".done")
"""


def started(script, path, how, steps):
    command = [sys.executable, str(script), str(path), how, str(steps)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()  # imports are not what is killed
    return process


def finished(script, path, how, steps):
    """Run to the end, and return the bytes of the result and the seconds it took."""
    process, start = started(script, path, how, steps), time.monotonic()
    if process.wait() != 0:
        raise SystemExit(f"the run ended with {process.returncode}")
    return path.with_name(path.name + ".done").read_bytes(), time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    draw, same = random.Random(args.seed), 0
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "run.py"
        script.write_text(RUN)
        whole, _ = finished(script, Path(folder) / "whole", "not", args.steps)
        # How long a run takes that keeps its state: kills fall anywhere in it.
        _, seconds = finished(script, Path(folder) / "timed", "keep", args.steps)
        for number in range(args.kills):
            path, alive, tries = Path(folder), False, 0
            while not alive:  # a run that was through before its moment is no run that was killed
                tries += 1
                path = Path(folder) / f"run{number}.{tries}"
                process, moment = (
                    started(script, path, "keep", args.steps),
                    draw.random() * seconds,
                )
                time.sleep(moment)
                alive = process.poll() is None
                process.send_signal(signal.SIGKILL)
                process.wait()
            kept = path.exists() or path.with_name(path.name + ".previous").exists()
            result, _ = finished(script, path, "keep", args.steps)
            same += result == whole
            line = {
                "kill": number, "after": round(moment, 3), "of": round(seconds, 3),
                "kept": kept, "identical": result == whole,
            }  # fmt: skip
            print(json.dumps(line), flush=True)
    print(f"{same} of {args.kills} results identical")
    raise SystemExit(same != args.kills)


if __name__ == "__main__":
    main()
