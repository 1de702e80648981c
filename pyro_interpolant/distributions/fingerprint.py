"""Fingerprints by which a checkpoint or a kept evaluation recognises its flow."""

import contextlib
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from .._torch import inverse_of
from .base_description import describe_base
from .constraints import Constraint
from .differences import parts_of
from .rows import as_tensor

# The repr of a constraint shows these already.
_TOLD = {"event_dim", "reinterpreted_batch_ndims", "shape"}
_CACHE = "_cache"  # how names begin of what transforms remember of the values they have seen
ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def stable_name(value: object) -> str:
    """Return a text that tells a value from others, and is the same in another process."""
    with contextlib.suppress(NotImplementedError):  # distributions without named parameters
        return getattr(value, "__qualname__", ADDRESS.sub("", repr(value)))
    return type(value).__qualname__


def tensors_of(value: object) -> list[Tensor]:
    """Return the numbers that a part is made of, of any shapes."""
    if isinstance(value, Transform | Constraint):
        return _inside(value)
    if isinstance(value, nn.Module):
        return list(value.state_dict().values())
    if hasattr(value, "__array__"):
        return [as_tensor(value)]
    if isinstance(value, Distribution):
        names: Any = type(value).arg_constraints  # a property where its author wrote none
        numbers = [getattr(value, name) for name in names] if isinstance(names, dict) else []
        names = ("base_dist", "transforms", "source")  # the last of bases of other libraries
        parts = [*numbers, *(getattr(value, name, None) for name in names)]
        return max(tensors_of(parts), _described(value), key=len)
    inner = value if isinstance(value, (list, tuple)) else []
    if inner and all(isinstance(part, (bool, int, float)) for part in inner):
        return [torch.as_tensor(inner)]
    return [tensor for part in inner for tensor in tensors_of(part)]


def _inside(value: Transform | Constraint) -> list[Tensor]:
    """Return the numbers in a transform or a constraint, whose texts round or leave out some."""
    found = list(value.state_dict().values()) if isinstance(value, nn.Module) else []
    parts: list[object] = [inverse_of(value)]
    for key, part in parts_of(value).items():
        if key not in _TOLD and not key.startswith(_CACHE):
            is_number = isinstance(part, int | float)
            parts.append(torch.tensor(part, dtype=torch.float64) if is_number else part)
    return found + tensors_of(parts)


def _described(base: Distribution) -> list[Tensor]:
    """Return the tensors that a file would have of a base; none if no file has it."""
    with contextlib.suppress(ValueError):
        return list(describe_base(base, "")[1].values())
    return []
