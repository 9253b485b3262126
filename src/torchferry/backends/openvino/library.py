"""OpenVINO itself: importing it, its exceptions, and the numbers that it computes with."""

from __future__ import annotations

import re
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.core.errors import BackendError, MissingBackendError
from torchferry.core.imports import import_without

if TYPE_CHECKING:
    from collections.abc import Iterator

_TELEMETRY = "openvino_telemetry"
# What OpenVINO computes such types in on the CPU. A number outside the narrow type would change without a word.
COMPUTED_IN = {"int64": "int32", "uint64": "int32", "uint32": "int32", "float64": "float32"}


def openvino() -> Any:
    """Import OpenVINO, with no telemetry.

    OpenVINO announces itself over the network while it is imported, if the package ``openvino-telemetry`` is there, and
    does without where it is not. So that package is out of sight meanwhile.

    Raises:
        MissingBackendError: If it is not installed.
    """
    try:
        return import_without("openvino", absent=_TELEMETRY)
    except ImportError as exc:
        raise MissingBackendError(
            "the engine 'openvino' is not installed", hint="pip install 'torchferry[openvino]'"
        ) from exc


def core() -> Any:
    """Return a new ``openvino.Core``.

    Raises:
        MissingBackendError: If OpenVINO is not installed.
    """
    return openvino().Core()


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn OpenVINO's exceptions into ``BackendError``."""
    try:
        yield
    except BackendError:
        raise
    except Exception as exc:
        reason, hint = _reason(str(exc))
        raise BackendError(f"OpenVINO cannot {doing}: {reason or type(exc).__name__}", hint=hint) from exc


def _reason(message: str) -> tuple[str, str | None]:
    """Return what went wrong, and what to do about it."""
    ours = re.search(r"BackendError: (.+?)\n\nAt:\n", message, re.DOTALL)
    if ours:
        return ours[1], None
    names = missing_operators(message)
    if not names:
        return _shortened(message), None
    reason = f"it has no operator {', '.join(names)}"
    own = next((name for name in names if "::" in name), None)
    if own:
        return reason, f"import the module that gives '{own}' a kernel, or write its symbolic in operators of ONNX"
    return reason, "write its symbolic in operators of ONNX, or use another backend"


def missing_operators(message: str) -> list[str]:
    """Return the operators that OpenVINO says it lacks, as ``Name`` or ``domain::Name``; none if it says otherwise."""
    missing = re.search(r"No conversion rule found for operations: (.+)", message)
    names = missing[1].strip().split(", ") if missing else []
    return ["::".join(name.rsplit(".", 1)) if "." in name else name.rpartition("-")[0] for name in names]


def _shortened(message: str) -> str:
    """Keep the node and the reason; leave out places in OpenVINO's own source."""
    node = re.search(r"\[CPU\] (\w+) node with name '([^']*)'", message)
    lines = [
        line.strip()
        for line in message.splitlines()
        if line.strip() and not re.match(r"Exception from |(\[CPU\] .*)?Check '.*' failed at |While validating ", line)
    ]
    # The places come first, and the last line of several tells most.
    reason = " ".join(lines[-2:])
    return f"{node[1]} node '{node[2]}': {reason}" if node else reason


def limits(dtype: str) -> tuple[float, float] | None:
    """Return the smallest and the largest number of a dtype that OpenVINO computes with; None if there is no limit."""
    narrow = COMPUTED_IN.get(dtype)
    if narrow is None:
        return None
    info: Any = np.finfo(narrow) if narrow.startswith("float") else np.iinfo(narrow)
    return info.min, info.max
