"""Case 8: mmdet's YOLOv3 by one command: the whole with its marks, and the part up to its head."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from skimage import data

import torchferry as ferry
from torchferry.cli import main
from torchferry.codebases.openmmlab import libraries
from torchferry.core.errors import ConfigError, InputError, MissingFileError
from torchferry.pipeline.codebase import export_codebase, read_deploy_config

if not libraries.installed("mmdet"):
    pytest.skip("OpenMMLab is not installed; scripts/openmmlab installs it", allow_module_level=True)

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "yolov3" / "deploy.py"
YOLOV3 = "mmdet::yolo/yolov3_d53_8xb8-ms-608-273e_coco.py"
RETINANET = "retinanet/retinanet_r50_fpn_1x_coco"
ENGINES = ("onnxruntime", "openvino", "reference")


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "astronaut.png"
    Image.fromarray(data.astronaut()).resize((256, 256)).save(file)
    return file


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory, picture: Path) -> Path:
    """What the command of the example writes."""
    folder = tmp_path_factory.mktemp("yolov3")
    arguments = ["export", EXAMPLE, YOLOV3, "none:50", picture, "--work-dir", folder / "out"]
    assert main([str(argument) for argument in arguments]) == 0
    return folder / "out"


@pytest.fixture(scope="session")
def prepared(picture: Path):
    """The same model and picture in this process."""
    from torchferry.codebases.openmmlab.source import prepare

    return prepare(read_deploy_config(EXAMPLE), YOLOV3, "none:50", picture)


@pytest.fixture(scope="session")
def pred_maps(prepared) -> list[np.ndarray]:
    with torch.no_grad():
        return [level.numpy() for level in prepared.source.model.model(*prepared.source.args, mode="tensor")[0]]


def test_the_command_writes_whole_part_and_report(exported: Path) -> None:
    assert {file.name for file in exported.iterdir()} == {"end2end.onnx", "yolov3.onnx", "report.html", "report.json"}
    report = json.loads((exported / "report.json").read_text())
    assert report["passed"]
    assert re.match(r"(4\d|50) of \1 detections matched", report["facts"]["detections"]["data"])
    compared = {each["name"] for each in report["comparisons"]}
    assert {"yolov3/pred_maps.0", "pred_maps.2 at yolo_head[0]:input.2"} <= compared


def test_the_whole_has_all_marks_and_gives_detections(exported: Path) -> None:
    model = onnx.load(exported / "end2end.onnx")
    marks = [
        {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute}
        for n in model.graph.node
        if n.op_type == "Mark"
    ]
    boundaries = {(mark["func"].decode(), mark["type"].decode(), mark["name"].decode()) for mark in marks}
    assert {("detector_forward", "input", "input"), ("detector_forward", "output", "dets")} <= boundaries
    assert {("yolo_head", "input", f"pred_maps.{at}") for at in range(3)} <= boundaries
    assert [value.name for value in model.graph.output] == ["dets", "labels"]


def test_the_part_has_no_anchors_no_decoding_and_no_suppression(exported: Path) -> None:
    model = onnx.load(exported / "yolov3.onnx")
    operators = {node.op_type for node in model.graph.node}
    assert operators == {"Conv", "LeakyRelu", "Add", "Resize", "Concat"}
    assert [value.name for value in model.graph.output] == ["pred_maps.0", "pred_maps.1", "pred_maps.2"]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_part_agrees_with_pytorch_on_every_engine(
    exported: Path, prepared, pred_maps: list[np.ndarray], engine: str, tmp_path: Path
) -> None:
    compiled = ferry.compile(exported / "yolov3.onnx", ferry.Target(engine), tmp_path / engine)
    with compiled.open() as session:
        got = session.run({"input": prepared.source.args[0].numpy()})
    assert [array.shape for array in got.values()] == [(1, 255, 19, 19), (1, 255, 38, 38), (1, 255, 76, 76)]
    for want, array in zip(pred_maps, got.values(), strict=True):
        assert np.abs(array - want).max() <= 1e-4 * max(1.0, np.abs(want).max())


def test_detections_without_a_checkpoint_are_neither_none_nor_absurd(prepared) -> None:
    with torch.no_grad():
        dets, labels = prepared.source.model(*prepared.source.args)
    assert (dets.shape, labels.shape) == ((1, 100, 5), (1, 100))
    assert 40 <= (labels >= 0).sum() <= 50  # of 50 candidates, some of which overlap
    found = dets[labels >= 0]
    assert found.isfinite().all()
    assert (found[:, 2:4] > found[:, :2]).all()
    assert (found[:, :4].abs() < 3 * 608).all()


def test_the_model_itself_is_not_patched(exported: Path) -> None:
    from mmdet.models.detectors.base import BaseDetector

    assert BaseDetector.forward.__module__ == "mmdet.models.detectors.base"
    assert BaseDetector.forward.__code__.co_filename.endswith("base.py")
    assert "mmcv._ext" not in sys.modules


def test_any_size_and_batch(picture: Path, tmp_path: Path) -> None:
    config = tmp_path / "dynamic.toml"
    config.write_text(
        """
        [codebase_config]
        type = "mmdet"
        [onnx_config]
        input_shape = [128, 96]
        dynamic_axes = { input = { 0 = "batch", 2 = "height", 3 = "width" } }
        [backend_config]
        type = "onnxruntime"
        precision = "FP16"
        [partition_config]
        type = "single_stage"
        [[backend_config.model_inputs]]
        input_shapes = { input = { min_shape = [1, 3, 64, 64], max_shape = [3, 3, 192, 160] } }
        """
    )
    report = export_codebase(config, RETINANET, "none:200", picture, tmp_path / "out")
    assert report.passed, report.to_text()
    assert "written-in-fp32" in {finding.code for finding in report.findings}
    cases = report.facts["detections"]
    assert {"batch=1, height=64, width=64", "batch=3, height=192, width=160, picture 2"} <= cases.keys()
    assert any(not words.startswith("0 of 0") for words in cases.values())
    assert "all parts, height=64" in {case.replace("batch=1, ", "").split(", width")[0] for case in cases}
    operators = {node.op_type for node in onnx.load(tmp_path / "out" / "partition0.onnx").graph.node}
    assert "Conv" in operators
    assert "NonMaxSuppression" not in operators
    session = ferry.compile(tmp_path / "out" / "end2end.onnx", ferry.Target("onnxruntime"), tmp_path / "engine").open()
    with session:
        assert session.run({"input": np.zeros((3, 3, 64, 160), np.float32)})["dets"].shape == (3, 100, 5)
        with pytest.raises(InputError, match="'batch' = 4"):
            session.run({"input": np.zeros((4, 3, 64, 160), np.float32)})


def test_two_stages_are_cut_by_name(picture: Path, tmp_path: Path) -> None:
    (tmp_path / "deploy.py").write_text(
        '_base_ = ["torchferry::detection/single_stage_static.py"]\n'
        "onnx_config = dict(input_shape=[160, 128])\n"
        'partition_config = dict(type="two_stage", apply_marks=True)\n'
    )
    report = export_codebase(
        tmp_path / "deploy.py", "faster_rcnn/faster-rcnn_r50_fpn_1x_coco", "none:30", picture, tmp_path / "out"
    )
    assert report.passed, report.to_text()
    assert set(report.facts["detections"]) == {"data", "all parts, data"}
    stage = onnx.load(tmp_path / "out" / "partition1.onnx")
    assert "RoiAlign" not in {node.op_type for node in stage.graph.node}
    assert len(stage.graph.output) == 2


@pytest.mark.parametrize(
    ("model_config", "checkpoint", "error", "words"),
    [
        (
            "mmdet::yolo/yolov3_d53_8xb8-ms-608-273e_cocoo.py",
            "none",
            ConfigError,
            "did you mean 'yolo/yolov3_d53_8xb8-ms-6",
        ),
        (
            "yolov3_d53_8xb8-ms-608-273e_coco.py",
            "none",
            ConfigError,
            "did you mean 'yolo/yolov3_d53_8xb8-ms-608-273e_coco.py'",
        ),
        ("mmdet::../yolo/x.py", "none", ConfigError, "there is no file"),
        (YOLOV3, "none:few", ConfigError, "none:COUNT"),
        (YOLOV3, "weights.pth", MissingFileError, "'weights.pth' does not exist"),
        (YOLOV3, "http://example.com/a-01234567.pth", ConfigError, "must be an https address"),
    ],
)
def test_what_cannot_be_used_is_named(
    picture: Path, tmp_path: Path, model_config: str, checkpoint: str, error: type, words: str
) -> None:
    with pytest.raises(error) as raised:
        export_codebase(EXAMPLE, model_config, checkpoint, picture, tmp_path / "out")
    assert words in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_the_other_form_of_the_command_has_other_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "deploy.py", "model.py", "none", "a.png"]) == 2
    assert "--work-dir" in capsys.readouterr().err
    assert main(["export", "deploy.py", "model.py", "none", "a.png", "--work-dir", "out", "--opset", "17"]) == 2
    assert "--opset has no effect beside a deploy config" in capsys.readouterr().err
    assert main(["export", "deploy.toml", "--device", "cpu"]) == 2
    assert "--device needs a deploy config" in capsys.readouterr().err


def test_a_reference_names_a_model_too(picture: Path, tmp_path: Path) -> None:
    """``codebase:name`` wherever a model is named; the module takes the normalised picture."""
    np.savez(tmp_path / "input.npz", np.random.default_rng(0).random((1, 3, 64, 64), np.float32))
    flags = [
        "--model",
        "mmdet:yolo/yolov3_mobilenetv2_8xb24-320-300e_coco",
        "--input",
        f"input={tmp_path / 'input.npz'}",
    ]
    assert main(["export", *flags, "--output-names", "dets,labels", "-o", str(tmp_path / "model.onnx")]) == 0
    assert [value.name for value in onnx.load(tmp_path / "model.onnx").graph.output] == ["dets", "labels"]
