"""Rolling by a dynamic number of elements."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.roll")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.roll")
def roll(ctx: FunctionContext, input: torch.Tensor, shifts: Any, dims: Any = ()) -> torch.Tensor:
    """Gather each axis at shifted places.

    ``roll(x, s, 2)`` → ``x[:, :, (arange(n) - s) % n]``.

    Without it: "Unsupported attribute type: <class 'list'>".

    Declines: all shifts are fixed.
    """
    by = _tuple(shifts)
    if fixed(*by):
        result: torch.Tensor = ctx.origin_func(input, shifts, dims)
        return result
    if not _tuple(dims):
        return _rolled(input.flatten(), by, (0,)).reshape(input.shape)
    return _rolled(input, by, _tuple(dims))


@FUNCTION_REWRITER.register_rewriter("torch.fft.fftshift", extra=0)
@FUNCTION_REWRITER.register_rewriter("torch.fft.ifftshift", extra=1)
def fftshift(ctx: FunctionContext, input: torch.Tensor, dim: Any = None) -> torch.Tensor:
    """Gather each axis at places shifted by half its size.

    ``fftshift(x, 2)`` → ``x[:, :, (arange(n) - n // 2) % n]``; ``ifftshift`` shifts by ``(n + 1) // 2``.

    Without it: "Unsupported attribute type: <class 'list'>".

    Declines: all sizes are fixed.
    """
    dims = tuple(range(input.dim())) if dim is None else _tuple(dim)
    shifts = [(input.shape[axis] + ctx.extra) // 2 for axis in dims]
    if fixed(*shifts):
        result: torch.Tensor = ctx.origin_func(input, dim)
        return result
    return _rolled(input, shifts, dims)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _rolled(x: torch.Tensor, shifts: Iterable[Any], dims: Iterable[int]) -> torch.Tensor:
    for shift, dim in zip(shifts, dims, strict=True):
        size = x.shape[dim]
        place = torch.arange(size, device=x.device) - shift
        # Not `% size`: torch does not export the remainder of a division by a dynamic number.
        x = x.index_select(dim, place - place.div(size, rounding_mode="floor") * size)
    return x
