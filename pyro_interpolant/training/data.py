r"""What is done before training: checks with clear errors, and the choice of a map."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..distributions.bases import Samples
from ..distributions.constraints import (
    bijection,
    checked_rows,
    is_circular,
)
from ..distributions.interpolant import (
    AnyDistribution,
    ConditionalInterpolantDistribution,
)
from ..distributions.joint import JointInterpolantDistribution
from ..interpolants.linear import Mirror
from ..transforms.flow import Flow
from .batches import Rows
from .preprocessing import warn_if_rounded

__all__ = [
    "check_partners",
    "checked_batch",
    "checked_context",
    "checked_data",
    "checked_weights",
    "collected",
    "given_rows",
    "own_flow",
    "present",
    "set_base",
]

_BATCH = 1024


def own_flow(distribution: AnyDistribution) -> Flow:
    """Return the flow a distribution owns, or say why it cannot be trained."""
    transform: Any = getattr(distribution, "transform", None)
    if not isinstance(transform, Flow):
        raise TypeError(
            "expected an InterpolantDistribution or a ConditionalInterpolantDistribution, got "
            f"{type(distribution).__name__}"
        )
    if getattr(transform, "flow", transform) is not transform:
        raise ValueError(
            "expected a flow that owns its weights, got a conditioned one or one stopped by "
            "at(t): fit the distribution it came from"
        )
    return transform


def checked_data(distribution: AnyDistribution, flow: Flow, data: Any) -> Tensor:
    """Return the data in the flow's coordinates, shape ``(N, D)``."""
    if isinstance(data, Mapping):
        if not isinstance(distribution, JointInterpolantDistribution):
            raise TypeError(
                "expected a tensor of rows: only a JointInterpolantDistribution takes named draws"
            )
        return distribution.to_flow(checked_rows(distribution.pack(data), "data", (flow.dim,)))
    shape: Any = (flow.dim,)
    if not is_circular(distribution.constraint):
        shape = bijection(distribution.constraint).forward_shape(torch.Size(shape))
    return distribution.to_flow(checked_rows(data, "data", shape))


def checked_context(
    distribution: AnyDistribution, flow: Flow, context: Any, count: int
) -> Tensor | None:
    """Return the contexts of the rows, shape ``(N, C)``, or None where there are none."""
    conditional = isinstance(distribution, ConditionalInterpolantDistribution)
    if not conditional:
        if context is not None:
            raise ValueError(
                "expected no context for this flow: use a ConditionalInterpolantDistribution"
            )
        return None
    if context is None:
        raise ValueError(
            f"expected a context of shape ({count}, C) for a conditional flow, got none"
        )
    context = checked_rows(context, "context", (getattr(flow.velocity, "context_dim", None),))
    if len(context) != count:
        raise ValueError(f"expected as many contexts as rows of data, {count}, got {len(context)}")
    return context.to(flow.loc)


def set_base(distribution: AnyDistribution, flow: Flow, base_samples: Any, rows: Tensor) -> None:
    """Let the distribution start from samples, where they are given or the path is a mirror."""
    if base_samples is None:
        if isinstance(flow.interpolant, Mirror) and distribution.base is None:
            distribution.set_base(Samples(rows.to(flow.loc)))
        return
    if distribution.base is not None and not isinstance(distribution.base, Samples):
        raise ValueError(
            "expected base_samples or a base, got both: this distribution starts from a "
            f"{type(distribution.base).__name__}, which training draws from"
        )
    base_samples = checked_rows(base_samples, "base_samples", (flow.dim,))
    distribution.set_base(Samples(base_samples.to(flow.loc)))


def check_partners(distribution: AnyDistribution, pairs: Tensor | None) -> None:
    """Raise a ValueError if partners at the default base cannot be draws of it."""
    if pairs is None or distribution.base is not None or len(pairs) < 50:
        return
    spread = pairs.std(0)
    if float(pairs.mean(0).abs().max()) > 1 or float((spread.log().abs()).max()) > 1:
        raise ValueError(
            "expected pairs drawn from N(0, I), the base of this distribution, got rows with "
            "other moments: pass the base they come from, or base_samples=pairs as well"
        )


def collected(
    distribution: AnyDistribution,
    flow: Flow,
    data: Any,
    *,
    context: Any,
    pairs: Any,
    weights: Any,
    validation: Any,
) -> tuple[Rows, int]:
    """Return all rows in the flow's coordinates, and how many are held out: the last, if given."""
    data, context, pairs, weights = present(weights, data, context, pairs)
    rows = checked_data(distribution, flow, data)
    warn_if_rounded(rows)
    count = len(rows)
    contexts = checked_context(distribution, flow, context, count)
    if pairs is not None:
        pairs = checked_rows(pairs, "pairs", (flow.dim,))
        if len(pairs) != count:
            raise ValueError(f"expected one partner per row of data, {count}, got {len(pairs)}")
    weights = checked_weights(weights, count)
    if isinstance(validation, float):
        table = Rows(rows, contexts, pairs, weights).to(flow.loc.device)
        return table, max(1, round(validation * count))
    if pairs is not None:
        raise ValueError("expected a share for validation beside pairs, got rows")
    own, own_contexts, *_ = given_rows(distribution, flow, validation)
    if contexts is not None and own_contexts is not None:
        contexts = torch.cat((contexts, own_contexts))
    if weights is not None:
        weights = torch.cat((weights, weights.new_full((len(own),), float(weights.mean()))))
    rows = torch.cat((rows, own.to(rows)))
    return Rows(rows, contexts, None, weights).to(flow.loc.device), len(own)


def present(weights: Any, *parts: Any, part: bool = False) -> tuple[Any, ...]:
    """Return parts, each of N rows or None, and weights, without the rows that have no weight.

    Such rows may hold anything: a mask's are never looked at.

    Args:
        weights: Weights, shape ``(N,)``, or None.
        *parts: Tensors or arrays of N rows, or dictionaries of them.
        part: Whether they are a part of all rows, which may have no weight at all.
    """
    if weights is None:
        return *parts, None
    weights = checked_weights(weights, None, part=part)
    keep = weights > 0

    def kept(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: kept(inner) for name, inner in value.items()}
        value = torch.as_tensor(value)
        if value.dim() == 0 or len(value) != len(keep):
            raise ValueError(
                f"expected as many non-negative weights as rows, got {len(keep)} beside a tensor "
                f"of shape {tuple(value.shape)}"
            )
        return value[keep.to(value.device)]

    if not bool(keep.all()):
        parts = tuple(None if value is None else kept(value) for value in parts)
    return *parts, weights[keep]


def given_rows(distribution: AnyDistribution, flow: Flow, validation: Any) -> Rows:
    """Return the validation rows a user gave: rows, or rows and contexts."""
    own, context = validation if isinstance(validation, tuple) else (validation, None)
    own = checked_data(distribution, flow, own)
    return Rows(own, checked_context(distribution, flow, context, len(own)))


def checked_weights(weights: Any, count: int | None, *, part: bool = False) -> Any:
    """Return weights of rows, shape ``(N,)``, or None.

    Args:
        weights: Numbers of any type, or None.
        count: N, or None for any.
        part: Whether they are those of a part of all rows, which may all be zero.

    Raises:
        ValueError: If they are of another number, negative, not finite or all zero.
    """
    if weights is None:
        return None
    weights = torch.as_tensor(weights)
    weights = weights if weights.is_floating_point() else weights.double()  # counts, a mask
    weights = checked_rows(weights, "weights", ())
    count = len(weights) if count is None else count
    enough = part or float(weights.sum()) > 0
    if len(weights) != count or float(weights.min()) < 0 or not enough:
        raise ValueError(
            f"expected {count} non-negative weights, not all zero, got {len(weights)} with a "
            f"minimum of {float(weights.min()):.3g}"
        )
    return weights


def checked_batch(batch_size: int | None, available: int) -> int:
    """Return the number of rows per step."""
    if batch_size is None:
        return max(1, min(_BATCH, available))
    if not 1 <= batch_size <= available:
        raise ValueError(
            f"expected batch_size between 1 and the {available} training rows, got {batch_size}"
        )
    return batch_size
