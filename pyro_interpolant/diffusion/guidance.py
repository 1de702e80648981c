r"""Classifier-free guidance: samples that are more typical of their label than the data are.

With the velocity :math:`v_t(x \mid c)` and that of no label, :math:`v_t(x)`, both by one network,
samples follow

.. math:: v_t(x) + s\,(v_t(x \mid c) - v_t(x)).

References:
    Ho & Salimans, *Classifier-free diffusion guidance*, arXiv 2207.12598.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .._package import check_ranges, number
from ..distributions.interpolant import ConditionalInterpolantDistribution
from ..distributions.joint import ConditionalJointInterpolantDistribution
from ..nn.velocity import image_shape, rows_at_once, size_of
from ..solvers.divergence import NoDensity
from ..transforms.interpolant import ConditionalInterpolantTransform


def guided(
    distribution: ConditionalInterpolantDistribution, scale: float = 2.0
) -> ConditionalInterpolantDistribution:
    """Return a family whose samples are guided toward their labels; it shares the weights.

    ``guided(images, 3.0).condition(labels).sample()``. It has no ``log_prob``: a guided velocity
    is not that of a path between base and data, and where it ends is not the product of densities
    that it is motivated by.

    Args:
        distribution: A conditional flow whose network has a label for none of its classes, such
            as :class:`~pyro_interpolant.nn.UNet`.
        scale: s; 1 is no guidance, and 0 samples without regard to labels.

    Raises:
        TypeError: If the distribution is none that takes labels, as one that was given them.
        ValueError: If the network, or that of the noise where one is learned, has no such label,
            or the scale is no finite number.
    """
    if not isinstance(distribution, ConditionalInterpolantDistribution):
        raise TypeError(
            "expected a conditional flow, got a distribution of class "
            f"{type(distribution).__name__}: guide the one that takes labels, "
            "guided(images).condition(labels)"
        )
    check_ranges(number("a finite scale", scale, math.isfinite))
    transform = distribution.transform
    flow = transform.flow
    new = ConditionalInterpolantTransform(
        Guided(flow.velocity, scale),
        flow.event_dim,
        interpolant=flow.interpolant,
        solver=transform.solver,
        divergence=NoDensity(),
        whitening=flow.whitening,
    )
    new.trains_weights = transform.trains_weights
    # What the score follows from, if there is one: of a guided noise it is guided, too.
    new.flow.independent, new.flow.reached = flow.independent, flow.reached
    new.flow.levels = flow.levels
    new.flow.noise = None if flow.noise is None else Guided(flow.noise, scale)
    kind: Callable[..., ConditionalInterpolantDistribution] = ConditionalInterpolantDistribution
    if isinstance(distribution, ConditionalJointInterpolantDistribution):
        kind = partial(ConditionalJointInterpolantDistribution, sites=distribution.sites)
    family = kind(new, distribution.base, support=distribution.constraint)
    family.columns, family.context_columns = distribution.columns, distribution.context_columns
    family.refined_for = distribution.refined_for
    return family


class Guided(nn.Module):
    """The guided velocity, or noise: both of its parts in one call of the network.

    Args:
        velocity: The network.
        scale: s.

    Raises:
        ValueError: If the network has no label for none of its classes.
    """

    def __init__(self, velocity: nn.Module, scale: float) -> None:
        super().__init__()
        null = size_of(velocity, "null_label")
        if null is None:
            raise ValueError(
                "expected a network with a label for none of its classes, such as "
                "UNet(..., classes=K) or ImageVelocity(..., null_label=K), got "
                f"{type(velocity).__name__}"
            )
        self.velocity, self.null, self.scale = velocity, null, scale
        self.classes, self.image_shape = size_of(velocity, "classes"), image_shape(velocity)

    def rows_at_once(self) -> int:
        """Return the number of rows for which one call is fastest, without gradients."""
        return max(1, rows_at_once(self.velocity) // 2)

    def forward(self, t: Tensor, x: Tensor, context: Tensor) -> Tensor:
        """Return the velocity, shape ``(*, D)``, at times ``(*)`` given labels, ``(*, 1)``."""
        labels = torch.stack((context, torch.full_like(context, self.null)))
        with_label, without = self.velocity(
            t.expand(2, *t.shape), x.expand(2, *x.shape), labels
        ).unbind()
        return without + self.scale * (with_label - without)
