"""NUTS with two chains in two new processes, over every kind of flow as a prior."""

import pytest
import torch
from kinds import KINDS, EveryKind
from pyro.infer import MCMC, NUTS
from torch.distributions import biject_to

from pyro_interpolant import FixedGrid, neutra
from pyro_interpolant.infer import AutoInterpolant

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

IN_BASE_SPACE = [kind for kind in KINDS if kind != "samples"]  # which have no density
IN_DATA_SPACE = [kind for kind in IN_BASE_SPACE if "angle" not in kind]  # which have a seam


def two_chains(model, monkeypatch, draws=2):
    """Return the draws, by chain, of two processes that import all they need anew."""
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 3)  # else one after another
    kernel = NUTS(model, max_tree_depth=2)
    mcmc = MCMC(
        kernel,
        num_samples=draws,
        warmup_steps=2,
        num_chains=2,
        mp_context="spawn",
        disable_progbar=True,
    )
    mcmc.run()
    assert type(mcmc.sampler).__name__ == "_MultiSampler"
    return mcmc.get_samples(group_by_chain=True)


@pytest.mark.slow
def test_every_kind_in_either_space(monkeypatch):
    """The default type of a new process is another than that of the flows."""
    model = EveryKind(IN_DATA_SPACE, IN_BASE_SPACE)
    for d in model.flows():
        if isinstance(d.transform.solver, FixedGrid):
            d.transform.solver = FixedGrid(steps=2)
        leaf = d.sample().requires_grad_()
        d.log_prob(leaf)  # whose graph must not travel
    draws = two_chains(model, monkeypatch)
    assert len(draws) == len(IN_DATA_SPACE) + len(IN_BASE_SPACE)
    assert {f"{kind} in data space" for kind in IN_DATA_SPACE} < set(draws)
    for name, value in draws.items():
        assert value.shape[:2] == (2, 2)
        assert value.dtype == torch.float64
        assert torch.isfinite(value).all()
        assert not torch.equal(value[0], value[1]), name
    for kind, d in model.in_data_space.items():
        inside = d.support.check(draws[f"{kind} in data space"])
        assert inside.all(), kind
        assert inside.shape == (2, 2, *d.batch_shape)
        assert torch.isfinite(biject_to(d.support).inv(draws[f"{kind} in data space"])).all()
    named = model.samples(draws)
    for kind, d in model.in_base_space.items():
        value = named[f"{kind} in base space"]
        assert d.support.check(value).all(), kind
        assert value.shape == (2, 2, *d.shape())
