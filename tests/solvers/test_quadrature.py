import math

import pytest
import torch

from pyro_interpolant.solvers import quadrature

STEPS = [1, 2, 3, 4, 7, 8, 16, 33]
WARPS = [0.0, 0.3, 0.6, 0.95]


def clenshaw_curtis(steps, warp=0.0):
    return tuple(map(torch.tensor, quadrature.clenshaw_curtis(steps, warp)))


def integration_matrix(steps, warp=0.0):
    return torch.tensor(quadrature.integration_matrix(steps, warp))


def degree(steps, warp):
    """The polynomial degree that the docstring promises."""
    return steps if warp == 0 else (steps - 1) // 2


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("steps", STEPS)
def test_nodes_ascend_from_zero_to_one_and_weights_sum_to_one(steps, warp):
    nodes, weights = clenshaw_curtis(steps, warp)
    assert nodes.shape == weights.shape == (steps + 1,)
    assert nodes.dtype == weights.dtype == torch.float64
    assert nodes[0] == 0
    assert nodes[-1] == 1
    assert (nodes.diff() > 0).all()
    # A warped rule of one step is of degree 0 by the docstring, which is this sum.
    torch.testing.assert_close(weights.sum(), torch.tensor(1.0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("steps", STEPS)
def test_polynomials_up_to_the_stated_degree_are_exact(steps, warp):
    nodes, weights = clenshaw_curtis(steps, warp)
    for p in range(degree(steps, warp) + 1):
        assert float((weights * nodes**p).sum()) == pytest.approx(1 / (p + 1), abs=1e-13), p


@pytest.mark.parametrize(("steps", "warp"), [(2, 0.0), (4, 0.0), (4, 0.5), (8, 0.5)])
def test_the_degree_is_not_understated_by_much(steps, warp):
    nodes, weights = clenshaw_curtis(steps, warp)
    p = 2 * steps + 4
    assert abs(float((weights * nodes**p).sum()) - 1 / (p + 1)) > 1e-9


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


def test_a_warp_moves_all_inner_nodes_toward_the_data():
    plain, warped = clenshaw_curtis(8)[0], clenshaw_curtis(8, 0.5)[0]
    assert (warped[1:-1] > plain[1:-1]).all()


def test_the_nodes_are_those_of_the_docstring():
    s = (1 - torch.cos(math.pi * torch.arange(7) / 6)) / 2
    torch.testing.assert_close(clenshaw_curtis(6)[0], s)
    torch.testing.assert_close(clenshaw_curtis(6, 0.4)[0], 1.4 * s - 0.4 * s**2)


@pytest.mark.parametrize("steps", [0, -3])
def test_fewer_than_one_step_is_refused(steps):
    with pytest.raises(ValueError, match=f"steps >= 1, a whole number, got {steps}"):
        clenshaw_curtis(steps)


@pytest.mark.parametrize("warp", [-0.1, 1.0, 2.0, math.nan, "0.5"])
def test_a_warp_outside_its_range_is_refused(warp):
    with pytest.raises(ValueError, match=r"a warp in \[0, 1\), got"):
        clenshaw_curtis(4, warp)


@pytest.mark.parametrize("warp", WARPS)
@pytest.mark.parametrize("steps", STEPS)
def test_the_matrix_integrates_polynomials_to_every_node(steps, warp):
    """In s their degree is twice that in t where nodes are warped, and one more by t'."""
    nodes, weights = clenshaw_curtis(steps, warp)
    q = integration_matrix(steps, warp)
    assert q.shape == (steps + 1, steps + 1)
    for p in range(degree(steps, warp) + 1):
        error = q @ nodes**p - nodes ** (p + 1) / (p + 1)
        assert float(error.abs().max()) < 1e-12, p
    torch.testing.assert_close(q[-1], weights, rtol=0, atol=1e-13)
    assert (q[0] == 0).all()


def test_the_matrix_refuses_what_the_nodes_refuse():
    with pytest.raises(ValueError, match="steps >= 1, a whole number"):
        integration_matrix(0)
