import itertools
import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from pyro_interpolant import (
    Geodesic,
    InterpolantDistribution,
    InterpolantTransform,
    TorusMLP,
    circular,
    independent,
    optimal_transport,
)
from pyro_interpolant.training.objective import Objective
from pyro_interpolant.training.rows import Rows

COUPLINGS = [independent, optimal_transport]


def cost(x0, x1):
    return float((x0.double() - x1.double()).square().sum())


def test_optimal_transport_is_the_best_of_all_assignments():
    for _ in range(3):
        x0, x1 = torch.randn(5, 2), torch.randn(5, 2)
        best = min(cost(x0[list(p)], x1) for p in itertools.permutations(range(5)))
        assert cost(optimal_transport(x0, x1), x1) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_partners_are_the_base_draws_each_once(coupling):
    x0, x1 = torch.randn(30, 3), torch.randn(30, 3)
    kept0, kept1 = x0.clone(), x1.clone()
    partners = coupling(x0, x1, torch.randn(30, 2))
    assert partners.shape == x0.shape
    assert partners.dtype == x0.dtype
    order = x0[:, 0].argsort()
    again = partners[:, 0].argsort()
    assert torch.equal(x0[order], partners[again])
    assert torch.equal(x0, kept0)
    assert torch.equal(x1, kept1)


def test_pairs_are_in_the_order_of_the_data_and_have_gradients():
    x1 = torch.arange(6.0)[:, None]
    x0 = (torch.tensor([3.0, 0.0, 5.0, 1.0, 4.0, 2.0])[:, None] + 0.1).requires_grad_()
    partners, order = optimal_transport(x0, x1), torch.randperm(6)
    assert torch.equal(partners, x1 + 0.1)
    assert torch.equal(optimal_transport(x0, x1[order]), partners[order])
    partners.sum().backward()
    assert torch.equal(x0.grad, torch.ones(6, 1))
    assert independent(x0, x1) is x0


def test_optimal_transport_is_exact_in_float32_and_far_from_the_origin():
    for offset in (0.0, 3e3):
        x0, x1 = (torch.randn(2, 64, 2) + offset).float()
        exact = torch.cdist(x1.double(), x0.double(), compute_mode="donot_use_mm_for_euclid_dist")
        _, columns = linear_sum_assignment(exact.square().numpy())
        best = cost(x0[torch.from_numpy(columns)], x1)
        assert cost(optimal_transport(x0, x1), x1) == pytest.approx(best, rel=1e-5)


def test_a_context_keeps_draws_among_rows_of_like_context():
    """Two groups of rows in the same place: draws are exchanged within each alone."""
    count = 60
    context = torch.cat((torch.zeros(count, 1), torch.ones(count, 1)))
    x0, x1 = torch.randn(2 * count, 2), torch.randn(2 * count, 2)
    partners = optimal_transport(x0, x1, context)
    first = {tuple(row) for row in x0[:count].tolist()}
    kept = [tuple(row) in first for row in partners.tolist()]
    assert all(kept[:count])
    assert not any(kept[count:])
    without = optimal_transport(x0, x1)
    assert (without - x1).square().sum() < (partners - x1).square().sum()
    assert (partners - x1).square().sum() < 0.6 * (x0 - x1).square().sum()
    # The units of the context do not matter, and one that does not vary changes nothing.
    assert torch.equal(partners, optimal_transport(x0, x1, 1e3 * context))
    assert torch.equal(without, optimal_transport(x0, x1, torch.ones(2 * count, 3)))


def test_on_a_torus_distances_are_the_shorter_way_around():
    x0, x1 = 2 * math.pi * torch.rand(2, 6, 2) - math.pi

    def around(x0, x1):
        d = (x0 - x1).abs()
        return float(torch.minimum(d, 2 * math.pi - d).square().sum())

    best = min(around(x0[list(p)], x1) for p in itertools.permutations(range(6)))
    found = optimal_transport(x0, x1, on_torus=True)
    assert around(found, x1) == pytest.approx(best, rel=1e-12)
    assert around(optimal_transport(x0, x1), x1) > best + 0.1


def test_training_on_angles_pairs_them_so():
    x = torch.cat((torch.full((300, 1), -3.1), torch.zeros(300, 1))) + 0.01 * torch.randn(600, 1)
    flow = InterpolantDistribution(
        InterpolantTransform(TorusMLP(1, (8,)), interpolant=Geodesic()), support=circular
    )
    for coupling, least, most in ((optimal_transport, 0.6, 1.1), (independent, 2.8, 3.8)):
        made = Objective(flow.transform.flow, flow.white_base(), coupling)
        points = made.points([lambda: Rows(x, None)])[0]
        energy = float(torch.cat([p.target.flatten() for p in points]).square().mean())
        assert least < energy < most  # a twelfth and a third of pi squared


@pytest.mark.parametrize("kind", ["one far context", "heavy tails"])
def test_far_contexts_do_not_undo_the_context(kind):
    torch.manual_seed(0)
    c = torch.randn(400, 1)
    x1 = 0.9 * c + 0.3 * torch.randn(400, 1)
    shown = c.clone() if kind == "one far context" else c.sinh().sinh()
    if kind == "one far context":
        shown[0] = 1e5
    partners = optimal_transport(torch.randn(400, 1), x1, shown)
    known = slice(1, None)
    correlation = torch.corrcoef(torch.stack((partners[known, 0], c[known, 0])))[0, 1]
    assert abs(float(correlation)) < 0.3  # by standard deviations 0.9 and 0.8; normal ones: 0.1
