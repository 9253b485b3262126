"""The length of a vector of two components, such as a gradient's magnitude."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.hypot")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.hypot")
def hypot(ctx: FunctionContext, input: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Take the larger component out of the root, so that nothing overflows.

    ``hypot(x, y)`` → ``a * sqrt(1 + (b / a)²)`` with a and b the larger and the smaller of ``|x|, |y|``.

    Without it: "No ONNX function found for prims.hypot".

    Declines: never.
    """
    x, y = input.abs(), other.abs()
    large, small = torch.maximum(x, y), torch.minimum(x, y)
    ratio = small / torch.where(large == 0, 1, large)
    length = large * (1 + ratio * ratio).sqrt()
    return torch.where(x.isinf() | y.isinf(), torch.inf, length)
