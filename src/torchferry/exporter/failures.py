"""Wording what went wrong inside torch so that it names the user's line."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING

import torch

from torchferry.core.errors import ExportError, ModelError, TorchferryError
from torchferry.graph.provenance import is_library, user_line

if TYPE_CHECKING:
    from torchferry.exporter.source import Source

_MAX_LINES = 6


def export_error(exc: Exception, source: Source) -> TorchferryError:
    """Word a failure of torch.export or torch.onnx.

    Returns:
        A ``ModelError`` if the module fails on its example in plain PyTorch as well, else an ``ExportError``.
    """
    try:
        with torch.no_grad():
            source.model(*source.call[0], **source.call[1])
    except Exception as own:  # noqa: BLE001 - whatever the user's forward raises
        return ModelError(
            f"the model fails on its own example in PyTorch, before any export: {type(own).__name__}: {own}",
            where=users_frames(own),
            hint="make model(*inputs) work first",
        )
    root = _root(exc)
    where = users_frames(root) or users_frames(exc) or user_line(str(exc)) or None
    return ExportError(
        f"torch cannot export {type(source.model).__name__}: {_first_lines(str(root) or type(root).__name__)}",
        where=where,
        hint="change this line so that it does not depend on tensor values, or keep it out of what is exported",
    )


def users_frames(exc: BaseException) -> str | None:
    """Return the innermost line of a traceback that is the user's, as ``file:line in function: code``."""
    own = [f for f in traceback.extract_tb(exc.__traceback__) if not is_library(f.filename) and f.line]
    # The outermost own frame is usually the script that called us; it is kept only if nothing is deeper.
    for frame in reversed(own):
        return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return None


def _root(exc: BaseException) -> BaseException:
    """Follow ``__cause__`` to where it started."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return exc


def _first_lines(text: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[:_MAX_LINES])
