import copy
import math
import pickle

import pyro.distributions as dist
import pytest
import torch
from cases import random_flow
from torch import nn

import pyro_interpolant as pi

pytestmark = pytest.mark.usefixtures("_few_held_draws")

QUICK = {"steps": 60, "batch_size": 40, "learning_rate": 5e-3, "progress": False, "seed": 0}


def crescent(count):
    x = torch.randn(count, 2)
    x[:, 1] = x[:, 0].square() + 0.2 * x[:, 1]
    return x


def mean_distance(x, y):
    """The energy distance between two samples."""
    return 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()


# ---- samples ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_data_sets_transport():
    """From one cloud to another, neither with a known density."""
    x0, x1 = crescent(2000) + 5, -0.5 * crescent(2000)
    distribution = pi.InterpolantDistribution(pi.interpolant_transform(2, (48, 48)))
    pi.fit(distribution, x1, base_samples=x0, **{**QUICK, "steps": 400, "batch_size": 128})
    y = distribution.sample((1000,))
    before = mean_distance(x0[:1000], x1[:1000])
    assert mean_distance(y, x1[:1000]) < 0.05 * before
    moved = distribution.transform(distribution.transforms[0](x0[:1000]))
    assert mean_distance(moved, x1[:1000]) < 0.05 * before


def test_samples_in_a_model_and_in_a_file(tmp_path):
    given = torch.randn(30, 2)
    flow = pi.InterpolantDistribution(random_flow(2))
    flow.set_base_samples(given)
    before = given.clone()
    given.fill_(7.0)
    assert torch.equal(flow.base.rows, before)
    pi.save(flow, tmp_path / "flow.safetensors")
    again = pi.load(tmp_path / "flow.safetensors")
    assert torch.equal(again.base.rows, flow.base.rows)
    assert copy.deepcopy(flow).to(torch.float32).sample((3,)).dtype == torch.float32
    for draw in (flow.rsample, flow.rsample_and_log_prob):
        with pytest.raises(NotImplementedError, match=r"base, Samples, .*: take sample\(\)"):
            draw((3,))


def test_validation_samples_are_others_from_all_over():
    rows = torch.arange(1000.0)[:, None]
    white = pi.InterpolantDistribution(
        pi.interpolant_transform(1, (8,)), pi.Samples(rows)
    ).white_base()
    kept, held = (part.base.rows[:, 0] for part in white.split(0.1))
    assert (len(kept), len(held)) == (900, 100)
    assert torch.equal(torch.cat((kept, held)).sort().values, rows[:, 0])
    assert abs(held.mean() - 500) < 150  # rows may be in an order; five standard errors
    assert torch.equal(white.split(0.1)[1].base.rows[:, 0], held)


# ---- pairs --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pairs_are_kept_together():
    """A coupling that turns by a right angle."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    x0 = torch.randn(4000, 2)
    distribution = pi.InterpolantDistribution(
        pi.interpolant_transform(2, (32, 32), interpolant=pi.Linear())
    )
    pi.fit(
        distribution,
        3 + x0 @ turn,
        pairs=x0,
        base_samples=x0,
        **{**QUICK, "steps": 500, "batch_size": 256},
    )
    assert not distribution.transform.flow.independent
    assert distribution.transform.flow.whitening.to_white(x0).shape == x0.shape
    few = torch.randn(200, 2)
    y = distribution.transform(distribution.transforms[0](few))
    error = (y - 3 - few @ turn).norm(dim=-1).mean()
    assert error < 0.25


REFUSED = {  # rows, and other arguments of fit
    "too few pairs": (
        lambda x: {"pairs": x[1:]},
        "expected one partner per row of data, 60, got 59",
    ),
    "moved pairs": (
        lambda x: {"pairs": 5 + x},
        r"expected pairs drawn from N\(0, I\).*base_samples=pairs",
    ),
    "noise without a latent term": (
        lambda x: {"learn": "noise"},
        r"latent term to learn the noise, got Trigonometric",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_fit_refuses(name):
    options, message = REFUSED[name]
    x = torch.randn(60, 2)
    distribution = pi.InterpolantDistribution(pi.interpolant_transform(2, (8, 8)))
    with pytest.raises(ValueError, match=message):
        pi.fit(distribution, x, **options(x), **QUICK)


def test_bases_that_fit_refuses():
    x, flow = torch.randn(60, 2), pi.interpolant_transform(2, (8, 8))
    base = normal().to_event(1)
    d = pi.InterpolantDistribution(flow, base)
    with pytest.raises(ValueError, match=r"got both: this distribution starts from a Independent"):
        pi.fit(d, x, base_samples=x, **QUICK)
    assert d.base is base
    d = pi.InterpolantDistribution(flow, dist.Normal(torch.zeros(1, 2), 1.0).to_event(1))
    message = r"one base for all rows.*batch shape \(1,\).*members"
    with pytest.raises(ValueError, match=message):
        pi.fit(d, map(None, ()))  # which nobody looks at
    with pytest.raises(ValueError, match=message):
        pi.interpolant_loss(d, x)
    assert pi.interpolant_loss(d, x, x0=x).shape == (60,)


def test_a_path_with_wrong_ends_is_refused_before_training():
    path = pi.NonlinearInterpolant(lambda t, a, b: (1 - t) * a + t * b + 0.1)
    d = pi.InterpolantDistribution(pi.interpolant_transform(2, (8, 8), interpolant=path))
    with pytest.raises(ValueError, match="to be x0 at t = 0"):
        pi.fit(d, 5 + torch.randn(60, 2), **QUICK)
    assert torch.equal(d.transform.flow.loc, torch.zeros(2))


@pytest.mark.slow
def test_whether_pairs_were_independent_is_remembered(tmp_path):
    for coupling, expected in ((pi.independent, True), (pi.optimal_transport, False)):
        distribution = pi.InterpolantDistribution(pi.interpolant_transform(2, (8, 8)))
        pi.fit(distribution, torch.randn(80, 2), coupling=coupling, **{**QUICK, "steps": 2})
        assert distribution.transform.flow.independent is expected
        pi.save(distribution, tmp_path / "flow.safetensors")
        assert pi.load(tmp_path / "flow.safetensors").transform.flow.independent is expected


# ---- interpolants in training -------------------------------------------------------------------


@pytest.mark.slow
def test_latent_interpolants_train_and_learn_their_noise(tmp_path):
    x, interpolant = crescent(1500), pi.Latent(pi.Linear(), pi.BrownianBridge(0.3))
    distribution = pi.InterpolantDistribution(
        pi.interpolant_transform(2, (32, 32), interpolant=interpolant)
    )
    pi.fit(distribution, x, **{**QUICK, "steps": 200, "batch_size": 128})
    assert mean_distance(distribution.sample((800,)), x[:800]) < 0.1
    before = [p.clone() for p in distribution.transform.velocity.parameters()]
    assert distribution.transform.flow.noise is None
    result = pi.fit(distribution, x, learn="noise", **{**QUICK, "steps": 200, "batch_size": 128})
    assert result.validation_losses[-1] < result.validation_losses[0] - 0.1
    for p, q in zip(before, distribution.transform.velocity.parameters(), strict=True):
        assert torch.equal(p, q)
    pi.save(distribution, tmp_path / "flow.safetensors")
    again = pi.load(tmp_path / "flow.safetensors").transform.flow.noise
    t, w = torch.tensor(0.4), torch.randn(5, 2)
    assert torch.equal(again(t, w), distribution.transform.flow.noise(t, w))


@pytest.mark.parametrize(
    ("paired", "message"),
    [
        (True, r"trained on, whose ends were paired by.*got ends that are independent: pass the"),
        (False, r"trained on, whose ends were independent, got ends that are paired by"),
    ],
)
def test_the_noise_is_that_of_the_paths_of_the_velocity(paired, message):
    d = pi.InterpolantDistribution(pi.interpolant_transform(2, (8, 8), interpolant=pi.Latent()))
    d.transform.flow.independent = not paired  # as fit leaves it
    couplings = {True: pi.optimal_transport, False: pi.independent}
    options = {**QUICK, "steps": 1, "learn": "noise"}
    with pytest.raises(ValueError, match=message):
        pi.fit(d, torch.randn(80, 2), coupling=couplings[not paired], **options)
    assert d.transform.flow.noise is None
    pi.fit(d, torch.randn(80, 2), coupling=couplings[paired], **options)
    assert d.transform.flow.noise is not None


@pytest.mark.slow
def test_the_noise_of_other_data_is_forgotten():
    path = pi.Latent(pi.Linear(), pi.BrownianBridge(0.3))
    d = pi.InterpolantDistribution(pi.interpolant_transform(2, (8, 8), interpolant=path))
    x = torch.randn(80, 2)
    quick = {**QUICK, "steps": 3, "tolerance": 0.1}
    pi.fit(d, x, **quick)
    pi.fit(d, x, learn="noise", **quick)
    assert d.transform.flow.noise is not None
    straight = pi.reflow(d, count=80, **quick).distribution
    assert straight.transform.flow.noise is None
    pi.fit(d, x, whiten=False, **quick)
    assert d.transform.flow.noise is not None
    pi.fit(d, x, whiten=False, coupling=pi.optimal_transport, **quick)  # on other paths
    assert d.transform.flow.noise is None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # three steps, on purpose
def test_a_mirror_starts_from_the_data_of_its_last_fit(tmp_path):
    def sorted_rows(rows):
        return rows[rows[:, 0].argsort()]

    quick = {**QUICK, "steps": 3}
    x, y, start = crescent(80), crescent(90), crescent(70)
    d = pi.InterpolantDistribution(pi.interpolant_transform(2, (8, 8), interpolant=pi.Mirror()))
    pi.fit(d, x, **quick)
    pi.save(d, tmp_path / "flow.safetensors")
    again = pi.load(tmp_path / "flow.safetensors")
    for one in (d, again):
        pi.fit(one, y, **quick)
        assert torch.equal(sorted_rows(one.base.rows), sorted_rows(y))
    for options in ({"learn": "noise"}, {"whiten": False}):
        pi.fit(d, x, **quick, **options)
        assert torch.equal(sorted_rows(d.base.rows), sorted_rows(y))
    pi.fit(d, x, base_samples=start, **quick)
    assert torch.equal(d.base.rows, start)


@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # one step, on purpose
@pytest.mark.parametrize("stream", [False, True])
def test_a_mirror_starts_from_rows_in_proportion_to_their_weights(stream):
    x = torch.cat((torch.randn(500, 1) - 4, torch.randn(500, 1) + 4))[torch.randperm(1000)]
    weights = torch.where(x[:, 0] < 0, 0.8, 0.2)
    for held in (0.1, x[:100]):
        d = pi.InterpolantDistribution(
            pi.interpolant_transform(1, (8, 8), interpolant=pi.Mirror())
        )
        options = {**QUICK, "steps": 1, "validation": held}
        if stream:
            pi.fit(d, list(zip(x.split(100), weights.split(100), strict=True)), **options)
        else:
            pi.fit(d, x, weights=weights, **options)
        share = 0.8 if isinstance(held, float) else (8 + 0.5) / 11  # rows of mean weight
        assert float((d.base.rows < 0).double().mean()) == pytest.approx(share, abs=0.05)


def test_a_mirror_without_data_has_no_density_and_no_draws(tmp_path):
    d = pi.InterpolantDistribution(pi.interpolant_transform(1, (8,), interpolant=pi.Mirror()))
    pi.save(d, tmp_path / "mirror.safetensors")
    for found in (d, pi.load(tmp_path / "mirror.safetensors"), d.at(0.5)):
        for ask in (lambda d: d.log_prob(torch.zeros(1)), lambda d: d.sample(), lambda d: d.mean):
            with pytest.raises(ValueError, match="to start from: the base of Mirror is the data"):
                ask(found)
    assert d.transport(torch.zeros(1)).isfinite()  # of points, as its velocity
    d.set_base_samples(torch.zeros(5, 1))
    assert d.sample().isfinite()


# ---- bases of other libraries -------------------------------------------------------------------


class Lazy(nn.Module):
    """What a zuko flow looks like: a module that makes a distribution when called."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.tensor([1.0, -2.0]))

    def forward(self, context=None):
        normal = torch.distributions.Normal(self.loc, torch.ones_like(self.loc))
        return torch.distributions.Independent(normal, 1)


def test_an_external_base():
    reference = Lazy()()
    for base in (
        pi.ExternalBase(Lazy()),
        pi.ExternalBase(Lazy().requires_grad_(requires_grad=False)()),
    ):
        x = base.sample((4,))
        torch.testing.assert_close(base.log_prob(x).double(), reference.log_prob(x).double())
        for moment in ("mean", "variance"):
            expected = getattr(reference, moment).to(base.mean).expand(3, 2)
            assert torch.equal(getattr(base.expand((3,)), moment), expected)
        assert not x.requires_grad
        flow = pi.InterpolantDistribution(random_flow(2), base)
        y = flow.sample((5,))
        assert flow.at(0.0).log_prob(y).allclose(reference.log_prob(y))
        assert copy.deepcopy(flow).to(torch.float32).sample((2,)).dtype == torch.float32
        assert flow.sample((2,)).dtype == torch.float64


# ---- bases in whitened coordinates --------------------------------------------------------------

WHITE_BASES = {
    "default": lambda: None,
    "given": lambda: dist.Laplace(torch.tensor([0.5, -1.0]), torch.ones(2)).to_event(1),
    "external": lambda: pi.ExternalBase(Lazy()),
    "samples": lambda: pi.Samples(torch.randn(30, 2)),
    "flow": lambda: pi.InterpolantDistribution(random_flow(2)),
}


@pytest.mark.parametrize("name", WHITE_BASES)
def test_a_whitened_base_is_the_start_of_the_chain(name):
    """Its draws are what the transform gets, its density what ``at(0)`` has."""
    flow = pi.InterpolantDistribution(random_flow(2), WHITE_BASES[name]())
    white, whitening = flow.white_base(), flow.transform.flow.whitening
    torch.manual_seed(1)
    w = white.sample((4, 3))
    assert w.shape == (4, 3, 2)
    assert not w.requires_grad
    torch.manual_seed(1)
    x0 = flow.at(0.0).sample((4, 3))
    torch.testing.assert_close(w, whitening.to_white(x0))
    if name == "default":
        assert torch.equal(white.to_white(w), w)
    else:
        torch.testing.assert_close(white.to_white(x0), flow.transforms[0](x0))
    if name == "samples":
        with pytest.raises(ValueError, match="samples alone"):
            white.log_prob(w)
        return
    expected = flow.at(0.0).log_prob(x0) + whitening.log_det
    torch.testing.assert_close(white.log_prob(w), expected)
    x = flow.transform(w)
    total = white.log_prob(w) - flow.transform.log_abs_det_jacobian(w, x)
    torch.testing.assert_close(total, flow.log_prob(x))  # the same solve, remembered


def test_partners_far_from_zero_keep_their_digits_in_single_precision():
    w, centre = torch.randn(50, 2), torch.full((2,), 2.0**23)
    transform = pi.interpolant_transform(2, (8,)).float()
    transform.flow.whitening.set(centre, torch.eye(2))
    white = pi.InterpolantDistribution(transform, pi.Samples(w.float())).white_base()
    torch.testing.assert_close(white.to_white(centre + w), w.float(), rtol=1e-5, atol=1e-5)


def test_every_base_is_expanded_converted_and_copied():
    for base in (pi.Samples(torch.randn(5, 2)), pi.UniformTorus(2), pi.ExternalBase(Lazy())):
        wide = base.expand((3,))
        assert (base.batch_shape, wide.batch_shape, wide.event_shape) == ((), (3,), (2,))
        half = wide.to(torch.zeros((), dtype=torch.float32))
        assert half.sample((4,)).dtype == torch.float32
        assert base.sample().dtype == torch.float64
        again = pickle.loads(pickle.dumps(wide))
        assert again.sample((4,)).shape == half.sample((4,)).shape == (4, 3, 2)
    with pytest.raises(ValueError, match="NaN or infinite"):
        pi.Samples(torch.full((2, 2), torch.nan))


def masked(other, *, first=True):
    """A base of one normal column, and one of another distribution."""
    mask = torch.tensor([True, False])
    parts = (other, normal()) if first else (normal(), other)
    return dist.MaskedMixture(mask, *parts).to_event(1)


WITHOUT_DENSITY = {
    "counts": lambda: dist.Poisson(torch.tensor([3.0, 5.0]), validate_args=False).to_event(1),
    "scaled counts": lambda: dist.TransformedDistribution(
        dist.Poisson(torch.ones(2)).to_event(1), [dist.transforms.AffineTransform(0.0, 0.5)]
    ),
    "point beside another": lambda: masked(dist.Delta(torch.zeros(2))),
    "simplex": lambda: dist.Dirichlet(torch.ones(2)),
    "flow on a simplex": lambda: pi.InterpolantDistribution(
        random_flow(1), support=dist.constraints.simplex
    ),
    "of another library": lambda: pi.ExternalBase(torch.distributions.Dirichlet(torch.ones(2))),
}


@pytest.mark.parametrize("name", WITHOUT_DENSITY)
def test_a_base_of_points_or_without_volume_has_no_density(name):
    """Probabilities, and densities on a set of fewer dimensions, are no densities of vectors."""
    flow = pi.InterpolantDistribution(random_flow(2), WITHOUT_DENSITY[name]())
    x = flow.sample((4,))
    assert x.shape == (4, 2)
    assert not flow.has_density()
    with pytest.raises(ValueError, match=r"(?s)base with a density, got .*: this flow trans"):
        flow.log_prob(x)


def test_bases_that_are_made_of_others_have_their_density():
    """Columns of either kind; and an image of a simplex that is all real vectors."""
    logits = dist.transforms.StickBreakingTransform().inv
    for base in (
        masked(dist.Laplace(torch.zeros(2), 1.0)),
        dist.TransformedDistribution(dist.Dirichlet(torch.ones(3)), [logits]),
    ):
        flow = pi.InterpolantDistribution(pi.interpolant_transform(2, (8,)), base)  # the identity
        x = torch.randn(4, 2)
        assert flow.has_density()
        torch.testing.assert_close(flow.log_prob(x), base.log_prob(x.clone()))


@pytest.mark.slow
def test_a_bounded_base_ends_no_training():
    base = dist.Uniform(torch.zeros(2), torch.ones(2)).to_event(1)
    flow = pi.InterpolantDistribution(pi.interpolant_transform(2, (8, 8)), base)
    with pytest.warns(UserWarning, match="held out has density zero"):
        result = pi.fit(flow, torch.randn(400, 2), **{**QUICK, "steps": 150})
    assert result.stopped_by == "schedule"
    assert result.solver.steps < 256  # by the rows that have a density
    assert result.report.log_prob_error < 1e-2  # the default tolerance, nats


def normal():
    return dist.Normal(torch.zeros(2), 1.0)


def image(*transforms):
    return dist.TransformedDistribution(normal(), list(transforms))


EXP, AFFINE = dist.transforms.ExpTransform(), dist.transforms.AffineTransform
LOGIT = dist.transforms.ComposeTransform([dist.transforms.SigmoidTransform(), AFFINE(-1.0, 2.0)])
BOUNDED = {  # a base, and between which numbers it has a density
    "exponential": (lambda: dist.Exponential(torch.ones(2)).to_event(1), 0.0, math.inf),
    "mixture": (
        lambda: dist.MixtureSameFamily(
            dist.Categorical(torch.ones(3)),
            dist.LogNormal(torch.arange(6.0).reshape(3, 2), 1.0).to_event(1),
        ),
        0.0,
        math.inf,
    ),
    "of another library": (
        lambda: pi.ExternalBase(dist.Uniform(torch.zeros(2), 1.0).to_event(1)),
        0.0,
        1.0,
    ),
    "below": (lambda: image(EXP, AFFINE(1.0, -2.0)).to_event(1), -math.inf, 1.0),
    "composed": (lambda: image(LOGIT).expand((3, 2)).to_event(1), -1.0, 1.0),
    "nested": (
        lambda: dist.TransformedDistribution(
            image(EXP).to_event(1), [AFFINE(1.0, 2.0, event_dim=1)]
        ),
        1.0,
        math.inf,
    ),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_a_density_is_zero_where_the_base_has_none(name):
    make, low, high = BOUNDED[name]
    base = make()
    flow = pi.InterpolantDistribution(pi.InterpolantTransform(pi.VelocityMLP(2, (8,))), base)
    x = torch.tensor([[-5.0, -0.5], [0.2, -0.5], [0.2, 0.7], [0.2, 2.0], [2.0, 3.0]])
    if base.batch_shape:
        x = x[:, None]
    within = ((x > low) & (x < high)).all(-1).expand(len(x), *base.batch_shape)
    found = flow.log_prob(x.requires_grad_())  # an untrained flow: the base itself
    assert torch.equal(found.isfinite(), within)
    assert torch.equal(found == -math.inf, ~within)
    total = found[within].sum() + x.sum()  # that of uniform ones is constant
    assert bool(torch.autograd.grad(total, x)[0].isfinite().all())
    draws = base.sample((5,))
    torch.testing.assert_close(flow.log_prob(draws), base.log_prob(draws))


def test_a_move_to_where_it_is_already_leaves_a_base_to_be_trained():
    coupling = dist.transforms.affine_coupling(2, [4])
    base = dist.TransformedDistribution(normal().to_event(1), [coupling])
    d = pi.InterpolantDistribution(pi.interpolant_transform(2, (8,)), base)
    d.to(torch.get_default_dtype())
    x = torch.tensor([[0.3, 0.2]])
    with torch.no_grad():
        for p in coupling.parameters():
            p.add_(0.3)
        torch.testing.assert_close(d.log_prob(x), base.log_prob(x.clone()))


def test_a_transformed_base_whose_density_was_asked_for_is_converted():
    zero = torch.zeros(2)
    base = dist.LogNormal(zero, zero + 1.0).to_event(1)
    flow = pi.InterpolantDistribution(random_flow(2), base)
    x = flow.sample((5,)).clone()
    own = flow.log_prob(x)  # torch remembers inverses of a base's transforms from here on
    log_prob = flow.to(torch.float32).log_prob(x.float())
    assert log_prob.dtype == torch.float32
    torch.testing.assert_close(log_prob, own.float(), rtol=1e-3, atol=1e-3)
    given = dist.LogNormal(zero.float(), zero.float() + 1.0).to_event(1)
    assert torch.equal(flow.base.log_prob(x.float().abs()), given.log_prob(x.float().abs()))


def test_a_base_of_another_batch_is_refused_and_the_one_before_stays():
    base = normal().to_event(1)
    d, other = pi.InterpolantDistribution(random_flow(2), base), base.expand((4,))
    with pytest.raises(ValueError, match=r"batch shape \(4,\) expands to, .* got \(\)"):
        d.set_base(other)
    assert d.base is base
