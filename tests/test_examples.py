"""Every example runs from start to end, in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = sorted(
    {path.name for path in EXAMPLES.glob("*.py")}
    | {"score_sde.py", "stellar_distances.py", "svi_guide.py", "two_moons.py"}
)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs_and_draws_its_picture(name, tmp_path):
    # One thread, as the tests beside it: more would only wait for one another.
    environment = {"MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), "--smoke"],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pictures = list(tmp_path.glob("*.png"))
    assert [p.name for p in pictures] == [name.replace(".py", ".png")]
    assert pictures[0].stat().st_size > 5000
    assert done.stdout.strip()


@pytest.mark.parametrize("name", NAMES)
def test_the_example_is_short(name):
    assert len((EXAMPLES / name).read_text().splitlines()) <= 150
