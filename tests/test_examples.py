"""Every example and every benchmark runs from start to end, in a process of its own.

All but two examples do so for a release alone.
"""

import importlib.util
from pathlib import Path

import pytest
from forking import forks

ROOT = Path(__file__).parent.parent
EXAMPLES, BENCHMARKS = ROOT / "examples", ROOT / "benchmarks"
NAMES = sorted(
    {path.name for path in EXAMPLES.glob("[a-z]*.py")}
    | {"score_sde.py", "stellar_distances.py", "svi_guide.py", "two_moons.py"}
)
FOR_ALL = ("svi_guide.py", "two_moons.py")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a program in a folder, and return what it prints.

    Its process is a fork of one that has imported torch and Pyro, which takes seconds.
    """
    # One thread, as the tests beside it: more would only wait for one another.
    environment = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    written = tmp_path_factory.mktemp("written")

    def run(program, *arguments, cwd):
        skip_without(program)
        name = f"{program.parent.name}-{program.stem}"
        output, errors = written / f"{name}.out", written / f"{name}.err"
        told = {"program": str(program), "arguments": arguments, "cwd": str(cwd)}
        told |= {"output": str(output), "errors": str(errors)}
        code = process(**told)
        assert code == 0, f"exit status {code}: {errors.read_text()[-3000:]}"
        return output.read_text()

    with forks(environment) as process:
        yield run


def skip_without(program):
    """Skip a program whose package is not there."""
    if program.stem.startswith("numpyro") and importlib.util.find_spec("numpyro") is None:
        pytest.skip("needs NumPyro")
    if program.stem.startswith("images") and importlib.util.find_spec("diffusers") is None:
        pytest.skip("needs diffusers")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in FOR_ALL else pytest.mark.release)
        for name in NAMES
    ],
)
def test_the_example_runs_and_draws_its_picture(name, run, tmp_path):
    output = run(EXAMPLES / name, "--smoke", cwd=tmp_path)
    pictures = list(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == [name.replace(".py", ".png")]
    assert pictures[0].stat().st_size > 5000
    assert output.strip()


@pytest.mark.release
@pytest.mark.parametrize("name", [path.name for path in sorted(BENCHMARKS.glob("[a-z]*.py"))])
def test_the_benchmark_runs(name, run, tmp_path):
    # Peers that are not installed are left out of its tables.
    arguments = ["--kills", "1"] if name == "kill_resume.py" else ["--smoke"]
    assert run(BENCHMARKS / name, *arguments, cwd=tmp_path).strip()
