import math

import pytest
import torch

from pyro_interpolant.solvers import quadrature

RULES = [(1, 0.0), (2, 0.0), (3, 0.3), (7, 0.95), (8, 0.6), (16, 0.0), (33, 0.3)]  # steps, warps


def clenshaw_curtis(steps, warp=0.0):
    return tuple(map(torch.tensor, quadrature.clenshaw_curtis(steps, warp)))


@pytest.mark.parametrize(("steps", "warp"), RULES)
def test_polynomials_up_to_the_stated_degree_are_exact(steps, warp):
    """To the end by the weights, to every node by the matrix."""
    nodes, weights = clenshaw_curtis(steps, warp)
    q = torch.tensor(quadrature.integration_matrix(steps, warp))
    assert nodes.shape == weights.shape == (steps + 1,)
    assert nodes.dtype == weights.dtype == torch.float64
    assert q.shape == (steps + 1, steps + 1)
    assert (nodes[0], nodes[-1]) == (0, 1)
    assert (nodes.diff() > 0).all()
    # A warped rule of one step is of degree 0 by the docstring, which is this sum.
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0), rtol=0, atol=1e-14)
    for p in range((steps if warp == 0 else (steps - 1) // 2) + 1):
        assert float((weights * nodes**p).sum()) == pytest.approx(1 / (p + 1), abs=1e-13), p
        error = q @ nodes**p - nodes ** (p + 1) / (p + 1)
        assert float(error.abs().max()) < 1e-12, p
    torch.testing.assert_close(q[-1], weights, rtol=0, atol=1e-13)
    assert (q[0] == 0).all()


@pytest.mark.parametrize("warp", [0.0, 0.5])
def test_convergence_is_spectral(warp):
    errors = []
    for steps in (4, 8, 16):
        nodes, weights = clenshaw_curtis(steps, warp)
        errors.append(abs(float((weights * nodes.exp()).sum()) - (math.e - 1)))
    assert errors[0] < 1e-3
    assert errors[1] < 1e-3 * errors[0] + 1e-15
    assert errors[2] < 1e-13


def test_weights_without_warp_are_positive_and_symmetric():
    nodes, weights = clenshaw_curtis(9)
    assert (weights > 0).all()
    torch.testing.assert_close(weights, weights.flip(0))
    torch.testing.assert_close(nodes, 1 - nodes.flip(0))


def test_the_nodes_are_those_of_the_docstring():
    s = (1 - torch.cos(math.pi * torch.arange(7) / 6)) / 2
    torch.testing.assert_close(clenshaw_curtis(6)[0], s)
    torch.testing.assert_close(clenshaw_curtis(6, 0.4)[0], 1.4 * s - 0.4 * s**2)
