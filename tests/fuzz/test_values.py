"""``log_prob``, ``condition``: a closed form's number, or an error where one belongs.

Flows are ones of which the density is known: an untrained velocity is zero, an affine one keeps a
Gaussian Gaussian, and a mixture's velocity is that of the oracles. What is an error is told here
from the input alone.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from cases import WHITENINGS
from fuzzing import (
    DTYPES,
    EXPONENTS,
    FLOATS,
    GOOD,
    LAYOUTS,
    as_given,
    batch_shapes,
    broadcast,
    converted,
    end_of,
    laid_out,
    lengths,
    run,
    spots,
)
from hypothesis import strategies as st
from oracles import random_mixture
from pyro.distributions import constraints
from torch import Tensor, nn

from pyro_interpolant import (
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    FixedGrid,
    InterpolantDistribution,
    InterpolantTransform,
    Trigonometric,
    VelocityMLP,
)

ONE_STEP = FixedGrid(1, "euler")  # exact for a velocity of zero


class Known(NamedTuple):
    """A flow of which the density is known.

    Attributes:
        flow: The flow.
        truth: The log-density, float64, of values, float64, shape ``(*, *event_shape)``.
        draw: Values of a shape ``(*, D)`` of standard normal numbers.
        precision: The error of log-densities, beside one and relative; None for 64 roundings:
            up to 4 were seen of values, and a draw is rounded itself.
        white: Whitened values, or contexts, where there is a reach.
        reach: The largest of them at which the velocity is a number and the solver good.
    """

    flow: Any
    truth: Callable[[Tensor], Tensor]
    draw: Callable[[Tensor], Tensor]
    precision: float | None = None
    white: Callable[[Tensor], Tensor] | None = None
    reach: float = math.inf


def normal_sum(w: Tensor) -> Tensor:
    """Return the log-density of N(0, I), shape ``(*)``, of values, shape ``(*, D)``."""
    return -0.5 * (w.square() + math.log(2 * math.pi)).sum(-1)


def whitened_flow(dim: int, kind: str, exponents: tuple[int, int], dtype: str) -> Any:
    """Return the transform of a velocity of zero, with a map of the scales 10^exponents."""
    make, linear = WHITENINGS[kind]
    transform = InterpolantTransform(VelocityMLP(dim, (4, 4)), solver=ONE_STEP)
    transform.flow.whitening = make(dim)
    whole, first = 10.0 ** exponents[0], 10.0 ** exponents[1]
    scales = torch.ones(dim)
    scales[0] = first / whole if kind != "scalar" else 1.0
    own = linear(dim)
    rows = scales[:, None] if kind == "dense" else scales if kind == "diagonal" else scales[0]
    loc = torch.linspace(-3.0, 2.0, dim) * scales * whole
    transform.flow.whitening.set(loc, own * rows * whole)
    return transform.to(FLOATS[dtype])


def gaussian(
    dim: int, kind: str, exponents: tuple[int, int], dtype: str, **parts: Any
) -> tuple[InterpolantDistribution, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Return a flow that is N(loc, L L^T), white coordinates of values, and their inverse."""
    transform = whitened_flow(dim, kind, exponents, dtype)
    loc, linear = transform.flow.loc.double(), transform.flow.whitening.matrix().double()

    def white(x: Tensor) -> Tensor:
        # By rows: their scales differ by up to 60 powers of ten.
        scales = linear.abs().amax(-1)
        z = ((x - loc) / scales)[..., None]
        # A quotient that overflows would give inf * 0 in the solve; its square overflows anyway.
        return torch.linalg.solve(linear / scales[:, None], z.clamp(-1e200, 1e200))[..., 0]

    def coloured(w: Tensor) -> Tensor:
        return loc + w @ linear.T

    return InterpolantDistribution(transform, **parts), white, coloured


def log_det(flow: Any) -> Tensor:
    """Return log |det L| in float64."""
    linear = flow.transform.flow.whitening.matrix().double()
    scales = linear.abs().amax(-1)
    return torch.linalg.slogdet(linear / scales[:, None]).logabsdet + scales.log().sum()


def known_gaussian(dim: int, kind: str, exponents: tuple[int, int], dtype: str) -> Known:
    """Return a Gaussian of any scales."""
    flow, white, coloured = gaussian(dim, kind, exponents, dtype)
    return Known(flow, lambda x: normal_sum(white(x)) - log_det(flow), coloured)


SUPPORTS = {
    "positive": constraints.positive,
    "interval": constraints.interval(-2.0, 3.0),
    "greater": constraints.greater_than(1.0),
    "simplex": constraints.simplex,
}


@cache
def known_on(name: str, dtype: str) -> Known:
    """Return a Gaussian on a support: its bijection in float64 is torch's."""
    flow, white, coloured = gaussian(2, "dense", (0, 0), dtype, support=SUPPORTS[name])
    onto = torch.distributions.biject_to(SUPPORTS[name])

    def truth(x: Tensor) -> Tensor:
        u = onto.inv(x)
        volume = onto.log_abs_det_jacobian(u, x)
        volume = volume.sum(-1) if volume.dim() == u.dim() else volume
        return normal_sum(white(u)) - log_det(flow) - volume

    # Beside a bound values have lost up to three digits.
    precision = 1e4 * torch.finfo(FLOATS[dtype]).eps
    return Known(flow, truth, lambda w: onto(coloured(0.3 * w)), precision)


@cache
def known_mixture(dim: int, scale: int) -> Known:
    """Return a mixture of Gaussians, with the velocity of the oracles."""
    unit = 10.0**scale
    oracle = random_mixture(dim, Trigonometric(), components=2)
    transform = InterpolantTransform(oracle, solver=FixedGrid(32))
    transform.flow.whitening.set(2 * unit * torch.ones(dim), unit * torch.eye(dim))

    def white(x: Tensor) -> Tensor:
        return x / unit - 2.0

    return Known(
        InterpolantDistribution(transform),
        lambda x: oracle.log_prob(torch.tensor(1.0), white(x)) - dim * math.log(unit),
        lambda w: unit * (2.0 + w),
        1e-3,  # 4e-4 was seen, of 32 steps
        white,
        reach=10.0,
    )


def some_flow() -> st.SearchStrategy[Known]:
    """Return flows of every kind that takes no context."""
    dims, dtypes = st.integers(1, 3), st.sampled_from(sorted(FLOATS))
    return st.one_of(
        st.builds(
            known_gaussian,
            dims,
            st.sampled_from(sorted(WHITENINGS)),
            st.tuples(EXPONENTS, EXPONENTS),
            dtypes,
        ),
        st.builds(known_on, st.sampled_from(sorted(SUPPORTS)), dtypes),
        st.builds(known_mixture, dims, st.sampled_from((0, -30, 30))),
    )


# ---- values -------------------------------------------------------------------------------------


SHAPES = {
    "wide": lambda x: torch.cat((x, x[..., :1]), -1),
    "narrow": lambda x: x[..., :-1],
    "scalars": lambda x: x[..., 0],
    "scalar": lambda x: x.new_tensor(0.5),
}


class Value(NamedTuple):
    """A recipe of a value: what differs from a good one, if anything."""

    batch: tuple[int, ...]
    seed: int
    spots: Any
    layout: str
    defect: str
    validated: bool
    expanded: tuple[int, ...] | None

    def of(self, known: Known) -> Any:
        """Return the value."""
        loc = known.flow.transform.flow.loc
        generator = torch.Generator().manual_seed(self.seed)
        x = known.draw(torch.randn(*self.batch, len(loc), generator=generator)).to(loc)
        x = x if self.spots is None else self.spots.put(x)
        if self.defect in SHAPES:
            x = SHAPES[self.defect](x)
        elif self.defect in DTYPES:
            x = converted(x, self.defect)
        return as_given(laid_out(x, self.layout), self.defect)


def values() -> st.SearchStrategy[Value]:
    """Return recipes of values, most of which are good."""
    return st.builds(
        Value,
        batch_shapes(),
        st.integers(0, 9999),
        spots(),
        st.sampled_from(LAYOUTS),
        st.sampled_from((*GOOD, *SHAPES, *DTYPES, "array", "list")),
        st.sampled_from((True, True, True, False)),
        st.none() | batch_shapes(2),
    )


def is_refused(flow: Any, x: Any, *, validated: bool) -> bool | None:
    """Return whether ``log_prob`` has to refuse a value; None where it may."""
    if not isinstance(x, Tensor):
        return True
    event = flow.event_shape
    if x.dim() < len(event) or x.shape[x.dim() - len(event) :] != event:
        return True
    batch = broadcast(x.shape[: x.dim() - len(event)], flow.batch_shape)
    if batch is None:
        return True
    if 0 in batch:
        return None if x.dtype != flow.transform.flow.loc.dtype else False
    if x.dtype != flow.transform.flow.loc.dtype:
        return True
    if not validated:
        return False
    x = x.detach()
    inside = flow.support.check(x) & ~x.isnan().flatten(x.dim() - len(event)).any(-1)
    return not bool(inside.all())


def confirmed(known: Known, x: Tensor, found: Tensor) -> None:
    """Compare log-densities with the closed form: row by row, outside the support too."""
    flow, event = known.flow, len(known.flow.event_shape)
    batch = broadcast(x.shape[: x.dim() - event], flow.batch_shape)
    assert found.shape == batch, (found.shape, batch)
    assert found.dtype == x.dtype
    if 0 in found.shape:
        return
    limits = torch.finfo(x.dtype)
    x, found = x.detach().double(), found.detach().double()
    bad = x.isnan().flatten(x.dim() - event).any(-1)
    far = x.isinf().flatten(x.dim() - event).any(-1) & ~bad
    inside = flow.support.check(x)
    truth = known.truth(x).where(inside & ~far, -math.inf).where(~bad, math.nan).expand(batch)
    precision = 64 * limits.eps if known.precision is None else known.precision
    close = (found - truth).abs() <= precision * (1 + truth.abs())
    same = (found == truth) | (found.isnan() & truth.isnan())
    beyond = (truth < limits.min) & (found == -math.inf)  # what the type cannot hold
    unclaimed = (known.white(x).abs() > known.reach).any(-1) if known.white else False
    good = close | same | beyond | unclaimed
    assert bool(good.all()), f"{found} is not {truth} at {x}"


def check_log_prob(case: tuple[Known, Value]) -> str:
    known, recipe = case
    if recipe.expanded is not None:
        known = known._replace(flow=known.flow.expand(recipe.expanded))
        assert known.flow.batch_shape == recipe.expanded
    flow, x = known.flow, recipe.of(known)
    flow._validate_args = recipe.validated
    end = end_of(lambda: flow.log_prob(x))
    wanted = is_refused(flow, x, validated=recipe.validated)
    assert wanted is None or wanted == (end.error is not None), f"{end}, wanted {wanted}"
    if end.error is None and x.dtype == flow.transform.flow.loc.dtype:
        confirmed(known, x, end.answer)
    return str(end)


@pytest.mark.slow
@pytest.mark.parametrize("inputs", lengths(50, 500))
def test_log_prob(inputs):
    run(check_log_prob, st.tuples(some_flow(), values()), inputs)


# ---- contexts -----------------------------------------------------------------------------------


class Scaled(nn.Module):
    """The velocity :math:`v(x | c) = \\tanh(c_0) x + c_1`, of which the flow is affine."""

    event_dim = context_dim = 2

    def forward(self, t: Tensor, x: Tensor, context: Tensor) -> Tensor:
        context = context.to(x)  # which may be whole numbers
        return context[..., :1].tanh() * x + context[..., 1:]


def family(dtype: str) -> ConditionalInterpolantDistribution:
    """Return a family of Gaussians."""
    transform = ConditionalInterpolantTransform(Scaled(), solver=FixedGrid(12))
    transform.flow.whitening.set(torch.ones(2), torch.tensor([[2.0, 0.0], [0.3, 0.1]]))
    return ConditionalInterpolantDistribution(transform.to(FLOATS[dtype]))


def member(flow: InterpolantDistribution, context: Tensor) -> Known:
    """Return a member of the family and its density, given a context."""
    loc, linear = flow.transform.flow.loc.double(), flow.transform.flow.whitening.matrix().double()
    rate, shift = context.detach().double().split(1, -1)
    rate = rate.tanh()
    moved = (torch.expm1(rate) / rate).where(rate != 0, 1.0) * shift

    def white(x: Tensor) -> Tensor:
        return torch.linalg.solve(linear, (x - loc)[..., None])[..., 0]

    def truth(x: Tensor) -> Tensor:
        return normal_sum((white(x) - moved) / rate.exp()) - 2 * rate[..., 0] - log_det(flow)

    eps = torch.finfo(flow.transform.flow.loc.dtype).eps
    size = context.detach().double().abs()
    size = size.where(size.isfinite(), math.inf)
    largest = torch.finfo(torch.float64).max  # of infinite contexts nothing is claimed
    draw, precision = (lambda w: loc + w @ linear.T), max(1e-5, 100 * eps)
    return Known(flow, truth, draw, precision, lambda x: size, largest)


SIZES = {"no size": 0, "size one": 1, "size three": 3}


class Context(NamedTuple):
    """A recipe of a context."""

    flow_dtype: str
    batch: tuple[int, ...]
    seed: int
    spots: Any
    layout: str
    defect: str

    def tensor(self) -> Tensor:
        """Return it as a tensor."""
        shape = *self.batch, SIZES.get(self.defect, 2)
        c = torch.randn(shape, generator=torch.Generator().manual_seed(self.seed))
        c = c.to(FLOATS[self.flow_dtype])
        c = c if self.spots is None else self.spots.put(c)
        return laid_out(converted(c, self.defect) if self.defect in DTYPES else c, self.layout)


def contexts() -> st.SearchStrategy[Context]:
    """Return recipes of contexts, most of which are good."""
    return st.builds(
        Context,
        st.sampled_from(sorted(FLOATS)),
        batch_shapes(),
        st.integers(0, 9999),
        spots(),
        st.sampled_from(LAYOUTS),
        st.sampled_from((*GOOD, *SIZES, *DTYPES, "array", "list")),
    )


def check_condition(case: tuple[Context, Value]) -> str:
    recipe, value = case
    flow, context = family(recipe.flow_dtype), recipe.tensor()
    given, dtype = as_given(context, recipe.defect), flow.transform.flow.loc.dtype
    end = end_of(lambda: flow.condition(given))
    whole = not (context.is_floating_point() or context.is_complex())
    is_bad = recipe.defect in SIZES or not isinstance(given, Tensor)
    fits = whole or torch.promote_types(context.dtype, dtype) == dtype  # nothing is rounded
    may_be_labels = whole and context.dtype is not torch.bool and context.dim() == 1
    is_bad = is_bad or not fits or may_be_labels
    assert is_bad == (end.error is not None), f"{end}, wanted {is_bad}"
    if is_bad:
        return f"condition: {end}"
    one = end.answer
    assert one.batch_shape == context.shape[:-1]
    known = member(one, context.to(dtype))
    x = value.of(known)
    end = end_of(lambda: one.log_prob(x))
    wanted = is_refused(one, x, validated=True)
    assert wanted is None or wanted == (end.error is not None), f"{end}, wanted {wanted}"
    if end.error is None and x.dtype == dtype:
        confirmed(known, x, end.answer)
    return f"log_prob: {end}"


@pytest.mark.parametrize("inputs", lengths(30, 250))
def test_condition(inputs):
    run(check_condition, st.tuples(contexts(), values()), inputs)
