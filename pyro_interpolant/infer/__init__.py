r"""Flows inside Pyro models: as a guide, as a prior, and as a proposal.

``autoguide`` is a guide and its training; ``inference_data`` holds its draws,
``importance_sampling`` weighs them by ``log_density``, of the vector that ``sites`` packs,
``-inf`` where ``validity`` says so; it starts by ``initialization``, and ``prior`` draws it.
``amortized`` is a guide for all data, judged by ``amortization``: it learns from ``simulations``
by ``simulation``, in ``runs`` and ``workers``, or from ``simulated_batches``, of sets or with some
hidden where ``data`` says so. ``reparam`` samples a model in base space, ``neural_transport`` in a
guide's. ``smc`` learns from a density alone. ``population`` learns what is behind a catalogue: by
``noise``, ``deconvolution``, ``latents``, drawn from ``proposals``, and
``expectation_maximization``. Both use ``regression``.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .amortization import *
    from .amortized import *
    from .autoguide import *
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
        "log_density": ["LogJoint", "log_joint"],
        "importance_sampling": ["GuideResult", "ImportanceResult", "importance"],
        "latents": ["ObjectPosteriors", "object_posteriors"],
        "population": ["from_noisy_samples", "from_posterior_samples"],
        "inference_data": ["to_arviz"],
        "reparam": ["base_space"],
        "neural_transport": ["Neutra", "neutra"],
        "smc.train": ["Round", "RoundsResult", "train_from_density"],
    },
)
