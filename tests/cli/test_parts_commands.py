"""``export`` with a partition_config, and ``partition`` with data: parts are verified before they are written."""

import numpy as np
import onnx
import pytest

import torchferry

MODEL = """
import torch
import torchferry as ferry


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU())
        self.head = torch.nn.Conv2d(4, 2, 1)

    @ferry.mark("detector_forward", inputs=["input"], outputs=["maps"])
    def forward(self, x):
        return self.head(self.backbone(x)).sigmoid()
"""
CONFIG = """
inputs = ["picture.png"]
out = "net.onnx"

[model]
factory = "marked.py:Net"

[export]
output_names = ["maps"]

[export.dynamic]
x = { 2 = "h", 3 = "w" }

[partition_config]
type = "of my own"
apply_marks = true
rest = true

[[partition_config.partition_cfg]]
save_file = "backbone.onnx"
start = ["detector_forward:input"]
end = ["backbone:output"]
output_names = ["features"]
dynamic_axes = { x = { 2 = "height", 3 = "width" }, features = [2, 3] }
"""


@pytest.fixture
def config(place):
    (place / "marked.py").write_text(MODEL)
    (place / "deploy.toml").write_text(CONFIG)
    return "deploy.toml"


@pytest.fixture
def whole(ferry, config):
    assert ferry("export", config, "-o", "net.onnx").status == 0
    return "net.onnx"


def written(folder):
    return {path.name for path in folder.glob("*.onnx")}


def test_export_writes_the_whole_and_its_parts(ferry, place, config):
    ran = ferry("export", config, "-o", "end2end.onnx")
    assert (ran.status, ran.err) == (0, "")
    assert written(place) == {"end2end.onnx", "backbone.onnx", "rest.onnx"}
    lines = ran.out.splitlines()
    assert lines[:2] == ["end2end.onnx", "verification of parts: passed"]
    rows = {line.split()[0] for line in lines[2:] if line.endswith("agrees")}
    assert {"backbone/features", "rest/maps", "joined/maps", "features", "maps"} <= rows
    marks = [node for node in onnx.load("end2end.onnx").graph.node if node.op_type == "Mark"]
    assert len(marks) == 2
    assert [out.name for out in onnx.load("backbone.onnx").graph.output] == ["features"]


def test_export_as_json_holds_the_parts(ferry, config):
    values = ferry("export", config, "-o", "end2end.onnx", "--json").values
    assert {"backbone/features", "rest/maps"} <= {row["name"] for row in values["report"]["comparisons"]}
    assert values["report"]["facts"]["parts"]["backbone"].startswith("onnxruntime-fp32")
    assert {"partition", "verify parts"} <= {step["name"] for step in values["steps"]}


def test_parts_are_verified_on_the_target_and_at_the_tolerance(ferry, config):
    values = ferry("export", config, "--target", "openvino", "--set", "verify.atol=0.5", "--json").values
    assert values["report"]["facts"]["parts"]["rest"] == "openvino-fp32, atol 0.5, rtol 0.0001"


def test_nothing_is_written_where_a_part_differs(ferry, place, config):
    tolerance = ("--set", "verify.atol=1e-5", "--set", "verify.rtol=0")
    ran = ferry("export", config, "--target", "openvino", "--precision", "bf16", *tolerance, "-o", "net.onnx")
    assert (ran.status, ran.out) == (1, "")
    assert ran.err.startswith("error: verification of parts: 2 errors")
    assert "part 'backbone' differs on openvino-bf16: output 'features'" in ran.err
    assert "part 'rest' differs on openvino-bf16: output 'maps'" in ran.err
    assert not written(place)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("partition_config.partition_cfg=[{save_file='net.onnx'}]", "part 'net' has the whole's save_file, 'net.onnx'"),
        ("partition_config.partition_cfg=[{end='backbon:output'}]", "'backbon:output' is no mark, module or tensor"),
        ("partition_config.partition_cfg=[]", "there is no partition 'of my own'"),
        ("partition_config.partition_cfg=[{savefile='a'}]", "unknown key 'partition_config.partition_cfg.0.savefile'"),
        ("partition_config.apply_marks=false", "'detector_forward:input' is no mark, module or tensor"),
    ],
)
def test_a_config_that_cannot_be_used(ferry, place, config, setting, message):
    ran = ferry("export", config, "--set", setting, "-o", "net.onnx")
    assert ran.status == 2
    assert message in ran.refusal
    assert not written(place)


def test_a_partition_config_needs_parts(ferry, place):
    (place / "marked.py").write_text(MODEL)
    (place / "deploy.toml").write_text(CONFIG.partition("[partition_config]")[0] + "[partition_config]\nrest = true\n")
    assert "needs partition_cfg, or the type of a cut" in ferry("export", "deploy.toml").refusal


def test_axes_that_are_not_dynamic_are_said(ferry, place, config):
    (place / config).write_text(CONFIG.replace(', 3 = "w" }\n\n', " }\n\n"))
    ran = ferry("export", config, "-o", "net.onnx")
    assert ran.status == 0
    assert ran.out.count("[axis-not-dynamic]") == 2
    assert "part 'backbone' cannot have the dynamic_axes of 'features': its axis 3 is fixed in features: " in ran.out


def test_partition_verifies_the_part_on_data(ferry, place, whole):
    np.savez("x.npz", x=np.random.default_rng(0).random((1, 3, 6, 8), np.float32))
    flags = ("--start", "head:input", "-o", "head.onnx", "--input", "x=x.npz", "--input", "x=picture.png")
    ran = ferry("partition", whole, *flags, "--target", "openvino")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.startswith("head.onnx\nverification of parts: passed\n  head/maps [data 1] max abs ")
    assert "head/maps [data 2]" in ran.out
    assert "head: openvino-fp32" in ran.out
    values = ferry("partition", whole, *flags, "--json").values
    assert values["report"]["passed"]
    assert values["outputs"] == ["maps: float32[1, 2, h, w]"]


def test_partition_refuses_a_part_that_fails(ferry, place, whole):
    ran = ferry("partition", whole, "--end", "head:input", "-o", "part.onnx", "--input", "y=1,1")
    assert "unknown input 'y'" in ran.refusal
    ran = ferry("partition", whole, "-o", "part.onnx", "--input", "x=picture.png", "--precision", "int8")
    assert "the graph is not quantised" in ran.refusal
    assert not (place / "part.onnx").exists()


def test_calibration_data_is_an_input_of_the_program(ferry, place, whole):
    """What is recorded for a part is read by ``--input``, every sample of it."""
    plan = torchferry.plan_partition(whole, [{"name": "head", "start": "head:input"}])
    images = [(np.full((1, 3, 6, 8), value, np.float32),) for value in (0.1, 0.9)]
    torchferry.record_calibration(plan, images, "calibration")
    assert ferry("partition", whole, "--start", "head:input", "-o", "head.onnx").status == 0
    for data in ("calibration/head.npz", "relu=calibration/head.npz"):
        ran = ferry("partition", "head.onnx", "-o", "again.onnx", "--input", data)
        assert ran.status == 0, ran.err
        assert "again/maps [data 1]" in ran.out
        assert "again/maps [data 2]" in ran.out
