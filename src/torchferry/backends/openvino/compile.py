"""Compiling for OpenVINO: the graph as OpenVINO reads it, saved in its own format."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.backends.openvino.kernels import KernelOperators, kernel_nodes, with_shapes
from torchferry.backends.openvino.library import core, limits, missing_operators, openvino, translated
from torchferry.backends.openvino.session import PRECISIONS, OpenVinoSession, properties, read_onnx
from torchferry.backends.refusing import kernel_or_symbolic, operator_name, refusal
from torchferry.core.engine import Availability, Capabilities, Engine, Graph, Session
from torchferry.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx_ir as ir

    from torchferry.core.engine import Array
    from torchferry.core.target import Target


PASSES = ("inline-functions",)
MODEL_FILE = "model.xml"
ONNX_FILE = "model.onnx"  # in place of it, where the graph has kernels in Python
WEIGHTS_FILE = "model.bin"  # beside the model and of its name, as OpenVINO wants it; absent where there are none
_DTYPES = (
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64",
)  # fmt: skip
MAX_OPSET = (
    23  # the newest of whose new operators it has all; newer graphs are read as far as their operators are known
)
_NO_BOUND = 1 << 62  # from here on an integer stands for "to the end", which the largest int32 says as well


class OpenVino:
    """The ``openvino`` backend: fp32 on the CPU, int8 where the graph is quantised, and bf16 where the CPU has it.

    Asked for fp16, OpenVINO computes in bf16 on a CPU, so fp16 is not offered. What it does differently from ONNX: NaN
    is lost in some operators (``Relu``, ``Exp``, ``Max``), and 8-bit integers stop at their ends where others wrap.
    """

    name = "openvino"

    def availability(self) -> Availability:
        """Tell whether the wheel is installed."""
        if importlib.util.find_spec("openvino") is None:
            return Availability(False, reason="openvino is not installed (pip install 'torchferry[openvino]')")
        return Availability(True, importlib.metadata.version("openvino"))

    def load(self) -> None:
        """Import OpenVINO."""
        openvino()

    def capabilities(self) -> Capabilities:
        """Tell what OpenVINO does on this CPU."""
        able = core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        precisions = tuple(name for name in PRECISIONS if name.upper() in able)
        return Capabilities(precisions=precisions, max_opset=MAX_OPSET, dynamic_shapes=True)

    def compile(self, graph: Graph, target: Target, folder: Path) -> tuple[str, ...]:
        """Save the graph in OpenVINO's format, its weights as they are; as ONNX, if it has kernels in Python.

        Machine code and memory layouts are made when it is opened, so the folder can be carried to another machine. The
        precision is chosen then as well.
        """
        source = folder / ONNX_FILE
        adapted, done = _adapted(graph)
        model = _converted(adapted, graph.model, source, KernelOperators())
        adaptations = (*done, *_of_openvino(adapted), f"precision-hint {PRECISIONS[target.precision]}")
        if kernel_nodes(adapted.model):  # what they are in Python is not saved in OpenVINO's format
            return adaptations
        with translated("save the graph"):
            openvino().save_model(model, str(folder / MODEL_FILE), compress_to_fp16=False)
        source.unlink()
        source.with_name(f"{source.name}.data").unlink(missing_ok=True)
        if not (folder / WEIGHTS_FILE).stat().st_size:
            (folder / WEIGHTS_FILE).unlink()
        return adaptations

    def trial(self, graph: Graph, folder: Path) -> Session:
        """Load the graph in fp32, with one thread."""
        operators = KernelOperators()
        model = _converted(_adapted(graph)[0], graph.model, folder / ONNX_FILE, operators)
        return OpenVinoSession(graph.signature, model, properties("fp32", threads=1), operators)

    def open(self, engine: Engine, *, threads: int | None = None, profile: bool = False) -> Session:
        """Load the saved model.

        Args:
            engine: What ``compile`` wrote.
            threads: Threads for one request; None for OpenVINO's choice among the cores that this process may use.
            profile: Measure every layer, for ``Session.profile``.
        """
        for file in engine.files:
            engine.path(file)  # raises if it is gone, as the weights may be
        model = engine.path(ONNX_FILE if ONNX_FILE in engine.files else MODEL_FILE)
        return OpenVinoSession(engine.signature, model, properties(engine.target.precision, threads, profile=profile))


def _adapted(graph: Graph) -> tuple[Graph, tuple[str, ...]]:
    """Return the graph as OpenVINO wants it, which does not look into local functions, and what was done."""
    from torchferry.graph.passes import adapt

    if not graph.model.functions:
        return graph, ()
    model, done = adapt(graph.model, PASSES)
    return graph.replace(model=model), done


def _of_openvino(graph: Graph) -> tuple[str, ...]:
    """Return what is done to a graph while OpenVINO reads it."""
    kinds = [(node.domain, node.op_type) for each in graph.model.graphs() for node in each]
    doubles = sum(spec.dtype == "float64" for spec in (*graph.signature.inputs, *graph.signature.outputs))
    counts = {"deform-conv-extension": kinds.count(("", "DeformConv")), "float64-as-float32": doubles}
    return tuple(f"{name} x{count}" for name, count in counts.items() if count)


def _converted(graph: Graph, whole: ir.Model, path: Path, operators: KernelOperators) -> Any:
    """Save a graph as ONNX and return what OpenVINO reads there; it may refer to the file's weights.

    Raises:
        UnsupportedError: If OpenVINO lacks operators; names all, with modules and lines.
        BackendError: If it refuses the graph otherwise, or would change numbers in it.
    """
    _check(graph)
    with with_shapes(kernel_nodes(graph.model)):
        graph.save(path)
    with translated("compile the graph"):
        try:
            return read_onnx(path, graph.signature, operators)
        except Exception as exc:
            names = missing_operators(str(exc))
            nodes = [node for each in graph.model.graphs() for node in each if operator_name(node) in names]
            if not nodes:
                raise
            way = kernel_or_symbolic(nodes)
            raise refusal("OpenVINO has no operator", nodes, graph.model, whole, first_way=way) from exc


def _check(graph: Graph) -> None:
    """Check that OpenVINO takes the types of inputs and outputs, and every constant.

    Raises:
        BackendError: If it does not.
    """
    for spec in (*graph.signature.inputs, *graph.signature.outputs):
        if spec.dtype not in _DTYPES:
            raise BackendError(f"OpenVINO takes no {spec.dtype}, which '{spec.name}' is")
    for name, array in _constants(graph.model):
        limit = limits(array.dtype.name)
        if limit is None or not array.size:
            continue
        outside = array[(array < limit[0]) | (array > limit[1])]
        if array.dtype.kind in "iu":
            outside = outside[(outside > -_NO_BOUND) & (outside < _NO_BOUND)]
        if outside.size:
            raise BackendError(
                f"OpenVINO would change the {array.dtype.name} constant '{name}': it holds {outside[0]}, "
                f"outside {limit[0]:g}..{limit[1]:g}",
                hint="use another backend",
            )


def _constants(model: ir.Model) -> Iterator[tuple[str, Array]]:
    import onnx_ir as ir

    for graph in [*model.graphs(), *(function.graph for function in model.functions.values())]:
        made = [value for node in graph if node.op_type == "Constant" for value in node.outputs]
        for value in (*graph.initializers.values(), *made):
            tensor = ir.convenience.get_const_tensor(value)
            if tensor is not None and limits(str(tensor.dtype.numpy())) is not None:
                yield value.name or "", np.asarray(tensor.numpy())
