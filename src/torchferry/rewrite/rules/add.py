"""Adding bools."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.add", name="logical_or")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.add", name="logical_or")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.add_", name="logical_or_")
def add(ctx: FunctionContext, input: Any, other: Any, **options: Any) -> torch.Tensor:
    """Add bools by a logical or.

    ``a + b`` → ``a.logical_or(b)`` where both are masks; ``a += b`` → ``a.logical_or_(b)``.

    Without it: engines refuse the graph ("Type 'tensor(bool)' of input parameter of operator (Add) is invalid").

    Declines: other types, or another ``alpha`` than 1.
    """
    masks = all(isinstance(x, torch.Tensor) and x.dtype is torch.bool for x in (input, other))
    result: torch.Tensor = (
        getattr(input, ctx.name)(other) if masks and not options else ctx.origin_func(input, other, **options)
    )
    return result
