"""Inference in base space: which sites change, what stays the same, and where it starts."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import AUTOGUIDES, BASES, CountingSolver, gaussian_prior, random_flow
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.distributions import constraints
from pyro.infer import (
    NUTS,
    SVI,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceMeanField_ELBO,
    TraceTMC_ELBO,
)
from pyro.infer import autoguide as guides
from pyro.infer.autoguide.initialization import (
    InitMessenger,
    init_to_feasible,
    init_to_generated,
    init_to_mean,
    init_to_median,
    init_to_sample,
    init_to_uniform,
    init_to_value,
)
from pyro.infer.mcmc.util import initialize_model, print_summary
from pyro.optim import Adam
from torch.distributions import biject_to

from pyro_interpolant import (
    AutoInterpolant,
    ConditionalInterpolantDistribution,
    FixedGrid,
    Geodesic,
    InterpolantDistribution,
    InterpolantTransform,
    JointInterpolantDistribution,
    TorusMLP,
    base_space,
    circular,
)
from pyro_interpolant.infer.neural_transport import is_same_map

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

STEPS = FixedGrid(steps=16)
ATOL = 1e-4  # between a path out and a path back


def random_prior(dim, **kwargs):
    """Return a frozen random flow, solved finely enough to compare both directions."""
    return InterpolantDistribution(random_flow(dim, solver=STEPS), **kwargs).freeze()


def trace_of(model, *args):
    """Return the trace of one execution, with its log-probabilities."""
    trace = poutine.trace(model).get_trace(*args)
    trace.compute_log_prob()
    return trace


def latents(trace):
    """Return the names of the latent sites: the stochastic ones but for plates."""
    return [n for n in trace.stochastic_nodes if n not in ("rows", "more")]


def family(dim=2, context_dim=2, **kwargs):
    transform = random_flow(dim, context_dim=context_dim, solver=STEPS)
    return ConditionalInterpolantDistribution(transform, **kwargs).freeze()


def at_a_hundred():
    return gaussian_prior(torch.full((2,), 100.0), 5.0 * torch.eye(2))


# Models with one site z of ours; each returns what the density of z should be, and z.


def plain():
    prior = random_prior(2)

    def model():
        return pyro.sample("z", prior)

    return model, prior.log_prob


def given_base():
    prior = random_prior(2, base=BASES["laplace"](2))

    def model():
        return pyro.sample("z", prior)

    return model, prior.log_prob


def flow_base():
    prior = random_prior(2, base=random_prior(2))

    def model():
        return pyro.sample("z", prior)

    return model, prior.log_prob


def halfway():
    prior = random_prior(2).at(0.5)

    def model():
        return pyro.sample("z", prior)

    return model, prior.log_prob


def positive():
    prior = random_prior(2, support=constraints.positive)

    def model():
        return pyro.sample("z", prior)

    return model, prior.log_prob


def simplex():
    prior = random_prior(2, support=constraints.simplex)

    def model():
        return pyro.sample("z", prior)

    return model, prior.log_prob


def conditioned():
    d = family().condition(torch.tensor([0.5, -1.0]))

    def model():
        return pyro.sample("z", d)

    return model, d.log_prob


def conditioned_rows():
    d = family().condition(torch.randn(3, 2))

    def model():
        with pyro.plate("rows", 3):
            return pyro.sample("z", d)

    return model, lambda z: d.log_prob(z).sum()


def conditioned_nested():
    d = family().condition(torch.randn(3, 2))

    def model():
        with pyro.plate("rows", 3, dim=-1), pyro.plate("more", 4, dim=-2):
            return pyro.sample("z", d)

    return model, lambda z: d.log_prob(z).sum()


def to_event():
    prior = random_prior(2)

    def model():
        return pyro.sample("z", prior.expand([3]).to_event(1))

    return model, lambda z: prior.log_prob(z).sum()


def to_event_in_a_plate():
    prior = random_prior(2)

    def model():
        with pyro.plate("rows", 4):
            return pyro.sample("z", prior.expand([3]).to_event(1))

    return model, lambda z: prior.log_prob(z).sum()


def expanded():
    prior = random_prior(2)

    def model():
        with pyro.plate("rows", 3):
            return pyro.sample("z", prior.expand([3]))

    return model, lambda z: prior.log_prob(z).sum()


def nested_plates():
    prior = random_prior(2)

    def model():
        with pyro.plate("rows", 3, dim=-1), pyro.plate("more", 4, dim=-2):
            return pyro.sample("z", prior)

    return model, lambda z: prior.log_prob(z).sum()


def subsampled():
    prior = random_prior(2)

    def model():
        with pyro.plate("rows", 12, subsample_size=4):
            return pyro.sample("z", prior)

    return model, lambda z: 3 * prior.log_prob(z).sum()


def masked_by_poutine():
    prior, keep = random_prior(2), torch.tensor([True, False, True])

    def model():
        with pyro.plate("rows", 3), poutine.mask(mask=keep):
            return pyro.sample("z", prior)

    return model, lambda z: prior.log_prob(z)[keep].sum()


def masked():
    prior, keep = random_prior(2), torch.tensor([True, False, True])

    def model():
        with pyro.plate("rows", 3):
            return pyro.sample("z", prior.mask(keep))

    return model, lambda z: prior.log_prob(z)[keep].sum()


def masked_to_event():
    prior, keep = random_prior(2), torch.tensor([True, False, True])

    def model():
        return pyro.sample("z", prior.expand([3]).mask(keep).to_event(1))

    return model, lambda z: prior.log_prob(z)[keep].sum()


def to_event_masked():
    prior, keep = random_prior(2), torch.tensor([True, False])

    def model():
        with pyro.plate("rows", 2):
            return pyro.sample("z", prior.expand([2, 3]).to_event(1).mask(keep))

    return model, lambda z: prior.log_prob(z)[0].sum()


def masked_twice():
    prior = random_prior(2)
    first, second = torch.tensor([True, False, True]), torch.tensor([True, True, False])

    def model():
        with pyro.plate("rows", 3):
            return pyro.sample("z", prior.mask(first).mask(second))

    return model, lambda z: prior.log_prob(z)[0]


def masked_by_a_bool():
    prior = random_prior(2)

    def model():
        return pyro.sample("z", prior.mask(False))  # noqa: FBT003

    return model, lambda z: torch.zeros(())


def scaled():
    prior = random_prior(2)

    def model():
        with poutine.scale(scale=2.5):
            return pyro.sample("z", prior)

    return model, lambda z: 2.5 * prior.log_prob(z)


SITES = {
    f.__name__: f
    for f in (
        plain,
        given_base,
        flow_base,
        halfway,
        positive,
        simplex,
        conditioned,
        conditioned_rows,
        conditioned_nested,
        to_event,
        to_event_in_a_plate,
        expanded,
        nested_plates,
        subsampled,
        masked_by_poutine,
        masked,
        masked_to_event,
        to_event_masked,
        masked_twice,
        masked_by_a_bool,
        scaled,
    )
}

# Where every event of the site counts once, so that the Jacobian is that of the whole site.
UNWEIGHTED = [n for n in SITES if "masked" not in n and n != "subsampled"]

sites = pytest.mark.parametrize("name", SITES)


# ------------------------------------------------------------------------------ which sites change


@sites
def test_site_becomes_its_base(name):
    model, _ = SITES[name]()
    trace = trace_of(base_space(model))
    # A base that is a flow itself goes to its own base in turn.
    assert latents(trace) == ["z_base_base" if name == "flow_base" else "z_base"]
    z, node = trace.nodes["_RETURN"]["value"], trace.nodes["z"]
    assert node["value"] is z
    assert node["is_observed"]
    assert node["infer"]["_deterministic"]
    assert torch.equal(node["log_prob_sum"], torch.zeros(()))
    plain_node = trace_of(model).nodes["z"]
    assert z.shape == plain_node["value"].shape
    assert node["fn"].event_dim == plain_node["fn"].event_dim
    assert node["fn"].batch_shape == plain_node["fn"].batch_shape
    assert [f.name for f in node["cond_indep_stack"]] == [
        f.name for f in plain_node["cond_indep_stack"]
    ]


@sites
def test_draws_are_the_same(name):
    model, _ = SITES[name]()
    pyro.set_rng_seed(2)
    expected = model()
    pyro.set_rng_seed(2)
    assert torch.allclose(base_space(model)(), expected)


@pytest.mark.parametrize("name", UNWEIGHTED)
def test_log_joint_is_that_of_the_data_space_with_the_jacobian(name):
    model, density = SITES[name]()
    trace = trace_of(base_space(model))
    (base,) = latents(trace)
    leaf = trace.nodes[base]["value"].detach().clone()
    wrapped = base_space(model)

    def site(value):
        return poutine.condition(wrapped, {base: value})()

    z = site(leaf)
    if name == "simplex":

        def flat(value):
            return site(value)[..., :-1]
    else:
        flat = site
    jacobian = torch.autograd.functional.jacobian(flat, leaf).reshape(leaf.numel(), leaf.numel())
    log_det = torch.linalg.slogdet(jacobian).logabsdet
    expected = density(z.detach().clone()).sum() + log_det
    found = poutine.trace(poutine.condition(wrapped, {base: leaf})).get_trace().log_prob_sum()
    assert torch.allclose(found, expected, atol=20 * ATOL)


@pytest.mark.parametrize("name", [n for n in SITES if n not in UNWEIGHTED])
def test_masks_and_plates_apply_to_the_base(name):
    model, density = SITES[name]()
    trace = trace_of(base_space(model))
    z_base, z = (trace.nodes[n]["value"] for n in ("z_base", "z"))
    normal = dist.Normal(0.0, 1.0).log_prob(z_base).sum(-1)
    rows = normal.reshape(-1)
    weights = {
        "subsampled": torch.full((4,), 3.0),
        "masked_by_a_bool": torch.zeros(1),
        "to_event_masked": torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]),
        "masked_twice": torch.tensor([1.0, 0.0, 0.0]),
    }.get(name, torch.tensor([1.0, 0.0, 1.0]))
    assert torch.allclose(trace.log_prob_sum(), weights @ rows)
    # And those are the weights of data space.
    there = trace_of(poutine.condition(model, {"z": z.clone()}))
    assert torch.allclose(there.log_prob_sum(), density(z.clone()))


def test_a_scale_inside_weighs_the_density_of_the_site():
    """In plates, which count the Jacobian as they count a guide's site, and under masks."""
    prior, keep = random_prior(2), torch.tensor([True, False])

    def model():
        with pyro.plate("rows", 6, subsample_size=2), poutine.scale(scale=0.5):
            with poutine.scale(scale=torch.tensor(0.6)):
                pyro.sample("z", prior.mask(keep))

    with torch.no_grad():
        w = torch.randn(2, 2)
        z = prior.transform(w)
        log_det = prior.transform.log_abs_det_jacobian(w, z)
        given = poutine.condition(base_space(model), {"z_base": w})
        found = poutine.trace(given).get_trace().log_prob_sum()
        around = poutine.trace(poutine.scale(given, 2.0)).get_trace().log_prob_sum()
    base = dist.Normal(0.0, 1.0).log_prob(w).sum(-1)
    expected = 3 * (0.3 * base + 0.7 * log_det)[0]
    assert torch.allclose(found, expected)
    assert torch.allclose(around, 2 * expected)


def test_a_scale_inside_leaves_the_distances_of_angles_as_they_are():
    """Else the evidence would be off by log s for each angle."""
    torus = InterpolantTransform(TorusMLP(2, (8, 8)), interpolant=Geodesic(), solver=STEPS)
    prior, scale, w = InterpolantDistribution(torus, support=circular), 0.5, torch.randn(3, 4)

    def model():
        with pyro.plate("rows", 3), poutine.scale(scale=scale):
            pyro.sample("z", prior)

    trace = trace_of(poutine.condition(base_space(model), {"z_base": w}))
    with torch.no_grad():
        expected = scale * prior.log_prob(trace.nodes["z"]["value"]) - 0.5 * w.square().sum(-1)
        u = torch.atan2(w[:, 2:], w[:, :2])
        log_det = prior.transform.log_abs_det_jacobian(u, prior.transform(u))
    assert torch.allclose(trace.log_prob_sum(), (expected + log_det).sum())


def test_each_row_of_a_scale_weighs_all_events_of_a_row():
    prior, scale = random_prior(2), torch.tensor([0.5, 1.0, 2.0])

    def model():
        with poutine.scale(scale=scale):
            pyro.sample("z", prior.expand([3, 3]).to_event(1))

    w = torch.randn(3, 3, 2)
    log_det = prior.transform.log_abs_det_jacobian(w, prior.transform(w))
    base = dist.Normal(0.0, 1.0).log_prob(w).sum(-1)
    expected = (scale * base.sum(-1) + (1 - scale) * log_det.sum(-1)).sum()
    found = trace_of(poutine.condition(base_space(model), {"z_base": w}))
    assert torch.allclose(found.log_prob_sum(), expected)


def test_a_scale_inside_is_that_of_enumerated_sites_beside_the_prior():
    prior, shares, w = family(context_dim=1), torch.tensor([0.3, 0.7]), torch.randn(2)

    def model():
        with poutine.scale(scale=0.5):
            fn = dist.Categorical(shares)
            c = pyro.sample("c", fn, infer={"enumerate": "parallel"})
            z = pyro.sample("z", prior.condition(c.to(shares)[..., None]))
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    def guide():
        pyro.sample("z_base", dist.Delta(w, event_dim=1))

    transform = prior.condition(torch.tensor([[0.0], [1.0]])).transform
    z = transform(w.expand(2, 2))
    log_det = transform.log_abs_det_jacobian(w.expand(2, 2), z)
    each = shares.log() + dist.Normal(z.sum(-1), 1.0).log_prob(torch.tensor(1.0)) + log_det
    expected = 0.5 * (dist.Normal(0.0, 1.0).log_prob(w).sum() + each.logsumexp(0))
    loss = TraceEnum_ELBO(max_plate_nesting=0).loss(base_space(model), guide)
    assert loss == pytest.approx(-float(expected))


def test_a_scale_inside_costs_no_solve():
    """Of angles the base is made of the draw: the same for the value and for its Jacobian."""
    solver = CountingSolver()
    torus = InterpolantTransform(TorusMLP(2), interpolant=Geodesic(), solver=solver)
    prior = InterpolantDistribution(torus, support=circular).freeze()

    def model():
        with poutine.scale(scale=0.5):
            pyro.sample("z", prior)

    trace_of(base_space(model))
    assert solver.solves == 1


def test_observed_sites_are_left_alone():
    prior, likelihood = random_prior(2), family()
    data = torch.randn(4, 2)

    def model():
        z = pyro.sample("z", prior)
        with pyro.plate("rows", 4):
            pyro.sample("x", likelihood.condition(z.unsqueeze(-2)), obs=data)

    trace = trace_of(base_space(model))
    assert trace.nodes["x"]["value"] is data
    assert not trace.nodes["x"]["infer"].get("_deterministic")
    z = trace.nodes["z"]["value"]
    assert torch.allclose(trace.nodes["x"]["log_prob"], likelihood.condition(z).log_prob(data))
    assert "x_base" not in trace


def test_condition_inside_is_left_alone():
    prior, value = random_prior(2), torch.tensor([0.3, -0.4])
    model = poutine.condition(lambda: pyro.sample("z", prior), {"z": value})
    trace = trace_of(base_space(model))
    assert "z_base" not in trace
    assert trace.nodes["z"]["value"] is value
    assert torch.allclose(trace.log_prob_sum(), prior.log_prob(value))


def test_sites_of_others_are_left_alone():
    prior = random_prior(2)

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        flow = dist.TransformedDistribution(
            dist.Normal(torch.zeros(2), 1.0).to_event(1), [random_flow(2)]
        )
        b = pyro.sample("b", flow)
        c = pyro.sample("c", dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(True))  # noqa: FBT003
        pyro.deterministic("d", a)
        pyro.factor("e", a + b.sum() + c.sum())
        return pyro.sample("z", prior)

    trace = trace_of(base_space(model))
    assert trace.stochastic_nodes == ["a", "b", "c", "z_base"]
    assert trace.observation_nodes == ["d", "e", "z"]


def test_arguments_and_results_pass_through():
    prior = random_prior(2)

    def model(a, *, b):
        return pyro.sample("z", prior).sum() * 0 + a + b

    assert base_space(model)(1.0, b=2.0) == pytest.approx(3.0)


def test_two_sites_of_one_flow():
    prior = random_prior(2)

    def model():
        return pyro.sample("u", prior), pyro.sample("v", prior)

    trace = trace_of(base_space(model))
    assert trace.stochastic_nodes == ["u_base", "v_base"]
    u, v = trace.nodes["_RETURN"]["value"]
    assert not torch.equal(u, v)
    assert torch.allclose(u, prior.transform(trace.nodes["u_base"]["value"]))


def test_no_divergence_is_computed():
    prior = random_prior(2)
    calls = []
    divergence = prior.transform.divergence
    prior.transform.divergence = lambda *a: calls.append(1) or divergence(*a)
    model = base_space(lambda: pyro.sample("z", prior))
    guide = guides.AutoNormal(model)
    SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()
    trace_of(model)
    assert not calls


# ------------------------------------------------------------------------------- inference with it


def regression(prior):
    """Return a model with a global and plated latent vector and data."""
    data = torch.randn(4, 2) + prior.transform.flow.loc

    def model():
        z = pyro.sample("z", prior)
        with pyro.plate("rows", 4):
            w = pyro.sample("w", prior)
            pyro.sample("x", dist.Normal((z + w) / 2, 1.0).to_event(1), obs=data)

    return model


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive_gives_the_site_back(parallel):
    prior = random_prior(2)
    model = base_space(regression(prior))
    posterior = {"z_base": torch.randn(6, 1, 2), "w_base": torch.randn(6, 4, 2)}
    draws = Predictive(model, posterior, parallel=parallel)()
    assert draws["z"].shape == (6, 1, 2)  # Predictive's way: a dimension for the plate
    assert draws["w"].shape == (6, 4, 2)
    assert torch.allclose(draws["z"], prior.transform(posterior["z_base"]))
    assert torch.allclose(draws["w"], prior.transform(posterior["w_base"]))


@pytest.mark.parametrize("event_shape", [(), (1,)], ids=["scalar", "vector"])
def test_draws_outside_of_plates_are_not_mixed_in_parallel(event_shape):
    """As many draws as rows: each row of predictions is of one draw."""
    prior = InterpolantDistribution(random_flow(1, solver=STEPS), event_shape=event_shape).freeze()

    def model():
        z = pyro.sample("z", prior)
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(z if event_shape == () else z[..., 0], 1e-6))

    draws = {"z_base": torch.arange(4.0)[:, None]}
    y = Predictive(base_space(model), draws, parallel=True)()["y"]
    expected = prior.transform(draws["z_base"]).expand(4, 4)
    assert torch.allclose(y, expected, atol=1e-4)


@pytest.mark.slow
def test_predictive_with_a_guide_gives_the_site_back():
    prior = random_prior(2)
    model = base_space(regression(prior))
    guide = guides.AutoNormal(model)
    guide()
    draws = Predictive(model, guide=guide, num_samples=5, return_sites=("z", "z_base"))()
    assert torch.allclose(draws["z"], prior.transform(draws["z_base"]))


@pytest.mark.parametrize("loss", [Trace_ELBO, TraceMeanField_ELBO])
def test_vectorized_particles(loss):
    model = base_space(regression(random_prior(2)))
    guide = guides.AutoNormal(model)
    elbo = loss(num_particles=3, vectorize_particles=True, max_plate_nesting=1)
    svi = SVI(model, guide, Adam({"lr": 0.01}), elbo)
    losses = torch.tensor([svi.step() for _ in range(2)])
    assert torch.isfinite(losses).all()


@pytest.mark.slow
def test_jit():
    """The compiled loss is that of the guide's present parameters, not of the first step's."""
    prior = random_prior(2)
    prior.transform.solver = FixedGrid(steps=2)  # compiling takes as long as there are steps
    model = base_space(regression(prior))
    losses = []
    for loss in (JitTrace_ELBO(ignore_jit_warnings=True), Trace_ELBO()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = guides.AutoDelta(model)
        guide()
        svi = SVI(model, guide, Adam({"lr": 0.05}), loss)
        losses.append(torch.tensor([svi.step() for _ in range(4)]))
    assert torch.allclose(losses[0], losses[1])
    assert losses[0][-1] < losses[0][0]


def test_replay():
    model = base_space(regression(random_prior(2)))
    first = trace_of(model)
    again = trace_of(poutine.replay(model, trace=first))
    assert torch.equal(again.nodes["z"]["value"], first.nodes["z"]["value"])
    assert torch.allclose(again.log_prob_sum(), first.log_prob_sum())
    other = trace_of(model)
    assert not torch.equal(other.nodes["z"]["value"], first.nodes["z"]["value"])


def test_a_trace_of_the_data_space_is_replayed_there():
    model = regression(random_prior(2))
    for within in (lambda m: m, scope(prefix="a")):
        first = trace_of(within(model))
        again = trace_of(poutine.replay(within(base_space(model)), trace=first))
        assert again.nodes.keys() == first.nodes.keys()
        assert torch.equal(again.log_prob_sum(), first.log_prob_sum())


def test_draws_in_parallel_are_those_that_the_site_asks_for():
    prior, many = random_prior(2), {"enumerate": "parallel", "num_samples": 50, "expand": True}

    def model():
        z = pyro.sample("z", prior, infer=many)
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.tensor(1.0))

    losses = []
    for space in (model, base_space(model)):
        pyro.set_rng_seed(0)
        losses.append(TraceTMC_ELBO(max_plate_nesting=0).loss(space, lambda: None))
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_what_a_site_was_observed_as_is_none_of_its_base():
    prior = random_prior(2)

    def model():
        pyro.sample("z", prior, obs=torch.zeros(2))

    nodes = trace_of(base_space(poutine.uncondition(model))).nodes
    assert "was_observed" in nodes["z"]["infer"]
    assert not {"was_observed", "obs"} & set(nodes["z_base"]["infer"])


def test_condition_on_the_base():
    prior, value = random_prior(2), torch.tensor([0.3, -0.4])
    model = base_space(lambda: pyro.sample("z", prior))
    trace = trace_of(poutine.condition(model, {"z_base": value}))
    assert torch.allclose(trace.nodes["z"]["value"], prior.transform(value))
    assert torch.allclose(trace.log_prob_sum(), dist.Normal(0.0, 1.0).log_prob(value).sum())


def test_draws_of_a_guide_that_gives_the_site_beside_its_base():
    model = base_space(regression(random_prior(2)))
    guide = guides.AutoNormalMessenger(model)
    assert {"z", "z_base"} <= set(guide())
    found = Predictive(model, guide=guide, num_samples=3)()
    assert torch.allclose(found["z"], model.samples({"z_base": found["z_base"]})["z"])


def test_block_and_nested_handlers():
    prior = random_prior(2)
    model = base_space(lambda: pyro.sample("z", prior))
    assert trace_of(poutine.block(model, hide=["z"])).stochastic_nodes == ["z_base"]
    twice = trace_of(base_space(model))
    assert twice.stochastic_nodes == ["z_base"]


def test_a_block_inside_that_lets_a_site_through_lets_its_base_through():
    prior = random_prior(2)

    def model():
        pyro.sample("other", dist.Normal(0.0, 1.0))
        pyro.sample("hidden", prior)
        with pyro.plate("rows", 3), poutine.scale(scale=0.5):
            pyro.sample("z", prior)

    trace = trace_of(base_space(poutine.block(model, expose=["z"])))
    assert trace.stochastic_nodes == ["z_base"]
    assert trace.nodes["z_base"]["value"].shape == (3, 2)
    assert trace.nodes["z_base"]["scale"] == 0.5
    outside = trace_of(poutine.block(base_space(model), expose=["z"]))
    assert outside.stochastic_nodes == []


# --------------------------------------------------------------------------------- where it starts


def test_nuts_starts_near_the_prior():
    model = base_space(regression(at_a_hundred()))
    for seed in range(3):
        pyro.set_rng_seed(seed)
        kernel = NUTS(model)
        kernel.setup(1)
        start = kernel.initial_params
        assert sorted(start) == ["w_base", "z_base"]
        assert all(v.abs().max() < 5 for v in start.values())


@pytest.mark.parametrize("name", AUTOGUIDES)
def test_autoguides_start_near_the_prior(name):
    model = base_space(regression(at_a_hundred()))
    guide = AUTOGUIDES[name](model)
    start = guide()
    assert start["z_base"].abs().max() < 5
    assert start["w_base"].abs().max() < 5


STRATEGIES = {
    "feasible": init_to_feasible,
    "median": init_to_median,
    "mean": init_to_mean,
    "uniform": init_to_uniform,
    "sample": init_to_sample,
    "value": init_to_value(values={"other": torch.ones(2)}),
    "value_median": init_to_value(values={}, fallback=init_to_median),
    "generated": init_to_generated(generate=lambda: init_to_median),
    "called": lambda site: site["fn"](),  # what EasyGuide does
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_propose_in_base_space(name):
    model = base_space(regression(at_a_hundred()))
    trace = trace_of(InitMessenger(STRATEGIES[name])(model))
    assert trace.nodes["z_base"]["value"].abs().max() < 5
    z = trace.nodes["z"]["value"]
    assert ((z - 100) / 5).abs().max() < 5


def initial_values(model, init, how):
    """Return the initial value of ``z_base`` under a strategy."""
    if how == "messenger":
        return trace_of(InitMessenger(init)(model)).nodes["z_base"]["value"]
    if how == "nuts":
        kernel = NUTS(model, init_strategy=init)
        kernel.setup(1)
        return kernel.initial_params["z_base"]
    if how == "initialize_model":
        return initialize_model(model, init_strategy=init)[0]["z_base"]
    guide = guides.AutoDelta(model, init_loc_fn=init)
    return guide()["z_base"]


@pytest.mark.parametrize("how", ["messenger", "nuts", "initialize_model", "autoguide"])
def test_init_to_value_of_the_site_is_honoured(how):
    prior = random_prior(2)
    value = torch.tensor([0.7, -0.2])
    model = base_space(regression(prior))
    z_base = initial_values(model, init_to_value(values={"z": value}), how)
    assert torch.allclose(z_base, prior.transform.inv(value), atol=ATOL)
    assert not z_base.requires_grad or how == "autoguide"


@pytest.mark.parametrize("how", ["messenger", "nuts"])
def test_one_value_for_a_plate_starts_each_of_its_members(how):
    """And not one latent for all of them."""
    prior = random_prior(2)

    def model():
        with pyro.plate("rows", 3):
            pyro.sample("z", prior)

    value = torch.tensor([0.7, -0.2])
    z_base = initial_values(base_space(model), init_to_value(values={"z": value}), how)
    assert z_base.shape == (3, 2)
    assert torch.allclose(z_base, prior.transform.inv(value).expand(3, 2), atol=ATOL)
    init = init_to_value(values={"z": torch.zeros(4, 2)})
    with pytest.raises(
        ValueError, match=r"'z' that broadcasts to its shape \(3, 2\), got shape \(4"
    ):
        initial_values(base_space(model), init, how)


@pytest.mark.parametrize("how", ["messenger", "nuts"])
@pytest.mark.parametrize("shape", [(2,), (3, 2)], ids=["one", "each"])
def test_values_start_the_members_of_a_plate_around_a_model_in_base_space(shape, how):
    prior, value = random_prior(2), torch.randn(shape)
    part = base_space(lambda: pyro.sample("z", prior))

    def model():
        with pyro.plate("rows", 3):
            part()

    z_base = initial_values(model, init_to_value(values={"z": value}), how)
    assert z_base.shape == (3, 2)
    assert torch.allclose(z_base, prior.transform.inv(value).expand(3, 2), atol=ATOL)


@pytest.mark.parametrize("how", ["messenger", "nuts"])
def test_an_inner_strategy_starts_each_member_of_a_plate_too(how):
    prior = random_prior(2)

    def model():
        with InitMessenger(init_to_value(values={"z": torch.zeros(2)})), pyro.plate("rows", 3):
            pyro.sample("z", prior)

    assert initial_values(base_space(model), init_to_median, how).shape == (3, 2)


VALUE = torch.tensor([0.7, -0.2], dtype=torch.float64)
NAMED = {
    "generated": init_to_generated(generate=lambda: init_to_value(values={"z": VALUE})),
    "function": lambda site: {"z": VALUE, "w": torch.zeros(4, 2)}[site["name"]],
}


@pytest.mark.parametrize("name", NAMED)
def test_a_value_of_the_site_is_honoured_however_it_is_named(name):
    """``init_to_generated`` hides another strategy; a function may know the sites by name."""
    trace = trace_of(InitMessenger(NAMED[name])(base_space(regression(random_prior(2)))))
    assert torch.allclose(trace.nodes["z"]["value"], VALUE, atol=ATOL)


@pytest.mark.parametrize("value", [VALUE, VALUE.numpy(), torch.tensor([1, 0])])
def test_a_value_of_the_site_comes_in_the_type_of_its_flow(value):
    prior = random_prior(2).to(torch.float32)
    with InitMessenger(init_to_value(values={"z": value})):
        z = trace_of(base_space(lambda: pyro.sample("z", prior))).nodes["z"]["value"]
    assert z.dtype == torch.float32
    assert torch.allclose(z, torch.as_tensor(value).float(), atol=1e-3)


def test_a_guide_of_one_vector_starts_where_it_is_told_to():
    model = base_space(regression(random_prior(2)))
    guide = AutoInterpolant(
        model, hidden_dims=(8,), init_scale=1e-6, init_loc_fn=init_to_value(values={"z": VALUE})
    )
    draws = Predictive(model, guide=guide, num_samples=1)()
    assert torch.allclose(draws["z"].flatten(), VALUE, atol=ATOL)


def test_a_start_outside_of_the_support_raises():
    model, _ = positive()
    with InitMessenger(init_to_value(values={"z": torch.tensor([1.0, -1.0])})):
        with pytest.raises(ValueError, match="within the support"):
            base_space(model)()


def test_init_to_value_of_the_base_site():
    value = torch.tensor([0.7, -0.2])
    model = base_space(regression(random_prior(2)))
    init = init_to_value(values={"z_base": value})
    assert torch.equal(initial_values(model, init, "messenger"), value)


def test_init_to_value_of_other_sites_is_untouched():
    prior = random_prior(2)

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("z", prior)
        pyro.sample("y", dist.Normal(a, 1.0), obs=torch.tensor(1.0))

    init = init_to_value(values={"a": torch.tensor(3.5), "z": torch.ones(2)})
    trace = trace_of(InitMessenger(init)(base_space(model)))
    assert float(trace.nodes["a"]["value"]) == 3.5
    assert torch.allclose(trace.nodes["z"]["value"], torch.ones(2), atol=ATOL)
    init = init_to_value(values={"a": torch.tensor(3.5)}, fallback=init_to_median)
    trace = trace_of(InitMessenger(init)(base_space(model)))
    assert float(trace.nodes["a"]["value"]) == 3.5


@pytest.mark.parametrize(
    "name",
    [
        "given_base",
        "positive",
        "simplex",
        "conditioned",
        "conditioned_rows",
        "to_event",
        "nested_plates",
        "masked",
    ],
)
def test_init_to_value_for_every_kind_of_site(name):
    model, _ = SITES[name]()
    value = model().detach().clone()
    trace = trace_of(InitMessenger(init_to_value(values={"z": value}))(base_space(model)))
    assert torch.allclose(trace.nodes["z"]["value"], value, atol=ATOL)


def test_frozen_weights_get_no_gradients():
    prior = random_prior(2)
    model = base_space(regression(prior))
    guide = guides.AutoNormal(model)
    SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO()).step()
    assert all(p.grad is None for p in prior.transform.parameters())


def test_of_a_module():
    class Model(pyro.nn.PyroModule):
        def __init__(self, prior):
            super().__init__()
            self.prior = prior

        def forward(self):
            return pyro.sample("z", self.prior)

    trace = trace_of(base_space(Model(random_prior(2))))
    assert trace.stochastic_nodes == ["z_base"]


# Draws by the model's own names


def test_draws_in_base_space_become_those_of_the_model(capsys):
    joint = JointInterpolantDistribution(
        random_flow(3, solver=STEPS),
        sites={"slope": ((), constraints.real), "scales": ((2,), constraints.positive)},
    ).freeze()
    torus = InterpolantTransform(TorusMLP(2), interpolant=Geodesic(), solver=STEPS)
    stars, angles = random_prior(2), InterpolantDistribution(torus, support=circular).freeze()

    def model(count):
        joint.sample_sites("earlier")
        with pyro.plate("rows", count):
            pyro.sample("star", stars)
        pyro.sample("angle", angles)
        pyro.sample("free", dist.Normal(0.0, 1.0))
        pyro.sample("data_base", dist.Normal(0.0, 1.0))  # a name of the user's own

    base = base_space(model)
    draws = {
        "earlier_base": torch.randn(2, 5, 3),
        "star_base": torch.randn(2, 5, 4, 2),
        "angle_base": torch.randn(2, 5, 4),
        "free": torch.randn(2, 5),
        "data_base": torch.randn(2, 5),
    }
    found = base.samples(draws, 4)
    assert sorted(found) == ["angle", "data_base", "free", "scales", "slope", "star"]
    one = {name: value[1, 3] for name, value in draws.items()}
    expected = poutine.trace(poutine.condition(base, one)).get_trace(4)
    for name, value in found.items():
        assert torch.allclose(value[1, 3], expected.nodes[name]["value"], atol=1e-10)
    print_summary(found)
    printed = capsys.readouterr().out
    assert all(f"{name}[0" in printed for name in ("scales", "star", "angle"))


@pytest.mark.slow
def test_the_parts_of_a_joint_prior_come_by_name_where_one_is_intervened_on():
    sites = {"mu": ((), constraints.real), "tau": ((), constraints.positive)}
    joint = JointInterpolantDistribution(random_flow(2, solver=STEPS), sites=sites).freeze()

    def model():
        joint.sample_sites("past")

    w = {"past_base": torch.randn(5, 2)}
    expected = base_space(model).samples(w)
    for handler in (poutine.do, poutine.condition):
        found = base_space(handler(model, {"mu": torch.tensor(7.0)})).samples(w)
        assert sorted(found) == ["mu", "tau"]
        assert torch.equal(found["tau"], expected["tau"])


def test_runs_that_tell_of_priors_are_apart_from_what_is_around():
    prior = random_prior(2)

    def model():
        with pyro.plate("rows", 3, dim=-1):
            pyro.sample("z", prior)

    base, draws = base_space(model), {"z_base": torch.randn(10, 3, 2)}
    expected = base.samples(draws)["z"]
    with poutine.trace() as around:
        assert torch.equal(base.samples(draws)["z"], expected)
    assert not around.trace.nodes
    with pyro.plate("outer", 3):
        assert torch.equal(base.samples(draws)["z"], expected)


@pytest.mark.parametrize("size", [7, 2], ids=["whole", "part"])
def test_draws_of_a_plate_that_subsamples_are_of_the_whole_or_of_the_part(size):
    prior = random_prior(2)

    def model():
        with pyro.plate("more", 3, dim=-2), pyro.plate("rows", 7, subsample_size=2, dim=-1):
            scale = pyro.sample("scale", dist.Exponential(1.0))
            z = pyro.sample("z", prior)
            pyro.sample("y", dist.Normal(z.sum(-1), scale), obs=torch.zeros(3, 2))

    draws = {"z_base": torch.randn(5, 3, size, 2), "scale": torch.rand(5, 3, size)}
    found = base_space(model).samples(draws)
    assert torch.equal(found["scale"], draws["scale"])
    assert torch.allclose(found["z"], prior.transform(draws["z_base"]))


def test_draws_of_a_site_in_a_scope_come_under_its_own_name():
    prior = random_prior(2)

    def model():
        with scope(prefix="inner"):
            pyro.sample("z", prior)

    base = base_space(model)
    draws = Predictive(base, num_samples=3)()
    base_name = next(name for name in draws if name.endswith("_base"))
    found = base.samples({base_name: draws[base_name]})
    assert list(found) == ["inner/z"]
    assert torch.allclose(found["inner/z"], draws["inner/z"])


def test_draws_of_named_sites_in_scopes_come_under_their_own_names():
    sites = {"mu": ((), constraints.real), "tau": ((2,), constraints.positive)}
    joint = JointInterpolantDistribution(random_flow(3, solver=STEPS), sites=sites).freeze()

    def model():
        for side in ("left", "right"):
            with scope(prefix=side):
                joint.sample_sites("past")

    base = base_space(model)
    draws = Predictive(base, num_samples=3)()
    found = base.samples({name: value for name, value in draws.items() if "_base" in name})
    assert sorted(found) == ["left/mu", "left/tau", "right/mu", "right/tau"]
    for name, value in found.items():
        assert torch.allclose(value, draws[name])


@pytest.mark.parametrize("around", [0, 1, 2], ids=["inside", "between", "outside"])
def test_a_site_is_observed_by_the_name_that_it_has_at_the_condition(around):
    prior = random_prior(2)
    value = torch.ones(2)

    def model():
        with scope(prefix="inner"):
            pyro.sample("z", prior)

    names = ("inner/z", "inner/z", "outer/inner/z")
    conditioned = [lambda m: m] * 3
    conditioned[around] = lambda m: poutine.condition(m, {names[around]: value})
    model = conditioned[0](model)
    model = scope(conditioned[1](base_space(model)), prefix="outer")
    trace = poutine.trace(conditioned[2](model)).get_trace()
    assert list(trace.stochastic_nodes) == []
    trace.compute_log_prob()
    density = trace.nodes["outer/inner/z"]["log_prob"]
    torch.testing.assert_close(density, prior.log_prob(value))


def test_a_chain_of_pyro_markov_is_that_of_the_data_space_beside_enumerated_sites():
    prior, y = random_prior(1, event_shape=()), torch.tensor([0.5, 1.0, 0.7])

    def model():
        x = torch.zeros(())
        for t in pyro.markov(range(3)):
            fn = dist.Categorical(torch.tensor([0.3, 0.7]))
            k = pyro.sample(f"k{t}", fn, infer={"enumerate": "parallel"})
            x = x + pyro.sample(f"e{t}", prior)
            pyro.sample(f"y{t}", dist.Normal(x + k, 0.3), obs=y[t])

    base = base_space(model)
    w = {f"e{t}_base": torch.randn(1) for t in range(3)}
    x = base.samples(w)
    kernel = NUTS(base)
    kernel.setup(0)
    assert sorted(kernel.initial_params) == sorted(w)

    def at(values):
        def guide():
            for name, value in values.items():
                pyro.sample(name, dist.Delta(value, event_dim=value.dim()))

        return guide

    elbo = TraceEnum_ELBO(max_plate_nesting=0)
    log_det = sum(
        prior.base_dist.log_prob(w[f"e{t}_base"]) - prior.log_prob(x[f"e{t}"]) for t in range(3)
    )
    expected = elbo.loss(model, at(x)) - float(log_det)
    assert elbo.loss(base, at(w)) == pytest.approx(expected, abs=ATOL)


def test_bijections_are_the_same_where_their_parts_are():
    low, high = torch.zeros(3), torch.ones(3)
    same = constraints.interval(low, high), constraints.interval(low.clone(), high.clone())
    other = constraints.interval(low, 2 * high)
    for wrap in (
        lambda c: c,
        lambda c: constraints.independent(c, 1),
        lambda c: constraints.cat([c, constraints.real], -1, [3, 1]),
    ):
        one, again, another = (biject_to(wrap(c)) for c in (*same, other))
        assert is_same_map(one, again)
        assert not is_same_map(one, another)
        assert not is_same_map(one, biject_to(constraints.simplex))


@pytest.mark.slow
def test_names_of_a_joint_prior_that_are_other_sites_of_the_model_stay_theirs():
    sites = {"mu": ((), constraints.real), "tau": ((), constraints.positive)}
    joint = JointInterpolantDistribution(random_flow(2, solver=STEPS), sites=sites).freeze()

    def model():
        past, other = (joint.unpack(pyro.sample(name, joint)) for name in ("past", "other"))
        pyro.sample("mu", dist.Normal(past["mu"], other["tau"]))  # today's

    w = {f"{name}_base": torch.randn(5, 2) for name in ("past", "other")}
    found = base_space(model).samples({**w, "mu": 100 + torch.arange(5.0)})
    assert sorted(found) == ["mu", "other", "past"]
    assert torch.equal(found["mu"], 100 + torch.arange(5.0))
    for name in ("past", "other"):
        assert torch.allclose(found[name], joint.transform(w[f"{name}_base"]))


@pytest.mark.slow
def test_draws_of_a_prior_whose_base_is_a_flow():
    """Two maps, one after another; what is in between is no site of the model."""
    model, _ = flow_base()
    base = base_space(model)
    found = base.samples({"z_base_base": torch.randn(5, 2)})
    assert list(found) == ["z"]
    draws = Predictive(base, num_samples=3)()
    named = base.samples({"z_base_base": draws["z_base_base"]})
    assert torch.allclose(named["z"], draws["z"])


@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_a_prior_on_a_support_that_moves_has_no_one_map_for_all_draws(unit):
    flow = random_prior(1).transform

    def model():
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        support = dist.constraints.interval(0.0, unit * top)
        pyro.sample("z", InterpolantDistribution(flow, support=support))

    with pytest.raises(ValueError, match="'z' with one that depends on other sites"):
        base_space(model).samples({"top": torch.rand(5) + 3, "z_base": torch.randn(5, 1)})


@pytest.mark.slow
def test_a_prior_that_a_latent_site_chooses_has_no_one_map_for_all_draws():
    one, other = random_prior(2), gaussian_prior(torch.zeros(2), torch.eye(2))

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("z", one if a > 0 else other)

    base, w = base_space(model), torch.randn(3, 2)
    mixed, same = torch.tensor([1.0, -1.0, 1.0]), torch.ones(3)
    for seed in range(2):  # of which one gives a run without draws the other prior
        pyro.set_rng_seed(seed)
        with pytest.raises(ValueError, match="'z' with one that depends on other sites"):
            base.samples({"a": mixed, "z_base": w})
        before = torch.get_rng_state()
        found = base.samples({"a": same, "z_base": w})
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.allclose(found["z"], one.transform(w))


@pytest.mark.parametrize("count", [0, 3])
def test_draws_may_be_arrays_and_none(count):
    prior = random_prior(2)

    def model():
        pyro.sample("y", dist.Normal(pyro.sample("z", prior).sum(-1), 1.0))

    draws = {"z_base": torch.randn(count, 2), "y": torch.zeros(count)}
    expected = base_space(model).samples(draws)
    assert expected["z"].shape == (count, 2)
    prior.transform.float()
    found = base_space(model).samples({name: value.numpy() for name, value in draws.items()})
    torch.testing.assert_close(found["z"].double(), expected["z"], rtol=1e-4, atol=1e-4)
    assert torch.equal(found["y"], draws["y"])


def test_draws_of_another_shape_are_refused_by_the_name_of_their_site():
    prior = random_prior(2)
    base = base_space(lambda: pyro.sample("z", prior))
    with pytest.raises(ValueError, match=r"draws of site 'z_base' of shape \(\*, 2\), got \(5, 3"):
        base.samples({"z_base": torch.zeros(5, 3)})


def test_what_is_made_of_draws_leaves_the_generator_alone():
    prior = random_prior(2)

    def model():
        pyro.sample("y", dist.Normal(pyro.sample("z", prior).sum(-1), 1.0))

    before = torch.get_rng_state()
    base_space(model).samples({"z_base": torch.zeros(3, 2)})
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_of_a_prior_that_is_not_at_each_draw_are_refused():
    prior = random_prior(2)

    def model():
        if pyro.sample("a", dist.Normal(0.0, 1.0)) > 0:
            pyro.sample("z", prior)

    for a in ([1.0, -1.0], [-1.0, 1.0], [1.0, 1.0, -1.0, 1.0]):
        with pytest.raises(ValueError, match="'z' with one that depends on other sites"):
            base_space(model).samples({"a": torch.tensor(a), "z_base": torch.randn(len(a), 2)})


def test_a_prior_with_a_context_has_no_one_map_for_all_draws():
    likelihood = family()

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("z", likelihood.condition(x))

    with pytest.raises(ValueError, match="'z' with a context: use Predictive"):
        base_space(model).samples({"x": torch.randn(5, 2), "z_base": torch.randn(5, 2)})
