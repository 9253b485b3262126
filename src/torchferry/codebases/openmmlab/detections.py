"""Detections of a picture as a set: which of PyTorch's an engine has found, and which not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from torchferry.core.report import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    Array = np.ndarray[Any, np.dtype[Any]]

NMS_ATOL = 1e-3
"""So near to the threshold of the NMS an overlap may fall on either side: mmcv shifts the boxes of each class by
thousands of pixels before it compares them, in float32."""

_SAME_CORNERS = 0.01  # pixels; for boxes too small for an intersection over union to say much


@dataclass(frozen=True)
class Detections:
    """What was found in one picture.

    Attributes:
        boxes: float32 (n, 4): x1, y1, x2, y2 in pixels.
        scores: float32 (n,).
        labels: int64 (n,).
    """

    boxes: Array
    scores: Array
    labels: Array

    @classmethod
    def of_rows(cls, dets: Array, labels: Array) -> Self:
        """Take the detections out of one picture's rows: (k, 5) with the scores, (k,) with -1 behind the last."""
        real = labels >= 0
        return cls(dets[real, :4], dets[real, 4], labels[real])

    @classmethod
    def of_instances(cls, instances: Any) -> Self:
        """Take them from OpenMMLab's ``pred_instances``."""
        arrays = (instances.bboxes, instances.scores, instances.labels)
        return cls(*(array.detach().cpu().numpy() for array in arrays))

    def __len__(self) -> int:
        return len(self.scores)

    def words(self, row: int) -> str:
        """Say what one detection is."""
        corners = ", ".join(f"{value:.1f}" for value in self.boxes[row])
        return f"label {self.labels[row]}, score {self.scores[row]:.4f}, box ({corners})"


@dataclass(frozen=True)
class Matching:
    """Which detections are the same.

    Attributes:
        pairs: Rows of the expected and of the actual detections.
        findings: An error for each that has no partner; an info for each that lies on a threshold.
        max_box: Largest difference of a corner's coordinate over the pairs, in pixels.
        max_score: Largest difference of a score.
        expected: Number of expected detections.
        actual: Number of actual detections.
    """

    pairs: tuple[tuple[int, int], ...]
    findings: tuple[Finding, ...]
    max_box: float
    max_score: float
    expected: int
    actual: int

    @property
    def passed(self) -> bool:
        """True if no finding is an error."""
        return not any(finding.severity == "error" for finding in self.findings)

    def __str__(self) -> str:
        return (
            f"{len(self.pairs)} of {self.expected} detections matched (the engine has {self.actual}), "
            f"boxes to {self.max_box:.2g} px, scores to {self.max_score:.2g}"
        )


def match_detections(
    expected: Detections,
    actual: Detections,
    *,
    iou: float = 0.99,
    score_atol: float = 1e-3,
    score_thr: float | None = None,
    max_per_img: int | None = None,
    nms_iou: float | None = None,
    where: str | None = None,
) -> Matching:
    """Match each expected detection with one actual detection of the same label, box and score, in any order.

    A detection without a partner is an error, ``detection-missing`` or ``detection-extra``, unless a difference within
    the tolerance explains it; then it is an info, ``detection-tie``: its score is on the threshold, or no better than
    the last of as many as there may be, or its overlap with a better one is on the threshold of the NMS, or it and
    another one that suppress each other have the same score.

    Args:
        expected: PyTorch's.
        actual: The engine's.
        iou: Two boxes are the same if their intersection over union is this at least, or their corners are within
            0.01 pixels.
        score_atol: Two scores are the same if they differ by this at most.
        score_thr: The model's threshold; None if unknown.
        max_per_img: So many detections at most; None if unknown.
        nms_iou: The threshold of the model's NMS; None if unknown.
        where: What the findings are about: the picture, the engine.

    Returns:
        The pairs and the findings.
    """
    overlaps = _overlaps(expected, actual)
    corners = np.abs(expected.boxes[:, None].astype(np.float64) - actual.boxes[None]).max(axis=2, initial=0.0)
    distances = np.abs(expected.scores[:, None].astype(np.float64) - actual.scores[None])
    same = (overlaps >= iou) | (corners <= _SAME_CORNERS)
    same &= (distances <= score_atol) & (expected.labels[:, None] == actual.labels[None])
    pairs = _pairs(same, corners)
    ties = _Ties(score_atol, score_thr, max_per_img, nms_iou)
    missing = sorted(set(range(len(expected))) - {row for row, _ in pairs})
    extra = sorted(set(range(len(actual))) - {column for _, column in pairs})
    findings = [
        *_findings(expected, missing, actual, extra, ties, where, is_missing=True),
        *_findings(actual, extra, expected, missing, ties, where, is_missing=False),
    ]
    return Matching(
        tuple(pairs),
        tuple(findings),
        max((float(corners[pair]) for pair in pairs), default=0.0),
        max((float(distances[pair]) for pair in pairs), default=0.0),
        len(expected),
        len(actual),
    )


def _pairs(same: Array, corners: Array) -> list[tuple[int, int]]:
    """Return as many pairs as there can be, those with the nearest corners where there is a choice."""
    from scipy.optimize import linear_sum_assignment

    never = (corners.max(initial=0.0) + 1.0) * (min(same.shape) + 1)
    chosen = zip(*linear_sum_assignment(np.where(same, corners, never)), strict=True)
    return [(int(row), int(column)) for row, column in chosen if same[row, column]]


def _overlaps(left: Detections, right: Detections) -> Array:
    """Return intersections over unions (left, right); 0 for two boxes without an area."""
    a, b = left.boxes[:, None].astype(np.float64), right.boxes[None].astype(np.float64)
    sides = (np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])).clip(0)
    common = sides.prod(axis=2)
    union = (a[..., 2:] - a[..., :2]).prod(axis=2) + (b[..., 2:] - b[..., :2]).prod(axis=2) - common
    overlaps: Array = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return overlaps


@dataclass(frozen=True)
class _Ties:
    """What explains that a detection is on one side only; attributes as the arguments of ``match_detections``."""

    score_atol: float
    score_thr: float | None
    max_per_img: int | None
    nms_iou: float | None

    def reason(self, own: Detections, row: int, other: Detections, unmatched: list[int]) -> str | None:
        """Return why a detection may lack a partner among the others; None if nothing explains it."""
        score = float(own.scores[row])
        if self.score_thr is not None and abs(score - self.score_thr) <= self.score_atol:
            return f"its score is the threshold {self.score_thr:g}"
        is_full = self.max_per_img is not None and len(other) >= self.max_per_img
        if is_full and score <= other.scores.min() + self.score_atol:
            return f"the other side has {self.max_per_img} detections, none worse"
        if self.nms_iou is None:
            return None
        overlaps = _overlaps(Detections(own.boxes[[row]], own.scores[[row]], own.labels[[row]]), other)[0]
        rivals = (other.labels == own.labels[row]) & (other.scores >= score - self.score_atol)
        if (rivals & (np.abs(overlaps - self.nms_iou) <= NMS_ATOL)).any():
            return f"its overlap with a better one is the threshold {self.nms_iou:g} of the NMS"
        near = rivals & (overlaps > self.nms_iou) & (np.abs(other.scores - score) <= self.score_atol)
        if near[unmatched].any():
            return "it and one that it overlaps have the same score, and either may suppress the other"
        return None


def _findings(
    own: Detections,
    rows: list[int],
    other: Detections,
    unmatched: list[int],
    ties: _Ties,
    where: str | None,
    *,
    is_missing: bool,
) -> Iterator[Finding]:
    side = "PyTorch detects, the engine does not" if is_missing else "the engine detects, PyTorch does not"
    for row in rows:
        said = f"{side}: {own.words(row)}"
        reason = ties.reason(own, row, other, unmatched)
        if reason is not None:
            yield Finding("detection-tie", "info", f"{said}; {reason}", where=where)
        else:
            yield Finding("detection-missing" if is_missing else "detection-extra", "error", said, where=where)
