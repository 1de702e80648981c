"""NUTS with two chains in two new processes, over flows of many kinds as priors."""

import pytest
import torch
from kinds import EveryKind
from pyro.infer import MCMC, NUTS

from pyro_interpolant import Adaptive, FixedGrid

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")

IN_BASE_SPACE = ("plain", "simplex", "flow base", "given rows", "angles", "joint", "adaptive")
IN_DATA_SPACE = ("corr_cholesky", "laplace", "given", "tempered", "expanded", "hutchinson")


def used(model):
    """Make the flows cheap, and fill their caches with graphs, which must not travel."""
    for d in model.flows():
        fixed = isinstance(d.transform.solver, FixedGrid)
        coarse = FixedGrid(steps=2) if fixed else Adaptive(rtol=1e-3, atol=1e-3, nodes=4)
        d.transform.solver = coarse
        d.log_prob(d.sample().requires_grad_())
    return model


@pytest.mark.slow
def test_flows_in_either_space(monkeypatch):
    """The default type of a new process is another than that of the flows."""
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 3)  # else one after another
    model = used(EveryKind(IN_DATA_SPACE, IN_BASE_SPACE))
    mcmc = MCMC(
        NUTS(model, step_size=0.02, adapt_step_size=False, max_tree_depth=1),
        num_samples=2,
        warmup_steps=1,
        num_chains=2,
        mp_context="spawn",
        disable_progbar=True,
    )
    mcmc.run()
    assert type(mcmc.sampler).__name__ == "_MultiSampler"
    draws = mcmc.get_samples(group_by_chain=True)
    assert len(draws) == len(IN_DATA_SPACE) + len(IN_BASE_SPACE)
    for name, value in draws.items():
        assert value.shape[:2] == (2, 2)
        assert value.dtype == torch.float64
        assert torch.isfinite(value).all(), name
        assert not torch.equal(value[0], value[1]), name
        assert not torch.equal(value[:, 0], value[:, 1]), name
    for kind, d in model.in_data_space.items():
        value = draws[f"{kind} in data space"]
        assert value.shape == (2, 2, *d.shape())
        assert d.support.check(value).all(), kind
    named = model.named(draws)
    for kind, d in model.in_base_space.items():
        if d.transform.context is None:
            value = named[f"{kind} in base space"]
            assert value.shape == (2, 2, *d.shape())
            assert d.support.check(value).all(), kind
