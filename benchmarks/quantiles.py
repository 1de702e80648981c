"""Quantiles and draws of a conditional density of scalars: seconds of one core.

An outcome with two modes, given two numbers, is learned from 4,000 rows. Then: 200 quantiles of
each of 2,000 contexts in one call of `icdf`; `cdf(icdf(q)) - q`; as many draws by `sample`; and
100,000 draws given one context.

    python benchmarks/quantiles.py             # a minute or two
    python benchmarks/quantiles.py --smoke     # seconds
"""

import argparse
import time

import torch

import pyro_interpolant as pi


def learned(steps):
    """Return a density with two modes, whose weights and distance the context sets."""
    torch.manual_seed(0)
    c = torch.rand(4000, 2)
    side = torch.where(torch.rand(4000) < c[:, 0], -1.0, 1.0)
    y = side * (1 + c[:, 1]) + 0.2 * torch.randn(4000)
    return pi.from_samples(y, context=c, seed=0, steps=steps, progress=False)


def timed(function):
    """Return what a function returns and the seconds of the processor that it takes."""
    began = time.process_time()
    with torch.no_grad():
        found = function()
    return found, time.process_time() - began


def main():
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    contexts, each, steps = (20, 50, 30) if args.smoke else (2000, 200, 1500)
    density = learned(steps)
    torch.manual_seed(1)
    given = density.condition(torch.rand(contexts, 2))
    q = torch.linspace(0.005, 0.995, each)[:, None].expand(each, contexts)
    x, quantiles = timed(lambda: given.icdf(q))
    back, probabilities = timed(lambda: given.cdf(x))
    _, draws = timed(lambda: given.sample((each,)))
    one = density.condition(torch.tensor([0.5, 0.5]))
    _, many = timed(lambda: one.sample((contexts * 50,)))
    print(f"{density.report}\n{density.transform.solver}, torch {torch.__version__}, 1 thread\n")
    print("| what | seconds of one core |\n| --- | --- |")
    print(f"| {each} quantiles of {contexts:,} contexts | {quantiles:.1f} |")
    print(f"| their probabilities | {probabilities:.1f} |")
    print(f"| {each} draws given {contexts:,} contexts | {draws:.1f} |")
    print(f"| {contexts * 50:,} draws given one | {many:.1f} |")
    print(f"\nlargest |cdf(icdf(q)) - q|: {float((back - q).abs().max()):.1e}")


if __name__ == "__main__":
    main()
