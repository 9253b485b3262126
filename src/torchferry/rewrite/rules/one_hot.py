"""One-hot vectors of as many classes as there are, or as a dynamic size says."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.nn.functional.one_hot")
def one_hot(ctx: FunctionContext, input: torch.Tensor, num_classes: Any = -1) -> torch.Tensor:
    """Compare with a range of dynamic length.

    ``one_hot(x)`` → ``(x[..., None] == arange(x.max() + 1)).long()``; ``one_hot(x, n)`` → the same with ``arange(n)``.

    Without it: "Could not extract specialized integer from data-dependent expression" without a number of classes, and
    FrozenDimensionError with a dynamic one.

    Declines: the number of classes is fixed.
    """
    counts_classes = not isinstance(num_classes, torch.SymInt) and num_classes < 0
    if fixed(num_classes) and not counts_classes:
        result: torch.Tensor = ctx.origin_func(input, num_classes)
        return result
    classes = input.max().item() + 1 if counts_classes else num_classes
    return (input.unsqueeze(-1) == torch.arange(classes, device=input.device)).long()
