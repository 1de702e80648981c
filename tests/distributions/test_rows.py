"""Rows as they are given: one table of what is read as which numbers, one of what is refused."""

import numpy as np
import pytest
import torch
from arrays import ArrowTable, MaskedByAstropy, PolarsFrame, PolarsSeries, Quantity

from pyro_interpolant import from_samples
from pyro_interpolant.distributions.rounding import are_close
from pyro_interpolant.distributions.rows import as_tensor, names_of

DAYS = np.arange("2020-01-01", "2020-01-04", dtype="M8[D]")


@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_masked_numbers_are_missing_ones(dtype):
    values = np.arange(6).reshape(3, 2).astype(dtype)
    for masked in (np.ma.masked_array, MaskedByAstropy):
        whole = masked(values, mask=np.zeros((3, 2), bool))
        assert torch.equal(as_tensor(whole), torch.as_tensor(values))
        some = masked(values, mask=np.array([[0, 0], [0, 1], [0, 0]], bool))
        found = as_tensor(some)
        assert found.isnan().tolist() == some.mask.tolist()
        assert found[0].tolist() == [0.0, 1.0]
        with pytest.raises(
            ValueError, match="got NaN or infinite values in 1 of 3 rows, .* row 1"
        ):
            from_samples(some, progress=False)
        assert some.data.tobytes() == values.tobytes()


def test_what_is_read_as_numbers():
    x = torch.randn(3, 2)
    columns = {"a": x[:, 0].numpy(), "b": x[:, 1].numpy()}
    for given in (PolarsFrame(**columns), ArrowTable(**columns), Quantity(x.numpy(), "")):
        assert torch.equal(as_tensor(given), x)
    assert names_of(ArrowTable(**columns)) == ("a", "b")
    assert torch.equal(as_tensor(PolarsSeries(columns["a"])), x[:, 0])
    with torch.device("meta"):  # tensors stay where they are whatever the default device
        assert as_tensor(x) is x


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: x.to_sparse(), r"as a dense tensor.*sparse_coo: pass x\.to_dense\(\)"),
        (lambda x: Quantity(x.numpy(), "pc"), r"in pc: pass x\.to_value"),
        (
            lambda x: PolarsFrame(a=x[:, 0].numpy(), day=DAYS),
            r"columns of numbers, got types \[Float64, Date\]: leave",
        ),
        (lambda x: np.ma.masked_array(DAYS, mask=[0, 1, 0]), "expected data"),
    ],
    ids=["sparse", "unit", "dates", "masked dates"],
)
def test_what_is_no_table_of_numbers_is_refused(make, message):
    with pytest.raises(TypeError, match=message):
        as_tensor(make(torch.randn(3, 2)))


@pytest.mark.parametrize("unit", [1e-30, 1e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_are_compared_in_any_unit(unit, dtype):
    x = unit * torch.tensor([0.0, 1e-3, 1.0], dtype=dtype)
    rounding = 4 * torch.finfo(dtype).eps * unit
    assert are_close(x, x + rounding)
    assert not are_close(x, 1.01 * x)
    assert not are_close(x, x + unit * torch.tensor([0.0, 1e-5, 0.0], dtype=dtype))
    special = torch.tensor([torch.nan, torch.inf, 1.0])
    assert are_close(special, special.clone())
    assert not are_close(special, special * torch.tensor([1.0, -1.0, 1.0]))
