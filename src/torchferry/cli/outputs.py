"""Looking at where a file will go before the work that fills it."""

from __future__ import annotations

import os
from pathlib import Path

from torchferry.core.errors import OutputError


def check_output_file(path: str) -> Path:
    """Return the path if a file may be written there; what is there now may be replaced.

    Raises:
        OutputError: If its folder does not exist or cannot be written, or a folder is in the way.
    """
    file = Path(path)
    if file.is_dir():
        raise OutputError(f"cannot write '{file}': it is a folder", hint="give a file's name")
    if not file.parent.is_dir():
        raise OutputError(f"cannot write '{file}': there is no folder '{file.parent}'", hint="make it first")
    if not os.access(file.parent, os.W_OK | os.X_OK):
        raise OutputError(f"cannot write '{file}': permission denied in '{file.parent}'", hint="choose another folder")
    return file
