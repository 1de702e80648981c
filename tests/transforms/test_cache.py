"""The cache: no stale value, no lost gradient, no freed graph, no leak, nothing uncopyable."""

import copy
import random
import weakref
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import COPIES, FLOWS, CountingSolver, through_torch
from torch.autograd import forward_ad
from torch.distributions import constraints

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ExactDivergence,
    FixedGrid,
    HutchinsonDivergence,
    InterpolantDistribution,
    InterpolantTransform,
    interpolant_transform,
)
from pyro_interpolant.transforms.gaussianize import Gaussianized, MarginalTransform, with_slopes

# Raised inside torch, by its own first use of forward-mode differentiation.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated"),
    pytest.mark.usefixtures("_nodes_stay"),
]

CLOSE = 2e-6  # between the two directions of a solve
SUPPORTS = {
    "real": constraints.real_vector,
    "positive": constraints.positive,
    "simplex": constraints.simplex,
}
EVERY_COPY = {
    **COPIES,
    "copy": copy.copy,
    "torch": partial(through_torch, protocol=2),  # its default
}
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}
pairs = pytest.mark.parametrize(  # each kind of network, each support
    ("kind", "support"), [("two", "real"), ("three", "positive"), ("own", "simplex")]
)
two_kinds = pytest.mark.parametrize("kind", ["two", "own"])


def smooth(transform):
    """Slow a velocity down in time, so that few steps solve it to 1e-6 in both directions."""
    embedding = getattr(transform.velocity, "embedding", None)
    if embedding is not None:
        with torch.no_grad():
            embedding.weight[:, 1:8] = 0.0  # cosines
            embedding.weight[:, 9:16] = 0.0  # sines
    return transform


def flow(kind="two", dim=2, steps=8, **choices):
    return smooth(FLOWS[kind](dim, solver=FixedGrid(steps=steps), **choices))


def prior(kind="two", steps=8, support="real"):
    return InterpolantDistribution(flow(kind, steps=steps), support=SUPPORTS[support])


def fresh(distribution):
    """Return a copy that has solved nothing yet."""
    new = copy.deepcopy(distribution)
    new.clear_cache()
    return new


def gradients(transform, value):
    """Return the gradient of a scalar with respect to all weights, as one vector."""
    weights = list(transform.flow.parameters())
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])


# Stale values


def adam(d, **options):
    optimizer = torch.optim.Adam(d.transform.flow.parameters(), lr=0.1, **options)
    (-d.log_prob(d.sample((3,))).sum()).backward()
    optimizer.step()


def edit(d, how):
    for p in d.transform.flow.parameters():
        how(p)


def under_no_grad(p):
    with torch.no_grad():
        p.add_(0.1)


def moved_weights(d):
    return {k: v + 0.1 for k, v in d.transform.flow.velocity.state_dict().items()}


def replace_parameter(d):
    layer = next(m for m in d.transform.flow.modules() if isinstance(m, torch.nn.Linear))
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 0.3)


def set_whitening(d):
    d.transform.flow.whitening.set(d.transform.flow.loc + 0.1, d.transform.flow.whitening.matrix())


def half_and_back(d):
    d.to(torch.float16)
    d.to(torch.float64)


CHANGES = {
    "adam": adam,
    "fused_adam": lambda d: adam(d, fused=True),
    "no_grad": lambda d: edit(d, under_no_grad),
    "data_in_place": lambda d: edit(d, lambda p: p.data.add_(0.1)),
    "data_assigned": lambda d: edit(d, lambda p: setattr(p, "data", p.data + 0.1)),
    "numpy": lambda d: edit(d, lambda p: p.detach().numpy().__iadd__(0.1)),
    "replaced_parameter": replace_parameter,
    "load_state_dict": lambda d: d.transform.velocity.load_state_dict(moved_weights(d)),
    "load_state_dict_assign": lambda d: d.transform.velocity.load_state_dict(
        moved_weights(d), assign=True
    ),
    "whitening": set_whitening,
    "whitening_data": lambda d: d.transform.flow.loc.data.add_(0.1),
    "gate": lambda d: d.transform.velocity.reach.fill_(1.0),
    "solver": lambda d: setattr(d.transform, "solver", FixedGrid(steps=2, method="euler")),
    "divergence": lambda d: setattr(d.transform, "divergence", HutchinsonDivergence(1, seed=3)),
    "half_and_back": half_and_back,
    "context": lambda d: d.transform.raw_context.add_(1.0),
    "context_data": lambda d: d.transform.raw_context.data.mul_(2.0),
}
UNSEEN = {  # by some results
    "divergence": ("y", "x"),
    "whitening": ("log_det", "log_det_inverse"),
    "whitening_data": ("log_det", "log_det_inverse"),
}
IN_PLACE = {
    "add_": lambda s: s.add_(0.5),
    "index": lambda s: s.__setitem__(0, 0.25),
    "copy_": lambda s: s.copy_(torch.full_like(s, 0.25)),
    "row_view": lambda s: s[1].fill_(0.25),
    "data": lambda s: s.data.square_(),
}


def results(d, w, v, drawn, sampled):
    """All that is solved for: images in both directions, log-determinants, densities."""
    y, x = d.transform(w), d.transform.inv(v)
    return {
        "y": y,
        "x": x,
        "log_det": d.transform.log_abs_det_jacobian(w, y),
        "log_det_inverse": d.transform.log_abs_det_jacobian(x, v),
        "density": d.log_prob(drawn),
        "density_of_rsample": d.log_prob(sampled),
    }


def check_results(found, d, given, where):
    """Compare results with those of a copy that has solved nothing, given new tensors."""
    expected = results(fresh(d), *(s.detach().clone() for s in given))
    for name, value in found.items():
        atol = 1e-5 if name == "density_of_rsample" else 1e-7  # solved the other way
        message = f"{where}: {name} is not that of a copy"
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=atol, msg=message)


# Kinds of networks, supports, and whether there is a context, which the flow is a view with.
PROGRAMS = [
    ("own", "positive", False),
    ("two", "real", True),
    ("three", "simplex", False),
    ("two", "real", False),
    ("three", "positive", True),
    ("own", "simplex", True),
]


def subject(kind, support, conditioned):
    if not conditioned:
        return prior(kind, support=support)
    family = ConditionalInterpolantDistribution(
        flow(kind, context_dim=3), support=SUPPORTS[support]
    )
    return family.condition(torch.randn(3))


@pytest.mark.parametrize(
    ("kind", "support", "conditioned"),
    [*PROGRAMS[:2], *(pytest.param(*p, marks=pytest.mark.slow) for p in PROGRAMS[2:])],
)
def test_programs_of_changes_modes_copies_and_edits_agree_with_an_uncached_twin(
    kind, support, conditioned
):
    """Half of the changes, each in a random mode, now and then of a copy; all in two programs."""
    number = PROGRAMS.index((kind, support, conditioned))
    choose, changes = random.Random(number), sorted(CHANGES)
    random.Random(number // 2).shuffle(changes)
    d = subject(kind, support, conditioned)
    changes = [c for c in changes[number % 2 :: 2] if conditioned or "context" not in c]
    changes = [c for c in changes if hasattr(d.transform.velocity, "reach") or c != "gate"]
    start = copy.deepcopy(d.transform.flow.state_dict())
    context = copy.deepcopy(d.transform.raw_context)
    for change in changes:
        mode, how = choose.choice(sorted(MODES)), choose.choice(sorted(IN_PLACE))
        where = f"{change} in mode {mode}, {how}"
        with MODES[mode]():
            given = torch.randn(5, 2), torch.randn(5, 2), d.sample((5,)), d.rsample((5,))
            before = results(d, *given)
        if choose.random() < 0.3:  # what is done to a copy leaves the original as it is
            original, d = d, COPIES[choose.choice(["torch", "pickle", "deepcopy"])](d)
            with MODES[mode]():
                results(d, *given)
            CHANGES[change](d)
            with MODES[mode]():
                same = results(original, *given)
            for name, value in same.items():
                torch.testing.assert_close(value, before[name], msg=f"original, {where}: {name}")
        else:
            CHANGES[change](d)
        with MODES[mode]():
            after = results(d, *given)
        check_results({k: s.clone() for k, s in after.items()}, d, given, where)
        for name, value in after.items():
            assert value.requires_grad is (mode == "grad"), where
            if name not in UNSEEN.get(change, ()):
                assert (value - before[name]).abs().max() > 5 * CLOSE, f"{where}: {name} as before"
        with MODES[mode]():
            for s in given[:3]:
                IN_PLACE[how](s)
            if support == "simplex":
                given[2].div_(given[2].sum(-1, keepdim=True))
            edited = results(d, *given)
        check_results({k: s.clone() for k, s in edited.items()}, d, given, f"edited, {where}")
        for name in ("y", "x", "density"):
            assert (edited[name] - after[name]).abs().max() > 5 * CLOSE, f"edited, {where}: {name}"
        d.transform.flow.load_state_dict(start)
        d.transform.solver, d.transform.divergence = FixedGrid(steps=8), ExactDivergence()
        if conditioned:
            d.transform.raw_context.copy_(context)


def test_dtype_changed_raises_rather_than_giving_the_old_value():
    d = prior()
    x = d.sample((4,))
    d.log_prob(x)
    d.to(torch.float32)
    with pytest.raises(ValueError, match="expected torch.float32"):
        d.log_prob(x)
    assert d.log_prob(x.float()).dtype == torch.float32


class Scaled(torch.nn.Module):
    """A network with dropout, and attributes that are neither parameters nor buffers."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Dropout(0.5), torch.nn.Linear(16, 2)
        )
        self.strength, self.vector, self.array = 1.0, torch.ones(2), np.ones(2)
        self.options = {"scales": [torch.ones(2), 1.0], "function": torch.tanh}
        self.options["itself"] = self.options

    def forward(self, t, x, context=None):
        first, second = self.options["scales"]
        scale = self.strength * second * self.vector * first * torch.from_numpy(self.array)
        return scale * self.options["function"](self.layers(x))


ATTRIBUTES = {
    "number": lambda v: setattr(v, "strength", 2.0),
    "tensor": lambda v: setattr(v, "vector", torch.full((2,), 2.0)),
    "tensor_data": lambda v: v.vector.data.mul_(2.0),
    "array": lambda v: np.multiply(v.array, 2.0, out=v.array),
    "list": lambda v: v.options["scales"].__setitem__(1, 2.0),
    "tensor_in_a_list": lambda v: v.options["scales"][0].mul_(2.0),
    "part": lambda v: v.layers.__setitem__(1, torch.nn.SiLU()),
    "hook": lambda v: v.layers[0].register_forward_hook(lambda module, x, out: 2 * out),
    "pre_hook": lambda v: v.register_forward_pre_hook(
        lambda module, given: (given[0], 0 * given[1])
    ),
    "mode": lambda v: v.train(),
    "mode_of_a_part": lambda v: v.layers[2].train(),
}


def test_attributes_modes_and_hooks_of_a_network_are_seen():
    for name, change in ATTRIBUTES.items():
        transform = InterpolantTransform(Scaled().eval(), 2, solver=CountingSolver())
        x, solver = torch.randn(5, 2), transform.solver
        with torch.no_grad():
            before = transform(x)
            assert transform(x) is before
            assert transform.inv(before) is x
            change(transform.velocity)
            after = transform(x)
            assert transform(x) is after
            assert solver.solves == 2, name
            assert (after - before).abs().max() > 1e-3, name
            if "mode" not in name:
                assert torch.equal(copy.deepcopy(transform)(x), after), name


def test_autocast_then_not():
    d = prior(support="positive").freeze().to(torch.float32)
    x = d.sample((5,))
    with torch.autocast("cpu", torch.bfloat16):
        inside = d.log_prob(x)
        y = d.sample((5,))
        d.log_prob(y)
    for value in (x, y):
        expected = fresh(d).log_prob(value)
        torch.testing.assert_close(d.log_prob(value), expected, rtol=0, atol=CLOSE)
    with torch.autocast("cpu", torch.float16):
        assert not torch.equal(d.log_prob(x), inside)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(d.log_prob(x), inside)


# Gradients


GRADED = {
    "positive": constraints.positive,
    "corr_cholesky": constraints.corr_cholesky,
    "gaussianized": Gaussianized(
        constraints.real_vector,
        MarginalTransform(*with_slopes(*torch.tensor([[[-3.0, 0, 3]] * 2, [[-4.0, 0, 1]] * 2]))),
    ),
}


@pytest.mark.parametrize("support", GRADED)
def test_a_gradient_in_a_draw_is_refused_and_those_of_weights_are_exact(support):
    """A draw with a graph is not inverted: where it came from is found again."""
    dim = 3 if support == "corr_cholesky" else 2
    d = InterpolantDistribution(flow(dim=dim, steps=24), support=GRADED[support])
    torch.manual_seed(1)
    y = d.rsample((2,))
    value = d.log_prob(y).sum()
    torch.testing.assert_close(value, fresh(d).log_prob(y.detach()).sum(), rtol=0, atol=1e-4)
    with pytest.raises(RuntimeError, match="used in the graph"):
        torch.autograd.grad(value, y, retain_graph=True)
    found = gradients(d.transform, value)
    torch.manual_seed(1)
    y = d.rsample((2,))
    d.clear_cache()
    expected = gradients(d.transform, d.log_prob(y).sum())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)


@pairs
def test_gradients_of_observations_in_weights_and_values(kind, support):
    d = prior(kind, support=support)
    z = d.sample((5,))
    first, second = d.log_prob(z), d.log_prob(z)
    twin = fresh(d)
    expected = gradients(twin.transform, twin.log_prob(z.clone()).sum())
    assert expected.abs().max() > 1e-3
    for value in (first, second, d.log_prob(z)):  # each with a graph of its own
        torch.testing.assert_close(gradients(d.transform, value.sum()), expected)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(twin.log_prob(leaf).sum(), leaf)
    assert expected.abs().max() > 1e-3
    for frozen in (False, True):
        x = z.clone()
        d.transform.requires_grad_(not frozen)
        before = d.log_prob(x)
        value = d.log_prob(x.requires_grad_())
        torch.testing.assert_close(value, before, rtol=0, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), x)[0], expected)


@pairs
def test_reparametrised_gradient_is_that_without_a_cache(kind, support):
    """The ELBO's gradient through rsample and log_prob of the same tensor."""
    d = prior(kind, steps=24, support=support)
    torch.manual_seed(1)
    x = d.rsample((5,))
    cached = gradients(d.transform, d.log_prob(x).sum() + x.square().sum())
    torch.manual_seed(1)
    x = d.rsample((5,))
    d.clear_cache()
    plain = gradients(d.transform, d.log_prob(x).sum() + x.square().sum())
    torch.testing.assert_close(cached, plain, rtol=1e-3, atol=2e-4)
    assert plain.abs().max() > 0.1


@two_kinds
def test_images_and_log_determinants_each_have_a_graph_of_their_own(kind):
    transform = flow(kind)
    for x in (torch.randn(5, 2), torch.randn(5, 2).requires_grad_()):
        first, second = transform(x), transform(x)
        one = gradients(transform, first.square().sum())
        torch.testing.assert_close(gradients(transform, second.square().sum()), one)
    y = transform(x)
    one = gradients(transform, transform.log_abs_det_jacobian(x, y).sum())
    two = gradients(transform, transform.log_abs_det_jacobian(x, y.detach()).sum())
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("kind", "inverse", "needs_grad"),
    [("two", False, True), ("three", True, False), ("own", True, True), ("own", False, False)],
)
def test_backward_then_log_abs_det_jacobian(kind, inverse, needs_grad):
    transform = flow(kind)
    direction = transform.inv if inverse else transform
    source = torch.randn(5, 2).requires_grad_(needs_grad)
    image = direction(source)
    image.square().sum().backward()
    value = direction.log_abs_det_jacobian(source, image)
    other = copy.deepcopy(transform)
    other_direction = other.inv if inverse else other
    leaf = source.detach().clone()
    expected = other_direction.log_abs_det_jacobian(leaf, other_direction(leaf))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(transform, value.sum()), gradients(other, expected.sum()))


@pytest.mark.parametrize(
    ("use", "kind", "support"), [("rsample", "two", "simplex"), ("leaf", "own", "positive")]
)
def test_backward_again_and_again(use, kind, support):
    d = prior(kind, support=support)
    x, found = d.sample((5,)).requires_grad_(), []
    for _ in range(3):
        torch.manual_seed(3)
        parts = d.rsample_and_log_prob((5,)) if use == "rsample" else [d.log_prob(x)]
        found.append(gradients(d.transform, sum(part.sum() for part in parts)))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    assert found[0].abs().max() > 1e-3


# Modes


@pairs
def test_modes_follow_each_other(kind, support):
    d = prior(kind, support=support)
    x = d.sample((5,))
    values = []
    for mode in ("no_grad", "grad", "inference", "grad", "no_grad"):
        with MODES[mode]():
            values.append(d.log_prob(x))
        assert values[-1].requires_grad is (mode == "grad")
        assert values[-1].is_inference() is (mode == "inference")
    for value in values:
        torch.testing.assert_close(value.detach().clone(), values[0], rtol=0, atol=1e-5)
    assert gradients(d.transform, values[3].sum()).abs().max() > 0
    with torch.inference_mode():
        drawn = d.sample((5,))
        scored = d.log_prob(drawn)
    sampled = d.rsample((5,))
    with torch.no_grad():
        torch.testing.assert_close(d.log_prob(drawn.clone()), scored.clone(), rtol=0, atol=1e-5)
        assert not d.log_prob(sampled).requires_grad
    assert d.freeze() is d
    assert not d.log_prob(x).requires_grad
    assert not d.rsample().requires_grad
    d.transform.requires_grad_(requires_grad=True)
    assert d.log_prob(x).requires_grad
    d.transform.requires_grad_(requires_grad=False)  # without freeze, which clears the cache
    assert not d.log_prob(x).requires_grad
    gradient = torch.autograd.grad(d.log_prob(x.requires_grad_()).sum(), x)[0]
    assert gradient.abs().max() > 0


@two_kinds
def test_frozen_inference_mode_then_not(kind):
    """No tensor made in inference mode comes out of the cache after it: none can be saved."""
    transform = prior(kind).freeze().transform
    w = torch.randn(5, 2)
    for direction in (transform, transform.inv):
        with torch.inference_mode():
            image = direction(w)
            inside = direction.log_abs_det_jacobian(w, image)
        outside = direction(w)
        log_det = direction.log_abs_det_jacobian(w, outside)
        assert not outside.is_inference()
        assert not log_det.is_inference()
        torch.testing.assert_close(log_det, inside.clone())
        scale = torch.ones(()).requires_grad_()
        (scale * (outside.sum() + log_det.sum())).backward()
        torch.testing.assert_close(scale.grad, outside.sum() + log_det.sum())


# functorch and tracing


@two_kinds
def test_functional_weights_never_meet_the_cache(kind):
    d = prior(kind)
    x = d.sample((5,))

    class Score(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.transform = d.transform

        def forward(self, x):
            return d.log_prob(x).sum()

    module = Score()
    weights = {k: v.detach().clone() for k, v in module.named_parameters()}
    moved = {k: 1.05 * v for k, v in weights.items()}
    plain = module(x)
    expected = torch.autograd.grad(plain, list(module.parameters()))

    def loss(weights):
        return torch.func.functional_call(module, weights, (x,))

    with torch.no_grad():
        module(x)
        shifted = loss(moved)
        assert (shifted - plain).abs() > 1e-3
        torch.testing.assert_close(loss(weights), plain)
    found = torch.func.grad(loss)(weights)
    for a, b in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    both = {k: torch.stack([weights[k], moved[k]]) for k in weights}
    values = torch.func.vmap(loss)(both)
    expected = torch.stack([plain.detach(), shifted])
    torch.testing.assert_close(values.detach(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(module(x), plain)


@two_kinds
def test_tangents_are_those_of_this_call(kind):
    transform, x = flow(kind).requires_grad_(requires_grad=False), torch.randn(5, 2)
    weights = {k: v.clone() for k, v in transform.named_parameters()}

    def values(weights):
        return torch.func.functional_call(transform, weights, (x,))

    plain = transform(x)
    for _ in range(2):
        along = {k: torch.randn_like(v) for k, v in weights.items()}
        _, expected = torch.func.jvp(values, (weights,), (along,))
        with forward_ad.dual_level():
            for sign in (1, -1):
                moved = {k: forward_ad.make_dual(v, sign * along[k]) for k, v in weights.items()}
                found = forward_ad.unpack_dual(values(moved)).tangent
                torch.testing.assert_close(found, sign * expected)
            assert forward_ad.unpack_dual(transform(x)).tangent is None
    torch.testing.assert_close(transform(x), plain)
    along = torch.randn(5, 2)
    _, expected = torch.func.jvp(transform, (x,), (along,))
    with forward_ad.dual_level():
        tangent = torch.zeros(5, 2)
        dual = forward_ad.make_dual(x, tangent)
        transform(dual)
        tangent.copy_(along)  # as gradcheck does, number by number
        found = forward_ad.unpack_dual(transform(dual)).tangent
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
def test_second_trace_does_not_bake_in_the_first():
    d = prior(support="positive", steps=2)  # compiling takes as long as there are steps
    x = d.sample((5,))

    def loss():
        pyro.module("flow", d.transform)
        return d.log_prob(x).sum()

    first = pyro.ops.jit.trace(loss, ignore_warnings=True)
    second = pyro.ops.jit.trace(loss, ignore_warnings=True)
    before = first()
    torch.testing.assert_close(second(), before)
    edit(d, under_no_grad)
    now = fresh(d).log_prob(x.clone()).sum()
    assert (now - before).abs() > 1e-3
    for compiled in (first, second):
        value = compiled()
        torch.testing.assert_close(value, now)
        torch.testing.assert_close(
            gradients(d.transform, value), gradients(d.transform, d.log_prob(x).sum())
        )


@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_second_trace_with_the_same_example_takes_other_values():
    d = prior(support="simplex", steps=2).freeze()
    example, x = d.sample((5,)), d.sample((5,))
    expected = fresh(d).log_prob(x.clone())
    for _ in range(2):
        traced = torch.jit.trace(d.log_prob, (example,), check_trace=False)
        torch.testing.assert_close(traced(x), expected)


# Memory


@dataclass
class Watched:
    """A solver that remembers, weakly, the states it returned."""

    inner: FixedGrid = FixedGrid(steps=4)
    states: list = field(default_factory=list, compare=False)

    def grid(self):
        return self.inner.grid()

    def solve(self, field, x, times):
        found = self.inner.solve(field, x, times)
        self.states.append(weakref.ref(found))
        return found

    def alive(self):
        return sum(state() is not None for state in self.states)


def watched(*, frozen=False):
    return FLOWS["two"](2, solver=Watched()).requires_grad_(not frozen)


@pytest.mark.parametrize(("frozen", "backward"), [(True, False), (False, False), (False, True)])
def test_states_die_after_five_newer_entries_and_with_clear_cache(frozen, backward):
    transform = watched(frozen=frozen)
    kept = [torch.randn(5, 2).requires_grad_(backward) for _ in range(12)]
    for i, x in enumerate(kept):
        y = transform(x)
        value = transform.log_abs_det_jacobian(x, y).sum()
        if backward:
            value.backward()
        del y, value
        if i == 5:
            assert transform.solver.states[0]() is None
        assert transform.solver.alive() <= 5
    transform(kept[0])
    assert transform.solver.alive() >= 1
    transform.clear_cache()
    assert transform.solver.alive() == 0


def test_training_steps_do_not_accumulate():
    transform = watched()
    d = InterpolantDistribution(transform, support=constraints.simplex)
    optimizer = torch.optim.Adam(transform.parameters(), lr=1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        x, log_prob = d.rsample_and_log_prob((5,))
        (log_prob.mean() + x.square().mean()).backward()
        optimizer.step()
        del x, log_prob
        assert transform.solver.alive() <= 4


# Copies


def transform_used(kind):
    transform = flow(kind, steps=2)
    y = transform(torch.randn(5, 2).requires_grad_())
    transform.log_abs_det_jacobian(torch.randn(5, 2), y)
    transform.inv(torch.randn(5, 2))
    return transform


def view_used(kind):
    view = flow(kind, steps=2, context_dim=3).condition(torch.randn(5, 3))
    view.inv(view(torch.randn(5, 2).requires_grad_()))
    return view


def distribution_used(kind):
    d = prior(kind, steps=2, support="positive").expand((5,))
    d.rsample_and_log_prob((5,))
    d.log_prob(d.sample((5,)))
    return d


def composition_used(kind):
    chain = dist.transforms.ComposeTransformModule([transform_used(kind)] * 2, cache_size=1)
    chain.log_abs_det_jacobian(torch.randn(5, 2), chain(torch.randn(5, 2)))
    return chain


USED = {
    "transform": transform_used,
    "inverse": lambda kind: transform_used(kind).inv,
    "at": lambda kind: transform_used(kind).at(0.4),
    "view": view_used,
    "inverse view": lambda kind: view_used(kind).inv,
    "composition": composition_used,
    "distribution": distribution_used,
    "given": lambda kind: InterpolantDistribution(view_used(kind)),
}


@pytest.mark.parametrize("what", USED)
def test_copies_after_use(what):
    """Each way of copying, of networks in turn."""
    for i, (name, way) in enumerate(EVERY_COPY.items(), list(USED).index(what)):
        original, x = USED[what](["two", "three", "own"][i % 3]), torch.rand(5, 2)

        def evaluate(holder, x=x):
            return holder.log_prob(x) if hasattr(holder, "log_prob") else holder(x)

        before = evaluate(original)
        twin = way(original)
        assert twin is not original
        assert type(twin) is type(original)
        value = evaluate(twin)
        torch.testing.assert_close(value, before, rtol=0, atol=0, msg=name)
        assert value.requires_grad
        value.sum().backward()
        torch.testing.assert_close(evaluate(original), before, rtol=0, atol=0, msg=name)


def test_copied_weights_are_apart_but_one_copy_is_whole():
    original = transform_used("two")
    twin = copy.deepcopy(original)
    ours, theirs = set(original.parameters()), set(twin.parameters())
    assert not ours & theirs
    assert twin.owns_flow()
    assert twin.flow is not original.flow
    assert twin.inv.inv is twin
    assert original == original
    assert original != twin
    assert len({original, twin, original.at(0.5), original}) == 3
    # A view and its family stay together in one copy, and part from the original.
    family = flow("own", context_dim=3)
    view = family.condition(torch.randn(3))
    both = copy.deepcopy({"family": family, "view": view})
    assert both["view"].flow is both["family"].flow
    assert not list(both["view"].parameters())
    for p in both["family"].parameters():
        p.data.add_(0.1)
    x = torch.randn(5, 2)
    assert (both["view"](x) - view(x)).abs().max() > 1e-3


# Choices


def test_choices_that_are_equal_share_an_entry():
    transform = FLOWS["two"](2, solver=CountingSolver())
    d = InterpolantDistribution(transform).freeze()
    x = d.sample((5,))
    transform.divergence = ExactDivergence()  # another object, the same choice
    d.log_prob(x)
    assert transform.solver.solves == 1
    transform.solver = CountingSolver(FixedGrid(steps=5))
    d.log_prob(x)
    assert transform.solver.solves == 1


def test_a_pair_of_strangers_is_solved_from_its_input():
    """A pair that no solve joined: the log-determinant is that at x."""
    transform = flow()
    x, y = torch.randn(5, 2), torch.randn(5, 2)
    transform(x)
    transform.inv(y)
    expected = transform.log_abs_det_jacobian(x, transform(x))
    torch.testing.assert_close(transform.log_abs_det_jacobian(x, y), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_weights_are_not_copied_and_every_change_of_them_is_seen(dtype):
    """A network of images has as much memory as there is; edits of ``.data`` move no version."""
    d = InterpolantDistribution(interpolant_transform(2, (300, 300)).to(dtype)).freeze()
    d.transform.solver = FixedGrid(steps=2)
    weight = d.transform.velocity.layers[1].weight  # 90,000 numbers
    d.transform.velocity.output.weight.normal_()
    x = torch.randn(3, 2, dtype=dtype)

    def change(function):
        """Return how much log_prob changes with the weight, which is then as before."""
        d.clear_cache()
        before, old = d.log_prob(x), weight.data.clone()
        kept = d.transform._cache._entries[-1].snapshot
        assert sum(part.numel() for part in kept) < sum(
            p.numel() for p in d.transform.parameters()
        )
        weight.data.copy_(function(weight.data))
        after = d.log_prob(x)
        d.clear_cache()
        assert torch.equal(d.log_prob(x), after)
        weight.data.copy_(old)
        return float((after - before).abs().max())

    one = torch.zeros_like(weight.data)
    one[299, 299] = 1.0
    assert change(lambda w: w) == 0
    assert change(lambda w: w + one) > 1e-6
    assert change(lambda w: w.flip(0)) > 1e-6
    assert change(lambda w: w.T.clone()) > 1e-6
    assert change(lambda w: -w) > 1e-6


MOVING = {
    "half line": lambda low, high: constraints.greater_than(low),
    "half open": constraints.half_open_interval,
    "one bound": lambda low, high: constraints.interval(low, 9.0),
    "stack": lambda low, high: constraints.stack(
        [constraints.interval(low[0], high[0]), constraints.interval(1.0, high[1])], -1
    ),
}


def test_bounds_that_move_are_seen():
    transform, y = interpolant_transform(2, (8,)), torch.tensor([[3.0, 4.0]])
    for name, support in MOVING.items():
        low, high = torch.zeros(2), torch.full((2,), 5.0)
        d = InterpolantDistribution(transform, support=support(low, high))
        with torch.no_grad():
            before = d.log_prob(y)
            low.add_(2.0)
            high.add_(3.0)
            after = d.log_prob(y)
            anew = InterpolantDistribution(transform, support=support(low, high))
            torch.testing.assert_close(after, anew.log_prob(y.clone()), msg=name)
        assert bool(after != before), name


def test_bounds_have_gradients_where_the_flow_was_made_or_used_without():
    high, y = torch.tensor([5.0, 6.0], requires_grad=True), torch.tensor([[3.0, 4.0]])
    support, transform = constraints.interval(torch.zeros(2), high), interpolant_transform(2, (8,))
    with torch.no_grad():
        blind = InterpolantDistribution(transform, support=support)
        used = InterpolantDistribution(transform, support=support).freeze()
        used.log_prob(y)
    plain = InterpolantDistribution(transform, support=support)
    expected = torch.autograd.grad(plain.log_prob(y.clone()).sum(), high)[0]
    for d in (blind, used):
        torch.testing.assert_close(torch.autograd.grad(d.log_prob(y).sum(), high)[0], expected)


def test_what_is_returned_may_be_changed_in_place():
    transform = interpolant_transform(2, (8,))
    transform.flow.whitening.set(torch.zeros(2), 2 * torch.eye(2))
    d = InterpolantDistribution(transform).freeze()
    x = d.sample((3,))
    expected = d.log_prob(x.clone())
    _, log_det = transform.inverse_and_log_det(x)
    log_det.mul_(0.0)
    torch.testing.assert_close(d.log_prob(x), expected)
    at_base = d.at(0.0).transform  # whose log-determinant is that of the whitening
    w = torch.zeros(1, 2)
    at_base.log_abs_det_jacobian(w, at_base(w)).add_(3.0)
    torch.testing.assert_close(d.log_prob(x.clone()), expected)
