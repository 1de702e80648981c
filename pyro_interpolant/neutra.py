r"""NUTS in the base space of a guide, with draws in the model's own sites."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.infer.reparam import NeuTraReparam
from torch import Tensor

from .guides import AutoInterpolant
from .sites import bare_model, unpack_sites
from .solvers import FixedGrid

__all__ = ["Neutra", "neutra"]

_SITE = "_shared_latent"  # how NeuTraReparam names the base draw


class Neutra:
    """A model whose latent sites are sampled together, in the base space of a guide.

    Made by :func:`neutra`; call it as the model.

    Args:
        guide: A trained guide; frozen here.
        model: Its model.
    """

    def __init__(self, guide: AutoInterpolant, model: Callable[..., Any]) -> None:
        self.guide = guide
        self.reparam = NeuTraReparam(guide)
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model in base space; the latent sites are deterministic functions of it."""
        return self.reparam.reparam(self.model)(*args, **kwargs)

    @torch.no_grad()
    def samples(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return draws in the model's sites, each ``(*, *site_shape)``, in one solve.

        Args:
            draws: What ``mcmc.get_samples()`` gives, by chain or not: one site, ``(*, D)``.

        Raises:
            ValueError: If they are not draws of this model in base space.
        """
        names = [name for name in draws if name.endswith(_SITE)]
        dim = self.guide.latent_dim
        if len(names) != 1 or draws[names[0]].shape[-1] != dim:
            got = {name: tuple(value.shape) for name, value in draws.items()}
            raise ValueError(
                f"expected draws of one site '*{_SITE}' of shape (*, {dim}), from MCMC with this "
                f"model, got {got}"
            )
        base = draws[names[0]]
        sites = unpack_sites(self.guide, self.guide.transform(base.reshape(-1, dim)))
        return {k: v.reshape(*base.shape[:-1], *v.shape[1:]) for k, v in sites.items()}


def neutra(guide: AutoInterpolant, model: Callable[..., Any] | None = None) -> Neutra:
    """Return the model in the guide's base space, where a good guide makes it N(0, I) for NUTS.

    The guide is copied and the copy frozen: nothing here trains it, and it can be trained on. The
    copy's gradients are those of ``FixedGrid(..., adjoint=True)`` where it is solved on a grid.

    Args:
        guide: A trained guide.
        model: Its model; by default the one it was made with.

    Returns:
        A model for ``NUTS``, and, by its method ``samples``, draws in the sites of the model.

    Raises:
        TypeError: If the guide is not an :class:`~pyro_interpolant.AutoInterpolant`.
        ValueError: If it has not seen its model yet, or lost it in a pickle.

    References:
        Hoffman et al., arXiv 1903.03704.

    Example:
        >>> from pyro.infer import MCMC, NUTS
        >>> def model():
        ...     pyro.sample("x", dist.Normal(3.0, 1.0))
        >>> guide = AutoInterpolant(model)
        >>> _ = guide()
        >>> base = neutra(guide)
        >>> mcmc = MCMC(NUTS(base), num_samples=5, warmup_steps=5, disable_progbar=True)
        >>> mcmc.run()
        >>> base.samples(mcmc.get_samples())["x"].shape
        torch.Size([5])
    """
    if not isinstance(guide, AutoInterpolant):
        raise TypeError(
            f"expected an AutoInterpolant, got {type(guide).__name__}: use Pyro's NeuTraReparam"
        )
    if guide.prototype_trace is None:
        raise ValueError("expected a guide that has seen its model: train it, or call it once")
    frozen = copy.deepcopy(guide).requires_grad_(requires_grad=False).eval()
    if isinstance(frozen.transform.solver, FixedGrid):
        frozen.transform.solver = dataclasses.replace(frozen.transform.solver, adjoint=True)
    if not hasattr(frozen, "plates"):
        frozen._create_plates()
    return Neutra(frozen, bare_model(guide.model) if model is None else model)
