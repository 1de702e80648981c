r"""Pyro distributions: a flow from its base to its support, for ``pyro.sample``.

``interpolant`` has the learned distribution and the conditional one, ``joint`` the one of named
sites. ``bases`` are where flows start: the standard normal, any distribution, samples, the uniform
torus. ``constraints`` are the sets that values live in, ``supports`` take a flow's real vectors
there. ``description`` writes all of it as names and numbers, for files.

To add a support, write a constraint in ``constraints`` and register its bijection by Pyro's
``biject_to``. One of your own code serves as well, but files cannot hold it.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .interpolant import *
    from .joint import *
    from .bases import *
    from .constraints import circular

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "interpolant": ["ConditionalInterpolantDistribution", "InterpolantDistribution"],
        "joint": ["ConditionalJointInterpolantDistribution", "JointInterpolantDistribution"],
        "bases": ["ExternalBase", "Samples", "UniformTorus"],
        "constraints": ["circular"],
    },
)
