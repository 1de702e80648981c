r"""Files: weights in safetensors, all else in a JSON header; nothing in them is executed."""

import dataclasses
import json
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import interpolants, solvers
from .distributions.bases import Samples, UniformTorus
from .distributions.constraints import Constraint, Shaped, circular, is_circular
from .distributions.interpolant import (
    AnyDistribution,
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
)
from .distributions.joint import JointInterpolantDistribution
from .interpolants.learned import LearnedInterpolant
from .interpolants.linear import Interpolant
from .nn.mlp import TorusMLP, VelocityMLP
from .transforms.gaussianize import Gaussianized, MarginalTransform, RadialTransform
from .transforms.interpolant import ConditionalInterpolantTransform, InterpolantTransform

__all__ = ["build_constraint", "describe_constraint", "load", "save"]

_FORMAT = 1
# What a header that was edited or damaged can raise on the way to a flow.
_DAMAGE = (
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RuntimeError,
    OverflowError,
    AssertionError,
)
_KEY = "pyro_interpolant"


def save(distribution: AnyDistribution, path: str | os.PathLike[str]) -> None:
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
    tensors: dict[str, Tensor] = {}
    header = _describe(distribution, "", tensors)
    text = json.dumps({"format": _FORMAT, **header})
    path = Path(path)
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, scratch, metadata={_KEY: text})
        with open(scratch, "rb") as written:
            os.fsync(written.fileno())
        os.chmod(scratch, 0o666 & ~_umask())  # as any new file, not as a temporary one
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


def load(
    path: str | os.PathLike[str],
    *,
    velocity: nn.Module | None = None,
    interpolant: Interpolant | None = None,
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
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
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
    try:
        with torch.random.fork_rng(devices=[]):  # weights are initialised, then overwritten
            return _build(header, "", tensors, velocity, interpolant)
    except _DAMAGE as error:
        raise ValueError(f"{path} is damaged or was edited: {error!r}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# ---- distributions ------------------------------------------------------------------------------


def _describe(distribution: AnyDistribution, prefix: str, tensors: dict[str, Tensor]) -> Any:
    transform: Any = distribution.transform
    if getattr(transform, "flow", transform) is not transform:
        raise ValueError("expected a flow that owns its weights: save the one it came from")
    velocity = transform.velocity
    for name, tensor in transform.state_dict().items():
        # A copy: safetensors refuses tensors that share memory.
        tensors[prefix + name] = tensor.detach().clone().contiguous()
    own = type(velocity) in (VelocityMLP, TorusMLP)
    return {
        "class": type(distribution).__name__,
        "velocity": type(velocity).__qualname__,
        "arguments": velocity.arguments() if own else None,
        "dim": transform.dim,
        "dtype": str(transform.loc.dtype).removeprefix("torch."),
        "noise": None if transform.noise is None else transform.noise.arguments(),
        "independent": transform.independent,
        "frozen": not any(p.requires_grad for p in velocity.parameters()),
        "interpolant": _describe_choice(transform.interpolant, interpolants),
        "solver": _describe_choice(transform.solver, solvers),
        "divergence": _describe_choice(transform.divergence, solvers),
        "support": describe_constraint(distribution.constraint),
        "sites": [
            [name, list(shape), describe_constraint(support)]
            for name, (shape, support) in getattr(distribution, "sites", {}).items()
        ],
        "base": _describe_base(distribution.base, f"{prefix}base.", tensors),
    }


def _build(
    header: Any,
    prefix: str,
    tensors: dict[str, Tensor],
    velocity: nn.Module | None,
    interpolant: Interpolant | None,
) -> Any:
    name = header["class"]
    velocity = _build_velocity(header, velocity).to(getattr(torch, header["dtype"]))
    if interpolant is None:
        interpolant = _build_choice(header["interpolant"], interpolants, argument="interpolant=")
    conditional = name == "ConditionalInterpolantDistribution"
    make: Any = ConditionalInterpolantTransform if conditional else InterpolantTransform
    transform = make(
        velocity,
        header["dim"],
        interpolant=interpolant,
        solver=_build_choice(header["solver"], solvers),
        divergence=_build_choice(header["divergence"], solvers),
    )
    if header.get("noise") is not None:
        transform.noise = VelocityMLP(*header["noise"]).to(transform.loc)
    transform.independent = header.get("independent", True)
    state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    own = {k: v for k, v in state.items() if not k.startswith("base.")}
    transform.load_state_dict(own)
    base = _build_base(header["base"], f"{prefix}base.", tensors)
    support = build_constraint(header["support"])
    if name == "JointInterpolantDistribution":
        sites = {s: (tuple(shape), build_constraint(c)) for s, shape, c in header["sites"]}
        options: Any = {"sites": sites, "support": support}
        distribution: Any = JointInterpolantDistribution(transform, base, **options)
    elif name in ("InterpolantDistribution", "ConditionalInterpolantDistribution"):
        kind: Any = ConditionalInterpolantDistribution if conditional else InterpolantDistribution
        distribution = kind(transform, base, support=support)
    else:
        raise ValueError(f"unknown kind of distribution {name!r} in the file")
    return distribution.freeze() if header["frozen"] else distribution


def _build_velocity(header: Any, velocity: nn.Module | None) -> nn.Module:
    if header["arguments"] is not None:
        kind = TorusMLP if header["velocity"] == TorusMLP.__name__ else VelocityMLP
        return kind(*header["arguments"])
    if velocity is None or type(velocity).__qualname__ != header["velocity"]:
        got = "" if velocity is None else f", got a {type(velocity).__qualname__}"
        raise ValueError(
            f"the flow's velocity is a {header['velocity']}: pass an instance, "
            f"load(path, velocity={header['velocity']}(...)){got}"
        )
    return velocity


# ---- parts: a class by name with numbers, never code --------------------------------------------


def _describe_choice(choice: Any, *modules: Any) -> Any:
    name = type(choice).__name__
    if type(choice) is LearnedInterpolant:
        return [name, choice.arguments()]
    own = not any(getattr(module, name, None) is type(choice) for module in modules)
    if own or not dataclasses.is_dataclass(choice):
        return [name, None]
    fields = {}
    for part in dataclasses.fields(choice):
        value = getattr(choice, part.name)
        if not isinstance(value, (bool, int, float, str, type(None))):
            value = _describe_choice(value, *modules)
            if value[1] is None:  # a function of the user's
                return [name, None]
        fields[part.name] = value
    return [name, fields]


def _build_choice(description: Any, *modules: Any, argument: str = "") -> Any:
    name, fields = description
    if fields is None:
        if not argument:
            warnings.warn(
                f"the flow was saved with a {name} of your own, which a file cannot hold: it has "
                "the default now, set transform.solver or transform.divergence",
                stacklevel=2,
            )
            return None
        raise ValueError(f"the flow's interpolant is a {name}: pass it, load(path, {argument}...)")
    if name == LearnedInterpolant.__name__ and interpolants in modules:
        return LearnedInterpolant(**fields)
    kind = next((getattr(m, name) for m in modules if name in m.__all__), None)
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        raise ValueError(f"unknown choice {name!r} in the file")
    parts = {
        key: _build_choice(value, *modules, argument=argument)
        if isinstance(value, list)
        else value
        for key, value in fields.items()
    }
    return kind(**parts)


def _describe_base(base: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    if base is None:
        return None
    if isinstance(base, InterpolantDistribution):
        return {"flow": _describe(base, prefix, tensors)}
    if isinstance(base, torch.distributions.Independent):
        inner = _describe_base(base.base_dist, prefix, tensors)
        return {"independent": inner, "ndims": base.reinterpreted_batch_ndims}
    if isinstance(base, UniformTorus):
        tensors[prefix + "origin"] = base.origin.clone()
        return {"uniform_torus": True}
    if isinstance(base, Samples):
        tensors[prefix + "rows"] = base.rows.detach().clone().contiguous()
        return {"samples": True}
    name = type(base).__name__
    if getattr(dist, name, None) is not type(base):
        raise ValueError(
            f"expected a base from pyro.distributions, samples or a flow, got a {name}"
        )
    arguments = [k for k in type(base).arg_constraints if k in vars(base)]
    if isinstance(base, torch.distributions.MultivariateNormal):
        arguments = ["loc", "scale_tril"]  # the others appear when somebody asks for them
    for key in arguments:
        tensors[prefix + key] = torch.as_tensor(getattr(base, key)).detach().clone().contiguous()
    return {"class": name, "arguments": arguments}


def _build_base(description: Any, prefix: str, tensors: dict[str, Tensor]) -> Any:
    if description is None:
        return None
    if "flow" in description:
        return _build(description["flow"], prefix, tensors, None, None)
    if "uniform_torus" in description:
        origin = tensors[prefix + "origin"]
        return UniformTorus(len(origin)).to(origin)
    if "samples" in description:
        return Samples(tensors[prefix + "rows"])
    if "independent" in description:
        return _build_base(description["independent"], prefix, tensors).to_event(
            description["ndims"]
        )
    kind: Any = getattr(dist, description["class"], None)
    known = isinstance(kind, type) and issubclass(kind, torch.distributions.Distribution)
    if not known:
        raise ValueError(f"unknown base {description['class']!r} in the file")
    return kind(**{key: tensors[prefix + key] for key in description["arguments"]})


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
