r"""Can it be trusted? Errors of solvers and probes, calibration of densities, importance weights.

``calibration`` measures a solver's error against a tight adaptive solve and chooses the fewest
steps that keep it within a tolerance; ``psis`` judges importance weights by the Pareto tail of the
largest (k-hat), and gives effective sample size and evidence. ``predictive`` compares a density
with rows that it has not seen, by ranks that are uniform where it is calibrated; ``two_sample``
tells two sets of draws apart by a classifier. ``likelihood`` has the bits per dimension of images.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .calibration import *
    from .likelihood import *
    from .predictive import *
    from .psis import *
    from .two_sample import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "calibration": [
            "SolverError",
            "calibrate",
            "calibrate_sampler",
            "log_prob_stderr",
            "solver_error",
        ],
        "likelihood": ["BitsPerDim", "bits_per_dim"],
        "predictive": ["CalibrationCheck", "coverage", "pit", "sbc", "tarp"],
        "psis": ["effective_sample_size", "pareto_smooth"],
        "two_sample": ["TwoSampleTest", "c2st"],
    },
)
