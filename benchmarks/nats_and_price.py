"""What a density and a draw cost for the nats that they have, against one-pass spline flows.

Networks of several widths and zuko's neural spline flows are trained on the same rows of a mixture
of 12 Gaussians for the same time, one after the other, each in a process of its own. Then they are
asked in turn for the log_prob of 512 rows, and for 512 draws; ours are as calibrated by
`from_samples`.

    python benchmarks/nats_and_price.py                 # half an hour
    python benchmarks/nats_and_price.py --smoke         # seconds
"""

import argparse
import json
import os
import statistics
import sys
import time

from density_cost import Child

WIDTHS = {
    2: ((24, 24), (32, 32), (32, 32, 32), (64, 64), (64, 64, 64), (96, 96, 96)),
    8: ((32, 32, 32), (64, 64), (64, 64, 64), (96, 96, 96)),
    43: ((32, 32), (64, 64), (256, 256), (384, 384)),
}
SPLINES = ((64, 64), (128, 128))
SPLINE = "zuko NSF"


def ours(dim, hidden, seconds):
    """Return log_prob and sample of a flow that learned for so many seconds."""
    import _peers
    from _cells import steps_in

    import pyro_interpolant as pi

    rows = _peers.mixture(dim, 20_000, 1)

    def learn(steps):
        network = pi.VelocityMLP(dim, hidden)
        return pi.from_samples(rows, network=network, steps=steps, seed=0, progress=False)

    flow = learn(steps_in(seconds, learn))
    note = f"{flow.transform.solver.steps} steps"
    return flow.log_prob, lambda: flow.sample((512,)), note


def spline(dim, hidden, seconds):
    """Return log_prob and sample of a spline flow that learned for so many seconds."""
    import _peers
    import tabular

    rows = _peers.mixture(dim, 20_000, 1)
    kept = []

    def make(train):
        log_prob = tabular.zuko_flow("NSF", transforms=3, hidden_features=hidden, bins=8)(train)
        kept.append(log_prob[0])
        return log_prob

    method = tabular.gradient_method(make, tabular.maximum_likelihood, rate=1e-3, batch=512)
    log_prob, told = method(rows[2000:], rows[:2000], seconds, 0)
    return log_prob, lambda: kept[0]().sample((512,)), f"{told['steps']} of training"


def serve(args):
    """Train, then answer each line of the input with the times of both calls."""
    import _peers
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    learn = spline if args.method == SPLINE else ours
    log_prob, sample, note = learn(args.dim, tuple(args.hidden), args.seconds)
    test = _peers.mixture(args.dim, 10_000, 2)
    with torch.no_grad():
        nats = float(torch.cat([log_prob(part) for part in test.split(1000)]).double().mean())
        truth = float(_peers.mixture_log_prob(test.double()).mean())
        print(json.dumps({"nats": nats, "truth": truth, "note": note}), flush=True)
        for _ in sys.stdin:
            times = []
            for call in (lambda: log_prob(test[:512].clone()), sample):
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            print(json.dumps({"ms": times}), flush=True)


def started(args, dim, method, hidden):
    """Return a process whose flow has learned, and what it tells of it: one trains at a time."""
    flags = ["--dim", dim, "--seconds", args.seconds, "--method", method, "--hidden", *hidden]
    child = Child([sys.executable, os.path.abspath(__file__), *map(str, flags)])
    told = child.receive()
    if "failed" in told:
        raise RuntimeError(f"{method}, {hidden}: {told['failed']}")
    return child, told


def row(name, told, times):
    """Return a line of the table, of the times of all rounds but the first."""
    cells = [name, told["note"], f"{told['nats']:.3f}"]
    for each in zip(*times[1:], strict=True):
        low, middle, high = statistics.quantiles(each, n=4)
        cells.append(f"{middle:.1f} ({low:.1f} to {high:.1f})")
    return f"| {' | '.join(cells)} |"


def main():
    """Train and ask all, and print the table of each dimension."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dims", type=int, nargs="+", default=list(WIDTHS), choices=WIDTHS)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, for each")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--smoke", action="store_true", help="D = 2, one flow, a second")
    parser.add_argument("--dim", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--hidden", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dim:
        serve(args)
        return
    if args.smoke:
        args.dims, args.seconds, args.rounds = [2], 1.0, 3
    for dim in args.dims:
        cells = [("ours", hidden) for hidden in WIDTHS[dim]]
        cells += [(SPLINE, hidden) for hidden in SPLINES]
        flows = {}
        for method, hidden in cells[:1] if args.smoke else cells:
            name = f"{method}, {' x '.join(map(str, hidden))}"
            flows[name] = (*started(args, dim, method, hidden), [])
        for _ in range(args.rounds + 1):
            for child, _, times in flows.values():
                times.append(child.ask()["ms"])
        truth = next(iter(flows.values()))[1]["truth"]
        print(f"\n### D = {dim}: {truth:.3f} nats are possible\n")
        print("| network | | nats | log_prob, ms | sample, ms |\n| --- | --- | --- | --- | --- |")
        for name, (child, told, times) in flows.items():
            child.close()
            print(row(name, told, times), flush=True)


if __name__ == "__main__":
    main()
