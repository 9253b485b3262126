"""The points of heads without anchors, without a condition on the number of rows and columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.rewrite import FUNCTION_REWRITER

if TYPE_CHECKING:
    from torch import Tensor


@FUNCTION_REWRITER.register_rewriter(
    "mmdet.models.task_modules.prior_generators.point_generator.MlvlPointGenerator.single_level_grid_priors"
)
def single_level_grid_priors(
    self: Any,
    featmap_size: tuple[int, int],
    level_idx: int,
    dtype: torch.dtype = torch.float32,
    device: Any = "cuda",
    with_stride: bool = False,
) -> Tensor:
    """Repeat rows and columns: ``meshgrid(y, x)``, ``reshape(-1)`` → ``x.repeat(h)``, ``y.repeat_interleave(w)``.

    Without it the graph is right only where a level has more than one row and more than one column.

    Args:
        self: The generator.
        featmap_size: Height and width of the level.
        level_idx: The level.
        dtype: Of the points.
        device: Of the points.
        with_stride: Add the strides as two more columns.

    Returns:
        (height * width, 2 or 4): x, y in pixels of the picture.
    """
    height, width = featmap_size
    stride_x, stride_y = self.strides[level_idx]
    x = ((torch.arange(width, device=device) + self.offset) * stride_x).to(dtype).repeat(height)
    y = ((torch.arange(height, device=device) + self.offset) * stride_y).to(dtype)
    y = y.view(-1, 1).repeat(1, width).view(-1)
    columns = [x, y]
    if with_stride:
        columns += [torch.full_like(x, stride_x), torch.full_like(x, stride_y)]
    return torch.stack(columns, dim=-1)
