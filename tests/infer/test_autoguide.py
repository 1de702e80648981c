"""The flow as a guide: every ELBO, copies, composition, training without an ODE's gradient."""

import copy
import io
import pickle
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import random_flow, slow_but
from kinds import KINDS, gaussianized_joint
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import (
    SVI,
    JitTrace_ELBO,
    Predictive,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from pyro.infer import autoguide as guides
from pyro.infer.importance import psis_diagnostic
from pyro.optim import Adam, ClippedAdam

import pyro_interpolant
from pyro_interpolant import (
    Adaptive,
    AmortizedInterpolant,
    AutoInterpolant,
    FixedGrid,
    Geodesic,
    InterpolantDistribution,
    InterpolantTransform,
    Linear,
    TorusMLP,
    calibrate,
    circular,
    fit_guide,
    importance,
    log_joint,
)
from pyro_interpolant.infer.sites import Image, quantiles_of, spread_of

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

GRID = FixedGrid(steps=3)
TRAINING_STEPS = 13  # between the 12 random nodes, at the least, of weights that are trained
Y = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)


def model(y=Y):
    mu = pyro.sample("mu", dist.Normal(1.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    with pyro.plate("rows", 3):
        x = pyro.sample("x", dist.Normal(mu, scale))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def constrained():
    pyro.sample("weights", dist.Dirichlet(torch.tensor([2.0, 3.0, 4.0])))
    pyro.sample("factor", dist.LKJCholesky(3, 2.0))
    pyro.sample("share", dist.Beta(2.0, 3.0))
    pyro.sample("rate", dist.Gamma(2.0, 3.0).expand([2]).to_event(1))


def single():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))


def small(target=model, **options):
    """Return a small guide that has seen its model and is not Gaussian."""
    options = {"hidden_dims": (8, 8), "solver": GRID, "init_scale": 0.5, **options}
    guide = AutoInterpolant(target, **options)
    guide()
    with torch.no_grad():
        guide.transform.velocity.output.weight.normal_(std=0.3)
    return guide


def weights(guide):
    return [p.detach().clone() for p in guide.parameters()]


def moved(guide, before):
    return [not torch.equal(a, b) for a, b in zip(guide.parameters(), before, strict=True)]


def counted(guide):
    """Count how often the velocity is evaluated, in batches."""
    calls, velocity = [], guide.transform.velocity
    plain = velocity._velocity
    velocity._velocity = lambda *args, **named: (calls.append(1), plain(*args, **named))[1]
    return calls


def svi(guide, target=model, loss=None, **kwargs):
    return SVI(target, guide, Adam({"lr": 0.01}), loss or Trace_ELBO(**kwargs))


# --------------------------------------------------------------------------------------- inference

LOSSES = [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, RenyiELBO]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("target", [model, constrained, single])
def test_one_solve_per_step_and_all_weights_move(loss, particles, target):
    guide = small(target)
    before, calls = weights(guide), counted(guide)
    vectorised = particles > 1
    if loss is RenyiELBO:
        elbo = loss(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    else:
        elbo = loss(num_particles=particles, vectorize_particles=vectorised, max_plate_nesting=1)
    steps = [svi(guide, target, elbo).step() for _ in range(2)]
    assert len(calls) == 2 * 4 * TRAINING_STEPS
    assert all(torch.isfinite(torch.tensor(steps)))
    assert all(moved(guide, before))


@pytest.mark.parametrize("particles", slow_but([1, 3]))
def test_a_compiled_elbo(particles):
    guide = small(hidden_dims=(8,))
    options = {
        "num_particles": particles, "vectorize_particles": particles > 1, "max_plate_nesting": 1
    }  # fmt: skip
    jit = JitTrace_ELBO(ignore_jit_warnings=True, **options)
    still = Adam({"lr": 0.0})
    compiled, eager = (
        SVI(model, guide, still, jit),
        SVI(model, guide, still, Trace_ELBO(**options)),
    )
    compiled.step()  # compiles
    # Both draw their nodes at random, by generators of their own.
    found, expected = (
        torch.tensor([loss() for _ in range(100)]) for loss in (compiled.step, eager.evaluate_loss)
    )
    error = ((found.var() + expected.var()) / 100) ** 0.5
    assert abs(found.mean() - expected.mean()) < 4 * error
    pyro.set_rng_seed(0)
    first = compiled.step()
    assert first != compiled.step()
    pyro.set_rng_seed(0)
    assert first == compiled.step()
    before = weights(guide)
    SVI(model, guide, Adam({"lr": 0.01}), jit).step()
    assert all(moved(guide, before))


def test_the_elbo_is_that_of_its_definition():
    guide = small()
    with torch.no_grad():
        z, log_q = guide.get_posterior().rsample_and_log_prob((20_000,))
        expected = float((log_q - log_joint(guide)(z)).mean())
        error = float((log_q - log_joint(guide)(z)).std()) / 20_000**0.5
    elbo = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=1)
    with torch.no_grad():
        assert abs(elbo.loss(model, guide) - expected) < 6 * error


@pytest.mark.slow
def test_svi_finds_the_posterior():
    guide = AutoInterpolant(single, hidden_dims=(8,), init_scale=1.0)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    step = SVI(single, guide, ClippedAdam({"lr": 0.02, "lrd": 0.985}), elbo)
    for _ in range(250):
        step.step()
    z = guide.get_posterior().sample((4000,))
    assert abs(float(z.mean()) - 1) < 0.1
    assert abs(float(z.std()) - 0.5**0.5) < 0.1


@pytest.mark.parametrize("local", [False, True])
def test_optimisers_of_torch(local):
    with pyro.settings.context(module_local_params=local):
        guide = small()
        elbo = Trace_ELBO()(model, guide)
        before = weights(guide)
        optimiser = torch.optim.Adam(elbo.parameters(), lr=0.01)
        calls = counted(guide)
        elbo().backward()
        optimiser.step()
        assert len(calls) == 4 * TRAINING_STEPS
        assert all(moved(guide, before))


def test_its_state_is_a_dictionary_of_tensors():
    guide, new = small(), small()
    new.load_state_dict(guide.state_dict())
    z = torch.randn(4, guide.latent_dim)
    assert torch.equal(new.transform(z), guide.transform(z))


def test_a_discrete_site_beside_it_is_enumerated():
    @config_enumerate
    def mixed():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        k = pyro.sample("k", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(x + 2 * k, 1.0), obs=torch.tensor(1.0))

    guide = AutoInterpolant(poutine.block(mixed, hide=["k"]), hidden_dims=(8,), solver=GRID)
    loss = svi(guide, mixed, TraceEnum_ELBO(max_plate_nesting=0)).step()
    assert torch.isfinite(torch.tensor(loss))


def test_a_list_of_guides():
    guide = guides.AutoGuideList(model)
    guide.append(guides.AutoNormal(poutine.block(model, expose=["mu"])))
    guide.append(
        AutoInterpolant(poutine.block(model, expose=["scale", "x"]), hidden_dims=(8,), solver=GRID)
    )
    assert set(guide()) == {"mu", "scale", "x"}
    before, step = weights(guide), svi(guide)
    for _ in range(2):
        assert torch.isfinite(torch.tensor(step.step()))
    assert all(moved(guide, before))
    assert guide.median()["x"].shape == (3,)
    assert guide.quantiles([0.1, 0.9])["x"].shape == (2, 3)


def test_a_part_of_a_list_can_be_asked_before_the_list_is_called():
    whole = guides.AutoGuideList(model)
    whole.append(small(poutine.block(model, expose=["mu"])))
    whole.append(small(poutine.block(model, hide=["mu"])))
    assert whole[1].median()["x"].shape == (3,)
    assert whole[1].get_posterior().sample().shape == (4,)


def test_the_jacobian_of_a_value_held_constant_has_no_gradient():
    guide = small()
    trace = poutine.trace(guide).get_trace()
    fn, value = trace.nodes["scale"]["fn"], trace.nodes["scale"]["value"]
    held, free = fn.log_prob(value.detach()), fn.log_prob(value)
    assert torch.equal(held, free)
    assert not held.requires_grad
    assert free.requires_grad  # as an ELBO needs
    image = Image(value.detach(), -value.detach().log())
    density = torch.func.jvp(lambda x: Image(x, -x.log()).log_prob(x), (image.v,), (image.v,))
    torch.testing.assert_close(density[1], -torch.ones(()))


def test_its_posterior_is_read_at_the_nodes_of_its_solver():
    guide = small()
    x = torch.randn(4, guide.latent_dim)
    for posterior in (guide.posterior, guide.posterior.at(1.0), guide.posterior.at(0.7)):
        with torch.no_grad():
            expected = posterior.log_prob(x)
        torch.testing.assert_close(posterior.log_prob(x).detach(), expected)
    random = guide.get_posterior().log_prob(x).detach()
    with torch.no_grad():
        at_its_own = guide.get_posterior().log_prob(x)
    assert float((random - at_its_own).abs().max()) > 1e-6  # as SVI needs


def test_subsampled_data_and_global_latents():
    data = torch.randn(10) + 3

    def subsampled():
        mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
        with pyro.plate("rows", 10, subsample_size=4) as rows:
            pyro.sample("y", dist.Normal(mu, 1.0), obs=data[rows])

    guide = AutoInterpolant(subsampled, hidden_dims=(8,), solver=GRID)
    assert torch.isfinite(torch.tensor(svi(guide, subsampled).step()))
    assert guide.latent_dim == 1


@pytest.mark.slow
def test_predictive_and_psis():
    guide = small()
    drawn = Predictive(model, guide=guide, num_samples=7)(y=None)
    assert drawn["y"].shape == (7, 3)
    parallel = Predictive(guide, num_samples=7, parallel=True, return_sites=None)()
    assert parallel["x"].shape == (7, 3)
    calls = counted(guide)
    k_hat = psis_diagnostic(model, guide, num_particles=500, max_plate_nesting=1)
    assert len(calls) == 4 * GRID.steps
    assert k_hat == pytest.approx(importance_quietly(guide, count=10_000).k_hat, abs=0.5)


def importance_quietly(guide, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importance(guide, **kwargs)


# ------------------------------------------------------------------------------------ the start


def test_one_value_for_a_plate_starts_each_of_its_members():
    """And not one latent for all of them, whose Jacobian would count once for each."""

    def model():
        with pyro.plate("rows", 3):
            pyro.sample("x", dist.LogNormal(0.0, 1.0))

    start = guides.init_to_value(values={"x": torch.tensor(0.5)})
    guide = AutoInterpolant(model, init_loc_fn=start, hidden_dims=(4,))
    assert guide()["x"].unique().shape == (3,)
    assert guide.latent_dim == 3
    assert torch.allclose(guide.transform.flow.loc, torch.tensor(0.5).log())
    start = guides.init_to_value(values={"x": torch.ones(2)})
    with pytest.raises(
        ValueError, match=r"'x' that broadcasts to its shape \(3,\), got shape \(2"
    ):
        AutoInterpolant(model, init_loc_fn=start)()


@pytest.mark.parametrize("one", [float, lambda v: v.numpy()])
def test_a_start_may_be_a_number_or_an_array(one):
    start = guides.init_to_value(values={"x": one(torch.tensor(0.5))})
    guide = AutoInterpolant(lambda: pyro.sample("x", dist.LogNormal(0.0, 1.0)), init_loc_fn=start)
    guide()
    assert torch.allclose(guide.transform.flow.loc, torch.tensor([0.5]).log())
    start = guides.init_to_value(values={"x": "half"})
    with pytest.raises(TypeError, match="expected the value of site 'x' to be a tensor or an"):
        AutoInterpolant(lambda: pyro.sample("x", dist.Normal(0.0, 1.0)), init_loc_fn=start)()


@pytest.mark.parametrize("start", [3, torch.tensor(3), np.array(3.0), 3.0])
def test_a_start_is_of_the_type_of_its_site(start):
    torch.set_default_dtype(torch.float32)

    def whole():
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(torch.ones(3, 2) @ w, 1.0).to_event(1), obs=torch.ones(3))

    guide = AutoInterpolant(whole, init_loc_fn=guides.init_to_value(values={"w": start}))
    assert guide()["w"].dtype == torch.float32
    assert torch.equal(guide.transform.flow.loc, torch.tensor([3.0, 3.0]))


@pytest.mark.parametrize("value", [0.0, -1.0, torch.inf, torch.nan])
def test_a_start_that_is_not_inside_the_support_is_refused_by_its_name(value):
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("scale", dist.HalfNormal(1.0))

    start = guides.init_to_value(values={"scale": torch.tensor(value)})
    with pytest.raises(
        ValueError, match=r"strictly inside the supports, got .* \['scale'\]: pass"
    ):
        AutoInterpolant(model, init_loc_fn=start)()


def test_it_starts_at_the_initial_location_and_scale():
    start = guides.init_to_value(
        values={"mu": torch.tensor(3.0), "scale": torch.tensor(2.0), "x": torch.arange(3.0)}
    )
    guide = AutoInterpolant(model, init_loc_fn=start, init_scale=0.25, hidden_dims=(4,))
    guide()
    z, log_q = guide.get_posterior().rsample_and_log_prob((2000,))
    loc = torch.tensor([3.0, torch.tensor(2.0).log(), 0.0, 1.0, 2.0])
    expected = dist.Normal(loc, 0.25).to_event(1)
    assert torch.allclose(guide.transform.flow.loc, loc)
    assert torch.allclose(log_q, expected.log_prob(z))
    assert torch.allclose(guide.transform(torch.zeros(guide.latent_dim)), loc)


def test_its_choices_reach_the_flow():
    guide = AutoInterpolant(
        model, hidden_dims=(7,), interpolant=Linear(), solver=Adaptive(nodes=5),
        divergence=pyro_interpolant.HutchinsonDivergence(),
    )  # fmt: skip
    guide()
    flow = guide.transform
    assert flow.velocity.hidden_dims == (7,)
    assert (flow.interpolant, flow.solver) == (Linear(), Adaptive(nodes=5))
    assert isinstance(flow.divergence, pyro_interpolant.HutchinsonDivergence)
    assert torch.isfinite(torch.tensor(svi(guide).step()))


def test_it_follows_the_type_of_the_model():
    torch.set_default_dtype(torch.float32)

    def double():
        x = pyro.sample("x", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=torch.ones((), dtype=torch.float64))

    guide = AutoInterpolant(double, hidden_dims=(4,))
    assert guide()["x"].dtype == torch.float64


@pytest.mark.slow
def test_it_starts_from_another_guide():
    other = guides.AutoMultivariateNormal(model, init_scale=0.3)
    other()
    with torch.no_grad():
        other.loc += 2
    guide = AutoInterpolant(model, hidden_dims=(8, 8))
    assert guide.start_from(other) is guide
    z = guide.get_posterior().sample((20_000,))
    assert torch.allclose(z.mean(0), other.loc.detach(), atol=0.05)
    assert torch.allclose(z.std(0), torch.full((5,), 0.3), atol=0.03)
    with pytest.raises(ValueError, match="expected a guide of the sites {'mu'"):
        guide.start_from(guides.AutoMultivariateNormal(single))


def test_its_solver_is_calibrated_through_its_posterior():
    guide = AutoInterpolant(model, hidden_dims=(4,), solver=FixedGrid(40))  # not trained
    guide()
    posterior = guide.get_posterior()
    found = calibrate(posterior, posterior.sample((16,)))
    assert guide.transform.solver is found
    assert found.steps < 40


# ---------------------------------------------------------------------------- median and quantiles


def below():
    """A site whose bijection decreases."""
    x = pyro.sample("x", dist.ImproperUniform(constraints.less_than(3.0), (), ()))
    pyro.factor("f", -0.5 * (x - 2).square())


@pytest.mark.parametrize("target", slow_but([model, constrained, single, below], single, below))
def test_medians_and_quantiles_are_those_of_draws(target):
    guide = small(target)
    state = torch.get_rng_state()
    median, quantiles = guide.median(), guide.quantiles([0.1, 0.5, 0.9])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(median[k], guide.median()[k]) for k in median)
    z = guide.get_posterior().sample((50_000,))
    draws, levels = log_joint(guide).unpack(z), torch.tensor([0.1, 0.5, 0.9])
    for site, _ in guide._unpack_latent(guide._init_loc()):
        name, fn = site["name"], site["fn"]
        assert median[name].shape == site["value"].shape
        assert quantiles[name].shape == (3, *site["value"].shape)
        assert torch.allclose(quantiles[name], torch.quantile(draws[name], levels, 0), atol=0.05)
        assert (quantiles[name].diff(dim=0) >= 0).all()
        assert fn.support.check(median[name]).all()
        assert not median[name].requires_grad
    middle = log_joint(guide).pack({name: value[None] for name, value in median.items()})[0]
    assert torch.allclose(middle, torch.quantile(z, 0.5, dim=0), atol=0.05)


def test_quantiles_are_those_of_torch():
    draws, levels = torch.randn(100, 5), torch.tensor([0.0, 0.37, 1.0])
    for part in (draws, draws[:, 0]):
        assert torch.allclose(quantiles_of(part, levels), torch.quantile(part, levels, 0))
    assert quantiles_of(draws[:, :0], levels).shape == (3, 0)  # which torch refuses
    with pytest.raises(ValueError, match="quantiles between 0 and 1"):
        quantiles_of(draws, [0.5, 1.1])


@pytest.mark.parametrize(
    "kind",
    slow_but(
        [kind for kind in KINDS if "angle" not in kind],
        "plain",
        "own network",
        "positive",
        "simplex",
        "shaped",
        "multivariate",
        "samples",
        "given",
        "start",
    ),
)
def test_a_posterior_under_a_learned_prior_can_be_saved(kind, tmp_path):
    prior = KINDS[kind]().freeze()

    def model():
        with pyro.plate_stack("rows", (2, *prior.batch_shape)):
            pyro.sample("z", prior)

    guide = AutoInterpolant(model, hidden_dims=(4,), solver=GRID)
    guide()
    kept = guide.posterior
    pyro_interpolant.save(kept, tmp_path / "posterior.safetensors")
    loaded = pyro_interpolant.load(tmp_path / "posterior.safetensors")
    draws = kept.sample_dict((3,))
    assert draws["z"].shape == (3, 2, *prior.shape())
    assert torch.equal(loaded.log_prob(loaded.pack(draws)), kept.log_prob(kept.pack(draws)))


def test_draws_on_the_edge_of_a_learned_priors_support_are_refused():
    support = constraints.interval(0.0, 1.0)
    prior = InterpolantDistribution(random_flow(1), support=support).freeze()
    guide = AutoInterpolant(lambda: pyro.sample("z", prior), hidden_dims=(4,), solver=GRID)
    guide()
    with pytest.raises(ValueError, match="site 'z': .* strictly inside .* 1 of 2 rows outside"):
        guide.posterior.pack({"z": torch.tensor([[0.5], [1.0]])})


@pytest.mark.slow
def test_quantiles_of_a_posterior_behind_a_map_have_the_map():
    posterior, levels = gaussianized_joint(), torch.tensor([0.05, 0.5, 0.95])
    posterior.transform.solver = FixedGrid(steps=8)  # of fewer, forward and backward differ
    found = quantiles_of(spread_of(posterior), levels)
    draws = posterior.sample((20_000,))
    assert torch.allclose(found, torch.quantile(draws, levels, 0), atol=0.1)


# ------------------------------------------------------------------------------ copies and pickles


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True])
def test_a_copy_has_weights_of_its_own_and_harms_nothing(trained):
    guide = small()
    if trained:
        svi(guide).step()
    kept = guide.model
    new = copy.deepcopy(guide)
    assert guide.model is kept
    assert new.model is kept
    pyro.set_rng_seed(1)
    expected = guide()
    pyro.set_rng_seed(1)
    assert all(torch.equal(v, expected[k]) for k, v in new().items())
    before, copied = weights(guide), weights(new)
    step = svi(new)
    step.step()
    assert not any(moved(guide, before))
    assert all(moved(new, copied))
    copied, step = weights(new), svi(guide)
    step.step()
    assert all(moved(guide, before))
    assert not any(moved(new, copied))


def test_a_copy_before_the_first_call():
    new = copy.deepcopy(AutoInterpolant(model, hidden_dims=(4,)))
    assert set(new()) == {"mu", "scale", "x"}


def test_a_part_of_a_list_is_copied_alone_or_with_it():
    whole = guides.AutoGuideList(model)
    whole.append(guides.AutoNormal(poutine.block(model, expose=["mu"])))
    part = AutoInterpolant(poutine.block(model, expose=["scale", "x"]), hidden_dims=(4,))
    whole.append(part)
    whole()
    kept = part.model
    alone = copy.deepcopy(part)
    assert set(alone()) == {"scale", "x"}
    assert alone.model is part.model is kept
    assert part.master() is whole
    again = copy.deepcopy(whole)
    assert set(again()) == {"mu", "scale", "x"}
    assert again[1].master() is again
    assert set(whole()) == {"mu", "scale", "x"}


def parametric():
    prior = pyro.param("spread", torch.tensor(2.0), constraint=constraints.positive)
    x = pyro.sample("x", dist.Normal(pyro.param("centre", torch.tensor(0.5)), prior))
    pyro.sample("y", dist.Normal(x, 1.0), obs=torch.tensor(2.0))


@pytest.mark.slow
@pytest.mark.parametrize("target", [model, parametric])
def test_pickles_leave_the_model_behind_and_the_original_whole(target):
    guide = small(target)
    svi(guide, target).step()
    file = io.BytesIO()
    torch.save(guide, file)
    assert callable(guide.model)
    svi(guide, target).step()  # still trains
    file.seek(0)
    new = torch.load(file, weights_only=False)
    z = torch.randn(3, guide.latent_dim)
    svi(guide, target)
    assert set(new()) == set(guide())
    assert new.median().keys() == guide.median().keys()
    with pytest.raises(ValueError, match="pickled without: call guide.attach"):
        importance(new)
    assert new.attach(target) is new
    assert importance_quietly(new, count=200).draws.keys() == guide().keys()
    assert torch.isfinite(log_joint(new)(z)).all()


def test_a_pickle_before_the_first_call_keeps_the_start():
    start = guides.init_to_value(values={"x": torch.tensor(5.0)})
    guide = AutoInterpolant(single, init_loc_fn=start, hidden_dims=(4,))
    new = pickle.loads(pickle.dumps(guide)).attach(single)
    new()
    assert torch.equal(new.transform.flow.loc, torch.tensor([5.0]))
    again = pickle.loads(pickle.dumps(AutoInterpolant(discrete))).attach(discrete)
    with pytest.raises(ValueError, match="got the discrete site 'k'"):
        again()


def test_two_guides_in_one_parameter_store_train_their_own_weights():
    first, second = small(), small(single)
    step = svi(first)
    step.step()
    before = weights(second)
    svi(second, single).step()
    assert all(moved(second, before))
    before = weights(first)
    step.step()
    assert all(moved(first, before))


def test_weights_that_a_store_was_loaded_with_are_told_of(tmp_path):
    svi(small()).step()
    pyro.get_param_store().save(tmp_path / "store")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "store")
    with pytest.warns(UserWarning, match="store held other weights of the guide"):
        svi(small()).step()


def test_weights_that_store_and_guide_were_both_loaded_with_are_not(tmp_path):
    guide = small()
    svi(guide).step()
    pyro.get_param_store().save(tmp_path / "store")
    torch.save(guide, tmp_path / "guide")
    pyro.clear_param_store()
    guide = torch.load(tmp_path / "guide", weights_only=False).attach(model)
    pyro.get_param_store().load(tmp_path / "store")
    svi(guide).step()  # warnings are errors


def test_no_parameter_is_aliased_and_frozen_weights_stay():
    guide = small()
    names = [name for name, _ in guide.named_parameters()]
    assert all(name.startswith("transform.") for name in names)
    assert len({id(p) for p in guide.parameters()}) == len(names)
    guide.requires_grad_(requires_grad=False).eval()
    before = weights(guide)
    svi(guide).step()
    assert not any(moved(guide, before))


# ------------------------------------------------------------------------------------------ set-up


def subsampled_latents():
    with pyro.plate("rows", 10, subsample_size=4):
        pyro.sample("x", dist.Normal(0.0, 1.0))


def discrete():
    pyro.sample("k", dist.Categorical(torch.ones(3)))


def sequential():
    for i in pyro.plate("rows", 2):
        pyro.sample(f"x_{i}", dist.Normal(0.0, 1.0))


def matrices():
    pyro.sample("s", dist.ImproperUniform(constraints.lower_cholesky, (), (2, 2)))


def directions():
    pyro.sample("d", dist.ProjectedNormal(torch.ones(3)))


def angles():
    torus = InterpolantTransform(TorusMLP(2, (4,)), interpolant=Geodesic())
    pyro.sample("a", InterpolantDistribution(torus, support=circular))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (subsampled_latents, "'x' in plate 'rows', which holds 4 of 10 at a time: a flow over"),
        (discrete, "expected continuous latent sites, got the discrete site 'k'"),
        (sequential, "latent site 'x_0' in the sequential plate 'rows'"),
        (matrices, "from real vectors and its Jacobian, got site 's' on LowerCholesky"),
        (directions, "from real vectors and its Jacobian, got site 'd' on Sphere"),
        (angles, r"got site 'a' on circular: .* priors of angles in base_space\(model\)"),
    ],
)
def test_what_it_cannot_hold_is_said_at_set_up(target, message):
    for start in (
        lambda guide: guide(),
        lambda guide: svi(guide, target).step(),
        lambda guide: fit_guide(guide, progress=False),
        importance,
    ):
        with pytest.raises(ValueError, match=message):
            start(AutoInterpolant(target))


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="expected a model, a callable, got int"):
        AutoInterpolant(3)
    for scale in (0.0, "1"):
        with pytest.raises(ValueError, match=f"expected init_scale > 0, got {scale!r}"):
            AutoInterpolant(model, init_scale=scale)
    with pytest.raises(RuntimeError, match="found no latent variables"):
        AutoInterpolant(lambda: None)()


def given_rows(y):
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(loc, 1.0), obs=y)


@pytest.mark.parametrize("kind", [AutoInterpolant, AmortizedInterpolant])
@pytest.mark.parametrize("call", ["median", "quantiles", "get_posterior"])
def test_a_first_call_of_any_kind_sets_it_up_with_the_arguments(kind, call):
    guide, y = kind(given_rows, hidden_dims=(8,)), torch.zeros(7)
    levels = ([0.5],) if call == "quantiles" else ()
    getattr(guide, call)(*levels, y)
    assert guide(y)["loc"].shape == ()


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint beside the model alone"):
        fit_guide(AutoInterpolant(single), checkpoint=tmp_path / "it", progress=False)


def test_guides_without_a_density_to_start_from_are_refused():
    guide = AutoInterpolant(single)
    with pytest.raises(TypeError, match="one unconstrained vector .*got AutoNormal"):
        guide.start_from(guides.AutoNormal(single))
    with pytest.raises(ValueError, match="got the point AutoLaplaceApproximation trains"):
        guide.start_from(guides.AutoLaplaceApproximation(single))

    def rows(y=None):
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0).expand([3]).to_event(1), obs=y)

    with pytest.raises(ValueError, match="expected one data set in the arguments"):
        AutoInterpolant(rows).start_from(AmortizedInterpolant(rows), torch.zeros(4, 3))


# ------------------------------------------------------------------------ what its draws are worth


def test_poor_draws_are_warned_of_once(tmp_path):
    guide = AutoInterpolant(single, hidden_dims=(8,), solver=GRID)
    off = {"x": 1.0 + 0.2 * torch.randn(500)}  # the posterior is N(1, 1/2)
    with pytest.warns(UserWarning, match="Poor"):
        result = fit_guide(guide, samples=off, seed=0, progress=False, options={"steps": 5})
    assert result.verdict.startswith("Poor")
    copied = pickle.loads(pickle.dumps(guide)).attach(single)
    for made in (guide, copied):
        with pytest.warns(
            UserWarning, match="own draws are not those of the posterior: Poor"
        ) as seen:
            Predictive(single, guide=made, num_samples=3)()
        assert len(seen) == 1
        made()


def test_good_draws_are_not():
    guide = AutoInterpolant(single, hidden_dims=(8,), solver=GRID)
    right = {"x": 1.0 + 0.5**0.5 * torch.randn(4000)}
    result = fit_guide(guide, samples=right, seed=0, progress=False, options={"steps": 5})
    assert result.verdict.startswith("Good")
    guide()


def test_predictive_in_parallel_is_one_solve():
    guide = small(single).requires_grad_(requires_grad=False).eval()
    calls = counted(guide)
    draws = Predictive(single, guide=guide, num_samples=500, parallel=True)()["x"]
    assert draws.shape == (500,)
    assert draws.std() > 0.1
    assert len(calls) <= 3 * 4 * GRID.steps  # and two of one draw, by which Pyro learns shapes
