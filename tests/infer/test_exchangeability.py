"""Which models have rows whose order no density tells: those learn from sets by themselves."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from simulators import QUICK, rows_of_a_normal, rows_with_errors

import pyro_interpolant as pi
from pyro_interpolant.nn import SetEmbedding

ROWS = 6


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


def test_a_guide_is_blind_to_the_order_of_such_rows_and_to_no_other():
    y = torch.tensor([0.5, -1.0, 2.0, 0.1])
    for model, is_blind in ((rows_of_a_normal, True), (rows_with_errors, False)):
        guide = pi.AmortizedInterpolant(model, hidden_dims=(8,))
        pi.fit_guide(guide, simulations=300, **QUICK)
        z = torch.zeros(1)
        one, other = (guide.condition(y=rows).log_prob(z) for rows in (y, y.flip(0)))
        assert (abs(one - other) < 1e-9) == is_blind
