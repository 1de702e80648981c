r"""A flow as a header of names and numbers, and tensors by name, for files without code.

Each part is the name of its class, in this package or in Pyro, and the numbers that its
constructor takes. A part that is not of this form is refused, or passed in when the flow is built
again: what is described is built from its description and compared, before anything is written.
:mod:`~pyro_interpolant.io` puts both into a file.
"""

import json
from functools import partial
from typing import Any, TypeVar

import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from .. import distributions, solvers, transforms
from .. import interpolants as paths
from .. import nn as networks
from .._files import PROBES, below, plain_number
from .._package import check_ranges, flag
from ..interpolants.linear import Interpolant
from ..solvers.divergence import HutchinsonDivergence
from ..transforms.whitening import ScalarWhitening, Whitening
from .base_description import build_base, describe_base
from .differences import difference
from .flow import AnyTransform
from .interpolant import (
    AnyDistribution,
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
)
from .joint import NamedSites
from .own_description import (
    NotPassedError,
    check_own,
    checked_instance,
    describe_own,
    network_arguments,
    with_tensors,
)
from .part_description import (
    ERRORS,
    PartError,
    Tensors,
    build_choice,
    build_constraint,
    class_named,
    describe_choice,
    describe_constraint,
    is_of,
    naming,
    plain_copy,
)
from .report import Report

Header = dict[str, Any]
_M = TypeVar("_M", bound=nn.Module)

# Names of tensors in files that are older than the whitening's own module.
_NAMES_IN_FILES = {
    "whitening.loc": "loc",
    "whitening.linear": "linear",
    "whitening.inverse": "whitening",
    "whitening.log_det": "linear_log_det",
}
_NAMES_IN_CODE = {in_file: name for name, in_file in _NAMES_IN_FILES.items()}


def describe(distribution: AnyDistribution) -> tuple[Header, Tensors]:
    """Return the header and the tensors of a flow, from which :func:`build` gives it back.

    Args:
        distribution: A flow that owns its weights.

    Raises:
        TypeError: If it is no distribution of this package.
        ValueError: If it would not come back equal: a conditioned flow, a class of the user's own
            other than that of the velocity or of the interpolant, a base that is neither a flow
            nor made of Pyro's distributions, a constraint that no name describes.
    """
    if not isinstance(distribution, AnyDistribution):
        raise TypeError(
            "expected a distribution of this package, such as an InterpolantDistribution, got "
            f"{type(distribution).__name__}: of a guide, save its get_posterior() or, where it is "
            "amortised, its posterior, and the guide itself by torch.save(guide, path), as the "
            "student of a flow"
        )
    header, tensors = _describe(distribution, "")
    header = json.loads(json.dumps(header, default=plain_number))
    try:
        again = _build(header, _at_home(tensors), *_own_parts(distribution), fill=False)
        lost = difference(_content(distribution), _content(again))
    except ERRORS as error:
        raise ValueError(f"expected a flow that a file can hold, but {error}") from error
    if lost is not None:
        raise ValueError(f"expected a flow that a file can hold, but it would lose its {lost}")
    return header, tensors


def build(
    header: Header,
    tensors: Tensors,
    *,
    velocity: nn.Module | None = None,
    interpolant: Interpolant | None = None,
) -> AnyDistribution:
    """Return the flow that :func:`describe` described, its weights frozen or not as they were.

    Args:
        header: The header.
        tensors: The tensors by name.
        velocity: An instance of the velocity's class, where that is the user's own. Where the
            base is a flow too, the outermost of them that needs it takes it.
        interpolant: The interpolant, where its class is the user's own.

    Raises:
        PartError: If the header was damaged or edited, or is not of these tensors.
        NotPassedError: If it names a class that was not passed, or what was passed computes other
            values than what was saved.
    """
    try:
        return _build(header, _at_home(tensors), velocity, interpolant, fill=True)
    except (PartError, NotPassedError):
        raise
    except ERRORS as error:
        raise PartError(repr(error)) from error


def _at_home(tensors: Tensors) -> Tensors:
    """Return tensors on the device where new ones are made, such as those of a support."""
    return {name: tensor.to(torch.get_default_device()) for name, tensor in tensors.items()}


def _describe(distribution: AnyDistribution, prefix: str) -> tuple[Header, Tensors]:
    """Return the header and the tensors of a flow, these with a prefix to their names."""
    transform = distribution.transform
    _check_classes(distribution)
    flow, base = transform.flow, distribution.base
    if isinstance(base, InterpolantDistribution):
        inner, tensors = _describe(base, f"{prefix}base.")
        described: dict[str, Any] | None = {"flow": inner}
    else:
        described, tensors = describe_base(base, f"{prefix}base.")
    tensors |= {prefix + name: tensor for name, tensor in _tensors(transform).items()}
    is_conditional = isinstance(distribution, ConditionalInterpolantDistribution)
    fixed = [name for name, p in flow.named_parameters() if not p.requires_grad]
    count = len(list(flow.parameters()))
    sites, refined_for = distribution.sites or {}, _refined_for(distribution)
    return {
        "class": type(distribution).__name__,
        "velocity": type(flow.velocity).__qualname__,
        "arguments": network_arguments(flow.velocity),
        "dim": flow.event_dim,
        "dtype": str(flow.loc.dtype).removeprefix("torch."),
        "noise": network_arguments(flow.noise),
        "noise_class": type(flow.noise).__name__,
        **flow.history(),
        "levels": flow.levels,
        "frozen": fixed if 0 < len(fixed) < count else len(fixed) == count,
        "training": flow.velocity.training,
        "trains_weights": transform.trains_weights,
        "interpolant": describe_choice(flow.interpolant, paths),
        "solver": describe_choice(transform.solver, solvers),
        "divergence": describe_choice(transform.divergence, solvers),
        "whitening": type(flow.whitening).__name__,
        "support": describe_constraint(distribution.constraint),
        "sites": [
            [name, list(shape), describe_constraint(support)]
            for name, (shape, support) in sites.items()
        ],
        "base": described,
        "batch_shape": list(getattr(distribution, "batch_shape", ())),
        "validate_args": vars(distribution).get("_validate_args"),
        "columns": list(distribution.columns),
        "context_columns": list(distribution.context_columns),
        "refined_for": None if refined_for is None else refined_for.tolist(),
        "report": None if distribution.report is None else vars(distribution.report),
        "own": describe_own(flow, is_conditional=is_conditional),
    }, tensors


def _tensors(transform: AnyTransform) -> Tensors:
    """Return the tensors of a flow by their names in a file, and the probes of its divergence."""
    state = transform.flow.state_dict()
    tensors = {_NAMES_IN_FILES.get(name, name): plain_copy(value) for name, value in state.items()}
    if isinstance(transform.divergence, HutchinsonDivergence):
        probes = transform.divergence.directions(transform.flow.event_dim)
        tensors[PROBES] = probes.to(torch.int8)
    return tensors


def _check_classes(distribution: AnyDistribution) -> None:
    """Raise a ValueError for a view, or a class of the user's own that cannot be passed in."""
    transform = distribution.transform
    if not transform.owns_flow():
        raise ValueError("expected a flow that owns its weights: save the one it came from")
    parts = (
        ("distribution", distribution, distributions),
        ("transform", transform, transforms),
        ("whitening", transform.flow.whitening, transforms),
        ("solver", transform.solver, solvers),
        ("divergence", transform.divergence, solvers),
        ("noise", transform.flow.noise, networks),
    )
    for what, part, room in parts:
        if part is not None and not is_of(part, room):
            raise ValueError(
                f"expected a {what} of this package, got a {type(part).__name__}, which a file "
                "cannot hold: set one of the package to save the flow, and your own when it is "
                "loaded"
            )


def _own_parts(distribution: object) -> tuple[nn.Module | None, Interpolant | None]:
    """Return velocity and interpolant of the user's own, of the outermost flow that has one."""
    velocity = interpolant = None
    while isinstance(distribution, AnyDistribution):
        flow, distribution = distribution.transform.flow, distribution.base
        if velocity is None and network_arguments(flow.velocity) is None:
            velocity = flow.velocity
        if interpolant is None and describe_choice(flow.interpolant, paths)[1] is None:
            interpolant = flow.interpolant
    return velocity, interpolant


def _content(distribution: object) -> object:
    """Return all that a file has to give back of a flow, by the names of its parts."""
    if not isinstance(distribution, AnyDistribution):
        return distribution
    transform = distribution.transform
    flow = transform.flow
    return {
        "class": [type(distribution), type(transform), type(flow)],
        **{name: getattr(flow, name) for name in ("velocity", "noise", "interpolant")},
        "whitening": flow.whitening,
        "weights": transform.state_dict(),
        "requires_grad": {name: p.requires_grad for name, p in flow.named_parameters()},
        **flow.history(),
        "levels": flow.levels,
        "solver": transform.solver,
        "divergence": transform.divergence,
        "trains_weights": transform.trains_weights,
        "support": distribution.constraint,
        "sites": distribution.sites,
        "base": _content(distribution.base),
        "batch_shape": getattr(distribution, "batch_shape", ()),
        "validate_args": vars(distribution).get("_validate_args"),
        "columns": distribution.columns,
        "context_columns": distribution.context_columns,
        "refined_for": _refined_for(distribution),
        "report": distribution.report,
    }


def _build(
    header: Header,
    tensors: Tensors,
    velocity: nn.Module | None,
    interpolant: Interpolant | None,
    *,
    fill: bool,
) -> AnyDistribution:
    """Return the flow of a header; a velocity that is passed in gets its weights if ``fill``."""
    kind = class_named(header["class"], distributions, AnyDistribution)
    transform = _build_transform(kind, header, tensors, velocity, interpolant, fill=fill)
    description = header["base"]
    given = {k: v.to(transform.flow.loc.device) for k, v in below("base.", tensors).items()}
    if isinstance(description, dict) and "flow" in description:
        left = None if header["arguments"] is None else velocity
        base: AnyDistribution | TorchDistributionMixin | None = _build(
            description["flow"], given, left, interpolant, fill=fill
        )
    else:
        with naming("base"):
            base = build_base(description, given)
    with naming("support"):
        options: dict[str, Any] = {"support": build_constraint(header["support"])}
        if issubclass(kind, NamedSites):
            options["sites"] = {
                s: (tuple(shape), build_constraint(c)) for s, shape, c in header["sites"]
            }
        if not issubclass(kind, ConditionalInterpolantDistribution):
            options["validate_args"] = header.get("validate_args")
        distribution = kind(transform, base, **options)
    with naming("report"):
        distribution.columns = _build_names(header.get("columns", []))
        distribution.context_columns = _build_names(header.get("context_columns", []))
        distribution.report = _build_report(header.get("report"), header["dim"])
    with naming("refined_for"):
        distribution.refined_for = _build_context(header.get("refined_for"), transform)
    with naming("batch_shape"):
        natural = getattr(distribution, "batch_shape", ())
        shape = torch.Size(header.get("batch_shape", natural))
        return distribution if shape == natural else distribution.expand(shape)


def _build_names(names: object) -> tuple[str, ...]:
    if type(names) is not list or any(type(name) is not str for name in names):
        raise PartError(f"expected the names of columns, got {names!r}")
    return tuple(names)


def _refined_for(distribution: AnyDistribution) -> Tensor | None:
    """Return the data of later rounds, shape ``(C,)``, in the type that the weights have now."""
    context = distribution.refined_for
    return None if context is None else context.to(distribution.transform.flow.loc)


def _build_context(numbers: object, transform: AnyTransform) -> Tensor | None:
    if numbers is None:
        return None
    loc, size = transform.flow.loc, transform.flow.context_dim
    context = torch.tensor(numbers, dtype=loc.dtype, device=loc.device)
    if context.shape != (size,) or not bool(context.isfinite().all()):
        raise PartError(f"expected refined_for of {size} finite numbers, got {numbers}")
    return context


def _build_report(fields: dict[str, Any] | None, dim: int) -> Report | None:
    if fields is None:
        return None
    report = Report(**fields)
    names = {name: value for name, value in fields.items() if name.endswith("_name")}
    numbers = [value for name, value in fields.items() if name not in names]
    are_numbers = all(isinstance(n, int | float | None) for n in numbers)
    are_names = all(isinstance(n, str) for n in names.values())
    if report.dim != dim or not are_numbers or not are_names:
        raise PartError(f"expected a report of {dim} dimensions in numbers, got {fields}")
    return report


def _build_transform(
    kind: type[AnyDistribution],
    header: Header,
    tensors: Tensors,
    velocity: nn.Module | None,
    interpolant: Interpolant | None,
    *,
    fill: bool,
) -> AnyTransform:
    """Return the transform of a kind of distribution, its weights frozen or not as they were."""
    own = {_NAMES_IN_CODE.get(k, k): v for k, v in tensors.items() if not k.startswith("base.")}
    loc, dtype = own["whitening.loc"], getattr(torch, header["dtype"])
    if list(loc.shape) != [header["dim"]] or loc.dtype != dtype:
        raise PartError(f"expected {header['dim']} dimensions of type {dtype} in its tensors")
    if header["arguments"] is None:
        net = checked_instance("velocity", header["velocity"], velocity)
        if fill:
            net = with_tensors(net, below("velocity.", own), dtype)
            own = {k: v.to(next(net.parameters(), loc).device) for k, v in own.items()}
    else:
        net = _new_network("velocity", header["velocity"], header["arguments"], own, dtype)
    conditional = issubclass(kind, ConditionalInterpolantDistribution)
    transform = kind._transform_kind(
        net,
        len(loc),
        interpolant=_build_interpolant(header["interpolant"], interpolant, own, fill=fill),
        solver=build_choice(header["solver"], solvers, "solve"),
        divergence=build_choice(header["divergence"], solvers, "__call__"),
        whitening=ScalarWhitening(len(loc)),
    )
    flow = transform.flow
    flow.whitening = _new_whitening(header.get("whitening", "DenseWhitening"), own, dtype)
    if header.get("noise") is not None:
        name = header.get("noise_class", "VelocityMLP")
        flow.noise = _new_network("noise", name, header["noise"], own, dtype)
    flow.set_history(header)
    flow.levels = _checked_levels(header.get("levels"))
    transform.trains_weights = header.get("trains_weights", True)
    check_ranges(flag("trains_weights", transform.trains_weights))
    _check_probes(transform, own.pop(PROBES, None))
    _set_frozen(transform, header["frozen"])
    training = header.get("training", False if header["frozen"] is True else None)
    if fill and training is not None:  # for dropout; version 0.1.0 kept it of frozen flows alone
        transform.train(training)
    surplus = sorted(own.keys() ^ flow.state_dict().keys())
    if surplus:
        raise PartError(f"expected tensors of its parts and no others, got {surplus}")
    if fill:
        check_own(header.get("own", {}), flow, is_conditional=conditional)
    return transform


def _new_network(
    part: str, name: str, arguments: list[Any], tensors: Tensors, dtype: torch.dtype
) -> nn.Module:
    with naming(part):
        make = partial(class_named(name, networks, nn.Module), *arguments)
        return _new_module(part, make, tensors, dtype)


def _new_whitening(name: str, tensors: Tensors, dtype: torch.dtype) -> Whitening:
    with naming("whitening"):
        kind, size = class_named(name, transforms, Whitening), len(tensors["whitening.loc"])
        for key, value in kind(1).state_dict().items():
            if tensors[f"whitening.{key}"].shape != (size,) * value.dim():
                raise PartError(f"expected the whitening a {name} of {size} dimensions")
        device = tensors["whitening.loc"].device
        return _new_module("whitening", partial(kind, size), tensors, dtype, device=device)


def _new_module(
    part: str,
    make: partial[_M],
    tensors: Tensors,
    dtype: torch.dtype | None = None,
    *,
    device: str | torch.device = "meta",
) -> _M:
    """Return a new module that takes the file's tensors as they are.

    By default none is made for it before: sizes in an edited header may be huge.
    """
    own = below(f"{part}.", tensors)
    lists = [a for a in (*make.args, *make.keywords.values()) if isinstance(a, list)]
    if any(len(a) > len(own) for a in lists):
        raise PartError(f"expected at most {len(own)} layers, as it has tensors")
    if any(t.dtype != (dtype or t.dtype) or not t.is_floating_point() for t in own.values()):
        raise PartError(f"expected its {part} of type {dtype or 'float'}")
    with torch.device(device):
        module = make()
    module.load_state_dict(own, assign=True)
    return module


def _set_frozen(transform: AnyTransform, which: object) -> None:
    """Freeze all weights, none, or some by name."""
    parameters = dict(transform.flow.named_parameters())
    frozen = list(parameters) if which is True else [] if which is False else which
    if not isinstance(frozen, list) or any(name not in parameters for name in frozen):
        raise PartError(f"expected which of its weights are frozen, got {which!r}")
    for name, p in parameters.items():
        trained = name not in frozen
        if p.requires_grad != trained:
            p.requires_grad_(trained)


def _checked_levels(levels: object) -> int | None:
    if levels is None or (type(levels) is int and levels > 0):
        return levels
    raise PartError(f"expected the number of levels of images, got {levels!r}")


def _check_probes(transform: AnyTransform, probes: Tensor | None) -> None:
    """Raise a PartError if the file's probes are not those that the divergence draws."""
    divergence, size = transform.divergence, transform.flow.event_dim
    if probes is not None and not (  # version 0.1.0 kept none
        isinstance(divergence, HutchinsonDivergence)
        and probes.shape == (divergence.probes, size)
        and probes.dtype == torch.int8
        and torch.equal(divergence.directions(size).to(probes), probes)
    ):
        raise PartError(f"expected the probes of {divergence}, got others")


def _build_interpolant(
    description: list[Any], given: Interpolant | None, tensors: Tensors, *, fill: bool
) -> Interpolant | None:
    name, fields = description
    if fields is None:
        own = checked_instance("interpolant", name, given)
        if fill and isinstance(own, nn.Module):
            return with_tensors(own, below("interpolant.", tensors))
        return own
    with naming("interpolant"):
        kind = class_named(name, paths)
        if issubclass(kind, nn.Module):
            return _new_module("interpolant", partial(kind, **fields), tensors)
        return build_choice(description, paths)
