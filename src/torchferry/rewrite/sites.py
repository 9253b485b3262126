"""Where a call comes from: the user's line, and whether it is torch's own bookkeeping."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._guards import CompileContext, TracingContext
from torch._ops import OpOverload
from torch.fx import traceback as fx_traceback

if TYPE_CHECKING:
    from collections.abc import Container, Hashable, Iterator
    from types import CodeType, FrameType

UNKNOWN = "unknown line"

_TORCH = os.path.dirname(torch.__file__) + os.sep  # noqa: PTH120 - compared with frames' file names, as text
_OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep  # noqa: PTH120


def _in_torch(*names: str) -> tuple[str, ...]:
    return tuple(_TORCH + name.replace("/", os.sep) for name in names)


_GENERATED = ("<eval_with_key>", "<frozen ", "<string>")
# Frames that stand between a call of a torch function and the mode that it is handed to.
_TRANSPARENT = (_OURS, "<string>", *_in_torch("overrides.py", "_ops.py", "_library/custom_ops.py"))
# Torch's machinery for tracing. What it calls for its own bookkeeping is no call of the model's.
_MACHINERY = _in_torch(
    "_decomp/", "_dynamo/", "_export/", "_functorch/_aot_autograd/", "_functorch/aot_autograd.py", "_guards.py",
    "_higher_order_ops/", "_inductor/", "_logging/", "_meta_registrations.py", "_prims/", "_prims_common/", "_refs/",
    "_subclasses/", "autograd/", "export/", "fx/experimental/", "fx/graph.py", "fx/passes/", "onnx/",
    "utils/_python_dispatch.py", "utils/_pytree.py",
)  # fmt: skip
_INTERPRETER, _PROGRAM, *_DYNAMO = _in_torch(
    "fx/interpreter.py", "export/exported_program.py", "_dynamo/utils.py", "_dynamo/eval_frame.py"
)
# Where Dynamo makes the model's calls, or runs its graph, only to learn the sizes of results.
_TRIALS = frozenset(zip(_DYNAMO, ("run_node", "result_capturing_wrapper"), strict=True))
_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')


@dataclass(frozen=True)
class Site:
    """Where a call comes from.

    Attributes:
        place: The innermost ``file:line`` that is the user's; ``UNKNOWN`` if there is none.
        counts: False for a call that Dynamo makes only to learn the size of a result.
        trace: What Dynamo is tracing and which attempt this is; None for a call that is really made.
    """

    place: str
    counts: bool = True
    trace: tuple[Hashable, int] | None = None


def is_library(file: str) -> bool:
    """Tell whether a source file is torch's, ours, or generated."""
    return file.startswith((_TORCH, _OURS, *_GENERATED))


def call_site(rewriters: Container[CodeType] = ()) -> Site:
    """Return where the call comes from that is being made.

    Args:
        rewriters: Code that is passed over, for it is not the model's.
    """
    place = None
    compiling = torch.compiler.is_compiling()
    for frame in _frames():
        code = frame.f_code
        if compiling and _is_trial(code):
            return Site(place or UNKNOWN, counts=False)
        if place is None and not is_library(code.co_filename) and code not in rewriters:
            place = f"{code.co_filename}:{frame.f_lineno}"
        elif place is None and compiling and code.co_filename == _INTERPRETER:
            # A graph is run again; its nodes remember where they came from.
            place = _user_line(_LINE.findall(fx_traceback.get_current_meta().get("stack_trace") or ""))
        if place is not None and not compiling:
            break
    return Site(place or UNKNOWN)


def traced_call_site() -> Site:
    """Return where the call comes from that Dynamo is tracing."""
    attempt = CompileContext.current_trace_id()
    lines = [(frame.filename, frame.lineno) for frame in TracingContext.extract_stack()]
    return Site(_user_line(lines), trace=(attempt.compile_id, attempt.attempt) if attempt else None)


def is_bookkeeping(function: Any = None) -> bool:
    """Tell whether the call that is being made is one of torch's tracing machinery on its own behalf.

    Args:
        function: What is called, if it is an operator.
    """
    frames = _frames()
    for frame in frames:
        if frame.f_code.co_filename.startswith(_TRANSPARENT):
            continue
        if frame.f_code.co_filename.startswith(_MACHINERY) and not _is_trial(frame.f_code):
            return True
        break
    # Decomposing runs the operators of a graph that was traced, and rewritten, before.
    return isinstance(function, OpOverload) and any(
        frame.f_code.co_name == "run_decompositions" and frame.f_code.co_filename == _PROGRAM for frame in frames
    )


def _is_trial(code: CodeType) -> bool:
    return (code.co_filename, code.co_name) in _TRIALS


def _frames() -> Iterator[FrameType]:
    """Yield the frames of the call stack from the caller's outwards."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _user_line(lines: list[Any]) -> str:
    own = [f"{file}:{line}" for file, line in lines if not is_library(file)]
    return own[-1] if own else UNKNOWN
