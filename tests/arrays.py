"""Arrays and frames as other libraries have them, as far as rows are read from them."""

from typing import Any

import numpy as np


class MaskedByAstropy(np.ndarray):
    """An array with a mask, as a ``Masked`` of astropy: elsewhere what is behind it counts."""

    def __new__(cls, values: Any, mask: Any) -> "MaskedByAstropy":
        array = np.array(values).view(cls)
        array.mask = np.array(mask)
        return array

    def __getitem__(self, index: Any) -> Any:
        return MaskedByAstropy(np.asarray(self)[index], self.mask[index])
