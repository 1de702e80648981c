"""Whatever is saved comes back equal to the bit, or is refused before a file is touched."""

import copy
import dataclasses
import os

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import (
    DIVERGENCES,
    INTERPOLANTS,
    LATENT,
    SOLVERS,
    SUPPORTS,
    WHITENINGS,
    OwnVelocity,
    random_flow,
)
from kinds import angles, joint
from pyro.distributions import constraints
from pyro.distributions import transforms as maps
from torch import nn
from torch.nn.utils import parametrizations

from pyro_interpolant import (
    AutoInterpolant,
    ConditionalInterpolantDistribution,
    FixedGrid,
    Interpolant,
    InterpolantDistribution,
    InterpolantTransform,
    LearnedInterpolant,
    Linear,
    Samples,
    VelocityMLP,
    io,
    load,
    save,
)
from pyro_interpolant.distributions.differences import difference

A = torch.tensor([0.3, -0.7], dtype=torch.float64)
B = torch.tensor([1.3, 2.7], dtype=torch.float64)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


def flow(base=None, **choices):
    return InterpolantDistribution(random_flow(2, (8,), **choices), base)


def outcomes(distribution):
    """Draws, and densities at them and elsewhere, or the error in their place."""
    found = []
    for ask in (
        lambda: distribution.sample((4,)),
        lambda: distribution.log_prob(found[0].clone()),
        lambda: distribution.log_prob(torch.tensor([[0.3, 0.6], [0.1, 0.9], [-2.0, 30.0]])),
        lambda: distribution.base_dist.log_prob(torch.tensor([0.2, 0.8])),
    ):
        torch.manual_seed(1)
        try:
            found.append(ask())
        except (ValueError, NotImplementedError, RuntimeError, AssertionError) as error:
            found.append(str(error))
    return found


def filled(*tensors):
    """The same tensors with a number for NaN, which equals nothing."""
    return [tensor.nan_to_num(7.0) for tensor in tensors]


def assert_same(distribution, again, name=""):
    """Equal densities and draws, to the bit; equal choices, state, flags and shapes."""
    assert type(again) is type(distribution), name
    before, after = distribution.transform, again.transform
    for choice in ("interpolant", "solver", "divergence"):
        found = getattr(after, choice)
        assert difference(getattr(before, choice), found) is None, (name, choice)
    for one, other in zip(outcomes(distribution), outcomes(again), strict=True):
        assert type(one) is type(other), name
        assert one == other if isinstance(one, str) else torch.equal(*filled(one, other)), name
    flags = [[(n, p.requires_grad) for n, p in t.named_parameters()] for t in (before, after)]
    assert flags[0] == flags[1], name
    state = after.state_dict()
    assert state.keys() == before.state_dict().keys(), name
    for key, value in before.state_dict().items():
        assert torch.equal(state[key], value), (name, key)
        assert state[key].dtype == value.dtype, (name, key)
    assert again.batch_shape == distribution.batch_shape, name
    assert again.event_shape == distribution.event_shape, name


def load_of(distribution, path, **passed):
    """What comes back of a flow that is saved."""
    save(distribution, path)
    return load(path, **passed)


# ---- choices ------------------------------------------------------------------------------------

MORE_SUPPORTS = {
    "bounds by column": constraints.interval(A - 1, B),
    "independent interval": constraints.independent(constraints.interval(0.1, 0.7), 1),
    "unprintable": constraints.interval(0.1 + 0.2, 1e300 / 3),
}


def assert_kept(flows, path):
    """All of them, by name, and their densities are numbers."""
    for name, distribution in flows.items():
        found = load_of(distribution, path)
        assert_same(distribution, found, name)
        assert torch.isfinite(outcomes(found)[1]).all(), name


def test_networks_and_what_they_reach(path):
    flows = {
        f"{sizes}, {dtype}": InterpolantDistribution(random_flow(3, sizes).to(dtype))
        for sizes, dtype in (((8,), torch.float32), ((8, 9), torch.float64), ((8,) * 3, None))
    }
    for distribution in flows.values():
        distribution.transform.velocity.reach.fill_(7.5)
    assert_kept(flows, path)


@pytest.mark.slow
def test_supports(path):
    cases = {name: (case.dim, case.support) for name, case in SUPPORTS.items()}
    cases |= {name: (2, support) for name, support in MORE_SUPPORTS.items()}
    flows = {
        name: InterpolantDistribution(random_flow(dim, (8,)), support=support)
        for name, (dim, support) in cases.items()
    }
    assert_kept(flows, path)


@pytest.mark.slow
def test_interpolants_solvers_and_divergences(path):
    flows = {name: flow(interpolant=member) for name, member in (INTERPOLANTS | LATENT).items()}
    flows["learned"] = flow(interpolant=LearnedInterpolant(3, event_dim=2, network=(4,)))
    flows["of its own type"] = flow(interpolant=LearnedInterpolant(2).to(torch.float32))
    flows |= {name: flow(solver=member) for name, member in SOLVERS.items()}
    flows["numbers of numpy"] = flow(solver=FixedGrid(np.int64(6), warp=np.float64(0.25)))
    flows |= {name: flow(divergence=member) for name, member in DIVERGENCES.items()}
    assert_kept(flows, path)
    for network in (VelocityMLP(2, [np.int64(8), np.int32(9)]), VelocityMLP(2, (8,))):
        transform = InterpolantTransform(network)
        transform.flow.noise = VelocityMLP(2, (8,))
        assert_kept({"with noise": InterpolantDistribution(transform)}, path)


def test_whitening_maps_and_kinds(path):
    flows = {"angles": angles(), "joint": joint()}
    for name, (make, linear) in WHITENINGS.items():
        flows[name] = flow()
        flows[name].transform.flow.whitening = make(2)
        flows[name].transform.flow.whitening.set(A, linear(2))
    assert_kept(flows, path)
    found, x = load_of(flows["joint"], path), flows["joint"].sample((3,))
    assert difference(flows["joint"].unpack(x), found.unpack(x)) is None


def test_conditional_flows(path):
    distribution = ConditionalInterpolantDistribution(
        random_flow(2, context_dim=3), normal(), support=constraints.positive
    )
    distribution.transform.velocity.set_scales(torch.randn(50, 2), 9 * torch.randn(50, 3) + 4)
    found, context = load_of(distribution, path), torch.randn(3)
    assert type(found) is ConditionalInterpolantDistribution
    assert_same(distribution.condition(context), found.condition(context))


def test_bounds_keep_their_precision_whatever_the_default_type(path):
    distribution = InterpolantDistribution(
        random_flow(2), support=MORE_SUPPORTS["bounds by column"]
    )
    save(distribution, path)
    torch.set_default_dtype(torch.float32)
    found = load(path)
    torch.set_default_dtype(torch.float64)
    assert_same(distribution, found)


# ---- bases --------------------------------------------------------------------------------------


def mixture(**weights):
    return dist.MixtureSameFamily(
        dist.Categorical(**weights),
        dist.MultivariateNormal(torch.randn(7, 2), torch.eye(2) + 0.3),
    )


def used(base):
    """A base whose parameters of every kind have been asked for, and are kept since."""
    for name in ("covariance_matrix", "precision_matrix", "scale_tril", "logits", "probs"):
        for part in (base, getattr(base, "mixture_distribution", base)):
            getattr(part, name, None)
    return base


def transformed(base, *parts):
    return dist.TransformedDistribution(base, list(parts))


def normal():
    return dist.Normal(A, B).to_event(1)


ELEMENTWISE = {
    "Normal": lambda: dist.Normal(A, B),
    "float32": lambda: dist.Normal(A.float(), B.float()),
    "numbers": lambda: dist.Normal(0.0, 2.0).expand((2,)),
    "LogNormal": lambda: dist.LogNormal(A, 1.0),
    "Beta": lambda: dist.Beta(B, B + 1),
    "InverseGamma": lambda: dist.InverseGamma(B, B),
    "Laplace": lambda: dist.Laplace(A, B),
    "StudentT": lambda: dist.StudentT(B + 3, A, B),
    "VonMises": lambda: dist.VonMises(A, B),
    "Uniform": lambda: dist.Uniform(A - 3, B),
    "Folded": lambda: dist.FoldedDistribution(dist.Normal(A, B)),
    "Masked": lambda: dist.Normal(A, B).mask(torch.tensor([True, False])),
    "transformed": lambda: transformed(
        dist.Normal(A, B), maps.ExpTransform(), maps.AffineTransform(0.5, B), maps.TanhTransform()
    ),
}
VECTORS = {
    "batch": lambda: dist.Normal(torch.zeros(3, 2), 1.0).to_event(1),
    "precision": lambda: dist.MultivariateNormal(A, precision_matrix=torch.eye(2) + 0.3),
    "all kinds of covariance": lambda: used(dist.MultivariateNormal(A, torch.eye(2) + 0.3)),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(A, torch.ones(2, 1), B),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(torch.tensor(5.0), A, torch.eye(2)),
    "Empirical": lambda: dist.Empirical(torch.randn(5, 2), torch.zeros(5)),
    "permuted": lambda: transformed(normal(), maps.Permute(torch.tensor([1, 0]))),
    "samples": lambda: Samples(torch.randn(5, 2)),
}


def assert_base_is_kept(base, path, name=""):
    distribution = flow(base)
    found = load_of(distribution, path)
    assert_same(distribution, found, name)
    assert difference(base, found.base) is None, name


@pytest.mark.slow
def test_bases(path):
    for name, make in ELEMENTWISE.items():
        assert_base_is_kept(make().to_event(1), path, name)
    for name, make in VECTORS.items():
        assert_base_is_kept(make(), path, name)


@pytest.mark.slow
def test_probabilities_are_kept_to_the_bit_however_they_sum(path):
    """Constructors divide by the sum, which is another after rounding."""
    for _ in range(5):
        for weights in ({"probs": torch.rand(7)}, {"logits": torch.randn(7)}):
            assert_base_is_kept(mixture(**weights), path)
            assert_base_is_kept(used(mixture(**weights)), path)


def test_a_base_that_was_rounded_is_kept_or_refused(path):
    """What was computed of its parameters in float64 does not follow from them in float32."""
    low_rank = dist.LowRankMultivariateNormal(A, torch.tensor([[0.3, 0.7], [0.2, -1.1]]), B)
    with pytest.raises(ValueError, match="LowRankMultivariateNormal: it would lose _capacitance"):
        save(flow(low_rank).to(torch.float32), path)
    triangular = flow(dist.MultivariateNormal(A, torch.eye(2) + 0.3)).to(torch.float32)
    assert difference(load_of(triangular, path).base, triangular.base) is None


@pytest.mark.parametrize(("inner", "outer"), [(True, False), (False, True)])
def test_a_base_that_is_a_flow_has_choices_weights_and_flags_of_its_own(inner, outer, path):
    base = flow(mixture(probs=torch.rand(7)), solver=FixedGrid(steps=5))
    distribution = InterpolantDistribution(random_flow(2), base, support=constraints.positive)
    distribution.transform.requires_grad_(not outer)
    base.transform.requires_grad_(not inner)
    found = load_of(distribution, path)
    assert_same(distribution, found)
    assert_same(base, found.base)


# ---- what is refused ----------------------------------------------------------------------------


class OwnNormal(dist.Normal):
    """A user's own distribution."""


class OwnGrid(FixedGrid):
    """A subclass, likewise."""


def with_part(where, name, value):
    """A flow of which one part has one more attribute or module."""
    distribution = flow()
    setattr(distribution.transform.get_submodule(where), name, value)
    return distribution


def parametrized():
    distribution = flow()
    parametrizations.weight_norm(distribution.transform.velocity.layers[0])
    return distribution


def own_flow(base=None, network=None, **choices):
    network = OwnVelocity(2) if network is None else network
    return InterpolantDistribution(InterpolantTransform(network, 2, **choices), base)


REFUSED = [
    # Bases and classes of the user's own, of which a file cannot give back the code.
    (lambda: flow(OwnNormal(A, B).to_event(1)), "a base from pyro.*, got a OwnNormal"),
    (lambda: flow(transformed(normal(), maps.affine_autoregressive(2))), "AffineAutoregressive"),
    (lambda: flow(solver=OwnGrid(8)), "a solver of this package, got a OwnGrid"),
    (lambda: own_flow(own_flow()), "velocity is a OwnVelocity"),  # one can be passed in
    (
        lambda: flow(flow(interpolant=OwnInterpolant(3.0)), interpolant=OwnInterpolant()),
        "base.interpolant.power",
    ),
    # Parts that are not as their class makes them.
    (lambda: with_part("flow.velocity", "extra", nn.Linear(2, 2)), "extra"),
    (lambda: with_part("flow.velocity", "factor", 2.0), "factor"),
    (parametrized, "parametrizations"),
    # What owns no weights, or is no flow.
    (lambda: flow().at(0.5), "a flow that owns its weights: save the one it came from"),
    (lambda: VelocityMLP(2), "of this package.*got VelocityMLP"),
    (lambda: AutoInterpolant(lambda: None), r"of a guide, save its get_posterior\(\)"),
]


@pytest.mark.parametrize(("make", "match"), REFUSED)
def test_what_would_not_come_back_is_refused(make, match, path):
    """With a clear word; what was there stays, and nothing is left beside it."""
    path.write_bytes(b"as it was")
    with pytest.raises((ValueError, TypeError), match=match):
        save(make(), path)
    assert path.read_bytes() == b"as it was"
    assert os.listdir(path.parent) == [path.name]


# ---- classes that are passed in -----------------------------------------------------------------


class Dropping(OwnVelocity):
    """A velocity with dropout."""

    def forward(self, t, x, context=None):
        return nn.functional.dropout(super().forward(t, x), training=self.training)


class Net(OwnVelocity):
    """A velocity with an activation and a factor, which no tensor tells."""

    def __init__(self, activation=torch.tanh, scale=1.0):
        super().__init__(2)
        self.activation, self.scale = activation, scale

    def forward(self, t, x, context=None):
        h = self.activation(self.hidden(torch.cat((x, t[..., None]), -1)))
        return self.scale * self.out(h)


class Mixed(OwnVelocity):
    """A velocity with a buffer of a finer type, a count, and one weight under two names."""

    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("fine", torch.full((1,), 1 / 3, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(7))
        self.twin = self.out


@dataclasses.dataclass(frozen=True)
class OwnInterpolant(Interpolant):
    power: float = 2.0

    def coefficients(self, t):
        return (1 - t) ** self.power, t**self.power, torch.zeros_like(t)


class OwnWaves(LearnedInterpolant):
    """A user's own interpolant with tensors."""


def test_a_velocity_of_ones_own_is_passed_in(path):
    distribution, passed = own_flow(), OwnVelocity(2).requires_grad_(requires_grad=False)
    before = copy.deepcopy(passed)
    assert_same(distribution, load_of(distribution, path, velocity=passed))
    assert difference(before, passed) is None
    with pytest.raises(ValueError, match=r"a OwnVelocity: pass .*velocity=OwnVelocity\(\.\.\.\)"):
        load(path)
    with pytest.raises(ValueError, match="OwnVelocity.*got a Linear"):
        load(path, velocity=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"(?s)^expected a OwnVelocity as it was.*size mismatch"):
        load(path, velocity=OwnVelocity(3))
    of_base = flow(own_flow())
    assert_same(of_base, load_of(of_base, path, velocity=OwnVelocity(2)))


@pytest.mark.parametrize("inside", [None, Linear(), OwnInterpolant()])
def test_an_interpolant_of_ones_own_is_passed_to_all_flows(inside, path):
    own = OwnInterpolant()
    distribution = flow(inside and flow(interpolant=inside), interpolant=own)
    found = load_of(distribution, path, interpolant=own)
    assert_same(distribution, found)
    assert inside is None or found.base.transform.interpolant == inside
    with pytest.raises(ValueError, match="the flow's interpolant is a OwnInterpolant: pass an"):
        load(path)
    with pytest.raises(ValueError, match="interpolant is a OwnInterpolant.*got a Linear"):
        load(path, interpolant=Linear())
    with pytest.raises(ValueError, match=r"expected the OwnInterpolant that was saved.*values"):
        load(path, interpolant=OwnInterpolant(3.0))


def test_an_interpolant_with_tensors_is_copied(path):
    own, passed = OwnWaves(2), OwnWaves(2)
    own.waves.normal_()
    save(flow(interpolant=own), path)
    one, two = (load(path, interpolant=passed).transform.interpolant for _ in range(2))
    assert torch.equal(one.waves, own.waves)
    one.waves.fill_(1.0)
    assert torch.equal(two.waves, own.waves)
    assert not passed.waves.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_velocity_that_computes_something_else_is_refused(dtype, path):
    found = load_of(own_flow(network=Net()).to(dtype), path, velocity=Net())
    assert found.transform.flow.loc.dtype == dtype
    match = r"expected the Net that was saved.*values at two fixed points.*velocity=Net\("
    for other in ({"activation": torch.relu}, {"scale": 2.0}):
        with pytest.raises(ValueError, match=match):
            load(path, velocity=Net(**other))


# ---- what else a flow is made of ----------------------------------------------------------------


@pytest.mark.parametrize("part", ["velocity.shifts", "velocity", "noise", "whole"])
def test_weights_that_are_frozen_come_back_so(part, path):
    distribution = flow()
    inner = distribution.transform.flow
    inner.noise = VelocityMLP(2, (8,))
    (inner if part == "whole" else inner.get_submodule(part)).requires_grad_(requires_grad=False)
    assert_same(distribution, load_of(distribution, path))


@pytest.mark.parametrize("shape", [(3,), (2, 1), (0,)])
def test_the_batch_shape_is_kept(shape, path):
    positive = InterpolantDistribution(random_flow(2, (8,)), support=constraints.positive)
    for distribution in (flow(), positive):
        found = load_of(distribution.expand(shape), path)
        assert found.batch_shape == shape
        assert found.sample((4,)).shape == (4, *shape, 2)


@pytest.mark.parametrize("flag", [True, False, None])
def test_whether_arguments_are_checked_and_gradients_train_the_weights_is_kept(flag, path):
    """Else a posterior that is to be read would be evaluated at random nodes."""
    distribution, x = InterpolantDistribution(random_flow(2, (8,)), validate_args=flag), A[None]
    distribution.transform.trains_weights = bool(flag)
    found = load_of(distribution, path)
    assert vars(found).get("_validate_args") is flag
    assert found.transform.trains_weights is bool(flag)
    assert torch.equal(found.log_prob(x), distribution.log_prob(x))


@pytest.mark.parametrize(("training", "frozen"), [(True, True), (False, False), (True, False)])
def test_dropout_is_on_or_off_as_it_was_and_the_generator_left_alone(training, frozen, path):
    velocity = Dropping(2).requires_grad_(requires_grad=not frozen).train(training)
    passed, state = Dropping(2).train(not training), torch.get_rng_state()
    found = load_of(own_flow(network=velocity), path, velocity=passed)
    assert torch.equal(torch.get_rng_state(), state)
    assert velocity.training == found.transform.velocity.training == training
    assert_same(own_flow(network=velocity), found)
    assert io.read(path)[0]["own"]["velocity"]["values"] is not None  # those of evaluation


def test_a_velocity_keeps_the_types_of_its_tensors_and_those_that_it_shares(path):
    velocity = Mixed(2).to(torch.float32)
    velocity.fine = torch.full((1,), 1 / 3, dtype=torch.float64)
    found = load_of(own_flow(network=velocity), path, velocity=Mixed(2)).transform.velocity
    assert found.twin.weight is found.out.weight
    assert found.count.dtype == torch.long
    assert difference(velocity.state_dict(), found.state_dict()) is None


def test_saving_changes_nothing_in_the_flow(path):
    distribution = own_flow(flow())
    distribution.transform.velocity.out.requires_grad_(requires_grad=False)
    distribution.transform.train()
    before = copy.deepcopy(distribution.transform)
    versions = [p._version for p in distribution.transform.parameters()]
    save(distribution, path)
    assert difference(before, distribution.transform) is None
    assert [p._version for p in distribution.transform.parameters()] == versions
    assert distribution.transform.training


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_flow_that_was_saved_and_loaded_in_a_mode_can_be_trained_out_of_it(mode, path):
    distribution = flow(normal())
    with mode():
        found = load_of(distribution, path)
    assert_same(distribution, found)
    found.log_prob(torch.ones(2)).backward()
    assert found.transform.velocity.output.weight.grad.abs().sum() > 0
