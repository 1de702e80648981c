"""Files that version 0.1.0 wrote, one of each kind: what it saved must load, and be the same."""

from pathlib import Path

import pytest
import torch
from cases import OwnVelocity
from safetensors.torch import load_file

from pyro_interpolant import (
    FixedGrid,
    InterpolantDistribution,
    Samples,
    fit,
    interpolant_transform,
    load,
    score,
)
from pyro_interpolant.training.checkpoint import Checkpoint

DATA = Path(__file__).parent / "data"
EXPECTED = load_file(DATA / "expected.safetensors")
NAMES = sorted(p.stem for p in DATA.glob("*.safetensors") if p.stem != "expected")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_first_version_loads_with_equal_density(name):
    flow = load(
        DATA / f"{name}.safetensors", velocity=OwnVelocity(2) if name == "own_velocity" else None
    )
    view = flow.condition(EXPECTED[f"{name}.context"]) if name == "conditional" else flow
    if name == "samples_base":
        assert isinstance(flow.base, Samples)
        return
    with torch.no_grad():
        value, expected = view.log_prob(EXPECTED[f"{name}.x"]), EXPECTED[f"{name}.log_prob"]
    assert value.dtype == expected.dtype
    tolerance = 1e-5 if value.dtype == torch.float32 else 1e-11
    torch.testing.assert_close(value, expected, rtol=0, atol=tolerance)
    frozen = not any(p.requires_grad for p in flow.transform.parameters())
    assert frozen == (name != "trainable")


def test_what_was_learned_of_the_noise_is_kept():
    flow = load(DATA / "latent.safetensors")
    found = score(flow, 0.5, EXPECTED["latent.x"])
    now = flow.transform.interpolant.coefficients(torch.tensor(0.5))[2]
    then = (flow.transform.interpolant.gamma.scale / 4) ** 0.5  # before a bridge had finite slopes
    torch.testing.assert_close(found * now / then, EXPECTED["latent.score"], rtol=0, atol=1e-11)
    assert now == pytest.approx(then, rel=3e-3)
    assert not flow.transform.flow.independent


@pytest.mark.slow
def test_a_run_of_the_first_version_goes_on_to_the_weights_it_would_have_had(tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes((DATA / "run" / "state.safetensors").read_bytes())
    torch.manual_seed(1)
    flow = InterpolantDistribution(interpolant_transform(2, (8, 8), solver=FixedGrid(4)))
    x = load_file(DATA / "run" / "rows.safetensors")["rows"]  # exponentials depend on processors
    options = {"steps": 60, "batch_size": 64, "seed": 3, "weight_decay": 0.0, "tolerance": 1e3}
    options |= {"progress": False, "checkpoint": path, "checkpoint_every": 1000}
    with pytest.warns(UserWarning, match="was written by an earlier version: numbers of a base"):
        result = fit(flow, x, **options)
    assert result.steps[-1] == 60
    for name, expected in load_file(DATA / "run" / "weights.safetensors").items():
        found = flow.transform.flow.get_parameter(name.removeprefix("full."))
        torch.testing.assert_close(found.detach(), expected, rtol=0, atol=1e-8)


def test_a_run_of_the_first_version_that_has_ended_gives_the_weights_it_kept(tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes((DATA / "run" / "state.safetensors").read_bytes())
    state = Checkpoint(path, None, [], torch.device("cpu"))
    state.identity, state.numbers["run"]["ended"] = state.numbers["identity"], "patience"
    state.write(state.tensors, state.numbers)
    flow = InterpolantDistribution(interpolant_transform(2, (8, 8), solver=FixedGrid(4)))
    x = load_file(DATA / "run" / "rows.safetensors")["rows"]
    options = {"steps": 60, "batch_size": 64, "seed": 3, "weight_decay": 0.0, "tolerance": 1e3}
    other = InterpolantDistribution(interpolant_transform(2, (8, 9), solver=FixedGrid(4)))
    with pytest.raises(ValueError, match="the state of one with other data, another network"):
        fit(other, x, **options, checkpoint=path)
    with pytest.warns(UserWarning, match="was written by an earlier version: numbers of a base"):
        result = fit(flow, x, **options, progress=False, checkpoint=path)
    assert result.stopped_by == "patience"
    lowest = min(range(len(result.steps)), key=lambda i: result.validation_losses[i])
    assert result.best_step == result.steps[lowest]
    for i, value in enumerate(flow.transform.velocity.parameters()):
        assert torch.equal(value, state.tensors[f"best.{i}"])
