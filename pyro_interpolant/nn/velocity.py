r"""The protocol of a velocity: what a network :math:`v_t(x \mid c)` must offer, and what it may.

A velocity is any ``nn.Module`` with ``forward(t, x, context=None)``, from times ``(*)``, states
``(*, D)`` and contexts ``(*, C)`` to rates ``(*, D)``, which treats rows independently. All else
is optional, and used where it is there:

- ``event_dim``, ``context_dim``: D and C.
- ``classes``: K, where contexts are labels 0 to K - 1, given as numbers of shape ``(*, 1)``.
- ``null_label``: a label that stands for none of the classes, given to a tenth of training rows.
- ``image_shape``: (C, H, W), where states are images: without gradients, they are then evaluated
  in pieces of ``rows_at_once``.
- ``embed(context)``: what of contexts, ``(*, C)``, depends on neither time nor state, computed
  once per row; it, and not the contexts, is then what the functions here are given.
- ``explained(w, context)``: the part of rows that the network takes from their contexts in closed
  form; the whitening is then that of what it leaves.
- ``is_beyond(context)``: whether contexts, ``(*, C)``, are far beyond all of training, ``(*)``.
- ``broadcasts_time``: True if times may have any shape that broadcasts to ``(*)``, so that their
  embedding is computed once per distinct time.
- ``field(times, context)``: one function ``x -> v`` per time, what they share computed once;
  called with few contexts.
- ``forward_and_divergence(t, x, context)``: the velocity and its exact divergence, ``(*)``.
- ``record(times, x, context)``: a ``Record`` (see ``nn/record.py``) of evaluations at those times,
  of states like x, shape ``(*, D)``, by which gradients of few rows are cheap; or None.
- ``divergence_field(times, context)``: one function ``x -> divergence`` per time.
- ``rows_at_once()``: the number of rows for which one call is fastest, without gradients.
- ``set_scales(w, context)``: called with whitened training rows before training; and
  ``is_untrained()``: where it returns False, scales are kept when training goes on.
- ``untrained_copy()``: a network of the same shape and scales, to learn the latent noise.
- ``time_exponent``: p, where training from N(0, I) takes times :math:`1 - (1 - u)^p`, u uniform
  on [0, 1]; without it 1.
- ``is_periodic``: whether it has period :math:`2\pi` in every coordinate.
- ``has_other_layers()``: whether layers were put in place of its own for which the methods above,
  by which it stands in for its ``forward``, do not hold; without it False.
- ``arguments()``: the arguments of its constructor, for files; only for networks of this package.

No other module looks these up.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .._package import check_ranges, number
from .._torch import is_functional, is_tracing, warn_user
from .record import Record

_KNOWN_LAYERS = (__name__.partition(".")[0] + ".", "torch.nn.modules.")
_ROWS_AT_ONCE = 512  # of networks without a method rows_at_once
# How far off another row is, and what it may change of a row's rate, of the greatest one of the
# two that it is beside: bf16 rounds to 0.4%.
_FAR, _COUPLED = 10.0, 0.02
_SHARED_CONTEXTS = 64  # of rows, up to which what depends on them is kept for all times

StateFunction = Callable[[Tensor], Tensor]
Field = Callable[[Tensor], Sequence[StateFunction]]  # from T times to T functions x -> v


def is_hooked(module: nn.Module) -> bool:
    """Return whether a call of a module is more than the ``forward`` of its class.

    Such are calls with hooks before or after it, by which weights are pruned or normalised too,
    those with hooks of the backward pass, and those of a ``forward`` that was set on the object.
    """
    forward = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def is_product(layer: nn.Module) -> bool:
    """Return whether a layer is the product with its weight, and a call of it nothing else.

    It is not where it adds a bias, or a subclass or wrapper an adapter's product of low rank.
    """
    is_linear = isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
    return is_linear and layer.bias is None and not is_hooked(layer)


def check_velocity(velocity: nn.Module) -> None:
    """Raise an error unless a velocity is a module that treats rows independently.

    Raises:
        TypeError: If it is not a module, or a Pyro module with random weights.
        ValueError: If it couples rows, as batch normalisation does, or times for its training
            would not be in [0, 1].
    """
    if not isinstance(velocity, nn.Module):
        raise TypeError(
            "expected the velocity to be an instance of torch.nn.Module with forward(t, x, "
            f"context=None), got {velocity!r}"
        )
    exponent = time_exponent(velocity)
    check_ranges(number("a finite time_exponent > 0", exponent, lambda n: 0 < n < math.inf))
    for module in velocity.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                f"expected a velocity that treats rows independently, got one with "
                f"{type(module).__name__}: use LayerNorm or GroupNorm"
            )
        if getattr(module, "_pyro_samples", None):
            raise TypeError(
                "expected a velocity with fixed weights, got a PyroModule with PyroSample "
                "weights, which would be drawn anew at every stage of the solver"
            )


@torch.no_grad()
def couples_rows(velocity: nn.Module, x: Tensor, context: Tensor | None) -> bool:
    """Return whether the velocity of a row is another where another row is beside it.

    Densities are then wrong. Torch's attention and recurrent layers, for one, take rows for places
    of a sequence unless they are told ``batch_first=True``.

    Args:
        velocity: The network, in evaluation.
        x: States, shape ``(N, D)``; of fewer than three nothing is told.
        context: Contexts, embedded, shape ``(N, E)``, or None.
    """
    if len(x) < 3:
        return False
    t = torch.linspace(0.25, 0.75, 3).to(x)  # apart, where rows are alike
    x = torch.cat((_FAR * x[:1], x[1:3]))  # the first: a sequence may look back alone
    beside, alone = (
        evaluate(velocity, t[i:], x[i:], None if context is None else context[i:3]) for i in (0, 1)
    )
    return bool((alone - beside[1:]).abs().max() > _COUPLED * alone.abs().max())


def size_of(velocity: nn.Module, name: str) -> int | None:
    """Return a size of a velocity by the name of its attribute, or None where it has none."""
    size = getattr(velocity, name, None)
    return int(size) if isinstance(size, Integral) else None  # of numpy, too


def fixed_weights(network: nn.Module) -> list[str]:
    """Return the names of the weights frozen beside others that are not: no training moves them.

    A network may be frozen as a whole, as a trained one is; all its weights can be trained on.
    """
    weights = dict(network.named_parameters())
    fixed = [name for name, p in weights.items() if not p.requires_grad]
    return fixed if len(fixed) < len(weights) else []


def checked_labels(labels: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Return labels as contexts, shape ``(*, 1)``, of whole numbers from 0 to ``classes - 1``.

    Args:
        labels: Whole numbers or booleans, shape ``(*)``; or of a floating type, shape ``(*, 1)``.
        classes: K, their number.
        dtype: The type of the result.

    Raises:
        ValueError: If they are of another shape, one is none of the classes, or the type has not
            so many whole numbers.
    """
    if classes - 1 > 2 / torch.finfo(dtype).eps:
        raise ValueError(f"expected a type that has {classes} whole numbers, got {dtype}")
    if labels.is_complex():
        raise ValueError(f"expected labels as whole numbers, got {labels.dtype}")
    if not labels.is_floating_point():
        labels = labels.long()[..., None]
    if labels.dim() < 1 or labels.shape[-1] != 1:
        raise ValueError(
            f"expected labels of {classes} classes as whole numbers of shape (*), or as numbers "
            f"of shape (*, 1), got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if not (is_tracing() or is_functional()):
        is_known = (labels >= 0) & (labels < classes) & (labels == labels.floor())
        if not bool(is_known.all()):
            raise ValueError(
                f"expected labels from 0 to {classes - 1}, got {labels[~is_known][0].item():g}"
            )
    return labels.to(dtype)


def evaluate(velocity: nn.Module, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Evaluate a velocity; times and contexts are expanded to all rows unless it broadcasts.

    Args:
        velocity: A module with ``forward(t, x)`` or ``forward(t, x, context)``.
        t: Times, broadcastable to ``(*)``.
        x: States, shape ``(*, D)``.
        context: Contexts, broadcastable to ``(*, C)``, or None.

    Returns:
        The velocity, shape ``(*, D)``.
    """
    at_once = images_at_once(velocity)
    if at_once is not None and _is_divisible(x, at_once):
        return _in_pieces(velocity, t, x, context, at_once)
    inputs = inputs_of(velocity, t, x, context)
    return velocity(inputs[0], x, *inputs[1:])


def _is_divisible(x: Tensor, at_once: int) -> bool:
    """Return whether states, ``(*, D)``, more than go at once, may be evaluated in pieces.

    Not where a graph is recorded.
    """
    is_plain = not (torch.is_grad_enabled() or is_tracing() or is_functional())
    return is_plain and math.prod(x.shape[:-1]) > at_once  # a tuple of some subclasses


def _in_pieces(
    velocity: nn.Module, t: Tensor, x: Tensor, context: Tensor | None, at_once: int
) -> Tensor:
    """Return what :func:`evaluate` does, ``(*, D)``, by calls with so many rows each."""
    t, *rest = expanded(t, x, context)
    contexts = [c.reshape(-1, c.shape[-1]).split(at_once) for c in rest]
    rows = x.reshape(-1, x.shape[-1]).split(at_once)
    parts = zip(t.reshape(-1).split(at_once), rows, *contexts, strict=True)
    return torch.cat([velocity(*part) for part in parts]).reshape(x.shape)


def inputs_of(
    velocity: nn.Module, t: Tensor, x: Tensor, context: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the time and the context, if any, as a velocity takes them beside x, ``(*, D)``."""
    if getattr(velocity, "broadcasts_time", False):
        return t, context
    return expanded(t, x, context)


def expanded(t: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """Return the time, and the context if there is one, of the full batch shape of x."""
    t = t.expand(x.shape[:-1])
    if context is None:
        return (t,)
    return t, context.expand(x.shape[:-1] + context.shape[-1:])


def field(velocity: nn.Module, times: Tensor, context: Tensor | None) -> Sequence[StateFunction]:
    """Return one function ``x -> v`` per time of ``times``, shape ``(T,)``."""
    own = own_method(velocity, "field", "forward")
    if own is not None and _is_shared(context):
        return own(times, context)
    return [partial(evaluate, velocity, t, context=context) for t in times.unbind()]


def record(velocity: nn.Module, times: Tensor, x: Tensor, context: Tensor | None) -> Record | None:
    """Return a velocity's record of evaluations, or None where it has none.

    Args:
        velocity: A module with ``forward(t, x, context)``.
        times: Times, shape ``(T,)``.
        x: States, shape ``(*, D)``; those of the evaluations are like them.
        context: Contexts, broadcastable to ``(*, C)``, or None.
    """
    own = own_method(velocity, "record", "forward")
    is_plain = type(x) in (Tensor, nn.Parameter)  # no subclass with operations of its own
    return own(times, x, context) if own is not None and is_plain else None


def exact_divergence(velocity: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """Return a velocity's own ``forward_and_divergence``, or None."""
    name = "forward_and_divergence"
    is_outdated = hasattr(type(velocity), name) and own_method(velocity, name, "forward") is None
    return None if is_outdated else getattr(velocity, name, None)


def divergence_field(
    velocity: nn.Module, times: Tensor, context: Tensor | None
) -> Sequence[StateFunction] | None:
    """Return one function ``x -> divergence`` per time, or None where a velocity has none."""
    if exact_divergence(velocity) is None:
        return None
    own = own_method(velocity, "divergence_field", "forward_and_divergence")
    return own(times, context) if own is not None and _is_shared(context) else None


def rows_at_once(velocity: nn.Module) -> int:
    """Return the number of rows for which one call is fastest, without gradients."""
    own = getattr(velocity, "rows_at_once", None)
    return _ROWS_AT_ONCE if own is None else own()


def keeps_nothing(velocity: nn.Module) -> bool:
    """Return whether a network is known to keep nothing of a call, and to draw nothing.

    The layers of the package and of torch do not in evaluation; those of one's own may.
    """
    return all(
        type(module).__module__.startswith(_KNOWN_LAYERS)
        and not (module.training or is_hooked(module))
        for module in velocity.modules()
    )


def time_exponent(velocity: nn.Module) -> float:
    r"""Return the exponent p of the times :math:`1 - (1 - u)^p` that a velocity is trained at."""
    return getattr(velocity, "time_exponent", 1.0)


def image_shape(velocity: nn.Module) -> tuple[int, ...] | None:
    """Return the shape of the images that states are, ``(C, H, W)``, or None."""
    return getattr(velocity, "image_shape", None)


def images_at_once(velocity: nn.Module) -> int | None:
    """Return the number of images of which the network's layers fit memory; None of others."""
    return None if image_shape(velocity) is None else rows_at_once(velocity)


def has_embedding(velocity: nn.Module) -> bool:
    """Return whether a velocity takes contexts embedded."""
    return getattr(velocity, "embed", None) is not None


def embedded(velocity: nn.Module, context: Tensor | None) -> Tensor | None:
    """Return contexts, shape ``(*, C)``, as the network takes them, ``(*, E)``; None of none."""
    own = getattr(velocity, "embed", None)
    return context if own is None or context is None else own(context)


def explained(velocity: nn.Module, w: Tensor, context: Tensor | None) -> Tensor | None:
    """Return the part of rows taken from their contexts in closed form, or None where none is.

    Args:
        velocity: The network.
        w: Rows, shape ``(N, D)``.
        context: Their contexts, shape ``(N, C)``, or None.
    """
    own = getattr(velocity, "explained", None)
    return None if own is None or context is None else own(w, context)


def is_beyond(velocity: nn.Module, context: Tensor) -> Tensor | None:
    """Return whether contexts are far beyond those of training, or None where it cannot tell.

    Args:
        velocity: The network.
        context: Contexts, shape ``(*, C)``.
    """
    own = getattr(velocity, "is_beyond", None)
    return None if own is None else own(context)


def set_scales(
    velocity: nn.Module, w: Tensor, context: Tensor | None, *, if_trained: bool = True
) -> None:
    """Set the scales of a velocity, if it has any, from whitened rows and their contexts.

    Args:
        velocity: The network.
        w: Whitened rows, shape ``(N, D)``.
        context: Their contexts, shape ``(N, C)``, or None.
        if_trained: Whether to set those of a network that is trained already.
    """
    own = getattr(velocity, "set_scales", None)
    if own is not None and (if_trained or is_untrained(velocity)):
        own(w, context)


def is_untrained(velocity: nn.Module) -> bool:
    """Return whether a velocity says that it has learned nothing yet."""
    own = getattr(velocity, "is_untrained", None)
    return own is not None and own()


def location_and_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations, 1 of columns that do not vary, float64, ``(C,)`` each.

    Args:
        x: Rows, shape ``(N, C)``.
    """
    x = x.double()
    scale = x.std(0, correction=0)
    # The mean of equal numbers is off by its rounding, and so is their deviation from it.
    varies = (x != x[0]).any(0) & (scale > 0)
    return x.mean(0), torch.where(varies, scale, 1.0)


def may_be_periodic(velocity: nn.Module) -> bool:
    r"""Return False only where a velocity states that :math:`2\pi` is no period of it."""
    return getattr(velocity, "is_periodic", True)


def _is_shared(context: Tensor | None) -> bool:
    """Return whether rows share few contexts: a table of every row and time would be large."""
    return context is None or context[..., 0].numel() <= _SHARED_CONTEXTS


def own_method(module: nn.Module, name: str, *stands_for: str) -> Callable[..., Any] | None:
    """Return an optional method of a module, or None where there is none, or it is out of date.

    It is out of date where a subclass overrides a method that it stands for, but not itself,
    where a call of the module or of a part of it is more than its ``forward``, and where layers
    were put in place of its own.

    Args:
        module: A velocity, or an embedding.
        name: The method.
        *stands_for: The methods of which it gives the results in another way.
    """
    has, *replaced = (
        next((c for c in type(module).__mro__ if n in vars(c)), None) for n in (name, *stands_for)
    )
    if has is None or any(r is not None and not issubclass(has, r) for r in replaced):
        return None
    if any(is_hooked(part) or _has_other_layers(part) for part in module.modules()):
        return None
    return getattr(module, name)


def _has_other_layers(module: nn.Module) -> bool:
    own = getattr(module, "has_other_layers", None)
    return own is not None and own()


def copied(network: nn.Module) -> nn.Module:
    """Return a copy of a network, or with a warning itself where there can be none.

    Copies are not compiled where it is by ``compile()``: they are here, with default options.

    Raises:
        TypeError: If it is not a module, but a class of modules for one.
        ValueError: If it cannot be a velocity.
    """
    check_velocity(network)
    try:
        new = copy.deepcopy(network)
    except (RuntimeError, TypeError) as error:  # of a tensor that was computed, a lock
        warn_user(
            f"the network cannot be copied ({error}), so it is trained itself: another call "
            "with it changes what this one gives"
        )
        return network
    for module, other in zip(network.modules(), new.modules(), strict=True):
        if module._compiled_call_impl is not None:
            other.compile()
    return new
