r"""Parts of the user's own: passed in, filled with a file's tensors, and found to be the same.

A file holds the tensors of such a part, and no code. An instance with another activation, factor
or shape may take the same tensors, and computes something else. It is found out by the sizes that
a velocity states, and by values of it, or of an interpolant, at two fixed points, in evaluation
mode.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import interpolants as paths
from .. import nn as networks
from .._torch import seeded
from ..nn.modes import evaluated
from ..nn.velocity import embedded, evaluate, image_shape, size_of
from ..transforms.flow import Flow
from .part_description import PartError, Tensors, describe_choice, is_of

Own = dict[str, dict[str, Any]]
_M = TypeVar("_M", bound=nn.Module)
_T = TypeVar("_T")

_SIZES = ("event_dim", "context_dim", "classes", "null_label")
_TIMES = (0.25, 0.75)
_MOST_NUMBERS = 16  # of a point's values in a header: images have many
# How far values of the same part may be apart, as a share of the largest. Those of a U-Net in
# float32 are: 1e-6 where sums have another order, 1e-3 where a GPU's convolutions round to TF32,
# 0.013 where one of two machines computes in bfloat16. Another activation makes 0.4 or so; and a
# file that is refused by mistake could not be read at all.
_SHARE = 0.02
_SMALL = 0.01  # the least that counts as largest, in whitened units: what cancels leaves rounding


class NotPassedError(ValueError):
    """A part of the user's own that was not passed in, or another that was."""


def network_arguments(network: Any) -> list[Any] | None:
    """Return what the constructor of a network of this package was given, or None."""
    return network.arguments() if is_of(network, networks) else None


def checked_instance(what: str, name: str, value: _T | None) -> _T:
    """Return what was passed in for a class of the user's own.

    Raises:
        NotPassedError: If nothing was, or something of another class.
    """
    if value is None or name not in (type(value).__qualname__, type(value).__name__):
        got = "" if value is None else f", got a {type(value).__qualname__}"
        raise NotPassedError(
            f"the flow's {what} is a {name}: pass an instance, load(path, {what}={name}(...)){got}"
        )
    return value


def with_tensors(part: _M, tensors: Tensors, dtype: torch.dtype | None = None) -> _M:
    """Return a copy of a module that was passed in, with its tensors, in their own types.

    Flows that are given one instance share nothing. What cannot be copied is filled itself.

    Args:
        part: The module.
        tensors: Its tensors by name, of any shapes.
        dtype: The type in which it computes, or None for its own.

    Raises:
        NotPassedError: If it has others.
    """
    try:
        module = copy.deepcopy(part)
    except Exception:  # whatever keeps a part of the user's from being copied
        module = part
    if dtype is not None:
        module.to(dtype)
    for name, value in module.state_dict(keep_vars=True).items():
        if name in tensors and not nn.parameter.is_lazy(value):
            if tensors[name].is_floating_point() != value.is_floating_point():
                raise PartError(f"expected {name!r} of a type like {value.dtype}")
            value.data = value.data.to(tensors[name].dtype)
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise NotPassedError(
            f"expected a {type(module).__qualname__} as it was saved, got one of other tensors: "
            f"{error}"
        ) from error
    return module


def describe_own(flow: Flow, *, is_conditional: bool) -> Own:
    """Return what tells the parts of the user's own in a flow from others of their classes.

    Args:
        flow: The flow.
        is_conditional: Whether its velocity takes contexts.
    """
    own = {}
    if network_arguments(flow.velocity) is None:
        own["velocity"] = _describe_velocity(flow, is_conditional=is_conditional)
    if describe_choice(flow.interpolant, paths)[1] is None:
        own["interpolant"] = describe_path(flow)
    return own


def check_own(saved: Own, flow: Flow, *, is_conditional: bool) -> None:
    """Raise a NotPassedError if a part that was passed in is not as the one that was saved.

    Args:
        saved: What describes those that were saved; nothing where a version before kept nothing.
        flow: The flow that has the parts now.
        is_conditional: Whether its velocity takes contexts.
    """
    found = describe_own(flow, is_conditional=is_conditional) if saved else {}
    for what, description in saved.items():
        wrong = _difference(description, found[what], flow.loc.dtype)
        if wrong:
            name = type(getattr(flow, what)).__qualname__
            raise NotPassedError(
                f"expected the {name} that was saved, got one of which {wrong}: pass an instance, "
                f"load(path, {what}={name}(...)), made as that was"
            )


def _describe_velocity(flow: Flow, *, is_conditional: bool) -> dict[str, Any]:
    """Return the sizes that the velocity of a flow states, and its values."""
    network, (t, points) = flow.velocity, _points(flow.loc)

    def rates() -> Tensor:
        context = embedded(network, _contexts(flow)) if is_conditional else None
        return evaluate(network, t, points[0], context)

    shape = image_shape(network)
    sizes: dict[str, Any] = {name: size_of(network, name) for name in _SIZES}
    sizes["image_shape"] = list(shape) if isinstance(shape, tuple) else None
    return {"sizes": sizes, "values": _values(network, rates)}


def describe_path(flow: Flow) -> dict[str, Any]:
    """Return the values of the interpolant of a flow: of a path, and of its rate."""
    path, (t, points) = flow.interpolant, _points(flow.loc)
    return {"values": _values(path, lambda: torch.cat(path.sample(t, *points), -1))}


def _difference(saved: dict[str, Any], found: dict[str, Any], dtype: torch.dtype) -> str:
    """Return in what a part differs from one that was saved, in words; empty if in nothing.

    Args:
        saved: The description of the one that was saved.
        found: That of the part.
        dtype: The type in which they compute.
    """
    sizes = found.get("sizes", {})
    for name, size in saved.get("sizes", {}).items():
        if sizes.get(name) != size:
            return f"{name} is {sizes.get(name)} in place of {size}"
    if saved["values"] is None or found["values"] is None:
        return ""
    gap = max(abs(a - b) for a, b in zip(found["values"], saved["values"], strict=True))
    largest = max(map(abs, saved["values"]))
    if gap <= max(_SHARE, math.sqrt(torch.finfo(dtype).eps)) * max(largest, _SMALL):
        return ""
    return f"values at two fixed points, up to {largest:.2g}, are up to {gap:.2g} away"


def _values(part: object, function: Callable[[], Tensor]) -> list[float] | None:
    """Return numbers from a part's values at two points; None where they tell nothing of it.

    That is where it cannot be evaluated there, and where it draws: with generators of two seeds it
    then gives two answers, as it does where it draws from others.

    Args:
        part: The part.
        function: What evaluates it, giving values of shape ``(2, M)``.
    """
    found = [_evaluated(part, function, seed) for seed in (0, 1)]
    return found[0] if found[0] == found[1] else None


def _evaluated(part: object, function: Callable[[], Tensor], seed: int) -> list[float] | None:
    mode = evaluated(part) if isinstance(part, nn.Module) else nullcontext()
    try:
        with torch.no_grad(), seeded(seed), mode:
            values = function()
        few = values[:, :: -(-values.shape[1] // _MOST_NUMBERS)].double().flatten().tolist()
    except Exception:  # whatever a part of the user's does with points that it does not expect
        return None
    return few if all(map(math.isfinite, few)) else None


def _points(like: Tensor) -> tuple[Tensor, Tensor]:
    """Return two times, ``(2,)``, and three rows at each, ``(3, 2, D)``, of whitened sizes.

    Args:
        like: A tensor of their size, type and device, shape ``(D,)``.
    """
    rows = 2 * torch.arange(1, 6 * len(like) + 1, dtype=torch.float64).sin()
    return torch.tensor(_TIMES).to(like), rows.reshape(3, 2, len(like)).to(like)


def _contexts(flow: Flow) -> Tensor:
    """Return two contexts, shape ``(2, C)``, of zeros and ones: they may be labels.

    Raises:
        ValueError: If the velocity does not state C.
    """
    if flow.context_dim is None:
        raise ValueError("expected a velocity with an attribute context_dim")
    places = torch.arange(2)[:, None] + torch.arange(flow.context_dim)
    return (places % min(2, flow.classes or 2)).to(flow.loc)
