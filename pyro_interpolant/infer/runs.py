r"""Runs of a model that draws its data: what it observes, and what is refused of its sites.

Where no plate can hold many, they are the lanes of one, under :func:`torch.func.vmap`, with other
random numbers in each.
"""

import contextlib
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._torch import broadcast_shapes, is_functorch_tensor, seeded, warn_user
from ..distributions.rounding import are_close
from ..distributions.rows import as_tensor
from .sites import (
    OWN_FACTOR,
    Model,
    Nodes,
    Site,
    apart,
    is_deterministic,
    is_sampled,
    is_subsample,
    subsampling_plates,
)

_DENSITY = "log_prob of "  # before the name of a site, the key of its log density in an example
# Rounding moves the density of values far larger than their deviations by more than the values.
_VALUE_RTOL, _DENSITY_RTOL = 1e-5, 1e-3
_T = TypeVar("_T")
_IN_PLACE = {
    Tensor.normal_, Tensor.uniform_, Tensor.exponential_, Tensor.cauchy_, Tensor.bernoulli_,
    Tensor.random_,
}  # fmt: skip


@contextlib.contextmanager
def attempts() -> Iterator[None]:
    """Try what may come to nothing, without gradients and warnings."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


class Unobserved(Messenger):
    """Draw what a model observes; deterministic sites stay as they are.

    Args:
        drawn: The sites that are drawn where they are observed, or None for all.
    """

    def __init__(self, drawn: Sequence[str] | None) -> None:
        super().__init__()
        self.drawn = drawn

    def _pyro_sample(self, msg: Message) -> None:
        site = cast("Site", msg)
        if not msg["is_observed"] or is_deterministic(site) or OWN_FACTOR in site["infer"]:
            return
        if isinstance(msg["fn"], Unit):
            raise ValueError(
                f"expected a model that draws its data, got the factor {msg['name']!r}, which "
                "cannot be drawn from: write it as a site"
            )
        if self.drawn is None or msg["name"] in self.drawn:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


class _AllDrawn(Exception):
    """All sites that a run was for have been drawn."""


class _Stop(Messenger):
    """End a run once all of some sites have been drawn; of none, never."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__()
        self.left = set(names)

    def _pyro_post_sample(self, msg: Message) -> None:
        if msg["name"] in self.left:
            self.left.remove(msg["name"])
            if not self.left:
                raise _AllDrawn


def nodes_of(model: Model, until: Iterable[str] = ()) -> Nodes:
    """Return the sites of a run of a model, apart from all enclosing handlers and plates.

    Args:
        model: The model.
        until: The sites whose draws the run is for: once all have been drawn it ends, as data may
            be large. None of them is for a whole run.
    """
    tracer = poutine.trace(_Stop(until)(model))  # whose errors show the shapes of all sites
    with contextlib.suppress(_AllDrawn), apart():
        tracer()
    return cast("Nodes", tracer.trace.nodes)


def in_plate(model: Model, count: int | None, nesting: int) -> Model:
    """Return a model in a plate to the left of all of its own; alone, where there is no count.

    The plate is made in the run, as its sample of indices would else be seen by what is around.

    Args:
        model: The model.
        count: The size of the plate, or None.
        nesting: How many dimensions the plates of the model take.
    """

    def run() -> Any:
        with pyro.plate("_draws", count, dim=-1 - nesting):
            return model()

    return model if count is None else run


class DrawnInLanes(TorchFunctionMode):
    """Draw random numbers in place for every lane of a vmap, also into tensors without lanes.

    The call returns the drawn numbers; the original tensor cannot hold one value per lane, so it
    is filled with NaN, and a run of a model that reads it counts as none.

    Args:
        lane: A scalar that is another in each lane.
    """

    def __init__(self, lane: Tensor) -> None:
        super().__init__()
        self.lane = lane

    def __torch_function__(
        self,
        func: Callable[..., Tensor],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> Tensor:
        """Call a function of torch, one that draws in place on a copy with lanes."""
        kwargs = kwargs or {}
        if kwargs.get("generator") is not None:
            # A run of its own draws the same from one that it seeds, each lane something else.
            raise TypeError("expected draws from torch's global generator, got one of its own")
        if func not in _IN_PLACE or is_functorch_tensor(args[0]):
            return func(*args, **kwargs)
        tensor, *others = args
        if not tensor.is_floating_point():
            raise TypeError(f"expected to draw into floating numbers, got {tensor.dtype}")
        into = torch.zeros_like(tensor) + self.lane.to(tensor)
        tensor.fill_(math.nan)
        return func(into, *others, **kwargs)


def state_of_others() -> tuple[object, ...]:
    """Return the states of numpy's and Python's generators, from which all lanes draw at once."""
    state: Any = np.random.get_state()  # a name, words, and where it is in them
    return state[1].tobytes(), state[2:], random.getstate()


def in_lanes(function: Callable[..., _T], count: int, *batches: Tensor | dict[str, Tensor]) -> _T:
    """Return what a function returns in each lane of a vmap, all of them drawing other numbers.

    Args:
        function: Of one row of each of the batches.
        count: The number of lanes.
        *batches: Tensors, shape ``(count, *)``, or dictionaries of them.
    """

    def one(lane: Tensor, *rows: Tensor | dict[str, Tensor]) -> _T:
        with DrawnInLanes(lane):
            return function(*rows)

    return torch.func.vmap(one, randomness="different")(torch.zeros(count), *batches)


def check_rows_count(nodes: Nodes) -> None:
    """Raise a ValueError unless each row of a run counts, and once: a flow given data sees all.

    Args:
        nodes: The sites of a run of the model.
    """
    plates = subsampling_plates(nodes)
    if plates:
        raise ValueError(
            f"expected a model that sees all its data, got plates {plates} that subsample: the "
            "posterior given some rows is another one"
        )
    sites = {k: n for k, n in nodes.items() if is_sampled(n) and OWN_FACTOR not in n["infer"]}
    masked = [name for name, node in sites.items() if _is_masked(node)]
    if masked:
        raise ValueError(
            f"expected sites without a mask, got {masked} with rows masked out, which a guide "
            "given the data would take for seen: let a deterministic site hold the data, with "
            "zeros where there are none, and the mask beside them, and observe that"
        )
    scaled = [name for name, node in sites.items() if _is_scaled(node)]
    if scaled:
        raise ValueError(
            f"expected sites that count once, got {scaled} scaled, which simulations do not show: "
            "write the model without poutine.scale"
        )


def _is_masked(node: Site) -> bool:
    """Return whether rows of a site are masked out, in the model or in its distribution."""
    masks, fn = [node["mask"]], node["fn"]
    while fn is not None:
        masks.append(getattr(fn, "_mask", None))
        fn = getattr(fn, "base_dist", None)
    return any(mask is not None and not bool(torch.as_tensor(mask).all()) for mask in masks)


def _is_scaled(node: Site) -> bool:
    """Return whether rows of a site count more or less than once."""
    scale = node["scale"]  # of most sites a number, which is looked at faster
    return bool((scale != 1).any()) if isinstance(scale, Tensor) else scale != 1


def example_of(
    model: Model,
    observed: Sequence[str],
    *,
    nodes: Nodes | None = None,
    given: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return the sampled and observed sites of one simulation of a model, always of one seed.

    Beside the value of a sampled site is its log density, if it has one: coins, whose draws are
    a few values, fall alike where their probabilities do not.

    Args:
        model: The model.
        observed: Its observed sites. Others keep their values where all of these are sampled.
        nodes: The sites of a run of it, if there was one.
        given: Values of sampled sites, which are not drawn then.
    """
    with seeded(0):
        nodes = nodes_of(model) if nodes is None else nodes
    drawn = observed if all(is_sampled(nodes[name]) for name in observed) else None
    found = {}
    with seeded(0), torch.no_grad():
        nodes = nodes_of(poutine.condition(Unobserved(drawn)(model), dict(given or {})))
        for name, node in nodes.items():
            if is_sampled(node) or name in observed:
                found[name] = node["value"]
            if is_sampled(node):
                with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                    found[_DENSITY + name] = node["fn"].log_prob(node["value"])
    return found


def is_alike(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether sites of two simulations have the same values and log densities.

    In another type, such as the default one, draws of a seed are others: nobody knows. Plates may
    be in other places: outer ones push them to the left.
    """

    def agree(name: str) -> bool:
        a, b = one[name], other[name]
        if a.dtype != b.dtype:
            return True
        rtol = _DENSITY_RTOL if name.startswith(_DENSITY) else _VALUE_RTOL
        return a.numel() == b.numel() and are_close(a.flatten(), b.flatten(), rtol)

    return one.keys() == other.keys() and all(map(agree, one))


def tell_of_others(
    model: Model, nodes: Nodes, observed: Sequence[str], example: Mapping[str, Tensor]
) -> None:
    """Warn where a model makes other simulations than that which a guide learned from.

    Where observed sites are deterministic and hold one of several arguments that have changed,
    nobody knows of the others.

    Args:
        model: The model, with its arguments.
        nodes: The sites of a run of it.
        observed: Its observed sites.
        example: What :func:`example_of` gave of the other.
    """
    found = example_of(model, observed, nodes=nodes)
    is_other = not is_alike(found, example)
    seen = {name: example[name] for name in observed if not is_sampled(nodes[name])}
    same_sizes = all(found[k].numel() == v.numel() for k, v in example.items() if k in found)
    if is_other and seen and same_sizes:
        # Deterministic sites may hold arguments, which then are data, and the same draws give
        # others of them: where they do not, the guide is not given what has changed.
        draws = {k: v for k, v in example.items() if k in nodes and is_sampled(nodes[k])}
        again = example_of(model, observed, nodes=nodes, given=draws)
        is_other = is_alike({name: again[name] for name in seen}, seen)
    if is_other:
        warn_user(
            "the arguments of the model make other simulations than those of its training: "
            "the guide knows the data at its observed sites alone, and its posterior is that "
            "of the model it was trained with. Let the model draw what changes, and observe "
            "it too, by a deterministic site: AmortizedInterpolant(model, ('y', 'x'))"
        )


def plate_nesting(nodes: Nodes) -> int:
    """Return how many dimensions the plates of a run take, from the right."""
    frames = (frame for node in nodes.values() for frame in node.get("cond_indep_stack", ()))
    return max((-frame.dim for frame in frames if frame.vectorized), default=0)


def data_of(nodes: Nodes, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Return the data at observed sites of a run, ``(*, *site_shape)`` each.

    Args:
        nodes: The sites of the run.
        shapes: The shapes of the observed ones.
    """
    found = {}
    for name, shape in shapes.items():
        value, fn = as_tensor(nodes[name]["value"], name), nodes[name]["fn"]
        is_short = value.dim() < len(shape)  # of an observation that broadcasts
        found[name] = value.expand(fn.batch_shape + fn.event_shape) if is_short else value
    return found


def check_data(nodes: Nodes, latents: Mapping[str, object], observed: Sequence[str]) -> None:
    """Raise a ValueError unless a run has data at all sites that are not latent."""
    drawn = [name for name, n in nodes.items() if is_sampled(n) and not n["is_observed"]]
    missing = [name for name in drawn if name not in latents]
    missing += [name for name in observed if name not in nodes]
    if missing:
        raise ValueError(
            f"expected data at all sites but the latent ones, got none at {missing}: give "
            "them in the arguments, guide(y), condition the model on them, or use "
            "guide.condition(y=y)"
        )


def check_reached(nodes: Nodes, names: Iterable[str]) -> None:
    """Raise a ValueError unless a run has all sites that earlier ones had.

    Args:
        nodes: The sites of the run.
        names: Those that are to be there.
    """
    gone = [name for name in names if name not in nodes]
    if gone:
        raise ValueError(
            f"expected the sites the guide has seen in each run, got one of a model without {gone}"
            ": set up a new guide with these arguments, guide(*args); or, where the model returns "
            "before it draws them, depending on what it drew, let it draw them first"
        )


def check_names(nodes: Nodes, latents: Mapping[str, object], observed: Sequence[str]) -> None:
    """Raise a ValueError unless what is observed is in a model, beside its latent sites."""
    there = [
        name
        for name, node in nodes.items()
        if node["type"] == "sample" and not is_subsample(node) and name not in latents
    ]
    missing = [name for name in observed if name not in there]
    if missing:
        raise ValueError(
            f"expected observed sites that the model has, got {missing}: it has {there}, and the "
            f"latent ones {list(latents)}. Pass AmortizedInterpolant(model, observed=(...))"
        )


def check_drawn(nodes: Nodes, observed: Sequence[str], run: Callable[[], Nodes]) -> None:
    """Raise a ValueError where a reparametrised site is observed and keeps the data it was given.

    Those that take its place are drawn, but not made into values of it.

    Args:
        nodes: The sites of a run of a model that draws its data.
        observed: The names of the observed sites.
        run: Returns those of another run.
    """
    made = [
        name
        for name in observed
        if not (is_sampled(nodes[name]) or nodes[name]["infer"].get("_deterministic"))
    ]
    again = run() if made else nodes
    kept = [name for name in made if torch.equal(nodes[name]["value"], again[name]["value"])]
    if kept:
        raise ValueError(
            f"expected observed sites that are drawn, got {kept} reparametrised, which keep the "
            "data in the arguments: leave them out of poutine.reparam"
        )


def flattened(data: Mapping[str, Any], shapes: Mapping[str, torch.Size], like: Tensor) -> Tensor:
    """Return data of observed sites, flattened and joined, shape ``(*, C)``.

    Args:
        data: Each site, ``(*, *site_shape)``.
        shapes: The shapes of the sites, in their order.
        like: A tensor of the type and on the device of the result.

    Raises:
        ValueError: If a site is missing, unknown, of another shape or not finite.
    """
    if set(data) != set(shapes):
        raise ValueError(f"expected data of the observed sites {list(shapes)}, got {sorted(data)}")
    parts = []
    for name, shape in shapes.items():
        value = as_tensor(data[name], name)
        batch = value.dim() - len(shape)
        if batch < 0 or value.shape[batch:] != shape:
            want = ", ".join(("*", *map(str, shape)))
            raise ValueError(
                f"expected data of site {name!r} of shape ({want}), as they were simulated, "
                f"got {tuple(value.shape)}"
            )
        value = value.to(like)
        if not bool(value.isfinite().all()):
            raise ValueError(
                f"expected finite data in {like.dtype}, got others at site {name!r}: where "
                "data may be missing, observe a deterministic site that holds zeros there, "
                "and a mask"
            )
        parts.append(value.reshape(*value.shape[:batch], shape.numel()))
    batch_shape = broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*batch_shape, -1) for part in parts], -1)
