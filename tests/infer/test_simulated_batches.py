"""Guides trained on simulations made elsewhere, and simulations made in worker processes."""

import pickle

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from simulators import QUICK, ROWS, by_numpy, of_a_parameter, rows_of_a_normal
from torch.utils.data import DataLoader

import pyro_interpolant as pi
from pyro_interpolant._torch import seeded
from pyro_interpolant.infer.workers import called_in_workers


def batches_of(count, size=250):
    loc = 2 * torch.randn(count)
    y = loc[:, None] + torch.randn(count, ROWS)
    return [({"loc": a}, {"y": b}) for a, b in zip(loc.split(size), y.split(size), strict=True)]


@pytest.mark.slow
def test_batches_train_a_guide_and_judge_it_by_those_held_out():
    batches = batches_of(1500)
    batches[0][1]["y"][3] = torch.nan
    as_arrays = [({"loc": a["loc"].numpy()}, {"y": b["y"].numpy()}) for a, b in batches]
    guide = pi.AmortizedInterpolant(rows_of_a_normal, hidden_dims=(32, 32))
    result = pi.fit_guide(guide, simulations=as_arrays, **QUICK)
    assert abs(result.gain - 0.5 * np.log(17)) < 4 * result.gain_stderr + 0.05
    assert result.simulations == 1499 - 149  # a tenth is held out
    assert result.improper == pytest.approx(1 / 1500)
    assert result.ess[1] > 0.9
    assert guide.posterior.report.held_out_stderr > 0
    y = torch.tensor([3.0, 3.0, 2.0, 4.0])
    assert abs(guide.median(y)["loc"] - 12 / 4.25) < 0.3 * 4.25**-0.5


def test_what_is_held_out_does_not_train_wherever_it_comes(monkeypatch):
    batches, seen = batches_of(600), []

    def fit(posterior, data, *, validation, **settings):
        for _ in range(2):  # passes in other orders
            batches.reverse()
            seen.append(torch.cat([rows for rows, _ in data])[:, 0])
        seen.append(validation[0][:, 0])
        assert len(data) == 3
        raise StopIteration

    monkeypatch.setattr("pyro_interpolant.infer.amortized.fit", fit)
    guide = pi.AmortizedInterpolant(rows_of_a_normal, hidden_dims=(8,))
    with pytest.raises(StopIteration):
        pi.fit_guide(guide, simulations=batches, **QUICK)
    first, second, held = seen
    assert len(held) == 60
    every = torch.cat([latents["loc"] for latents, _ in batches])
    for rows in (first, second):
        assert torch.equal(torch.cat((rows, held)).sort().values, every.sort().values)


@pytest.mark.usefixtures("_small_runs")
def test_loaders_and_simulations_of_the_guide_itself_are_batches():
    guide = pi.AmortizedInterpolant(rows_of_a_normal, hidden_dims=(8,))
    latents, data = batches_of(300, 300)[0]
    rows = [({"loc": a}, {"y": b}) for a, b in zip(latents["loc"], data["y"], strict=True)]
    quick = {**QUICK, "options": {"steps": 3}}
    assert pi.fit_guide(guide, simulations=DataLoader(rows, 100), **quick).simulations == 270
    own = [guide.simulate(100) for _ in range(2)]
    assert pi.fit_guide(guide, simulations=own, **quick).simulations == 180


@pytest.mark.slow
@pytest.mark.usefixtures("_small_runs")
def test_no_draw_is_weighed_where_the_batches_lack_what_the_model_draws():
    batches = [(latents, {"mean": data["y"].mean(-1)}) for latents, data in batches_of(300)]
    guide = pi.AmortizedInterpolant(rows_of_a_normal, ("mean",), hidden_dims=(8,))
    result = pi.fit_guide(guide, torch.zeros(ROWS), simulations=batches, **QUICK)
    assert result.data_sets == 0
    assert "no density" in result.verdict


@pytest.mark.parametrize(
    ("simulations", "message"),
    [
        (iter([]), "used up after once"),
        ([], "at least 10 finite simulations, got 0"),
        ([torch.zeros(20)], r"in batch 0.*\(latents, data\), two dictionaries.*got Tensor"),
        (
            [({"loc": torch.zeros(20)}, {})],
            r"got none of \['y'\]: the latents are \['loc'\], the data \[\]",
        ),
        (
            [({"y": torch.zeros(20, ROWS)}, {"loc": torch.zeros(20)})],
            r"in batch 0.*got none of \['loc', 'y'\]: the latents are \['y'\], the data \['loc'\]",
        ),
        ([({"loc": torch.zeros(20)}, {"y": torch.zeros(19, ROWS)})], "one value per simulation"),
        ([({"loc": torch.zeros(20)}, {"y": torch.full((20, ROWS), torch.nan)})], "got 0 and 20"),
        ([({"loc": torch.zeros(20, 1)}, {"y": torch.zeros(20, ROWS)})], r"'loc' of shape \(\*\)"),
        ([({"loc": torch.zeros(20)}, {"y": torch.zeros(20, 2)})], rf"of shape \(\*, {ROWS}\)"),
    ],
)
@pytest.mark.usefixtures("_small_runs")
def test_batches_of_another_form_are_explained(simulations, message):
    guide = pi.AmortizedInterpolant(rows_of_a_normal, hidden_dims=(8,))
    with pytest.raises(ValueError, match=message):
        pi.fit_guide(guide, simulations=simulations, **QUICK)


def test_batches_know_no_rounds():
    guide = pi.AmortizedInterpolant(rows_of_a_normal, hidden_dims=(8,))
    with pytest.raises(ValueError, match="got batches"):
        pi.fit_guide(guide, torch.zeros(ROWS), simulations=batches_of(300), rounds=2, **QUICK)


# Worker processes


@pytest.mark.slow
def test_workers_give_the_same_simulations_however_many_they_are():
    found = []
    for workers in (1, 2):
        guide = pi.AmortizedInterpolant(by_numpy, num_workers=workers)
        with seeded(3):
            found.append(guide.simulate(50))
    for one, two in zip(*found, strict=True):
        assert one == two if isinstance(one, int) else str(one) == str(two)
    y, w = found[0].data["y"], found[0].latents["w"]
    assert torch.equal(y, found[1].data["y"])
    assert len(y.unique()) == 100  # no seed twice
    assert w.dtype == torch.float64
    assert abs((y[:, 0] - w).std() - 1) < 0.4


@pytest.mark.slow
def test_workers_know_the_parameters_of_the_model():
    pyro.clear_param_store()
    pyro.param("shift", torch.tensor(2.5))
    guide = pi.AmortizedInterpolant(of_a_parameter, num_workers=1)
    assert bool((guide.simulate(20).data["y"] == 2.5).all())


@pytest.mark.slow
def test_an_error_in_a_worker_comes_with_its_message_and_line():
    guide = pi.AmortizedInterpolant(by_numpy, num_workers=2)
    guide(10.0, torch.zeros(2))
    failure = r"(?s)by_numpy.*ZeroDivisionError: the population"
    with seeded(3), pytest.raises(RuntimeError, match=failure):
        guide.simulate(100, 1.5)


def test_a_model_that_cannot_be_pickled_is_refused():
    def inside(y=None):
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Delta(torch.tensor(w.item())), obs=y)

    guide = pi.AmortizedInterpolant(inside, num_workers=1)
    with pytest.raises(ValueError, match=r"pickled for num_workers=1.*inside.*__main__"):
        guide.simulate(20)
    for count in (-1, 1.5):
        with pytest.raises(ValueError, match="num_workers >= 0, a whole number"):
            pi.AmortizedInterpolant(inside, num_workers=count)


class Unimportable:
    """What cannot be found again where it is unpickled."""

    def __reduce__(self):
        return pickle.loads, (b"cno_such_module\nname\n.",)


class Dying:
    """What ends the process that unpickles it."""

    def __reduce__(self):
        return __import__("os")._exit, (1,)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (Unimportable(), ValueError, "can import, got: ModuleNotFoundError.*no_such_module"),
        (Dying(), RuntimeError, "ended before its time"),
    ],
)
def test_workers_that_cannot_begin_are_explained(function, error, message):
    with pytest.raises(error, match=message):
        list(called_in_workers(function, [()], 1))
