"""Wording what went wrong inside torch so that it names the user's line."""

from __future__ import annotations

import re
import traceback
from typing import TYPE_CHECKING

import torch

from torchferry.core.errors import ExportError, ModelError, TorchferryError
from torchferry.exporter.missing import is_operator_missing, operator_error
from torchferry.exporter.quiet import quiet
from torchferry.graph.provenance import is_library, user_line

if TYPE_CHECKING:
    from torchferry.exporter.source import Source
    from torchferry.exporter.table import Translations

_MAX_LINES = 6
_HINT = "change this line so that it does not depend on tensor values, or keep it out of what is exported"
# Torch's words for a number in a tensor that Python needs at once.
_NEEDS_A_NUMBER = ("data-dependent expression", "is not supported for tensor subclasses")
_NEEDS_A_NUMBER_HINT = (
    "what a tensor holds is not known while exporting, and would be fixed in the graph: take a number out by .item() "
    "or .tolist() and hand it on as it is, without int(), float() or a comparison; or write this step as an "
    "autograd.Function with a symbolic"
)
_BRANCHES = re.compile(r"\b(if|elif|while|and|or|not|assert)\b")
_BRANCHES_HINT = (
    "for a branch on how large values are, as on x.abs().max() > 65504, run the model on real inputs beforehand under "
    "ferry.fp16.watch, save its report() as watch.json, export with cfg={'watch': 'watch.json'}, and decide in a "
    "rewriter from ferry.fp16.WatchReport.load(ctx.cfg['watch'])"
)
_NO_FAKE = "no fake impl registered"  # torch's words for an operator that it cannot trace
_NO_FAKE_HINT = "register one that returns an empty tensor of the right dtype and sizes"
_NODE = re.compile(r"translating node %(\w+) ")


def export_error(
    exc: Exception,
    source: Source,
    program: torch.export.ExportedProgram | None = None,
    *,
    opset: int | None = None,
    translations: Translations | None = None,
) -> TorchferryError:
    """Word a failure of torch.export or torch.onnx.

    Args:
        exc: What was raised.
        source: The model and its example.
        program: The traced program, where tracing worked and translating failed.
        opset: The opset that was asked for; torch's default if None.
        translations: What went before torch's own translations; ``TRANSLATIONS`` if None.

    Returns:
        A ``ModelError`` if the module fails on its example in plain PyTorch as well; an ``OperatorError`` if operators
        have no translation; else an ``ExportError``.
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
    if program is not None and (is_operator_missing(root) or is_operator_missing(exc)):
        lacking = operator_error(program, type(source.model).__name__, opset, translations)
        if lacking is not None:
            return lacking
    where = users_frames(root) or users_frames(exc) or _node_line(exc, program)
    return ExportError(
        f"torch cannot export {type(source.model).__name__}: {_first_lines(str(root) or type(root).__name__)}",
        where=where,
        hint=_hint(str(root), where or ""),
    )


def _hint(message: str, where: str) -> str:
    if _NO_FAKE in message:
        return _NO_FAKE_HINT
    if not any(words in message for words in _NEEDS_A_NUMBER):
        return _HINT
    line = where.partition(": ")[2]
    return f"{_NEEDS_A_NUMBER_HINT}; {_BRANCHES_HINT}" if _BRANCHES.search(line) else _NEEDS_A_NUMBER_HINT


def users_frames(exc: BaseException) -> str | None:
    """Return the innermost line of a traceback that is the user's, as ``file:line in function: code``."""
    own = [f for f in traceback.extract_tb(exc.__traceback__) if not is_library(f.filename) and f.line]
    # The outermost own frame is usually the script that called us; it is kept only if nothing is deeper.
    for frame in reversed(own):
        return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    return None


def _node_line(exc: BaseException, program: torch.export.ExportedProgram | None) -> str | None:
    """Return the user's line of the node that torch.onnx says it could not translate."""
    named = _NODE.search(str(exc))
    if program is None or named is None:
        return None
    # torch.onnx decomposes before it translates, so the node may be one that the traced graph does not have yet.
    nodes = list(program.graph.nodes)
    try:
        with quiet():
            nodes += program.run_decompositions().graph.nodes
    except Exception:  # noqa: BLE001 - decomposing may be what failed; the traced nodes are left to search
        nodes = list(program.graph.nodes)
    stacks = [node.meta.get("stack_trace") for node in nodes if node.name == named[1]]
    return next((line for line in map(user_line, filter(None, stacks)) if line), None)


def _root(exc: BaseException) -> BaseException:
    """Follow ``__cause__`` to where it started."""
    while exc.__cause__ is not None:
        exc = exc.__cause__
    return exc


def _first_lines(text: str) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[:_MAX_LINES])
