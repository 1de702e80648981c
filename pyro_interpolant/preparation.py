r"""What is done before training: checks with clear errors, and the whitening map."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .bases import Samples
from .data import Moments, checked_rows, moments
from .distributions import ConditionalInterpolantDistribution, InterpolantDistribution
from .flow import Flow
from .joint import JointInterpolantDistribution
from .latents import Mirror
from .networks import VelocityMLP
from .supports import bijection

__all__ = [
    "check_settings",
    "checked_batch",
    "checked_context",
    "checked_data",
    "checked_partners",
    "noise_network",
    "own_flow",
    "precondition",
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
        return checked_rows(distribution.pack(data), "data", (flow.dim,))
    shape = bijection(distribution.constraint).forward_shape(torch.Size([flow.dim]))
    return distribution.unconstrained(checked_rows(data, "data", shape))


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


def checked_partners(
    distribution: AnyDistribution, flow: Flow, pairs: Any, count: int
) -> Tensor | None:
    """Return the base partners of the rows, shape ``(N, D)``, or None."""
    if pairs is None:
        return None
    pairs = checked_rows(pairs, "pairs", (flow.dim,))
    if len(pairs) != count:
        raise ValueError(f"expected one partner per row of data, {count}, got {len(pairs)}")
    if distribution.base is None and len(pairs) > 50:
        spread = pairs.std(0)
        if float(pairs.mean(0).abs().max()) > 1 or float((spread.log().abs()).max()) > 1:
            raise ValueError(
                "expected pairs drawn from N(0, I), the base of this distribution, got rows with "
                "other moments: pass the base they come from, or base_samples=pairs as well"
            )
    return pairs


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
    validation: float,
    patience: int,
    ema: float,
    tolerance: float,
) -> None:
    """Raise a ValueError that names the first setting out of range."""
    for name, good, value in (
        ("steps >= 1", steps is None or steps >= 1, steps),
        ("max_seconds > 0", max_seconds is None or max_seconds > 0, max_seconds),
        ("learning_rate > 0", learning_rate > 0, learning_rate),
        ("validation between 0 and 1", 0 < validation < 1, validation),
        ("patience >= 1", patience >= 1, patience),
        ("ema in [0, 1)", 0 <= ema < 1, ema),
        ("tolerance > 0", tolerance > 0, tolerance),
    ):
        if not good:
            raise ValueError(f"expected {name}, got {value}")


def precondition(
    flow: Flow,
    distribution: AnyDistribution,
    rows: Tensor,
    contexts: Tensor | None,
    partners: Tensor | None,
) -> None:
    """Set the whitening map, and the network's radius and context scale, from training rows."""
    m = moments(rows)
    if distribution.base is None:
        flow.precondition(*(m if partners is None else _aligned(m, rows, partners)))
    else:  # one scalar: a full whitening would change what the shortest path is
        base = distribution.base.sample((len(rows),)).double()
        both = torch.cat((base - base.mean(0), rows.double() - rows.double().mean(0)))
        scale = both.square().mean().sqrt()
        eye = torch.eye(flow.dim, dtype=torch.float64, device=rows.device)
        flow.precondition((base.mean(0) + rows.double().mean(0)) / 2, scale * eye, eye / scale)
    if isinstance(flow.velocity, VelocityMLP):
        w = flow.to_white(rows.to(flow.loc))
        flow.velocity.precondition(w, contexts)


def _aligned(m: Moments, rows: Tensor, partners: Tensor) -> Moments:
    """Return whitening turned toward the partners: paths of a pair must not be made to cross."""
    w = (rows.double() - m.loc) @ m.whitening.T
    u, _, vh = torch.linalg.svd(w.T @ partners.double())
    turn = u @ vh
    return Moments(m.loc, m.linear @ turn, turn.T @ m.whitening)
