r"""Velocities of images: convolutional networks from a time and an image to an image's rate.

The flow is flat: its states are vectors of D = C H W numbers, in row-major order. A velocity here
reshapes them to images, ``(N, C, H, W)``, for a network :math:`u(t, x, c)` and its rates back to
vectors. :class:`UNet` is diffusers' U-Net (extra ``[images]``); :class:`ImageVelocity` takes any
other network.

References:
    Ho, Jain & Abbeel, *Denoising diffusion probabilistic models*, NeurIPS 2020 (the network);
    Ho & Salimans, *Classifier-free diffusion guidance*, arXiv 2207.12598 (the null label).
"""

import contextlib
import math
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from .._package import check_sizes, needing
from .._torch import is_functional, needs_graph
from .elementary import Elementary
from .velocity import expanded

_TIME_SCALE = 1000.0  # diffusers' times run from 0 to 1,000
_LONGEST_PERIOD = 1e4  # of the sinusoids of scaled time, over 2 pi
_MOST_GROUPS, _CHANNELS_PER_GROUP = 32, 4  # of group normalisation; the latter at least
_MOST_HEAD_CHANNELS = 8  # of an attention head
_VALUES_AT_ONCE = 2**21  # of the first layer's output


class ImageVelocity(nn.Module):
    """A velocity by a network of images: the adapter for any network of your own.

    The network is called with times, shape ``(N,)``, images, ``(N, C, H, W)``, and, where there
    are classes, labels, whole numbers of shape ``(N,)``; it returns rates of the images' shape. It
    must treat images independently.

    Args:
        network: The network.
        image_shape: ``(C, H, W)``.
        classes: K, for contexts that are labels 0 to K - 1; 0 for none.
        null_label: The label that the network takes for none of the classes. Training gives it to
            a tenth of the images, so that samples can be guided.

    Raises:
        TypeError: If a size is not a whole number, or the shape is no sequence of them.
        ValueError: If the shape is not three positive sizes, or there is a null label but no
            class, or it is one of the classes.

    Example:
        >>> class Blur(torch.nn.Module):
        ...     def forward(self, t, image):
        ...         return torch.nn.functional.avg_pool2d(image, 3, 1, 1) - image
        >>> velocity = ImageVelocity(Blur(), (3, 8, 8))
        >>> velocity(torch.rand(5), torch.randn(5, 192)).shape
        torch.Size([5, 192])
    """

    is_periodic = False

    def __init__(
        self,
        network: nn.Module,
        image_shape: Sequence[int],
        classes: int = 0,
        null_label: int | None = None,
    ) -> None:
        super().__init__()
        check_sizes("image_shape", image_shape)
        check_sizes("classes and null_label", (classes, null_label or 0))
        classes, null_label = index(classes), None if null_label is None else index(null_label)
        self.image_shape = tuple(map(index, image_shape))
        if len(self.image_shape) != 3 or min(self.image_shape) < 1:
            raise ValueError(
                "expected image_shape as (channels, height, width), three positive sizes, got "
                f"{self.image_shape}"
            )
        if classes < 0 or (null_label is not None and not 0 < classes <= null_label):
            raise ValueError(
                "expected classes >= 0, and null_label beside classes as a label behind theirs, "
                f"got classes={classes} and null_label={null_label}"
            )
        self.event_dim = math.prod(self.image_shape)
        self.classes, self.null_label = classes, null_label
        self.context_dim = 1 if classes else 0
        self.network = network

    def arguments(self) -> tuple[Any, ...] | None:
        """Return None: files do not hold the network, and :func:`load` is given it."""
        return None

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity, shape ``(*, D)``.

        Args:
            t: Times, broadcastable to ``(*)``.
            x: States, shape ``(*, D)``.
            context: Labels, broadcastable to ``(*, 1)``, or None.

        Raises:
            ValueError: If labels are missing or superfluous, or the network returns rates of
                another shape.
        """
        if (context is None) == bool(self.classes):
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            want = "labels of shape (*, 1)" if self.classes else "no context"
            raise ValueError(f"expected {want} for {self.classes} classes, got {got}")
        t, *contexts = expanded(t, x, context)
        labels = [part.reshape(-1).long() for part in contexts]
        if not x.numel():  # attention has no shape for none
            return x * 0.0
        images = x.reshape(-1, *self.image_shape)
        # A gradient in the images may itself be differentiated, as the score's is.
        differentiable = is_functional() or needs_graph(x)
        with Elementary() if differentiable else contextlib.nullcontext():
            rates = self._rates(t.reshape(-1), images, *labels)
        if rates.shape != images.shape:
            raise ValueError(
                f"expected a network of images that returns rates of shape {tuple(images.shape)}, "
                f"got {tuple(rates.shape)}"
            )
        return rates.reshape(x.shape)

    def _rates(self, t: Tensor, images: Tensor, *labels: Tensor) -> Tensor:
        """Return the network's rates of images, ``(N, C, H, W)``, at times ``(N,)``."""
        return self.network(t, images, *labels)


class UNet(ImageVelocity):
    """A velocity of images by diffusers' ``UNet2DModel`` (``pip install diffusers``).

    Its last layer starts at zero: an untrained flow is its whitening map. Times are multiplied by
    1,000, as diffusers expects them, and embedded in the type of the flow. With classes there is
    one more label, for none of them, which training gives a tenth of the images.

    Args:
        image_shape: ``(C, H, W)``; H and W are halved once per level but the last.
        channels: Of each level, from the finest to the coarsest.
        attention: The levels with self-attention, counted from 0, the finest, or from -1, the
            coarsest; that in the middle of the network is of the coarsest.
        classes: K, for contexts that are labels 0 to K - 1; 0 for none.

    Raises:
        ImportError: If diffusers is not installed.
        TypeError: If sizes are no sequences of whole numbers.
        ValueError: If a size is not positive, a side cannot be halved so often, or a level with
            attention does not exist.
    """

    network: Any

    def __init__(
        self,
        image_shape: Sequence[int],
        channels: Sequence[int] = (32, 64, 64),
        attention: Sequence[int] = (-1,),
        classes: int = 0,
    ) -> None:
        named = {"image_shape": image_shape, "channels": channels, "attention": attention}
        for name, given in named.items():
            check_sizes(name, given)
        shape, widths, attention = (tuple(map(index, given)) for given in named.values())
        _check(shape, widths, attention)
        levels = len(widths)
        at = {level % levels for level in attention}
        attends = [level in at for level in range(levels)]
        common = math.gcd(*widths)
        groups = max(1, min(_MOST_GROUPS, common // _CHANNELS_PER_GROUP))
        network = _diffusers_unet()(
            sample_size=shape[1:],
            in_channels=shape[0],
            out_channels=shape[0],
            block_out_channels=widths,
            down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
            up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in attends[::-1]),
            add_attention=attends[-1],
            attention_head_dim=min(_MOST_HEAD_CHANNELS, *widths),
            norm_num_groups=next(g for g in range(groups, 0, -1) if common % g == 0),
            num_class_embeds=classes + 1 if classes else None,
        )
        network.time_proj = _TimeFeatures(widths[0])
        nn.init.zeros_(network.conv_out.weight)
        nn.init.zeros_(network.conv_out.bias)
        super().__init__(network, shape, classes, classes if classes else None)
        self.channels, self.attention = widths, attention

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the constructor."""
        return self.image_shape, self.channels, self.attention, self.classes

    def is_untrained(self) -> bool:
        """Return whether the last layer is zero, as it starts."""
        return not bool(self.network.conv_out.weight.any())

    def untrained_copy(self) -> "UNet":
        """Return an untrained network of the same shape."""
        return UNet(*self.arguments()).to(self.network.conv_out.weight)

    def rows_at_once(self) -> int:
        """Return the number of rows for which one call is fastest, without gradients."""
        return max(1, _VALUES_AT_ONCE // (self.channels[0] * math.prod(self.image_shape[1:])))

    def _rates(self, t: Tensor, images: Tensor, *labels: Tensor) -> Tensor:
        return self.network(images, _TIME_SCALE * t, *labels).sample


class _TimeFeatures(nn.Module):
    """Cosines and sines of scaled times as diffusers has them, in the type of the times.

    Its own are in float32: an error of 1e-5 at a scaled time of 1,000, which an adaptive solve in
    float64 takes for a velocity that is not smooth.

    Args:
        size: The number of features.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, t: Tensor) -> Tensor:
        """Return features, shape ``(N, size)``, of scaled times, shape ``(N,)``."""
        half = self.size // 2
        powers = torch.arange(half, dtype=t.dtype, device=t.device) / max(1, half)
        angles = t[:, None] * (-math.log(_LONGEST_PERIOD) * powers).exp()
        features = torch.cat((angles.cos(), angles.sin()), dim=-1)
        return nn.functional.pad(features, (0, self.size % 2))


def _diffusers_unet() -> Any:
    """Return diffusers' class.

    Raises:
        ImportError: If there is none.
    """
    with needing("UNet", "diffusers"):
        from diffusers.models.unets.unet_2d import UNet2DModel
    return UNet2DModel


def _check(shape: tuple[int, ...], channels: tuple[int, ...], attention: Sequence[int]) -> None:
    """Raise a ValueError unless images of a shape can be halved so often."""
    levels = len(channels)
    if not channels or min(channels) < 1 or any(not -levels <= a < levels for a in attention):
        raise ValueError(
            "expected positive channels, one number a level, and attention as levels among them, "
            f"got channels={channels} and attention={attention}"
        )
    if len(shape) == 3 and any(side % 2 ** (levels - 1) for side in shape[1:]):
        raise ValueError(
            f"expected sides that can be halved {levels - 1} times, for {levels} levels, got "
            f"image_shape={shape}: give fewer channels, or pad the images"
        )
