"""Simulations that would mislead a guide without an error: each is refused, mended or told of."""

import functools
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import slow_but
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from simulators import QUICK, rows_with_gaps
from torch import nn

import pyro_interpolant as pi
from pyro_interpolant.diagnostics.psis import WeightedDraws
from pyro_interpolant.distributions.report import Report
from pyro_interpolant.infer import amortization, amortized
from pyro_interpolant.infer.amortization import is_inside, measured_on_simulations, truncated
from pyro_interpolant.infer.runs import data_of, example_of, is_alike
from pyro_interpolant.infer.simulated_batches import SimulatedBatches
from pyro_interpolant.infer.simulation import Simulator
from pyro_interpolant.infer.simulations import Simulations
from pyro_interpolant.infer.sites import LatentSites
from pyro_interpolant.training.clock import Clock

QUICK = {**QUICK, "options": {"steps": 5}, "simulations": 100}


def guide_of(model):
    return pi.AmortizedInterpolant(model, hidden_dims=(8,))


def simulator_of(model, *args, **kwargs):
    guide = guide_of(model)
    return Simulator(LatentSites(guide, *args, **kwargs), ("y",))


def with_mask(y=None, mask=None, scale=1.0, size=None, inside=None):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    mask = torch.ones(6, dtype=torch.bool) if mask is None else mask
    all_of_them = torch.ones((), dtype=torch.bool)
    fn = dist.Normal(loc, 1.0).expand([size or 6])
    with pyro.plate("rows", 6, subsample_size=size), poutine.scale(scale=scale):
        with poutine.mask(mask=all_of_them if inside else mask):
            pyro.sample("y", fn.mask(mask) if inside else fn, obs=y)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"mask": torch.arange(6) < 3}, "without a mask"),
        ({"mask": torch.arange(6) < 3, "inside": True}, "without a mask"),
        ({"scale": 2.0}, "count once"),
        ({"size": 4, "mask": torch.arange(4) < 4}, "subsample"),
    ],
    ids=["mask", "masked distribution", "scale", "subsample"],
)
@pytest.mark.usefixtures("_small_runs")
def test_rows_that_do_not_count_once_are_refused(kind, message):
    with pytest.raises(ValueError, match=message):
        pi.fit_guide(guide_of(with_mask), **kind, **QUICK)
    guide = guide_of(with_mask)
    pi.fit_guide(guide, **QUICK)
    with pytest.raises(ValueError, match=message):
        guide(torch.ones(kind.get("size", 6)), **kind)


def test_a_row_that_counts_twice_is_refused():
    with pytest.raises(ValueError, match=r"expected sites that count once, got \['y'\] scaled"):
        simulator_of(with_mask, scale=torch.arange(6).eq(3) + 1.0)


def test_one_number_that_is_observed_in_all_rows_is_data_of_each():
    node = {"value": torch.tensor(0.5), "fn": dist.Normal(0.0, 1.0).expand([2, 3])}
    assert data_of({"y": node}, {"y": torch.Size([2, 3])})["y"].tolist() == [[0.5] * 3] * 2


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_gaps_by_obs_mask_are_refused():
    def model(y=None, there=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y, obs_mask=there)

    guide = guide_of(model)
    pi.fit_guide(guide, **QUICK)
    with pytest.raises(ValueError, match=r"without a mask, got .'y_observed'"):
        guide(torch.ones(3), torch.tensor([True, True, False]))


def test_a_reparametrised_site_is_a_function_of_the_sites_in_its_place():
    def groups(y=None):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", 3):
            loc = pyro.sample("loc", dist.Normal(0.0, scale))
            y = pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        pyro.deterministic("twice", 2 * y, event_dim=1)

    model = poutine.reparam(groups, {"loc": LocScaleReparam(0.0)})
    guide, y = guide_of(model), torch.ones(3)
    assert guide(y)["loc_decentered"].shape == (3,)
    for observed, variance in (("y", 2.0), ("twice", 8.0)):
        simulator = Simulator(LatentSites(guide, y), (observed,))
        assert simulator.sampled == ["scale", "loc_decentered", "y"]
        data = simulator(1000).data[observed]
        assert float(data.var()) == pytest.approx(variance, rel=0.2)


def test_a_reparametrised_site_that_keeps_its_data_is_refused():
    def model(y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.LogNormal(loc, 1.0).expand([3]).to_event(1), obs=y)

    guide = guide_of(poutine.reparam(model, {"y": TransformReparam()}))
    with pytest.raises(ValueError, match=r"got .'y'. reparametrised"):
        guide(torch.ones(3))


@pytest.mark.usefixtures("_small_runs")
def test_data_that_are_functions_of_the_latents_alone_are_told_of():
    def signs(y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        pyro.deterministic("sign", y.sign())

    for given, is_told in ((None, True), (torch.zeros(()), False)):  # y is latent, or is data
        guide = pi.AmortizedInterpolant(signs, ("sign",), hidden_dims=(8,))
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            pi.fit_guide(guide, given, **QUICK)
        told = [str(w.message) for w in found if "are functions of the latent" in str(w.message)]
        assert len(told) == is_told
        assert all("the data ['sign']" in t and "['loc', 'y'] alone" in t for t in told)


def line(x, y=None):
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(slope * x, 0.1), obs=y)


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_arguments_that_make_other_simulations_are_told_of(recwarn):
    x = torch.linspace(-1, 1, 4)
    guide = guide_of(line)
    pi.fit_guide(guide, x, **QUICK)
    guide(x, 2 * x)
    guide(x.clone(), -0.5 * x)
    assert not [str(w.message) for w in recwarn if "torch.jit" not in str(w.message)]
    with pytest.warns(UserWarning, match="other simulations"):
        guide(-x, 2 * x)


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_data_of_another_size_behind_a_summary_are_told_of(recwarn):
    def model(y):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            y = pyro.sample("y", dist.Normal(loc, 1.0), obs=y)
        pyro.deterministic("mean", y.mean(-1))

    guide = pi.AmortizedInterpolant(model, ("mean",), hidden_dims=(8,))
    pi.fit_guide(guide, torch.zeros(5), **QUICK)
    recwarn.clear()
    guide(torch.ones(5))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="other simulations"):
        guide(torch.ones(10))


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_a_guide_that_was_trained_for_some_data_says_so_from_its_file(tmp_path, recwarn):
    x, path = torch.linspace(-1, 1, 4), tmp_path / "posterior.safetensors"
    guide = guide_of(line)
    pi.fit_guide(guide, x, 2 * x, rounds=2, **{**QUICK, "simulations": 500})
    pi.save(guide.posterior, path)
    recwarn.clear()
    again = pi.AmortizedInterpolant(line, posterior=pi.load(path))
    again(x, 2 * x)
    assert not recwarn.list
    for each in (guide, again):
        with pytest.warns(UserWarning, match="trained in rounds for other data"):
            each(x, -2 * x)
    pi.save(pi.load(path).to(torch.float32), path)
    assert torch.equal(pi.load(path).refined_for.double(), guide.posterior.refined_for.float())
    pi.fit_guide(again, x, **QUICK)
    pi.save(again.posterior, path)
    assert pi.load(path).refined_for is None


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_a_model_of_numbers_that_are_not_from_torch_is_not_judged_by_them(recwarn):
    def model(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        noise = torch.as_tensor(np.random.randn(4)).to(w)
        pyro.sample("y", dist.Normal(w + noise, 0.1).to_event(1), obs=y)

    guide = guide_of(model)
    pi.fit_guide(guide, **QUICK)
    recwarn.clear()
    guide(torch.ones(4))
    assert not recwarn.list


def test_a_latent_site_that_is_gone_is_named():
    def model(y=None, scale=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0)) if scale is None else scale
        pyro.sample("y", dist.Normal(loc, scale), obs=y)

    guide = guide_of(model)
    guide(torch.tensor(0.3))
    with pytest.raises(ValueError, match=r"a model without \['scale'\]: set up a new guide"):
        guide.simulate(10, scale=torch.tensor(1.0))


@pytest.mark.parametrize("after", [False, True], ids=["the latents", "the data"])
def test_a_site_that_is_not_reached_in_some_runs_is_named(after):
    def model(y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        if not after and loc > 1.5:
            return
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        if after and loc > 1.5:
            return
        pyro.sample("y", dist.Normal(loc, scale), obs=y)

    simulator = simulator_of(model, torch.tensor(0.3))
    gone = r"\['y'\]" if after else r"\['scale', 'y'\]"
    with pytest.raises(ValueError, match=rf"one of a model without {gone}.* returns before"):
        simulator(200)
    if not after:
        with pytest.raises(ValueError, match=r"one of a model without \['scale'\]"):
            simulator.prior(200)


@pytest.mark.usefixtures("_small_runs")
def test_what_earlier_training_was_for_is_forgotten_when_the_next_begins(monkeypatch):
    guide, x = guide_of(line), torch.linspace(-1, 1, 4)
    quick = {**QUICK, "options": {"steps": 2}}
    guide(x, 2 * x)
    guide.posterior.refined_for, guide.poor = 2 * x, "Poor."
    for wrong in ({"simulations": 2}, {"rounds": 0}, {"checkpoint": "it", "rounds": 2}):
        with pytest.raises(ValueError, match="expected"):
            pi.fit_guide(guide, -x, 2 * x, **{**quick, **wrong})
    assert torch.equal(guide.posterior.refined_for, 2 * x)
    assert guide.poor == "Poor."
    assert guide._example is None
    pi.fit_guide(guide, x, 2 * x, **quick)
    assert guide.posterior.refined_for is None
    assert guide.poor is None
    assert guide._example is not None


@pytest.mark.usefixtures("_small_runs")
def test_a_density_that_cannot_be_evaluated_is_not_said_to_be_none():
    def model(y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc.item(), 1.0).expand([2]).to_event(1), obs=y)

    quick = {**QUICK, "options": {"steps": 2}, "simulations": 20}
    verdict = pi.fit_guide(guide_of(model), **quick).verdict
    assert "no density" not in verdict
    assert "expected a model that can be evaluated for many draws at once" in verdict


def with_nuisance(y=None, sigma=None, other=None):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 1.0), obs=sigma)
    pyro.sample("y", dist.Normal(x, sigma), obs=y)
    if other is not None:
        pyro.sample("other", dist.Normal(x, 1.0), obs=other)


def nuisance_by_condition():
    return pyro.condition(with_nuisance, {"sigma": torch.tensor(0.1)}), {}


def nuisance_by_argument():
    return with_nuisance, {"sigma": torch.tensor(0.1)}


def test_simulations_in_a_small_unit_are_told_apart():
    def model(size):
        pyro.sample("y", dist.Normal(0.0, 1e-9 * size))

    one, other, again = (
        example_of(functools.partial(model, size), ("y",)) for size in (1.0, 2.0, 1.0)
    )
    assert is_alike(one, again)
    assert not is_alike(one, other)


class Simulated(dist.TorchDistribution):
    """What is drawn and has no density."""

    arg_constraints, support = {}, dist.constraints.real

    def sample(self, sample_shape=()):
        return torch.randn(sample_shape)


def test_coins_that_fall_alike_are_told_apart_by_their_probabilities():
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.5))
        pyro.sample("y", dist.Bernoulli(logits=6.0 + slope * x).to_event(1), obs=y)

    x, y = torch.ones(6), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    guide = guide_of(model)
    guide(x, y)
    one, other, again = (example_of(functools.partial(model, k * x), ("y",)) for k in (1, 2, 1))
    assert torch.equal(one["y"], other["y"])
    assert is_alike(one, again)
    assert not is_alike(one, other)
    guide._example = one
    guide(x, y)
    with pytest.warns(UserWarning, match="arguments of the model make other simulations"):
        guide(2 * x, y)
    assert set(example_of(lambda: pyro.sample("y", Simulated()), ("y",))) == {"y"}


@pytest.mark.parametrize("given", [nuisance_by_condition, nuisance_by_argument])
def test_an_observed_site_that_is_no_data_keeps_its_value(given):
    model, named = given()
    guide = guide_of(model)
    found = guide.simulate(500, **named)
    assert set(found.data) == {"y"}
    assert abs((found.data["y"] - found.latents["x"]).std() - 0.1) < 0.02
    one, other, again = (
        example_of(functools.partial(with_nuisance, sigma=torch.tensor(sigma)), ("y",))
        for sigma in (0.1, 1.0, 0.1)
    )
    assert is_alike(one, again)
    assert not is_alike(one, other)  # of which a guide warns


def test_beside_a_deterministic_site_all_that_is_observed_is_drawn():
    guide = pi.AmortizedInterpolant(rows_with_gaps, ("seen",), hidden_dims=(8,))
    found = guide.simulate(50, torch.zeros(6), torch.ones(6))
    assert bool((found.data["seen"].std(0) > 0.1).all())


def test_data_that_the_guide_is_not_given_are_refused():
    guide = guide_of(with_nuisance)
    with pytest.raises(ValueError, match=r"observed sites \['y'\], got \['other'\] observed too"):
        guide.simulate(10, other=torch.tensor(0.3), sigma=torch.tensor(0.1))
    guide = guide_of(with_nuisance)
    guide(torch.tensor(0.5))
    with pytest.raises(ValueError, match=r"expected sites \['sigma'\] to be latent"):
        guide.simulate(10, sigma=torch.tensor(0.1))


def rarely_selected(branches, y=None, there=None):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    rare = (x > 2).float() if not branches else torch.tensor(float(float(x) > 2))
    pyro.sample("chosen", dist.Bernoulli(0.9 - 0.8 * rare), obs=torch.tensor(1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def rarely_masked(branches, y=None, there=None):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    there = pyro.sample("there", dist.Bernoulli(0.98), obs=there)
    there = there > 0 if not branches else torch.tensor(float(there) > 0)
    with poutine.mask(mask=there):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize(
    ("model", "observed", "message"),
    [
        (rarely_selected, ("y",), r"\['y'\], got \['chosen'\] observed too"),
        (rarely_masked, ("y", "there"), r"without a mask, got \['y'\]"),
    ],
    ids=["kept", "masked"],
)
def test_what_is_wrong_at_rare_latents_alone_is_found_in_their_simulations(
    model, observed, message, branches
):
    guide = pi.AmortizedInterpolant(functools.partial(model, branches), observed, hidden_dims=(8,))
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        guide.simulate(300)


def by_numpy():
    return torch.as_tensor(np.random.randn(4))


def by_random():
    return torch.tensor([random.gauss(0, 1) for _ in range(4)])


GENERATOR, RANDOM = np.random.default_rng(0), random.Random(0)


def by_a_generator():
    return torch.as_tensor(GENERATOR.normal(size=4))


def by_a_random():
    return torch.tensor([RANDOM.gauss(0, 1) for _ in range(4)])


def in_place():
    noise = torch.zeros(4)
    noise.normal_()
    return noise


def returned():
    return torch.empty(4).normal_()


def of_a_layer():
    return nn.Linear(1, 4).weight.detach()[:, 0] * 3**0.5


def into_lanes():
    noise = torch.zeros(4) + torch.randn(4)
    noise.normal_()
    return noise


def test_a_sum_over_all_simulations_does_not_hide_among_many_rows():
    def model(y=None):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", 20_000):
            pyro.sample("y", dist.Normal(w.sum(), 200.0), obs=y)

    torch.manual_seed(0)
    found = simulator_of(model)(100)
    assert abs((found.data["y"].mean(1) - found.latents["w"].sum(1)).mean()) < 0.5


@pytest.mark.parametrize("unit", [1.0, 1e-9])
def test_a_mean_over_all_simulations_does_not_hide_in_small_units(unit):
    def model(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 5):
            y = pyro.sample("y", dist.Normal(unit * w, unit), obs=y)
        pyro.deterministic("centred", y - y.mean())

    simulator = Simulator(LatentSites(guide_of(model)), ("centred",))
    assert simulator(20).data["centred"].mean(-1).abs().max() < 1e-9 * unit


def test_a_mean_over_all_simulations_does_not_hide_beside_a_large_number():
    def model(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 5):
            y = pyro.sample("y", dist.Normal(w, 1.0), obs=y)
        centred = y - y.mean()
        pyro.deterministic("summary", torch.stack((centred.sum(-1), 1e6 + y.sum(-1)), -1))

    simulator = Simulator(LatentSites(guide_of(model)), ("summary",))
    assert simulator(20).data["summary"][:, 0].abs().max() < 1e-6


def test_a_branch_on_what_is_rare_in_any_simulation_is_not_one_for_all():
    def model(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        scale = torch.full_like(w, 100.0) if (w > 2.0).any() else torch.ones_like(w)
        with pyro.plate("rows", 3):
            pyro.sample("y", dist.Normal(0.0, scale), obs=y)

    torch.manual_seed(0)
    simulator = simulator_of(model)
    assert simulator.batching == "loop"
    simulator.batching = "plate"  # as where it is rarer, and not met before
    found = simulator(200)
    w, y = found.latents["w"], found.data["y"]
    assert simulator.batching == "loop"
    assert 0 < int((w > 2.0).sum()) < 50
    assert bool((y[w < 2.0].abs() < 6.0).all())


def test_booleans_are_simulated_in_a_plate():
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        y = pyro.sample("y", dist.Normal(w, 1.0))
        pyro.deterministic("seen", y > 0)

    assert Simulator(LatentSites(guide_of(model)), ("seen",)).batching == "plate"


NOISES = [
    by_numpy, by_random, by_a_generator, by_a_random, in_place, returned, of_a_layer, into_lanes
]  # fmt: skip


@pytest.mark.parametrize("noise", slow_but(NOISES, into_lanes))
@pytest.mark.parametrize("branches", [False, True])
def test_every_simulation_has_noise_of_its_own(noise, branches):
    def model(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        value = w + noise().to(w)
        if branches:  # no plate can run it
            value = value + 0 * float(torch.rand(()) > 2)
        pyro.sample("y", dist.Normal(value, 1e-3).to_event(1), obs=y)

    torch.manual_seed(0)
    found = simulator_of(model)(400)
    off = found.data["y"] - found.latents["w"][:, None]
    assert off.std(0).min() > 0.8
    assert torch.corrcoef(off.T).fill_diagonal_(0).abs().max() < 0.25
    assert torch.unique(off[:, 0]).numel() == 400


@pytest.mark.parametrize("hides", [False, True])
def test_a_rare_event_is_drawn_for_every_simulation(hides):
    def model(y=None):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.02)) if hides else torch.rand(()) < 0.02
        pyro.sample("y", dist.Normal(x + 10.0 * k, 0.1), obs=y)

    torch.manual_seed(0)
    for _ in range(3):  # of probes that meet it or not
        found = simulator_of(poutine.block(model, hide=["k"]))(2000)
        share = (found.data["y"] - found.latents["x"] > 5).to(torch.float64).mean()
        assert abs(share - 0.02) < 0.015


@pytest.mark.parametrize("uniform", [np.random.rand, random.random])
def test_a_rare_event_that_torch_does_not_draw_is_no_event_of_all_simulations(uniform):
    def model(y=None):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x + 10.0 * (uniform() < 1e-9), 0.1), obs=y)

    assert simulator_of(model).batching == "loop"


@pytest.mark.parametrize("into", [False, True])
def test_numbers_that_a_model_draws_from_a_seed_of_its_own_are_those_of_all_simulations(into):
    def columns():
        generator = torch.Generator().manual_seed(3)
        if into:
            return torch.empty(4, 2).normal_(generator=generator)
        return torch.randn(4, 2, generator=generator)

    def model(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        x = columns()
        loc = x[:, 0] * w[0] + x[:, 1] * w[1]  # no plate can run it
        pyro.sample("y", dist.Normal(loc, 0.01).to_event(1), obs=y)

    found = simulator_of(model)(30)
    assert (found.data["y"] - found.latents["w"] @ columns().T).abs().max() < 0.1


@pytest.mark.parametrize("noise", NOISES)
def test_deterministic_data_have_noise_of_their_own(noise):
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.deterministic("y", 1e6 + w[..., None] + noise().to(w))

    torch.manual_seed(0)
    found = simulator_of(model)(100)
    off = found.data["y"] - 1e6 - found.latents["w"][:, None]
    assert off.std(0).min() > 0.7


@pytest.mark.parametrize("noise", [by_numpy, by_random, by_a_generator, by_a_random])
def test_generators_that_workers_cannot_seed_are_told_of(noise, recwarn):
    def model():
        pyro.deterministic("y", pyro.sample("w", dist.Normal(0.0, 1.0)) + noise().sum())

    guide = pi.AmortizedInterpolant(model, num_workers=1)
    with pytest.raises(ValueError, match="pickled"):  # a model that no worker can import
        guide.simulate(1)
    told = ["a generator of its own" in str(w.message) for w in recwarn]
    assert told == [True] * (noise in (by_a_generator, by_a_random))


@pytest.mark.slow
def test_draws_on_the_edge_of_a_support_are_left_out():
    def model(y=None):
        w = pyro.sample("w", dist.Uniform(1000.0, 1000.01))
        with pyro.plate("parts", 2):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
        pyro.sample("y", dist.Normal(w + p.sum(), 1.0), obs=y)

    torch.set_default_dtype(torch.float32)
    guide = guide_of(model)
    with pytest.warns(UserWarning, match="on the edge"):
        found = guide.simulate(2000)
    assert 0 < found.improper < 200
    guide.rows_of(found)
    simulator = simulator_of(model)
    assert len(simulator.prior(2000).latents["w"]) < 2000


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_a_support_that_depends_on_other_sites_is_refused(low):
    def model(y=None):
        top = pyro.sample("top", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", 2):
            x = pyro.sample("x", dist.Uniform(low * top, top))
        pyro.sample("y", dist.Normal(x.sum(-1), 0.1), obs=y)

    with pytest.raises(ValueError, match="site 'x' to have a fixed support, got one that depends"):
        guide_of(model)(torch.ones(()))


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_batches_without_a_proper_simulation_are_passed_over():
    def draws(count):
        loc = torch.randn(count)
        return {"loc": loc}, {"y": loc[:, None] + torch.randn(count, 6)}

    def model(y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0).expand([6]).to_event(1), obs=y)

    bad = {"loc": torch.zeros(1)}, {"y": torch.full((1, 6), torch.nan)}
    result = pi.fit_guide(
        guide_of(model),
        **{**QUICK, "simulations": [bad, draws(0), draws(200), bad, draws(0)]},
    )
    assert result.improper == pytest.approx(2 / 202)


def test_latents_that_repeat_with_other_data_are_not_held_out():
    def model(y=None):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0).expand([6]).to_event(1), obs=y)

    loc = torch.randn(20).repeat(50)
    batches = [({"loc": loc}, {"y": loc[:, None] + torch.randn(1000, 6)})]
    simulator = simulator_of(model)
    guide = guide_of(model)
    guide(torch.zeros(6))
    found = SimulatedBatches(batches, simulator, guide.rows_of)
    assert sum(len(rows) for rows, _ in found) == 900
    assert found.trained == 900


@pytest.mark.parametrize("step", [0.01, 1e-3, 1e-4])
def test_simulations_that_repeat_are_held_out_whatever_their_probability(step):
    def model(k=None):
        p = pyro.sample("p", dist.Uniform(0.0, 1.0))
        pyro.sample("k", dist.Binomial(8, p), obs=k)

    p = ((torch.rand(20_000) / step).floor() + 0.5) * step
    k = dist.Binomial(8, p).sample()
    batches = [({"p": a}, {"k": b}) for a, b in zip(p.split(2000), k.split(2000), strict=True)]
    guide = pi.AmortizedInterpolant(model, ("k",), hidden_dims=(8,))
    guide(torch.tensor(2.0))
    sites = LatentSites(guide, torch.tensor(2.0))
    found = SimulatedBatches(batches, Simulator(sites, ("k",)), guide.rows_of)
    rows, context = (torch.cat(part) for part in zip(*found, strict=True))
    assert abs(len(found.held.log_prior) - 1000) < 20
    assert abs(len(rows) - 18_000) < 300
    assert found.trained == len(rows)
    for count in (0.0, 8.0):  # the mean of p is (k + 1) / 10
        assert abs(rows[context == count].sigmoid().mean() - (count + 1) / 10) < 0.01


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_data_that_are_no_sample_site_have_no_density():
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.deterministic("y", w + 0.1 * torch.randn(4))

    result = pi.fit_guide(guide_of(model), **QUICK)
    assert "no density" in result.verdict


@pytest.mark.slow
def test_every_data_set_of_a_model_with_hard_edges_is_judged():
    def model(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Uniform(w, w + 1.0), obs=y)

    result = pi.fit_guide(guide_of(model), **QUICK)
    assert result.data_sets == 20
    assert 0 < result.ess[1] < 0.9  # some draws are where the data cannot be


def test_calibration_is_on_other_simulations_than_the_training_of_its_seed(monkeypatch):
    guide, x = guide_of(line), torch.linspace(-1, 1, 4)
    guide(x, 2 * x)
    seen = []
    monkeypatch.setattr(amortized, "calibration_of", lambda q, latents, *_: seen.append(latents))
    for _ in range(2):
        guide.calibration(x, count=20, seed=3)
    torch.manual_seed(3)
    trained_on = guide.simulate(20, x).latents["slope"]
    assert torch.equal(seen[0]["slope"], seen[1]["slope"])
    assert not torch.isin(seen[0]["slope"], trained_on).any()


def test_values_of_another_type_tell_nothing():
    value = torch.zeros(2)
    assert is_alike({"y": value}, {"y": 1 + value.to(torch.float32)})
    assert not is_alike({"y": value}, {"y": 1 + value})


@pytest.mark.parametrize("is_told", [False, True])
def test_the_gain_is_known_where_the_density_of_the_prior_is(is_told):
    """And the report has the prior's density where it is finite for all simulations."""
    sites = {"x": (torch.Size(()), dist.constraints.real)}
    prior, rows = torch.tensor([-2.0, -1.0, -3.0]), torch.zeros(3, 1)
    given = SimpleNamespace(log_prob=lambda rows: rows[:, 0] - 1)
    for lost in (False, True):
        posterior = SimpleNamespace(
            given=lambda c: given, sites=sites, report=Report(1, 3, 1.0, 1, 1)
        )
        log_prior = prior.clone()
        log_prior[0] = -torch.inf if lost else -2.0
        fresh = Simulations({"x": rows[:, 0]}, {}, log_prior, 0)
        simulator = SimpleNamespace(is_told_early=is_told, sampled=["x"])
        found = measured_on_simulations(
            posterior, fresh, lambda _: (rows, rows), simulator, None, Clock(None), None, 3, 0.0
        )
        gain = (torch.inf if lost else 1.0) if is_told else torch.nan
        assert found.gain == pytest.approx(gain, nan_ok=True)
        assert posterior.report.held_out == -1.0
        assert posterior.report.reference == (-2.0 if is_told and not lost else None)


def test_evidence_that_is_off_at_an_edge_is_told_of_a_data_set(monkeypatch):
    drawn = WeightedDraws(torch.zeros(1000, 1), torch.zeros(1000), 0.0, 0.0)
    for name, fake in (
        ("LogJoint", lambda *args: None),
        ("importance_of", lambda *args: drawn),
        ("at_edges", lambda *args: "the evidence is lost"),
    ):
        monkeypatch.setattr(amortization, name, fake)
    posterior, packed = (
        SimpleNamespace(given=lambda c: SimpleNamespace(log_prob=None)),
        (torch.zeros(2, 1),) * 2,
    )
    sites = SimpleNamespace(model=lambda: None)
    with pytest.warns(UserWarning, match="of one data set the evidence is lost"):
        found, _ = amortization._importance_of_data_sets(
            posterior, SimpleNamespace(data={}), packed, sites
        )
    assert len(found) == 2


def test_the_prior_is_truncated_to_the_regions_of_all_rounds():
    rows = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    rounds = [SimpleNamespace(log_prob=lambda rows, i=i: rows[:, i]) for i in (0, 1)]
    inside = is_inside([(posterior, 0.5) for posterior in rounds], rows)
    assert inside.tolist() == [False, False, False, True]


def test_a_truncated_prior_without_a_draw_ends_after_many_tries(monkeypatch):
    monkeypatch.setattr(amortization, "_MOST_TRIES", 1)
    simulator, asked = simulator_of(line, torch.ones(3)), []

    class Empty:
        def log_prob(self, rows):
            asked.append(len(rows))
            return torch.full((len(rows),), -torch.inf)

    arguments = [(Empty(), -1.0)], 10_000, lambda d: d["slope"][:, None]
    assert truncated(simulator, *arguments) is None
    assert len(asked) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_regions_stay_as_the_training_goes_on_and_rounds_have_seeds_of_their_own(monkeypatch):
    numbers, densities = [], []

    def region(posterior):
        numbers.append(float(torch.rand(())))
        return posterior, -torch.inf

    def drawn(simulator, regions, count, pack):
        densities.append([float(q.log_prob(torch.zeros(1, 1))) for q, _ in regions])
        return simulator(count)

    monkeypatch.setattr(amortized, "region", region)
    monkeypatch.setattr(amortized, "truncated", drawn)
    x = torch.linspace(-1, 1, 4)
    state = torch.get_rng_state()
    pi.fit_guide(guide_of(line), x, 2 * x, rounds=3, **{**QUICK, "seed": 5})
    assert torch.equal(torch.get_rng_state(), state)
    (first,), (again, _) = densities
    assert first == again
    for number, seed in zip(numbers, (6, 7), strict=True):
        torch.manual_seed(seed)
        assert number == float(torch.rand(()))


def test_data_are_looked_at_for_rounds_without_a_draw_of_the_global_generator():
    guide, x, state = guide_of(line), torch.linspace(-1, 1, 4), torch.get_rng_state()
    with pytest.raises(ValueError, match="simulations >= 10"):
        pi.fit_guide(guide, x, 2 * x, rounds=2, **{**QUICK, "simulations": 2})
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("hits", [0, 5])
@pytest.mark.usefixtures("_small_runs")
def test_a_round_of_too_few_simulations_leaves_the_guide_as_it_was(hits, monkeypatch):
    guide, weights = guide_of(line), []
    regress = guide._regress

    def regressed(*args):
        training = regress(*args)
        weights.append([p.clone() for p in guide.transform.state_dict().values()])
        return training

    def few(simulator, *args):
        return simulator(hits) if hits else None

    monkeypatch.setattr(amortized, "truncated", few)
    monkeypatch.setattr(amortized, "is_inside", lambda regions, rows: rows[:, 0].isnan())
    guide.__dict__["_regress"] = regressed
    x = torch.linspace(-1, 1, 4)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        result = pi.fit_guide(guide, x, 2 * x, rounds=3, **QUICK)
    assert ["round 2 is left out" in str(w.message) for w in told].count(True) == 1
    assert result.draws > 0
    (after_the_first,) = weights
    now = guide.transform.state_dict().values()
    assert all(torch.equal(*pair) for pair in zip(after_the_first, now, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_rounds_of_a_simulator_without_a_density_are_not_lost():
    def model(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Delta(w + torch.randn(3), event_dim=1), obs=y)

    guide = guide_of(model)
    with pytest.warns(UserWarning, match="not be judged"):
        result = pi.fit_guide(guide, torch.ones(3), rounds=2, **QUICK)
    assert result.verdict.startswith("Unknown")


def by_rows(y):
    with pyro.plate("rows", len(y)), pyro.plate("columns", y.shape[1]):
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y.mT)


def test_an_enclosing_plate_is_not_the_simulations():
    guide = guide_of(by_rows)
    for _ in range(2):  # at the first call, which sets the guide up, too
        with pyro.plate("outer", 3), poutine.trace() as around:
            found = guide.simulate(10, torch.ones(4, 2))
        assert not around.trace.nodes
        assert found.latents["loc"].shape == found.data["y"].shape == (10, 2, 4)


@pytest.mark.parametrize("shape", [(5, 2), (2, 4)])
def test_simulations_of_latents_of_another_shape_are_refused(shape):
    """Those of as many numbers would be taken for one another."""
    guide = guide_of(by_rows)
    guide(torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"'loc' of shape \(2, 4\), .* set up a new guide"):
        guide.simulate(10, torch.ones(shape))
