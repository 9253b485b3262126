"""Compiling for TensorRT: the graph in the types that it has, for ranges of sizes and a list of GPUs."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from torchferry.backends.tensorrt.build import build, known_capabilities, shape_ranges
from torchferry.backends.tensorrt.cuda import why_no_gpu
from torchferry.backends.tensorrt.session import TensorRtSession
from torchferry.backends.tensorrt.types import check_precision, check_types
from torchferry.core.engine import Availability, Capabilities, Engine, Graph, Session
from torchferry.core.errors import UnsupportedError, did_you_mean
from torchferry.core.target import Target

if TYPE_CHECKING:
    from torchferry.backends.tensorrt.library import Flavour

ENGINE_FILE = "model.engine"
NAMES_FILE = "model.json"
PASSES = ("inline-functions", "compose-deform-conv", "trim-inputs", "name-tensors")
MAX_OPSET = 24
DEVICE = "cuda"
WORKSPACE = "max_workspace_size"
_LARGE = 256 << 20  # bytes of weights, from which on they stand in a file of their own


class TensorRt:
    """A ``tensorrt`` backend: fp32, fp16, bf16 and int8 on NVIDIA's GPUs, each as the graph's own types say.

    Args:
        flavour: Which TensorRT.
    """

    def __init__(self, flavour: Flavour) -> None:
        self.flavour = flavour
        self.name = flavour.name

    def availability(self) -> Availability:
        """Tell whether the wheel is installed, and a GPU is there to run on."""
        version = self.flavour.version()
        if version is None:
            return Availability(False, reason=f"{self.name} is not installed (pip install 'torchferry[{self.name}]')")
        no_gpu = why_no_gpu()
        if no_gpu and not self.flavour.builds_ahead:
            return Availability(False, version, f"{self.name} builds and runs only where an NVIDIA GPU is: {no_gpu}")
        return Availability(True, version, no_gpu and f"{self.name} only builds here: {no_gpu}", can_run=not no_gpu)

    def load(self) -> None:
        """Import TensorRT."""
        self.flavour.load()

    def capabilities(self) -> Capabilities:
        """Tell what TensorRT does."""
        return Capabilities(
            ("fp32", "fp16", "bf16", "int8"),
            max_opset=MAX_OPSET,
            dynamic_shapes=True,
            general=False,
            devices=(DEVICE,),
            options=(WORKSPACE,),
            symmetric_int8=True,
        )

    def compile(self, graph: Graph, target: Target, folder: Path) -> tuple[str, ...]:
        """Build an engine, in the graph's own types and without TF32.

        Each input's free sizes get one range. TensorRT chooses its kernels for the optimum that was declared, else for
        the middle. ``Target.device`` may list the GPUs of an engine that is built ahead, as ``cuda:sm86,sm89``, and
        ``Target.options`` the ``max_workspace_size`` in bytes, 0 for TensorRT's own limit.

        Raises:
            UnsupportedError: If TensorRT lacks an operator or type, a dimension has no bound, or the graph's types are
                not those of the target's precision.
            BackendError: If it fails to build.
        """
        import onnx_ir as ir

        from torchferry.graph.passes import adapt
        from torchferry.graph.passes.drop_idle_inputs import drop_idle_inputs

        gpus = self._gpus(target)
        model, adaptations = adapt(graph.model, PASSES)
        signature = drop_idle_inputs(model, graph.signature)
        check_types(model, graph.signature)
        check_precision(model, target.precision)
        weights = sum(v.const_value.nbytes for g in model.graphs() for v in g.initializers.values() if v.const_value)
        with tempfile.TemporaryDirectory(prefix="torchferry-") as scratch:
            source = Path(scratch) / "model.onnx"
            ir.external_data.load_to_model(model)
            ir.save(model, source, external_data="model.data" if weights > _LARGE else None)
            workspace = target.options.get(WORKSPACE, 0)
            engine = build(model, graph.model, signature, self.flavour, gpus, source, workspace)
            (folder / ENGINE_FILE).write_bytes(engine)
        names = {
            "inputs": dict(zip(signature.input_names, (value.name for value in model.graph.inputs), strict=True)),
            "outputs": dict(zip(signature.output_names, (value.name for value in model.graph.outputs), strict=True)),
        }
        (folder / NAMES_FILE).write_text(json.dumps(names, indent=2))
        return (*adaptations, *(["optimization-profile x1"] if shape_ranges(signature) else []))

    def _gpus(self, target: Target) -> tuple[str, ...]:
        """Return the GPUs to build for; empty for the one at hand.

        Raises:
            UnsupportedError: If one is not known, or cannot be chosen.
        """
        listed = [name.upper() for name in re.split("[:,]", target.device)[1:]]
        if not self.flavour.builds_ahead:
            if listed:
                raise UnsupportedError(f"'{self.name}' builds for the GPU at hand, not for '{target.device}'")
            return ()
        library = self.flavour.load()
        every = known_capabilities(library, "fp16")
        for name in listed:
            if name not in every:
                raise UnsupportedError(
                    f"'{self.name}' does not build for the GPU '{name.lower()}' in '{target.device}'",
                    hint=did_you_mean(name.lower(), [known.lower() for known in every]),
                )
        return tuple(listed) or known_capabilities(library, target.precision)

    def trial(self, graph: Graph, folder: Path) -> Session:
        """Compile the graph in fp32, and load it."""
        self._check_gpu()
        self.compile(graph, Target(self.name), folder)
        return TensorRtSession(graph.signature, self.flavour, folder / ENGINE_FILE, folder / NAMES_FILE)

    def open(self, engine: Engine) -> Session:
        """Load the engine on the first GPU; there are no options.

        Raises:
            UnsupportedError: If there is no GPU.
            BackendError: If TensorRT cannot load it.
        """
        files = [engine.path(file) for file in (ENGINE_FILE, NAMES_FILE)]
        self._check_gpu()
        return TensorRtSession(engine.signature, self.flavour, *files)

    def _check_gpu(self) -> None:
        no_gpu = why_no_gpu()
        if no_gpu:
            raise UnsupportedError(
                f"a '{self.name}' engine is built here, and runs only where an NVIDIA GPU is: {no_gpu}",
                hint="carry its package to a machine with one",
            )
