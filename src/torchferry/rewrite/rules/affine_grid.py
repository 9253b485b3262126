"""The sampling grid of an affine map, for an output of dynamic size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite.function import FUNCTION_REWRITER
from torchferry.rewrite.rules._sizes import fixed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torchferry.rewrite.state import FunctionContext


@FUNCTION_REWRITER.register_rewriter("torch.nn.functional.affine_grid")
def affine_grid(
    ctx: FunctionContext, theta: torch.Tensor, size: Sequence[Any], align_corners: bool | None = None
) -> torch.Tensor:
    """Compute the grid from ranges of dynamic length.

    ``affine_grid(theta, x.shape)`` → ``theta[..., 0] * xs + theta[..., 1] * ys + theta[..., 2]`` with
    ``xs = (2 * arange(w) - (w - 1)) / w``, and ``/ (w - 1)`` where corners are aligned; likewise in 3-D.

    Without it: FrozenDimensionError; torch fixes height and width to the example's.

    Declines: all sizes are fixed.
    """
    if fixed(*size):
        result: torch.Tensor = ctx.origin_func(theta, size, align_corners)
        return result
    rank = len(size) - 2
    columns = theta.reshape(theta.shape[0], *[1] * rank, rank, rank + 1)
    grid = columns[..., rank]
    for axis, length in enumerate(reversed(size[2:])):  # theta's columns are x, y, z; the sizes z, y, x
        steps = torch.sym_max(length - 1, 1) if align_corners else length
        place = torch.arange(length, dtype=theta.dtype, device=theta.device)
        place = ((2 * place - (length - 1)) / steps).reshape(-1, *[1] * (axis + 1))
        grid = grid + place * columns[..., axis]
    return grid
