r"""``from_samples``: a flow built for the data, then trained by ``fit``.

What the data are decides what is built: an event of their shape on their support, named sites, a
conditional flow where there are contexts, a Gaussianizing map where one pays, a U-Net for images.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.distributions import constraints

from .._package import check_ranges, check_sizes, flag
from .._torch import seeded, warn_user, with_gradients
from ..distributions.constraints import Constraint, shaped
from ..distributions.flow import AnyTransform
from ..distributions.interpolant import (
    AnyDistribution,
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
)
from ..distributions.joint import (
    ConditionalJointInterpolantDistribution,
    JointInterpolantDistribution,
    pack,
    sites_of,
)
from ..distributions.rounding import warn_if_rounded
from ..distributions.rows import (
    FLOATED,
    as_tensor,
    check_same_order,
    checked_context,
    checked_rows,
    names_of,
    rows_held,
    subsample,
)
from ..distributions.supports import CircularSupport, Support, support_of
from ..interpolants.couplings import optimal_transport
from ..interpolants.linear import Interpolant, Linear
from ..nn.unet import UNet
from ..nn.velocity import copied, size_of
from ..solvers.divergence import HutchinsonDivergence
from ..solvers.parallel import one_thread_each
from ..transforms.gaussianize import Gaussianized, RadialTransform
from ..transforms.interpolant import ConditionalInterpolantTransform, InterpolantTransform
from ..transforms.whitening import ScalarWhitening
from .data import (
    DEFAULT_SHARE,
    DataLike,
    as_held_out,
    checked_mask,
    mask_of,
)
from .fitting import check_options, fit
from .image_rows import IMAGE_OPTIONS, are_images, are_levels
from .names import Names
from .objective import Coupling
from .optimization import NonFiniteError
from .preprocessing import KNOT_ROWS, preferred_support
from .repeats import random_order
from .reporting import stage, tell
from .rows import Rows, drop_zero_weights
from .streaming import first_rows, is_stream
from .whitening import whitening_map


@one_thread_each()
@with_gradients()
def from_samples(
    x: DataLike,
    *,
    context: ArrayLike | None = None,
    support: Constraint | Mapping[str, Constraint] = constraints.real_vector,
    event_shape: Sequence[int] | None = None,
    network: nn.Module | None = None,
    marginals: bool | None = None,
    seed: int | None = None,
    **fit_options: Any,
) -> AnyDistribution:
    """Learn a distribution from samples: build a flow, train it, calibrate it, freeze it.

    Args:
        x: Rows of shape ``(N, *event_shape)``, a tensor, an array or a data frame of numbers; N
            scalars, shape ``(N,)``, which have event shape ``()``; or named draws, a dictionary
            of tensors of shape ``(N, *site_shape)`` such as ``mcmc.get_samples()``: the result is
            then a :class:`~pyro_interpolant.JointInterpolantDistribution`; or an iterable of
            batches. Images, shape ``(N, C, H, W)``: see below.
        context: What x is given, shape ``(N, C)``: the result is then conditional,
            ``result.condition(context)``. Whole numbers, shape ``(N,)``, are labels of classes 0,
            1, ...: ``result.condition(labels)``. A network of your own without ``classes`` sees
            them one-hot, and so must what you condition on. Where the network has ``classes``,
            an iterable gives ``(rows, labels)`` instead.
        support: Where the samples live; for named draws, a dictionary that names the supports of
            the sites that are not real.
        event_shape: The shape of a row, where it has more than one dimension.
        network: The velocity, a module with ``forward(t, x, context=None)``, of which a copy is
            trained; by default a :class:`~pyro_interpolant.VelocityMLP`, for angles a
            :class:`~pyro_interpolant.TorusMLP`, for images a :class:`~pyro_interpolant.nn.UNet`.
        marginals: Whether each unconstrained column is first made normal by a monotone spline, so
            that the flow learns only how they depend on each other: the remedy for slabs, spikes
            and long tails in single columns. By default where eight Gaussians fit held-out rows
            better behind the splines, by 0.05 nats and more than chance, in up to 64 dimensions
            of about 100 rows each. By default only, and where the same rule finds that to gain
            more, the lengths of whitened rows are brought half-way to normal ones instead: the
            remedy for one scale that is common to all columns. Neither for an iterable, for
            angles, or beside ``base_samples`` or ``pairs``. Paths and SDEs then live behind the
            map. True asks for 400 rows at least besides those held out, which set no map.
        seed: As in :func:`fit`; also of the initial weights. Behind a map, rows are held out as if
            it were 0 where none is given.
        **fit_options: Passed to :func:`fit`. Beside ``coupling=optimal_transport`` the path is
            :class:`~pyro_interpolant.Linear`, else :class:`~pyro_interpolant.Trigonometric`.

    Images are events of three dimensions, of any number of rows. Those of ``uint8`` are kept as
    they are and spread over their levels anew in each batch: values are :math:`(v + u) / 256`, u
    uniform on [0, 1). They have one scale, so that an image stays an image; log-densities are
    estimated by :class:`~pyro_interpolant.HutchinsonDivergence`; at the end the solver is
    calibrated to samples, by :func:`~pyro_interpolant.diagnostics.calibrate_sampler`. Batches have
    64 images and the learning rate is 0.003, where nothing else is asked for.

    Returns:
        A trained distribution in the type of the samples, with frozen weights: no inference trains
        it by accident. ``distribution.transform.requires_grad_(True)`` unfreezes it.

    Raises:
        TypeError: If the samples are not of a floating type, or an option is none of
            :func:`fit`.
        ValueError: If the samples, the contexts, the network, the support or an option cannot
            work.
        RuntimeError: If gradients stay non-finite; its ``distribution`` has the last good weights.

    Example:
        >>> x = torch.randn(2000, 2).exp()
        >>> prior = from_samples(x, support=constraints.positive, steps=50, progress=False)
        >>> bool((prior.sample((5,)) > 0).all())
        True
    """
    check_options(fit_options)
    validation = as_held_out(fit_options.get("validation", DEFAULT_SHARE))
    fit_options |= {"seed": seed, "validation": validation}
    conditional, contexts = context is not None, context
    streamed = is_stream(x)
    if streamed:
        if context is not None:
            raise ValueError(
                "expected contexts beside a table of rows, got them beside an iterable: build a "
                "ConditionalInterpolantDistribution and fit it on batches (rows, contexts)"
            )
        conditional = network is not None and bool(size_of(network, "classes"))
        with seeded(seed):
            first, rows = first_rows(x, conditional=conditional, scalars=_are_scalars(event_shape))
        columns = names_of(first)  # of a frame, by which those of the batches to come are taken
    else:
        columns = names_of(x)
        rows, context, fit_options = _with_weight(x, context, columns, fit_options)
    constraint, sites, rows = (_named if isinstance(rows, Mapping) else _unnamed)(
        rows, support, event_shape
    )
    space = support_of(constraint)
    if are_images(rows):
        fit_options = {**IMAGE_OPTIONS, **fit_options}
    progress, coupling = fit_options.get("progress", True), fit_options.get("coupling")
    context, sizes = contexts_for(context, rows, network, progress=progress)
    with seeded(seed):
        transform = _transform(space, rows, sizes, network, coupling, conditional=conditional)
    with stage("choosing a map", progress=progress):
        constraint, fit_options = _with_map(
            space, rows, context, fit_options, marginals=marginals, streamed=streamed
        )
    distribution = _distribution(transform, sites, constraint)
    Names(columns, context_names(contexts, context)).give_to(distribution)
    try:
        fit(distribution, x if streamed else rows, context=context, **fit_options)
    except NonFiniteError as error:
        error.distribution = distribution.freeze()
        raise
    return distribution


def _with_weight(
    x: DataLike, context: ArrayLike | None, columns: tuple[str, ...], options: dict[str, Any]
) -> tuple[Any, Any, dict[str, Any]]:
    """Return rows and contexts that have weight, and options with what goes by rows of theirs.

    Args:
        x: Rows, shape ``(N, *event_shape)``, or named draws.
        context: Contexts, shape ``(N, C)``, or None.
        columns: The names of the columns of x.
        options: Those of :func:`fit`.
    """
    validation, own = options["validation"], {k: options.get(k) for k in ("pairs", "weights")}
    mask = mask_of(validation)
    check_same_order(x=x, context=context, **own, validation=None if mask is None else validation)
    pairs = own["pairs"]  # of named draws they go by the names of sites, once there are any
    pairs = pairs if isinstance(x, Mapping) else Names(columns).at_base(pairs, "pairs")
    found = drop_zero_weights(own["weights"], x, pairs, context, mask)
    rows, pairs, context, mask, weights = found
    validation = validation if mask is None else mask
    own = {"pairs": pairs, "weights": weights, "validation": validation}
    return rows, context, {**options, **own}


def _named(
    draws: Mapping[str, ArrayLike], supports: object, event_shape: Sequence[int] | None
) -> tuple[Constraint, dict[str, Any], Tensor]:
    """Return the constraint, the sites and the rows, shape ``(N, D)``, of named draws."""
    if event_shape is not None:
        raise TypeError("expected no event_shape beside named draws, which have their own")
    sites = sites_of(draws, {} if supports is constraints.real_vector else supports)
    rows = pack(sites, draws).detach()
    if len(rows) <= rows.shape[1] and all(shape for shape, _ in sites.values()):
        raise ValueError(
            f"expected draws of shape (N, *site_shape), got {len(rows)} draws of sites of shapes "
            f"{[tuple(shape) for shape, _ in sites.values()]}: draws by chain, "
            "(C, N, *site_shape), are flattened first, mcmc.get_samples(group_by_chain=False)"
        )
    return constraints.real_vector, sites, rows


def _unnamed(
    rows: ArrayLike,
    support: Constraint | Mapping[str, Constraint],
    event_shape: Sequence[int] | None,
) -> tuple[Constraint, dict[str, Any], Tensor]:
    """Return the constraint, no sites and the rows, shape ``(N, *event_shape)``, of samples."""
    if isinstance(support, Mapping):
        raise TypeError(
            "expected one support for one tensor of samples, got a dictionary: join those of the "
            "columns by constraints.stack([...], dim=-1), or give the columns of a frame as named "
            "draws, dict(frame)"
        )
    rows = as_tensor(rows, "x")
    if event_shape is None and rows.dim() == 1:
        event_shape = ()
    if _are_scalars(event_shape) and support is constraints.real_vector:
        support = constraints.real
    if event_shape is None and are_images(rows):
        event_shape = tuple(rows.shape[1:])
    constraint = shaped(support, event_shape)
    if are_levels(rows, event_shape or ()):
        return constraint, {}, rows
    if event_shape is None:
        any_size = (None,) * support_of(constraint).event_constraint().event_dim
        return constraint, {}, checked_rows(rows, "x", any_size)
    return constraint, {}, checked_rows(rows, "x", event_shape)


def _are_scalars(event_shape: Sequence[int] | None) -> bool:
    """Return whether events have no dimension.

    Raises:
        TypeError: If their shape is none.
    """
    if event_shape is None:
        return False
    check_sizes("event_shape", event_shape)
    return not len(event_shape)


def contexts_for(
    context: ArrayLike | None, rows: Tensor, network: nn.Module | None, *, progress: bool = False
) -> tuple[Tensor | None, tuple[int, ...]]:
    """Return the contexts that a network takes, and the sizes that make a new one for them.

    Args:
        context: Contexts, shape ``(N, C)``, labels, shape ``(N,)``, or None.
        rows: Rows, shape ``(N, *event_shape)``.
        network: The velocity, or None for a new one.
        progress: Whether to say what labels become.

    Returns:
        Contexts, shape ``(N, C)``, or labels; and ``(C,)``, ``(0, K)`` of K classes, or nothing.

    Raises:
        TypeError: If contexts are of a wrong type.
        ValueError: If they are of another shape or number, or not finite.

    Warns:
        UserWarning: If classes below the largest label have no row.
    """
    if context is None:
        return None, ()
    like = _type_of(rows)
    found = as_tensor(context, "context")
    classes = 0 if found.is_floating_point() else _number_of_classes(found)
    missing = classes - len(found.unique()) if classes and network is None else 0
    if missing:
        warn_user(
            f"{missing} of the {classes} classes 0 to {classes - 1} have no row, and nothing is "
            "known of them: if these whole numbers are no labels, convert them, tensors with "
            f"{FLOATED}"
        )
    if network is not None and classes:
        own = size_of(network, "classes") or 0
        if not own:
            if progress:
                tell(f"labels of {classes} classes are one-hot for a network without `classes`")
            found = nn.functional.one_hot(found.reshape(len(found)).long(), classes).to(like)
        classes = own
    found = checked_context(found, None, classes, like.dtype)
    if len(found) != len(rows):  # before a choice of maps joins them as columns
        raise ValueError(f"expected as many contexts as rows, {len(rows)}, got {len(found)}")
    return found, (0, classes) if classes else (found.shape[1],)


def context_names(given: object, taken: Tensor | None) -> tuple[str, ...]:
    """Return the names of the columns of contexts, or nothing where a network sees others.

    Args:
        given: What the user gave: a data frame, or anything without names.
        taken: What the network takes, shape ``(N, C)``, where labels may be one-hot; or None.
    """
    names = names_of(given)
    return names if taken is not None and taken.shape[1:] == (len(names),) else ()


def _type_of(rows: Tensor) -> Tensor:
    """Return a tensor of the type of a flow for rows of any shape: images may be whole levels."""
    return rows if rows.is_floating_point() else torch.empty(0, device=rows.device)


def _transform(
    space: Support,
    rows: Tensor,
    sizes: tuple[int, ...],
    network: nn.Module | None,
    coupling: Coupling | None,
    *,
    conditional: bool,
) -> AnyTransform:
    """Return an untrained transform for rows.

    Args:
        space: The support of the rows.
        rows: Rows, shape ``(N, *event_shape)``.
        sizes: Those of contexts: ``(C,)``, ``(0, K)`` of K classes, or nothing.
        network: The velocity, or None for a new one.
        coupling: Which draws of the base are paired with which rows, which decides the path; None
            for the default.
        conditional: Whether there will be contexts.
    """
    size, like = space.size(rows.shape[1:]), _type_of(rows)
    kind = ConditionalInterpolantTransform if conditional else InterpolantTransform
    path: Interpolant | None = space.default_path()
    if path is None and coupling is optimal_transport:
        path = Linear()
    # Copied, for a network may be wanted for other data, too, and is trained from where it is.
    velocity = new_network(space, rows, sizes) if network is None else copied(network)
    choices: dict[str, Any] = {}
    if are_images(rows):
        choices = {"divergence": HutchinsonDivergence(), "whitening": ScalarWhitening(size)}
    return kind(velocity, size, interpolant=path, **choices).to(like)


def new_network(space: Support, rows: Tensor, sizes: tuple[int, ...]) -> nn.Module:
    """Return the velocity that rows have by default, untrained.

    Args:
        space: The support of the rows.
        rows: Rows, shape ``(N, *event_shape)``.
        sizes: Those of contexts: ``(C,)``, ``(0, K)`` of K classes, or nothing.

    Raises:
        ValueError: If they are images, and contexts are not labels.
    """
    if not are_images(rows):
        return space.new_velocity(space.size(rows.shape[1:]), *sizes)
    if sizes and not sizes[1:]:
        raise ValueError(
            "expected labels as contexts of images, whole numbers of shape (N,), or a network= "
            f"that takes others, got contexts of {sizes[0]} numbers"
        )
    return UNet(tuple(rows.shape[1:]), classes=sum(sizes))


def _number_of_classes(labels: Tensor) -> int:
    """Return K for labels from 0 to K - 1, shape ``(N,)`` or ``(N, 1)``.

    Raises:
        ValueError: If they are of another shape, or negative.
    """
    labels = labels if labels.is_complex() else labels.long()
    is_one_each = labels.dim() in (1, 2) and labels.shape[1:] in ((), (1,)) and len(labels)
    if not is_one_each or labels.is_complex():
        raise ValueError(
            "expected context as numbers of a floating type, shape (N, C), or as one label a row, "
            f"whole numbers of shape (N,), got {labels.dtype} of shape {tuple(labels.shape)}: "
            f"convert numbers in tensors with {FLOATED}, and for labels beside numbers pass "
            "torch.cat((one_hot(labels, K).float(), numbers), -1), or, of a frame, "
            "pandas.get_dummies(frame, dtype=float)"
        )
    if int(labels.min()) < 0:
        raise ValueError(f"expected labels 0, 1, ..., got {int(labels.min())} among them")
    classes = int(labels.max()) + 1
    if classes > len(labels):
        raise ValueError(
            f"expected labels of fewer classes than rows, got {classes} classes in {len(labels)} "
            f"rows: convert numbers in tensors with {FLOATED}"
        )
    return classes


def _distribution(
    transform: AnyTransform, sites: dict[str, Any], constraint: Constraint
) -> AnyDistribution:
    """Return the distribution of an untrained flow: of sites or not, conditional or not."""
    if isinstance(transform, ConditionalInterpolantTransform):
        if sites:
            return ConditionalJointInterpolantDistribution(
                transform, sites=sites, support=constraint
            )
        return ConditionalInterpolantDistribution(transform, support=constraint)
    if sites:
        return JointInterpolantDistribution(transform, sites=sites, support=constraint)
    return InterpolantDistribution(transform, support=constraint)


def _with_map(
    space: Support,
    rows: Tensor,
    context: Tensor | None,
    fit_options: dict[str, Any],
    *,
    marginals: bool | None,
    streamed: bool,
) -> tuple[Constraint, dict[str, Any]]:
    """Return a constraint, behind a map if so wanted, and options, which say what is held out.

    Rows to be held out do not set the map, which would know them.

    Args:
        space: The support.
        rows: All rows, shape ``(N, *event_shape)``, or those that a stream begins with.
        context: Their contexts, shape ``(N, C)``, or None.
        fit_options: Passed to :func:`fit`.
        marginals: As in :func:`from_samples`.
        streamed: Whether rows come from an iterable.
    """
    check_ranges(flag("marginals", marginals, or_none=True))
    fixed = any(fit_options.get(name) is not None for name in ("base_samples", "pairs"))
    fixed = fixed or streamed or are_images(rows) or isinstance(space, CircularSupport)
    if marginals and fixed:
        raise ValueError(
            "expected marginals=True beside a table of rows that are no angles or images, "
            "without pairs or base_samples"
        )
    if fixed or marginals is False:
        return space.constraint, fit_options
    weights = fit_options.get("weights")  # checked, with the rows
    real = space.unconstrained(rows)
    context = None if context is None else context.to(real.device)
    weights = None if weights is None else weights.to(real.device)
    held = _held_out(real, context, fit_options)
    kept = torch.arange(len(real)) if held is None else (~held).nonzero().flatten()
    few = None if weights is None else weights[kept]
    found = preferred_support(real[kept], space.constraint, few, always=bool(marginals))
    if not isinstance(found, Gaussianized):
        return found, fit_options
    if isinstance(found.gaussianizer, RadialTransform):
        warn_if_rounded(real)  # what is wrong with columns, the fit cannot see behind the map
        whitening_map(real[subsample(len(real), KNOT_ROWS).to(real.device)])
    return found, fit_options if held is None else {**fit_options, "validation": held}


def _held_out(real: Tensor, context: Tensor | None, fit_options: dict[str, Any]) -> Tensor | None:
    """Return which rows are to be held out, a mask of shape ``(N,)``; None where none of them is.

    With the copies of each. It is not drawn from the global generator: a run that resumes has the
    same.

    Args:
        real: Unconstrained rows, shape ``(N, D)``.
        context: Their contexts, shape ``(N, C)``, or None.
        fit_options: Passed to :func:`fit`.
    """
    share = fit_options["validation"]
    mask = mask_of(share)
    if mask is not None:
        return checked_mask(mask, len(real)).to(real.device)
    if not isinstance(share, float):
        return None
    count = rows_held(share, len(real))
    if count >= len(real):
        return None
    with seeded(fit_options["seed"] or 0):
        order, count = random_order(Rows(real, context), count)
    mask = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    mask[order[:count]] = True
    return mask
