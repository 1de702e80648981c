"""The blocks of the README and of the pages of the site."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(path, kinds=("python",)):
    """The line of each block, and its source."""
    text = path.read_text()
    for match in FENCE.finditer(text):
        if match.group(1) in kinds:
            yield text[: match.start()].count("\n") + 1, match.group(2)
