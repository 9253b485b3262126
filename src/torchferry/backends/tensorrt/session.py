"""Running a TensorRT engine; needs neither torch nor onnx."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.backends.tensorrt.cuda import Gpu
from torchferry.core.engine import Session
from torchferry.core.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torchferry.backends.tensorrt.library import Flavour
    from torchferry.core.engine import Array
    from torchferry.core.signature import Signature


class _Worker:
    """What one call at a time has to itself: a context, a stream, and memory on the GPU that grows as needed."""

    def __init__(self, context: Any, gpu: Gpu) -> None:
        self.context = context
        self.stream = gpu.stream()
        self._gpu = gpu
        self._memory: dict[str, tuple[int, int]] = {}

    def memory(self, name: str, size: int) -> int:
        address, room = self._memory.get(name, (0, -1))
        if room < size:
            if address:
                self._gpu.free(address)
                del self._memory[name]
            address = self._gpu.allocate(size)
            self._memory[name] = (address, size)
        return address

    def release(self) -> None:
        for address, _ in self._memory.values():
            self._gpu.free(address)
        self._memory.clear()
        self._gpu.destroy(self.stream)
        self.context = None


class TensorRtSession(Session):
    """A loaded TensorRT engine.

    Args:
        signature: Names, dtypes, shapes and valid sizes.
        flavour: Which TensorRT.
        engine: The engine's file.
        names: A JSON file with what TensorRT calls the inputs that it has, and the outputs, by their own names.
    """

    def __init__(self, signature: Signature, flavour: Flavour, engine: Path, names: Path) -> None:
        super().__init__(signature)
        try:
            called = json.loads(names.read_bytes())
            self._called_inputs, self._called_outputs = dict(called["inputs"]), dict(called["outputs"])
        except (ValueError, TypeError, KeyError) as exc:
            raise BackendError(f"TensorRT cannot load '{names}': it is damaged", hint="compile it again") from exc
        self._gpu = Gpu()
        self._gpu.enter()
        with flavour.logger() as (logger, errors):
            self._runtime: Any = flavour.load().Runtime(logger)
            self._engine: Any = self._runtime.deserialize_cuda_engine(engine.read_bytes())
            reason = " ".join(errors[-1].split()) if errors else "it does not say why"
        if self._engine is None:
            raise BackendError(
                f"TensorRT cannot load '{engine}': {reason}",
                hint="compile it again, with this version and for this GPU",
            )
        self._idle: list[_Worker] = []

    def _execute(self, feeds: dict[str, Array]) -> Sequence[Array]:
        self._gpu.enter()
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _Worker(self._engine.create_execution_context(), self._gpu)
        try:
            return self._run(worker, feeds)
        finally:
            self._idle.append(worker)

    def _run(self, worker: _Worker, feeds: dict[str, Array]) -> list[Array]:
        context = worker.context
        for name, called in self._called_inputs.items():
            array = np.ascontiguousarray(feeds[name])
            address = worker.memory(called, array.nbytes)
            self._gpu.upload(address, array)
            if not context.set_input_shape(called, feeds[name].shape) or not context.set_tensor_address(
                called, address
            ):
                raise BackendError(f"TensorRT cannot run the model: it does not take '{name}' of {feeds[name].shape}")
        shapes = {name: tuple(context.get_tensor_shape(called)) for name, called in self._called_outputs.items()}
        for spec in self.signature.outputs:
            shape, called = shapes[spec.name], self._called_outputs[spec.name]
            if min(shape, default=0) < 0:
                raise BackendError(f"TensorRT cannot run the model: the sizes of '{spec.name}' depend on values")
            size = int(np.prod(shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
            context.set_tensor_address(called, worker.memory(called, size))
        if not context.execute_async_v3(worker.stream):
            raise BackendError("TensorRT cannot run the model: it does not say why")
        self._gpu.wait(worker.stream)
        return [
            self._gpu.download(worker.memory(self._called_outputs[spec.name], 0), shapes[spec.name], spec.dtype)
            for spec in self.signature.outputs
        ]

    def _release(self) -> None:
        self._gpu.enter()
        for worker in self._idle:
            worker.release()
        self._idle = []
        self._engine = self._runtime = None
