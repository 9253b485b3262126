"""Compiling for the reference evaluator: the ONNX file itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

from torchferry.backends.reference.session import ReferenceSession, evaluator
from torchferry.backends.refusing import kernel_or_symbolic, refusal, unknown_nodes
from torchferry.core.engine import Availability, Capabilities, Engine, Graph, Session
from torchferry.core.errors import UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    from torchferry.core.target import Target


MODEL_FILE = "model.onnx"


def _has_half(model: Any) -> bool:
    values = (value for graph in model.graphs() for node in graph for value in (*node.inputs, *node.outputs))
    return any(value is not None and value.dtype is not None and value.dtype.name == "FLOAT16" for value in values)


def _check_operators(model: Any) -> None:
    import onnx

    lacking = unknown_nodes(model, {(schema.domain, schema.name) for schema in onnx.defs.get_all_schemas()})
    if lacking:
        said = "onnx's evaluator has no operator"
        raise refusal(said, lacking, model, model, first_way=kernel_or_symbolic(lacking))


class Reference:
    """The ``reference`` backend: the meaning of ONNX, operator by operator, in numpy.

    Of a quantised graph it gives the numbers; between quantisers they are float32, as ONNX says.
    """

    name = "reference"

    def availability(self) -> Availability:
        """Tell whether onnx is installed."""
        if importlib.util.find_spec("onnx") is None:
            return Availability(False, reason="onnx is not installed (pip install 'torchferry[reference]')")
        return Availability(True, importlib.metadata.version("onnx"))

    def load(self) -> None:
        """Import the evaluator."""
        evaluator()

    def capabilities(self) -> Capabilities:
        """Tell what the evaluator does."""
        import onnx

        newest = onnx.defs.onnx_opset_version()
        return Capabilities(("fp32", "fp16", "int8"), max_opset=newest, dynamic_shapes=True, proves=True, fast=False)

    def compile(self, graph: Graph, target: Target, folder: Path) -> tuple[str, ...]:
        """Save the graph as it is.

        Raises:
            UnsupportedError: If an operator is none of ONNX's, or FP16 is asked for and the graph has no FP16 tensor:
                the evaluator goes by their types.
        """
        _check_operators(graph.model)
        if target.precision == "fp16" and not _has_half(graph.model):
            raise UnsupportedError(
                "the graph computes in FP32: no tensor of it is FLOAT16", hint="make an FP16 graph with ferry.fp16.fix"
            )
        graph.save(folder / MODEL_FILE)
        return ()

    def trial(self, graph: Graph, folder: Path) -> Session:
        """Save the graph and load it."""
        graph.save(folder / MODEL_FILE)
        return ReferenceSession(graph.signature, folder / MODEL_FILE)

    def open(self, engine: Engine) -> Session:
        """Load the file; there are no options."""
        return ReferenceSession(engine.signature, engine.path(MODEL_FILE))
