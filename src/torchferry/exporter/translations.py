"""ATen operators whose translation in torch.onnx is wrong, translated right."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from onnxscript import opset18

# Its parameters are typed as tensors; inside a translation they may be Python values.
op: Any = opset18

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def squeeze_dims(self: Any, dim: Sequence[int]) -> Any:
    """Squeeze the axes whose size is 1 for certain; PyTorch leaves all others alone.

    torch.onnx emits ``Squeeze`` for a dynamic axis as well, which every engine refuses at any size but 1.
    """
    axes = [axis for axis in dim if self.shape[axis] == 1] if len(self.shape) else []
    return op.Squeeze(self, axes) if axes else op.Identity(self)


def squeeze_dim(self: Any, dim: int) -> Any:
    """Squeeze one axis, as ``squeeze_dims``."""
    return squeeze_dims(self, [dim])


def amax(self: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    """Take the largest of some axes, or of all; torch.onnx's translation fails where ``dim`` is left out."""
    return op.ReduceMax(self, list(dim), keepdims=keepdim) if dim else op.ReduceMax(self, keepdims=keepdim)


def amin(self: Any, dim: Sequence[int] = (), keepdim: bool = False) -> Any:
    """Take the smallest, as ``amax``."""
    return op.ReduceMin(self, list(dim), keepdims=keepdim) if dim else op.ReduceMin(self, keepdims=keepdim)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.amax.default: amax,
    torch.ops.aten.amin.default: amin,
    torch.ops.aten.squeeze.dim: squeeze_dim,
    torch.ops.aten.squeeze.dims: squeeze_dims,
}
