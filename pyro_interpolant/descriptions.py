r"""Supports as nested lists of names and numbers, for files."""

from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from .marginals import Gaussianized, MarginalTransform
from .radial import RadialTransform
from .shapes import Shaped
from .supports import Constraint, circular, is_circular

__all__ = ["build_constraint", "describe_constraint"]

_CHARTS: dict[str, Any] = {"gaussianized": MarginalTransform, "tempered": RadialTransform}


def describe_constraint(constraint: Constraint) -> Any:
    """Return a constraint as nested lists, for a file: a name, or a class with its arguments.

    Raises:
        ValueError: If it is not one of Pyro's.
    """
    if is_circular(constraint):
        return "circular"
    for name in constraints.__all__:
        if getattr(constraints, name) is constraint:
            return name
    if isinstance(constraint, Gaussianized):
        inner = describe_constraint(constraint.base_constraint)
        kind = next((name for name, c in _CHARTS.items() if type(constraint.chart) is c), None)
        if kind is None:
            raise ValueError(f"expected a map of this library, got {constraint.chart}")
        return [kind, inner, [part.tolist() for part in constraint.chart.arguments()]]
    if isinstance(constraint, Shaped):
        return ["shaped", describe_constraint(constraint.base_constraint), list(constraint.shape)]
    kind = type(constraint).__name__.lstrip("_")
    if isinstance(constraint, constraints.independent):
        inner = describe_constraint(constraint.base_constraint)
        return ["independent", inner, constraint.reinterpreted_batch_ndims]
    if isinstance(constraint, (constraints.stack, constraints.cat)):
        parts = [describe_constraint(c) for c in constraint.cseq]
        lengths = getattr(constraint, "lengths", None)
        return [kind.lower(), parts, constraint.dim, lengths]
    bounds = [getattr(constraint, k, None) for k in ("lower_bound", "upper_bound")]
    bounds = [b if b is None or not torch.is_tensor(b) else _describe_tensor(b) for b in bounds]
    return ["bounded", _bounded_name(constraint), bounds]


def _describe_tensor(value: Tensor) -> list[Any]:
    return [str(value.dtype).removeprefix("torch."), value.tolist()]


def _bounded_name(constraint: Constraint) -> str:
    for name in _BOUNDED:
        if type(constraint) is getattr(constraints, name):
            return name
    for name in constraints.__all__:  # a copy of a singleton, such as a pickled constraint
        if type(getattr(constraints, name)) is type(constraint):
            return name
    raise ValueError(f"expected a support from pyro.distributions.constraints, got {constraint}")


_BOUNDED = ("interval", "half_open_interval", "greater_than", "greater_than_eq", "less_than")


def build_constraint(description: Any) -> Constraint:
    """Return the constraint that :func:`describe_constraint` described.

    Raises:
        ValueError: If the description names no constraint of Pyro's.
    """
    if description == "circular":
        return circular
    if isinstance(description, str):
        if description not in constraints.__all__:
            raise ValueError(f"unknown support {description!r} in the file")
        return getattr(constraints, description)
    kind, first, *rest = description
    if kind == "shaped":
        return Shaped(build_constraint(first), rest[0])
    if kind in _CHARTS:
        given = (torch.tensor(part, dtype=torch.float64) for part in rest[0])
        return Gaussianized(build_constraint(first), _CHARTS[kind](*given))
    if kind == "independent":
        return constraints.independent(build_constraint(first), rest[0])
    if kind in ("stack", "cat"):
        parts = [build_constraint(c) for c in first]
        stacked = kind == "stack"
        return constraints.stack(parts, rest[0]) if stacked else constraints.cat(parts, *rest)
    if kind == "bounded" and first not in _BOUNDED:
        return build_constraint(first)
    if kind != "bounded":
        raise ValueError(f"unknown support {kind!r} in the file")
    bounds = [
        torch.tensor(b[1], dtype=getattr(torch, b[0])) if isinstance(b, list) else b
        for b in rest[0]
        if b is not None
    ]
    return getattr(constraints, first)(*bounds)
