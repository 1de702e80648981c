"""Runs programs in forks of this process, which has imported what most of them import.

It reads a line of JSON for each, the arguments of :func:`become`, and writes a line with its exit
status.
"""

import atexit
import importlib
import json
import os
import runpy
import signal
import sys
import traceback

IMPORTED = (
    "pyro_interpolant.infer",
    "pyro_interpolant.training",
    "matplotlib.pyplot",
    "sklearn.mixture",
    "sklearn.model_selection",
    "sklearn.neural_network",
    "torch._dynamo",  # by the first optimiser of a process
)


def become(program, arguments, cwd, output, errors, seconds):
    """Run a program in place of this process, and end."""
    os.chdir(cwd)
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    signal.alarm(seconds)
    sys.argv, sys.path[0], code = [program, *arguments], os.path.dirname(program), 0
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
