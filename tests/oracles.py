r"""Closed forms for a Gaussian mixture as data and a standard normal as base.

With :math:`x_0 \sim N(0, I)`, :math:`x_1 \sim \sum_k w_k N(m_k, C_k)` and a linear interpolant
:math:`x_t = \alpha x_0 + \beta x_1 + \gamma z`, component k has mean :math:`\beta m_k` and
covariance :math:`S_k = (\alpha^2 + \gamma^2) I + \beta^2 C_k`, and

.. math:: v_t(x) = \sum_k r_k(x) \, [\dot\beta m_k + (\alpha\dot\alpha I + \beta\dot\beta C_k
                   + \gamma\dot\gamma I) S_k^{-1} (x - \beta m_k)].

All :math:`S_k` share the eigenvectors of :math:`C_k`, so nothing is factorised at run time.
"""

import math

import torch
from torch import Tensor, nn

from pyro_interpolant import Interpolant


class MixtureVelocity(nn.Module):
    """The velocity whose flow from N(0, I) has the mixture's density at every time.

    Args:
        weights: Shape ``(K,)``, normalised here.
        means: Shape ``(K, D)``.
        covs: Shape ``(K, D, D)``.
        interpolant: A member of the linear family.
    """

    def __init__(self, weights, means, covs, interpolant: Interpolant):
        super().__init__()
        self.interpolant = interpolant
        self.event_dim = means.shape[-1]
        spectrum, vectors = torch.linalg.eigh(covs)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means)
        self.register_buffer("spectrum", spectrum)
        self.register_buffer("vectors", vectors)

    def forward(self, t, x, context=None):
        """Return the velocity, shape ``(*, D)``."""
        (a, b, g), slopes = self._coefficients(t)
        da, db, dg = slopes
        scaled, variance, r = self._components(t, x)
        rate = a * da + g * dg + b * db * self.spectrum
        turned = torch.einsum("...kd,kid->...ki", rate * scaled / variance, self.vectors)
        return (r[..., None] * (db * self.means + turned)).sum(-2)

    def score(self, t, x):
        """Return the gradient of the log-density at time t, shape ``(*, D)``."""
        scaled, variance, r = self._components(t, x)
        turned = torch.einsum("...kd,kid->...ki", -scaled / variance, self.vectors)
        return (r[..., None] * turned).sum(-2)

    def log_prob(self, t, x):
        """Return the log-density at time t, shape ``(*)``."""
        return self._joint(*self._scaled(t, x)).logsumexp(-1)

    def sample(self, t, count):
        """Return exact draws of the density at time t, shape ``(count, D)``."""
        a, b, g = self.interpolant.coefficients(torch.as_tensor(t).to(self.means))
        k = torch.multinomial(self.log_weights.exp(), count, replacement=True)
        deviation = (a**2 + g**2 + b**2 * self.spectrum[k]).sqrt()
        z = torch.randn(count, self.event_dim).to(self.means) * deviation
        return b * self.means[k] + torch.einsum("nd,nid->ni", z, self.vectors[k])

    def moments(self, t):
        """Return mean, shape ``(D,)``, and covariance, shape ``(D, D)``, at time t."""
        a, b, g = self.interpolant.coefficients(torch.as_tensor(t).to(self.means))
        w = self.log_weights.exp()
        covs = torch.einsum("kid,kd,kjd->kij", self.vectors, self.spectrum, self.vectors)
        eye = torch.eye(self.event_dim).to(self.means)
        means = b * self.means
        mean = w @ means
        second = torch.einsum("k,ki,kj->ij", w, means, means)
        within = (a**2 + g**2) * eye + b**2 * torch.einsum("k,kij->ij", w, covs)
        return mean, within + second - mean[:, None] * mean

    def _coefficients(self, t: Tensor):
        t = t.contiguous()  # forward mode cannot carry tangents on stride-0 tensors
        values = [c[..., None, None] for c in self.interpolant.coefficients(t)]
        slopes = [c[..., None, None] for c in self.interpolant.derivatives(t)]
        return values, slopes

    def _scaled(self, t, x):
        a, b, g = self._coefficients(t)[0]
        variance = a**2 + g**2 + b**2 * self.spectrum
        centred = x[..., None, :] - b * self.means
        return torch.einsum("...ki,kid->...kd", centred, self.vectors), variance

    def _joint(self, scaled, variance):
        exponent = -0.5 * (scaled.square() / variance + variance.log()).sum(-1)
        return self.log_weights + exponent - 0.5 * self.event_dim * math.log(2 * math.pi)

    def _components(self, t, x):
        scaled, variance = self._scaled(t, x)
        return scaled, variance, self._joint(scaled, variance).softmax(-1)


def random_mixture(dim, interpolant, components=3, seed=0):
    """Return a MixtureVelocity with well separated, correlated components, in float64."""
    generator = torch.Generator().manual_seed(seed)
    means = 1.5 * torch.randn(components, dim, generator=generator, dtype=torch.float64)
    lower = 0.3 * torch.randn(components, dim, dim, generator=generator, dtype=torch.float64)
    covs = lower @ lower.mT + 0.2 * torch.eye(dim, dtype=torch.float64)
    weights = torch.rand(components, generator=generator, dtype=torch.float64) + 0.5
    return MixtureVelocity(weights, means, covs, interpolant)
