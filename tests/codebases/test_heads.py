"""mmdet's heads, NMS included: an engine finds what the model of OpenMMLab finds, at other sizes and batches too."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

import torchferry as ferry
from torchferry import backends
from torchferry.codebases.openmmlab import libraries
from torchferry.codebases.openmmlab.detections import Detections, match_detections
from torchferry.core.compare import Tolerance
from torchferry.core.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torchferry.core.engine import Session
    from torchferry.graph import Exported

if not libraries.installed("mmdet"):
    pytest.skip("OpenMMLab's mmdet is not installed (scripts/openmmlab)", allow_module_level=True)

from torchferry.codebases.openmmlab.detectors import Detector, last_head, mmdet_samples
from torchferry.codebases.openmmlab.models import build_model, find_model_config
from torchferry.codebases.openmmlab.source import register

# Of mmdet's own code.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*autocast:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
]

ROWS = 30  # few, so that scores lie apart and no two rows change places
MOST = 20_000  # YOLOX returns all that its NMS keeps
BACKGROUND = 80  # the number of the class that is none, where there is one
# The boxes' own size is the measure of their edges' errors; what is found is matched one by one below.
EXPORT_TOLERANCE = Tolerance(atol=0.05, rtol=1e-3)


@dataclass(frozen=True)
class Case:
    """One detector.

    Attributes:
        config: Its model config.
        layers: Its last layers by their names, and around what their outputs shall be spread: (spread, middle).
        background: What is added to the class behind the last.
        edit: Makes it smaller, so that a test takes seconds.
        size: Height and width of the example.
        other: Another size; None where the size is fixed.
        slow: Left out of the quick tests.
    """

    config: str
    layers: dict[str, tuple[float, float]]
    background: float = 0.0
    edit: Callable[[Any], None] = lambda model: None
    size: tuple[int, int] = (192, 256)
    other: tuple[int, int] | None = (256, 160)
    slow: bool = False


def thin(model: Any) -> None:
    model["bbox_head"]["stacked_convs"] = 1


def thin_r18(model: Any) -> None:
    thin(model)
    model["backbone"]["depth"] = 18
    model["neck"]["in_channels"] = [64, 128, 256, 512]


def few_proposals(model: Any) -> None:
    model["test_cfg"]["rpn"]["max_per_img"] = 200


SCORES, BOXES, FACTORS = (1.0, -4.0), (0.3, 1.0), (1.0, 0.0)
CASES = {
    "yolov3": Case("yolo/yolov3_mobilenetv2_8xb24-320-300e_coco", {"convs_pred": (1.0, -1.0)}),
    "retinanet": Case(
        "retinanet/retinanet_r18_fpn_1x_coco", {"retina_cls": SCORES, "retina_reg": (0.3, 0.0)}, edit=thin
    ),
    "ssd": Case(
        "ssd/ssd300_coco",
        {r"head\.cls_convs": (2.0, 0.0), r"head\.reg_convs": (1.0, 0.0)},
        background=7.0,
        size=(300, 300),
        other=None,
    ),
    "fcos": Case(
        "fcos/fcos_r18_fpn_gn-head-center-normbbox-centeronreg-giou_8xb8-amp-lsj-200e_coco",
        {"conv_cls": SCORES, "conv_reg": BOXES, "conv_centerness": FACTORS},
        edit=thin,
    ),
    "yolox": Case(
        "yolox/yolox_nano_8xb8-300e_coco",
        {"multi_level_conv_cls": SCORES, "multi_level_conv_reg": BOXES, "multi_level_conv_obj": FACTORS},
    ),
    "atss": Case(
        "atss/atss_r18_fpn_8xb8-amp-lsj-200e_coco",
        {"atss_cls": SCORES, "atss_reg": (0.3, 0.0), "atss_centerness": FACTORS},
        edit=thin,
        slow=True,
    ),
    "gfl": Case("gfl/gfl_r50_fpn_1x_coco", {"gfl_cls": SCORES, "gfl_reg": FACTORS}, edit=thin_r18, slow=True),
    "rtmdet": Case("rtmdet/rtmdet_tiny_8xb32-300e_coco", {"rtm_cls": SCORES, "rtm_reg": BOXES}, slow=True),
    "faster_rcnn": Case(
        "faster_rcnn/faster-rcnn_r18_fpn_8xb8-amp-lsj-200e_coco",
        {"rpn_cls": (2.0, 0.0), "rpn_reg": (0.3, 0.0), "fc_cls": (1.5, 0.0), "fc_reg": (1.0, 0.0)},
        background=3.0,
        edit=few_proposals,
        slow=True,
    ),
}


def picture(name: str, size: tuple[int, int]) -> torch.Tensor:
    """Return a photograph, normalised, float32 (1, 3, height, width)."""
    image = Image.fromarray(getattr(data, name)()).convert("RGB").resize(size[::-1])
    values = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    return (values - values.mean()) / values.std()


def pictures(size: tuple[int, int]) -> torch.Tensor:
    return torch.cat([picture("astronaut", size), picture("coffee", size)]).contiguous()


@dataclass(frozen=True)
class Deployed:
    """One detector, exported."""

    case: Case
    model: torch.nn.Module
    exported: Exported

    @property
    def settings(self) -> Any:
        return last_head(self.model).test_cfg

    def predictions(self, batch: torch.Tensor) -> list[Detections]:
        """Return what mmdet's own model predicts, the best rows."""
        with torch.no_grad():
            dets, labels = Detector(self.model, MOST)(batch)
        return [Detections.of_rows(d[:ROWS].numpy(), n[:ROWS].numpy()) for d, n in zip(dets, labels, strict=True)]

    def assert_found(self, session: Session, batch: torch.Tensor) -> None:
        got = session.run({"input": batch.numpy()})
        assert got["dets"].shape == (len(batch), ROWS, 5)
        for place, expected in enumerate(self.predictions(batch)):
            dets, labels = got["dets"][place], got["labels"][place]
            assert (np.diff(dets[:, 4]) <= 0).all()
            assert not dets[labels < 0].any()
            matching = match_detections(
                expected,
                Detections.of_rows(dets, labels),
                score_thr=self.settings.get("score_thr"),
                max_per_img=ROWS,
                nms_iou=self.settings.nms.iou_threshold,
            )
            assert matching.passed, "\n".join(map(str, matching.findings))
            assert len(matching.pairs) >= 0.95 * len(expected)  # ties are rare
            assert matching.max_box < 0.05


@functools.cache
def deployed(name: str) -> Deployed:
    case = CASES[name]
    register()
    config = find_model_config(f"mmdet::{case.config}.py", "mmdet")
    case.edit(config.values["model"])
    model = build_model(config)
    last_head(model).test_cfg["max_per_img"] = ROWS
    if type(last_head(model)).__name__ == "SSDHead":
        last_head(model).loss_cls = None  # mmdet 3.3 asks for it, and SSD has none
    batch = pictures(case.size)
    prepare(case, model)
    dynamic = {0: "batch"} if case.other is None else {0: "batch", 2: "height", 3: "width"}
    exported = ferry.export(
        Detector(model, ROWS).eval(),
        batch,
        dynamic_shapes={"input": dynamic},
        output_names=["dets", "labels"],
        apply_marks=True,
        tolerance=EXPORT_TOLERANCE,
    )
    return Deployed(case, model, exported)


@torch.no_grad()
def prepare(case: Case, model: Any) -> None:
    """Give a model with random weights statistics of the pictures, scores that find something, and boxes of a size."""

    def run() -> None:
        for size in filter(None, (case.size, case.other)):
            model(pictures(size), mmdet_samples(pictures(size)), mode="predict")

    norms = [each for each in model.modules() if isinstance(each, torch.nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    # SSD has none, and would see the same in every picture.
    convolutions = [] if norms else [each for each in model.modules() if isinstance(each, torch.nn.Conv2d)]
    hooks = [each.register_forward_hook(normalise) for each in convolutions]
    run()
    for hook in hooks:
        hook.remove()
    model.eval()
    last = {
        layer: told
        for pattern, told in case.layers.items()
        for name, layer in model.named_modules()
        if re.search(pattern, name) and isinstance(layer, torch.nn.Conv2d | torch.nn.Linear)
    }
    outputs: dict[Any, list[torch.Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda layer, _, output: outputs.setdefault(layer, []).append(output.flatten()))
        for layer in last
    ]
    run()
    for hook in hooks:
        hook.remove()
    for layer, (spread, middle) in last.items():
        seen = torch.cat(outputs[layer])
        layer.weight *= spread / seen.std()
        layer.bias.sub_(seen.mean()).mul_(spread / seen.std()).add_(middle)
        if case.background and len(layer.bias) % (BACKGROUND + 1) == 0:
            layer.bias.view(-1, BACKGROUND + 1)[:, -1] += case.background


def normalise(layer: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    """Give what a layer returns mean 0 and spread 1."""
    mean, scale = output.mean(), 1 / output.std().clamp(min=1e-6)
    layer.weight *= scale
    layer.bias.sub_(mean).mul_(scale)
    return (output - mean) * scale


@pytest.fixture(scope="module", params=[pytest.param(n, marks=[pytest.mark.slow] * c.slow) for n, c in CASES.items()])
def detector(request: pytest.FixtureRequest) -> Deployed:
    return deployed(request.param)


@pytest.fixture(scope="module")
def session(detector: Deployed, tmp_path_factory: pytest.TempPathFactory) -> Session:
    engine = ferry.compile(detector.exported, ferry.Target("onnxruntime"), tmp_path_factory.mktemp("engine"))
    return engine.open()


def test_exports_without_errors(detector: Deployed) -> None:
    detector.exported.report.raise_for_failure()
    assert detector.exported.signature.dims["batch"].min <= 1
    assert {node.domain for node in detector.exported.model.graph} <= {"", "torchferry.mark"}


def test_finds_the_same_at_its_size(detector: Deployed, session: Session) -> None:
    batch = pictures(detector.case.size)
    detector.assert_found(session, batch)
    detector.assert_found(session, batch[1:])


def test_finds_the_same_at_another_size(detector: Deployed, session: Session) -> None:
    if detector.case.other is None:
        assert set(detector.exported.signature.dims) == {"batch"}
        return
    batch = pictures(detector.case.other)
    detector.assert_found(session, batch)
    detector.assert_found(session, batch[:1])


@pytest.mark.skipif(not backends.get("openvino").availability().ok, reason="OpenVINO is not installed")
def test_yolov3_in_openvino(tmp_path: Path) -> None:
    yolov3 = deployed("yolov3")
    with ferry.compile(yolov3.exported, ferry.Target("openvino"), tmp_path).open() as session:
        for size in (yolov3.case.size, yolov3.case.other):
            yolov3.assert_found(session, pictures(size))
            yolov3.assert_found(session, pictures(size)[:1])


def test_yolov3_takes_what_its_neck_takes() -> None:
    """Sizes at which PyTorch itself fails are refused, with the line."""
    signature = deployed("yolov3").exported.signature
    assert all("yolo_neck.py" in str(relation.where) for relation in signature.relations)
    signature.check_sizes({"batch": 1, "height": 96, "width": 320})
    with pytest.raises(ferry.TorchferryError):
        signature.check_sizes({"batch": 1, "height": 100, "width": 320})


def test_boundaries() -> None:
    """The head's three maps, and what NMS is given."""
    exported = deployed("yolov3").exported
    (head,) = ferry.partition(exported, [{"start": ["detector_forward:input"], "end": ["yolo_head:input"]}])
    assert [spec.shape[1] for spec in head.signature.outputs] == [255, 255, 255]
    assert "NonMaxSuppression" not in {node.op_type for node in head.model.graph}
    (network,) = ferry.partition(exported, [{"start": ["detector_forward:input"], "end": ["multiclass_nms:input"]}])
    assert [spec.shape[1:] for spec in network.signature.outputs] == [(1000, 4), (1000, 80)]


class Head(torch.nn.Module):
    """YOLOv3's post-processing by itself."""

    def __init__(self, **test_cfg: Any) -> None:
        super().__init__()
        config = find_model_config("mmdet::yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py", "mmdet")
        described = config.values["model"]
        described["test_cfg"] |= {"max_per_img": ROWS, **test_cfg}
        described["bbox_head"] |= {"num_classes": 5, "in_channels": [8, 8, 8], "out_channels": [8, 8, 8]}
        self.head = build_model(config).bbox_head

    def forward(self, large: torch.Tensor, medium: torch.Tensor, small: torch.Tensor) -> Any:
        metas = [{"img_shape": (0, 0)}] if torch.compiler.is_exporting() else [{}] * len(large)
        found = self.head.predict_by_feat((large, medium, small), batch_img_metas=metas)
        if isinstance(found, tuple):
            return found
        dets, labels = torch.zeros(len(found), ROWS, 5), torch.full((len(found), ROWS), -1)
        for place, each in enumerate(found):
            dets[place, : len(each)] = torch.cat([each.bboxes, each.scores[:, None]], 1)
            labels[place, : len(each)] = each.labels
        return dets, labels


def maps(batch: int, rows: int, columns: int, objectness: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(rows)
    made = []
    for scale in (1, 2, 4):
        values = torch.randn(batch, 3, 10, rows * scale, columns * scale, generator=generator)
        values[:, :, 4] += objectness
        made.append(values.flatten(1, 2))
    return tuple(made)


@pytest.fixture(scope="module")
def yolo_head() -> tuple[Head, Exported]:
    register()
    head = Head().eval()
    names = ["large", "medium", "small"]
    dynamic = {name: {0: "batch", 2: f"rows_{name}", 3: f"columns_{name}"} for name in names}
    exported = ferry.export(
        head, maps(2, 3, 4, 0.0), dynamic_shapes=dynamic, output_names=["dets", "labels"], tolerance=EXPORT_TOLERANCE
    )
    exported.report.raise_for_failure()
    return head, exported


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino", "reference"])
def test_none_few_and_many(yolo_head: tuple[Head, Exported], engine: str, tmp_path: Path) -> None:
    if not backends.get(engine).availability().ok:
        pytest.skip(f"{engine} is not installed")
    head, exported = yolo_head
    counts = []
    with ferry.compile(exported, ferry.Target(engine), tmp_path).open() as session:
        for objectness in (-30.0, -8.0, -4.0, 3.0):
            for sizes in ((1, 1, 1), (1, 2, 3), (2, 3, 4), (3, 5, 2)):
                given = maps(*sizes, objectness)
                wanted = head(*(each.clone() for each in given))
                got = session.run(
                    dict(zip(session.signature.input_names, [each.numpy() for each in given], strict=True))
                )
                for place in range(sizes[0]):
                    expected = Detections.of_rows(wanted[0][place].numpy(), wanted[1][place].numpy())
                    found = Detections.of_rows(got["dets"][place], got["labels"][place])
                    matching = match_detections(
                        expected, found, score_atol=1e-5, score_thr=0.05, max_per_img=ROWS, nms_iou=0.45
                    )
                    assert not [each for each in matching.findings if each.severity == "error"], matching
                    counts.append(len(expected))
    assert min(counts) == 0
    assert any(0 < count < 20 for count in counts)
    assert max(counts) == ROWS


def test_what_no_graph_has_is_refused() -> None:
    register()
    example = maps(1, 1, 1, 0.0)
    with pytest.raises(ferry.TorchferryError, match="soft_nms"):
        ferry.export(Head(nms={"type": "soft_nms", "iou_threshold": 0.5}).eval(), example)


@pytest.mark.parametrize("step", ["_predict_by_feat_single", "_bbox_post_process"])
def test_heads_with_steps_of_their_own_are_refused(step: str) -> None:
    register()
    head = build_model(find_model_config("mmdet::retinanet/retinanet_r18_fpn_1x_coco.py", "mmdet")).bbox_head
    head.__class__ = type("OtherHead", (type(head),), {step: lambda self: None})
    levels = [torch.zeros(1, channels, 1, 1) for channels in (720, 36)]
    with (
        ferry.RewriterContext(),
        pytest.raises(ExportError, match="'OtherHead' is not known"),
    ):
        head.predict_by_feat(*([level] * 5 for level in levels), batch_img_metas=[{"img_shape": (8, 8)}])


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ("mask_rcnn/mask-rcnn_r50_fpn_1x_coco", "'StandardRoIHead' has masks"),
        ("cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco", "'CascadeRoIHead' has a second stage of its own"),
    ],
)
def test_second_stages_of_their_own_are_refused(config: str, what: str) -> None:
    register()
    model = build_model(find_model_config(f"mmdet::{config}.py", "mmdet"))
    with ferry.RewriterContext(), pytest.raises(ExportError, match=what):
        model(torch.zeros(1, 3, 32, 32), mode="predict")
