"""Ranges of floating-point numbers up to a dynamic size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.arange")
def arange(ctx: FunctionContext, *limits: Any, **options: Any) -> torch.Tensor:
    """Say the dtype, which torch.onnx takes from the wrong limit.

    ``arange(0.5, n)`` → ``arange(0.5, n, dtype=torch.get_default_dtype())``.

    Without it: engines refuse the graph ("Type parameter (T) of Optype (Add) bound to different types").

    Declines: a dtype is given, all limits are fixed, or none is a floating-point number.
    """
    has_fraction = any(isinstance(limit, float | torch.SymFloat) for limit in limits)
    if has_fraction and not fixed(*limits) and options.get("dtype") is None:
        return torch.arange(*limits, **{**options, "dtype": torch.get_default_dtype()})
    result: torch.Tensor = ctx.origin_func(*limits, **options)
    return result
