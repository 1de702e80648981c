"""Every member of every family by name, and builders of small random flows."""

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import pyro.distributions as dist
import pytest
import torch
import torch.multiprocessing  # noqa: F401  (registers the reductions of tensors)
from pyro.distributions import constraints
from pyro.infer import autoguide as guides
from torch import Tensor, nn

from pyro_interpolant import (
    Adaptive,
    BrownianBridge,
    ConditionalInterpolantTransform,
    EncodingDecoding,
    ExactDivergence,
    FixedGrid,
    HutchinsonDivergence,
    InterpolantDistribution,
    InterpolantTransform,
    Latent,
    Linear,
    SineSquared,
    Trigonometric,
    VelocityMLP,
)
from pyro_interpolant.distributions.constraints import Shaped
from pyro_interpolant.nn import ImageVelocity, UNet
from pyro_interpolant.nn.mlp import sharpness
from pyro_interpolant.solvers import RandomGrid
from pyro_interpolant.training.preprocessing import marginal_transform, radial_transform
from pyro_interpolant.transforms import DenseWhitening, DiagonalWhitening, ScalarWhitening
from pyro_interpolant.transforms.gaussianize import Gaussianized
from pyro_interpolant.transforms.whitening import Whitening


def slow_but(members: Iterable[str], *quick: str) -> list[Any]:
    """Return all members as parameters, those not named as quick marked slow."""
    return [m if m in quick else pytest.param(m, marks=pytest.mark.slow) for m in members]


def through_torch(value: Any, protocol: int = pickle.HIGHEST_PROTOCOL) -> Any:
    file = io.BytesIO()
    torch.save(value, file, pickle_protocol=protocol)
    file.seek(0)
    return torch.load(file, weights_only=False)


# Ways to a copy with weights of its own; what another process is given shares its memory.
COPIES: dict[str, Callable[[Any], Any]] = {
    "torch": through_torch,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
    "another process": lambda value: pickle.loads(ForkingPickler.dumps(value)),
}


AUTOGUIDES = {  # Pyro's
    "AutoNormal": guides.AutoNormal,
    "AutoDiagonalNormal": guides.AutoDiagonalNormal,
    "AutoMultivariateNormal": guides.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": guides.AutoLowRankMultivariateNormal,
    "AutoDelta": guides.AutoDelta,
    "AutoLaplaceApproximation": guides.AutoLaplaceApproximation,
    "AutoIAFNormal": guides.AutoIAFNormal,
    "AutoStructured": guides.AutoStructured,
}


INTERPOLANTS = {"trigonometric": Trigonometric(), "linear": Linear()}

GAMMAS = {"bridge": BrownianBridge(0.5), "smooth": SineSquared(0.8)}

LATENT = {
    "encoding-decoding": EncodingDecoding(),
    **{f"linear, {name}": Latent(Linear(), gamma) for name, gamma in GAMMAS.items()},
    "trigonometric, smooth": Latent(Trigonometric(), GAMMAS["smooth"]),
}

SOLVERS = {
    "rk4": FixedGrid(steps=8),
    "midpoint": FixedGrid(steps=12, method="midpoint"),
    "heun": FixedGrid(steps=12, method="heun"),
    "euler": FixedGrid(steps=24, method="euler"),
    "warped": FixedGrid(steps=8, warp=0.5),
    "adaptive": Adaptive(nodes=12),
    "random": RandomGrid(steps=12, seed=1),
}

DIVERGENCES = {"exact": ExactDivergence(), "hutchinson": HutchinsonDivergence(probes=2, seed=1)}

# Whitening maps: the class, and from D to an L in the shape that it stores.
WHITENINGS: dict[str, tuple[type[Whitening], Callable[[int], Tensor]]] = {
    "dense": (DenseWhitening, lambda dim: torch.linspace(-0.7, 1.2, dim).diag() + 0.3),
    "diagonal": (DiagonalWhitening, lambda dim: torch.linspace(-0.7, 2.2, dim)),
    "scalar": (ScalarWhitening, lambda dim: torch.tensor(1.7)),
}

HIDDEN_DIMS = {"one": (16,), "two": (16, 12), "residual": (16, 16, 16)}


def random_flow(
    dim: int,
    hidden_dims: tuple[int, ...] = (16, 16),
    context_dim: int = 0,
    **choices: Any,
) -> Any:
    """Return a transform (conditional where ``context_dim``) that is not the identity."""
    velocity = VelocityMLP(dim, hidden_dims, context_dim)
    with torch.no_grad():
        velocity.layers[0].weight.div_(sharpness(dim))  # as smooth as 8 steps ask
        velocity.output.weight.normal_(std=0.3)
        velocity.shifts.weight[-dim:].normal_(std=0.3)
    choices.setdefault("solver", FixedGrid(steps=8))
    kind = ConditionalInterpolantTransform if context_dim else InterpolantTransform
    transform = kind(velocity, **choices)
    lower = 0.3 * torch.randn(dim, dim).tril(-1)
    transform.flow.whitening.set(
        torch.randn(dim), lower + torch.diag(torch.linspace(0.7, 1.2, dim))
    )
    return transform


def random_prior(dim: int, *, frozen: bool = True, **kwargs: Any) -> InterpolantDistribution:
    """Return the distribution of a random flow."""
    prior = InterpolantDistribution(random_flow(dim), **kwargs)
    return prior.freeze() if frozen else prior


def losses_of_adam(
    distribution: Any,
    parameters: Iterable[Tensor],
    x: Tensor,
    *,
    rate: float,
    check: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return the losses of three steps of maximum likelihood; a check is made after each."""
    optimizer, losses = torch.optim.Adam(parameters, lr=rate), []
    for _ in range(3):
        optimizer.zero_grad()
        loss = -distribution.log_prob(x).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        check()
    return losses


def gaussian_prior(loc: Tensor, linear: Tensor) -> InterpolantDistribution:
    """Return the flow that is N(loc, L L^T) exactly: an untrained velocity is zero."""
    velocity = VelocityMLP(len(loc), (8, 8))
    transform = InterpolantTransform(velocity, solver=FixedGrid(1, "euler"))
    transform.flow.whitening.set(loc, linear)
    return InterpolantDistribution(transform).freeze()


class SupportCase(NamedTuple):
    """A support, the dimension of a flow for it, and its event.

    Attributes:
        support: The constraint.
        dim: The number D of unconstrained coordinates.
        event_shape: The event shape on the support.
        free: From an event to the D coordinates that its density is with respect to.
    """

    support: constraints.Constraint
    dim: int
    event_shape: tuple[int, ...]
    free: Callable[[Tensor], Tensor] = lambda y: y


def _strictly_lower(y: Tensor) -> Tensor:
    rows, columns = torch.tril_indices(y.shape[-1], y.shape[-1], -1)
    return y[..., rows, columns]


_SPREAD = torch.linspace(-2.5, 2.5, 1001, dtype=torch.float64)
_CHART: Any = marginal_transform(
    torch.stack((_SPREAD.sinh(), _SPREAD + 0.5 * (3 * _SPREAD).sin() / 3), -1)
)

_RADIAL: Any = radial_transform(
    torch.randn(2000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    * (1.5 * _SPREAD.repeat(2)[:2000, None] / 2).exp()
)

SUPPORTS = {
    "positive": SupportCase(constraints.positive, 2, (2,)),
    "unit_interval": SupportCase(constraints.unit_interval, 2, (2,)),
    "interval": SupportCase(constraints.interval(-2.0, 3.0), 2, (2,)),
    "greater_than": SupportCase(constraints.greater_than(1.0), 2, (2,)),
    "less_than": SupportCase(constraints.less_than(0.0), 2, (2,)),
    "softplus_positive": SupportCase(constraints.softplus_positive, 2, (2,)),
    "simplex": SupportCase(constraints.simplex, 2, (3,), lambda y: y[..., :-1]),
    "corr_cholesky": SupportCase(constraints.corr_cholesky, 3, (3, 3), _strictly_lower),
    "corr_matrix": SupportCase(constraints.corr_matrix, 3, (3, 3), _strictly_lower),
    "ordered_vector": SupportCase(constraints.ordered_vector, 3, (3,)),
    "positive_ordered_vector": SupportCase(constraints.positive_ordered_vector, 3, (3,)),
    "independent": SupportCase(constraints.independent(constraints.positive, 1), 2, (2,)),
    "stack": SupportCase(
        constraints.stack([constraints.positive, constraints.interval(0.0, 1.0)], dim=-1), 2, (2,)
    ),
    "stack in a shape": SupportCase(
        Shaped(constraints.stack([constraints.positive, constraints.real], dim=-1), (1, 2)),
        2,
        (1, 2),
        lambda y: y[..., 0, :],
    ),
    "scalar": SupportCase(Shaped(constraints.positive, ()), 1, (), lambda y: y[..., None]),
    "gaussianized": SupportCase(Gaussianized(constraints.real_vector, _CHART), 2, (2,)),
    "tempered": SupportCase(Gaussianized(constraints.real_vector, _RADIAL), 2, (2,)),
    "gaussianized stack": SupportCase(
        Gaussianized(constraints.stack([constraints.positive, constraints.real], dim=-1), _CHART),
        2,
        (2,),
    ),
}

BASES = {
    "default": lambda dim: None,
    "laplace": lambda dim: dist.Laplace(torch.full((dim,), 0.5), torch.ones(dim)).to_event(1),
    "multivariate": lambda dim: dist.MultivariateNormal(torch.ones(dim), 0.5 * torch.eye(dim)),
}


class OwnVelocity(nn.Module):
    """A user's own velocity: nothing but ``forward``, so that its divergence is by torch.func."""

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim + 1 + context_dim, 12)
        self.out = nn.Linear(12, dim)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        inputs = [x, t[..., None]] if context is None else [x, t[..., None], context]
        return self.out(torch.tanh(self.hidden(torch.cat(inputs, dim=-1))))


# Networks, as functions of (dim, context_dim).
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    "two": lambda dim, context_dim: VelocityMLP(dim, (16, 12), context_dim),
    "three": lambda dim, context_dim: VelocityMLP(dim, (10, 10, 10), context_dim),
    "own": OwnVelocity,
}


class OwnImages(nn.Module):
    """A user's own network of images: one convolution, and a rate for each label."""

    def __init__(self, classes: int = 0) -> None:
        super().__init__()
        self.mix = nn.Conv2d(1, 1, 3, padding=1)
        self.labels = nn.Embedding(max(1, classes), 1)

    def forward(self, t: Tensor, image: Tensor, labels: Tensor | None = None) -> Tensor:
        shift = t[:, None] if labels is None else t[:, None] + self.labels(labels)
        return torch.tanh(self.mix(image)) * (1 + shift[..., None, None])


IMAGE_SHAPE = (1, 4, 4)

# Networks of images, as functions of the number of classes.
IMAGE_NETWORKS: dict[str, Callable[[int], nn.Module]] = {
    "unet": lambda classes: UNet(IMAGE_SHAPE, (4, 8), classes=classes),
    "adapter": lambda classes: ImageVelocity(OwnImages(classes), IMAGE_SHAPE, classes),
}


def network_flow(make: Callable[[int, int], nn.Module]) -> Callable[..., Any]:
    """Return a builder, from (dim, context_dim=0, **choices), of random flows of a network."""

    def build(dim: int, context_dim: int = 0, **choices: Any) -> Any:
        transform = random_flow(dim, context_dim=context_dim, **choices)
        velocity = make(dim, context_dim)
        with torch.no_grad():
            for p in velocity.parameters():  # what starts as zero would stay unseen
                if not p.any():
                    p.normal_(std=0.3)
        transform.flow.velocity = velocity
        return transform

    return build


def own_flow(dim: int, context_dim: int = 0, **choices: Any) -> Any:
    """Return a random flow of a user's own velocity, as :func:`random_flow`."""
    return network_flow(NETWORKS["own"])(dim, context_dim, **choices)


FLOWS: dict[str, Callable[..., Any]] = {
    **{name: network_flow(make) for name, make in NETWORKS.items()},
    # With gains that depend on the time, too.
    "two": lambda dim, context_dim=0, **kw: random_flow(dim, (16, 12), context_dim, **kw),
    "three": lambda dim, context_dim=0, **kw: random_flow(dim, (10, 10, 10), context_dim, **kw),
}


@dataclass
class CountingSolver:
    """A fixed grid that counts its solves."""

    inner: FixedGrid = FixedGrid(steps=4)
    solves: int = field(default=0, compare=False)

    def grid(self) -> tuple[Tensor, Tensor]:
        return self.inner.grid()

    def solve(self, field: Callable[..., Any], x: Tensor, times: Tensor) -> Tensor:
        self.solves += 1
        return self.inner.solve(field, x, times)


@dataclass
class CountingDivergence:
    """The exact divergence, counting how often it is asked for."""

    calls: int = field(default=0, compare=False)

    def __call__(
        self, velocity: nn.Module, t: Tensor, x: Tensor, context: Tensor | None
    ) -> Tensor:
        self.calls += 1
        return ExactDivergence()(velocity, t, x, context)
