"""Velocities of images: diffusers' U-Net, and any other network through the adapter."""

import math
import sys

import pytest
import torch
from cases import IMAGE_NETWORKS, IMAGE_SHAPE, slow_but
from torch import nn

import pyro_interpolant as pi
from pyro_interpolant.nn import ImageVelocity, UNet
from pyro_interpolant.solvers.divergence import ExactDivergence

SIZE = 16


def random_velocity(name, classes=0):
    """A network whose last layer is not zero."""
    if name == "unet":
        pytest.importorskip("diffusers")
    velocity = IMAGE_NETWORKS[name](classes)
    with torch.no_grad():
        for p in velocity.parameters():
            if not p.any():
                p.normal_(std=0.3)
    return velocity.eval()


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_images_are_vectors_in_row_major_order_and_rows_stay_apart(name):
    velocity = random_velocity(name, classes=3)
    t, x = torch.rand(2, 3), torch.randn(2, 3, SIZE)
    label = torch.tensor([0.0, 1.0, 2.0])[:, None].expand(2, 3, 1)
    together = velocity(t, x, label)
    assert together.shape == (2, 3, SIZE)
    for i, j in ((0, 0), (1, 2)):
        alone = velocity(t[i, j], x[i, j], label[i, j])
        torch.testing.assert_close(alone, together[i, j])
    assert (velocity(t, x, label.flip(1)) - together)[:, ::2].abs().max() > 1e-4
    assert (velocity(t.flip(1), x, label) - together)[:, ::2].abs().max() > 1e-4
    # Far from a pixel nothing changes, where the network is one convolution: order is kept.
    if name == "adapter":
        moved = x.clone()
        moved[..., 0] += 1
        change = (velocity(t, moved, label) - together)[0, 0].reshape(IMAGE_SHAPE)[0]
        assert change[:2, :2].abs().min() > 0
        assert change[2:].abs().max() == change[:, 2:].abs().max() == 0


@pytest.mark.parametrize("name", slow_but(IMAGE_NETWORKS, "adapter"))
def test_derivatives_of_the_solve_have_derivatives(name):
    """Of the score, and forward ones: kernels of attention on the CPU have neither."""
    d = pi.InterpolantDistribution(
        pi.InterpolantTransform(
            random_velocity(name),
            SIZE,
            solver=pi.FixedGrid(steps=2),
            divergence=pi.HutchinsonDivergence(),
            whitening=pi.transforms.ScalarWhitening(SIZE),
        ),
        event_shape=IMAGE_SHAPE,
    ).freeze()
    x, v, h = torch.rand(IMAGE_SHAPE, requires_grad=True), torch.randn(IMAGE_SHAPE), 1e-5
    found = torch.autograd.grad((d.score(x) * v).sum(), x)[0]
    with torch.no_grad():
        expected = (d.score(x + h * v) - d.score(x - h * v)) / (2 * h)  # the Hessian times v
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    w, e = torch.randn(SIZE), torch.randn(SIZE)
    moved = torch.func.jvp(d.transport, (w,), (e,))[1]
    expected = (d.transport(w + h * e) - d.transport(w - h * e)) / (2 * h)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)
    found = pi.w2_bound(d, torch.rand(16, *IMAGE_SHAPE))
    assert math.inf > found.bound > math.e * found.excess > 0  # the Jacobians are not zero


def test_of_no_images_there_are_no_rates():
    velocity = random_velocity("adapter", classes=3)
    t, x, label = torch.rand(0), torch.randn(0, SIZE, requires_grad=True), torch.zeros(0, 1)
    found = velocity(t, x, label)
    assert found.shape == (0, SIZE)
    assert found.requires_grad
    with pytest.raises(ValueError, match="expected labels of shape"):
        velocity(t, x)


@pytest.mark.parametrize("name", slow_but(IMAGE_NETWORKS, "adapter"))
def test_the_divergence_is_that_of_finite_differences_by_either_mode(name):
    velocity = random_velocity(name)
    t, x, e, h = torch.tensor(0.3), torch.randn(2, SIZE), torch.eye(SIZE), 1e-5
    with torch.no_grad():
        up, down = (velocity(t, x[:, None] + s * e) for s in (h, -h))
    expected = ((up - down) / (2 * h)).diagonal(dim1=1, dim2=2).sum(1)
    exact = ExactDivergence()(velocity, t, x, None)
    torch.testing.assert_close(exact, expected, rtol=1e-6, atol=1e-6)
    # Over all probes that there are, or many of them, the estimate is the trace.
    found = pi.HutchinsonDivergence(probes=64).samples(velocity, t, x)
    error = found.std(0) / 8
    assert bool(((found.mean(0) - exact).abs() < 4 * error).all())
    x.requires_grad_()
    one = pi.HutchinsonDivergence()
    (gradient,) = torch.autograd.grad(one(velocity, t, x, None).sum(), x)
    with torch.no_grad():
        step = h * torch.ones_like(x)
        slope = (one(velocity, t, x + step, None) - one(velocity, t, x - step, None)) / (2 * h)
    torch.testing.assert_close(gradient.sum(1), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "classes"), [("adapter", 0), pytest.param("unet", 3, marks=pytest.mark.slow)]
)
def test_a_file_keeps_it(name, classes, tmp_path):
    velocity = random_velocity(name, classes)
    kind = pi.ConditionalInterpolantTransform if classes else pi.InterpolantTransform
    whitening = pi.transforms.ScalarWhitening(SIZE)
    flow = kind(
        velocity,
        solver=pi.FixedGrid(2),
        divergence=pi.HutchinsonDivergence(),
        whitening=whitening,
    )
    flow.flow.whitening.set(torch.randn(SIZE), torch.tensor(0.7))
    make = pi.ConditionalInterpolantDistribution if classes else pi.InterpolantDistribution
    distribution = make(flow, event_shape=IMAGE_SHAPE).freeze()
    path = tmp_path / "images.safetensors"
    pi.save(distribution, path)
    if name == "adapter":
        with pytest.raises(ValueError, match=r"velocity is a ImageVelocity: pass an instance"):
            pi.load(path)
        again = pi.load(path, velocity=IMAGE_NETWORKS[name](classes))
    else:
        again = pi.load(path)
        assert again.transform.velocity.arguments() == velocity.arguments()
    x = torch.randn(3, *IMAGE_SHAPE)
    label = torch.tensor([0, 2, 1]) if classes else None
    assert torch.equal(again.given(label).log_prob(x), distribution.given(label).log_prob(x))


def test_an_untrained_network_is_zero_and_its_copy_too():
    pytest.importorskip("diffusers")
    velocity = UNet((2, 8, 4), channels=(4, 8), attention=(), classes=2)
    x, label = torch.randn(3, 64), torch.tensor([[0.0], [1.0], [2.0]])  # 2 is the null label
    assert velocity.is_untrained()
    assert not velocity(torch.rand(3), x, label).any()
    with torch.no_grad():
        velocity.network.conv_out.weight.fill_(1.0)
    assert velocity(torch.rand(3), x, label).any()
    assert not velocity.is_untrained()
    copy = velocity.untrained_copy()
    assert copy.is_untrained()
    assert copy.arguments() == velocity.arguments()
    kinds = [type(module).__name__ for module in velocity.modules()]
    assert "Attention" not in kinds
    assert "Attention" in [type(module).__name__ for module in UNet((1, 4, 4), (4, 8)).modules()]


def test_times_are_those_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import Timesteps

    own = UNet((1, 4, 4), channels=(6, 6)).network.time_proj
    t = 1000 * torch.rand(5)
    theirs = Timesteps(6, flip_sin_to_cos=True, downscale_freq_shift=0)(t)
    torch.testing.assert_close(own(t), theirs.double(), rtol=0, atol=1e-3)  # theirs in float32
    assert own(t).dtype == torch.float64


def test_refusals():
    velocity = ImageVelocity(nn.Identity(), (1, 4, 4))
    velocity.network.forward = lambda t, image: image.flatten(1)
    with pytest.raises(ValueError, match=r"returns rates of shape \(3, 1, 4, 4\), got \(3, 16\)"):
        velocity(torch.rand(3), torch.randn(3, 16))
    with pytest.raises(ValueError, match=r"no context for 0 classes, got shape \(3, 1\)"):
        velocity(torch.rand(3), torch.randn(3, 16), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"null_label beside classes"):
        ImageVelocity(nn.Identity(), (1, 4, 4), null_label=3)
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match=r"sides that can be halved 2 times.*\(1, 6, 8\)"):
        UNet((1, 6, 8), (8, 8, 8))
    with pytest.raises(ValueError, match=r"image_shape as \(channels, height, width\).*\(1, 8\)"):
        UNet((1, 8), (8,))
    with pytest.raises(ValueError, match=r"attention as levels among them.*attention=\(2,\)"):
        UNet((1, 8, 8), (8, 8), (2,))
    with pytest.raises(TypeError, match=r"channels, a tuple of whole numbers, got 8"):
        UNet((1, 8, 8), 8)


def test_a_missing_diffusers_is_named(monkeypatch):
    for name in ("diffusers", "diffusers.models.unets.unet_2d"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install 'diffusers'"):
        UNet((1, 4, 4))
