r"""A model's log joint density as a function of unconstrained vectors, many at a time."""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoContinuous
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to
from torch.overrides import TorchFunctionMode

from .sites import Initial, Placed, bare_model, pack_sites, set_up, unpack_sites

__all__ = ["LogJoint", "log_joint", "prior_draws"]


_CHECKED = 3  # draws on which the ways to evaluate are compared
_ELEMENTS = 2**22  # of all sites together, evaluated at once


class LogJoint:
    r"""The log density of a model's latent sites as one unconstrained vector, batched.

    .. math:: \ell(z) = \log p(x(z), y) + \log \left| \frac{dx}{dz} \right|

    Make one by :func:`log_joint`.

    Attributes:
        dim: D, the size of z.
        way: How many draws are evaluated at once: ``"plate"``, in a plate to the left of all
            others; or ``"vmap"``, by :func:`torch.func.vmap`, for models that do not broadcast.
    """

    def __init__(
        self, guide: AutoContinuous, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        self.guide, self.args, self.kwargs = guide, args, kwargs
        self.model = bare_model(guide.model)
        self.dim: int = guide.latent_dim
        center = guide._init_loc()
        with torch.no_grad():
            # The first with the user's own validation, which explains what is wrong.
            sites = list(_scored(_checked_trace(self, center)))
            dims = [-f.dim for s in sites for f in s["cond_indep_stack"] if f.vectorized]
            self.nesting = max([*dims, *(s["log_prob"].dim() for s in sites)])
            elements = sum(s["value"].numel() + s["log_prob"].numel() for s in sites)
            self.rows = max(1, _ELEMENTS // elements)
            with pyro.validation_enabled(False), warnings.catch_warnings():  # noqa: FBT003
                warnings.simplefilter("ignore")  # of attempts that may come to nothing
                self.way: Literal["plate", "vmap"] = _way(self, center)

    def __call__(self, z: Tensor) -> Tensor:
        """Return the log density, ``-inf`` where it is not a number, shape ``(N,)``.

        Args:
            z: Unconstrained vectors, shape ``(N, D)``; gradients flow to them.

        Raises:
            ValueError: If z is of another shape.
        """
        if z.dim() != 2 or z.shape[-1] != self.dim:
            raise ValueError(f"expected z of shape (N, {self.dim}), got {tuple(z.shape)}")
        evaluate = self.by_plate if self.way == "plate" else self.by_vmap
        with pyro.validation_enabled(False):  # noqa: FBT003
            return torch.cat([_lenient(evaluate, part) for part in z.split(self.rows)])

    def unpack(self, z: Tensor) -> dict[str, Tensor]:
        """Return the latent sites, each ``(N, *site_shape)``, of vectors of shape ``(N, D)``."""
        return unpack_sites(self.guide, z)

    def pack(self, draws: Mapping[str, Any]) -> Tensor:
        """Return vectors, shape ``(N, D)``, of draws of all sites, each ``(N, *site_shape)``.

        Raises:
            ValueError: If a site is missing, of another shape, or outside its support.
        """
        return pack_sites(self.guide, draws)

    def by_plate(self, z: Tensor) -> Tensor:
        """Return the log density, shape ``(N,)``, of z, ``(N, D)``, in an outermost plate."""
        values, total = self.constrained(z.reshape(len(z), *(1,) * self.nesting, -1))
        for site in _scored(self.trace(values, len(z))):
            log_prob = site["log_prob"]
            if log_prob.dim() > self.nesting + 1:
                raise ValueError(f"site {site['name']!r} has a shape that the plate does not know")
            if log_prob.dim() <= self.nesting:  # not a function of z
                log_prob = log_prob.sum().expand(len(z))
            total = total + log_prob.reshape(log_prob.shape[0], -1).sum(-1)
        return total

    def by_vmap(self, z: Tensor) -> Tensor:
        """Return the log density, shape ``(N,)``, of z, ``(N, D)``, draw by draw in one batch."""
        return torch.func.vmap(self.single, randomness="same")(z)

    def single(self, z: Tensor) -> Tensor:
        """Return the log density, a scalar, of one vector, shape ``(D,)``."""
        values, total = self.constrained(z)
        for site in _scored(self.trace(values)):
            total = total + site["log_prob"].sum()
        return total

    def trace(self, values: dict[str, Tensor], count: int | None = None) -> Any:
        """Return the model's trace, with log densities, at values by site, ``(*, *site_shape)``.

        Args:
            values: The latent sites.
            count: The number of draws they hold, to the left of all plates; None for a single one.
        """

        def run() -> None:
            draws: Any = contextlib.nullcontext()
            if count is not None:
                draws = pyro.plate("_draws", count, dim=-1 - self.nesting)
            with draws:
                Placed(values)(self.model)(*self.args, **self.kwargs)

        with poutine.block():
            trace = poutine.trace(run).get_trace()
            trace.compute_log_prob()
        return trace

    def constrained(self, latent: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return values by site and the log-determinant, ``(N)``, of ``(N, 1, .., 1, D)``."""
        values, total = {}, latent.new_zeros(latent.shape[:1] if latent.dim() > 1 else ())
        for site, real in self.guide._unpack_latent(latent):
            transform = biject_to(site["fn"].support)
            value = transform(real)
            rate = transform.log_abs_det_jacobian(real, value)
            total = total + rate.reshape(*total.shape, -1).sum(-1)
            values[site["name"]] = value
        return values, total


def log_joint(target: Any, *args: Any, **kwargs: Any) -> LogJoint:
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
        target = AutoContinuous(target, init_loc_fn=Initial())
    set_up(target, *args, **kwargs)
    return LogJoint(target, args, kwargs)


class _NotPositiveDefinite(TorchFunctionMode):
    """Let a Cholesky factor be NaN where there is none, instead of failing for all draws."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch, ``torch.linalg.cholesky`` row by row."""
        if func is not torch.linalg.cholesky:
            return func(*args, **(kwargs or {}))
        factor, info = torch.linalg.cholesky_ex(*args, **(kwargs or {}))
        return torch.where((info > 0)[..., None, None], math.nan, factor)


def _lenient(evaluate: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Return log densities, shape ``(N,)``, ``-inf`` where there is none."""
    try:
        values = evaluate(z)
    except torch.linalg.LinAlgError:
        with _NotPositiveDefinite():
            values = evaluate(z)
    return torch.where(torch.isnan(values), -math.inf, values)


def _way(density: LogJoint, center: Tensor) -> Literal["plate", "vmap"]:
    """Return the first way to evaluate many draws at once that agrees with one at a time."""
    z, expected = _probes(density, center)
    tolerance = 1e-6 if z.dtype == torch.float64 else 1e-3
    problems = []
    ways: tuple[Literal["plate", "vmap"], ...] = ("plate", "vmap")
    for way in ways:
        evaluate = density.by_plate if way == "plate" else density.by_vmap
        try:
            error = max(
                float(((_lenient(evaluate, z[:k]) - e) / (1 + e.abs())).abs().max())
                for k, e in ((len(z) - 1, expected[:-1]), (len(z), expected))
            )
        except Exception as failure:  # whatever a model does with shapes it does not expect
            what = str(failure).partition("\n")[0]  # Pyro adds its trace
            problems.append(f"by {way} it fails with {type(failure).__name__}: {what}")
            continue
        if error <= tolerance:
            return way
        problems.append(f"by {way} its log density is wrong by {error:.2g}, relatively")
    raise ValueError(
        "expected a model that can be evaluated for many draws at once, in a plate to the left of "
        f"its own or under torch.func.vmap, got one for which {'; '.join(problems)}. Index "
        "events from the right, x[..., i], declare batch dimensions by pyro.plate, and avoid "
        ".item(), in-place writes and branches on latent values"
    )


def _probes(density: LogJoint, center: Tensor) -> tuple[Tensor, Tensor]:
    """Return draws near the initial point, shape ``(K, D)``, and their log densities, ``(K,)``."""
    noise = torch.randn(
        _CHECKED, density.dim, generator=torch.Generator().manual_seed(0), dtype=center.dtype
    ).to(center)
    for scale in (0.5, 0.05, 0.005):
        z = center + scale * noise
        values = torch.stack([_lenient(density.single, row) for row in z])
        if bool(torch.isfinite(values).all()):
            break
    else:
        raise ValueError(
            "expected a finite log density near the initial point, got "
            f"{[round(v, 3) for v in values.tolist()]}: pass another init_loc_fn to the guide"
        )
    _checked_trace(density, z[0])
    with torch.random.fork_rng(devices=[] if z.device.type == "cpu" else [z.device]):
        torch.rand(1)
        again = torch.stack([_lenient(density.single, row) for row in z])
    if not torch.allclose(again, values, rtol=1e-6, atol=1e-6):
        raise ValueError(
            "expected a log density without noise, got two values for the same latent sites: a "
            "site that poutine.block hides, or randomness of the model's own. Marginalise hidden "
            "sites, and fix what is random"
        )
    return z, values


def _checked_trace(density: LogJoint, z: Tensor) -> Any:
    """Return the trace at z, shape ``(D,)``, of a model whose log density is a function of z."""
    values, _ = density.constrained(z)
    trace = density.trace(values)
    plates = [
        name
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site_is_subsample(site)
        and (site["fn"].subsample_size or site["fn"].size) < site["fn"].size
    ]  # fmt: skip
    if plates:
        raise ValueError(
            f"expected a log density without noise, got plates {plates} that subsample: call with "
            "a model that sees all its data, or train by SVI, which can subsample"
        )
    extra = {site["name"] for site in _scored(trace) if not site["is_observed"]}
    missing = set(values) - set(trace.nodes)
    if extra or missing:
        raise ValueError(
            "expected the latent sites the guide has seen, got a model with "
            f"{sorted(extra)} besides and without {sorted(missing)}"
        )
    for site, real in density.guide._unpack_latent(z):
        now = biject_to(trace.nodes[site["name"]]["fn"].support)(real)
        if not torch.allclose(now, values[site["name"]], rtol=1e-4):
            raise ValueError(
                f"expected site {site['name']!r} to have a fixed support, got one that depends on "
                "other sites: sample it on a fixed support and transform it"
            )
    return trace


def _scored(trace: Any) -> Iterator[Any]:
    """Yield the sites of a trace that carry a log density."""
    for site in trace.nodes.values():
        if site["type"] == "sample" and not site_is_subsample(site):
            if not site["infer"].get("_deterministic"):
                yield site


_PRIOR = 4096  # draws the search starts from
_RARE = 0.005  # the share of prior draws on either side that counts as less far
_WIDE = 2.0  # the scale of unconstrained sites with an improper prior


def prior_draws(density: LogJoint, count: int) -> Tensor | None:
    """Return unconstrained draws of the prior, ``(<= count, D)``, or None where there are none.

    Sites with an improper prior are drawn widely; the rarest 1% is drawn in, for priors without
    moments.
    """

    def run() -> None:
        with pyro.plate("_draws", count, dim=-1 - density.nesting):
            density.model(*density.args, **density.kwargs)

    def packed(model: Any, lead: tuple[int, ...]) -> Tensor:
        with poutine.block(), _FromPrior():
            trace = poutine.trace(model).get_trace()
        parts = [
            biject_to(site["fn"].support).inv(trace.nodes[name]["value"]).reshape(*lead, -1)
            for name, site in density.guide.prototype_trace.iter_stochastic_nodes()
        ]
        return torch.cat(parts, dim=-1)

    def single(_: Tensor) -> Tensor:
        return packed(lambda: density.model(*density.args, **density.kwargs), ())

    try:
        with torch.no_grad(), pyro.validation_enabled(False), warnings.catch_warnings():  # noqa: FBT003
            warnings.simplefilter("ignore")  # some samplers loop under vmap, once
            if density.way == "plate":
                z = packed(run, (count,))
            else:
                z = torch.func.vmap(single, randomness="different")(torch.zeros(count))
    except (RuntimeError, ValueError, NotImplementedError):  # a prior that cannot be sampled
        return None
    z = z[torch.isfinite(z).all(-1)]
    if len(z) <= count // 2:
        return None
    low, high = torch.quantile(z, z.new_tensor([_RARE, 1 - _RARE]), dim=0)
    return torch.maximum(low, torch.minimum(z, high))


class _FromPrior(Messenger):
    """Draw latent sites from their priors; those that cannot be sampled, widely."""

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is not None or site_is_subsample(msg):
            return
        fn = msg["fn"]
        try:
            msg["value"] = fn.sample()
        except NotImplementedError:
            transform = biject_to(fn.support)
            shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
            msg["value"] = transform(_WIDE * torch.randn(shape))
