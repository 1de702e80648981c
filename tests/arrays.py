"""Arrays and frames as other libraries have them, as far as rows are read from them."""

from typing import Any

import numpy as np


class PolarsType:
    """The type of a column of polars."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name

    def is_temporal(self) -> bool:
        return self.name == "Date"


class PolarsFrame:
    """A data frame of polars, whose dates are numbers where there are numbers beside them."""

    def __init__(self, **columns: Any) -> None:
        self.series = {name: np.asarray(values) for name, values in columns.items()}
        self.columns = list(columns)
        self.shape = len(next(iter(self.series.values()))), len(columns)

    @property
    def dtypes(self) -> list[PolarsType]:
        names = {"f": "Float64", "i": "Int64", "M": "Date"}
        return [PolarsType(names[values.dtype.kind]) for values in self.series.values()]

    def to_numpy(self) -> Any:
        parts = list(self.series.values())
        dtype = float if any(part.dtype.kind == "f" for part in parts) else parts[0].dtype
        return np.stack([part.astype(dtype) for part in parts], -1)

    def __getitem__(self, rows: Any) -> "PolarsFrame":
        return PolarsFrame(**{name: values[rows] for name, values in self.series.items()})


class PolarsSeries:
    """A column of polars."""

    def __init__(self, values: Any) -> None:
        self.values = np.asarray(values)
        self.dtype, self.shape = PolarsFrame(x=values).dtypes[0], self.values.shape

    def to_numpy(self) -> Any:
        return self.values


class MaskedByAstropy(np.ndarray):
    """An array with a mask, as a ``Masked`` of astropy: elsewhere what is behind it counts."""

    def __new__(cls, values: Any, mask: Any) -> "MaskedByAstropy":
        array = np.array(values).view(cls)
        array.mask = np.array(mask)
        return array

    def __getitem__(self, index: Any) -> Any:
        return MaskedByAstropy(np.asarray(self)[index], self.mask[index])


class ArrowTable:
    """A table of pyarrow: its ``columns`` are their values, and it has no rows by index."""

    def __init__(self, **columns: Any) -> None:
        self.series = {name: np.asarray(values) for name, values in columns.items()}
        self.column_names, self.columns = list(columns), list(self.series.values())
        self.shape = len(self.columns[0]), len(columns)

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return np.stack(self.columns, -1)

    def take(self, rows: Any) -> "ArrowTable":
        return ArrowTable(**{name: values[rows] for name, values in self.series.items()})


class Quantity(np.ndarray):
    """An array with a unit, as one of astropy."""

    def __new__(cls, values: Any, unit: Any) -> "Quantity":
        array = np.array(values).view(cls)
        array.unit = unit
        return array

    def to_value(self, unit: str) -> Any:
        return np.asarray(self)
