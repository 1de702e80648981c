import pyro.distributions as dist
import pytest
import torch
from gaussians import GaussianTransport
from torch.distributions import constraints

import pyro_interpolant as pi
from pyro_interpolant.distributions.bases import WhitenedBase
from pyro_interpolant.interpolants.nonlinear import wrap
from pyro_interpolant.training.data import Table
from pyro_interpolant.transport import rectified

pytestmark = pytest.mark.usefixtures("_few_held_draws")

QUICK = {"progress": False, "seed": 0, "batch_size": 256}


def gaussian_flow(pair, interpolant, hidden=(48, 48)):
    base = dist.MultivariateNormal(pair.means[0], pair.covs[0])
    velocity = pi.VelocityMLP(len(pair.means[0]), hidden)
    return pi.InterpolantDistribution(
        pi.InterpolantTransform(velocity, interpolant=interpolant), base
    )


@pytest.mark.slow
def test_matrices_reach_the_optimal_energy_between_gaussians():
    # Without the waves of the start the paths have a tenth more than the least energy, without
    # its centres a sixth, after as few steps as these.
    pair = GaussianTransport(15, 2)
    pair.means[1] = pair.means[0] - torch.tensor([0.0, 1.5])
    data = pair.sample(1, 6000)
    interpolant = pi.LearnedInterpolant(8, event_dim=2, matrices=True)
    distribution = gaussian_flow(pair, interpolant.double(), (32, 32))
    options = {**QUICK, "alternations": 20, "steps": 300, "learning_rate": 5e-3}
    pi.learn_interpolant(distribution, data, **options)
    energy = pi.path_energy(distribution, count=8000)
    assert energy.value == pytest.approx(pair.w2(), rel=0.05)
    assert pair.energy(pi.Trigonometric()) > 1.1 * pair.w2()
    y = distribution.sample((8000,))
    scale = pair.covs[1].diagonal().sqrt()
    assert ((y.mean(0) - pair.means[1]).abs() / scale).max() < 0.05
    error = torch.linalg.matrix_norm(y.T.cov() - pair.covs[1]) / torch.linalg.matrix_norm(
        pair.covs[1]
    )
    assert error < 0.06


@pytest.mark.slow
def test_scalar_waves_shorten_the_path():
    pair = GaussianTransport(36, 2)  # of which scalar waves shorten most
    distribution = gaussian_flow(pair, pi.LearnedInterpolant(5).double(), (32, 32))
    data = pair.sample(1, 3000)
    result = pi.learn_interpolant(distribution, data, alternations=100, steps=10, **QUICK)
    interpolant = distribution.transform.interpolant
    assert interpolant.waves.abs().max() > 0.01
    reached = pair.energy(interpolant, centred=True)
    gap = reached - pair.w2()
    assert gap < (pair.energy(pi.Trigonometric(), centred=True) - pair.w2()) / 3
    assert len(result.energies) == 100
    assert result.energies[-1] == pytest.approx(reached, rel=0.2)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # few steps
def test_the_interpolant_rests_at_the_end_and_in_every_other_training():
    pair = GaussianTransport(4, 2)
    distribution = gaussian_flow(pair, pi.LearnedInterpolant(3).double(), (8, 8))
    data = pair.sample(1, 500)
    pi.fit(distribution, data, steps=20, **QUICK)
    assert not distribution.transform.interpolant.waves.any()
    pi.learn_interpolant(distribution, data, alternations=20, steps=20, **QUICK)
    waves = distribution.transform.interpolant.waves
    assert waves.any()
    assert not waves.requires_grad
    assert waves.grad is None
    first = waves.clone()
    pi.fit(distribution, data, steps=20, **QUICK)
    assert torch.equal(first, distribution.transform.interpolant.waves)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # few steps
def test_the_same_seed_gives_the_same_interpolant():
    pair, results = GaussianTransport(5, 2), []
    for _ in range(2):
        torch.manual_seed(1)
        distribution = gaussian_flow(
            pair, pi.LearnedInterpolant(2, event_dim=2, network=(8,)).double(), (8, 8)
        )
        torch.manual_seed(2)
        data = pair.sample(1, 400)
        pi.learn_interpolant(distribution, data, alternations=5, steps=5, **QUICK)
        results.append(distribution.transform.interpolant.weights())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][-2].any()


@pytest.mark.slow
def test_two_data_sets():
    x0 = torch.randn(600, 2) - 3
    path = pi.LearnedInterpolant(3, event_dim=2, matrices=True).double()
    distribution = pi.InterpolantDistribution(
        pi.interpolant_transform(2, (16, 16), interpolant=path)
    )
    pi.learn_interpolant(
        distribution, x0 + 6, base_samples=x0, alternations=10, steps=100, **QUICK
    )
    assert (distribution.sample((500,)).mean(0) - 3).abs().max() < 0.6


def learned_path(dim=2):
    path = pi.LearnedInterpolant(2).double()
    return pi.InterpolantDistribution(pi.interpolant_transform(dim, (8, 8), interpolant=path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # few steps
def test_columns_of_a_frame_are_those_of_the_rows_that_the_map_is_set_from():
    pd = pytest.importorskip("pandas")
    distribution = learned_path()
    distribution.columns = ("a", "b")
    frame = pd.DataFrame(torch.randn(60, 2).numpy() + [30.0, 0.0], columns=["b", "a"])
    options = {**QUICK, "batch_size": 32, "alternations": 1, "steps": 1, "tolerance": 10.0}
    pi.learn_interpolant(distribution, frame, **options)
    assert distribution.columns == ("a", "b")
    assert distribution.transform.flow.loc[1] > 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # few steps
@pytest.mark.parametrize("options", [{"seed": None}, {"validation": 0.3}])
def test_no_row_held_out_at_the_end_is_learned_before(options, monkeypatch):
    found = {"rows": [], "base": []}

    def noted(kind, name):
        plain = kind.split

        def split(self, *given, **more):
            outcome = plain(self, *given, **more)
            found[name].append(outcome)
            return outcome

        monkeypatch.setattr(kind, "split", split)

    noted(Table, "rows")
    noted(WhitenedBase, "base")
    quick = {**QUICK, "batch_size": 64, "alternations": 2, "steps": 2, **options}
    x, base = torch.randn(100, 2), torch.randn(90, 2)
    pi.learn_interpolant(learned_path(), x, base_samples=base, **quick)
    (first, last), (start, end) = found["rows"], found["base"]
    assert len(first.held.w) == (30 if "validation" in options else 10)
    assert torch.equal(first.held.w, last.held.w)
    assert torch.equal(first.kept.w, last.kept.w)
    assert all(torch.equal(a.base.rows, b.base.rows) for a, b in zip(start, end, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # few steps
def test_the_unit_of_the_data_does_not_matter():
    """A gradient of the square of a small one is nothing to Adam."""
    x, energies, waves = torch.randn(200, 2) ** 2, [], []
    for unit in (1.0, 1e-7, 1e7):
        torch.manual_seed(1)
        distribution = learned_path()
        quick = {**QUICK, "batch_size": 64, "alternations": 5, "steps": 1, "tolerance": 10.0}
        found = pi.learn_interpolant(distribution, unit * x, **quick)
        energies.append(torch.tensor(found.energies) / unit**2)
        waves.append(distribution.transform.interpolant.waves)
    torch.testing.assert_close(energies[1:], 2 * energies[:1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(waves[1:], 2 * waves[:1], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # few steps
def test_the_alternation_takes_weights_and_pairs_too():
    def energies(data, **options):
        torch.manual_seed(1)
        quick = {**QUICK, "batch_size": 64, "alternations": 2, "steps": 2}
        return pi.learn_interpolant(learned_path(), data, **quick, **options).energies

    x = torch.randn(200, 2)
    with_others = torch.cat((x, torch.full((100, 2), torch.nan)))
    weighted = energies(x, weights=torch.ones(200))
    assert energies(with_others, weights=torch.arange(300) < 200) == weighted
    assert energies(x, pairs=x) != energies(x)


def test_one_column_alone():
    path = pi.LearnedInterpolant(2, event_dim=1, matrices=True).double()
    distribution = pi.InterpolantDistribution(
        pi.interpolant_transform(1, (8, 8), interpolant=path)
    )
    data = 0.1 * torch.randn(300, 1) + 5
    found = pi.learn_interpolant(distribution, data, alternations=5, steps=5, **QUICK)
    assert len(found.energies) == 5
    assert path.waves.any()


@pytest.mark.parametrize(
    ("interpolant", "options", "kind", "message"),
    [
        (pi.Trigonometric(), {}, TypeError, "expected a flow with a LearnedInterpolant, got Trig"),
        (pi.LearnedInterpolant(), {"alternations": 0}, ValueError, "alternations >= 1, a whole"),
        (pi.LearnedInterpolant(), {"interpolant_rate": 0.0}, ValueError, "interpolant_rate > 0"),
        (pi.LearnedInterpolant(), {"learn": "noise"}, ValueError, "options of fit than learn:"),
        (pi.LearnedInterpolant(), {"stepz": 9}, TypeError, "expected options of fit, got stepz"),
        (pi.LearnedInterpolant(), {"steps": 0}, ValueError, "steps >= 1, a whole number"),
        (pi.LearnedInterpolant(event_dim=3), {}, ValueError, "event_dim=2, got 3"),
    ],
)
def test_refused_before_work(interpolant, options, kind, message):
    options = {**QUICK, **options}
    distribution = pi.InterpolantDistribution(
        pi.interpolant_transform(2, (8, 8), interpolant=interpolant)
    )
    before = [p.clone() for p in distribution.transform.flow.state_dict().values()]
    with pytest.raises(kind, match=message):
        pi.learn_interpolant(distribution, torch.randn(300, 2), **options)
    for p, q in zip(before, distribution.transform.flow.state_dict().values(), strict=True):
        assert torch.equal(p, q)


# ---- reflow -------------------------------------------------------------------------------------


def ring(count):
    angle = 2 * torch.pi * torch.rand(count)
    radius = 3 + 0.3 * torch.randn(count)
    return torch.stack((radius * angle.cos(), radius * angle.sin()), -1)


@pytest.mark.slow
def test_reflow_straightens_the_paths():
    ring_flow = pi.InterpolantDistribution(pi.interpolant_transform(2, (32, 32)).double())
    pi.fit(ring_flow, ring(2000).double(), steps=300, learning_rate=5e-3, **QUICK)
    before = [p.clone() for p in ring_flow.transform.parameters()]
    result = pi.reflow(ring_flow, count=4000, steps=300, learning_rate=5e-3, **QUICK)
    for p, q in zip(before, ring_flow.transform.parameters(), strict=True):
        assert torch.equal(p, q)
    for steps in (1, 2):
        assert result.after.sampling_errors[steps] < 0.4 * result.before.sampling_errors[steps]
    assert result.after.density_steps <= result.before.density_steps
    assert result.distribution.transform.solver.steps == result.fit.solver.steps
    x = ring(500).double()
    with torch.no_grad():
        change = result.distribution.log_prob(x).mean() - ring_flow.log_prob(x).mean()
    assert abs(float(change)) < 0.15
    assert not result.distribution.transform.flow.independent


def test_refusals_of_reflow(monkeypatch):
    monkeypatch.setattr(rectified, "fit", None)  # before work
    distribution = pi.InterpolantDistribution(pi.interpolant_transform(2, (8,)))
    with pytest.raises(ValueError, match="other options of fit than coupling:"):
        pi.reflow(distribution, coupling=pi.optimal_transport)
    with pytest.raises(ValueError, match=r"ema in \[0, 1\), got 2"):
        pi.reflow(distribution, ema=2)
    with pytest.raises(ValueError, match="expected a seed beside a checkpoint"):
        pi.reflow(distribution, checkpoint="state")
    conditional = pi.ConditionalInterpolantDistribution(pi.conditional_interpolant_transform(2, 3))
    with pytest.raises(ValueError, match="expected a context for a conditional flow, got none"):
        pi.reflow(conditional)
    with pytest.raises(ValueError, match=r"expected one flow, got a batch of shape \(3,\)"):
        pi.reflow(distribution.expand((3,)), count=50)
    mirror = pi.InterpolantDistribution(pi.interpolant_transform(2, (8,), interpolant=pi.Mirror()))
    with pytest.raises(ValueError, match="to start from: the base of Mirror is the data"):
        pi.reflow(mirror)


def test_draws_that_the_type_has_no_numbers_for_are_refused():
    """Each is an exponential of up to 120 on either side, of which float32 holds 88."""
    transform = pi.interpolant_transform(1, (8,)).float()
    transform.flow.whitening.set(torch.zeros(1), torch.full((1, 1), 40.0))
    support = constraints.independent(constraints.positive, 1)
    distribution = pi.InterpolantDistribution(transform, support=support)
    quick = QUICK | {"count": 2000, "steps": 1}
    with pytest.raises(ValueError, match=r"infinite ones, or .* distribution.to\(torch.float64\)"):
        pi.reflow(distribution, **quick)
    assert pi.reflow(distribution.to(torch.float64), **quick).before.sampling_errors[1] < 1e-6


def test_reflow_in_inference_mode():
    distribution = pi.InterpolantDistribution(pi.interpolant_transform(2, (8,)))
    with torch.inference_mode():
        new = pi.reflow(distribution, count=60, steps=1, **QUICK | {"batch_size": 32}).distribution
    assert not any(p.is_inference() for p in new.transform.parameters())


@pytest.mark.slow
def test_reflow_leaves_the_flow_as_it_was_and_its_noise_and_solver_behind():
    distribution = pi.InterpolantDistribution(
        pi.interpolant_transform(2, (8,), solver=pi.FixedGrid(3, "euler"))
    )
    torch.nn.init.normal_(distribution.transform.velocity.output.weight)
    distribution.transform.flow.noise = pi.VelocityMLP(2, (8,))
    options = {**QUICK, "count": 60, "steps": 1, "batch_size": 32}
    one, other = (pi.reflow(distribution, **options) for _ in range(2))
    assert distribution.transform.solver == pi.FixedGrid(3, "euler")
    assert distribution.transform.flow.noise is not None
    assert one.distribution.transform.flow.noise is None
    assert one.fit.solver.method == pi.FixedGrid().method != "euler"
    assert one.fit.validation_losses == other.fit.validation_losses


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # few steps
def test_reflow_of_a_given_base_and_of_contexts():
    base = dist.Normal(torch.tensor([4.0, 0.0]), torch.ones(2)).to_event(1)
    distribution = pi.InterpolantDistribution(pi.interpolant_transform(2, (8,)), base)
    result = pi.reflow(distribution, count=300, steps=5, **QUICK)
    assert result.distribution.base.event_shape == (2,)
    conditional = pi.ConditionalInterpolantDistribution(
        pi.conditional_interpolant_transform(2, 1, (8,))
    )
    context = torch.rand(300, 1)
    assert pi.reflow(conditional, context=context, steps=5, **QUICK).after.density_steps >= 1
    labelled = pi.ConditionalInterpolantDistribution(
        pi.ConditionalInterpolantTransform(pi.VelocityMLP(2, (8,), classes=2))
    )
    labels = (context > 0.5).long().numpy()  # of shape (N, 1), as fit takes them
    assert pi.reflow(labelled, context=labels, steps=5, **QUICK).after.density_steps >= 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # few steps
def test_reflow_of_a_base_of_samples_is_reported():
    distribution = pi.InterpolantDistribution(pi.interpolant_transform(2, (8, 8)))
    pi.fit(distribution, ring(300), base_samples=torch.randn(300, 2), steps=5, **QUICK)
    result = pi.reflow(distribution, count=3e2, steps=5, **QUICK)
    assert result.before.density_steps is None
    assert result.after.sampling_errors.keys() == {1, 2}
    assert "densities" not in repr(result.after)


@pytest.mark.slow
def test_reflow_of_angles_is_along_geodesics():
    angles = wrap(torch.stack((2 * torch.randn(400), torch.randn(400) + 3.0), -1))
    transform = pi.InterpolantTransform(pi.TorusMLP(2, (16, 16)), interpolant=pi.Geodesic())
    distribution = pi.InterpolantDistribution(transform, support=pi.circular)
    pi.fit(distribution, angles, steps=200, **QUICK)
    result = pi.reflow(distribution, count=400, steps=200, **QUICK)
    assert result.distribution.transform.interpolant == pi.Geodesic()
    assert result.after.sampling_errors[1] < result.before.sampling_errors[1]
    x = result.distribution.sample((2000,))
    assert (x.cos().mean(0) - angles.cos().mean(0)).abs().max() < 0.2


def test_a_learned_path_gives_way_to_a_straight_one():
    flow = pi.InterpolantDistribution(
        pi.interpolant_transform(2, (8, 8), interpolant=pi.LearnedInterpolant(3))
    )
    straight = pi.reflow(flow, count=400, steps=5, **QUICK).distribution
    assert straight.transform.flow.interpolant == pi.Linear()
    assert isinstance(flow.transform.flow.interpolant, pi.LearnedInterpolant)


@pytest.mark.slow
def test_a_path_is_learned_where_gradients_are_off():
    flow = learned_path()
    with torch.no_grad():
        before = [p.clone() for p in flow.transform.interpolant.parameters()]
        pi.learn_interpolant(flow, torch.randn(300, 2), alternations=20, steps=2, **QUICK)
    after = list(flow.transform.interpolant.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(before, after, strict=True))
