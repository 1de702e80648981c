r"""Whitening: the affine map :math:`y = \mathrm{loc} + L w` between whitened and data space.

The velocity moves w, whose covariance is near to one; everything a user sees is y. The map has
three members, by what L is: a matrix, one scale per coordinate, or one scale for all. Whitened
vectors are carried along by L, and gradients with respect to w back by its transposed inverse.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

__all__ = ["DenseWhitening", "DiagonalWhitening", "ScalarWhitening", "Whitening"]


class Whitening(nn.Module, ABC):
    r"""The map :math:`y = \mathrm{loc} + L w`; at first the identity.

    Attributes:
        loc: The centre, shape ``(D,)``.
        log_det: :math:`\log |\det L|`, shape ``()``.
    """

    loc: Tensor
    log_det: Tensor

    def __init__(self, event_dim: int) -> None:
        super().__init__()
        self.register_buffer("loc", torch.zeros(event_dim))
        self.register_buffer("log_det", torch.zeros(()))

    @abstractmethod
    def set(self, loc: Tensor, linear: Tensor) -> None:
        """Set the map.

        Args:
            loc: The centre, shape ``(D,)``.
            linear: L, of the shape that the member stores.

        Raises:
            ValueError: If a shape is wrong, or L is not invertible or not finite.
        """

    @abstractmethod
    def set_diagonal(self, loc: Tensor, scale: Tensor) -> None:
        """Set the map from a centre and one scale per column, each of shape ``(D,)``."""

    @abstractmethod
    def push(self, u: Tensor) -> Tensor:
        """Return ``L u``: a whitened displacement or rate, shape ``(*, D)``, in data space."""

    @abstractmethod
    def unpush(self, u: Tensor) -> Tensor:
        r"""Return :math:`L^{-1} u`, shape ``(*, D)``, of a displacement in data space."""

    @abstractmethod
    def pull(self, gradient: Tensor) -> Tensor:
        r"""Return :math:`L^{-T} g`: a gradient with respect to w, ``(*, D)``, that to y."""

    @abstractmethod
    def matrix(self) -> Tensor:
        """Return L as a matrix, shape ``(D, D)``."""

    @abstractmethod
    def is_identity(self) -> bool:
        """Return whether L is the identity."""

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

    def _checked(self, loc: Tensor, linear: Tensor, shape: tuple[int, ...]) -> None:
        if loc.shape != self.loc.shape or linear.shape != shape:
            raise ValueError(
                f"expected loc of shape {tuple(self.loc.shape)} and linear of shape {shape}, got "
                f"{tuple(loc.shape)} and {tuple(linear.shape)}"
            )


class DenseWhitening(Whitening):
    """L is a matrix: columns are centred, scaled and decorrelated. For up to some hundred of them.

    Args:
        event_dim: D.
    """

    linear: Tensor
    inverse: Tensor

    def __init__(self, event_dim: int) -> None:
        super().__init__(event_dim)
        self.register_buffer("linear", torch.eye(event_dim))
        self.register_buffer("inverse", torch.eye(event_dim))

    def set(self, loc: Tensor, linear: Tensor, inverse: Tensor | None = None) -> None:
        """Set the map from a centre, shape ``(D,)``, and L, shape ``(D, D)``.

        Args:
            loc: The centre.
            linear: L.
            inverse: Its inverse, shape ``(D, D)``; computed in float64 if not given.

        Raises:
            ValueError: If a shape is wrong, or L is not invertible or not finite.
        """
        self._checked(loc, linear, tuple(self.linear.shape))
        if inverse is None:
            inverse, info = torch.linalg.inv_ex(linear.double())
            if info.item() or not bool(torch.isfinite(inverse).all()):
                raise ValueError("expected an invertible linear map, got a singular one")
        with torch.no_grad():
            self.loc.copy_(loc)
            self.linear.copy_(linear)
            self.inverse.copy_(inverse)
            self.log_det.copy_(torch.linalg.slogdet(linear.double()).logabsdet)

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

    def is_identity(self) -> bool:
        """Return whether L is the identity."""
        return torch.equal(self.linear, torch.eye(len(self.linear)).to(self.linear))


class DiagonalWhitening(Whitening):
    """L is diagonal: columns are centred and scaled one by one, in memory of order D.

    Args:
        event_dim: D.
    """

    scale: Tensor

    def __init__(self, event_dim: int) -> None:
        super().__init__(event_dim)
        self.register_buffer("scale", torch.ones(self._scale_shape()))

    def _scale_shape(self) -> tuple[int, ...]:
        return tuple(self.loc.shape)

    def set(self, loc: Tensor, linear: Tensor) -> None:
        """Set the map from a centre, shape ``(D,)``, and scales, shape ``(D,)``.

        Raises:
            ValueError: If a shape is wrong, or a scale is zero or not finite.
        """
        self._checked(loc, linear, self._scale_shape())
        if not bool((torch.isfinite(linear) & (linear != 0)).all()):
            raise ValueError("expected an invertible linear map, got scales of zero or not finite")
        with torch.no_grad():
            self.loc.copy_(loc)
            self.scale.copy_(linear)
            self.log_det.copy_(linear.double().abs().log().expand_as(self.loc).sum())

    def set_diagonal(self, loc: Tensor, scale: Tensor) -> None:
        """Set the map from a centre and one scale per column, each of shape ``(D,)``."""
        self.set(loc, scale)

    def push(self, u: Tensor) -> Tensor:
        """Return ``L u``, shape ``(*, D)``."""
        return u * self.scale

    def unpush(self, u: Tensor) -> Tensor:
        r"""Return :math:`L^{-1} u`, shape ``(*, D)``."""
        return u / self.scale.to(u.dtype)

    def pull(self, gradient: Tensor) -> Tensor:
        r"""Return :math:`L^{-T} g`, shape ``(*, D)``."""
        return gradient / self.scale

    def matrix(self) -> Tensor:
        """Return L as a matrix, shape ``(D, D)``."""
        return self.scale.expand_as(self.loc).diag()

    def is_identity(self) -> bool:
        """Return whether L is the identity."""
        return bool((self.scale == 1).all())


class ScalarWhitening(DiagonalWhitening):
    """L is one scale: an image stays an image, and the metric is that of data space.

    Args:
        event_dim: D.
    """

    def _scale_shape(self) -> tuple[int, ...]:
        return ()

    def set(self, loc: Tensor, linear: Tensor) -> None:
        """Set the map from a centre, shape ``(D,)``, and a scale, shape ``()``.

        Raises:
            ValueError: If a shape is wrong, or the scale is zero or not finite.
        """
        super().set(loc, linear)

    def set_diagonal(self, loc: Tensor, scale: Tensor) -> None:
        """Set the map from a centre and the root mean square of scales, each of shape ``(D,)``."""
        self.set(loc, scale.square().mean().sqrt())
