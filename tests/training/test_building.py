"""What from_samples builds from the data: scalars, frames, contexts, labels, networks, paths."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from cases import OwnVelocity
from pyro.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_interpolant import (
    InterpolantDistribution,
    JointInterpolantDistribution,
    Linear,
    Trigonometric,
    VelocityMLP,
    circular,
    from_samples,
    load,
    optimal_transport,
    save,
)
from pyro_interpolant.distributions import ConditionalJointInterpolantDistribution
from pyro_interpolant.training import building, fitting

pytestmark = [
    pytest.mark.usefixtures("_small_runs"),
    # Few steps, on purpose: what is built is looked at, not how good it is.
    pytest.mark.filterwarnings("ignore:the fit came out wrong"),
]


def learn(x, **options):
    settings = {"steps": 3, "seed": 0, "progress": False, "marginals": False, "tolerance": 0.1}
    return from_samples(x, **{**settings, **options})


def close(a, b, **tolerance):
    torch.testing.assert_close(a, b, **{"rtol": 1e-10, "atol": 1e-10, **tolerance})


@pytest.mark.parametrize("support", [constraints.real_vector, constraints.positive], ids=str)
def test_scalars_are_the_flat_flow_without_its_dimension(support, tmp_path):
    scalars = torch.randn(300) if support is constraints.real_vector else torch.randn(300).exp()
    d, flat = learn(scalars, support=support), learn(scalars[:, None], support=support)
    assert d.event_shape == ()
    assert d.sample((5, 2)).shape == (5, 2)
    close(d.log_prob(scalars), flat.log_prob(scalars[:, None]))
    close(d.score(scalars), flat.score(scalars[:, None])[:, 0])
    save(d, tmp_path / "scalars.safetensors")
    close(load(tmp_path / "scalars.safetensors").log_prob(scalars), d.log_prob(scalars))
    edge = torch.tensor([1.0, math.inf, math.nan], dtype=scalars.dtype)
    lenient = InterpolantDistribution(d.transform, support=d.constraint, validate_args=False)
    close(lenient.log_prob(edge)[:1], d.log_prob(edge[:1]))
    assert lenient.log_prob(edge)[1] == -math.inf
    assert lenient.log_prob(edge)[2].isnan()


def test_a_network_that_is_given_is_copied():
    network = VelocityMLP(2, (8,))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    x, y = torch.randn(300, 2), torch.randn(300, 2).exp()
    first = learn(x, network=network)
    density = first.log_prob(x)
    learn(y, network=network)
    first.transform.clear_cache()
    assert torch.equal(first.log_prob(x), density)
    assert torch.equal(learn(x, network=network).log_prob(x), density)
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])
        assert all(p.requires_grad for p in network.parameters())


def test_classes_without_rows_are_told_of():
    age = torch.randint(18, 25, (300,))
    with pytest.warns(UserWarning, match="18 of the 25 classes 0 to 24 have no row"):
        learn(torch.randn(300, 2), context=age)


@pytest.mark.slow
def test_frames_and_arrays_are_tables_and_columns_keep_their_names(tmp_path):
    rows = torch.randn(300, 2)
    frame = pd.DataFrame(rows.numpy(), columns=["mass", "age"])
    found = learn(frame)  # with the default network: of the same seed the same weights
    expected = learn(rows).log_prob(rows)
    close(found.log_prob(rows), expected)
    close(learn(rows.numpy()).log_prob(rows), expected)
    save(found, tmp_path / "frame.safetensors")
    assert load(tmp_path / "frame.safetensors").columns == found.columns == ("mass", "age")
    assert learn(frame["age"], weights=frame["mass"].abs()).event_shape == ()
    named = learn({"a": frame["mass"], "b": torch.randn(300, 2).numpy()})
    assert named.sample_dict((4,))["b"].shape == (4, 2)


def test_a_wrong_column_is_named_by_the_frame():
    """Three values a billion away flatten all others."""
    frame = pd.DataFrame(torch.randn(1000, 2).numpy(), columns=["mass", "age"])
    frame.loc[:20, "age"] += 1e9
    with pytest.warns(UserWarning, match="the fit came out wrong: column 'age' of draws"):
        learn(frame)


@pytest.mark.usefixtures("_learned")
@pytest.mark.slow
def test_named_draws_given_a_context(tmp_path):
    x = torch.randn(400, 1)
    draws = {"loc": x[:, 0] + 0.1 * torch.randn(400), "scale": torch.rand(400)}
    d = learn(draws, context=x, support={"scale": constraints.unit_interval}, steps=60)
    assert isinstance(d, ConditionalJointInterpolantDistribution)
    given = d.condition(torch.tensor([[-1.0], [1.0]]))
    assert isinstance(given, JointInterpolantDistribution)
    assert given.batch_shape == (2,)
    found = given.sample_dict((300,))
    assert found["loc"].shape == found["scale"].shape == (300, 2)
    assert ((found["scale"] > 0) & (found["scale"] < 1)).all()
    assert found["loc"][:, 0].mean() < found["loc"][:, 1].mean()
    assert "scale: () on Interval" in repr(d)
    packed = d.pack(draws)
    save(d, tmp_path / "named.safetensors")
    again = load(tmp_path / "named.safetensors")
    close(again.condition(x).log_prob(packed), d.condition(x).log_prob(packed))
    assert again.report == d.report


@pytest.mark.slow
@pytest.mark.usefixtures("_learned")
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("real", torch.uint8), ("circular", torch.long)],
)
def test_whole_numbers_are_labels_of_classes(kind, dtype, tmp_path):
    labels = torch.arange(600) % 3
    y = torch.stack((labels - 1.0, 1.0 - labels), -1) + 0.2 * torch.randn(600, 2)
    support = circular if kind == "circular" else constraints.real_vector
    d = learn(y.clamp(-3, 3), context=labels.to(dtype), support=support, steps=60)
    assert d.transform.velocity.classes == 3
    means = d.condition(torch.tensor([0, 2], dtype=dtype)).sample((300,)).mean(0)
    close(means, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]), rtol=0, atol=0.3)
    as_numbers = d.condition(torch.tensor([[0.0], [2.0]])).log_prob(y[:2])
    close(as_numbers, d.condition(torch.tensor([0, 2])).log_prob(y[:2]))
    save(d, tmp_path / "labels.safetensors")
    again = load(tmp_path / "labels.safetensors").condition(labels[:5])
    close(again.log_prob(y[:5]), d.condition(labels[:5]).log_prob(y[:5]))
    for wrong in (torch.tensor([3]), torch.tensor([-1]), torch.tensor([[0.5]])):
        with pytest.raises(ValueError, match="expected labels from 0 to 2, got"):
            d.condition(wrong)
    with pytest.raises(ValueError, match=r"expected labels of 3 classes .* of shape \(2, 4\)"):
        d.condition(torch.zeros(2, 4))


@pytest.mark.slow
def test_classes_are_independent_densities_under_vmap_and_gradients():
    labels = torch.arange(400) % 2
    d = learn(torch.randn(400, 2) + labels[:, None], context=labels, steps=20)
    y = torch.randn(6, 2)
    given = torch.arange(6) % 2
    expected = d.condition(given).log_prob(y)
    close(torch.func.vmap(lambda c, x: d.condition(c).log_prob(x))(given, y), expected)
    close(
        torch.stack([d.condition(c).log_prob(x) for c, x in zip(given, y, strict=True)]), expected
    )


@pytest.mark.parametrize("has_classes", [True, False])
def test_a_network_of_ones_own_sees_labels_or_where_it_has_no_classes_their_columns(
    has_classes, capsys
):
    network = VelocityMLP(2, (8,), classes=5) if has_classes else OwnVelocity(2, 3).double()
    options = {"context": torch.arange(300) % 3, "network": network, "progress": True}
    d = learn(torch.randn(300, 2), **options)
    given = torch.tensor([4, 0]) if has_classes else torch.eye(3)[:2]
    assert d.condition(given).sample().shape == (2, 2)
    told = "3 classes are one-hot for a network without" in capsys.readouterr().err
    assert told is not has_classes


@pytest.mark.slow
def test_lists_and_frames_with_types_of_pandas_own():
    x = torch.randn(60).tolist()
    assert learn(x).event_shape == ()
    frame = pd.DataFrame({"a": x, "b": range(60)}).convert_dtypes()
    assert learn(frame).columns == ("a", "b")
    mixed = pd.DataFrame({"age": x, "kind": ["a", "b"] * 30})
    dummies = learn(x, context=pd.get_dummies(mixed, dtype=float))
    assert dummies.context_columns == ("age", "kind_a", "kind_b")
    weights = np.arange(60) > 0
    gaps = pd.DataFrame({"kind": pd.Series(np.arange(60) % 3, dtype="Int64").where(weights)})
    d = learn(torch.randn(60, 2), context=gaps, weights=weights)
    assert (d.transform.flow.classes, d.context_columns) == (3, ("kind",))


@pytest.mark.slow
def test_batches_of_scalars_are_said_to_be_and_labels_of_a_loader_go_to_classes():
    x, rows, labels = torch.randn(120), torch.randn(40, 3), torch.arange(40) % 3
    found = learn(list(x.split(40)), event_shape=())
    assert found.event_shape == ()
    again = learn(DataLoader(x, batch_size=40))  # whose items are batches
    assert (again.event_shape, str(again.support)) == ((), str(found.support))
    loader = DataLoader(TensorDataset(rows, labels), batch_size=20)
    assert learn(loader, network=VelocityMLP(3, (8,), classes=3)).transform.flow.classes == 3


def test_the_path_is_straight_beside_optimal_transport():
    x = torch.randn(200, 2)
    assert learn(x, coupling=optimal_transport).transform.interpolant == Linear()
    assert learn(x).transform.interpolant == Trigonometric()


def test_labels_of_other_types_and_of_no_class():
    d = learn(torch.randn(200, 2), context=torch.arange(200) % 2 > 0)
    y, labels = torch.randn(2, 2), torch.tensor([0, 1])
    expected = d.condition(labels).log_prob(y)
    for same in (labels.bool(), labels.to(torch.uint16)):
        close(d.condition(same).log_prob(y), expected)
    found = torch.func.vmap(lambda c, x: d.condition(c).log_prob(x))(torch.tensor([1, 7]), y)
    assert found.isnan().tolist() == [False, True]


LINE = torch.linspace(-1, 1, 40).reshape(20, 2)
LABELS = torch.arange(20)
SITE, POSITIVE = {"a": LINE[:, 0]}, {"a": constraints.positive}
HOLE = pd.DataFrame({"a": LINE[:, 0]}).where(pd.DataFrame({"a": range(20)}) != 7)
MISSING = pd.Series(np.arange(20) % 3, dtype="Int64").where(np.arange(20) != 7)
KINDS = pd.DataFrame({"age": range(20), "kind": ["a", "b"] * 10})
REFUSED = {
    "integers": (LINE.long(), {}, TypeError, "floating type"),
    "a column of text": (KINDS, {}, TypeError, "columns of numbers, got types.*kind"),
    "a column of whole numbers": (KINDS[["age"]], {}, TypeError, r'\.astype\("float32"\)'),
    "a hole": (HOLE, {}, ValueError, "in 1 of 20 rows, the first being row 7"),
    "a name for a support": (LINE, {"support": "positive"}, TypeError, "a constraint such as"),
    "supports of a table": (LINE, {"support": {"a": constraints.real}}, TypeError, "got a dict"),
    "no such site": (SITE, {"support": {"b": constraints.real}}, ValueError, r"\['b'\]"),
    "off a support": (SITE, {"support": POSITIVE}, ValueError, "site 'a'.*strictly"),
    "unequal draws": (SITE | {"b": LINE[:9]}, {}, ValueError, "as many draws of every"),
    "draws by chain": ({"a": LINE.T, "b": LINE.T}, {}, ValueError, "group_by_chain=False"),
    "contexts without columns": (LINE, {"context": LINE[:, 0]}, ValueError, r"of shape \(N, D\)"),
    "few contexts": (LINE, {"context": LINE[1:]}, ValueError, "contexts as rows, 20, got 19"),
    "many labels": (LINE, {"context": torch.arange(60) % 3}, ValueError, "as rows, 20, got 60"),
    "infinite contexts": (LINE, {"context": LINE / 0}, ValueError, "finite context"),
    "labels below zero": (LINE, {"context": -LABELS}, ValueError, "labels 0, 1, ..., got -19"),
    "numbers for labels": (LINE, {"context": LABELS + 10**12}, ValueError, "fewer classes than"),
    "missing labels": (LINE, {"context": MISSING}, ValueError, "1 of 20 rows, .* being row 7"),
    "kinds as contexts": (LINE, {"context": KINDS}, TypeError, r"get_dummies\(frame, dtype=float"),
    "contexts of batches": ([LINE], {"context": LINE}, ValueError, "beside a table of rows"),
    "a dataset": (TensorDataset(LINE), {}, ValueError, "which gives single rows: wrap it, DataL"),
    "a list of rows": (list(LINE), {}, ValueError, r"a list of items of shape \(2,\): stack rows"),
    "columns": (tuple(LINE.T), {}, ValueError, r"a tuple of items .* or columns, torch\.stack"),
    "labels as weights": ([(LINE, LABELS)], {}, TypeError, "in batch 0, .* weights .* labels"),
    "a generator": ((part for part in [LINE]), {}, ValueError, "used up after once"),
    "no batches": (DataLoader([], batch_size=2), {}, ValueError, "an iterable without any"),
    "a class of networks": (LINE, {"network": torch.nn.Linear}, TypeError, "an instance of torch"),
    "another option": (LINE, {"stepz": 3}, TypeError, "expected options of fit, got stepz"),
    "steps": (LINE, {"steps": -1}, ValueError, "steps >= 1, a whole number, got -1"),
    "no folder": (LINE, {"checkpoint": "/nowhere/at/all"}, ValueError, "a folder that is there"),
    "a word for a flag": (LINE, {"marginals": "off"}, ValueError, "True or False, got 'off'"),
    "a map of angles": (LINE, {"support": circular, "marginals": True}, ValueError, "beside a t"),
    "a map of batches": ([LINE], {"marginals": True}, ValueError, "marginals=True beside a table"),
    "a number for a shape": ([LINE], {"event_shape": 2}, TypeError, r"got 2: write \(2,\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_a_map_is_chosen(name, monkeypatch):
    def chosen(*args, **options):
        raise AssertionError("a map was chosen")

    monkeypatch.setattr(building, "preferred_support", chosen)
    x, options, kind, message = REFUSED[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        learn(x, **{"marginals": None, **options})


SOME = (torch.arange(600) >= 60) & (torch.arange(600) < 100)


@pytest.mark.parametrize("given", [{}, {"validation": SOME}])
def test_rows_held_out_do_not_set_the_map(given, monkeypatch):
    """Knots that are rows know these: by 0.2 nats a row, of 3,000 rows in 20 dimensions."""
    seen, choose, density = {}, building.preferred_support, fitting.HeldOutDensity

    def chosen(rows, *args, **options):
        seen["map"] = rows
        return choose(rows, *args, **options)

    def held_out(distribution, split):
        seen["held"] = split.held
        return density(distribution, split)

    monkeypatch.setattr(building, "preferred_support", chosen)
    monkeypatch.setattr(fitting, "HeldOutDensity", held_out)
    x = torch.randn(500, 2).exp() ** 3  # behind splines, by default
    x = torch.cat((x, x[:100]))  # with copies, which stay together
    weights = x[:, 0].clone()
    weights[5] = 0.0
    options = {"context": x.sum(1, keepdim=True), "weights": weights, "marginals": True}
    found = learn(x, **options, **given)
    held, used = seen["held"], seen["map"]
    rows = found.from_flow(held.w)[0]
    assert len(rows) + len(used) == len(x) - 1
    if given:  # the copies are the user's affair
        close(rows, x[SOME], rtol=1e-6, atol=0.0)
    else:
        assert 40 <= len(rows) <= 60
        assert float(torch.cdist(rows, used).min()) > 1e-5
    close(held.context, rows.sum(1, keepdim=True), atol=1e-6)
    close(held.weight, rows[:, 0], atol=1e-6)
