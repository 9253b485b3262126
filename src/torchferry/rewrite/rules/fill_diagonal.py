"""Filling a diagonal in."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.Tensor.fill_diagonal_")
def fill_diagonal_(ctx: FunctionContext, input: torch.Tensor, fill_value: Any, wrap: bool = False) -> torch.Tensor:
    """Fill by a mask of the diagonal.

    ``x.fill_diagonal_(0)`` → ``x.masked_fill_(arange(h)[:, None] == arange(w), 0)``.

    Without it: FrozenDimensionError.

    Declines: all sizes are fixed, the tensor is no matrix, or ``wrap`` is set.
    """
    if fixed(*input.shape) or input.dim() != 2 or wrap:
        result: torch.Tensor = ctx.origin_func(input, fill_value, wrap)
        return result
    rows, columns = (torch.arange(size, device=input.device) for size in input.shape)
    return input.masked_fill_(rows.unsqueeze(1) == columns, fill_value)
