"""Running onnx's reference evaluator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from torchferry.core.engine import Session
from torchferry.core.errors import BackendError, MissingBackendError
from torchferry.core.kernels import Kernel, kernels

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torchferry.core.engine import Array
    from torchferry.core.signature import Signature


def evaluator() -> Any:
    """Import onnx's ``ReferenceEvaluator``.

    Raises:
        MissingBackendError: If onnx is not installed.
    """
    try:
        from onnx.reference import ReferenceEvaluator
    except ImportError as exc:
        raise MissingBackendError(
            "the engine 'reference' is not installed", hint="pip install 'torchferry[reference]'"
        ) from exc
    return ReferenceEvaluator


class ReferenceSession(Session):
    """A model loaded into onnx's evaluator.

    Args:
        signature: Names, dtypes, shapes and valid sizes.
        path: The ONNX file.
    """

    def __init__(self, signature: Signature, path: Path) -> None:
        super().__init__(signature)
        made = evaluator()
        try:
            self._evaluator: Any = made(str(path), new_ops=[_operator(kernel) for kernel in kernels()])
        except Exception as exc:
            raise BackendError(f"onnx's evaluator cannot load '{path}': {exc}") from exc

    def _execute(self, feeds: dict[str, Array]) -> Sequence[Array]:
        try:
            with np.errstate(all="ignore"):  # a NaN is an answer, and numpy would warn of it
                outputs = self._evaluator.run(None, feeds)
        except Exception as exc:
            raise BackendError(f"onnx's evaluator cannot run the model: {exc}") from exc
        return [np.asarray(output) for output in outputs]

    def _release(self) -> None:
        vars(self._evaluator).clear()  # it refers to itself, and would keep the weights until Python looks for such
        self._evaluator = None


def _operator(kernel: Kernel) -> type:
    """Return a kernel of this process in the form that the evaluator takes."""
    from onnx.reference.op_run import OpRun

    domain, _, name = kernel.name.partition("::")

    def run(self: Any, *inputs: Any, **attributes: Any) -> tuple[Array, ...]:  # noqa: ARG001 - a method
        given = {key: value for key, value in attributes.items() if key in kernel.attributes}
        return tuple(kernel(*inputs, **given))

    return type(name, (OpRun,), {"op_domain": domain, "_run": run})
