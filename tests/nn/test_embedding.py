"""Velocities given data: a regression in closed form, and embeddings."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_interpolant as pi
from pyro_interpolant.nn import EmbeddedVelocity, SeriesEmbedding, SetEmbedding, VelocityMLP
from pyro_interpolant.training.rows import Rows
from pyro_interpolant.training.whitening import set_whitening

TIMES = torch.linspace(0.1, 0.9, 3, dtype=torch.float64)

EMBEDDINGS = {
    "none": (None, (6,)),
    "set": (SetEmbedding(3, width=8), (5, 3)),
    "masked set": (SetEmbedding(2, True, 8), (5, 3)),  # noqa: FBT003
    "series": (SeriesEmbedding(12, width=4), (12,)),
    "masked series": (SeriesEmbedding(20, 2, True, 4), (20, 3)),  # noqa: FBT003
}


def random_velocity(name, dim=2):
    """Return a velocity with an embedding that is not zero, and data for it."""
    embedding, shape = EMBEDDINGS[name]
    velocity = EmbeddedVelocity(dim, [shape], embedding, (8, 8)).double()
    y = torch.randn(7, *shape)
    if name.startswith("masked"):
        y[..., -1] = (y[..., -1] > -0.5).double()
    context = y.flatten(1)
    with torch.no_grad():
        velocity.set_scales(torch.randn(7, dim), context)
        velocity.network.output.weight.normal_(std=0.3)
        velocity.slope.normal_()
    return velocity, context


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_all_ways_to_evaluate_agree(name):
    velocity, context = random_velocity(name)
    e, x = velocity.embed(context), torch.randn(7, 2)
    for i, t in enumerate(TIMES):
        v, divergence = velocity.forward_and_divergence(t, x, e)
        torch.testing.assert_close(velocity(t, x, e), v)
        jacobian = torch.func.vmap(torch.func.jacrev(lambda x, e, t=t: velocity(t, x, e)))(x, e)
        torch.testing.assert_close(divergence, jacobian.diagonal(dim1=1, dim2=2).sum(1))
        one = velocity.field(TIMES, e[0])[i], velocity.divergence_field(TIMES, e[0])[i]
        expected = velocity.forward_and_divergence(t, x, e[0])
        torch.testing.assert_close((one[0](x), one[1](x)), expected)
        each = velocity.field(TIMES, e)[i], velocity.divergence_field(TIMES, e)[i]
        torch.testing.assert_close((each[0](x), each[1](x)), (v, divergence))


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_contexts_may_have_any_batch(name):
    velocity, context = random_velocity(name)
    found = velocity.embed(context)
    torch.testing.assert_close(velocity.embed(context[3]), found[3])
    torch.testing.assert_close(velocity.embed(context[None, :, None])[0, :, 0], found)
    assert velocity.embed(context[:0]).shape == (0, found.shape[1])


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_files_give_it_back(name, tmp_path):
    velocity, context = random_velocity(name)
    transform = pi.ConditionalInterpolantTransform(velocity)
    flow = pi.ConditionalInterpolantDistribution(transform).freeze()
    pi.save(flow, tmp_path / "flow.safetensors")
    again, x = pi.load(tmp_path / "flow.safetensors"), torch.randn(7, 2)
    expected = flow.condition(context).log_prob(x)
    torch.testing.assert_close(again.condition(context).log_prob(x), expected)


def test_data_are_embedded_once_for_all_times_and_evaluations():
    calls = []

    class Counted(nn.Module):
        def forward(self, y):
            calls.append(len(y))
            return y

    velocity = EmbeddedVelocity(2, [(3,)], Counted(), (8,))
    calls.clear()
    transform = pi.ConditionalInterpolantTransform(velocity).condition(torch.randn(5, 3))
    flow = pi.InterpolantDistribution(transform)
    flow.log_prob(flow.sample())
    assert calls == [5]


def test_a_gaussian_that_is_linear_in_its_context_is_known_before_training():
    slope, cov = torch.randn(2, 3), torch.tensor([[0.09, 0.03], [0.03, 0.04]])
    context = 5 + 3 * torch.randn(20_000, 3)
    noise = dist.MultivariateNormal(torch.zeros(2), cov)
    x = context @ slope.T + noise.sample((20_000,))
    transform = pi.ConditionalInterpolantTransform(EmbeddedVelocity(2, [(3,)])).double()
    flow = pi.ConditionalInterpolantDistribution(transform)
    set_whitening(flow, Rows(x, context))
    with torch.no_grad():
        view = flow.condition(context[:50])
        expected = noise.log_prob(x[:50] - context[:50] @ slope.T)
        assert (view.log_prob(x[:50]) - expected).abs().mean() < 0.03


def test_a_regression_on_noise_is_shrunk_to_nothing():
    velocity = EmbeddedVelocity(1, [(50,)])
    velocity.set_scales(torch.randn(100, 1), torch.randn(100, 50))
    assert velocity.slope.norm() < 0.2  # least squares have a norm of about 1


def test_data_far_outside_those_of_training_do_not_carry_the_regression_away():
    velocity, context = random_velocity("none")
    at = [velocity.embed(s * context)[:, :2].abs().max() for s in (1e2, 1e4)]
    assert at[0] == at[1]


def test_sets_do_not_depend_on_the_order_or_on_rows_that_are_not_there():
    y, embedding = torch.randn(4, 6, 2), SetEmbedding(2, True)  # noqa: FBT003
    masked = torch.cat((y, torch.tensor([1.0, 1, 1, 1, 0, 0]).expand(4, 6)[..., None]), -1)
    other = masked[:, [3, 1, 0, 2, 5, 4]].clone()
    other[:, 4:, :2] = 100.0
    embedding.set_scales(masked)
    for function in (embedding, embedding.summary):
        torch.testing.assert_close(function(masked), function(other))
        assert not torch.allclose(function(masked), function(masked * 1.1))
    torch.testing.assert_close(embedding.columns.loc, y[:, :4].mean((0, 1)))
    assert bool(embedding(torch.zeros(1, 6, 3)).isfinite().all())  # a set of nothing


def test_series_do_not_depend_on_values_that_are_missing():
    y = torch.randn(4, 30)
    there = (torch.rand(4, 30) > 0.3).double()
    embedding = SeriesEmbedding(30, masked=True)
    one, two = (torch.stack((y + s * (1 - there), there), -1) for s in (0.0, 50.0))
    embedding.set_scales(one)
    for function in (embedding, embedding.summary):
        torch.testing.assert_close(function(one), function(two))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EmbeddedVelocity(2, []), "at least one number"),
        (lambda: EmbeddedVelocity(2, [(3,)], nn.Flatten(0)), r"returns \(N, E\)"),
        (lambda: SetEmbedding(0), "positive sizes"),
        (lambda: SeriesEmbedding(0), "positive sizes"),
        (lambda: SetEmbedding(2)(torch.zeros(4, 5, 3)), r"shape \(N, n, 2\)"),
        (lambda: SeriesEmbedding(5, 2)(torch.zeros(4, 5)), r"shape \(N, n, 2\)"),
        (lambda: EmbeddedVelocity(2, [(3,)])(TIMES[0], torch.zeros(2)), "embedded data"),
    ],
)
def test_what_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_noise_of_a_latent_path_takes_embedded_data():
    velocity, context = random_velocity("none")
    transform = pi.ConditionalInterpolantTransform(
        velocity, interpolant=pi.Latent(pi.Linear(), pi.SineSquared(0.5))
    )
    flow = pi.ConditionalInterpolantDistribution(transform)
    x = torch.randn(200, 2)
    contexts = torch.randn(200, 6)
    for learn in ("velocity", "noise"):
        pi.fit(flow, x, context=contexts, steps=3, learn=learn, progress=False, seed=0)
    assert isinstance(transform.flow.noise, VelocityMLP)
    score = pi.score(flow.condition(context), torch.tensor(0.5), torch.randn(7, 2))
    assert bool(score.isfinite().all())
