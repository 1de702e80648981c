r"""Velocities given data: a network that embeds the data once, and one that moves states.

The data y of a context are summarised, :math:`s(y)`, in closed form and by an embedding that is
trained along. The path is that of what a linear regression on :math:`s` leaves of the states:

.. math:: v_t(x \mid y) = \tfrac{d}{dt} b_t\, m + u_t(x - b_t\, m, e(y)), \quad
          m = A\, s(y), \quad b_t = \sin(\pi t / 2),

so that u has nothing to learn where x given y is Gaussian about a linear function of the summary.
Neither m nor e depends on time or state: both are computed once per row of data.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .mlp import VelocityMLP
from .velocity import StateFunction

_HEAD_WIDTH, _HEAD_SIZE = 128, 64
_SHORT, _STRETCHES = 8, 32  # times left after convolutions, and means over time of a summary
_MOST_SUMMARIES = 1024  # that a regression takes: beyond, its matrix takes long to decompose
_PENALTIES = torch.logspace(-8, 2, 41, dtype=torch.float64)  # of the ridge, to the mean eigenvalue


class EmbeddedVelocity(nn.Module):
    r"""A velocity :math:`v_t(x \mid y)` given data y, which are embedded once per row.

    A context holds the parts of the data, flattened, one after the other. :meth:`embed` turns it
    into what the network takes; :meth:`forward` and the others expect that.

    Args:
        event_dim: D, the size of the last dimension of x.
        shapes: The shape of each part of the data.
        embedding: A module that is called with the parts, each ``(N, *shape)``, and returns
            ``(N, E)``, trained along. Where it has ``summary``, called alike, that gives the
            columns ``(N, S)`` of the regression. By default there is none, and the columns are
            all numbers of the data.
        hidden_dims: The widths of the velocity's hidden layers, as in :class:`VelocityMLP`.

    Raises:
        ValueError: If a size is not positive, or the embedding does not return ``(N, E)``.

    Example:
        >>> velocity = EmbeddedVelocity(2, [(5, 3)], SetEmbedding(3), hidden_dims=(32, 32))
        >>> context = velocity.embed(torch.randn(10, 15))
        >>> velocity(torch.tensor(0.3), torch.randn(10, 2), context).shape
        torch.Size([10, 2])
    """

    broadcasts_time = True
    is_periodic = False

    loc: Tensor
    scale: Tensor
    bounds: Tensor
    slope: Tensor

    def __init__(
        self,
        event_dim: int,
        shapes: Sequence[Sequence[int]],
        embedding: nn.Module | Sequence[Any] | None = None,
        hidden_dims: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.event_dim = event_dim
        self.shapes = tuple(torch.Size(shape) for shape in shapes)
        self.context_dim = sum(shape.numel() for shape in self.shapes)
        if not self.context_dim:
            raise ValueError(f"expected data of at least one number, got shapes {shapes}")
        given: Any = embedding
        if not isinstance(embedding, nn.Module | None):  # as files hold those of the package
            given = _KINDS[embedding[0]](*embedding[1])
        self.embedding: nn.Module | None = given
        with torch.no_grad():
            like = next(self.parameters(), torch.zeros(()))
            features = self._features(like.new_zeros(2, self.context_dim))
        sizes = [part.shape[1] for part in features if part is not None]
        columns = 0 if features[0] is None else sizes[0]
        self.head = _dense(sum(sizes), _HEAD_WIDTH, _HEAD_SIZE).to(like)
        self.network = VelocityMLP(event_dim, hidden_dims, sum(sizes) + _HEAD_SIZE).to(like)
        self.register_buffer("loc", like.new_zeros(columns))
        self.register_buffer("scale", like.new_ones(columns))
        self.register_buffer("bounds", torch.full((2, columns), math.inf).to(like))
        self.register_buffer("slope", like.new_zeros(event_dim, columns))

    def arguments(self) -> tuple[Any, ...] | None:
        """Return the arguments of the constructor; None with an embedding of the user's own."""
        embedding: Any = self.embedding
        if embedding is not None:
            if type(embedding) not in _KINDS.values():
                return None
            embedding = [type(embedding).__name__, embedding.arguments()]
        return self.event_dim, self.shapes, embedding, self.network.hidden_dims

    def embed(self, context: Tensor) -> Tensor:
        """Return what depends neither on time nor state: m and e, shape ``(*, D + E)``.

        Args:
            context: Data, flattened, shape ``(*, C)``.
        """
        flat = context.reshape(-1, self.context_dim)
        summary, embedded = self._features(flat)
        s = flat[:, :0] if summary is None else self._standard(summary)
        features = s if embedded is None else torch.cat((s, embedded), -1)
        found = torch.cat((s @ self.slope.T, features, self.head(features)), -1)
        return found.reshape(*context.shape[:-1], found.shape[-1])

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity, shape ``(*, D)``.

        Args:
            t: Times, broadcastable to ``(*)``.
            x: States, shape ``(*, D)``.
            context: Embedded data, broadcastable to ``(*, D + E)``.

        Raises:
            ValueError: If the context is missing or of another size.
        """
        m, e = self._parts(context)
        place, rate = _course(t[..., None], m)
        return rate + self.network(t, x - place, e)

    def forward_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the velocity, shape ``(*, D)``, and its exact divergence, shape ``(*)``.

        Args:
            t: Times, broadcastable to ``(*)``.
            x: States, shape ``(*, D)``.
            context: Embedded data, broadcastable to ``(*, D + E)``.

        Raises:
            ValueError: If the context is missing or of another size.
        """
        m, e = self._parts(context)
        place, rate = _course(t[..., None], m)
        v, divergence = self.network.forward_and_divergence(t, x - place, e)
        return rate + v, divergence

    def field(self, times: Tensor, context: Tensor | None = None) -> list[StateFunction]:
        """Return one function ``x -> v`` per time, what they share computed once.

        Args:
            times: Times, shape ``(T,)``.
            context: Embedded data, broadcastable to ``(*, D + E)``.
        """
        m, e = self._parts(context)
        own = self.network.field(times, e)
        courses = zip(*_course(_column(times, m), m), own, strict=True)
        return [partial(_moved, place=a, rate=b, function=f) for a, b, f in courses]

    def divergence_field(
        self, times: Tensor, context: Tensor | None = None
    ) -> list[StateFunction]:
        """Return one function ``x -> divergence`` per time, what they share computed once.

        Args:
            times: Times, shape ``(T,)``.
            context: Embedded data, broadcastable to ``(*, D + E)``.
        """
        m, e = self._parts(context)
        own = self.network.divergence_field(times, e)
        courses = zip(_course(_column(times, m), m)[0], own, strict=True)
        return [partial(_moved, place=a, rate=0.0, function=f) for a, f in courses]

    def rows_at_once(self) -> int:
        """Return the number of rows for which one call is fastest, without gradients."""
        return self.network.rows_at_once()

    def is_untrained(self) -> bool:
        """Return whether the last layer is zero, as it starts."""
        return self.network.is_untrained()

    def untrained_copy(self) -> VelocityMLP:
        """Return an untrained network of the same shape that takes embedded data."""
        size = self.event_dim + self.network.context_dim
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
        self._set_summary(context)
        s = self._standard(self._summary(context)).to(w)
        return s @ _ridge(s, w).T.to(w)

    @torch.no_grad()
    def set_scales(self, w: Tensor, context: Tensor | None = None) -> None:
        """Set regression and scales from training rows.

        Args:
            w: Whitened rows, shape ``(N, D)``.
            context: Their data, flattened, shape ``(N, C)``.
        """
        if context is None:
            return
        self._set_summary(context)
        self.slope.copy_(_ridge(self._standard(self._summary(context)), w))
        m, e = self._parts(self.embed(context.to(self.slope)))
        self.network.set_scales(w - m, e)

    def _set_summary(self, context: Tensor) -> None:
        """Set the scales of embedding and summary from data, shape ``(N, C)``."""
        own = getattr(self.embedding, "set_scales", None)
        if own is not None:
            own(*self._split(context.to(self.slope)))
        if not len(self.loc):
            return
        summary = self._summary(context).double()
        scale = summary.std(0, correction=0)
        self.loc.copy_(summary.mean(0))
        self.scale.copy_(torch.where(scale > 0, scale, 1.0))
        self.bounds.fill_(math.inf)
        s = self._standard(summary.to(self.loc))
        self.bounds.copy_(torch.stack((-s.amin(0), s.amax(0))))

    def _summary(self, context: Tensor) -> Tensor:
        """Return the summary of data, shape ``(N, C)``, as they are: ``(N, S)``."""
        context = context.to(self.slope)
        if self.embedding is None:
            return context
        own = getattr(self.embedding, "summary", None)
        return context[:, :0] if own is None else own(*self._split(context))

    def _standard(self, summary: Tensor) -> Tensor:
        """Return summaries, ``(N, S)``, in units of the training rows' and within their range.

        A summary beyond all that was seen would carry the regression where nothing was learned.
        """
        s = (summary - self.loc) / self.scale
        return torch.maximum(torch.minimum(s, self.bounds[1]), -self.bounds[0])

    def _features(self, flat: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return summary and embedding of data, ``(N, C)``, each ``(N, *)`` or None."""
        if self.embedding is None:
            return flat, None
        parts = self._split(flat)
        found: Any = self.embedding(*parts)
        if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(flat):
            got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"expected an embedding that returns (N, E) of data of shapes "
                f"{[('N', *shape) for shape in self.shapes]}, got {got}"
            )
        summary = getattr(self.embedding, "summary", None)
        return None if summary is None else summary(*parts), found

    def _split(self, flat: Tensor) -> list[Tensor]:
        """Return the parts of the data, each ``(N, *shape)``, of shape ``(N, C)`` together."""
        parts = flat.split([shape.numel() for shape in self.shapes], dim=-1)
        return [p.reshape(-1, *shape) for p, shape in zip(parts, self.shapes, strict=True)]

    def _parts(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return m, shape ``(*, D)``, and e, ``(*, E)``, of embedded data."""
        size = self.event_dim + self.network.context_dim
        if context is None or context.shape[-1] != size:
            got = "none" if context is None else f"shape {tuple(context.shape)}"
            raise ValueError(
                f"expected embedded data of shape (*, {size}), as embed(context) returns, got "
                f"{got}"
            )
        return context[..., : self.event_dim], context[..., self.event_dim :]


class _Columns(nn.Module):
    """Columns of values that may be missing, in units of those that were seen in training.

    Args:
        size: d, their number.
        masked: Whether a last column more says which values are there.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, size: int, *, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.register_buffer("loc", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return standardised values, ``(N, n, d)``, zero where missing, and which are there.

        Args:
            y: Data, shape ``(N, n, d)``, or ``(N, n, d + 1)`` with a mask; ``(N, n)`` where d is 1
                and there is none.
        """
        values, there = self._parts(y)
        return (values - self.loc) / self.scale * there, there

    @torch.no_grad()
    def set_scales(self, y: Tensor) -> None:
        """Set location and scale of the columns from the data that are there."""
        values, there = self._parts(y)
        few = values[there[..., 0] > 0].double()
        if len(few):
            scale = few.std(0, correction=0)
            self.loc.copy_(few.mean(0))
            self.scale.copy_(torch.where(scale > 0, scale, 1.0))

    def _parts(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of data, and which are there, shape ``(N, n, 1)``."""
        y, size = (y[..., None] if y.dim() == 2 else y), len(self.loc)
        if y.dim() != 3 or y.shape[-1] != size + self.masked:
            mask = ", the last of them the mask" if self.masked else ""
            raise ValueError(
                f"expected data of shape (N, n, {size + self.masked}){mask}, got {tuple(y.shape)}"
            )
        return y[..., :size], y[..., -1:] if self.masked else torch.ones_like(y[..., :1])


class SetEmbedding(nn.Module):
    r"""Embed rows that are exchangeable, by :math:`\sum_i \phi(y_i) / n` of those that are there.

    Args:
        row_dim: d, the size of a row.
        masked: Whether a last column more says which rows are there, by 1, and which are not, by
            0: for sets of a varying size, and rows that are missing.
        width: Of the network :math:`\phi`.

    References:
        Zaheer et al., *Deep Sets*, NeurIPS 2017, arXiv 1703.06114.

    Example:
        >>> y = torch.cat((torch.randn(10, 5, 3), torch.ones(10, 5, 1)), -1)
        >>> SetEmbedding(3, masked=True)(y).shape
        torch.Size([10, 32])
    """

    def __init__(self, row_dim: int, masked: bool = False, width: int = 32) -> None:  # noqa: FBT001, FBT002
        super().__init__()
        self.row_dim, self.masked, self.width = row_dim, masked, width
        if min(row_dim, width) < 1:
            raise ValueError(f"expected positive sizes, got {row_dim} and {width}")
        self.columns = _Columns(row_dim, masked=masked)
        self.rows = _dense(row_dim, width, width)

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the constructor."""
        return self.row_dim, self.masked, self.width

    def forward(self, y: Tensor) -> Tensor:
        """Return the mean of the embedded rows, shape ``(N, width)``.

        Args:
            y: Rows, shape ``(N, n, d)``, or ``(N, n, d + 1)`` with a mask; ``(N, n)`` where d is 1
                and there is none.
        """
        rows, there = self.columns(y)
        return _mean(self.rows(rows), there)

    def summary(self, y: Tensor) -> Tensor:
        """Return means and products of the rows' columns, and how many there are, ``(N, S)``.

        Args:
            y: Rows, shape ``(N, n, d)``, or ``(N, n, d + 1)`` with a mask.
        """
        rows, there = self.columns(y)
        i, j = torch.triu_indices(self.row_dim, self.row_dim, device=y.device)
        found = _mean(torch.cat((rows, rows[..., i] * rows[..., j]), -1), there)
        return torch.cat((found, there.sum(1).log1p()), -1) if self.masked else found

    def set_scales(self, y: Tensor) -> None:
        """Set location and scale of the columns from rows, shape ``(N, n, d)``, that are there."""
        self.columns.set_scales(y)


class SeriesEmbedding(nn.Module):
    """Embed series of one length by convolutions over time, each of which halves it.

    Args:
        length: L, the number of times.
        channels: d, the number of values at each time.
        masked: Whether a last channel more says which times are there, by 1, and which are
            missing, by 0.
        width: The number of channels inside.

    Example:
        >>> SeriesEmbedding(50, 2)(torch.randn(10, 50, 2)).shape
        torch.Size([10, 64])
    """

    def __init__(
        self,
        length: int,
        channels: int = 1,
        masked: bool = False,  # noqa: FBT001, FBT002
        width: int = 32,
    ) -> None:
        super().__init__()
        self.length, self.channels, self.masked, self.width = length, channels, masked, width
        if min(length, channels, width) < 1:
            raise ValueError(f"expected positive sizes, got {length}, {channels} and {width}")
        layers: list[nn.Module] = []
        inputs = channels + masked
        while length > _SHORT or not layers:
            layers += [nn.Conv1d(inputs, width, 5, stride=2, padding=2), nn.SiLU()]
            inputs, length = width, (length + 1) // 2
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * length, _HEAD_SIZE))
        self.columns = _Columns(channels, masked=masked)

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the constructor."""
        return self.length, self.channels, self.masked, self.width

    def forward(self, y: Tensor) -> Tensor:
        """Return embedded series, shape ``(N, 64)``.

        Args:
            y: Series, shape ``(N, L, d)``, or ``(N, L, d + 1)`` with a mask; ``(N, L)`` where d is
                1 and there is none.
        """
        values, there = self.columns(y)
        values = torch.cat((values, there), -1) if self.masked else values
        return self.layers(values.mT)

    def summary(self, y: Tensor) -> Tensor:
        """Return means over stretches of time, shape ``(N, S)``, S at most 32 d.

        Args:
            y: Series, shape ``(N, L, d)``, ``(N, L, d + 1)`` or ``(N, L)``.
        """
        values = self.columns(y)[0].mT
        stretches = min(self.length, _STRETCHES)
        return nn.functional.adaptive_avg_pool1d(values, stretches).flatten(1)

    def set_scales(self, y: Tensor) -> None:
        """Set location and scale of the channels from series, ``(N, L, d)``, where they are."""
        self.columns.set_scales(y)


_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (SetEmbedding, SeriesEmbedding)}


def _mean(values: Tensor, there: Tensor) -> Tensor:
    """Return the mean of values, ``(N, n, K)``, that are there, by ``(N, n, 1)``: ``(N, K)``."""
    return (values * there).sum(1) / there.sum(1).clamp(min=1.0)


def _course(t: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """Return the place and the rate of a mean m, ``(*, D)``, on its way at times t, ``(*, 1)``."""
    angle = 0.5 * math.pi * t
    return angle.sin() * m, 0.5 * math.pi * angle.cos() * m


def _column(times: Tensor, m: Tensor) -> Tensor:
    """Return times, shape ``(T,)``, in front of means, ``(*, D)``: ``(T, 1, .., 1)``."""
    return times.reshape(-1, *(1,) * m.dim())


def _moved(x: Tensor, *, place: Tensor, rate: Tensor | float, function: StateFunction) -> Tensor:
    """Return a function of states relative to a place, shape ``(*, D)``, plus a rate."""
    return rate + function(x - place)


def _ridge(s: Tensor, w: Tensor) -> Tensor:
    """Return the slopes, ``(D, S)``, of rows w, ``(N, D)``, on centred columns s, ``(N, S)``.

    The penalty is that of the least generalised cross-validation error (Golub, Heath & Wahba,
    Technometrics 21, 1979).
    """
    s, w = s.double(), w.double()
    count, columns = s.shape
    if not 0 < columns <= _MOST_SUMMARIES:
        return s.new_zeros(w.shape[1], columns)
    w = w - w.mean(0)
    values, vectors = torch.linalg.eigh(s.T @ s / count)
    values = values.clamp(min=0.0)
    along = vectors.T @ (s.T @ w) / count  # (S, D)
    penalties = _PENALTIES.to(s) * values.mean().clamp(min=1e-30)
    kept = 1 / (values + penalties[:, None])  # (P, S)
    fitted = (kept * (2 - kept * values)) @ along.square().sum(1)
    left = w.square().mean(0).sum() - fitted
    freedom = ((kept * values).sum(1) + 1) / count
    error = torch.where(freedom < 1, left / (1 - freedom).square(), math.inf)
    best = kept[error.argmin()]
    return (vectors @ (best[:, None] * along)).T


def _dense(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Return two hidden layers and a linear one."""
    layers: list[nn.Module] = []
    for size in (width, width):
        layers += [nn.Linear(inputs, size), nn.SiLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))
