"""What Pyro asserts of reparametrized models, with every kind of flow as a site or as a guide.

What does not hold, and why, is in the lists of exceptions of ``kinds``; how a site in base space
starts differs by design, and has a test here that says how.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import BASES, slow_but
from kinds import KINDS, over, plain
from pyro import poutine
from pyro.distributions.transforms import Permute
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer import autoguide as guides
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import (
    AutoReparam,
    DiscreteCosineReparam,
    HaarReparam,
    LocScaleReparam,
    MinimalReparam,
    NeuTraReparam,
    SplitReparam,
    StructuredReparam,
    TransformReparam,
    UnitJacobianReparam,
)
from pyro.infer.reparam import split as split_module
from pyro.optim import Adam
from pyro.poutine.util import prune_subsample_sites, site_is_subsample
from torch.distributions import ComposeTransform

from pyro_interpolant import AutoInterpolant, FixedGrid, base_space, neutra

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

DENSITIES = [kind for kind in KINDS if kind != "samples"]
PROPER = [kind for kind in DENSITIES if "angle" not in kind]  # with a bijection from real vectors
QUICK = ("positive",)


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


@over("reparam_moments", QUICK, how=HOW)
@torch.no_grad()
def test_the_distribution_of_a_site_is_the_same(kind, how):
    d = KINDS[kind]()
    model = site_model(d, (400, 2))
    site, other = (poutine.trace(m).get_trace().nodes["x"] for m in (model, HOW[how](model)))
    assert isinstance(site["fn"], type(d))
    assert isinstance(other["fn"].base_dist, dist.Delta)
    assert other["value"].shape == site["value"].shape == (400, 2, *d.shape())
    assert other["fn"].shape() == site["fn"].shape()
    assert [f.name for f in other["cond_indep_stack"]] == [
        f.name for f in site["cond_indep_stack"]
    ]
    check_moments(kind, site["value"].flatten(0, 1), other["value"].flatten(0, 1))


@over("reparam_log_prob", QUICK, DENSITIES, how=HOW)
def test_the_density_is_that_of_the_base(kind, how):
    """A site's density times its Jacobian: the same joint density in other coordinates."""
    d = finely(kind)
    model = site_model(d, (2,))
    trace = trace_of(HOW[how](model))
    base = "x_base_base" if (kind, how) == ("flow base", "base_space") else "x_base"
    assert trace.stochastic_nodes == [base]  # of a flow, base_space samples its base in turn
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


@over("reparam_init", QUICK, DENSITIES, how=HOW)
@torch.no_grad()
def test_a_value_to_start_from_is_kept(kind, how):
    """As Pyro's ``check_init_reparam``, in a nest of plates, by an own function of names too."""
    model = site_model(finely(kind), (2,))
    value = model()
    for init in (init_to_value(values={"x": value}), lambda site: {"x": value}[site["name"]]):
        with InitMessenger(init):
            assert model() is value
            torch.testing.assert_close(HOW[how](model)(), value, rtol=1e-4, atol=1e-4)


STARTS = {
    "feasible": guides.init_to_feasible,
    "median": guides.init_to_median(num_samples=5),
    "mean": guides.init_to_mean,
    "uniform": guides.init_to_uniform,
    "sample": guides.init_to_sample,
}


@pytest.mark.parametrize("name", slow_but(STARTS, "median", "sample"))
@over("reparam_start", QUICK, ("plain", "positive", "simplex", "laplace", "given rows"))
@torch.no_grad()
def test_where_a_site_starts(kind, name):
    """Pyro's reparam proposes in data space and inverts; base_space proposes in base space.

    There zero is the centre of the prior; in data space it may be 20 standard deviations off.
    """
    d = finely(kind)
    model = site_model(d, (2,))
    base = d.base_dist.expand((2, *d.batch_shape))
    starts = {}
    for how, run in {
        "site": model,
        "TransformReparam": HOW["TransformReparam"](model),
        "base": lambda: pyro.sample("x_base", base),
        "base_space": base_space(model),
    }.items():
        pyro.set_rng_seed(0)
        with InitMessenger(STARTS[name]):
            starts[how] = trace_of(run)
    site = starts["site"].nodes["x"]["value"]
    torch.testing.assert_close(
        starts["TransformReparam"].nodes["x"]["value"], site, rtol=1e-4, atol=1e-4
    )
    found = starts["base_space"].nodes["x_base"]["value"]
    torch.testing.assert_close(found, starts["base"].nodes["x_base"]["value"])


@over("reparam_predictive", QUICK, how=HOW)
@torch.no_grad()
def test_predictive_gives_the_site_back(kind, how):
    d = KINDS[kind]()
    model = HOW[how](site_model(d))
    draws = Predictive(model, num_samples=3, parallel=True)()
    assert draws["x"].shape == (3, *d.shape())
    assert len(draws["x"].reshape(3, -1).unique(dim=0)) == 3 or kind == "samples"
    base = max(draws, key=len)
    assert "x_base" in base
    again = Predictive(model, {base: draws[base]}, return_sites=("x",))()
    assert again["x"].shape == draws["x"].shape
    same = {"rtol": 1e-4, "atol": 1e-4} if kind == "adaptive" else {}  # steps for all draws
    torch.testing.assert_close(again["x"], draws["x"], **same)


@over("reparam_mask", QUICK, DENSITIES, how=HOW)
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
        trace = trace_of(other)
        kept = torch.as_tensor(mask).expand(2, *d.batch_shape)
        for name in ("y", *trace.stochastic_nodes):
            assert torch.equal(trace.nodes[name]["log_prob"] != 0, kept)
    guide = guides.AutoNormal(other)
    for elbo in (Trace_ELBO, TraceMeanField_ELBO):
        loss = SVI(other, guide, Adam({"lr": 1e-3}), elbo()).step()
        assert torch.isfinite(torch.tensor(loss))


@pytest.mark.parametrize("how", HOW)
def test_a_subsampled_plate(how):
    """A mean-field guide of all rows: rows in sight, and no others, move in a step."""
    d, y = plain().freeze(), torch.randn(6)

    def model():
        with pyro.plate("rows", 6, subsample_size=2) as i:
            x = pyro.sample("x", d)
            pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=y[i])
            return i

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


@pytest.mark.usefixtures("_nodes_stay")
def test_an_observed_site():
    """base_space leaves it alone; Pyro's reparam, for latent sites, scores its base alone."""
    d, value = plain(), torch.randn(2)
    model = poutine.condition(site_model(d), {"x": value})
    trace = trace_of(base_space(model))
    assert trace.nodes["x"]["value"] is value
    torch.testing.assert_close(trace.log_prob_sum(), d.log_prob(value))
    scored = trace_of(HOW["TransformReparam"](model)).log_prob_sum()
    w = d.transform.inv(value)
    log_det = d.transform.log_abs_det_jacobian(w, value)
    torch.testing.assert_close(scored - log_det, d.log_prob(value))


# --------------------------------------------------------------- coordinates of one site's vector


def sizes_of(d):
    return [1, d.event_shape[-1] - 1] if d.event_shape[-1] > 1 else [1]


knows_supports = pytest.mark.skipif(
    not hasattr(split_module, "real_support"), reason="Pyro splits supports from 1.9.2 on"
)


@knows_supports
@over("split", QUICK, PROPER)
@pytest.mark.usefixtures("_nodes_stay")
def test_split(kind):
    """The parts of a site, sampled apart, have its density, and its gradients."""
    d = KINDS[kind]()
    model, sizes = site_model(d), sizes_of(d)
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
    if kind == "start":  # the affine map alone: no weights
        return
    weights = list(d.transform.flow.velocity.parameters())
    found, expected = (
        torch.autograd.grad(t.log_prob_sum(), weights, allow_unused=True) for t in (trace, whole)
    )
    torch.testing.assert_close(found, expected)


# Of an ordered vector the parts are each ordered, and the whole only by luck.
SPLIT = [kind for kind in PROPER if kind != "ordered"]


@knows_supports
@over("split_guide", QUICK, SPLIT)
def test_a_guide_of_a_split_site(kind):
    d = KINDS[kind]().freeze()
    split = poutine.reparam(site_model(d), {"x": SplitReparam(sizes_of(d), -1)})
    guide = guides.AutoMultivariateNormal(split)
    found = {name: tuple(value.shape) for name, value in guide().items()}
    lead = d.shape()[:-1]
    assert found == {f"x_split_{i}": (*lead, size) for i, size in enumerate(sizes_of(d))}
    loss = SVI(split, guide, Adam({"lr": 1e-3}), Trace_ELBO()).step()
    assert torch.isfinite(torch.tensor(loss))


UNIT = {
    "permute": lambda: UnitJacobianReparam(Permute(torch.tensor([1, 0]))),
    "haar": lambda: HaarReparam(),
    "cosine": lambda: DiscreteCosineReparam(),
}
FEW = ("positive", "interval", "stack", "laplace", "given rows")  # of two columns


@pytest.mark.parametrize("how", slow_but(UNIT, "haar"))
@over("unit_jacobian", QUICK, FEW)
def test_unit_jacobian(kind, how):
    """Drawn, scored and started as without."""
    d = finely(kind)
    model = site_model(d, (300,))
    other = poutine.reparam(model, {"x": UNIT[how]()})
    with torch.no_grad():
        site, trace = trace_of(model), trace_of(other)
        (name,) = trace.stochastic_nodes
        assert isinstance(trace.nodes["x"]["fn"], dist.Delta)
        check_moments(kind, site.nodes["x"]["value"], trace.nodes["x"]["value"])
        assert trace.nodes[name]["log_prob"].shape == (300, *d.batch_shape)
        value = model()
        with InitMessenger(init_to_value(values={"x": value})):
            torch.testing.assert_close(other(), value, rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("centered", [0.0, 0.6, 1.0, torch.tensor([0.1, 0.9]), None])
def test_a_base_with_a_location_and_a_scale(centered):
    """Both at once: the flow's base is itself moved toward the standard one."""
    d = plain(base=BASES["laplace"](2))
    model = site_model(d, (400,))
    config = {"x": TransformReparam(), "x_base": LocScaleReparam(centered, ())}
    with torch.no_grad():
        trace = trace_of(poutine.reparam(model, config))
        check_moments("", trace_of(model).nodes["x"]["value"], trace.nodes["x"]["value"])
    changed = not (isinstance(centered, float) and centered == 1)
    assert trace.stochastic_nodes == ["x_base_decentered" if changed else "x_base"]


BESIDE = {
    "inside": lambda model, config: base_space(poutine.reparam(model, config)),
    "outside": lambda model, config: poutine.reparam(base_space(model), config),
}


@pytest.mark.parametrize("where", BESIDE)
def test_sites_of_others_beside(where):
    """Learned priors go to base space, their neighbours to what Pyro has for them."""
    d = plain().freeze()

    def model():
        x = pyro.sample("x", d)
        with pyro.plate("rows", 400):
            s = pyro.sample("s", dist.Normal(x[..., 0], x[..., 1].exp()))
            t = pyro.sample("t", dist.StudentT(5.0, s, 0.5))
            pyro.sample("z", d)
            pyro.sample("y", dist.Normal(s + t, 1.0), obs=torch.zeros(400))

    other = BESIDE[where](model, {"s": LocScaleReparam(0.0), "t": LocScaleReparam(0.0)})
    value = torch.tensor([0.3, -0.2])
    with torch.no_grad(), InitMessenger(init_to_value(values={"x": value}, fallback=None)):
        with pytest.raises(ValueError, match="No init strategy specified for site"):
            other()
    start = init_to_value(values={"x": value}, fallback=guides.init_to_sample)
    with torch.no_grad(), InitMessenger(start):
        plain_trace, trace = trace_of(model), trace_of(other)
    assert trace.stochastic_nodes == ["x_base", "s_decentered", "t_decentered", "z_base"]
    for name in "stz":
        check_moments("", plain_trace.nodes[name]["value"], trace.nodes[name]["value"])
    assert trace.nodes["z"]["value"].shape == (400, 2)


# ----------------------------------------------------------------------------- all sites together


def funnel(dim=3):
    y = pyro.sample("y", dist.Normal(0, 3))
    with pyro.plate("D", dim):
        pyro.sample("x", dist.Normal(0, torch.exp(y / 2)))


def categorical():
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


TOGETHER = {
    "NeuTraReparam": lambda guide, model: NeuTraReparam(guide).reparam(model),
    "neutra": lambda guide, model: neutra(guide),
}


def check_neutra(model, how):
    """The potential with the guide is the model's, less the guide's log-determinant."""
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


@pytest.mark.parametrize("how", TOGETHER)
@pytest.mark.parametrize("model", [funnel, categorical], ids=["funnel", "categorical"])
def test_neutra_keeps_the_joint_density(model, how):
    check_neutra(model, how)


@over("neutra", (), PROPER, how=TOGETHER)
def test_neutra_over_a_learned_prior(kind, how):
    check_neutra(with_site(kind), how)


@over("structured", ("positive",), PROPER)
def test_structured(kind):
    model = with_site(kind)
    guide = guides.AutoStructured(
        model,
        conditionals={"x": "mvn", "scale": "normal"},
        dependencies={"scale": {"x": "linear"}},
    )
    SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO()).step()
    reparam = StructuredReparam(guide.eval())
    start, potential, *_ = initialize_model(reparam.reparam(model))
    energy = potential({k: v.clone().requires_grad_() for k, v in start.items()})
    assert torch.isfinite(energy)
    draws = reparam.transform_samples({k: v[None] for k, v in start.items()})
    assert set(draws) == {"x", "scale"}


def test_angles_start_in_base_space_alone():
    model = site_model(KINDS["angles"]().freeze())
    with pytest.raises(NotImplementedError, match=r"use base_space\(model\)"):
        initialize_model(model)
    assert list(initialize_model(base_space(model))[0]) == ["x_base"]
