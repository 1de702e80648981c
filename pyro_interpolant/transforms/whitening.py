r"""Whitening: the affine map :math:`y = \mathrm{loc} + L w` between whitened and data coordinates.

The velocity moves w, whose covariance is near to one; everything a user sees is y. There are three
members, by what L is: a matrix, one scale per coordinate, or one scale for all. Displacements and
rates of w are multiplied by L to be those of y, and gradients with respect to w by
:math:`L^{-T}`.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Whitening(nn.Module, ABC):
    r"""The map :math:`y = \mathrm{loc} + L w`; at first the identity.

    Attributes:
        loc: The centre, shape ``(D,)``.
        linear: L, in the shape that the member stores.
        log_det: :math:`\log |\det L|`, shape ``()``.
    """

    loc: Tensor
    linear: Tensor
    log_det: Tensor

    def __init__(self, event_dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(event_dim))
        self.register_buffer("log_det", torch.zeros(()))
        self.register_buffer("linear", self._identity())

    @abstractmethod
    def _identity(self) -> Tensor:
        """Return the L of the identity, in the shape and type that the member stores."""

    @abstractmethod
    def _slogdet(self, linear: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the sign of :math:`\det L` and :math:`\log |\det L|`, shape ``()`` each."""

    @abstractmethod
    def set_diagonal(self, loc: Tensor, scale: Tensor) -> None:
        """Set the map from a centre and one scale per column, each of shape ``(D,)``."""

    @abstractmethod
    def push(self, u: Tensor) -> Tensor:
        """Return ``L u``: the displacement or rate in data coordinates, shape ``(*, D)``.

        Args:
            u: That in whitened coordinates, shape ``(*, D)``.
        """

    @abstractmethod
    def unpush(self, u: Tensor) -> Tensor:
        r"""Return :math:`L^{-1} u`: the inverse of :meth:`push`, shape ``(*, D)``."""

    @abstractmethod
    def pull(self, gradient: Tensor) -> Tensor:
        r"""Return :math:`L^{-T} g`: the gradient with respect to y, shape ``(*, D)``.

        Args:
            gradient: That with respect to w, shape ``(*, D)``.
        """

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return L as a matrix, shape ``(D, D)``."""

    @torch.no_grad()
    def set(self, loc: Tensor, linear: Tensor) -> None:
        """Set the map.

        Args:
            loc: The centre, shape ``(D,)``.
            linear: L, of the shape that the member stores: ``(D, D)``, ``(D,)`` or ``()``.

        Raises:
            ValueError: If a shape is wrong, L is not invertible, or either is not finite.
        """
        if loc.shape != self.loc.shape or linear.shape != self.linear.shape:
            raise ValueError(
                f"expected loc of shape {tuple(self.loc.shape)} and linear of shape "
                f"{tuple(self.linear.shape)}, got {tuple(loc.shape)} and {tuple(linear.shape)}"
            )
        _, log_det = self._slogdet(linear.double())
        parts = (loc, linear, log_det)
        if not all(bool(torch.isfinite(part).all()) for part in parts):
            raise ValueError(
                "expected an invertible linear map, got one that is singular or not finite"
            )
        self.loc.copy_(loc)
        self.linear.copy_(linear)
        self.log_det.copy_(log_det)

    def sign(self) -> int:
        r"""Return the sign of :math:`\det L`."""
        return int(self._slogdet(self.linear.double())[0])

    def is_identity(self) -> bool:
        """Return whether L is the identity."""
        return torch.equal(self.linear, self._identity().to(self.linear))

    def to_white(self, y: Tensor) -> Tensor:
        """Return whitened coordinates of data coordinates, each of shape ``(*, D)``."""
        return self.unpush(y - self.loc)

    def from_white(self, w: Tensor) -> Tensor:
        """Return data coordinates of whitened coordinates, each of shape ``(*, D)``."""
        return self.loc + self.push(w)

    def double_to_white(self, y: Tensor) -> Tensor:
        """Return the same as :meth:`to_white`, computed in float64, in the map's own type.

        Rows far from zero lose digits otherwise.
        """
        return self.unpush(y.double() - self.loc.double()).to(self.loc)


class DenseWhitening(Whitening):
    """L is a matrix: columns are centred, scaled and decorrelated. For D up to some hundred.

    Args:
        event_dim: D.

    Attributes:
        inverse: The inverse of L, shape ``(D, D)``.
    """

    inverse: Tensor

    def __init__(self, event_dim: int) -> None:
        super().__init__(event_dim)
        self.register_buffer("inverse", self._identity())

    def _identity(self) -> Tensor:
        return torch.eye(len(self.loc))

    def _slogdet(self, linear: Tensor) -> tuple[Tensor, Tensor]:
        return torch.linalg.slogdet(linear)

    @torch.no_grad()
    def set(self, loc: Tensor, linear: Tensor, inverse: Tensor | None = None) -> None:
        """Set the map from a centre, shape ``(D,)``, and L, shape ``(D, D)``.

        Args:
            loc: The centre.
            linear: L.
            inverse: Its inverse, shape ``(D, D)``; computed in float64 if not given.

        Raises:
            ValueError: If a shape is wrong, L is not invertible, or either is not finite.
        """
        super().set(loc, linear)
        self.inverse.copy_(torch.linalg.inv(linear.double()) if inverse is None else inverse)

    def set_diagonal(self, loc: Tensor, scale: Tensor) -> None:
        """Set the map from a centre and one scale per column, each of shape ``(D,)``."""
        self.set(loc, scale.diag(), scale.reciprocal().diag())

    def push(self, u: Tensor) -> Tensor:
        """Return ``L u``, shape ``(*, D)``."""
        return u @ self.linear.T

    def unpush(self, u: Tensor) -> Tensor:
        r"""Return :math:`L^{-1} u`, shape ``(*, D)``."""
        return u @ self.inverse.T.to(u.dtype)

    def pull(self, gradient: Tensor) -> Tensor:
        r"""Return :math:`L^{-T} g`, shape ``(*, D)``."""
        return gradient @ self.inverse

    def matrix(self) -> Tensor:
        """Return L, shape ``(D, D)``."""
        return self.linear


class DiagonalWhitening(Whitening):
    """L is diagonal: columns are centred and scaled one by one, in memory of order D.

    Args:
        event_dim: D.
    """

    def _identity(self) -> Tensor:
        return torch.ones(len(self.loc))

    def _slogdet(self, linear: Tensor) -> tuple[Tensor, Tensor]:
        scales = linear.expand_as(self.loc)
        return scales.sign().prod(), scales.abs().log().sum()

    def set_diagonal(self, loc: Tensor, scale: Tensor) -> None:
        """Set the map from a centre and one scale per column, each of shape ``(D,)``."""
        self.set(loc, scale)

    def push(self, u: Tensor) -> Tensor:
        """Return ``L u``, shape ``(*, D)``."""
        return u * self.linear

    def unpush(self, u: Tensor) -> Tensor:
        r"""Return :math:`L^{-1} u`, shape ``(*, D)``."""
        return u / self.linear.to(u.dtype)

    def pull(self, gradient: Tensor) -> Tensor:
        r"""Return :math:`L^{-T} g`, shape ``(*, D)``."""
        return gradient / self.linear

    def matrix(self) -> Tensor:
        """Return L as a matrix, shape ``(D, D)``."""
        return self.linear.expand_as(self.loc).diag()


class ScalarWhitening(DiagonalWhitening):
    """L is one scale: an image stays an image, and the metric is that of data space.

    Data set one centre for all columns as well.

    Args:
        event_dim: D.
    """

    def _identity(self) -> Tensor:
        return torch.ones(())

    def set_diagonal(self, loc: Tensor, scale: Tensor) -> None:
        """Set one centre, the mean, and the scale about it, from those of shape ``(D,)`` each.

        A mean image taken from each would show in what a convolution sees.
        """
        centre = loc.mean().expand_as(loc)
        self.set(centre, (scale.square() + (loc - centre).square()).mean().sqrt())
