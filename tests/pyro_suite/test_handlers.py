"""Pyro's effect handlers on models with a learned prior, in data space and around base space.

A handler may be inside of ``base_space``, applied to the model, or outside, applied to what
``base_space`` returns: what it fixes, hides or weighs has to be the same.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import random_flow, random_prior
from pyro import poutine
from pyro.distributions import constraints
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from pyro.poutine.util import prune_subsample_sites

from pyro_interpolant import ConditionalInterpolantDistribution, FixedGrid, base_space

WHERE = {
    "data": lambda model, handler: handler(model),
    "inside": lambda model, handler: base_space(handler(model)),
    "outside": lambda model, handler: handler(base_space(model)),
}
where = pytest.mark.parametrize("where", WHERE)
FINE = FixedGrid(steps=48)  # on which a path out and a path back agree
Y = torch.tensor([0.3, -0.5], dtype=torch.float64)


class Case:
    """A model of a plated latent site z on positive numbers and of data y, and its prior."""

    def __init__(self):
        self.prior = random_prior(2, support=constraints.positive)
        self.prior.transform.solver = FINE

    def __call__(self):
        with pyro.plate("rows", 2):
            z = pyro.sample("z", self.prior)
            pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=Y)
        return z

    def base(self, w):
        """Return z and the density of the base, shape ``(2,)``, at w, shape ``(2, 2)``."""
        z = w
        for transform in self.prior.transforms:
            z = transform(z)
        return z, dist.Normal(0.0, 1.0).log_prob(w).sum(-1)

    def data(self, z):
        """Return the density of the data, shape ``(2,)``."""
        return dist.Normal(z.sum(-1), 1.0).log_prob(Y)


def trace_of(model):
    """Return the trace of one execution without the plates, with its log-probabilities."""
    trace = prune_subsample_sites(poutine.trace(model).get_trace())
    trace.compute_log_prob()
    return trace


def scored(case, trace):
    """Return the densities of the latent site, shape ``(2,)``, in the space that it is in."""
    z = trace.nodes["z"]["value"]
    if "z_base" not in trace:
        return case.prior.log_prob(z.clone())
    image, density = case.base(trace.nodes["z_base"]["value"])
    torch.testing.assert_close(z, image)
    return density


VALUE = torch.tensor([[0.5, 2.0], [1.5, 0.1]], dtype=torch.float64)


@where
def test_condition(where):
    """What is fixed is observed in data space, with its density there."""
    case = Case()
    trace = trace_of(WHERE[where](case, lambda m: poutine.condition(m, {"z": VALUE})))
    assert not trace.stochastic_nodes
    assert trace.nodes["z"]["value"] is VALUE
    expected = case.prior.log_prob(VALUE).sum() + case.data(VALUE).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


@where
def test_do(where):
    """What is cut off the model is drawn still, and what comes after sees the value alone."""
    case = Case()
    model = WHERE[where](case, lambda m: poutine.do(m, {"z": VALUE}))
    trace = trace_of(model)
    assert trace.nodes["_RETURN"]["value"] is VALUE
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], case.data(VALUE))
    assert trace.stochastic_nodes == ["z" if where == "data" else "z_base"]
    prior = scored(case, trace).sum()
    torch.testing.assert_close(trace.log_prob_sum(), prior + case.data(VALUE).sum())


@where
def test_uncondition(where):
    """Observed sites are drawn; a prior that is conditioned on as well."""
    case = Case()
    trace = trace_of(WHERE[where](case, poutine.uncondition))
    assert not torch.equal(trace.nodes["y"]["value"], Y)
    z = trace.nodes["z"]["value"]
    mean = dist.Normal(z.sum(-1), 1.0)
    torch.testing.assert_close(
        trace.nodes["y"]["log_prob"], mean.log_prob(trace.nodes["y"]["value"])
    )
    torch.testing.assert_close(
        trace.log_prob_sum(), scored(case, trace).sum() + trace.nodes["y"]["log_prob"].sum()
    )
    fixed = poutine.condition(case, {"z": VALUE})
    again = trace_of(WHERE[where](fixed, poutine.uncondition))
    assert not torch.equal(again.nodes["z"]["value"], VALUE)
    assert again.nodes["z"]["value"].shape == (2, 2)


@where
@pytest.mark.parametrize("handler", ["mask", "scale"])
def test_mask_and_scale(where, handler):
    case = Case()
    if handler == "mask":
        weights = torch.tensor([1.0, 0.0])
        apply = poutine.mask(mask=weights > 0)
    else:
        weights = torch.tensor([2.5, 2.5])
        apply = poutine.scale(scale=2.5)
    trace = trace_of(WHERE[where](case, apply))
    rows = scored(case, trace) + case.data(trace.nodes["z"]["value"])
    expected = weights @ rows
    if (handler, where) == ("scale", "inside"):  # q(z)^s in the measure of the base draw
        log_det = scored(case, trace) - case.prior.log_prob(trace.nodes["z"]["value"].clone())
        expected = expected + (1 - 2.5) * log_det.sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


@where
def test_block(where):
    """A hidden site is drawn, counts for nothing, and is in no trace."""
    case = Case()
    names = ["z", "z_base"]
    trace = trace_of(WHERE[where](case, lambda m: poutine.block(m, hide=names)))
    assert not {*names} & {*trace.nodes}
    z = trace.nodes["_RETURN"]["value"]
    torch.testing.assert_close(trace.log_prob_sum(), case.data(z).sum())
    shown = trace_of(WHERE[where](case, lambda m: poutine.block(m, hide=["y"])))
    assert "y" not in shown
    torch.testing.assert_close(shown.log_prob_sum(), scored(case, shown).sum())


@where
def test_replay(where):
    """Of a trace in the same space, and of one in data space, sites and densities come back."""
    case = Case()
    model = {"data": case}.get(where, base_space(case))
    first = trace_of(model)
    again = trace_of(poutine.replay(model, trace=first))
    assert torch.equal(again.nodes["z"]["value"], first.nodes["z"]["value"])
    torch.testing.assert_close(again.log_prob_sum(), first.log_prob_sum())
    draw = trace_of(case)  # in data space
    there = trace_of(WHERE[where](case, lambda m: poutine.replay(m, trace=draw)))
    assert there.stochastic_nodes == ["z"]
    assert torch.equal(there.nodes["z"]["value"], draw.nodes["z"]["value"])
    torch.testing.assert_close(there.log_prob_sum(), draw.log_prob_sum())


@where
def test_lift(where):
    """A parameter that becomes a latent site is the context of the prior."""
    flow = random_flow(2, context_dim=2, solver=FINE)
    family = ConditionalInterpolantDistribution(flow).freeze()

    def model():
        c = pyro.param("c", torch.zeros(2))
        return pyro.sample("z", family.condition(c))

    lifted = WHERE[where](
        model, lambda m: poutine.lift(m, {"c": dist.Normal(torch.zeros(2), 1.0).to_event(1)})
    )
    trace = trace_of(lifted)
    latent = "z" if where == "data" else "z_base"
    assert trace.stochastic_nodes == ["c", latent]
    c, z = trace.nodes["c"]["value"], trace.nodes["z"]["value"]
    if where == "data":
        expected = family.condition(c).log_prob(z.clone())
        torch.testing.assert_close(trace.nodes["z"]["log_prob"], expected)
    else:
        image = family.condition(c).transform(trace.nodes["z_base"]["value"])
        torch.testing.assert_close(z, image)
    guide = AutoNormal(lifted)
    assert torch.isfinite(torch.tensor(SVI(lifted, guide, Adam({}), Trace_ELBO()).step()))
    assert set(guide()) == {"c", latent}


@where
def test_substitute(where):
    """A parameter is replaced: where it is the context, and where it is a weight of the flow."""
    family = ConditionalInterpolantDistribution(random_flow(2, context_dim=2))
    weight = "flow.velocity.output.weight"
    with torch.no_grad():
        other = 2 * dict(family.transform.named_parameters())[weight]

    def model():
        pyro.module("flow", family.transform, update_module_params=True)
        c = pyro.param("c", torch.zeros(2))
        return pyro.sample("z", family.condition(c))

    data = {"c": torch.tensor([0.5, -1.0]), weight: other}
    model = WHERE[where](model, lambda m: poutine.substitute(m, data=data))
    with torch.no_grad():
        pyro.set_rng_seed(0)
        z = model()
        assert torch.equal(dict(family.transform.named_parameters())[weight], other)
        pyro.set_rng_seed(0)
        torch.testing.assert_close(z, family.condition(data["c"]).sample())
