"""RoIAlign as an operator: PyTorch's side in PyTorch alone, in the graph ONNX's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchferry.exporter.custom_op import custom_op


def _roi_align_in_onnx(
    g: Any, features: Any, rois: Any, height: int, width: int, scale: float, samples: int, aligned: bool
) -> Any:
    numbers = g.op("Gather", rois, g.op("Constant", value_t=torch.tensor(0)), axis_i=1)
    corners = g.op("Gather", rois, g.op("Constant", value_t=torch.tensor([1, 2, 3, 4])), axis_i=1)
    return g.op(
        "RoiAlign",
        features,
        corners,
        g.op("Cast", numbers, to_i=torch.onnx.TensorProtoDataType.INT64),
        output_height_i=height,
        output_width_i=width,
        spatial_scale_f=scale,
        sampling_ratio_i=samples,
        mode_s="avg",
        coordinate_transformation_mode_s="half_pixel" if aligned else "output_half_pixel",
    )


def _fake_features(features: Tensor, rois: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return features.new_empty(rois.shape[0], features.shape[1], height, width)


@custom_op("torchferry::roi_align", symbolic=_roi_align_in_onnx, fake=_fake_features)
def roi_align(
    features: Tensor, rois: Tensor, height: int, width: int, scale: float, samples: int, aligned: bool
) -> Tensor:
    """Average what bilinear interpolation reads at a grid of points in each cell of each region.

    Args:
        features: float32 (batch, channels, rows, columns).
        rois: float32 (n, 5): the picture's number, x1, y1, x2, y2 in pixels of the picture.
        height: Cells of a region from top to bottom.
        width: Cells from left to right.
        scale: Of the features to the picture.
        samples: Points in a cell along each axis; 0 for as many as it has rows or columns of features.
        aligned: Pixels are where their middle is; without it, regions are at least 1 wide and high.

    Returns:
        float32 (n, channels, height, width).
    """
    made = [
        _weights(y1, y2, features.shape[2], height, scale, samples, aligned)
        @ features[int(picture)]
        @ _weights(x1, x2, features.shape[3], width, scale, samples, aligned).T
        for picture, x1, y1, x2, y2 in rois.tolist()
    ]
    return torch.stack(made) if made else features.new_zeros(0, features.shape[1], height, width)


def _weights(start: float, end: float, size: int, cells: int, scale: float, samples: int, aligned: bool) -> Tensor:
    """Return what each feature along an axis counts in each cell, (cells, size)."""
    first = start * scale - 0.5 * aligned
    length = end * scale - 0.5 * aligned - first
    if not aligned:
        length = max(length, 1.0)
    count = samples or max(0, -int(-length / cells // 1))
    if not count:
        return torch.zeros(cells, size)
    place = first + (torch.arange(cells * count) + 0.5) * (length / cells / count)
    inside = ((place >= -1) & (place <= size)).to(torch.float32)
    place = place.clamp(0, size - 1)
    low = place.floor().long()
    high = (low + 1).clamp(max=size - 1)
    part = (place - low).to(torch.float32)
    rows = torch.arange(len(place))
    weights = torch.zeros(len(place), size)
    weights.index_put_((rows, low), (1 - part) * inside, accumulate=True)
    weights.index_put_((rows, high), part * inside, accumulate=True)
    return weights.view(cells, count, size).mean(1)
