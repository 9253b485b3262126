"""The elements that a mask selects."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.masked_select")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.masked_select")
def masked_select(ctx: FunctionContext, input: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Index with the mask.

    ``masked_select(x, m)`` → ``x[m]``, both broadcast to one shape.

    Without it: torch stops with "PendingUnbackedSymbolNotFound".

    Declines: never.
    """
    x, where = torch.broadcast_tensors(input, mask)
    return x[where]
