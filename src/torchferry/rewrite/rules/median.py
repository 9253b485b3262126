"""Medians and k-th values, from a sorted axis."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.median")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.median")
def median(ctx: FunctionContext, input: torch.Tensor, dim: int | None = None, keepdim: bool = False) -> Any:
    """Sort, and take the element in the middle, the lower one of two; NaN if there is any.

    ``median(x, dim)`` → ``sort(x, dim)`` at ``(n - 1) // 2``. Of equal elements, PyTorch may name another index.

    Without it: "No ONNX function found for aten.median".

    Declines: the input has no dimensions.
    """
    if input.dim() == 0:
        return ctx.origin_func(input) if dim is None else ctx.origin_func(input, dim, keepdim)
    x, axis = (input.flatten(), 0) if dim is None else (input, dim)
    values, indices = _at(x, (x.shape[axis] - 1) // 2, axis, keepdim)
    if x.is_floating_point():
        nan = x.isnan()
        found = nan.any(axis, keepdim)
        values = torch.where(found, torch.nan, values)
        indices = torch.where(found, nan.int().argmax(axis, keepdim), indices)
    return values if dim is None else torch.return_types.median((values, indices))


@FUNCTION_REWRITER.register_rewriter("torch.kthvalue")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.kthvalue")
def kthvalue(ctx: FunctionContext, input: torch.Tensor, k: Any, dim: int = -1, keepdim: bool = False) -> Any:
    """Sort, and take the k-th element.

    ``kthvalue(x, k, dim)`` → ``sort(x, dim)`` at ``k - 1``. Of equal elements, PyTorch may name another index.

    Without it: "No ONNX function found for aten.kthvalue".

    Declines: the input has no dimensions.
    """
    if input.dim() == 0:
        return ctx.origin_func(input, k, dim, keepdim)
    return torch.return_types.kthvalue(_at(input, k - 1, dim, keepdim))


def _at(x: torch.Tensor, place: Any, dim: int, keepdim: bool) -> tuple[torch.Tensor, torch.Tensor]:
    values, indices = (part.select(dim, place) for part in x.sort(dim))
    return (values.unsqueeze(dim), indices.unsqueeze(dim)) if keepdim else (values, indices)
