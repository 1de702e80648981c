"""Populations behind noisy rows: ours against the truth and against extreme deconvolution.

Five populations whose log p(y) is known; 10,000 rows with errors from 0.1 to 2 standard deviations
of the population, another in each row and column. Each finished cell appends a line to a file; a
rerun skips what is there; the tables are made from the lines.

    pip install scikit-learn                            # for extreme deconvolution
    python benchmarks/population.py                     # five minutes a cell of ours, hours in all
    python benchmarks/population.py --tasks banana      # one of them
    python benchmarks/population.py --smoke             # seconds
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from _cells import Cells, steps_in

import pyro_interpolant as pi

LEAST, MOST = 0.1, 2.0  # errors, in standard deviations of the population
COMPONENTS = (1, 2, 4, 8, 16, 32)  # of extreme deconvolution, of which the best is taken
DIRECTIONS = 200  # of the energy distance
MISSING = 0.2  # the share of numbers that are missing, where some are


# ---- populations: latents, and the log-evidence of rows -----------------------------------------


def normal(y, mean, variance):
    """Return log N(y; mean, variance), one number at a time."""
    found = -0.5 * (
        (y.nan_to_num() - mean) ** 2 / variance + variance.log() + math.log(2 * math.pi)
    )
    return torch.where(variance.isinf(), 0.0, found)


class Curve:
    """Points on curves, with a scatter in both columns; some of them far outliers."""

    support, missing = torch.distributions.constraints.real_vector, 0.0

    def __init__(self, curve, arms, scatter, outliers=0.0, wide=3.0):
        self.curve, self.arms, self.outliers, self.wide = curve, arms, outliers, wide
        self.scatter = torch.tensor(scatter).double()

    def sample(self, count):
        """Return latents, shape (N, 2)."""
        t, arm = torch.rand(count).double(), torch.randint(self.arms, (count,))
        x = self.curve(t, arm) + self.scatter * torch.randn(count, 2).double()
        far = torch.rand(count, 1) < self.outliers
        return torch.where(far, self.wide * torch.randn(count, 2).double(), x)

    def log_evidence(self, y, sds):
        """Return log p(y) by quadrature along the curves, which the errors smooth."""
        t = ((torch.arange(4000) + 0.5) / 4000).double()
        nodes = torch.cat([self.curve(t, torch.full(t.shape, a)) for a in range(self.arms)])
        found = []
        for rows, errors in zip(y.split(200), sds.split(200), strict=True):
            variance = (self.scatter**2 + errors**2)[:, None]
            on = normal(rows[:, None], nodes, variance).sum(-1).logsumexp(1) - math.log(len(nodes))
            off = normal(rows, torch.zeros(2), self.wide**2 + errors**2).sum(-1)
            share = torch.tensor(self.outliers).double()
            found.append(torch.logaddexp((1 - share).log() + on, share.log() + off))
        return torch.cat(found)


class Mixture:
    """A mixture of Gaussians."""

    support, missing = torch.distributions.constraints.real_vector, MISSING

    def __init__(self, shares, means, covariances):
        self.shares, self.means, self.covariances = shares, means, covariances

    def sample(self, count):
        """Return latents, shape (N, D)."""
        which = torch.multinomial(self.shares, count, replacement=True)
        roots = torch.linalg.cholesky(self.covariances)
        z = torch.randn(count, self.means.shape[1]).double()
        return self.means[which] + (roots[which] @ z[..., None])[..., 0]

    def log_evidence(self, y, sds):
        """Return log p(y), where what is missing is integrated out."""
        there = sds.isfinite()
        both = (there[:, :, None] & there[:, None, :])[:, None]
        total = self.covariances + torch.diag_embed(sds.where(there, 1.0) ** 2)[:, None]
        neutral = torch.eye(y.shape[1]).double() / (2 * math.pi)  # a density of 1 at its mean
        far = (y.nan_to_num()[:, None] - self.means).where(there[:, None], 0.0)
        parts = torch.distributions.MultivariateNormal(
            torch.zeros_like(far), torch.where(both, total, neutral)
        ).log_prob(far)
        return (parts + self.shares.log()).logsumexp(-1)


class Positive:
    """A mixture of products of normals that are cut off at zero."""

    support, missing = torch.distributions.constraints.positive, 0.0

    def __init__(self, shares, means, sds):
        self.shares, self.means, self.sds = shares, means, sds

    def sample(self, count):
        """Return latents, shape (N, D)."""
        which = torch.multinomial(self.shares, count, replacement=True)
        mean, sd = self.means[which], self.sds[which]
        below = torch.special.ndtr(-mean / sd)
        u = below + (1 - below) * torch.rand(mean.shape).double()
        return (mean + sd * torch.special.ndtri(u)).clamp(min=1e-12)

    def log_evidence(self, y, sds):
        """Return log p(y): each factor is a normal times a ratio of two of its integrals."""
        y, error = y[:, None], sds[:, None] ** 2
        variance = self.sds**2 + error
        centre = (self.means * error + y * self.sds**2) / variance
        width = self.sds * sds[:, None] / variance.sqrt()
        log_cut = torch.special.log_ndtr(centre / width) - torch.special.log_ndtr(
            self.means / self.sds
        )
        return ((normal(y, self.means, variance) + log_cut).sum(-1) + self.shares.log()).logsumexp(
            -1
        )


def banana(t, arm):
    """Return a parabola whose first column is standard normal."""
    x = torch.special.ndtri(t)
    return torch.stack((x, 0.7 * x**2), -1)


def arms(t, arm):
    """Return two arms of a spiral."""
    angle, sign = 0.3 + 3.5 * t, 1.0 - 2.0 * arm
    return (sign * 0.5 * angle)[:, None] * torch.stack((angle.cos(), angle.sin()), -1)


def line(t, arm):
    """Return a straight line."""
    return torch.stack((4 * t - 2, 2 * t - 1), -1)


def populations():
    """Return the five populations by name."""
    random = torch.Generator().manual_seed(0)
    roots = 0.35 * torch.randn(4, 5, 5, generator=random).double()
    covariances = roots @ roots.mT + 0.05 * torch.eye(5).double()
    means = 1.2 * torch.randn(4, 5, generator=random).double()
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
    cut = torch.tensor([[1.0, 0.3, 2.0], [3.0, 1.0, 0.3], [0.3, 2.0, 1.0]]).double()
    return {
        "banana": Curve(banana, 1, (1e-3, 0.3)),
        "arms": Curve(arms, 2, (0.12, 0.12)),
        "line": Curve(line, 1, (0.03, 0.03), outliers=0.01),
        "mixture": Mixture(shares, means, covariances),
        "positive": Positive(shares[:3] / shares[:3].sum(), cut, 0.2 + 0.3 * cut),
    }


def catalogue(population, count, seed):
    """Return latents, rows and standard deviations, float64."""
    torch.manual_seed(seed)
    x = population.sample(count)
    sds = population.sample(20_000).std(0) * LEAST * (MOST / LEAST) ** torch.rand(x.shape).double()
    y = x + sds * torch.randn(x.shape).double()
    gone = torch.rand(x.shape) < population.missing
    gone[gone.all(1), 0] = False  # something is measured of each row
    return x, y.masked_fill(gone, math.nan), sds.masked_fill(gone, math.inf)


# ---- methods: draws of the population, and the log-evidence of rows held out --------------------


def ours(population, y, sds, args, seed):
    """Learn the population, defaults only."""

    def learn(steps):
        options = {"support": population.support, "seed": seed, "progress": False}
        return pi.from_noisy_samples(y.float(), sds.float(), steps=steps, **options)

    flow = learn(30 if args.smoke else steps_in(60 * args.minutes, learn))

    def objects(y, sds):
        return pi.infer.object_posteriors(flow, y.float(), sds.float(), draws=args.draws, seed=0)

    report = flow.report
    return flow.sample, objects, {"steps": report.steps, "best_step": report.best_step}


def extreme_deconvolution(population, y, sds, args, seed):
    """Fit mixtures of Gaussians to all rows but a tenth, on which the best number is chosen."""
    train, best, kept = len(y) * 9 // 10, -math.inf, None
    for count in (1, 2) if args.smoke else COMPONENTS:
        iterations = 5 if args.smoke else 500
        found = deconvolved(y[:train], sds[:train], count, iterations, seed)
        score = float(found.log_evidence(y[train:], sds[train:]).mean())
        if score > best:
            best, kept, components = score, found, count
    return (lambda shape: kept.sample(*shape)), kept.log_evidence, {"components": components}


def deconvolved(y, sds, count, iterations, seed):
    """Return the mixture of Gaussians behind noisy rows as astroML's XDGMM fits it, in bulk.

    XDGMM inverts the matrix of each row and component in Python, which takes hours. These are its
    start, ten iterations on rows without their errors, and its iterations, equation 16 of Bovy,
    Hogg & Roweis, Annals of Applied Statistics 2011; what is missing has an error of 1e3.
    """
    from sklearn.mixture import GaussianMixture

    known = sds.isfinite()
    y, noise = torch.where(known, y, 0.0), torch.where(known, sds, 1e3) ** 2
    start = GaussianMixture(count, max_iter=10, random_state=seed).fit(y.numpy())
    found = start.weights_, start.means_, start.covariances_
    shares, means, covariances = (torch.as_tensor(part).double() for part in found)
    before, dims = -math.inf, range(y.shape[1])
    for _ in range(iterations):
        total = [[covariances[:, i, j].expand(len(y), -1) for j in dims] for i in dims]
        for i in dims:
            total[i][i] = total[i][i] + noise[:, i, None]
        lower = roots(total)  # of the rows' own, (N, K) each
        u = solved(lower, [y[:, i, None] - means[:, i] for i in dims])
        gains = [solved(lower, list(covariances[:, :, j].T[:, None])) for j in dims]
        parts = shares.log() - sum(0.5 * u[i] ** 2 + lower[i][i].log() for i in dims)
        evidence = parts.logsumexp(-1, keepdim=True)
        if float(evidence.sum()) < before + 1e-6:
            break
        before, weights = float(evidence.sum()), (parts - evidence).exp()
        mass = weights.sum(0)
        shifts = [sum(gains[j][i] * u[i] for i in dims) for j in dims]  # of latents, off the means
        first = torch.stack([(weights * shift).sum(0) / mass for shift in shifts], -1)
        second = torch.empty_like(covariances)
        for i in dims:
            for j in range(i + 1):
                explained = sum(gains[i][k] * gains[j][k] for k in dims)
                moment = (weights * (shifts[i] * shifts[j] - explained)).sum(0) / mass
                second[:, i, j] = second[:, j, i] = moment
        means = means + first
        covariances = covariances + second - first[:, :, None] * first[:, None]
        shares = mass / len(y)
    return Mixture(shares, means, covariances)


def roots(matrices):
    """Return Cholesky's factors of matrices that are lists of lists of tensors, one a place.

    Of many small ones this is 2 to 4 times faster than LAPACK, which takes one after the other.
    """
    lower = [[None] * len(matrices) for _ in matrices]
    for j in range(len(matrices)):
        for i in range(j, len(matrices)):
            rest = matrices[i][j] - sum(lower[i][k] * lower[j][k] for k in range(j))
            lower[i][j] = rest.sqrt() if i == j else rest / lower[j][j]
    return lower


def solved(lower, right):
    """Return what lower triangles, as of :func:`roots`, map to vectors, lists of tensors."""
    found = []
    for i, row in enumerate(lower):
        found.append((right[i] - sum(row[k] * found[k] for k in range(i))) / row[i])
    return found


METHODS = {"ours": ours, "XD": extreme_deconvolution}


def energy_distance(a, b):
    """Return the energy distance of two samples, in units of the standard deviations of b.

    The distance of two points is proportional to the mean of their distances along directions, and
    in one dimension the energy distance is twice the integral of the squared difference of the
    distribution functions. So hundreds of thousands of draws can be compared: of sets of 20,000
    it varies by 0.0001 to 0.0003, as much as methods differ by.
    """
    dim = b.shape[1]
    a, b = a.float() / b.std(0).float(), b.float() / b.std(0).float()
    random = torch.Generator().manual_seed(0)  # the same directions for all
    directions = torch.randn(DIRECTIONS, dim, generator=random)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    steps = torch.cat([torch.full((len(a),), 1 / len(a)), torch.full((len(b),), -1 / len(b))])
    total = 0.0
    for direction in directions:
        values, order = torch.cat((a @ direction, b @ direction)).sort()
        difference = steps.double()[order].cumsum(0)[:-1]
        total += 2 * float((difference.square() * values.diff()).sum())
    scale = math.sqrt(math.pi) * math.gamma((dim + 1) / 2) / math.gamma(dim / 2)
    return scale * total / DIRECTIONS


def pit_distance(found, x):
    """Return the largest difference of the PIT of objects from uniform, over its 99% band."""
    from scipy.stats import kstwo

    weights = found.log_weights.double().exp()[..., None]
    values = (weights * (found.draws < x[:, None])).sum(1).sort(0).values
    steps = (torch.arange(len(x)).double()[:, None] + 0.5) / len(x)
    distance = float((values - steps).abs().max()) + 0.5 / len(x)
    return distance / float(kstwo.isf(0.01 / x.shape[1], len(x)))


def run_cell(args, task, method, seed):
    """Return what is measured of one method on one population."""
    population, start = populations()[task], time.monotonic()
    _, y, sds = catalogue(population, args.rows, seed)
    sample, objects, extra = METHODS[method](population, y, sds, args, seed)
    seconds = time.monotonic() - start
    x, y, sds = catalogue(population, args.held, 1000 + seed)
    truth, found = population.log_evidence(y, sds), objects(y, sds)
    if method == "ours":
        extra["pit"] = pit_distance(found, x)
        extra["bad_k_hat"] = float((found.k_hat > 0.7).double().mean())
        extra["monte_carlo_error"] = float(found.log_evidence_stderr.square().mean().sqrt())
        found = found.log_evidence
    lost = found.double() - truth
    torch.manual_seed(2000 + seed)
    true, others = population.sample(args.sample), population.sample(args.sample)
    return {
        "lost": float(lost.mean()),
        "stderr": float(lost.std()) / math.sqrt(len(lost)),
        "energy": energy_distance(sample((args.sample,)), true),
        "floor": energy_distance(others, true),
        "seconds": seconds,
        **extra,
    }


def table(lines):
    """Return a Markdown table of the finished cells."""
    columns = ("lost", "stderr", "energy", "floor", "pit", "bad_k_hat", "seconds")
    heads = ("log p(y) - truth's", "its error", "energy distance", "of the truth itself")
    heads += ("PIT / band", "k-hat > 0.7", "seconds")
    out = [f"| population | method | seed | {' | '.join(heads)} |", "| --- " * 10 + "|"]
    for line in sorted(lines, key=lambda line: [line[c] for c in ("task", "method", "seed")]):
        cells = [str(line[c]) for c in ("task", "method", "seed")]
        cells += [f"{line[c]:.4g}" if c in line else "" for c in columns]
        out.append(f"| {' | '.join(cells)} |")
    return "\n".join(out)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(populations()), help="which of them")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="ours, XD")
    parser.add_argument("--seeds", type=int, default=3, help="of rows and of training")
    parser.add_argument("--minutes", type=float, default=5.0, help="to train, each of ours")
    parser.add_argument("--rows", type=int, default=10_000, help="to learn from")
    parser.add_argument("--held", type=int, default=5000, help="to compare on")
    parser.add_argument("--sample", type=int, default=200_000, help="draws of the population")
    parser.add_argument("--draws", type=int, default=400, help="of each object")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--out", type=Path, default=Path("population.jsonl"), help="the lines")
    parser.add_argument("--smoke", action="store_true", help="seconds, to see that it works")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.smoke:
        args.rows, args.held, args.sample, args.draws, args.seeds = 300, 50, 500, 100, 1
        args.tasks, args.methods, args.out = args.tasks[-1:], args.methods[:1], None
    names = ("minutes", "rows", "held", "sample", "draws", "threads")
    settings = {name: getattr(args, name) for name in names}
    done, lines = Cells(args.out), []
    for seed in range(args.seeds):
        for task in args.tasks:
            for method in args.methods:
                asked = {"task": task, "method": method, "seed": seed, **settings}
                line = done.find(asked)
                if line is None:
                    line = done.add(asked, run_cell(args, task, method, seed))
                    print(json.dumps(line), flush=True)
                lines.append(line)
    print(table(lines))


if __name__ == "__main__":
    main()
