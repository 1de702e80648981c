"""``load``: edited files are refused by name, or give bit for bit what they tell."""

import copy
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import pytest
from fuzzing import end_of, lengths, run
from hypothesis import strategies as st
from kinds import KINDS, family

from pyro_interpolant import ConditionalInterpolantDistribution, io, load, save
from pyro_interpolant.distributions.description import describe
from pyro_interpolant.distributions.differences import difference

KEY = "pyro_interpolant"
VIEWS = ("given", "halfway", "start", "angles given")  # of another's weights: they have no file
OWN = ("own network",)  # of which load must be given the class
NAMES = sorted(k for k in KINDS if not k.startswith(VIEWS) and k not in OWN)
FLOWS: dict[str, Callable[[], Any]] = {**{k: KINDS[k] for k in NAMES}, "family": family}


class Saved(NamedTuple):
    """A flow's file.

    Attributes:
        header: What it says of the parts.
        tensors: Its tensors.
    """

    header: dict[str, Any]
    tensors: dict[str, Any]


@cache
def saved(name: str, folder: Path) -> Saved:
    """Return the file of a flow, and what it holds; whole and in its own class it comes back."""
    pyro.set_rng_seed(0)
    path = folder / "whole.safetensors"
    save(FLOWS[name](), path)
    header, tensors = io.read(path, framework="pt")
    assert difference(io_content(load(path)), (without_format(header), tensors)) is None
    return Saved(header, tensors)


def without_format(header: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in header.items() if k != "format"}


def io_content(flow: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a file of the flow would hold."""
    header, tensors = describe(flow)
    return json.loads(json.dumps(header)), tensors


def refusal(flow: Any, path: Path) -> str:
    """Check that the error of a load names the file, or the class to pass; return its kind."""
    assert str(path) in str(flow.error) or "pass an instance, load(path" in str(flow.error)
    return str(flow).replace(str(path), "FILE")


# ---- headers ------------------------------------------------------------------------------------

VALUES = (
    *(None, True, False, -1, 0, 1, 2, 3, 7, 0.5, -2.5, 1e9, 10**20, 1e-300),
    *("", "Normal", "FixedGrid", "Trigonometric", "float64", "float32", "nn.Module", "__class__"),
    *([], {}, [1], [[]], [2, 2], ["FixedGrid", {}], {"class": "Normal"}, {"": None}),
)


class Edit(NamedTuple):
    """A place in a header, as shares of what is there, and what comes in its place.

    Attributes:
        places: At each level which entry: as many levels as there are.
        how: What is done with the last.
        value: What comes in its place.
        other: The place of another entry, to exchange with or to copy.
    """

    places: tuple[float, ...]
    how: str
    value: Any
    other: tuple[float, ...]

    def to(self, header: dict[str, Any]) -> dict[str, Any]:
        """Return an edited copy of a header."""
        new = copy.deepcopy(header)
        inside, key = reached(new, self.places)
        if self.how == "value":
            inside[key] = copy.deepcopy(self.value)
        elif self.how == "missing":
            del inside[key]
        elif self.how == "copied":
            there, place = reached(header, self.other)
            inside[key] = copy.deepcopy(there[place])
        elif isinstance(inside[key], bool | int | float):
            inside[key] = inside[key] + self.value if isinstance(self.value, int | float) else 0
        else:
            inside[key] = str(inside[key])
        return new


def reached(header: Any, places: tuple[float, ...]) -> tuple[Any, Any]:
    """Return the container and the key at a place, no deeper than there are containers."""
    inside, key = header, None
    for place in places:
        keys = [*keys_of(inside)]
        key = keys[int(place * len(keys))]
        if not any(True for _ in keys_of(inside[key])):
            break
        inside, outer, last = inside[key], inside, key
        if place is places[-1]:
            return outer, last
    return inside, key


def keys_of(value: Any) -> Iterator[Any]:
    """Yield the keys or places of a container; none of anything else."""
    if isinstance(value, dict | list):
        yield from value if isinstance(value, dict) else range(len(value))


def agrees(found: Any, given: Any) -> bool:
    """Return whether a flow is what a header says, where it says something.

    Names that are not known say nothing, nor does what is empty, nor what is missing: a file of
    an earlier version may lack it.
    """
    if isinstance(found, dict) and isinstance(given, dict):
        return all(agrees(found[key], given[key]) for key in found if key in given)
    # Without numbers, in files of version 0.1.0, a choice is the default, with a warning.
    if isinstance(found, list) and isinstance(given, list) and len(found) == len(given):
        return given[1:] == [None] or all(map(agrees, found, given))
    return found == given or given in (None, "", [], {})


def edits() -> st.SearchStrategy[Edit]:
    """Return edits of one place of a header."""
    shares = st.floats(0, 0.999)
    places = st.lists(shares, min_size=1, max_size=5).map(tuple)
    hows = st.sampled_from(("value", "value", "missing", "copied", "added"))
    return st.builds(Edit, places, hows, st.sampled_from(VALUES), places)


def check_header(folder: Path, case: tuple[str, Edit]) -> str:
    name, edit = case
    whole, path = saved(name, folder), folder / "flow.safetensors"
    header = {**edit.to(without_format(whole.header)), "format": whole.header["format"]}
    io.write(path, whole.tensors, {KEY: json.dumps(header)})
    end = end_of(lambda: load(path))
    if end.error is not None:
        return refusal(end, path)
    found = io_content(end.answer)
    if difference(found, (without_format(whole.header), whole.tensors)) is None:
        return "the same flow, " + ("unedited" if header == whole.header else "edited")
    assert agrees(found[0], header), difference(found[0], header)
    assert difference(found[1], whole.tensors) is None
    if not isinstance(end.answer, ConditionalInterpolantDistribution):
        draws = end_of(lambda: end.answer.sample((2,)))
        shape = 2, *end.answer.batch_shape, *end.answer.event_shape
        assert draws.error is not None or draws.answer.shape == shape
    return "the flow of the edited header"


@pytest.mark.parametrize("inputs", lengths(30, 500))
def test_edited_headers(inputs, tmp_path):
    cases = st.tuples(st.sampled_from(sorted(FLOWS)), edits())
    run(lambda case: check_header(tmp_path, case), cases, inputs, "load of edited headers")
