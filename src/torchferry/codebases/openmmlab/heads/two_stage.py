"""Detectors of two stages, such as Faster R-CNN: proposals, their features, and what they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.codebases.openmmlab.detectors import Sample
from torchferry.codebases.openmmlab.heads.candidates import Settings, channels_last, rows, top
from torchferry.codebases.openmmlab.heads.dense_head import clipped, refuse_own_steps
from torchferry.codebases.openmmlab.roi_align import roi_align
from torchferry.core.errors import ExportError
from torchferry.rewrite import FUNCTION_REWRITER

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor


@FUNCTION_REWRITER.register_rewriter("mmcv.ops.RoIAlign.forward")
def roi_align_forward(self: Any, input: Tensor, rois: Tensor) -> Tensor:  # noqa: A002 - mmcv's name
    """Align by ``torchferry::roi_align``, ONNX's RoiAlign.

    Without it: mmcv's own symbolic does not say which half pixel it means, whose default opset 16 changed.
    """
    aligned: Tensor
    if self.pool_mode != "avg" or self.use_torchvision:
        aligned = FUNCTION_REWRITER.get_context().origin_func(self, input, rois)
        return aligned
    height, width = self.output_size
    aligned = roi_align(input, rois, height, width, self.spatial_scale, max(0, self.sampling_ratio), self.aligned)
    return aligned


@FUNCTION_REWRITER.register_rewriter(
    "mmdet.models.roi_heads.roi_extractors.single_level_roi_extractor.SingleRoIExtractor.forward"
)
def single_level_features(
    self: Any, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None
) -> Tensor:
    """Align every region on every level, where it is not of the level a tiny one, and take that of its level.

    ``out[inds] = layer(feat, rois[inds])`` → ``where(is_of_level, layer(feat, where(is_of_level, rois, tiny)), out)``.

    Without it: the number of regions on a level depends on the data, which torch.export refuses.
    """
    if len(feats) == 1:
        features: Tensor = self.roi_layers[0](feats[0], rois)
        return features
    levels = self.map_roi_levels(rois, len(feats))[:, None]
    if roi_scale_factor is not None:
        rois = self.roi_rescale(rois, roi_scale_factor)
    picture, corners = rois[:, :1], rois[:, 1:]
    result: Tensor | None = None
    for level, layer in enumerate(self.roi_layers):
        own = torch.cat([picture, _or_tiny(corners, levels == level)], dim=1)
        aligned: Tensor = layer(feats[level], own)
        result = aligned if result is None else torch.where((levels == level)[..., None, None], aligned, result)
    assert result is not None
    return result


def _or_tiny(corners: Tensor, exists: Tensor) -> Tensor:
    """Return boxes (n, 4), where they do not exist (n, 1) one of a pixel; an empty one is NaN in some engines."""
    return torch.where(exists, corners, torch.tensor([0.0, 0.0, 1.0, 1.0], device=corners.device))


@FUNCTION_REWRITER.register_rewriter("mmdet.models.dense_heads.rpn_head.RPNHead.predict_by_feat", changes_outputs=True)
def predict_proposals(
    self: Any,
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    score_factors: Sequence[Tensor] | None = None,  # noqa: ARG001 - the RPN has none
    batch_img_metas: Sequence[Mapping[str, Any]] = (),
    cfg: Mapping[str, Any] | None = None,
    rescale: bool = False,
    with_nms: bool = True,
) -> tuple[Tensor, Tensor]:
    """Choose the best boxes of each level, suppress on each level by itself, and return the best of all.

    Returns:
        ``dets`` and ``labels`` as ``multiclass_nms``; a label is the number of the level.

    Raises:
        ExportError: If the head has steps of its own.
    """
    refuse_own_steps(self, "mmdet.models.dense_heads.rpn_head.RPNHead")
    settings = Settings.of(self, cfg, rescale=rescale, with_nms=with_nms)
    sizes = [level.shape[-2:] for level in cls_scores]
    priors = self.prior_generator.grid_priors(sizes, dtype=cls_scores[0].dtype, device=cls_scores[0].device)
    boxes, scores = [], []
    for level, anchors in enumerate(priors):
        values = channels_last(cls_scores[level], self.cls_out_channels)
        objectness = (values.sigmoid() if self.use_sigmoid_cls else values.softmax(-1)[..., :-1])[..., 0]
        deltas = channels_last(bbox_preds[level], self.bbox_coder.encode_size)
        best, index = top(objectness, settings.nms_pre or anchors.shape[0])
        decoded = self.bbox_coder.decode(rows(anchors, index).flatten(0, 1), rows(deltas, index).flatten(0, 1))
        boxes.append(decoded.view(*index.shape, 4))
        # Each level is a class of its own to the NMS.
        scores.append(torch.nn.functional.pad(best.clamp(min=0)[..., None], (level, len(priors) - 1 - level)))
    found = torch.cat(boxes, dim=1)
    if self.bbox_coder.clip_border:
        found = clipped(found, batch_img_metas)
    return settings.detections(found, torch.cat(scores, dim=1))


@FUNCTION_REWRITER.register_rewriter("mmdet.models.detectors.two_stage.TwoStageDetector.predict", changes_outputs=True)
def predict(self: Any, batch_inputs: Tensor, batch_data_samples: Any, rescale: bool = True) -> tuple[Tensor, Tensor]:
    """Find proposals, and what they are, in pixels of the input.

    Returns:
        ``dets`` and ``labels`` as ``multiclass_nms``.

    Raises:
        ExportError: If the second stage is not that of Faster R-CNN.
    """
    del batch_data_samples, rescale
    head = self.roi_head
    _refuse_other_stages(head)
    features = self.extract_feat(batch_inputs)
    sample = Sample({"img_shape": batch_inputs.shape[-2:], "scale_factor": (1.0, 1.0)})
    dets, labels = self.rpn_head.predict(features, [sample], rescale=False)
    return _classified(head, features, dets[..., :4], labels >= 0, [sample.metainfo])


def _refuse_other_stages(head: Any) -> None:
    known = "mmdet.models.roi_heads.standard_roi_head.StandardRoIHead"
    kind = f"{type(head).__module__}.{type(head).__qualname__}"
    if kind != known or head.with_mask:
        what = "masks" if kind == known else "a second stage of its own"
        raise ExportError(
            f"'{type(head).__name__}' has {what}, which no rewriter here exports",
            hint="export a detector with a plain StandardRoIHead, or partition the model in front of it",
        )


def _classified(
    head: Any, features: Sequence[Tensor], proposals: Tensor, exists: Tensor, metas: Sequence[Mapping[str, Any]]
) -> tuple[Tensor, Tensor]:
    """Return detections of proposals (batch, k, 4), those that exist (batch, k)."""
    batch, count = exists.shape
    box_head = head.bbox_head
    settings = Settings.of(box_head, head.test_cfg, rescale=False, with_nms=True)
    numbers = torch.arange(batch, device=proposals.device, dtype=proposals.dtype).repeat_interleave(count)
    rois = torch.cat([numbers[:, None], _or_tiny(proposals.flatten(0, 1), exists.view(-1, 1))], dim=1)
    results = head._bbox_forward(features, rois)
    logits, deltas = results["cls_score"], results["bbox_pred"]
    values = box_head.loss_cls.get_activation(logits) if box_head.custom_cls_channels else logits.softmax(-1)
    classes = box_head.num_classes
    scores = values[:, :classes].view(batch, count, classes)
    scores = torch.where((scores > settings.score_thr) & exists[..., None], scores, 0.0)
    each = deltas.shape[1] // box_head.bbox_coder.encode_size
    priors = rois[:, None, 1:].expand(-1, each, -1).flatten(0, 1)
    decoded = box_head.bbox_coder.decode(priors, deltas.reshape(-1, box_head.bbox_coder.encode_size))
    boxes = decoded.view(batch, count, each, 4)
    if box_head.bbox_coder.clip_border:
        boxes = clipped(boxes, metas)
    return settings.detections(boxes if each > 1 else boxes[:, :, 0], scores)
