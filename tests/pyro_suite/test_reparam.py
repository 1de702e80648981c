"""What Pyro asserts of reparametrized models, with every kind of flow as a site or as a guide.

Where a site in base space starts differs by design, and has a test here that says how.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from kinds import KINDS, plain
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer import autoguide as guides
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import (
    AutoReparam,
    MinimalReparam,
    NeuTraReparam,
    SplitReparam,
    TransformReparam,
)
from pyro.infer.reparam import split as split_module
from pyro.optim import Adam
from pyro.poutine.util import prune_subsample_sites
from torch.distributions import ComposeTransform

from pyro_interpolant import AutoInterpolant, FixedGrid, base_space, neutra

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")


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
    """Return a kind of flow whose two directions agree."""
    d = KINDS[kind]()
    if isinstance(d.transform.solver, FixedGrid):
        d.transform.solver = FixedGrid(steps=24)
    return d


def trace_of(model):
    """Return the trace of one execution without the plates, with its log-probabilities."""
    trace = prune_subsample_sites(poutine.trace(model).get_trace())
    trace.compute_log_prob()
    return trace


def check_moments(kind, x, y):
    """Check that draws, shape ``(N, *)`` each, may be of one distribution."""
    means, errors = [], []
    for value in (x, y):
        value = value.reshape(len(value), -1)
        functions = (torch.cos, torch.sin) if "angle" in kind else (torch.sigmoid, torch.tanh)
        bounded = torch.cat([f(value) for f in functions], -1)
        means.append(bounded.mean(0))
        errors.append(bounded.std(0) / len(value) ** 0.5)
    gap, error = (means[0] - means[1]).abs(), (errors[0] ** 2 + errors[1] ** 2).sqrt()
    assert (gap <= 5 * error + 1e-12).all()  # no error where an element is always the same


# -------------------------------------------------------------------- a site and its base


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, "base_space") for kind in ("positive", "flow base", "given rows", "angles")),
        *((kind, "base_space") for kind in ("joint", "halfway, laplace", "samples", "adaptive")),
        *((kind, "TransformReparam") for kind in ("plain", "corr_cholesky", "laplace")),
        *((kind, "TransformReparam") for kind in ("angles given", "tempered", "expanded")),
    ],
)
def test_a_site_and_its_base(kind, how):
    """The draws are the same; a site's density times its Jacobian is that of the base."""
    d = finely(kind)
    model = site_model(d, (400, 2))
    with torch.no_grad():
        site = poutine.trace(model).get_trace().nodes["x"]
        trace = prune_subsample_sites(poutine.trace(HOW[how](model)).get_trace())
    other = trace.nodes["x"]
    assert isinstance(site["fn"], type(d))
    assert isinstance(other["fn"].base_dist, dist.Delta)
    assert other["value"].shape == site["value"].shape == (400, 2, *d.shape())
    assert other["fn"].shape() == site["fn"].shape()
    assert [f.name for f in other["cond_indep_stack"]] == [
        f.name for f in site["cond_indep_stack"]
    ]
    check_moments(kind, site["value"].flatten(0, 1), other["value"].flatten(0, 1))
    base = "x_base_base" if (kind, how) == ("flow base", "base_space") else "x_base"
    assert trace.stochastic_nodes == [base]  # of a flow, base_space samples its base in turn
    check_predictive(kind, d, HOW[how](site_model(d)), base)
    if kind != "samples":
        check_joint_density(kind, how, d, base)
        check_start(how, d)


def check_joint_density(kind, how, d, base):
    model = site_model(d, (2,))
    trace = trace_of(HOW[how](model))
    assert trace.nodes[base]["log_prob"].shape == (2, *d.batch_shape)
    x = trace.nodes["x"]["value"].detach()
    scored = trace_of(poutine.condition(model, {"x": x})).log_prob_sum()
    chain = ComposeTransform(d.transforms)
    w = chain.inv(x.clone())
    expected = d.base_dist.log_prob(w).sum()
    log_det = chain.log_abs_det_jacobian(w, x.clone()).sum()
    torch.testing.assert_close(scored + log_det, expected, rtol=0, atol=1e-5)
    if base == "x_base_base":
        inner = ComposeTransform(d.base.transforms)
        u = trace.nodes[base]["value"]
        expected = expected + inner.log_abs_det_jacobian(u, inner(u)).sum()
    if "angle" not in kind or how == "TransformReparam":  # an angle is a plane for samplers
        torch.testing.assert_close(trace.log_prob_sum(), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def check_start(how, d):
    """A value to start from is kept, in a nest of plates, by an own function of names too."""
    model = site_model(d, (2,))
    value = model()
    for init in (init_to_value(values={"x": value}), lambda site: {"x": value}[site["name"]]):
        with InitMessenger(init):
            assert model() is value
            torch.testing.assert_close(HOW[how](model)(), value, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def check_predictive(kind, d, model, base):
    draws = Predictive(model, num_samples=3, parallel=True)()
    assert draws["x"].shape == (3, *d.shape())
    assert len(draws["x"].reshape(3, -1).unique(dim=0)) == 3 or kind == "samples"
    again = Predictive(model, {base: draws[base]}, return_sites=("x",))()
    near = {"rtol": 1e-4, "atol": 1e-4} if kind == "adaptive" else {}  # steps for all draws
    torch.testing.assert_close(again["x"], draws["x"], **near)


@pytest.mark.parametrize("how", HOW)
def test_a_subsampled_plate(how):
    """A mean-field guide of all rows: rows in sight, and no others, move in a step."""
    d, y = plain().freeze(), torch.randn(6)

    def model():
        with pyro.plate("rows", 6, subsample_size=2) as i:
            x = pyro.sample("x", d)
            pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y[i])

    other = HOW[how](model)
    trace = trace_of(other)
    rows = dist.Normal(0.0, 1.0).log_prob(trace.nodes["x_base"]["value"]).sum(-1)
    torch.testing.assert_close(trace.nodes["x_base"]["log_prob"], 3 * rows)  # 2 of 6
    guide = guides.AutoNormal(other, create_plates=lambda: plate)
    plate = pyro.plate("rows", 6, subsample=torch.tensor([1, 4]))
    guide()
    before = guide.locs.x_base.detach().clone()
    SVI(other, guide, Adam({"lr": 0.1}), Trace_ELBO()).step()
    moved = (guide.locs.x_base.detach() != before).all(-1)
    assert moved.tolist() == [i in (1, 4) for i in range(6)]


# --------------------------------------------------------------- coordinates of one site's vector


@pytest.mark.skipif(
    not hasattr(split_module, "real_support"), reason="Pyro splits supports from 1.9.2 on"
)
@pytest.mark.parametrize("kind", ["simplex", "gaussianized", "laplace", "given rows", "joint"])
@pytest.mark.usefixtures("_nodes_stay")
def test_split(kind):
    """The parts of a site, sampled apart, have its density, and its gradients."""
    d = KINDS[kind]()
    model, sizes = site_model(d), [1, d.event_shape[-1] - 1]
    with torch.no_grad():
        value = model()
    parts = {f"x_split_{i}": part for i, part in enumerate(value.split(sizes, -1))}
    split = poutine.reparam(model, {"x": SplitReparam(sizes, -1, split_module.real_support)})
    trace = trace_of(poutine.condition(split, parts))
    whole = trace_of(poutine.condition(model, {"x": value.clone()}))
    assert {*parts, "x"} == set(trace.observation_nodes)
    assert isinstance(trace.nodes["x"]["fn"], dist.Delta)
    assert trace.nodes["x"]["fn"].shape() == d.shape()
    torch.testing.assert_close(trace.nodes["x"]["value"], value)
    torch.testing.assert_close(trace.log_prob_sum(), whole.log_prob_sum())
    weights = list(d.transform.flow.velocity.parameters())
    found, expected = (
        torch.autograd.grad(t.log_prob_sum(), weights, allow_unused=True) for t in (trace, whole)
    )
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------- strategies


@pytest.mark.parametrize("kind", ["positive", "flow base", "angles"])
def test_strategies(kind):
    d = KINDS[kind]()
    model = site_model(d)
    assert trace_of(MinimalReparam()(model)).stochastic_nodes == ["x"]
    trace = trace_of(AutoReparam()(model))
    assert trace.nodes["x"]["is_observed"]
    assert all(name.startswith("x_base") for name in trace.stochastic_nodes)
    if d.base is None and kind != "angles":  # a normal base, which it learns to centre
        assert trace.stochastic_nodes == ["x_base_decentered"]


# ----------------------------------------------------------------------------- all sites together


def with_site(kind):
    d = KINDS[kind]().freeze()

    def model():
        with pyro.plate_stack("plates", d.batch_shape):
            x = pyro.sample("x", d)
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x.sum(), scale), obs=torch.tensor(0.5))

    return model


TOGETHER = {
    "NeuTraReparam": lambda guide, model: NeuTraReparam(guide).reparam(model),
    "neutra": lambda guide, model: neutra(guide),
}


@pytest.mark.parametrize(
    ("kind", "how"), [("simplex", "NeuTraReparam"), ("expanded, positive", "neutra")]
)
def test_neutra_keeps_the_joint_density(kind, how):
    """The potential with the guide is the model's, less the guide's log-determinant."""
    model = with_site(kind)
    guide = AutoInterpolant(model, hidden_dims=(8, 8), solver=FixedGrid(steps=3), init_scale=0.3)
    guide()
    with torch.no_grad():
        guide.transform.velocity.output.weight.normal_(std=0.3)
    guide.requires_grad_(requires_grad=False).eval()
    _, potential_of_sites, *_ = initialize_model(model)
    start, potential, *_ = initialize_model(TOGETHER[how](guide, model))
    (w,) = start.values()
    z = guide.transform(w)
    real = {site["name"]: value for site, value in guide._unpack_latent(z)}
    expected = potential_of_sites(real) - guide.transform.log_abs_det_jacobian(w, z)
    torch.testing.assert_close(potential(start), expected)
