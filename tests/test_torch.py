"""What the package keeps between itself and torch."""

import warnings

import pytest
import torch

from pyro_interpolant import _torch


def inside(source, **names):
    """Return the function ``f`` that the source defines, as if it stood in the package."""
    code = compile(source, _torch.__file__.replace("_torch.py", "room/module.py"), "exec")
    exec(code, names)
    return names["f"]


@pytest.mark.parametrize(
    "source",
    [
        "def f(): warn_user('careful')",
        "def g(): warn_user('careful')\ndef f(): return g()",
        "@torch.no_grad()\ndef f(): warn_user('careful')",
        "@torch.no_grad()\ndef g(): warn_user('careful')\ndef f():\n  for _ in [0]: g()",
        "import contextlib\n@contextlib.contextmanager\ndef g():\n  warn_user('careful'); yield\n"
        "def f():\n  with g(): pass",
    ],
)
def test_a_warning_names_the_line_outside_the_package(source):
    function = inside(source, warn_user=_torch.warn_user, torch=torch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    assert [(w.filename, str(w.message), w.category) for w in caught] == [
        (__file__, "careful", UserWarning)
    ]


def test_a_warning_can_be_of_another_kind():
    with pytest.warns(DeprecationWarning, match="careful"):
        _torch.warn_user("careful", DeprecationWarning)
