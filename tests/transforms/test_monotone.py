"""Many values of a flow in one dimension: by a spline through a few that are solved for."""

import pytest
import torch
from cases import random_flow
from pyro.distributions import constraints
from pyro.ops.provenance import track_provenance

from pyro_interpolant import ConditionalInterpolantDistribution, FixedGrid, InterpolantDistribution
from pyro_interpolant.transforms import monotone

SHAPES = {  # velocities at x, of which the context moves the place a
    "smooth": lambda x, a: torch.sin(x - a),
    "two modes": lambda x, a: 1.5 * torch.tanh(12 * (x - 0.2 * a)) - x,  # 10 sd of either apart
    "heavy tails": lambda x, a: (x - a) ** 3 / (1 + (x - a) ** 2),
    "near-discrete": lambda x, a: 0.3 * torch.sin(24 * (x - a)),
}


class Shaped(torch.nn.Module):
    """A velocity of a given shape, which counts the rows that it is evaluated at."""

    event_dim, classes = 1, 0

    def __init__(self, shape, context_dim):
        super().__init__()
        self.shape, self.context_dim, self.rows = SHAPES[shape], context_dim, 0
        self.strength = torch.nn.Parameter(torch.ones(()))

    def forward(self, t, x, context=None):
        self.rows += x.numel()
        at = 0.3 if context is None else context[..., :1]
        return self.strength * self.shape(x, at)


def shaped(shape="two modes", context_dim=0, scale=1.0):
    """A flow along a velocity of a given shape, trained for nothing."""
    kind = type(random_flow(1, (8,), context_dim=context_dim))
    flow = kind(Shaped(shape, context_dim), solver=FixedGrid(24)).to(torch.get_default_dtype())
    flow.flow.whitening.set(torch.zeros(1), torch.tensor([[scale]]))
    return flow


def given(shape, context, **options):
    """A frozen distribution of scalars given contexts, shape ``(*, 1)``."""
    family = ConditionalInterpolantDistribution(shaped(shape, 1), event_shape=(), **options)
    return family.freeze().condition(context)


def error(distribution, x, alone):
    """The largest differences of probabilities and of their log-odds."""
    p, q = (distribution.cdf(value).double() for value in (x, alone))
    return float((p - q).abs().max()), float((p.logit() - q.logit()).abs().max())


@pytest.fixture
def own(monkeypatch):
    """Return the values of a function when each is solved for."""

    def solved(function):
        with monkeypatch.context() as patch:
            patch.setattr(monotone, "_MIN_VALUES", 10**9)
            return function()

    return solved


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ("smooth", torch.float32),
        ("two modes", torch.float64),
        ("heavy tails", torch.float64),
        ("near-discrete", torch.float32),
    ],
)
def test_quantiles_given_contexts_are_those_of_each(own, shape, dtype):
    torch.set_default_dtype(dtype)
    d = given(shape, torch.tensor([[-1.0], [0.0], [0.5], [2.0]]))
    for q in (torch.linspace(0.001, 0.999, 200)[:, None].expand(200, 4), torch.rand(200, 4)):
        x, alone = d.icdf(q), own(lambda q=q: d.icdf(q))
        assert x.shape == (200, 4)
        assert not torch.equal(x, alone) or shape == "near-discrete"
        probability, odds = error(d, x, alone)
        assert probability < 1e-4
        assert odds < 1e-3
        assert (x.gather(0, q.argsort(0)).diff(dim=0) >= 0).all()


SUPPORTS = {"bounded": constraints.interval(-1.0, 3.0), "decreasing": constraints.less_than(2.0)}


def test_quantiles_on_a_support_are_those_of_each(own):
    d = given("two modes", torch.tensor([[-1.0], [0.5]]), support=constraints.less_than(2.0))
    q = torch.linspace(0.001, 0.999, 200)[:, None].expand(200, 2)
    x, alone = d.icdf(q), own(lambda: d.icdf(q))
    assert not torch.equal(x, alone)
    assert max(error(d, x, alone)) < 1e-3
    assert float((d.cdf(x) - q).abs().max()) < 1e-3
    assert (x.diff(dim=0) > 0).all()


@pytest.mark.parametrize(
    ("shape", "share"),
    [("smooth", 0.4), pytest.param("two modes", 0.6, marks=pytest.mark.slow)],
)
def test_a_spline_takes_few_evaluations_of_the_network(own, shape, share):
    d = given(shape, torch.linspace(-1, 1, 50)[:, None])
    velocity = d.transform.velocity
    q = torch.linspace(0.005, 0.995, 200)[:, None].expand(200, 50)

    def rows():
        velocity.rows = 0
        d.icdf(q)
        return velocity.rows

    assert rows() < share * own(rows)


def test_quantiles_of_very_many_are_those_of_each(own):
    d = InterpolantDistribution(shaped(scale=-2.0)).freeze()
    q = torch.rand(5000).clamp(1e-5, 1 - 1e-5)
    x = d.icdf(q)
    alone = own(lambda: d.icdf(q))
    assert not torch.equal(x, alone)
    assert max(error(d, x, alone)) < 1e-3
    assert torch.equal(x[:, 0].argsort(), q.argsort())


def test_far_tails_are_as_good_in_proportion(own):
    d = given("heavy tails", torch.tensor([[0.0], [1.0]]))
    q = torch.special.ndtr(torch.linspace(-6, 3, 200))[:, None].expand(200, 2)
    x, alone = d.icdf(q), own(lambda: d.icdf(q))
    assert not torch.equal(x, alone)
    torch.testing.assert_close(d.cdf(x), d.cdf(alone), rtol=1e-3, atol=0)


def test_derivatives_are_those_of_each_value(own):
    family = ConditionalInterpolantDistribution(shaped("two modes", 1))
    family.transform.trains_weights = False  # the nodes of the solver, not random ones
    c = torch.tensor([[-1.0], [0.5]], requires_grad=True)
    q = torch.linspace(0.01, 0.99, 200)[:, None].expand(200, 2).clone().requires_grad_()
    sources = (q, c, family.transform.velocity.strength)

    def derivatives():
        view = family.condition(c)
        view.transform.trains_weights = False
        x = view.icdf(q)
        return x.detach(), torch.autograd.grad(x.square().sum(), sources)

    (x, found), (alone, expected) = derivatives(), own(derivatives)
    assert torch.equal(x, alone)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert other.abs().sum() > 0
    with torch.no_grad():
        assert max(error(family.condition(c), family.condition(c).icdf(q), x)) < 1e-3


def test_values_that_are_all_alike_are_solved_for(own):
    d = given("two modes", torch.tensor([[0.0], [0.5]]))
    q = torch.full((200, 2), 0.3)
    q[:, 1] = torch.linspace(0.1, 0.9, 200)  # beside others that are not
    x, alone = d.icdf(q), own(lambda: d.icdf(q))
    torch.testing.assert_close(x[:, 0], alone[:, 0], rtol=0, atol=1e-14)
    assert not torch.equal(x[:, 1], alone[:, 1])


def test_numbers_that_a_short_type_does_not_tell_apart_are_solved_for(own):
    torch.set_default_dtype(torch.float32)
    flow = shaped("smooth")
    flow.flow.whitening.set(torch.tensor([1e6]), torch.eye(1))  # 16 numbers a unit
    d = InterpolantDistribution(flow).freeze()
    q = torch.linspace(0.01, 0.99, 400)
    x, alone = d.icdf(q), own(lambda: d.icdf(q))
    assert float((x - alone).abs().max()) <= 2 / 16
    assert (x.diff(dim=0) >= 0).all()


def test_contexts_whose_origin_pyro_tracks():
    """As in ``render_model``; slices of their shape are plain tuples."""
    shape = (2, 1)
    flow = random_flow(1, (8,), context_dim=1, solver=FixedGrid(2))
    context = track_provenance(torch.randn(shape), frozenset({"a"}))
    given = ConditionalInterpolantDistribution(flow).freeze().condition(context)
    assert tuple(given.sample((300,)).shape) == (300, *shape)
