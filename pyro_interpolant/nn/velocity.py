r"""The divergence :math:`\nabla\cdot v_t(x)` of a velocity, exact or by fixed random probes.

A velocity is any ``nn.Module`` with ``forward(t, x, context=None)``. One that offers
``forward_and_divergence(t, x, context=None)`` is asked for its own exact divergence; any other
goes through forward-mode differentiation, which survives ``grad``, Hessians, ``vmap`` and tracing.
"""

from torch import Tensor, nn

__all__ = ["check_velocity", "evaluate", "expanded"]


def evaluate(velocity: nn.Module, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
    """Evaluate any velocity, giving it times and contexts of the full batch shape.

    Args:
        velocity: A module with ``forward(t, x)`` or ``forward(t, x, context)``.
        t: Times, broadcastable to ``(*)``.
        x: States, shape ``(*, D)``.
        context: Contexts, broadcastable to ``(*, C)``, or None.

    Returns:
        The velocity, shape ``(*, D)``.
    """
    t, *rest = expanded(t, x, context)
    return velocity(t, x, *rest)


def expanded(t: Tensor, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """Return the time, and the context if there is one, of the full batch shape of x."""
    t = t.expand(x.shape[:-1])
    if context is None:
        return (t,)
    return t, context.expand(x.shape[:-1] + context.shape[-1:])


def check_velocity(velocity: nn.Module) -> None:
    """Raise an error unless a velocity is a module that treats rows independently."""
    if not isinstance(velocity, nn.Module):
        raise TypeError(
            "expected the velocity to be a torch.nn.Module with forward(t, x, context=None), got "
            f"{type(velocity).__name__}"
        )
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
