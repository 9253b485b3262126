"""Cumulative products, maxima and minima."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F  # noqa: N812 - its usual name

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.cumprod")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.cumprod")
def cumprod(ctx: FunctionContext, input: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Multiply with copies shifted by 1, 2, 4 …; an axis of dynamic size by products over a triangle.

    ``cumprod(x, -1)`` → ``x = x * pad(x, (s, 0), value=1)[..., :n]`` for each s, or
    ``where(j <= i, x[..., None, :], 1).prod(-1)``, which takes n² elements.

    Without it: "No ONNX function found for prims.prod".

    Declines: the input has no dimensions.
    """
    if input.dim() == 0:
        result: torch.Tensor = ctx.origin_func(input, dim, dtype=dtype)
        return result
    if dtype is None:
        dtype = input.dtype if input.is_floating_point() or input.is_complex() else torch.int64
    x = input.to(dtype).movedim(dim, -1)
    size = x.shape[-1]
    if fixed(size):
        shift = 1
        while shift < size:
            x = x * F.pad(x, (shift, 0), value=1)[..., :size]
            shift *= 2
    else:
        x = torch.where(_until(x), x.unsqueeze(-2), 1).prod(-1)
    return x.movedim(-1, dim)


@FUNCTION_REWRITER.register_rewriter("torch.cummax", largest=True)
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.cummax", largest=True)
@FUNCTION_REWRITER.register_rewriter("torch.cummin", largest=False)
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.cummin", largest=False)
def cummax(ctx: FunctionContext, input: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the maximum over a triangle, and the last place that has it.

    ``cummax(x, -1)`` → ``where(j <= i, x[..., None, :], x[..., :1]).amax(-1)``, which takes n² elements.

    Without it: "No ONNX function found for aten.cummax".

    Declines: the input has no dimensions.
    """
    kind = torch.return_types.cummax if ctx.largest else torch.return_types.cummin
    if input.dim() == 0:
        result: tuple[torch.Tensor, torch.Tensor] = ctx.origin_func(input, dim)
        return result
    x = input.movedim(dim, -1)
    until = _until(x)
    rows = torch.where(until, x.unsqueeze(-2), x[..., :1].unsqueeze(-2))
    values = rows.amax(-1) if ctx.largest else rows.amin(-1)
    hits = (x.unsqueeze(-2) == values.unsqueeze(-1)) | x.isnan().unsqueeze(-2)
    places = torch.arange(x.shape[-1], device=x.device)
    indices = torch.where(until & hits, places, 0).amax(-1)
    return kind((values.movedim(-1, dim), indices.movedim(-1, dim)))  # type: ignore[no-any-return]


def _until(x: torch.Tensor) -> torch.Tensor:
    """Return for each element of the last axis, as a row, which elements come no later."""
    place = torch.arange(x.shape[-1], device=x.device)
    return place <= place.unsqueeze(1)
