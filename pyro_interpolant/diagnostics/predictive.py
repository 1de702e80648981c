r"""Is a density calibrated? Ranks of held-out rows among its draws, uniform if it is.

- :func:`pit`: :math:`u_j = F_j(x_j | c)` of each column j, the probability-integral transform.
- :func:`coverage`: :math:`u = P(\rho(X | c) > \rho(x | c))`, the level of the highest-density
  region that a row lies on.
- :func:`sbc`: the ranks of :func:`pit`, and that of the density, of rows that were simulated with
  their contexts: simulation-based calibration.
- :func:`tarp`: :math:`u = P(|X - r| < |x - r|)` for references r that know no more of x than its
  context.

All are uniform on [0, 1] where rows come from the density, given their contexts. They are compared
with it by the largest difference of distribution functions, :math:`\max_u |\hat F(u) - u|`, whose
99% band holds for all quantities of a check at once.

References:
    Gneiting, Balabdaoui & Raftery, J. R. Stat. Soc. B 69 (2007) (PIT); Talts et al., arXiv
    1804.06788, and Modrak et al., Bayesian Anal. 20 (2025) (ranks, and the density's among them);
    Lemos et al., ICML 2023, arXiv 2302.03026 (references).
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from numpy.typing import ArrayLike
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from .._package import check_ranges, whole
from .._torch import robust_deviation, seeded
from ..distributions.constraints import real_shape
from ..distributions.interpolant import (
    AnyDistribution,
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
)
from ..distributions.joint import column_names, pack, rows_by_name, unpack
from ..distributions.rows import (
    RowsLike,
    as_tensor,
    check_same_order,
    checked_rows,
    contexts_of_rows,
)
from ..distributions.supports import BijectiveSupport

_LEVEL = 0.99  # of the band
_DRAWS = 100  # for each row
_SHARED_DRAWS = 4000  # for all rows, where there is no context
REGIONS = ("highest-density regions", "regions around other rows")  # not of one column
_VALUES_AT_ONCE = 2**22  # of draws, compared with rows


class CalibrationCheck(NamedTuple):
    """Numbers that are uniform on [0, 1] where a density is calibrated, and whether they are.

    Attributes:
        values: The numbers, shape ``(N, K)``: a row each, a column for each quantity.
        names: What to call the quantities.
        distances: The largest differences of their distribution functions from the uniform one,
            shape ``(K,)``.
        band: What the largest of them may be: chance exceeds it in 1% of all checks.
        verdict: What follows, in a sentence.
    """

    values: Tensor
    names: tuple[str, ...]
    distances: Tensor
    band: float
    verdict: str

    def __repr__(self) -> str:
        """Say the verdict."""
        return self.verdict


def pit(
    distribution: AnyDistribution | AutoGuide,
    x: RowsLike,
    context: ArrayLike | None = None,
    *,
    draws: int = _DRAWS,
    seed: int = 0,
) -> CalibrationCheck:
    """Return the probability-integral transform of rows: column by column, unconstrained.

    Low ranks always mean low values, also for supports bounded above, whose unconstrained columns
    run the other way.
    Of scalars it is exact, by the cdf; else it is a rank among draws, spread over its step.

    Args:
        distribution: A density, conditional or not; or a guide, whose ``posterior`` is compared
            with draws of another sampler, nearly independent ones.
        x: Rows it has not seen, shape ``(N, *event_shape)``; of named sites, draws by name, or a
            data frame of them, with columns ``mu[0]``, ``mu[1]``, ... of a site of several
            numbers. Where it was trained on a data frame, the columns of another are taken by
            their names.
        context: Their contexts, shape ``(N, C)``, for a conditional density; those of a data frame
            as the columns of x.
        draws: How many for each row; without contexts all rows share 4,000.
        seed: Of the draws.

    Raises:
        TypeError: If rows or contexts are not of a floating type, rows of named sites have no
            names, or the density is none of this package.
        ValueError: If they cannot be those of the density.
    """
    rows = _Rows(distribution, x, context, draws)
    with seeded(seed):
        values = rows.probabilities()
        exact = values is not None
        values = rows.ranks() if values is None else values
    return _check(values, rows, column_names(rows.distribution), _SHAPES, exact=exact)


def coverage(
    distribution: AnyDistribution | AutoGuide,
    x: RowsLike,
    context: ArrayLike | None = None,
    *,
    draws: int = _DRAWS,
    seed: int = 0,
) -> CalibrationCheck:
    """Return the level of the highest-density region on whose edge each row lies.

    Where the density is calibrated, regions of level p hold a share p of the rows.

    Args:
        distribution: As in :func:`pit`.
        x: As in :func:`pit`, shape ``(N, *event_shape)``.
        context: As in :func:`pit`, shape ``(N, C)``.
        draws: As in :func:`pit`.
        seed: Of the draws.

    Raises:
        TypeError: As :func:`pit`.
        ValueError: As :func:`pit`.
    """
    rows = _Rows(distribution, x, context, draws)
    with seeded(seed):
        values = 1 - rows.ranks(densities=True)[:, -1:]
    return _check(values, rows, [REGIONS[0]], _UNEVEN)


def sbc(
    distribution: ConditionalInterpolantDistribution | AutoGuide,
    x: RowsLike,
    context: ArrayLike,
    *,
    draws: int = _DRAWS,
    seed: int = 0,
) -> CalibrationCheck:
    """Check a learned posterior by simulation: ranks of parameters among its draws given the data.

    Args:
        distribution: The conditional density of parameters given data; or an amortized guide,
            whose ``posterior`` it is.
        x: Parameters drawn from the prior, shape ``(N, *event_shape)``, or by name.
        context: The data simulated with them, shape ``(N, C)``.
        draws: How many for each pair.
        seed: Of the draws.

    Returns:
        The ranks of each unconstrained parameter and, last, of the log-density.

    Raises:
        TypeError: As :func:`pit`.
        ValueError: As :func:`pit`.
    """
    rows = _Rows(distribution, x, context, draws)
    with seeded(seed):
        values = rows.ranks(densities=True)
    return _check(values, rows, [*column_names(rows.distribution), "the log-density"], _SHAPES)


def tarp(
    distribution: AnyDistribution | AutoGuide,
    x: RowsLike,
    context: ArrayLike | None = None,
    *,
    draws: int = _DRAWS,
    seed: int = 0,
) -> CalibrationCheck:
    """Return the shares of draws that are nearer to a reference than the row is.

    The reference of each row is another row, drawn at random, or, where there are contexts, the
    next one in their order along a random direction: rows are nearer to it than draws of a density
    that ignores contexts, such as the prior, which is calibrated by every other check. Distances
    are in units of the columns' deviations, but for 5% of rows and draws on each side.

    Args:
        distribution: As in :func:`pit`.
        x: As in :func:`pit`, shape ``(N, *event_shape)``.
        context: As in :func:`pit`, shape ``(N, C)``.
        draws: As in :func:`pit`.
        seed: Of the draws and of the references.

    Raises:
        TypeError: As :func:`pit`.
        ValueError: As :func:`pit`.
    """
    rows = _Rows(distribution, x, context, draws)
    with seeded(seed):
        order = rows.order()  # in a ring: no row is its own reference
        references = torch.empty_like(rows.u).index_copy(0, order, rows.u[order.roll(1)])
        parts, scale = list[Tensor](), None
        for z, u, index in rows.with_draws():
            if scale is None:  # that of few rows alone has them nearer than draws
                scale = robust_deviation(torch.cat((u, z.flatten(0, 1))))
            r = references[index]
            far, near = (((part - r) / scale).norm(dim=-1) for part in (u[None], z))
            parts.append(_rank(far, near))
        values = torch.cat(parts)[:, None]
    return _check(values, rows, [REGIONS[1]], _UNEVEN)


class _Rows:
    """Rows, their contexts, and draws of the density for them.

    Attributes:
        u: The rows, unconstrained, shape ``(N, D)``.
        directions: Of the unconstrained columns, as the values rise, shape ``(D,)``.
        draws: The number of draws for each row, or for all.
        shared: Whether all rows share them.
    """

    def __init__(
        self,
        distribution: AnyDistribution | AutoGuide,
        x: RowsLike,
        context: ArrayLike | None,
        draws: int,
    ) -> None:
        is_guide = isinstance(distribution, AutoGuide)
        density = getattr(distribution, "posterior", None) if is_guide else distribution
        if not isinstance(density, AnyDistribution):
            raise TypeError(
                "expected a density of this package or an AutoInterpolant, got "
                f"{type(distribution).__name__}: fit an InterpolantDistribution to its draws"
            )
        if context is not None and isinstance(density, InterpolantDistribution):
            density.given(as_tensor(context, "context"))  # raises: it takes none
        flow = density.transform.flow
        if isinstance(density, InterpolantDistribution) and density.batch_shape:
            raise ValueError(
                f"expected one density, got a batch of shape {tuple(density.batch_shape)}: pass "
                "the conditional flow itself, and context=..., one for each row; or condition it "
                "on one context, of shape (C,)"
            )
        density.check_single_base()
        check_same_order(x=x, context=context)
        self.distribution = density
        self.x = checked_rows(_packed(density, x), "x", density.row_shape).to(flow.loc)
        self.directions = _directions(density)
        self.u = self.unconstrained(self.x)
        count = len(self.x)
        names = density.context_columns
        self.context = None if context is None else contexts_of_rows(context, flow, names, count)
        self.shared = self.context is None
        check_ranges(whole("draws", draws, 1))
        self.draws = _SHARED_DRAWS if self.shared else int(draws)
        density.given(None if self.context is None else self.context[:1])  # or raise

    def unconstrained(self, x: Tensor) -> Tensor:
        """Return values, ``(*, *event_shape)``, as vectors that rise with them, ``(*, D)``."""
        return self.distribution.unconstrained(x).double() * self.directions

    def parts(self) -> Iterator[tuple[InterpolantDistribution, slice]]:
        """Yield the density for parts of the rows, and which these are."""
        size = max(1, _VALUES_AT_ONCE // (self.draws * self.u.shape[1]))
        for start in range(0, len(self.x), size):
            part = slice(start, start + size)
            context = None if self.context is None else self.context[part]
            yield self.distribution.given(context), part

    def with_draws(self, *, densities: bool = False) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Yield draws, ``(L, n or 1, K)``, the rows, ``(n, K)``, and which these are.

        Args:
            densities: Whether log-densities are a last column beside unconstrained values.
        """
        z = None
        with torch.no_grad():
            for view, part in self.parts():
                if z is None or not self.shared:
                    draw = view.rsample if view.has_rsample else view.sample
                    x = draw(torch.Size((self.draws,)))
                    z = self._columns(view, x, densities=densities)
                    z = z.reshape(self.draws, -1, z.shape[-1])  # a single context has no batch
                yield z, self._columns(view, self.x[part], densities=densities), part

    def _columns(self, view: InterpolantDistribution, x: Tensor, *, densities: bool) -> Tensor:
        u = self.unconstrained(x)
        return torch.cat((u, view.log_prob(x).double()[..., None]), -1) if densities else u

    def order(self) -> Tensor:
        """Return the rows' places in random order, or by their contexts, which tell no more.

        Returns:
            Shape ``(N,)``.
        """
        order = torch.randperm(len(self.u)).to(self.u.device)
        if self.context is not None:
            context = self.context.double()
            along = context / robust_deviation(context) @ torch.randn(context.shape[1]).to(context)
            order = order[along[order].argsort()]
        return order

    def ranks(self, *, densities: bool = False) -> Tensor:
        """Return the share of draws below each column, spread over its step, ``(N, K)``."""
        return torch.cat([_rank(u, z) for z, u, _ in self.with_draws(densities=densities)])

    def probabilities(self) -> Tensor | None:
        """Return the cdf of rows, shape ``(N, 1)``; None where there is none."""
        if self.u.shape[1] > 1:
            return None
        with torch.no_grad(), contextlib.suppress(NotImplementedError):
            found = torch.cat([view.cdf(self.x[part]).double() for view, part in self.parts()])
            # A packed site is an unconstrained number, which may fall as its value rises.
            falls = self.distribution.sites is not None and bool(self.directions < 0)
            return (1 - found if falls else found)[:, None]
        return None


def _packed(distribution: AnyDistribution, x: RowsLike) -> ArrayLike:
    """Return rows, ``(N, *event_shape)``, those of a data frame in the order of training's.

    Of named draws they are packed vectors.
    """
    sites = distribution.sites
    x = rows_by_name(x, distribution.columns, sites, "x")
    if sites is None:
        if isinstance(x, Mapping):
            raise TypeError("expected rows: this distribution has no named sites")
        return x
    if not isinstance(x, Mapping):
        raise TypeError(
            f"expected draws of the sites {list(sites)} by name, a dictionary or a "
            "data frame, got a table without names: of packed vectors, pass .unpack(x)"
        )
    return pack(sites, x)


def _directions(distribution: AnyDistribution) -> Tensor:
    """Return 1 or, for columns that fall as their values rise, as below a bound, -1, ``(D,)``."""
    flow = distribution.transform.flow
    ends = torch.stack((torch.zeros_like(flow.loc), torch.ones_like(flow.loc))).double()
    space = distribution.ungaussianized_space
    if distribution.sites is not None:
        values = list(unpack(distribution.sites, ends).values())
        sizes = [real_shape(*site).numel() for site in distribution.sites.values()]
    else:
        values = [space.bijection(ends) if isinstance(space, BijectiveSupport) else ends]
        sizes = [flow.event_dim]
    signs = []
    for value, size in zip(values, sizes, strict=True):
        rise = (value[1] - value[0]).reshape(-1)
        has_direction = len(rise) == size  # a number for each column, not as in a simplex
        signs.append(rise.sign() if has_direction else rise.new_ones(size))
    return torch.cat(signs)


def _rank(x: Tensor, z: Tensor) -> Tensor:
    """Return the share of draws below values, spread over the step of their rank.

    It is uniform where values are draws like the others, of however few, and where some are equal:
    each of those is as likely to be the lowest.

    Args:
        x: Values, shape ``(*)``.
        z: Draws, shape ``(L, *)``.
    """
    below, same = (x > z).double().sum(0), (x == z).double().sum(0)
    return (below + torch.rand_like(same) * (same + 1)) / (len(z) + 1)


_SHAPES = tuple(f"is predicted too {word}" for word in ("narrow", "wide", "low", "high"))
_UNEVEN = ("are uneven", "are uneven", "are too small", "are too large")


def _check(
    values: Tensor, rows: _Rows, names: list[str], words: tuple[str, ...], *, exact: bool = False
) -> CalibrationCheck:
    """Compare each column of values, shape ``(N, K)``, with the uniform distribution."""
    values = values.cpu()  # a check is a table of numbers, wherever the flow is
    count, quantities = values.shape
    if count < 2:
        raise ValueError(f"expected at least two rows to check with, got {count}")
    shared = rows.shared and not exact  # and so is their chance
    effective = count / (1 + count / rows.draws) if shared else count
    band = band_of(effective, quantities)
    order = values.sort(0).values
    steps = torch.arange(count + 1, dtype=values.dtype)[:, None] / count
    distances = torch.maximum(steps[1:] - order, order - steps[:-1]).amax(0)
    off = [i for i in distances.argsort(descending=True).tolist() if not distances[i] <= band]
    found = f"{float(distances.max()):.3f}, of {band:.3f} that chance allows in 99% of checks"
    if not off:
        verdict = f"calibrated as far as {count:,} rows tell: the largest difference is {found}"
    else:
        parts = [f"{names[i]} {_shape(values[:, i], words)}" for i in off]
        verdict = f"not calibrated: {'; '.join(parts)}. The largest difference is {found}"
    return CalibrationCheck(values, tuple(names), distances, band, verdict)


def band_of(count: float, quantities: int) -> float:
    """Return what distances from the uniform distribution exceed by chance in 1% of all checks.

    Args:
        count: How many numbers there are of each quantity, or as good as.
        quantities: How many quantities there are.
    """
    from scipy.stats import kstwo  # slow to import

    return float(kstwo.isf((1 - _LEVEL) / quantities, max(1, round(count))))


def _shape(u: Tensor, words: tuple[str, ...]) -> str:
    """Return what is off about numbers that should be uniform, shape ``(N,)``."""
    narrow, wide, low, high = words
    shift = float(u.mean() - 0.5) * math.sqrt(12)
    spread = float((u - 0.5).square().mean()) * 12 - 1
    if abs(shift) >= abs(spread) / 2:
        return low if shift > 0 else high
    return narrow if spread > 0 else wide
