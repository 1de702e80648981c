"""The README's own blocks, run as a reader would: in order, in one namespace."""

import ast
import re
from pathlib import Path

import pytest
import torch
from test_docs import shortened

import pyro_interpolant

README = Path(__file__).parent.parent / "README.md"


def blocks():
    text = README.read_text()
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield text[: match.start()].count("\n") + 1, match.group(1)


@pytest.mark.slow
@pytest.mark.usefixtures("_few_held_draws")
@pytest.mark.filterwarnings("ignore:Poor:UserWarning")
@pytest.mark.filterwarnings("ignore:no time was left:UserWarning")
@pytest.mark.filterwarnings("ignore:the fit came out wrong:UserWarning")
@pytest.mark.filterwarnings("ignore:the time was over before samples:UserWarning")
def test_the_blocks_of_the_readme_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    torch.set_default_dtype(torch.float32)  # what a reader has
    namespace = {"__name__": "readme"}
    found = list(blocks())
    assert found
    for line, source in found:
        # Blank lines in front: a traceback then names the line of the README.
        exec(compile("\n" * line + shortened(source), str(README), "exec"), namespace)


def test_the_names_of_the_readme_are_there():
    for line, source in blocks():
        tree = ast.parse("\n" * line + source)
        names = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
        for n in names:
            if isinstance(n.value, ast.Name) and n.value.id == "pi":
                assert hasattr(pyro_interpolant, n.attr), f"line {n.lineno}: pi.{n.attr}"


def test_the_readme_opens_with_two_commands():
    """One block of shell, in front of any other, that sets up and runs."""
    first = re.search(r"^```(\w*)\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert first.group(1) in ("bash", "sh", "console", "shell")
    assert "pip install" in first.group(2)


def test_the_links_of_the_readme_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (README.parent / target).exists(), target
