r"""A distribution learned from samples in one call."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributions import constraints

from .data import checked_rows
from .distributions import InterpolantDistribution
from .joint import JointInterpolantDistribution, pack, sites_of
from .monitors import NonFiniteError
from .preparation import choose_support, present
from .scopes import seeded
from .shapes import shaped
from .streams import first_rows, is_stream
from .supports import Constraint, bijection, is_circular
from .torus import Geodesic, TorusMLP
from .training import fit
from .transforms import InterpolantTransform, interpolant_transform

__all__ = ["from_samples"]


def from_samples(
    x: Any,
    *,
    support: Constraint | Mapping[str, Constraint] = constraints.real_vector,
    event_shape: Sequence[int] | None = None,
    marginals: bool | None = None,
    seed: int | None = None,
    **fit_options: Any,
) -> InterpolantDistribution:
    """Learn a distribution from samples: build a flow, train it, calibrate it, freeze it.

    Args:
        x: Rows of shape ``(N, *event_shape)``; or named draws, a dictionary of tensors of shape
            ``(N, *site_shape)`` such as ``mcmc.get_samples()``: the result is then a
            :class:`~pyro_interpolant.JointInterpolantDistribution`; or an iterable of batches.
        support: Where the samples live; for named draws, a dictionary that names the supports of
            the sites that are not real.
        event_shape: The shape of a row, where it has more than one dimension.
        marginals: Whether each unconstrained column is first made normal by a monotone spline, so
            that the flow learns only how they depend on each other: the remedy for slabs, spikes
            and long tails in single columns. By default where eight Gaussians fit held-out rows
            better behind the splines, by 0.05 nats and more than chance, in up to 64 dimensions
            of at least 90 rows each. By default only, and where the same rule finds that to gain
            more, the lengths of whitened rows are brought half-way to normal ones instead: the
            remedy for one scale that is common to all columns. Neither for an iterable, for
            angles, or beside ``base_samples`` or ``pairs``. Paths and SDEs then live behind the
            map. True asks for 400 rows at least.
        seed: As in :func:`fit`; also of the initial weights.
        **fit_options: Passed to :func:`fit`.

    Returns:
        A trained distribution in the type of the samples, with frozen weights: no inference trains
        it by accident. ``distribution.transform.requires_grad_(True)`` unfreezes it.

    Raises:
        TypeError: If the samples are not of a floating type.
        ValueError: If the samples or the support cannot work.
        RuntimeError: If gradients stay non-finite; its ``distribution`` has the last good weights.

    Example:
        >>> x = torch.randn(2000, 2).exp()
        >>> prior = from_samples(x, support=constraints.positive, steps=50, progress=False)
        >>> bool((prior.sample((5,)) > 0).all())
        True
    """
    few = x
    if is_stream(x):
        with seeded(seed):
            few = first_rows(x)
    weights = fit_options.get("weights")
    if weights is not None and few is x:
        few, pairs, weights = present(weights, x, fit_options.get("pairs"))
        x, fit_options = few, {**fit_options, "weights": weights, "pairs": pairs}
    if isinstance(x, Mapping):
        if event_shape is not None:
            raise TypeError("expected no event_shape beside named draws, which have their own")
        sites = sites_of(x, {} if support is constraints.real_vector else support)
        rows = pack(sites, x)
        dim = rows.shape[-1]
    elif isinstance(support, Mapping):
        raise TypeError("expected one support for one tensor of samples, got a dictionary")
    elif is_circular(support):
        rows = checked_rows(few, "x")
        dim = rows.shape[-1]
    else:
        support = shaped(support, event_shape)
        event_dim = max(1, bijection(support).codomain.event_dim)
        rows = checked_rows(few, "x", event_shape or (None,) * event_dim)
        dim = bijection(support).inverse_shape(rows.shape[1:])[-1]
    with seeded(seed, rows.device):
        if not isinstance(support, Mapping) and is_circular(support):
            transform = InterpolantTransform(TorusMLP(dim), interpolant=Geodesic()).to(rows)
        else:
            transform = interpolant_transform(dim).to(rows)
    event: Constraint = constraints.real_vector if isinstance(support, Mapping) else support
    event = choose_support(rows if few is x else None, event, fit_options, marginals)
    distribution: InterpolantDistribution
    if isinstance(x, Mapping):
        distribution = JointInterpolantDistribution(transform, sites=sites, support=event)
    else:
        distribution = InterpolantDistribution(transform, support=event)
    try:
        fit(distribution, rows if few is x else x, seed=seed, **fit_options)
    except NonFiniteError as error:
        error.distribution = distribution.freeze()
        raise
    return distribution.freeze()
