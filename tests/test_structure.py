import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch

import pyro_interpolant

PACKAGE = Path(pyro_interpolant.__file__).parent
FILES = sorted(PACKAGE.glob("*.py"))
NAMES = [path.stem for path in FILES]

# A file imports only from lower floors, never sideways.
FLOORS = {
    "_version": 0,
    "caching": 0,
    "checkpointing": 0,
    "couplings": 0,
    "psis": 0,
    "quadrature": 0,
    "engine": 0,
    "scopes": 0,
    "shapes": 0,
    "snapshots": 0,
    "divergence": 0,
    "interpolants": 0,
    "data": 0,
    "conversions": 1,
    "rounding": 1,
    "marginals": 1,
    "keeping": 1,
    "moves": 1,
    "latents": 1,
    "learned": 1,
    "adjoint": 1,
    "networks": 1,
    "solvers": 1,
    "supports": 2,
    "flow": 2,
    "radial": 2,
    "search": 2,
    "preference": 3,
    "descriptions": 3,
    "torus": 3,
    "bases": 3,
    "transforms": 3,
    "distributions": 4,
    "joint": 5,
    "losses": 5,
    "calibration": 5,
    "paths": 5,
    "plotting": 5,
    "reparam": 5,
    "scores": 5,
    "io": 6,
    "jumps": 6,
    "monitors": 6,
    "objective": 6,
    "sde": 6,
    "sites": 6,
    "ahead": 7,
    "likelihoods": 7,
    "preparation": 7,
    "guides": 7,
    "models": 7,
    "refits": 7,
    "loop": 8,
    "preconditioning": 8,
    "neutra": 8,
    "refining": 9,
    "streams": 8,
    "batches": 9,
    "importance": 9,
    "rounds": 10,
    "diagnostics": 10,
    "sources": 10,
    "training": 11,
    "guiding": 12,
    "samples": 12,
    "straightening": 12,
    "transport": 12,
    "__init__": 13,
}
PYRO = {"bases", "transforms", "distributions", "supports", "torus", "joint", "reparam", "io",
        "sites", "models", "guides", "neutra", "importance", "guiding",
        "descriptions"}  # fmt: skip
FOREIGN = ("jax", "numpyro", "matplotlib", "zuko", "sklearn", "lightning_fabric", "lightning")
FILE_LINES, BODY_LINES = 320, 45


def tree(path):
    return ast.parse(path.read_text())


def imports(path):
    """Every imported module: our own as (name, True), others as (name, False)."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                head, _, rest = alias.name.partition(".")
                yield (rest, True) if head == "pyro_interpolant" else (alias.name, False)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level == 0 and module.partition(".")[0] != "pyro_interpolant":
                yield module, False
                continue
            inner = module.removeprefix("pyro_interpolant").lstrip(".")
            for name in [inner.partition(".")[0]] if inner else [a.name for a in node.names]:
                yield name, True


def test_every_file_has_a_floor():
    assert set(NAMES) == set(FLOORS)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_file_imports_only_from_lower_floors(path):
    for name, ours in imports(path):
        if ours:
            assert FLOORS[name] < FLOORS[path.stem], f"{path.name} imports {name}"


def test_the_public_names_are_grouped_by_floor():
    order = [node.module for node in tree(PACKAGE / "__init__.py").body
             if isinstance(node, ast.ImportFrom)]  # fmt: skip
    place = {name: i for i, name in enumerate(order)}
    for name in order:
        for needed, ours in imports(PACKAGE / f"{name}.py"):
            if ours and needed in place:
                assert place[needed] < place[name], f"{name} comes before {needed}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_pyro_is_imported_only_where_it_belongs(path):
    used = any(not ours and name.partition(".")[0] == "pyro" for name, ours in imports(path))
    assert not used or path.stem in PYRO


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_foreign_import_anywhere_at_the_top(path):
    for node in tree(path).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [n for n in names if n.partition(".")[0] in FOREIGN]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_are_short(path):
    assert len(path.read_text().splitlines()) <= FILE_LINES


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_function_bodies_are_short(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            if body:
                lines = body[-1].end_lineno - body[0].lineno + 1
                assert lines <= BODY_LINES, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_bare_assert(path):
    lines = [node.lineno for node in ast.walk(tree(path)) if isinstance(node, ast.Assert)]
    assert not lines


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_argument_is_annotated(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bare = [a.arg for a in arguments if a.annotation is None]
            assert set(bare) <= {"self", "cls"}, f"{node.name}: {bare}"
            assert node.returns is not None, node.name


def public():
    return [n for n in pyro_interpolant.__all__ if n != "__version__"]


def test_all_is_sorted_complete_and_there():
    names = pyro_interpolant.__all__
    assert list(names) == sorted(set(names))
    assert all(hasattr(pyro_interpolant, name) for name in names)
    exported = {
        alias.asname or alias.name
        for node in tree(PACKAGE / "__init__.py").body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert exported == set(names)


def test_the_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", pyro_interpolant.__version__)


def test_the_conventions_are_in_the_docstring_of_the_package():
    text = " ".join(pyro_interpolant.__doc__.split())
    assert "``t = 0``" in text
    assert "``(t, x)``" in text


def documented(name):
    """A public name and, of a class, its public methods that the package defines."""
    value = getattr(pyro_interpolant, name)
    yield name, value
    if inspect.isclass(value):
        for key, member in vars(value).items():
            if isinstance(member, property):
                member = member.fget  # noqa: PLW2901
            shown = not key.startswith("_") or key == "__call__"
            if shown and inspect.isfunction(member):
                yield f"{name}.{key}", member


@pytest.mark.parametrize("name", public())
def test_public_names_are_documented(name):
    for label, value in documented(name):
        own = value.__dict__.get("__doc__") if inspect.isclass(value) else value.__doc__
        assert own, label
        assert own.strip().splitlines()[0].rstrip(" :").endswith((".", "?")) or "\n" in own, label


@pytest.mark.parametrize("name", public())
def test_tensors_are_documented_with_their_shapes(name):
    for label, value in documented(name):
        if not callable(value):  # a constraint
            continue
        function = value.__init__ if inspect.isclass(value) else value
        signature = str(inspect.signature(function))
        if "Tensor" in signature and not (
            inspect.isclass(value) and "Attributes" in value.__doc__
        ):
            assert re.search(r"shape|\(\*|``\(N", value.__doc__), label


MODULES = [name for name in NAMES if name != "__init__"]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_docstrings_run(name):
    torch.set_default_dtype(torch.float32)  # what a user has
    module = importlib.import_module(f"pyro_interpolant.{name}")
    shared = {n: getattr(pyro_interpolant, n) for n in public()}
    shared.update(torch=torch, dist=dist, pyro=sys.modules["pyro"])
    shared["constraints"] = dist.constraints
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        if test.examples:
            result = doctest.DocTestRunner().run(
                doctest.DocTest(
                    test.examples,
                    {**vars(module), **shared},
                    test.name,
                    test.filename,
                    test.lineno,
                    test.docstring,
                )
            )
            assert result.failed == 0, test.name


@pytest.mark.parametrize(
    "name",
    [
        "InterpolantTransform",
        "VelocityMLP",
        "FixedGrid",
        "InterpolantDistribution",
        "from_samples",
    ],
)
def test_the_main_names_show_an_example(name):
    assert ">>>" in getattr(pyro_interpolant, name).__doc__


CLEAN = """
import sys, torch, random, numpy, pyro, pyro.distributions as dist
torch.set_default_dtype(torch.float64)
def state():
    return (
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        numpy.random.get_state()[1].tolist(),
        torch.distributions.Distribution._validate_args,
        dist.Distribution.__dict__.get("_validate_args"),
        pyro.settings.get(),
        dict(pyro.get_param_store()),
        torch.are_deterministic_algorithms_enabled(),
        sys.getrecursionlimit(),
    )
before = state()
import pyro_interpolant
assert state() == before, [a == b for a, b in zip(before, state())]
try:
    dist.Normal(0.0, -1.0)
except ValueError:
    pass
else:
    raise SystemExit("validation was switched off")
present = [name for name in %r if name in sys.modules]
assert not present, present
"""


def test_importing_changes_nothing_and_pulls_in_nothing_foreign():
    done = subprocess.run(
        [sys.executable, "-c", CLEAN % (FOREIGN,)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
