r"""Flows inside Pyro models: as a guide, as a prior, and as a proposal.

``autoguide`` has the guide and its training, which gives a ``guide_result``; ``quantiles`` are
those of its draws. ``amortized`` is one that learns the posteriors of all data at once, judged by
``amortization``: from ``simulations`` that ``simulation`` draws, in ``workers`` if asked, or from
``simulated_batches`` made elsewhere. ``runs`` are single runs of a model that draws its data, and
``hidden`` tells whether some of these are hidden from the guide.

``log_density`` is a model's log joint as a function of the unconstrained vector that ``sites``
packs, with no density where ``validity`` says so; ``prior`` has draws to start from, ``lanes``
random numbers where many draws are evaluated at once. ``importance_sampling`` judges a guide by
the weights of its draws, ``inference_data`` hands draws to ArviZ. ``reparam`` samples a model in
the base space of its learned priors, ``neural_transport`` in that of a guide.

``smc`` trains a flow from a density alone. ``population`` learns the density behind a noisy
catalogue: ``noise`` is what a row says of its latent, ``latents`` draws them,
``expectation_maximization`` fits the flow. Both fit it by ``regression``, in the time and at the
rates of ``schedule``.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .amortization import *
    from .amortized import *
    from .autoguide import *
    from .guide_result import *
    from .log_density import *
    from .importance_sampling import *
    from .latents import *
    from .population import *
    from .inference_data import *
    from .reparam import *
    from .neural_transport import *
    from .smc.train import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "amortization": ["AmortizedResult", "Calibration"],
        "amortized": ["AmortizedInterpolant"],
        "autoguide": ["AutoInterpolant", "fit_guide"],
        "guide_result": ["GuideResult"],
        "log_density": ["LogJoint", "log_joint"],
        "importance_sampling": ["ImportanceResult", "importance"],
        "latents": ["ObjectPosteriors", "object_posteriors"],
        "population": ["from_noisy_samples", "from_posterior_samples"],
        "inference_data": ["to_arviz"],
        "reparam": ["base_space"],
        "neural_transport": ["Neutra", "neutra"],
        "smc.train": ["Round", "RoundsResult", "train_from_density"],
    },
)
