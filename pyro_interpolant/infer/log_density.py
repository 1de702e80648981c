r"""The log joint density of a model, :math:`\log p(x(z), y) + \log |dx / dz|`, of many z."""

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Literal, cast, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.infer.autoguide.initialization import InitMessenger, init_to_sample
from torch import Tensor
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode

from .._torch import seeded, warn_user
from .sites import (
    LatentSites,
    Model,
    Nodes,
    Site,
    Substitute,
    check_fixed_support,
    init_to_support,
    is_subsample,
    subsampling_plates,
    unchecked,
)
from .validity import innermost, is_valid

_PROBES = 3  # draws on which a batched evaluation is compared with single ones
_NUMBERS_AT_ONCE = 2**22  # of all sites and their log densities together, evaluated in one go

Batching = Literal["plate", "vmap"]
TO_BATCH = (  # what makes a model one of many draws at once
    "Index events from the right, x[..., i], declare batch dimensions by pyro.plate, and avoid "
    ".item(), in-place writes and branches on latent values"
)
Evaluate = Callable[[Tensor], Tensor]


class LogJoint:
    r"""The log density of a model's latent sites as one unconstrained vector, batched.

    .. math:: \ell(z) = \log p(x(z), y) + \log \left| \frac{dx}{dz} \right|

    Make one by :func:`log_joint`.

    Attributes:
        event_dim: D, the size of z.
        batching: How many draws are evaluated at once: ``"plate"``, in a plate to the left of all
            others; or ``"vmap"``, by :func:`torch.func.vmap`, for models that do not broadcast.
    """

    def __init__(self, sites: LatentSites) -> None:
        self.sites, self.model = sites, sites.model
        self.event_dim: int = sites.guide.latent_dim
        center = sites.center()
        with torch.no_grad():
            # The first with the user's own validation, which explains what is wrong.
            scored = list(_scored(_checked_trace(self, center)))
            dims = [-f.dim for s in scored for f in s["cond_indep_stack"] if f.vectorized]
            self.nesting = max([*dims, *(s["log_prob"].dim() for s in scored)])
            numbers = sum(s["value"].numel() + s["log_prob"].numel() for s in scored)
            self.rows = max(1, _NUMBERS_AT_ONCE // numbers)
            with unchecked():  # attempts may come to nothing
                self.batching: Batching = _batching(self, center)

    def __call__(self, z: Tensor) -> Tensor:
        """Return the log density, ``-inf`` where it is not a number, shape ``(N,)``.

        Args:
            z: Unconstrained vectors, shape ``(N, D)``; gradients flow to them.

        Raises:
            ValueError: If z is of another shape.
        """
        if z.dim() != 2 or z.shape[-1] != self.event_dim:
            raise ValueError(f"expected z of shape (N, {self.event_dim}), got {tuple(z.shape)}")
        evaluate = self.by(self.batching)
        with pyro.validation_enabled(is_validate=False):
            return torch.cat([nan_to_minus_inf(evaluate, part) for part in z.split(self.rows)])

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """Return the latent sites, each ``(N, *site_shape)``, of vectors of shape ``(N, D)``."""
        return self.sites.unpack(z)

    def pack(self, draws: Mapping[str, object]) -> Tensor:
        """Return vectors, shape ``(N, D)``, of draws of all sites, each ``(N, *site_shape)``.

        Raises:
            ValueError: If a site is missing, of another shape, or outside its support.
        """
        return self.sites.pack(draws)

    def by(self, batching: Batching) -> Evaluate:
        """Return a function from z, ``(N, D)``, to log densities, ``(N,)``, all in one run."""
        each = torch.func.vmap(self.single, randomness="same")
        return self.by_plate if batching == "plate" else each

    def by_plate(self, z: Tensor) -> Tensor:
        """Return the log density, shape ``(N,)``, of z, ``(N, D)``, in an outermost plate."""
        values, total = self.sites.constrain(z.reshape(len(z), *(1,) * self.nesting, -1))
        for site in _scored(self.trace(values, len(z))):
            log_prob = _where_valid(site, self.sites.shapes)
            if log_prob.dim() > self.nesting + 1:
                raise ValueError(f"site {site['name']!r} has a shape that the plate does not know")
            if log_prob.dim() <= self.nesting:  # not a function of z
                log_prob = log_prob.sum().expand(len(z))
            total = total + log_prob.reshape(log_prob.shape[0], -1).sum(-1)
        return total

    def single(self, z: Tensor) -> Tensor:
        """Return the log density, a scalar, of one vector, shape ``(D,)``."""
        values, total = self.sites.constrain(z)
        for site in _scored(self.trace(values)):
            total = total + _where_valid(site, self.sites.shapes).sum()
        return total

    def one_by_one(self, z: Tensor) -> Tensor:
        """Return the log density, shape ``(N,)``, of z, ``(N, D)``, by N runs of the model."""
        return torch.stack([nan_to_minus_inf(self.single, row) for row in z])

    def trace(self, values: dict[str, Tensor], count: int | None = None) -> Nodes:
        """Return the sites of the model, with log densities, at values ``(*, *site_shape)``.

        Args:
            values: The latent sites.
            count: The number of draws they hold, to the left of all plates; None for a single one.
        """

        def run() -> None:
            with contextlib.nullcontext() if count is None else self.plate(count):
                with Substitute(values):
                    self.model()

        with poutine.block():
            trace = poutine.trace(run).get_trace()  # whose errors show the shapes of all sites
            trace.compute_log_prob()
        return cast("Nodes", trace.nodes)

    def plate(self, count: int) -> pyro.plate:
        """Return a plate of draws to the left of all plates of the model."""
        return pyro.plate("_draws", count, dim=-1 - self.nesting)


def log_joint(target: AutoContinuous | Model, *args: object, **kwargs: object) -> LogJoint:
    r"""Return the log joint density of a model as a function of unconstrained vectors.

    The function takes many vectors at once: with the model in a plate to the left of all its
    plates, as Pyro's vectorised particles, where that gives the values it has one by one; else
    under :func:`torch.func.vmap`, for models that index or loop over their values. Masks, scales
    and factors count; deterministic sites do not.

    Args:
        target: A model, or an :class:`~pyro.infer.autoguide.AutoContinuous` guide of it.
        *args: The arguments of the model.
        **kwargs: Its named arguments.

    Returns:
        A function from z, shape ``(N, D)``, to log densities, shape ``(N,)``, differentiable in z;
        ``pack`` and ``unpack`` translate between z and sites.

    Raises:
        TypeError: If ``target`` is neither.
        ValueError: If the log density is noisy (a subsampled plate, a hidden latent site), not
            finite at the initial point, or cannot be evaluated for many vectors at once.

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


def known_log_joint(sites: LatentSites) -> LogJoint | None:
    """Return the log joint density, or None, with a warning, where it cannot be evaluated."""
    try:
        return LogJoint(sites)
    except (ValueError, NotImplementedError) as error:
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


def nan_to_minus_inf(evaluate: Evaluate, z: Tensor) -> Tensor:
    """Return log densities, shape ``(N,)``, with ``-inf`` for NaN and failed factorisations."""
    try:
        values = evaluate(z)
    except torch.linalg.LinAlgError:
        with _NotPositiveDefinite():
            values = evaluate(z)
    return torch.where(torch.isnan(values), -math.inf, values)


def _batching(density: LogJoint, center: Tensor) -> Batching:
    """Return the first way to evaluate many draws at once that agrees with one at a time."""
    z, values = _probes(density, center)
    expected = torch.cat((values[:-1], values))
    tolerance = 1e-6 if z.dtype == torch.float64 else 1e-3
    problems = []
    for batching in get_args(Batching):
        try:
            sizes = (len(z) - 1, len(z))
            found = torch.cat([nan_to_minus_inf(density.by(batching), z[:k]) for k in sizes])
            error = float(((found - expected) / (1 + expected.abs())).abs().max())
        except Exception as failure:  # whatever a model does with shapes it does not expect
            what = str(failure).partition("\n")[0]  # Pyro adds its trace
            problems.append(f"by {batching} it fails with {type(failure).__name__}: {what}")
            continue
        if error <= tolerance:
            return batching
        problems.append(f"by {batching} its log density is wrong by {error:.2g}, relatively")
    raise ValueError(
        "expected a model that can be evaluated for many draws at once, in a plate to the left of "
        f"its own or under torch.func.vmap, got one for which {'; '.join(problems)}. "
        f"{TO_BATCH}"
    )


def _probes(density: LogJoint, center: Tensor) -> tuple[Tensor, Tensor]:
    """Return draws near the initial point, shape ``(K, D)``, and their log densities, ``(K,)``."""
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
            f"{[round(v, 3) for v in values.tolist()]}: pass another init_loc_fn to the guide"
        )
    _checked_trace(density, z[0])
    with seeded(1):
        torch.rand(1)
        again = density.one_by_one(z)
    if not torch.allclose(again, values, rtol=1e-6, atol=1e-6):
        raise ValueError(
            "expected a log density without noise, got two values for the same latent sites: a "
            "site that poutine.block hides, or randomness of the model's own. Marginalise hidden "
            "sites, and fix what is random"
        )
    return z, values


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
        if isinstance(innermost(trace[name]["fn"]), (dist.VonMises, dist.SineBivariateVonMises)):
            raise ValueError(
                f"expected latent sites with a density on real numbers, got the angle {name!r}, "
                "whose density repeats with each turn: write it as "
                "pyro.sample(name, dist.Uniform(-pi, pi)) with its density as a pyro.factor, or "
                "as a direction by ProjectedNormalReparam"
            )
        check_fixed_support(name, biject_to(trace[name]["fn"].support)(real), values[name])
    return trace


def _where_valid(site: Site, latents: Collection[str]) -> Tensor:
    """Return a site's log density, shape ``(*)``, ``-inf`` where it is that of nothing."""
    value = None if site["name"] in latents else site["value"]  # those come from the support
    valid, mask, log_prob = is_valid(site["fn"], value), site["mask"], site["log_prob"]
    if valid is None or mask is False:
        return log_prob
    if isinstance(mask, Tensor):
        valid = valid | ~mask
    return torch.where(valid, log_prob, -math.inf)


def _scored(trace: Nodes) -> Iterator[Site]:
    """Yield the sites of a trace that carry a log density."""
    for site in trace.values():
        if site["type"] == "sample" and not is_subsample(site):
            if not site["infer"].get("_deterministic"):
                yield site


_RARE = 0.005  # the share of prior draws on either side that is clamped to the rest
_IMPROPER_SCALE = 2.0  # of unconstrained sites with an improper prior


def prior_draws(density: LogJoint, count: int) -> Tensor | None:
    """Return unconstrained draws of the prior, ``(<= count, D)``, or None where there are none.

    Sites with an improper prior are drawn widely; the rarest 1% is clamped to the rest, for priors
    without moments.
    """
    init = functools.partial(init_to_support, init=init_to_sample, spread=_IMPROPER_SCALE)

    def draw(*batch: int) -> Tensor:
        with poutine.block(), poutine.trace() as tracer, InitMessenger(init):
            with density.plate(*batch) if batch else contextlib.nullcontext():
                density.model()
        parts = [
            biject_to(support).inv(tracer.trace.nodes[name]["value"]).reshape(*batch, -1)
            for name, (_, support) in density.sites.sites.items()
        ]
        return torch.cat(parts, dim=-1)

    try:
        with torch.no_grad(), unchecked():
            if density.batching == "plate":
                z = draw(count)
            else:
                single = torch.func.vmap(lambda _: draw(), randomness="different")
                z = single(torch.zeros(count))
    except (RuntimeError, ValueError, NotImplementedError):  # a prior that cannot be sampled
        return None
    return without_extremes(z)


def without_extremes(z: Tensor) -> Tensor | None:
    """Return finite draws, shape ``(<= N, D)``, the rarest 1% clamped to the rest.

    Args:
        z: Draws, shape ``(N, D)``.

    Returns:
        The draws, or None where at most half are finite.
    """
    count = len(z)
    z = z[torch.isfinite(z).all(-1)]
    if len(z) <= count // 2:
        return None
    low, high = torch.quantile(z, z.new_tensor([_RARE, 1 - _RARE]), dim=0)
    return torch.maximum(low, torch.minimum(z, high))
