"""What from_samples builds from the data: scalars, frames, contexts, labels, networks, paths."""

import math
import os

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from arrays import PolarsSeries
from cases import OwnVelocity
from pyro.distributions import constraints
from pyro.infer import MCMC, NUTS, Predictive
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    FixedGrid,
    InterpolantDistribution,
    JointInterpolantDistribution,
    Linear,
    Trigonometric,
    VelocityMLP,
    base_space,
    circular,
    from_samples,
    load,
    optimal_transport,
    save,
)
from pyro_interpolant.distributions import ConditionalJointInterpolantDistribution
from pyro_interpolant.nn.velocity import copied
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


@pytest.mark.parametrize(
    ("support", "scalars"),
    [(constraints.real_vector, torch.randn(300)), (constraints.positive, torch.randn(300).exp())],
    ids=["real", "positive"],
)
def test_scalars_are_the_flat_flow_without_its_dimension(support, scalars, tmp_path):
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


@pytest.mark.filterwarnings("ignore:calibrating the solver failed")  # for want of a copy, too
def test_a_network_that_cannot_be_copied_is_trained_itself():
    network = VelocityMLP(2, (8,))
    network.kept = network.layers[0].weight * 2  # which is not a leaf
    with pytest.warns(UserWarning, match="cannot be copied .* another call with it changes"):
        d = learn(torch.randn(300, 2), network=network)
    assert d.transform.velocity is network


def test_a_class_in_place_of_a_network_raises():
    with pytest.raises(TypeError, match="an instance of torch.nn.Module.* got <class .*Linear'>"):
        learn(torch.randn(300, 2), network=torch.nn.Linear)


def test_classes_without_rows_are_told_of():
    age = torch.randint(18, 25, (300,))
    with pytest.warns(UserWarning, match="18 of the 25 classes 0 to 24 have no row"):
        learn(torch.randn(300, 2), context=age)


def test_a_copy_of_a_compiled_network_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    network = VelocityMLP(2, (8,))
    network._compiled_call_impl = network.layers[0]._compiled_call_impl = network._call_impl
    new = copied(network)
    assert compiled == [new, new.layers[0]]


@pytest.mark.slow
def test_a_scalar_prior_in_a_plate_under_nuts():
    prior = learn(2 + torch.randn(2000), steps=20, network=VelocityMLP(1, (8,)))
    prior.transform.solver = FixedGrid(steps=2)  # moments of N(2, 1) do not hang on it

    def model(y):
        with pyro.plate("rows", len(y)):
            x = pyro.sample("x", prior)
            assert x.shape[-1:] == y.shape
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    y = torch.tensor([0.0, 4.0])
    mcmc = MCMC(NUTS(base_space(model)), num_samples=60, warmup_steps=40, disable_progbar=True)
    mcmc.run(y)
    draws = Predictive(base_space(model), mcmc.get_samples(), return_sites=("x",))(y)["x"]
    assert draws.shape == (60, 2)
    close(draws.mean(0), torch.tensor([1.0, 3.0]), rtol=0, atol=0.5)  # sd 0.7 / sqrt(60)


@pytest.mark.slow
def test_frames_and_arrays_are_tables_and_columns_keep_their_names(tmp_path):
    rows = torch.randn(300, 2)
    frame = pd.DataFrame(rows.numpy(), columns=["mass", "age"])
    found = learn(frame)  # with the default network: of the same seed the same weights
    expected = learn(rows).log_prob(rows)
    close(found.log_prob(rows), expected)
    close(learn(rows.numpy()).log_prob(rows), expected)
    assert learn(frame, weights=frame["mass"].abs()).log_prob(rows).isfinite().all()
    assert found.columns == ("mass", "age")
    save(found, tmp_path / "frame.safetensors")
    assert load(tmp_path / "frame.safetensors").columns == ("mass", "age")
    series = learn(frame["age"])
    assert series.event_shape == ()
    assert series.log_prob(rows[:, 1]).isfinite().all()
    named = learn({"a": frame["mass"], "b": torch.randn(300, 2).numpy()})
    assert named.sample_dict((4,))["b"].shape == (4, 2)


def test_a_frame_with_a_column_of_text_is_refused_by_the_types_it_has():
    frame = pd.DataFrame({"mass": [1.0, 2.0], "name": ["a", "b"]})
    with pytest.raises(TypeError, match=r"expected x of columns of numbers, got types[\s\S]*name"):
        learn(frame)


def test_frames_of_whole_numbers_and_of_categories_are_told_what_pandas_has():
    x = torch.randn(20)
    frame = pd.DataFrame({"age": range(20), "is_old": [False, True] * 10, "kind": ["a", "b"] * 10})
    with pytest.raises(TypeError, match=r'\.astype\("float32"\)'):
        learn(frame[["age"]])
    for context in (frame, frame[["kind", "age"]]):
        with pytest.raises(TypeError, match=r"pandas\.get_dummies\(frame, dtype=float\)"):
            learn(x, context=context)
    with pytest.raises(ValueError, match=r'\.astype\("float32"\).*one_hot.*get_dummies'):
        learn(x, context=frame[["age", "is_old"]])
    mixed = learn(x, context=pd.get_dummies(frame, dtype=float))
    assert mixed.context_columns == ("age", "is_old", "kind_a", "kind_b")


def test_a_wrong_column_is_named_by_the_frame():
    """Three values a billion away flatten all others."""
    frame = pd.DataFrame(torch.randn(1000, 2).numpy(), columns=["mass", "age"])
    frame.loc[:20, "age"] += 1e9
    with pytest.warns(UserWarning, match="the fit came out wrong: column 'age' of draws"):
        learn(frame)


@pytest.mark.slow
@pytest.mark.usefixtures("_learned")
@pytest.mark.parametrize("context", [torch.randn(400, 3), np.random.randn(400, 3).astype("f4")])
def test_a_context_makes_a_frozen_conditional_density(context):
    y = torch.as_tensor(context)[:, :2].double() + 0.1 * torch.randn(400, 2)
    d = learn(y, context=context, steps=60)
    assert isinstance(d, ConditionalInterpolantDistribution)
    assert d.transform.velocity.context_dim == 3
    assert not any(p.requires_grad for p in d.transform.parameters())
    given = torch.zeros(5, 3)
    given[:, 0] = torch.linspace(-1, 1, 5)
    means = d.condition(given).sample((200,)).mean(0)
    assert (means[:, 0].diff() > 0).all()
    assert d.report.held_out > d.report.reference - 0.5


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
    [("real", torch.uint8), ("real", torch.long), ("circular", torch.long)],
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
    close(load(tmp_path / "labels.safetensors").condition(labels[:5]).log_prob(y[:5]),
          d.condition(labels[:5]).log_prob(y[:5]))  # fmt: skip
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


def test_a_network_of_ones_own_without_classes_sees_labels_one_hot():
    labels = torch.arange(300) % 3
    d = learn(torch.randn(300, 2), context=labels, network=OwnVelocity(2, 3).double())
    assert d.condition(torch.eye(3)).sample().shape == (3, 2)


def test_what_a_network_sees_of_labels_is_said(capsys):
    options = {"context": torch.arange(300) % 3, "network": OwnVelocity(2, 3).double()}
    learn(torch.randn(300, 2), progress=True, **options)
    assert "3 classes are one-hot for a network without" in capsys.readouterr().err


@pytest.mark.slow
def test_lists_and_frames_with_types_of_pandas_own():
    x = torch.randn(50).tolist()
    assert learn(x).event_shape == ()
    frame = pd.DataFrame({"a": x, "b": range(50)}).convert_dtypes()
    assert learn(frame).columns == ("a", "b")
    labels = pd.Series([0, 1] * 25, dtype="Int64")
    assert learn(x, context=labels).transform.flow.classes == 2
    frame.loc[3, "a"] = pd.NA
    with pytest.raises(ValueError, match="in 1 of 50 rows, the first being row 3"):
        learn(frame)


def test_labels_with_gaps_in_a_frame_are_labels_without_the_rows_of_no_weight():
    weights = np.arange(60) > 0
    frame = pd.DataFrame({"kind": pd.Series(np.arange(60) % 3, dtype="Int64").where(weights)})
    d = learn(torch.randn(60, 2), context=frame, weights=weights)
    assert (d.transform.flow.classes, d.context_columns) == (3, ("kind",))


def test_draws_by_chain_are_told_to_be_flattened():
    with pytest.raises(ValueError, match="draws by chain.*group_by_chain=False"):
        learn({"t": torch.randn(4, 50), "u": torch.randn(4, 50, 2)})


def test_a_context_of_a_shorter_type_is_one_of_the_flow():
    d = learn(torch.randn(40), context=torch.randn(40, 2).half())
    c = torch.randn(3, 2).half()
    x = torch.randn(3)
    assert torch.equal(d.condition(c).log_prob(x), d.condition(c.double()).log_prob(x))
    d.transform.float()
    with pytest.raises(ValueError, match="convert the context"):
        d.condition(c.double())


def test_a_network_of_ones_own_with_classes_sees_labels():
    network = VelocityMLP(2, (8, 8), classes=5)
    d = learn(torch.randn(300, 2), context=torch.arange(300) % 3, network=network)
    assert isinstance(d.transform.velocity, VelocityMLP)
    assert d.transform.velocity.hidden_dims == (8, 8)
    assert d.condition(torch.tensor([4, 0])).sample().shape == (2, 2)


@pytest.mark.parametrize(
    ("context", "error", "match"),
    [
        (torch.arange(40).reshape(20, 2), ValueError, r"as one label a row.*\(20, 2\)"),
        (-torch.arange(20), ValueError, "labels 0, 1, ..., got -19"),
        (torch.randn(20), ValueError, r"context of shape \(N, D\), got \(20,\)"),
        (torch.randn(19, 2), ValueError, "as many contexts as rows, 20, got 19"),
        (torch.full((20, 1), math.nan), ValueError, "finite context"),
        (torch.full((20,), 10**12), ValueError, "fewer classes than rows"),
        (torch.ones(20, 1, dtype=torch.complex64), ValueError, "one label a row"),
        (torch.zeros(0, dtype=torch.long), ValueError, r"one label a row.*\(0,\)"),
        ("labels", TypeError, "context to be a tensor or an array, got str"),
    ],
)
def test_contexts_that_cannot_work_are_refused(context, error, match):
    with pytest.raises(error, match=match):
        learn(torch.randn(20, 2), context=context)


@pytest.mark.parametrize("context", [torch.randn(1, 1), torch.arange(500) % 3])
def test_other_contexts_than_rows_are_refused_before_a_map_is_chosen(context):
    with pytest.raises(ValueError, match=f"contexts as rows, 400, got {len(context)}"):
        learn(torch.randn(400, 2), context=context, marginals=None)


def test_contexts_beside_an_iterable_are_refused():
    with pytest.raises(ValueError, match="contexts beside a table of rows"):
        learn([torch.randn(50, 2)], context=torch.randn(50, 1))


class OfRows(IterableDataset):
    def __iter__(self):
        return iter(torch.randn(40, 3))


ROWS = torch.randn(40, 3)
SINGLE = {
    "dataset": (TensorDataset(ROWS), "a TensorDataset, which gives single rows: wrap it, DataL"),
    "labelled": (TensorDataset(ROWS, torch.arange(40)), "a TensorDataset, which gives single"),
    "images": (TensorDataset(torch.randn(9, 3, 4, 4)), "a TensorDataset, which gives single"),
    "iterable": (OfRows(), r"a OfRows of items of shape \(3,\)"),
    "list": (list(ROWS), r"a list of items of shape \(3,\): stack rows into a table"),
    "series": ([PolarsSeries(np.ones(9))] * 2, r"a list of items of shape \(9,\): stack rows"),
    "arrays": (list(ROWS.numpy()), r"a list of items of shape \(3,\)"),
    "pairs": ([(row, 1.0) for row in ROWS], r"a list of items of shape \(3,\)"),
    "columns": (tuple(ROWS.T), r"a tuple of items of shape \(40,\): .*or columns, torch.stack"),
}


@pytest.mark.parametrize("name", SINGLE)
def test_single_rows_are_no_batches_of_scalars(name):
    x, message = SINGLE[name]
    with pytest.raises(ValueError, match=f"expected batches of rows, .*got {message}"):
        learn(x)


@pytest.mark.slow
def test_batches_of_scalars_are_said_to_be():
    x = torch.randn(120)
    found = learn(list(x.split(40)), event_shape=())
    assert found.event_shape == ()
    again = learn(DataLoader(x, batch_size=40))  # whose items are batches
    assert (again.event_shape, str(again.support)) == ((), str(found.support))
    assert learn(DataLoader(TensorDataset(ROWS), batch_size=20)).event_shape == (3,)


def test_labels_from_a_loader_are_no_weights():
    loader = DataLoader(TensorDataset(ROWS, torch.arange(40) % 3), batch_size=20)
    with pytest.raises(TypeError, match="in batch 0, .* weights .* got torch.int64: .* labels"):
        learn(loader)
    assert learn(loader, network=VelocityMLP(3, (8,), classes=3)).transform.flow.classes == 3


def test_classes_and_a_context_dim_are_one_or_the_other():
    with pytest.raises(ValueError, match="expected context_dim or classes, got both: 2 and 3"):
        VelocityMLP(2, None, 2, 3)


def test_the_path_is_straight_beside_optimal_transport():
    x = torch.randn(200, 2)
    assert learn(x, coupling=optimal_transport).transform.interpolant == Linear()
    assert learn(x).transform.interpolant == Trigonometric()


def test_labels_of_other_types_and_of_no_class():
    yes = torch.arange(200) % 2 > 0
    d = learn(torch.randn(200, 2), context=yes)
    y = torch.randn(2, 2)
    expected = d.condition(torch.tensor([0, 1])).log_prob(y)
    close(d.condition(torch.tensor([False, True])).log_prob(y), expected)
    close(d.condition(torch.tensor([0, 1], dtype=torch.uint16)).log_prob(y), expected)
    found = torch.func.vmap(lambda c, x: d.condition(c).log_prob(x))(torch.tensor([1, 7]), y)
    assert found[0].isfinite()
    assert found[1].isnan()
    many = ConditionalInterpolantDistribution(
        ConditionalInterpolantTransform(VelocityMLP(2, (8,), classes=400))
    ).to(torch.bfloat16)
    with pytest.raises(ValueError, match="type that has 400 whole numbers, got torch.bfloat16"):
        many.condition(torch.tensor([257]))


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


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"steps": -1}, ValueError, "steps >= 1, a whole number, got -1"),
        ({"batch_size": 0}, ValueError, "batch_size >= 1, a whole number, got 0"),
        ({"flip": "off"}, ValueError, "flip to be True or False, got 'off'"),
        ({"checkpoint": "/nowhere/at/all"}, ValueError, "in a folder that is there"),
        ({"checkpoint": os.devnull}, ValueError, "expected a checkpoint, a file .* got /dev/null"),
        ({"stepz": 3}, TypeError, "expected options of fit, got stepz"),
        ({"data": 3}, TypeError, "expected options of fit, got data"),
        ({"event_shape": 2}, TypeError, r"event_shape, a tuple of whole numbers, got 2"),
    ],
)
def test_options_are_refused_before_a_map_is_chosen(options, kind, message, monkeypatch):
    def chosen(*args, **options):
        raise AssertionError("a map was chosen")

    monkeypatch.setattr(building, "preferred_support", chosen)
    with pytest.raises(kind, match=message):
        learn(torch.randn(50, 2), **{"marginals": None, **options})


def test_the_shape_of_batches_rows_is_a_tuple():
    with pytest.raises(
        TypeError, match=r"event_shape, a tuple of whole numbers, got 2: write \(2,\)"
    ):
        learn([torch.randn(50, 2)], event_shape=2)


@pytest.mark.parametrize("name", ["marginals", "whiten", "flip"])
def test_a_word_is_neither_true_nor_false(name):
    with pytest.raises(ValueError, match=f"expected {name} to be .*True or False, got 'off'"):
        learn(torch.randn(50, 2), **{name: "off"})
