"""Compiling for ONNX Runtime: its graph optimisations are run once and saved."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any

from torchferry.backends.onnxruntime.session import MODEL_FILE, OnnxRuntimeSession, session_options, translated
from torchferry.core.engine import Availability, Capabilities, Engine, Graph, Session

if TYPE_CHECKING:
    from pathlib import Path

    from torchferry.core.target import Target


class OnnxRuntime:
    """The ``onnxruntime`` backend: fp32 on the CPU execution provider.

    An FP16 graph would be computed in FP32 there, so fp16 is not offered.
    """

    name = "onnxruntime"

    def availability(self) -> Availability:
        """Tell whether the wheel is installed."""
        if importlib.util.find_spec("onnxruntime") is None:
            return Availability(False, reason="onnxruntime is not installed (pip install 'torchferry[onnxruntime]')")
        return Availability(True, importlib.metadata.version("onnxruntime"))

    def capabilities(self) -> Capabilities:
        """Tell what the CPU execution provider does."""
        return Capabilities(precisions=("fp32",), max_opset=24, dynamic_shapes=True)

    def compile(self, graph: Graph, target: Target, folder: Path) -> None:
        """Save the graph as ONNX Runtime optimises it.

        Only the optimisations that hold on every CPU are saved; those that depend on the machine (memory layouts) are
        done when it is opened, so that the folder can be carried to another machine.
        """
        import onnxruntime as ort

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

    def open(self, engine: Engine, **options: Any) -> Session:
        """Load the saved model; options: ``threads`` (int), ``spinning`` (bool)."""
        return OnnxRuntimeSession(engine, **options)
