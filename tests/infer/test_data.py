"""Which models have rows whose order no density tells: those learn from sets by themselves."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from simulators import QUICK, rows_of_a_normal, rows_with_errors

import pyro_interpolant as pi
from pyro_interpolant.nn import SetEmbedding

ROWS = 6
SHORT = {**QUICK, "options": {"steps": 3}}  # where nobody looks at what is learned


def mixture(y=None):
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    loc = pyro.sample("loc", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("rows", ROWS):
        parts = dist.Categorical(torch.stack((share, 1 - share), -1))
        pyro.sample("y", dist.MixtureSameFamily(parts, dist.Normal(loc, 0.5)), obs=y)


def vectors(y=None):
    tril = pyro.sample("tril", dist.LKJCholesky(2, 1.0))
    with pyro.plate("rows", ROWS):
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(2), scale_tril=tril), obs=y)


def pairs(x=None, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", ROWS):
        x = pyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1), obs=x)
        pyro.sample("y", dist.Normal(slope * x.sum(-1), 1.0), obs=y)


def coins(y=None):
    p = pyro.sample("p", dist.Beta(1.0, 20.0))
    with pyro.plate("rows", ROWS):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


def common_covariance(y=None):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    cov = scale[..., None, None] * (torch.ones(ROWS, ROWS) + torch.eye(ROWS))
    pyro.sample("y", dist.MultivariateNormal(torch.zeros(ROWS), cov), obs=y)


def one_by_one(y=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    assert float(loc) < 100
    with pyro.plate("rows", ROWS):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def rare_events(y=None):
    level = pyro.sample("level", dist.Normal(-5.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 0.01))
    with pyro.plate("rows", ROWS):
        logits = level + slope * torch.linspace(-1, 1, ROWS)
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def groups(y=None):
    with pyro.plate("groups", 2):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", ROWS):
        pyro.sample("y", dist.Normal(loc[..., torch.arange(ROWS) % 2], 1.0), obs=y)


def own_latents(y=None):
    with pyro.plate("rows", ROWS):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def series(y=None):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    lag = (torch.arange(ROWS)[:, None] - torch.arange(ROWS)).abs()
    pyro.sample(
        "y",
        dist.MultivariateNormal(torch.zeros(ROWS), scale[..., None, None] * (-lag / 3.0).exp()),
        obs=y,
    )


def wide(y=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 3):
        pyro.sample(
            "y", dist.Normal(loc[..., None], 1.0).expand([*loc.shape, 30]).to_event(1), obs=y
        )


def without_density(y=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.deterministic("y", loc + torch.randn(ROWS))


def single_row(y=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 1):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def sites_of_other_lengths(x=None, y=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("few", 2):
        pyro.sample("x", dist.Normal(loc, 1.0), obs=x)
    with pyro.plate("many", ROWS):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


def embedding_of(model, *observed):
    guide = pi.AmortizedInterpolant(model, observed or ("y",), hidden_dims=(8,))
    guide._setup_prototype()
    return guide.transform.velocity.embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("model", "observed", "columns"),
    [
        (rows_of_a_normal, ("y",), 1),
        (mixture, ("y",), 1),
        (vectors, ("y",), 2),
        (pairs, ("x", "y"), 3),
        (coins, ("y",), 1),
        (common_covariance, ("y",), 1),
        (one_by_one, ("y",), 1),
    ],
)
def test_rows_whose_order_no_density_tells_are_a_set(model, observed, columns, dtype):
    torch.set_default_dtype(dtype)
    embedding = embedding_of(model, *observed)
    assert type(embedding) is SetEmbedding
    assert embedding.row_dim == columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("model", "observed"),
    [
        (rows_with_errors, ("y",)),
        (rows_of_a_normal, ("first",)),
        (pairs, ("y",)),
        (rare_events, ("y",)),
        (groups, ("y",)),
        (own_latents, ("y",)),
        (series, ("y",)),
        (wide, ("y",)),
        (without_density, ("y",)),
        (single_row, ("y",)),
        (sites_of_other_lengths, ("x", "y")),
    ],
)
def test_rows_that_a_density_tells_apart_are_none(model, observed, dtype):
    torch.set_default_dtype(dtype)
    assert embedding_of(model, *observed) is None


@pytest.mark.usefixtures("_small_runs")
def test_a_guide_is_blind_to_the_order_of_such_rows_and_to_no_other():
    y = torch.tensor([0.5, -1.0, 2.0, 0.1])
    for model, is_blind in ((rows_of_a_normal, True), (rows_with_errors, False)):
        guide = pi.AmortizedInterpolant(model, hidden_dims=(8,))
        pi.fit_guide(guide, simulations=100, **SHORT)
        z = torch.zeros(1)
        one, other = (guide.condition(y=rows).log_prob(z) for rows in (y, y.flip(0)))
        assert (abs(one - other) < 1e-9) == is_blind


class OwnNoise(dist.TorchDistribution):
    """A simulator of a series in the clothes of a distribution, whose density nobody knows."""

    arg_constraints = {}
    support = constraints.real_vector

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, torch.Size([ROWS]), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return OwnNoise(self.loc.expand(batch_shape))

    def sample(self, sample_shape=()):
        shape = (*sample_shape, *self.loc.shape, ROWS)
        return (self.loc[..., None] + torch.randn(shape)).cumsum(-1)

    def log_prob(self, value):
        return torch.zeros(value.shape[:-1])


def zero_density(y=None):
    pyro.sample("y", OwnNoise(pyro.sample("loc", dist.Normal(0.0, 1.0))), obs=y)


def placeholder(y=None):
    pyro.sample("loc", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(torch.zeros(ROWS), 1.0).to_event(1), obs=y)


def within_a_bound(y=None):
    most = pyro.sample("most", dist.LogNormal(0.0, 1.0))
    with pyro.plate("rows", ROWS):
        pyro.sample("y", dist.Uniform(torch.zeros_like(most), most), obs=y)


@pytest.mark.parametrize("model", [zero_density, placeholder])
def test_a_density_that_no_latent_changes_tells_nothing(model):
    assert embedding_of(model) is None


def test_data_that_other_latents_cannot_give_are_a_set():
    assert type(embedding_of(within_a_bound)) is SetEmbedding


@pytest.mark.parametrize("error", [ZeroDivisionError, UserWarning])
def test_a_model_that_fails_at_times_is_set_up_all_the_same(error):
    calls = []

    def model(y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        calls.append(float(loc))
        if len(calls) > 20:
            raise error("the population died out")
        with pyro.plate("rows", ROWS):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    assert embedding_of(model) is None


def regression(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


@pytest.mark.usefixtures("_small_runs")
def test_a_guide_that_meets_covariates_after_its_first_call_sees_all_numbers():
    guide = pi.AmortizedInterpolant(regression, hidden_dims=(8,))
    guide(torch.zeros(ROWS), torch.zeros(ROWS))
    x = torch.linspace(-2.0, 2.0, ROWS)
    pi.fit_guide(guide, x, simulations=300, **QUICK)
    assert guide.transform.velocity.embedding is None
    means = [guide.condition(y=sign * x).mean.detach() for sign in (1.0, -1.0)]
    assert means[0] > 0.3 > -0.3 > means[1]


@pytest.mark.usefixtures("_small_runs")
def test_a_guide_that_has_learned_from_sets_refuses_covariates():
    guide = pi.AmortizedInterpolant(regression, hidden_dims=(8,))
    pi.fit_guide(guide, torch.ones(ROWS), simulations=100, **SHORT)
    pi.fit_guide(guide, 2 * torch.ones(ROWS), simulations=100, **SHORT)
    with pytest.raises(ValueError, match="rows that the model tells apart"):
        pi.fit_guide(guide, torch.linspace(-2.0, 2.0, ROWS), simulations=100, **SHORT)


@pytest.mark.usefixtures("_small_runs")
def test_batches_made_elsewhere_may_have_an_order_that_the_model_has_not():
    def model(y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample(
            "y", dist.Normal(loc[..., None], 1.0).expand([*loc.shape, 6]).to_event(1), obs=y
        )

    loc = torch.randn(500)
    y = loc[:, None] * torch.linspace(-1, 1, 6) + 0.5 * torch.randn(500, 6)
    batches = [({"loc": loc}, {"y": y})]
    guide = pi.AmortizedInterpolant(model, hidden_dims=(8,))
    pi.fit_guide(guide, simulations=batches, **QUICK)
    assert guide.transform.velocity.embedding is None
    assert abs(float(guide.condition(y=torch.linspace(-1, 1, 6)).mean.detach()) - 1.0) < 0.4


def rare_counts(y=None):
    rate = pyro.sample("rate", dist.Gamma(1.0, 1000.0))
    exposure = torch.ones(20)
    exposure[7] = 4.0
    with pyro.plate("rows", 20):
        pyro.sample("y", dist.Poisson(rate * exposure), obs=y)


def test_events_too_rare_to_be_seen_in_each_row_tell_of_no_set():
    assert embedding_of(rare_counts) is None


def slight_slope(y=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1e-4))
    with pyro.plate("rows", 30_000):
        pyro.sample("y", dist.Normal(loc + slope * torch.linspace(-1, 1, 30_000), 1.0), obs=y)


def test_what_many_rows_tell_together_is_no_rounding():
    torch.set_default_dtype(torch.float32)
    assert embedding_of(slight_slope) is None
