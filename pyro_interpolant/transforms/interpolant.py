r"""The flow as a Pyro transform: base in, data out, log-determinant on demand."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from ..interpolants.linear import Interpolant
from ..nn.mlp import VelocityMLP
from ..solvers.divergence import Divergence, ExactDivergence
from ..solvers.ode import FixedGrid, Solver
from .cache import Entry, IdentityCache
from .flow import Flow, Path
from .whitening import Whitening

__all__ = [
    "ConditionalInterpolantTransform",
    "InterpolantTransform",
    "conditional_interpolant_transform",
    "interpolant_transform",
]


class _FlowHolder:
    """A flow with two choices, plain attributes whose change the cache notices.

    Attributes:
        flow: Velocity and whitening map.
        solver: How paths are integrated.
        divergence: How the log-determinant's rate is computed.
    """

    flow: Flow
    solver: Solver
    divergence: Divergence

    @property
    def velocity(self) -> nn.Module:
        """The network."""
        return self.flow.velocity

    @property
    def interpolant(self) -> Interpolant:
        """The path the velocity is trained for."""
        return self.flow.interpolant


class InterpolantTransform(_FlowHolder, TransformModule):
    r"""Map the base to the data along the velocity of a stochastic interpolant.

    Input: ``w_0``, a draw of :math:`N(0, I_D)` (or, whitened, of another base). Output: data.

    Args:
        velocity: Any module with ``forward(t, x, context=None)``; see :class:`VelocityMLP`.
        event_dim: D. By default ``velocity.event_dim``.
        interpolant: The path the velocity is trained for. By default :class:`Trigonometric`.
        solver: How paths are integrated, a plain attribute. By default :class:`FixedGrid`.
        divergence: How the log-determinant's rate is computed, a plain attribute. By default
            :class:`ExactDivergence`.
        whitening: The map from whitened to data coordinates, which training sets. By default
            :class:`~pyro_interpolant.transforms.DenseWhitening`.

    Raises:
        ValueError: If the size D is not known, or the velocity couples rows (batch normalisation).
        TypeError: If the velocity is not a module, or a Pyro module with random weights.

    References:
        Albergo & Vanden-Eijnden, ICLR 2023, arXiv 2209.15571, Proposition 1 and eq. 3.

    Example:
        >>> flow = InterpolantTransform(VelocityMLP(2, (32, 32)))
        >>> x = torch.randn(10, 2)
        >>> y = flow(x)
        >>> flow.log_abs_det_jacobian(x, y).shape
        torch.Size([10])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    context: Tensor | None
    end: float
    _cache: IdentityCache
    _last: tuple[weakref.ref[Tensor], weakref.ref[Tensor], bool] | None

    def __init__(
        self,
        velocity: nn.Module,
        event_dim: int | None = None,
        *,
        interpolant: Interpolant | None = None,
        solver: Solver | None = None,
        divergence: Divergence | None = None,
        whitening: Whitening | None = None,
    ) -> None:
        flow = Flow(velocity, event_dim, interpolant=interpolant, whitening=whitening)
        self._set_up(
            FixedGrid() if solver is None else solver,
            ExactDivergence() if divergence is None else divergence,
        )
        self.flow = flow

    def _set_up(
        self,
        solver: Solver,
        divergence: Divergence,
        context: Tensor | None = None,
        end: float = 1.0,
    ) -> None:
        super().__init__(cache_size=0)  # torch's cache does not see weights move; ours is below
        self.solver, self.divergence = solver, divergence
        # A plain attribute: the context of a view is no buffer of its own.
        self.__dict__.update(context=context, end=end, _cache=IdentityCache(), _last=None)

    @classmethod
    def _view(
        cls,
        owner: "InterpolantTransform | ConditionalInterpolantTransform",
        context: Tensor | None,
        end: float = 1.0,
    ) -> "InterpolantTransform":
        """Return a transform with the owner's flow and choices that registers no weights."""
        view = cls.__new__(cls)
        view._set_up(owner.solver, owner.divergence, context, end)
        view.__dict__["flow"] = owner.flow
        view.training = owner.flow.training
        return view

    def owns_flow(self) -> bool:
        """Return whether the weights are this transform's, and not of what gave it as a view."""
        return "flow" not in self.__dict__

    def at(self, t: float) -> "InterpolantTransform":
        """Return the transform that stops at time t: from the base to the density at t.

        It shares the weights and owns none. At t = 0 it is the affine map alone.

        Args:
            t: A time in [0, 1].

        Raises:
            ValueError: If t is outside [0, 1].
        """
        t = float(t)
        if not 0.0 <= t <= 1.0:
            raise ValueError(f"expected a time t in [0, 1], got {t}")
        return self._view(self, self.context, t)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the data ``y``, shape ``(*, D)``, of the base draws ``x``, shape ``(*, D)``."""
        entry = self._find(x=x)
        return self._solve_from_base(x).y if entry is None else entry.y

    def _inv_call(self, y: Tensor) -> Tensor:
        entry = self._find(y=y)
        return self._solve_from_data(y).x if entry is None else entry.x

    def _call(self, x: Tensor) -> Tensor:
        states = self.flow.integrate(self._checked(x), self._path(), forward=True)
        return self.flow.whitening.from_white(states[-1])

    def _inverse(self, y: Tensor) -> Tensor:
        white = self.flow.whitening.to_white(self._checked(y))
        return self.flow.integrate(white, self._path(), forward=False)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log |dy/dx|``, shape ``(*)``.

        A pair that came from this transform is not solved again.

        Args:
            x: Base draws, shape ``(*, D)``.
            y: Their images, shape ``(*, D)``.
        """
        entry = self._find(x=x, y=y)
        if entry is None or (entry.states is None and entry.log_det is None):
            if self._came_from_base(x, y):
                entry = self._solve_from_base(x, density=True)
            else:
                entry = self._solve_from_data(y)
        if entry.log_det is not None:
            return entry.log_det
        states = entry.states
        if states is None:  # an earlier solve kept its ends alone
            states = self.flow.integrate(self._checked(x), self._path(), forward=True)
        entry.log_det = self.flow.log_det(states, self._path())
        return entry.log_det

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of the output: the input's, broadcast with the context's batch."""
        if self.context is None:
            return torch.Size(shape)
        batch = torch.broadcast_shapes(tuple(shape[:-1]), self.context.shape[:-1])
        return torch.Size((*batch, *shape[-1:]))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of the input: the output's, broadcast with the context's batch."""
        return self.forward_shape(shape)

    def with_cache(self, cache_size: int = 1) -> "InterpolantTransform":
        """Return self: the cache is always there and checks itself."""
        return self

    def clear_cache(self) -> None:
        """Forget all solved trajectories."""
        self._cache.clear()

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles: without cached graphs or inverses."""
        return {**self.__dict__, "_cache": IdentityCache(), "_last": None, "_inv": None}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: FBT001, FBT002
        super()._apply(fn, recurse)
        if not self.owns_flow():
            self.flow._apply(fn, recurse)
        self.__dict__["context"] = None if self.context is None else fn(self.context)
        return self

    def __repr__(self) -> str:
        """Name the parts."""
        return nn.Module.__repr__(self)

    def _path(self) -> Path:
        return Path(self.context, self.end, self.solver, self.divergence)

    def _find(self, *, x: Tensor | None = None, y: Tensor | None = None) -> Entry | None:
        return self._cache.find(x=x, y=y, sources=self._sources(), key=self._path()[1:])

    def _sources(self) -> list[Tensor]:
        context = [] if self.context is None else [self.context]
        return [*self.flow.parameters(), *self.flow.buffers(), *context]

    def _solve_from_base(self, x: Tensor, *, density: bool = False) -> Entry:
        states, log_det = self.flow.trajectory(
            self._checked(x), self._path(), forward=True, density=density
        )
        return self._keep(Entry(x, self.flow.whitening.from_white(states[-1]), states, log_det))

    def _solve_from_data(self, y: Tensor) -> Entry:
        white = self.flow.whitening.to_white(self._checked(y))
        # An inverse is nearly always followed by its log-determinant.
        states, log_det = self.flow.trajectory(white, self._path(), forward=False, density=True)
        return self._keep(Entry(states[0], y, states, log_det, forward=False))

    def _came_from_base(self, x: Tensor, y: Tensor) -> bool:
        """Tell which end to solve a pair from: the same as last time, or the one with no past."""
        if self._last is not None and self._last[0]() is x and self._last[1]() is y:
            return self._last[2]
        return x.grad_fn is None and (x.requires_grad or not y.requires_grad)

    def _keep(self, entry: Entry) -> Entry:
        # For pairs the cache cannot hold: inside torch.func, or once their graph is freed.
        last = weakref.ref(entry.x), weakref.ref(entry.y), entry.forward
        self.__dict__["_last"] = last
        if entry.states is not None and len(entry.states) < len(self._path().times()[0]):
            entry.states = None  # reduced to its ends
        self._cache.store(entry, self._sources(), self._path()[1:])
        return entry

    def _checked(self, x: Tensor) -> Tensor:
        """Check x and broadcast it with the batch of the context."""
        dim, loc = self.flow.event_dim, self.flow.loc
        if x.dim() < 1 or x.shape[-1] != dim:
            hint = " For N scalars with D = 1 pass shape (N, 1): x[..., None]." if dim == 1 else ""
            raise ValueError(
                f"expected a last dimension of size {dim}, got shape {tuple(x.shape)}.{hint}"
            )
        if x.dtype != loc.dtype:
            raise ValueError(
                f"expected {loc.dtype}, the type of the flow, got {x.dtype}: convert the value, "
                "or the flow by .to(dtype)"
            )
        return x if self.context is None else x.expand(self.forward_shape(x.shape))


class ConditionalInterpolantTransform(_FlowHolder, ConditionalTransformModule):
    r"""A family of flows :math:`p(x | c)`: ``condition(context)`` gives one member.

    Args:
        velocity: Any module with ``forward(t, x, context)``; see :class:`VelocityMLP`.
        event_dim, interpolant, solver, divergence, whitening: As in :class:`InterpolantTransform`.

    Raises:
        ValueError, TypeError: As in :class:`InterpolantTransform`.

    Example:
        >>> flow = conditional_interpolant_transform(2, context_dim=3, hidden_dims=(32, 32))
        >>> flow.condition(torch.randn(10, 3))(torch.randn(10, 2)).shape
        torch.Size([10, 2])
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(
        self,
        velocity: nn.Module,
        event_dim: int | None = None,
        *,
        interpolant: Interpolant | None = None,
        solver: Solver | None = None,
        divergence: Divergence | None = None,
        whitening: Whitening | None = None,
    ) -> None:
        super().__init__()
        self.flow = Flow(velocity, event_dim, interpolant=interpolant, whitening=whitening)
        self.solver = FixedGrid() if solver is None else solver
        self.divergence = ExactDivergence() if divergence is None else divergence

    def owns_flow(self) -> bool:
        """Return True: the weights are this transform's."""
        return True

    def condition(self, context: Tensor) -> InterpolantTransform:
        """Return the transform given a context; it shares the weights and owns none.

        Args:
            context: Shape ``(*, C)``; its batch shape broadcasts with that of x. Leading
                dimensions of size one are dropped.

        Raises:
            ValueError: If the last dimension is not the velocity's ``context_dim``.
        """
        expected = self.flow.context_dim
        if context.dim() < 1 or expected not in (None, context.shape[-1]):
            raise ValueError(
                f"expected a context of shape (*, {expected}), got {tuple(context.shape)}"
            )
        while context.dim() > 1 and context.shape[0] == 1:
            context = context[0]
        return InterpolantTransform._view(self, context)


def interpolant_transform(
    input_dim: int, hidden_dims: Sequence[int] | None = None, **kwargs: Any
) -> InterpolantTransform:
    """Return an :class:`InterpolantTransform` with a :class:`VelocityMLP`, in Pyro's convention.

    Args:
        input_dim: D.
        hidden_dims: The widths of the hidden layers; by default chosen by D.
        **kwargs: Passed to :class:`InterpolantTransform`.

    Returns:
        An untrained transform of inputs of shape ``(*, D)``.
    """
    return InterpolantTransform(VelocityMLP(input_dim, hidden_dims), **kwargs)


def conditional_interpolant_transform(
    input_dim: int, context_dim: int, hidden_dims: Sequence[int] | None = None, **kwargs: Any
) -> ConditionalInterpolantTransform:
    """Return a :class:`ConditionalInterpolantTransform` with a :class:`VelocityMLP`.

    Args:
        input_dim: D.
        context_dim: C.
        hidden_dims: The widths of the hidden layers; by default chosen by D.
        **kwargs: Passed to :class:`ConditionalInterpolantTransform`.

    Returns:
        An untrained transform of inputs of shape ``(*, D)``, given contexts of shape ``(*, C)``.
    """
    return ConditionalInterpolantTransform(
        VelocityMLP(input_dim, hidden_dims, context_dim), **kwargs
    )
