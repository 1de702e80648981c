"""Files: what is read without torch, what is refused and by which name, and what is compiled."""

import contextlib
import copy
import json
import pickle
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
from kinds import angles, family, joint, plain
from pyro.distributions import constraints
from pyro.distributions import transforms as maps

from pyro_interpolant import (
    Adaptive,
    HutchinsonDivergence,
    InterpolantDistribution,
    Samples,
    io,
    save,
)
from pyro_interpolant.distributions import part_description
from pyro_interpolant.distributions.description import NotPassedError, PartError, build, describe
from pyro_interpolant.numpyro import Frozen, from_torch, load, loading, supports
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


def edited(path, header=None, tensors=None):
    """Write a file again with another header or other tensors, and the checksum of these."""
    old_header, old_tensors = io.read(path, framework="pt")
    new = {**old_header, **(header or {})}
    io.write(path, {**old_tensors, **(tensors or {})}, {KEY: json.dumps(new)})


@pytest.mark.slow
def test_a_process_without_torch_loads_a_file(path):
    flow = plain(support=constraints.positive).freeze()
    save(flow, path)
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = flow.log_prob(torch.tensor([[0.5, 2.0], [1.0, 0.1]]))
    np.testing.assert_allclose(json.loads(done.stdout), expected.numpy(), rtol=1e-10)


# ---- refused, by name ---------------------------------------------------------------------------


def mixture():
    parts = dist.Normal(torch.zeros(2, 2), 1.0).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.2, 0.7])), parts)


def stretched():
    affine = maps.AffineTransform(0.5, torch.ones(2), event_dim=1)
    return dist.TransformedDistribution(dist.Normal(torch.zeros(2), 1.0).to_event(1), [affine])


def plain_with(**choices):
    return InterpolantDistribution(random_flow(2, **choices))


def test_an_adaptive_solver_is_refused_with_a_way_out(path):
    save(plain_with(solver=Adaptive()), path)
    with pytest.raises(ValueError, match=r"solver is Adaptive: pyro_interpolant\.calibrate"):
        load(path)


def test_a_velocity_of_ones_own_is_refused(path):
    save(InterpolantDistribution(own_flow(2)), path)
    with pytest.raises(ValueError, match="its velocity is a OwnVelocity"):
        load(path)


def test_a_base_without_density_is_refused(path):
    save(plain(base=Samples(torch.randn(9, 2))), path)
    with pytest.raises(ValueError, match="its base is samples alone"):
        load(path)


def test_a_base_that_numpyro_has_not_is_refused(path):
    save(plain(base=dist.Stable(1.5, torch.zeros(2)).to_event(1)), path)
    with pytest.raises(ValueError, match="its base has a Stable"):
        load(path)


@pytest.mark.parametrize("make", slow_but([mixture, stretched], stretched))
def test_bases_made_of_parts(make, path):
    flow = plain(base=make()).freeze()
    save(flow, path)
    x = torch.randn(4, 2)
    found = load(path).log_prob(jnp.asarray(x.numpy()))
    np.testing.assert_allclose(found, flow.log_prob(x).numpy(), rtol=1e-10)


def test_probes_that_a_file_does_not_hold(path):
    flow = plain_with(divergence=HutchinsonDivergence(2))
    save(flow, path)
    header, tensors = io.read(path, framework="pt")
    del tensors["divergence.probes"]
    io.write(path, tensors, {KEY: json.dumps(header)})
    with pytest.raises(ValueError, match="its divergence is a HutchinsonDivergence, saved before"):
        load(path)


def test_every_support_of_a_file_is_made_or_refused_by_name():
    """Each name by which torch's side knows a constraint."""
    unknown = [name for name in part_description._CONSTRAINTS if name not in supports._PLAIN]
    made = {*supports._BOUNDED, "independent", "stack", "cat", "shaped", "circular"}
    assert made <= set(unknown)
    for name in set(unknown) - made:
        with pytest.raises(ValueError, match=f"the support '{name}'"):
            supports.constraint_of([name, [], 1])


# ---- edited and damaged -------------------------------------------------------------------------

EDITS = [
    {"arguments": [2, [16], 0]},
    {"arguments": [2, [16, 16], 1]},
    {"arguments": [3, [16, 16], 0]},
    {"arguments": [2, [10**9, 10**9], 0]},
    {"arguments": None},
    {"arguments": 3},
    {"dim": 3},
    {"dtype": "float32"},
    {"dtype": "int8"},
    {"velocity": "TorusMLP"},
    {"velocity": "os.system"},
    {"class": "ConditionalInterpolantDistribution"},
    {"class": "JointInterpolantDistribution"},
    {"class": "Nothing"},
    {"solver": ["FixedGrid", {"steps": 10**9, "method": "rk4", "warp": 0.0}]},
    {"solver": ["FixedGrid", {"steps": 8.5, "method": "rk4", "warp": 0.0}]},
    {"solver": ["FixedGrid", {"steps": 8, "method": "rk5", "warp": 0.0}]},
    {"solver": ["FixedGrid", {"steps": 8, "method": "rk4", "warp": 1.0}]},
    {"solver": ["FixedGrid", None]},
    {"solver": ["OwnSolver", None]},
    {"divergence": ["HutchinsonDivergence", {"probes": 1, "seed": 0}]},
    {"divergence": ["Nothing", {}]},
    {"whitening": "ScalarWhitening"},
    {"whitening": "Nothing"},
    {"support": "sphere"},
    {"support": "circular"},
    {"support": ["bounded", "interval", ["a", 1.0]]},
    {"support": ["shaped", "real_vector", [3, 1]]},
    {"support": ["stack", ["positive"], -1]},
    {"support": "corr_cholesky"},
    {"support": 7},
    {"batch_shape": [-1]},
    {"base": {"class": "Normal", "arguments": ["loc"]}},
    {"base": {"class": "set_default_validate_args", "arguments": []}},
    {"base": 5},
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: json.dumps(edit)[:50])
def test_an_edited_header_is_an_error(edit, path):
    save(plain(), path)
    edited(path, edit)
    with pytest.raises(ValueError, match=r"flow\.safetensors"):
        load(path)


@pytest.mark.parametrize("name", ["loc", "velocity.reach", "velocity.output.weight"])
@pytest.mark.parametrize("how", ["flat", "float32", "missing", "renamed"])
def test_other_arrays_are_an_error(name, how, path):
    save(plain(), path)
    header, tensors = io.read(path, framework="pt")
    tensor = tensors.pop(name)
    if how != "missing":
        new = {"flat": tensor.reshape(-1, 1), "float32": tensor.float()}.get(how, tensor)
        tensors[name + "s" * (how == "renamed")] = new
    io.write(path, tensors, {KEY: json.dumps(header)})
    with pytest.raises(ValueError, match="damaged, was edited"):
        load(path)


@pytest.mark.slow
def test_what_an_edited_header_gives_is_what_torch_makes_of_it(path):
    """Numbers that may be others are others on both sides."""
    save(plain().freeze(), path)
    edited(path, {"solver": ["FixedGrid", {"steps": 5, "method": "euler", "warp": 0.3}]})
    header, tensors = io.read(path, framework="pt")
    x = torch.randn(3, 2)
    found = load(path).log_prob(jnp.asarray(x.numpy()))
    np.testing.assert_allclose(found, build(header, tensors).log_prob(x).detach(), rtol=1e-10)


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_missing_file(kind, path):
    with pytest.raises(FileNotFoundError):
        load(kind(path))


def test_a_flipped_bit_is_an_error(path):
    save(plain(), path)
    raw = path.read_bytes()
    for place in range(9, len(raw), 97):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        with pytest.raises(ValueError, match=r"flow\.safetensors"):
            load(path)


# ---- types --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("float32")
def test_a_float64_file_where_jax_has_float32_says_so(path):
    save(plain().to(torch.float64), path)
    with pytest.warns(UserWarning, match="holds float64, jax computes in float32"):
        load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior = load(path, dtype="float32")
    assert prior.transform.weights["loc"].dtype == np.float32
    assert prior.sample(jax.random.key(0)).dtype == jnp.float32


@pytest.mark.parametrize("dtype", ["int32", bool, "complex64", torch.float32, "half-precision"])
def test_types_that_are_no_floating_ones(dtype):
    with pytest.raises(TypeError, match="expected dtype of a floating type, .* got"):
        load("missing.safetensors", dtype=dtype)


def test_a_type_that_numpy_has_not():
    with pytest.raises(ValueError, match=r"types that numpy has, .*\.to\(torch\.float32\)"):
        from_torch(plain().to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_a_file_of_a_type_that_numpy_has_not(dtype, path):
    save(plain().to(torch.bfloat16), path)
    with pytest.raises(ValueError, match=r"read for NumPyro: .*bfloat16.*\.to\(torch\.float32\)"):
        load(path, dtype=dtype)


@pytest.mark.slow
def test_values_of_any_type_are_promoted(path):
    save(plain().to(torch.float32), path)
    prior = load(path)
    for value, dtype in ((1, "float32"), (1.0, "float64")):
        x = jnp.full((2,), value, dtype=jnp.result_type(type(value)))
        assert prior.log_prob(x).dtype == dtype
    assert load(path, dtype=np.float64).log_prob(jnp.ones(2, jnp.float32)).dtype == jnp.float64


# ---- what is compiled, and kept -----------------------------------------------------------------


def test_a_second_file_of_the_same_shapes_compiles_nothing(path):
    x = jnp.ones((3, 2))
    save(plain(), path)
    load(path).log_prob(x)
    traced = numerics._solve._cache_size()
    save(plain(), path)  # of other weights
    load(path).log_prob(x)
    assert numerics._solve._cache_size() == traced


@pytest.mark.slow
def test_two_loads_of_a_file_are_one_argument(path):
    save(plain(), path)
    traces = []

    @jax.jit
    def total(prior, x):
        traces.append(prior)
        return prior.log_prob(x).sum()

    one, other = load(path), load(path)
    assert total(one, jnp.ones((3, 2))) == total(other, jnp.ones((3, 2)))
    assert len(traces) == 1
    assert one.transform.eq(other.transform, static=True)
    assert hash(one.transform.weights) == hash(other.transform.weights)


@pytest.mark.parametrize("make", slow_but([plain, joint, family, angles]))
def test_copies_and_pickles(make, path):
    save(make(), path)
    prior = load(path)
    context = jnp.ones(3)
    for again in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        one, other = (d.condition(context) if make is family else d for d in (prior, again))
        assert type(other) is type(one)
        x = one.sample(jax.random.key(1), (2,))
        assert jnp.array_equal(other.log_prob(x), one.log_prob(x))
        assert repr(other) == repr(one)
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


@pytest.mark.parametrize("validate", [None, True, False])
@pytest.mark.parametrize("make", [plain, joint])
def test_whether_values_are_validated_is_kept(make, validate):
    flow = make()
    if validate is not None:
        flow._validate_args = validate
    other = from_torch(flow)
    assert vars(other).get("_validate_args") is validate
    assert vars(other.at(0.5)).get("_validate_args") is validate


def test_a_base_that_is_a_flow_has_the_type_that_is_asked_for(path):
    save(plain(base=plain()), path)
    flows = [t for t in load(path, dtype="float32").transforms if hasattr(t, "grid")]
    assert [flow.weights["loc"].dtype for flow in flows] == [np.float32] * 2


def test_a_context_may_be_a_list():
    likelihood, c = from_torch(family()), [[0.1, 0.2, 0.3], [1, 2, 3]]
    given = likelihood.condition(c)
    assert given.batch_shape == (2,)
    np.testing.assert_array_equal(given.transform.context, c)
    traced = jax.jit(lambda one: likelihood.condition([one, c[1]]).transform.context)
    np.testing.assert_array_equal(traced(jnp.array(c[0])), c)


def test_a_conditioned_flow_needs_its_context(path):
    save(family(), path)
    likelihood = load(path)
    for wrong in (jnp.ones(2), jnp.ones(())):
        with pytest.raises(ValueError, match=r"expected a context of shape \(\*, 3\)"):
            likelihood.condition(wrong)


WRONG = [None, -1, 0, 2, 1.5, "x", [], {}, True, False, [2], "positive"]


def edits(value):
    """Every header that differs from a good one in a single place."""
    if isinstance(value, (dict, list)):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            for part in (*WRONG, *edits(inner)):
                copied = value.copy()
                copied[key] = part
                yield copied


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
    for edited_header in edits(header):
        try:
            other = loading._built(edited_header, arrays, None)
            found = np.asarray(other.log_prob(value))
        except loading._ERRORS:
            continue
        expected = before
        with contextlib.suppress(PartError, NotPassedError):
            expected = log_prob_of(build(edited_header, tensors), x)
        np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=str(edited_header))


@torch.no_grad()
def log_prob_of(flow, x):
    """Log-densities by torch, row by row, which raises outside the support."""
    found = np.full(flow.expand_by((len(x),)).batch_shape, -np.inf)
    for i, row in enumerate(x):
        with contextlib.suppress(ValueError):
            found[i] = flow.log_prob(row.clone()).numpy()
    return found
