r"""The twin in JAX: a flow that was trained and saved with torch, as a NumPyro distribution.

``load(path)`` reads the file that :func:`pyro_interpolant.save` wrote, without torch, and gives a
distribution for ``numpyro.sample``: a pytree that can be jitted, mapped, differentiated, put into
plates and scans, and sampled by NUTS. ``base_space(model)`` samples it in base space.
``fit_guide`` trains a guide of a NumPyro model; ``importance`` and ``neutra`` put it to use.

The path is solved by one ``lax.scan`` over all Runge-Kutta stages, the divergence at the nodes
comes after it. To add a network, write its functions of weights beside ``mlp``.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .autoguide import *
    from .distributions import *
    from .frozen import *
    from .importance_sampling import *
    from .loading import *
    from .reparam import *
    from .transforms import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "autoguide": ["AutoInterpolant", "fit_guide"],
        "distributions": [
            "ConditionalInterpolantDistribution",
            "InterpolantDistribution",
            "JointInterpolantDistribution",
        ],
        "frozen": ["Frozen"],
        "importance_sampling": ["ImportanceResult", "importance"],
        "loading": ["from_torch", "load"],
        "reparam": ["base_space", "neutra"],
        "transforms": ["InterpolantTransform"],
    },
    needs="numpyro>=0.22",
)
