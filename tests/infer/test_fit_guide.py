"""Training a guide without an ODE's gradient: on draws, and on the model alone."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal, init_to_value
from pyro.infer.reparam import NeuTraReparam
from pyro.optim import Adam

from pyro_interpolant import AmortizedInterpolant, AutoInterpolant, FixedGrid, fit_guide, log_joint
from pyro_interpolant._torch import seeded
from pyro_interpolant.diagnostics.psis import weighted_draws
from pyro_interpolant.infer import GuideResult, autoguide, prior
from pyro_interpolant.infer.smc.train import RoundsResult
from pyro_interpolant.interpolants import Mirror
from pyro_interpolant.training.clock import Clock

pytestmark = pytest.mark.usefixtures("_few_held_draws")

QUICK = {"steps": 60, "batch_size": 256}
SHORT = {**QUICK, "steps": 5}  # where nobody looks at what is learned


def skewed():
    """A density that is normalised, so that log Z = 0."""
    rate = pyro.sample("rate", dist.LogNormal(0.3, 0.5))
    with pyro.plate("rows", 2):
        pyro.sample("x", dist.Normal(rate.log(), 0.7))


def draws_of(count=2000):
    with torch.no_grad():
        rate = dist.LogNormal(0.3, 0.5).sample((count,))
        x = dist.Normal(rate.log()[:, None], 0.7).expand((count, 2)).sample()
    return {"rate": rate, "x": x}


def quick(guide, *args, **kwargs):
    samples = kwargs.pop("samples", None) or draws_of()
    options = {"seed": 0, "progress": False, "options": QUICK, **kwargs}
    return fit_guide(guide, *args, samples=samples, **options)


def small(target=skewed, **options):
    return AutoInterpolant(target, **{"hidden_dims": (16, 16), **options})


def unsettled():
    """A guide that its first step moves in every weight: the last layer is not zero."""
    guide = small()
    guide()
    with torch.no_grad():
        guide.transform.velocity.output.weight.normal_(std=0.1)
    return guide


# -------------------------------------------------------------------------------------- on samples


@pytest.mark.slow
def test_regression_on_samples():
    guide = small()
    result = fit_guide(
        guide, samples=draws_of(4000), seed=0, progress=False, options={"steps": 150}
    )
    assert result._fields[:4] == ("k_hat", "ess", "log_evidence", "log_evidence_stderr")
    assert result.k_hat < 0.7
    assert result.ess > 0.6 * result.draws == 0.6 * 10_000
    assert abs(result.log_evidence) < 4 * result.log_evidence_stderr + 0.02
    assert result.verdict.startswith("Good, k-hat")
    assert result.seconds >= result.training.seconds
    z = guide.get_posterior().sample((4000,))
    expected = log_joint(guide).pack(draws_of(4000))
    assert torch.allclose(z.mean(0), expected.mean(0), atol=0.1)
    assert torch.allclose(z.T.cov(), expected.T.cov(), atol=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_no_gradient_passes_an_ode(monkeypatch):
    """It is solved at looks, for the density of rows held out, and at calibration."""
    guide, solved = unsettled(), []
    integrate = type(guide.transform.flow).integrate

    def watched(*args, **kwargs):
        solved.append(torch.is_grad_enabled())
        return integrate(*args, **kwargs)

    monkeypatch.setattr(type(guide.transform.flow), "integrate", watched)
    before = [p.detach().clone() for p in guide.parameters()]
    quick(guide, options=SHORT)
    assert solved
    assert not any(solved)
    assert not any(torch.equal(a, b) for a, b in zip(guide.parameters(), before, strict=True))


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_samples_by_chain_and_from_predictive():
    flat = draws_of()
    by_chain = {k: v.reshape(4, 500, *v.shape[1:]) for k, v in flat.items()}
    with_plates = {"rate": flat["rate"][:, None], "x": flat["x"]}
    solutions = []
    for samples in (flat, by_chain, with_plates):
        guide = small()
        quick(guide, samples=samples, options=SHORT)
        solutions.append(guide.transform.velocity.output.weight.detach().clone())
    assert torch.equal(solutions[0], solutions[1])
    assert torch.equal(solutions[0], solutions[2])


@pytest.mark.slow
def test_samples_of_a_sampler():
    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(mu, 1.0), obs=y)

    mcmc = MCMC(NUTS(model), num_samples=200, warmup_steps=50, disable_progbar=True)
    y = torch.ones(2)
    mcmc.run(y)
    guide = small(model)
    result = fit_guide(
        guide, y=y, samples=mcmc.get_samples(), seed=0, progress=False, options={"steps": 60}
    )
    precision = torch.eye(2) - torch.full((2, 2), 1 / 3)
    exact = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1).log_prob(y)
    assert torch.allclose(precision.inverse(), torch.eye(2) + 1)
    assert abs(result.log_evidence - float(exact)) < 0.05


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_the_same_seed_gives_the_same_guide_and_leaves_the_generator():
    guides = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        samples = {k: v.clone() for k, v in SAMPLES.items()}
        state = torch.get_rng_state()
        guides.append(small())
        result = quick(guides[-1], samples=samples, options=SHORT)
        assert torch.equal(torch.get_rng_state(), state)
    first, second = (torch.cat([p.flatten() for p in g.parameters()]) for g in guides)
    assert torch.equal(first, second)
    assert result.k_hat == quick(small(), samples=SAMPLES, options=SHORT).k_hat


torch.manual_seed(5)
SAMPLES = {k: v.double() for k, v in draws_of(500).items()}


def test_a_guide_along_a_path_from_the_data_is_refused():
    with pytest.raises(ValueError, match="a path from noise, which has a density, got Mirror"):
        small(interpolant=Mirror())


@pytest.mark.usefixtures("_small_runs")
def test_an_interrupt_keeps_the_best_weights(monkeypatch):
    def interrupt(state):
        if state.step >= 5:
            raise KeyboardInterrupt

    guide = small()
    with pytest.warns(UserWarning, match="run was interrupted"):
        result = quick(guide, options={**QUICK, "callback": interrupt})
    assert result.training.stopped_early
    assert math.isfinite(result.log_evidence)


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_after_it_everything_else_works():
    guide = small(solver=FixedGrid(4))
    quick(guide, options=SHORT)
    svi = SVI(skewed, guide, Adam({"lr": 1e-3}), Trace_ELBO())
    before = [p.detach().clone() for p in guide.parameters()]
    assert math.isfinite(svi.step())
    assert not any(torch.equal(a, b) for a, b in zip(guide.parameters(), before, strict=True))
    assert guide.median()["x"].shape == (2,)
    assert Predictive(skewed, guide=guide, num_samples=3)()["x"].shape == (3, 2)
    frozen = guide.requires_grad_(requires_grad=False).eval()
    mcmc = MCMC(
        NUTS(NeuTraReparam(frozen).reparam(skewed)),
        num_samples=3, warmup_steps=3, disable_progbar=True,
    )  # fmt: skip
    mcmc.run()


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_frozen_weights_are_trained_and_frozen_afterwards():
    guide = unsettled()
    guide.requires_grad_(requires_grad=False)
    before = [p.clone() for p in guide.parameters()]
    quick(guide, options=SHORT)
    assert not any(torch.equal(a, b) for a, b in zip(guide.parameters(), before, strict=True))
    assert not any(p.requires_grad for p in guide.parameters())


@pytest.mark.slow
def test_a_poor_guide_warns_with_what_to_do():
    narrow = {k: v.mean(0) + 0.05 * (v - v.mean(0)) for k, v in draws_of().items()}
    with pytest.warns(
        UserWarning, match=r"Poor, k-hat .* train it longer by fit_guide, .*LocSc"
    ) as w:
        result = quick(small(), samples=narrow)
    assert result.k_hat > 0.7
    assert [warning.filename for warning in w] == [__file__]


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_a_model_without_a_log_joint_is_fitted_but_not_judged():
    data = torch.zeros(8)

    def subsampled():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 8, subsample_size=3) as rows:
            pyro.sample("y", dist.Normal(x, 1.0), obs=data[rows])

    samples = {"x": torch.randn(1000)}
    with pytest.warns(
        UserWarning, match="will not be judged by importance weights: .* that sub"
    ) as w:
        result = quick(small(subsampled), samples=samples, options=SHORT)
    assert w[0].filename == __file__
    assert math.isnan(result.k_hat)
    assert result.draws == 0
    assert result.verdict == "Unknown, the log joint density cannot be evaluated."


def test_the_last_verdict_decides_whether_own_draws_are_warned_of(monkeypatch):
    guide, clock, text = small(), Clock(None), "Usable with weights."
    guide()
    found = GuideResult(0.6, 950.0, 0.0, 0.0, 1000, text, 1.0, None)
    monkeypatch.setattr(autoguide, "importance_verdict", lambda *args: found)
    for density, poor in ((log_joint(guide), text), (None, None)):
        guide._judged(guide.get_posterior(), density, clock, 0, None)
        assert guide.poor == poor


# ----------------------------------------------------------------------------- on the model alone


@pytest.fixture
def rounds(monkeypatch):
    """Record how training from a density is called, and judge as it does."""
    calls = []

    def train(distribution, density, **kwargs):
        calls.append((distribution, density, kwargs))
        with torch.no_grad(), seeded(0):
            drawn = weighted_draws(distribution, density, 10_000)
        rest = (drawn.x[:100], [], 0, 1.0, distribution.transform.solver, "rounds")
        return RoundsResult(*drawn.summary(), 10_000, *rest)

    monkeypatch.setattr(autoguide, "train_from_density", train)
    return calls


def test_the_model_alone(rounds):
    guide = small()
    guide()
    z = log_joint(guide).pack(draws_of(4000))
    guide.transform.flow.whitening.set(z.mean(0), torch.linalg.cholesky(z.T.cov()))  # a good guide
    state = torch.get_rng_state()
    result = fit_guide(guide, max_seconds=70.0, seed=3, progress=False, rounds=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert result.verdict.startswith("Good, k-hat")
    assert abs(result.log_evidence) < 0.02
    assert result.draws == 10_000
    assert isinstance(result.training, RoundsResult)
    assert result[:5] == result.training[:5]  # there is one verdict
    distribution, density, kwargs = rounds[0]
    assert distribution.transform is guide.transform
    start = kwargs.pop("start")
    assert 0 < kwargs.pop("max_seconds") <= 70.0
    assert kwargs == {"seed": 3, "progress": False, "rounds": 2}
    z = torch.zeros(2, 3)
    assert torch.equal(density(z), log_joint(guide)(z))
    assert start.shape == (4096, 3)  # the prior
    assert abs(float(start[:, 0].mean()) - 0.3) < 0.05
    with pytest.warns(UserWarning, match="Poor, k-hat"):
        fit_guide(small(), seed=3, progress=False)  # not trained


@pytest.mark.slow
def test_the_model_alone_in_earnest():
    limits = {"rounds": 2, "options": {"steps": 60}}

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("rows", 2):
            pyro.sample("y", dist.Normal(mu, scale), obs=y)

    y = torch.tensor([1.0, 2.0])
    guide = small(model, hidden_dims=(32, 32))
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few seconds may be too few
        limits["options"] = {"draws": 1000, **limits.get("options", {})}
        result = fit_guide(guide, y, seed=0, progress=False, **limits)
        assert torch.equal(torch.get_rng_state(), state)
        assert math.isfinite(SVI(model, guide, Adam({"lr": 1e-3}), Trace_ELBO()).step(y))
    s = torch.linspace(-4, 4, 2001).exp()  # of the scale, the mean integrated out
    covariance = s[:, None, None] ** 2 * torch.eye(2) + 1
    inner = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(y)
    outer = dist.Normal(0.0, 0.5).log_prob(s.log())
    exact = float((inner + outer).logsumexp(0)) + math.log(8 / 2000)
    assert abs(result.log_evidence - exact) < 0.1


def by_index():
    z = pyro.sample("z", dist.Normal(torch.tensor([1.0, 5.0]), 2.0).to_event(1))
    pyro.factor("f", z[0] * 0.1)


def improper():
    pyro.sample("x", dist.ImproperUniform(dist.constraints.positive, (), (2,)))
    pyro.sample("y", dist.Normal(5.0, 1.0))


def unsampled():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    if x.dim() > 0 and x.requires_grad is False and x.shape[0] > 100:
        raise RuntimeError("no")
    pyro.sample("y", dist.Normal(x, 1.0))


def test_draws_of_the_prior():
    z = prior.prior_draws(log_joint(by_index), 4000)
    assert log_joint(by_index).batching == "vmap"
    assert torch.allclose(z.mean(0), torch.tensor([1.0, 5.0]), atol=0.2)
    assert torch.allclose(z.std(0), torch.tensor([2.0, 2.0]), atol=0.2)
    z = prior.prior_draws(log_joint(improper), 4000)
    assert torch.allclose(z.mean(0), torch.tensor([0.0, 0.0, 5.0]), atol=0.2)
    assert torch.allclose(z.std(0), torch.tensor([2.0, 2.0, 1.0]), atol=0.2)
    assert len(prior.prior_draws(log_joint(unsampled), 4000)) == 128  # one by one


def test_a_prior_that_cannot_be_drawn_has_no_draws(monkeypatch):
    density = log_joint(by_index)

    def fails(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(torch.distributions.Normal, "sample", fails)
    assert prior.prior_draws(density, 4000) is None


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base_samples": 5 + torch.rand(500, 3)}, ValueError, "a guide starts from N"),
        ({"context": torch.zeros(500, 1)}, ValueError, "other options of fit than context"),
        ({"step": 5}, TypeError, "expected options of fit, got step"),
        ({"steps": -5}, ValueError, "steps >= 1"),
    ],
)
def test_options_that_cannot_work_are_refused_before_the_model_is_simulated(
    options, error, message
):
    """A guide on samples of a base was trained from these, and drew from N(0, I)."""
    runs = []

    def rows(y=None):
        runs.append(1)
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0).expand([3]).to_event(1), obs=y)

    guide = AmortizedInterpolant(rows)
    guide(torch.zeros(3))
    runs.clear()
    with pytest.raises(error, match=message):
        fit_guide(guide, simulations=100, progress=False, options=options)
    assert len(runs) < 3
    with pytest.raises(error, match=message):
        fit_guide(small(), samples=SAMPLES, progress=False, options=options)


def test_what_cannot_work_is_said_before_any_work():
    guide = small()
    samples = draws_of()
    with pytest.raises(ValueError, match=r"draws of site 'x' of shape \(N, 2\), .* got none"):
        quick(guide, samples={"rate": samples["rate"]})
    with pytest.raises(ValueError, match=r"site 'x' of shape \(N, 2\), .* got shape \(2000, 3\)"):
        quick(guide, samples={**samples, "x": torch.zeros(2000, 3)})
    with pytest.raises(ValueError, match="site 'rate': expected values strictly inside"):
        quick(guide, samples={**samples, "rate": -samples["rate"]})
    with pytest.raises(ValueError, match="NaN or infinite"):
        quick(guide, samples={**samples, "x": samples["x"] / 0})
    with pytest.raises(ValueError, match="expected draws of every site, got none"):
        quick(guide, samples={name: value[:0] for name, value in samples.items()})
    with pytest.raises(
        TypeError, match=r"draws of each site \['rate', 'x'\] by name, .* got Tensor"
    ):
        fit_guide(guide, samples=samples["x"])
    with pytest.raises(ValueError, match="expected max_seconds > 0, got -1"):
        quick(guide, max_seconds=-1)
    with pytest.raises(TypeError, match=r"of pyro_interpolant, got pyro\..*\.AutoNormal"):
        fit_guide(AutoNormal(skewed), samples=samples)
    hidden = poutine.block(
        lambda: pyro.factor("f", pyro.sample("x", dist.Normal(0.0, 1.0)) * pyro.sample(
            "k", dist.Bernoulli(0.5))), hide=["k"],
    )  # fmt: skip
    with pytest.raises(ValueError, match="log density without noise"):
        fit_guide(small(hidden, init_loc_fn=init_to_value(values={"x": torch.tensor(1.0)})))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guide.transform.velocity.output.weight.abs().max() == 0  # nothing was trained
