r"""Torch's private parts and global state: what the package needs of them, in one file.

Whether autograd, :mod:`torch.func` or a tracer sees a computation; scopes with a generator of
their own; activations recomputed in the backward pass; derivatives :math:`\partial_t f(t)` by
forward mode; units that far rows do not set; and warnings at the user's line.
"""

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

# No warning is raised at lines of this package, of torch, or of what runs decorated functions.
_NOT_THE_USERS = tuple(str(Path(file).parent) + os.sep for file in (__file__, torch.__file__)) + (
    contextlib.__file__,
)
_P = ParamSpec("_P")
_R = TypeVar("_R")
_MIDDLE_RANGE = 3.29  # of 90% of a normal, in standard deviations


def is_transformed() -> bool:
    """Return whether :mod:`torch.func`, forward mode or a tracer is active."""
    return (
        is_functional()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def is_functional() -> bool:
    """Return whether a transform of :mod:`torch.func` is active."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def needs_graph(*tensors: Tensor | None) -> bool:
    """Return whether autograd records what is computed from tensors, of any shapes."""
    return torch.is_grad_enabled() and any(s is not None and s.requires_grad for s in tensors)


def is_reached_backward(leaf: Tensor) -> bool:
    """Return whether the backward pass that now runs, and calls a hook, goes on to a leaf.

    One that ends in other tensors, as for the score of data, does not.

    Args:
        leaf: A tensor of any shape that requires a gradient.
    """
    node = torch.autograd.graph.get_gradient_edge(leaf).node
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # ``autograd.grad`` in this leaf
        return True


def is_watched() -> bool:
    """Return whether autograd, :mod:`torch.func` or a tracer may need intermediate results.

    Where none does, they may be overwritten in place.
    """
    return torch.is_grad_enabled() or is_transformed()


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Let this thread draw from generators of its own, whoever draws: torch, Pyro, a loader.

    The numbers are those that the global generators would give after ``manual_seed``; those of
    the process are left alone, and other threads too.

    Args:
        seed: The seed; None leaves everything as it is.

    Raises:
        ValueError: If it is not a whole number that generators take.
    """
    if seed is None:
        yield
        return
    number: Any = seed
    if getattr(number, "ndim", None) == 0:  # torch's and numpy's
        number = number.item()
    if not isinstance(number, int | float) or not -(2**63) <= number < 2**64 or number % 1:
        raise ValueError(f"expected a seed that is whole, from -2^63 to 2^64 - 1, got {seed!r}")
    outer = getattr(_SCOPE, "generators", None)
    with _OwnGenerators(int(number)) as _SCOPE.generators:
        try:
            yield
        finally:
            _SCOPE.generators = outer


@contextlib.contextmanager
def draws_nothing() -> Iterator[None]:
    """Run a block that draws no random numbers, in a seeded scope too, at full speed.

    Looking at each operation costs some microseconds.
    """
    left: list[_OwnGenerators] = []  # this scope, and those around it
    try:
        while isinstance(own := _get_current_dispatch_mode(), _OwnGenerators):
            own.__exit__(None, None, None)
            left.append(own)
        yield
    finally:
        for own in reversed(left):
            own.__enter__()


@contextlib.contextmanager
def watching_the_first() -> Iterator[Callable[[Callable[_P, _R]], Callable[_P, _R]]]:
    """Run functions that all draw random numbers, or none does, in a seeded scope at full speed.

    The first call is looked at; where it draws nothing, the block goes on without.

    Yields:
        What makes such functions of others.
    """
    with contextlib.ExitStack() as rest:
        is_first = isinstance(_get_current_dispatch_mode(), _OwnGenerators)

        def watched(function: Callable[_P, _R]) -> Callable[_P, _R]:
            @wraps(function)
            def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
                nonlocal is_first
                if not is_first:
                    return function(*args, **kwargs)
                before, is_first = draws(), False
                found = function(*args, **kwargs)
                if draws() == before:
                    rest.enter_context(draws_nothing())
                return found

            return call

        yield watched if is_first else lambda function: function


def draws() -> int:
    """Return how many operations have drawn in this seeded scope; 0 outside."""
    own = getattr(_SCOPE, "generators", None)
    return 0 if own is None else own.draws


def rng_state(device: torch.device | None = None) -> Tensor:
    """Return the state from which this thread draws on the CPU and on a device, ``(S,)``.

    Args:
        device: The device; where it is None or the CPU, the state is that of one generator.
    """
    return torch.cat([generator.get_state() for generator in _generators(device)])


def set_rng_state(state: Tensor, device: torch.device) -> None:
    """Set that state, shape ``(S,)``; one that was taken on the CPU alone sets that alone.

    Args:
        state: The state.
        device: The device, which need not be the one on which the state was taken.
    """
    for generator in _generators(device):
        size = len(generator.get_state())
        if len(state) >= size:
            generator.set_state(state[:size].clone())  # torch reads from where storage begins
        state = state[size:]


def _generators(device: torch.device | None) -> list[torch.Generator]:
    """Return those from which this thread draws on the CPU and, if it is another, on a device."""
    own = getattr(_SCOPE, "generators", None)
    devices = dict.fromkeys((torch.device("cpu"), device or torch.device("cpu")))
    return [_default(d) if own is None else own.on(d) for d in devices]


def _default(device: torch.device) -> torch.Generator:
    """Return the global generator of the CPU or of a GPU, given with its index."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator


_SCOPE = threading.local()
_BORROWING = threading.Lock()


class NumbersComputed(TorchDispatchMode):
    """Count the numbers that the operations of a scope give, those of derivatives too.

    Attributes:
        count: How many so far.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count the numbers of its tensors."""
        found = func(*args, **(kwargs or {}))
        tensors = (each for each in tree_leaves(found) if isinstance(each, Tensor))
        self.count += sum(each.numel() for each in tensors)
        return found


class _OwnGenerators(TorchDispatchMode):
    """Supply whatever draws random numbers in this thread with generators, one a device.

    Args:
        seed: The seed of each.

    Attributes:
        draws: How many operations have drawn.
    """

    supports_higher_order_operators = True

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed, self.draws, self.process = seed, 0, os.getpid()
        self.generators: dict[torch.device, torch.Generator] = {}

    def on(self, device: torch.device) -> torch.Generator:
        """Return the generator of a device."""
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(int(self.seed))
        return self.generators[device]

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Call an operation, with a generator if it draws."""
        kwargs = kwargs or {}
        drawing = _drawing_form(func)
        # A worker of a DataLoader inherits this scope: all would draw the same, as this one does.
        # Its default generator is seeded by its number and a draw from here.
        if drawing is None or self.process != os.getpid():
            return func(*args, **kwargs)
        operation, place = drawing
        named = kwargs.get("generator")
        given = args[place] if place is not None and place < len(args) else named
        tensor = next((a for a in args if isinstance(a, Tensor)), None)
        device = kwargs.get("device") if tensor is None else tensor.device
        device = torch.device("cpu") if device is None else torch.device(device)
        if given is not None or device.type == "meta":
            return func(*args, **kwargs)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        if operation is None:
            return self._by_the_default(device, partial(func, *args, **kwargs))
        self.draws += 1
        return operation(*args[:place], **{**kwargs, "generator": self.on(device)})

    def _by_the_default(self, device: torch.device, operation: Callable[[], _R]) -> _R:
        """Call an operation that takes no generator, the default one being in the own's state.

        It is held for as long as that takes, which other threads that draw may notice. Attention
        without dropout, which is of this kind, leaves it as it is: it has drawn nothing.
        """
        default, own = _default(device), self.on(device)
        with _BORROWING:
            before, start = default.get_state(), own.get_state()
            default.set_state(start)
            try:
                with draws_nothing():  # from scopes around this one, which would wait for it
                    return operation()
            finally:
                end = default.get_state()
                self.draws += not torch.equal(start, end)
                own.set_state(end)
                default.set_state(before)


@cache
def _drawing_form(operation: Callable) -> tuple[Callable | None, int | None] | None:
    """Return how to give an operation a generator, or None if it draws nothing.

    Returns:
        Its form with an argument ``generator``, or None where there is no such form; and the place
        of that argument, if it may come by position.
    """
    if not isinstance(operation, OpOverload):  # of higher order: what it calls comes by itself
        return None
    names = [a.name for a in operation._schema.arguments]
    if "generator" not in names:
        if torch.Tag.nondeterministic_seeded not in operation.tags:
            return None
        packet = operation.overloadpacket
        forms = [getattr(packet, name) for name in packet.overloads()]
        wanted = {*names, "generator"}
        for form in forms:
            if {a.name for a in form._schema.arguments} == wanted:
                return form, None
        return None, None
    place = names.index("generator")
    by_keyword = operation._schema.arguments[place].kwarg_only
    return operation, None if by_keyword else place


@contextlib.contextmanager
def with_gradients() -> Iterator[None]:
    """Record gradients, whatever the caller has switched off: no_grad, or inference mode."""
    with torch.inference_mode(mode=False), torch.enable_grad():
        yield


def recomputed(function: Callable[..., _R]) -> Callable[..., _R]:
    """Return the same function, which stores only its arguments for the backward pass.

    Gradients of any order are those of plain back-propagation, with respect to the arguments and
    to whatever the function closes over. Inside :mod:`torch.func`, which has no hooks on saved
    tensors, and while tracing, the function is called as it is.
    """

    def call(*args: Tensor) -> _R:
        if is_functional() or not torch.is_grad_enabled() or torch._C._get_tracing_state():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False)

    return call


def constant(values: np.ndarray) -> Tensor:
    """Return numbers as a tensor of their own, on the CPU and of the array's type and shape.

    What is computed once and shared is kept as numpy arrays. A tensor made inside
    :mod:`torch.func`, ``torch.export``, inference mode or ``torch.device("meta")`` belongs there,
    and would break, or be broken by, whoever meets it outside.
    """
    return torch.from_numpy(values.copy())  # wherever the default device is


def is_for_numpy(x: Tensor) -> bool:
    """Return whether numpy can compute with the numbers of x, of any shape, as torch would."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and not torch.is_autocast_enabled("cpu")
    )


def is_tracing() -> bool:
    """Return whether a tracer records what is computed now: for ``torch.jit`` or a compiler."""
    return torch._C._get_tracing_state() is not None or is_compiling()


def current_trace() -> object:
    """Return what ``torch.jit`` records in now, one object a trace, or None outside of a trace."""
    return torch._C._get_tracing_state()


def is_compiling() -> bool:
    """Return whether tensors may be without values: for ``torch.compile`` or ``torch.export``."""
    kinds = torch._C._TorchDispatchModeKey
    return torch.compiler.is_compiling() or any(
        torch._C._get_dispatch_mode(kind) is not None for kind in (kinds.FAKE, kinds.PROXY)
    )


def is_abstract() -> bool:
    """Return whether no values can be read here, to decide what is computed.

    So it is in :mod:`torch.func` and for tracers; where ``torch.compile`` meets a decision, it
    stops and lets it be taken.
    """
    return not torch.compiler.is_dynamo_compiling() and (is_functional() or is_tracing())


def is_functorch_tensor(x: Tensor) -> bool:
    """Return whether a tensor, of any shape, lives inside ``torch.func.grad``, ``vmap``, ..."""
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def has_tangent(x: Tensor) -> bool:
    """Return whether a tensor, of any shape, has a tangent of :mod:`torch.autograd.forward_ad`."""
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def is_batch_of_gradients(g: Tensor) -> bool:
    """Return whether a cotangent, of any shape, stands for many that are pulled back at once."""
    return is_functional() or torch._C._functorch.is_legacy_batchedtensor(g)


def has_other_leaves(y: Tensor, x: Tensor) -> bool:
    """Return whether the graph of y leads to a leaf that requires a gradient, other than x."""
    seen, stack = set(), [y.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if getattr(node, "variable", x) is not x:
            return True
        stack.extend(above for above, _ in node.next_functions)
    return False


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """Return the shape that shapes broadcast to.

    That of :func:`torch.broadcast_shapes`, whose first call imports sympy, a third of a second.
    """
    point = torch.empty(())
    return torch.broadcast_tensors(*(point.expand(tuple(shape)) for shape in shapes))[0].shape


def innermost(x: Tensor) -> Tensor:
    """Return the plain tensor inside all wrappers of ``torch.func.grad``, ``vmap``, ..."""
    while is_functorch_tensor(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


_FORWARD_MODE = threading.RLock()


def forward_mode() -> contextlib.AbstractContextManager[object]:
    """Return a scope for forward mode, in which torch lets one thread of a process be at a time.

    Its level is global: a thread that enters while another is there fails as if it were nested.
    """
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    _load_forward_mode()
    return _FORWARD_MODE


@cache
def _load_forward_mode() -> None:
    """Import what the first derivative would, which warns of a deprecated part of torch itself."""
    with _FORWARD_MODE, warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".torch\.jit\.\w+. is ")
        forward_ad._maybe_load_decompositions()


def jvp(
    function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Any, ...]:
    """Return values and derivatives along tangents, as :func:`torch.func.jvp`, in any thread."""
    with forward_mode():
        return torch.func.jvp(function, primals, tangents)


def slopes(function: Callable[[Tensor], tuple[Tensor, ...]], t: Tensor) -> tuple[Tensor, ...]:
    """Return the derivatives of functions of t by forward mode; of one without t, zeros like t."""
    if torch.is_inference_mode_enabled():  # which drops tangents silently
        with torch.inference_mode(mode=False):
            return slopes(function, t.clone())
    tangent = torch.ones_like(t)
    with forward_mode():
        if is_functional() or forward_ad._current_level >= 0:
            return jvp(function, (t,), (tangent,))[1]
        with forward_ad.dual_level():  # the same at a third of the price; it cannot be nested
            found = map(forward_ad.unpack_dual, function(forward_ad.make_dual(t, tangent)))
            return tuple(torch.zeros_like(t) if s.tangent is None else s.tangent for s in found)


def robust_deviation(x: Tensor) -> Tensor:
    """Return how much columns of rows, ``(N, D)``, vary, but for 5% on each side: shape ``(D,)``.

    It is the standard deviation of a normal column, and few far rows do not change it; the plain
    one where 90% of a column are one value, and 1 where all of it is.
    """
    ordered, last = x.sort(0).values, len(x) - 1
    spread = (ordered[round(0.95 * last)] - ordered[round(0.05 * last)]) / _MIDDLE_RANGE
    spread = spread.where(spread > 0, x.std(0, correction=0))
    return spread.where(spread > 0, 1.0)


def warn_user(message: str) -> None:
    """Warn at the line outside the package, and outside torch's decorators, that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
