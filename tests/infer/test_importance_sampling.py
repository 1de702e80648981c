"""Importance weights of a guide's draws: against closed forms, and what they cannot see."""

import functools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from pyro.infer.autoguide import (
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLaplaceApproximation,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_value,
)
from torch.distributions import SigmoidTransform

from pyro_interpolant import AutoInterpolant, FixedGrid, importance, log_joint
from pyro_interpolant.diagnostics.psis import ImportanceSummary, log_ratio
from pyro_interpolant.infer import ImportanceResult
from pyro_interpolant.infer.importance_sampling import (
    at_edges,
    judged,
    verdict_of,
)

Y = torch.tensor([1.0, 3.0], dtype=torch.float64)


def conjugate(y=Y):
    """A posterior N(4/3, 1/3) and the evidence N(y; 0, I + 1)."""
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", 2):
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


EVIDENCE = float(
    dist.MultivariateNormal(torch.zeros(2).double(), torch.eye(2).double() + 1).log_prob(Y)
)


def gaussian(loc, scale, target=conjugate, **options):
    """Return a guide that is N(loc, scale^2) in each dimension."""
    options = {"hidden_dims": (4,), "solver": FixedGrid(1, "euler"), **options}
    guide = AutoInterpolant(target, **options)
    guide()
    dim = guide.latent_dim
    guide.transform.flow.whitening.set(torch.full((dim,), loc), scale * torch.eye(dim))
    return guide


def quietly(*args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importance(*args, **kwargs)


def test_the_posterior_itself_is_perfect():
    result = importance(gaussian(4 / 3, 3**-0.5), count=1000, seed=0)
    assert isinstance(result, ImportanceResult)
    assert result._fields[:5] == (
        "k_hat", "ess", "log_evidence", "log_evidence_stderr", "verdict"
    )  # fmt: skip
    assert result.k_hat < 0.5
    assert result.ess == pytest.approx(1000)
    assert result.log_evidence == pytest.approx(EVIDENCE, abs=1e-8)
    assert result.log_evidence_stderr == pytest.approx(0, abs=1e-6)
    assert result.verdict.startswith("Good, k-hat")
    assert "1,000 effective draws of 1,000" in result.verdict


def test_a_wide_guide_is_mended_by_its_weights():
    result = importance(gaussian(1.0, 2.0), count=20_000, seed=0)
    assert result.k_hat < 0.5
    error = result.log_evidence - EVIDENCE
    assert abs(error) < 4 * result.log_evidence_stderr < 0.1
    assert result.ess < 0.45 * 20_000
    assert result.verdict.startswith("Usable with weights, k-hat")
    w = result.log_weights.exp()
    assert float(w.sum()) == pytest.approx(1)
    assert float(w @ result.draws["x"]) == pytest.approx(4 / 3, abs=0.03)
    x = result.resampled(seed=0)["x"]
    assert x.shape == (20_000,)
    assert float(x.mean()) == pytest.approx(4 / 3, abs=0.03)
    assert float(x.std()) == pytest.approx(3**-0.5, abs=0.03)


@pytest.mark.slow
def test_the_standard_error_is_that_of_repetitions():
    guide = gaussian(1.0, 1.2)
    results = [importance(guide, count=400, seed=seed) for seed in range(40)]
    spread = torch.tensor([r.log_evidence for r in results]).std()
    stated = torch.tensor([r.log_evidence_stderr for r in results]).mean()
    assert 0.6 < float(stated / spread) < 1.6


def test_a_narrow_guide_warns():
    with pytest.warns(
        UserWarning, match=r"^Poor, k-hat .* train it longer .*before you trust"
    ) as w:
        result = importance(gaussian(0.0, 0.1), seed=0)
    assert result.k_hat > 0.7
    assert [warning.filename for warning in w] == [__file__]


@pytest.mark.parametrize(
    "kind",
    [AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoIAFNormal],
)
def test_other_guides_of_pyro(kind):
    def two():
        pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    guide = kind(two) if kind is AutoIAFNormal else kind(two, init_scale=1.0)
    result = quietly(guide, count=2000, seed=0)
    assert abs(result.log_evidence) < 5 * result.log_evidence_stderr + 0.05
    assert result.draws["x"].shape == (2000, 2)


def test_laplace_once_it_is_a_gaussian():
    guide = AutoLaplaceApproximation(conjugate)
    guide()
    with torch.no_grad():
        guide.loc.fill_(4 / 3)
    with pytest.raises(ValueError, match="with a density, got the point AutoLaplaceApproximation"):
        importance(guide)
    result = importance(guide.laplace_approximation(), count=500, seed=0)
    assert result.log_evidence == pytest.approx(EVIDENCE, abs=1e-6)


def test_arguments_reach_the_model():
    guide = gaussian(0.5, 0.8)
    y = torch.tensor([0.0, 1.0])
    expected = dist.MultivariateNormal(torch.zeros(2), torch.eye(2) + 1).log_prob(y)
    for result in (importance(guide, y, seed=0), importance(guide, y=y, seed=0)):
        assert result.log_evidence == pytest.approx(float(expected), abs=0.05)


def test_a_seed_makes_it_reproducible_and_leaves_the_generator():
    guide = gaussian(1.0, 1.0)
    results = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        results.append(importance(guide, count=200, seed=7))
        again = results[-1].resampled(10, seed=3)["x"]
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(results[0].log_weights, results[1].log_weights)
    assert torch.equal(results[0].resampled(10, seed=3)["x"], again)
    importance(guide, count=200)
    assert not torch.equal(torch.get_rng_state(), state)


def test_the_weights_are_p_over_q():
    def two():
        pyro.sample("x", dist.StudentT(3.0).expand([2]).to_event(1))

    guide = gaussian(0.2, 1.0, two)
    result = quietly(guide, count=2000, seed=0)
    x = result.draws["x"]
    raw = log_joint(two)(x) - dist.Normal(0.2, 1.0).log_prob(x).sum(-1)
    bulk = raw < raw.quantile(0.8)  # the tail is smoothed
    shift = (result.log_weights - raw)[bulk]
    assert torch.allclose(shift, shift[0].expand_as(shift))


# -------------------------------------------------------------------------------------- resampling


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive_accepts_resampled_draws(parallel):
    def observed(y=None):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.3))
        with pyro.plate("rows", 3):
            x = pyro.sample("x", dist.Normal(0.0, scale))
            return pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    guide = gaussian(0.0, 1.0, lambda: observed(torch.zeros(3))).attach(observed)
    drawn = quietly(guide, torch.zeros(3), count=500, seed=0).resampled(20, seed=0)
    assert {k: tuple(v.shape) for k, v in drawn.items()} == {"scale": (20,), "x": (20, 3)}
    assert Predictive(observed, drawn, parallel=parallel)()["y"].shape == (20, 3)


def test_resampling_is_in_proportion():
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125])
    result = ImportanceResult(
        0.1, 3.0, 0.0, 0.0, "", weights.log(), {"x": torch.arange(4.0), "v": torch.eye(4)}
    )
    drawn = result.resampled(800, seed=0)
    counts = torch.bincount(drawn["x"].long(), minlength=4)
    assert torch.allclose(counts / 800.0, weights, atol=1 / 800)
    assert torch.equal(drawn["v"].argmax(-1), drawn["x"].long())
    assert not torch.equal(drawn["x"], drawn["x"].sort().values)  # in random order
    assert result.resampled()["x"].shape == (4,)
    with pytest.raises(ValueError, match="expected count >= 1, a whole number, got 0"):
        result.resampled(0)


# ------------------------------------------------------------------------------------------ limits


def test_no_draw_where_the_model_has_a_density():
    def bounded():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.factor("f", torch.where(x.abs() < 5, 0.0, -torch.inf))

    guide = gaussian(100.0, 0.1, bounded)
    with pytest.warns(UserWarning, match="Poor, k-hat inf, 0 effective draws of 100"):
        result = importance(guide, count=100, seed=0)
    assert (result.k_hat, result.ess, result.log_evidence) == (math.inf, 0.0, -math.inf)
    with pytest.raises(ValueError, match="expected draws with positive weights, got none"):
        result.resampled(3)


def test_a_mode_that_no_draw_visits_is_invisible():
    def bimodal():
        weights = torch.tensor([0.3, 0.7])
        modes = torch.tensor([[-50.0], [50.0]])
        fn = dist.MixtureOfDiagNormals(modes, torch.ones(2, 1), weights.log())
        pyro.sample("x", fn)

    result = importance(gaussian(-50.0, 1.0, bimodal), seed=0)
    assert result.k_hat < 0.7  # as documented
    assert result.log_evidence == pytest.approx(math.log(0.3), abs=1e-6)
    assert "stays invisible" in " ".join(importance.__doc__.split())


def test_a_solver_that_is_too_coarse_is_found_out():
    guide = gaussian(4 / 3, 3**-0.5, hidden_dims=(16, 16), solver=FixedGrid(2, "euler"))
    with torch.no_grad():
        guide.transform.velocity.output.weight.normal_(std=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = importance(guide, count=500, seed=0)
    said = [str(w.message) for w in caught if "the guide's solver is too coarse" in str(w.message)]
    assert len(said) == 1
    assert "nats at doubled steps. Call calibrate(guide.get_posterior()" in said[0]
    assert caught[0].filename == __file__
    assert math.isfinite(result.log_evidence)
    guide.transform.solver = FixedGrid(16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        importance(guide, count=500, seed=0)
    assert not [w for w in caught if "coarse" in str(w.message)]


def test_where_a_density_is_infinite_there_is_none():
    def model():
        pyro.sample("x", dist.Gamma(torch.tensor(0.02, dtype=torch.float32), 1.0))

    start = init_to_value(values={"x": torch.tensor(1e-10, dtype=torch.float32)})
    guide = AutoDiagonalNormal(model, init_loc_fn=start, init_scale=40.0)
    result = quietly(guide, count=1000, seed=0)
    none = result.log_weights == -math.inf
    assert 0 < int(none.sum()) < 100
    assert set(result.draws["x"][none].tolist()) <= {0.0, math.inf}  # exp of very large z, too
    z = torch.tensor([[-100.0], [-120.0]], dtype=torch.float32)
    assert log_joint(guide)(z).isfinite().tolist() == [True, False]
    assert log_joint(guide)(z)[1] == -math.inf
    assert log_ratio(torch.tensor([0.0, math.inf]), torch.zeros(2)).tolist() == [0.0, -math.inf]


@pytest.mark.parametrize("level", [0.0, 8.0, 14.0])
def test_weight_where_a_type_knows_no_more_of_an_edge_is_told_of(level):
    def of_type(dtype):
        loc, unit = (torch.tensor(x, dtype=dtype) for x in (level, 1.0))

        def model():
            fn = dist.TransformedDistribution(dist.Normal(loc, unit), [SigmoidTransform()])
            pyro.sample("p", fn)

        start = init_to_value(values={"p": loc.sigmoid()})
        guide = AutoDiagonalNormal(model, init_loc_fn=start, init_scale=1.0)
        guide()
        return guide

    for dtype in (torch.float32, torch.float64):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            importance(of_type(dtype), count=2000, seed=0)
        text = f"{dtype} cannot tell values of 'p' from an edge"
        is_told = any(text in str(warning.message) for warning in found)
        assert is_told == (level == 14.0 and dtype == torch.float32)


@pytest.mark.parametrize("count", [400, 4000])
def test_weight_that_is_lost_at_an_edge_is_a_share_of_that_of_all_draws(count):
    loc, unit = torch.tensor(14.0, dtype=torch.float32), torch.ones((), dtype=torch.float32)

    def model():
        pyro.sample(
            "p", dist.TransformedDistribution(dist.Normal(loc, unit), [SigmoidTransform()])
        )

    start = init_to_value(values={"p": loc.sigmoid()})
    guide = AutoDiagonalNormal(model, init_loc_fn=start, init_scale=1.0)
    guide()
    z = torch.full((count, 1), 14.0, dtype=torch.float32)
    z[0] = 17.0  # alone where all is one
    found = at_edges(guide.get_posterior().log_prob, log_joint(guide), z, 0.0)
    assert bool(found) == (count == 400)


def test_one_of_several_numbers_at_an_edge_is_enough():
    loc = torch.tensor([14.0, 0.0], dtype=torch.float32)

    def model():
        fn = dist.TransformedDistribution(
            dist.Normal(loc, torch.ones_like(loc)), [SigmoidTransform()]
        )
        pyro.sample("p", fn.to_event(1))

    start = init_to_value(values={"p": loc.sigmoid()})
    guide = AutoDiagonalNormal(model, init_loc_fn=start, init_scale=1.0)
    guide()
    z = loc.repeat(400, 1)
    z[0, 0] = 17.0
    assert "'p'" in at_edges(guide.get_posterior().log_prob, log_joint(guide), z, 0.0)


def test_weight_at_an_edge_is_warned_of_whatever_k_hat_says(monkeypatch):
    monkeypatch.setattr("pyro_interpolant.infer.importance_sampling.at_edges", lambda *_: "lost")
    with pytest.warns(UserWarning, match="Off at an edge, k-hat 0.10"):
        judged(None, None, None, ImportanceSummary(0.1, 990.0, 0.0, 0.0), 1000)


def tiny_rates(scale):
    fn = dist.Gamma(0.04 * torch.ones_like(scale), 1.0)  # which rounds to its own type
    pyro.sample("x", fn)


def far_apart(scale):
    pyro.sample("x", dist.LogNormal(torch.zeros_like(scale), scale))


@pytest.mark.parametrize("model", [tiny_rates, far_apart])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_that_underflow_to_an_edge_are_told_of(model, dtype):
    scale = torch.tensor(30.0, dtype=dtype)
    start = init_to_value(values={"x": torch.tensor(1e-10, dtype=dtype)})
    guide = AutoDiagonalNormal(functools.partial(model, scale), init_loc_fn=start, init_scale=40.0)
    result = quietly(guide, seed=0)
    if dtype is torch.float64:
        assert "edge" not in result.verdict
    else:  # what lies beyond the smallest number has no weight
        assert result.verdict.startswith("Off at an edge, k-hat")


def test_draws_beyond_the_largest_number_where_nothing_lies_are_not():
    def model():
        pyro.sample("x", dist.HalfNormal(torch.ones((), dtype=torch.float32)))

    start = init_to_value(values={"x": torch.ones((), dtype=torch.float32)})
    result = quietly(AutoDiagonalNormal(model, init_loc_fn=start, init_scale=40.0), seed=0)
    assert bool(result.draws["x"].isinf().any())
    assert "edge" not in result.verdict


def test_weights_that_are_right_beside_an_inverse_that_is_not():
    def model():
        pyro.sample("x", dist.Dirichlet(torch.full((30,), 0.5, dtype=torch.float32)))

    guide = AutoMultivariateNormal(model)
    guide()
    z = torch.distributions.biject_to(dist.constraints.simplex).inv(
        dist.Dirichlet(torch.full((30,), 0.5)).sample((4000,))
    )
    guide.loc.data, guide.scale.data = z.mean(0).float(), z.std(0).float()
    result = quietly(guide, seed=0)
    assert "edge" not in result.verdict


def test_what_cannot_work_is_refused():
    with pytest.raises(TypeError, match="over one unconstrained vector .* got AutoNormal"):
        importance(AutoNormal(conjugate))
    with pytest.raises(TypeError, match="got function"):
        importance(conjugate)
    for count in (10, 1000.5):
        with pytest.raises(ValueError, match=f"count >= 100, a whole number, got {count}"):
            importance(AutoInterpolant(conjugate), count=count)
    result = ImportanceResult(0.1, 5.0, 0.0, 0.0, "", torch.zeros(5), {"x": torch.arange(5)})
    assert len(result.resampled(2.0)["x"]) == 2
    with pytest.raises(ValueError, match=r"count >= 1, a whole number, got 2\.5"):
        result.resampled(2.5)


def verdict(k_hat, ess):
    return verdict_of(ImportanceSummary(k_hat, ess, 0.0, 0.0), 1000)


def test_verdicts():
    assert verdict(0.3, 900.0).startswith("Good, k-hat 0.30, 900 effective draws of 1,0")
    assert verdict(0.3, 800.0).startswith("Usable with weights, k-hat 0.30")
    assert verdict(0.3, 100.0).startswith("Usable with weights, k-hat 0.30")
    assert verdict(0.6, 900.0).startswith("Usable with weights, k-hat 0.60")
    assert verdict(0.8, 600.0).startswith("Poor in the tails, k-hat 0.80")
    assert verdict(0.8, 100.0).startswith("Poor, k-hat 0.80")
    assert verdict(math.nan, 100.0).startswith("Poor, k-hat nan")
    for k_hat in (0.6, 0.8, 4.6, math.inf):  # of weights that are nearly equal it tells nothing
        assert verdict(k_hat, 990.0).startswith("Good")
        assert not verdict(k_hat, 989.0).startswith("Good")
    for k_hat in (0.3, 0.6, 0.8):
        for ess in (100.0, 900.0):
            text = verdict(k_hat, ess)
            assert text.endswith(".")
            assert ". " not in text.replace("0.", "0,")  # one sentence
