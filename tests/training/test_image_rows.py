"""Images: whole levels spread on the fly, one scale, labels, and a solver set by samples."""

import copy
import math

import pytest
import torch
from cases import IMAGE_NETWORKS, IMAGE_SHAPE, OwnImages
from pyro.distributions import constraints
from torch import nn

import pyro_interpolant as pi
from pyro_interpolant.diagnostics import bits_per_dim, calibrate_sampler
from pyro_interpolant.nn import ImageVelocity
from pyro_interpolant.training.data import Table
from pyro_interpolant.training.distributed import Process
from pyro_interpolant.training.objective import Objective
from pyro_interpolant.training.optimization import in_pieces
from pyro_interpolant.training.streaming import Stream
from pyro_interpolant.transforms import ScalarWhitening

SIZE = 16
LEVELS = (torch.arange(640) * 7919 % 200).to(torch.uint8).reshape(40, *IMAGE_SHAPE)
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
    scale = float(values.std(correction=0)) / 0.5  # whitened images have half a deviation
    assert float(prior.transform.flow.whitening.linear) == pytest.approx(scale, rel=0.05)
    assert prior.log_prob(values).isfinite().all()
    assert prior.report.held_out is None
    assert prior.report.sample_error < 1e-2
    assert "standard deviations, log_prob not calibrated" in repr(prior.report)
    path = tmp_path / "images.safetensors"
    pi.save(prior, path)
    again = pi.load(path, velocity=IMAGE_NETWORKS["adapter"](0))
    assert torch.equal(again.log_prob(values), prior.log_prob(values))
    assert again.report == prior.report


def test_images_in_other_numbers_are_taken_as_they_are():
    images = torch.rand(30, *IMAGE_SHAPE)
    shown = learn(images)
    assert shown.event_shape == IMAGE_SHAPE
    given = learn(images, event_shape=IMAGE_SHAPE)
    assert torch.equal(shown.log_prob(images), given.log_prob(images))
    as_array = learn(LEVELS.numpy())
    assert torch.equal(as_array.log_prob(images), learn(LEVELS).log_prob(images))


@pytest.mark.slow
def test_levels_that_training_did_not_spread_images_over_are_refused(tmp_path):
    """Also where images have fewer: the density is that of (v + u) / 256."""
    few = LEVELS % 17
    prior = learn([few[:20], few[20:]])
    straight = pi.reflow(prior, count=40, steps=1, progress=False).distribution
    pi.save(prior, tmp_path / "images")
    again = pi.load(tmp_path / "images", velocity=IMAGE_NETWORKS["adapter"](0))
    for density in (prior, copy.deepcopy(prior), again.expand((2,)), straight):
        with pytest.raises(ValueError, match=r"levels=256, as training .*, got levels=17"):
            bits_per_dim(density, few, levels=17)
    found = [bits_per_dim(density, few[:2], tolerance=1.0) for density in (again, prior)]
    assert found[0] == found[1]


def objective_and_batches(distribution, data, **options):
    table = Table(distribution, data, None, **options)
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


def test_half_of_the_images_of_a_batch_are_mirrored_anew_each_time_and_none_held_out():
    distribution = flow(OwnImages())
    _, batches = objective_and_batches(distribution, LEVELS, flip=True)
    mirrored = []
    for _ in range(50):
        w = batches.next_rows().w
        values = (distribution.transform.flow.whitening.from_white(w) * 256).floor()
        seen, given = values.reshape(LEVELS.shape), LEVELS[batches.order].double()
        same, other = ((seen == each).flatten(1).all(1) for each in (given, given.flip(-1)))
        assert bool((same ^ other).all())
        mirrored.append(other)
    mirrored = torch.stack(mirrored)
    assert float(mirrored.double().mean()) == pytest.approx(0.5, abs=0.04)
    assert not torch.equal(mirrored[0], mirrored[1])
    mask = torch.arange(40) < 9
    held = Table(distribution, LEVELS, mask, flip=True).split(Process(), None).held.w
    assert torch.equal(held, LEVELS[:9].flatten(1))


class Watched(OwnImages):
    """It tells how many images are in each call, with and without gradients."""

    def __init__(self, classes=0):
        super().__init__(classes)
        self.seen = {True: [], False: []}

    def forward(self, t, image, labels=None):
        self.seen[torch.is_grad_enabled()].append(len(image))
        return super().forward(t, image, labels)


@pytest.mark.slow
def test_without_gradients_images_are_evaluated_in_pieces(monkeypatch):
    """In the held-out loss, samples of either law, scores, and densities of its own samples."""
    monkeypatch.setattr("pyro_interpolant.transforms.flow._MAX_KEPT_BYTES", 2**12)
    network = ImageVelocity(Watched(3), IMAGE_SHAPE, 3)
    images = learn(network=network, context=LABELS, classes=3)
    seen, view = images.transform.velocity.network.seen, images.given(LABELS)
    objective, batches = objective_and_batches(images, LEVELS, context=LABELS)
    points = batches.next()

    def found(wanted):
        torch.manual_seed(0)
        view.transform.clear_cache()
        seen[False].clear()
        with torch.no_grad():
            x = view.sample()
            values = [objective.held_losses(points).mean(), x, view.log_prob(x)]
            values.append(pi.score(view, 0.5, x.flatten(-3)))
            values.append(pi.sample_sde(view, (), steps=2))
        assert max(seen[False]) == wanted
        return values

    whole = found(40)
    monkeypatch.setattr("pyro_interpolant.nn.velocity._ROWS_AT_ONCE", 3)
    for one, other in zip(found(3), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)  # in float32


@pytest.mark.parametrize(("count", "latent"), [(7, False), (64, True)])
def test_gradients_in_pieces_are_those_of_the_whole(count, latent):
    path = pi.Latent(pi.Trigonometric(), pi.SineSquared()) if latent else pi.Linear()
    objective, batches = objective_and_batches(flow(OwnImages(), interpolant=path), LEVELS)
    points, process = batches.next(), objective.process
    process.set_up(objective, list(objective.network.parameters()))

    def gradients(pieces):
        loss = process.backward(pieces)
        return [loss, *(p.grad for p in objective.network.parameters() if p.grad is not None)]

    pieces = in_pieces(points, count)
    assert len(pieces) == min(count, 40)
    assert max(len(part[0].w) for _, part in pieces) == -(-40 // len(pieces))
    for a, b in zip(gradients(in_pieces(points, 1)), gradients(pieces), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
        assert bool(a.any())


def test_accumulated_steps_are_those_of_the_batch_and_see_a_piece_at_a_time():
    def run(**options):
        torch.manual_seed(0)
        network = Watched()
        velocity = ImageVelocity(network, IMAGE_SHAPE)
        images = learn(network=velocity, batch_size=32, steps=4, **options)
        weights = [p.double() for p in images.transform.velocity.parameters()]
        return weights, max(images.transform.velocity.network.seen[True])

    (whole, most), (added, few) = run(), run(accumulate=4.0)
    assert (most, few) == (32, 8)
    for a, b in zip(whole, added, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # in float32


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
    given, told = LABELS.repeat(50)[:, None], []
    velocity.register_forward_hook(lambda module, inputs, output: told.append(inputs[2]))
    pi.interpolant_loss(family, (many + 0.5) / 256, context=given)
    is_null = told[0] == 3
    assert float(is_null.double().mean()) == pytest.approx(0.1, abs=0.03)
    assert torch.equal(told[0][~is_null], given[~is_null].to(told[0]))
    with pytest.raises(ValueError, match="expected labels from 0 to 2, got 3"):
        family.condition(torch.tensor([3]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"support": constraints.unit_interval}, r"uint8, on support real_vector, got .*spread"),
        ({"validation": LEVELS.double() / 256}, "expected validation of the type of the data"),
        ({"context": LEVELS[:, 0, 0] / 2, "network": None}, "expected labels as contexts of imag"),
        ({"marginals": True}, "no angles or images"),
        ({"x": LEVELS.flatten(1) / 2, "flip": True}, r"images to flip, .* got events of \(16,\)"),
        ({"flip": True, "pairs": LEVELS.flatten(1) / 2}, "expected flip=False beside pairs"),
        ({"accumulate": 65}, "accumulate from 1 to 64, whole, got 65"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        learn(**options)


@pytest.mark.slow
def test_a_compiled_network_is_trained_and_kept(tmp_path):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    plain, other = IMAGE_NETWORKS["unet"](0), IMAGE_NETWORKS["unet"](0)
    other.load_state_dict(plain.state_dict())
    other.compile(backend="aot_eager")
    expected, images = learn(network=plain), learn(network=other)
    values = LEVELS[:5].double() / 256
    torch.testing.assert_close(images.log_prob(values), expected.log_prob(values))
    path = tmp_path / "images.safetensors"
    pi.save(images, path)
    torch.testing.assert_close(pi.load(path).log_prob(values), images.log_prob(values))


class Turning(nn.Module):
    """An image's first two numbers turn by an angle: sines, which few steps do not follow."""

    def __init__(self, angle):
        super().__init__()
        self.angle = angle

    def forward(self, t, image):
        x = image.flatten(1)
        turned = torch.stack((-x[:, 1], x[:, 0]), -1) * self.angle
        return torch.cat((turned, 0 * x[:, 2:]), -1).reshape(image.shape)


@pytest.mark.slow
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
    with pytest.raises(ValueError, match="a positive tolerance in standard deviations, got"):
        calibrate_sampler(images, tolerance=0.0)
    with pytest.warns(UserWarning, match="no grid has samples within 0.001 standard deviations"):
        calibrate_sampler(flow(Turning(300.0)), tolerance=1e-3)
    with pytest.warns(UserWarning, match="they are within nan"):
        calibrate_sampler(flow(Turning(math.nan)))


class Dense(nn.Module):
    """A small perceptron as a network of images."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(SIZE + 1, 64), nn.SiLU(), nn.Linear(64, SIZE))

    def forward(self, t, image):
        inputs = torch.cat((image.flatten(1), t[:, None]), -1)
        return self.layers(inputs).reshape(image.shape)


def test_samples_of_the_sde_have_the_law_of_those_of_the_ode():
    """Of N(loc, s^2), whose velocity is zero."""
    images = learn(LEVELS, 3, context=LABELS, steps=1)
    for p in images.transform.velocity.parameters():
        nn.init.zeros_(p)
    x = pi.sample_sde(images.given(LABELS), (20,), steps=50)
    assert x.shape == (20, 40, *IMAGE_SHAPE)
    flow, scale = images.transform.flow, float(images.transform.flow.whitening.linear)
    away = (x.flatten(2) - flow.loc) / scale
    assert float(away.mean()) == pytest.approx(0, abs=0.04)
    assert float(away.std()) == pytest.approx(1, abs=0.04)


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
    """The noise of levels, flips and the labels dropped are those of the run without an end."""

    def stop(state):
        if state.step >= 6:
            raise Stop

    velocity = ImageVelocity(OwnImages(4), IMAGE_SHAPE, classes=3, null_label=3)
    options = {"steps": 12, "batch_size": 16, "flip": True, "accumulate": 2, "context": LABELS}
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
        {"coupling": pi.optimal_transport, "weights": torch.arange(40.0)},
        {"pairs": LEVELS.flatten(1).cos()},
        {"base_samples": LEVELS.flatten(1).sin(), "validation": LEVELS[:9]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_all_that_goes_with_rows_goes_with_images(options):
    images = learn(**options)
    assert images.sample((3,)).shape == (3, *IMAGE_SHAPE)
    assert images.report.sample_error is not None


def test_a_batch_without_weight_leaves_levels_what_they_are():
    parts = [(LEVELS[:20], torch.ones(20)), (LEVELS[20:], torch.zeros(len(LEVELS) - 20))]
    source = Stream(flow(OwnImages()), parts * 2, 0.1)
    split = source.split(Process(), 16)
    assert split.kept.w.dtype == torch.uint8
