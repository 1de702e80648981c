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
from torch.autograd import forward_ad

from pyro_interpolant import Interpolant


def is_followed(t: Tensor) -> bool:
    """Tell whether somebody differentiates in t."""
    if t.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(t):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def slopes_of(function, t: Tensor):
    """Return the derivatives of functions of t, each of its shape, by the mode that is faster."""
    if is_followed(t) or torch.is_inference_mode_enabled():
        return torch.func.jvp(function, (t,), (torch.ones_like(t),))[1]
    with torch.enable_grad():
        t = t.detach().requires_grad_()
        values = [v + 0 * t for v in function(t)]  # constants have slopes, too
        return [torch.autograd.grad(v.sum(), t, retain_graph=True)[0] for v in values]


def remembered(function, t: Tensor, known: dict):
    """Return a function of t as tensors like t, from ``known`` where t is plain and one number.

    Solvers ask for the same few times again and again, and slopes take long to tell.
    """
    expanded = all(s == 0 or n == 1 for s, n in zip(t.stride(), t.shape, strict=True))
    if is_followed(t) or not expanded or not t.numel():
        return function(t)
    one = t[(0,) * t.dim()]
    key = float(one), t.dtype
    if key not in known:
        known[key] = [float(s) for s in function(one)]
    return [torch.full(t.shape, value, dtype=t.dtype, device=t.device) for value in known[key]]


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
        self.known = {}
        self.event_dim = means.shape[-1]
        spectrum, vectors = torch.linalg.eigh(covs)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        self.register_buffer("means", means)
        self.register_buffer("spectrum", spectrum)
        self.register_buffer("vectors", vectors)

    def forward(self, t, x, context=None):
        """Return the velocity, shape ``(*, D)``."""
        db, base_rate, data_rate = self._rates(t)
        scaled, variance, r = self._components(t, x)
        rate = base_rate + data_rate * self.spectrum
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

    def _rates(self, t: Tensor):
        return [s[..., None, None] for s in remembered(self._slopes, t, self.known)]

    def _slopes(self, t: Tensor):
        """Return the slopes of b, of (a^2 + g^2) / 2 and of b^2 / 2."""

        def halves(t):
            a, b, g = self.interpolant.coefficients(t)
            return b, a * a + g * g, b * b  # powers and factors are slow in forward mode

        # Adaptive solvers look beyond the ends; no tangents are on stride-0 tensors.
        db, *twice = slopes_of(halves, t.clamp(0, 1).contiguous())
        return [db, *(0.5 * s for s in twice)]

    def _coefficients(self, t: Tensor):
        return [c[..., None, None] for c in self.interpolant.coefficients(t)]

    def _scaled(self, t, x):
        a, b, g = self._coefficients(t)
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


class PairVelocity(nn.Module):
    r"""The velocity from any Gaussian N(m_0, C_0) to a mixture, with all that belongs to it.

    Component k of :math:`x_t` has mean :math:`\alpha m_0 + \beta m_k` and covariance :math:`S_k =
    \alpha^2 C_0 + \beta^2 C_k + \gamma^2 I`; its regression on :math:`x_t` of anything jointly
    Gaussian with it is linear.

    Args:
        loc: :math:`m_0`, shape ``(D,)``.
        cov: :math:`C_0`, shape ``(D, D)``.
        mixture: A MixtureVelocity, whose components and interpolant are taken.
    """

    def __init__(self, loc, cov, mixture):
        super().__init__()
        self.interpolant, self.event_dim = mixture.interpolant, mixture.event_dim
        self.mixture, self.known = mixture, {}
        self.register_buffer("loc", loc)
        self.register_buffer("cov", cov)
        self.register_buffer("log_weights", mixture.log_weights)
        self.register_buffer("means", mixture.means)
        rotated = mixture.vectors * mixture.spectrum[:, None, :]
        self.register_buffer("covs", rotated @ mixture.vectors.mT)

    def forward(self, t, x, context=None):
        """Return the velocity, shape ``(*, D)``."""
        (a, b, g), (da, db, dg) = self._coefficients(t)
        r, pulled = self._components(t, x)
        eye = torch.eye(self.event_dim).to(self.means)
        rate = (
            (a * da)[..., None] * self.cov
            + (b * db)[..., None] * self.covs
            + (g * dg)[..., None] * eye
        )
        mean = da * self.loc + db * self.means
        return (r * (mean + (rate @ pulled[..., None])[..., 0])).sum(-2)

    def score(self, t, x):
        """Return the gradient of the log-density at time t, shape ``(*, D)``."""
        r, pulled = self._components(t, x)
        return -(r * pulled).sum(-2)

    def denoiser(self, t, x):
        """Return the mean of the data given the state at time t, shape ``(*, D)``."""
        b = self._coefficients(t)[0][1]
        r, pulled = self._components(t, x)
        return (r * (self.means + b * (self.covs @ pulled[..., None])[..., 0])).sum(-2)

    def log_prob(self, t, x):
        """Return the log-density at time t, shape ``(*)``."""
        return self._joint(t, x)[0].logsumexp(-1)

    def sample(self, t, count):
        """Return exact draws of the density at time t, shape ``(count, D)``."""
        a, b, g = self.interpolant.coefficients(torch.as_tensor(t).to(self.means))
        z, latent = torch.randn(2, count, self.event_dim).to(self.means)
        x0 = self.loc + z @ torch.linalg.cholesky(self.cov).T
        return a * x0 + b * self.mixture.sample(1.0, count) + g * latent

    def _coefficients(self, t):
        t = torch.as_tensor(t).to(self.means)
        found = [c[..., None, None] for c in remembered(self._six, t, self.known)]
        return found[:3], found[3:]

    def _six(self, t):
        t = t.contiguous()
        return [*self.interpolant.coefficients(t), *self.interpolant.derivatives(t)]

    def _joint(self, t, x):
        a, b, g = self._coefficients(t)[0]
        eye = torch.eye(self.event_dim).to(self.means)
        covs = (a**2)[..., None] * self.cov + (b**2)[..., None] * self.covs
        covs = covs + (g**2)[..., None] * eye
        centred = x[..., None, :] - a * self.loc - b * self.means
        pulled = torch.linalg.solve(covs, centred[..., None])[..., 0]
        exponent = -0.5 * ((centred * pulled).sum(-1) + torch.logdet(covs))
        constant = 0.5 * self.event_dim * math.log(2 * math.pi)
        return self.log_weights + exponent - constant, pulled

    def _components(self, t, x):
        joint, pulled = self._joint(t, x)
        return joint.softmax(-1)[..., None], pulled


class LatentNoise(nn.Module):
    """The network that ``fit(learn="noise")`` approximates: E[z | x_t] of an oracle.

    Args:
        oracle: A velocity with a score.
    """

    def __init__(self, oracle):
        super().__init__()
        self.oracle, self.event_dim = oracle, oracle.event_dim

    def forward(self, t, x, context=None):
        """Return the mean of the latent draw given the state, shape ``(*, D)``."""
        gamma = self.oracle.interpolant.coefficients(t)[2][..., None]
        return -gamma * self.oracle.score(t, x)


def energy_distance(x, y):
    """Return twice the mean distance between samples less those within each, a number >= 0."""
    between, within = torch.cdist(x, y).mean(), torch.cdist(x, x).mean() + torch.cdist(y, y).mean()
    return float(2 * between - within)


def energy_floor(draw, count, repeats=200, few=150):
    """Return an energy distance that two exact samples of a size all but never exceed.

    Its law, times the size, hardly depends on the size: a quarter more than the largest of many
    pairs of small samples.
    """
    largest = max(energy_distance(draw(few), draw(few)) for _ in range(repeats))
    return 1.25 * largest * few / count


def discrepancy(x, y):
    """Return the largest difference of means of features, shape ``(N, F)``, in standard errors."""
    error = (x.var(0) / len(x) + y.var(0) / len(y)).sqrt()
    return float(((x.mean(0) - y.mean(0)) / error).abs().max())
