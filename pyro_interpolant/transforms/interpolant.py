r"""The flow as a Pyro transform, :math:`y = T(w_0)`, and the family of them given contexts.

:math:`T` integrates :math:`\dot w = v_t(w)` from the base at t = 0 to the data at t = 1, or to an
earlier time, then undoes the whitening. ``log_abs_det_jacobian`` is computed on demand, along the
trajectory that the cache kept of the solve. A transform that is conditioned, or stops at another
time, is a view: it shares the weights and registers none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.distributions.torch_transform import TransformModule
from torch import Tensor, nn
from torch.distributions import constraints

from .._torch import broadcast_shapes, is_tracing
from ..interpolants.linear import Interpolant
from ..nn.mlp import VelocityMLP
from ..nn.velocity import checked_labels, embedded, has_embedding
from ..solvers.divergence import Divergence, ExactDivergence
from ..solvers.ode import FixedGrid, Solver
from .cache import CachedTransform, Entry, IdentityCache, Known, state_of
from .flow import Flow, Path
from .whitening import Whitening


@dataclass(eq=False)
class _Solve(Entry):
    """A solved pair, with the way it was solved."""

    path: Path = field(kw_only=True)


class _FlowHolder(nn.Module):
    """A transform module of one flow, with its solver and divergence.

    Both are plain attributes, whose change the cache notices.

    Attributes:
        flow: Velocity and whitening map.
        solver: How paths are integrated.
        divergence: How the log-determinant's rate is computed.
        trains_weights: Whether gradients through it may be those of a training.
    """

    flow: Flow
    solver: Solver
    divergence: Divergence
    trains_weights: bool = True

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
        solver = FixedGrid() if solver is None else solver
        divergence = ExactDivergence() if divergence is None else divergence
        _check_choice("solver", solver, "solve", "FixedGrid()")
        _check_choice("divergence", divergence, "__call__", "ExactDivergence()")
        if interpolant is not None:
            _check_choice("interpolant", interpolant, "sample", "Linear()")
        if whitening is not None:
            _check_choice("whitening", whitening, "to_white", "DenseWhitening(D)")
        flow = Flow(velocity, event_dim, interpolant=interpolant, whitening=whitening)
        if len(flow.loc) != flow.event_dim:
            raise ValueError(
                f"expected a whitening for {flow.event_dim} dimensions, the velocity's, got one "
                f"for {len(flow.loc)}"
            )
        self._choose(solver, divergence)
        self.flow = flow

    def _choose(self, solver: Solver, divergence: Divergence) -> None:
        super().__init__()
        self.solver, self.divergence = solver, divergence

    @property
    def velocity(self) -> nn.Module:
        """The network."""
        return self.flow.velocity

    @property
    def interpolant(self) -> Interpolant:
        """The path the velocity is trained for."""
        return self.flow.interpolant

    def owns_flow(self) -> bool:
        """Return whether the weights are registered here: False of a view."""
        return "flow" in self._modules


def _check_choice(name: str, value: object, method: str, example: str) -> None:
    """Raise a TypeError unless a part, called by its name, is an instance with a method."""
    if isinstance(value, type) or not hasattr(value, method):
        got = f"the class {value.__name__}" if isinstance(value, type) else repr(value)
        raise TypeError(f"expected {name} to be an instance, such as {example}, got {got}")


class InterpolantTransform(_FlowHolder, CachedTransform, TransformModule):
    r"""Map the base to the data along the velocity of a stochastic interpolant.

    Input: ``w_0``, a draw of :math:`N(0, I_D)` (or, whitened, of another base). Output: data.

    Args:
        velocity: A module with ``forward(t, x, context=None)``; see :class:`VelocityMLP`.
        event_dim: D. By default ``velocity.event_dim``.
        interpolant: The path the velocity is trained for. By default :class:`Trigonometric`.
        solver: How paths are integrated, a plain attribute. By default :class:`FixedGrid`.
        divergence: How the log-determinant's rate is computed, a plain attribute. By default
            :class:`ExactDivergence`.
        whitening: The map from whitened to data coordinates, which training sets. By default
            :class:`~pyro_interpolant.transforms.DenseWhitening`.

    Raises:
        ValueError: If the size D is not known, or velocity or whitening is one for another, or
            the velocity couples rows (batch normalisation).
        TypeError: If the velocity is not a module, or a Pyro module with random weights, or a
            class is given in place of an instance.

    References:
        Albergo & Vanden-Eijnden, ICLR 2023, arXiv 2209.15571, Proposition 1 and eq. 3.

    Example:
        >>> flow = InterpolantTransform(VelocityMLP(2, (32, 32)))
        >>> x = torch.randn(10, 2)
        >>> y = flow(x)
        >>> flow.log_abs_det_jacobian(x, y).shape
        torch.Size([10])
    """

    # Plain attributes: the context of a view is no buffer of its own.
    raw_context: Tensor | None = None
    embeds: bool = True  # whether that is to be embedded, by a velocity that does so
    end: float = 1.0

    __repr__ = nn.Module.__repr__

    @classmethod
    def _view(
        cls, owner: _FlowHolder, context: Tensor | None, end: float = 1.0, *, embeds: bool = True
    ) -> "InterpolantTransform":
        """Return a transform with the owner's flow and choices that registers no weights."""
        view = cls.__new__(cls)
        view._choose(owner.solver, owner.divergence)
        view.__dict__.update(flow=owner.flow, raw_context=context, embeds=embeds, end=end)
        view.trains_weights = owner.trains_weights
        view.training = owner.flow.training
        return view

    def _choose(self, solver: Solver, divergence: Divergence) -> None:
        super()._choose(solver, divergence)
        self._embeddings = IdentityCache()

    @property
    def context(self) -> Tensor | None:
        """The context as the velocity takes it, ``(*, C)``, embedded by its weights as they are.

        An embedding without a graph is kept until something that it depends on changes.
        """
        raw, velocity = self.raw_context, self.flow.velocity
        if raw is None or not self.embeds or not has_embedding(velocity):
            return raw
        if is_tracing():  # a result of one trace is a constant in the next
            return embedded(velocity, raw)
        known = state_of(velocity)
        entry = self._embeddings.find(lambda: known, x=raw)
        if entry is None:
            entry = Entry(raw, cast(Tensor, embedded(velocity, raw)))
            if not entry.y.requires_grad:  # a graph is freed by the first backward pass
                self._embeddings.store(entry, *known)
        return entry.y

    def with_embedded_context(self) -> "InterpolantTransform":
        """Return the transform with its context embedded now, for a computation of many steps."""
        return self._view(self, self.context, self.end, embeds=False)

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
        view = self._view(self, self.raw_context, t, embeds=self.embeds)
        view._embeddings = self._embeddings
        return view

    @property
    def sign(self) -> int:
        """The sign of the Jacobian's determinant: a flow keeps orientation, L may turn it."""
        return self.flow.whitening.sign()

    def _call(self, x: Tensor) -> Tensor:
        states = self.flow.integrate(self._checked(x), self.path(), forward=True)
        return self.flow.whitening.from_white(states[-1])

    def _inverse(self, y: Tensor) -> Tensor:
        white = self.flow.whitening.to_white(self._checked(y))
        return self.flow.integrate(white, self.path(), forward=False)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``log |dy/dx|``, shape ``(*)``.

        A pair that came from this transform is not solved again.

        Args:
            x: Base draws, shape ``(*, D)``.
            y: Their images, shape ``(*, D)``.
        """
        entry = self._find(x=x, y=y)
        if entry is None or (entry.states is None and entry.log_det is None):
            if self._is_input_given(x, y):
                entry = self._entry_from_input(x, density=True)
            else:
                entry = self._entry_from_output(y)
        return self._log_det_of(entry)

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x with ``y = T(x)`` and ``log |dy/dx|``, from one solve with or without a cache.

        Args:
            y: Data, shape ``(*, D)``.
        """
        entry = self._find(y=y)
        if entry is None:
            entry = self._entry_from_output(y)
        return entry.x, self._log_det_of(entry)

    def _log_det_of(self, entry: _Solve) -> Tensor:
        if entry.log_det is None:
            states, path = entry.states, entry.path
            if states is None:  # an earlier solve kept only its ends, for they were too many
                states, entry.log_det = self.flow.trajectory(
                    self._checked(entry.x), path, forward=True, density=True
                )
            if entry.log_det is None:
                entry.log_det = self.flow.log_det(states, path)
        return entry.log_det.clone()  # what is done to it in place is not done to the cache

    def forward_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of the output: the input's, broadcast with the context's batch."""
        if self.raw_context is None:
            return torch.Size(shape)
        batch = broadcast_batch(shape[:-1], self.raw_context.shape[:-1])
        return torch.Size((*batch, *shape[-1:]))

    def inverse_shape(self, shape: Sequence[int]) -> torch.Size:
        """Return the shape of the input: the output's, broadcast with the context's batch."""
        return self.forward_shape(shape)

    def _apply(
        self, fn: Callable[[Tensor], Tensor], *args: bool, **kwargs: bool
    ) -> "InterpolantTransform":
        super()._apply(fn, *args, **kwargs)
        if not self.owns_flow():
            self.flow._apply(fn, *args, **kwargs)
        self.__dict__["raw_context"] = None if self.raw_context is None else fn(self.raw_context)
        return self

    def path(self) -> Path:
        """Return the way through the flow, at random nodes while gradients reach its weights."""
        return self._path(self.context)

    def _path(self, context: Tensor | None) -> Path:
        seed = self.flow.node_seed() if self.end > 0 and self.trains_weights else None
        return Path(context, self.end, self.solver, self.divergence, seed)

    def _find(self, *, x: Tensor | None = None, y: Tensor | None = None) -> _Solve | None:
        def known() -> Known:
            sources, state = self._state()
            return sources, (self._path(None), state)  # the context is among the sources

        entry = self._cache.find(known, x=x, y=y)
        return entry if isinstance(entry, _Solve) else None

    def _state(self) -> Known:
        """Return the tensors that results depend on, of any shapes, and all else of the flow."""
        tensors, state = state_of(self.flow)
        return tensors if self.raw_context is None else [*tensors, self.raw_context], state

    def _entry_from_input(self, x: Tensor, *, density: bool = False) -> _Solve:
        white, path = self._checked(x), self.path()
        states, log_det = self.flow.trajectory(white, path, forward=True, density=density)
        y = self.flow.whitening.from_white(states[-1])
        return self._kept(_Solve(x, y, states, log_det, path=path))

    def _entry_from_output(self, y: Tensor) -> _Solve:
        white, path = self.flow.whitening.to_white(self._checked(y)), self.path()
        # An inverse is nearly always followed by its log-determinant.
        states, log_det = self.flow.trajectory(white, path, forward=False, density=True)
        return self._kept(_Solve(states[0], y, states, log_det, forward=False, path=path))

    def _is_input_given(self, x: Tensor, y: Tensor) -> bool:
        """Return which end to solve a pair from: as the last time, else from one with no past."""
        as_before = self._cache.last_solved_forward(x, y)
        if as_before is not None:
            return as_before
        return x.grad_fn is None and (x.requires_grad or not y.requires_grad)

    def _kept(self, entry: _Solve) -> _Solve:
        if entry.states is not None and len(entry.states) < len(entry.path.times[0]):
            entry.states = None  # reduced to its ends
        sources, state = self._state()
        self._cache.store(entry, sources, (entry.path, state))
        return entry

    def clear_cache(self) -> None:
        """Forget all pairs and what was computed with them, and the embedding of the context."""
        super().clear_cache()
        self._embeddings.clear()

    def __getstate__(self) -> dict[str, object]:
        """Return the state for copies and pickles: without what is cached."""
        return {**super().__getstate__(), "_embeddings": IdentityCache()}

    def _checked(self, x: Tensor) -> Tensor:
        """Check x and broadcast it with the batch of the context."""
        check_tensor(x, self.flow.loc.dtype)
        dim = self.flow.event_dim
        if x.dim() < 1 or x.shape[-1] != dim:
            hint = " For N scalars with D = 1 pass shape (N, 1): x[..., None]." if dim == 1 else ""
            raise ValueError(
                f"expected a last dimension of size {dim}, got shape {tuple(x.shape)}.{hint}"
            )
        self.check_type(x)
        return x if self.raw_context is None else x.expand(self.forward_shape(x.shape))

    def check_type(self, x: Tensor) -> None:
        """Raise a ValueError unless x, of any shape, is of the flow's type."""
        dtype = self.flow.loc.dtype
        if x.dtype != dtype:
            raise ValueError(
                f"expected {dtype}, the type of the flow, got {x.dtype}: convert the value, "
                "or the flow by .to(dtype)"
            )


def check_tensor(value: object, dtype: torch.dtype, name: str = "value") -> None:
    """Raise a TypeError unless a value is a tensor.

    Args:
        value: What is asked for.
        dtype: The type of the flow, for the message.
        name: What to call the value in the message.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"expected a {name} that is a tensor, got {type(value).__name__}: convert it, "
            f"torch.as_tensor({name}, dtype={dtype})"
        )


class ConditionalInterpolantTransform(_FlowHolder, ConditionalTransformModule):
    r"""A family of flows :math:`p(x | c)`: ``condition(context)`` gives one member.

    Args:
        velocity: A module with ``forward(t, x, context)``; see :class:`VelocityMLP`.
        event_dim, interpolant, solver, divergence, whitening: As in :class:`InterpolantTransform`.

    Raises:
        ValueError, TypeError: As in :class:`InterpolantTransform`.

    Example:
        >>> flow = conditional_interpolant_transform(2, context_dim=3, hidden_dims=(32, 32))
        >>> flow.condition(torch.randn(10, 3))(torch.randn(10, 2)).shape
        torch.Size([10, 2])
    """

    domain = codomain = constraints.real_vector
    bijective = True

    def condition(self, context: Tensor) -> InterpolantTransform:
        """Return the transform given a context; it shares the weights and owns none.

        Args:
            context: Shape ``(*, C)``; its batch shape broadcasts with that of x. Leading
                dimensions of size one are dropped. Where the velocity has ``classes``, labels:
                whole numbers of shape ``(*)``, or of a floating type and shape ``(*, 1)``.

        Raises:
            TypeError: If it is not a tensor, or whole numbers of shape ``(C,)`` where the velocity
                has no ``classes``.
            ValueError: If the last dimension is not the velocity's ``context_dim``, the context is
                of a finer floating type than the flow, or a label is none of the classes.
        """
        loc, classes = self.flow.loc, self.flow.classes
        check_tensor(context, loc.dtype, "context")
        if classes:
            context = checked_labels(context, classes, loc.dtype).to(loc)
        coarser = torch.promote_types(context.dtype, loc.dtype) == loc.dtype
        if context.dtype == torch.bool or (context.is_floating_point() and coarser):
            context = context.to(loc)
        if context.dtype != loc.dtype and (context.is_floating_point() or context.is_complex()):
            raise ValueError(
                f"expected a context of {loc.dtype}, the type of the flow, got {context.dtype}: "
                "convert the context, or the flow by .to(dtype)"
            )
        if context.dim() == 1 and not context.is_floating_point():  # numbers, or a row of labels?
            raise TypeError(
                f"expected a context of a floating type, got {context.dtype} of shape "
                f"{tuple(context.shape)}: convert numbers with .float(), and labels with "
                "torch.nn.functional.one_hot(labels, K).float()"
            )
        expected = self.flow.context_dim
        if context.dim() < 1 or not context.shape[-1] or expected not in (None, context.shape[-1]):
            size = "C" if expected is None else expected
            hint = ": for N numbers pass shape (N, 1), context[..., None]" if size == 1 else ""
            raise ValueError(
                f"expected a context of shape (*, {size}), got {tuple(context.shape)}{hint}"
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


def broadcast_batch(given: Sequence[int], own: Sequence[int]) -> torch.Size:
    """Return the common batch shape of values and of a distribution or context.

    Args:
        given: The batch shape of the values.
        own: That of the distribution or context.

    Raises:
        ValueError: If they do not broadcast.
    """
    pairs = zip(reversed(given), reversed(own), strict=False)
    if any(a != b and a != 1 and b != 1 for a, b in pairs):
        raise ValueError(
            f"expected values of a batch shape that broadcasts with {tuple(own)}, that of the "
            f"distribution or its context, got {tuple(given)}: sizes are compared from the right, "
            "and must be equal or 1"
        )
    return broadcast_shapes(given, own)
