"""Images: whole levels spread on the fly, one scale, labels, and a solver set by samples."""

import math

import pytest
import torch
from cases import IMAGE_NETWORKS, IMAGE_SHAPE, OwnImages
from pyro.distributions import constraints
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pyro_interpolant as pi
from pyro_interpolant.diagnostics import bits_per_dim, calibrate_sampler
from pyro_interpolant.diagnostics.calibration import calibrate_sampler_until
from pyro_interpolant.nn import ImageVelocity, UNet
from pyro_interpolant.training.data import Table
from pyro_interpolant.training.distributed import Process
from pyro_interpolant.training.objective import Objective
from pyro_interpolant.transforms import ScalarWhitening

SIZE = 16
DRAWN = torch.Generator().manual_seed(1)
LEVELS = torch.randint(0, 200, (40, *IMAGE_SHAPE), generator=DRAWN, dtype=torch.uint8)
LABELS = torch.arange(40) % 3


def learn(x=LEVELS, classes=0, **options):
    torch.manual_seed(0)  # of the network
    network = options.pop("network", IMAGE_NETWORKS["adapter"](classes))
    settings = {"steps": 3, "seed": 0, "progress": False, "network": network}
    return pi.from_samples(x, **{**settings, **options})


def flow(network, **choices):
    """An image flow of a network, whitened by one scale."""
    choices = {"divergence": pi.HutchinsonDivergence(), **choices}
    velocity = ImageVelocity(network, IMAGE_SHAPE).double()
    transform = pi.InterpolantTransform(velocity, whitening=ScalarWhitening(SIZE), **choices)
    return pi.InterpolantDistribution(transform, event_shape=IMAGE_SHAPE)


def test_images_of_any_number_are_learned_and_come_back_as_images(tmp_path):
    few = LEVELS[:12]  # fewer than numbers in one
    prior = learn(few)
    assert prior.event_shape == IMAGE_SHAPE
    assert prior.sample((5, 2)).shape == (5, 2, *IMAGE_SHAPE)
    assert isinstance(prior.transform.flow.whitening, ScalarWhitening)
    assert prior.transform.divergence == pi.HutchinsonDivergence()
    values = (few.double() + 0.5) / 256
    loc = prior.transform.flow.loc  # one centre: a mean image would stay behind in what is seen
    torch.testing.assert_close(loc, values.mean().expand(SIZE), rtol=0, atol=0.1)
    scale = float(values.std(correction=0))
    assert float(prior.transform.flow.whitening.linear) == pytest.approx(scale, rel=0.2)
    assert prior.log_prob(values).isfinite().all()
    assert prior.report.held_out is None
    assert prior.report.sample_error < 1e-2
    assert "samples within" in repr(prior.report)
    path = tmp_path / "images.safetensors"
    pi.save(prior, path)
    again = pi.load(path, velocity=IMAGE_NETWORKS["adapter"](0))
    assert torch.equal(again.log_prob(values), prior.log_prob(values))
    assert again.report == prior.report


def test_images_in_other_numbers_are_taken_as_they_are():
    images = torch.rand(30, *IMAGE_SHAPE, generator=DRAWN, dtype=torch.float64)
    shown = learn(images)
    given = learn(images, event_shape=IMAGE_SHAPE)
    assert shown.event_shape == IMAGE_SHAPE
    assert torch.equal(shown.log_prob(images), given.log_prob(images))
    as_array = learn(LEVELS.numpy())
    assert torch.equal(as_array.log_prob(images), learn(LEVELS).log_prob(images))


def objective_and_batches(distribution, data):
    table = Table(distribution, data, None)
    split = table.split(Process(), None)
    objective = Objective(
        distribution.transform.flow, distribution.white_base(), pi.independent, Process()
    )
    return objective, table.batches(split, objective)


def test_levels_are_spread_over_their_cells_anew_in_each_batch():
    distribution = flow(OwnImages())
    objective, batches = objective_and_batches(distribution, LEVELS)
    assert batches.rows.w.dtype == torch.uint8
    assert batches.size == 40
    seen = []
    for _ in range(50):
        w = batches.next_rows().w
        levels = LEVELS.reshape(40, -1)[batches.order].double()
        u = distribution.transform.flow.whitening.from_white(w) * 256 - levels
        assert bool(((u >= 0) & (u < 1)).all())
        seen.append(u)
    u = torch.stack(seen).flatten()
    assert float(u.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(u.var()) == pytest.approx(1 / 12, abs=0.002)
    assert not torch.equal(seen[0], seen[1])


def test_the_held_out_loss_in_pieces_is_that_of_the_whole(monkeypatch):
    objective, batches = objective_and_batches(flow(OwnImages()), LEVELS)
    points = batches.next()
    with torch.no_grad():
        whole = objective.loss(points)
        monkeypatch.setattr("pyro_interpolant.nn.velocity._ROWS_AT_ONCE", 3)
        torch.testing.assert_close(objective.held_loss(points), whole)


def test_labels_are_classes_and_a_tenth_of_them_is_dropped():
    images = learn(context=LABELS, classes=3)
    assert images.condition(LABELS).sample().shape == (40, *IMAGE_SHAPE)
    velocity = ImageVelocity(OwnImages(4), IMAGE_SHAPE, classes=3, null_label=3).double()
    family = pi.ConditionalInterpolantDistribution(
        pi.ConditionalInterpolantTransform(velocity, whitening=ScalarWhitening(SIZE)),
        event_shape=IMAGE_SHAPE,
    )
    many = LEVELS.repeat(50, 1, 1, 1)
    table = Table(family, many, None, context=LABELS.repeat(50))
    objective = Objective(family.transform.flow, family.white_base(), pi.independent, Process())
    batches = table.batches(table.split(Process(), 1920), objective)
    labels = batches.next()[0].context
    assert set(labels.flatten().tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert float((labels == 3).double().mean()) == pytest.approx(0.1, abs=0.03)
    with pytest.raises(ValueError, match="expected labels from 0 to 2, got 3"):
        family.condition(torch.tensor([3]))


def test_a_loader_gives_images_with_their_labels():
    loader = DataLoader(TensorDataset(LEVELS, LABELS), batch_size=10)
    images = learn(loader, classes=3, batch_size=8)
    assert images.condition(LABELS).sample().shape == (40, *IMAGE_SHAPE)
    alone = learn(DataLoader(LEVELS, batch_size=10), batch_size=8)
    assert alone.sample().shape == IMAGE_SHAPE


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"uint8, on support real_vector, got .*spread them your"):
        learn(support=constraints.unit_interval)
    with pytest.raises(ValueError, match="expected validation of the type of the data"):
        learn(validation=LEVELS.double() / 256)
    with pytest.raises(ValueError, match="expected labels as contexts of images"):
        learn(context=torch.randn(40, 2), network=None)
    with pytest.raises(ValueError, match="no angles or images"):
        learn(marginals=True)
    with pytest.raises(ValueError, match=r"expected images of shape \(N, 1, 4, 4\), got"):
        pi.fit(flow(OwnImages()), LEVELS[:, :, :2], progress=False)
    with pytest.raises(TypeError, match="expected x of a floating type, got torch.uint8"):
        learn(LEVELS.flatten(1))


@pytest.mark.slow
def test_the_default_network_is_a_unet():
    pytest.importorskip("diffusers")
    images = learn(context=LABELS, network=None, steps=1)
    assert isinstance(images.transform.velocity, UNet)
    assert images.transform.velocity.arguments()[0] == IMAGE_SHAPE
    assert images.transform.velocity.classes == 3


class Turning(nn.Module):
    """An image's first two numbers turn by an angle: sines, which few steps do not follow."""

    def __init__(self, angle):
        super().__init__()
        self.angle = angle

    def forward(self, t, image):
        x = image.flatten(1)
        turned = torch.stack((-x[:, 1], x[:, 0]), -1) * self.angle
        return torch.cat((turned, 0 * x[:, 2:]), -1).reshape(image.shape)


def test_the_sampler_gets_the_fewest_steps_that_are_good():
    images = flow(Turning(6.0))
    grid = calibrate_sampler(images, tolerance=1e-3)
    assert images.transform.solver == grid
    w = torch.randn(200, SIZE)

    def error(steps):
        images.transform.solver = pi.FixedGrid(steps)
        turned = torch.tensor(6.0)
        exact = w.clone()
        exact[:, 0] = turned.cos() * w[:, 0] - turned.sin() * w[:, 1]
        exact[:, 1] = turned.sin() * w[:, 0] + turned.cos() * w[:, 1]
        return float((images.transform(w) - exact).square().mean().sqrt())

    assert error(grid.steps) < 1.5e-3
    assert error(grid.steps - 2) > 1e-3
    with pytest.raises(ValueError, match="expected a positive tolerance in whitened units"):
        calibrate_sampler(images, tolerance=0.0)
    late = calibrate_sampler_until(0.0, flow(Turning(1.0)), None, 1e-3)
    assert late.error <= 1e-3
    with pytest.warns(UserWarning, match="the time was over before samples within"):
        assert calibrate_sampler_until(0.0, flow(Turning(12.0)), None, 1e-3).solver.steps == 8
    with pytest.warns(UserWarning, match="no grid has samples within 0.001 whitened units"):
        calibrate_sampler(flow(Turning(300.0)), tolerance=1e-3)


class Dense(nn.Module):
    """A small perceptron as a network of images."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(SIZE + 1, 64), nn.SiLU(), nn.Linear(64, SIZE))

    def forward(self, t, image):
        inputs = torch.cat((image.flatten(1), t[:, None]), -1)
        return self.layers(inputs).reshape(image.shape)


@pytest.mark.slow
def test_the_bits_that_are_learned_are_those_of_the_truth():
    """Correlated Gaussian images, which one scale does not whiten: the network has to."""
    torch.manual_seed(0)
    root = 25 * (torch.eye(SIZE) + 0.15 * torch.randn(SIZE, SIZE))
    normal = torch.distributions.MultivariateNormal(torch.full((SIZE,), 128.0), root @ root.T)
    levels = normal.sample((6000,)).floor().clamp(0, 255).to(torch.uint8)
    train, held = levels.reshape(-1, *IMAGE_SHAPE).split((5000, 1000))
    network = ImageVelocity(Dense(), IMAGE_SHAPE)
    options = {"learning_rate": 1e-2, "steps": 2000, "batch_size": 256}
    prior = learn(train, network=network, **options)
    spread = held.double().flatten(1) + torch.rand(1000, SIZE)
    truth = float(-normal.log_prob(spread).mean()) / SIZE / math.log(2)
    start = math.log2(prior.transform.flow.whitening.linear.item() * 256) + 2.047  # of N(0, s^2)
    found = bits_per_dim(prior, held)
    assert truth - 0.02 < found.mean < truth + 0.05
    assert start > truth + 0.1  # there was something to learn


class Stop(Exception):
    pass


def test_a_run_on_levels_resumes_to_the_same_bits(tmp_path):
    """The noise of levels and the labels that are dropped are those of the run without an end."""

    def stop(state):
        if state.step >= 6:
            raise Stop

    velocity = ImageVelocity(OwnImages(4), IMAGE_SHAPE, classes=3, null_label=3)
    options = {"context": LABELS, "steps": 12, "batch_size": 16}
    start = {name: value.clone() for name, value in velocity.state_dict().items()}

    def run(**more):
        velocity.load_state_dict(start)
        family = learn(network=velocity, **options, **more)
        return [p.clone() for p in family.transform.velocity.parameters()]

    whole, path = run(), tmp_path / "run.safetensors"
    with pytest.raises(Stop):
        run(checkpoint=path, checkpoint_every=1, callback=stop)
    resumed = run(checkpoint=path)
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))
    assert any(not torch.equal(a, start[n]) for a, n in zip(whole, start, strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"coupling": pi.optimal_transport},
        {"weights": torch.arange(40.0)},
        {"pairs": torch.randn(40, SIZE, generator=DRAWN)},
        {"base_samples": torch.rand(40, SIZE, generator=DRAWN)},
        {"validation": LEVELS[:9]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_all_that_goes_with_rows_goes_with_images(options):
    images = learn(**options)
    assert images.sample((3,)).shape == (3, *IMAGE_SHAPE)
    assert images.report.sample_error is not None


def test_a_trained_flow_of_images_does_what_others_do():
    images = learn()
    assert pi.sample_sde(images, (3,), steps=3).shape == (3, *IMAGE_SHAPE)
    assert images.at(0.5).sample((2,)).shape == (2, *IMAGE_SHAPE)
    x = images.sample((4,))
    assert images.score(x).shape == x.shape
    there = images.transport(x, inverse=True)
    torch.testing.assert_close(images.transport(there), x, rtol=0, atol=1e-3)
    pi.reflow(images, count=60, steps=3, seed=0, progress=False)
    assert images.sample((2,)).shape == (2, *IMAGE_SHAPE)
    mirror = flow(OwnImages(), interpolant=pi.Mirror())
    assert pi.fit(mirror, LEVELS, steps=3, progress=False).report.sample_error is not None
    assert mirror.sample((2,)).shape == (2, *IMAGE_SHAPE)
