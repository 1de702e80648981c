r"""Files: tensors in safetensors, all else in a JSON header; nothing in them is executed.

A flow's header and tensors are those of :mod:`~pyro_interpolant.distributions.description`. What
reads and writes files needs numpy alone; :func:`save` and :func:`load` import torch. A file holds
a checksum of its header and of its tensors. With a
:class:`~pyro_interpolant.HutchinsonDivergence` it holds the probes too, so that no reader needs
torch's generator: the tensor ``divergence.probes``, signs of shape ``(P, D)``. What belongs to a
base, a flow's tensors too, has ``base.`` before its name.
"""

import json
from typing import TYPE_CHECKING, Any, Literal

from ._files import CHECKSUM, StrPath, contents, write

if TYPE_CHECKING:
    from torch import nn

    from .distributions.interpolant import AnyDistribution
    from .interpolants.linear import Interpolant


__all__ = ["load", "read", "save", "write"]

_FORMAT = 2  # 1 was that of version 0.1.0, without a checksum
_KEY = "pyro_interpolant"


def save(distribution: "AnyDistribution", path: StrPath) -> None:
    """Write a flow with its whitening, support, base, interpolant, solver and divergence.

    What is written has been built again from its description, and found equal. The file appears
    complete or not at all: an existing one is replaced only by a finished one, and keeps its mode;
    behind a symbolic link, the file is replaced, not the link.

    Args:
        distribution: A flow that owns its weights.
        path: The file, conventionally ``*.safetensors``.

    Raises:
        TypeError: If it is no distribution of this package.
        ValueError: If :func:`load` would not give the flow back equal, before the file is touched:
            a conditioned flow, a class of your own other than the velocity's or interpolant's, a
            base that is neither a flow nor made of Pyro's distributions, a constraint that no name
            describes. Of flows from flows, one may have a velocity of your own.
        OSError: If the file cannot be written; what was there is then untouched.
    """
    from .distributions.description import describe

    header, tensors = describe(distribution)
    write(path, tensors, {_KEY: json.dumps({"format": _FORMAT, **header})})


def load(
    path: StrPath,
    *,
    velocity: "nn.Module | None" = None,
    interpolant: "Interpolant | None" = None,
) -> "AnyDistribution":
    """Read a flow back, with its weights frozen or not as they were.

    Args:
        path: A file that :func:`save` wrote.
        velocity: An instance of the velocity's class, where that is your own, made as the one that
            was saved; a copy of it gets the weights. Where the base is a flow too, the outermost
            of them that needs it takes it.
        interpolant: The interpolant, where its class is your own; of a module a copy, too.

    Returns:
        An :class:`~pyro_interpolant.InterpolantDistribution`, or the joint or conditional kind
        that was saved.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        ValueError: If the file is damaged, not one of ours, of a newer format, or needs a class
            that was not passed, or something was that computes other values than what was saved,
            by 2% or more at two fixed points; the message names the class.
    """
    import torch

    from .distributions.description import PartError, build

    with torch.inference_mode(mode=False):  # weights made in it could never be differentiated
        header, tensors = read(path, framework="pt")
        try:
            return build(header, tensors, velocity=velocity, interpolant=interpolant)
        except PartError as error:
            raise ValueError(f"{path} is damaged or was edited: {error}") from error


def read(
    path: StrPath, *, framework: Literal["np", "pt"] = "np"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header and the tensors, of any shapes, of a flow's file.

    Args:
        path: A file that :func:`save` wrote.
        framework: Whether tensors are numpy's or torch's.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        ValueError: If the file is damaged, not one of ours, or of a newer format.
    """
    metadata, tensors = contents(path, framework=framework)
    text = metadata.get(_KEY)
    if text is None:
        raise ValueError(f"{path} is a safetensors file, but not of a pyro_interpolant flow")
    try:
        header = json.loads(text)
        version = header["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"the header of {path} is damaged ({error!r})") from error
    if version not in (1, _FORMAT):
        raise ValueError(
            f"{path} has format {version}, this version reads formats up to {_FORMAT}: update the "
            "package"
        )
    if version == _FORMAT and CHECKSUM not in metadata:
        raise ValueError(f"{path} is damaged: it has no checksum")
    return header, tensors
