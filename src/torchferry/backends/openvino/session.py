"""Running an OpenVINO engine; needs neither torch nor onnx."""

from __future__ import annotations

import importlib
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.core.engine import Session
from torchferry.core.errors import BackendError, InputError, MissingBackendError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torchferry.core.engine import Array
    from torchferry.core.signature import Signature
    from torchferry.core.target import Precision

PRECISIONS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16"}
_TELEMETRY = "openvino_telemetry"
# What OpenVINO computes such types in on the CPU. A number outside the narrow type would change without a word.
_COMPUTED_IN = {"int64": "int32", "uint64": "int32", "uint32": "int32", "float64": "float32"}


def openvino() -> Any:
    """Import OpenVINO, with no telemetry.

    OpenVINO announces itself over the network while it is imported, if the package ``openvino-telemetry`` is there, and
    does without where it is not. So that package is out of sight meanwhile.

    Raises:
        MissingBackendError: If it is not installed.
    """
    if "openvino" in sys.modules:
        return sys.modules["openvino"]
    seen = {name: module for name, module in sys.modules.items() if name.split(".")[0] == _TELEMETRY}
    for name in seen:
        del sys.modules[name]
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment] # the documented way to make an import fail
    try:
        return importlib.import_module("openvino")
    except ImportError as exc:
        raise MissingBackendError(
            "the engine 'openvino' is not installed", hint="pip install 'torchferry[openvino]'"
        ) from exc
    finally:
        del sys.modules[_TELEMETRY]
        sys.modules.update(seen)


def core() -> Any:
    """Return a new ``openvino.Core``; what extends OpenVINO with operators is added to it here.

    Raises:
        MissingBackendError: If OpenVINO is not installed.
    """
    return openvino().Core()


def properties(precision: Precision, threads: int | None) -> dict[str, Any]:
    """Return the properties for compiling a model.

    Args:
        precision: What to compute in; OpenVINO would choose bf16 by itself wherever the CPU has it.
        threads: Threads for one request; None for OpenVINO's choice among the cores that this process may use.
    """
    chosen = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision], "PERFORMANCE_HINT": "LATENCY"}
    return {**chosen, "INFERENCE_NUM_THREADS": threads} if threads else chosen


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn OpenVINO's exceptions into ``BackendError``."""
    try:
        yield
    except BackendError:
        raise
    except Exception as exc:
        missing = re.search(r"No conversion rule found for operations: (.+)", str(exc))
        reason = f"it has no operator {missing[1].strip()}" if missing else _shortened(str(exc))
        hint = "write its symbolic in operators of ONNX, or use another backend" if missing else None
        raise BackendError(f"OpenVINO cannot {doing}: {reason or type(exc).__name__}", hint=hint) from exc


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
    narrow = _COMPUTED_IN.get(dtype)
    if narrow is None:
        return None
    info: Any = np.finfo(narrow) if narrow.startswith("float") else np.iinfo(narrow)
    return info.min, info.max


class OpenVinoSession(Session):
    """A loaded OpenVINO model.

    Args:
        signature: Names, dtypes, shapes and valid sizes.
        model: The path of an IR file, with its weights beside it, or an ``openvino.Model``. Inputs and
            outputs are in the signature's order; their names may be others, or none.
        options: From ``properties``.
    """

    def __init__(self, signature: Signature, model: Any, options: dict[str, Any]) -> None:
        super().__init__(signature)
        with translated(f"load '{model}'" if isinstance(model, Path) else "load the graph"):
            self._compiled: Any = core().compile_model(
                _read(model) if isinstance(model, Path) else model, "CPU", options
            )
        self._limited = [(spec, limits(spec.dtype)) for spec in signature.inputs if spec.dtype in _COMPUTED_IN]
        self._idle: list[Any] = []  # requests, of which each serves one call at a time

    def _execute(self, feeds: dict[str, Array]) -> Sequence[Array]:
        for spec, limit in self._limited:
            _check_range(spec.name, feeds[spec.name], limit)
        with translated("run the model"):
            try:
                request = self._idle.pop()
            except IndexError:
                request = self._compiled.create_infer_request()
            request.infer({place: feeds[name] for place, name in enumerate(self._names)}, share_outputs=True)
            outputs = [
                np.array(request.get_output_tensor(place).data, dtype=spec.dtype)
                for place, spec in enumerate(self.signature.outputs)
            ]
            self._idle.append(request)
        return outputs

    def _release(self) -> None:
        self._idle = []
        self._compiled = None


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        if not file.read(64).lstrip().startswith(b"<?xml"):  # OpenVINO would try all its readers, and talk
            raise BackendError(f"OpenVINO cannot load '{path}': it is not an OpenVINO model", hint="compile it again")
    return core().read_model(str(path))


def _check_range(name: str, array: Array, limit: tuple[float, float] | None) -> None:
    """Refuse numbers that OpenVINO would change; infinities and NaN stay what they are.

    Raises:
        InputError: If there is one.
    """
    if limit is None:
        return
    outside = array[(array < limit[0]) | (array > limit[1])]
    outside = outside[np.isfinite(outside)]
    if outside.size:
        raise InputError(
            f"input '{name}' holds {outside[0]}, but OpenVINO computes {array.dtype.name} in "
            f"{_COMPUTED_IN[array.dtype.name]}",
            hint="give numbers that fit, or use another backend",
        )
