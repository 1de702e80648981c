"""However many threads a run takes, the caller's number is there afterwards."""

import pytest
import torch

from pyro_interpolant import InterpolantDistribution, fit, interpolant_transform

ALL = 4


@pytest.mark.parametrize("fails", [False, True])
def test_fit_leaves_the_number_of_threads_as_it_was(fails):
    torch.set_num_threads(ALL)  # the fixture of all tests takes that back
    flow = InterpolantDistribution(interpolant_transform(2, (8,)))

    def callback(state):
        if fails and state.step > 20:
            raise KeyError

    options = {"steps": 40, "seed": 0, "progress": False, "tolerance": 1.0}
    with pytest.raises(KeyError) if fails else torch.no_grad():
        fit(flow, torch.randn(100, 2), callback=callback, **options)
    assert torch.get_num_threads() == ALL
