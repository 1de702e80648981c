r"""What a run says of rows held out: their scores, nats beside the bar, the report at its end.

Log-densities are those of the distribution's own values: with w a row in the flow's coordinates
and :math:`y = s(w)` the map to its support, :math:`\log\rho(y) = \log\rho(w) - \log|\det \partial
s / \partial w|`. They are compared with those of one Gaussian fitted to the training rows in
unconstrained coordinates, its mean linear in the context.
"""

import contextlib
import functools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._torch import seeded, warn_user
from ..distributions.interpolant import AnyDistribution
from ..distributions.report import GAUSSIAN, Report, beside, decimals
from ..distributions.rows import shares_of
from ..distributions.supports import CircularSupport
from ..nn.modes import evaluated
from ..solvers.ode import FixedGrid
from .data import Split
from .image_rows import is_image
from .repeats import distinguished, shared_keys
from .rows import Rows, keys_of
from .selection import Scores

Show = Callable[[float, str], None]  # advances a bar to a share, with a few words beside it

_REPORTED_ROWS = 1000  # held out, that the report evaluates
# Held out, that judge weights in a run: rows, and numbers in all, as a density of D columns takes
# some D evaluations of the network. By 8 steps a banana's density is off by 0.01 nats, and the
# error differs between weights, so that fewer steps would rank them wrongly.
_JUDGED_ROWS, _JUDGED_NUMBERS = 512, 2**13
_JUDGING_SOLVER = FixedGrid(steps=16)
# To which the Gaussian is fitted, and numbers in these, beyond the fewest rows: of fewer, it is
# poorer than one could be, by 0.5 nats where 200 columns have 20,000.
_FITTED_ROWS, _FITTED_NUMBERS, _FEWEST_FITTED = 2**16, 2**24, 20_000


def log_density(distribution: AnyDistribution, rows: Rows) -> Tensor:
    """Return the log-density of values, float64, shape ``(N,)``, given in the flow's coordinates.

    Args:
        distribution: The distribution.
        rows: Rows, shape ``(N, D)``, and their contexts.
    """
    w = rows.w.to(distribution.transform.flow.loc)
    with torch.no_grad(), evaluated(distribution.transform.flow):
        found = distribution.without_support().given(rows.context).log_prob(w)
    return found.double() - distribution.from_flow(w)[1].double()


def reference(distribution: AnyDistribution, kept: Rows) -> Callable[[Rows], Tensor] | None:
    """Return the log-density of one Gaussian, or of the uniform one on the torus; None of neither.

    Args:
        distribution: What is trained.
        kept: The rows that the Gaussian is fitted to, in the flow's coordinates.
    """
    if isinstance(distribution.space, CircularSupport):
        constant = -distribution.transform.flow.event_dim * math.log(2 * math.pi)
        return lambda rows: rows.w.new_full((len(rows.w),), constant, dtype=torch.float64)
    columns = kept.w.shape[-1] + (0 if kept.context is None else kept.context.shape[-1])
    few = kept.evenly(max(_FEWEST_FITTED, min(_FITTED_ROWS, _FITTED_NUMBERS // columns)))
    flow, gaussianizer = distribution.transform.flow, distribution.gaussianizer
    x = gaussianizer(few.w.to(flow.loc)).double()
    share = shares_of(few.w, few.weight)
    if len(x) <= columns + (flow.classes or 1):
        return None
    scale = (share @ (x - share @ x).square()).sqrt()
    if not bool((scale > 0).all()):
        return None
    mean = _mean(few, x / scale, share, flow.classes)
    rest = share.sqrt()[:, None] * (x / scale - mean(few))
    root, failed = torch.linalg.cholesky_ex(rest.T @ rest)
    if bool(failed):
        return None
    normal = torch.distributions.MultivariateNormal(
        torch.zeros_like(scale), scale_tril=root, validate_args=False
    )

    def log_prob(rows: Rows) -> Tensor:
        w = rows.w.to(flow.loc)
        x, volume = gaussianizer(w), distribution.from_flow(w)[1].double()
        log_det = gaussianizer.log_abs_det_jacobian(w, x).double()
        z = x.double() / scale - mean(rows)
        return normal.log_prob(z) - scale.log().sum() + log_det - volume

    return log_prob


def _mean(rows: Rows, z: Tensor, share: Tensor, classes: int) -> Callable[[Rows], Tensor]:
    """Return the Gaussian's mean, shape ``(N, D)``: of a class, or linear in contexts.

    Args:
        rows: The rows that it is fitted to.
        z: What they are, float64, shape ``(N, D)``.
        share: Their shares, shape ``(N,)``.
        classes: The number of classes, where contexts are labels; else 0.
    """
    if classes:
        label, parts = _labels(rows), share[:, None] * z
        mass = share.new_zeros(classes, 1).index_add(0, label, share[:, None])
        means = z.new_zeros(classes, z.shape[1]).index_add(0, label, parts) / mass
        means = means.where(mass > 0, share @ z)  # a class may have no row
        return lambda rows: means[_labels(rows)]
    features, root = _features(rows), share.sqrt()[:, None]
    # gelsd, which bears linearly dependent features, exists on the CPU only.
    sides = (root * features).cpu(), (root * z).cpu()
    slopes = torch.linalg.lstsq(*sides, driver="gelsd").solution.to(z)
    return lambda rows: _features(rows) @ slopes


def _labels(rows: Rows) -> Tensor:
    """Return the labels of rows, shape ``(N,)``; 0 where they have none."""
    found = rows.w.new_zeros(len(rows.w), 1) if rows.context is None else rows.context
    return found[:, 0].long()


def _features(rows: Rows) -> Tensor:
    """Return what the Gaussian's mean is linear in, float64, shape ``(N, K)``."""
    one = rows.w.new_ones(len(rows.w), 1, dtype=torch.float64)
    return one if rows.context is None else torch.cat((one, rows.context.double()), 1)


class HeldOutDensity:
    """The log-density of rows held out, against that of one Gaussian.

    Scores of some of these rows choose the weights of a run. Not for pairs and couplings, of whose
    paths a density tells nothing; not of images, whose density takes as long as many steps; nor
    where there is no density. Nor where the base has bounds: early in training few rows lead back
    to within them, and the mean would only count these.

    Args:
        distribution: What is trained.
        split: The rows held out, and those to train on, in the flow's coordinates.

    Attributes:
        near: The rows held out, from which those that judge are taken; without outliers, once the
            flow's map is set, which tells of them.
    """

    def __init__(self, distribution: AnyDistribution, split: Split) -> None:
        self.distribution, self.split, self.near = distribution, split, split.held
        images = is_image(distribution.row_shape)
        self.normal = None if images else reference(distribution, split.kept)
        self.name = "uniform" if isinstance(distribution.space, CircularSupport) else GAUSSIAN
        self.is_known = distribution.has_density() and not images
        self.has_bounds = distribution.has_bounded_base()
        self.judges = self.is_known and not self.has_bounds
        self.last: Scores | None = None  # of the rows that judge
        self.against: float | None = None  # the Gaussian's mean of these

    @property
    def judging(self) -> Rows:
        """The rows whose scores choose the weights of a run."""
        count = max(2, _JUDGED_NUMBERS // self.near.w.shape[1])
        return self.near.evenly(min(_JUDGED_ROWS, count))

    def go_on(self, best: Tensor | None, *, judges: bool) -> None:
        """Judge on by what a run began with: scores of two kinds cannot be compared.

        Args:
            best: The best scores so far, shape ``(N,)``, or None.
            judges: Whether they are of the density.
        """
        self.judges = self.judges and judges
        if self.judges and best is not None:
            self.last = Scores.equal(best)

    def scores(self) -> Scores | None:
        r"""Return :math:`-\log\rho` of the rows that judge, by a coarse solver, or None.

        They may not be computed, or be infinite for all rows, for which no training is ended:
        then the loss judges, and where that happens later on, the weights are not kept.
        """
        transform = self.distribution.transform
        if not (self.judges and transform.flow.independent):
            return None
        solver, found = transform.solver, None
        try:
            with seeded(0):
                transform.solver = _JUDGING_SOLVER
                found = self._scores(self.judging)
        except (RuntimeError, ValueError):
            pass
        finally:
            transform.solver = solver
        if found is not None and bool(found.values.isfinite().any()):
            self.last = found
            return found
        if self.last is None:
            self.judges = False
            return None
        return self.last._replace(values=torch.full_like(self.last.values, math.inf))

    def text(self, scores: Scores) -> str:
        """Return the mean held-out nats in words, beside those of a Gaussian."""
        if self.normal is not None and self.against is None:
            self.against = float(scores.shares @ self.normal(self.judging))
        digits = decimals(scores.error())
        return f"{-scores.mean():.{digits}f} nats{beside(self.against, self.name, digits)}"

    def measured(self, report: Report) -> Report:
        """Return a report with the mean log-density of rows held out, if there is one.

        It warns where rows have none, as paths back from them end beyond the bounds of the base.

        Args:
            report: The report.
        """
        if not self.is_known:
            return report
        *numbers, none = self._means(self.split.held.evenly(_REPORTED_ROWS))
        if self.has_bounds and none > 0:
            warn_user(
                f"a share of {none:.2g} of the rows held out has density zero: paths back from "
                "them end beyond the bounds of the base, and the report leaves out the mean "
                "log-density. For a density of all rows, start from a base without bounds, such "
                "as the default"
            )
        mean, error, normal = (x if x is not None and math.isfinite(x) else None for x in numbers)
        report = replace(report, held_out=mean, held_out_stderr=error)
        return replace(report, reference=normal, reference_name=self.name)

    def _means(self, rows: Rows) -> tuple[float, float, float | None, float]:
        """Return the mean log-density of rows, its standard error, and the Gaussian's mean.

        And the share of rows without a density.
        """
        scores = self._scores(rows)
        normal = None if self.normal is None else float(scores.shares @ self.normal(rows))
        none = float(scores.shares[scores.values == math.inf].sum())
        return -scores.mean(), scores.error(), normal, none

    def _scores(self, rows: Rows) -> Scores:
        """Return how hard the distribution finds rows, in the flow's coordinates."""
        groups = distinguished(keys_of(rows), self._shared).unique(return_inverse=True)[1]
        values = -log_density(self.distribution, rows)
        return Scores(values, shares_of(rows.w, rows.weight), groups)

    @functools.cached_property
    def _shared(self) -> Tensor:
        """The keys that rows share by chance, as all tell: copies are a large share of few."""
        rows = self.split.kept.and_given(self.split.held)
        return shared_keys(rows, keys_of(rows))


@contextlib.contextmanager
def percent_bar(name: str, done: float = 0.0, *, progress: bool) -> Iterator[Show]:
    """Show a bar of the share of a run that is done, in per cent, while it runs.

    Args:
        name: What runs.
        done: The share that is done already.
        progress: Whether to show it.

    Yields:
        What advances the bar to the share that is done, with a few words beside it.
    """
    start = int(100 * done)
    with tqdm(
        desc=name, total=100, initial=start, unit="%", leave=False, disable=not progress
    ) as bar:

        def show(done: float, text: str) -> None:
            bar.set_postfix_str(text, refresh=False)
            bar.update(min(100, int(100 * done)) - bar.n)

        yield show


@contextlib.contextmanager
def stage(text: str, *, progress: bool) -> Iterator[None]:
    """Show what is being done while it is.

    Args:
        text: What that is.
        progress: Whether to show it.
    """
    with tqdm(desc=text, bar_format="{desc}", leave=False, disable=not progress):
        yield


@contextlib.contextmanager
def attempted(text: str, *, progress: bool) -> Iterator[None]:
    """Show what is being done with trained weights, and warn where it fails: they are kept.

    The reference of the calibration is solved in float64, for which a network of the user's may
    not be made, and may need more steps or memory than there are.

    Args:
        text: What that is.
        progress: Whether to show it.
    """
    try:
        with stage(text, progress=progress):
            yield
    except (RuntimeError, ValueError) as error:
        warn_user(
            f"{text} failed: the weights are trained, and the solver may be the one before. Call "
            "calibrate(distribution, rows), or calibrate_sampler(distribution) of images, once "
            f"the cause is away. It was a {type(error).__name__}: {error}"
        )


def tell(text: str) -> None:
    """Print a line beside bars, where these go."""
    tqdm.write(text, file=sys.stderr)
