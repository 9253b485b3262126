"""A stand-in for ``mmcv._ext``, the compiled operators that the lite build of mmcv does not have."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from torchferry.codebases.openmmlab.roi_align import roi_align
from torchferry.core.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable


class OperatorsInPython(ModuleType):
    """A module that has ``nms`` and ``roi_align_forward``, and every other operator as a function that refuses.

    mmcv asks for all of its operators while it is imported; few models call one.
    """

    nms: Callable[..., torch.Tensor]
    roi_align_forward: Callable[..., None]

    def __init__(self) -> None:
        super().__init__("mmcv._ext")
        self.nms = nms
        self.roi_align_forward = roi_align_forward

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*_: Any, **__: Any) -> None:
            raise ModelError(
                f"the model calls mmcv's compiled operator '{name}', which mmcv-lite does not have",
                hint="leave that step out of what is exported, or build mmcv with its operators",
            )

        return missing


def nms(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float, offset: int = 0) -> torch.Tensor:
    """Return the rows that greedy non-maximum suppression keeps, the highest score first.

    Args:
        boxes: (N, 4), x1, y1, x2, y2.
        scores: (N,).
        iou_threshold: A box whose intersection over union with a better one is above this goes.
        offset: Added to widths and heights, 1 where boxes are counted in whole pixels.

    Returns:
        int64 (K,). Of equal scores the earlier row comes first.
    """
    order = scores.sort(descending=True, stable=True).indices
    boxes = boxes[order]
    x1, y1, x2, y2 = boxes.unbind(1)
    areas = (x2 - x1 + offset) * (y2 - y1 + offset)
    kept = torch.ones(len(order), dtype=torch.bool, device=boxes.device)
    for at in range(len(order)):
        if not kept[at]:
            continue
        width = (torch.minimum(x2[at], x2[at + 1 :]) - torch.maximum(x1[at], x1[at + 1 :]) + offset).clamp(min=0)
        height = (torch.minimum(y2[at], y2[at + 1 :]) - torch.maximum(y1[at], y1[at + 1 :]) + offset).clamp(min=0)
        common = width * height
        kept[at + 1 :] &= common <= iou_threshold * (areas[at] + areas[at + 1 :] - common)
    return order[kept]


def roi_align_forward(
    features: torch.Tensor,
    rois: torch.Tensor,
    output: torch.Tensor,
    *_: torch.Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write into ``output`` what ``roi_align`` gives.

    Raises:
        ModelError: If ``pool_mode`` is not 1, which is the average.
    """
    if pool_mode != 1:
        raise ModelError("the model aligns regions with pool_mode='max', which mmcv-lite does not have")
    output.copy_(
        roi_align(features, rois, aligned_height, aligned_width, spatial_scale, max(0, sampling_ratio), aligned)
    )
