"""Many values of a flow in one dimension: by a spline through a few that are solved for."""

import pytest
import torch
from cases import random_flow

from pyro_interpolant import ConditionalInterpolantDistribution, FixedGrid, InterpolantDistribution
from pyro_interpolant.transforms import monotone


def two_modes(context_dim=0, scale=1.0):
    """A flow with two modes, 10 standard deviations of either apart, the left one heavier."""
    torch.manual_seed(0)
    flow = random_flow(1, (16, 16), context_dim=context_dim, solver=FixedGrid(24))
    velocity = flow.velocity

    class Parting(torch.nn.Module):
        event_dim, classes = 1, 0

        def __init__(self):
            super().__init__()
            self.inner, self.context_dim = velocity, context_dim

        def forward(self, t, x, context=None):
            at = 0.3 if context is None else context[..., :1]
            return 1.5 * torch.tanh(12 * (x - 0.2 * at)) - x

    kind = type(flow)
    flow = kind(Parting(), solver=FixedGrid(24))
    flow.flow.whitening.set(torch.zeros(1), torch.tensor([[scale]]))
    return flow


@pytest.fixture
def own(monkeypatch):
    """Return the values of a function when each is solved for."""

    def solved(function):
        with monkeypatch.context() as patch:
            patch.setattr(monotone, "_MIN_CELLS", 10**9)
            return function()

    return solved


@pytest.mark.parametrize("scale", [1.0, -2.0])
def test_quantiles_of_many_are_those_of_each(own, scale):
    d = InterpolantDistribution(two_modes(scale=scale)).freeze()
    q = torch.rand(1500).clamp(1e-5, 1 - 1e-5)
    x = d.icdf(q)
    alone = own(lambda: d.icdf(q))
    assert not torch.equal(x, alone)
    assert float((d.cdf(x) - d.cdf(alone)).abs().max()) < 1e-4
    assert torch.equal(x[:, 0].argsort(), q.argsort())


def test_draws_given_contexts_are_those_of_each(own):
    d = ConditionalInterpolantDistribution(two_modes(1)).freeze()
    view = d.condition(torch.tensor([[[-1.0], [0.0], [0.5]], [[1.0], [2.0], [-2.0]]]))

    def draw():
        torch.manual_seed(1)
        return view.sample((1100,))

    x, alone = draw(), own(draw)
    assert x.shape == (1100, 2, 3, 1)
    assert not torch.equal(x, alone)
    assert float((view.cdf(x) - view.cdf(alone)).abs().max()) < 1e-4
    torch.manual_seed(1)
    assert torch.equal(view.rsample((1100,)), alone)


def test_with_gradients_each_is_solved_for(own):
    d = ConditionalInterpolantDistribution(two_modes(1)).freeze()
    c = torch.zeros(1, requires_grad=True)
    q = torch.rand(1100)
    x = d.condition(c).icdf(q)
    assert torch.equal(x.detach(), own(lambda: d.condition(c.detach()).icdf(q)))
    x.sum().backward()
    assert float(c.grad) != 0


def test_values_that_are_all_alike_are_solved_for(own):
    d = InterpolantDistribution(two_modes()).freeze()
    q = torch.full((2000,), 0.3)
    torch.testing.assert_close(d.icdf(q), own(lambda: d.icdf(q)), rtol=0, atol=0)
