"""What an exact log-density costs, against continuous and autoregressive peers.

One trained velocity per task runs inside every continuous peer, at the peer's defaults and at its
loosest setting whose mean error of log_prob is within 1e-2 nats of a tight float64 solve (with one
probe: of a tight solve with the same probe). Each peer lives in a process of its own; the parent
asks them in turn, one repeat each of log_prob and sample or of one other call, so that a ratio
compares calls made moments apart. A repeat of a short call is the median over a quarter of a
second; a cell that has used up its seconds is not repeated. Each finished cell appends a line,
with our own time from the same rounds; a rerun skips what is there.

    python benchmarks/density_cost.py --data DIR        # everything
    python benchmarks/density_cost.py --smoke           # seconds
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _cells import Cells

_CNF = tuple(
    f"{library}, {divergence}"
    for library in ("zuko CNF", "torchcfm", "flow_matching")
    for divergence in ("exact", "1 probe")
)
_PEERS = ("ours", *_CNF, "zuko NSF", "zuko MAF")
_GRADIENTS = ("gradient in x", "gradient in weights")
_TURNS = (("log_prob", "sample"), *((op,) for op in _GRADIENTS), ("training step",))
_OPS = tuple(op for turn in _TURNS for op in turn)
_SETTINGS = ("default", "matched")
_BASE = ("ours", "matched")


class Child:
    """A process of its own, asked over pipes: a JSON line each for a request and an answer."""

    def __init__(self, command):
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def send(self, request):
        """Write a request, without waiting."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def receive(self):
        """Wait for an answer."""
        line = self.process.stdout.readline()
        if not line:
            return {"failed": f"the process ended with {self.process.wait()}"}
        return json.loads(line)

    def ask(self, **request):
        """Return the answer to a request, or what failed."""
        try:
            self.send(request)
        except BrokenPipeError:
            return {"failed": f"the process ended with {self.process.wait()}"}
        return self.receive()

    def close(self):
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def _command(args, cell, dim, network):
    options = {"dim": dim, "network": network, "steps": args.steps, "rows": args.rows}
    options |= {"threads": args.threads, "data": args.data or "."}
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    hidden = ["--hidden", *map(str, args.hidden)]
    return [sys.executable, os.path.abspath(__file__), "--cell", cell, *flags, *hidden]


class Lines(Cells):
    """The finished cells of one configuration, by dimension, peer, setting and operation."""

    def __init__(self, args):
        super().__init__(args.out)
        self.network = f"{'x'.join(map(str, args.hidden))}-{args.steps}-{args.rows}-{args.threads}"
        self.config = {"config": self.network, "cell_seconds": args.cell_seconds}
        self.config["most_repeats"] = args.repeats

    def asked(self, dim, peer, setting, op):
        """Return what tells a cell from another."""
        return {"dim": dim, "peer": peer, "setting": setting, "op": op, **self.config}

    def cell(self, *key):
        """Return a finished cell, or an empty dictionary."""
        return self.find(self.asked(*key)) or {}

    def get(self, dim, peer, setting, op, field="ms"):
        """Return a field of a finished cell, or None."""
        return self.cell(dim, peer, setting, op).get(field)


def wanted(args, dim):
    """Return the cells of a dimension: (peer, setting, op)."""
    cells = []
    for op in _OPS:
        for peer in args.peers:
            continuous = peer in _CNF
            for setting in _SETTINGS:
                if op == "training step" and setting == "matched" and peer not in _PEERS[-2:]:
                    continue  # no solver in ours; theirs at its defaults
                if op in _GRADIENTS and peer.startswith("flow_matching"):
                    continue  # compute_likelihood detaches its result
                if args.quick and continuous and op in _GRADIENTS and setting == "default":
                    continue
                cells.append((peer, setting, op))
    return cells


def run(dim, args, lines):
    """Measure what is missing of one dimension."""
    missing = [c for c in wanted(args, dim) if not lines.cell(dim, *c)]
    if not missing:
        return
    start = time.perf_counter()
    network = lines.path.with_name(f"{lines.path.stem}_{dim}_{lines.network}.safetensors")
    if not network.with_suffix(".npz").exists():
        subprocess.run(_command(args, "prepare", dim, network), check=True)
    said(f"D = {dim}: trained after {time.perf_counter() - start:.0f} s")
    names = {"ours"} | {peer for peer, _, _ in missing}
    peers = [peer for peer in args.peers if peer in names]
    children = {peer: Child(_command(args, peer, dim, network)) for peer in peers}
    for child in children.values():
        child.send({"do": "start"})
    settings = {peer: child.receive() for peer, child in children.items()}
    for peer, child in children.items():
        if "failed" in settings[peer]:
            said(f"  {peer}: {settings[peer]['failed']}")
        else:
            settings[peer] |= match(dim, peer, child, settings[peer]["default"], lines)
    said(f"D = {dim}: matched after {time.perf_counter() - start:.0f} s")
    for turn in _TURNS:
        rounds(dim, [c for c in missing if c[2] in turn], children, settings, args, lines)
        said(f"D = {dim}: {', '.join(turn)} after {time.perf_counter() - start:.0f} s")
    for child in children.values():
        child.close()


def match(dim, peer, child, default, lines):
    """Return the matched setting of a peer, measuring memory and errors on the way."""
    if not lines.cell(dim, peer, "", "match"):
        # First of all: a peak never falls, and the search below goes to tight tolerances.
        first = child.ask(do="time", op="log_prob", setting=default)
        report = child.ask(do="match")
        report |= {"memory": first.get("memory"), "default": default}
        for setting in _SETTINGS:
            if report.get(setting) is not None:
                answer = child.ask(do="error", setting=report[setting])
                report[f"{setting}_error"] = answer.get("error")
        lines.add(lines.asked(dim, peer, "", "match"), report)
    return {"matched": lines.get(dim, peer, "", "match", "matched")}


def rounds(dim, missing, children, settings, args, lines):
    """Time operations of all peers in turn, and write a line for each cell."""

    def base(op):
        return ("ours", "default", op) if op == "training step" else (*_BASE, op)

    times = {cell: [] for cell in dict.fromkeys([*(base(c[2]) for c in missing), *missing])}
    answers = {}
    for _ in range(args.repeats):
        for cell, spent in times.items():
            setting = settings[cell[0]].get(cell[1])
            if setting is None or "failed" in answers.get(cell, {}):
                continue
            if sum(spent) > 1e3 * args.cell_seconds:
                continue
            answers[cell] = children[cell[0]].ask(do="time", op=cell[2], setting=setting)
            if "ms" in answers[cell]:
                spent.append(answers[cell]["ms"])
    for cell in missing:
        answer, spent, first = answers.get(cell), times[cell], times[base(cell[2])]
        found = {"ours_ms": statistics.median(first) if first else None}
        if answer is None or "failed" in answer:
            reason = (answer or settings[cell[0]]).get("failed", "no setting within tolerance")
            said(f"  {', '.join(cell)}: {reason}")
            found["failed"] = reason
        else:
            found |= {"ms": statistics.median(spent), "repeats": len(spent)}
            found |= {"spread": [min(spent), max(spent)], "memory": answer["memory"]}
        lines.add(lines.asked(dim, *cell), found)


def said(text):
    """Report progress where it does not get into the table."""
    print(text, file=sys.stderr, flush=True)


def number(value, digits=3):
    """Return a number to some significant digits, or a dash."""
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if abs(value) < 1000 else f"{value:,.0f}"


def ratio(lines, dim, peer, setting, op):
    """Return how many times our own time a peer takes, from the same rounds."""
    ms, ours = (lines.get(dim, peer, setting, op, field) for field in ("ms", "ours_ms"))
    return ms / ours if ms and ours else None


def table(dim, args, lines):
    """Return the lines of one dimension's Markdown table."""
    task = "BSDS300 patches" if dim == 63 else "12-component mixture"
    heads = ("", "setting", "error, nats", "probe sd", *_OPS, "MiB, log_prob", "MiB, all")
    out = [f"\n### D = {dim}, {task}\n", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for peer in args.peers:
        known = lines.cell(dim, peer, "", "match")
        for setting in _SETTINGS:
            chosen = known.get(setting)
            if chosen is None:
                out.append(f"| {peer} | {setting}: none |" + " - |" * (len(heads) - 2))
                continue
            text = ", ".join(f"{k} {v}" for k, v in chosen.items())
            if setting == "matched" and "calibrated" in known:
                text += f" ({known['calibrated']})"
            cells = [peer, f"{setting}: {text}", number(known.get(f"{setting}_error"), 2)]
            cells.append(number(known.get("probe_sd"), 2))
            for op in _OPS:
                if peer == "ours":
                    ms = lines.get(dim, peer, setting, op)
                    cells.append("-" if ms is None else f"{number(ms)} ms")
                else:
                    value = ratio(lines, dim, peer, setting, op)
                    cells.append("-" if value is None else f"{number(value)}x")
            peak = [lines.get(dim, peer, setting, op, "memory") or 0 for op in _OPS]
            first = setting == "default"
            cells.append(number(known.get("memory")) if first else "-")
            cells.append(number(max(peak)) if first and any(peak) else "-")
            out.append(f"| {' | '.join(cells)} |")
    return out


def targets(args, lines):
    """Return the lines of the table of what the package must reach."""
    out = ["\n### Targets\n", "| what | target | measured | |", "| --- | --- | --- | --- |"]

    def add(what, goal, value, *, at_least):
        if value is not None:
            good = value >= goal if at_least else value <= goal
            sign = ">=" if at_least else "<="
            verdict = "pass" if good else "FAIL"
            out.append(f"| {what} | {sign} {goal:g} | {number(value)} | {verdict} |")

    def against(dim, peer, op, goal, settings=_SETTINGS):
        for setting in settings:
            value = ratio(lines, dim, peer, setting, op)
            add(f"{op}, D = {dim}: {peer} ({setting}) / ours", goal, value, at_least=True)

    for dim, goal in ((8, 6), (43, 40), (63, 40)):
        against(dim, "zuko CNF, exact", "log_prob", goal)
    for dim in args.dims:
        for peer in _CNF:
            if peer.endswith("1 probe"):
                against(dim, peer, "log_prob", 1)
    for dim in args.dims:
        both = [lines.get(dim, *_BASE, op) for op in ("log_prob", "sample")]
        what = f"D = {dim}: our log_prob / our sample"
        add(what, 1.8, both[0] / both[1] if all(both) else None, at_least=False)
    for setting in _SETTINGS:
        both = [lines.get(dim, "ours", setting, "log_prob") for dim in (63, 8)]
        steps = [
            (lines.get(dim, "ours", "", "match", setting) or {}).get("steps") for dim in (63, 8)
        ]
        what = f"our log_prob: D = 63 ({steps[0]} steps) / D = 8 ({steps[1]} steps)"
        add(what, 2, both[0] / both[1] if all(both) else None, at_least=False)
    for dim in args.dims:
        against(dim, "zuko CNF, exact", "sample", 1.5, ("default",))
    for dim, goal in ((8, 400), (43, 2000)):
        against(dim, "zuko CNF, exact", "training step", goal, ("default",))
    for dim, goal in ((8, 5), (43, 2)):
        for setting in _SETTINGS:
            value = ratio(lines, dim, "zuko NSF", setting, "log_prob")
            what = f"log_prob, D = {dim}: ours / zuko NSF ({setting})"
            add(what, goal, 1 / value if value else None, at_least=False)
    return out


def header(args):
    """Return the lines that name the machine and the run."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [s for s in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in s]
        cpu = names[0].split(":")[1].strip() if names else cpu
    versions = []
    for name in ("torch", "zuko", "torchdiffeq", "torchcfm", "flow-matching"):
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{name} not installed")
    return [
        f"{cpu}, {os.cpu_count()} cores, {args.threads} threads; {', '.join(versions)}.",
        f"{args.rows} rows, float32, hidden layers {args.hidden}, {args.steps} training steps, "
        f"medians of up to {args.repeats} rounds. Ours in ms, peers as multiples of our matched "
        "time (training: of our step). Matched: mean error of log_prob within 1e-2 nats "
        "(`calibrate` also bounds the worst row: its choice is in brackets), for NSF and MAF our "
        "widths. With a probe the error is "
        "that of the solver alone. Training step: interpolant or flow-matching loss for ours, "
        "torchcfm and flow_matching, maximum likelihood for the others. MiB: what the peak "
        "resident memory grew by.",
    ]


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--dims", type=int, nargs="+", default=[2, 8, 21, 43, 63], help="63 is BSDS300")
    add("--peers", nargs="+", choices=_PEERS, default=list(_PEERS))
    add("--data", help="the folder with bsds300_8x8_uint8.npz; without it D = 63 is skipped")
    add("--out", type=Path, default=Path(__file__).parent / "results" / "density_cost.jsonl")
    add("--repeats", type=int, default=5)
    add("--cell-seconds", type=float, default=20.0, help="no repeat of a cell after this")
    add("--steps", type=int, default=1500, help="of training")
    add("--hidden", type=int, nargs="+", default=[256, 256])
    add("--rows", type=int, default=512)
    add("--threads", type=int, default=2)
    add("--quick", action="store_true", help="no gradients at the peers' defaults, 3 rounds")
    add("--smoke", action="store_true", help="D = 2, a tiny network, ours and zuko CNF alone")
    for hidden in ("--cell", "--network"):
        add(hidden, help=argparse.SUPPRESS)
    add("--dim", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Run the child, or all of them and the tables."""
    args = parsed()
    if args.cell:
        import _peers  # torch is not needed above

        (_peers.prepare if args.cell == "prepare" else _peers.serve)(args)
        return
    if args.quick:
        args.repeats, args.cell_seconds = min(3, args.repeats), min(5.0, args.cell_seconds)
    scratch = tempfile.TemporaryDirectory() if args.smoke else None
    if scratch:
        args.dims, args.hidden, args.steps, args.repeats = [2], [32, 32], 20, 1
        args.threads, args.rows = 1, 64
        args.peers, args.out = ["ours", "zuko CNF, exact"], Path(scratch.name) / "smoke.jsonl"
    args.peers = ["ours", *(p for p in args.peers if p != "ours")]
    if 63 in args.dims and not (Path(args.data or ".") / "bsds300_8x8_uint8.npz").exists():
        said("D = 63 is skipped: no bsds300_8x8_uint8.npz in --data")
        args.dims = [dim for dim in args.dims if dim != 63]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    lines = Lines(args)
    for dim in args.dims:
        run(dim, args, lines)
    text = [*header(args)]
    for dim in args.dims:
        text += table(dim, args, lines)
    print("\n".join(text + targets(args, lines)))
    if scratch:
        scratch.cleanup()
        own = [line for line in lines.lines if line["peer"] == "ours"]
        raise SystemExit(not own or any("failed" in line for line in own))


if __name__ == "__main__":
    main()
