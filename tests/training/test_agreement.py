"""Whether draws are like rows held out: where they are not, whether it is the fit."""

import pytest
from cases import random_flow

from pyro_interpolant import InterpolantDistribution
from pyro_interpolant.training.agreement import warn_if_draws_differ
from pyro_interpolant.training.rows import Rows


def test_rows_held_out_that_are_unlike_those_trained_on_are_not_the_fits_fault(recwarn):
    """As a group that a user holds out as a whole: draws are like all others."""
    flow = InterpolantDistribution(random_flow(2)).freeze()
    kept, held = Rows(flow.sample((3000,)), None), Rows(flow.sample((200,)), None)
    group = held._replace(w=0.1 * held.w + 2.0)
    warn_if_draws_differ(flow, held, kept)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="wrong, or the rows held out are unlike those"):
        warn_if_draws_differ(flow, group, kept)
    shifted = kept._replace(w=kept.w + 9.0)
    with pytest.warns(UserWarning, match="the fit came out wrong: column 0"):
        warn_if_draws_differ(flow, group, shifted)
    with pytest.warns(UserWarning, match="the fit came out wrong: column 0"):
        warn_if_draws_differ(flow, shifted, shifted)
