r"""A flow as a header of names and numbers, and tensors by name, for files without code.

Each part is the name of its class, in this package or in Pyro, and the numbers that its
constructor takes. A part that is not of this form is refused, or passed in when the flow is built
again. :mod:`~pyro_interpolant.io` puts both into a file.
"""

from collections.abc import Callable
from inspect import signature
from types import ModuleType, UnionType
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, MultivariateNormal

from .. import distributions, solvers, transforms
from .. import interpolants as paths
from .. import nn as networks
from .._torch import warn_user
from ..interpolants.linear import Interpolant
from ..transforms.gaussianize import Gaussianized, Gaussianizer, MarginalTransform, RadialTransform
from ..transforms.interpolant import ConditionalInterpolantTransform, InterpolantTransform
from . import constraints as ours
from .bases import Samples, UniformTorus
from .constraints import Constraint
from .interpolant import (
    AnyDistribution,
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
)
from .joint import JointInterpolantDistribution

Header = dict[str, Any]

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
    if flow.noise is not None and not _is_of(flow.noise, networks):
        raise ValueError(
            "expected a network of this package for the noise, got a "
            f"{type(flow.noise).__name__}: set transform.flow.noise = None to save the flow alone"
        )
    base, tensors = _describe_base(distribution.base, f"{prefix}base.")
    for name, tensor in flow.state_dict().items():
        tensors[prefix + _NAMES_IN_FILES.get(name, name)] = _stored(tensor)
    sites = getattr(distribution, "sites", {})
    return {
        "class": type(distribution).__name__,
        "velocity": type(flow.velocity).__qualname__,
        "arguments": _network_arguments(flow.velocity),
        "dim": flow.event_dim,
        "dtype": str(flow.loc.dtype).removeprefix("torch."),
        "noise": _network_arguments(flow.noise),
        "noise_class": type(flow.noise).__name__,
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
    kind = _known(header["class"], distributions, AnyDistribution)
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
        noise = _known(header.get("noise_class", "VelocityMLP"), networks, nn.Module)
        flow.noise = noise(*header["noise"]).to(flow.loc)
    flow.independent = header.get("independent", True)
    own = {k: v for k, v in tensors.items() if not k.startswith("base.")}
    for name, in_file in _NAMES_IN_FILES.items():
        if in_file in own:
            own[name] = own.pop(in_file)
    flow.load_state_dict(own)
    options: dict[str, Any] = {"support": build_constraint(header["support"])}
    if kind is JointInterpolantDistribution:
        options["sites"] = {
            s: (tuple(shape), build_constraint(c)) for s, shape, c in header["sites"]
        }
    base = _build_base(header["base"], _below("base.", tensors))
    distribution = kind(transform, base, **options)
    return distribution.freeze() if header["frozen"] else distribution


def _stored(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor of any shape: safetensors refuses those that share memory."""
    return tensor.detach().clone().contiguous()


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _network_arguments(network: Any) -> Any:
    """Return what the constructor of a network of this package was given, or None."""
    return network.arguments() if _is_of(network, networks) else None


def _is_of(value: object, room: ModuleType) -> bool:
    """Return whether a value is of a class that a module has by its name."""
    return getattr(room, type(value).__name__, None) is type(value)


def _known(name: str, room: ModuleType, parent: type | UnionType = object) -> Any:
    """Return a class of a module by its public name.

    Raises:
        ValueError: If the module has no such class.
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


def _arguments(value: object) -> dict[str, Any]:
    """Return what a constructor was given, kept as attributes of the same names."""
    return {key: getattr(value, key) for key in signature(type(value)).parameters}


def _describe_choice(choice: object, room: ModuleType) -> list[Any]:
    """Return the class of a choice and its arguments, or None where that is the user's own."""
    name, fields = type(choice).__name__, {}
    if not _is_of(choice, room):
        return [name, None]
    own = getattr(choice, "arguments", None)
    for key, value in (_arguments(choice) if own is None else own()).items():
        if not isinstance(value, (bool, int, float, str, tuple, type(None))):
            value = _describe_choice(value, room)
            if value[1] is None:  # a function of the user's
                return [name, None]
        fields[key] = value
    return [name, fields]


def _build_choice(description: list[Any], room: ModuleType, argument: str = "") -> Any:
    name, fields = description
    if fields is None:
        if not argument:
            warn_user(
                f"the flow was saved with a {name} of your own, which a file cannot hold: it has "
                "the default now, set transform.solver or transform.divergence"
            )
            return None
        raise ValueError(f"the flow's interpolant is a {name}: pass it, load(path, {argument}...)")
    parts = {
        key: _build_choice(value, room, argument) if _is_choice(value) else value
        for key, value in fields.items()
    }
    return _known(name, room)(**parts)


def _is_choice(value: object) -> bool:
    """Return whether a value stands for a choice, and not for numbers."""
    return isinstance(value, list) and isinstance(value[0], str)


def _describe_base(base: Any, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """Return what describes a base, and its tensors."""
    if base is None:
        return None, {}
    if isinstance(base, InterpolantDistribution):
        header, tensors = describe(base, prefix)
        return {"flow": header}, tensors
    if isinstance(base, Independent):
        inner, tensors = _describe_base(base.base_dist, prefix)
        return {"independent": inner, "ndims": base.reinterpreted_batch_ndims}, tensors
    if isinstance(base, UniformTorus):
        return {"uniform_torus": True}, {prefix + "origin": _stored(base.origin)}
    if isinstance(base, Samples):
        return {"samples": True}, {prefix + "rows": _stored(base.rows)}
    name = type(base).__name__
    if not _is_of(base, dist):
        raise ValueError(
            f"expected a base from pyro.distributions, samples or a flow, got a {name}"
        )
    arguments = [k for k in type(base).arg_constraints if k in vars(base)]
    if isinstance(base, MultivariateNormal):
        arguments = ["loc", "scale_tril"]  # the others appear when somebody asks for them
    tensors = {prefix + key: _stored(torch.as_tensor(getattr(base, key))) for key in arguments}
    return {"class": name, "arguments": arguments}, tensors


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
    kind = _known(description["class"], dist, Distribution)
    return kind(**{key: tensors[key] for key in description["arguments"]})


# ---- constraints --------------------------------------------------------------------------------

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


def describe_constraint(constraint: Constraint) -> Any:
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
    arguments = {key: _describe_argument(part) for key, part in _arguments(constraint).items()}
    if arguments and set(arguments) <= set(_BOUNDS):
        return ["bounded", name, [arguments.get(key) for key in _BOUNDS]]
    return [name, *arguments.values()]


def build_constraint(description: Any) -> Constraint:
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
        return known
    count = len(signature(known).parameters)
    return known(*(_build_argument(argument) for argument in arguments[:count]), **bounds)


def _describe_argument(value: object) -> Any:
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


def _build_argument(value: Any) -> Any:
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
