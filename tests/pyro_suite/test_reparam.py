"""What Pyro asserts of reparametrized models, with every kind of flow as a site or as a guide."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from kinds import KINDS, over
from pyro import poutine
from pyro.distributions.transforms import Permute
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal, AutoStructured
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import (
    AutoReparam,
    DiscreteCosineReparam,
    HaarReparam,
    MinimalReparam,
    NeuTraReparam,
    SplitReparam,
    StructuredReparam,
    TransformReparam,
    UnitJacobianReparam,
)
from pyro.optim import Adam
from pyro.poutine.util import site_is_subsample
from torch.distributions import ComposeTransform

from pyro_interpolant import AutoInterpolant, FixedGrid, base_space

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

DENSITIES = [kind for kind in KINDS if kind != "samples"]
PROPER = [kind for kind in DENSITIES if "angle" not in kind]  # and of no seam
REAL = [kind for kind in PROPER if str(KINDS[kind]().support).startswith("IndependentConstraint")]
QUICK = ("plain", "positive")


def site_model(d, plates=()):
    """Return a model of one site named x, in plates of its own."""

    def model():
        with pyro.plate_stack("plates", (*plates, *d.batch_shape)):
            return pyro.sample("x", d)

    return model


HOW = {
    "TransformReparam": lambda model: poutine.reparam(model, {"x": TransformReparam()}),
    "base_space": base_space,
}


def finely(kind):
    d = KINDS[kind]()
    if isinstance(d.transform.solver, FixedGrid):
        d.transform.solver = FixedGrid(steps=32)
    return d


def moments(kind, x):
    """Return means and their errors of what two samples of one distribution share."""
    x = x.reshape(len(x), -1)
    x = (
        torch.cat((x.cos(), x.sin()), -1)
        if "angle" in kind
        else torch.cat((x.sigmoid(), x.tanh()), -1)
    )
    return x.mean(0), x.std(0) / len(x) ** 0.5


def check_moments(kind, x, y):
    (a, sa), (b, sb) = moments(kind, x), moments(kind, y)
    assert ((a - b).abs() < 5 * (sa**2 + sb**2).sqrt()).all()


# ------------------------------------------------------------------------ transforms of one site


@over("reparam_moments", QUICK, how=HOW)
@torch.no_grad()
def test_the_distribution_of_a_site_is_the_same(kind, how):
    d = KINDS[kind]()
    model = site_model(d, (2000,))
    plain = poutine.trace(model).get_trace().nodes["x"]
    other = poutine.trace(HOW[how](model)).get_trace().nodes["x"]
    assert isinstance(plain["fn"], type(d))
    assert isinstance(other["fn"].base_dist, dist.Delta)
    check_moments(kind, plain["value"], other["value"])


@over("reparam_log_prob", QUICK, DENSITIES, how=HOW)
def test_the_density_is_that_of_the_base(kind, how):
    """A site's density times its Jacobian: the same joint density in other coordinates."""
    d = finely(kind)
    model = site_model(d)
    trace = poutine.trace(HOW[how](model)).get_trace()
    assert set(trace.stochastic_nodes) == {name for name in trace.nodes if "x_base" in name}
    x = trace.nodes["x"]["value"].detach()
    with poutine.block(), poutine.condition(data={"x": x}):
        scored = poutine.trace(model).get_trace().log_prob_sum()
    base, chain = d.base_dist, ComposeTransform(d.transforms)
    w = chain.inv(x.clone())
    log_det = chain.log_abs_det_jacobian(w, x.clone()).sum()
    torch.testing.assert_close(scored + log_det, base.log_prob(w).sum(), rtol=0, atol=1e-5)
    if "angle" not in kind or how == "TransformReparam":  # an angle is a plane for samplers
        found = trace.log_prob_sum()
        torch.testing.assert_close(found, base.log_prob(w).sum(), rtol=0, atol=1e-4)


@over("reparam_init", QUICK, DENSITIES, how=HOW)
def test_an_initial_value_is_kept(kind, how):
    model = site_model(finely(kind))
    with poutine.block(), torch.no_grad():
        value = model()
    with InitMessenger(init_to_value(values={"x": value})):
        assert torch.equal(model(), value)
        torch.testing.assert_close(HOW[how](model)(), value, rtol=1e-4, atol=1e-4)


@over("reparam_predictive", QUICK, how=HOW)
@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_gives_the_site_back(kind, how, parallel):
    d = KINDS[kind]()
    model = HOW[how](site_model(d))
    draws = Predictive(model, num_samples=4, parallel=parallel, return_sites=("x",))()
    assert draws["x"].shape == (4, *d.shape())
    assert len(draws["x"].reshape(4, -1).unique(dim=0)) == 4


@over("reparam_mask", ("plain",), DENSITIES, how=HOW)
def test_masks_and_plates(kind, how):
    """A masked site in a plate, observed data below it, a guide and a step of either ELBO."""
    d = KINDS[kind]().freeze()

    def model():
        with pyro.plate_stack("plates", (2, *d.batch_shape)), poutine.mask(mask=mask):
            x = pyro.sample("x", d)
            y = x.reshape(*x.shape[: x.dim() - d.event_dim], -1)[..., 0]
            pyro.sample("y", dist.Normal(y, 1.0), obs=torch.zeros(y.shape))

    other = HOW[how](model)
    for mask in (True, False, torch.tensor([False, True]).reshape(2, *[1] * len(d.batch_shape))):
        trace = poutine.trace(other).get_trace()
        trace.compute_log_prob()
        kept = torch.as_tensor(mask).expand(2, *d.batch_shape)
        for name in ("y", *trace.stochastic_nodes):
            if not site_is_subsample(trace.nodes[name]):
                assert torch.equal(trace.nodes[name]["log_prob"] != 0, kept)
    for elbo in (Trace_ELBO, TraceMeanField_ELBO):
        pyro.clear_param_store()
        loss = SVI(other, AutoNormal(other), Adam({"lr": 1e-3}), elbo()).step()
        assert torch.isfinite(torch.tensor(loss))


# --------------------------------------------------------------- coordinates of one site's vector


@over("split", QUICK, PROPER)
def test_split(kind):
    """The parts of a site, sampled apart, have its density, and its gradients."""
    d = KINDS[kind]()
    sizes = [1, d.event_shape[-1] - 1] if d.event_shape[-1] > 1 else [1]
    model = site_model(d)
    with torch.no_grad():
        value = model()
    parts = {f"x_split_{i}": part for i, part in enumerate(value.split(sizes, -1))}
    split = poutine.reparam(model, {"x": SplitReparam(sizes, -1)})
    trace = poutine.trace(poutine.condition(split, parts)).get_trace()
    plain = poutine.trace(poutine.condition(model, {"x": value.clone()})).get_trace()
    assert set(parts) <= set(trace.nodes)
    assert isinstance(trace.nodes["x"]["fn"], dist.Delta)
    assert trace.nodes["x"]["fn"].shape() == d.shape()
    torch.testing.assert_close(trace.nodes["x"]["value"], value)
    torch.testing.assert_close(trace.log_prob_sum(), plain.log_prob_sum())
    weights = [p for p in d.transform.flow.parameters()]
    found, expected = (
        torch.autograd.grad(t.log_prob_sum(), weights, allow_unused=True) for t in (trace, plain)
    )
    for a, b in zip(found, expected, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@over("split_guide", QUICK, PROPER)
def test_a_guide_of_a_split_site(kind):
    d = KINDS[kind]()
    sizes = [1, d.event_shape[-1] - 1] if d.event_shape[-1] > 1 else [1]
    split = poutine.reparam(site_model(d), {"x": SplitReparam(sizes, -1)})
    guide = AutoMultivariateNormal(split)
    found = {name: tuple(value.shape) for name, value in guide().items()}
    lead = d.shape()[:-1]
    assert found == {f"x_split_{i}": (*lead, size) for i, size in enumerate(sizes)}


UNIT = {
    "permute": lambda: UnitJacobianReparam(Permute(torch.tensor([1, 0]))),
    "haar": lambda: HaarReparam(),
    "cosine": lambda: DiscreteCosineReparam(),
}
PAIRS = [kind for kind in PROPER if KINDS[kind]().event_shape == (2,)]


@over("unit_jacobian", QUICK, PAIRS, how=UNIT)
def test_unit_jacobian(kind, how):
    d = finely(kind)
    model = site_model(d, (2000,))
    reparam = UNIT[how]()
    other = poutine.reparam(model, {"x": reparam})
    with torch.no_grad():
        plain = poutine.trace(model).get_trace()
        trace = poutine.trace(other).get_trace()
        (name,) = trace.stochastic_nodes[-1:]
        assert isinstance(trace.nodes["x"]["fn"], dist.Delta)
        check_moments(kind, plain.nodes["x"]["value"], trace.nodes["x"]["value"])
        small = poutine.reparam(site_model(d), {"x": UNIT[how]()})
        value = site_model(d)()
        with InitMessenger(init_to_value(values={"x": value})):
            torch.testing.assert_close(small(), value, rtol=1e-4, atol=1e-4)
    trace = poutine.trace(small).get_trace()
    trace.compute_log_prob()
    assert trace.nodes[name]["log_prob"].shape == d.batch_shape


# ------------------------------------------------------------------------------------- strategies


def sites(model):
    trace = poutine.trace(model).get_trace()
    return [
        (name, site["is_observed"])
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site_is_subsample(site)
    ]


@over("strategies", QUICK)
def test_strategies(kind):
    d = KINDS[kind]()
    model = site_model(d)
    assert sites(MinimalReparam()(model)) == [("x", False)]
    found = sites(AutoReparam()(model))
    assert found[-1] == ("x", True)
    assert all(name.startswith("x_base") for name, _ in found[:-1])
    if d.base is None:  # a normal base, which it learns to centre
        assert found == [("x_base_decentered", False), ("x_base", True), ("x", True)]


# ----------------------------------------------------------------------------- all sites together


def funnel(dim=3):
    y = pyro.sample("y", dist.Normal(0, 3))
    with pyro.plate("D", dim):
        pyro.sample("x", dist.Normal(0, torch.exp(y / 2)))


def categorical(data=None):
    p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("N", 10):
        pyro.sample("obs", dist.Categorical(p), obs=torch.ones(10))


def with_site(kind):
    d = KINDS[kind]().freeze()

    def model():
        with pyro.plate_stack("plates", d.batch_shape):
            x = pyro.sample("x", d)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x.sum(), scale), obs=torch.tensor(0.5))

    return model


def neutra_of(model):
    guide = AutoInterpolant(model, hidden_dims=(8, 8), solver=FixedGrid(steps=3), init_scale=0.3)
    guide()
    with torch.no_grad():
        guide.transform.velocity.output.weight.normal_(std=0.3)
    guide.requires_grad_(requires_grad=False).eval()
    return guide, NeuTraReparam(guide)


def check_neutra(model):
    """The potential with the guide is the model's, less the guide's log-determinant."""
    guide, neutra = neutra_of(model)
    _, plain, transforms, _ = initialize_model(model)
    start, potential, _, _ = initialize_model(neutra.reparam(model))
    (z,) = start.values()
    values = neutra.transform_sample(z)
    chain = ComposeTransform(guide.get_posterior().transforms)
    latent = chain(z)
    expected = plain({k: transforms[k](v) for k, v in values.items()})
    expected = expected - chain.log_abs_det_jacobian(z, latent)
    torch.testing.assert_close(potential(start), expected)


@pytest.mark.parametrize("model", [funnel, categorical], ids=["funnel", "categorical"])
def test_neutra_keeps_the_joint_density(model):
    check_neutra(model)


@over("neutra", (), PROPER)
def test_neutra_over_a_learned_prior(kind):
    check_neutra(with_site(kind))


@pytest.mark.slow
@pytest.mark.parametrize("jit", [False, True])
def test_neutra_of_a_funnel(jit):
    guide, neutra = neutra_of(funnel)
    kernel = NUTS(
        neutra.reparam(funnel), max_tree_depth=3, jit_compile=jit, ignore_jit_warnings=True
    )
    mcmc = MCMC(kernel, num_samples=15, warmup_steps=15, disable_progbar=True)
    mcmc.run()
    draws = neutra.transform_sample(mcmc.get_samples()["y_shared_latent"].unsqueeze(-2))
    assert draws["x"].shape == (15, 3)
    assert draws["y"].shape == (15, 1)


def test_neutra_says_that_it_cannot_start_where_it_is_told():
    guide, neutra = neutra_of(funnel)
    other = neutra.reparam(funnel)
    with torch.no_grad():
        values = guide()
    with InitMessenger(init_to_value(values=values)), pytest.warns(match="does not commute"):
        trace = poutine.trace(other).get_trace()
    for name, value in values.items():
        assert trace.nodes[name]["value"].shape == value.shape


@over("structured", ("positive",), PROPER)
def test_structured(kind):
    model = with_site(kind)
    guide = AutoStructured(
        model,
        conditionals={"x": "mvn", "scale": "normal"},
        dependencies={"scale": {"x": "linear"}},
    )
    SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO()).step()
    reparam = StructuredReparam(guide.eval())
    other = reparam.reparam(model)
    start, potential, *_ = initialize_model(other)
    energy = potential({k: v.clone().requires_grad_() for k, v in start.items()})
    assert torch.isfinite(energy)
    draws = reparam.transform_samples({k: v[None] for k, v in start.items()})
    assert set(draws) == {"x", "scale"}
