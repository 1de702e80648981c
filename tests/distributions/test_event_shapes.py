"""Events of more than one dimension: a reshape at the edge."""

import pytest
import torch
from cases import random_flow
from pyro.distributions import constraints
from torch.distributions import biject_to

import pyro_interpolant as pi

pytestmark = pytest.mark.usefixtures("_few_held_draws")

SUPPORTS = {
    "interval": constraints.interval(-1.0, 2.0),
    "real matrices": constraints.independent(constraints.real, 2),
}


def flow(dim=6):
    return random_flow(dim).requires_grad_(requires_grad=False)


@pytest.mark.parametrize("name", SUPPORTS)
def test_a_shaped_flow_is_the_flat_one_reshaped(name, tmp_path):
    transform, support = flow(), SUPPORTS[name]
    shaped = pi.InterpolantDistribution(transform, support=support, event_shape=(2, 3))
    plain = constraints.real_vector if name == "real matrices" else support
    flat = pi.InterpolantDistribution(transform, support=plain)
    x = shaped.sample((5,)).clone()  # another tensor: no cached solve
    assert x.shape == (5, 2, 3)
    assert shaped.support.check(x).tolist() == [True] * 5
    torch.testing.assert_close(shaped.log_prob(x), flat.log_prob(x.reshape(5, 6)))
    torch.testing.assert_close(shaped.score(x), flat.score(x.reshape(5, 6)).reshape(5, 2, 3))
    assert shaped.at(0.5).event_shape == (2, 3)
    assert biject_to(shaped.support).inv(x).shape == (5, 6)
    pi.save(shaped, tmp_path / "flow")
    assert torch.equal(pi.load(tmp_path / "flow").log_prob(x), shaped.log_prob(x))


def test_shapes_of_supports_with_parts_and_bounds():
    cells = pi.InterpolantDistribution(flow(3), support=constraints.simplex, event_shape=(2, 2))
    torch.testing.assert_close(cells.sample((4,)).sum((-1, -2)), torch.ones(4))
    low, shape = torch.arange(3.0), (3, 1)
    support = constraints.greater_than(low)
    x = pi.InterpolantDistribution(flow(3), support=support, event_shape=shape).sample((5,))
    assert (x > low[:, None]).all()
    with pytest.raises(ValueError, match=r"bounds that are tensors .* are flat, \(D,\)"):
        pi.InterpolantDistribution(
            flow(3), support=constraints.greater_than(low.reshape(shape)), event_shape=shape
        )


@pytest.mark.usefixtures("_small_runs")
def test_fit_and_from_samples_take_rows_of_any_shape():
    x = torch.randn(200, 2, 3).exp()
    options = {"steps": 5, "progress": False, "seed": 0, "support": constraints.positive}
    learned = pi.from_samples(x, event_shape=(2, 3), **options)
    assert learned.sample((7,)).shape == (7, 2, 3)
    flat = pi.from_samples(x.reshape(200, 6), **options)
    torch.testing.assert_close(learned.log_prob(x), flat.log_prob(x.reshape(200, 6)))
    pi.from_samples(list(x.split(50)), event_shape=(2, 3), **options)
    conditional = pi.ConditionalInterpolantDistribution(
        pi.conditional_interpolant_transform(6, 1, (8,)), event_shape=(2, 3)
    )
    pi.fit(conditional, x, context=torch.rand(200, 1), steps=5, progress=False)
    assert conditional.condition(torch.rand(9, 1)).sample().shape == (9, 2, 3)


REFUSED = [
    ((2, 0), constraints.real, "event_shape to be positive sizes"),
    ((2, 2), constraints.real, "support of 6 unconstrained dimensions"),
    (
        (5,),
        constraints.real,
        r"expected event_shape=\(6,\), that of a flow of 6 dimensions .* got \(5,\)",
    ),
    ((3, 3), constraints.corr_cholesky, "whose events have a shape of their own"),
    (6, constraints.real, r"event_shape, a tuple of .* got 6: write \(6,\)"),
]


@pytest.mark.parametrize(("shape", "support", "message"), REFUSED)
def test_shapes_that_are_refused(shape, support, message):
    dim = 6 if support is constraints.real else 3
    with pytest.raises((TypeError, ValueError), match=message):
        pi.InterpolantDistribution(flow(dim), support=support, event_shape=shape)
    with pytest.raises((TypeError, ValueError), match=message):
        pi.ConditionalInterpolantDistribution(
            random_flow(dim, context_dim=1), support=support, event_shape=shape
        )
