"""YOLOX's head: one class a box, the best, and no limit in front of the NMS."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.codebases.openmmlab.heads.candidates import Settings, channels_last
from torchferry.rewrite import FUNCTION_REWRITER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


@FUNCTION_REWRITER.register_rewriter(
    "mmdet.models.dense_heads.yolox_head.YOLOXHead.predict_by_feat", changes_outputs=True
)
def predict_by_feat(
    self: Any,
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    objectnesses: Sequence[Tensor],
    batch_img_metas: Sequence[Mapping[str, Any]] = (),  # noqa: ARG001 - YOLOX does not clip its boxes
    cfg: Mapping[str, Any] | None = None,
    rescale: bool = False,
    with_nms: bool = True,
) -> tuple[Tensor, Tensor]:
    """Decode all boxes, and suppress.

    Args:
        self: The head.
        cls_scores: For each level (batch, classes, height, width).
        bbox_preds: For each level (batch, 4, height, width).
        objectnesses: For each level (batch, 1, height, width).
        batch_img_metas: Not looked at.
        cfg: Instead of the head's ``test_cfg``.
        rescale: Must be False.
        with_nms: Must be True.

    Returns:
        ``dets`` and ``labels`` as ``multiclass_nms``.
    """
    settings = Settings.of(self, cfg, rescale=rescale, with_nms=with_nms)
    sizes = [level.shape[-2:] for level in cls_scores]
    priors = self.prior_generator.grid_priors(
        sizes, dtype=cls_scores[0].dtype, device=cls_scores[0].device, with_stride=True
    )

    def joined(levels: Sequence[Tensor], size: int) -> Tensor:
        return torch.cat([channels_last(level, size) for level in levels], dim=1)

    classes = joined(cls_scores, self.cls_out_channels).sigmoid()
    scores = classes * joined(objectnesses, 1).sigmoid()
    best = torch.nn.functional.one_hot(classes.argmax(2), classes.shape[2]).to(torch.bool)
    scores = torch.where(best & (scores >= settings.score_thr), scores, 0.0)
    return settings.detections(self._bbox_decode(torch.cat(priors), joined(bbox_preds, 4)), scores)
