"""What all heads share: what their ``test_cfg`` says, and which boxes are candidates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchferry.codebases.openmmlab.nms import multiclass_nms
from torchferry.core.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_FEW = 5000  # so many boxes are chosen from each level; a higher nms_pre limits pairs alone
DEFAULT_MAX_PER_IMG = 300  # where a config sets no limit; the graph's outputs need one


@dataclass(frozen=True)
class Settings:
    """What a head's ``test_cfg`` says of its post-processing.

    Attributes:
        score_thr: A class is a candidate where its score is above this.
        conf_thr: YOLOv3's objectness must be this at least.
        nms_pre: So many pairs of box and class go on, the best; all if None.
        min_bbox_size: Boxes must be wider and higher than this, if it is not negative.
        iou_threshold: Of the suppression.
        class_agnostic: Boxes suppress those of other classes.
        max_per_img: So many detections a picture at most.
    """

    score_thr: float
    conf_thr: float
    nms_pre: int | None
    min_bbox_size: float
    iou_threshold: float
    class_agnostic: bool
    max_per_img: int

    @classmethod
    def of(cls, head: Any, cfg: Mapping[str, Any] | None, *, rescale: bool, with_nms: bool) -> Settings:
        """Read them.

        Args:
            head: The head, for its ``test_cfg`` and for messages.
            cfg: What is said instead of the head's own.
            rescale: As for ``predict_by_feat``.
            with_nms: As for ``predict_by_feat``.

        Raises:
            ExportError: If they ask for what no graph has here: another kind of NMS, or boxes in the size that the
                picture had before it was resized.
        """
        name = type(head).__name__
        cfg = head.test_cfg if cfg is None else cfg
        nms = dict(cfg.get("nms") or {})
        if rescale or not with_nms:
            raise ExportError(
                f"'{name}' is exported with NMS and with boxes in the sizes of its input",
                hint="call it with rescale=False and with_nms=True, and scale the boxes of the result",
            )
        kind = nms.pop("type", None)
        iou_threshold = nms.pop("iou_threshold", nms.pop("iou_thr", None))
        class_agnostic = bool(nms.pop("class_agnostic", False))
        nms.pop("split_thr", None)  # how mmcv saves memory
        if kind != "nms" or iou_threshold is None or nms:
            raise ExportError(
                f"the NMS of '{name}' is {dict(cfg.get('nms') or {})}; exported is type 'nms' with iou_threshold",
                hint="change test_cfg.nms of the model config",
            )
        nms_pre = cfg.get("nms_pre", -1)
        max_per_img = cfg.get("max_per_img", -1)
        return cls(
            score_thr=cfg.get("score_thr", 0),
            conf_thr=cfg.get("conf_thr", -1),
            nms_pre=nms_pre if nms_pre > 0 else None,
            min_bbox_size=cfg.get("min_bbox_size", -1),
            iou_threshold=iou_threshold,
            class_agnostic=class_agnostic,
            max_per_img=max_per_img if max_per_img > 0 else DEFAULT_MAX_PER_IMG,
        )

    def detections(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Suppress what is large enough; boxes, scores and what is returned as in ``multiclass_nms``."""
        if self.min_bbox_size >= 0:
            wide = boxes[..., 2] - boxes[..., 0] > self.min_bbox_size
            high = boxes[..., 3] - boxes[..., 1] > self.min_bbox_size
            large = wide & high
            scores = torch.where(large if boxes.dim() == 4 else large[..., None], scores, 0.0)
        return multiclass_nms(
            boxes,
            scores,
            iou_threshold=self.iou_threshold,
            max_per_img=self.max_per_img,
            class_agnostic=self.class_agnostic,
        )


def rows(values: Tensor, index: Tensor) -> Tensor:
    """Take the rows (batch, k) of values (batch, n, d) or (n, d)."""
    if values.dim() == 2:
        return values[index]
    pictures = torch.arange(values.shape[0], device=values.device)[:, None]
    return values[pictures, index]


def channels_last(values: Tensor, size: int) -> Tensor:
    """Return (batch, height * width * anchors, size) of (batch, anchors * size, height, width)."""
    # A reshape would ask whether height * width is 1, and the graph would refuse such sizes.
    moved = values.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    return moved.view(values.shape[0], -1, size)


def best_boxes(scores: Tensor, settings: Settings) -> tuple[Tensor, Tensor | None]:
    """Choose the boxes that hold the best ``nms_pre`` pairs of box and class.

    Such a pair is of one of the ``nms_pre`` boxes with the best scores, since each of those has a pair as good.

    Args:
        scores: float32 (batch, n, classes).
        settings: What the head says.

    Returns:
        The scores of k boxes, (batch, k, classes), 0 where a pair is none of the best or not above the threshold; where
        the last of the best is equal to others, all of these stay. And their indices, (batch, k), None for all boxes.
    """
    if settings.nms_pre is None:
        return torch.where(scores > settings.score_thr, scores, 0.0), None
    index = None
    if settings.nms_pre <= _FEW:
        best, index = top(scores.amax(2), settings.nms_pre)
        scores = torch.where(best[..., None] >= 0, rows(scores, index), 0.0)
    last = top(scores.flatten(1), settings.nms_pre)[0][:, -1]
    scores = torch.where(scores >= last[:, None, None], scores, 0.0)
    return torch.where(scores > settings.score_thr, scores, 0.0), index


def top(values: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the largest values of (batch, n) and their indices, (batch, most).

    Where n is dynamic there may be fewer: behind the last are the value -1 and the index 0, and no condition on n is
    left in the graph. Where n is a smaller number, there are n.
    """
    count: Any = values.shape[1]
    if isinstance(count, int):
        found = values.topk(min(most, count), dim=1)
        return found.values, found.indices
    found = torch.nn.functional.pad(values, (0, most), value=-1.0).topk(most, dim=1)
    return found.values, torch.where(found.values >= 0, found.indices, 0)
