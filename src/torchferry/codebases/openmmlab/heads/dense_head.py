"""Heads with anchors or points on several levels: RetinaNet, SSD, FCOS, ATSS, RTMDet and the like; and GFL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from torchferry.codebases.openmmlab.heads.candidates import Settings, best_boxes, channels_last, rows
from torchferry.core.errors import ExportError
from torchferry.rewrite import FUNCTION_REWRITER

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    Decode = Callable[[Any, Tensor, Tensor, int], Tensor]

_BASE = "mmdet.models.dense_heads.base_dense_head"
_GFL = "mmdet.models.dense_heads.gfl_head"


@FUNCTION_REWRITER.register_rewriter(f"{_BASE}.BaseDenseHead.predict_by_feat", changes_outputs=True)
def predict_by_feat(
    self: Any,
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    score_factors: Sequence[Tensor] | None = None,
    batch_img_metas: Sequence[Mapping[str, Any]] = (),
    cfg: Mapping[str, Any] | None = None,
    rescale: bool = False,
    with_nms: bool = True,
) -> tuple[Tensor, Tensor]:
    """Decode the best boxes of each level, and suppress those of all levels together.

    Args:
        self: The head.
        cls_scores: For each level (batch, priors * classes, height, width).
        bbox_preds: For each level (batch, priors * 4, height, width).
        score_factors: For each level (batch, priors, height, width), such as FCOS's centerness; None for none.
        batch_img_metas: ``img_shape`` of the first is where boxes are clipped.
        cfg: Instead of the head's ``test_cfg``.
        rescale: Must be False.
        with_nms: Must be True.

    Returns:
        ``dets`` and ``labels`` as ``multiclass_nms``.

    Raises:
        ExportError: If the head has steps of its own.
    """
    refuse_own_steps(self, f"{_BASE}.BaseDenseHead")
    settings = Settings.of(self, cfg, rescale=rescale, with_nms=with_nms)
    return _detections(self, settings, cls_scores, bbox_preds, score_factors, batch_img_metas, _by_coder)


@FUNCTION_REWRITER.register_rewriter(f"{_GFL}.GFLHead.predict_by_feat", changes_outputs=True)
def predict_by_feat_gfl(
    self: Any,
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    score_factors: Sequence[Tensor] | None = None,  # noqa: ARG001
    batch_img_metas: Sequence[Mapping[str, Any]] = (),
    cfg: Mapping[str, Any] | None = None,
    rescale: bool = False,
    with_nms: bool = True,
) -> tuple[Tensor, Tensor]:
    """Decode distributions of distances, else as ``predict_by_feat``; no score factors."""
    refuse_own_steps(self, f"{_GFL}.GFLHead")
    settings = Settings.of(self, cfg, rescale=rescale, with_nms=with_nms)
    return _detections(self, settings, cls_scores, bbox_preds, None, batch_img_metas, _by_distributions)


def refuse_own_steps(head: Any, known: str) -> None:
    """Refuse heads that decode or suppress in another way than the class ``known``.

    Raises:
        ExportError: Names the method.
    """
    for name in ("_predict_by_feat_single", "_bbox_post_process"):
        step = getattr(type(head), name)
        place = f"{step.__module__}.{step.__qualname__}"
        if place not in (f"{known}.{name}", f"{_BASE}.BaseDenseHead.{name}"):
            raise ExportError(
                f"the post-processing of '{type(head).__name__}' is not known: it has a {step.__qualname__} of its own",
                hint="register a rewriter of its predict_by_feat, or partition the model in front of it",
            )


def _by_coder(head: Any, priors: Tensor, preds: Tensor, level: int) -> Tensor:  # noqa: ARG001
    decoded: Tensor = head.bbox_coder.decode(priors.flatten(0, 1), preds.flatten(0, 1))
    return decoded.view(preds.shape)


def _by_distributions(head: Any, priors: Tensor, preds: Tensor, level: int) -> Tensor:
    distances = head.integral(preds.flatten(0, 1)) * head.prior_generator.strides[level][0]
    decoded: Tensor = head.bbox_coder.decode(head.anchor_center(priors.flatten(0, 1)), distances)
    return decoded.view(*preds.shape[:2], 4)


def _detections(
    head: Any,
    settings: Settings,
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    score_factors: Sequence[Tensor] | None,
    batch_img_metas: Sequence[Mapping[str, Any]],
    decode: Decode,
) -> tuple[Tensor, Tensor]:
    sizes = [level.shape[-2:] for level in cls_scores]
    levels = head.prior_generator.grid_priors(sizes, dtype=cls_scores[0].dtype, device=cls_scores[0].device)
    boxes, scores = [], []
    for level, priors in enumerate(levels):
        candidates, index = best_boxes(_class_scores(head, cls_scores[level]), settings)
        count = head.prior_generator.num_base_priors[level]
        preds = channels_last(bbox_preds[level], bbox_preds[level].shape[1] // count)
        if score_factors is not None:
            factors = channels_last(score_factors[level], 1).sigmoid()
            candidates = candidates * (factors if index is None else rows(factors, index))
        if index is None:
            priors = priors.expand(preds.shape[0], -1, -1)  # noqa: PLW2901
        else:
            priors, preds = rows(priors, index), rows(preds, index)  # noqa: PLW2901
        boxes.append(decode(head, priors, preds, level))
        scores.append(candidates)
    found = torch.cat(boxes, dim=1)
    if head.bbox_coder.clip_border:
        found = clipped(found, batch_img_metas)
    return settings.detections(found, torch.cat(scores, dim=1))


def clipped(boxes: Tensor, batch_img_metas: Sequence[Mapping[str, Any]]) -> Tensor:
    """Clip boxes (..., 4) to ``img_shape``, (height, width), which may be symbolic."""
    height, width = batch_img_metas[0]["img_shape"][:2]
    x1, y1, x2, y2 = boxes.unbind(-1)
    return torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], dim=-1)


def _class_scores(head: Any, cls_score: Tensor) -> Tensor:
    """Return probabilities, (batch, n, classes), without the background."""
    values = channels_last(cls_score, head.cls_out_channels)
    loss: Any = getattr(head, "loss_cls", None)  # SSD's has none
    if getattr(loss, "custom_cls_channels", False):
        activated: Tensor = loss.get_activation(values)
        return activated
    return values.sigmoid() if head.use_sigmoid_cls else values.softmax(-1)[..., :-1]
