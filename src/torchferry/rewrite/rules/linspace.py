"""Evenly spaced numbers, as many as a dynamic size says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.linspace")
def linspace(ctx: FunctionContext, start: Any, end: Any, steps: Any, **options: Any) -> torch.Tensor:
    """Scale a range of dynamic length.

    ``linspace(a, b, n)`` → ``where(i < (n + 1) // 2, a + i * (b - a) / (n - 1), b - (n - 1 - i) * (b - a) / (n - 1))``
    with ``i = arange(n)``: counted from the nearer end, as in PyTorch, so that both ends are exact.

    Without it: FrozenDimensionError; torch fixes the number of steps to the example's.

    Declines: the number of steps is fixed, the numbers are integers or complex, or ``out`` is given.
    """
    dtype = options.get("dtype") or torch.get_default_dtype()
    if fixed(steps) or not dtype.is_floating_point or "out" in options:
        result: torch.Tensor = ctx.origin_func(start, end, steps, **options)
        return result
    place = torch.arange(steps, dtype=dtype, device=options.get("device"))
    gaps = torch.sym_max(steps - 1, 1)
    way = end - start
    return torch.where(place < (steps + 1) // 2, start + place * way / gaps, end - (steps - 1 - place) * way / gaps)
