"""Whatever is saved comes back equal to the bit, or is refused before a file is touched."""

import copy
import dataclasses
import json
import os
import threading

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import OwnVelocity, random_flow
from pyro.distributions import constraints
from pyro.distributions import transforms as maps
from torch import nn
from torch.nn.utils import parametrizations

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    FixedGrid,
    HutchinsonDivergence,
    Interpolant,
    InterpolantDistribution,
    InterpolantTransform,
    Latent,
    LearnedInterpolant,
    Linear,
    Samples,
    UniformTorus,
    VelocityMLP,
    io,
    load,
    save,
)
from pyro_interpolant.distributions.differences import difference
from pyro_interpolant.nn import ImageVelocity
from pyro_interpolant.transforms import DenseWhitening

A = torch.tensor([0.3, -0.7], dtype=torch.float64)
B = torch.tensor([1.3, 2.7], dtype=torch.float64)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


def flow(base=None, **choices):
    return InterpolantDistribution(random_flow(2, (8,), **choices), base)


def outcomes(distribution):
    """Densities and draws, or the error in their place."""
    found = []
    for ask in (
        lambda: distribution.log_prob(torch.tensor([[0.3, 0.6], [0.1, 0.9], [-2.0, 30.0]])),
        lambda: distribution.base_dist.log_prob(torch.tensor([0.2, 0.8])),
        lambda: distribution.sample((4,)),
    ):
        torch.manual_seed(1)
        try:
            found.append(ask())
        except (ValueError, NotImplementedError, RuntimeError, AssertionError) as error:
            found.append(str(error))
    return found


def assert_same(distribution, again):
    assert type(again) is type(distribution)
    assert difference(outcomes(distribution), outcomes(again)) is None
    flags = [[(n, p.requires_grad) for n, p in d.transform.named_parameters()]
             for d in (distribution, again)]  # fmt: skip
    assert flags[0] == flags[1]
    assert difference(distribution.transform.state_dict(), again.transform.state_dict()) is None
    assert again.batch_shape == distribution.batch_shape


def assert_refused(distribution, path, match):
    """With a clear word; what was there stays, and nothing is left beside it."""
    path.write_bytes(b"as it was")
    with pytest.raises(ValueError, match=match):
        save(distribution, path)
    assert path.read_bytes() == b"as it was"
    assert os.listdir(path.parent) == [path.name]


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
    "ExpandedDistribution": lambda: dist.ExpandedDistribution(dist.Normal(0.0, 1.0), (2,)),
    "LogNormal": lambda: dist.LogNormal(A, 1.0),
    "HalfNormal": lambda: dist.HalfNormal(B),
    "HalfCauchy": lambda: dist.HalfCauchy(B),
    "Beta": lambda: dist.Beta(B, B + 1),
    "AffineBeta": lambda: dist.AffineBeta(B, B, A, B),
    "Gamma": lambda: dist.Gamma(B, B + 1),
    "Chi2": lambda: dist.Chi2(B + 3),
    "InverseGamma": lambda: dist.InverseGamma(B, B),
    "Exponential": lambda: dist.Exponential(B),
    "Cauchy": lambda: dist.Cauchy(A, B),
    "Laplace": lambda: dist.Laplace(A, B),
    "AsymmetricLaplace": lambda: dist.AsymmetricLaplace(A, B, B),
    "SoftLaplace": lambda: dist.SoftLaplace(A, B),
    "SoftAsymmetricLaplace": lambda: dist.SoftAsymmetricLaplace(A, B, B, B + 1),
    "StudentT": lambda: dist.StudentT(B + 3, A, B),
    "Gumbel": lambda: dist.Gumbel(A, B),
    "Logistic": lambda: dist.Logistic(A, B),
    "SkewLogistic": lambda: dist.SkewLogistic(A, B),
    "Kumaraswamy": lambda: dist.Kumaraswamy(B, B),
    "Weibull": lambda: dist.Weibull(B, B),
    "Pareto": lambda: dist.Pareto(B, B),
    "GeneralizedPareto": lambda: dist.GeneralizedPareto(A, B, B),
    "FisherSnedecor": lambda: dist.FisherSnedecor(B, B),
    "VonMises": lambda: dist.VonMises(A, B),
    "Stable": lambda: dist.Stable(torch.tensor(1.5), torch.tensor(0.1), B, A),
    "Uniform": lambda: dist.Uniform(A - 3, B),
    "Uniform of numbers": lambda: dist.Uniform(-5.0, 5.0).expand((2,)),
    "Folded": lambda: dist.FoldedDistribution(dist.Normal(A, B)),
    "Masked": lambda: dist.Normal(A, B).mask(torch.tensor([True, False])),
    "transformed": lambda: transformed(
        dist.Normal(A, B), maps.ExpTransform(), maps.AffineTransform(0.5, B), maps.TanhTransform()
    ),
}
if not hasattr(dist, "GeneralizedPareto"):  # of older versions of torch
    del ELEMENTWISE["GeneralizedPareto"]
KEPT = {
    **{name: lambda make=make: make().to_event(1) for name, make in ELEMENTWISE.items()},
    "batch": lambda: dist.Normal(torch.zeros(3, 2), 1.0).to_event(1),
    "MultivariateNormal": lambda: dist.MultivariateNormal(A, torch.eye(2) + 0.3),
    "precision": lambda: dist.MultivariateNormal(A, precision_matrix=torch.eye(2) + 0.3),
    "all kinds of covariance": lambda: used(dist.MultivariateNormal(A, torch.eye(2) + 0.3)),
    "LowRankMultivariateNormal": lambda: dist.LowRankMultivariateNormal(A, torch.ones(2, 1), B),
    "MultivariateStudentT": lambda: dist.MultivariateStudentT(torch.tensor(5.0), A, torch.eye(2)),
    "OMTMultivariateNormal": lambda: dist.OMTMultivariateNormal(A, torch.eye(2)),
    "Dirichlet": lambda: dist.Dirichlet(B),
    "ProjectedNormal": lambda: dist.ProjectedNormal(A),
    "Delta": lambda: dist.Delta(A, event_dim=1),
    "Empirical": lambda: dist.Empirical(torch.randn(5, 2), torch.zeros(5)),
    "GaussianScaleMixture": lambda: dist.GaussianScaleMixture(B, torch.randn(3), torch.rand(3)),
    "MixtureOfDiagNormals": lambda: dist.MixtureOfDiagNormals(
        torch.randn(3, 2), torch.ones(3, 2), torch.randn(3)
    ),
    "mixture": lambda: mixture(probs=torch.rand(7)),
    "mixture by logits": lambda: mixture(logits=torch.randn(7)),
    "mixture, used": lambda: used(mixture(probs=torch.rand(7))),
    "mixture by logits, used": lambda: used(mixture(logits=torch.randn(7))),
    "MaskedMixture": lambda: dist.MaskedMixture(
        torch.ones((), dtype=torch.bool), normal(), normal()
    ),
    "masked by a number": lambda: dist.MaskedDistribution(normal(), mask=False),
    "composed": lambda: transformed(
        normal(), maps.ComposeTransform([maps.AffineTransform(A, B, event_dim=1)])
    ),
    "permuted": lambda: transformed(normal(), maps.Permute(torch.tensor([1, 0]))),
    "stacked": lambda: transformed(
        normal(), maps.StackTransform([maps.ExpTransform(), maps.TanhTransform()], -1)
    ),
    "triangular": lambda: transformed(normal(), maps.LowerCholeskyAffine(A, torch.eye(2))),
    "SineSkewed": lambda: dist.SineSkewed(dist.VonMises(A, B).to_event(1), 0.1 * B),
    "samples": lambda: Samples(torch.randn(5, 2)),
    "torus": lambda: UniformTorus(2),
    "flow": flow,
    "expanded flow": lambda: flow().expand((3,)),
    "frozen flow": lambda: flow().freeze(),
    "flow from a mixture": lambda: flow(mixture(probs=torch.rand(7))),
}


@pytest.mark.parametrize("name", KEPT)
def test_a_base_is_kept(name, path):
    distribution = flow(KEPT[name]())
    save(distribution, path)
    again = load(path)
    assert_same(distribution, again)
    if not isinstance(again.base, InterpolantDistribution):
        assert difference(distribution.base, again.base) is None


@pytest.mark.parametrize("seed", range(5))
def test_probabilities_are_kept_to_the_bit_however_they_sum(seed, path):
    """Constructors divide by the sum, which is another after rounding."""
    torch.manual_seed(seed)
    for weights in ({"probs": torch.rand(7)}, {"logits": torch.randn(7)}):
        distribution = flow(mixture(**weights))
        save(distribution, path)
        assert_same(distribution, load(path))


class OwnNormal(dist.Normal):
    """A user's own distribution."""


class OwnSamples(Samples):
    """A user's own subclass of a base of this package."""


def coupling():
    layer = maps.affine_autoregressive(2)
    return transformed(normal(), layer)


REFUSED = {
    "OwnNormal": lambda: OwnNormal(A, B).to_event(1),
    "OwnSamples|class|base": lambda: OwnSamples(torch.randn(5, 2)),
    "AffineAutoregressive": coupling,
    "Planar": lambda: transformed(normal(), maps.Planar(2)),
    "_InverseTransform": lambda: transformed(normal(), maps.ExpTransform().inv),
    "RelaxedOneHotCategorical": lambda: dist.RelaxedOneHotCategorical(torch.tensor(0.5), B),
    "_IndependentConstraint": lambda: dist.ImproperUniform(constraints.real_vector, (), (2,)),
    "has_rsample": lambda: dist.Normal(A, B).has_rsample_(value=False).to_event(1),
    "InterpolantDistribution": lambda: dist.MaskedDistribution(flow(), mask=True),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_base_is_refused(name, path):
    assert_refused(flow(REFUSED[name]()), path, name)


def test_a_base_that_was_rounded_is_kept_or_refused(path):
    """What was computed of its parameters in float64 does not follow from them in float32."""
    low_rank = dist.LowRankMultivariateNormal(A, torch.tensor([[0.3, 0.7], [0.2, -1.1]]), B)
    distribution = flow(low_rank).to(torch.float32)
    assert_refused(distribution, path, "LowRankMultivariateNormal: it would lose _capacitance")
    triangular = flow(dist.MultivariateNormal(A, torch.eye(2) + 0.3)).to(torch.float32)
    save(triangular, path)
    assert difference(load(path).base, triangular.base) is None


# ---- classes of the user's own ------------------------------------------------------------------


class OwnDistribution(InterpolantDistribution):
    """A subclass, of which a file cannot give back the code."""


class OwnTransform(InterpolantTransform):
    """A subclass, likewise."""


class OwnWhitening(DenseWhitening):
    """A subclass, likewise."""


class OwnGrid(FixedGrid):
    """A subclass, likewise."""


class OwnProbes(HutchinsonDivergence):
    """A subclass, likewise."""


class OwnNetwork(VelocityMLP):
    """A subclass, which is passed in."""


def with_part(where, name, value):
    """A flow of which one part has one more attribute or module."""
    distribution = flow()
    setattr(distribution.transform.get_submodule(where), name, value)
    return distribution


def hooked():
    distribution = flow()
    distribution.transform.velocity.register_forward_hook(lambda module, inputs, out: 2 * out)
    return distribution


def parametrized():
    distribution = flow()
    parametrizations.weight_norm(distribution.transform.velocity.layers[0])
    return distribution


@pytest.mark.parametrize("what", ["a path", dist.Normal(0.0, 1.0), VelocityMLP(2)], ids=type)
def test_what_is_no_distribution_of_this_package(what, path):
    with pytest.raises(TypeError, match=f"of this package.*got {type(what).__name__}"):
        save(what, path)


SUBCLASSES = {
    "distribution": lambda: OwnDistribution(random_flow(2)),
    "transform": lambda: InterpolantDistribution(OwnTransform(VelocityMLP(2, (8,)))),
    "whitening": lambda: flow(whitening=OwnWhitening(2)),
    "solver": lambda: flow(solver=OwnGrid(8)),
    "divergence": lambda: flow(divergence=OwnProbes()),
}


@pytest.mark.parametrize("part", SUBCLASSES)
def test_a_subclass_is_refused(part, path):
    assert_refused(SUBCLASSES[part](), path, f"a {part} of this package, got a Own")


ALTERED = {
    "extra": lambda: with_part("flow.velocity", "extra", nn.Linear(2, 2)),
    "velocity.factor": lambda: with_part("flow.velocity", "factor", 2.0),
    "velocity.forward": lambda: with_part("flow.velocity", "forward", torch.zeros_like),
    "_forward_hooks": hooked,
    "parametrizations": parametrized,
    "weights.head.weight": lambda: with_part("", "head", nn.Linear(2, 2)),
    "flow.head": lambda: with_part("flow", "head", nn.Linear(2, 2)),
    "velocity.output": lambda: with_part(
        "flow.velocity", "output", nn.Sequential(nn.Linear(8, 2, bias=False))
    ),
}


@pytest.mark.parametrize("what", ALTERED)
def test_a_part_that_is_not_as_its_class_makes_it_is_refused(what, path):
    assert_refused(ALTERED[what](), path, what if "." not in what else what.split(".")[-1])


def own_flow(base=None, **choices):
    return InterpolantDistribution(InterpolantTransform(OwnVelocity(2), 2, **choices), base)


def test_a_subclass_of_a_network_is_passed_in(path):
    distribution = InterpolantDistribution(InterpolantTransform(OwnNetwork(2, (8,))))
    save(distribution, path)
    assert_same(distribution, load(path, velocity=OwnNetwork(2, (8,))))
    with pytest.raises(ValueError, match="the flow's velocity is a OwnNetwork: pass an instance"):
        load(path)


def test_a_base_with_a_velocity_of_ones_own_is_given_what_is_passed_in(path):
    distribution = flow(own_flow())
    save(distribution, path)
    assert_same(distribution, load(path, velocity=OwnVelocity(2)))
    with pytest.raises(ValueError, match="the flow's velocity is a OwnVelocity: pass an instance"):
        load(path)


def test_two_velocities_of_ones_own_are_refused(path):
    """One can be passed in."""
    assert_refused(own_flow(own_flow()), path, "velocity is a OwnVelocity")


@dataclasses.dataclass(frozen=True)
class OwnInterpolant(Interpolant):
    power: float = 2.0

    def coefficients(self, t):
        return (1 - t) ** self.power, t**self.power, torch.zeros_like(t)


class OwnWaves(LearnedInterpolant):
    """A user's own interpolant with tensors."""


@pytest.mark.parametrize("inside", [None, 2.0, 3.0])
def test_an_interpolant_of_ones_own_is_passed_to_all_flows(inside, path):
    base = None if inside is None else flow(interpolant=OwnInterpolant(inside))
    distribution = flow(base, interpolant=OwnInterpolant())
    if inside == 3.0:
        assert_refused(distribution, path, "base.interpolant.power")
        return
    save(distribution, path)
    again = load(path, interpolant=OwnInterpolant())
    assert_same(distribution, again)
    assert again.transform.interpolant == OwnInterpolant()


def test_an_interpolant_of_ones_own_in_the_base_alone(path):
    distribution = flow(flow(interpolant=OwnInterpolant()), interpolant=Linear())
    save(distribution, path)
    again = load(path, interpolant=OwnInterpolant())
    assert again.transform.interpolant == Linear()
    assert again.base.transform.interpolant == OwnInterpolant()


def test_an_interpolant_of_ones_own_gets_its_tensors(path):
    own = OwnWaves(2)
    own.waves.normal_()
    distribution = flow(interpolant=own)
    save(distribution, path)
    again = load(path, interpolant=OwnWaves(2))
    assert torch.equal(again.transform.interpolant.waves, own.waves)


def test_a_function_of_ones_own_inside_a_choice(path):
    gamma = OwnGamma()
    distribution = flow(interpolant=Latent(Linear(), gamma))
    save(distribution, path)
    assert load(path, interpolant=Latent(Linear(), gamma)).transform.interpolant.gamma is gamma
    with pytest.raises(ValueError, match="the flow's interpolant is a Latent: pass an instance"):
        load(path)


class Net(OwnVelocity):
    """A velocity with an activation and a factor, which no tensor tells."""

    def __init__(self, activation=torch.tanh, scale=1.0):
        super().__init__(2)
        self.activation, self.scale = activation, scale

    def forward(self, t, x, context=None):
        h = self.activation(self.hidden(torch.cat((x, t[..., None]), -1)))
        return self.scale * self.out(h)


def net_flow(network, dtype=torch.float64):
    return InterpolantDistribution(InterpolantTransform(network.to(dtype), 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "other", [{"activation": torch.relu}, {"scale": 2.0}], ids=["activation", "factor"]
)
def test_a_velocity_that_computes_something_else_is_refused(other, dtype, path):
    save(net_flow(Net(), dtype), path)
    assert load(path, velocity=Net()).transform.flow.loc.dtype == dtype
    match = r"expected the Net that was saved.*values at two fixed points.*velocity=Net\("
    with pytest.raises(ValueError, match=match):
        load(path, velocity=Net(**other))


def test_a_file_without_values_is_loaded_as_before(path):
    save(net_flow(Net()), path)
    header, tensors = io.read(path, framework="pt")
    del header["own"], header["levels"]
    io.write(path, tensors, {"pyro_interpolant": json.dumps(header)})
    assert load(path, velocity=Net(torch.relu)).transform.velocity.activation is torch.relu


def test_values_that_another_machine_rounds_otherwise_are_the_same(path):
    save(net_flow(Net()), path)
    header, tensors = io.read(path, framework="pt")
    saved = header["own"]["velocity"]
    assert len(saved["values"]) == 4
    saved["values"] = [1.003 * value for value in saved["values"]]
    io.write(path, tensors, {"pyro_interpolant": json.dumps(header)})
    load(path, velocity=Net())
    saved["values"].pop()
    io.write(path, tensors, {"pyro_interpolant": json.dumps(header)})
    with pytest.raises(ValueError, match="damaged or was edited"):
        load(path, velocity=Net())


def test_values_that_cancel_are_the_same_whatever_rounding_leaves(path):
    save(net_flow(Net(scale=1e-12)), path)
    header, tensors = io.read(path, framework="pt")
    header["own"]["velocity"]["values"] = [0.0] * 4
    io.write(path, tensors, {"pyro_interpolant": json.dumps(header)})
    assert load(path, velocity=Net(scale=1e-12)).transform.velocity.scale == 1e-12


class Noisy(Net):
    def forward(self, t, x, context=None):
        return super().forward(t, x) + torch.randn_like(x)


class NoisyByNumpy(Net):
    def forward(self, t, x, context=None):
        return super().forward(t, x) + np.random.default_rng().normal()


class Picky(Net):
    def forward(self, t, x, context=None):
        if len(x) == 2:
            raise KeyError("rows that it does not expect")
        return super().forward(t, x)


class Infinite(Net):
    def forward(self, t, x, context=None):
        return super().forward(t, x) / torch.zeros(())


class Locked(Net):
    """It cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


@pytest.mark.parametrize("kind", [Noisy, NoisyByNumpy, Picky, Infinite, Locked])
def test_a_velocity_whose_values_tell_nothing_is_saved_and_loaded(kind, path):
    state = torch.get_rng_state()
    network = kind()
    torch.set_rng_state(state)
    save(net_flow(network), path)
    again = load(path, velocity=kind())
    assert difference(network.state_dict(), again.transform.velocity.state_dict()) is None
    values = io.read(path)[0]["own"]["velocity"]["values"]
    assert (values is None) == (kind is not Locked)


def test_values_are_those_of_evaluation_and_change_nothing(path):
    """Neither the mode of the network, nor the generator of others."""
    network = Dropping(2).train()
    distribution = InterpolantDistribution(InterpolantTransform(network, 2))
    state = torch.get_rng_state()
    save(distribution, path)
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert io.read(path)[0]["own"]["velocity"]["values"] is not None


def test_flows_that_are_given_one_network_do_not_share_it(path):
    flows = [net_flow(Net()) for _ in range(2)]
    paths = [path.with_name(name) for name in ("one", "two")]
    for distribution, place in zip(flows, paths, strict=True):
        save(distribution, place)
    passed = Net()
    before = copy.deepcopy(passed.state_dict())
    for distribution, again in zip(flows, [load(p, velocity=passed) for p in paths], strict=True):
        assert_same(distribution, again)
    assert difference(passed.state_dict(), before) is None


class Pointwise(nn.Module):
    """A network of images of any shape and with any labels."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.ones(1))

    def forward(self, t, image, labels=None):
        return self.shift * image


@pytest.mark.parametrize(
    ("shape", "classes", "match"),
    [((1, 2, 8), 3, "image_shape is"), ((1, 4, 4), 5, "classes is 5 in place of 3")],
)
def test_an_adapter_of_images_of_another_shape_or_classes_is_refused(shape, classes, match, path):
    transform = ConditionalInterpolantTransform(ImageVelocity(Pointwise(), (1, 4, 4), 3))
    distribution = ConditionalInterpolantDistribution(transform, event_shape=(1, 4, 4))
    save(distribution, path)
    found = load(path, velocity=ImageVelocity(Pointwise(), (1, 4, 4), 3))
    assert found.transform.velocity.image_shape == (1, 4, 4)
    with pytest.raises(ValueError, match=f"expected the ImageVelocity that was saved.*{match}"):
        load(path, velocity=ImageVelocity(Pointwise(), shape, classes))


def test_an_interpolant_that_computes_something_else_is_refused(path):
    save(flow(interpolant=OwnInterpolant(2.0)), path)
    with pytest.raises(ValueError, match=r"expected the OwnInterpolant that was saved.*values"):
        load(path, interpolant=OwnInterpolant(3.0))


def test_flows_that_are_given_one_interpolant_with_tensors_do_not_share_it(path):
    save(flow(interpolant=OwnWaves(2)), path)
    passed = OwnWaves(2)
    one, two = (load(path, interpolant=passed).transform.interpolant for _ in range(2))
    one.waves.fill_(1.0)
    assert not two.waves.any()
    assert not passed.waves.any()


class OwnGamma:
    def __call__(self, t):
        return 0.3 * torch.sin(torch.pi * t) ** 2


# ---- what else a flow is made of ----------------------------------------------------------------


@pytest.mark.parametrize("part", ["velocity.layers", "velocity.shifts", "velocity", "noise"])
def test_weights_that_are_frozen_in_part_come_back_so(part, path):
    distribution = flow()
    distribution.transform.flow.noise = VelocityMLP(2, (8,))
    distribution.transform.flow.get_submodule(part).requires_grad_(requires_grad=False)
    save(distribution, path)
    assert_same(distribution, load(path))


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_a_base_is_frozen_or_not_by_itself(inner, outer, path):
    distribution = flow(flow())
    distribution.transform.requires_grad_(not outer)
    distribution.base.transform.requires_grad_(not inner)
    save(distribution, path)
    again = load(path)
    assert_same(distribution, again)
    assert_same(distribution.base, again.base)


def test_a_velocity_that_was_passed_in_frozen_trains_as_what_was_saved(path):
    distribution = own_flow()
    save(distribution, path)
    assert_same(
        distribution, load(path, velocity=OwnVelocity(2).requires_grad_(requires_grad=False))
    )


@pytest.mark.parametrize("shape", [(3,), (2, 1), (0,)])
@pytest.mark.parametrize("support", [constraints.real_vector, constraints.positive], ids=str)
def test_the_batch_shape_is_kept(shape, support, path):
    distribution = InterpolantDistribution(random_flow(2, (8,)), support=support).expand(shape)
    save(distribution, path)
    again = load(path)
    assert again.batch_shape == shape
    assert again.sample((4,)).shape == (4, *shape, 2)


@pytest.mark.parametrize("validate", [True, False, None])
def test_whether_arguments_are_checked_is_kept(validate, path):
    distribution = InterpolantDistribution(random_flow(2, (8,)), validate_args=validate)
    save(distribution, path)
    assert vars(load(path)).get("_validate_args") is validate


@pytest.mark.parametrize("trains", [True, False])
def test_whether_gradients_train_the_weights_is_kept(trains, path):
    """Else a posterior that is to be read would be evaluated at random nodes."""
    distribution, x = InterpolantDistribution(random_flow(2, (8,))), torch.randn(4, 2)
    distribution.transform.trains_weights = trains
    save(distribution, path)
    again = load(path)
    assert again.transform.trains_weights is trains
    assert torch.equal(again.log_prob(x), distribution.log_prob(x))


class Dropping(OwnVelocity):
    """A velocity with dropout."""

    def forward(self, t, x, context=None):
        return nn.functional.dropout(super().forward(t, x), training=self.training)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_dropout_is_on_or_off_as_it_was(training, frozen, path):
    velocity = Dropping(2).requires_grad_(requires_grad=not frozen).train(training)
    distribution = InterpolantDistribution(InterpolantTransform(velocity, 2))
    save(distribution, path)
    again = load(path, velocity=Dropping(2).train(not training))
    assert again.transform.velocity.training == training
    assert_same(distribution, again)


class Mixed(OwnVelocity):
    """A velocity with a buffer of a finer type, a count, and one weight under two names."""

    def __init__(self, dim):
        super().__init__(dim)
        self.register_buffer("fine", torch.full((1,), 1 / 3, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(7))
        self.twin = self.out


def test_a_velocity_keeps_the_types_of_its_tensors_and_those_that_it_shares(path):
    velocity = Mixed(2).to(torch.float32)
    velocity.fine = torch.full((1,), 1 / 3, dtype=torch.float64)
    distribution = InterpolantDistribution(InterpolantTransform(velocity, 2))
    save(distribution, path)
    passed = Mixed(2)
    found = load(path, velocity=passed).transform.velocity
    assert found.twin.weight is found.out.weight
    assert found.count.dtype == torch.long
    assert difference(velocity.state_dict(), found.state_dict()) is None


def test_an_interpolant_keeps_its_own_type(path):
    distribution = flow(interpolant=LearnedInterpolant(2).to(torch.float32))
    save(distribution, path)
    assert load(path).transform.interpolant.waves.dtype == torch.float32


class Lazy(OwnVelocity):
    """A velocity with a layer that takes its size from the first rows."""

    def __init__(self, dim):
        super().__init__(dim)
        self.out = nn.LazyLinear(dim)


def test_a_lazy_layer_takes_its_size_from_the_file(path):
    distribution = InterpolantDistribution(InterpolantTransform(Lazy(2), 2))
    distribution.sample()
    save(distribution, path)
    assert_same(distribution, load(path, velocity=Lazy(2)))


class Stateful(OwnVelocity):
    def get_extra_state(self):
        return {"not": "a tensor"}


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Stateful(2), "plain tensors, got a dict"),
        (lambda: with_buffer(torch.eye(2).to_sparse()), "plain tensors"),
        (lambda: with_buffer(torch.zeros(2, dtype=torch.complex128)), "complex128"),
        (lambda: Lazy(2), "lazy module"),
    ],
)
def test_a_velocity_with_what_no_file_holds_is_refused(make, match, path):
    distribution = InterpolantDistribution(InterpolantTransform(make(), 2))
    assert_refused(distribution, path, match)


def with_buffer(value):
    velocity = OwnVelocity(2)
    velocity.register_buffer("value", value)
    return velocity


def test_numbers_of_numpy_are_numbers(path):
    solver = FixedGrid(np.int64(6), warp=np.float64(0.25))
    velocity = VelocityMLP(2, [np.int64(8), np.int32(9)])
    distribution = InterpolantDistribution(InterpolantTransform(velocity, solver=solver))
    save(distribution, path)
    again = load(path)
    assert again.transform.solver == FixedGrid(6, warp=0.25)
    assert_same(distribution, again)


def test_saving_changes_nothing_in_the_flow(path):
    distribution = own_flow(flow())
    distribution.transform.velocity.out.requires_grad_(requires_grad=False)
    distribution.transform.train()
    before = copy.deepcopy(distribution.transform)
    versions = [p._version for p in distribution.transform.parameters()]
    state = torch.get_rng_state()
    save(distribution, path)
    assert difference(before, distribution.transform) is None
    assert [p._version for p in distribution.transform.parameters()] == versions
    assert distribution.transform.training
    assert distribution.transform.velocity.training
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_flow_that_was_saved_and_loaded_in_a_mode_can_be_trained_out_of_it(mode, path):
    distribution = flow(normal())
    with mode():
        save(distribution, path)
        again = load(path)
    assert_same(distribution, again)
    again.log_prob(torch.ones(2)).backward()
    assert again.transform.velocity.output.weight.grad.abs().sum() > 0


def test_the_context_of_a_conditional_flow(path):
    distribution = ConditionalInterpolantDistribution(random_flow(2, context_dim=3), normal())
    save(distribution, path)
    again, context = load(path), torch.randn(3)
    assert_same(distribution.condition(context), again.condition(context))
