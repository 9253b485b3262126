"""Compiling for the reference evaluator: the ONNX file itself."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING

from torchferry.backends.reference.session import ReferenceSession
from torchferry.core.engine import Availability, Capabilities, Engine, Graph, Session

if TYPE_CHECKING:
    from pathlib import Path

    from torchferry.core.target import Target


MODEL_FILE = "model.onnx"


class Reference:
    """The ``reference`` backend: the meaning of ONNX, operator by operator, in numpy."""

    name = "reference"

    def availability(self) -> Availability:
        """Tell whether onnx is installed."""
        if importlib.util.find_spec("onnx") is None:
            return Availability(False, reason="onnx is not installed (pip install 'torchferry[reference]')")
        return Availability(True, importlib.metadata.version("onnx"))

    def capabilities(self) -> Capabilities:
        """Tell what the evaluator does."""
        import onnx

        return Capabilities(precisions=("fp32",), max_opset=onnx.defs.onnx_opset_version(), dynamic_shapes=True)

    def compile(self, graph: Graph, target: Target, folder: Path) -> None:
        """Save the graph as it is."""
        graph.save(folder / MODEL_FILE)

    def trial(self, graph: Graph, folder: Path) -> Session:
        """Save the graph and load it."""
        graph.save(folder / MODEL_FILE)
        return ReferenceSession(graph.signature, folder / MODEL_FILE)

    def open(self, engine: Engine) -> Session:
        """Load the file; there are no options."""
        return ReferenceSession(engine.signature, engine.path(MODEL_FILE))
