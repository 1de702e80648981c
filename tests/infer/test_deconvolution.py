"""The mixture of Gaussians behind noisy rows, against closed forms."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from pyro_interpolant.infer.deconvolution import (
    _best,
    _fitted,
    _log_evidence,
    _maximized,
    _Mixture,
    _posteriors,
    _split,
    gaussian_latents,
)


@pytest.fixture
def _few_components(monkeypatch):
    """These rows need no more, and most of the time goes to those that are tried in vain."""
    monkeypatch.setattr("pyro_interpolant.infer.deconvolution._MOST_COMPONENTS", 4)


def mixture(components=3, dim=2):
    roots = torch.randn(components, dim, dim)
    covariances = roots @ roots.mT + 0.1 * torch.eye(dim)
    return _Mixture(
        torch.randn(components).log_softmax(-1), torch.randn(components, dim), covariances
    )


def joint(found, y, variances):
    """Return log-joints of rows and components, up to a constant of the row."""
    total = found.covariances + torch.diag_embed(variances)[:, None]
    parts = found.log_shares + MultivariateNormal(found.means, total).log_prob(y[:, None])
    return parts - parts[:, :1]


def test_evidences_and_latents_are_those_of_the_closed_form_however_small_the_errors():
    found, y = mixture(), torch.randn(6, 2)
    for scale in (1.0, 1e-6, 1e-10):
        variances = (scale * (torch.rand(6, 2) + 0.2)).square()
        precisions = torch.diag_embed(1 / variances)
        log_joint, s, w = _posteriors(found, y, precisions)
        relative = log_joint - log_joint[:, :1]
        torch.testing.assert_close(relative, joint(found, y, variances), rtol=1e-7, atol=1e-7)
        covariance = torch.linalg.inv(torch.linalg.inv(found.covariances) + precisions[:, None])
        close = {"rtol": 1e-6, "atol": 1e-6 * scale**2}
        roots = torch.linalg.cholesky(found.covariances)
        lower = roots @ w.permute(2, 3, 1, 0)
        torch.testing.assert_close(lower @ lower.mT, covariance, **close)
        pulled = precisions @ y[..., None]
        inner = torch.linalg.inv(found.covariances) @ found.means[..., None]
        mean = (covariance @ (inner + pulled[:, None]))[..., 0]
        shifts = (roots @ s.permute(2, 3, 0, 1))[..., 0]
        torch.testing.assert_close(found.means + shifts, mean, rtol=1e-6, atol=1e-9)


def test_what_is_missing_is_integrated_out():
    found, y = mixture(), torch.randn(6, 2)
    precisions = torch.diag_embed(torch.tensor([4.0, 0.0]).expand(6, 2))
    first = _Mixture(found.log_shares, found.means[:, :1], found.covariances[:, :1, :1])
    got, _, _ = _posteriors(found, y, precisions)
    wanted = joint(first, y[:, :1], torch.full((6, 1), 0.25))
    torch.testing.assert_close(got - got[:, :1], wanted)


def test_a_step_never_loses_evidence_whatever_the_chunks(monkeypatch):
    y, precisions = torch.randn(300, 2), torch.diag_embed(torch.rand(300, 2) + 0.5)
    found, before = mixture(4), -math.inf
    for _ in range(20):
        found = _maximized(found, y, precisions)
        now = float(_log_evidence(found, y, precisions).sum())
        assert now > before - 1e-9
        before = now
    whole = _maximized(found, y, precisions)
    monkeypatch.setattr("pyro_interpolant.infer.deconvolution._VALUES_AT_ONCE", 100)
    for a, b in zip(whole, _maximized(found, y, precisions), strict=True):
        torch.testing.assert_close(a, b)


def test_matrices_of_many_columns_are_those_of_few(monkeypatch):
    y, precisions, found = torch.randn(30, 5), torch.diag_embed(torch.rand(30, 5)), mixture(3, 5)
    by_column = _maximized(found, y, precisions)
    monkeypatch.setattr("pyro_interpolant.infer.deconvolution._COLUMNS_APART", 4)
    for a, b in zip(by_column, _maximized(found, y, precisions), strict=True):
        torch.testing.assert_close(a, b)


def test_a_component_without_rows_does_no_harm():
    found = mixture(2)
    far = found.means + torch.tensor([[0.0, 0.0], [1e4, 1e4]])
    y, precisions = found.means[:1] + torch.randn(50, 2), torch.eye(2).expand(50, 2, 2)
    new = _maximized(found._replace(means=far), y, precisions)
    assert bool(_log_evidence(_maximized(new, y, precisions), y, precisions).isfinite().all())


def test_a_split_keeps_mean_and_covariance():
    found = mixture(4)
    new = _split(found)
    for k in range(3):
        means, covariances = new.means[k:-1:3], new.covariances[k:-1:3]
        torch.testing.assert_close(means.mean(0), found.means[k])
        spread = covariances.mean(0) + torch.cov(means.T, correction=0)
        torch.testing.assert_close(spread, found.covariances[k])
    torch.testing.assert_close(new.log_shares.exp().sum(), torch.tensor(1.0))
    for one, other in zip(new, found, strict=True):  # the last stays wide
        torch.testing.assert_close(one[-1], other[-1])


@pytest.mark.usefixtures("_few_components")
def test_outliers_have_a_component_of_their_own():
    """One in a hundred, beside a thin line: without a wide component 0.03 nats were lost."""
    along, far = 4 * torch.rand(4000, 1) - 2, torch.rand(4000, 1) < 0.01
    x = torch.cat((along, 0.5 * along), 1) + 0.03 * torch.randn(4000, 2)
    x = x.where(~far, 3 * torch.randn(4000, 2))
    sds = 0.1 + 0.5 * torch.rand(4000, 2)
    y, precisions = x + sds * torch.randn(4000, 2), torch.diag_embed(sds**-2)
    found = _best(y[:2000], precisions[:2000])
    y, sds = y[2000:], sds[2000:]
    evidence = _log_evidence(found, y, precisions[2000:]) - sds.log().sum(-1) - math.log(math.tau)
    t = torch.linspace(-2, 2, 801)
    nodes = torch.stack((t, 0.5 * t), -1)
    near = torch.distributions.Normal(nodes, (0.03**2 + sds[:, None] ** 2).sqrt())
    on = near.log_prob(y[:, None]).sum(-1).logsumexp(-1) - math.log(801)
    off = torch.distributions.Normal(0.0, (9 + sds**2).sqrt()).log_prob(y).sum(-1)
    truth = torch.logaddexp(on + math.log(0.99), off + math.log(0.01))
    assert abs(float((evidence - truth).mean())) < 0.02


@pytest.mark.usefixtures("_few_components")
def test_units_do_not_matter():
    y, sds = torch.randn(200, 2), torch.rand(200, 2) + 0.3
    scale, loc = torch.tensor([1e-6, 1e6]), torch.tensor([3e-6, 5e6])

    def latents(y, sds):
        torch.manual_seed(0)
        return gaussian_latents(y, torch.diag_embed(sds**-2.0), each=3)

    found = latents(y, sds)
    assert found.shape == (3, 200, 2)
    torch.testing.assert_close((latents(loc + scale * y, scale * sds) - loc) / scale, found)


@pytest.mark.usefixtures("_few_components")
def test_a_column_may_be_all_but_exact():
    """Beside another that is not: matrices would be singular but for rounding."""
    x = torch.randn(400, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    sds = torch.tensor([0.5, 1e-10]).expand(400, 2)
    y = x + sds * torch.randn(400, 2)
    (found,) = gaussian_latents(y, torch.diag_embed(sds**-2))
    assert float((found - y)[:, 1].abs().max()) < 1e-3
    assert float((found - y)[:, 0].abs().mean()) < 1.0


@pytest.mark.usefixtures("_few_components")
def test_errors_of_some_rows_beyond_all_measure_do_no_harm():
    """They alone make the standard deviation of y, in whose units variances have a least one."""
    x = torch.randn(900, 2) @ torch.tensor([[1.0, 0.8], [0.0, 0.6]])
    sds = torch.tensor([1e-6, 1.0, 1e6]).repeat(300)[:, None].expand(900, 2)
    (found,) = gaussian_latents(x + sds * torch.randn(900, 2), torch.diag_embed(sds**-2))
    torch.testing.assert_close(found.std(0), torch.ones(2), rtol=0.15, atol=0)
    assert float((found - x)[::3].abs().max()) < 0.02


@pytest.mark.usefixtures("_few_components")
@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_a_column_measured_in_one_row_has_the_units_of_its_error(unit):
    y, precisions = torch.randn(100, 2), torch.full((100, 2), 10.0)
    precisions[1:, 1] = 0

    def latents(unit):
        torch.manual_seed(0)
        scale = torch.tensor([1.0, unit])
        return gaussian_latents(scale * y, torch.diag_embed(precisions / scale**2)) / scale

    torch.testing.assert_close(latents(unit), latents(1.0))


@pytest.mark.usefixtures("_few_components")
def test_a_mixture_that_is_cut_off_has_the_moments_of_what_is_inside():
    """Fitted as if x could be anywhere, and cut off after that, it would be too far inside."""
    x = torch.randn(6000, 1).abs()
    y, precisions = x + 0.5 * torch.randn(6000, 1), torch.full((6000, 1, 1), 4.0)
    off = []
    for inside in (None, lambda w: (w > 0).all(-1)):
        latents = gaussian_latents(y, precisions, 8, inside=inside)
        off.append(float(latents[latents > 0].mean() - x.mean()))
    assert 0.02 < off[0]
    assert abs(off[1]) < 0.8 * off[0]


def test_points_weigh_as_rows_without_errors_do():
    found, x = mixture(), torch.randn(300, 2)
    precisions = torch.diag_embed(torch.full((300, 2), 1e12))
    expected = _maximized(found, x, precisions)
    for given, other in zip(_fitted(found, x, torch.full((300,), 0.5)), expected, strict=True):
        torch.testing.assert_close(given, other, rtol=1e-4, atol=1e-6)


def test_rows_none_of_which_can_be_inside_leave_the_mixture_as_it_is():
    y, precisions = -torch.rand(200, 1) - 0.01, torch.full((200, 1, 1), 1e6)
    latents = gaussian_latents(y, precisions, inside=lambda w: (w > 0).all(-1))
    torch.testing.assert_close(latents[0], y, rtol=0, atol=0.01)
