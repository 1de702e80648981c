"""The state every test starts from: float64, one seed, one thread, an empty parameter store."""

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def _clean_state():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    generators = pyro.util.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    pyro.util.set_rng_state(generators)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
