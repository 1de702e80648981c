r"""The identity cache: pairs :math:`y = T(x)`, found again by the very tensors x or y.

``rsample`` followed by ``log_prob`` of the same tensor, or ``t.inv(y)`` followed by
``t.log_abs_det_jacobian(x, y)``, should cost one solve. A size-one cache keyed by identity, as
usual in Pyro, goes wrong when weights move, when gradients are wanted of a sample drawn without,
and when a graph has been freed. An entry here is a hit only if nothing it was computed from has
changed.
"""

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Transform, constraints

from .._torch import (
    constant,
    current_trace,
    has_tangent,
    is_compiling,
    is_functorch_tensor,
    is_tracing,
    needs_graph,
)

_ENTRIES_KEPT = 4  # of one transform
_COPIED_NUMBERS = 2**16  # the most in a tensor that is copied to compare it later

Known = tuple[Sequence[Tensor], Hashable]  # what a result depends on: tensors, and all else


@dataclass(eq=False)
class Entry:
    """A pair ``y = T(x)`` and what was computed with it.

    Attributes:
        x: The input, shape ``(*, D)``.
        y: The output, shape ``(*, D')``.
        states: The trajectory between them, shape ``(N + 1, *, D)``, or None where only the pair
            or the log-determinant was kept.
        forward: Whether y was solved from x, or x from y.
        log_det: ``log |dy/dx|``, shape ``(*)``, or None where it has not been computed.
        token: Versions, addresses and modes at the time of the computation.
        snapshot: Copies of all that the result depends on, to compare values; of large weights
            their checksums.
        carries_gradient: Whether the result has a graph.
        is_freed: Whether a backward pass has freed that graph.
    """

    x: Tensor
    y: Tensor
    states: Tensor | None = None
    log_det: Tensor | None = None
    forward: bool = field(default=True, kw_only=True)
    token: Hashable = field(default=None, repr=False)
    snapshot: list[Tensor] = field(default_factory=list, repr=False)
    carries_gradient: bool = False
    is_freed: bool = False


class IdentityCache:
    """The last few entries of one transform.

    A hit needs: the identity of x or y; equal versions, addresses, types *and values* of
    everything the result depends on (versions miss fused optimisers and ``.data``; values miss the
    graph); the same key (solver, divergence, ...), inference mode, autocast and trace; a
    graph exactly where one is wanted; and no backward pass through that graph since. An entry with
    a graph is never found by the *input* of its solve alone: two results of one input must not
    share a graph that the backward pass of the first frees. What depends on tensors with a tangent
    is neither kept nor found.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._last: tuple[weakref.ref[Tensor], weakref.ref[Tensor], bool] | None = None

    def clear(self) -> None:
        """Forget all entries."""
        self._entries.clear()

    def find(
        self, known: Callable[[], Known], *, x: Tensor | None = None, y: Tensor | None = None
    ) -> Entry | None:
        """Return the valid entry of this x, this y, or this pair, or None.

        Args:
            known: What the result depends on now. It is asked for only where there is an entry,
                for that costs ten times as much as to look for one.
            x: The input to look for, shape ``(*, D)``, or None.
            y: The output to look for, shape ``(*, D')``, or None.
        """
        if is_compiling():
            return None
        found = [e for e in self._entries if (x is None or e.x is x) and (y is None or e.y is y)]
        if not found:
            return None
        sources, key = known()
        if _are_transformed(sources):
            return None
        for entry in reversed(found):
            by_input = y is None if entry.forward else x is None
            if not (by_input and entry.carries_gradient) and _is_valid(entry, sources, key):
                return entry
        return None

    def store(self, entry: Entry, sources: Sequence[Tensor] = (), key: Hashable = None) -> None:
        """Keep an entry, unless torch transforms what it depends on, or it is being compiled.

        Args:
            entry: What was computed.
            sources: All other tensors the result depends on: parameters, buffers, context.
            key: All else that the result depends on, to compare.
        """
        if is_compiling():
            return
        self._last = weakref.ref(entry.x), weakref.ref(entry.y), entry.forward
        tensors = entry.x, entry.y, *sources
        if _are_transformed(tensors):
            return
        entry.token = _token(entry, sources, key)
        output = entry.y if entry.forward else entry.x
        graph = output if entry.states is None else entry.states
        entry.carries_gradient = graph.requires_grad
        if not is_tracing():
            entry.snapshot = self._snapshot(_values([*sources, entry.x, entry.y]))
            if entry.carries_gradient and graph.grad_fn is not None:
                _mark_freed_on_backward(entry, graph)
        self._entries = [e for e in self._entries if not e.is_freed][-(_ENTRIES_KEPT - 1) :] + [
            entry
        ]

    def last_solved_forward(self, x: Tensor, y: Tensor) -> bool | None:
        """Return whether y was solved from x, if this pair was the last to be stored, else None.

        Also of pairs that no entry can hold: those inside :mod:`torch.func`, or of a freed graph.

        Args:
            x: The input, shape ``(*, D)``.
            y: The output, shape ``(*, D')``.
        """
        if is_compiling() or self._last is None:
            return None
        first, second, forward = self._last
        return forward if first() is x and second() is y else None

    def _snapshot(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return copies of the tensors, sharing those of the newest entry where they are equal."""
        if self._entries and _equal(self._entries[-1].snapshot, tensors):
            return self._entries[-1].snapshot
        return [s.detach().clone() for s in tensors]


def _are_transformed(tensors: Sequence[Tensor]) -> bool:
    """Return whether a tensor is of ``torch.func``, or has a tangent, which no version tells."""
    return any(is_functorch_tensor(s) or has_tangent(s) for s in tensors)


def _is_valid(entry: Entry, sources: Sequence[Tensor], key: Hashable) -> bool:
    tensors = [*sources, entry.x, entry.y]
    return (
        not entry.is_freed
        and entry.carries_gradient == needs_graph(*tensors)
        and entry.token == _token(entry, sources, key)
        # Versions miss ``.data``, and memory shared with numpy.
        and (is_tracing() or _equal(entry.snapshot, _values(tensors)))
    )


def _token(entry: Entry, sources: Sequence[Tensor], key: Hashable) -> Hashable:
    marks = tuple(
        (None if s.is_inference() else s._version, s.data_ptr(), s.dtype, s.device)
        for s in (entry.x, entry.y, *sources)
    )
    trace = _Itself(current_trace())  # a result of one trace is a constant in the next
    modes = torch.is_inference_mode_enabled(), trace, _autocast_type(entry.y.device)
    return key, marks, modes


def _autocast_type(device: torch.device) -> torch.dtype | None:
    """Return the type in which autocast computes on a device; None where it is off."""
    kind = device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else None


def _equal(kept: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return len(kept) == len(now) and all(
        k.shape == n.shape and k.dtype == n.dtype and k.device == n.device and torch.equal(k, n)
        for k, n in zip(kept, now, strict=True)
    )


def _values(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors; large ones as checksums, for copies would double a network's memory."""
    return [s if s.numel() <= _COPIED_NUMBERS else _checksums(s) for s in tensors]


@torch.no_grad()
def _checksums(x: Tensor) -> Tensor:
    """Return sums of the bits of a tensor in pieces, each times an odd number, and its shape.

    No change of a single number leaves its sum as it was, modulo 2^64.

    Args:
        x: A tensor of any shape.
    """
    # By 32 bits: of 64, a sign would be the last to count, and an even number of them be lost.
    whole = {1: torch.uint8, 2: torch.int16}.get(x.element_size(), torch.int32)
    factors = constant(_odd_numbers()).to(x.device)
    pieces = x.detach().reshape(-1).contiguous().view(whole).split(len(factors))
    sums = [(piece * factors[: len(piece)]).sum() for piece in pieces]
    return torch.stack([*sums, *torch.tensor(x.shape, device=x.device)])


@lru_cache(maxsize=1)
def _odd_numbers() -> np.ndarray:
    """Return random odd numbers."""
    return 2 * np.random.RandomState(0).randint(2**62, size=_COPIED_NUMBERS, dtype=np.int64) + 1


def state_of(network: nn.Module) -> tuple[list[Tensor], Hashable]:
    """Return what the result of a network depends on: tensors, and all else, to compare.

    The tensors, of any shapes, are parameters, buffers and plain attributes. All else is the
    class, the mode and the hooks of each module, and its attributes: numbers, text, arrays, and
    lists and dictionaries of them, by value; other objects by identity, so that a change inside of
    one is not seen.

    Args:
        network: The network.
    """
    tensors: list[Tensor] = []
    rest: list[object] = []
    for module in network.modules():
        own = (*module._parameters.values(), *module._buffers.values())
        tensors += [tensor for tensor in own if tensor is not None]
        forward = *module._forward_hooks, *module._forward_pre_hooks  # numbers that no two share
        hooks = *forward, *module._backward_hooks, *module._backward_pre_hooks
        rest += [type(module), module.training, hooks]
        for name, value in vars(module).items():
            if name not in _PARTS_OF_MODULES:
                rest += [name, _comparable(value, tensors)]
    return tensors, tuple(rest)


_PARTS_OF_MODULES = frozenset(vars(nn.Module()))
_PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device}
_MOST_NESTED = 4  # lists and dictionaries inside each other, which may be circles


def _comparable(value: object, tensors: list[Tensor], depth: int = 0) -> Hashable:
    """Return a hashable stand-in for an attribute, equal while its value is the same.

    Its tensors go to a list.

    Args:
        value: An attribute, or an entry of one.
        tensors: Where tensors, of any shapes, go, which are compared by themselves.
        depth: The number of lists and dictionaries around the value.
    """
    if type(value) in _PLAIN:
        return cast(Hashable, value)
    if type(value) in (Tensor, nn.Parameter) and cast(Tensor, value).layout == torch.strided:
        tensors.append(cast(Tensor, value))
        return Tensor
    if isinstance(value, np.ndarray | np.generic):
        return value.dtype.str, value.shape, value.tobytes()
    if isinstance(value, dict) and depth < _MOST_NESTED:
        value = [part for item in value.items() for part in item]
    if isinstance(value, list | tuple) and depth < _MOST_NESTED:
        return tuple(_comparable(part, tensors, depth + 1) for part in value)
    return _Itself(value)


class _Itself:
    """An object compared by identity; held, so that its address is not reused."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def _mark_freed_on_backward(entry: Entry, graph: Tensor) -> None:
    # A weak reference: a hook that held the entry would form a cycle through the autograd graph.
    reference = weakref.ref(entry)

    def mark(gradient: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive.is_freed = True
            alive.states = alive.log_det = None

    graph.register_hook(mark)


class RealVectorTransform(Transform):
    """A bijection of real vectors, without torch's own cache, which does not see weights move."""

    domain: constraints.Constraint = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector
    bijective = True

    def with_cache(self, cache_size: int = 1) -> Transform:
        """Return self."""
        return self

    def inverse_and_log_det(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return x with ``y = T(x)``, shape ``(*, D)``, and ``log |dy/dx|``, shape ``(*)``.

        Args:
            y: The output, shape ``(*, D')``.
        """
        x = self._inv_call(y)
        return x, self.log_abs_det_jacobian(x, y)


class CachedTransform(RealVectorTransform):
    """A bijection that gives back the very tensor it was called with, under the cache's guards."""

    def __init__(self) -> None:
        super().__init__()
        self._cache = IdentityCache()

    def __call__(self, x: Tensor) -> Tensor:
        """Return the output ``y``, shape ``(*, D')``, of the input ``x``, shape ``(*, D)``."""
        entry = self._find(x=x)
        return self._entry_from_input(x).y if entry is None else entry.y

    def _inv_call(self, y: Tensor) -> Tensor:
        entry = self._find(y=y)
        return self._entry_from_output(y).x if entry is None else entry.x

    def _sources(self) -> Sequence[Tensor]:
        """Return all tensors, but for x, that a result depends on."""
        raise NotImplementedError

    def _find(self, *, x: Tensor | None = None, y: Tensor | None = None) -> Entry | None:
        return self._cache.find(lambda: (self._sources(), None), x=x, y=y)

    def _entry_from_input(self, x: Tensor) -> Entry:
        return self._keep(Entry(x, self._call(x)))

    def _entry_from_output(self, y: Tensor) -> Entry:
        return self._keep(Entry(self._inverse(y), y, forward=False))

    def _keep(self, entry: Entry) -> Entry:
        self._cache.store(entry, self._sources())
        return entry

    def clear_cache(self) -> None:
        """Forget all pairs and what was computed with them."""
        self._cache.clear()

    def __getstate__(self) -> dict[str, object]:
        """Return the state for copies and pickles: without cached graphs or inverses."""
        return {**self.__dict__, "_cache": IdentityCache(), "_inv": None}
