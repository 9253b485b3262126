"""Running an OpenVINO engine; needs neither torch nor onnx."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.backends.openvino.deform_conv import add_deform_conv
from torchferry.backends.openvino.kernels import KernelOperators
from torchferry.backends.openvino.library import COMPUTED_IN, core, limits, openvino, translated
from torchferry.core.engine import Session, layer_times
from torchferry.core.errors import BackendError, InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchferry.core.engine import Array, LayerTime
    from torchferry.core.signature import Signature
    from torchferry.core.target import Precision

PROFILE = "PERF_COUNT"
# What a graph computes in where it is not quantised; what is, is int8 whatever stands here.
PRECISIONS: dict[Precision, str] = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}


def properties(precision: Precision, threads: int | None, *, profile: bool = False) -> dict[str, Any]:
    """Return the properties for compiling a model.

    Args:
        precision: What to compute in; OpenVINO would choose bf16 by itself wherever the CPU has it.
        threads: Threads for one request; None for OpenVINO's choice among the cores that this process may use.
        profile: Measure every layer.
    """
    chosen: dict[str, Any] = {"INFERENCE_PRECISION_HINT": PRECISIONS[precision], "PERFORMANCE_HINT": "LATENCY"}
    if threads:
        chosen["INFERENCE_NUM_THREADS"] = threads
    if profile:
        chosen[PROFILE] = True
    return chosen


class OpenVinoSession(Session):
    """A loaded OpenVINO model.

    Args:
        signature: Names, dtypes, shapes and valid sizes.
        model: The path of an IR file, with its weights beside it, or of an ONNX file for a graph with kernels, or an
            ``openvino.Model``. Inputs and outputs are in the signature's order; their names may be others, or none.
        options: From ``properties``.
        operators: With which an ``openvino.Model`` was read.
    """

    def __init__(
        self, signature: Signature, model: Any, options: dict[str, Any], operators: KernelOperators | None = None
    ) -> None:
        super().__init__(signature)
        self._profiled: list[dict[tuple[str, str], float]] | None = [] if PROFILE in options else None
        self._operators = operators or KernelOperators()
        with translated(f"load '{model}'" if isinstance(model, Path) else "load the graph"):
            self._compiled: Any = core().compile_model(
                self._read(model) if isinstance(model, Path) else model, "CPU", options
            )
            self._operators.settle()
        self._limited = [(spec, limits(spec.dtype)) for spec in signature.inputs if spec.dtype in COMPUTED_IN]
        self._idle: list[Any] = []  # requests, of which each serves one call at a time

    def _read(self, path: Path) -> Any:
        return read_onnx(path, self.signature, self._operators) if path.suffix == ".onnx" else _read(path)

    def _execute(self, feeds: dict[str, Array]) -> Sequence[Array]:
        for spec, limit in self._limited:
            _check_range(spec.name, feeds[spec.name], limit)
        with translated("run the model"):
            try:
                request = self._idle.pop()
            except IndexError:
                request = self._compiled.create_infer_request()
            request.infer({place: feeds[name] for place, name in enumerate(self._names)}, share_outputs=True)
            outputs = [
                np.array(request.get_output_tensor(place).data, dtype=spec.dtype)
                for place, spec in enumerate(self.signature.outputs)
            ]
            if self._profiled is not None:
                self._profiled.append(_layers(request))
            self._idle.append(request)
        return outputs

    def profile(self) -> tuple[LayerTime, ...]:
        """Return the time of every layer that ran; those melted into others did not."""
        runs, self._profiled = self._profiled or [], None
        return layer_times(runs)

    def _release(self) -> None:
        self._idle = []
        self._compiled = None
        self._operators.release()


def _layers(request: Any) -> dict[tuple[str, str], float]:
    """Return the seconds of the last run by name and kind."""
    return {
        (layer.node_name, layer.node_type): layer.real_time.total_seconds()
        for layer in request.get_profiling_info()
        if layer.status.name == "EXECUTED"
    }


def read_onnx(path: Path, signature: Signature, operators: KernelOperators) -> Any:
    """Return what OpenVINO reads in an ONNX file, to which it may refer for weights.

    Raises:
        BackendError: If it has another number of inputs than the signature.
    """
    reader = core()
    operators.add_to(reader)
    add_deform_conv(reader)
    # From a file, not from memory: there it leaves out inputs without effect. The order is all that tells inputs
    # apart, for names merge or vanish where an operator does nothing.
    model = reader.read_model(str(path))
    found, expected = len(model.inputs), len(signature.inputs)
    if found != expected:
        raise BackendError(f"OpenVINO finds {found} inputs in the graph, expected {expected}")
    return _without_float64(model, signature)


def _without_float64(model: Any, signature: Signature) -> Any:
    """Make float64 inputs and outputs float32, since OpenVINO's own conversion takes infinities for large numbers."""
    preparation = openvino().preprocess.PrePostProcessor(model)
    for specs, port in ((signature.inputs, preparation.input), (signature.outputs, preparation.output)):
        for place, spec in enumerate(specs):
            if spec.dtype == "float64":
                port(place).tensor().set_element_type(openvino().Type.f32)
    return preparation.build()


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        if not file.read(64).lstrip().startswith(b"<?xml"):  # OpenVINO would try all its readers, and talk
            raise BackendError(f"OpenVINO cannot load '{path}': it is not an OpenVINO model", hint="compile it again")
    return core().read_model(str(path))


def _check_range(name: str, array: Array, limit: tuple[float, float] | None) -> None:
    """Refuse numbers that OpenVINO would change; infinities and NaN stay what they are.

    Raises:
        InputError: If there is one.
    """
    if limit is None:
        return
    outside = array[(array < limit[0]) | (array > limit[1])]
    outside = outside[np.isfinite(outside)]
    if outside.size:
        raise InputError(
            f"input '{name}' holds {outside[0]}, but OpenVINO computes {array.dtype.name} in "
            f"{COMPUTED_IN[array.dtype.name]}",
            hint="give numbers that fit, or use another backend",
        )
