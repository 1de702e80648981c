import copy
import pickle

import pyro.distributions as dist
import pytest
import torch
from cases import INTERPOLANTS, LATENT, own_flow, random_flow, random_prior
from oracles import LatentNoise, PairVelocity, random_mixture
from pyro.distributions import constraints
from torch import nn

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    EncodingDecoding,
    FixedGrid,
    InterpolantDistribution,
    InterpolantTransform,
    Linear,
    Mirror,
    NonlinearInterpolant,
    SineSquared,
    Trigonometric,
    denoiser,
    fit,
    from_samples,
    interpolant_transform,
    load,
    sample_sde,
    save,
    score,
)
from pyro_interpolant.diffusion import sde_log_prob

MEMBERS = {**INTERPOLANTS, **LATENT}
LOC = torch.tensor([3.0, -1.0], dtype=torch.float64)
LINEAR = torch.tensor([[2.0, 0.0], [0.7, 0.8]], dtype=torch.float64)


def flow_of(velocity, interpolant, base=None, noise=None, **kwargs):
    """The flow of an exact velocity, whitened by a map that is not the identity."""
    transform = InterpolantTransform(velocity, interpolant=interpolant, solver=FixedGrid(48))
    transform.flow.whitening.set(LOC.to(transform.flow.loc), LINEAR.to(transform.flow.loc))
    transform.flow.noise = noise
    return InterpolantDistribution(transform, base, **kwargs)


def white(y):
    return (y - LOC.to(y)) @ torch.linalg.inv(LINEAR.to(y)).T


def rows(*shape):
    return LOC + torch.randn(*shape, 2) @ LINEAR.T


def gradient(log_prob, y):
    y = y.clone().requires_grad_()
    return torch.autograd.grad(log_prob(y).sum(), y)[0]


@pytest.mark.parametrize("interpolant", MEMBERS.values(), ids=MEMBERS)
@pytest.mark.parametrize("t", [0.2, 0.5, 0.8])
def test_the_score_is_the_gradient_of_the_density_in_data_coordinates(interpolant, t):
    truth = random_mixture(2, interpolant)
    flow, y = flow_of(truth, interpolant), rows(30)
    time = torch.full((30,), t)
    expected = gradient(lambda y: truth.log_prob(time, white(y)), y)
    assert torch.allclose(score(flow, t, y), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("interpolant", MEMBERS.values(), ids=MEMBERS)
def test_the_denoiser_is_the_mean_of_the_data_in_data_coordinates(interpolant):
    mixture = random_mixture(2, interpolant)
    truth = PairVelocity(torch.zeros(2), torch.eye(2), mixture)
    flow, y = flow_of(mixture, interpolant), rows(30)
    for t in (0.2, 0.5, 0.8):
        if float(interpolant.coefficients(torch.tensor(t))[1]) > 1e-9:
            expected = LOC + truth.denoiser(torch.full((30,), t), white(y)) @ LINEAR.T
            assert torch.allclose(denoiser(flow, t, y), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_it_agrees_with_the_gradient_of_the_solved_density():
    truth = random_mixture(2, Trigonometric())
    flow, y = flow_of(truth, Trigonometric()), rows(20)
    assert torch.allclose(score(flow, 0.6, y), flow.at(0.6).score(y), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LATENT)
def test_a_learned_noise_serves_any_base_and_coupling(name):
    interpolant = LATENT[name]
    cov = torch.tensor([[0.5, 0.2], [0.2, 0.8]])
    truth = PairVelocity(torch.tensor([0.4, -1.0]), cov, random_mixture(2, interpolant))
    base = dist.MultivariateNormal(LOC + truth.loc @ LINEAR.T, LINEAR @ cov @ LINEAR.T)
    flow = flow_of(truth, interpolant, base, LatentNoise(truth))
    flow.transform.flow.independent = False
    y = rows(25)
    for t in (0.2, 0.6, 0.8):
        time = torch.full((25,), t)
        expected = gradient(lambda y, time=time: truth.log_prob(time, white(y)), y)
        assert torch.allclose(score(flow, t, y), expected, rtol=1e-8, atol=1e-8)
        if float(interpolant.coefficients(torch.tensor(t))[1]) > 1e-9:
            expected = LOC + truth.denoiser(time, white(y)) @ LINEAR.T
            assert torch.allclose(denoiser(flow, t, y), expected, rtol=1e-8, atol=1e-8)


def test_a_learned_noise_is_preferred_to_the_velocity():
    interpolant = LATENT["trigonometric, smooth"]
    truth = random_mixture(2, interpolant)
    flow = flow_of(random_flow(2).velocity, interpolant, noise=LatentNoise(truth))
    y = rows(5)
    expected = gradient(lambda y: truth.log_prob(torch.full((5,), 0.4), white(y)), y)
    assert torch.allclose(score(flow, 0.4, y), expected)
    with pytest.raises(ValueError, match="gamma is positive, got t = 1:"):
        score(flow, 1.0, y)


def test_a_mirror_needs_no_base():
    interpolant = Mirror(SineSquared(0.7))
    truth = random_mixture(2, interpolant)
    y, time = rows(10), torch.full((10,), 0.3)
    flow = flow_of(truth, interpolant)
    expected = gradient(lambda y: truth.log_prob(time, white(y)), y)
    assert torch.allclose(score(flow, 0.3, y), expected)
    with_noise = flow_of(truth, interpolant, noise=LatentNoise(truth))
    assert torch.allclose(denoiser(with_noise, 0.3, y), denoiser(flow, 0.3, y))
    assert torch.isfinite(denoiser(with_noise, 0.5, y)).all()


def test_shapes_of_states_and_times():
    truth = random_mixture(2, Linear())
    flow, y = flow_of(truth, Linear()), rows(4, 5)
    times = torch.tensor([0.1, 0.4, 0.6, 0.9])
    for function in (score, denoiser):
        whole = function(flow, times[:, None], y)
        assert whole.shape == (4, 5, 2)
        for i, t in enumerate(times):
            assert torch.allclose(whole[i], function(flow, t, y[i]))
            assert torch.allclose(whole[i, 0], function(flow, float(t), y[i, 0]))
        assert torch.allclose(function(flow, times[:, None].expand(4, 5), y), whole)
        one_row = function(flow, times, y[0, 0])
        assert one_row.shape == (4, 2)
        assert torch.allclose(one_row[2], function(flow, times[2], y[0, 0]))


@pytest.mark.parametrize("build", [random_flow, own_flow])
def test_a_conditional_flow_gives_the_score_of_each_context(build):
    likelihood = ConditionalInterpolantDistribution(build(2, context_dim=3))
    c, y = torch.randn(6, 3), torch.randn(6, 2)
    together = score(likelihood.condition(c), 0.5, y)
    one = score(likelihood.condition(c[2]), 0.5, y[2])
    assert torch.allclose(together[2], one)
    assert not torch.allclose(together[2], score(likelihood.condition(c[3]), 0.5, y[2]))
    assert score(likelihood.condition(c[2]), torch.tensor([0.2, 0.5])[:, None], y).shape == (
        2,
        6,
        2,
    )
    assert denoiser(likelihood.condition(c), 0.5, y[0]).shape == (6, 2)
    with pytest.raises(TypeError, match=r"\.condition\(context\)"):
        score(likelihood, 0.5, y)


def test_under_a_support_scores_live_in_the_unconstrained_space():
    truth = random_mixture(2, Linear())
    plain = flow_of(truth, Linear())
    positive = flow_of(truth, Linear(), support=constraints.positive)
    y = rows(8)
    assert torch.allclose(positive.unconstrained(y.exp()), y)
    assert torch.equal(score(positive, 0.5, y), score(plain, 0.5, y))


def test_float32_and_gradients():
    flow = InterpolantDistribution(interpolant_transform(2, (16, 16)).float())
    y = torch.randn(5, 2, dtype=torch.float32)
    s = score(flow, 0.5, y)
    assert s.dtype == torch.float32
    assert torch.allclose(s, -y, atol=1e-6)  # an untrained flow is N(0, I) at every time
    s.sum().backward()
    assert any(p.grad is not None for p in flow.transform.parameters())
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        score(flow, 0.5, y.double())


def prior(base=None, interpolant=None):
    return InterpolantDistribution(interpolant_transform(2, (8, 8), interpolant=interpolant), base)


def paired():
    flow = prior()
    flow.transform.flow.independent = False
    return flow


def laplace():
    return dist.Laplace(torch.zeros(2), torch.ones(2)).to_event(1)


REFUSED = {
    "base": (
        lambda: prior(laplace()),
        r"expected the default base.*got Independent.*learn='noise'",
    ),
    "coupling": (paired, r"independent coupling.*paired.*learn='noise'"),
    "non-linear": (
        lambda: prior(interpolant=NonlinearInterpolant(lambda t, a, b: (1 - t) * a + t * b)),
        r"expected a linear interpolant, got NonlinearInterpolant",
    ),
}


@pytest.mark.parametrize("function", [score, denoiser])
@pytest.mark.parametrize("name", REFUSED)
def test_where_the_identity_does_not_hold_an_error_says_why(function, name):
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        function(build(), 0.5, torch.zeros(3, 2))


def test_the_ends_and_wrong_times():
    flow = prior()
    with pytest.raises(ValueError, match=r"got t = 1:.*distribution\.at\(t\)\.score\(x\)"):
        score(flow, 1.0, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"expected times in \[0, 1\]"):
        score(flow, 1.2, torch.zeros(3, 2))
    with pytest.raises(ValueError, match="last dimension of size 2"):
        score(flow, 0.5, torch.zeros(3))
    truth = random_mixture(2, EncodingDecoding())
    coder = flow_of(truth, EncodingDecoding(), noise=LatentNoise(truth))
    with pytest.raises(ValueError, match=r"the path depends on the data, got t = 0\.2"):
        denoiser(coder, 0.2, torch.zeros(3, 2))
    assert torch.equal(denoiser(flow, 1.0, torch.ones(3, 2)), torch.ones(3, 2))


@pytest.mark.parametrize("function", [score, denoiser])
def test_vmap_over_times_checks_all_of_them(function):
    flow, x, t = random_prior(2), torch.randn(2), torch.tensor([0.2, 0.5, 0.9])
    found = torch.func.vmap(lambda time: function(flow, time, x))(t)
    assert torch.allclose(found, function(flow, t, x.expand(3, 2)))
    with pytest.raises(ValueError, match=r"expected times in \[0, 1\], got 0\.2 to 2"):
        torch.func.vmap(lambda time: function(flow, time, x))(torch.tensor([0.2, 2.0]))
    if function is score:
        with pytest.raises(ValueError, match="got t = 1: take another"):
            torch.func.vmap(lambda time: score(flow, time, x))(torch.tensor([0.5, 1.0]))


class Expanded(nn.Module):
    """A velocity that records the shapes of the times it is given."""

    event_dim = 2

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, t, x, context=None):
        self.seen.append(t.shape)
        return torch.zeros_like(x)


def test_a_velocity_of_ones_own_is_given_full_times():
    velocity = Expanded()
    flow = InterpolantDistribution(InterpolantTransform(velocity))
    score(flow, 0.5, torch.zeros(4, 5, 2))
    assert velocity.seen == [(4, 5)]


@pytest.mark.slow
def test_times_of_another_dimension_behind_a_map():
    torch.set_default_dtype(torch.float64)
    rows = torch.randn(2000, 2).exp()
    behind = from_samples(rows, marginals=True, steps=5, progress=False, seed=0)
    x, t = torch.randn(6, 2).exp(), torch.tensor([0.2, 0.5])[:, None]
    found = score(behind, t, x)
    assert found.shape == (2, 6, 2)
    assert torch.allclose(found[1], score(behind, 0.5, x))


def trained_by_likelihood():
    """A flow that maximum likelihood has trained for a step, and one look at its loss."""
    flow, x = random_prior(2, frozen=False), torch.randn(20, 2)
    (-flow.log_prob(x).mean()).backward()
    torch.optim.SGD(flow.transform.parameters(), 1e-2).step()
    flow.log_prob(x)
    return flow


def loaded(flow, tmp_path):
    save(flow, tmp_path / "flow")
    return load(tmp_path / "flow")


def given_state(flow, _):
    other = random_prior(2)
    other.transform.load_state_dict(flow.transform.state_dict())
    return other


KEPT = {
    "itself": lambda flow, _: flow,
    "frozen": lambda flow, _: flow.freeze(),
    "copied": lambda flow, _: copy.deepcopy(flow),
    "pickled": lambda flow, _: pickle.loads(pickle.dumps(flow)),
    "saved": loaded,
    "saved twice": lambda flow, path: loaded(loaded(flow, path), path),
    "its state": given_state,
    "its state in a file": lambda flow, path: (
        (
            torch.save(flow.transform.state_dict(), path / "state"),
            flow.transform.load_state_dict(torch.load(path / "state")),
        )
        and flow
    ),
    "converted": lambda flow, _: flow.to(torch.float32).to(torch.float64),
}


@pytest.mark.parametrize("name", KEPT)
def test_that_a_likelihood_trained_the_weights_stays_known(name, tmp_path):
    flow = KEPT[name](trained_by_likelihood(), tmp_path)
    with pytest.raises(ValueError, match="weights that were trained through the solver"):
        score(flow, 0.5, torch.zeros(3, 2))


def test_weights_that_are_swapped_for_a_call_have_not_moved():
    flow, x = random_prior(2, frozen=False), torch.randn(20, 2)
    weights = {name: 1.1 * p for name, p in flow.transform.named_parameters()}
    ends, _ = torch.func.functional_call(flow.transform, weights, (x,)), None
    ends.sum().backward()
    assert not flow.transform.flow.was_trained_through_solver()


def convert(flow):
    flow.to(torch.float32).to(torch.float64)


def load_state(flow):
    flow.transform.load_state_dict(random_prior(2).transform.state_dict())


def load_network(flow):
    flow.transform.velocity.load_state_dict(random_prior(2).transform.velocity.state_dict())


def look(flow, x):
    flow.log_prob(x)


def derive(flow, x):
    flow.score(x)


def descend(flow, x):
    flow.log_prob(x).sum().backward()


@pytest.mark.parametrize(
    ("before", "change"),
    [
        *((look, change) for change in (convert, load_state, load_network)),
        *((derive, change) for change in (convert, load_state, load_network)),
        *((descend, change) for change in (convert, load_state)),
    ],
)
def test_weights_that_are_converted_or_loaded_are_not_trained(before, change):
    flow, x = random_prior(2, frozen=False), torch.randn(20, 2)
    before(flow, x)
    change(flow)
    score(flow, 0.5, torch.zeros(3, 2))


def test_a_state_brings_along_how_its_weights_were_trained():
    flow, other = trained_by_likelihood(), random_prior(2)
    nameless = dict(flow.transform.state_dict())
    load_state(flow)
    score(flow, 0.5, torch.zeros(3, 2))
    other.transform.flow.independent = False
    flow.transform.load_state_dict(other.transform.state_dict())
    with pytest.raises(ValueError, match="independent coupling"):
        score(flow, 0.5, torch.zeros(3, 2))
    again = trained_by_likelihood()
    again.transform.load_state_dict(nameless)  # of which nothing is known
    with pytest.raises(ValueError, match="weights that were trained through the solver"):
        score(again, 0.5, torch.zeros(3, 2))


@pytest.mark.slow
def test_weights_trained_by_a_likelihood_give_no_score():
    flow, x = random_prior(2, frozen=False), torch.randn(20, 2)
    flow.log_prob(x.requires_grad_()).sum().backward()  # a gradient alone changes no weights
    score(flow, 0.5, x.detach())
    torch.optim.SGD(flow.transform.parameters(), 1e-2).step()
    trained = (flow, copy.deepcopy(flow), flow.freeze())
    for each in trained:
        with pytest.raises(ValueError, match="weights that were trained through the solver"):
            score(each, 0.5, x.detach())
    fit(flow, x.detach(), steps=2, seed=0, progress=False, tolerance=1.0)
    score(flow, 0.5, x.detach())


@pytest.mark.parametrize("support", [constraints.real_vector, constraints.positive])
@pytest.mark.parametrize(
    "call",
    [
        lambda d, x: score(d, 0.5, x),
        lambda d, x: denoiser(d, 0.5, x),
        lambda d, x: sample_sde(d, x=x),
        lambda d, x: sde_log_prob(d, x),
        lambda d, x: d.score(x),
        lambda d, x: d.log_prob(x),
    ],
)
def test_rows_that_are_no_tensor_are_refused_alike(call, support):
    d = InterpolantDistribution(random_flow(2), support=support).freeze()
    with pytest.raises(TypeError, match="expected a value that is a tensor, got ndarray: convert"):
        call(d, torch.ones(3, 2).numpy())
