"""Train one flow in several processes, or on several GPUs, with Lightning Fabric.

pip install -e '.[distributed,plot]'
python examples/distributed.py --devices 2                       # starts both processes itself
python examples/distributed.py --accelerator gpu --devices 8 --precision bf16-mixed
fabric run --accelerator cpu --devices 2 --strategy ddp examples/distributed.py  # the same
"""

import argparse
import os

import matplotlib.pyplot as plt
import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

import pyro_interpolant as pi
from pyro_interpolant import plotting


def rings(count):
    """Return rows of two rings of different widths, shape (count, 2)."""
    angle, inner = 2 * torch.pi * torch.rand(count), torch.rand(count) < 0.3
    radius = torch.where(inner, 1 + 0.1 * torch.randn(count), 3 + 0.3 * torch.randn(count))
    return radius[:, None] * torch.stack((angle.cos(), angle.sin()), -1)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", default="cpu", help="such as gpu")
    parser.add_argument("--devices", type=int, default=2, help="how many processes")
    parser.add_argument("--precision", default="32-true", help="such as bf16-mixed")
    parser.add_argument("--batches", action="store_true", help="a loader instead of a table")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--picture", default="distributed.png", help="the file to write")
    args = parser.parse_args()

    if "LT_CLI_USED" in os.environ:  # started by ``fabric run``, which has the choices
        fabric = Fabric()
    else:
        fabric = Fabric(
            accelerator=args.accelerator,
            strategy="ddp" if args.devices > 1 else "auto",
            devices=args.devices,
            precision=args.precision,
        )
        fabric.launch()
    torch.manual_seed(0)  # every process makes the same rows: a real run would read them
    data = rings(4_000 if args.smoke else 100_000)
    if args.batches:  # Fabric gives each process its own share of a loader
        loader = DataLoader(TensorDataset(data), batch_size=512, shuffle=True)
        data = fabric.setup_dataloaders(loader)

    flow = pi.InterpolantDistribution(pi.interpolant_transform(2))
    result = pi.fit(
        flow,
        data,
        batch_size=512,  # per process
        steps=20 if args.smoke else 3_000,
        seed=0,
        fabric=fabric,
        progress=not args.smoke,
    )
    test = rings(2_000)
    with torch.no_grad():
        found = flow.log_prob(test.to(fabric.device)).mean()
    total = sum(float(p.detach().double().sum()) for p in flow.transform.parameters())
    print(
        f"process {fabric.global_rank} of {fabric.world_size}: held-out log-density {found:.3f} "
        f"nats, sum of all weights {total:.12f}",
        flush=True,
    )
    if fabric.is_global_zero:
        figure, axes = plt.subplots(1, 2, figsize=(9, 3.8))
        plotting.training_curve(result, ax=axes[0])
        axes[1].plot(*flow.sample((2_000,)).cpu().T, ".", ms=2)
        axes[1].set(title="samples", aspect="equal")
        figure.tight_layout()
        figure.savefig(args.picture, dpi=150)


if __name__ == "__main__":
    main()
