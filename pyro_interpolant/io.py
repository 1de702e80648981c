r"""Files: tensors in safetensors, all else in a JSON header; nothing in them is executed.

A flow's header and tensors are those of :mod:`~pyro_interpolant.distributions.description`. What
reads and writes files needs numpy alone; :func:`save` and :func:`load` import torch.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor, nn

    from .distributions.interpolant import AnyDistribution
    from .interpolants.linear import Interpolant


__all__ = ["load", "read", "save", "write"]

StrPath = str | os.PathLike[str]

_FORMAT = 1
_KEY = "pyro_interpolant"
# Which errors an edited or damaged header can cause while the flow is built.
_ERRORS_OF_DAMAGE = (
    LookupError,
    TypeError,
    AttributeError,
    RuntimeError,
    OverflowError,
    AssertionError,
)


def save(distribution: "AnyDistribution", path: StrPath) -> None:
    """Write a flow with its whitening, support, base, interpolant, solver and divergence.

    The file appears complete or not at all: an existing one is replaced only by a finished one.

    Args:
        distribution: A flow that owns its weights.
        path: The file, conventionally ``*.safetensors``.

    Raises:
        ValueError: If a part cannot be written: a conditioned flow, a base that is neither a Pyro
            distribution of plain tensors nor a flow, a constraint that no name describes.
        OSError: If the file cannot be written.
    """
    from .distributions.description import describe

    header, tensors = describe(distribution)
    write(path, tensors, {_KEY: json.dumps({"format": _FORMAT, **header})})


def load(
    path: StrPath,
    *,
    velocity: "nn.Module | None" = None,
    interpolant: "Interpolant | None" = None,
) -> Any:
    """Read a flow back, with its weights frozen or not as they were.

    Args:
        path: A file that :func:`save` wrote.
        velocity: An instance of the velocity's class, where that is your own; its weights are
            overwritten.
        interpolant: The interpolant, where its class is your own.

    Returns:
        An :class:`~pyro_interpolant.InterpolantDistribution`, or the joint or conditional kind
        that was saved.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, not one of ours, of a newer format, or needs a class
            that was not passed; the message names the class.
    """
    from ._torch import seeded
    from .distributions.description import build

    header, tensors = read(path, framework="pt")
    try:
        with seeded(0):  # weights are initialised, then overwritten
            return build(header, tensors, velocity=velocity, interpolant=interpolant)
    except _ERRORS_OF_DAMAGE as error:
        raise ValueError(f"{path} is damaged or was edited: {error!r}") from error


def read(
    path: StrPath, *, framework: Literal["np", "pt"] = "np"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header and the tensors, of any shapes, of a flow's file.

    Args:
        path: A file that :func:`save` wrote.
        framework: Whether tensors are numpy's or torch's.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, not one of ours, or of a newer format.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework=framework) as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not a safetensors file ({error}): save the flow again"
        ) from error
    if text is None:
        raise ValueError(f"{path} is a safetensors file, but not of a pyro_interpolant flow")
    try:
        header = json.loads(text)
        version = header["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"the header of {path} is damaged ({error!r})") from error
    if version != _FORMAT:
        raise ValueError(
            f"{path} has format {version}, this version reads format {_FORMAT}: update the package"
        )
    return header, tensors


def write(
    path: StrPath,
    tensors: "Mapping[str, Tensor]",
    metadata: Mapping[str, str],
    *,
    scratch: Path | None = None,
    previous: Path | None = None,
) -> None:
    """Write tensors, of any shapes, and text; a file is replaced by a finished one or not at all.

    Args:
        path: The file.
        tensors: Tensors by name, which do not share memory.
        metadata: Text by name.
        scratch: Where to write first, beside the file; by default under a name of its own.
        previous: Where to keep the file that is replaced, or None to drop it.

    Raises:
        OSError: If the file cannot be written; what was there is then untouched.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if scratch is None:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        scratch = Path(name)
    try:
        save_file(dict(tensors), scratch, metadata=dict(metadata))
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(scratch, 0o666 & ~_umask())  # as any new file, not as a temporary one
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
