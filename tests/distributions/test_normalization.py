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
from pyro.distributions import constraints
from torch.distributions import biject_to

import pyro_interpolant as pi
from pyro_interpolant.diffusion import sde_log_prob
from pyro_interpolant.training.preprocessing import marginal_transform, radial_transform
from pyro_interpolant.transforms.gaussianize import Gaussianized

TOLERANCE = 1e-3
FINE = pi.FixedGrid(steps=16)  # masses within 7e-4 of one, as with 24


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
    spread = pi.ExactDivergence()(velocity, t, x, context).std()
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


# Of every family its members.
FAMILIES = {
    "interpolant": {**INTERPOLANTS, **LATENT},
    "solver": {name: finer(solver) for name, solver in SOLVERS.items()},
    "whitening": {name: name for name in WHITENINGS},
    "build": {
        **FLOWS,
        **{n: partial(random_flow, hidden_dims=widths) for n, widths in HIDDEN_DIMS.items()},
    },
    "base": {
        **BASES,
        "flow": lambda dim: pi.InterpolantDistribution(far_flow(dim)),
        "batch": lambda dim: dist.Normal(torch.randn(3, dim), 1.0).to_event(1),
    },
}

# Of first order in the step; with a kink; wide.
COARSE = {
    "euler": {"tolerance": 5e-3},
    "random": {"tolerance": 5e-3},
    "laplace": {"tolerance": 5e-3, "count": 161},
    "batch": {"count": 65},
}


def parts(member, dim, context_dim=0):
    """A flow, with the named members where a member is a dictionary of families, and its base."""
    choices = {family: FAMILIES[family][name] for family, name in member.items()}
    base = choices.pop("base", lambda dim: None)(dim)
    return far_flow(dim, context_dim, **choices), base


def mapped(make, dim):
    """Real vectors behind a map that is set by rows with long tails and several modes."""
    rows = torch.randn(4000, dim) + 3 * (torch.rand(4000, 1) < 0.3)
    return Gaussianized(constraints.real_vector, make((0.7 * rows).sinh()))


def real(member, dim, **options):
    return pi.InterpolantDistribution(*parts(member, dim), **options)


def conditional(member, dim):
    flow = pi.ConditionalInterpolantDistribution(*parts(member, dim, 3))
    return flow.condition(torch.randn(3))


def joint(member, dim):
    first = {"scale": ((), constraints.positive)}
    sites = {**first, "others": ((dim - 1,), constraints.real)} if dim > 1 else first
    return pi.JointInterpolantDistribution(*parts(member, dim), sites=sites)


SETTINGS = {
    "real": real,
    "support": partial(real, support=constraints.positive),
    "marginals": lambda m, dim: real(m, dim, support=mapped(marginal_transform, dim)),
    "radial": lambda m, dim: real(m, dim, support=mapped(radial_transform, dim)),
    "conditional": conditional,
    "joint": joint,
    "at 0.4": lambda member, dim: real(member, dim).at(0.4),
}


# ---- densities of flows -------------------------------------------------------------------------


def rows_of_members():
    """Return a setting, and a member of each family, for each of some flows.

    Each setting is there twice and each member at least once, with other ones each time.
    """
    for row in range(2 * len(SETTINGS)):
        again = row // len(SETTINGS)
        members = {}
        for shift, (family, named) in enumerate(FAMILIES.items(), 1):
            names = list(named)
            members[family] = names[(row + shift * (again + 1)) % len(names)]
        yield list(SETTINGS)[row % len(SETTINGS)], members


ROWS = [
    pytest.param(
        *row,
        id=f"{row[0]}-{'-'.join(row[1].values())}",
        marks=pytest.mark.slow if COARSE.keys() & row[1].values() else (),
    )
    for row in rows_of_members()
]


def test_every_member_is_in_some_row():
    used = {(family, name) for _, members in rows_of_members() for family, name in members.items()}
    assert used == {(family, name) for family, named in FAMILIES.items() for name in named}


@pytest.mark.parametrize(("setting", "members"), ROWS)
def test_in_a_plane(setting, members):
    options = {}
    for name in members.values():
        options |= COARSE.get(name, {})
    check(SETTINGS[setting](members, 2), **options)


def test_of_an_estimated_trace_in_one_dimension():
    """Where the estimate has no error; elsewhere log_prob is right on average alone."""
    flow = far_flow(1, divergence=DIVERGENCES["hutchinson"])
    check(pi.InterpolantDistribution(flow))


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["conditional", "joint"])
def test_in_eight_dimensions(setting):
    check(SETTINGS[setting]({}, 8))


MORE = {
    "expanded": lambda: real({"base": "multivariate"}, 2).expand((2, 3)),
    "a context each": lambda: pi.ConditionalInterpolantDistribution(far_flow(1, 3)).condition(
        torch.randn(3, 3)
    ),
    "float32": lambda: real({}, 2).to(torch.float32),
}


@pytest.mark.parametrize("name", MORE)
def test_in_other_shapes(name):
    check(MORE[name]())


@pytest.mark.parametrize(
    "name", slow_but(["simplex", "corr_matrix", "positive_ordered_vector", "tempered"], "simplex")
)
def test_on_supports(name):
    """Of all of them test_constraints.py has the Jacobian; here, that they are images of all."""
    case = SUPPORTS[name]
    flow = far_flow(case.dim)
    whitening = flow.flow.whitening
    whitening.set(whitening.loc, 0.5 * whitening.linear)  # neighbours must not round to one
    check(pi.InterpolantDistribution(flow, support=case.support), free=case.free)


@dataclasses.dataclass(frozen=True)
class Off:
    """The divergence with an error of a few percent."""

    share: float = 0.95

    def __call__(self, velocity, t, x, context):
        return self.share * pi.ExactDivergence()(velocity, t, x, context)


def test_a_wrong_divergence_is_seen():
    wrong = real({}, 2)
    wrong.transform.divergence = Off()
    total, _ = mass(wrong)
    assert abs(float(total) - 1) > 3 * TOLERANCE


# ---- angles -------------------------------------------------------------------------------------


def torus_flow(dim, context_dim=0, hidden_dims=(16, 16), **choices):
    velocity = pi.TorusMLP(dim, hidden_dims, context_dim)
    with torch.no_grad():
        velocity.output.weight.normal_(std=1.0)
        velocity.shifts.weight[-dim:].normal_(std=1.0)
        velocity.scales.weight.normal_(std=0.05)
    kind = pi.ConditionalInterpolantTransform if context_dim else pi.InterpolantTransform
    choices = {"interpolant": pi.Geodesic(), "solver": FINE, **choices}
    return kind(velocity, **choices).requires_grad_(requires_grad=False)


def angles(dim, base=None, **choices):
    return pi.InterpolantDistribution(torus_flow(dim, **choices), base, support=pi.circular)


def von_mises(*shape):
    loc = torch.linspace(3.0, 4.5, math.prod(shape)).reshape(shape)
    return dist.VonMises(loc, torch.full(shape, 1.5)).to_event(1)


def conditional_angles(dim, **choices):
    flow = torus_flow(dim, context_dim=3, **choices)
    flow = pi.ConditionalInterpolantDistribution(flow, von_mises(dim), support=pi.circular)
    return flow.condition(torch.randn(3))


FINER = {name: finer(solver) for name, solver in SOLVERS.items()}
ANGLES = {
    "uniform, one layer": (1, lambda dim: angles(dim, hidden_dims=HIDDEN_DIMS["one"])),
    "von Mises, heun": (2, lambda dim: angles(dim, von_mises(dim), solver=FINER["heun"])),
    "batch of bases": (4, lambda dim: angles(dim, von_mises(3, dim))),
    "conditional, warped": (2, lambda dim: conditional_angles(dim, solver=FINER["warped"])),
    "at 0.4, residual": (4, lambda dim: angles(dim, hidden_dims=HIDDEN_DIMS["residual"]).at(0.4)),
    "expanded, midpoint": (1, lambda dim: angles(dim, solver=FINER["midpoint"]).expand((3,))),
    "adaptive": (1, lambda dim: angles(dim, solver=FINER["adaptive"])),
    "hutchinson": (1, lambda dim: angles(dim, divergence=DIVERGENCES["hutchinson"])),
}


@pytest.mark.parametrize("name", ANGLES)
@torch.no_grad()
def test_on_the_torus(name):
    dim, make = ANGLES[name]
    distribution = make(dim)
    batch = distribution.batch_shape
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
SDE_SETTINGS = ["real", "support", "marginals", "conditional", "joint", "at 0.4"]


@pytest.mark.slow
@pytest.mark.parametrize(("member", "setting"), list(zip(SDE_MEMBERS, SDE_SETTINGS, strict=True)))
def test_of_a_stochastic_model(member, setting):
    """A random velocity has no score, and paths that lean on one no variance: these do not."""
    distribution = SETTINGS[setting]({"interpolant": member}, 1)
    sde_check(distribution, guidance=0.0, paths=400, steps=30)
