"""Running an ONNX Runtime engine; needs neither torch nor onnx."""

from __future__ import annotations

import importlib
import json
import os
import re
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.backends.onnxruntime.kernels import add_kernels, has_extensions
from torchferry.core.engine import Session, layer_times
from torchferry.core.errors import BackendError, MissingBackendError
from torchferry.core.kernels import kernels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torchferry.core.engine import Array, LayerTime
    from torchferry.core.signature import Signature

_KERNEL_TIME = "_kernel_time"  # how the events of a node's own work end in ONNX Runtime's profile


def onnxruntime() -> Any:
    """Import ONNX Runtime, with the telemetry of its wheels off.

    Raises:
        MissingBackendError: If it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read while it is imported
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as exc:
        raise MissingBackendError(
            "the engine 'onnxruntime' is not installed", hint="pip install 'torchferry[onnxruntime]'"
        ) from exc


def session_options(threads: int | None, spinning: bool) -> Any:
    """Return ``onnxruntime.SessionOptions``.

    Args:
        threads: Threads for one operator; None for the number of cores that this process may use.
        spinning: Let idle threads spin. Faster by a little when alone on a machine, and a full core wasted otherwise.

    Raises:
        MissingBackendError: If ONNX Runtime is not installed.
    """
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or _usable_cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spinning else "0")
    # On an x64 CPU without VNNI, sums of products of unsigned by signed bytes would saturate at 16 bits.
    options.add_session_config_entry("session.x64quantprecision", "1")
    add_kernels(options)
    options.log_severity_level = 4  # its errors come as exceptions too; its warnings are for its developers
    return options


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux; elsewhere a process may use every core
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def translated(doing: str) -> Iterator[None]:
    """Turn ONNX Runtime's exceptions into ``BackendError``."""
    try:
        yield
    except BackendError:
        raise
    except Exception as exc:
        raise BackendError(
            f"ONNX Runtime cannot {doing}: {_shortened(str(exc)) or type(exc).__name__}", hint=_hint(str(exc))
        ) from exc


def _hint(message: str) -> str | None:
    """Say what to do about an operator that ONNX Runtime lacks."""
    unknown = re.search(r"(\S+):(\w+)\(-1\) is not a registered function/op", message)
    if unknown is None:
        return None
    name = "::".join(unknown.groups())
    if name in {kernel.name for kernel in kernels()} and not has_extensions():
        return f"'{name}' has a kernel in Python, for which: pip install 'torchferry[kernels]'"
    return f"import the module that gives '{name}' a kernel, or write its symbolic in operators of ONNX"


def _shortened(message: str) -> str:
    """Keep the operator, the node and the reason; leave out status codes and places in ONNX Runtime's own source."""
    message = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from \S+ (failed: ?)?)?", "", message.strip())
    message = re.sub(
        r"Non-zero status code returned while running (\w+) node. Name:'([^']*)' Status Message:",
        r"\1 node '\2':",
        message,
    )
    message = re.sub(r"\S*/onnxruntime_src/\S+ |\b\w+\.(h|cc):\d+ (operator\(\)|\w+) ", "", message)
    return message.split("\n", 1)[0].strip()


class OnnxRuntimeSession(Session):
    """A loaded ONNX Runtime model.

    Args:
        signature: Names, dtypes, shapes and valid sizes.
        model: The path of an ONNX file, or the file's bytes.
        options: From ``session_options``.
        constants: Inputs that are the same at every call.
        profile: Measure every node.
    """

    def __init__(
        self,
        signature: Signature,
        model: Path | bytes,
        options: Any,
        constants: Mapping[str, Array] | None = None,
        *,
        profile: bool = False,
    ) -> None:
        super().__init__(signature)
        self._constants = dict(constants or {})
        self._profiles = tempfile.TemporaryDirectory(prefix="torchferry-") if profile else None
        if self._profiles is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(Path(self._profiles.name) / "profile")
        ort = onnxruntime()
        source = str(model) if isinstance(model, Path) else model
        with translated(f"load '{model}'" if isinstance(model, Path) else "load the graph"):
            self._session: Any = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])

    def _execute(self, feeds: dict[str, Array]) -> Sequence[Array]:
        if self._constants:
            feeds = {**feeds, **self._constants}
        with translated("run the model"):
            outputs: Sequence[Array] = self._session.run(None, feeds)
        return outputs

    def profile(self) -> tuple[LayerTime, ...]:
        """Return the time of every node."""
        if self._profiles is None:
            return ()
        with self._profiles:
            events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        self._profiles = None
        return layer_times(_by_run(events))

    def _release(self) -> None:
        self._session = None
        self._constants = {}
        if self._profiles is not None:
            self._profiles.cleanup()
            self._profiles = None


def _by_run(events: list[dict[str, Any]]) -> list[dict[tuple[str, str], float]]:
    """Add up ONNX Runtime's events by run and node; the event of a run follows those of its nodes."""
    runs: list[dict[tuple[str, str], float]] = [{}]
    for event in events:
        if event["name"] == "model_run":
            runs.append({})
        elif event.get("cat") == "Node" and event["name"].endswith(_KERNEL_TIME):
            key = (event["name"].removesuffix(_KERNEL_TIME), event["args"]["op_name"])
            runs[-1][key] = runs[-1].get(key, 0.0) + event["dur"] / 1e6
    return [run for run in runs if run]
