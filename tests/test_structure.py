import ast
import doctest
import functools
import importlib
import importlib.util
import inspect
import operator
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pyro.distributions as dist
import pytest
import torch

import pyro_interpolant

PACKAGE = Path(pyro_interpolant.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in FILES]

# A room, or a file of the ground floor, imports only from those on lower levels.
LEVELS = (
    {"_files", "_package", "_torch"},
    {"interpolants", "nn"},
    {"solvers"},
    {"transforms"},
    {"distributions"},
    {"diffusion", "diagnostics", "io"},
    {"training"},
    {"transport", "infer", "plotting"},
    {"numpyro"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
PYRO = {"transforms", "distributions", "diagnostics", "io", "transport", "infer"}  # know Pyro
FOREIGN = (
    "jax",
    "numpyro",
    "matplotlib",
    "arviz",
    "zuko",
    "sklearn",
    "lightning_fabric",
    "lightning",
    "diffusers",
)
FILE_LINES, BODY_LINES = 500, 45

HAS_JAX = importlib.util.find_spec("jax") is not None


def is_there(name):
    """Whether a module can be imported: those of the twin in NumPyro need jax."""
    return HAS_JAX or room_of(name) != "numpyro" or name == "numpyro"


@functools.cache
def tree(path):
    return ast.parse(path.read_text())


def room_of(name):
    return name.partition(".")[0]


def imports(path):
    """Every imported module: ours as (path from the package, True), others as (name, False)."""
    here = (*path.relative_to(PACKAGE).parts[:-1],)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.module, False
                continue
            above = here[: len(here) - node.level + 1]
            whole = [node.module] if node.module else [alias.name for alias in node.names]
            for name in whole:
                yield ".".join((*above, name)), True


def test_the_guide_for_contributors_names_every_room():
    named = set(re.findall("`([a-z_]+)`", (PACKAGE.parent / "CONTRIBUTING.md").read_text()))
    assert not set(LEVEL) - named


def test_every_room_has_a_level():
    entries = {
        p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert entries - {"__init__"} == set(LEVEL)


@pytest.mark.parametrize(("path", "name"), list(zip(FILES, NAMES, strict=True)), ids=NAMES)
def test_a_room_imports_only_from_lower_levels(path, name):
    own = room_of(name)
    for needed, ours in imports(path):
        if ours and own != "__init__" and room_of(needed) != own:
            assert LEVEL[room_of(needed)] < LEVEL[own], f"{name} imports {needed}"


@pytest.mark.parametrize("room", sorted(LEVEL))
def test_no_circle_inside_a_room(room):
    needs = {
        name: {
            other
            for other, ours in imports(path)
            if ours and room_of(other) == room and other in NAMES
        }
        for path, name in zip(FILES, NAMES, strict=True)
        if room_of(name) == room and not name.endswith("__init__")
    }
    while needs:
        free = [name for name, others in needs.items() if not others & set(needs)]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]


def test_no_module_is_named_as_a_public_function():
    public_names = set(pyro_interpolant.__all__)
    for room in LEVEL:
        module = importlib.import_module(f"pyro_interpolant.{room}")
        public_names |= set(getattr(module, "__all__", ()))
    modules = {part for name in NAMES for part in name.split(".")}
    assert not modules & public_names


@pytest.mark.parametrize("room", sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py")))
def test_a_room_is_introduced(room):
    module = importlib.import_module(f"pyro_interpolant.{room}")
    assert 3 <= len(module.__doc__.strip().splitlines()) <= 12


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_pyro_is_imported_only_where_it_belongs(path):
    used = any(not ours and room_of(name) == "pyro" for name, ours in imports(path))
    assert not used or room_of(str(path.relative_to(PACKAGE)).replace("/", ".")) in PYRO


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_foreign_import_anywhere_at_the_top(path):
    allowed = {"jax", "numpyro"} if path.parent.name == "numpyro" else set()
    for node in tree(path).body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [n for n in names if n.partition(".")[0] in set(FOREIGN) - allowed]


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


def public():
    return list(pyro_interpolant.__all__)


def test_all_is_sorted_complete_and_there():
    names = pyro_interpolant.__all__
    assert list(names) == sorted(set(names))
    assert len(names) <= 60
    assert all(hasattr(pyro_interpolant, name) for name in names)


def test_type_checkers_see_the_names_that_are_there():
    """What is imported while type checking is what ``__getattr__`` finds."""
    for path in sorted(PACKAGE.rglob("__init__.py")):
        package = ".".join(("pyro_interpolant", *path.parent.relative_to(PACKAGE).parts))
        if path.parent.name == "numpyro" and not HAS_JAX:
            continue
        module = importlib.import_module(package)
        seen = set()
        for node in ast.walk(tree(path)):
            others = (None, "_package", "typing")
            if isinstance(node, ast.ImportFrom) and node.module not in others:
                if node.names[0].name == "*":
                    seen |= set(vars(importlib.import_module(f"{package}.{node.module}")))
                else:
                    seen |= {alias.name for alias in node.names}
        assert set(module.__all__) <= seen, package


def test_a_name_that_moved_says_where():
    with pytest.raises(AttributeError, match=r"pyro_interpolant\.training\.FitResult"):
        pyro_interpolant.FitResult  # noqa: B018
    with pytest.raises(AttributeError, match=r"use .*\.diffusion\.convert\(.*velocity\)\.score"):
        pyro_interpolant.velocity_to_score  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pyro_interpolant.nothing  # noqa: B018


def test_dir_shows_public_names_and_rooms():
    shown = {name for name in dir(pyro_interpolant) if not name.startswith("_")}
    rooms = set(LEVEL) - {"_files", "_package", "_torch"}
    assert shown == set(pyro_interpolant.__all__) | rooms
    for room in rooms:
        assert getattr(pyro_interpolant, room).__name__ == f"pyro_interpolant.{room}"


def test_the_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", pyro_interpolant.__version__)


def test_the_conventions_are_in_the_docstring_of_the_package():
    text = " ".join(pyro_interpolant.__doc__.split())
    assert "``t = 0``" in text
    assert "``(t, x)``" in text


ROOMS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))
HOMES = public() + [
    f"{room}.{name}"
    for room in ROOMS
    for name in importlib.import_module(f"pyro_interpolant.{room}").__all__
    if name not in public() and (room != "numpyro" or HAS_JAX)
]


def documented(name):
    """A public name and, of a class, its public methods that the package defines."""
    value = operator.attrgetter(name)(pyro_interpolant)
    yield name, value
    if inspect.isclass(value):
        for key, member in vars(value).items():
            if isinstance(member, property):
                member = member.fget  # noqa: PLW2901
            shown = not key.startswith("_") or key == "__call__"
            if shown and inspect.isfunction(member):
                yield f"{name}.{key}", member


@pytest.mark.parametrize("name", HOMES)
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


MODULES = [name for name in NAMES if not name.endswith("__init__")]


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_references_in_docstrings_lead_somewhere(path):
    for reference in re.findall(r":\w+:`~?(pyro_interpolant[\w.]*)`", path.read_text()):
        if is_there(reference.removeprefix("pyro_interpolant.")):
            assert pkgutil.resolve_name(reference) is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODULES if is_there(name)])
def test_the_examples_in_docstrings_run(name, tmp_path, monkeypatch):
    if name == "infer.inference_data":
        pytest.importorskip("arviz")
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # what a user has
    module = importlib.import_module(f"pyro_interpolant.{name}")
    shared = {n: getattr(pyro_interpolant, n) for n in public()}
    shared.update(torch=torch, dist=dist, pyro=sys.modules["pyro"])
    shared["constraints"] = dist.constraints
    own = vars(module)
    names = {**shared, **own} if room_of(name) == "numpyro" else {**own, **shared}
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        if test.examples:
            result = doctest.DocTestRunner().run(
                doctest.DocTest(
                    test.examples,
                    dict(names),
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


@pytest.mark.slow
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


FIRST_CALLS = """
import sys, torch, pyro_interpolant as pi
flow = pi.InterpolantDistribution(pi.interpolant_transform(2, (8,)))
with torch.no_grad():
    flow.log_prob(torch.zeros(1, 2)), flow.sample(), flow.mean
present = [name for name in ("torch._dynamo", "sympy") if name in sys.modules]
assert not present, present
"""


@pytest.mark.slow
def test_the_first_calls_of_a_flow_do_not_import_a_compiler():
    command = [sys.executable, "-c", FIRST_CALLS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_the_package_is_typed():
    assert (PACKAGE / "py.typed").exists()
