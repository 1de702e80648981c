"""``fit``: what is refused leaves the flow as it was; what is fitted is right.

The velocity is affine, :math:`v_t(w) = g w + s`, so the flow of whatever weights a step or two
leave is a Gaussian in closed form, behind the whitening map; with rows held out that are given,
that map is the mean and the covariance of all others.
"""

import math
from typing import Any, NamedTuple

import pytest
import torch
from fuzzing import EXPONENTS, FLOATS, LAYOUTS, as_given, end_of, laid_out, lengths, run
from hypothesis import strategies as st
from narrow import small_runs
from torch import Tensor, nn

from pyro_interpolant import (
    Adaptive,
    InterpolantDistribution,
    InterpolantTransform,
    fit,
)


class Affine(nn.Module):
    """The velocity g w + s, shape ``(*, D)``, with weights g and s, shape ``(D,)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.event_dim = dim
        self.gain, self.shift = (nn.Parameter(torch.zeros(dim)) for _ in range(2))

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.gain * x + self.shift

    def forward_and_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self(t, x), self.gain.sum().expand(x.shape[:-1])

    def log_prob(self, w: Tensor) -> Tensor:
        """Return the log-density at time 1 of whitened values, in float64."""
        gain, shift = self.gain.double(), self.shift.double()
        moved = torch.where(gain == 0, 1.0, torch.expm1(gain) / gain) * shift
        start = (w - moved) / gain.exp()
        return (-0.5 * start.square() - 0.5 * math.log(2 * math.pi) - gain).sum(-1)


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """What is around a run of two steps is small; an affine velocity needs few nodes."""
    small_runs(monkeypatch.setattr)
    monkeypatch.setattr("pyro_interpolant.training.objective._HELD_DRAWS", 64)
    few = Adaptive(rtol=1e-6, atol=1e-6, nodes=8)
    monkeypatch.setattr("pyro_interpolant.diagnostics.calibration._REFERENCE", few)


# ---- rows ---------------------------------------------------------------------------------------


def put(x: Tensor, value: float, seed: int) -> Tensor:
    """Return rows of which one has a value in one place."""
    x = x.clone()
    if len(x):
        x[seed % len(x), seed % x.shape[1]] = value
    return x


def with_column(x: Tensor, column: Tensor) -> Tensor:
    """Return rows with another last column, shape ``(N,)``."""
    return torch.cat((x[:, :-1], column[:, None]), 1)


# What is wrong with rows, from (rows, seed): each has to be refused.
BROKEN = {
    "nan": lambda x, seed: put(x, math.nan, seed),
    "inf": lambda x, seed: put(x, math.inf, seed),
    "constant": lambda x, seed: with_column(x, x[0, -1].expand(len(x))),
    "empty": lambda x, seed: x[:0],
    "few": lambda x, seed: x[: 1 + seed % x.shape[1]],
    "wide": lambda x, seed: torch.cat((x, x), 1),
    "int64": lambda x, seed: (10 * x).nan_to_num().long(),
    "text": lambda x, seed: "rows",
}
# What is odd with rows, and has an answer.
ODD = {
    "wild": lambda x, seed: put(
        x, min(1e37, (1e30, 1e12, 1e6)[seed % 3] * float(x.abs().max())), seed
    ),
    "repeated": lambda x, seed: x.repeat_interleave(2, 0),
    "rounded": lambda x, seed: x.std(0) * (x / x.std(0)).round(),
}


class Data(NamedTuple):
    """A recipe of rows.

    Attributes:
        dim: D.
        count: N.
        offset: The centre, in units of the scale.
        exponents: Powers of ten of the scale of all columns and of the first.
        dtype: Of the rows.
        layout: In memory.
        kind: A tensor, or what else holds the rows.
        state: What is broken or odd, or "good".
        seed: Of the numbers.
    """

    dim: int
    count: int
    offset: float
    exponents: tuple[int, int]
    dtype: str
    layout: str
    kind: str
    state: str
    seed: int

    def good(self) -> Tensor:
        """Return Gaussian rows."""
        make = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.count, self.dim, generator=make)
        x = x + 0.5 * x.roll(1, 1) + self.offset
        scales = torch.full((self.dim,), 10.0 ** self.exponents[0])
        scales[0] = 10.0 ** self.exponents[1]
        return (x * scales).to(FLOATS[self.dtype])

    def made(self) -> Any:
        """Return them in their state."""
        return {**BROKEN, **ODD}.get(self.state, lambda x, seed: x)(self.good(), self.seed)

    def rows(self) -> Any:
        """Return what a call is given."""
        x = self.made()
        return as_given(laid_out(x, self.layout), self.kind) if isinstance(x, Tensor) else x


def data(counts: tuple[int, ...] = (12, 30, 60)) -> st.SearchStrategy[Data]:
    """Return recipes of rows, half of them good."""
    states = ("good",) * 24 + tuple(ODD) * 3 + tuple(BROKEN)
    return st.builds(
        Data,
        st.integers(1, 3),
        st.sampled_from(counts),
        st.sampled_from((0.0, 0.0, 3.0, -30.0, 1e3)),
        st.tuples(EXPONENTS, EXPONENTS),
        st.sampled_from(sorted(FLOATS)),
        st.sampled_from([name for name in LAYOUTS if name != "stride 0"]),
        st.sampled_from(("tensor",) * 4 + ("array", "fixed array", "list")),
        st.sampled_from(states),
        st.integers(0, 9999),
    )


# ---- settings, weights ----------------------------------------------------------------

# Weights of N rows, from (N, seed).
WEIGHTS = {
    "ones": lambda n, seed: torch.ones(n),
    "counts": lambda n, seed: torch.randint(1, 5, (n,)),
    "shares": lambda n, seed: torch.rand(n) + 0.1,
    "mask": lambda n, seed: torch.arange(n) % 7 != seed % 7,
    "array": lambda n, seed: torch.ones(n).numpy(),
}
BAD_WEIGHTS = {
    "negative": lambda n, seed: put(torch.ones(n, 1), -1.0, seed)[:, 0],
    "nan": lambda n, seed: put(torch.ones(n, 1), math.nan, seed)[:, 0],
    "inf": lambda n, seed: put(torch.ones(n, 1), math.inf, seed)[:, 0],
    "zero": lambda n, seed: torch.zeros(n),
    "short": lambda n, seed: torch.ones(n // 2),
}
BAD_OPTIONS = (
    {"batch_size": 0},
    {"steps": 1.5},
    {"validation": 1.0},
    {"validation": torch.ones(3, 9)},
    {"learning_rate": math.nan},
    {"tolerance": 0.0},
    {"context": torch.ones(12, 2)},
    {"weight_decay": -1.0},
)


class Settings(NamedTuple):
    """A recipe of what goes with rows.

    Attributes:
        dtype: Of the flow.
        weights: What weights are like, or None.
        option: What is wrong with an option, or None.
        own_rows: Whether the rows held out are given.
        steps: The number of steps.
    """

    dtype: str
    weights: str | None
    option: dict[str, Any] | None
    own_rows: bool
    steps: int


def settings() -> st.SearchStrategy[Settings]:
    """Return recipes of settings, most of which are good."""
    return st.builds(
        Settings,
        st.sampled_from(sorted(FLOATS)),
        st.sampled_from((None,) * 24 + tuple(WEIGHTS) * 2 + tuple(BAD_WEIGHTS)),
        st.sampled_from((None,) * 200 + BAD_OPTIONS),
        st.booleans(),
        st.integers(1, 2),
    )


def state_of(flow: Any) -> dict[str, Any]:
    """Return all that a refused fit must leave alone."""
    inner = flow.transform.flow
    return {
        **{name: value.clone() for name, value in inner.state_dict().items()},
        "requires grad": torch.tensor([p.requires_grad for p in inner.parameters()]),
        "base": flow.base,
        "solver": flow.transform.solver,
        "training": flow.transform.training,
    }


def is_same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether two states are the same to the bit."""
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], Tensor) else a[k] == b[k] for k in a
    )


def is_in_range(x: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a flow of a type can hold what columns vary by, and more than rounding."""
    x = x.double()
    spread = x.std(0)
    return bool((spread > 1e3 * torch.finfo(dtype).eps * x.abs().amax(0)).all())


def check_fit(case: tuple[Data, Settings]) -> str:
    recipe, choice = case
    kind = FLOATS[choice.dtype]
    flow = InterpolantDistribution(InterpolantTransform(Affine(recipe.dim).to(kind)))
    x, good, before = recipe.rows(), recipe.good(), state_of(flow)
    count = len(x) if hasattr(x, "__len__") and getattr(x, "ndim", 1) else 1
    makers = {**WEIGHTS, **BAD_WEIGHTS}
    weights = choice.weights and makers[choice.weights](count, recipe.seed)
    options = {"steps": choice.steps, "seed": None, "progress": False, "tolerance": 0.1}
    if choice.own_rows:
        options["validation"] = good[:5]
    end = end_of(lambda: fit(flow, x, weights=weights, **{**options, **(choice.option or {})}))
    is_bad = recipe.state in BROKEN or choice.weights in BAD_WEIGHTS or bool(choice.option)
    if end.error is not None:
        assert is_same(state_of(flow), before), f"{end} left another flow"
        may = choice.weights == "mask" or recipe.state == "wild" or not is_in_range(good, kind)
        assert is_bad or may, f"{end.error} of good rows"
        return f"fit: {end}"
    masked = choice.weights == "mask" and recipe.state in ("nan", "inf") and not choice.option
    assert not is_bad or masked, f"an answer of bad rows or settings: {case}"
    is_plain = recipe.state in ("good", "repeated")
    finite_and_right(flow, end.answer, good)
    if choice.own_rows and is_plain and is_in_range(good, kind):
        weight = torch.ones(count) if weights is None else torch.as_tensor(weights).double()
        right_map(flow, recipe.made().double(), weight)
        return "fit: the moments and the density of a Gaussian"
    return "fit: the density of a Gaussian"


def finite_and_right(flow: Any, result: Any, rows: Tensor) -> None:
    """Compare the density at rows, shape ``(N, D)``, with that of the weights and the map."""
    inner = flow.transform.flow
    assert all(p.isfinite().all() for p in inner.state_dict().values())
    assert all(map(math.isfinite, [*result.losses, *result.validation_losses]))
    assert not any(p.requires_grad for p in inner.parameters())
    x = rows.to(inner.loc)
    with torch.no_grad():
        found, draws = flow.log_prob(x), flow.sample((5,))
    w, log_det = whitened(inner, x)
    close(found, inner.velocity.log_prob(w) - log_det, w)
    assert draws.shape == (5, x.shape[1])
    assert draws.isfinite().all()


def whitened(flow: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return whitened rows and log |det L| of a flow, in float64, whatever the scales."""
    loc, linear = flow.loc.double(), flow.whitening.matrix().double()
    scales = linear.abs().amax(-1)
    unit = linear / scales[:, None]
    w = torch.linalg.solve(unit, ((x.double() - loc) / scales)[..., None])[..., 0]
    return w, scales.log().sum() + torch.linalg.slogdet(unit).logabsdet


def close(found: Tensor, truth: Tensor, w: Tensor) -> None:
    """Compare log-densities of whitened rows: ten times the error seen, 1e-5 and 1e-7."""
    error = (found.double() - truth).abs() / (1 + w.square().sum(-1))
    assert float(error.max()) < (2e-4 if found.dtype == torch.float32 else 2e-6), (found, truth)


def right_map(flow: Any, x: Tensor, weight: Tensor) -> None:
    """Compare the whitening map with the weighted mean and covariance of rows, ``(N, D)``."""
    whitening = flow.transform.flow.whitening
    share = weight / weight.sum()
    loc = share @ x
    scale = (share @ (x - loc).square()).sqrt()
    z = (x - loc) / scale
    eps = torch.finfo(whitening.loc.dtype).eps
    rounding = 10 * eps * float(1 + (loc / scale).abs().max())
    off = (whitening.loc.double() - loc) / scale
    assert float(off.abs().max()) < rounding + 1e-9
    linear = whitening.matrix().double() / scale[:, None]
    assert float((linear @ linear.T - (share[:, None] * z).T @ z).abs().max()) < rounding + 1e-9


@pytest.mark.parametrize("inputs", lengths(30, 600))
def test_fit(inputs):
    run(check_fit, st.tuples(data(), settings()), inputs)
