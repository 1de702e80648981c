"""Runs programs in forks of this process, which has imported what most of them import.

It reads a line of JSON for each, the arguments of :func:`fork`, and writes a line with its exit
status. Where a program starts others, or itself, in processes of their own, these are forks of it.
What it is to have imported can be given as its arguments. :func:`forks` starts it.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
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
SECONDS = 900  # the longest that a program may take, on a machine however busy
STARTED = []  # the processes that a program has started


def become(program, *arguments):
    """Run a program in place of this process, and end."""
    signal.alarm(SECONDS)
    # What was left to do at the end of the process before is not for this one to do.
    atexit._clear()
    STARTED.clear()
    sys.stdin = open(0, closefd=False)
    sys.argv, sys.path[0], code = [program, *arguments], os.path.dirname(program), 0
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    for process in STARTED:  # which may still read, and write what is asked for
        if process.stdin:
            process.stdin.close()
        process.wait()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Fork(subprocess.Popen):
    """A process that, where it is to run a file of Python, is a fork of this one."""

    def __init__(self, command, **options):
        def instead():
            # All but the standard three: the other side waits for one of them to be closed.
            os.closerange(3, os.sysconf("SC_OPEN_MAX"))
            environment = options.get("env")
            if environment is not None:
                os.environ.clear()
                os.environ.update(environment)
            become(*command[1:])

        is_program = len(command) > 1 and str(command[1]).endswith(".py")
        # jax has threads, and no fork has those.
        if is_program and command[0] == sys.executable and "jax" not in sys.modules:
            sys.stdout.flush()
            sys.stderr.flush()
            options["preexec_fn"] = instead
        super().__init__(command, **options)
        STARTED.append(self)


def fork(program, arguments, cwd, output, errors):
    """Run a program in a fork, and return its exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.chdir(cwd)
    for number, path in ((1, output), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    return become(program, *arguments)


@contextlib.contextmanager
def forks(environment, *imported):
    """Start a process that forks; the function that this gives runs a program in a fork of it.

    Args:
        environment: What programs find in theirs beside what there is.
        *imported: The names of the modules that are imported once for all.
    """
    command = [sys.executable, os.path.abspath(__file__), *imported]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env={**os.environ, **environment}, **pipes) as parent:

        def run(**told):
            """Return the exit status of a program; the arguments are those of :func:`fork`."""
            print(json.dumps(told), file=parent.stdin, flush=True)
            return int(parent.stdout.readline())

        yield run


if __name__ == "__main__":
    for name in sys.argv[1:] or IMPORTED:
        importlib.import_module(name)
    import torch
    from narrow import small_runs

    from pyro_interpolant import Trigonometric

    Trigonometric().derivatives(torch.zeros(1))  # the first of a process imports a compiler
    small_runs()  # programs are asked for smoke runs, and scripts compare equal runs
    # Beside an accelerator, what has computed a gradient has threads, which no fork has.
    if not torch.accelerator.is_available():
        subprocess.Popen = Fork
    for line in sys.stdin:
        print(fork(**json.loads(line)), flush=True)
