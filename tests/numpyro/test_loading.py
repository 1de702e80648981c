"""Files: what is read without torch, what is refused and by which name, and what is compiled."""

import contextlib
import copy
import json
import pickle
import random
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import own_flow, random_flow, slow_but
from kinds import adaptive, angles, family, joint, plain
from pyro.distributions import constraints

from pyro_interpolant import HutchinsonDivergence, InterpolantDistribution, Samples, io, save
from pyro_interpolant.distributions.description import NotPassedError, PartError, build, describe
from pyro_interpolant.numpyro import Frozen, from_torch, load, loading
from pyro_interpolant.numpyro import flow as numerics

KEY = "pyro_interpolant"

WITHOUT_TORCH = """
import sys
for name in ("torch", "pyro", "torchdiffeq", "scipy.integrate"):
    sys.modules[name] = None  # importing it is an error
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import pyro_interpolant
prior = pyro_interpolant.numpyro.load(sys.argv[1])
print(prior.log_prob(jnp.array([[0.5, 2.0], [1.0, 0.1]])).tolist())
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "flow.safetensors"


@pytest.mark.slow
def test_a_process_without_torch_loads_a_file(path):
    flow = plain(support=constraints.positive).freeze()
    save(flow, path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(path)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = flow.log_prob(torch.tensor([[0.5, 2.0], [1.0, 0.1]]))
    np.testing.assert_allclose(json.loads(done.stdout), expected.numpy(), rtol=1e-10)


# ---- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (adaptive, r"solver is Adaptive: pyro_interpolant\.calibrate"),
        (lambda: InterpolantDistribution(own_flow(2)), "its velocity is a OwnVelocity"),
        (lambda: plain(base=Samples(torch.randn(9, 2))), "its base is samples alone"),
        (
            lambda: plain(base=dist.Stable(1.5, torch.zeros(2)).to_event(1)),
            "its base has a Stable",
        ),
        (lambda: plain().to(torch.bfloat16), r"bfloat16.*\.to\(torch\.float32\)"),
    ],
)
def test_flows_without_a_twin_are_refused_by_name(make, message, path):
    save(make(), path)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_what_else_is_no_flow_for_jax(path):
    with pytest.raises(ValueError, match=r"types that numpy has, .*\.to\(torch\.float32\)"):
        from_torch(plain().to(torch.bfloat16))
    with pytest.raises(FileNotFoundError):
        load(path)
    for dtype in ("int32", torch.float32, "half-precision"):
        with pytest.raises(TypeError, match="expected dtype of a floating type, .* got"):
            load(path, dtype=dtype)


def written(path, header, tensors):
    """Write a file with the checksum of what it holds."""
    io.write(path, tensors, {KEY: json.dumps(header)})


def test_probes_that_a_file_does_not_hold(path):
    save(InterpolantDistribution(random_flow(2, divergence=HutchinsonDivergence(2))), path)
    header, tensors = io.read(path, framework="pt")
    del tensors["divergence.probes"]
    written(path, header, tensors)
    with pytest.raises(ValueError, match="its divergence is a HutchinsonDivergence, saved before"):
        load(path)


EDITS = [
    {"arguments": [2, [10**9, 10**9], 0]},
    {"dtype": "float32"},
    {"solver": ["FixedGrid", {"steps": 10**9, "method": "rk4", "warp": 0.0}]},
    {"divergence": ["HutchinsonDivergence", {"probes": 1, "seed": 0}]},
    {"whitening": "ScalarWhitening"},
    {"support": "circular"},
    {"support": ["shaped", "real_vector", [3, 1]]},
    {"base": {"class": "Normal", "arguments": ["loc"]}},
    {"base": {"class": "set_default_validate_args", "arguments": []}},
]


def test_edited_and_damaged_files_are_errors(path):
    save(plain(), path)
    header, tensors = io.read(path, framework="pt")
    whole = path.read_bytes()
    files = [(header | edit, tensors) for edit in EDITS]
    for name in ("loc", "velocity.reach", "velocity.output.weight"):
        tensor = tensors[name]
        others = {key: value for key, value in tensors.items() if key != name}
        files += [
            (header, {**others, **wrong})
            for wrong in (
                {},
                {name: tensor.reshape(-1, 1)},
                {name: tensor.float()},
                {name + "s": tensor},
            )
        ]
    for new_header, new_tensors in files:
        written(path, new_header, new_tensors)
        with pytest.raises(ValueError, match=r"flow\.safetensors"):
            load(path)
    for place in range(9, len(whole), 997):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"flow\.safetensors"):
            load(path)


WRONG = [None, -1, 0, 2, 1.5, "x", [], {}, True, False, [2], "positive"]


def edits(value):
    """Every header that differs from a good one in a single place."""
    if isinstance(value, (dict, list)):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            for part in (*WRONG, *edits(inner)):
                copied = value.copy()
                copied[key] = part
                yield copied


@torch.no_grad()
def log_prob_of(flow, x):
    """Log-densities by torch, row by row, which raises outside the support."""
    found = np.full(flow.expand_by((len(x),)).batch_shape, -np.inf)
    for i, row in enumerate(x):
        with contextlib.suppress(ValueError):
            found[i] = flow.log_prob(row.clone()).numpy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("make", [plain, angles, joint], ids=lambda make: make.__name__)
@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_an_edit_is_an_error_or_the_density_that_torch_has(make):
    """What only torch refuses, as it is of no use here, leaves the density as it was."""
    header, tensors = describe(make().freeze())
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    x = make().sample((3,))
    value = jnp.asarray(x.numpy())
    before = np.asarray(loading._built(header, arrays, None).log_prob(value))
    chosen = list(edits(header))
    for edited in random.Random(0).sample(chosen, len(chosen) // 2):
        try:
            other = loading._built(edited, arrays, None)
            found = np.asarray(other.log_prob(value))
        except loading._ERRORS:
            continue
        expected = before
        with contextlib.suppress(PartError, NotPassedError):
            expected = log_prob_of(build(edited, tensors), x)
        np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=str(edited))


# ---- types --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float32")
def test_a_float64_file_where_jax_has_float32_says_so(path):
    """A base that is a flow has the type that is asked for, too."""
    save(plain(base=plain()).to(torch.float64), path)
    with pytest.warns(UserWarning, match="holds float64, jax computes in float32"):
        load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior = load(path, dtype="float32")
    flows = [t for t in prior.transforms if hasattr(t, "grid")]
    assert [flow.weights["loc"].dtype for flow in flows] == [np.float32] * 2
    assert prior.sample(jax.random.key(0)).dtype == jnp.float32


# ---- what is compiled, and kept -----------------------------------------------------------------


def test_other_files_of_the_same_shapes_compile_nothing(path):
    x, traces = jnp.ones((3, 2)), []

    @jax.jit
    def total(prior, x):
        traces.append(prior)
        return prior.log_prob(x).sum()

    save(plain(), path)
    one, other = load(path), load(path)
    assert total(one, x) == total(other, x)
    assert len(traces) == 1
    assert one.transform.eq(other.transform, static=True)
    assert hash(one.transform.weights) == hash(other.transform.weights)
    one.log_prob(x)
    traced = numerics._solve._cache_size()
    save(plain(), path)  # of other weights
    load(path).log_prob(x)
    assert numerics._solve._cache_size() == traced


@pytest.mark.parametrize("make", slow_but([joint, family], family))
def test_copies_and_pickles(make, path):
    save(make(), path)
    prior = load(path)
    context = jnp.ones(3)
    for again in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        one, other = (d.condition(context) if make is family else d for d in (prior, again))
        assert type(other) is type(one)
        x = one.sample(jax.random.key(1), (2,))
        assert jnp.array_equal(other.log_prob(x), one.log_prob(x))
        arrays = (other.transforms[-1] if make is family else other.transform).weights
        assert not any(array.flags.writeable for array in arrays.values())


def test_frozen_arrays_are_compared_by_all_that_they_are_and_stay():
    array = np.zeros((2, 3))
    frozen = Frozen({"a": array})
    assert frozen == Frozen({"a": array})
    for other in ({"b": array}, {"a": array.T}, {"a": array.view(np.int64)}, {"a": array + 1}):
        assert Frozen(other) != frozen
    array += 1
    assert not frozen["a"].any()


def test_whether_values_are_validated_is_kept():
    for flow in (plain(), joint()):
        for validate in (None, True, False):
            if validate is not None:
                flow._validate_args = validate
            other = from_torch(flow)
            assert vars(other).get("_validate_args") is validate
            assert vars(other.at(0.5)).get("_validate_args") is validate
