r"""The velocity: networks :math:`v_t(x \mid c)`, from a time, states and contexts to rates.

``velocity`` is the protocol: what any ``nn.Module`` must offer to be one, and what it may;
``mlp`` has the default network, whose divergence is exact, at about twice its own price with two
layers, and with three at more the more dimensions there are; ``torus`` its member for angles.
``embedded`` has the velocity given data, which ``embedding`` embeds once; ``unet`` has velocities
of images; ``modes`` sets a network to training or evaluation.

To add a network, write a module with ``forward(t, x, context=None)``; all else is optional.
"""

from typing import TYPE_CHECKING

from .._package import attach

if TYPE_CHECKING:
    from .embedded import *
    from .embedding import *
    from .mlp import *
    from .torus import *
    from .unet import *

__all__, __getattr__, __dir__ = attach(
    __name__,
    {
        "embedded": ["EmbeddedVelocity"],
        "embedding": ["SeriesEmbedding", "SetEmbedding"],
        "mlp": ["VelocityMLP"],
        "torus": ["TorusMLP"],
        "unet": ["ImageVelocity", "UNet"],
    },
)
