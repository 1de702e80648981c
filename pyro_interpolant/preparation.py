r"""What is done before training: checks with clear errors, and the choice of a map."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .bases import Samples
from .data import checked_rows, moments
from .distributions import ConditionalInterpolantDistribution, InterpolantDistribution
from .flow import Flow
from .joint import JointInterpolantDistribution
from .latents import Mirror
from .marginals import Gaussianized
from .networks import VelocityMLP
from .objective import Rows
from .preference import preferred_support
from .radial import RadialTransform
from .rounding import warn_if_rounded
from .supports import Constraint, bijection, is_circular, to_unconstrained

__all__ = [
    "check_partners",
    "check_settings",
    "checked_batch",
    "checked_context",
    "checked_data",
    "checked_weights",
    "choose_support",
    "collected",
    "given_rows",
    "noise_network",
    "own_flow",
    "present",
    "set_base",
]

AnyDistribution = InterpolantDistribution | ConditionalInterpolantDistribution

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


def noise_network(flow: Flow) -> nn.Module:
    """Return the network that learns the latent noise, made beside the velocity if missing."""
    if not flow.interpolant.has_latent():
        raise ValueError(
            f"expected an interpolant with a latent term to learn the noise, got "
            f"{type(flow.interpolant).__name__}: use Latent(...), or score(), which needs no "
            "network for a Gaussian base"
        )
    if flow.noise is None:
        velocity = flow.velocity
        if isinstance(velocity, VelocityMLP):
            flow.noise = VelocityMLP(*velocity.arguments()).to(flow.loc)
            for name, value in velocity.named_buffers():
                getattr(flow.noise, name).copy_(value)
        else:
            context_dim = getattr(velocity, "context_dim", 0)
            flow.noise = VelocityMLP(flow.dim, context_dim=context_dim).to(flow.loc)
    return flow.noise


def checked_batch(batch_size: int | None, available: int) -> int:
    """Return the number of rows per step."""
    if batch_size is None:
        return max(1, min(_BATCH, available))
    if not 1 <= batch_size <= available:
        raise ValueError(
            f"expected batch_size between 1 and the {available} training rows, got {batch_size}"
        )
    return batch_size


def check_settings(
    steps: int | None,
    max_seconds: float | None,
    learning_rate: float,
    weight_decay: float | None,
    validation: Any,
    patience: int,
    ema: float,
    tolerance: float,
) -> None:
    """Raise a ValueError that names the first setting out of range."""
    share = validation if isinstance(validation, int | float) else None
    for name, good, value in (
        ("steps >= 1", steps is None or steps >= 1, steps),
        ("max_seconds > 0", max_seconds is None or max_seconds > 0, max_seconds),
        ("learning_rate > 0", learning_rate > 0, learning_rate),
        ("weight_decay >= 0", weight_decay is None or weight_decay >= 0, weight_decay),
        ("validation between 0 and 1, or rows", share is None or 0 < share < 1, share),
        ("patience >= 1", patience >= 1, patience),
        ("ema in [0, 1)", 0 <= ema < 1, ema),
        ("tolerance > 0", tolerance > 0, tolerance),
    ):
        if not good:
            raise ValueError(f"expected {name}, got {value}")


def choose_support(
    rows: Tensor | None, support: Constraint, fit_options: dict[str, Any], marginals: Any
) -> Constraint:
    """Return a support, behind a map set by rows, ``(N, *event_shape)``, if so wanted."""
    fixed = any(fit_options.get(name) is not None for name in ("base_samples", "pairs"))
    if rows is None or is_circular(support) or fixed:
        if marginals:
            raise ValueError(
                "expected marginals=True beside a table of rows that are no angles, without pairs "
                "or base_samples"
            )
        return support
    if marginals is False:
        return support
    weights = checked_weights(fit_options.get("weights"), len(rows))
    real = to_unconstrained(rows, support)
    found = preferred_support(real, support, weights, always=bool(marginals))
    if isinstance(found, Gaussianized) and isinstance(found.chart, RadialTransform):
        warn_if_rounded(real)  # what is wrong with columns, the fit cannot see behind the map
        moments(real)
    return found
