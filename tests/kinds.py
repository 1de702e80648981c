"""Every kind of flow distribution by name, small and untrained.

Each is built anew by a call, from the random numbers of the moment, in the default type.
"""

from collections.abc import Callable, Iterable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from cases import BASES, SUPPORTS, WHITENINGS, own_flow, random_flow, random_prior
from pyro.distributions import constraints

from pyro_interpolant import (
    Adaptive,
    ConditionalInterpolantDistribution,
    ConditionalInterpolantTransform,
    FixedGrid,
    Geodesic,
    HutchinsonDivergence,
    InterpolantDistribution,
    InterpolantTransform,
    JointInterpolantDistribution,
    TorusMLP,
    base_space,
    circular,
)
from pyro_interpolant.distributions.bases import Samples

GRID = FixedGrid(steps=4)

SITES = {
    "slope": ((), constraints.real),
    "scales": ((2,), constraints.positive),
    "weights": ((3,), constraints.simplex),
}


def flow_of(dim: int = 2, **choices: Any) -> Any:
    return random_flow(dim, **{"solver": GRID, **choices})


def plain(dim: int = 2, **kwargs: Any) -> InterpolantDistribution:
    return InterpolantDistribution(flow_of(dim), **kwargs)


def supported(name: str) -> InterpolantDistribution:
    return plain(SUPPORTS[name].dim, support=SUPPORTS[name].support)


def family(context_dim: int = 3, **kwargs: Any) -> ConditionalInterpolantDistribution:
    return ConditionalInterpolantDistribution(flow_of(context_dim=context_dim), **kwargs)


def given(*batch: int, **kwargs: Any) -> InterpolantDistribution:
    """Return a member of a family, or a batch of them, one for each of its contexts."""
    return family(**kwargs).condition(torch.randn(*batch, 3))


def adaptive() -> InterpolantDistribution:
    """Return one whose velocity is the same at all times, so that its steps are few."""
    transform = flow_of(solver=Adaptive(rtol=1e-7, atol=1e-7, nodes=12))
    torch.nn.init.zeros_(transform.velocity.shifts.weight)
    return InterpolantDistribution(transform)


def angular_flow(dim: int = 2, context_dim: int = 0) -> Any:
    velocity = TorusMLP(dim, (16, 16), context_dim)
    with torch.no_grad():
        velocity.output.weight.normal_(std=0.3)
    kind = ConditionalInterpolantTransform if context_dim else InterpolantTransform
    return kind(velocity, interpolant=Geodesic(), solver=GRID)


def angles(dim: int = 2) -> InterpolantDistribution:
    return InterpolantDistribution(angular_flow(dim), support=circular)


def angles_given() -> InterpolantDistribution:
    flow = ConditionalInterpolantDistribution(angular_flow(context_dim=3), support=circular)
    return flow.condition(torch.randn(3))


def joint() -> JointInterpolantDistribution:
    return JointInterpolantDistribution(flow_of(5), sites=SITES)


def gaussianized_joint() -> JointInterpolantDistribution:
    sites = {"slope": ((), constraints.real), "scale": ((), constraints.positive)}
    support = SUPPORTS["gaussianized"].support
    return JointInterpolantDistribution(flow_of(2), sites=sites, support=support)


def whitened(name: str) -> InterpolantDistribution:
    make, linear = WHITENINGS[name]
    transform = flow_of()
    transform.flow.whitening = make(2)
    transform.flow.whitening.set(torch.randn(2), linear(2))
    return InterpolantDistribution(transform)


KINDS: dict[str, Callable[[], InterpolantDistribution]] = {
    "plain": plain,
    "one": lambda: plain(1),
    "own network": lambda: InterpolantDistribution(own_flow(2, solver=GRID)),
    "diagonal": lambda: whitened("diagonal"),
    "scalar": lambda: whitened("scalar"),
    "positive": lambda: supported("positive"),
    "interval": lambda: supported("interval"),
    "simplex": lambda: supported("simplex"),
    "ordered": lambda: supported("ordered_vector"),
    "corr_cholesky": lambda: supported("corr_cholesky"),
    "stack": lambda: supported("stack"),
    "shaped": lambda: plain(4, event_shape=(2, 2)),
    "gaussianized": lambda: supported("gaussianized"),
    "tempered": lambda: supported("tempered"),
    "laplace": lambda: plain(base=BASES["laplace"](2)),
    "multivariate": lambda: plain(base=BASES["multivariate"](2)),
    "flow base": lambda: plain(base=random_prior(2)),
    "laplace, positive": lambda: plain(base=BASES["laplace"](2), support=constraints.positive),
    "samples": lambda: plain(base=Samples(torch.randn(50, 2))),
    "given": given,
    "given rows": lambda: given(4),
    "given, positive": lambda: given(support=constraints.positive),
    "joint": joint,
    "joint, gaussianized": gaussianized_joint,
    "angles": angles,
    "one angle": lambda: angles(1),
    "angles given": angles_given,
    "halfway": lambda: plain().at(0.5),
    "halfway, laplace": lambda: plain(base=BASES["laplace"](2)).at(0.5),
    "halfway, angles": lambda: angles().at(0.5),
    "start": lambda: plain().at(0.0),
    "adaptive": adaptive,
    "hutchinson": lambda: InterpolantDistribution(
        flow_of(divergence=HutchinsonDivergence(probes=2, seed=1))
    ),
    "expanded": lambda: plain().expand((4,)),
    "expanded, positive": lambda: supported("positive").expand((4,)),
    "expanded angles": lambda: angles().expand((4,)),
}


class EveryKind:
    """A model of one site for each kind, an object that new processes can unpickle.

    Args:
        in_data_space: The kinds that are sampled as they are.
        in_base_space: The kinds that ``base_space`` samples.
    """

    def __init__(self, in_data_space: Iterable[str], in_base_space: Iterable[str]) -> None:
        self.in_data_space = {kind: KINDS[kind]().freeze() for kind in in_data_space}
        self.in_base_space = {kind: KINDS[kind]().freeze() for kind in in_base_space}

    def flows(self) -> list[InterpolantDistribution]:
        return [*self.in_data_space.values(), *self.in_base_space.values()]

    def __call__(self) -> None:
        self.sites(self.in_data_space, "data")
        base_space(self.sites)(self.in_base_space, "base")

    def named(self, draws: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return draws in base space as those of the sites, of kinds that have no context."""
        flows = {k: d for k, d in self.in_base_space.items() if d.transform.context is None}
        return base_space(self.sites).samples(draws, flows, "base")

    def sites(self, flows: dict[str, InterpolantDistribution], where: str) -> None:
        for kind, d in flows.items():
            name = f"{kind} in {where} space"
            with pyro.plate_stack(name, d.batch_shape):
                x = pyro.sample(name, d)
                total = x.flatten(len(d.batch_shape)).sum(-1)
                y = dist.Normal(total, 10.0)
                pyro.sample(f"data of {name}", y, obs=torch.zeros_like(total))
