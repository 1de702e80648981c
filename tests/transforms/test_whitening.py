"""The map y = loc + L w, for every member: against its matrix, and inside a flow."""

import copy

import pytest
import torch
from cases import WHITENINGS, random_flow
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_interpolant import (
    FixedGrid,
    InterpolantDistribution,
    InterpolantTransform,
    VelocityMLP,
)
from pyro_interpolant.transforms import DenseWhitening

every_member = pytest.mark.parametrize("name", WHITENINGS)
of_order_d = pytest.mark.parametrize("name", [n for n in WHITENINGS if n != "dense"])


def whitening(name, dim=3):
    kind, linear = WHITENINGS[name]
    map_ = kind(dim)
    map_.set(torch.linspace(-1.0, 2.0, dim), linear(dim))
    return map_


def flow_with(name, dim=2, **choices):
    """A random flow in the coordinates of one member."""
    transform = random_flow(dim, **choices)
    transform.flow.whitening = whitening(name, dim)
    return transform


@every_member
def test_it_starts_as_the_identity(name):
    kind, linear = WHITENINGS[name]
    map_, y = kind(3), torch.randn(5, 3)
    assert map_.is_identity()
    assert map_.log_det == 0
    assert torch.equal(map_.matrix(), torch.eye(3))
    assert torch.equal(map_.to_white(y), y)
    assert torch.equal(map_.from_white(y), y)
    map_.set(torch.ones(3), map_.linear.clone())
    assert map_.is_identity()  # wherever the centre is
    map_.set(torch.ones(3), linear(3))
    assert not map_.is_identity()


@every_member
def test_what_it_does_is_what_its_matrix_does(name):
    for dim in (1, 2, 7):
        map_ = whitening(name, dim)
        matrix = map_.matrix()
        inverse = torch.linalg.inv(matrix)
        assert matrix.shape == (dim, dim)
        for shape in ((dim,), (2, 0, dim), (2, 4, dim)):
            u = torch.randn(shape)
            torch.testing.assert_close(map_.push(u), u @ matrix.T)
            torch.testing.assert_close(map_.unpush(u), u @ inverse.T)
            torch.testing.assert_close(map_.pull(u), u @ inverse)
            torch.testing.assert_close(map_.from_white(u), map_.loc + u @ matrix.T)
            torch.testing.assert_close(map_.to_white(map_.from_white(u)), u)
            torch.testing.assert_close(map_.double_to_white(u), map_.to_white(u))
        torch.testing.assert_close(map_.log_det, torch.linalg.slogdet(matrix).logabsdet)
        map_.set(map_.loc.clone(), -map_.linear)
        assert map_.sign() == torch.linalg.det(map_.matrix()).sign()


def test_a_dense_map_takes_an_inverse_that_is_known():
    map_, linear = DenseWhitening(2), torch.tensor([[2.0, 1.0], [0.0, 4.0]])
    map_.set(torch.zeros(2), linear, torch.linalg.inv(linear))
    torch.testing.assert_close(map_.unpush(map_.push(torch.eye(2))), torch.eye(2))


@every_member
def test_it_is_set_from_one_scale_per_column(name):
    map_, loc, scale = whitening(name), torch.randn(3), torch.tensor([0.5, 1.0, 3.0])
    map_.set_diagonal(loc, scale)
    if name == "scalar":  # one centre for all, and the root mean square about it
        spread = scale.square() + (loc - loc.mean()).square()
        loc, scale = loc.mean().expand(3), spread.mean().sqrt().expand(3)
    expected = scale.diag()
    torch.testing.assert_close(map_.matrix(), expected)
    torch.testing.assert_close(map_.loc, loc)
    torch.testing.assert_close(map_.push(map_.unpush(torch.eye(3))), torch.eye(3))
    torch.testing.assert_close(map_.log_det, torch.linalg.slogdet(expected).logabsdet)


@every_member
def test_a_map_that_cannot_be_is_refused_and_changes_nothing(name):
    map_, loc, linear = whitening(name), torch.zeros(3), WHITENINGS[name][1](3)
    before = {key: value.clone() for key, value in map_.state_dict().items()}
    bad = []
    for value in (0.0, torch.nan, torch.inf):
        bad.append(linear.clone())
        torch.atleast_1d(bad[-1])[..., -1] = value  # a column, an entry, or the number
    for message, *arguments in [
        *(("expected an invertible linear map", loc, other) for other in bad),
        (r"expected loc of shape \(3,\) and linear of shape", torch.zeros(2), linear),
        (r"expected loc of shape \(3,\) and linear of shape", loc, torch.ones(1, 3, 3)),
        ("not finite", torch.full((3,), torch.nan), linear),
    ]:
        with pytest.raises(ValueError, match=message):
            map_.set(*arguments)
    if name == "dense":  # an infinite entry where the determinant is finite
        with pytest.raises(ValueError, match="expected an invertible linear map"):
            map_.set(loc, torch.eye(3).index_fill(0, torch.tensor(2), torch.inf))
    assert all(torch.equal(value, before[key]) for key, value in map_.state_dict().items())


@every_member
def test_it_moves_to_another_type_and_device(name):
    map_, y = whitening(name), torch.randn(5, 3)
    expected = map_.to_white(y)
    map_.to(torch.float32)
    assert {b.dtype for b in map_.buffers()} == {torch.float32}
    torch.testing.assert_close(map_.to_white(y.float()).double(), expected, rtol=1e-5, atol=1e-5)
    map_.set(map_.loc.double(), map_.linear.double())  # what is set takes on the map's own type
    assert {b.dtype for b in map_.buffers()} == {torch.float32}
    map_.to("meta")
    assert map_.push(y.float().to("meta")).device.type == "meta"
    assert map_.pull(y.float().to("meta")).device.type == "meta"


@every_member
def test_rows_far_from_zero_keep_their_digits_in_single_precision(name):
    kind, linear = WHITENINGS[name]
    centre, w = torch.full((3,), 2.0**23), torch.randn(50, 3)
    map_ = kind(3).float()
    map_.set(centre, linear(3))
    y = centre + w @ map_.matrix().double().T
    assert map_.double_to_white(y).dtype == torch.float32
    torch.testing.assert_close(map_.double_to_white(y).double(), w, rtol=1e-5, atol=1e-5)
    assert (map_.to_white(y.float()).double() - w).abs().max() > 0.1


def test_nearly_dependent_columns_are_inverted_to_all_digits_of_single_precision():
    turn = torch.linalg.qr(torch.randn(3, 3))[0]
    linear = (turn @ torch.tensor([1.0, 1e-2, 1e-5]).diag() @ turn.T).float()
    map_ = DenseWhitening(3).float()
    map_.set(torch.zeros(3), linear)
    inverse, log_det = torch.linalg.inv(linear.double()), torch.linalg.slogdet(linear.double())[1]
    torch.testing.assert_close(map_.inverse.double(), inverse, rtol=1e-6, atol=0)
    torch.testing.assert_close(map_.log_det.double(), log_det, rtol=1e-6, atol=0)


@every_member
def test_gradients_with_respect_to_white_rows_are_pulled_back(name):
    map_, y = whitening(name), torch.randn(5, 3, requires_grad=True)
    w = map_.to_white(y)
    (by_w,) = torch.autograd.grad(w.pow(4).sum(), w, retain_graph=True)
    (by_y,) = torch.autograd.grad(w.pow(4).sum(), y)
    torch.testing.assert_close(by_y, map_.pull(by_w))
    assert torch.autograd.gradcheck(map_.to_white, y)
    assert torch.autograd.gradcheck(map_.from_white, y)
    jacobians = torch.func.vmap(torch.func.jacfwd(map_.from_white))(y.detach())
    torch.testing.assert_close(jacobians, map_.matrix().expand(5, 3, 3))


# Inside a flow


@every_member
def test_a_flow_has_the_density_of_the_dense_flow_of_the_same_matrix(name):
    transform, y = flow_with(name), 2 * torch.randn(6, 2)
    dense = copy.deepcopy(transform)
    dense.flow.whitening = DenseWhitening(2)
    map_ = transform.flow.whitening
    dense.flow.whitening.set(map_.loc, map_.matrix())
    here, there = InterpolantDistribution(transform), InterpolantDistribution(dense)
    torch.testing.assert_close(here.log_prob(y), there.log_prob(y))
    torch.testing.assert_close(here.at(0.0).log_prob(y), there.at(0.0).log_prob(y))
    torch.testing.assert_close(here.at(0.4).score(y), there.at(0.4).score(y))


class Still(nn.Module):
    """The velocity that is zero, with its divergence."""

    def forward(self, t, x, context=None):
        return torch.zeros_like(x)

    def forward_and_divergence(self, t, x, context=None):
        return torch.zeros_like(x), x.new_zeros(x.shape[:-1])


class LargestTensor(TorchDispatchMode):
    """The number of elements of the largest tensor that is made inside."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        parts = found if isinstance(found, (tuple, list)) else (found,)
        sizes = [p.numel() for p in parts if isinstance(p, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return found


def of_size(name, dim):
    """Make a flow, set its map, sample and evaluate: all that a user does."""
    kind, linear = WHITENINGS[name]
    with LargestTensor() as largest:
        transform = InterpolantTransform(
            Still(), dim, solver=FixedGrid(steps=2), whitening=kind(dim)
        )
        transform.flow.whitening.set(torch.zeros(dim), linear(dim))
        distribution = InterpolantDistribution(transform)
        y = distribution.sample((4,))
        assert bool(torch.isfinite(distribution.log_prob(y.clone())).all())
        assert not transform.flow.whitening.is_identity()
        distribution.score(y)
    return largest.elements, transform.flow.whitening


@of_order_d
def test_many_dimensions_need_memory_of_their_order(name):
    dim = 20_000
    elements, map_ = of_size(name, dim)
    assert elements <= 16 * dim  # rows times nodes
    assert sum(b.numel() for b in map_.buffers()) <= 2 * dim + 1


def test_a_dense_map_is_seen_to_need_more():
    assert of_size("dense", 100)[0] == 100**2


def test_a_map_of_another_type_is_copied_not_converted():
    flow = InterpolantTransform(VelocityMLP(2, (8,)).double())
    whitening = flow.flow.whitening
    other = InterpolantTransform(VelocityMLP(2, (8,)).float(), whitening=whitening)
    assert (whitening.loc.dtype, other.flow.loc.dtype) == (torch.float64, torch.float32)
    same = InterpolantTransform(VelocityMLP(2, (8,)).double(), whitening=whitening)
    assert same.flow.whitening is whitening
