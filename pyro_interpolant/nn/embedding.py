r"""Embeddings of data: of sets whose rows are exchangeable, and of series.

Each has a network that is trained along, and a summary in closed form: means, deviations, and
least-squares fits of columns by each other; of sets the extremes, too. The latents of many models
are nearly linear in them, while a network of the rows' moments learns slowly to divide one by
another.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import is_tracing, recomputed
from .velocity import location_and_scale

# Of all sets that are embedded together, without gradients and with them: the network of rows has
# some hundreds of numbers for each. 2,000 sets of 5,000 took 11 GB. Of more, what gradients need
# is computed again: a batch of 1,024 sets of 10,000 took 9 GB.
_ROWS_AT_ONCE, _ROWS_KEPT = 2**18, 2**20
SIZE = 64  # of what is embedded from a context
_SHORT, _STRETCHES = 8, 32  # times left after convolutions, and means over time of a summary
_RIDGE = 0.01  # beside the sums of squares of standardised columns: so few rows have fits, too
_FLOOR = 1e-8  # added to the variance of a column, in units of that of all training rows


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

    def forward(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return standardised values, ``(N, n, d)``, zero where missing, and which are there.

        Args:
            *parts: Columns of the data, each ``(N, n)`` or ``(N, n, d_k)``: together d, and the
                mask as a last one.

        Raises:
            ValueError: If they are of other shapes.
        """
        values, there = self._parts(*parts)
        # What is missing may be NaN, which no factor makes zero, nor its gradients finite.
        values = torch.where(there > 0, values, self.loc)
        return (values - self.loc) / self.scale * there, there

    @torch.no_grad()
    def set_scales(self, *parts: Tensor) -> None:
        """Set location and scale of the columns from the data that are there."""
        values, there = self._parts(*parts)
        few = values[there[..., 0] > 0]
        if len(few):
            loc, scale = location_and_scale(few)
            self.loc.copy_(loc)
            self.scale.copy_(scale)

    def are_set(self) -> bool:
        """Return whether location and scale are not those of new columns."""
        return bool((self.loc != 0).any() or (self.scale != 1).any())

    def _parts(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of data, and which are there, shape ``(N, n, 1)``."""
        columns = [part[..., None] if part.dim() == 2 else part for part in parts]
        is_whole = all(c.dim() == 3 and c.shape[:2] == columns[0].shape[:2] for c in columns)
        size = len(self.loc)
        if not is_whole or sum(c.shape[-1] for c in columns) != size + self.masked:
            mask = ", the last of them the mask" if self.masked else ""
            got = " and ".join(str(tuple(part.shape)) for part in parts)
            raise ValueError(
                f"expected data of shape (N, n, {size + self.masked}){mask}, or such columns by "
                f"site, got {got}"
            )
        y = torch.cat(columns, -1)
        return y[..., :size], y[..., -1:] if self.masked else torch.ones_like(y[..., :1])


class SetEmbedding(nn.Module):
    r"""Embed rows that are exchangeable, by :math:`\sum_i \phi(y_i, r_i) / n` of those there are.

    The :math:`r_i` are a row's residuals from the fit of each column by the others (of one column:
    from its mean), in units of their deviation in the set.

    Args:
        row_dim: d, the size of a row, of all observed sites together.
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
        self.rows = dense(2 * row_dim, width, width)

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the constructor."""
        return self.row_dim, self.masked, self.width

    def forward(self, *y: Tensor) -> Tensor:
        """Return the mean of the embedded rows, shape ``(N, width)``.

        Args:
            *y: Rows, shape ``(N, n, d)``, or ``(N, n, d + 1)`` with a mask; or their columns by
                site, each ``(N, n)`` or ``(N, n, d_k)``.
        """
        return self.forward_and_summary(*y)[0]

    def summary(self, *y: Tensor) -> Tensor:
        """Return means, deviations, fits and extremes of the columns, and how many rows, (N, S).

        Means and logarithms of deviations of each column; from two columns on the coefficients,
        intercept and logarithm of the residual deviation of its least-squares fit by the others;
        the least and the greatest value of each; with a mask, the logarithm of one more than the
        number of rows.

        Args:
            *y: Rows, each ``(N, n)`` or ``(N, n, d_k)``, as for :meth:`forward`.
        """
        rows, there = self.columns(*y)
        return self._summary(rows, there, _fits(rows, there))

    def forward_and_summary(self, *y: Tensor) -> tuple[Tensor, Tensor]:
        """Return what :meth:`forward` and :meth:`summary` do, which share the fits.

        Args:
            *y: Rows, each ``(N, n)`` or ``(N, n, d_k)``, as for :meth:`forward`.
        """
        rows, there = self.columns(*y)
        size = max(1, _ROWS_AT_ONCE // max(1, rows.shape[1]))
        is_kept = torch.is_grad_enabled() and rows[..., 0].numel() <= _ROWS_KEPT
        if is_tracing() or is_kept or len(rows) <= size:
            return self._both(rows, there)
        both = recomputed(self._both)
        pieces = zip(rows.split(size), there.split(size), strict=True)
        embedded, summaries = zip(*(both(*piece) for piece in pieces), strict=True)
        return torch.cat(embedded), torch.cat(summaries)

    def _both(self, rows: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Return the embedding and the summary of sets, ``(N, n, d)``, by which rows are there."""
        fits = _fits(rows, there)
        both = torch.cat((rows, fits.residuals), -1)
        return _mean(self.rows(both), there), self._summary(rows, there, fits)

    def _summary(self, rows: Tensor, there: Tensor, fits: "_Fits") -> Tensor:
        """Return the summary of sets, ``(N, n, d)``, by which rows are there and their fits."""
        found = [fits.summary, *_extremes(rows, there)]
        return torch.cat([*found, there.sum(1).log1p()] if self.masked else found, -1)

    def set_scales(self, *y: Tensor) -> None:
        """Set location and scale of the columns from rows, ``(N, n, d)``, that are there."""
        self.columns.set_scales(*y)


class SeriesEmbedding(nn.Module):
    """Embed series of one length by convolutions over time, each of which halves it.

    Args:
        length: L, the number of times.
        channels: d, the number of values at each time, of all observed sites together.
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
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * length, SIZE))
        self.columns = _Columns(channels, masked=masked)

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the constructor."""
        return self.length, self.channels, self.masked, self.width

    def forward(self, *y: Tensor) -> Tensor:
        """Return embedded series, shape ``(N, 64)``.

        Args:
            *y: Series, shape ``(N, L, d)``, or ``(N, L, d + 1)`` with a mask; or their channels by
                site, each ``(N, L)`` or ``(N, L, d_k)``.

        Raises:
            ValueError: If they are of another length.
        """
        values, there = self._parts(*y)
        values = torch.cat((values, there), -1) if self.masked else values
        return self.layers(values.mT)

    def summary(self, *y: Tensor) -> Tensor:
        """Return means over stretches of time, and fits of neighbours in time, ``(N, S)``.

        Of each channel at most 32 means, and what :class:`SetEmbedding` gives of the set of all
        pairs of neighbours: an autoregression's coefficient, intercept and deviation are there.

        Args:
            *y: Series, each ``(N, L)`` or ``(N, L, d_k)``, as for :meth:`forward`.

        Raises:
            ValueError: If they are of another length.
        """
        values, there = self._parts(*y)
        stretches = min(self.length, _STRETCHES)
        means = nn.functional.adaptive_avg_pool1d(values.mT, stretches).flatten(1)
        if self.length == 1:
            return means
        pairs = torch.stack((values[:, :-1], values[:, 1:]), -1).transpose(1, 2)  # (N, d, L-1, 2)
        both = (there[:, :-1] * there[:, 1:])[:, None]
        return torch.cat((means, _fits(pairs, both).summary.flatten(1)), -1)

    def _parts(self, *y: Tensor) -> tuple[Tensor, Tensor]:
        """Return standardised values of series, ``(N, L, d)``, and which are there."""
        values, there = self.columns(*y)
        if values.shape[1] != self.length:
            raise ValueError(
                f"expected series of {self.length} times, got {values.shape[1]}: pad shorter "
                "ones, with masked=True, or make a SeriesEmbedding of their length"
            )
        return values, there

    def set_scales(self, *y: Tensor) -> None:
        """Set location and scale of the channels from series, ``(N, L, d)``, where they are."""
        self.columns.set_scales(*y)


KINDS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (SetEmbedding, SeriesEmbedding)
}


def setter_of_scales(embedding: nn.Module | None, *, is_fixed: bool) -> Callable[..., None] | None:
    """Return what sets the scales of an embedding from data; None where none are to be set.

    Args:
        embedding: The embedding, or None.
        is_fixed: Whether no training moves its weights: they know the scales that it has then,
            if it has any yet.
    """
    columns = getattr(embedding, "columns", None)
    is_new = isinstance(columns, _Columns) and not columns.are_set()
    return None if is_fixed and not is_new else getattr(embedding, "set_scales", None)


class _Fits(NamedTuple):
    """What columns of sets are, and each as a linear function of the others.

    Attributes:
        summary: Means, logarithms of deviations, and from two columns on coefficients,
            intercepts and logarithms of residual deviations, ``(*, S)``.
        residuals: Of the rows, in units of their deviation, ``(*, n, d)``.
    """

    summary: Tensor
    residuals: Tensor


def _fits(rows: Tensor, there: Tensor) -> _Fits:
    r"""Fit each column of sets by least squares on the others.

    With P the inverse of the columns' correlation, column j is fitted by :math:`-P_{jk} / P_{jj}`
    times column k, and leaves the share :math:`1 / P_{jj}` of its variance.

    Args:
        rows: Sets, shape ``(*, n, d)``.
        there: Which rows are there, ``(*, n, 1)``.
    """
    mean, size = _mean(rows, there), rows.shape[-1]
    centred = (rows - mean[..., None, :]) * there
    deviation = (_mean(centred.square(), there) + _FLOOR).sqrt()
    z, count = centred / deviation[..., None, :], there.sum(-2, keepdim=True).clamp(min=1.0)
    ridge = _RIDGE * torch.eye(size).to(rows)
    inverse = torch.linalg.inv((z.mT @ z + ridge) / count)  # (*, d, d)
    precision = inverse.diagonal(dim1=-2, dim2=-1)
    residuals = z @ inverse / precision.sqrt()[..., None, :]
    found = [mean, deviation.log()]
    if size > 1:
        units = deviation[..., :, None] / deviation[..., None, :]
        slopes = -inverse / precision[..., None] * units  # -1 on the diagonal
        intercept = -(slopes @ mean[..., None])[..., 0]
        left = deviation.log() - 0.5 * precision.log()
        i, j = torch.triu_indices(size, size, 1)
        found += [slopes[..., i, j], slopes[..., j, i], intercept, left]
    return _Fits(torch.cat(found, -1), residuals)


def _mean(values: Tensor, there: Tensor) -> Tensor:
    """Return the mean of values, ``(*, n, K)``, that are there, by ``(*, n, 1)``: ``(*, K)``."""
    return (values * there).sum(-2) / there.sum(-2).clamp(min=1.0)


def _extremes(values: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
    """Return least and greatest values, ``(*, n, K)``, that are there: ``(*, K)``, or zeros."""
    if not values.shape[-2]:
        return values.sum(-2), values.sum(-2)
    gone = there == 0
    low = values.masked_fill(gone, torch.inf).amin(-2)
    high = values.masked_fill(gone, -torch.inf).amax(-2)
    is_empty = gone.all(-2)
    return low.masked_fill(is_empty, 0.0), high.masked_fill(is_empty, 0.0)


def dense(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Return two hidden layers and a linear one."""
    layers: list[nn.Module] = []
    for size in (width, width):
        layers += [nn.Linear(inputs, size), nn.SiLU()]
        inputs = size
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))
