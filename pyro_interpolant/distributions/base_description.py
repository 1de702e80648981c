r"""A base as names and numbers: the class of a Pyro distribution and its constructor's arguments.

Arguments are tensors, numbers, and distributions and transforms of Pyro's, described likewise.
"""

from collections.abc import Iterable, Iterator
from inspect import getattr_static, ismethod, signature
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Transform
from torch.distributions.utils import lazy_property

from .._files import below
from .bases import Samples, UniformTorus
from .differences import difference
from .part_description import ERRORS, Json, Tensors, class_named, is_of, plain_copy

# Attributes that are not named as the argument they keep.
_ATTRIBUTES = {"base_distribution": "base_dist", "tseq": "transforms"}
_MAX_NUMBER = 2**20  # of an argument, which may be a length: a vector of 8 MB


def describe_base(base: object, prefix: str) -> tuple[dict[str, Any] | None, Tensors]:
    """Return what describes a base that is no flow, and its tensors.

    Args:
        base: The base, or None.
        prefix: What the names of the tensors begin with.

    Raises:
        ValueError: If it is neither one of Pyro's nor samples, or has a part that is not Pyro's.
    """
    if base is None:
        return None, {}
    if isinstance(base, Independent):
        inner, tensors = describe_base(base.base_dist, prefix)
        return {"independent": inner, "ndims": base.reinterpreted_batch_ndims}, tensors
    if isinstance(base, UniformTorus):
        return {"uniform_torus": True}, {prefix + "origin": plain_copy(base.origin)}
    if isinstance(base, Samples):
        return {"samples": True}, {prefix + "rows": plain_copy(base.rows)}
    return _describe_object(base, prefix)


def build_base(
    description: dict[str, Any] | None, tensors: Tensors
) -> TorchDistributionMixin | None:
    """Return the base that :func:`describe_base` described, given its tensors without prefix.

    Raises:
        ValueError: If the description names nothing that is known.
        Exception: Of many kinds, if the description was damaged or edited.
    """
    if description is None:
        if tensors:
            raise ValueError(f"expected the base that tensors belong to: {sorted(tensors)}")
        return None
    if "uniform_torus" in description:
        (size,) = tensors["origin"].shape
        return UniformTorus(size).to(tensors["origin"])
    if "samples" in description:
        return Samples(tensors["rows"])
    if "independent" in description:
        inner = build_base(description["independent"], tensors)
        if inner is None:
            raise ValueError("expected a base whose dimensions are independent, got none")
        return inner.to_event(description["ndims"])
    return _build_object(description, tensors)


def _describe_object(value: object, prefix: str) -> tuple[dict[str, Any], Tensors]:
    """Return what describes a distribution or a transform of Pyro's, and its tensors.

    What the constructor was given cannot be known for certain: of what it may have been, that is
    taken which gives the value back.
    """
    name = type(value).__name__
    if isinstance(value, nn.Module) or not (is_of(value, dist) or is_of(value, dist.transforms)):
        raise ValueError(
            f"expected a base from pyro.distributions, samples or a flow, got a {name}"
        )
    lost: object = "its arguments"
    for arguments in _possible_arguments(value):
        description, tensors = _describe_arguments(name, arguments, prefix)
        try:
            new = _build_object(description, below(prefix, tensors))
            shape = getattr(value, "batch_shape", ())  # a transform has none
            if getattr(new, "batch_shape", ()) != shape:
                description["batch_shape"] = list(shape)
                new = new.expand(shape)
            lost = difference(value, new)
        except ERRORS as error:
            lost = error
        if lost is None:
            return description, tensors
    raise ValueError(f"expected a base that a file can hold, got a {name}: it would lose {lost}")


def _possible_arguments(value: object) -> Iterator[dict[str, object]]:
    """Yield arguments of the constructor that say what a value is, by name."""
    kind = type(value)
    names = [name for name in signature(kind).parameters if name != "validate_args"]
    # Of these, one stands for the others.
    either = [n for n in names if isinstance(getattr_static(kind, n, None), lazy_property)]
    always = [n for n in names if n not in either]
    for name in reversed(either or [""]):
        chosen = [n for n in names if n in always or n == name]
        for forms in (("_unbroadcasted_", "", "_"), ("", "_")):
            yield {n: _argument(value, n, forms) for n in chosen}


def _argument(value: object, name: str, forms: Iterable[str]) -> object:
    """Return an argument of a constructor, kept as an attribute of its name in some form."""
    for attribute in (*(form + name for form in forms), _ATTRIBUTES.get(name, name)):
        found = getattr(value, attribute, value)
        if found is not value and not ismethod(found):
            return found
    raise ValueError(f"expected a base that keeps its arguments, got a {type(value).__name__}")


def _describe_arguments(
    kind: str, arguments: dict[str, object], prefix: str
) -> tuple[dict[str, Any], Tensors]:
    description: dict[str, Any] = {"class": kind, "arguments": []}
    tensors: Tensors = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            description["arguments"].append(name)
            tensors[prefix + name] = plain_copy(value)
        else:
            part, more = _describe_part(value, f"{prefix}{name}.")
            description.setdefault("parts", {})[name] = part
            tensors.update(more)
    return description, tensors


def _describe_part(value: object, prefix: str) -> tuple[Json, Tensors]:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value, {}
    if isinstance(value, (list, tuple)):
        parts = [_describe_part(part, f"{prefix}{i}.") for i, part in enumerate(value)]
        tensors = {name: tensor for _, more in parts for name, tensor in more.items()}
        return [part for part, _ in parts], tensors
    return describe_base(value, prefix)


def _build_object(description: dict[str, Any], tensors: Tensors) -> Any:
    name = description["class"]
    room = dist if name in dist.__all__ else dist.transforms
    kind = class_named(name, room, Distribution | Transform)
    if issubclass(kind, nn.Module):
        raise ValueError(f"expected a part without weights, got {name!r}")
    arguments: dict[str, object] = {name: tensors[name] for name in description["arguments"]}
    for key, part in description.get("parts", {}).items():
        arguments[key] = _build_part(part, below(f"{key}.", tensors))
    new = kind(**arguments)
    for key in description["arguments"]:
        _keep_bits(new, vars(new).get(key), tensors[key])
    shape = description.get("batch_shape")
    return new if shape is None else new.expand(torch.Size(shape))


def _build_part(part: Json, tensors: Tensors) -> object:
    if isinstance(part, list):
        return [_build_part(p, below(f"{i}.", tensors)) for i, p in enumerate(part)]
    if isinstance(part, int) and abs(part) > _MAX_NUMBER:
        raise ValueError(f"expected an argument of at most {_MAX_NUMBER}, got {part}")
    return build_base(part, tensors) if isinstance(part, dict) else part


def _keep_bits(new: object, made: object, given: Tensor) -> None:
    """Undo what a constructor rounds of an argument, as one that makes probabilities sum to 1."""
    if not isinstance(made, Tensor) or (made.shape, made.dtype) != (given.shape, given.dtype):
        return
    if torch.allclose(made, given):
        vars(new).update({key: given for key, value in vars(new).items() if value is made})
