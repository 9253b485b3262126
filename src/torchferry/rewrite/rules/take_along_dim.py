"""Gathering along one axis, the others broadcast."""

# ruff: noqa: A002 - parameters are named as in torch

from __future__ import annotations

from typing import TYPE_CHECKING

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed, same

if TYPE_CHECKING:
    import torch

    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.take_along_dim")
@FUNCTION_REWRITER.register_rewriter("torch.Tensor.take_along_dim")
def take_along_dim(
    ctx: FunctionContext, input: torch.Tensor, indices: torch.Tensor, dim: int | None = None
) -> torch.Tensor:
    """Gather, expanding what has size 1.

    ``take_along_dim(x, i, 1)`` → ``x.gather(1, i)``.

    Without it: FrozenDimensionError; torch compares all sizes of the two.

    Declines: all sizes are fixed.
    """
    if fixed(*input.shape, *indices.shape):
        result: torch.Tensor = ctx.origin_func(input, indices, dim)
        return result
    if dim is None:
        return input.flatten().gather(0, indices.flatten())
    axis = dim % input.dim()
    return _broadcast(input, indices, axis).gather(axis, _broadcast(indices, input, axis))


def _broadcast(x: torch.Tensor, other: torch.Tensor, axis: int) -> torch.Tensor:
    """Expand what has size 1 in all axes but one to the other's size."""
    pairs = enumerate(zip(x.shape, other.shape, strict=True))
    sizes = [b if place != axis and same(a, 1) else a for place, (a, b) in pairs]
    return x if all(map(same, sizes, x.shape)) else x.expand(sizes)
