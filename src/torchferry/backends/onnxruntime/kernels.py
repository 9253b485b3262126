"""Kernels in Python for ONNX Runtime, through onnxruntime-extensions."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

from torchferry.core.kernels import Kernel, kernels

if TYPE_CHECKING:
    from collections.abc import Callable

_TYPES = {"float32": "dt_float", "float64": "dt_double"}  # every other dtype is called by its own name
_ATTRIBUTES = {"int": "dt_int64", "float": "dt_float", "string": "dt_string"}
# The library takes an operator once for the whole process, so what it has is one function that looks the kernel up.
_KNOWN: set[str] = set()


def add_kernels(options: Any) -> None:
    """Let a session that is opened with these ``SessionOptions`` call the kernels of this process.

    Does nothing without kernels, or where onnxruntime-extensions is not installed.
    """
    registered = kernels()
    if not registered or not has_extensions():
        return
    import onnxruntime_extensions as extensions

    for kernel in registered:
        if kernel.name not in _KNOWN:
            _KNOWN.add(kernel.name)
            _register(kernel, extensions)
    options.register_custom_ops_library(extensions.get_library_path())


def has_extensions() -> bool:
    """Tell whether onnxruntime-extensions is installed."""
    return importlib.util.find_spec("onnxruntime_extensions") is not None


def _register(kernel: Kernel, extensions: Any) -> None:
    def types(dtypes: tuple[str, ...]) -> list[Any]:
        return [getattr(extensions.PyOp, _TYPES.get(dtype, f"dt_{dtype}")) for dtype in dtypes]

    extensions.onnx_op(
        op_type=kernel.name,
        inputs=types(kernel.inputs),
        outputs=types(kernel.outputs),
        attrs={name: getattr(extensions.PyOp, _ATTRIBUTES[kind]) for name, kind in kernel.attributes.items()},
    )(_looked_up(kernel.name))


def _looked_up(name: str) -> Callable[..., Any]:
    def call(*inputs: Any, **attributes: Any) -> Any:
        arrays = next(kernel for kernel in kernels() if kernel.name == name)(*inputs, **attributes)
        return arrays[0] if len(arrays) == 1 else tuple(arrays)

    return call
