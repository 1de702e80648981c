"""What Pyro asserts of every distribution: shapes, broadcasting, expand, masks, wrappers."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from cases import BASES
from kinds import KINDS, SITES, family, flow_of, given, over, plain
from pyro.distributions import TorchDistribution, constraints
from pyro.distributions.testing.gof import auto_goodness_of_fit
from pyro.distributions.util import broadcast_shape, scale_and_mask
from pyro.infer.autoguide.initialization import init_to_mean
from torch.distributions import kl_divergence

from pyro_interpolant import JointInterpolantDistribution

# More kinds, for what batches and views of them may change: shapes, draws and their density.
SINGLE = {
    "start, laplace": lambda: plain(base=BASES["laplace"](2)).at(0.0),
    "given, laplace": lambda: given(base=BASES["laplace"](2)),
    "given, halfway": lambda: given().at(0.5),
}
BATCHES = {
    "batch of bases": lambda: plain(base=dist.Normal(torch.randn(4, 2), 1.0).to_event(1)),
    "given rows, positive": lambda: given(4, support=constraints.positive),
    "expanded, laplace": lambda: plain(base=BASES["laplace"](2)).expand((4,)),
    "expanded, halfway": lambda: plain().expand((4,)).at(0.5),
}
MADE = {**KINDS, **SINGLE, **BATCHES}

DENSITIES = [kind for kind in KINDS if kind != "samples"]
BATCHED = [k for k in KINDS if k.startswith("expanded") or k == "given rows"] + [*BATCHES]
QUICK = ("plain", "given rows")
FEW = ("plain", "positive", "angles")
SHAPES = [torch.Size, tuple, list]

EXPAND = {"own": lambda d, shape: d.expand(shape), "default": TorchDistribution.expand}


def same(a, b):
    """Check densities to what adaptive steps, chosen for all rows together, may change."""
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def rows(d, *lead):
    """Return draws, shape ``(*lead, *event)``, whatever the batch."""
    x = d.sample((torch.Size(lead).numel(),)).detach()
    return x[(slice(None),) + (0,) * len(d.batch_shape)].reshape(*lead, *d.event_shape)


# ------------------------------------------------------------------------------- shapes, densities


@over("shapes", QUICK, MADE)
def test_shapes(kind):
    d = MADE[kind]()
    assert d.event_dim == len(d.event_shape) > 0
    for sample_shape in ((), (2,), (2, 3)):
        assert d.shape(sample_shape) == sample_shape + d.batch_shape + d.event_shape
        for x in (d.sample(sample_shape), d(sample_shape)):
            assert x.shape == d.shape(sample_shape)
    assert len(d.sample((6,)).reshape(-1, d.event_shape.numel()).unique(dim=0)) == (
        6 * d.batch_shape.numel()
    )


@over("support", QUICK, MADE)
def test_support(kind):
    d = MADE[kind]()
    assert d.support.event_dim == d.event_dim
    assert not d.support.is_discrete
    x = d.sample((5,))
    inside = d.support.check(x)
    assert inside.shape == (5, *d.batch_shape)
    assert inside.all()


@over("log_prob", QUICK, [*DENSITIES, *SINGLE, *BATCHES])
@torch.no_grad()
def test_log_prob_broadcasts(kind):
    d = MADE[kind]()
    member = rows(d)
    expected = d.log_prob(member)
    for lead in ((), (1,), (3, 1), (2, 3, 1)):
        found = d.log_prob(member.expand(*lead, *d.event_shape))
        assert found.shape == broadcast_shape(lead, d.batch_shape)
        same(found, expected.expand(found.shape))


@over("event_dim", QUICK, DENSITIES)
def test_values_of_another_event_shape_raise(kind):
    d = KINDS[kind]()
    x = rows(d, 3)
    for wrong in (x[..., None].repeat_interleave(7, -1), x[..., :0], torch.cat((x, x), -1)):
        with pytest.raises(ValueError, match="expected"):
            d.log_prob(wrong)


@over("broadcast", ("given rows",), BATCHED)
def test_values_that_do_not_broadcast_raise(kind):
    d = MADE[kind]()
    with pytest.raises((ValueError, RuntimeError), match="shape|size|broadcast"):
        d.log_prob(rows(d, 5))


# Coordinates of draws in which a density can be told by nearest neighbours, and their number.
FREE = {
    "simplex": lambda x: (x[..., :-1], 2),
    "shaped": lambda x: (x.flatten(-2), 4),
    **{
        kind: lambda x: (torch.cat((x.cos(), x.sin()), -1), x.shape[-1])
        for kind in KINDS
        if "angle" in kind
    },
}


NOT_COUNTED = ("corr_cholesky", "hutchinson")


@over("gof", ("plain", "given"), [k for k in [*DENSITIES, *SINGLE] if k not in NOT_COUNTED])
def test_draws_follow_the_density(kind):
    """Of dependent distances the p-value is far from uniform: an exact Gaussian reaches 1e-6.

    Near the edge of the Cholesky factors, where most draws are, it is 0 or 1; the density there is
    tested by its Jacobian. With Hutchinson's probes the density is an estimate.
    """
    d = MADE[kind]()
    with torch.no_grad():
        x = d.sample((1200 * max(3, d.event_shape.numel()),))
        p = d.log_prob(x.clone()).exp()
    x, dim = FREE.get(kind, lambda x: (x, x.shape[-1]))(x)
    x, p = x.reshape(len(x), -1, x.shape[-1]), p.reshape(len(p), -1)
    for i in range(p.shape[1]):
        assert auto_goodness_of_fit(x[:, i], p[:, i], dim=dim) > 1e-9


@over("types", ("plain",), DENSITIES, name=["float32", "float64"])
def test_types(kind, name):
    dtype = getattr(torch, name)
    d = KINDS[kind]().to(dtype)
    x = d.sample((3,))
    assert x.dtype == d.log_prob(x).dtype == d.rsample().dtype == dtype
    other = torch.float64 if dtype is torch.float32 else torch.float32
    with pytest.raises(ValueError, match="the type of the flow"):
        d.log_prob(x.to(other))


@over("validation", ("plain",), DENSITIES, mode=["on", "off"])
def test_validation(kind, mode):
    with pyro.validation_enabled(mode == "on"):
        d = KINDS[kind]()
        x = torch.full_like(d.sample(), torch.nan)
        if mode == "on":
            with pytest.raises(ValueError, match="within the support"):
                d.log_prob(x)
        else:
            assert d.log_prob(x).isnan().all()


@over("has_rsample", QUICK)
def test_has_rsample(kind):
    d = KINDS[kind]()
    assert d.has_rsample is (kind != "samples")
    if d.has_rsample:
        assert d.rsample().requires_grad is (kind != "start")
    assert not d.sample().requires_grad
    d.has_rsample_(False)  # noqa: FBT003
    assert not d.has_rsample
    assert not d.expand((2, *d.batch_shape)).has_rsample


@over("samples", ("samples",), ["samples"])
def test_a_base_without_density(kind):
    d = KINDS[kind]()
    for wrapped in (d, d.expand((3,)), d.to_event(0), d.mask(torch.ones(()) > 0)):
        with pytest.raises(ValueError, match="samples alone"):
            wrapped.log_prob(d.sample())


# -------------------------------------------------------------------- what Pyro lets one leave out


@over("moments", kinds=FEW)
def test_moments(kind):
    d = KINDS[kind]()
    x = d.sample((4000,))
    error = 5 * x.std(0) / len(x) ** 0.5
    assert d.mean.shape == d.variance.shape == d.shape()
    assert ((d.mean - x.mean(0)).abs() < error).all()
    torch.testing.assert_close(d.variance, x.var(0), rtol=0.3, atol=0.0)


HEAVY = {  # the tails of a base are those of the flow; 1.5 degrees of freedom have a mean
    "cauchy": (lambda dim: dist.Cauchy(torch.zeros(dim), 1.0).to_event(1), ("mean", "variance")),
    "student": (lambda dim: dist.StudentT(1.5, torch.zeros(dim), 1.0).to_event(1), ("variance",)),
}
WRAPPED = {
    "site": lambda base: plain(base=base(2)),
    "start": lambda base: plain(base=base(2)).at(0.0),
    "positive": lambda base: plain(base=base(2), support=constraints.positive),
    "expanded": lambda base: plain(base=base(2)).expand((3,)),
    "joint": lambda base: JointInterpolantDistribution(flow_of(5), base(5), sites=SITES),
}


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("name", HEAVY)
def test_a_moment_that_does_not_exist_is_not_invented(name, wrapped):
    """As of Pyro's Cauchy, it is NaN, or infinite, or there is none to be had."""
    base, moments = HEAVY[name]
    d = WRAPPED[wrapped](base)
    for moment in (*moments, *(["stddev"] if "variance" in moments else [])):
        try:
            value = getattr(d, moment)
        except (NotImplementedError, ValueError):
            continue
        assert not torch.isfinite(value).any(), moment
    start = init_to_mean({"name": "x", "fn": d})  # which falls back to what there is
    assert d.support.check(start).all()


@over("entropy", kinds=FEW)
def test_entropy(kind):
    d = KINDS[kind]()
    surprise = -d.log_prob(d.sample((4000,)))
    error = 5 * surprise.std(0) / len(surprise) ** 0.5
    assert ((d.entropy() - surprise.mean(0)).abs() < error).all()


@over("cdf", ("one", "one angle"), ["one", "one angle"])
def test_cdf_and_icdf(kind):
    d = KINDS[kind]()
    u = torch.rand(100, *d.shape())
    same(d.cdf(d.icdf(u)), u)


@over("infer_shapes", ("plain",), ("plain",))
def test_infer_shapes(kind):
    assert type(KINDS[kind]()).infer_shapes() == ((), (2,))


@over("enumerate", QUICK)
def test_there_is_nothing_to_enumerate(kind):
    d = KINDS[kind]()
    assert not d.has_enumerate_support
    for expand in ({}, {"expand": True}, {"expand": False}):
        with pytest.raises(NotImplementedError):
            d.enumerate_support(**expand)


# ------------------------------------------------------------------------------------------ expand


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


@over("expand_by", QUICK)
def test_expand_by(kind):
    small = KINDS[kind]()
    for sample_shape in ((), (2,), (2, 3)):
        for shape_type in SHAPES:
            large = small.expand_by(shape_type(sample_shape))
            assert type(large) is type(small)
            assert large.transform is small.transform
            assert large.batch_shape == sample_shape + small.batch_shape
        check_expanded(kind, small, large)


@over("expand_new_dim", QUICK, how=EXPAND)
def test_expand_to_new_dimensions(kind, how):
    small = KINDS[kind]()
    for sample_shape in ((), (2,), (2, 3)):
        for shape_type in SHAPES:
            large = EXPAND[how](small, shape_type(sample_shape + small.batch_shape))
            assert large.batch_shape == sample_shape + small.batch_shape
        check_expanded(kind, small, large)


@over("subsequent_expands", QUICK, how=EXPAND)
def test_subsequent_expands(kind, how):
    d = KINDS[kind]()
    batch_shape = d.batch_shape
    shapes = ((2, 1, 1), (2, 1, 3), (2, 5, 3))  # to new dimensions, then to those of size one
    for shape_type, shape in zip(SHAPES, shapes, strict=True):
        large = EXPAND[how](d, shape_type(shape + batch_shape))
        assert large.batch_shape == shape + batch_shape
        check_expanded(kind, d, large)
        d = large


@over("expand_error", (*QUICK, "samples", "angles"), [*KINDS, *BATCHES], how=EXPAND)
def test_what_does_not_expand_raises(kind, how):
    d = MADE[kind]()
    for initial, proposed in (((2, 1), (4, 3)), ((2, 4), (2, 2, 1)), ((1, 2, 1), (2, 1))):
        large = EXPAND[how](d, initial + d.batch_shape)
        with pytest.raises((RuntimeError, ValueError)):
            large.expand(proposed + d.batch_shape)
    for proposed in ((3,), (4, 3)) if d.batch_shape == (4,) else ():
        with pytest.raises((RuntimeError, ValueError), match="expand|shape|size|broadcast"):
            EXPAND[how](d, proposed)


@over("expand_reshaped", ("plain",), how=EXPAND)
def test_expand_of_a_reshaped_one(kind, how):
    d = KINDS[kind]()
    full = (4, 1, 1, *d.batch_shape)
    for extra, shape in ((0, (4, 3, 2)), (1, (5, 4, 3)), (1, (4, 2)), (2, (5, 4))):
        reshaped = EXPAND[how](d, full).to_event(extra + len(d.batch_shape))
        assert reshaped.batch_shape == full[: 3 - extra]
        assert reshaped.event_shape == full[3 - extra :] + d.event_shape
        large = reshaped.expand(shape)
        assert large.batch_shape == shape
        assert large.event_shape == reshaped.event_shape
        assert large.sample().shape == shape + reshaped.event_shape
        for wrong in ((*shape, 3), shape[1:]):
            with pytest.raises((RuntimeError, ValueError)):
                large.expand(wrong)


# ---------------------------------------------------------------------------------------- wrappers


@over("independent", QUICK)
@pytest.mark.parametrize("batch_shape", [(), (5, 3)])
@torch.no_grad()
def test_independent(kind, batch_shape):
    d = KINDS[kind]()
    d = d.expand(batch_shape + d.batch_shape)
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
    for make in (dist.Independent, lambda d, n: d.to_event(n)):
        with pytest.raises(ValueError, match="dims"):
            make(d, len(d.batch_shape) + 1)


@over("mask", QUICK, DENSITIES)
@pytest.mark.parametrize("batch_shape", [(), (2, 3)])
@torch.no_grad()
def test_mask(kind, batch_shape):
    base = KINDS[kind]()
    base = base.expand(batch_shape + base.batch_shape)
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


@over("mask_broadcast", ("plain",), DENSITIES)
@torch.no_grad()
def test_masks_broadcast_with_the_batch(kind):
    d = KINDS[kind]()
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


@over("kl", ("plain", "positive"), [k for k in DENSITIES if k != "start"])
def test_divergence_of_a_flow_is_that_of_the_bases_or_refused(kind):
    """Torch's rule for one chain of transforms; any other pair has to fall back on draws."""
    d = KINDS[kind]()
    with pytest.raises(NotImplementedError):
        kl_divergence(d, KINDS[kind]())
    with pytest.raises(NotImplementedError):
        kl_divergence(d, d.at(0.7))


@over("masked_mixture", QUICK, DENSITIES)
@torch.no_grad()
def test_masked_mixture(kind):
    parts = [KINDS[kind](), KINDS[kind]()]
    parts = [part.expand((5, 3, *part.batch_shape)) for part in parts]
    mask = torch.rand(parts[0].batch_shape) < 0.5
    d = dist.MaskedMixture(mask, *parts)
    assert d.shape() == parts[0].shape()
    for sample_shape in ((), (4, 2)):
        x = d.sample(sample_shape)
        assert x.shape == sample_shape + parts[0].shape()
        zero, one = (part.log_prob(x) for part in parts)
        same(d.log_prob(x), torch.where(mask, one, zero))
    large = d.expand((2, *d.batch_shape))
    assert large.sample().shape == (2, *d.shape())


@over("mixture", FEW, DENSITIES)
def test_mixture_of_members(kind):
    """A learned mixture: its parts are a batch of flows, weighed by a categorical."""
    parts = KINDS[kind]().expand_by((3,))
    if parts.batch_shape != (3,):
        parts = parts.expand((3, *parts.batch_shape[1:]))
        weights = torch.rand(parts.batch_shape)
    else:
        weights = torch.rand(3)
    d = dist.MixtureSameFamily(dist.Categorical(weights), parts)
    assert d.event_shape == parts.event_shape
    assert d.support.event_dim == d.event_dim
    x = d.sample((5,))
    assert x.shape == (5, *d.shape())
    assert d.support.check(x).all()
    scored = parts.log_prob(x.unsqueeze(-1 - d.event_dim))
    expected = (scored + (weights / weights.sum(-1, keepdim=True)).log()).logsumexp(-1)
    torch.testing.assert_close(d.log_prob(x), expected)


def test_mixture_over_contexts():
    """One flow given each of three contexts, and shares of them: draws follow the shares."""
    parts, shares = family().condition(torch.randn(3, 3)), torch.tensor([0.2, 0.0, 0.8])
    d = dist.MixtureSameFamily(dist.Categorical(shares), parts)
    x = d.sample((4,))
    expected = shares[0] * parts.log_prob(x[:, None])[:, 0].exp()
    expected = expected + shares[2] * parts.log_prob(x[:, None])[:, 2].exp()
    torch.testing.assert_close(d.log_prob(x), expected.log())
