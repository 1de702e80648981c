"""What jax is told before it is there: to compile cheaply, and each program once in a run.

Most of the time of what is compiled for a few calls is compiling.
"""

import importlib.util
import mmap
import os
from pathlib import Path

_FLAGS = {
    "xla_cpu_use_fusion_emitters": "false",  # the newer of two generators of code; twice as slow
    "xla_cpu_parallel_codegen_split_count": "1",  # parts, of which each has its own overhead
}


def settings(folder):
    """Return the environment of a run, for its workers and the programs that they start, too.

    Args:
        folder: Where compiled programs are kept, unless a folder is known already.
    """
    flags = [os.environ.get("XLA_FLAGS", "")]
    flags += [f"--{name}={value}" for name, value in _FLAGS.items() if _is_known(name)]
    return {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder)),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": " ".join(flags),
    }


def _is_known(flag):
    """Return whether the jaxlib that is installed has a flag: an unknown one ends the process."""
    found = importlib.util.find_spec("jaxlib")
    for root in found.submodule_search_locations if found else ():
        for path in Path(root).glob("libjax_common*"):
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as code:
                return code.find(f"\0{flag}\0".encode()) >= 0
    return False
