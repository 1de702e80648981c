"""What tells one density from another, where files say which they belong to."""

import contextlib
import re
from typing import Any

import torch
from torch import Tensor, nn

from .base_description import describe_base
from .constraints import as_tensor

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def stable_name(value: object) -> str:
    """Return a text that tells a value from others, and is the same in another process."""
    with contextlib.suppress(NotImplementedError):  # distributions without named parameters
        return getattr(value, "__qualname__", _ADDRESS.sub("", repr(value)))
    return type(value).__qualname__


def has_function(value: object) -> bool:
    """Return whether a value has a part, such as a function, of which its text has the name."""
    return _ADDRESS.search(repr(value)) is not None


def tensors_of(value: object) -> list[Tensor]:
    """Return the numbers that a part is made of, of any shapes."""
    if isinstance(value, nn.Module):
        return list(value.state_dict().values())
    if hasattr(value, "__array__"):
        return [as_tensor(value)]
    if isinstance(value, torch.distributions.Distribution):
        names: Any = type(value).arg_constraints  # a property where its author wrote none
        numbers = [getattr(value, name) for name in names] if isinstance(names, dict) else []
        names = ("base_dist", "transforms", "source")  # the last of bases of other libraries
        parts = [*numbers, *(getattr(value, name, None) for name in names)]
        return max(tensors_of(parts), _described(value), key=len)
    inner = value if isinstance(value, (list, tuple)) else []
    return [tensor for part in inner for tensor in tensors_of(part)]


def _described(base: torch.distributions.Distribution) -> list[Tensor]:
    """Return the tensors that a file would have of a base; none if no file has it."""
    with contextlib.suppress(ValueError):
        return list(describe_base(base, "")[1].values())
    return []
