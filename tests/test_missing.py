"""What is not installed, or in another version, is named with what to install."""

import sys
from types import ModuleType

import pytest
import torch
from cases import random_prior

import pyro_interpolant as pi

CALLS = {
    "sklearn.model_selection": (
        lambda: pi.diagnostics.c2st(torch.rand(30, 1), torch.rand(30, 1)),
        "scikit-learn",
    ),
    "matplotlib": (lambda: pi.plotting.images(torch.zeros(1, 1, 2, 2)), "matplotlib"),
    "arviz.data": (lambda: pi.to_arviz(random_prior(1), count=5), "arviz>=0.18,<1"),
    "pyro_interpolant.numpyro.loading": (lambda: pi.numpyro.load, "numpyro>=0.22"),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_is_missing_is_named(name, monkeypatch):
    monkeypatch.delitem(vars(pi.numpyro), "load", raising=False)
    monkeypatch.setitem(sys.modules, name, None)
    call, install = CALLS[name]
    with pytest.raises(ImportError, match=f"pip install '{install}'"):
        call()


def test_another_arviz_is_named(monkeypatch):
    """Its version 1 has another container and another ``from_dict``, in other modules."""
    newer = ModuleType("arviz")
    newer.__path__ = []
    monkeypatch.setitem(sys.modules, "arviz", newer)
    monkeypatch.delitem(sys.modules, "arviz.data", raising=False)
    with pytest.raises(ImportError, match=r"'arviz>=0\.18,<1' \(No module named 'arviz\.data'\)"):
        pi.to_arviz(random_prior(1), count=5)
