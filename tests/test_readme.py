"""The README opens with what runs, and names what is there."""

import ast
import re

from pages import README, blocks

import pyro_interpolant


def test_the_names_of_the_readme_are_there():
    for line, source in blocks(README):
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
