r"""The divergence :math:`\nabla\cdot v_t(x)` of a velocity, exact or by fixed random probes.

With J the Jacobian of :math:`v_t` at x, the divergence is :math:`\mathrm{tr} J = \sum_i e_i^T J
e_i`, and :math:`E[\epsilon^T J \epsilon]` over probes :math:`\epsilon` of unit covariance. A
velocity with ``forward_and_divergence(t, x, context=None)`` computes its own; for any other the
products :math:`J e` are by forward-mode differentiation, which survives ``grad``, Hessians,
``vmap`` and tracing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import vmap

from .._package import keep_whole
from .._torch import constant, jvp
from ..nn.elementary import Elementary
from ..nn.velocity import divergence_field, exact_divergence, expanded, inputs_of


class Divergence(Protocol):
    """The divergence of a velocity, as a callable ``(velocity, t, x, context)``."""

    def __call__(
        self, velocity: nn.Module, t: Tensor, x: Tensor, context: Tensor | None
    ) -> Tensor:
        """Return the divergence, shape ``(*)``, at ``x``, shape ``(*, D)``."""
        ...


@dataclass(frozen=True)
class ExactDivergence:
    r"""Compute the trace of the Jacobian exactly.

    The velocity's own ``forward_and_divergence`` where it has one; otherwise D forward-mode
    products in one batched call, :math:`\sum_i e_i^T J e_i`.

    Example:
        >>> linear = torch.nn.Linear(3, 3, bias=False).double()
        >>> class Field(torch.nn.Module):
        ...     def forward(self, t, x, context=None):
        ...         return linear(x)
        >>> x = torch.randn(5, 3, dtype=torch.float64)
        >>> value = ExactDivergence()(Field(), torch.tensor(0.5), x, None)
        >>> bool(torch.allclose(value, linear.weight.trace().expand(5)))
        True
    """

    def __call__(
        self, velocity: nn.Module, t: Tensor, x: Tensor, context: Tensor | None
    ) -> Tensor:
        """Return the exact divergence, shape ``(*)``, at ``x``, shape ``(*, D)``."""
        own = exact_divergence(velocity)
        if own is not None:
            inputs = inputs_of(velocity, t, x, context)
            return own(inputs[0], x, *inputs[1:])[1]
        basis = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        return _quadratic_forms(velocity, t, x, context, basis).sum(0)

    def field(
        self, velocity: nn.Module, times: Tensor, context: Tensor | None
    ) -> Sequence[Callable[[Tensor], Tensor]]:
        """Return one function ``x -> divergence`` per time of ``times``, shape ``(T,)``."""
        own = divergence_field(velocity, times, context)
        if own is not None:
            return own
        return [partial(self, velocity, t, context=context) for t in times.unbind()]


@dataclass(frozen=True)
class NoDensity:
    """The divergence of a guided velocity, which nobody should take for a log-density's rate."""

    def __call__(
        self, velocity: nn.Module, t: Tensor, x: Tensor, context: Tensor | None
    ) -> Tensor:
        """Raise an error, whatever x, of shape ``(*, D)``, is."""
        raise NotImplementedError(
            "guided samples have no density that is known: their velocity is not that of a path "
            "between base and data. Take log_prob of the distribution that was guided"
        )


@dataclass(frozen=True)
class HutchinsonDivergence:
    r"""Estimate the trace as :math:`\frac1P \sum_p \epsilon_p^T J \epsilon_p`.

    The probes :math:`\epsilon_p \in \{-1, 1\}^D` are a function of ``seed`` and D alone, shared by
    rows, time nodes and copies: the estimate is a deterministic function of x, as HMC needs.

    Args:
        probes: The number P of probes; the error falls as :math:`1/\sqrt P`.
        seed: The seed of the probes.

    Raises:
        ValueError: If ``probes`` or ``seed`` is not whole, or ``probes`` below 1.

    References:
        Hutchinson, Communications in Statistics 19 (1990); Grathwohl et al., *FFJORD*, ICLR 2019.
    """

    probes: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        keep_whole(self, probes=1, seed=None)

    def __call__(
        self, velocity: nn.Module, t: Tensor, x: Tensor, context: Tensor | None
    ) -> Tensor:
        """Return the mean over the probes, shape ``(*)``, at ``x``, shape ``(*, D)``."""
        return self.samples(velocity, t, x, context).mean(0)

    def samples(
        self, velocity: nn.Module, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> Tensor:
        r"""Return each probe's :math:`\epsilon_p^T J \epsilon_p`, shape ``(P, *)``.

        Their standard deviation over p, divided by :math:`\sqrt P`, is the standard error.
        """
        probes = self.directions(x.shape[-1]).to(x)
        return _quadratic_forms(velocity, t, x, context, probes)

    def directions(self, dim: int) -> Tensor:
        """Return the probes, random signs, shape ``(P, dim)``."""
        return constant(_probes(self.probes, self.seed, dim))


@lru_cache(maxsize=32)
def _probes(count: int, seed: int, dim: int) -> NDArray[np.float32]:
    """Return random signs, shape ``(count, dim)``: the last bits of the Mersenne twister.

    They are those of ``torch.randint`` with a generator of this seed, which ``vmap`` refuses.
    """
    bits = np.random.RandomState(seed % 2**32).randint(2**32, size=(count, dim), dtype=np.uint32)
    return 2 * (bits.astype(np.int64) % 2).astype(np.float32) - 1  # compilers have no uint32


def _quadratic_forms(
    velocity: nn.Module, t: Tensor, x: Tensor, context: Tensor | None, directions: Tensor
) -> Tensor:
    """Return ``e J e`` for each row ``e`` of ``directions``, shape ``(len(directions), *)``."""
    if torch.is_inference_mode_enabled():  # over whose tensors older versions map no forward mode
        given = (None if part is None else part.clone() for part in (t, x, context, directions))
        with torch.inference_mode(mode=False), torch.no_grad():
            return _quadratic_forms(velocity, *given)  # type: ignore[arg-type]
    x = x.contiguous()  # forward mode cannot carry tangents on the stride-0 tensors of a plate

    # Shapes are read here: a traced jvp cannot.
    arguments = expanded(t, x, context)

    def field(x: Tensor) -> Tensor:
        return velocity(arguments[0], x, *arguments[1:])

    def form(direction: Tensor) -> Tensor:
        # Multiplying by ones gives the tangent the layout of x, which an expanded one lacks.
        tangent = direction * torch.ones_like(x)
        return (jvp(field, (x,), (tangent,))[1] * direction).sum(-1)

    with Elementary():
        return vmap(form)(directions)
