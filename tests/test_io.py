import dataclasses
import errno
import json
import os
import re
import struct
import subprocess
import sys
from functools import partial

import pyro.distributions as dist
import pytest
import safetensors.torch
import torch
from cases import DIVERGENCES, INTERPOLANTS, SOLVERS, SUPPORTS, random_flow, slow_but
from pyro.distributions import constraints
from safetensors.torch import save_file
from torch import nn

import pyro_interpolant
from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    FixedGrid,
    HutchinsonDivergence,
    Interpolant,
    InterpolantDistribution,
    InterpolantTransform,
    JointInterpolantDistribution,
    Linear,
    Samples,
    _files,
    load,
    save,
)
from pyro_interpolant import io as module
from pyro_interpolant.transport.distillation import StudentTransforms

KEY = "pyro_interpolant"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


def round_trip(distribution, path, **kwargs):
    save(distribution, path)
    return load(path, **kwargs)


def assert_same(distribution, again, *context):
    """Equal densities and draws, bitwise; equal choices, state and flags."""
    before, after = distribution.transform, again.transform
    assert type(again) is type(distribution)
    for choice in ("interpolant", "solver", "divergence"):
        assert getattr(after, choice) == getattr(before, choice), choice
    state = before.state_dict()
    assert after.state_dict().keys() == state.keys()
    for name, value in after.state_dict().items():
        assert torch.equal(value, state[name]), name
        assert value.dtype == state[name].dtype, name
    assert [p.requires_grad for p in after.parameters()] == [
        p.requires_grad for p in before.parameters()
    ]
    draws = []
    for d in (distribution, again):
        torch.manual_seed(1)
        given = d.condition(*context) if context else d
        draws.append(given.sample((4,)))
    assert torch.equal(*draws)
    x = draws[0].clone()
    values = [
        (d.condition(*context) if context else d).log_prob(x.clone())
        for d in (distribution, again)
    ]
    assert torch.equal(*values)
    assert torch.isfinite(values[0]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("hidden_dims", [(8,), (8, 9), (8, 8, 8)])
def test_weights_and_whitening(hidden_dims, dtype, path):
    distribution = InterpolantDistribution(random_flow(3, hidden_dims).to(dtype))
    distribution.transform.velocity.reach.fill_(7.5)
    assert_same(distribution, round_trip(distribution, path))


@pytest.mark.parametrize("frozen", [True, False])
def test_the_frozen_flag(frozen, path):
    distribution = InterpolantDistribution(random_flow(2))
    if frozen:
        distribution.freeze()
    again = round_trip(distribution, path)
    assert_same(distribution, again)
    assert all(p.requires_grad != frozen for p in again.transform.parameters())


@pytest.mark.parametrize("name", SUPPORTS)
def test_supports(name, path):
    case = SUPPORTS[name]
    distribution = InterpolantDistribution(random_flow(case.dim), support=case.support)
    again = round_trip(distribution, path)
    assert_same(distribution, again)
    assert again.event_shape == case.event_shape


MORE_SUPPORTS = {
    "bounds by column": constraints.interval(
        torch.tensor([0.1, -1.0], dtype=torch.float64),
        torch.tensor([1.0, 5.7], dtype=torch.float64),
    ),
    "independent interval": constraints.independent(constraints.interval(0.1, 0.7), 1),
    "nested stack": constraints.stack(
        [constraints.greater_than(2.0), constraints.independent(constraints.real, 0)], dim=-1
    ),
    "real": constraints.real,
    "unprintable": constraints.interval(0.1 + 0.2, 1e300 / 3),
}


@pytest.mark.parametrize("name", MORE_SUPPORTS)
def test_more_supports(name, path):
    distribution = InterpolantDistribution(random_flow(2), support=MORE_SUPPORTS[name])
    assert_same(distribution, round_trip(distribution, path))


def test_bounds_keep_their_precision_whatever_the_default_type(path):
    distribution = InterpolantDistribution(
        random_flow(2), support=MORE_SUPPORTS["bounds by column"]
    )
    save(distribution, path)
    torch.set_default_dtype(torch.float32)
    again = load(path)
    torch.set_default_dtype(torch.float64)
    assert_same(distribution, again)


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_interpolants(name, path):
    distribution = InterpolantDistribution(random_flow(2, interpolant=INTERPOLANTS[name]))
    assert_same(distribution, round_trip(distribution, path))


@pytest.mark.parametrize("name", slow_but(SOLVERS, "rk4", "warped", "random"))
def test_solvers(name, path):
    distribution = InterpolantDistribution(random_flow(2, solver=SOLVERS[name]))
    assert_same(distribution, round_trip(distribution, path))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences(name, path):
    distribution = InterpolantDistribution(random_flow(3, divergence=DIVERGENCES[name]))
    assert_same(distribution, round_trip(distribution, path))


@pytest.mark.parametrize("support", [constraints.real_vector, constraints.positive], ids=str)
def test_conditional_flows(support, path):
    distribution = ConditionalInterpolantDistribution(
        random_flow(2, context_dim=3), support=support
    )
    distribution.transform.velocity.set_scales(torch.randn(50, 2), 9 * torch.randn(50, 3) + 4)
    assert_same(distribution, round_trip(distribution, path), torch.randn(3))


def test_joint_sites(path):
    sites = {
        "scale": ((), constraints.positive),
        "weights": ((3,), constraints.simplex),
        "matrix": ((2, 2), constraints.real),
        "share": ((1,), constraints.interval(-1.0, 2.0)),
    }
    distribution = JointInterpolantDistribution(random_flow(8), sites=sites)
    again = round_trip(distribution, path)
    assert_same(distribution, again)
    x = distribution.sample((3,))
    before, after = distribution.unpack(x), again.unpack(x)
    assert list(before) == list(after) == list(sites)
    for name, value in before.items():
        assert torch.equal(value, after[name])


def with_cached_factors():
    base = dist.MultivariateNormal(torch.ones(2), torch.tensor([[2.0, 0.3], [0.3, 1.0]]))
    assert base.precision_matrix.shape == base.scale_tril.shape  # both are now stored
    return base


BASES = {
    "normal": lambda: dist.Normal(torch.zeros(2), torch.tensor([1.0, 2.0])).to_event(1),
    "expanded": lambda: dist.Normal(0.0, 2.0).expand((2,)).to_event(1),
    "student": lambda: dist.StudentT(torch.full((2,), 5.0), torch.ones(2), 1.0).to_event(1),
    "laplace": lambda: dist.Laplace(torch.ones(2), torch.ones(2)).to_event(1),
    "covariance": lambda: dist.MultivariateNormal(torch.ones(2), 2 * torch.eye(2) + 0.3),
    "triangular": lambda: dist.MultivariateNormal(torch.ones(2), scale_tril=2 * torch.eye(2)),
    "precision": lambda: dist.MultivariateNormal(torch.ones(2), precision_matrix=torch.eye(2)),
    "cached factors": with_cached_factors,
}


@pytest.mark.parametrize("name", BASES)
def test_bases(name, path):
    distribution = InterpolantDistribution(random_flow(2), BASES[name]())
    again = round_trip(distribution, path)
    assert type(again.base) is type(distribution.base)
    assert_same(distribution, again)
    x = torch.randn(5, 2)
    assert torch.equal(again.at(0.0).log_prob(x), distribution.at(0.0).log_prob(x))


def test_a_base_that_is_a_flow_with_a_base(path):
    inner = InterpolantDistribution(random_flow(2), BASES["covariance"]())
    inner.transform.solver = FixedGrid(steps=5)
    outer = InterpolantDistribution(random_flow(2), inner, support=constraints.positive)
    again = round_trip(outer, path)
    assert_same(outer, again)
    assert_same(inner, again.base)


def test_a_base_that_no_name_describes_is_refused(path):
    class Mine(dist.Normal):
        pass

    base = Mine(torch.zeros(2), torch.ones(2)).to_event(1)
    with pytest.raises(
        ValueError, match="a base from pyro.distributions, samples or a flow, got a Mine"
    ):
        save(InterpolantDistribution(random_flow(2), base), path)
    assert os.listdir(path.parent) == []


class OwnVelocity(nn.Module):
    event_dim = 2

    def __init__(self, width=4):
        super().__init__()
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, t, x, context=None):
        return self.last(self.first(torch.cat((x, t[..., None]), -1)).tanh())


class OwnInterpolant(Interpolant):
    def coefficients(self, t):
        return (1 - t) ** 2, t**2, torch.zeros_like(t)


def test_a_velocity_of_ones_own_is_passed_in(path):
    distribution = InterpolantDistribution(InterpolantTransform(OwnVelocity()))
    assert_same(distribution, round_trip(distribution, path, velocity=OwnVelocity()))
    with pytest.raises(ValueError, match=r"a OwnVelocity: pass .*velocity=OwnVelocity\(\.\.\.\)"):
        load(path)
    with pytest.raises(ValueError, match="OwnVelocity.*got a Linear"):
        load(path, velocity=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"(?s)^expected a OwnVelocity as it was.*size mismatch"):
        load(path, velocity=OwnVelocity(width=5))


def test_an_interpolant_of_ones_own_is_passed_in(path):
    own = OwnInterpolant()
    distribution = InterpolantDistribution(random_flow(2, interpolant=own))
    assert_same(distribution, round_trip(distribution, path, interpolant=own))
    with pytest.raises(ValueError, match="the flow's interpolant is a OwnInterpolant: pass an"):
        load(path)
    with pytest.raises(ValueError, match="interpolant is a OwnInterpolant.*got a Linear"):
        load(path, interpolant=Linear())


@pytest.mark.parametrize("view", ["at", "condition"])
def test_a_flow_that_owns_no_weights_is_refused(view, path):
    distribution = (
        InterpolantDistribution(random_flow(2)).at(0.5)
        if view == "at"
        else ConditionalInterpolantDistribution(random_flow(2, context_dim=1)).condition(
            torch.zeros(1)
        )
    )
    with pytest.raises(
        ValueError, match="a flow that owns its weights: save the one it came from"
    ):
        save(distribution, path)
    assert not path.exists()


def test_what_to_save_of_a_student_is_said(path):
    student = StudentTransforms([dist.transforms.AffineTransform(0.0, 2.0)]).over(torch.zeros(2))
    with pytest.raises(TypeError, match=r"got Student: .* torch.save\(.*, as the student of a fl"):
        save(student, path)
    assert not path.exists()


@pytest.mark.parametrize("kind", ["AutoInterpolant", "AmortizedInterpolant"])
def test_what_to_save_of_a_guide_is_said(kind, path):
    guide = getattr(pyro_interpolant, kind)(lambda: None)
    with pytest.raises(TypeError, match=rf"got {kind}: of a guide, save its get_posterior\(\)"):
        save(guide, path)
    assert not path.exists()


@pytest.mark.parametrize("kind", [str, lambda p: p])
def test_paths_of_both_kinds(kind, path):
    distribution = InterpolantDistribution(random_flow(2))
    save(distribution, kind(path))
    assert_same(distribution, load(kind(path)))


def test_loading_draws_nothing_from_the_global_generator(path):
    save(InterpolantDistribution(random_flow(2)), path)
    state = torch.get_rng_state()
    load(path)
    assert torch.equal(state, torch.get_rng_state())


# ---- files that are not good --------------------------------------------------------------------


def parts(path):
    """The header of our format and the tensors of a file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return json.loads(file.metadata()[KEY]), tensors


def rewrite(path, change):
    header, tensors = parts(path)
    text = change(header)
    module.write(path, tensors, {KEY: text if isinstance(text, str) else json.dumps(header)})


@pytest.fixture
def saved(path):
    save(InterpolantDistribution(random_flow(2), BASES["normal"]()), path)
    return path


@pytest.mark.parametrize("name", ["nowhere.safetensors", "nowhere/flow.safetensors"])
def test_a_missing_file(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / name)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 0.5, 0.99])
def test_a_truncated_file(keep, saved):
    data = saved.read_bytes()
    saved.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])
    with pytest.raises(ValueError, match=r"flow.safetensors is damaged"):
        load(saved)


def test_a_file_of_noise(path):
    path.write_bytes(os.urandom(2000))
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load(path)


def test_a_pickle_is_not_opened(path):
    torch.save({"loc": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        load(path)


def test_a_length_that_lies(saved):
    data = saved.read_bytes()
    saved.write_bytes(struct.pack("<Q", 2**60) + data[8:])
    with pytest.raises(ValueError, match="damaged"):
        load(saved)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_somebody_else(metadata, path):
    save_file({"a": torch.zeros(3)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="not of a pyro_interpolant flow"):
        load(path)


@pytest.mark.parametrize("version", [3, 99, 0, "1", None])
def test_another_format(version, saved):
    rewrite(saved, lambda header: header.update(format=version))
    with pytest.raises(ValueError, match=f"format {version}.*reads formats up to 2"):
        load(saved)


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", "3", '"a"', "{}", "\x00", "[" * 100_000, '{"format": 1}']
)
def test_a_header_of_garbage(text, saved):
    rewrite(saved, lambda header: text)
    with pytest.raises(ValueError, match="damaged"):
        load(saved)


EVIL = ["os.system", "eval", "__import__", "builtins.exec", "torch.load", "nn", "__class__", "Foo"]


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize(
    "field", ["class", "interpolant", "solver", "divergence", "support", "base"]
)
def test_a_class_name_from_a_stranger_is_refused(field, name, saved, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("the file ran code")

    monkeypatch.setattr(os, "system", forbidden)
    monkeypatch.setattr(torch, "load", forbidden)

    def change(header):
        value = name
        if field in ("interpolant", "solver", "divergence"):
            value = [name, {}]
        if field == "base":
            value = {"class": name, "arguments": []}
        header[field] = value

    rewrite(saved, change)
    with pytest.raises(ValueError, match=r"in the file|damaged or was edited"):
        load(saved)


def fuzz(value):
    """Every header that differs from a good one in a single place."""
    wrong = [None, -1, 10**30, 1.5, "x", [], ["x", "y", "z"], {}, {"x": 1}, True]
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        items = []
    for key, inner in items:
        for change in wrong:
            copied = value.copy()
            copied[key] = change
            yield copied
        for changed in fuzz(inner):
            copied = value.copy()
            copied[key] = changed
            yield copied
        if isinstance(value, dict):
            yield {k: v for k, v in value.items() if k != key}


EDITED = {
    "base": lambda: InterpolantDistribution(random_flow(2), BASES["normal"]()),
    "interval": lambda: InterpolantDistribution(
        random_flow(2), support=constraints.interval(0.0, 1.0)
    ),
    "stack": lambda: InterpolantDistribution(random_flow(2), support=SUPPORTS["stack"].support),
    "joint": lambda: JointInterpolantDistribution(
        random_flow(3),
        sites={
            "a": ((), constraints.positive),
            "b": ((2,), constraints.independent(constraints.real, 1)),
        },
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EDITED)
@pytest.mark.filterwarnings("ignore:the flow was saved with")  # a flow, and a clear word
def test_an_edited_header_gives_a_clear_error_or_a_flow(name, path, monkeypatch):
    save(EDITED[name](), path)
    header, tensors = parts(path)
    del header["format"]
    surprises = []
    for edited in fuzz(header):
        try:
            edited = json.loads(json.dumps(edited))
            monkeypatch.setattr(module, "read", lambda *a, h=edited, **k: (h, dict(tensors)))
            load(path)
        except ValueError:
            continue
        except Exception as error:  # noqa: BLE001  (whatever else escapes is the finding)
            changed = {k: v for k, v in edited.items() if v != header.get(k)}
            surprises.append((type(error).__name__, str(error)[:60], str(changed)[:80]))
    assert not surprises, f"{len(surprises)} escaped: {surprises[:20]}"


@pytest.mark.parametrize("change", ["missing", "shape", "extra"])
def test_edited_tensors(change, saved):
    header, tensors = parts(saved)
    if change == "missing":
        del tensors["loc"]
    elif change == "shape":
        tensors["loc"] = torch.zeros(3)
    else:
        tensors["surprise"] = torch.zeros(3)
    module.write(saved, tensors, {KEY: json.dumps(header)})
    with pytest.raises(ValueError, match=r"(?s)damaged or was edited.*(loc|dimensions|surprise)"):
        load(saved)


# ---- atomic -------------------------------------------------------------------------------------


def fail(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("existed", [True, False])
def test_a_write_that_fails_leaves_what_was_there(step, existed, path, monkeypatch, full_disk):
    old = InterpolantDistribution(random_flow(2))
    if existed:
        save(old, path)
    new = InterpolantDistribution(random_flow(2))
    with monkeypatch.context() as patch, full_disk(4096 if step == "write" else 2**30):
        if step != "write":
            patch.setattr(os, step, fail)
        message = "File too large" if step == "write" else "No space"
        with pytest.raises(OSError, match=f"{message}.*flow.safetensors"):
            save(new, path)
    assert os.listdir(path.parent) == (["flow.safetensors"] if existed else [])
    if existed:
        assert_same(old, load(path))


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o666, 0o400])
def test_a_file_that_is_replaced_keeps_its_mode(mode, path):
    save(InterpolantDistribution(random_flow(2)), path)
    path.chmod(mode)
    new = InterpolantDistribution(random_flow(3))
    try:
        path.open("r+b").close()
    except PermissionError:  # nobody but root may write it
        with pytest.raises(PermissionError):
            save(new, path)
        assert load(path).event_shape == (2,)
    else:
        save(new, path)
        assert load(path).event_shape == (3,)
    assert path.stat().st_mode & 0o7777 == mode


def test_a_private_file_is_never_open_to_others(path, monkeypatch):
    """Not while it is written, either."""
    save(InterpolantDistribution(random_flow(2)), path)
    path.chmod(0o600)
    seen, fsync = [], os.fsync

    def look(handle):
        seen.append(os.fstat(handle).st_mode & 0o777)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    save(InterpolantDistribution(random_flow(2)), path)
    assert seen == [0o600]


def test_the_umask_of_the_process_is_left_alone(path, monkeypatch):
    """Files that other threads make in the meantime would have been open to all."""
    monkeypatch.setattr(os, "umask", fail)
    save(InterpolantDistribution(random_flow(2)), path)


@pytest.mark.parametrize("absolute", [True, False])
def test_behind_a_symbolic_link_the_file_is_replaced(absolute, tmp_path):
    """Whatever folder it is in, and if there is none yet."""
    (tmp_path / "runs").mkdir()
    target, link = tmp_path / "runs" / "run-12", tmp_path / "current"
    link.symlink_to(target if absolute else "runs/run-12")
    for dim in (2, 3):
        save(InterpolantDistribution(random_flow(dim)), link)
        assert link.is_symlink()
        assert not target.is_symlink()
        assert load(target).event_shape == load(link).event_shape == (dim,)
        target.chmod(0o600)
    assert target.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["current", "runs"]
    assert os.listdir(tmp_path / "runs") == ["run-12"]


def test_a_link_to_itself_is_an_os_error(path):
    path.symlink_to(path.name)
    with pytest.raises(OSError, match="symbolic links"):
        save(InterpolantDistribution(random_flow(2)), path)
    assert path.is_symlink()


@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo], ids=["folder", "fifo"])
def test_what_is_no_file_is_not_replaced(make, path):
    make(path)
    before = path.stat().st_mode
    with pytest.raises(OSError, match="flow.safetensors"):
        save(InterpolantDistribution(random_flow(2)), path)
    assert path.stat().st_mode == before
    assert os.listdir(path.parent) == [path.name]


def test_what_cannot_be_read_is_not_called_damaged(path):
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        load(path)


@pytest.mark.parametrize("change", ["overwritten", "cut"])
def test_a_flow_is_its_own_whatever_happens_to_its_file(change, path):
    """A base that was mapped into memory changed with the file, or ended the process."""
    save(InterpolantDistribution(random_flow(2), Samples(torch.randn(5000, 2))), path)
    again = load(path)
    before = again.base.rows.clone()
    with open(path, "r+b") as file:
        if change == "cut":
            file.truncate(100)
        else:
            file.write(b"\0" * path.stat().st_size)
    assert torch.equal(again.base.rows, before)


def test_an_existing_file_is_replaced(path):
    save(InterpolantDistribution(random_flow(2)), path)
    new = InterpolantDistribution(random_flow(3))
    assert_same(new, round_trip(new, path))
    assert os.listdir(path.parent) == ["flow.safetensors"]


def test_a_folder_that_is_not_there_is_an_os_error(tmp_path):
    path = tmp_path / "nowhere" / "flow.safetensors"
    with pytest.raises(FileNotFoundError) as raised:
        save(InterpolantDistribution(random_flow(2)), path)
    assert raised.value.filename == str(path)


def test_the_longest_names_that_a_file_can_have(tmp_path):
    name = "é" * 127 + "x"
    module.write(tmp_path / name, {"a": torch.zeros(2)}, {})
    assert os.listdir(tmp_path) == [name]


@pytest.mark.slow
def test_others_may_read_the_file_as_far_as_the_umask_lets_them(path):
    previous = os.umask(0o022)
    try:
        save(InterpolantDistribution(random_flow(2)), path)
    finally:
        os.umask(previous)
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_file_holds_no_pickle(saved):
    assert b"pickle" not in saved.read_bytes()
    assert pyro_interpolant.io._FORMAT == 2


def test_what_is_replaced_can_be_kept(tmp_path):
    new, previous = tmp_path / "state", tmp_path / "previous"
    module.write(new, {"a": torch.zeros(2)}, {"n": "1"}, previous=previous)
    assert not previous.exists()
    for n in (2, 3):
        module.write(new, {"a": torch.full((2,), float(n))}, {"n": str(n)}, previous=previous)
        assert safetensors.torch.load_file(new)["a"].tolist() == [n, n]
    assert safetensors.torch.load_file(previous)["a"].tolist() == [2.0, 2.0]
    assert sorted(os.listdir(tmp_path)) == ["previous", "state"]


def test_a_failure_between_the_two_names_loses_neither(tmp_path, monkeypatch):
    """The old file has moved to its second name, the new one not yet to the first."""
    new, previous = tmp_path / "state", tmp_path / "previous"
    module.write(new, {"a": torch.zeros(2)}, {})
    replace = os.replace

    def fail(source, target):
        if target == new:
            raise OSError("No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        module.write(new, {"a": torch.ones(2)}, {}, previous=previous)
    monkeypatch.undo()
    assert safetensors.torch.load_file(previous)["a"].tolist() == [0.0, 0.0]
    assert os.listdir(tmp_path) == ["previous"]


def test_two_processes_write_one_file(tmp_path, monkeypatch):
    """The second does all of it between the first one's two renames, at its worst."""
    new, previous = tmp_path / "state", tmp_path / "previous"
    module.write(new, {"a": torch.zeros(2)}, {})
    replace, scratches = os.replace, []

    def interleaved(source, target):
        if target == new:
            scratches.append(source.name)
            if len(scratches) == 1:
                module.write(new, {"a": torch.ones(2)}, {}, previous=previous)
        elif not scratches:  # the other has just moved the old file
            replace(source, target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interleaved)
    module.write(new, {"a": torch.full((2,), 2.0)}, {}, previous=previous)
    assert len(set(scratches)) == 2
    assert all(f".{os.getpid()}." in name for name in scratches)
    assert safetensors.torch.load_file(new)["a"].tolist() == [2.0, 2.0]
    assert safetensors.torch.load_file(previous)["a"].tolist() == [0.0, 0.0]
    assert sorted(os.listdir(tmp_path)) == ["previous", "state"]


@pytest.mark.parametrize("name", ["state", "state.a+(1)"])
def test_what_killed_processes_left_is_removed_once_it_is_old(name, tmp_path):
    file, other = name, name.replace(".", "-") + "2"
    old = [f".{file}.partial", f".{file}.12.0a1b2c3d.partial"]
    others = [f".{file}.13.0a1b2c3d.partial", f".{other}.12.0a1b2c3d.partial"]
    others.append(f".{file}.zip.partial")
    for name in (*old, *others):
        (tmp_path / name).touch()
        if name != others[0]:  # which may be another process's, at work
            os.utime(tmp_path / name, (0, 0))
    module.write(tmp_path / file, {"a": torch.ones(2)}, {})
    assert sorted(os.listdir(tmp_path)) == sorted([file, *others])


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
    header, tensors = module.read(path, framework=framework)
    assert (header["n"], tensors["a"].tolist()) == (0, [0.0] * 3)
    header, tensors = module.read(path, framework=framework)
    assert (header["n"], tensors["a"].tolist()) == (1, [1.0] * 3)


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
    inner = InterpolantDistribution(random_flow(2, divergence=HutchinsonDivergence(3, seed=5)))
    outer = random_flow(2, divergence=HutchinsonDivergence(4, seed=6))
    distribution = InterpolantDistribution(outer, inner)
    save(distribution, path)
    _, arrays = module.read(path)
    for name, flow in (("", distribution), ("base.", inner)):
        probes = torch.as_tensor(arrays[f"{name}divergence.probes"]).double()
        divergence = flow.transform.divergence
        assert probes.shape == (divergence.probes, 2)
        x = torch.randn(5, 2)
        jacobian = torch.func.vmap(torch.func.jacrev(partial(at_half, flow.transform.velocity)))(x)
        expected = torch.einsum("pi,nij,pj->pn", probes, jacobian, probes).mean(0)
        found = divergence(flow.transform.velocity, torch.tensor(0.5), x, None)
        torch.testing.assert_close(found, expected)
    assert_same(distribution, load(path))


def at_half(velocity, x):
    return velocity(torch.tensor(0.5), x)


def test_other_probes_than_the_flows_are_refused(path):
    """A generator that draws others would make another density of the file."""
    save(InterpolantDistribution(random_flow(2, divergence=HutchinsonDivergence(3))), path)
    header, tensors = parts(path)
    tensors["divergence.probes"][0, 0] *= -1
    module.write(path, tensors, {KEY: json.dumps(header)})
    with pytest.raises(ValueError, match="the probes of HutchinsonDivergence"):
        load(path)


# ---- without torch ------------------------------------------------------------------------------

NUMPY_ALONE = """
import sys
for name in ("torch", "pyro", "jax", "scipy"):
    sys.modules[name] = None  # importing it is an error
import numpy
import pyro_interpolant
header, tensors = pyro_interpolant.io.read(sys.argv[1])
assert header["class"] == "InterpolantDistribution" and header["dim"] == 2
assert header["support"] == "positive"
assert all(isinstance(tensor, numpy.ndarray) for tensor in tensors.values())
nodes, weights = pyro_interpolant.solvers.clenshaw_curtis(4)
assert isinstance(nodes, numpy.ndarray) and abs(weights.sum() - 1) < 1e-14
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
"""


def test_a_file_is_read_by_numpy_alone(path):
    flow = InterpolantDistribution(random_flow(2), support=constraints.positive)
    save(flow, path)
    done = subprocess.run(
        [sys.executable, "-c", NUMPY_ALONE, str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == flow.transform.flow.loc.tolist()


def test_headers_and_tensors_are_the_same_for_both_readers(path):
    save(InterpolantDistribution(random_flow(2), BASES["normal"]()), path)
    (header, arrays), (again, tensors) = module.read(path), module.read(path, framework="pt")
    assert header == again
    assert arrays.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(torch.as_tensor(arrays[name]), tensor), name


def test_numpy_has_not_all_types(path):
    save(InterpolantDistribution(random_flow(2)).to(torch.bfloat16), path)
    assert load(path).transform.flow.loc.dtype == torch.bfloat16
    # In a process of its own: once jax is imported, numpy has this one too.
    code = f"from pyro_interpolant import io; io.read({str(path)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    found = done.stderr.splitlines()[-1]
    assert re.match("ValueError: .*types that numpy has, got others in .*bfloat16", found)


@dataclasses.dataclass(frozen=True)
class OwnSolver:
    """A user's own solver, which a file cannot hold."""

    def grid(self):
        return FixedGrid(4).grid()

    def solve(self, field, x, times):
        return FixedGrid(4).solve(field, x, times)


@pytest.mark.parametrize("choice", ["solver", "divergence"])
def test_a_choice_of_ones_own_is_refused(choice, path):
    distribution = InterpolantDistribution(random_flow(2))
    setattr(distribution.transform, choice, OwnSolver())
    with pytest.raises(ValueError, match=f"a {choice} of this package, got a OwnSolver"):
        save(distribution, path)
    assert not path.exists()


def test_a_solver_of_ones_own_in_a_file_of_the_first_version_is_not_dropped_in_silence(saved):
    """It was written as a name without numbers."""
    rewrite(saved, lambda header: header.update(format=1, solver=["OwnSolver", None]))
    with pytest.warns(UserWarning, match="OwnSolver of your own"):
        loaded = load(saved)
    assert loaded.transform.solver == FixedGrid()
