"""Files: written whole or not at all; what is damaged, edited or of somebody else is refused."""

import errno
import json
import os
import random
import re
import subprocess
import sys
from functools import partial

import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from cases import random_flow
from pyro.distributions import constraints
from safetensors.torch import save_file

from pyro_interpolant import (
    Adaptive,
    FixedGrid,
    HutchinsonDivergence,
    InterpolantDistribution,
    LearnedInterpolant,
    Samples,
    VelocityMLP,
    _files,
    load,
    save,
)
from pyro_interpolant import io as module
from pyro_interpolant.distributions.description import PartError, build, describe
from pyro_interpolant.distributions.differences import difference

KEY = "pyro_interpolant"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


def flow(dim=2, base=None, **choices):
    return InterpolantDistribution(random_flow(dim, (8,), **choices), base)


def with_everything():
    """A flow with tensors of every origin in its file."""
    waves = LearnedInterpolant(3, event_dim=2, network=(4,))
    base = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.2, 0.7])),
        dist.Normal(torch.zeros(2, 2), 1.0).to_event(1),
    )
    choices = {"divergence": HutchinsonDivergence(3), "solver": Adaptive(nodes=8)}
    distribution = flow(2, base, interpolant=waves, **choices)
    distribution.transform.flow.noise = VelocityMLP(2, (8,))
    return distribution


def normal_base():
    return dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1)


@pytest.fixture
def saved(path):
    save(flow(2, normal_base()), path)
    return path


def rewrite(path, change, **more):
    """Edit a file's header, or replace it by a text, with the checksum of the edited file."""
    header, tensors = module.read(path, framework="pt")
    text = change(header)
    text = text if isinstance(text, str) else json.dumps(header)
    module.write(path, {**tensors, **more}, {KEY: text})


# ---- files that are not good --------------------------------------------------------------------


def of_somebody_else(path):
    save_file({"a": torch.zeros(3)}, path, metadata={"format": "pt"})


BAD_FILES = [
    (lambda path: path.write_bytes(b""), "flow.safetensors is damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:100]), "flow.safetensors is damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), "flow.safetensors is damaged"),
    (lambda path: path.write_bytes(path.read_bytes() + b" "), "is damaged"),
    (lambda path: path.write_bytes(bytes(range(256)) * 8), "damaged or not a safetensors file"),
    (lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]), "damaged"),
    (lambda path: torch.save({"loc": torch.zeros(2)}, path), "damaged or not a safetensors file"),
    (of_somebody_else, "not of a pyro_interpolant flow"),
    # Nor does a flipped bit in its name leave the checksum out.
    (
        lambda path: path.write_bytes(path.read_bytes().replace(b'"checksum"', b'"checksun"')),
        "damaged.*no checksum",
    ),
    (lambda path: rewrite(path, lambda h: h.update(format=3)), "reads formats up to 2"),
    (lambda path: rewrite(path, lambda header: "[" * 100_000), "damaged"),
    (lambda path: rewrite(path, lambda header: "[]"), "damaged"),
]


def test_a_bad_file_is_refused(path):
    for damage, match in BAD_FILES:
        save(flow(2, normal_base()), path)
        damage(path)
        with pytest.raises(ValueError, match=match):
            load(path)


def test_a_flipped_bit_is_refused_or_changes_nothing(path):
    """Any bit of the length and of the last number, and some elsewhere, half in the header."""
    save(with_everything(), path)
    raw, (header, tensors) = path.read_bytes(), module.read(path, framework="pt")
    end, draw, refused = 8 + int.from_bytes(raw[:8], "little"), random.Random(0), 0
    places = [*range(64), *range(8 * len(raw) - 64, 8 * len(raw))]
    places += [draw.randrange(64, 8 * end) for _ in range(100)]
    places += [draw.randrange(8 * end, 8 * len(raw)) for _ in range(100)]
    for i, place in enumerate(places):
        flipped = bytearray(raw)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = module.read(path, framework="np" if i % 2 else "pt")
        except ValueError:
            refused += 1
            continue
        again = {key: torch.as_tensor(value) for key, value in found[1].items()}
        assert difference((found[0], again), (header, tensors)) is None, place
    assert refused > 0.9 * len(places)


@pytest.mark.parametrize("field", ["class", "solver", "divergence", "support", "base"])
def test_a_class_name_from_a_stranger_is_refused(field, saved, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the file ran code")

    monkeypatch.setattr(os, "system", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)
    for name in ("os.system", "eval", "__import__", "builtins.exec", "torch.load", "nn", "Foo"):
        value = [name, {}] if field in ("solver", "divergence") else name
        value = {"class": name, "arguments": []} if field == "base" else value
        rewrite(saved, lambda header, value=value: header.update({field: value}))
        with pytest.raises(ValueError, match=r"in the file|damaged or was edited"):
            load(saved)


def changed(tensors, how, name):
    """Tensors of which one has another shape, type, name or place."""
    tensor, new = tensors[name], dict(tensors)
    if how == "swapped":
        other = next(k for k in tensors if k != name and tensors[k].shape != tensor.shape)
        new[name], new[other] = tensors[other], tensor
    elif how == "longer":
        new[name] = torch.cat((tensor.reshape(-1), torch.zeros(1, dtype=tensor.dtype)))
    elif how == "missing":
        del new[name]
    elif how == "renamed":
        new[f"{name}s"] = new.pop(name)
    else:
        new[name] = tensor.to(getattr(torch, how))
    return new


@pytest.mark.parametrize("how", ["swapped", "longer", "missing", "renamed", "float32", "int64"])
def test_other_tensors_are_refused(how, path):
    """A type of its own may have an interpolant; all else has the flow's."""
    header, tensors = describe(with_everything())
    for key in tensors:
        is_old = how == "missing" and key == "divergence.probes"
        if is_old or (how == "float32" and key.startswith("interpolant.")):
            continue
        try:
            build(header, changed(tensors, how, key))
        except PartError:
            continue
        assert key.startswith("base."), key  # of which nobody knows the numbers
    save(flow(), path)
    header, tensors = module.read(path, framework="pt")
    module.write(path, changed(tensors, how, "loc"), {KEY: json.dumps(header)})
    with pytest.raises(ValueError, match=r"flow.safetensors is damaged or was edited"):
        load(path)


def test_other_probes_than_the_flows_are_refused(path):
    """A generator that draws others would make another density of the file."""
    save(flow(divergence=HutchinsonDivergence(3)), path)
    _, tensors = module.read(path, framework="pt")
    probes = tensors["divergence.probes"]
    probes[0, 0] *= -1
    rewrite(path, lambda header: None, **{"divergence.probes": probes})
    with pytest.raises(ValueError, match="the probes of HutchinsonDivergence"):
        load(path)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        ({"solver": ["FixedGrid", {"steps": 10**8}]}, "at most 4096 steps"),
        ({"arguments": [2, [10**6, 10**6], 0]}, "velocity cannot be built.*size mismatch"),
        ({"divergence": ["HutchinsonDivergence", {"probes": 10**9, "seed": 0}]}, "probes"),
        ({"base": {"class": "LKJ", "arguments": [], "parts": {"dim": 10**9}}}, "at most"),
        # The flow started from N(0, I) instead.
        ({"base": None}, "its base cannot be built: expected the base that"),
    ],
)
def test_an_edit_is_told_by_its_part(edit, match, saved):
    rewrite(saved, lambda header: header.update(edit))
    with pytest.raises(ValueError, match=rf"(?s)is damaged or was edited.*{match}"):
        load(saved)


# ---- written whole or not at all ----------------------------------------------------------------


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(step, path, monkeypatch, full_disk):
    for existed in (False, True):
        if existed:
            save(flow(), path)
            old = path.read_bytes()
        with monkeypatch.context() as patch, full_disk(4096 if step == "write" else 2**30):
            if step != "write":
                patch.setattr(os, step, fail)
            message = "File too large" if step == "write" else "No space"
            with pytest.raises(OSError, match=f"{message}.*flow.safetensors"):
                save(flow(9), path)
        assert os.listdir(path.parent) == (["flow.safetensors"] if existed else [])
        assert not existed or path.read_bytes() == old


@pytest.mark.parametrize("mode", [0o600, 0o640])
def test_a_file_that_is_replaced_keeps_its_mode(mode, path, monkeypatch):
    """Not while it is written, either, is a private file open to others."""
    save(flow(2), path)
    path.chmod(mode)
    seen, fsync = [], os.fsync

    def look(handle):
        seen.append(os.fstat(handle).st_mode & 0o777)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    monkeypatch.setattr(os, "umask", fail)  # of the whole process
    save(flow(3), path)
    assert load(path).event_shape == (3,)
    assert seen == [mode]
    assert path.stat().st_mode & 0o7777 == mode


def test_behind_a_symbolic_link_the_file_is_replaced(tmp_path):
    """In another folder, and if there is none yet."""
    (tmp_path / "runs").mkdir()
    target, link = tmp_path / "runs" / "run-12", tmp_path / "current"
    link.symlink_to("runs/run-12")
    for dim in (2, 3):
        save(flow(dim), link)
        assert link.is_symlink()
        assert not target.is_symlink()
        assert load(target).event_shape == load(link).event_shape == (dim,)
    assert os.listdir(tmp_path / "runs") == ["run-12"]


def test_a_folder_is_neither_replaced_nor_called_damaged(path):
    path.mkdir()
    with pytest.raises(OSError, match="flow.safetensors"):
        save(flow(), path)
    with pytest.raises(IsADirectoryError):
        load(path)
    assert os.listdir(path.parent) == [path.name]


def test_a_flow_is_its_own_whatever_happens_to_its_file(path):
    """A base that was mapped into memory changed with the file, or ended the process."""
    save(flow(2, Samples(torch.randn(5000, 2))), path)
    again = load(path)
    before = again.base.rows.clone()
    with open(path, "r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(again.base.rows, before)


def test_what_is_replaced_can_be_kept(tmp_path, monkeypatch):
    """A failure between the two renames loses neither file."""
    new, previous = tmp_path / "state", tmp_path / "previous"
    module.write(new, {"a": torch.zeros(2)}, {"n": "1"}, previous=previous)
    assert not previous.exists()
    for n in (2, 3):
        module.write(new, {"a": torch.full((2,), float(n))}, {"n": str(n)}, previous=previous)
        assert safetensors.torch.load_file(new)["a"].tolist() == [n, n]
    assert safetensors.torch.load_file(previous)["a"].tolist() == [2.0, 2.0]
    assert sorted(os.listdir(tmp_path)) == ["previous", "state"]
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: fail() if b == new else replace(a, b))
    with pytest.raises(OSError, match="No space left"):
        module.write(new, {"a": torch.ones(2)}, {}, previous=previous)
    assert safetensors.torch.load_file(previous)["a"].tolist() == [3.0, 3.0]
    assert os.listdir(tmp_path) == ["previous"]


def test_what_killed_processes_left_is_removed_once_it_is_old(tmp_path):
    file = "state.a+(1)"
    old = [f".{file}.partial", f".{file}.12.0a1b2c3d.partial"]
    others = [f".{file}.13.0a1b2c3d.partial", ".state2.12.0a1b2c3d.partial", f".{file}.zip"]
    for name in (*old, *others):
        (tmp_path / name).touch()
        if name != others[0]:  # which may be another process's, at work
            os.utime(tmp_path / name, (0, 0))
    module.write(tmp_path / file, {"a": torch.ones(2)}, {})
    assert sorted(os.listdir(tmp_path)) == sorted([file, *others])


# ---- what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_header_and_tensors_are_of_one_file(framework, path, monkeypatch):
    """Another process saves while a file is read: it is the old one, or the new."""
    module.write(path, {"a": torch.zeros(3)}, {KEY: json.dumps({"format": 1, "n": 0})})
    checked = _files._checksum

    def saved_meanwhile(head, body):
        monkeypatch.undo()
        module.write(path, {"a": torch.ones(3)}, {KEY: json.dumps({"format": 1, "n": 1})})
        return checked(head, body)

    monkeypatch.setattr(_files, "_checksum", saved_meanwhile)
    for n in (0, 1):
        header, tensors = module.read(path, framework=framework)
        assert (header["n"], tensors["a"].tolist()) == (n, [float(n)] * 3)


@pytest.mark.parametrize("framework", ["np", "pt"])
def test_tensors_of_every_type_are_read(framework, path):
    names = "bool uint8 int8 int16 int32 int64 float16 float32 float64 complex64".split()
    expected = {name: torch.tensor([[1, 0, 1]]).to(getattr(torch, name)) for name in names}
    expected |= {"empty": torch.zeros(0, 2), "scalar": torch.tensor(2.0)}
    module.write(path, expected, {KEY: json.dumps({"format": 1})})
    _, found = module.read(path, framework=framework)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        tensor = torch.as_tensor(found[name])
        assert tensor.dtype == value.dtype
        assert torch.equal(tensor, value)


def test_a_file_holds_the_probes(path):
    """For readers without torch's generator; of a base that is a flow, too."""
    inner = flow(divergence=HutchinsonDivergence(3, seed=5))
    distribution = flow(2, inner, divergence=HutchinsonDivergence(4, seed=6))
    save(distribution, path)
    _, arrays = module.read(path)
    for name, of in (("", distribution), ("base.", inner)):
        probes = torch.as_tensor(arrays[f"{name}divergence.probes"]).double()
        velocity, divergence = of.transform.velocity, of.transform.divergence
        assert probes.shape == (divergence.probes, 2)
        x = torch.randn(5, 2)
        jacobian = torch.func.vmap(torch.func.jacrev(partial(velocity, torch.tensor(0.5))))(x)
        expected = torch.einsum("pi,nij,pj->pn", probes, jacobian, probes).mean(0)
        found = divergence(velocity, torch.tensor(0.5), x, None)
        torch.testing.assert_close(found, expected)


NUMPY_ALONE = """
import sys
for name in ("torch", "pyro", "jax", "scipy"):
    sys.modules[name] = None  # importing it is an error
import numpy
import pyro_interpolant
header, tensors = pyro_interpolant.io.read(sys.argv[1])
assert header["class"] == "InterpolantDistribution" and header["support"] == "positive"
assert all(isinstance(tensor, numpy.ndarray) for tensor in tensors.values())
print(tensors["loc"].tolist())
raw = bytearray(open(sys.argv[1], "rb").read())
raw[-3] ^= 1
open(sys.argv[1], "wb").write(raw)
try:
    pyro_interpolant.io.read(sys.argv[1])
except ValueError as error:
    assert "checksum" in str(error), error
else:
    raise AssertionError("damage that nobody saw")
pyro_interpolant.io.read(sys.argv[2])  # of a type that numpy alone has not
"""


def test_a_file_is_read_by_numpy_alone(path):
    distribution = InterpolantDistribution(random_flow(2), support=constraints.positive)
    short = path.with_name("bfloat16")
    save(distribution, path)
    save(flow().to(torch.bfloat16), short)
    assert load(short).transform.flow.loc.dtype == torch.bfloat16
    command = [sys.executable, "-c", NUMPY_ALONE, str(path), str(short)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.stdout, done.stderr
    assert json.loads(done.stdout) == distribution.transform.flow.loc.tolist()
    last = done.stderr.splitlines()[-1]
    assert re.match("ValueError: .*types that numpy has, got others in .*bfloat16", last)


def test_a_solver_of_ones_own_in_a_file_of_the_first_version_is_not_dropped_in_silence(saved):
    """It was written as a name without numbers."""
    rewrite(saved, lambda header: header.update(format=1, solver=["OwnSolver", None]))
    with pytest.warns(UserWarning, match="OwnSolver of your own"):
        loaded = load(saved)
    assert loaded.transform.solver == FixedGrid()
