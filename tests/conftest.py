"""The state every test starts from: float64, one seed, one thread, an empty parameter store.

Each module starts from it too, so that what its fixtures train once is no slower and no different.
"""

import gc
import itertools
import os
import resource
import tempfile
from contextlib import contextmanager

import pyro
import pytest
import torch
from compiling import settings
from narrow import brief_looks, narrow_networks, small_runs

from pyro_interpolant import _package

# What the generators are after a seed. To give one takes a millisecond, for each of thousands of
# tests: torch keeps the whole stack of calls for each kind of device that is not there.
pyro.set_rng_seed(0)
SEEDED = pyro.util.get_rng_state()


def pytest_addoption(parser):
    text = "what the clock of the package advances by at each reading, seconds"
    parser.addoption("--tick", type=float, default=1e-3, help=text)


def pytest_configure(config):
    """Replace the clock of the package, and tell jax how to compile, in all processes of a run.

    Those of workers begin after this.
    """
    tick, readings = config.getoption("--tick"), itertools.count()
    _package.now = lambda: tick * next(readings)
    if not hasattr(config, "workerinput"):
        folder = tempfile.TemporaryDirectory(prefix="compiled-")
        config.add_cleanup(folder.cleanup)
        os.environ.update(settings(folder.name))


def pytest_collection_finish():
    """Keep what was collected from the garbage collector, which would go through it each time."""
    gc.collect()
    gc.freeze()


@contextmanager
def clean_state():
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    generators = pyro.util.get_rng_state()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.util.set_rng_state(SEEDED)
    if torch.accelerator.is_available():
        torch.manual_seed(0)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    pyro.util.set_rng_state(generators)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True, scope="module")
def _clean_module():
    with clean_state():
        yield


@pytest.fixture(autouse=True)
def _clean_state(_clean_module):
    with clean_state():
        yield


@pytest.fixture
def _nodes_stay(monkeypatch):
    """Flows with weights to train keep their solver's nodes: other modes, or weights, compare."""
    monkeypatch.setattr("pyro_interpolant.transforms.flow.Flow.node_seed", lambda flow: None)


@pytest.fixture
def _few_held_draws(monkeypatch):
    """Short runs that look at rows held out at every step or two would do little else."""
    brief_looks(monkeypatch.setattr)


@pytest.fixture
def _narrow_networks(monkeypatch):
    """Runs whose weights nobody looks at need no wide network; widths that are given stay."""
    narrow_networks(monkeypatch.setattr)


@pytest.fixture
def _small_runs(monkeypatch):
    """Runs of which nobody looks at what comes of them."""
    small_runs(monkeypatch.setattr)


@pytest.fixture
def _learned(_small_runs, monkeypatch):
    """Runs that are as large as ever in a module of small ones: what they learn is looked at."""
    monkeypatch.undo()
    brief_looks(monkeypatch.setattr)


@pytest.fixture
def full_disk():
    """A scope in which no file grows beyond a size, in bytes: the system refuses the rest."""

    @contextmanager
    def limited(size):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited
