"""Velocities given data: a regression in closed form, and embeddings."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_interpolant as pi
from pyro_interpolant.nn import EmbeddedVelocity, SeriesEmbedding, SetEmbedding, VelocityMLP
from pyro_interpolant.nn import embedding as embedding_module
from pyro_interpolant.solvers import FixedGrid
from pyro_interpolant.training.rows import Rows
from pyro_interpolant.training.whitening import set_whitening

TIMES = torch.linspace(0.1, 0.9, 3, dtype=torch.float64)

EMBEDDINGS = {
    "none": (lambda: None, (6,)),
    "set": (lambda: SetEmbedding(3, width=8), (5, 3)),
    "masked set": (lambda: SetEmbedding(2, masked=True, width=8), (5, 3)),
    "series": (lambda: SeriesEmbedding(12, width=4), (12,)),
    "masked series": (lambda: SeriesEmbedding(20, 2, masked=True, width=4), (20, 3)),
}


def random_velocity(name, dim=2):
    """Return a velocity with an embedding that is not zero, and data for it."""
    make, shape = EMBEDDINGS[name]
    velocity = EmbeddedVelocity(dim, [shape], make(), (8, 8)).double().eval()
    y = torch.randn(7, *shape)
    if name.startswith("masked"):
        y[..., -1] = (y[..., -1] > -0.5).double()
    context = y.flatten(1)
    with torch.no_grad():
        velocity.set_scales(torch.randn(7, dim), context)
        velocity.network.output.weight.normal_(std=0.3)
        velocity.slope.normal_()
        velocity.log_slope.normal_(std=0.3)
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
    # Contexts may have any batch.
    torch.testing.assert_close(velocity.embed(context[3]), e[3])
    torch.testing.assert_close(velocity.embed(context[None, :, None])[0, :, 0], e)
    assert velocity.embed(context[:0]).shape == (0, e.shape[1])


@pytest.mark.parametrize("name", ["set", "masked series"])
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
    flow.rsample_and_log_prob()
    assert calls == [5]
    flow.freeze()
    for _ in range(2):
        x = flow.sample().requires_grad_()
        assert flow.log_prob(x).requires_grad
        flow.score(x)
        flow.at(0.5).log_prob(x)
        pi.sample_sde(flow, steps=2)
    assert calls == [5, 5]


def random_family():
    """Return a conditional flow with an embedding of its own, and data for it."""
    velocity, context = random_velocity("set")
    transform = pi.ConditionalInterpolantTransform(velocity, solver=FixedGrid(steps=4))
    return pi.ConditionalInterpolantDistribution(transform), context


@pytest.mark.parametrize(
    ("kind", "used"),
    [("optimizer", True), ("loaded", True), ("scales", False), ("data", True), ("frozen", True)],
)
def test_a_conditioned_flow_follows_what_its_embedding_depends_on(kind, used):
    family, context = random_family()
    velocity = family.transform.velocity.train(kind == "frozen")  # drops units, of few rows
    posterior, x = family.condition(context), torch.randn(7, 2)
    with torch.no_grad():
        before = posterior.log_prob(x) if used else family.condition(context).log_prob(x)
    if kind == "optimizer":  # a fused one, which moves no version of weights
        weights = list(family.transform.parameters())
        for p in weights:
            p.grad = torch.ones_like(p)
        torch.optim.Adam(weights, lr=0.1, fused=True).step()
    elif kind == "loaded":
        other = {k: v + 0.1 for k, v in family.transform.state_dict().items()}
        family.transform.load_state_dict(other)
    elif kind == "scales":
        velocity.slope.data.add_(0.1)
    elif kind == "data":
        context.add_(0.1)
    family.freeze()
    after, expected = posterior.log_prob(x), family.condition(context).log_prob(x)
    assert not after.requires_grad
    assert torch.equal(after, expected)
    assert (after - before).abs().max() > 1e-3


def test_a_conditioned_flow_has_gradients_of_its_embedding_each_time():
    family, context = random_family()
    posterior, x = family.condition(context), torch.randn(7, 2)
    weights = list(family.transform.velocity.embedding.parameters())
    with torch.no_grad():
        posterior.log_prob(x)
    found = [torch.autograd.grad(posterior.log_prob(x).sum(), weights) for _ in range(2)]
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
        assert one.abs().max() > 0


def test_units_are_dropped_in_training_the_more_the_fewer_rows_there_are():
    velocity, context = random_velocity("none")
    found = velocity.embed(context)
    assert torch.equal(velocity.embed(context), found)
    velocity.train()
    assert not torch.allclose(velocity.embed(context), found)
    given = 2 * velocity.event_dim + 6  # mean, deviation and data stay
    assert torch.equal(velocity.embed(context)[:, :given], found[:, :given])
    velocity.set_scales(torch.randn(20_000, 2), torch.randn(20_000, 6))
    assert torch.equal(velocity.embed(context), velocity.eval().embed(context))


@pytest.mark.slow
def test_a_deviation_whose_logarithm_is_linear_in_the_context_is_known_before_training():
    context = torch.randn(20_000, 2)
    loc, scale = context @ torch.tensor([1.0, -2.0]), (context[:, 0] - 1).exp()
    x = (loc + scale * torch.randn(20_000))[:, None]
    transform = pi.ConditionalInterpolantTransform(EmbeddedVelocity(1, [(2,)])).double()
    flow = pi.ConditionalInterpolantDistribution(transform)
    transform.solver = FixedGrid(64)
    set_whitening(flow, Rows(x, context))
    with torch.no_grad():
        found = flow.condition(context[:200]).log_prob(x[:200])
        expected = dist.Normal(loc, scale).log_prob(x[:, 0])[:200]
        assert (found - expected).abs().mean() < 0.05


def test_regressions_on_noise_are_shrunk_to_nothing():
    velocity = EmbeddedVelocity(1, [(50,)])
    velocity.set_scales(torch.randn(100, 1), torch.randn(100, 50))
    assert velocity.slope.norm() < 0.2  # least squares have a norm of about 1
    assert velocity.log_slope.norm() < 0.2


def test_a_state_that_the_context_tells_exactly_has_a_finite_velocity():
    context = torch.randn(100, 2)
    velocity = EmbeddedVelocity(2, [(2,)]).double()
    velocity.set_scales(torch.stack((torch.zeros(100), context[:, 0]), -1), context)
    found = velocity.forward_and_divergence(TIMES[1], torch.zeros(100, 2), velocity.embed(context))
    assert all(bool(part.isfinite().all()) for part in found)


def test_scales_that_are_set_again_are_those_of_the_new_rows():
    """Wider ones than before, too, whose summaries are not cut off at the old bounds."""
    velocity, _ = random_velocity("none")
    fresh = EmbeddedVelocity(2, [(6,)], hidden_dims=(8, 8)).double()
    w, context = torch.randn(40, 2), 10 * torch.randn(40, 6)
    for network in (velocity, fresh):
        network.set_scales(w, context)
    for name in ("loc", "scale", "bounds", "slope", "offset", "log_slope", "log_offset"):
        torch.testing.assert_close(getattr(velocity, name), getattr(fresh, name))


def test_data_far_outside_those_of_training_do_not_carry_the_regressions_away():
    velocity, context = random_velocity("none")
    at = [velocity.embed(s * context)[:, :4].abs().max() for s in (1e2, 1e4)]
    assert at[0] == at[1]
    velocity.log_slope.mul_(100.0)
    low, high = velocity.log_bounds
    found = velocity.embed(context)[:, 2:4]
    assert bool(((low <= found) & (found <= high)).all())


@pytest.mark.parametrize("masked", [False, True])
def test_sets_are_summarised_by_least_squares_fits(masked):
    """In units of all rows, which are of mean 0 and deviation 1 here."""
    rows = torch.randn(50, 40, 3)
    rows[..., 2] += 2 * rows[..., 0] - rows[..., 1] + 0.5
    rows = (rows - rows.mean((0, 1))) / rows.std((0, 1), correction=0)
    embedding, y = SetEmbedding(3, masked).double(), rows
    if masked:
        gaps = torch.full((50, 5, 4), 7.0)
        gaps[..., 3] = 0.0
        y = torch.cat((torch.cat((rows, torch.ones(50, 40, 1)), -1), gaps), 1)
    embedding.set_scales(y)
    found = embedding.summary(y)
    columns = torch.cat((rows[..., :2], torch.ones(50, 40, 1)), -1)
    fit = torch.linalg.lstsq(columns, rows[..., 2:]).solution
    left = (rows[..., 2:] - columns @ fit).square().mean(1).sqrt().log()
    expected = torch.cat((rows.mean(1), rows.std(1, correction=0).log(), fit[..., 0], left), -1)
    names = [0, 1, 2, 3, 4, 5, 10, 11, 14, 17]  # slopes of 01 02 12, then 10 20 21
    torch.testing.assert_close(found[:, names], expected, rtol=0.0, atol=0.01)
    assert found.shape == (50, 24 + masked)
    extremes = torch.cat((rows.amin(1), rows.amax(1)), -1)
    torch.testing.assert_close(found[:, 18:24], extremes, rtol=1e-4, atol=1e-4)
    if masked:
        torch.testing.assert_close(found[:, 24], torch.full((50,), 41.0).log())


@pytest.mark.parametrize("masked", [False, True])
def test_series_are_summarised_by_fits_of_neighbours(masked):
    """With a mask, of those that are both there."""
    y, noise = torch.zeros(100, 200), torch.randn(100, 200)
    for t in range(1, 200):
        y[:, t] = 0.7 * y[:, t - 1] + 0.3 * noise[:, t]
    embedding = SeriesEmbedding(200, masked=masked).double()
    if masked:
        y = torch.stack((y, (torch.rand(y.shape) > 0.2).double()), -1)
    embedding.set_scales(y)
    found, units = embedding.summary(y)[:, 32:], embedding.columns.scale
    assert found.shape == (100, 10)
    assert abs(found[:, 5].mean() - 0.7) < 0.03  # of a time by the one before
    assert abs(found[:, 9].exp().mean() * units - 0.3) < 0.01


def test_the_network_of_a_set_sees_rows_and_their_residuals():
    embedding, y = SetEmbedding(1, width=8).double(), 2 + 3 * torch.randn(5, 400, 1)
    embedding.set_scales(y)
    rows = (y - y.mean()) / y.std(correction=0)
    left = (rows - rows.mean(1, keepdim=True)) / rows.std(1, correction=0, keepdim=True)
    expected = embedding.rows(torch.cat((rows, left), -1)).mean(1)
    torch.testing.assert_close(embedding(y), expected, rtol=0, atol=1e-4)
    assert (expected - embedding.rows(torch.cat((rows, rows), -1)).mean(1)).abs().max() > 1e-3


def test_the_network_of_a_series_sees_what_is_missing():
    embedding = SeriesEmbedding(12, masked=True, width=4).double()
    y = torch.zeros(2, 12, 2)
    y[..., 1] = 1.0
    y[1, 3, 1] = 0.0  # where values are what they are in the mean
    first, second = embedding(y)
    assert (first - second).abs().max() > 1e-4


def test_sets_of_fewer_rows_than_columns_and_of_equal_rows_have_finite_numbers():
    embedding = SetEmbedding(4)
    for y in (torch.randn(6, 2, 4), torch.randn(6, 1, 4), torch.ones(6, 5, 4)):
        embedding.set_scales(y)
        assert bool(embedding.summary(y).isfinite().all())
        assert bool(embedding(y).isfinite().all())
    assert SeriesEmbedding(1).summary(torch.randn(6, 1)).shape == (6, 1)


def test_sets_do_not_depend_on_the_order_or_on_rows_that_are_not_there():
    y, embedding = torch.randn(4, 6, 2), SetEmbedding(2, masked=True)
    masked = torch.cat((y, torch.tensor([1.0, 1, 1, 1, 0, 0]).expand(4, 6)[..., None]), -1)
    other = masked[:, [3, 1, 0, 2, 5, 4]].clone()
    other[:, 4:, :2] = 100.0
    embedding.set_scales(masked)
    for function in (embedding, embedding.summary):
        torch.testing.assert_close(function(masked), function(other))
        assert not torch.allclose(function(masked), function(masked * 1.1))
    torch.testing.assert_close(embedding.columns.loc, y[:, :4].mean((0, 1)))
    for function in (embedding, embedding.summary):
        assert bool(function(torch.zeros(1, 6, 3)).isfinite().all())  # a set of nothing


@pytest.mark.parametrize(("kind", "sizes"), [(SetEmbedding, (2,)), (SeriesEmbedding, (6, 2))])
def test_what_is_missing_may_be_nan(kind, sizes):
    """It counts as any other value would, and so do gradients."""
    y = torch.randn(4, 6, 3, dtype=torch.float32)
    y[..., 2] = torch.tensor([1.0, 1, 1, 0, 1, 0])
    y[0, :, 2] = 0  # of the first nothing is there
    gone = y.clone()
    gone[..., :2] = torch.where(y[..., 2:] > 0, y[..., :2], torch.nan)
    gone.requires_grad_()
    embedding = kind(*sizes, masked=True).float()
    found = embedding(gone), embedding.summary(gone)
    torch.testing.assert_close(found, (embedding(y), embedding.summary(y)))
    parts = torch.autograd.grad(sum(part.sum() for part in found), [gone, *embedding.parameters()])
    assert all(bool(part.isfinite().all()) for part in parts)


def test_a_set_without_rows_is_one_of_which_all_are_missing():
    embedding = SetEmbedding(2, masked=True).double()
    none, missing = torch.ones(3, 0, 3), torch.zeros(3, 4, 3)
    expected = embedding.forward_and_summary(missing)
    torch.testing.assert_close(embedding.forward_and_summary(none), expected)
    plain = SetEmbedding(2).double().summary(none[..., :-1])
    torch.testing.assert_close(plain, expected[1][:, :-1])


def test_refusals():
    with pytest.raises(ValueError, match="at least one number"):
        EmbeddedVelocity(2, [])
    with pytest.raises(ValueError, match=r"returns \(N, E\)"):
        EmbeddedVelocity(2, [(3,)], nn.Flatten(0))
    with pytest.raises(ValueError, match="embedded data"):
        EmbeddedVelocity(2, [(3,)])(TIMES[0], torch.zeros(2))
    with pytest.raises(ValueError, match=r"shape \(N, n, 2\)"):
        SetEmbedding(2)(torch.zeros(4, 5, 3))
    with pytest.raises(ValueError, match="series of 50 times, got 49: pad shorter"):
        SeriesEmbedding(50)(torch.ones(3, 49))


@pytest.mark.slow
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


def test_many_rows_are_embedded_in_pieces_and_what_gradients_need_is_computed_again(monkeypatch):
    embedding, y, seen = SetEmbedding(2, width=8), torch.randn(7, 10, 2), []

    def gradients():
        parts = embedding.forward_and_summary(y)
        total = sum(part.square().sum() for part in parts)
        return torch.autograd.grad(total, list(embedding.parameters()))

    whole, expected = embedding(y), gradients()
    monkeypatch.setattr(embedding_module, "_ROWS_AT_ONCE", 35)
    monkeypatch.setattr(embedding_module, "_ROWS_KEPT", 69)
    embedding.rows.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    torch.testing.assert_close(gradients(), expected)
    assert sorted(seen) == [1, 1, 3, 3, 3, 3]  # forward, and again on the way back
    with torch.no_grad():
        torch.testing.assert_close(embedding(y), whole)
    assert seen[6:] == [3, 3, 1]


@pytest.mark.parametrize("is_new", [True, False])
def test_an_embedding_that_is_frozen_keeps_the_scales_that_it_has_learned_with(is_new):
    embedding, y = SetEmbedding(1, width=8), 2 + torch.randn(50, 5, 1)
    if not is_new:
        embedding.set_scales(y)
    velocity = EmbeddedVelocity(2, [(5, 1)], embedding.requires_grad_(requires_grad=False), (8,))
    before = embedding(y)
    for shift in (30.0, 40.0):
        velocity.set_scales(torch.randn(50, 2), (5 * torch.randn(50, 5, 1) + shift).flatten(1))
        assert torch.equal(embedding(y), before) != is_new
        before = embedding(y)
        is_new = False
    velocity.requires_grad_(requires_grad=False)  # as a trained flow is, which may be trained on
    velocity.set_scales(torch.randn(50, 2), 3 * y.flatten(1))
    assert not torch.equal(embedding(y), before)
