r"""Normalisation and attention from elementary operations, which have derivatives of any order."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Elementary(TorchFunctionMode):
    """Compute normalisation and attention from elementary operations.

    Inside ``torch.func``, torch's own kernels of layer and instance normalisation have wrong
    derivatives of higher order, that of group normalisation takes no tangents of other strides,
    and that of attention on the CPU has no forward mode.
    """

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Replace a function that has an elementary form; call any other as it is."""
        return _ELEMENTARY.get(func, func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: object = None,
) -> Tensor:
    """Return the same as ``torch.layer_norm``, of the shape of the input."""
    x = _standardized(input, tuple(range(-len(normalized_shape), 0)), eps)
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: object = None,
) -> Tensor:
    """Return the same as ``torch.group_norm``, of the shape ``(N, C, *)`` of the input."""
    groups = input.reshape(input.shape[0], num_groups, -1)
    return _affine(_standardized(groups, (-1,), eps).reshape(input.shape), weight, bias)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,  # noqa: FBT001, FBT002
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Return the same as ``nn.functional.instance_norm``, of the shape ``(N, C, *)`` of the input.

    Running statistics are not moved: a density that is asked for leaves the network as it is.
    """
    if not use_input_stats:
        return nn.functional.instance_norm(
            input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
        )
    return _affine(_standardized(input, tuple(range(2, input.dim())), eps), weight, bias)


def _torch_instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,  # noqa: FBT001
    momentum: float,
    eps: float,
    cudnn_enabled: object,
) -> Tensor:
    """Return the same as ``torch.instance_norm``, whose arguments have another order."""
    return _instance_norm(
        input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps
    )


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return x, ``(N, C, *)``, scaled and shifted by a weight and a bias, ``(C,)``, if any."""
    each = (-1,) + (1,) * (x.dim() - 2)
    x = x if weight is None else x * weight.reshape(each)
    return x if bias is None else x + bias.reshape(each)


def _standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """Return x, of any shape, less its mean over dimensions and over its deviation."""
    centred = x - x.mean(dims, keepdim=True)
    return centred * (centred.square().mean(dims, keepdim=True) + eps).rsqrt()


def _attention(*args: object, **kwargs: object) -> Tensor:
    """Return the same as ``nn.functional.scaled_dot_product_attention``, ``(*, L, E)``."""
    return torch.ops.aten._scaled_dot_product_attention_math(*args, **kwargs)[0]


def _multi_head(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Return what ``nn.functional.multi_head_attention_forward`` does, ``(L, N, E)`` and weights.

    It calls attention itself, where no mode is asked, unless its weights are wanted.
    """
    given = {**kwargs, "need_weights": True}
    output, weights = nn.functional.multi_head_attention_forward(*args, **given)
    return output, weights if kwargs.get("need_weights", True) else None


_ELEMENTARY: dict[Callable, Callable] = {
    nn.functional.layer_norm: _layer_norm,
    nn.functional.group_norm: _group_norm,
    nn.functional.instance_norm: _instance_norm,
    torch.layer_norm: _layer_norm,
    torch.group_norm: _group_norm,
    torch.instance_norm: _torch_instance_norm,
    nn.functional.scaled_dot_product_attention: _attention,
    nn.functional.multi_head_attention_forward: _multi_head,
}
