"""YOLOv3's head: the boundary ``yolo_head``, then anchors, decoding and NMS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.codebases.openmmlab.heads.candidates import Settings, best_boxes, channels_last, rows
from torchferry.exporter.marks import mark
from torchferry.rewrite import FUNCTION_REWRITER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


@FUNCTION_REWRITER.register_rewriter(
    "mmdet.models.dense_heads.yolo_head.YOLOV3Head.predict_by_feat", changes_outputs=True
)
def predict_by_feat(
    self: Any,
    pred_maps: Sequence[Tensor],
    batch_img_metas: Sequence[Mapping[str, Any]],  # noqa: ARG001 - YOLOv3 does not clip its boxes
    cfg: Mapping[str, Any] | None = None,
    rescale: bool = False,
    with_nms: bool = True,
) -> tuple[Tensor, Tensor]:
    """Decode the best boxes of all levels together, and suppress.

    Args:
        self: The head.
        pred_maps: For each level (batch, anchors * (5 + classes), height, width).
        batch_img_metas: Not looked at.
        cfg: Instead of the head's ``test_cfg``.
        rescale: Must be False.
        with_nms: Must be True.

    Returns:
        ``dets`` and ``labels`` as ``multiclass_nms``.
    """
    settings = Settings.of(self, cfg, rescale=rescale, with_nms=with_nms)

    @mark("yolo_head", inputs=["pred_maps"], outputs=["dets", "labels"])
    def head(pred_maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        sizes = [pred_map.shape[-2:] for pred_map in pred_maps]
        anchors = self.prior_generator.grid_priors(sizes, device=pred_maps[0].device)
        strides = [
            torch.full_like(level[:, :1], stride) for level, stride in zip(anchors, self.featmap_strides, strict=True)
        ]
        preds = torch.cat([channels_last(pred_map, self.num_attrib) for pred_map in pred_maps], dim=1)
        objectness = preds[..., 4:5].sigmoid()
        scores = preds[..., 5:].sigmoid()
        if settings.conf_thr > 0:
            scores = torch.where(objectness >= settings.conf_thr, scores, 0.0)
        scores, index = best_boxes(scores, settings)
        parts = [torch.cat(anchors), torch.cat(strides), preds[..., :4], objectness]
        if index is not None:
            parts = [rows(part, index) for part in parts]
        anchor, stride, box, factor = parts
        encoded = torch.cat([box[..., :2].sigmoid(), box[..., 2:]], dim=-1)
        return settings.detections(self.bbox_coder.decode(anchor, encoded, stride), scores * factor)

    return head(pred_maps)
