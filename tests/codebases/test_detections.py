"""Matching an engine's detections with PyTorch's: any order, and only what the tolerance explains may differ."""

import numpy as np
import pytest

from torchferry.codebases.openmmlab.detections import Detections, match_detections

BOXES = np.array([[0, 0, 100, 100], [50, 50, 80, 90], [200, 10, 210, 20]], np.float32)
SCORES = np.array([0.9, 0.6, 0.3], np.float32)
LABELS = np.array([1, 2, 1])
FOUND = Detections(BOXES, SCORES, LABELS)


def rows(*which: int, shift: float = 0.0, score: float = 0.0, label: int = 0) -> Detections:
    chosen = list(which)
    return Detections(BOXES[chosen] + np.float32(shift), SCORES[chosen] + np.float32(score), LABELS[chosen] + label)


def codes(expected: Detections, actual: Detections, **told: float) -> list[str]:
    return [finding.code for finding in match_detections(expected, actual, **told).findings]


def test_order_does_not_matter() -> None:
    matching = match_detections(FOUND, rows(2, 0, 1, shift=0.001, score=1e-5))
    assert matching.passed
    assert not matching.findings
    assert sorted(matching.pairs) == [(0, 1), (1, 2), (2, 0)]
    assert matching.max_box == pytest.approx(0.001, rel=0.01)
    assert matching.max_score == pytest.approx(1e-5, rel=0.01)
    assert str(matching).startswith("3 of 3 detections matched (the engine has 3)")


@pytest.mark.parametrize(
    ("actual", "expected_codes"),
    [
        (rows(0, 1), ["detection-missing"]),
        (rows(0, 1, 2, 2), ["detection-extra"]),
        (rows(0, 1, 2, score=0.01), ["detection-missing"] * 3 + ["detection-extra"] * 3),
        (rows(0, 1, 2, label=1), ["detection-missing"] * 3 + ["detection-extra"] * 3),
        # 0.3 pixels are little for a large box.
        (rows(0, 1, 2, shift=0.2), ["detection-missing"] * 2 + ["detection-extra"] * 2),
    ],
    ids=["missing", "twice", "score", "label", "box"],
)
def test_what_differs_is_an_error_that_names_it(actual: Detections, expected_codes: list[str]) -> None:
    matching = match_detections(FOUND, actual, where="astronaut")
    assert [finding.code for finding in matching.findings] == expected_codes
    assert not matching.passed
    assert all(finding.where == "astronaut" for finding in matching.findings)


def test_a_finding_says_which_detection() -> None:
    (finding,) = match_detections(FOUND, rows(0, 2)).findings
    assert "label 2, score 0.6000, box (50.0, 50.0, 80.0, 90.0)" in finding.message


def test_as_many_pairs_as_there_can_be() -> None:
    """The nearest box of the first is the only one that the second can have."""
    left = Detections(np.float32([[0, 0, 100, 100], [0, 0, 100, 100.9]]), np.float32([0.5, 0.5]), np.array([0, 0]))
    right = Detections(np.float32([[0, 0, 100, 100.1], [0, 0, 100, 99.2]]), np.float32([0.5, 0.5]), np.array([0, 0]))
    assert sorted(match_detections(left, right).pairs) == [(0, 1), (1, 0)]


@pytest.mark.parametrize("found", [FOUND, rows()], ids=["some", "none"])
def test_nothing_at_all(found: Detections) -> None:
    matching = match_detections(rows(), found)
    assert len(matching.findings) == len(found)
    assert match_detections(found, found).passed


def test_on_the_threshold_of_the_scores() -> None:
    assert codes(FOUND, rows(0, 1), score_thr=0.2995) == ["detection-tie"]
    assert codes(FOUND, rows(0, 1), score_thr=0.29) == ["detection-missing"]


def test_at_the_end_of_as_many_as_there_may_be() -> None:
    """Two of nearly the same score, and room for one of them."""
    other = Detections(BOXES[[0, 1, 0]] + np.float32([[0], [0], [300]]), SCORES + np.float32([0, 0, 5e-4]), LABELS)
    assert codes(FOUND, other, max_per_img=3) == ["detection-tie"] * 2
    assert codes(FOUND, other, max_per_img=4) == ["detection-missing", "detection-extra"]
    assert codes(FOUND, rows(1, 2), max_per_img=2) == ["detection-missing"]


def test_on_the_threshold_of_the_nms() -> None:
    boxes = np.float32([[0, 0, 100, 100], [0, 0, 100, 50.0005]])
    both = Detections(boxes, np.float32([0.9, 0.5]), np.array([0, 0]))
    one = Detections(boxes[:1], np.float32([0.9]), np.array([0]))
    assert codes(both, one, nms_iou=0.5) == ["detection-tie"]
    assert codes(one, both, nms_iou=0.5) == ["detection-tie"]
    assert codes(both, one, nms_iou=0.6) == ["detection-missing"]
    assert codes(both, one) == ["detection-missing"]


def test_either_of_two_with_the_same_score() -> None:
    boxes = np.float32([[0, 0, 100, 100], [10, 0, 110, 100]])
    first, second = (Detections(boxes[[i]], np.float32([0.5 + i * 1e-5]), np.array([0])) for i in range(2))
    assert codes(first, second, nms_iou=0.5) == ["detection-tie"] * 2
    assert codes(first, second, nms_iou=0.9) == ["detection-missing", "detection-extra"]


def test_rows_behind_the_last_detection_are_none() -> None:
    dets = np.zeros((3, 5), np.float32)
    dets[0] = [1, 2, 3, 4, 0.5]
    found = Detections.of_rows(dets, np.array([7, -1, -1]))
    assert len(found) == 1
    assert found.words(0) == "label 7, score 0.5000, box (1.0, 2.0, 3.0, 4.0)"
