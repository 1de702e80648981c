"""Steps take one thread or all, by the clock; the caller's number is there afterwards."""

import threading

import pytest
import torch

from pyro_interpolant import InterpolantDistribution, fit, interpolant_transform
from pyro_interpolant.infer import regression
from pyro_interpolant.infer.smc.tempering import LogDensity
from pyro_interpolant.solvers.parallel import one_thread_each
from pyro_interpolant.training import loop
from pyro_interpolant.training.rows import Rows
from pyro_interpolant.training.threads import Threads

ALL = 4


@pytest.fixture(autouse=True)
def _all_threads():
    """The machine has four; the fixture of all tests takes that back."""
    torch.set_num_threads(ALL)


def taken(seconds, steps, threads=None, pause=()):
    """Return the time of steps, whose seconds on one and on all threads are given, less pauses."""
    threads, total = threads or Threads(choose=True), 0.0
    threads.settle()
    for i in range(steps):
        spent = seconds[torch.get_num_threads()]
        threads.took(spent + 30 * (i in pause))
        total += spent
    return total


@pytest.mark.parametrize("of_all", [0.1, 0.7, 1.0, 1.3, 3.0, 9.0])
@pytest.mark.parametrize("pause", [(), (0,), (2, 700), (9, 12)])
def test_no_slower_by_a_tenth_than_the_better(of_all, pause):
    assert taken({1: 1.0, ALL: of_all}, 2000, pause=pause) < 1.1 * 2000 * min(1.0, of_all)


def test_two_of_a_few_long_steps_are_spent_on_one_thread():
    assert taken({1: 20.0, ALL: 1.0}, 20) == 2 * 20 + 18


def test_one_of_the_first_steps_is_spent_on_all_threads_of_a_busy_machine():
    assert taken({1: 1.0, ALL: 300.0}, 100) == 300 + 99


def test_a_busy_machine_and_one_that_is_idle_again_are_noticed():
    threads, idle, busy = Threads(choose=True), {1: 1.0, ALL: 0.6}, {1: 1.0, ALL: 6.0}
    taken(idle, 400, threads)
    assert threads.used == ALL
    assert taken(busy, 400, threads) < 1.3 * 400
    assert threads.used == 1
    taken(idle, 4000, threads)
    assert threads.used == ALL


def test_there_is_no_choice_beside_other_threads_or_processes():
    taken({ALL: 1.0}, 100, Threads(choose=False))
    seen = []
    other = threading.Thread(target=lambda: seen.append(Threads(choose=True).other))
    other.start()
    other.join()
    assert seen == [ALL]


def test_steps_within_work_on_one_thread_may_take_all():
    with one_thread_each():
        threads = Threads(choose=True)
        taken({1: 1.0, ALL: 0.5}, 40, threads)
        assert threads.used == ALL


def counted(monkeypatch, module):
    """Return a list that will hold the number of threads of each step: all are slower."""
    seen, go_on = [], module.Threads.took

    def took(threads, seconds):
        seen.append(torch.get_num_threads())
        go_on(threads, 10.0 if seen[-1] == ALL else 1.0)

    monkeypatch.setattr(module.Threads, "took", took)
    return seen


@pytest.mark.parametrize("fails", [False, True])
def test_fit_leaves_the_number_of_threads_as_it_was(fails, monkeypatch):
    seen = counted(monkeypatch, loop)
    flow = InterpolantDistribution(interpolant_transform(2, (8,)))

    def callback(state):
        if fails and state.step > 20:
            raise KeyError

    options = {"steps": 40, "seed": 0, "progress": False, "tolerance": 1.0}
    with pytest.raises(KeyError) if fails else torch.no_grad():
        fit(flow, torch.randn(100, 2), callback=callback, **options)
    assert seen[:18] == [1] + [ALL] + [1] * 16
    assert torch.get_num_threads() == ALL


def test_the_regression_of_rounds_does_too(monkeypatch):
    seen = counted(monkeypatch, regression)
    flow = InterpolantDistribution(interpolant_transform(2, (8,)))
    fitted = regression.FlowRegression(flow, [Rows(torch.randn(50, 2), None)])
    fitted(10, lambda: 1e-3, seconds=60.0)
    assert fitted.threads.used == 1
    assert torch.get_num_threads() == ALL
    assert seen == [1, ALL] + [1] * 8


def test_blocks_of_a_density_choose_theirs_and_a_trial_goes_on_from_call_to_call():
    seen = []

    def log_density(x):
        seen.append(torch.get_num_threads())
        return -x.square().sum(-1)

    threads, go_on = Threads(choose=True), Threads.took
    with one_thread_each():
        density = LogDensity(log_density, threads)
        threads.took = lambda seconds: go_on(threads, 0.5 if seen[-1] == ALL else 1.0)
        for _ in range(3):
            density.particles(torch.randn(3000, 2))
        assert torch.get_num_threads() == 1
        density.tune(torch.randn(10, 2))
        assert seen[-1] == 1
        density(torch.randn(10, 2))
    assert seen[:9] == [1] + [ALL] * 5 + [1] * 2 + [ALL]
    assert seen[-1] == ALL
    assert torch.get_num_threads() == ALL
