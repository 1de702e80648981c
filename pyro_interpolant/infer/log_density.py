r"""The log joint density of a model, :math:`\log p(x(z), y) + \log |dx / dz|`, of many z."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, cast, get_args

import pyro
import pyro.distributions as dist
import torch
from numpy.typing import ArrayLike
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch import draws, is_functorch_tensor, seeded, warn_user
from ..diagnostics.psis import finite_or_minus_inf
from ..transforms.bijections import biject
from .initialization import init_to_support
from .runs import in_lanes, in_plate, plate_nesting, state_of_others
from .sites import (
    LatentSites,
    Model,
    Nodes,
    Site,
    Substitute,
    apart,
    check_fixed_support,
    extreme_rows,
    is_sampled,
    subsampling_plates,
    unchecked,
)
from .validity import (
    has_density,
    innermost_distribution,
    is_on_support,
    log_prob_left_out,
    without_masks,
    without_validation,
)

_PROBES = 3  # draws on which a batched evaluation is compared with single ones
_MANY = 100  # also this many at once, the probes repeated
# Draws this many times farther out are put beside the probes: their presence must not change the
# probes' values.
_FAR = 6.0
_LEAST_ERROR = 0.01  # nats, of a draw's log density, that moves no weight by more than a percent
_ROUNDING = 1e-7  # relatively, of float32
_MARGIN = 10.0  # times the rounding of a sum of terms of this size, and that of z
_VALUES_AT_ONCE = 2**22  # of all sites and their log densities together

Batching = Literal["plate", "vmap"]
TO_BATCH = (  # how to write a model so that many draws can be evaluated at once
    "Index events from the right, x[..., i], declare batch dimensions by pyro.plate, and avoid "
    ".item(), in-place writes and branches on latent values"
)
# What to do about a site without a density, observed or latent.
_SIMULATE_IT = "an AmortizedInterpolant learns from simulations alone, and calibration() judges it"
_COMPUTE_IT = "sample a variable that has one, and compute this from it by pyro.deterministic"
Evaluate = Callable[[Tensor], Tensor]


class NoDensityError(ValueError):
    """A site has no log density that is known."""


def log_prior_of(site: Site) -> Tensor:
    """Return the log density of a latent site's value, of the batch shape of its distribution.

    Raises:
        NoDensityError: If it has none.
    """
    try:
        return site["fn"].log_prob(site["value"])
    except NotImplementedError as error:  # and every posterior is weighed by the prior
        raise _without_density(site, error, _COMPUTE_IT) from error


def _without_density(site: Site, error: NotImplementedError, advice: str) -> NoDensityError:
    why = f" ({error})" if str(error) else ""  # of a part of it, perhaps
    return NoDensityError(
        f"expected a log_prob of every site, got a {type(site['fn']).__name__} at "
        f"{site['name']!r}, which has none{why}: {advice}"
    )


class LogJoint:
    r"""The log density of a model's latent sites as one unconstrained vector, batched.

    .. math:: \ell(z) = \log p(x(z), y) + \log \left| \frac{dx}{dz} \right|

    Make one by :func:`log_joint`.

    Args:
        sites: The latent sites.
        model: The model, a function of no arguments; by default that of the sites.
        centers: Where the density is first tried, shape ``(K, D)``; by default where they tell.

    Attributes:
        event_dim: D, the size of z.
        batching: How many draws are evaluated at once: ``"plate"``, in a plate to the left of all
            others; or ``"vmap"``, by :func:`torch.func.vmap`, for models that do not broadcast.
    """

    def __init__(
        self, sites: LatentSites, model: Model | None = None, centers: Tensor | None = None
    ) -> None:
        self.sites, self.model = sites, sites.model if model is None else model
        self.event_dim: int = sites.guide.latent_dim
        self.nesting = 0  # until the first run
        self.off_support: frozenset[str] = frozenset()  # sites whose data are, with leave
        centers = sites.centers() if centers is None else centers
        with torch.no_grad():
            center = self._first_possible(centers)
            # The first with the user's own validation, which explains what is wrong.
            nodes = _checked_trace(self, center)
            scored = list(_scored(nodes))
            # Without validation data may be off a support; else none must come there by latents.
            self.off_support = frozenset(s["name"] for s in scored if not is_on_support(s))
            self.nesting = max([plate_nesting(nodes), *(s["log_prob"].dim() for s in scored)])
            numbers = sum(s["value"].numel() + s["log_prob"].numel() for s in scored)
            self.rows = max(1, _VALUES_AT_ONCE // numbers)
            with unchecked():  # attempts may come to nothing
                self.batching: Batching = _batching(self, center)

    def _first_possible(self, points: Tensor) -> Tensor:
        """Return the first of points, ``(K, D)``, with a finite density; else the first of all."""
        for point in points if len(points) > 1 else ():
            with unchecked(), contextlib.suppress(Exception):  # whatever a model does there
                if bool(evaluated_safely(self.parts, point).isfinite().all()):
                    return point
        return points[0]

    def __call__(self, z: Tensor) -> Tensor:
        """Return the log density, ``-inf`` where it is not finite, shape ``(N,)``.

        Args:
            z: Unconstrained vectors, shape ``(N, D)``; gradients flow to them.

        Raises:
            ValueError: If z is of another shape.
        """
        if z.dim() != 2 or z.shape[-1] != self.event_dim:
            raise ValueError(f"expected z of shape (N, {self.event_dim}), got {tuple(z.shape)}")
        if len(z) == 0:
            return z.sum(-1)
        parts = self.parts_by(self.batching)
        with without_validation:
            return torch.cat([evaluated_safely(parts, few).sum(0) for few in z.split(self.rows)])

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """Return the latent sites, each ``(N, *site_shape)``, of vectors of shape ``(N, D)``."""
        return self.sites.unpack(z)

    @torch.no_grad()
    def check(self, z: Tensor) -> None:
        """Raise a ValueError unless draws have together the log densities that they have alone.

        A model may branch on whether one of many values is rare, and be another for all then. One
        draw and two extreme ones are evaluated alone, and beside up to 256 extreme ones.

        Args:
            z: Unconstrained vectors, shape ``(N, D)``, where the log density is to be known.
        """
        extreme = extreme_rows([z])
        few = torch.cat((z[:1], z[extreme]))[: self.rows]
        together = self(few)[:_PROBES]
        with unchecked():
            alone = self.one_by_one(few[:_PROBES]).sum(0)
            error = torch.where(together == alone, 0.0, (together - alone).abs())
            if not bool((error > _LEAST_ERROR).any()):
                return
            rounding = _rounding(z.dtype)
            moved = self.one_by_one(few[:_PROBES] * (1 + rounding)).sum(0)
        change = (moved - alone).abs().nan_to_num(0.0, math.inf)
        tolerance = _MARGIN * (rounding * alone.abs().nan_to_num(0.0, 0.0, 0.0) + change)
        if bool((error > _LEAST_ERROR + tolerance).any()):
            raise ValueError(
                "expected a model that gives many draws at once the log densities it gives one at "
                f"a time, got one that is off by {float(error.max()):.2g} nats beside extreme "
                f"draws: it may branch on whether any value is extreme. {TO_BATCH}"
            )

    def displacements(self, z: Tensor) -> dict[str, Tensor]:
        """Return by site how far numbers of z move there and back, each ``(N, size)``."""
        return self.sites.displacements(z)

    def pack(self, draws: Mapping[str, ArrayLike]) -> Tensor:
        """Return vectors, shape ``(N, D)``, of draws of all sites, each ``(N, *site_shape)``.

        They are in the type of the model.

        Raises:
            ValueError: If a site is missing, of another shape, or outside its support.
        """
        return self.sites.pack(draws)

    def parts_by(self, batching: Batching) -> Evaluate:
        """Return a function from z, ``(N, D)``, to the parts of log densities, ``(1 + S, N)``.

        The first part is the log-determinant, the others are those of the S sites that have any.
        """
        each = torch.func.vmap(self.parts, out_dims=1, randomness="same")
        return self.parts_by_plate if batching == "plate" else each

    def parts_by_plate(self, z: Tensor) -> Tensor:
        """Return the parts, shape ``(1 + S, N)``, of z, ``(N, D)``, in an outermost plate."""
        values, log_det = self.sites.constrain(z.reshape(len(z), *(1,) * self.nesting, -1))
        parts = [log_det]
        for site in _scored(self.trace(values, len(z))):
            log_prob = self._log_prob(site)
            if log_prob.dim() > self.nesting + 1:
                raise ValueError(f"site {site['name']!r} has a shape that the plate does not know")
            if log_prob.dim() <= self.nesting:  # not a function of z
                log_prob = log_prob.sum().expand(len(z))
            parts.append(log_prob.reshape(log_prob.shape[0], -1).sum(-1).expand(len(z)))
        return torch.stack(parts)

    def parts(self, z: Tensor) -> Tensor:
        """Return the parts of the log density, shape ``(1 + S,)``, of one vector, ``(D,)``."""
        values, log_det = self.sites.constrain(z)
        scored = _scored(self.trace(values))
        return torch.stack([log_det, *(self._log_prob(site).sum() for site in scored)])

    def _log_prob(self, site: Site) -> Tensor:
        """Return a site's log density, ``(*)``: ``-inf`` off the support, or of bad parameters."""
        fn, value, mask, log_prob = site["fn"], site["value"], site["mask"], site["log_prob"]
        if site["name"] in self.sites.shapes:
            left_out = log_prob_left_out(fn, value, mask=mask)
            if left_out is not None:
                log_prob = log_prob + left_out
            fn, value = without_masks(fn), None  # which comes from the support
        moved = site["name"] not in self.off_support
        valid = has_density(fn, value, mask=mask, moved=moved)
        return log_prob if isinstance(valid, bool) else torch.where(valid, log_prob, -math.inf)

    def one_by_one(self, z: Tensor) -> Tensor:
        """Return the parts, shape ``(1 + S, N)``, of z, ``(N, D)``, by N runs of the model.

        Raises:
            ValueError: If one run has other sites than another.
        """
        parts = [evaluated_safely(self.parts, row) for row in z]
        if len({len(each) for each in parts}) > 1:
            raise ValueError(
                "expected the same sites at all values of the latent ones, got a model that "
                f"branches on them. {TO_BATCH}"
            )
        return torch.stack(parts, 1)

    def trace(self, values: dict[str, Tensor], count: int | None = None) -> Nodes:
        """Return the sites of the model, with log densities, at values ``(*, *site_shape)``.

        Args:
            values: The latent sites.
            count: The number of draws they hold, to the left of all plates; None for a single one.
        """
        model = in_plate(Substitute(values, self.sites.shapes)(self.model), count, self.nesting)
        with apart():
            trace = poutine.trace(model).get_trace()  # whose errors show the shapes of all sites
            nodes = cast("Nodes", trace.nodes)
            try:
                trace.compute_log_prob()
            except NotImplementedError as error:
                bare = next(s for s in _scored(nodes) if "log_prob" not in s)
                is_latent = bare["name"] in self.sites.shapes
                advice = _COMPUTE_IT if is_latent else _SIMULATE_IT
                raise _without_density(bare, error, advice) from error
        return nodes


def log_joint(target: AutoContinuous | Model, *args: object, **kwargs: object) -> LogJoint:
    r"""Return the log joint density of a model as a function of unconstrained vectors.

    The function takes many vectors at once: with the model in a plate to the left of all its
    plates, as Pyro's vectorised particles, where that gives the values it has one by one; else
    under :func:`torch.func.vmap`, for models that index or loop over their values. Masks, scales
    and factors count; deterministic sites do not. A tensor that masks out rows of a latent site
    leaves them their own density, without which the whole has no integral: so do rows of an
    ``obs_mask`` that are there.

    Args:
        target: A model, or an :class:`~pyro.infer.autoguide.AutoContinuous` guide of it.
        *args: The arguments of the model.
        **kwargs: Its named arguments.

    Returns:
        A function from z, shape ``(N, D)``, to log densities, shape ``(N,)``, differentiable in z;
        ``pack`` and ``unpack`` translate between z and sites.

    Raises:
        TypeError: If ``target`` is neither.
        ValueError: If a site has no ``log_prob``, or the log density is noisy (a subsampled plate,
            a hidden latent site), not finite at the initial point, or cannot be evaluated for many
            vectors at once.

    Example:
        >>> def model(y):
        ...     scale = pyro.sample("scale", dist.HalfNormal(1.0))
        ...     pyro.sample("y", dist.Normal(0.0, scale).expand([3]).to_event(1), obs=y)
        >>> density = log_joint(model, torch.ones(3))
        >>> density(torch.zeros(5, 1)).shape
        torch.Size([5])
    """
    if not isinstance(target, AutoContinuous):
        if isinstance(target, pyro.infer.autoguide.AutoGuide) or not callable(target):
            raise TypeError(
                "expected a model, or a guide over one unconstrained vector (AutoContinuous), got "
                f"{type(target).__name__}"
            )
        target = AutoContinuous(target, init_loc_fn=init_to_support)
    return LogJoint(LatentSites(target, *args, **kwargs))


def known_log_joint(sites: LatentSites, z: Tensor) -> LogJoint | None:
    """Return the log joint density, or None, with a warning, where it cannot be evaluated.

    Args:
        sites: The latent sites, with the model and its arguments.
        z: Unconstrained vectors at which it has to be known, shape ``(N, D)``.
    """
    try:
        density = LogJoint(sites)
        density.check(z)
        return density
    except ValueError as error:
        warn_user(f"the guide will not be judged by importance weights: {error}")
        return None


class _NotPositiveDefinite(TorchFunctionMode):
    """Return NaN for the Cholesky factor of a matrix that has none, instead of raising."""

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        """Call a function of torch, ``torch.linalg.cholesky`` row by row."""
        if func is not torch.linalg.cholesky:
            return func(*args, **(kwargs or {}))
        factor, info = torch.linalg.cholesky_ex(*args, **(kwargs or {}))
        return torch.where((info > 0)[..., None, None], math.nan, factor)


def evaluated_safely(evaluate: Evaluate, z: Tensor) -> Tensor:
    """Return log densities, any shape, ``-inf`` where not finite or a factorisation failed."""
    try:
        values = evaluate(z)
    except torch.linalg.LinAlgError:
        with _NotPositiveDefinite():
            values = evaluate(z)
    return finite_or_minus_inf(values)


def _batching(density: LogJoint, center: Tensor) -> Batching:
    """Return the first way to evaluate many draws at once that agrees with one at a time.

    They agree at each site by itself, whose rounding would hide what is wrong at a smaller one;
    and many draws at once, where a sum over all of them, in place of one's own, goes far off; and
    beside some that are farther out, where a branch on any of them is one for all.
    """
    z, names, values, tolerances = _probes(density, center)
    far = torch.cat((center + _FAR * (z - center), center - _FAR * (z - center)))
    company = torch.cat((z, far[: max(1, density.rows - _PROBES)]))
    counts = (_PROBES - 1, _PROBES, min(_MANY, density.rows))
    indices, problems = [torch.arange(count) % _PROBES for count in counts], []
    expected = values[:, torch.cat(indices)]
    for batching in get_args(Batching):
        try:
            parts = density.parts_by(batching)
            found = torch.cat([evaluated_safely(parts, z[index]) for index in indices], 1)
            errors = (found - expected).abs().amax(1)
            with contextlib.suppress(Exception):  # far out the model may have no value
                beside = evaluated_safely(parts, company)[:, :_PROBES]
                errors = torch.maximum(errors, (beside - values).abs().amax(1))
        except Exception as failure:  # whatever a model does with shapes it does not expect
            what = str(failure).partition("\n")[0]  # Pyro adds its trace
            problems.append(f"by {batching} it fails with {type(failure).__name__}: {what}")
            continue
        if bool((errors <= tolerances).all()):
            return batching
        worst = int((errors / tolerances).argmax())
        problems.append(f"by {batching} {names[worst]} is off by {float(errors[worst]):.2g} nats")
    raise ValueError(
        "expected a model that can be evaluated for many draws at once, in a plate to the left of "
        f"its own or under torch.func.vmap, got one for which {'; '.join(problems)}. "
        f"{TO_BATCH}"
    )


def _rounding(dtype: torch.dtype) -> float:
    """Return a relative rounding: no less than in float32, in which any model may compute."""
    return max(_ROUNDING, 8 * torch.finfo(dtype).eps)


def _probes(density: LogJoint, center: Tensor) -> tuple[Tensor, list[str], Tensor, Tensor]:
    """Return draws near the initial point, and what their log densities are made of.

    Returns:
        The draws, shape ``(K, D)``; what the parts are; their values, shape ``(1 + S, K)``, by
        single runs; and how far from them values may be, shape ``(1 + S,)``.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(_PROBES, len(center), generator=generator, dtype=center.dtype).to(center)
    for scale in (0.5, 0.05, 0.005):
        z = center + scale * noise
        values = density.one_by_one(z)
        if bool(torch.isfinite(values).all()):
            break
    else:
        raise ValueError(
            "expected a finite log density near the initial point, got "
            f"{[round(v, 3) for v in values.sum(0).tolist()]}: pass another init_loc_fn to the "
            "guide"
        )
    scored = list(_scored(_checked_trace(density, z[0])))
    with seeded(1):
        torch.rand(1)
        before, others = draws(), state_of_others()
        again = density.one_by_one(z)
        is_drawn = draws() > before and _depends_on_draws(density, z[0])
        # What becomes of numbers that torch does not draw, nobody can see.
        is_drawn = is_drawn or state_of_others() != others
    if is_drawn or not torch.allclose(again.sum(0), values.sum(0), rtol=1e-6, atol=1e-6):
        raise ValueError(
            "expected a log density without noise, got two values for the same latent sites: a "
            "site that poutine.block hides, or randomness of the model's own. Marginalise hidden "
            "sites, and fix what is random"
        )
    names = ["the log-determinant", *(f"site {site['name']!r}" for site in scored)]
    counts = [z.shape[1], *(s["value"].numel() + s["log_prob"].numel() for s in scored)]
    rounding = _rounding(z.dtype)
    change = (density.one_by_one(z + rounding * noise * z) - values).abs().nan_to_num(0.0, 0.0)
    size = values.abs().amax(1) + z.new_tensor(counts)
    return z, names, values, _MARGIN * (rounding * size + change.amax(1))


def _depends_on_draws(density: LogJoint, z: Tensor) -> bool:
    """Return whether a log density at z, shape ``(D,)``, is made of numbers that its model draws.

    Two runs may draw the same, as of a rare event. Under ``torch.func.vmap`` all drawn numbers are
    batched, and so is what is computed from them.
    """
    has_lanes = []

    def parts() -> Tensor:
        values = density.parts(z)
        has_lanes.append(is_functorch_tensor(values) or not bool(values.isfinite().all()))
        return values

    with contextlib.suppress(Exception):  # of a model that branches on what it draws
        in_lanes(parts, 2)
    return has_lanes != [False]


def _checked_trace(density: LogJoint, z: Tensor) -> Nodes:
    """Return the sites at z, shape ``(D,)``, of a model whose log density is a function of z."""
    values, _ = density.sites.constrain(z)
    trace = density.trace(values)
    plates = subsampling_plates(trace)
    if plates:
        raise ValueError(
            f"expected a log density without noise, got plates {plates} that subsample: call with "
            "a model that sees all its data, or train by SVI, which can subsample"
        )
    extra = {site["name"] for site in _scored(trace) if not site["is_observed"]}
    missing = set(values) - set(trace)
    if extra or missing:
        raise ValueError(
            "expected the latent sites the guide has seen, got a model with "
            f"{sorted(extra)} besides and without {sorted(missing)}"
        )
    for name, _, real in density.sites.split(z):
        innermost = innermost_distribution(trace[name]["fn"])
        innermost = innermost_distribution(getattr(innermost, "component_distribution", innermost))
        if isinstance(innermost, (dist.VonMises, dist.SineBivariateVonMises)):
            raise ValueError(
                f"expected latent sites with a density on real numbers, got the angle {name!r}, "
                "whose density repeats with each turn: write it as "
                "pyro.sample(name, dist.Uniform(-pi, pi)) with its density as a pyro.factor, or "
                "as a direction by ProjectedNormalReparam"
            )
        check_fixed_support(name, biject(trace[name]["fn"].support)(real), values[name])
    return trace


def _scored(trace: Nodes) -> Iterator[Site]:
    """Return the sites of a trace that carry a log density."""
    return filter(is_sampled, trace.values())
