"""The number of threads of a step is set by what it computes; the caller's is there afterwards."""

import threading

import pytest
import torch
from torch import nn

from pyro_interpolant import InterpolantDistribution, fit, interpolant_transform
from pyro_interpolant.solvers.parallel import one_thread_each, threads_for

ALL = 4


@pytest.fixture(autouse=True)
def _all_threads():
    """The machine has four; the fixture of all tests takes that back."""
    torch.set_num_threads(ALL)


class Images(nn.Module):
    image_shape = (1, 2, 2)


@pytest.mark.parametrize(("network", "expected"), [(nn.Linear(2, 2), 1), (Images(), ALL)])
def test_steps_take_one_thread_but_those_of_images_all(network, expected):
    with one_thread_each():
        with threads_for(network):
            assert torch.get_num_threads() == expected
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == ALL


def test_another_thread_of_python_leaves_the_number_alone():
    seen = []

    def step():
        with threads_for(Images()):
            seen.append(torch.get_num_threads())

    other = threading.Thread(target=step)
    other.start()
    other.join()
    assert seen == [ALL]


@pytest.mark.parametrize("fails", [False, True])
def test_fit_leaves_the_number_of_threads_as_it_was(fails):
    flow, seen = InterpolantDistribution(interpolant_transform(2, (8,))), []

    def callback(state):
        seen.append(torch.get_num_threads())
        if fails and state.step > 20:
            raise KeyError

    options = {"steps": 40, "seed": 0, "progress": False, "tolerance": 1.0}
    with pytest.raises(KeyError) if fails else torch.no_grad():
        fit(flow, torch.randn(100, 2), callback=callback, **options)
    assert set(seen) == {1}
    assert torch.get_num_threads() == ALL
