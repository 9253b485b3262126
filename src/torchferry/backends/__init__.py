"""L2: the table of inference engines, and the verb ``compile``.

To add one: a folder with ``compile.py`` and ``session.py`` whose ``__init__.py`` holds ``BACKEND``, a line in
``_TABLE``, and an extra in ``pyproject.toml``.
"""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchferry.backends.trial_run import run_once
from torchferry.core.engine import RECORD_FILE, Backend, Engine, check_capable, platform_versions
from torchferry.core.errors import MissingBackendError, UnsupportedError, did_you_mean
from torchferry.core.files import new_folder
from torchferry.core.target import Target, check_named

if TYPE_CHECKING:
    from os import PathLike

    from torchferry.graph import Exported

__all__ = ["compile", "get", "names"]

_TABLE = {
    "onnxruntime": "torchferry.backends.onnxruntime",
    "openvino": "torchferry.backends.openvino",
    "ncnn": "torchferry.backends.ncnn",
    "tensorrt": "torchferry.backends.tensorrt.full",
    "tensorrt-rtx": "torchferry.backends.tensorrt.rtx",
    "reference": "torchferry.backends.reference",
}


_REFERENCE = "reference"


def names() -> tuple[str, ...]:
    """Return the names of all backends, installed or not, the preferred one first."""
    return tuple(_TABLE)


def get(name: str) -> Backend:
    """Return a backend by name, whether or not its engine is installed.

    Raises:
        MissingBackendError: If no backend has this name.
        ConfigError: If it is ``auto``, which stands for one.
    """
    check_named(name)
    if name not in _TABLE:
        raise MissingBackendError(f"unknown backend '{name}'", hint=did_you_mean(name, _TABLE))
    backend: Backend = importlib.import_module(_TABLE[name]).BACKEND
    return backend


def running() -> tuple[str, ...]:
    """Return the names of all backends whose engines are installed and run here, the preferred one first."""
    available = {name: get(name).availability() for name in _TABLE}
    return tuple(name for name, found in available.items() if found.ok and found.can_run)


def compile(graph: Any, target: Target, folder: str | PathLike[str], *, overwrite: bool = False) -> Engine:
    """Compile a graph for an engine, and run the result once to see that the engine takes it, where it runs here.

    Args:
        graph: An ``Exported``, a path to an ONNX file, a ``ModelProto``, an ``ir.Model`` or an ``ONNXProgram``.
        target: The engine and its precision.
        folder: Where the engine's files go; must not exist, or be empty.
        overwrite: Replace the folder if it exists.

    Returns:
        The compiled engine.

    Raises:
        MissingBackendError: If the engine is unknown or not installed.
        UnsupportedError: If it cannot do what the target asks, or the graph is quantised and the target not int8, or
            the other way round.
        BackendError: If it refuses the graph, or takes it and fails to run it.
        OutputError: If the folder cannot be written.
    """
    from torchferry.graph import as_exported

    backend = get(target.backend)
    check_target(target)
    exported = as_exported(graph, target)
    _check_quantized(exported, target)
    with new_folder(Path(folder), overwrite=overwrite, marker=RECORD_FILE) as partial:
        adaptations = backend.compile(exported, target, partial)
        files = tuple(sorted(p.relative_to(partial).as_posix() for p in partial.rglob("*") if p.is_file()))
        versions = {target.backend: backend.availability().version or "unknown", **platform_versions()}
        engine = Engine(partial, target, exported.signature, versions, files, adaptations)
        if backend.availability().can_run:
            if backend.capabilities().proves:
                engine.open().close()
            else:
                run_once(engine, exported, get(_REFERENCE))
        engine.save()
    return dataclasses.replace(engine, folder=Path(folder))


def options(name: str) -> tuple[str, ...] | None:
    """Return the names that ``Target.options`` may have for an engine; None if it is not installed.

    Raises:
        MissingBackendError: If no backend has this name.
    """
    backend = get(name)
    return backend.capabilities().options if backend.availability().ok else None


def check_target(target: Target) -> None:
    """Check, before any work, that an engine can do what a target asks.

    Raises:
        MissingBackendError: If the engine is unknown or not installed.
        UnsupportedError: As ``check_capable``, or if it does not have an option.
    """
    backend = get(target.backend)
    available = backend.availability()
    if not available.ok:
        raise MissingBackendError(f"the engine '{target.backend}' cannot be used here: {available.reason}")
    capabilities = backend.capabilities()
    check_capable(target, capabilities)
    for name in target.options:
        if name not in capabilities.options:
            hint = did_you_mean(name, capabilities.options)
            raise UnsupportedError(f"'{target.backend}' has no option '{name}'", hint=hint)


def _check_quantized(exported: Exported, target: Target) -> None:
    """Check that a graph is computed in the precision that was asked for, which of int8 the graph alone decides.

    Raises:
        UnsupportedError: If it is not.
    """
    if exported.is_quantized and target.precision != "int8":
        raise UnsupportedError(
            f"the graph is quantised, so it would be computed in int8, not in {target.precision}",
            hint="choose precision int8, or give the graph from before it was quantised",
        )
    if target.precision == "int8" and not exported.is_quantized:
        raise UnsupportedError(
            "the graph is not quantised, so no engine would compute it in int8",
            hint="quantise it with ferry.quantize, or give `torchferry compile` or `deploy` data to do that on",
        )
