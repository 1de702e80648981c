"""Events of more than one dimension: a reshape at the edge."""

import pyro
import pytest
import torch
from cases import random_flow
from pyro.distributions import constraints
from pyro.ops.provenance import detach_provenance, track_provenance
from torch.distributions import biject_to

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
    base_space,
    circular,
    conditional_interpolant_transform,
    fit,
    from_samples,
    load,
    save,
)

pytestmark = pytest.mark.usefixtures("_few_held_draws")

SUPPORTS = {
    "real": constraints.real_vector,
    "positive": constraints.positive,
    "interval": constraints.interval(-1.0, 2.0),
    "real matrices": constraints.independent(constraints.real, 2),
}


def flow(dim=6):
    return random_flow(dim).requires_grad_(requires_grad=False)


@pytest.mark.parametrize("name", SUPPORTS)
def test_a_shaped_flow_is_the_flat_one_reshaped(name, tmp_path):
    transform, support = flow(), SUPPORTS[name]
    shaped = InterpolantDistribution(transform, support=support, event_shape=(2, 3))
    plain = constraints.real_vector if name == "real matrices" else support
    flat = InterpolantDistribution(transform, support=plain)
    x = shaped.sample((5,)).clone()  # another tensor: no cached solve
    assert x.shape == (5, 2, 3)
    assert shaped.event_shape == (2, 3)
    assert shaped.support.event_dim == 2
    assert shaped.support.check(x).shape == (5,)
    assert shaped.support.check(x).all()
    torch.testing.assert_close(shaped.log_prob(x), flat.log_prob(x.reshape(5, 6)))
    torch.testing.assert_close(shaped.score(x), flat.score(x.reshape(5, 6)).reshape(5, 2, 3))
    assert shaped.at(0.5).event_shape == (2, 3)
    assert biject_to(shaped.support).inv(x).shape == (5, 6)
    save(shaped, tmp_path / "flow")
    again = load(tmp_path / "flow")
    assert again.event_shape == (2, 3)
    assert torch.equal(again.log_prob(x), shaped.log_prob(x))


def test_events_whose_origin_pyro_tracks():
    """As in ``render_model``; slices of their shape are plain tuples."""
    shaped = InterpolantDistribution(flow(), support=constraints.positive, event_shape=(2, 3))
    x = shaped.sample((5,)).clone()
    tracked = track_provenance(x, frozenset({"a"}))
    assert torch.allclose(detach_provenance(shaped.log_prob(tracked)), shaped.log_prob(x))
    assert shaped.support.check(tracked).all()


def test_a_simplex_of_cells():
    x = InterpolantDistribution(flow(3), support=constraints.simplex, event_shape=(2, 2)).sample(
        (4,)
    )
    torch.testing.assert_close(x.sum((-1, -2)), torch.ones(4))


def test_outside_of_the_support_is_told():
    shaped = InterpolantDistribution(flow(), support=constraints.positive, event_shape=(2, 3))
    x = torch.ones(4, 2, 3)
    x[2, 1, 1] = -1.0
    assert shaped.support.check(x).tolist() == [True, True, False, True]
    for bad in (x, x.clamp(min=0.0)):
        with pytest.raises(ValueError, match="1 of 4 rows outside it or on its edge.*row 2"):
            fit(shaped, bad, progress=False)


def test_bounds_of_elements_are_flat():
    low = torch.arange(3.0)
    shape = (3, 1)
    with pytest.raises(ValueError, match=r"bounds that are tensors .* are flat, \(D,\)"):
        InterpolantDistribution(
            flow(3), support=constraints.greater_than(low.reshape(shape)), event_shape=shape
        )
    support = constraints.greater_than(low)
    shaped = InterpolantDistribution(flow(3), support=support, event_shape=shape)
    x = shaped.sample((5,))
    assert x.shape == (5, 3, 1)
    assert (x > low[:, None]).all()


def test_in_models():
    shaped = InterpolantDistribution(flow(), event_shape=(2, 3))

    def model():
        with pyro.plate("objects", 4):
            return pyro.sample("z", shaped)

    assert model().shape == (4, 2, 3)
    trace = pyro.poutine.trace(base_space(model)).get_trace()
    assert trace.nodes["z"]["value"].shape == (4, 2, 3)
    assert trace.nodes["z_base"]["value"].shape == (4, 6)


@pytest.mark.usefixtures("_small_runs")
def test_fit_and_from_samples_take_rows_of_any_shape():
    x = torch.randn(200, 2, 3).exp()
    options = {"steps": 5, "progress": False, "seed": 0, "event_shape": (2, 3)}
    learned = from_samples(x, support=constraints.positive, **options)
    assert learned.sample((7,)).shape == (7, 2, 3)
    flat = from_samples(
        x.reshape(200, 6), support=constraints.positive, **{**options, "event_shape": None}
    )
    torch.testing.assert_close(learned.log_prob(x), flat.log_prob(x.reshape(200, 6)))
    from_samples(list(x.split(50)), support=constraints.positive, **options)
    conditional = ConditionalInterpolantDistribution(
        conditional_interpolant_transform(6, 1, (8,)), event_shape=(2, 3)
    )
    fit(conditional, x, context=torch.rand(200, 1), steps=5, progress=False)
    assert conditional.condition(torch.rand(9, 1)).sample().shape == (9, 2, 3)


@pytest.mark.parametrize("shape", [(2, 0), (-2, -3)])
def test_wrong_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="event_shape to be positive sizes"):
        InterpolantDistribution(flow(), event_shape=shape)


def test_shapes_of_another_size_are_refused():
    for shape in ((2, 2), ()):
        with pytest.raises(ValueError, match="support of 6 unconstrained dimensions"):
            InterpolantDistribution(flow(), event_shape=shape)
    one = r"expected event_shape=\(6,\), that of a flow of 6 dimensions .* got \(5,\)"
    with pytest.raises(ValueError, match=one):
        InterpolantDistribution(flow(), event_shape=(5,))
    with pytest.raises(ValueError, match=one):
        ConditionalInterpolantDistribution(
            conditional_interpolant_transform(6, 1, (8,)), event_shape=(5,)
        )
    with pytest.raises(ValueError, match=r"shape \(N, 2, 3\), got \(9, 3, 2\)"):
        from_samples(torch.randn(9, 3, 2), event_shape=(2, 3))


def test_supports_with_a_shape_of_their_own_need_no_other():
    with pytest.raises(ValueError, match="whose events have a shape of their own"):
        InterpolantDistribution(flow(3), support=constraints.corr_cholesky, event_shape=(3, 3))
    with pytest.raises(TypeError, match="no event_shape beside named draws"):
        from_samples({"a": torch.randn(50, 2)}, event_shape=(2,))


@pytest.mark.parametrize("support", [circular, constraints.sphere], ids=["angles", "sphere"])
def test_a_support_without_a_bijection_is_refused_in_words(support):
    with pytest.raises(ValueError, match="bijective image of real vectors, got"):
        from_samples(torch.randn(60), support=support, steps=2, progress=False)


def test_a_shape_is_a_tuple():
    with pytest.raises(TypeError, match=r"event_shape, a tuple of .* got 2: write \(2,\)"):
        InterpolantDistribution(random_flow(2), event_shape=2)
    with pytest.raises(TypeError, match=r"event_shape, a tuple of whole numbers, got \(2, 1\.5\)"):
        InterpolantDistribution(random_flow(3), event_shape=(2, 1.5))
