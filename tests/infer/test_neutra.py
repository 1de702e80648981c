"""NUTS in the base space of a guide."""

import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal, AutoNormalMessenger
from pyro.infer.autoguide.initialization import InitMessenger, init_to_value
from pyro.ops.stats import effective_sample_size
from pyro.optim import Adam

from pyro_interpolant import (
    AmortizedInterpolant,
    AutoInterpolant,
    FixedGrid,
    InterpolantDistribution,
    InterpolantTransform,
    VelocityMLP,
    log_joint,
    neutra,
)
from pyro_interpolant.nn.record import MLPRecord

Y = torch.tensor([1.0, -0.5], dtype=torch.float64)


def model(y=Y):
    mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
    share = pyro.sample("share", dist.Beta(2.0, 2.0))
    with pyro.plate("rows", 2):
        x = pyro.sample("x", dist.Normal(mu, 1.0))
        pyro.sample("y", dist.Normal(x * share, 1.0), obs=y)


def small(target=model):
    guide = AutoInterpolant(target, hidden_dims=(8, 8), solver=FixedGrid(3), init_scale=0.5)
    guide()
    with torch.no_grad():
        guide.transform.velocity.output.weight.normal_(std=0.3)
    return guide


def run(target, *args, samples=5, **kwargs):
    kernel = NUTS(target)
    mcmc = MCMC(kernel, num_samples=samples, warmup_steps=samples, disable_progbar=True, **kwargs)
    mcmc.run(*args)
    return mcmc


def shares_out_of_range(a):
    shares = torch.stack((1 - a, a), -1).unsqueeze(-2)
    return dist.Categorical(shares), torch.ones(3)


def rates_out_of_range(a):
    return dist.Poisson(1 - a[..., None]), torch.zeros(3)


def residuals_below_zero(a):
    return dist.Exponential(2.0), torch.stack((1 - a, 1.5 - a, 2 - a), -1)


LIKELIHOODS = [shares_out_of_range, rates_out_of_range, residuals_below_zero]


def test_a_guide_in_training_is_copied_as_it_is_used():
    """Without dropout, which an embedding of one's own may have; the guide itself stays."""
    guide = small().train()
    base = neutra(guide)
    assert not any(part.training for part in base.guide.transform.modules())
    assert not any(p.requires_grad for p in base.guide.parameters())
    assert guide.transform.training
    assert all(p.requires_grad for p in guide.transform.velocity.parameters())


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_what_validation_refuses_has_no_density(likelihood):
    def model():
        a = pyro.sample("a", dist.Normal(0.5, 0.1))
        fn, y = likelihood(a)
        with pyro.plate("rows", 3):
            pyro.sample("y", fn, obs=y)

    guide = AutoInterpolant(model, hidden_dims=(4,), solver=FixedGrid(1), init_scale=1.0)
    with pyro.validation_enabled(is_validate=False):
        guide()
        base = neutra(guide)
        name = next(n for n in poutine.trace(base).get_trace().stochastic_nodes if n != "rows")
        for z in (0.0, 5.0, -5.0):
            w = {name: torch.tensor([z])}
            a = float(base.samples({k: v[None] for k, v in w.items()})["a"])
            density = poutine.trace(poutine.condition(base, w)).get_trace().log_prob_sum()
            lowest = 0.0 if likelihood is shares_out_of_range else -torch.inf
            assert bool(density > -torch.inf) == (lowest <= a <= 1)
            assert (z == 0) == (abs(a - 0.5) < 0.5)  # both cases come


def test_a_run_that_failed_does_not_hide_which_data_latents_move():
    def residuals(y):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Exponential(2.0), obs=y - shift)

    guide = AutoInterpolant(residuals, hidden_dims=(4,))
    guide(torch.tensor(1.0))
    base = neutra(guide)
    with pytest.raises(TypeError):
        base()
    far = poutine.condition(base, {"shift_shared_latent": torch.tensor([30.0])})
    with pyro.validation_enabled(is_validate=False):
        assert poutine.trace(far).get_trace(torch.tensor(1.0)).log_prob_sum() == -torch.inf


class Above(dist.TorchDistribution):
    """Numbers above a limit, of an author who wrote the support as any property."""

    arg_constraints = {}

    def __init__(self, low):
        self.low = low
        super().__init__(low.shape, validate_args=False)

    @property
    def support(self):
        return constraints.greater_than(self.low)

    def log_prob(self, value):
        return self.low - value


def test_a_support_that_a_plain_property_moves_counts():
    def limited():
        low = pyro.sample("low", dist.Normal(0.0, 1.0))
        pyro.sample("y", Above(low), obs=torch.tensor(2.0))

    guide = AutoInterpolant(limited, hidden_dims=(4,))
    guide()
    far = poutine.condition(neutra(guide), {"low_shared_latent": torch.tensor([50.0])})
    assert poutine.trace(far).get_trace().log_prob_sum() == -torch.inf


def test_draws_come_back_in_the_models_sites():
    guide = small()
    base = neutra(guide)
    mcmc = run(base, Y)
    samples = base.samples(mcmc.get_samples())
    assert {k: tuple(v.shape) for k, v in samples.items()} == {
        "mu": (5,), "share": (5,), "x": (5, 2)
    }  # fmt: skip
    by_chain = base.samples(mcmc.get_samples(group_by_chain=True))
    assert by_chain["x"].shape == (1, 5, 2)
    assert torch.equal(by_chain["x"][0], samples["x"])
    assert ((samples["share"] > 0) & (samples["share"] < 1)).all()
    assert not samples["x"].requires_grad
    assert Predictive(model, samples)(None)["y"].shape == (5, 2)


ON_A_MOVING_SUPPORT = {
    "uniform": lambda a: dist.Uniform(0.0, a),
    "pareto": lambda a: dist.Pareto(a, 3.0),
    "affine": lambda a: dist.AffineBeta(2.0, 2.0, 0.0, a),
    "flow": lambda a: InterpolantDistribution(
        InterpolantTransform(VelocityMLP(1, (4,))), support=dist.constraints.interval(0.0, a)
    ).freeze(),
}


@pytest.mark.parametrize("name", ON_A_MOVING_SUPPORT)
def test_supports_that_depend_on_other_sites_are_refused(name):
    def model():
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        pyro.sample("b", ON_A_MOVING_SUPPORT[name](a))

    guide = AutoInterpolant(model)
    guide()
    base = neutra(guide)
    with pytest.raises(ValueError, match="site 'b' to have a fixed support"):
        base()


@pytest.mark.usefixtures("_nodes_stay")
def test_the_density_in_base_space_is_the_models():
    guide = small()
    base = neutra(guide)
    w = torch.randn(guide.latent_dim)
    seen = poutine.trace(poutine.condition(base, data={"mu_shared_latent": w})).get_trace()
    z = guide.transform(w)
    expected = log_joint(guide)(z[None])[0] + guide.transform.log_abs_det_jacobian(w, z)
    assert torch.allclose(seen.log_prob_sum(), expected)


CHOICE = dist.Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64))


def bounds_by_choice():
    x = pyro.sample("x", dist.HalfNormal(1.0))
    k = pyro.sample("k", CHOICE, infer={"enumerate": "parallel"})
    width = x * torch.tensor([1.0, 3.0])[k]
    pyro.sample("y", dist.Uniform(0.0, width), obs=torch.tensor(1.0))


def counts_by_choice():
    x = pyro.sample("x", dist.Beta(1.0, 1.0))
    with pyro.plate("rows", 2):
        k = pyro.sample("k", CHOICE, infer={"enumerate": "parallel"})
        number = torch.tensor([5.0, 10.0])[k]
        pyro.sample("y", dist.Binomial(number, x), obs=torch.tensor([8.0, 2.0]))


def mask_by_choice():
    k = pyro.sample("k", CHOICE, infer={"enumerate": "parallel"})
    with poutine.mask(mask=k.bool()):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(2.0 * k + x, 1.0), obs=torch.tensor(1.5))


def prior_by_choice():
    k = pyro.sample("k", CHOICE, infer={"enumerate": "parallel"})
    with pyro.plate("rows", 3):
        x = pyro.sample("x", dist.Normal(torch.tensor([-1.0, 3.0])[k], 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor([1.0, 2.0, 0.0]))


def rates_by_choice():
    x = pyro.sample("x", dist.Gamma(2.0, 2.0))
    k = pyro.sample("k", CHOICE, infer={"enumerate": "parallel"})
    rate = x * torch.tensor([1.0, -1.0])[k]  # of which the formula is no number
    pyro.sample("y", dist.Exponential(rate, validate_args=False), obs=torch.tensor(1.0))


def potential(target, z):
    """Return minus the log density of an enumerated model, by the kernel of NUTS."""
    kernel = NUTS(target)
    kernel.setup(1)
    (name,) = kernel.initial_params
    return kernel.potential_fn({name: z})


@pytest.mark.parametrize("target", [bounds_by_choice, counts_by_choice, prior_by_choice])
def test_what_a_choice_makes_impossible_leaves_the_other_choices(target):
    base = neutra(small(poutine.block(target, hide=["k"])), target)
    w = torch.full((base.guide.latent_dim,), -0.3)
    z = base.guide.transform(w)
    with pyro.validation_enabled(is_validate=False):
        plain, found = potential(target, z.reshape(base.sites.shapes["x"])), potential(base, w)
    torch.testing.assert_close(found, plain - base.guide.transform.log_abs_det_jacobian(w, z))
    assert torch.isfinite(found)


def test_a_latent_masked_by_a_choice_has_its_own_density_there():
    base = neutra(small(poutine.block(mask_by_choice, hide=["k"])), mask_by_choice)
    w = torch.tensor([0.4])
    z = base.guide.transform(w)
    each = [
        CHOICE.probs[k].log() + dist.Normal(2.0 * k + z, 1.0).log_prob(torch.tensor(1.5))
        for k in range(2)
    ]
    log_joint = dist.Normal(0.0, 1.0).log_prob(z) + torch.stack(each).logsumexp(0)
    log_det = base.guide.transform.log_abs_det_jacobian(w, z)
    torch.testing.assert_close(potential(base, w), -(log_joint.sum() + log_det))


def test_a_choice_out_of_range_leaves_the_other():
    base = neutra(small(poutine.block(rates_by_choice, hide=["k"])), rates_by_choice)
    w = torch.tensor([0.4])
    z = base.guide.transform(w)
    x, log_det = z.exp(), base.guide.transform.log_abs_det_jacobian(w, z)
    log_joint = dist.Gamma(2.0, 2.0).log_prob(x) + CHOICE.probs[0].log() + x.log() - x + z
    with pyro.validation_enabled(is_validate=False):
        torch.testing.assert_close(potential(base, w), -(log_joint.sum() + log_det))


def in_a_chain():
    x = pyro.sample("x", dist.HalfNormal(1.0))
    k = 0
    for t in pyro.markov(range(2)):
        k = pyro.sample(f"k{t}", CHOICE, infer={"enumerate": "parallel"})
        width = x * torch.tensor([1.0, 3.0])[k]
        pyro.sample(f"y{t}", dist.Uniform(0.0, width), obs=torch.tensor(1.0))


def test_data_in_a_markov_chain():
    base = neutra(small(poutine.block(in_a_chain, hide=["k0", "k1"])), in_a_chain)
    w = torch.tensor([0.1])
    z = base.guide.transform(w)
    with pyro.validation_enabled(is_validate=False):
        plain, found = potential(in_a_chain, z[0]), potential(base, w)
    torch.testing.assert_close(found, plain - base.guide.transform.log_abs_det_jacobian(w, z))


def test_predictive_gives_the_sites_of_the_model_alone():
    def masked(y=None):
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("rows", 2), poutine.mask(mask=torch.tensor([True, False])):
            pyro.sample("y", dist.Uniform(0.0, 3 * scale), obs=y)

    guide = small(lambda: masked(torch.ones(2)))
    draws = {"scale_shared_latent": torch.zeros(3, guide.latent_dim)}
    assert set(Predictive(neutra(guide, masked), draws)()) <= {"scale", "y"}


def test_draws_of_a_guide_that_gives_the_sites_beside_the_base():
    base = neutra(small())
    guide = AutoNormalMessenger(base)
    assert {"mu_shared_latent", "mu"} <= set(guide())
    found = Predictive(base, guide=guide, num_samples=3)()
    again = base.samples({"mu_shared_latent": found["mu_shared_latent"][:, 0]})
    assert torch.allclose(found["mu"][:, 0], again["mu"])


@pytest.mark.usefixtures("_nodes_stay")
def test_sites_beside_the_base_have_the_density_of_the_base():
    base = neutra(small())
    given = {"mu_shared_latent": torch.randn(4)}
    both = given | {name: value + 1e-15 for name, value in base.samples(given).items()}
    alone, beside = (poutine.trace(poutine.condition(base, d)).get_trace() for d in (given, both))
    torch.testing.assert_close(beside.log_prob_sum(), alone.log_prob_sum())


def test_draws_stay_apart_in_parallel():
    base = neutra(small())
    draws = {"mu_shared_latent": torch.randn(2, 4)}  # as many as rows
    parallel, serial = (
        Predictive(base, draws, return_sites=("mu", "x"), parallel=parallel)()
        for parallel in (True, False)
    )
    torch.testing.assert_close(parallel["x"].reshape(2, 2), serial["x"].reshape(2, 2))


def test_draws_of_sites_that_the_guide_was_not_given_come_back():
    def whole():
        pyro.sample("h", dist.Normal(pyro.sample("x", dist.Normal(0.0, 1.0)), 1.0))

    base = neutra(small(poutine.block(whole, hide=["h"])), whole)
    draws = {"h": torch.randn(2, 4), "x_shared_latent": torch.randn(2, 4, 1)}
    found = base.samples(draws)
    assert list(found) == ["x", "h"]
    assert found["x"].shape == (2, 4)
    assert torch.equal(found["h"], draws["h"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
def test_a_compiled_density_is_the_same():
    base = neutra(small())
    plain, compiled = NUTS(base), NUTS(base, jit_compile=True, ignore_jit_warnings=True)
    for kernel in (plain, compiled):
        kernel.setup(1)
    for w in torch.randn(2, 4):
        values = {"mu_shared_latent": w}
        torch.testing.assert_close(compiled.potential_fn(values), plain.potential_fn(values))


def in_a_plate():
    with pyro.plate("rows", 3), poutine.scale(scale=0.5):
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
    with poutine.mask(mask=torch.arange(2) > 0), pyro.plate("more", 2):
        z = pyro.sample("z", dist.Normal(x.sum(-1, keepdim=True), 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.ones(2), obs_mask=torch.arange(2) > 0)


@pytest.mark.usefixtures("_nodes_stay")
@pytest.mark.parametrize("target", [in_a_plate, model], ids=["plate", "global"])
def test_the_jacobian_counts_once(target):
    """Whatever plate, scale or mask the first site is in; of many draws, each its own."""
    guide = small(target)
    first = next(iter(guide()))
    with torch.no_grad():
        w = torch.randn(4, 1, guide.latent_dim)
        z = guide.transform(w)[:, 0]
        log_det = guide.transform.log_abs_det_jacobian(w[:, 0].clone(), z.clone())
        expected = log_joint(guide)(z) + log_det
        base = poutine.condition(neutra(guide), data={f"{first}_shared_latent": w})
        with pyro.plate("draws", 4, dim=-2):
            trace = poutine.trace(base).get_trace()
        assert torch.allclose(trace.log_prob_sum(), expected.sum())
        jacobians = trace.nodes[f"{first}_log_jacobian"]["fn"].log_factor
        assert jacobians.shape == (4, 1)
        one = poutine.condition(neutra(guide), data={f"{first}_shared_latent": w[0, 0]})
        assert torch.allclose(poutine.trace(one).get_trace().log_prob_sum(), expected[0])


def rows():
    with pyro.plate("rows", 2):
        x = pyro.sample("x", dist.LogNormal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=Y)


@pytest.mark.parametrize(
    "weigh",
    [
        lambda target: poutine.scale(target, 0.25),
        lambda target: poutine.mask(target, torch.arange(2) > 0),
    ],
    ids=["scale", "mask"],
)
def test_what_weighs_a_model_weighs_it_in_base_space(weigh):
    """A density is tempered, not the change of its variables."""
    guide = small(rows)
    w = {"x_shared_latent": torch.randn(2)}
    found, expected = (
        poutine.trace(poutine.condition(base, w)).get_trace().log_prob_sum()
        for base in (weigh(neutra(guide)), neutra(guide, weigh(rows)))
    )
    assert torch.allclose(found, expected)


@pytest.mark.slow
@pytest.mark.usefixtures("_nodes_stay")
def test_it_starts_where_the_sites_are_told_to():
    guide = small()
    values = {"mu": torch.tensor(0.4), "share": torch.tensor(0.3), "x": torch.tensor([0.2, 0.1])}
    kernel = NUTS(neutra(guide), init_strategy=init_to_value(values=values))
    kernel.setup(1)
    found = neutra(guide).samples(kernel.initial_params)
    for name, value in values.items():
        assert torch.allclose(found[name], value, atol=1e-2)  # three steps of the solver
    with InitMessenger(init_to_value(values={"mu": torch.tensor(0.4)})):
        trace = poutine.trace(neutra(guide)).get_trace()
    assert torch.allclose(trace.nodes["mu"]["value"], torch.tensor(0.4), atol=1e-2)
    assert torch.allclose(trace.nodes["x"]["value"], guide.median()["x"], atol=1e-2)
    with InitMessenger(init_to_value(values={"x": torch.tensor(0.4)})):  # one for a whole plate
        trace = poutine.trace(neutra(guide)).get_trace()
    assert torch.allclose(trace.nodes["x"]["value"], torch.tensor(0.4), atol=1e-2)


def with_a_choice(y):
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    k = pyro.sample("k", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
    pyro.sample("y", dist.Normal(x + 4.0 * k, 0.5), obs=y)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrapped", [lambda hidden: hidden, lambda hidden: poutine.scale(hidden, 1.0)]
)
def test_a_guide_whose_model_hides_a_site_needs_the_model(wrapped):
    """Else the site is drawn anew in each run, and the density is noise."""
    hidden, y = poutine.block(with_a_choice, hide=["k"]), torch.tensor(2.5)
    guide = AutoInterpolant(wrapped(hidden), hidden_dims=(8,), solver=FixedGrid(3))
    guide(y)
    with pytest.raises(ValueError, match=r"poutine.block wraps.*: pass the model itself, neutra"):
        neutra(guide)
    base = neutra(guide, with_a_choice)
    kernel = NUTS(base)
    kernel.setup(1, y)
    w = {"x_shared_latent": torch.tensor([0.3])}
    one, again = (kernel.potential_fn(w) for _ in range(2))
    assert torch.equal(one, again)
    z = guide.transform(w["x_shared_latent"])
    prior = dist.Normal(0.0, 1.0).log_prob(z[0])
    likelihood = dist.Normal(z + torch.tensor([0.0, 4.0]), 0.5).log_prob(y).exp().mean().log()
    log_det = guide.transform.log_abs_det_jacobian(w["x_shared_latent"], z)
    assert torch.allclose(-one, prior + likelihood + log_det)
    assert base.samples(run(base, y).get_samples())["x"].shape == (5,)


def test_a_site_that_is_observed_or_missing_is_refused():
    base = neutra(small())
    with pytest.raises(ValueError, match="'mu' to be latent"):
        poutine.condition(base, {"mu": torch.tensor(0.0)})()
    with pytest.raises(ValueError, match=r"a model without \['share', 'x'\]"):
        neutra(small(), lambda: pyro.sample("mu", dist.Normal(0.0, 1.0)))()


def test_a_guide_of_the_sites_themselves_is_refused():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    guide = AutoInterpolant(model)
    guide()
    base = neutra(guide)
    own = poutine.trace(base).get_trace()
    again = poutine.trace(poutine.replay(base, trace=own)).get_trace()
    assert torch.equal(again.nodes["x"]["value"], own.nodes["x"]["value"])
    with pytest.raises(ValueError, match="got site 'x' replayed"):
        poutine.replay(base, trace=poutine.trace(model).get_trace())()


def test_one_solve_per_gradient(monkeypatch):
    guide = small()
    base = neutra(guide)
    calls, velocity = [], base.guide.transform.velocity
    kept, plain = MLPRecord.__call__, velocity._velocity
    monkeypatch.setattr(MLPRecord, "__call__", lambda *args: (calls.append(1), kept(*args))[1])
    velocity._velocity = lambda *args, **named: (calls.append(1), plain(*args, **named))[1]
    w = torch.randn(guide.latent_dim, requires_grad=True)
    trace = poutine.trace(poutine.condition(base, data={"mu_shared_latent": w})).get_trace()
    trace.log_prob_sum().backward()
    assert len(calls) == 4 * 3
    assert w.grad.abs().min() > 0


def test_the_guide_stays_trainable_and_the_sampler_does_not_follow():
    guide = small()
    base = neutra(guide)
    kept = [p.detach().clone() for p in base.guide.parameters()]
    assert not any(p.requires_grad for p in base.guide.parameters())
    before = [p.detach().clone() for p in guide.parameters()]
    SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO()).step()
    assert not any(torch.equal(a, b) for a, b in zip(guide.parameters(), before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(base.guide.parameters(), kept, strict=True))


@pytest.mark.slow
def test_it_can_be_pickled_for_chains_in_other_processes():
    again = pickle.loads(pickle.dumps(neutra(small())))
    samples = again.samples(run(again).get_samples())
    assert samples["x"].shape == (5, 2)


@pytest.mark.slow
def test_an_amortised_guide_is_pickled_with_its_model():
    guide = AmortizedInterpolant(model, hidden_dims=(8,))
    guide(Y)
    base = neutra(guide)
    copy, values = pickle.loads(pickle.dumps(base)), {"mu_shared_latent": torch.zeros(4)}
    sums = [
        poutine.trace(poutine.condition(one, values)).get_trace(Y).log_prob_sum()
        for one in (base, copy)
    ]
    assert torch.equal(*sums)


def test_another_model_with_the_same_sites():
    base = neutra(small(), lambda: model(Y + 1))
    assert base.samples(run(base).get_samples())["x"].shape == (5, 2)


@pytest.mark.slow
def test_a_good_guide_makes_a_bad_geometry_easy():
    scales = torch.tensor([0.01, 1.0, 100.0])
    covariance = scales[:, None] * (0.1 * torch.eye(3) + 0.9) * scales

    def stretched():
        pyro.sample("x", dist.MultivariateNormal(scales, covariance))

    guide = AutoInterpolant(stretched, hidden_dims=(4,), solver=FixedGrid(1, "euler"))
    guide()
    guide.transform.flow.whitening.set(scales, torch.linalg.cholesky(covariance))
    base = neutra(guide)
    x = base.samples(run(base, samples=80).get_samples(group_by_chain=True))["x"]
    assert float(effective_sample_size(x).min()) > 30
    assert torch.allclose((x[0].mean(0) - scales) / scales, torch.zeros(3), atol=0.5)
    assert torch.allclose(x[0].std(0) / scales, torch.ones(3), atol=0.4)


@pytest.mark.parametrize("count", [0, 3])
def test_draws_may_be_arrays_and_none(count):
    base, w = neutra(small()), torch.randn(count, 4)
    expected = base.samples({"mu_shared_latent": w})
    assert expected["x"].shape == (count, 2)
    base.guide.float()
    found = base.samples({"mu_shared_latent": w.numpy()})
    assert found["x"].dtype == torch.float32
    torch.testing.assert_close(found["x"].double(), expected["x"], rtol=1e-4, atol=1e-4)


def test_what_cannot_work_is_refused():
    with pytest.raises(TypeError, match="AutoInterpolant, got AutoDiagonalNormal: use Pyro's Neu"):
        neutra(AutoDiagonalNormal(model))
    with pytest.raises(ValueError, match="a guide that has seen its model: train it, or call it"):
        neutra(AutoInterpolant(model))
    base = neutra(small())
    for draws in ({"x": torch.zeros(3)}, {"mu_shared_latent": torch.zeros(3, 2)}):
        with pytest.raises(ValueError, match=r"site '\*_shared_latent' of shape \(\*, 4\), from"):
            base.samples(draws)
