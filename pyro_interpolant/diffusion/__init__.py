r"""Velocity, score and denoiser, and the diffusion with the same densities.

For a Gaussian base and a linear interpolant, any one of velocity, score, denoiser and noise gives
the others: ``conversions`` has the algebra, ``scores`` applies it to a distribution, in data
coordinates. ``sde`` has the diffusions :math:`dX = (v + \epsilon S) dt + \sqrt{2 \epsilon} dW`
with the flow's densities at all times: their samples and their likelihoods. ``guidance`` samples
what is more typical of a label than the data are, ``posterior_sampling`` what observations leave
possible, approximately.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .conversions import *
    from .guidance import *
    from .posterior_sampling import *
    from .scores import *
    from .sde import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "conversions": ["Conversion", "convert"],
        "guidance": ["guided"],
        "posterior_sampling": ["approximate_posterior"],
        "scores": ["denoiser", "score"],
        "sde": ["InterpolantSDE", "sample_sde", "sde_log_prob"],
    },
)
