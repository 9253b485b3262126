"""Compiling for ONNX Runtime: its graph optimisations are run once and saved."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from torchferry.backends.onnxruntime.session import OnnxRuntimeSession, onnxruntime, session_options, translated
from torchferry.backends.refusing import kernel_or_symbolic, refusal, unknown_nodes
from torchferry.core.engine import Availability, Capabilities, Engine, Graph, Session
from torchferry.core.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

    from torchferry.core.engine import Array
    from torchferry.core.target import Target


MODEL_FILE = "model.onnx"
# Of the optimised graph: what computes with integers, and what could but does not.
_INTEGER = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize", "QAttention")
_PRODUCTS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
_LARGE = 1024  # bytes; smaller ones may hold shapes, which operators want as constants
_SHARED = ("FLOAT", "DOUBLE", "FLOAT16", "INT8", "UINT8", "INT32", "INT64")  # types that numpy has as well


class OnnxRuntime:
    """The ``onnxruntime`` backend: fp32 on the CPU execution provider, and int8 where the graph is quantised.

    An FP16 graph would be computed in FP32 there, so fp16 is not offered.
    """

    name = "onnxruntime"

    def availability(self) -> Availability:
        """Tell whether the wheel is installed."""
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, reason="onnxruntime is not installed (pip install 'torchferry[onnxruntime]')")
        return Availability(True, importlib.metadata.version("onnxruntime"))

    def load(self) -> None:
        """Import ONNX Runtime."""
        onnxruntime()

    def capabilities(self) -> Capabilities:
        """Tell what the CPU execution provider does."""
        return Capabilities(precisions=("fp32", "int8"), max_opset=24, dynamic_shapes=True)

    def compile(self, graph: Graph, target: Target, folder: Path) -> tuple[str, ...]:
        """Save the graph as ONNX Runtime optimises it.

        Only the optimisations that hold on every CPU are saved; those that depend on the machine (memory layouts) are
        done when it is opened, so that the folder can be carried to another machine.

        Raises:
            UnsupportedError: If ONNX Runtime lacks operators; names all, with modules and lines. Also if it would
                compute nothing of a quantised graph in int8.
            BackendError: If it refuses the graph otherwise.
        """
        ort = onnxruntime()
        _check_operators(graph.model)
        source = folder / "exported.onnx"
        graph.save(source)
        options = session_options(threads=None, spinning=False)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(folder / MODEL_FILE)
        external = source.with_name(f"{source.name}.data")
        if external.exists():
            options.add_session_config_entry(
                "session.optimized_model_external_initializers_file_name", f"{MODEL_FILE}.data"
            )
        with translated("compile the graph"):
            ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
        source.unlink()
        external.unlink(missing_ok=True)
        return _left_in_fp32(folder / MODEL_FILE) if target.precision == "int8" else ()

    def trial(self, graph: Graph, folder: Path) -> Session:
        """Load the graph unoptimised, with the weights where they are in memory."""
        ort = onnxruntime()
        options = session_options(threads=1, spinning=False)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        proto, weights = with_weights_as_inputs(graph.model)
        return OnnxRuntimeSession(graph.signature, proto, options, constants=weights)

    def open(
        self, engine: Engine, *, threads: int | None = None, spinning: bool = False, profile: bool = False
    ) -> Session:
        """Load the saved model.

        Args:
            engine: What ``compile`` wrote.
            threads: Threads for one operator; None for the number of cores that this process may use.
            spinning: Let idle threads spin.
            profile: Measure every node, for ``Session.profile``; the first million of them at most.
        """
        options = session_options(threads, spinning)
        return OnnxRuntimeSession(engine.signature, engine.path(MODEL_FILE), options, profile=profile)


def _check_operators(model: ir.Model) -> None:
    """Check that ONNX Runtime knows every operator, of which it would itself name the first alone.

    Raises:
        UnsupportedError: If it does not.
    """
    state = importlib.import_module("onnxruntime.capi.onnxruntime_pybind11_state")
    schemas = {(schema.domain, schema.name) for schema in state.get_all_operator_schema()}
    lacking = unknown_nodes(model, schemas)
    if lacking:
        raise refusal("ONNX Runtime has no operator", lacking, model, model, first_way=kernel_or_symbolic(lacking))


def _left_in_fp32(path: Path) -> tuple[str, ...]:
    """Return the products of int8 numbers that ONNX Runtime computes in FP32, such as ``Conv x2 in fp32``.

    It has no int8 convolution whose result is FP32: one that another activation than ReLU follows stays as it is.

    Raises:
        UnsupportedError: If it computes nothing in int8.
    """
    import onnx

    nodes = onnx.load(path, load_external_data=False).graph.node
    opened = {name for node in nodes if node.op_type == "DequantizeLinear" for name in node.output}
    left = Counter(node.op_type for node in nodes if node.op_type in _PRODUCTS and opened.intersection(node.input))
    if not any(node.op_type.startswith(_INTEGER) for node in nodes):
        raise UnsupportedError(
            "ONNX Runtime would compute nothing of the graph in int8: it does so where both the operands and the "
            "result of a convolution are quantised",
            hint="use another backend, or fp32",
        )
    return tuple(f"{name} x{count} in fp32" for name, count in left.items())


def with_weights_as_inputs(model: ir.Model) -> tuple[bytes, dict[str, Array]]:
    """Serialise a graph so that its large weights are inputs, which ONNX Runtime reads where they are.

    Returns:
        The ONNX file's bytes, and the weights by name, not copied.
    """
    import onnx_ir as ir

    graph = model.graph
    taken = {
        name: value
        for name, value in graph.initializers.items()
        if value.const_value is not None
        and value.const_value.nbytes >= _LARGE
        and value.const_value.dtype.name in _SHARED
    }
    given = list(graph.inputs)
    weights = {
        name: np.ascontiguousarray(value.const_value.numpy()) for name, value in taken.items() if value.const_value
    }
    try:
        for name, value in taken.items():
            del graph.initializers[name]
            graph.inputs.append(value)
        proto = ir.to_proto(model).SerializeToString()
    finally:
        del graph.inputs[len(given) :]
        graph.initializers.update(taken)
    return proto, weights
