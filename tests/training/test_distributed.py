"""Several processes: shares of a batch, and for real, two processes over gloo."""

import copy
import importlib.util
import json
import math
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Barrier
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from forking import forks

from pyro_interpolant import (
    InterpolantDistribution,
    Latent,
    SineSquared,
    Trigonometric,
    fit,
    interpolant_transform,
    optimal_transport,
)
from pyro_interpolant.distributions.bases import WhitenedBase
from pyro_interpolant.interpolants.couplings import independent
from pyro_interpolant.training.distributed import Process
from pyro_interpolant.training.objective import Objective
from pyro_interpolant.training.rows import Rows
from pyro_interpolant.training.shards import shares_of_weight
from pyro_interpolant.training.streaming import Stream
from pyro_interpolant.training.survey import Survey

# By the scripts, and by the first optimiser of a process.
IMPORTED = ("lightning_fabric", "torch._dynamo", "pyro_interpolant.training")
HAS_FABRIC = importlib.util.find_spec("lightning_fabric") is not None
needs_fabric = pytest.mark.skipif(not HAS_FABRIC, reason="without the extra [distributed]")


def in_processes(test):
    """Mark what looks at the runs in processes of their own."""
    return pytest.mark.slow(needs_fabric(test))


def objective(rank=0, world=1, *, own=False, coupling=independent, latent=False):
    path = Latent(Trigonometric(), SineSquared()) if latent else None
    flow = InterpolantDistribution(interpolant_transform(2, (8,), interpolant=path)).transform
    process = Process(own_rows=own)
    process.rank, process.world = rank, world
    return Objective(flow.flow, WhitenedBase(None, flow.flow.whitening), coupling, process)


def in_threads(world, function):
    """Return what a function of a process returns, or raises, in each of several threads."""
    barrier, sent, device = Barrier(world, timeout=900), {}, torch.device("cpu")

    def broadcast(value, src=0, *, rank):
        if rank == src:
            sent[0] = value
        barrier.wait()
        value = sent[0]
        barrier.wait()
        return value

    def run(rank):
        names = ("setup", "backward", "all_reduce", "barrier")
        fabric = SimpleNamespace(**dict.fromkeys(names), world_size=world, device=device)
        fabric.global_rank, fabric.broadcast = rank, partial(broadcast, rank=rank)
        try:
            return function(Process(fabric, own_rows=True))
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, range(world)))


class Draw(NamedTuple):
    t: Any
    w0: Any
    w1: Any
    context: Any
    z: Any


def draw(made, rows):
    *parts, own, _ = made._pairs(rows, made.base, made.process)
    return Draw(*(None if part is None else part[own] for part in parts))


@pytest.mark.parametrize(("world", "latent", "own"), [(2, True, True), (4, False, False)])
def test_shares_are_disjoint_and_make_up_the_whole_draw(world, latent, own):
    x = torch.randn(256, 2)
    torch.manual_seed(4)
    whole = draw(objective(latent=latent), Rows(x, x[:, :1]))
    parts = []
    for rank in range(world):
        torch.manual_seed(4)
        mine = x.chunk(world)[rank] if own else x
        made = objective(rank, world, own=own, latent=latent)
        parts.append(draw(made, Rows(mine, mine[:, :1])))
    for name in ("t", "w0", "w1", "context", *(["z"] if latent else [])):
        joined = torch.cat([getattr(part, name) for part in parts])
        joined = joined.sort(0).values if name == "t" else joined
        assert torch.equal(joined, getattr(whole, name)), name
    rows = [set(map(tuple, part.w1.reshape(-1, 2).tolist())) for part in parts]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 256


def test_rows_of_ones_own_are_trained_at_all_times():
    for rank in (0, 4, 7):
        torch.manual_seed(rank)
        made, x = objective(rank, 8, own=True), torch.randn(64, 2)
        t = torch.cat([draw(made, Rows(x, None)).t.flatten() for _ in range(400)])
        expected = torch.linspace(0, 1, len(t) + 1)[1:]
        assert float((t.sort().values - expected).abs().max()) < 0.05


def test_a_coupling_is_that_of_the_whole_batch():
    x = torch.randn(128, 2)
    torch.manual_seed(4)
    whole = draw(objective(coupling=optimal_transport), Rows(x, None))
    parts = []
    for rank in range(2):
        torch.manual_seed(4)
        parts.append(draw(objective(rank, 2, coupling=optimal_transport), Rows(x, None)))
    assert torch.equal(torch.cat([part.w0 for part in parts]), whole.w0)


def splits(shards, share=0.1, batch=50):
    """Return the stream and split of each process, and the factor of its loss."""

    def split(process):
        stream = Stream(*shards[process.rank](batch), share)
        return stream, stream.split(process, None), process.factor

    return in_threads(len(shards), split)


def shard(x, weights=None):
    def batches(size):
        flow = InterpolantDistribution(interpolant_transform(x.shape[1], (8,)))
        parts = list(x.split(size))
        return flow, parts if weights is None else list(
            zip(parts, weights.split(size), strict=True)
        )

    return batches


def test_processes_with_batches_of_their_own_hold_out_the_same_rows_of_all():
    x = torch.randn(3000, 2)
    x = x[x[:, 0].argsort()]
    parts = x[:400], x[400:1000], x[1000:]
    ((whole, alone, _),) = splits([shard(x)])
    found = splits([shard(part) for part in parts])
    for stream, split, _ in found:
        assert torch.equal(split.held.w.sort(0).values, alone.held.w.sort(0).values)
        assert torch.equal(split.kept.w, alone.kept.w)
        assert stream.held_keys.below == whole.held_keys.below
        assert stream.surveyed == whole.surveyed
        assert split.total == pytest.approx(alone.total)
    assert [factor for *_, factor in found] == pytest.approx([0.4, 0.6, 2.0])


def test_a_sample_of_all_processes_rows_keeps_to_the_memory_of_one(monkeypatch):
    monkeypatch.setattr("pyro_interpolant.training.survey.SAMPLE_VALUES", 500)
    x = torch.arange(2000.0)[:, None] + 0.5
    found = splits([shard(part) for part in (x[:500], x[500:])], batch=10)
    kept = [split.kept.w for _, split, _ in found]
    assert torch.equal(*kept)
    assert 150 < len(kept[0]) <= 500
    assert float((kept[0] < 500).double().mean()) == pytest.approx(0.25, abs=0.03)


def test_a_sample_of_batches_of_unlike_sizes_has_each_processes_share(monkeypatch):
    monkeypatch.setattr("pyro_interpolant.training.survey.SAMPLE_VALUES", 500)
    x = torch.arange(2000.0)[:, None] + 0.5
    one, other = shard(x[:1000]), shard(x[1000:])
    for _, split, factor in splits([lambda _: one(1000), other], batch=10):
        share = split.kept.weight / split.kept.weight.sum()
        assert float(share[split.kept.w[:, 0] < 1000].sum()) == pytest.approx(0.5, abs=0.03)
        assert factor == 1


def test_processes_count_by_the_weight_of_their_rows():
    x = torch.randn(900, 2)
    heavy = torch.cat((torch.full((300,), 9.0), torch.full((600,), 1.5)))
    found = splits([shard(x[:300], heavy[:300]), shard(x[300:], heavy[300:])])
    ((_, alone, _),) = splits([shard(x, heavy)])
    assert [factor for *_, factor in found] == pytest.approx([1.5, 0.5])
    assert [stream.mean_weight for stream, *_ in found] == [9, 1.5]
    assert found[0][1].total == pytest.approx(alone.total)
    assert found[0][1].kept.weight.sort().values.equal(alone.kept.weight.sort().values)


def test_the_loss_of_a_process_counts_by_its_factor():
    gradients = []
    for factor in (1.0, 2.5):
        torch.manual_seed(4)
        made = objective()
        made.process.factor = factor
        points = made.points([lambda: Rows(torch.ones(64, 2), None)])[0]
        weights = list(made.network.parameters())
        made.process.module = made
        made.process.optimizer = SimpleNamespace(param_groups=[{"params": weights}])
        made.process.backward([(0.5, points), (0.5, points)])
        gradients.append(weights[-1].grad)
    torch.testing.assert_close(gradients[1], 2.5 * gradients[0])


def test_rows_that_a_first_pass_saw_stand_for_those_that_it_did_not():
    surveys = [Survey(), Survey()]
    some = torch.arange(100.0) < 50
    for survey, weight in zip(surveys, (torch.ones(100), 6.0 * some), strict=True):
        survey.add(Rows(torch.randn(100, 2), None, None, weight))
    surveys[1].times = 4.0
    shares, effective = shares_of_weight(surveys)
    assert shares == pytest.approx([1 / 13, 12 / 13])
    assert effective == pytest.approx(1300**2 / (100 + 1200**2 / 200))
    for survey in surveys:
        survey.times = math.inf
    assert shares_of_weight(surveys) == (pytest.approx([0.25, 0.75]), math.inf)


def test_processes_with_other_batches_than_can_work_raise_all():
    one, weighted = shard(torch.ones(9, 2)), shard(torch.ones(9, 2), torch.ones(9))
    for other, message in (
        (lambda size: (one(size)[0], []), "batches of rows, got an iterable with 0 rows in all"),
        (weighted, "rows alone, rows with weights in processes 0 to 1: give weights in all"),
    ):
        for found in splits([one, other]):
            assert message in found


def test_what_differs_between_processes_is_refused_in_all():
    assert in_threads(3, lambda process: process.gathered(process.rank)) == [[0, 1, 2]] * 3
    assert in_threads(3, lambda process: process.check_same("table", 5, "")) == [None] * 3
    found = in_threads(3, lambda process: process.check_same("table", process.rank % 2, "share"))
    expected = "expected the same table in all processes, got 0, 1, 0 in processes 0 to 2: share"
    assert found == [expected] * 3


@pytest.mark.slow
@needs_fabric
@pytest.mark.filterwarnings("ignore")  # of the import of others
def test_one_process_of_a_fabric_takes_the_steps_of_none():
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.launch()
    x, start, weights = torch.randn(300, 2), interpolant_transform(2, (16, 16)).float(), []
    for given in (None, fabric):
        flow = InterpolantDistribution(copy.deepcopy(start))
        fit(flow, x, steps=20, seed=3, progress=False, tolerance=0.1, fabric=given)
        weights.append(torch.cat([p.detach().flatten() for p in flow.transform.parameters()]))
    assert torch.equal(*weights)
    double = Fabric(accelerator="cpu", devices=1, precision="64-true")
    double.launch()
    with pytest.raises(ValueError, match="torch.float32, got precision '64-true'"):
        fit(flow, x, steps=1, progress=False, fabric=double)


SCRIPT = """
import json, os, sys, torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader
import pyro_interpolant as pi

torch.set_num_threads(1)
folder, devices = sys.argv[1], int(sys.argv[2])
fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto")
fabric.launch()
rank = fabric.global_rank
torch.manual_seed(0)
x = torch.randn(1500, 2)
x[:, 1] += x[:, 0] ** 2


def made():
    torch.manual_seed(5)
    return pi.InterpolantDistribution(pi.interpolant_transform(2, (16, 16)))


def run(name, data, **options):
    distribution, told = made(), []
    torch.manual_seed(100 + rank)  # processes whose own generators differ
    callback = options.pop("callback", told.append)
    settings = {"steps": 50, "seed": 3, "batch_size": 256 // devices, "tolerance": 0.1}
    options = {"fabric": fabric, "callback": callback, **settings, **options}
    result = pi.fit(distribution, data, **options)
    flat = torch.cat([p.detach().flatten() for p in distribution.transform.parameters()])
    found[name] = {
        "weights": flat.double().tolist(),
        "held": result.validation_losses,
        "by": result.stopped_by,
        "told": len(told),
        "steps": result.steps[-1],
    }


levels = torch.randint(0, 200, (256, 1, 4, 4), dtype=torch.uint8)


class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.lift, self.back = (torch.nn.Conv2d(a, b, 3, padding=1) for a, b in ((1, 4), (4, 1)))
        self.labels = torch.nn.Embedding(4, 4)

    def forward(self, t, image, labels):
        shift = self.labels(labels)[..., None, None] + t[:, None, None, None]
        lifted = self.lift(image)
        seen.add(str(lifted.dtype))
        return self.back(torch.tanh(lifted + shift))


def run_images(name, accumulate, fabric=fabric):
    torch.manual_seed(5)
    network = pi.nn.ImageVelocity(Network(), (1, 4, 4), classes=3, null_label=3)
    torch.manual_seed(100 + rank)
    seen.clear()
    family = pi.from_samples(
        levels, context=torch.arange(256) % 3, network=network, steps=20, seed=3, progress=False,
        batch_size=64 // devices, accumulate=accumulate, flip=True, fabric=fabric,
    )
    flat = torch.cat([p.detach().flatten() for p in family.transform.parameters()])
    found[name] = {"weights": flat.tolist(), "types": [str(flat.dtype), *seen]}


found, seen = {}, set()
run_images("images", 1)
run_images("pieces", 4)
if devices == 1:
    mixed = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    mixed.launch()
    run_images("mixed", 4, mixed)
run("table", x)
if devices > 1:
    run("no seed", x, seed=None, progress=False, steps=10)
    loader = DataLoader(x, batch_size=100, shuffle=True)
    options = {"batch_size": None, "progress": False, "steps": 30}
    run("loader", fabric.setup_dataloaders(loader), **options)
    lower = x[x[:, 0].argsort()].split((500, 1000))[rank]
    run("shards", list(lower.split(100)), batch_size=None, progress=False, steps=30)
    try:
        run("other tables", lower[:400], progress=False)
    except ValueError as error:
        found["other tables"] = str(error)
    run("seconds", x, max_seconds=1e-6, progress=False)
    run("stopped", x, callback=lambda s: rank == 0 and s.step >= 7, progress=False)

    path = folder + "/kept"
    run("kept", x, checkpoint=path, checkpoint_every=5, progress=False)
    run("again", x, checkpoint=path, checkpoint_every=5, progress=False)
    fabric.barrier()
    found["files"] = sorted(os.listdir(folder))
    fabric.barrier()
with open(f"{folder}/{devices}.{rank}.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def in_a_process(tmp_path_factory):
    """Run a script with arguments, and return what it says on the standard error.

    Its process, and those that it starts, are forks of one that has imported what it imports.
    """
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    written = tmp_path_factory.mktemp("written")
    output, errors = written / "output", written / "errors"

    def run(script, *arguments):
        output.unlink(missing_ok=True)
        errors.unlink(missing_ok=True)
        told = {"program": str(script), "arguments": [*map(str, arguments)]}
        code = process(**told, cwd=str(written), output=str(output), errors=str(errors))
        assert code == 0, errors.read_text()[-3000:]
        return errors.read_text()

    with forks(environment, *IMPORTED) as process:
        yield run


@pytest.fixture(scope="module")
def runs(tmp_path_factory, in_a_process):
    folder = tmp_path_factory.mktemp("runs")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    found, text = {}, {}
    for devices in (1, 2):
        out = folder / str(devices)
        out.mkdir()
        text[devices] = in_a_process(script, out, str(devices))
        for rank in range(devices):
            found[devices, rank] = json.loads((out / f"{devices}.{rank}.json").read_text())
    return found, text


def far(a, b):
    a, b = torch.tensor(a["weights"]), torch.tensor(b["weights"])
    return float((a - b).abs().max())


@in_processes
def test_two_processes_agree_to_the_bit(runs):
    for name in ("table", "no seed", "loader", "shards", "seconds", "stopped", "kept"):
        first, second = (runs[0][2, rank][name] for rank in range(2))
        for field in ("weights", "held", "steps"):
            assert first[field] == second[field], name


@in_processes
def test_two_processes_match_one_with_the_double_batch(runs):
    found = runs[0]
    assert far(found[1, 0]["table"], found[2, 0]["table"]) < 1e-6
    assert far(found[2, 0]["table"], found[2, 0]["loader"]) > 1e-3


@in_processes
def test_only_the_first_process_shows_writes_and_tells(runs):
    found, text = runs
    assert found[2, 0]["table"]["told"] > 0
    assert found[2, 1]["table"]["told"] == 0
    assert text[2].count("fit:   0%") == text[1].count("fit:   0%") > 0
    assert set(found[2, 0]["files"]) - {"1.0.json"} == {"kept", "kept.previous"}


@in_processes
def test_one_process_stops_all_and_what_parts_them_is_refused_in_each(runs):
    for rank in range(2):
        found = runs[0][2, rank]
        assert found["stopped"]["by"] == "callback"
        assert found["stopped"]["steps"] == 11  # the first look from step 7 on
        assert found["kept"]["weights"] == found["again"]["weights"]
        assert found["again"]["told"] == 0
        assert "expected the same table" in found["other tables"]


@in_processes
def test_images_train_in_pieces_in_bf16_and_in_two_processes(runs):
    one, *two = runs[0].values()
    for found in (one, *two):
        for name in ("images", "pieces"):
            assert found[name]["types"] == ["torch.float32"] * 2
            assert far(one["images"], found[name]) < 1e-6
            assert found is one or found[name]["weights"] == two[0][name]["weights"]
    assert one["mixed"]["types"][0] == "torch.float32"
    assert "torch.bfloat16" in one["mixed"]["types"]
    assert 1e-6 < far(one["images"], one["mixed"]) < 0.02
