"""Files with flipped bits, lost ends, edited headers and other tensors: refused, or no change."""

import contextlib
import json
import random
import resource
import time

import pyro.distributions as dist
import pytest
import torch
from cases import random_flow, slow_but
from pyro.distributions import constraints
from pyro.distributions import transforms as maps

from pyro_interpolant import (
    Adaptive,
    ConditionalInterpolantDistribution,
    Geodesic,
    HutchinsonDivergence,
    InterpolantDistribution,
    InterpolantTransform,
    JointInterpolantDistribution,
    LearnedInterpolant,
    TorusMLP,
    VelocityMLP,
    circular,
    io,
    load,
    save,
)
from pyro_interpolant.distributions import part_description
from pyro_interpolant.distributions.constraints import Shaped
from pyro_interpolant.distributions.description import (
    NotPassedError,
    PartError,
    build,
    describe,
)
from pyro_interpolant.distributions.differences import difference

KEY = "pyro_interpolant"


def mixture():
    return dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.2, 0.7])),
        dist.TransformedDistribution(
            dist.Normal(torch.zeros(2, 2), 1.0).to_event(1),
            [maps.AffineTransform(0.5, torch.ones(2), event_dim=1)],
        ),
    )


def with_noise():
    waves = LearnedInterpolant(3, event_dim=2, network=(4,))
    choices = {"divergence": HutchinsonDivergence(3), "solver": Adaptive(nodes=8)}
    flow = InterpolantDistribution(random_flow(2, (8,), interpolant=waves, **choices))
    flow.transform.flow.noise = VelocityMLP(2, (8,))
    return flow


def angles():
    transform = InterpolantTransform(TorusMLP(2, (8,)), interpolant=Geodesic())
    return InterpolantDistribution(transform, support=circular)


def shaped():
    support = constraints.stack([constraints.positive, constraints.real], dim=-1)
    return InterpolantDistribution(random_flow(2, (8,)), support=Shaped(support, (1, 2)))


FLOWS = {
    "plain": lambda: InterpolantDistribution(random_flow(2, (8,))),
    "mixture": lambda: InterpolantDistribution(random_flow(2, (8,)), mixture()),
    "noise": with_noise,
    "angles": angles,
    "shaped": shaped,
    "joint": lambda: JointInterpolantDistribution(
        random_flow(2, (8,)), sites={"a": ((2,), constraints.independent(constraints.real, 1))}
    ),
    "flow": lambda: InterpolantDistribution(random_flow(2, (8,)), FLOWS["plain"]()),
    "conditional": lambda: ConditionalInterpolantDistribution(random_flow(2, context_dim=1)),
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


def read(path):
    header, tensors = io.read(path, framework="pt")
    return header, tensors


# ---- flipped bits -------------------------------------------------------------------------------


def flips(raw, count, seed=0):
    """Places of single bits, half of them in the header; each bit of the length's eight bytes."""
    draw = random.Random(seed)
    end = 8 + int.from_bytes(raw[:8], "little")
    yield from ((i, bit) for i in range(8) for bit in range(8))
    for n in range(count):
        yield draw.randrange(8, end) if n % 2 else draw.randrange(end, len(raw)), draw.randrange(8)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("plain", 250),
        pytest.param("plain", 3000, marks=pytest.mark.slow),
        *[pytest.param(name, 1500, marks=pytest.mark.slow) for name in FLOWS if name != "plain"],
    ],
)
def test_a_flipped_bit_is_refused_or_changes_nothing(name, count, path):
    save(FLOWS[name](), path)
    raw, expected = path.read_bytes(), read(path)
    for byte, bit in flips(raw, count):
        flipped = bytearray(raw)
        flipped[byte] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            header, tensors = io.read(path, framework="np" if byte % 2 else "pt")
        except ValueError:
            continue
        assert header == expected[0], (byte, bit)
        found = {key: torch.as_tensor(value) for key, value in tensors.items()}
        assert difference(found, expected[1]) is None, (byte, bit)


def test_every_bit_of_the_last_weight_counts(path):
    """A version without a checksum gave another density for one in twenty."""
    save(FLOWS["plain"](), path)
    raw = path.read_bytes()
    for bit in range(64):
        flipped = bytearray(raw)
        flipped[-1 - bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match="damaged.*its checksum is another"):
            load(path)


def test_a_checksum_cannot_be_left_out(path):
    """Nor does a flipped bit in its name leave it out."""
    save(FLOWS["plain"](), path)
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"checksum"', b'"checksun"'))
    with pytest.raises(ValueError, match="damaged.*no checksum"):
        load(path)


@pytest.mark.parametrize("name", ["plain", "mixture"])
def test_a_file_without_its_end_or_with_more_is_refused(name, path):
    save(FLOWS[name](), path)
    raw = path.read_bytes()
    for size in {*range(0, len(raw), 331), *range(16), len(raw) - 1}:
        path.write_bytes(raw[:size])
        with pytest.raises(ValueError, match="is damaged"):
            load(path)
    path.write_bytes(raw + b" ")
    with pytest.raises(ValueError, match="is damaged"):
        load(path)


# ---- edited, with the checksum of the edited file -----------------------------------------------


def changed(tensors, how, name):
    """Tensors of which one has another shape, type, name or place."""
    tensor, new = tensors[name], dict(tensors)
    if how == "swapped":
        other = next(k for k in tensors if k != name and tensors[k].shape != tensor.shape)
        new[name], new[other] = tensors[other], tensor
    elif how == "flat":
        new[name] = tensor.reshape(-1, 1)
    elif how == "longer":
        new[name] = torch.cat((tensor.reshape(-1), torch.zeros(1, dtype=tensor.dtype)))
    elif how == "missing":
        del new[name]
    elif how == "renamed":
        new[f"{name}s"] = new.pop(name)
    else:
        new[name] = tensor.to(getattr(torch, how))
    return new


HOW = ["swapped", "flat", "longer", "missing", "renamed", "float32", "int64", "bool", "complex64"]


@pytest.mark.parametrize("name", slow_but(FLOWS, "plain", "noise"))
@pytest.mark.parametrize("how", HOW)
def test_other_tensors_are_refused(name, how):
    """A type of its own may have an interpolant; all else has the flow's."""
    header, tensors = describe(FLOWS[name]())
    for key in tensors:
        new = changed(tensors, how, key)
        is_same = how == "flat" and tensors[key].shape == new[key].shape
        is_old = how == "missing" and key == "divergence.probes"
        if is_same or is_old or (how == "float32" and key.startswith("interpolant.")):
            continue
        try:
            again = build(header, new)
        except PartError:
            continue
        assert key.startswith("base."), key  # of which nobody knows the numbers
        assert isinstance(again, InterpolantDistribution)


def test_other_tensors_are_told_by_the_file(path):
    save(FLOWS["plain"](), path)
    header, tensors = read(path)
    io.write(path, changed(tensors, "float32", "loc"), {KEY: json.dumps(header)})
    with pytest.raises(ValueError, match="flow.safetensors is damaged or was edited"):
        load(path)


HUGE = [
    *(10**5, 10**9, 10**30, -(10**9), 1e9, 1e300, float("inf"), float("nan"), "1" * 10**6),
    *([8] * 100_000, [10**6] * 3, [10**9, 10**9], [[10**6, 10**6]]),
]


def edits(value, wrong):
    """Every header that differs from a good one in a single place."""
    if isinstance(value, (dict, list)):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            for part in (*wrong, *edits(inner, wrong)):
                copied = value.copy()
                copied[key] = part
                yield copied


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the flow was saved with")
def test_huge_numbers_are_refused_before_anything_is_made_of_them(name):
    header, tensors = describe(FLOWS[name]())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for n, edited in enumerate(edits(header, HUGE)):
        start = time.perf_counter()
        with contextlib.suppress(PartError, NotPassedError):
            build(edited, tensors)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if time.perf_counter() - start > 2 or grown > 100_000:
            place = {k: str(v)[:60] for k, v in edited.items() if v != header[k]}
            pytest.fail(f"edit {n} took {time.perf_counter() - start} s, {grown} kB: {place}")


def solver(name, **numbers):
    return {"solver": [name, numbers]}


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (solver("Adaptive", nodes=1e9), "at most 4096 steps"),
        (solver("FixedGrid", steps=10**8), "at most 4096 steps"),
        (solver("RandomGrid", steps=10**8), "at most 4096 steps"),
        (solver("FixedGrid", checkpoint={"": None}), "expected a FixedGrid that"),
        ({"solver": ["HutchinsonDivergence", {}]}, "and of use here"),
        ({"divergence": ["FixedGrid", {}]}, "expected a FixedGrid that .* and of use here"),
        ({"frozen": "velocity.output.weight"}, "which of its weights are frozen"),
        ({"support": ["real_vector", [[0.0]]]}, "no arguments of the support 'real_vector'"),
        ({"frozen": ["velocity"]}, "which of its weights are frozen"),
        ({"arguments": [2, [8] * 100_000, 0]}, "at most .* layers"),
        ({"arguments": [2, [10**6, 10**6], 0]}, "velocity cannot be built.*size mismatch"),
        ({"arguments": [2, [8], 10**9]}, "velocity cannot be built.*size mismatch"),
        ({"dim": 10**6}, "1000000 dimensions"),
        ({"whitening": "ScalarWhitening"}, "whitening"),
        ({"divergence": ["HutchinsonDivergence", {"probes": 10**9, "seed": 0}]}, "probes"),
        ({"refined_for": [0.0]}, "refined_for of 0 finite numbers"),
        ({"batch_shape": [-1]}, "batch_shape"),
        ({"moved": -1}, "moved to be True or False, got -1"),
        ({"trains_weights": 1}, "trains_weights to be True or False, got 1"),
        ({"independent": [True]}, "independent to be True or False"),
        ({"base": {"class": "LKJ", "arguments": [], "parts": {"dim": 10**9}}}, "at most"),
        ({"base": {"class": "Planar", "arguments": [], "parts": {"input_dim": 2}}}, "weights"),
        ({"base": {"class": "Normal", "arguments": ["loc"]}}, "base cannot be built"),
    ],
)
def test_an_edit_is_told_by_its_part(edit, match, path):
    save(FLOWS["plain"](), path)
    header, tensors = read(path)
    io.write(path, tensors, {KEY: json.dumps({**header, **edit})})
    start = time.perf_counter()
    with pytest.raises(ValueError, match=rf"(?s)is damaged or was edited.*{match}"):
        load(path)
    assert time.perf_counter() - start < 2


def test_a_base_that_was_left_out_is_missed(path):
    """The flow started from N(0, I) instead."""
    save(InterpolantDistribution(random_flow(2, (8,)), mixture()), path)
    header, tensors = read(path)
    io.write(path, tensors, {KEY: json.dumps({**header, "base": None})})
    with pytest.raises(ValueError, match=r"its base cannot be built: expected the base that"):
        load(path)


def test_a_solver_of_too_many_steps_to_be_loaded_is_not_saved(path, monkeypatch):
    monkeypatch.setattr(part_description, "MAX_COUNT", 8)
    flow = InterpolantDistribution(random_flow(2, (8,), solver=Adaptive(nodes=9)))
    with pytest.raises(ValueError, match="at most 8 steps"):
        save(flow, path)
    assert not path.exists()
