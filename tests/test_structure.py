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

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_interpolant

PACKAGE = Path(pyro_interpolant.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

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
FOREIGN = ["jax", "numpyro", "matplotlib", "arviz", "zuko", "sklearn", "lightning", "diffusers"]
FOREIGN += ["lightning_fabric"]
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


def test_every_room_has_a_level_and_is_named_in_the_guide_for_contributors():
    entries = {
        p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert entries - {"__init__"} == set(LEVEL)
    named = set(re.findall("`([a-z_]+)`", (PACKAGE.parent / "CONTRIBUTING.md").read_text()))
    assert not set(LEVEL) - named


def test_a_room_imports_only_from_lower_levels():
    for name, path in FILES.items():
        own = room_of(name)
        for needed, ours in imports(path):
            if ours and own != "__init__" and room_of(needed) != own:
                assert LEVEL[room_of(needed)] < LEVEL[own], f"{name} imports {needed}"


def test_no_circle_inside_a_room():
    needs = {
        name: {
            other
            for other, ours in imports(path)
            if ours and room_of(other) == room_of(name) and other in FILES
        }
        for name, path in FILES.items()
        if not name.endswith("__init__")
    }
    while needs:
        free = [name for name, others in needs.items() if not others & set(needs)]
        assert free, f"a circle among {sorted(needs)}"
        for name in free:
            del needs[name]


def test_foreign_packages_are_imported_only_where_they_belong():
    """Pyro in some rooms; packages that need not be installed never at the top of a file."""
    for name, path in FILES.items():
        used = any(not ours and room_of(other) == "pyro" for other, ours in imports(path))
        assert not used or room_of(name) in PYRO, name
        allowed = {"jax", "numpyro"} if path.parent.name == "numpyro" else set()
        for node in tree(path).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.partition(".")[0] for n in names} & (set(FOREIGN) - allowed), name


def test_all_is_sorted_complete_and_there():
    names = pyro_interpolant.__all__
    assert list(names) == sorted(set(names))
    assert len(names) <= 60
    assert all(hasattr(pyro_interpolant, name) for name in names)
    shown = {name for name in dir(pyro_interpolant) if not name.startswith("_")}
    rooms = {room for room in LEVEL if not room.startswith("_")}
    assert shown == set(names) | rooms


def test_a_name_that_moved_says_where():
    with pytest.raises(AttributeError, match=r"pyro_interpolant\.training\.FitResult"):
        pyro_interpolant.FitResult  # noqa: B018
    with pytest.raises(AttributeError, match=r"use .*\.diffusion\.convert\(.*velocity\)\.score"):
        pyro_interpolant.velocity_to_score  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        pyro_interpolant.nothing  # noqa: B018


ROOMS = sorted(p.parent.name for p in PACKAGE.glob("*/__init__.py"))


def documented():
    """All public names and, of classes, their public methods that the package defines."""
    homes = list(pyro_interpolant.__all__)
    for room in ROOMS:
        if room != "numpyro" or HAS_JAX:
            module = importlib.import_module(f"pyro_interpolant.{room}")
            homes += [f"{room}.{name}" for name in module.__all__]
    for name in homes:
        value = operator.attrgetter(name)(pyro_interpolant)
        yield name, value
        if inspect.isclass(value):
            for key, member in vars(value).items():
                if isinstance(member, property):
                    member = member.fget  # noqa: PLW2901
                shown = not key.startswith("_") or key == "__call__"
                if shown and inspect.isfunction(member):
                    yield f"{name}.{key}", member


def test_public_names_are_documented_tensors_with_their_shapes():
    for label, value in documented():
        if not callable(value):  # a constraint
            continue
        assert value.__doc__, label
        function = value.__init__ if inspect.isclass(value) else value
        signature = str(inspect.signature(function))
        if "Tensor" in signature and not (
            inspect.isclass(value) and "Attributes" in value.__doc__
        ):
            assert re.search(r"shape|\(\*|``\(N", value.__doc__), label


def test_references_in_docstrings_lead_somewhere():
    for path in FILES.values():
        for reference in re.findall(r":\w+:`~?(pyro_interpolant[\w.]*)`", path.read_text()):
            if is_there(reference.removeprefix("pyro_interpolant.")):
                assert pkgutil.resolve_name(reference) is not None


@pytest.mark.slow
@pytest.mark.usefixtures("_few_held_draws")
@pytest.mark.parametrize("room", [room for room in ROOMS if is_there(f"{room}.x")])
def test_the_examples_in_docstrings_run(room, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.set_default_dtype(torch.float32)  # what a user has
    shared = {n: getattr(pyro_interpolant, n) for n in pyro_interpolant.__all__}
    shared |= {"torch": torch, "dist": dist, "pyro": pyro, "constraints": dist.constraints}
    for name in FILES:
        if room_of(name) != room or name.endswith("__init__"):
            continue
        if name == "infer.inference_data" and importlib.util.find_spec("arviz") is None:
            continue
        module = importlib.import_module(f"pyro_interpolant.{name}")
        own = vars(module)
        names = {**shared, **own} if room == "numpyro" else {**own, **shared}
        for test in doctest.DocTestFinder(exclude_empty=True).find(module):
            test.globs = dict(names)
            assert doctest.DocTestRunner().run(test).failed == 0, test.name


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
import pyro_interpolant as pi
assert state() == before, [a == b for a, b in zip(before, state())]
flow = pi.InterpolantDistribution(pi.interpolant_transform(2, (8,)))
with torch.no_grad():
    flow.log_prob(torch.zeros(1, 2)), flow.sample(), flow.mean
present = [name for name in %r if name in sys.modules]
assert not present, present
"""


@pytest.mark.slow
def test_importing_changes_nothing_and_pulls_in_nothing_foreign_nor_do_first_calls():
    """A compiler, which takes a second to import, is among what is not wanted."""
    code = CLEAN % ((*FOREIGN, "torch._dynamo", "sympy"),)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
