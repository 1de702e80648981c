r"""Parts as the name of a class and what its constructor takes: constraints, and choices.

A choice is a solver, a path or a divergence. A constraint may hold others: nested lists. The words
that descriptions of whole flows share are here, too.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from inspect import signature
from types import ModuleType, UnionType
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from .._files import MAX_COUNT, plain_number
from .._torch import warn_user
from ..transforms.gaussianize import Gaussianized, Gaussianizer, MarginalTransform, RadialTransform
from . import constraints as ours
from .constraints import Constraint

Tensors = dict[str, Tensor]
Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

# Which errors a wrong description can cause while a part is built.
ERRORS = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    OverflowError,
    AssertionError,
)

# By name: classes of constraints, and constraints that are the only ones of their class.
_CONSTRAINTS = {
    name.lower(): value
    for room, names in ((constraints, constraints.__all__), (ours, vars(ours)))
    for name in names
    if isinstance(value := getattr(room, name), Constraint)
    or (isinstance(value, type) and issubclass(value, Constraint) and value is not Constraint)
}
# The name of a class, or of the only one of a class, which stands for copies of itself too.
_CONSTRAINT_NAMES: dict[object, str] = {type(value): name for name, value in _CONSTRAINTS.items()}
_CONSTRAINT_NAMES.update({value: name for name, value in reversed(_CONSTRAINTS.items())})
_BOUNDS = ("lower_bound", "upper_bound")  # of constraints that have nothing else
_GAUSSIANIZERS: dict[str, Callable[..., Gaussianizer]] = {
    "gaussianized": MarginalTransform,
    "tempered": RadialTransform,
}


class PartError(ValueError):
    """A part that cannot be built from its description."""


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the part whose description cannot be built."""
    try:
        yield
    except PartError:
        raise
    except ERRORS as error:
        raise PartError(f"its {name} cannot be built: {error}") from error


def is_of(value: object, room: ModuleType) -> bool:
    """Return whether a value is of a class that a module has by its name."""
    return getattr(room, type(value).__name__, None) is type(value)


def class_named(name: str, room: ModuleType, parent: type | UnionType = object) -> Any:
    """Return a class of a module by its public name.

    Raises:
        ValueError: If the module has no such class.
    """
    kind = getattr(room, name) if name in room.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, parent)):
        raise ValueError(f"unknown part {name!r} in the file")
    return kind


def plain_copy(tensor: object) -> Tensor:
    """Return a copy of a tensor of any shape: safetensors refuses those that share memory.

    Raises:
        ValueError: If it is no tensor of plain numbers, or not yet of any size.
    """
    if isinstance(tensor, Tensor) and nn.parameter.is_lazy(tensor):
        raise ValueError("expected tensors, got one of a lazy module: call it once before")
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(f"expected plain tensors, got a {type(tensor).__name__} among them")
    return tensor.detach().cpu().clone().contiguous()


def arguments_of(value: object) -> dict[str, Any]:
    """Return what a constructor was given, kept as attributes of the same names."""
    return {key: getattr(value, key) for key in signature(type(value)).parameters}


def describe_choice(choice: object, room: ModuleType) -> list[Any]:
    """Return the class of a choice and its arguments, or None where that is the user's own."""
    name, fields = type(choice).__name__, {}
    if not is_of(choice, room):
        return [name, None]
    own = getattr(choice, "arguments", None)
    for key, value in (arguments_of(choice) if own is None else own()).items():
        if getattr(value, "ndim", None) == 0:
            value = plain_number(value)
        if not isinstance(value, (bool, int, float, str, tuple, type(None))):
            value = describe_choice(value, room)
            if value[1] is None:  # a function of the user's
                return [name, None]
        fields[key] = value
    return [name, fields]


def build_choice(description: list[Any], room: ModuleType, offers: str | None = None) -> Any:
    """Return a choice that offers a method, if one is named; None where it was the user's."""
    name, fields = description
    if fields is None:  # in files that version 0.1.0 wrote
        warn_user(
            f"the flow was saved with a {name} of your own, which a file cannot hold: it has "
            "the default now, set transform.solver or transform.divergence"
        )
        return None
    with naming(name):
        if max(fields.get(count, 1) for count in ("steps", "nodes", "probes")) > MAX_COUNT:
            raise PartError(f"expected at most {MAX_COUNT} steps or probes in a {name}")
        parts = {
            key: build_choice(value, room) if _is_choice(value) else value
            for key, value in fields.items()
        }
        choice = class_named(name, room)(**parts)
        again = json.loads(json.dumps(describe_choice(choice, room)[1])) or {}
        is_of_use = offers is None or hasattr(choice, offers)
        if not is_of_use or any(again.get(k, choice) != v for k, v in fields.items()):
            raise PartError(f"expected a {name} that {fields} describes, and of use here")
        return choice


def _is_choice(value: object) -> bool:
    """Return whether a value stands for a choice, and not for numbers."""
    return isinstance(value, list) and isinstance(value[0], str)


def describe_constraint(constraint: Constraint) -> Json:
    """Return a constraint as nested lists, for a file: a name, or a class with its arguments.

    Raises:
        ValueError: If it is neither one of Pyro's nor of this package.
    """
    if isinstance(constraint, Gaussianized):
        inner, found = describe_constraint(constraint.base_constraint), constraint.gaussianizer
        name = next((name for name, kind in _GAUSSIANIZERS.items() if type(found) is kind), None)
        if name is None:
            raise ValueError(f"expected a map of this library, got {found}")
        return [name, inner, [part.tolist() for part in found.arguments()]]
    name = _CONSTRAINT_NAMES.get(constraint, _CONSTRAINT_NAMES.get(type(constraint)))
    if name is None:
        raise ValueError(
            f"expected a support from pyro.distributions.constraints, got {constraint}"
        )
    if isinstance(_CONSTRAINTS[name], Constraint):
        return name
    arguments = {key: _describe_argument(part) for key, part in arguments_of(constraint).items()}
    if arguments and set(arguments) <= set(_BOUNDS):
        return ["bounded", name, [arguments.get(key) for key in _BOUNDS]]
    return [name, *arguments.values()]


def build_constraint(description: str | list[Any]) -> Constraint:
    """Return the constraint that :func:`describe_constraint` described.

    Raises:
        ValueError: If the description names no constraint of Pyro's or of this package.
    """
    kind, *arguments = [description] if isinstance(description, str) else description
    bounds: dict[str, Any] = {}
    if kind == "bounded":
        kind, values = arguments
        given = zip(_BOUNDS, values, strict=True)
        bounds = {key: _build_argument(value) for key, value in given if value is not None}
        arguments = []
    if kind in _GAUSSIANIZERS:
        inner, parts = arguments
        tables = (torch.tensor(part, dtype=torch.float64) for part in parts)
        return Gaussianized(build_constraint(inner), _GAUSSIANIZERS[kind](*tables))
    known = _CONSTRAINTS.get(kind)
    if known is None:
        raise ValueError(f"unknown support {kind!r} in the file")
    if isinstance(known, Constraint):
        if arguments:
            raise ValueError(f"expected no arguments of the support {kind!r}")
        return known
    count = len(signature(known).parameters)
    return known(*(_build_argument(argument) for argument in arguments[:count]), **bounds)


def _describe_argument(value: object) -> Json:
    """Return what a constraint is made of, for a file: a constraint, numbers, or several."""
    if isinstance(value, Constraint):
        return describe_constraint(value)
    if isinstance(value, Tensor):
        return [str(value.dtype).removeprefix("torch."), value.tolist()]
    if isinstance(value, (list, tuple)):
        return [_describe_argument(part) for part in value]
    if isinstance(value, (int, float, type(None))):
        return value
    raise ValueError(f"expected a support made of numbers and supports, got {value!r} in one")


def _build_argument(value: Json) -> object:
    if isinstance(value, str):
        return build_constraint(value)
    if not isinstance(value, list):
        return value
    first = value[0] if value and isinstance(value[0], str) else ""
    dtype = getattr(torch, first, None)
    if isinstance(dtype, torch.dtype):
        return torch.tensor(value[1], dtype=dtype)
    if first in ("bounded", *_GAUSSIANIZERS) or isinstance(_CONSTRAINTS.get(first), type):
        return build_constraint(value)
    return [_build_argument(part) for part in value]
