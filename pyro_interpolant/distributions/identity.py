"""What tells one density from another, where files say which they belong to."""

import contextlib
import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform

from .._files import checksum
from .._torch import inverse_of
from ..transforms.flow import Flow
from .base_description import describe_base
from .bases import Samples
from .constraints import Constraint
from .differences import parts_of
from .own_description import describe_path
from .rows import as_tensor

_TOLD = {"event_dim", "reinterpreted_batch_ndims", "shape"}  # by the text of a constraint
_CACHE = "_cache"  # how names begin of what transforms remember of the values they have seen
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def identity_of(flow: Flow, base: object, coupling: object, *given: object) -> list[Any]:
    """Return what tells the training of a flow from that of another, as JSON holds it.

    Args:
        flow: The flow.
        base: What it starts from; samples, which an earlier call has set, do not count.
        coupling: Who is paired with whom.
        *given: What else the training was given.
    """
    base = None if isinstance(base, Samples) else base
    names = [stable_name(part) for part in (flow.interpolant, flow.velocity, base, coupling)]
    shapes = [list(p.shape) for p in flow.velocity.parameters()]
    tensors = tensors_of([flow.interpolant, base, *given])
    values = None
    if has_function(flow.interpolant):  # two functions may have one name
        values = describe_path(flow)["values"] or []
    found = [names, shapes, checksum(tensors)]
    if values is not None:
        found.append([f"{value:.3g}" for value in values])
    kept = _kept_by(coupling)
    if kept:  # two closures of one function, or objects of one class, have one name
        found.append([[stable_name(value) for value in kept], checksum(tensors_of(kept))])
    return found


def _kept_by(function: object) -> list[Any]:
    """Return what a function, or an object that is called, has beside its arguments."""
    cells = getattr(function, "__closure__", None) or ()
    return [cell.cell_contents for cell in cells] + list(
        getattr(function, "__dict__", {}).values()
    )


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
