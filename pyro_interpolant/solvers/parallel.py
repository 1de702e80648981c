"""Blocks of rows side by side: one thread of Python for each core.

Rows of a solve never meet, so blocks of them may run at once. Torch's own threads share each of
the thousands of small operations of a solve instead, and at its end all wait for the last: two
gain less than blocks side by side do, and where another process keeps a core busy, they take
several times as long as one.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import nn

from ..nn.velocity import image_shape

_Found = TypeVar("_Found")
_GIVEN: list[int] = []  # torch's numbers of threads around scopes of one


def threads_at_once() -> int:
    """Return how many blocks may run at once: as many as the caller has given torch threads.

    In another thread of Python one, for torch gives each of these as many threads.
    """
    if not is_main_thread():
        return 1
    return _GIVEN[0] if _GIVEN else torch.get_num_threads()


def is_main_thread() -> bool:
    """Return whether this is Python's main thread, which alone sets torch's number of threads."""
    return threading.current_thread() is threading.main_thread()


def side_by_side(
    function: Callable[..., _Found], blocks: Iterable[tuple[object, ...]], *, threads: int
) -> list[_Found]:
    """Return a function's values at the arguments in each block, so many at once.

    Args:
        function: What needs no graph, draws by seeds of its own alone and keeps nothing between
            calls.
        blocks: The arguments of each call.
        threads: How many calls run at once, each on one core; one takes all that torch has.
    """
    if threads == 1:
        return [function(*block) for block in blocks]
    is_inference = torch.is_inference_mode_enabled()

    def call(block: tuple[object, ...]) -> _Found:
        with torch.inference_mode(is_inference), torch.no_grad():
            return function(*block)

    with threads_restored():
        torch.set_num_threads(1)  # which threads to come take over
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(call, blocks))


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Compute each operation on one thread, but for steps and blocks side by side.

    Work on all rows, of many short operations, gains little by more threads, and beside a busy
    process takes many times as long.
    """
    if not is_main_thread():
        yield
        return
    _GIVEN.append(torch.get_num_threads())
    try:
        with threads_restored():
            torch.set_num_threads(1)
            yield
    finally:
        _GIVEN.pop()


@contextlib.contextmanager
def threads_for(network: nn.Module) -> Iterator[None]:
    """Compute steps of a network on one thread, or on all where they are of images.

    Convolutions gain by each core. Layers of some hundred units gain a fifth by a second one, and
    where another process keeps a core busy they take up to a hundred times as long on both.
    """
    with threads_restored():
        if is_main_thread() and image_shape(network) is not None:
            torch.set_num_threads(threads_at_once())
        yield


@contextlib.contextmanager
def threads_restored() -> Iterator[None]:
    """Leave torch's number of threads as it was before."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
