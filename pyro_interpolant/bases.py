r"""What a flow starts from: the standard normal, or any Pyro distribution in data coordinates."""

import copy
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Transform, constraints

from .flow import Flow

__all__ = ["Whiten", "checked_base", "moved", "standard_normal"]


class Whiten(Transform):
    """Map a base given in data coordinates to the whitened coordinates the velocity moves."""

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def _call(self, x: Tensor) -> Tensor:
        return self.flow.to_white(x)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow.from_white(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``-log |det L|``, shape ``(*)``."""
        return (-self.flow.linear_log_det).expand(x.shape[:-1])

    def with_cache(self, cache_size: int = 1) -> "Whiten":
        """Return self: there is nothing to cache."""
        return self


def standard_normal(transform: Any) -> Any:
    """Return N(0, I), event shape ``(D,)``, in the type and on the device of a flow."""
    owner = getattr(transform, "flow", transform)
    zero = torch.zeros_like(owner.loc)
    return dist.Normal(zero, torch.ones_like(zero), validate_args=False).to_event(1)


def checked_base(base: Any, dim: int) -> Any:
    """Return a base of event shape ``(dim,)``, or say why it cannot be one."""
    if not isinstance(base, TorchDistributionMixin):
        raise TypeError(
            "expected a base from pyro.distributions (torch's own cannot be sampled by Pyro), got "
            f"{type(base).__name__}"
        )
    if base.event_shape != (dim,):
        hint = ": add .to_event(1)" if base.batch_shape[-1:] == (dim,) else ""
        raise ValueError(
            f"expected a base of event shape ({dim},), got event shape {tuple(base.event_shape)} "
            f"and batch shape {tuple(base.batch_shape)}{hint}"
        )
    return base


def moved(value: Any, like: Tensor) -> Any:
    """Return a copy of a distribution in the type and on the device of a tensor."""
    own = getattr(value, "to", None)
    if own is not None and isinstance(value, torch.distributions.Distribution):
        return own(like)  # another flow moves itself
    if isinstance(value, Tensor):
        return value.to(like) if value.is_floating_point() else value.to(like.device)
    if isinstance(value, (list, tuple)):
        return type(value)(moved(v, like) for v in value)
    if isinstance(value, (torch.distributions.Distribution, Transform)):
        new = copy.copy(value)
        new.__dict__.update({k: moved(v, like) for k, v in value.__dict__.items()})
        return new
    return value
