r"""From a file to NumPyro's distribution, without torch.

A file holds names and numbers, see :mod:`pyro_interpolant.io`. Each part is looked up, its arrays
checked against their description, and what has no twin here is refused by its name.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from numpy.typing import NDArray
from numpyro.distributions import Distribution, ExpandedDistribution, TransformedDistribution
from numpyro.distributions.transforms import Transform

from .._files import MAX_COUNT, PROBES, below
from ..io import StrPath, read
from .bases import build_base, standard_normal
from .distributions import (
    ConditionalInterpolantDistribution,
    InterpolantDistribution,
    JointInterpolantDistribution,
)
from .flow import Grid, check_grid
from .frozen import Frozen
from .mlp import expected_shapes
from .supports import Bijection, check_size, is_real, text_of
from .transforms import InterpolantTransform, Whiten

if TYPE_CHECKING:
    from ..distributions.interpolant import AnyDistribution as FlowOfTorch

__all__ = ["from_torch", "load"]

_Arrays = Mapping[str, NDArray[Any]]  # by their names in a file

AnyDistribution = (
    InterpolantDistribution | ConditionalInterpolantDistribution | JointInterpolantDistribution
)
_ERRORS = (LookupError, TypeError, ValueError, AttributeError, AssertionError, OverflowError)
_TYPES = ("float16", "float32", "float64")
_WHITENINGS = {"DenseWhitening": 2, "DiagonalWhitening": 1, "ScalarWhitening": 0}  # L's dimensions


class RefusedError(ValueError):
    """A part that has no twin in NumPyro."""


def load(path: StrPath, *, dtype: DTypeLike | None = None) -> AnyDistribution:
    """Read a flow that :func:`pyro_interpolant.save` wrote, as a distribution of NumPyro.

    Its weights are frozen, as numpy's arrays. Nothing of torch is imported.

    Args:
        path: The file.
        dtype: The type of the weights, a floating one; by default that of the file. In float32 jax
            computes with float32 whatever the file holds, and says so here if no type is given.

    Returns:
        An :class:`InterpolantDistribution`, or the joint or conditional kind that was saved.

    Raises:
        OSError: If there is no such file, or it cannot be read.
        TypeError: If dtype is no floating type of numpy or jax.
        ValueError: If the file is damaged, not one of ours, of a newer format, or has a part that
            NumPyro has no twin of; the message names the part.

    Example:
        >>> import jax, pyro_interpolant as pi
        >>> prior = pi.InterpolantDistribution(pi.interpolant_transform(2))
        >>> pi.save(prior, "prior.safetensors")
        >>> again = load("prior.safetensors")
        >>> again.log_prob(again.sample(jax.random.key(0), (10,))).shape
        (10,)
    """
    if dtype is not None and not _is_floating(dtype):
        raise TypeError(f"expected dtype of a floating type, such as 'float32', got {dtype!r}")
    header, arrays = read(path)
    try:
        distribution = _built(header, arrays, dtype)
    except RefusedError as error:
        raise ValueError(f"{path} cannot be read for NumPyro: {error}") from error
    except _ERRORS as error:
        raise ValueError(
            f"{path} is damaged, was edited, or cannot be read for NumPyro: {error!r}"
        ) from error
    if dtype is None:
        _warn_if_shortened(header, f"{path} holds", "load with dtype='float32' to say that it may")
    return distribution


def _is_floating(dtype: Any) -> bool:
    """Return whether something names a floating type of numpy or jax."""
    try:
        return jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:  # it names none
        return False


def from_torch(distribution: "FlowOfTorch") -> AnyDistribution:
    """Return the twin of a flow of torch's, as :func:`load` gives it, without a file.

    Args:
        distribution: A flow that owns its weights; needs torch.

    Raises:
        TypeError: If it is no distribution of this package.
        ValueError: If no file could hold it, or NumPyro has no twin of a part.

    Example:
        >>> import pyro_interpolant as pi
        >>> from_torch(pi.InterpolantDistribution(pi.interpolant_transform(2))).event_shape
        (2,)
    """
    from ..distributions.description import describe

    header, tensors = describe(distribution)
    remedy = "convert the flow, .to(torch.float32)"
    _warn_if_shortened(header, "the flow is of", remedy)
    try:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    except TypeError as error:
        raise ValueError(
            f"expected tensors of types that numpy has, got others ({error}): {remedy}"
        ) from error
    return _built(header, arrays, None)


def _warn_if_shortened(header: Mapping[str, Any], what: str, remedy: str) -> None:
    """Warn where jax computes in float32 what is of float64."""
    if header["dtype"] == "float64" and jnp.result_type(float) != np.float64:
        warnings.warn(
            f"{what} float64, jax computes in float32: {remedy}, or set "
            "jax.config.update('jax_enable_x64', True) and load again",
            stacklevel=3,
        )


def _built(header: Mapping[str, Any], arrays: _Arrays, dtype: DTypeLike | None) -> AnyDistribution:
    """Return the distribution of a header and its arrays."""
    if dtype is not None:
        arrays = {k: v.astype(dtype) if v.dtype.kind == "f" else v for k, v in arrays.items()}
    transform = InterpolantTransform(_weights(header, arrays, dtype), _grid(header["solver"]))
    description = header["support"]
    base, before = _base(header, below("base.", arrays), transform, dtype)
    after = [] if is_real(description) else [Bijection(text_of(description))]
    _check_support(header, transform)
    chain = [*before, transform, *after]
    kind = header["class"]
    if kind in ("ConditionalInterpolantDistribution", "ConditionalJointInterpolantDistribution"):
        if not transform.context_dim:
            raise ValueError("expected a conditional flow to have contexts")
        sites = header["sites"] if "Joint" in kind else ()
        names = header.get("context_columns", [])
        if type(names) is not list or any(type(name) is not str for name in names):
            raise ValueError(f"expected the names of columns, got {names!r}")
        return ConditionalInterpolantDistribution(base, chain, sites=sites, context_columns=names)
    if transform.context_dim:
        raise ValueError("expected a flow without contexts")
    shape = tuple(header.get("batch_shape", ()))
    if any(not isinstance(n, int) or n < 0 for n in shape):
        raise ValueError(f"expected a batch_shape of sizes, got {shape}")
    if shape != base.batch_shape:
        base = base.expand(shape)
    options: dict[str, Any] = {"validate_args": header.get("validate_args")}
    if kind == "JointInterpolantDistribution":
        return JointInterpolantDistribution(base, chain, sites=header["sites"], **options)
    if kind != "InterpolantDistribution":
        raise RefusedError(f"it is a {kind}")
    return InterpolantDistribution(base, chain, **options)


def _base(
    header: Mapping[str, Any],
    arrays: _Arrays,
    transform: InterpolantTransform,
    dtype: DTypeLike | None,
) -> tuple[Distribution, list[Transform]]:
    """Return what a flow starts from, and the map that whitens it if there is one."""
    description, size = header["base"], transform.event_dim
    if description is None and header["support"] == "circular":
        description = {"uniform_torus": True}
        arrays = {"origin": np.zeros(size, transform.weights["loc"].dtype)}
    if description is None:
        return standard_normal(size, transform.weights["loc"].dtype), []
    if "flow" in description:
        base: Distribution = _built(description["flow"], arrays, dtype)
        if not isinstance(base, InterpolantDistribution):
            raise ValueError("expected a base without contexts")
    else:
        base = build_base(description, arrays)
        if isinstance(base, TransformedDistribution):
            # Its transforms would be joined to the flow's, and its own support be forgotten.
            base = ExpandedDistribution(base, base.batch_shape)
    if base.event_shape != (size,):
        raise ValueError(f"expected a base of event shape ({size},), got {base.event_shape}")
    return base, [Whiten(transform.weights)]


def _weights(header: Mapping[str, Any], arrays: _Arrays, dtype: DTypeLike | None) -> Frozen:
    """Return the weights of a flow, of the shapes and the type that its header says.

    Raises:
        RefusedError: If its velocity or divergence is one of the user's own, or of bfloat16.
        ValueError: If an array is missing, superfluous or of another shape or type.
    """
    name, arguments, size = header["velocity"], header["arguments"], header["dim"]
    if arguments is None or name not in ("VelocityMLP", "TorusMLP"):
        raise RefusedError(f"its velocity is a {name}, a network of which jax has no twin")
    event_dim, hidden_dims, context_dim, classes = (*arguments, 0)[:4]
    if not all(type(n) is int for n in (event_dim, *hidden_dims, context_dim, classes)):
        raise ValueError(f"expected sizes as arguments of the velocity, got {arguments}")
    if event_dim != size:
        raise ValueError(f"expected a velocity of {size} dimensions, got {event_dim}")
    periodic = name == "TorusMLP"
    shapes = expected_shapes(event_dim, hidden_dims, context_dim, classes, periodic=periodic)
    shapes = {f"velocity.{k}": shape for k, shape in shapes.items()}
    whitening = header.get("whitening", "DenseWhitening")
    shapes["loc"], shapes["linear_log_det"] = (size,), ()
    shapes["linear"] = (size,) * _WHITENINGS[whitening]
    if whitening == "DenseWhitening":
        shapes["whitening"] = (size, size)
    kind, numbers = header["divergence"]
    if kind == "HutchinsonDivergence":
        if PROBES not in arrays:
            raise RefusedError(
                "its divergence is a HutchinsonDivergence, saved before files held its probes: "
                "load it and save it again, in torch"
            )
        shapes[PROBES] = (numbers["probes"], size)
    elif kind != "ExactDivergence":
        raise RefusedError(f"its divergence is a {kind}")
    if header["dtype"] == "bfloat16":
        raise RefusedError(
            "its numbers are of bfloat16, which is for torch alone: load it there, convert it, "
            ".to(torch.float32), and save it again"
        )
    if header["dtype"] not in _TYPES:
        raise ValueError(f"expected a type among {_TYPES}, got {header['dtype']!r}")
    found = _checked(shapes, arrays, np.dtype(header["dtype"] if dtype is None else dtype))
    return Frozen({**found, "velocity.classes": np.arange(classes)} if classes else found)


def _checked(
    shapes: Mapping[str, tuple[int | None, ...]], arrays: _Arrays, dtype: np.dtype[Any]
) -> dict[str, NDArray[Any]]:
    """Return arrays of given names and shapes; others may only belong to what is not used here."""
    own = {
        k: v for k, v in arrays.items() if not k.startswith(("base.", "noise.", "interpolant."))
    }
    wrong = sorted(own.keys() ^ shapes.keys())
    if wrong:
        raise ValueError(f"expected arrays of its parts and no others, got {wrong}")
    for name, expected in shapes.items():
        found = own[name]
        sizes = zip(found.shape, expected, strict=True)
        if found.ndim != len(expected) or any(e not in (None, n) for n, e in sizes):
            raise ValueError(f"expected {name!r} of shape {expected}, got {found.shape}")
        if found.dtype != (np.int8 if name == PROBES else dtype):
            raise ValueError(f"expected {name!r} of type {dtype}, got {found.dtype}")
    return own


def _grid(description: Sequence[Any]) -> Grid:
    """Return how paths are solved.

    Raises:
        RefusedError: If the solver is none with a fixed grid.
        ValueError: If a number or the method cannot be.
    """
    name, numbers = description
    if numbers is None or name not in ("FixedGrid", "RandomGrid"):
        hint = ": pyro_interpolant.calibrate(distribution, x) sets a FixedGrid of the same error"
        raise RefusedError(f"its solver is {name}{hint if name == 'Adaptive' else ''}")
    steps = numbers["steps"]
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MAX_COUNT:
        raise ValueError(f"expected 1 to {MAX_COUNT} steps, got {steps}")
    if name == "RandomGrid":
        grid = Grid(steps, numbers["method"], seed=int(numbers["seed"]))
    else:
        grid = Grid(steps, numbers["method"], float(numbers["warp"]))
    check_grid(grid)
    return grid


def _check_support(header: Mapping[str, Any], transform: InterpolantTransform) -> None:
    """Raise a ValueError unless the support has the flow's size, and angles their flow."""
    description = header["support"]
    try:
        check_size(description, transform.event_dim)
    except _ERRORS as error:
        raise RefusedError(f"its support cannot be made: {error}") from error
    if description != "circular":
        return
    linear = transform.weights["linear"]
    identity = np.eye(transform.event_dim) if linear.ndim == 2 else np.ones(linear.shape)
    if header["velocity"] != "TorusMLP" or not np.array_equal(linear, identity):
        raise ValueError("expected a TorusMLP without whitening for angles")
