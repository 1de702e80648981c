"""The optimal transport of one Gaussian to another, in closed form."""

import torch


class GaussianTransport:
    """A pair N(m0, S0) and N(m1, S1), and what is known of the paths between them.

    Args:
        seed: Draws the pair.
        dim: D.
    """

    def __init__(self, seed, dim):
        generator = torch.Generator().manual_seed(seed)
        make = {"generator": generator, "dtype": torch.float64}
        self.means = 1.5 * torch.randn(2, dim, **make)
        frames = torch.linalg.qr(torch.randn(2, dim, dim, **make))[0]
        scales = torch.exp(0.8 * torch.randn(2, dim, **make))
        self.covs = (frames * scales[:, None]) @ frames.mT
        self.roots = [root(cov) for cov in self.covs]

    def sample(self, end, count):
        """Return draws of one end, 0 or 1, shape ``(count, D)``."""
        z = torch.randn(count, len(self.means[0]), dtype=torch.float64)
        return self.means[end] + z @ self.roots[end]

    def w2(self):
        """Return the squared Wasserstein distance."""
        s0, s1 = self.covs
        cross = root(self.roots[0] @ s1 @ self.roots[0])
        gap = (self.means[0] - self.means[1]).square().sum()
        return float(gap + (s0 + s1 - 2 * cross).trace())

    def energy(self, interpolant, *, centred=False, about=0.0, times=4000):
        """Return the kinetic energy of a scalar linear interpolant with independent ends.

        ``centred`` is for one that acts about the two means, which move straight; ``about`` is the
        origin of one that does not.

        The velocity is affine: ``v = m' + C S^-1 (x - m)`` with ``S = a^2 S0 + b^2 S1`` and
        ``C = a a' S0 + b b' S1``.
        """
        t = (torch.arange(times, dtype=torch.float64) + 0.5) / times
        a, b, _ = (c[:, None, None] for c in interpolant.coefficients(t))
        da, db, _ = (c[:, None, None] for c in interpolant.derivatives(t))
        s0, s1 = self.covs
        s, c = a**2 * s0 + b**2 * s1, a * da * s0 + b * db * s1
        ends = self.means - about
        drift = (da[..., 0] * ends[0] + db[..., 0] * ends[1]).square().sum(-1)
        if centred:
            drift = (self.means[1] - self.means[0]).square().sum()
        spread = (c @ torch.linalg.solve(s, c.mT)).diagonal(dim1=-2, dim2=-1).sum(-1)
        return float((drift + spread).mean())


def root(cov):
    """Return the symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(cov)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
