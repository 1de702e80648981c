r"""Functions called in other processes, each call with a seed of its own.

What a call returns depends on its seed alone, and not on the process it runs in: results are the
same with any number of processes.
"""

import functools
import pickle
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import pyro
import torch

_SEEDS = 2**31  # numpy's are below 2^32
_IMPORTABLE = (
    "define the model in a module, or at the top of a script whose own work stands under "
    "`if __name__ == '__main__':`; not in another function, as a lambda or in a notebook"
)


def called_in_workers(
    function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]], num_workers: int
) -> Iterator[Any]:
    """Yield what a function returns for each of some arguments, in their order.

    The processes are new ones (spawned), each with one thread of torch. They take over its default
    type, Pyro's settings and its parameters; the seeds of the calls, for torch, numpy and
    ``random``, come from torch's generator here.

    Args:
        function: What to call; it can be pickled, and imported in another process.
        arguments: Its arguments, call by call.
        num_workers: The number of processes.

    Raises:
        ValueError: If the function cannot be pickled, or not be imported in a process.
        RuntimeError: If a call fails, with its message and the lines that led there, or a process
            ends before its time.
    """
    try:
        work = pickle.dumps(function)
    except Exception as error:  # whatever an object does when it is pickled
        raise ValueError(
            f"expected a model that can be pickled for num_workers={num_workers}, got: {error}; "
            f"{_IMPORTABLE}"
        ) from error
    params = pickle.dumps(pyro.get_param_store().get_state())
    state = torch.get_default_dtype(), pyro.settings.get(), params
    pool = ProcessPoolExecutor(num_workers, get_context("spawn"), _begin, (work, *state))
    try:
        calls = [
            pool.submit(_call, int(torch.randint(_SEEDS, ())), pickle.dumps(each))
            for each in arguments
        ]
        for call in calls:
            if isinstance(found := call.result(), Exception):
                raise found
            yield pickle.loads(found)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process ended before its time: it was killed, as for lack of memory, or the "
            f"script that it imports starts processes itself; {_IMPORTABLE}"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# In a worker.


def _begin(work: bytes, dtype: torch.dtype, settings: dict[str, Any], params: bytes) -> None:
    """Make a new process like the one it comes from."""
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    pyro.settings.set(**settings)
    pyro.get_param_store().set_state(pickle.loads(params))
    _STATE["work"] = work


def _call(seed: int, arguments: bytes) -> bytes | Exception:
    """Return what the function returns, pickled, or the error to raise where it can be read."""
    try:
        function = _loaded(_STATE["work"])
    except Exception as error:  # of any kind: an import runs the user's own lines
        text = "".join(traceback.format_exception_only(error)).strip()
        return ValueError(
            f"expected a model that a worker process can import, got: {text}; {_IMPORTABLE}"
        )
    pyro.set_rng_seed(seed)
    try:
        return pickle.dumps(function(*pickle.loads(arguments)))
    except Exception as error:
        text = "".join(traceback.format_exception(error)).strip()
        return RuntimeError(f"a simulation failed in a worker process:\n{text}")


_loaded = functools.cache(pickle.loads)
_STATE: dict[str, bytes] = {}
