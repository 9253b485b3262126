"""Deploy configs with MMDeploy's keys."""

from pathlib import Path

import pytest

from torchferry.codebases.openmmlab import libraries
from torchferry.codebases.openmmlab.deploy_config import OWN_CONFIGS, read_python, validate_deploy_config
from torchferry.core.dimension import Dimension
from torchferry.core.errors import ConfigError, MissingBackendError, MissingFileError
from torchferry.pipeline.codebase import read_deploy_config

needs_mmengine = pytest.mark.skipif(
    not libraries.installed("mmengine"), reason="OpenMMLab is not installed; scripts/openmmlab installs it"
)
MMDET = {"codebase_config": {"type": "mmdet"}}


@needs_mmengine
def test_a_config_inherits_ours_and_its_own_bases(tmp_path: Path) -> None:
    (tmp_path / "sizes.py").write_text("onnx_config = dict(input_shape=[416, 320])\n")
    (tmp_path / "deploy.py").write_text(
        '_base_ = ["torchferry::detection/yolov3_partition_static.py"]\n'
        "onnx_config = dict(input_shape=[416, 320], opset_version=18)\n"
        'backend_config = dict(type="openvino", common_config=dict(fp16_mode=False))\n'
    )
    config = read_deploy_config(tmp_path / "deploy.py")
    assert config.onnx_config.input_shape == (416, 320)
    assert config.onnx_config.output_names == ("dets", "labels")
    assert (config.target.backend, config.target.precision, config.target.opset) == ("openvino", "fp32", 18)
    assert config.partition_config["partition_cfg"][0]["end"] == ["yolo_head:input"]


@needs_mmengine
@pytest.mark.parametrize("path", sorted(OWN_CONFIGS.rglob("*.py")), ids=lambda path: path.stem)
def test_every_config_of_ours_is_valid(path: Path) -> None:
    assert read_deploy_config(path).codebase_config.type == "mmdet"


@needs_mmengine
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("onnx_config = dict(", "SyntaxError"),
        ("raise RuntimeError('no')", "RuntimeError: no"),
        (
            '_base_ = ["torchferry::detection/yolov3_partition.py"]',
            "did you mean 'detection/yolov3_partition_static.py'",
        ),
        ('_base_ = ["missing.py"]', "missing.py"),
    ],
)
def test_a_python_config_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "deploy.py").write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_python(tmp_path / "deploy.py")
    assert words in str(raised.value)
    with pytest.raises(MissingFileError):
        read_python(tmp_path / "absent.py")


@needs_mmengine
def test_reading_leaves_mmengine_as_it_was(tmp_path: Path) -> None:
    config = libraries.mmengine("mmengine.config").Config
    before = vars(config)["_get_cfg_path"]
    (tmp_path / "deploy.py").write_text("1 / 0")
    with pytest.raises(ConfigError):
        read_python(tmp_path / "deploy.py")
    assert vars(config)["_get_cfg_path"] is before


def test_toml_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text('[codebase_config]\ntype = "mmdet"\n[onnx_config]\nopset_version = 18\n')
    (tmp_path / "deploy.toml").write_text('base = ["base.toml"]\n[onnx_config]\ninput_shape = [64, 32]\n')
    config = read_deploy_config(tmp_path / "deploy.toml")
    assert (config.onnx_config.input_shape, config.onnx_config.opset_version) == ((64, 32), 18)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "'codebase_config' is missing"),
        ({**MMDET, "onnx_cfg": {}}, "unknown key 'onnx_cfg' (did you mean 'onnx_config'"),
        ({**MMDET, "onnx_config": {"input_shap": [1, 2]}}, "did you mean 'input_shape'"),
        ({**MMDET, "onnx_config": {"input_shape": [1]}}, "'onnx_config.input_shape"),
        ({**MMDET, "onnx_config": {}, "ir_config": {}}, "two names of one section"),
        ({"codebase_config": {"type": "mmdetection"}}, "did you mean 'mmdet'"),
        ({**MMDET, "backend_config": {"precision": "fp12"}}, "backend_config.precision"),
        (
            {**MMDET, "backend_config": {"model_inputs": [{"input_shapes": {"input": {"min_shap": [1]}}}]}},
            "did you mean 'min_shape'",
        ),
        ({**MMDET, "onnx_config": {"export_params": False}}, "onnx_config.export_params"),
    ],
)
def test_what_is_wrong_is_named(values: dict, words: str) -> None:
    with pytest.raises(ConfigError, match="^deploy.py: ") as raised:
        validate_deploy_config(values, "deploy.py")
    assert words in str(raised.value)


def test_shapes_become_ranges_of_the_named_axes() -> None:
    shapes = {"min_shape": [1, 3, 64, 96], "opt_shape": [1, 3, 128, 96], "max_shape": [4, 3, 128, 96]}
    config = validate_deploy_config(
        {
            **MMDET,
            "ir_config": {"dynamic_axes": {"input": [0, 2], "dets": {0: "batch"}}},
            "backend_config": {
                "common_config": {"fp16_mode": True},
                "model_inputs": [{"input_shapes": {"input": shapes}}],
            },
        },
        "test",
    )
    assert config.dynamic_shapes((1, 3, 64, 96)) == {
        "input": {0: Dimension("batch", 1, 4, opt=1), 2: Dimension("height", 64, 128, opt=128)}
    }
    assert config.target.precision == "fp16"
    with pytest.raises(ConfigError, match=r"input\.min_shape' has 96 at axis 3.*not dynamic and 97") as raised:
        config.dynamic_shapes((1, 3, 64, 97))
    assert "onnx_config.dynamic_axes" in raised.value.hint


def test_engines_that_mmdeploy_has_and_we_do_not_are_refused_by_name() -> None:
    for name in ("torchscript", "pplnn", "coreml"):
        config = validate_deploy_config({**MMDET, "backend_config": {"type": name}}, "test")
        with pytest.raises(MissingBackendError, match=f"unknown backend '{name}'"):
            _ = config.target


@pytest.mark.parametrize(("precision", "verified"), [("FP16", "fp32"), ("int8", "fp32"), ("bf16", "bf16")])
def test_the_graph_is_in_fp32_whatever_precision_the_engine_shall_have(precision: str, verified: str) -> None:
    config = validate_deploy_config({**MMDET, "backend_config": {"precision": precision}}, "test")
    assert (config.target.precision, config.verified_in) == (precision.lower(), verified)
    said = [finding for finding in config.findings() if finding.code == "written-in-fp32"]
    assert len(said) == (verified == "fp32")
    assert all(precision.lower() in finding.message for finding in said)


def test_what_has_no_effect_is_said() -> None:
    config = validate_deploy_config(
        {
            "codebase_config": {"type": "mmdet", "model_type": "end2end"},
            "onnx_config": {"optimize": False, "dynamic_axes": {"dets": {0: "batch"}}},
            "backend_config": {
                "common_config": {"max_workspace_size": 1},
                "model_inputs": [{}, {"opt_shapes": {"input": [1]}}],
                "use_vulkan": True,
            },
            "calib_config": {"create_calib": True},
        },
        "test",
    )
    findings = config.findings()
    assert {finding.code for finding in findings} == {"config-ignored"}
    said = " ".join(finding.message for finding in findings)
    for key in (
        "codebase_config.model_type",
        "onnx_config.optimize",
        "onnx_config.dynamic_axes",
        "backend_config.common_config.max_workspace_size",
        "backend_config.model_inputs.1",
        "backend_config.use_vulkan",
        "calib_config",
    ):
        assert f"'{key}'" in said
    assert not validate_deploy_config(MMDET, "test").findings()
