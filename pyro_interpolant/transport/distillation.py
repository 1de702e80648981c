r"""Students of a flow: an invertible map of one pass, fitted to the draws of the flow.

With :math:`\rho_1` the flow's density and q the student's, training minimises
:math:`-E_{x\sim\rho_1}\log q(x)`, for which the flow gives as many draws as are wanted. What is
left is :math:`\mathrm{KL}(\rho_1\,\|\,q) = E_{x\sim\rho_1}[\log\rho_1(x) - \log q(x)]`.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro.distributions.transforms import AffineCoupling, Permute, Spline
from pyro.nn import DenseNN
from torch import Tensor, nn
from torch.distributions import ComposeTransform, Transform, constraints
from tqdm import tqdm

from .. import _package
from .._package import check_ranges, number, whole
from .._torch import seeded, with_gradients
from ..distributions.bases import only_possible, standard_normal
from ..distributions.constraints import Constraint
from ..distributions.interpolant import InterpolantDistribution
from ..distributions.report import with_error
from ..distributions.rows import check_value
from ..distributions.supports import CircularSupport, Support, support_of
from ..nn.modes import evaluated
from ..training.whitening import whitening_map
from ..transforms.bijections import Unseen, Whiten, contents_of
from ..transforms.interpolant import broadcast_batch
from ..transforms.whitening import DenseWhitening

if TYPE_CHECKING:
    from typing_extensions import Self

_HELD_SHARE = 0.1  # of the draws, on which the relative entropy is measured
_LARGEST_NORM = 5.0  # of a gradient
_LAYERS, _WIDTH = 4, 64  # of couplings, which cost a quarter of those by splines
_BINS, _BOUND = 16, 4.0  # of a spline, and where it ends, in standard deviations
_UNIT_SLOPE = math.log(math.e - 1)  # whose softplus is 1


class Student(dist.TransformedDistribution):
    """A Pyro distribution of transforms from N(0, I), whose densities have all gradients.

    Args:
        base: N(0, I), of event shape ``(D,)``.
        learned: Transforms from there to whitened draws.
        ends: Transforms from those to the support.
        space: The support, which Pyro's compositions do not know.
    """

    def __init__(
        self,
        base: dist.TorchDistribution,
        learned: Sequence[Transform],
        ends: Sequence[Transform],
        space: Support,
    ) -> None:
        self.space, self._ends = space, ComposeTransform(list(ends))
        super().__init__(base, [*learned, *ends])

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Constraint:
        """The support of one event."""
        return self.space.event_constraint()

    def expand(self, batch_shape: Sequence[int], _instance: "Self | None" = None) -> "Self":
        """Return the distribution with another batch shape; weights are shared."""
        new = type(self).__new__(type(self)) if _instance is None else _instance
        new.space, new._ends = self.space, self._ends
        return super().expand(torch.Size(batch_shape), _instance=new)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return draws, shape ``(*sample_shape, *batch_shape, *event_shape)``."""
        none = self._none(sample_shape)
        return super().sample(torch.Size(sample_shape)) if none is None else none

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return draws with gradients, shape ``(*sample_shape, *batch_shape, *event_shape)``."""
        none = self._none(sample_shape)
        return super().rsample(torch.Size(sample_shape)) if none is None else none

    def _none(self, sample_shape: Sequence[int]) -> Tensor | None:
        """Return the draws where there are none, which Pyro's couplings cannot reshape."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.base_dist.mean.new_zeros(shape) if 0 in shape else None

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density, shape ``(*)``, of values of shape ``(*, *event_shape)``.

        It is ``-inf`` at infinity and, with validation off, beyond the bounds of the support.

        Raises:
            TypeError: If the value is no tensor.
            ValueError: If the shape or the type does not match, or a value is outside the support
                (while validation is on).
        """
        dtype = self.base_dist.mean.dtype
        check_value(value, self.event_shape, dtype)
        if value.dtype != dtype:
            raise ValueError(
                f"expected {dtype}, the type of the student, got {value.dtype}: convert the value"
            )
        event_dim = len(self.event_shape)
        batch = broadcast_batch(value.shape[: value.dim() - event_dim], self.batch_shape)
        if 0 in batch:  # which Pyro's couplings cannot reshape
            return (0 * value.sum()).expand(batch)
        if self._validate_args:
            self._validate_sample(value)
        within = self.space.within_bounds(value)
        with torch.no_grad():
            possible = self._ends.inv(value).isfinite().all(-1)
            middle = self._ends(torch.zeros_like(self.base_dist.mean))
        possible = possible if within is None else within & possible
        # A new tensor, which the caches of Pyro's transforms have not seen: of what was drawn
        # without gradients they would give back the way without gradients.
        inside = value.where(possible.reshape(possible.shape + (1,) * event_dim), middle)
        return only_possible(super().log_prob(inside), possible, value, event_dim)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for copies and pickles, without what caches hold of a backward pass."""
        with torch.no_grad():  # not of a sample: copying is to draw no random numbers
            self.log_prob(ComposeTransform(self.transforms)(self.base_dist.mean))
        return self.__dict__


class DistillResult(NamedTuple):
    r"""A student, and how far it is from the flow.

    Attributes:
        distribution: The student, frozen, on the support of the flow.
        relative_entropy: :math:`\mathrm{KL}(\rho_1\,\|\,q)` of the flow to the student, nats, on
            draws that it was not trained on; NaN where the flow has no density. The error that the
            flow's solver makes in ``log_prob`` is in it: near 0 it may be as much below.
        stderr: Its standard error, nats.
        steps: The number of steps taken.
        seconds: The time that it took, with that of the draws.
    """

    distribution: Student
    relative_entropy: float
    stderr: float
    steps: int
    seconds: float

    def __repr__(self) -> str:
        """Say how far the student is from the flow, and what it took."""
        apart = with_error(self.relative_entropy, self.stderr)
        return f"{apart} nats from the flow, after {self.steps:,} steps in {self.seconds:.3g} s"


@with_gradients()
def distill(
    distribution: InterpolantDistribution,
    student: Sequence[Transform] | nn.Module | None = None,
    *,
    count: int = 50_000,
    steps: int = 2_000,
    batch_size: int = 512,
    learning_rate: float = 5e-3,
    seed: int | None = None,
    progress: bool = True,
) -> DistillResult:
    r"""Return a student: an invertible map of one pass in place of the flow's solve.

    It is fitted by maximum likelihood to draws of the flow (see the module), in coordinates where
    these have mean 0 and covariance I. As a prior it is another distribution than the flow, by as
    many nats as the result says. As the map of :func:`~pyro_interpolant.neutra`,
    ``neutra(guide, student=distill(guide.get_posterior()).distribution)``, it leaves the posterior
    exact whatever its error, for the density there is the model's own.

    Args:
        distribution: A trained flow; of a conditional one ``condition(c)``, of one context.
        student: Transforms from N(0, I), shape ``(*, D)``, to the whitened draws, such as Pyro's;
            or a module whose call gives a distribution with a ``transform`` from draws to N(0, I),
            as flows of zuko are. By default affine couplings, or a spline in one dimension. Far
            modes need splines; autoregressive transforms are slow in one direction.
        count: The number of draws of the flow, of which a tenth is held out.
        steps: The number of steps of Adam, whose rate falls to zero by a cosine.
        batch_size: The number of draws in a step.
        learning_rate: The rate at the start.
        seed: Of the draws, the default student's weights and the batches.
        progress: Whether to show a bar.

    Returns:
        The student, and its distance from the flow.

    Raises:
        TypeError: If the distribution is not an :class:`~pyro_interpolant.InterpolantDistribution`
            or the student is of another kind.
        ValueError: If a setting cannot work, the distribution has a batch shape or is one of
            angles, or the student is of another dimension, or its weights are frozen, as training
            leaves them.
        RuntimeError: If the student's density of held-out draws is not finite.

    References:
        Hoffman et al., arXiv 1903.03704 (maps for NUTS); Dinh et al., *Density estimation using
        Real NVP*, ICLR 2017, arXiv 1605.08803.

    Example:
        >>> prior = InterpolantDistribution(interpolant_transform(2, hidden_dims=(16, 16)))
        >>> result = distill(prior, count=500, steps=5, seed=0, progress=False)
        >>> result.distribution.sample((10,)).shape
        torch.Size([10, 2])
    """
    _check(distribution)
    check_ranges(
        whole("count", count, 100),
        whole("steps", steps, 1),
        whole("batch_size", batch_size, 1),
        number("learning_rate > 0", learning_rate, lambda n: n > 0),
    )
    count, steps, batch_size = int(count), int(steps), int(batch_size)
    began, flow = _package.now(), distribution.transform.flow
    given = None if student is None else StudentTransforms(student).to(flow.loc)
    if given is not None:
        given.check(flow.loc)
    view, held_count = distribution.without_support(), round(_HELD_SHARE * count)
    with seeded(seed), torch.no_grad():
        last = view.sample((held_count,))
        # By the path that drew them, which is kept: a solve back may end beyond bounds of a base.
        log_p = view.log_prob(last) if view.has_density() else last[:, 0] * math.nan
        x = view.sample((count - held_count,))
        known = whitening_map(x, warn=False)  # not of those held out, which it would fit, too
        whitening = DenseWhitening(flow.event_dim).to(flow.loc)
        whitening.set(known.loc, known.linear)
        fitted = (StudentTransforms(_couplings(flow.loc)) if given is None else given).to(x)
        seen, held = whitening.to_white(x), whitening.to_white(last)
        with with_gradients():
            fitted.learn(seen, steps, batch_size, learning_rate, progress=progress)
        log_q = fitted.over(x).log_prob(held) - whitening.log_det
    if not bool(log_q.isfinite().all()):
        raise RuntimeError(
            f"the student's density is not finite for {int((~log_q.isfinite()).sum())} of "
            f"{len(log_q)} held-out draws: lower learning_rate, or choose another student"
        )
    excess = (log_p - log_q).double()
    error = float(excess.std()) / math.sqrt(len(excess))
    ends = [Whiten(whitening).inv, *distribution.space.transforms(flow)]
    seconds = _package.now() - began
    found = fitted.over(x, ends, distribution.space)
    return DistillResult(found, float(excess.mean()), error, steps, seconds)


class StudentTransforms(nn.Module):
    """The transforms of a student, and their training.

    Args:
        source: Transforms from N(0, I), or a module whose call gives a distribution with them.

    Raises:
        TypeError: If it is neither.
        ValueError: If it has weights, and all of them are frozen.
    """

    def __init__(self, source: Sequence[Transform] | nn.Module) -> None:
        super().__init__()
        if not isinstance(source, Sequence | nn.Module) or isinstance(source, Transform):
            source = [source]
        self.source: Sequence[Transform] | nn.Module = source
        if not isinstance(source, nn.Module):  # whose weights are this module's, as an attribute
            wrong = [type(part).__name__ for part in source if not isinstance(part, Transform)]
            if wrong or not source:
                raise TypeError(f"expected transforms, got {', '.join(wrong) or 'none'}")
            held = [part for transform in source for part in contents_of(transform)]
            self.parts = nn.ModuleList(part for part in held if isinstance(part, nn.Module))
        weights = list(self.parameters())
        if weights and not any(p.requires_grad for p in weights):
            raise ValueError(
                "expected a student with weights to train, got frozen ones, as those of a student "
                "that has been trained are: build a new one"
            )

    def chain(self) -> list[Transform]:
        """Return the transforms from N(0, I) to draws, each of shape ``(*, D)``.

        Raises:
            TypeError: If the module gives no distribution with a transform.
        """
        if not isinstance(self.source, nn.Module):
            return list(self.source)
        found = getattr(self.source(), "transform", None)
        if not isinstance(found, Transform):
            raise TypeError(
                "expected transforms, or a module whose call gives a distribution with a "
                f"transform, as flows of zuko are, got {type(self.source).__name__}"
            )
        return [found.inv]

    def over(
        self,
        like: Tensor,
        ends: Sequence[Transform] = (),
        space: Support | None = None,
    ) -> Student:
        """Return the distribution of the transforms' images, and of further ones behind them.

        Args:
            like: A tensor of the type and on the device that it is to have, shape ``(*, D)``.
            ends: Transforms behind those that are learned.
            space: Where they lead, or None for real vectors.
        """
        space = support_of(constraints.real_vector) if space is None else space
        return Student(standard_normal(like), [Unseen(), *self.chain()], ends, space)

    def check(self, like: Tensor) -> None:
        """Raise a ValueError unless the transforms are of rows like a tensor, shape ``(D,)``."""
        shape: tuple[int, ...] | None = None
        why = ""
        with evaluated(self), torch.no_grad():
            try:
                shape = self.over(like).log_prob(torch.zeros_like(like)[None]).shape
            except (RuntimeError, ValueError, IndexError) as error:
                why = f": {error}"
        if shape != (1,):
            raise ValueError(
                f"expected a student of draws of shape (*, {len(like)}), as whitened ones of the "
                f"flow are, got one that takes no such draws{why}"
            )

    def learn(
        self, rows: Tensor, steps: int, batch_size: int, learning_rate: float, *, progress: bool
    ) -> None:
        """Fit the transforms to rows, shape ``(N, D)``, by maximum likelihood, and freeze them."""
        weights = [p for p in self.parameters() if p.requires_grad]
        if not weights:
            return
        optimizer = torch.optim.Adam(weights, learning_rate, fused=True)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        self.train()
        for _ in tqdm(range(steps), "student", leave=False, disable=not progress):
            batch = rows[torch.randint(len(rows), (batch_size,), device=rows.device)]
            loss = -self.over(batch).log_prob(batch).mean()
            optimizer.zero_grad()
            loss.backward()
            if bool(nn.utils.clip_grad_norm_(weights, _LARGEST_NORM).isfinite()):
                optimizer.step()
            schedule.step()
        self.eval().requires_grad_(requires_grad=False)


def _check(distribution: object) -> None:
    """Raise an error unless a distribution is one flow from real vectors."""
    if not isinstance(distribution, InterpolantDistribution):
        raise TypeError(
            f"expected an InterpolantDistribution, got {type(distribution).__name__}: of a "
            "conditional flow condition(c), of a guide its get_posterior()"
        )
    if distribution.batch_shape:
        raise ValueError(
            f"expected one density, got a batch of shape {tuple(distribution.batch_shape)}"
        )
    if isinstance(distribution.space, CircularSupport):
        raise ValueError("expected real vectors, got angles: no student here has their period")


def _couplings(like: Tensor) -> list[Transform]:
    """Return an untrained student like a tensor, ``(D,)``: the identity, and shuffles."""
    dim = len(like)
    if dim == 1:
        spline = Spline(1, count_bins=_BINS, bound=_BOUND)
        for weight in spline.parameters():
            nn.init.zeros_(weight)
        nn.init.constant_(spline.unnormalized_derivatives, _UNIT_SLOPE)
        return [spline]
    parts: list[Transform] = []
    for i in range(_LAYERS):
        if i:  # halves change places, so that each is carried by the other
            order = torch.arange(dim).flip(0) if i % 2 else torch.randperm(dim)
            parts.append(Permute(order.to(like.device)))
        known, moved = dim // 2, dim - dim // 2
        # Kinks, as of ReLU, cost NUTS its step: on a funnel 0.03 and 0.10 for 0.27 to 0.48.
        network = DenseNN(known, [_WIDTH, _WIDTH], [moved, moved], nonlinearity=nn.Tanh())
        for weight in network.layers[-1].parameters():
            nn.init.zeros_(weight)
        parts.append(AffineCoupling(known, network))
    return parts
