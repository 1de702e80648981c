r"""Numbers of a distribution: moments and entropy by quasi-random draws; quantiles of scalars.

A flow in one dimension is monotone, :math:`x = s(T(w))` with w a draw of the base, so that
:math:`F(x) = F_0(w)` where s increases, and :math:`1 - F_0(w)` where it decreases.

References:
    Owen, *Scrambled net variance for integrals of smooth functions*, Ann. Statist. 25 (1997).
"""

import contextlib
import math
from abc import abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import ComposeTransform, Distribution, Transform
from torch.distributions.transforms import AffineTransform
from torch.quasirandom import SobolEngine

from .._torch import (
    broadcast_shapes,
    is_functional,
    is_tracing,
    needs_graph,
    recomputed,
    seeded,
)
from ..transforms.interpolant import InterpolantTransform, broadcast_batch
from ..transforms.monotone import mapped
from .base_support import ends_of, inside_base, is_bounded, scalars_of, stated_support
from .bases import ExternalBase, Samples, UniformTorus, detached
from .flow import FlowDistribution
from .quasi_random import normal_points
from .rows import as_tensor, check_value, counted
from .supports import CircularSupport

_SETS, _DRAWS = 8, 512  # scrambled nets, whose spread tells the error, and the draws of each
_LIGHT = (  # tails as light as a normal's; torch's classes are those that Pyro's derive from
    torch.distributions.Normal,
    torch.distributions.HalfNormal,
    torch.distributions.Uniform,
    torch.distributions.MultivariateNormal,
    torch.distributions.LowRankMultivariateNormal,
    dist.MixtureOfDiagNormals,
    dist.MixtureOfDiagNormalsSharedCovariance,
    Samples,
    UniformTorus,
)


class Moments(NamedTuple):
    """Moments of a distribution with their standard errors, which draws leave.

    Attributes:
        mean: The mean of each element, shape ``(*batch_shape, *event_shape)``.
        mean_stderr: Its standard error, of the same shape.
        variance: The variance of each element, of the same shape.
        variance_stderr: Its standard error, of the same shape.
        entropy: The differential entropy, nats, shape ``(*batch_shape)``.
        entropy_stderr: Its standard error, of the same shape.
    """

    mean: Tensor
    mean_stderr: Tensor
    variance: Tensor
    variance_stderr: Tensor
    entropy: Tensor
    entropy_stderr: Tensor


def _sets(distribution: "Summaries", *, with_densities: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield sets of draws, ``(512, *batch, *event)``, with their log-densities, or NaN.

    The batch is that of the context and of the bounds of the support: members of an expanded
    distribution are all alike.
    """
    flow, bare = distribution.transform.flow, distribution.without_support()
    end = ComposeTransform(distribution.space.transforms(flow))
    shape = end.forward_shape(bare.batch_shape + bare.event_shape)
    own = shape[: len(shape) - len(distribution.event_shape)]
    loc, batch = flow.loc, bare.batch_shape
    if not bare.base_dist.has_rsample:  # without a gradient of draws that of densities is wrong
        bare.base_dist = detached(bare.base_dist)
    source = bare.base_dist
    quasi_random = bare.base is None and len(loc) <= SobolEngine.MAXDIM
    known = with_densities and bare.has_density()
    by_spline = quasi_random and len(loc) == 1 and not known  # as sample() of scalars
    sources = bare.transform.raw_context, *flow.parameters()

    def images(z: Tensor) -> tuple[Tensor, Tensor]:
        x = pushed(bare, z) if by_spline else ComposeTransform(bare.transforms)(z.contiguous())
        return x, bare.log_prob(x) if known else x[..., 0] * math.nan

    # The first scope of a seed imports a compiler, for a second: none where nothing is drawn.
    with seeded(0) if with_densities or not quasi_random else contextlib.nullcontext():
        for i in range(_SETS):
            if quasi_random:
                z = normal_points(loc, _DRAWS, seed=i)
                z = z.reshape(_DRAWS, *(1,) * len(batch), len(loc)).expand(_DRAWS, *batch, -1)
            else:
                draw = source.rsample if source.has_rsample else source.sample
                z = draw(torch.Size((_DRAWS,)))
            # A graph of all sets at once would take gigabytes.
            x, log_prob = recomputed(images)(z) if needs_graph(z, *sources) else images(z)
            new = (1,) * (len(own) - len(batch))
            x = x.reshape(_DRAWS, *new, *batch, len(loc)).expand(_DRAWS, *own, -1)
            y, log_det = distribution.from_flow(x)
            yield y, log_prob.reshape(_DRAWS, *new, *batch) - log_det


def _undefined(distribution: "Summaries") -> tuple[Tensor | float, Tensor | float]:
    """Return what to add to means and to variances: NaN or infinity where there is none.

    Within bounds all moments exist. What grows in proportion, as on the real line, has those that
    the base has. For what grows faster, as exponentials do, the base must be known to have light
    tails: they decide, and no draw shows them. Angles have none: a circle can be cut anywhere.
    """
    base, like = distribution.base, distribution.transform.flow.loc
    is_angle = isinstance(distribution.space, CircularSupport)
    if is_angle or base is None or _is_light(base):
        return (math.nan, math.nan) if is_angle else (0.0, 0.0)
    bounded, fast = _growth(distribution)
    first, second = (
        torch.where(fast, math.nan, torch.where(bounded, 0.0, existing)).to(like)
        for existing in _existing(base)
    )
    return first, second


def _growth(distribution: "Summaries") -> tuple[Tensor, Tensor]:
    """Return which elements on the support are bounded, and which grow faster than real vectors.

    Two booleans of each, shape ``(*batch_shape, *event_shape)``.
    """
    far = torch.tensor([-3e7, -2e7, -1e7, 1e7, 2e7, 3e7], dtype=torch.double)
    y = _at_steps(distribution, far)
    steps = y.diff(dim=0).abs()  # not finite where values are not
    inner, outer = steps[[1, 3]], steps[[0, 4]]
    bounded = (inner + outer <= 1e-5 * (1 + y[2].abs() + y[3].abs())).all(0)
    return bounded, ~(outer <= 1.001 * inner + 10).all(0)  # of angles, neither


def _is_light(base: Distribution | None) -> bool:
    """Return whether the tails of a base are known to be as light as those of a normal one."""
    if isinstance(base, Summaries):
        bounded, fast = _growth(base)
        return bool(bounded.all()) or (not bool(fast.any()) and _is_light(base.base))
    if base is None or isinstance(base, _LIGHT):
        return True
    inner = _inner(base)
    within = inner is not None and _keeps_tails(base) and _is_light(inner)
    return within or is_bounded(stated_support(base))


def _existing(base: Distribution) -> tuple[float, float]:
    """Return what to add to the mean and to the variance: NaN or infinity where the base's is.

    A flow moves far points by bounded distances, so it has the moments that its base has. One that
    does not state them has those of what it is made of, if that is light or moved in proportion.
    """
    found = []
    for name in ("mean", "variance"):
        try:
            value = float(getattr(base, name).detach().abs().sum())
        except (NotImplementedError, AttributeError):
            inner = _inner(base)
            if _is_light(base) or (inner is not None and _is_light(inner)):
                return 0.0, 0.0
            if inner is None or not _keeps_tails(base):
                return math.nan, math.nan
            return _existing(inner)
        found.append(0.0 if math.isfinite(value) else value)
    return found[0], found[1]


def _inner(base: Distribution) -> Distribution | None:
    """Return the distribution that another is made of, or None where none is known."""
    if isinstance(base, ExternalBase):
        return base._source()
    names = ("base_dist", "component_distribution", "base")  # the last that of a flow of zuko
    parts = (getattr(base, name, None) for name in names)
    return next((part for part in parts if isinstance(part, Distribution)), None)


def _keeps_tails(base: Distribution) -> bool:
    """Return whether a distribution moves draws of what it is made of in proportion, or not."""
    if hasattr(base, "transform"):
        return False
    maps = getattr(base, "transforms", ())
    return all(isinstance(m, (AffineTransform, dist.transforms.Permute)) for m in maps)


class Summaries(FlowDistribution, dist.TransformedDistribution):
    """What an :class:`~pyro_interpolant.InterpolantDistribution` knows of itself in numbers."""

    transform: InterpolantTransform

    @abstractmethod
    def without_support(self) -> "Summaries":
        """Return the distribution of the flow's own coordinates: real vectors."""

    def moments(self) -> Moments:
        """Return mean, variance and entropy with their standard errors, which draws leave.

        They are the same at each call: means over 8 sets of 512 draws, scrambled Sobol points, or
        random ones where a base is given or there are no such points of so many dimensions. The
        spread of 8 sets tells the error, so that 2.4 errors are what covers 95%, and 2 cover 91%:
        less where few draws make up a moment, as of long tails. Of exp(N(0, 1)) 2 errors cover the
        mean in 85% and the variance in 76%, of exp(N(0, 4)) in 76% and 32%. Where
        the base has no mean or an infinite variance, neither has the flow, unless values are
        within bounds. A base that does not state its moments is taken to have them where it is a
        map of normal draws, as flows of zuko and most ``TransformedDistribution`` are; an affine
        map has those of what it moves; of any other they are not known, and NaN. On a support
        whose bijection grows faster than its argument, such as positive numbers, moments hang on
        tails that draws do not show: they are NaN unless the base is normal, of samples, on an
        interval, a mixture of such, or a flow from one. Mean and variance of angles, and the
        entropy of a base of samples, are NaN.

        Gradients reach weights, contexts and the parameters of a base that has ``rsample``.

        Raises:
            ValueError: If contexts are not finite, unless arguments are not validated.
        """
        return self._moments(with_entropy=True)

    def _moments(self, *, with_entropy: bool = False) -> Moments:
        """Return moments; the entropy, whose densities take most of the time, or NaN for it."""
        self.check_start()
        is_checked = self._validate_args and not (is_tracing() or is_functional())
        context = self.transform.raw_context if is_checked else None
        if context is not None and not bool(context.isfinite().all()):
            bad = ~context.isfinite().reshape(-1, context.shape[-1]).all(1)
            raise ValueError(
                f"expected finite contexts, got NaN or infinite numbers in {counted(bad)}: remove "
                "or impute them"
            )
        values, densities = zip(*_sets(self, with_densities=with_entropy), strict=True)
        x, log_prob = torch.stack(values), torch.stack(densities)  # (8, 512, *batch, ...)
        first, second = _undefined(self)
        shape = self.batch_shape + self.event_shape
        found: list[Tensor] = []
        for part, undefined, size in (
            (x, first, shape),
            ((x - x.mean((0, 1))).square(), second, shape),
            (-log_prob, 0.0, self.batch_shape),
        ):
            by_set = part.mean(1)
            value = by_set.mean(0)  # torch warns of the deviation of no numbers
            error = by_set.std(0) / math.sqrt(_SETS) if by_set.numel() else value
            found += [(value + undefined).expand(size), (error + undefined).expand(size)]
        return Moments(*found)

    @property
    def mean(self) -> Tensor:
        """The mean, shape ``(*batch_shape, *event_shape)``; :meth:`moments` tells its error.

        Raises:
            NotImplementedError: For angles, whose mean depends on where the circle is cut.
        """
        return _on_the_line(self).mean

    @property
    def variance(self) -> Tensor:
        """The variance of each element, ``(*batch_shape, *event_shape)``; see :meth:`moments`.

        Raises:
            NotImplementedError: For angles, whose variance depends on where the circle is cut.
        """
        return _on_the_line(self).variance

    def entropy(self) -> Tensor:
        r"""Return the differential entropy :math:`-E[\log\rho_1(x)]`, nats, ``(*batch_shape)``.

        Its error is that of :meth:`moments`.
        """
        return self.moments().entropy

    def cdf(self, value: Tensor) -> Tensor:
        """Return the probability of values up to the given ones, of scalars.

        Args:
            value: Shape ``(*, *event_shape)``, with one element in an event; the column of a data
                frame is taken by name.

        Returns:
            Probabilities, shape ``(*)``, differentiable in the value and in the context.

        Raises:
            NotImplementedError: If events have more than one element, or the base has no cdf.
            TypeError: If the value is not a tensor.
            ValueError: If a value is of another shape, or outside the support (while validation is
                on).
        """
        _check_scalar(self, "cdf")
        value = self.value_of(value)
        check_value(value, self.event_shape, self.transform.flow.loc.dtype)
        given = value.shape[: value.dim() - len(self.event_shape)]
        batch = broadcast_batch(given, self.batch_shape)
        if 0 in batch:  # which torch's checks cannot take
            return (0 * value.sum()).expand(batch)
        if self._validate_args:
            self._validate_sample(value)
        return _cdf(self, value)

    def icdf(self, value: Tensor) -> Tensor:
        """Return the quantiles of scalars: the values up to which there is a given probability.

        Where 128 or more share a context, no gradient is wanted, and the base has no batch, they
        are read off a monotone spline through some, within 1e-4 in probability; else each is
        solved for.

        Args:
            value: Probabilities, shape ``(*)``, broadcast with the batch shape.

        Returns:
            Values, shape ``(*, *event_shape)``, differentiable in the probabilities and in the
            context. Of 0 and 1 they are the images of the ends of the base's support, or, where
            that has none, the ends of the support, as its bijection has them at infinity.

        Raises:
            NotImplementedError: If events have more than one element, or the base has no icdf.
            TypeError: If probabilities are neither a tensor nor an array.
            ValueError: If a probability is not between 0 and 1, or shapes do not broadcast.
        """
        _check_scalar(self, "icdf")
        q, loc = as_tensor(value, "probabilities"), self.transform.flow.loc
        q = q.to(loc.device, torch.promote_types(q.dtype, loc.dtype))  # 1 - 1e-9 is not 1
        q = q.expand(broadcast_batch(q.shape, self.batch_shape))
        if not (is_tracing() or is_functional()) and not bool(((q >= 0) & (q <= 1)).all()):
            raise ValueError(
                f"expected probabilities between 0 and 1, got {q.min():.3g} to {q.max():.3g}"
            )
        _, rises, increases = _orientation(self)
        end = q.new_tensor(math.inf).copysign(q - 0.5 if rises else 0.5 - q)[..., None]
        end, _ = self.from_flow(end.to(loc))
        at_base = q if increases else 1 - q
        asked = q if self.base is None else at_base  # N(0, 1) is asked for what is above as well
        inner = (asked > 0) & (asked < 1)
        x = pushed(self, _base_icdf(self, q.where(inner, 0.5), above=not increases).to(loc))
        is_known = not (is_tracing() or is_functional())
        for at, bound in enumerate(() if is_known and bool(inner.all()) else _base_ends(self)):
            if bool(bound.isfinite().any()):
                image = pushed(self, bound.nan_to_num(posinf=0.0, neginf=0.0))
                image = image.where(bound.isfinite().reshape(image.shape), end)
                end = image.where((at_base == at).reshape(x.shape), end)
        return x.where(inner.reshape(x.shape), end)


def _on_the_line(distribution: Summaries) -> Moments:
    if isinstance(distribution.space, CircularSupport):
        raise NotImplementedError(
            "angles have no mean or variance that does not depend on where the circle is cut: "
            "take those of their cosines and sines"
        )
    return distribution._moments()


def _check_scalar(distribution: Summaries, name: str) -> None:
    distribution.check_start()
    shape = tuple(distribution.event_shape)
    if shape not in ((), (1,)) or isinstance(distribution.space, CircularSupport):
        raise NotImplementedError(
            f"{name} is that of one real number, got a distribution of event shape {shape} on "
            f"{distribution.constraint}"
        )


def _cdf(distribution: Summaries, value: Tensor) -> Tensor:
    """Return probabilities, shape ``(*)``, of values anywhere, shape ``(*, *event_shape)``."""
    shape = distribution.batch_shape + distribution.event_shape
    value = value.expand(broadcast_shapes(value.shape, shape))
    middle, _, increases = _orientation(distribution)
    inside = distribution.support.check(value)
    inside = inside & value.isfinite().reshape(inside.shape)
    safe = value.where(inside.reshape(value.shape), middle)
    before, after = _around(distribution)
    y = after.inv(safe)
    white = distribution.transform.flow.whitening.to_white(y)  # not finite on an edge
    inside = inside & white.isfinite().reshape(inside.shape)
    x = before.inv(distribution.transform.inv(y))
    below = _base_cdf(distribution, x, above=not increases)
    beyond = (value > middle).to(below).reshape(inside.shape)
    unknown = value.isnan().reshape(inside.shape)
    return below.where(inside, beyond.masked_fill(unknown, math.nan))


def _orientation(distribution: Summaries) -> tuple[Tensor, bool, bool]:
    """Return a value inside the support and the directions of maps to it.

    Returns:
        The value, shape ``(*batch_shape, *event_shape)``; whether the map from real numbers to the
        support increases; and whether that from the base does.
    """
    flow = distribution.transform.flow
    scale = flow.whitening.matrix().double().abs().reshape(())
    steps = torch.arange(2, dtype=torch.double, device=scale.device)
    y = _at_steps(distribution, flow.loc.double() + steps * scale)
    rises = bool((y[1] > y[0]).all())
    # A base that is given is in data coordinates: L is undone before, and turns nothing.
    keeps = distribution.base is not None or distribution.transform.sign > 0
    return y[0].to(flow.loc), rises, rises == keeps


def _at_steps(distribution: Summaries, x: Tensor) -> Tensor:
    """Return the images on the support of points (x, ..., x).

    Args:
        distribution: The distribution.
        x: The coordinates, shape ``(N,)``, in float64: large numbers must not become one.

    Returns:
        The values, shape ``(N, *batch_shape, *event_shape)``: bounds may have a batch.
    """
    flow, batch = distribution.transform.flow, distribution.batch_shape
    x = x.to(flow.loc.device).reshape(-1, *(1,) * len(batch), 1)
    return distribution.from_flow(x.expand(-1, *batch, flow.event_dim))[0]


def _base_cdf(distribution: Summaries, x: Tensor, *, above: bool = False) -> Tensor:
    """Return the base's probability up to x, or above it, shape ``(*)``, x of shape ``(*, 1)``."""
    if distribution.base is None:  # 1 - p would round a small one away, as ndtr of float32 does
        side = x[..., 0] if above else -x[..., 0]
        return 0.5 * torch.special.erfc(math.sqrt(0.5) * side)
    if above:
        return 1 - _base_cdf(distribution, x)
    if isinstance(distribution.base, Summaries):
        return _cdf(distribution.base, x)
    base = scalars_of(distribution.base)
    found = inside_base(base, x)
    with _naming(base, "cdf"):
        if found is None:
            return base.cdf(x)[..., 0]
        within, known = found
        below = base.cdf(x.where(within, known))
    beyond = (x > known).to(below).masked_fill(x.isnan(), math.nan)
    return below.where(within, beyond)[..., 0]


def _base_icdf(distribution: Summaries, q: Tensor, *, above: bool = False) -> Tensor:
    """Return the base's quantiles, ``(*, 1)``, of probabilities, or of those above, ``(*)``."""
    if distribution.base is None:
        x = torch.special.ndtri(q)[..., None]
        return -x if above else x
    q = 1 - q if above else q
    if isinstance(distribution.base, Summaries):
        return distribution.base.icdf(q)
    base = scalars_of(distribution.base)
    with _naming(base, "icdf"):
        return base.icdf(q[..., None])


@contextlib.contextmanager
def _naming(base: Distribution, name: str) -> Iterator[None]:
    """Name the base where torch says nothing at all."""
    try:
        yield
    except NotImplementedError as error:
        raise NotImplementedError(
            f"the base, {type(base).__name__}, has no {name} in torch: choose one that has"
        ) from error


def _base_ends(distribution: Summaries) -> tuple[Tensor, Tensor]:
    """Return the ends of the base's support, each of shape ``(*batch_shape, 1)``, or infinity."""
    base, like = distribution.base, distribution.transform.flow.loc
    if isinstance(base, Summaries):
        ends = [base.icdf(like.new_tensor(q)) for q in (0.0, 1.0)]
    else:
        ends = ends_of(base)
    shape = (*distribution.batch_shape, 1)
    low, high = (bound.to(like).expand(shape) for bound in ends)
    return low, high


def pushed(distribution: Summaries, x: Tensor) -> Tensor:
    """Return where a flow of scalars takes values of its base, shape ``(*, 1)``."""
    before, after = _around(distribution)
    if distribution.base is not None and distribution.base.batch_shape:
        return after(distribution.transform(before(x)))  # members have log-odds of their own

    def log_odds(w: Tensor) -> Tensor:
        if distribution.base is None:  # not from the probability, which is 1 far away
            return torch.special.log_ndtr(w) - torch.special.log_ndtr(-w)
        return _base_cdf(distribution, before.inv(w[..., None])).logit()

    return after(mapped(distribution.transform, before(x), log_odds))


def _around(distribution: Summaries) -> tuple[Transform, Transform]:
    """Return the maps before the flow, into its coordinates, and after it, onto the support."""
    chain = distribution.transforms
    place = chain.index(distribution.transform)
    return ComposeTransform(chain[:place]), ComposeTransform(chain[place + 1 :])
