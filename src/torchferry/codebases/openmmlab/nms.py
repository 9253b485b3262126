"""Non-maximum suppression whose result has sizes known before it is run, so that it can be exported."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchferry.exporter.custom_op import custom_op
from torchferry.exporter.marks import mark


def _nms_in_onnx(g: Any, boxes: Any, scores: Any, most: int, iou_threshold: float, score_threshold: float) -> Any:
    """Build a NonMaxSuppression, whose triplets of picture, class and box say where a ScatterND writes ones."""
    selected = g.op(
        "NonMaxSuppression",
        boxes,
        scores,
        g.op("Constant", value_t=torch.tensor([most])),
        g.op("Constant", value_t=torch.tensor([iou_threshold])),
        g.op("Constant", value_t=torch.tensor([score_threshold])),
    )
    zeros = g.op("ConstantOfShape", g.op("Shape", scores), value_t=torch.tensor([0.0]))
    ones = g.op("ConstantOfShape", g.op("Shape", selected, start_i=0, end_i=1), value_t=torch.tensor([1.0]))
    return g.op("Cast", g.op("ScatterND", zeros, selected, ones), to_i=torch.onnx.TensorProtoDataType.BOOL)


def _fake_keep(boxes: Tensor, scores: Tensor, *_: Any) -> Tensor:  # noqa: ARG001 - the operator's own parameters
    return scores.new_empty(scores.shape, dtype=torch.bool)


@custom_op("torchferry::nms_keep", symbolic=_nms_in_onnx, fake=_fake_keep)
def nms_keep(boxes: Tensor, scores: Tensor, most: int, iou_threshold: float, score_threshold: float) -> Tensor:
    """Tell which boxes greedy non-maximum suppression keeps, for each picture and class by itself.

    Of the boxes whose score is above ``score_threshold`` the best is kept, those whose intersection over union with it
    is above ``iou_threshold`` go, and so on with the rest. Of equal scores the first comes first.

    Args:
        boxes: float32 (batch, boxes, 4): x1, y1, x2, y2.
        scores: float32 (batch, classes, boxes).
        most: So many at most are kept of one class in one picture.
        iou_threshold: 0 to 1.
        score_threshold: Any number.

    Returns:
        bool (batch, classes, boxes). In the graph it is made of operators of ONNX.
    """
    corners, values = boxes.detach().cpu().numpy(), scores.detach().cpu().numpy()
    keep = np.zeros(values.shape, bool)
    for picture, label in np.argwhere((values > score_threshold).any(2)):
        row = values[picture, label]
        order = np.argsort(-row, kind="stable")
        order = order[row[order] > score_threshold]
        keep[picture, label, order[_greedy(corners[picture, order], most, iou_threshold)]] = True
    return torch.from_numpy(keep).to(scores.device)


def _greedy(boxes: np.ndarray[Any, Any], most: int, iou_threshold: float) -> list[int]:
    """Return the rows that are kept of boxes (n, 4), the best first."""
    starts, ends = boxes[:, :2], boxes[:, 2:]
    areas = (ends - starts).prod(axis=1)
    left = np.arange(len(boxes))
    kept: list[int] = []
    while len(left) and len(kept) < most:
        best, left = left[0], left[1:]
        kept.append(int(best))
        common = (np.minimum(ends[best], ends[left]) - np.maximum(starts[best], starts[left])).clip(0).prod(axis=1)
        with np.errstate(invalid="ignore"):  # of two boxes without an area it is 0 / 0, which is above nothing
            iou = common / (areas[best] + areas[left] - common)
        left = left[~(iou > np.float32(iou_threshold))]
    return kept


@mark("multiclass_nms", inputs=["boxes", "scores"], outputs=["dets", "labels"])
def multiclass_nms(
    boxes: Tensor, scores: Tensor, *, iou_threshold: float, max_per_img: int, class_agnostic: bool = False
) -> tuple[Tensor, Tensor]:
    """Suppress boxes that overlap better ones of their class, and return the best of the rest.

    Args:
        boxes: float32 (batch, boxes, 4): x1, y1, x2, y2; or (batch, boxes, classes, 4), where each class has its own.
        scores: float32 (batch, boxes, classes); 0 where there is no candidate.
        iou_threshold: 0 to 1.
        max_per_img: So many rows a picture.
        class_agnostic: Boxes suppress those of other classes too.

    Returns:
        ``dets`` float32 (batch, max_per_img, 5): x1, y1, x2, y2, score, the best first, and ``labels`` int64 (batch,
        max_per_img). Behind the last detection: zeros, and label -1.
    """
    classes = scores.shape[2]
    keep = _kept_pairs(boxes, scores, max_per_img, iou_threshold, class_agnostic=class_agnostic)
    kept = torch.where(keep, scores, 0.0).flatten(1)
    kept = torch.nn.functional.pad(kept, (0, max_per_img))  # there may be fewer pairs of box and class than rows
    values, places = kept.topk(max_per_img, dim=1)
    exists = values > 0
    places = torch.where(exists, places, 0)
    pictures = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    found = boxes[pictures, places // classes] if boxes.dim() == 3 else boxes.flatten(1, 2)[pictures, places]
    dets = torch.cat([torch.where(exists[..., None], found, 0.0), values[..., None]], dim=2)
    return dets, torch.where(exists, places % classes, -1)


def _kept_pairs(boxes: Tensor, scores: Tensor, most: int, iou_threshold: float, *, class_agnostic: bool) -> Tensor:
    """Return which pairs of box and class stay, bool (batch, boxes, classes)."""
    batch, count, classes = scores.shape

    def kept(own_boxes: Tensor, own_scores: Tensor) -> Tensor:
        keep: Tensor = nms_keep(own_boxes, own_scores, most, iou_threshold, 0.0)
        return keep

    if class_agnostic and boxes.dim() == 4:
        return kept(boxes.flatten(1, 2), scores.flatten(1)[:, None]).view(batch, count, classes)
    if class_agnostic:
        # Of one box with several classes the best suppresses the others.
        best = torch.nn.functional.one_hot(scores.argmax(2), classes).to(torch.bool)
        return best & kept(boxes, scores.amax(2)[:, None]).transpose(1, 2)
    if boxes.dim() == 3:
        return kept(boxes, scores.transpose(1, 2)).transpose(1, 2)
    # Each class of each picture is a picture of its own.
    keep = kept(boxes.transpose(1, 2).flatten(0, 1), scores.transpose(1, 2).flatten(0, 1)[:, None])
    return keep.view(batch, classes, count).transpose(1, 2)
