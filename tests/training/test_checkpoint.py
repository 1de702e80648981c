"""Long runs: kept on the way, killed, resumed; weights, validation rows, interrupts."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from cases import slow_but
from safetensors.torch import save_file

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ExternalBase,
    InterpolantDistribution,
    Latent,
    Linear,
    VariancePreserving,
    VelocityMLP,
    _torch,
    conditional_interpolant_transform,
    fit,
    from_samples,
    interpolant_transform,
    optimal_transport,
    save,
)
from pyro_interpolant.distributions.fingerprint import identity_of
from pyro_interpolant.training import fitting
from pyro_interpolant.training.checkpoint import Checkpoint
from pyro_interpolant.training.reporting import HeldOutDensity

pytestmark = pytest.mark.usefixtures("_small_runs")

TESTS = str(Path(__file__).parents[1])
QUICK = {"batch_size": 64, "progress": False, "seed": 0, "steps": 40}


def made(dim=2, **options):
    torch.manual_seed(7)
    return InterpolantDistribution(interpolant_transform(dim, (12, 12), **options))


def state_at(path):
    """The state that a file has, of whatever run."""
    return Checkpoint(path, None, [], torch.device("cpu"))


def based(loc):
    flow, base = made().transform, dist.Normal(torch.full((2,), loc), 1.0).to_event(1)
    return InterpolantDistribution(flow, base)


def partly_frozen(seed=7):
    torch.manual_seed(seed)
    flow = InterpolantDistribution(interpolant_transform(2, (12, 12)))
    flow.transform.velocity.layers.requires_grad_(requires_grad=False)
    return flow


def rows(count=300, dim=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, dim, generator=generator)
    return torch.cat((x[:, :1], x[:, 1:] + x[:, :1] ** 2), -1)


def weights_of(distribution):
    return [p.detach().clone() for p in distribution.transform.velocity.parameters()]


class Stop(Exception):
    pass


def stopping(at):
    def callback(state):
        if state.step >= at:
            raise Stop

    return callback


WEIGHTS = torch.linspace(0, 1, 300)
RUNS = {  # what is drawn at each step, how often the state is written, and where a run stops
    "plain": ({"seed": 0}, 7, 20),
    "coupled": ({"seed": None, "coupling": optimal_transport}, None, 20),
    "weighted": ({"seed": 0, "weights": WEIGHTS}, 1, 19),  # of draws ahead, in the middle
}


@pytest.mark.parametrize("name", slow_but(RUNS, "plain"))
def test_a_run_resumes_to_the_same_bits_and_is_not_run_again(name, tmp_path):
    options, every, at = RUNS[name]
    options = {**QUICK, **options}

    def run(seed, **more):
        flow = made()
        torch.manual_seed(seed)
        return fit(flow, rows(), **options, **more), weights_of(flow)

    expected, weights = run(5)
    keep, told = {"checkpoint": tmp_path / "run", "checkpoint_every": every}, []
    with pytest.raises(Stop):
        run(5, callback=stopping(at), **keep)
    result, found = run(99, **keep)  # whatever happened since
    assert all(map(torch.equal, weights, found))
    for field in ("steps", "losses", "validation_losses", "best_step", "solver"):
        assert getattr(result, field) == getattr(expected, field)
    _, again = run(99, callback=told.append, **keep)
    assert not told
    assert all(map(torch.equal, weights, again))


def test_a_run_goes_on_with_the_frozen_weights_that_it_began_with(tmp_path):
    path, whole = tmp_path / "run", partly_frozen()
    fit(whole, rows(), **QUICK)
    with pytest.raises(Stop):
        fit(partly_frozen(), rows(), checkpoint=path, callback=stopping(20), **QUICK)
    again = partly_frozen(seed=8)
    fit(again, rows(), checkpoint=path, **QUICK)
    assert all(map(torch.equal, weights_of(whole), weights_of(again)))


def test_a_run_for_the_noise_goes_on_with_the_flow_that_it_left(tmp_path):
    """The flow has a network of the noise by then, whose first weights are drawn even so."""

    def prepared():
        flow = made(interpolant=Latent(Linear()))
        fit(flow, rows(), **QUICK)
        return flow

    options = {**QUICK, "learn": "noise"}
    expected = fit(prepared(), rows(), **options)
    path, flow = tmp_path / "run", prepared()
    with pytest.raises(Stop):
        fit(flow, rows(), checkpoint=path, callback=stopping(20), **options)
    result = fit(flow, rows(), checkpoint=path, **options)
    assert result.validation_losses == expected.validation_losses


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The state of a finished run, made once."""
    path = tmp_path_factory.mktemp("finished") / "run"
    fit(made(), rows(), checkpoint=path, **QUICK)
    return path


CHANGES = {
    "rate": {"learning_rate": 1e-4},
    "steps": {"steps": 41},
    "batches": {"batch_size": 32},
    "seed": {"seed": 1},
    "data": {"data": lambda: rows() + 1},
    "rows held out": {"validation": 0.2},
    "coupling": {"coupling": optimal_transport},
    "path": {"flow": lambda: made(interpolant=Linear())},
    "base": {"flow": lambda: based(5.0)},
    "frozen weights": {"flow": partly_frozen},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_not_resumed(name, finished, tmp_path):
    change = dict(CHANGES[name])
    shutil.copy(finished, tmp_path / "run")
    data, flow = change.pop("data", rows)(), change.pop("flow", made)()
    with pytest.raises(ValueError, match="expected .* to be of this run, got the state of one"):
        fit(flow, data, checkpoint=tmp_path / "run", **{**QUICK, **change})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # few steps
def test_the_generator_of_a_device_goes_on_too(tmp_path, monkeypatch):
    device, plain = torch.Generator(), _torch._generators  # it stands for that of a GPU
    monkeypatch.setattr(_torch, "_generators", lambda where: [*plain(where), device])

    class There(dist.TorchDistribution):
        def sample(self, sample_shape=()):
            return torch.randn(*sample_shape, 2, generator=device)

        def log_prob(self, value):
            return -value.square().sum(-1) / 2

    def learned(seeds, **options):
        torch.manual_seed(seeds)
        device.manual_seed(seeds)
        base = There(torch.Size(), torch.Size([2]), validate_args=False)
        flow = InterpolantDistribution(made().transform, base)
        torch.manual_seed(seeds)
        fit(flow, rows(), **{**QUICK, "seed": None, "steps": 12, **options})
        return weights_of(flow)

    expected, file = learned(1), tmp_path / "run"
    with pytest.raises(Stop):
        learned(1, checkpoint=file, callback=stopping(6))
    assert all(map(torch.equal, expected, learned(2, checkpoint=file)))


def damaged(path, how):
    whole = path.read_bytes()
    if how == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        place = whole.index(b"step", whole.index(b"position"))
        place = next(i for i in range(place, len(whole)) if whole[i] in b"123456789")
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cut", "number"])
def test_a_damaged_file_is_passed_over_for_the_one_before(how, tmp_path):
    path, whole, again, told = tmp_path / "run", made(), made(), []
    fit(whole, rows(), **QUICK)
    with pytest.raises(Stop):
        fit(made(), rows(), checkpoint=path, callback=stopping(20), **QUICK)
    damaged(path, how)
    assert state_at(path.with_name("run.previous")).numbers["run"]["step"] == 1
    with pytest.warns(UserWarning, match="is damaged: passed over"), pytest.raises(Stop):
        fit(made(), rows(), checkpoint=path, callback=stopping(0), **QUICK)
    assert not path.exists()
    fit(again, rows(), checkpoint=path, callback=lambda s: told.append(s.step), **QUICK)
    assert told[0] == 11  # nothing took the place of the good one
    assert all(map(torch.equal, weights_of(whole), weights_of(again)))


def test_nothing_but_damage_is_an_error(tmp_path):
    path = tmp_path / "run"
    state_at(path).write({"a": torch.ones(2)}, {"n": 1})
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[30] ^= 1  # in the very name that tells a state
    parts = [b"", whole[:7], whole[:20], whole[:60], whole[:-1], bytes(len(whole)), bytes(flipped)]
    for part in parts:
        path.write_bytes(part)
        with (
            pytest.warns(UserWarning, match="is damaged"),
            pytest.raises(ValueError, match="got damaged files.*Delete them to start anew"),
        ):
            fit(made(), rows(), checkpoint=path, **QUICK)
        assert path.read_bytes() == part


OTHERS = {
    "cut flow": lambda path: (save(made(), path), path.write_bytes(path.read_bytes()[:-9])),
    "tensors": lambda path: save_file({"a": torch.ones(3)}, path),
    "text": lambda path: path.write_text("one line of many of somebody's notes\n" * 20),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_of_another_kind_is_refused_and_left_alone(kind, tmp_path):
    """It was called damaged, to be deleted, or moved away."""
    path = tmp_path / "run"
    if "flow" in kind:
        state_at(tmp_path / "run.previous").write({"a": torch.ones(2)}, {"n": 1})
    OTHERS[kind](path)
    whole, files = path.read_bytes(), sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match=r"a state of a run at .*run, got another file: pass an"):
        fit(made(), rows(), checkpoint=path, **QUICK)
    assert path.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == files


def test_a_state_that_another_process_is_replacing_is_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "run"
    for n in range(2):
        state_at(path).write({"a": torch.ones(2)}, {"n": n})
    read = Path.read_bytes

    def moving(self):
        if self.name == "run":
            os.replace(path, path.with_name("run.previous"))
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", moving)
    assert state_at(path).numbers["n"] == 1


@pytest.mark.parametrize("how", ["write", "replace"])
def test_a_snapshot_that_cannot_be_written_leaves_the_old_one(
    how, tmp_path, monkeypatch, full_disk
):
    path = tmp_path / "run"
    state_at(path).write({"a": torch.ones(2)}, {"n": 1})

    def fail(*arguments, **options):
        raise OSError("no space left")

    with monkeypatch.context() as patch, full_disk(4096 if how == "write" else 2**30):
        if how == "replace":
            patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="File too large" if how == "write" else "no space"):
            state_at(path).write({"a": torch.zeros(2)}, {"n": 2})
    assert torch.equal(state_at(path).tensors["a"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert not state_at(tmp_path / "nowhere").tensors


def affine(loc):
    parts = [dist.transforms.AffineTransform(torch.full((2,), loc), 1.0, event_dim=1)]
    return dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), parts)


def scaled(factor, kind=dist):
    """A base whose transforms hold plain numbers, of which one is inverted and was used."""
    part = kind.transforms.AffineTransform(0.0, 3.0 + 1e-9 * factor).inv
    base = kind.Independent(kind.Normal(torch.zeros(2), 1.0), 1)
    return kind.TransformedDistribution(base, [part, part.inv, part])


BASES = {
    "uniform": lambda loc: dist.Uniform(torch.full((2,), loc - 9), 9.0).to_event(1),
    "affine": affine,
    "external": lambda loc: ExternalBase(scaled(loc, torch.distributions)),
}


def test_a_run_from_another_base_is_another_run():
    """Also where the numbers of a base are not those that torch would check."""
    flow = made().transform.flow
    for name, make in BASES.items():
        base = make(0.0)
        one, other = (identity_of(flow, b, None, rows()) for b in (base, make(0.25)))
        base.log_prob(base.sample((3,)).clone())  # of which transforms remember something
        assert one == identity_of(flow, base, None, rows()), name
        assert one == identity_of(flow, make(0.0), None, rows()), name
        assert one != other, name


KILLED = """
import os, signal, sys, torch
import pyro_interpolant as pi
from narrow import small_runs

torch.set_num_threads(1)
small_runs()
torch.manual_seed(0)
path, at, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
x = torch.randn(500, 2)
x[:, 1] += x[:, 0] ** 2
flow = pi.InterpolantDistribution(pi.interpolant_transform(2, (16, 16)))
replace, steps = os.replace, []

def killed(*given):
    os.kill(os.getpid(), signal.SIGKILL)

def look(state):
    steps.append(state.step)
    if state.step >= at:
        if how == "step":
            killed()
        os.replace = killed  # in the middle of the next write

pi.fit(
    flow, x, steps=100, batch_size=64, seed=3, progress=False, callback=look, checkpoint=path,
    checkpoint_every=5,
)
print(steps[0])
flow.report = None  # which tells the time
pi.save(flow, path + ".done")
"""


@pytest.mark.slow
@pytest.mark.release
def test_a_run_that_is_killed_resumes_to_the_same_bits(tmp_path):
    """For real: by SIGKILL, between two steps and in the middle of a write."""
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), TESTS)))

    def run(name, at, how):
        command = [sys.executable, str(script), str(tmp_path / name), str(at), how]
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.run(command, capture_output=True, env=environment, timeout=900)

    assert run("whole", 1000, "step").returncode == 0
    assert run("kept", 30, "step").returncode == -signal.SIGKILL
    assert run("kept", 60, "write").returncode == -signal.SIGKILL
    done = run("kept", 1000, "step")
    assert int(done.stdout) > 50  # it did not start anew
    whole, kept = ((tmp_path / f"{name}.done").read_bytes() for name in ("whole", "kept"))
    assert whole == kept


# ---- interrupts, weights, validation rows -------------------------------------------------------


def test_an_interrupt_keeps_the_best_weights_so_far():
    distribution = made()
    with torch.no_grad():
        before = distribution.log_prob(rows()).mean()
    seen = []

    def callback(state):
        seen.append(state.step)
        if len(seen) == 6:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="run was interrupted"):
        result = fit(distribution, rows(), callback=callback, **{**QUICK, "steps": 100})
    assert result.stopped_early
    assert result.steps == seen
    assert result.best_step > 0
    assert distribution.log_prob(rows()).mean() > before


def test_an_interrupt_in_the_middle_of_a_look_is_followed_by_one(monkeypatch):
    """Else its scores would be missing beside its loss, and of the first look no weights kept."""
    said = []

    def interrupted(self, scores):
        said.append(scores)
        if len(said) == 1:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(HeldOutDensity, "text", interrupted)
    with pytest.warns(UserWarning, match="the run was interrupted"):
        result = fit(made(), rows(), **QUICK)
    assert result.stopped_by == "interrupt"
    assert len(result.steps) == len(result.losses) == len(result.validation_losses) == 1
    assert len(said) == 2


@pytest.mark.slow
def test_an_interrupt_while_the_solver_is_calibrated_keeps_the_weights(monkeypatch):
    def interrupted(*given, **options):
        raise KeyboardInterrupt

    expected, flow = made(), made()
    fit(expected, rows(), **QUICK)
    monkeypatch.setattr(fitting, "calibrated", interrupted)
    with pytest.warns(UserWarning, match="calibration was interrupted"):
        result = fit(flow, rows(), **QUICK)
    assert result.solver is flow.transform.solver
    assert all(map(torch.equal, weights_of(expected), weights_of(flow)))


@pytest.mark.filterwarnings("ignore:the fit came out wrong")  # few steps
@pytest.mark.parametrize("name", ["calibrated", "HeldOutDensity.measured", "warn_if_draws_differ"])
def test_what_fails_after_the_last_step_keeps_the_weights(name, monkeypatch):
    def failing(*given, **options):
        raise torch.OutOfMemoryError("no memory is left")

    def learn():
        torch.manual_seed(0)
        options = {**QUICK, "steps": 5, "network": VelocityMLP(2, (8,)), "marginals": False}
        return from_samples(rows(), **options)

    expected = learn()
    monkeypatch.setattr(f"pyro_interpolant.training.fitting.{name}", failing)
    with pytest.warns(UserWarning, match="failed: the weights are trained.*no memory is left"):
        learned = learn()
    assert learned.report.steps == 5
    assert all(map(torch.equal, weights_of(expected), weights_of(learned)))


@pytest.mark.slow
def test_rows_of_no_weight_are_absent_and_counts_are_weights():
    x = torch.cat((rows(), torch.full((700, 2), torch.nan)))
    weights = torch.cat((torch.ones(300), torch.zeros(700)))
    first, *others = (made() for _ in range(3))
    fit(first, rows(), weights=torch.ones(300), **QUICK)
    for other, w in zip(others, (weights.bool(), 1e-30 * weights.float()), strict=True):
        fit(other, x, weights=w, **QUICK)
        assert all(map(torch.equal, weights_of(first), weights_of(other)))


@pytest.mark.parametrize("streamed", [False, True])
def test_held_out_rows_of_a_frame_tell_one_run_from_another(streamed, tmp_path):
    """Those of an iterable, too, which are no part of what it gives."""
    held = pd.DataFrame(rows(60).numpy(), columns=["a", "b"])
    data = list(rows().split(100)) if streamed else rows()
    options = {**QUICK, "steps": 2, "tolerance": 1e3, "checkpoint": tmp_path / "run"}
    with warnings.catch_warnings(action="ignore"):  # a list has no place to resume from
        fit(made(), data, validation=held, **options)
        fit(made(), data, validation=held, **options)
        with pytest.raises(ValueError, match="to be of this run, got the state of one"):
            fit(made(), data, validation=held + 0.1, **options)


def test_validation_rows_of_ones_own_are_none_of_those_trained_on():
    x, held, context = rows(300), rows(400)[300:], torch.rand(400, 1)
    family = ConditionalInterpolantDistribution(conditional_interpolant_transform(2, 1, (8,)))
    flow, options = made(), {**QUICK, "steps": 3}
    fit(flow, x, validation=held, **options)
    fit(family, x, context=context[:300], validation=(held, context[300:]), **options)
    for each in (flow, family):
        torch.testing.assert_close(each.transform.flow.loc, x.mean(0))


@pytest.mark.slow
def test_a_run_on_another_path_is_another_run(tmp_path):
    paths = [lambda t: t**2, lambda t: 1 - (1 - t) ** 2]
    x, options = torch.randn(300, 2), {**QUICK, "steps": 5, "checkpoint": tmp_path / "run.state"}

    def flow(function):
        path = VariancePreserving(function)
        return InterpolantDistribution(interpolant_transform(2, (8,), interpolant=path))

    fit(flow(paths[0]), x, **options)
    fit(flow(paths[0]), x, **options)  # the same one is read
    with pytest.raises(ValueError, match="of this run"):
        fit(flow(paths[1]), x, **options)


def test_what_a_coupling_holds_tells_runs_apart():
    def tell(coupling):
        return identity_of(interpolant_transform(2, (8,)).flow, None, coupling)

    def scaled(scale):
        return lambda x0, x1, context=None: optimal_transport(scale * x0, x1, context)

    class Scaled:
        def __init__(self, scale):
            self.scale = scale

        __call__ = optimal_transport

    for make in (lambda scale: functools.partial(optimal_transport, scale=scale), scaled, Scaled):
        for one, other in ((1.0, 2.0), (torch.zeros(2), torch.ones(2))):
            assert tell(make(one)) == tell(make(one)) != tell(make(other))


def test_a_run_in_another_type_is_refused(tmp_path):
    x, options = rows(100), {**QUICK, "steps": 3, "checkpoint": tmp_path / "run"}
    fit(made(), x.float(), **options)
    other = made().to(torch.float32)
    before = other.transform.flow.loc.clone()
    with pytest.raises(ValueError, match=r"in torch.float32, got .* in torch.float64: call dist"):
        fit(other, x.float(), **options)
    assert torch.equal(other.transform.flow.loc, before)
