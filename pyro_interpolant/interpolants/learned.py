r"""An interpolant with learned weights, :math:`I_t = a(t) x_0 + b(t) x_1 + \sin(\pi t) N`.

The coefficients a and b are the trigonometric ones plus sine waves with weights, scalars or
matrices; N is a network of t, :math:`x_0` and :math:`x_1`. Only the ends are fixed, so that
training can shorten the paths toward optimal transport.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._package import check_ranges, check_sizes, whole
from .._torch import slopes
from .linear import Coefficients, Interpolant


class LearnedInterpolant(nn.Module, Interpolant):
    r"""Trigonometric coefficients plus sine waves, and a network that vanishes at the ends.

    .. math:: I_t = \Bigl(\cos\tfrac{\pi t}{2} + \sum_{k=1}^{M} \tfrac{a_k}{k} \sin k\pi t\Bigr)
              x_0 + \Bigl(\sin\tfrac{\pi t}{2} + \sum_{k=1}^{M} \tfrac{b_k}{k} \sin k\pi t\Bigr)
              x_1 + \sin(\pi t)\, N(t, x_0, x_1)

    Divided by k, all waves have slopes, and so energies, of one size for weights of one size. The
    ends are exact for any weights; with ``matrices`` the :math:`a_k, b_k` are D x D. A start
    from moments adds two centres :math:`m_0, m_1`, whose own path is the straight line and about
    which all this then acts; from a standard normal they stay at zero. All weights are buffers:
    :func:`~pyro_interpolant.learn_interpolant` sets them, and no other training does.

    Args:
        modes: M, the number of sine waves; 0 for none.
        event_dim: D; needed for ``matrices`` and for ``network``.
        matrices: Whether the weights of the waves are matrices.
        network: The hidden widths of N, or None for no network.

    Raises:
        TypeError: If the widths are no sequence of whole numbers.
        ValueError: If ``modes`` is negative, or ``event_dim`` is missing where it is needed.

    References:
        arXiv 2209.15571, Section 2.3 and Appendix B.

    Example:
        >>> interpolant = LearnedInterpolant(modes=3)
        >>> [round(float(c), 4) for c in interpolant.coefficients(torch.tensor(0.5))]
        [0.7071, 0.7071, 0.0]
    """

    waves: Tensor
    centres: Tensor

    def __init__(
        self,
        modes: int = 5,
        *,
        event_dim: int | None = None,
        matrices: bool = False,
        network: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_ranges(whole("modes", modes, 0))
        if event_dim is None and (matrices or network is not None):
            raise ValueError("expected event_dim for matrices or a network, got none")
        if network is not None:
            check_sizes("network", network)
        self.modes, self.event_dim, self.matrices = int(modes), event_dim, matrices
        self.hidden_dims = None if network is None else tuple(network)
        inner = (event_dim, event_dim) if matrices else ()
        self.register_buffer("waves", torch.zeros(2, self.modes, *inner))
        self.register_buffer("centres", torch.zeros(2, event_dim or 1))
        self.depth = 0
        if network is not None:
            dim = event_dim or 1
            widths = (2 * dim + 2, *network, dim)
            self.depth = len(widths) - 1
            for i, (a, b) in enumerate(zip(widths, widths[1:], strict=False)):
                scale = 0.0 if i == self.depth - 1 else 1 / math.sqrt(a)
                self.register_buffer(f"weight{i}", scale * torch.randn(b, a))
                self.register_buffer(f"bias{i}", torch.zeros(b))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of the constructor, by name."""
        return {
            "modes": self.modes,
            "event_dim": self.event_dim,
            "matrices": self.matrices,
            "network": self.hidden_dims,
        }

    def weights(self) -> list[Tensor]:
        """Return the learned tensors, of any shapes: the waves, and the network's weights."""
        named = dict(self.named_buffers())
        layers = [named[f"{kind}{i}"] for i in range(self.depth) for kind in ("weight", "bias")]
        return [self.waves, *layers] if self.modes else layers

    def start_from_moments(
        self,
        mean0: Tensor,
        cov0: Tensor,
        mean1: Tensor,
        cov1: Tensor,
        metric: Tensor | None = None,
    ) -> None:
        r"""Set the waves to the shortest path between Gaussians that they can take.

        For matrices, with T the symmetric map that takes one covariance to the other and
        :math:`M_t = (1 - t) 1 + t T`, it is
        :math:`M_t (\cos\tfrac{\pi t}{2} x_0 + \sin\tfrac{\pi t}{2} T^{-1} x_1)` about the means:
        its velocity is :math:`\dot M_t M_t^{-1} x`, that of the geodesic. For scalars a, b the
        energy :math:`\int \mathrm{tr}\, C S^{-1} C^T dt`, with :math:`S = a^2 S_0 +
        b^2 S_1` and :math:`C = a\dot a S_0 + b\dot b S_1`, is minimised numerically.

        Args:
            mean0: Mean of the base, whitened, shape ``(D,)``.
            cov0: Its covariance, shape ``(D, D)``.
            mean1: Mean of the data, whitened, shape ``(D,)``.
            cov1: Its covariance, shape ``(D, D)``.
            metric: The map L in whose metric lengths are taken, shape ``(D, D)``; by default 1.
        """
        self.event_dim = len(mean0)
        self.centres = torch.stack((mean0, mean1)).to(self.waves)
        cov0, cov1 = cov0.double(), cov1.double()
        if metric is not None:
            metric = metric.double()
            cov0, cov1 = (metric @ s @ metric.T for s in (cov0, cov1))
        if not self.matrices:
            self._minimise_energy(cov0, cov1)
            return
        root, inverse = _matrix_power(cov0, 0.5), _matrix_power(cov0, -0.5)
        transport = inverse @ _matrix_power(root @ cov1 @ root, 0.5) @ inverse
        if metric is not None:
            back = torch.linalg.inv(metric)
            transport = back @ transport @ metric
        eye = torch.eye(len(root), dtype=torch.float64, device=root.device)
        t = _midpoints(4096, root)
        k = torch.arange(1, self.modes + 1, dtype=torch.float64, device=root.device)
        project = 2 * k[:, None] * torch.sin(math.pi * k[:, None] * t) / len(t)
        angle = 0.5 * math.pi * t
        from_base, from_data = project @ (t * angle.cos()), project @ ((1 - t) * angle.sin())
        self.waves[0].copy_(from_base[:, None, None] * (transport - eye))
        self.waves[1].copy_(from_data[:, None, None] * (torch.linalg.inv(transport) - eye))

    def _minimise_energy(self, cov0: Tensor, cov1: Tensor) -> None:
        """Set scalar waves to those of least energy between centred Gaussians, by L-BFGS."""
        t = _midpoints(128, cov0)
        parts = self._basis(t)
        waves = torch.zeros(2, self.modes, dtype=t.dtype, device=t.device, requires_grad=True)

        def energy() -> Tensor:
            (a, b), (da, db) = (self._series(part, waves) for part in parts)
            base, data = (a * a)[:, None, None], (b * b)[:, None, None]
            s = base * cov0 + data * cov1
            c = (a * da)[:, None, None] * cov0 + (b * db)[:, None, None] * cov1
            return (c * torch.linalg.solve(s, c)).sum((-2, -1)).mean()

        optimizer = torch.optim.LBFGS([waves], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            with torch.enable_grad():
                value = energy()
                value.backward()
            return value

        optimizer.step(closure)
        if bool(torch.isfinite(waves).all()):
            self.waves.copy_(waves.detach())

    def is_linear(self) -> bool:
        """Return whether the path has scalar coefficients, and its centres are zero."""
        return self._is_scalar() and not bool(self.centres.any())

    def _is_scalar(self) -> bool:
        return not self.matrices and not self.depth

    def has_latent(self) -> bool:
        """Return False."""
        return False

    def coefficients(self, t: Tensor) -> Coefficients:
        """Return the coefficients of base, data and noise, each of the shape of t.

        They act about the centres, where those are not zero.

        Raises:
            TypeError: If the weights are matrices or there is a network.
        """
        if not self._is_scalar():
            raise TypeError("an interpolant with matrices or a network has no scalar coefficients")
        a, b = self._series(self._basis(t)[0], self.waves)
        return a, b, torch.zeros_like(t)

    def check_ends(self, dim: int) -> None:
        """Raise a ValueError if the size is another; the ends are exact by construction."""
        if self.event_dim not in (None, dim):
            raise ValueError(f"expected an interpolant of event_dim={dim}, got {self.event_dim}")

    def sample(
        self, t: Tensor, x0: Tensor, x1: Tensor, z: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the path and its time derivative, each of shape ``(*, D)``.

        Args:
            t: Times in [0, 1], broadcastable to ``(*)``.
            x0: Base draws, shape ``(*, D)``.
            x1: Data rows, shape ``(*, D)``.
            z: Unused: there is no latent term.
        """
        m0, m1 = self.centres.to(x0)
        moved, rates = (self._moved(part, x0 - m0, x1 - m1) for part in self._basis(t))
        x, dx = torch.lerp(m0, m1, t[..., None].to(x0)) + moved, m1 - m0 + rates
        if self.depth:
            x = x + self._network(t, x0, x1)
            t = t.contiguous()  # forward mode cannot carry stride-0 tangents
            dx = dx + slopes(lambda t: (self._network(t, x0, x1),), t)[0]
        return x, dx

    def _basis(self, t: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        r"""Return :math:`\cos\pi t/2`, :math:`\sin\pi t/2`, the sine waves, and their derivatives.

        Of the shape of t, the waves ``(*, M)``. All else in the coefficients is linear in these,
        and so are the derivatives of the coefficients in theirs.
        """
        half, k = 0.5 * math.pi, torch.arange(1, self.modes + 1, dtype=t.dtype, device=t.device)
        cosine, sine, angles = (half * t).cos(), (half * t).sin(), math.pi * t[..., None] * k
        rates = -half * sine, half * cosine, math.pi * k * angles.cos()
        return (cosine, sine, angles.sin()), rates

    def _series(self, basis: tuple[Tensor, ...], weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the coefficients of base and data, ``(*)``, or ``(*, D, D)`` of matrices."""
        cosine, sine, waves = basis
        k = torch.arange(1, self.modes + 1, dtype=waves.dtype, device=waves.device)
        a, b = weights.to(waves)
        if not self.matrices:
            return cosine + waves @ (a / k), sine + waves @ (b / k)
        eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
        sums = [torch.tensordot(waves, w / k[:, None, None], dims=1) for w in (a, b)]
        return cosine[..., None, None] * eye + sums[0], sine[..., None, None] * eye + sums[1]

    def _moved(self, basis: tuple[Tensor, ...], u0: Tensor, u1: Tensor) -> Tensor:
        """Return what the coefficients, or their derivatives, make of two ends, ``(*, D)``."""
        a, b = self._series(basis, self.waves)
        if self.matrices:
            return (a @ u0[..., None] + b @ u1[..., None])[..., 0]
        return a[..., None] * u0 + b[..., None] * u1

    def _network(self, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        r"""Return :math:`\sin(\pi t)\, N(t, x_0, x_1)`, shape ``(*, D)``."""
        t = t[..., None]
        # Pi times t: the tangent of a constant factor takes torch half a millisecond.
        angle = torch.add(t, t, alpha=math.pi - 1)
        features = torch.cat((angle.cos(), angle.sin()), dim=-1).expand(*x0.shape[:-1], 2)
        h = torch.cat((x0, x1, features), dim=-1)
        for i in range(self.depth):
            weight, bias = (getattr(self, f"{kind}{i}").to(h) for kind in ("weight", "bias"))
            h = nn.functional.linear(h, weight, bias)
            h = h if i == self.depth - 1 else nn.functional.silu(h)
        return angle.sin() * h


def _midpoints(count: int, like: Tensor) -> Tensor:
    """Return the midpoints of equal parts of [0, 1], shape ``(count,)``, in float64."""
    return (torch.arange(count, dtype=torch.float64, device=like.device) + 0.5) / count


def _matrix_power(cov: Tensor, exponent: float) -> Tensor:
    """Return a power of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=1e-30) ** exponent) @ vectors.T
