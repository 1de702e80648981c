r"""The identity cache: a solved trajectory is found again by the very tensors it joined.

``rsample`` followed by ``log_prob`` of the same tensor, or ``t.inv(y)`` followed by
``t.log_abs_det_jacobian(x, y)``, should cost one solve. A size-one cache keyed by identity, as
usual in Pyro, goes wrong when weights move, when gradients are wanted of a sample drawn without,
and when a graph has been freed. An entry here is a hit only if nothing it was computed from has
changed.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Entry", "IdentityCache"]


_ENTRIES = 4


@dataclass(eq=False)
class Entry:
    """A pair ``y = T(x)`` and what was computed with it.

    Attributes:
        x: The input, shape ``(*, D)``.
        y: The output, shape ``(*, D')``.
        states: The trajectory between them, shape ``(N + 1, *, D)``, or None where only the pair
            or the log-determinant was kept.
        forward: Whether y was solved from x, or x from y.
        log_det: ``log |dy/dx|``, shape ``(*)``, or None where it has not been asked for.
    """

    x: Tensor
    y: Tensor
    states: Tensor | None = None
    log_det: Tensor | None = None
    forward: bool = field(default=True, kw_only=True)
    token: Any = field(default=None, repr=False)
    snapshot: list[Tensor] = field(default_factory=list, repr=False)
    carries_gradient: bool = False
    spent: bool = False


class IdentityCache:
    """The last few entries of one transform.

    A hit needs: the identity of x or y; equal versions, addresses, types *and values* of
    everything the result depends on (versions miss fused optimisers and ``.data``; values miss the
    graph); the same key (solver, divergence, ...), inference mode and tracing state; a graph
    exactly where one is wanted; and no backward pass through that graph since. An entry with a
    graph is never found by the *input* of its solve alone: two results of one input must not share
    a graph that the backward pass of the first frees.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def clear(self) -> None:
        """Forget all entries."""
        self._entries.clear()

    def find(
        self,
        *,
        x: Tensor | None = None,
        y: Tensor | None = None,
        sources: Sequence[Tensor] = (),
        key: Any = None,
    ) -> Entry | None:
        """Return the valid entry of this x, this y, or this pair, or None.

        Args:
            x: The input to look for, shape ``(*, D)``, or None.
            y: The output to look for, shape ``(*, D')``, or None.
            sources: All other tensors the result depends on: parameters, buffers, context.
            key: Anything comparable the result depends on.
        """
        if not self._entries or _any_wrapped(sources):
            return None
        for entry in reversed(self._entries):
            if (x is not None and entry.x is not x) or (y is not None and entry.y is not y):
                continue
            by_input = y is None if entry.forward else x is None
            if not (by_input and entry.carries_gradient) and _is_valid(entry, sources, key):
                return entry
        return None

    def store(self, entry: Entry, sources: Sequence[Tensor] = (), key: Any = None) -> None:
        """Keep an entry, unless it lives inside a functorch transform.

        Args:
            entry: What was computed.
            sources: All other tensors the result depends on: parameters, buffers, context.
            key: Anything comparable the result depends on.
        """
        if _any_wrapped((entry.x, entry.y, *sources)):
            return
        entry.token = _token(entry, sources, key)
        output = entry.y if entry.forward else entry.x
        graph = output if entry.states is None else entry.states
        entry.carries_gradient = graph.requires_grad
        if not torch._C._get_tracing_state():
            entry.snapshot = self._snapshot(_by_value(entry, sources))
            if entry.carries_gradient and graph.grad_fn is not None:
                _spend_on_backward(entry, graph)
        self._entries = [e for e in self._entries if not e.spent][-(_ENTRIES - 1) :] + [entry]

    def _snapshot(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return copies of the tensors, sharing those of the newest entry where they are equal."""
        if self._entries and _equal(self._entries[-1].snapshot, tensors):
            return self._entries[-1].snapshot
        return [s.detach().clone() for s in tensors]


def _any_wrapped(tensors: Sequence[Tensor]) -> bool:
    """Tell whether a tensor lives inside ``torch.func.grad``, ``vmap`` or their kind."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(s) for s in tensors)


def _is_valid(entry: Entry, sources: Sequence[Tensor], key: Any) -> bool:
    wanted = torch.is_grad_enabled() and any(s.requires_grad for s in (entry.x, entry.y, *sources))
    return (
        not entry.spent
        and entry.carries_gradient == wanted
        and entry.token == _token(entry, sources, key)
        and (
            bool(torch._C._get_tracing_state())
            or _equal(entry.snapshot, _by_value(entry, sources))
        )
    )


def _token(entry: Entry, sources: Sequence[Tensor], key: Any) -> tuple[Any, ...]:
    marks = tuple(
        (None if s.is_inference() else s._version, s.data_ptr(), s.dtype, s.device)
        for s in (entry.x, entry.y, *sources)
    )
    return key, marks, torch.is_inference_mode_enabled(), bool(torch._C._get_tracing_state())


def _by_value(entry: Entry, sources: Sequence[Tensor]) -> list[Tensor]:
    """Return what is compared by value: versions miss ``.data``, and memory shared with numpy."""
    return [*sources, entry.x, entry.y]


def _equal(kept: Sequence[Tensor], now: Sequence[Tensor]) -> bool:
    return len(kept) == len(now) and all(
        k.shape == n.shape and k.dtype == n.dtype and k.device == n.device and torch.equal(k, n)
        for k, n in zip(kept, now, strict=True)
    )


def _spend_on_backward(entry: Entry, graph: Tensor) -> None:
    # A weak reference: a hook that held the entry would form a cycle through the autograd graph.
    reference = weakref.ref(entry)

    def spend(gradient: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive.spent = True
            alive.states = alive.log_det = None

    graph.register_hook(spend)
