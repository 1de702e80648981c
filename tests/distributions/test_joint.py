"""Named sites learned together: packing, models, errors, and a posterior used as a prior."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import random_flow
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, Predictive
from pyro.ops.stats import effective_sample_size

import pyro_interpolant as pi
from pyro_interpolant.distributions.joint import log_det_of_sites

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
    return pi.JointInterpolantDistribution(flow, sites=sites, **kwargs)


def quick(draws, **kwargs):
    """Return a joint distribution that is barely trained."""
    return pi.from_samples(draws, steps=2, progress=False, seed=0, **kwargs)


def supports_of(*names):
    return {n: SITES[n][1] for n in names if SITES[n][1] is not constraints.real}


SPACES = pytest.mark.parametrize("space", [lambda m: m, pi.base_space], ids=["data", "base"])


# ----------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("names", [tuple(SITES), ("weights", "scalar"), ("vector",)])
def test_pack_and_unpack(names):
    d, draws = joint(*names), draws_of(*names)
    packed = d.pack(draws)
    assert packed.shape == (50, sum(SIZES[n] for n in names)) == (50, d.event_shape[0])
    again = d.unpack(packed)
    assert list(again) == list(names)
    for name in names:
        assert torch.allclose(again[name], draws[name])
    assert torch.allclose(d.pack(again), packed)
    for name, value in d.unpack(packed.reshape(5, 10, -1)).items():
        assert torch.equal(value.flatten(0, 1), again[name])
    single = joint("vector", "scalar")
    packed = single.pack({"scalar": torch.tensor(7.0), "vector": torch.arange(3.0)})
    assert packed.tolist() == [0.0, 1.0, 2.0, 7.0]  # in the order of the sites


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


def test_the_density_is_that_of_the_packed_vector():
    d = joint("scalar", "scales")
    x = d.sample((5,))
    torch.testing.assert_close(d.log_prob(d.pack(d.unpack(x))), d.log_prob(x))
    large = d.expand((4,))
    sites = large.unpack(large.sample())
    assert (sites["scalar"].shape, sites["scales"].shape) == ((4,), (4, 2))


# --------------------------------------------------------------------------------------- in models


def test_sample_sites():
    d = joint(*SITES)
    trace = poutine.trace(lambda: d.sample_sites("theta")).get_trace()
    trace.compute_log_prob()
    assert trace.stochastic_nodes == ["theta"]
    returned = trace.nodes["_RETURN"]["value"]
    for name, (shape, support) in SITES.items():
        node = trace.nodes[name]
        assert node["infer"]["_deterministic"]
        assert node["value"].shape == shape
        assert node["fn"].event_dim == len(shape)
        assert support.check(node["value"]).all()
        assert torch.equal(node["value"], returned[name])
    expected = d.log_prob(trace.nodes["theta"]["value"].clone())
    assert torch.allclose(trace.log_prob_sum(), expected, atol=1e-2)


def grouped(prior, y=None, plates=None):
    """Return a site that comes whole, used in its plate."""
    scales = prior.sample_sites("theta", plates=plates)["scales"]
    with pyro.plate("groups", 2):
        pyro.sample("y", dist.Normal(0.0, scales), obs=y)
    return scales


@SPACES
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


def test_plates_that_are_refused():
    d = joint("scalar", "scales")
    for plates in ({"scales": 2}, {"none": 1}):
        with pytest.raises(ValueError, match="expected plates of sites among"):
            d.sample_sites("theta", plates=plates)
    with (
        pyro.plate("groups", 2),
        pytest.raises(ValueError, match=r"outside of the 1 plates of site 'scales'.*\(2,\)"),
    ):
        d.sample_sites("theta", plates={"scales": 1})


@SPACES
def test_named_sites_can_be_fixed(space):
    d = joint("scalar", "scales").freeze()

    def model():
        sites = d.sample_sites("theta")
        return pyro.sample("y", dist.Delta(100 * sites["scalar"] + sites["scales"].sum(-1)))

    given = {"scalar": torch.tensor(5.0), "scales": torch.tensor([1.0, 2.0])}
    for fix in (poutine.do, poutine.condition):
        assert fix(space(model), given)() == 503
        assert space(fix(model, given))() == 503


@SPACES
@pytest.mark.parametrize("parallel", [False, True])
def test_draws_by_name_reach_the_model(space, parallel):
    d = joint("scalar", "scales").freeze()

    def model():
        pyro.sample("y", dist.Normal(100 * d.sample_sites("theta")["scalar"], 1e-3))

    draws = {"scalar": torch.arange(3.0)}
    y = Predictive(space(model), draws, parallel=parallel)()["y"]
    assert torch.allclose(y, 100 * draws["scalar"], atol=0.1)


@pytest.mark.parametrize(
    ("space", "name"),
    [(lambda m: m, "theta"), (pi.base_space, "theta_base")],
    ids=["data", "base"],
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


# -------------------------------------------------------------------------------------- from draws


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_from_samples(dtype):
    draws = {name: value.to(dtype) for name, value in draws_of(*SITES, rows=100).items()}
    d = quick(draws, support=supports_of(*SITES))
    assert isinstance(d, pi.JointInterpolantDistribution)
    assert list(d.sites) == list(SITES)
    assert not any(p.requires_grad for p in d.transform.parameters())
    sites = d.unpack(d.sample((200,)))
    for name, (shape, support) in SITES.items():
        assert sites[name].shape == (200, *shape)
        assert sites[name].dtype == dtype
        assert support.check(sites[name]).all()
    # Whitening alone gives the packed mean and covariance, near enough.
    packed, drawn = d.pack(draws), d.sample((2000,))
    assert d.log_prob(packed).dtype == dtype
    sd = packed.std(0)
    assert ((packed.mean(0) - drawn.mean(0)).abs() < 0.4 * sd).all()
    assert ((drawn.std(0) / sd - 1).abs() < 0.3).all()


# ------------------------------------------------------------------------------------------ errors

ONES = torch.ones(50, 3)
REFUSED = {  # named draws, supports, and the message
    "nothing": ({}, {}, "expected named draws"),
    "unknown site": ({"a": ONES}, {"b": constraints.positive}, r"sites among \['a'\].*\['b'\]"),
    "lengths": ({"a": ONES, "b": ONES[:40]}, {}, "as many draws of every site.*'a': 50.*40"),
    "not a number": (
        {"a": ONES.index_fill(0, torch.tensor([7]), torch.nan)},
        {},
        "finite site 'a'.*1 of 50 rows.*row 7",
    ),
    "off the support": (
        {"a": ONES[:, 0].index_fill(0, torch.tensor([3, 8]), 0.0)},
        {"a": constraints.positive},
        "site 'a'.*got 2 of 50 rows.*first being row 3",
    ),
    "two bounds": (
        {"a": ONES},
        {"a": constraints.greater_than(torch.zeros(2))},
        r"shape \(3,\), got GreaterThan",
    ),
    "sphere": ({"a": ONES}, {"a": constraints.sphere}, "^site 'a': expected a support"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_draws_that_are_refused(name):
    draws, support, message = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=message):
        quick(draws, support=support)


def test_values_that_are_refused():
    d, x = joint("scalar", "scales"), torch.ones(5, 3)
    with pytest.raises(TypeError, match=r"packed vectors.*log_prob\(joint.pack\("):
        d.log_prob(d.unpack(x))
    size = r"site 'scales' of shape \(\*, 2\), got "
    for sites, message in (
        ({"scalar": x[:, 0]}, size + "none"),
        ({"scalar": x[:, 0], "scales": x}, size + r"shape \(5, 3\)"),
        ({"scalar": x[:, 0], "scales": x[:3, 1:]}, r"one batch shape, got \{'scalar': \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            d.pack(sites)
    with pytest.raises(ValueError, match=r"a value of shape \(\*, 3\), got \(5, 2\)"):
        d.unpack(x[:, :2])
    with pytest.raises(ValueError, match="expected a flow of dimension 3, got 4"):
        pi.JointInterpolantDistribution(random_flow(4), sites=d.sites)


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
    network = pi.VelocityMLP(2, (16, 16))
    prior = pi.from_samples(
        draws, steps=300, batch_size=256, network=network, progress=False, seed=0
    )
    prior.transform.solver = pi.FixedGrid(3, "midpoint")  # the flow is all but Gaussian

    def model():
        with pyro.plate("copies", 8, dim=-1):  # independent: as many draws a step
            sites = prior.sample_sites("theta")
            loc = torch.cat((sites["shift"], sites["rest"]), dim=-1)
            with pyro.plate("rows", len(second), dim=-2):
                seen = second[:, None].expand(-1, 8, -1)
                pyro.sample("x", dist.Normal(loc, noise).to_event(1), obs=seen)

    mcmc = MCMC(NUTS(pi.base_space(model)), num_samples=60, warmup_steps=50, disable_progbar=True)
    mcmc.run()
    sites = Predictive(pi.base_space(model), mcmc.get_samples())()
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
