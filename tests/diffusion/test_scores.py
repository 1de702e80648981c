import pickle

import pyro.distributions as dist
import pytest
import torch
from cases import INTERPOLANTS, LATENT, random_flow, random_prior
from oracles import LatentNoise, PairVelocity, random_mixture
from pyro.distributions import constraints

import pyro_interpolant as pi

MEMBERS = {**INTERPOLANTS, **LATENT}
LOC = torch.tensor([3.0, -1.0], dtype=torch.float64)
LINEAR = torch.tensor([[2.0, 0.0], [0.7, 0.8]], dtype=torch.float64)


def flow_of(velocity, interpolant, base=None, noise=None, **kwargs):
    """The flow of an exact velocity, whitened by a map that is not the identity."""
    transform = pi.InterpolantTransform(velocity, interpolant=interpolant, solver=pi.FixedGrid(48))
    transform.flow.whitening.set(LOC.to(transform.flow.loc), LINEAR.to(transform.flow.loc))
    transform.flow.noise = noise
    return pi.InterpolantDistribution(transform, base, **kwargs)


def white(y):
    return (y - LOC.to(y)) @ torch.linalg.inv(LINEAR.to(y)).T


def rows(*shape):
    return LOC + torch.randn(*shape, 2) @ LINEAR.T


def gradient(log_prob, y):
    y = y.clone().requires_grad_()
    return torch.autograd.grad(log_prob(y).sum(), y)[0]


@pytest.mark.parametrize("name", MEMBERS)
def test_scores_and_denoisers_in_data_coordinates(name):
    """The gradient of the log-density, and the mean of the data given the state."""
    interpolant = MEMBERS[name]
    mixture = random_mixture(2, interpolant)
    truth = PairVelocity(torch.zeros(2), torch.eye(2), mixture)
    flow, y = flow_of(mixture, interpolant), rows(30)
    for t in (0.2, 0.5, 0.8):
        time = torch.full((30,), t)
        expected = gradient(lambda y, time=time: mixture.log_prob(time, white(y)), y)
        assert torch.allclose(pi.score(flow, t, y), expected, rtol=1e-9, atol=1e-9), t
        if float(interpolant.coefficients(torch.tensor(t))[1]) > 1e-9:
            expected = LOC + truth.denoiser(time, white(y)) @ LINEAR.T
            assert torch.allclose(pi.denoiser(flow, t, y), expected, rtol=1e-9, atol=1e-9), t


@pytest.mark.parametrize("name", ["encoding-decoding", "linear, bridge"])
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
        assert torch.allclose(pi.score(flow, t, y), expected, rtol=1e-8, atol=1e-8)
        if float(interpolant.coefficients(torch.tensor(t))[1]) > 1e-9:
            expected = LOC + truth.denoiser(time, white(y)) @ LINEAR.T
            assert torch.allclose(pi.denoiser(flow, t, y), expected, rtol=1e-8, atol=1e-8)


def test_shapes_of_states_and_times():
    truth = random_mixture(2, pi.Linear())
    flow, y = flow_of(truth, pi.Linear()), rows(4, 5)
    times = torch.tensor([0.1, 0.4, 0.6, 0.9])
    for function in (pi.score, pi.denoiser):
        whole = function(flow, times[:, None], y)
        assert whole.shape == (4, 5, 2)
        for i, t in enumerate(times):
            assert torch.allclose(whole[i], function(flow, t, y[i]))
            assert torch.allclose(whole[i, 0], function(flow, float(t), y[i, 0]))
        assert torch.allclose(function(flow, times[:, None].expand(4, 5), y), whole)
        one_row = function(flow, times, y[0, 0])
        assert one_row.shape == (4, 2)
        assert torch.allclose(one_row[2], function(flow, times[2], y[0, 0]))


def test_a_conditional_flow_gives_the_score_of_each_context():
    likelihood = pi.ConditionalInterpolantDistribution(random_flow(2, context_dim=3))
    c, y = torch.randn(6, 3), torch.randn(6, 2)
    together = pi.score(likelihood.condition(c), 0.5, y)
    one = pi.score(likelihood.condition(c[2]), 0.5, y[2])
    assert torch.allclose(together[2], one)
    assert not torch.allclose(together[2], pi.score(likelihood.condition(c[3]), 0.5, y[2]))
    times = torch.tensor([0.2, 0.5])[:, None]
    assert pi.score(likelihood.condition(c[2]), times, y).shape == (2, 6, 2)
    assert pi.denoiser(likelihood.condition(c), 0.5, y[0]).shape == (6, 2)
    with pytest.raises(TypeError, match=r"\.condition\(context\)"):
        pi.score(likelihood, 0.5, y)


def test_under_a_support_scores_live_in_the_unconstrained_space():
    truth = random_mixture(2, pi.Linear())
    plain = flow_of(truth, pi.Linear())
    positive = flow_of(truth, pi.Linear(), support=constraints.positive)
    y = rows(8)
    assert torch.allclose(positive.unconstrained(y.exp()), y)
    assert torch.equal(pi.score(positive, 0.5, y), pi.score(plain, 0.5, y))


def test_float32_and_gradients():
    flow = pi.InterpolantDistribution(pi.interpolant_transform(2, (16, 16)).float())
    y = torch.randn(5, 2, dtype=torch.float32)
    s = pi.score(flow, 0.5, y)
    assert s.dtype == torch.float32
    assert torch.allclose(s, -y, atol=1e-6)  # an untrained flow is N(0, I) at every time
    s.sum().backward()
    assert any(p.grad is not None for p in flow.transform.parameters())
    with pytest.raises(ValueError, match=r"expected torch\.float32"):
        pi.score(flow, 0.5, y.double())


def prior(base=None, interpolant=None):
    return pi.InterpolantDistribution(
        pi.interpolant_transform(2, (8, 8), interpolant=interpolant), base
    )


def test_refusals():
    flow, x = prior(), torch.zeros(3, 2)
    with pytest.raises(ValueError, match=r"got t = 1:.*distribution\.at\(t\)\.score\(x\)"):
        pi.score(flow, 1.0, x)
    with pytest.raises(ValueError, match=r"expected times in \[0, 1\]"):
        pi.denoiser(flow, 1.2, x)
    with pytest.raises(ValueError, match="last dimension of size 2"):
        pi.score(flow, 0.5, torch.zeros(3))
    with pytest.raises(TypeError, match="expected a value that is a tensor, got ndarray: convert"):
        pi.score(flow, 0.5, x.numpy())
    laplace = dist.Laplace(torch.zeros(2), torch.ones(2)).to_event(1)
    bent = pi.NonlinearInterpolant(lambda t, a, b: (1 - t) * a + t * b)
    for function in (pi.score, pi.denoiser):
        with pytest.raises(ValueError, match="expected the default base.*got Ind.*learn='noise'"):
            function(prior(laplace), 0.5, x)
        with pytest.raises(ValueError, match=r"a linear interpolant, got NonlinearInterpolant"):
            function(prior(interpolant=bent), 0.5, x)
    flow.transform.flow.independent = False
    with pytest.raises(ValueError, match=r"independent coupling.*paired.*learn='noise'"):
        pi.score(flow, 0.5, x)
    truth = random_mixture(2, pi.EncodingDecoding())
    coder = flow_of(truth, pi.EncodingDecoding(), noise=LatentNoise(truth))
    with pytest.raises(ValueError, match=r"the path depends on the data, got t = 0\.2"):
        pi.denoiser(coder, 0.2, x)
    with pytest.raises(ValueError, match="gamma is positive, got t = 1:"):
        pi.score(coder, 1.0, x)


def test_vmap_over_times_checks_all_of_them():
    flow, x, t = random_prior(2), torch.randn(2), torch.tensor([0.2, 0.5, 0.9])
    for function in (pi.score, pi.denoiser):
        found = torch.func.vmap(lambda time, function=function: function(flow, time, x))(t)
        assert torch.allclose(found, function(flow, t, x.expand(3, 2)))
    with pytest.raises(ValueError, match=r"expected times in \[0, 1\], got 0\.2 to 2"):
        torch.func.vmap(lambda time: pi.denoiser(flow, time, x))(torch.tensor([0.2, 2.0]))
    with pytest.raises(ValueError, match="got t = 1: take another"):
        torch.func.vmap(lambda time: pi.score(flow, time, x))(torch.tensor([0.5, 1.0]))


@pytest.mark.slow
def test_times_of_another_dimension_behind_a_map():
    rows = torch.randn(2000, 2).exp()
    behind = pi.from_samples(rows, marginals=True, steps=5, progress=False, seed=0)
    x, t = torch.randn(6, 2).exp(), torch.tensor([0.2, 0.5])[:, None]
    found = pi.score(behind, t, x)
    assert found.shape == (2, 6, 2)
    assert torch.allclose(found[1], pi.score(behind, 0.5, x))


def trained_by_likelihood():
    """A flow that maximum likelihood has trained for a step, and one evaluation of its loss."""
    flow, x = random_prior(2, frozen=False), torch.randn(20, 2)
    (-flow.log_prob(x).mean()).backward()
    torch.optim.SGD(flow.transform.parameters(), 1e-2).step()
    flow.log_prob(x)
    return flow


def loaded(flow, tmp_path):
    pi.save(flow, tmp_path / "flow")
    return pi.load(tmp_path / "flow")


KEPT = {
    "itself": lambda flow, _: flow,
    "frozen": lambda flow, _: flow.freeze(),
    "pickled": lambda flow, _: pickle.loads(pickle.dumps(flow)),
    "saved twice": lambda flow, path: loaded(loaded(flow, path), path),
    "converted": lambda flow, _: flow.to(torch.float32).to(torch.float64),
}


@pytest.mark.parametrize("name", KEPT)
def test_that_a_likelihood_trained_the_weights_stays_known(name, tmp_path):
    flow = KEPT[name](trained_by_likelihood(), tmp_path)
    with pytest.raises(ValueError, match="weights that were trained through the solver"):
        pi.score(flow, 0.5, torch.zeros(3, 2))


def load_state(flow):
    flow.transform.load_state_dict(random_prior(2).transform.state_dict())


@pytest.mark.parametrize("before", ["log_prob", "score"])
def test_weights_that_are_converted_or_loaded_are_not_trained(before):
    flow, x = random_prior(2, frozen=False), torch.randn(20, 2)
    getattr(flow, before)(x)
    flow.to(torch.float32).to(torch.float64)
    pi.score(flow, 0.5, torch.zeros(3, 2))
    flow.log_prob(x).sum().backward()  # a gradient alone changes no weights
    pi.score(flow, 0.5, torch.zeros(3, 2))
    load_state(flow)
    pi.score(flow, 0.5, torch.zeros(3, 2))


def test_a_state_brings_along_how_its_weights_were_trained():
    flow, other = trained_by_likelihood(), random_prior(2)
    nameless = dict(flow.transform.state_dict())
    load_state(flow)
    pi.score(flow, 0.5, torch.zeros(3, 2))
    other.transform.flow.independent = False
    flow.transform.load_state_dict(other.transform.state_dict())
    with pytest.raises(ValueError, match="independent coupling"):
        pi.score(flow, 0.5, torch.zeros(3, 2))
    again = trained_by_likelihood()
    again.transform.load_state_dict(nameless)  # of which nothing is known
    with pytest.raises(ValueError, match="weights that were trained through the solver"):
        pi.score(again, 0.5, torch.zeros(3, 2))


def test_a_fit_of_the_velocity_gives_a_score_again():
    flow = trained_by_likelihood()
    pi.fit(flow, torch.randn(20, 2), steps=2, seed=0, progress=False, tolerance=1.0)
    pi.score(flow, 0.5, torch.zeros(3, 2))
