"""Pyro's inference with the flow as a prior, a likelihood and a module."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import AUTOGUIDES, gaussian_prior, random_flow, random_prior
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Importance,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer import autoguide as guides
from pyro.nn import PyroModule
from pyro.ops.stats import effective_sample_size
from pyro.optim import Adam

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    FixedGrid,
    InterpolantDistribution,
    InterpolantTransform,
    VelocityMLP,
    base_space,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    pytest.mark.filterwarnings("ignore:TransformedDistribution has not been verified"),
]


def weights(transform):
    """Return a copy of the weights, to see whether they move."""
    return [p.detach().clone() for p in transform.parameters()]


def moved(transform, before):
    """Tell whether any weight has moved."""
    after = list(transform.parameters())
    return any(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


def run_svi(model, guide, *args, steps=2, loss=None):
    """Return the losses of a few steps."""
    svi = SVI(model, guide, Adam({"lr": 0.01}), loss or Trace_ELBO())
    return torch.tensor([svi.step(*args) for _ in range(steps)])


def one_site(prior, y=2.0):
    """Return a model with one latent vector under the prior and one datum."""

    def model():
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(y))

    return model


SPACES = {"data": lambda model: model, "base": base_space}

# ------------------------------------------------------------------------------------------ plates


def test_a_context_in_a_nested_plate():
    """Each member of the plates has a draw of its own, and the density given its own context."""
    family = ConditionalInterpolantDistribution(random_flow(2, context_dim=3)).freeze()
    context = torch.randn(4, 3)

    def model():
        with pyro.plate("a", 4, dim=-1), pyro.plate("b", 5, dim=-2):
            pyro.sample("x", family.condition(context))

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    x, found = trace.nodes["x"]["value"], trace.nodes["x"]["log_prob"]
    assert x.shape == (5, 4, 2)
    assert len(x.reshape(20, 2).unique(dim=0)) == 20
    members = [family.condition(c).log_prob(x[:, i]) for i, c in enumerate(context)]
    torch.testing.assert_close(found, torch.stack(members, -1), rtol=0, atol=1e-3)


def test_subsampled_rows_of_data_and_context():
    family = ConditionalInterpolantDistribution(random_flow(2, context_dim=3)).freeze()
    data, context = torch.randn(12, 2), torch.randn(12, 3)

    def model():
        with pyro.plate("rows", 12, subsample_size=4) as i:
            pyro.sample("x", family.condition(context[i]), obs=data[i])
            return i

    trace = poutine.trace(model).get_trace()
    i = trace.nodes["_RETURN"]["value"]
    expected = 3 * sum(family.condition(context[j]).log_prob(data[j]) for j in i)
    assert torch.allclose(trace.log_prob_sum(lambda name, _: name == "x"), expected)


def test_enumeration_upstream_adds_dimensions_on_the_left():
    """A discrete site above gives the flow's context a batch dimension left of all plates."""
    family = ConditionalInterpolantDistribution(random_flow(2, context_dim=1)).freeze()
    data, p = torch.randn(4, 2), torch.tensor([0.3, 0.7])

    @config_enumerate
    def model():
        with pyro.plate("rows", 4):
            k = pyro.sample("k", dist.Categorical(p))
            context = torch.tensor([-1.0, 2.0])[k][..., None]
            pyro.sample("x", family.condition(context), obs=data)

    loss = TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)
    members = [family.condition(torch.tensor([c])).log_prob(data) for c in (-1.0, 2.0)]
    expected = torch.stack([m + w.log() for m, w in zip(members, p, strict=True)]).logsumexp(0)
    assert loss == pytest.approx(-float(expected.sum()))


# -------------------------------------------------------------------------------------- autoguides


LOSSES = {
    "trace": Trace_ELBO,
    "graph": TraceGraph_ELBO,
    "mean_field": TraceMeanField_ELBO,
    "renyi": RenyiELBO,
    "enum": TraceEnum_ELBO,
}


@pytest.mark.parametrize(
    ("name", "loss", "particles", "space"),
    [
        ("AutoNormal", "mean_field", 1, "data"),
        ("AutoDiagonalNormal", "graph", 3, "base"),
        ("AutoMultivariateNormal", "renyi", 2, "data"),
        ("AutoLowRankMultivariateNormal", "enum", 3, "base"),
        ("AutoDelta", "trace", 1, "data"),
        ("AutoLaplaceApproximation", "trace", 1, "base"),
        ("AutoIAFNormal", "trace", 3, "data"),
        ("AutoStructured", "graph", 1, "base"),
    ],
)
@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
def test_autoguides_and_losses(name, loss, particles, space):
    """A global and a plated site under a prior whose weights stay, and a learned likelihood."""
    prior, data = random_prior(2), torch.randn(4, 2)
    family = ConditionalInterpolantDistribution(random_flow(2, context_dim=2)).freeze()

    def model():
        z = pyro.sample("z", prior)
        with pyro.plate("rows", 4):
            w = pyro.sample("w", prior)
            pyro.sample("x", family.condition(z + w), obs=data)

    before = weights(prior.transform)
    model = SPACES[space](model)
    guide = AUTOGUIDES[name](model)
    options = {"num_particles": particles, "vectorize_particles": particles > 1}
    elbo = LOSSES[loss](max_plate_nesting=1, **options)
    losses = run_svi(model, guide, loss=elbo)
    assert torch.isfinite(losses).all()
    assert losses[0] != losses[1]
    assert all(v.grad is None or v.grad.isfinite().all() for v in guide.parameters())
    site = "z" if space == "data" else "z_base"
    assert guide()[site].shape == (2,)
    assert not moved(prior.transform, before)
    if name == "AutoLaplaceApproximation":
        assert torch.isfinite(guide.laplace_approximation().get_posterior().scale_tril).all()


def one_site_posterior(prior, y):
    """Return the posterior of ``one_site`` for a Gaussian prior, in closed form."""
    loc, linear = prior.transform.flow.loc, prior.transform.flow.whitening.matrix()
    ones = torch.ones(len(loc), 1)
    precision = torch.linalg.inv(linear @ linear.T)
    covariance = torch.linalg.inv(precision + ones @ ones.T)
    return covariance @ (precision @ loc + ones[:, 0] * y), covariance


# ------------------------------------------------------------------------- sampling and importance


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    """Of the prior, and of draws of a context."""
    prior = random_prior(2)
    family = ConditionalInterpolantDistribution(random_flow(2, context_dim=2)).freeze()

    def model():
        pyro.sample("z", prior)
        with pyro.plate("rows", 4):
            c = pyro.sample("c", prior)
            pyro.sample("x", family.condition(c))

    for given in ({}, {"c": torch.randn(6, 4, 2)}):
        draws = Predictive(model, given or None, num_samples=6, parallel=parallel)()
        assert draws["z"].reshape(6, 2).unique(dim=0).shape == (6, 2)
        assert draws["x"].shape == (6, 4, 2)
        assert "c" in given or draws["c"].shape == (6, 4, 2)


@pytest.mark.slow
def test_importance():
    """The posterior mean by importance sampling from the prior, against a closed form."""
    prior = gaussian_prior(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.5, 1.0]]))
    run = Importance(one_site(prior), num_samples=600).run()
    mean, _ = one_site_posterior(prior, 2.0)
    z = torch.stack([t.nodes["z"]["value"] for t in run.exec_traces])
    shares = torch.stack([torch.as_tensor(w) for w in run.log_weights]).softmax(0)
    error = (shares[:, None] * (z - mean)).square().sum(0).sqrt()
    assert ((shares @ z - mean).abs() < 4.5 * error).all()
    assert run.get_ESS() > 100


# -------------------------------------------------------------------------------------------- NUTS


def run_nuts(model, *, samples, warmup=60, **options):
    """Return the draws of one chain."""
    kernel = NUTS(model, **options)
    mcmc = MCMC(kernel, num_samples=samples, warmup_steps=warmup, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()


def check_posterior(z, mean, covariance):
    """Check the moments of draws, shape ``(N, D)``, within their own Monte Carlo error."""
    ess = effective_sample_size(z[None]).clamp(max=float(len(z)))
    assert (ess > 30).all()
    sd = covariance.diagonal().sqrt()
    assert ((z.mean(0) - mean).abs() < 4.5 * sd / ess.sqrt()).all()
    # The standard error of a variance is var sqrt(2 / ess), and that of a covariance at most that.
    allowed = 4.5 * torch.outer(sd, sd) * (2 / ess.min()).sqrt()
    assert ((torch.cov(z.T) - covariance).abs() < allowed).all()


def prior_at_a_hundred():
    return gaussian_prior(torch.tensor([100.0, 90.0]), torch.tensor([[5.0, 0.0], [2.0, 4.0]]))


@pytest.mark.slow
def test_nuts_gives_the_closed_form_posterior():
    prior = prior_at_a_hundred()
    model = base_space(one_site(prior, y=200.0))
    # A dense mass matrix: twice as many effective draws for as many steps.
    draws = run_nuts(model, samples=150, full_mass=True)
    assert list(draws) == ["z_base"]
    z = Predictive(model, draws)()["z"]
    check_posterior(z, *one_site_posterior(prior, 200.0))


@pytest.mark.slow
def test_nuts_in_both_spaces_agrees_for_a_flow_that_is_not_gaussian():
    prior = InterpolantDistribution(random_flow(1, solver=FixedGrid(steps=4))).freeze()

    def model():
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z.sum(-1), 0.7), obs=torch.tensor(0.5))

    grid = torch.linspace(-8, 8, 2001)
    with torch.no_grad():
        likelihood = dist.Normal(grid, 0.7).log_prob(torch.tensor(0.5))
        mass = (prior.log_prob(grid[:, None]) + likelihood).softmax(0)
    mean = mass @ grid
    variance = mass @ (grid - mean) ** 2
    for space, wrapped in SPACES.items():
        draws = run_nuts(wrapped(model), samples=150)
        z = draws["z"] if space == "data" else Predictive(wrapped(model), draws)()["z"]
        check_posterior(z, mean[None], variance[None, None])


# ---------------------------------------------------------------------- modules, freezing, storing


class Model(PyroModule):
    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)
        self.loc = torch.nn.Parameter(torch.zeros(()))

    def forward(self, prior):
        z = pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(z.sum(-1) + self.loc, 1.0), obs=torch.tensor(2.0))


class WithDistribution(Model):
    def forward(self):
        super().forward(self.prior)


class WithTransform(Model):
    def forward(self):
        super().forward(InterpolantDistribution(self.flow))


def normal_guide():
    loc = pyro.param("guide_loc", torch.zeros(2))
    pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))


def test_distribution_as_attribute_and_in_a_closure_is_not_trained():
    prior = random_prior(2, frozen=False)
    model = WithDistribution(prior=prior)
    before = weights(prior.transform)
    run_svi(one_site(prior), normal_guide)
    run_svi(model, normal_guide)
    assert not moved(prior.transform, before)
    assert float(model.loc.detach()) != 0.0
    assert sorted(pyro.get_param_store().keys()) == ["guide_loc", "loc"]


@pytest.mark.parametrize("frozen", [False, True])
def test_transform_as_attribute_is_trained_unless_frozen(frozen):
    prior = random_prior(2, frozen=frozen)
    model = WithTransform(flow=prior.transform)
    before = weights(prior.transform)
    run_svi(model, normal_guide)
    assert moved(prior.transform, before) is not frozen
    assert float(model.loc.detach()) != 0.0
    stored = [n for n in pyro.get_param_store().keys() if n.startswith("flow")]
    assert bool(stored) is not frozen


@pytest.mark.parametrize(("kind", "space"), [(WithDistribution, "data"), (WithTransform, "base")])
def test_frozen_through_elbo_module(kind, space):
    """``elbo(model, guide).parameters()`` hands all trainable parameters to torch's optimisers."""
    prior = random_prior(2)
    model = kind(prior=prior) if kind is WithDistribution else kind(flow=prior.transform)
    inference = SPACES[space](model)
    guide = guides.AutoNormal(inference)
    elbo = Trace_ELBO()(inference, guide)
    elbo()
    own = {id(p) for p in prior.transform.parameters()}
    trainable = [p for p in elbo.parameters() if p.requires_grad]
    assert not own & {id(p) for p in trainable}
    before = weights(prior.transform)
    optimizer = torch.optim.Adam(trainable, lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        elbo().backward()
        optimizer.step()
    assert not moved(prior.transform, before)
    assert all(p.grad is None for p in prior.transform.parameters())


@pytest.mark.skipif(
    pyro.__version__ == "1.9.1", reason="it loads none of its own files in torch 2.6 and newer"
)
def test_param_store_round_trip(tmp_path):
    d = InterpolantDistribution(random_flow(2))
    pyro.module("flow", d.transform)
    x = torch.randn(5, 2)
    expected = d.log_prob(x)
    pyro.get_param_store().save(tmp_path / "params.pt")
    assert any(n.startswith("flow$$$flow.velocity.") for n in pyro.get_param_store().keys())
    pyro.clear_param_store()
    other = InterpolantDistribution(random_flow(2))
    other.transform.flow.whitening.set(
        d.transform.flow.loc, d.transform.flow.whitening.matrix()
    )  # buffers are not stored
    assert not torch.allclose(other.log_prob(x), expected)
    pyro.get_param_store().load(tmp_path / "params.pt")
    pyro.module("flow", other.transform, update_module_params=True)
    assert torch.allclose(other.log_prob(x), expected)


# --------------------------------------------------------------------------------- training by SVI


def fresh(dim, context_dim=0):
    kind = ConditionalInterpolantTransform if context_dim else InterpolantTransform
    return kind(VelocityMLP(dim, (16, 16), context_dim), solver=FixedGrid(steps=6))


def train(model, steps=15):
    svi = SVI(model, lambda: None, Adam({"lr": 0.01}), Trace_ELBO())
    return [svi.step() for _ in range(steps)]


def test_flow_trained_as_a_likelihood():
    flow = fresh(2).to(torch.float32)
    data = (torch.randn(64, 2) * 0.7 + torch.tensor([1.5, -1.0])).float()
    distribution = InterpolantDistribution(flow)

    def model():
        pyro.module("flow", flow)
        with pyro.plate("rows", len(data)):
            pyro.sample("x", distribution, obs=data)

    before = float(distribution.log_prob(data).sum().detach())
    losses = train(model)
    assert losses[0] == pytest.approx(-before, rel=1e-5)
    assert losses[-1] < losses[0] - 0.5 * len(data)
    assert distribution.log_prob(data).dtype == torch.float32
    # What was trained is what is evaluated: no stale trajectory, and no error of a coarse grid.
    found = float(distribution.log_prob(data).sum().detach())
    assert found == pytest.approx(float(distribution.log_prob(data.clone()).sum().detach()))
    flow.solver = FixedGrid(steps=24)
    assert float(distribution.log_prob(data).sum().detach()) > before + 0.5 * len(data)
