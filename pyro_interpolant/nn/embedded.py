r"""A velocity given data: a network that embeds the data once, and one that moves states.

The data y of a context are summarised in closed form, :math:`s(y)`, and embedded by a network that
is trained along, :math:`e(y)`. Two linear regressions on s give the states given y a mean and
deviations of their own,

.. math:: m = a + A\, s(y), \quad \log \sigma = b + B\, s(y),

and a velocity moves draws of N(0, I) to :math:`N(m, \sigma^2)` before anything is learned; the
network u corrects it:

.. math:: v_t(x \mid y) = \mu_t' + \tau_t' z + \tau_t\, u_t(z, e(y)), \quad
          z = (x - \mu_t) / \tau_t, \quad \mu_t = \sin(\pi t / 2)\, m, \quad
          \tau_t^2 = \cos^2(\pi t / 2) + \sin^2(\pi t / 2)\, \sigma^2 .

So u has nothing to learn where x given y is Gaussian, and its mean and the logarithms of its
deviations are linear in s; and it sees narrow and wide posteriors in the same units. None of m,
:math:`\sigma` and e depends on time or state: they are computed once per row of data.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .embedding import KINDS, SIZE, dense, setter_of_scales
from .mlp import VelocityMLP
from .modes import evaluated
from .record import MovedRecord, Record, by_row
from .velocity import StateFunction, fixed_weights, location_and_scale, own_method

_HEAD_WIDTH = 128
MOST_SUMMARIES = 1024  # that a regression takes: beyond, its matrix takes long to decompose
# Of few rows, which it would learn by heart, the head drops this share of its units in training;
# of more, so many over their number. Nats on slcp (on two_moons): 0.31 (0.14) more at 900 rows, at
# 2,700 0.25 (-0.04), at 9,000 a share of 0.2 costs 0.35; and drawing makes steps a fifth slower.
_MOST_DROPPED, _DROPPED, _LEAST_DROPPED = 0.2, 200.0, 0.05
# Of training's times 1 - (1 - u)^p. Nats over the prior, 10,000 simulations, p = 1, 2 and 3: slcp
# 4.03, 4.76, 5.05, two_moons 4.79, 5.06, 5.07, gaussian_mixture 4.62, 4.86, 4.88.
_TIME_EXPONENT = 3.0
_PENALTIES = torch.logspace(-8, 2, 41, dtype=torch.float64)  # of the ridge, to the mean eigenvalue
_SHARES = torch.linspace(0, 1, 21, dtype=torch.float64)  # of slopes of log-deviations
_LEAST = 1e-6  # of a residual: its logarithm is finite
# Of a range. 10% of new sets of 100 normal numbers leave that of 2,000 sets, 0.06% by so much.
_MARGIN = 0.2


class EmbeddedVelocity(nn.Module):
    r"""A velocity :math:`v_t(x \mid y)` given data y, which are embedded once per row.

    A context holds the parts of the data, flattened, one after the other. :meth:`embed` turns it
    into what the network takes; :meth:`forward` and the others expect that. Trained on fewer than
    4,000 rows, the network e drops some of its units in each step.

    Args:
        event_dim: D, the size of the last dimension of x.
        shapes: The shape of each part of the data.
        embedding: A module that is called with the parts, each ``(N, *shape)``, and returns
            ``(N, E)``, trained along. Where it has ``summary``, called alike, that gives the
            columns ``(N, S)`` of the regressions; where it has ``forward_and_summary``, that gives
            both at once, unless a subclass overrides one of them alone. By default there is none,
            and the columns are all numbers of the data.
        hidden_dims: The widths of the velocity's hidden layers, as in :class:`VelocityMLP`.

    Raises:
        ValueError: If a size is not positive, or the embedding does not return ``(N, E)``.

    Example:
        >>> from pyro_interpolant.nn import SetEmbedding
        >>> velocity = EmbeddedVelocity(2, [(5, 3)], SetEmbedding(3), hidden_dims=(32, 32))
        >>> context = velocity.embed(torch.randn(10, 15))
        >>> velocity(torch.tensor(0.3), torch.randn(10, 2), context).shape
        torch.Size([10, 2])
    """

    broadcasts_time = True
    is_periodic = False
    time_exponent = _TIME_EXPONENT

    loc: Tensor
    scale: Tensor
    bounds: Tensor
    slope: Tensor
    offset: Tensor
    log_slope: Tensor
    log_offset: Tensor
    log_bounds: Tensor
    dropped: Tensor

    def __init__(
        self,
        event_dim: int,
        shapes: Sequence[Sequence[int]],
        embedding: nn.Module | Sequence[Any] | None = None,
        hidden_dims: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.event_dim = int(event_dim)
        self.shapes = tuple(torch.Size(shape) for shape in shapes)
        self.context_dim = sum(shape.numel() for shape in self.shapes)
        if not self.context_dim:
            raise ValueError(f"expected data of at least one number, got shapes {shapes}")
        if not isinstance(embedding, nn.Module | None):  # as files hold those of the package
            embedding = KINDS[embedding[0]](*embedding[1])
        self.embedding: nn.Module | None = embedding
        with torch.no_grad():
            like = next(self.parameters(), torch.zeros(()))
            features = self._features(like.new_zeros(2, self.context_dim))
        sizes = [part.shape[1] for part in features if part is not None]
        columns = sizes[0]
        self.head = dense(sum(sizes), _HEAD_WIDTH, SIZE).to(like)
        self.network = VelocityMLP(event_dim, hidden_dims, sum(sizes) + SIZE).to(like)
        self.register_buffer("loc", like.new_zeros(columns))
        self.register_buffer("scale", like.new_ones(columns))
        self.register_buffer("bounds", torch.full((2, columns), math.inf).to(like))
        self.register_buffer("slope", like.new_zeros(event_dim, columns))
        self.register_buffer("offset", like.new_zeros(event_dim))
        self.register_buffer("log_slope", like.new_zeros(event_dim, columns))
        self.register_buffer("log_offset", like.new_zeros(event_dim))
        self.register_buffer("log_bounds", like.new_zeros(2, event_dim))
        self.register_buffer("dropped", like.new_zeros(()))  # the share of units, in training

    def arguments(self) -> tuple[Any, ...] | None:
        """Return the arguments of the constructor; None with an embedding of the user's own."""
        embedding: Any = self.embedding
        if embedding is not None:
            if type(embedding) not in KINDS.values():
                return None
            embedding = [type(embedding).__name__, embedding.arguments()]
        return self.event_dim, self.shapes, embedding, self.network.hidden_dims

    def embed(self, context: Tensor) -> Tensor:
        r"""Return m, :math:`\log \sigma` and e, shape ``(*, 2 D + E)``.

        Args:
            context: Data, flattened, shape ``(*, C)``.
        """
        flat = context.reshape(-1, self.context_dim)
        summary, embedded = self._features(flat)
        s = self._standard(summary)
        features = s if embedded is None else torch.cat((s, embedded), -1)
        m = self.offset + s @ self.slope.T
        log_scale = (self.log_offset + s @ self.log_slope.T).clamp(*self.log_bounds)
        found = torch.cat((m, log_scale, features, self._head(features)), -1)
        return found.reshape(*context.shape[:-1], found.shape[-1])

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity, shape ``(*, D)``.

        Args:
            t: Times, broadcastable to ``(*)``.
            x: States, shape ``(*, D)``.
            context: Embedded data, broadcastable to ``(*, 2 D + E)``.

        Raises:
            ValueError: If the context is missing or of another size.
        """
        m, log_scale, e = self._parts(context)
        path = _gaussian_path(t[..., None], m, log_scale)
        z = path.standard(x)
        return path.velocity(z, self.network(t, z, e))

    def forward_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity, shape ``(*, D)``, and its exact divergence, shape ``(*)``.

        Args:
            t: Times, broadcastable to ``(*)``.
            x: States, shape ``(*, D)``.
            context: Embedded data, broadcastable to ``(*, 2 D + E)``.

        Raises:
            ValueError: If the context is missing or of another size.
        """
        m, log_scale, e = self._parts(context)
        path = _gaussian_path(t[..., None], m, log_scale)
        z = path.standard(x)
        u, divergence = self.network.forward_and_divergence(t, z, e)
        return path.velocity(z, u), path.divergence(divergence)

    def field(self, times: Tensor, context: Tensor | None = None) -> list[StateFunction]:
        """Return one function ``x -> v`` per time, what they share computed once.

        Args:
            times: Times, shape ``(T,)``.
            context: Embedded data, broadcastable to ``(*, 2 D + E)``.
        """
        paths, e = self._paths(times, context)
        own = zip(paths, self.network.field(times, e), strict=True)
        return [partial(_moved, path=p, function=f) for p, f in own]

    def record(self, times: Tensor, x: Tensor, context: Tensor | None = None) -> Record | None:
        """Return a record of evaluations at the times, or None where autograd is as fast.

        Args:
            times: Times, shape ``(T,)``.
            x: States, shape ``(*, D)``; those of the evaluations are like them.
            context: Embedded data, broadcastable to ``(*, 2 D + E)``.
        """
        m, log_scale, e = self._parts(context)
        inner = self.network.record(times, x, e)
        if inner is None:
            return None
        path = _gaussian_path(times.reshape(-1, *(1,) * m.dim()), m, log_scale)
        return MovedRecord(inner, *(by_row(part, x.shape[:-1]) for part in path))

    def divergence_field(
        self, times: Tensor, context: Tensor | None = None
    ) -> list[StateFunction]:
        """Return one function ``x -> divergence`` per time, what they share computed once.

        Args:
            times: Times, shape ``(T,)``.
            context: Embedded data, broadcastable to ``(*, 2 D + E)``.
        """
        paths, e = self._paths(times, context)
        own = zip(paths, self.network.divergence_field(times, e), strict=True)
        return [partial(_spread, path=p, function=f) for p, f in own]

    @torch.no_grad()
    def is_beyond(self, context: Tensor) -> Tensor:
        """Return whether data have a summary far beyond all of training, booleans, ``(*)``.

        Args:
            context: Data, flattened, shape ``(*, C)``.
        """
        s = self._scaled(self._summary(context.reshape(-1, self.context_dim)))
        low, high = self.bounds
        margin = _MARGIN * (low + high) + 100 * torch.finfo(s.dtype).eps * self._scaled(0.0).abs()
        return ((s - high > margin) | (-s - low > margin)).any(-1).reshape(context.shape[:-1])

    def rows_at_once(self) -> int:
        """Return the number of rows for which one call is fastest, without gradients."""
        return self.network.rows_at_once()

    def is_untrained(self) -> bool:
        """Return whether the last layer is zero, as it starts."""
        return self.network.is_untrained()

    def untrained_copy(self) -> VelocityMLP:
        """Return an untrained network of the same shape that takes embedded data."""
        size = 2 * self.event_dim + self.network.context_dim
        new = VelocityMLP(self.event_dim, self.network.hidden_dims, size).to(self.slope)
        new.reach.copy_(self.network.reach)
        return new

    @torch.no_grad()
    def explained(self, w: Tensor, context: Tensor) -> Tensor:
        """Return the part of rows that is linear in the summary of their data, ``(N, D)``.

        Args:
            w: Rows, shape ``(N, D)``.
            context: Their data, flattened, shape ``(N, C)``.
        """
        s = self._set_summary(context).to(w)
        return s @ _Ridge(s)(w - w.mean(0)).T.to(w)

    @torch.no_grad()
    def set_scales(self, w: Tensor, context: Tensor | None = None) -> None:
        """Set regressions and scales from training rows.

        Args:
            w: Whitened rows, shape ``(N, D)``.
            context: Their data, flattened, shape ``(N, C)``.
        """
        if context is None:
            return
        s, w = self._set_summary(context).double(), w.double()
        known = (self.slope, self.offset, self.log_slope, self.log_offset)
        for own, found in zip(known, _regressions(s, w), strict=True):
            own.copy_(found)
        log_scale = self.log_offset + s.to(self.slope) @ self.log_slope.T
        self.log_bounds.copy_(torch.stack(log_scale.aminmax(dim=0)))
        with evaluated(self):
            m, log_scale, e = self._parts(self.embed(context.to(self.slope)))
        self.network.set_scales((w.to(m) - m) / log_scale.exp(), e)
        share = min(_MOST_DROPPED, _DROPPED / len(w))
        self.dropped.fill_(share if share >= _LEAST_DROPPED else 0.0)

    def _set_summary(self, context: Tensor) -> Tensor:
        """Set the scales of embedding and summary from data, ``(N, C)``; return it, ``(N, S)``."""
        is_fixed = any(name.startswith("embedding.") for name in fixed_weights(self))
        own = setter_of_scales(self.embedding, is_fixed=is_fixed)
        if own is not None:
            own(*self._split(context.to(self.slope)))
        summary = self._summary(context.to(self.slope))
        if not len(self.loc):  # no columns, of which torch takes no deviations
            return summary
        loc, scale = location_and_scale(summary)
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        self.bounds.fill_(math.inf)
        s = self._standard(summary)
        self.bounds.copy_(torch.stack((-s.amin(0), s.amax(0))))
        return s

    def _summary(self, context: Tensor) -> Tensor:
        """Return the summary of data, shape ``(N, C)``, as they are: ``(N, S)``."""
        if self.embedding is None:
            return context
        own = getattr(self.embedding, "summary", None)
        return context[:, :0] if own is None else own(*self._split(context))

    def _standard(self, summary: Tensor) -> Tensor:
        """Return summaries, ``(N, S)``, in units of the training rows' and within their range.

        A summary beyond all that was seen would carry the regression where nothing was learned.
        """
        s = self._scaled(summary)
        return torch.maximum(torch.minimum(s, self.bounds[1]), -self.bounds[0])

    def _scaled(self, summary: Tensor | float) -> Tensor:
        """Return summaries, ``(N, S)``, in units of the training rows'."""
        return (summary - self.loc) / self.scale

    def _head(self, features: Tensor) -> Tensor:
        """Return what the head makes of features, ``(N, F)``, and in training of some units."""
        if not self.training or not self.dropped:
            return self.head(features)
        share, e = float(self.dropped), features
        for layer in self.head:
            e = layer(e)
            if isinstance(layer, nn.SiLU):
                e = nn.functional.dropout(e, share)
        return e

    def _features(self, flat: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the summary of data, ``(N, C)``, and their embedding or None, ``(N, *)``."""
        if self.embedding is None:
            return flat, None
        parts = self._split(flat)
        both = own_method(self.embedding, "forward_and_summary", "forward", "summary")
        if both is None:
            found, summary = self.embedding(*parts), self._summary(flat)
        else:
            found, summary = both(*parts)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(flat):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"expected an embedding that returns (N, E) of data of shapes "
                f"{[('N', *shape) for shape in self.shapes]}, got {got}"
            )
        return summary, found

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Return the parts of the data, each ``(N, *shape)``, of shape ``(N, C)`` together."""
        parts = flat.split([shape.numel() for shape in self.shapes], dim=-1)
        return [p.reshape(-1, *shape) for p, shape in zip(parts, self.shapes, strict=True)]

    def _parts(self, context: Tensor | None) -> list[Tensor]:
        r"""Return m and :math:`\log \sigma`, shape ``(*, D)``, and e, ``(*, E)``."""
        sizes = [self.event_dim, self.event_dim, self.network.context_dim]
        size = sum(sizes)
        if context is None or context.shape[-1] != size:
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ValueError(
                f"expected embedded data of shape (*, {size}), as embed(context) returns, got "
                f"{got}"
            )
        return list(context.split(sizes, dim=-1))

    def _paths(
        self, times: Tensor, context: Tensor | None
    ) -> tuple[list["_GaussianPath"], Tensor]:
        """Return the path at each of the times, shape ``(T,)``, and e, shape ``(*, E)``."""
        m, log_scale, e = self._parts(context)
        found = _gaussian_path(times.reshape(-1, *(1,) * m.dim()), m, log_scale)
        return [_GaussianPath(*parts) for parts in zip(*found, strict=True)], e


class _GaussianPath(NamedTuple):
    """The path from N(0, I) to a Gaussian at some times, each ``(*, D)``.

    Attributes:
        place: Its mean.
        rate: The rate of the mean.
        scale: Its deviations.
        growth: The rate of their logarithms.
    """

    place: Tensor
    rate: Tensor
    scale: Tensor
    growth: Tensor

    def standard(self, x: Tensor) -> Tensor:
        """Return states x, shape ``(*, D)``, in units of the path: z, of the same shape."""
        return (x - self.place) / self.scale

    def velocity(self, z: Tensor, u: Tensor) -> Tensor:
        """Return the velocity of states at z, shape ``(*, D)``, where z moves by u beside."""
        return self.rate + self.scale * (self.growth * z + u)

    def divergence(self, inner: Tensor) -> Tensor:
        """Return the divergence, shape ``(*)``, where that of u is the inner one."""
        return inner + self.growth.sum(-1)


def _gaussian_path(t: Tensor, m: Tensor, log_scale: Tensor) -> _GaussianPath:
    """Return the path to a mean and deviations, ``(*, D)``, at times t, ``(*, 1)``."""
    angle, variance = 0.5 * math.pi * t, (2 * log_scale).exp()
    a, b = angle.cos(), angle.sin()
    now = a * a + b * b * variance
    growth = 0.5 * math.pi * a * b * (variance - 1) / now
    return _GaussianPath(b * m, 0.5 * math.pi * a * m, now.sqrt(), growth)


def _moved(x: Tensor, *, path: _GaussianPath, function: StateFunction) -> Tensor:
    """Return the velocity of states, shape ``(*, D)``, of a function's in units of the path."""
    z = path.standard(x)
    return path.velocity(z, function(z))


def _spread(x: Tensor, *, path: _GaussianPath, function: StateFunction) -> Tensor:
    """Return the divergence at states, ``(*, D)``, of a function's in units of the path."""
    return path.divergence(function(path.standard(x)))


def _regressions(s: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return slopes and intercepts of the means of rows, and of their log-deviations.

    The first round takes all rows alike; the second weighs each by its precision after the first
    (feasible generalised least squares): where data tell much, the mean has to be right.

    Args:
        s: Centred columns, shape ``(N, S)``.
        w: Rows, shape ``(N, D)``.
    """
    offset, ridge = w.mean(0), _Ridge(s)
    slope = ridge(w - offset)
    log_slope, log_offset = _log_deviations(ridge, w - offset - s @ slope.T)
    for i, log_scale in enumerate((log_offset + s @ log_slope.T).T):
        share = (-2 * (log_scale - log_scale.min())).exp()
        share = share / share.sum()
        places, place, root = share @ s, share @ w[:, i], (share * len(s)).sqrt()[:, None]
        slope[i] = _Ridge((s - places) * root)((w[:, i : i + 1] - place) * root)[0]
        offset[i] = place - slope[i] @ places
    return slope, offset, *_log_deviations(ridge, w - offset - s @ slope.T)


def _log_deviations(ridge: "_Ridge", left: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return slopes, ``(D, S)``, and intercepts of the log-deviations of residuals, ``(N, D)``.

    The slopes B are those of the logarithms of residuals r, times the share :math:`\kappa` of 0 to
    1 that has the greatest Gaussian likelihood with an intercept of its own, that is the least

    .. math:: \kappa \, \overline{B s} + \tfrac12 \log \overline{r^2 e^{-2 \kappa B s}} .

    Logarithms hardly see the few residuals that are large where deviations are said to be small,
    and each costs hundreds of nats.

    Args:
        ridge: Regressions on the columns s.
        left: The residuals r.
    """
    log_left = left.abs().clamp(min=_LEAST).log()
    slope = ridge(log_left - log_left.mean(0))
    log_scale, shares = ridge.s @ slope.T, _SHARES.to(slope)
    offsets = torch.stack(
        [0.5 * (left * (-share * log_scale).exp()).square().mean(0).log() for share in shares]
    ).clamp(min=math.log(_LEAST))
    best = (shares[:, None] * log_scale.mean(0) + offsets).argmin(0)
    return shares[best][:, None] * slope, offsets.gather(0, best[None])[0]


class _Ridge:
    """Ridge regressions on the same columns, whose moments are decomposed once.

    The penalty is that of the least generalised cross-validation error (Golub, Heath & Wahba,
    Technometrics 21, 1979).

    Args:
        s: Centred columns, shape ``(N, S)``; beyond 1,024 of them all slopes are zero.
    """

    def __init__(self, s: Tensor) -> None:
        self.s = s.double()
        self.is_null = not 0 < s.shape[1] <= MOST_SUMMARIES
        if not self.is_null:
            values, self.vectors = torch.linalg.eigh(self.s.T @ self.s / len(s))
            self.values = values.clamp(min=0.0)

    def __call__(self, w: Tensor) -> Tensor:
        """Return the slopes, ``(D, S)``, of centred rows w, ``(N, D)``."""
        w, count = w.double(), len(self.s)
        if self.is_null:
            return self.s.new_zeros(w.shape[1], self.s.shape[1])
        along = self.vectors.T @ (self.s.T @ w) / count  # (S, D)
        penalties = _PENALTIES.to(self.s) * self.values.mean().clamp(min=1e-30)
        kept = 1 / (self.values + penalties[:, None])  # (P, S)
        fitted = (kept * (2 - kept * self.values)) @ along.square().sum(1)
        left = w.square().mean(0).sum() - fitted
        freedom = ((kept * self.values).sum(1) + 1) / count
        error = torch.where(freedom < 1, left / (1 - freedom).square(), math.inf)
        best = kept[error.argmin()]
        return (self.vectors @ (best[:, None] * along)).T
