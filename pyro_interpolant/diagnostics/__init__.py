r"""Can it be trusted? Errors of solvers, of probes, and of importance weights.

``calibration`` measures a solver's error against a tight adaptive solve and chooses the fewest
steps that keep it within a tolerance; ``psis`` judges importance weights by the Pareto tail of the
largest (k-hat), and gives effective sample size and evidence.
"""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .calibration import *
    from .psis import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "calibration": ["SolverError", "calibrate", "log_prob_stderr", "solver_error"],
        "psis": ["effective_sample_size", "pareto_smooth"],
    },
)
