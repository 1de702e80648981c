r"""The likelihood of images in bits per dimension: how short a code of them could be.

With levels v of L values, u uniform on :math:`[0, 1)^D` and a density :math:`\rho` of
:math:`x = (v + u) / L`, an image's probability is :math:`P(v) = L^{-D} E_u\, \rho(x)`, and

.. math:: -\frac{\log_2 P(v)}{D} \le \log_2 L - \frac{E_u \log_2 \rho(x)}{D},

the bits per dimension that are reported. The divergence along the path of an image is estimated
by probes that are new for each image and time, :math:`\epsilon^T J \epsilon` from one backward
pass, so that errors average out over images and times.

References:
    Theis, van den Oord & Bethge, *A note on the evaluation of generative models*, ICLR 2016;
    Grathwohl et al., *FFJORD*, ICLR 2019, arXiv 1810.01367.
"""

import dataclasses
import math
import os
from typing import Any, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .._files import StrPath, contents, refuse_no_place, write
from .._package import check_ranges, number, whole
from .._torch import warn_user, with_gradients
from ..distributions.fingerprint import fingerprint
from ..distributions.interpolant import AnyDistribution, InterpolantDistribution
from ..distributions.rows import contexts_of_rows, images_of
from ..nn.modes import evaluated
from ..nn.velocity import evaluate, images_at_once
from ..solvers.divergence import HutchinsonDivergence
from ..solvers.ode import Adaptive, FixedGrid, Solver
from ..transforms.flow import Path

_TRIED_IMAGES = 8  # on which the grid is chosen
_MAX_STEPS = 256
_VALUES_AT_ONCE = 2**24  # of the states of a chunk at all nodes: 64 MiB in float32
_ROWS = 512  # in a chunk, where rows are no images
_LARGE_LEVELS = (torch.uint16, torch.uint32, torch.uint64)  # with which torch does little
_KEY = "pyro_interpolant_bits"  # of a file's text


class _MeanAndError(NamedTuple):
    mean: float
    stderr: float


class BitsPerDim(_MeanAndError):
    """The bits per dimension of images: a pair ``(mean, stderr)``.

    Attributes:
        mean: Their mean.
        stderr: Its standard error: images, levels' noise and probes together.
        solver_error: How much the bits of the first 8 images change, on average without the sign,
            by a solver of twice the steps, or a tenth of the tolerances; None of solvers that
            have neither. The standard error does not know of it.
    """

    solver_error: float | None = None

    def __new__(
        cls, mean: float, stderr: float, solver_error: float | None = None
    ) -> "BitsPerDim":
        """Return the pair: ``solver_error`` is an attribute, so unpacking gives two numbers."""
        pair = super().__new__(cls, mean, stderr)
        pair.solver_error = solver_error
        return pair

    def _replace(self, **changes: float) -> "BitsPerDim":
        """Return the pair with other numbers; the solver's error stays."""
        return BitsPerDim(*super()._replace(**changes), self.solver_error)

    def __repr__(self) -> str:
        """Say it in a few words."""
        text = f"{self.mean:.4f} ± {self.stderr:.4f} bits per dimension"
        return (
            text if self.solver_error is None else f"{text}, solver within {self.solver_error:.1g}"
        )


def bits_per_dim(
    distribution: AnyDistribution,
    images: ArrayLike,
    levels: int = 256,
    probes: int = 1,
    dequantizations: int = 1,
    *,
    context: ArrayLike | None = None,
    tolerance: float = 1e-3,
    seed: int = 0,
    checkpoint: StrPath | None = None,
) -> BitsPerDim:
    """Return the mean bits per dimension of images under a density of ``(v + u) / levels``.

    Estimates are unbiased in the probes and in u, and independent between images. A
    :class:`~pyro_interpolant.FixedGrid` is taken with its steps doubled until bits of the first 8
    images change by less than a tolerance; another solver as it is. Images go through in pieces.

    Args:
        distribution: What was learned from such images, spread over their levels, as
            :func:`~pyro_interpolant.from_samples` does with ``uint8``.
        images: Whole levels v, 0 to ``levels - 1``, shape ``(N, *event_shape)``.
        levels: Their number L; of a flow that learned ``uint8``, 256 however many there are.
        probes: How many estimate a divergence where the transform's is
            :class:`~pyro_interpolant.HutchinsonDivergence`; another is taken as it is.
        dequantizations: How many u are drawn for each image.
        context: Contexts, shape ``(N, C)``, or labels, for a conditional flow.
        tolerance: Of the grid, bits per dimension.
        seed: Of the probes and of u.
        checkpoint: A file to keep the bits of each piece of images in. The same call goes on from
            it, to the same result.

    Warns:
        UserWarning: If bits change by more than the tolerance at 256 steps.

    Raises:
        ValueError: If images have another shape or other levels, or training spread them over
            another number of levels, a number is not positive, the base has a batch, or a mirror
            was not fitted, contexts are of another number, or given already, one for each image,
            or the file is of another call.
        NotImplementedError: If the distribution has no density, as one that is guided.
    """
    check_ranges(
        whole("levels", levels, 1),
        whole("probes", probes, 1),
        whole("dequantizations", dequantizations, 1),
        number("a tolerance > 0", tolerance, lambda n: n > 0),
    )
    levels, probes, dequantizations = int(levels), int(probes), int(dequantizations)
    values = _checked_levels(distribution, images, levels)
    distribution.check_start()
    flow = distribution.transform.flow
    given = None
    known = getattr(distribution.transform, "raw_context", None)
    if known is not None and known.dim() > 1:
        raise ValueError(
            "expected a conditional flow and context=, which goes through in pieces as the images "
            f"do, got one conditioned already, of batch shape {tuple(known.shape[:-1])}"
        )
    distribution.check_single_base()
    if context is not None:
        names = distribution.context_columns
        given = contexts_of_rows(context, flow, names, len(values), "images")
    numbers = [levels, probes, dequantizations, tolerance, seed]
    kept = _Kept(checkpoint, numbers, distribution, values, given)
    generator = torch.Generator(flow.loc.device).manual_seed(seed)
    bits = _Bits(distribution, levels, probes, generator)
    with with_gradients(), torch.no_grad(), evaluated(distribution.transform.flow):
        few = slice(_TRIED_IMAGES)
        solver, change = bits.solver(values[few], None if given is None else given[few], tolerance)
        found = kept.restored(generator)
        while len(found) < len(values):
            part = slice(len(found), len(found) + bits.rows_at_once(solver))
            own = None if given is None else given[part]
            draws = [bits(values[part], own, solver) for _ in range(dequantizations)]
            found = torch.cat((found, torch.stack(draws).mean(0).cpu()))
            kept.write(found, generator)
    error = float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return BitsPerDim(float(found.mean()), error, change)


def _checked_levels(distribution: AnyDistribution, images: ArrayLike, levels: int) -> Tensor:
    """Return whole levels, shape ``(N, *event_shape)``, on the device of the flow."""
    spread = distribution.transform.flow.levels
    if spread not in (None, levels):
        raise ValueError(
            f"expected levels={spread}, as training spread them, (v + u) / {spread}, also where "
            f"images have fewer, got levels={levels}"
        )
    v = images_of(images, distribution.row_shape)
    if v.dtype in _LARGE_LEVELS:
        v = v.long()
    low, high = (float(bound) for bound in v.aminmax())
    if not (0 <= low <= high < levels) or (v.is_floating_point() and bool((v != v.floor()).any())):
        raise ValueError(
            f"expected whole levels from 0 to {levels - 1}, got {v.dtype} from {low:g} to {high:g}"
        )
    return v.to(distribution.transform.flow.loc.device)


class _Kept:
    """The bits of images in a file, as far as they are known.

    Args:
        path: The file, or None to keep nothing.
        numbers: The settings.
        distribution: The density.
        images: The images, shape ``(N, *event_shape)``.
        context: Their contexts, shape ``(N, C)``, or None.

    Raises:
        ValueError: If no file can be there, or the one that is there is damaged or of another
            call.
    """

    def __init__(
        self,
        path: StrPath | None,
        numbers: list[Any],
        distribution: AnyDistribution,
        images: Tensor,
        context: Tensor | None,
    ) -> None:
        self.path, self.tensors = path, None
        if path is None:
            return
        refuse_no_place(path)
        transform, base = distribution.transform, distribution.base
        end, own = (getattr(transform, name, None) for name in ("end", "context"))
        parts = transform.solver, transform.divergence, transform.flow
        given = base, distribution.constraint, end, own, images, context
        self.text = fingerprint(numbers, *parts, *given)
        if os.path.exists(path):
            self.tensors = self._read(path)

    def _read(self, path: StrPath) -> dict[str, Tensor]:
        try:
            texts, tensors = contents(path, framework="pt")
        except ValueError as error:
            raise ValueError(f"{error}; or delete it, to start anew") from error
        if texts.get(_KEY) != self.text:
            raise ValueError(
                f"expected {path} to have bits of these images by this density, got those of "
                "others, or another file: delete it, or pass another"
            )
        return tensors

    def restored(self, generator: torch.Generator) -> Tensor:
        """Return the bits in the file, float64, ``(N,)``, and set the generator behind them."""
        if self.tensors is None:
            return torch.zeros(0, dtype=torch.float64)
        generator.set_state(self.tensors["generator"])
        return self.tensors["bits"]

    def write(self, bits: Tensor, generator: torch.Generator) -> None:
        """Keep bits, shape ``(N,)``, and the state of the generator behind them."""
        if self.path is not None:
            write(self.path, {"bits": bits, "generator": generator.get_state()}, {_KEY: self.text})


class _Bits:
    """Estimates of bits per dimension, one an image.

    Args:
        distribution: The density, conditional or not.
        levels: L.
        probes: How many estimate a divergence.
        generator: What draws probes and u.
    """

    def __init__(
        self, distribution: AnyDistribution, levels: int, probes: int, generator: torch.Generator
    ) -> None:
        self.distribution, self.levels, self.probes = distribution, levels, probes
        self.flow, self.generator = distribution.transform.flow, generator
        self.has_probes = isinstance(distribution.transform.divergence, HutchinsonDivergence)

    def rows_at_once(self, solver: Solver) -> int:
        """Return how many images are evaluated at once; of half as many a graph fits memory."""
        most = _VALUES_AT_ONCE // (len(solver.grid()[0]) * self.flow.event_dim)
        return max(1, min((images_at_once(self.flow.velocity) or 2 * _ROWS) // 2, most))

    def solver(
        self, v: Tensor, context: Tensor | None, tolerance: float
    ) -> tuple[Solver, float | None]:
        """Return the grid whose bits change little when its steps are doubled, and how much.

        Args:
            v: A few images, shape ``(N, *event_shape)``.
            context: Their contexts, shape ``(N, C)``, or None.
            tolerance: Bits per dimension.
        """
        solver: Solver = self.distribution.transform.solver
        finer = _finer(solver)
        if finer is None:
            return solver, None
        drawn = self._uniform(v), self._signs(v.reshape(len(v), -1))
        before, after = (self(v, context, one, *drawn) for one in (solver, finer))
        change = float((after - before).abs().mean())
        while isinstance(solver, FixedGrid) and change >= tolerance:
            if solver.steps >= _MAX_STEPS:
                warn_user(
                    f"no grid up to {_MAX_STEPS} steps has bits that change by less than "
                    f"{tolerance} when steps are doubled: at {solver.steps} it is {change:.2g}"
                )
                break
            solver, before = finer, after
            finer = _finer(solver)
            after = self(v, context, finer, *drawn)
            change = float((after - before).abs().mean())
        return solver, change

    def __call__(
        self,
        v: Tensor,
        context: Tensor | None,
        solver: Solver,
        u: Tensor | None = None,
        signs: Tensor | None = None,
    ) -> Tensor:
        """Return the bits per dimension of each image, float64, shape ``(N,)``.

        Args:
            v: Levels, shape ``(N, *event_shape)``.
            context: Contexts, shape ``(N, C)``, or None.
            solver: How paths are integrated.
            u: Where in its cell each value is, shape ``(N, *event_shape)``; drawn if not given.
            signs: Probes of all times, shape ``(P, N, D)``; new ones each time if not given.
        """
        # A copy, for one made in inference mode could not be differentiated through.
        view = self.distribution.given(None if context is None else context.clone())
        rows = view.to_flow(self._spread(v, self._uniform(v) if u is None else u))
        path = dataclasses.replace(view.transform.path(), solver=solver)
        states = self.flow.integrate(self.flow.whitening.to_white(rows), path, forward=False)
        if self.has_probes:
            log_det = self.flow.whitening.log_det + self._divergences(view, states, path, signs)
        else:
            log_det = self.flow.log_det(states, path)
        log_prob = view.white_base().log_prob(states[0]) - log_det
        log_prob = log_prob - view.from_flow(rows)[1]
        return math.log2(self.levels) - log_prob.double() / (math.log(2) * self.flow.event_dim)

    def _divergences(
        self, view: InterpolantDistribution, states: Tensor, path: Path, signs: Tensor | None
    ) -> Tensor:
        """Return the integral of the estimated divergence along states, shape ``(N,)``."""
        times, weights = (s.to(states) for s in path.times)
        total = states.new_zeros(states.shape[1])
        for t, w, x in zip(times, weights, states, strict=True):
            e = self._signs(x) if signs is None else signs
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                v = evaluate(self.flow.velocity, t, x, view.transform.context)
            for i, probe in enumerate(e):
                last = i == len(e) - 1
                (along,) = torch.autograd.grad(v, x, probe, retain_graph=not last)
                total = total + w * (along * probe).sum(-1) / len(e)
        return total

    def _spread(self, v: Tensor, u: Tensor) -> Tensor:
        """Return values strictly inside of cells, of which rounding reaches the ends.

        Those of the lowest and of the highest may be the edges of a support.

        Args:
            v: Levels, shape ``(N, *event_shape)``.
            u: Where in its cell each value is, of the same shape, from 0 to 1.
        """
        low = v.to(u)
        end = (low + 1) / self.levels
        x = (low + u.clamp(min=torch.finfo(u.dtype).eps / 4)) / self.levels
        return x.minimum(torch.nextafter(end, torch.zeros_like(end)))

    def _uniform(self, v: Tensor) -> Tensor:
        """Return uniform numbers of the shape of images, ``(N, *event_shape)``."""
        like = self.flow.loc
        return torch.rand(v.shape, generator=self.generator, dtype=like.dtype, device=like.device)

    def _signs(self, x: Tensor) -> Tensor:
        """Return probes of rows, random signs, shape ``(P, N, D)``."""
        like, shape = self.flow.loc, (self.probes, *x.shape)
        bits = torch.randint(2, shape, generator=self.generator, device=like.device)
        return (2 * bits - 1).to(like)


def _finer(solver: Solver) -> Any:
    """Return a solver whose bits tell the error of a solver's, or None where there is none."""
    if isinstance(solver, FixedGrid):
        return dataclasses.replace(solver, steps=2 * solver.steps)
    if isinstance(solver, Adaptive):
        rtol, atol = solver.rtol / 10, solver.atol / 10
        return dataclasses.replace(solver, rtol=rtol, atol=atol, nodes=2 * solver.nodes)
    return None
