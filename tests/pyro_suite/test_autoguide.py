"""What Pyro asserts of its autoguides, of the flow as a guide."""

import functools
import io

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer import autoguide as guides
from pyro.optim import ClippedAdam
from torch.distributions import transform_to

from pyro_interpolant import AutoInterpolant, FixedGrid

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

small = functools.partial(AutoInterpolant, hidden_dims=(8, 8), solver=FixedGrid(steps=3))

ELBOS = {
    "trace": Trace_ELBO,
    "graph": TraceGraph_ELBO,
    "mean_field": TraceMeanField_ELBO,
    "enum": functools.partial(TraceEnum_ELBO, strict_enumeration_warning=False),
}


def normal(*shape, loc=0.0):
    return dist.Normal(torch.full(shape, loc), 1.0).to_event(len(shape))


# ------------------------------------------------------------------------------ the guide's trace


def test_scores():
    """The density is the latent vector's; the sites themselves score zero."""

    def model():
        pyro.sample("z", normal(10))

    trace = poutine.trace(small(model)).get_trace()
    replayed = poutine.trace(poutine.replay(model, trace)).get_trace()
    trace.compute_log_prob()
    replayed.compute_log_prob()
    latent = "_AutoInterpolant_latent"
    assert latent not in replayed.nodes
    assert trace.nodes[latent]["log_prob_sum"] != 0.0
    assert trace.nodes[latent]["infer"]["is_auxiliary"]
    assert trace.nodes["z"]["log_prob_sum"] == 0.0
    assert replayed.nodes["z"]["log_prob_sum"] != 0.0


@pytest.mark.parametrize("elbo", ["graph", "enum"])
def test_factor(elbo):
    def model(log_factor):
        pyro.sample("z1", dist.Normal(0.0, 1.0))
        pyro.factor("f1", log_factor)
        pyro.sample("z2", normal(2))
        with pyro.plate("plate", 3):
            pyro.factor("f2", log_factor)
            pyro.sample("z3", dist.Normal(torch.zeros(3), 1.0))

    guide, loss = small(model), ELBOS[elbo]()
    loss.loss(model, guide, torch.tensor(0.0))  # some guess the plate nesting by an extra run
    losses = []
    for factor in (5.0, 4.0):
        pyro.set_rng_seed(123)
        losses.append(loss.loss(model, guide, torch.tensor(factor)))
    assert losses[0] - losses[1] == pytest.approx(-1 - 3)


def many_supports():
    pyro.sample("z1", dist.LogNormal(0.0, 1.0))
    pyro.sample("z2", normal(2))
    with pyro.plate("plate", 3):
        z3 = pyro.sample("z3", dist.Beta(torch.full((3,), 2.0), 3.0))
        pyro.sample("y", dist.Normal(z3, 1.0), obs=torch.ones(3))
    pyro.sample("z5", dist.Dirichlet(torch.ones(3)))
    pyro.sample("z6", dist.LogNormal(0.0, 1.0).expand((2,)).to_event(1))


def test_every_elbo_is_the_same_for_the_same_draws():
    """That with divergences too, where none has a closed form: Jacobians are in both."""
    guide, losses = small(many_supports), []
    guide()
    for elbo in ELBOS.values():
        pyro.set_rng_seed(0)
        loss = elbo(max_plate_nesting=1, num_particles=4, vectorize_particles=True)
        losses.append(loss.loss(many_supports, guide))
    assert losses == pytest.approx([losses[0]] * len(losses))


def many_sites():
    pyro.sample("z1", dist.Normal(0.0, 1.0))
    pyro.sample("z2", normal(2))
    with pyro.plate("plate", 3):
        pyro.sample("z3", dist.Normal(torch.zeros(3), 1.0))
    pyro.sample("z4", dist.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    pyro.sample("z5", dist.Dirichlet(torch.ones(3)))
    pyro.sample("z6", dist.Normal(0.0, 1.0).expand((2,)).mask(torch.arange(2) > 0).to_event(1))
    pyro.sample("z7", dist.LKJCholesky(2, torch.tensor(1.0)))


@pytest.mark.parametrize(
    ("elbo", "init"),
    [
        ("trace", guides.init_to_feasible),
        ("graph", guides.init_to_mean),
        ("mean_field", guides.init_to_median),
        ("enum", guides.init_to_sample),
        ("trace", guides.init_to_uniform),
    ],
    ids=["feasible", "mean", "median", "sample", "uniform"],
)
def test_shapes(elbo, init):
    guide = small(many_sites, init_loc_fn=init)
    loss = ELBOS[elbo](num_particles=3, vectorize_particles=True)
    assert torch.isfinite(torch.tensor(loss.loss(many_sites, guide)))
    shapes = {name: tuple(value.shape) for name, value in guide().items()}
    trace = poutine.trace(many_sites).get_trace()
    assert shapes == {name: tuple(trace.nodes[name]["value"].shape) for name in shapes}
    assert set(shapes) == {f"z{i}" for i in range(1, 8)}


@pytest.mark.parametrize("sample_shape", [(), (5, 4)])
def test_replay_in_plates_of_particles(sample_shape):
    def model():
        a = pyro.sample("a", dist.Normal(0, 1))
        b = pyro.sample("b", dist.Normal(a[..., None], torch.ones(3)).to_event(1))
        c = pyro.sample("c", dist.MultivariateNormal(a[..., None] + torch.zeros(3), torch.eye(3)))
        with pyro.plate("i", 2):
            d = pyro.sample("d", dist.Dirichlet((b + c).exp()))
            pyro.sample("e", dist.Categorical(logits=d), obs=torch.tensor([0, 0]))
        return a, b, d

    guide = small(model)
    with pyro.plate_stack("particles", sample_shape, rightmost_dim=-2):
        trace = poutine.trace(guide).get_trace()
        a, b, d = poutine.replay(model, trace)()
    ones = (1,) if sample_shape else ()
    assert a.shape == sample_shape + ones
    assert b.shape == (*sample_shape, *ones, 3)
    assert d.shape == (*sample_shape, 2, 3)


# ------------------------------------------------------------------ starts, medians, quantiles


def three_supports():
    pyro.sample("y", dist.LogNormal(0.0, 1.0))
    pyro.sample("z", dist.Beta(2.0, 2.0).expand([2]).to_event(1))
    pyro.sample("x", dist.Normal(0.0, 1.0))


def test_medians_and_quantiles_before_training():
    """It starts as a normal in unconstrained coordinates, at the values and of the scale given."""
    starts = {"y": torch.tensor(0.4), "z": torch.tensor([0.2, 0.7]), "x": torch.tensor(-1.5)}
    guide = AutoInterpolant(
        three_supports, init_loc_fn=lambda site: starts[site["name"]], init_scale=0.3
    )
    guide()
    levels = torch.tensor([0.1, 0.5, 0.9])
    median, quantiles = guide.median(), guide.quantiles(levels)
    nodes = poutine.trace(three_supports).get_trace().nodes
    for name, start in starts.items():
        mapping = transform_to(nodes[name]["fn"].support)
        real = mapping.inv(start) + 0.3 * dist.Normal(0.0, 1.0).icdf(levels).reshape(
            3, *[1] * start.dim()
        )
        torch.testing.assert_close(quantiles[name], mapping(real), rtol=0.01, atol=0.01)
        torch.testing.assert_close(median[name], start, rtol=0.01, atol=0.01)
        # Between two draws the median lies halfway in front of the support's map, not behind it.
        torch.testing.assert_close(median[name], quantiles[name][1], rtol=1e-5, atol=0)
        assert not median[name].requires_grad
        assert not quantiles[name].requires_grad


# ---------------------------------------------------------------------- serialization, prediction


def serialized():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("plate", 2):
        pyro.sample("y", dist.LogNormal(0.0, 1.0))
        pyro.sample("z", dist.Beta(2.0, 2.0))


def through_torch(guide, file):
    torch.save(guide, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def compiled(guide, file):
    torch.jit.save(torch.jit.trace_module(guide, {"call": ()}, check_trace=False), file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("load", [through_torch, compiled])
@torch.no_grad()  # with gradients a guide draws its nodes at random
def test_serialization(load):
    """What is loaded has the guide's draws and weights, in the order of names."""
    guide = small(serialized)
    names = sorted(guide())
    pyro.set_rng_seed(0)
    expected = guide.call()
    weights = {name: p.detach().clone() for name, p in guide.named_parameters()}
    loaded = load(guide, io.BytesIO())
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    found = loaded.call()
    assert len(found) == len(expected) == len(names)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert {name for name, _ in loaded.named_parameters()} == set(weights)
    for name, p in loaded.named_parameters():
        assert torch.equal(p, weights[name])


# ------------------------------------------------------------------------------------- exactness


def tree(data):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(data)):
        y = pyro.sample("y", dist.Normal(x, 1.0))
        pyro.sample("obs", dist.Normal(y, 1.0), obs=data)


def posterior(prior_precision, noise_rows, data):
    """Return mean, covariance and log-evidence of data that are latents plus unit noise."""
    precision = prior_precision + noise_rows.T @ noise_rows
    covariance = torch.linalg.inv(precision)
    marginal = torch.eye(len(data)) + noise_rows @ torch.linalg.inv(prior_precision) @ noise_rows.T
    evidence = dist.MultivariateNormal(torch.zeros(len(data)), marginal).log_prob(data)
    return covariance @ noise_rows.T @ data, covariance, evidence


@pytest.mark.slow
def test_exact_where_the_posterior_is_gaussian():
    data = torch.randn(2)
    precision = torch.tensor([[3.0, -1, -1], [-1, 1, 0], [-1, 0, 1]]).double()
    rows = torch.tensor([[0.0, 1, 0], [0, 0, 1]]).double()  # by which latents reach the data
    mean, covariance, evidence = posterior(precision, rows, data)
    guide = AutoInterpolant(tree, hidden_dims=(16, 16), init_scale=0.5, solver=FixedGrid(12))
    guide(data)
    steps = 140
    optimizer = ClippedAdam({"lr": 0.01, "lrd": 0.03 ** (1 / steps)})
    loss = Trace_ELBO(num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(tree, guide, optimizer, loss)
    for _ in range(steps):
        svi.step(data)
    guide.requires_grad_(requires_grad=False).eval()
    with torch.no_grad():
        z = guide.get_posterior().sample((20_000,))
        sd = covariance.diagonal().sqrt()
        torch.testing.assert_close(z.mean(0), mean, rtol=0, atol=0.07)
        torch.testing.assert_close(z.std(0), sd, rtol=0.07, atol=0)
        elbo = Trace_ELBO(num_particles=2000, vectorize_particles=True, max_plate_nesting=1)
        assert -elbo.loss(tree, guide, data) == pytest.approx(float(evidence), abs=0.03)
