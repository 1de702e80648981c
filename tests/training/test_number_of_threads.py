"""Steps take one thread or all, by the clock; the caller's number is there afterwards."""

import pytest
import torch

from pyro_interpolant import InterpolantDistribution, fit, interpolant_transform
from pyro_interpolant.training import loop
from pyro_interpolant.training.threads import Threads

ALL = 4


@pytest.fixture(autouse=True)
def _all_threads():
    """The machine has four; the fixture of all tests takes that back."""
    torch.set_num_threads(ALL)


def taken(seconds, steps, threads=None):
    """Return the time of some steps, whose seconds on one and on all threads are given."""
    threads, total = threads or Threads(choose=True), 0.0
    for i in range(steps):
        share = 4.5 if i % 8 == 0 else 0.5  # what several steps need is made at once
        spent = share * seconds[torch.get_num_threads()]
        threads.took(spent)
        total += spent
    return total


@pytest.mark.parametrize("of_all", [0.3, 0.7, 1.0, 1.3, 3.0, 9.0])
def test_no_slower_by_a_tenth_than_the_better(of_all):
    assert taken({1: 1.0, ALL: of_all}, 1000) < 1.1 * 1000 * min(1.0, of_all)


def test_a_busy_machine_and_one_that_is_idle_again_are_noticed():
    threads, idle, busy = Threads(choose=True), {1: 1.0, ALL: 0.6}, {1: 1.0, ALL: 6.0}
    taken(idle, 400, threads)
    assert threads.used == ALL
    assert taken(busy, 400, threads) < 1.3 * 400
    assert threads.used == 1
    taken(idle, 4000, threads)
    assert threads.used == ALL


def test_there_is_no_choice_beside_other_processes_or_on_a_gpu():
    taken({ALL: 1.0}, 100, Threads(choose=False))
    assert torch.get_num_threads() == ALL


@pytest.mark.parametrize("fails", [False, True])
def test_fit_leaves_the_number_of_threads_as_it_was(fails, monkeypatch):
    seen, go_on = [], loop.Threads.took

    def took(threads, seconds):
        seen.append(torch.get_num_threads())
        go_on(threads, 10.0 if seen[-1] == ALL else 1.0)

    monkeypatch.setattr(loop.Threads, "took", took)
    flow = InterpolantDistribution(interpolant_transform(2, (8,)))

    def callback(state):
        if fails and state.step > 20:
            raise KeyError

    options = {"steps": 40, "seed": 0, "progress": False, "tolerance": 1.0}
    with pytest.raises(KeyError) if fails else torch.no_grad():
        fit(flow, torch.randn(100, 2), callback=callback, **options)
    assert seen[:9] == [1] * 8 + [ALL]
    assert torch.get_num_threads() == ALL
