"""The verb ``quantize``: a graph in int8 by what its tensors hold on data; NNCF does the work."""

from __future__ import annotations

import dataclasses
import io
import logging
import warnings
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from torchferry import backends
from torchferry.core.errors import BackendError, FormatError, InputError, MissingBackendError, UnsupportedError
from torchferry.core.imports import import_without
from torchferry.core.report import Finding
from torchferry.core.target import DEFAULT_BACKEND
from torchferry.graph.opset import convert_opset
from torchferry.graph.reading import as_exported
from torchferry.precision.degrees import constant, is_float
from torchferry.precision.emulate import as_array_calls
from torchferry.precision.fix import feeds_of
from torchferry.precision.prepare import prepare

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torchferry.graph import Exported

_OLDEST_OPSET = 13  # the first whose weights may have a scale for each channel
# Operators that compute nothing: of int8 they make int8.
_MOVING = frozenset((
    "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "Pad", "Reshape", "Shape", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
))  # fmt: skip


def quantize(model: Any, calibration: Any, *, symmetric: bool = False) -> Exported:
    """Quantise a graph to int8, by the ranges that its tensors have on data.

    Weights become int8 with a scale for each output channel, activations int8 or uint8 with one for each tensor, which
    spans its numbers in all calls. Biases make up for the mean error, and in a graph with attention scales move from
    activations into weights first (SmoothQuant). Inputs and outputs stay FP32, and so does what NNCF does not know.

    Args:
        model: An FP32 graph: an ``Exported``, a path, a ``ModelProto``, an ``ir.Model`` or an ``ONNXProgram``. It is
            not changed.
        calibration: One tuple or dict of inputs, or an iterable of them: representative data.
        symmetric: Make activations int8 with 0 for zero, as engines want whose ``Capabilities.symmetric_int8`` is
            true. It costs a bit wherever a tensor has no negative numbers.

    Returns:
        The same graph with ``QuantizeLinear`` and ``DequantizeLinear`` around what is computed in int8, for a target
        of precision int8. Names, sizes and relations are as before. Its report says which operators take int8 and
        which do not.

    Raises:
        InputError: If the calibration data does not fit, is empty or not finite.
        FormatError: If the graph is quantised or in half precision already.
        MissingBackendError: If NNCF is not installed, or the engine that it measures on.
        UnsupportedError: If nothing in the graph can be quantised.
        BackendError: If NNCF fails.
    """
    exported = as_exported(model)
    if exported.is_quantized:
        raise FormatError("the graph is quantised already", hint="compile it for int8 as it is")
    feeds = [feeds_of(call, exported.signature) for call in as_array_calls(calibration)]
    _check_data(feeds)
    quantized = _by_nncf(_prepared(exported), feeds, symmetric)
    if not any(node.op_type == "QuantizeLinear" for node in quantized.graph):
        raise UnsupportedError("nothing in the graph can be quantised", hint="compile it for fp32")
    _tell_types(quantized.graph)
    if symmetric:
        _make_signed(quantized.graph)
    target = dataclasses.replace(exported.target, precision="int8")
    findings = [Finding("int8-quantized", "info", _what_takes_int8(quantized.graph), where=str(target))]
    if len(feeds) == 1:
        findings.append(
            Finding(
                "int8-one-call",
                "warning",
                "the graph was quantised on one call; what lies outside the ranges of that one is clipped",
                where=str(target),
                hint="give several calls, of all kinds that the model will see",
            )
        )
    return exported.replace(
        model=quantized,
        target=target,
        report=exported.report.with_findings(findings),
    )


def _check_data(feeds: Sequence[dict[str, Any]]) -> None:
    for number, arrays in enumerate(feeds, 1):
        for name, array in arrays.items():
            if not array.size:
                raise InputError(f"call {number} of the calibration data has nothing in '{name}'")
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise InputError(
                    f"call {number} of the calibration data has NaN or infinity in '{name}', which has no range",
                    hint="give finite numbers; a mask can hide by -1e9",
                )


def _prepared(exported: Exported) -> ir.Model:
    """Return a copy in the form that NNCF takes: every node has a name, and every weight one reader."""
    model = prepare(exported, bound_masks=False).model
    if model.opset_imports.get("", _OLDEST_OPSET) < _OLDEST_OPSET:
        model = convert_opset(model, _OLDEST_OPSET)
    ir.external_data.load_to_model(model)
    return model


def _by_nncf(model: ir.Model, feeds: Sequence[dict[str, Any]], symmetric: bool) -> ir.Model:
    nncf = _nncf()
    from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, QuantizationParameters
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet

    in_bodies = [v for v in model.graph.initializers.values() if any(n.graph is not model.graph for n, _ in v.uses())]
    activations = AdvancedQuantizationParameters(
        # Engines have int8 convolutions for one scale alone, where NNCF would give depthwise ones many.
        activations_quantization_params=QuantizationParameters(per_channel=False),
        # Of all calls; NNCF would take the mean of each call's range, and clip what lies beyond.
        activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
    )
    chosen = nncf.QuantizationPreset.PERFORMANCE if symmetric else nncf.QuantizationPreset.MIXED
    try:
        with _quiet():
            quantized = nncf.quantize(
                ir.to_proto(model),
                nncf.Dataset(feeds),
                preset=chosen,
                subset_size=len(feeds),
                advanced_parameters=activations,
                model_type=nncf.ModelType.TRANSFORMER if _has_attention(model.graph) else None,
            )
    except Exception as exc:  # it raises whatever it stumbles over, and what its engine raises
        reason = (str(exc).strip() or type(exc).__name__).splitlines()[0]
        raise BackendError(
            f"NNCF cannot quantise the graph: {reason}", hint="leave what is at fault out with `torchferry partition`"
        ) from exc
    kept = {tensor.name for tensor in quantized.graph.initializer}
    # It takes the FP32 weights of what is quantised away, although branches may read them too.
    quantized.graph.initializer.extend(
        ir.to_proto(v.const_value) for v in in_bodies if v.name not in kept and v.const_value is not None
    )
    result: ir.Model = ir.from_proto(quantized)
    return result


def _nncf() -> Any:
    """Import NNCF, with no telemetry, neither its own nor that of the engine that it measures on.

    Raises:
        MissingBackendError: If one of them is not installed.
    """
    backends.get(DEFAULT_BACKEND).load()
    logger = logging.getLoggerClass()
    try:
        return import_without("nncf", absent="openvino_telemetry")
    except ImportError as exc:
        raise MissingBackendError(
            "NNCF, which quantises, is not installed", hint="pip install 'torchferry[quantize]'"
        ) from exc
    finally:
        logging.setLoggerClass(logger)  # it puts its own in the place of everybody's


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep NNCF's progress bars, log lines and warnings from the user's terminal."""
    logger = logging.getLogger("nncf")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = was_disabled


def _has_attention(graph: ir.Graph) -> bool:
    """Tell whether scores of a softmax weigh other tensors: there is one, and a product of two computed tensors."""
    kinds = {node.op_type for node in graph}
    products = (node for node in graph if node.op_type == "MatMul")
    computed = any(all(constant(v) is None for v in node.inputs if v is not None) for node in products)
    return "Attention" in kinds or ("Softmax" in kinds and computed)


def _tell_types(graph: ir.Graph) -> None:
    """Say what type and shape the new tensors have, which NNCF does not."""
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            source, scale, zero = node.inputs
            like = zero if node.op_type == "QuantizeLinear" else scale
            assert source is not None  # as NNCF writes them
            assert like is not None
            assert like.dtype is not None
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(like.dtype), source.shape


def _make_signed(graph: ir.Graph) -> None:
    """Make every uint8 quantiser, whose zero point is 0, an int8 one of the same range."""
    for node in graph:
        if node.op_type != "QuantizeLinear":
            continue
        _, scale, zero = node.inputs
        assert scale is not None  # as NNCF writes them
        assert zero is not None
        if zero.dtype == ir.DataType.UINT8:
            _assign(scale, _array(scale) * np.float32(255 / 127))
            _assign(zero, np.zeros_like(_array(zero), np.int8))
            node.outputs[0].dtype = ir.DataType.INT8


def _array(value: ir.Value) -> Any:
    assert value.const_value is not None
    return value.const_value.numpy()


def _assign(value: ir.Value, array: Any) -> None:
    value.const_value = ir.Tensor(array, name=value.name)
    value.dtype = value.const_value.dtype


def _what_takes_int8(graph: ir.Graph) -> str:
    """Count by operator the nodes whose operands are int8; an activation between such a node and a quantiser too."""
    moved = {v for n in graph if n.op_type == "DequantizeLinear" for v in n.outputs}
    taking: Counter[str] = Counter()
    left: Counter[str] = Counter()
    results: set[ir.Value] = set()
    for node in graph:
        operands = {v for v in node.inputs if v is not None and is_float(v) and constant(v) is None}
        if not operands or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if node.op_type in _MOVING:
            moved.update(node.outputs if operands <= moved else ())
            continue
        ends = {user.op_type for value in node.outputs for user, _ in value.uses()} == {"QuantizeLinear"}
        takes = operands <= (moved | results if ends else moved)
        results.update(node.outputs if takes else ())
        (taking if takes else left)[node.op_type] += 1
    message = "int8: " + ", ".join(f"{name} {count} of {count + left[name]}" for name, count in taking.most_common())
    if left:
        message += "; FP32: " + ", ".join(f"{name} {count}" for name, count in left.most_common())
    return message
