"""Ways from an FP32 graph to an FP16 one. Each takes a case and its exported graph, and gives a graph."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir

import torchferry as ferry

if TYPE_CHECKING:
    from collections.abc import Callable

    from cases import Case

    from torchferry import Exported


class NotAvailableError(Exception):
    """The method's package is not installed."""


def naive(case: Case, _exported: Exported) -> Any:
    """Export ``module.half()``."""
    half = copy.deepcopy(case.module).half()
    arguments = tuple(value.half() if value.is_floating_point() else value for value in case.calibration[0])
    return ferry.export(half, arguments)


def onnxconverter_common(_case: Case, exported: Exported) -> Any:
    """onnxconverter-common's ``float16``, inputs and outputs kept."""
    module = _imported(_PACKAGES["onnxconverter-common"])
    return _ordered(module.convert_float_to_float16(_proto(exported), keep_io_types=True))


def ort(_case: Case, exported: Exported) -> Any:
    """ONNX Runtime's own converter, inputs and outputs kept."""
    module = _imported(_PACKAGES["ort"])
    return _ordered(module.convert_float_to_float16(_proto(exported), keep_io_types=True))


def autocast(case: Case, exported: Exported) -> Any:
    """ModelOpt's AutoCast with the calibration data, inputs and outputs kept."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module = _imported(_PACKAGES["autocast"])
        for name in ("modelopt", "modelopt.onnx"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            exported.save(path)
            data = Path(folder) / "calibration"
            data.mkdir()
            for number, batch in enumerate(case.calibration):
                arrays = zip(exported.signature.input_names, batch, strict=True)
                np.savez(data / f"{number:03}.npz", **{name: value.numpy() for name, value in arrays})
            return module.convert_to_mixed_precision(str(path), keep_io_types=True, calibration_data=str(data))


def ours(case: Case, exported: Exported) -> Any:
    """``ferry.fp16.fix``."""
    fix = getattr(ferry.fp16, "fix", None)
    if fix is None:
        raise NotAvailableError("ferry.fp16.fix")
    fixed, _certificate = fix(exported, case.calibration)
    return fixed


METHODS: dict[str, Callable[[Case, Exported], Any]] = {
    "naive": naive,
    "onnxconverter-common": onnxconverter_common,
    "ort": ort,
    "autocast": autocast,
    "ours": ours,
}


_PACKAGES = {
    "onnxconverter-common": "onnxconverter_common.float16",
    "ort": "onnxruntime.transformers.float16",
    "autocast": "modelopt.onnx.autocast",
}


def prepare(method: str) -> None:
    """Import what a method needs, so that its seconds are its work's.

    Raises:
        NotAvailableError: If it is not installed.
    """
    if method in _PACKAGES:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            _imported(_PACKAGES[method])


def _ordered(model: onnx.ModelProto) -> onnx.ModelProto:
    """Bring the nodes into order again; these tools append their casts at the end."""
    graph = onnx_ir.from_proto(model)
    graph.graph.sort()
    return onnx_ir.to_proto(graph)


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotAvailableError(str(error)) from error


def _proto(exported: Exported) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        exported.save(Path(folder) / "model.onnx")
        return onnx.load(str(Path(folder) / "model.onnx"))
