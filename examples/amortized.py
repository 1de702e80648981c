"""Posteriors of many small groups of patients at once, by a guide that has seen only simulations.

How does the progression of diabetes depend on body mass and blood pressure, in each group of 40
patients (scikit-learn's data of 442)? Outcomes have outliers, so the model is Student's t, and no
posterior has a closed form. A guide learns the posterior of any such group from simulations; it is
checked by simulation (is it calibrated?), by weights, and against NUTS.

pip install -e '.[examples]'
python examples/amortized.py
"""

import argparse
import time

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import MCMC, NUTS, Predictive
from sklearn.datasets import load_diabetes

import pyro_interpolant as pi
from pyro_interpolant import plotting

GROUP = 40


def load():
    """Return body mass and blood pressure, shape (442, 2), and outcomes, (442,), standardised."""
    columns, y = load_diabetes(return_X_y=True)
    x, y = torch.tensor(columns[:, [2, 3]]).float(), torch.tensor(y).float()
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def model_of(patients):
    """Return the model of a group; its patients are drawn, by their place among all."""

    def model(place=None, y=None):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.LogNormal(-0.5, 0.7))
        tail = pyro.sample("tail", dist.Gamma(3.0, 0.2))
        with pyro.plate("group", GROUP):
            place = pyro.sample("place", dist.Uniform(0.0, 1.0), obs=place)
            x = patients[(place * len(patients)).long()]
            mean = level + (slope * x).sum(-1)
            y = pyro.sample("y", dist.StudentT(1 + tail, mean, scale), obs=y)
        pyro.deterministic("rows", torch.cat((x, y[..., None]), -1))

    return model


def nuts(model, place, y, smoke):
    """Return draws of a group's posterior by NUTS, and the seconds they took."""
    begin = time.monotonic()
    mcmc = MCMC(
        NUTS(model),
        num_samples=10 if smoke else 1500,
        warmup_steps=5 if smoke else 400,
        disable_progbar=smoke,
    )
    mcmc.run(place, y)
    return mcmc.get_samples(), time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=20_000, help="to learn from")
    parser.add_argument("--smoke", action="store_true", help="a tiny run, to see that it works")
    parser.add_argument("--picture", default="amortized.png", help="the file to write")
    args = parser.parse_args()
    pyro.set_rng_seed(0)

    patients, outcomes = load()
    order = torch.randperm(len(patients))[: len(patients) // GROUP * GROUP].reshape(-1, GROUP)
    model, y = model_of(patients), outcomes[order[0]]
    place = (order[0] + 0.5) / len(patients)
    rows = torch.cat((patients[order], outcomes[order][..., None]), -1)  # (groups, 40, 3)

    guide = pi.AmortizedInterpolant(model, observed=("rows",), embedding=pi.nn.SetEmbedding(3))
    result = pi.fit_guide(
        guide,
        place,
        y,
        simulations=100 if args.smoke else args.simulations,
        options={"steps": 5} if args.smoke else {"batch_size": 256},
        seed=0,
        progress=not args.smoke,
    )
    print(result)
    checks = guide.calibration(place, y, count=20 if args.smoke else 1000)
    print("by simulation:", checks)

    guide.condition(rows=rows).sample_dict((10,))
    begin = time.monotonic()
    draws = guide.condition(rows=rows).sample_dict((1000,))
    seconds = time.monotonic() - begin
    print(f"1,000 draws for each of {len(rows)} groups: {seconds:.2f} s")
    slopes = draws["slope"].mean(0)
    for group, (mass, pressure) in enumerate(slopes.tolist()):
        print(f"  group {group:>2}: {mass:+.2f} for body mass, {pressure:+.2f} for blood pressure")

    exact = pi.importance(guide, place, y, count=200 if args.smoke else 10_000, seed=0)
    print("the first group, weighed:", exact.verdict)
    weighed, (reference, took) = exact.resampled(1000), nuts(model, place, y, args.smoke)
    print(f"NUTS, {took:.0f} s     guide           weighed         NUTS (mean, sd)")
    for name in ("level", "slope", "scale", "tail"):
        found = (draws[name][:, 0], weighed[name], reference[name])
        found = [part.reshape(len(part), -1)[:, 0] for part in found]
        print(f"{name:>12}", "  ".join(f"{v.mean():+6.2f} {v.std():6.2f}" for v in found))

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8))
    axes[0].plot(*draws["slope"][:, 0].T, ".", ms=2, label="guide")
    axes[0].plot(*reference["slope"][:1000].T, ".", ms=2, label="NUTS")
    axes[0].set(xlabel="slope in body mass", ylabel="slope in blood pressure")
    axes[0].legend(frameon=False)
    plotting.ranks(checks.sbc, ax=axes[1])
    replicated = Predictive(model, weighed)(place)["y"]
    plotting.predictive_check(y, replicated, ax=axes[2])
    figure.tight_layout()
    figure.savefig(args.picture, dpi=150)


if __name__ == "__main__":
    main()
