"""What the benchmarks keep: a JSON line for each finished cell, which a rerun skips."""

import json

_TRIAL_STEPS = 200


def steps_in(seconds, train):
    """Return how many steps of a training take so long, by the pace of a short one.

    Args:
        seconds: The time.
        train: From a number of steps to a trained distribution.
    """
    pace = train(_TRIAL_STEPS).report.seconds / _TRIAL_STEPS
    return max(_TRIAL_STEPS, int(seconds / pace))


class Cells:
    """Finished cells, one JSON line each, known by all that was asked of them.

    What a line does not tell was not asked: it counts as None. A line of an earlier version that
    lacks a setting is no answer, for nobody knows what the setting was.
    """

    def __init__(self, path):
        """Read the lines of a file; with None they are kept in memory alone."""
        self.path, self.lines = path, []
        if path is not None and path.exists():
            self.lines = [json.loads(text) for text in path.read_text().splitlines()]

    def find(self, asked):
        """Return the newest line of which the same was asked, or None."""
        for line in reversed(self.lines):
            if all(line.get(name) == value for name, value in asked.items()):
                return line
        return None

    def add(self, asked, found):
        """Append the line of a finished cell, and return it."""
        if both := asked.keys() & found.keys():  # the next run would not find what it asked
            raise ValueError(f"asked and found have names in common: {sorted(both)}")
        self.lines.append(asked | found)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")
        return self.lines[-1]
