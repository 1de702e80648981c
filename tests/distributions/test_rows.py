import numpy as np
import pytest
import torch
from arrays import ArrowTable, MaskedByAstropy, PolarsFrame, PolarsSeries, Quantity

from pyro_interpolant import from_samples
from pyro_interpolant.distributions.rounding import are_close
from pyro_interpolant.distributions.rows import (
    as_tensor,
    checked_context,
    checked_rows,
    images_of,
    names_of,
)


@pytest.mark.parametrize("masked", [np.ma.masked_array, MaskedByAstropy])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_masked_numbers_are_missing_ones(dtype, masked):
    values = np.arange(6).reshape(3, 2).astype(dtype)
    whole = masked(values, mask=np.zeros((3, 2), bool))
    assert torch.equal(as_tensor(whole), torch.as_tensor(values))
    some = masked(values, mask=np.array([[0, 0], [0, 1], [0, 0]], bool))
    found = as_tensor(some)
    assert found.isnan().tolist() == some.mask.tolist()
    assert found[0].tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="got NaN or infinite values in 1 of 3 rows, .* row 1"):
        checked_rows(some, "data")
    images = some[:, None, None]
    with pytest.raises(ValueError, match="finite images, got NaN"):
        images_of(images, (1, 1, 2))
    with pytest.raises(ValueError, match="finite context, got NaN"):
        checked_context(some[:, 1:], None, 9)
    assert some.data.tobytes() == values.tobytes()


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_masked_numbers_of_torch_are_missing_ones(dtype):
    x = (10 * torch.randn(3, 2)).to(dtype)
    assert torch.equal(as_tensor(torch.masked.masked_tensor(x, x == x)), x)
    there = torch.tensor([[True, True], [True, False], [True, True]])
    found = as_tensor(torch.masked.masked_tensor(x, there))
    assert torch.equal(found.isnan(), ~there)
    assert torch.equal(found[there], x[there].to(found))


def test_tensors_stay_where_they_are_whatever_the_default_device():
    x = torch.ones(3)
    with torch.device("meta"):
        assert as_tensor(x) is x
        assert as_tensor([1.0]).is_meta


@pytest.mark.parametrize("mask", [[0, 0, 0], [0, 1, 0]])
def test_masked_dates_are_no_numbers(mask):
    days = np.arange("2020-01-01", "2020-01-04", dtype="M8[D]")
    with pytest.raises(TypeError, match="expected data"):
        as_tensor(np.ma.masked_array(days, mask=np.array(mask, bool)))


@pytest.mark.parametrize("names", [None, 2, np.array(["a", "b"]), list])
def test_what_else_is_called_column_names_names_no_columns(names):
    x = ArrowTable(a=np.zeros(3), b=np.ones(3))
    assert names_of(x) == ("a", "b")
    x.column_names = names
    assert names_of(x) == ()


def test_columns_of_dates_beside_numbers_are_no_numbers():
    x, days = np.random.randn(4, 2), np.arange("2020-01-01", "2020-01-05", dtype="M8[D]")
    assert torch.equal(as_tensor(PolarsFrame(a=x[:, 0], b=x[:, 1])), torch.tensor(x))
    assert torch.equal(as_tensor(PolarsSeries(x[:, 0])), torch.tensor(x[:, 0]))
    with pytest.raises(TypeError, match=r"columns of numbers, got types \[Float64, Date\]: leave"):
        as_tensor(PolarsFrame(a=x[:, 0], day=days))
    with pytest.raises(TypeError, match="columns of numbers, got types Date: leave"):
        as_tensor(PolarsSeries(days))


def test_numbers_with_a_unit_are_refused():
    x = np.random.randn(3, 2)
    with pytest.raises(TypeError, match=r"without a unit, got a Quantity in pc: pass x\.to_value"):
        as_tensor(Quantity(x, "pc"))
    for unit in ("", None):
        assert torch.equal(as_tensor(Quantity(x, unit)), torch.tensor(x))


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.to_sparse(), r"layout torch\.sparse_coo: pass x\.to_dense\(\)"),
        (lambda x: x.to_sparse_csr(), r"layout torch\.sparse_csr: pass x\.to_dense\(\)"),
        (lambda x: torch.nested.nested_tensor(list(x)), "got a nested one: pass rows of one size"),
    ],
    ids=["coo", "csr", "nested"],
)
def test_tensors_that_are_not_dense_are_refused(make, message):
    x = make(torch.randn(3, 2))
    with pytest.raises(TypeError, match=f"expected data as a dense tensor, .*{message}"):
        as_tensor(x)
    with pytest.raises(TypeError, match=f"expected x as a dense tensor, .*{message}"):
        from_samples(x, progress=False)


def test_weights_are_advised_where_there_are_any():
    with pytest.raises(ValueError, match="or give them weight 0 where there are weights"):
        checked_rows(torch.full((2, 2), torch.nan), "data")


@pytest.mark.parametrize("unit", [1e-30, 1e-9, 1.0, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_compared_in_any_unit(unit, dtype):
    x = unit * torch.tensor([0.0, 1e-3, 1.0], dtype=dtype)
    rounding = 4 * torch.finfo(dtype).eps * unit
    assert are_close(x, x + rounding)
    assert are_close(x, x * (1 + 1e-6))
    assert not are_close(x, 1.01 * x)
    assert not are_close(x, x + unit * torch.tensor([0.0, 1e-5, 0.0], dtype=dtype))


def test_values_of_any_kind_are_compared():
    special = torch.tensor([torch.nan, torch.inf, 1.0])
    assert are_close(special, special.clone())
    assert not are_close(special, special * torch.tensor([1.0, -1.0, 1.0]))
    assert are_close(torch.zeros(0), torch.zeros(0))
    assert are_close(torch.arange(3), torch.arange(3))
    assert not are_close(torch.arange(3), torch.tensor([0, 1, 3]))
    assert not are_close(torch.tensor([True, False]), torch.tensor([True, True]))


def test_contexts_beyond_the_range_of_a_flows_type_are_refused():
    """Else they are infinite for it, and torch's own assertions fail."""
    x, context = torch.randn(60, 1, dtype=torch.float32), torch.randn(60, 1, dtype=torch.float64)
    context[3] = 1e39
    with pytest.raises(
        ValueError, match="context within the range of the flow's type torch.float32"
    ):
        from_samples(x, context=context, steps=1, progress=False)
