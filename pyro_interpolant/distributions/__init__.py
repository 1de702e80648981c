r"""Pyro distributions: a flow from its base to its support, for ``pyro.sample``.

``interpolant`` has the learned distributions, ``joint`` those of named sites, ``flow`` what they
are made of, ``summaries`` their moments and quantiles, by ``quasi_random`` draws, ``report`` what
training measured. ``bases`` are where flows start, ``base_support`` where these have a density,
``constraints`` the sets that values live in; ``supports`` take real vectors there, ``rows`` takes
data as given, ``rounding`` sees values that repeat. ``description`` writes it all for files, with
``base_description``, ``part_description`` and ``own_description``; ``differences`` compares what
is built again, ``fingerprint`` tells one flow from another.

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
