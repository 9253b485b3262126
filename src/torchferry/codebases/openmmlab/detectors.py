"""mmdet's detectors as modules of one input, and the rewriters that let them be exported.

A detector takes the normalised picture and gives

- ``dets``: float32 (batch, K, 5), x1, y1, x2, y2 in pixels of the input, and the score;
- ``labels``: int64 (batch, K), the class.

Rows behind the last detection have score 0 and label -1. How each head gets there is in ``heads/``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from torchferry.exporter.marks import mark
from torchferry.rewrite import FUNCTION_REWRITER

if TYPE_CHECKING:
    from collections.abc import Sequence

OUTPUTS = ("dets", "labels", "masks")


@dataclass(frozen=True)
class Sample:
    """What a head asks of a picture that is not there: the sizes, the same for a whole batch.

    Attributes:
        metainfo: ``img_shape`` (height, width), which may be symbolic, and ``scale_factor``.
    """

    metainfo: dict[str, Any]


class Detector(torch.nn.Module):
    """A detector of mmdet behind its data preprocessor.

    Called on its own, it gives what mmdet itself predicts, as tensors; in an export the rewriters act.

    Args:
        model: In eval mode.
        rows: How many detections a picture may have at most.
    """

    def __init__(self, model: torch.nn.Module, rows: int) -> None:
        super().__init__()
        self.model = model
        self.rows = rows

    def forward(self, input: torch.Tensor) -> Any:  # noqa: A002 - the graph's name for it
        """Detect objects in normalised pictures, float32 (batch, 3, height, width)."""
        if torch.compiler.is_exporting():
            return self.model(input, mode="predict")
        predicted = self.model(input, mmdet_samples(input), mode="predict")
        return predicted if isinstance(predicted, tuple) else self._as_tensors(predicted)

    def _as_tensors(self, samples: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mmdet's predictions with one row for each possible detection."""
        dets = torch.zeros(len(samples), self.rows, 5)
        labels = torch.full((len(samples), self.rows), -1)
        for at, sample in enumerate(samples):
            found = sample.pred_instances
            count = len(found.scores)
            dets[at, :count, :4] = found.bboxes
            dets[at, :count, 4] = found.scores
            labels[at, :count] = found.labels
        return dets, labels


def last_head(model: Any) -> Any:
    """Return what gives a detector's boxes, the head of its only stage or of the second; None if it is no detector."""
    stage = getattr(model, "roi_head", None)
    if stage is not None:
        return stage if hasattr(stage, "bbox_head") else None
    head = getattr(model, "bbox_head", None)
    return head if hasattr(head, "predict_by_feat") else None


class Boundaries(Detector):
    """A detector that gives nothing: what runs it looks at the tensors at its marks."""

    def forward(self, input: torch.Tensor) -> tuple[()]:  # noqa: A002
        """Detect, and keep it to itself."""
        super().forward(input)
        return ()


def mmdet_samples(batch: torch.Tensor) -> list[Any]:
    """Return mmdet's own samples for pictures that were not resized: they fill the input."""
    from mmdet.structures import DetDataSample

    size = tuple(batch.shape[-2:])
    told = {"img_shape": size, "ori_shape": size, "pad_shape": size, "batch_input_shape": size}
    return [DetDataSample(metainfo={**told, "scale_factor": (1.0, 1.0)}) for _ in range(len(batch))]


@FUNCTION_REWRITER.register_rewriter("mmdet.models.detectors.base.BaseDetector.forward", changes_outputs=True)
def base_detector_forward(self: Any, inputs: torch.Tensor, data_samples: Any = None, mode: str = "tensor") -> Any:
    """Mark a detector from its picture to its detections.

    ``forward(inputs, samples) -> samples`` becomes ``forward(input) -> dets, labels[, masks]``.
    """
    if mode != "predict":
        return FUNCTION_REWRITER.get_context().origin_func(self, inputs, data_samples, mode)

    @mark("detector_forward", inputs=["input"], outputs=OUTPUTS)
    def detector_forward(input: torch.Tensor) -> Any:  # noqa: A002
        return self.predict(input, None)

    return detector_forward(inputs)


@FUNCTION_REWRITER.register_rewriter(
    "mmdet.models.detectors.single_stage.SingleStageDetector.predict", changes_outputs=True
)
def single_stage_predict(self: Any, batch_inputs: torch.Tensor, batch_data_samples: Any, rescale: bool = True) -> Any:
    """Hand on what the head gives, in pixels of the input: nothing is scaled back, nothing is put into samples."""
    del batch_data_samples, rescale
    sample = Sample({"img_shape": batch_inputs.shape[-2:], "scale_factor": (1.0, 1.0)})
    return self.bbox_head.predict(self.extract_feat(batch_inputs), [sample], rescale=False)
