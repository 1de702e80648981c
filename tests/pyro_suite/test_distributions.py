"""What Pyro asserts of every distribution: shapes, broadcasting, expand, masks, wrappers.

All kinds of flow are drawn from and scored; what else Pyro does is tested with some kinds each,
chosen so that all differ.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import BASES
from kinds import KINDS, given, plain
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.testing.gof import auto_goodness_of_fit
from pyro.distributions.util import broadcast_shape, scale_and_mask
from torch.distributions import kl_divergence

# More kinds, for what batches and views of them may change: shapes, draws and their density.
MADE = {
    **KINDS,
    "start, laplace": lambda: plain(base=BASES["laplace"](2)).at(0.0),
    "given, laplace": lambda: given(base=BASES["laplace"](2)),
    "given, halfway": lambda: given().at(0.5),
    "batch of bases": lambda: plain(base=dist.Normal(torch.randn(4, 2), 1.0).to_event(1)),
    "given rows, positive": lambda: given(4, support=constraints.positive),
    "expanded, laplace": lambda: plain(base=BASES["laplace"](2)).expand((4,)),
    "expanded, halfway": lambda: plain().expand((4,)).at(0.5),
}


def same(a, b):
    """Check densities to what adaptive steps, chosen for all rows together, may change."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def rows(d, *lead):
    """Return draws, shape ``(*lead, *event)``, whatever the batch."""
    x = d.sample((torch.Size(lead).numel(),)).detach()
    return x[(slice(None),) + (0,) * len(d.batch_shape)].reshape(*lead, *d.event_shape)


# ------------------------------------------------------------------------------- shapes, densities


@pytest.mark.parametrize("kind", MADE)
def test_draws_and_densities(kind):
    d = MADE[kind]()
    assert d.event_dim == len(d.event_shape) == d.support.event_dim > 0
    assert not d.support.is_discrete
    for sample_shape in ((), (2,), (2, 3)):
        assert d.shape(sample_shape) == sample_shape + d.batch_shape + d.event_shape
        for x in (d.sample(sample_shape), d(sample_shape)):
            assert x.shape == d.shape(sample_shape)
    x = d.sample((6,))
    assert len(x.reshape(-1, d.event_shape.numel()).unique(dim=0)) == 6 * d.batch_shape.numel()
    inside = d.support.check(x)
    assert inside.shape == (6, *d.batch_shape)
    assert inside.all()
    assert not x.requires_grad
    assert d.has_rsample is (kind != "samples")
    if d.has_rsample:
        assert d.rsample().requires_grad is not kind.startswith("start")
        check_density(d)
    d.has_rsample_(False)  # noqa: FBT003
    assert not d.has_rsample
    assert not d.expand((2, *d.batch_shape)).has_rsample


@torch.no_grad()
def check_density(d):
    """It broadcasts with the batch; events of another shape, type or without numbers raise."""
    member = rows(d)
    expected = d.log_prob(member)
    for lead in ((), (1,), (3, 1), (2, 3, 1)):
        found = d.log_prob(member.expand(*lead, *d.event_shape))
        assert found.shape == broadcast_shape(lead, d.batch_shape)
        same(found, expected.expand(found.shape))
    x = rows(d, 3)
    for wrong in (x[..., None].repeat_interleave(7, -1), x[..., :0], torch.cat((x, x), -1)):
        with pytest.raises(ValueError, match="expected"):
            d.log_prob(wrong)
    with pytest.raises(ValueError, match="within the support"):
        d.log_prob(torch.full_like(member, torch.nan))
    with pytest.raises(ValueError, match="the type of the flow"):
        d.log_prob(member.float())
    if d.batch_shape:
        with pytest.raises((ValueError, RuntimeError), match="shape|size|broadcast"):
            d.log_prob(rows(d, 5))


@pytest.mark.parametrize("kind", ["simplex", "given rows", "angles", "laplace"])
def test_single_precision_without_validation(kind):
    with pyro.validation_enabled(False):  # noqa: FBT003
        d = KINDS[kind]().to(torch.float32)
        x = d.sample((3,))
        assert x.dtype == d.log_prob(x).dtype == d.rsample().dtype == torch.float32
        assert d.log_prob(torch.full_like(x, torch.nan)).isnan().all()


# Coordinates of draws in which a density can be told by nearest neighbours, and their number.
FREE = {"simplex": lambda x: (x[..., :-1], 2), "shaped": lambda x: (x.flatten(-2), 4)}


def free(kind, x):
    if "angle" in kind:
        return torch.cat((x.cos(), x.sin()), -1), x.shape[-1]
    return FREE.get(kind, lambda x: (x, x.shape[-1]))(x)


@pytest.mark.parametrize(
    "kind",
    [
        *("plain", "one", "simplex", "stack", "shaped", "gaussianized", "tempered", "laplace"),
        *("flow base", "given", "joint", "angles", "halfway, laplace"),
        *("halfway, angles", "start, laplace", "given, halfway", "expanded, positive"),
    ],
)
def test_draws_follow_the_density(kind):
    """Of dependent distances the p-value is far from uniform: an exact Gaussian reaches 1e-6.

    The density of each kind at its draws is tested by its Jacobian, in test_transforms.
    """
    d = MADE[kind]()
    with torch.no_grad():
        x = d.sample((1200 * max(3, d.event_shape.numel()),))
        p = d.log_prob(x.clone()).exp()
    x, dim = free(kind, x)
    x, p = x.reshape(len(x), -1, x.shape[-1]), p.reshape(len(p), -1)
    for i in range(p.shape[1]):
        assert auto_goodness_of_fit(x[:, i], p[:, i], dim=dim) > 1e-9


def test_a_base_without_density():
    d = KINDS["samples"]()
    for wrapped in (d, d.expand((3,)), d.to_event(0), d.mask(torch.ones(()) > 0)):
        with pytest.raises(ValueError, match="samples alone"):
            wrapped.log_prob(d.sample())


def test_what_a_flow_does_not_have():
    """Divergences in closed form: torch's rule is for one chain of transforms."""
    assert not KINDS["plain"]().has_enumerate_support
    with pytest.raises(NotImplementedError):
        KINDS["plain"]().enumerate_support(expand=False)
    for kind in ("plain", "positive", "given rows", "angles", "joint"):
        d = KINDS[kind]()
        for other in (KINDS[kind](), d.at(0.7)):
            with pytest.raises(NotImplementedError):
                kl_divergence(d, other)


# ------------------------------------------------------------------------------------------ expand


EXPAND = {"own": lambda d, shape: d.expand(shape), "default": TorchDistribution.expand}


@torch.no_grad()
def check_expanded(kind, small, large):
    """Check that densities of the two agree, at draws of either."""
    x = large.sample()
    assert x.shape == large.shape()
    if kind != "samples":  # draws of which may be the same
        each = x.reshape(-1, large.event_shape.numel())
        assert len(each.unique(dim=0)) == len(each)
        same(small.log_prob(x.clone()), large.log_prob(x.clone()))
        x = small.sample()
        same(small.log_prob(x.clone()).expand(large.batch_shape), large.log_prob(x.clone()))


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *(("plain", "own"), ("plain", "default"), ("given rows", "own"), ("angles", "default")),
        *(("samples", "own"), ("joint", "default"), ("expanded, positive", "own")),
        *(("laplace", "default"), ("batch of bases", "default"), ("halfway", "own")),
    ],
)
def test_expand(kind, how):
    d = MADE[kind]()
    batch_shape, expand = d.batch_shape, EXPAND[how]
    for shape_type, lead in ((torch.Size, ()), (tuple, (2,)), (list, (2, 3))):
        for large in (
            d.expand_by(shape_type(lead)),
            expand(d, shape_type(lead + batch_shape)),
        ):
            assert large.batch_shape == lead + batch_shape
            check_expanded(kind, d, large)
    assert type(d.expand_by((2,))) is type(d)
    assert d.expand_by((2,)).transform is d.transform
    large = d
    for lead in ((2, 1, 1), (2, 1, 3), (2, 5, 3)):  # to new dimensions, then those of size one
        small, large = large, expand(large, lead + batch_shape)
        assert large.batch_shape == lead + batch_shape
        check_expanded(kind, small, large)
    for before, wrong in (((2, 1), (4, 3)), ((2, 4), (2, 2, 1)), ((1, 2, 1), (2, 1))):
        with pytest.raises((RuntimeError, ValueError)):
            expand(d, before + batch_shape).expand(wrong + batch_shape)
    for wrong in ((3,), (4, 3)) if batch_shape == (4,) else ():
        with pytest.raises((RuntimeError, ValueError), match="expand|shape|size|broadcast"):
            expand(d, wrong)


# ---------------------------------------------------------------------------------------- wrappers


@pytest.mark.parametrize(
    "kind",
    ["plain", "simplex", "given rows", "angles", "samples", "shaped", "expanded, halfway"],
)
@torch.no_grad()
def test_independent(kind):
    d = MADE[kind]()
    d = d.expand((5, 3, *d.batch_shape))
    for dims in range(len(d.batch_shape) + 1):
        cut = len(d.batch_shape) - dims
        for grouped in (dist.Independent(d, dims), d.to_event(dims)):
            assert grouped.batch_shape == d.batch_shape[:cut]
            assert grouped.event_shape == d.batch_shape[cut:] + d.event_shape
            assert grouped.support.event_dim == d.event_dim + dims
            x = grouped.sample((4, 2))
            assert x.shape == (4, 2, *d.shape())
            assert grouped.support.check(x).all()
            if kind != "samples":
                total = d.log_prob(x).flatten(cut + 2).sum(-1) if dims else d.log_prob(x)
                torch.testing.assert_close(grouped.log_prob(x), total)
    with pytest.raises(ValueError, match="dims"):
        d.to_event(len(d.batch_shape) + 1)


@pytest.mark.parametrize(
    "kind",
    ["one", "corr_cholesky", "given rows", "angles given", "flow base", "expanded", "hutchinson"],
)
@torch.no_grad()
def test_mask(kind):
    d = KINDS[kind]()
    base = d.expand((2, 3, *d.batch_shape))
    x = base.sample().clone()  # not what the cache, which forgets, has the path of
    scored = base.log_prob(x)
    masks = [torch.rand(base.batch_shape[i:]) < 0.5 for i in range(len(base.batch_shape) + 1)]
    for mask in [*masks, True, False]:
        masked = base.mask(mask)
        assert masked.shape() == base.shape()
        assert masked.event_dim == base.event_dim
        assert masked.support.check(masked.sample()).all()
        assert masked.has_rsample
        expected = scale_and_mask(scored, mask=torch.as_tensor(mask))
        torch.testing.assert_close(masked.log_prob(x), expected)
        parts = zip(
            masked.score_parts(x), base.score_parts(x).scale_and_mask(mask=mask), strict=True
        )
        for found, part in parts:
            torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(part))
        again = masked.expand((7, *base.batch_shape))
        assert again.log_prob(x).shape == (7, *base.batch_shape)
    for before, shape in (((), (1,)), ((), (2,)), ((1,), (2,)), ((2,), (1, 1)), ((2, 1), (2,))):
        base = d.expand(before + d.batch_shape)
        mask = torch.rand(shape + (1,) * len(d.batch_shape)) < 0.5
        masked = base.mask(mask)
        assert masked.batch_shape == broadcast_shape(mask.shape, base.batch_shape)
        x = masked.sample()
        assert x.shape == masked.shape()
        expected = scale_and_mask(base.log_prob(x), mask=mask.expand(masked.batch_shape))
        same(masked.log_prob(x), expected)
    with pytest.raises(ValueError, match="shape"):
        d.expand((2, *d.batch_shape)).mask(torch.ones(3, *d.batch_shape) > 0)


@pytest.mark.parametrize(
    "kind",
    [
        *("own network", "interval", "given rows, positive", "halfway, angles"),
        *("multivariate", "gaussianized", "expanded angles", "adaptive"),
    ],
)
@torch.no_grad()
def test_mixtures(kind):
    """Of two by a mask, and of three, members of a batch, by the weights of a categorical."""
    parts = [MADE[kind](), MADE[kind]()]
    parts = [part.expand((5, 3, *part.batch_shape)) for part in parts]
    mask = torch.rand(parts[0].batch_shape) < 0.5
    d = dist.MaskedMixture(mask, *parts)
    for sample_shape in ((), (4, 2)):
        x = d.sample(sample_shape)
        assert x.shape == sample_shape + parts[0].shape()
        zero, one = (part.log_prob(x) for part in parts)
        same(d.log_prob(x), torch.where(mask, one, zero))
    assert d.expand((2, *d.batch_shape)).sample().shape == (2, *d.shape())

    members = MADE[kind]().expand_by((3,))
    if members.batch_shape != (3,):
        members = members.expand((3, *members.batch_shape[1:]))
    weights = torch.rand(members.batch_shape)
    weights[..., 0] = 0.0
    d = dist.MixtureSameFamily(dist.Categorical(weights), members)
    assert d.event_shape == members.event_shape
    assert d.support.event_dim == d.event_dim
    x = d.sample((5,))
    assert x.shape == (5, *d.shape())
    assert d.support.check(x).all()
    scored = members.log_prob(x.unsqueeze(-1 - d.event_dim))
    shares = weights / weights.sum(-1, keepdim=True)
    same(d.log_prob(x), (scored.exp() * shares).sum(-1).log())
