import matplotlib as mpl
import numpy as np
import pyro.distributions as dist
import pytest
import torch
from cases import random_flow
from pyro.distributions import constraints

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    FixedGrid,
    Geodesic,
    InterpolantDistribution,
    InterpolantTransform,
    JointInterpolantDistribution,
    Latent,
    LearnedInterpolant,
    Linear,
    TorusMLP,
    UniformTorus,
    circular,
    conditional_interpolant_transform,
    fit,
    interpolant_transform,
    plotting,
)
from pyro_interpolant.diagnostics import CalibrationCheck
from pyro_interpolant.distributions import ConditionalJointInterpolantDistribution
from pyro_interpolant.plotting.axes import extent_of
from pyro_interpolant.transforms.gaussianize import Gaussianized, MarginalTransform

mpl.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def flow(dim, **kwargs):
    return InterpolantDistribution(random_flow(dim).requires_grad_(requires_grad=False), **kwargs)


def family():
    return ConditionalInterpolantDistribution(random_flow(1, context_dim=2)).freeze()


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_trajectories_start_at_the_base_and_end_at_the_model(dim):
    base = dist.Normal(torch.full((dim,), 9.0), torch.full((dim,), 0.01)).to_event(1)
    ax = plotting.trajectories(flow(dim, base=base), count=7, steps=9)
    paths = [line.get_xydata() for line in ax.lines]
    assert len(paths) == 7
    assert all(len(path) == 10 for path in paths)
    start = paths[0][0]
    assert start[-1] == pytest.approx(9.0, abs=0.1)
    assert start[0] == pytest.approx(0.0 if dim == 1 else 9.0, abs=0.1)


@pytest.mark.parametrize("dim", [1, 2])
def test_trajectories_that_stop_at_the_base_are_points_of_it(dim):
    base = dist.Normal(torch.full((dim,), 9.0), torch.full((dim,), 0.01)).to_event(1)
    ax = plotting.trajectories(flow(dim, base=base).at(0), count=6, steps=1)
    points = [line.get_xydata() for line in ax.lines]
    assert len(points) == 6
    for point in points:
        np.testing.assert_allclose(point, [[0.0 if dim == 1 else 9.0, 9.0]], atol=0.1)


def test_trajectories_live_on_the_support():
    ax = plotting.trajectories(flow(2, support=constraints.positive), count=5, steps=4)
    assert all((line.get_xydata() > 0).all() for line in ax.lines)


@pytest.mark.parametrize("dim", [1, 2])
def test_density_is_drawn_at_the_time_it_stops(dim):
    ax = plt.subplots()[1]
    assert plotting.density(flow(dim).at(0.5), points=20, velocity=dim == 2, ax=ax) is ax
    if dim == 1:
        x, y = torch.as_tensor(ax.lines[0].get_xydata()).T
        assert float(torch.trapezoid(y, x)) == pytest.approx(1.0, abs=0.05)
    else:
        assert len(ax.collections) == 2


def test_density_in_a_box_of_ones_own():
    ax = plotting.density(flow(2), extent=(-3, 3, -2, 5), points=16)
    assert ax.get_xlim() == (-3, 3)
    assert ax.get_ylim() == (-2, 5)


def test_densities_and_arrows_are_those_of_their_places():
    """Of rows about (0, 10), on a grid that is no square, at the time that the flow stops at."""
    plane = InterpolantDistribution(far_apart())
    heights = plotting.density(plane, extent=(-1, 1, 9, 12), points=4).collections[0].get_array()
    x, y = torch.linspace(-1, 1, 4), torch.linspace(9, 12, 4)
    expected = plane.log_prob(torch.cartesian_prod(y, x).flip(-1)).exp().detach()
    torch.testing.assert_close(torch.as_tensor(heights).flatten(), expected)
    stopped = flow(2).at(0.3)
    arrows = plotting.density(stopped, points=4, velocity=True).collections[1]
    transform = stopped.transform
    whitening = transform.flow.whitening
    w = whitening.to_white(torch.as_tensor(arrows.XY).double())
    rate = whitening.push(transform.velocity(torch.tensor(0.3), w))
    found = torch.stack([torch.as_tensor(a) for a in (arrows.U, arrows.V)], -1)
    torch.testing.assert_close(found, rate)


def test_values_far_from_zero_are_apart_where_the_default_type_is_short():
    """Of a flow in float64 about 1e9; the density at each place is that of the flow there."""
    plane, line = (InterpolantDistribution(random_flow(dim)).freeze() for dim in (2, 1))
    family = ConditionalInterpolantDistribution(random_flow(1, context_dim=1)).freeze()
    for d in (plane, line, family):
        d.transform.flow.whitening.loc += 1e9
    context = torch.linspace(-1, 1, 5)
    torch.set_default_dtype(torch.float32)
    mesh = plotting.density(plane, points=8).collections[0]
    places = torch.as_tensor(np.asarray(mesh.get_coordinates())).reshape(-1, 2)
    assert len(places.unique(dim=0)) == 64
    heights = torch.as_tensor(np.asarray(mesh.get_array())).flatten()
    torch.testing.assert_close(heights, plane.log_prob(places).exp())
    x, y = torch.as_tensor(plotting.density(line, points=8).lines[0].get_xydata()).T
    assert len(x.unique()) == 8
    torch.testing.assert_close(y, line.log_prob(x[:, None]).exp())
    for ax in plotting.evolution(plane, times=(0.5, 1.0), velocity=False):
        assert 0.1 < ax.get_xlim()[1] - ax.get_xlim()[0] < 100
    drawn = plotting.conditional(family, context, levels=(0.5,), points=9)
    assert len(set(drawn.collections[0].get_coordinates()[:, 0, 1].tolist())) == 9


@pytest.mark.slow
def test_evolution_shows_every_time():
    axes = plotting.evolution(flow(2), times=(0.0, 0.3, 1.0))
    assert [ax.get_title() for ax in axes] == ["$t = 0$", "$t = 0.3$", "$t = 1$"]
    assert len({ax.get_xlim() for ax in axes}) == 1
    given = plt.subplots(1, 2)[1]
    assert plotting.evolution(flow(2), times=(0.0, 1.0), velocity=False, ax=given) is given


@pytest.mark.parametrize(
    ("interpolant", "lines"), [(Linear(), 2), (Latent(), 3), (LearnedInterpolant(3), 2)]
)
def test_coefficients_that_are_there(interpolant, lines):
    ax = plotting.coefficients(interpolant)
    assert len(ax.lines) == lines
    assert ax.lines[0].get_ydata()[0] == pytest.approx(1.0)
    assert ax.lines[1].get_ydata()[-1] == pytest.approx(1.0)


def test_training_curve_shows_both_losses_and_what_was_kept():
    distribution = InterpolantDistribution(random_flow(2))
    result = fit(distribution, torch.randn(200, 2), steps=20, progress=False)
    ax = plotting.training_curve(result)
    assert list(ax.lines[0].get_xdata()) == result.steps
    assert list(ax.lines[1].get_ydata()) == result.validation_losses
    assert ax.lines[2].get_xdata()[0] == result.best_step


@pytest.mark.parametrize("drawn", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_corner_compares_every_pair(drawn):
    data = torch.randn(300, 3)
    samples = torch.randn(100, 3) if drawn else flow(3)
    axes = plotting.corner(samples, data, names=["a", "b", "c"])
    assert axes.shape == (3, 3)
    assert not axes[0][2].axison
    assert [type(part).__name__ for part in axes[2][0].collections] == [
        "QuadContourSet", "PathCollection", "QuadContourSet",
    ]  # fmt: skip
    assert axes[2][0].get_xlim() == axes[1][0].get_xlim() == axes[0][0].get_xlim()
    assert axes[2][0].get_ylim() == axes[2][1].get_ylim() == axes[2][2].get_xlim()
    assert axes[2][1].get_xlabel() == "b"
    assert axes[2][0].get_ylabel() == "c"
    assert plotting.corner(samples, data, ax=axes) is axes


def test_new_axes_are_made_where_none_are_given():
    assert plotting.coefficients(Linear()).figure is not plotting.coefficients(Linear()).figure


def test_too_many_dimensions_and_no_coefficients():
    with pytest.raises(ValueError, match="expected one or two dimensions, got 3: use corner"):
        plotting.density(flow(3))
    with pytest.raises(TypeError, match="no scalar coefficients"):
        plotting.coefficients(LearnedInterpolant(event_dim=2, matrices=True))


def test_a_check_is_drawn_within_its_band():
    u = torch.rand(50, 2).sort(0).values
    check = CalibrationCheck(u, ("one", "two"), torch.zeros(2), 0.2, "")
    ax = plotting.ranks(check)
    x, y = ax.lines[0].get_xydata().T
    assert x.tolist() == u[:, 0].repeat_interleave(2).tolist()
    assert max(abs(y)) == pytest.approx(
        float((torch.arange(51) / 50 - torch.cat((u[:, 0], torch.ones(1)))).abs().max()), abs=0.021
    )
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["one", "two", "99%"]
    assert (ax.patches[0].get_y(), ax.patches[0].get_height()) == pytest.approx((-0.2, 0.4))
    small = plotting.ranks(check._replace(values=u.square())).lines[0].get_ydata()
    assert small.mean() > 0.1  # more of them lie below


def test_contours_enclose_their_shares():
    data = torch.randn(20_000, 2)
    axes = plotting.corner(data, data, levels=(0.5, 0.9))
    paths = axes[1][0].collections[0].get_paths()
    inside = sorted(float(path.contains_points(data.numpy()).mean()) for path in paths)
    assert inside == pytest.approx([0.5, 0.9], abs=0.03)


def test_corners_show_columns_where_they_are():
    """Nine tenths of the rows lie at (-1, 1), the others at (1, -1)."""
    place = torch.tensor([-1.0, 1.0]) * torch.where(torch.arange(500) % 10 > 0, 1.0, -1.0)[:, None]
    data = place + 0.1 * torch.randn(500, 2)
    axes = plotting.corner(data[:200], data, levels=(0.5,))
    contours, points, _ = axes[1][0].collections
    assert torch.equal(torch.as_tensor(np.array(points.get_offsets())), data)
    x, y = contours.get_paths()[0].vertices.mean(0)
    assert (x, y) == pytest.approx((-1.0, 1.0), abs=0.2)
    for patch in axes[0][0].patches:  # as high of few rows as of many
        heights, edges, _ = patch.get_data()
        assert (heights * np.diff(edges)).sum() == pytest.approx(1.0)


@pytest.mark.slow
def test_corner_of_named_draws_and_of_frames():
    pd = pytest.importorskip("pandas")
    sites = {"slope": ((2,), constraints.real), "noise": ((), constraints.positive)}
    joint = JointInterpolantDistribution(random_flow(3), sites=sites).freeze()
    axes = plotting.corner(joint, joint.sample_dict((200,)))
    assert axes[2][1].get_xlabel() == "slope[1]"
    assert axes[2][0].get_ylabel() == "noise"
    assert axes[2][2].get_xlim()[1] > 0
    frame = pd.DataFrame(torch.randn(100, 2).numpy(), columns=["mass", "radius"])
    axes = plotting.corner(torch.randn(100, 2), frame)
    assert (axes[1][0].get_xlabel(), axes[1][0].get_ylabel()) == ("mass", "radius")


def uniform_check(count=400, names=("a", "b"), band=0.08):
    u = (torch.arange(count) + 0.5) / count
    return CalibrationCheck(u[:, None].repeat(1, len(names)), names, torch.zeros(2), band, "")


@pytest.mark.parametrize("plot", [plotting.ranks, plotting.coverage_curve])
def test_the_legend_of_many_quantities_covers_no_curve_and_is_within_the_figure(plot):
    ax = plot(uniform_check(names=tuple(f"slope[{i}]" for i in range(27))))
    ax.figure.draw_without_rendering()
    legend = ax.get_legend().get_window_extent()
    assert legend.x0 >= ax.get_window_extent().x1
    figure = ax.figure.bbox
    assert 0 <= legend.y0 < legend.y1 <= figure.y1
    assert legend.x1 <= figure.x1


def test_a_histogram_of_ranks_is_flat_within_its_band():
    ax = plotting.rank_histogram(uniform_check(), bins=10)
    bars = [patch for patch in ax.patches if hasattr(patch, "get_data")]
    assert len(bars) == 2
    assert bars[0].get_data().values == pytest.approx([1.0] * 10)
    band = next(patch for patch in ax.patches if not hasattr(patch, "get_data"))
    low, high = band.get_y(), band.get_y() + band.get_height()
    found = torch.distributions.Binomial(400, torch.tensor(0.1)).sample((4000,)) / 40
    share = ((found > low) & (found < high)).double().mean()
    assert 0.98 <= float(share) <= 1.0
    assert high < 1.5
    shared = plotting.rank_histogram(uniform_check(band=0.16), bins=10).patches  # of few draws
    wider = next(patch for patch in shared if not hasattr(patch, "get_data")).get_height()
    assert wider == pytest.approx(2 * (high - low))


def test_a_coverage_curve_is_the_diagonal_where_regions_hold_their_share():
    check = uniform_check(names=("highest-density regions", "column 1"))
    ax = plotting.coverage_curve(check)
    for line in ax.lines[:2]:
        x, y = line.get_xydata().T
        assert abs(x - y).max() < 0.01
    edges = ax.collections[0].get_paths()[0].vertices
    assert abs(edges[:, 1] - edges[:, 0]).max() == pytest.approx(0.08)
    wide = check._replace(values=0.5 + 0.1 * (check.values - 0.5))
    regions, middle = plotting.coverage_curve(wide).lines[:2]
    x, y = middle.get_xydata().T
    assert x[-2] < 0.11  # intervals of a tenth hold all rows
    assert y[-2] == 1.0
    assert regions.get_xdata()[1:-1] == pytest.approx(wide.values[:, 0].numpy())


@pytest.mark.parametrize("scalars", [True, False])
def test_a_conditional_density_along_one_column_of_contexts(scalars):
    options = {"support": constraints.real, "event_shape": ()} if scalars else {}
    family = ConditionalInterpolantDistribution(random_flow(1, context_dim=2), **options).freeze()
    grid = torch.stack((torch.zeros(9), torch.linspace(-1, 1, 9)), 1)
    y, c = torch.randn(30, 1), torch.randn(30, 2)
    ax = plotting.conditional(family, grid, column=1, data=(y, c), levels=(0.5,), points=20)
    x, median = ax.lines[0].get_xydata().T
    assert x.tolist() == grid[:, 1].tolist()
    expected = family.condition(grid).icdf(torch.tensor(0.5)).reshape(-1)
    assert median == pytest.approx(expected.numpy())
    values = torch.linspace(*ax.get_ylim(), 20)[:, None].expand(-1, 9)
    heights = family.condition(grid).log_prob(values if scalars else values[..., None]).exp()
    shown = torch.as_tensor(ax.collections[0].get_array()).reshape(20, 9)
    torch.testing.assert_close(shown, heights, rtol=1e-4, atol=1e-6)
    assert len(ax.collections) == 2
    wide = ConditionalInterpolantDistribution(random_flow(2, context_dim=1))
    with pytest.raises(ValueError, match="expected outcomes in one dimension, got 2"):
        plotting.conditional(wide, torch.zeros(3, 1))


def test_contexts_in_any_order_are_drawn_along_their_axis():
    family = ConditionalInterpolantDistribution(random_flow(1, context_dim=1)).freeze()
    grid = torch.linspace(-1, 1, 9)[:, None]
    order = torch.tensor([4, 0, 8, 1, 7, 2, 6, 3, 5])
    pictures = [plotting.conditional(family, c, points=5) for c in (grid, grid[order])]
    lines, heights = zip(
        *((ax.lines[0].get_xydata(), ax.collections[0].get_array()) for ax in pictures),
        strict=True,
    )
    torch.testing.assert_close(*map(torch.as_tensor, lines))
    torch.testing.assert_close(*map(torch.as_tensor, heights), rtol=1e-4, atol=1e-6)


def test_data_are_drawn_beside_simulated_ones():
    y, simulated = torch.randn(4, 5), torch.randn(100, 4, 5)
    ax = plotting.predictive_check(y, simulated)
    drawn = torch.as_tensor(ax.lines[0].get_ydata())
    torch.testing.assert_close(drawn, y.flatten().sort().values)
    band, ordered = ax.collections[0].get_paths()[0].vertices[:, 1], simulated.flatten(1).sort(1)
    assert band.min() == pytest.approx(float(ordered.values.quantile(0.025, 0).min()))
    assert band.max() == pytest.approx(float(ordered.values.quantile(0.975, 0).max()))
    with pytest.raises(ValueError, match="expected simulated data of shape"):
        plotting.predictive_check(y, simulated[:, :3])


def test_images_stand_row_by_row_a_pixel_apart():
    levels = torch.arange(5 * 2 * 3, dtype=torch.uint8).reshape(5, 1, 2, 3) * 8
    ax = plotting.images(levels)
    shown = torch.as_tensor(ax.images[0].get_array())
    assert shown.shape == (2 * 3 - 1, 3 * 4 - 1)  # two rows of three
    torch.testing.assert_close(shown[3:, 4:7], levels[4, 0] / 255, check_dtype=False)
    assert (shown[2] == 1).all()
    assert (shown[3:, 8:] == 1).all()
    color = torch.rand(4, 3, 2, 2) * 1.5
    assert plotting.images(color, columns=4, ax=ax) is ax
    shown = torch.as_tensor(ax.images[1].get_array())
    assert shown.shape == (2, 11, 3)
    torch.testing.assert_close(shown[:, 3:5], color[1].clamp(max=1).permute(1, 2, 0))
    with pytest.raises(ValueError, match=r"shape \(N, 1, H, W\) or \(N, 3, H, W\), got \(2, 4, 4"):
        plotting.images(torch.rand(2, 4, 4, 4))


def shown_data_and_model(ax, i):
    """Means of the histograms of a column, of data and of the model."""
    for patch in ax[i][i].patches:
        heights, edges, _ = patch.get_data()
        yield float((heights * (edges[1:] + edges[:-1]) / 2).sum() / heights.sum())


def far_apart():
    """Two columns about 0 and 10: those of other names are 10 standard deviations away."""
    transform = interpolant_transform(2, (8,), solver=FixedGrid(2))
    transform.flow.whitening.set(torch.tensor([0.0, 10.0]), torch.eye(2))
    return transform


@pytest.mark.parametrize("swapped", [True, False])
@pytest.mark.parametrize("kind", ["joint", "draws", "frame", "distribution"])
def test_corner_compares_columns_of_the_same_names(kind, swapped):
    pd = pytest.importorskip("pandas")
    sites = {"a": ((), constraints.real), "b": ((), constraints.real)}
    joint = JointInterpolantDistribution(far_apart(), sites=sites).freeze()
    draws, order = joint.sample_dict((500,)), "ba" if swapped else "ab"
    data = {name: draws[name] for name in order}
    frame = pd.DataFrame({name: data[name].numpy() for name in order})
    alone = InterpolantDistribution(far_apart()).freeze()
    alone.columns = ("a", "b")
    samples = {"joint": joint, "draws": draws, "frame": draws, "distribution": alone}[kind]
    axes = plotting.corner(samples, frame if kind in ("frame", "distribution") else data)
    for i, name in enumerate(order):
        assert list(shown_data_and_model(axes, i)) == pytest.approx(
            [10.0 * (name == "b")] * 2, abs=0.5
        )
    assert axes[1][0].get_xlabel() == order[0]


def test_corner_refuses_other_columns():
    draws = {"a": torch.randn(30), "b": torch.randn(30)}
    with pytest.raises(
        ValueError, match=r"samples with the columns \['a', 'c'\].*got \['a', 'b'\]"
    ):
        plotting.corner(draws, {"a": draws["a"], "c": draws["b"]})
    with pytest.raises(ValueError, match="as many columns as the data, 2, got 3"):
        plotting.corner(torch.randn(30, 3), draws)
    with pytest.raises(
        ValueError, match="as many draws of every name in data, got {'a': 30, 'b':"
    ):
        plotting.corner(draws, {"a": draws["a"], "b": torch.randn(20)})


def test_contexts_of_data_are_taken_by_their_names():
    pd = pytest.importorskip("pandas")
    family = ConditionalInterpolantDistribution(random_flow(1, context_dim=2)).freeze()
    grid = pd.DataFrame({"size": torch.zeros(9).numpy(), "dose": torch.linspace(-1, 1, 9).numpy()})
    c = pd.DataFrame({"dose": torch.full((30,), 0.5).numpy(), "size": torch.zeros(30).numpy()})
    ax = plotting.conditional(
        family, grid, column=1, data=(torch.randn(30, 1), c), levels=(0.5,), points=9
    )
    assert set(ax.collections[1].get_offsets()[:, 0].tolist()) == {0.5}


def test_contexts_along_a_frame_are_those_of_training():
    """The column that varies is counted as in the frame."""
    pd = pytest.importorskip("pandas")
    family = ConditionalInterpolantDistribution(random_flow(1, context_dim=2)).freeze()
    family.context_columns = ("dose", "size")
    grid = torch.stack((torch.linspace(-1, 1, 9), torch.full((9,), 0.7)), 1)
    frame = pd.DataFrame(grid.numpy(), columns=family.context_columns)
    data = torch.randn(9, 1), frame
    options = {"data": data, "levels": (0.5,), "points": 9}
    for context, column in ((grid, 0), (frame, 0), (frame[["size", "dose"]], 1)):
        ax = plotting.conditional(family, context, column=column, **options)
        x, median = ax.lines[0].get_xydata().T
        assert x.tolist() == grid[:, 0].tolist()
        assert ax.collections[1].get_offsets()[:, 0].tolist() == grid[:, 0].tolist()
        expected = family.condition(grid).icdf(torch.tensor(0.5)).reshape(-1)
        assert median == pytest.approx(expected.numpy())
    swapped = plotting.conditional(family, grid, data=(data[0], frame[["size", "dose"]]), points=9)
    assert swapped.collections[1].get_offsets()[:, 0].tolist() == grid[:, 0].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("support", [constraints.positive, constraints.interval(-1.0, 2.0)])
def test_a_density_is_zero_where_values_cannot_be(support):
    """In the default box, which is wider than the samples; arrows are rates of the values."""
    distribution = flow(2, support=support)
    ax = plotting.density(distribution, extent=(-2, 3, -2, 3), points=30, velocity=True)
    axes = plotting.evolution(distribution, times=(0.0, 1.0))
    assert axes[1].get_xlim()[0] < 0
    heights = torch.as_tensor(ax.collections[0].get_array()).reshape(30, 30)
    line = torch.linspace(-2, 3, 30)
    inside = support.check(line)
    inside = inside[:, None] & inside
    assert (heights[~inside] == 0).all()
    assert (heights[inside] > 0).all()
    arrows = ax.collections[1]
    xy, v = (
        torch.as_tensor(arrows.XY),
        torch.stack([torch.as_tensor(a) for a in (arrows.U, arrows.V)], -1),
    )
    known = support.check(xy).all(-1)
    assert torch.equal(torch.as_tensor(arrows.Umask), ~known)
    transform, step = distribution.transform, 1e-5
    u = distribution.unconstrained(xy[known].float()).double()
    whitening = transform.flow.whitening
    w = whitening.to_white(u.to(whitening.loc))
    rate = whitening.push(transform.velocity(torch.tensor(1.0), w)).double()
    to_values = torch.distributions.biject_to(support)
    expected = (to_values(u + step * rate) - to_values(u - step * rate)) / (2 * step)
    torch.testing.assert_close(v[known].double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_densities_and_paths_of_events_of_any_shape(shape):
    scalars = flow(1, support=constraints.positive, event_shape=shape)
    x, y = torch.as_tensor(plotting.density(scalars).lines[0].get_xydata()).T
    assert float(torch.trapezoid(y, x)) == pytest.approx(1.0, abs=0.05)
    paths = plotting.trajectories(scalars, count=3, steps=4).lines
    assert [line.get_xydata().shape for line in paths] == [(5, 2)] * 3
    plane = flow(2, support=constraints.real_vector, event_shape=(2, *shape))
    assert len(plotting.density(plane, points=20, velocity=True).collections) == 2


def test_a_density_on_a_line_in_the_plane_is_refused():
    with pytest.raises(ValueError, match="got one on a line in it, Simplex"):
        plotting.density(flow(1, support=constraints.simplex))


def test_a_column_called_regions_is_a_column():
    check = uniform_check(names=("column 'regions'",))
    narrow = check._replace(values=0.5 + 0.1 * (check.values - 0.5))
    x, _ = plotting.coverage_curve(narrow).lines[0].get_xydata().T
    assert x[-2] < 0.11


def test_evolution_of_one_dimension_shows_every_time():
    distribution, times = flow(1), (0.0, 0.3, 1.0)
    axes = plotting.evolution(distribution, times=times)
    assert [len(one.lines) for one in axes] == [1, 1, 1]
    for one, t in zip(axes, times, strict=True):
        x, y = torch.as_tensor(one.lines[0].get_xydata()).T
        close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
        torch.testing.assert_close(y, distribution.at(t).log_prob(x[:, None]).exp(), **close)


@pytest.mark.parametrize("draw", [plotting.trajectories, plotting.density, plotting.evolution])
def test_batches_are_refused(draw):
    with pytest.raises(ValueError, match=r"expected one flow, got a batch of shape \(3,\)"):
        draw(flow(2).expand((3,)))


def test_flows_without_their_context_are_refused():
    g = ConditionalInterpolantDistribution(conditional_interpolant_transform(1, 2, (8,)))
    for draw in (plotting.trajectories, plotting.density, plotting.evolution):
        with pytest.raises(TypeError, match=r"gives it by \.condition\(context\)"):
            draw(g)
    with pytest.raises(TypeError, match=r"draw those of its condition\(context\)"):
        plotting.corner(g, torch.randn(9, 1))
    with pytest.raises(TypeError, match="expected a ConditionalInterpolantDistribution"):
        plotting.conditional(g.condition(torch.zeros(2)), torch.zeros(3, 2))


def test_paths_of_angles_end_at_the_seam_and_begin_on_its_other_side():
    velocity = TorusMLP(1, (8,))
    for weight in velocity.parameters():
        torch.nn.init.normal_(weight)
    transform = InterpolantTransform(velocity, interpolant=Geodesic())
    paths = InterpolantDistribution(transform, UniformTorus(1), support=circular)
    ax = plotting.trajectories(paths, count=30)
    heights = np.stack([line.get_ydata() for line in ax.lines])
    jumps = np.abs(np.diff(heights[:, ::2], axis=1)) > np.pi
    assert jumps.any()
    assert not np.isfinite(heights[:, 1::2][jumps]).any()
    assert np.isfinite(heights[:, 1::2][~jumps]).all()


def test_a_constant_column_has_a_panel():
    x = torch.cat((torch.randn(100, 1), torch.full((100, 1), 7.0)), -1)
    axes = plotting.corner(x, x)
    assert axes[1][1].get_xlim() == pytest.approx((5.95, 8.05))


def test_limits_of_more_rows_than_torch_sorts_for_quantiles():
    assert extent_of(np.zeros((2**24 + 2, 1))) == pytest.approx((-0.15, 0.15))


WRONG = {
    r"levels, each in \(0, 1\), got \(1.5,\)": lambda x: plotting.corner(x, x, levels=(1.5,)),
    r"2 names, one per column, got \['a'\]": lambda x: plotting.corner(x, x, names=["a"]),
    "count >= 1, a whole number, got 0": lambda x: plotting.corner(flow(2), x, count=0),
    "expected rows to draw, got none": lambda x: plotting.corner(x[:0], x),
    r"extent of 2 ascending pairs of bounds.*\(-1, 1\)": lambda _: plotting.density(
        flow(2), extent=(-1, 1)
    ),
    r"extent of 1 ascending pairs.* got \(1, -1\)": lambda _: plotting.density(
        flow(1), extent=(1, -1)
    ),
    "points >= 2, a whole number, got 1": lambda _: plotting.density(flow(1), points=1),
    "steps >= 1, a whole number, got 0": lambda _: plotting.trajectories(flow(1), steps=0),
    "columns >= 1, a whole number, got -1": lambda _: plotting.images(
        torch.rand(2, 1, 4, 4), columns=-1
    ),
    r"at least one time, got \(\)": lambda _: plotting.evolution(flow(2), ()),
    "as many axes as times": lambda _: plotting.evolution(flow(1), (0.5,), ax=[None, None]),
    r"2 x 2 axes in an array, got shape \(3, 3\)": lambda x: plotting.corner(
        x, x, ax=np.empty((3, 3))
    ),
    r"2 x 2 axes in an array, got shape \(\)": lambda x: plotting.corner(x, x, ax=object()),
    "as many axes as times, got <object": lambda _: plotting.evolution(
        flow(1), (0.5,), ax=object()
    ),
    "contexts that differ in column 0, got 0.5 alone": lambda _: plotting.conditional(
        family(), torch.tensor([[0.5, 0.0], [0.5, 1.0]])
    ),
    "contexts that differ in column 1, got 2 alone": lambda _: plotting.conditional(
        family(), torch.tensor([[0.5, 2.0]]), column=1
    ),
    r"data of shapes \(N, 1\) and \(N, 2\), .*4500": lambda _: plotting.conditional(
        family(), torch.rand(4, 2), data=(torch.zeros(4500), torch.rand(5000, 2))
    ),
    "numbers of data and simulations, got none": lambda x: plotting.predictive_check(x[0], x[:0]),
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_that_cannot_work_are_refused_before_anything_is_drawn(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message](torch.randn(10, 2))
    assert not plt.get_fignums()


def test_a_single_number_is_drawn_beside_simulated_ones():
    ax = plotting.predictive_check(torch.tensor(0.3), torch.randn(50))
    assert ax.lines[0].get_ydata().tolist() == [0.3]


def test_numbers_that_are_not_finite_are_refused():
    x, bad = torch.randn(50, 2), torch.randn(50, 2)
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        plotting.corner(x, bad)
    with pytest.raises(ValueError, match="NaN"):
        plotting.predictive_check(bad, torch.randn(9, 50, 2))


@pytest.mark.parametrize("marginals", [False, True])
def test_a_conditional_density_of_a_named_site_is_that_of_its_values(marginals):
    support, sites = constraints.real_vector, {"sd": ((), constraints.positive)}
    if marginals:
        knots = torch.linspace(-2, 2, 5)[None]
        spline = MarginalTransform(knots, 2 * knots, torch.full((1, 5), 2.0))
        support = Gaussianized(support, spline)
    family = ConditionalJointInterpolantDistribution(
        random_flow(1, context_dim=1), sites=sites, support=support
    ).freeze()
    grid = torch.linspace(-1, 1, 5)[:, None]
    draws = family.condition(grid[:2]).sample_dict((20,))["sd"][:, 0]
    options = {"data": ({"sd": draws}, torch.zeros(20, 1)), "levels": (0.5,), "points": 9}
    ax = plotting.conditional(family, grid, **options)
    expected = family.unpack(family.condition(grid).icdf(torch.tensor(0.5)))["sd"]
    assert ax.lines[0].get_ydata() == pytest.approx(expected.numpy())
    assert ax.get_ylim()[0] > 0
    assert ax.collections[1].get_offsets()[:, 1].tolist() == pytest.approx(draws.tolist())


def test_data_of_other_libraries_are_drawn_beside_simulated_ones():
    y, simulated = torch.randn(5), torch.randn(20, 5)
    ax = plotting.predictive_check(y.numpy(), simulated.numpy())
    drawn = torch.as_tensor(ax.lines[0].get_ydata())
    torch.testing.assert_close(drawn, y.sort().values)
    with pytest.raises(TypeError, match="expected simulated data to be a tensor or an array"):
        plotting.predictive_check(y, "words")


def test_whole_numbers_may_be_written_as_floats():
    plane, x = flow(2), torch.randn(50, 2)
    assert len(plotting.trajectories(plane, count=5.0, steps=3.0).lines) == 5
    assert len(plotting.density(plane, points=32.0, velocity=True).collections) == 2
    assert plotting.corner(plane, x, count=50.0).shape == (2, 2)
    ax = plotting.conditional(family(), torch.rand(4, 2), levels=(0.5,), points=9.0)
    assert len(ax.lines) == 1
    check = CalibrationCheck(torch.rand(50, 1), ("u",), torch.zeros(1), 0.2, "")
    assert len(plotting.rank_histogram(check, bins=8.0).patches) == 2


def test_outcomes_and_contexts_in_another_order_are_refused():
    pd = pytest.importorskip("pandas")
    y, context = pd.Series(np.zeros(3)), pd.DataFrame(np.random.randn(3, 2))
    with pytest.raises(ValueError, match="expected y and context with their rows in the same ord"):
        plotting.conditional(family(), torch.rand(4, 2), data=(y, context.iloc[::-1]))


def test_points_are_taken_from_all_over_and_keep_their_contexts():
    """Of more rows than are shown, which may come in an order."""
    c = torch.linspace(-1, 1, 9000)
    grid = torch.stack((torch.zeros(5), torch.linspace(-1, 1, 5)), 1)
    data = 2 * c, torch.stack((torch.zeros(9000), c), 1)
    pictures = [
        plotting.conditional(family(), grid, column=column, data=data, points=5)
        for column in (1, -1)
    ]
    pictures.append(plotting.corner(torch.stack((c, 2 * c), 1), torch.stack((c, 2 * c), 1))[1][0])
    for ax in pictures:
        x, y = ax.collections[1].get_offsets().T
        assert len(x) == 4000
        assert (x.min(), x.max()) == pytest.approx((-1.0, 1.0), abs=1e-3)
        assert y.tolist() == pytest.approx((2 * x).tolist())


def test_quantiles_far_out_are_within_the_picture():
    ax = plotting.conditional(family(), torch.rand(4, 2), levels=(0.001, 0.999), points=5)
    low, high = ax.get_ylim()
    assert all(low <= y <= high for line in ax.lines for y in line.get_ydata())


def test_paths_of_angles_are_at_their_times():
    """Of a velocity of one radian per unit of time, on nodes that are no even steps."""

    class Turning(torch.nn.Module):
        event_dim = 1

        def forward(self, t, x, context=None):
            return torch.ones_like(x)

    transform = InterpolantTransform(Turning(), interpolant=Geodesic())
    turning = InterpolantDistribution(transform, UniformTorus(1), support=circular)
    for line in plotting.trajectories(turning, count=20, steps=8).lines:
        time, angle = line.get_xydata().T
        seen = np.isfinite(angle)
        turned = (angle[seen] - angle[0] + 1e-6) % (2 * np.pi)
        assert turned == pytest.approx(time[seen], abs=1e-5)


@pytest.mark.parametrize("support", [constraints.unit_interval, constraints.nonnegative])
def test_arrows_in_a_box_that_ends_on_the_edge_of_a_support(support):
    distribution = flow(2, support=support)
    ax = plotting.density(distribution, extent=(0, 1, 0, 1), points=16, velocity=True)
    arrows = ax.collections[1]
    x, v = torch.as_tensor(arrows.XY), torch.as_tensor(np.stack((arrows.U, arrows.V), -1))
    inside = ((x > 0) & (x < 1)).all(-1)
    transform, to_values = distribution.transform, torch.distributions.biject_to(support)
    whitening = transform.flow.whitening
    w = whitening.to_white(to_values.inv(x[inside]))
    rate = whitening.push(transform.velocity(torch.tensor(1.0), w))
    _, expected = torch.func.jvp(to_values, (to_values.inv(x[inside]),), (rate,))
    torch.testing.assert_close(v[inside], expected)


def test_whole_levels_of_a_wider_type_are_not_cut_to_white():
    levels = torch.arange(12, dtype=torch.uint8).reshape(1, 1, 3, 4) * 20
    with pytest.raises(ValueError, match=r"whole levels as uint8, .* got torch\.int64 up to 220"):
        plotting.images(levels.long())
    masks = plotting.images(levels > 100), plotting.images((levels > 100).long())
    shown = [torch.as_tensor(ax.images[0].get_array()) for ax in masks]
    assert torch.equal(*shown)
