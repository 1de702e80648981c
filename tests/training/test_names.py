"""Columns of data frames are taken by their names, in whatever order they come."""

import copy
import pickle

import pandas as pd
import pytest
import torch
from cases import random_flow
from pyro.distributions import constraints

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
    JointInterpolantDistribution,
    Latent,
    Linear,
    VelocityMLP,
    conditional_interpolant_transform,
    fit,
    from_noisy_samples,
    from_samples,
    interpolant_loss,
    interpolant_transform,
    load,
    save,
)
from pyro_interpolant.diagnostics import pit
from pyro_interpolant.distributions.report import Report
from pyro_interpolant.distributions.rows import check_same_order
from pyro_interpolant.infer import object_posteriors
from pyro_interpolant.training.data import Table
from pyro_interpolant.training.distributed import Process
from pyro_interpolant.training.preparation import start_from
from pyro_interpolant.training.streaming import Stream

pytestmark = [
    pytest.mark.usefixtures("_few_held_draws"),
    # Few steps, on purpose: what is learned does not matter.
    pytest.mark.filterwarnings("ignore:the fit came out wrong"),
]

QUICK = {"steps": 3, "seed": 0, "progress": False, "tolerance": 10.0}
SITES = {
    "mu": ((), constraints.real),
    "w": ((2,), constraints.real),
    "sigma": ((), constraints.positive),
}


def frame_of(**columns):
    return pd.DataFrame({name: value.numpy() for name, value in columns.items()})


def two_columns(count=200):
    """Columns of other locations and scales, and the same frame with them swapped."""
    frame = frame_of(a=torch.randn(count), b=30 + 5 * torch.randn(count))
    return frame, frame[["b", "a"]]


def latent_flow():
    transform = interpolant_transform(2, (8,), interpolant=Latent(Linear()))
    return InterpolantDistribution(transform)


def joint_and_draws():
    joint = JointInterpolantDistribution(interpolant_transform(4, (8,)), sites=SITES)
    draws = {"mu": torch.randn(50), "w": torch.randn(50, 2), "sigma": torch.randn(50).exp()}
    w = draws["w"]
    columns = {"sigma": draws["sigma"], "w[1]": w[:, 1], "mu": draws["mu"], "w[0]": w[:, 0]}
    return joint, draws, columns


def test_a_frame_of_named_sites_is_on_their_supports():
    joint, draws, columns = joint_and_draws()
    frame = frame_of(**columns)
    expected = Table(joint, draws, None).rows.w
    assert torch.equal(Table(joint, frame, None).rows.w, expected)
    for data in (draws, frame):
        assert torch.equal(Table(joint, data, frame[:5]).rows.w[-5:], expected[:5])
    assert torch.equal(Stream(joint, [frame], frame[:5]).given.w, expected[:5])
    assert torch.equal(Stream(joint, [frame], 0.1).rows(frame, 0).w, expected)
    absent = frame_of(**{**columns, "sigma": draws["sigma"].clone().index_fill(0, SOME, -1.0)})
    mask = torch.ones(50).index_fill(0, SOME, 0.0)
    assert torch.equal(Table(joint, absent, None, weights=mask).rows.w, expected[mask > 0])
    with pytest.raises(ValueError, match=r"expected data with the columns \['mu', 'w\[0\]'"):
        Table(joint, pd.DataFrame(joint.pack(draws).numpy()), None)
    with pytest.raises(ValueError, match="expected validation with the columns"):
        Table(joint, draws, frame.rename(columns={"mu": "m"}))


SOME = torch.tensor([0, 7])


@pytest.mark.slow
def test_a_map_that_is_kept_keeps_its_columns():
    frame, swapped = two_columns()
    d = latent_flow()
    fit(d, frame, **QUICK)
    for kept in ({"whiten": False}, {"learn": "noise"}):
        losses = []
        for data in (frame, swapped):
            again = copy.deepcopy(d)
            losses.append(fit(again, data, **kept, **QUICK).validation_losses)
            assert again.columns == ("a", "b")
        assert losses[0] == losses[1]
        with pytest.raises(ValueError, match=r"expected data with the columns \['a', 'b'\]"):
            fit(d, frame.rename(columns={"a": "z"}), **kept, **QUICK)
    fit(d, swapped.rename(columns={"a": "z"}), **QUICK)
    assert d.columns == ("b", "z")


@pytest.mark.parametrize("anew", [False, True])
def test_names_of_an_earlier_run_stay_with_its_map_alone(anew):
    y, contexts, _ = of_contexts()
    d = ConditionalInterpolantDistribution(conditional_interpolant_transform(1, 2, (8,)))
    d.columns, d.context_columns = ("y",), ("a", "b")
    given = y[:, None], torch.tensor(contexts.to_numpy())
    for report in (None, Report(1, 200.0, 1.0, 3, 3)):
        d.report = report
        names = (("y",), ("a", "b")) if report is None or not anew else ((), ())
        assert Table(d, given[0], None, context=given[1], anew=anew).names[:2] == names
        stream = Stream(d, [given], 0.1, anew=anew)
        stream.rows(given, 0)
        assert stream.names[:2] == names


def test_a_new_map_leaves_columns_on_their_supports():
    """And where a base that is given has them; arrays have those of the frames beside them."""
    _, contexts, swapped = of_contexts()
    frame = frame_of(share=torch.rand(200), rate=2 + torch.rand(200))
    other = frame[["rate", "share"]]
    support = constraints.stack([constraints.unit_interval, constraints.positive], dim=-1)
    d = ConditionalInterpolantDistribution(conditional_of_two(), support=support)
    d.columns, d.context_columns = ("share", "rate"), ("a", "b")
    d.report = Report(2, 200.0, 1.0, 3, 3)
    expected = Table(d, frame, None, context=contexts).rows
    table = Table(d, other, (other[:9].to_numpy(), swapped[:9].to_numpy()), context=swapped)
    assert table.names[:2] == (d.columns, d.context_columns)
    for found, wanted in zip(table.rows[:2], expected[:2], strict=True):
        assert torch.equal(found, torch.cat((wanted, wanted[:9])))
    stream = Stream(d, [(other, swapped)], (other, swapped))
    assert torch.equal(stream.given.w, expected.w)
    assert torch.equal(stream.given.context, expected.context)
    assert stream.names == table.names


def test_frames_at_the_base_go_by_the_names_of_the_data():
    frame, swapped = two_columns()
    rows, mask = torch.tensor(frame.to_numpy()), torch.ones(200).index_fill(0, SOME, 0.0)
    table = Table(latent_flow(), frame, None, pairs=swapped, weights=mask)
    assert torch.equal(table.rows.partner, rows[mask > 0])
    d = latent_flow()
    d.columns = ("a", "b")  # of an earlier run; an array has its columns where the data have them
    of_array = Table(d, swapped, None, pairs=rows.flip(1), anew=False)
    assert torch.equal(of_array.rows.partner, of_array.rows.w)
    d = latent_flow()
    start_from(d, swapped, table.split(Process(), None), table, Process())
    assert torch.equal(d.base.rows, rows)
    with pytest.raises(ValueError, match=r"expected base_samples with the columns \['a', 'b'\]"):
        fit(d, frame, base_samples=frame.rename(columns={"a": "z"}), **QUICK)


def of_contexts():
    """Outcomes, a frame of contexts, and the same with its columns swapped."""
    contexts, swapped = two_columns()
    return torch.randn(200) + torch.tensor(contexts["a"].to_numpy()), contexts, swapped


def test_contexts_of_a_frame_keep_their_names(tmp_path):
    y, contexts, swapped = of_contexts()
    found, network = [], VelocityMLP(1, (8,), 2)
    for held in (contexts, swapped):
        options = {"network": copy.deepcopy(network), "validation": (y[:50], held[:50]), **QUICK}
        found.append(from_samples(y, context=contexts, **options))
    assert found[0].report.held_out == found[1].report.held_out
    d = found[0]
    save(d, tmp_path / "contexts.safetensors")
    copies = copy.deepcopy(d), pickle.loads(pickle.dumps(d)), d.without_support()
    for other in (d, load(tmp_path / "contexts.safetensors"), *copies):
        assert other.context_columns == ("a", "b")
    assert torch.equal(pit(d, y, swapped).values, pit(d, y, contexts).values)
    with pytest.raises(ValueError, match=r"context with the columns \['a', 'b'\].*got \['b', 'z"):
        pit(d, y, swapped.rename(columns={"a": "z"}))


def test_densities_and_contexts_take_the_columns_of_frames_by_name():
    rows, contexts = torch.randn(6, 2).float(), torch.randn(6, 3).float()
    d = InterpolantDistribution(random_flow(2).float())
    family = ConditionalInterpolantDistribution(random_flow(2, context_dim=3).float())
    d.columns = family.columns = ("a", "b")
    family.context_columns = ("u", "v", "w")
    frame = pd.DataFrame(rows.double().numpy(), columns=["a", "b"])[["b", "a"]]
    given = pd.DataFrame(contexts.numpy(), columns=["u", "v", "w"])[["w", "u", "v"]]
    assert torch.equal(d.log_prob(frame), d.log_prob(rows))
    assert torch.equal(d.score(frame), d.score(rows))
    by_name, by_place = family.condition(given), family.condition(contexts)
    assert torch.equal(by_name.log_prob(frame), by_place.log_prob(rows))
    t, x0 = torch.rand(6).float(), torch.randn(6, 2).float()
    found = [
        interpolant_loss(family, x, context=c, t=t, x0=x0)
        for x, c in ((frame, given), (rows, contexts))
    ]
    assert torch.equal(*found)
    with pytest.raises(ValueError, match=r"expected value with the columns \['a', 'b'\]"):
        d.log_prob(frame.rename(columns={"a": "c"}))
    with pytest.raises(ValueError, match=r"expected context with the columns"):
        family.condition(given.rename(columns={"u": "c"}))


def test_a_row_of_a_frame_is_taken_by_its_index():
    d = InterpolantDistribution(random_flow(2))
    d.columns = ("a", "b")
    frame = pd.DataFrame({"b": [1.0, 2.0], "a": [-1.0, 0.5]})
    expected = d.log_prob(torch.tensor([-1.0, 1.0], dtype=d.transform.flow.loc.dtype))
    assert torch.equal(d.log_prob(frame.iloc[0]), expected)
    assert torch.equal(d.log_prob(frame[["a", "b"]].iloc[0]), expected)
    by_place = pd.Series([-1.0, 1.0])  # its index holds no names
    assert torch.equal(d.log_prob(by_place), expected)
    with pytest.raises(ValueError, match=r"columns \['a', 'b'\], .* got \['a', 'c'\]"):
        d.log_prob(pd.Series({"a": -1.0, "c": 1.0}))


def conditional_of_two():
    return conditional_interpolant_transform(2, 2, (8,))


IN_ANOTHER_ORDER = {
    "contexts": lambda x, y: from_samples(x, context=y, **QUICK),
    "weights": lambda x, y: from_samples(x, weights=y["a"].abs(), **QUICK),
    "mask": lambda x, y: from_samples(x, validation=y["a"] > 0, **QUICK),
    "draws": lambda x, y: from_samples({"a": x["a"], "b": y["b"]}, **QUICK),
    "batch": lambda x, y: fit(
        ConditionalInterpolantDistribution(conditional_of_two()), [(x, y)], **QUICK
    ),
    "held out": lambda x, y: fit(
        ConditionalInterpolantDistribution(conditional_of_two()),
        x.to_numpy(),
        context=x.to_numpy(),
        validation=(x, y),
        **QUICK,
    ),
    "pit": lambda x, y: pit(ConditionalInterpolantDistribution(conditional_of_two()), x, y),
    "noise": lambda x, y: from_noisy_samples(x, y.abs(), steps=3, progress=False),
    "objects": lambda x, y: object_posteriors(
        ConditionalInterpolantDistribution(conditional_of_two()), x, x.abs(), context=y
    ),
}


@pytest.mark.parametrize("call", IN_ANOTHER_ORDER.values(), ids=IN_ANOTHER_ORDER)
def test_rows_with_the_same_labels_in_another_order_are_refused(call):
    frame, _ = two_columns()
    with pytest.raises(ValueError, match=r"same labels in another.*\.loc\[.*\.index\]"):
        call(frame, frame.sample(frac=1, random_state=0))


def test_rows_of_other_labels_go_by_position():
    frame, _ = two_columns()
    drawn = frame.sample(frac=1, random_state=0)
    others = [frame.copy(), drawn.reset_index(drop=True), frame.set_index(frame.index + 1)]
    others += [drawn.set_index(drawn.index // 2), drawn[:100], drawn.to_numpy(), None]
    for other in others:
        check_same_order(x=frame, context=other)
    levels = pd.MultiIndex.from_arrays([range(200), range(200)])
    check_same_order(x=frame.set_index(levels), context=frame)
    with pytest.raises(ValueError, match=r"expected x and draws\['b'\] with their rows"):
        check_same_order(x=frame.set_index(levels), draws={"b": frame["b"].set_axis(levels[::-1])})
