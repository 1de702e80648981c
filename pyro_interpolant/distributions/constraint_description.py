r"""A constraint as names and numbers: nested lists of classes and their arguments."""

from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from ..transforms.gaussianize import Gaussianized, Gaussianizer, MarginalTransform, RadialTransform
from . import constraints as ours
from .base_description import Json
from .constraints import Constraint

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


def arguments_of(value: object) -> dict[str, Any]:
    """Return what a constructor was given, kept as attributes of the same names."""
    return {key: getattr(value, key) for key in signature(type(value)).parameters}


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
