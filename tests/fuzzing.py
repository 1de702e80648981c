"""Fuzzing: recipes of inputs, and what each of them has to end in.

A check takes one input and returns in a few words how it ended: with an answer that something
independent confirmed, or with an error of ours about what the user gave. :func:`run` counts them
and prints the counts, which ``pytest -s`` or ``-rP`` shows.

Inputs are derandomized: the same at each run. ``FUZZ_SEED=1`` takes others, ``FUZZ_TIMES=10`` ten
times as many.
"""

import itertools
import linecache
import math
import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, event, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import pyro_interpolant

SEED, TIMES = (int(os.environ.get(f"FUZZ_{name}", d)) for name, d in (("SEED", 0), ("TIMES", 1)))

PACKAGE = str(Path(pyro_interpolant.__file__).parent) + os.sep
VALIDATION = os.path.join("torch", "distributions", "distribution.py")  # of values, Pyro's too

# Warnings that a fit may end with: each says what the answer is worth, or what is off with rows.
ALLOWED = (
    "the fit came out wrong",
    "no grid up to",
    "columns [",
    "a combination of columns",
    "the flow was saved with",
)


def lengths(short: int, long: int) -> list[Any]:
    """Return the numbers of inputs of the default suite and of a release as parameters."""
    return [
        pytest.param(TIMES * short, id="short"),
        pytest.param(TIMES * long, id="long", marks=pytest.mark.release),
    ]


def run(
    check: Callable[[Any], str], cases: st.SearchStrategy[Any], inputs: int, name: str = ""
) -> None:
    """Check so many inputs, and print how many ended in what."""
    ends: Counter[str] = Counter()

    @settings(
        max_examples=inputs,
        derandomize=True,
        database=None,
        deadline=None,  # times are those of the machine
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @seed(SEED)
    @given(cases)
    def examples(case: Any) -> None:
        torch.default_generator.manual_seed(0)  # torch.manual_seed keeps a stack for each call
        always = torch.is_warn_always_enabled()
        torch.set_warn_always(True)  # torch's own too, at each input
        try:
            end = check(case)
        finally:
            torch.set_warn_always(always)
        event(end)
        ends[end] += 1

    examples()
    print(f"\n{name or check.__name__}: {ends.total()} inputs, seed {SEED}")
    for end, count in ends.most_common():
        print(f"{count:6} {end}")


# ---- how an input ends --------------------------------------------------------------------------


class End(NamedTuple):
    """An answer, or the error that came in its stead."""

    answer: Any
    error: Exception | None = None

    def __str__(self) -> str:
        """Name the error by its type and first words."""
        if self.error is None:
            return "answer"
        words = [w for w in str(self.error).split() if not any(c.isdigit() for c in w)]
        return f"{type(self.error).__name__}: {' '.join(words[:5])} ..."


def end_of(act: Callable[[], Any]) -> End:
    """Return what a call ends in; any other warning or error than those allowed goes on."""
    with warnings.catch_warnings():
        for words in ALLOWED:
            escaped = words.replace("[", r"\[")
            warnings.filterwarnings("ignore", message=escaped, category=UserWarning)
        try:
            return End(act())
        except (ValueError, TypeError) as error:
            if is_clear(error):
                return End(None, error)
            raise AssertionError(f"not an error of ours: {error!r}") from error


def is_clear(error: Exception) -> bool:
    """Return whether an error was raised by our own statement, or is torch's about a value."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if last.filename.endswith(VALIDATION):
        return str(error).startswith("Expected value argument")
    ours = linecache.getline(last.filename, last.lineno or 0).strip().startswith("raise ")
    return ours and last.filename.startswith(PACKAGE) and len(str(error)) > 20


# ---- tensors ------------------------------------------------------------------------------------

FLOATS = {"float32": torch.float32, "float64": torch.float64}
OTHERS = ("float16", "bfloat16", "int64", "uint8", "bool", "complex64")
DTYPES = (*FLOATS, *OTHERS)  # one of them the flow's own
GOOD = ("good",) * 24
LAYOUTS = ("plain", "transposed", "sliced", "offset", "stride 0", "needs grad")
SPECIAL = (math.nan, math.inf, -math.inf, 0.0, 1e30, -1e30, 1e-30, 1e300, -1e-300)
EXPONENTS = st.sampled_from((0, 0, 0, 1, -3, 6, -12, 20, -30, 30))


def batch_shapes(most: int = 3) -> st.SearchStrategy[tuple[int, ...]]:
    """Return batch shapes, now and then with a size of zero or one."""
    sizes = st.sampled_from((1, 2, 3, 4, 2, 3, 0))
    return st.lists(sizes, max_size=most).map(tuple)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """Return the same values in another layout in memory; the first alone, over and over."""
    if layout == "needs grad":
        return x.clone().requires_grad_() if x.is_floating_point() else x
    if x.dim() == 0 or layout == "plain":
        return x.clone()
    if layout == "transposed":
        return x.mT.contiguous().mT if x.dim() > 1 else x.clone()
    if layout == "sliced":
        return torch.stack((x, torch.zeros_like(x)), -1)[..., 0]
    if layout == "stride 0":
        return x[:1].expand(x.shape)
    padded = torch.zeros(x.numel() + 1, dtype=x.dtype)
    padded[1:] = x.reshape(-1)
    return padded[1:].view(x.shape)


def converted(x: Tensor, dtype: str) -> Tensor:
    """Return a tensor of another type."""
    kind = getattr(torch, dtype)
    return (x if kind.is_floating_point else x.nan_to_num(0.0, 1.0, 1.0)).to(kind)


class Spots(NamedTuple):
    """Places of a tensor, as shares of its length, that get a value of their own."""

    places: tuple[float, ...]
    value: float

    def put(self, x: Tensor) -> Tensor:
        """Return a copy with the value at the places."""
        x = x.clone()
        if x.numel():
            for place in self.places:
                x.view(-1)[int(place * x.numel())] = torch.tensor(self.value).to(x)
        return x


def spots() -> st.SearchStrategy[Spots | None]:
    """Return places for one special value; none in most inputs."""
    places = st.lists(st.floats(0, 0.99), min_size=1, max_size=3).map(tuple)
    return st.none() | st.none() | st.builds(Spots, places, st.sampled_from(SPECIAL))


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...] | None:
    """Return the common shape, or None."""
    found = []
    for sizes in itertools.zip_longest(*(tuple(s)[::-1] for s in shapes), fillvalue=1):
        size = next((n for n in sizes if n != 1), 1)
        if any(n not in (1, size) for n in sizes):
            return None
        found.append(size)
    return tuple(found[::-1])


def as_given(x: Tensor, kind: str) -> Any:
    """Return a tensor as something else that users have: an array, a list; else itself."""
    if kind == "list":
        return x.tolist()
    if "array" not in kind:
        return x
    array = x.detach().numpy()
    if kind == "fixed array":
        array = np.asfortranarray(array)
        array.flags.writeable = False
    return array
