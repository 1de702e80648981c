"""Quasi-random draws, which fill space more evenly than random ones."""

import torch
from torch import Tensor
from torch.quasirandom import SobolEngine

from .._torch import constant

# To hide it from the compiler, torch would import that first, which takes a second.
_init = getattr(SobolEngine.__init__, "__wrapped__", SobolEngine.__init__)


def normal_points(like: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """Return quasi-random points of N(0, I), always the same, shape ``(count, D)``.

    Args:
        like: A tensor of their type and on their device, shape ``(D,)``.
        count: How many.
        seed: Of the scrambling.
    """
    with torch._C._DisableFuncTorch():  # which takes the scrambling for random
        engine = SobolEngine.__new__(SobolEngine)
        _init(engine, len(like), scramble=True, seed=seed)
        net = engine.draw(count, dtype=torch.double)
        # Torch takes the first point through the default type, which may not reach to 2^30.
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        net[0] = engine.shift.to(wide) / 2**engine.MAXBIT
        points = torch.special.ndtri(net.clamp(1e-12, 1 - 1e-12)).numpy()
    return constant(points).to(like)
