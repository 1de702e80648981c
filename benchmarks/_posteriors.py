"""The targets of ``posteriors.py``: Pyro models, their data, and coordinates to compare in.

Each target is a model without arguments and a function from its sites, each ``(N, *site_shape)``,
to coordinates, ``(N, D)``, in which positive scales are logged. The reference draws of posteriordb
are turned into the same coordinates by ``reference``, for scoring alone.
"""

import json
import math
from typing import NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch

FILES = {
    "arK": "arK-arK",
    "arma": "arma-arma11",
    "diamonds": "diamonds-diamonds",
    "eight_schools": "eight_schools-eight_schools_noncentered",
    "gp_regr": "gp_pois_regr-gp_regr",
    "kidiq": "kidiq-kidscore_interaction",
    "kilpisjarvi": "kilpisjarvi_mod-kilpisjarvi",
    "low_dim_gauss_mix": "low_dim_gauss_mix-low_dim_gauss_mix",
    "mesquite": "mesquite-logmesquite",
    "nes2000": "nes2000-nes",
    "one_comp": "one_comp_mm_elim_abs-one_comp_mm_elim_abs",
    "sblrc": "sblrc-blr",
}
MADE_UP = ("smoke", "mixture2", "mixture8", "funnel")


class Target(NamedTuple):
    """A model, the way from its sites to coordinates, and what is known of the truth.

    Attributes:
        model: A Pyro model without arguments.
        coordinates: From a dictionary of sites to rows, ``(N, D)``.
        reference: Draws in these coordinates, ``(10000, D)``, for scoring alone.
        log_evidence: The truth, or None.
        means: Centres of the modes, ``(4, D)``, or None.
        shares: Their weights, ``(4,)``, or None.
    """

    model: object
    coordinates: object
    reference: torch.Tensor
    log_evidence: float | None = None
    means: torch.Tensor | None = None
    shares: torch.Tensor | None = None


def load(name, folder):
    """Return a target by name."""
    if name in MADE_UP:
        return made_up(name)
    with np.load(folder / f"{FILES[name]}.npz") as file:
        draws = torch.from_numpy(file["draws"]).double()
        raw = json.loads(str(file["data"]))
    data = {k: torch.tensor(v).float() if isinstance(v, list) else v for k, v in raw.items()}
    return globals()[f"_{name}"](data, draws)


# ---- what the sites of several models have in common ----------------------------------------


def flat(size=None):
    """Return a flat prior, of a positive scalar or of a vector of a given size, to start from."""
    if size is None:
        return dist.LogNormal(0.0, 1.0).mask(mask=False)
    return dist.Normal(0.0, 1.0).expand([size]).to_event(1).mask(mask=False)


def along_rows(value):
    """Return what a vector site gave, with a dimension less where there are particles."""
    return value.squeeze(-2) if value.dim() > 1 else value


def columns(*names, logged=()):
    """Return the function that joins sites, those named in ``logged`` by their logarithms."""

    def join(sites):
        parts = []
        for name in names:
            value = sites[name].double()
            value = value.log() if name in logged else value
            parts.append(value.reshape(len(value), -1))
        return torch.cat(parts, -1)

    return join


def last_logged(draws):
    """Return reference draws with the last column, a scale, logged."""
    return torch.cat((draws[:, :-1], draws[:, -1:].log()), -1)


def regression(x, y, draws, priors, name="beta"):
    """Return a linear regression; ``priors`` gives those of the coefficients and of sigma."""

    def model():
        prior, scale = priors()
        beta = pyro.sample(name, prior)
        sigma = pyro.sample("sigma", scale)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(along_rows(beta @ x.T), sigma), obs=y)

    return Target(model, columns(name, "sigma", logged=("sigma",)), last_logged(draws))


# ---- posteriordb ----------------------------------------------------------------------------


def _eight_schools(data, draws):
    y, noise = data["y"], data["sigma"]

    def model():  # centred: a funnel
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        with pyro.plate("schools", 8):
            theta = pyro.sample("theta", dist.Normal(mu, tau))
            pyro.sample("y", dist.Normal(theta, noise), obs=y)

    return Target(model, columns("theta", "mu", "tau", logged=("tau",)), last_logged(draws))


def _arK(data, draws):  # noqa: N802
    y, k = data["y"], data["K"]
    x = torch.stack([torch.ones(len(y) - k), *(y[k - i : len(y) - i] for i in range(1, k + 1))], 1)

    def priors():
        return dist.Normal(0.0, 10.0).expand([k + 1]).to_event(1), dist.HalfCauchy(2.5)

    return regression(x, y[k:], draws, priors)


def _arma(data, draws):
    y = data["y"]

    def model():
        mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
        phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
        theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
        sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
        errors = [y[0] - (mu + phi * mu)]
        for last, this in zip(y[:-1], y[1:], strict=True):
            errors.append(this - (mu + phi * last + theta * errors[-1]))
        errors = torch.cat([torch.atleast_1d(e) for e in errors], -1)
        with pyro.plate("times", len(y)):
            # The errors are independent, and their Jacobian is one.
            pyro.sample("y", dist.Normal(y - errors, sigma), obs=y)

    return Target(
        model, columns("mu", "phi", "theta", "sigma", logged=("sigma",)), last_logged(draws)
    )


def _kidiq(data, draws):
    hs, iq = data["mom_hs"], data["mom_iq"]
    x = torch.stack((torch.ones_like(hs), hs, iq, hs * iq), 1)
    return regression(x, data["kid_score"], draws, lambda: (flat(4), dist.HalfCauchy(2.5)))


def _mesquite(data, draws):
    logs = [data[k].log() for k in ("diam1", "diam2", "canopy_height", "total_height", "density")]
    x = torch.stack((torch.ones_like(logs[0]), *logs, data["group"]), 1)

    def priors():
        return flat(7), flat()

    return regression(x, data["weight"].log(), draws, priors)


def _nes2000(data, draws):
    age = data["age_discrete"]
    x = torch.stack(
        (
            torch.ones_like(age), data["real_ideo"], data["race_adj"],
            *((age == k).float() for k in (2, 3, 4)),
            data["educ1"], data["gender"], data["income"],
        ), 1,
    )  # fmt: skip
    return regression(x, data["partyid7"], draws, lambda: (flat(9), flat()))


def _kilpisjarvi(data, draws):
    x, y = data["x"], data["y"]

    def model():
        alpha = pyro.sample("alpha", dist.Normal(data["pmualpha"], data["psalpha"]))
        beta = pyro.sample("beta", dist.Normal(data["pmubeta"], data["psbeta"]))
        sigma = pyro.sample("sigma", flat())
        with pyro.plate("years", len(y)):
            pyro.sample("y", dist.Normal(alpha + beta * x, sigma), obs=y)

    return Target(model, columns("alpha", "beta", "sigma", logged=("sigma",)), last_logged(draws))


def _sblrc(data, draws):
    def priors():
        return dist.Normal(0.0, 10.0).expand([5]).to_event(1), dist.HalfNormal(10.0)

    return regression(data["X"], data["y"], draws, priors)


def _diamonds(data, draws):
    x, y = data["X"][:, 1:].double(), data["Y"]
    x = (x - x.mean(0)).float()

    def model():
        b = pyro.sample("b", dist.Normal(0.0, 1.0).expand([24]).to_event(1))
        intercept = pyro.sample("intercept", dist.StudentT(3.0, 8.0, 10.0))
        sigma = pyro.sample("sigma", dist.FoldedDistribution(dist.StudentT(3.0, 0.0, 10.0)))
        with pyro.plate("rows", len(y)):
            mean = intercept + along_rows(b @ x.T)
            pyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return Target(model, columns("b", "intercept", "sigma", logged=("sigma",)), last_logged(draws))


def _low_dim_gauss_mix(data, draws):
    y = data["y"]

    def model():
        # The prior on the ordered half, up to a constant.
        normal = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
        ordered = dist.TransformedDistribution(normal, [dist.transforms.OrderedTransform()])
        mu = pyro.sample("mu", ordered.mask(mask=False))
        pyro.factor("mu_prior", dist.Normal(0.0, 2.0).log_prob(mu).sum(-1))
        sigma = pyro.sample("sigma", dist.HalfNormal(2.0).expand([2]).to_event(1))
        theta = pyro.sample("theta", dist.Beta(5.0, 5.0))
        with pyro.plate("rows", len(y)):
            first = dist.Normal(mu[..., :1], sigma[..., :1]).log_prob(y) + theta.log()[..., None]
            other = dist.Normal(mu[..., 1:], sigma[..., 1:]).log_prob(y)
            other = other + torch.log1p(-theta)[..., None]
            pyro.factor("y", along_rows(torch.logaddexp(first, other)))

    def join(sites):
        mu, theta = sites["mu"].double().reshape(-1, 2), sites["theta"].double().reshape(-1, 1)
        sigma = sites["sigma"].double().reshape(-1, 2)
        return torch.cat((mu[:, :1], mu.diff(dim=1).log(), sigma.log(), theta.logit()), 1)

    sites = {"mu": draws[:, :2], "sigma": draws[:, 2:4], "theta": draws[:, 4]}
    return Target(model, join, join(sites))


def _one_comp(data, draws):
    times, dose, volume = data["times"].tolist(), float(data["D"]), float(data["V"])
    observed, cauchy = data["C_hat"], dist.HalfCauchy(1.0)

    def model():
        k_a, k_m, v_m, sigma = (pyro.sample(k, cauchy) for k in ("k_a", "K_m", "V_m", "sigma"))

        def rate(t, c):
            absorbed = torch.exp(-k_a * t) * dose * k_a / volume
            return absorbed - (v_m / volume) * c / (k_m + c)

        t, c, solution = float(data["t0"]), torch.zeros_like(k_a), []
        for end in times:
            steps = max(1, math.ceil((end - t) / 0.25))
            h = (end - t) / steps
            for _ in range(steps):  # Runge-Kutta
                k1 = rate(t, c)
                k2 = rate(t + h / 2, c + h / 2 * k1)
                k3 = rate(t + h / 2, c + h / 2 * k2)
                c = c + h / 6 * (k1 + 2 * k2 + 2 * k3 + rate(t + h, c + h * k3))
                t += h
            solution.append(torch.atleast_1d(c))
        with pyro.plate("times", len(times)):
            mean = torch.cat(solution, -1).clamp_min(1e-12).log()
            pyro.sample("C_hat", dist.LogNormal(mean, sigma), obs=observed)

    names = ("k_a", "K_m", "V_m", "sigma")
    return Target(model, columns(*names, logged=names), draws.log())


def _gp_regr(data, draws):
    x, y = data["x"], data["y"]
    square, eye = (x[:, None] - x).square(), torch.eye(len(x))

    def model():
        rho = pyro.sample("rho", dist.Gamma(25.0, 4.0))[..., None, None]
        alpha = pyro.sample("alpha", dist.HalfNormal(2.0))[..., None, None]
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))[..., None, None]
        kernel = alpha**2 * torch.exp(-square / (2 * rho**2)) + sigma * eye
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(len(x)), kernel), obs=y)

    names = ("rho", "alpha", "sigma")
    return Target(model, columns(*names, logged=names), draws.log())


# ---- with a truth in closed form ------------------------------------------------------------


def made_up(name):
    """Return a mixture of four Gaussians, Neal's funnel, or a skewed target for a smoke run."""
    generator = torch.Generator().manual_seed(0)
    if name == "smoke":

        def skewed():
            scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
            pyro.sample("x", dist.Normal(scale.log(), 1.0))

        log_scale = 0.5 * torch.randn(10_000, 1, generator=generator).double()
        x = log_scale + torch.randn(10_000, 1, generator=generator)
        coordinates = columns("scale", "x", logged=("scale",))
        return Target(skewed, coordinates, torch.cat((log_scale, x), 1), 0.0)
    if name == "funnel":

        def neal():
            v = pyro.sample("v", dist.Normal(0.0, 3.0))
            with pyro.plate("rows", 9):
                pyro.sample("x", dist.Normal(0.0, (v / 2).exp()))

        v = 3 * torch.randn(10_000, 1, generator=generator).double()
        x = (v / 2).exp() * torch.randn(10_000, 9, generator=generator)
        return Target(neal, columns("v", "x"), torch.cat((v, x), 1), 0.0)
    dim, shares = int(name.removeprefix("mixture")), torch.tensor([0.1, 0.2, 0.3, 0.4])
    means = torch.zeros(4, dim)
    means[:, :2] = 4.0 * torch.tensor([[1.0, 1], [-1, 1], [1, -1], [-1, -1]])
    means[:, 2:] = 2 * torch.randn(4, dim - 2, generator=generator)

    def mixture():
        parts = dist.Normal(means, 0.7).to_event(1)
        x = pyro.sample("x", flat(dim))
        each = parts.log_prob(x[..., None, :]) + shares.log()
        pyro.factor("density", each.logsumexp(-1))

    which = torch.multinomial(shares, 10_000, replacement=True, generator=generator)
    noise = 0.7 * torch.randn(10_000, dim, generator=generator)
    return Target(mixture, columns("x"), (means[which] + noise).double(), 0.0, means, shares)
