"""Every density integrates to one: by quadrature in a plane, by importance sampling beyond.

Values are reached from real vectors by a smooth map, whose Jacobian autograd gives: nothing but
``log_prob`` is the package's. Flows are far from the identity, so that a divergence that is off by
a few percent shows.
"""

import dataclasses
import math
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from cases import (
    BASES,
    DIVERGENCES,
    FLOWS,
    HIDDEN_DIMS,
    INTERPOLANTS,
    LATENT,
    SOLVERS,
    SUPPORTS,
    WHITENINGS,
    random_flow,
    slow_but,
)
from oracles import random_mixture
from pyro.distributions import constraints
from torch import nn
from torch.distributions import biject_to

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    ExactDivergence,
    FixedGrid,
    Geodesic,
    InterpolantDistribution,
    InterpolantTransform,
    JointInterpolantDistribution,
    TorusMLP,
    circular,
)
from pyro_interpolant.diffusion import sde_log_prob
from pyro_interpolant.training.preprocessing import marginal_transform, radial_transform
from pyro_interpolant.transforms.gaussianize import Gaussianized

TOLERANCE = 1e-3
FINE = FixedGrid(steps=16)  # masses within 7e-4 of one, as with 24


# ---- integrals ----------------------------------------------------------------------------------


def values(distribution, u, free=lambda y: y):
    """Values that real vectors ``(*, D)`` stand for, and the log-volume of each, ``(*)``."""
    if distribution.space.is_real():
        return u, u.new_zeros(u.shape[:-1])
    with torch.enable_grad():
        u = u.clone().requires_grad_()
        y = biject_to(distribution.constraint)(u)
        columns = free(y).unbind(-1)  # rows do not depend on each other
        jacobian = [torch.autograd.grad(c.sum(), u, retain_graph=True)[0] for c in columns]
    return y.detach(), torch.linalg.slogdet(torch.stack(jacobian, -2)).logabsdet


def nodes(draws, count, reach=7.5):
    """A grid around draws, shape ``(N, D)``, or random points; the log-density of each, (*)."""
    dim = draws.shape[-1]
    if dim > 2:
        root = torch.linalg.cholesky(1.5 * draws.T.cov())
        proposal = dist.MultivariateNormal(draws.mean(0), scale_tril=root)
        u = proposal.sample((count,))
        return u, proposal.log_prob(u)
    lower, upper = (draws.mean(0) + s * reach * draws.std(0) for s in (-1, 1))
    axes = [torch.linspace(a, b, count) for a, b in zip(lower, upper, strict=True)]
    u = torch.cartesian_prod(*axes).reshape(-1, dim)
    volume = torch.stack([axis[1] - axis[0] for axis in axes]).prod()
    return u, -(volume * len(u)).log().expand(len(u))


@torch.no_grad()
def mass(distribution, count=None, free=lambda y: y):
    """The integral of a density, of the batch shape, and its standard error."""
    batch = distribution.batch_shape
    near = distribution.without_support().expand(batch).sample((500,))
    dim = near.shape[-1]
    u, log_share = nodes(near.flatten(0, -2), count or (33 if dim <= 2 else 4000))
    y, log_volume = values(distribution, u, free)
    y = y.to(near.dtype).reshape(len(u), *[1] * len(batch), *y.shape[1:])
    log_prob = distribution.log_prob(y).double().movedim(0, -1)
    each = (log_prob + log_volume - log_share).exp()
    stderr = each.std(-1) / math.sqrt(len(u))
    return each.mean(-1), stderr if dim > 2 else torch.zeros(batch)


def check(distribution, tolerance=TOLERANCE, **options):
    total, stderr = mass(distribution, **options)
    assert total.shape == distribution.batch_shape
    assert float(stderr.max()) < 0.04
    assert bool(((total - 1).abs() < 4.5 * stderr + tolerance).all()), (total, stderr)


# ---- flows --------------------------------------------------------------------------------------


def far_flow(dim, context_dim=0, *, build=random_flow, whitening=None, **choices):
    """A random flow whose divergence varies much, and whose gate is felt where points are."""
    transform = build(dim, context_dim=context_dim, **{"solver": FINE, **choices})
    velocity = transform.flow.velocity.requires_grad_(requires_grad=False)
    if hasattr(velocity, "reach"):
        velocity.reach.copy_(torch.stack((torch.full((dim,), 1.5), torch.full((dim,), 3.0))))
        last = velocity.output.weight, velocity.shifts.weight[-dim:]
    else:
        last = (velocity.out.weight,)
    context = torch.randn(500, context_dim) if context_dim else None
    t, x = torch.rand(500), torch.randn(500, dim)
    spread = ExactDivergence()(velocity, t, x, context).std()
    speed = velocity(t, x, context).square().mean().sqrt()
    for weight in last:
        weight.mul_(torch.minimum(0.7 / spread, 1 / speed))
    if whitening is not None:
        kind, linear = WHITENINGS[whitening]
        transform.flow.whitening = kind(dim)
        transform.flow.whitening.set(torch.linspace(-1.0, 2.0, dim), linear(dim))
    return transform


def finer(solver):
    steps = {} if not hasattr(solver, "steps") else {"steps": 4 * solver.steps}
    return dataclasses.replace(solver, **(steps or {"nodes": 24}))


# Of first order in the step; with a kink.
COARSE = {
    "euler": {"tolerance": 5e-3},
    "random": {"tolerance": 5e-3},
    "laplace": {"tolerance": 5e-3, "count": 81},
}

# Of every family, what makes a flow of a member.
MEMBERS = {
    **{name: {"interpolant": i} for name, i in {**INTERPOLANTS, **LATENT}.items()},
    **{name: {"solver": finer(solver)} for name, solver in SOLVERS.items()},
    **{name: {"divergence": divergence} for name, divergence in DIVERGENCES.items()},
    **{name: {"whitening": name} for name in WHITENINGS},
    **{f"network {name}": {"build": build} for name, build in FLOWS.items()},
    **{
        f"layers {name}": {"build": partial(random_flow, hidden_dims=widths)}
        for name, widths in HIDDEN_DIMS.items()
    },
    **{name: {"base": base} for name, base in BASES.items()},
    "flow as base": {"base": lambda dim: InterpolantDistribution(far_flow(dim))},
    "batch of bases": {"base": lambda dim: dist.Normal(torch.randn(3, dim), 1.0).to_event(1)},
}


def parts(member, dim, context_dim=0):
    choices = dict(MEMBERS[member])
    base = choices.pop("base", lambda dim: None)(dim)
    return far_flow(dim, context_dim, **choices), base


def mapped(make, dim):
    """Real vectors behind a map that is set by rows with long tails and several modes."""
    rows = torch.randn(4000, dim) + 3 * (torch.rand(4000, 1) < 0.3)
    return Gaussianized(constraints.real_vector, make((0.7 * rows).sinh()))


def real(member, dim, **options):
    return InterpolantDistribution(*parts(member, dim), **options)


def conditional(member, dim):
    flow = ConditionalInterpolantDistribution(*parts(member, dim, 3))
    return flow.condition(torch.randn(3))


def joint(member, dim):
    first = {"scale": ((), constraints.positive)}
    sites = {**first, "others": ((dim - 1,), constraints.real)} if dim > 1 else first
    return JointInterpolantDistribution(*parts(member, dim), sites=sites)


SETTINGS = {
    "real": real,
    "support": partial(real, support=constraints.positive),
    "marginals": lambda m, dim: real(m, dim, support=mapped(marginal_transform, dim)),
    "radial": lambda m, dim: real(m, dim, support=mapped(radial_transform, dim)),
    "conditional": conditional,
    "joint": joint,
    "at 0.4": lambda member, dim: real(member, dim).at(0.4),
}
QUICK = {("exact", s) for s in ("real", "marginals", "radial", "conditional", "at 0.4")}
# An estimated trace makes log_prob right on average, and its exponential in one dimension alone,
# where the estimate has no error; there is no map of lengths.
ONE_DIMENSION = {"hutchinson"}
PAIRS = [
    pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow, id=f"{pair[0]}-{pair[1]}")
    for pair in ((member, setting) for member in MEMBERS for setting in SETTINGS)
    if pair[0] not in ONE_DIMENSION or pair[1] != "radial"
]


# ---- densities of flows -------------------------------------------------------------------------


@pytest.mark.parametrize(("member", "setting"), PAIRS)
def test_in_a_plane(member, setting):
    dim = 1 if member in ONE_DIMENSION else 2
    check(SETTINGS[setting](member, dim), **COARSE.get(member, {}))


@pytest.mark.parametrize("setting", slow_but(SETTINGS, "real"))
def test_in_eight_dimensions(setting):
    check(SETTINGS[setting]("exact", 8))


MORE = {
    "at 0": lambda: real("exact", 2).at(0.0),
    "expanded": lambda: real("exact", 2).expand((2, 3)),
    "expanded base": lambda: real("multivariate", 2).expand((2,)),
    "a context each": lambda: ConditionalInterpolantDistribution(far_flow(1, 3)).condition(
        torch.randn(3, 3)
    ),
    "float32": lambda: real("exact", 2).to(torch.float32),
    "halfway on a support": lambda: real("exact", 2, support=constraints.positive).at(0.7),
}


@pytest.mark.parametrize("name", slow_but(MORE))
def test_in_other_shapes(name):
    check(MORE[name]())


@pytest.mark.parametrize("name", slow_but(SUPPORTS, "simplex"))
def test_on_every_support(name):
    case = SUPPORTS[name]
    flow = far_flow(case.dim)
    whitening = flow.flow.whitening
    whitening.set(whitening.loc, 0.5 * whitening.linear)  # neighbours must not round to one
    check(InterpolantDistribution(flow, support=case.support), free=case.free)


@dataclasses.dataclass(frozen=True)
class Off:
    """The divergence with an error of a few percent."""

    share: float = 0.95

    def __call__(self, velocity, t, x, context):
        return self.share * ExactDivergence()(velocity, t, x, context)


def test_a_wrong_divergence_is_seen():
    wrong = real("exact", 2)
    wrong.transform.divergence = Off()
    total, _ = mass(wrong)
    assert abs(float(total) - 1) > 3 * TOLERANCE


# ---- angles -------------------------------------------------------------------------------------


def torus_flow(dim, context_dim=0, hidden_dims=(16, 16), **choices):
    velocity = TorusMLP(dim, hidden_dims, context_dim)
    with torch.no_grad():
        velocity.output.weight.normal_(std=1.0)
        velocity.shifts.weight[-dim:].normal_(std=1.0)
        velocity.scales.weight.normal_(std=0.05)
    kind = ConditionalInterpolantTransform if context_dim else InterpolantTransform
    choices = {"interpolant": Geodesic(), "solver": FINE, **choices}
    return kind(velocity, **choices).requires_grad_(requires_grad=False)


def angles(dim, base=None, **choices):
    return InterpolantDistribution(torus_flow(dim, **choices), base, support=circular)


def von_mises(*shape):
    loc = torch.linspace(3.0, 4.5, math.prod(shape)).reshape(shape)
    return dist.VonMises(loc, torch.full(shape, 1.5)).to_event(1)


def conditional_angles(dim):
    flow = torus_flow(dim, context_dim=3)
    flow = ConditionalInterpolantDistribution(flow, von_mises(dim), support=circular)
    return flow.condition(torch.randn(3))


ANGLES = {
    "uniform": angles,
    "von Mises": lambda dim: angles(dim, von_mises(dim)),
    "batch of bases": lambda dim: angles(dim, von_mises(3, dim)),
    "conditional": conditional_angles,
    "at 0.4": lambda dim: angles(dim).at(0.4),
    "expanded": lambda dim: angles(dim).expand((3,)),
    **{
        name: partial(angles, solver=finer(solver))
        for name, solver in SOLVERS.items()
        if name not in COARSE
    },
    **{
        f"layers {name}": partial(angles, hidden_dims=widths)
        for name, widths in HIDDEN_DIMS.items()
    },
    "hutchinson": lambda dim: angles(1, divergence=DIVERGENCES["hutchinson"]),
}


@pytest.mark.parametrize("dim", slow_but([1, 2, 4], 1))
@pytest.mark.parametrize("name", slow_but(ANGLES, "von Mises", "conditional"))
@torch.no_grad()
def test_on_the_torus(name, dim):
    distribution = ANGLES[name](dim)
    dim, batch = distribution.event_shape[0], distribution.batch_shape
    if dim <= 2:
        count = 80 if dim == 1 else 40
        line = 2 * math.pi * torch.arange(count) / count - math.pi
        x = torch.cartesian_prod(*[line] * dim).reshape(-1, dim)
    else:
        x = 2 * math.pi * torch.rand(12000, dim) - math.pi
    log_prob = distribution.log_prob(x.reshape(-1, *[1] * len(batch), dim))
    each = (log_prob + dim * math.log(2 * math.pi)).exp()
    assert float(each.max() / each.min()) > 1.2
    stderr = each.std(0) / math.sqrt(len(x)) if dim > 2 else torch.zeros(batch)
    assert float(stderr.max()) < 0.04
    assert bool(((each.mean(0) - 1).abs() < 4.5 * stderr + TOLERANCE).all()), each.mean(0)


# ---- stochastic models --------------------------------------------------------------------------


@torch.no_grad()
def sde_check(distribution, **options):
    """The density of the stochastic model: an estimate without bias, at each point by itself."""
    u, log_share = nodes(distribution.without_support().sample((500,)), 41, reach=5.0)
    y, log_volume = values(distribution, u)
    log_prob, spread = sde_log_prob(distribution, y, **options)
    each = (log_prob + log_volume - log_share).exp() / len(u)
    total, stderr = float(each.sum()), float((each * spread).square().sum().sqrt())
    assert stderr < 0.03
    assert abs(total - 1) < 4.5 * stderr + 0.01, (total, stderr)


SDE_MEMBERS = {**INTERPOLANTS, **LATENT}
SDE_CASES = [
    (member, setting)
    for member in SDE_MEMBERS
    for setting in SETTINGS
    if setting == "real"
    or member == "trigonometric"
    or (member == "linear, bridge" and setting != "radial")
]


@pytest.mark.slow
@pytest.mark.parametrize(("member", "setting"), SDE_CASES)
def test_of_a_stochastic_model(member, setting):
    """A random velocity has no score, and paths that lean on one no variance: these do not."""
    dim, paths = (2, 48) if setting == "radial" else (1, 400)
    sde_check(SETTINGS[setting](member, dim), guidance=0.0, paths=paths, steps=30)


class Perturbed(nn.Module):
    """A velocity with an error, of which the stochastic model is another than the flow."""

    def __init__(self, truth):
        super().__init__()
        self.truth, self.event_dim = truth, truth.event_dim

    def forward(self, t, x, context=None):
        return self.truth(t, x) + 0.2 * (1 - t)[..., None] * torch.sin(2 * x)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [0.5, 1.0])
@pytest.mark.parametrize("name", SDE_MEMBERS)
def test_of_a_stochastic_model_along_guided_paths(name, guidance):
    velocity = Perturbed(random_mixture(1, SDE_MEMBERS[name], seed=2))
    flow = InterpolantTransform(velocity, interpolant=SDE_MEMBERS[name], solver=FINE)
    sde_check(InterpolantDistribution(flow), guidance=guidance, paths=64, steps=40)
