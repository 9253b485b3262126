"""Non-maximum suppression with known sizes: PyTorch and every engine keep what a greedy search in NumPy keeps."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchferry as ferry
from torchferry import backends
from torchferry.codebases.openmmlab.nms import multiclass_nms, nms_keep
from torchferry.core.engine import Session

IOU, SCORE, MOST = 0.4501, 0.25, 5  # no overlap of boxes on a grid is that
INPUTS = ["boxes", "scores"]
DYNAMIC = {"boxes": {0: "batch", 1: "n"}, "scores": {0: "batch", 1: "classes", 2: "n"}}
ENGINES = [each for each in ("onnxruntime", "openvino", "reference") if backends.get(each).availability().ok]


class Keep(torch.nn.Module):
    def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return nms_keep(boxes, scores, MOST, IOU, SCORE)


class Detections(torch.nn.Module):
    def __init__(self, max_per_img: int = 6, class_agnostic: bool = False) -> None:
        super().__init__()
        self.told = {"iou_threshold": IOU, "max_per_img": max_per_img, "class_agnostic": class_agnostic}

    def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return multiclass_nms(boxes, scores, **self.told)


def greedy(boxes: np.ndarray, scores: np.ndarray, iou: float, above: float, most: int | None = None) -> list[int]:
    """Return the rows that mmcv's ``nms`` keeps: one picture, one class."""
    left = [i for i in np.argsort(-scores, kind="stable") if scores[i] > above]
    kept: list[int] = []
    while left and len(kept) != most:
        best = left.pop(0)
        kept.append(best)
        left = [i for i in left if not overlap(boxes[best], boxes[i]) > iou]
    return kept


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    width = max(np.float32(0), min(a[2], b[2]) - max(a[0], b[0]))
    height = max(np.float32(0), min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return float(width * height / union) if union else 0.0


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Boxes on a coarse grid and scores of few values: equal ones, and boxes without an area."""
    batch, classes, count = draw(st.integers(1, 2)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    corner, side = st.integers(-2, 4), st.integers(0, 4)
    rows = [[(x := draw(corner)), (y := draw(corner)), x + draw(side), y + draw(side)] for _ in range(batch * count)]
    levels = st.sampled_from([0.0, 0.125, SCORE, 0.375, 0.5, 0.75, 1.0])
    scores = draw(st.lists(levels, min_size=batch * classes * count, max_size=batch * classes * count))
    return (
        np.array(rows, np.float32).reshape(batch, count, 4),
        np.array(scores, np.float32).reshape(batch, classes, count),
    )


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Session]]:
    boxes = torch.rand(2, 7, 4).sort(2).values
    exported = ferry.export(Keep(), (boxes, torch.rand(2, 3, 7)), input_names=INPUTS, dynamic_shapes=DYNAMIC)
    exported.report.raise_for_failure()
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(ferry.compile(exported, ferry.Target(name), _folder(tmp_path_factory)).open())
            for name in ENGINES
        }


def _folder(factory: pytest.TempPathFactory) -> Path:
    return factory.mktemp("engine")


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_the_same_boxes_are_kept_everywhere(sessions: dict[str, Session], case: tuple[np.ndarray, np.ndarray]) -> None:
    boxes, scores = case
    expected = np.zeros(scores.shape, bool)
    for picture, label in np.ndindex(*scores.shape[:2]):
        expected[picture, label, greedy(boxes[picture], scores[picture, label], IOU, SCORE, MOST)] = True
    kept = Keep()(torch.from_numpy(boxes), torch.from_numpy(scores))
    np.testing.assert_array_equal(kept.numpy(), expected)
    for name, session in sessions.items():
        (got,) = session.run({"boxes": boxes, "scores": scores}).values()
        np.testing.assert_array_equal(got, expected, err_msg=name)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_overlap_of_exactly_the_threshold(tmp_path: Path, engine: str) -> None:
    """It stays in PyTorch, mmcv and ONNX Runtime; OpenVINO takes it for too much."""

    class Half(torch.nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return nms_keep(boxes, scores, MOST, 0.5, SCORE)

    boxes = torch.tensor([[[0.0, 0, 2, 2], [0, 0, 2, 4], [0, 0, 2, 7]]])
    scores = torch.tensor([[[0.5, 0.75, 1.0]]])
    assert Half()(boxes, scores).tolist() == [[[True, False, True]]]
    exported = ferry.export(Half(), (boxes, scores), input_names=INPUTS)
    with ferry.compile(exported, ferry.Target(engine), tmp_path).open() as session:
        exactly = [[0.0, 0, 2, 2], [0, 0, 2, 4], [9, 9, 9, 9]]
        (kept,) = session.run({"boxes": np.float32([exactly]), "scores": scores.numpy()}).values()
    assert kept.tolist() == [[[engine != "openvino", True, True]]]


def test_torch_accepts_the_operator() -> None:
    nms_keep.opcheck(torch.rand(2, 7, 4).sort(2).values, torch.rand(2, 3, 7), MOST, IOU, SCORE)


def test_only_operators_of_onnx_are_in_the_graph() -> None:
    exported = ferry.export(Keep(), (torch.rand(1, 7, 4).sort(2).values, torch.rand(1, 3, 7)), input_names=INPUTS)
    assert {node.domain for node in exported.model.graph} == {""}
    assert "NonMaxSuppression" in {node.op_type for node in exported.model.graph}
    assert not exported.model.functions


def test_two_in_one_graph() -> None:
    """Each selects another number of boxes."""

    class Twice(torch.nn.Module):
        def forward(self, boxes: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return nms_keep(boxes, scores, MOST, IOU, 0.1), nms_keep(boxes, scores, MOST, IOU, 0.9)

    example = torch.rand(2, 7, 4).sort(2).values, torch.rand(2, 3, 7)
    exported = ferry.export(Twice().eval(), example, dynamic_shapes={name: {0: "batch"} for name in INPUTS})
    exported.report.raise_for_failure()


@given(case=cases(), max_per_img=st.integers(1, 12), class_agnostic=st.booleans())
@settings(max_examples=100, deadline=None)
def test_detections_are_what_a_search_over_all_pairs_finds(
    case: tuple[np.ndarray, np.ndarray], max_per_img: int, class_agnostic: bool
) -> None:
    boxes, scores = case
    boxes[..., 2:] += 0.5  # boxes without an area do not suppress their own other classes
    module = Detections(max_per_img, class_agnostic)
    dets, labels = module(torch.from_numpy(boxes), torch.from_numpy(scores).mT)
    for picture in range(len(boxes)):
        pairs = [(label, row) for row in range(scores.shape[2]) for label in range(scores.shape[1])]
        values = np.array([scores[picture, label, row] for label, row in pairs])
        groups = (
            [range(len(pairs))]
            if class_agnostic
            else [[i for i, pair in enumerate(pairs) if pair[0] == label] for label in range(scores.shape[1])]
        )
        kept = [
            group[i]
            for group in groups
            for i in greedy(boxes[picture][[pairs[i][1] for i in group]], values[list(group)], IOU, 0.0)
        ]
        best = sorted(values[kept], reverse=True)[:max_per_img]
        count = len(best)
        np.testing.assert_array_equal(dets[picture, :count, 4], best)
        found = {
            (int(label), *map(float, row)) for label, row in zip(labels[picture, :count], dets[picture], strict=False)
        }
        possible = {(pairs[i][0], *map(float, boxes[picture][pairs[i][1]]), float(values[i])) for i in kept}
        assert found <= possible
        assert (labels[picture, count:] == -1).all()
        assert not dets[picture, count:].any()


@given(case=cases(), max_per_img=st.integers(1, 12), class_agnostic=st.booleans())
@settings(max_examples=50, deadline=None)
def test_boxes_of_each_class(case: tuple[np.ndarray, np.ndarray], max_per_img: int, class_agnostic: bool) -> None:
    """The same box for every class, given once and given for each class."""
    boxes, scores = (torch.from_numpy(each) for each in case)
    boxes[..., 2:] += 0.5
    module = Detections(max_per_img, class_agnostic)
    each = boxes[:, :, None].expand(-1, -1, scores.shape[1], -1)
    for once, repeated in zip(module(boxes, scores.mT), module(each, scores.mT), strict=True):
        torch.testing.assert_close(once, repeated)


@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize("engine", ENGINES)
def test_detections_in_engines(tmp_path: Path, engine: str, class_agnostic: bool) -> None:
    """Few boxes and many, none above the threshold and all, at batch 1 and more."""
    generator = torch.Generator().manual_seed(0)

    def data(batch: int, count: int, density: float) -> tuple[torch.Tensor, torch.Tensor]:
        corners = torch.rand(batch, count, 2, generator=generator) * 20
        boxes = torch.cat([corners, corners + torch.rand(batch, count, 2, generator=generator) * 20], 2)
        scores = torch.rand(batch, count, 3, generator=generator)
        return boxes, torch.where(scores > 1 - density, scores, 0.0)

    exported = ferry.export(
        Detections(6, class_agnostic),
        data(2, 9, 1.0),
        input_names=INPUTS,
        dynamic_shapes={name: {0: "batch", 1: "n"} for name in INPUTS},
        output_names=["dets", "labels"],
    )
    exported.report.raise_for_failure()
    report = ferry.verify(
        ferry.compile(exported, ferry.Target(engine), tmp_path),
        Detections(6, class_agnostic),
        [data(*sizes) for sizes in [(1, 1, 1.0), (1, 9, 0.0), (2, 40, 0.3), (3, 40, 1.0)]],
    )
    report.raise_for_failure()


def test_its_operator_is_told_of_where_it_acts_and_nowhere_else() -> None:
    with ferry.RewriterContext() as context:
        assert not any("nms_keep" in row.name for row in context.log.rows)
    acted = ferry.export(Keep(), (torch.rand(1, 3, 4), torch.rand(1, 2, 3)))
    assert any("nms_keep" in name for name in acted.rewrites)
