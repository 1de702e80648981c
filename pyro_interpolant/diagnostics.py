"""What tells a user that a flow is good, or not, in one place.

Of a density: :func:`solver_error` and :func:`calibrate`; of a stochastic one
:func:`log_prob_stderr`. Of a path: :func:`path_energy` and :func:`w2_bound`. Of a guide:
:func:`importance`.
"""

from .calibration import SolverError, calibrate, log_prob_stderr, solver_error
from .importance import ImportanceResult, importance
from .paths import PathEnergy, W2Bound, path_energy, w2_bound

__all__ = [
    "ImportanceResult",
    "PathEnergy",
    "SolverError",
    "W2Bound",
    "calibrate",
    "importance",
    "log_prob_stderr",
    "path_energy",
    "solver_error",
    "w2_bound",
]
