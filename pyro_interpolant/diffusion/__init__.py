r"""Velocity, score and denoiser, and the diffusion with the same densities.

For a Gaussian base and a linear interpolant, ``conversions`` is the algebra that takes any of
velocity, score, denoiser and noise to the others; ``scores`` applies it to a distribution in data
coordinates. ``sde`` has the diffusions :math:`dX = (v + \epsilon S) dt + \sqrt{2 \epsilon} dW`
with the flow's densities at all times: their samples and their likelihoods.
"""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from .conversions import *
    from .scores import *
    from .sde import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "conversions": [
            "denoiser_to_score",
            "noise_to_score",
            "score_to_denoiser",
            "score_to_noise",
            "score_to_velocity",
            "velocity_to_denoiser",
            "velocity_to_score",
        ],
        "scores": ["denoiser", "score"],
        "sde": ["InterpolantSDE", "sample_sde", "sde_log_prob"],
    },
)
