"""Where a map is chosen, which, and where none is."""

import copy
import math

import pyro.distributions as dist
import pytest
import torch
from cases import slow_but
from pyro.distributions import constraints

from pyro_interpolant import (
    InterpolantDistribution,
    fit,
    from_samples,
    interpolant_transform,
)
from pyro_interpolant.distributions.rounding import warn_if_rounded
from pyro_interpolant.training import preprocessing
from pyro_interpolant.training.preprocessing import (
    dequantize,
    marginal_transform,
    preferred_support,
    radial_transform,
)
from pyro_interpolant.transforms.gaussianize import (
    Gaussianized,
    MarginalTransform,
    RadialTransform,
)

pytestmark = pytest.mark.usefixtures("_small_runs")

N = 4000


def slab():
    x = torch.randn(N, 3)
    x[:, 0] = torch.where(torch.rand(N) < 0.3, 1e-3 * torch.rand(N), 3 * x[:, 0])
    return x + 0.5 * torch.randn(N, 1) * torch.tensor([0.0, 1.0, 1.0])


def ring():
    angle = torch.randint(8, (N,)) * math.pi / 4
    return 4 * torch.stack((angle.cos(), angle.sin()), -1) + 0.3 * torch.randn(N, 2)


def sheet():
    """A common scale, and a combination of columns that hardly varies."""
    x = torch.randn(N, 6) @ torch.randn(6, 6)
    x[:, 5] = x[:, 4] + 0.02 * x[:, 5]
    return x * torch.randn(N, 1).exp()


def annulus():
    angle = 2 * math.pi * torch.rand(N)
    return (2 + 0.1 * torch.randn(N, 1)) * torch.stack((angle.cos(), angle.sin()), -1)


PAYS = {
    "slab": slab,
    "lognormal": lambda: (0.3 * torch.randn(N, 1) + torch.randn(N, 3)).exp(),
    "skewed": lambda: dist.Gamma(0.3, 1.0).sample((N, 4)),
}
LENGTHS = {
    "annulus": annulus,
    "contrast": lambda: torch.randn(N, 20) @ torch.randn(20, 20) * torch.randn(N, 1).exp(),
}
DOES_NOT = {
    "normal": lambda: torch.randn(N, 3) @ torch.randn(3, 3),
    "ring": ring,
    "modes": lambda: 3 * torch.randn(12, 8)[torch.randint(12, (N,))] + 0.5 * torch.randn(N, 8),
    "elliptical": lambda: torch.randn(N, 8) / dist.Gamma(1.5, 1.5).sample((N, 1)).sqrt(),
    "sheet": sheet,
    "few": lambda: torch.randn(300, 2).exp(),
    "five": lambda: torch.randn(5, 2).exp(),
    "repeats": lambda: torch.randn(40, 3).exp()[torch.randint(40, (N,))],
    "too wide": lambda: torch.randn(8000, 65).exp(),
}


@pytest.mark.parametrize("name", slow_but(PAYS | LENGTHS | DOES_NOT, "slab", "ring", "few"))
def test_the_choice(name):
    found = preferred_support((PAYS | LENGTHS | DOES_NOT)[name](), constraints.real_vector)
    if name in DOES_NOT:
        assert found is constraints.real_vector
    else:
        wanted = MarginalTransform if name in PAYS else RadialTransform
        assert type(found.gaussianizer) is wanted


@pytest.mark.slow
def test_weights_say_which_rows_there_are():
    x, weights = torch.cat((slab(), torch.randn(N, 3))), torch.ones(2 * N)
    weights[:N] = 0.0
    assert preferred_support(x, constraints.real_vector, weights) is constraints.real_vector
    assert isinstance(preferred_support(x, constraints.real_vector, 1 - weights), Gaussianized)


def test_the_map_of_weighted_rows_is_the_same_again_and_leaves_the_generator():
    x, weights, state = torch.randn(2000, 2).exp(), torch.rand(2000), torch.get_rng_state()
    maps = [
        preferred_support(x, constraints.real_vector, weights, always=True).gaussianizer
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(maps[0].inv(x), maps[1].inv(x))


def test_copies_of_a_row_are_held_out_together_where_a_map_is_chosen(monkeypatch):
    """A chain's rejections, which would tell of themselves what is held out."""
    plain, parts = preprocessing._mixture, []
    monkeypatch.setattr(
        preprocessing, "_mixture", lambda *given: parts.append(given[:2]) or plain(*given)
    )
    x = torch.randn(500, 2).exp()
    preferred_support(x.repeat(4, 1), constraints.real_vector)
    assert parts
    for kept, held in parts:
        assert not {tuple(row) for row in kept.tolist()} & {tuple(row) for row in held.tolist()}


def test_a_column_that_has_few_values_is_mapped_as_it_is_alone():
    few = (torch.arange(2000) % 5 - 2.0)[:, None]
    both, alone = (marginal_transform(x) for x in (torch.cat((torch.randn(2000, 1), few), 1), few))
    x = torch.linspace(-30, 30, 61)[:, None]
    torch.testing.assert_close(both.inv(x.expand(-1, 2))[:, 1:], alone.inv(x))
    middles = torch.special.ndtri((few[:5] + 2.5) / 5)  # of their shares of all rows
    torch.testing.assert_close(alone.inv(few[:5]), middles)


def test_lengths_below_all_are_in_proportion():
    found = radial_transform(torch.randn(2000, 3) * torch.randn(2000, 1).exp())
    middle, row = found.inv(found.loc[None]), torch.randn(1, 3)
    near, nearer = (found.inv(found.loc + size * row) - middle for size in (1e-6, 1e-8))
    torch.testing.assert_close(near, 100 * nearer, rtol=1e-5, atol=0.0)


OPTIONS = {"steps": 3, "progress": False, "seed": 0}


@pytest.mark.slow
def test_from_samples_chooses_the_same_again_without_need_and_by_weights():
    x, plain = slab()[:2000], torch.randn(2000, 3)
    by_default, again = (from_samples(x, **OPTIONS) for _ in range(2))
    assert torch.equal(by_default.log_prob(x[:9]), again.log_prob(x[:9]))
    weighted = from_samples(slab(), weights=torch.rand(N), **OPTIONS)
    wanted = from_samples(plain, marginals=True, **OPTIONS)
    for found in (by_default, weighted, wanted):
        assert isinstance(found.constraint, Gaussianized)
    assert from_samples(plain, **OPTIONS).constraint is constraints.real_vector
    assert from_samples(x, marginals=False, **OPTIONS).constraint is constraints.real_vector


@pytest.mark.slow
def test_from_samples_takes_lengths_of_named_draws():
    u = 0.01 * torch.randn(N, 20) @ torch.randn(20, 20) * torch.randn(N, 1).exp()
    draws, support = {"a": u[:, :1].exp(), "b": u[:, 1:]}, {"a": constraints.positive}
    d = from_samples(draws, support=support, **OPTIONS)
    assert isinstance(d.constraint.gaussianizer, RadialTransform)
    y = d.sample((50,))
    assert torch.isfinite(d.log_prob(y)).all()
    assert (d.unpack(y)["a"] > 0).all()


def test_beyond_lengths_that_end_abruptly_densities_fall_and_are_finite():
    angle = torch.arange(8.0) * torch.pi / 4
    modes = 20 * torch.stack((angle.cos(), angle.sin()), -1)
    x = modes[torch.randint(0, 8, (2000,))] + 0.1 * torch.randn(2000, 2)
    support = Gaussianized(constraints.real_vector, radial_transform(x))
    flow = InterpolantDistribution(interpolant_transform(2, (8,)), support=support)
    far = torch.tensor([1.5, 3.0, 10.0, 100.0, 1000.0])[:, None] * torch.tensor([20.0, 10.0])
    for dtype in (torch.float64, torch.float32):
        found = flow.to(dtype).log_prob(far.to(dtype))
        assert bool(found.isfinite().all())
        assert bool((found.diff() < 0).all())


@pytest.mark.slow
def test_named_or_packed_the_same_rows_are_the_same_rows():
    x = slab()
    draws = {"scale": x[:, 0].exp(), "effects": x[:, 1:]}
    few = {k: v[:500] for k, v in draws.items()}
    d = from_samples(draws, support={"scale": constraints.positive}, validation=few, **OPTIONS)
    assert isinstance(d.constraint, Gaussianized)
    assert (d.unpack(d.sample((50,)))["scale"] > 0).all()
    named, packed = copy.deepcopy(d), copy.deepcopy(d)
    fit(named, draws, validation=few, **OPTIONS)
    fit(packed, d.pack(draws), validation=d.pack(few), **OPTIONS)
    assert torch.equal(named.log_prob(d.pack(few)), packed.log_prob(d.pack(few)))


@pytest.mark.slow
@pytest.mark.parametrize("far", [1e10, 1e300])
def test_one_wild_row_decides_nothing(far):
    for make, wanted in ((slab, True), (ring, False)):
        x = make()
        x[7, 0] = far
        assert isinstance(preferred_support(x, constraints.real_vector), Gaussianized) == wanted


def grids(n=400):
    z = torch.randn(n, 2)
    return {
        "rounded": (z * 10).round() / 10,
        "whole": (z * 3).round().long(),
        "booleans": torch.rand(n, 2) < 0.3,
        "halves": z.half(),
        "scalars": (z[:, 0] * 5).round(),
        "a constant column": torch.stack((z[:, 0], torch.full((n,), 3.7)), 1),
        "thirds": (z * 20).round().float() / 3,
        "large whole numbers": 2**30 + torch.randint(0, 50, (n, 2)),
    }


def test_whole_numbers_are_spread_where_any_repeat():
    """Of real numbers few that repeat may be chance."""
    x = torch.cat((torch.arange(0, 200, 2), torch.tensor([198])))[:, None]
    spread = (dequantize(x) - x).abs()
    assert 0.5 < spread.max() <= 1.0
    assert torch.equal(dequantize(x.double()), x.double())
    assert torch.equal(dequantize(x[:-1]), x[:-1].double())


def test_what_is_dequantized_can_be_learned():
    for name, grid in grids().items():
        x = dequantize(grid.numpy())
        assert x.dtype in (torch.float32, torch.float64), name
        rows = x if x.dim() > 1 else x[:, None]
        assert all(len(torch.unique(column)) > 0.85 * len(column) for column in rows.T), name
        if name in ("scalars", "a constant column"):
            distribution = from_samples(x, steps=1, seed=0, progress=False, tolerance=1e9)
            assert distribution.event_shape == x.shape[1:]


def test_single_values_beside_others_are_no_rounding():
    x = torch.randn(500, 2).exp()
    x[:200, 1] = 0.0
    with pytest.raises(ValueError, match=r"columns \[1\] that repeat single values"):
        dequantize(x)
    assert torch.equal(dequantize(x, 0.0), x.double())
    with pytest.warns(UserWarning, match=r"columns \[1\] repeat single values.*probability"):
        warn_if_rounded(x)
