"""Compiling for ncnn: the graph through pnnx, then proved against onnx's evaluator, since both may be wrong unasked."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from torchferry.backends.ncnn.convert import convert, program
from torchferry.backends.ncnn.operators import check_operators, check_tensors
from torchferry.backends.ncnn.proof import make_cases, prove
from torchferry.backends.ncnn.session import RECORD_FILE, NcnnSession, ncnn
from torchferry.core.engine import Availability, Capabilities, Engine, Graph, Session
from torchferry.core.errors import MissingBackendError, UnsupportedError
from torchferry.core.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

    from torchferry.core.signature import Signature

PASSES = (
    "raise-opset",
    "inline-functions",
    "compose-deform-conv",
    "fold-constants",
    "remove-identities",
    "name-tensors",
)
MAX_OPSET = 23


class Ncnn:
    """The ``ncnn`` backend: fp32 and bf16 on the CPU, for float32 graphs of the operators in ``operators.py``."""

    name = "ncnn"

    def availability(self) -> Availability:
        """Tell whether ncnn's wheel is installed; compiling needs pnnx as well."""
        if importlib.util.find_spec("ncnn") is None:
            return Availability(False, reason="ncnn is not installed (pip install 'torchferry[ncnn]')")
        return Availability(True, importlib.metadata.version("ncnn"))

    def load(self) -> None:
        """Import ncnn."""
        ncnn()

    def capabilities(self) -> Capabilities:
        """Tell what ncnn does on a CPU."""
        return Capabilities(("fp32", "bf16"), max_opset=MAX_OPSET, dynamic_shapes=True, general=False, proves=True)

    def compile(self, graph: Graph, target: Target, folder: Path) -> tuple[str, ...]:
        """Convert the graph with pnnx and prove the result at up to three sets of sizes.

        The weights stay float32. The folder can be carried to another machine; the precision is chosen when it is
        opened.

        Raises:
            MissingBackendError: If pnnx is not installed.
            UnsupportedError: If ncnn lacks an operator, or a dtype of an input or output.
            BackendError: If pnnx or ncnn fails, or gives something else than the graph.
        """
        import onnx_ir as ir

        from torchferry.graph.passes import adapt
        from torchferry.graph.passes.drop_idle_inputs import drop_idle_inputs

        if program() is None:
            raise MissingBackendError(
                "'pnnx', which compiles for ncnn, is not installed", hint="pip install 'torchferry[ncnn]'"
            )
        check_tensors(graph.signature)
        model, adaptations = adapt(graph.model, PASSES)
        check_operators(model, graph.model)
        ir.external_data.load_to_model(model)
        signature = drop_idle_inputs(model, graph.signature)
        _check_outputs(model, signature)
        cases = make_cases(model, signature)
        sizes = [case.sizes for case in cases[:2]]
        with tempfile.TemporaryDirectory(prefix="torchferry-") as scratch:
            convert(model, graph.model, signature, sizes, Path(scratch), folder).save(folder / RECORD_FILE)
            prove(cases, signature, folder, Path(scratch))
        return adaptations

    def trial(self, graph: Graph, folder: Path) -> Session:
        """Compile the graph, and load it with one thread."""
        self.compile(graph, Target(self.name), folder)
        return NcnnSession(graph.signature, folder, "fp32", threads=1)

    def open(self, engine: Engine, *, threads: int | None = None) -> Session:
        """Load the network.

        Args:
            engine: What ``compile`` wrote.
            threads: Threads for one layer; None for the number of cores that this process may use.
        """
        for file in engine.files:
            engine.path(file)  # raises if it is gone
        return NcnnSession(engine.signature, engine.folder, engine.target.precision, threads)


def _check_outputs(model: ir.Model, signature: Signature) -> None:
    """Check that every output is computed.

    Raises:
        UnsupportedError: If one is an input or a constant.
    """
    for place, (value, spec) in enumerate(zip(model.graph.outputs, signature.outputs, strict=True)):
        node = value.producer()
        if node is None or node.op_type in ("Identity", "Constant") or value in model.graph.outputs[:place]:
            raise UnsupportedError(
                f"ncnn computes all that it gives; the output '{spec.name}' is an input, a constant or another output",
                hint="leave it out of the model's outputs",
            )
