"""A model's log joint density for many draws at once: against Pyro's own potential energy."""

import math
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.distributions.transforms import AffineTransform, SigmoidTransform
from pyro.infer.autoguide import (
    AutoMultivariateNormal,
    AutoNormal,
    init_to_feasible,
    init_to_sample,
    init_to_value,
)
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.mcmc.util import initialize_model
from pyro.infer.reparam import SplitReparam
from pyro.nn import PyroModule, PyroSample
from torch.distributions import biject_to

from pyro_interpolant import (
    AmortizedInterpolant,
    AutoInterpolant,
    ConditionalInterpolantDistribution,
    conditional_interpolant_transform,
    fit_guide,
    importance,
    log_joint,
    neutra,
)
from pyro_interpolant.infer import LogJoint
from pyro_interpolant.infer.initialization import init_to_support
from pyro_interpolant.infer.log_density import evaluated_safely
from pyro_interpolant.infer.prior import prior_draws
from pyro_interpolant.infer.sites import unchecked
from pyro_interpolant.infer.validity import has_density

Y = torch.tensor([2.8, 0.8, -0.3, 0.7, -0.1, 0.1, 1.8, 1.2], dtype=torch.float64)


def plated():
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=Y)


def nested():
    with pyro.plate("columns", 3, dim=-1):
        scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
        with pyro.plate("rows", 2, dim=-2):
            x = pyro.sample("x", dist.Normal(0.0, scale))
            pyro.sample("y", dist.StudentT(3.0, x, 1.0), obs=torch.ones(2, 3))
    with pyro.plate("others", 4, dim=-2):
        pyro.sample("z", dist.Beta(2.0, 3.0))


def multivariate():
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5))
    with pyro.plate("rows", 5):
        pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=torch.arange(5.0))


def indexed():
    z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 0.5))
    pyro.sample("y", dist.Normal(z[0] * z[1] + z[2], 1.0), obs=torch.tensor(0.3))


def simplex():
    p = pyro.sample("p", dist.Dirichlet(torch.tensor([1.0, 2.0, 3.0])))
    with pyro.plate("rows", 4):
        q = pyro.sample("q", dist.Dirichlet(torch.ones(2)))
        pyro.sample("y", dist.Categorical(p), obs=torch.tensor([0, 1, 2, 2]))
        pyro.sample("x", dist.Categorical(q), obs=torch.tensor([0, 1, 1, 1]))


def correlated():
    factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    with pyro.plate("components", 3):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    tril = scale[..., None] * factor
    with pyro.plate("rows", 2):
        pyro.sample(
            "y",
            dist.MultivariateNormal(torch.zeros(3), scale_tril=tril[..., None, :, :]),
            obs=torch.ones(2, 3),
        )


def ordered():
    base = dist.Normal(0.0, 1.0).expand([3]).to_event(1)
    to_ordered = dist.transforms.OrderedTransform()
    cuts = pyro.sample("cuts", dist.TransformedDistribution(base, [to_ordered]))
    pyro.sample("y", dist.OrderedLogistic(torch.tensor(0.2), cuts), obs=torch.tensor(1))


def series():
    state = pyro.sample("x_0", dist.Normal(0.0, 1.0))
    drift = pyro.sample("drift", dist.Uniform(-1.0, 1.0))
    for t in range(1, 4):
        state = pyro.sample(f"x_{t}", dist.Normal(state + drift, 0.5))
        pyro.sample(f"y_{t}", dist.Normal(state.exp(), 1.0), obs=Y[t])


def listed():
    """A loop that collects scalars into one vector: right one at a time alone."""
    states = [pyro.sample("x_0", dist.Normal(0.0, 1.0))]
    for t in range(1, 3):
        states.append(pyro.sample(f"x_{t}", dist.Normal(states[-1], 0.5)))
    pyro.sample("y", dist.Normal(torch.stack(states), 1.0).to_event(1), obs=Y[:3])


def improper():
    x = pyro.sample("x", dist.ImproperUniform(constraints.positive, (), (2,)))
    pyro.sample("y", dist.Normal(x.sum(-1), 1.0), obs=torch.tensor(2.0))
    pyro.factor("decay", -x.sum(-1))


def dressed():
    """Masks, scales, factors and deterministic sites."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 4), poutine.scale(scale=2.5):
        b = pyro.sample("b", dist.Normal(a, 1.0))
        with poutine.mask(mask=torch.tensor([True, False, True, True])):
            pyro.sample("y", dist.Normal(b, 1.0), obs=Y[:4])
    pyro.deterministic("c", a.square())
    pyro.factor("f", -(a**4))
    with pyro.plate("vectors", 2):
        v = pyro.sample("v", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
        pyro.deterministic("w", 2 * v, event_dim=1)
        pyro.factor("g", -v.square().sum(-1))


def totalled():
    """A factor that sums over everything there is: wrong in a plate."""
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("f", -x.exp().sum())


class Net(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 2]).to_event(2))
        self.bias = PyroSample(dist.Normal(0.0, 1.0).expand([3]).to_event(1))

    def forward(self):
        hidden = torch.nn.functional.linear(torch.ones(2), self.weight, self.bias).tanh()
        pyro.sample("y", dist.Normal(hidden.sum(-1), 1.0), obs=torch.tensor(0.5))


def network():
    return Net()()


def parametric():
    scale = pyro.param("scale", torch.tensor(2.0), constraint=constraints.positive)
    x = pyro.sample("x", dist.Normal(0.0, scale))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(0.5))


MODELS = {
    "plated": (plated, "plate"),
    "nested": (nested, "plate"),
    "multivariate": (multivariate, "plate"),
    "indexed": (indexed, "vmap"),
    "simplex": (simplex, "plate"),
    "correlated": (correlated, "vmap"),
    "ordered": (ordered, "plate"),
    "series": (series, "plate"),
    "listed": (listed, "vmap"),
    "improper": (improper, "plate"),
    "dressed": (dressed, "plate"),
    "totalled": (totalled, "vmap"),
    "network": (network, "vmap"),
    "parametric": (parametric, "plate"),
}


def potential(model):
    """Return Pyro's own log density of one draw, sites by name, and its bijections."""
    _, energy, transforms, _ = initialize_model(InitMessenger(init_to_support)(model))
    return lambda values: -energy({k: transforms[k](v) for k, v in values.items()})


@pytest.fixture(params=MODELS)
def member(request):
    return MODELS[request.param]


def test_the_log_density_is_pyros_own(member):
    model, way = member
    density = log_joint(model)
    assert density.batching == way
    z = 0.7 * torch.randn(6, density.event_dim)
    one_by_one = potential(model)
    sites = density.unpack(z)
    expected = [one_by_one({k: v[i] for k, v in sites.items()}) for i in range(6)]
    assert torch.allclose(density(z), torch.stack(expected), rtol=1e-8, atol=1e-8)


MANY = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def observed_rows(loc):
    """Observe many rows, as one event."""
    pyro.sample("y", dist.Normal(loc, torch.ones(len(MANY))).to_event(1), obs=MANY)


def penalised():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("penalty", -2 * x[..., 1:].square().sum())
    observed_rows(0.01 * x[..., :1])


def counted():
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.factor("penalty", -x.square().sum(-1) / x.shape[0])
    observed_rows(0.01 * x[..., :1])


def shifted():
    x = pyro.sample("x", dist.Normal(torch.zeros(1), 1.0).to_event(1))
    observed_rows(x + 0.001 * x.sum())


def curved():
    """Right in a plate, and rounded."""
    x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    observed_rows(10 * (x.exp() / 3).sum(-1, keepdim=True) * torch.linspace(-1, 1, len(MANY)))


@pytest.mark.parametrize(
    ("model", "way"),
    [(penalised, "vmap"), (counted, "vmap"), (shifted, "vmap"), (curved, "plate")],
)
def test_a_small_error_does_not_hide_in_a_large_log_density(model, way):
    torch.set_default_dtype(torch.float32)
    assert log_joint(model).batching == way


def clamped_together(limit):
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        scale = torch.full_like(w, 9.0) if (w > limit).any() else torch.ones_like(w)
        pyro.sample("y", dist.Normal(w, scale), obs=torch.tensor(0.3))

    return model


def test_a_branch_on_any_far_draw_is_refused():
    with pytest.raises(ValueError, match="by plate site 'y' is off by"):
        log_joint(clamped_together(2.0))


def test_a_branch_on_any_draw_that_is_rarer_is_refused_where_there_is_one():
    density = log_joint(clamped_together(20.0))
    z = torch.randn(1000, 1)
    density.check(z)
    z[777] = 25.0
    with pytest.raises(ValueError, match="beside extreme draws"):
        density.check(z)
    with pytest.raises(ValueError, match="beside extreme draws"):
        importance(AutoInterpolant(clamped_together(20.0), init_scale=20.0), count=300)


def test_gradients_flow_row_by_row(member):
    model, _ = member
    density = log_joint(model)
    z = (0.7 * torch.randn(4, density.event_dim)).requires_grad_()
    (gradient,) = torch.autograd.grad(density(z).sum(), z)
    step = 1e-5 * torch.randn(4, density.event_dim)
    with torch.no_grad():
        slope = (density(z + step) - density(z - step)) / 2
    assert torch.allclose((gradient * step).sum(-1), slope, rtol=1e-4, atol=1e-9)


def test_many_draws_are_one_run_of_the_model(member):
    model, _ = member
    runs = []

    def counted():
        runs.append(1)
        return model()

    density = log_joint(counted)
    before = len(runs)
    with torch.no_grad():
        assert density(torch.zeros(1000, density.event_dim)).shape == (1000,)
    assert len(runs) == before + 1


def test_pack_inverts_unpack(member):
    model, _ = member
    density = log_joint(model)
    z = torch.randn(6, density.event_dim)
    sites = density.unpack(z)
    assert torch.allclose(density.pack(sites), z)
    by_chain = {k: v.reshape(2, 3, *v.shape[1:]) for k, v in sites.items()}
    assert torch.allclose(density.pack(by_chain), z)


def test_pieces_give_the_same_values():
    density = log_joint(plated)
    z = torch.randn(10, density.event_dim)
    expected = density(z)
    density.rows = 3
    assert torch.allclose(density(z), expected)


def test_a_guide_will_do_and_has_the_same_order():
    for guide in (AutoInterpolant(plated), AutoMultivariateNormal(plated)):
        density = log_joint(guide)
        assert isinstance(density, LogJoint)
        z = guide.get_posterior().sample((3,))
        assert torch.equal(density(z), log_joint(plated)(z))
        unpacked = density.unpack(z)
        for site, value in guide._unpack_latent(z[0]):
            constrained = torch.distributions.biject_to(site["fn"].support)(value)
            assert torch.allclose(unpacked[site["name"]][0], constrained)


def test_arguments_reach_the_model():
    def model(x, *, noise):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(slope * x, noise), obs=x)

    x = torch.arange(3.0)
    z = torch.randn(4, 1)
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + dist.Normal(z * x, 0.5).log_prob(x).sum(1)
    assert torch.allclose(log_joint(model, x, noise=0.5)(z), expected)


def test_outer_handlers_do_not_see_the_evaluation():
    density = log_joint(plated)
    trace = poutine.trace(lambda: density(torch.zeros(2, density.event_dim))).get_trace()
    assert list(trace.nodes) == ["_INPUT", "_RETURN"]


def test_it_draws_nothing_from_the_global_generator():
    guide = AutoInterpolant(plated, hidden_dims=(4,))
    guide()
    state = torch.get_rng_state()
    log_joint(guide)(torch.zeros(2, 10))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("model", [plated, indexed])
def test_float32(model):
    torch.set_default_dtype(torch.float32)
    density = log_joint(poutine.condition(model, data={"y": torch.tensor(0.3)}))
    assert density(torch.zeros(2, density.event_dim)).dtype == torch.float32


def test_draws_in_arrays_come_in_the_type_of_the_model():
    torch.set_default_dtype(torch.float32)
    columns = torch.eye(3)  # no product of matrices takes numbers of two types

    def line():
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(slopes @ columns, 1.0).to_event(1), obs=torch.ones(3))

    density = log_joint(line)
    z = torch.randn(4, 3)
    arrays = {"slopes": z.double().numpy()[::-1]}  # the strides are those of no tensor
    assert torch.equal(density(density.pack(arrays)), density(z.flip(0)))


# ---------------------------------------------------------------------------- where there is none


def test_not_a_number_is_minus_infinity():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", (1 - x).sqrt())

    values = log_joint(model)(torch.tensor([[0.5], [2.0]]))
    assert torch.isfinite(values[0])
    assert values[1] == -torch.inf


@pytest.mark.parametrize("way", ["plate", "vmap"])
def test_a_matrix_without_a_factor_spoils_no_other_draw(way):
    def model():
        r = pyro.sample("r", dist.Normal(0.0, 1.0))
        one = torch.ones_like(r)
        matrix = torch.stack((one, r, r, one), -1).reshape(*r.shape, 2, 2)
        fn = dist.MultivariateNormal(torch.zeros(2), matrix)
        pyro.sample("y", fn, obs=torch.ones(2))

    density = log_joint(model)
    density.batching = way
    values = density(torch.tensor([[0.5], [2.0], [-0.5]]))
    assert torch.isfinite(values).tolist() == [True, False, True]
    assert values[1] == -torch.inf
    assert torch.allclose(values[[0, 2]], density(torch.tensor([[0.5], [-0.5]])))


# ---------------------------------------------------------------------------------------- refusals


def shares(x):
    return torch.stack((1 - x, x), -1)


LIKELIHOODS = {
    "pareto": (lambda x: dist.Pareto(x.exp(), 2.0), torch.tensor([1.5, 2.0])),
    "threshold": (
        lambda x: dist.TransformedDistribution(dist.Exponential(1.0), [AffineTransform(x, 1.0)]),
        torch.tensor([0.3, 0.5]),
    ),
    "uniform": (lambda x: dist.Uniform(x, x + 1.0), torch.tensor([0.4, 0.9])),
    "uniform in a plane": (
        lambda x: dist.Uniform(x[..., None].expand(*x.shape, 2), x[..., None] + 1.0).to_event(1),
        torch.tensor([[0.4, 0.9], [0.6, 1.1]]),
    ),
    "poisson": (dist.Poisson, torch.tensor([0.0, 1.0])),
    "bernoulli": (dist.Bernoulli, torch.tensor([0.0, 1.0])),
    "gamma": (lambda x: dist.Gamma(x, 1.0), torch.tensor([0.2, 1.3])),
    "normal": (lambda x: dist.Normal(x, 1.0), torch.tensor([0.4, 0.9])),
    "log-normal": (lambda x: dist.LogNormal(x, 1.0), torch.tensor([0.4, 0.9])),
    "beta": (lambda x: dist.Beta(4 * x, 4 * (1 - x)), torch.tensor([0.02, 0.3])),
    "beta-binomial": (
        lambda x: dist.BetaBinomial(x, 1.0, total_count=torch.tensor(3.0)),
        torch.tensor([0.0, 1.0]),
    ),
    "chi-squared": (dist.Chi2, torch.tensor([0.2, 1.3])),
    "gamma-poisson": (lambda x: dist.GammaPoisson(x, 1.0), torch.tensor([2.0, 3.0])),
    "weibull": (lambda x: dist.Weibull(1.0, x), torch.tensor([0.2, 1.3])),
    "mixture": (
        lambda x: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2)),
            dist.Gamma(torch.stack((x, torch.ones_like(x)), -1), 1.0),
        ),
        torch.tensor([0.2, 1.3]),
    ),
    "categorical": (lambda x: dist.Categorical(shares(x)), torch.tensor([0.0, 1.0])),
    "one-hot": (lambda x: dist.OneHotCategorical(shares(x)), torch.eye(2)),
    "multinomial": (lambda x: dist.Multinomial(3, shares(x)), torch.tensor([[0.0, 3], [2, 1]])),
    "dirichlet": (lambda x: dist.Dirichlet(5 * shares(x)), torch.tensor([[0.2, 0.8], [0.5, 0.5]])),
    "dirichlet-multinomial": (
        lambda x: dist.DirichletMultinomial(5 * shares(x), 3),
        torch.tensor([[0.0, 3], [2, 1]]),
    ),
    "lkj": (lambda x: dist.LKJCholesky(2, x), torch.eye(2).expand(2, 2, 2)),
    "shares of a mixture": (
        lambda x: dist.MixtureSameFamily(
            dist.Categorical(shares(x)), dist.Normal(torch.stack((0 * x, 0 * x + 3), -1), 1.0)
        ),
        torch.tensor([0.2, 2.9]),
    ),
    "inflated": (
        lambda x: dist.ZeroInflatedPoisson(x.exp(), gate=torch.tensor(0.1)),
        torch.tensor([0.0, 2.0]),
    ),
}


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("way", ["plate", "vmap"])
def test_what_validation_refuses_has_no_density(name, way):
    if (name, way) == ("multinomial", "vmap"):
        pytest.skip("torch's formula of it indexes by a mask")
    fn, y = LIKELIHOODS[name]

    def model():
        x = pyro.sample("x", dist.Normal(0.3, 0.1))
        with pyro.plate("rows", 2):
            pyro.sample("y", fn(x.expand(2) if x.dim() == 0 else x), obs=y)

    density = log_joint(model)
    z = torch.linspace(-1.5, 2.5, 25)[:, None]
    expected = []
    for row in z:
        try:
            expected.append(validated(density, row))
        except ValueError:
            expected.append(torch.tensor(-math.inf))
    with unchecked():
        found = evaluated_safely(density.parts_by(way), z).sum(0)
    torch.testing.assert_close(found, torch.stack(expected))
    assert name in ("normal", "log-normal", "inflated") or not found.isfinite().all()
    assert found.isfinite().any()


MIXTURES = {  # of components that end at 2 and at x
    "silent": (lambda high: dist.Uniform(torch.zeros_like(high), high), True),
    "going on": (
        lambda high: dist.TransformedDistribution(
            dist.Exponential(torch.ones_like(high)), [AffineTransform(high, -1.0)]
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("way", ["plate", "vmap"])
def test_a_mixture_has_a_density_where_one_component_has(name, way):
    """Of components whose formulas go on outside it is there where all of them have one."""
    component, counts = MIXTURES[name]
    y = torch.tensor([0.5, 1.2])

    def model():
        x = pyro.sample("x", dist.Normal(1.5, 1.0))
        high = torch.stack((torch.full_like(x, 2.0), x), -1)
        with pyro.plate("rows", 2):
            halves = dist.Categorical(torch.ones(2))
            pyro.sample("y", dist.MixtureSameFamily(halves, component(high)), obs=y)

    with pyro.validation_enabled(is_validate=False):  # which would refuse what is off any of them
        start = init_to_value(values={"x": torch.tensor(1.5)})
        density = log_joint(AutoInterpolant(model, init_loc_fn=start))
        z = torch.tensor([[1.5], [1.0], [0.3]])
        found = evaluated_safely(density.parts_by(way), z).sum(0) - dist.Normal(1.5, 1.0).log_prob(
            z[:, 0]
        )
    if counts:  # by hand: 1/4 of the first, and 1/(2 x) of the second below x
        each = 0.25 + 0.5 / z * (y < z)
        torch.testing.assert_close(found, each.log().sum(1))
    else:
        assert found.isfinite().tolist() == [True, False, False]


class Own(dist.TorchDistribution):
    """N(loc, 1), of which its author wrote the density alone."""

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def log_prob(self, value):
        return dist.Normal(self.loc, 1.0).log_prob(value)


def test_a_share_may_be_zero():
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0)).clamp(0.0, 1.0)
        pyro.sample("y", dist.Categorical(torch.stack((w, 1 - w), -1)), obs=torch.tensor(1))

    z = torch.tensor([[-1.0], [0.5], [1.5]])
    expected = dist.Normal(0.0, 1.0).log_prob(z[:, 0])[:2] + torch.tensor([1.0, 0.5]).log()
    found = log_joint(model)(z)
    torch.testing.assert_close(found[:2], expected)
    assert found[2] < -30.0


def test_where_a_value_has_a_density_stays_beside_it_whatever_the_default_device():
    fn, value = dist.Gamma(torch.ones(2), torch.ones(2)), torch.tensor([1.0, -1.0])
    with torch.device("meta"):
        found = has_density(fn, value, mask=None, moved=True)
    assert found.tolist() == [True, False]


def test_a_distribution_without_constraints_has_a_density():
    def model(fn):
        pyro.sample("y", fn(pyro.sample("x", dist.Normal(0.0, 1.0))), obs=torch.tensor(0.5))

    z = torch.randn(4, 1)
    expected = log_joint(model, lambda x: dist.Normal(x, 1.0))(z)
    assert torch.allclose(log_joint(model, Own)(z), expected)


@pytest.mark.parametrize("inside", [False, True])
def test_rows_that_are_masked_out_may_have_any_value(inside):
    def model():
        x = pyro.sample("x", dist.Normal(0.3, 0.1))
        fn, seen = dist.Uniform(x, x + 1.0).expand([2]), torch.tensor([True, False])
        with pyro.plate("rows", 2), poutine.mask(mask=True if inside else seen):
            y = torch.tensor([0.4, 9.0])
            pyro.sample("y", fn.mask(seen) if inside else fn, obs=y)

    with pyro.validation_enabled(is_validate=False):
        found = log_joint(model)(torch.tensor([[0.3], [0.5]]))
    assert found.isfinite().tolist() == [True, False]


def test_a_site_that_is_masked_out_by_a_boolean_may_have_any_value_and_parameters():
    def model():
        x = pyro.sample("x", dist.Normal(0.3, 0.1))
        rows = x[..., None].expand(*x.shape, 2)
        masked = [dist.Poisson(1 - rows).mask(mask=False), dist.Exponential(1.0).expand([2])]
        pyro.sample("n", masked[0].to_event(1), obs=torch.ones(2))
        pyro.sample("y", masked[1].to_event(1).mask(mask=False), obs=0.5 - rows)

    z = torch.tensor([[0.3], [1.5]])
    expected = dist.Normal(0.3, 0.1).log_prob(z[:, 0])
    assert torch.allclose(log_joint(model)(z), expected)


SEEN = torch.tensor([True, False, True])


def partly_observed():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample("y", dist.Normal(a, 1.0), obs=Y[:3], obs_mask=SEEN)


def masked_latents():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3), poutine.mask(mask=SEEN), poutine.scale(scale=2.5):
        pyro.sample("b", dist.Normal(a, 1.0))


def masked_inside():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    fn = dist.Normal(a[..., None], 1.0).expand([*a.shape, 3]).mask(SEEN)
    pyro.sample("b", fn.to_event(1))


def flat():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        b = pyro.sample("b", dist.Normal(a, 1.0).mask(mask=False))
        pyro.factor("f", -b.abs())


@pytest.mark.parametrize("way", ["plate", "vmap"])
@pytest.mark.parametrize("model", [partly_observed, masked_latents, masked_inside, flat])
def test_rows_of_latents_that_are_masked_out_have_their_own_density(model, way):
    """So that the whole has an integral; not where a factor takes the place of a density."""
    density = log_joint(model)
    density.batching = way
    z = 0.7 * torch.randn(5, 4)
    a, b = z[:, 0], z[:, 1:]
    own = dist.Normal(a[:, None], 1.0).log_prob(b)
    rows = {
        partly_observed: own + torch.where(SEEN, dist.Normal(a[:, None], 1.0).log_prob(Y[:3]), 0),
        masked_latents: own * torch.where(SEEN, 2.5, 1.0),
        masked_inside: own,
        flat: -b.abs(),
    }[model]
    expected = dist.Normal(0.0, 1.0).log_prob(a) + rows.sum(-1)
    assert torch.allclose(density(z), expected)


def validated(density, row):
    values, log_det = density.sites.constrain(row)
    trace = poutine.trace(poutine.condition(density.model, values)).get_trace()
    return trace.log_prob_sum() + log_det


def of_a_mixture(components):
    weights = dist.Categorical(torch.tensor([0.3, 0.7]))
    return lambda: pyro.sample("x", dist.MixtureSameFamily(weights, components))


@pytest.mark.parametrize(
    ("dim", "options"),
    [
        (1, {"event_shape": ()}),
        (4, {"event_shape": (2, 2)}),
        (1, {"event_shape": (), "support": constraints.positive}),
        (2, {"support": constraints.interval(torch.zeros(2), torch.ones(2))}),
        (2, {"support": constraints.simplex}),
    ],
)
def test_a_latent_site_may_be_a_mixture_of_flows(dim, options):
    transform = conditional_interpolant_transform(dim, 1, (4,))
    family = ConditionalInterpolantDistribution(transform, **options).freeze()
    parts = family.condition(torch.tensor([[0.0], [1.0]]))
    z, bijection = torch.randn(1, dim), biject_to(parts.support)
    x = bijection(z)
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])), parts)
    expected = mixture.log_prob(x) + bijection.log_abs_det_jacobian(z, x)
    assert torch.allclose(log_joint(of_a_mixture(parts))(z), expected)


@pytest.mark.parametrize(
    ("components", "support"),
    [
        (dist.Normal(torch.tensor([-2.0, 2.0]), 0.5), constraints.real),
        (dist.Gamma(torch.tensor([1.0, 5.0]), 1.0), constraints.nonnegative),
        (dist.LogNormal(torch.zeros(2, 3), 0.5).to_event(1), constraints.positive),
        (dist.Dirichlet(torch.tensor([[1.0, 2.0, 3.0], [3.0, 3.0, 3.0]])), constraints.simplex),
    ],
)
@pytest.mark.parametrize("start", [init_to_sample, init_to_feasible])
def test_a_latent_site_may_be_a_mixture(components, support, start):
    model = of_a_mixture(components)
    guide = AutoInterpolant(model, hidden_dims=(4,), init_loc_fn=start)
    x = guide()["x"]
    fn = poutine.trace(model).get_trace().nodes["x"]["fn"]
    bijection = biject_to(support)
    z = bijection.inv(x)
    log_det = bijection.log_abs_det_jacobian(z, x).sum()
    found = log_joint(model)(z.reshape(1, -1))
    assert torch.allclose(found, fn.log_prob(x) + log_det)
    ((shape, known),) = guide.posterior.sites.values()
    assert (shape, type(known)) == (x.shape, type(support))  # which a file holds


@pytest.mark.parametrize("ends", [[1.0, 2.0], [[1.0] * 4, [2.0] * 4]])
def test_a_mixture_whose_components_have_other_bounds_is_refused(ends):
    high = torch.tensor(ends)
    components = dist.Uniform(torch.zeros_like(high), high).to_event(high.dim() - 1)
    with pytest.raises(
        ValueError, match="(?s)got site 'x' on Mixture.*: write .* an ImproperUnif"
    ):
        log_joint(of_a_mixture(components))


@pytest.mark.parametrize(
    "fn",
    [
        dist.VonMises(torch.zeros(2), 1.0).to_event(1),
        dist.MixtureSameFamily(
            dist.Categorical(torch.ones(2, 3)), dist.VonMises(torch.zeros(2, 3), 1.0)
        ).to_event(1),
    ],
    ids=["one", "of a mixture"],
)
def test_an_angle_whose_density_repeats_is_refused(fn):
    def model():
        a = pyro.sample("a", fn)
        pyro.sample("y", dist.VonMises(a.sum(-1), 20.0), obs=torch.tensor(3.0))

    with pytest.raises(ValueError, match="repeats with each turn"):
        log_joint(model)


@pytest.mark.parametrize(
    "part", [{"subsample_size": 3}, {"subsample": torch.arange(3)}], ids=["drawn", "given"]
)
def test_a_plate_that_subsamples_is_refused(part):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 8, **part) as rows:
            pyro.sample("y", dist.Normal(x, 1.0), obs=Y[rows])

    with pytest.raises(ValueError, match=r"plates \['rows'\] that subsample: call with"):
        log_joint(model)


def hidden():
    k = pyro.sample("k", dist.Bernoulli(0.5))
    x = pyro.sample("x", dist.Normal(3 * k, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(1.0))


def test_a_hidden_site_is_refused():
    with pytest.raises(ValueError, match="without noise, got two values for the same latent"):
        log_joint(poutine.block(hidden, hide=["k"]))


def test_randomness_of_the_models_own_is_refused():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", x * torch.rand(()))

    with pytest.raises(ValueError, match="randomness of the model's own"):
        log_joint(model)


def by_site():
    return pyro.sample("k", dist.Bernoulli(0.001))


def by_rand():
    return torch.rand(()) < 0.001


def in_place():
    noise = torch.zeros(())
    noise.exponential_(1e6)
    return (noise - 1e-5).clamp(min=0.0)


def by_branch():
    return torch.tensor(1.0 if bool(torch.rand(()) < 0.001) else 0.0)


def by_numpy():
    return torch.tensor(float(np.random.rand() < 0.001))


def by_random():
    return torch.tensor(float(random.random() < 0.001))


@pytest.mark.parametrize("event", [by_site, by_rand, in_place, by_branch, by_numpy, by_random])
def test_a_rare_event_is_refused(event):
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + 10.0 * event(), 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match="expected a log density without noise"):
        log_joint(poutine.block(model, hide=["k"]))


def test_draws_that_the_density_is_not_made_of_are_allowed():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        shift = pyro.param("shift", torch.randn(2))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(x + shift, 1.0), obs=torch.ones(2))
            pyro.sample("more", dist.Normal(x + shift, 1.0))

    density = log_joint(poutine.block(model, hide=["more"]))
    z = torch.randn(3, 1)
    assert torch.equal(density(z), density(z))


@pytest.mark.parametrize("fn", [dist.Bernoulli(0.5), dist.Poisson(3.0)])
def test_a_discrete_site_is_refused(fn):
    def model():
        pyro.sample("k", fn, infer={"enumerate": "parallel"})

    with pytest.raises(ValueError, match="got the discrete site 'k': marginalise it"):
        log_joint(model)


class WithoutSupport(Own):
    def sample(self, sample_shape=()):
        return self.loc.expand(torch.Size(sample_shape) + self.loc.shape).clone()


class OnSomething(WithoutSupport):
    support = constraints.dependent


@pytest.mark.parametrize("kind", [WithoutSupport, OnSomething])
@pytest.mark.filterwarnings("ignore:.* does not define `support`")
def test_a_latent_site_that_states_no_support_is_refused_by_its_name(kind):
    for ask in (log_joint, lambda model: AutoInterpolant(model)()):
        with pytest.raises(ValueError, match="bijection from real vectors .* got site 'x' on "):
            ask(lambda: pyro.sample("x", kind(torch.zeros(()))))


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_value_that_is_sampled_is_refused(shape):
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0).expand(shape).to_event())
        b = pyro.sample("b", dist.Delta(2 * a, event_dim=len(shape)))
        pyro.sample("y", dist.Normal(b, 1.0).to_event(), obs=torch.ones(shape))

    with pytest.raises(ValueError, match=r"'b' from a Delta.*write it as pyro.deterministic\('b'"):
        log_joint(model)


def test_a_sequential_plate_of_latent_sites_is_refused():
    def model():
        for i in pyro.plate("rows", 2):
            pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="latent site 'x_0' in the sequential plate 'rows'"):
        log_joint(model)


@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_a_support_that_depends_on_other_sites_is_refused(unit):
    def model():
        top = pyro.sample("top", dist.Gamma(3.0, 1.0 / unit))
        pyro.sample("x", dist.Uniform(0.0, top))

    with pytest.raises(ValueError, match="site 'x' to have a fixed support, got one that depends"):
        log_joint(model)


def test_a_site_that_was_latent_and_is_observed_now_is_refused():
    def model(y=None):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    guide = AutoInterpolant(model)
    guide()
    with pytest.raises(ValueError, match="site 'y' to be latent, as when .* got it observed: set"):
        log_joint(guide, torch.tensor(1.0))


@pytest.mark.parametrize(("before", "now"), [(1, 4), (4, 1), (4, 2)])
def test_a_plate_of_another_size_is_refused(before, now):
    def model(y):
        with pyro.plate("rows", len(y)):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    guide = AutoInterpolant(model)
    guide(Y[:before])
    with pytest.raises(ValueError, match=rf"'x' of shape \({before},\), .* got shape \({now},\)"):
        log_joint(guide, Y[:now])
    with pytest.raises(ValueError, match=rf"'x' of shape \({before},\), .* got shape \({now},\)"):
        neutra(guide)(Y[:now])


def test_a_structure_that_changes_is_refused():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        if abs(float(x)) > 1e-6:
            pyro.sample("z", dist.Normal(0.0, 1.0))

    guide = AutoInterpolant(model, init_loc_fn=init_to_value(values={"x": torch.tensor(0.0)}))
    with pytest.raises(ValueError, match=r"got a model with \['z'\] besides and without \[\]"):
        log_joint(guide)


def test_a_model_that_branches_on_values_is_refused():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", x if x.item() > 0 else -x)

    with pytest.raises(ValueError, match=r"by plate it fails with .*by vmap it fails with .*it"):
        log_joint(model)


class Simulated(dist.TorchDistribution):
    """What can be drawn, but has no density."""

    arg_constraints = {}
    support = constraints.real

    def sample(self, sample_shape=()):
        return torch.zeros(sample_shape)


def simulator():
    pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", Simulated(), obs=torch.tensor(0.3))


@pytest.mark.parametrize(
    "asks",
    [
        log_joint,
        lambda model: importance(AutoInterpolant(model)),
        lambda model: fit_guide(AutoInterpolant(model)),
    ],
    ids=["log_joint", "importance", "fit_guide"],
)
def test_a_site_without_a_density_is_named(asks):
    with pytest.raises(ValueError, match=r"got a Simulated at 'y', which has none: .*calibration"):
        asks(simulator)


def latent_simulator(y=None):
    x = pyro.sample("x", Simulated())
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@pytest.mark.parametrize(
    "guide",
    [
        lambda: AutoInterpolant(pyro.condition(latent_simulator, {"y": torch.tensor(0.3)})),
        lambda: AmortizedInterpolant(latent_simulator),
    ],
    ids=["one", "amortized"],
)
def test_a_latent_site_without_a_density_is_not_sent_to_simulations(guide):
    with pytest.raises(ValueError, match=r"got a Simulated at 'x', which .* pyro.deterministic$"):
        fit_guide(guide(), progress=False)


def test_why_a_site_has_no_density_is_said():
    class Marginal(Simulated):
        def log_prob(self, value):
            raise NotImplementedError("a sum over all paths")

    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", Marginal(), obs=torch.tensor(0.3))

    with pytest.raises(ValueError, match=r"Marginal at 'y', .* none \(a sum over all paths\): an"):
        log_joint(model)


def test_a_density_that_is_nowhere_finite_is_refused():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.full_like(x, -torch.inf))

    with pytest.raises(ValueError, match=r"finite log density .* got \[-inf, -inf, -inf\]: "):
        log_joint(model)


def test_the_users_validation_explains_bad_data():
    def model():
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        pyro.sample("y", dist.Bernoulli(p), obs=torch.tensor(2.0))

    with pytest.raises(ValueError, match="within the support"):
        log_joint(model)


@pytest.mark.parametrize("batching", ["plate", "vmap"])
@pytest.mark.parametrize(
    "noise", [dist.Exponential(2.0), dist.Gamma(1.0, 2.0), dist.Exponential(2.0).mask(mask=True)]
)
def test_data_that_latents_move_off_a_fixed_support_have_no_density(noise, batching):
    def model(y):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            pyro.sample("y", noise, obs=y - shift)

    y, z = torch.tensor([1.5, 2.5]), torch.tensor([[-3.0], [1.4], [1.6], [3.0]])
    density = log_joint(model, y)
    density.batching = batching
    wanted = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + 2 * math.log(2.0) - 2 * (y - z).sum(-1)
    assert torch.allclose(density(z)[:2], wanted[:2])
    assert bool((density(z)[2:] == -math.inf).all())


IMAGES = {
    "a clamped inverse": dist.TransformedDistribution(dist.Normal(0.0, 10.0), SigmoidTransform()),
    "squares": dist.Weibull(1.0, 2.0),
    "folded": dist.FoldedDistribution(dist.Normal(1.0, 1.0)),
    "behind another": dist.TransformedDistribution(
        dist.Normal(0.0, 10.0), [SigmoidTransform(), AffineTransform(0.0, 1.0)]
    ),
}


@pytest.mark.parametrize("batching", ["plate", "vmap"])
@pytest.mark.parametrize("name", IMAGES)
def test_data_that_latents_move_off_the_image_of_a_transform_have_no_density(name, batching):
    """Of a sigmoid's inverse, which is clamped, they had 13 nats more than on it."""

    def model():
        shift = pyro.sample("shift", dist.Normal(0.0, 0.1).expand([2]).to_event(1))
        fn = IMAGES[name].expand([2]).to_event(1)
        pyro.sample("y", fn, obs=torch.tensor([0.5, 0.4]) - shift)

    density = log_joint(model)
    density.batching = batching
    z = torch.tensor([[0.1, -0.1], [0.1, 2.0], [-0.4, 0.1]])
    assert density(z).isfinite().tolist() == [True, False, True]


def test_data_off_a_support_have_the_density_of_the_formula_where_they_are_not_validated():
    def model():
        rate = pyro.sample("rate", dist.Exponential(1.0))
        pyro.sample("y", dist.Poisson(rate, validate_args=False), obs=torch.tensor(2.5))

    assert bool(log_joint(model)(torch.zeros(3, 1)).isfinite().all())


def test_wrong_targets_and_shapes_are_refused():
    with pytest.raises(TypeError, match="expected a model, or a guide over one .* got AutoNormal"):
        log_joint(AutoNormal(plated))
    with pytest.raises(TypeError, match="got int"):
        log_joint(3)
    density = log_joint(plated)
    for z in (torch.zeros(10), torch.zeros(2, 9)):
        with pytest.raises(ValueError, match=r"expected z of shape \(N, 10\), got"):
            density(z)


@pytest.mark.parametrize("batching", ["plate", "vmap"])
def test_of_no_draws_there_are_no_densities(batching):
    density = log_joint(plated)
    density.batching = batching
    z = torch.zeros(0, 10, requires_grad=True)
    assert density(z).shape == (0,)
    density(z).sum().backward()
    assert z.grad.shape == z.shape


@pytest.mark.parametrize("dim", [None, -1])
def test_an_enclosing_plate_is_not_the_model_s(dim):
    """The model's own would be to the left of it, or collide with it."""

    def model(y):
        with pyro.plate("rows", 5, dim=dim):
            x = pyro.sample("x", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(x, 2.0), obs=y)

    y, z = torch.arange(5.0), torch.randn(3, 5)
    exact = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 2.0).log_prob(y)
    outside = log_joint(model, y)
    with pyro.plate("outer", 3):
        inside = log_joint(model, y)
        for density in (outside, inside):
            assert torch.allclose(density(z), exact.sum(-1))
        assert prior_draws(inside, 10).shape == (10, 5)
    assert torch.allclose(inside(z), exact.sum(-1))


def test_draws_that_do_not_fit_are_refused():
    density = log_joint(plated)
    draws = density.unpack(torch.randn(5, 10))
    some = {k: v for k, v in draws.items() if k != "tau"}
    with pytest.raises(ValueError, match=r"site 'tau' of shape \(N\), as .* got none"):
        density.pack(some)
    with pytest.raises(ValueError, match=r"site 'theta' of shape \(N, 8\), .* got shape \(5, 7\)"):
        density.pack({**draws, "theta": torch.zeros(5, 7)})
    with pytest.raises(ValueError, match="as many draws of every site, got {'mu': 5, 'tau': 4"):
        density.pack({**draws, "tau": torch.ones(4)})
    with pytest.raises(ValueError, match="site 'tau': expected values strictly inside"):
        density.pack({**draws, "tau": -torch.ones(5)})


def test_improper_priors_start_at_the_centre_unless_told_otherwise():
    value = poutine.trace(AutoInterpolant(improper)).get_trace().nodes["x"]["value"]
    assert value.shape == (2,)
    with pytest.raises(ValueError, match="discrete site"):
        AutoInterpolant(hidden, init_loc_fn=init_to_sample)()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_data_far_in_the_tail_of_a_gumbel_have_a_density(dtype):
    def model(y):
        loc = pyro.sample("loc", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
        pyro.sample("y", dist.Gumbel(loc, 1.0), obs=y)

    z = torch.tensor([[-40.0], [6.8], [0.0]], dtype=dtype)
    found = log_joint(model, torch.zeros((), dtype=dtype))(z)
    exact = dist.Normal(0.0, 1.0).log_prob(z[:, 0]) + dist.Gumbel(z[:, 0], 1.0).log_prob(
        0.0 * z[0]
    )
    assert torch.allclose(found, exact)


def test_priors_that_draw_in_place_are_drawn_under_vmap():
    def model():
        z = pyro.sample("z", dist.Normal(1000.0, 50.0).expand([2]).to_event(1))
        tau = pyro.sample("tau", dist.HalfCauchy(5.0))
        pyro.sample("y", dist.Normal(z[0] + z[1], tau), obs=torch.tensor(2100.0))

    density = log_joint(model)
    assert density.batching == "vmap"
    draws = prior_draws(density, 200)
    assert abs(float(draws[:, :2].mean()) - 1000) < 20
    assert len(draws[:, 2].unique()) > 190


def test_priors_that_cannot_be_drawn_under_vmap_are_drawn_one_by_one():
    def model():  # torch draws no shares under vmap
        share = pyro.sample("share", dist.Beta(2.0, 2.0))
        z = pyro.sample("z", dist.Normal(1000.0, 50.0).expand([2]).to_event(1))
        pyro.sample("y", dist.Normal(share * z[0] + z[1], 1.0), obs=torch.tensor(1500.0))

    density = log_joint(model)
    assert density.batching == "vmap"
    draws = prior_draws(density, 4000)
    assert abs(float(draws[:, 1:].mean()) - 1000) < 20
    assert abs(float(draws[:, 1:].std()) - 50) < 10
    assert len(draws[:, 0].unique()) > 90


def test_priors_that_a_reparametrisation_draws_outside_of_plates_are_drawn_one_by_one():
    def model():
        z = pyro.sample("z", dist.Normal(1000.0, 50.0).expand([4]).to_event(1))
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=torch.ones(4))

    density = log_joint(poutine.reparam(model, config={"z": SplitReparam([1, 3], -1)}))
    assert density.batching == "plate"
    draws = prior_draws(density, 4000)
    assert abs(float(draws.mean()) - 1000) < 20
    assert abs(float(draws.std()) - 50) < 10


def test_prior_draws_do_not_run_what_follows_the_latents():
    calls = []

    def model(x):
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            calls.append((b[..., None] * x if b.dim() == 0 else b * x).numel())
            pyro.sample("y", dist.Normal(b * x, 1.0), obs=x)

    density = log_joint(model, torch.randn(50))
    calls.clear()
    assert prior_draws(density, 4000).shape == (4000, 1)
    assert calls == [] or max(calls) < 4000 * 50
