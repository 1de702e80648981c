r"""Continuous normalizing flows for Pyro, trained by stochastic interpolants.

*A flow is a base, an interpolant and a velocity; a solver and a divergence turn it into a Pyro
transform.*

Conventions: time runs from the base, ``t = 0``, to the data, ``t = 1``; arguments come in the
order ``(t, x)``; events are the last dimension, ``x: (*, D)``; densities are in nats.

References:
    Albergo & Vanden-Eijnden, *Building Normalizing Flows with Stochastic Interpolants*, ICLR 2023,
    arXiv 2209.15571.
"""

from typing import TYPE_CHECKING

from ._package import attach

if TYPE_CHECKING:
    from . import (
        interpolants,
        nn,
        solvers,
        transforms,
        distributions,
        diffusion,
        diagnostics,
        io,
        plotting,
        training,
        transport,
        infer,
        numpyro,
    )
    from .interpolants import (
        BrownianBridge,
        EncodingDecoding,
        Geodesic,
        Interpolant,
        Latent,
        LearnedInterpolant,
        Linear,
        Mirror,
        NonlinearInterpolant,
        SineSquared,
        Trigonometric,
        VariancePreserving,
        independent,
        optimal_transport,
    )
    from .nn import TorusMLP, VelocityMLP
    from .solvers import Adaptive, ExactDivergence, FixedGrid, HutchinsonDivergence
    from .transforms import (
        ConditionalInterpolantTransform,
        InterpolantTransform,
        conditional_interpolant_transform,
        interpolant_transform,
    )
    from .distributions import (
        ConditionalInterpolantDistribution,
        ExternalBase,
        InterpolantDistribution,
        JointInterpolantDistribution,
        Samples,
        UniformTorus,
        circular,
    )
    from .diffusion import InterpolantSDE, denoiser, sample_sde, score
    from .diagnostics import calibrate, log_prob_stderr, solver_error
    from .io import load, save
    from .training import dequantize, fit, from_samples, interpolant_loss
    from .transport import distill, learn_interpolant, path_energy, reflow, w2_bound
    from .infer import (
        AmortizedInterpolant,
        AutoInterpolant,
        base_space,
        fit_guide,
        from_noisy_samples,
        from_posterior_samples,
        importance,
        log_joint,
        neutra,
        to_arviz,
        train_from_density,
    )

__version__ = "0.2.0.dev0"

_MOVED = {
    name: f"it is {__name__}.{room}.{name}"
    for room, names in {
        "solvers": ["clenshaw_curtis"],
        "diffusion": ["sde_log_prob"],
        "diagnostics": ["SolverError", "effective_sample_size", "pareto_smooth"],
        "training": ["FitResult", "TrainingState"],
        "transport": ["PathEnergy", "PathReport", "ReflowResult", "TransportResult", "W2Bound"],
        "infer": [
            "GuideResult",
            "ImportanceResult",
            "LogJoint",
            "Neutra",
            "Round",
            "RoundsResult",
        ],
    }.items()
    for name in names
} | {
    f"{given}_to_{wanted}": f"use {__name__}.diffusion.convert(interpolant, t, x, "
    f"{given}={given}).{wanted}"
    for given, wanted in (
        ("velocity", "score"),
        ("velocity", "denoiser"),
        ("score", "velocity"),
        ("score", "denoiser"),
        ("score", "noise"),
        ("denoiser", "score"),
        ("noise", "score"),
    )
}

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "interpolants": [
            "BrownianBridge",
            "EncodingDecoding",
            "Geodesic",
            "Interpolant",
            "Latent",
            "LearnedInterpolant",
            "Linear",
            "Mirror",
            "NonlinearInterpolant",
            "SineSquared",
            "Trigonometric",
            "VariancePreserving",
            "independent",
            "optimal_transport",
        ],
        "nn": ["TorusMLP", "VelocityMLP"],
        "solvers": ["Adaptive", "ExactDivergence", "FixedGrid", "HutchinsonDivergence"],
        "transforms": [
            "ConditionalInterpolantTransform",
            "InterpolantTransform",
            "conditional_interpolant_transform",
            "interpolant_transform",
        ],
        "distributions": [
            "ConditionalInterpolantDistribution",
            "ExternalBase",
            "InterpolantDistribution",
            "JointInterpolantDistribution",
            "Samples",
            "UniformTorus",
            "circular",
        ],
        "diffusion": ["InterpolantSDE", "denoiser", "sample_sde", "score"],
        "diagnostics": ["calibrate", "log_prob_stderr", "solver_error"],
        "io": ["load", "save"],
        "training": ["dequantize", "fit", "from_samples", "interpolant_loss"],
        "transport": ["distill", "learn_interpolant", "path_energy", "reflow", "w2_bound"],
        "infer": [
            "AmortizedInterpolant",
            "AutoInterpolant",
            "base_space",
            "fit_guide",
            "from_noisy_samples",
            "from_posterior_samples",
            "importance",
            "log_joint",
            "neutra",
            "to_arviz",
            "train_from_density",
        ],
    },
    rooms=[
        "interpolants",
        "nn",
        "solvers",
        "transforms",
        "distributions",
        "diffusion",
        "diagnostics",
        "io",
        "plotting",
        "training",
        "transport",
        "infer",
        "numpyro",
    ],
    moved=_MOVED,
)
