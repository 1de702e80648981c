r"""Noise: what a measured row y says about the latent x behind it, :math:`\log p(y | x)`.

Gaussian noise of given standard deviations or covariances is whitened once: with
:math:`S^{-1} = W^T W`, :math:`\log p(y | x) = -\frac12 |W (y - x)|^2 + \log|W| + \text{const}`. A
missing number has an infinite error: its row and column of W are zero, and it counts nowhere. An
error below the rounding of y counts as that rounding. Any other noise is a function of x and of a
row's own numbers that returns a distribution of y.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.distributions import Distribution

from .._torch import broadcast_shapes
from ..distributions.rows import (
    FLOATED,
    as_tensor,
    checked_rows,
    columns_in_order,
    counted,
    in_order,
    names_of,
)
from .validity import is_valid, without_validation

_ASYMMETRY = 1e-4  # of a covariance, in units of the standard deviations

NoiseFunction = Callable[[Tensor, Any], Any]
Noise = ArrayLike | NoiseFunction


@dataclasses.dataclass(frozen=True)
class Measurements:
    r"""Rows of a noisy catalogue, each with the numbers that its noise takes.

    Attributes:
        y: What was measured, shape ``(N, *shape)``; zero where it is missing.
        row: The numbers of each row's noise, shape ``(N, ...)``: inverse standard deviations, the
            matrices W, or those that a function takes; None where it takes none.
        log_density: From x, y and these numbers, broadcastable, to :math:`\log p(y | x)`.
        context: What the population is given, shape ``(N, C)``, or None.
    """

    y: Tensor
    row: Tensor | None
    log_density: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    context: Tensor | None = None

    def __len__(self) -> int:
        """Return N."""
        return len(self.y)

    def take(self, index: Tensor | slice) -> "Measurements":
        """Return the rows of an index."""
        row, context = (None if p is None else p[index] for p in (self.row, self.context))
        return dataclasses.replace(self, y=self.y[index], row=row, context=context)

    def is_gaussian(self) -> bool:
        """Return whether errors are given as standard deviations or covariances."""
        return self.log_density in (_independent, _correlated)

    def precisions(self) -> Tensor:
        """Return inverse covariances of Gaussian noise, 0 of missing numbers, ``(N, D, D)``."""
        row: Any = self.row
        row = row.double()
        if self.log_density is _correlated:
            return row.mT @ row
        return torch.diag_embed(row.reshape(len(self), -1).square())

    def to(self, like: Tensor, size: Tensor) -> "Measurements":
        """Return the rows in the type and on the device of latents.

        Args:
            like: A tensor of theirs.
            size: What they are rounded with beside the size of their own row, in the shape of one.
                Gaussian errors below that rounding count as it.
        """
        row: Any = self.row
        if self.is_gaussian():
            least = _rounding(self.y, like.dtype, size.double())
            if self.log_density is _correlated:
                there = row.diagonal(dim1=-2, dim2=-1) > 0
                root = torch.linalg.inv(_with_identity(row.double(), there))
                row = _whitening(root @ root.mT, least, there)
            else:
                row = row.double().minimum(1 / least)
        if row is not None:
            row = row.to(like) if row.is_floating_point() else row.to(like.device)
        return dataclasses.replace(self, y=self.y.to(like), row=row)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise a ValueError unless latents of a shape are of that of y, where they must be."""
        if self.is_gaussian() and tuple(shape) != self.y.shape[1:]:
            raise ValueError(
                "expected x and y of one shape beside Gaussian errors, "
                f"{tuple(self.y.shape[1:])}, got x of {tuple(shape)}: pass a function "
                "noise(x, row), or leave event_shape out"
            )

    def check(self, x: Tensor) -> None:
        """Raise an error unless latents, ``(M, *event_shape)``, have likelihoods.

        Raises:
            ValueError: If a function or its derivatives fail, or the log-likelihoods of three
                latents of two rows are not of shape ``(2, 3)``; or latents are not of the shape
                of y where they must be.
        """
        self.check_shape(x.shape[1:])
        few, latents = self.take(slice(2)), x[:3].to(self.y)[None]
        shapes = f"x of shape {tuple(latents.shape)} and row of shape ({len(few)}, 1, ...)"
        try:
            found = few.log_likelihood(latents)
            one = latents[0, :1].expand(len(few), *latents.shape[2:])
            # What the search for modes needs.
            few.derivatives(one, one.new_ones(len(few), one[0].numel(), 1).double())
        except Exception as error:  # whatever a function does with shapes it does not expect
            raise ValueError(
                f"expected noise(x, row) to work for {shapes}, with gradients, got "
                f"{type(error).__name__}: {error}. Use x[..., i] and row[..., j], and torch"
            ) from error
        if found.shape != (len(few), latents.shape[1]):
            raise ValueError(
                "expected noise(x, row) to return a distribution with a log_prob of shape "
                f"{(len(few), latents.shape[1])} for {len(few)} rows y, {shapes}, got "
                f"{tuple(found.shape)}: use x[..., i] and row[..., j]"
            )

    def log_likelihood(self, x: Tensor) -> Tensor:
        r"""Return :math:`\log p(y | x)`, shape ``(N, K)``; ``-inf`` where it is not finite.

        Args:
            x: K latents of each row, shape ``(N, K, *event_shape)``, or ``(1, K, *event_shape)``
                the same for all.
        """
        row = None if self.row is None else self.row[:, None]
        found = self.log_density(x, self.y[:, None], row)
        return torch.where(found.isfinite(), found, -math.inf)

    def derivatives(self, x: Tensor, slopes: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the gradient and the Hessian of :math:`w \mapsto \log p(y | x + J w)` at 0.

        Along the base: in the units of x, the Hessian might be beyond the range of their type.

        Args:
            x: A latent of each row, shape ``(n, *event_shape)``.
            slopes: J, in float64, shape ``(n, E, D)``, E the number of values of an event.

        Returns:
            Shapes ``(n, D)`` and ``(n, D, D)``, in float64. Zero where the likelihood has no
            derivative.
        """
        n, _, dim = slopes.shape
        none = slopes.new_zeros(n, dim, dim)
        with torch.enable_grad():
            w = slopes.new_zeros(n, dim, requires_grad=True)
            # In float64 but for x: noise may be 10,000 times wider along another direction.
            moved = x + (slopes @ w[..., None]).reshape(x.shape).to(x)
            total = self.log_likelihood(moved[:, None]).sum()
            if not total.requires_grad:
                return none[:, 0], none
            # Parameters of the noise may have a gradient where x has none.
            unused: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
            (gradient,) = torch.autograd.grad(total, w, create_graph=True, **unused)
            columns = [
                torch.autograd.grad(part.sum(), w, retain_graph=True, **unused)[0]
                for part in gradient.unbind(-1)
                if gradient.requires_grad
            ]
        hessian = torch.stack(columns, 1) if columns else none
        return gradient.detach().nan_to_num(), hessian.detach().nan_to_num()


def measurements(
    y: ArrayLike,
    noise: Noise,
    noise_data: ArrayLike | None = None,
    names: Sequence[str] = (),
) -> Measurements:
    """Return checked rows of a catalogue.

    Args:
        y: What was measured, shape ``(N, D)``, or ``(N,)``.
        noise: Standard deviations, shape ``(N, D)``; covariances, shape ``(N, D, D)``; or a
            function of x and a row's numbers.
        noise_data: These numbers, shape ``(N, ...)``, for a function: in the order that it takes
            them in, but for a data frame with the names of the latents.
        names: Those of the columns of latents in their order, or none: a data frame y is taken by
            them. Errors, and beside a function y, may have other names: errors then go by the
            columns of y that are in the same places.

    Raises:
        TypeError: If something is of a wrong type.
        ValueError: If something is of a wrong shape, not finite where it must be, no standard
            deviation, or no covariance; if a row has nothing that was measured, or a data frame
            columns of other names.
    """
    # Copies: nothing could be differentiated with tensors of inference mode.
    found = _by_name(y, names, "y", strict=not callable(noise)).detach().clone()
    if not found.is_floating_point():
        raise TypeError(f"expected y of a floating type, got {found.dtype}: convert it, {FLOATED}")
    if found.dim() not in (1, 2) or found.numel() == 0:
        raise ValueError(f"expected y of shape (N, D) or (N,), got {tuple(found.shape)}")
    if callable(noise):
        found = checked_rows(found, "y", found.shape[1:])
        if noise_data is not None and sorted(names_of(noise_data)) == sorted(names):
            noise_data = columns_in_order(noise_data, names, "noise_data")
        row = None if noise_data is None else _numbers(noise_data, found)
        return Measurements(found, row, partial(_of_function, noise))
    if noise_data is not None:
        raise ValueError(
            "expected noise_data beside a function noise(x, row), got them beside "
            "standard deviations or covariances, which are the rows' own already"
        )
    log_density: Callable[[Tensor, Tensor, Any], Tensor]
    own = names_of(y)
    of_noise = own if own and set(own) != set(names) else names
    given = _by_name(noise, of_noise, "noise", strict=False)
    spread = given.detach().double()
    if spread.dim() == 0 or len(spread) != len(found):
        raise ValueError(
            f"expected noise of {len(found)} rows, as y has, got shape {tuple(spread.shape)}: "
            "errors that all rows share are expanded, sds.expand(y.shape)"
        )
    least = _rounding(found, found.dtype)
    # Errors of other names or none are those of the columns of y, where these were.
    wanted = () if set(names_of(noise)) == set(names) else names
    if spread.shape == found.shape:
        spread = in_order(spread, own, wanted)
        inverse, log_density = _inverse_sds(spread, least), _independent
    elif found.dim() == 2 and spread.shape == (*found.shape, found.shape[1]):
        spread = in_order(in_order(spread, own, wanted).mT, own, wanted).mT
        inverse, log_density = _whitenings(spread, given.dtype, least), _correlated
    else:
        kinds = f"standard deviations of shape {tuple(found.shape)}"
        if found.dim() == 2:
            kinds += f" or covariances of shape {(*found.shape, found.shape[-1])}"
        raise ValueError(f"expected noise as {kinds}, got {tuple(spread.shape)}")
    there = (inverse.diagonal(dim1=-2, dim2=-1) if log_density is _correlated else inverse) > 0
    _check_known(found, there)
    return Measurements(found.where(there, 0.0), inverse.to(found), log_density)


def _by_name(x: ArrayLike, names: Sequence[str], name: str, *, strict: bool) -> Tensor:
    """Return values, those of a data frame with their columns in an order of names.

    Args:
        x: What was given, shape ``(N, D)``.
        names: The names in their order, or none.
        name: What to call it in messages.
        strict: Whether other names are refused; else such columns stay where they are.
    """
    known = strict or set(names_of(x)) == set(names)
    return columns_in_order(x, names if known else (), name)


def _check_known(y: Tensor, there: Tensor) -> None:
    """Raise an error if a number that was measured is not finite, or a row has none."""
    bad = (there & ~y.isfinite()).reshape(len(y), -1).any(1)
    if bool(bad.any()):
        raise ValueError(
            "expected finite y where errors are finite, got NaN or infinite values in "
            f"{counted(bad)}: a missing value has an infinite error, torch.inf"
        )
    empty = ~there.reshape(len(y), -1).any(1)
    if bool(empty.any()):
        raise ValueError(
            "expected at least one finite error in each row, got "
            f"{counted(empty, 'rows with nothing measured')}: remove them"
        )


def _numbers(noise_data: ArrayLike, y: Tensor) -> Tensor:
    """Return the numbers of each row's noise, shape ``(N, ...)``, floats in the type of y.

    Whole numbers, such as those of instruments, keep all their digits.
    """
    row = as_tensor(noise_data, "noise_data").detach().clone()
    if row.dim() == 0 or len(row) != len(y):
        raise ValueError(
            f"expected noise_data of {len(y)} rows, as y has, got shape {tuple(row.shape)}"
        )
    return row.to(y) if row.is_floating_point() else row.to(y.device)


def _rounding(y: Tensor, dtype: torch.dtype, size: Tensor | float = 0.0) -> Tensor:
    """Return the rounding of each number of y, and of what is added to it, ``(N, D)``, float64.

    A row's own: errors of one must not depend on which others are beside it.

    Args:
        y: The rows.
        dtype: The type that they will be rounded to, where that is coarser than their own.
        size: Of what is added, in the shape of a row.
    """
    kind = max(torch.finfo(y.dtype), torch.finfo(dtype), key=lambda kind: kind.eps)
    least = kind.eps * (y.double().abs() + size)
    return least.nan_to_num(0.0, posinf=0.0).clamp(min=kind.tiny)


def _inverse_sds(sds: Tensor, least: Tensor) -> Tensor:
    """Return inverse standard deviations, 0 for infinite ones, of at least those of rounding."""
    bad = (~(sds > 0)).reshape(len(sds), -1).any(1)
    if bool(bad.any()):
        raise ValueError(
            f"expected standard deviations above 0, got others in {counted(bad)}: infinity where "
            "a value is missing, and a small number where there is no error"
        )
    return 1 / sds.maximum(least)


def _whitenings(covariances: Tensor, given: torch.dtype, least: Tensor) -> Tensor:
    """Return W with :math:`S^{-1} = W^T W`, zero in rows and columns of infinite variance.

    Args:
        covariances: Float64, shape ``(N, D, D)``.
        given: The type they were given in, whose rounding tells which are singular.
        least: The rounding of y, whose variance is added, shape ``(N, D)``.
    """
    dim = covariances.shape[-1]
    diagonal = covariances.diagonal(dim1=-2, dim2=-1)
    there = diagonal != math.inf
    identity = torch.eye(dim).to(covariances)
    known = _with_identity(covariances, there)
    scale = known.diagonal(dim1=-2, dim2=-1).sqrt()
    correlation = known / (scale[:, :, None] * scale[:, None, :])
    finite = correlation.isfinite().all(-1).all(-1)  # of variances above zero
    correlation = torch.where(finite[:, None, None], correlation, identity)
    skew = (correlation - correlation.mT).abs().amax((-2, -1)) > _ASYMMETRY
    eps = torch.finfo(given if given.is_floating_point else torch.float64).eps
    singular = torch.linalg.eigvalsh(correlation)[:, 0] < dim * eps
    bad = ~finite | skew | singular
    if bool(bad.any()):
        raise ValueError(
            "expected covariances that are symmetric and positive definite, got others in "
            f"{counted(bad)}: an infinite variance where a value is missing, a small one where "
            "there is no error"
        )
    return _whitening(known, least, there)


def _with_identity(matrices: Tensor, there: Tensor) -> Tensor:
    """Return matrices, ``(N, D, D)``, with those of the identity in rows and columns not there."""
    both = there[:, :, None] & there[:, None, :]
    return torch.where(both, matrices, torch.eye(matrices.shape[-1]).to(matrices))


def _whitening(known: Tensor, least: Tensor, there: Tensor) -> Tensor:
    """Return W of covariances, to which variances are added, zero where not there.

    Args:
        known: Float64, shape ``(N, D, D)``.
        least: Standard deviations of what is added, shape ``(N, D)``.
        there: What is measured, of the same shape.
    """
    raised = known + torch.diag_embed(least.where(there, 0.0) ** 2)
    identity = torch.eye(known.shape[-1]).to(known).expand_as(known)
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(raised), identity, upper=False)
    return inverse * (there[:, :, None] & there[:, None, :])


def _independent(x: Tensor, y: Tensor, inverse: Any) -> Tensor:
    """Return the log-density of y for inverse standard deviations, zero where y is missing."""
    scaled = (y - x) * inverse
    return (
        _normal(scaled, inverse) if y.dim() > 2 else _normal(scaled[..., None], inverse[..., None])
    )


def _correlated(x: Tensor, y: Tensor, whitening: Any) -> Tensor:
    """Return the log-density of y for matrices W, shape ``(*, D, D)``."""
    scaled = (y - x) @ whitening[:, 0].mT
    return _normal(scaled, whitening.diagonal(dim1=-2, dim2=-1))


def _normal(scaled: Tensor, diagonal: Tensor) -> Tensor:
    """Return the log-density of whitened residuals, ``(*, D)``, that the diagonals of W give."""
    there = diagonal > 0
    volume = diagonal.where(there, 1.0).log().sum(-1)
    constant = 0.5 * math.log(2 * math.pi) * there.sum(-1)
    return volume - constant - 0.5 * scaled.square().sum(-1)


def _of_function(noise: NoiseFunction, x: Tensor, y: Tensor, row: Tensor | None) -> Tensor:
    r"""Return :math:`\log p(y | x)`, ``(n, S)``, that a function gives, ``-inf`` of impossible y.

    Args:
        noise: From latents, shape ``(*, *event_shape)``, and numbers of rows, broadcastable, to a
            distribution of y.
        x: The latents.
        y: The rows.
        row: Their numbers, or None.
    """
    with without_validation:  # y may be impossible under some x
        found = noise(x, row)
        if not hasattr(found, "log_prob"):
            raise TypeError(
                "expected noise(x, row) to return a Pyro distribution of y given x, got "
                f"{type(found).__name__}"
            )
        log_prob = found.log_prob(y)
        # Nobody has validated y: off a fixed support, too, formulas go on.
        valid = is_valid(found, y, moved=True) if isinstance(found, Distribution) else True
    log_prob = log_prob.reshape(*log_prob.shape[:2], -1).sum(-1)
    if isinstance(valid, bool):
        return log_prob
    # The shape of all numbers of y: a distribution of one's own may have summed over some.
    shape = broadcast_shapes(valid.shape, y.shape[: y.dim() - len(found.event_shape)])
    valid = valid.expand(shape).reshape(*shape[:2], -1).all(-1)
    return torch.where(valid, log_prob, -math.inf)
