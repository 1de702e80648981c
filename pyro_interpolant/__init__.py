r"""Continuous normalizing flows for Pyro, trained by stochastic interpolants.

*A flow is a base, an interpolant and a velocity; a solver and a divergence turn it into a Pyro
transform.*

Conventions: time runs from the base, ``t = 0``, to the data, ``t = 1``; arguments come in the
order ``(t, x)``; events are the last dimension, ``x: (*, D)``; densities are in nats.

References:
    Albergo & Vanden-Eijnden, *Building Normalizing Flows with Stochastic Interpolants*, ICLR 2023,
    arXiv 2209.15571.
"""

# Grouped by floor: a module imports only from the floors above its own line.
from ._version import __version__
from .couplings import independent, optimal_transport
from .quadrature import clenshaw_curtis
from .divergence import ExactDivergence, HutchinsonDivergence
from .interpolants import (
    EncodingDecoding,
    Interpolant,
    Linear,
    NonlinearInterpolant,
    Trigonometric,
    VariancePreserving,
)
from .latents import BrownianBridge, Latent, Mirror, SineSquared
from .networks import VelocityMLP
from .solvers import Adaptive, FixedGrid
from .bases import ExternalBase, Samples
from .transforms import (
    ConditionalInterpolantTransform,
    InterpolantTransform,
    conditional_interpolant_transform,
    interpolant_transform,
)
from .distributions import ConditionalInterpolantDistribution, InterpolantDistribution
from .joint import JointInterpolantDistribution
from .losses import interpolant_loss
from .diagnostics import SolverError, calibrate, log_prob_stderr, solver_error
from .reparam import base_space
from .io import load, save
from .loop import TrainingState
from .training import FitResult, fit, from_samples

__all__ = [
    "Adaptive",
    "BrownianBridge",
    "ConditionalInterpolantDistribution",
    "ConditionalInterpolantTransform",
    "EncodingDecoding",
    "ExactDivergence",
    "ExternalBase",
    "FitResult",
    "FixedGrid",
    "HutchinsonDivergence",
    "Interpolant",
    "InterpolantDistribution",
    "InterpolantTransform",
    "JointInterpolantDistribution",
    "Latent",
    "Linear",
    "Mirror",
    "NonlinearInterpolant",
    "Samples",
    "SineSquared",
    "SolverError",
    "TrainingState",
    "Trigonometric",
    "VariancePreserving",
    "VelocityMLP",
    "__version__",
    "base_space",
    "calibrate",
    "clenshaw_curtis",
    "conditional_interpolant_transform",
    "fit",
    "from_samples",
    "independent",
    "interpolant_loss",
    "interpolant_transform",
    "load",
    "log_prob_stderr",
    "optimal_transport",
    "save",
    "solver_error",
]
