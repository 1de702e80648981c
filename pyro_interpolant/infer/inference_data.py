"""Draws of flows, guides and importance samplers as ArviZ' data (extra ``[arviz]``)."""

from typing import TYPE_CHECKING, Any

import torch
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor

from .._package import check_ranges, needing, whole
from .._torch import seeded
from ..distributions.interpolant import InterpolantDistribution
from ..distributions.joint import JointInterpolantDistribution
from ..distributions.rows import as_tensor
from .importance_sampling import ImportanceResult, check_is_density, warn_poor
from .sites import LatentSites, one_posterior

if TYPE_CHECKING:
    from arviz import InferenceData

_DRAWS = 4000


def to_arviz(
    source: InterpolantDistribution | AutoContinuous | ImportanceResult,
    *args: object,
    count: int | None = None,
    seed: int | None = None,
    **kwargs: object,
) -> "InferenceData":
    """Return draws as an ``arviz.InferenceData``, for ArviZ' plots and summaries.

    The group ``posterior`` holds one chain of independent draws, a variable for each named site;
    of a flow without names it is ``x``, whose columns are called as those of its data frame. Of
    :func:`~pyro_interpolant.importance` it holds draws resampled by their weights, with k-hat,
    effective sample size, log-evidence and verdict as attributes; the guide's draws themselves
    and their normalised ``log_weight`` are in a group ``proposal``. (``pip install
    'arviz<1'``)

    Args:
        source: A flow, such as a :class:`~pyro_interpolant.JointInterpolantDistribution`; a guide
            over one unconstrained vector; or what :func:`~pyro_interpolant.importance` found, or
            its twin of NumPyro.
        *args: The arguments of the guide's model.
        count: The number of draws; by default 4,000, or of weighted draws as many as there are.
        seed: Makes the draws reproducible; the global generator is then left as it was.
        **kwargs: The named arguments of the guide's model.

    Raises:
        ImportError: If ArviZ, before its version 1, is not installed.
        TypeError: If the source is none of these, or a conditional flow without its context.
        ValueError: If ``count`` is below 1, a flow has a batch, a guide has no density, the
            arguments hold several data sets, or no weight is positive.

    Example:
        >>> from pyro_interpolant import JointInterpolantDistribution
        >>> sites = {"slope": ((), constraints.real), "noise": ((), constraints.positive)}
        >>> joint = JointInterpolantDistribution(interpolant_transform(2), sites=sites)
        >>> dict(to_arviz(joint, count=100).posterior.sizes)
        {'chain': 1, 'draw': 100}
    """
    check_ranges(whole("count", count, 1, or_none=True))
    named, others = {}, {}
    with seeded(seed):
        if getattr(source, "_fields", None) == ImportanceResult._fields:
            source = _of_tensors(source)
        if isinstance(source, ImportanceResult):
            draws = source.resampled(count)
            names = ("k_hat", "ess", "log_evidence", "log_evidence_stderr", "verdict")
            named = {name: getattr(source, name) for name in names}
            others = {**source.draws, "log_weight": source.log_weights}
        elif isinstance(source, AutoContinuous):
            draws = _guide_draws(source, int(count or _DRAWS), *args, **kwargs)
        else:
            draws = _flow_draws(source, int(count or _DRAWS))
    with needing("to_arviz", "arviz>=0.18,<1"):  # slow to import
        from arviz.data import InferenceData, dict_to_dataset, from_dict

    columns = getattr(source, "columns", ())
    given: dict[str, Any] = {}
    if columns:
        given = {"coords": {"column": list(columns)}, "dims": {"x": ["column"]}}
    data: InferenceData = from_dict(posterior=_one_chain(draws), posterior_attrs=named, **given)
    if others:
        data.add_groups(proposal=dict_to_dataset(_one_chain(others)))
    return data


def _of_tensors(found: Any) -> ImportanceResult:
    """Return the result of importance sampling with tensors for arrays, as those of NumPyro."""
    draws = {name: as_tensor(value) for name, value in found.draws.items()}
    return ImportanceResult._make((*found[:5], as_tensor(found.log_weights), draws))


def _one_chain(draws: dict[str, Tensor]) -> dict[str, Any]:
    """Return arrays of draws, ``(1, N, *site_shape)`` each, by name."""
    return {name: value.detach().cpu().numpy()[None] for name, value in draws.items()}


def _flow_draws(source: object, count: int) -> dict[str, Tensor]:
    """Return draws of a flow, shape ``(N, *site_shape)`` each, by name."""
    if not isinstance(source, InterpolantDistribution):
        raise TypeError(
            "expected a flow, a guide over one unconstrained vector or what importance() found, "
            f"got {type(source).__name__}: give a conditional flow its context, "
            "to_arviz(flow.condition(c)), and the model's own posterior draws to arviz.from_dict"
        )
    if source.batch_shape:
        raise ValueError(
            "expected one distribution, of batch shape (), got a batch of shape "
            f"{tuple(source.batch_shape)}: give one context at a time"
        )
    if isinstance(source, JointInterpolantDistribution):
        return source.sample_dict((count,))
    return {"x": source.sample((count,))}


@torch.no_grad()
def _guide_draws(
    guide: AutoContinuous, count: int, *args: object, **kwargs: object
) -> dict[str, Tensor]:
    """Return draws of a guide, shape ``(N, *site_shape)`` each, by name of the latent site."""
    check_is_density(guide)  # a point has one draw
    sites = LatentSites(guide, *args, **kwargs)
    warn_poor(guide)
    posterior = one_posterior(guide, *args, **kwargs)
    return sites.unpack(posterior.sample(torch.Size((count,))))
