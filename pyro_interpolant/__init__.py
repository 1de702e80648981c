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
from .psis import effective_sample_size, pareto_smooth
from .quadrature import clenshaw_curtis
from .rounding import dequantize
from .divergence import ExactDivergence, HutchinsonDivergence
from .interpolants import (
    EncodingDecoding,
    Interpolant,
    Linear,
    NonlinearInterpolant,
    Trigonometric,
    VariancePreserving,
)
from .conversions import (
    denoiser_to_score,
    noise_to_score,
    score_to_denoiser,
    score_to_noise,
    score_to_velocity,
    velocity_to_denoiser,
    velocity_to_score,
)
from .latents import BrownianBridge, Latent, Mirror, SineSquared
from .learned import LearnedInterpolant
from .networks import VelocityMLP
from .solvers import Adaptive, FixedGrid
from .supports import circular
from .torus import Geodesic, TorusMLP, UniformTorus
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
from .reparam import base_space
from .scores import denoiser, score
from .sde import InterpolantSDE, sample_sde
from .likelihoods import sde_log_prob
from .guides import AutoInterpolant
from .models import LogJoint, log_joint
from .io import load, save
from .monitors import TrainingState
from .training import FitResult, fit
from .samples import from_samples
from .diagnostics import (
    ImportanceResult,
    PathEnergy,
    SolverError,
    W2Bound,
    calibrate,
    importance,
    log_prob_stderr,
    path_energy,
    solver_error,
    w2_bound,
)
from .neutra import Neutra, neutra
from .rounds import Round, RoundsResult, train_from_density
from .guiding import GuideResult, fit_guide
from .straightening import PathReport, ReflowResult, reflow
from .transport import TransportResult, learn_interpolant

__all__ = [
    "Adaptive",
    "AutoInterpolant",
    "BrownianBridge",
    "ConditionalInterpolantDistribution",
    "ConditionalInterpolantTransform",
    "EncodingDecoding",
    "ExactDivergence",
    "ExternalBase",
    "FitResult",
    "FixedGrid",
    "Geodesic",
    "GuideResult",
    "HutchinsonDivergence",
    "ImportanceResult",
    "Interpolant",
    "InterpolantDistribution",
    "InterpolantSDE",
    "InterpolantTransform",
    "JointInterpolantDistribution",
    "Latent",
    "LearnedInterpolant",
    "Linear",
    "LogJoint",
    "Mirror",
    "Neutra",
    "NonlinearInterpolant",
    "PathEnergy",
    "PathReport",
    "ReflowResult",
    "Round",
    "RoundsResult",
    "Samples",
    "SineSquared",
    "SolverError",
    "TorusMLP",
    "TrainingState",
    "TransportResult",
    "Trigonometric",
    "UniformTorus",
    "VariancePreserving",
    "VelocityMLP",
    "W2Bound",
    "__version__",
    "base_space",
    "calibrate",
    "circular",
    "clenshaw_curtis",
    "conditional_interpolant_transform",
    "denoiser",
    "denoiser_to_score",
    "dequantize",
    "effective_sample_size",
    "fit",
    "fit_guide",
    "from_samples",
    "importance",
    "independent",
    "interpolant_loss",
    "interpolant_transform",
    "learn_interpolant",
    "load",
    "log_joint",
    "log_prob_stderr",
    "neutra",
    "noise_to_score",
    "optimal_transport",
    "pareto_smooth",
    "path_energy",
    "reflow",
    "sample_sde",
    "save",
    "score",
    "score_to_denoiser",
    "score_to_noise",
    "score_to_velocity",
    "sde_log_prob",
    "solver_error",
    "train_from_density",
    "velocity_to_denoiser",
    "velocity_to_score",
    "w2_bound",
]
