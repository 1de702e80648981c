r"""A flow as a header of names and numbers beside named tensors, for files: nothing is code.

Every part is written as the name of its class, in this package or in Pyro, with the numbers that
its constructor takes; what cannot be written so is refused, or passed when the flow is built
again. :mod:`~pyro_interpolant.io` puts both into a file.
"""

import dataclasses
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from .. import interpolants as paths
from .. import nn as networks
from .. import solvers, transforms
from .._torch import warn_user
from ..interpolants.learned import LearnedInterpolant
from ..interpolants.linear import Interpolant
from ..nn.mlp import VelocityMLP
from ..transforms.gaussianize import Gaussianized, MarginalTransform, RadialTransform
from ..transforms.interpolant import ConditionalInterpolantTransform, InterpolantTransform
from .bases import Samples, UniformTorus
from .constraints import Circular, Constraint, Shaped, circular
from .interpolant import (
    AnyDistribution,
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
)
from .joint import JointInterpolantDistribution

__all__ = ["build", "build_constraint", "describe", "describe_constraint"]

Header = dict[str, Any]

_KINDS = (
    InterpolantDistribution,
    ConditionalInterpolantDistribution,
    JointInterpolantDistribution,
)
# Names of tensors in files that are older than the whitening's own module.
_NAMES_IN_FILES = {
    "whitening.loc": "loc",
    "whitening.linear": "linear",
    "whitening.inverse": "whitening",
    "whitening.log_det": "linear_log_det",
}


def describe(distribution: AnyDistribution, prefix: str = "") -> tuple[Header, dict[str, Tensor]]:
    """Return the header and the tensors of a flow, these with a prefix to their names.

    Args:
        distribution: A flow that owns its weights.
        prefix: What the names of the tensors begin with.

    Raises:
        ValueError: If a part cannot be written: a conditioned flow, a base that is neither a Pyro
            distribution of plain tensors nor a flow, a constraint that no name describes.
    """
    transform = distribution.transform
    if not transform.owns_flow():
        raise ValueError("expected a flow that owns its weights: save the one it came from")
    flow = transform.flow
    base, tensors = _describe_base(distribution.base, f"{prefix}base.")
    for name, tensor in flow.state_dict().items():
        # A copy: safetensors refuses tensors that share memory.
        tensors[prefix + _NAMES_IN_FILES.get(name, name)] = tensor.detach().clone().contiguous()
    sites = getattr(distribution, "sites", {})
    return {
        "class": type(distribution).__name__,
        "velocity": type(flow.velocity).__qualname__,
        "arguments": flow.velocity.arguments() if _is_ours(flow.velocity) else None,
        "dim": flow.event_dim,
        "dtype": str(flow.loc.dtype).removeprefix("torch."),
        "noise": None if flow.noise is None else flow.noise.arguments(),
        "independent": flow.independent,
        "frozen": not any(p.requires_grad for p in flow.velocity.parameters()),
        "interpolant": _describe_choice(flow.interpolant, paths),
        "solver": _describe_choice(transform.solver, solvers),
        "divergence": _describe_choice(transform.divergence, solvers),
        "whitening": type(flow.whitening).__name__,
        "support": describe_constraint(distribution.constraint),
        "sites": [
            [name, list(shape), describe_constraint(support)]
            for name, (shape, support) in sites.items()
        ],
        "base": base,
    }, tensors


def build(
    header: Header,
    tensors: dict[str, Tensor],
    *,
    velocity: nn.Module | None = None,
    interpolant: Interpolant | None = None,
) -> AnyDistribution:
    """Return the flow that :func:`describe` described, its weights frozen or not as they were.

    Args:
        header: The header.
        tensors: The tensors by name.
        velocity: An instance of the velocity's class, where that is the user's own.
        interpolant: The interpolant, where its class is the user's own.

    Raises:
        ValueError: If the header names a class that was not passed, or nothing that is known.
        Exception: Of many kinds, if the header was damaged or edited.
    """
    kind = next((k for k in _KINDS if k.__name__ == header["class"]), None)
    if kind is None:
        raise ValueError(f"unknown kind of distribution {header['class']!r} in the file")
    if interpolant is None:
        interpolant = _build_choice(header["interpolant"], paths, argument="interpolant=")
    size = header["dim"]
    conditional = kind is ConditionalInterpolantDistribution
    make = ConditionalInterpolantTransform if conditional else InterpolantTransform
    transform = make(
        _build_velocity(header, velocity).to(getattr(torch, header["dtype"])),
        size,
        interpolant=interpolant,
        solver=_build_choice(header["solver"], solvers),
        divergence=_build_choice(header["divergence"], solvers),
        whitening=_known(header.get("whitening", "DenseWhitening"), transforms, nn.Module)(size),
    )
    flow = transform.flow
    if header.get("noise") is not None:
        flow.noise = VelocityMLP(*header["noise"]).to(flow.loc)
    flow.independent = header.get("independent", True)
    own = {k: v for k, v in tensors.items() if not k.startswith("base.")}
    for name, in_file in _NAMES_IN_FILES.items():
        if in_file in own:
            own[name] = own.pop(in_file)
    flow.load_state_dict(own)
    options: Any = {"support": build_constraint(header["support"])}
    if kind is JointInterpolantDistribution:
        options["sites"] = {
            s: (tuple(shape), build_constraint(c)) for s, shape, c in header["sites"]
        }
    base = _build_base(header["base"], _below("base.", tensors))
    distribution: Any = kind(transform, base, **options)  # type: ignore[arg-type]
    return distribution.freeze() if header["frozen"] else distribution


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _is_ours(value: Any, room: Any = networks) -> bool:
    """Return whether a value is of a class of one of this package's rooms."""
    return getattr(room, type(value).__name__, None) is type(value)


def _known(name: str, room: Any, parent: type = object) -> Any:
    """Return a class of a room by its name.

    Raises:
        ValueError: If the room has no such class.
    """
    kind = getattr(room, name) if name in room.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, parent)):
        raise ValueError(f"unknown part {name!r} in the file")
    return kind


def _build_velocity(header: Header, velocity: nn.Module | None) -> nn.Module:
    name = header["velocity"]
    if header["arguments"] is not None:
        return _known(name, networks, nn.Module)(*header["arguments"])
    if velocity is None or type(velocity).__qualname__ != name:
        got = "" if velocity is None else f", got a {type(velocity).__qualname__}"
        raise ValueError(
            f"the flow's velocity is a {name}: pass an instance, load(path, "
            f"velocity={name}(...)){got}"
        )
    return velocity


def _describe_choice(choice: Any, room: Any) -> Any:
    name = type(choice).__name__
    if type(choice) is LearnedInterpolant:
        return [name, choice.arguments()]
    if not _is_ours(choice, room) or not dataclasses.is_dataclass(choice):
        return [name, None]
    fields = {}
    for part in dataclasses.fields(choice):
        value = getattr(choice, part.name)
        if not isinstance(value, (bool, int, float, str, type(None))):
            value = _describe_choice(value, room)
            if value[1] is None:  # a function of the user's
                return [name, None]
        fields[part.name] = value
    return [name, fields]


def _build_choice(description: Any, room: Any, argument: str = "") -> Any:
    name, fields = description
    if fields is None:
        if not argument:
            warn_user(
                f"the flow was saved with a {name} of your own, which a file cannot hold: it has "
                "the default now, set transform.solver or transform.divergence"
            )
            return None
        raise ValueError(f"the flow's interpolant is a {name}: pass it, load(path, {argument}...)")
    kind = _known(name, room)
    if kind is LearnedInterpolant:
        return kind(**fields)
    if not hasattr(kind, "__dataclass_fields__"):
        raise ValueError(f"unknown choice {name!r} in the file")
    parts = {
        key: _build_choice(value, room, argument) if isinstance(value, list) else value
        for key, value in fields.items()
    }
    return kind(**parts)


def _describe_base(base: Any, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """Return what describes a base, and its tensors."""
    if base is None:
        return None, {}
    if isinstance(base, InterpolantDistribution):
        header, tensors = describe(base, prefix)
        return {"flow": header}, tensors
    if isinstance(base, torch.distributions.Independent):
        inner, tensors = _describe_base(base.base_dist, prefix)
        return {"independent": inner, "ndims": base.reinterpreted_batch_ndims}, tensors
    if isinstance(base, UniformTorus):
        return {"uniform_torus": True}, {prefix + "origin": base.origin.clone()}
    if isinstance(base, Samples):
        return {"samples": True}, {prefix + "rows": base.rows.detach().clone().contiguous()}
    name = type(base).__name__
    if getattr(dist, name, None) is not type(base):
        raise ValueError(
            f"expected a base from pyro.distributions, samples or a flow, got a {name}"
        )
    arguments = [k for k in type(base).arg_constraints if k in vars(base)]
    if isinstance(base, torch.distributions.MultivariateNormal):
        arguments = ["loc", "scale_tril"]  # the others appear when somebody asks for them
    return {"class": name, "arguments": arguments}, {
        prefix + key: torch.as_tensor(getattr(base, key)).detach().clone().contiguous()
        for key in arguments
    }


def _build_base(description: Any, tensors: dict[str, Tensor]) -> Any:
    if description is None:
        return None
    if "flow" in description:
        return build(description["flow"], tensors)
    if "uniform_torus" in description:
        return UniformTorus(len(tensors["origin"])).to(tensors["origin"])
    if "samples" in description:
        return Samples(tensors["rows"])
    if "independent" in description:
        return _build_base(description["independent"], tensors).to_event(description["ndims"])
    kind: Any = getattr(dist, description["class"], None)
    known = isinstance(kind, type) and issubclass(kind, torch.distributions.Distribution)
    if not known:
        raise ValueError(f"unknown base {description['class']!r} in the file")
    return kind(**{key: tensors[key] for key in description["arguments"]})


_GAUSSIANIZERS: dict[str, Any] = {"gaussianized": MarginalTransform, "tempered": RadialTransform}


def describe_constraint(constraint: Constraint) -> Any:
    """Return a constraint as nested lists, for a file: a name, or a class with its arguments.

    Raises:
        ValueError: If it is not one of Pyro's.
    """
    if isinstance(constraint, Circular):
        return "circular"
    for name in constraints.__all__:
        if getattr(constraints, name) is constraint:
            return name
    if isinstance(constraint, Gaussianized):
        inner = describe_constraint(constraint.base_constraint)
        kind_of = {c: name for name, c in _GAUSSIANIZERS.items()}
        kind = kind_of.get(type(constraint.gaussianizer))
        if kind is None:
            raise ValueError(f"expected a map of this library, got {constraint.gaussianizer}")
        return [kind, inner, [part.tolist() for part in constraint.gaussianizer.arguments()]]
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
    if kind in _GAUSSIANIZERS:
        given = (torch.tensor(part, dtype=torch.float64) for part in rest[0])
        return Gaussianized(build_constraint(first), _GAUSSIANIZERS[kind](*given))
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
