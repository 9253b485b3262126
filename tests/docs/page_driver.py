"""Runs the blocks of one page in order, Python in one namespace, shell commands beside it; a program of its own.

Usage: python page_driver.py STEPS.json RESULT.json, where STEPS is a list of {language, text, page, line}. RESULT gets
the output of every step that ran; the exit status is that of the step that failed.
"""

import contextlib
import io
import json
import subprocess
import sys
import traceback
from pathlib import Path


def main() -> int:
    steps = json.loads(Path(sys.argv[1]).read_text())
    sys.path.insert(0, "")
    namespace = {"__name__": "__main__"}
    outputs: list[str] = []
    status = 0
    for step in steps:
        output = io.StringIO()
        if step["language"] == "bash":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", step["text"]],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                text=True,
                check=False,
            )
            output.write(done.stdout)
            status = done.returncode
        else:
            # Empty lines before it, so that errors and provenance name the page's own line.
            source = "\n" * (step["line"] - 1) + step["text"]
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                try:
                    exec(compile(source, step["page"], "exec"), namespace)
                except Exception:  # noqa: BLE001 - a page may raise anything
                    traceback.print_exc()
                    status = 1
        outputs.append(output.getvalue())
        if status:
            break
    Path(sys.argv[2]).write_text(json.dumps(outputs))
    return status


if __name__ == "__main__":
    sys.exit(main())
