import copy
import math

import pytest
import torch
from gaussians import GaussianTransport

from pyro_interpolant import (
    InterpolantDistribution,
    InterpolantTransform,
    LearnedInterpolant,
    Linear,
    Trigonometric,
    VelocityMLP,
    load,
    save,
)
from pyro_interpolant.diffusion import convert

KINDS = {
    "scalar": {},
    "matrices": {"event_dim": 3, "matrices": True},
    "network": {"event_dim": 3, "network": (8, 8)},
    "both": {"event_dim": 3, "matrices": True, "network": (8,)},
    "network alone": {"modes": 0, "event_dim": 3, "network": (8,)},
}


def perturbed(name):
    interpolant = LearnedInterpolant(**{"modes": 4, **KINDS[name]}).double()
    for weight in interpolant.weights():
        weight.copy_(0.3 * torch.randn_like(weight))
    interpolant.centres.normal_()
    return interpolant


@pytest.mark.parametrize("name", KINDS)
def test_a_path_from_trigonometric_with_exact_ends_and_its_derivative(name):
    interpolant, x0, x1, t, h = perturbed(name), *torch.randn(2, 6, 3), torch.rand(6), 1e-6
    start = LearnedInterpolant(**{"modes": 4, **KINDS[name]}).double()
    for a, b in zip(start.sample(t, x0, x1), Trigonometric().sample(t, x0, x1), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)
    for end, x in ((0.0, x0), (1.0, x1)):
        found = interpolant.sample(torch.tensor(end), x0, x1)[0]
        torch.testing.assert_close(found, x, rtol=0, atol=1e-13)
    middle = interpolant.sample(torch.tensor(0.5), x0, x1)[0]
    assert (middle - Trigonometric().sample(torch.tensor(0.5), x0, x1)[0]).abs().max() > 0.05
    for times, shape in [((), (5, 3)), ((5,), (5, 3)), ((4, 1), (4, 5, 3))]:
        t, x0, x1 = 0.1 + 0.8 * torch.rand(times), torch.randn(shape), torch.randn(shape)
        x_t, dx_t = interpolant.sample(t, x0, x1)
        assert x_t.shape == dx_t.shape == shape
        ahead, behind = (interpolant.sample(t + s, x0, x1)[0] for s in (h, -h))
        torch.testing.assert_close(dx_t, (ahead - behind) / (2 * h), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", KINDS)
def test_it_is_saved_and_copied_and_not_trained_with_the_flow(name, tmp_path):
    flow = InterpolantTransform(VelocityMLP(3, (8, 8)), interpolant=perturbed(name)).double()
    own = {id(weight) for weight in flow.interpolant.weights()}
    assert own
    assert not own & {id(p) for p in flow.parameters()}
    assert not any(weight.requires_grad for weight in flow.interpolant.weights())
    assert own <= {id(b) for b in flow.buffers()}
    save(InterpolantDistribution(flow), tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors").transform.interpolant
    t, x0, x1 = torch.rand(6), torch.randn(6, 3), torch.randn(6, 3)
    expected = flow.interpolant.sample(t, x0, x1)
    for other in (again, copy.deepcopy(flow).interpolant):
        for a, b in zip(other.sample(t, x0, x1), expected, strict=True):
            assert torch.equal(a, b)
    assert flow.float().interpolant.waves.dtype == torch.float32


def test_scalar_weights_alone_are_a_linear_interpolant():
    t = torch.rand(5)
    a, b, g = perturbed("scalar").coefficients(t)
    assert a.shape == b.shape == (5,)
    assert not g.any()
    for name in ("matrices", "network", "both"):
        with pytest.raises(TypeError, match="no scalar coefficients"):
            perturbed(name).coefficients(t)


def test_a_path_about_centres_is_no_sum_of_noise_and_data():
    """Its coefficients alone do not say where the rest is: no score is to be had from them."""
    path = perturbed("scalar")
    path.centres.zero_()
    assert path.is_linear()
    path.centres[1] = 1.0
    assert not path.is_linear()
    with pytest.raises(ValueError, match="expected a linear interpolant, got LearnedInterpolant"):
        convert(path, 0.5, torch.zeros(2), velocity=torch.zeros(2))


@pytest.mark.parametrize("dim", [2, 8])
def test_matrices_start_at_the_geodesic_between_gaussians(dim):
    """Its law at time t is that of the optimal path, and its drift is the geodesic's."""
    pair = GaussianTransport(1, dim)
    (m0, m1), (s0, s1) = pair.means, pair.covs
    interpolant = LearnedInterpolant(12, event_dim=dim, matrices=True).double()
    interpolant.start_from_moments(m0, s0, m1, s1)
    root, inverse = pair.roots[0], pair.roots[0].inverse()
    values, vectors = torch.linalg.eigh(root @ s1 @ root)
    transport = inverse @ ((vectors * values.sqrt()) @ vectors.T) @ inverse
    for t in (0.2, 0.5, 0.9):
        a, b = interpolant._series(interpolant._basis(torch.tensor(t))[0], interpolant.waves)
        cov = a @ s0 @ a.T + b @ s1 @ b.T
        m = (1 - t) * torch.eye(dim) + t * transport
        expected = m @ s0 @ m.T
        torch.testing.assert_close(cov, expected, rtol=0.02, atol=0.02 * float(expected.max()))
        middle = interpolant.sample(torch.tensor(t), m0[None], m1[None])[0][0]
        torch.testing.assert_close(middle, (1 - t) * m0 + t * m1)


def test_the_trigonometric_energy_from_a_standard_normal_is_known():
    """From N(0, I) to any centred Gaussian it is pi^2 / 8 times the squared distance."""
    pair = GaussianTransport(0, 3)
    pair.means = torch.zeros(2, 3)
    pair.covs[0] = torch.eye(3)
    pair.roots[0] = torch.eye(3)
    ratio = pair.energy(Trigonometric()) / pair.w2()
    assert ratio == pytest.approx(math.pi**2 / 8, rel=1e-6)
    assert pair.energy(Linear()) > pair.w2()


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "expected modes >= 0, a whole number, got -1", {"modes": -1}),
        (ValueError, "expected event_dim for matrices or a network", {"matrices": True}),
        (ValueError, "expected event_dim for matrices or a network", {"network": (8,)}),
        (TypeError, "network, a tuple of whole numbers", {"event_dim": 2, "network": 64}),
    ],
)
def test_impossible_arguments(error, message, arguments):
    with pytest.raises(error, match=message):
        LearnedInterpolant(**arguments)


@pytest.mark.parametrize(("seed", "dim"), [(0, 2), (1, 8), (2, 2)])
def test_scalar_waves_start_at_their_shortest_path_between_gaussians(seed, dim):
    pair = GaussianTransport(seed, dim)
    interpolant = LearnedInterpolant(5).double()
    moments = pair.means[0], pair.covs[0], pair.means[1], pair.covs[1]
    interpolant.start_from_moments(*moments)
    best, gap = pair.energy(interpolant, centred=True), pair.energy(Trigonometric()) - pair.w2()
    assert 0 < best - pair.w2() < gap / 3
    for weight in (interpolant.waves[0, 0], interpolant.waves[1, 1]):
        for step in (0.02, -0.02):  # nothing nearby is shorter
            weight.add_(step)
            assert pair.energy(interpolant, centred=True) > best - 1e-4
            weight.sub_(step)


@pytest.mark.parametrize("kind", [{}, {"event_dim": 3, "matrices": True}])
def test_the_start_is_taken_in_the_metric(kind):
    """Whitened moments with their metric give the path of the data coordinates."""
    pair = GaussianTransport(0, 3)
    linear = torch.diag(torch.tensor([2.0, 0.5, 1.0])) + 0.3 * torch.randn(3, 3)
    back = linear.inverse()
    moments = pair.means[0], pair.covs[0], pair.means[1], pair.covs[1]
    white = [back @ s @ back.T if s.dim() == 2 else back @ s for s in moments]
    plain, other = (LearnedInterpolant(5, **kind).double() for _ in range(2))
    plain.start_from_moments(*moments)
    other.start_from_moments(*white, metric=linear)
    t, x0, x1 = torch.rand(6), torch.randn(6, 3), torch.randn(6, 3)
    expected = plain.sample(t, x0, x1)[0]
    found = other.sample(t, x0 @ back.T, x1 @ back.T)[0] @ linear.T
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_start_without_a_size_is_saved_too(tmp_path):
    pair, interpolant = GaussianTransport(0, 3), LearnedInterpolant(2).double()
    interpolant.start_from_moments(pair.means[0], pair.covs[0], pair.means[1], pair.covs[1])
    flow = InterpolantTransform(VelocityMLP(3, (8, 8)), interpolant=interpolant).double()
    save(InterpolantDistribution(flow), tmp_path / "flow.safetensors")
    again = load(tmp_path / "flow.safetensors").transform.interpolant
    assert torch.equal(again.centres, interpolant.centres)
    with pytest.raises(ValueError, match="expected an interpolant of event_dim=2, got 3"):
        again.check_ends(2)


def test_a_network_computes_in_the_type_of_the_flow():
    interpolant = LearnedInterpolant(2, event_dim=2, network=(4,))
    interpolant.weight1.normal_()
    x0, x1 = torch.randn(2, 5, 2, dtype=torch.float64)
    t = torch.rand(5, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        for found in interpolant.to(dtype).sample(t, x0, x1):
            assert found.dtype == torch.float64
