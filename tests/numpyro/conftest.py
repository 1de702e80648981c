"""Where jax and NumPyro are installed, in float64; elsewhere none of these tests is collected."""

import importlib.util

import pytest
import torch

HAS_NUMPYRO = all(importlib.util.find_spec(name) for name in ("jax", "jaxlib"))
collect_ignore_glob = [] if HAS_NUMPYRO else ["test_*.py"]

if HAS_NUMPYRO:
    import jax

    @pytest.fixture(autouse=True, scope="module")
    def _float64():
        jax.config.update("jax_enable_x64", val=True)
        yield
        jax.config.update("jax_enable_x64", val=False)
        jax.clear_caches()  # gigabytes, of all modules together

    @pytest.fixture
    def float32():
        """Types as jax has them by default."""
        jax.config.update("jax_enable_x64", val=False)
        torch.set_default_dtype(torch.float32)
        yield
        jax.config.update("jax_enable_x64", val=True)

    @pytest.fixture(scope="module")
    def twin(tmp_path_factory):
        """The twin in NumPyro of a flow of torch, through a file."""
        from pyro_interpolant import save
        from pyro_interpolant.numpyro import load

        path = tmp_path_factory.mktemp("twins") / "flow.safetensors"

        def make(distribution, **options):
            save(distribution, path)
            return load(path, **options)

        return make
