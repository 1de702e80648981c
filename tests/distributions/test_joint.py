"""Named sites learned together: packing, models, errors, and a posterior used as a prior."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import random_flow
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_dependencies
from pyro.ops.stats import effective_sample_size
from pyro.optim import Adam

from pyro_interpolant import (
    FixedGrid,
    JointInterpolantDistribution,
    VelocityMLP,
    base_space,
    fit,
    from_samples,
)
from pyro_interpolant.distributions.joint import log_det_of_sites, pack, sites_of

# Raised inside torch, by its own first use of forward-mode differentiation.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

SITES = {
    "scalar": ((), constraints.real),
    "vector": ((3,), constraints.real),
    "matrix": ((2, 2), constraints.real),
    "scale": ((), constraints.positive),
    "scales": ((2,), constraints.positive),
    "weights": ((3,), constraints.simplex),
    "factor": ((3, 3), constraints.corr_cholesky),
    "ordered": ((2,), constraints.ordered_vector),
}
SIZES = dict(zip(SITES, (1, 3, 4, 1, 2, 2, 3, 2), strict=True))


def draws_of(*names, rows=50):
    """Return draws, each ``(N, *site_shape)``, on the supports of the named sites."""
    draws = {}
    for name in names:
        shape, support = SITES[name]
        bijection = torch.distributions.biject_to(support)
        draws[name] = bijection(torch.randn(rows, *bijection.inverse_shape(torch.Size(shape))))
        assert draws[name].shape == (rows, *shape)
    return draws


def joint(*names, **kwargs):
    sites = {name: SITES[name] for name in names}
    flow = random_flow(sum(SIZES[name] for name in names))
    return JointInterpolantDistribution(flow, sites=sites, **kwargs)


def quick(draws, **kwargs):
    """Return a joint distribution that is barely trained."""
    return from_samples(draws, steps=2, progress=False, seed=0, **kwargs)


def supports_of(*names):
    return {n: SITES[n][1] for n in names if SITES[n][1] is not constraints.real}


# ----------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("names", [*[(n,) for n in SITES], tuple(SITES), ("weights", "scalar")])
def test_pack_and_unpack(names):
    d, draws = joint(*names), draws_of(*names)
    packed = d.pack(draws)
    assert packed.shape == (50, sum(SIZES[n] for n in names)) == (50, d.event_shape[0])
    again = d.unpack(packed)
    assert list(again) == list(names)
    for name in names:
        assert torch.allclose(again[name], draws[name])
    assert torch.allclose(d.pack(again), packed)


@pytest.mark.parametrize("batch", [(), (4, 5)])
def test_pack_with_any_batch(batch):
    d = joint(*SITES)
    packed = torch.randn(*batch, 18)
    sites = d.unpack(packed)
    for name, (shape, support) in SITES.items():
        assert sites[name].shape == (*batch, *shape)
        assert support.check(sites[name]).all()
    assert torch.allclose(d.pack(sites), packed)


def test_the_log_determinant_is_that_of_the_jacobian():
    d = joint("scale", "weights", "matrix", "ordered")

    def free(packed):
        sites = {**d.unpack(packed)}
        sites["weights"] = sites["weights"][:-1]  # the last is what is left of 1
        return torch.cat([value.flatten() for value in sites.values()])

    packed = torch.randn(2, 3, 9)
    found = log_det_of_sites(d.sites, packed)
    assert found.shape == (2, 3)
    for one, log_det in zip(packed.flatten(0, 1), found.flatten(), strict=True):
        exact = torch.autograd.functional.jacobian(free, one).slogdet().logabsdet
        torch.testing.assert_close(log_det, exact)


def test_bounds_of_a_site_have_its_shape():
    bounded = constraints.interval(torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"events of shape \(\), got Interval"):
        JointInterpolantDistribution(random_flow(1), sites={"a": ((), bounded)})
    with pytest.raises(ValueError, match=r"events of shape \(\), got Interval"):
        from_samples({"a": torch.rand(50)}, support={"a": bounded})
    two = constraints.greater_than(torch.zeros(2))
    with pytest.raises(ValueError, match=r"events of shape \(3,\), got GreaterThan"):
        JointInterpolantDistribution(random_flow(3), sites={"a": ((3,), two)})
    with pytest.raises(ValueError, match=r"events of shape \(3,\), got GreaterThan"):
        from_samples({"a": torch.rand(50, 3)}, support={"a": two})
    d = JointInterpolantDistribution(random_flow(2), sites={"a": ((2,), bounded)})
    assert d.sample_dict((5,))["a"].shape == (5, 2)


def test_values_of_sites_have_the_type_of_the_packed_vector():
    """Whatever the type of the bounds: packed again, they have a density."""
    bounds = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    sites = {"share": ((2,), constraints.interval(*bounds)), "mean": ((), constraints.real)}
    d = JointInterpolantDistribution(random_flow(3).float(), sites=sites)
    draws = d.sample_dict((5,))
    assert {value.dtype for value in draws.values()} == {torch.float32}
    assert d.log_prob(d.pack(draws)).dtype == torch.float32


def test_packing_order_is_that_of_the_sites():
    d = joint("vector", "scalar")
    packed = d.pack({"scalar": torch.tensor(7.0), "vector": torch.arange(3.0)})
    assert packed.tolist() == [0.0, 1.0, 2.0, 7.0]


def test_log_prob_is_that_of_the_packed_vector():
    d = joint("scalar", "scales")
    x = d.sample((5,))
    assert x.shape == (5, 3)
    assert d.log_prob(x).shape == (5,)
    torch.testing.assert_close(d.log_prob(d.pack(d.unpack(x))), d.log_prob(x))
    for ask in (d.log_prob, d.score):
        with pytest.raises(TypeError, match=r"packed vectors.*log_prob\(joint.pack\(draws\)\)"):
            ask(d.unpack(x))
    sites = {**draws_of("scalar", rows=5), **draws_of("scales", rows=3)}
    with pytest.raises(
        ValueError, match=r"one batch shape, got \{'scalar': \(5,\), 'scales': \(3,"
    ):
        d.pack(sites)


def test_expand_and_copy_keep_the_sites():
    d = joint("scalar", "scales").expand((4,))
    assert isinstance(d, JointInterpolantDistribution)
    sites = d.unpack(d.sample())
    assert sites["scalar"].shape == (4,)
    assert sites["scales"].shape == (4, 2)


# --------------------------------------------------------------------------------------- in models


def test_sample_sites():
    d = joint(*SITES)
    trace = poutine.trace(lambda: d.sample_sites("theta")).get_trace()
    trace.compute_log_prob()
    assert trace.stochastic_nodes == ["theta"]
    returned = trace.nodes["_RETURN"]["value"]
    assert list(returned) == list(SITES)
    for name, (shape, support) in SITES.items():
        node = trace.nodes[name]
        assert node["infer"]["_deterministic"]
        assert node["value"].shape == shape
        assert node["fn"].event_dim == len(shape)
        assert support.check(node["value"]).all()
        assert torch.equal(node["value"], returned[name])
    expected = d.log_prob(trace.nodes["theta"]["value"].clone())
    assert torch.allclose(trace.log_prob_sum(), expected, atol=1e-2)


def test_sample_sites_in_a_plate():
    d = joint("scalar", "scales", "factor")

    def model():
        with pyro.plate("rows", 4):
            return d.sample_sites("theta")

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    for name in ("scalar", "scales", "factor"):
        assert trace.nodes[name]["value"].shape == (4, *SITES[name][0])
        assert trace.nodes[name]["fn"].batch_shape == (4,)


def grouped(prior, y=None, plates=None):
    """Return a site that comes whole, used in its plate."""
    scales = prior.sample_sites("theta", plates=plates)["scales"]
    with pyro.plate("groups", 2):
        pyro.sample("y", dist.Normal(0.0, scales), obs=y)
    return scales


@pytest.mark.parametrize("space", [lambda m: m, base_space], ids=["data", "base"])
def test_a_site_of_a_plate_counts_once_for_each_of_many_particles(space):
    d, y = joint("scalar", "scales").freeze(), torch.tensor([0.3, -0.2])
    model = space(lambda: grouped(d, y, {"scales": 1}))
    with pyro.plate("particles", 3, dim=-2):
        trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    scales = trace.nodes["_RETURN"]["value"]
    assert scales.shape == trace.nodes["y"]["log_prob"].shape == (3, 2)
    assert torch.equal(trace.nodes["scales"]["value"], scales[:, None])
    assert poutine.trace(model).get_trace().nodes["_RETURN"]["value"].shape == (2,)


@pytest.mark.parametrize("parallel", [False, True])
def test_draws_by_name_reach_a_plate(parallel):
    d = joint("scalar", "scales").freeze()
    draws = {"scales": torch.tensor([[1e-4, 1e3], [1e3, 1e-4], [1e3, 1e-4]])}
    y = Predictive(lambda: grouped(d, None, {"scales": 1}), draws, parallel=parallel)()["y"]
    assert y.shape == (3, 2)
    assert torch.equal(y.abs() < 0.1, draws["scales"] < 1)


@pytest.mark.parametrize("plates", [{"scales": 2}, {"scales": -1}, {"none": 1}])
def test_plates_that_a_site_has_not_are_refused(plates):
    with pytest.raises(ValueError, match="expected plates of sites among"):
        joint("scalar", "scales").sample_sites("theta", plates=plates)


def test_a_site_inside_its_own_plate_already_is_refused():
    d = joint("scalar", "scales")
    with (
        pyro.plate("groups", 2),
        pytest.raises(ValueError, match=r"outside of the 1 plates of site 'scales'.*\(2,\)"),
    ):
        d.sample_sites("theta", plates={"scales": 1})


@pytest.mark.parametrize("space", [lambda m: m, base_space], ids=["data", "base"])
@pytest.mark.parametrize("fix", [poutine.do, poutine.condition])
def test_named_sites_can_be_fixed(space, fix):
    d = joint("scalar", "scales").freeze()

    def model():
        sites = d.sample_sites("theta")
        return pyro.sample("y", dist.Delta(100 * sites["scalar"] + sites["scales"].sum(-1)))

    given = {"scalar": torch.tensor(5.0), "scales": torch.tensor([1.0, 2.0])}
    assert fix(space(model), given)() == 503
    assert space(fix(model, given))() == 503


@pytest.mark.parametrize("space", [lambda m: m, base_space], ids=["data", "base"])
@pytest.mark.parametrize("parallel", [False, True])
def test_draws_by_name_reach_the_model(space, parallel):
    d = joint("scalar", "scales").freeze()

    def model():
        pyro.sample("y", dist.Normal(100 * d.sample_sites("theta")["scalar"], 1e-3))

    draws = {"scalar": torch.arange(3.0)}
    y = Predictive(space(model), draws, parallel=parallel)()["y"]
    assert torch.allclose(y, 100 * draws["scalar"], atol=0.1)


@pytest.mark.parametrize(
    ("space", "name"), [(lambda m: m, "theta"), (base_space, "theta_base")], ids=["data", "base"]
)
def test_packed_draws_outside_of_plates_are_not_mixed_in_parallel(space, name):
    """As many draws as rows: each row of predictions is of one draw."""
    d = joint("scalar", "scales").freeze()

    def model():
        scalar = d.sample_sites("theta")["scalar"]
        with pyro.plate("rows", 4):
            pyro.sample("y", dist.Normal(scalar, 1e-6))

    packed = torch.randn(4, 3)
    draws = {"theta": packed, "theta_base": d.transform.inv(packed)}
    y = Predictive(space(model), {name: draws[name]}, parallel=True)()["y"]
    assert torch.allclose(y, d.unpack(packed)["scalar"][:, None].expand(4, 4), atol=1e-3)


@pytest.mark.parametrize("space", [lambda m: m, base_space], ids=["data", "base"])
def test_what_depends_on_the_sites_is_told(space):
    """As ``render_model`` asks, by tensors that Pyro tracks: slices of their shape are tuples."""
    d = joint("scalar", "scales", "weights").freeze()

    def model():
        sites = d.sample_sites("theta", plates={"scales": 1})
        with pyro.plate("groups", 2):
            pyro.sample("y", dist.Normal(sites["scalar"], sites["scales"]), obs=torch.zeros(2))

    latent = "theta" if space(model) is model else "theta_base"
    assert latent in get_dependencies(space(model))["prior_dependencies"]["y"]


def test_named_draws():
    d = joint(*SITES).freeze()
    for batch in ((), (4,)):
        draws = d.expand(batch).sample_dict((5,))
        assert list(draws) == list(SITES)
        for name, (shape, support) in SITES.items():
            assert draws[name].shape == (5, *batch, *shape)
            assert support.check(draws[name]).all()
    pyro.set_rng_seed(0)
    named = d.sample_dict()
    pyro.set_rng_seed(0)
    assert torch.allclose(d.pack(named), d.sample())


def test_its_repr_names_the_sites():
    text = repr(joint("scalar", "scales").expand((4,)))
    assert text == (
        "JointInterpolantDistribution(sites={scalar: () on Real(), scales: (2,) on "
        "GreaterThan(lower_bound=0.0)}, batch_shape=(4,))"
    )


@pytest.mark.parametrize("space", [lambda m: m, base_space], ids=["data", "base"])
@pytest.mark.parametrize("vectorized", [False, True])
def test_svi(space, vectorized):
    prior = joint("scalar", "vector", "scale").freeze()

    def model():
        sites = prior.sample_sites("theta")
        loc = sites["scalar"] + sites["vector"].sum(-1)
        pyro.sample("x", dist.Normal(loc, sites["scale"]), obs=torch.tensor(1.0))

    model = space(model)
    guide = AutoNormal(model)
    elbo = Trace_ELBO(
        num_particles=3 if vectorized else 1, vectorize_particles=vectorized, max_plate_nesting=0
    )
    svi = SVI(model, guide, Adam({"lr": 0.01}), elbo)
    assert torch.isfinite(torch.tensor([svi.step() for _ in range(2)])).all()


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    d = joint("scalar", "scales", "factor")
    draws = Predictive(lambda: d.sample_sites("theta"), num_samples=6, parallel=parallel)()
    for name in ("scalar", "scales", "factor"):
        assert draws[name].shape == (6, *SITES[name][0])
        assert SITES[name][1].check(draws[name]).all()
    assert draws["theta"].shape == (6, 6)


def test_base_space_keeps_the_names():
    d = joint("scalar", "scales")
    trace = poutine.trace(base_space(lambda: d.sample_sites("theta"))).get_trace()
    assert trace.stochastic_nodes == ["theta_base"]
    assert {"theta", "scalar", "scales"} <= set(trace.observation_nodes)


# -------------------------------------------------------------------------------------- from draws


@pytest.mark.slow
@pytest.mark.parametrize("names", [("scalar",), ("vector",), ("scalar", "matrix"), tuple(SITES)])
def test_from_samples(names):
    draws = draws_of(*names, rows=100)
    d = quick(draws, support=supports_of(*names))
    assert isinstance(d, JointInterpolantDistribution)
    assert list(d.sites) == list(names)
    assert d.event_shape == (sum(SIZES[n] for n in names),)
    assert not any(p.requires_grad for p in d.transform.parameters())
    sites = d.unpack(d.sample((200,)))
    for name in names:
        assert sites[name].shape == (200, *SITES[name][0])
        assert SITES[name][1].check(sites[name]).all()
    # Whitening alone gives the packed mean and covariance, near enough.
    packed, drawn = d.pack(draws), d.sample((2000,))
    sd = packed.std(0)
    assert ((packed.mean(0) - drawn.mean(0)).abs() < 0.4 * sd).all()
    assert ((drawn.std(0) / sd - 1).abs() < 0.3).all()


@pytest.mark.slow
def test_from_samples_in_float32():
    draws = {k: v.float() for k, v in draws_of("vector", "scales", rows=100).items()}
    d = quick(draws, support=supports_of("scales"))
    assert d.sample().dtype == torch.float32
    assert d.log_prob(d.pack(draws)).dtype == torch.float32


def test_fit_takes_named_draws():
    d = joint("vector", "scales")
    fit(d, draws_of("vector", "scales", rows=100), steps=2, progress=False, seed=0)
    assert ((d.transform.flow.loc - torch.zeros(5)).abs() < 0.5).all()


@pytest.mark.slow
def test_from_samples_is_reproducible():
    draws = draws_of("vector", "scales", rows=100)
    a, b = (quick(draws, support=supports_of("scales")) for _ in range(2))
    x = a.pack(draws)
    assert torch.equal(a.log_prob(x), b.log_prob(x))


# ------------------------------------------------------------------------------------------ errors


def test_flow_of_another_size_raises():
    with pytest.raises(ValueError, match="expected a flow of dimension 5, got 4"):
        JointInterpolantDistribution(
            random_flow(4), sites={"vector": SITES["vector"], "scales": SITES["scales"]}
        )


def test_support_of_an_unknown_site_raises():
    with pytest.raises(ValueError, match=r"supports of sites among \['vector'\].*\['other'\]"):
        quick(draws_of("vector"), support={"other": constraints.positive})


def test_no_sites_raises():
    with pytest.raises(ValueError, match="expected named draws"):
        quick({})


def test_one_support_for_named_draws_raises():
    with pytest.raises(TypeError, match="supports of named draws as a dictionary"):
        quick(draws_of("vector"), support=constraints.positive)


def test_named_supports_for_one_tensor_raise():
    with pytest.raises(TypeError, match=r"one support.* a dictionary: .*stack.* dict\(frame\)"):
        quick(torch.randn(50, 2), support={"x": constraints.positive})


def test_differing_lengths_raise():
    draws = {**draws_of("vector"), **draws_of("scales", rows=40)}
    with pytest.raises(ValueError, match="as many draws of every site.*'vector': 50.*40"):
        quick(draws, support=supports_of("scales"))


def test_integer_draws_raise():
    with pytest.raises(TypeError, match="site 'vector' of a floating type, got torch.int64"):
        quick({"vector": torch.ones(50, 3, dtype=torch.long)})


def test_draws_that_are_no_tensors_raise():
    with pytest.raises(TypeError, match="site 'vector'"):
        quick({"vector": "three"})


def test_non_finite_draws_raise():
    draws = draws_of("vector")
    draws["vector"][7, 1] = float("nan")
    with pytest.raises(ValueError, match="finite site 'vector'.*1 of 50 rows.*row 7"):
        quick(draws)


def test_draws_outside_the_support_raise():
    draws = draws_of("vector", "scales")
    draws["scales"][[3, 8]] *= -1
    with pytest.raises(ValueError, match="site 'scales'.*got 2 of 50 rows.*first being row 3"):
        quick(draws, support=supports_of("scales"))


def test_the_row_of_a_scalar_site_is_named():
    scale = torch.ones(100) + torch.rand(100)
    scale[[50, 60]] = 0.0
    with pytest.raises(ValueError, match="site 'scale'.*got 2 of 100 rows.*first being row 50"):
        quick({"scale": scale}, support={"scale": constraints.positive})


def test_support_without_a_bijection_raises():
    with pytest.raises(ValueError, match="expected a support"):
        quick(draws_of("vector"), support={"vector": constraints.sphere})


def test_missing_site_raises():
    d = joint("vector", "scales")
    with pytest.raises(ValueError, match=r"site 'scales' of shape \(\*, 2\), got none"):
        d.pack(draws_of("vector"))


def test_site_of_another_shape_raises():
    d = joint("vector", "scales")
    draws = {**draws_of("vector"), "scales": torch.ones(50, 3)}
    with pytest.raises(ValueError, match=r"site 'scales' of shape \(\*, 2\), got shape \(50, 3\)"):
        d.pack(draws)
    with pytest.raises(ValueError, match=r"site 'vector' of shape \(\*, 3\), got shape \(\)"):
        d.pack({"vector": torch.tensor(1.0)})


# -------------------------------------------------------------------------- a posterior as a prior


def posterior(loc, covariance, data, noise):
    """Return the moments of a Gaussian mean given data of known noise, in closed form."""
    precision = torch.linalg.inv(covariance)
    given = len(data) / noise**2 * torch.eye(2)
    updated = torch.linalg.inv(precision + given)
    return updated @ (precision @ loc + data.sum(0) / noise**2), updated


@pytest.mark.slow
def test_posterior_as_prior():
    """Two batches in turn give what both give together: a conjugate model, in closed form."""
    noise = 1.5
    truth = torch.tensor([2.0, -1.0])
    data = truth + noise * torch.randn(12, 2)
    first, second = data[:6], data[6:]
    after_first = posterior(torch.zeros(2), 4.0 * torch.eye(2), first, noise)
    exact = dist.MultivariateNormal(*after_first).sample((3000,))
    draws = {"shift": exact[:, :1], "rest": exact[:, 1:]}
    network = VelocityMLP(2, (16, 16))
    prior = from_samples(draws, steps=300, batch_size=256, network=network, progress=False, seed=0)
    prior.transform.solver = FixedGrid(3, "midpoint")  # the flow is all but Gaussian

    def model():
        with pyro.plate("copies", 8, dim=-1):  # independent: as many draws a step
            sites = prior.sample_sites("theta")
            loc = torch.cat((sites["shift"], sites["rest"]), dim=-1)
            with pyro.plate("rows", len(second), dim=-2):
                seen = second[:, None].expand(-1, 8, -1)
                pyro.sample("x", dist.Normal(loc, noise).to_event(1), obs=seen)

    mcmc = MCMC(NUTS(base_space(model)), num_samples=60, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    sites = Predictive(base_space(model), mcmc.get_samples())()
    found = torch.cat((sites["shift"], sites["rest"]), dim=-1)
    mean, covariance = posterior(torch.zeros(2), 4.0 * torch.eye(2), data, noise)
    found = found.reshape(60, 8, 2)
    ess = effective_sample_size(found.transpose(0, 1)).clamp(max=480.0)
    found = found.flatten(0, 1)
    sd = covariance.diagonal().sqrt()
    # The flow learned its own mean from 3,000 draws: that error comes on top.
    learned = 3 * after_first[1].diagonal().sqrt() / 3000**0.5
    assert ((found.mean(0) - mean).abs() < 4.5 * sd / ess.sqrt() + learned).all()
    assert ((found.std(0) / sd - 1).abs() < 0.15).all()


def test_packed_vectors_of_another_size_are_refused():
    joint = JointInterpolantDistribution(random_flow(3), sites={"a": ((3,), constraints.real)})
    with pytest.raises(ValueError, match=r"expected a value of shape \(\*, 3\), got \(4,\)"):
        joint.unpack(torch.zeros(4))
    with pytest.raises(TypeError, match="a value that is a tensor, got list"):
        joint.unpack([0.0, 1.0, 2.0])


@pytest.mark.parametrize("support", [constraints.lower_cholesky, "positive"])
def test_the_site_whose_support_cannot_be_learned_is_named(support):
    draws = {"a": torch.randn(5), "scale": torch.randn(5, 2, 2)}
    with pytest.raises((TypeError, ValueError), match="^site 'scale': expected "):
        sites_of(draws, {"scale": support})


def test_named_draws_may_be_nested_lists():
    draws = {"m": torch.randn(5, 2).tolist(), "s": torch.randn(5).tolist()}
    sites = sites_of(draws, {"m": constraints.real})
    assert {name: tuple(shape) for name, (shape, _) in sites.items()} == {"m": (2,), "s": ()}
    assert torch.equal(pack(sites, draws)[:, :2], torch.tensor(draws["m"]))
