"""The pages of the site and of the repository: blocks run, and names and links lead somewhere."""

import ast
import importlib.util
import re

import pytest
import torch
from pages import DOCS, FENCE, README, ROOT, blocks

import pyro_interpolant

PAGES = sorted(
    path for path in DOCS.rglob("*.md") if not path.relative_to(DOCS).parts[0].startswith("_")
)
ALL = [README, ROOT / "CONTRIBUTING.md", *PAGES]
HAS_JAX = importlib.util.find_spec("jax") is not None


def name(path):
    return path.stem if path.parent == ROOT else str(path.relative_to(DOCS).with_suffix(""))


RUN = [README] + [
    path
    for path in PAGES
    if path.parent.name in ("how-to", "coming-from") and next(blocks(path), None)
]


def shortened(source):
    """A block whose trainings are short: how far one comes is not what running it tells."""
    source = re.sub(r"\brounds=5\b", "rounds=2", source)
    return re.sub(r"\bsteps=\d{2,3}\b", "steps=8", source)


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
@pytest.mark.filterwarnings("ignore:Poor:UserWarning")
@pytest.mark.filterwarnings("ignore:the fit came out wrong:UserWarning")
@pytest.mark.filterwarnings("ignore:no grid (has samples|up to 256):UserWarning")
@pytest.mark.filterwarnings("ignore:num_chains=2 is more than available_cpu=1:UserWarning")
@pytest.mark.filterwarnings("ignore:Stochastic Optimizer. Maximum iterations:UserWarning")
@pytest.mark.parametrize("path", RUN, ids=map(name, RUN))
def test_the_blocks_of_a_page_run(path, tmp_path, monkeypatch):
    """As a reader would run them: in order, in one namespace."""
    if path.stem == "numpyro":
        pytest.importorskip("jax")
    if path.stem == "images":
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    # Chains one after another: a page is no module that a new process could import.
    monkeypatch.setattr(torch.multiprocessing, "cpu_count", lambda: 1)
    torch.set_default_dtype(torch.float32)  # what a reader has
    namespace, found = {"__name__": "page"}, list(blocks(path))
    assert found
    for line, source in found:
        # Blank lines in front: a traceback then names the line of the page.
        exec(compile("\n" * line + shortened(source), str(path), "exec"), namespace)


def test_the_readme_opens_with_two_commands():
    """One block of shell, in front of any other, that sets up and runs."""
    first = FENCE.search(README.read_text())
    assert first.group(1) in ("bash", "sh", "console", "shell")
    assert "pip install" in first.group(2)


def test_the_names_of_the_pages_are_there():
    """All of ``pi.room.name``, in blocks and between backticks; of the twin's only with jax."""
    found = set()
    for path in ALL:
        for line, source in blocks(path, ("python", "{code-cell}")):
            code = "\n".join("" if row.startswith(":") else row for row in source.splitlines())
            nodes = ast.walk(ast.parse("\n" * line + code))
            found |= {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
        found |= set(re.findall(r"`(pi\.[\w.]+)", FENCE.sub("", path.read_text())))
    assert "pi.from_samples" in found
    for chain in found:
        if chain.startswith("pi.numpyro.") and not HAS_JAX:
            continue
        value = pyro_interpolant
        for part in chain.split(".")[1:] if re.fullmatch(r"pi(\.\w+)+", chain) else ():
            assert hasattr(value, part), chain
            value = getattr(value, part)


def test_the_links_of_the_pages_lead_somewhere_and_their_blocks_are_closed():
    for path in ALL:
        text = path.read_text()
        assert len(re.findall("^```", text, re.MULTILINE)) % 2 == 0, path
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", FENCE.sub("", text)):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (path.parent / target).exists(), f"{path}: {target}"
