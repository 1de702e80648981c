"""What Pyro asserts of every transform, of the whole chain from the base to the support."""

import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from cases import FLOWS, SUPPORTS, losses_of_adam
from kinds import GRID, KINDS
from torch.distributions import ComposeTransform

from pyro_interpolant import FixedGrid, InterpolantDistribution

DELTA, EPSILON = 1e-6, 1e-4  # of an inverse, and of a numeric log-determinant


def of_network(name, dim=2, context_dim=0):
    """Return a flow of a network, given a context if it takes one."""
    transform = FLOWS[name](dim, context_dim=context_dim, solver=GRID)
    context = torch.randn(context_dim)
    return InterpolantDistribution(transform.condition(context) if context_dim else transform)


# More kinds, for what a network may change.
MADE = {
    **KINDS,
    "five": lambda: of_network("two", 5),
    "three layers": lambda: of_network("three"),
    "given, three layers": lambda: of_network("three", context_dim=3),
    "given, own network": lambda: of_network("own", context_dim=3),
    "halfway, own network": lambda: of_network("own").at(0.6),
}
# One of each: network, support, base, context, batch, time, solver.
FEW = ["given, own network", "simplex", "flow base", "given rows", "angles", "halfway", "adaptive"]


def made(kind):
    """Return a kind of flow that is solved finely, and the chain of its transforms."""
    d = MADE[kind]()
    if isinstance(d.transform.solver, FixedGrid):
        d.transform.solver = FixedGrid(steps=48)
    return d, ComposeTransform(d.transforms)


def free(kind, y):
    """Return the coordinates of values that a density is with respect to, shape ``(*, D)``."""
    found = SUPPORTS[kind].free(y) if kind in ("simplex", "corr_cholesky") else y
    return found.reshape(*found.shape[: found.dim() - (2 if kind == "shaped" else 1)], -1)


@pytest.mark.parametrize("kind", MADE)
@torch.no_grad()
def test_inverse_and_jacobian(kind):
    """The way back is solved, not remembered; the density is the base's over the Jacobian."""
    d, chain = made(kind)
    x = d.base_dist.sample((10,))
    y = chain(x)
    d.clear_cache()
    back = chain.inv(y.clone())
    torch.testing.assert_close(chain(back.clone()), y, rtol=DELTA, atol=DELTA)
    there, here = (chain.log_abs_det_jacobian(s, y.clone()) for s in (x.clone(), back))
    torch.testing.assert_close(there, here, rtol=0, atol=DELTA)
    torch.testing.assert_close(chain.inv.log_abs_det_jacobian(y, x), -there)
    assert there.shape == x.shape[:-1]
    gap = back - x
    if "angle" in kind:  # whole turns are lost on the torus
        gap = torch.remainder(gap + torch.pi, 2 * torch.pi) - torch.pi
    assert gap.abs().max() < DELTA
    if kind == "hutchinson":  # its log-determinant is an estimate, always the same
        return
    x = d.base_dist.sample()
    index = (0,) * (x.dim() - 1)  # one member of a batch: all move, and its own image is read
    steps = EPSILON * torch.eye(x.shape[-1]).unsqueeze(1) / 2
    steps = steps if x.dim() > 1 else steps[:, 0]
    ends = [chain(x + sign * steps)[(slice(None), *index)] for sign in (1, -1)]
    numeric = (free(kind, ends[0]) - free(kind, ends[1])) / EPSILON
    log_det = torch.linalg.slogdet(numeric).logabsdet
    y = chain(x)
    found = chain.log_abs_det_jacobian(x, y)[index]
    torch.testing.assert_close(found, log_det, rtol=0, atol=EPSILON)
    if kind != "samples":
        expected = d.base_dist.log_prob(x)[index] - log_det
        found = d.log_prob(y.clone())[index]
        torch.testing.assert_close(found, expected, rtol=0, atol=EPSILON)


@torch.no_grad()
def test_shapes():
    for kind in (*FEW, "shaped"):
        check_shapes(kind)


def check_shapes(kind):
    d, chain = made(kind)
    d.transform.solver = FixedGrid(steps=1)
    full = d.base_dist.shape()
    for lead in ((), (3,), (3, 4, 5)):
        x = torch.randn(*lead, *full)
        y = chain(x)
        assert y.shape == lead + d.shape()
        assert tuple(chain.forward_shape(x.shape)) == y.shape
        assert tuple(chain.inverse_shape(y.shape)) == x.shape
        # Of one event alone: the chain knows its context, and not that there is a batch.
        assert chain.forward_shape(full[-1:])[-d.event_dim :] == d.event_shape
        base = dist.Normal(torch.zeros(*lead, *full), 1.0)
        flow = dist.TransformedDistribution(base, d.transforms)
        assert flow.shape() == y.shape == flow.sample().shape
        assert flow.log_prob(flow.sample()).shape == lead + d.batch_shape
        back = dist.TransformedDistribution(base, [d.transform.inv])
        assert back.shape() == x.shape == back.sample().shape
        assert back.log_prob(back.sample()).shape == lead + full[:-1]
    assert chain.domain.event_dim == 1
    assert chain.codomain.event_dim == d.event_dim
    assert chain.bijective


@pytest.mark.parametrize("kind", [*FEW, "hutchinson"])
def test_three_steps_of_maximum_likelihood(kind):
    """Through one reused distribution; the value follows the weights, as a fresh copy's does."""
    d = MADE[kind]()
    x = d.sample((10,))

    def check():
        fresh = -copy.deepcopy(d).log_prob(x.clone()).mean()
        torch.testing.assert_close(-d.log_prob(x).mean(), fresh)

    losses = losses_of_adam(d, d.transform.flow.parameters(), x, rate=2e-3, check=check)
    assert losses[2] < losses[1] < losses[0]


@torch.no_grad()
def test_parts():
    """Each part can be inverted, kept with a cache or without, copied and pickled."""
    for kind in (*FEW, "stack"):
        check_parts(kind)


def check_parts(kind):
    d, chain = made(kind)
    x = d.base_dist.sample((3,))
    for cache_size in (0, 1):
        module = dist.transforms.ComposeTransformModule(d.transforms, cache_size=cache_size)
        assert set(module.parameters()) == set(d.transform.parameters())
        torch.testing.assert_close(module(x), chain(x.clone()))
    for part in d.transforms:
        assert part.inv.inv is part
        assert part.inv is part.inv
        assert part.bijective
        y = part(x)
        for other in (
            part.with_cache(0),
            part.with_cache(1),
            copy.deepcopy(part),
            pickle.loads(pickle.dumps(part)),
        ):
            torch.testing.assert_close(other(x.clone()), y)
            assert other.inv.inv is other
        x = y
