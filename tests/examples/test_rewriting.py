"""The example rewrites for one engine and leaves the other, and the models, alone."""

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "rewriting"


def test_it_prints_what_its_readme_shows():
    done = subprocess.run([sys.executable, EXAMPLE / "rewrite.py"], capture_output=True, text=True, check=True)
    assert done.stdout in (EXAMPLE / "README.md").read_text()
    lines = done.stdout.splitlines()
    assert lines[1] == lines[5] == "  rewritten: nothing"
    assert "Unsqueeze" in lines[2]
    assert "Resize" in lines[4]
    assert "Resize" not in lines[6]
    assert lines[-1] == "the model afterwards: SRCNN with Upsample"
