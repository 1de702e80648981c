"""Results print as a few lines with the numbers that matter, not as lists of all they hold."""

import torch

from pyro_interpolant import FixedGrid
from pyro_interpolant.diagnostics import SolverError
from pyro_interpolant.distributions.report import Report
from pyro_interpolant.infer import GuideResult, Round, RoundsResult
from pyro_interpolant.training import FitResult
from pyro_interpolant.transport import TransportResult, W2Bound

REPORT = Report(2, 3000, 41.0, 1080, 6000, 0.004, -6.12, 0.03, -6.80)
CURVES = [1] * 99, [0.1] * 99, [0.2] * 99
FIT = FitResult(
    *CURVES, 1080, stopped_early=False, stopped_by="schedule", skipped=0, seconds=41.0,
    solver=FixedGrid(), report=REPORT,
)  # fmt: skip
ROUND = Round(0.3, 0.8, -3.0, 1.0, 0.5, 0.9, 2.0)
ROUNDS = RoundsResult(
    0.3,
    800.0,
    -3.14,
    0.02,
    1000,
    torch.zeros(500, 2),
    [ROUND] * 40,
    37,
    60.0,
    FixedGrid(),
    "rounds",
)


def test_results_print_as_cards():
    guide = GuideResult(0.3, 800.0, -3.14, 0.02, 1000, "Good, k-hat 0.30.", 61.0, ROUNDS)
    for result, expected in (
        (FIT, ["held-out -6.120 ± 0.030 nats", "ended by schedule"]),
        (FIT._replace(report=None), ["ended by schedule; FixedGrid(steps=20"]),
        (ROUNDS, ["k-hat 0.30, 800 effective draws of 1,000", "-3.140 ± 0.020", "40 rounds: 38"]),
        (
            guide,
            ["Good, k-hat 0.30.", "log-evidence -3.140 ± 0.020 nats, in 61 s", "500 particles"],
        ),
        (TransportResult([3.0] * 50 + [2.5], FIT), ["energy 3 at first, 2.5 at last", "-6.120"]),
        (
            W2Bound(3.2, 0.1, 1.0, exact=True, excess_stderr=0.02),
            ["W2^2 at most 3.2 ± 0.4: excess 0.1 ± 0.02, Lipschitz constant 1"],
        ),
        (SolverError(1e-3, 5e-3, -1e-4, 1e-5, 2e-4), ["within 0.001 nats", "bias -0.0001"]),
    ):
        text = repr(result)
        assert "tensor" not in text
        assert "[" not in text
        assert "None" not in text
        assert len(text) < 400
        for part in expected:
            assert part in text
