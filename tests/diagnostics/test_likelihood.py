"""Bits per dimension against Gaussian images, whose bits have a closed form."""

import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from cases import IMAGE_SHAPE
from pyro.distributions import constraints
from safetensors.torch import load_file
from torch import nn

import pyro_interpolant as pi
from pyro_interpolant.diagnostics import bits_per_dim, likelihood
from pyro_interpolant.nn import ImageVelocity
from pyro_interpolant.transforms import ScalarWhitening
from pyro_interpolant.transforms.gaussianize import (
    Gaussianized,
    MarginalTransform,
    with_slopes,
)

SIZE, LEVELS = 16, 32
LOC, SCALE = 0.5, 0.12


class Constant(nn.Module):
    """A velocity A x of images, the same at all times: a Gaussian stays one."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)

    def forward(self, t, image, labels=None):
        rate = image.flatten(1) @ self.matrix.T
        return rate.reshape(image.shape) * (
            1 if labels is None else 1 + labels.reshape(-1, 1, 1, 1)
        )


@pytest.fixture(scope="module")
def matrix():
    """A symmetric matrix, whose off-diagonal elements are the noise of probes."""
    torch.manual_seed(3)
    a = 0.08 * torch.randn(SIZE, SIZE)
    return a + a.T


def gaussian_images(matrix, classes=0, **choices):
    choices = {"solver": pi.FixedGrid(2), "divergence": pi.HutchinsonDivergence(), **choices}
    kind = pi.ConditionalInterpolantTransform if classes else pi.InterpolantTransform
    velocity = ImageVelocity(Constant(matrix), IMAGE_SHAPE, classes)
    transform = kind(velocity, whitening=ScalarWhitening(SIZE), **choices)
    transform.flow.whitening.set(torch.full((SIZE,), LOC), torch.tensor(SCALE))
    make = pi.ConditionalInterpolantDistribution if classes else pi.InterpolantDistribution
    return make(transform, event_shape=IMAGE_SHAPE).freeze()


def levels(count=60):
    x = LOC + SCALE * torch.randn(count, *IMAGE_SHAPE)
    return (x * LEVELS).floor().clamp(0, LEVELS - 1).long()


def exact_bits(v, matrix):
    """Minus E_u log2 of the density, N(loc, S S^T) with S = scale exp(A), one an image."""
    root = SCALE * torch.linalg.matrix_exp(matrix)
    precision = torch.linalg.inv(root @ root.T)
    d = (v.double().flatten(1) + 0.5) / LEVELS - LOC
    square = torch.einsum("ni,ij,nj->n", d, precision, d) + precision.trace() / 12 / LEVELS**2
    log_prob = -0.5 * (square + SIZE * math.log(2 * math.pi)) - root.slogdet().logabsdet
    return math.log2(LEVELS) - log_prob / SIZE / math.log(2)


def test_bits_of_gaussian_images_are_those_of_the_closed_form(matrix):
    v = levels()
    expected = exact_bits(v, matrix)
    images = gaussian_images(matrix)
    found = bits_per_dim(images, v, LEVELS, probes=16, dequantizations=8)
    assert found.mean == pytest.approx(float(expected.mean()), abs=0.015)
    assert found.stderr == pytest.approx(float(expected.std()) / math.sqrt(60), rel=0.05)
    mean, error = found
    assert repr(found).startswith(f"{mean:.4f} ± {error:.4f} bits per dimension, solver within ")
    assert pickle.loads(pickle.dumps(found)).solver_error == found.solver_error
    exact = gaussian_images(matrix, divergence=pi.ExactDivergence(), solver=pi.Adaptive(nodes=8))
    again = bits_per_dim(exact, v, LEVELS, dequantizations=3)
    assert again.mean == pytest.approx(float(expected.mean()), abs=0.03)
    assert again.solver_error < 1e-4  # tolerances of 1e-5


def test_one_probe_is_unbiased_and_independent_between_images(matrix):
    """Over seeds the error is that of chance, and falls with the number of images and times."""
    v = levels(1).expand(50, *IMAGE_SHAPE)  # alike: all that differs is drawn
    expected = float(exact_bits(v, matrix)[0])
    images = gaussian_images(matrix)
    found = [bits_per_dim(images, v, LEVELS, seed=seed, tolerance=1.0) for seed in range(40)]
    z = torch.tensor([(mean - expected) / error for mean, error in found])
    assert abs(float(z.mean())) < 4 / math.sqrt(40)
    assert 0.6 < float(z.std()) < 1.5
    noisy = bits_per_dim(gaussian_images(4 * matrix), v, LEVELS, tolerance=1.0)
    assert noisy.stderr > 2 * found[0].stderr  # of a larger Jacobian


@pytest.mark.slow
def test_a_grid_that_is_too_coarse_is_refined(matrix):
    v = levels(10)
    images = gaussian_images(4 * matrix, solver=pi.FixedGrid(1))
    expected = float(exact_bits(v, 4 * matrix).mean())
    coarse, found = (
        bits_per_dim(images, v, LEVELS, 4, 4, tolerance=tolerance) for tolerance in (1e9, 1e-3)
    )
    assert abs(coarse.mean / expected - 1) > 0.05
    assert found.mean == pytest.approx(expected, rel=0.02)
    assert images.transform.solver == pi.FixedGrid(1)
    # What is said of the solver is what it does, of the same images.
    assert coarse.solver_error == pytest.approx(abs(coarse.mean - found.mean), rel=0.3)
    assert found.solver_error < 1e-3


def test_a_grid_that_is_never_fine_enough_is_warned_of(matrix, monkeypatch):
    monkeypatch.setattr("pyro_interpolant.diagnostics.likelihood._MAX_STEPS", 4)
    with pytest.warns(UserWarning, match=r"up to 4 steps has bits .* at 4 it is [\d.e-]+$"):
        found = bits_per_dim(gaussian_images(4 * matrix), levels(4), LEVELS, tolerance=1e-9)
    assert found.solver_error > 1e-9


def test_bits_go_on_from_a_file(matrix, tmp_path, monkeypatch):
    """To the very bits of the call left alone, from behind the last piece that was kept."""
    images, v, path = gaussian_images(matrix), levels(30), tmp_path / "bits"
    monkeypatch.setattr("pyro_interpolant.nn.velocity._ROWS_AT_ONCE", 8)
    whole = bits_per_dim(images, v, LEVELS, dequantizations=2)
    calls = []

    def ending(self, *arguments):
        calls.append(len(arguments[0]))
        if len(calls) == 8:
            raise KeyboardInterrupt
        return evaluated(self, *arguments)

    evaluated = likelihood._Bits.__call__
    monkeypatch.setattr(likelihood._Bits, "__call__", ending)
    with pytest.raises(KeyboardInterrupt):
        bits_per_dim(images, v, LEVELS, dequantizations=2, checkpoint=path)
    before = len(load_file(path)["bits"])
    assert 0 < before < 30
    assert bits_per_dim(images, v, LEVELS, dequantizations=2, checkpoint=path) == whole
    assert len(load_file(path)["bits"]) == 30
    again = bits_per_dim(images, v, LEVELS, dequantizations=2, checkpoint=path)
    assert again == whole
    assert again.solver_error == whole.solver_error
    for density, shown, seed in (
        (gaussian_images(1.01 * matrix), v, 0),
        (images, v.flip(0), 0),
        (images, v, 1),
        (gaussian_images(matrix, solver=pi.FixedGrid(3)), v, 0),
    ):
        options = {"dequantizations": 2, "checkpoint": path, "seed": seed}
        with pytest.raises(ValueError, match="to have bits of these images by this density"):
            bits_per_dim(density, shown, LEVELS, **options)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged .*; or delete it, to start anew"):
        bits_per_dim(images, v, LEVELS, dequantizations=2, checkpoint=path)


def normalised(factor):
    knots = torch.linspace(-3, 3, 5).expand(2, -1)
    spline = MarginalTransform(*with_slopes(factor * knots.sinh(), knots))
    return Gaussianized(constraints.real_vector, spline)


def start(at):
    return dist.Normal(torch.full((SIZE,), at), torch.ones(SIZE)).to_event(1)


@pytest.mark.parametrize("what", ["base", "time", "support"])
def test_bits_of_a_density_of_the_same_text_are_not_gone_on_from(what, matrix, tmp_path):
    images, v, levels_of_all = gaussian_images(matrix), levels(4), LEVELS
    if what == "base":
        transform = images.transform
        one, other = (
            pi.InterpolantDistribution(transform, start(at), event_shape=IMAGE_SHAPE)
            for at in (0.1, 0.2)
        )
    elif what == "time":
        one, other = images.at(0.5), images.at(0.75)
    else:
        transform = pi.interpolant_transform(2, hidden_dims=(8,), solver=pi.FixedGrid(1))
        one, other = (
            pi.InterpolantDistribution(transform, support=normalised(s)) for s in (1.0, 2.0)
        )
        v, levels_of_all = torch.tensor([[1, 2], [2, 3]]), 8
    options = {"checkpoint": tmp_path / "bits", "tolerance": 1e9}
    found = bits_per_dim(one, v, levels_of_all, **options)
    assert bits_per_dim(one, v, levels_of_all, **options) == found
    with pytest.raises(ValueError, match="to have bits of these images by this density"):
        bits_per_dim(other, v, levels_of_all, **options)


@pytest.mark.slow
def test_bits_given_labels(matrix):
    v, labels = levels(20), torch.arange(20) % 2
    family = gaussian_images(matrix, classes=2)
    found = bits_per_dim(family, v, LEVELS, 32, 16, context=labels)
    parts = [exact_bits(v[labels == k], (1 + k) * matrix) for k in (0, 1)]
    assert found.mean == pytest.approx(float(torch.cat(parts).mean()), abs=0.02)
    one = bits_per_dim(family.condition(torch.tensor(1)), v[labels == 1], LEVELS, 32, 16)
    assert one.mean == pytest.approx(float(parts[1].mean()), abs=0.02)


def test_refusals(matrix):
    images, v = gaussian_images(matrix), levels(4)
    with pytest.raises(ValueError, match="whole levels from 0 to 7, got torch.int64 from"):
        bits_per_dim(images, v, 8)
    with pytest.raises(ValueError, match="whole levels from 0 to 31, got torch.float64"):
        bits_per_dim(images, v / 2 + 0.25, LEVELS)
    with pytest.raises(ValueError, match=r"images of shape \(N, 1, 4, 4\), got \(4, 1, 4, 3\)"):
        bits_per_dim(images, v[..., :3], LEVELS)
    with pytest.raises(ValueError, match="probes >= 1, a whole number, got 0"):
        bits_per_dim(images, v, LEVELS, probes=0)
    family, labels = gaussian_images(matrix, classes=2), torch.tensor([0, 1, 1, 0])
    with pytest.raises(ValueError, match="expected as many contexts as images, 4, got 3"):
        bits_per_dim(family, v, LEVELS, context=labels[:3])
    with pytest.raises(ValueError, match=r"conditional flow and context=.*batch shape \(4,\)"):
        bits_per_dim(family.condition(labels), v, LEVELS)
    # Each image would be scored under a member of its own, where there are as many.
    base = dist.Normal(torch.tensor([0.0, 1.0])[:, None].expand(2, SIZE), 1.0).to_event(1)
    images = pi.InterpolantDistribution(images.transform, base, event_shape=IMAGE_SHAPE)
    with pytest.raises(ValueError, match=r"expected one base for all rows.* batch shape \(2,\)"):
        bits_per_dim(images, v[:2], LEVELS)


def test_levels_are_whole_numbers_of_any_type(matrix):
    images, v = gaussian_images(matrix), levels(4)
    expected = bits_per_dim(images, v, LEVELS)
    for kind in ("uint16", "uint64"):
        assert bits_per_dim(images, v.numpy().astype(kind), LEVELS) == expected, kind


def test_values_are_inside_of_their_cells(monkeypatch):
    """Also where u is 0, or 1 when rounded beside the level: edges of a support."""
    last = 1 - torch.finfo(torch.float32).eps / 2
    ends = torch.tensor([[0.0, 0.5, last], [last, 0.0, 0.5]], dtype=torch.float32)
    monkeypatch.setattr(likelihood._Bits, "_uniform", lambda self, v: ends)
    support = constraints.independent(constraints.unit_interval, 1)
    flow = pi.interpolant_transform(3, hidden_dims=(8,), solver=pi.FixedGrid(1)).float()
    images = pi.InterpolantDistribution(flow, support=support)
    v = torch.tensor([[0, 7, 255], [255, 0, 128]])
    assert math.isfinite(bits_per_dim(images, v).mean)
