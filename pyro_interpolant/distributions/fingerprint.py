"""Fingerprints by which a checkpoint or a kept evaluation recognises what it belongs to."""

import contextlib
import dataclasses
import logging
import re
import zlib
from collections import deque
from collections.abc import Iterable, Mapping, Set
from functools import cached_property, partial
from inspect import getattr_static
from types import CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions.utils import lazy_property

from ..nn.velocity import fixed_weights
from ..transforms.flow import Flow
from .bases import Samples

# What no density depends on: modes, validation, compiled calls, what training measured and has
# reached, and what is remembered: inverses, embedded contexts, and all whose name begins as below.
_LEFT_OUT = {
    *("training", "_validate_args", "_compiled_call_impl", "report", "reached"),
    *("_inv", "_embeddings"),
}
_CACHE = "_cache"
_OF_MODULES = set(vars(nn.Module()))  # hooks, modes, and numbers and layers by other names
_PLAIN = {type(None), bool, int, float, complex, str, slice, range, torch.dtype, torch.device}
_PACKAGE = __name__.partition(".")[0]
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

_Known = dict[int, tuple[object, str]]


def fingerprint(*values: object) -> str:
    """Return a text that tells values from others, and is the same in another process.

    Tensors and arrays count by shape, type and bytes, functions by name and code, those of this
    package by name alone. All else is a class and its parts: items, the state of a module,
    attributes, or what pickles hold. No address counts, nor the order of sets and dictionaries.

    Args:
        *values: Whatever; tensors and arrays are of any shapes.
    """
    return _text(values, {})


def identity_of(flow: Flow, base: object, coupling: object, *given: object) -> list[Any]:
    """Return what tells the training of a flow from that of another, as JSON holds it.

    A fingerprint; then names and shapes, by which states of earlier versions are known.

    Args:
        flow: The flow.
        base: What it starts from; samples, which an earlier call has set, do not count.
        coupling: The coupling of base draws and data rows.
        *given: What else the training was given.
    """
    base = None if isinstance(base, Samples) else base
    found = fingerprint(layers_of(flow.velocity), flow.interpolant, base, coupling, *given)
    found = " ".join((found, *fixed_weights(flow.velocity)))
    names = [_name(part) for part in (flow.interpolant, flow.velocity, base, coupling)]
    return [found, [names, [list(p.shape) for p in flow.velocity.parameters()]]]


def layers_of(network: nn.Module) -> list[list[object]]:
    """Return class, settings and shapes of each layer: a network, whatever its weights."""
    return [
        [
            type(layer),
            _without_addresses(layer.extra_repr()),
            [getattr(layer, name, None) for name in getattr(layer, "__constants__", ())],
            [p.shape for p in layer.parameters(recurse=False)],
        ]
        for layer in network.modules()
    ]


def _name(part: object) -> str:
    """Return the name of a part of a run in the states of earlier versions."""
    with contextlib.suppress(NotImplementedError):  # distributions without named parameters
        return getattr(part, "__qualname__", _without_addresses(repr(part)))
    return type(part).__qualname__


def _without_addresses(text: str) -> str:
    """Return a text, such as a ``repr``, without what differs between processes."""
    return _ADDRESS.sub("", text)


def inverse_of(transform: object) -> object:
    """Return the transform that another is the inverse of; None of one that is no inverse."""
    kind = torch.distributions.transforms._InverseTransform
    return transform._inv if isinstance(transform, kind) else None


def parts_of(value: object) -> dict[str, object]:
    """Return the attributes of a value, without those that only save time."""
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    own = {f.name: getattr(value, f.name) for f in fields if hasattr(value, f.name)}  # or slots
    return {
        key: part
        for key, part in {**own, **getattr(value, "__dict__", {})}.items()
        if key not in _LEFT_OUT
        and not key.startswith(_CACHE)
        and not isinstance(
            getattr_static(type(value), key, None), (lazy_property, cached_property)
        )
    }


def _text(value: object, known: _Known) -> str:
    """Return the fingerprint of a value; of those known by address, which stay alive, it is."""
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, (bytes, bytearray)):
        return f"{zlib.crc32(value):08x}"
    if id(value) not in known:
        known[id(value)] = value, "circle"
        texts = [_text(part, known) for part in _parts(value)]
        if isinstance(value, Mapping | Set):
            texts.sort()
        is_numbers = isinstance(value, (Tensor, np.ndarray))
        own = getattr(value, "__qualname__", type(value).__qualname__)
        name = "numbers" if is_numbers else own
        known[id(value)] = value, f"{name} {zlib.crc32(repr(texts).encode()):08x}"
    return known[id(value)][1]


def _parts(value: object) -> Iterable[object]:
    """Return what a value is made of, beside its name."""
    match value:
        case Tensor():
            return _numbers(value.detach())
        case Mapping():
            return value.items()
        case list() | tuple() | deque() | Set():
            return value
        case type() | ModuleType():
            return (value.__name__,)
        case logging.Logger():  # it knows all others
            return (value.name,)
        case partial():
            return value.func, value.args, value.keywords
        case MethodType():
            return value.__func__, value.__self__
        case FunctionType():
            cells = [_content(cell) for cell in value.__closure__ or ()]
            given = value.__defaults__, value.__kwdefaults__, cells, vars(value)
            is_ours = str(value.__module__).partition(".")[0] == _PACKAGE
            # Another version of Python compiles to other code.
            by_name = is_ours and "<" not in value.__qualname__
            return given if by_name else (value.__code__, *given)
        case CodeType():
            return value.co_code, value.co_names, value.co_consts
        case nn.Module():
            own = {k: part for k, part in parts_of(value).items() if k not in _OF_MODULES}
            named = value.named_parameters, value.named_buffers
            return own, [[*of(recurse=False)] for of in named], [*value.named_children()]
    if hasattr(type(value), "__array__"):
        array = np.asarray(value)
        is_flat = array.dtype != object  # otherwise bytes are addresses
        return array.shape, str(array.dtype), array.tobytes() if is_flat else array.tolist()
    if isinstance(value, (str, int, float, complex)):
        return (repr(value),)
    if hasattr(value, "__dict__") or dataclasses.is_dataclass(value):
        return inverse_of(value), parts_of(value)
    with contextlib.suppress(Exception):  # of locks, files and generators there is none
        return value.__reduce_ex__(2)
    return ()


def _numbers(x: Tensor) -> Iterable[object]:
    """Return shape, type and bytes of a tensor: of an array of the same numbers the same."""
    if x.is_nested:
        return x.unbind()
    if x.layout is not torch.strided:
        sparse = x.to_sparse_coo().coalesce()
        return sparse.indices(), sparse.values(), x.shape
    if x.is_meta:
        return x.shape, x.dtype
    flat = x.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    kind = str(x.dtype).removeprefix("torch.")
    return tuple(x.shape), kind, flat.view(torch.uint8).numpy().tobytes()


def _content(cell: CellType) -> object:
    """Return what a cell of a closure holds; nothing while its name is not bound."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
