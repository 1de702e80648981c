r"""Pyro transforms: base in, data out, log-determinant on demand.

``flow`` is the numerics of one way through a velocity, in the coordinates of ``whitening``;
``interpolant`` makes it a Pyro ``TransformModule``, with the identity cache of ``cache``.
``bijections`` wrap the maps from real vectors to a support, and ``gaussianize`` has maps that
make data nearer to normal.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .interpolant import *
    from .gaussianize import *
    from .whitening import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "interpolant": [
            "ConditionalInterpolantTransform",
            "InterpolantTransform",
            "conditional_interpolant_transform",
            "interpolant_transform",
        ],
        "gaussianize": ["MarginalTransform", "RadialTransform"],
        "whitening": ["DenseWhitening", "DiagonalWhitening", "ScalarWhitening"],
    },
)
