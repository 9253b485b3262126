"""The remainder of a division by a dynamic size."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.remainder")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.remainder")
def remainder(ctx: FunctionContext, input: Any, other: Any) -> torch.Tensor:
    """Subtract the multiple of the divisor.

    ``places % x.shape[-1]`` → ``places - places.div(n, rounding_mode="floor") * n`` with ``n = x.shape[-1]``.

    Without it: "int() argument must be a string, a bytes-like object or a real number, not 'SymbolicTensor'".

    Declines: the divisor is a tensor or fixed, or the dividend has no integers.
    """
    if isinstance(other, int | torch.SymInt) and not fixed(other) and _is_integral(input):
        quotient: torch.Tensor = input.div(other, rounding_mode="floor")
        return input - quotient * other
    result: torch.Tensor = ctx.origin_func(input, other)
    return result


def _is_integral(x: Any) -> bool:
    return (
        isinstance(x, torch.Tensor) and not x.is_floating_point() and not x.is_complex() and x.dtype is not torch.bool
    )
