"""Draws in ArviZ' form: of flows, of guides, and of importance samplers with their weights."""

import tempfile
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import random_flow, random_prior
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoLaplaceApproximation

from pyro_interpolant import (
    AutoInterpolant,
    ConditionalInterpolantDistribution,
    JointInterpolantDistribution,
    importance,
    to_arviz,
)

# ArviZ notes the day of its import in the user's cache, by way of one file that two processes
# of the suite, importing at once, take from each other; matplotlib's cache stays where it is.
pytest.importorskip("matplotlib.pyplot")
with tempfile.TemporaryDirectory() as own, pytest.MonkeyPatch.context() as patched:
    patched.setenv("XDG_CACHE_HOME", own)
    pytest.importorskip("arviz")
SITES = {"slope": ((2,), constraints.real), "noise": ((), constraints.positive)}


def model(y=None):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("rows", 3):
        pyro.sample("x", dist.Normal(0.0, scale))


def test_named_sites_are_variables_of_one_chain():
    joint = JointInterpolantDistribution(random_flow(3), sites=SITES).freeze()
    data = to_arviz(joint, count=50, seed=3)
    torch.manual_seed(3)
    draws = joint.sample_dict((50,))
    for name, value in draws.items():
        found = torch.from_numpy(data.posterior[name].values)
        assert torch.equal(found, value[None])
    assert torch.equal(
        torch.from_numpy(to_arviz(joint, count=50, seed=3).posterior["noise"].values),
        draws["noise"][None],
    )


def test_columns_of_a_data_frame_keep_their_names():
    prior = random_prior(2)
    assert to_arviz(prior, count=5).posterior["x"].shape == (1, 5, 2)
    prior.columns = ("mass", "radius")
    found = to_arviz(prior, count=5).posterior["x"]
    assert list(found.sel(column="radius").shape) == [1, 5]


def test_draws_of_a_guide():
    data = to_arviz(AutoInterpolant(model, hidden_dims=(8,)), None, count=20)
    assert data.posterior["x"].shape == (1, 20, 3)
    assert bool((data.posterior["scale"] > 0).all())


def test_a_poor_guide_is_told_of_once():
    guide = AutoInterpolant(model, hidden_dims=(8,))
    guide.poor = "Poor, k-hat 1.2."
    with pytest.warns(UserWarning, match=r"not those of the posterior: Poor, k-hat 1\.2"):
        to_arviz(guide, count=5)
    to_arviz(guide, count=5)
    guide()


@pytest.mark.slow
def test_weighted_draws_are_resampled_and_kept_with_their_weights():
    def line():
        pyro.sample("x", dist.Normal(3.0, 1.0))

    guide = AutoInterpolant(line, hidden_dims=(8,), init_loc_fn=lambda _: torch.tensor(1.5))
    guide._init_scale = 2.0
    result = importance(guide, count=4000, seed=0)
    data = to_arviz(result, seed=0)
    assert abs(float(data.posterior["x"].mean()) - 3.0) < 0.1  # the guide's own is 1.5
    assert data.posterior.sizes["draw"] == 4000
    assert data.posterior.attrs["k_hat"] == result.k_hat
    assert data.posterior.attrs["verdict"] == result.verdict
    own = data.proposal
    weights = torch.from_numpy(own["log_weight"].values[0]).exp()
    torch.testing.assert_close(weights.sum(), torch.ones(()))
    assert torch.equal(torch.from_numpy(own["x"].values[0]), result.draws["x"])
    assert to_arviz(result, count=7).posterior.sizes["draw"] == 7


def test_what_cannot_be_handed_over_is_refused():
    family = ConditionalInterpolantDistribution(random_flow(2, context_dim=1))
    with pytest.raises(TypeError, match="give a conditional flow its context"):
        to_arviz(family)
    with pytest.raises(ValueError, match="one context at a time"):
        to_arviz(family.condition(torch.zeros(3, 1)))
    for count in (0, 2.5):
        with pytest.raises(ValueError, match="count >= 1, a whole number"):
            to_arviz(random_prior(2), count=count)
    with pytest.raises(ValueError, match="got the point AutoLaplaceApproximation trains"):
        to_arviz(AutoLaplaceApproximation(model))
    with pytest.raises(TypeError, match="dict"):
        to_arviz({"x": torch.zeros(3)})


@pytest.mark.filterwarnings("ignore:Poor:UserWarning")
def test_weighted_draws_of_numpyro_are_taken_as_those_of_pyro():
    """Arrays for tensors, and a key to resample by: the fields are the same."""
    result = importance(AutoInterpolant(model, hidden_dims=(8,)), None, count=100, seed=0)
    kind = NamedTuple("ImportanceResult", [(name, object) for name in result._fields])
    arrays = {name: value.detach().numpy() for name, value in result.draws.items()}
    twin = kind(*result[:5], result.log_weights.detach().numpy(), arrays)
    data, expected = to_arviz(twin, seed=1), to_arviz(result, seed=1)
    assert data.posterior.attrs["k_hat"] == result.k_hat
    assert data.posterior.equals(expected.posterior)
    assert data.proposal.equals(expected.proposal)
