"""What became of a graph: overflow, error, and how much of it is FP16."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from methods import METHODS, NotAvailableError, prepare
from torch.utils._pytree import tree_leaves

import torchferry as ferry

if TYPE_CHECKING:
    from cases import Case

    from torchferry import Exported
    from torchferry.fp16 import BadTensor

MODES = ("acc32", "strict")
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Run:
    """One mode at one scale of data.

    Attributes:
        first_bad: The first tensor that is not finite, with its magnitude; empty if all are.
        error: L2 norm of the outputs' difference from FP32 over that of FP32's, the worst output.
        ratio: The same over that of ``ideal`` rounding, the worst output.
        sums: Sums in convolutions and products whose bound is beyond FP16: strict mode only.
    """

    first_bad: str
    error: float
    ratio: float
    sums: int


@dataclass(frozen=True)
class Row:
    """One case by one method.

    Attributes:
        case: Its name.
        group: Its group.
        method: Its name.
        failure: Why there is no result; the figures below are then empty.
        seconds: For the conversion, calibration in it, export not.
        nodes: Of the FP32 graph, constants left out.
        added: Nodes that the method added, casts among them; negative if it took some away.
        float_nodes: Nodes of the result whose output is a float, casts left out.
        fp32_nodes: Those of them that are FP32.
        fp32_macs: The share of multiplications in FP32 layers.
        runs: By ``"<mode> <scale>x"``.
    """

    case: str
    group: str
    method: str
    failure: str = ""
    seconds: float = math.nan
    nodes: int = 0
    added: int = 0
    float_nodes: int = 0
    fp32_nodes: int = 0
    fp32_macs: float = 0.0
    runs: dict[str, Run] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def from_json(data: dict[str, Any]) -> Row:
    """Return the row that `Row.as_json` gave."""
    return Row(**{**data, "runs": {name: Run(**run) for name, run in data["runs"].items()}})


def judge(case: Case, methods: list[str]) -> list[Row]:
    """Convert a case by each method, and see what became of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = ferry.export(case.module, case.calibration[0])
        truth = {scale: [_outputs(case.module, batch) for batch in data] for scale, data in case.held_out.items()}
        ideal = {scale: _errors(exported, "ideal", case, scale, truth)[1] for scale in truth}
        return [_row(case, method, exported, truth, ideal) for method in methods]


def _row(case: Case, method: str, exported: Exported, truth: dict[float, Any], ideal: dict[float, list[float]]) -> Row:
    row = Row(case.name, case.group, method)
    try:
        prepare(method)
        start = time.perf_counter()
        result = METHODS[method](case, exported)
    except NotAvailableError as error:
        return Row(**{**vars(row), "failure": f"not available: {error}"})
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its row
        return Row(**{**vars(row), "failure": f"{type(error).__name__}: {_line(error)}"})
    seconds = time.perf_counter() - start
    runs = {}
    try:
        for mode in MODES:
            for scale in case.held_out:
                emulation, errors = _errors(result, mode, case, scale, truth)
                ratios = [_ratio(*pair) for pair in zip(errors, ideal[scale], strict=True)]
                bad = emulation.first_bad
                first = "" if bad is None else _first(bad)
                runs[f"{mode} {scale:g}x"] = Run(first, max(errors), max(ratios), len(emulation.accumulators))
    except Exception as error:  # noqa: BLE001 - an engine may refuse a peer's graph
        return Row(**{**vars(row), "failure": f"its result is refused: {_line(error)}"})
    before, after = _proto(exported), _inferred(_proto(result))
    macs = layers(after)
    total = sum(count for _, count in macs) or 1
    types = _types(after)
    made = [types.get(node.output[0]) for node in after.graph.node if node.op_type not in ("Cast", "Constant")]
    return Row(
        **{
            **vars(row),
            "seconds": seconds,
            "nodes": _count(before),
            "added": _count(after) - _count(before),
            "float_nodes": sum(kind in _FLOATS for kind in made),
            "fp32_nodes": sum(kind == onnx.TensorProto.FLOAT for kind in made),
            "fp32_macs": sum(count for kind, count in macs if kind == onnx.TensorProto.FLOAT) / total,
            "runs": runs,
        }
    )


def _first(bad: BadTensor) -> str:
    return f"{bad.operator or bad.kind} in {bad.module or bad.name}: {bad.magnitude:.3g}"


def _line(error: BaseException) -> str:
    while error.__cause__ is not None:  # the reason; what lies above it is where
        error = error.__cause__
    return " ".join(str(error).split())[:160]


def _outputs(module: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    with torch.no_grad():
        return [value.double().numpy() for value in tree_leaves(module(*batch)) if isinstance(value, torch.Tensor)]


def _errors(model: Any, mode: str, case: Case, scale: float, truth: dict[float, Any]) -> tuple[Any, list[float]]:
    """Return the emulation after it ran the held-out data, and each output's error over all batches."""
    emulation = ferry.fp16.emulate(model, mode=mode)
    difference, size = np.zeros(1), np.zeros(1)
    for batch, true in zip(case.held_out[scale], truth[scale], strict=True):
        seen = [np.asarray(value, np.float64) for value in emulation.run(batch).values()]
        with np.errstate(invalid="ignore", over="ignore"):
            difference = difference + [np.square(a - b).sum() for a, b in zip(seen, true, strict=True)]
        size = size + [np.square(value).sum() for value in true]
    errors = np.sqrt(difference / np.maximum(size, 1e-300))
    return emulation, [float(error) if np.isfinite(error) else math.inf for error in errors]


def _ratio(error: float, ideal: float) -> float:
    if not math.isfinite(error) or not math.isfinite(ideal):  # without an ideal there is no judgement
        return math.inf
    return 1.0 if error == ideal else error / ideal if ideal else math.inf


def _proto(model: Any) -> onnx.ModelProto:
    if isinstance(model, onnx.ModelProto):
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save(Path(folder) / "model.onnx")
        return onnx.load(str(Path(folder) / "model.onnx"))


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with types and shapes found anew; what a converter left may be out of date."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(copy, data_prop=True)


def _count(model: onnx.ModelProto) -> int:
    return sum(node.op_type != "Constant" for node in model.graph.node)


def _types(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    return {value.name: value.type.tensor_type.elem_type for value in [*graph.value_info, *graph.output, *graph.input]}


def layers(model: onnx.ModelProto) -> list[tuple[int | None, int]]:
    """Return the output's type and the multiplications of every convolution and product, where shapes are fixed."""
    model = _inferred(model)
    graph = model.graph
    types = _types(model)
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in [*graph.value_info, *graph.output, *graph.input]
    }
    shapes.update({tensor.name: list(tensor.dims) for tensor in graph.initializer})
    found = []
    for node in graph.node:
        if node.op_type in _LAYERS:
            left, right, out = (shapes.get(name, []) for name in (node.input[0], node.input[1], node.output[0]))
            if node.op_type == "Conv":
                macs = math.prod(out) * math.prod(right[1:])
            elif node.op_type == "ConvTranspose":
                macs = math.prod(left) * math.prod(right[1:])
            else:
                across = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
                macs = math.prod(out) * (left[0 if across else -1] if left else 0)
            found.append((types.get(node.output[0]), macs))
    return found
