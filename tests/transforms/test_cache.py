"""The cache: no stale value, no lost gradient, no freed graph, no leak, nothing uncopyable."""

import copy
import gc
import weakref
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import COPIES, FLOWS, CountingSolver, slow_but, through_torch
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

KINDS = sorted(FLOWS)
CLOSE = 2e-6  # between the two directions of a solve
every_kind = pytest.mark.parametrize("kind", slow_but(KINDS, "two"))
SUPPORTS = {
    "real": constraints.real_vector,
    "positive": constraints.positive,
    "simplex": constraints.simplex,
}
every_support = pytest.mark.parametrize("support", sorted(SUPPORTS))


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


def adam(distribution, **options):
    optimizer = torch.optim.Adam(distribution.transform.parameters(), lr=0.1, **options)
    x = torch.rand(3, *distribution.event_shape)
    x = x / x.sum(-1, keepdim=True) if distribution.event_shape == (3,) else x
    (-distribution.log_prob(x).sum()).backward()
    optimizer.step()


def edit(distribution, how):
    for p in distribution.transform.parameters():
        how(p)


def under_no_grad(p):
    with torch.no_grad():
        p.add_(0.1)


def moved_weights(distribution):
    other = copy.deepcopy(distribution.transform)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.1)
    return other.state_dict()


def replace_parameter(distribution):
    layer = next(m for m in distribution.transform.modules() if isinstance(m, torch.nn.Linear))
    layer.weight = torch.nn.Parameter(layer.weight.detach() + 0.3)


def set_buffer(distribution):
    transform = distribution.transform
    transform.flow.whitening.set(transform.flow.loc + 0.1, transform.flow.whitening.matrix())


def set_buffer_data(distribution):
    distribution.transform.flow.loc.data.add_(0.1)


def set_gate(distribution):
    velocity = distribution.transform.velocity
    if not hasattr(velocity, "reach"):
        pytest.skip("a velocity without a gate")
    velocity.reach.fill_(1.0)


def set_solver(distribution):
    distribution.transform.solver = FixedGrid(steps=2, method="euler")


def set_divergence(distribution):
    distribution.transform.divergence = HutchinsonDivergence(probes=1, seed=3)


def to_half_and_back(distribution):
    distribution.to(torch.float16)
    distribution.to(torch.float64)


def transform_to_half_and_back(distribution):
    distribution.transform.half()
    distribution.transform.double()


def vector(distribution):
    weights = list(distribution.transform.parameters())
    flat = torch.nn.utils.parameters_to_vector(weights)
    torch.nn.utils.vector_to_parameters(flat.detach() + 0.1, weights)


CHANGES = {
    "adam": adam,
    "fused_adam": lambda d: adam(d, fused=True),
    "foreach_adam": lambda d: adam(d, foreach=True),
    "no_grad": lambda d: edit(d, under_no_grad),
    "data_in_place": lambda d: edit(d, lambda p: p.data.add_(0.1)),
    "data_assigned": lambda d: edit(d, lambda p: setattr(p, "data", p.data + 0.1)),
    "numpy": lambda d: edit(d, lambda p: p.detach().numpy().__iadd__(0.1)),
    "vector": vector,
    "replaced_parameter": replace_parameter,
    "load_state_dict": lambda d: d.transform.load_state_dict(moved_weights(d)),
    "load_state_dict_assign": lambda d: d.transform.load_state_dict(moved_weights(d), assign=True),
    "precondition": set_buffer,
    "buffer_data": set_buffer_data,
    "gate": set_gate,
    "solver": set_solver,
    "divergence": set_divergence,
    "half_and_back": to_half_and_back,
    "transform_half_and_back": transform_to_half_and_back,
}
MODES = {
    "grad": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


QUICK = {  # others are among those under a support
    ("two", "grad"): ("foreach_adam", "gate", "replaced_parameter", "transform_half_and_back"),
    ("own", "inference"): ("no_grad", "data_assigned", "numpy", "vector", "load_state_dict")
    + ("buffer_data", "solver", "divergence"),
}


def changes():
    """Changes, kinds and modes: one of each sort of change is quick."""
    modes = [*((k, "grad") for k in KINDS), ("two", "no_grad"), ("own", "inference")]
    for change in sorted(CHANGES):
        for case in modes:
            quick = change in QUICK.get(case, ())
            yield pytest.param(change, *case, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("change", "kind", "mode"), list(changes()))
def test_nothing_stale_after(change, kind, mode):
    d = prior(kind)
    transform = d.transform
    drawn, w = d.sample((5,)), torch.randn(5, 2)
    with MODES[mode]():
        sampled = d.rsample((5,))

        def everything():
            y, x = transform(w), transform.inv(drawn)
            return [
                y,
                x,
                transform.log_abs_det_jacobian(w, y),
                transform.log_abs_det_jacobian(x, drawn),
                d.log_prob(drawn),
                d.log_prob(sampled),
            ]

        before = everything()
        before = everything()  # from the cache where possible
    CHANGES[change](d)
    reference = fresh(d)
    with MODES[mode]():
        after = everything()
        y, x = reference.transform(w), reference.transform.inv(drawn)
        expected = [
            y,
            x,
            reference.transform.log_abs_det_jacobian(w, y),
            reference.transform.log_abs_det_jacobian(x, drawn),
            reference.log_prob(drawn),
            reference.log_prob(sampled.detach().clone()),
        ]
    for old, now, true in zip(before, after, expected, strict=True):
        assert now.requires_grad is (mode == "grad")
        torch.testing.assert_close(now, true, rtol=0, atol=CLOSE)
        if change == "divergence" and now.shape == w.shape:
            continue
        if change in ("precondition", "buffer_data") and old.dim() == 1:
            continue  # a moved centre leaves log-determinants of fixed w alone
        assert (now - old).abs().max() > 5 * CLOSE, "the change changed nothing"


@every_support
@pytest.mark.parametrize("change", ["fused_adam", "data_in_place", "precondition", "solver"])
def test_nothing_stale_under_a_support(change, support):
    d = prior(support=support)
    for x in (d.rsample((5,)), d.sample((5,))):
        d.log_prob(x)
        before = d.log_prob(x)
        CHANGES[change](d)
        now = d.log_prob(x)
        expected = fresh(d).log_prob(x.detach().clone())
        torch.testing.assert_close(now, expected, rtol=1e-12, atol=1e-5)  # some are 1e12
        assert (now - before).abs().max() > 1e-4
        d.transform.solver = FixedGrid(steps=8)


@pytest.mark.parametrize("change", ["fused_adam", "data_in_place", "precondition"])
@every_kind
def test_views_see_the_weights_of_their_flow(change, kind):
    family = flow(kind, context_dim=3)
    context = torch.randn(5, 3)
    view, later = family.condition(context), family.condition(context).at(0.6)
    x = torch.randn(5, 2)
    for t in (view, later):
        before = t(x).detach()
        holder = InterpolantDistribution(t)
        if change == "fused_adam":
            optimizer = torch.optim.Adam(family.parameters(), lr=0.1, fused=True)
            (-holder.log_prob(before).sum()).backward()
            optimizer.step()
        elif change == "data_in_place":
            for p in family.parameters():
                p.data.add_(0.1)
        else:
            family.flow.whitening.set(family.flow.loc + 0.1, family.flow.whitening.linear)
        now = t(x)
        end = 1.0 if t is view else 0.6
        torch.testing.assert_close(now, family.condition(context).at(end)(x))
        assert (now - before).abs().max() > 1e-3


@every_kind
def test_context_edited_in_place(kind):
    family = flow(kind, context_dim=3)
    context, x = torch.randn(5, 3), torch.randn(5, 2)
    view = family.condition(context)
    for change in (lambda: context.add_(1.0), lambda: context.data.mul_(2.0)):
        with torch.no_grad():
            before = view(x)
            change()
            now = view(x)
        torch.testing.assert_close(now, family.condition(context.clone())(x))
        assert (now - before).abs().max() > 1e-3


IN_PLACE = {
    "add_": lambda s: s.add_(0.5),
    "index": lambda s: s.__setitem__(0, 0.25),
    "copy_": lambda s: s.copy_(torch.full_like(s, 0.25)),
    "row_view": lambda s: s[1].fill_(0.25),
}


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("how", sorted(IN_PLACE))
@every_support
def test_observation_edited_in_place(how, mode, support):
    d = prior(support=support)
    if mode == "inference":
        d.freeze()
    with MODES[mode]():
        x = d.sample((4,))
        before = d.log_prob(x).detach()
        IN_PLACE[how](x)
        if support == "simplex":
            x.div_(x.sum(-1, keepdim=True))
        now = d.log_prob(x).detach()
    torch.testing.assert_close(now, fresh(d).log_prob(x.clone()).detach())
    assert (now - before).abs().max() > 1e-6


@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("how", sorted(IN_PLACE))
@every_kind
def test_pair_edited_in_place(how, mode, kind):
    """Neither side of a pair is found again once it has been changed."""
    transform = flow(kind)
    reference = copy.deepcopy(transform)
    if mode != "grad":
        transform.requires_grad_(requires_grad=False)
    with MODES[mode]():
        x = torch.randn(4, 2)
        y = transform(x).detach() if mode == "grad" else transform(x)
        transform.log_abs_det_jacobian(x, y)
        IN_PLACE[how](x)
        moved = transform(x)
        torch.testing.assert_close(moved, reference(x.clone()))
        assert (moved - y).abs().max() > 1e-6
        torch.testing.assert_close(
            transform.log_abs_det_jacobian(x, moved),
            reference.log_abs_det_jacobian(x.clone(), moved.clone()),
        )
        back = transform.inv(y)
        IN_PLACE[how](y)
        torch.testing.assert_close(transform.inv(y), reference.inv(y.clone()))
        assert (transform.inv(y) - back).abs().max() > 1e-6


@pytest.mark.parametrize("frozen", [True, False])
@every_support
def test_observation_refilled_through_its_memory(support, frozen):
    """A buffer shared with numpy, or edited by .data, changes without a new version."""
    d = prior(support=support)
    if frozen:
        d.freeze()
    buffer = d.sample((4,)).numpy().copy()
    other = d.sample((4,))
    x = torch.from_numpy(buffer)
    with torch.no_grad():
        before = d.log_prob(x)
        buffer[...] = other.numpy()
        now = d.log_prob(x)
        torch.testing.assert_close(now, d.log_prob(other.clone()))
        assert (now - before).abs().max() > 1e-6
        x.data.copy_(d.sample((4,)))
        torch.testing.assert_close(d.log_prob(x), d.log_prob(x.clone()))


def test_dtype_changed_raises_rather_than_giving_the_old_value():
    d = prior()
    x = d.sample((4,))
    d.log_prob(x)
    d.to(torch.float32)
    with pytest.raises(ValueError, match="expected torch.float32"):
        d.log_prob(x)
    assert d.log_prob(x.float()).dtype == torch.float32
    assert d.sample().dtype == torch.float32


def test_a_mutated_copy_leaves_the_original_alone():
    d = prior()
    x = d.sample((4,))
    before = d.log_prob(x).detach()
    other = copy.deepcopy(d)
    edit(other, under_no_grad)
    torch.testing.assert_close(d.log_prob(x).detach(), before, rtol=0, atol=0)
    assert (other.log_prob(x) - before).abs().max() > 1e-3


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
    "tensor_in_place": lambda v: v.vector.mul_(2.0),
    "tensor_data": lambda v: v.vector.data.mul_(2.0),
    "array": lambda v: np.multiply(v.array, 2.0, out=v.array),
    "list": lambda v: v.options["scales"].__setitem__(1, 2.0),
    "tensor_in_a_list": lambda v: v.options["scales"][0].mul_(2.0),
    "function": lambda v: v.options.update(function=torch.sin),
    "part": lambda v: v.layers.__setitem__(1, torch.nn.SiLU()),
    "hook": lambda v: v.layers[0].register_forward_hook(lambda module, x, out: 2 * out),
    "pre_hook": lambda v: v.register_forward_pre_hook(
        lambda module, given: (given[0], 0 * given[1])
    ),
    "mode": lambda v: v.train(),
    "mode_of_a_part": lambda v: v.layers[2].train(),
}


@pytest.mark.parametrize("change", sorted(ATTRIBUTES))
def test_attributes_modes_and_hooks_of_a_network_are_seen(change):
    transform = InterpolantTransform(Scaled().eval(), 2, solver=CountingSolver())
    x, solver = torch.randn(5, 2), transform.solver
    with torch.no_grad():
        before = transform(x)
        assert transform(x) is before
        assert transform.inv(before) is x
        ATTRIBUTES[change](transform.velocity)
        after = transform(x)
        assert transform(x) is after
        assert solver.solves == 2
        assert (after - before).abs().max() > 1e-3
        if "mode" not in change:
            assert torch.equal(copy.deepcopy(transform)(x), after)


@pytest.mark.parametrize("support", ["real", "positive"])
def test_autocast_then_not(support):
    d = prior(support=support).freeze().to(torch.float32)
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
    **SUPPORTS,
    "corr_cholesky": constraints.corr_cholesky,
    "gaussianized": Gaussianized(
        constraints.real_vector,
        MarginalTransform(*with_slopes(*torch.tensor([[[-3.0, 0, 3]] * 2, [[-4.0, 0, 1]] * 2]))),
    ),
}


@pytest.mark.parametrize("support", sorted(GRADED))
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


@every_support
@every_kind
def test_sample_then_log_prob_gives_gradients_of_the_weights(kind, support):
    d = prior(kind, support=support)
    z = d.sample((5,))
    value = d.log_prob(z).sum()
    other = fresh(d)
    expected = gradients(other.transform, other.log_prob(z.clone()).sum())
    torch.testing.assert_close(gradients(d.transform, value), expected)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("frozen", [True, False])
@every_support
@every_kind
def test_requires_grad_after_the_first_log_prob(kind, support, frozen):
    d = prior(kind, support=support)
    if frozen:
        d.freeze()
    z = d.sample((5,))
    before = d.log_prob(z)
    z.requires_grad_()
    value = d.log_prob(z)
    torch.testing.assert_close(value, before, rtol=0, atol=1e-5)
    (gradient,) = torch.autograd.grad(value.sum(), z)
    leaf = z.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(fresh(d).log_prob(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, expected)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("frozen", [True, False])
@every_kind
def test_input_requires_grad_after_the_first_call(kind, frozen):
    transform = flow(kind)
    transform.requires_grad_(not frozen)
    x = torch.randn(5, 2)
    transform(x)
    x.requires_grad_()
    y = transform(x)
    value = y.sum() + transform.log_abs_det_jacobian(x, y).sum()
    (gradient,) = torch.autograd.grad(value, x)
    other, leaf = copy.deepcopy(transform), x.detach().clone().requires_grad_()
    y = other(leaf)
    expected = y.sum() + other.log_abs_det_jacobian(leaf, y).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0])


@every_support
@every_kind
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


@every_support
@every_kind
def test_two_log_probs_of_one_observation_each_backward(kind, support):
    d = prior(kind, support=support)
    x = d.sample((5,))
    first, second = d.log_prob(x), d.log_prob(x)
    one = gradients(d.transform, first.sum())
    two = gradients(d.transform, second.sum())
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(gradients(d.transform, d.log_prob(x).sum()), one)


@every_kind
def test_two_forward_passes_each_backward(kind):
    transform = flow(kind)
    for x in (torch.randn(5, 2), torch.randn(5, 2).requires_grad_()):
        first, second = transform(x), transform(x)
        one = gradients(transform, first.square().sum())
        two = gradients(transform, second.square().sum())
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("input_requires_grad", [False, True])
@pytest.mark.parametrize("inverse", [False, True])
@every_kind
def test_backward_then_log_abs_det_jacobian(kind, inverse, input_requires_grad):
    transform = flow(kind)
    direction = transform.inv if inverse else transform
    source = torch.randn(5, 2).requires_grad_(input_requires_grad)
    image = direction(source)
    image.square().sum().backward()
    value = direction.log_abs_det_jacobian(source, image)
    other = copy.deepcopy(transform)
    other_direction = other.inv if inverse else other
    leaf = source.detach().clone()
    expected = other_direction.log_abs_det_jacobian(leaf, other_direction(leaf))
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradients(transform, value.sum()), gradients(other, expected.sum()))


@every_kind
def test_log_abs_det_jacobian_twice_each_backward(kind):
    transform = flow(kind)
    x = torch.randn(5, 2)
    y = transform(x)
    one = gradients(transform, transform.log_abs_det_jacobian(x, y).sum())
    two = gradients(transform, transform.log_abs_det_jacobian(x, y.detach()).sum())
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("use", ["rsample", "sample", "observed", "leaf"])
@every_support
@every_kind
def test_backward_again_and_again(kind, support, use):
    d = prior(kind, support=support)
    x = d.sample((5,))
    found = []
    for _ in range(3):
        torch.manual_seed(3)
        if use == "rsample":
            value = sum(s.sum() for s in d.rsample_and_log_prob((5,)))
        elif use == "sample":
            value = d.log_prob(d.sample((5,))).sum()
        else:
            value = d.log_prob(x.requires_grad_(use == "leaf")).sum()
        d.transform.zero_grad()
        value.backward()
        found.append(torch.cat([p.grad.flatten() for p in d.transform.parameters()]))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
    assert found[0].abs().max() > 1e-3


@every_kind
def test_backward_through_a_kept_sample_with_and_without_retaining(kind):
    d = prior(kind)
    x = d.rsample((5,))
    value = d.log_prob(x).sum()
    one = torch.autograd.grad(value, list(d.transform.parameters()), retain_graph=True)
    two = torch.autograd.grad(d.log_prob(x).sum(), list(d.transform.parameters()))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)
    detached = d.log_prob(x.detach())
    detached.sum().backward()  # the graph of x is freed, that of its copy is its own


@every_kind
def test_gradient_of_a_gradient_through_the_cache(kind):
    d = prior(kind).freeze()
    x = d.sample((5,)).requires_grad_()
    for _ in range(2):
        (score,) = torch.autograd.grad(d.log_prob(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(score.square().sum(), x)
        leaf = x.detach().clone().requires_grad_()
        (expected,) = torch.autograd.grad(fresh(d).log_prob(leaf).sum(), leaf, create_graph=True)
        (expected,) = torch.autograd.grad(expected.square().sum(), leaf)
        torch.testing.assert_close(second, expected)


# Modes


@every_support
@every_kind
def test_freeze(kind, support):
    d = prior(kind, support=support)
    x = d.sample((5,))
    assert d.log_prob(x).requires_grad
    assert d.freeze() is d
    assert not d.log_prob(x).requires_grad
    assert not d.rsample().requires_grad
    d.transform.requires_grad_(requires_grad=True)
    assert d.log_prob(x).requires_grad
    d.transform.requires_grad_(requires_grad=False)  # without freeze, which clears the cache
    assert not d.log_prob(x).requires_grad
    gradient = torch.autograd.grad(d.log_prob(x.requires_grad_()).sum(), x)[0]
    assert gradient.abs().max() > 0


@every_support
@every_kind
def test_no_grad_then_grad_then_no_grad(kind, support):
    d = prior(kind, support=support)
    x = d.sample((5,))
    values = []
    for enabled in (False, True, False, True):
        with torch.set_grad_enabled(enabled):
            values.append(d.log_prob(x))
        assert values[-1].requires_grad is enabled
    for value in values:
        torch.testing.assert_close(value.detach(), values[0], rtol=0, atol=1e-5)
    sampled = d.rsample((5,))
    with torch.no_grad():
        assert not d.log_prob(sampled).requires_grad


@every_support
@every_kind
def test_inference_mode_then_not(kind, support):
    d = prior(kind, support=support)
    x = d.sample((5,))
    with torch.inference_mode():
        inside = d.log_prob(x)
        drawn = d.sample((5,))
        scored = d.log_prob(drawn)
    outside = d.log_prob(x)
    assert inside.is_inference()
    assert not outside.is_inference()
    torch.testing.assert_close(inside.clone(), outside.detach())
    assert gradients(d.transform, outside.sum()).abs().max() > 0
    with torch.no_grad():
        torch.testing.assert_close(d.log_prob(drawn.clone()), scored.clone())
    with torch.inference_mode():
        assert d.log_prob(x).is_inference()


@every_kind
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


def test_inference_mode_uses_the_cache():
    transform = FLOWS["two"](2, solver=CountingSolver())
    d = InterpolantDistribution(transform)
    with torch.inference_mode():
        d.log_prob(d.sample((5,)))
    assert transform.solver.solves == 1


# functorch and tracing


@every_kind
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


@every_kind
def test_tangents_of_weights_are_those_of_this_call(kind):
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


@every_kind
def test_tangents_changed_in_place_are_those_of_this_call(kind):
    transform, x, along = flow(kind), torch.randn(5, 2), torch.randn(5, 2)
    transform.requires_grad_(requires_grad=False)
    _, expected = torch.func.jvp(transform, (x,), (along,))
    with forward_ad.dual_level():
        tangent = torch.zeros(5, 2)
        dual = forward_ad.make_dual(x, tangent)
        transform(dual)
        tangent.copy_(along)  # as gradcheck does, number by number
        found = forward_ad.unpack_dual(transform(dual)).tangent
    torch.testing.assert_close(found, expected)


@every_kind
def test_vmap_leaves_nothing_behind(kind):
    d = prior(kind).freeze()
    x = d.sample((5,))
    expected = d.log_prob(x)
    torch.func.vmap(d.log_prob)(x)
    torch.func.vmap(torch.func.grad(d.log_prob))(x)
    torch.testing.assert_close(d.log_prob(x), expected)
    assert not torch._C._functorch.is_functorch_wrapped_tensor(d.log_prob(x))
    copy.deepcopy(d)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.trace")
@every_support
def test_second_trace_does_not_bake_in_the_first(support):
    d = prior(support=support, steps=2)  # compiling takes as long as there are steps
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
@every_support
def test_second_trace_with_the_same_example_takes_other_values(support):
    d = prior(support=support, steps=2).freeze()
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


def watched(kind, frozen):
    transform = FLOWS[kind](2, solver=Watched())
    transform.requires_grad_(not frozen)
    return transform


@pytest.mark.parametrize("frozen", [True, False])
@every_kind
def test_states_die_with_clear_cache(kind, frozen):
    transform = watched(kind, frozen)
    x = torch.randn(5, 2)
    transform(x)
    assert transform.solver.alive() == 1
    transform.clear_cache()
    assert transform.solver.alive() == 0


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("frozen", [pytest.param(True, marks=pytest.mark.slow), False])
@every_kind
def test_states_die_after_five_newer_entries(kind, frozen, backward):
    transform = watched(kind, frozen)
    kept = [torch.randn(5, 2).requires_grad_(backward) for _ in range(30)]
    for i, x in enumerate(kept):
        y = transform(x)
        value = transform.log_abs_det_jacobian(x, y).sum()
        if backward:
            value.backward()
        del y, value
        if i == 5:
            assert transform.solver.states[0]() is None
        assert transform.solver.alive() <= 5
    transform.clear_cache()
    assert transform.solver.alive() == 0


@every_support
def test_a_distribution_forgets_all(support):
    transform = watched("two", frozen=False)
    d = InterpolantDistribution(transform, support=SUPPORTS[support])
    x = d.rsample((5,))
    reference = weakref.ref(x)
    d.log_prob(x)
    del x
    assert reference() is not None
    d.clear_cache()
    assert reference() is None
    assert transform.solver.alive() == 0


@every_support
def test_training_steps_do_not_accumulate(support):
    transform = watched("two", frozen=False)
    d = InterpolantDistribution(transform, support=SUPPORTS[support])
    optimizer = torch.optim.Adam(transform.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        x, log_prob = d.rsample_and_log_prob((5,))
        (log_prob.mean() + x.square().mean()).backward()
        optimizer.step()
        del x, log_prob
        assert transform.solver.alive() <= 4


@pytest.mark.slow
def test_a_transform_is_collected_with_its_cache():
    transform = watched("two", frozen=False)
    solver = transform.solver
    y = transform(torch.randn(5, 2).requires_grad_())
    transform.log_abs_det_jacobian(torch.randn(5, 2), y)
    del transform, y
    gc.collect()
    assert solver.alive() == 0


# Copies


EVERY_COPY = {
    **COPIES,
    "copy": copy.copy,
    "torch": partial(through_torch, protocol=2),  # its default
}


def transform_used(kind):
    transform = flow(kind, steps=2)
    y = transform(torch.randn(5, 2).requires_grad_())
    transform.log_abs_det_jacobian(torch.randn(5, 2), y)
    transform.inv(torch.randn(5, 2))
    return transform


def view_used(kind):
    view = flow(kind, steps=2, context_dim=3).condition(torch.randn(5, 3))
    y = view(torch.randn(5, 2).requires_grad_())
    view.inv(y)
    view.inv(torch.randn(5, 2))
    return view


def distribution_used(d):
    d.rsample_and_log_prob((5,))
    d.log_prob(d.sample((5,)))
    return d


def compose_used(kind):
    chain = dist.transforms.ComposeTransformModule(
        [flow(kind, steps=2), flow(kind, steps=2)], cache_size=1
    )
    chain.log_abs_det_jacobian(torch.randn(5, 2), chain(torch.randn(5, 2)))
    return chain


USED = {
    "transform": (transform_used, lambda t, x: t(x)),
    "inverse": (lambda k: transform_used(k).inv, lambda t, x: t(x)),
    "at": (lambda k: transform_used(k).at(0.4), lambda t, x: t(x)),
    "view": (view_used, lambda t, x: t(x)),
    "inverse_view": (lambda k: view_used(k).inv, lambda t, x: t(x)),
    "composition": (compose_used, lambda t, x: t(x)),
    "family": (
        lambda k: flow(k, steps=2, context_dim=3),
        lambda f, x: f.condition(x[:, [0, 1, 0]])(x),
    ),
    "distribution": (
        lambda k: distribution_used(prior(k, steps=2)),
        lambda d, x: d.log_prob(x),
    ),
    "expanded": (
        lambda k: distribution_used(prior(k, steps=2).expand((5,))),
        lambda d, x: d.log_prob(x),
    ),
    "positive": (
        lambda k: distribution_used(prior(k, steps=2, support="positive")),
        lambda d, x: d.log_prob(x.abs()),
    ),
    "conditioned_distribution": (
        lambda k: distribution_used(InterpolantDistribution(view_used(k))),
        lambda d, x: d.log_prob(x),
    ),
    "conditional_distribution": (
        lambda k: ConditionalInterpolantDistribution(flow(k, steps=2, context_dim=3)),
        lambda d, x: d.condition(x[:, [0, 1, 0]]).log_prob(x),
    ),
}


@pytest.mark.parametrize("how", sorted(EVERY_COPY))
@pytest.mark.parametrize("what", sorted(USED))
@every_kind
def test_copies_after_use(kind, what, how):
    make, evaluate = USED[what]
    original = make(kind)
    x = torch.randn(5, 2)
    before = evaluate(original, x)
    twin = EVERY_COPY[how](original)
    assert twin is not original
    assert type(twin) is type(original)
    value = evaluate(twin, x)
    torch.testing.assert_close(value, before, rtol=0, atol=0)
    assert value.requires_grad
    value.sum().backward()
    torch.testing.assert_close(evaluate(original, x), before, rtol=0, atol=0)


@every_kind
def test_copied_weights_are_apart_but_one_copy_is_whole(kind):
    original = transform_used(kind)
    twin = copy.deepcopy(original)
    ours, theirs = set(original.parameters()), set(twin.parameters())
    assert not ours & theirs
    assert twin.owns_flow()
    assert twin.flow is not original.flow
    assert twin.inv.inv is twin
    # A view and its family stay together in one copy, and part from the original.
    family = flow(kind, context_dim=3)
    view = family.condition(torch.randn(3))
    both = copy.deepcopy({"family": family, "view": view})
    assert both["view"].flow is both["family"].flow
    assert not list(both["view"].parameters())
    for p in both["family"].parameters():
        p.data.add_(0.1)
    x = torch.randn(5, 2)
    assert (both["view"](x) - view(x)).abs().max() > 1e-3


@every_kind
def test_state_dict_is_that_of_the_flow_alone(kind):
    transform = transform_used(kind)
    twin = flow(kind, steps=2)
    twin.load_state_dict(transform.state_dict())
    x = torch.randn(5, 2)
    torch.testing.assert_close(twin(x), transform(x), rtol=0, atol=0)
    assert not flow(kind, context_dim=3).condition(torch.randn(3)).state_dict()


@every_kind
def test_hash_and_sets(kind):
    transform = transform_used(kind)
    view = flow(kind, context_dim=3).condition(torch.randn(3))
    other = transform.at(0.5)
    twin = copy.deepcopy(transform)
    d = prior(kind)
    assert len({transform, view, other, twin, transform, d, d}) == 5
    assert transform == transform
    assert transform != twin
    assert {transform: 1}[transform] == 1


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


def test_a_cache_of_one_transform_is_not_that_of_another():
    one, other = flow(), flow()
    x = torch.randn(5, 2)
    assert (one(x) - other(x)).abs().max() > 1e-3
    assert (one.at(0.5)(x) - one(x)).abs().max() > 1e-3
    y = one(x).detach()
    torch.testing.assert_close(
        other.log_abs_det_jacobian(x, y), copy.deepcopy(other).log_abs_det_jacobian(x, other(x))
    )


def test_a_pair_of_strangers_is_solved_from_its_input():
    """A pair that no solve joined: the log-determinant is that at x."""
    transform = interpolant_transform(2, (8, 8))
    x, y = torch.randn(5, 2), torch.randn(5, 2)
    transform(x)
    transform.inv(y)
    torch.testing.assert_close(
        transform.log_abs_det_jacobian(x, y), transform.log_abs_det_jacobian(x, transform(x))
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_large_weights_are_not_copied_and_every_change_of_them_is_seen(dtype):
    """A network of images has as much memory as there is; edits of ``.data`` move no version."""
    d = InterpolantDistribution(interpolant_transform(2, (300, 300)).to(dtype)).freeze()
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


@pytest.mark.parametrize(
    "support",
    [
        lambda low, high: constraints.greater_than(low),
        constraints.interval,
        constraints.half_open_interval,
        lambda low, high: constraints.interval(low, 9.0),
        lambda low, high: constraints.independent(constraints.interval(low, high), 1),
        lambda low, high: constraints.stack(
            [constraints.interval(low[0], high[0]), constraints.interval(1.0, high[1])], -1
        ),
    ],
    ids=["half line", "interval", "half open", "one bound", "independent", "stack"],
)
def test_bounds_that_move_are_seen(support):
    low = torch.zeros(2, dtype=torch.float64)
    high = torch.full((2,), 5.0, dtype=torch.float64)
    transform = interpolant_transform(2, (8,))
    d = InterpolantDistribution(transform, support=support(low, high))
    y = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    with torch.no_grad():
        before = d.log_prob(y)
        low.add_(2.0)
        high.add_(3.0)
        after = d.log_prob(y)
        torch.testing.assert_close(after, d.log_prob(y.clone()))
        anew = InterpolantDistribution(transform, support=support(low, high))
        torch.testing.assert_close(after, anew.log_prob(y))
    assert bool(after != before)


def test_bounds_of_a_flow_made_without_gradients_have_them():
    high = torch.tensor([5.0, 6.0], dtype=torch.float64, requires_grad=True)
    support = constraints.interval(torch.zeros(2, dtype=torch.float64), high)
    transform = interpolant_transform(2, (8,))
    with torch.no_grad():
        blind = InterpolantDistribution(transform, support=support)
    d = InterpolantDistribution(transform, support=support)
    y = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    found, expected = (torch.autograd.grad(p.log_prob(y).sum(), high)[0] for p in (blind, d))
    torch.testing.assert_close(found, expected)


def test_a_look_without_gradients_leaves_those_of_bounds():
    high = torch.tensor([5.0, 6.0], dtype=torch.float64, requires_grad=True)
    support = constraints.interval(torch.zeros(2, dtype=torch.float64), high)
    d = InterpolantDistribution(interpolant_transform(2, (8,)), support=support).freeze()
    y = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    with torch.no_grad():
        d.log_prob(y)
    found, expected = (torch.autograd.grad(d.log_prob(x).sum(), high)[0] for x in (y, y.clone()))
    torch.testing.assert_close(found, expected)


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
