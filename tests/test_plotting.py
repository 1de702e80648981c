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
    UniformTorus,
    circular,
    interpolant_transform,
    plotting,
)
from pyro_interpolant.diagnostics import CalibrationCheck

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
    whole = flow(dim, base=base)
    paths = [line.get_xydata() for line in plotting.trajectories(whole, count=7, steps=9).lines]
    assert [len(path) for path in paths] == [10] * 7
    start = paths[0][0]
    assert start[-1] == pytest.approx(9.0, abs=0.1)
    assert start[0] == pytest.approx(0.0 if dim == 1 else 9.0, abs=0.1)
    if dim < 5:  # one that stops at the base has points of it
        for line in plotting.trajectories(whole.at(0), count=6, steps=1).lines:
            point = [[0.0 if dim == 1 else 9.0, 9.0]]
            np.testing.assert_allclose(line.get_xydata(), point, atol=0.1)
    positive = plotting.trajectories(flow(dim, support=constraints.positive), count=5, steps=4)
    assert all((line.get_ydata() > 0).all() for line in positive.lines)


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
    drawn = plotting.conditional(family, context, levels=(0.5,), points=9)
    assert len(set(drawn.collections[0].get_coordinates()[:, 0, 1].tolist())) == 9


def test_coefficients_that_are_there():
    for interpolant in (Linear(), Latent(), LearnedInterpolant(3)):
        lines = plotting.coefficients(interpolant).lines
        assert len(lines) == 2 + isinstance(interpolant, Latent)
        ends = [line.get_ydata()[[0, -1]] for line in lines]
        np.testing.assert_allclose(ends, [[1, 0], [0, 1], [0, 0]][: len(lines)], atol=1e-6)


def test_a_check_is_drawn_within_its_band():
    u = torch.rand(50, 2).sort(0).values
    check = CalibrationCheck(u, ("one", "two"), torch.zeros(2), 0.2, "")
    ax = plotting.ranks(check)
    x, y = ax.lines[0].get_xydata().T
    assert x.tolist() == u[:, 0].repeat_interleave(2).tolist()
    apart = torch.arange(51) / 50 - torch.cat((u[:, 0], torch.ones(1)))
    assert max(abs(y)) == pytest.approx(float(apart.abs().max()), abs=0.021)
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


def uniform_check(count=400, names=("a", "b"), band=0.08):
    u = (torch.arange(count) + 0.5) / count
    return CalibrationCheck(u[:, None].repeat(1, len(names)), names, torch.zeros(2), band, "")


def test_a_histogram_of_ranks_is_flat_within_its_band():
    ax = plotting.rank_histogram(uniform_check(), bins=10)
    bars = [patch for patch in ax.patches if hasattr(patch, "get_data")]
    assert len(bars) == 2
    assert bars[0].get_data().values == pytest.approx([1.0] * 10)
    band = next(patch for patch in ax.patches if not hasattr(patch, "get_data"))
    low, high = band.get_y(), band.get_y() + band.get_height()
    counts = torch.arange(401.0)
    chance = torch.distributions.Binomial(400, torch.tensor(0.1)).log_prob(counts).exp()
    share = chance[(counts / 40 > low) & (counts / 40 < high)].sum()
    assert 0.98 <= float(share) < 0.9999
    assert high < 1.5


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
    order = torch.tensor([4, 0, 8, 1, 7, 2, 6, 3, 5])  # drawn along the axis in any order
    mixed = plotting.conditional(family, grid[order], column=1, levels=(0.5,), points=20)
    np.testing.assert_allclose(mixed.lines[0].get_xydata(), np.stack((x, median), 1), atol=1e-9)


def test_data_are_drawn_beside_simulated_ones():
    y, simulated = torch.randn(4, 5), torch.randn(100, 4, 5)
    ax = plotting.predictive_check(y, simulated)
    drawn = torch.as_tensor(ax.lines[0].get_ydata())
    torch.testing.assert_close(drawn, y.flatten().sort().values)
    band, ordered = ax.collections[0].get_paths()[0].vertices[:, 1], simulated.flatten(1).sort(1)
    assert band.min() == pytest.approx(float(ordered.values.quantile(0.025, 0).min()))
    assert band.max() == pytest.approx(float(ordered.values.quantile(0.975, 0).max()))


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
    masks = plotting.images(levels > 100), plotting.images((levels > 100).long())
    assert torch.equal(*(torch.as_tensor(ax.images[0].get_array()) for ax in masks))


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


@pytest.mark.parametrize(
    ("kind", "swapped"),
    [("joint", True), ("draws", False), ("draws", True), ("frame", True), ("distribution", True)],
)
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
def test_a_density_is_zero_where_values_cannot_be():
    """Arrows are rates of the values."""
    support = constraints.interval(-1.0, 2.0)
    distribution = flow(2, support=support)
    ax = plotting.density(distribution, extent=(-2, 3, -2, 3), points=30, velocity=True)
    heights = torch.as_tensor(ax.collections[0].get_array()).reshape(30, 30)
    line = torch.linspace(-2, 3, 30)
    inside = support.check(line)
    inside = inside[:, None] & inside
    assert (heights[~inside] == 0).all()
    assert (heights[inside] > 0).all()
    arrows = ax.collections[1]
    xy, v = (torch.as_tensor(a) for a in (arrows.XY, np.stack((arrows.U, arrows.V), -1)))
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


def frame_of(x, *names):
    return {name: x[:, i] for i, name in enumerate(names)}


WRONG = {
    r"levels, each in \(0, 1\), got \(1.5,\)": lambda x: plotting.corner(x, x, levels=(1.5,)),
    "NaN": lambda x: plotting.corner(x, x / 0 - x / 0),
    "as many columns as the data, 2, got 3": lambda x: plotting.corner(torch.randn(30, 3), x),
    r"samples with the columns \['a', 'c'\].*got \['a', 'b'\]": lambda x: plotting.corner(
        frame_of(x, "a", "b"), frame_of(x, "a", "c")
    ),
    "expected one or two dimensions, got 3: use corner": lambda _: plotting.density(flow(3)),
    r"expected one flow, got a batch": lambda _: plotting.density(flow(2).expand((3,))),
    "contexts that differ in column 0, got 0.5 alone": lambda _: plotting.conditional(
        family(), torch.tensor([[0.5, 0.0], [0.5, 1.0]])
    ),
    "expected simulated data of shape": lambda x: plotting.predictive_check(x, x[None, :3]),
    r"whole levels as uint8, .* got torch\.int64": lambda _: plotting.images(
        torch.full((1, 1, 3, 4), 220)
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_settings_that_cannot_work_are_refused_before_anything_is_drawn(message):
    with pytest.raises(ValueError, match=message):
        WRONG[message](torch.randn(10, 2))
    assert not plt.get_fignums()


def test_flows_without_their_context_are_refused():
    for draw in (plotting.trajectories, plotting.density, plotting.evolution):
        with pytest.raises(TypeError, match=r"gives it by \.condition\(context\)"):
            draw(family())


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


def test_paths_of_angles_are_at_their_times():
    """Of a velocity of one radian per unit of time, on nodes that are no even steps.

    Those that come to the seam end there, and begin on its other side.
    """

    class Turning(torch.nn.Module):
        event_dim = 1

        def forward(self, t, x, context=None):
            return torch.ones_like(x)

    transform = InterpolantTransform(Turning(), interpolant=Geodesic())
    turning = InterpolantDistribution(transform, UniformTorus(1), support=circular)
    crossed = 0
    for line in plotting.trajectories(turning, count=20, steps=8).lines:
        time, angle = line.get_xydata().T
        seen = np.isfinite(angle)
        turned = (angle[seen] - angle[0] + 1e-6) % (2 * np.pi)
        assert turned == pytest.approx(time[seen], abs=1e-5)
        jumps = np.abs(np.diff(angle[::2])) > np.pi
        assert (~np.isfinite(angle[1::2]) == jumps).all()
        crossed += jumps.sum()
    assert crossed
